"""Checkpoints in buckets, read from real servers of S3 and GCS on loopback."""

import socket
import sys
import threading
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
from models import checkpoint as whole_checkpoint

from fusectl.errors import NotFound, StorageError
from fusectl.formats import FORMATS, fingerprint, locate, open_checkpoint
from fusectl.fsck import fsck
from fusectl.record import Fill
from fusectl.surgery import Options, carry_out, plan_fusion
from fusectl.verify import Settings, verify


S3 = "import sys; from moto.server import main; main(['-p', sys.argv[1], '-H', '127.0.0.1'])"
# With what tensorstore asks of GCS and the emulator does not know: ranges of names, and the generation of a download.
GCS = """
import sys, threading
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

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

def download(request, response, storage, *args, original=objects.download, **kwargs):
    original(request, response, storage, *args, **kwargs)
    if response.status < 300:
        stored = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = stored["generation"]

for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        handlers[method] = {objects.ls: ls, objects.download: download}.get(handler, handler)
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
threading.Event().wait()
"""


def checkpoint(at, **kwargs):
    """A model small enough for servers that answer a few hundred requests a second."""
    return whole_checkpoint(at, **{"layers": {"encoder": 1, "decoder": 1}, **kwargs})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(script, port):
    """A server in a process of its own, once it answers."""
    server = Popen([sys.executable, "-c", script, str(port)], stdout=DEVNULL, stderr=DEVNULL)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 0.1).close()
        except OSError:
            threading.Event().wait(0.1)
        else:
            return server
    raise RuntimeError("the server does not answer")


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def s3(environment):
    import boto3

    port = free_port()
    server = serve(S3, port)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        environment.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")

    def put(path, to):
        for file in (p for p in Path(path).rglob("*") if p.is_file()):
            client.put_object(Bucket="bucket", Key=f"{to}/{file.relative_to(path)}", Body=file.read_bytes())

    yield "s3", put
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def gcs(environment):
    import tensorstore as ts

    port = free_port()
    server = serve(GCS, port)
    environment.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    environment.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")

    def put(path, to):
        store = ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": f"{to}/"}).result()
        for file in (p for p in Path(path).rglob("*") if p.is_file()):
            store.write(str(file.relative_to(path)), file.read_bytes()).result()

    yield "gs", put
    server.kill()
    server.wait()


@pytest.fixture(scope="module", params=["s3", "gcs"])
def bucket(request):
    return request.getfixturevalue(request.param)


def contents(path):
    opened = open_checkpoint(str(path))
    return {name: opened.read(name).tobytes() for name in opened.leaves}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "t5x" else [pytest.mark.slow]) for form in FORMATS]
)
def test_sources_in_a_bucket_fuse_into_the_same(bucket, tmp_path, form):
    scheme, put = bucket
    if scheme == "gs" and FORMATS[form].ocdbt:
        pytest.skip("the emulator's generations are not those that tensorstore's databases need")
    local = [checkpoint(tmp_path / name, seed=i, format=form) for i, name in enumerate("ab")]
    remote = [f"{scheme}://bucket/{form}/{name}/1000" for name in "ab"]
    for path, url in zip(local, remote, strict=True):
        put(path, url.removeprefix(f"{scheme}://bucket/"))
    options = Options(fill=Fill("gaussian", 0.1))
    for paths, out in ((local, tmp_path / "local"), (remote, tmp_path / "remote")):
        plan, sources = plan_fusion(paths, options)
        carry_out(plan, sources, out)

    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert contents(remote[0]) == contents(local[0])
    report = verify(str(tmp_path / "remote"), settings=Settings(("files", "weights")))
    assert report.passed
    assert [source.path for source in report.record.sources] == remote
    assert fsck(remote[0]).problems == ()


def test_roots_items_and_latest_are_found(bucket, tmp_path):
    scheme, put = bucket
    for step in (10, 30):
        put(checkpoint(tmp_path / f"checkpoint_{step}"), f"runs/t5/checkpoint_{step}")
        put(checkpoint(tmp_path / f"{step}", format="orbax"), f"runs/orbax/{step}")
    put(checkpoint(tmp_path / "half", format="orbax"), "runs/orbax/40.orbax-checkpoint-tmp-7")

    assert str(locate(f"{scheme}://bucket/runs/t5").path).endswith("runs/t5/checkpoint_30")
    assert str(locate(f"{scheme}://bucket/runs/t5/latest/").path).endswith("checkpoint_30")
    assert locate(f"{scheme}://bucket/runs/orbax").step == 30
    assert locate(f"{scheme}://bucket/runs/orbax/10/state").item == "state"
    with pytest.raises(NotFound, match="no such directory") as error:
        locate(f"{scheme}://bucket/runs/t5/checkpoint_31")
    assert "checkpoint_30" in error.value.hint


def test_a_fingerprint_tells_another_index(bucket, tmp_path):
    scheme, put = bucket
    put(checkpoint(tmp_path / "a"), "prints/a")
    first = fingerprint(open_checkpoint(f"{scheme}://bucket/prints/a"))
    assert fingerprint(open_checkpoint(f"{scheme}://bucket/prints/a")) == first
    put(checkpoint(tmp_path / "b", layers={"encoder": 2, "decoder": 1}), "prints/a")
    assert fingerprint(open_checkpoint(f"{scheme}://bucket/prints/a")) != first


def test_a_missing_chunk_is_corrupt_and_named(bucket, tmp_path, fusectl):
    scheme, put = bucket
    path = checkpoint(tmp_path / "a", format="orbax-zarr3")
    victim = next(p for p in Path(path).rglob("c/0/0") if "target" in str(p) and "wo.kernel" in str(p))
    victim.unlink()
    put(path, "holes/1000")

    done = fusectl("self-fuse", f"{scheme}://bucket/holes/1000", "-o", tmp_path / "out")

    assert done.code == 5
    assert "wo.kernel/c/0/0" in done.err
    assert fsck(f"{scheme}://bucket/holes/1000").problems


def test_what_is_not_there_is_told(bucket, tmp_path, fusectl):
    scheme, _ = bucket
    done = fusectl("inspect", f"{scheme}://bucket/nothing")
    assert (done.code, "Traceback" in done.err) == (4, False), done.err
    done = fusectl("inspect", f"{scheme}://nobucket/a")
    # The emulator of GCS answers what GCS does not.
    assert (done.code, "Traceback" in done.err) == (4 if scheme == "s3" else 8, False), done.err


def test_a_server_that_is_gone_is_a_storage_error(monkeypatch, fusectl):
    from fusectl.formats import objects

    monkeypatch.setitem(objects._RETRIES, "max_retries", 1)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")

    with pytest.raises(StorageError):
        open_checkpoint("gs://bucket/a")
    assert fusectl("inspect", "gs://bucket/a").code == 8
