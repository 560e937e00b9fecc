"""What calibration costs: one head of CogVideoX, all six orders and the final mask. `python -m calibrate.bench`"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

import calibrate
from paro_jax import TokenGrid

COGVIDEOX = TokenGrid((13, 30, 45), text=226)
TARGET_SECONDS, TARGET_GIGABYTES = 60.0, 1.5


def run() -> list[dict[str, Any]]:
    """Two rows: seconds, compilation included, and peak memory of the process; each next to its target.

    Measured in a process of its own, so that neither what was compiled nor what was held before counts. Minutes on a
    busy
    machine: let nothing else run.
    """
    done = subprocess.run([sys.executable, "-m", "calibrate.bench"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the calibration bench ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    on = {name: found[name] for name in ("tokens", "head_dim", "heads", "orders", "chosen", "density")}
    rows = [("calibration of one CogVideoX head: time", found["seconds"], TARGET_SECONDS, "s")]
    rows += [("calibration of one CogVideoX head: peak memory", found["gigabytes"], TARGET_GIGABYTES, "GB")]
    return [
        {"name": name, "measured": measured, "target": target, "unit": unit, "met": measured <= target, **on}
        for name, measured, target, unit in rows
    ]


def one_head(grid: TokenGrid = COGVIDEOX, dim: int = 64) -> dict[str, Any]:
    """Calibrate one head that is local in the grid, here and now: seconds, and what came out."""
    rng = np.random.default_rng(0)
    q, k = local_head(grid, (0.05, 0.5, 0.5), dim, rng)
    start = time.perf_counter()
    plan, _ = calibrate.make_plan([calibrate.Sample(0, 0.0, q, k)], grid, density=0.3, progress=False)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"seconds": seconds, "tokens": grid.tokens, "head_dim": dim, "heads": 1}
    return found | {"orders": len(grid.orders), "chosen": plan.order_list()[0][0], "density": float(plan.density)}


def local_head(
    grid: TokenGrid, per_token: tuple[float, ...], dim: int, rng: np.random.Generator, strength: float = 6.0
) -> tuple[np.ndarray, np.ndarray]:
    """q and k, float32 [1, N, 1, dim], of a head whose tokens attend to near ones: random Fourier features of the
    place.

    `per_token`: how much one step along each axis of the grid counts; a small number makes the head see far along it.
    """
    axes = np.meshgrid(*map(np.arange, grid.shape), indexing="ij")
    place = np.stack(axes, -1).reshape(grid.grid_tokens, len(grid.shape)) * np.asarray(per_token)
    waves = np.cos(place @ rng.normal(size=(len(grid.shape), dim)) + rng.uniform(0, 2 * np.pi, dim))
    text = rng.normal(size=(grid.text, dim))
    parts = [text, strength * waves / dim**0.5]
    tokens = np.concatenate(parts if grid.text_position == "first" else parts[::-1])
    q, k = ((tokens + 0.1 * rng.normal(size=tokens.shape)).astype(np.float32) for _ in "qk")
    return q[None, :, None], k[None, :, None]


if __name__ == "__main__":
    found = one_head()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    found["gigabytes"] = peak / (1e9 if sys.platform == "darwin" else 1e6 / 1.024)
    sys.stdout.write(json.dumps(found) + "\n")
