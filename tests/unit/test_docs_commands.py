"""The commands in the documentation are commands, with options that are there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from detflow.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_INLINE = re.compile(r"`(detflow [^`\n]*)`")


def commands() -> list[tuple[str, str]]:
    """Returns (page, command line) of what stands in shell blocks or between backquotes."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines: list[str] = []
        for kind, block in re.findall(r"```(console|bash)\n(.*?)```", text, re.DOTALL):
            prompt = (
                "$ detflow " if kind == "console" else "detflow "
            )  # else it is what one printed
            lines += [line for line in block.splitlines() if line.startswith(prompt)]
        lines += _INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
        found += [(str(page.relative_to(ROOT)), line) for line in lines]
    return found


def options_of(words: list[str]) -> set[str]:
    """Returns the options of the command that the words begin with.

    Raises:
        AssertionError: There is no such command.
    """
    command: Any = typer.main.get_command(app)
    for word in words:
        inner = getattr(command, "commands", None)
        if inner is None:
            break
        assert word in inner, f"{word} is none of {', '.join(inner)}"
        command = inner[word]
    return {
        "--help",
        *(name for one in command.params for name in (*one.opts, *one.secondary_opts)),
    }


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_in_the_documentation_is_there_with_its_options(page: str, line: str) -> None:
    # What comes behind a comma or a pipe is another sentence or another program.
    words = shlex.split(re.split(r"[|,;]| \.\.\.", line.removeprefix("$ "))[0], comments=True)[1:]
    known = options_of([word for word in words if not word.startswith("-")])
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d+", word):
            assert word.split("=")[0] in known, f"{page}: {word} is none of {sorted(known)}"


def test_the_commands_are_found() -> None:
    pages = {page for page, _ in commands()}
    assert {"README.md", "docs/quickstart.md", "docs/how-to/train.md"} <= pages
    assert len(commands()) > 30
