"""The shells that Ray hosts: each makes its plain class, gives it thread and endpoint, passes calls on."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.decoder import DTYPES
from model.pages import PageCache
from model.random_weights import RandomCheckpoint
from workers.attention import AttentionWorker, WorkerConfig
from workers.dispatch import DispatchError, RemoteExperts
from workers.engine import Engine, EngineConfig
from workers.experts import ExpertWorker, Urgency, load_experts
from workers.local import LocalModel, ModelOptions, open_checkpoint
from workers.placement import ExpertPlacement
from workers.transport.config import CarrierKind, EndpointConfig, WayConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import TransportError
from workers.transport.protocol import Address, Deadline, Endpoint
from workers.wire import Role, WorkerStatus

if TYPE_CHECKING:
    from workers.expert_ways import PairedExperts
    from workers.page_ways import Ways

_log = logging.getLogger(__name__)

_MEET_SECONDS = 30.0

TcpHost = Callable[[], str] | None


def _listening(name: str, token: bytes, tcp_host: TcpHost) -> PeerEndpoint:
    return PeerEndpoint(EndpointConfig(name, token, tcp_host=tcp_host() if tcp_host else None))


@dataclass(frozen=True)
class ExpertActorConfig:
    """One expert actor: its name among its peers, and the groups of every layer that it holds.

    `tcp_host` finds the address, inside the actor, at which other hosts reach it; None to listen for none.
    `row_carrier` moves rows between GPUs, None for rows in messages.
    """

    name: str
    directory: Path
    groups: range
    options: ModelOptions
    token: bytes = field(repr=False)
    tcp_host: TcpHost = None
    row_carrier: CarrierKind | None = None


@dataclass(frozen=True)
class ExpertActorStats:
    """What an expert actor did since its start: dispatches, or steps where rows go from GPU to GPU."""

    num_answered: int
    num_refused: int
    num_late: int


class ExpertActor:
    """Holds its experts in memory and answers dispatches in a thread of its own.

    Ray calls come for placement and health only; rows travel through the endpoint, or from GPU to GPU.
    """

    def __init__(self, config: ExpertActorConfig) -> None:
        torch.set_num_threads(1)
        checkpoint = open_checkpoint(config.directory, config.options)
        self._config = config
        self._serving = (
            _paired_serving(config, checkpoint) if config.row_carrier else _serving(config, checkpoint)
        )
        self._endpoint = _listening(config.name, config.token, config.tcp_host)
        self._stop = threading.Event()
        self._worker: ExpertServing | None = None
        self._thread: threading.Thread | None = None

    def address(self) -> Address:
        """Where attention actors reach it."""
        return self._endpoint.address

    def adopt(self, placement: ExpertPlacement) -> None:
        """Serve a placement from the next message on; the first one starts the serving.

        Raises:
            PlacementError: it asks for groups that are not held here.
        """
        if self._worker:
            self._worker.adopt(placement)
            return
        worker = self._worker = self._serving(placement)
        self._thread = threading.Thread(
            target=worker.serve, args=(self._endpoint, self._stop), name="experts", daemon=True
        )
        self._thread.start()

    def stats(self) -> ExpertActorStats:
        if not self._worker:
            return ExpertActorStats(0, 0, 0)
        return ExpertActorStats(self._worker.num_answered, self._worker.num_refused, self._worker.num_late)

    def wait_until_stopped(self) -> None:
        """Returns when `stop` is called. While it is pending the process lives; it fails when that dies."""
        self._stop.wait()

    def stop(self) -> None:
        """End the serving."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._endpoint.close()


class ExpertServing(Protocol):
    """What an expert actor's thread runs: `ExpertWorker`, or `ExpertHost` where rows go from GPU to GPU."""

    @property
    def num_answered(self) -> int: ...

    @property
    def num_refused(self) -> int: ...

    @property
    def num_late(self) -> int: ...

    def adopt(self, placement: ExpertPlacement) -> None: ...

    def serve(self, endpoint: Endpoint, stop: threading.Event) -> None: ...


def _serving(
    config: ExpertActorConfig, checkpoint: Checkpoint | RandomCheckpoint
) -> Callable[[ExpertPlacement], ExpertServing]:
    """With experts loaded, what makes the serving of a first placement."""
    options, dtype = config.options, DTYPES[config.options.dtype]
    experts = load_experts(checkpoint, config.groups, dtype, options.kernels, options.device)
    return lambda placement: ExpertWorker(config.name, checkpoint.config, experts, placement, dtype)


def _paired_serving(
    config: ExpertActorConfig, checkpoint: Checkpoint | RandomCheckpoint
) -> Callable[[ExpertPlacement], ExpertServing]:
    """The same where rows go from GPU to GPU."""
    # Imported where they run: Triton takes 60 MiB, which workers without a GPU spare.
    from workers.expert_seats import ENVIRONMENT, ExpertHost, load_fused_experts
    from workers.gpu_experts import StreamRunner

    assert config.row_carrier
    os.environ.update(ENVIRONMENT)
    experts = load_fused_experts(checkpoint, config.groups, config.options.kernels, config.options.device)
    ways = way_config(config.row_carrier, f"{config.name}/rows", config.token, config.tcp_host)
    make_runner = partial(StreamRunner, experts.device, threading.Lock())
    return lambda placement: ExpertHost(config.name, checkpoint.config, experts, placement, ways, make_runner)


def way_config(kind: CarrierKind, name: str, token: bytes, tcp_host: TcpHost) -> WayConfig:
    """Of the ways of an actor, which is about to use them."""
    from workers.transport.nccl_carrier import ENVIRONMENT

    os.environ.update(ENVIRONMENT)  # NCCL reads it when it makes its first communicator
    return WayConfig(kind, name, token, tcp_host() if tcp_host else None)


@dataclass(frozen=True)
class AttentionActorConfig:
    """One attention actor.

    `layer_seconds` is what a layer of remote experts may take, None for experts in the actor itself;
    `page_carrier` moves pages between GPUs, None for pages in messages; `row_carrier` the rows of experts;
    `num_tokens` the room in its pages; `token` and `secret` are the cluster's: to connect, and of page names;
    `tcp_host` as of an expert actor.
    """

    name: str
    role: Role
    directory: Path
    options: ModelOptions
    engine: EngineConfig
    num_tokens: int
    lease_seconds: float
    layer_seconds: float | None
    page_carrier: CarrierKind | None
    token: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    tcp_host: TcpHost = None
    row_carrier: CarrierKind | None = None


class AttentionActor:
    """Holds KV pages and runs an engine over them in a thread of its own.

    Ray calls come for placement and health only; requests, tokens, rows and pages travel through endpoints.
    """

    def __init__(self, config: AttentionActorConfig) -> None:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("workers.warm_up").setLevel(logging.INFO)
        torch.set_num_threads(1)
        self._config = config
        self._placement: ExpertPlacement | None = None
        self._is_placed = threading.Event()
        self._endpoints = [_listening(config.name, config.token, config.tcp_host)]
        model = LocalModel(config.directory, config.options, experts=self._remote_experts())
        cache = model.cache(config.num_tokens)
        graphs = model.graphs(cache, config.engine.micro_batches)
        engine = Engine(model.decoder, cache, config.engine, config.secret, graphs, model.steps)
        if self._experts is None:  # those elsewhere are not known yet
            engine.warm_up(decodes=config.role == "decode")  # nobody knows of an actor that is being made
        num_layers = model.config.num_hidden_layers + bool(config.engine.num_drafts)
        worker_config = WorkerConfig(
            config.name, config.role, model.checkpoint.digest, num_layers, config.lease_seconds
        )
        stats = self._experts.stats if self._experts else None
        ways = self._ways(cache)
        self._worker = AttentionWorker(worker_config, engine, cache, self._endpoints[0], stats, ways)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="attention", daemon=True)

    def _ways(self, cache: PageCache) -> "Ways | None":
        config = self._config
        if config.page_carrier is None:
            return None
        # Imported where they run: Triton takes 60 MiB, which workers without a GPU spare.
        from workers.page_ways import Ways

        return Ways(
            way_config(config.page_carrier, f"{config.name}/pages", config.token, config.tcp_host), cache
        )

    def _remote_experts(self) -> "RemoteExperts | PairedExperts | None":
        config = self._config
        self._experts: RemoteExperts | PairedExperts | None = None
        self._paired: PairedExperts | None = None
        if config.layer_seconds is not None and config.row_carrier is not None:
            from workers.expert_ways import paired_experts

            name = f"{config.name}/rows"
            ways = way_config(config.row_carrier, name, config.token, config.tcp_host)
            self._experts = self._paired = paired_experts(
                config.directory, config.options, config.engine, self, ways, config.layer_seconds,
                is_urgent=config.role == "decode",
            )  # fmt: skip
        elif config.layer_seconds is not None:
            endpoint = PeerEndpoint(EndpointConfig(f"{config.name}/experts", config.token))
            self._endpoints.append(endpoint)
            topk_group = ModelConfig.load(config.directory).topk_group
            self._experts = RemoteExperts(
                endpoint,
                self,
                topk_group=topk_group,
                layer_seconds=config.layer_seconds,
                urgency=Urgency.PREFILL if config.role == "prefill" else Urgency.DECODE,
            )
        return self._experts

    def _serve(self) -> None:
        try:
            if self._experts:
                self._meet(self._experts)
            self._worker.serve(self._stop)
            if self._paired:
                self._paired.close()
        except BaseException:
            _log.exception("%s is broken", self._config.name)
            os._exit(1)  # who watches this process starts another

    def _meet(self, experts: "RemoteExperts | PairedExperts") -> None:
        """Know the experts before anybody knows us."""
        self._is_placed.wait()
        if self._stop.is_set():
            return
        try:
            experts.meet(Deadline.after(_MEET_SECONDS))
        except (DispatchError, TransportError) as error:
            _log.warning("%s: %s", self._config.name, error)

    def start(self) -> Address:
        """Begin to work; where peers reach it. A second call changes nothing."""
        if self._thread.ident is None:
            self._thread.start()
        return self._endpoints[0].address

    def adopt(self, placement: ExpertPlacement) -> None:
        """Dispatch by this placement from the next layer on."""
        self._placement = placement
        self._is_placed.set()

    def status(self) -> WorkerStatus:
        """What it tells gateways, without the keys of its pages."""
        return self._worker.status

    def leave(self) -> None:
        """Take part in nothing new; what runs goes on."""
        self._worker.leave()

    def has_left(self) -> bool:
        """Whether it can be ended without anybody missing it."""
        return self._worker.has_left

    def current(self) -> ExpertPlacement:
        """The newest placement, for the dispatcher."""
        assert self._placement, "no placement was adopted before the start"
        return self._placement

    def wait_until_stopped(self) -> None:
        """Returns when `stop` is called. While it is pending the process lives; it fails when that dies."""
        self._stop.wait()

    def stop(self) -> None:
        """End the work."""
        self._stop.set()
        self._is_placed.set()
        if self._thread.ident is not None:
            self._thread.join()
        for endpoint in self._endpoints:
            endpoint.close()
