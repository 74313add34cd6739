"""How a client wants its tokens drawn: one frozen value, checked in full when it is made.

Plain standard library, so that the gateway can refuse a request without loading torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import RequestError

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request says about sampling and stopping. A bad value raises `RequestError` naming its field.

    The defaults are those of the OpenAI API, except that two questions are left to the gateway: how many
    tokens an answer may have where the client does not say (it knows the prompt and the context), and which
    seed to use where the client gives none (it must write its own choice into the journal, or a failover
    could not draw the same tokens again).

    Args:
        max_tokens: tokens to generate at most, the one that ends the answer included.
        temperature: 0 is greedy: the most likely token, whatever top_p, top_k and min_p say.
        top_p: keep the smallest set of most likely tokens whose mass reaches this; 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.
        frequency_penalty: taken from a token's logit for each time it has been generated.
        presence_penalty: taken once from the logit of each token that has been generated.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that stand in
            the prompt or the answer; 1 changes nothing.
        logit_bias: (token id, bias) by rising id; `logit_bias_pairs` makes it from the API's mapping.
        stop: strings that end the answer and are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own end of sequence.
        ignore_eos: go on after the model's end of sequence; for benchmarks.
        seed: any signed or unsigned 64-bit number; only its value modulo 2**64 counts.
        n: independent choices to draw.
        logprobs: None for no log-probabilities, otherwise how many alternatives to list beside each token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None, "leave it out to fill the context")
        _check_number("temperature", self.temperature, 0, 2, "0 is greedy, 1 is the model's own distribution")
        _check_number("top_p", self.top_p, 0, 1, "1 turns it off")
        _check_int("top_k", self.top_k, 0, None, "0 turns it off")
        _check_number("min_p", self.min_p, 0, 1, "0 turns it off")
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2, "0 turns it off")
        _check_number("presence_penalty", self.presence_penalty, -2, 2, "0 turns it off")
        _check_number("repetition_penalty", self.repetition_penalty, 0.1, 10, "1 turns it off")
        _check_logit_bias(self.logit_bias)
        _check_stop(self.stop)
        _check_stop_token_ids(self.stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"is {_shown(self.ignore_eos)}; send true or false")
        _check_int("seed", self.seed, -(2**63), 2**64 - 1, "any 64-bit number will do")
        _check_int("n", self.n, 1, MAX_CHOICES, "send several requests for more choices")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, "ask for fewer alternatives")

    def check_vocab(self, vocab_size: int) -> None:
        """Refuses token ids that the model does not have."""
        for token_id, _ in self.logit_bias:
            if token_id >= vocab_size:
                raise RequestError("logit_bias", _beyond_vocab(token_id, vocab_size))
        for token_id in self.stop_token_ids:
            if token_id >= vocab_size:
                raise RequestError("stop_token_ids", _beyond_vocab(token_id, vocab_size))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        """Whether sampling chooses from part of the vocabulary only."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def has_penalties(self) -> bool:
        """Whether drawing a token needs to know the tokens before it."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def adjusts_logits(self) -> bool:
        return bool(self.logit_bias) or self.has_penalties


def logit_bias_pairs(bias: Mapping[int | str, float]) -> tuple[tuple[int, float], ...]:
    """The API's mapping as `SamplingParams.logit_bias`; its keys may be strings, as JSON makes them.

    The biases themselves are checked by `SamplingParams`.
    """
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError("logit_bias", f"has {len(bias)} entries; send at most {MAX_LOGIT_BIAS}")
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        token_id = _token_id(key)
        if token_id in pairs:
            raise RequestError("logit_bias", f"names token {token_id} twice; send one bias a token")
        pairs[token_id] = value
    return tuple(sorted(pairs.items()))


def _token_id(key: object) -> int:
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    # isdecimal alone would take other scripts' digits, and int() underscores and spaces.
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 9:
        return int(key)
    raise RequestError("logit_bias", f"has the key {_shown(key)}; keys are token ids such as 42")


def _check_int(field: str, value: object, low: int, high: int | None, advice: str) -> None:
    allowed = f"an integer from {low}" + ("" if high is None else f" to {high}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(field, f"is {_shown(value)}; it takes {allowed}: {advice}")
    if value < low or (high is not None and value > high):
        raise RequestError(field, f"is {_shown(value)}; it takes {allowed}: {advice}")


def _check_number(field: str, value: object, low: float, high: float, advice: str) -> None:
    # Written as "not inside" because every comparison with NaN is false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(field, f"is {_shown(value)}; it takes a number from {low:g} to {high:g}: {advice}")


def _check_logit_bias(pairs: object) -> None:
    if not isinstance(pairs, tuple):
        raise RequestError("logit_bias", f"is {_shown(pairs)}; it takes a mapping from token id to bias")
    if len(pairs) > MAX_LOGIT_BIAS:
        raise RequestError("logit_bias", f"has {len(pairs)} entries; send at most {MAX_LOGIT_BIAS}")
    previous = -1
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise RequestError("logit_bias", f"holds {_shown(pair)}; it takes pairs of token id and bias")
        token_id, bias = pair
        _check_int("logit_bias", token_id, 0, None, "keys are token ids")
        if token_id <= previous:
            raise RequestError(
                "logit_bias", f"names token {token_id} out of order; sort it, one bias a token"
            )
        _check_number("logit_bias", bias, -100, 100, "-100 all but forbids a token, 100 all but forces it")
        previous = token_id


def _check_stop(stops: object) -> None:
    if not isinstance(stops, tuple):
        raise RequestError("stop", f"is {_shown(stops)}; it takes a list of strings")
    if len(stops) > MAX_STOPS:
        raise RequestError("stop", f"has {len(stops)} strings; send at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str):
            raise RequestError("stop", f"holds {_shown(stop)}; it takes strings")
        if not stop:
            raise RequestError("stop", "holds an empty string; leave it out")
        try:
            num_bytes = len(stop.encode())
        except UnicodeEncodeError:
            raise RequestError("stop", f"holds {_shown(stop)}; half a surrogate pair is no text") from None
        if num_bytes > MAX_STOP_BYTES:
            raise RequestError("stop", f"holds a string of {num_bytes} bytes; send at most {MAX_STOP_BYTES}")


def _check_stop_token_ids(token_ids: object) -> None:
    if not isinstance(token_ids, tuple):
        raise RequestError("stop_token_ids", f"is {_shown(token_ids)}; it takes a list of token ids")
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError("stop_token_ids", f"has {len(token_ids)} ids; send at most {MAX_STOP_TOKEN_IDS}")
    for token_id in token_ids:
        _check_int("stop_token_ids", token_id, 0, None, "send token ids")


def _beyond_vocab(token_id: int, vocab_size: int) -> str:
    return f"names token {_shown(token_id)}; this model's ids go from 0 to {vocab_size - 1}"


def _shown(value: object) -> str:
    """A value as an error names it: short, whatever was sent."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest ones
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
