-- Versions that are gone for good: what is heard of their trainings later means nothing.
create table purged_version (
  version_id text primary key,
  purge_time timestamptz not null default now()
);
create index training_version on training (split_part(name, '/', 4));
