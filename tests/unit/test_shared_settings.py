import re
import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("detflow", "services", "gateway")
# Between a process and its children, and in tests.
INTERNAL = {"DETFLOW_WORKER_SPEC", "DETFLOW_EVENTS", "DETFLOW_RECORDS", "DETFLOW_DEAD"}


def test_page_of_settings_is_up_to_date() -> None:
    """Otherwise run python tools/settings_page.py."""
    tool = runpy.run_path(str(REPOSITORY / "tools/settings_page.py"))
    page = (REPOSITORY / "docs/reference/settings.md").read_text()
    assert page == tool["page"]()


def test_every_variable_that_code_names_is_on_the_page() -> None:
    page = (REPOSITORY / "docs/reference/settings.md").read_text()
    named = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            if "v1" not in path.parts:
                named |= set(re.findall(r"\bDETFLOW_[A-Z][A-Z_]*[A-Z]\b", path.read_text()))
    missing = {name for name in named - INTERNAL if name not in page}
    # A secret may be in a file of this name, as the page says.
    assert not {name for name in missing if name.removesuffix("_FILE") not in page}
