-- What rows point to in the object store: key, size and SHA-256; or a detflow.v1.StoredObject; or a key alone.
select null as key, null::bigint as size_bytes, null as sha256, manifest as stored
from preprocessing where state = 'SUCCEEDED' and manifest is not null
union all
select s.key, s.size_bytes, s.sha256, null from shard s join preprocessing p using (version_id) where p.state = 'SUCCEEDED'
union all
select o.key, null, null, null from bundle_object o join preprocessing p using (version_id) where p.state = 'SUCCEEDED'
union all select key, size_bytes, sha256, null from upload_part
union all (
  select distinct shard_key, null::bigint, null, null::bytea
  from image join dataset on dataset.id = image.dataset_id where dataset.state = 'READY')
