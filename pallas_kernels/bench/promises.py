"""What floor 0 promises of its XLA backend, measured here: rows for `paro bench`.

A row: `name`, `measured`, `unit`, `target` (an upper bound), `met`, then what it was measured on. Rounds interleave the
contestants and medians are compared, so a machine that slows down slows both.
`python -m pallas_kernels.bench.promises` prints JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import block_attention

Row = dict[str, Any]
Progress = Callable[[str], None]

BLOCK = (64, 64)
HEADS, HEAD_DIM = 4, 64


def run_xla(progress: Progress = lambda message: None, rounds: int = 5) -> list[Row]:
    """Every figure: work against density, dense against jax.nn, peak memory. Half a minute on two cores."""
    return [*work_follows_density(progress, rounds), *dense_against_jax(progress, rounds), *peak_memory(progress)]


def work_follows_density(progress: Progress = lambda message: None, rounds: int = 5, tokens: int = 8192) -> list[Row]:
    """Time at 20 % and 50 % density over the own dense time, on random masks and on rows that differ tenfold."""
    q, k, v = _qkv(tokens)
    rng = np.random.default_rng(0)
    shape = (HEADS, -(-tokens // BLOCK[0]), -(-tokens // BLOCK[1]))
    masks = {"dense": np.ones(shape, bool)}
    for density in (0.2, 0.5):
        masks[f"random {density}"] = rng.random(shape) < density
        masks[f"tenfold {density}"] = tenfold(rng, shape, density)

    @jax.jit
    def call(q, k, v, count, index):
        return block_attention(q, k, v, count, index, block=BLOCK, scale=HEAD_DIM**-0.5)

    seconds = interleaved({name: (call, (q, k, v, *schedule(keep))) for name, keep in masks.items()}, rounds, progress)
    rows = []
    for name, keep in masks.items():
        if name == "dense":
            continue
        kind, density = name.split()
        target = {"0.2": 0.30, "0.5": 0.60}[density]
        rows.append(
            figure(
                f"time at density {density} over dense, {kind} rows",
                seconds[name] / seconds["dense"],
                target,
                "ratio",
                density=float(keep.mean()),
                kept_per_row=f"{keep.sum(-1).min()} to {keep.sum(-1).max()}",
                seconds=seconds[name],
                dense_seconds=seconds["dense"],
                tokens=tokens,
                heads=HEADS,
                head_dim=HEAD_DIM,
                dtype="float32",
            )
        )
    return rows


def dense_against_jax(progress: Progress = lambda message: None, rounds: int = 5, tokens: int = 4096) -> list[Row]:
    """The dense time over that of jax.nn.dot_product_attention."""
    q, k, v = _qkv(tokens)
    model_order = tuple(jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    blocks = -(-tokens // BLOCK[0])
    count, index = schedule(np.ones((HEADS, blocks, blocks), bool))
    ours = jax.jit(lambda q, k, v, c, i: block_attention(q, k, v, c, i, block=BLOCK, scale=HEAD_DIM**-0.5))
    theirs = jax.jit(jax.nn.dot_product_attention)
    seconds = interleaved({"ours": (ours, (q, k, v, count, index)), "jax.nn": (theirs, model_order)}, rounds, progress)
    return [
        figure(
            "dense time over jax.nn.dot_product_attention",
            seconds["ours"] / seconds["jax.nn"],
            1.2,
            "ratio",
            seconds=seconds["ours"],
            jax_seconds=seconds["jax.nn"],
            tokens=tokens,
            heads=HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
        )
    ]


def peak_memory(progress: Progress = lambda message: None, tokens: int = 17776) -> list[Row]:
    """Peak resident memory of a fresh process that runs one dense call: interpreter, jax and inputs included."""
    progress(f"peak memory at {tokens} tokens")
    code = f"from pallas_kernels.bench import promises; print(promises.own_peak({tokens}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    peak, before = (float(x) for x in done.stdout.split())
    return [
        figure(
            "peak memory, whole process",
            peak,
            1.5,
            "GB",
            before_the_call=before,
            tokens=tokens,
            heads=HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
        )
    ]


def own_peak(tokens: int) -> str:
    """Run one dense call in this process; its peak resident memory after and before, in GB (Linux and macOS)."""
    import resource

    def peak() -> float:
        try:  # Linux: ru_maxrss would count the parent before exec
            status = Path("/proc/self/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    q, k, v = _qkv(tokens)
    blocks = -(-tokens // BLOCK[0])
    count, index = schedule(np.ones((HEADS, blocks, blocks), bool))
    before = peak()
    jax.block_until_ready(block_attention(q, k, v, count, index, block=BLOCK, scale=HEAD_DIM**-0.5))
    return f"{peak()} {before}"


def tenfold(rng: np.random.Generator, shape: tuple[int, int, int], density: float) -> np.ndarray:
    """A mask of the given mean density whose rows keep from 1 to 10 parts of it, each row at random places."""
    heads, rows, blocks = shape
    share = np.linspace(1, 10, heads * rows) * (density / 5.5)
    kept = np.maximum(1, np.round(rng.permutation(share).reshape(heads, rows) * blocks)).astype(int)
    rank = np.argsort(np.argsort(rng.random(shape), axis=-1), axis=-1)
    return rank < kept[..., None]


def schedule(keep: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """bool [H, nq, nk] -> (count, index) as block_attention takes them."""
    return jnp.asarray(keep.sum(-1), jnp.int32), jnp.asarray(np.argsort(~keep, axis=-1, kind="stable"), jnp.int32)


def interleaved(
    contestants: dict[str, tuple[Callable[..., Any], tuple]], rounds: int, progress: Progress = lambda message: None
) -> dict[str, float]:
    """Median seconds of each contestant over `rounds` rounds in turn, after one call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}" if turn else "compiling")
        for name, (function, arguments) in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def figure(name: str, measured: float, target: float, unit: str, **on: Any) -> Row:
    """A row; met when measured <= target."""
    return {"name": name, "measured": measured, "target": target, "unit": unit, "met": bool(measured <= target), **on}


def _qkv(tokens: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (1, HEADS, tokens, HEAD_DIM), jnp.float32) for key in keys)


if __name__ == "__main__":
    print(json.dumps(run_xla(lambda message: print(message, file=sys.stderr)), indent=2))
