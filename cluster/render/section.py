"""The part of a description that only Kubernetes needs: `eightfold render` alone reads it."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

_REFERENCE = re.compile(r"[a-z0-9][a-z0-9.:/_-]*?(:(?P<tag>\w[\w.-]{0,127}))?(@sha256:[0-9a-f]{64})?")


def _pinned(image: str) -> str:
    match = _REFERENCE.fullmatch(image)
    if not match or not (match["tag"] or "@" in image) or match["tag"] == "latest":
        raise ValueError("must name an image with a tag other than latest, or with a digest")
    return image


Count = Annotated[int, Field(ge=1, le=10_000)]
Name = Annotated[
    str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,39}[a-z0-9])?$")
]  # fits KubeRay's limits
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$")]
Image = Annotated[str, AfterValidator(_pinned)]  # what `latest` is changes between two pods of one cluster
HostPort = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*:[0-9]{1,5}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PodsSection(_Section):
    """The pods of a group; `cpus`, `memory` and `gpus` are those of one pod.

    `pods` None is as many as the actors need: by `gpus` where the model runs on GPUs, else a pod for each
    engine and each expert actor. There is one head; gateways are one, or as many as it says.
    """

    pods: Count | None = None
    cpus: Count = 1
    memory: Quantity = "4Gi"
    gpus: Annotated[int, Field(ge=0, le=16)] = 0
    node_selector: dict[str, str] = {}
    tolerations: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()


class RedisSection(_Section):
    """A Redis that keeps what the head knows: in the same namespace, in pods with `labels`.

    `secret` names a Secret that has the password under `password`.
    """

    secret: Name
    address: HostPort = "redis:6379"
    labels: dict[str, str] = {"app": "redis"}


class KubernetesSection(_Section):
    """How a cluster is deployed.

    Without `checkpoint_claim`, a volume claim that is mounted in place of `model.directory`, that directory
    is one of the image. Without `redis` a new head knows nothing of what ran under the old one. `tls_secret`
    names a Secret with `tls.crt`, `tls.key` and `ca.crt` for the gateways, `metrics_secret` one with an API
    key under `key` for Prometheus. `upgrade: new_cluster` brings a changed cluster up beside the old one and
    needs everything twice; with `none` changes wait until the old one is deleted.
    """

    name: Name = "eightfold"
    namespace: Name = "eightfold"
    platform: Literal["kubernetes", "openshift"] = "kubernetes"
    image: Image
    image_pull_secrets: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    upgrade: Literal["new_cluster", "none"] = "new_cluster"
    checkpoint_claim: Name | None = None
    redis: RedisSection | None = None
    tls_secret: Name | None = None
    metrics_secret: Name | None = None
    operator_namespace: Name = "kuberay-operator"
    monitoring_namespace: Name = "monitoring"
    head: PodsSection = PodsSection()
    gateways: PodsSection = PodsSection()
    prefill: PodsSection = PodsSection()
    decode: PodsSection = PodsSection()
    experts: PodsSection = PodsSection()
