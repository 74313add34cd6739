"""The part of a description that switches traces of requests on."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PATH = "/v1/traces"  # below an endpoint, as OTLP over HTTP has it
_PORTS = {"http": 80, "https": 443}


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is no URL; it should be one such as http://collector:4318") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user or a password; nothing that must not be seen belongs in a description")
    if parts.scheme not in _PORTS or not parts.hostname or port == 0 or not url.isprintable():
        raise ValueError(f"is {url!r}; it should be a URL such as http://collector:4318")
    if parts.query or parts.fragment:
        raise ValueError(f"is {url!r}; it should end with its host, port or path")
    if parts.path.rstrip("/").endswith(PATH):
        raise ValueError(f"is {url!r}; leave {PATH} out, it is added")
    return url.rstrip("/")


class TracingSection(BaseModel):
    """Traces of requests, sent as OTLP over HTTP to a collector; without this section there are none.

    `sample` is the share of requests that are traced; where a client's `traceparent` has decided, that holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    endpoint: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_endpoint)]
    sample: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.endpoint)
        return parts.port or _PORTS[parts.scheme]
