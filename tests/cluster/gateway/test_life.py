"""From the first byte to the last page: ends, cuts, floods and failures."""

import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from torch import Tensor

import workers.runner
from cluster.config import ClusterConfig, ConfigError, GatewaySection
from cluster.gateway.errors import Overloaded
from cluster.gateway.server import GatewayServer
from model.sampling import SampleRow
from tests.cluster.gateway.serving import ENDLESS, HARBOR, HARBOR_ANSWER, Served, serve, wait_until
from workers.local import LocalModel


def open_stream(served: Served, body: Any = ENDLESS, receive_buffer: int | None = None) -> socket.socket:
    """A request that has been sent."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    connection = socket.socket()
    connection.settimeout(30)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", served.server.http_port))
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return connection


def test_a_client_that_leaves_frees_its_pages_within_a_second(served: Served) -> None:
    with open_stream(served) as connection:
        assert b"200 OK" in connection.recv(1000)
        assert not served.is_idle()
    assert wait_until(served.is_idle) < 5


def test_an_answer_in_two_writes_does_not_wait_for_an_acknowledgement(served: Served) -> None:
    with open_stream(served) as connection:
        connection.recv(1000)
        protocols = list(served.server._http.server_state.connections)
        accepted = [protocol.transport.get_extra_info("socket") for protocol in protocols]
        assert accepted
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in accepted)


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(served: Served) -> None:
    with open_stream(served, {**ENDLESS, "stream": False}):
        wait_until(lambda: len(served.server.gateway.journal) == 1)
    assert wait_until(served.is_idle) < 5


def test_every_choice_is_cancelled(served: Served) -> None:
    with open_stream(served, {**ENDLESS, "n": 4, "max_tokens": 100, "temperature": 2}) as connection:
        connection.recv(1000)
        assert len(served.server.gateway.journal) == 4
    assert wait_until(served.is_idle) < 5


def test_a_full_queue_says_so_at_once(small: Served) -> None:
    with open_stream(small) as running:
        running.recv(1000)
        with open_stream(small):
            wait_until(lambda: len(small.server.gateway.journal) == 2)
            started = time.perf_counter()
            refused = small.post({"model": "demo", "messages": HARBOR})
            assert time.perf_counter() - started < 5
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
    wait_until(small.is_idle)
    assert small.post({"model": "demo", "messages": HARBOR, "max_tokens": 2}).status_code == 200


def test_choices_that_do_not_all_find_room_leave_nothing_behind(small: Served) -> None:
    refused = small.post({"model": "demo", "messages": HARBOR, "n": 3, "ignore_eos": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert wait_until(small.is_idle) < 5
    assert small.server.gateway.backend.load().waiting == 0


def test_many_streams_at_once_all_get_the_same_answer(served: Served) -> None:
    def ask(number: int) -> str:
        with served.openai() as client:
            chunks = client.chat.completions.create(
                model="demo",
                messages=HARBOR,
                temperature=0,
                stream=True,  # type: ignore[arg-type]
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(32) as threads:
        assert set(threads.map(ask, range(32))) == {HARBOR_ANSWER}


class Failing:
    """A step of an engine that fails as often as it is told to."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self._step, self.times = served.engine.step, 0
        monkeypatch.setattr(served.engine, "step", self)

    def __call__(self, on_layer: Any) -> Any:
        if self.times:
            self.times -= 1
            raise RuntimeError("secret internal detail")
        return self._step(on_layer)


def test_an_engine_that_fails_a_step_runs_its_requests_again(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(small, monkeypatch)
    with open_stream(small, {**ENDLESS, "max_tokens": 30}) as connection:
        text = connection.recv(1000).decode()
        failing.times = 1
        text += b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert text.endswith("0\r\n\r\n")
    assert "[DONE]" in text
    wait_until(small.is_idle)


def test_an_engine_that_fails_again_fails_its_requests_and_goes_on(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(small, monkeypatch)
    with open_stream(small) as connection:
        text = connection.recv(1000).decode()
        failing.times = 2
        text += b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert not text.endswith("0\r\n\r\n")  # the connection is cut, not ended
    assert '"code":"replica_lost"' in text
    assert "[DONE]" not in text
    assert "secret" not in text
    wait_until(small.is_idle)
    assert small.post({"model": "demo", "messages": HARBOR, "max_tokens": 2}).status_code == 200

    failing.times = 2
    refused = small.post({"model": "demo", "messages": HARBOR})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "replica_lost")


def test_an_engine_that_fails_for_ever_is_not_ready(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(small, monkeypatch).times = 1000
    body = {"model": "demo", "messages": HARBOR}
    assert [small.post(body).json()["error"]["code"] for _ in range(4)] == ["replica_lost"] * 4
    assert httpx2.get(f"{small.url}/readyz", trust_env=False).status_code == 503


def test_logits_that_are_no_numbers_are_the_fault_of_their_request_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workers.runner.Drawing

    def poisoned(logits: Tensor, rows: list[SampleRow], **options: Any) -> Any:
        """As if the model had gone wrong for the request that counts log-probabilities."""
        for row, place in zip(rows, range(len(rows)), strict=True):
            if row.params.logprobs is not None:
                logits[place] = math.nan
        return real(logits, rows, **options)

    bad = {"model": "demo", "messages": HARBOR, "max_tokens": 20, "logprobs": True}
    good = {**ENDLESS, "stream": False, "max_tokens": 20}
    with monkeypatch.context() as patch, ThreadPoolExecutor() as threads:
        patch.setattr(workers.runner, "Drawing", poisoned)
        for _ in range(4):
            answers = [threads.submit(served.post, body) for body in (good, bad, good)]
            codes = [answer.result().status_code for answer in answers]
            assert codes == [200, 500, 200]
            assert answers[1].result().json()["error"]["code"] == "numerical_error"
    assert wait_until(served.is_idle) < 5


def test_a_client_that_waits_hears_that_the_server_is_alive(demo: LocalModel) -> None:
    config = {"gateway": {"http_port": 0, "grpc_port": 0, "limits": {"keep_alive_seconds": 0.05}}}
    with serve(demo, ClusterConfig.model_validate(config)) as patient:
        body = {"model": "demo", "prompt": [0, *range(100, 1400)], "max_tokens": 1, "stream": True}
        text = patient.post(body, "/v1/completions").text
    assert text.startswith(": keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_a_prompt_that_was_seen_is_counted_as_cached(served: Served) -> None:
    body = {"model": "demo", "prompt": [0, *range(200, 400)], "max_tokens": 2}
    usages = [served.post(body, "/v1/completions").json()["usage"] for _ in range(2)]
    assert [usage["prompt_cache_hit_tokens"] for usage in usages] == [0, 192]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == 192
    assert [usage["prompt_cache_miss_tokens"] for usage in usages] == [201, 9]


def test_a_reader_that_stops_is_cancelled(demo: LocalModel) -> None:
    limits = {"send_seconds": 0.5, "max_unread_tokens": 20}
    config = {"gateway": {"http_port": 0, "grpc_port": 0, "limits": limits}}
    with serve(demo, ClusterConfig.model_validate(config)) as impatient:
        body = {**ENDLESS, "n": 8, "max_tokens": 900, "logprobs": True, "top_logprobs": 20, "temperature": 2}
        with open_stream(impatient, body, receive_buffer=4096):
            wait_until(lambda: not impatient.is_idle())
            wait_until(impatient.is_idle, 20)
        page = httpx2.get(f"{impatient.url}/metrics", trust_env=False).text
        assert 'outcome="timeout"' in page or 'outcome="slow_reader"' in page
        assert 'outcome="ok"' not in page


def test_draining_refuses_new_requests_and_finishes_open_ones(demo: LocalModel) -> None:
    with serve(demo) as leaving, open_stream(leaving, {**ENDLESS, "max_tokens": 30}) as connection:
        connection.recv(100)
        with ThreadPoolExecutor(1) as threads:
            drained = threads.submit(lambda: leaving.run(leaving.server.drain()))
            wait_until(lambda: leaving.server.gateway.is_draining)
            refused = leaving.post({"model": "demo", "messages": HARBOR})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert httpx2.get(f"{leaving.url}/readyz", trust_env=False).status_code == 503
            assert httpx2.get(f"{leaving.url}/healthz", trust_env=False).status_code == 200
            assert drained.result(30) is True
        text = b""
        while b"[DONE]" not in text:
            text += connection.recv(65536)


def test_what_the_server_says_of_itself(served: Served) -> None:
    served.post({"model": "demo", "messages": HARBOR, "max_tokens": 2, "nobody_knows_this": 1})
    with httpx2.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        assert len(client.get("/version").json()["weights_digest"]) == 64
        page = client.get("/metrics").text
    assert 'eightfold_requests_total{outcome="ok",protocol="http"}' in page
    assert "eightfold_time_to_first_token_seconds_bucket" in page
    pages = [line for line in page.splitlines() if line.startswith("eightfold_worker_pages{")]
    assert sum(float(line.split()[1]) for line in pages) == 1024
    unknown = next(line for line in page.splitlines() if line.startswith("eightfold_unknown_fields_total"))
    assert float(unknown.split()[1]) >= 1


def test_requests_still_open_when_the_engine_stops_are_told_so(demo: LocalModel) -> None:
    with serve(demo) as ending, open_stream(ending) as connection:
        connection.recv(1000)
        ending.run(ending.server.gateway.backend.stop())  # type: ignore[attr-defined]
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert Overloaded("").row.code in text
        assert "[DONE]" not in text


@pytest.mark.parametrize("key", ["http_port", "grpc_port"])
def test_a_port_that_is_taken_is_named(served: Served, key: str) -> None:
    taken = served.server.http_port if key == "http_port" else served.server.grpc_port
    section = GatewaySection.model_validate({"http_port": 0, "grpc_port": 0, key: taken})

    async def second() -> GatewayServer:
        return GatewayServer(served.server.gateway.backend, "demo", section, "test")

    with pytest.raises(ConfigError, match=rf"gateway: {key}: 127\.0\.0\.1:{taken} cannot be listened at"):
        served.run(second())
