"""The settings of a process, read once from DETFLOW_* variables into one frozen object."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from detflow.errors import InvalidArgument

BASE_PORT = 7100
"""Port of the gateway; version, preprocess, trainer and metrics follow it in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a process is told from outside: `DETFLOW_` + the upper-case field name.

    What is secret (URLs with passwords, tokens) may be in a file instead, named by the variable
    with `_FILE` after it, such as DETFLOW_SERVICE_TOKEN_FILE.

    Attributes:
        database_url: postgresql:// URL; each service uses the schema of its name in it.
        nats_url: nats:// URL with its token, or several separated by commas.
        store_url: Object store: file:///path, s3://bucket/prefix, gs://..., az://...
        listen: host:port of the gRPC server; port 0 takes a free one.
        http_listen: host:port of the gateway.
        metrics_listen: host:port of the Prometheus endpoint; empty for none, and for /metrics among
            the paths of the gateway.
        version_address: gRPC address of the version service.
        preprocess_address: gRPC address of the preprocess service.
        trainer_address: gRPC address of the trainer service.
        metrics_address: gRPC address of the metrics service.
        data_dir: Scratch space: uploads under way, bundle cache, training work folders. Nothing in
            it is needed after a restart.
        executor: Where trainings run and shards are made: local, or ray for a Ray cluster.
        ray_address: http:// address of the Ray cluster's Jobs API (its dashboard).
        ray_client_address: ray:// address of the cluster's client server, for preprocessing; by
            default port 10001 of the machine in ray_address.
        num_cpu_slots: Trainings that run on CPUs at once.
        num_gpu_slots: GPUs that trainings may use; -1 means all that are found.
        num_queued_preflights: Trainings in the queue that are tried at once, on the CPU and at the
            lowest priority; 0 leaves all trying to their turn.
        worker_memory_bytes: Memory a training worker on a CPU may have, so that running out of it
            is an error it reports; 0 sets no limit.
        pretrained_dir: Folder of the machines that train with weights to begin with, named
            {model}.safetensors or {model}.pt; empty for none.
        preprocess_processes: Processes that decode and encode images; 0 means one per core.
        max_upload_bytes: Largest archive that is accepted.
        predict_processes: Images that models are tried on at once.
        predict_threads: Threads of each; 0 shares the cores out among them.
        predict_memory_bytes: Memory for the models that predict; those used least recently make
            room.
        upload_idle_hours: How long an unfinished upload is kept after its last byte.
        import_urls: Where datasets may be imported from: prefixes such as s3://bucket/folder,
            separated by commas, that the preprocess service can read; empty for nowhere.
        trash_days: How long deleted versions can be restored before they are removed for good, with
            their trainings.
        checkpoint_days: How long the checkpoints of a training that was paused or has failed are
            kept after its end; 0 keeps them. Without them it begins anew when it is resumed.
        export_days: How long exports are kept after they were made; 0 keeps them.
        events_bytes: How large the event stream may become before the oldest events go, which
            otherwise go after 30 days; 0 sets no limit.
        webhook_hosts: Where webhooks may be sent to, separated by commas: external (addresses of
            the internet), private, loopback, a network such as 10.1.0.0/16, a host name such as
            hooks.example.com or *.example.com.
        drain_seconds: How long running calls may go on after SIGTERM.
        access: required, so that every call needs a token; or open, which lets everybody do
            everything and is taken on loopback only, for tests.
        service_token: Secret the services of an installation show each other; 32 characters or
            more.
        owner_token: Secret of whoever runs the installation, who may do everything; 32 characters
            or more. Only the version service needs it.
        oidc_issuer: URL of the OpenID Connect issuer whose users may sign in; empty for none.
        oidc_client_id: What this installation is called at the issuer; the audience of its tokens.
        oidc_client_secret: Secret of the client at the issuer; empty for a public client.
        public_url: https:// URL under which browsers reach the gateway, where it is not the
            address it listens on.
        tls_cert_file: PEM file with the certificate chain that this process shows; empty serves
            without TLS.
        tls_key_file: PEM file with the key of the certificate.
        tls_ca_file: PEM file with the authorities whose servers are trusted; set it where the
            services have certificates.
        tls_client_ca_file: PEM file with the authorities whose clients are let in (mTLS); empty
            asks clients for no certificate.
        calls_per_second: Calls that one principal may begin each second, at one process; twice as
            many at once after a pause. 0 sets no limit.
        open_calls: Calls of one principal that may be under way at once, at one process. 0 sets no
            limit.
        otlp_endpoint: URL of an OpenTelemetry collector that takes traces by OTLP over gRPC; empty
            for none.
        faults: What shall go wrong on purpose, see detflow/faults.py; for tests, with access=open
            only.
        log_format: json or console.
        log_level: debug, info, warning or error.
    """

    # What holds a secret is not shown where the settings are.
    database_url: str = field(default="", repr=False)
    nats_url: str = field(default="", repr=False)
    store_url: str = ""
    listen: str = "127.0.0.1:0"
    http_listen: str = f"127.0.0.1:{BASE_PORT}"
    metrics_listen: str = ""
    version_address: str = f"127.0.0.1:{BASE_PORT + 1}"
    preprocess_address: str = f"127.0.0.1:{BASE_PORT + 2}"
    trainer_address: str = f"127.0.0.1:{BASE_PORT + 3}"
    metrics_address: str = f"127.0.0.1:{BASE_PORT + 4}"
    data_dir: Path = Path("/var/tmp/detflow")
    executor: str = "local"
    ray_address: str = ""
    ray_client_address: str = ""
    num_cpu_slots: int = 1
    num_gpu_slots: int = -1
    num_queued_preflights: int = 1
    worker_memory_bytes: int = 0
    pretrained_dir: str = ""
    preprocess_processes: int = 0
    max_upload_bytes: int = 1 << 40
    predict_processes: int = 1
    predict_threads: int = 0
    predict_memory_bytes: int = 1 << 30
    upload_idle_hours: float = 24.0
    import_urls: str = ""
    trash_days: float = 30.0
    checkpoint_days: float = 0.0
    export_days: float = 0.0
    events_bytes: int = 0
    webhook_hosts: str = "external"
    drain_seconds: float = 10.0
    access: str = "required"
    service_token: str = field(default="", repr=False)
    owner_token: str = field(default="", repr=False)
    oidc_issuer: str = ""
    oidc_client_id: str = ""
    oidc_client_secret: str = field(default="", repr=False)
    public_url: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_ca_file: str = ""
    tls_client_ca_file: str = ""
    calls_per_second: float = 1000.0
    open_calls: int = 2000
    otlp_endpoint: str = ""
    faults: str = ""
    log_format: str = "json"
    log_level: str = "info"

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Reads the settings.

        Raises:
            InvalidArgument: A variable has a value of the wrong type, or names a file that cannot
                be read; the message names it.
        """
        values: dict[str, object] = {}
        for one in dataclasses.fields(cls):
            variable = f"DETFLOW_{one.name.upper()}"
            if variable in environ:
                values[one.name] = _parse(variable, environ[variable], type(one.default))
            elif not one.repr and (path := environ.get(f"{variable}_FILE")):
                values[one.name] = _read(f"{variable}_FILE", path)
        return cls(**values)  # type: ignore[arg-type]

    def require(self, *names: str) -> None:
        """Checks that settings without a default are there.

        Raises:
            InvalidArgument: One is missing; the message names the variables.
        """
        missing = [f"DETFLOW_{name.upper()}" for name in names if not getattr(self, name)]
        if missing:
            raise InvalidArgument(f"set {', '.join(missing)}", reason="MISSING_SETTING")


def _read(variable: str, path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"cannot read {path}, which {variable} names: {error}", reason="BAD_SETTING"
        ) from error


def _parse(variable: str, text: str, kind: type) -> object:
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidArgument(
            f"{variable} must be a {kind.__name__}, not {text!r}", reason="BAD_SETTING"
        ) from error
