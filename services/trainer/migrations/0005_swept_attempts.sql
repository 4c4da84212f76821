-- An attempt that has ended is swept: objects that it stored and no record tells of are deleted, until no more can come.
alter table attempt add column swept boolean not null default false;
create index attempt_unswept on attempt (training_id, attempt) where not swept and end_time is not null;
