"""When requests arrive: a pattern of unit rate, stretched by a rate that may change over time.

A pattern gives points that come one a unit on average: `constant`, `poisson`, `gamma` or `burst`. A
`RateProfile` maps units to seconds through its integral, so each pattern also comes as a ramp.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.errors import RequestError

Pattern = Literal["constant", "poisson", "gamma", "burst"]


@dataclass(frozen=True)
class RateProfile:
    """Arrivals a second over time: straight lines between points, and the last rate from there on.

    Attributes:
        points: (seconds, arrivals a second), seconds ascending from 0. Two at one moment are a step.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> "RateProfile":
        """From `4`, or from `1@0,10@60,1@120`: rates at seconds.

        Raises:
            RequestError: it is neither, or has a negative rate, or none above 0.
        """
        try:
            points = [
                (float(moment or 0), float(rate))
                for rate, _, moment in (part.partition("@") for part in text.split(","))
            ]
        except ValueError:
            points = []
        moments = [moment for moment, _ in points]
        finite = all(math.isfinite(value) for point in points for value in point)
        if not points or not finite or moments[0] != 0 or moments != sorted(moments):
            raise RequestError("--rate", f"is {text!r}; it takes a number, or rates at seconds: 1@0,10@60")
        if min(rate for _, rate in points) < 0 or max(rate for _, rate in points) == 0:
            raise RequestError("--rate", f"is {text!r}; rates are not negative, and one is above 0")
        return cls(tuple(points))

    def at_units(self, units: float) -> float:
        """The moment at which so many arrivals are due on average; infinite where they never are."""
        for (begin, rate), (end, next_rate) in zip(self.points, self.points[1:], strict=False):
            here = (end - begin) * (rate + next_rate) / 2
            if units <= here and here > 0:
                return begin + _solve(units, rate, (next_rate - rate) / (end - begin))
            units -= here
        begin, rate = self.points[-1]
        return begin + units / rate if rate else float("inf")


def _solve(units: float, rate: float, slope: float) -> float:
    """Seconds after which rate * t + slope * t^2 / 2 is `units`, in the form that survives a slope of 0."""
    return 2 * units / (rate + math.sqrt(max(rate * rate + 2 * slope * units, 0.0)))


@dataclass(frozen=True)
class Arrivals:
    """A pattern over a profile, for a time.

    Attributes:
        shape: of gamma gaps: 1 is Poisson, less comes in clumps (squared variation 1 / shape).
        burst: arrivals at one moment, of `burst`.
        duration: seconds; arrivals lie before it.
    """

    pattern: Pattern
    profile: RateProfile
    duration: float
    shape: float = 1.0
    burst: int = 1

    def times(self, random: np.random.Generator) -> Iterator[float]:
        """Seconds from the beginning, ascending."""
        units = 0.0
        while True:
            units += self._gap(random)
            moment = self.profile.at_units(units)
            if moment >= self.duration:
                return
            yield from [moment] * (self.burst if self.pattern == "burst" else 1)

    def _gap(self, random: np.random.Generator) -> float:
        match self.pattern:
            case "constant":
                return 1.0
            case "poisson":
                return float(random.exponential())
            case "gamma":
                return float(random.gamma(self.shape, 1 / self.shape))
            case "burst":
                return float(self.burst)
