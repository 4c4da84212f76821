"""The chart makes objects that Kubernetes accepts and that fit what processes read and serve."""

import dataclasses
from typing import Any

import kubernetes_validate
import pytest

from detflow.settings import Settings
from tests.deploy.chart import render, values

pytest.importorskip("go_template", reason="py-go-template is not installed: make setup")

PLAIN: dict[str, Any] = {}
EVERYTHING: dict[str, Any] = {
    "image__pullSecrets": ["registry"],
    "store__secret": "bucket",
    "store__environment": {"AWS_REGION": "eu-central-1"},
    "environment": {"DETFLOW_LOG_LEVEL": "debug"},
    "oidc": {"issuer": "https://id.example.com", "clientId": "detflow", "clientSecretKey": "oidc"},
    "tls": {"secret": "detflow-tls", "requireClients": True},
    "otlpEndpoint": "http://collector:4317",
    "podMonitor": True,
    "ingress__enabled": True,
    "ingress__className": "nginx",
    "ingress__tlsSecret": "detflow-ingress",
    "networkPolicy__clientsFrom": [{"namespaceSelector": {}}],
    "ray__enabled": True,
}
FOREIGN = {"PodMonitor", "RayCluster"}
"""Kinds of operators, for which there is no schema here."""
VARIABLES = {f"DETFLOW_{one.name.upper()}" for one in dataclasses.fields(Settings)}
SECRET_VARIABLES = {
    f"DETFLOW_{one.name.upper()}_FILE" for one in dataclasses.fields(Settings) if not one.repr
}
SERVICES = ("version", "preprocess", "trainer", "metrics")

Object = dict[str, Any]


@pytest.fixture(scope="module", params=[PLAIN, EVERYTHING], ids=["plain", "everything"])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(values(**request.param))


@pytest.fixture(scope="module")
def plain() -> list[Object]:
    return render(values())


@pytest.fixture(scope="module")
def everything() -> list[Object]:
    return render(values(**EVERYTHING))


def _of(objects: list[Object], kind: str) -> dict[str, Object]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def _pods(objects: list[Object]) -> list[Object]:
    """Returns the specs of all pods."""
    found = [
        one["spec"]["template"]["spec"] for one in objects if one["kind"] in ("Deployment", "Job")
    ]
    for cluster in _of(objects, "RayCluster").values():
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        found += [group["template"]["spec"] for group in groups]
    return found


def _environment(container: Object) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"]}


def test_every_object_is_valid_by_the_schemas_of_kubernetes(objects: list[Object]) -> None:
    for one in objects:
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, "1.34", strict=True)
    for spec in _pods(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, "1.34", strict=True)
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))


def test_an_error_in_a_manifest_would_be_found() -> None:
    broken = render(values(services__version__resources={"request": {"cpu": "1"}}))
    deployment = _of(broken, "Deployment")["detflow-version"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


def test_only_variables_that_the_processes_read_are_set(objects: list[Object]) -> None:
    for spec in _pods(objects):
        for container in spec["containers"]:
            names = {name for name in _environment(container) if name.startswith("DETFLOW_")}
            assert names <= VARIABLES | SECRET_VARIABLES


def test_processes_find_each_other_at_ports_that_they_listen_on(objects: list[Object]) -> None:
    deployments, services = _of(objects, "Deployment"), _of(objects, "Service")
    for part in (*SERVICES, "gateway"):
        (container,) = deployments[f"detflow-{part}"]["spec"]["template"]["spec"]["containers"]
        environment = _environment(container)
        assert container["args"] == [f"detflow-{part}"]
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        is_gateway = part == "gateway"
        listens = environment["DETFLOW_HTTP_LISTEN" if is_gateway else "DETFLOW_LISTEN"]
        main = "http" if is_gateway else "grpc"
        assert listens == f"0.0.0.0:{ports[main]}"
        assert environment["DETFLOW_METRICS_LISTEN"] == f"0.0.0.0:{ports['metrics']}"
        service = services[f"detflow-{part}"]["spec"]
        assert [(one["port"], one["targetPort"]) for one in service["ports"]] == [
            (ports[main], main)
        ]
        labels = deployments[f"detflow-{part}"]["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
        default = getattr(Settings(), f"{part}_address", Settings().http_listen)
        assert default.endswith(f":{ports[main]}")  # the same as on one machine
        for name in SERVICES:
            host, _, port = environment[f"DETFLOW_{name.upper()}_ADDRESS"].rpartition(":")
            assert services[host]["spec"]["ports"][0]["port"] == int(port)


def test_pods_may_do_as_little_as_possible(objects: list[Object]) -> None:
    for spec in _pods(objects):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            # Ray keeps its sessions and logs in /tmp of its own image.
            assert container["name"].startswith("ray-") or security["readOnlyRootFilesystem"]
            assert container["resources"]["limits"]["memory"]


def test_each_pod_gets_only_the_secrets_that_it_reads(objects: list[Object]) -> None:
    for name, deployment in _of(objects, "Deployment").items():
        spec = deployment["spec"]["template"]["spec"]
        environment = _environment(spec["containers"][0])
        (volume,) = [one["secret"] for one in spec["volumes"] if one["name"] == "secrets"]
        given = {f"/run/secrets/detflow/{item['path']}" for item in volume["items"]}
        read = {value for key, value in environment.items() if key in SECRET_VARIABLES}
        assert given == read
        assert ("owner_token" in str(volume["items"])) == (name == "detflow-version")
        assert not any(key in environment for key in ("DETFLOW_SERVICE_TOKEN", "DETFLOW_NATS_URL"))


def test_probes_ask_what_is_served(plain: list[Object], everything: list[Object]) -> None:
    for objects, has_tls in ((plain, False), (everything, True)):
        for name, deployment in _of(objects, "Deployment").items():
            (container,) = deployment["spec"]["template"]["spec"]["containers"]
            port = container["ports"][0]["containerPort"]
            ready = container["readinessProbe"]
            if name == "detflow-gateway":
                scheme = "HTTPS" if has_tls else "HTTP"
                assert ready["httpGet"] == {"path": "/readyz", "port": "http", "scheme": scheme}
                assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
            elif has_tls:
                command = ["python", "-m", "detflow.probe", f"127.0.0.1:{port}", name]
                assert ready["exec"]["command"] == command
            else:
                assert ready["grpc"] == {"port": port}


def test_pods_have_more_time_to_stop_than_calls_have_to_end(objects: list[Object]) -> None:
    for deployment in _of(objects, "Deployment").values():
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > Settings().drain_seconds + 20


def test_schemas_are_brought_up_to_date_before_anything_is_replaced(objects: list[Object]) -> None:
    jobs = _of(objects, "Job")
    assert set(jobs) == {f"detflow-migrate-{name}" for name in SERVICES}
    for name in SERVICES:
        job = jobs[f"detflow-migrate-{name}"]
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["args"] == ["python", "-m", "detflow.migrate", name]


def test_what_scales_by_itself_has_no_fixed_number_of_replicas(objects: list[Object]) -> None:
    scalers, deployments = _of(objects, "HorizontalPodAutoscaler"), _of(objects, "Deployment")
    assert set(scalers) == set(deployments) - {"detflow-trainer"}
    for name, deployment in deployments.items():
        assert ("replicas" in deployment["spec"]) == (name not in scalers)
    assert set(_of(objects, "PodDisruptionBudget")) == set(deployments)


def test_trainings_on_ray_go_to_the_cluster_of_the_release(everything: list[Object]) -> None:
    deployments = _of(everything, "Deployment")
    for name in ("trainer", "preprocess"):
        (container,) = deployments[f"detflow-{name}"]["spec"]["template"]["spec"]["containers"]
        environment = _environment(container)
        assert environment["DETFLOW_EXECUTOR"] == "ray"
        # KubeRay calls the service of a cluster's head {cluster}-head-svc.
        assert environment["DETFLOW_RAY_ADDRESS"] == "http://detflow-ray-head-svc:8265"
        assert container["image"] == "detflow-ray:0.1.0"
    assert set(_of(everything, "RayCluster")) == {"detflow-ray"}
