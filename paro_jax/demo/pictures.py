"""The demo's pictures. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from paro_jax import AttentionPlan
from paro_jax.demo import data

if TYPE_CHECKING:
    from paro_jax.demo.run import Video

Videos = dict[tuple[str, float, str], "list[Video]"]  # (method, density, width) -> one for each prompt
COLOURS = {"FHW": "#4c78a8", "FWH": "#72b7b2", "HWF": "#f58518", "HFW": "#eeca3b", "WHF": "#e45756", "WFH": "#b279a2"}
METHODS = {"PARO": "#e45756", "no reorder": "#4c78a8", "window": "#9d9d9d"}


def _figure(rows: float, columns: float, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns, rows), layout="constrained", **options)
    FigureCanvasAgg(figure)  # no global state, no display
    return figure


def attention_map(q: np.ndarray, k: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """One head's softmax(QK^T / sqrt D) `[N, N]` with rows and columns in kernel order; q, k `[N, D]`, slots `[N]`."""
    q, k = np.asarray(q, np.float32)[slots], np.asarray(k, np.float32)[slots]
    s = q @ k.T / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def block_sums(p: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Sums of a map over mask blocks."""
    return np.add.reduceat(
        np.add.reduceat(p, np.arange(0, p.shape[0], block[0]), 0), np.arange(0, p.shape[1], block[1]), 1
    )


def _kept(p: np.ndarray, keep: np.ndarray, block: tuple[int, int]) -> float:
    return float((block_sums(p, block) * keep).sum() / p.shape[0])


def attention(path: str | os.PathLike, plan: AttentionPlan, samples: Any, steps: int, heads: int = 4) -> None:
    """Maps in model order and in the chosen order with the kept blocks, for the heads that reordering helps most.

    "Most" is by the attention mass that the plan's block budget for the head retains, chosen order against model order.
    """
    last = max(s.step for s in samples)
    shown = []
    for sample in samples:
        if sample.step != last:
            continue
        part = plan.at_step(round(sample.step * steps), steps)[sample.site]
        keep, slots = np.asarray(part.mask().keep), np.asarray(part.slots)
        for h in range(part.heads):
            if part.order[h] == 0:
                continue
            # The batch's first half is the captioned one.
            before = attention_map(sample.q[0, :, h], sample.k[0, :, h], part.grid.index(part.order_names[0]))
            after = attention_map(sample.q[0, :, h], sample.k[0, :, h], slots[h])
            most = np.sort(block_sums(before, plan.block).ravel())[::-1][: int(keep[h].sum())].sum() / before.shape[0]
            gain = _kept(after, keep[h], plan.block) - most
            shown.append((gain, sample.site, h, before, after, keep[h], most, part.order_names[int(part.order[h])]))
            shown = sorted(shown, key=lambda row: -row[0])[:heads]
        if sample.site == plan.order.shape[-2] - 1:
            break
    if not shown:
        return
    figure = _figure(3.1 * len(shown), 9.6)
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (_, site, h, before, after, keep, most, name) in zip(axes, shown, strict=True):
        top = np.quantile(after, 0.999)
        for axis, p in zip(row, (before, after), strict=False):
            axis.imshow(_shrink(np.sqrt(np.minimum(p, top))), cmap="magma", interpolation="nearest")
        held = np.kron(keep, np.ones(plan.block, bool))[: after.shape[0], : after.shape[1]]
        row[2].imshow(_shrink(np.sqrt(np.minimum(after, top)) * held), cmap="magma", interpolation="nearest")
        row[0].set_ylabel(f"layer {site}, head {h}")
        row[0].set_title(f"model order: at best {most:.0%} of the attention\nin {keep.sum()} blocks", fontsize=9)
        row[1].set_title(f"order {name}", fontsize=9)
        row[2].set_title(
            f"kept: {keep.mean():.0%} of blocks, {_kept(after, keep, plan.block):.0%} of the attention", fontsize=9
        )
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle("Attention maps before and after reordering (brighter is more; square-root scale)")
    figure.savefig(path, dpi=110)


def _shrink(p: np.ndarray, to: int = 470) -> np.ndarray:
    """Maximum over small cells, so that thin lines survive a picture smaller than the map."""
    f = -(-p.shape[0] // to)
    return np.maximum.reduceat(np.maximum.reduceat(p, np.arange(0, p.shape[0], f), 0), np.arange(0, p.shape[1], f), 1)


def orders(path: str | os.PathLike, plan: AttentionPlan) -> None:
    """Which order each (layer, head) chose."""
    ids = np.asarray(plan.order)
    ids = ids[0] if ids.ndim == 3 else ids
    figure = _figure(0.45 * ids.shape[0] + 1.2, 0.8 * ids.shape[1] + 1)
    axis = figure.subplots()
    for (site, head), i in np.ndenumerate(ids):
        name = plan.order_names[i]
        axis.add_patch(_square(head, site, COLOURS.get(name, "#54a24b")))
        axis.text(head, site, name, ha="center", va="center", fontsize=9, color="white")
    axis.set(xlim=(-0.5, ids.shape[1] - 0.5), ylim=(ids.shape[0] - 0.5, -0.5), xlabel="head", ylabel="layer")
    axis.set_xticks(range(ids.shape[1]))
    axis.set_yticks(range(ids.shape[0]))
    axis.set_title("Order chosen by each head (slowest axis first)", fontsize=10)
    figure.savefig(path, dpi=110)


def _square(x: float, y: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2)


def blocks(path: str | os.PathLike, plan: AttentionPlan) -> None:
    """Kept blocks of every (layer, head), averaged over buckets: how the budget was spent."""
    keep = np.asarray(plan.mask().keep, np.float32)
    keep = keep.mean(0) if keep.ndim == 5 else keep
    sites, heads = keep.shape[:2]
    figure = _figure(1.45 * sites + 0.4, 1.4 * heads)
    for axis, (site, head) in zip(
        figure.subplots(sites, heads, squeeze=False).ravel(), np.ndindex(sites, heads), strict=True
    ):
        axis.imshow(keep[site, head], cmap="Greens", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"L{site} H{head}: {keep[site, head].mean():.0%}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(
        f"Kept blocks of every head, {float(plan.density):.0%} on the whole (paler: kept in some buckets only)"
    )
    figure.savefig(path, dpi=110)


def _name(key: tuple[str, float, str]) -> str:
    method, density, width = key
    if method == "dense":
        return "dense"
    return f"{method} {density:.0%}" + (f" {width.upper()}" if width != "bf16" else "")


def frames(path: str | os.PathLike, made: Videos, captions: list[str], prompt: int = 0) -> None:
    """Frames of every method side by side, one row a method."""
    at = [round(i * (data.FRAMES - 1) / 5) for i in range(6)]
    figure = _figure(0.82 * len(made) + 0.5, 7.4)
    axes = figure.subplots(len(made), len(at), squeeze=False)
    for row, (key, videos) in zip(axes, made.items(), strict=True):
        for axis, f in zip(row, at, strict=True):
            axis.imshow((videos[prompt].pixels[f] + 1) / 2, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        label = _name(key).replace(f" {key[1]:.0%}", f"\n{key[1]:.0%}")
        row[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(captions[prompt], fontsize=9)
    figure.savefig(path, dpi=130)


def movie(path: str | os.PathLike, made: Videos, density: float, prompt: int = 0, scale: int = 4) -> None:
    """An animation: dense, PARO, PARO INT8, no reorder and the window at one density, side by side."""
    from PIL import Image, ImageDraw

    keys = [("dense", 1.0, "bf16"), ("PARO", density, "bf16"), ("PARO", density, "int8")]
    keys += [("no reorder", density, "bf16"), ("window", density, "bf16")]
    images = []
    for f in range(data.FRAMES):
        shown = [(made[key][prompt].pixels[f] + 1) / 2 for key in keys]
        shown = [np.pad(picture, ((0, 0), (0, 1), (0, 0)), constant_values=1) for picture in shown]
        strip = Image.fromarray((np.concatenate(shown, 1) * 255).astype(np.uint8))
        strip = strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)
        page = Image.new("RGB", (strip.width, strip.height + 18), "white")
        page.paste(strip, (0, 18))
        for i, key in enumerate(keys):
            ImageDraw.Draw(page).text((i * strip.width // len(keys) + 4, 3), _name(key), fill="black")
        images.append(page)
    images[0].save(path, save_all=True, append_images=images[1:], duration=120, loop=0)


def psnr(path: str | os.PathLike, rows: list[dict[str, Any]]) -> None:
    """PSNR against dense over density, one line a method and width."""
    figure = _figure(3.6, 5.6)
    axis = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["psnr"] is not None:
            lines.setdefault((row["method"], row["qk"]), []).append((row["density"], row["psnr"]))
    styles = {"bf16": "-o", "int8": "--s", "int4": ":^"}
    for (method, width), points in lines.items():
        label = method if width == "bf16" else f"{method} {width.upper()}"
        axis.plot(*zip(*sorted(points), strict=True), styles[width], color=METHODS.get(method), label=label, ms=4)
    axis.set(xlabel="density (kept blocks / all blocks)", ylabel="PSNR to dense, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    figure.savefig(path, dpi=120)
