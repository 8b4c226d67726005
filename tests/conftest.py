"""Fixtures that all tests share: checkpoints that T5X wrote, the program as a function, and as a process."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import servers


# Before JAX is imported anywhere: the tests restore onto a mesh of eight CPU devices.
# Compiling the small networks costs more than running them, and optimising them most of all.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Compiles twice as fast. XLA aborts for flags that it does not know, and this one may go.
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers and processes of the program compile the same networks.
COMPILED = Path(tempfile.gettempdir()) / f"fusectl-tests-compiled-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Most tests write thousands of files of a few bytes: in memory in half of the time that a disk takes.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

DATA = Path(__file__).parent / "data"
MOST_MAPPINGS = 15_000


@pytest.fixture(scope="module", autouse=True)
def _compiled_networks_are_dropped():
    """Without it a worker ends in a segmentation fault, one time in five.

    Every compiled network holds some ten mappings of memory, Linux gives a process 65,530, and XLA does not notice when
    there are no more: a worker that ran half of the slow tests held 49,042, and 6.4 GB.
    """
    yield
    if "jax" in sys.modules and Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """What the real T5X wrote after 20 steps, VARIANT/seedN/{legacy,orbax}/checkpoint_20, and its network's logits."""
    root = tmp_path_factory.mktemp("written")
    with tarfile.open(DATA / "t5x-written.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / "t5x-written"


@pytest.fixture(scope="session")
def decoders(tmp_path_factory) -> Path:
    """What MaxText wrote, maxtext-written/llama2_scanned/seedN/2, and what the gemma package did, with its logits."""
    root = tmp_path_factory.mktemp("decoders")
    with tarfile.open(DATA / "decoders-written.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="session")
def logits(tmp_path_factory) -> Path:
    """Networks of MaxText's and of the gemma package's with their configs, parameters, tokens and logits:
    maxtext/CASE/{config.json,model.npz}, gemma/CASE/{config.json,logits.npz,params,…}; training states that MaxText
    wrote, maxtext-trained/CASE; and the trees of its other blocks, refused/BLOCK.json.
    """
    root = tmp_path_factory.mktemp("logits")
    with tarfile.open(DATA / "decoders-logits.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / "decoders-more"


@pytest.fixture(scope="session")
def posttrained(tmp_path_factory) -> Path:
    """Models of MaxText's that Tunix's checkpoint manager saved: that of 2026-08 sft_unscanned/7, without the item of
    the optimizer's state, 0.1.7 rl_scanned/7, with that item's indexes alone; MaxText's tokens and logits for the
    second in rl_scanned/forward.npz.
    """
    root = tmp_path_factory.mktemp("posttrained")
    with tarfile.open(DATA / "maxtext-posttrained.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / "posttrained"


@pytest.fixture
def sources(written) -> list[str]:
    """Two T5 1.1 models, one in each of T5X's formats."""
    return [str(written / "t5_1_1/seed0/legacy/checkpoint_20"), str(written / "t5_1_1/seed1/orbax/checkpoint_20")]


def pytest_collection_finish():
    """Collecting five thousand tests leaves a million objects, which need not be looked at again; tracing a network
    makes many more that live shortly. This saved 4 % of the CPU of three files.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def fusectl(capfd):
    """Runs the program in this process: fusectl("inspect", path) -> Outcome."""
    from fusectl.cli import run

    def call(*argv: object) -> Outcome:
        capfd.readouterr()
        code = run([str(word) for word in argv])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def s3_server(environment):
    import boto3

    with servers.serve(servers.S3) as port:
        settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in settings.items():
            environment.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield servers.Bucket("s3", port)


@pytest.fixture
def s3(s3_server):
    """A bucket of S3, empty."""
    yield s3_server
    s3_server.clear()


@pytest.fixture(scope="session")
def gcs_server(environment):
    with servers.serve(servers.GCS) as port:
        environment.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        environment.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield servers.Bucket("gs", port)


@pytest.fixture
def gcs(gcs_server):
    """A bucket of GCS, empty."""
    yield gcs_server
    gcs_server.clear()


@pytest.fixture(params=["s3", pytest.param("gcs", marks=pytest.mark.slow)])
def bucket(request):
    return request.getfixturevalue(request.param)


def process(*argv: object, **kwargs) -> subprocess.CompletedProcess[str]:
    """Runs the program as a process of its own."""
    command = [sys.executable, "-m", "fusectl", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)
