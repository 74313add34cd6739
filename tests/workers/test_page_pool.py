import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.page_pool import PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (131072, 2048)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


class PoolMachine(RuleBasedStateMachine):
    """Random holders that take, publish, share and let go; every page stays in exactly one state."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.holders: list[list[int]] = []
        self.published: dict[int, bytes] = {}
        self.next_key = 0

    @rule(size=st.integers(0, 5))
    def take(self, size: int) -> None:
        if size <= self.pool.num_free:
            pages = self.pool.take(size)
            for page in pages:
                self.published.pop(page, None)  # what was cached there is forgotten
            self.holders.append(pages)

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        own = [page for pages in self.holders for page in pages if page not in self.published]
        if own:
            page, key = data.draw(st.sampled_from(own)), b"key %d" % self.next_key
            self.next_key += 1
            self.pool.publish(page, key)
            self.published[page] = key

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.published:
            page = data.draw(st.sampled_from(sorted(self.published)))
            assert self.pool.match([self.published[page], b"unknown"]) == [page]
            self.pool.share([page])
            self.holders.append([page])

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.give_back(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def free_pages_are_those_nobody_holds(self) -> None:
        held = {page for pages in self.holders for page in pages}
        assert self.pool.num_free == 12 - len(held)
        assert self.pool.num_cached == len(self.published.keys() - held)
        for page, key in self.published.items():
            assert self.pool.match([key]) == [page]

    def teardown(self) -> None:
        for pages in self.holders:
            self.pool.give_back(pages)
        self.pool.check_idle()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_the_least_recently_held_pages_are_forgotten_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4)
    first, second = pool.take(2), pool.take(2)
    for page in (*first, *second):
        pool.publish(page, b"%d" % page)
    pool.give_back(second)
    pool.give_back(first)
    pool.take(1)
    assert pool.match([b"%d" % page for page in second]) == second[:1]
    assert pool.match([b"%d" % page for page in first]) == first
    pool.take(2)
    assert pool.match([b"%d" % page for page in second]) == []
    assert pool.match([b"%d" % page for page in first]) == first[:1]


def test_a_second_page_with_the_same_content_stays_unknown() -> None:
    pool = PagePool(2)
    first, second = pool.take(1), pool.take(1)
    pool.publish(first[0], b"key")
    pool.publish(second[0], b"key")
    assert pool.match([b"key"]) == first
    pool.give_back(second)
    assert pool.num_cached == 0
    pool.give_back(first)
    assert pool.num_cached == 1
    pool.check_idle()


def test_misuse_is_caught() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="still held"):
        pool.check_idle()
    with pytest.raises(AssertionError, match="free ones"):
        pool.take(3)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.give_back([3])
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back([pages[0], pages[0]])
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.give_back(pages)
