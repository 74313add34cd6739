"""From a description to a running model: one engine in this process, or a cluster on Ray.

start_backend(config)       what the gateway asks for tokens, whichever it is
  local engine              experts in this process, or in a pool
  cluster                   supervisor, expert actors, Serve deployments of prefill and decode
join_cluster(config)        the same of a cluster that runs already
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
from cluster.starts import reasons_in
from kernels.backend import UnsupportedKernel
from model.config import ModelConfig
from model.inputs import PAGE_SIZE
from model.text import load_text
from workers.actors import way_config
from workers.dispatch import RemoteExperts
from workers.local import LocalModel, open_checkpoint
from workers.page_pool import pages_for
from workers.prefix import PrefixHasher
from workers.transport.config import CarrierKind, EndpointConfig
from workers.transport.endpoint import PeerEndpoint

if TYPE_CHECKING:
    from cluster.expert_pool import ExpertPool
    from cluster.gateway.cluster_backend import ClusterBackend
    from cluster.supervisor import Secrets
    from workers.expert_ways import PairedExperts

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
    model = _load_config(config)
    if config.experts.placement == "pool" and config.experts.nodes > model.n_group:
        raise ConfigError(
            "", "experts.nodes", f"is {config.experts.nodes}; this model has {model.n_group} expert groups"
        )
    if config.is_disaggregated:
        return _start_cluster(config, model, stack, say)
    experts = _start_pool(config, model, stack, say) if config.experts.placement == "pool" else None
    return _load_engine(config, experts, say)


def join_cluster(config: ClusterConfig, stack: ExitStack, say: Say) -> "ClusterBackend":
    """Whoever runs the model in a cluster that somebody else starts (cluster/serve_app.py).

    Raises:
        ConfigError, CheckpointError: it cannot be served.
        ClusterError: the cluster did not come up.
    """
    import ray

    from cluster.ray_runtime import joined_ray

    facts = _cluster_facts(config, _load_config(config))
    say(f"joining Ray at {config.ray.address}")
    stack.enter_context(joined_ray(config.ray.address))
    supervisor = _wait_for_supervisor(config.join_seconds)
    _wait_for_workers(supervisor, config, say, config.join_seconds)
    shared = ray.get(supervisor.secrets.remote(), timeout=config.ray.start_seconds)
    return _cluster_backend(config, facts, shared, supervisor)


def _load_config(config: ClusterConfig) -> ModelConfig:
    directory = config.model.directory
    if not directory.is_dir():
        raise ConfigError("", "model.directory", f"is {str(directory)!r}; there is no such directory")
    return ModelConfig.load(directory)


def _start_ray(config: ClusterConfig, stack: ExitStack, say: Say) -> None:
    # Ray takes seconds to load, and one process needs none.
    import ray

    from cluster.ray_runtime import joined_ray, local_ray

    if config.ray.address == "local":
        say("starting Ray on this machine")
        stack.enter_context(local_ray(num_cpus=os.cpu_count() or 1))
    else:
        say(f"joining Ray at {config.ray.address}")
        stack.enter_context(joined_ray(config.ray.address))
    found = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if config.gpus() > found:
        problem = f"is cuda; the actors take {config.gpus():g} GPUs together and Ray has {found:g}"
        raise ConfigError("", "model.device", problem)


# One engine in this process


def _start_pool(
    config: ClusterConfig, model: ModelConfig, stack: ExitStack, say: Say
) -> "RemoteExperts | PairedExperts":
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
            options=config.model.options(),
            gpus=experts.gpus,
            spread=experts.spread,
            node_labels=experts.node_labels,
            place_seconds=experts.place_seconds,
            start_seconds=config.ray.start_seconds,
            tcp_host=None if config.ray.address == "local" else own_host,
            row_carrier=config.carriers.row_carrier,
        )
    except (TimeoutError, ray.exceptions.RayError) as error:
        raise ClusterError(f"the expert actors did not come up: {_last_line(error)}") from error
    stack.callback(pool.close)
    if config.carriers.row_carrier:
        return _paired_experts(config, config.carriers.row_carrier, pool, stack)
    endpoint = PeerEndpoint(EndpointConfig("attention-0", pool.token))
    stack.callback(endpoint.close)
    return RemoteExperts(endpoint, pool, topk_group=model.topk_group, layer_seconds=experts.layer_seconds)


def _paired_experts(
    config: ClusterConfig, kind: CarrierKind, pool: "ExpertPool", stack: ExitStack
) -> "PairedExperts":
    from cluster.ray_runtime import own_host

    # Imported where they run: Triton takes 60 MiB, which processes without a GPU spare.
    from workers.expert_ways import paired_experts

    tcp_host = None if config.ray.address == "local" else own_host
    ways = way_config(kind, "attention-0/rows", pool.token, tcp_host)
    experts = paired_experts(
        config.model.directory, config.model.options(), config.engine.config(), pool, ways,
        config.experts.layer_seconds,
    )  # fmt: skip
    stack.callback(experts.close)
    return experts


def _load_engine(
    config: ClusterConfig, experts: "RemoteExperts | PairedExperts | None", say: Say
) -> EngineBackend:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("", "model.device", "is cuda; no GPU can be used here (torch finds none)")
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
    if warmed := engine.warm_up():
        say(str(warmed))
    return EngineBackend(
        engine,
        ModelFacts(
            model.config,
            *load_text(config.model.directory, model.config),
            model.checkpoint.digest,
            context,
        ),
        max_waiting=config.engine.max_waiting,
        max_open=config.engine.max_open,
        max_unread=config.gateway.limits.max_unread_tokens,
        dispatch=experts.stats if experts else None,
    )


# A cluster


def _start_cluster(config: ClusterConfig, model: ModelConfig, stack: ExitStack, say: Say) -> "ClusterBackend":
    from cluster.supervisor import new_secrets

    facts = _cluster_facts(config, model)
    _start_ray(config, stack, say)
    shared = new_secrets()
    return _cluster_backend(config, facts, shared, _start_parts(config, shared, stack, say))


def _cluster_facts(config: ClusterConfig, model: ModelConfig) -> ModelFacts:
    assert config.prefill
    assert config.decode
    checkpoint = open_checkpoint(config.model.directory, config.model.options())
    rooms = [section.tokens for section in (config.prefill, config.decode) if section.tokens]
    context = min([model.max_position_embeddings, *(pages_for(room) * PAGE_SIZE for room in rooms)])
    return ModelFacts(model, *load_text(config.model.directory, model), checkpoint.digest, context)


def _cluster_backend(
    config: ClusterConfig, facts: ModelFacts, shared: "Secrets", supervisor: Any
) -> "ClusterBackend":
    from cluster.gateway.cluster_backend import BackendLimits, ClusterBackend

    assert config.prefill
    endpoint = PeerEndpoint(EndpointConfig(f"gateway-{secrets.token_hex(4)}", shared.token))
    limits = BackendLimits(
        config.engine.max_waiting,
        config.engine.max_open,
        config.gateway.limits.max_unread_tokens,
        config.gateway.limits.total_seconds,
        config.router.silence_seconds,
        None if config.prefill.engines else config.gateway.limits.first_token_seconds,
    )
    router = Router(PrefixHasher(shared.pages), config.router.local_prefill_tokens)

    async def who_is_there(calls_prefill: bool) -> Any:
        return await supervisor.directory.remote(calls_prefill)

    return ClusterBackend(facts, endpoint, router, who_is_there, limits)


def _start_parts(config: ClusterConfig, shared: "Secrets", stack: ExitStack, say: Say) -> Any:
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
    _wait_for_workers(supervisor, config, say, config.start_seconds)
    return supervisor


def _wait_for_supervisor(seconds: float) -> Any:
    from cluster.supervisor import the_supervisor

    deadline = time.monotonic() + seconds
    while True:
        try:
            return the_supervisor()
        except ValueError:
            if time.monotonic() > deadline:
                raise ClusterError(f"nobody started a cluster in this Ray within {seconds:.0f} s") from None
            time.sleep(_POLL_SECONDS)


def _wait_for_workers(supervisor: Any, config: ClusterConfig, say: Say, seconds: float) -> None:
    """Until all attention actors are there, saying who comes.

    Raises:
        ClusterError: some are missing.
    """
    import ray
    from ray import serve

    assert config.prefill
    assert config.decode
    expected = sum(section.engines * section.attention_actors for section in (config.prefill, config.decode))
    deadline = time.monotonic() + seconds
    seen: set[str] = set()
    knows_experts = False
    while len(seen) < expected:
        states = {name: app.status.value for name, app in serve.status().applications.items()}
        is_late = time.monotonic() > deadline
        if is_late or "DEPLOY_FAILED" in states.values():
            when = f" within {seconds:.0f} s, of which ray.start_seconds may allow more" if is_late else ""
            problem = f"{len(seen)} of {expected} attention actors came up{when}; Serve says {states}"
            raise ClusterError(f"{problem}{_reasons(serve.status())}")
        try:
            found = ray.get(supervisor.directory.remote(), timeout=seconds)
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


def _reasons(status: Any) -> str:
    """What the replicas' own exceptions say, without the stacks of the processes they happened in."""
    lines = [
        reason
        for app in status.applications.values()
        for deployment in app.deployments.values()
        for reason in reasons_in(deployment.message)
    ]
    return "".join(f"; {line}" for line in dict.fromkeys(lines))
