"""The router's choices, from reports made by hand."""

from collections import Counter

import pytest

from cluster.router import NoRoute, Route, Router
from model.inputs import PAGE_SIZE
from model.sampling_params import SamplingParams
from workers.load import WorkerLoad
from workers.prefix import PrefixHasher
from workers.sequence import Request
from workers.transport.protocol import Address
from workers.wire import Role, WorkerStatus, short_key

HASHER = PrefixHasher(b"s" * 32)


def ask(prompt: tuple[int, ...], max_tokens: int = 64, uid: str = "r", tenant: str = "") -> Request:
    return Request(uid, prompt, SamplingParams(max_tokens=max_tokens), tenant)


def keys_of(prompt: tuple[int, ...], num_pages: int, tenant: str = "") -> tuple[str, ...]:
    keys: list[bytes] = []
    HASHER.extend(keys, tenant, prompt, num_pages)
    return tuple(map(short_key, keys))


def is_complete(router: Router) -> bool:
    return router.has("prefill") and router.has("decode")


def tell(
    router: Router,
    name: str,
    *,
    queued: int = 0,
    used: int = 0,
    num_pages: int = 1000,
    running: int = 0,
    full: bool = False,
    added: tuple[str, ...] = (),
    removed: tuple[str, ...] = (),
) -> None:
    load = WorkerLoad(running=running, free_pages=num_pages - used, num_pages=num_pages, queued_tokens=queued)
    role = router.statuses[name].role
    router.report(name, WorkerStatus(role, load, is_full=full, keys_added=added, keys_removed=removed))


def a_router(num_prefill: int = 2, num_decode: int = 2, local: int = 100) -> Router:
    router = Router(HASHER, local)
    roles: list[tuple[Role, int]] = [("prefill", num_prefill), ("decode", num_decode)]
    for role, count in roles:
        for i in range(count):
            router.join(Address(f"{role}-{i}"), role)
            tell(router, f"{role}-{i}", full=True)
    return router


def decode_of(route: Route) -> str:
    return route.decode.name if route.decode else route.first


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(0, 0), (1, 0)])
def test_without_a_decode_worker_there_is_no_route(num_prefill: int, num_decode: int) -> None:
    router = a_router(num_prefill, num_decode)
    assert not is_complete(router)
    with pytest.raises(NoRoute):
        router.choose(ask((1, 2)))


def test_a_worker_that_left_is_not_chosen_and_not_listed() -> None:
    router = a_router()
    router.leave("prefill-0")
    router.leave("decode-1")
    router.leave("never heard of")
    router.report("prefill-0", WorkerStatus("prefill", WorkerLoad()))  # was on its way
    assert set(router.statuses) == {"prefill-1", "decode-0"}
    for i in range(4):
        route = router.choose(ask((1, 2), uid=f"{i}"))
        assert (route.first, decode_of(route)) == ("prefill-1", "decode-0")
    router.leave("decode-0")
    assert not is_complete(router)


def test_prefill_goes_where_least_is_left_to_compute() -> None:
    prompt = tuple(range(1000))
    router = a_router()
    tell(router, "prefill-0", queued=500)
    assert router.choose(ask(prompt)).first == "prefill-1"
    router = a_router()
    tell(router, "prefill-0", queued=500, added=keys_of(prompt, 10))  # 860 left
    route = router.choose(ask(prompt))
    assert (route.first, route.num_hit) == ("prefill-0", 640)
    router = a_router()
    tell(router, "prefill-0", queued=1400, added=keys_of(prompt, 10))  # now to wait costs more
    route = router.choose(ask(prompt))
    assert (route.first, route.num_hit) == ("prefill-1", 0)


def test_a_hit_is_a_prefix_and_a_tenants_own() -> None:
    prompt = tuple(range(300))
    router = a_router()
    keys = keys_of(prompt, 4)
    tell(router, "prefill-0", added=keys[1:])  # its beginning is gone
    tell(router, "prefill-1", added=keys_of(prompt, 4, "other"))
    assert router.choose(ask(prompt)).num_hit == 0
    router = a_router()
    tell(router, "prefill-1", added=keys_of(prompt, 4, "other"))
    assert router.choose(ask(prompt, tenant="other")) == Route(
        "prefill-1", Address("decode-0"), 4 * PAGE_SIZE
    )


def test_the_last_token_of_a_prompt_is_no_hit() -> None:
    prompt = tuple(range(2 * PAGE_SIZE))
    router = a_router()
    tell(router, "prefill-1", added=keys_of(prompt, 2))
    assert router.choose(ask(prompt)).num_hit == PAGE_SIZE


def test_reports_add_and_remove_keys_and_full_ones_replace_them() -> None:
    prompt = tuple(range(300))
    keys = keys_of(prompt, 4)
    router = a_router(1, 1)

    def hit() -> int:
        router.settle("r")
        return router.choose(ask(prompt)).num_hit // PAGE_SIZE

    tell(router, "prefill-0", added=keys[:2])
    assert hit() == 2
    tell(router, "prefill-0", added=keys[2:])
    assert hit() == 4
    tell(router, "prefill-0", removed=keys[3:])
    assert hit() == 3
    tell(router, "prefill-0", full=True, added=keys[:1])
    assert hit() == 1
    tell(router, "prefill-0", full=True)
    assert hit() == 0
    router.join(Address("prefill-0"), "prefill")  # its successor
    tell(router, "prefill-0", full=True)
    assert hit() == 0


def test_a_little_that_is_new_runs_where_the_rest_lies() -> None:
    prompt = tuple(range(400))
    router = a_router(local=100)
    tell(router, "decode-1", added=keys_of(prompt, 5))  # 80 left
    assert router.choose(ask(prompt)) == Route("decode-1", None, 320)
    router = a_router(local=79)
    tell(router, "decode-1", added=keys_of(prompt, 5))
    route = router.choose(ask(prompt))
    assert (decode_of(route), route.num_hit) == ("decode-1", 0)  # its pages need not be sent
    assert route.first.startswith("prefill")
    router = a_router(local=100)
    tell(router, "decode-1", added=keys_of(prompt, 5))
    tell(router, "prefill-1", added=keys_of(prompt, 5))  # prefill knows as much
    assert router.choose(ask(prompt)).first == "prefill-1"


def test_decode_goes_where_the_larger_share_of_pages_stays_free() -> None:
    prompt = tuple(range(100))
    router = a_router()
    tell(router, "decode-0", used=300)
    tell(router, "decode-1", used=250, running=99)
    assert decode_of(router.choose(ask(prompt))) == "decode-1"
    router = a_router()
    tell(router, "decode-0", used=60, num_pages=100)
    tell(router, "decode-1", used=500, num_pages=1000)  # more used, and a smaller share
    assert decode_of(router.choose(ask(prompt))) == "decode-1"
    router = a_router()
    tell(router, "decode-0", used=250, running=3)
    tell(router, "decode-1", used=250, running=2)
    assert decode_of(router.choose(ask(prompt))) == "decode-1"


def test_a_worker_of_which_nothing_is_known_is_not_chosen() -> None:
    router = a_router(1, 1)
    tell(router, "decode-0", used=900)
    router.join(Address("decode-9"), "decode")
    assert decode_of(router.choose(ask((1,)))) == "decode-0"
    router.leave("decode-0")
    assert not is_complete(router)
    tell(router, "decode-9", full=True)
    assert decode_of(router.choose(ask((1,)))) == "decode-9"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_leaves_is_chosen_no_more_even_where_all_pages_lie(role: Role) -> None:
    prompt = tuple(range(300))
    router = a_router()
    name = f"{role}-0"
    tell(router, name, added=keys_of(prompt, 4))
    route = router.choose(ask(prompt))
    assert name in (route.first, decode_of(route))
    router.report(name, WorkerStatus(role, WorkerLoad(num_pages=1000), leaving=True))
    for i in range(4):
        route = router.choose(ask(prompt, uid=f"{i}"))
        assert name not in (route.first, decode_of(route))
    assert is_complete(router)
    router.report(f"{role}-1", WorkerStatus(role, WorkerLoad(num_pages=1000), leaving=True))
    assert not is_complete(router)
    with pytest.raises(NoRoute):
        router.choose(ask(prompt))


def test_equal_requests_spread_evenly_with_no_reports_in_between() -> None:
    router = a_router(4, 2)
    routes = [router.choose(ask((i, *range(99)), uid=f"{i}")) for i in range(100)]
    assert set(Counter(route.first for route in routes).values()) == {25}
    assert set(Counter(decode_of(route) for route in routes).values()) == {50}
    pairs = Counter((route.first, decode_of(route)) for route in routes)
    assert len(pairs) >= 4


def test_equal_requests_spread_evenly_when_all_are_idle_in_between() -> None:
    """One after the other, each done before the next: nobody's pages lie unused."""
    router = a_router(4, 2)
    firsts, decodes = Counter[str](), Counter[str]()
    for i in range(100):
        route = router.choose(ask((i, *range(99)), uid=f"{i}"))
        firsts[route.first] += 1
        decodes[decode_of(route)] += 1
        router.settle(f"{i}")
        for known in router._workers.values():
            known.sent.clear()  # as after a report
    assert set(firsts.values()) == {25}
    assert set(decodes.values()) == {50}


def test_work_is_counted_in_tokens() -> None:
    router = a_router(2, 2)
    long = router.choose(ask(tuple(range(1000)), max_tokens=1000, uid="long"))
    others = [router.choose(ask(tuple(range(99)), max_tokens=1, uid=f"{i}")) for i in range(10)]
    assert long.first not in {route.first for route in others}
    assert decode_of(long) not in {decode_of(route) for route in others}


def test_what_was_sent_counts_until_a_report_must_know_of_it(monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr("cluster.router.time.monotonic", lambda: now)
    router = a_router(2, 1)
    first = router.choose(ask(tuple(range(500)), uid="a")).first
    tell(router, first)  # was on its way already
    other = router.choose(ask(tuple(range(100)), uid="b")).first
    assert other != first
    now += 1
    tell(router, first)
    tell(router, other, queued=1)
    assert router.choose(ask((1, 2), uid="c")).first == first


def test_pages_count_from_the_choice_until_their_tokens_come(monkeypatch) -> None:
    """However long the prompt waits on the prefill side, where the decode worker does not know of it."""
    now = 1000.0
    monkeypatch.setattr("cluster.router.time.monotonic", lambda: now)
    router = a_router(1, 2)
    first = decode_of(router.choose(ask((1, 2), max_tokens=6000, uid="a")))
    for _ in range(3):
        now += 1
        tell(router, "decode-0")
        tell(router, "decode-1")
        uid = f"{now}"
        assert decode_of(router.choose(ask((1, 2), max_tokens=64, uid=uid))) != first
        router.settle(uid)
    router.settle("a")
    tell(router, first, used=10)
    tell(router, next(name for name in ("decode-0", "decode-1") if name != first), used=20)
    assert decode_of(router.choose(ask((1, 2), uid="b"))) == first


def test_choices_of_one_prompt_go_where_the_first_went() -> None:
    """Idle workers would each compute the prompt; the one that has begun it lets the others share."""
    router = a_router(2, 1, local=0)
    prompt = tuple(range(700))
    routes = [
        router.choose(Request(f"r-{choice}", prompt, SamplingParams(max_tokens=4), choice=choice))
        for choice in range(4)
    ]
    assert len({route.first for route in routes}) == 1
    assert [route.num_hit for route in routes] == [0, 640, 640, 640]
    for choice in range(4):
        router.settle(f"r-{choice}")
    assert router.choose(Request("other", prompt, SamplingParams(max_tokens=4))).num_hit == 0


def test_without_a_prefill_worker_short_prompts_run_where_they_decode_and_long_ones_nowhere() -> None:
    router = a_router(num_prefill=1, num_decode=1, local=100)
    router.leave("prefill-0")
    assert router.choose(ask(tuple(range(100)), uid="short")) == Route("decode-0", None, 0)
    with pytest.raises(NoRoute, match="prefill"):
        router.choose(ask(tuple(range(500, 601)), uid="long"))
    tell(router, "decode-0", added=keys_of(tuple(range(300)), 4))
    assert router.choose(ask(tuple(range(300)), uid="turn two")) == Route("decode-0", None, 256)
    router.leave("decode-0")
    with pytest.raises(NoRoute, match="decode"):
        router.choose(ask((1, 2), uid="nobody"))


def test_open_requests_are_those_that_decode_workers_tell_of_and_those_on_their_way() -> None:
    router = a_router(num_prefill=1, num_decode=2)
    assert router.num_open == 0
    router.choose(ask((1, 2), uid="ours"))
    tell(router, "decode-0", running=3)  # of another gateway
    tell(router, "prefill-0", running=9)
    assert router.num_open == 4
    router.settle("ours")
    assert router.num_open == 3
