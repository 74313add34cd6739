"""The shells that Ray hosts: each makes its plain class, gives it thread and endpoint, passes calls on."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.backend import Backend
from model.checkpoint import Checkpoint
from model.decoder import DTYPES, DTypeName
from workers.experts import ExpertWorker, load_experts
from workers.placement import ExpertPlacement
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Address


@dataclass(frozen=True)
class ExpertActorConfig:
    """One expert actor: its name among its peers, and the groups of every layer that it holds."""

    name: str
    directory: Path
    groups: range
    dtype: DTypeName
    kernels: Backend
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class ExpertActorStats:
    """What an expert actor did since its start."""

    num_answered: int
    num_refused: int
    num_late: int


class ExpertActor:
    """Holds its experts in memory and answers dispatches in a thread of its own.

    Ray calls come for placement and health only; rows travel through the endpoint.
    """

    def __init__(self, config: ExpertActorConfig) -> None:
        torch.set_num_threads(1)
        checkpoint = Checkpoint.open(config.directory)
        self._config, self._model_config = config, checkpoint.config
        self._experts = load_experts(checkpoint, config.groups, DTYPES[config.dtype], config.kernels)
        self._endpoint = PeerEndpoint(EndpointConfig(config.name, config.token))
        self._stop = threading.Event()
        self._worker: ExpertWorker | None = None
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
        config = self._config
        worker = ExpertWorker(config.name, self._model_config, self._experts, placement, DTYPES[config.dtype])
        self._worker = worker
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
