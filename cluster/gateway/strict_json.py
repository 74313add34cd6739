"""JSON from strangers: what the standard library lets through and a server should not, is refused by name."""

import json
import math
import re
from typing import Any, NoReturn

from cluster.gateway.errors import Kind, Refusal

MAX_DEPTH = 64

# A string is skipped as a whole, so that brackets inside it do not count.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|([\[{])|[\]}]', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        Refusal: it is none, or one that two readers could understand differently.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise _invalid("the body begins with a byte order mark; send plain UTF-8")
    _check_depth(text)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_number
        )
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer of more digits than Python converts
        raise _invalid("the body holds a number that is too long") from None
    if not isinstance(value, dict):
        raise Refusal(Kind.INVALID_TYPE, "the body must be a JSON object")
    if _ESCAPED_SURROGATE.search(text):
        _check_surrogates(value, "")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for found in _BRACKETS.finditer(text):
        if found[1]:
            depth += 1
            if depth > MAX_DEPTH:
                raise _invalid(f"the body is nested deeper than {MAX_DEPTH} levels")
        elif found[0][0] != '"':
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Refusal(Kind.INVALID_JSON, "stands twice in one object; send it once", _short(key))
            seen.add(key)
    return entries


def _refuse_constant(constant: str) -> NoReturn:
    raise _invalid(f"the body holds {constant}, which is not JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _invalid("the body holds a number beyond the range of a 64-bit float")
    return value


def _check_surrogates(value: object, where: str) -> None:
    """Depth is bounded by `_check_depth`."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refusal(
                Kind.INVALID_VALUE, "has half a surrogate pair, which is no text", where or None
            ) from None
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_surrogates(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, where)
            _check_surrogates(item, f"{where}.{key}" if where else key)


def _short(key: str) -> str:
    text = key.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 64 else f"{text[:61]}..."


def _invalid(message: str) -> Refusal:
    return Refusal(Kind.INVALID_JSON, message)
