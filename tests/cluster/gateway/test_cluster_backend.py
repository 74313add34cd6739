"""The backend over real workers in threads of this process; no Ray."""

import asyncio
import time
from typing import Any

import pytest

from cluster.gateway.cluster_backend import BackendLimits
from cluster.gateway.errors import Kind, Overloaded, Refusal
from model.errors import RequestError
from tests.cluster.gateway.backends import Prompt, eventually, greedy, pair, prompts, read, run, started
from tests.cluster.gateway.serving import HARBOR, HARBOR_ANSWER, in_thread
from tests.workers.workers import soon
from workers.local import LocalModel
from workers.sequence import Request


@pytest.fixture(scope="module")
def oracle() -> dict[str, Prompt]:
    return prompts()


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
            with pytest.raises(Overloaded, match="2 requests are waiting"):
                backend.check_room()
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


# The whole gateway over it


def test_the_openai_client_gets_its_answer_and_the_next_turn_finds_it(demo: LocalModel) -> None:
    with pair(demo) as (listed, _, decode), in_thread(started(demo, listed), decode.engine) as gateway:
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


# No prefill worker


def test_a_long_prompt_waits_for_a_prefill_worker_and_a_short_one_does_not(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        entry = listed.entries.pop("prefill")
        async with started(demo, listed, BackendLimits(prefill_seconds=20.0)) as backend:
            await backend.wait_until_ready(10)
            short = await backend.generate(Request("short", oracle["code"].ids, greedy(3)))
            assert short.first == "decode"
            assert await read(short) == oracle["code"].answer[:3]
            await eventually(lambda: listed.calls == 1)
            ids = oracle["lookup_300"].ids * 2
            long = asyncio.create_task(backend.generate(Request("long", ids, greedy(3))))
            gone = asyncio.create_task(backend.generate(Request("gone", ids, greedy(3))))
            await eventually(lambda: listed.calls > 3)  # as long as they wait
            assert backend.load().waiting == 2
            gone.cancel()
            await eventually(lambda: backend.load().waiting == 1)
            listed.entries["prefill"] = entry
            stream = await long
            assert stream.first == "prefill"
            assert len(await read(stream)) == 3
            calls = listed.calls
            await asyncio.sleep(1.2)
            assert listed.calls == calls

    with pair(demo) as (listed, _, _):
        run(work())


def test_who_waits_in_vain_for_a_prefill_worker_is_told_when_to_come_again(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        del listed.entries["prefill"]
        async with started(demo, listed, BackendLimits(prefill_seconds=0.3)) as backend:
            await backend.wait_until_ready(10)
            with pytest.raises(Overloaded, match="still starting") as caught:
                await backend.generate(Request("long", oracle["lookup_300"].ids * 2, greedy(3)))
            assert caught.value.retry_after == 10.0
            assert backend.load().waiting == 0

    with pair(demo) as (listed, _, _):
        run(work())


def test_where_prefill_stays_its_loss_is_no_reason_to_wait(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        del listed.entries["prefill"]
        async with started(demo, listed) as backend:
            await eventually(lambda: bool(backend.statuses))
            assert not backend.is_ready
            with pytest.raises(Overloaded, match="not running"):
                await backend.generate(Request("short", oracle["code"].ids, greedy(3)))

    with pair(demo) as (listed, _, _):
        run(work())


def test_more_than_may_be_open_are_refused(demo: LocalModel, oracle) -> None:
    async def work() -> None:
        async with started(demo, listed, BackendLimits(max_open=2)) as backend:
            streams = [
                await backend.generate(Request(f"{i}", oracle["code"].ids, greedy(300))) for i in range(2)
            ]
            for stream in streams:
                await anext(stream)  # running, and not waiting any more
            await eventually(lambda: not backend._router._workers["decode"].coming)
            with pytest.raises(Overloaded, match="2 requests are open"):
                backend.check_room()
            await streams[0].aclose()
            await eventually(lambda: backend._router.num_open < 2)  # when its worker has told
            assert await read(await backend.generate(Request("now", oracle["code"].ids, greedy(3))))

    with pair(demo) as (listed, _, _):
        run(work())
