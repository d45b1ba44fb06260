"""A small Hub on loopback: the endpoints that huggingface_hub calls to publish and to load, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard


TOKEN = "hf_" + "L0ngEnoughToLookLikeAToken" + "12345678"
LFS_SUFFIXES = (".safetensors", ".parquet", ".model")


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As the preupload endpoint tells it: sha256 of an LFS file, git's sha1 of others."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    refs: dict[str, str]
    commits: dict[str, dict[str, Blob]]
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, Blob] | None:
        sha = self.refs.get(revision, revision)
        return self.commits.get(sha)

    def sha(self, revision: str) -> str:
        return self.refs.get(revision, revision)


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests whose method and path match.

    `kind`: `"500"`; `"hang"`, no answer while the client waits; `"cut"`, the connection breaks halfway through the
    body; `"lost"`, the request is carried out and its answer is lost; `"echo"`, a 403 that repeats the request's
    headers; `"html"`, a gateway's page with status 502; or a callable that is run before the request is carried out.
    """

    method: str
    path: str
    kind: str | Callable[[], None]
    times: int = 1


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []  # sha256 of each LFS object that arrived, each time it did
        self.states: list[frozenset[str]] = []  # the names on main whenever a request came, over all repositories
        self.lock = threading.RLock()
        self.stopping = threading.Event()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is part of the tests."""

    def main(self, repo_id: str, kind: str = "models") -> dict[str, Blob]:
        """Files on main without `.gitattributes`."""
        repository = self.repositories.get((kind, repo_id))
        files = repository.files("main") if repository else {}
        return {name: blob for name, blob in files.items() if name != ".gitattributes"}

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repository:
        repository = Repository(private, {}, {})
        self.repositories[kind, repo_id] = repository
        self.commit(
            repository, "main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit"
        )
        return repository

    def commit(self, repository: Repository, branch: str, files: dict[str, Blob], message: str) -> str:
        text = json.dumps([len(repository.commits), message, sorted((n, b.oid) for n, b in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[sha] = files
        repository.refs[branch] = sha
        repository.messages.append(message)
        return sha


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **fields):
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.requests.append((self.command, path))
            hub.states += [frozenset(hub.main(name, kind)) for kind, name in hub.repositories]
            fault = next(
                (f for f in hub.faults if f.times and f.method == self.command and re.search(f.path, path)), None
            )
            if fault is not None:
                fault.times -= 1
        kind = fault.kind if fault is not None else None
        if kind == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if callable(kind):
            kind()
        elif kind == "hang":
            hub.stopping.wait(20)
            self.close_connection = True
            return
        elif kind == "500":
            return self._send(500, {"error": "made to fail"})
        elif kind == "html":
            return self._send(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
        elif kind == "echo":
            message = f"forbidden for {self.headers.get('Authorization')}"
            return self._send(403, {"error": message}, {"X-Error-Message": message})
        try:
            with hub.lock:
                status, content, headers = self._route(path, body)
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            return self._send(refusal.status, {"error": refusal.message, **refusal.fields}, headers)
        if kind == "lost":
            self.close_connection = True
            self.connection.close()
            return
        self._send(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Every route returns status, content and headers, or raises _Refusal.

    def _route(self, path: str, body: bytes):
        for pattern, route in _ROUTES:
            method, _, expression = pattern.partition(" ")
            if self.command in method.split("|") and (match := re.fullmatch(expression, path)):
                groups = match.groupdict()
                if "kind" in groups:
                    groups["kind"] = groups["kind"] or "models"
                return route(self, body, **{name: value for name, value in groups.items() if value is not None})
        raise _Refusal(404, f"no route for {self.command} {path}")

    def _allowed(self, write: bool = True, repository: Repository | None = None) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known and (write or (repository is not None and repository.private)):
            raise _Refusal(401, "Invalid username or password.")

    def _repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get((kind, repo))
        self._allowed(write, repository)
        if repository is None:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def whoami(self, body: bytes):
        self._allowed()
        return 200, {"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self, body: bytes):
        self._allowed()
        wish = json.loads(body)
        kind, name = f"{wish.get('type', 'model')}s", f"{wish['organization']}/{wish['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.server.repositories:
            raise _Refusal(409, "You already created this repo", url=url)
        self.server.create(kind, name, private=wish.get("visibility") == "private")
        return 200, {"url": url, "name": name}, {}

    def validate_yaml(self, body: bytes):
        try:
            card = ModelCard(json.loads(body)["content"])
        except Exception as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        missing = [] if card.data.get("license") else [{"message": "no license"}]
        return 200, {"errors": [], "warnings": missing}, {}

    def info(self, body: bytes, kind: str, repo: str, revision: str = "main"):
        repository = self._repository(kind, repo)
        files = repository.files(revision)
        if files is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        fields = {"id": repo, "private": repository.private, "sha": repository.sha(revision), "tags": []}
        fields["siblings"] = [{"rfilename": name} for name in files]
        if kind == "models" and "README.md" in files:
            data = ModelCard(files["README.md"].content.decode()).data
            fields |= {"pipeline_tag": data.get("pipeline_tag"), "library_name": data.get("library_name")}
        return 200, fields, {}

    def refs(self, body: bytes, kind: str, repo: str):
        refs = self._repository(kind, repo).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        return 200, {"branches": branches, "tags": [], "converts": []}, {}

    def branch(self, body: bytes, kind: str, repo: str, branch: str):
        repository = self._repository(kind, repo, write=True)
        if branch in repository.refs:
            raise _Refusal(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        return 200, {}, {}

    def preupload(self, body: bytes, kind: str, repo: str, revision: str):
        files = self._repository(kind, repo, write=True).files(revision) or {}
        answers = []
        for wish in json.loads(body)["files"]:
            name = wish["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            oid = files[name].oid if name in files else None
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def lfs_batch(self, body: bytes, kind: str, repo: str):
        self._repository(kind, repo, write=True)
        objects = []
        for wish in json.loads(body)["objects"]:
            answer = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.server.objects:
                url = f"{self.server.url}/lfs/{wish['oid']}?X-Amz-Signature=signed"
                answer["actions"] = {"upload": {"href": url}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "the content has another hash")
        self.server.objects[oid] = body
        self.server.uploads.append(oid)
        return 200, {}, {}

    def commit(self, body: bytes, kind: str, repo: str, revision: str):
        repository = self._repository(kind, repo, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repository.refs.get(revision)
        if parent is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        if header.get("parentCommit", parent) != parent:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Refusal(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = self.server.commit(repository, revision, files, header["summary"])
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self._page(kind, repo)}/commit/{sha}"}, {}

    def _page(self, kind: str, repo: str) -> str:
        return f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{repo}"

    def tree(self, body: bytes, kind: str, repo: str, revision: str, folder: str = ""):
        files = self._repository(kind, repo).files(revision)
        if files is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        recursive = "recursive=true" in self.path.lower()
        entries, folders = [], set()
        for name, blob in inside.items():
            parents = name[len(prefix) :].split("/")[:-1]
            folders |= {
                prefix + "/".join(parents[: i + 1]) for i in range(len(parents) if recursive else min(1, len(parents)))
            }
            if recursive or not parents:
                entries.append(_entry(name, blob))
        entries += [
            {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()} for name in folders
        ]
        return 200, entries, {}

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str):
        files = self._repository(kind, repo).files(revision)
        if files is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        wish = json.loads(body)["paths"] if body.startswith(b"{") else []
        answers = []
        for name in wish:
            if name in files:
                answers.append(_entry(name, files[name]))
            elif any(other.startswith(f"{name}/") for other in files):
                answers.append({"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()})
        return 200, answers, {}

    def resolve(self, body: bytes, repo: str, revision: str, name: str, kind: str):
        repository = self._repository(kind, repo)
        files = repository.files(revision)
        if files is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        if name not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        blob = files[name]
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": repository.sha(revision), "Accept-Ranges": "bytes"}
        wish = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wish is None:
            return 200, blob.content, headers
        start, end = int(wish[1]), min(int(wish[2] or len(blob.content) - 1), len(blob.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(blob.content)}"
        return 206, blob.content[start : end + 1], headers


def _entry(name: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (f"GET {_API}", _Handler.info),
    (f"GET {_API}/revision/(?P<revision>.+)", _Handler.info),
    (f"GET {_API}/refs", _Handler.refs),
    (f"POST {_API}/branch/(?P<branch>.+)", _Handler.branch),
    (f"POST {_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (f"POST {_API}/commit/(?P<revision>.+)", _Handler.commit),
    (f"GET {_API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    (f"POST {_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (rf"POST /(?:(?P<kind>datasets)/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (rf"GET|HEAD /(?:(?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
