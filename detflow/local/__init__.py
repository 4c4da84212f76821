"""The embedded stack: Postgres, nats-server, services and gateway as supervised processes."""
