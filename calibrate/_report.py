"""What calibration decided and how well it does: rows of numbers, a table, pictures."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from calibrate import _checkpoint, _choose
from calibrate._checkpoint import State, Sums
from calibrate._score import Task
from paro_jax import AttentionPlan, _files

_COLUMNS = 12  # kept-block pictures in a row
_DRAWN = 48  # heads in the picture of kept blocks
# What a row says of held-out samples, and where `Held` has it.
_HELD = {"mass": "mass", "l1": "error", "cosine": "cosine"} | {
    name: name for name in ("incoherence", "model_incoherence")
}


@dataclass
class Held:
    """Means over held-out samples, {(bucket, site): float64 [heads]}: mass retained, output error and cosine, and the
    incoherence of blocks in the plan's order and in model order."""

    mass: Sums = field(default_factory=dict)
    error: Sums = field(default_factory=dict)
    cosine: Sums = field(default_factory=dict)
    incoherence: Sums = field(default_factory=dict)
    model_incoherence: Sums = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Report:
    """The outcome of `make_plan`.

    `rows`: one dict per (bucket, site, head), all plain numbers and strings: bucket, site, head, order, density (kept
    / all blocks), retained_mass (part of the attention that the kept blocks hold), threshold (None when each row has
    its own), error and model_error (what the objective says of the chosen order and of model order; None with one
    candidate), heldout_mass, heldout_l1 (relative L1 of the output against dense attention), heldout_cosine (None
    where there was no held-out sample, or none with v), heldout_incoherence and heldout_model_incoherence (mean over
    blocks of max P / mean P, in the order chosen and in model order: the lower, the better a block quantises).
    `summary`: settings and figures of the whole. `unmatched`: what was asked for and matched nothing.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    unmatched: list[str]
    plan: AttentionPlan

    def table(self) -> str:
        """The report as text: a line per bucket and site."""
        lines = [[name.replace("_", " "), _text(value)] for name, value in self.summary.items()]
        width = max(len(name) for name, _ in lines)
        text = [f"{name.ljust(width)}  {value}" for name, value in lines] + [""]
        columns = ["bucket", "site", "orders", "density", "least", "most", "retained mass", "least"]
        held = [f"heldout_{name}" for name in _HELD if self.summary.get(f"heldout_{name}") is not None]
        cells = [columns + [name.replace("_", " ").replace("heldout", "held-out") for name in held]]
        for (bucket, site), rows in _by_site(self.rows).items():
            density, mass = ([row[name] for row in rows] for name in ("density", "retained_mass"))
            orders = ", ".join(f"{name} {n}" for name, n in Counter(row["order"] for row in rows).most_common())
            values = [np.mean(density), min(density), max(density), np.mean(mass), min(mass)]
            values += [_mean([row[name] for row in rows]) for name in held]
            cells.append([str(bucket), str(site), orders, *map(_text, values)])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        for line in cells:
            aligned = (c.ljust(w) if i == 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            text.append("  ".join(aligned).rstrip())
        if self.unmatched:
            text += ["", "matched nothing:", *(f"  {line}" for line in self.unmatched)]
        return "\n".join(text)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Summary, rows and what matched nothing, as JSON. Infinity and NaN, which JSON lacks, become null."""
        value = {"summary": self.summary, "rows": self.rows, "unmatched": self.unmatched}
        return json.dumps(_plain(value), indent=1, allow_nan=False)

    def save(self, directory: str | os.PathLike) -> list[Path]:
        """Write report.json, orders.png, density.png and blocks.png to `directory` (made if missing); their paths."""
        directory = _files.expanded(directory, "a report's folder")
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "report.json"
        with _files.replacing(path) as new:
            new.write_text(self.to_json() + "\n")
        drawn = [(directory / "orders.png", self._draw_orders()), (directory / "density.png", self._draw_density())]
        drawn.append((directory / "blocks.png", self._draw_blocks()))
        for name, figure in drawn:
            with _files.replacing(name) as new:
                figure.savefig(new, dpi=110, format="png", bbox_inches="tight")  # labels outside the layout too
        return [path, *(name for name, _ in drawn)]

    def _grid(self, name: str) -> np.ndarray:
        """[buckets, sites, heads] of one number of the rows."""
        buckets, sites, heads = (1 + max(row[axis] for row in self.rows) for axis in ("bucket", "site", "head"))
        return np.array([row[name] for row in self.rows], dtype=object).reshape(buckets, sites, heads)

    def _draw_orders(self) -> Any:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        names = list(self.plan.order_names)
        chosen = np.vectorize(names.index, otypes=[int])(self._grid("order")[0])
        sites, heads = chosen.shape
        colours = ["#d9d9d9", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#994f00", "#000000"]
        colours = [colours[i % len(colours)] for i in range(len(names))]
        figure = Figure(figsize=(max(5.0, 3.0 + 0.28 * heads), max(2.6, 1.6 + 0.28 * sites)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(chosen, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
        used = Counter(self._grid("order")[0].flat)
        patches = [Patch(color=c, label=f"{n} ({used[n]})") for n, c in zip(names, colours, strict=True) if used[n]]
        figure.legend(handles=patches, loc="outside right upper", frameon=False)
        axes.set(xlabel="head", ylabel="site", title="order of each head", xticks=_ticks(heads), yticks=_ticks(sites))
        return figure

    def _draw_density(self) -> Any:
        from matplotlib.figure import Figure

        density, mass = (self._grid(name).astype(float) for name in ("density", "retained_mass"))
        buckets, sites, heads = density.shape
        size = (max(7.0, 2.6 + 0.4 * heads), buckets * max(1.8, 0.9 + 0.2 * sites))
        figure = Figure(figsize=size, layout="constrained")
        shown = {"density": (density, "viridis", None), "retained mass": (mass, "magma", 1.0)}
        axes = figure.subplots(buckets, 2, squeeze=False)
        for column, (title, (values, colours, top)) in enumerate(shown.items()):
            for bucket in range(buckets):
                ax = axes[bucket, column]
                image = ax.imshow(
                    values[bucket],
                    cmap=colours,
                    vmin=0,
                    vmax=top or values.max(),
                    aspect="auto",
                    interpolation="nearest",
                )
                where = f", bucket {bucket}" if buckets > 1 else ""
                ax.set(title=title + where, xlabel="head", ylabel="site", xticks=_ticks(heads), yticks=_ticks(sites))
            figure.colorbar(image, ax=axes[:, column])
        return figure

    def _draw_blocks(self) -> Any:
        from matplotlib.figure import Figure

        rows = self.rows
        if len(rows) > _DRAWN:  # spread over all densities
            by_density = sorted(rows, key=lambda row: row["density"])
            rows = [by_density[round(i * (len(rows) - 1) / (_DRAWN - 1))] for i in range(_DRAWN)]
            rows.sort(key=lambda row: (row["bucket"], row["site"], row["head"]))
        buckets = 1 + max(row["bucket"] for row in self.rows)
        columns = min(_COLUMNS, len(rows))
        lines = -(-len(rows) // columns)
        figure = Figure(figsize=(max(4.0, 1.3 * columns), 0.5 + 1.6 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, row in zip(axes.flat, rows, strict=False):
            site = self.plan[row["bucket"]][row["site"]] if buckets > 1 else self.plan[row["site"]]
            keep = np.asarray(site.mask().keep[row["head"]])
            ax.imshow(
                keep, cmap="Greys", vmin=0, vmax=1, interpolation="nearest" if max(keep.shape) < 100 else "antialiased"
            )
            where = f"bucket {row['bucket']} " if buckets > 1 else ""
            ax.set_title(
                f"{where}site {row['site']} head {row['head']}\n{row['order']} {row['density']:.2f}", fontsize=6
            )
        figure.suptitle("kept blocks (black); rows are queries", fontsize=9)
        return figure


def make(
    task: Task,
    density: int,
    plan: AttentionPlan,
    state: State,
    threshold: np.ndarray,
    held: Held | None,
    seconds: float,
) -> Report:
    """The report on the plan of one density, by its number; `threshold` as `_choose.mask` gives it."""
    buckets, sites, heads = len(task.bucket_edges) - 1, plan.lead[-1], plan.heads
    nk = task.grid.blocks(task.block)[1]
    names = np.array(plan.order_list(), dtype=object).reshape(buckets, sites, heads)
    per_head = None if task.rule == "row" else np.broadcast_to(threshold, (buckets, sites, heads))
    rows = []
    for bucket, site in np.ndindex(buckets, sites):
        local = plan[bucket][site] if buckets > 1 else plan[site]
        keep = np.asarray(local.mask().keep)
        retained = _choose.kept_mass(state.mass[density, bucket, site].mean, keep)
        errors = _checkpoint.over_buckets(state.errors, site)[density] if state.errors else None
        for head in range(heads):
            row = {"bucket": bucket, "site": site, "head": head, "order": names[bucket, site, head]}
            row |= {"density": float(keep[head].sum() / (keep.shape[1] * nk)), "retained_mass": float(retained[head])}
            row["threshold"] = None if per_head is None else float(per_head[bucket, site, head])
            row |= {"error": None, "model_error": None}
            if errors is not None:
                row["error"] = float(errors[task.orders.index(row["order"]), head])
                row["model_error"] = float(errors[0, head]) if task.orders[0] == task.grid.orders[0] else None
            for name, attribute in _HELD.items():
                sums = {} if held is None else getattr(held, attribute)
                found = sums.get((bucket, site))
                row[f"heldout_{name}"] = None if found is None else float(found.mean[head])
            rows.append(row)
    always = task.always
    objective = task.objective if isinstance(task.objective, str) else repr(task.objective)
    summary: dict[str, Any] = {
        # Counted, not plan.density, which is a mean of float32.
        "density": int(np.count_nonzero(plan.mask().keep)) / (buckets * sites * heads * always.size),
        "density_asked": task.densities[density],
        "density_floor": _choose.floor_blocks(always) / always.size,
        "retained_mass": float(np.mean([row["retained_mass"] for row in rows])),
        "threshold": float(threshold) if threshold.ndim == 0 else None,
        "rule": task.rule,
        "text_columns": task.text_columns,
        "objective": objective,
        "orders": ", ".join(task.orders),
        "grid": "x".join(map(str, task.grid.shape)) + (f" and text {task.grid.text}" if task.grid.text else ""),
        "block": "x".join(map(str, task.block)),
        "buckets": buckets,
        "sites": sites,
        "heads": heads,
        "samples": len(state.digests),
        "seconds": round(seconds, 2),
    }
    if held is not None:
        summary["heldout_samples"] = sum(entry.count for entry in held.mass.values())
        for name in _HELD:
            summary[f"heldout_{name}"] = _mean([row[f"heldout_{name}"] for row in rows])
    return Report(rows, summary, _unmatched(task, task.densities[density], rows, held, buckets, sites), plan)


def _unmatched(
    task: Task, density: float, rows: list[dict[str, Any]], held: Held | None, buckets: int, sites: int
) -> list[str]:
    used = {row["order"] for row in rows}
    found = [f"order {name}: no head chose it" for name in task.orders if name not in used]
    floor = _choose.floor_blocks(task.always) / task.always.size
    bare = [row for row in rows if row["density"] <= floor < density]
    if bare:
        where = ", ".join(f"({row['bucket']}, {row['site']}, {row['head']})" for row in bare[:8])
        more = f" and {len(bare) - 8} more" if len(bare) > 8 else ""
        found.append(f"threshold: nothing beyond what is always kept, in (bucket, site, head) {where}{more}")
    if held is not None:
        for about, sums in (("no sample", held.mass), ("no sample with v, so no output error", held.error)):
            gaps = [key for key in np.ndindex(buckets, sites) if key not in sums]
            if gaps:
                where = "anything" if len(gaps) == buckets * sites else ", ".join(map(str, gaps[:8]))
                more = f" and {len(gaps) - 8} more" if len(gaps) > 8 and where != "anything" else ""
                found.append(f"heldout: {about} for {where}{more}" + ("" if where == "anything" else " (bucket, site)"))
                break
    return found


def _by_site(rows: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    grouped: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["bucket"], row["site"]), []).append(row)
    return grouped


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ticks(n: int) -> list[int]:
    return list(range(0, n, max(1, -(-n // 12))))


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
