"""A control message: GENERATE to a worker and TOKENS back, packed and read as gateways and workers do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.bare_hops import Hop
from benchmarks.processes import new_endpoint, process, soon
from model.sampling_params import SamplingParams
from workers.sequence import Request, Token
from workers.transport.protocol import Deadline, DeadlineExceeded, Received
from workers.wire import Generate, Kind, pack, pack_tokens, unpack


def answering(pipe: Connection) -> None:
    """Answers each order with its first token, until the pipe ends."""
    torch.set_num_threads(1)
    endpoint = new_endpoint("worker", same_host=True)
    pipe.send(endpoint.address)
    while True:
        try:
            event = endpoint.receive(Deadline.after(0.5))
        except DeadlineExceeded:
            if pipe.poll():
                break
        else:
            if isinstance(event, Received):
                request = unpack(Generate, event.message).request
                token = Token(request.uid, 7, len(request.prompt_ids))
                endpoint.send(event.peer.name, pack_tokens([token]), soon())
    endpoint.close()


@contextmanager
def control(num_prompt: int) -> Iterator[Hop]:
    """Order an answer to so many tokens, and read the first token of it."""
    with process(answering) as pipe:
        endpoint = new_endpoint("gateway", same_host=True)
        endpoint.connect(pipe.recv(), soon())
        request = Request("0" * 24, tuple(range(num_prompt)), SamplingParams(max_tokens=64))

        def order() -> None:
            endpoint.send("worker", pack(Kind.GENERATE, Generate(request), soon().left_us()), soon())
            event = endpoint.receive(soon())
            assert isinstance(event, Received)
            assert unpack(list[Token], event.message)[0].position == num_prompt

        yield order
        endpoint.close()


CONTROL: dict[str, Callable[[], Any]] = {
    f"GENERATE of {num_prompt} tokens, TOKENS back": partial(control, num_prompt) for num_prompt in (16, 1000)
}
