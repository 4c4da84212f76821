"""Routing, JSON and the OpenAPI document, from the descriptors alone."""

import json
import string
from typing import Any

import pytest
from google.protobuf import message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

from detflow.errors import InvalidArgument
from gateway import openapi, transcode
from gateway.routes import (
    GRPC_ONLY,
    INTERNAL,
    Binding,
    Router,
    UnsafePath,
    bindings,
    parse_template,
    rpcs,
)

BINDINGS = list(bindings())
ROUTER = Router(BINDINGS)
BY_NAME = {one.rpc.name: one for one in BINDINGS}


def decode(name: str, body: bytes = b"", query: bytes = b"") -> Any:
    binding = BY_NAME[name]
    values = ["projects/p"] * len(binding.template.variables)
    return transcode.decode_request(binding, values, query, body)


def test_template_with_nested_variable_and_verb() -> None:
    one = parse_template("/v1/{version.name=projects/*/versions/*}:stop")
    assert one.segments == ("v1", "projects", "*", "versions", "*")
    assert one.verb == "stop"
    assert (one.variables[0].path, one.variables[0].start, one.variables[0].end) == (
        "version.name",
        1,
        5,
    )


@pytest.mark.parametrize("text", ["/v1/{name=**}", "/v1/{name=a/*}b", "/v1/a b", "/v1//a"])
def test_templates_that_cannot_be_routed_fail_at_start(text: str) -> None:
    with pytest.raises(ValueError, match=r"rout|variable"):
        parse_template(text)


def test_two_rpcs_on_one_route_fail_at_start() -> None:
    with pytest.raises(ValueError, match="two RPCs"):
        Router([BINDINGS[1], BINDINGS[1]])


def test_every_rpc_of_the_services_has_a_route() -> None:
    named = {one.rpc.full_name for one in BINDINGS}
    internal = {f"detflow.v1.{name}" for name in INTERNAL}
    assert named | {f"detflow.v1.{name}" for name in GRPC_ONLY} | internal == {
        rpc.full_name for one in BINDINGS for rpc in one.rpc.containing_service.methods
    }
    assert not internal & {one.rpc.full_name for one in rpcs()}


def test_literals_and_verbs_win_over_wildcards() -> None:
    def route(path: bytes) -> str:
        match = ROUTER.find("GET", path)
        assert match is not None and match.binding is not None
        return match.binding.rpc.name

    assert route(b"/v1/projects") == "ListProjects"
    assert route(b"/v1/projects/p") == "GetProject"
    assert route(b"/v1/projects/p/versions:watch") == "WatchVersions"
    assert route(b"/v1/projects/p/versions/watch") == "GetVersion"
    assert route(b"/v1/projects/p/versions/v/trainings/t/metrics:watch") == "WatchMetrics"


def test_encoded_letters_are_decoded_once() -> None:
    match = ROUTER.find("GET", b"/v1/projects/%61b")
    assert match is not None and match.values == ("projects/ab",)
    with pytest.raises(UnsafePath):
        ROUTER.find("GET", b"/v1/projects/%2561b")


@given(st.binary(max_size=60))
def test_no_path_leads_outside_its_segments(tail: bytes) -> None:
    try:
        match = ROUTER.find("GET", b"/v1/projects/" + tail)
    except UnsafePath:
        return
    if match is not None and match.binding is not None:
        for value in match.values:
            assert ".." not in value.split("/")
            assert "\\" not in value and "%" not in value


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["READY", "STATE_UNSPECIFIED", "2020-01-01T00:00:00Z", "10", "1.5", "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.ascii_letters, max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def field_names(binding: Binding) -> list[str]:
    message = binding.rpc.input_type
    if binding.body not in ("", "*"):
        nested = message.fields_by_name[binding.body].message_type
        assert nested is not None
        message = nested
    return [field.json_name for field in message.fields] + ["name", "seed", "split", "unknown"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_json_is_decoded_or_refused_with_a_field(data: st.DataObject) -> None:
    binding = data.draw(st.sampled_from([one for one in BINDINGS if one.body]))
    names = st.sampled_from(field_names(binding))
    nested = st.dictionaries(names, JSON_VALUES | st.dictionaries(names, JSON_VALUES), max_size=4)
    body = json.dumps(data.draw(nested | JSON_VALUES)).encode()
    values = ["projects/p"] * len(binding.template.variables)
    try:
        transcode.decode_request(binding, values, b"", body)
    except InvalidArgument as error:
        assert error.reason in (
            *("INVALID_JSON", "MALFORMED_JSON", "PATH_MISMATCH", "DUPLICATE_KEY", "BAD_QUERY"),
        )
        if error.reason == "INVALID_JSON" and error.violations:
            assert error.violations[0].reason != "INVALID_JSON", error.violations


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BINDINGS), st.text(string.printable, max_size=40) | st.binary(max_size=30))
def test_any_query_is_decoded_or_refused(binding: Binding, text: str | bytes) -> None:
    query = text if isinstance(text, bytes) else text.encode()
    values = ["projects/p"] * len(binding.template.variables)
    body = b"{}" if binding.body else b""
    try:
        transcode.decode_request(binding, values, query, body)
    except InvalidArgument as error:
        assert error.reason in ("BAD_QUERY", "INVALID_JSON")


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        ({"recipe": {"augmentations": [3, "SPIN"]}}, "recipe.augmentations[1]", "UNKNOWN_VALUE"),
        ({"recipe": {"split": {"train": 2.5}}}, "recipe.split.train", "WRONG_TYPE"),
        ({"recipe": {"split": {"train": 2**31}}}, "recipe.split.train", "OUT_OF_RANGE"),
        ({"recipe": {"seed": "1e3"}}, "recipe.seed", "WRONG_TYPE"),
        ({"recipe": []}, "recipe", "WRONG_TYPE"),
        ({"createTime": "yesterday"}, "createTime", "WRONG_TYPE"),
        ({"displayName": "a", "display_name": "b"}, "display_name", "DUPLICATE_KEY"),
    ],
)
def test_what_does_not_fit_is_named(body: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode("CreateVersion", json.dumps(body).encode())
    found = caught.value.violations[0]
    assert (found.field, found.reason) == (f"version.{field}", reason)


def test_many_errors_are_listed_together_up_to_a_hundred() -> None:
    body = {"recipe": {"augmentations": ["SPIN"] * 150}}
    with pytest.raises(InvalidArgument) as caught:
        decode("CreateVersion", json.dumps(body).encode())
    assert len(caught.value.violations) == 100


def test_free_form_hyperparameters_keep_their_types() -> None:
    body = {"batchSize": 4, "hyperparameters": {"lr0": 0.01, "cos_lr": True, "optimizer": "SGD"}}
    request = decode("StartTraining", json.dumps(body).encode(), b"requestId=r")
    assert dict(request.training.hyperparameters) == body["hyperparameters"]
    assert request.training.batch_size == 4 and not request.training.HasField("epochs")
    assert request.request_id == "r"


def test_nested_query_fields_enums_and_masks() -> None:
    binding = BY_NAME["UpdateVersion"]
    request: Any = transcode.decode_request(
        binding, ["projects/p/versions/v"], b"updateMask=displayName,recipe.maxSidePx", b"{}"
    )
    assert list(request.update_mask.paths) == ["display_name", "recipe.max_side_px"]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(BINDINGS), st.binary(max_size=200))
def test_any_answer_can_be_rendered(binding: Binding, data: bytes) -> None:
    message = message_factory.GetMessageClass(binding.rpc.output_type)()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    json.loads(transcode.encode(message))


def test_document_is_valid_and_complete() -> None:
    document = openapi.document(BINDINGS)
    validate(document)
    operations = {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for operation in path.values()
    }
    assert operations.keys() == BY_NAME.keys()
    for operation in operations.values():
        assert operation["description"], operation["operationId"]
        assert {"200", "400", "404", "503"} <= operation["responses"].keys()
    watch = operations["WatchTraining"]
    assert list(watch["responses"]["200"]["content"]) == ["text/event-stream"]
    assert "Last-Event-ID" in {one["name"] for one in watch["parameters"]}
    assert "application/zip" in operations["UploadArchive"]["requestBody"]["content"]
    weights = operations["UploadWeights"]
    assert next(iter(weights["requestBody"]["content"])) == "application/octet-stream"
    assert [(p["name"], p["in"]) for p in weights["parameters"]][1:] == [("displayName", "query")]
    file = operations["DownloadExport"]["responses"]["200"]
    assert file["content"]["application/octet-stream"]["schema"]["format"] == "binary"
    assert "api.HttpBody" not in document["components"]["schemas"]
    for name, schema in document["components"]["schemas"].items():
        if name not in ("Error", "rpc.Status"):
            for value in schema.get("properties", {}).values():
                assert value["description"]
