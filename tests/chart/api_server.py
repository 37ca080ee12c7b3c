"""A Kubernetes API server over a made-up cluster, as much of one as Helm asks for: discovery, objects and their labels."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.chart.cluster import KINDS, PLURALS, Cluster, Refused
from tests.chart.protobuf_secret import secret
from tests.chart.strategic_merge import merged

POLL_S = 0.02  # how long the end of the server may take to be noticed


def discovery(cluster: Cluster, path: list[str]) -> dict | None:
    """What the server has; None where the path is not about that."""
    if path == ["version"]:
        major, minor = cluster.version.removeprefix("v").split(".")[:2]
        return {"major": major, "minor": minor, "gitVersion": cluster.version}
    if path == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == ["apis"]:
        groups = {group: version for group, _, version in (each.partition("/") for each in KINDS) if version}
        versions = {group: {"groupVersion": f"{group}/{version}", "version": version} for group, version in groups.items()}
        listed = [{"name": group, "versions": [only], "preferredVersion": only} for group, only in versions.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    version = "/".join(path[1:])
    if version not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for kind, (plural, namespaced) in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


class Handler(BaseHTTPRequestHandler):
    """One request: its path, /api/v1/namespaces/NAMESPACE/PLURAL/NAME or the like, taken apart."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second of two would wait for the first's acknowledgement
    server: "Server"

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what Helm says."""

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: found[0] for name, found in parse_qs(url.query).items()}
        with self.server.lock:
            try:
                self.answer(200, self.respond([part for part in url.path.split("/") if part], query, body))
            except Refused as error:
                self.answer(error.code, error.status)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

    def respond(self, path: list[str], query: dict[str, str], body: bytes) -> object:
        cluster = self.server.cluster
        if path == ["openapi", "v2"]:
            return ""  # in the binary form that Helm asks for, a document that describes nothing
        if (found := discovery(cluster, path)) is not None:
            return found
        rest = path[2:] if path[0] == "api" else path[3:]
        namespace = None
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        if not rest or rest[0] not in PLURALS:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        plural, *name = rest
        if name[1:] == ["log"]:
            return f"what {name[0]} said\n"
        if self.command == "GET" and not name:
            return self.listed(plural, cluster.matching(plural, namespace, query), "watch" in query)
        if self.command == "GET":
            return cluster.find(plural, namespace or "", name[0])
        if self.command == "DELETE":
            return cluster.delete(plural, namespace or "", name[0])
        sent = secret(body) if "protobuf" in self.headers["Content-Type"] else json.loads(body)
        if self.command == "POST":
            return cluster.create(plural, namespace or "", sent)
        if self.command == "PATCH":
            sent = merged(cluster.find(plural, namespace or "", name[0]), sent)
        return cluster.write(plural, namespace or "", sent)

    def listed(self, plural: str, found: list[dict], watch: bool) -> object:
        version, kind = PLURALS[plural]
        if watch:  # once: who watches on asks again
            return "".join(json.dumps({"type": "ADDED", "object": each}) + "\n" for each in found)
        about = {"resourceVersion": str(self.server.cluster.writes)}
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": about, "items": found}

    def answer(self, code: int, content: object) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, cluster: Cluster):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cluster = cluster
        self.lock = threading.Lock()


@contextmanager
def serving(cluster: Cluster, kubeconfig: Path) -> Iterator[None]:
    """Over HTTP, with a file by which Helm finds it."""
    with Server(cluster) as server:
        name = {"name": "made-up"}
        settings = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{**name, "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{**name, "context": {"cluster": "made-up", "user": "made-up"}}],
            "users": [{**name, "user": {}}],
            "current-context": "made-up",
        }
        kubeconfig.write_text(json.dumps(settings))
        thread = threading.Thread(target=server.serve_forever, args=(POLL_S,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
