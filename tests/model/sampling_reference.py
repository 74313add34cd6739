"""The whole of sampling again, one entry at a time in plain Python; only the noise is taken as it comes."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model import noise
from model.sampling import SampleRow, sample
from model.sampling_params import SamplingParams


def make_row(position: int = 0, *, choice: int = 0, **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=100, **params), position, choice)


def draw(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """The tokens of `sample` alone."""
    return sample(logits, rows).tokens


def gumbel(seed: int, choice: int, position: int, token_id: int) -> float:
    signed = seed - 2**64 if seed >= 2**63 else seed
    places = (torch.tensor([number]) for number in (signed, choice, position, token_id))
    return noise.gumbel(*places).item()


def adjusted_reference(logits: Sequence[float], row: SampleRow) -> list[float]:
    params = row.params
    adjusted = []
    for token_id, logit in enumerate(logits):
        logit += dict(params.logit_bias).get(token_id, 0.0)
        count = list(row.output).count(token_id)
        if token_id in row.prompt or count:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * count
        logit -= params.presence_penalty * (count > 0)
        adjusted.append(struct.unpack("f", struct.pack("f", logit))[0])
    return adjusted


def kept_reference(logits: Sequence[float], params: SamplingParams) -> list[int]:
    """What top-k, top-p and min-p leave of adjusted logits, best first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[order[0]]
    order = order[: params.top_k or None]
    scaled = {i: (logits[i] - best) / params.temperature for i in order}
    mass = {i: round(math.exp(scaled[i]) * 2**44) for i in order}
    wanted = params.top_p * sum(mass.values())
    kept: list[int] = []
    for i in order:
        if kept and params.top_p < 1 and sum(mass[j] for j in kept) >= wanted:
            break
        kept.append(i)
    return [i for i in kept if not params.min_p or scaled[i] >= math.log(params.min_p)]


def draw_reference(logits: Sequence[float], row: SampleRow) -> int:
    params = row.params
    adjusted = adjusted_reference(logits, row)
    best = max(adjusted)
    if params.temperature == 0:
        return adjusted.index(best)

    def score(i: int) -> tuple[float, int]:
        scaled = (adjusted[i] - best) / params.temperature
        return scaled + gumbel(params.seed, row.choice, row.position, i), -i

    return max(kept_reference(adjusted, params), key=score)


def exact_distribution(logits: Sequence[float], params: SamplingParams) -> list[float]:
    kept = kept_reference(logits, params)
    weights = [math.exp(v / params.temperature) if i in kept else 0.0 for i, v in enumerate(logits)]
    return [weight / sum(weights) for weight in weights]
