"""The figures with targets that need no peer: `paro bench --promises`.

A figure is a row: `name`, `measured`, `unit`, `target` (an upper bound), `met`, and what it was measured on. The
kernels' come from `pallas_kernels.bench.promises`, calibration's from `calibrate.bench`; this file adds the others.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Note = Callable[[str], None]
_HEAVY = ("flax", "matplotlib", "orbax")  # a user who only wants attention must not wait for these


def _invisibility(problems: int, note: Note) -> list[Row]:
    """Over generated problems: attention with every block kept, in any order, against jax.nn."""
    import jax
    import numpy as np
    from tqdm import tqdm

    import paro_jax
    from pallas_kernels.bench.promises import figure

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    def planned(q, k, v, plan):
        return paro_jax.attention(q, k, v, plan=plan)

    dense, planned = jax.jit(dense), jax.jit(planned)
    rng = np.random.default_rng(0)
    errors: list[float] = []
    bar = tqdm(total=problems, desc="invisibility", unit="problem", disable=None)
    while len(errors) < problems:
        # A shape compiles once; orders are data, so six problems of one shape cost little more than one.
        rank = int(rng.choice([1, 2, 3, 3, 3]))
        shape = tuple(int(n) for n in rng.integers(1, {1: 300, 2: 17, 3: 8}[rank], rank))
        position = "first" if rng.random() < 0.5 else "last"
        grid = paro_jax.TokenGrid(shape, text=int(rng.choice([0, 1, 7, 40])), text_position=position)
        batch, heads, dim = int(rng.integers(1, 3)), int(rng.integers(1, 5)), int(rng.choice([32, 64, 96, 128, 256]))
        block = int(rng.choice([64, 128])), int(rng.choice([64, 128]))
        for turn in range(6):
            order = [str(name) for name in rng.choice(np.array(grid.orders), heads)]
            order[0] = grid.orders[turn % len(grid.orders)]
            plan = paro_jax.AttentionPlan.dense(grid, heads=heads, order=order, block=block)
            q, k, v = jax.random.normal(jax.random.key(len(errors)), (3, batch, grid.tokens, heads, dim))
            errors.append(float(abs(planned(q, k, v, plan) - dense(q, k, v)).max()))
            bar.update(1)
        if len(errors) % 96 == 0:
            jax.clear_caches()  # compiled shapes never come back; without this they add up to a gigabyte
    bar.close()
    return [
        figure(
            "invisibility: largest difference from jax.nn",
            max(errors),
            1e-5,
            "absolute, f32",
            problems=len(errors),
            failed=sum(e > 1e-5 for e in errors),
        )
    ]


def _import(problems: int, note: Note) -> list[Row]:
    """Seconds that `import paro_jax` adds to `import jax`, and which heavy packages it drags in."""
    from pallas_kernels.bench.promises import figure

    def seconds(module: str) -> float:
        code = f"import time; t = time.perf_counter(); import jax; j = time.perf_counter(); import {module}; "
        code += "print(time.perf_counter() - j)"
        runs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)
        ]
        return statistics.median(float(done.stdout) for done in runs)

    code = f"import sys, paro_jax; print(*[m for m in {_HEAVY!r} if m in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = ", ".join(heavy) or "none"
    return [
        figure("import paro_jax beyond import jax", seconds("paro_jax"), 1.5, "s", runs=5, statistic="median"),
        figure(
            "heavy packages imported by import paro_jax", len(heavy), 0, "packages", found=found, of=", ".join(_HEAVY)
        ),
    ]


def _calibration(problems: int, note: Note) -> list[Row]:
    """One head of CogVideoX, in a process of its own: all six orders scored, and the final mask."""
    import calibrate.bench

    return calibrate.bench.run()


def _kernels(name: str) -> Callable[[int, Note], list[Row]]:
    """A figure of floor 0."""

    def measure(problems: int, note: Note) -> list[Row]:
        from pallas_kernels.bench import promises

        return getattr(promises, name)(note)

    return measure


# What measures memory comes first: on Linux a new process starts with its parent's peak, and this one is small then.
FIGURES: dict[str, Callable[[int, Note], list[Row]]] = {
    "memory": _kernels("peak_memory"),
    "calibration": _calibration,
    "import": _import,
    "dense": _kernels("dense_against_jax"),
    "density": _kernels("work_follows_density"),
    "invisibility": _invisibility,
}
