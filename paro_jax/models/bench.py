"""How fast weights load, next to reading their file: `python -m paro_jax.models.bench [--gigabytes 2] [--rounds 5]`

Writes a synthetic checkpoint of CogVideoX-5B's layers, bf16, and reads it from the page cache, in turn: its bytes into
fresh memory with one `readinto` (the fastest plain read that Python has), `from_pretrained`, and a restore of the
converted checkpoint. What a disk costs is the same for all of them, so it is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from paro_jax.models import _mapping, cogvideox, weights

TARGET = 0.70  # of the speed of a plain read


def run(gigabytes: float = 2.0, rounds: int = 5, folder: str | None = None) -> dict[str, Any]:
    """Speeds in GB/s (the median of `rounds`), and each as a part of the plain read of its own round."""
    config = dataclasses.replace(cogvideox.COGVIDEOX_5B, num_layers=max(round((gigabytes - 0.07) / 0.265), 1))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file, converted = Path(place) / "weights.safetensors", Path(place) / "converted"
        _write(file, config)
        weights.save_checkpoint(weights.from_pretrained(file, model=config), converted)
        size = file.stat().st_size
        ways: dict[str, Callable[[], Any]] = {
            "plain read": lambda: _plain(file, size),
            "from_pretrained": lambda: _loaded(weights.from_pretrained(file, model=config)),
            "converted": lambda: _loaded(weights.from_pretrained(converted)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():  # into the page cache, and whatever is made once
            _seconds(way)
        for _ in range(rounds):
            for name, way in ways.items():
                taken, of_cpu = _seconds(way)
                seconds[name].append(taken)
                busy[name].append(of_cpu)
    parts = {
        name: statistics.median(a / b for a, b in zip(seconds["plain read"], taken, strict=True))
        for name, taken in seconds.items()
    }
    rows = [
        {
            "way": name,
            "gigabytes_per_second": size / 1e9 / statistics.median(taken),
            "of_plain_read": parts[name],
            "cpu_seconds_per_gigabyte": statistics.median(busy[name]) / (size / 1e9),
        }
        for name, taken in seconds.items()
    ]
    return {
        "gigabytes": size / 1e9,
        "rounds": rounds,
        "device": str(jax.devices()[0]),
        "rows": rows,
        "target": TARGET,
        "met": parts["from_pretrained"] >= TARGET,
    }


def _write(file: Path, config: cogvideox.CogVideoXConfig) -> None:
    names, rng, tensors = cogvideox.diffusers_names(config), np.random.default_rng(0), {}
    for source in _mapping.every_source(lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0)), names):
        for key in source.keys:
            shape = source.piece[::-1] if source.is_kernel else source.piece
            tensors[key] = rng.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16)
    save_file(tensors, file)


def _plain(file: Path, size: int) -> np.ndarray:
    memory = np.empty(size, np.uint8)
    with open(file, "rb", buffering=0) as stream:
        view = memoryview(memory)
        while view:
            view = view[stream.readinto(view) :]
    return memory


def _loaded(model: nnx.Module) -> nnx.Module:
    jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    return model


def _seconds(way: Callable[[], Any]) -> tuple[float, float]:
    """On the clock, and of all cores together: the second tells what a busy machine hides."""
    start, cpu = time.perf_counter(), time.process_time()
    kept = way()
    taken = time.perf_counter() - start, time.process_time() - cpu
    del kept
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.models.bench", description="How fast weights load.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--folder", help="where to write it (default: where temporary files go)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    found = run(args.gigabytes, args.rounds, args.folder)
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return 0
    sys.stdout.write(f"{found['gigabytes']:.2f} GB from the page cache to {found['device']}, {args.rounds} rounds\n")
    for row in found["rows"]:
        speed, part, cpu = row["gigabytes_per_second"], row["of_plain_read"], row["cpu_seconds_per_gigabyte"]
        sys.stdout.write(
            f"{row['way']:16} {speed:6.2f} GB/s  {100 * part:4.0f} % of a plain read  {cpu:.2f} CPU s/GB\n"
        )
    sys.stdout.write(f"target: {100 * TARGET:.0f} %: {'met' if found['met'] else 'missed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
