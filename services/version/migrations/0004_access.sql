-- Who may do what. The project "-" stands for all; tokens are kept as their SHA-256.
create table api_key (
  id            text collate "C" primary key,             -- sorts by age
  project_id    text collate "C" not null,
  display_name  text not null,
  role          int not null check (role between 1 and 3), -- detflow.v1.Role
  token_sha256  bytea not null unique,
  expire_time   timestamptz,
  creator       text not null,
  create_time   timestamptz not null default now(),
  last_use_time timestamptz
);
create index api_key_by_project on api_key (project_id, id);

create table member (
  id          text collate "C" primary key,               -- sorts by age
  project_id  text collate "C" not null,
  user_name   text not null,                              -- as typed
  user_key    text collate "C" not null,                  -- what is compared
  role        int not null check (role between 1 and 3),
  creator     text not null,
  create_time timestamptz not null default now(),
  constraint member_once unique (project_id, user_key)
);
create index member_by_project on member (project_id, id);
create index member_by_user on member (user_key);

-- Whom a ticket or a session stands for: the owner, while the owner's token is the one it was; an API key; a user.
create table login_ticket (
  token_sha256 bytea primary key,
  owner_sha256 bytea,
  api_key_id   text collate "C" references api_key on delete cascade,
  user_keys    text[],                                    -- by which the user may be a member; the subject first
  display_name text not null,
  expire_time  timestamptz not null,
  constraint login_ticket_whose check (num_nonnulls(owner_sha256, api_key_id, user_keys) = 1)
);
create index login_ticket_by_api_key on login_ticket (api_key_id);
create index login_ticket_by_end on login_ticket (expire_time);

create table session (
  token_sha256 bytea primary key,
  owner_sha256 bytea,
  api_key_id   text collate "C" references api_key on delete cascade,
  user_keys    text[],
  display_name text not null,
  expire_time  timestamptz not null,                      -- moves on with use, up to end_time
  end_time     timestamptz not null,
  constraint session_whose check (num_nonnulls(owner_sha256, api_key_id, user_keys) = 1)
);
create index session_by_api_key on session (api_key_id);
create index session_by_end on session (expire_time);

create table audit_entry (
  id          text collate "C" primary key,               -- sorts by age
  subject     text not null,
  method      text not null,
  resource    text collate "C" not null,
  project_id  text collate "C" not null,                  -- '' for what concerns the installation
  create_time timestamptz not null,
  done        boolean not null,
  code        int not null,
  request_id  text not null,
  peer        text not null
);
create index audit_entry_by_project on audit_entry (project_id, id);
create index audit_entry_by_subject on audit_entry (subject, id);
create index audit_entry_by_time on audit_entry (create_time);

alter table project
  add column max_storage_bytes     bigint not null default 0,  -- 0: no limit
  add column max_running_trainings int not null default 0;
