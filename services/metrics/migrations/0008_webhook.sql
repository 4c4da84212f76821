-- Addresses that are told of what happens to the trainings of a project.
create table webhook (
  id             text collate "C" primary key,   -- sorts by age
  project_id     text collate "C" not null,
  display_name   text not null,
  url            text not null,
  event_types    smallint[] not null,            -- detflow.v1.Webhook.EventType; empty: all of them
  disabled       boolean not null,
  request_id     text,
  request_sha256 bytea not null,
  revision       bigint not null default 1,
  create_time    timestamptz not null default now(),
  update_time    timestamptz not null default now()
);
create unique index webhook_request_id on webhook (project_id, request_id);
create index webhook_by_project on webhook (project_id, id);

-- Keys that sign what is sent to a webhook. In a table of their own, so that no list or log of webhooks holds one.
create table webhook_secret (
  position    bigint generated always as identity primary key,
  webhook_id  text collate "C" not null references webhook on delete cascade,
  key         bytea not null,
  create_time timestamptz not null default now(),
  end_time    timestamptz                        -- until when an old one signs too; null: the one in force
);
create unique index webhook_secret_in_force on webhook_secret (webhook_id) where end_time is null;
create index webhook_secret_by_webhook on webhook_secret (webhook_id);

-- One message to a webhook. A process that is about to send it holds its lease.
create table webhook_delivery (
  id            text collate "C" primary key,    -- sorts by age; the header webhook-id
  webhook_id    text collate "C" not null references webhook on delete cascade,
  event_type    smallint not null,               -- detflow.v1.Webhook.EventType; 0 for a test
  training_id   text references training (id) on delete cascade,  -- null for a test
  revision      bigint not null,                 -- of the training
  body          bytea not null,                  -- what is posted, the same in every try
  state         text not null default 'PENDING' check (state in ('PENDING', 'DELIVERED', 'FAILED')),
  num_tries     int not null default 0,
  http_status   int not null default 0,
  error         text not null default '',
  lease         text not null default '',
  create_time   timestamptz not null default now(),
  last_try_time timestamptz,
  next_try_time timestamptz default now(),
  check ((state = 'PENDING') = (next_try_time is not null)),
  unique (webhook_id, training_id, revision)
);
create index webhook_delivery_by_webhook on webhook_delivery (webhook_id, id);
create index webhook_delivery_due on webhook_delivery (webhook_id, next_try_time) where state = 'PENDING';
create index webhook_delivery_by_training on webhook_delivery (training_id);
create index webhook_delivery_by_time on webhook_delivery (create_time);
