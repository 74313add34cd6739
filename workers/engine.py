"""One model in one process: requests in, tokens out.

The whole of it is `step`: schedule, run, commit. It knows nothing of text; who reads the tokens detokenises
them and cancels an answer that met a stop string.
"""

import secrets
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoder import Decoder
from model.errors import PromptTooLong, RequestError
from model.inputs import PAGE_SIZE, ForwardInputs
from model.pages import PageCache
from model.sampling import NonFiniteLogits, SampleResult, SampleRow, num_accepted, sample
from model.stopping import finish_reason
from workers.page_pool import PagePool, pages_for
from workers.prefix import PrefixHasher
from workers.schedule import Batch, Share, schedule
from workers.sequence import Request, Sequence, Token
from workers.speculate import MAX_DRAFTS, Acceptance, DraftShare, draft


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs.

    `chunk` is how many rows a step has at most (decode rows excepted); `num_drafts` how many tokens the MTP
    module guesses ahead.
    """

    chunk: int = 2048
    num_drafts: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise RequestError("chunk", f"is {self.chunk}; a step runs at least 1 token")
        if not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise RequestError("drafts", f"is {self.num_drafts}; between 0 and {MAX_DRAFTS} can be made")


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


class Engine:
    """Continuous batching over one `Decoder` and one `PageCache`."""

    def __init__(self, model: Decoder, cache: PageCache, config: EngineConfig) -> None:
        if config.num_drafts and not model.can_draft:
            raise RequestError("drafts", f"is {config.num_drafts}; this checkpoint has no MTP module: use 0")
        self._model, self._cache, self._config = model, cache, config
        self.pool = PagePool(cache.num_pages)
        self._hasher = PrefixHasher(secrets.token_bytes(32))
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Sequence] = {}
        self.acceptance = Acceptance()
        self._eos_ids = frozenset({model.config.eos_token_id})

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, request: Request) -> None:
        """Take a request; it starts when pages for its prompt and longest answer are free.

        Raises:
            RequestError: the request can never run here.
        """
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
        self._waiting.append(request)

    def cancel(self, uid: str) -> None:
        """Drop a request and free its pages; unknown or ended ones are ignored."""
        self._waiting = deque(request for request in self._waiting if request.uid != uid)
        if sequence := self._running.pop(uid, None):
            self.pool.give_back(sequence.pages)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Run every open request one step further.

        Raises:
            NumericalFailure: some requests are dropped, nothing else has happened.
        """
        self._admit()
        batch = schedule(self._running.values(), self._config.chunk)
        hidden, drawn = self._run(batch)
        return self._commit(batch, hidden, drawn)

    def _admit(self) -> None:
        """Start waiting requests in order of arrival while there are pages for them."""
        while self._waiting and (sequence := self._start(self._waiting[0])):
            self._waiting.popleft()
            self._running[sequence.request.uid] = sequence

    def _start(self, request: Request) -> Sequence | None:
        """A sequence on cached pages of its prefix and on new ones for the rest; None while pages lack."""
        keys: list[bytes] = []
        # The last token of a prompt always runs: its logits are the first token's.
        num_full = (len(request.prompt_ids) - 1) // PAGE_SIZE
        self._hasher.extend(keys, request.tenant, request.prompt_ids, num_full)
        shared = self.pool.match(keys)
        self.pool.share(shared)
        num_new = pages_for(len(request.prompt_ids) + request.params.max_tokens) - len(shared)
        if num_new > self.pool.num_free:
            self.pool.give_back(shared)
            return None
        pages = shared + self.pool.take(num_new)
        return Sequence(request, pages, len(shared), keys[: len(shared)])

    def _publish(self, sequence: Sequence) -> None:
        """Make the pages that became full known, those of the answer too: the next turn starts with them.

        In the MTP layer a page's last row depends on the token behind the page, which is not part of its key:
        after another continuation that one row is another's. Only drafts read it, never an answer.
        """
        num_full = sequence.num_cached // PAGE_SIZE
        known = len(sequence.page_keys)
        self._hasher.extend(sequence.page_keys, sequence.request.tenant, sequence.tokens, num_full)
        for page in range(known, num_full):
            self.pool.publish(sequence.pages[page], sequence.page_keys[page])

    def _run(self, batch: Batch) -> tuple[Tensor, SampleResult]:
        """Hidden states of all rows, and the model's own token after every row that needs one."""
        inputs = ForwardInputs.build(
            [share.token_ids for share in batch.shares],
            [share.sequence.num_cached for share in batch.shares],
            [share.sequence.pages for share in batch.shares],
        )
        hidden = self._model.forward(inputs, self._cache)
        logit_rows: list[int] = []
        sample_rows: list[SampleRow] = []
        owners: list[str] = []
        for share, segment in zip(batch.shares, inputs.segments, strict=True):
            if share.is_last_chunk:
                after_known = segment.start + share.num_known - 1
                logit_rows.extend(range(after_known, segment.stop))
                row = share.sequence.next_row()
                sample_rows.extend(row.after(share.drafts[:place]) for place in range(len(share.drafts) + 1))
                owners.extend([share.sequence.request.uid] * (len(share.drafts) + 1))
        if not logit_rows:
            return hidden, SampleResult([], [])
        try:
            return hidden, sample(self._model.logits(hidden[logit_rows]), sample_rows)
        except NonFiniteLogits as error:
            uids = frozenset(owners[row] for row in error.rows)
            for uid in uids:
                self.cancel(uid)
            raise NumericalFailure(uids) from error

    def _commit(self, batch: Batch, hidden: Tensor, drawn: SampleResult) -> list[Token]:
        """Take over the drawn tokens, move every sequence on, and draft for those that go on."""
        out: list[Token] = []
        to_draft: list[DraftShare] = []
        row = place = 0
        for share in batch.shares:
            sequence, start = share.sequence, share.sequence.num_cached
            valid = share.num_known
            if share.is_last_chunk:
                own = slice(place, place + len(share.drafts) + 1)
                place = own.stop
                tokens, accepted = self._take_over(share, drawn, own)
                out.extend(tokens)
                valid += accepted
            sequence.num_cached += valid
            self._publish(sequence)
            if out and out[-1].uid == sequence.request.uid and out[-1].finish_reason:
                self.cancel(sequence.request.uid)
            elif self._config.num_drafts:
                num_drafts = min(self._config.num_drafts, sequence.room - 1) if share.is_last_chunk else 0
                to_draft.append(DraftShare(sequence, start, hidden[row : row + valid], num_drafts))
            row += share.num_rows
        draft(self._model, self._cache, to_draft)
        return out

    def _take_over(self, share: Share, drawn: SampleResult, own: slice) -> tuple[list[Token], int]:
        """Append what the model drew, up to the first draft it disagrees with or the end of the answer."""
        sequence, params = share.sequence, share.sequence.request.params
        token_ids = drawn.tokens[own]
        accepted = num_accepted(share.drafts, token_ids)
        self.acceptance.count(len(share.drafts), accepted)
        out = []
        for token_id, logprobs in zip(
            token_ids[: accepted + 1], drawn.logprobs[own][: accepted + 1], strict=True
        ):
            position = sequence.num_tokens
            sequence.tokens.append(token_id)
            reason = finish_reason(token_id, sequence.num_output, params, self._eos_ids)
            cached = sequence.num_shared * PAGE_SIZE
            out.append(Token(sequence.request.uid, token_id, position, reason, logprobs, cached))
            if reason:
                break
        return out, accepted
