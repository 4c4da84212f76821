"""Structured logs and trace context.

A message is fixed text, values are fields: `log.info("training queued", training=name)`. The trace
id of the current request is added to every line; it travels in gRPC metadata, NATS headers and the
outbox as a W3C traceparent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider

from detflow.settings import Settings

_tracer = trace.get_tracer("detflow")


def configure(service: str, settings: Settings) -> None:
    """Sets up logging and tracing for this process; library loggers go the same way."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
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


def _add_trace_id(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event
