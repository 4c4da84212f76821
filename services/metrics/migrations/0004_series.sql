-- Which names the values of an epoch or a block have, in their order: a training has a few such lists at most.
create table series_names (
  training_id text not null references training (id) on delete cascade,
  number      int not null,
  names       text[] not null,                  -- sorted
  primary key (training_id, number)
);

-- What attempts measured in an epoch. An attempt goes on from a checkpoint: what older ones measured from there on is
-- void, which readers work out (series.py), so that nothing depends on the order in which rows come.
create table epoch_row (
  training_id text not null references training (id) on delete cascade,
  epoch       int not null,
  attempt     int not null,
  names       int not null,                     -- series_names.number
  values      double precision[] not null,      -- one per name
  primary key (training_id, epoch, attempt)
);

-- What attempts measured in consecutive steps of an epoch; void as above.
create table step_block (
  training_id text not null references training (id) on delete cascade,
  attempt     int not null,
  epoch       int not null,
  first_step  int not null,                     -- within the epoch, from 1
  num_steps   int not null,                     -- of the epoch
  num_values  int not null,                     -- steps in this block
  names       int not null,                     -- series_names.number
  columns     bytea not null,                   -- per name the values of all steps: float64, little-endian
  id          bigint generated always as identity,
  primary key (training_id, attempt, epoch, first_step)
);
alter table step_block alter column columns set storage external;  -- so that one column can be cut out

insert into series_names (training_id, number, names)
select training_id, row_number() over (partition by training_id order by names), names
from (
  select distinct training_id, names from (
    select training_id, array_agg(name order by name collate "C") as names
    from series_point group by training_id, epoch, attempt
  ) as epochs
) as lists;

insert into epoch_row (training_id, epoch, attempt, names, values)
select e.training_id, e.epoch, e.attempt, n.number, e.values
from (
  select training_id, epoch, attempt, array_agg(name order by name collate "C") as names,
    array_agg(value order by name collate "C") as values
  from series_point group by training_id, epoch, attempt
) as e
join series_names n on n.training_id = e.training_id and n.names = e.names;

drop table series_point;
drop table attempt;
