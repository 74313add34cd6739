from pathlib import Path

import pytest

from cluster.commands.serve import EMBEDDED
from cluster.config import ClusterConfig, ConfigError
from workers.engine import EngineConfig

GPU = "kernels: triton, device: cuda, dtype: bfloat16, pages: fp8"


def load(tmp_path: Path, text: str) -> ClusterConfig:
    (tmp_path / "cluster.yaml").write_text(text)
    return ClusterConfig.load(tmp_path / "cluster.yaml")


def test_an_empty_file_is_the_demo_on_loopback(tmp_path: Path) -> None:
    config = load(tmp_path, "# nothing\n")
    assert config == ClusterConfig()
    assert config.model.served_name == "demo"
    assert (config.gateway.host, config.gateway.http_port, config.gateway.grpc_port) == (
        "127.0.0.1",
        8000,
        50051,
    )


def test_paths_start_from_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "model: {directory: weights, dtype: bfloat16, pages: fp8}\n"
        "engine: {chunk: 256, drafts: 2}\n"
        "gateway: {tls: {certificate: /etc/c.pem, key: k.pem}, api_key_hashes: [" + "a" * 64 + "]}\n",
    )
    assert config.model.directory == tmp_path / "weights"
    assert config.model.options().pages == "fp8"
    assert config.engine.config().num_drafts == 2
    assert config.gateway.tls
    assert config.gateway.tls.certificate == Path("/etc/c.pem")
    assert config.gateway.tls.key == tmp_path / "k.pem"


def test_tracing_is_off_until_it_is_told_where_to_send(tmp_path: Path) -> None:
    assert ClusterConfig().tracing is None
    tracing = load(tmp_path, "tracing: {endpoint: 'https://[fd00::1]/base/'}").tracing
    assert tracing
    assert (tracing.endpoint, tracing.sample) == ("https://[fd00::1]/base", 0.01)
    assert (tracing.host, tracing.port) == ("fd00::1", 443)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gateway: {http_prot: 1}", "gateway.http_prot: there is no such key"),
        (
            "gateway: {http_port: 70000}",
            "gateway.http_port: is 70000; it should be less than or equal to 65535",
        ),
        ("gateway: {http_port: '80'}", "gateway.http_port: is '80'; it should be a valid integer"),
        ("gateway: {http_port: 50051}", "http_port and grpc_port are both 50051"),
        ("gateway: {api_key_hashes: [secret]}", "gateway.api_key_hashes.0: must hold SHA-256 digests"),
        ("gateway: {tls: {key: k}}", "gateway.tls.certificate: is missing"),
        ("gateway: {limits: {total_seconds: .nan}}", "gateway.limits.total_seconds"),
        ("model: {dtype: float16}", "model.dtype: is 'float16'"),
        ("engine: {chunk: 0}", "engine.chunk: is 0"),
        ("engine: {drafts: 9}", "engine.drafts: is 9"),
        ("engine: {drafts: many}", "engine.drafts: is 'many'; it should be 0, 1, 2, 3 or 'auto'"),
        ("prefill: {engines: 1}", "decode is missing: give both prefill and decode, or neither"),
        ("decode: {engines: -1}\nprefill: {}", "decode.engines: is -1"),
        ("decode: {}\nprefill: {engines: 0}", "prefill: engines is 0, which goes with autoscale only"),
        (
            "prefill: {}\ndecode: {engines: 0, autoscale: {max: 2, objective_seconds: 1}}",
            "decode.engines is 0; there is at least one",
        ),
        ("ray: {start_seconds: 9}", "ray.start_seconds: is 9; it should be greater than or equal to 10"),
        ("ray: {start_seconds: 86400}", "ray.start_seconds: is 86400"),
        ("engine: {max_open: 0}", "engine.max_open: is 0"),
        (
            "prefill: {}\ndecode: {engines: 3, autoscale: {max: 2, objective_seconds: 1}}",
            "decode: autoscale.max is 2; it is at least engines, 3",
        ),
        ("prefill: {}\ndecode: {autoscale: {max: 2}}", "decode.autoscale.objective_seconds: is missing"),
        ("experts: {spread: wide}", "experts.spread: is 'wide'"),
        ("model: {deterministic: true, attention: dense}", "sparse only"),
        ("model: {kernels: triton}", "'triton' goes with device cuda, not cpu"),
        ("model: {kernels: triton, device: cuda, dtype: bfloat16}", "goes with pages fp8, not full"),
        ("model: {kernels: triton, deterministic: true}", "goes with kernels: reference only"),
        ("model: {device: cuda, deterministic: true}", "goes with device: cpu only"),
        (
            f"model: {{{GPU}}}\nexperts: {{placement: pool}}",
            "triton goes with experts.placement: local, or in a pool with carriers.rows: ipc, copy or nccl",
        ),
        (
            f"model: {{{GPU}}}\ncarriers: {{rows: ipc}}",
            "rows: ipc goes with model.kernels: triton and experts.placement: pool, not triton and local",
        ),
        (
            "model: {device: cuda}\nexperts: {placement: pool}\ncarriers: {rows: nccl}",
            "rows: nccl goes with model.kernels: triton and experts.placement: pool, not reference and pool",
        ),
        ("carriers: {rows: tcp}", "carriers.rows: is 'tcp'"),
        ("engine: {micro_batches: 4}", "engine.micro_batches: is 4"),
        ("engine: {sequences: 0}", "engine.sequences: is 0"),
        ("prefill: {gpus: 1.5}\ndecode: {}", "prefill.gpus: is 1.5"),
        ("model: {third_party: [deep_gemm]}", "third_party: goes with kernels triton only"),
        ("model: {weights: none}", "model.weights: is 'none'; it should be 'checkpoint' or 'random'"),
        ("model: {weights: random, layers: 0}", "model.layers: is 0"),
        ("model: {layers: 3}", "layers: goes with weights random only"),
        ("tracing: {}", "tracing.endpoint: is missing"),
        ("tracing: {endpoint: 'http://c:4318', headers: {}}", "tracing.headers: there is no such key"),
        ("tracing: {endpoint: 'http://c:4318', sample: 1.5}", "tracing.sample: is 1.5"),
        ("tracing: {endpoint: 'collector:4318'}", "it should be a URL such as http://collector:4318"),
        ("tracing: {endpoint: 'grpc://c:4317'}", "it should be a URL such as http://collector:4318"),
        ("tracing: {endpoint: 'http://c:99999'}", "tracing.endpoint: is no URL"),
        ("tracing: {endpoint: 'ftp://me:secret@c'}", "holds a user or a password"),
        ("tracing: {endpoint: 'http://c:4318?key=1'}", "it should end with its host, port or path"),
        ("tracing: {endpoint: 'http://c:4318/v1/traces/'}", "leave /v1/traces out, it is added"),
        ("engine: {chunk: 1, chunk: 2}", "'chunk' stands twice in line 1"),
        ("a: &x [1]\nb: *x", "aliases are not used here in line 2"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML that can be used"),
        ("[1]", "must hold keys and values"),
        ("a: [", "is not YAML that can be used"),
        ("a: \x00", "is not YAML that can be used"),
        ("[" * 5000, "is not YAML that can be used"),
        ("? [1]\n: 2", "is not YAML that can be used"),
        ("#" * 300_000, "is larger than"),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert str(caught.value).startswith("cluster.yaml")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_description_of_make_serve_is_a_cluster_of_eight_expert_actors() -> None:
    config = ClusterConfig.load(EMBEDDED)
    assert config.is_disaggregated
    assert (config.experts.placement, config.experts.nodes) == ("pool", 8)
    assert config.engine.config() == EngineConfig(num_drafts=3, adapt=True)


def test_experts_of_a_pool_by_kernels_for_gpus(tmp_path: Path) -> None:
    text = f"model: {{{GPU}}}\nexperts: {{placement: pool}}\ncarriers: {{pages: ipc, rows: nccl}}"
    config = load(tmp_path, text)
    assert (config.carriers.page_carrier, config.carriers.row_carrier) == ("ipc", "nccl")
    engine = load(tmp_path, "engine: {micro_batches: 3, sequences: 100}").engine.config()
    assert engine == EngineConfig(micro_batches=3, sequences=100)
    plain = load(tmp_path, "{}").carriers
    assert (plain.page_carrier, plain.row_carrier) == (None, None)


def test_kernels_and_libraries_for_a_gpu(tmp_path: Path) -> None:
    options = load(tmp_path, f"model: {{{GPU}, third_party: [flash_mla]}}").model.options()
    assert (options.kernels, options.device, options.third_party) == ("triton", "cuda", ("flash_mla",))


def test_random_weights_and_how_many_layers(tmp_path: Path) -> None:
    options = load(tmp_path, "model: {weights: random, layers: 5}").model.options()
    assert (options.weights, options.layers) == ("random", 5)


def test_deterministic_arithmetic_is_one_word(tmp_path: Path) -> None:
    assert load(tmp_path, "model: {deterministic: true}").model.options().kernels == "deterministic"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        ClusterConfig.load(tmp_path / "nowhere.yaml")
