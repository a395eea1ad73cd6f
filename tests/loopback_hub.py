"""A local hub: serves data sets from a folder through the part of huggingface.co's API that reading them needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@contextmanager
def serving_requests(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on 127.0.0.1 until the block ends; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving_datasets(folder: Path) -> Iterator[str]:
    """Serve each ``folder/<owner>/<name>/`` as a data set, all at one commit; yields the address."""
    with serving_requests(type("Handler", (DatasetsHandler,), {"folder": folder})) as address:
        yield address


class DatasetsHandler(BaseHTTPRequestHandler):
    """Serves the data sets in ``folder``."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(unquote(urlsplit(self.path).path).strip("/").split("/"))

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner, name = unquote(self.path).strip("/").split("/")[2:4]
        repo = self.folder / owner / name
        self.as_json([entry(repo, repo / path) for path in asked["paths"] if (repo / path).exists()])

    def answer(self, parts):
        if parts == [""]:
            self.send(b"")
        elif parts[:2] == ["api", "datasets"]:
            self.describe(self.folder / parts[2] / parts[3], parts[4:])
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self.give(self.folder / parts[1] / parts[2] / "/".join(parts[5:]))
        else:
            self.send(b"", 404)

    def describe(self, repo, rest):
        if not repo.is_dir():
            self.send(b"", 404)
        elif rest[:1] == ["tree"]:
            below = repo / "/".join(rest[2:])
            found = sorted(path for path in below.rglob("*"))
            self.as_json([entry(repo, path) for path in found]) if below.is_dir() else self.send(b"", 404)
        elif not rest or rest[0] == "revision":
            files = [{"rfilename": str(path.relative_to(repo))} for path in repo.rglob("*") if path.is_file()]
            known = {"id": f"{repo.parent.name}/{repo.name}", "sha": COMMIT, "siblings": files, "tags": []}
            self.as_json(known | {"private": False, "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        else:
            self.send(b"", 404)

    def give(self, path):
        if not path.is_file():
            self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        kept = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send(part, 206 if "Range" in self.headers else 200, kept)

    def as_json(self, value):
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(repo: Path, path: Path) -> dict[str, object]:
    """Return the hub's description of a file or a folder."""
    name = str(path.relative_to(repo))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}
