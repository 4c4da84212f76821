-- A version that is gone for good stays deleted here for ever; `purging` until its trainings are gone too. A prefix in the
-- object store becomes garbage, to be emptied, with the deletion of the training or export that had it.
alter table deleted_version add column purging boolean not null default false;
create index deleted_version_purging on deleted_version (version) where purging;
create table garbage (
  prefix      text primary key,
  create_time timestamptz not null default now()
);
