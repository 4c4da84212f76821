-- Exports of trained models. `state` follows the graph in services/trainer/export_domain.py; every change is one
-- guarded update.
create table export (
  id                        text primary key,
  training_id               text not null references training on delete cascade,
  training                  text not null,              -- its resource name
  request_id                text,
  state                     text not null
                            check (state in ('QUEUED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
  revision                  bigint not null default 1,
  options                   bytea not null,             -- detflow.v1.Export: format and options in force
  file_name                 text not null,
  attempt                   int not null default 0,
  object                    bytea,                      -- detflow.v1.StoredObject
  max_box_difference_px     double precision not null default 0,
  max_confidence_difference double precision not null default 0,
  failure                   bytea,                      -- detflow.v1.Failure
  owner                     text,                       -- trainer process that makes it
  lease_expire_time         timestamptz,                -- by the database's clock
  deleted                   boolean not null default false,  -- shown to nobody; goes when its objects are gone
  create_time               timestamptz not null default now(),
  end_time                  timestamptz,
  constraint export_lease check (
    (state = 'RUNNING') = (owner is not null) and (owner is null) = (lease_expire_time is null)),
  constraint export_object check ((state = 'SUCCEEDED') = (object is not null))
);
create unique index export_request on export (training_id, request_id);
create index export_training on export (training_id, id desc);
create index export_queued on export (id) where state = 'QUEUED';
create index export_leased on export (id) where owner is not null;
create index export_deleted on export (id) where deleted;

-- Every process that could act on a change hears of it.
create function notify_export() returns trigger language plpgsql as $$
begin
  perform pg_notify('export', new.id);
  return null;
end $$;
create trigger export_changed after insert or update of state, deleted on export
  for each row execute function notify_export();
