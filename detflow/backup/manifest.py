"""What a backup says of itself; a backup is one from the moment that this is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import orjson

from detflow.errors import DataLoss, FailedPrecondition
from detflow.v1.common_pb2 import StoredObject

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file of a backup, with what it must be."""

    key: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, stored: StoredObject) -> Self:
        """Takes over what the object store said."""
        return cls(key=stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256)

    @property
    def stored(self) -> StoredObject:
        """The same, as the object store takes it."""
        return StoredObject(key=self.key, size_bytes=self.size_bytes, sha256=self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of a table, as Postgres' COPY writes them, gzipped.

    Attributes:
        name: Its name.
        columns: Which columns the rows have, in their order.
        num_rows: How many rows.
        file: Where they are.
    """

    name: str
    columns: Sequence[str]
    num_rows: int
    file: File


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """What a service has in the database.

    Attributes:
        name: Schema, and name of the service.
        migrations: The migrations that made its tables.
        tables: Its tables; what a foreign key points to comes first.
        sequences: Last value of each sequence that was used.
    """

    name: str
    migrations: Sequence[str]
    tables: Sequence[Table]
    sequences: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A backup.

    Attributes:
        id: Name of its folder; sorts by age.
        create_time: When the database was read, RFC 3339.
        release: Release of detflow that made it.
        schemas: The database.
        objects: The list of all objects: see `objects.py`.
        num_objects: How many there are.
        num_bytes: Their sizes together.
        lost: Keys of objects that rows point to and that were gone or damaged already, at most
            100.
        num_lost: How many of those there were.
        format: Of the backup.
    """

    id: str
    create_time: str
    release: str
    schemas: Sequence[Schema]
    objects: File
    num_objects: int
    num_bytes: int
    lost: Sequence[str] = ()
    num_lost: int = 0
    format: int = FORMAT

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(table.num_rows for schema in self.schemas for table in schema.tables)

    def to_json(self) -> bytes:
        """Renders it as JSON."""
        return orjson.dumps(dataclasses.asdict(self), option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, data: bytes, key: str) -> Self:
        """Reads it.

        Raises:
            DataLoss: It is damaged.
            FailedPrecondition: A newer release made it.
        """
        try:
            values: dict[str, Any] = orjson.loads(data)
            if values["format"] > FORMAT:
                raise FailedPrecondition(
                    f"{key} was made by detflow {values['release']}, in a form that is newer than"
                    " this detflow: restore it with that release",
                    reason="NEWER_BACKUP",
                )
            values["schemas"] = [
                Schema(**{**schema, "tables": [_table(table) for table in schema["tables"]]})
                for schema in values["schemas"]
            ]
            values["objects"] = File(**values["objects"])
            return cls(**values)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise DataLoss(
                f"{key} is damaged: take another backup", reason="DAMAGED_BACKUP"
            ) from error


def _table(values: dict[str, Any]) -> Table:
    return Table(**{**values, "file": File(**values["file"])})
