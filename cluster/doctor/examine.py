"""Everything that can be said of a description on this machine before anything is started."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.config import ClusterConfig, TlsSection, room
from cluster.doctor import checks, probes
from cluster.doctor.checks import Demand
from cluster.doctor.finding import Finding
from cluster.doctor.packages import check_ray, probe_ray
from cluster.gateway.certificates import CertificateError, read_certificate
from cluster.telemetry.start import is_installed
from model.checkpoint import Checkpoint, all_but_routed_experts, everything, is_duplicate, routed_experts
from model.config import ModelConfig
from model.decoder import DTYPES
from model.errors import EightfoldError
from model.layout import TensorSpec, layout
from model.moe import experts_of
from model.pages import cache_bytes_per_token
from model.text import load_text
from workers.local import open_checkpoint

_PROCESS_BYTES = 160 * 2**20  # of a process that has loaded torch and us, its own pages only
_RAY_BYTES = 700 * 2**20  # of Ray's own processes and Serve's


def examine(config: ClusterConfig) -> Iterator[Finding]:
    """Look at one thing after the other."""
    gateway, is_local = config.gateway, config.ray.address == "local"
    uses_ray = config.is_disaggregated or config.experts.placement == "pool"
    if uses_ray:
        yield check_ray(probe_ray())
    for name, port in (("http_port", gateway.http_port), ("grpc_port", gateway.grpc_port)):
        yield checks.check_port(name, gateway.host, port, probes.listen_error(gateway.host, port))
    if gateway.tls:
        yield from _examine_certificate(gateway.tls, gateway.host)
    if uses_ray and not is_local:
        yield from _examine_address(config.ray.address)
    if tracing := config.tracing:
        error = probes.connect_error(tracing.host, tracing.port)
        yield checks.check_collector(tracing.endpoint, is_installed(), error)
    folder = Path(tempfile.gettempdir())
    yield checks.check_disk(folder, *probes.disk_bytes(folder))
    if uses_ray and is_local:
        yield checks.check_temporary_folder(folder)
    yield checks.check_clock(time.time(), probes.newest_own_file(), probes.is_clock_synchronised())
    try:
        model, found = _open(config)
    except EightfoldError as error:  # without it nobody knows how much memory is needed
        yield checks.check_checkpoint(config.model.directory, "", error)
        return
    yield checks.check_checkpoint(config.model.directory, found, None)
    yield from _examine_room(config, model, is_local or not uses_ray)


def _examine_certificate(files: TlsSection, host: str) -> Iterator[Finding]:
    try:
        certificate, _ = read_certificate(files)
    except CertificateError as error:
        yield checks.check_bad_certificate(str(error))
        return
    yield checks.check_certificate(certificate.expires, time.time())
    yield checks.check_names(certificate.names, host)
    yield checks.check_key_mode(files.key.name, probes.mode_of(files.key))


def _open(config: ClusterConfig) -> tuple[ModelConfig, str]:
    """The model's facts, and what weights there are.

    Raises:
        EightfoldError: it cannot be served.
    """
    checkpoint = open_checkpoint(config.model.directory, config.model.options())
    load_text(config.model.directory, checkpoint.config)
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.config, f"{len(checkpoint.tensors)} tensors"
    return checkpoint.config, "a configuration, for random weights"


def _examine_address(address: str) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # `auto` and `ray://` are Ray's business
        yield checks.check_ray_address(address, probes.connect_error(host.strip("[]"), int(port)))


def _examine_room(config: ClusterConfig, model: ModelConfig, is_local: bool) -> Iterator[Finding]:
    actors = demands(config, model)
    on_gpu = config.model.device == "cuda"
    gateway = Demand("gateway", 1, 0, 0, _PROCESS_BYTES)
    here = [] if on_gpu or not is_local else actors
    if config.is_disaggregated:
        here = [*here, gateway]
    if config.is_disaggregated or config.experts.placement == "pool":
        here = [*here, Demand("Ray", 1, 0, 0, _RAY_BYTES)]
    if here:
        yield checks.check_memory(here, probes.available_bytes())
    wanted = max(config.gpus(), 1.0) if on_gpu else 0.0
    yield checks.check_gpus(wanted, probes.gpus(), actors, is_local)


def demands(config: ClusterConfig, model: ModelConfig) -> list[Demand]:
    """What the processes that hold weights take, on whichever machine."""
    section, options = config.model, config.model.options()
    # FP8 kernels take the weights as they are stored, everything else widens them.
    stored, item = section.kernels == "triton", DTYPES[section.dtype].itemsize

    def weights(specs: list[TensorSpec]) -> int:
        held = [spec for spec in specs if not is_duplicate(model, spec)]
        return sum(spec.num_bytes(model) if stored else spec.numel * item for spec in held)

    def pages(tokens: int | None) -> int:
        a_token = cache_bytes_per_token(model, options.pages, DTYPES[section.dtype])
        return room(tokens, model.max_position_embeddings) * a_token

    specs, found = list(layout(model)), []
    is_pool = config.experts.placement == "pool"
    wanted = all_but_routed_experts if is_pool else everything
    attention = weights([spec for spec in specs if wanted(spec)])
    if config.prefill and config.decode:
        for role, part in (("prefill", config.prefill), ("decode", config.decode)):
            number = part.most_engines * part.attention_actors
            found.append(
                Demand(f"{role} actor", number, attention, pages(part.tokens), _PROCESS_BYTES, part.gpus)
            )
    else:
        found.append(Demand("engine", 1, attention, pages(config.engine.tokens), _PROCESS_BYTES))
    if is_pool:
        groups = range(-(-model.n_group // config.experts.nodes))
        held = routed_experts(experts_of(model, groups))
        own = weights([spec for spec in specs if held(spec)])
        nodes, gpus = config.experts.nodes, config.experts.gpus
        found.append(Demand("expert actor", nodes, own, 0, _PROCESS_BYTES, gpus))
    return found
