-- What archives say beyond images and boxes: their own splits, crowd regions; and everything that was wrong with them.
alter table image
  add column existing_split text check (existing_split in ('train', 'val', 'test')),  -- of the archive; null if none
  add column crowds boolean[] not null default '{}',   -- one per box; empty if none is a crowd
  add column perceptual_hash bigint;                   -- 64 bits, as a signed number; null where unknown
alter table dataset
  add column existing_split bigint[],                  -- images in train, val, test; null if the archive had no splits
  add column num_crowd_boxes bigint not null default 0,
  add column num_problems bigint not null default 0;

-- What an import left out, clipped or refused, in the order of the places; at most 1,000,000 of a dataset's num_problems.
create table import_problem (
  dataset_id  text not null references dataset on delete cascade,
  position    int not null,                            -- from 0
  place       text not null,
  reason      text not null,
  description text not null,
  primary key (dataset_id, position)
);
