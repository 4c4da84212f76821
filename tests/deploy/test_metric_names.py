"""The page, the alerts and the dashboard name metrics that there are, and all of them."""

import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from detflow import gauges
from services.metrics import gauges as metrics_gauges
from services.preprocess import gauges as preprocess_gauges
from services.trainer import gauges as trainer_gauges

if TYPE_CHECKING:
    from detflow.postgres import Database

promql_parser = pytest.importorskip(
    "promql_parser", reason="promql-parser is not installed: make setup"
)

REPOSITORY = Path(__file__).parents[2]
OF_THE_CLIENT = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
}
QUERIES = {
    "version": (),
    "preprocess": preprocess_gauges.QUERIES,
    "trainer": trainer_gauges.QUERIES,
    "metrics": metrics_gauges.QUERIES,
}

_LIST = """
import json
import gateway.app, gateway.connect
import services.version.__main__, services.preprocess.__main__
import services.trainer.__main__, services.metrics.__main__
from prometheus_client import REGISTRY
suffixes = {"counter": [("_total", [])],
            "histogram": [("", []), ("_bucket", ["le"]), ("_count", []), ("_sum", [])]}
found = {}
for collector in list(REGISTRY._collector_to_names):
    for family in collector.describe() if hasattr(collector, "describe") else ():
        for suffix, more in suffixes.get(family.type, [("", [])]):
            found[family.name + suffix] = [*collector._labelnames, *more]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exposed() -> dict[str, list[str]]:
    """Names of all metrics of our processes, each with its labels."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return {name: labels for name, labels in found.items() if not name.startswith("python_")}


def test_the_page_lists_every_metric_with_its_labels(exposed: dict[str, list[str]]) -> None:
    page = (REPOSITORY / "docs/reference/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| \w+ \|([\w, ]*)\|", page, re.MULTILINE)
    listed = {
        name: [one.strip() for one in labels.split(",") if one.strip()] for name, labels in rows
    }
    parts = ("_bucket", "_count", "_sum")
    assert listed == {name: labels for name, labels in exposed.items() if not name.endswith(parts)}


def _selectors(expression: Any) -> Iterator[Any]:
    """Yields the parts of an expression that select series."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        inner = getattr(expression, name, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None and not isinstance(one, (str, int, float)):
                yield from _selectors(one)


def _check(text: str, exposed: dict[str, list[str]]) -> None:
    found = list(_selectors(promql_parser.parse(text.replace("$__rate_interval", "5m"))))
    assert found, f"{text} reads nothing"
    for selector in found:
        assert selector.name in exposed.keys() | OF_THE_CLIENT, text
        for matcher in selector.matchers.matchers:
            assert matcher.name in [*exposed.get(selector.name, []), "job", "instance"], text


def test_alerts_read_metrics_that_there_are(exposed: dict[str, list[str]]) -> None:
    rules = yaml.safe_load((REPOSITORY / "deploy/alerts/detflow.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        _check(rule["expr"], exposed)
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^## (.*)$", (REPOSITORY / path).read_text(), re.MULTILINE)
        assert anchor in {one.lower().replace(" ", "-") for one in headings}


def test_the_dashboard_reads_metrics_that_there_are(exposed: dict[str, list[str]]) -> None:
    dashboard = json.loads((REPOSITORY / "deploy/dashboards/detflow.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            _check(target["expr"], exposed)
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in target["expr"] or label in ("instance", "job")


def test_a_metric_that_there_is_not_would_be_found(exposed: dict[str, list[str]]) -> None:
    with pytest.raises(AssertionError):
        _check('sum(rate(http_request_total{code="500"}[5m]))', exposed)
    with pytest.raises(AssertionError):
        _check('max(detflow_trainings{status="QUEUED"})', exposed)


@pytest.mark.parametrize("service", QUERIES)
async def test_figures_of_an_empty_service_are_read(
    service: str, make_database: "Callable[[str], Awaitable[Database]]"
) -> None:
    db = await make_database(service)
    for query in (*gauges.OUTBOX, *QUERIES[service]):
        await gauges.read(db, query)
        samples = [one for family in query.gauge.collect() for one in family.samples]
        assert samples, "a figure is reported from the start"
        assert {one.value for one in samples} == {0.0}


async def test_figures_follow_the_tables(
    make_database: "Callable[[str], Awaitable[Database]]",
) -> None:
    db = await make_database("version")
    async with db.transaction() as conn:
        await conn.execute(
            "insert into outbox (event_id, resource, seq, subject, name, payload, create_time)"
            " values ('a', 'version.v', 1, 's', 'n', '', now() - interval '1 minute')"
        )
    pending, oldest = gauges.OUTBOX
    for query in (pending, oldest):
        await gauges.read(db, query)
    assert pending.gauge._value.get() == 1
    assert oldest.gauge._value.get() >= 60
