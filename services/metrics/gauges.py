"""What Prometheus is told about evaluations and webhooks."""

from prometheus_client import Gauge

from detflow.gauges import Query

QUERIES = (
    Query(
        Gauge("detflow_evaluations_pending", "Evaluations that wait or are under way"),
        "select count(*) from evaluation_job",
    ),
    Query(
        Gauge("detflow_webhook_deliveries", "Messages to webhooks of the last day", ["state"]),
        "select s, count(d.id) from unnest(array['PENDING', 'DELIVERED', 'FAILED']) s"
        " left join webhook_delivery d"
        " on d.state = s and d.create_time > now() - interval '1 day' group by s",
    ),
    Query(
        Gauge("detflow_webhook_overdue_seconds", "How late the message is that is due longest"),
        "select greatest(coalesce(extract(epoch from now() - min(next_try_time)), 0), 0)"
        " from webhook_delivery where state = 'PENDING'",
    ),
)
