"""Random calls, by a fixed seed, at a whole running stack; `make fuzz` sends many more."""

import pytest

from tests.fuzz import fuzzing, world
from tests.fuzz.__main__ import conformance, show
from tests.fuzz.world import World
from tests.stack_rig import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_CASES = 1500
SEED = 20
# Each looks into a file with torch, which takes seconds to be imported.
SLOW = ("--exclude-operation-id", "UploadWeights")


@pytest.fixture(scope="module")
def filled(stack: Stack) -> World:
    """The stack with something in it."""
    return world.make(stack)


async def test_random_calls_are_refused_for_what_is_wrong_with_them(filled: World) -> None:
    report = await fuzzing.run(filled, SEED, range(NUM_CASES))
    assert show(report, SEED) == 0
    assert report.counts.total() == NUM_CASES
    codes = {what.rpartition(" ")[2] for what in report.counts}
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "200", "400", "404"} <= codes


def test_http_answers_as_its_document_says(filled: World) -> None:
    assert conformance(filled, SEED, "--phases", "fuzzing", "-n", "3", *SLOW) == 0


def test_no_secret_is_in_the_logs_of_all_these_calls(filled: World) -> None:
    folder = filled.stack.data_dir
    secrets = {file.name: file.read_text().strip() for file in (folder / "access").iterdir()}
    urls = {
        url
        for process in fuzzing.processes(filled).values()
        for name, url in process.environ().items()
        if name in ("DETFLOW_DATABASE_URL", "DETFLOW_NATS_URL")
    }
    secrets |= {url: url.split("@")[0].rpartition("/")[2].rpartition(":")[2] for url in urls}
    assert filled.token in secrets.values() and len(secrets) >= 6
    logs = {file.name: file.read_text() for file in (folder / "logs").glob("*.log")}
    assert len(logs) >= 7 and "CreateVersion" in "".join(logs.values())
    for secret in secrets.values():
        assert len(secret) >= 8
        assert [name for name, text in logs.items() if secret in text] == []
