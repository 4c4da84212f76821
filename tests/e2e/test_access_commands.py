"""Access to a stack as its user has it: tokens, keys, members, links and the audit log."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest

import detflow
from detflow.errors import NotFound, PermissionDenied, Unauthenticated
from tests.cli_rig import run_here
from tests.stack_rig import Done, Stack
from tests.stack_rig import detflow as run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Commands:
    """Runs commands in this process."""

    def __init__(
        self,
        stack: Stack,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        folder: Path,
    ) -> None:
        self._address = f"127.0.0.1:{stack.port}"
        self._owners = stack.data_dir
        self._nobodys = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def owner(self, *arguments: str) -> Done:
        """Runs one as whoever started the stack."""
        return self._run(self._owners, arguments)

    def nobody(self, *arguments: str) -> Done:
        """Runs one as another user of the machine, who has no part in the stack."""
        return self._run(self._nobodys, ("--address", self._address, *arguments))

    def _run(self, data_dir: Path, arguments: Sequence[str]) -> Done:
        self._monkeypatch.setenv("DETFLOW_DATA_DIR", str(data_dir))
        return run_here(self._monkeypatch, self._capsys, *arguments)


@pytest.fixture
def commands(
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Commands:
    return Commands(stack, monkeypatch, capsys, tmp_path)


def test_tokens_are_for_the_owner_of_the_folder_only(stack: Stack) -> None:
    folder = stack.data_dir / "access"
    assert folder.stat().st_mode & 0o777 == 0o700
    owner, service = ((folder / f"{name}-token") for name in ("owner", "service"))
    assert owner.stat().st_mode & 0o777 == service.stat().st_mode & 0o777 == 0o600
    assert owner.read_text() != service.read_text()
    told = {}
    for process in stack.processes():
        environment = process.environ()
        if "DETFLOW_SERVICE_TOKEN" in environment:
            told[process.cmdline()[-1]] = environment.get("DETFLOW_OWNER_TOKEN")
    services = {f"services.{name}" for name in ("version", "preprocess", "trainer", "metrics")}
    assert services | {"gateway"} <= {*told}
    assert {name for name, token in told.items() if token} == {"services.version"}
    assert not [p for p in stack.processes() if owner.read_text() in " ".join(_words(p))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_command_of_somebody_else_is_refused_with_the_remedy(
    commands: Commands, stack: Stack, tmp_path: Path
) -> None:
    # In a process of its own: nothing of this one may help it.
    refused = run(tmp_path, "--address", f"127.0.0.1:{stack.port}", "models")
    assert refused.code == 1 and refused.out == ""
    assert "set DETFLOW_TOKEN to an API key" in refused.err
    assert len(refused.err.splitlines()) == 1
    file = tmp_path / "token"
    file.write_text("dfk_" + "x" * 43)
    wrong = commands.nobody("--token-file", str(file), "models")
    assert wrong.code == 1 and "does not take this token" in wrong.err
    assert "xxx" not in wrong.err


def test_key_does_what_its_role_allows_in_its_project_until_it_is_deleted(
    commands: Commands, tmp_path: Path
) -> None:
    for project in ("ours", "theirs"):
        assert commands.owner("projects", "create", project).code == 0
    made = commands.owner("keys", "create", "ci", "--role", "viewer", "--project", "ours", "--json")
    token = made.json["token"]
    assert made.code == 0 and made.json["expireTime"]
    file = tmp_path / "token"
    file.write_text(f"{token}\n")

    def as_key(*arguments: str) -> Done:
        return commands.nobody("--token-file", str(file), *arguments)

    assert as_key("whoami", "--json").json["grants"] == [
        {"project": "projects/ours", "role": "VIEWER"}
    ]
    assert [p["name"] for p in as_key("projects", "list", "--json").json["projects"]] == [
        "projects/ours"
    ]
    # What is not its own is as if it were not there.
    there = as_key("datasets", "list", "--project", "theirs")
    nowhere = as_key("datasets", "list", "--project", "nowhere")
    assert there.code == nowhere.code == 1
    assert there.err.replace("theirs", "X") == nowhere.err.replace("nowhere", "X")
    forbidden = as_key("webhooks", "create", "https://example.com", "--project", "ours")
    assert forbidden.code == 1 and "ADMIN" in forbidden.err

    assert commands.owner("keys", "update", "ci", "--role", "admin", "--project", "ours").code == 0
    listed = commands.owner("keys", "list", "--project", "ours").out
    assert "admin" in listed and token not in listed
    deleted = commands.owner("keys", "delete", "ci", "--project", "ours")
    assert deleted.code == 0, deleted.err
    # The trainer has never seen it, and so has nothing to remember.
    assert "does not take this token" in as_key("models").err


def test_python_calls_as_whom_its_token_says(stack: Stack) -> None:
    with stack.client() as owner:
        owner.projects.ensure("python")
        token = owner.keys.create("script", role="editor", project="python").token
        owner.members.create("kim@example.com", project="python")
        [member] = owner.members.list("python")
        owner.members.update(member.name, role="admin")
        owner.members.delete(owner.members.find("KIM@example.com", "python").name)
        assert not owner.members.list("python")
        changed = owner.projects.update("python", display_name="파이썬", max_running_trainings=2)
        assert changed.display_name == "파이썬" and changed.quota.max_running_trainings == 2

    address = f"127.0.0.1:{stack.port}"
    with detflow.Client(address, environ={}, token=token) as client:
        assert client.datasets.list("python") == []
        assert next(client.versions.watch("python")).HasField("snapshot")
        with pytest.raises(NotFound):
            client.datasets.list("default")
        with pytest.raises(PermissionDenied):
            client.projects.update("python", display_name="mine")
    with detflow.Client(address, environ={}) as client, pytest.raises(Unauthenticated):
        client.models()

    async def read() -> str:
        async with detflow.AsyncClient(address, environ={}, token=token) as client:
            async for message in client.versions.watch("python"):
                assert message.HasField("snapshot")
                break
            return (await client.access.principal()).display_name

    assert asyncio.run(read()) == "script"


def test_audit_log_says_who_did_what(commands: Commands, stack: Stack) -> None:
    assert commands.owner("projects", "create", "audited").code == 0
    assert commands.owner("keys", "create", "seen", "--project", "audited").code == 0
    with stack.client() as client:
        token = client.keys.create("auditor", role="viewer", project="audited").token
        _until_written(client, "audited", 2)
    shown = commands.owner("audit", "--project", "audited")
    assert "CreateApiKey" in shown.out and "owner" in shown.out and token not in shown.out
    everything = commands.owner("audit", "--all-projects", "--limit", "1000", "--json").json
    assert "detflow.v1.ProjectService/CreateProject" in json.dumps(everything)


def _until_written(client: detflow.Client, project: str, number: int) -> None:
    """Waits until the log has so many entries: they come by events."""
    deadline = time.monotonic() + 60
    while len([entry for entry in client.audit.list(project) if entry.done]) < number:
        assert time.monotonic() < deadline


def test_link_signs_one_browser_in(commands: Commands, stack: Stack) -> None:
    url = commands.owner("open", "--json").json["url"]
    assert url.startswith(f"{stack.url}/login?ticket=")
    printed = commands.owner("open", "--no-browser").out.splitlines()
    assert printed[0].startswith(f"{stack.url}/login?ticket=") and printed[0] != url
    ticket = {"ticket": url.partition("=")[2]}
    same_origin = {"origin": stack.url}
    with httpx.Client(base_url=stack.url) as browser:
        assert browser.get(url).status_code == 200  # to look at it does not use it up
        assert browser.get("/v1/principal").status_code == 401
        assert browser.post("/login/session", data=ticket, headers=same_origin).status_code == 303
        assert browser.get("/v1/principal").json()["subject"] == "owner"
    with httpx.Client(base_url=stack.url) as another:
        assert another.post("/login/session", data=ticket, headers=same_origin).status_code == 410
        assert another.get("/v1/principal").status_code == 401
