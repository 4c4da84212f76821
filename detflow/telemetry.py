"""Structured logs and traces.

A message is fixed text, values are fields: `log.info("training queued", training=name)`. The trace
id of the current request is added to every line; it travels in gRPC metadata, NATS headers and the
outbox as a W3C traceparent, and to workers in their environment. Spans go to a collector where
DETFLOW_OTLP_ENDPOINT names one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from detflow.settings import Settings

_tracer = trace.get_tracer("detflow")
_VARIABLE = "TRACEPARENT"
_EXPORT_SECONDS = 3.0
"""Of one try, and so about what a collector that is away delays the end of a process by."""


def configure(service: str, settings: Settings) -> None:
    """Sets up logging and tracing for this process; library loggers go the same way."""
    trace_to(service, settings)
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace_id,
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if settings.log_format == "console"
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level.upper()]
        ),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    structlog.contextvars.bind_contextvars(service=service)


def trace_to(service: str, settings: Settings) -> None:
    """Sets up tracing for this process, and nothing else; the first call counts.

    Spans are exported in the background; what a collector does not take is dropped.
    """
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    provider = TracerProvider(resource=Resource.create({"service.name": f"detflow-{service}"}))
    if settings.otlp_endpoint:
        # It takes a third of a second to import.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(settings.otlp_endpoint, timeout=_EXPORT_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    trace.set_tracer_provider(provider)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Returns the logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


@contextmanager
def span(name: str, carrier: Mapping[str, str]) -> Iterator[str]:
    """Runs a piece of work in the trace of `carrier`'s traceparent; yields the trace id."""
    with _tracer.start_as_current_span(name, context=propagate.extract(carrier)) as current:
        yield f"{current.get_span_context().trace_id:032x}"


def inject(carrier: MutableMapping[str, str]) -> None:
    """Adds the current traceparent, if there is one."""
    propagate.inject(carrier)


def describe(name: str, **attributes: str | int) -> None:
    """Names the current span anew, once it is known what it is about."""
    current = trace.get_current_span()
    current.update_name(name)
    current.set_attributes(attributes)


def to_environment() -> dict[str, str]:
    """Returns what a child process needs in its environment to go on in the current trace."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return {_VARIABLE: carrier["traceparent"]} if carrier.get("traceparent") else {}


def from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the carrier that the parent of this process has passed on."""
    return {"traceparent": environ[_VARIABLE]} if environ.get(_VARIABLE) else {}


def _add_trace_id(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event
