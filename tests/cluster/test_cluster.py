"""The embedded cluster on a Ray of the test's own: the oracle's tokens, shared pages, and actors that die."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx2
import pytest
import ray

from cluster.commands.serve import EMBEDDED
from cluster.config import ClusterConfig, GatewaySection
from cluster.supervisor import the_supervisor
from cluster.telemetry.section import TracingSection
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from tests.cluster.canary import Canary, everything_logged, files, heard
from tests.cluster.clusters import SECONDS, Cluster, running, wait_until
from tests.cluster.sockets import listening, unlisted
from tests.cluster.telemetry.collector import Collector, collecting, facts

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray warns of much

PROMPTS = {
    prompt["name"]: (tuple(Tokenizer.load(DEMO).encode(prompt["prompt"])), prompt["output_ids"])
    for prompt in json.loads((Path(DEMO) / "oracle.json").read_text())["prompts"]
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(collector: Collector) -> Iterator[Cluster]:
    tracing = TracingSection(endpoint=collector.url, sample=0.0)
    with running(ClusterConfig.load(EMBEDDED).model_copy(update={"tracing": tracing})) as cluster:
        yield cluster


def text(ids: list[int]) -> str:
    return Tokenizer.load(DEMO).decode(ids)


def answers_rightly(cluster: Cluster, name: str) -> None:
    prompt_ids, output_ids = PROMPTS[name]
    response = cluster.complete(prompt_ids, max_tokens=len(output_ids))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == text(output_ids)


def test_the_oracle_s_answers_come_through_prefill_and_decode(cluster: Cluster) -> None:
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda name: answers_rightly(cluster, name), PROMPTS))
    statuses = {status.role: status for status in cluster.backend.statuses.values()}
    wait_until(lambda: cluster.pages_in_use == 0, 10)
    assert statuses.keys() == {"prefill", "decode"}
    assert statuses["prefill"].prompt_tokens >= sum(len(ids) for ids, _ in PROMPTS.values())
    assert statuses["decode"].tokens > len(PROMPTS)
    for status in statuses.values():
        assert 0 < status.most_nodes <= 4
        assert status.copies <= 4 * status.dispatched


def test_turn_two_of_a_chat_finds_the_pages_that_decode_made(cluster: Cluster) -> None:
    prompt_ids, output_ids = PROMPTS["lookup_300"]
    answers_rightly(cluster, "lookup_300")
    second = cluster.complete((*prompt_ids, *output_ids), max_tokens=8).json()
    assert second["usage"]["prompt_cache_hit_tokens"] > len(prompt_ids)


def test_a_request_is_one_trace_across_all_roles(cluster: Cluster, collector: Collector) -> None:
    trace_id, name = "0af7651916cd43dd8448eb211c80319c", "POST /v1/completions"
    prompt_ids = (7, *PROMPTS["lookup_300"][0])
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    assert cluster.complete(prompt_ids, headers, max_tokens=8).status_code == 200
    wait_until(lambda: len(collector.of_trace(trace_id)) == 6, 10)
    trace = collector.of_trace(trace_id)
    assert trace.keys() == {name, "route", "queue", "prefill", "hand_over", "decode"}
    assert {span.parent_span_id for span in trace.values() if span.name != name} == {trace[name].span_id}
    told = {span.name: facts(span) for span in trace.values()}
    roles = {entry.address.name: entry.role for entry in cluster.backend.directory.workers}
    where = [roles[told[stage]["eightfold.worker"]] for stage in ("queue", "prefill", "hand_over", "decode")]
    assert where == ["prefill", "prefill", "prefill", "decode"]
    assert told["hand_over"]["eightfold.bytes"] > 0
    assert told["decode"]["eightfold.tokens"] == 7
    for stage in ("prefill", "decode"):  # these experts are other processes
        seconds = (trace[stage].end_time_unix_nano - trace[stage].start_time_unix_nano) / 1e9
        assert 0 < told[stage]["eightfold.experts_seconds"] < seconds
    assert {span.trace_id.hex() for span in collector.spans} == {trace_id}  # nobody asked for the others


def test_choices_share_the_prompt_s_pages(cluster: Cluster) -> None:
    def prompt_tokens() -> tuple[int, int]:
        status = next(s for s in cluster.backend.statuses.values() if s.role == "prefill")
        return status.prompt_tokens, status.hit_tokens

    prompt_ids = (*PROMPTS["lookup_1000"][0][:900], 7, 7, 7)
    time.sleep(0.5)  # the last report is on its way
    started, hit = prompt_tokens()
    response = cluster.complete(prompt_ids, max_tokens=8, n=4, temperature=1, seed=3)
    assert len({choice["text"] for choice in response.json()["choices"]}) > 1
    wait_until(lambda: prompt_tokens()[0] == started + 4 * len(prompt_ids), 10)
    # Three of the four find all full pages of the first.
    assert prompt_tokens()[1] - hit >= 3 * (len(prompt_ids) // 64 * 64)
    wait_until(lambda: cluster.pages_in_use == 0, 10)


def said(response: httpx2.Response) -> tuple[str, int]:
    """The answer, and its number of tokens."""
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return response.json()["choices"][0]["text"], usage["completion_tokens"]


def test_nobody_listens_who_is_not_on_the_list(cluster: Cluster, collector: Collector) -> None:
    answers_rightly(cluster, "chat")
    gateway = {("127.0.0.1", port) for port in (cluster.server.http_port, cluster.server.grpc_port)}
    of_the_test = urlsplit(collector.url).port
    sockets = [socket for socket in listening(cluster.pids) if socket.port != of_the_test]
    assert unlisted(sockets, os.getpid(), gateway, cluster.session) == []
    assert {socket.at(cluster.session, gateway) for socket in sockets} >= {"gateway", "loopback", "every"}
    for socket in sockets:
        if socket.at(cluster.session, gateway) == "every":  # Serve's own
            with (
                grpc.insecure_channel(f"127.0.0.1:{socket.port}") as channel,
                pytest.raises(grpc.RpcError) as caught,
            ):
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=SECONDS)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_no_prompt_key_or_secret_is_in_any_log(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    canary, log = Canary(), tmp_path / "log"
    shared = ray.get(the_supervisor().secrets.remote(), timeout=SECONDS)
    songs = {
        **canary.songs(),
        "Ray's token": os.environ["RAY_AUTH_TOKEN"],
        "the peers' token": shared.token,
        "the peers' token in hex": shared.token.hex(),
        "the pages' key": shared.pages,
        "the pages' key in hex": shared.pages.hex(),
    }
    gateway = GatewaySection(http_port=0, grpc_port=0, api_key_hashes=(canary.key_hash,))
    with everything_logged(log), cluster.another_gateway(gateway) as server:
        url = f"http://127.0.0.1:{server.http_port}"
        canary.send(url, f"127.0.0.1:{server.grpc_port}")
        wait_until(lambda: cluster.pages_in_use == 0, 30)
        pages = {path: text.encode() for path, text in canary.pages(url).items()}
    said = capfd.readouterr()
    texts = {"log": log.read_bytes(), "stdout": said.out.encode(), "stderr": said.err.encode(), **pages}
    of_ray = files(Path(cluster.session))
    assert any("worker" in name and name.endswith((".out", ".err")) for name in of_ray), (
        "Ray's logs are elsewhere"
    )
    assert heard(songs, {**texts, **of_ray}) == []


def expert(cluster: Cluster) -> int:
    return cluster.backend.directory.experts[3].pid


def worker(cluster: Cluster, role: str) -> int:
    return next(entry.pid for entry in cluster.backend.directory.workers if entry.role == role)


def processes(cluster: Cluster) -> set[int]:
    directory = cluster.backend.directory
    return {entry.pid for entry in (*directory.experts, *directory.workers)}


@pytest.mark.parametrize(
    "victim",
    [
        expert,
        partial(worker, role="decode"),
        partial(worker, role="prefill"),
        # Ray ends what a dead actor had started, sooner or later: until then it works.
        partial(Cluster.pid, title="ray::ServeReplica:decode"),
        partial(Cluster.pid, title="ray::ServeReplica:prefill"),
        partial(Cluster.pid, title="ray::Supervisor"),
    ],
    ids=["expert", "decode", "prefill", "decode engine", "prefill engine", "supervisor"],
)
def test_a_killed_actor_costs_no_request_and_no_token_and_comes_back(
    cluster: Cluster, victim: Callable[[Cluster], int]
) -> None:
    before = processes(cluster)
    seeds = [None, 1, 2]
    asked = [{"max_tokens": 200, "temperature": float(seed is not None), "seed": seed} for seed in seeds]
    expected = [said(cluster.complete(PROMPTS["code"][0], **each)) for each in asked]
    with ThreadPoolExecutor() as threads:
        pending = [threads.submit(cluster.complete, PROMPTS["code"][0], **each) for each in asked]
        wait_until(lambda: cluster.num_decoding == 3, 20)
        os.kill(victim(cluster), signal.SIGKILL)
        took = wait_until(lambda: all(one.done() for one in pending))
        assert [said(one.result()) for one in pending] == expected

    def is_back() -> bool:
        time.sleep(0.2)
        is_replaced = cluster.backend.is_ready and not before <= processes(cluster)
        return is_replaced and cluster.complete(PROMPTS["chat"][0], max_tokens=2).status_code == 200

    back = wait_until(is_back)
    print(f"answered after {took:.2f} s, back after {back:.1f} s more")
    answers_rightly(cluster, "lookup_300")
    wait_until(lambda: cluster.pages_in_use == 0, 10)
