"""Lengths and pauses drawn from a distribution that is written in one word."""

from dataclasses import dataclass

import numpy as np

from model.errors import RequestError

HELP = "a number, LOW..HIGH for uniform, or lognormal:MEDIAN,SIGMA[,MAX]"


@dataclass(frozen=True)
class Distribution:
    """One of three: `low == high` is a fixed number, `sigma` 0 is uniform, else log-normal up to `high`.

    `low` is the median where `sigma` is not 0.
    """

    low: float
    high: float
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str, least: float) -> "Distribution":
        """From `128`, `64..256` or `lognormal:200,0.8,4096`.

        Args:
            text: what the user wrote.
            option: where, for the error.
            least: the smallest number that may be drawn.

        Raises:
            RequestError: it is none of these, or may draw less than `least`.
        """
        name, _, arguments = text.rpartition(":")
        try:
            numbers = [float(part) for part in arguments.replace("..", ",").split(",")]
        except ValueError:
            numbers = []
        if not name and len(numbers) == 1:
            made = cls(numbers[0], numbers[0])
        elif not name and ".." in text and len(numbers) == 2:
            made = cls(numbers[0], numbers[1])
        elif name == "lognormal" and len(numbers) in (2, 3) and numbers[1] > 0:
            made = cls(numbers[0], numbers[2] if len(numbers) == 3 else float("inf"), numbers[1])
        else:
            raise RequestError(option, f"is {text!r}; it takes {HELP}")
        if not least <= made.low <= made.high or made.low == float("inf"):
            raise RequestError(option, f"is {text!r}; it takes numbers from {least:g}, the lower first")
        return made

    def draw(self, random: np.random.Generator, least: float) -> float:
        """One number, at least `least` and at most `high`."""
        if self.sigma:
            drawn = self.low * float(np.exp(random.normal(0.0, self.sigma)))
        else:
            drawn = float(random.uniform(self.low, self.high))
        return min(max(drawn, least), self.high)

    def draw_whole(self, random: np.random.Generator) -> int:
        """One whole number from 1; uniform ones include both ends."""
        if self.sigma or self.low == self.high:
            return max(1, round(self.draw(random, 1.0)))
        return int(random.integers(int(self.low), int(self.high), endpoint=True))
