"""The HTTP gateway: REST, SSE, OpenAPI and uploads in front of the services. It has no state."""
