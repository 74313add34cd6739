"""What the checks are told: the machine asked, nothing judged."""

import ctypes
import os
import shutil
import socket
import stat
from pathlib import Path

import torch

from cluster.doctor.checks import Gpu

_CGROUP = Path("/sys/fs/cgroup")
_NOT_SYNCHRONISED = 5  # TIME_ERROR of adjtimex
_TIMEX_BYTES = 512  # more than the structure has anywhere; zeros ask and change nothing
_CONNECT_SECONDS = 2.0


def listen_error(host: str, port: int) -> str | None:
    """What binding to an address says; None if it can be done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def connect_error(host: str, port: int) -> str | None:
    """What connecting says; None if somebody listens."""
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def available_bytes() -> int:
    """Memory that may still be taken: of the machine, or of the container where that has less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        taken = int((_CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:  # no cgroups of version 2
        return machine
    if most == "max":
        return machine
    return min(machine, int(most) - taken + int(counts["inactive_file"]))


def disk_bytes(folder: Path) -> tuple[int, int]:
    """Free and in all, of the file system that a folder is on."""
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def mode_of(path: Path) -> int:
    """Who may do what with a file, or with what a link leads to."""
    return stat.S_IMODE(path.stat().st_mode)


def gpus() -> list[Gpu]:
    """Those that torch finds."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(Gpu(facts.name, (facts.major, facts.minor), facts.total_memory))
    return found


def is_clock_synchronised() -> bool | None:
    """What the kernel says; None where it cannot be asked."""
    try:
        state: int = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _NOT_SYNCHRONISED


def newest_own_file() -> float:
    """When the newest of our modules was written, in seconds since 1970."""
    return max(os.stat(path).st_mtime for path in Path(__file__).parent.parent.glob("*.py"))
