"""A request, its life as a sequence, and the tokens that come out."""

from dataclasses import dataclass, field
from typing import Literal

from model.inputs import PAGE_SIZE
from model.sampling import SampleRow, TokenLogprobs
from model.sampling_params import SamplingParams
from model.stopping import FinishReason


@dataclass(frozen=True)
class Request:
    """What a client asks for, tokenised.

    `uid` is unique among the open requests of an engine. Cached pages are shared within a `tenant` only.
    `choice` says which of the `n` answers to one prompt this is; each of them is a request of its own.
    Where an earlier run was cut off, the last `num_resumed` of the `prompt_ids` are the answer so far.
    Whoever runs one that is `traced` says afterwards where its time went (`stages.py`).
    What is the client's alone does not show where a request is printed.
    """

    uid: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    params: SamplingParams
    tenant: str = field(default="", repr=False)
    choice: int = 0
    num_resumed: int = 0
    traced: bool = False

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer may come to."""
        return len(self.prompt_ids) - self.num_resumed + self.params.max_tokens


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    `position` counts from the start of the prompt; `finish_reason` is set on the last token of an answer;
    `num_prompt_cached` says how many tokens of the prompt were found in cached pages.
    """

    uid: str
    token_id: int
    position: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    num_prompt_cached: int = 0


Phase = Literal["prefill", "decode"]


@dataclass
class Sequence:
    """A request while it runs; one owner at a time.

    Tokens by position, and how far each part has come:

        [0, num_cached)             latents and index keys lie in pages, of every layer, the MTP layer's too
        [num_cached, num_tokens)    known, not run yet: the rest of the prompt, or the last drawn token
        [num_tokens, + drafts)      guessed; rows of the next step verify them

    Pages hold the slots of all three; the first `num_shared` of them were found in the cache and are only
    read. `page_keys` names the full pages that have been published or found, `coming_keys` the prompt's pages
    that it is going to publish. `num_prompt_cached` is how much of the prompt was found where it was
    prefilled. One that `hands_over` stops after its first token: another engine goes on.
    """

    request: Request
    pages: list[int]
    num_shared: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(init=False)
    num_cached: int = field(init=False)
    num_prompt_cached: int = field(init=False)
    drafts: list[int] = field(default_factory=list)
    coming_keys: list[bytes] = field(default_factory=list)
    hands_over: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_cached = self.num_prompt_cached = self.num_shared * PAGE_SIZE

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt(self) -> int:
        """What was known at the start."""
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens of the answer, those of an earlier run too."""
        return self.num_tokens - self.num_prompt + self.request.num_resumed

    @property
    def num_pending(self) -> int:
        """Known tokens that have not been run."""
        return self.num_tokens - self.num_cached

    @property
    def phase(self) -> Phase:
        return "prefill" if self.num_tokens == self.num_prompt else "decode"

    @property
    def room(self) -> int:
        """Tokens that the answer may still have."""
        return self.request.params.max_tokens - self.num_output

    def next_row(self) -> SampleRow:
        """What the token after the known ones depends on besides its logits."""
        params, answer = self.request.params, self.num_prompt - self.request.num_resumed
        prompt = self.request.prompt_ids[:answer] if params.repetition_penalty != 1 else ()
        output = tuple(self.tokens[answer:]) if params.has_penalties else ()
        return SampleRow(params, self.num_tokens, self.request.choice, prompt=prompt, output=output)
