import pytest

from detflow.errors import InvalidArgument
from detflow.names import check_display_name


@pytest.mark.parametrize("name", ["cells", "세포", "👩‍🔬", "❤️", "a b", "é"])
def test_names_in_any_script_are_taken_as_they_are(name: str) -> None:
    assert check_display_name(name, "dataset.display_name") == name


@pytest.mark.parametrize(
    "name", ["", " ", "\u3000", "\u200b", "\ufeff", "\U000e0001", "\u3164", "\u2800", "\ufe0f"]
)
def test_name_of_which_nothing_can_be_seen_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"dataset\.display_name: .*can be seen") as caught:
        check_display_name(name, "dataset.display_name")
    assert caught.value.reason == "BAD_NAME"
    assert caught.value.violations[0].field == "dataset.display_name"


@pytest.mark.parametrize("name", ["a\u2028b", "a\u2029"])
def test_name_of_several_lines_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="one line"):
        check_display_name(name, "display_name")


@pytest.mark.parametrize("name", ["x" * 64, "a\x1b[31m", "a\udcff", "\udcff"])
def test_name_that_is_too_long_or_no_text_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"name: must (have|be text)"):
        check_display_name(name, "name")
