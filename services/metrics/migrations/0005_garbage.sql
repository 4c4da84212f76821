-- Objects to be deleted. Whoever is about to store one marks it for later and takes the mark away where it records the
-- object; whoever deletes the record of one marks it with that.
create table garbage (
  key          text primary key,
  collect_time timestamptz not null default now()
);
create index garbage_due on garbage (collect_time);
alter table evaluation add column matches_key text; -- the key in `matches`
update evaluation set matches_key = 'evaluations/' || training_id || '/' || attempt || '/' || split || '.npz'
where matches is not null;
