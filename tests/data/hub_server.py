"""A server on this machine that speaks the hub's protocol to the real client, and misbehaves on request.

`/datasets/REPO/resolve/...` answers as the hub does, with a redirect to the file's bytes under another host name, where
ranges work. Everything else is what huggingface_hub asks for before it.
"""

import hashlib
import io
import json
import random
import re
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.hub.download import Download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens once instead of the right response.

    The connection breaks after `first` bytes; a `status` with `headers`; `wrong` bytes; `stall` seconds of silence; the
    `whole` file, whatever range was requested.
    """

    first: int | None = None
    status: int | None = None
    headers: dict = field(default_factory=dict)
    wrong: bool = False
    stall: float = 0.0
    whole: bool = False


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.files: dict[str, bytes] = {}  # outside the hub, by path
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)  # by the end of the path: for the bytes of a file,
        self.early: dict[str, deque[Fault]] = defaultdict(deque)  # and for the requests before that
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.tokens: list[tuple[str, str]] = []  # method and path of requests with a token
        self.gate = threading.Event()  # while not set, the bytes of files named in `held` are not sent
        self.held: set[str] = set()
        self.seconds_per_piece = 0.0
        self.by_digest: dict[str, str] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, name: str) -> list[str | None]:
        """The ranges of a file's bytes that were requested, in order."""
        return [ranges for method, path, ranges in self.asked if method == "GET" and path.endswith(name)]

    def handle_error(self, request, client_address):
        pass  # some tests close the connection


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        if "Authorization" in self.headers:
            self.server.tokens.append((self.command, path))
        if api := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            return self._listing(path, api[1], api[2])
        if file := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            return self._resolve(path, *file.groups())
        if path in self.server.files:
            return self._bytes(path, self.server.files[path])
        digest, _, name = path.removeprefix("/cdn/").partition("/")
        for files in self.server.repos.values():
            for data in (data for file, data in files.items() if file == name):
                if hashlib.sha256(data).hexdigest() == digest:
                    return self._bytes(path, data)
        self._send(404, b"")

    def _listing(self, path, repo, revision):
        self.server.asked.append((self.command, path, None))
        if self._early(path):
            return
        if repo not in self.server.repos or revision not in (None, COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in sorted(self.server.repos[repo])]
        body = json.dumps({"_id": "0", "id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _resolve(self, path, repo, revision, name):
        if self.command == "HEAD":
            self.server.asked.append(("HEAD", path, None))
            if self._early(path):
                return
        data = self.server.repos.get(repo, {}).get(name)
        if data is None or revision != COMMIT:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        digest = hashlib.sha256(data).hexdigest()
        self._send(302, b"", {
            "Location": f"http://localhost:{self.server.server_port}/cdn/{digest}/{name}",
            "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
            "ETag": '"of the redirect"',
        })  # fmt: skip

    def _early(self, path) -> bool:
        for name, faults in self.server.early.items():
            if path.endswith(name) and faults:
                fault = faults.popleft()
                self._send(fault.status, b"busy", fault.headers)
                return True
        return False

    def _bytes(self, path, data):
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, path, asked))
        fault = Fault()
        for name, faults in self.server.faults.items():
            if path.endswith(name) and faults:
                fault = faults.popleft()
        if fault.status is not None:
            return self._send(fault.status, b"busy", fault.headers)
        if fault.wrong:
            data = bytes(len(data))
        start = 0 if asked is None or fault.whole else int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if any(path.endswith(name) for name in self.server.held):
            self.server.gate.wait(30)
        stop = len(data) if fault.first is None else start + fault.first
        for at in range(start, stop, 1 << 14):
            self.wfile.write(data[at : min(stop, at + (1 << 14))])
            time.sleep(self.server.seconds_per_piece)
        if fault.stall:
            self.wfile.flush()
            time.sleep(fault.stall)
        if fault.first is not None or fault.stall:
            self.close_connection = True

    def _send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def parquet(columns: dict, **options) -> bytes:
    """A parquet file of these columns."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


TEXT = "fineweb-edu"
REPO, LAST = "karpathy/fineweb-edu-100b-shuffle", "shard_01822.parquet"
WORDS = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat"], k=200_000)


def shard(number: int) -> bytes:
    texts = [f"{number} {i} " + " ".join(WORDS[i * 40 : i * 40 + 200]) for i in range(400)]
    return parquet({"text": texts}, row_group_size=100, compression=None, use_dictionary=False)


SHARDS = {f"shard_{i:05d}.parquet": shard(i) for i in range(3)} | {LAST: shard(1822)}


def get(folder, *entries, said=None, **options):
    """Downloads, and returns the finished Download."""
    say = (lambda line: None) if said is None else said.append
    download = Download(folder, parse_requests(entries), say=say, **{"backoff": 0.01, "patience": 3} | options)
    download.run()
    return download
