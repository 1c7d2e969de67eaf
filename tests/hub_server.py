"""A Hub on the loopback interface, of the standard library only, with just the routes that huggingface_hub calls.

    with hub_server() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})

Clients read their environment when huggingface_hub is imported, so each test process gets its own. Files live in
memory; a repository has one branch, `main`, and a new commit hash per commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r"(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
USER = "tester"


@dataclass
class Repo:
    """One repository: its files and what is stored as LFS."""

    name: str
    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def entry(self, path: str) -> dict:
        """A file as the tree and paths-info routes tell it."""
        content = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        info = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path in self.lfs:
            info["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return info

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """Files, and folders as entries of their own, below a folder."""
        prefix = folder + "/" if folder else ""
        entries = []
        for path in sorted(path for path in self.files if path.startswith(prefix)):
            first, _, rest = path.removeprefix(prefix).partition("/")
            if rest and not recursive:
                entries.append({"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40})
            else:
                entries.append(self.entry(path))
        return list({entry["path"]: entry for entry in entries}.values())

    def apply(self, operations: list[dict], blobs: dict[str, bytes]) -> None:
        """One commit."""
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
                self.lfs.discard(value["path"])
            elif key == "lfsFile":
                self.files[value["path"]] = blobs[value["oid"]]
                self.lfs.add(value["path"])
            elif key == "deletedFile":
                del self.files[value["path"]]
            elif key != "header":
                raise ValueError(f"the test Hub knows no operation {key!r}")
        self.commits += 1


@dataclass
class Hub:
    """What the test sees of the server."""

    url: str
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def environment(self, home: Path | str) -> dict[str, str]:
        """Variables of a client process whose cache is `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _refuse(self, code: str) -> None:
        self._send(b"{}", 404, X_Error_Code=code, X_Error_Message=code)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, body = unquote(url.path), self._read()
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                names = match.groupdict()
                repo = None
                if "id" in names:
                    repo = self.hub.repos.get(((names.pop("kind") or "models").rstrip("/"), names.pop("id")))
                    if repo is None:
                        return self._refuse("RepoNotFound")
                    if names.pop("rev", None) not in (None, "main", repo.sha):
                        return self._refuse("RevisionNotFound")
                return action(self, repo, body, parse_qs(url.query), **names)
        self.hub.refused.append(f"{self.command} {path}")
        self._refuse("RouteNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def whoami(self, repo, body, query) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def validate(self, repo, body, query) -> None:
        self._json({"errors": [], "warnings": []})

    def harnesses(self, repo, body, query) -> None:
        self._json({"standardEnvVars": [], "harnesses": {}})

    def create(self, repo, body, query) -> None:
        asked = json.loads(body)
        kind = asked.get("type", "model") + "s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = (kind, name) in self.hub.repos
        prefix = "" if kind == "models" else kind + "/"
        repo = self.hub.repos.setdefault((kind, name), Repo(name, f"{self.hub.url}/{prefix}{name}"))
        self._json({"url": repo.url, "name": name}, 409 if exists else 200)

    def preupload(self, repo, body, query) -> None:
        files = json.loads(body)["files"]
        lfs = (".safetensors", ".bin", ".parquet", "tokenizer.json")
        modes = [(f["path"], "lfs" if f["path"].endswith(lfs) else "regular") for f in files]
        self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})

    def lfs_batch(self, repo, body, query) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo, body, query, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "wrong sha256"}, 400)
        self.hub.blobs[oid] = body
        self._send()

    def commit(self, repo, body, query) -> None:
        repo.apply([json.loads(line) for line in body.splitlines() if line.strip()], self.hub.blobs)
        self._json({"commitUrl": f"{repo.url}/commit/{repo.sha}", "commitOid": repo.sha})

    def info(self, repo, body, query) -> None:
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        self._json({"id": repo.name, "sha": repo.sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo, body, query, folder: str | None) -> None:
        entries = repo.tree(folder or "", query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if folder and not entries:
            return self._refuse("EntryNotFound")
        self._json(entries)

    def paths_info(self, repo, body, query) -> None:
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        entries = [repo.entry(path) for path in asked["paths"] if path in repo.files]
        folders = [path for path in asked["paths"] if repo.tree(path, recursive=False)]
        self._json(entries + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders])

    def resolve(self, repo, body, query, path: str) -> None:
        if path not in repo.files:
            return self._refuse("EntryNotFound")
        content, entry = repo.files[path], repo.entry(path)
        headers = {"X_Repo_Commit": repo.sha, "ETag": f'"{entry["oid"]}"', "Accept_Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X_Linked_Etag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(content[start : end + 1], 206, **headers)
        self._send(content, **headers, Content_Length=str(len(content)))


_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", r"/api/agent-harnesses", _Handler.harnesses),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/{REPO}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/{REPO}/commit/(?P<rev>[^/]+)", _Handler.commit),
    ("POST", r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/api/{REPO}(/revision/(?P<rev>[^/]+))?", _Handler.info),
    ("GET", rf"/api/{REPO}/tree/(?P<rev>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/{REPO}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    ("GET HEAD", r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a Hub on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
