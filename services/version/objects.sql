-- What rows point to in the object store: key, size and SHA-256; or a detflow.v1.StoredObject; or a key alone.
select manifest_key as key, manifest_size_bytes as size_bytes, manifest_sha256 as sha256, null::bytea as stored
from version where manifest_key is not null
