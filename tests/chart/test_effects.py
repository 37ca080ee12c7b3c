"""Each key of the seed's chart, and each of ours, has the effect that its description promises."""

import json
import re
import subprocess

import pytest

from kvoffload.layout import BOUNCE_BYTES, free_floor
from kvoffload.store.opening import CLOSE_SECONDS
from tests.chart.rendering import ci, merged, render, tree, with_model
from tests.patience import PATIENCE_S
from tools.chart_values import VALUES


def rendered(**dotted: object):
    return render(with_model(**dotted))


def follows(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


# Of vllm.args, each key in each spelling: a value, and the words that it adds to the command.
FLAGS = [
    ("gpuMemoryUtilization", 0.85, ["--gpu-memory-utilization", "0.85"]),
    ("maxModelLen", 1000000, ["--max-model-len", "1000000"]),
    ("tensorParallelSize", 4, ["--tensor-parallel-size", "4"]),
    ("port", 9000, ["--port", "9000"]),
    ("nvmePath", "/mnt/x", ["--nvme-path", "/mnt/x"]),
    ("nvmePath", ["/a", "/b"], ["--nvme-path", "/a", "--nvme-path", "/b"]),
    ("dramKvOffloadGb", 0.5, ["--dram-kv-offload-gb", "0.5"]),
    ("dramKVOffloadGb", 64, ["--dram-kv-offload-gb", "64"]),
    ("ssdKvOffloadGb", 123, ["--ssd-kv-offload-gb", "123"]),
    ("ssdKVOffloadGb", 0, ["--ssd-kv-offload-gb", "0"]),
    ("noResumeKvCache", True, ["--no-resume-kv-cache"]),
    ("noResumeKVCache", True, ["--no-resume-kv-cache"]),
    ("resumeKvCache", True, ["--resume-kv-cache"]),
    ("resumeKVCache", True, ["--resume-kv-cache"]),
    ("cleanObsoleteKvCache", True, ["--clean-obsolete-kv-cache"]),
    ("cleanObsoleteKVCache", True, ["--clean-obsolete-kv-cache"]),
    ("disableGpuReuse", True, ["--disable-gpu-reuse"]),
    ("disableLongToken", True, ["--disable-long-token"]),
    ("disableKvCache", True, ["--disable-kv-cache"]),
    ("disableKVCache", True, ["--disable-kv-cache"]),
    ("ssdAdmission", "second-touch", ["--ssd-admission", "second-touch"]),
    ("ssdWriteGbPerDay", 400, ["--ssd-write-gb-per-day", "400"]),
    ("enableChunkedPrefill", True, ["--enable-chunked-prefill"]),
    ("enableChunkedPrefill", False, ["--no-enable-chunked-prefill"]),
    ("enablePrefixCaching", True, ["--enable-prefix-caching"]),
    ("enablePrefixCaching", False, ["--no-enable-prefix-caching"]),
    ("enforceEager", True, ["--enforce-eager"]),
    ("servedModelName", "other", ["--served-model-name", "other"]),
    ("servedModelName", ["one", "two"], ["--served-model-name", "one", "two"]),
    ("extraArgs", ["--max-num-seqs=64", "a b"], ["--max-num-seqs=64", "a b"]),
]


@pytest.mark.parametrize(("key", "value", "words"), FLAGS, ids=[f"{key}={value}" for key, value, _ in FLAGS])
def test_a_key_of_the_arguments_reaches_the_command(key, value, words):
    command = rendered(**{f"vllm__args__{key}": value}).command
    places = [place for place in range(len(command)) if command[place : place + len(words)] == words]
    assert len(places) == 1, command
    if value is True:
        off = rendered(**{f"vllm__args__{key}": False}).command
        assert not set(words) & set(off)


def test_every_key_of_the_arguments_is_in_the_table_above():
    assert {key for key, _, _ in FLAGS} | {"model"} == set(VALUES["vllm"]["args"])


def test_without_settings_the_command_holds_the_seeds_sizes_and_resumes():
    command = rendered().command
    assert command[:3] == ["kvoffload", "serve", "/data/model/llama"]
    assert follows(command, "--ssd-kv-offload-gb") == "500" and follows(command, "--dram-kv-offload-gb") == "0"
    assert follows(command, "--nvme-path") == "/mnt/nvme0" and follows(command, "--max-model-len") == "8192"
    assert not {word for word in command if "resume" in word or "prefill" in word or "prefix" in word}


@pytest.mark.parametrize(("model", "name"), [("/data/model/Llama-3/", "Llama-3"), ("/m/x", "x"), ("org/model", "org/model")])
def test_a_path_is_served_under_its_last_part(model, name):
    assert follows(rendered(vllm__args__model=model).command, "--served-model-name") == name


@pytest.mark.parametrize("text", ["; touch /pwned", "$(id) $HOME `id`", "'\" $(POD_NAME) $$", "x\nkind: Secret", "{{ .Values }}"])
def test_no_shell_and_no_template_and_no_kubelet_reads_a_value(text):
    model = "/" + text.replace("\n", " ")
    found = rendered(vllm__args=tree(model=model, extraArgs=["--chat-template", text]), vllm__env__tiktokenEncodingsBase=text)
    assert found.command[2] == model and found.command[-1] == text
    assert found.environment["TIKTOKEN_ENCODINGS_BASE"] == text
    assert "$(" not in found.container["command"][-1].replace("$$", "")


def test_environment():
    found = rendered(vllm__env=tree(vllmUseV1="1", vllmWorkerMultiprocMethod="fork", tiktokenEncodingsBase="/enc")).environment
    assert found["VLLM_USE_V1"] == "1" and found["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert found["TIKTOKEN_ENCODINGS_BASE"] == "/enc"
    assert found["PYTHONHASHSEED"] == "0", "block hashes must be the same in the next process"
    assert "TIKTOKEN_ENCODINGS_BASE" not in rendered().environment


def test_lora():
    found = rendered(vllm__lora=tree(enable=True, modules="lora=/data/l/ b=/b", maxRank=64))
    at = found.command.index("--lora-modules")
    assert found.command[at : at + 3] == ["--lora-modules", "lora=/data/l/", "b=/b"]
    assert "--enable-lora" in found.command and follows(found.command, "--max-lora-rank") == "64"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in found.environment
    listed = rendered(vllm__lora=tree(enable=True, modules=["a=/with space"], runtimeUpdates=True, adapters__existingClaim="claim"))
    assert follows(listed.command, "--lora-modules") == "a=/with space"
    assert listed.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert listed.mounts()["adapters"] == {"name": "adapters", "mountPath": "/adapters", "readOnly": True}
    assert "--enable-lora" not in rendered(vllm__lora=tree(enable=False, modules="a=/a")).command


def test_image():
    found = rendered(image=tree(repository="r.io/x", tag="1.10", pullPolicy="Always"), imagePullSecrets=[{"name": "pull"}])
    digest = rendered(image=tree(repository="r.io/x", tag="sha256:ab"))
    assert digest.container["image"] == digest.one("Pod")["spec"]["containers"][0]["image"] == "r.io/x@sha256:ab"
    assert found.container["image"] == "r.io/x:1.10" and found.container["imagePullPolicy"] == "Always"
    assert found.pod["imagePullSecrets"] == [{"name": "pull"}]


def test_deployment():
    found = rendered(deployment=tree(name="llama3", replicas=3, kind="Deployment"), kvCache__type="ephemeral")
    assert found.workload["kind"] == "Deployment" and found.workload["spec"]["replicas"] == 3
    assert {found.workload["metadata"]["name"], found.service["metadata"]["name"]} == {"llama3"}
    assert found.workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}, "there is no GPU to spare"
    assert rendered().workload["metadata"]["name"] == "release-kvoffload-inference"


def test_scheduler():
    assert rendered(schedulerName="hami-scheduler").pod["schedulerName"] == "hami-scheduler"
    assert "schedulerName" not in rendered(schedulerName="").pod


def test_a_port_reaches_container_probes_and_service():
    found = rendered(vllm__args__port=9000, service=tree(port=80, type="LoadBalancer", nodePort=30299, annotations={"a": "b"}))
    (port,) = found.container["ports"]
    assert (port["name"], port["containerPort"]) == ("http", 9000)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert found.container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert found.service["spec"]["type"] == "LoadBalancer"
    assert found.service["spec"]["ports"] == [
        {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "nodePort": 30299}
    ]
    assert found.service["metadata"]["annotations"] == {"a": "b"}
    assert follows(found.one("Pod")["spec"]["containers"][0]["command"], "--url") == "http://release-kvoffload-inference:80"


def test_prescript_runs_privileged_unless_that_is_declined_and_the_server_never_does():
    script = 'echo "$HOME" $$ `id` {{ x }}\n'
    image = {"repository": "r", "tag": "1", "pullPolicy": "Always"}
    found = rendered(prescript=script, initContainer=tree(image=image, sharedDataPath="/s", resources__limits={"cpu": 1}))
    (init,) = found.pod["initContainers"]
    assert init["resources"] == {"limits": {"cpu": 1}}
    assert (init["image"], init["imagePullPolicy"]) == ("r:1", "Always")
    assert init["securityContext"] == {"privileged": True, "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}
    assert found.one("ConfigMap", "-scripts")["data"] == {"prescript.sh": script}
    assert init["command"] == ["/bin/sh", "/etc/kvoffload/prescript.sh"]
    assert {"name": "shared-data", "mountPath": "/s"} in init["volumeMounts"]
    assert found.mounts()["shared-data"]["mountPath"] == "/s"
    assert not found.container["securityContext"].get("privileged")
    (unprivileged,) = rendered(prescript=script, initContainer__privileged=False).pod["initContainers"]
    assert unprivileged["securityContext"] == found.container["securityContext"]
    for without in (rendered(prescript=script, initContainer__enabled=False), rendered()):
        assert "initContainers" not in without.pod


def test_postscript_runs_after_the_wait_and_before_the_end(tmp_path):
    found = rendered(postscript="echo ended", shutdown=tree(preStopSeconds=0, postscriptSeconds=7, drainSeconds=9, flushSeconds=4))
    assert found.container["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sh", "/etc/kvoffload/prestop.sh", "0", "7"]
    assert found.pod["terminationGracePeriodSeconds"] == 0 + 7 + 9 + 4 + 10
    for file, text in found.one("ConfigMap", "-scripts")["data"].items():
        (tmp_path / file).write_text(text.replace("/etc/kvoffload", str(tmp_path)))
    command = ["/bin/sh", tmp_path / "prestop.sh", "0", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "ended\n"


def test_a_postscript_that_does_not_end_leaves_requests_in_flight_and_the_cache_their_time(tmp_path):
    """Kubernetes kills a pod whose grace period its hook used up."""
    for file, text in rendered(postscript="echo begun; sleep 3600").one("ConfigMap", "-scripts")["data"].items():
        (tmp_path / file).write_text(text.replace("/etc/kvoffload", str(tmp_path)))
    done = subprocess.run(["/bin/sh", tmp_path / "prestop.sh", "0", "2"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 124 and done.stdout == "begun\n"


def test_a_stop_waits_drains_and_flushes_before_the_kill():
    found = rendered(shutdown=tree(preStopSeconds=20, drainSeconds=50))
    assert found.container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert follows(found.command, "--shutdown-timeout") == "55", "vLLM gives it to requests and the end of its engine together"
    assert found.pod["terminationGracePeriodSeconds"] == 20 + 50 + 5 + 10
    assert VALUES["shutdown"]["flushSeconds"]["minimum"] > CLOSE_SECONDS, "what the store takes to drain its journal"
    assert rendered(shutdown__gracePeriodSeconds=300).pod["terminationGracePeriodSeconds"] == 300


def test_probes():
    found = rendered(probes__startup=tree(failureThreshold=7, periodSeconds=3, timeoutSeconds=2)).container
    assert found["startupProbe"] == {
        "httpGet": {"path": "/health", "port": "http"}, "failureThreshold": 7, "periodSeconds": 3, "timeoutSeconds": 2,
    }  # fmt: skip


def test_shared_memory():
    assert rendered(volumes__dshm__sizeLimit="30Gi").volumes()["dshm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "30Gi"}
    assert rendered(vllm__args__tensorParallelSize=4).volumes()["dshm"]["emptyDir"]["sizeLimit"] == "14Gi"
    off = rendered(volumes__dshm__enabled=False)
    assert "dshm" not in off.volumes() and "dshm" not in off.mounts()


def test_folders():
    volumes = {"sharedData": {"sizeLimit": "9Gi"}, "home": {"existingClaim": "home"}, "tmp": {"sizeLimit": "1Gi"}}
    found = rendered(volumes=volumes)
    assert found.volumes()["shared-data"]["emptyDir"] == {"sizeLimit": "9Gi"}
    assert found.volumes()["home"]["persistentVolumeClaim"] == {"claimName": "home"}
    assert found.volumes()["tmp"]["emptyDir"] == {"sizeLimit": "1Gi"}
    assert found.mounts()["home"]["mountPath"] == found.environment["HOME"]


def gib(text: str) -> float:
    assert text.endswith("Gi")
    return float(text[:-2])


def test_memory_holds_the_dram_tier_shared_memory_and_the_server():
    def memory(**more):
        resources = rendered(**more).container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        return gib(resources["limits"]["memory"])

    few = memory(vllm__args__ssdKvOffloadGb=1)
    assert memory(vllm__args__ssdKvOffloadGb=30000) == few + 28, "a thousandth, for what is kept of each block"
    assert memory(vllm__args__ssdKvOffloadGb=-1, kvCache__size="28000Gi") == few + 28
    unknown = {"kvCache__type": "hostPath", "kvCache__hostPaths": ["/mnt/nvme"], "vllm__args__ssdKvOffloadGb": -1}
    assert memory(**unknown) == few + 4, "4 TB, where nothing says how large the drive is"
    small = memory(vllm__args__ssdKvOffloadGb=0)
    assert small == 8 + 8 + 8
    assert memory(vllm__args__ssdKvOffloadGb=0, vllm__args__dramKvOffloadGb=64) == small + 60  # 59.6
    assert memory() == small + 3 > small + BOUNCE_BYTES / 2**30, "blocks pass through a pool to the SSD"
    assert memory(vllm__args__ssdKvOffloadGb=0, vllm__args__tensorParallelSize=2) == small + 8 + 2
    own = rendered(hostMemory=tree(base="1Gi", perGpu="2Gi", limit=False), vllm__args__disableKvCache=True).container["resources"]
    assert own["requests"]["memory"] == "11Gi" and "memory" not in own["limits"]


def test_resources_are_passed_through_and_completed():
    asked = {"otterscale.com/vgpu": 4, "otterscale.com/vgpumem-percentage": 80, "phison.com/ai100": 2}
    found = rendered(resources=tree(requests={**asked, "cpu": 8}, limits=asked), vllm__args__tensorParallelSize=4)
    resources = found.container["resources"]
    assert asked.items() <= resources["requests"].items() and asked.items() <= resources["limits"].items()
    assert resources["requests"]["cpu"] == 8 and not {"nvidia.com/gpu"} & {*resources["requests"], *resources["limits"]}
    default = rendered(vllm__args__tensorParallelSize=4).container["resources"]
    assert default["limits"]["nvidia.com/gpu"] == default["requests"]["nvidia.com/gpu"] == 4
    assert "nvidia.com/gpu" not in rendered(gpuResource="").container["resources"]["limits"]
    assert rendered(resources__limits={"memory": "100Gi"}).container["resources"]["requests"]["memory"] == "100Gi"


def test_every_worker_of_a_data_parallel_server_has_memory():
    args = tree(tensorParallelSize=2, extraArgs=["--data-parallel-size=4"])
    found = rendered(vllm__args=args, resources__limits={"nvidia.com/gpu": 8})
    alike = rendered(vllm__args__tensorParallelSize=8)
    assert found.container["resources"]["limits"] == alike.container["resources"]["limits"]
    assert found.volumes()["dshm"] == alike.volumes()["dshm"]


def test_dra_claims_reach_pod_and_container_and_stand_for_gpus():
    found = render(ci("model-image"))
    assert found.pod["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}]
    assert found.container["resources"]["claims"] == [{"name": "gpus"}]
    assert "nvidia.com/gpu" not in found.container["resources"]["limits"]
    assert found.volumes()["model-image"]["image"]["reference"] == "registry.example.com/models/llama:1"
    assert found.mounts()["model-image"]["mountPath"] == "/model"


def test_a_claim_is_made_for_each_replica_and_kept_when_there_are_fewer():
    found = rendered(kvCache=tree(storageClassName="fast", accessMode="ReadWriteOncePod", annotations={"a": "b"}))
    (claim,) = found.workload["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "kv-cache-0" and claim["metadata"]["annotations"] == {"a": "b"}
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"] and claim["spec"]["storageClassName"] == "fast"
    assert found.mounts()["kv-cache-0"] == {"name": "kv-cache-0", "mountPath": "/mnt/nvme0"}
    assert found.workload["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Delete", "whenScaled": "Retain"}
    headless = found.one("Service", "-pods")
    assert found.workload["spec"]["serviceName"] == headless["metadata"]["name"]
    assert "storageClassName" not in rendered().workload["spec"]["volumeClaimTemplates"][0]["spec"]


@pytest.mark.parametrize("gb", [0.3, 1, 10, 77, 500, 1000, 8000, 30000])
def test_a_claim_holds_its_cap_on_ext4(gb):
    """Which reserves a twentieth and takes a 64th for inodes, and of which the engine leaves some free."""
    (claim,) = rendered(vllm__args__ssdKvOffloadGb=gb).workload["spec"]["volumeClaimTemplates"]
    size = gib(claim["spec"]["resources"]["requests"]["storage"]) * 2**30
    assert size * (1 - 1 / 20 - 1 / 64) - free_floor(int(size)) >= gb * 1e9
    assert size <= 1.1 * gb * 1e9 + 2 * 2**30


def test_several_drives_share_the_cap():
    found = rendered(vllm__args__nvmePath=["/a", "/b", "/c"], vllm__args__ssdKvOffloadGb=900)
    claims = found.workload["spec"]["volumeClaimTemplates"]
    assert [claim["metadata"]["name"] for claim in claims] == ["kv-cache-0", "kv-cache-1", "kv-cache-2"]
    assert {claim["spec"]["resources"]["requests"]["storage"] for claim in claims} == {"309Gi"}
    assert [found.mounts()[f"kv-cache-{number}"]["mountPath"] for number in range(3)] == ["/a", "/b", "/c"]


def test_other_volumes_for_the_cache():
    ephemeral = render(ci("ephemeral"))
    template = ephemeral.volumes()["kv-cache-0"]["ephemeral"]["volumeClaimTemplate"]
    assert template["spec"]["resources"]["requests"]["storage"] == "206Gi" and ephemeral.workload["kind"] == "Deployment"
    host = render(ci("host-path"))
    assert host.volumes()["kv-cache-1"]["hostPath"] == {"path": "/srv/nvme1", "type": "Directory"}
    assert host.mounts()["kv-cache-1"]["subPathExpr"] == "$(POD_NAME)" and host.workload["kind"] == "StatefulSet"
    empty = render(ci("empty-dir"))
    assert empty.volumes()["kv-cache-0"]["emptyDir"] == {"sizeLimit": "22Gi"}
    assert empty.container["resources"]["requests"]["ephemeral-storage"] == "22Gi", "so that the node has it"
    claim = render(ci("existing-claim"))
    assert claim.volumes()["kv-cache-0"]["persistentVolumeClaim"] == {"claimName": "shared-cache"}
    assert claim.mounts()["kv-cache-0"]["subPathExpr"] == "$(POD_NAME)", "one engine uses a folder at a time"
    plain = render(ci("plain"))
    assert not [name for name in plain.volumes() if name.startswith("kv-cache")]


def test_a_device_plugin_mounts_the_drive_by_itself_and_the_server_is_root_without_capabilities():
    for found in (render(ci("seed-basic")), render(ci("seed-multi-gpu-lora")), rendered(kvCache__type="devicePlugin")):
        assert not [name for name in found.volumes() if name.startswith("kv-cache")]
        assert found.workload["kind"] == "Deployment" and "/mnt/nvme0" in found.command
        assert found.pod["securityContext"]["runAsUser"] == 0
        assert found.container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    own = merged(ci("seed-basic"), tree(kvCache__type="claimTemplate"))
    assert render(own).pod["securityContext"]["runAsNonRoot"] is True
    other = rendered(kvCache__devicePluginResource="example.com/ssd", resources__limits={"example.com/ssd": 1})
    assert other.workload["kind"] == "Deployment"


def test_permissions_are_mended_by_a_container_that_can_do_nothing_else():
    (init,) = render(ci("host-path")).pod["initContainers"]
    assert init["command"] == ["chown", "1000:1000", "/mnt/nvme0", "/mnt/nvme1"]
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert [mount["subPathExpr"] for mount in init["volumeMounts"]] == ["$(POD_NAME)"] * 2


def test_the_pod_is_hardened_and_what_the_user_gives_is_merged_over_it():
    found = rendered(podSecurityContext=tree(runAsUser=5, seccompProfile=tree(type="Localhost", localhostProfile="io_uring.json")))
    assert found.pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 5, "runAsGroup": 1000, "fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "Localhost", "localhostProfile": "io_uring.json"},
    }  # fmt: skip
    assert rendered().pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    hardened = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert found.container["securityContext"] == hardened
    more = rendered(securityContext__capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]}).container["securityContext"]
    assert more == {**hardened, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}


def test_no_token_is_mounted():
    found = rendered(serviceAccount__annotations={"a": "b"})
    account = found.one("ServiceAccount")
    assert account["automountServiceAccountToken"] is False and account["metadata"]["annotations"] == {"a": "b"}
    assert found.pod["serviceAccountName"] == account["metadata"]["name"]
    for pod in (found.pod, found.one("Pod")["spec"]):
        assert pod["automountServiceAccountToken"] is False
    own = rendered(serviceAccount=tree(create=False, name="mine"))
    assert own.pod["serviceAccountName"] == "mine" and not own.all("ServiceAccount")


def secret_of(found, variable: str) -> dict:
    (entry,) = (entry for entry in found.container["env"] if entry["name"] == variable)
    return entry["valueFrom"]["secretKeyRef"]


def test_secrets_are_made_drawn_or_taken():
    made = rendered(huggingface__token="hf_x", apiKey__value="k")
    assert made.one("Secret", "-huggingface")["stringData"] == {"token": "hf_x"}
    assert made.one("Secret", "-api-key")["data"] == {"api-key": "aw=="}
    assert secret_of(made, "HF_TOKEN") == {"name": "release-kvoffload-inference-huggingface", "key": "token"}
    (variable,) = made.one("Pod")["spec"]["containers"][0]["env"]
    assert variable["valueFrom"]["secretKeyRef"] == secret_of(made, "VLLM_API_KEY")
    drawn = rendered(apiKey__generate=True)
    assert len(drawn.one("Secret")["data"]["api-key"]) == 56
    taken = rendered(apiKey=tree(existingSecret="mine", key="k"), huggingface=tree(existingSecret="hub", token="unused"))
    assert secret_of(taken, "VLLM_API_KEY") == {"name": "mine", "key": "k"} and not taken.all("Secret")
    assert not {"HF_TOKEN", "VLLM_API_KEY"} & {entry["name"] for entry in rendered().container["env"]}


def test_a_changed_script_or_secret_starts_pods_anew():
    def checksums(**more):
        return rendered(**more).workload["spec"]["template"]["metadata"]["annotations"]

    assert checksums() == checksums()
    assert checksums(prescript="true") != checksums(prescript="false") != checksums(postscript="false")
    assert checksums(apiKey__value="a") != checksums(apiKey__value="b")
    assert checksums(podAnnotations={"a": "b"})["a"] == "b"


def test_what_is_the_users_own_is_passed_through():
    found = render(ci("empty-dir"))
    assert {"name": "VLLM_LOGGING_LEVEL", "value": "WARNING"} in found.container["env"]
    assert found.container["envFrom"] == [{"configMapRef": {"name": "more"}}]
    assert found.mounts()["more"]["mountPath"] == "/more" and found.volumes()["more"] == {"name": "more", "emptyDir": {}}
    assert [container["name"] for container in found.pod["containers"]] == ["vllm-api", "beside"]
    assert [container["name"] for container in found.pod["initContainers"]] == ["before", "prescript"]
    assert found.one("ConfigMap", "more")["data"] == {"MORE": "1"}
    values = ci("host-path")
    placed = render(values).pod
    for key in ("nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName", "runtimeClassName"):
        assert placed[key] == values[key]
    assert rendered(podLabels={"a": "b"}).workload["spec"]["template"]["metadata"]["labels"]["a"] == "b"


def test_autoscaling_and_disruption():
    found = render(ci("ephemeral"))
    scaler = found.one("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": found.workload["metadata"]["name"]}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 2)
    assert scaler["metrics"][0]["pods"]["metric"] == {"name": "vllm_num_requests_waiting"}
    keda = render(ci("drives"))
    assert keda.one("ScaledObject")["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"
    for scaled in (found, keda):
        assert "replicas" not in scaled.workload["spec"], "an upgrade would undo what was scaled"
    assert keda.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    for asked, mine, other in [
        (keda, "release-kvoffload-inference-12", "release-kvoffload-inference-b-0"),
        (rendered(autoscaling__keda__enabled=True, kvCache__type="ephemeral"),
         "release-kvoffload-inference-7d9f5b-x2x4z", "release-kvoffload-inference-b-7d9f5b-x2x4z"),
    ]:  # fmt: skip
        query = asked.one("ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
        (pods,) = re.findall('pod=~"(.*)"', query)
        assert re.fullmatch(pods, mine) and not re.fullmatch(pods, other), "another release's requests are its own"
    own = tree(maxReplicas=9, scaleDownSeconds=60, hpa=tree(enabled=True, metric="m", target="3"))
    spec = rendered(autoscaling=own, kvCache__type="ephemeral").one("HorizontalPodAutoscaler")["spec"]
    assert spec["maxReplicas"] == 9 and spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 60
    assert spec["metrics"][0]["pods"] == {"metric": {"name": "m"}, "target": {"type": "AverageValue", "averageValue": "3"}}
    query = tree(keda=tree(enabled=True, query="q", serverAddress="http://p", threshold=2))
    metadata = rendered(autoscaling=query).one("ScaledObject")["spec"]["triggers"][0]["metadata"]
    assert metadata == {"serverAddress": "http://p", "query": "q", "threshold": "2"}


def test_network():
    found = render(ci("ephemeral"))
    policy = found.one("NetworkPolicy")["spec"]
    (ingress,) = policy["ingress"]
    *peers, test = ingress["from"]
    assert peers == ci("ephemeral")["networkPolicy"]["from"] and ingress["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert test["podSelector"]["matchLabels"].items() <= found.one("Pod")["metadata"]["labels"].items()
    assert [rule["ports"][0]["port"] for rule in policy["egress"]] == [53, 443]
    assert rendered(networkPolicy__enabled=True).one("NetworkPolicy")["spec"]["ingress"][0]["from"][0] == {"podSelector": {}}
    (rule,) = found.one("Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": found.service["metadata"]["name"], "port": {"name": "http"}}
    (rule,) = found.one("HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": found.service["metadata"]["name"], "port": 80}]


def test_monitors_select_what_answers_metrics():
    for kind, values in (("ServiceMonitor", "drives"), ("PodMonitor", "ephemeral")):
        found = render(ci(values))
        monitor = found.one(kind)["spec"]
        selected = found.service if kind == "ServiceMonitor" else found.workload["spec"]["template"]
        assert monitor["selector"]["matchLabels"].items() <= selected["metadata"]["labels"].items()
        assert monitor["namespaceSelector"] == {"matchNames": ["llm"]}
        (endpoint,) = monitor.get("endpoints") or monitor["podMetricsEndpoints"]
        assert endpoint == {"port": "http", "path": "/metrics", "interval": "15s"}
    assert render(ci("drives")).one("ServiceMonitor")["metadata"]["labels"]["release"] == "prometheus"
    assert render(ci("drives")).one("ConfigMap", "-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_pod_of_helm_test():
    found = rendered(test=tree(pushOutTokens=7, timeoutSeconds=9)).one("Pod")
    assert found["metadata"]["annotations"]["helm.sh/hook"] == "test" and found["spec"]["activeDeadlineSeconds"] == 9
    (container,) = found["spec"]["containers"]
    assert follows(container["command"], "--push-out-tokens") == "7" and "--no-cache" not in container["command"]
    placed = ci("host-path")
    for key in ("nodeSelector", "tolerations", "affinity"):  # the image is where the server runs
        assert render(placed).one("Pod")["spec"][key] == placed[key]
    assert "--no-cache" in render(ci("plain")).one("Pod")["spec"]["containers"][0]["command"]
    assert not rendered(test__enabled=False).all("Pod")
    assert json.dumps(found).count("privileged") == 0
