"""Who listens: the sockets of processes, and the list of them in docs/security.md."""

import ipaddress
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ROW = re.compile(
    r"\| `([\w:.]+)` \| (\d+) \| (tcp|unix) \| (gateway|loopback|every|session|abstract) \| (.+) \|"
)
_LISTENS, _ACCEPTS = "0A", 0x10000  # states of TCP, flags of unix sockets


@dataclass(frozen=True)
class Socket:
    """A socket that takes connections, or datagrams.

    Attributes:
        pid, title: the process that has it.
        kind: tcp, udp or unix.
        address: an IP address, a path, or `@name`.
        port: of tcp and udp.
    """

    pid: int
    title: str
    kind: str
    address: str
    port: int = 0

    def at(self, session: str, gateway_at: Container[tuple[str, int]]) -> str:
        """Where it listens, in the words of the list."""
        if self.kind == "unix":
            return (
                "session" if self.address.startswith(session) else self.address[:1].replace("@", "abstract")
            )
        if (self.address, self.port) in gateway_at:
            return "gateway"
        found = ipaddress.ip_address(self.address)
        return "loopback" if found.is_loopback else "every" if found.is_unspecified else str(found)


def written() -> dict[tuple[str, str, str], int]:
    """How many sockets there may be: by process, kind and place."""
    rows = _ROW.findall((ROOT / "docs" / "security.md").read_text())
    assert rows, "the list has another form"
    return {(process, kind, at): int(number) for process, number, kind, at, _ in rows}


def unlisted(
    sockets: Iterable[Socket], gateway: int, gateway_at: Container[tuple[str, int]], session: str
) -> list[tuple[Socket, str]]:
    """Those that the list does not allow, and why.

    Args:
        sockets: of all processes of a cluster.
        gateway: the process that the list calls `eightfold`.
        gateway_at: addresses and ports of HTTP and gRPC.
        session: Ray's folder.
    """
    allowed, seen = written(), Counter[tuple[int, str, str]]()
    found = []
    for socket in sockets:
        process = (
            "eightfold" if socket.pid == gateway else _process(socket.title, {row[0] for row in allowed})
        )
        at = socket.at(session, gateway_at)
        seen[socket.pid, socket.kind, at] += 1
        number = seen[socket.pid, socket.kind, at]
        if number > allowed.get((process, socket.kind, at), 0):
            found.append((socket, f"{process}: number {number} of {socket.kind} at {at!r}"))
    return found


def _process(title: str, known: Iterable[str]) -> str:
    """The name in the list of a command line: a class of Ray's or ours, or a program or script."""
    words = title.split()
    names = {Path(word).name for word in words[:3]}
    if title.startswith("ray::"):  # with names of actors, deployments and methods around the class
        names |= {f"ray::{word}" for word in re.findall(r"\w+", words[0])}
    return next((name for name in known if name in names), title)


def listening(pids: Iterable[int]) -> list[Socket]:
    """All of the processes; a socket that several share counts for each."""
    by_inode = {inode: rest for inode, *rest in (*_tcp_and_udp(), *_unix())}
    found = []
    for pid in pids:
        with suppress(OSError):  # it has just ended
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            inodes = {inode for link in Path(f"/proc/{pid}/fd").iterdir() for inode in _inode(link)}
            found += [Socket(pid, title.strip(), *by_inode[inode]) for inode in inodes & by_inode.keys()]  # type: ignore[arg-type]
    return found


def _inode(link: Path) -> list[str]:
    """Of what an open file leads to, where that is a socket."""
    try:
        return re.findall(r"^socket:\[(\d+)\]$", os.readlink(link))
    except OSError:  # it has just been closed
        return []


def _tcp_and_udp() -> Iterator[tuple[str, str, str, int]]:
    for kind in ("tcp", "udp"):
        for version in ("", "6"):
            for line in Path(f"/proc/net/{kind}{version}").read_text().splitlines()[1:]:
                fields = line.split()
                if kind == "udp" or fields[3] == _LISTENS:
                    address, _, port = fields[1].partition(":")
                    yield fields[9], kind, _address(address), int(port, 16)


def _unix() -> Iterator[tuple[str, str, str]]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS:
            yield fields[6], "unix", fields[7] if len(fields) > 7 else ""


def _address(text: str) -> str:
    """The kernel writes addresses as 32-bit words of its own byte order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return str(getattr(found, "ipv4_mapped", None) or found)
