"""The table: means over cases with their spread over seeds, as markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paro_jax import _files
from paro_jax.evaluation._methods import METHODS, WIDTHS

MEANS = ("psnr", "ssim", "cosine", "relative_l1", "flow", "flow_change", "clip", "vqa", "seconds")
# Column of the markdown -> key of a row.
COLUMNS = {
    "method": "method", "width": "width", "asked": "asked", "density": "density", "PSNR, dB": "psnr",
    "± seeds": "psnr_spread", "to PARO, dB": "over_paro", "± cases": "over_paro_error", "SSIM": "ssim",
    "cosine": "cosine", "rel. L1": "relative_l1", "Fréchet": "frechet", "flow": "flow", "Δ flow": "flow_change",
    "CLIP": "clip", "VQA": "vqa", "attention L1": "attention_relative_l1", "attention cosine": "attention_cosine",
    "mask cost": "mask_cost", "s a video": "seconds", "failed": "failed",
}  # fmt: skip
_DIGITS = {"psnr": 2, "psnr_spread": 2, "over_paro": 2, "over_paro_error": 2, "seconds": 1, "failed": 0}
_COLOURS = 10


@dataclass(frozen=True)
class Table:
    """`rows`: a dict per method x density x width, plain numbers and strings; None where there is no figure.

    `psnr_spread`: standard deviation over seeds of the mean over prompts; `over_paro`: mean difference, case by case,
    from PARO at the same density and bf16 (a quantised row: from its own method and density at bf16), and
    `over_paro_error` the standard error of that mean. `about`: settings, versions, device. `failures`: what did not
    work, row and reason.
    """

    rows: list[dict[str, Any]]
    failures: list[dict[str, str]]
    about: dict[str, Any]

    @staticmethod
    def of(
        rows: Sequence[Any],
        cells: Mapping[tuple[Any, Any], dict[str, Any]],
        about: dict[str, Any],
        frechet: Callable[[Mapping[int, Sequence[float]]], float | None],
    ) -> Table:
        """From `_run.Row`s and finished cells."""
        seeds = [seed for _, seed, _ in about["cases"]]
        made, failures = [], []
        names, widths = [method.name for method in METHODS], list(WIDTHS)
        rows = sorted(rows, key=lambda r: (names.index(r.method), -(r.density or 0), widths.index(r.width)))
        dense = next((cell["cells"] for (row, case), cell in cells.items() if case == "videos"), [])
        if dense:
            first: dict[str, Any] = {"method": "dense", "width": "bf16", "asked": None, "density": 1.0, "failed": 0}
            made.append(first | {name: _mean([cell.get(name) for cell in dense]) for name in MEANS})
        for row in rows:
            mine = [cells[row, i] for i in range(len(seeds))]
            good = [(i, cell) for i, cell in enumerate(mine) if "error" not in cell]
            reasons = {cell["error"] for cell in [*mine, cells[row, "attention"]] if "error" in cell}
            failures += [{"row": str(row), "reason": reason} for reason in sorted(reasons)]
            line: dict[str, Any] = {"method": row.method, "width": row.width, "asked": row.density}
            line["failed"] = len(mine) - len(good)
            for name in (*MEANS, "density"):
                line[name] = _mean([cell.get(name) for _, cell in good])
            by_seed = defaultdict(list)
            for i, cell in good:
                by_seed[seeds[i]].append(cell["psnr"])
            line["psnr_spread"] = _spread([_mean(values) for values in by_seed.values()])
            other = ("PARO", row.density, "bf16") if row.width == "bf16" else (row.method, row.density, "bf16")
            if other != (row.method, row.density, row.width):
                against = [cells.get((type(row)(*other), i), {}).get("psnr") for i, _ in good]
                pairs = [(cell["psnr"], b) for (_, cell), b in zip(good, against, strict=True)]
                gaps = [a - b for a, b in pairs if a is not None and b is not None]
                line["over_paro"] = _mean(gaps)
                spread = _spread(gaps)
                line["over_paro_error"] = None if spread is None else spread / math.sqrt(len(gaps))
            features = {i: cell["features"] for i, cell in good if "features" in cell}
            line["frechet"] = frechet(features) if features else None
            level = cells[row, "attention"]
            for name in ("relative_l1", "cosine"):
                line[f"attention_{name}"] = level.get(name)
            line["mask_cost"], line["prepare_seconds"] = level.get("mask_cost"), level.get("prepare_seconds")
            made.append(line)
        return Table(made, failures, about)

    def save(self, folder: Path, picture: bool = True) -> list[Path]:
        """Write eval.json, eval.md and, with `picture`, eval.png; their paths."""
        paths = [folder / name for name in ("eval.json", "eval.md", "eval.png")]
        value = {"about": self.about, "rows": self.rows, "failures": self.failures}
        with _files.replacing(paths[0]) as new:
            new.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
        with _files.replacing(paths[1]) as new:
            new.write_text(self.markdown() + "\n")
        if not picture:
            return paths[:2]
        figure = self._draw()
        with _files.replacing(paths[2]) as new:
            figure.savefig(new, dpi=110, format="png")
        return paths

    def markdown(self) -> str:
        """All rows; columns that no row has are left out."""
        shown = {head: key for head, key in COLUMNS.items() if any(row.get(key) is not None for row in self.rows)}
        if not any(row["failed"] for row in self.rows):
            shown.pop("failed", None)
        lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
        for row in self.rows:
            lines.append("| " + " | ".join(_text(key, row.get(key)) for key in shown.values()) + " |")
        if self.failures:
            lines += ["", "What could not be had:", ""]
            lines += [f"- {failure['row']}: {failure['reason']}" for failure in self.failures]
        return "\n".join(lines)

    def _draw(self) -> Any:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = [row for row in self.rows if row["method"] != "dense" and row["psnr"]]
        wide = [row for row in drawn if row["width"] == "bf16"]
        quantised = [row for row in drawn if row["width"] != "bf16"]
        panels = [(draw, rows) for draw, rows in ((_draw_methods, wide), (_draw_widths, quantised)) if rows]
        figure = Figure(figsize=(15 if len(panels) > 1 else 10, 7.5), layout="constrained")
        FigureCanvasAgg(figure)  # no global state, no display
        if panels:
            all_axes = figure.subplots(1, len(panels), width_ratios=(1.6, 1)[: len(panels)], squeeze=False)[0]
            for axes, (draw, rows) in zip(all_axes, panels, strict=True):
                draw(axes, rows)
        return figure


def _draw_methods(axes: Any, rows: list[dict[str, Any]]) -> None:
    """PSNR over density, a line a method."""
    from matplotlib import colormaps

    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["density"])
        paro = name == "PARO"
        axes.errorbar(
            [row["density"] for row in mine], [row["psnr"] for row in mine], [row["psnr_spread"] or 0 for row in mine],
            label=name, color="black" if paro else colormaps["tab10"](i % _COLOURS), marker="osDv^<>Px"[i % 9],
            linewidth=2.5 if paro else 1.1, linestyle=("-", "--", ":")[i // _COLOURS % 3], capsize=2,
            zorder=3 if paro else 2,
        )  # fmt: skip
    axes.set(xlabel="density executed, text included", ylabel="PSNR against dense, dB", title="masks, bf16")
    axes.grid(alpha=0.3)
    # Beside the points, not over them.
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.09))


def _draw_widths(axes: Any, rows: list[dict[str, Any]]) -> None:
    """PSNR of quantised rows, best on top."""
    rows = sorted(rows, key=lambda row: row["psnr"])
    axes.barh(
        [f"{row['method']} {_text('asked', row['asked'])}, {row['width']}" for row in rows],
        [row["psnr"] for row in rows],
        xerr=[row["psnr_spread"] or 0 for row in rows],
        color=["#e45756" if "PARO" in row["width"] else "#4c78a8" for row in rows],
    )
    axes.set(xlabel="PSNR against dense, dB", title="widths")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return float(np.mean(found)) if found else None


def _spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation, None of fewer than two."""
    found = [v for v in values if v is not None]
    return float(np.std(found, ddof=1)) if len(found) > 1 else None


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    digits = _DIGITS.get(key)
    return f"{value:.{digits}f}" if digits is not None else f"{value:.3g}"


def _finite(value: Any) -> Any:
    """What JSON has no number for becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
