"""Schemas of the custom resources that the chart makes, as far as it uses them; strict, as Kubernetes' own are in these tests."""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|[smhd]))+$"}
MAP: Schema = {"type": "object", "additionalProperties": TEXT}


def record(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required.split()}


def several(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


def resource(kind: str, api: str, spec: Schema) -> Schema:
    metadata = record("name namespace", name=NAME, namespace=NAME, labels=MAP, annotations=MAP)
    return record("apiVersion kind metadata spec", apiVersion={"const": api}, kind={"const": kind}, metadata=metadata, spec=spec)


ENDPOINT = record("port", port=TEXT, path=TEXT, interval=DURATION)
SELECTION = {"namespaceSelector": record(matchNames=several(NAME)), "selector": record(matchLabels=MAP)}
RULE = {**record("alert expr", alert=TEXT, expr=TEXT, labels=MAP, annotations=MAP), }
RULE["properties"]["for"] = DURATION
BEHAVIOR = record(
    scaleDown=record(
        stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
        policies=several(record("type value periodSeconds", type={"enum": ["Pods", "Percent"]}, value=COUNT, periodSeconds=COUNT)),
    )
)
TRIGGER = record(
    "type metadata",
    type={"const": "prometheus"},
    metricType={"enum": ["AverageValue", "Value", "Utilization"]},
    metadata=record("serverAddress query threshold", serverAddress=TEXT, query=TEXT, threshold=TEXT),
)
OPERATOR, KEDA, GATEWAY = "monitoring.coreos.com/v1", "keda.sh/v1alpha1", "gateway.networking.k8s.io/v1"
SPECS = {
    ("ServiceMonitor", OPERATOR): record("endpoints selector", endpoints=several(ENDPOINT), **SELECTION),
    ("PodMonitor", OPERATOR): record("podMetricsEndpoints selector", podMetricsEndpoints=several(ENDPOINT), **SELECTION),
    ("PrometheusRule", OPERATOR): record("groups", groups=several(record("name rules", name=TEXT, rules=several(RULE)))),
    ("ScaledObject", KEDA): record(
        "scaleTargetRef triggers",
        scaleTargetRef=record("name", apiVersion=TEXT, kind=TEXT, name=NAME),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        advanced=record(horizontalPodAutoscalerConfig=record(behavior=BEHAVIOR)),
        triggers=several(TRIGGER),
    ),
    ("HTTPRoute", GATEWAY): record(
        "parentRefs rules",
        parentRefs=several(record("name", name=NAME, namespace=NAME, sectionName=NAME)),
        hostnames=several(TEXT),
        rules=several(
            record(
                matches=several(record(path=record("type value", type={"enum": ["Exact", "PathPrefix"]}, value=TEXT))),
                backendRefs=several(record("name port", name=NAME, port={"type": "integer", "minimum": 1})),
            )
        ),
    ),
}
SCHEMAS = {(kind, api): resource(kind, api, spec) for (kind, api), spec in SPECS.items()}
