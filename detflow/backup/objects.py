"""The objects of a backup: copied once, listed by every backup that has them.

The list is a file of JSON lines, gzipped: key in the object store, path in the backup's folder,
size, SHA-256, and the mark by which the store tells that an object was not replaced since.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import orjson
from obstore.exceptions import BaseError, NotFoundError

from detflow.backup.manifest import File
from detflow.backup.progress import Step
from detflow.errors import DataLoss, FailedPrecondition, Unavailable
from detflow.store import ObjectStore, open_url
from detflow.tasks import cancel_all

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Store

_CHUNK_BYTES = 1 << 20
_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """An object in a backup.

    Attributes:
        key: In the object store.
        path: In the folder of the backups.
        size_bytes: Its size.
        sha256: Its content's SHA-256.
        mark: Of the object store; another one means another content.
    """

    key: str
    path: str
    size_bytes: int
    sha256: str
    mark: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """An object in the store, as a listing tells."""

    size_bytes: int
    mark: str


async def list_objects(url: str) -> dict[str, Listed]:
    """Lists the objects of a store."""
    found = {}
    with answering(url):
        async for batch in obstore.list(open_url(url)):
            for meta in batch:
                mark = f"{meta['e_tag']} {meta['last_modified'].isoformat()}"
                found[str(meta["path"])] = Listed(size_bytes=meta["size"], mark=mark)
    return found


async def back_up(
    source_url: str,
    target_url: str,
    prefix: str,
    wanted: Mapping[str, Listed],
    before: Mapping[str, Copied],
    step: Step,
) -> list[Copied]:
    """Copies the objects that no earlier backup has.

    Args:
        source_url: Object store.
        target_url: Where the backups are.
        prefix: What the paths of new copies begin with.
        wanted: What is to be in the backup.
        before: Copies of earlier backups, by key.
        step: Advanced by the bytes.

    Returns:
        The objects of the backup by key; without those that were deleted meanwhile.
    """
    source, target = open_url(source_url), open_url(target_url)
    done: dict[str, Copied] = {}

    async def copy(key: str) -> None:
        listed, known = wanted[key], before.get(key)
        if known and (known.size_bytes, known.mark) == (listed.size_bytes, listed.mark):
            done[key] = known
        else:
            path = f"{prefix}/{key}"
            try:
                size_bytes, sha256 = await _copy(source, key, target, path)
            except (FileNotFoundError, NotFoundError):
                return
            done[key] = Copied(
                key=key, path=path, size_bytes=size_bytes, sha256=sha256, mark=listed.mark
            )
        step.advance(listed.size_bytes)

    with answering(source_url, target_url):
        await _each(wanted, copy)
    return [done[key] for key in sorted(done)]


async def check_target(url: str, wanted: Mapping[str, Copied]) -> set[str]:
    """Checks that an object store is empty, or has what a broken-off restoration put there.

    Returns:
        The keys that are there already.

    Raises:
        FailedPrecondition: NOT_EMPTY: it has an object that the backup has not.
    """
    await asyncio.to_thread(ObjectStore, url)  # which makes a folder that is not there
    there = await list_objects(url)
    for key, listed in there.items():
        if key not in wanted or wanted[key].size_bytes != listed.size_bytes:
            raise FailedPrecondition(
                f"the object store {url} has {key}, which is not of this backup: restore into an"
                " empty one",
                reason="NOT_EMPTY",
            )
    return set(there)


async def restore(
    source_url: str,
    target_url: str,
    wanted: Mapping[str, Copied],
    there: set[str],
    step: Step,
) -> None:
    """Copies a backup's objects into a store; what is there already is compared.

    Raises:
        DataLoss: A copy is gone or damaged; the object does not appear in the store.
    """
    source, target = open_url(source_url), open_url(target_url)

    async def copy(key: str) -> None:
        one = wanted[key]
        expected = (one.size_bytes, one.sha256)
        if key not in there or await _hash(target, key) != expected:
            try:
                await _copy(source, one.path, target, key, expected)
            except (FileNotFoundError, NotFoundError) as error:
                raise _damaged(one.path) from error
        step.advance(one.size_bytes)

    with answering(source_url, target_url):
        await _each(wanted, copy)


async def verify(url: str, wanted: Mapping[str, Copied], step: Step) -> list[str]:
    """Reads every copy; returns the paths of those that are gone or damaged."""
    source = open_url(url)
    bad = []

    async def check(key: str) -> None:
        one = wanted[key]
        try:
            if await _hash(source, one.path) != (one.size_bytes, one.sha256):
                bad.append(one.path)
        except (FileNotFoundError, NotFoundError):
            bad.append(one.path)
        step.advance(one.size_bytes)

    with answering(url):
        await _each(wanted, check)
    return sorted(bad)


def write_list(target: ObjectStore, key: str, copied: list[Copied]) -> File:
    """Stores the list of a backup's objects."""
    with tempfile.TemporaryDirectory(prefix="detflow-backup-") as folder:
        path = Path(folder) / "objects.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            for one in copied:
                file.write(orjson.dumps(dataclasses.asdict(one)) + b"\n")
        return File.of(target.put(key, path))


def read_list(source: ObjectStore, file: File) -> dict[str, Copied]:
    """Reads the list of a backup's objects, by key.

    Raises:
        DataLoss: It is gone or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="detflow-backup-") as folder:
        path = Path(folder) / "objects.gz"
        source.download(file.stored, path)
        with gzip.open(path, "rb") as lines:
            found = (Copied(**orjson.loads(line)) for line in lines)
            return {one.key: one for one in found}


async def _each(keys: Mapping[str, object], work: Callable[[str], Awaitable[None]]) -> None:
    """Works on all keys, several at once; the first error ends all."""
    waiting = iter(sorted(keys))

    async def take() -> None:
        for key in waiting:
            await work(key)

    tasks = [asyncio.create_task(take()) for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)


async def _copy(
    source: Store, key: str, target: Store, path: str, expected: tuple[int, str] | None = None
) -> tuple[int, str]:
    """Copies an object; returns its size and SHA-256.

    Raises:
        DataLoss: Those are not the expected ones; no copy appears.
    """
    digest, size_bytes = hashlib.sha256(), 0
    content = await obstore.get_async(source, key)

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal size_bytes
        async for chunk in content.stream(min_chunk_size=_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            yield bytes(chunk)
        # Here, for what ends with an error is not stored.
        if expected is not None and (size_bytes, digest.hexdigest()) != expected:
            raise _damaged(key)

    await obstore.put_async(target, path, chunks())
    return size_bytes, digest.hexdigest()


async def _hash(store: Store, key: str) -> tuple[int, str]:
    """Reads an object; returns its size and SHA-256."""
    digest, size_bytes = hashlib.sha256(), 0
    async for chunk in (await obstore.get_async(store, key)).stream(min_chunk_size=_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _damaged(path: str) -> DataLoss:
    return DataLoss(
        f"{path} of the backup is gone or damaged: restore another backup",
        reason="DAMAGED_BACKUP",
        metadata={"key": path},
    )


@contextlib.contextmanager
def answering(*urls: str) -> Iterator[None]:
    """Says of a store that does not answer which one that may be."""
    try:
        yield
    except (FileNotFoundError, NotFoundError):
        raise
    except BaseError as error:
        raise Unavailable(
            f"{' or '.join(urls)} does not answer: {(str(error).splitlines() or [''])[0][:300]};"
            " check it, its address and its credentials",
            reason="STORE_UNAVAILABLE",
        ) from error
