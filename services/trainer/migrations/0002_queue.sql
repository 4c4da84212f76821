-- The queue, devices, memory, warm starts, preflights, uploaded weights, and checkpoints inside an epoch.
alter table training
  add column priority             int not null default 0 check (priority between -100 and 100),
  add column num_nodes            int not null default 1,
  add column num_devices_per_node int not null default 1,
  add column device               text not null
    generated always as (coalesce(hyperparameters ->> 'device', 'auto')) stored,
  add column step_batch_size      int,
  add column warm_start           bytea,          -- detflow.v1.WarmStart, as asked for
  add column warm_start_weights   bytea,          -- detflow.v1.StoredObject: what that was at the start
  add column warm_start_id        text,           -- id of the uploaded weights, if it was those
  add column preflight            bytea;          -- detflow.v1.Preflight
update training set step_batch_size = batch_size;
alter table training alter column step_batch_size set not null;
create index training_warm_start on training (warm_start_id) where warm_start_id is not null;

-- A place in the queue depends on the priority too.
drop trigger training_changed on training;
create trigger training_changed after insert or update of state, stop_mode, priority on training
  for each row execute function notify_training();

-- Checkpoints inside a long epoch, and a mark on those that no attempt will go on from.
alter table attempt add column checkpoint_step int not null default 0;
alter table checkpoint
  add column step   int not null default 0,       -- done in the epoch after `epoch`
  add column unused boolean not null default false,
  drop constraint checkpoint_pkey,
  add primary key (training_id, epoch, step, attempt);
create index checkpoint_unused on checkpoint (training_id) where unused;
update checkpoint c set unused = true
  from (select training_id, epoch, attempt, row_number() over (
          partition by training_id order by unreadable, epoch desc, attempt desc) as rank
        from checkpoint) as ranked
  join training t on t.id = ranked.training_id
  where (c.training_id, c.epoch, c.attempt) = (ranked.training_id, ranked.epoch, ranked.attempt)
    and (rank > 2 or c.unreadable or t.state in ('SUCCEEDED', 'STOPPED'));

-- Nothing goes on from an ended training, however it came to its end.
create function mark_checkpoints() returns trigger language plpgsql as $$
begin
  update checkpoint set unused = true where training_id = new.id;
  return null;
end $$;
create trigger training_ended after update of state on training
  for each row when (new.state in ('SUCCEEDED', 'STOPPED')) execute function mark_checkpoints();

-- Uploaded weights. Their row is there before and after their object, so that no object is forgotten.
create table weights (
  id             text primary key,
  project        text not null,
  state          text not null default 'STORING' check (state in ('STORING', 'STORED', 'DELETED')),
  display_name   text not null,
  model          text not null,
  class_names    text[] not null,
  num_tensors    int not null,
  num_parameters bigint not null,
  object         bytea not null,                  -- detflow.v1.StoredObject
  create_time    timestamptz not null default now()
);
create index weights_project on weights (project, id desc) where state = 'STORED';
create index weights_unstored on weights (create_time) where state <> 'STORED';
