"""The one description of a cluster: a YAML file, read once into frozen models.

Unknown keys, keys that stand twice and YAML aliases are refused. Facts of the model are not in it: they come
from the checkpoint. Values have the names of the constructors' arguments that they end up in.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cluster.autoscaling import AutoscaleSection
from cluster.demo import DEMO
from cluster.gateway.core import Budgets
from cluster.gateway.http_guard import HttpLimits
from cluster.render.section import KubernetesSection
from cluster.telemetry.section import TracingSection
from kernels.backend import Backend
from model.attention import AttentionMode
from model.decoder import DTypeName
from model.errors import EightfoldError
from model.pages import PageFormat
from workers.engine import EngineConfig
from workers.local import ModelOptions, WeightSource
from workers.speculate import MAX_DRAFTS
from workers.transport.config import CarrierKind
from workers.wire import Role

MAX_FILE_BYTES = 256 * 1024
MACHINES_SECONDS = 3600.0  # for machines and images to come

Port = Annotated[int, Field(ge=0, le=65535)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Gpus = Annotated[float, Field(gt=0, le=1)]


class ConfigError(EightfoldError):
    """A cluster description that cannot be used as it stands.

    Args:
        file: its name.
        key: the key concerned, dotted, or "" for the file as a whole.
        problem: what is wrong, with the value, and what would do.
    """

    def __init__(self, file: str, key: str, problem: str) -> None:
        super().__init__(file, key, problem)
        self.file, self.key, self.problem = file, key, problem

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.problem) if part)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(_Section):
    """Which checkpoint, under which name, and how it is computed.

    With `deterministic` an answer's bits depend on its request and the weights alone: not on who else is
    served, how prompts are cut, who computes what, or on drafts. It costs time (docs/deterministic.md).
    `kernels: triton` is for NVIDIA GPUs from Hopper on: it goes with `device: cuda`, `dtype: bfloat16` and
    `pages: fp8`, and with FP8 checkpoints. `third_party` lets libraries do what they also can, where their
    wheels are installed (kernels/third_party.py says which). `weights: random` draws them, for measuring: the
    directory needs a `config.json` and a tokenizer, and `layers` says how many of its layers there are.
    """

    directory: Annotated[Path, Field(strict=False)] = DEMO
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{1,128}$")] | None = None
    dtype: DTypeName = "float32"
    pages: PageFormat = "full"
    attention: AttentionMode = "sparse"
    kernels: Literal["reference", "triton"] = "reference"
    device: Literal["cpu", "cuda"] = "cpu"
    third_party: Annotated[tuple[Literal["deep_gemm", "flash_mla"], ...], Field(strict=False)] = ()
    deterministic: bool = False
    weights: WeightSource = "checkpoint"
    layers: Count | None = None

    @model_validator(mode="after")
    def _kernels_fit(self) -> "ModelSection":
        if self.deterministic and self.kernels != "reference":
            raise ValueError("deterministic goes with kernels: reference only")
        if self.deterministic and self.device != "cpu":
            raise ValueError(
                "deterministic goes with device: cpu only: in cuBLAS a row's bits change with its place"
            )
        self.options()  # says what else does not go together
        return self

    @property
    def served_name(self) -> str:
        """What clients call the model: the name given, or that of the directory."""
        return self.name or self.directory.resolve().name

    def options(self) -> ModelOptions:
        kernels: Backend = "deterministic" if self.deterministic else self.kernels
        return ModelOptions(
            self.dtype, self.pages, self.attention, kernels, self.device, self.third_party, self.weights,
            self.layers,
        )  # fmt: skip


class EngineSection(_Section):
    """How the engine runs, and how much it may take on.

    `drafts` is a number or `auto`: as many as pay, by measured acceptance and load.
    `tokens` is the room in pages, all sequences together; None is eight times the model's context. Where
    prefill and decode have engines of their own, their sections say how much room each has. A gateway refuses
    more than `max_waiting` requests that wait for a token, and more than `max_open` altogether for each
    decode worker. Two or three `micro_batches` keep attention busy while rows are at experts of a pool. At
    most so many `sequences` run at once in an engine: with `chunk` they say how large a pass may be, and what
    its carriers take.
    """

    chunk: Count = 2048
    drafts: Literal[0, 1, 2, 3, "auto"] = 0
    tokens: Count | None = None
    max_waiting: Count = 64
    max_open: Count = 512
    micro_batches: Literal[1, 2, 3] = 1
    sequences: Annotated[int, Field(ge=1, le=1024)] = 256

    def config(self) -> EngineConfig:
        adapt = self.drafts == "auto"
        num_drafts = MAX_DRAFTS if self.drafts == "auto" else self.drafts
        return EngineConfig(self.chunk, num_drafts, adapt, self.micro_batches, self.sequences)


def room(tokens: int | None, longest: int) -> int:
    """Tokens of room in pages: what a description says, or eight of the longest sequences."""
    return tokens or 8 * longest


class ExpertsSection(_Section):
    """Who computes the routed experts: whoever runs attention, or a pool of actors.

    In a pool, `nodes` actors each hold a run of whole expert groups of every layer, like the nodes of a
    cluster; `layer_seconds` is what a layer may take from dispatch to combine. `spread: strict` asks for a
    machine for each actor, `loose` for as many machines as there are, and waits `place_seconds` for them.
    `node_labels` says on which nodes. With
    `device: cuda` each takes `gpus` of a GPU.
    """

    placement: Literal["local", "pool"] = "local"
    nodes: Count = 8
    gpus: Gpus = 1.0
    layer_seconds: Seconds = 5.0
    spread: Literal["loose", "strict"] = "loose"
    place_seconds: Seconds = 30.0
    node_labels: dict[str, str] = {}


class RoleSection(_Section):
    """The engines of one role, each a Serve replica with attention actors of its own.

    Prefill may have `engines: 0` where it scales: the last one goes when nobody needs it, and a request that
    finds none waits for it to come.

    `tokens` is the room in the pages of one actor; None is eight times the model's context. With
    `device: cuda` each actor takes `gpus`: one, or less than one where actors share it. With `autoscale`
    there are `engines` at first and at least.
    """

    engines: Annotated[int, Field(ge=0)] = 1
    autoscale: AutoscaleSection | None = None
    attention_actors: Count = 1
    gpus: Gpus = 1.0
    tokens: Count | None = None
    node_labels: dict[str, str] = {}

    @property
    def most_engines(self) -> int:
        """As many as there may ever be."""
        return self.autoscale.max if self.autoscale else self.engines

    @model_validator(mode="after")
    def _most_is_not_less(self) -> "RoleSection":
        if self.most_engines < self.engines:
            raise ValueError(f"autoscale.max is {self.most_engines}; it is at least engines, {self.engines}")
        if not self.engines and not self.autoscale:
            raise ValueError("engines is 0, which goes with autoscale only: there would never be one")
        return self


class RouterSection(_Section):
    """How requests find their workers.

    A decode worker that has all but `local_prefill_tokens` of a prompt in its pages computes those itself;
    pages on their way belong to a lease that ends when nothing has moved for `lease_seconds`, and a worker
    that says nothing for `silence_seconds` is taken for dead.
    """

    local_prefill_tokens: Annotated[int, Field(ge=0)] = 512
    lease_seconds: Seconds = 10.0
    silence_seconds: Seconds = 15.0


class CarriersSection(_Section):
    """How tensors go from GPU to GPU.

    `pages`, from prefill to decode, and `rows`, between attention and the experts of a pool: by way of the
    `host`, which works everywhere; `ipc` (kernels) or `copy` (copy engines) between GPUs of one machine that
    reach each other's memory; `nccl` between any two GPUs that are not the same. Rows that do not go by way
    of the host go with `model.kernels: triton`, and the other way round.
    """

    pages: Literal["host", "ipc", "copy", "nccl"] = "host"
    rows: Literal["host", "ipc", "copy", "nccl"] = "host"

    @property
    def page_carrier(self) -> CarrierKind | None:
        """None for pages in messages."""
        return None if self.pages == "host" else self.pages

    @property
    def row_carrier(self) -> CarrierKind | None:
        """None for rows in messages."""
        return None if self.rows == "host" else self.rows


class RaySection(_Section):
    """Which Ray: `local` starts one of our own on this machine, anything else is the address of a cluster.

    An actor may take `start_seconds` from its process to its weights: reading those of 671 billion parameters
    from network storage takes many minutes. Whoever waits for actors waits so long.
    """

    address: Annotated[str, StringConstraints(min_length=1, max_length=255)] = "local"
    start_seconds: Annotated[float, Field(ge=10, le=6 * 3600, allow_inf_nan=False)] = 600.0


class TlsSection(_Section):
    """PEM files of the server's own certificate chain and key."""

    certificate: Annotated[Path, Field(strict=False)]
    key: Annotated[Path, Field(strict=False)]


class LimitsSection(_Section):
    """What a client may take. Sizes count bytes, times count seconds."""

    body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 4 * 2**20
    header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 32 * 2**10
    header_seconds: Seconds = 10.0
    body_seconds: Seconds = 30.0
    send_seconds: Seconds = 30.0
    keep_alive_seconds: Seconds = 15.0
    first_token_seconds: Seconds = 120.0
    total_seconds: Seconds = 600.0
    connections: Count = 1000
    default_max_tokens: Count = 4096
    max_unread_tokens: Count = 4096
    journal_tokens: Count = 16 * 2**20

    def http(self) -> HttpLimits:
        return HttpLimits(
            self.body_bytes, self.header_bytes, self.header_seconds, self.body_seconds, self.send_seconds,
            self.keep_alive_seconds, self.connections,
        )  # fmt: skip

    def budgets(self) -> Budgets:
        return Budgets(
            self.first_token_seconds, self.total_seconds, self.default_max_tokens, self.journal_tokens
        )


class GatewaySection(_Section):
    """Where the servers listen, and who may come in. Port 0 is any free one."""

    host: Annotated[str, StringConstraints(min_length=1, max_length=255)] = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 50051
    api_key_hashes: Annotated[tuple[Sha256, ...], Field(strict=False)] = ()
    tls: TlsSection | None = None
    drain_seconds: Seconds = 30.0
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _ports_differ(self) -> "GatewaySection":
        if self.http_port and self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}; choose two")
        return self


class ClusterConfig(_Section):
    """A cluster. Without `prefill` and `decode` one engine in one process does both."""

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    experts: ExpertsSection = ExpertsSection()
    prefill: RoleSection | None = None
    decode: RoleSection | None = None
    router: RouterSection = RouterSection()
    carriers: CarriersSection = CarriersSection()
    ray: RaySection = RaySection()
    gateway: GatewaySection = GatewaySection()
    tracing: TracingSection | None = None
    kubernetes: KubernetesSection | None = None

    @property
    def is_disaggregated(self) -> bool:
        """Whether prefill and decode have engines of their own."""
        return self.prefill is not None and self.decode is not None

    def role(self, role: Role) -> RoleSection:
        """The section of a role, in a description that has one."""
        section = self.prefill if role == "prefill" else self.decode
        assert section, role
        return section

    @model_validator(mode="after")
    def _dense_is_not_deterministic(self) -> "ClusterConfig":
        if self.model.deterministic and self.model.attention == "dense":
            raise ValueError("model.deterministic goes with model.attention: sparse only")
        return self

    @model_validator(mode="after")
    def _experts_on_gpus(self) -> "ClusterConfig":
        rows, kernels, is_pool = self.carriers.rows, self.model.kernels, self.experts.placement == "pool"
        if rows == "host" and kernels == "triton" and is_pool:
            problem = "model.kernels: triton goes with experts.placement: local, or in a pool with"
            raise ValueError(f"{problem} carriers.rows: ipc, copy or nccl, not host")
        if rows != "host" and not (kernels == "triton" and is_pool):
            needed = "model.kernels: triton and experts.placement: pool"
            found = f"{kernels} and {self.experts.placement}"
            raise ValueError(f"carriers.rows: {rows} goes with {needed}, not {found}")
        return self

    @model_validator(mode="after")
    def _carriers_join_gpus(self) -> "ClusterConfig":
        if self.carriers.pages != "host" and self.model.device != "cuda":
            raise ValueError(f"carriers.pages: {self.carriers.pages} goes with model.device: cuda")
        return self

    @property
    def start_seconds(self) -> float:
        """From nothing to all workers: experts first, then engines, which ask where those are."""
        return self.experts.place_seconds + 2 * self.ray.start_seconds

    @property
    def join_seconds(self) -> float:
        """The same where machines and images have to come first."""
        return max(self.experts.place_seconds, MACHINES_SECONDS) + 2 * self.ray.start_seconds

    def gpus(self) -> float:
        """How many GPUs the actors take together."""
        if self.model.device != "cuda":
            return 0.0
        total = self.experts.nodes * self.experts.gpus if self.experts.placement == "pool" else 0.0
        for section in (self.prefill, self.decode):
            if section:
                total += section.engines * section.attention_actors * section.gpus
        return total

    @model_validator(mode="after")
    def _roles_are_both_there(self) -> "ClusterConfig":
        if (self.prefill is None) != (self.decode is None):
            missing = "prefill" if self.prefill is None else "decode"
            raise ValueError(f"{missing} is missing: give both prefill and decode, or neither")
        return self

    @model_validator(mode="after")
    def _there_is_decode(self) -> "ClusterConfig":
        if self.decode and not self.decode.engines:
            raise ValueError(
                "decode.engines is 0; there is at least one: it holds the pages that answers need"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> "ClusterConfig":
        """Reads a description; relative paths in it start from its own directory.

        Raises:
            ConfigError: it cannot be used; the key and how to mend it are named.
        """
        raw = _read_yaml(path)
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise _config_error(path.name, error) from None
        return config._from(path.parent)

    def _from(self, base: Path) -> "ClusterConfig":
        """The same with its relative paths starting from `base`."""
        model = self.model.model_copy(update={"directory": base / self.model.directory})
        gateway = self.gateway
        if gateway.tls:
            files = {"certificate": base / gateway.tls.certificate, "key": base / gateway.tls.key}
            gateway = gateway.model_copy(update={"tls": gateway.tls.model_copy(update=files)})
        return self.model_copy(update={"model": model, "gateway": gateway})


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values only: no aliases, which can blow up a small file, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not used here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), "", error.strerror or "cannot be read") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(path.name, "", f"is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    try:
        raw = yaml.load(data, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(path.name, "", f"is not YAML that can be used: {error.problem}{line}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        raise ConfigError(path.name, "", "is not YAML that can be used") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(path.name, "", "must hold keys and values, such as `gateway: {http_port: 8000}`")
    return raw


def _config_error(file: str, error: ValidationError) -> ConfigError:
    """The first thing that is wrong, in our words."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return ConfigError(file, key, "there is no such key; check its spelling and its section")
    if first["type"] == "missing":
        return ConfigError(file, key, "is missing")
    if first["type"] == "value_error":
        return ConfigError(file, key, str(first["ctx"]["error"]))
    if "api_key_hashes" in first["loc"]:  # somebody may have written the key itself: do not show it
        problem = "must hold SHA-256 digests in hex, as `printf %s KEY | sha256sum` makes them"
        return ConfigError(file, key, problem)
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    message = first["msg"].removeprefix("Input ")
    return ConfigError(file, key, f"is {shown}; it {message}")
