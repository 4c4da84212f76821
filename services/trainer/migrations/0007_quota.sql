-- How many trainings of a project may be under way at once, as the version service said last; no row means no limit.
create table project_quota (
  project     text primary key,
  max_running int not null check (max_running > 0)
);
