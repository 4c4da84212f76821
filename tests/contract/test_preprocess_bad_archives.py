"""Bad archives through the running service: refused with code, reason and place, without harm."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.rpc import code_pb2

from detflow.events import Bus
from services.preprocess.domain import LIMIT_REASONS
from tests.bad_archives import Case, all_cases
from tests.preprocess_import import LIMITS
from tests.preprocess_rig import DatasetState, Rig, reasons, running
from tests.preprocess_samples import pack, yolo_files

WARNINGS = {"BOX_CLIPPED", "NOT_LISTED"}


def refused(case: Case) -> bool:
    """Whether a case is refused: some are answered by a warning, and no bytes are no upload."""
    only_warned = "a list of" in case.name or WARNINGS & {reason for _, reason in case.problems}
    return bool(case.data and case.problems and not only_warned)


CASES = [case for case in all_cases() if refused(case)][::40]  # so that each group is there


@pytest.fixture
async def rig(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> AsyncIterator[Rig]:
    """A preprocess service with the limits that the corpus was made for."""
    url = await make_database_url("preprocess")
    async with running(url, nats_url, bus, tmp_path, limits=LIMITS) as rig:
        yield rig


@pytest.mark.filterwarnings("ignore::UserWarning")
async def test_bad_archives_are_refused_and_what_was_there_stays(rig: Rig) -> None:
    good = await rig.import_archive(pack(yolo_files(3)), "good")
    assert len(CASES) >= 12
    for number, case in enumerate(CASES):
        failed = await rig.import_archive(case.data, f"bad {number}")
        assert failed.state == DatasetState.FAILED, case.name
        assert reasons(failed.failure) == case.problems[:100], case.name
        expected = code_pb2.INVALID_ARGUMENT
        if case.problems[0][1] in LIMIT_REASONS:
            expected = code_pb2.RESOURCE_EXHAUSTED
        assert failed.failure.status.code == expected, case.name
    again = await rig.import_archive(pack(yolo_files(3)), "good again")
    assert (again.state, again.content_sha256) == (DatasetState.READY, good.content_sha256)
