create table project (
  id                  text collate "C" primary key,
  position            bigint generated always as identity unique,
  display_name        text not null,
  next_version_number bigint not null default 0,   -- the n of the next V_n; never goes back
  create_time         timestamptz not null default now()
);

insert into project (id, display_name) values ('default', 'Default');

create table version (
  id                     text collate "C" primary key,   -- sorts by age
  project_id             text collate "C" not null references project,
  display_name           text not null,                  -- as typed
  name_key               text collate "C" not null,      -- what must be unique
  state                  text not null check (state in (
                           'PREPROCESSING', 'READY', 'QUEUED', 'PROVISIONING', 'TRAINING', 'EVALUATING', 'COMPLETED',
                           'FAILED', 'STOPPED', 'PAUSED')),
  dataset                text not null,
  class_names            text[] not null,
  percentages            int[] not null,                 -- train, val, test
  max_side_px            int not null,
  grayscale              boolean not null,
  augmentations          text[] not null,
  seed                   bigint not null,
  num_images             bigint[],                       -- train, val, test
  manifest_key           text,
  manifest_size_bytes    bigint,
  manifest_sha256        text,
  training_id            text,                           -- the training whose state it follows
  run_time               timestamptz,                    -- when that training was queued
  failure                bytea,                          -- detflow.v1.Failure
  preprocessing_revision bigint not null default 0,
  request_id             text,
  request_sha256         bytea not null,
  revision               bigint not null default 1,
  create_time            timestamptz not null default now(),
  update_time            timestamptz not null default now(),
  delete_time            timestamptz,
  constraint version_has_its_bundle check (
    state in ('PREPROCESSING', 'FAILED') or (manifest_key is not null and num_images is not null))
);

create unique index version_name_key on version (project_id, name_key) where delete_time is null;
create unique index version_request_id on version (project_id, request_id);
create index version_by_project on version (project_id, id);
create index version_by_update_time on version (project_id, update_time);

-- How far the events of each training were applied.
create table version_training (
  training_id text collate "C" primary key,
  version_id  text collate "C" not null references version on delete cascade,
  revision    bigint not null,
  state       text not null
);
