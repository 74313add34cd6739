"""The gateway itself, behind both protocols: from a checked call to an answer."""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cluster.gateway.answer import Answer, ChoiceReader
from cluster.gateway.backend import Backend
from cluster.gateway.calls import Call, ChatCall, CompletionCall
from cluster.gateway.errors import Kind, Overloaded, Refusal
from cluster.gateway.journal import Journal
from cluster.gateway.metrics import Metrics
from cluster.gateway.replay import ReplayedStream
from cluster.gateway.tracing import NoTracing, RequestSpan, Tracing
from model.chat.encoding import encode_chat
from model.chat.markup import END_THINK
from model.sampling_params import SamplingParams
from model.tokenizer import Detokenizer
from workers.answer import ChatAnswer, TextAnswer
from workers.sequence import Request

# Texts up to this many characters are tokenised in the event loop: a thread would cost more than they do.
_SHORT = 4096

_MakeReader = Callable[[int, Request], ChoiceReader]


@dataclass(frozen=True)
class Budgets:
    """What one request, and all of them together, may take.

    `default_max_tokens` is the longest chat answer where the client names none; of a completion it is 16, as
    in the OpenAI API.
    """

    first_token_seconds: float = 120.0
    total_seconds: float = 600.0
    default_max_tokens: int = 4096
    journal_tokens: int = 16 * 2**20


class Gateway:
    """Takes calls on.

    Args:
        backend: who runs the model.
        model: the name that clients call it by.
        budgets: limits of time and room.
        tracing: told of every request; None where nobody wants to know.
    """

    def __init__(
        self, backend: Backend, model: str, budgets: Budgets, tracing: Tracing | None = None
    ) -> None:
        self.backend, self.model = backend, model
        self._budgets = budgets
        self.metrics = Metrics()
        self.tracing = tracing or NoTracing()
        self.tracing.on_dropped = self.metrics.dropped_spans.inc
        backend.on_stages = self.tracing.stages
        self.journal = Journal(budgets.journal_tokens)
        self.created = int(time.time())
        self.is_draining = False
        tokenizer = backend.facts.tokenizer
        self._end_of_reasoning = tokenizer.special_id(END_THINK)
        self._longest_token = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))

    @property
    def is_ready(self) -> bool:
        return self.backend.is_ready and not self.is_draining

    @property
    def fingerprint(self) -> str:
        """Names the weights to clients."""
        return f"fp_{self.backend.facts.digest[:16]}"

    def check_model(self, name: str) -> None:
        """Refuses a model that is not served here."""
        if name != self.model:
            shown = name if len(name) <= 64 else f"{name[:61]}..."
            raise Refusal(
                Kind.NO_MODEL, f"there is no model {shown!r} here; this server has {self.model!r}", "model"
            )

    async def chat(self, call: ChatCall, tenant: str, span: RequestSpan) -> Answer:
        """Accepts a conversation, or refuses it.

        Raises:
            Refusal, RequestError: nothing has been spent on it.
        """
        self._check(call)
        facts = self.backend.facts
        prompt = facts.encoding.render(call.messages, call.tools, call.thinking, call.schema)
        num_characters = sum(len(piece.text) for piece in prompt.pieces)
        self._check_length(num_characters, "messages")
        if num_characters <= _SHORT:
            ids = encode_chat(facts.tokenizer, prompt)
        else:
            ids = await asyncio.to_thread(encode_chat, facts.tokenizer, prompt)

        def reader(choice: int, request: Request) -> ChoiceReader:
            text = ChatAnswer(facts.encoding, facts.tokenizer, request, in_reasoning=prompt.in_reasoning)
            return ChoiceReader(choice, text, self._end_of_reasoning if prompt.in_reasoning else None)

        params = self._params(call, "messages", len(ids), self._budgets.default_max_tokens)
        return await self._open(params, ids, tenant, reader, span)

    async def complete(self, call: CompletionCall, tenant: str, span: RequestSpan) -> Answer:
        """Accepts a prompt to continue, or refuses it.

        Raises:
            Refusal, RequestError: nothing has been spent on it.
        """
        self._check(call)
        facts = self.backend.facts
        if isinstance(call.prompt, str):
            self._check_length(len(call.prompt), "prompt")
            ids = await self.encode(call.prompt)
        else:
            ids = list(call.prompt)
        for token_id in ids:
            if not 0 <= token_id < facts.config.vocab_size:
                problem = f"holds token {str(token_id)[:20]}; ids go from 0 to {facts.config.vocab_size - 1}"
                raise Refusal(Kind.INVALID_VALUE, problem, "prompt")

        def reader(choice: int, request: Request) -> ChoiceReader:
            return ChoiceReader(choice, TextAnswer(Detokenizer(facts.tokenizer), request), None)

        return await self._open(self._params(call, "prompt", len(ids), 16), ids, tenant, reader, span)

    async def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt, BOS first. The model's markup counts in it: all of it is one sender's."""
        tokenizer = self.backend.facts.tokenizer
        ids = (
            tokenizer.encode(text) if len(text) <= _SHORT else await asyncio.to_thread(tokenizer.encode, text)
        )
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]

    def _check_length(self, num_characters: int, field: str) -> None:
        """Refuses what surely does not fit before time is spent on making tokens of it."""
        context = self.backend.facts.context
        at_least = num_characters // self._longest_token
        if at_least >= context:
            problem = f"come to more than {at_least} tokens; {_limit(context)}"
            raise Refusal(Kind.CONTEXT, problem, field)

    def _check(self, call: Call) -> None:
        self.check_model(call.model)
        call.params.check_vocab(self.backend.facts.config.vocab_size)
        self.metrics.unknown_fields.inc(len(call.unknown_fields))
        if self.is_draining:
            raise Overloaded("the server is shutting down; send the request again", retry_after=5.0)
        self.backend.check_room()

    async def _open(
        self, params: SamplingParams, ids: list[int], tenant: str, make_reader: _MakeReader, span: RequestSpan
    ) -> Answer:
        uid = secrets.token_hex(12)
        on_close = ExitStack()
        answer = Answer(
            uid, len(ids), self.metrics, on_close=on_close,
            first_token_seconds=self._budgets.first_token_seconds, total_seconds=self._budgets.total_seconds,
        )  # fmt: skip
        span.opened(answer)
        try:
            for choice in range(params.n):
                request = Request(
                    f"{uid}-{choice}", tuple(ids), params, tenant, choice, traced=span.is_sampled
                )
                entry = on_close.enter_context(self.journal.entry(request, self.backend.facts.digest))
                stream = await ReplayedStream(self.backend, entry, self.metrics, span).open()
                answer.read(stream, make_reader(choice, request), entry)
        except BaseException:
            await answer.aclose()
            raise
        return answer

    def _params(self, call: Call, field: str, num_prompt: int, default: int) -> SamplingParams:
        return replace(call.params, max_tokens=self._longest_answer(call, field, num_prompt, default))

    def _longest_answer(self, call: Call, field: str, num_prompt: int, default: int) -> int:
        context = self.backend.facts.context
        room = context - num_prompt
        if room < 1:
            problem = f"come to {num_prompt} tokens; {_limit(context)}"
            raise Refusal(Kind.CONTEXT, problem, field)
        if call.max_tokens is None:
            return min(room, default)
        if call.max_tokens > room:
            problem = (
                f"is {str(call.max_tokens)[:20]}; the prompt has {num_prompt} tokens, which leaves {room}; "
                f"{_limit(context)}"
            )
            raise Refusal(Kind.CONTEXT, problem, call.max_tokens_field)
        return call.max_tokens


def _limit(context: int) -> str:
    """Client libraries recognise the case by these words."""
    return f"this model's maximum context length is {context} tokens, the answer included"
