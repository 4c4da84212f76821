"""Renders the chart with the template language of Go, as Helm does.

The chart keeps to what text/template, Sprig and `toYaml`, `toJson` give; not to what Helm alone
has (`include`, `lookup`, `.Files`). A value that values.yaml does not name is an error here.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/detflow"

# The library ends the process on an error, so it gets one of its own.
_RENDER = """
import json, sys
from pathlib import Path
import go_template
job = json.load(sys.stdin)
print(json.dumps([go_template.render(Path(path), job["values"]).decode() for path in job["paths"]]))
"""


def values(**changed: Any) -> dict[str, Any]:
    """Returns the chart's values; `services__trainer__replicas=2` changes one."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, value in changed.items():
        *above, last = path.split("__")
        place = found
        for key in above:
            place = place[key]
        assert last in place, f"values.yaml has no {path}"
        place[last] = copy.deepcopy(value)
    return found


def render(given: dict[str, Any], release: str = "detflow") -> list[dict[str, Any]]:
    """Returns the objects that the chart makes of the values."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    scope = {
        "Values": given,
        "Chart": {
            "Name": about["name"],
            "Version": about["version"],
            "AppVersion": about["appVersion"],
        },
        "Release": {"Name": release, "Namespace": "default", "Service": "Helm"},
    }
    parts = "".join(path.read_text() for path in sorted(CHART.glob("templates/_*.tpl")))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for template in sorted(CHART.glob("templates/*.yaml")):
            path = Path(folder) / template.name
            path.write_text(parts + template.read_text())
            paths.append(str(path))
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            input=json.dumps({"values": scope, "paths": paths}),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0 and done.stdout.startswith("["), done.stdout + done.stderr
    texts = json.loads(done.stdout)
    return [one for text in texts for one in yaml.safe_load_all(text) if one is not None]
