"""Who holds which page: one owner of all page ids, plain Python."""

from model.inputs import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PagePool:
    """The pages of one cache. Every page is free or taken; giving back what is not taken is a bug."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # pop() takes the lowest first
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_pages: int) -> list[int]:
        """Page ids for one owner; ask `num_free` first."""
        assert num_pages <= self.num_free, f"{num_pages} pages asked of {self.num_free} free ones"
        pages = [self._free.pop() for _ in range(num_pages)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Free pages that were taken."""
        assert len(set(pages)) == len(pages), "a page stands twice in what is given back"
        assert self._taken.issuperset(pages), "pages are given back that nobody holds"
        self._taken.difference_update(pages)
        self._free.extend(sorted(pages, reverse=True))

    def check_idle(self) -> None:
        """Assert that every page is back, once each: true whenever nothing runs."""
        assert not self._taken, f"{len(self._taken)} pages are still held"
        assert sorted(self._free) == list(range(self.num_pages)), "the free list lost or doubled a page"
