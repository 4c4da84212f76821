"""What Prometheus is told about trainings and slots."""

from prometheus_client import Gauge

from detflow.gauges import Query
from services.trainer.executors import Device, Executor

QUERIES = (
    Query(
        Gauge("detflow_trainings", "Trainings that wait or are under way", ["state"]),
        "select s, count(t.id) from unnest("
        "array['QUEUED', 'PROVISIONING', 'RUNNING', 'EVALUATING']) s"
        " left join training t on t.state = s group by s",
    ),
    Query(
        Gauge("detflow_exports", "Exports that wait or are under way", ["state"]),
        "select s, count(e.id) from unnest(array['QUEUED', 'RUNNING']) s"
        " left join export e on e.state = s group by s",
    ),
    Query(
        Gauge("detflow_expired_leases", "Attempts whose trainer is gone and that nobody has taken"),
        "select count(*) from training where lease_expire_time < now() - interval '1 minute'",
    ),
)
_SLOTS = Gauge("detflow_slots", "Devices that trainings of this trainer can run on", ["device"])


async def count_slots(executor: Executor) -> None:
    """Sets what the executor has."""
    for device in Device:
        _SLOTS.labels(device.value).set(executor.slots.of(device))
