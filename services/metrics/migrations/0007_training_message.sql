-- What a training was asked to do and how: the newest detflow.v1.Training heard; empty until one is.
alter table training add column message bytea not null default '';
