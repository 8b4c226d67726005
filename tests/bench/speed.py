"""How fast fusectl is, against `cp -r` and against restoring, np.block and saving with Orbax. A benchmark, not a test.

    python tests/bench/speed.py --parameters 400M --repeats 3 --json speed.json
    python tests/bench/speed.py --growth 10M,30M,100M,300M,1B,3B

Makes its own sources: two T5 1.1 models with random weights, as T5X stores them (gzip, chunks of at most 64 MiB),
without a codec, and as Orbax itself saves them. Every case is a process of its own, start-up included; all are run in
turn, as often as asked for, and the medians of the ratios are printed, since the machine's speed varies more than they
do. Sources are in the page cache. "synced": with everything flushed to the disk, `sync -f` after cp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import deflate
import numpy as np
from rich.console import Console
from rich.table import Table

from fusectl.formats.encoding import Encoding
from fusectl.formats.registry import format_named
from fusectl.formats.sink import NewTensor, Sink
from fusectl.formats.staging import staged
from fusectl.formats.tree import dict_keys
from fusectl.formats.zarr import new_storage
from fusectl.layout.blocks import slices, tiles


CHUNK_BYTES = 64 << 20
UNITS = {"M": 10**6, "B": 10**9}

# What each process runs: its peak of resident memory goes to the file that is named first.
MEASURED = """
import sys
from fusectl.system.memory import peak_rss_bytes
report = sys.argv.pop(1)
try:
    {body}
finally:
    open(report, "w").write(str(peak_rss_bytes()))
"""
FUSECTL = MEASURED.format(body="from fusectl.cli import run; code = run(sys.argv[1:]); assert code == 0, code")
# What a user would do without fusectl: both models in memory, block by block, and one save.
TODAY = MEASURED.format(
    body="""
    import jax, numpy as np, orbax.checkpoint as ocp
    a, b = (ocp.PyTreeCheckpointer().restore(path) for path in sys.argv[1:3])

    def fused(path, x, y):
        name = jax.tree_util.keystr(path)
        if "step" in name:
            return x
        if "embedding" in name:
            return np.concatenate([x, y], 1)
        if "logits" in name:
            return np.concatenate([x / 2, y / 2], 0)
        if x.ndim == 1 or "rel_embedding" in name:
            return np.concatenate([x, y], 0)
        zeros = [np.zeros((m.shape[0], n.shape[1]), x.dtype) for m, n in ((x, y), (y, x))]
        return np.block([[x, zeros[0]], [zeros[1], y]])

    ocp.PyTreeCheckpointer().save(sys.argv[3], jax.tree_util.tree_map_with_path(fused, a, b))
"""
)


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a T5 1.1 model of about so many parameters: wider and deeper, as the published ones are."""
    widths = [(128, 8), (256, 8), (512, 8), (1024, 12), (2048, 16), (4096, 12)]
    return min(
        (_shapes(d, layers) for d, most in widths for layers in range(1, most * 4)),
        key=lambda tree: abs(sum(map(np.prod, tree.values())) - parameters),
    )


def _shapes(d: int, layers: int, vocab: int = 32128) -> dict[str, tuple[int, ...]]:
    mlp, heads = d * 11 // 4, d // 64
    tree = {"token_embedder/embedding": (vocab, d), "decoder/logits_dense/kernel": (d, vocab)}
    attentions = {"encoder": ("attention",), "decoder": ("self_attention", "encoder_decoder_attention")}
    norms = {"encoder": ("attention", "mlp"), "decoder": ("self_attention", "cross_attention", "mlp")}
    for stack in ("encoder", "decoder"):
        tree[f"{stack}/{stack}_norm/scale"] = (d,)
        tree[f"{stack}/relpos_bias/rel_embedding"] = (heads, 32)
        for layer in range(layers):
            at = f"{stack}/layers_{layer}"
            for attention in attentions[stack]:
                tree.update({f"{at}/{attention}/{part}/kernel": (d, d) for part in ("query", "key", "value", "out")})
            tree.update({f"{at}/pre_{norm}_layer_norm/scale": (d,) for norm in norms[stack]})
            tree.update({f"{at}/mlp/{part}/kernel": (d, mlp) for part in ("wi_0", "wi_1")})
            tree[f"{at}/mlp/wo/kernel"] = (mlp, d)
    return {f"target/{name}": shape for name, shape in tree.items()}


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05) + np.float32(name.endswith("scale"))


def save_t5x(at: Path, parameters: int, seed: int, encoding: Encoding) -> None:
    """Writes a model as T5X does, streaming: chunks of at most 64 MiB, and for gzip really compressed ones."""

    class Zipped(Sink):
        def _write(self, name, chunk, pieces):
            if encoding.compressor == "gzip":
                # fusectl itself only frames its bytes as gzip; T5X compresses them.
                pieces = [deflate.gzip_compress(deflate.gzip_decompress(b"".join(pieces), 1 << 30), 1)]
            super()._write(name, chunk, pieces)

    tree = {**shapes(parameters), "state/step": ()}
    with staged(at, force=False, sync=False) as staging:
        sink = Zipped(staging.home, at, format_named("t5x"), None)
        sink.create(
            NewTensor(name, dict_keys(name), shape, dtype, new_storage(2, chunked(shape), dtype, encoding))
            for name, shape in tree.items()
            for dtype in ["float32" if shape else "int32"]
        )

        def one(name: str) -> None:
            x = values(name, tree[name], seed) if tree[name] else np.array(1000, np.int32)
            for chunk in tiles(tree[name], chunked(tree[name])):
                sink.write(name, chunk, x[slices(chunk)])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, tree))
        sink.finish()


def chunked(shape: tuple[int, ...]) -> tuple[int, ...]:
    chunks = list(shape)
    while np.prod(chunks) * 4 > CHUNK_BYTES:
        axis = int(np.argmax(chunks))
        chunks[axis] = -(-chunks[axis] // 2)
    return tuple(chunks)


def save_orbax(at: Path, parameters: int, seed: int) -> None:
    """Has Orbax save a model, with its defaults."""
    import orbax.checkpoint as ocp

    tree: dict = {"state": {"step": np.array(1000, np.int32)}}
    for name, shape in shapes(parameters).items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = values(name, shape, seed)
    ocp.PyTreeCheckpointer().save(at, tree)


@dataclass
class Run:
    """One process: seconds of wall and CPU time, bytes of peak memory, and what lies on the disk afterwards."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    disk_bytes: int


def timed(*command: str, cache: Path | None = None) -> float:
    """The wall seconds of a process; raises RuntimeError with what it said if it fails.

    With compiled modules kept in `cache`, as those of an installed program are.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(cache or "")
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return wall


def disk_bytes(at: Path) -> int:
    """What `du` says: linked files once, holes not."""
    return sum({p.stat().st_ino: p.stat().st_blocks * 512 for p in at.rglob("*") if p.is_file()}.values())


class Bench:
    """Runs cases in a directory of its own."""

    def __init__(self, at: Path, parameters: int) -> None:
        self.at = at
        self.parameters = parameters
        self.out = at / "out"

    def sources(self, kind: str) -> list[str]:
        """The two sources of a kind, made when they are first asked for."""
        paths = [self.at / kind / name / ("1000" if kind == "orbax" else "checkpoint_1000") for name in "ab"]
        for seed, path in enumerate(paths):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "orbax":
                    save_orbax(path, self.parameters, seed)
                else:
                    save_t5x(path, self.parameters, seed, Encoding(kind, 1))
        return [str(path) for path in paths]

    def fusectl(self, *argv: str, script: str = FUSECTL) -> Run:
        """One run of the program, or of another script, into an empty output."""
        self._empty()
        report = self.at / "rss"
        before = os.times()
        wall = timed(sys.executable, "-c", script, str(report), *argv, cache=self.at / "cache")
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Run(wall, cpu, int(report.read_text()), disk_bytes(self.out))

    def copy(self, paths: list[str], *, synced: bool) -> float:
        """The wall seconds of `cp -r`."""
        to = self.at / "copied"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        os.sync()
        wall = sum(timed("cp", "-r", path, str(to / str(i))) for i, path in enumerate(paths))
        wall += timed("sync", "-f", str(to)) if synced else 0.0
        shutil.rmtree(to)
        return wall

    def _empty(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        os.sync()


def cases() -> list[tuple[str, str, list[str]]]:
    """What is measured: its name, the kind of its sources, the arguments. A, B and OUT stand for paths."""
    fuse, itself = ["fuse", "A", "B"], ["self-fuse", "A"]
    gaussian, antisymmetric = ["--fill", "gaussian"], ["--fill", "antisymmetric"]
    return [
        ("fuse, t5x gzip, linked, unread", "gzip", [*fuse, "--link", "--no-check"]),
        ("fuse, t5x gzip, copied, unread", "gzip", [*fuse, "--no-check"]),
        ("fuse, t5x gzip, copied, checked", "gzip", fuse),
        ("fuse, t5x uncompressed, copied, checked", "none", fuse),
        ("fuse, OCDBT zstd, linked, unread", "orbax", [*fuse, "--link", "--no-check"]),
        ("fuse, OCDBT zstd, copied, unread", "orbax", [*fuse, "--no-check"]),
        ("fuse, OCDBT zstd, copied, checked", "orbax", fuse),
        ("self-fuse gaussian, t5x uncompressed", "none", [*itself, *gaussian]),
        ("self-fuse antisymmetric, t5x uncompressed", "none", [*itself, *antisymmetric]),
        ("self-fuse gaussian, t5x gzip in", "gzip", [*itself, *gaussian]),
        ("self-fuse antisymmetric, t5x gzip in", "gzip", [*itself, *antisymmetric]),
        ("self-fuse gaussian, OCDBT", "orbax", [*itself, *gaussian]),
        ("fuse to bfloat16, t5x uncompressed", "none", [*fuse, "--dtype", "bfloat16"]),
        ("fuse, t5x gzip to OCDBT", "gzip", [*fuse, "--format", "orbax"]),
        ("fuse, OCDBT to t5x", "orbax", [*fuse, "--format", "t5x"]),
    ]


def compare(bench: Bench, repeats: int, wanted: str, to: Path | None) -> list[dict[str, object]]:
    """The cases in turn, `repeats` times; for each the medians of its ratios and its worst memory."""
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    chosen = [case for case in cases() if wanted in case[0]]
    for kind in dict.fromkeys(kind for _, kind, _ in chosen):
        # Once for the page cache, and for the compiled modules.
        bench.copy(bench.sources(kind), synced=False)
        bench.fusectl("fuse", *bench.sources(kind), "-o", str(bench.out / "first"), "-q", "--no-sync")
    for _ in range(repeats):
        for synced in (False, True):
            kinds = dict.fromkeys(kind for _, kind, _ in chosen)
            copied = {kind: bench.copy(bench.sources(kind), synced=synced) for kind in kinds}
            for what, kind, argv in chosen:
                a, b = bench.sources(kind)
                out = str(bench.out / "checkpoint_1000")
                words = [{"A": a, "B": b}.get(word, word) for word in argv]
                run = bench.fusectl(*words, "-o", out, "-q", *([] if synced else ["--no-sync"]))
                again = bench.copy([out], synced=synced)
                ratios = {"of_sources": run.wall_s / copied[kind], "of_output": run.wall_s / again}
                found.setdefault((what, synced), []).append({**asdict(run), **ratios})
            # A round takes minutes: what has been measured so far is not lost with the next.
            if to:
                to.write_text(json.dumps(medians(found), indent=1))
    if not wanted:
        a, b = bench.sources("orbax")
        copied_s = bench.copy([a, b], synced=True)
        run = bench.fusectl(a, b, str(bench.out / "1000"), script=TODAY)
        again = bench.copy([str(bench.out / "1000")], synced=True)
        ratios = {"of_sources": run.wall_s / copied_s, "of_output": run.wall_s / again}
        found["Orbax restore + np.block + save", True] = [{**asdict(run), **ratios}]
    return medians(found)


def medians(found: dict[tuple[str, bool], list[dict[str, float]]]) -> list[dict[str, object]]:
    """A row for each case: the medians of its runs and its worst memory."""
    return [
        {
            "what": what,
            "synced": synced,
            **{key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "peak_rss_bytes"},
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "runs": runs,
        }
        for (what, synced), runs in found.items()
    ]


def growth(at: Path, sizes: list[int], repeats: int) -> list[dict[str, object]]:
    """Self-fusions of models of these sizes, with noise: time and memory."""
    rows = []
    for parameters in sizes:
        bench = Bench(at / f"growth{parameters}", parameters)
        source = bench.at / "checkpoint_1000"
        bench.at.mkdir(parents=True)
        save_t5x(source, parameters, 0, Encoding("none"))
        runs = [
            bench.fusectl("self-fuse", str(source), "-o", str(bench.out / "o"), "-q", "--no-sync", "--fill", "gaussian")
            for _ in range(repeats)
        ]
        nbytes = disk_bytes(bench.out)
        shutil.rmtree(bench.at)
        wall, cpu = (statistics.median(getattr(run, key) for run in runs) for key in ("wall_s", "cpu_s"))
        rows.append(
            {
                "parameters": int(sum(map(np.prod, shapes(parameters).values()))),
                "output_bytes": nbytes,
                "wall_s": wall,
                "cpu_s": cpu,
                "cpu_s_per_gb": cpu / nbytes * 1e9,
                "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
            }
        )
    return rows


def number(text: str) -> int:
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1] in UNITS else int(text)


def show(rows: list[dict[str, object]]) -> None:
    columns = [key for key in rows[0] if key != "runs"]
    table = Table(*columns, box=None)
    for row in rows:
        cells = []
        for key in columns:
            value = row[key]
            if key.endswith("_bytes"):
                cells.append(f"{value / 1e6:,.0f} MB")
            else:
                cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=number, default=number("400M"), help="of each source")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; for 400M it takes 25 GB")
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    parser.add_argument("--growth", help="sizes, such as 10M,100M,1B, instead of the cases")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="fusectl-bench-") as at:
        if given.growth:
            rows = growth(Path(at), [number(size) for size in given.growth.split(",")], given.repeats)
        else:
            rows = compare(Bench(Path(at), given.parameters), given.repeats, given.only, given.json)
    show(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
