-- The database of an installation: a role and a schema of its own for each service, and nobody else gets in.
-- Run by a superuser with psql, as often as one likes:
--   DETFLOW_SECRETS=FOLDER psql -f roles.sql
-- FOLDER holds version_password, preprocess_password, trainer_password and metrics_password.
\set ON_ERROR_STOP on
\set version_password `cat "$DETFLOW_SECRETS/version_password"`
\set preprocess_password `cat "$DETFLOW_SECRETS/preprocess_password"`
\set trainer_password `cat "$DETFLOW_SECRETS/trainer_password"`
\set metrics_password `cat "$DETFLOW_SECRETS/metrics_password"`

select 'create database detflow' where not exists (select from pg_database where datname = 'detflow') \gexec
\connect detflow
revoke all on database detflow from public;
revoke all on schema public from public;

create temporary table service (name text, password text);
insert into service values
    ('version', :'version_password'),
    ('preprocess', :'preprocess_password'),
    ('trainer', :'trainer_password'),
    ('metrics', :'metrics_password');
select case when password = '' then format('do $$ begin raise ''%s_password is empty''; end $$', name) end
  from service where password = '' \gexec
select format('create role %I login', name)
  from service where not exists (select from pg_roles where rolname = name) \gexec
select format('alter role %I password %L', name, password) from service \gexec
select format('grant connect, temporary on database detflow to %I', name) from service \gexec
-- A superuser of a managed Postgres may hand a schema only to roles it is a member of.
select format('grant %I to current_user', name) from service \gexec
select format('create schema if not exists %I authorization %I', name, name) from service \gexec
