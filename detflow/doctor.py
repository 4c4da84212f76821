"""Checks what a process depends on, one thing at a time, and says what to do about each.

It is run in the environment of the process in question and reads the same settings. What belongs to
parts that are not installed here, such as Postgres where there is only the client, is left out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import os
import resource
import ssl
import stat
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from detflow import access, tls
from detflow.errors import DetflowError
from detflow.probe import ask_gateway, ask_service
from detflow.settings import Settings

_SECONDS = 10.0
_MIN_POSTGRES = 150000
_MAX_LATENCY_SECONDS = 0.05
_MAX_SKEW_SECONDS = 2.0
_MIN_FILES = 4096
_MIN_FREE_BYTES, _LOW_BYTES = 1 << 30, 10 << 30
_MIN_INODES = 100_000
_EXPIRY_DAYS = 21


class State(StrEnum):
    """How something is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        check: What was looked at.
        state: How it is.
        found: What it is like.
        remedy: What to do; empty where nothing is to be done.
    """

    check: str
    state: State
    found: str
    remedy: str = ""


async def examine(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Checks everything.

    Args:
        settings: Of the process.
        environ: Its environment, to find variables that nobody reads.
    """
    found = [*check_variables(environ), *check_secrets(environ), *check_certificates(settings)]
    found += [*check_disk(settings.data_dir), *check_limits(), *check_gpus(settings)]
    # A client alone has none of these.
    for name, check in (
        ("postgres", check_postgres),
        ("nats", check_nats),
        ("object store", check_store),
    ):
        found += await _guarded(name, settings, check)
    return [*found, *await check_processes(settings)]


async def _guarded(
    name: str, settings: Settings, check: Callable[[Settings], Awaitable[list[Finding]]]
) -> list[Finding]:
    try:
        async with asyncio.timeout(_SECONDS):
            return await check(settings)
    except ImportError as error:
        return [Finding(name, State.WARN, f"not checked: {error.name} is not installed here")]
    except TimeoutError:
        return [
            Finding(name, State.FAIL, f"no answer in {_SECONDS:.0f} s", "is the address right?")
        ]
    except DetflowError as error:
        return [Finding(name, State.FAIL, error.message, "is it running, is the address right?")]


def check_variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Finds DETFLOW_* variables that no process reads: most are misspelt."""
    fields = dataclasses.fields(Settings)
    known = {f"DETFLOW_{one.name.upper()}" for one in fields}
    known |= {f"DETFLOW_{one.name.upper()}_FILE" for one in fields if not one.repr}
    known |= {"DETFLOW_TOKEN", "DETFLOW_TOKEN_FILE", "DETFLOW_INSECURE"}
    unknown = sorted(name for name in environ if name.startswith("DETFLOW_") and name not in known)
    if unknown:
        yield Finding(
            "settings", State.WARN, f"nobody reads {', '.join(unknown)}", "are they misspelt?"
        )
    else:
        given = sum(name in known for name in environ)
        yield Finding("settings", State.OK, f"{given} are set in the environment")


def check_secrets(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Checks that others can neither write nor read the files that hold secrets."""
    names = [
        f"DETFLOW_{one.name.upper()}_FILE" for one in dataclasses.fields(Settings) if not one.repr
    ]
    for name in (*names, "DETFLOW_TOKEN_FILE", "DETFLOW_TLS_KEY_FILE"):
        if not (text := environ.get(name)):
            continue
        path = Path(text)
        try:
            mode, above = path.stat().st_mode, path.resolve().parent.stat().st_mode
        except OSError as error:
            remedy = "mount it, or let this user read it"
            yield Finding(name, State.FAIL, f"{path}: {error.strerror}", remedy)
            continue
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding(name, State.FAIL, f"others can write {path}", f"chmod 600 {path}")
        elif mode & stat.S_IROTH and above & stat.S_IXOTH and not path.is_relative_to("/run"):
            # In /run they are a container's own, which has one user.
            yield Finding(name, State.WARN, f"others can read {path}", f"chmod 600 {path}")
        else:
            yield Finding(name, State.OK, str(path))


def check_certificates(settings: Settings) -> Iterator[Finding]:
    """Checks that the files of TLS belong together and how long the certificate is valid."""
    path = settings.tls_cert_file
    try:
        tls.check_files(settings.tls_ca_file, path, settings.tls_key_file)
    except DetflowError as error:
        yield Finding("TLS", State.FAIL, error.message, "see DETFLOW_TLS_*_FILE")
        return
    if not path:
        local = all(access.is_local(address) for address in (settings.listen, settings.http_listen))
        if local:
            yield Finding("TLS", State.OK, "not needed: it listens on loopback only")
        else:
            yield Finding(
                "TLS",
                State.WARN,
                "tokens travel unencrypted unless a proxy in front has TLS",
                "set DETFLOW_TLS_CERT_FILE, DETFLOW_TLS_KEY_FILE and DETFLOW_TLS_CA_FILE",
            )
        return
    # The standard library reads certificates for connections only; this is how it tests itself.
    decoded: Any = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
    days = (ssl.cert_time_to_seconds(decoded["notAfter"]) - time.time()) / 86400
    said = f"{path} is valid until {decoded['notAfter']}"
    remedy = "renew it and restart the process"
    if days < 0:
        yield Finding("TLS", State.FAIL, f"{path} ended {decoded['notAfter']}", remedy)
    elif days < _EXPIRY_DAYS:
        yield Finding("TLS", State.WARN, said, remedy)
    else:
        yield Finding("TLS", State.OK, said)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Checks that there is room for files, and for new names, where the process works."""
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        remedy = "set DETFLOW_DATA_DIR to a folder of this user"
        yield Finding("disk", State.FAIL, f"cannot write to {folder}", remedy)
        return
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    found = f"{free / (1 << 30):.1f} GiB free at {folder}"
    remedy = "make room, or set DETFLOW_DATA_DIR to a larger disk"
    if free < _MIN_FREE_BYTES:
        yield Finding("disk", State.FAIL, found, remedy)
    elif free < _LOW_BYTES:
        yield Finding("disk", State.WARN, found, remedy)
    elif state.f_files and state.f_favail < _MIN_INODES:  # some file systems count none
        yield Finding("disk", State.WARN, f"{state.f_favail} files can be made at {folder}", remedy)
    else:
        yield Finding("disk", State.OK, found)


def check_limits() -> Iterator[Finding]:
    """Checks how many files, connections among them, the process may have open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _MIN_FILES:
        remedy = f"ulimit -n 65536: a watch needs one each (systemd: LimitNOFILE={65536})"
        yield Finding("open files", State.WARN, f"at most {files}", remedy)
    else:
        yield Finding("open files", State.OK, f"at most {files}")


def check_gpus(settings: Settings) -> Iterator[Finding]:
    """Checks GPUs, their driver and PyTorch, where trainings run."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("GPU", State.OK, "no PyTorch here: trainings run elsewhere")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS)
        gpus = done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    found = f"PyTorch {torch}; " + ("; ".join(gpus) or "no GPU")
    if settings.executor == "local" and len(gpus) < settings.num_gpu_slots:
        remedy = "lower DETFLOW_NUM_GPU_SLOTS; in a container give it the GPUs"
        yield Finding("GPU", State.FAIL, f"{found}; {settings.num_gpu_slots} are promised", remedy)
    else:
        yield Finding("GPU", State.OK, found)


async def check_postgres(settings: Settings) -> list[Finding]:
    """Checks version, distance and clock of Postgres."""
    if not settings.database_url:
        return []
    import asyncpg

    try:
        conn = await asyncpg.connect(settings.database_url, timeout=_SECONDS)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        remedy = "check DETFLOW_DATABASE_URL: host, role, password, database"
        return [Finding("postgres", State.FAIL, str(error) or "no answer", remedy)]
    try:
        number = int(await conn.fetchval("show server_version_num"))
        name = await conn.fetchval("show server_version")
        seconds, skew = [], []
        for _ in range(5):
            begin, clock = time.perf_counter(), time.time()
            there = float(await conn.fetchval("select extract(epoch from clock_timestamp())"))
            seconds.append(time.perf_counter() - begin)
            skew.append(there - clock - seconds[-1] / 2)
        used = int(await conn.fetchval("select count(*) from pg_stat_activity"))
        most = int(await conn.fetchval("show max_connections"))
    finally:
        await conn.close()
    found = f"{name}, {min(seconds) * 1000:.1f} ms away, {used} of {most} connections"
    if number < _MIN_POSTGRES:
        first = Finding("postgres", State.FAIL, found, "version 15 or later is needed")
    elif min(seconds) > _MAX_LATENCY_SECONDS:
        first = Finding("postgres", State.WARN, found, "bring it nearer: every call asks it")
    elif used > 0.8 * most:
        first = Finding("postgres", State.WARN, found, "raise max_connections: 12 per process")
    else:
        first = Finding("postgres", State.OK, found)
    off = min(skew, key=abs)
    state = State.OK if abs(off) < _MAX_SKEW_SECONDS else State.WARN
    remedy = "" if state is State.OK else "synchronize the clocks of both machines (NTP)"
    return [first, Finding("clock", state, f"{off:+.2f} s from that of Postgres", remedy)]


async def check_nats(settings: Settings) -> list[Finding]:
    """Checks that NATS has JetStream, room, and the streams."""
    if not settings.nats_url:
        return []
    import nats.js.errors

    from detflow.events import DEAD_STREAM, EVENTS_STREAM, RECORDS_STREAM, Bus, translate

    bus = await Bus.connect(settings.nats_url, "doctor")
    try:
        with translate():
            account = await bus.js.account_info()
            there = {str(one.config.name): one.state for one in await bus.js.streams_info()}
    except nats.js.errors.Error:
        remedy = "start nats-server with JetStream (jetstream { store_dir: ... })"
        return [Finding("nats", State.FAIL, "it has no JetStream", remedy)]
    finally:
        await bus.close()
    limit = account.limits.max_storage
    used = account.storage
    found = f"JetStream holds {used / (1 << 20):.0f} MiB" + (
        f" of {limit / (1 << 20):.0f}" if limit > 0 else ""
    )
    missing = [one for one in (EVENTS_STREAM, RECORDS_STREAM, DEAD_STREAM) if one not in there]
    if limit > 0 and used > 0.8 * limit:
        return [Finding("nats", State.WARN, found, "give JetStream more room (max_file_store)")]
    if missing:
        remedy = "services make them when they start"
        return [Finding("nats", State.WARN, f"{found}; no stream {', '.join(missing)}", remedy)]
    if dead := there[DEAD_STREAM].messages:
        found += f"; {dead} events were put aside"
        remedy = f"look at the stream {DEAD_STREAM} and at the logs of that time"
        return [Finding("nats", State.WARN, found, remedy)]
    return [Finding("nats", State.OK, found)]


async def check_store(settings: Settings) -> list[Finding]:
    """Writes, reads and deletes an object."""
    if not settings.store_url:
        return []
    from detflow.store import ObjectStore

    def use() -> float:
        begin = time.perf_counter()
        store = ObjectStore(settings.store_url)
        stored = store.put(f"doctor/{uuid.uuid4()}", b"written by detflow doctor")
        try:
            store.get(stored)
        finally:
            store.delete(stored.key)
        return time.perf_counter() - begin

    try:
        seconds = await asyncio.to_thread(use)
    except (OSError, ValueError) as error:
        remedy = "check DETFLOW_STORE_URL, its permissions and its disk"
        return [Finding("object store", State.FAIL, str(error), remedy)]
    found = f"an object was written, read and deleted in {seconds * 1000:.0f} ms"
    return [Finding("object store", State.OK, found)]


async def check_processes(settings: Settings) -> list[Finding]:
    """Asks the services and the gateway how they are."""
    names = ("version", "preprocess", "trainer", "metrics")
    asked = (asyncio.to_thread(_check_service, name, settings) for name in names)
    return list(await asyncio.gather(*asked, asyncio.to_thread(_check_gateway, settings)))


def _check_service(name: str, settings: Settings) -> Finding:
    address = getattr(settings, f"{name}_address")
    try:
        ask_service(address, settings)
    except DetflowError as error:
        said = error.message.splitlines()[0]
        remedy = f"start it, or set DETFLOW_{name.upper()}_ADDRESS; its log says more"
        return Finding(name, State.FAIL, said, remedy)
    return Finding(name, State.OK, f"serves at {address}")


def _check_gateway(settings: Settings) -> Finding:
    host, _, port = settings.http_listen.rpartition(":")
    host = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host
    scheme = "https" if settings.tls_cert_file else "http"
    try:
        ask_gateway(f"{scheme}://{host}:{port}/healthz", settings)
    except DetflowError as error:
        # It need not be on this machine.
        return Finding("gateway", State.WARN, error.message, "if it is here: is it running?")
    return Finding("gateway", State.OK, f"answers at {host}:{port}")
