-- What rows point to in the object store: key, size and SHA-256; or a detflow.v1.StoredObject; or a key alone.
select null as key, null::bigint as size_bytes, null as sha256, matches as stored
from evaluation where matches is not null
union all select null, null, null, predictions from evaluation_job
