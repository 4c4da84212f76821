"""What `detflow report`, `chart` and `table` refuse before they ask for anything."""

import pytest

from tests.cli_rig import Rig, rig

__all__ = ["rig"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("report", "V_0", "--format", "pdf"), "--format must be one of html, zip"),
        (("report", "V_0", "--language", "fr"), "--language must be one of en, ko"),
        (("report", "V_0", "V_1", "--split", "train"), "--split must be one of val, test"),
        (("report", "V_0", "-o", "none/report.html"), "there is no folder none"),
        (("chart", "V_0", "pie"), "CHART must be one of losses, quality, learning-rate"),
        (("table", "V_0", "all"), "TABLE must be one of epochs, steps, evaluations"),
        (("table", "V_0", "errors", "--threshold", "2"), "--threshold"),
    ],
)
def test_bad_usage_is_refused_with_what_there_is(
    rig: Rig, arguments: tuple[str, ...], remedy: str
) -> None:
    done = rig.run(*arguments)
    assert done.code == 2
    assert remedy in done.err
    assert f" {arguments[0]} --help" in done.err
