"""Prompts of real words, each with a beginning of its own, as long in tokens as asked for.

What a word costs in tokens is the server's to say: two probes tell it, for any tokenizer and chat template.
"""

from dataclasses import dataclass

import numpy as np

# Frequent words: in most vocabularies one token each.
_TEXT = (
    "the of and to in is was that it for on with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said an each she which do their "
    "time if will way about many then them would write like so these her long make thing see him two has "
    "look more day could go come did my sound no most number who over know water than call first people "
    "may down side been now find any new work part take get place made live where after back little only "
    "round man year came show every good me give our under name very through just form much great think "
    "say help low line before turn cause same mean move right boy old too does tell sentence set three "
    "want air well also play small end put home read hand port large spell add even land here must big "
    "high such follow act why ask men change went light kind off need house picture try us again animal "
    "point mother world near build self earth father"
)
_WORDS = tuple(_TEXT.split())

_BODY = 1 << 16  # words of the text that long prompts are cut from
_BEGINNING = 8  # words that tell one prompt from another: of 200 each, no two alike in practice
# Kinds of text: no two share their random numbers.
_OWN, _SHARED, _PROBE = range(1, 4)


@dataclass(frozen=True)
class TokenCost:
    """What prompts cost: `fixed` tokens (of a template) and `per_word` for each word."""

    per_word: float = 1.0
    fixed: float = 0.0

    @classmethod
    def between(cls, probes: tuple[tuple[int, int], tuple[int, int]]) -> "TokenCost":
        """From two probes of (words, tokens), of which the second is longer."""
        (words, tokens), (more_words, more_tokens) = probes
        per_word = max((more_tokens - tokens) / (more_words - words), 0.1)
        return cls(per_word, max(tokens - words * per_word, 0.0))

    def words(self, num_tokens: int) -> int:
        """Words of a prompt of about so many tokens; at least one."""
        return max(1, round((num_tokens - self.fixed) / self.per_word))


class PromptMaker:
    """Makes texts that depend on the seed and a key and on nothing else.

    Long texts are cut from one body made beforehand, so that making one takes no longer than copying it: a
    generator that thinks while arrivals are due is late.

    Args:
        seed: of the run.
        cost: what words cost at this server.
    """

    def __init__(self, seed: int, cost: TokenCost) -> None:
        self._seed, self._cost = seed, cost
        random = np.random.default_rng((seed, 0))
        body = [_WORDS[index] for index in random.integers(len(_WORDS), size=_BODY)]
        self._starts = np.cumsum([0, *(len(word) + 1 for word in body)])
        self._body = " ".join(body) + " "

    def text(self, num_tokens: int, key: int) -> str:
        """About `num_tokens` tokens, fixed costs included, with a beginning that no other key has."""
        return self._words(self._cost.words(num_tokens), _OWN, key)

    def shared(self, num_tokens: int) -> str:
        """About so many tokens, the same for the whole run; "" for none."""
        return self._words(self._cost.words(num_tokens), _SHARED, 0) + " " if num_tokens else ""

    def probe(self, num_words: int) -> str:
        """Exactly so many words."""
        return self._words(num_words, _PROBE, num_words)

    def _words(self, count: int, kind: int, key: int) -> str:
        random = np.random.default_rng((self._seed, kind, key))
        beginning = [_WORDS[index] for index in random.integers(len(_WORDS), size=min(count, _BEGINNING))]
        return " ".join(beginning) + self._slice(count - len(beginning), int(random.integers(_BODY)))

    def _slice(self, count: int, start: int) -> str:
        """Words of the body from `start` on, around its end as often as it takes."""
        pieces = [" "] if count else []
        while count:
            taken = min(count, _BODY - start)
            pieces.append(self._body[self._starts[start] : self._starts[start + taken]])
            count, start = count - taken, 0
        return "".join(pieces).rstrip()
