"""What Prometheus is told about imports and preprocessing."""

from prometheus_client import Gauge

from detflow.gauges import Query

QUERIES = (
    Query(
        Gauge(
            "detflow_preprocessings", "Versions that wait for or are in preprocessing", ["state"]
        ),
        "select s, count(p.version_id) from unnest(array['PENDING', 'RUNNING']) s"
        " left join preprocessing p on p.state = s group by s",
    ),
    Query(
        Gauge("detflow_imports", "Datasets that are being imported or wait for it"),
        "select count(*) from dataset where state = 'IMPORTING'",
    ),
)
