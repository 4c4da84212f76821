"""Bad archives through the running service: refused with code, reason and place, without harm."""

import pytest
from google.rpc import code_pb2

from tests.bad_archives import Case, all_cases
from tests.preprocess_rig import DatasetState, Rig, reasons
from tests.preprocess_rig import rig as rig  # the fixture
from tests.preprocess_samples import pack, yolo_files

WARNINGS = {"BOX_CLIPPED", "NOT_LISTED"}


def refused(case: Case) -> bool:
    """Whether a case is refused: some are answered by a warning, and no bytes are no upload."""
    only_warned = "a list of" in case.name or WARNINGS & {reason for _, reason in case.problems}
    return bool(case.data and case.problems and not only_warned)


CASES = [case for case in all_cases() if refused(case)][::40]  # so that each group is there
LIMITS = {"ARCHIVE_LIMIT", "IMAGE_TOO_LARGE"}


@pytest.mark.filterwarnings("ignore::UserWarning")
async def test_bad_archives_are_refused_and_what_was_there_stays(rig: Rig) -> None:
    good = await rig.import_archive(pack(yolo_files(3)), "good")
    assert len(CASES) >= 12
    for number, case in enumerate(CASES):
        failed = await rig.import_archive(case.data, f"bad {number}")
        assert failed.state == DatasetState.FAILED, case.name
        assert reasons(failed.failure) == case.problems[:100], case.name
        expected = code_pb2.INVALID_ARGUMENT
        if case.problems[0][1] in LIMITS:
            expected = code_pb2.RESOURCE_EXHAUSTED
        assert failed.failure.status.code == expected, case.name
    again = await rig.import_archive(pack(yolo_files(3)), "good again")
    assert (again.state, again.content_sha256) == (DatasetState.READY, good.content_sha256)
