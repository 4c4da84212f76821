-- What was counted once at an import, and what was kept together by a split.
create table dataset_statistics (
  dataset_id text primary key references dataset on delete cascade,
  statistics bytea not null                            -- detflow.v1.DatasetStatistics without its name
);
create table leak_report (
  version_id text primary key references preprocessing on delete cascade,
  report     bytea not null                            -- detflow.v1.LeakReport without its name
);

-- Images are dealt to splits in another way now: bundles that are being made begin again, so that none is dealt in two.
insert into garbage (prefix)
select shard.key from shard join preprocessing using (version_id) where state in ('PENDING', 'RUNNING')
on conflict do nothing;
delete from shard using preprocessing
where shard.version_id = preprocessing.version_id and preprocessing.state in ('PENDING', 'RUNNING');
