"""What a gateway does for a token: CPU time of its process, with workers that compute nothing.

A worker process sends a message of tokens for each step, as an attention worker does: one token of every open
request. `backend` reads them from the `ClusterBackend`'s streams; `HTTP` and `gRPC` are whole answers to
clients in a third process. At full speed messages come together and share a wake-up of the loop; with a pause
between steps each comes alone. What the gateway does while nobody asks (workers' reports, the directory) is
taken off.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import torch

from benchmarks.processes import new_endpoint, process, soon
from cluster.config import ClusterConfig
from cluster.demo import DEMO
from cluster.directory import Directory, WorkerEntry
from cluster.gateway.backend import ModelFacts
from cluster.gateway.cluster_backend import BackendLimits, ClusterBackend
from cluster.gateway.server import GatewayServer
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from cluster.router import Router
from model.checkpoint import Checkpoint
from model.sampling_params import SamplingParams
from model.text import load_text
from workers.load import WorkerLoad
from workers.prefix import PrefixHasher
from workers.sequence import Request, Token
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Received
from workers.wire import Generate, Kind, Role, WorkerStatus, pack, pack_tokens, unpack

PROMPT = "a harbor is"
_PLAIN_TOKENS = 5000  # ids that are no markup
_STATUS_SECONDS = 0.1
_IDLE_SECONDS = 2.0


@dataclass
class Order:
    """A request at work: how many of its tokens have been sent."""

    client: str
    request: Request
    num_sent: int = 0

    def next_token(self) -> Token:
        position = len(self.request.prompt_ids) + self.num_sent
        self.num_sent += 1
        is_last = self.num_sent == self.request.params.max_tokens
        return Token(self.request.uid, position % _PLAIN_TOKENS, position, "length" if is_last else None)


class Pretender:
    """A worker that only sends: `at_once` requests are awaited, then each step has a token of every one."""

    def __init__(self, role: Role, endpoint: PeerEndpoint, pause: float, at_once: int) -> None:
        self._role, self._endpoint, self._pause, self._at_once = role, endpoint, pause, at_once
        self._orders: list[Order] = []
        self._watchers: set[str] = set()
        self._next_status = Deadline.after(0)

    def serve(self, pipe: Connection) -> None:
        while not pipe.poll():
            self._read()
            if self._next_status.is_over:
                self._tell_status()
            if len(self._orders) == self._at_once:
                self._stream()

    def _read(self) -> None:
        try:
            event = self._endpoint.receive(Deadline.after(0.02))
        except DeadlineExceeded:
            return
        if isinstance(event, Received) and event.message.kind == Kind.WATCH:
            self._watchers.add(event.peer.name)
        elif isinstance(event, Received) and event.message.kind == Kind.GENERATE:
            self._orders.append(Order(event.peer.name, unpack(Generate, event.message).request))

    def _tell_status(self) -> None:
        self._next_status = Deadline.after(_STATUS_SECONDS)
        status = WorkerStatus(self._role, WorkerLoad(free_pages=1000, num_pages=1000))
        for name in self._watchers & self._endpoint.peers.keys():  # gateways come and go
            self._endpoint.send(name, pack(Kind.STATUS, status), soon())

    def _stream(self) -> None:
        client = self._orders[0].client
        while self._orders:
            tokens = [order.next_token() for order in self._orders]
            self._endpoint.send(client, pack_tokens(tokens), soon())
            self._orders = [
                order for order in self._orders if order.num_sent < order.request.params.max_tokens
            ]
            if self._pause:
                time.sleep(self._pause)


def pretend(pipe: Connection, role: Role, pause: float, at_once: int) -> None:
    """A process of its own."""
    torch.set_num_threads(1)
    endpoint = new_endpoint(role, same_host=True)
    pipe.send(endpoint.address)
    Pretender(role, endpoint, pause, at_once).serve(pipe)
    endpoint.close()


@contextmanager
def pretenders(pause: float, at_once: int) -> Iterator[Directory]:
    with ExitStack() as stack:
        entries = []
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            pipe = stack.enter_context(process(pretend, role, pause, at_once))
            address: Address = pipe.recv()
            entries.append(WorkerEntry(role, role, "here", 0, address))
        yield Directory(workers=tuple(entries))


async def running_backend(directory: Directory) -> ClusterBackend:
    async def ask(calls_prefill: bool) -> Directory:
        return directory

    checkpoint = Checkpoint.open(DEMO)
    facts = ModelFacts(
        checkpoint.config, *load_text(DEMO, checkpoint.config), checkpoint.digest,
        checkpoint.config.max_position_embeddings,
    )  # fmt: skip
    router = Router(PrefixHasher(bytes(32)), local_prefill_tokens=512)
    endpoint = new_endpoint("gateway", same_host=True)
    limits = BackendLimits(max_waiting=256, max_open=256, max_unread=10**6)
    backend = ClusterBackend(facts, endpoint, router, ask, limits)
    backend.start()
    await backend.wait_until_ready(30)
    return backend


async def from_backend(backend: ClusterBackend, idle: float, num_streams: int, num_tokens: int) -> float:
    """CPU seconds that it took to read all streams, without any protocol."""

    async def read(uid: str) -> None:
        request = Request(uid, tuple(range(10)), SamplingParams(max_tokens=num_tokens))
        async for _ in await backend.generate(request):
            pass

    started = work(idle)
    await asyncio.gather(*(read(f"{number}") for number in range(num_streams)))
    return work(idle) - started


async def through_server(
    backend: ClusterBackend, idle: float, protocol: str, num_streams: int, num_tokens: int
) -> float:
    """CPU seconds of the gateway while clients in another process read whole answers."""
    config = ClusterConfig.model_validate({"gateway": {"http_port": 0, "grpc_port": 0}})
    server = GatewayServer(backend, "demo", config.gateway, "benchmark")
    await server.start()
    port = server.http_port if protocol == "HTTP" else server.grpc_port
    try:
        with process(clients, protocol, port, num_streams, num_tokens) as pipe:
            await asyncio.to_thread(pipe.recv)  # it is ready
            started = work(idle)
            pipe.send("go")
            seen = await asyncio.to_thread(pipe.recv)
            seconds = work(idle) - started
        assert seen == [num_tokens] * num_streams, seen
        return seconds
    finally:
        await server.stop()


def clients(pipe: Connection, protocol: str, port: int, num_streams: int, num_tokens: int) -> None:
    """A process of its own: reads the streams and says how many tokens each had."""
    read = by_http if protocol == "HTTP" else by_grpc

    async def run() -> list[int]:
        return await asyncio.gather(*(read(port, num_tokens) for _ in range(num_streams)))

    pipe.send("ready")
    pipe.recv()
    pipe.send(asyncio.run(run()))


async def by_http(port: int, num_tokens: int) -> int:
    body = {
        "model": "demo", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    answer = await reader.read(-1)
    writer.close()
    usage = answer.rsplit(b'"completion_tokens":', 1)
    return int(usage[1].split(b",")[0]) if len(usage) == 2 else -1


async def by_grpc(port: int, num_tokens: int) -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        sampling = pb.Sampling(max_tokens=num_tokens, ignore_eos=True)
        request = pb.GenerateRequest(model="demo", text=PROMPT, sampling=sampling)
        num_seen = 0
        async for response in InferenceServiceStub(channel).Generate(request):
            num_seen += len(response.delta.tokens)
        return num_seen


def work(idle: float) -> float:
    """CPU seconds so far, less what would have been spent anyway."""
    return time.process_time() - idle * time.perf_counter()


async def idle_share() -> float:
    """CPU seconds a second of a gateway that nobody asks."""
    started = time.process_time()
    await asyncio.sleep(_IDLE_SECONDS)
    return (time.process_time() - started) / _IDLE_SECONDS


async def cost(way: str, directory: Directory, num_streams: int, num_tokens: int) -> float:
    """Microseconds a token."""
    backend = await running_backend(directory)
    try:
        idle = await idle_share()
        if way == "backend":
            seconds = await from_backend(backend, idle, num_streams, num_tokens)
        else:
            seconds = await through_server(backend, idle, way, num_streams, num_tokens)
    finally:
        await backend.stop()
    return round(seconds / (num_streams * num_tokens) * 1e6, 1)


def gateway_tokens(num_tokens: int) -> dict[str, float]:
    """CPU microseconds a token, alone and with 32 streams, at full speed and in steps of 20 ms."""
    rows = {}
    for num_streams, pause, count in (
        (1, 0.0, 8 * num_tokens), (1, 0.02, num_tokens), (32, 0.0, num_tokens), (32, 0.02, num_tokens)
    ):  # fmt: skip
        pace = "every 20 ms" if pause else "at full speed"
        streams = "1 stream" if num_streams == 1 else f"{num_streams} streams"
        with pretenders(pause, num_streams) as directory:
            for way in ("backend", "HTTP", "gRPC"):
                rows[f"{way}, {streams} {pace}"] = asyncio.run(cost(way, directory, num_streams, count))
    return rows
