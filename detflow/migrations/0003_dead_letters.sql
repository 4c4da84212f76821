-- Which resource's events were put aside: those after them shall not wait for them.
alter table inbox_failure add column resource text not null default '';
create index inbox_failure_resource on inbox_failure (consumer, resource);
