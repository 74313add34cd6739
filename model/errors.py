"""What can go wrong with what users bring.

    EightfoldError
    ├── CheckpointError     a checkpoint that must not be served
    └── RequestError        a request that cannot be served as it stands
        └── PromptTooLong   more tokens than the context holds

The text of an error is written for the person who can mend it: which file, tensor or field, what was
expected, what was found. Broken invariants of our own are `assert`s and never one of these.
"""


class EightfoldError(Exception):
    """Base of every error that a user can cause and mend."""


class CheckpointError(EightfoldError):
    """A checkpoint that must not be served.

    Args:
        file: name of the file inside the checkpoint, never its path on this machine.
        what: the tensor or config key concerned, or "" where it is the file as a whole.
        expected: what a good checkpoint has there.
        found: what this one has.
    """

    def __init__(self, file: str, what: str, expected: str, found: str) -> None:
        super().__init__(file, what, expected, found)
        self.file, self.what, self.expected, self.found = file, what, expected, found

    def __str__(self) -> str:
        where = f"{self.file}: {self.what}" if self.what else self.file
        return f"{where}: expected {self.expected}, found {self.found}"


class RequestError(EightfoldError):
    """A request that cannot be served as it stands.

    Args:
        field: the request's field, by the name its sender used.
        problem: what is wrong with it and which value would do.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class PromptTooLong(RequestError):
    """The prompt, or the prompt and the answer asked for, do not fit the context."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__("prompt", f"has {num_tokens} tokens; the context holds {limit}")
        self.num_tokens, self.limit = num_tokens, limit

    def __reduce__(self) -> tuple[type["PromptTooLong"], tuple[int, int]]:
        return type(self), (self.num_tokens, self.limit)
