"""Every route through a real gateway to a real gRPC server."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from detflow import errors, interceptors
from detflow.v1 import project_pb2, trainer_pb2, training_pb2, version_pb2
from gateway import upload
from gateway.routes import ANY, Binding, bindings
from tests.gateway_rig import Rig, details, failing, running

V = "/v1/projects/p/versions/v"
JSON = {"content-type": "application/json"}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def concrete_path(binding: Binding) -> str:
    segments = [
        IDS.get(binding.template.segments[i - 1], "x1") if s == ANY else s
        for i, s in enumerate(binding.template.segments)
    ]
    verb = f":{binding.template.verb}" if binding.template.verb else ""
    return "/" + "/".join(segments) + verb


IDS = {"evaluations": "val", "inferenceResults": "val-1"}
BODIES: dict[str, dict[str, Any]] = {
    "CreateProject": {"displayName": "Shapes"},
    "CreateVersion": {"dataset": "projects/x1/datasets/d1"},
    "UpdateVersion": {"displayName": "new"},
    "PreviewVersion": {"dataset": "projects/x1/datasets/d1"},
    "CreateUpload": {"sizeBytes": "1"},
    "CreateDataset": {"dataset": {"displayName": "d"}, "upload": "projects/x1/uploads/u1"},
    "CreateExport": {"format": "ONNX"},
    "UpdateProject": {"displayName": "Shapes"},
    "CreateApiKey": {"displayName": "k", "role": "VIEWER"},
    "CreateMember": {"user": "kim@example.com", "role": "VIEWER"},
}
TWO_TRAININGS = [f"projects/x1/versions/x1/trainings/{name}" for name in ("t1", "t2")]
QUERIES: dict[str, dict[str, Any]] = {
    "CreateProject": {"projectId": "shapes"},
    "CompareTrainings": {"trainings": TWO_TRAININGS},
    "DownloadComparisonReport": {"trainings": TWO_TRAININGS},
    "DownloadChart": {"chart": "CONFUSION"},
    "DownloadTable": {"table": "CLASSES"},
}


async def test_every_annotated_route_reaches_its_rpc(rig: Rig, subtests: pytest.Subtests) -> None:
    for binding in bindings():
        with subtests.test(binding.rpc.name):
            await reach(rig, binding)


async def reach(rig: Rig, binding: Binding) -> None:
    if binding.rpc.client_streaming:
        kind = upload.KINDS[binding.rpc.name].content_types[0]
        headers = {"content-type": kind, "upload-offset": "0"}
        arguments: dict[str, Any] = {"content": b"", "headers": headers}
    elif binding.body:
        arguments = {"json": BODIES.get(binding.rpc.name, {})}
    else:
        arguments = {}
    answer = await rig.http.request(
        binding.http_method,
        concrete_path(binding),
        params=QUERIES.get(binding.rpc.name),
        **arguments,
    )
    assert answer.status_code == 200, answer.text
    request = next(call[1] for call in reversed(rig.backend.calls) if call[0] == binding.rpc.name)
    if binding.rpc.client_streaming:
        return
    for variable in binding.template.variables:
        value = request
        for part in variable.path.split("."):
            value = getattr(value, part)
        assert concrete_path(binding).startswith(f"/v1/{value}")


async def test_unset_counts_and_lists_are_shown_and_int64_are_strings(rig: Rig) -> None:
    answer = (await rig.http.get("/v1/projects/p/datasets/d")).json()
    assert answer["numImages"] == "0"
    assert answer["classNames"] == []
    assert answer["state"] == "STATE_UNSPECIFIED"


async def test_query_takes_camel_and_snake_case_repeated_and_boolean_values(rig: Rig) -> None:
    await rig.http.get("/v1/projects/p/versions?pageSize=3&show_deleted=true&page_token=a%20b")
    assert rig.backend.calls[-1][1] == version_pb2.ListVersionsRequest(
        parent="projects/p", page_size=3, show_deleted=True, page_token="a b"
    )
    await rig.http.get(f"{V}/trainings/t/metrics?names=lr&names=val/map50")
    assert list(rig.backend.calls[-1][1].names) == ["lr", "val/map50"]


async def test_patch_without_mask_names_the_fields_of_the_body(rig: Rig) -> None:
    body = {"displayName": "", "etag": "e1", "state": "READY", "recipe": {"seed": "4"}}
    assert (await rig.http.patch(V, json=body)).status_code == 200
    request = rig.backend.calls[-1][1]
    assert list(request.update_mask.paths) == ["display_name", "recipe.seed"]
    assert (request.version.name, request.version.etag) == ("projects/p/versions/v", "e1")
    await rig.http.patch(V, params={"updateMask": "displayName"}, json=body)
    assert list(rig.backend.calls[-1][1].update_mask.paths) == ["display_name"]


async def test_patch_of_a_training_names_its_priority(rig: Rig) -> None:
    path = f"{V}/trainings/t"
    assert (await rig.http.patch(path, json={"priority": 5, "state": "QUEUED"})).status_code == 200
    request = rig.backend.calls[-1][1]
    assert request == trainer_pb2.UpdateTrainingRequest(
        training=training_pb2.Training(
            name=path[4:], priority=5, state=training_pb2.Training.QUEUED
        ),
        update_mask={"paths": ["priority"]},  # type: ignore[arg-type]
    )
    await rig.http.patch(path, params={"updateMask": "priority"}, json={"priority": 0})
    assert list(rig.backend.calls[-1][1].update_mask.paths) == ["priority"]
    refused = await rig.http.patch(path, json={"priority": 101})
    assert details(refused, "BadRequest")["fieldViolations"][0]["field"] == "training.priority"


async def test_korean_and_emoji_survive_both_ways(rig: Rig) -> None:
    async def reply(request: Any, _context: Any) -> Any:
        return request.project

    rig.backend.replies["CreateProject"] = reply
    answer = await rig.http.post(
        "/v1/projects", params={"projectId": "shapes"}, json={"displayName": "버전 🚀"}
    )
    assert answer.json()["displayName"] == "버전 🚀"


PATHS = ("/v1/projects/p", "/v1/models", V, "/docs", "/openapi.json", "/")
STRANGE_PATHS = (
    b"/v1/nothing",
    b"/v1/",
    b"/nothing",
    b"/v2/projects",
    b"/v1/projects/",
    b"/v1//projects",
    b"/v1/projects/p/versions/v:explode",
    b"/v1/projects/p%2Fversions",
    b"/v1/projects/..",
    b"/v1/projects/../projects",
    b"/v1/projects/%2e%2e",
    b"/v1/projects/%2E%2E/versions",
    b"/v1/projects/%252e%252e",
    b"/v1/projects/a%5Cb",
    b"/v1/projects/a\\b",
    b"/v1/projects/%00",
    b"/v1/projects/%ff",
    b"/v1/../../etc/passwd",
    b"//v1/projects",
)


async def test_wrong_method_is_405_with_allow(rig: Rig, subtests: pytest.Subtests) -> None:
    for path in PATHS:
        with subtests.test(path):
            answer = await rig.http.put(path)
            assert answer.status_code == 405
            assert "GET" in answer.headers["allow"]
            assert details(answer, "ErrorInfo")["reason"] == "METHOD_NOT_ALLOWED"


async def test_strange_paths_are_404_and_reach_no_backend(
    rig: Rig, subtests: pytest.Subtests
) -> None:
    for path in STRANGE_PATHS:
        with subtests.test(path.decode("latin-1")):
            code, body = await rig.get_raw(path)
            assert code == 404
            assert b'"NO_ROUTE"' in body
    assert not rig.backend.calls


ERRORS = (
    (errors.InvalidArgument("x"), 400),
    (errors.FailedPrecondition("x", reason="VERSION_NOT_READY"), 400),
    (errors.OutOfRange("x", reason="CURSOR_EXPIRED"), 400),
    (errors.Unauthenticated("x"), 401),
    (errors.PermissionDenied("x"), 403),
    (errors.NotFound("x"), 404),
    (errors.AlreadyExists("x", reason="TRAINING_RUNS", metadata={"training": "t"}), 409),
    (errors.Aborted("x"), 409),
    (errors.ResourceExhausted("x"), 429),
    (errors.DataLoss("x"), 500),
    (errors.Unimplemented("x"), 501),
    (errors.Unavailable("x"), 503),
    (errors.DeadlineExceeded("x"), 504),
)


async def test_backend_errors_keep_code_message_and_details(
    rig: Rig, subtests: pytest.Subtests
) -> None:
    for error, http in ERRORS:
        with subtests.test(error.code.name):
            rig.backend.replies["GetProject"] = failing(error)
            answer = await rig.http.get("/v1/projects/p")
            assert answer.status_code == http
            shown = answer.json()["error"]
            assert (shown["code"], shown["status"]) == (http, error.code.name)
            assert shown["message"] == "x"
            info = details(answer, "ErrorInfo")
            assert (info["reason"], info["domain"]) == (error.reason, "detflow")
            assert info.get("metadata", {}) == error.metadata
            assert ("retry-after" in answer.headers) == isinstance(error, errors.Unavailable)


async def test_limit_that_passes_is_429_with_the_time_after_which_to_call_again(rig: Rig) -> None:
    error = errors.ResourceExhausted("x", reason="RATE_LIMIT", retry_seconds=3)
    rig.backend.replies["GetProject"] = failing(error)
    answer = await rig.http.get("/v1/projects/p")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert details(answer, "RetryInfo")["retryDelay"] == "3s"


async def test_internal_text_never_leaves_and_the_request_id_does(rig: Rig) -> None:
    rig.backend.replies["GetProject"] = failing(RuntimeError("password=hunter2"))
    answer = await rig.http.get("/v1/projects/p", headers={"x-request-id": "abc-1"})
    assert answer.status_code == 500
    assert "hunter2" not in answer.text
    assert answer.headers["x-request-id"] == "abc-1"
    assert details(answer, "RequestInfo")["requestId"] == "abc-1"


async def test_debug_details_are_left_out(rig: Rig) -> None:
    async def reply(_request: Any, context: Any) -> Any:
        status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="gone")
        status.details.add().Pack(error_details_pb2.DebugInfo(detail="stack"))
        await context.abort_with_status(rpc_status.to_status(status))

    rig.backend.replies["GetProject"] = reply
    # The interceptor of the services would hide this; a foreign backend might not have it.
    answer = await rig.http.get("/v1/projects/p")
    assert "stack" not in answer.text


async def test_service_away_is_503_with_retry_after_and_without_addresses(rig: Rig) -> None:
    async with running() as gone:
        pass
    answer = await rig.http.get("/healthz")
    assert answer.status_code == 200
    from gateway import errors as http_errors
    from gateway.backends import Backends
    from gateway.routes import SERVICES

    backends = Backends(dict.fromkeys(SERVICES, gone.backend.address))
    binding = next(b for b in backends.bindings if b.rpc.name == "GetProject")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await backends.unary(binding, project_pb2.GetProjectRequest(name="projects/p"), 5, ())
    code, headers, body = http_errors.answer(caught.value, "r")
    assert (code, headers["retry-after"]) == (503, "1")
    assert b"127.0.0.1" not in body
    assert set((await backends.health()).values()) == {"UNREACHABLE"}
    await backends.close()


BAD_REQUESTS = (
    ("", b'{"displayName": 3}', "project.displayName", "WRONG_TYPE"),
    ("", b'{"colour": "red"}', "project.colour", "UNKNOWN_FIELD"),
    ("", b'{"displayName": "a", "displayName": "b"}', "displayName", "DUPLICATE_KEY"),
    ("", b'{"displayName": "\\ud800"}', "project.displayName", "BAD_TEXT"),
    ("&color=red", b'{"displayName": "a"}', "color", "UNKNOWN_FIELD"),
    ("&project.displayName=b", b'{"displayName": "a"}', "project.displayName", "IN_BODY"),
    ("&projectId=b", b'{"displayName": "a"}', "projectId", "DUPLICATE_KEY"),
    ("", b'{"displayName": ""}', "project", "PROJECT_DISPLAY_NAME"),
)


async def test_bad_requests_name_the_field(rig: Rig, subtests: pytest.Subtests) -> None:
    for query, body, field, reason in BAD_REQUESTS:
        with subtests.test(f"{query} {body!r}"):
            answer = await rig.http.post(
                f"/v1/projects?projectId=shapes{query}", content=body, headers=JSON
            )
            assert answer.status_code == 400, answer.text
            violation = details(answer, "BadRequest")["fieldViolations"][0]
            assert (violation["field"], violation["reason"]) == (field, reason)


async def test_what_is_no_json_object_is_400(rig: Rig, subtests: pytest.Subtests) -> None:
    for body in (b"{", b"[]", b"3", b"\xff", b'{"a": NaN}', b"[" * 5000, b"null", b'"a"'):
        with subtests.test(repr(body[:9])):
            answer = await rig.http.post("/v1/projects?projectId=p2", content=body, headers=JSON)
            assert answer.status_code == 400
            assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"


async def test_body_rules(rig: Rig) -> None:
    too_large = await rig.http.post("/v1/projects", content=b" " * (1 << 20) + b"{}")
    assert too_large.status_code == 413
    wrong_type = await rig.http.post(f"{V}/trainings/t:stop", content=b"{}")
    assert wrong_type.status_code == 415
    unexpected = await rig.http.request("DELETE", V, content=b"{}", headers=JSON)
    assert unexpected.status_code == 400
    mismatch = await rig.http.patch(V, json={"name": "projects/p/versions/other"})
    assert details(mismatch, "ErrorInfo")["reason"] == "PATH_MISMATCH"
    empty = await rig.http.patch(V)
    assert details(empty, "ErrorInfo")["reason"] == "EMPTY_BODY"

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 16)

    chunked = await rig.http.post("/v1/projects", content=chunks(), headers=JSON)
    assert chunked.status_code == 413


async def test_deadline_and_trace_and_request_id_reach_the_service(rig: Rig) -> None:
    seen: list[float] = []

    async def reply(_request: Any, context: Any) -> Any:
        seen.append(context.time_remaining())
        return project_pb2.Project()

    rig.backend.replies["GetProject"] = reply
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    for headers in (
        {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "r1"},
        {"x-request-timeout": "2.5"},
        {"grpc-timeout": "500m"},
        {"x-request-timeout": "3600"},
    ):
        answer = await rig.http.get("/v1/projects/p", headers=headers)
        assert answer.status_code == 200
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    metadata = rig.backend.calls[0][2]
    assert metadata["x-request-id"] == "r1"
    assert metadata["traceparent"].startswith(f"00-{trace}-")
    assert not metadata["traceparent"].startswith(f"00-{trace}-00f067aa0ba902b7")
    for value, (low, high) in zip(seen, [(28, 30), (1.5, 2.5), (0.1, 0.5), (58, 60)], strict=True):
        assert low < value <= high + 0.5  # the service's clock starts later
    assert (
        await rig.http.get("/v1/models", headers={"x-request-timeout": "soon"})
    ).status_code == 400


CHECK = f"{V}/trainings?validateOnly=true"


async def test_check_of_a_training_may_take_ten_minutes(rig: Rig) -> None:
    seen: list[float] = []

    async def reply(request: Any, context: Any) -> Any:
        seen.append(context.time_remaining())
        return request.training

    rig.backend.replies["StartTraining"] = reply
    for path, headers in (
        (CHECK, {}),
        (CHECK, {"x-request-timeout": "3600"}),
        (CHECK, {"x-request-timeout": "90"}),
        (f"{V}/trainings", {}),
    ):
        answer = await rig.http.post(path, json={"model": "yolov8n"}, headers=headers)
        assert answer.json()["model"] == "yolov8n"
    for value, limit in zip(seen, (600, 600, 90, 30), strict=True):
        assert limit - 5 < value < limit + 2  # the service's clock starts later


async def test_services_give_a_check_more_time_than_another_call(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reply(request: Any, _context: Any) -> Any:
        await asyncio.sleep(0.3)  # the work
        return request.training

    monkeypatch.setattr(interceptors, "_UNARY_SECONDS", 0.1)
    rig.backend.replies["StartTraining"] = reply
    assert (await rig.http.post(CHECK, json={})).status_code == 200
    answer = await rig.http.post(f"{V}/trainings", json={})
    assert details(answer, "ErrorInfo")["reason"] == "SERVER_TIMEOUT"


async def test_check_ends_when_its_caller_leaves(rig: Rig) -> None:
    began = asyncio.Event()

    async def reply(_request: Any, _context: Any) -> Any:
        began.set()
        await asyncio.Event().wait()

    rig.backend.replies["StartTraining"] = reply
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(
        f"POST {CHECK} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 2\r\n\r\n{}".encode()
    )
    await began.wait()
    writer.close()
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def test_slow_service_is_504(rig: Rig) -> None:
    async def reply(_request: Any, context: Any) -> Any:
        await rig.backend.cancelled.wait()

    rig.backend.replies["ListModels"] = reply
    answer = await rig.http.get("/v1/models", headers={"x-request-timeout": "0.05"})
    assert answer.status_code == 504
    assert "Deadline Exceeded" not in answer.text
    await rig.backend.cancelled.wait()


async def test_failure_with_a_detail_of_unknown_type_is_still_shown(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> Any:
        training = training_pb2.Training(name="projects/p/versions/v/trainings/t")
        training.failure.status.message = "out of memory"
        training.failure.status.details.add(type_url="type.googleapis.com/future.Detail")
        training.failure.status.details.add().Pack(error_details_pb2.ErrorInfo(reason="OOM"))
        return training

    rig.backend.replies["GetTraining"] = reply
    failure = (await rig.http.get(f"{V}/trainings/t")).json()["failure"]["status"]
    assert failure["message"] == "out of memory"
    assert [one["reason"] for one in failure["details"]] == ["OOM"]


async def test_readiness_follows_the_health_of_the_services(rig: Rig) -> None:
    assert (await rig.http.get("/readyz")).json()["status"] == "READY"
    await rig.backend.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    answer = await rig.http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["services"]["trainer"] == "NOT_SERVING"
    assert (await rig.http.get("/healthz")).status_code == 200


async def test_pages_metrics_and_openapi(rig: Rig) -> None:
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/metrics", "text/plain")):
        answer = await rig.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
    assert "script" not in (await rig.http.get("/docs")).headers["content-security-policy"]
    document = await rig.http.get("/openapi.json")
    assert document.json()["openapi"] == "3.1.0"
    again = await rig.http.get("/openapi.json", headers={"if-none-match": document.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    await rig.http.get("/v1/models")
    assert 'route="ListModels"' in (await rig.http.get("/metrics")).text


async def test_every_answer_has_the_security_headers(rig: Rig) -> None:
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/v1/models", "/v1/nothing"):
        headers = (await rig.http.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


async def test_foreign_hosts_and_origins_are_refused(rig: Rig) -> None:
    own = f"127.0.0.1:{rig.port}"
    foreign = await rig.http.get("/v1/models", headers={"host": "evil.example"})
    assert foreign.status_code == 421
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://{own}", "sec-fetch-site": "cross-site"},
    ):
        refused = await rig.http.post(f"{V}/trainings/t:stop", json={}, headers=headers)
        assert details(refused, "ErrorInfo")["reason"] == "CROSS_ORIGIN"
    assert not rig.backend.calls
    for headers in ({"origin": f"http://{own}"}, {"sec-fetch-site": "same-origin"}, {}):
        allowed = await rig.http.post(f"{V}/trainings/t:stop", json={}, headers=headers)
        assert allowed.status_code == 200
    assert rig.backend.calls[-1][1] == trainer_pb2.StopTrainingRequest(
        name="projects/p/versions/v/trainings/t"
    )


async def test_reads_are_repeated_while_a_service_restarts_and_writes_are_not(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> Any:
        if len(rig.backend.calls) < 3:
            raise errors.Unavailable("restarting")
        return project_pb2.Project(name="projects/p")

    rig.backend.replies["GetProject"] = reply
    assert (await rig.http.get("/v1/projects/p")).status_code == 200
    rig.backend.calls.clear()
    rig.backend.replies["CreateProject"] = failing(errors.Unavailable("restarting"))
    answer = await rig.http.post("/v1/projects?projectId=abc", json={"displayName": "a"})
    assert (answer.status_code, len(rig.backend.calls)) == (503, 1)
