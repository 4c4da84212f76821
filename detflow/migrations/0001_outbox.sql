-- Events written with the state change they tell of; the relay publishes them in order per resource.
create table outbox (
  position    bigint generated always as identity primary key,
  event_id    text not null unique,
  resource    text not null,             -- kind.id, e.g. training.d6h0e90gms4g8vj5
  seq         bigint not null,           -- from 1 per resource, without holes
  subject     text not null,
  name        text not null,             -- resource name
  payload     bytea not null,            -- detflow.v1.Event
  traceparent text not null default '',
  create_time timestamptz not null default now(),
  publish_time timestamptz,
  unique (resource, seq)
);
create index outbox_unpublished on outbox (position) where publish_time is null;

-- The last sequence number of each resource. Its row lock orders concurrent writers of one resource.
create table outbox_seq (
  resource text primary key,
  seq      bigint not null
);

-- Which incarnation of the event stream the outbox was published to; another one means publish again.
create table relay (
  only_row boolean primary key default true check (only_row),
  stream   text not null
);

-- Events whose effect is committed.
create table inbox (
  consumer     text not null,
  event_id     text not null,
  receive_time timestamptz not null default now(),
  primary key (consumer, event_id)
);

-- Failed deliveries, counted here because JetStream forgets its count when the server is killed.
create table inbox_failure (
  consumer text not null,
  event_id text not null,
  attempts int not null,
  error    text not null,
  primary key (consumer, event_id)
);
