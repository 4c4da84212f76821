"""That the services answer on tables that were filled for the measurement."""

import pytest

from tests.scale.__main__ import run


@pytest.mark.slow
async def test_services_answer_on_filled_tables() -> None:
    found = await run([1000], num_calls=1)
    assert len(found[1000]) == 17
