"""Every value of the Helm chart: its default, what it may be and what it does. tools/chart_reference.py writes the files from it.

A nested dict is a section; a leaf is a JSON schema with a description and a default. Keys and their spelling follow the values
that aiDAPTIVCache's inference chart has, where it has them.
"""

from typing import Any

Leaf = dict[str, Any]
QUANTITY = r"^([0-9]+(\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?)?$"
PATH = r"^/+[^/:][^:]*$"
NAME = r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$"
KEY = r"^[-._a-zA-Z0-9]+$"
CHARTS_LABELS = [
    *(f"app.kubernetes.io/{label}" for label in ("name", "instance", "version", "managed-by", "component")), "helm.sh/chart",
]  # fmt: skip
OTHER_SPELLING = "Other spelling of"  # how descriptions of keys begin that have no default of their own


def leaf(default: object, says: str, kind: str | list[str], **more: object) -> Leaf:
    return {"type": kind, "description": says, **more, "default": default}


def text(default: str, says: str, **more: object) -> Leaf:
    return leaf(default, says, "string", **more)


def one_of(default: str, says: str, *choices: str) -> Leaf:
    return leaf(default, says, "string", enum=list(choices))


def tag(default: str, says: str) -> Leaf:
    return leaf(default, says, ["string", "number"])  # a YAML author's 24.04 is a number


def quantity(default: str, says: str) -> Leaf:
    return text(default, says, pattern=QUANTITY)


def whole(default: int | None, says: str, least: int = 0, **more: object) -> Leaf:
    return leaf(default, says, ["integer", "null"] if default is None else "integer", minimum=least, **more)


def number(default: float | None, says: str, **more: object) -> Leaf:
    return leaf(default, says, ["number", "null"] if default is None else "number", **more)


def switch(default: bool | None, says: str) -> Leaf:
    return leaf(default, says, ["boolean", "null"] if default is None else "boolean")


def free(says: str, default: dict | None = None) -> Leaf:
    """A map of the user's own, of any keys."""
    return leaf(default or {}, says, "object", additionalProperties=True)


def texts(says: str, default: dict | None = None) -> Leaf:
    """A map of text, which Kubernetes takes no true and no 1 for."""
    return {**free(says, default), "additionalProperties": {"type": ["string", "null"]}}


def labels(says: str) -> Leaf:
    """Beside the chart's own, by which Services find their pods."""
    return {**texts(says), "propertyNames": {"not": {"enum": CHARTS_LABELS}}}


def resources(says: str) -> Leaf:
    amounts = {"type": ["object", "null"], "additionalProperties": True}
    return leaf({}, says, "object", additionalProperties=False, properties={
        "requests": amounts, "limits": amounts, "claims": {"type": "array", "items": {"type": "object"}},
    })  # fmt: skip


def strings(says: str, **of_items: object) -> Leaf:
    return leaf([], says, "array", items={"type": "string", **of_items})


def objects(says: str, default: list | None = None) -> Leaf:
    return leaf(default or [], says, "array", items={"type": "object"})


def other_spelling(of: str, kind: str, **more: object) -> Leaf:
    return {"type": [kind, "null"], "description": f"{OTHER_SPELLING} `{of}`.", **more}


def image(repository: str, image_tag: str, says: str, tag_says: str) -> dict[str, Leaf]:
    return {
        "repository": text(repository, says, minLength=1),
        "tag": tag(image_tag, tag_says),
        "pullPolicy": one_of("IfNotPresent", "When the kubelet pulls it.", "IfNotPresent", "Always", "Never"),
    }


def probe(period: int, failures: int, says: str) -> dict[str, Leaf]:
    return {
        "periodSeconds": whole(period, "Seconds between two.", 1),
        "failureThreshold": whole(failures, says, 1),
        "timeoutSeconds": whole(5, "Seconds until an answer counts as missing.", 1),
    }


def monitor(kind: str) -> dict[str, Leaf]:
    return {
        "enabled": switch(False, f"A {kind} for the Prometheus operator."),
        "interval": text("15s", "Between two scrapes.", pattern=r"^([0-9]+(ms|[smhd]))+$"),
        "labels": texts("Labels that your Prometheus selects by."),
    }


GB = "GB of 10^9 bytes, for each replica, all of its GPUs together"
ARGS = {
    "model": text("", "Path in the container, or a name on Hugging Face. It must be given.", pattern=r"^([^-\s].*)?$"),
    "servedModelName": leaf(
        "", "Name in requests; for a path by default its last part.", ["string", "array"], items={"type": "string"}
    ),
    "nvmePath": leaf(
        "/mnt/nvme0",
        "Where the cache's volume is mounted; a list of paths for several drives, one volume each.",
        ["string", "array"], pattern=PATH, items={"type": "string", "pattern": PATH}, minItems=1, uniqueItems=True,
    ),
    "port": whole(8000, "Port of vLLM in the container; probes and Service follow.", 1024, maximum=65535),
    "gpuMemoryUtilization": number(0.9, "Share of GPU memory for vLLM.", exclusiveMinimum=0, maximum=1),
    "maxModelLen": leaf(8192, "Longest sequence; null: what the model says.", ["integer", "null"], minimum=1),
    "tensorParallelSize": whole(1, "GPUs of each replica.", 1),
    "dramKvOffloadGb": number(None, f"Cap of the DRAM tier in {GB}; null is 0, off.", minimum=0),
    "ssdKvOffloadGb": number(
        None, f"Cap of the SSD tier in {GB}; null is 500, 0 is off, -1 80 % of what is free on the volume.", minimum=-1
    ),
    "noResumeKvCache": switch(False, "Start with an empty cache."),
    "resumeKvCache": switch(False, "Use what an earlier run left. This is what happens anyway."),
    "cleanObsoleteKvCache": switch(False, "Remove unused caches of other models from the volume."),
    "disableGpuReuse": switch(False, "Ignore prefixes that are still in GPU memory."),
    "disableLongToken": switch(False, "Keep blocks of prompts only."),
    "disableKvCache": switch(False, "Plain vLLM: nothing is offloaded and no volume is made."),
    "ssdAdmission": one_of("", "second-touch: write to the SSD only what a second request used.", "", "all", "second-touch"),
    "ssdWriteGbPerDay": number(None, "Budget of writes to the SSD.", exclusiveMinimum=0),
    "enableChunkedPrefill": switch(None, "vLLM's own switch; null: vLLM's default."),
    "enablePrefixCaching": switch(None, "vLLM's own switch; null: vLLM's default."),
    "enforceEager": switch(False, "Run without compiled graphs."),
    "extraArgs": strings("More arguments of `vllm serve`, one a word, for example `--max-num-seqs=64`."),
    "dramKVOffloadGb": other_spelling("dramKvOffloadGb", "number", minimum=0),
    "ssdKVOffloadGb": other_spelling("ssdKvOffloadGb", "number", minimum=-1),
    "noResumeKVCache": other_spelling("noResumeKvCache", "boolean"),
    "resumeKVCache": other_spelling("resumeKvCache", "boolean"),
    "cleanObsoleteKVCache": other_spelling("cleanObsoleteKvCache", "boolean"),
    "disableKVCache": other_spelling("disableKvCache", "boolean"),
}  # fmt: skip

VLLM = {
    "env": {
        "vllmUseV1": leaf(  # no enum of "1" and 1: to Helm 4 these are one and the same, twice
            "1", "Of old values files: there is no other engine.", ["string", "integer"], pattern="^1$", minimum=1, maximum=1
        ),
        "vllmWorkerMultiprocMethod": one_of("spawn", "How vLLM starts its workers.", "spawn", "fork"),
        "tiktokenEncodingsBase": text("", "Folder of tiktoken's encodings, where there is no network."),
    },
    "args": ARGS,
    "lora": {
        "enable": switch(False, "Serve LoRA adapters."),
        "modules": leaf(
            "", "Adapters at start, `name=path`: a list, or several in one text with spaces between.",
            ["string", "array"], items={"type": "string", "pattern": "^[^=]+=.+$"},
        ),
        "maxRank": leaf(32, "Greatest rank of an adapter.", "integer", enum=[1, 8, 16, 32, 64, 128, 256, 320, 512]),
        "runtimeUpdates": switch(False, "Adapters may be loaded and unloaded by requests; whoever can ask can then load."),
        "adapters": {
            "existingClaim": text("", "Claim with adapters, mounted read-only."),
            "path": text("/adapters", "Where it is mounted.", pattern=PATH),
        },
    },
}  # fmt: skip

KV_CACHE = {
    "type": one_of(
        "",
        "Volume of the SSD tier. Empty: devicePlugin where `resources` asks for `devicePluginResource`, else claimTemplate.",
        "", "claimTemplate", "ephemeral", "existingClaim", "hostPath", "emptyDir", "devicePlugin",
    ),
    "size": quantity("", "Of each volume. Empty: computed from the cap, with room for the file system."),
    "storageClassName": text("", "For claimTemplate and ephemeral; empty: the cluster's default."),
    "accessMode": one_of(
        "ReadWriteOnce", "Of the claims, also of the existing ones.", "ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"
    ),
    "annotations": texts("Of the claims."),
    "retention": {
        "whenDeleted": one_of("Delete", "What becomes of claims when the release is uninstalled.", "Delete", "Retain"),
        "whenScaled": one_of("Retain", "What becomes of claims when replicas are taken away.", "Delete", "Retain"),
    },
    "existingClaims": {**strings("For existingClaim: one for each nvmePath."), "uniqueItems": True},
    "hostPaths": {
        **strings("For hostPath: a folder of the node for each nvmePath, which must exist.", pattern=PATH), "uniqueItems": True,
    },
    "devicePluginResource": text("phison.com/ai100", "Resource whose device plugin mounts the drive at nvmePath by itself."),
    "fixPermissions": switch(False, "An init container (root, CAP_CHOWN) gives the volume to the server's user: for hostPath."),
}  # fmt: skip

POD = {
    "podAnnotations": texts("Of the pods."),
    "podLabels": labels("Of the pods."),
    "nodeSelector": texts("Nodes by their labels."),
    "tolerations": objects("Taints that the pods accept."),
    "affinity": free("Where pods go, beside what."),
    "topologySpreadConstraints": objects("How replicas are spread."),
    "priorityClassName": text("", "Priority of the pods."),
    "runtimeClassName": text("", "For example nvidia."),
    "podSecurityContext": free("Merged over: user, group and fsGroup 1000, not root, seccomp RuntimeDefault."),
    "securityContext": free("Of the main container, merged over: no new privileges, read-only root, no capabilities."),
    "extraEnv": objects("Environment variables."),
    "extraEnvFrom": objects("Sources of environment variables."),
    "extraVolumes": objects("Volumes of the pod."),
    "extraVolumeMounts": objects("Mounts of the main container."),
    "extraContainers": objects("Containers beside the main one."),
    "extraInitContainers": objects("Init containers, before the prescript."),
    "extraObjects": objects("Any other objects, as they are."),
}

SECRETS = {
    "huggingface": {
        "token": text("", "Token for gated models, put into a Secret."),
        "existingSecret": text("", "Secret that has it already."),
        "key": text("token", "Key in that Secret.", pattern=KEY),
    },
    "apiKey": {
        "value": text("", "Key that requests must carry, put into a Secret."),
        "generate": switch(False, "Draw one at the first install and keep it; not for tools that only render templates."),
        "existingSecret": text("", "Secret that has it already."),
        "key": text("api-key", "Key in that Secret.", pattern=KEY),
    },
}

NETWORK = {
    "service": {
        "type": one_of("NodePort", "NodePort opens the API on every node.", "NodePort", "ClusterIP", "LoadBalancer"),
        "port": whole(8000, "Port of the Service.", 1, maximum=65535),
        "targetPort": leaf(None, "Follows `vllm.args.port`; another number is refused.", ["integer", "null"]),
        "nodePort": whole(None, "A fixed port on every node.", 1, maximum=65535),
        "annotations": texts("Of the Service."),
    },
    "ingress": {
        "enabled": switch(False, "An Ingress."),
        "className": text("", "IngressClass."),
        "annotations": texts("For example the controller's time-outs: answers take long."),
        "hosts": strings("Names of hosts."),
        "tls": objects("Secrets with certificates, and their hosts."),
    },
    "httpRoute": {
        "enabled": switch(False, "An HTTPRoute of the Gateway API."),
        "annotations": texts("Of the route."),
        "parentRefs": objects("Gateways."),
        "hostnames": strings("Names of hosts."),
    },
    "networkPolicy": {
        "enabled": switch(False, "A NetworkPolicy."),
        "from": objects("Who may reach the API and /metrics, as a Prometheus elsewhere; none: pods of the same namespace."),
        "egress": objects(
            "What the pods may reach beside DNS; a prescript that mounts NFS needs port 2049.",
            [{"ports": [{"port": 443, "protocol": "TCP"}]}],
        ),
    },
}

SCALING = {
    "autoscaling": {
        "minReplicas": whole(1, "At least.", 1),
        "maxReplicas": whole(4, "At most.", 1),
        "scaleDownSeconds": whole(600, "How long it stays quiet before a replica is taken away: its cache goes cold."),
        "hpa": {
            "enabled": switch(False, "A HorizontalPodAutoscaler on a metric of the pods, which an adapter must offer."),
            "metric": text("vllm_num_requests_waiting", "Name that the adapter gives it.", minLength=1),
            "target": leaf("5", "Average for each replica.", ["string", "integer"]),
        },
        "keda": {
            "enabled": switch(False, "A KEDA ScaledObject that asks a Prometheus."),
            "serverAddress": text("http://prometheus-operated.monitoring:9090", "The Prometheus."),
            "query": text("", "Empty: requests that wait, summed over this release's pods."),
            "threshold": leaf("5", "Average for each replica.", ["string", "integer"]),
        },
    },
    "podDisruptionBudget": {
        "enabled": switch(False, "A PodDisruptionBudget."),
        "maxUnavailable": leaf(1, "Replicas that may be away at once.", ["integer", "string"], minimum=0, pattern="^[0-9]+%$"),
    },
}

MONITORING = {
    "metrics": {
        "serviceMonitor": monitor("ServiceMonitor"),
        "podMonitor": monitor("PodMonitor"),
        "prometheusRule": {
            "enabled": switch(False, "The alert rules of docs/monitoring, for the Prometheus operator."),
            "labels": texts("Labels that your Prometheus selects by."),
        },
        "dashboard": {
            "enabled": switch(False, "The Grafana dashboard of docs/monitoring, in a ConfigMap."),
            "labels": texts("Labels that Grafana's sidecar selects by.", {"grafana_dashboard": "1"}),
        },
    },
}

VALUES: dict[str, Any] = {
    "image": image("ghcr.io/kvoffload/kvoffload", "", "Image with kvoffload and vLLM.", "Or a digest; empty: the appVersion."),
    "imagePullSecrets": objects("Secrets for a private registry."),
    "deployment": {
        "name": text(
            "",
            "Name of the workload and all that belongs to it; empty: RELEASE-kvoffload-inference, or the release's if that "
            "says kvoffload-inference.",
            maxLength=50,
            pattern=NAME,
        ),
        "replicas": whole(1, "Pods, each with GPUs and a cache of its own."),
        "kind": one_of(
            "", "Empty: StatefulSet where a pod must find its volume again, else Deployment.", "", "StatefulSet", "Deployment"
        ),
    },
    "schedulerName": text("", "For example hami-scheduler; empty: the cluster's default."),
    "initContainer": {
        "enabled": switch(True, "Run the prescript, if there is one."),
        "image": image("ubuntu", "24.04", "Image that the prescript runs in.", "Its tag."),
        "sharedDataPath": text("/data", "Folder that the prescript fills and the server sees.", pattern=PATH),
        "privileged": switch(True, "Run the prescript as privileged root, to mount things; false: as the server's user."),
        "resources": resources("Requests and limits of the chart's init containers."),
    },
    "prescript": text("", "Shell script that an init container runs before the server starts."),
    "postscript": text("", "Shell script that runs in the server's container when it is stopped, before it gets SIGTERM."),
    "vllm": VLLM,
    "kvCache": KV_CACHE,
    "volumes": {
        "dshm": {
            "enabled": switch(True, "/dev/shm in memory, for vLLM's processes and NCCL."),
            "sizeLimit": quantity("", "Empty: 8Gi, and 2Gi for each further GPU."),
        },
        "sharedData": {
            "existingClaim": text("", "Claim for sharedDataPath; empty: an emptyDir."),
            "sizeLimit": quantity("", "Of the emptyDir."),
        },
        "home": {
            "existingClaim": text("", "Claim for HOME, where models are downloaded to and kernels are cached; empty: an emptyDir."),
            "sizeLimit": quantity("", "Of the emptyDir."),
        },
        "tmp": {"sizeLimit": quantity("", "Of the emptyDir at /tmp.")},
    },
    "modelImage": {
        "reference": text("", "OCI image with the model, mounted read-only. From Kubernetes 1.31 on; a feature gate until 1.35."),
        "pullPolicy": one_of("IfNotPresent", "When the kubelet pulls it.", "IfNotPresent", "Always", "Never"),
        "mountPath": text("/model", "Where it is mounted.", pattern=PATH),
    },
    "resources": resources("Requests and limits. GPUs and memory are added where they are not named."),
    "gpuResource": text("nvidia.com/gpu", "Asked for, tensorParallelSize times, where `resources` names no GPU; empty: nothing."),
    "resourceClaims": objects("DRA claims of the pod; the main container gets all of them. From Kubernetes 1.31 on."),
    "hostMemory": {
        "base": quantity("8Gi", "Memory of vLLM's own, of what is added to `resources`."),
        "perGpu": quantity("8Gi", "The same for each GPU's worker."),
        "limit": switch(True, "Also as the limit; false: only the request."),
    },
    "shutdown": {
        "preStopSeconds": whole(15, "Wait before SIGTERM, until load balancers send nothing any more."),
        "postscriptSeconds": whole(30, "What the postscript may take, if there is one; then it is ended.", 1),
        "drainSeconds": whole(60, "What requests in flight get to end."),
        "flushSeconds": whole(5, "What the journal gets to reach the disk: vLLM's one `--shutdown-timeout` is the sum of both.", 3),
        "gracePeriodSeconds": whole(None, "Empty: the sum of these, and 10."),
    },
    "probes": {
        "startup": probe(10, 180, "Failures until the pod is started again: the time that loading a model may take."),
        "readiness": probe(5, 3, "Failures until requests go elsewhere."),
        "liveness": probe(10, 6, "Failures until the container is started again."),
    },
    "serviceAccount": {
        "create": switch(True, "A ServiceAccount, whose token is never mounted."),
        "name": text("", "Empty: the workload's name, or default where none is created."),
        "annotations": texts("Of the ServiceAccount."),
    },
    **SECRETS,
    **NETWORK,
    **SCALING,
    **MONITORING,
    **POD,
    "test": {
        "enabled": switch(True, "The pod of `helm test`."),
        "pushOutTokens": whole(500000, "Prompt tokens that it may send to push its prompt out of GPU memory."),
        "timeoutSeconds": whole(600, "What all of it may take.", 1),
    },
}  # fmt: skip
