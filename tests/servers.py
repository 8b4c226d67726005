"""Servers of S3 and GCS on loopback, each in a process of its own, and a proxy that fails on purpose."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL, Popen
from urllib.request import urlopen


S3 = "import sys; from moto.server import main; main(['-p', sys.argv[1], '-H', '127.0.0.1'])"
# With what tensorstore asks of GCS and the emulator does not know: ranges of names, the generation of a download, and
# conditions on it.
GCS = """
import http.server, sys, threading
from http import HTTPStatus
# Many requests at a time, and answers that do not wait for a packet to be full.
http.server.HTTPServer = http.server.ThreadingHTTPServer
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

server.RequestHandler.disable_nagle_algorithm = True
changing = threading.Lock()

def ls(request, response, storage, *args, original=objects.ls, **kwargs):
    first, last = (request.query.get(key, [None])[0] for key in ("startOffset", "endOffset"))
    send = response.json
    def in_range(tree):
        tree["items"] = [
            i for i in tree["items"] if (not first or i["name"] >= first) and (not last or i["name"] < last)
        ]
        send(tree)
    response.json = in_range
    original(request, response, storage, *args, **kwargs)

def generation(request, storage):
    name = request.params.get("object_id") or request.query["name"][0]
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except Exception:
        return "0"

def get(request, response, storage, *args, original=objects.get, **kwargs):
    unless = request.query.get("ifGenerationNotMatch", [None])[0]
    found = generation(request, storage)
    if unless is not None and unless == found:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    original(request, response, storage, *args, **kwargs)
    if response.status < 300:
        response["x-goog-generation"] = found

def conditional(original):
    def change(request, response, storage, *args, **kwargs):
        wanted = request.query.get("ifGenerationMatch", [None])[0]
        with changing:
            if wanted is not None and wanted != generation(request, storage):
                request.data
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            original(request, response, storage, *args, **kwargs)
    return change

own = {objects.ls: ls, objects.get: get, objects.download: get}
own |= {change: conditional(change) for change in (objects.insert, objects.delete)}
for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        handlers[method] = own.get(handler, handler)
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
threading.Event().wait()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(script: str) -> Iterator[int]:
    """A server in a process of its own, once it answers; its port."""
    port = free_port()
    server = Popen([sys.executable, "-c", script, str(port)], stdout=DEVNULL, stderr=DEVNULL)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 0.1).close()
            except OSError:
                threading.Event().wait(0.1)
            else:
                break
        else:
            raise RuntimeError("the server does not answer")
        yield port
    finally:
        server.kill()
        server.wait()


@contextmanager
def proxy(upstream: int, fault: Callable[[str, str], object]) -> Iterator[int]:
    """What stands between a client and a server, and answers itself what `fault(method, path)` says.

    That is None for an honest answer, a status and a body, or "cut" for a connection that ends in the middle.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            wrong = fault(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if wrong == "cut" and self.command in {"PUT", "POST"}:
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if isinstance(wrong, tuple):
                self.send(wrong[0], {}, wrong[1])
                return
            server = HTTPConnection("127.0.0.1", upstream)
            try:
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                found = answer.read()
            except (OSError, HTTPException):
                self.close_connection = True
                return
            finally:
                server.close()
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOPS}
            self.send(answer.status, headers, found, keep=len(found) // 2 if wrong == "cut" else None)

        def send(self, status: int, headers: dict[str, str], body: bytes, keep: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in {name.lower() for name in headers}:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:keep])
            self.close_connection = self.close_connection or keep is not None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that has gone is none of ours."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


_HOPS = frozenset({"connection", "date", "server", "transfer-encoding"})


class Bucket:
    """A bucket on one of the servers; `url` is its own."""

    def __init__(self, scheme: str, port: int) -> None:
        self.scheme = scheme
        self.port = port
        self.url = f"{scheme}://bucket"

    @property
    def place(self):
        from fusectl.formats.objects import ObjectPath

        return ObjectPath.parse(self.url)

    def clear(self) -> None:
        """Removes all objects: the emulators look at every one of them for each listing."""
        if self.scheme == "s3":
            import boto3

            boto3.resource("s3", region_name="us-east-1").Bucket("bucket").objects.all().delete()
        else:
            urlopen(f"http://127.0.0.1:{self.port}/wipe?keep-buckets=true", timeout=60).close()

    def put(self, path: object, to: str) -> str:
        """Puts all files below a directory there; the URL."""
        for file in (p for p in Path(str(path)).rglob("*") if p.is_file()):
            (self.place / to / str(file.relative_to(str(path)))).write_bytes(file.read_bytes())
        return f"{self.url}/{to}"

    def get(self, name: str, to: Path) -> Path:
        """Gets all objects below a name."""
        for file in (self.place / name).files():
            path = to / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((self.place / name / file).read_bytes())
        return to
