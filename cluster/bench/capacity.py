"""The highest rate that meets the objectives: doubled until it does not, then halved in between."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run at one rate.

    Attributes:
        rate: sessions a second.
        attainment: share of requests that met all objectives.
        goodput: of them, a second.
        is_met: whether the share is high enough, and the figures count.
        remark: why they do not count; "" where they do.
    """

    rate: float
    attainment: float
    goodput: float
    is_met: bool
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What was found.

    Attributes:
        highest: rate that met the objectives; None where none did.
        lowest_failed: rate above it that did not; None where all did.
        trials: all of them, in order.
        ended: why the search ended.
    """

    highest: float | None
    lowest_failed: float | None
    trials: tuple[Trial, ...]
    ended: str


def find_capacity(run: Callable[[float], Trial], first: float, precision: float, max_trials: int) -> Capacity:
    """Searches for the highest rate that meets the objectives.

    Rates between the highest that met and the lowest that did not are halved by their geometric mean: a rate
    twice too high and one twice too low are equally wrong.

    Args:
        run: one trial.
        first: its rate at the beginning.
        precision: the search ends where the lowest failed rate is at most `1 + precision` times the highest
            that met.
        max_trials: at most so many.
    """
    trials: list[Trial] = []
    highest: float | None = None
    failed: float | None = None
    ended = f"all {max_trials} trials were used"
    while len(trials) < max_trials:
        trial = run(_next_rate(highest, failed, first))
        trials.append(trial)
        if trial.is_met:
            highest = trial.rate
        else:
            failed = trial.rate
        if highest is not None and failed is not None and failed <= highest * (1 + precision):
            ended = "the interval is small enough"
            break
    return Capacity(highest=highest, lowest_failed=failed, trials=tuple(trials), ended=ended)


def _next_rate(highest: float | None, failed: float | None, first: float) -> float:
    if highest is None and failed is None:
        return first
    if failed is None:
        assert highest is not None
        return highest * 2
    return failed / 2 if highest is None else math.sqrt(highest * failed)
