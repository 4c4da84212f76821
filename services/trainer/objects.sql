-- What rows point to in the object store: key, size and SHA-256; or a detflow.v1.StoredObject; or a key alone.
select null as key, null::bigint as size_bytes, null as sha256, weights as stored
from training where weights is not null
union all select null, null, null, object from checkpoint where not unused and not unreadable
union all select null, null, null, object from weights where state = 'STORED'
union all select null, null, null, object from export where object is not null and not deleted
union all (
  select null, null, null, warm_start_weights from training
  where warm_start_weights is not null and state in ('QUEUED', 'PROVISIONING', 'RUNNING', 'EVALUATING'))
