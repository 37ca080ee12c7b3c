"""Every values file of charts/.../ci is linted, rendered for every Kubernetes version and checked against its strict schemas."""

import shutil

import jsonschema
import pytest
import yaml

from tests.chart.rendering import (
    CHART,
    CI,
    KUBERNETES,
    NEEDS_1_31,
    NEWEST,
    ROOT,
    Rendered,
    ci,
    helm,
    merged,
    name,
    refusal,
    render,
    tree,
    validate,
    with_model,
)
from tests.monitoring.test_rules_and_dashboard import promtool

ALLOWED = [(file, version) for file in CI for version in KUBERNETES if version != "1.29" or name(file) not in NEEDS_1_31]


@pytest.mark.parametrize("file", CI, ids=name)
def test_the_linter_finds_nothing(file):
    done = helm("lint", "--strict", CHART, "-f", file)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout


@pytest.mark.parametrize(("file", "kubernetes"), ALLOWED, ids=lambda value: value if isinstance(value, str) else name(value))
def test_every_object_is_one_that_kubernetes_takes(file, kubernetes):
    objects = render(ci(name(file)), kubernetes).objects
    assert len(objects) >= 5
    for found in objects:
        validate(found, kubernetes)


def test_every_kind_of_the_chart_is_rendered_by_some_values_file():
    kinds = {found["kind"] for file in CI for found in render(ci(name(file))).objects}
    assert kinds == {
        "ConfigMap", "Deployment", "HTTPRoute", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy", "Pod", "PodDisruptionBudget",
        "PodMonitor", "PrometheusRule", "ScaledObject", "Secret", "Service", "ServiceAccount", "ServiceMonitor", "StatefulSet",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["unknown", "type"])
@pytest.mark.parametrize("kind", ["StatefulSet", "ServiceMonitor"])
def test_the_schemas_find_what_is_wrong(kind, damage):
    found = yaml.safe_load(yaml.safe_dump(render(ci("drives")).one(kind)))
    if damage == "unknown":
        found["spec"]["replica"] = 1
    else:
        found["spec"]["selector"] = "all"
    with pytest.raises(jsonschema.ValidationError):
        validate(found, NEWEST)


@pytest.mark.parametrize("values", [{}, {"vllm": {"args": {"model": ""}}}])
def test_a_model_is_all_that_must_be_given(values):
    assert "set vllm.args.model" in refusal(values)
    assert helm("template", "r", CHART, "--set", "vllm.args.model=org/model").returncode == 0


def test_what_needs_a_newer_kubernetes_says_so():
    assert "modelImage needs Kubernetes 1.31 or newer" in refusal(ci("model-image"), "1.29")
    claims = with_model(resourceClaims=[{"name": "gpu", "resourceClaimTemplateName": "gpu"}])
    assert "resourceClaims need Kubernetes 1.31 or newer" in refusal(claims, "1.29")
    assert helm("template", "r", CHART, "--set", "vllm.args.model=m", "--kube-version", "1.28.0").returncode != 0


def test_the_package_renders_alike_and_refuses_alike(tmp_path):
    """A schema that .helmignore keeps out of the package is one that nobody is helped by."""
    packed = helm("package", CHART, "-d", tmp_path)
    assert packed.returncode == 0, packed.stderr
    (archive,) = tmp_path.glob("*.tgz")
    for file in CI:
        if name(file) != "drives":  # which draws a key
            assert render(ci(name(file)), chart=archive).objects == render(ci(name(file))).objects
    misspelt = helm("template", "r", archive, "--set", "vllm.args.model=m,vllm.args.modle=m")
    assert misspelt.returncode != 0 and "modle" in misspelt.stderr


def test_names_that_yaml_would_read_as_numbers_or_truths_are_names(tmp_path):
    own = tmp_path / "values.yaml"
    values = with_model(
        deployment__name="no",
        serviceAccount__name="true",
        metrics__podMonitor=tree(enabled=True, interval="15s"),
        ingress=tree(enabled=True, hosts=["1"]),
        httpRoute=tree(enabled=True, parentRefs=[{"name": "gateway"}]),
        networkPolicy__enabled=True,
        podDisruptionBudget=tree(enabled=True, maxUnavailable="50%"),
    )
    own.write_text(yaml.safe_dump(values))
    done = helm("template", "1e3", CHART, "-f", own, "--namespace", "123")
    assert done.returncode == 0, done.stderr
    for found in Rendered(done.stdout).objects:
        labels = {"app.kubernetes.io/instance": "1e3", "app.kubernetes.io/name": "kvoffload-inference"}
        assert found["metadata"]["namespace"] == "123" and labels.items() <= found["metadata"]["labels"].items()
        assert isinstance(found["metadata"]["name"], str)
        validate(found, NEWEST)


def test_labels_are_valid_for_a_package_whose_version_has_build_metadata(tmp_path):
    assert helm("package", CHART, "-d", tmp_path, "--version", "0.1.0+g1", "--app-version", "0.1.0+cu13").returncode == 0
    (archive,) = tmp_path.glob("*.tgz")
    labels = render(with_model(), chart=archive).workload["metadata"]["labels"]
    assert labels["helm.sh/chart"] == "kvoffload-inference-0.1.0_g1" and labels["app.kubernetes.io/version"] == "0.1.0_cu13"


def test_the_rules_are_those_of_the_documentation_and_prometheus_takes_them(tmp_path):
    rendered = render(ci("drives"))
    assert rendered.one("PrometheusRule")["spec"] == yaml.safe_load((ROOT / "docs" / "monitoring" / "alerts.yml").read_text())
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump(rendered.one("PrometheusRule")["spec"]))
    checked = promtool("check", "rules", rules)
    assert checked.returncode == 0, checked.stderr
    asked = rendered.one("ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    rules.write_text(yaml.safe_dump({"groups": [{"name": "keda", "rules": [{"record": "a:b", "expr": asked}]}]}))
    assert promtool("check", "rules", rules).returncode == 0


def test_the_dashboard_is_that_of_the_documentation():
    text = render(ci("drives")).one("ConfigMap", "-dashboard")["data"]["kvoffload.json"]
    assert text == (ROOT / "docs" / "monitoring" / "dashboard.json").read_text()


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """What `helm install` prints, which needs a cluster: here as an object of a copy of the chart."""
    copy = tmp_path_factory.mktemp("notes") / "chart"
    shutil.copytree(CHART, copy)
    text = (copy / "templates" / "NOTES.txt").read_text()
    shown = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: printed}\ndata: {text: {{ include \"printed\" . | toJson }}}\n"
    (copy / "templates" / "printed.yaml").write_text('{{- define "printed" }}' + text + "{{ end }}\n" + shown)
    return lambda values: render(values, chart=copy).one("ConfigMap", "printed")["data"]["text"]


def test_the_notes_name_what_was_chosen_and_what_it_costs(notes):
    seed = notes(ci("seed-basic"))
    assert "Deployment llama3-inference serves Meta-Llama-3.1-8B-Instruct" in seed
    warned = ["prescript runs as privileged root", "the server runs as root", "everybody who reaches a node", "must hold kvoffload"]
    assert all(said in seed for said in warned)
    assert "/data, which is empty" in notes(ci("seed-multi-gpu-lora"))
    quiet = tree(vllm__args__model="org/m", service__type="ClusterIP")
    assert "port-forward" in notes(quiet) and "NOTE" not in notes(quiet)
    key = "get secret release-kvoffload-inference-api-key -o go-template='{{index .data \"api-key\" | base64decode}}'"
    assert key in notes(merged(quiet, tree(apiKey__generate=True)))


def test_objects_of_one_release_select_its_server_and_nothing_else():
    """The pod of `helm test` is no server, and neither are another release's pods."""
    for file in CI:
        rendered: Rendered = render(ci(name(file)))
        labels = rendered.workload["spec"]["template"]["metadata"]["labels"]
        other = rendered.one("Pod")["metadata"]["labels"]
        services = [service["spec"]["selector"] for service in rendered.all("Service")]
        for selector in [rendered.workload["spec"]["selector"]["matchLabels"], *services]:
            assert selector.items() <= labels.items()
            assert not selector.items() <= other.items()
