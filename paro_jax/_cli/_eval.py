"""`paro eval`: every method x density x width on one model, next to the dense generation from the same noise."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paro_jax._cli import _show

if TYPE_CHECKING:
    from paro_jax.evaluation import Subject

_OF_WEIGHTS = ("weights", "embeddings", "height", "width", "frames", "shift", "decode")
_QUICK = ("PARO", "no reorder", "window", "SpargeAttn", "PARO + SpargeAttn")
_STEPS, _QUICK_STEPS = 12, 6


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="compare methods x densities x widths on a model, in one table",
        description="Generate held-out prompts from several noises, dense and under every method, and write one table: "
        "DIR/eval.md, eval.json and eval.png. A run that was stopped goes on where it was. Of the model that ships "
        "with paro_jax, or of a published one from its weights and encoded prompts (as paro calibrate takes them; the "
        "first prompt is calibrated on, the others are in the table).",
    )
    parser.add_argument("--model", default="demo", metavar="NAME", help="demo (default), flux, cogvideox, wan, preset")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="(default: all; --list names them)")
    parser.add_argument(
        "--density", type=_show.density, nargs="+", metavar="D", help="kept blocks / all blocks (default 0.5 0.3 0.2)"
    )
    parser.add_argument(
        "--widths", nargs="+", metavar="W", help="of every method that is named (default bf16; --list names them)"
    )
    parser.add_argument("--prompts", type=_show.positive, metavar="N", help="(default 4; all of --embeddings)")
    parser.add_argument("--seeds", type=_show.positive, metavar="N", help="noises for each prompt (default 4)")
    parser.add_argument("--seed", type=_show.natural, default=0, metavar="S", help="of prompts and noise (default 0)")
    parser.add_argument("--steps", type=_show.positive, metavar="N", help=f"of denoising (default {_STEPS} for demo)")
    parser.add_argument("--block", type=_show.positive, nargs=2, default=(64, 64), metavar="B", help="(default 64 64)")
    parser.add_argument(
        "--weights", metavar="DIR", help="of a published model: as diffusers or `paro convert` saved it"
    )
    parser.add_argument("--embeddings", type=_show.path, metavar="FILE", help=".safetensors of encoded prompts")
    parser.add_argument("--height", type=_show.positive, metavar="PX", help="pixels (default: as it was trained)")
    parser.add_argument("--width", type=_show.positive, metavar="PX", help="pixels (default: as it was trained)")
    parser.add_argument("--frames", type=_show.positive, metavar="N", help="of the video (default: as it was trained)")
    parser.add_argument("--shift", type=float, metavar="S", help="of the noise schedule of FLUX.1 and Wan")
    hook = dict(metavar="MODULE:NAME")
    parser.add_argument("--decode", **hook, help="latents [1, ...] -> pixels [F, H, W, 3] in [0, 1]; without, latents")
    parser.add_argument("--features", **hook, help="videos -> [n, d] for the Fréchet distance (default: a small one)")
    parser.add_argument("--flow", **hook, help="frames -> optical flow (default: Lucas-Kanade)")
    parser.add_argument("--clip-images", **hook, help="frames -> embeddings; with --clip-texts")
    parser.add_argument("--clip-texts", **hook, help="captions -> embeddings")
    parser.add_argument("--vqa", **hook, help="videos, captions -> scores [n]")
    parser.add_argument("--quick", action="store_true", help="a few methods at 30 %%, one prompt, one noise, few steps")
    parser.add_argument("--list", action="store_true", help="name the methods and widths, and stop")
    parser.add_argument("--out", type=_show.path, default=Path("out/eval"), metavar="DIR", help="(default out/eval)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from paro_jax import evaluation
    from paro_jax.demo.run import bucket_edges, capture_steps

    if args.list:
        methods = [{"method": m.name, "source": m.source} for m in evaluation.METHODS]
        widths = list(evaluation.WIDTHS)
        if args.json:
            print(_show.dumps({"methods": methods, "widths": widths}))
        else:
            _show.table("methods", methods)
            _show.table("widths", [{"width": width} for width in widths])
        return 0
    rows = _rows(args)
    hooks = {name: _hook(f"--{name}", getattr(args, name.replace("-", "_"))) for name in _HOOKS}
    if (hooks["clip-images"] is None) != (hooks["clip-texts"] is None):
        raise _show.UserError("--clip-images and --clip-texts belong together; give both")
    given = {"features": hooks["features"], "flow": hooks["flow"], "vqa": hooks["vqa"]}
    given |= {"images": hooks["clip-images"], "texts": hooks["clip-texts"]}
    extractors = evaluation.Extractors(**{name: hook for name, hook in given.items() if hook is not None})
    _show.probe("--out", args.out, folder=True)
    subject = _demo(args) if args.model == "demo" else _published(args, hooks["decode"])
    edges = bucket_edges(subject.steps)
    table = evaluation.evaluate(
        subject, out=args.out, rows=rows, edges=edges, at=capture_steps(subject.steps, edges), block=tuple(args.block),
        extractors=extractors,
    )  # fmt: skip
    if args.json:
        print(_show.dumps({"about": table.about, "rows": table.rows, "failures": table.failures}))
    else:
        columns = ["method", "width", "density", "psnr", "psnr_spread", "over_paro", "over_paro_error", "ssim"]
        columns += ["cosine", "relative_l1", "frechet", "attention_relative_l1", "mask_cost", "seconds", "failed"]
        _show.table("paro eval: each row against the dense samples from the same noise", table.rows, columns)
        for failure in table.failures:
            print(f"{failure['row']}: {failure['reason']}")
        print(f"in {args.out}: eval.md, eval.json, eval.png")
    return 1 if any(row["failed"] for row in table.rows) else 0


_HOOKS = ("decode", "features", "flow", "clip-images", "clip-texts", "vqa")


def _rows(args: argparse.Namespace) -> Sequence[Any]:
    """What the command line names, or the default table."""
    from paro_jax.evaluation import DENSITIES, METHODS, WIDTHS, Row, default_rows

    for option, names, known in (
        ("--methods", args.methods, [method.name for method in METHODS]),
        ("--widths", args.widths, list(WIDTHS)),
    ):
        for name in names or ():
            if name not in known:
                raise _show.UserError(f"{option}: expected some of {', '.join(map(repr, known))}; got {name!r}")
    densities = args.density or ((0.3,) if args.quick else DENSITIES)
    names = args.methods or (_QUICK if args.quick else None)
    if names is None and args.widths is None:
        return default_rows(densities)
    chosen = [method for method in METHODS if names is None or method.name in names]
    return [
        Row(method.name, density, width)
        for method in chosen
        for density in (densities if method.densities else (None,))
        for width in args.widths or ("bf16",)
    ]


def _hook(option: str, name: str | None) -> Callable[..., Any] | None:
    """What `module:name` names, modules of the working folder included."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise _show.UserError(f"{option}: expected MODULE:NAME of a function that can be imported, {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise _show.UserError(f"{option}: expected a function, {name} is {type(found).__name__}")
    return found


def _demo(args: argparse.Namespace) -> Subject:
    from paro_jax.evaluation import demo_subject

    for name in _OF_WEIGHTS:
        if getattr(args, name) is not None:
            raise _show.UserError(f"--{name} belongs to --model flux, cogvideox or wan; the demo model has its own")
    steps = args.steps or (_QUICK_STEPS if args.quick else _STEPS)
    if steps > 1000:
        raise _show.UserError(f"--steps: expected at most 1000, the noise levels of training; got {steps}")
    few = 1 if args.quick else 4
    return demo_subject(prompts=args.prompts or few, seeds=args.seeds or few, steps=steps, seed=args.seed)


def _published(args: argparse.Namespace, decode: Callable[..., Any] | None) -> Subject:
    import jax.numpy as jnp
    import numpy as np

    from paro_jax._cli import _published
    from paro_jax.evaluation import Case, Subject

    for option in ("weights", "embeddings"):
        if getattr(args, option) is None:
            raise _show.UserError(f"--model {args.model} needs --{option}; paro calibrate --help says what it is")
    embeddings = _published.read(args.embeddings)
    prompts = min(args.prompts or embeddings.prompts - 1, embeddings.prompts - 1)
    if prompts < 1 or (args.prompts or 1) > prompts:
        raise _show.UserError(
            f"--prompts: expected at most {embeddings.prompts - 1}, {args.embeddings.name} holds {embeddings.prompts}; "
            "one is calibrated on; encode more"
        )
    config, name, how, grid = _published.described(args, embeddings)
    net = _published.loaded(args)

    def case(prompt: int, seed: int) -> Case:
        inputs, scale = _published.inputs_of(embeddings, prompt, config, how)
        noise = embeddings.row("latents", prompt) if seed == 0 else None
        if noise is None:
            noise = np.random.default_rng((args.seed + seed, prompt)).standard_normal((1, *how.latents), np.float32)
        return Case(f"prompt {prompt}", seed, inputs, noise, scale)

    def frames_last(latents: np.ndarray) -> np.ndarray:
        """[1, C, H, W], or [1, F, C, H, W] (CogVideoX), or [1, C, F, H, W] (Wan) -> [F, H, W, C]."""
        x = latents[0][None] if latents.ndim == 4 else latents[0].swapaxes(0, 1) if name == "Wan" else latents[0]
        return np.moveaxis(x, 1, -1)

    def pixels(latents: np.ndarray) -> np.ndarray:
        assert decode is not None
        found = np.asarray(decode(latents), np.float32)
        if found.ndim != 4 or found.shape[-1] != 3:
            raise _show.UserError(f"--decode: expected [F, H, W, 3] of one sample, it returned {found.shape}")
        return found

    return Subject(
        name=name, net=net, grid=grid, sites=how.sites, heads=config.num_heads, head_dim=config.head_dim,
        steps=how.steps, sample=how.sample, view=pixels if decode else frames_last, pixels=decode is not None,
        cases=[case(p, s) for p in range(1, prompts + 1) for s in range(args.seeds or 1)],
        calibration=[case(0, 0)], fitting=case(0, 0), heldout=case(prompts, 0), dtype=jnp.bfloat16,
    )  # fmt: skip
