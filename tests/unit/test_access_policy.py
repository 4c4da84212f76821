"""The policy table: complete, and what it makes of callers."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detflow import policy
from detflow.access import EVERYWHERE, Kind, Principal, Role, from_proto, to_proto
from detflow.errors import InvalidArgument, NotFound, PermissionDenied
from detflow.interceptors import check
from detflow.v1 import comparison_pb2, dataset_pb2, version_pb2
from tests import access_requests
from tests.access_requests import Method

METHODS = list(access_requests.methods())
ROLES = (Role.ROLE_UNSPECIFIED, Role.VIEWER, Role.EDITOR, Role.ADMIN)


def caller(**roles: Role.ValueType) -> Principal:
    """Returns a caller with roles; `everywhere` is in all projects."""
    named = {name.replace("everywhere", EVERYWHERE): role for name, role in roles.items()}
    return Principal(kind=Kind.API_KEY, subject="k", display_name="k", roles=named)


def test_table_has_every_method_and_no_other() -> None:
    assert {method.name for method in METHODS} == {*policy.RULES}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_field_that_names_a_resource_is_in_the_table(method: Method) -> None:
    named = {*access_requests.name_fields(method.descriptor.input_type)}
    rule = method.rule
    assert named <= {rule.field, *rule.also}
    for path in filter(None, (rule.field, *rule.also)):
        message: Any = method.descriptor.input_type
        *above, last = path.split(".")
        for name in above:
            message = message.fields_by_name[name].message_type
        assert message.fields_by_name[last].type == message.fields_by_name[last].TYPE_STRING
    check(method.request("p1"))


@given(
    method=st.sampled_from(METHODS),
    here=st.sampled_from(ROLES),
    everywhere=st.sampled_from(ROLES),
)
def test_caller_passes_with_the_role_in_the_project_or_in_all(
    method: Method, here: Role.ValueType, everywhere: Role.ValueType
) -> None:
    rule, request = method.rule, method.request("p1")
    who = caller(p1=here, everywhere=everywhere, p2=Role.ADMIN)
    try:
        policy.authorize(who, method.name, rule, request, first=True)
        outcome = "passes"
    except NotFound as error:
        assert error.message == "projects/p1 does not exist"
        outcome = "not found"
    except PermissionDenied as error:
        assert error.reason == "MISSING_ROLE"
        outcome = "denied"
    role = max(here, everywhere) if rule.field else everywhere
    if rule.services_only:
        assert outcome == "denied"
    elif role >= rule.role:
        assert outcome == "passes"
    else:
        assert outcome == ("denied" if role or not rule.field else "not found")


def test_every_project_that_a_request_names_must_be_visible() -> None:
    trainings = [f"projects/{p}/versions/v/trainings/t" for p in ("p1", "p2")]
    request = comparison_pb2.CompareTrainingsRequest(parent="projects/p1", trainings=trainings)
    name = "/detflow.v1.ComparisonService/CompareTrainings"
    rule = policy.RULES[name]
    policy.authorize(caller(p1=Role.VIEWER, p2=Role.VIEWER), name, rule, request, first=True)
    with pytest.raises(NotFound, match="projects/p2 does not exist"):
        policy.authorize(caller(p1=Role.ADMIN), name, rule, request, first=True)


def test_later_message_of_a_stream_may_name_no_other_project() -> None:
    name = "/detflow.v1.DatasetService/UploadArchive"
    rule = policy.RULES[name]
    who = caller(p1=Role.EDITOR)
    chunk = dataset_pb2.UploadArchiveRequest()
    with pytest.raises(InvalidArgument, match="parent"):
        policy.authorize(who, name, rule, chunk, first=True)
    policy.authorize(who, name, rule, chunk, first=False)
    slipped = dataset_pb2.UploadArchiveRequest(parent="projects/p2")
    with pytest.raises(NotFound):
        policy.authorize(who, name, rule, slipped, first=False)


@pytest.mark.parametrize(
    "name", ["", "p1", "projects/", "projects/P", "projects/p1x/../p2", "x/p1"]
)
def test_name_without_a_readable_project_names_none(name: str) -> None:
    method = "/detflow.v1.VersionService/UpdateVersion"
    request = version_pb2.UpdateVersionRequest(version=version_pb2.Version(name=name))
    with pytest.raises((InvalidArgument, NotFound)):
        policy.authorize(
            caller(p1=Role.ADMIN, p2=Role.ADMIN), method, policy.RULES[method], request, first=True
        )


def test_each_role_includes_those_before_it() -> None:
    for higher, lower in itertools.pairwise(reversed(ROLES)):
        assert higher > lower


def test_principal_survives_the_wire() -> None:
    who = caller(p1=Role.VIEWER, everywhere=Role.EDITOR)
    assert from_proto(to_proto(who)) == who
    assert (who.role_in("p1"), who.role_in("p9"), who.role_in(EVERYWHERE)) == (2, 2, 2)


READING = re.compile(
    r"(Get|List|Watch|Read|Download|Preview|Compare|Analyze|Predict|Authenticate)[A-Z]?"
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_changes_something_takes_an_editor_and_is_audited(method: Method) -> None:
    rule, name = method.rule, method.descriptor.name
    if rule.services_only:
        assert name in ("Authenticate", "CreateSession", "DeleteSession")
    elif name == "CreateLoginLink":
        assert (rule.role, rule.changes) == (Role.ROLE_UNSPECIFIED, True)  # as oneself
    elif READING.match(name):
        assert not rule.changes
    else:
        assert rule.changes
        assert rule.role >= Role.EDITOR


@pytest.mark.parametrize("kind", ["ApiKey", "Member", "Webhook", "AuditEntry", "Project"])
def test_what_is_secret_or_gives_rights_takes_an_administrator(kind: str) -> None:
    for method in METHODS:
        if kind in method.descriptor.name and method.descriptor.name not in (
            "GetProject",
            "ListProjects",
        ):
            assert method.rule.role == Role.ADMIN, method.name
