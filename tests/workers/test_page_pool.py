import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.page_pool import PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (131072, 2048)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


@given(st.lists(st.integers(0, 5), max_size=40), st.randoms())
def test_pages_in_equal_pages_out(sizes: list[int], random) -> None:
    pool = PagePool(16)
    held: list[list[int]] = []
    for size in sizes:
        if size <= pool.num_free:
            held.append(pool.take(size))
        elif held:
            pool.give_back(held.pop(random.randrange(len(held))))
        all_held = [page for pages in held for page in pages]
        assert len(set(all_held)) == len(all_held) == 16 - pool.num_free
    for pages in held:
        pool.give_back(pages)
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
