"""From a description to a running model: one engine in this process, or a cluster on Ray.

start_backend(config)       what the gateway asks for tokens, whichever it is
  local engine              experts in this process, or in a pool
  cluster                   supervisor, expert actors, Serve deployments of prefill and decode
"""

import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from cluster.config import ClusterConfig, ConfigError, room
from cluster.gateway.backend import ModelFacts
from cluster.gateway.engine_backend import EngineBackend
from cluster.router import Router
from kernels.backend import UnsupportedKernel
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.inputs import PAGE_SIZE
from model.moe import Experts
from model.text import load_text
from workers.dispatch import RemoteExperts
from workers.local import LocalModel
from workers.page_pool import pages_for
from workers.prefix import PrefixHasher
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint

if TYPE_CHECKING:
    from cluster.gateway.cluster_backend import ClusterBackend

START_SECONDS = 300.0  # from nothing to all workers, on a busy machine
_POLL_SECONDS = 0.2

Say = Callable[[str], None]


class ClusterError(Exception):
    """A cluster that did not come up: which part, and what is known of the reason."""


def start_backend(config: ClusterConfig, stack: ExitStack, say: Say) -> "EngineBackend | ClusterBackend":
    """Whoever runs the model of a description; call its `start` in the event loop. The stack ends it all.

    Raises:
        ConfigError, CheckpointError: it cannot be served.
        ClusterError: parts of the cluster did not come up.
    """
    directory = config.model.directory
    if not directory.is_dir():
        raise ConfigError("", "model.directory", f"is {str(directory)!r}; there is no such directory")
    model = ModelConfig.load(directory)
    if config.experts.placement == "pool" and config.experts.nodes > model.n_group:
        raise ConfigError(
            "", "experts.nodes", f"is {config.experts.nodes}; this model has {model.n_group} expert groups"
        )
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("", "model.device", "is cuda; no GPU can be used here (torch finds none)")
    if config.is_disaggregated:
        return _start_cluster(config, model, stack, say)
    experts = _start_pool(config, model, stack, say) if config.experts.placement == "pool" else None
    return _load_engine(config, experts, say)


def _start_ray(config: ClusterConfig, stack: ExitStack, say: Say) -> None:
    # Ray takes seconds to load, and one process needs none.
    from cluster.ray_runtime import joined_ray, local_ray

    if config.ray.address == "local":
        say("starting Ray on this machine")
        stack.enter_context(local_ray(num_cpus=os.cpu_count() or 1))
    else:
        say(f"joining Ray at {config.ray.address}")
        stack.enter_context(joined_ray(config.ray.address))


# One engine in this process


def _start_pool(config: ClusterConfig, model: ModelConfig, stack: ExitStack, say: Say) -> Experts:
    import ray

    from cluster.expert_pool import ExpertPool
    from cluster.ray_runtime import own_host

    _start_ray(config, stack, say)
    experts = config.experts
    say(f"starting {experts.nodes} expert actors")
    try:
        pool = ExpertPool(
            config.model.directory,
            experts.nodes,
            dtype=config.model.dtype,
            kernels=config.model.options().kernels,
            spread=experts.spread,
            node_labels=experts.node_labels,
            tcp_host=None if config.ray.address == "local" else own_host,
        )
    except (TimeoutError, ray.exceptions.RayError) as error:
        raise ClusterError(f"the expert actors did not come up: {_last_line(error)}") from error
    stack.callback(pool.close)
    endpoint = PeerEndpoint(EndpointConfig("attention-0", pool.token))
    stack.callback(endpoint.close)
    return RemoteExperts(endpoint, pool, topk_group=model.topk_group, layer_seconds=experts.layer_seconds)


def _load_engine(config: ClusterConfig, experts: Experts | None, say: Say) -> EngineBackend:
    started = time.perf_counter()
    say(f"loading {config.model.directory.name} as {config.model.dtype}")
    try:
        model = LocalModel(config.model.directory, config.model.options(), experts=experts, progress=True)
    except UnsupportedKernel as error:
        raise ConfigError("", "model", f"asks for what the kernels here cannot do: {error}") from None
    longest = model.config.max_position_embeddings
    num_tokens = room(config.engine.tokens, longest)
    engine = model.engine(config.engine.config(), num_tokens)
    context = min(longest, engine.pool.num_pages * PAGE_SIZE)
    say(f"loaded in {time.perf_counter() - started:.1f} s")
    return EngineBackend(
        engine,
        ModelFacts(
            model.config,
            *load_text(config.model.directory, model.config),
            model.checkpoint.digest,
            context,
        ),
        max_waiting=config.engine.max_waiting,
        max_unread=config.gateway.limits.max_unread_tokens,
    )


# A cluster


def _start_cluster(config: ClusterConfig, model: ModelConfig, stack: ExitStack, say: Say) -> "ClusterBackend":
    from cluster.gateway.cluster_backend import BackendLimits, ClusterBackend
    from cluster.supervisor import Secrets

    assert config.prefill
    assert config.decode
    checkpoint = Checkpoint.open(config.model.directory)
    longest = model.max_position_embeddings
    rooms = [section.tokens for section in (config.prefill, config.decode) if section.tokens]
    context = min([longest, *(pages_for(room) * PAGE_SIZE for room in rooms)])
    facts = ModelFacts(model, *load_text(config.model.directory, model), checkpoint.digest, context)
    _start_ray(config, stack, say)
    shared = Secrets(secrets.token_bytes(32), secrets.token_bytes(32))
    supervisor = _start_parts(config, shared, stack, say)

    endpoint = PeerEndpoint(EndpointConfig(f"gateway-{secrets.token_hex(4)}", shared.token))
    limits = BackendLimits(
        config.engine.max_waiting,
        config.gateway.limits.max_unread_tokens,
        config.gateway.limits.total_seconds,
        config.router.silence_seconds,
    )
    router = Router(PrefixHasher(shared.pages), config.router.local_prefill_tokens)

    async def who_is_there() -> Any:
        return await supervisor.directory.remote()

    return ClusterBackend(facts, endpoint, router, who_is_there, limits)


def _start_parts(config: ClusterConfig, shared: Any, stack: ExitStack, say: Say) -> Any:
    """Supervisor, experts and engines; returns the supervisor when all attention actors are known."""
    from ray import serve

    from cluster.engines import deployment
    from cluster.supervisor import start_supervisor

    assert config.prefill
    assert config.decode
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Serve sets it to more when it is imported
    if config.experts.placement == "pool":
        say(f"starting {config.experts.nodes} expert actors")
    supervisor = start_supervisor(config, shared)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    if config.ray.address != "local":  # a Ray of our own takes Serve with it when it ends
        for role in ("prefill", "decode"):
            stack.callback(serve.delete, role)
    targets = []
    for role, section in (("prefill", config.prefill), ("decode", config.decode)):
        say(f"starting {section.engines} {role} engine(s) of {section.attention_actors} attention actor(s)")
        targets.append(
            serve.RunTarget(target=deployment(role, config), name=role, route_prefix=None)  # type: ignore[arg-type]
        )
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    expected = sum(section.engines * section.attention_actors for section in (config.prefill, config.decode))
    _wait_for_workers(supervisor, expected, say)
    return supervisor


def _wait_for_workers(supervisor: Any, expected: int, say: Say) -> None:
    """Until all attention actors are there, saying who comes.

    Raises:
        ClusterError: some are missing.
    """
    import ray
    from ray import serve

    deadline = time.monotonic() + START_SECONDS
    seen: set[str] = set()
    knows_experts = False
    while len(seen) < expected:
        states = {name: str(app.status) for name, app in serve.status().applications.items()}
        if time.monotonic() > deadline or "DEPLOY_FAILED" in states.values():
            raise ClusterError(f"{len(seen)} of {expected} attention actors came up; Serve says {states}")
        try:
            found = ray.get(supervisor.directory.remote(), timeout=START_SECONDS)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the expert actors did not come up: {_last_line(error)}") from error
        if found.experts and not knows_experts:
            knows_experts = True
            nodes = len({expert.node for expert in found.experts})
            say(f"{len(found.experts)} expert actors are up on {nodes} node(s) of Ray, epoch {found.epoch}")
        for entry in found.workers:
            if entry.address.name not in seen:
                seen.add(entry.address.name)
                say(f"{entry.role} actor {len(seen)} of {expected} is up")
        time.sleep(_POLL_SECONDS)


def _last_line(error: Exception) -> str:
    """What an actor's own exception says, without the stack of the process it happened in."""
    return str(error).strip().splitlines()[-1]
