"""One model in one process: requests in, tokens out.

The whole of it is `step`: schedule, run, commit. It knows nothing of text; who reads the tokens detokenises
them and cancels an answer that met a stop string.

Where prefill and decode are apart, each side has an engine: `add(.., hand_over=True)` stops after the first
token and keeps the pages; `reserve` takes pages for a prompt that is computed elsewhere, `adopt` goes on with
it. What lies between is `handoff.py`.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.decoder import Decoder, MicroBatch
from model.errors import PromptTooLong, RequestError
from model.inputs import PAGE_SIZE, ForwardInputs
from model.pages import PageCache
from model.sampling import NonFiniteLogits, SampleResult, SampleRow, num_accepted, sample
from model.stopping import finish_reason
from workers.allocation import PageAllocator, Wait
from workers.load import WorkerLoad
from workers.page_pool import PagePool
from workers.prefix import PrefixHasher
from workers.schedule import Batch, Share, schedule
from workers.sequence import Request, Sequence, Token
from workers.speculate import MAX_DRAFTS, Acceptance, DraftPolicy, DraftShare, draft


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs.

    `chunk` is how many rows a step has at most (decode rows excepted); `num_drafts` how many tokens the MTP
    module guesses ahead, at most where they `adapt` to what they cost and are worth. With two `micro_batches`
    one half of a step's sequences computes attention while the other's rows are at the experts, which gains
    nothing where these are in the same process.
    """

    chunk: int = 2048
    num_drafts: int = 0
    adapt: bool = False
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise RequestError("chunk", f"is {self.chunk}; a step runs at least 1 token")
        if not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise RequestError("drafts", f"is {self.num_drafts}; between 0 and {MAX_DRAFTS} can be made")
        if self.micro_batches not in (1, 2):
            raise RequestError("micro_batches", f"is {self.micro_batches}; a step runs as 1 or 2")


class NumericalFailure(Exception):
    """Requests whose logits are no numbers. They are dropped; for the others the step may be run again.

    Args:
        uids: of the requests.
    """

    def __init__(self, uids: frozenset[str]) -> None:
        super().__init__(uids)
        self.uids = uids

    def __str__(self) -> str:
        return f"no token can be drawn for {', '.join(sorted(self.uids))}"


OnLayer = Callable[[Batch, int], None]
"""Told that a batch's rows lie in the pages of a layer; its sequences still say how far they were before."""


@dataclass(frozen=True)
class _Waiting:
    request: Request
    keys: list[bytes]
    hand_over: bool

    @property
    def num_tokens(self) -> int:
        """What it needs room for."""
        return len(self.request.prompt_ids) + (0 if self.hand_over else self.request.params.max_tokens)


class Engine:
    """Continuous batching over one `Decoder` and one `PageCache`.

    Args:
        secret: of the names of pages; the same for all who exchange pages, None for one of its own.
    """

    def __init__(
        self, model: Decoder, cache: PageCache, config: EngineConfig, secret: bytes | None = None
    ) -> None:
        if config.num_drafts and not model.can_draft:
            raise RequestError("drafts", f"is {config.num_drafts}; this checkpoint has no MTP module: use 0")
        self._model, self._cache, self._config = model, cache, config
        self.pool = PagePool(cache.num_pages)
        self._allocator = PageAllocator(self.pool, PrefixHasher(secret or secrets.token_bytes(32)))
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}  # have pages and do not run: reserved, or to be handed over
        self.acceptance = Acceptance()
        self._policy = DraftPolicy(config.num_drafts) if config.adapt else None
        self.num_drafts = config.num_drafts  # of the last step
        self.num_prompt_tokens = self.num_hit_tokens = 0  # of prompts that started; found in cached pages
        self.num_steps = self.num_tokens = 0  # run; drawn
        self._eos_ids = frozenset({model.config.eos_token_id})

    @property
    def running_uids(self) -> list[str]:
        """Requests that have started and are not parked."""
        return list(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def load(self) -> WorkerLoad:
        """How busy it is."""
        prefilling = [sequence for sequence in self._running.values() if sequence.phase == "prefill"]
        return WorkerLoad(
            waiting=len(self._waiting) + len(prefilling),
            running=len(self._running) - len(prefilling),
            parked=len(self._parked),
            free_pages=self.pool.num_free,
            num_pages=self.pool.num_pages,
            queued_tokens=sum(len(waiting.request.prompt_ids) for waiting in self._waiting)
            + sum(sequence.num_pending for sequence in prefilling),
        )

    def add(self, request: Request, *, hand_over: bool = False) -> None:
        """Take a request; it starts when pages for its prompt and longest answer are free.

        Args:
            hand_over: stop after the first token, if that does not end the answer, and keep the pages of the
                prompt until `cancel`: somebody else goes on.

        Raises:
            RequestError: the request can never run here.
        """
        keys = self.keys_of(request)
        assert not self.knows(request.uid), f"{request.uid} is open already"
        self._waiting.append(_Waiting(request, keys, hand_over))

    def reserve(self, request: Request, keys: list[bytes] | None = None) -> Sequence | Wait:
        """Take pages for a prompt that is computed elsewhere, and for its longest answer.

        Args:
            keys: `keys_of` the request, for who asks again and again.

        Raises:
            RequestError: the request can never run here.
        """
        keys = keys or self.keys_of(request)
        longest = len(request.prompt_ids) + request.params.max_tokens
        assert not self.knows(request.uid), f"{request.uid} is open already"
        sequence = self._allocator.start(request, keys, longest)
        if isinstance(sequence, Sequence):
            self._parked[request.uid] = sequence
        return sequence

    def keys_of(self, request: Request) -> list[bytes]:
        """Names of the prompt's full pages.

        Raises:
            RequestError: the request can never run here.
        """
        self._check(request)
        return self._allocator.keys_of(request)

    def knows(self, uid: str) -> bool:
        """Whether a request is open here."""
        is_waiting = any(waiting.request.uid == uid for waiting in self._waiting)
        return is_waiting or uid in self._running or uid in self._parked

    def adopt(self, uid: str, first: Token) -> None:
        """Go on with a reserved sequence whose prompt lies in its pages and whose first token is drawn.

        Raises:
            RequestError: that is no token of this model.
        """
        if not 0 <= first.token_id < self._model.config.vocab_size:
            raise RequestError("token", f"is {first.token_id}")
        sequence = self._parked.pop(uid)
        sequence.num_cached = sequence.num_prompt
        sequence.num_prompt_cached = first.num_prompt_cached
        sequence.tokens.append(first.token_id)
        self._allocator.publish(sequence)
        self._running[uid] = sequence

    def parked(self, uid: str) -> Sequence | None:
        """A sequence that has pages and does not run."""
        return self._parked.get(uid)

    def cancel(self, uid: str) -> None:
        """Drop a request and free its pages; unknown or ended ones are ignored."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.request.uid != uid)
        if sequence := self._running.pop(uid, None) or self._parked.pop(uid, None):
            self._allocator.end(sequence)

    @torch.inference_mode()
    def step(self, on_layer: OnLayer | None = None) -> list[Token]:
        """Run every open request one step further.

        Raises:
            NumericalFailure: some requests are dropped, nothing else has happened.
        """
        self._admit()
        batch = schedule(self._running.values(), self._config.chunk)
        if not batch.shares:
            return []
        started = time.perf_counter()
        verified, self.num_drafts = self.num_drafts, self._choose_drafts(batch)
        is_decode = batch.is_decode
        hidden, drawn = self._run(batch, on_layer)
        tokens = self._commit(batch, hidden, drawn)
        self.num_steps += 1
        self.num_tokens += len(tokens)
        if self._policy and verified == self.num_drafts and is_decode:
            self._policy.pay(len(batch.shares), verified, time.perf_counter() - started)
        return tokens

    def _choose_drafts(self, batch: Batch) -> int:
        """Drafts that each sequence makes at the end of this step."""
        num_decoding = sum(share.sequence.phase == "decode" for share in batch.shares)
        if self._policy and num_decoding:
            return self._policy.choose(num_decoding)
        return self._config.num_drafts

    def _check(self, request: Request) -> None:
        """Refuse what can never run here."""
        vocab_size = self._model.config.vocab_size
        if not request.prompt_ids:
            raise RequestError("prompt", "is empty; send at least one token")
        for token_id in request.prompt_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    "prompt", f"holds token {token_id}; this model's ids go from 0 to {vocab_size - 1}"
                )
        request.params.check_vocab(vocab_size)
        limit = min(self._model.config.max_position_embeddings, self.pool.num_pages * PAGE_SIZE)
        longest = len(request.prompt_ids) + request.params.max_tokens
        if len(request.prompt_ids) >= limit:
            raise PromptTooLong(len(request.prompt_ids), limit)
        if longest > limit:
            room = limit - len(request.prompt_ids)
            raise RequestError(
                "max_tokens",
                f"is {request.params.max_tokens}; after this prompt the context holds {room} more",
            )

    def _admit(self) -> None:
        """Start waiting requests in order of arrival; one that waits for a prefix lets others pass."""
        still_waiting: deque[_Waiting] = deque()
        while self._waiting:
            waiting = self._waiting.popleft()
            started = self._allocator.start(waiting.request, waiting.keys, waiting.num_tokens)
            if isinstance(started, Sequence):
                started.hands_over = waiting.hand_over
                self._running[waiting.request.uid] = started
                self.num_prompt_tokens += started.num_prompt
                self.num_hit_tokens += started.num_cached
                continue
            still_waiting.append(waiting)
            if started is Wait.FOR_ROOM:
                break
        self._waiting = still_waiting + self._waiting

    def _run(self, batch: Batch, on_layer: OnLayer | None) -> tuple[Tensor, SampleResult]:
        """Hidden states of all rows, and the model's own token after every row that needs one."""
        hidden = self._forward(batch, on_layer)
        logit_rows: list[int] = []
        sample_rows: list[SampleRow] = []
        owners: list[str] = []
        start = 0
        for share in batch.shares:
            stop = start + share.num_rows
            if share.is_last_chunk:
                logit_rows.extend(range(start + share.num_known - 1, stop))
                row = share.sequence.next_row()
                sample_rows.extend(row.after(share.drafts[:place]) for place in range(len(share.drafts) + 1))
                owners.extend([share.sequence.request.uid] * (len(share.drafts) + 1))
            start = stop
        if not logit_rows:
            return hidden, SampleResult([], [])
        try:
            return hidden, sample(self._model.logits(hidden[logit_rows]), sample_rows)
        except NonFiniteLogits as error:
            uids = frozenset(owners[row] for row in error.rows)
            for uid in uids:
                self.cancel(uid)
            raise NumericalFailure(uids) from error

    def _forward(self, batch: Batch, on_layer: OnLayer | None) -> Tensor:
        """[T, D] hidden states of all rows, in order."""
        parts = [
            MicroBatch(
                _inputs_of(part, self._model.device), on_layer=partial(on_layer, part) if on_layer else None
            )
            for part in (batch.halves() if self._config.micro_batches == 2 else (batch,))
        ]
        if len(parts) == 1:
            return self._model.forward(parts[0].inputs, self._cache, on_layer=parts[0].on_layer)
        return torch.cat(self._model.forward_in_turn(parts, self._cache))

    def _commit(self, batch: Batch, hidden: Tensor, drawn: SampleResult) -> list[Token]:
        """Take over the drawn tokens, move every sequence on, and draft for those that go on."""
        out: list[Token] = []
        to_draft: list[DraftShare] = []
        row = place = 0
        for share in batch.shares:
            sequence, start = share.sequence, share.sequence.num_cached
            valid, is_last_chunk = share.num_known, share.is_last_chunk
            if is_last_chunk:
                own = slice(place, place + len(share.drafts) + 1)
                place = own.stop
                tokens, accepted = self._take_over(share, drawn, own)
                out.extend(tokens)
                valid += accepted
            sequence.num_cached += valid
            self._allocator.publish(sequence)
            if out and out[-1].uid == sequence.request.uid and out[-1].finish_reason:
                self.cancel(sequence.request.uid)
            elif self._config.num_drafts:
                is_drafted = is_last_chunk and not sequence.hands_over
                num_drafts = min(self.num_drafts, sequence.room - 1) if is_drafted else 0
                to_draft.append(DraftShare(sequence, start, hidden[row : row + valid], num_drafts))
            if is_last_chunk and sequence.hands_over and sequence.request.uid in self._running:
                self._parked[sequence.request.uid] = self._running.pop(sequence.request.uid)
            row += share.num_rows
        draft(self._model, self._cache, to_draft)
        return out

    def _take_over(self, share: Share, drawn: SampleResult, own: slice) -> tuple[list[Token], int]:
        """Append what the model drew, up to the first draft it disagrees with or the end of the answer."""
        sequence, params = share.sequence, share.sequence.request.params
        token_ids = drawn.tokens[own]
        accepted = num_accepted(share.drafts, token_ids)
        self.acceptance.count(len(share.drafts), accepted)
        if self._policy:
            self._policy.judge(len(share.drafts), accepted)
        out = []
        for token_id, logprobs in zip(
            token_ids[: accepted + 1], drawn.logprobs[own][: accepted + 1], strict=True
        ):
            position = sequence.num_tokens
            sequence.tokens.append(token_id)
            reason = finish_reason(token_id, sequence.num_output, params, self._eos_ids)
            cached = sequence.num_prompt_cached
            out.append(Token(sequence.request.uid, token_id, position, reason, logprobs, cached))
            if reason:
                break
        return out, accepted


def _inputs_of(batch: Batch, device: torch.device) -> ForwardInputs:
    return ForwardInputs.build(
        [share.token_ids for share in batch.shares],
        [share.sequence.num_cached for share in batch.shares],
        [share.sequence.pages for share in batch.shares],
        device,
    )
