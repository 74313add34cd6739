"""The rules hold for every example, and each of them catches its breach."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig
from cluster.render.manifests import render
from tests.cluster.render import rules
from tests.cluster.render.rules import KUBERAY, SECURITY, Document, Rule, cluster, of_kind, pods

EXAMPLES = sorted((Path(__file__).parents[3] / "manifests/kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[Document]:
    files = render(ClusterConfig.load(path))
    return [document for text in files.values() for document in yaml.safe_load_all(text)]


@pytest.mark.parametrize("rule", [*KUBERAY, *SECURITY], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_holds(path: Path, rule: Rule) -> None:
    assert list(rule(documents(path))) == []


def pod(docs: list[Document], name: str = "decode") -> Any:
    return dict(pods(docs))[name]


def container(docs: list[Document], name: str = "decode") -> Any:
    return pod(docs, name)["containers"][0]


def group(docs: list[Document], name: str = "decode") -> Any:
    return next(g for g in cluster(docs)["workerGroupSpecs"] if g["groupName"] == name)


def policy(docs: list[Document], name: str) -> Any:
    found = of_kind(docs, "NetworkPolicy")
    return next(p["spec"] for p in found if p["metadata"]["name"] == f"eightfold-{name}")


def config_map(docs: list[Document], old: str, new: str) -> None:
    data = of_kind(docs, "ConfigMap")[0]["data"]
    assert old in data["cluster.yaml"]
    data["cluster.yaml"] = data["cluster.yaml"].replace(old, new)


def without(docs: list[Document], kind: str, name: str = "") -> None:
    gone = [d for d in of_kind(docs, kind) if d["metadata"]["name"].endswith(name)]
    assert gone
    docs[:] = [d for d in docs if d not in gone]


# What somebody might do to a manifest, and the rule that sees it.
BREACHES: list[tuple[Rule, Callable[[list[Document]], Any]]] = [
    (rules.name_is_short, lambda d: rules.service(d)["metadata"].update(name="e" * 42)),
    (rules.upgrade_is_known, lambda d: rules.service(d)["spec"]["upgradeStrategy"].update(type="Bogus")),
    (
        rules.upgrade_is_known,
        lambda d: rules.service(d)["spec"]["upgradeStrategy"].update(type="NewClusterWithIncrementalUpgrade"),
    ),
    (rules.resources_are_said_once, lambda d: cluster(d)["headGroupSpec"].update(resources={"CPU": "0"})),
    (rules.labels_stand_in_their_field, lambda d: group(d)["rayStartParams"].update(labels="role=decode")),
    (rules.labels_stand_in_their_field, lambda d: group(d).update(labels={})),
    (rules.autoscaled_pods_never_restart, lambda d: pod(d).update(restartPolicy="Always")),
    (rules.token_needs_a_version, lambda d: cluster(d).update(rayVersion="2.51.0")),
    (rules.token_needs_a_version, lambda d: cluster(d).pop("rayVersion")),
    (rules.no_alpha_gates, lambda d: cluster(d).update(tlsOptions={})),
    (rules.no_alpha_gates, lambda d: cluster(d)["gcsFaultToleranceOptions"].update(backend="rocksdb")),
    (
        rules.redis_is_said_once,
        lambda d: container(d, "head")["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
    ),
    (rules.head_names_a_serve_port, lambda d: container(d, "head")["ports"].pop()),
    (rules.replicas_fit, lambda d: group(d).update(maxReplicas=0)),
    (
        rules.gateways_keep_their_command,
        lambda d: group(d, "gateways")["template"]["metadata"].pop("annotations"),
    ),
    (rules.workers_have_probes, lambda d: container(d).pop("readinessProbe")),
    (rules.answers_may_end, lambda d: pod(d, "gateways").update(terminationGracePeriodSeconds=30)),
    (rules.answers_may_end, lambda d: config_map(d, "drain_seconds: 600.0", "drain_seconds: 30.0")),
    (rules.strict_experts_have_hosts, lambda d: pod(d, "experts").pop("topologySpreadConstraints")),
    (
        rules.strict_experts_have_hosts,
        lambda d: pod(d, "experts")["topologySpreadConstraints"][0].pop("minDomains"),
    ),
    (
        rules.gpus_are_where_actors_are,
        lambda d: container(d)["resources"]["limits"].pop("nvidia.com/gpu"),
    ),
    (rules.token_is_on, lambda d: cluster(d)["authOptions"].update(mode="disabled")),
    (rules.nobody_is_root, lambda d: pod(d)["securityContext"].pop("runAsNonRoot")),
    (rules.nobody_is_root, lambda d: pod(d)["securityContext"].update(runAsUser=0)),
    (rules.root_is_read_only, lambda d: container(d)["securityContext"].pop("readOnlyRootFilesystem")),
    (
        rules.root_is_read_only,
        lambda d: cluster(d)["autoscalerOptions"]["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (rules.what_is_written_is_scratch, lambda d: pod(d)["volumes"][0].update(emptyDir={})),
    (rules.what_is_written_is_scratch, lambda d: container(d)["volumeMounts"].pop(0)),
    (
        rules.capabilities_are_dropped,
        lambda d: container(d)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
    ),
    (rules.nothing_escalates, lambda d: container(d)["securityContext"].pop("allowPrivilegeEscalation")),
    (rules.nothing_escalates, lambda d: container(d)["securityContext"].update(privileged=True)),
    (rules.calls_are_filtered, lambda d: pod(d)["securityContext"].pop("seccompProfile")),
    (rules.hosts_are_not_shared, lambda d: pod(d).update(hostNetwork=True)),
    (
        rules.hosts_are_not_shared,
        lambda d: pod(d)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    (rules.only_the_autoscaler_has_an_api_token, lambda d: pod(d).pop("automountServiceAccountToken")),
    (
        rules.only_the_autoscaler_has_an_api_token,
        lambda d: container(d, "head")["volumeMounts"].append({"name": "api-token", "mountPath": "/token"}),
    ),
    (rules.resources_have_limits, lambda d: container(d)["resources"].pop("limits")),
    (rules.images_are_pinned, lambda d: container(d).update(image="eightfold:latest")),
    (rules.images_are_pinned, lambda d: container(d).update(image="registry:5000/eightfold")),
    (
        rules.secrets_are_references,
        lambda d: cluster(d)["gcsFaultToleranceOptions"].update(redisPassword={"value": "secret"}),
    ),
    (
        rules.secrets_are_references,
        lambda d: d.append({"kind": "Secret", "metadata": {"name": "ours"}}),
    ),
    (
        rules.secrets_are_references,
        lambda d: container(d)["env"].append({"name": "RAY_AUTH_TOKEN", "value": "secret"}),
    ),
    (rules.namespace_is_restricted, lambda d: of_kind(d, "Namespace")[0]["metadata"].pop("labels")),
    (rules.everything_is_denied_first, lambda d: without(d, "NetworkPolicy", "-deny")),
    (rules.everything_is_denied_first, lambda d: policy(d, "deny")["policyTypes"].remove("Egress")),
    (rules.everything_is_denied_first, lambda d: policy(d, "deny")["ingress"].append({})),
    (rules.only_clients_come_from_anywhere, lambda d: policy(d, "cluster")["ingress"][0].pop("from")),
    (rules.only_clients_come_from_anywhere, lambda d: policy(d, "cluster")["ingress"][0].pop("ports")),
    (
        rules.only_clients_come_from_anywhere,
        lambda d: policy(d, "gateways")["ingress"][0]["ports"].append({"protocol": "TCP", "port": 6379}),
    ),
    (
        rules.only_what_is_written_goes_out,
        lambda d: policy(d, "cluster")["egress"][0]["to"].append({"ipBlock": {"cidr": "0.0.0.0/0"}}),
    ),
    (rules.only_what_is_written_goes_out, lambda d: policy(d, "dns")["egress"][0].pop("ports")),
    (rules.every_role_has_a_budget, lambda d: without(d, "PodDisruptionBudget", "-decode")),
]


@pytest.mark.parametrize(
    ("rule", "breach"), BREACHES, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(BREACHES)]
)
def test_it_sees_its_breach(rule: Rule, breach: Callable[[list[Document]], Any]) -> None:
    docs = deepcopy(documents(next(path for path in EXAMPLES if path.stem == "h200-8x8")))
    assert list(rule(docs)) == []
    breach(docs)
    assert list(rule(docs)) != []


def test_every_rule_has_a_breach() -> None:
    assert {rule for rule, _ in BREACHES} == {*KUBERAY, *SECURITY}
