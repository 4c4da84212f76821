-- Archives received and stored.
create table upload (
  id          text primary key,
  project_id  text not null,
  size_bytes  bigint not null,
  sha256      text not null,
  create_time timestamptz not null default now()
);

-- Labelled images. Imported by whoever holds the claim while its lease lasts, by database time.
create table dataset (
  id                    text primary key,
  project_id            text not null,
  display_name          text not null,
  request_id            text,
  state                 text not null default 'IMPORTING'
                        check (state in ('IMPORTING', 'READY', 'FAILED')),
  upload_id             text not null,
  skip_invalid          boolean not null,
  wanted_format         text,
  format                text,
  class_names           text[] not null default '{}',
  num_images            bigint not null default 0,
  num_boxes             bigint not null default 0,
  num_background_images bigint not null default 0,
  num_boxes_by_class    bigint[] not null default '{}',
  skipped               jsonb not null default '[]',   -- [[where, reason, description], ...], at most 100
  num_skipped           bigint not null default 0,
  content_sha256        text not null default '',
  failure               bytea,                         -- detflow.v1.Failure
  create_time           timestamptz not null default now(),
  import_time           timestamptz,
  claim                 text,
  lease_expires         timestamptz,
  num_failures          int not null default 0,        -- of the import itself, not of its data
  constraint dataset_request_id unique (project_id, request_id)
);
-- A failed import keeps its name for the record, and leaves it to the next try.
create unique index dataset_display_name on dataset (project_id, display_name)
  where state <> 'FAILED';
create index dataset_list on dataset (project_id, id desc);
create index dataset_to_import on dataset (id) where state = 'IMPORTING';

-- The images of READY datasets, in the order of their paths.
create table image (
  dataset_id   text not null references dataset on delete cascade,
  position     int not null,                           -- from 0
  path         text not null,
  sha256       text not null,
  width        int not null,                           -- upright, pixels
  height       int not null,
  shard_key    text not null,
  shard_offset bigint not null,
  size_bytes   bigint not null,
  class_ids    int[] not null,
  boxes        float8[] not null,                      -- x1, y1, x2, y2 per box, pixels of the upright image
  primary key (dataset_id, position)
);

-- The making of a version's bundle.
create table preprocessing (
  version_id       text primary key,
  version_name     text not null,
  version_deleted  boolean not null default false,
  version_revision bigint not null,
  dataset_id       text not null,
  recipe           bytea not null,                     -- detflow.v1.Recipe, defaults resolved
  state            text not null default 'PENDING'
                   check (state in ('PENDING', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
  revision         bigint not null default 1,
  num_images       bigint[],                           -- train, val, test
  manifest         bytea,                              -- detflow.v1.StoredObject
  failure          bytea,                              -- detflow.v1.Failure
  create_time      timestamptz not null default now(),
  end_time         timestamptz,
  claim            text,
  lease_expires    timestamptz,
  num_failures     int not null default 0
);
create index preprocessing_dataset on preprocessing (dataset_id);
create index preprocessing_to_do on preprocessing (version_id) where state in ('PENDING', 'RUNNING');

-- Shards that are in the object store, so that a restart goes on after them.
create table shard (
  version_id text not null references preprocessing on delete cascade,
  split      text not null check (split in ('train', 'val', 'test')),
  position   int not null,
  key        text not null,
  size_bytes bigint not null,
  sha256     text not null,
  num_images int not null,
  primary key (version_id, split, position)
);

-- Prefixes in the object store to be emptied; written with the change that makes them garbage.
create table garbage (
  prefix      text primary key,
  create_time timestamptz not null default now()
);
