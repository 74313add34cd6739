"""The backend over real workers that come and go."""

import asyncio
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.gateway.cluster_backend import BackendLimits
from cluster.gateway.errors import Overloaded, ReplicaLost
from tests.cluster.gateway.backends import (
    Listed,
    Prompt,
    eventually,
    greedy,
    pair,
    prompts,
    read,
    run,
    started,
)
from tests.workers.workers import running, stranger
from workers.load import WorkerLoad
from workers.local import LocalModel
from workers.sequence import Request
from workers.transport.message import Message
from workers.transport.protocol import Deadline
from workers.wire import Kind, Role, WorkerStatus, pack


@pytest.fixture(scope="module")
def oracle() -> dict[str, Prompt]:
    return prompts()


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
            backend._meet((await listed(False)).workers)
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
            await eventually(lambda: backend.statuses["silent"].load.num_pages == 256)
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
            while "gateway" not in silent.endpoint.peers:
                silent.endpoint.pump(0.01)
            told = pack(Kind.STATUS, WorkerStatus("decode", WorkerLoad(free_pages=256, num_pages=256)))
            silent.endpoint.send("gateway", told, Deadline.after(5))
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


def test_workers_that_leave_finish_what_they_run_and_are_parted_from(demo: LocalModel, oracle) -> None:
    """Open requests go on, new ones go to others, and the connections end once nothing needs them."""

    async def work() -> None:
        async with started(demo, listed) as backend:
            old = await backend.generate(Request("old", oracle["code"].ids, greedy(300)))
            await anext(old)
            successors = [stack.enter_context(running(demo, f"{role}2", role)) for role in roles]
            for role, successor in zip(roles, successors, strict=True):
                listed.add(role, successor)
            await eventually(lambda: len(backend.statuses) == 4)
            for worker in (prefill, decode):
                worker.worker.leave()
            await eventually(lambda: prefill.worker.has_left)  # nothing of it is needed any more
            assert not decode.worker.has_left
            new = await backend.generate(Request("new", oracle["chat"].ids, greedy(8)))
            assert (new.first, new.decode) == ("prefill2", "decode2")
            assert await read(new) == oracle["chat"].answer[:8]
            assert len(await read(old)) == 299
            await eventually(lambda: decode.worker.has_left)
            await asyncio.sleep(1.2)  # the directory lists them still: nobody connects again
            assert prefill.worker.has_left
            assert decode.worker.has_left
            assert set(backend.statuses) == {"prefill2", "decode2"}

    roles: tuple[Role, ...] = ("prefill", "decode")
    with ExitStack() as stack:
        listed = Listed()
        prefill = stack.enter_context(running(demo, "prefill", "prefill"))
        decode = stack.enter_context(running(demo, "decode", "decode"))
        listed.add("prefill", prefill)
        listed.add("decode", decode)
        run(work())
