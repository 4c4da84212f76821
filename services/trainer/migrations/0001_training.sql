-- Trainings. `state` follows the graph in services/trainer/domain.py; every change is one guarded update.
create table training (
  id                text primary key,
  project           text not null,
  version           text not null,
  request_id        text,
  state             text not null check (state in ('QUEUED', 'PROVISIONING', 'RUNNING', 'EVALUATING',
                                                   'SUCCEEDED', 'FAILED', 'STOPPED', 'PAUSED')),
  revision          bigint not null default 1,
  model             text not null,
  batch_size        int not null,
  epochs            int not null,
  hyperparameters   jsonb not null,             -- every one with its value in force
  manifest          bytea not null,             -- detflow.v1.StoredObject
  attempt           int not null default 0,
  num_epochs_done   int not null default 0,
  num_restarts      int not null default 0,     -- after crashes, since the start or the last resume
  stop_mode         text check (stop_mode in ('PAUSE', 'FINISH', 'DISCARD')),
  failure           bytea,                      -- detflow.v1.Failure
  weights           bytea,                      -- detflow.v1.StoredObject
  owner             text,                       -- trainer process that carries out the attempt
  lease_expire_time timestamptz,                -- by the database's clock
  create_time       timestamptz not null default now(),
  start_time        timestamptz,
  end_time          timestamptz,
  -- An attempt under way has an owner and a lease, and nothing else has.
  constraint training_lease check (
    (state in ('PROVISIONING', 'RUNNING', 'EVALUATING')) = (owner is not null)
    and (owner is null) = (lease_expire_time is null))
);
-- The arbiter of "one live training per version".
create unique index training_live on training (version)
  where state in ('QUEUED', 'PROVISIONING', 'RUNNING', 'EVALUATING');
create unique index training_request on training (project, version, request_id);
create index training_project on training (project, id desc);
create index training_version on training (version, id desc);
create index training_queued on training (id) where state = 'QUEUED';
-- On the id: a renewed lease then changes no index.
create index training_leased on training (id) where owner is not null;

-- Every process that could act on a change hears of it.
create function notify_training() returns trigger language plpgsql as $$
begin
  perform pg_notify('training', new.id);
  return null;
end $$;
create trigger training_changed after insert or update of state, stop_mode on training
  for each row execute function notify_training();

-- One run of a worker. `last_seq` is the position of its last applied record.
create table attempt (
  training_id      text not null references training on delete cascade,
  attempt          int not null,
  owner            text not null,
  checkpoint_epoch int not null default 0,      -- it went on from this epoch's checkpoint; 0: from the start
  last_seq         bigint not null default 0,
  predictions      bytea,                       -- detflow.v1.Predictions
  predictions_time timestamptz,
  val_evaluated    boolean not null default false,
  test_evaluated   boolean not null default false,
  failure          bytea,                       -- detflow.v1.Failure: why this attempt ended
  start_time       timestamptz not null default now(),
  end_time         timestamptz,
  primary key (training_id, attempt)
);

-- Its owner waits for the records of a worker that is gone.
create function notify_attempt() returns trigger language plpgsql as $$
begin
  perform pg_notify('training', new.training_id);
  return null;
end $$;
create trigger attempt_advanced after update of last_seq on attempt
  for each row execute function notify_attempt();

-- Checkpoints that are stored. The next attempt goes on from the newest that can be read; those no longer of use are
-- deleted object first, row second, so that no object is forgotten.
create table checkpoint (
  training_id text not null references training on delete cascade,
  epoch       int not null,
  attempt     int not null,
  object      bytea not null,                   -- detflow.v1.StoredObject
  unreadable  boolean not null default false,
  primary key (training_id, epoch, attempt)
);

-- Versions known to have been in the trash; `seq` keeps a late event from undoing a newer one.
create table deleted_version (
  version text primary key,
  seq     bigint not null,
  deleted boolean not null
);
