"""From logits to tokens: a pure function of logits, parameters, seed, choice and position.

Shapes: R rows (one token to draw each), V vocabulary entries, K most likely entries of a row.

Sampled rows use the Gumbel-max rule: with noise g_v for every entry v, argmax(log p_v + g_v) is distributed
exactly as p. The noise belongs to (seed, choice, position, v) and not to the order of calls (`model.noise`):

- A draft is verified by drawing the model's own token at its position and comparing. What is sent is always
  the model's own token, the same with no drafts, with wrong drafts and with any number of right ones.
- After a failover, a replay draws the tokens that the client already has.
- Batch neighbours do not matter: a row's token and log-probabilities have the same bits alone and in any
  batch. To keep that true nothing here sums floating-point numbers, because the order of such a sum may
  change with the batch: masses are sums of integers.

A draft is drawn in the same way from the draft module's logits, with the row of the position where the draft
will stand. It then shares the model's noise, and draft q and model p agree with probability
sum_j 1 / sum_i max(p_i / p_j, q_i / q_j) >= (1 - TV) / (1 + TV), TV being their total variation distance
(Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding").
Rejection sampling accepts 1 - TV, more by at most a factor of 1 + TV, but its tokens change with the drafts.

The order is: logit bias, repetition, frequency and presence penalties, temperature, top-k, top-p (the
smallest set whose mass reaches it, in what top-k has left), min-p. Ties go to the lower token id everywhere:
in argmax, at the edges of top-k and top-p, and in the list of alternatives.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import Backend
from model.noise import exp, gumbel, log
from model.sampling_params import SamplingParams
from model.transfer import ToHost, put, take, to_device

# Probabilities relative to the largest are summed as multiples of 2**-44: an error below 4e-9 over any
# vocabulary up to 2**18 entries, whose sum still fits an int64.
_MASS_ONE = 2.0**44
_MAX_VOCAB = 2**18
# Most nuclei lie within this many most likely tokens, and finding those is far cheaper than sorting the
# vocabulary. Rows whose nucleus is larger try again with so many times more.
_FIRST_WIDTH = 512
_WIDER = 16
_NOT_FINITE = -1  # in place of a token that cannot be drawn
# Bounds the temporaries (32 MiB each) whatever the batch.
_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What a token depends on besides its logits.

    Args:
        params: of the request.
        position: of the token to draw, counted from the start of the prompt; below 2**32.
        choice: which of the request's `n` answers this is.
        prompt: token ids of the prompt. Read by the repetition penalty only.
        output: token ids drawn before `position`, drafts included. Read by the penalties only.
    """

    params: SamplingParams
    position: int
    choice: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()

    def __post_init__(self) -> None:
        # The generator takes 32 bits of each; more would give two places the same noise.
        assert 0 <= self.position < 2**32, self.position
        assert 0 <= self.choice < 2**32, self.choice

    def after(self, drafts: Sequence[int]) -> "SampleRow":
        """The row behind some drafts: it is right if all of them are accepted, and unused if not."""
        output = (*self.output, *drafts) if self.params.has_penalties else self.output
        return replace(self, position=self.position + len(drafts), output=output)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution: before bias, penalties, temperature and cuts.

    Args:
        logprob: of the token that was drawn.
        top: (token id, log-probability) of the most likely tokens, best first; masked ones are left out.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Token ids, and log-probabilities of the rows that asked for them (None for the others)."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class NonFiniteLogits(FloatingPointError):
    """Rows whose logits hold NaN or +inf, or nothing but -inf: no token can be drawn from them.

    Drawing is pure, so the other rows may simply be drawn again without these.

    Args:
        rows: their indices in the batch.
    """

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(rows)
        self.rows = rows

    def __str__(self) -> str:
        return f"no finite largest logit in rows {', '.join(map(str, self.rows))}"


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> SampleResult:
    """Draws one token a row, with log-probabilities where they are asked for.

    Args:
        logits: [R, V] float32; -inf marks a token that is not allowed.
        rows: R.
    """
    return Drawing(logits, rows).read()


class Drawing:
    """Tokens that a device draws while the host does something else, until it reads them.

    The `triton` backend draws in a few launches and leaves open what rounding could change: the tokens are
    those of the others.

    Attributes:
        tokens: [R] int64 on the logits' device; -1 where no token can be drawn. Where a row keeps more of the
            vocabulary than was looked at (or the kernel is not sure), this is a good guess, and the host
            settles it when it reads.
        late: rows whose guess was wrong, known once read.
    """

    def __init__(self, logits: Tensor, rows: Sequence[SampleRow], *, backend: Backend = "reference") -> None:
        """As `sample`; asks the device nothing."""
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.shape[0] == len(rows), (logits.shape, len(rows))
        assert logits.shape[1] <= _MAX_VOCAB, logits.shape
        self._logits, self._rows = logits, rows
        self._adjusted = _adjusted(logits, rows)
        if backend == "triton":
            # Imported where it runs: Triton takes 60 MiB, which workers without a GPU spare.
            from kernels.draw import DrawParams, draw_tokens

            params = [(row.params, row.choice, row.position) for row in rows]
            drawn = draw_tokens(
                self._adjusted,
                [
                    DrawParams(p.temperature, p.top_k, p.top_p, p.min_p, _signed(p.seed), choice, position)
                    for p, choice, position in params
                ],
            )
        else:
            drawn = _draw_rows(self._adjusted, rows)
        self.tokens, self._copy = drawn[0], ToHost(drawn)
        self.late: frozenset[int] = frozenset()

    def wait(self) -> None:
        """Until everything is drawn, whatever it is."""
        self._copy.wait()

    def read(self, wanted: Collection[int] | None = None) -> SampleResult:
        """Wait for the tokens.

        Args:
            wanted: rows that somebody asks for, None for all; what is said of the others means nothing.

        Raises:
            NonFiniteLogits: no token can be drawn from some of them.
        """
        tokens = self.read_tokens(wanted)
        if all(row.params.logprobs is None for row in self._rows):
            return SampleResult(tokens, [None] * len(tokens))
        return SampleResult(tokens, _logprobs(self._logits, tokens, self._rows))

    def read_tokens(self, wanted: Collection[int] | None = None) -> list[int]:
        """As `read`, the tokens alone: what a draft needs."""
        tokens: list[int]
        tokens, unsettled = self._copy.wait().tolist()
        used = [i for i in range(len(tokens)) if wanted is None or i in wanted]
        bad = tuple(i for i in used if tokens[i] == _NOT_FINITE)
        if bad:
            raise NonFiniteLogits(bad)
        open_rows = [i for i in used if unsettled[i]]
        if open_rows:
            rows = [self._rows[i] for i in open_rows]
            drawn = _draw_until_settled(take(self._adjusted, open_rows), rows)
            settled = dict(zip(open_rows, drawn.tolist(), strict=True))
            self.late = frozenset(i for i, token in settled.items() if token != tokens[i])
            tokens = [settled.get(i, token) for i, token in enumerate(tokens)]
        return tokens


def num_accepted(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """How many drafts stand.

    Row j of the verified batch is `row.after(drafts[:j])`, so `tokens` holds one more than `drafts`, and
    `tokens[: num_accepted + 1]` is what the sequence gains.
    """
    assert len(tokens) == len(drafts) + 1, (len(drafts), len(tokens))
    for j, draft in enumerate(drafts):
        if draft != tokens[j]:
            return j
    return len(drafts)


def _adjusted(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Logits with bias and penalties; the very same tensor if no row has any."""
    adjusting = [i for i, row in enumerate(rows) if row.params.adjusts_logits]
    if not adjusting:
        return logits
    adjusted = logits.clone()
    for i in adjusting:
        _adjust(adjusted[i], rows[i])
    return adjusted


def _adjust(logits: Tensor, row: SampleRow) -> None:
    """Applies bias and penalties in place to [V] logits, reckoning in float64 and rounding once."""
    params = row.params
    bias = dict(params.logit_bias)
    counts = Counter(row.output) if params.has_penalties else Counter()
    seen = counts.keys() | (set(row.prompt) if params.repetition_penalty != 1 else set())
    touched = sorted(bias.keys() | seen)
    if not touched:
        return

    def column(values: list[float]) -> Tensor:
        return to_device(values, torch.float64, logits.device)

    ids = to_device(touched, torch.int64, logits.device)
    values = logits[ids].double() + column([bias.get(i, 0.0) for i in touched])
    if params.repetition_penalty != 1:
        penalty = column([params.repetition_penalty if i in seen else 1.0 for i in touched])
        values = torch.where(values > 0, values / penalty, values * penalty)
    values -= column([params.frequency_penalty * counts[i] for i in touched])
    values -= column([params.presence_penalty if i in counts else 0.0 for i in touched])
    logits[ids] = values.float()


def _signed(seed: int) -> int:
    """The same 64 bits as a signed number, which is what torch can hold."""
    return (seed + 2**63) % 2**64 - 2**63


def _draw_rows(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[2, R] int64 from [R, V]: tokens, and 1 where they are not settled; asks the device nothing."""
    # NaN and +inf win this maximum, so looking at R numbers is looking at all of them.
    best, greedy = logits.max(dim=-1) if rows else (logits.new_empty(0),) * 2
    tokens = greedy.long()
    unsettled = torch.zeros_like(tokens)
    for part in _parts(rows, logits.shape[1]):
        part_rows = [rows[i] for i in part]
        drawn, complete = _draw_sampled(take(logits, part), take(best, part), part_rows)
        put(tokens, part, drawn)
        put(unsettled, part, (~complete).long())
    return torch.stack([tokens.masked_fill_(~best.isfinite(), _NOT_FINITE), unsettled])


def _draw_until_settled(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[R] int64 tokens of sampled rows [R, V], however often the device must be asked."""
    best = logits.amax(dim=-1)
    tokens = torch.empty_like(best, dtype=torch.int64)
    for part in _parts(rows, logits.shape[1]):
        part_rows = [rows[i] for i in part]
        draw = _draw_widening if part_rows[0].params.cuts else _draw_whole
        put(tokens, part, draw(take(logits, part), take(best, part), part_rows))
    return tokens


def _parts(rows: Sequence[SampleRow], vocab_size: int) -> Iterator[list[int]]:
    """Rows that are sampled, those of a part alike and few enough to be looked at together."""
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // vocab_size)
    for cuts in (True, False):
        sampled = [i for i, row in enumerate(rows) if not row.params.is_greedy]
        alike = [i for i in sampled if rows[i].params.cuts == cuts]
        yield from (alike[i : i + rows_at_once] for i in range(0, len(alike), rows_at_once))


def _draw_sampled(logits: Tensor, best: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Samples from rows that all cut the vocabulary, or all do not: logits [R, V], their maxima [R].

    Returns:
        Token ids [R], and [R] bool: whether these are final; where not, more must be looked at.
    """
    if rows[0].params.cuts:
        width = min(_FIRST_WIDTH, logits.shape[1])
        return _draw_within(width, logits, best, _total_mass(logits, best, rows), rows)
    return _draw_whole(logits, best, rows), torch.ones_like(best, dtype=torch.bool)


def _draw_whole(logits: Tensor, best: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[R] token ids of rows that cut nothing."""
    score = _scaled(logits, best, rows)
    score += _noise(rows, torch.arange(logits.shape[1], device=logits.device)[None])
    return score.argmax(dim=-1)


def _draw_widening(logits: Tensor, best: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """As `_draw_sampled` of rows that it leaves unsettled, until none is; asks the device after every try."""
    total, width = _total_mass(logits, best, rows), _FIRST_WIDTH
    tokens = best.new_empty(len(rows), dtype=torch.int64)
    unsettled = torch.arange(len(rows), device=best.device)
    while unsettled.numel():
        width = min(_WIDER * width, logits.shape[1])
        rest = [rows[i] for i in unsettled.tolist()]
        tokens[unsettled], complete = _draw_within(
            width, logits[unsettled], best[unsettled], total[unsettled], rest
        )
        unsettled = unsettled[~complete]
    return tokens


def _draw_within(
    width: int, logits: Tensor, best: Tensor, total: Tensor, rows: Sequence[SampleRow]
) -> tuple[Tensor, Tensor]:
    """Samples from the kept tokens among the `width` most likely ones.

    Args:
        logits: [R, V], with maxima best [R].
        total: [R, 1] int64, the mass of the whole vocabulary.
    Returns:
        Token ids [R], and [R] bool: whether every kept token was among those looked at. Where not, the token
        is the best of these.
    """
    vocab_size, device = logits.shape[1], logits.device

    def column(values: list[float]) -> Tensor:
        return to_device(values, torch.float64, device)[:, None]

    values, ids = _leading(logits, width)
    scaled = _scaled(values, best, rows)
    rank = torch.arange(width, device=device)[None]
    top_k = column([_top_k(row, vocab_size) for row in rows])
    top_p = column([row.params.top_p for row in rows])
    min_p = column([math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows])
    in_top_k = rank < top_k
    mass = _mass(scaled) * in_top_k
    through = mass.cumsum(dim=-1)
    total = torch.where(top_k < vocab_size, through[:, -1:], total)
    # The first token is kept even where top_p = 0 asks for no mass at all.
    kept = in_top_k & ((through - mass < total * top_p) | (top_p == 1) | (rank == 0))
    kept &= scaled >= min_p
    complete = (top_k[:, 0] <= width) | ((top_k[:, 0] == vocab_size) & ~kept[:, -1])

    score = (scaled + _noise(rows, ids)).masked_fill_(~kept, -torch.inf)
    return ids.gather(-1, score.argmax(dim=-1, keepdim=True))[:, 0], complete


def _leading(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row and their ids, largest first, the lower id first if equal."""
    if width == logits.shape[1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    # topk alone would take any of the entries that equal the last one it takes.
    last = logits.topk(width, dim=-1).values[:, -1:]
    above = logits > last
    equal = logits == last
    room = width - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    # The first place that so many chosen ones reach: `nonzero`, without asking the device how many there are.
    ranks = torch.arange(1, width + 1, device=logits.device).expand(len(logits), width).contiguous()
    ids = torch.searchsorted(chosen.cumsum(dim=-1), ranks).clamp_(max=logits.shape[1] - 1)
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _scaled(logits: Tensor, best: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """(logits - best) / temperature in float64, [R, K].

    Taking the maximum away first keeps the noise from drowning when the temperature is tiny.
    """
    temperature = to_device([row.params.temperature for row in rows], torch.float64, best.device)
    return (logits.double() - best.double()[:, None]).div_(temperature[:, None])


def _mass(scaled: Tensor) -> Tensor:
    """Probability relative to the largest, as int64 multiples of 1 / _MASS_ONE, of float64 logits <= 0."""
    return exp(scaled).mul_(_MASS_ONE).round_().long()


def _total_mass(logits: Tensor, best: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[R, 1] int64 mass of the whole vocabulary; zero where no row needs it."""
    vocab_size = logits.shape[1]
    if any(row.params.top_p < 1 and _top_k(row, vocab_size) == vocab_size for row in rows):
        return _mass(_scaled(logits, best, rows)).sum(dim=-1, keepdim=True)
    return best.new_zeros(len(rows), 1, dtype=torch.int64)


def _top_k(row: SampleRow, vocab_size: int) -> int:
    return min(row.params.top_k or vocab_size, vocab_size)


def _noise(rows: Sequence[SampleRow], ids: Tensor) -> Tensor:
    """Gumbel noise [R, K] float64 of token ids [R, K] or [1, K]."""

    def column(values: list[int]) -> Tensor:
        return to_device(values, torch.int64, ids.device)[:, None]

    seeds = column([_signed(row.params.seed) for row in rows])
    choices = column([row.choice for row in rows])
    positions = column([row.position for row in rows])
    return gumbel(seeds, choices, positions, ids)


def _logprobs(logits: Tensor, tokens: list[int], rows: Sequence[SampleRow]) -> list[TokenLogprobs | None]:
    """Log-probabilities for the rows that ask for them: logits [R, V], the tokens drawn from them."""
    indices = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    asked = [rows[i].params.logprobs or 0 for i in indices]
    chosen = to_device([max(tokens[i], 0) for i in indices], torch.int64, logits.device)[:, None]
    logits = take(logits, indices)
    best = logits.amax(dim=-1, keepdim=True).double()
    total = _mass(logits.double() - best).sum(dim=-1, keepdim=True)
    log_total = log(total.double() / _MASS_ONE)

    values, ids = _leading(logits, min(max(1, *asked), logits.shape[1]))
    top_logprobs = (values.double() - best - log_total).tolist()
    own_logprobs = (logits.gather(-1, chosen).double() - best - log_total)[:, 0].tolist()
    result: list[TokenLogprobs | None] = [None] * len(rows)
    for i, num_top, own, top_ids, top in zip(
        indices, asked, own_logprobs, ids.tolist(), top_logprobs, strict=True
    ):
        pairs = zip(top_ids[:num_top], top, strict=False)
        result[i] = TokenLogprobs(own, tuple(pair for pair in pairs if pair[1] > -torch.inf))
    return result
