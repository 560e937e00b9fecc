"""`paro calibrate`: from captured attention to a plan file, for the demo model or for a file of captures."""

import argparse
from pathlib import Path
from typing import Any

from paro_jax._cli import _show


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="decide orders and masks, write a plan file",
        description="Decide each head's order and mask from captured attention, and write a plan file. Either of the "
        "model that ships with paro_jax (--model demo), or of any model from a file of captures (--samples; "
        "paro_jax/_cli/_captures.py says what it holds).",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=["demo"], help="a model that ships with paro_jax")
    source.add_argument(
        "--samples", type=Path, metavar="FILE", help=".safetensors of site{S}/step{T}/q, k and v; needs --grid"
    )
    parser.add_argument(
        "--density",
        type=_show.density,
        nargs="+",
        required=True,
        metavar="D",
        help="kept blocks / all blocks, in (0, 1]",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PLAN", help="a .safetensors file or a folder")
    parser.add_argument("--grid", type=_sizes, metavar="FxHxW", help="the grid of --samples, in tokens: 13x30x45")
    parser.add_argument("--text", type=int, default=0, metavar="T", help="text tokens of --samples (default 0)")
    parser.add_argument("--text-position", choices=["first", "last"], default="first", help="(default first)")
    parser.add_argument("--block", type=_show.positive, nargs=2, default=(64, 64), metavar="B", help="(default 64 64)")
    parser.add_argument("--objective", choices=["mass", "paro", "error"], default="mass", help="(default mass)")
    parser.add_argument("--orders", nargs="+", metavar="NAME", help="candidate orders (default: all axis orders)")
    parser.add_argument(
        "--bricks", type=_sizes, nargs="+", default=(), metavar="FxHxW", help="brick orders as candidates"
    )
    parser.add_argument(
        "--buckets", type=_show.positive, default=1, metavar="N", help="masks over the schedule (default 1)"
    )
    parser.add_argument(
        "--qk", choices=["bf16", "fp8", "int8", "int4"], default="bf16", help="width of QK (default bf16)"
    )
    parser.add_argument(
        "--pv", choices=["bf16", "fp8", "int8", "int4"], default="bf16", help="width of PV (default bf16)"
    )
    parser.add_argument(
        "--prompts", type=_show.positive, default=2, metavar="N", help="demo model: prompts (default 2)"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="also write the report, with pictures")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="resume from here if a run was stopped")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def _sizes(text: str) -> tuple[int, ...]:
    """argparse type: 13x30x45."""
    sizes = tuple(int(part) for part in text.split("x"))
    if not sizes or min(sizes) < 1:
        raise ValueError
    return sizes


_sizes.__name__ = "sizes such as 13x30x45"


def run(args: argparse.Namespace) -> int:
    import calibrate
    import paro_jax

    outputs = {density: _one_of(args, args.out, density) for density in args.density}
    for path in outputs.values():  # known now, not after minutes
        if path.parent.exists() and not path.parent.is_dir():
            raise _show.UserError(f"--out: {path.parent} is not a folder")
    edges = [i / args.buckets for i in range(args.buckets + 1)]
    samples, grid, model, provenance = (_demo if args.model else _captured)(args, edges)

    made = calibrate.make_plans(
        samples,
        grid,
        densities=list(outputs),
        block=tuple(args.block),
        objective=args.objective,
        orders=args.orders,
        quant=paro_jax.QuantSpec(qk=args.qk, pv=args.pv),
        bucket_edges=edges,
        progress=True,
        checkpoint=args.checkpoint,
    )
    results = []
    for (density, path), (plan, report) in zip(outputs.items(), made, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"density": density, "objective": args.objective, **provenance}
        paro_jax.save_plan(plan, path, model=model, provenance=settings)
        if args.report is not None:
            report.save(_one_of(args, args.report, density))
        results.append((plan, report, path))

    if args.json:
        rows = [
            {"path": path, "density": plan.density, "summary": report.summary, "heads": report.rows}
            for plan, report, path in results
        ]
        print(_show.dumps({"plans": rows}))
        return 0
    for plan, report, path in results:
        print(report)
        print(
            f"wrote {path}: density {plan.density:.4g}, {plan.nbytes / 1e6:.3g} MB; to look at it: paro inspect {path}"
        )
    return 0


def _one_of(args: argparse.Namespace, path: Path, density: float) -> Path:
    """`path` for one density; for several, one path each: plan-0.3.safetensors for plan.safetensors."""
    return path if len(args.density) == 1 else path.with_name(f"{path.stem}-{density:g}{path.suffix}")


def _demo(args: argparse.Namespace, edges: list[float]) -> tuple[Any, Any, str, dict]:
    """Samples, grid, model name and provenance of the model that ships with paro_jax."""
    if args.grid is not None or args.text:
        raise _show.UserError("--grid and --text belong to --samples; the demo model has its own grid")
    from dataclasses import replace

    from tqdm import tqdm

    from paro_jax.demo import data, model
    from paro_jax.demo import run as demo

    scenes = [data.random_scene(demo.CALIBRATION_SEED + i) for i in range(args.prompts)]
    with tqdm(total=args.prompts, desc="capture", unit="prompt", disable=None) as bar:
        steps = demo.capture_steps(demo.STEPS, edges)
        samples = demo.Capture(demo.load_model(), scenes, demo.STEPS, steps, lambda: bar.update())
    grid = replace(model.CONFIG.grid, bricks=tuple(args.bricks))
    return samples, grid, "demo", {"prompts": args.prompts, "steps": demo.STEPS}


def _captured(args: argparse.Namespace, edges: list[float]) -> tuple[Any, Any, str, dict]:
    """The same of a capture file."""
    if args.grid is None:
        raise _show.UserError("--samples needs --grid, the model's grid in tokens, such as --grid 13x30x45")
    import paro_jax
    from paro_jax._cli._captures import CaptureFile

    grid = paro_jax.TokenGrid(args.grid, text=args.text, text_position=args.text_position, bricks=tuple(args.bricks))
    return CaptureFile(args.samples, grid), grid, "", {"samples": args.samples.name}
