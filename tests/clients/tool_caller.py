"""A model that calls a tool, for the way of a call through parser, protocol and client: the demo was never
taught to, and no prompt makes it."""

from collections.abc import Iterator
from typing import Any

from cluster.gateway.backend import Backend, TokenStream
from model.chat.markup import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, OUTPUT_BEGIN, TOOL_SEP
from workers.sequence import Request, Token

ARGUMENTS = '{"city": "Cork"}'
_SPOKEN = f"{CALLS_BEGIN}{CALL_BEGIN}weather{TOOL_SEP}{ARGUMENTS}{CALL_END}{CALLS_END}"


class ToolCaller:
    """Asks for the weather, and once it has a tool's output, answers as the backend underneath does."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        tokenizer = backend.facts.tokenizer
        self._spoken = [*tokenizer.encode(_SPOKEN), tokenizer.eos_id]
        self._output = tokenizer.special_id(OUTPUT_BEGIN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def generate(self, request: Request) -> TokenStream:
        if self._output in request.prompt_ids:
            return await self._backend.generate(request)
        return Recital(self._tokens(request))

    def _tokens(self, request: Request) -> Iterator[Token]:
        for i, token_id in enumerate(self._spoken):
            is_last = i == len(self._spoken) - 1
            yield Token(request.uid, token_id, len(request.prompt_ids) + i, "stop" if is_last else None)


class Recital:
    """Tokens that are known beforehand."""

    def __init__(self, tokens: Iterator[Token]) -> None:
        self._tokens = tokens

    def __aiter__(self) -> "Recital":
        return self

    async def __anext__(self) -> Token:
        for token in self._tokens:
            return token
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._tokens = iter(())
