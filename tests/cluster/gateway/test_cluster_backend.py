"""The backend over real workers in threads of this process; no Ray."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from cluster.config import ClusterConfig
from cluster.directory import Directory, WorkerEntry
from cluster.gateway.backend import ModelFacts
from cluster.gateway.cluster_backend import BackendLimits, ClusterBackend, ClusterStream
from cluster.gateway.errors import Kind, Overloaded, Refusal, ReplicaLost
from cluster.gateway.server import GatewayServer
from cluster.router import Router
from model.errors import RequestError
from model.sampling_params import SamplingParams
from model.text import load_text
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from tests.cluster.gateway.serving import HARBOR, HARBOR_ANSWER, Served
from tests.workers.workers import SECRET, TOKEN, Worker, running, soon, stranger
from workers.local import LocalModel
from workers.prefix import PrefixHasher
from workers.sequence import Request, Token
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import Message
from workers.transport.protocol import Address, Deadline
from workers.wire import Role


class Prompt(NamedTuple):
    ids: tuple[int, ...]
    answer: list[int]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Prompt]:
    encode = Tokenizer.load(DEMO).encode
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    return {one["name"]: Prompt(tuple(encode(one["prompt"])), one["output_ids"]) for one in prompts}


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@dataclass
class Listed:
    """A directory that a test writes."""

    entries: dict[str, tuple[Role, Address]] = field(default_factory=dict)
    is_broken: bool = False

    def add(self, role: Role, worker: Worker) -> None:
        self.entries[worker.name] = role, worker.endpoint.address

    async def __call__(self) -> Directory:
        if self.is_broken:
            raise RuntimeError("the supervisor is away")
        return Directory(
            workers=tuple(
                WorkerEntry(role, "engine", "node", 1, address) for role, address in self.entries.values()
            )
        )


def a_backend(model: LocalModel, listed: Listed, limits: BackendLimits) -> ClusterBackend:
    context = min(model.config.max_position_embeddings, 16384)
    facts = ModelFacts(model.config, *load_text(DEMO, model.config), model.checkpoint.digest, context)
    router = Router(PrefixHasher(SECRET), 512)
    return ClusterBackend(facts, PeerEndpoint(EndpointConfig("gateway", TOKEN)), router, listed, limits)


@asynccontextmanager
async def started(
    model: LocalModel, listed: Listed, limits: BackendLimits | None = None
) -> AsyncIterator[ClusterBackend]:
    backend = a_backend(model, listed, limits or BackendLimits())
    backend.start()
    try:
        if {role for role, _ in listed.entries.values()} == {"prefill", "decode"}:
            await backend.wait_until_ready(10)
        yield backend
    finally:
        await backend.stop()


@contextmanager
def pair(model: LocalModel, **options: Any) -> Iterator[tuple[Listed, Worker, Worker]]:
    """One worker of each role."""
    with (
        running(model, "prefill", "prefill") as prefill,
        running(model, "decode", "decode", **options) as decode,
    ):
        listed = Listed()
        listed.add("prefill", prefill)
        listed.add("decode", decode)
        yield listed, prefill, decode


async def read(stream: ClusterStream) -> list[int]:
    """A whole answer; it must come in order."""
    tokens = [token async for token in stream]
    assert [token.position for token in tokens] == list(
        range(tokens[0].position, tokens[0].position + len(tokens))
    )
    return [token.token_id for token in tokens]


async def eventually(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


# The order of tokens


def a_stream(decode: str | None = "decode") -> ClusterStream:
    request = Request("r", (1, 2, 3), greedy())
    return ClusterStream(request, "prefill", decode, lambda uid: None)


def token(position: int, reason: Any = None) -> Token:
    return Token("r", 10 * position, position, reason)


def queued(stream: ClusterStream) -> list[int]:
    out = []
    while not stream.queue.empty():
        item = stream.queue.get_nowait()
        assert isinstance(item, Token)
        out.append(item.position)
    return out


def test_tokens_are_put_back_in_order() -> None:
    stream = a_stream()
    assert not stream.push(token(4), "decode")
    assert not stream.push(token(5, "stop"), "decode")
    assert queued(stream) == []
    assert stream.push(token(3), "prefill")
    assert queued(stream) == [3, 4, 5]


def test_what_came_before_does_not_come_again() -> None:
    stream = a_stream()
    for position in (3, 4, 3, 4):
        assert not stream.push(token(position), "decode")
    assert queued(stream) == [3, 4]
    assert stream.needs == {"decode"}
    assert stream.push(token(5, "length"), "decode")
    assert queued(stream) == [5]


def test_a_stream_needs_its_first_worker_until_it_has_its_token() -> None:
    stream = a_stream()
    assert stream.needs == {"prefill", "decode"}
    stream.push(token(4), "decode")
    assert stream.needs == {"prefill", "decode"}  # the first token may be lost with the worker
    stream.push(token(3), "prefill")
    assert stream.needs == {"decode"}
    stream = a_stream()
    stream.push(token(3), "prefill")
    assert stream.needs == {"prefill", "decode"}  # not handed over yet
    assert a_stream(None).needs == {"prefill"}


# Answers


def test_many_answers_at_once(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            names = ["code", "chat", "lookup_300"] * 3
            streams = [
                await backend.generate(Request(f"{i}", oracle[name].ids, greedy(6)))
                for i, name in enumerate(names)
            ]
            assert backend.load().waiting == len(names)
            answers = await asyncio.gather(*map(read, streams))
            assert answers == [oracle[name].answer[:6] for name in names]
            load = backend.load()
            assert (load.waiting, load.running) == (0, 0)
            assert load.num_pages == 256
            assert not any(known.coming for known in backend._router._workers.values())

    with pair(demo) as (listed, _, _):
        run(work())


def test_a_next_turn_runs_where_its_pages_lie(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            prompt = oracle["chat"].ids
            answer = await read(await backend.generate(Request("a", prompt, greedy(150))))
            await asyncio.sleep(0.3)  # a report
            turn = (*prompt, *answer, *oracle["code"].ids)
            stream = await backend.generate(Request("b", turn, greedy(2)))
            tokens = [token async for token in stream]
            assert stream.first == "decode"
            assert tokens[0].num_prompt_cached == (len(prompt) + 149) // 64 * 64

    with pair(demo) as (listed, _, _):
        run(work())


def test_a_cancelled_request_frees_its_pages_everywhere(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            for num_read in (0, 1, 3):
                stream = await backend.generate(Request("r", oracle["lookup_300"].ids, greedy(5000)))
                for _ in range(num_read):
                    await anext(stream)
                await stream.aclose()
                await stream.aclose()
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
                assert backend.load().waiting == backend.load().running == 0
                await eventually(lambda: prefill.holds_nothing and decode.holds_nothing)

    with pair(demo) as (listed, prefill, decode):
        run(work())


def test_more_than_may_wait_are_refused(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed, BackendLimits(max_waiting=2)) as backend:
            streams = [
                await backend.generate(Request(f"{i}", oracle["lookup_300"].ids, greedy(3))) for i in range(2)
            ]
            with pytest.raises(Overloaded, match="2 requests"):
                await backend.generate(Request("more", oracle["code"].ids, greedy()))
            await asyncio.gather(*map(read, streams))
            assert await read(await backend.generate(Request("now", oracle["code"].ids, greedy(3))))

    with pair(demo) as (listed, _, _):
        run(work())


def test_a_request_that_cannot_run_and_one_whose_time_is_over(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed, BackendLimits(request_seconds=1.0)) as backend:
            stream = await backend.generate(Request("r", (0, 9999), greedy()))
            with pytest.raises(RequestError, match="9999"):
                await anext(stream)
            stream = await backend.generate(Request("s", oracle["code"].ids, greedy(8000)))
            with pytest.raises(Refusal) as caught:
                await read(stream)
            assert caught.value.kind is Kind.TIMEOUT
            assert backend.load().running == 0

    with pair(demo) as (listed, _, _):
        run(work())


def test_a_reader_that_is_too_slow_loses_its_request(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed, BackendLimits(max_unread=5)) as backend:
            slow = await backend.generate(Request("slow", oracle["code"].ids, greedy(5000)))
            await eventually(lambda: backend.load().running == backend.load().waiting == 0)
            got = [(await anext(slow)).token_id for _ in range(6)]
            assert got == oracle["code"].answer[:6]
            with pytest.raises(Refusal) as caught:
                await read(slow)
            assert caught.value.kind is Kind.SLOW_READER
            await eventually(lambda: decode.holds_nothing)
            assert await read(await backend.generate(Request("r", oracle["code"].ids, greedy(3))))

    with pair(demo) as (listed, _, decode):
        run(work())


def test_a_stop_fails_what_is_open(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            started_one = await backend.generate(Request("a", oracle["code"].ids, greedy(5000)))
            await anext(started_one)
            waiting = await backend.generate(Request("b", oracle["lookup_300"].ids, greedy(5000)))
            await backend.stop()
            for stream in (started_one, waiting):
                with pytest.raises(Overloaded, match="shutting down"):
                    await read(stream)
            assert not backend.is_ready
            with pytest.raises(Overloaded):
                await backend.generate(Request("c", oracle["code"].ids, greedy()))
            await started_one.aclose()

    with pair(demo) as (listed, prefill, decode):
        run(work())
        soon(lambda: prefill.holds_nothing and decode.holds_nothing)


# Workers that come and go


def test_without_workers_nothing_is_taken_on(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, Listed()) as backend:
            assert not backend.is_ready
            with pytest.raises(Overloaded, match="not running"):
                await backend.generate(Request("r", oracle["code"].ids, greedy()))
            with pytest.raises(TimeoutError):
                await backend.wait_until_ready(0.2)

    run(work())


def test_a_lost_worker_fails_the_requests_that_need_it_and_its_successor_is_used(
    demo: LocalModel, oracle
) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            moved = await backend.generate(Request("moved", oracle["code"].ids, greedy(3000)))
            await anext(moved)
            await anext(moved)
            held = await backend.generate(Request("held", oracle["lookup_1000"].ids, greedy(8)))
            prefill.end()
            with pytest.raises(ReplicaLost):
                await read(held)
            assert not backend.is_ready
            for _ in range(20):
                assert (await anext(moved)).finish_reason is None  # needs nobody but its decode worker
            listed.is_broken = True  # and nobody says who is there
            await asyncio.sleep(0.7)
            listed.is_broken = False
            listed.add("prefill", stack.enter_context(running(demo, "prefill", "prefill")))
            await backend.wait_until_ready(10)
            again = await backend.generate(Request("again", oracle["chat"].ids, greedy(4)))
            assert await read(again) == oracle["chat"].answer[:4]
            decode.end()
            with pytest.raises(ReplicaLost):
                await read(moved)

    with ExitStack() as stack:
        listed = Listed()
        prefill = stack.enter_context(running(demo, "prefill", "prefill", is_idle_at_end=False))
        decode = stack.enter_context(running(demo, "decode", "decode", is_idle_at_end=False))
        listed.add("prefill", prefill)
        listed.add("decode", decode)
        run(work())


@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_successor_that_is_there_before_the_loss_was_read(
    demo: LocalModel, oracle, is_noticed: bool
) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            open_one = await backend.generate(Request("a", oracle["code"].ids, greedy(5000)))
            await anext(open_one)
            decode.end()  # all of this happens before the loop turns
            listed.add("decode", stack.enter_context(running(demo, "decode", "decode")))
            if is_noticed:
                backend._endpoint.pump(0)  # as when it meets another one: the loss waits to be read
            backend._meet((await listed()).workers)
            with pytest.raises(ReplicaLost):
                await read(open_one)
            await asyncio.sleep(1.0)
            assert backend.is_ready
            again = await backend.generate(Request("again", oracle["chat"].ids, greedy(4)))
            assert await read(again) == oracle["chat"].answer[:4]

    with ExitStack() as stack:
        listed = Listed()
        decode = stack.enter_context(running(demo, "decode", "decode", is_idle_at_end=False))
        listed.add("prefill", stack.enter_context(running(demo, "prefill", "prefill")))
        listed.add("decode", decode)
        run(work())


def test_a_worker_that_was_replaced_while_it_hangs_is_left(demo: LocalModel, oracle) -> None:
    """The directory names another one in its place: nobody waits for the first to be taken for dead."""
    hang, go_on = threading.Event(), threading.Event()

    async def work() -> None:
        async with started(demo, listed) as backend:
            step = decode.engine.step

            def stuck(*args: Any) -> Any:
                if hang.is_set():
                    go_on.wait(30)
                return step(*args)

            decode.engine.step = stuck  # type: ignore[method-assign,assignment]
            stream = await backend.generate(Request("a", oracle["code"].ids, greedy(5000)))
            await anext(stream)
            await anext(stream)
            hang.set()
            listed.add("decode", stack.enter_context(running(demo, "decode", "decode")))
            with pytest.raises(ReplicaLost):
                await read(stream)
            await backend.wait_until_ready(10)
            again = await backend.generate(Request("b", oracle["chat"].ids, greedy(4)))
            assert await read(again) == oracle["chat"].answer[:4]
            go_on.set()  # the first one wakes up and finds nobody
            await eventually(lambda: decode.holds_nothing)

    with ExitStack() as stack:
        listed = Listed()
        decode = stack.enter_context(running(demo, "decode", "decode"))
        stack.callback(go_on.set)
        listed.add("prefill", stack.enter_context(running(demo, "prefill", "prefill")))
        listed.add("decode", decode)
        run(work())


def test_a_silent_worker_is_taken_for_dead(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed, BackendLimits(silence_seconds=1.0)) as backend:
            listed.entries["silent"] = "decode", silent.endpoint.address
            await eventually(lambda: "silent" in backend.statuses)
            greeting.set()
            greeter.join()
            del listed.entries["decode"]
            backend._lose("decode", "it is not there")
            stream = await backend.generate(Request("r", oracle["code"].ids, greedy()))
            assert stream.decode == "silent"
            listed.add("decode", decode)
            with pytest.raises(ReplicaLost):
                await read(stream)
            del listed.entries["silent"]
            await backend.wait_until_ready(10)
            again = await backend.generate(Request("again", oracle["code"].ids, greedy(4)))
            assert await read(again) == oracle["code"].answer[:4]

    with pair(demo) as (listed, _, decode), stranger("silent") as silent:
        greeting = threading.Event()

        def greet() -> None:
            while not greeting.is_set():
                silent.endpoint.pump(0.01)

        greeter = threading.Thread(target=greet)
        greeter.start()
        try:
            run(work())
        finally:
            greeting.set()


def test_a_gateway_that_was_away_does_not_blame_the_workers(
    demo: LocalModel, oracle, monkeypatch, caplog
) -> None:
    """Stopped for longer than a worker may be silent, it hears them out first, all that they have said."""
    monkeypatch.setattr("cluster.gateway.cluster_backend._MAIL_AT_ONCE", 1)

    async def work() -> None:
        async with started(demo, listed, BackendLimits(silence_seconds=1.0)) as backend:
            stream = await backend.generate(Request("r", oracle["code"].ids, greedy(32)))
            await anext(stream)
            for _ in range(2):
                time.sleep(1.3)
                await asyncio.sleep(0.05)
            assert len([token async for token in stream]) == 31
            assert "is lost" not in caplog.text

    with pair(demo) as (listed, _, _):
        run(work())


def test_a_worker_that_cannot_be_reached_harms_nobody(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            listed.entries["deaf"] = "decode", deaf.endpoint.address
            await asyncio.sleep(1.0)
            for i in range(4):
                stream = await backend.generate(Request(f"{i}", oracle["code"].ids, greedy(4)))
                assert await read(stream) == oracle["code"].answer[:4]
            assert "deaf" not in backend.statuses

    with pair(demo) as (listed, _, _), stranger("deaf") as deaf:
        run(work())


def test_a_worker_that_sends_nonsense_is_left(demo: LocalModel) -> None:
    async def work() -> None:
        async with started(demo, listed) as backend:
            listed.entries["odd"] = "decode", odd.endpoint.address
            await eventually(lambda: "odd" in backend.statuses)
            is_met.set()
            await eventually(lambda: "odd" not in backend.statuses)
            assert backend.is_ready

    with pair(demo) as (listed, _, _), stranger("odd") as odd:
        is_met = threading.Event()

        def speak() -> None:
            while not is_met.is_set():
                odd.endpoint.pump(0.01)
            odd.endpoint.send("gateway", Message(999), Deadline.after(5))
            listed.entries.pop("odd")

        speaker = threading.Thread(target=speak)
        speaker.start()
        run(work())
        speaker.join()


# The whole gateway over it


@contextmanager
def served(model: LocalModel, listed: Listed, worker: Worker) -> Iterator[Served]:
    config = ClusterConfig.model_validate({"gateway": {"http_port": 0, "grpc_port": 0}})
    ready: list[Served] = []
    is_up, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def life() -> None:
        async with started(model, listed) as backend:
            server = GatewayServer(backend, "demo", config.gateway, "test")
            await server.start()
            ready.append(Served(server, worker.engine, loop))
            is_up.set()
            await stop.wait()
            await server.stop()

    def thread() -> None:
        try:
            loop.run_until_complete(life())
        finally:
            is_up.set()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    serving = threading.Thread(target=thread)
    serving.start()
    try:
        assert is_up.wait(30)
        assert ready, "the server did not start"
        yield ready[0]
        soon(ready[0].is_idle)
    finally:
        loop.call_soon_threadsafe(stop.set)
        serving.join(30)


def test_the_openai_client_gets_its_answer_and_the_next_turn_finds_it(demo: LocalModel) -> None:
    with pair(demo) as (listed, _, decode), served(demo, listed, decode) as gateway:
        with gateway.openai() as client:
            options: dict[str, Any] = {"model": "demo", "temperature": 0}
            answer = client.chat.completions.create(messages=HARBOR, **options)
            assert answer.choices[0].message.content == HARBOR_ANSWER
            assert answer.usage
            assert answer.usage.prompt_cache_hit_tokens == 0  # type: ignore[attr-defined]
            long = client.chat.completions.create(
                messages=HARBOR, max_tokens=200, extra_body={"ignore_eos": True}, n=2, **options
            )
            assert [choice.finish_reason for choice in long.choices] == ["length", "length"]
            time.sleep(0.3)  # a report
            told = [*HARBOR, {"role": "assistant", "content": HARBOR_ANSWER * 12}]
            first = client.chat.completions.create(
                messages=[*told, {"role": "user", "content": "And?"}], max_tokens=90,
                extra_body={"ignore_eos": True}, **options,
            )  # fmt: skip
            time.sleep(0.3)
            content = first.choices[0].message.content
            second = client.chat.completions.create(
                messages=[
                    *told, {"role": "user", "content": "And?"}, {"role": "assistant", "content": content},
                    {"role": "user", "content": "Then?"},
                ],
                max_tokens=4, **options,
            )  # fmt: skip
        assert first.usage
        assert second.usage
        assert second.usage.prompt_cache_hit_tokens >= first.usage.prompt_tokens // 64 * 64 > 0  # type: ignore[attr-defined]
