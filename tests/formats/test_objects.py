"""Checkpoints in buckets, read from real servers of S3 and GCS on loopback."""

from pathlib import Path

import pytest
import servers
from cases import diagonals
from models import checkpoint as whole_checkpoint
from models import contents

from fusectl.errors import NotFound, StorageError
from fusectl.formats.locate import locate
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.inspection.fsck import fsck
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


def checkpoint(at, **kwargs):
    """A model small enough for servers that answer a few hundred requests a second."""
    return whole_checkpoint(at, **{"layers": {"encoder": 1, "decoder": 1}, **kwargs})


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bucket"), diagonals(list(FORMATS), ["s3", "gcs"]), indirect=["bucket"])
def test_sources_in_a_bucket_fuse_into_the_same(bucket, tmp_path, form):
    local = [checkpoint(tmp_path / name, seed=i, format=form) for i, name in enumerate("ab")]
    remote = [bucket.put(path, f"{form}/{name}/1000") for path, name in zip(local, "ab", strict=True)]
    options = Options(fill=Fill("gaussian", 0.1), optimizer="drop")
    for paths, out in ((local, tmp_path / "local"), (remote, tmp_path / "remote")):
        plan, sources = plan_fusion(paths, options)
        carry_out(plan, sources, out)

    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert contents(remote[0]) == contents(local[0])
    report = verify(str(tmp_path / "remote"), settings=Settings(("files", "weights"), named=tuple(remote)))
    assert report.passed
    assert [source.path for source in report.record.sources] == remote
    assert fsck(remote[0]).problems == ()


def test_roots_items_and_latest_are_found(bucket, tmp_path):
    for step in (10, 30):
        bucket.put(checkpoint(tmp_path / f"checkpoint_{step}"), f"runs/t5/checkpoint_{step}")
        bucket.put(checkpoint(tmp_path / f"{step}", format="orbax"), f"runs/orbax/{step}")
    bucket.put(checkpoint(tmp_path / "half", format="orbax"), "runs/orbax/40.orbax-checkpoint-tmp-7")

    assert str(locate(f"{bucket.url}/runs/t5").path).endswith("runs/t5/checkpoint_30")
    assert str(locate(f"{bucket.url}/runs/t5/latest/").path).endswith("checkpoint_30")
    assert locate(f"{bucket.url}/runs/orbax").step == 30
    assert locate(f"{bucket.url}/runs/orbax/10/state").item == "state"
    with pytest.raises(NotFound, match="no such directory") as error:
        locate(f"{bucket.url}/runs/t5/checkpoint_31")
    assert "checkpoint_30" in error.value.hint


@pytest.mark.slow
def test_a_fingerprint_tells_another_index(bucket, tmp_path):
    bucket.put(checkpoint(tmp_path / "a"), "prints/a")
    first = fingerprint(open_checkpoint(f"{bucket.url}/prints/a"))
    assert fingerprint(open_checkpoint(f"{bucket.url}/prints/a")) == first
    bucket.put(checkpoint(tmp_path / "b", layers={"encoder": 2, "decoder": 1}), "prints/a")
    assert fingerprint(open_checkpoint(f"{bucket.url}/prints/a")) != first


@pytest.mark.slow
def test_a_missing_chunk_is_corrupt_and_named(bucket, tmp_path, fusectl):
    path = checkpoint(tmp_path / "a", format="orbax-zarr3")
    victim = next(p for p in Path(path).rglob("c/0/0") if "target" in str(p) and "wo.kernel" in str(p))
    victim.unlink()
    bucket.put(path, "holes/1000")

    done = fusectl("self-fuse", f"{bucket.url}/holes/1000", "-o", tmp_path / "out")

    assert done.code == 5
    assert "wo.kernel/c/0/0" in done.err
    assert fsck(f"{bucket.url}/holes/1000").problems


def test_what_is_not_there_is_told(bucket, tmp_path, fusectl):
    done = fusectl("inspect", f"{bucket.url}/nothing")
    assert (done.code, "Traceback" in done.err) == (4, False), done.err
    done = fusectl("inspect", f"{bucket.scheme}://nobucket/a")
    # The emulator of GCS answers what GCS does not.
    assert (done.code, "Traceback" in done.err) == (4 if bucket.scheme == "s3" else 8, False), done.err


@pytest.mark.slow
def test_a_server_that_is_gone_is_a_storage_error(monkeypatch, fusectl):
    from fusectl.formats import objects

    monkeypatch.setitem(objects._RETRIES, "max_retries", 1)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{servers.free_port()}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")

    with pytest.raises(StorageError):
        open_checkpoint("gs://bucket/a")
    assert fusectl("inspect", "gs://bucket/a").code == 8
