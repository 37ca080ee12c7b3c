"""From install to uninstall with Helm itself, on a cluster that is made up (tests/chart/cluster.py)."""

import base64
import json
from pathlib import Path

import pytest

from tests.chart.api_server import serving
from tests.chart.cluster import Cluster
from tests.chart.helm import Helm
from tests.chart.rendering import CHART

RELEASE = "llama"
NAME = f"{RELEASE}-kvoffload-inference"
CLAIM = f"kv-cache-0-{NAME}-0"
WAIT = ("--wait", "--timeout", "300s")


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def helm(cluster: Cluster, tmp_path: Path):
    kubeconfig = tmp_path / "kubeconfig"
    with serving(cluster, kubeconfig):
        yield Helm(tmp_path, kubeconfig)


def values(**changes: object) -> list[str]:
    """Arguments for Helm: a model, and what is given as vllm__args__port=9000."""
    settings = {"vllm__args__model": "/data/llama", **changes}
    return [f"--set-json={name.replace('__', '.')}={json.dumps(value)}" for name, value in settings.items()]


def install(helm: Helm, **changes: object) -> str:
    return helm("install", RELEASE, CHART, *values(**changes), *WAIT)


def upgrade(helm: Helm, **changes: object) -> str:
    return helm("upgrade", RELEASE, CHART, *values(**changes), *WAIT)


def workload(cluster: Cluster) -> dict:
    return cluster.find("statefulsets", "default", NAME)


def command(cluster: Cluster) -> list[str]:
    return workload(cluster)["spec"]["template"]["spec"]["containers"][0]["command"]


def checksums(cluster: Cluster) -> dict[str, str]:
    return workload(cluster)["spec"]["template"]["metadata"]["annotations"]


def test_install_waits_until_the_workload_and_its_volume_are_there_and_says_how_to_go_on(cluster, helm):
    said = install(helm)
    assert workload(cluster)["status"]["readyReplicas"] == 1
    assert cluster.names("persistentvolumeclaims") == [CLAIM]
    assert {NAME, f"{NAME}-pods"} <= set(cluster.names("services"))
    assert f"helm --namespace default test {RELEASE}" in said
    (listed,) = json.loads(helm("list", "-o", "json"))
    assert (listed["name"], listed["status"], listed["revision"]) == (RELEASE, "deployed", "1")


def test_an_upgrade_brings_a_changed_value_to_the_pods_and_leaves_alone_what_did_not_change(cluster, helm):
    install(helm)
    before = checksums(cluster)
    upgrade(helm, vllm__args__dramKvOffloadGb=64)
    assert "--dram-kv-offload-gb 64" in " ".join(command(cluster))
    assert workload(cluster)["metadata"]["generation"] == 2
    assert checksums(cluster) == before, "no script and no secret changed"
    upgrade(helm, vllm__args__dramKvOffloadGb=64)
    assert workload(cluster)["metadata"]["generation"] == 2, "no pod is restarted for nothing"


def test_a_changed_prescript_restarts_the_pods_by_its_checksum(cluster, helm):
    install(helm, prescript="cp -r /models/llama /data/")
    before = checksums(cluster)
    upgrade(helm, prescript="cp -r /models/llama2 /data/")
    changed = {name for name, checksum in checksums(cluster).items() if before[name] != checksum}
    assert changed == {"checksum/scripts"}
    assert "llama2" in cluster.find("configmaps", "default", f"{NAME}-scripts")["data"]["prescript.sh"]


def test_a_rollback_brings_back_what_was_and_the_history_says_so(cluster, helm):
    install(helm)
    first = command(cluster)
    upgrade(helm, vllm__args__maxModelLen=32768)
    assert command(cluster) != first
    helm("rollback", RELEASE, "1", *WAIT)
    assert command(cluster) == first
    history = json.loads(helm("history", RELEASE, "-o", "json"))
    assert [(row["revision"], row["status"]) for row in history] == [(1, "superseded"), (2, "superseded"), (3, "deployed")]
    assert history[-1]["description"] == "Rollback to 1"


def test_helm_test_runs_a_pod_and_shows_what_it_said_and_can_be_run_again(cluster, helm):
    install(helm)
    for _ in range(2):
        said = helm("test", RELEASE, "--logs")
        assert "Phase:          Succeeded" in said and f"what {NAME}-test said" in said


def test_helm_test_fails_when_its_pod_does(cluster, helm):
    install(helm)
    cluster.pods_succeed = False
    done = helm.run("test", RELEASE)
    assert done.returncode != 0 and "Phase:          Failed" in done.stdout, done


@pytest.mark.parametrize(("retention", "left"), [("Retain", [CLAIM]), ("Delete", [])])
def test_uninstall_takes_all_but_the_claims_that_are_to_stay(cluster, helm, retention, left):
    install(helm, kvCache__retention__whenDeleted=retention, prescript="true", apiKey__generate=True)
    helm("uninstall", RELEASE, *WAIT)
    assert cluster.names("persistentvolumeclaims") == left
    assert {plural for plural, *_ in cluster.objects} <= {"persistentvolumeclaims"}


def test_uninstall_leaves_what_the_test_made(cluster, helm):
    """So Helm treats hooks; docs/kubernetes.md says how to take it away."""
    install(helm)
    helm("test", RELEASE)
    helm("uninstall", RELEASE, *WAIT)
    assert cluster.names("pods") == cluster.names("configmaps") == [f"{NAME}-test"]


def test_a_cache_is_found_again_by_a_release_of_the_same_name(cluster, helm):
    install(helm, kvCache__retention__whenDeleted="Retain")
    volume = cluster.find("persistentvolumeclaims", "default", CLAIM)["metadata"]["uid"]
    helm("uninstall", RELEASE, *WAIT)
    install(helm, kvCache__retention__whenDeleted="Retain")
    assert cluster.find("persistentvolumeclaims", "default", CLAIM)["metadata"]["uid"] == volume


def test_a_key_that_was_drawn_stays_the_same_through_upgrades(cluster, helm):
    def key() -> str:
        return cluster.find("secrets", "default", f"{NAME}-api-key")["data"]["api-key"]

    install(helm, apiKey__generate=True)
    drawn = key()
    assert len(base64.b64decode(drawn)) == 40
    upgrade(helm, apiKey__generate=True, vllm__args__maxModelLen=4096)
    assert key() == drawn


def test_without_claims_of_its_own_it_is_a_deployment_and_comes_up_too(cluster, helm):
    install(helm, kvCache__type="ephemeral")
    assert cluster.find("deployments", "default", NAME)["status"]["readyReplicas"] == 1
    assert cluster.names("statefulsets") == []


def test_a_tier_that_needs_other_claims_is_refused_by_a_sentence_until_the_set_is_taken_away_from_its_pods(cluster, helm):
    retain = {"kvCache__retention__whenDeleted": "Retain"}
    larger = {"vllm__args__ssdKvOffloadGb": 900, **retain}
    install(helm, **retain)
    before = command(cluster)
    refused = helm.run("upgrade", RELEASE, CHART, *values(**larger), *WAIT)
    assert refused.returncode != 0 and f"the claims of statefulset/{NAME} cannot change" in refused.stderr
    assert "from kv-cache-0 of 514Gi the default class ReadWriteOnce to kv-cache-0 of 924Gi" in refused.stderr
    assert command(cluster) == before
    cluster.delete("statefulsets", "default", NAME)  # kubectl delete --cascade=orphan
    upgrade(helm, **larger)
    assert "--ssd-kv-offload-gb 900" in " ".join(command(cluster))


@pytest.mark.parametrize("sized", [{"kvCache__size": "2048Gi"}, {"vllm__args__ssdKvOffloadGb": 998}], ids=str)
def test_a_size_that_kubernetes_writes_in_another_unit_is_the_same(cluster, helm, sized):
    install(helm, **sized)
    (claim,) = workload(cluster)["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"].endswith("Ti")
    upgrade(helm, vllm__args__maxModelLen=4096, **sized)
    assert "--max-model-len 4096" in " ".join(command(cluster))


def test_other_annotations_of_claims_are_refused_before_anything_is_changed(cluster, helm):
    install(helm, kvCache__annotations={"team": "a"})
    upgrade(helm, kvCache__annotations={"team": "a"}, vllm__args__maxModelLen=4096)
    refused = helm.run("upgrade", RELEASE, CHART, *values(kvCache__annotations={"team": "b"}), *WAIT)
    assert refused.returncode != 0 and 'ReadWriteOnce, annotated {"team":"a"} to kv-cache-0' in refused.stderr


def test_switching_the_ssd_tier_off_takes_the_claims_unless_they_are_to_stay(cluster, helm):
    install(helm)
    upgrade(helm, vllm__args__disableKvCache=True)
    assert cluster.names("statefulsets") == cluster.names("persistentvolumeclaims") == []
    helm("uninstall", RELEASE, *WAIT)
    install(helm, kvCache__retention__whenDeleted="Retain")
    upgrade(helm, kvCache__retention__whenDeleted="Retain", vllm__args__disableKvCache=True)
    assert cluster.names("persistentvolumeclaims") == [CLAIM]


def test_a_rollback_to_other_claims_is_refused_by_kubernetes_itself(cluster, helm):
    """Helm does not render for a rollback, so the chart is not asked."""
    install(helm, kvCache__retention__whenDeleted="Retain")
    cluster.delete("statefulsets", "default", NAME)
    upgrade(helm, vllm__args__ssdKvOffloadGb=900, kvCache__retention__whenDeleted="Retain")
    done = helm.run("rollback", RELEASE, "1", *WAIT)
    assert done.returncode != 0 and "are forbidden: volumeClaimTemplates" in done.stderr


def test_the_cap_can_be_raised_within_a_size_that_was_given(cluster, helm):
    roomy = {"kvCache__size": "1200Gi"}
    install(helm, **roomy)
    upgrade(helm, vllm__args__ssdKvOffloadGb=900, **roomy)
    assert "--ssd-kv-offload-gb 900" in " ".join(command(cluster))
