-- What a quota counts, without reading every image.
alter table dataset add column num_bytes bigint not null default 0;   -- of its images, as they are stored
update dataset set num_bytes = sums.num_bytes
from (select dataset_id, sum(size_bytes) as num_bytes from image group by dataset_id) as sums
where sums.dataset_id = dataset.id;
create index dataset_upload on dataset (upload_id);
create index preprocessing_project on preprocessing (split_part(version_name, '/', 2));
