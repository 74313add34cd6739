"""Traces of real requests through a real gateway, as a collector gets them."""

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest

from cluster.config import ClusterConfig, ConfigError
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.telemetry.start import _EXPORTER, start_tracing
from tests.cluster.gateway.backends import pair, prompts, started
from tests.cluster.gateway.serving import ENDLESS, HARBOR, Served, in_thread, serve, wait_until
from tests.cluster.telemetry.collector import Collector, collecting, facts
from workers.local import LocalModel
from workers.stages import Stage

ROOT = Path(__file__).parents[3]
CHAT = {"model": "demo", "messages": HARBOR, "temperature": 0, "max_tokens": 24}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLED = f"00-{TRACE}-{PARENT}-01"
NAME = "POST /v1/chat/completions"


def config(collector: Collector, sample: float = 1, **sections: Any) -> ClusterConfig:
    raw: dict[str, Any] = {
        "engine": {"tokens": 8192},
        "gateway": {"http_port": 0, "grpc_port": 0},
        "tracing": {"endpoint": collector.url, "sample": sample},
    }
    return ClusterConfig.model_validate(raw | sections)


def post(served: Served, body: object = CHAT, **headers: str) -> httpx2.Response:
    url = f"{served.url}/v1/chat/completions"
    return httpx2.post(url, json=body, headers=headers, timeout=30, trust_env=False)


def dropped(served: Served) -> float:
    page = httpx2.get(f"{served.url}/metrics", trust_env=False).text
    (line,) = re.findall(r"^eightfold_dropped_spans_total (\S+)$", page, re.MULTILINE)
    return float(line)


def test_a_request_and_its_stages(demo: LocalModel) -> None:
    with collecting() as collector:
        with serve(demo, config(collector, engine={"tokens": 8192, "drafts": 2, "chunk": 8})) as served:
            usage = post(served).json()["usage"]
        request = collector.one(NAME)
        told = facts(request)
        assert collector.paths == {"/v1/traces"}
        assert not request.parent_span_id
        assert request.kind == request.SPAN_KIND_SERVER
        assert told.pop("eightfold.request")
        assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 10
        assert told == {
            "gen_ai.request.model": "demo",
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "eightfold.outcome": "ok",
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "gen_ai.response.finish_reasons": ["stop"],
        }
        stages = [collector.one(name) for name in ("route", "queue", "prefill", "decode")]
        assert len(collector.spans) == 5
        for stage in stages:
            assert stage.trace_id == request.trace_id
            assert stage.parent_span_id == request.span_id
            assert stage.start_time_unix_nano <= stage.end_time_unix_nano
        starts = [span.start_time_unix_nano for span in (request, *stages)]
        assert starts == sorted(starts)
        prefill, decode = map(facts, stages[2:])
        assert prefill["eightfold.prompt_tokens"] == usage["prompt_tokens"]
        assert prefill["eightfold.chunks"] == -(-usage["prompt_tokens"] // 8)
        assert prefill["eightfold.cached_tokens"] == prefill["eightfold.experts_seconds"] == 0
        assert decode["eightfold.worker"] == "engine"
        assert decode["eightfold.tokens"] == usage["completion_tokens"] - 1
        assert decode["eightfold.accepted_drafts"] == decode["eightfold.tokens"] - decode["eightfold.steps"]
        assert decode["eightfold.accepted_drafts"] > 0
        assert 0 < decode["eightfold.first_step_seconds"] < 10


def test_no_span_holds_what_was_said(demo: LocalModel) -> None:
    key = "sk-canary-7d1f"
    message = {"role": "user", "content": 'What does "xylograph" mean?'}
    with collecting() as collector:
        with serve(demo, config(collector)) as served:
            answer = post(served, CHAT | {"messages": [message]}, authorization=f"Bearer {key}").json()
            refused = post(served, CHAT | {"model": "xylograph"})
            assert refused.status_code == 404
        sent = b"".join(collector.bodies)
    words = answer["choices"][0]["message"]["content"].split()
    assert len(collector.named(NAME)) == 2
    for secret in ("xylograph", key, *(word for word in words if len(word) > 6)):
        assert secret.encode() not in sent


@pytest.mark.parametrize(
    ("sample", "traceparent", "is_traced"),
    [(0, CALLED, True), (1, CALLED, True), (1, CALLED[:-1] + "0", False), (0, None, False), (1, None, True)],
)
def test_who_calls_decides(demo: LocalModel, sample: float, traceparent: str | None, is_traced: bool) -> None:
    with collecting() as collector:
        with serve(demo, config(collector, sample)) as served:
            headers = {"traceparent": traceparent} if traceparent else {}
            response = post(served, **headers)
            assert response.status_code == 200
            assert not {name for name in response.headers if "trace" in name}
            metadata = tuple(headers.items())
            body = pb.ChatRequest(
                model="demo",
                messages=[pb.Message(role="user", content="a")],
                sampling=pb.Sampling(max_tokens=4),
            )
            with served.stub() as stub:
                list(stub.Chat(body, metadata=metadata))
        http, rpc = collector.named(NAME), collector.named("eightfold.v1.InferenceService/Chat")
        assert len(http) == len(rpc) == is_traced
        if traceparent and is_traced:
            for span in (*http, *rpc):
                assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
            assert len(collector.spans) == 10
            assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


@pytest.mark.parametrize(
    "traceparent",
    [
        CALLED.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        "x" * 600,
        "",
    ],
)
def test_a_malformed_parent_is_none(demo: LocalModel, traceparent: str) -> None:
    with collecting() as collector:
        with serve(demo, config(collector)) as served:
            assert post(served, traceparent=traceparent).status_code == 200
        assert not collector.one(NAME).parent_span_id
        assert collector.one(NAME).trace_id.hex() != TRACE


def test_two_parents_are_none(demo: LocalModel) -> None:
    with collecting() as collector:
        with serve(demo, config(collector)) as served:
            headers = [("traceparent", CALLED), ("traceparent", CALLED)]
            url = f"{served.url}/v1/chat/completions"
            assert httpx2.post(url, json=CHAT, headers=headers, trust_env=False).status_code == 200
        assert collector.one(NAME).trace_id.hex() != TRACE


def test_ends_that_are_not_the_model_s(demo: LocalModel) -> None:
    """A stop string, a client that leaves, a refusal, and two choices."""
    with collecting() as collector:
        with serve(demo, config(collector)) as served:
            assert post(served, CHAT | {"stop": "person"}, traceparent=CALLED).status_code == 200
            with httpx2.stream(
                "POST", f"{served.url}/v1/chat/completions", json=ENDLESS, trust_env=False
            ) as left:
                lines = left.iter_lines()
                assert len([next(lines) for _ in range(20)]) == 20
            wait_until(served.is_idle)
            assert post(served, CHAT | {"temperature": "hot"}).status_code == 400
            body = pb.GenerateRequest(model="demo", text="a", sampling=pb.Sampling(max_tokens=4, n=2))
            with served.stub() as stub:
                list(stub.Generate(body))
        stopped = collector.of_trace(TRACE)
        assert facts(stopped[NAME])["gen_ai.response.finish_reasons"] == ["stop"]
        assert facts(stopped["decode"])["eightfold.tokens"] > 0
        left_span, refused = (
            next(span for span in collector.named(NAME) if facts(span)["eightfold.outcome"] == outcome)
            for outcome in ("cancelled", "invalid_type")
        )
        assert "decode" in collector.of_trace(left_span.trace_id.hex())
        assert facts(left_span)["gen_ai.usage.output_tokens"] > 0
        assert facts(refused)["error.type"] == "invalid_type"
        assert (
            refused.status.code == refused.status.STATUS_CODE_UNSET
        )  # as for any server: the client's fault
        assert collector.of_trace(refused.trace_id.hex()).keys() == {NAME}
        (generated,) = collector.named("eightfold.v1.InferenceService/Generate")
        of_choices = [span for span in collector.spans if span.parent_span_id == generated.span_id]
        names = sorted((facts(span).get("eightfold.choice", -1), span.name) for span in of_choices)
        each = ["decode", "prefill", "queue"]
        assert names == [(-1, "route"), *((0, name) for name in each), *((1, name) for name in each)]
        assert facts(generated)["gen_ai.response.finish_reasons"] == ["length", "length"]


def test_prefill_hand_over_and_decode_are_one_trace(demo: LocalModel) -> None:
    prompt = prompts()["lookup_300"].ids
    body = {"model": "demo", "prompt": list(prompt), "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with collecting() as collector, pair(demo) as (listed, prefill, _):
        with in_thread(started(demo, listed), prefill.engine, config(collector)) as served:
            url = f"{served.url}/v1/completions"
            headers = {"traceparent": CALLED}
            assert httpx2.post(url, json=body, headers=headers, trust_env=False).status_code == 200
            collector.wait_for(lambda: len(collector.spans) == 6)
        trace = collector.of_trace(TRACE)
        assert trace.keys() == {"POST /v1/completions", "route", "queue", "prefill", "hand_over", "decode"}
        workers = {name: facts(span).get("eightfold.worker") for name, span in trace.items()}
        assert [workers[name] for name in ("prefill", "hand_over", "decode")] == [
            "prefill",
            "prefill",
            "decode",
        ]
        moved = facts(trace["hand_over"])
        pages = -(-len(prompt) // 64) * demo.config.num_hidden_layers
        assert moved["eightfold.pages"] == pages
        assert moved["eightfold.bytes"] == prefill.worker.status.sent_bytes
        assert 0 < moved["eightfold.grant_seconds"] < 10
        assert facts(trace["decode"])["eightfold.tokens"] == 7


def test_a_request_that_runs_again_has_the_stages_of_each_run(
    demo: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        with serve(demo, config(collector)) as served:
            engine, step = served.engine, served.engine.step

            def fail(on_layer: Any) -> Any:
                monkeypatch.setattr(engine, "step", step)
                raise RuntimeError("a step that fails once")

            url, body = f"{served.url}/v1/chat/completions", ENDLESS | {"max_tokens": 60}
            with httpx2.stream("POST", url, json=body, trust_env=False) as answer:
                lines = answer.iter_lines()
                assert len([next(lines) for _ in range(20)]) == 20
                monkeypatch.setattr(engine, "step", fail)
                assert "data: [DONE]" in list(lines)
        twice = [name for name in ("decode", "prefill", "queue") for _ in range(2)]
        assert sorted(span.name for span in collector.spans) == sorted([NAME, "route", *twice])
        assert {span.trace_id for span in collector.spans} == {collector.one(NAME).trace_id}
        answered = sum(facts(span)["eightfold.tokens"] + 1 for span in collector.named("decode"))
        assert answered == facts(collector.one(NAME))["gen_ai.usage.output_tokens"] == 60


def test_a_collector_that_is_away_harms_nobody(demo: LocalModel) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        away = Collector(f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with serve(demo, config(away)) as served:
            assert dropped(served) == 0
            assert [post(served).status_code for _ in range(3)] == [200] * 3
            wait_until(lambda: dropped(served) >= 15, 12)


def test_a_slow_collector_harms_nobody(demo: LocalModel) -> None:
    with collecting(pause=60) as collector:
        with serve(demo, config(collector)) as served:
            assert post(served).status_code == 200
            time.sleep(1.5)  # the batch is on its way now
            assert post(served).status_code == 200
            left = time.monotonic()
        assert time.monotonic() - left < 8  # closing waits for nobody for long


@pytest.mark.parametrize("missing", ["opentelemetry.exporter", _EXPORTER])
def test_without_the_exporter_it_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    section = ClusterConfig.model_validate({"tracing": {"endpoint": "http://collector:4318"}}).tracing
    with pytest.raises(ConfigError, match=r"tracing: .*eightfold\[tracing\]"):
        start_tracing(section, "demo", "test")


def test_where_it_is_off_nothing_of_it_is_imported() -> None:
    """A whole server that answers, in a process of its own."""
    program = """
import sys
from tests.cluster.gateway.serving import HARBOR, serve
from tests.checkpoints import DEMO
from workers.local import LocalModel, ModelOptions
import cluster.commands.serve
with serve(LocalModel(DEMO, ModelOptions())) as served:
    assert served.post({"model": "demo", "messages": HARBOR, "max_tokens": 2}).status_code == 200
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stdout


def test_the_documentation_names_what_stages_tell() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", (ROOT / "docs/tracing.md").read_text(), re.MULTILINE)
    told = {name: set(re.findall(r"`eightfold\.(\w+)`", attributes)) for name, attributes in rows}
    assert told.pop("route") == set()
    for stage in get_args(Stage):
        names = {field.name: field.default for field in fields(stage)}
        assert told.pop(names["name"]) == names.keys() - {"name", "start_ns", "end_ns"}
    assert not told
