"""The tokens of one request on their way from whoever runs the model to whoever reads the answer."""

import asyncio
from collections.abc import Callable
from typing import Self

from workers.sequence import Token


class QueuedStream:
    """A `TokenStream` over a queue that a backend fills; lives in the event loop.

    Args:
        cancel: tells the backend that nobody reads any more.
    """

    def __init__(self, uid: str, cancel: Callable[[str], None]) -> None:
        self.uid, self._cancel = uid, cancel
        self.queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self.has_started = False
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        item = await self.queue.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        self._ended = True
        self._cancel(self.uid)
