"""Both servers of the gateway over one backend: bound, started, drained and stopped together."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from cluster.config import ConfigError, GatewaySection
from cluster.gateway.auth import ApiKeys
from cluster.gateway.backend import Backend
from cluster.gateway.certificates import CertificateError, Certificates
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
        self.certificates = self._read_certificates()
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
                ),
                http_limits.header_seconds,
            )  # fmt: skip
            self._http.config.load()
            if self.certificates:
                self._http.config.ssl = self.certificates.http_context
        except BaseException:
            self._socket.close()
            raise
        self.grpc_port = self._grpc.port
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serves from here on."""
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        if self.certificates:
            self._watching = asyncio.create_task(self.certificates.watch())
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
        if self._watching:
            self._watching.cancel()
        self._http.should_exit = True
        await self._grpc.stop(grace=0.5)
        if self._serving:
            await self._serving
        self._socket.close()

    def _read_certificates(self) -> Certificates | None:
        if not self._config.tls:
            return None
        try:
            return Certificates(self._config.tls, self.gateway.metrics)
        except CertificateError as error:
            raise ConfigError("gateway", "tls", f"cannot be used: {error}") from None

    def _grpc_server(self, keys: ApiKeys) -> GrpcServer:
        config, limits = self._config, self._config.limits
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            return GrpcServer(
                self.gateway,
                keys,
                GrpcLimits(
                    limits.body_bytes, limits.header_bytes, limits.send_seconds, limits.header_seconds
                ),
                f"{host}:{config.grpc_port}",
                self.certificates.grpc_credentials if self.certificates else None,
            )
        except RuntimeError:
            problem = (
                f"{config.host}:{config.grpc_port} cannot be listened at; is it taken? 0 takes any free port"
            )
            raise ConfigError("gateway", "grpc_port", problem) from None


class _Server(uvicorn.Server):
    """uvicorn's, on sockets that listen already.

    Args:
        config: of uvicorn.
        handshake_seconds: what a TLS handshake may take; uvicorn leaves asyncio's minute.
    """

    def __init__(self, config: uvicorn.Config, handshake_seconds: float) -> None:
        super().__init__(config)
        self._handshake_seconds = handshake_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        await self.lifespan.startup()

        def protocol() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        limit = self._handshake_seconds if config.ssl else None
        self.servers = [
            await loop.create_server(
                protocol, sock=one, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=limit
            )
            for one in sockets or ()
        ]
        self.started = True

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
