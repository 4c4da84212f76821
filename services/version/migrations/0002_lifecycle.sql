-- Labels, lineage, the figures of the newest training that succeeded, and the end of the trash.
alter table version
  add column labels              jsonb not null default '{}',   -- key -> value
  add column dataset_sha256      text not null default '',
  add column parent_version      text,                          -- name of a version, which may be gone by now
  add column metrics_training_id text,                          -- the training that the figures belong to
  add column map50               double precision,
  add column map50_95            double precision,
  add column precision           double precision,
  add column recall              double precision,
  add column purge_time          timestamptz,
  add column state_number        int generated always as (array_position(array[   -- detflow.v1.Version.State
                                   'PREPROCESSING', 'READY', 'QUEUED', 'PROVISIONING', 'TRAINING', 'EVALUATING',
                                   'COMPLETED', 'FAILED', 'STOPPED', 'PAUSED'], state)) stored;
update version set purge_time = delete_time + interval '30 days' where delete_time is not null;
alter table version
  add constraint version_purge check ((delete_time is null) = (purge_time is null)),
  add constraint version_metrics check (
    num_nulls(metrics_training_id, map50, map50_95, precision, recall) in (0, 5));
create index version_to_purge on version (purge_time) where purge_time is not null;

-- One for each order of ListVersions, read in both directions. Versions without figures come last in both: they are
-- read by an index of their own.
drop index version_by_project;
drop index version_by_update_time;
create index version_by_create_time on version (project_id, create_time, id);
create index version_by_update_time on version (project_id, update_time, id);
create index version_by_display_name on version (project_id, (display_name collate "C"), id);
create index version_by_state on version (project_id, state_number, id);
create index version_by_map50 on version (project_id, map50, id) where metrics_training_id is not null;
create index version_by_map50_95 on version (project_id, map50_95, id) where metrics_training_id is not null;
create index version_by_precision on version (project_id, precision, id) where metrics_training_id is not null;
create index version_by_recall on version (project_id, recall, id) where metrics_training_id is not null;
create index version_unmeasured on version (project_id, id) where metrics_training_id is null;
create index version_by_label on version using gin (labels jsonb_path_ops) with (fastupdate = off);
create index version_by_dataset on version (project_id, dataset);

-- The attempt in which a training stands, and what was measured of it on the test split: figures belong to the version
-- once the training has SUCCEEDED in the attempt they were measured of, whichever of the two is heard of first.
alter table version_training add column attempt int not null default 0;
create index version_training_of_version on version_training (version_id);
create table version_evaluation (
  training_id text collate "C" primary key,
  version_id  text collate "C" not null references version on delete cascade,
  attempt     int not null,
  map50       double precision not null,
  map50_95    double precision not null,
  precision   double precision not null,
  recall      double precision not null
);
create index version_evaluation_of_version on version_evaluation (version_id);
