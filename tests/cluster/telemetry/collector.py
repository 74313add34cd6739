"""A collector of traces in this process: OTLP over HTTP, decoded as it comes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector:
    """What has come so far.

    Attributes:
        bodies: as they came over the wire.
        paths: that were posted to.
    """

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    @property
    def spans(self) -> list[Span]:
        found = []
        for body in self.bodies:
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in of_resource.scope_spans:
                    found.extend(scope.spans)
        return found

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span

    def of_trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name, each of which comes once."""
        found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        assert len({span.name for span in found}) == len(found), found
        return {span.name: span for span in found}

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.05)


def facts(span: Span) -> dict[str, Any]:
    """Its attributes as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(one) for one in value.array_value.values]
        return getattr(value, kind)

    return {attribute.key: plain(attribute.value) for attribute in span.attributes}


@contextmanager
def collecting(pause: float = 0.0) -> Iterator[Collector]:
    """A collector that answers every batch, after a pause."""
    collector = Collector()
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_over.wait(pause)
            collector.paths.add(self.path)
            collector.bodies.append(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()
