"""A small Hub on this machine: the endpoints that `huggingface_hub` uses, over real HTTP, with faults on request.

Repositories live in memory as commits that hold every file, so that a half-written one would show. Reading a public
repository needs no token; a private one, and writing, do. Several processes of a test may talk to one hub.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

WRITE_TOKEN = "hf_loopback_writer_0123456789"
READ_TOKEN = "hf_loopback_reader_0123456789"
CUT = 0

_KINDS = r"(?P<kind>models|datasets|spaces)"
_NAME = r"(?P<name>[\w.-]+/[\w.-]+?)"


@dataclass
class Fault:
    """An answer in place of the right one.

    Attributes:
        method: Of the requests that it befalls.
        path: Regular expression that is looked for in their path.
        status: Status of the answer, or `CUT`: the connection is closed in the middle of the answer.
        times: How many requests it befalls.
        headers: Headers of the answer.
        after: Whether the request is carried out before its answer is lost.
    """

    method: str
    path: str
    status: int
    times: int = 10**6
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False


@dataclass
class Repository:
    """Commits, each a whole tree of files, and what points at them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> str | None:
        """Returns the commit that a branch, tag, pull request or commit names."""
        named = self.branches.get(revision) or self.tags.get(revision) or self.pull_requests.get(revision)
        return named or (revision if revision in self.commits else None)

    def commit(self, files: dict[str, bytes], parent: str) -> str:
        """Stores a tree and returns its name."""
        digest = hashlib.sha1(f"{parent}{len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class LoopbackHub:
    """The state of the hub, and the server that answers for it; see `running_hub`."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            """Answers for this hub."""

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def model(self, name: str) -> Repository:
        """Returns a repository of a model."""
        return self.repositories["models", name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a model."""
        repository = self.model(name)
        commit = repository.resolve(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return repository.commits[commit]

    def add(self, kind: str, name: str, files: Mapping[str, bytes], private: bool = False) -> Repository:
        """Makes a repository with one commit."""
        repository = self.repositories[kind, name] = Repository(private)
        repository.branches["main"] = repository.commit(dict(files), "")
        return repository

    def environment(self, home: Any, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Variables of a process that knows no other Hub and has its cache in `home`."""
        values = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return values if token is None else values | {"HF_TOKEN": token}


@contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    """Starts a hub on a free port."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


@contextmanager
def known_to_clients(hub: LoopbackHub) -> Iterator[None]:
    """Makes it the only Hub that `huggingface_hub` in this process knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in hub.environment("").items():
            if name != "HF_HOME":
                patch.setenv(name, value)
        _forget_sessions()
        yield
    _forget_sessions()


def _forget_sessions() -> None:
    # An old connection may be set to offline, or to another Hub.
    reset = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    reset()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET")

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer("HEAD")

    def do_POST(self) -> None:  # noqa: N802
        self._answer("POST")

    def do_PUT(self) -> None:  # noqa: N802
        self._answer("PUT")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: `LoopbackHub.requests` has it."""

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append((method, path))
            fault = self._next_fault(method, path)
            if fault is not None and not fault.after:
                return self._fail(fault)
            try:
                for pattern, expected, act in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and method in expected:
                        answer = act(self, **match.groupdict())
                        break
                else:
                    raise Refusal(404, f"The loopback hub does not know {method} {path}", "EntryNotFound")
            except Refusal as refusal:
                return self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)
        if fault is not None:
            return self._fail(fault)
        if isinstance(answer, tuple):
            return self._send(*answer)
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _fail(self, fault: Fault) -> None:
        if fault.status == CUT:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf an ans")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        # A careless server that tells what it was sent: none of it may reach the user's terminal.
        told = f"fault {fault.status} for {self.headers.get('Authorization')}"
        self._send(fault.status, json.dumps({"error": told}).encode(), fault.headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        values = {"Content-Length": str(len(body)), "X-Request-Id": "loopback", **headers}
        for key, value in values.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _must_write(self) -> None:
        if self._token() == READ_TOKEN:
            raise Refusal(403, "You don't have the rights to do this")
        if self._token() != WRITE_TOKEN:
            raise Refusal(401, "Invalid username or password.")

    def _repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        if self._token() not in ("", READ_TOKEN, WRITE_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not self._token()):
            # The Hub does not tell what is private from what is not there.
            raise Refusal(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _tree(self, kind: str, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(kind, name)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    def who_am_i(self) -> Any:
        self._must_write()
        return {"type": "user", "name": "org", "orgs": []}

    def create_repository(self) -> Any:
        self._must_write()
        values = json.loads(self.body)
        kind = f"{values.get('type') or 'model'}s"
        name = f"{values.get('organization') or 'org'}/{values['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if (kind, name) in self.hub.repositories:
            told = {"error": f"You already created this {kind[:-1]} repo: {name}", "url": url}
            return 409, json.dumps(told).encode(), {}
        private = values.get("visibility") == "private" or bool(values.get("private"))
        repository = self.hub.add(kind, name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return {"url": url, "name": name, "id": repository.branches["main"]}

    def validate_yaml(self) -> Any:
        """Checks the metadata as far as the Hub's own validation has been seen to refuse it."""
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            values = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return 400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode(), {}
        errors = []
        for key, types in {"license": str, "library_name": str, "pipeline_tag": str, "tags": list}.items():
            if key in values and not isinstance(values[key], types):
                errors.append({"message": f'"{key}" must be a {types.__name__}'})
        for entry in values.get("model-index", []):
            for result in entry["results"]:
                if not all(isinstance(result.get(key), dict) for key in ("task", "dataset")):
                    errors.append({"message": '"model-index[0].results[0]" must have a task and a dataset'})
        for base in [values["base_model"]] if "base_model" in values else []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                errors.append({"message": f'"base_model" with value "{base}" is not valid.'})
        body = json.dumps({"errors": errors, "warnings": []}).encode()
        return (400 if errors else 200), body, {"Content-Type": "application/json"}

    def preupload(self, kind: str, name: str, revision: str) -> Any:
        self._must_write()
        _, _, tree = self._tree(kind, name, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".parquet")) or file["size"] > 10_000_000
            oid = {"oid": _blob_id(tree[file["path"]], large)} if file["path"] in tree else {}
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files}

    def lfs_batch(self, name: str, prefix: str | None = None) -> Any:
        self._must_write()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(wanted if wanted["oid"] in self.hub.blobs else wanted | {"actions": action})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.hub.blobs[oid] = self.body
        return {}

    def commit(self, kind: str, name: str, revision: str) -> Any:
        self._must_write()
        repository, parent, tree = self._tree(kind, name, revision)
        files = dict(tree)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                repository.large.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, parent)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"}
        if self.query.get("create_pr") == "1":
            number = len(repository.pull_requests) + 1
            repository.pull_requests[f"refs/pr/{number}"] = commit
            return answer | {"pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/{number}"}
        repository.branches[revision] = commit
        return answer

    def refs(self, kind: str, name: str) -> Any:
        repository = self._repository(kind, name)

        def told(prefix: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"{prefix}{ref}", "targetCommit": commit} for ref, commit in refs.items()]

        return {
            "branches": told("refs/heads/", repository.branches),
            "tags": told("refs/tags/", repository.tags),
            "converts": [],
            "pullRequests": told("", repository.pull_requests),
        }

    def create_branch(self, kind: str, name: str, branch: str) -> Any:
        self._must_write()
        repository = self._repository(kind, name)
        if branch in repository.branches:
            raise Refusal(409, "Branch already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = repository.resolve(start) or repository.branches["main"]
        return {}

    def create_tag(self, kind: str, name: str, revision: str) -> Any:
        self._must_write()
        repository, commit, _ = self._tree(kind, name, revision)
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise Refusal(409, "Tag reference exists already")
        repository.tags[tag] = commit
        return {}

    def info(self, kind: str, name: str, revision: str = "main") -> Any:
        repository, commit, tree = self._tree(kind, name, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        card = re.match(rb"---\n(.*?)\n---\n", tree.get("README.md", b""), re.DOTALL)
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
            "cardData": yaml.safe_load(card[1]) if card else {},
        }

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> Any:
        repository, _, tree = self._tree(kind, name, revision)
        return _listing(repository, tree, folder, self.query.get("recursive", "").lower() in ("1", "true"))

    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        repository, _, tree = self._tree(kind, name, revision)
        paths = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
        return [_entry(repository, path, tree[path]) for path in paths if path in tree]

    def resolve(self, name: str, revision: str, path: str, prefix: str | None = None) -> Any:
        repository, commit, tree = self._tree(f"{prefix or 'models'}", name, revision)
        if path not in tree:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        content = tree[path]
        tag = f'"{_blob_id(content, path in repository.large)}"'
        headers = {"X-Repo-Commit": commit, "ETag": tag, "Accept-Ranges": "bytes"}
        if path in repository.large:
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
        return 206, content[start : end + 1], headers


def _blob_id(content: bytes, large: bool) -> str:
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(repository: Repository, path: str, content: bytes) -> dict[str, Any]:
    oid = _blob_id(content, False)
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path in repository.large:
        entry["lfs"] = {"oid": _blob_id(content, True), "size": len(content), "pointerSize": 130}
    return entry


def _listing(
    repository: Repository, tree: Mapping[str, bytes], folder: str | None, recursive: bool
) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    found = {path: content for path, content in tree.items() if path.startswith(prefix)}
    if folder and not found:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    folders = {path[: len(prefix) + cut.start()] for path in found for cut in re.finditer("/", path[len(prefix) :])}
    if not recursive:
        found = {path: content for path, content in found.items() if "/" not in path[len(prefix) :]}
        folders = {path for path in folders if "/" not in path[len(prefix) :]}
    trees = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    return trees + [_entry(repository, path, content) for path, content in sorted(found.items())]


_PREFIX = r"(?:(?P<prefix>datasets|spaces)/)?"
_ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    (r"/api/whoami-v2", ("GET",), _Handler.who_am_i),
    (r"/api/repos/create", ("POST",), _Handler.create_repository),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), _Handler.lfs_upload),
    (rf"/{_PREFIX}{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (rf"/api/{_KINDS}/{_NAME}/preupload/(?P<revision>.+)", ("POST",), _Handler.preupload),
    (rf"/api/{_KINDS}/{_NAME}/commit/(?P<revision>.+)", ("POST",), _Handler.commit),
    (rf"/api/{_KINDS}/{_NAME}/refs", ("GET",), _Handler.refs),
    (rf"/api/{_KINDS}/{_NAME}/branch/(?P<branch>.+)", ("POST",), _Handler.create_branch),
    (rf"/api/{_KINDS}/{_NAME}/tag/(?P<revision>.+)", ("POST",), _Handler.create_tag),
    (rf"/api/{_KINDS}/{_NAME}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.+))?", ("GET",), _Handler.tree),
    (rf"/api/{_KINDS}/{_NAME}/paths-info/(?P<revision>.+)", ("POST",), _Handler.paths_info),
    (rf"/api/{_KINDS}/{_NAME}/revision/(?P<revision>.+)", ("GET",), _Handler.info),
    (rf"/api/{_KINDS}/{_NAME}", ("GET",), _Handler.info),
    (
        rf"/{_PREFIX}{_NAME}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)",
        ("GET", "HEAD"),
        _Handler.resolve,
    ),
]
