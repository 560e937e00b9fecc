"""What only all rows together tell: percent of the ceilings, the targets, how cost grows; and the chart."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.bench import ceilings
from paro_jax import _files

Row = dict[str, Any]


def finished(rows: Sequence[Row]) -> list[Row]:
    """The rows with `percent_of_ceiling` and, for attention, `speedup` over the first dense peer that was measured."""
    first = [row for row in rows if row["kind"] == "ceiling" and row["name"] != "again"]
    rates = {row["of"]: row["rate"] for row in first if row["status"] == "measured"}
    done = []
    for row in rows:
        row = dict(row)
        if row.get("tops") is not None:
            # An emulated width is multiplied at the wide dtype.
            qk, pv = ("bf16", "bf16") if row["contestant"] == "xla" else (row["qk"], row["pv"])
            ceiling = ceilings.of_widths(qk, pv, row["dtype"], rates)
            row["percent_of_ceiling"] = None if ceiling is None else 100 * row["tops"] / ceiling
            dense = baseline(rows, row["name"])
            row["speedup"] = dense["ms"] / row["ms"] if dense is not None else None
        done.append(row)
    return done


def baseline(rows: Sequence[Row], workload: str) -> Row | None:
    """The dense peer that speedups of a workload are over: cuDNN bf16 on a GPU, jax.nn on a CPU."""
    for name in ("cudnn bf16", "jax.nn"):
        if (row := find(rows, kind="peer", name=workload, contestant=name)) is not None:
            return row
    return None


def find(rows: Sequence[Row], **facts: Any) -> Row | None:
    """The first row that was measured and has these facts."""
    for row in rows:
        if row["status"] == "measured" and all(row.get(name) == value for name, value in facts.items()):
            return row
    return None


def drift(rows: Sequence[Row]) -> float | None:
    """Rate of the wide product at the end over that at the start: a GPU that grew hot or slow shows here."""
    again = find(rows, kind="ceiling", name="again")
    first = find(rows, kind="ceiling", name=again["of"]) if again else None
    return again["rate"] / first["rate"] if again and first else None


def linearity(rows: Sequence[Row]) -> dict[str, float] | None:
    """How time grows with kept blocks: the slope of their logarithms (1 is linear), and the extremes of their ratio."""
    points = [
        (row["kept_blocks"], row["ms"]) for row in rows if row["kind"] == "scaling" and row["status"] == "measured"
    ]
    if len(points) < 2:
        return None
    blocks, ms = np.array(sorted(points)).T
    each = 1e6 * ms / blocks
    slope = np.polyfit(np.log(blocks), np.log(ms), 1)[0]
    return {"slope": float(slope), "least_ns_per_block": float(each.min()), "most_ns_per_block": float(each.max()),
            "from_blocks": float(blocks[0]), "to_blocks": float(blocks[-1])}  # fmt: skip


def targets(rows: Sequence[Row], backend: str) -> list[Row]:
    """What the kernels are to reach on an H200 at full size; `measured` and `met` None where a row is lacking."""
    d64, d128 = "cogvideox_5b", "flux_2048"
    eight = {"qk": "int8", "pv": "int8"}

    def ours(name: str, density: float, mask: str = "calibrated", **widths: str) -> Row | None:
        mask = "dense" if density == 1 else mask
        return find(
            rows, kind="attention", name=name, contestant=backend, density=density, mask=mask, **(widths or eight)
        )

    def peer(name: str, contestant: str, **facts: Any) -> Row | None:
        return find(rows, kind="peer", name=name, contestant=contestant, **facts)

    def faster(mine: Row | None, theirs: Row | None) -> float | None:
        return theirs["ms"] / mine["ms"] if mine and theirs else None

    wide = {"qk": "bf16", "pv": "bf16"}
    found = [
        _at_least("dense int8/int8, D 128: speed over cuDNN fp8", 1.05, faster(ours(d128, 1), peer(d128, "cudnn fp8"))),
        _at_least("dense int8/int8, D 64: speed over cuDNN bf16", 1.5, faster(ours(d64, 1), peer(d64, "cudnn bf16"))),
        _at_least("20 % int8/int8, D 64: speed over cuDNN bf16", 6, faster(ours(d64, 0.2), peer(d64, "cudnn bf16"))),
        _at_least("20 % int8/int8, D 128: speed over cuDNN bf16", 7, faster(ours(d128, 0.2), peer(d128, "cudnn bf16"))),
    ]
    for name in (d64, d128):
        speed = faster(ours(name, 1, **wide), peer(name, "cudnn bf16"))
        found.append(_at_least(f"dense bf16, {name}: speed over cuDNN bf16", 0.9, speed))
    above, against = [], []
    for row in rows:
        if row["kind"] != "attention" or row["status"] != "measured" or row["contestant"] != backend:
            continue
        if (row["qk"], row["pv"]) != ("int8", "int8"):
            continue
        if (dense := ours(row["name"], 1)) is not None and row["density"] < 1:
            above.append(row["ms"] / dense["ms"] - row["kept_density"])
        flex = peer(row["name"], "torch flex", density=row["density"], mask=row["mask"])
        if (speed := faster(row, flex)) is not None:
            against.append(speed)
    found.append(_at_most("time over dense less density, worst row", 0.03, max(above, default=None)))
    found.append(_at_least("int8/int8 over FlexAttention, same mask, worst row", 1.0, min(against, default=None)))
    path = find(rows, kind="path", name=d64, density=1.0, **eight)
    share = path["overhead_of_dense_attention"] if path else None
    found.append(_at_most("permute + quantise + mask over dense attention, 17776 tokens", 0.01, share))
    line = linearity(rows)
    off = abs(line["slope"] - 1) if line else None
    found.append(_at_most("scaling: slope of log time over log kept blocks, from 1", 0.05, off))
    return found


def _at_least(name: str, bound: float, measured: float | None) -> Row:
    return {"name": name, "measured": measured, "bound": "at least", "target": bound,
            "met": None if measured is None else measured >= bound}  # fmt: skip


def _at_most(name: str, bound: float, measured: float | None) -> Row:
    return {"name": name, "measured": measured, "bound": "at most", "target": bound,
            "met": None if measured is None else measured <= bound}  # fmt: skip


def tile_rows(rows: Sequence[Row], key: Callable[[Row], dict[str, Any]]) -> list[Row]:
    """The table of tiles that rows of kind "tune" make, by request; a candidate that failed says why."""
    grouped: dict[str, Row] = {}
    for row in rows:
        about = key(row)
        group = grouped.setdefault(str(about), {**about, "candidates": []})
        facts = ("ms", "low_ms", "high_ms", "timer") if row["status"] == "measured" else ("status", "reason")
        group["candidates"].append({"tiles": row["tiles"], **{name: row.get(name) for name in facts}})
    return list(grouped.values())


# --- the chart ------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A PNG: per workload, time over density for each contestant; and time over kept blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["status"] == "measured" and row.get("tops") is not None]
    workloads = list(dict.fromkeys(row["name"] for row in measured if row["kind"] in ("attention", "peer")))
    panels: list[tuple[Callable[..., None], list[Row], str]] = [
        (_draw_densities, [row for row in measured if row["name"] == name], name) for name in workloads
    ]
    if scaling := [row for row in measured if row["kind"] == "scaling"]:
        panels.append((_draw_scaling, scaling, "cost against kept blocks"))
    columns = min(3, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    figure.suptitle(title, fontsize=9)
    if panels:
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for one, (drawn, some, name) in zip(axes, panels, strict=False):
            drawn(one, some)
            one.set_title(name, fontsize=10)
        for one in axes[len(panels) :]:
            one.set_axis_off()
    with _files.replacing(path) as new:
        figure.savefig(new, dpi=110, format="png")


def _draw_densities(axes: Any, rows: list[Row]) -> None:
    """Milliseconds over kept density; contestants without a mask are a level line."""
    from matplotlib import colormaps

    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("attention", "peer") and row["mask"] != "random":
            width = f" {row['qk']}/{row['pv']}" if row["kind"] == "attention" else ""
            lines.setdefault(row["contestant"] + width, []).append(row)
    for i, (name, some) in enumerate(lines.items()):
        some = sorted(some, key=lambda row: row["kept_density"])
        colour = colormaps["tab10"](i % 10)
        if len(some) == 1 and some[0]["kind"] == "peer":
            axes.axhline(some[0]["ms"], color=colour, linestyle="--", linewidth=1.2, label=name)
            continue
        ms = np.array([row["ms"] for row in some])
        spread = np.abs(np.array([[row["low_ms"] for row in some], [row["high_ms"] for row in some]]) - ms)
        axes.errorbar([row["kept_density"] for row in some], ms, spread, color=colour, marker="o", markersize=4,
                      capsize=2, linewidth=1.5, label=name)  # fmt: skip
    axes.set(xlabel="kept blocks / all blocks", ylabel="ms", xlim=(0, 1.05), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_scaling(axes: Any, rows: list[Row]) -> None:
    """Milliseconds over kept blocks, both logarithmic, beside the line through the largest that is in proportion."""
    rows = sorted(rows, key=lambda row: row["kept_blocks"])
    blocks, ms = (np.array([row[name] for row in rows], float) for name in ("kept_blocks", "ms"))
    axes.loglog(blocks, ms, "o-", label=f"{rows[0]['contestant']} {rows[0]['qk']}/{rows[0]['pv']}")
    axes.loglog(blocks, ms[-1] * blocks / blocks[-1], ":", color="grey", label="in proportion")
    for row, x, y in zip(rows, blocks, ms, strict=True):
        axes.annotate(f"{row['tokens']}", (x, y), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="kept blocks", ylabel="ms")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
