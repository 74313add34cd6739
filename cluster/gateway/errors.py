"""What a client is told when it does not get an answer: one table for both protocols.

    EightfoldError
    └── Refusal             one row of the table, with a message for this request
        ├── Overloaded      no room now; a later try may succeed
        └── ReplicaLost     whoever ran the request is gone
            ├── ExpertsLost  it could not reach its experts, which are made anew
            └── StepFailed   it failed, perhaps because of the request

Everything else that may end a request is turned into a `Refusal` by `as_refusal`, which never repeats the
text of an error that is not ours: paths and internal names stay inside.
"""

from dataclasses import dataclass
from enum import Enum

from model.errors import EightfoldError, PromptTooLong, RequestError
from workers.engine import NumericalFailure


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of refusal looks: HTTP status, `type` and `code` of OpenAI's error object, gRPC status."""

    http: int
    type: str
    code: str
    grpc: str


class Kind(Enum):
    """The kinds of refusal."""

    @property
    def row(self) -> Row:
        return self.value

    INVALID_JSON = Row(400, "invalid_request_error", "invalid_json", "INVALID_ARGUMENT")
    INVALID_PROTOBUF = Row(400, "invalid_request_error", "invalid_protobuf", "INVALID_ARGUMENT")
    INVALID_TYPE = Row(400, "invalid_request_error", "invalid_type", "INVALID_ARGUMENT")
    INVALID_VALUE = Row(400, "invalid_request_error", "invalid_value", "INVALID_ARGUMENT")
    UNSUPPORTED = Row(400, "invalid_request_error", "unsupported_parameter", "INVALID_ARGUMENT")
    MISSING = Row(400, "invalid_request_error", "missing_required_parameter", "INVALID_ARGUMENT")
    CONTEXT = Row(400, "invalid_request_error", "context_length_exceeded", "INVALID_ARGUMENT")
    BAD_HTTP = Row(400, "invalid_request_error", "invalid_http", "INVALID_ARGUMENT")
    NO_KEY = Row(401, "authentication_error", "invalid_api_key", "UNAUTHENTICATED")
    NO_MODEL = Row(404, "invalid_request_error", "model_not_found", "NOT_FOUND")
    NO_PATH = Row(404, "invalid_request_error", "not_found", "UNIMPLEMENTED")
    NO_METHOD = Row(405, "invalid_request_error", "method_not_allowed", "UNIMPLEMENTED")
    SLOW_BODY = Row(408, "invalid_request_error", "request_timeout", "DEADLINE_EXCEEDED")
    TOO_LARGE = Row(413, "invalid_request_error", "request_too_large", "RESOURCE_EXHAUSTED")
    MEDIA_TYPE = Row(415, "invalid_request_error", "unsupported_media_type", "INVALID_ARGUMENT")
    HEADERS = Row(431, "invalid_request_error", "request_too_large", "RESOURCE_EXHAUSTED")
    NUMERICAL = Row(500, "server_error", "numerical_error", "INTERNAL")
    INTERNAL = Row(500, "server_error", "internal_error", "INTERNAL")
    OVERLOADED = Row(503, "server_error", "overloaded", "UNAVAILABLE")
    REPLICA_LOST = Row(503, "server_error", "replica_lost", "UNAVAILABLE")
    TIMEOUT = Row(504, "server_error", "timeout", "DEADLINE_EXCEEDED")
    SLOW_READER = Row(504, "server_error", "slow_reader", "DEADLINE_EXCEEDED")


class Refusal(EightfoldError):
    """A request that ends without the answer it asked for.

    Args:
        kind: its row in the table.
        message: for the person who sent the request: what is wrong, which value, what would do.
        param: the field of the request, where it is about one.
        retry_after: seconds after which a later try is worth while, where it is.
    """

    def __init__(
        self, kind: Kind, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(kind, message, param, retry_after)
        self.kind, self.message, self.param, self.retry_after = kind, message, param, retry_after

    def __str__(self) -> str:
        return f"{self.param}: {self.message}" if self.param else self.message

    @property
    def row(self) -> Row:
        return self.kind.row

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object of the OpenAI API."""
        row = self.row
        return {"error": {"message": str(self), "type": row.type, "param": self.param, "code": row.code}}


class Overloaded(Refusal):
    """No room now: the queue is full, the server drains, or it is not ready yet."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(Kind.OVERLOADED, message, None, retry_after)

    def __reduce__(self) -> tuple[type["Overloaded"], tuple[str, float | None]]:
        return type(self), (self.message, self.retry_after)


class ReplicaLost(Refusal):
    """Whoever ran the request failed; the request itself is not to blame."""

    def __init__(self, message: str = "the model failed while it ran this request; send it again") -> None:
        super().__init__(Kind.REPLICA_LOST, message, None, 1.0)

    def __reduce__(self) -> tuple[type["ReplicaLost"], tuple[str]]:
        return type(self), (self.message,)


class ExpertsLost(ReplicaLost):
    """Experts were away for longer than a layer waits for them."""


class StepFailed(ReplicaLost):
    """A step with the request in it failed, and nobody knows whose fault that was."""


def as_refusal(error: BaseException) -> Refusal:
    """What a client is told about an error, whatever it is."""
    match error:
        case Refusal():
            return error
        case PromptTooLong():
            return Refusal(Kind.CONTEXT, error.problem, error.field)
        case RequestError():
            return Refusal(Kind.INVALID_VALUE, error.problem, error.field)
        case NumericalFailure():
            return Refusal(Kind.NUMERICAL, "the model computed no valid probabilities for this request")
        case TimeoutError():
            return Refusal(Kind.TIMEOUT, "the time for this request is spent", None, 1.0)
    return Refusal(Kind.INTERNAL, "something went wrong on our side; the request id names this case")
