-- The hourly clean-up finds what is old without reading everything; both columns grow with the table.
create index outbox_published on outbox using brin (publish_time) with (autosummarize = on);
create index inbox_received on inbox using brin (receive_time) with (autosummarize = on);
