"""All invariants of a system at rest, against what its users were promised."""

import asyncio
from functools import partial
from pathlib import Path

import asyncpg
import psutil

from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1 import dataset_pb2, metrics_pb2, trainer_pb2, training_pb2, version_pb2
from tests.chaos import invariants
from tests.chaos.system import System
from tests.chaos.users import AT_REST, Users
from tests.deployment_rig import eventually

State = training_pb2.Training.State
_CHILDREN = ("tests.chaos.player", "services.metrics.measure")
_SECONDS = 30.0


async def check_all(system: System, users: Users) -> None:
    """Checks I1 to I8; the users are at rest, and nothing is planned to fail.

    Raises:
        AssertionError: It says which resource breaks which invariant.
    """
    promised = users.promised
    await _everybody_was_told(system, users)
    await check_acknowledged(system, users)
    bus = await Bus.connect(system.nats_url, "chaos")
    try:
        await invariants.until_published(system.urls)
        events = await invariants.read_events(bus)
    finally:
        await bus.close()
    invariants.check_histories(events)  # I2
    invariants.check_attempts(events)  # I3
    await invariants.check_outboxes(system.urls, events)  # I4
    await check_stored(system, users)  # I5
    await check_nothing_left(system)  # I6
    await check_leases(system)  # I7
    await asyncio.to_thread(check_no_crash, system)
    for training in promised.trainings.values():
        await check_series(system, users, training)  # I8


async def check_acknowledged(system: System, users: Users) -> None:
    """I1: what was promised is there, as it was promised."""
    for name, display_name in users.promised.versions.items():
        if name in users.promised.deleted:
            continue
        version = await users.call(
            partial(system.versions.GetVersion, version_pb2.GetVersionRequest(name=name))
        )
        assert version.display_name == display_name
    for name, sha256 in users.promised.uploads.items():
        upload = await users.call(
            partial(system.datasets.GetUpload, dataset_pb2.GetUploadRequest(name=name))
        )
        assert (upload.state, upload.sha256) == (dataset_pb2.Upload.RECEIVED, sha256), upload
    for name, known in users.promised.trainings.items():
        training = await users.call(
            partial(system.trainer.GetTraining, trainer_pb2.GetTrainingRequest(name=name))
        )
        if known.state in (State.SUCCEEDED, State.STOPPED):  # I2: they never change
            assert training.state == known.state, training
        users.promised.trainings[name] = training


async def check_stored(system: System, users: Users) -> None:
    """I5: what is pointed to is there, with its size and hash."""
    store = ObjectStore((system.data_dir / "store").as_uri())
    listed = await users.call(
        lambda: system.versions.ListVersions(
            version_pb2.ListVersionsRequest(parent="projects/default", page_size=1000)
        )
    )
    manifests = [version.manifest for version in listed.versions if version.HasField("manifest")]
    trainings = users.promised.trainings.values()
    weights = [t.weights for t in trainings if t.state == State.SUCCEEDED]
    exported = [export.object for export in users.promised.exports]
    await asyncio.to_thread(invariants.check_objects, store, manifests, [*weights, *exported])


async def check_nothing_left(system: System) -> None:
    """I6: no worker, no measuring child, no work folder and no partial file."""

    async def left() -> list[str]:
        return [*_processes_left(system), *_files_left(system.data_dir / "work")]

    await eventually(left, lambda found: not found, _SECONDS)


def _processes_left(system: System) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        told = " ".join(process.info["cmdline"] or [])
        if any(name in told for name in _CHILDREN) and str(system.data_dir) in (
            told + str(process.info["cwd"])
        ):
            found.append(told)
    return found


def _files_left(work: Path) -> list[str]:
    found = [str(path) for path in work.rglob("*.part")]
    for name in ("trainings", "jobs"):
        for folder in work.glob(f"*/{name}"):
            found += [str(path) for path in folder.rglob("*") if path.is_file()]
    return found


def check_no_crash(system: System) -> None:
    """What is killed goes on afterwards, and nothing else ends: no task fails, no event does."""
    for path in (system.data_dir / "logs").glob("*.log"):
        for line in path.read_text(errors="replace").splitlines():
            is_caller_gone = "ExecuteBatchError" in line  # it was killed before its first answer
            assert '"level": "error"' not in line or is_caller_gone, line


async def check_leases(system: System) -> None:
    """I7: whatever is carried out has an owner whose lease has not run out."""
    conn = await asyncpg.connect(system.urls["trainer"], server_settings={"search_path": "trainer"})
    try:
        rows = await conn.fetch(
            "select id, state, lease_expire_time from training"
            " where state in ('PROVISIONING', 'RUNNING', 'EVALUATING')"
            " and (owner is null or lease_expire_time < now())"
        )
    finally:
        await conn.close()
    assert not rows, rows


async def check_series(system: System, users: Users, training: training_pb2.Training) -> None:
    """I8: every epoch and every step that was done is there once."""
    assert training.state in AT_REST, training
    if not training.num_epochs_done:
        return
    request = metrics_pb2.ListMetricSeriesRequest(training=training.name)
    expected = list(range(1, training.num_epochs_done + 1))

    async def series() -> metrics_pb2.ListMetricSeriesResponse:
        found: metrics_pb2.ListMetricSeriesResponse = await users.call(
            lambda: system.metrics.ListMetricSeries(request)
        )
        return found

    found = await series()
    assert found.series, training.name
    for one in found.series:
        assert list(one.epochs) == expected, (training.name, one.name, list(one.epochs))


async def _everybody_was_told(system: System, users: Users) -> None:
    """Watches bring every change once, in order, whatever was killed in between."""
    revisions = {}
    for name in users.promised.versions:
        if name in users.promised.deleted:
            continue
        version = await users.call(
            partial(system.versions.GetVersion, version_pb2.GetVersionRequest(name=name))
        )
        revisions[name] = version.revision
    for how, seen in users.promised.revisions.items():

        async def late(seen: dict[str, list[int]] = seen) -> list[str]:
            return [n for n, revision in revisions.items() if seen.get(n, [0])[-1] < revision]

        await eventually(late, lambda found: not found, _SECONDS)
        for name, told in seen.items():
            first = told[0]
            assert told == list(range(first, first + len(told))), (how, name, told)
