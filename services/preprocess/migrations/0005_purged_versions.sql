-- Objects of bundles have the hash of their content as name, and versions share those they have in common. Each use is a
-- row: an object may be deleted when there is none.
create table bundle_object (                     -- manifests and what they list but shards, whose uses are in `shard`
  version_id text not null references preprocessing on delete cascade,
  key        text not null,
  primary key (version_id, key)
);
create index bundle_object_key on bundle_object (key);
create index shard_key on shard (key);

-- Versions that are gone for good: what is heard of them later means nothing.
create table purged_version (
  version_id text primary key,
  purge_time timestamptz not null default now()
);
