"""Before the first request: kernels are compiled and the decode steps that are likely to come are recorded.

Otherwise whoever brings a new shape waits for it, and all who are served beside them: seconds where nothing
is compiled yet. What runs here is the model alone, over pages that are nobody's yet: no counter of an engine
moves, and nothing is learned from it. Number and time are bounded; what is left over is made when it comes.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.graphs import MOST_RECORDED, Bucket, DecodeGraphs
from model.inputs import PAGE_SIZE, ForwardInputs
from model.moe import ExpertSteps, NoSteps
from model.pages import PageCache
from model.sampling import Drawing, SampleRow
from model.sampling_params import SamplingParams

_log = logging.getLogger(__name__)

MOST_SECONDS = 90.0  # nothing is begun later; with kernels compiled before it takes a fraction
MOST_SEQUENCES = 256  # of a step that is recorded beforehand
_FEWEST_ROWS = 16  # of a prompt: fewer run the same kernels
# Greedy, which alone is simpler, from the whole vocabulary, from part of it.
_DRAWN = [
    SampleRow(SamplingParams(max_tokens=1, temperature=t, top_p=p), 0) for t, p in ((0, 1), (1, 1), (1, 0.9))
]

Draw = Callable[[Tensor, list[SampleRow]], Drawing]


@dataclass(frozen=True)
class WarmedUp:
    """What was run, of how much that was meant to be, and how long it took."""

    done: int
    planned: int
    seconds: float

    def __str__(self) -> str:
        left = self.planned - self.done
        rest = f"; {left} more are made when they come" if left else ""
        return f"warmed up with {self.done} shapes of steps in {self.seconds:.1f} s{rest}"


class WarmUp:
    """Runs a model over a cache that holds nothing yet.

    Args:
        draw: as `Runner.draw`.
        chunk: rows of a prompt that a step runs at most.
        num_drafts: that a step verifies of a sequence at most.
        sequences: that a step has at most.
        experts: are told of every pass; None where they need not be.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PageCache,
        draw: Draw,
        chunk: int,
        num_drafts: int,
        sequences: int = MOST_SEQUENCES,
        experts: ExpertSteps | None = None,
    ) -> None:
        self._model, self._cache, self._draw = model, cache, draw
        self._sequences, self._experts = sequences, experts or NoSteps()
        self._chunk, self._num_drafts = chunk, num_drafts
        self._room = cache.num_pages * PAGE_SIZE

    @torch.inference_mode()
    def run(self, graphs: DecodeGraphs | None, most_seconds: float = MOST_SECONDS) -> WarmedUp:
        """Prompts first, then what `graphs` is likely to be asked for; None where nothing is decoded."""
        started = time.perf_counter()
        self._experts.prepare()
        prompts = list(self._prompts())
        steps = list(self._steps(graphs)) if graphs else []
        done = 0
        for work in (*prompts, *steps):
            if time.perf_counter() - started > most_seconds:
                break
            work()
            done += 1
        for record in reversed(steps[: max(0, done - len(prompts))]):
            record()  # now it is found; so the likeliest is what was used last, and the last to give way
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        warmed = WarmedUp(done, len(prompts) + len(steps), time.perf_counter() - started)
        _log.info("%s", warmed)
        return warmed

    def _prompts(self) -> Iterator[Callable[[], None]]:
        """Short prompts up to whole chunks, those behind longer and longer contexts, one beside decode."""
        longest = min(self._model.config.max_position_embeddings, self._room)
        chunk = min(self._chunk, longest)
        rows = takewhile(lambda count: count < chunk, (_FEWEST_ROWS << i for i in range(32)))
        for count in (*rows, chunk):
            yield partial(self._run, (0, count))
        for context in _contexts(self._model.config):
            if chunk < context <= longest:
                yield partial(self._run, (context - chunk, chunk))
        if 2 < chunk < longest:
            yield partial(self._run, (longest - chunk, 1), (0, chunk - 1))

    def _run(self, *runs: tuple[int, int]) -> None:
        """Rows of sequences, each from a position on so many; then tokens behind the first of them."""
        vocab_size = self._model.config.vocab_size
        tokens = [[row % vocab_size for row in range(count)] for _, count in runs]
        pages = [list(range(-(-(start + count) // PAGE_SIZE))) for start, count in runs]
        inputs = ForwardInputs.build(tokens, [start for start, _ in runs], pages, self._model.device)
        rows = (inputs.num_rows,)
        with self._experts.announce(rows, is_draft=False, captured=False):
            hidden = self._model.forward(inputs, self._cache)
        if self._num_drafts:
            with self._experts.announce(rows, is_draft=True, captured=False):
                self._model.draft(inputs, hidden, self._cache)
        for drawn in (_DRAWN[:1], _DRAWN):
            self._draw(hidden[:1].expand(len(drawn), -1).contiguous(), drawn).wait()

    def _steps(self, graphs: DecodeGraphs) -> Iterator[Callable[[], None]]:
        """The likeliest steps, of each number of rows that a sequence may have in one."""
        most_rows = 1 + self._num_drafts
        shapes = likely_shapes(self._model.config, self._room, self._sequences)[: MOST_RECORDED // most_rows]
        for num_sequences, context in shapes:
            for rows in range(most_rows, 0, -1):
                yield partial(graphs.warm_up, num_sequences, context, rows)


def likely_shapes(config: ModelConfig, room: int, sequences: int = MOST_SEQUENCES) -> list[tuple[int, int]]:
    """Sequences and longest context of steps that may come, the likelier first.

    Those whose sequences, all about as long, find room. Powers of two come first, the shorter contexts before
    the longer: what lies between two of them runs the same kernels, so recording it later is cheap.
    """
    sizes = {Bucket.of(n, 1, 1, config).num_sequences for n in range(1, min(sequences, MOST_SEQUENCES) + 1)}
    shapes = []
    for powers in (True, False):
        chosen = [n for n in sorted(sizes) if (n.bit_count() == 1) == powers]
        for context in _contexts(config):
            shortest = PAGE_SIZE if context == config.index_topk else context // 2 + 1
            shapes += [(n, context) for n in chosen if n * shortest <= room]
    return shapes


def _contexts(config: ModelConfig) -> list[int]:
    """Those of all buckets."""
    most = config.max_position_embeddings
    doubled = (min(config.index_topk << i, most) for i in range(most.bit_length()))
    return sorted({Bucket.of(1, 1, context, config).context for context in doubled})
