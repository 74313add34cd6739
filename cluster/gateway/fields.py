"""Reading the fields of a request's JSON object, each with its type checked and its name in the refusal."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from cluster.gateway.errors import Kind, Refusal

_T = TypeVar("_T")


class Fields:
    """The fields of one object. A field that is null counts as not sent.

    Args:
        entries: the object.
        within: name of the field that the object is the value of; "" for the request itself.
    """

    def __init__(self, entries: Mapping[str, Any], within: str = "") -> None:
        self._entries = {key: value for key, value in entries.items() if value is not None}
        self._within = within

    def name(self, key: str) -> str:
        return f"{self._within}.{key}" if self._within else key

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> set[str]:
        return set(self._entries)

    def get(self, key: str) -> Any:
        """The value as it was sent; None where it was not."""
        return self._entries.get(key)

    def need(self, key: str) -> Any:
        if key not in self._entries:
            raise Refusal(Kind.MISSING, "is missing", self.name(key))
        return self._entries[key]

    def text(self, key: str) -> str | None:
        return self._typed(key, str, "a string")

    def flag(self, key: str) -> bool | None:
        return self._typed(key, bool, "true or false")

    def integer(self, key: str) -> int | None:
        return self._typed(key, int, "an integer")

    def number(self, key: str) -> float | None:
        return self._typed(key, float, "a number")

    def items(self, key: str) -> list[Any] | None:
        return self._typed(key, list, "a list")

    def mapping(self, key: str) -> dict[str, Any] | None:
        return self._typed(key, dict, "an object")

    def object(self, key: str) -> "Fields | None":
        value = self.mapping(key)
        return None if value is None else Fields(value, self.name(key))

    def refuse(self, key: str, problem: str, kind: Kind = Kind.UNSUPPORTED) -> Refusal:
        return Refusal(kind, problem, self.name(key))

    def _typed(self, key: str, kind: type[_T], called: str) -> _T | None:
        value = self._entries.get(key)
        # To Python a bool is an int and an int is no float; to JSON it is the other way round.
        is_number = kind in (int, float) and isinstance(value, int) and not isinstance(value, bool)
        if value is None or is_number or (type(value) is kind):
            return cast(_T | None, value)
        raise Refusal(Kind.INVALID_TYPE, f"must be {called}, not {kind_of(value)}", self.name(key))


def kind_of(value: object) -> str:
    """What a value is called in JSON."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")
