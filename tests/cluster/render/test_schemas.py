"""Manifests against the schemas of KubeRay, of Kubernetes and of Ray Serve."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import ClusterConfig
from cluster.render.manifests import render
from tests.cluster.render.test_rules import EXAMPLES, documents

KUBERNETES = "1.37"


def closed(schema: Any) -> Any:
    """The same schema with no fields but those it names, as the API server prunes them."""
    if isinstance(schema, dict):
        out = {key: closed(value) for key, value in schema.items()}
        keeps_all = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if isinstance(schema.get("properties"), dict) and not keeps_all:
            out["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            out.pop("type", None)
        return out
    return [closed(one) for one in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def ray_service_schema(request: pytest.FixtureRequest) -> Any:
    directory = request.config.getoption("--kuberay")
    if not directory:
        pytest.skip("KubeRay's resource definitions are needed: --kuberay DIR")
    definition = yaml.load((Path(directory) / "ray.io_rayservices.yaml").read_text(), Loader=yaml.CSafeLoader)
    version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return jsonschema.Draft202012Validator(schema)


def ray_service(path: Path) -> Any:
    return yaml.safe_load(render(ClusterConfig.load(path))["30-rayservice.yaml"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_kuberay_takes_it(path: Path, ray_service_schema: Any) -> None:
    found = [
        f"{error.json_path}: {error.message}" for error in ray_service_schema.iter_errors(ray_service(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("rayClusterConfig", "authOptions", "mode"), "bogus"),
        (("rayClusterConfig", "autoscalerOptions", "version"), "v3"),
        (("rayClusterConfig", "headGroupSpec", "templates"), {}),
        (("serveConfigV2",), {"applications": []}),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_kuberay_s_schema_is_not_blind(where: tuple[str, ...], value: Any, ray_service_schema: Any) -> None:
    document = ray_service(EXAMPLES[0])
    part = document["spec"]
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    assert list(ray_service_schema.iter_errors(document))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_kubernetes_takes_the_rest(path: Path) -> None:
    """Pod templates too, as the pods that they become."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    docs = documents(path)
    kinds = set()
    for document in docs:
        if document["kind"] not in ("RayService", "PodMonitor"):  # not Kubernetes' own
            kubernetes.validate(document, KUBERNETES, strict=True)
            kinds.add(document["kind"])
    assert kinds == {"Namespace", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service"}
    cluster = next(d for d in docs if d["kind"] == "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        kubernetes.validate({"apiVersion": "v1", "kind": "Pod", **group["template"]}, KUBERNETES, strict=True)


@pytest.mark.filterwarnings("ignore")  # Serve uses what pydantic will take away
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_serve_reads_its_configuration(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from cluster.serve_app import Arguments

    said = yaml.safe_load(ray_service(path)["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(said)
    assert set(said) <= set(ServeDeploySchema.model_fields)  # it lets unknown keys pass
    assert config.proxy_location == "Disabled"  # they have no TLS and no limits, and tell of our insides
    assert [app.import_path for app in config.applications] == ["cluster.serve_app:build"] * 2
    assert {Arguments.model_validate(app.args).role for app in config.applications} == {"prefill", "decode"}
    assert all(app.route_prefix is None for app in config.applications)


@pytest.mark.filterwarnings("ignore")
def test_ray_start_knows_its_options() -> None:
    from ray.scripts.scripts import start

    known = {option[2:] for parameter in start.params for option in parameter.opts}
    cluster = ray_service(EXAMPLES[0])["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
