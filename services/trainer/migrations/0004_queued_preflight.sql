-- Trainings that wait and are tried meanwhile: by whom, and how often it was begun. A table of its own, so that whoever
-- renews such a lease locks no training: a claim of the next training in the queue passes over locked ones. It holds for
-- one stay in the queue: with another revision the training has moved on.
create table queued_preflight (
  training_id       text primary key references training on delete cascade,
  revision          bigint not null,
  owner             text not null,                -- one claim of one trainer process
  lease_expire_time timestamptz not null,         -- by the database's clock; nobody claims it before
  num_tries         int not null default 1
);
