"""`paro calibrate`: from captured attention to a plan file: of a published model, the demo's, or a file of captures."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from paro_jax import _plan_file
from paro_jax._cli import _show
from paro_jax._quant import Width

_PROMPTS = 2  # of the demo model


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="decide orders and masks, write a plan file",
        description="Decide each head's order and mask from captured attention, and write a plan file. Of a published "
        "model, from its weights and encoded prompts (--model flux --weights DIR --embeddings FILE; what FILE holds "
        "stands in paro_jax/_cli/_published.py); of the model that ships with paro_jax (--model demo); or of any "
        "model, from a file of captures (--samples; what it holds stands in paro_jax/_cli/_captures.py).",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", metavar="NAME", help="demo, flux, cogvideox, wan, or a preset such as flux-dev for a bare file"
    )
    source.add_argument(
        "--samples", type=_show.path, metavar="FILE", help=".safetensors of site{S}/step{T}/q, k and v; needs --grid"
    )
    parser.add_argument(
        "--density",
        type=_show.density,
        nargs="+",
        required=True,
        metavar="D",
        help="kept blocks / all blocks, in (0, 1]",
    )
    parser.add_argument(
        "-o", "--out", type=_show.path, required=True, metavar="PLAN", help="a .safetensors file or a folder"
    )
    parser.add_argument("--grid", type=_sizes, metavar="FxHxW", help="the grid of --samples, in tokens: 13x30x45")
    parser.add_argument("--text", type=_show.natural, metavar="T", help="text tokens of --samples (default 0)")
    parser.add_argument("--text-position", choices=["first", "last"], help="of --samples (default first)")
    parser.add_argument("--block", type=_show.positive, nargs=2, default=(64, 64), metavar="B", help="(default 64 64)")
    parser.add_argument("--objective", choices=["mass", "paro", "error"], default="mass", help="(default mass)")
    parser.add_argument(
        "--rule", choices=["global", "head", "row", "error"], default="global", help="where the budget goes"
    )
    parser.add_argument(
        "--text-columns", choices=["keep", "sparse"], default="keep", help="what every query sees, or like the rest"
    )
    parser.add_argument("--orders", nargs="+", metavar="NAME", help="candidate orders (default: all axis orders)")
    parser.add_argument(
        "--bricks", type=_sizes, nargs="+", default=(), metavar="FxHxW", help="brick orders as candidates"
    )
    parser.add_argument(
        "--buckets", type=_show.positive, default=1, metavar="N", help="masks over the schedule (default 1)"
    )
    parser.add_argument("--qk", choices=get_args(Width), default="bf16", help="width of QK (default bf16)")
    parser.add_argument("--pv", choices=get_args(Width), default="bf16", help="width of PV (default bf16)")
    parser.add_argument(
        "--prompts", type=_show.positive, metavar="N", help=f"of the model (demo: {_PROMPTS}, else all of --embeddings)"
    )
    parser.add_argument(
        "--weights", metavar="DIR", help="of a published model: as diffusers or `paro convert` saved it"
    )
    parser.add_argument("--embeddings", type=_show.path, metavar="FILE", help=".safetensors of encoded prompts")
    parser.add_argument(
        "--height", type=_show.positive, metavar="PX", help="pixels (default: as the model was trained)"
    )
    parser.add_argument("--width", type=_show.positive, metavar="PX", help="pixels (default: as the model was trained)")
    parser.add_argument("--frames", type=_show.positive, metavar="N", help="of the video (default: as it was trained)")
    parser.add_argument("--steps", type=_show.positive, metavar="N", help="of denoising (default: as the model wants)")
    parser.add_argument(
        "--at",
        type=_show.natural,
        nargs="+",
        metavar="STEP",
        help="steps to look at (default: the middle of each bucket)",
    )
    parser.add_argument("--shift", type=float, metavar="S", help="of the noise schedule of FLUX.1 and Wan")
    parser.add_argument("--seed", type=_show.natural, metavar="N", help="of the noise (default 0)")
    parser.add_argument("--report", type=_show.path, metavar="DIR", help="also write the report, with pictures")
    parser.add_argument("--checkpoint", type=_show.path, metavar="FILE", help="resume from here if a run was stopped")
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
    from calibrate._make_plan import check_settings

    _refuse_what_would_be_ignored(args)
    plans, reports = _outputs(args)
    edges = [i / args.buckets for i in range(args.buckets + 1)]
    settings: dict[str, Any] = dict(
        densities=args.density,
        block=tuple(args.block),
        objective=args.objective,
        orders=args.orders,
        quant=paro_jax.QuantSpec(qk=args.qk, pv=args.pv),
        bucket_edges=edges,
        rule=args.rule,
        text_columns=args.text_columns,
    )
    check = partial(check_settings, **settings)  # called with the grid, before the model runs
    source = _captured(args) if args.model is None else None
    embeddings = None
    if args.model is not None and args.model != "demo":
        from paro_jax._cli import _published

        embeddings = _published.read(args.embeddings, args.prompts)
    # Whatever cannot be written is known now, not after the work.
    for path in plans:
        _plan_file.probe(path)
    for path in reports:
        _show.probe("--report", path, folder=True)
    if args.checkpoint is not None:
        _show.probe("--checkpoint", args.checkpoint)
    if embeddings is not None:
        source = _published.samples(args, embeddings, edges, check)
    samples, grid, model, provenance = source or _demo(args, edges, check)

    made = calibrate.make_plans(
        samples,
        grid,
        **settings,
        progress=True,
        checkpoint=args.checkpoint,
        keep_checkpoint=True,
    )
    results = []
    for density, path, (plan, report) in zip(args.density, plans, made, strict=True):
        about = {"density": density, "objective": args.objective, "rule": args.rule, **provenance}
        paro_jax.save_plan(plan, path, model=model, provenance=about)
        results.append((plan, report, path))
    for path, (_, report) in zip(reports, made, strict=False):
        report.save(path)
    if args.checkpoint is not None:  # everything is safe: it has served
        args.checkpoint.unlink(missing_ok=True)

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


def _refuse_what_would_be_ignored(args: argparse.Namespace) -> None:
    """UserError for options that belong to another source than the one that is named, or that it lacks."""
    of_samples = {"--grid": args.grid, "--text": args.text, "--text-position": args.text_position}
    of_weights = {f"--{n}": getattr(args, n) for n in ("height", "width", "frames", "steps", "at", "shift", "seed")}
    of_weights = {"--weights": args.weights, "--embeddings": args.embeddings, **of_weights}

    def refuse(options: dict[str, Any], why: str) -> None:
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise _show.UserError(f"{given[0]} {why}")

    if args.model is None:
        refuse({"--prompts": args.prompts}, "belongs to --model; a capture file has the samples it has")
        refuse(of_weights, "belongs to --model flux, cogvideox or wan; a capture file has the samples it has")
        if args.grid is None:
            raise _show.UserError("--samples needs --grid, the model's grid in tokens, such as --grid 13x30x45")
        return
    refuse(of_samples, "belongs to --samples; a model has its own grid")
    if args.model != "demo":
        for option in ("--weights", "--embeddings"):
            if of_weights[option] is None:
                raise _show.UserError(f"--model {args.model} needs {option}; paro calibrate --help says what it is")
        args.seed = args.seed or 0
        return
    refuse(of_weights, "belongs to --model flux, cogvideox or wan; the demo model has its own")
    from paro_jax.demo.run import STEPS

    if args.buckets > STEPS:
        raise _show.UserError(f"--buckets: the demo model has {STEPS} steps, so at most {STEPS}; got {args.buckets}")


def _outputs(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """A plan's path for each density, and a report's if they are asked for; UserError where two would be one."""

    def paths(path: Path | None) -> list[Path]:
        """For several densities one path each: plan-0.3.safetensors for plan.safetensors."""
        if path is None or len(args.density) == 1:
            return [] if path is None else [path]
        end = path.suffix if path.suffix.lower() == ".safetensors" else ""  # else a folder, such as flux.1-dev
        return [path.with_name(f"{path.name.removesuffix(end)}-{density:g}{end}") for density in args.density]

    plans, reports = paths(args.out), paths(args.report)
    inputs = [("--samples", args.samples), ("--checkpoint", args.checkpoint), ("--embeddings", args.embeddings)]
    inputs += [("--weights", args.weights and _show.path(args.weights))]
    named = [("--out", path) for path in plans] + [("--report", path) for path in reports]
    named += [(option, path) for option, path in inputs if path is not None]
    real = [Path(os.path.realpath(path)) for _, path in named]
    for i, (option, path) in enumerate(named):
        for j, (other, _) in enumerate(named[:i]):
            if real[i] == real[j]:
                raise _show.UserError(f"{other} and {option} are both {path}; give densities or paths that differ")
        if any(place in real[i].parents for place in real[: len(plans)]):
            raise _show.UserError(f"{option}: {path} lies in the plan; give a path outside of it")
    return plans, reports


def _demo(args: argparse.Namespace, edges: list[float], check: Callable) -> tuple[Any, Any, str, dict]:
    """Samples, grid, model name and provenance of the model that ships with paro_jax."""
    from dataclasses import replace

    from tqdm import tqdm

    from paro_jax.demo import data, model
    from paro_jax.demo import run as demo

    grid = replace(model.CONFIG.grid, bricks=tuple(args.bricks))
    check(grid)
    prompts = args.prompts or _PROMPTS
    generate = demo.Generator(demo.load_model(), demo.STEPS)
    at, samples = demo.capture_steps(demo.STEPS, edges), []
    for prompt in tqdm(range(prompts), desc="capture", unit="prompt", disable=None):
        samples += demo.capture(generate.net, generate(data.random_scene(demo.CALIBRATION_SEED + prompt)), at)
    return samples, grid, "demo", {"prompts": prompts, "steps": demo.STEPS}


def _captured(args: argparse.Namespace) -> tuple[Any, Any, str, dict]:
    """The same of a capture file."""
    import paro_jax
    from paro_jax._cli._captures import CaptureFile

    position = args.text_position or "first"
    grid = paro_jax.TokenGrid(args.grid, text=args.text or 0, text_position=position, bricks=tuple(args.bricks))
    return CaptureFile(args.samples, grid), grid, "", {"samples": args.samples.name}
