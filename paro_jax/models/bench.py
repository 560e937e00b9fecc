"""How fast weights load, next to reading their file: `python -m paro_jax.models.bench [--gigabytes 2] [--rounds 5]`

Writes a synthetic checkpoint of CogVideoX-5B's layers, bf16, converts it, and reads both from the page cache: with
`from_pretrained`, and right before that the bytes of the same files into fresh memory with `readinto` (the fastest
plain read that Python has). A ratio is of two reads that follow each other, so that page cache, free memory and other
work on the machine are the same for both; what counts is the median ratio. What a disk costs is left out.

Both ways touch fresh memory of the size of the model, and the kernel's price for that is most of a plain read. An
allocator that keeps what it once had (`MALLOC_` variables of glibc) saves it, so speeds are taken without such
variables and with them, each in a process of its own; and so are the peaks of memory, without. `from_pretrained` reads
in as many threads as there are cores, up to eight, straight into the stacks of layers: our weights are `[out, in]`, as
in the file. (Turned to Flax's `[in, out]` they took 0.5 CPU seconds a gigabyte more, 0.6 by XLA's own transposes.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from paro_jax.models import _mapping, cogvideox, weights

TARGET = 0.70  # of the speed of a plain read
MOST = 1.2  # of the model, in memory while it loads
KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}
ALLOCATORS = {"as it comes": {}, "keeps memory": KEEPS}
LOADS = ("from_pretrained", "converted")
PEAKS = (*LOADS, "paro convert")


def run(gigabytes: float = 2.0, rounds: int = 5, folder: str | None = None) -> dict[str, Any]:
    """Speeds in GB/s, each load as a part of the plain read before it (median of `rounds`), and peaks of memory.

    `cpu_seconds_per_gigabyte` is of all cores together: it tells what a busy machine hides.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        config = _config(gigabytes)
        _write(_file(place), config)
        weights.save_checkpoint(weights.from_pretrained(_file(place), model=config), _converted(place))
        size = _file(place).stat().st_size
        rows = []
        for allocator, variables in ALLOCATORS.items():
            for row in _child(["speed", place, gigabytes, rounds], variables):
                rows.append({"allocator": allocator, **row})
        peaks = {name: _child(["peak", place, gigabytes, name], {}) for name in PEAKS}
    loads = [row for row in rows if row["way"] in LOADS]
    return {
        "gigabytes": size / 1e9,
        "rounds": rounds,
        "device": str(jax.devices()[0]),
        "rows": rows,
        "target": TARGET,
        "met": all(row["of_plain_read"] >= TARGET for row in loads),
        "peaks": peaks,
        "most": MOST,
        "fits": all(peak is None or peak <= MOST for name, peak in peaks.items() if name in LOADS),
    }


def _config(gigabytes: float) -> cogvideox.CogVideoXConfig:
    return dataclasses.replace(cogvideox.COGVIDEOX_5B, num_layers=max(round((gigabytes - 0.07) / 0.265), 1))


def _file(place: str) -> Path:
    return Path(place) / "weights.safetensors"


def _converted(place: str) -> Path:
    return Path(place) / "converted"


def _write(file: Path, config: cogvideox.CogVideoXConfig) -> None:
    names, rng, tensors = cogvideox.diffusers_names(config), np.random.default_rng(0), {}
    params = nnx.state(nnx.eval_shape(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0))), nnx.Param)
    for source in _mapping.every_source(params, names):
        for key in source.keys:
            tensors[key] = rng.integers(0, 1 << 14, source.piece, np.uint16).view(ml_dtypes.bfloat16)
    save_file(tensors, file)


# --- in a process of its own ----------------------------------------------------------------------------------------


def _child(arguments: Sequence[Any], variables: dict[str, str]) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | variables
    command = [sys.executable, "-m", "paro_jax.models.bench", "--child", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _speed(place: str, gigabytes: str, rounds: str) -> list[dict[str, Any]]:
    config, size = _config(float(gigabytes)), _file(place).stat().st_size
    parts = sorted(path for path in _converted(place).rglob("*") if path.is_file())
    files = {"from_pretrained": [_file(place)], "converted": parts}
    ways: dict[str, Callable[[], Any]] = {}
    for name in LOADS:
        ways[f"plain read before {name}"] = lambda name=name: [_plain(file) for file in files[name]]
        ways[name] = lambda name=name: _load(name, place, config)
    for way in ways.values():  # into the page cache, and whatever is made once
        _seconds(way)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(int(rounds)):
        for name, way in ways.items():
            taken[name].append(_seconds(way))
    rows = []
    for name, times in taken.items():
        before = taken.get(f"plain read before {name}", times)
        rows.append(
            {
                "way": name,
                "gigabytes_per_second": size / 1e9 / statistics.median(t for t, _ in times),
                "of_plain_read": statistics.median(a / b for (a, _), (b, _) in zip(before, times, strict=True)),
                "cpu_seconds_per_gigabyte": statistics.median(cpu for _, cpu in times) / (size / 1e9),
            }
        )
    return rows


def _plain(file: Path) -> np.ndarray:
    memory = np.empty(file.stat().st_size, np.uint8)
    with open(file, "rb", buffering=0) as stream:
        view = memoryview(memory)
        while view:
            view = view[stream.readinto(view) :]
    return memory


def _load(name: str, place: str, config: cogvideox.CogVideoXConfig) -> weights.Model:
    where = _converted(place) if name == "converted" else _file(place)
    model = weights.from_pretrained(where, model=config)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    return model


def _seconds(way: Callable[[], Any]) -> tuple[float, float]:
    """On the clock, and of all cores together."""
    start, cpu = time.perf_counter(), time.process_time()
    kept = way()
    taken = time.perf_counter() - start, time.process_time() - cpu
    del kept
    return taken


def _peak(place: str, gigabytes: str, name: str) -> float | None:
    """Most memory that this process had at a time, of which none is the libraries', as a part of the model's size."""
    if not sys.platform.startswith("linux"):
        return None
    with tempfile.TemporaryDirectory(dir=place) as small:  # whatever is imported and made once
        _write(_file(small), _TINY)
        weights.save_checkpoint(weights.from_pretrained(_file(small), model=_TINY), _converted(small))
        weights.from_pretrained(_converted(small))
    before = _status("VmRSS")
    model = _load(name, place, _config(float(gigabytes)))
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if name == "paro convert":
        weights.save_checkpoint(model, Path(place) / "again")
    return (_status("VmHWM") - before) / size


_TINY = cogvideox.CogVideoXConfig(num_layers=2, num_heads=2, time_embed_dim=16, text_embed_dim=16)


def _status(name: str) -> int:
    """Bytes that Linux knows of this process: VmRSS, or VmHWM, the most there ever were."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# --- the command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.models.bench", description="How fast weights load.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--folder", help="where to write it (default: where temporary files go)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        what, *rest = args.child
        sys.stdout.write(json.dumps({"speed": _speed, "peak": _peak}[what](*rest)))
        return 0
    found = run(args.gigabytes, args.rounds, args.folder)
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return 0
    sys.stdout.write(f"{found['gigabytes']:.2f} GB from the page cache to {found['device']}, {args.rounds} rounds\n")
    for row in found["rows"]:
        speed, part, cpu = row["gigabytes_per_second"], row["of_plain_read"], row["cpu_seconds_per_gigabyte"]
        share = f"{100 * part:4.0f} % of it" if row["way"] in LOADS else " " * 12
        sys.stdout.write(
            f"allocator {row['allocator']:12}  {row['way']:33} {speed:6.2f} GB/s {share}  {cpu:5.2f} CPU s/GB\n"
        )
    sys.stdout.write(f"target: {100 * TARGET:.0f} % of a plain read: {'met' if found['met'] else 'missed'}\n")
    for name, peak in found["peaks"].items():
        sys.stdout.write(f"peak memory of {name:16} {'unknown' if peak is None else f'{peak:.2f} x the model'}\n")
    sys.stdout.write(f"target: {MOST} x for a load: {'met' if found['fits'] else 'missed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
