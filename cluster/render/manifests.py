"""All that Kubernetes needs to run a description, as YAML; the same description gives the same bytes.

render(config)              by file name
  check, groups             whether it can run in pods, and in which
  description               the ConfigMap that pods read
  rayservice, services      what runs, and how clients come to it
  network, policy           what is allowed
  monitoring                what is watched
"""

from typing import Any

import yaml

from cluster.config import ClusterConfig, ConfigError
from cluster.render.description import check, config_map, config_map_name, inside
from cluster.render.groups import groups
from cluster.render.monitoring import pod_monitors
from cluster.render.network import network_policies
from cluster.render.pods import PodFacts
from cluster.render.policy import disruption_budgets, namespace
from cluster.render.rayservice import ray_service
from cluster.render.services import services


def render(config: ClusterConfig) -> dict[str, str]:
    """The files' contents by their names, in the order in which they can be applied.

    Raises:
        ConfigError: the description cannot run on Kubernetes; the key is named.
    """
    kubernetes = config.kubernetes
    if not kubernetes:
        raise ConfigError("", "kubernetes", "is missing: at least kubernetes.image must be given")
    check(config, kubernetes)
    found = groups(config, kubernetes)
    text = inside(config, kubernetes, found)
    facts = PodFacts(config, kubernetes, config_map_name(kubernetes, text))
    documents = {
        "00-namespace.yaml": [namespace(facts)],
        "10-networkpolicies.yaml": network_policies(facts),
        "20-description.yaml": [config_map(kubernetes, text)],
        "30-rayservice.yaml": [ray_service(facts, found)],
        "40-services.yaml": services(facts),
        "50-disruptionbudgets.yaml": disruption_budgets(facts, found),
        "60-podmonitors.yaml": pod_monitors(facts),
    }
    return {name: _dump(docs) for name, docs in documents.items()}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts of several lines as blocks, and nothing by alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(documents: list[dict[str, Any]]) -> str:
    header = "# Rendered by `eightfold render`; edit the description instead.\n"
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=110, allow_unicode=True
    )
    return header + text
