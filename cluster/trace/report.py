"""What `eightfold trace` writes: one request seen from the inside, as frozen values and as JSON.

The JSON object has the fields of `Report`, each of them with the fields of its class below; tuples are
arrays. A reader checks `format` and `version` first: the version rises when a field changes its meaning or
goes away.

Positions count from 0 over prompt and answer. **The row of position p** is the model reading token p; from it
token p + 1 is drawn. The last token of an answer has a row only if it was a draft, for nobody else reads it.
Arrays by layer hold the decoder's layers and then, where drafts are made, the MTP module's one.

    decode one selection    list(itertools.accumulate(row.selected[layer])), or range(position + 1) for null
    nodes of an expert      routing.nodes[i].experts is [first, last + 1]
    length of the prompt    request.prompt_tokens; tokens.ids goes on with the answer
"""

import json
from dataclasses import dataclass, fields
from typing import Any

FORMAT = "eightfold-trace"
VERSION = 1


@dataclass(frozen=True)
class ModelFacts:
    """Which model, and how it was computed. `moe_layers` are those with routed experts."""

    name: str
    digest: str
    layers: int
    has_mtp: bool
    moe_layers: tuple[int, ...]
    index_topk: int
    experts: int
    experts_per_token: int
    groups: int
    topk_group: int
    dtype: str
    pages: str
    attention: str


@dataclass(frozen=True)
class RequestFacts:
    """What was asked. `output_tokens` and `finish_reason` are what came of it."""

    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    text: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    drafts: int
    chunk: int


@dataclass(frozen=True)
class Tokens:
    """Prompt and answer by position.

    `texts` joined are the whole text. A character of several tokens is that of the last of them, the others
    have none.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Alternative:
    """A token that could have been drawn, with its log-probability under the model's own distribution."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Output:
    """One token of the answer: its step, whether a draft had guessed it, and what else was likely.

    `top` is empty behind the first 10,000 tokens.
    """

    position: int
    step: int
    drafted: bool
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class Row:
    """What happened to one token in every layer.

    Attributes:
        selected: for each layer the positions its indexer selected: the first one, then the distance of each
            from the one before; null where all positions up to its own were read without a choice. The MTP
            layer's entry comes last and is missing where the module did not run.
        experts, weights, nodes: for each MoE layer (the MTP layer last) the experts in ascending order, the
            weight of each, and the nodes that hold them.
    """

    position: int
    selected: tuple[tuple[int, ...] | None, ...]
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    nodes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coverage:
    """How often keys were selected by the rows that had to choose: those that see more than `index_topk`.

    Attributes:
        bucket: positions a bucket; bucket b holds [b * bucket, (b + 1) * bucket).
        prompt, answer: [layers][buckets], over rows of the prompt and of the answer: of all pairs of such a
            row and a key it sees, the share selected; null where no row had to choose.
    """

    bucket: int
    prompt: tuple[tuple[float | None, ...], ...]
    answer: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Node:
    """One node and the run of groups, and so of experts, that it holds; both [first, last + 1]."""

    name: str
    groups: tuple[int, int]
    experts: tuple[int, int]


@dataclass(frozen=True)
class Copies:
    """Copies of one token that one MoE layer sends: mean over all tokens and layers of the request.

    Attributes:
        sent: one to each node that holds one of its experts; the gate keeps to `topk_group` groups.
        unrestricted: the same if the gate chose the best experts of all groups, from the same scores.
        one_an_expert: a copy for each expert, wherever it is.
        bytes_each: of a copy: activations in this run's dtype, and numbers and weights of the experts.
    """

    sent: float
    unrestricted: float
    one_an_expert: int
    bytes_each: int


@dataclass(frozen=True)
class Routing:
    """Where all rows of the request went.

    Attributes:
        layers: the MoE layers, the MTP layer last where it ran; the arrays below have an entry for each.
        prompt_load, answer_load: [layers][experts], tokens that each expert got.
        nodes_per_token: [layers][n], tokens that needed n nodes.
        unrestricted_nodes_per_token: the same without the limit on groups.
        rejected_rows: rows of drafts that were not accepted; they were sent too and are counted nowhere else.
    """

    nodes: tuple[Node, ...]
    layers: tuple[int, ...]
    prompt_load: tuple[tuple[int, ...], ...]
    answer_load: tuple[tuple[int, ...], ...]
    nodes_per_token: tuple[tuple[int, ...], ...]
    unrestricted_nodes_per_token: tuple[tuple[int, ...], ...]
    copies: Copies
    rejected_rows: int


@dataclass(frozen=True)
class Draft:
    """One guess, and what became of it. A draft behind a rejected one was never judged."""

    id: int
    text: str
    verdict: str  # accepted, rejected, unjudged


@dataclass(frozen=True)
class Seconds:
    """Wall time of a step; `sample` is drawing and taking over the tokens, `other` what comes before."""

    total: float
    forward: float
    head: float
    sample: float
    draft: float
    other: float
    attention: tuple[float, ...]
    feed_forward: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
        phase: prefill or decode; the last step of the prefill draws the first token.
        start, rows: its rows are those of positions [start, start + rows), drafts included.
        drafts: guesses that its rows verified.
        drawn: the model's own tokens, i.e. the accepted drafts and one more; their positions follow `start`.
        seconds: its `attention` and `feed_forward` are by decoder layer, norms counted with the latter; both
            are empty in the later steps of a very long answer.
    """

    phase: str
    start: int
    rows: int
    drafts: tuple[Draft, ...]
    drawn: tuple[int, ...]
    seconds: Seconds


@dataclass(frozen=True)
class Limits:
    """What was left out, in numbers and in words for a person. `rows_run` are rows of tokens that stand."""

    rows_run: int
    rows_kept: int
    positions_kept: int
    positions_limit: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One request. `rows` are in order of position and need not be all; see `limits`."""

    format: str
    version: int
    model: ModelFacts
    request: RequestFacts
    tokens: Tokens
    outputs: tuple[Output, ...]
    rows: tuple[Row, ...]
    coverage: Coverage
    routing: Routing
    steps: tuple[Step, ...]
    limits: Limits

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(
            self, default=_as_object, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )


def _as_object(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
