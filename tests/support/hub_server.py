"""A server on this machine that speaks the part of the Hub's HTTP protocol that an upload needs (Xet apart)."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_only_for_this_test"


class Hub:
    """Repositories in memory. `fail`: answers (path part → list of status codes) given before the true one."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: dict[str, list[int]] = {}
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, part: str) -> list[tuple[str, str]]:
        return [one for one in self.requests if part in one[1]]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found: dict[str, bytes] = self.repos[repo]["branches"][branch]
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, verb: str) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        with self.hub.lock:
            self.hub.requests.append((verb, self.path))
            for part, codes in self.hub.fail.items():
                if part in path and codes:
                    return self._answer(codes.pop(0), {"error": "so the test wants it"})
            if verb in ("POST",) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid username or password."})
            self._serve(verb, path, body)

    def _serve(self, verb: str, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                return self._answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repos[name] = {
                "private": asked.get("visibility", "private" if asked.get("private") else "public") == "private",
                "branches": {"main": {}},
                "pulls": 0,
            }
            return self._answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.startswith("/api/models/"):
            _, _, _, owner, name, kind, *rest = [*path.split("/"), "info"]
            return self._repo(f"{owner}/{name}", kind, "/".join(rest[:-1]).replace("%2F", "/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(body)["objects"]:
                there = one["oid"] in hub.blobs
                upload = {} if there else {"actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                objects.append({**one, **upload})
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if verb == "PUT" and path.startswith("/blob/"):
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return self._answer(400, {"error": "not the content that was announced"})
            hub.blobs[oid] = body
            return self._answer(200, {})
        if "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            branch, _, name = rest.partition("/")
            branches = hub.repos.get(repo, {}).get("branches")
            content = (branches or {}).get(branch, {}).get(name)
            if content is None:
                missing = "RepoNotFound" if branches is None else "EntryNotFound"
                if branches is not None and branch not in branches:
                    missing = "RevisionNotFound"
                return self._answer(404, {"error": "not there"}, {"X-Error-Code": missing})
            digest = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": "0" * 40})
        return self._answer(404, {"error": f"the test server does not know {path}"})

    def _repo(self, repo: str, kind: str, revision: str, body: bytes) -> None:
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        state = self.hub.repos[repo]
        if kind == "info":
            return self._answer(200, {"id": repo, "private": state["private"]})
        if kind == "branch":
            if revision in state["branches"]:
                return self._answer(409, {"error": "Reference already exists"})
            state["branches"][revision] = dict(state["branches"]["main"])
            return self._answer(200, {})
        if kind == "preupload":
            files = json.loads(body)["files"]
            large = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self._answer(200, {"files": large})
        if kind == "commit":
            return self._commit(repo, state, revision, body)
        return self._answer(404, {"error": f"the test server does not know {kind}"})

    def _commit(self, repo: str, state: dict[str, Any], revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        if "create_pr=1" in self.path:
            state["pulls"] += 1
            revision = f"refs/pr/{state['pulls']}"
            state["branches"][revision] = {}
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{state['pulls']}"
        state["branches"][revision].update(files)
        return self._answer(200, answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
