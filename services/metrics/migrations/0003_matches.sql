-- What an evaluation was measured from and what came of each detection; absent where an earlier release measured it.
alter table evaluation
  add column ground_truth_sha256 text not null default '',
  add column manifest bytea,                    -- detflow.v1.StoredObject: the bundle's manifest
  add column matches bytea;                     -- detflow.v1.StoredObject: see matches.py
