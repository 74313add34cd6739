"""Who holds which page, and which pages hold what: one owner of all page ids, plain Python.

A page is in exactly one of three states:

    free     nobody holds it, nothing in it is worth keeping
    cached   nobody holds it, but its tokens are known by a key: it can be shared again, until it is needed
    held     one or more sequences hold it; it may have a key, and only full, unchanging pages get one
"""

from collections import OrderedDict
from collections.abc import Iterable

from model.inputs import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PagePool:
    """The pages of one cache. Giving back what is not held is a bug, and so is losing a page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # pop() takes the lowest first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._holders: dict[int, int] = {}  # held page -> how many hold it
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._changes: dict[bytes, bool] | None = None  # key -> whether it is known now

    @property
    def num_free(self) -> int:
        """Pages that can be taken: free ones, and cached ones that would be forgotten for it."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def watch(self) -> None:
        """Keep note of which keys come and go, for `take_changes`."""
        self._changes = {}

    def keys(self) -> list[bytes]:
        """Keys of all pages that can be shared."""
        return list(self._page_of)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that have come and keys that have gone since the last call."""
        assert self._changes is not None, "nobody watches"
        changes, self._changes = self._changes, {}
        added = [key for key, is_known in changes.items() if is_known]
        return added, [key for key, is_known in changes.items() if not is_known]

    def take(self, num_pages: int) -> list[int]:
        """Pages for one holder, contents undefined; ask `num_free` first. Forgets cached pages if it must."""
        assert num_pages <= self.num_free, f"{num_pages} pages asked of {self.num_free} free ones"
        while len(self._free) < num_pages:
            self._forget_one()
        pages = [self._free.pop() for _ in range(num_pages)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix of a chain of keys; nobody's state changes."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: list[int]) -> None:
        """Hold matched pages, together with whoever holds them already."""
        for page in pages:
            assert page in self._key_of, "only pages with a key can be shared"
            self._cached.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def publish(self, page: int, key: bytes) -> None:
        """Make a held, full page known by its key; a page that has this key already keeps it."""
        assert page in self._holders, "only a held page can be published"
        assert page not in self._key_of, "a page holds one run of tokens"
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key
            self._note(key, True)

    def give_back(self, pages: list[int]) -> None:
        """Let go of pages in order of position. The last are forgotten first: they depend on the others."""
        assert len(set(pages)) == len(pages), "a page stands twice in what is given back"
        assert all(page in self._holders for page in pages), "pages are given back that nobody holds"
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def forget(self, pages: Iterable[int]) -> None:
        """What these hold is worth nothing: nobody finds it from now on."""
        for page in pages:
            if key := self._key_of.pop(page, None):
                del self._page_of[key]
                self._note(key, False)

    def check_idle(self) -> None:
        """Assert that nothing is held and every page is there once: true whenever nothing runs."""
        assert not self._holders, f"{len(self._holders)} pages are still held"
        assert sorted([*self._free, *self._cached]) == list(range(self.num_pages)), (
            "a page is lost or doubled"
        )
        assert self._cached.keys() == self._key_of.keys(), "a key names a page that is not cached"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages disagree"

    def _forget_one(self) -> None:
        page, _ = self._cached.popitem(last=False)
        self.forget([page])
        self._free.append(page)

    def _note(self, key: bytes, is_known: bool) -> None:
        if self._changes is not None:
            self._changes[key] = is_known
