"""`detflow doctor` finds what is wrong and says what to do."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from detflow import doctor
from detflow.doctor import Finding, State
from detflow.settings import Settings

if TYPE_CHECKING:
    from detflow.events import Bus


def _only(findings: list[Finding]) -> Finding:
    (found,) = findings
    return found


def test_misspelt_variables_are_named() -> None:
    found = _only(list(doctor.check_variables({"DETFLOW_LOG_LEVL": "debug", "PATH": "/"})))
    assert found.state is State.WARN and "DETFLOW_LOG_LEVL" in found.found
    given = {"DETFLOW_LOG_LEVEL": "debug", "DETFLOW_NATS_URL_FILE": "/x", "DETFLOW_TOKEN": "t"}
    assert _only(list(doctor.check_variables(given))).state is State.OK


@pytest.mark.parametrize(
    ("mode", "above", "state"),
    [(0o600, 0o755, State.OK), (0o644, 0o755, State.WARN), (0o644, 0o700, State.OK),
     (0o620, 0o700, State.FAIL)],
)  # fmt: skip
def test_secrets_that_others_can_reach_are_found(
    tmp_path: Path, mode: int, above: int, state: State
) -> None:
    path = tmp_path / "secrets/token"
    path.parent.mkdir()
    path.touch()
    path.chmod(mode)
    path.parent.chmod(above)
    found = _only(list(doctor.check_secrets({"DETFLOW_SERVICE_TOKEN_FILE": str(path)})))
    assert found.state is state
    assert bool(found.remedy) == (state is not State.OK)


def test_a_secret_that_is_not_there_is_found() -> None:
    found = _only(list(doctor.check_secrets({"DETFLOW_SERVICE_TOKEN_FILE": "/no/token"})))
    assert found.state is State.FAIL and "/no/token" in found.found


def _certificate(folder: Path, days: float) -> Settings:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "detflow")])
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(end - datetime.timedelta(days=365))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Settings(tls_cert_file=str(folder / "tls.crt"), tls_key_file=str(folder / "tls.key"))


@pytest.mark.parametrize(("days", "state"), [(90, State.OK), (5, State.WARN), (-1, State.FAIL)])
def test_certificates_that_end_soon_are_found(tmp_path: Path, days: float, state: State) -> None:
    assert _only(list(doctor.check_certificates(_certificate(tmp_path, days)))).state is state


def test_a_process_without_tls_that_others_reach_is_found() -> None:
    assert _only(list(doctor.check_certificates(Settings()))).state is State.OK
    found = _only(list(doctor.check_certificates(Settings(http_listen="0.0.0.0:7100"))))
    assert found.state is State.WARN and "unencrypted" in found.found


async def test_postgres_and_its_clock_are_measured(
    make_database_url: Callable[[str], Awaitable[str]],
) -> None:
    url = await make_database_url("version")
    postgres, clock = await doctor.check_postgres(Settings(database_url=url))
    assert postgres.check == "postgres" and postgres.state is not State.FAIL
    assert clock.state is State.OK
    wrong = Settings(database_url=url.replace("version:", "nobody:"))
    found = _only(await doctor.check_postgres(wrong))
    assert found.state is State.FAIL and "DETFLOW_DATABASE_URL" in found.remedy


async def test_streams_of_nats_and_what_was_put_aside_are_looked_at(
    bus: "Bus", nats_url: str
) -> None:
    settings = Settings(nats_url=nats_url)
    assert _only(await doctor.check_nats(settings)).state is State.OK
    await bus.publish_durable("detflow.dead.somebody", b"", {"Nats-Msg-Id": "1"})
    assert "1 events were put aside" in _only(await doctor.check_nats(settings)).found
    await bus.js.delete_stream("DETFLOW_DEAD")
    assert "DETFLOW_DEAD" in _only(await doctor.check_nats(settings)).found


async def test_an_object_is_written_and_read(tmp_path: Path) -> None:
    settings = Settings(store_url=(tmp_path / "store").as_uri())
    assert _only(await doctor.check_store(settings)).state is State.OK
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    broken = Settings(store_url=(tmp_path / "file/store").as_uri())
    assert _only(await doctor.check_store(broken)).state is State.FAIL


def test_command_ends_with_1_and_says_what_to_do(tmp_path: Path, unused_tcp_port: int) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DETFLOW_")}
    addresses = {
        f"DETFLOW_{name}_ADDRESS": f"127.0.0.1:{unused_tcp_port}"
        for name in ("VERSION", "PREPROCESS", "TRAINER", "METRICS")
    }
    done = subprocess.run(
        [sys.executable, "-m", "detflow.cli", "doctor", "--json", "--data-dir", str(tmp_path)],
        env={**kept, **addresses, "DETFLOW_PROBE_SECONDS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    by_check = {one["check"]: one for one in answer["findings"]}
    assert by_check["version"]["state"] == "fail"
    assert "DETFLOW_VERSION_ADDRESS" in by_check["version"]["remedy"]
    assert "DETFLOW_PROBE_SECONDS" in by_check["settings"]["found"]
