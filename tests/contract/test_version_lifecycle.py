"""Labels, lineage, filters and the trash of versions, through the real process wiring."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from detflow import channels
from detflow.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from detflow.v1 import dataset_pb2, version_pb2
from tests.contract.test_version_service import DATASET, PARENT, Stack, refused, stack

__all__ = ["stack"]

_Version = version_pb2.Version


async def update(stack: Stack, version: _Version, *paths: str) -> _Version:
    with channels.translate():
        return await stack.versions.UpdateVersion(
            version_pb2.UpdateVersionRequest(version=version, update_mask=FieldMask(paths=paths))
        )


async def test_labels_are_kept_changed_one_by_one_and_together(stack: Stack) -> None:
    made = await stack.create(version=_Version(labels={"site": "hall-2", "note": "한글 🦊"}))
    assert dict(made.labels) == {"site": "hall-2", "note": "한글 🦊"}

    def labelled(**labels: str) -> _Version:
        return _Version(name=made.name, labels=labels)

    async def after(labels: _Version, *paths: str) -> dict[str, str]:
        return dict((await update(stack, labels, *paths)).labels)

    assert await after(labelled(site="hall-3"), "labels.site") == {
        "site": "hall-3",
        "note": "한글 🦊",
    }
    assert await after(labelled(other="x"), "labels.note") == {"site": "hall-3"}  # removed
    assert await after(labelled(a="1"), "labels.a", "labels.gone") == {"site": "hall-3", "a": "1"}
    assert await after(labelled(b="2")) == {"b": "2"}  # an empty mask means what is set
    assert await after(labelled(), "labels") == {}
    assert (await stack.get(made.name)).display_name == "V_0"
    both = _Version(name=made.name, display_name="new", labels={"c": "3"})
    changed = await update(stack, both, "display_name", "labels.c")
    assert (changed.display_name, dict(changed.labels)) == ("new", {"c": "3"})
    assert await update(stack, both, "*") == changed  # nothing to change


async def test_bad_labels_are_refused(stack: Stack) -> None:
    many = {f"k{number}": "" for number in range(64)}
    made = await stack.create(version=_Version(labels=many))
    one_more = _Version(name=made.name, labels={"more": ""})
    for call, reason, field in (
        (
            stack.create(version=_Version(labels=many | {"a": ""})),
            "INVALID_FIELD",
            "version.labels",
        ),
        (stack.create(version=_Version(labels={"A": ""})), "INVALID_FIELD", "version.labels"),
        (stack.create(version=_Version(labels={"a": "b" * 64})), "INVALID_FIELD", "version.labels"),
        (stack.create(version=_Version(labels={"a": "b\nc"})), "BAD_LABEL", "version.labels.a"),
        (update(stack, one_more, "labels.more"), "TOO_MANY_LABELS", "version.labels"),
        (update(stack, one_more, "labels.Bad"), "BAD_FIELD_MASK", "update_mask.labels.Bad"),
    ):
        error = await refused(call, InvalidArgument, reason)
        assert any(violation.field.startswith(field) for violation in error.violations), field
    assert await stack.get(made.name) == made


async def test_version_after_another_takes_over_what_is_not_given(stack: Stack) -> None:
    stack.datasets.by_name[DATASET].content_sha256 = "ab" * 32
    recipe = version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=60, val=20, test=20), grayscale=True, seed=5
    )
    parent = await stack.create(version=_Version(recipe=recipe, labels={"a": "b"}))
    assert (parent.dataset_sha256, parent.parent_version) == ("ab" * 32, "")

    async def create(request_id: str = "", **fields: Any) -> _Version:
        wanted = _Version(**({"parent_version": parent.name} | fields))
        with channels.translate():
            return await stack.versions.CreateVersion(
                version_pb2.CreateVersionRequest(
                    parent=PARENT, version=wanted, request_id=request_id
                )
            )

    child = await create(request_id="r1")
    assert (child.dataset, child.recipe) == (parent.dataset, parent.recipe)
    assert (child.parent_version, dict(child.labels)) == (parent.name, {})
    other = f"{PARENT}/datasets/d7"
    stack.datasets.put(other, dataset_pb2.Dataset.READY)
    assert (await create(dataset=other)).recipe == parent.recipe
    plain = await create(recipe=version_pb2.Recipe())
    assert (plain.dataset, plain.recipe.split.train) == (parent.dataset, 70)
    await refused(
        create("r1", recipe=parent.recipe), InvalidArgument, "REQUEST_ID_REUSED", "request_id"
    )
    await stack.delete(parent.name)
    assert await create(request_id="r1") == child
    await refused(create(), FailedPrecondition, "VERSION_DELETED")
    for name in (f"{PARENT}/versions/none", parent.name.replace(PARENT, "projects/other")):
        await refused(create(parent_version=name), NotFound, "NOT_FOUND")


async def test_list_is_filtered_sorted_and_paged_by_its_own_tokens(stack: Stack) -> None:
    for number in range(5):
        await stack.create(f"n{number}", version=_Version(labels={"even": str(number % 2 == 0)}))
    query = {"filter": 'labels.even = "True" AND display_name != n0', "order_by": "display_name"}
    first = await stack.list(page_size=1, **query)
    second = await stack.list(page_size=1, page_token=first.next_page_token, **query)
    assert [v.display_name for v in (*first.versions, *second.versions)] == ["n2", "n4"]
    assert second.next_page_token == ""
    for other in ({"filter": query["filter"]}, {"order_by": query["order_by"]}, {}):
        await refused(
            stack.list(page_token=first.next_page_token, **other),
            InvalidArgument,
            "BAD_PAGE_TOKEN",
            "page_token",
        )
    error = await refused(
        stack.list(filter="state = DONE"), InvalidArgument, "BAD_FILTER", "filter"
    )
    assert "position 9" in error.message and "COMPLETED" in error.message
    await refused(stack.list(order_by="seed"), InvalidArgument, "BAD_ORDER", "order_by")


async def test_name_goes_to_one_of_many_that_ask_for_it_at_once(stack: Stack) -> None:
    versions = [await stack.create() for _ in range(4)]
    outcomes = await asyncio.gather(
        *(stack.rename(version.name, "best") for version in versions),
        stack.create("best"),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, _Version) for outcome in outcomes) == 1
    refusals = [o for o in outcomes if isinstance(o, AlreadyExists)]
    assert {refusal.reason for refusal in refusals} == {"DUPLICATE_NAME"} and len(refusals) == 4


async def test_deleted_version_says_when_it_will_be_purged(stack: Stack) -> None:
    deleted = await stack.delete((await stack.create()).name)
    kept = deleted.purge_time.ToDatetime() - deleted.delete_time.ToDatetime()
    assert kept == timedelta(days=30)
    assert not (await stack.undelete(deleted.name)).HasField("purge_time")


@pytest.mark.parametrize("days", ["-1", "nan", "1e9"])
def test_trash_days_that_are_none_are_refused(days: str) -> None:
    from services.version.__main__ import trash_time

    with pytest.raises(InvalidArgument, match="DETFLOW_TRASH_DAYS"):
        trash_time(float(days))
