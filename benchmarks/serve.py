"""What clients of a process or a cluster see: tokens a second, time to the first token and between tokens.

    python -m benchmarks.serve [--full-width] [--apart roles|experts] [--streams 1 4 16 64] [--out FOLDER] ..

A gateway in this process, on a port of its own, and clients in another one: `streams` of them at a time, each
of which sends a streaming request and, when it is answered, the next. Every prompt is another (random ids),
so that no cached page helps. Before each measured round runs one like it, in which kernels are compiled and
graphs captured. Without `--full-width` it is the demo on the CPU; with it, on a GPU, the first 5 layers of
the 671B shape with random weights: three dense, two with all 256 experts. A whole model has 61, over many
GPUs, so only what does not grow with layers (gateway, scheduling, gaps between steps) carries over as it is.
With `--apart` a worker of each role runs it, started by Ray: `roles` have a GPU each, and pages go over NCCL;
`experts` have a GPU of their own, both roles share the other, and rows go by CUDA IPC.
"""

import argparse
import asyncio
import datetime
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import h11
import torch

from benchmarks.processes import process
from cluster.config import ClusterConfig
from cluster.demo import DEMO, OFFICIAL_671B
from cluster.gateway.cluster_backend import ClusterBackend
from cluster.gateway.server import GatewayServer
from cluster.launch import start_backend
from model.config import CONFIG_FILE, ModelConfig
from model.tokenizer import TOKENIZER_FILE

Apart = Literal["roles", "experts"]

LAYERS = 5  # of the full width: three dense ones, two with experts
REQUESTS = 2  # of each client in a measured round
ROUND_SECONDS = 300.0
READY_SECONDS = 120.0
_PLAIN_IDS = (100, 8000)  # ids that are no markup


@dataclass(frozen=True)
class Load:
    """What is asked for: `streams` clients at a time, prompts and answers of so many tokens."""

    streams: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Seen:
    """One answer as its client saw it; seconds from the request to each piece of text."""

    arrivals: list[float]
    num_tokens: int


@dataclass(frozen=True)
class Round:
    """What a load came to. Rates over the whole round, prompts included; milliseconds of all its answers."""

    streams: int
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    between_tokens_p50_ms: float
    between_tokens_p99_ms: float


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full-width", action="store_true", help="5 layers of the 671B shape, on a GPU")
    parser.add_argument("--apart", choices=["roles", "experts"], help="on two GPUs with --full-width")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="clients at a time")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    options = parser.parse_args(None if arguments is None else list(arguments))
    loads = [Load(streams, options.prompt, options.tokens) for streams in options.streams]
    with tempfile.TemporaryDirectory() as folder:
        model = full_width(Path(folder)) if options.full_width else {"directory": DEMO}
        rounds = asyncio.run(measure(model, loads, options.apart))
    print(table(rounds))
    if options.out:
        name = ("full_width" if options.full_width else "demo") + (
            f"_{options.apart}_apart" if options.apart else ""
        )
        _save(options.out, rounds, loads, name)


def full_width(directory: Path) -> dict[str, Any]:
    """The model section of random weights of the 671B shape, in a directory made for it."""
    shutil.copy(OFFICIAL_671B / CONFIG_FILE, directory)
    write_tokenizer(directory, ModelConfig.load(directory).vocab_size)
    return {
        "directory": directory, "weights": "random", "layers": LAYERS, "kernels": "triton", "device": "cuda",
        "dtype": "bfloat16", "pages": "fp8",
    }  # fmt: skip


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The demo's tokenizer with a text for every further id, since a token without text reaches no client."""
    facts = json.loads((DEMO / TOKENIZER_FILE).read_text())
    vocab = facts["model"]["vocab"]
    # The library numbers added tokens anew, from the vocabulary's end, unless they stand in it too.
    vocab.update({token["content"]: token["id"] for token in facts["added_tokens"]})
    known = set(vocab.values())
    vocab.update({f"Ġ{number}:": number for number in range(vocab_size) if number not in known})
    (directory / TOKENIZER_FILE).write_text(json.dumps(facts))
    shutil.copy(DEMO / "tokenizer_config.json", directory)


def description(model: dict[str, Any], loads: Sequence[Load], apart: Apart | None) -> ClusterConfig:
    """A server with room for the largest load."""
    most = max(loads, key=lambda load: load.streams)
    room = most.streams * (most.prompt + most.tokens + 128)
    facts: dict[str, Any] = {
        "model": model,
        "engine": {"tokens": room, "max_waiting": most.streams},
        "gateway": {"http_port": 0, "grpc_port": 0},
    }
    on_gpus = model.get("device") == "cuda"
    if apart:
        share = 0.5 if apart == "experts" else 1.0
        facts |= {role: {"tokens": room, "gpus": share} for role in ("prefill", "decode")}
    if apart == "roles" and on_gpus:
        facts["carriers"] = {"pages": "nccl"}
    if apart == "experts":
        facts["experts"] = {"placement": "pool", "nodes": 1, "layer_seconds": READY_SECONDS}
        facts["carriers"] = {"pages": "ipc", "rows": "ipc"} if on_gpus else {}
    return ClusterConfig.model_validate(facts)


async def measure(model: dict[str, Any], loads: Sequence[Load], apart: Apart | None = None) -> list[Round]:
    """One gateway, a round for each load, and one like it before to warm up."""
    config = description(model, loads, apart)
    with ExitStack() as stack:
        backend = start_backend(config, stack, print)
        backend.start()
        if isinstance(backend, ClusterBackend):
            await backend.wait_until_ready(READY_SECONDS)
        server = GatewayServer(backend, "model", config.gateway, "benchmark")
        await server.start()
        try:
            pipe = stack.enter_context(process(clients, server.http_port))
            return [await _round(pipe, load) for load in loads]
        finally:
            await server.stop()
            await backend.stop()


async def _round(pipe: Connection, load: Load) -> Round:
    for repeats in (1, REQUESTS):
        pipe.send((load, repeats))
        seconds, answers = await asyncio.to_thread(pipe.recv)
    print(f"{load.streams} clients at a time: {seconds:.1f} s for {len(answers)} answers", flush=True)
    return as_round(load, seconds, answers)


def clients(pipe: Connection, port: int) -> None:
    """A process of its own: plays every load that it is sent; says how long that took and what it saw."""
    generator = random.Random(0)
    while True:
        try:
            load, repeats = pipe.recv()
        except EOFError:
            return
        prompts = [
            [[generator.randint(*_PLAIN_IDS) for _ in range(load.prompt)] for _ in range(repeats)]
            for _ in range(load.streams)
        ]
        started = time.perf_counter()
        answers = asyncio.run(_play(port, prompts, load.tokens))
        pipe.send((time.perf_counter() - started, answers))


async def _play(port: int, prompts: list[list[list[int]]], num_tokens: int) -> list[Seen]:
    async def client(mine: list[list[int]]) -> list[Seen]:
        return [await _ask(port, prompt, num_tokens) for prompt in mine]

    async with asyncio.timeout(ROUND_SECONDS):
        each = await asyncio.gather(*(client(mine) for mine in prompts))
    return [seen for answers in each for seen in answers]


async def _ask(port: int, prompt: list[int], num_tokens: int) -> Seen:
    """One streaming request over a connection of its own.

    Raises:
        RuntimeError: it was refused, or the answer is not whole.
    """
    body = {
        "model": "model", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    length = str(len(data))
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Length", length)]
    connection = h11.Connection(h11.CLIENT)
    head = connection.send(h11.Request(method="POST", target="/v1/completions", headers=headers))
    started, arrivals, text = time.perf_counter(), list[float](), b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write((head or b"") + data)
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Data):
                text += event.data
                now = time.perf_counter() - started
                arrivals += [now] * (_num_pieces(text) - len(arrivals))
    finally:
        writer.close()
    usage = f'"completion_tokens":{num_tokens}'.encode()
    if usage not in text or not arrivals:
        raise RuntimeError(f"the answer is not whole: {text[-300:]!r}")
    return Seen(arrivals, num_tokens)


def _num_pieces(text: bytes) -> int:
    """Events with text in them."""
    return text.count(b'"text":"') - text.count(b'"text":""')


def as_round(load: Load, seconds: float, answers: Sequence[Seen]) -> Round:
    """The figures of one round."""
    first = sorted(1000 * seen.arrivals[0] for seen in answers)
    between = sorted(
        1000 * (after - before)
        for seen in answers
        for before, after in zip(seen.arrivals, seen.arrivals[1:], strict=False)
    )
    return Round(
        load.streams,
        sum(seen.num_tokens for seen in answers) / seconds,
        len(answers) * load.prompt / seconds,
        statistics.median(first),
        _p99(first),
        statistics.median(between) if between else 0.0,
        _p99(between) if between else 0.0,
    )


def _p99(ascending: Sequence[float]) -> float:
    return ascending[min(len(ascending) - 1, int(0.99 * len(ascending)))]


def table(rounds: Sequence[Round]) -> str:
    """One line a load."""
    lines = [
        "clients   output tokens/s   prompt tokens/s   first token ms p50, p99   between tokens ms p50, p99"
    ]
    for each in rounds:
        rates = f"{each.output_tokens_per_second:18.1f}{each.prompt_tokens_per_second:18.0f}"
        first = f"{each.first_token_p50_ms:16.1f}{each.first_token_p99_ms:10.1f}"
        between = f"{each.between_tokens_p50_ms:18.2f}{each.between_tokens_p99_ms:10.2f}"
        lines.append(f"{each.streams:7}{rates}{first}{between}")
    return "\n".join(lines)


def draw(rounds: Sequence[Round], path: Path, title: str) -> None:
    """Tokens a second, and the two waits, against clients at a time."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    rates, waits = figure.subplots(1, 2)
    streams = [each.streams for each in rounds]
    rates.plot(streams, [each.output_tokens_per_second for each in rounds], "o-")
    rates.set_ylabel("output tokens a second")
    for name in ("first_token", "between_tokens"):
        for share, style in (("p50", "o-"), ("p99", "o:")):
            values = [getattr(each, f"{name}_{share}_ms") for each in rounds]
            waits.plot(streams, values, style, label=f"{name.replace('_', ' ')}, {share}")
    waits.set_ylabel("milliseconds")
    waits.set_yscale("log")
    waits.legend(fontsize=7)
    for axes in (rates, waits):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("clients at a time")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def _save(folder: Path, rounds: Sequence[Round], loads: Sequence[Load], model: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if model.startswith("full_width") else "CPU"
    date = datetime.date.today().isoformat()
    path = folder / f"serve_{model}_{date}.json"
    facts = {"machine": machine, "date": date, "prompt": loads[0].prompt, "tokens": loads[0].tokens}
    path.write_text(json.dumps({**facts, "rounds": [asdict(each) for each in rounds]}, indent=1) + "\n")
    try:
        draw(rounds, path.with_suffix(".png"), f"{model.replace('_', ' ')}, {machine}, {date}")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main()
