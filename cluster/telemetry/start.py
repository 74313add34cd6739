"""Tracing as a description says. OpenTelemetry is imported where it is on, and nowhere else."""

from importlib.util import find_spec

from cluster.config import ConfigError
from cluster.gateway.tracing import NoTracing, Tracing
from cluster.telemetry.section import TracingSection

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def start_tracing(section: TracingSection | None, model: str, version: str) -> Tracing:
    """As a description says.

    Args:
        model: the name that clients call it by.
        version: of this program.

    Raises:
        ConfigError: it is on, and the exporter is not installed.
    """
    if section is None:
        return NoTracing()
    if not is_installed():
        problem = "needs OpenTelemetry's exporter: install eightfold[tracing], or leave the section out"
        raise ConfigError("", "tracing", problem)
    from cluster.telemetry.spans import OtelTracing

    return OtelTracing(section, model, version)


def is_installed() -> bool:
    """Whether OpenTelemetry's exporter can be imported."""
    try:
        return find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # not even a package that it lies in
        return False
