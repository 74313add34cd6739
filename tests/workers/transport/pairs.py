"""Two endpoints in this process, connected by the carrier that a test wants."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.workers.transport.processes import new_endpoint, soon
from workers.transport.endpoint import PeerEndpoint
from workers.transport.local import LocalSwitch

CARRIERS = ["local", "shared_memory", "tcp"]


@contextmanager
def attended(endpoint: PeerEndpoint) -> Iterator[None]:
    """Somebody looks after the endpoint meanwhile: those who come are greeted."""
    stop = threading.Event()

    def attend() -> None:
        while not stop.is_set():
            endpoint.pump(0.01)

    thread = threading.Thread(target=attend)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def pair(carrier: str, **overrides: object) -> Iterator[tuple[PeerEndpoint, PeerEndpoint]]:
    """Two endpoints of this process, connected by a carrier."""
    switch = LocalSwitch() if carrier == "local" else None
    a = new_endpoint("a", "none", switch=switch, **overrides)
    b = new_endpoint("b", carrier, switch=switch, **overrides)
    if carrier == "shared_memory":
        a.close()
        a = new_endpoint("a", carrier, **overrides)
    try:
        with attended(b):
            assert a.connect(b.address, soon()).name == "b"
            while "a" not in b.peers:
                time.sleep(0.001)
        yield a, b
    finally:
        a.close()
        b.close()
