"""What a Kubernetes cluster would hold, and what it would say of it.

Nothing runs. What a controller or a kubelet would report is made up as soon as an object is written: workloads are ready, claims
bound, jobs and pods have succeeded, or failed where `Cluster.pods_succeed` is false. Whether objects are valid is asked elsewhere;
here only those changes of a StatefulSet are refused that Kubernetes refuses too.
"""

from dataclasses import dataclass, field

NAMESPACED, OF_THE_CLUSTER = True, False
KINDS = {
    "v1": {
        "Namespace": ("namespaces", OF_THE_CLUSTER),
        "Secret": ("secrets", NAMESPACED),
        "ConfigMap": ("configmaps", NAMESPACED),
        "Service": ("services", NAMESPACED),
        "ServiceAccount": ("serviceaccounts", NAMESPACED),
        "PersistentVolumeClaim": ("persistentvolumeclaims", NAMESPACED),
        "Pod": ("pods", NAMESPACED),
    },
    "apps/v1": {
        "StatefulSet": ("statefulsets", NAMESPACED),
        "Deployment": ("deployments", NAMESPACED),
        "ReplicaSet": ("replicasets", NAMESPACED),
    },
    "batch/v1": {"Job": ("jobs", NAMESPACED)},
    "autoscaling/v2": {"HorizontalPodAutoscaler": ("horizontalpodautoscalers", NAMESPACED)},
    "policy/v1": {"PodDisruptionBudget": ("poddisruptionbudgets", NAMESPACED)},
    "networking.k8s.io/v1": {"Ingress": ("ingresses", NAMESPACED), "NetworkPolicy": ("networkpolicies", NAMESPACED)},
    "monitoring.coreos.com/v1": {
        "ServiceMonitor": ("servicemonitors", NAMESPACED),
        "PodMonitor": ("podmonitors", NAMESPACED),
        "PrometheusRule": ("prometheusrules", NAMESPACED),
    },
}
PLURALS = {plural: (version, kind) for version, kinds in KINDS.items() for kind, (plural, _) in kinds.items()}
MAY_CHANGE = {"replicas", "ordinals", "template", "updateStrategy", "persistentVolumeClaimRetentionPolicy", "minReadySeconds"}
NOW = "2026-01-01T00:00:00Z"


class Refused(Exception):
    """A request that ends with a Status."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.code = code
        about = {"reason": reason, "message": message, "code": code}
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", **about}


@dataclass
class Cluster:
    """Objects by (plural, namespace, name)."""

    version: str = "v1.31.0"
    pods_succeed: bool = True
    objects: dict[tuple[str, str, str], dict] = field(default_factory=dict)
    writes: int = 0

    def find(self, plural: str, namespace: str, name: str) -> dict:
        try:
            return self.objects[plural, namespace, name]
        except KeyError:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found') from None

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, _, name in self.objects if kind == plural)

    def matching(self, plural: str, namespace: str | None, query: dict[str, str]) -> list[dict]:
        wanted = [term.split("=", 1) for term in query.get("labelSelector", "").replace("==", "=").split(",") if "=" in term]
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        return [
            found
            for (kind, where, called), found in sorted(self.objects.items())
            if kind == plural
            and namespace in (None, where)
            and name in ("", called)
            and all(found["metadata"].get("labels", {}).get(label) == value for label, value in wanted)
        ]

    def create(self, plural: str, namespace: str, made: dict) -> dict:
        name = made["metadata"]["name"]
        if (plural, namespace, name) in self.objects:
            raise Refused(409, "AlreadyExists", f'{plural} "{name}" already exists')
        return self.write(plural, namespace, made)

    def write(self, plural: str, namespace: str, made: dict) -> dict:
        version, kind = PLURALS[plural]
        old = self.objects.get((plural, namespace, made["metadata"]["name"]))
        if kind == "StatefulSet":
            for template in made["spec"].get("volumeClaimTemplates", []):
                asked = template["spec"]["resources"]["requests"]
                asked["storage"] = canonical(asked["storage"])
        if kind == "StatefulSet" and old:
            refuse_changes(old["spec"], made["spec"])
        self.writes += 1
        generation = old["metadata"]["generation"] + (old.get("spec") != made.get("spec")) if old else 1
        uid = old["metadata"]["uid"] if old else f"00000000-0000-0000-0000-{self.writes:012}"
        where = {"namespace": namespace} if namespace else {}
        about = {"uid": uid, "generation": generation, "resourceVersion": str(self.writes), "creationTimestamp": NOW, **where}
        made = {**made, "apiVersion": version, "kind": kind, "metadata": {**made["metadata"], **about}}
        self.objects[plural, namespace, made["metadata"]["name"]] = made
        if kind in CONTROLLERS:
            CONTROLLERS[kind](self, made)
        return made

    def delete(self, plural: str, namespace: str, name: str) -> dict:
        gone = self.find(plural, namespace, name)
        del self.objects[plural, namespace, name]
        for key, other in list(self.objects.items()):
            owners = other["metadata"].get("ownerReferences", [])
            if key in self.objects and any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.delete(*key)
        return gone


def owned_by(owner: dict) -> list[dict]:
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
    return [{**reference, "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}]


def ready(made: dict) -> dict:
    """The status of a workload whose pods are all there."""
    counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas", "availableReplicas"), made["spec"]["replicas"])
    return {**counts, "observedGeneration": made["metadata"]["generation"]}


def canonical(size: str) -> str:
    """As Kubernetes writes back a whole number of a binary unit: 1024Gi is 1Ti."""
    units = ["Mi", "Gi", "Ti", "Pi"]
    number, unit = size[:-2], size[-2:]
    while unit in units[:-1] and number.isdigit() and int(number) % 1024 == 0:
        number, unit = str(int(number) // 1024), units[units.index(unit) + 1]
    return number + unit


def refuse_changes(old: dict, new: dict) -> None:
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - MAY_CHANGE
    if changed:
        others = f"updates to statefulset spec for fields other than {', '.join(sorted(MAY_CHANGE))} are forbidden"
        raise Refused(422, "Invalid", f"{others}: {', '.join(sorted(changed))}")


def stateful_set(cluster: Cluster, made: dict) -> None:
    """Claims stay when it is deleted, unless its policy makes them its own."""
    spec, about = made["spec"], made["metadata"]
    spec.setdefault("replicas", 1)
    spec.setdefault("updateStrategy", {"type": "RollingUpdate"})
    revision = f"{about['name']}-{about['generation']}"
    revisions = {"currentRevision": revision, "updateRevision": revision}
    made["status"] = {**ready(made), **revisions, "currentReplicas": spec["replicas"]}
    deleted = spec.get("persistentVolumeClaimRetentionPolicy", {}).get("whenDeleted") == "Delete"
    for template in spec.get("volumeClaimTemplates", []):
        for number in range(spec["replicas"]):
            owners = {"ownerReferences": owned_by(made)} if deleted else {}
            of_claim = {**template["metadata"], "name": f"{template['metadata']['name']}-{about['name']}-{number}", **owners}
            cluster.write("persistentvolumeclaims", about["namespace"], {"metadata": of_claim, "spec": template["spec"]})


def deployment(cluster: Cluster, made: dict) -> None:
    """Helm looks for the replica set with this template."""
    spec, about = made["spec"], made["metadata"]
    spec.setdefault("replicas", 1)
    made["status"] = ready(made)
    of_set = {
        "name": f"{about['name']}-{about['generation']}",
        "labels": spec["template"]["metadata"]["labels"],
        "ownerReferences": owned_by(made),
    }
    of_pods = {key: spec[key] for key in ("replicas", "selector", "template")}
    cluster.write("replicasets", about["namespace"], {"metadata": of_set, "spec": of_pods})


def replica_set(_: Cluster, made: dict) -> None:
    made["status"] = ready(made)


def pod(cluster: Cluster, made: dict) -> None:
    code = 0 if cluster.pods_succeed else 1
    ended = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
    containers = [{"name": each["name"], "ready": False, "state": ended} for each in made["spec"]["containers"]]
    made["status"] = {"phase": "Failed" if code else "Succeeded", "startTime": NOW, "containerStatuses": containers}


def job(_: Cluster, made: dict) -> None:
    made["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}


def claim(_: Cluster, made: dict) -> None:
    made["status"] = {"phase": "Bound", "capacity": made["spec"]["resources"]["requests"]}


def service(_: Cluster, made: dict) -> None:
    made["spec"].setdefault("clusterIP", "10.96.0.10")
    if made["spec"].get("type") in ("NodePort", "LoadBalancer"):
        for number, port in enumerate(made["spec"]["ports"]):
            port.setdefault("nodePort", 30000 + number)
    if made["spec"].get("type") == "LoadBalancer":
        made["status"] = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}


CONTROLLERS = {
    "StatefulSet": stateful_set,
    "Deployment": deployment,
    "ReplicaSet": replica_set,
    "Pod": pod,
    "Job": job,
    "PersistentVolumeClaim": claim,
    "Service": service,
}
