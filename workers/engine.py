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
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.errors import PromptTooLong, RequestError
from model.graphs import Bucket, DecodeGraphs
from model.inputs import PAGE_SIZE
from model.moe import ExpertSteps, NoSteps
from model.pages import PageCache
from model.sampling import NonFiniteLogits, SampleResult, num_accepted
from model.stopping import finish_reason
from workers.allocation import PageAllocator, Wait
from workers.load import WorkerLoad
from workers.page_pool import PagePool
from workers.prefix import PrefixHasher
from workers.runner import Flight, OnLayer, Runner
from workers.schedule import Batch, Share, schedule, schedule_ahead
from workers.sequence import Request, Sequence, Token
from workers.speculate import MAX_DRAFTS, Acceptance, DraftPolicy, Drafts, DraftShare, draft
from workers.warm_up import WarmedUp


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs.

    `chunk` is how many rows a step has at most (decode rows excepted); `num_drafts` how many tokens the MTP
    module guesses ahead, at most where they `adapt` to what they cost and are worth. With two or three
    `micro_batches` a part of a step's sequences computes attention while the others' rows are at the experts,
    which gains nothing where these are in the same process. At most so many `sequences` run at once; others
    wait.
    """

    chunk: int = 2048
    num_drafts: int = 0
    adapt: bool = False
    micro_batches: int = 1
    sequences: int = 256

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise RequestError("chunk", f"is {self.chunk}; a step runs at least 1 token")
        if not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise RequestError("drafts", f"is {self.num_drafts}; between 0 and {MAX_DRAFTS} can be made")
        if self.micro_batches not in (1, 2, 3):
            raise RequestError("micro_batches", f"is {self.micro_batches}; a step runs as 1, 2 or 3")
        if self.sequences < 1:
            raise RequestError("sequences", f"is {self.sequences}; at least 1 runs")

    def most_rows(self, config: ModelConfig) -> int:
        """Rows of the largest pass: a chunk, or a recorded step of all sequences with their drafts."""
        return max(self.chunk, Bucket.of(self.sequences, 1 + self.num_drafts, 1, config).num_rows)


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


@dataclass(frozen=True)
class _Waiting:
    request: Request
    keys: list[bytes]
    hand_over: bool

    @property
    def num_tokens(self) -> int:
        """What it needs room for."""
        return len(self.request.prompt_ids) if self.hand_over else self.request.longest


class Engine:
    """Continuous batching over one `Decoder` and one `PageCache`.

    Args:
        secret: of the names of pages; the same for all who exchange pages, None for one of its own.
        graphs: of decode steps with the same model and cache; None runs them eagerly.
        experts: are told of every pass; None where they need not be.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PageCache,
        config: EngineConfig,
        secret: bytes | None = None,
        graphs: DecodeGraphs | None = None,
        experts: ExpertSteps | None = None,
    ) -> None:
        if config.num_drafts and not model.can_draft:
            raise RequestError("drafts", f"is {config.num_drafts}; this checkpoint has no MTP module: use 0")
        self._model, self._config = model, config
        self._runner = Runner(model, cache, config.micro_batches, graphs, experts or NoSteps())
        self._flight: Flight | None = None  # what runs on the device between two calls of `step`
        self.pool = PagePool(cache.num_pages)
        self._allocator = PageAllocator(self.pool, PrefixHasher(secret or secrets.token_bytes(32)))
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}  # have pages and do not run: reserved, or to be handed over
        self._drafts = Drafts()  # of the last step, as far as only the device knows them
        self._ended: list[Sequence] = []  # whose pages the flight still writes to
        self.acceptance = Acceptance()
        self._policy = DraftPolicy(config.num_drafts) if config.adapt else None
        self.num_drafts = config.num_drafts  # of the last step
        self.num_prompt_tokens = self.num_hit_tokens = 0  # of prompts that started; found in cached pages
        self.num_prefilled_tokens = 0  # of prompts, computed
        self.num_steps = self.num_tokens = 0  # run; drawn
        self._eos_ids = frozenset({model.config.eos_token_id})

    def warm_up(self, *, decodes: bool = True) -> WarmedUp | None:
        """Before the first request, do what it would wait for (`warm_up.py`); no count of steps moves.

        Args:
            decodes: whether any request is to go on beyond its first token here.
        """
        assert self.pool.num_free - self.pool.num_cached == self.pool.num_pages, "pages are somebody's"
        assert self.is_idle, "it is in use"
        config = self._config
        return self._runner.warm_up(config.chunk, config.num_drafts, config.sequences, decodes=decodes)

    @torch.inference_mode()
    def step(self, on_layer: OnLayer | None = None) -> list[Token]:
        """Run every open request one step further.

        Where it can, it launches the step after that too, so that the device goes on while the host hands out
        these tokens.

        Raises:
            NumericalFailure: some requests are dropped, nothing else has happened.
            Exception: of the experts, where those are elsewhere; no request has got anywhere.
        """
        if self._flight and not self._of_use(self._flight):
            self._drop(self._flight)
        self._admit()
        if self._flight is None:
            self._flight = self._launch(on_layer)
        if self._flight is None:
            return []
        flight, ahead = self._flight, self._launch_ahead(self._flight)
        verified, self.num_drafts = self.num_drafts, self._choose_drafts(flight.batch)
        drawn = self._land(flight, ahead)
        tokens = self._commit(flight, drawn)
        self.num_steps += 1
        self.num_tokens += len(tokens)
        if self._policy and verified == self.num_drafts and flight.is_decode:
            self._policy.pay(len(flight.batch.shares), verified, time.perf_counter() - flight.started)
        return tokens

    @property
    def running_uids(self) -> list[str]:
        """Requests that have started and are not parked."""
        return list(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running and self._flight is None

    def load(self) -> WorkerLoad:
        """How busy it is."""
        prefilling = [sequence for sequence in self._running.values() if sequence.phase == "prefill"]
        return WorkerLoad(
            waiting=len(self._waiting) + len(prefilling),
            running=len(self._running) - len(prefilling),
            parked=len(self._parked),
            free_pages=self.pool.num_free,
            num_pages=self.pool.num_pages,
            cached_pages=self.pool.num_cached,
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
        assert not self.knows(request.uid), f"{request.uid} is open already"
        if not self._has_seat:
            return Wait.FOR_ROOM
        sequence = self._allocator.start(request, keys, request.longest)
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
        """Drop a request and free its pages, once nothing runs there; unknown or ended ones are ignored."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.request.uid != uid)
        if sequence := self._running.pop(uid, None) or self._parked.pop(uid, None):
            if self._flight and self._flight.share_of(sequence) is not None:
                self._ended.append(sequence)
            else:
                self._allocator.end(sequence)

    def detach(self, uid: str) -> Sequence | None:
        """Forget a parked sequence; its pages stay taken until `release`: a device may still write them."""
        return self._parked.pop(uid, None)

    def release(self, sequence: Sequence) -> None:
        """Free the pages of a detached sequence."""
        self._allocator.end(sequence)

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
        most = min(len(request.prompt_ids), request.params.max_tokens) - 1
        if not 0 <= request.num_resumed <= most:
            raise RequestError("num_resumed", f"is {request.num_resumed}; between 0 and {most} can be")
        limit = min(self._model.config.max_position_embeddings, self.pool.num_pages * PAGE_SIZE)
        num_prompt = len(request.prompt_ids) - request.num_resumed
        if num_prompt >= limit:
            raise PromptTooLong(num_prompt, limit)
        if request.longest > limit:
            room = limit - num_prompt
            raise RequestError(
                "max_tokens",
                f"is {request.params.max_tokens}; after this prompt the context holds {room} more",
            )

    def _admit(self) -> None:
        """Start waiting requests in order of arrival; one that waits for a prefix lets others pass."""
        still_waiting: deque[_Waiting] = deque()
        while self._waiting and self._has_seat:
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

    @property
    def _has_seat(self) -> bool:
        """Whether one more may run, now or when it has come."""
        coming = sum(not sequence.hands_over for sequence in self._parked.values())
        return len(self._running) + coming < self._config.sequences

    def _launch(self, on_layer: OnLayer | None) -> Flight | None:
        """The next step, if there is anything to run."""
        running = self._running.values()
        if any(s.phase == "prefill" or s.request.params.has_penalties for s in running):
            self._drafts.read()  # whoever runs eagerly, or counts tokens, must know them
        batch = schedule(running, self._config.chunk)
        if not batch.shares:
            return None
        drafts = self._drafts.tokens(share.sequence for share in batch.shares)
        return self._runner.launch(batch, on_layer, drafts)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """The step after one that runs, where it needs nothing of it that lies not on the device."""
        if not self._runner.can_run_ahead or self._config.num_drafts or flight.void:
            return None
        if not self._runner.can_go_on:
            return None
        batch = schedule_ahead(flight.batch, self._running.values())
        return self._runner.launch_ahead(batch, flight) if batch else None

    def _land(self, flight: Flight, ahead: Flight | None) -> SampleResult:
        """Wait for what a step has drawn; from then on `ahead` is the flight."""
        try:
            self._runner.confirm(flight)
        except BaseException:
            self._drop(ahead or flight)
            raise
        try:
            self._drafts.read()
            drawn = flight.read(self._of_use(flight))
        except NonFiniteLogits as error:
            self._drop(ahead or flight)  # the one ahead went on from tokens that nobody takes over
            shares = [flight.batch.shares[i] for i in flight.owners(error.rows)]
            uids = frozenset(share.sequence.request.uid for share in shares)
            for uid in uids:
                self.pool.forget(self._running[uid].pages)  # or whoever begins alike fails too, for ever
                self.cancel(uid)
            raise NumericalFailure(uids) from error
        if ahead:
            ahead.give_up(flight.late)
        self._change_flight(ahead)
        return drawn

    def _drop(self, flight: Flight) -> None:
        """Let a flight land for nobody."""
        flight.wait()
        self._change_flight(None)

    def _change_flight(self, flight: Flight | None) -> None:
        """The last one has landed: nothing writes to the pages of what has ended meanwhile."""
        self._flight = flight
        for sequence in self._ended:
            self._allocator.end(sequence)
        self._ended = []

    def _of_use(self, flight: Flight) -> list[int]:
        """Shares whose sequences still run."""
        sequences = [share.sequence for share in flight.batch.shares]
        return [i for i, s in enumerate(sequences) if self._running.get(s.request.uid) is s]

    def _commit(self, flight: Flight, drawn: SampleResult) -> list[Token]:
        """Take over the drawn tokens, move every sequence on, and draft for those that go on."""
        out: list[Token] = []
        to_draft: list[DraftShare] = []
        for i in self._of_use(flight):
            if i in flight.void:
                continue
            share = flight.batch.shares[i]
            sequence, start, valid = share.sequence, share.sequence.num_cached, share.num_known
            if sequence.phase == "prefill":
                self.num_prefilled_tokens += valid
            tokens = self._take_over(share, drawn, flight.places[i]) if flight.places[i] else []
            valid += max(0, len(tokens) - 1)
            sequence.num_cached += valid
            self._allocator.publish(sequence)
            if self._config.num_drafts and not (tokens and tokens[-1].finish_reason):
                is_drafted = bool(tokens) and not sequence.hands_over
                num_drafts = min(self.num_drafts, sequence.room - 1) if is_drafted else 0
                to_draft.append(DraftShare(sequence, start, valid, flight.rows.firsts[i], num_drafts))
            out.extend(tokens)
        self._drafts = draft(self._runner, flight.rows.hidden, to_draft)
        for token in out:  # not before: if drafting fails, nobody is told of them, and they still run
            if token.finish_reason:
                self.cancel(token.uid)
            elif self._running[token.uid].hands_over:
                self._parked[token.uid] = self._running.pop(token.uid)
        return out

    def _take_over(self, share: Share, drawn: SampleResult, own: range) -> list[Token]:
        """Append what the model drew, up to the first draft it disagrees with or the end of the answer."""
        sequence, params = share.sequence, share.sequence.request.params
        drafts = sequence.drafts
        token_ids, logprobs = drawn.tokens[own.start : own.stop], drawn.logprobs[own.start : own.stop]
        accepted = num_accepted(drafts, token_ids)
        self.acceptance.count(len(drafts), accepted)
        if self._policy:
            self._policy.judge(len(drafts), accepted)
        out = []
        for token_id, logprob in zip(token_ids[: accepted + 1], logprobs, strict=False):
            position = sequence.num_tokens
            sequence.tokens.append(token_id)
            reason = finish_reason(token_id, sequence.num_output, params, self._eos_ids)
            cached = sequence.num_prompt_cached
            out.append(Token(sequence.request.uid, token_id, position, reason, logprob, cached))
            if reason:
                break
        return out
