"""Checkers of the invariants of a deployment, from its databases, event stream and object store."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import asyncpg
import orjson
import psutil

from detflow.events import EVENTS_STREAM, Bus, delivered, fetch, subscribe_from
from detflow.store import ObjectStore
from detflow.v1 import events_pb2, training_pb2, version_pb2
from detflow.v1.common_pb2 import StoredObject

V, T = version_pb2.Version, training_pb2.Training
_VERSION_LIVE = {V.QUEUED, V.PROVISIONING, V.TRAINING, V.EVALUATING}
VERSION_GRAPH = {
    V.PREPROCESSING: {V.READY, V.FAILED},
    V.READY: {V.QUEUED},
    V.QUEUED: {V.PROVISIONING, V.FAILED, V.STOPPED, V.PAUSED},
    V.PROVISIONING: {V.TRAINING, V.QUEUED, V.FAILED, V.STOPPED, V.PAUSED},
    V.TRAINING: {V.EVALUATING, V.QUEUED, V.FAILED, V.STOPPED, V.PAUSED},
    V.EVALUATING: {V.COMPLETED, V.QUEUED, V.FAILED, V.STOPPED, V.PAUSED},
    V.FAILED: {V.QUEUED},
    V.STOPPED: {V.QUEUED},
    V.PAUSED: {V.QUEUED},
    V.COMPLETED: set(),
}
TRAINING_GRAPH = {
    T.QUEUED: {T.PROVISIONING, T.FAILED, T.STOPPED, T.PAUSED},
    T.PROVISIONING: {T.RUNNING, T.QUEUED, T.FAILED, T.STOPPED, T.PAUSED},
    T.RUNNING: {T.EVALUATING, T.QUEUED, T.FAILED, T.STOPPED, T.PAUSED},
    T.EVALUATING: {T.SUCCEEDED, T.QUEUED, T.FAILED, T.STOPPED, T.PAUSED},
    T.FAILED: {T.QUEUED},
    T.PAUSED: {T.QUEUED},
    T.STOPPED: set(),
    T.SUCCEEDED: set(),
}

Events = dict[str, list[tuple[int, str, events_pb2.Event]]]
"""Resource ("kind.id") -> its events as (seq, event id, event), in stream order."""


async def read_events(bus: Bus) -> Events:
    """Reads the whole event stream."""
    events: Events = defaultdict(list)
    if (await bus.js.stream_info(EVENTS_STREAM)).state.messages == 0:
        return events
    pending = -1
    async with subscribe_from(bus, EVENTS_STREAM, ["detflow.v1.>"], 1) as subscription:
        while pending != 0:
            for msg in await fetch(subscription):
                event = delivered(msg, events_pb2.Event.FromString)
                events[f"{event.kind}.{event.resource_id}"].append(
                    (event.seq, event.event_id, event.message)
                )
                pending = msg.metadata.num_pending
    return events


def check_histories(events: Events) -> None:
    """I2: every observed history is a path of the state graph, revisions have no hole."""
    for resource, history in events.items():
        states = []
        for _, _, event in history:
            for kind, graph in (("version", VERSION_GRAPH), ("training", TRAINING_GRAPH)):
                if event.WhichOneof("what") == kind and resource.startswith(kind):
                    found = getattr(event, kind)
                    states.append((found.revision, found.state, graph))
        for (before, source, graph), (after, target, _) in itertools.pairwise(states):
            # A stop asked for, a preflight and a priority are told without a change of state.
            same = after == before and target == source
            assert same or after == before + 1, f"{resource}: revision {before} -> {after}"
            assert target == source or target in graph[source], (
                f"{resource}: {source} -> {target} at revision {after}"
            )


def check_attempts(events: Events) -> None:
    """I3: once an attempt has begun, nothing of an earlier one is accepted."""
    for resource, history in events.items():
        current = 0
        for _, _, event in history:
            match event.WhichOneof("what"):
                case "training":
                    assert event.training.attempt >= current, resource
                    current = event.training.attempt
                case "epoch":
                    assert event.epoch.attempt == current, resource
                case "predictions":
                    assert event.predictions.attempt == current, resource


async def until_published(database_urls: Mapping[str, str]) -> None:
    """Waits until no outbox has an event that is not in the stream."""
    for service, url in database_urls.items():
        conn = await asyncpg.connect(url, server_settings={"search_path": service})
        try:
            async with asyncio.timeout(30):
                while await conn.fetchval(  # noqa: ASYNC110  # another process
                    "select count(*) from outbox where publish_time is null"
                ):
                    await asyncio.sleep(0.05)
        finally:
            await conn.close()


async def check_outboxes(database_urls: Mapping[str, str], events: Events) -> None:
    """I4: every event of every outbox is in the stream exactly once, in order."""
    for resource, history in events.items():
        assert [seq for seq, _, _ in history] == list(range(1, len(history) + 1)), resource
    published = {event_id for history in events.values() for _, event_id, _ in history}
    recorded = set[str]()
    for service, url in database_urls.items():
        conn = await asyncpg.connect(url, server_settings={"search_path": service})
        rows = await conn.fetch("select event_id, publish_time from outbox")
        dead = await conn.fetch("select * from inbox_failure where attempts >= 5")
        await conn.close()
        assert not dead, f"{service} has dead letters: {dead}"
        assert all(row["publish_time"] for row in rows), f"{service} has unpublished events"
        recorded |= {row["event_id"] for row in rows}
    assert recorded == published


def check_objects(
    store: ObjectStore, manifests: list[StoredObject], weights: list[StoredObject]
) -> None:
    """I5: what READY versions and SUCCEEDED trainings point to is there, with its hash."""
    for obj in weights:
        store.get(obj)
    for manifest in manifests:
        for split in orjson.loads(store.get(manifest))["splits"].values():
            for entry in [*split["shards"], split["ground_truth"]]:
                store.get(
                    StoredObject(
                        key=entry["key"], size_bytes=entry["size_bytes"], sha256=entry["sha256"]
                    )
                )


def check_no_leftovers(data_dir: Path) -> None:
    """I6: no process of the deployment and no temporary file is left."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        told = " ".join(process.info["cmdline"] or []) + str(process.info["environ"] or {})
        assert str(data_dir) not in told or process.pid == psutil.Process().pid, process
    parts = list((data_dir / "work").rglob("*.part"))
    assert not parts
    for name in ("uploads", "trainings"):
        left = [
            p
            for folder in (data_dir / "work").glob(f"*/{name}")
            for p in folder.rglob("*")
            if p.is_file()
        ]
        assert not left, left
