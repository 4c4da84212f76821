"""Which objects the rows point to, by a query that each service has beside its migrations."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detflow.backup.objects import Copied
from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """An object that a row points to.

    Attributes:
        key: In the object store.
        size_bytes: Its size, if the row says so.
        sha256: Its SHA-256, if the row says so.
    """

    key: str
    size_bytes: int | None
    sha256: str | None


async def read(conn: Connection, schemas: Sequence[str]) -> AsyncIterator[Reference]:
    """Reads what the rows of the services point to; in the caller's transaction."""
    for schema in schemas:
        found = importlib.util.find_spec(f"services.{schema}")
        if found is None or found.origin is None:
            continue  # a backup can be made where the services are not installed
        query = await asyncio.to_thread((Path(found.origin).parent / "objects.sql").read_text)
        await conn.execute(f'set local search_path = "{schema}"')
        async for row in conn.cursor(query, prefetch=1000):
            if row["stored"] is None:
                yield Reference(**{name: row[name] for name in ("key", "size_bytes", "sha256")})
            else:
                obj = StoredObject.FromString(row["stored"])
                yield Reference(key=obj.key, size_bytes=obj.size_bytes, sha256=obj.sha256)


def missing(pointed: Iterable[Reference], copied: Mapping[str, Copied]) -> list[str]:
    """Returns the keys of what rows point to and is not there as they say."""
    return sorted(
        {
            one.key
            for one in pointed
            if (there := copied.get(one.key)) is None
            or (one.size_bytes is not None and one.size_bytes != there.size_bytes)
            or (one.sha256 is not None and one.sha256 != there.sha256)
        }
    )
