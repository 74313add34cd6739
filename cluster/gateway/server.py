"""Both servers of the gateway over one backend: bound, started, drained and stopped together."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import uvicorn

from cluster.config import ConfigError, GatewaySection, TlsSection
from cluster.gateway.auth import ApiKeys
from cluster.gateway.backend import Backend
from cluster.gateway.core import Gateway
from cluster.gateway.grpc_server import GrpcLimits, GrpcServer
from cluster.gateway.http import http_app
from cluster.gateway.http_protocol import protocol_class
from cluster.gateway.tracing import Tracing

_BACKLOG = 1024
_SEND_BUFFER = 512 * 1024


class GatewayServer:
    """HTTP and gRPC, listening from the moment it is made.

    Must be made in the event loop that serves.

    Args:
        backend: who runs the model, started already.
        model: the name that clients call it by.
        config: where to listen, who may come in.
        version: of this program.
        tracing: told of every request; None where nobody wants to know. Whoever made it closes it.

    Raises:
        ConfigError: an address is taken or is none of this machine, or a TLS file does not serve.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        config: GatewaySection,
        version: str,
        tracing: Tracing | None = None,
    ) -> None:
        self.gateway = Gateway(backend, model, config.limits.budgets(), tracing)
        self._config = config
        keys = ApiKeys(config.api_key_hashes)
        http_limits = config.limits.http()
        self._socket = _listen(config.host, config.http_port)
        self.http_port: int = self._socket.getsockname()[1]
        try:
            self._grpc = self._grpc_server(keys)
            self._http = _Server(
                uvicorn.Config(
                    http_app(self.gateway, keys, http_limits, version),
                    http=protocol_class(http_limits),
                    ws="none", lifespan="off", loop="asyncio",
                    access_log=False, log_config=None, server_header=False, date_header=True,
                    # Headers beyond our own limit still get an answer that says so, up to twice the limit.
                    h11_max_incomplete_event_size=2 * http_limits.header_bytes,
                    timeout_graceful_shutdown=1, backlog=_BACKLOG,
                    ssl_certfile=config.tls.certificate if config.tls else None,
                    ssl_keyfile=config.tls.key if config.tls else None,
                )
            )  # fmt: skip
            self._http.config.load()
        except (OSError, ValueError) as error:
            self._socket.close()
            raise ConfigError("gateway", "tls", f"cannot be used: {error}") from None
        except BaseException:
            self._socket.close()
            raise
        self.grpc_port = self._grpc.port
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serves from here on."""
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        await self._grpc.start()
        while not self._http.started:
            await asyncio.sleep(0.01)

    async def drain(self, on_wait: Callable[[float, int], None] | None = None) -> bool:
        """Takes no more requests on and waits for those that are open; returns whether all came to their end.

        Args:
            on_wait: told once a second how much time is left for how many requests.
        """
        self.gateway.is_draining = True
        await self._grpc.set_ready(False)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_seconds
        next_word = loop.time()
        while num_open := len(self.gateway.journal):
            left = deadline - loop.time()
            if left <= 0:
                return False
            if on_wait and loop.time() >= next_word:
                on_wait(left, num_open)
                next_word += 1
            await asyncio.sleep(0.05)
        return True

    async def stop(self) -> None:
        """Closes both servers; what is still open is cut."""
        self._http.should_exit = True
        await self._grpc.stop(grace=0.5)
        if self._serving:
            await self._serving
        self._socket.close()

    def _grpc_server(self, keys: ApiKeys) -> GrpcServer:
        config, limits = self._config, self._config.limits
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            return GrpcServer(
                self.gateway,
                keys,
                GrpcLimits(limits.body_bytes, limits.header_bytes, limits.send_seconds),
                f"{host}:{config.grpc_port}",
                _credentials(config.tls) if config.tls else None,
            )
        except RuntimeError:
            problem = (
                f"{config.host}:{config.grpc_port} cannot be listened at; is it taken? 0 takes any free port"
            )
            raise ConfigError("gateway", "grpc_port", problem) from None


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's business."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where it is told that the protocol is TCP; with the delay on, an
    # answer of two writes waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: what the kernel may hold for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        problem = f"{host}:{port} cannot be listened at: {error.strerror}; 0 takes any free port"
        raise ConfigError("gateway", "http_port", problem) from None
    listener.setblocking(False)
    return listener


def _credentials(tls: TlsSection) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(_read(tls.key), _read(tls.certificate))])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("gateway", "tls", f"{path.name}: {error.strerror}") from None
