"""Keys: nothing but liveness and readiness without one, over both protocols."""

import hashlib
from collections.abc import Iterator

import grpc
import httpx2
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import ClusterConfig
from cluster.gateway.auth import ApiKeys
from cluster.gateway.grpc_server import SERVICE
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from tests.cluster.gateway.serving import HARBOR, Served, serve
from workers.local import LocalModel

KEY = "a key of the tests"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.fixture(scope="module")
def locked(demo: LocalModel) -> Iterator[Served]:
    config = {"gateway": {"http_port": 0, "grpc_port": 0, "api_key_hashes": ["0" * 64, HASH]}}
    with serve(demo, ClusterConfig.model_validate(config)) as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1/models", "/models", "/v1/models/demo", "/v1/chat/completions", "/chat/completions",
        "/v1/completions", "/completions", "/metrics", "/version", "/nothing", "/healthz/", "//healthz",
        "/healthz/../metrics", "/readyz?x", "/docs", "/openapi.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_every_route_asks_for_a_key(locked: Served, path: str, method: str) -> None:
    response = httpx2.request(method, httpx2.URL(f"{locked.url}{path}"), trust_env=False)
    if path == "/readyz?x":  # a query changes no path
        assert response.status_code in (200, 405)
        return
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_liveness_and_readiness_are_open(locked: Served) -> None:
    assert httpx2.get(f"{locked.url}/healthz", trust_env=False).status_code == 200
    assert httpx2.get(f"{locked.url}/readyz", trust_env=False).status_code == 200


def test_the_right_key_opens_and_a_wrong_one_does_not(locked: Served) -> None:
    with locked.openai(api_key=KEY) as client:
        answer = client.chat.completions.create(model="demo", messages=HARBOR, max_tokens=1)  # type: ignore[call-overload]
        assert answer.choices
    with locked.openai(api_key="another") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_grpc_asks_for_a_key_but_for_health(locked: Served) -> None:
    with grpc.insecure_channel(locked.target) as channel:
        stub = InferenceServiceStub(channel)
        for metadata in ((), (("authorization", "Bearer no"),), (("authorization", f"Basic {KEY}"),)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Models(pb.ModelsRequest(), metadata=metadata, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        for method in (
            f"/{SERVICE}/Nothing",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        good = (("authorization", f"Bearer {KEY}"),)
        assert stub.Models(pb.ModelsRequest(), metadata=good, timeout=10).models
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


def test_a_tenant_is_its_key_s_hash() -> None:
    keys = ApiKeys([HASH])
    assert keys.tenant(f"Bearer {KEY}") == HASH
    assert keys.tenant(f"bearer  {KEY} ") == HASH
    for wrong in (None, "", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Token {KEY}", "Bearer \udcff"):
        assert keys.tenant(wrong) is None
    assert ApiKeys([]).tenant(None) == ""
