"""A stand-in for the Hugging Face hub on loopback: what its client asks for to create, commit and fetch models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of-the-stand-in"
Files = dict[str, bytes]


@dataclass
class Repository:
    """One model: its commits, the oldest first, and who may read it."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, Files]] = field(default_factory=list)

    def commit(self, files: Files) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((digest, files))
        return digest

    def at(self, revision: str) -> tuple[str, Files] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """repositories: by USER/NAME; asked: every request as "METHOD /path"; uploads: contents by SHA-256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.lose_uploads = False  # refuse the contents of large files


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def reply(self, code: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: int, error: str = "", message: str = "", **headers: str) -> None:
        headers |= {"X_Error_Code": error} if error else {}
        self.reply(code, {"error": message}, **headers, X_Error_Message=message)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository | None:
        """The repository, if the client may read it; otherwise a refusal has been sent."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
        elif found.gated:
            self.refuse(403 if self.known else 401, "GatedRepo", "Access to this model is restricted")
        else:
            return found
        return None

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if (repository := self.repository(found[1])) is None:
                return
            if (commit := repository.at(found[2] or "main")) is None:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            siblings = [{"rfilename": name} for name in commit[1]]
            about = {"id": found[1], "sha": commit[0], "private": repository.private, "siblings": siblings}
            return self.reply(200, about | {"tags": [], "downloads": 0})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (repository := self.repository(found[1])) is None:
                return
            if (commit := repository.at(found[2])) is None:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            if found[3] not in commit[1]:
                return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit[0])
            content = commit[1][found[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.reply(200, content, ETag=etag, X_Repo_Commit=commit[0])
        self.refuse(404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.asked.append(f"PUT {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.lose_uploads:
            return self.refuse(403, message="the storage says no")
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self.reply(200)

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.known:
            return self.refuse(401, message="Invalid username or password.")
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self.reply(
                    409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
                )
            made = self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.reply(200, {"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            front = yaml.safe_load(content.split("---\n")[1])
            known = isinstance(front.get("license"), str) and all(front.get("base_model") or [""])
            errors = [] if known else [{"message": '"license" must be one of [apache-2.0, ...]'}]
            return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.server.url}/storage/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        self.refuse(404)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        before, files = repository.commits[-1]
        files = dict(files)
        for line in lines:
            about = line["value"]
            if line["key"] == "header" and about.get("parentCommit") not in (None, before):
                return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[about["path"]] = base64.b64decode(about["content"])
            if line["key"] == "lfsFile":
                files[about["path"]] = self.server.uploads[about["oid"]]
        digest = repository.commit(files)
        self.reply(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{digest}", "commitOid": digest, "success": True}
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
