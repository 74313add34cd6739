"""A way between two GPUs: an endpoint of its own, a carrier that is paired over it, and a thread for both.

Somebody waits at an address, the other joins him there; both pair (`transport/pairing.py`) while their
workers go on. Then the thread watches the connection, whose end is the first that is heard of a peer's death.
"""

import logging
import threading
import time

import torch

from workers.transport.carrier import Carrier, CarrierFailed, CarrierUnavailable
from workers.transport.config import OPENING_SECONDS, EndpointConfig, WayConfig
from workers.transport.cuda_memory import CudaError
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import TransportError
from workers.transport.pairing import keep_watch, pair
from workers.transport.protocol import Deadline, DeadlineExceeded, Received
from workers.transport.slots import SlotPlan

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class Way:
    """A way to one peer: opening, then open, then failed, for ever.

    Memory that a device may still use goes back only after `close`, when the device is done with it.
    """

    what = "way"  # for the log

    def __init__(
        self,
        config: WayConfig,
        number: int,
        device: torch.device,
        wait_seconds: float,
    ) -> None:
        """Open the endpoint; `start` does the rest.

        Args:
            number: of this way among the worker's.
            wait_seconds: that a wait on the device may last.
        """
        self.name = f"{config.name}/{number}"
        self._endpoint = PeerEndpoint(EndpointConfig(self.name, config.token, tcp_host=config.tcp_host))
        self._kind, self._device, self._wait_seconds = config.kind, device, wait_seconds
        self._carrier: Carrier | None = None
        self._is_open = False
        self._failure: str | None = None
        self._failed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def start(self) -> None:
        """Begin to open."""
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def is_opening(self) -> bool:
        """Whether it may still open; that has a deadline of its own."""
        return not self._is_open and self._failure is None

    @property
    def has_failed(self) -> bool:
        """Whether it is of no use any more."""
        return self._failed.is_set()

    def check(self) -> None:
        """Raises CarrierFailed once anything went wrong."""
        if self._failure is not None:
            raise CarrierFailed(self.name, self._failure)
        if self._carrier:
            self._carrier.check()

    def abort(self, reason: str) -> None:
        """Whatever waits for the peer goes on, and the peer hears of it. From any thread."""
        self._failure = self._failure or reason
        if carrier := self._carrier:
            carrier.abort(reason)
        self._failed.set()

    def close(self, reason: str) -> None:
        """End it; its memory goes back when the GPU has done with it. May be called twice."""
        self.abort(reason)
        self._closed.set()

    def join(self, seconds: float) -> bool:
        """Whether all is given back within so long, after `close`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # What kinds of ways differ in; all of it is called by the way's own thread.

    def _find(self, deadline: Deadline) -> tuple[str, int, SlotPlan]:
        """Meet the peer: its name, the pairing's epoch, and the slots that it may write."""
        raise NotImplementedError

    def _begin(self, carrier: Carrier) -> None:
        """The carrier works."""

    def _deliver(self, received: Received) -> None:
        """What the peer says by the connection."""

    def _watch(self, carrier: Carrier) -> None:
        """Until the peer is gone, or the way has failed."""
        keep_watch(self._endpoint, {carrier.peer: carrier}, self._failed, self._deliver)

    def _part_from_peer(self) -> None:
        """So that it hears of the end."""
        self._endpoint.close()

    def _is_idle(self) -> bool:
        """Whether the GPU has done with the carrier, which has been aborted."""
        return True

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            deadline = Deadline.after(OPENING_SECONDS)
            peer, epoch, plan = self._find(deadline)
            self._pair(peer, epoch, plan, deadline)
            assert self._carrier
            self._watch(self._carrier)
            self.abort(f"{peer} is gone")
        except (CarrierFailed, CarrierUnavailable, CudaError, TransportError) as error:
            self._give_up(str(error))
        except BaseException as error:
            _log.exception("%s: no %s", self.name, self.what)
            self.abort(type(error).__name__)
        finally:
            self._part_from_peer()
        self._closed.wait()
        self._give_back()

    def _pair(self, peer: str, epoch: int, plan: SlotPlan, deadline: Deadline) -> None:
        carrier = self._carrier = pair(
            self._endpoint, peer, self._kind, epoch, plan, self._device,
            timeout=self._wait_seconds, deadline=deadline,
        )  # fmt: skip
        if self._failure is not None:  # it was closed meanwhile
            raise CarrierFailed(peer, self._failure)
        self._begin(carrier)
        self._is_open = True

    def _wait_for_peer(self, deadline: Deadline) -> str:
        """Until somebody joins."""
        while not self._endpoint.peers:
            if self._failed.is_set():
                raise CarrierFailed(self.name, "it was closed")
            if deadline.is_over:
                raise DeadlineExceeded(f"waiting for the peer of a {self.what}")
            self._endpoint.pump(_POLL_SECONDS)
        return next(iter(self._endpoint.peers))

    def _give_up(self, reason: str) -> None:
        if self._failure is None:  # not because it was told to
            _log.warning("%s: no %s: %s", self.name, self.what, reason)
        self.abort(reason)

    def _give_back(self) -> None:
        """Close the carrier once nothing on the GPU uses it. However long that takes: until then this thread,
        which has nothing else to do, holds memory that must not be given to others."""
        while not self._is_idle():
            time.sleep(_POLL_SECONDS)
        try:
            if self._carrier:
                self._carrier.close()
        except (CudaError, TransportError) as error:
            _log.warning("%s: closing the %s: %s", self.name, self.what, error)
        self._carrier = None
