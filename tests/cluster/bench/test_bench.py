"""The command as a whole: against our own gateway with the demo, and against a scripted server."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.reading import Asking, Failed, Message, Reading
from cluster.bench.target import open_client
from cluster.cli import main
from tests.checkpoints import DEMO
from tests.cluster.bench.servers import Answering, scripted, words
from tests.cluster.gateway.serving import Served, serve
from workers.local import LocalModel, ModelOptions

CALM = ["--max-lateness", "5"]  # this machine is shared: its own delays are not what is tested


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(LocalModel(DEMO, ModelOptions())) as served:
        yield served


def bench(folder: Path, *arguments: str, expected: int = 0) -> dict[str, Any]:
    files = ["--json", str(folder / "bench.json"), "--html", str(folder / "bench.html")]
    assert main(["bench", *arguments, *files]) == expected
    assert "<svg" in (folder / "bench.html").read_text()
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return found


def test_sessions_over_http_with_the_server_s_own_view(served: Served, tmp_path: Path) -> None:
    found = bench(
        tmp_path, served.url, "--rate", "4", "--duration", "2", "--arrivals", "constant", "--turns", "2",
        "--prompt-tokens", "80", "--answer-tokens", "6", "--shared-prefix", "64", "--think", "0.1",
        "--ttft-objective", "20", *CALM,
    )  # fmt: skip
    summary = found["summary"]
    assert (summary["due"], summary["completed"], summary["errors"]) == (14, 14, {})
    assert found["model"] == "demo"
    assert set(found["requests"]["answer_tokens"]) == {6}
    assert summary["attainment"] == 1.0
    first = [
        n
        for n, turn in zip(*(found["requests"][c] for c in ("prompt_tokens", "turn")), strict=True)
        if not turn
    ]
    assert sum(first) / len(first) == pytest.approx(144, rel=0.15)
    assert summary["cached_tokens"] > 0  # the second turn begins as the first
    assert found["server"]["not_offered"] is None
    assert found["server"]["samples"]["pages"][0] == served.engine.pool.num_pages


def test_grpc_and_completions(served: Served, tmp_path: Path) -> None:
    for api in ("chat", "completions"):
        found = bench(
            tmp_path, f"grpc://{served.target}", "--api", api, "--rate", "5", "--duration", "1.1",
            "--arrivals", "constant", "--prompt-tokens", "24", "--answer-tokens", "4", *CALM,
        )  # fmt: skip
        assert found["summary"]["completed"] == 5
        assert set(found["requests"]["answer_tokens"]) == {4}
        assert "--status-url" in found["server"]["not_offered"]


def test_refusals_of_our_own_gateway_are_counted_in_both_protocols(served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"at": 0, "prompt": "hi", "max_tokens": 100000}\n{"at": 0, "prompt": "hi", "max_tokens": 2}'
    )
    for url, kind in ((served.url, "http 400"), (f"grpc://{served.target}", "grpc INVALID_ARGUMENT")):
        found = bench(tmp_path, url, "--trace", str(trace), *CALM)
        assert found["summary"]["errors"] == {kind: 1}
        assert "8192" in found["failures"][kind]["first"]


def test_refusals_of_our_own_gateway_say_when_to_come_again_in_both_protocols(served: Served) -> None:
    asking = Asking(api="chat", temperature=0.0, ignore_eos=True, key=None)

    async def ask(url: str) -> float | None:
        async with aclosing(open_client(url, asking)) as client:
            with pytest.raises(Failed, match="shutting down") as caught:
                await client.ask("demo", [Message("user", "hi")], 3, Reading())
        return caught.value.retry_after

    served.server.gateway.is_draining = True
    try:
        told = [asyncio.run(ask(url)) for url in (served.url, f"grpc://{served.target}")]
    finally:
        served.server.gateway.is_draining = False
    assert told == [5.0, 5.0]


def test_it_agrees_with_an_independent_client(served: Served, tmp_path: Path) -> None:
    """Threads and http.client send what the trace says; the server's delays dominate in both."""

    async def script(body: dict[str, Any], answering: Answering) -> None:
        await words(answering, 4, pause=0.2)

    lines: list[dict[str, Any]] = [
        {"at": index / 10, "prompt": "hello", "max_tokens": 4} for index in range(15)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    with scripted(script) as server:
        found = bench(tmp_path, server.url, "--trace", str(trace), *CALM)["summary"]
        others = _independent(server.port, json.dumps(server.bodies[-1]), [line["at"] for line in lines])
    mean_first, mean_whole = (sum(values) / len(values) for values in zip(*others, strict=True))
    assert found["ttft"]["mean"] == pytest.approx(mean_first, rel=0.25)
    assert found["e2e"]["mean"] == pytest.approx(mean_whole, rel=0.25)
    assert found["e2e"]["p50"] >= 0.8
    assert found["itl"]["p50"] == pytest.approx(0.2, rel=0.3)
    assert found["tpot"]["p50"] == pytest.approx(0.2, rel=0.3)


def _independent(port: int, body: str, moments: list[float]) -> list[tuple[float, float]]:
    """Time to the first text and to the end of each answer."""
    found: list[tuple[float, float]] = []
    start = time.perf_counter() + 0.2

    def one(at: float) -> None:
        time.sleep(start + at - time.perf_counter())
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        sent = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        first = 0.0
        while line := response.readline():
            if not first and b'"content"' in line:
                first = time.perf_counter() - sent
        found.append((first, time.perf_counter() - sent))
        connection.close()

    threads = [threading.Thread(target=one, args=(at,)) for at in moments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == len(moments)
    return found


def test_a_load_from_two_processes_is_the_same_load(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await words(answering, 3, pause=0.01)

    options = ["--rate", "20", "--duration", "1", "--turns", "1..2", *CALM]
    with scripted(script) as server:
        one = bench(tmp_path, server.url, *options)
        said = [body["messages"] for body in server.bodies]
        server.bodies.clear()
        two = bench(tmp_path, server.url, *options, "--processes", "2")
        assert sorted(map(str, said)) == sorted(str(body["messages"]) for body in server.bodies)
    for name in ("session", "turn"):
        assert sorted(two["requests"][name]) == sorted(one["requests"][name])
    assert two["summary"]["completed"] == one["summary"]["completed"] == two["summary"]["due"]
    assert two["summary"]["loop_delay"]["count"] > one["summary"]["loop_delay"]["count"]


def test_two_processes_give_up_together(tmp_path: Path) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        if body["max_tokens"] == 1:  # a probe
            await words(answering, 1)
        else:
            await answering.refuse(503, "full")

    with scripted(script) as server:
        started = time.perf_counter()
        found = bench(
            tmp_path, server.url, "--find-capacity", "--rate", "4", "--duration", "60", "--max-trials", "1",
            "--e2e-objective", "5", "--processes", "2", *CALM, expected=1,
        )  # fmt: skip
    assert time.perf_counter() - started < 50
    assert found["capacity"]["highest"] is None
    assert found["capacity"]["trials"][0]["remark"].startswith("given up after 3 misses")


def test_a_search_finds_what_a_server_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_open = 0

    async def script(body: dict[str, Any], answering: Answering) -> None:
        """Refuses the third of three at once: with answers of 0.2 s, 5 constant arrivals a second pass."""
        nonlocal num_open
        if num_open == 2:
            return await answering.refuse(503, "full")
        num_open += 1
        await words(answering, 2, pause=0.1)
        num_open -= 1
        return None

    with scripted(script) as server:
        found = bench(
            tmp_path, server.url, "--find-capacity", "--rate", "2", "--arrivals", "constant",
            "--duration", "1.5", "--e2e-objective", "5", "--precision", "1.1", "--max-trials", "6", *CALM,
        )  # fmt: skip
    out = capsys.readouterr().out
    capacity = found["capacity"]
    assert capacity["highest"] in (2.0, 4.0, 8.0)
    assert capacity["lowest_failed"] == 2 * capacity["highest"]
    assert out.count("within objectives: met") >= 1
    assert "given up after 1 misses" in out
    assert found["summary"]["attainment"] == 1.0


def test_a_generator_that_is_late_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await words(answering, 1)

    with scripted(script) as server:
        found = bench(
            tmp_path, server.url, "--rate", "20", "--duration", "0.5", "--max-lateness", "1e-9", expected=1
        )
    assert "late" in found["void"][0]
    assert "VOID" in capsys.readouterr().out
    assert found["server"]["not_offered"] == "/status answered 404"


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "URL"),
        (["--rate", "0"], "--rate"),
        (["--prompt-tokens", "many"], "--prompt-tokens"),
        (["--trace", "/none"], "--trace"),
        (["--duration", "0"], "--duration"),
        (["--warmup", "-1"], "--warmup"),
        (["--attainment", "2"], "--attainment"),
        (["--find-capacity"], "needs an objective"),
        (["--find-capacity", "--e2e-objective", "1", "--rate", "1@0,2@9"], "one --rate"),
        (["--key-file", "/none"], "--key-file"),
        (["--json", "/none/bench.json"], "/none/bench.json"),
        (["--rate", "0.001", "--arrivals", "constant", "--duration", "1"], "before the first arrival"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
