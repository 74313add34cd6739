"""Requests and their stages as OpenTelemetry's spans.

    POST /v1/chat/completions       the request, at the gateway
      route                         read, tokenised, sent to a worker
      queue, prefill, hand_over     at the worker that prefills
      decode                        at the worker that decodes

The gateway owns a request, so it makes all its spans: workers tell times and counts (`workers/stages.py`) and
know nothing of OpenTelemetry. No span holds a prompt, an answer, a key or a token's id.
"""

import time
from collections.abc import Callable
from dataclasses import fields

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.gateway.answer import Answer
from cluster.gateway.errors import Kind
from cluster.gateway.tracing import Headers, NoTracing, RequestSpan
from cluster.telemetry.export import Outbox
from cluster.telemetry.section import PATH, TracingSection
from workers.sequence import Request
from workers.stages import Stage, Stages

_MOST_KNOWN = (
    4096  # traced requests whose workers may still tell: more than can be open, and some that are over
)
_LONGEST_PARENT = 512
_SERVER_ERRORS = frozenset(kind.row.code for kind in Kind if kind.row.http >= 500)
_NOT_TRACED = NoTracing()

_Facts = dict[str, str | int | float]


class OtelTracing:
    """`Tracing` to a collector. All in the gateway's event loop, but for the sending."""

    def __init__(self, section: TracingSection, model: str, version: str) -> None:
        self.on_dropped: Callable[[int], None] = lambda count: None
        self._outbox = Outbox(section.endpoint + PATH, lambda count: self.on_dropped(count))
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(section.sample)),
            resource=Resource.create({"service.name": "eightfold", "service.version": version}),
            shutdown_on_exit=False,  # `close` has a deadline
        )
        provider.add_span_processor(self._outbox)
        self._tracer = provider.get_tracer("eightfold", version)
        self._model = model
        self._known: dict[str, tuple[int, Context]] = {}  # choice and parent, in order of arrival

    def request(self, name: str, headers: Headers, facts: dict[str, str]) -> RequestSpan:
        span = self._tracer.start_span(
            name,
            _parent(headers),
            SpanKind.SERVER,
            attributes={"gen_ai.request.model": self._model, **facts},
        )
        return OtelSpan(self, span) if span.is_recording() else _NOT_TRACED

    def know(self, request: Request, context: Context) -> None:
        """Workers will tell of this request; their spans belong there."""
        if len(self._known) >= _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[request.uid] = request.choice, context

    def stages(self, worker: str, stages: Stages) -> None:
        if stages.uid not in self._known:
            return
        choice, context = self._known[stages.uid]
        for stage in stages.stages:
            whose: _Facts = {"eightfold.worker": worker, "eightfold.choice": choice}
            self.span(stage.name, context, stage.start_ns, stage.end_ns, whose | _facts(stage))

    def span(self, name: str, context: Context, start_ns: int, end_ns: int, facts: _Facts) -> None:
        """A part of a request that is over; no shorter than 0 where a clock was set back meanwhile."""
        span = self._tracer.start_span(name, context, attributes=facts, start_time=start_ns)
        span.end(max(start_ns, end_ns))

    def close(self) -> None:
        self._outbox.close()


class OtelSpan:
    """A request that is traced."""

    is_sampled = True

    def __init__(self, tracing: OtelTracing, span: Span) -> None:
        self._tracing, self._span = tracing, span
        self._context = set_span_in_context(span, Context())
        self._started_ns = time.time_ns()
        self._answer: Answer | None = None
        self._sent_ns = 0

    def opened(self, answer: Answer) -> None:
        self._answer = answer

    def sent(self, request: Request) -> None:
        self._sent_ns = self._sent_ns or time.time_ns()
        self._tracing.know(request, self._context)

    def end(self, outcome: str) -> None:
        if self._sent_ns:
            self._tracing.span("route", self._context, self._started_ns, self._sent_ns, {})
        self._span.set_attribute("eightfold.outcome", outcome)
        if outcome not in ("ok", "cancelled"):
            self._span.set_attribute("error.type", outcome)
        if outcome in _SERVER_ERRORS:
            self._span.set_status(Status(StatusCode.ERROR))
        if answer := self._answer:
            self._span.set_attributes(
                {
                    "eightfold.request": answer.uid,
                    "gen_ai.usage.input_tokens": answer.prompt_tokens,
                    "gen_ai.usage.output_tokens": answer.num_tokens,
                    "gen_ai.response.finish_reasons": answer.finish_reasons,
                }
            )
            if answer.first_token_seconds is not None:
                self._span.set_attribute("gen_ai.response.time_to_first_chunk", answer.first_token_seconds)
        self._span.end()


def _facts(stage: Stage) -> _Facts:
    own = (field.name for field in fields(stage) if field.name not in ("name", "start_ns", "end_ns"))
    return {f"eightfold.{name}": getattr(stage, name) for name in own}


def _parent(headers: Headers) -> Context:
    """What a request is a part of, by W3C's Trace Context; malformed or given twice it counts for nothing.

    `tracestate` is for those who pass it on, and nothing goes on from here.
    """
    given = [_text(value) for name, value in headers if _text(name) == "traceparent"]
    if len(given) != 1 or len(given[0]) > _LONGEST_PARENT:
        return Context()
    return TraceContextTextMapPropagator().extract({"traceparent": given[0]}, Context())


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
