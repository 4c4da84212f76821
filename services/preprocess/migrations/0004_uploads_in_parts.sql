-- Uploads that can be interrupted: their bytes are stored in parts, each an object of its own.
alter table upload
  alter column size_bytes drop not null,               -- null until a stream that did not say it has ended
  add column state text not null default 'RECEIVED' check (state in ('RECEIVING', 'RECEIVED')),
  add column committed_bytes bigint not null default 0,
  add column request_id text,
  add column expire_time timestamptz not null default now() + interval '7 days',
  add constraint upload_request_id unique (project_id, request_id);
update upload set committed_bytes = size_bytes;
alter table upload alter column state drop default, alter column expire_time drop default;
create index upload_to_expire on upload (expire_time);

create table upload_part (
  upload_id  text not null references upload on delete cascade,
  start      bigint not null,                          -- place of its first byte in the archive
  size_bytes bigint not null check (size_bytes > 0),
  sha256     text not null,
  key        text not null,
  primary key (upload_id, start)
);
insert into upload_part select id, 0, size_bytes, sha256, 'uploads/' || id from upload;

-- Datasets that come from an object store of the user.
alter table dataset
  alter column upload_id drop not null,
  add column source_url text not null default '';
