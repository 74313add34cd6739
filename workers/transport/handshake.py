"""How two peers come to trust a connection, before any message passes on it.

Both know the cluster's token and never send it. C connects, A accepts; each proves the token over everything
said so far, under its own role, so that neither a replay nor a reflection of the other's proof is one.

    C to A   hello, proof empty
    A to C   hello, proof = HMAC(token, "acceptor" | C's hello | A's hello without proof)
    C to A   proof = HMAC(token, "connector" | C's hello | A's hello without proof)
    A to C   verdict, and on a unix socket with it the descriptors of the rings

    hello, 152 bytes                                 verdict, 16 bytes
    0    4  magic "8FHS"                             0  1  status (`Status`)
    4    2  version of the message format            1  7  zero
    6    1  status; not 0: refused, no proof         8  8  bytes of a ring, 0 without one
    7    1  bytes of the name
    8   64  name, UTF-8, zero beyond its bytes
    72   8  incarnation
    80   8  placement epoch
    88  32  nonce
    120 32  proof

The connection is not encrypted afterwards: the token keeps strangers out, not listeners.
"""

import enum
import hmac
import secrets
import socket
import struct
from contextlib import suppress

from workers.transport.descriptors import close_all
from workers.transport.message import VERSION
from workers.transport.protocol import Deadline, Peer, PeerRefused, PeerUnreachable

HELLO = struct.Struct("<4sHBB64sQQ32s32s")
VERDICT = struct.Struct("<B7xQ")
PROOF_BYTES = 32
MIN_TOKEN_BYTES = 16
MAX_NAME_BYTES = 64
_MAGIC = b"8FHS"
_MAX_DESCRIPTORS = 8


class Status(enum.IntEnum):
    """Why a connection is refused."""

    WELCOME = 0
    VERSION = 1
    TOKEN = 2
    OLD_INCARNATION = 3
    FULL = 4


_REASONS = {
    Status.VERSION: "it speaks another version of the message format",
    Status.TOKEN: "the cluster tokens differ",
    Status.OLD_INCARNATION: "it knows a later incarnation of this name",
    Status.FULL: "it has as many peers as it takes",
}


class Meeting:
    """One connection until its peer is known. Nothing here waits.

    Owns the socket, and the descriptors that come with a verdict, until it is done. Call `advance` whenever
    the socket is readable. The connector is done when it has read the verdict; the acceptor is done when it
    knows the peer, and gives its verdict then with `welcome` or `refuse`.
    """

    def __init__(
        self,
        connection: socket.socket,
        me: Peer,
        token: bytes,
        deadline: Deadline,
        *,
        expected: str | None = None,
    ) -> None:
        """Begin as the connector to the peer `expected`, or as the acceptor of whoever it is."""
        self.connection, self.deadline = connection, deadline
        self.peer: Peer | None = None
        self.is_done = False
        self.ring_bytes = 0
        self.fds: list[int] = []
        self._me, self._token, self._expected = me, token, expected
        self._hello = _pack_hello(me, Status.WELCOME, secrets.token_bytes(32))
        self._said = b""  # both hellos without the acceptor's proof
        self._data = bytearray()
        if expected is not None:
            self._send(self._hello)

    def advance(self) -> None:
        """Read what is there, answer it.

        Raises:
            PeerRefused: by either side.
            PeerUnreachable: the other end went away or is no peer.
        """
        while not self.is_done and self._fill():
            data, self._data = bytes(self._data), bytearray()
            if self._expected is None:
                self._advance_acceptor(data)
            else:
                self._advance_connector(data)

    def _wanted(self) -> int:
        if not self._said:
            return HELLO.size
        return PROOF_BYTES if self._expected is None else VERDICT.size

    def _fill(self) -> bool:
        """Whether the next frame is complete. Reads no byte beyond it: what follows is not ours."""
        while missing := self._wanted() - len(self._data):
            try:
                if self._expected is not None and self.connection.family == socket.AF_UNIX:
                    data, fds, _, _ = socket.recv_fds(self.connection, missing, _MAX_DESCRIPTORS)
                    self.fds.extend(fds)
                else:
                    data = self.connection.recv(missing)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerUnreachable(self._who, error.strerror or "the connection failed") from error
            if not data:
                raise PeerUnreachable(self._who, "it closed the connection")
            self._data += data
        return True

    def _advance_acceptor(self, data: bytes) -> None:
        if not self._said:
            self._read_hello(data)
            self._said = data + self._hello
            self._send(self._hello[:-PROOF_BYTES] + self._proof(b"acceptor"))
        elif hmac.compare_digest(data, self._proof(b"connector")):
            self.is_done = True
        else:
            self.refuse(Status.TOKEN)
            raise PeerRefused(self._who, _REASONS[Status.TOKEN])

    def _advance_connector(self, data: bytes) -> None:
        if not self._said:
            peer = self._read_hello(data)
            self._said = self._hello + data[:-PROOF_BYTES] + bytes(PROOF_BYTES)
            if not hmac.compare_digest(data[-PROOF_BYTES:], self._proof(b"acceptor")):
                raise PeerRefused(self._who, _REASONS[Status.TOKEN])
            if peer.name != self._expected:
                raise PeerUnreachable(self._who, f"{peer.name} answers there")
            self._send(self._proof(b"connector"))
        else:
            status, self.ring_bytes = VERDICT.unpack(data)
            if status != Status.WELCOME:
                raise PeerRefused(self._who, _REASONS.get(status, f"status {status}"))
            self.is_done = True

    def _read_hello(self, data: bytes) -> Peer:
        magic, version, status, length, name, incarnation, epoch, _, _ = HELLO.unpack(data)
        if magic != _MAGIC:
            raise PeerUnreachable(self._who, "what answers there is no peer")
        if version != VERSION:
            if self._expected is None:
                self._send(_pack_hello(self._me, Status.VERSION, bytes(32)))
            raise PeerRefused(self._who, f"it speaks version {version}, we speak {VERSION}")
        if status != Status.WELCOME:
            raise PeerRefused(self._who, _REASONS.get(status, f"status {status}"))
        try:
            self.peer = Peer(name[: min(length, MAX_NAME_BYTES)].decode(), incarnation, epoch)
        except UnicodeDecodeError as error:
            raise PeerUnreachable(self._who, "its name is not UTF-8") from error
        return self.peer

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._token, role + self._said, "sha256")

    def welcome(self, fds: list[int], ring_bytes: int) -> None:
        """The acceptor's verdict, with the descriptors of the rings on a unix socket."""
        verdict = VERDICT.pack(Status.WELCOME, ring_bytes)
        try:
            if fds:
                socket.send_fds(self.connection, [verdict], fds)
            else:
                self.connection.sendall(verdict)
        except OSError as error:
            raise PeerUnreachable(self._who, error.strerror or "the connection failed") from error

    def refuse(self, status: Status) -> None:
        """The acceptor's other verdict."""
        with suppress(PeerUnreachable):
            self._send(VERDICT.pack(status, 0))

    def close(self) -> None:
        """Give up: free what this owns."""
        self.connection.close()
        close_all(self.fds)
        self.fds = []

    def _send(self, data: bytes) -> None:
        # A few hundred bytes in all: they fit the buffer of a new connection, or it is not worth keeping.
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise PeerUnreachable(self._who, error.strerror or "the connection failed") from error

    @property
    def _who(self) -> str:
        return self._expected or (self.peer.name if self.peer else "unknown")


def _pack_hello(me: Peer, status: Status, nonce: bytes) -> bytes:
    name = me.name.encode()
    return HELLO.pack(
        _MAGIC, VERSION, status, len(name), name, me.incarnation, me.epoch, nonce, bytes(PROOF_BYTES)
    )
