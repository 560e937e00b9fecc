"""`paro convert SRC DST`: published weights into a checkpoint that loads without conversion."""

import argparse
import time
from typing import Any

from paro_jax._cli import _show

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "keep": None}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn published weights into a checkpoint of ours",
        description="Read the weights of FLUX.1, CogVideoX or Wan and write them as an orbax checkpoint, which "
        "from_pretrained restores onto any mesh without conversion.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a folder that diffusers saved, a safetensors file, or a name on the hub"
    )
    parser.add_argument("destination", type=_show.path, metavar="DST", help="the folder to write; must not be there")
    parser.add_argument(
        "--model", metavar="NAME", help="what SRC is of, if it has no config.json: flux-dev, wan2.1-14b"
    )
    parser.add_argument("--dtype", choices=[*_DTYPES], default="bf16", help="of the parameters (default bf16)")
    parser.add_argument("--force", action="store_true", help="replace a converted checkpoint at DST")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    import jax
    from flax import nnx

    from paro_jax.models import weights

    start = time.perf_counter()
    # What cannot be written is known now, not after the work.
    weights.check_free(args.destination, force=args.force)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # an accelerator may be too small, and is not needed
        model = weights.from_pretrained(args.source, model=args.model, dtype=_DTYPES[args.dtype], progress=True)
        arrays = [value.get_value() for _, value in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        size = sum(x.nbytes for x in arrays)
        _show.note(f"write {size / 1e9:.3g} GB to {args.destination}")
        weights.save_checkpoint(model, args.destination, force=args.force)
    found = {
        "path": args.destination,
        "source": args.source,
        "model": type(model).__name__,
        "parameters": sum(x.size for x in arrays),
        "bytes": size,
        "dtypes": sorted({str(x.dtype) for x in arrays}),
        "seconds": time.perf_counter() - start,
        "config": dataclasses.asdict(model.config),
    }
    if args.json:
        print(_show.dumps(found))
        return 0
    _show.fields("", {name: value for name, value in found.items() if name != "config"})
    print(f"to load it: paro_jax.models.weights.from_pretrained({str(args.destination)!r})")
    return 0
