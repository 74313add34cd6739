import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.inputs import PAGE_SIZE
from model.sampling_params import SamplingParams
from workers.allocation import PageAllocator, Wait
from workers.page_pool import PagePool, pages_for
from workers.prefix import PrefixHasher
from workers.sequence import Request, Sequence

NUM_PAGES = 10


def a_request(pages: str, more: int = 1, tenant: str = "", uid: str = "r") -> Request:
    """A prompt of full pages, one a letter, and so many tokens more."""
    ids = tuple(ord(letter) for letter in pages for _ in range(PAGE_SIZE)) + (0,) * more
    return Request(uid, ids, SamplingParams(max_tokens=1), tenant)


def an_allocator(num_pages: int = NUM_PAGES) -> tuple[PagePool, PageAllocator]:
    pool = PagePool(num_pages)
    return pool, PageAllocator(pool, PrefixHasher(b"s" * 16))


def start(allocator: PageAllocator, request: Request, answer: int = 1) -> Sequence | Wait:
    return allocator.start(request, allocator.keys_of(request), len(request.prompt_ids) + answer)


def started(allocator: PageAllocator, request: Request, answer: int = 1) -> Sequence:
    sequence = start(allocator, request, answer)
    assert isinstance(sequence, Sequence), sequence
    return sequence


def advance(allocator: PageAllocator, sequence: Sequence, num_tokens: int) -> None:
    sequence.num_cached = min(sequence.num_cached + num_tokens, sequence.num_tokens)
    allocator.publish(sequence)


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences that start, run in pieces, answer and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.allocator = an_allocator()
        self.running: list[tuple[Request, Sequence]] = []

    @rule(
        pages=st.text("ab", max_size=4),
        more=st.integers(1, PAGE_SIZE),
        tenant=st.sampled_from(["", "other"]),
        answer=st.integers(1, 2 * PAGE_SIZE),
    )
    def start(self, pages: str, more: int, tenant: str, answer: int) -> None:
        request = a_request(pages, more, tenant)
        keys = self.allocator.keys_of(request)
        known = len(self.pool.match(keys))
        free_before = self.pool.num_free
        sequence = start(self.allocator, request, answer)
        next_page = request.prompt_ids[: (known + 1) * PAGE_SIZE]
        is_coming = known < len(keys) and any(
            other.tenant == tenant
            and other.prompt_ids[: len(next_page)] == next_page
            and len(other.prompt_ids) > len(next_page)
            and running.num_cached < len(next_page)
            for other, running in self.running
        )
        assert (sequence is Wait.FOR_PREFIX) == is_coming
        if isinstance(sequence, Wait):
            assert self.pool.num_free == free_before
            return
        assert len(sequence.pages) == pages_for(len(request.prompt_ids) + answer)
        assert sequence.num_shared == known
        assert sequence.num_cached == known * PAGE_SIZE < sequence.num_prompt
        self.running.append((request, sequence))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 3 * PAGE_SIZE))
    def advance(self, data: st.DataObject, num_tokens: int) -> None:
        _, sequence = data.draw(st.sampled_from(self.running))
        advance(self.allocator, sequence, num_tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        _, sequence = data.draw(st.sampled_from(self.running))
        if sequence.num_tokens < len(sequence.pages) * PAGE_SIZE:
            sequence.tokens.append(ord("a"))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.running) - 1))
        self.allocator.end(self.running.pop(place)[1])

    @invariant()
    def pages_are_held_by_those_who_may_see_them(self) -> None:
        held = {page for _, sequence in self.running for page in sequence.pages}
        assert self.pool.num_free == NUM_PAGES - len(held)
        content: dict[int, tuple[str, tuple[int, ...]]] = {}
        writers: dict[int, int] = {}
        for request, sequence in self.running:
            for place, page in enumerate(sequence.pages):
                if place >= sequence.num_shared:
                    writers[page] = writers.get(page, 0) + 1
                if (place + 1) * PAGE_SIZE <= sequence.num_cached:
                    says = request.tenant, tuple(sequence.tokens[: (place + 1) * PAGE_SIZE])
                    assert content.setdefault(page, says) == says
        assert all(count == 1 for count in writers.values())

    def teardown(self) -> None:
        for _, sequence in self.running:
            self.allocator.end(sequence)
        self.pool.check_idle()
        for pages in ("aaaa", "abab", "bbbb"):  # nobody is coming any more
            self.allocator.end(started(self.allocator, a_request(pages)))


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_that_begins_alike_waits_and_shares() -> None:
    pool, allocator = an_allocator()
    first = started(allocator, a_request("abc"))
    same, fork = a_request("abc"), a_request("ax")
    assert start(allocator, same) is Wait.FOR_PREFIX
    assert start(allocator, fork) is Wait.FOR_PREFIX
    advance(allocator, first, PAGE_SIZE)
    assert start(allocator, same) is Wait.FOR_PREFIX  # the second page is still to come
    forked = started(allocator, fork)  # what it has in common is there
    assert forked.pages[0] == first.pages[0]
    advance(allocator, first, 2 * PAGE_SIZE)
    second = started(allocator, same)
    assert second.pages[:3] == first.pages[:3]
    assert second.num_cached == 3 * PAGE_SIZE
    for sequence in (first, second, forked):
        allocator.end(sequence)
    pool.check_idle()


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_who_waits_goes_on_when_the_one_before_is_cancelled(num_done: int) -> None:
    pool, allocator = an_allocator()
    first = started(allocator, a_request("abc"))
    advance(allocator, first, num_done * PAGE_SIZE)
    second = a_request("abc")
    assert start(allocator, second) is Wait.FOR_PREFIX
    allocator.end(first)
    sequence = started(allocator, second)
    assert sequence.num_shared == num_done
    assert start(allocator, a_request("abc")) is Wait.FOR_PREFIX  # now for the second
    allocator.end(sequence)
    pool.check_idle()


def test_tenants_share_nothing_and_wait_for_nothing() -> None:
    pool, allocator = an_allocator()
    mine = started(allocator, a_request("ab", tenant="mine"))
    yours = started(allocator, a_request("ab", tenant="yours"))
    advance(allocator, mine, 3 * PAGE_SIZE)
    advance(allocator, yours, 3 * PAGE_SIZE)
    assert not set(mine.pages) & set(yours.pages)
    third = started(allocator, a_request("ab", tenant="yours"))
    assert third.pages[:2] == yours.pages[:2]
    for sequence in (mine, yours, third):
        allocator.end(sequence)
    pool.check_idle()


def test_the_last_token_of_a_prompt_always_runs() -> None:
    pool, allocator = an_allocator()
    first = started(allocator, a_request("a", more=PAGE_SIZE))
    advance(allocator, first, 2 * PAGE_SIZE)
    second = started(allocator, a_request("a", more=PAGE_SIZE))
    assert second.num_shared == 1
    advance(allocator, second, PAGE_SIZE)  # a page of the same content as one that is known
    allocator.end(second)
    allocator.end(first)
    pool.check_idle()


def test_where_room_lacks_nothing_is_taken() -> None:
    pool, allocator = an_allocator(4)
    first = started(allocator, a_request("ab"))
    advance(allocator, first, 3 * PAGE_SIZE)
    assert start(allocator, a_request("abc"), answer=2 * PAGE_SIZE) is Wait.FOR_ROOM
    assert pool.num_free == 1
    second = started(allocator, a_request("ab"))
    allocator.end(first)
    allocator.end(second)
    pool.check_idle()


def test_pages_of_an_answer_are_found_by_the_next_turn() -> None:
    pool, allocator = an_allocator()
    first = started(allocator, a_request("a"), answer=PAGE_SIZE)
    first.tokens += [ord("b")] * PAGE_SIZE
    advance(allocator, first, 3 * PAGE_SIZE)
    turn = Request("turn", (*first.tokens[: 2 * PAGE_SIZE], 7), SamplingParams(max_tokens=1))
    allocator.end(first)
    assert started(allocator, turn).num_shared == 2
    assert pool.num_free == NUM_PAGES - 3
