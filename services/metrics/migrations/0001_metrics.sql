-- Trainings as their events tell of them.
create table training (
  id            text primary key,
  project_id    text not null,
  name          text not null,                  -- projects/{p}/versions/{v}/trainings/{id}
  state         smallint not null default 0,    -- detflow.v1.Training.State of the newest revision
  revision      bigint not null default 0,
  attempt       int not null default 0,         -- newest attempt seen
  applied_seq   bigint not null default 0,      -- every event up to this one is applied
  applied_ahead bigint[] not null default '{}'  -- and these above it
);

-- Where each attempt began: what older attempts measured from there on is void.
create table attempt (
  training_id text not null references training (id) on delete cascade,
  attempt     int not null,
  first_epoch int not null,
  primary key (training_id, attempt)
);

-- One value per training, epoch and name.
create table series_point (
  training_id text not null references training (id) on delete cascade,
  epoch       int not null,
  name        text not null,
  attempt     int not null,
  value       double precision not null,
  primary key (training_id, epoch, name)
);

-- Predictions that wait to be measured. A process that works on one holds its lease.
create table evaluation_job (
  training_id text not null references training (id) on delete cascade,
  attempt     int not null,
  split       text not null check (split in ('val', 'test')),
  manifest    bytea not null,                   -- detflow.v1.StoredObject
  predictions bytea not null,                   -- detflow.v1.StoredObject
  traceparent text not null default '',
  num_tries   int not null default 0,
  lease       text not null default '',         -- who works on it
  run_after   timestamptz not null default now(),
  create_time timestamptz not null default now(),
  primary key (training_id, attempt, split)
);
create index evaluation_job_due on evaluation_job (run_after);

-- The newest evaluation of each split.
create table evaluation (
  training_id text not null references training (id) on delete cascade,
  split       text not null check (split in ('val', 'test')),
  attempt     int not null,
  measurement jsonb,
  failure     bytea,                            -- detflow.v1.Failure
  create_time timestamptz not null default now(),
  primary key (training_id, split),
  check ((measurement is null) <> (failure is null))
);
