"""The server under load, named by a URL."""

from cluster.bench.grpc_client import GrpcClient
from cluster.bench.http_client import HttpClient
from cluster.bench.http_connection import Site
from cluster.bench.prompts import PromptMaker, TokenCost
from cluster.bench.reading import Asking, Client, Message, Reading

_PROBE_WORDS = (24, 152)


def open_client(url: str, asking: Asking) -> Client:
    """A client of the server at `http://`, `https://`, `grpc://` or `grpcs://`; needs a running event loop.

    Raises:
        RequestError: it is no such URL.
    """
    return GrpcClient(url, asking) if url.startswith("grpc") else HttpClient(Site.parse(url), asking)


async def token_cost(client: Client, model: str, seed: int) -> TokenCost | None:
    """What words cost in tokens there, by two short requests; None where the server counts no tokens.

    Raises:
        Failed: one of them failed.
    """
    maker = PromptMaker(seed, TokenCost())
    found = []
    for words in _PROBE_WORDS:
        reading = Reading()
        await client.ask(model, [Message("user", maker.probe(words))], 1, reading)
        if reading.prompt_tokens is None:
            return None
        found.append((words, reading.prompt_tokens))
    return TokenCost.between((found[0], found[1]))
