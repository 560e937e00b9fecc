"""`paro inspect PLAN`: what a plan file holds, checked, as tables, a drawn mask and a picture."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from paro_jax._cli import _show
from paro_jax._plan import AttentionPlan

_FULL_TABLE = 36  # up to this many rows, one for each head; beyond, one for each site (--json has them all)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="check a plan file and show what it holds",
        description="Check a plan file and show its header, its densities and orders, and one head's mask.",
    )
    parser.add_argument("plan", type=_show.path, metavar="PLAN", help="a .safetensors file or an orbax folder")
    parser.add_argument(
        "--bucket", type=int, default=0, metavar="G", help="bucket of the mask that is drawn (default 0)"
    )
    parser.add_argument("--site", type=int, default=0, metavar="S", help="site of the mask that is drawn (default 0)")
    parser.add_argument("--head", type=int, default=0, metavar="H", help="head of the mask that is drawn (default 0)")
    parser.add_argument("--png", type=_show.path, metavar="FILE", help="also write a picture: densities, orders, masks")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import paro_jax

    plan = paro_jax.load_plan(args.plan)
    info = paro_jax.plan_info(args.plan)
    # Everything below sees [buckets, sites, heads, ...]; a plan may lack the first two axes.
    buckets = len(plan.bucket_edges) - 1
    keep = np.asarray(plan.mask().keep)
    nq, nk = keep.shape[-2:]
    keep = keep.reshape(buckets, -1, plan.heads, nq, nk)
    orders = np.asarray(plan.order_list(), dtype=object).reshape(keep.shape[:3])
    where = {"bucket": args.bucket, "site": args.site, "head": args.head}
    for (name, index), size in zip(where.items(), keep.shape[:3], strict=True):
        if not 0 <= index < size:
            raise _show.UserError(f"--{name}: this plan has {size}, numbered from 0 to {size - 1}; got {index}")

    if args.png is not None:
        picture(plan, keep, orders, args.png)
    if args.json:
        print(
            _show.dumps({"header": info, "density": plan.density, "bytes": plan.nbytes, "heads": _heads(keep, orders)})
        )
        return 0

    _show.fields("", _summary(plan, keep, info, args.plan))
    if orders.size <= _FULL_TABLE:
        _show.table("heads", _heads(keep, orders))
    else:
        _show.table("sites", _sites(keep, orders))
    drawn = paro_jax.BlockMask(keep[args.bucket, args.site, args.head], plan.block)
    print(f"mask of bucket {args.bucket}, site {args.site}, head {args.head}, in order {orders[tuple(where.values())]}")
    print(drawn.draw())
    if args.png is not None:
        _show.note(f"wrote {args.png}")
    return 0


def _summary(plan: AttentionPlan, keep: np.ndarray, info: dict, path: Path) -> dict:
    grid = plan.grid
    text = f", text {grid.text} {grid.text_position}" if grid.text else ", no text"
    quant = ", ".join(f"{name} {value}" for name, value in vars(plan.quant).items())
    summary = {
        "plan": path,
        "model": info.get("model") or "not named",
        "grid": " x ".join(map(str, grid.shape)) + f"{text}: {grid.tokens} tokens",
        "block": f"{plan.block[0]} x {plan.block[1]} tokens, {keep.shape[-2]} x {keep.shape[-1]} blocks a head",
        "buckets, sites, heads": keep.shape[:3],
        "bucket edges": plan.bucket_edges,
        "widths": quant,
        "calibrated K mean": plan.k_mean is not None,
        "visited first": "none" if plan.first is None else f"{plan.first.shape[-1]} heaviest of each row",
        "density": plan.density,
        "size": f"{plan.nbytes / 1e6:.3g} MB",
    }
    if plan.wide is not None and plan.wide_quant is not None:
        wide = ", ".join(f"{name} {value}" for name, value in vars(plan.wide_quant).items())
        summary["wide widths"] = f"{wide}; at {int(np.sum(np.asarray(plan.wide)))} of {plan.wide.size} (bucket, site)"
    for name, value in (info.get("provenance") or {}).items():
        summary[f"made: {name}"] = value if not isinstance(value, dict | list) else _show.dumps(value).replace("\n", "")
    return summary


def _heads(keep: np.ndarray, orders: np.ndarray) -> list[dict]:
    density = keep.mean(axis=(-2, -1))
    return [
        {"bucket": g, "site": s, "head": h, "order": orders[g, s, h], "density": float(density[g, s, h])}
        for g, s, h in np.ndindex(density.shape)
    ]


def _sites(keep: np.ndarray, orders: np.ndarray) -> list[dict]:
    density = keep.mean(axis=(-2, -1))
    rows = []
    for s in range(keep.shape[1]):
        counts = Counter(orders[:, s].ravel())
        rows.append(
            {
                "site": s,
                "density": float(density[:, s].mean()),
                "least": float(density[:, s].min()),
                "most": float(density[:, s].max()),
                "orders": ", ".join(f"{name} {count}" for name, count in counts.most_common()),
            }
        )
    return rows


def picture(plan: AttentionPlan, keep: np.ndarray, orders: np.ndarray, path: Path, masks: int = 12) -> None:
    """Write a PNG: density of every head, its order's name, and the masks of `masks` heads from sparsest to densest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buckets, sites, heads = keep.shape[:3]
    density = keep.mean(axis=(-2, -1)).reshape(buckets * sites, heads)
    shown = np.argsort(density, axis=None, kind="stable")
    shown = shown[np.unique(np.linspace(0, shown.size - 1, min(masks, shown.size)).astype(int))]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    tall = min(12.0, max(2.0, 0.32 * density.shape[0] + 1))
    figure = Figure(figsize=(11, tall + 2.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[tall, 2.1 * rows])[:, 0]
    axes = top.subplots()
    top_of_scale = density.max()
    image = axes.imshow(density, vmin=0, vmax=top_of_scale, cmap="viridis", aspect="auto")
    if density.shape[0] <= 60:
        names = [f"{g}, {s}" if buckets > 1 else str(s) for g, s in np.ndindex(buckets, sites)]
        axes.set_yticks(range(len(names)), names)
    axes.set(
        xlabel="head", ylabel="site" if buckets == 1 else "bucket, site", title="density of each head, and its order"
    )
    if density.size <= 400:  # beyond that the names are dust
        for (i, j), value in np.ndenumerate(density):
            name = orders.reshape(density.shape)[i, j]
            axes.text(
                j,
                i,
                name,
                ha="center",
                va="center",
                fontsize=6,
                color="white" if value < 0.6 * top_of_scale else "black",
            )
    top.colorbar(image, ax=axes, label="kept blocks / all blocks")
    for axes, index in zip(bottom.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        g, s, h = np.unravel_index(index, (buckets, sites, heads))
        axes.imshow(keep[g, s, h], cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"site {s} head {h}{f' bucket {g}' if buckets > 1 else ''}\n{orders[g, s, h]}", fontsize=7)
    for axes in bottom.axes:
        axes.set_axis_off()
    bottom.suptitle("kept blocks (black), rows are queries", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
