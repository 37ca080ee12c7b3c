"""What the chart refuses: keys that nobody reads, and values that contradict each other, each with one sentence."""

import copy
import functools
import json
import math

import jsonschema
import pytest
import yaml
from typer.main import get_command

from kvoffload.cli import app
from kvoffload.layout import free_floor
from tests.chart.rendering import CHART, ci, helm, merged, refusal, render, tree, with_model
from tools import chart_reference

MISSPELT = [
    "vllm__args__dramKvOffloadGB", "vllm__args__ssdKvoffloadGb", "vllm__args__resumeKvcache", "vllm__args__nvme_path",
    "vllm__args__maxModelLength", "vllm__args__tensorParallel", "vllm__arg", "vllm__env__vllmUseV2", "vllm__lora__enabled",
    "vllm__lora__module", "vllm__waiting", "deployment__replica", "deployment__Name", "image__repo", "initContainer__enable",
    "initContainer__image__pullpolicy", "preScript", "postScript", "scheduler", "service__nodeport", "service__targetport",
    "volumes__dshm__size", "volumes__shm", "resource", "kvCache__sizes", "shutdown__graceSeconds", "probes__startup__path",
    "metrics__serviceMonitor__enable", "autoscaling__hpa__min", "networkPolicy__ingress", "apiKey__secret", "test__enable",
]  # fmt: skip
CLAIMS = tree(kvCache__type="existingClaim", kvCache__existingClaims=["cache"])

# Values beside a model, and words of the sentence.
CONTRADICTIONS = [
    (tree(vllm__args__resumeKvCache=True, vllm__args__noResumeKvCache=True), "contradict each other"),
    (tree(vllm__args__resumeKVCache=True, vllm__args__noResumeKvCache=True), "contradict each other"),
    (tree(vllm__args__ssdKvOffloadGb=5, vllm__args__ssdKVOffloadGb=6), "ssdKVOffloadGb is 6: they are one setting"),
    (tree(vllm__args__dramKvOffloadGb=0, vllm__args__dramKVOffloadGb=6), "dramKvOffloadGb is 0 and vllm.args.dramKVOffloadGb is 6"),
    (tree(vllm__args__ssdKvOffloadGb=-0.5), "-1 (what is free)"),
    (tree(vllm__args__extraArgs=["--data-parallel-size=4"]), "name in resources.limits how many nvidia.com/gpu"),
    (tree(vllm__args__ssdKvOffloadGb=0, vllm__args__ssdAdmission="all"), "there is no SSD tier"),
    (tree(vllm__args__disableKvCache=True, vllm__args__ssdWriteGbPerDay=5), "there is no SSD tier"),
    (tree(vllm__args__port=9000, service__targetPort=8000), "service.targetPort is 8000 and vllm.args.port is 9000"),
    (tree(service__type="ClusterIP", service__nodePort=30299), "leave nodePort out"),
    (tree(vllm__args__extraArgs=["--port=9000"]), "--port=9000, which the chart sets"),
    (tree(vllm__args__extraArgs=["--shutdown_timeout", "1"]), "which the chart sets"),
    (tree(vllm__args__extraArgs=["-tp", "2"]), "which the chart sets"),
    (tree(vllm__args__extraArgs=["--dram-kv-offload-gb=200"]), "which the chart sets"),
    (tree(vllm__args__nvmePath="/tmp/"), "two volumes, tmp and kv-cache-0, would be mounted at /tmp"),
    (tree(vllm__args__nvmePath=["/a", "/b/../a"]), "two volumes, kv-cache-0 and kv-cache-1, would be mounted at /a"),
    (tree(extraVolumeMounts=[{"name": "mine", "mountPath": "/data"}]), "shared-data and mine, would be mounted at /data"),
    (tree(kvCache__existingClaims=["mine"]), "kvCache.existingClaims is given but kvCache.type is claimTemplate"),
    (tree(kvCache__hostPaths=["/mine"], kvCache__type="emptyDir"), "kvCache.hostPaths is given but kvCache.type is emptyDir"),
    (tree(extraEnv=[{"name": "HOME", "value": "/x"}]), "extraEnv has HOME, which the chart has already"),
    (tree(extraVolumes=[{"name": "tmp", "emptyDir": {}}]), "extraVolumes has tmp, which the chart has already"),
    (tree(podSecurityContext__runAsUser=0), "no container would start"),
    (tree(vllm__lora__runtimeUpdates=True), "vllm.lora.enable is not: set it, too"),
    (tree(vllm__lora__enable=True), "names no adapter"),
    (tree(vllm__lora__enable=True, vllm__lora__modules=" "), "names no adapter"),
    (tree(vllm__lora__enable=True, vllm__lora__modules="a=/a /b"), "vllm.lora.modules has /b"),
    (tree(resources__limits={"nvidia.com/gpu": 2}), "limits name 2 GPUs and vllm.args.tensorParallelSize is 1"),
    (tree(resources__requests={"otterscale.com/vgpu": 1}, vllm__args__tensorParallelSize=2), "requests name 1 GPUs"),
    (tree(resources__limits={"nvidia.com/gpu": 0}), "limits name 0 GPUs"),
    (tree(resources__limits={"nvidia.com/gpu": 0.5}), "limits name 0.5 GPUs"),
    (tree(resources__requests={"nvidia.com/gpu": 1}), "resources.limits has not"),
    (tree(resources=tree(requests={"x.com/ssd": 2}, limits={"x.com/ssd": 1})), "resources.requests has x.com/ssd: 2"),
    (tree(resources__limits={"nvidia.com/mig-1g.10gb": 3}), "limits name 3 GPUs"),
    (tree(resources__limits={"example.com/gpu": "2"}, gpuResource="example.com/gpu"), "limits name 2 GPUs"),
    (tree(kvCache__size="400Gi"), "more than kvCache.size 400Gi"),
    (tree(kvCache__size="500G"), "more than kvCache.size 500G"),  # a file system holds less than its size
    (tree(kvCache__size="300Gi", vllm__args__nvmePath=["/a", "/b"], vllm__args__ssdKvOffloadGb=700), "leaves on 2 of them"),
    (merged(CLAIMS, tree(deployment__replicas=2, kvCache__accessMode="ReadWriteMany", kvCache__size="600Gi")), "for 2 replica(s)"),
    (tree(vllm__args__ssdKvOffloadGb=-1), "say by kvCache.size"),
    (tree(vllm__args__ssdKvOffloadGb=-1, kvCache__type="emptyDir", kvCache__size="9Gi"), "is evicted"),
    (tree(vllm__args__dramKvOffloadGb=64, resources__limits={"memory": "59Gi"}), "is 59Gi but the cache alone takes 60Gi"),
    (tree(vllm__args__dramKVOffloadGb=64, resources__requests={"memory": 6e10}), "requests.memory is 6e+10"),
    (tree(resources__limits={"memory": "2Gi"}), "the cache alone takes 3Gi"),
    (tree(resources__limits={"memory": "lots"}), "not an amount that this chart understands"),
    (tree(shutdown__gracePeriodSeconds=79), "is 79 but waiting, postscript, drain and flush take 80"),
    (tree(shutdown__gracePeriodSeconds=80, postscript="true"), "is 80 but waiting, postscript, drain and flush take 110"),
    (merged(CLAIMS, tree(deployment__replicas=2)), "a claim that is ReadWriteOnce serves one node or pod"),
    (merged(CLAIMS, tree(autoscaling__hpa__enabled=True)), "and not several replicas"),
    (tree(kvCache__type="existingClaim"), "kvCache.existingClaims names 0 and vllm.args.nvmePath 1"),
    (tree(kvCache__type="hostPath", kvCache__hostPaths=["/a"], vllm__args__nvmePath=["/a", "/b"]), "hostPaths names 1"),
    (tree(deployment__kind="Deployment"), "needs deployment.kind StatefulSet"),
    (
        tree(deployment={"kind": "Deployment", "replicas": 2}, kvCache={"type": "hostPath", "hostPaths": ["/a"]}),
        "would use the same folder",
    ),
    (tree(kvCache__fixPermissions=True, kvCache__type="devicePlugin"), "the chart mounts no volume"),
    (tree(autoscaling={"hpa": {"enabled": True}, "keda": {"enabled": True}}), "enable one of them"),
    (tree(autoscaling={"minReplicas": 5}), "less than autoscaling.minReplicas"),
    (tree(metrics={"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}), "count everything twice"),
    (tree(ingress__enabled=True), "name a host"),
    (tree(httpRoute__enabled=True), "name a Gateway"),
]
WRONG = [
    tree(vllm__args__port="8000"), tree(vllm__args__port=80), tree(vllm__args__gpuMemoryUtilization=1.5),
    tree(vllm__args__model="--help"), tree(vllm__args__nvmePath="mnt"), tree(vllm__args__nvmePath=["/a", "/a"]),
    tree(vllm__args__nvmePath=[]), tree(vllm__args__ssdKvOffloadGb="500"), tree(vllm__args__dramKvOffloadGb=-1),
    tree(vllm__args__enforceEager="yes"), tree(vllm__env__vllmUseV1="0"), tree(vllm__env__vllmWorkerMultiprocMethod="thread"),
    tree(vllm__lora__maxRank=33), tree(vllm__lora__modules=["/path"]), tree(service__type="Node"), tree(image__pullPolicy="always"),
    tree(kvCache__type="nfs"), tree(kvCache__size="lots"), tree(kvCache__accessMode="ReadOnlyMany"),
    tree(volumes__dshm__sizeLimit="30GB"), tree(deployment__replicas=-1),
    tree(deployment__name="My Name"), tree(deployment__name="n" * 51),
    tree(kvCache__hostPaths=["srv"]), tree(kvCache__existingClaims=["a", "a"]), tree(vllm__args__nvmePath="//"),
    tree(podAnnotations={"prometheus.io/scrape": True}), tree(nodeSelector={"gpu": 1}), tree(service__annotations={"a": 1}),
    tree(podDisruptionBudget__maxUnavailable="one"), tree(metrics__podMonitor__interval="15"),
    tree(apiKey__key="a/b"), tree(huggingface__key=""),
    tree(resources__limit={"cpu": 1}), tree(initContainer__resources__cpu=1), tree(resources__limits=["cpu"]),
    tree(podLabels={"app.kubernetes.io/component": "mine"}), tree(podLabels={"app.kubernetes.io/instance": "mine"}),
    tree(shutdown__drainSeconds=-1), tree(resources=[]), tree(extraEnv={"A": "b"}),
]  # fmt: skip


@pytest.mark.parametrize("path", MISSPELT)
def test_a_key_that_nobody_reads_is_refused_by_its_name(path):
    said = refusal(merged(with_model(), tree(**{path: {}})))
    assert "schema" in said and path.split("__")[-1] in said


@pytest.mark.parametrize(("values", "says"), CONTRADICTIONS, ids=[says for _, says in CONTRADICTIONS])
def test_values_that_contradict_each_other_are_refused_in_one_sentence(values, says):
    said = refusal(merged(with_model(), values))
    sentence = [line for line in said.splitlines() if "execution error" in line]
    assert len(sentence) == 1 and says in sentence[0]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_a_value_of_the_wrong_kind_or_range_is_refused_by_the_schema(values):
    assert "schema" in refusal(merged(with_model(), values))


@pytest.mark.parametrize(
    "values",
    [
        tree(service__targetPort=8000),
        tree(vllm__args__ssdKvOffloadGb=6, vllm__args__ssdKVOffloadGb=6),
        tree(resources__limits={"nvidia.com/gpu": "1"}),
        tree(kvCache__size="476Gi"),
        tree(shutdown__gracePeriodSeconds=80),
        tree(vllm__lora__enable=True, vllm__lora__runtimeUpdates=True),
        tree(gpuResource="", vllm__args__tensorParallelSize=2),
        tree(podSecurityContext=tree(runAsUser=0, runAsNonRoot=False)),
        tree(podSecurityContext=tree(runAsUser=None, runAsGroup=None, fsGroup=None)),
        tree(podLabels={"app.kubernetes.io/part-of": "mine"}),
        tree(resources=tree(limits={"nvidia.com/gpu": 1}, requests={"nvidia.com/gpu": "1"})),
        tree(vllm__args__ssdKVOffloadGb=None, vllm__args__resumeKVCache=None),
        tree(resources__limits={"nvidia.com/gpu": 4}, vllm__args=tree(tensorParallelSize=2, extraArgs=["--data-parallel-size=2"])),
        tree(image__tag=24.04),
        tree(vllm__env__vllmUseV1=1),
    ],
    ids=str,
)
def test_what_is_just_right_is_not_refused(values):
    assert render(merged(with_model(), values)).container


def test_every_option_of_serve_is_refused_among_the_extra_arguments():
    for option in {option for parameter in get_command(app).commands["serve"].params for option in parameter.opts} - {"--help"}:
        assert f"extraArgs has {option}, which the chart sets" in refusal(with_model(vllm__args__extraArgs=[option]))


def test_a_null_is_refused_by_the_name_of_its_key_or_means_the_default():
    own = {("vllm", "args", "model"), ("vllm", "args", "maxModelLen")}  # has a refusal of its own; null is what the model says
    nulls = [path for path, entry in chart_reference.leaves() if "default" in entry and path not in own]
    schema = jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    taken, empty = [], with_model()
    for path in nulls:
        left = copy.deepcopy(defaults)
        functools.reduce(dict.get, path[:-1], left).pop(path[-1])
        said = [error.message for error in schema.iter_errors(left)]
        assert said in ([], [f"{path[-1]!r} is a required property"])
        if not said:
            taken.append(path)
            empty = merged(empty, tree(**{"__".join(path): None}))
    assert len(nulls) > len(taken) > 30
    assert render(empty).objects == render(with_model()).objects
    assert "--max-model-len" not in str(render(with_model(vllm__args__maxModelLen=None)).objects)
    assert "port is required" in refusal(with_model(vllm__args__port=None))
    assert "deployment is required" in refusal(with_model(deployment=None))


@pytest.mark.parametrize("release", ["7b", "a.b"])
def test_a_release_whose_name_no_service_can_have_is_told_to_name_its_deployment(release):
    refused = helm("template", release, CHART, "--set", "vllm.args.model=m")
    assert refused.returncode != 0 and f"a Service cannot be called {release}-kvoffload-inference: give" in refused.stderr
    assert helm("template", release, CHART, "--set", "vllm.args.model=m,deployment.name=llm").returncode == 0


@pytest.mark.parametrize("gib", [10, 400, 4096])
def test_a_cap_fits_a_volume_exactly_when_the_engine_would_find_the_room(gib):
    room = (gib * 2**30 - free_floor(gib * 2**30)) / 1e9
    sized = tree(kvCache__size=f"{gib}Gi", vllm__args__ssdKvOffloadGb=math.floor(room))
    assert render(merged(with_model(), sized)).workload
    sized = tree(kvCache__size=f"{gib}Gi", vllm__args__ssdKvOffloadGb=math.ceil(room))
    assert f"more than kvCache.size {gib}Gi" in refusal(merged(with_model(), sized))


def test_the_examples_of_the_seed_are_refused_with_a_typo_in_them():
    typo = merged(ci("seed-basic"), tree(vllm__args__ssdKvOffloadGB=500))
    assert "ssdKvOffloadGB" in refusal(typo)


def test_the_linter_refuses_too(tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text("vllm: {args: {model: m, dramKvOffloadGB: 1}}")
    assert helm("lint", "--strict", CHART, "-f", values).returncode != 0
