"""`paro demo`: the main job on real input, from a trained video model to a table, a report and pictures."""

import argparse
from pathlib import Path
from typing import Any

from paro_jax._cli import _show

_COLUMNS = ("method", "density", "qk", "pv", "psnr", "ssim", "cosine", "retained_mass", "seconds")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="generate video dense and with PARO, and compare",
        description="Generate video with the small trained model that ships with paro_jax: dense, then with PARO at "
        "50, 30 and 20 %% density and several widths, then without what makes PARO work. Writes DIR/report.json and "
        "pictures.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and rows, under 90 seconds on two cores")
    parser.add_argument("--prompts", type=_show.positive, metavar="N", help="prompts (default 2; with --quick 1)")
    parser.add_argument(
        "--seed", type=_show.natural, default=0, metavar="S", help="seed of prompts and noise (default 0)"
    )
    parser.add_argument(
        "--steps", type=_steps, metavar="N", help="denoising steps, at most 1000 (default: the model's)"
    )
    parser.add_argument("--out", type=_show.path, default=Path("out/demo"), metavar="DIR", help="(default out/demo)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=run)


def _steps(text: str) -> int:
    """argparse type: the model was trained on 1000 noise levels, so there are no more steps than that."""
    value = _show.positive(text)
    if value > 1000:
        raise ValueError
    return value


_steps.__name__ = "number of steps, 1 to 1000,"


def run(args: argparse.Namespace) -> int:
    from paro_jax.demo.run import run_demo

    args.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known now, not after minutes
    report = run_demo(
        out=args.out, quick=args.quick, prompts=args.prompts, seed=args.seed, steps=args.steps, progress=True
    )
    if args.json:
        print(_show.dumps(report))
        return 0
    _show.table("paro demo: each row against the dense video from the same noise", report["rows"], _COLUMNS)
    print(f"in {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return 0
