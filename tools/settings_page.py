# ruff: noqa: E501
"""Writes docs/reference/settings.md from the docstring of detflow/settings.py (`--check`: compares)."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from detflow.settings import Settings

PAGE = Path(__file__).parent.parent / "docs/reference/settings.md"

_HEAD = """\
# Settings

What the processes are told, as environment variables. Written by `python tools/settings_page.py` from
[detflow/settings.py](../../detflow/settings.py). A variable of the wrong type stops the process at its start.

What is marked as secret may be in a file instead, named by the variable with `_FILE` after it:
`DETFLOW_SERVICE_TOKEN_FILE=/run/secrets/service_token`.

| variable | default | meaning |
|---|---|---|
"""

_TAIL = """
Credentials of the object store come by its own variables: `AWS_*`, `GOOGLE_*`, `AZURE_*`.

## Of the command line and the SDK

| variable | meaning |
|---|---|
| `DETFLOW_TOKEN`, or `DETFLOW_TOKEN_FILE` | Token to show; without it, that of the stack which runs on this machine. |
| `DETFLOW_INSECURE` | `1` sends the token without TLS to another machine, on a network that is trusted. |
| `DETFLOW_TLS_CA_FILE`, `DETFLOW_TLS_CERT_FILE`, `DETFLOW_TLS_KEY_FILE` | As above. |
| `DETFLOW_VERSION_ADDRESS`, `..._PREPROCESS_...`, `..._TRAINER_...`, `..._METRICS_...` | host:port of single \
services, where they are not at the four ports after the gateway's. |
"""


def page() -> str:
    """Returns the page."""
    text = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")[2]
    meanings = {
        name: " ".join(meaning.split())
        for name, meaning in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    }
    rows = []
    for one in dataclasses.fields(Settings):
        default = str(one.default)
        shown = f"`{default}`" if default else "" if one.repr else "(secret)"
        meaning = meanings[one.name].replace("|", "\\|")
        rows.append(f"| `DETFLOW_{one.name.upper()}` | {shown} | {meaning} |\n")
    return _HEAD + "".join(rows) + _TAIL


if __name__ == "__main__":
    if "--check" in sys.argv:
        if PAGE.read_text() != page():
            raise SystemExit(f"{PAGE} is out of date: run python tools/settings_page.py")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
