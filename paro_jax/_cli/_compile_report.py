"""`paro compile-report`: what the GPU's compiler makes of the kernels, on a machine without a GPU."""

import argparse
from typing import Any

from paro_jax._cli import _show


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compile-report",
        help="compile the GPU kernels ahead of time: registers, spills, instructions, bound",
        description="Compile the kernels of the named workloads ahead of time for a GPU target and count what their "
        "main loops do. Needs the CUDA compiler packages but no GPU; `make compile-report` installs them. Minutes.",
    )
    parser.add_argument("--target", default="sm_90a", metavar="T", help="the GPU to compile for (default sm_90a)")
    parser.add_argument("--json", action="store_true", help="print JSON rows and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pallas_kernels import compile_report

    rows = compile_report.report(args.target, _show.note)
    if args.json:
        print(_show.dumps(rows))
        return 0
    short = ("name", "registers", "spills", "shared_memory", "barriers", "bound_ratio", "bound_ratio_every")
    _show.table(f"kernels for {args.target}", rows, short)
    arrange = [row for row in rows if "memory" in row["clocks"]]
    attention = [row for row in rows if "memory" not in row["clocks"]]
    for unit, some in (("128 x 128 scores", attention), ("128 tokens of a head", arrange)):
        for title, key in ((f"warp instructions per {unit}", "instructions"), (f"clocks of one SM, {unit}", "clocks")):
            _show.table(title, [{"name": row["name"], **{k: round(v) for k, v in row[key].items()}} for row in some])
    return 0
