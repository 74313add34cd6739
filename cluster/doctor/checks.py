"""Checks of a machine and of what a description asks of it: functions of values, found by `probes.py`."""

from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import Finding
from model.errors import EightfoldError

GIB = 2**30

_DISK_BYTES = GIB  # logs of Ray, and what it spills
_FULL = 0.95  # from here on Ray complains and spills nothing
_TIGHT = 0.8  # of memory: prompts and answers take some as well
# Ray listens on unix sockets below its own folder, whose names may have 107 bytes.
_SOCKET_BYTES = 107
_SESSION_BYTES = len("/eightfold-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_HOPPER = (9, 0)
DAY_SECONDS = 86400
EXPIRY_DAYS = 14  # as the alert has it
_ANY_ADDRESS = ("0.0.0.0", "::")
_NOT_FOR_KEYS = 0o027


@dataclass(frozen=True)
class Demand:
    """What one kind of process of a description takes.

    Attributes:
        who: what it is.
        processes: how many of them.
        weight_bytes, page_bytes: of each.
        own_bytes: of each, for code.
        gpus: of each, where it runs on one.
    """

    who: str
    processes: int
    weight_bytes: int
    page_bytes: int
    own_bytes: int
    gpus: float = 1.0

    @property
    def bytes(self) -> int:
        """Of one."""
        return self.weight_bytes + self.page_bytes + self.own_bytes


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability and memory."""

    name: str
    capability: tuple[int, int]
    bytes: int


def check_port(name: str, host: str, port: int, error: str | None) -> Finding:
    """Whether the gateway can listen there; `error` is what the attempt said."""
    key = f"gateway.{name}"
    limit = "can be listened at"
    if port == 0:
        return Finding(key, "ok", f"{host}, any free port", limit)
    if error is None:
        return Finding(key, "ok", f"{host}:{port} is free", limit)
    cure = f"end who listens there (ss -ltnp 'sport = :{port}'), or choose another {key}; 0 takes any"
    return Finding(key, "problem", f"{host}:{port}: {error}", limit, cure)


def check_memory(demands: list[Demand], available: int) -> Finding:
    """Whether all processes that run on this machine fit.

    Args:
        available: bytes that may still be taken here, whichever limit is the tightest.
    """
    needed = sum(demand.processes * demand.bytes for demand in demands)
    parts = " + ".join(f"{demand.processes} x {_gib(demand.bytes)} {demand.who}" for demand in demands)
    found, limit = f"{_gib(available)} can be taken", f"about {_gib(needed)}: {parts}"
    cure = "fewer tokens of room (engine.tokens, prefill.tokens, decode.tokens), or more machines"
    if needed > available:
        return Finding("memory", "problem", found, limit, cure)
    if needed > _TIGHT * available:
        return Finding("memory", "warning", found, limit, cure)
    return Finding("memory", "ok", found, limit)


def check_disk(folder: Path, free: int, total: int) -> Finding:
    """Room for logs and for Ray's session; bytes of the file system that holds the temporary folder."""
    found = f"{folder}: {_gib(free)} free, {1 - free / total:.0%} used"
    limit = f"{_gib(_DISK_BYTES)} free, at most {_FULL:.0%} used"
    cure = f"make room in {folder}, or set TMPDIR to a larger disk"
    if free < _DISK_BYTES:
        return Finding("disk", "problem", found, limit, cure)
    if free < (1 - _FULL) * total:
        return Finding("disk", "warning", found, limit, cure)
    return Finding("disk", "ok", found, limit)


def check_temporary_folder(folder: Path) -> Finding:
    """Whether the names of Ray's sockets fit; only a Ray of our own lives there."""
    longest = _SOCKET_BYTES - _SESSION_BYTES
    length = len(str(folder).encode())
    found, limit = f"{folder}: a path of {length} bytes", f"at most {longest} bytes, for Ray's sockets"
    if length > longest:
        return Finding("temporary folder", "problem", found, limit, "set TMPDIR to a short path such as /tmp")
    return Finding("temporary folder", "ok", found, limit)


def check_gpus(wanted: float, gpus: list[Gpu], demands: list[Demand], is_local: bool) -> Finding:
    """Whether there are as many as the actors take, of a kind that the kernels know, and large enough.

    Args:
        wanted: GPUs of all actors together; 0 where the model runs on CPUs.
        demands: of processes that hold weights.
        is_local: whether all actors run on this machine.
    """
    found = f"{len(gpus)} x {gpus[0].name}, {_gib(gpus[0].bytes)}" if gpus else "none"
    if not wanted:
        return Finding("GPUs", "ok", found, "none, the model runs on CPUs")
    largest = int(max(demand.bytes / demand.gpus for demand in demands))
    place = "here" if is_local else "in the cluster, of which this machine's are looked at"
    limit = f"{wanted:g} {place}, Hopper or later, {_gib(largest)} each"
    if is_local and len(gpus) < wanted:
        cure = "fewer actors or a smaller share (gpus), or a driver that torch finds (nvidia-smi)"
        return Finding("GPUs", "problem", found, limit, cure)
    if any(gpu.capability < _HOPPER for gpu in gpus):
        return Finding("GPUs", "problem", found, limit, "other GPUs, or model.kernels: reference")
    if any(gpu.bytes < largest for gpu in gpus):
        cure = "fewer tokens of room (prefill.tokens, decode.tokens), or experts in a pool of more nodes"
        return Finding("GPUs", "problem", found, limit, cure)
    return Finding("GPUs", "ok", found, limit)


def check_checkpoint(directory: Path, found: str, error: EightfoldError | None) -> Finding:
    """Whether configuration, headers and tokenizer are as they must be; values are read when it is served."""
    limit = "every tensor of the layout in its shape, a tokenizer, a known chat template"
    if error:
        cure = f"copy it again from its source; `eightfold inspect {directory}` checks every value"
        return Finding("checkpoint", "problem", str(error), limit, cure)
    return Finding("checkpoint", "ok", f"{directory.name}: {found}", limit)


def check_certificate(expires: float, now: float) -> Finding:
    """Whether a certificate that goes with its key is good for long enough to be renewed in peace."""
    days, limit = (expires - now) / DAY_SECONDS, f"not expired, {EXPIRY_DAYS} days left"
    cure = "renew it and replace the files; a gateway that runs takes them over by itself"
    if days <= 0:
        return Finding("certificate", "problem", f"expired {-days:.1f} days ago", limit, cure)
    found = f"expires in {days:.1f} days"
    if days < EXPIRY_DAYS:
        return Finding("certificate", "warning", found, limit, cure)
    return Finding("certificate", "ok", found, limit)


def check_bad_certificate(problem: str) -> Finding:
    """Of files that cannot be served; `problem` names the file."""
    limit = "a chain in PEM that begins with the server's own certificate, and its key, not encrypted"
    cure = "correct gateway.tls.certificate and gateway.tls.key, or issue both anew"
    return Finding("certificate", "problem", problem, limit, cure)


def check_names(names: tuple[str, ...], host: str) -> Finding:
    """Whether clients that connect to the gateway's own address find it in the certificate."""
    found = f"for {', '.join(names) or 'no name'}"
    if host in _ANY_ADDRESS and names:  # whatever leads here has a name that nobody can know
        return Finding("certificate names", "ok", found, "the names that clients use")
    limit = "the names that clients use" if host in _ANY_ADDRESS else f"{host}, or the names that clients use"
    if host in names:
        return Finding("certificate names", "ok", found, limit)
    cure = "issue it for every name and address that clients connect to (subject alternative names)"
    return Finding("certificate names", "warning", found, limit, cure)


def check_key_mode(name: str, mode: int) -> Finding:
    """Whether only its owner and group can read a key; `mode` is that of the file."""
    found, limit = f"{name} has mode {mode:04o}", "nothing for others, no writing for the group"
    if mode & _NOT_FOR_KEYS:
        return Finding(
            "key file", "warning", found, limit, f"chmod 600 {name} (defaultMode of a Secret: 0440)"
        )
    return Finding("key file", "ok", found, limit)


def check_clock(now: float, newest: float, is_synchronised: bool | None) -> Finding:
    """Deadlines travel as time left and need no clock; certificates, logs and metrics do.

    Args:
        now, newest: seconds since 1970, of the clock and of our own newest file.
        is_synchronised: what the kernel says of its clock; None where it says nothing.
    """
    limit = "later than our own files, and synchronised"
    cure = "start chrony or systemd-timesyncd (chronyc tracking)"
    if now < newest:
        found = f"{newest - now:.0f} s earlier than our own newest file"
        return Finding("clock", "problem", found, limit, cure)
    if is_synchronised is None:
        return Finding("clock", "ok", "plausible; this system does not say more", limit)
    if not is_synchronised:
        return Finding("clock", "warning", "nobody keeps it", limit, cure)
    return Finding("clock", "ok", "synchronised", limit)


def check_ray_address(address: str, error: str | None) -> Finding:
    """Whether the Ray that is to be joined answers; `error` is what the attempt said."""
    limit = "somebody listens there"
    if error:
        cure = "start it (ray start --head), or correct ray.address; `local` starts one"
        return Finding("ray.address", "problem", f"{address}: {error}", limit, cure)
    return Finding("ray.address", "ok", address, limit)


def check_collector(endpoint: str, is_installed: bool, error: str | None) -> Finding:
    """Whether traces can leave; without a collector requests are answered all the same.

    Args:
        is_installed: the exporter, without which nothing is served.
        error: what connecting from here said.
    """
    limit = "the exporter is installed, and somebody listens there"
    if not is_installed:
        cure = "python -m pip install eightfold[tracing], or leave the section out"
        return Finding("tracing", "problem", "OpenTelemetry's exporter is not installed", limit, cure)
    if error:
        cure = "start the collector, or correct tracing.endpoint; until then spans are dropped"
        return Finding("tracing", "warning", f"{endpoint}: {error}", limit, cure)
    return Finding("tracing", "ok", endpoint, limit)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
