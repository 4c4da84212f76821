"""The queue: whose turn it is, and at which place each training waits.

Higher priority goes first; of equal priority the project with the fewest attempts under way, then
the oldest. Those that wait for GPUs and those that wait for CPUs do not stand in one another's way.
One whose project has as many under way as its quota allows is passed over until one of them ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from detflow.postgres import Connection
from services.trainer.domain import Training
from services.trainer.executors import Device, Slots
from services.trainer.store import COLUMNS, announce

NUM_DEVICES = "(t.num_nodes * t.num_devices_per_node)"
WITH_UNDER_WAY = """
  left join (select project, count(*) as number from training where owner is not null
             group by project) as under_way on under_way.project = t.project
  left join project_quota quota on quota.project = t.project
"""
UNDER_WAY = "coalesce(under_way.number, 0)"
WITHIN_QUOTA = f"(quota.max_running is null or {UNDER_WAY} < quota.max_running)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Slots of one kind, and the trainings that they are for.

    Attributes:
        devices: Values of the hyper-parameter `device` that take such slots.
        num_nodes: Machines in all.
        num_slots: Slots in all.
        num_free: Slots that are free.
    """

    devices: tuple[str, ...]
    num_nodes: int
    num_slots: int
    num_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A training that waits.

    Attributes:
        project: Id of its project.
        attempt: Number of its last attempt; 0 before the first.
        position: Place in the queue, from 1.
        held: It waits for others of its project, because of the project's quota.
    """

    attempt: int
    position: int
    held: bool


def devices_on(device: Device, slots: Slots) -> tuple[str, ...]:
    """Returns the values of the hyper-parameter `device` that take slots of a kind."""
    auto = Device.CUDA if slots.num_gpu else Device.CPU
    return (device, "auto") if device is auto else (device,)


async def list_waiting(
    conn: Connection, slots: Slots, training_ids: Sequence[str] | None = None
) -> dict[str, Waiting]:
    """Reads the places in the queue, by training id.

    A place counts those before it that wait for the same kind of device. It says what would start
    in which order if nothing ended: a training that starts counts as under way for those of its
    project behind it. Those that would not, because of a quota, are behind all others.

    Args:
        conn: Connection.
        slots: What the executor has: decides what `auto` means.
        training_ids: Only these; the others are counted nevertheless.
    """
    rows: list[asyncpg.Record] = await conn.fetch(
        f"""
        select id, attempt, held, position from (
          select id, attempt, held, row_number() over (
            partition by on_gpu order by held, priority desc, under_way + nth, id) as position
          from (
            select t.id, t.attempt, t.priority, t.device = any($1) as on_gpu,
              {UNDER_WAY} as under_way, row_number() over (
                partition by t.project, t.device = any($1) order by t.priority desc, t.id) as nth,
              coalesce({UNDER_WAY} + limited.nth > quota.max_running, false) as held
            from training t {WITH_UNDER_WAY} left join (
              select l.id, row_number() over (
                partition by project order by l.priority desc, l.id) as nth
              from training l join project_quota using (project) where l.state = 'QUEUED'
            ) as limited on limited.id = t.id
            where t.state = 'QUEUED') as queued) as placed
        where $2::text[] is null or id = any($2)
        """,
        list(devices_on(Device.CUDA, slots)),
        training_ids,
    )
    return {
        row["id"]: Waiting(attempt=row["attempt"], position=row["position"], held=row["held"])
        for row in rows
    }


async def update_priority(conn: Connection, training_id: str, priority: int) -> Training | None:
    """Gives a training that waits another priority.

    The event tells watchers. State and revision stay, so projections skip it.
    """
    row = await conn.fetchrow(
        f"update training set priority = $2 where id = $1 and state = 'QUEUED' returning {COLUMNS}",
        training_id,
        priority,
    )
    return await announce(conn, row)
