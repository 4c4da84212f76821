-- An object is marked before it is stored, and the mark taken back with the row that points to it: a kill in between
-- leaves no object that nothing knows of.
alter table garbage add column collect_time timestamptz not null default now();
create index garbage_due on garbage (collect_time);
