"""Who is let in over HTTP: every route of a whole stack, by header, by cookie, and by nothing."""

import shlex
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from detflow import policy
from gateway import examples, openapi
from gateway.routes import Binding, bindings
from tests.gateway_rig import details
from tests.stack_rig import Stack

SAME_ORIGIN = {"sec-fetch-site": "same-origin"}
RPC = "/detflow.v1.ProjectService/CreateProject"


@dataclass(frozen=True)
class Request:
    """The documented example of a route, about another project."""

    binding: Binding
    method: str
    path: str
    headers: dict[str, str]
    body: str

    @property
    def rule(self) -> policy.Rule:
        return policy.RULES[self.binding.grpc_path]

    async def send(self, http: httpx.AsyncClient, **headers: str) -> httpx.Response:
        return await http.request(
            self.method, self.path, headers=self.headers | headers, content=self.body
        )


def requests(project_id: str) -> Iterator[Request]:
    by_name = {one.rpc.name: one for one in bindings()}
    for path, operations in openapi.document(by_name.values())["paths"].items():
        for method, operation in operations.items():
            line = examples.curl(method.upper(), path, operation).replace("shapes", project_id)
            words = shlex.split(line)
            given = [words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H"]
            url = next(word for word in words if word.startswith(examples.SERVER))
            yield Request(
                by_name[operation["operationId"]],
                method.upper(),
                url.removeprefix(examples.SERVER),
                {name: value for name, value in given if name != "Authorization"},
                words[words.index("-d") + 1] if "-d" in words else "",
            )


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    """Token of a key that administers one project, besides which there is shut1."""
    with httpx.Client(base_url=stack.url, headers=stack.headers) as mine:
        for name in ("open1", "shut1"):
            made = mine.post(f"/v1/projects?projectId={name}", json={"displayName": name})
            assert made.status_code == 200, made.text
        key = {"displayName": "k", "role": "ADMIN"}
        return str(mine.post("/v1/projects/open1/apiKeys", json=key).json()["token"])


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """A client that shows nothing by itself, and keeps cookies."""
    async with httpx.AsyncClient(base_url=stack.url, timeout=20) as one:
        yield one


async def sign_in(http: httpx.AsyncClient, token: str) -> httpx.Response:
    """Signs a client in by a login link of whoever has the token."""
    shown = {"authorization": f"Bearer {token}"}
    link = (await http.post("/v1/loginLinks", json={}, headers=shown)).json()
    page = await http.get(link["path"])
    assert page.status_code == 200
    ticket = page.text.partition('name="ticket" value="')[2].partition('"')[0]
    return await http.post("/login/session", data={"ticket": ticket}, headers=SAME_ORIGIN)


async def test_no_route_answers_who_shows_nothing(
    http: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for request in requests("shut1"):
        with subtests.test(request.binding.rpc.name):
            for headers, reason in (
                ({}, "NO_TOKEN"),
                ({"authorization": f"Bearer dfk_{'a' * 43}"}, "BAD_TOKEN"),
                ({"cookie": f"detflow_session=dfs_{'a' * 43}"} | SAME_ORIGIN, "BAD_TOKEN"),
            ):
                answer = await request.send(http, **headers)
                assert answer.status_code == 401, answer.text
                assert answer.headers["www-authenticate"] == "Bearer"
                assert details(answer, "ErrorInfo")["reason"] == reason
    answer = await http.post(RPC, json={})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def test_key_of_one_project_sees_of_no_other_whether_it_exists(
    http: httpx.AsyncClient, key: str, subtests: pytest.Subtests
) -> None:
    http.headers["authorization"] = f"Bearer {key}"
    http.headers["x-request-id"] = "r"
    for shut, gone in zip(requests("shut1"), requests("gone1"), strict=True):
        with subtests.test(shut.binding.rpc.name):
            answer = await shut.send(http)
            if shut.rule.field:
                assert answer.status_code == 404, answer.text
                assert details(answer, "ErrorInfo")["reason"] == "NOT_FOUND"
            elif shut.rule.role:
                assert answer.status_code == 403, answer.text
                assert details(answer, "ErrorInfo")["reason"] == "MISSING_ROLE"
            else:
                assert answer.status_code == 200, answer.text
                continue
            other = await gone.send(http)
            assert answer.text.replace("shut1", "gone1") == other.text
    listed = (await http.get("/v1/projects")).json()["projects"]
    assert [one["name"] for one in listed] == ["projects/open1"]


async def test_browser_is_signed_in_by_a_link_that_counts_once(
    http: httpx.AsyncClient, key: str
) -> None:
    link = await http.post("/v1/loginLinks", json={}, headers={"authorization": f"Bearer {key}"})
    path = link.json()["path"]
    for _ in range(2):  # who only looks does not use it up
        page = await http.get(path)
        assert "set-cookie" not in page.headers
        assert page.headers["cache-control"] == "no-store"
        assert page.headers.get_list("referrer-policy") == ["same-origin"]
        assert "form-action 'self'" in page.headers["content-security-policy"]
        assert "<script" not in page.text
    ticket = {"ticket": path.partition("=")[2]}
    foreign = await http.post(
        "/login/session", data=ticket, headers={"sec-fetch-site": "cross-site"}
    )
    assert foreign.status_code == 403
    begun = await http.post("/login/session", data=ticket, headers=SAME_ORIGIN)
    assert (begun.status_code, begun.headers["location"]) == (303, "/")
    cookie = begun.headers["set-cookie"]
    assert cookie.startswith("detflow_session=dfs_")
    assert "; HttpOnly; SameSite=Strict; " in cookie and "Secure" not in cookie
    who = (await http.get("/v1/principal")).json()
    assert who["grants"] == [{"project": "projects/open1", "role": "ADMIN"}]
    again = await http.post("/login/session", data=ticket, headers=SAME_ORIGIN)
    assert again.status_code == 410 and "detflow open" in again.text
    assert "set-cookie" not in again.headers


async def test_session_ends_with_sign_out(http: httpx.AsyncClient, key: str) -> None:
    await sign_in(http, key)
    token = http.cookies["detflow_session"]
    out = await http.post("/logout", headers=SAME_ORIGIN)
    assert (out.status_code, out.headers["location"]) == (303, "/")
    assert not http.cookies
    # It was not used before: a service remembers for ten seconds whose a token is.
    cookie = {"cookie": f"detflow_session={token}"}
    ended = await http.get("/v1/principal", headers=cookie)
    assert details(ended, "ErrorInfo")["reason"] == "BAD_TOKEN"
    assert (await http.post("/logout", headers=SAME_ORIGIN | cookie)).status_code == 303


async def test_cookie_alone_changes_nothing(
    http: httpx.AsyncClient, stack: Stack, key: str, subtests: pytest.Subtests
) -> None:
    await sign_in(http, key)
    for request in requests("open1"):
        if request.method == "GET":
            continue
        with subtests.test(request.binding.rpc.name):
            for headers in (
                {},
                {"sec-fetch-site": "cross-site"},
                {"sec-fetch-site": "same-site"},
                {"origin": "https://evil.example"},
                {"origin": "null"},
            ):
                answer = await request.send(http, **headers)
                assert answer.status_code == 403, answer.text
                assert details(answer, "ErrorInfo")["reason"] == "CROSS_ORIGIN"
    for path in ("/logout", RPC):
        assert (await http.post(path, json={})).status_code == 403
    webhooks = "/v1/projects/open1/webhooks"
    for headers in (SAME_ORIGIN, {"origin": stack.url}):
        made = await http.post(webhooks, json={"url": "https://example.com"}, headers=headers)
        assert made.status_code == 200, made.text


async def test_cookie_opens_event_streams_and_rpcs(http: httpx.AsyncClient, key: str) -> None:
    await sign_in(http, key)
    headers = {"sec-fetch-site": "same-origin", "accept": "text/event-stream"}
    path = "/v1/projects/open1/versions:watch"
    async with http.stream("GET", path, headers=headers) as events:
        assert events.status_code == 200
        assert events.headers["content-type"] == "text/event-stream"
        lines = events.aiter_lines()
        first = [await anext(lines) for _ in range(3)]
        assert any(line.startswith("data: {") for line in first), first
    body = {"name": "projects/open1"}
    rpc = "/detflow.v1.ProjectService/GetProject"
    answer = await http.post(rpc, json=body, headers=SAME_ORIGIN)
    assert answer.json()["displayName"] == "open1"
    assert (await http.get("/v1/projects/shut1")).status_code == 404


async def test_role_that_is_too_low_is_403_with_the_one_it_takes(
    http: httpx.AsyncClient, stack: Stack, key: str
) -> None:
    body = {"displayName": "v", "role": "VIEWER"}
    made = await http.post("/v1/projects/open1/apiKeys", json=body, headers=stack.headers)
    http.headers["authorization"] = f"Bearer {made.json()['token']}"
    assert (await http.get("/v1/projects/open1")).status_code == 200
    answer = await http.post("/v1/projects/open1/uploads:begin", json={"sizeBytes": "1"})
    assert answer.status_code == 403
    assert "EDITOR in projects/open1" in answer.json()["error"]["message"]


async def test_what_only_services_ask_is_not_there(
    http: httpx.AsyncClient, stack: Stack, subtests: pytest.Subtests
) -> None:
    service = (stack.data_dir / "access" / "service-token").read_text().strip()
    for rpc in ("Authenticate", "CreateSession", "DeleteSession"):
        with subtests.test(rpc):
            for token in (stack.token, service):
                answer = await http.post(
                    f"/detflow.v1.AccessService/{rpc}",
                    json={"token": "x"},
                    headers={"authorization": f"Bearer {token}"},
                )
                assert answer.status_code == 404


async def test_preflights_allow_nothing(http: httpx.AsyncClient, key: str) -> None:
    asked = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    for path in ("/v1/projects", "/v1/loginLinks", RPC, "/login/session", "/logout", "/"):
        answer = await http.options(path, headers=asked)
        assert answer.status_code in (403, 405)
        read = await http.get(path, headers={"origin": "https://evil.example"})
        for one in (answer, read):
            assert not [name for name in one.headers if name.startswith("access-control-")]


async def test_pages_without_data_are_open(http: httpx.AsyncClient) -> None:
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"):
        assert (await http.get(path)).status_code == 200
    assert (await http.get("/login/options")).json() == {"oidc": None}
    assert (await http.get("/login")).headers["location"] == "/"
    for path in ("/login?ticket=%3Cscript%3E", "/login?ticket=" + "a" * 200):
        answer = await http.get(path)
        assert answer.status_code == 400 and "script" not in answer.text
    korean = await http.get("/login?ticket=abc", headers={"accept-language": "ko-KR,ko;q=0.9"})
    assert '<html lang="ko">' in korean.text and "로그인" in korean.text


def test_document_says_how_one_shows_who_one_is() -> None:
    document: dict[str, Any] = openapi.document(bindings())
    schemes = document["components"]["securitySchemes"]
    assert schemes["token"]["scheme"] == "bearer" and schemes["session"]["in"] == "cookie"
    assert document["security"] == [{"token": []}, {"session": []}]
    for path in document["paths"].values():
        for operation in path.values():
            assert {"401", "403", "404", "429"} <= operation["responses"].keys()
    texts = {
        operation["operationId"]: operation["description"]
        for path in document["paths"].values()
        for operation in path.values()
    }
    assert texts["CreateVersion"].endswith("Takes the role EDITOR in the project.")
    assert texts["CreateProject"].endswith("Takes the role ADMIN in all projects.")
    assert texts["ListModels"].endswith("Takes a token, whatever its role.")
