"""A Hub in the tests: what huggingface_hub's real client asks for, answered in memory over a real socket.

Models only, LFS only (no Xet): whoami, create, model info, refs, branch, tag, tree, preupload, LFS batch, PUT and
verify, commit, resolve, validate-yaml. Faults can be switched on: `fail`, `cut`, `lose_answer`.

Tests in this process take the fixture `hub`; other processes are started with `hub.environment(folder)`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ERROR_CODES = {"repository": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


@dataclass
class Repo:
    """A model's repository: its commits, oldest first, each as (sha, summary, files), and the names of some."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, summary: str, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {summary}".encode()).hexdigest()
        self.commits.append((sha, summary, files))
        self.branches[branch] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.at("main")[1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        wanted = {**self.tags, **self.branches}.get(revision, revision)
        return next(((sha, files) for sha, _, files in self.commits if sha == wanted), None)


@dataclass
class Fault:
    """Something that befalls the next `times` requests whose "METHOD path" matches `pattern`."""

    kind: str
    pattern: str
    times: int
    status: int = 0
    headers: dict = field(default_factory=dict)


class Refusal(Exception):
    """Ends a request with a status other than 200; `content` joins the error in the answer."""

    def __init__(self, status: int, message: str, content: dict | None = None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = {"error": message, "errors": [{"message": message}], **(content or {})}


def not_found(what: str) -> Refusal:
    return Refusal(404, f"{what} not found", X_Error_Code=ERROR_CODES[what])


class HubStandIn:
    """The server, a context manager. `repos`, `requests` ("METHOD path" in order) and `lfs` may be looked at."""

    WRITER, READER = "hf_writer" + 28 * "w", "hf_reader" + 28 * "r"  # tokens of the user "me"

    def __init__(self):
        self.tokens = {self.WRITER: ("me", "write"), self.READER: ("me", "read")}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.waits: list[float] = []  # filled by the fixture: seconds that this process would have slept

    def __enter__(self) -> "HubStandIn":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder, token: str = WRITER) -> dict[str, str]:
        """Variables for another process, which then keeps its cache and login in `folder`."""
        mine = {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(folder), "NO_PROXY": "127.0.0.1"}
        return {**os.environ, **mine, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

    def add_repo(self, repo_id: str, private: bool = False, **files: bytes) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repo

    # Faults; `pattern` is a regular expression for "METHOD path".

    def fail(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer with a status, 429 or 503 say; headers such as Retry_After="7"."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault("fail", pattern, times, status, headers))

    def cut(self, pattern: str, times: int = 1) -> None:
        """Reset the connection in the middle of the request's body."""
        self.faults.append(Fault("cut", pattern, times))

    def lose_answer(self, pattern: str, times: int = 1) -> None:
        """Do as asked, and hang up without a word."""
        self.faults.append(Fault("lose", pattern, times))

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        self.path = urlsplit(self.path).path  # quoted: a branch's name may hold a slash
        fault = self.hub.next_fault(f"{self.command} {unquote(self.path)}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind == "cut":
            self.rfile.read1(length // 2 or 1000)
            return self.hang_up()
        self.body = self.read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        self.body = self.body or self.rfile.read(length)
        if fault and fault.kind == "fail":
            return self.answer(fault.status, json.dumps({"error": "a fault of the test"}).encode(), fault.headers)
        try:
            with self.hub.lock:
                content, headers = self.dispatch()
            status = 200
        except Refusal as refusal:
            status, content, headers = refusal.status, refusal.content, refusal.headers
        if fault and fault.kind == "lose":
            return self.hang_up()
        self.answer(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def hang_up(self) -> None:
        """A reset rather than an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what.

    def dispatch(self):
        """(content, headers) of the answer, content being bytes or something for JSON."""
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path}"):
                result = method(self, *map(unquote, match.groups()))
                return result if isinstance(result, tuple) else (result, {})
        raise Refusal(404, "no such page")

    def user(self) -> tuple[str | None, str | None]:
        """(name, role) of the token; a request without one is nobody's."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        name, role = self.user()
        owner = repo_id.split("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and name != owner):
            raise not_found("repository")
        if write and (name, role) != (owner, "write"):
            raise Refusal(403, "Authorization error: you may not write here")
        return repo

    def revision(self, repo_id: str, revision: str, write: bool = False) -> tuple[str, dict[str, bytes]]:
        found = self.repo(repo_id, write).at(revision)
        if found is None:
            raise not_found("revision")
        return found

    def json(self) -> dict:
        return json.loads(self.body)

    # Answers, in the order in which a push and a download ask.

    def whoami(self):
        name, role = self.user()
        if name is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}}

    def create(self):
        name, role = self.user()
        wanted = self.json()
        owner = wanted["organization"] or name
        repo_id = f"{owner}/{wanted['name']}"
        if (name, role) != (owner, "write"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", answer)
        self.hub.add_repo(repo_id, private=wanted.get("visibility") == "private")
        return answer

    def info(self, repo_id: str, revision: str = "main"):
        sha, files = self.revision(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo_id, "sha": sha, "private": self.repo(repo_id).private, "siblings": siblings, "tags": []}

    def refs(self, repo_id: str):
        repo = self.repo(repo_id)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        return {"converts": []} | {
            kind: [{"name": name, "ref": f"refs/{short}/{name}", "targetCommit": sha} for name, sha in named.items()]
            for kind, (short, named) in kinds.items()
        }

    def branch(self, repo_id: str, name: str):
        sha, _ = self.revision(repo_id, self.json().get("startingPoint", "main"), write=True)
        if name in self.repo(repo_id).branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        self.repo(repo_id).branches[name] = sha
        return {}

    def tag(self, repo_id: str, revision: str):
        sha, _ = self.revision(repo_id, revision, write=True)
        name = self.json()["tag"]
        if name in self.repo(repo_id).tags:
            raise Refusal(409, f"Reference already exists: refs/tags/{name}")
        self.repo(repo_id).tags[name] = sha
        return {}

    def tree(self, repo_id: str, revision: str):
        _, files = self.revision(repo_id, revision)
        return [self.entry(path, content) for path, content in sorted(files.items())]

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_lfs(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def validate_yaml(self):
        head = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        try:
            data = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            raise Refusal(400, f"bad YAML: {error}") from error
        if wrong := [name for name in ("license", "pipeline_tag") if not isinstance(data.get(name, ""), str)]:
            raise Refusal(400, f'"{wrong[0]}" must be a string')
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def preupload(self, repo_id: str, revision: str):
        _, files = self.revision(repo_id, revision, write=True)
        answers = []
        for wanted in self.json()["files"]:
            path, there = wanted["path"], files.get(wanted["path"])
            oid = None if there is None else (hashlib.sha256(there).hexdigest() if is_lfs(path) else git_oid(there))
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, repo_id: str):
        self.repo(repo_id, write=True)
        objects = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this sha256")
        self.hub.lfs[oid] = self.body
        return {}

    def lfs_verify(self, oid: str):
        if len(self.hub.lfs.get(oid, b"")) != self.json()["size"]:
            raise Refusal(404, "no such object")
        return {}

    def commit(self, repo_id: str, revision: str):
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise not_found("revision")
        files, summary = dict(repo.at(revision)[1]), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", X_Error_Code="EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {key}")
        sha = repo.commit(summary, files, revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}

    def resolve(self, repo_id: str, revision: str, path: str):
        sha, files = self.revision(repo_id, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = files[path]
        oid = hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)}
        return content, headers


ID = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (rf"GET /api/models/{ID}", Handler.info),
    (rf"GET /api/models/{ID}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{ID}/refs", Handler.refs),
    (rf"POST /api/models/{ID}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models/{ID}/tag/([^/]+)", Handler.tag),
    (rf"GET /api/models/{ID}/tree/([^/]+)", Handler.tree),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (r"POST /lfs/(\w+)/verify", Handler.lfs_verify),
    (rf"POST /api/models/{ID}/commit/([^/]+)", Handler.commit),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with huggingface_hub of this process turned to it: logged in as "me", and never sleeping.

    huggingface_hub reads its environment when it is imported, which was long ago, hence the constants.
    """
    from huggingface_hub import close_session, constants, hf_api

    with HubStandIn() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", stand_in.url)  # behind `huggingface_hub.model_info` and the like
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents.json"), raising=False)
        monkeypatch.setenv("HF_TOKEN", stand_in.WRITER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", stand_in.waits.append)
        close_session()  # another test's connections, and the proxies that it knew
        yield stand_in
        close_session()
