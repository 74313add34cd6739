"""When an answer ends: by its tokens, or by a stop string in its text."""

from collections import deque
from collections.abc import Sequence, Set
from typing import Literal

from model.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


def finish_reason(
    token_id: int, num_generated: int, params: SamplingParams, eos_token_ids: Set[int]
) -> FinishReason | None:
    """Why an answer ends with this token, or None if it goes on.

    A token that ends the answer by its id is no part of the text, as a stop string is not.

    Args:
        token_id: the token just generated.
        num_generated: tokens of the answer so far, this one included.
        params: of the request; `ignore_eos` does not touch its own `stop_token_ids`.
        eos_token_ids: what the model ends its answers with.
    """
    # An answer that ends by itself on its very last token was not cut short.
    if token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos):
        return "stop"
    return "length" if num_generated >= params.max_tokens else None


class StopChecker:
    """Cuts a growing text at the first stop string.

    The first is the one whose last character arrives first, and of two that end on the same character the
    longer. That is the one choice that does not depend on how the text was cut into pieces. The stop string
    and everything behind it are dropped; the answer ends for "stop", also where that token was its last.

    Text comes out as early as it can: only the longest end of it that a stop string could still begin with is
    held back. After a failover a new checker that is fed the same text stands where the old one stood.

    The strings are kept as an Aho-Corasick automaton, so that the work is linear in their length and in the
    length of the text, whatever they are. Its states are the beginnings of stop strings; the state after some
    text is the longest of them that the text ends with.

    Args:
        stops: strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), stops
        self._next: list[dict[str, int]] = [{}]  # by state: the longer beginnings, by their last character
        self._depth = [0]  # by state: its length
        self._match = [0]  # by state: the length of the longest stop string that it ends with, or 0
        self._shorter = [0]  # by state: the longest other state that it ends with
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Takes the next piece of text and returns what can be shown by now; nothing once stopped."""
        if self.stopped:
            return ""
        if len(self._next) == 1:
            return text
        text = self._held + text
        for end in range(len(self._held), len(text)):
            self._state = self._step(self._state, text[end])
            if self._match[self._state]:
                self.stopped = True
                self._held = ""
                return text[: end + 1 - self._match[self._state]]
        shown = len(text) - self._depth[self._state]
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, once the answer has ended for another reason; nothing after a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
                self._shorter.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Fills `_shorter` and completes `_match`, the shorter states first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            shorter = self._shorter[state]
            self._match[state] = self._match[state] or self._match[shorter]
            for character, longer in self._next[state].items():
                self._shorter[longer] = self._step(shorter, character)
                queue.append(longer)

    def _step(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._shorter[state]
        return self._next[state][character]
