"""`paro bench`: every figure the project promises, measured here, next to its target.

A figure is a row: `name`, `measured`, `unit`, `target` (an upper bound), `met`, and what it was measured on. The
kernels' figures come from `pallas_kernels.bench`, calibration's from `calibrate.bench`; this file adds the others.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paro_jax._cli import _show

Row = dict[str, Any]
_HEAVY = ("flax", "matplotlib", "orbax")  # a user who only wants attention must not wait for these


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure what the project promises, next to its targets",
        description="Measure every figure that the project promises, on this machine, next to its target. Minutes; "
        "let nothing else run. The exit status does not depend on whether targets are met.",
    )
    parser.add_argument("--backend", choices=["xla"], default="xla", help="(default xla)")
    parser.add_argument("--only", choices=list(_FIGURES), nargs="+", metavar="FIGURE", help=", ".join(_FIGURES))
    parser.add_argument(
        "--problems",
        type=_show.positive,
        default=300,
        metavar="N",
        help="problems of the invisibility check (default 300)",
    )
    parser.add_argument("--out", type=_show.path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        _show.probe("--out", args.out)
    rows: list[Row] = []
    for name in args.only or _FIGURES:
        _show.note(f"measuring {name} ...")
        start = time.perf_counter()
        rows += _FIGURES[name](args)
        _show.note(f"measuring {name} took {time.perf_counter() - start:.0f} s")
    result = {"backend": args.backend, "machine": machine(), "rows": rows}
    if args.out is not None:
        _show.write_json(args.out, result)
    if args.json:
        print(_show.dumps(result))
        return 0
    _show.fields("", result["machine"])
    _show.table("figures", rows, ("name", "measured", "target", "unit", "met"))
    for row in rows:
        extra = {k: v for k, v in row.items() if k not in ("name", "measured", "target", "unit", "met")}
        print(f"{row['name']}: " + ", ".join(f"{k.replace('_', ' ')} {_show._cell(v)}" for k, v in extra.items()))
    return 0


def machine() -> dict[str, Any]:
    """What a figure was measured on: without it a figure means nothing."""
    import importlib.metadata
    import os
    import platform

    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _processor() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _invisibility(args: argparse.Namespace) -> list[Row]:
    """Over generated problems: attention with every block kept, in any order, against jax.nn."""
    import jax
    import numpy as np
    from tqdm import tqdm

    import paro_jax
    from pallas_kernels.bench import figure

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    def planned(q, k, v, plan):
        return paro_jax.attention(q, k, v, plan=plan)

    dense, planned = jax.jit(dense), jax.jit(planned)
    rng = np.random.default_rng(0)
    errors: list[float] = []
    bar = tqdm(total=args.problems, desc="invisibility", unit="problem", disable=None)
    while len(errors) < args.problems:
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


def _import(args: argparse.Namespace) -> list[Row]:
    """Seconds that `import paro_jax` adds to `import jax`, and which heavy packages it drags in."""
    from pallas_kernels.bench import figure

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


def _calibration(args: argparse.Namespace) -> list[Row]:
    """One head of CogVideoX, in a process of its own: all six orders scored, and the final mask."""
    import calibrate.bench

    return calibrate.bench.run()


def _kernels(name: str) -> Callable[[argparse.Namespace], list[Row]]:
    """A figure of floor 0."""

    def measure(args: argparse.Namespace) -> list[Row]:
        from pallas_kernels import bench

        return getattr(bench, name)(_show.note)

    return measure


# What measures memory comes first: on Linux a new process starts with its parent's peak, and this one is small then.
_FIGURES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "memory": _kernels("peak_memory"),
    "calibration": _calibration,
    "import": _import,
    "dense": _kernels("dense_against_jax"),
    "density": _kernels("work_follows_density"),
    "invisibility": _invisibility,
}
