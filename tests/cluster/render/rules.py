"""What rendered manifests must keep to, each rule a function that names every breach of it.

`KUBERAY` is what KubeRay 1.7.0 demands beyond the schema of its resources, and what our own parts need of
each other; `SECURITY` what a hostile network and a hostile pod must not find.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import yaml

Document = dict[str, Any]
Rule = Callable[[list[Document]], Iterator[str]]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def service(documents: list[Document]) -> Document:
    return of_kind(documents, "RayService")[0]


def cluster(documents: list[Document]) -> Document:
    found: Document = service(documents)["spec"]["rayClusterConfig"]
    return found


def groups(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    yield "head", cluster(documents)["headGroupSpec"]
    for group in cluster(documents)["workerGroupSpecs"]:
        yield group["groupName"], group


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for name, group in groups(documents):
        yield name, group["template"]["spec"]


def contexts(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """The security contexts of every container, the autoscaler's too."""
    for name, pod in pods(documents):
        for container in pod["containers"]:
            yield f"{name}/{container['name']}", container["securityContext"]
    yield "autoscaler", cluster(documents)["autoscalerOptions"]["securityContext"]


# KubeRay


def name_is_short(documents: list[Document]) -> Iterator[str]:
    name = service(documents)["metadata"]["name"]
    if len(name) > 41 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield name


def upgrade_is_known(documents: list[Document]) -> Iterator[str]:
    """Not an enum in the schema. The incremental kind has no way for gRPC."""
    kind = service(documents)["spec"]["upgradeStrategy"]["type"]
    if kind not in ("NewCluster", "None"):
        yield kind


def resources_are_said_once(documents: list[Document]) -> Iterator[str]:
    for name, group in groups(documents):
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group["rayStartParams"]
        ):
            yield name


def labels_stand_in_their_field(documents: list[Document]) -> Iterator[str]:
    for name, group in groups(documents):
        if "labels" in group["rayStartParams"] or not group["labels"]:
            yield name


def autoscaled_pods_never_restart(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        if pod.get("restartPolicy", "Never") != "Never":
            yield name


def token_needs_a_version(documents: list[Document]) -> Iterator[str]:
    version = tuple(int(part) for part in cluster(documents).get("rayVersion", "0").split("."))
    if version < (2, 52):
        yield f"rayVersion {version}"


def no_alpha_gates(documents: list[Document]) -> Iterator[str]:
    yield from {"tlsOptions", "networkPolicy", "historyServerOptions"} & set(cluster(documents))
    if cluster(documents).get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
        yield "rocksdb"


def redis_is_said_once(documents: list[Document]) -> Iterator[str]:
    _, head = next(pods(documents))
    names = {entry["name"] for entry in head["containers"][0]["env"]}
    yield from names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}


def head_names_a_serve_port(documents: list[Document]) -> Iterator[str]:
    _, head = next(pods(documents))
    if not any(port["name"].startswith("serve") for port in head["containers"][0]["ports"]):
        yield "no port of the head is called serve"


def replicas_fit(documents: list[Document]) -> Iterator[str]:
    for group in cluster(documents)["workerGroupSpecs"]:
        if not 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield group["groupName"]


def gateways_keep_their_command(documents: list[Document]) -> Iterator[str]:
    for group in cluster(documents)["workerGroupSpecs"]:
        notes = group["template"]["metadata"].get("annotations", {})
        command = group["template"]["spec"]["containers"][0].get("command")
        if bool(command) != (notes.get("ray.io/overwrite-container-cmd") == "true"):
            yield group["groupName"]


def workers_have_probes(documents: list[Document]) -> Iterator[str]:
    """Else KubeRay asks each for a proxy of Serve's, and none is ever ready."""
    for name, pod in pods(documents):
        for probe in ("livenessProbe", "readinessProbe"):
            if probe not in pod["containers"][0]:
                yield f"{name}: {probe}"


def answers_may_end(documents: list[Document]) -> Iterator[str]:
    """From the longest answer there may be, over the drain, to the end of the pod."""
    description = yaml.safe_load(of_kind(documents, "ConfigMap")[0]["data"]["cluster.yaml"])
    gateway = description["gateway"]
    longest = gateway.get("limits", {}).get("total_seconds", 600)
    if gateway["drain_seconds"] < longest:
        yield f"drain_seconds {gateway['drain_seconds']}"
    for name, pod in pods(documents):
        hook = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        needed = hook + (gateway["drain_seconds"] if name == "gateways" else 0)
        if pod["terminationGracePeriodSeconds"] <= needed or needed <= longest:
            yield f"{name}: {pod['terminationGracePeriodSeconds']} s"


def strict_experts_have_hosts(documents: list[Document]) -> Iterator[str]:
    description = yaml.safe_load(of_kind(documents, "ConfigMap")[0]["data"]["cluster.yaml"])
    experts = description.get("experts", {})
    if experts.get("spread") != "strict":
        return
    nodes = experts.get("nodes", 8)
    for constraint in dict(pods(documents))["experts"].get("topologySpreadConstraints", [{}]):
        said = constraint.get("maxSkew"), constraint.get("minDomains"), constraint.get("whenUnsatisfiable")
        if said != (1, nodes, "DoNotSchedule") or constraint["topologyKey"] != "kubernetes.io/hostname":
            yield str(said)


def gpus_are_where_actors_are(documents: list[Document]) -> Iterator[str]:
    """A device of the description and GPUs of the pods belong together."""
    description = yaml.safe_load(of_kind(documents, "ConfigMap")[0]["data"]["cluster.yaml"])
    on_gpus = description["model"].get("device") == "cuda"
    for name, pod in pods(documents):
        has = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        if has != (on_gpus and name in ("prefill", "decode", "experts")):
            yield name


# Security


def token_is_on(documents: list[Document]) -> Iterator[str]:
    if cluster(documents).get("authOptions", {}).get("mode") != "token":
        yield "Ray asks for no token"


def nobody_is_root(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        context = pod["securityContext"]
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 1) == 0:
            yield name
    yield from (name for name, context in contexts(documents) if context.get("runAsNonRoot") is not True)


def root_is_read_only(documents: list[Document]) -> Iterator[str]:
    for name, context in contexts(documents):
        if context.get("readOnlyRootFilesystem") is not True:
            yield name


def what_is_written_is_scratch(documents: list[Document]) -> Iterator[str]:
    """Whatever is mounted writable is an emptyDir with a limit, and there is one for /tmp."""
    for name, pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = pod["containers"][0]["volumeMounts"]
        writable = [mount for mount in mounts if not mount.get("readOnly")]
        if "/tmp" not in {mount["mountPath"] for mount in writable}:
            yield f"{name}: no /tmp"
        for mount in writable:
            if "sizeLimit" not in volumes[mount["name"]].get("emptyDir", {}):
                yield f"{name}: {mount['mountPath']}"


def capabilities_are_dropped(documents: list[Document]) -> Iterator[str]:
    for name, context in contexts(documents):
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield name


def nothing_escalates(documents: list[Document]) -> Iterator[str]:
    for name, context in contexts(documents):
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield name


def calls_are_filtered(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        if pod["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield name


def hosts_are_not_shared(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        yield from (f"{name}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
        yield from (f"{name}: {volume['name']}" for volume in pod["volumes"] if "hostPath" in volume)


def only_the_autoscaler_has_an_api_token(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        if pod.get("automountServiceAccountToken") is not False:
            yield name
        tokens = {volume["name"] for volume in pod["volumes"] if "serviceAccountToken" in str(volume)}
        for mount in pod["containers"][0]["volumeMounts"]:
            if mount["name"] in tokens:
                yield f"{name}: {mount['mountPath']}"


def resources_have_limits(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        if not {"cpu", "memory"} <= set(pod["containers"][0]["resources"].get("limits", {})):
            yield name


def images_are_pinned(documents: list[Document]) -> Iterator[str]:
    for name, pod in pods(documents):
        image = pod["containers"][0]["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{name}: {image}"


def secrets_are_references(documents: list[Document]) -> Iterator[str]:
    """No Secret is among what is rendered, and whatever is called a password or token comes from one."""
    yield from (document["metadata"]["name"] for document in of_kind(documents, "Secret"))
    redis = cluster(documents).get("gcsFaultToleranceOptions")
    if redis and set(redis["redisPassword"]) != {"valueFrom"}:
        yield "redisPassword"
    for name, pod in pods(documents):
        for entry in pod["containers"][0]["env"]:
            if re.search("PASSWORD|TOKEN|KEY|SECRET", entry["name"]) and "value" in entry:
                yield f"{name}: {entry['name']}"


def namespace_is_restricted(documents: list[Document]) -> Iterator[str]:
    for namespace in of_kind(documents, "Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield namespace["metadata"]["name"]


def everything_is_denied_first(documents: list[Document]) -> Iterator[str]:
    """One policy selects all pods, in both directions, and allows nothing."""
    ours = {"eightfold/cluster": service(documents)["metadata"]["name"]}
    for policy in of_kind(documents, "NetworkPolicy"):
        spec = policy["spec"]
        is_empty = spec.get("ingress") == [] and spec.get("egress") == []
        is_both = sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
        if is_empty and is_both and spec["podSelector"]["matchLabels"] == ours:
            return
    yield "nothing denies what is not allowed"


def only_clients_come_from_anywhere(documents: list[Document]) -> Iterator[str]:
    """A rule without `from` is for gateways and their two ports; every rule names its ports."""
    description = yaml.safe_load(of_kind(documents, "ConfigMap")[0]["data"]["cluster.yaml"])["gateway"]
    open_ports = {description.get("http_port", 8000), description.get("grpc_port", 50051)}
    for policy in of_kind(documents, "NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        for rule in spec.get("ingress", []):
            if not rule.get("ports"):
                yield f"{name}: any port"
            elif not rule.get("from"):
                role = spec["podSelector"]["matchLabels"].get("eightfold/role")
                if role != "gateways" or {port["port"] for port in rule["ports"]} != open_ports:
                    yield f"{name}: from anywhere"


def only_what_is_written_goes_out(documents: list[Document]) -> Iterator[str]:
    """To addresses that are no pods': the head, to Kubernetes' own API, and gateways to a collector."""
    description = yaml.safe_load(of_kind(documents, "ConfigMap")[0]["data"]["cluster.yaml"])
    collector = urlsplit(description.get("tracing", {}).get("endpoint", ""))
    usual = {"http": 80, "https": 443}.get(collector.scheme)
    allowed = {"head": {443, 6443}, "gateways": {collector.port or usual}}
    for policy in of_kind(documents, "NetworkPolicy"):
        spec = policy["spec"]
        for rule in spec.get("egress", []):
            name = policy["metadata"]["name"]
            if not rule.get("ports") or not rule.get("to"):
                yield f"{name}: any port or anywhere"
            elif any("ipBlock" in peer for peer in rule["to"]):
                role = spec["podSelector"]["matchLabels"].get("eightfold/role")
                if {port["port"] for port in rule["ports"]} != allowed.get(role):
                    yield f"{name}: {rule['ports']}"


def every_role_has_a_budget(documents: list[Document]) -> Iterator[str]:
    budgets = {
        budget["spec"]["selector"]["matchLabels"]["eightfold/role"]: budget["spec"]
        for budget in of_kind(documents, "PodDisruptionBudget")
    }
    for group in cluster(documents)["workerGroupSpecs"]:
        if budgets.get(group["groupName"], {}).get("maxUnavailable") != 1:
            yield group["groupName"]


KUBERAY: tuple[Rule, ...] = (
    name_is_short, upgrade_is_known, resources_are_said_once, labels_stand_in_their_field,
    autoscaled_pods_never_restart, token_needs_a_version, no_alpha_gates, redis_is_said_once,
    head_names_a_serve_port, replicas_fit, gateways_keep_their_command, workers_have_probes, answers_may_end,
    strict_experts_have_hosts, gpus_are_where_actors_are,
)  # fmt: skip
SECURITY: tuple[Rule, ...] = (
    token_is_on, nobody_is_root, root_is_read_only, what_is_written_is_scratch, capabilities_are_dropped,
    nothing_escalates, calls_are_filtered, hosts_are_not_shared, only_the_autoscaler_has_an_api_token,
    resources_have_limits, images_are_pinned, secrets_are_references, namespace_is_restricted,
    everything_is_denied_first, only_clients_come_from_anywhere, only_what_is_written_goes_out,
    every_role_has_a_budget,
)  # fmt: skip
