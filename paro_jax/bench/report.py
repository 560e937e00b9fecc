"""What only all rows together tell: percent of the ceilings, how cost grows; and the chart."""

from collections.abc import Callable, Mapping, Sequence
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


def widths(row: Row) -> str:
    """Those of both products: what is not quantised has the width of the arrays, bf16 on a GPU."""
    dtype = {"bfloat16": "bf16"}.get(row.get("dtype", "bfloat16"), row.get("dtype"))
    return f"{row['qk']}/{row['pv']}".replace("bf16", str(dtype))


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


def tile_rows(rows: Sequence[Row], key: Callable[[Row], dict[str, Any]]) -> list[Row]:
    """The table of tiles that rows of kind "tune" make, by request; a candidate that failed says why.

    Without requests of which some candidate was not reached: a table that was complete speaks on.
    """
    grouped: dict[str, Row] = {}
    for row in rows:
        about = key(row)
        group = grouped.setdefault(str(about), {**about, "candidates": []})
        facts = ("ms", "low_ms", "high_ms", "timer") if row["status"] == "measured" else ("status", "reason")
        group["candidates"].append({"tiles": row["tiles"], **{name: row.get(name) for name in facts}})
    return [
        group
        for group in grouped.values()
        if not any(entry.get("status") == "not reached" for entry in group["candidates"])
    ]


# --- the chart ------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], title: str, path: Path, shapes: Mapping[str, str]) -> None:
    """A PNG: per workload, time over density for each contestant; and time over kept blocks.

    shapes: by workload, what was measured under its name.
    """
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
            one.set_title(f"{name}\n{shapes[name]}" if name in shapes else name, fontsize=9)
        for one in axes[len(panels) :]:
            one.set_axis_off()
    with _files.replacing(path) as new:
        figure.savefig(new, dpi=110, format="png")


def _draw_densities(axes: Any, rows: list[Row]) -> None:
    """Milliseconds over kept density; contestants without a mask are a level line."""
    from matplotlib import colormaps

    lines: dict[str, list[Row]] = {}
    drawn = []
    for row in sorted(rows, key=lambda row: row["kind"]):  # ours first
        if row["kind"] in ("attention", "peer") and row["mask"] != "random":
            width = f" {widths(row)}" if row["kind"] == "attention" else ""
            lines.setdefault(row["contestant"] + width, []).append(row)
    for i, (name, some) in enumerate(lines.items()):
        some = sorted(some, key=lambda row: row["kept_density"])
        colour = colormaps["tab10"](i % 10)
        if len(some) == 1 and some[0]["kind"] == "peer":
            drawn.append(axes.axhline(some[0]["ms"], color=colour, linestyle="--", linewidth=1.2, label=name))
            continue
        ms = np.array([row["ms"] for row in some])
        spread = np.abs(np.array([[row["low_ms"] for row in some], [row["high_ms"] for row in some]]) - ms)
        drawn.append(axes.errorbar([row["kept_density"] for row in some], ms, spread, color=colour, marker="o",
                                   markersize=4, capsize=2, linewidth=1.5, label=name))  # fmt: skip
    axes.set(xlabel="kept blocks / all blocks", ylabel="ms", xlim=(0, 1.05), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(handles=drawn, fontsize=7)


def _draw_scaling(axes: Any, rows: list[Row]) -> None:
    """Milliseconds over kept blocks, both logarithmic, beside the line through the largest that is in proportion."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = sorted(rows, key=lambda row: row["kept_blocks"])
    blocks, ms = (np.array([row[name] for row in rows], float) for name in ("kept_blocks", "ms"))
    axes.loglog(blocks, ms, "o-", label=f"{rows[0]['contestant']} {widths(rows[0])}")
    axes.loglog(blocks, ms[-1] * blocks / blocks[-1], ":", color="grey", label="in proportion")
    for row, x, y in zip(rows, blocks, ms, strict=True):
        axes.annotate(f"{row['tokens']}", (x, y), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="kept blocks; beside the points, tokens", ylabel="ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
