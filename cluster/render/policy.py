"""What holds for pods as a whole: a namespace that takes restricted ones, and how many may go at once."""

from typing import Any

from cluster.render.groups import Group
from cluster.render.pods import PodFacts, labels


def namespace(facts: PodFacts) -> dict[str, Any]:
    """Kubernetes itself refuses pods there that ask for more than ours do."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    metadata = {"name": facts.kubernetes.namespace, "labels": levels}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def disruption_budgets(facts: PodFacts, groups: tuple[Group, ...]) -> list[dict[str, Any]]:
    """One pod of a role at a time; the head is one pod and must not hold up the drain of its host."""
    kubernetes = facts.kubernetes
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": f"{kubernetes.name}-{group.role}",
                "namespace": kubernetes.namespace,
                "labels": labels(kubernetes),
            },
            "spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": labels(kubernetes, group.role)},
            },
        }
        for group in groups
        if group.role != "head"
    ]
