"""Every method x density x width on every case, next to the dense generation from the same noise."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import calibrate
import paro_jax
from paro_jax import metrics, video_metrics
from paro_jax.evaluation._methods import METHODS, WIDTHS, Context, Method, at_sample, compensated, few, sharing
from paro_jax.evaluation._report import Table
from paro_jax.evaluation._subject import Made, Setting, Subject

DENSITIES = (0.5, 0.3, 0.2)
# The rows of widths, beside "bf16" of every method: PARO sparse, the same masks made in model order, and published
# recipes as they were published, dense in model order.
QUANTISED = (("PARO", 0.3), ("no reorder", 0.3), ("no reorder", 1.0))


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. `density`: what is asked for; None where the method has its own, 1 keeps everything."""

    method: str
    density: float | None
    width: str = "bf16"

    def __str__(self) -> str:
        density = "" if self.density is None else f" {self.density:.4g}"
        return f"{self.method}{density} {self.width}"


@dataclasses.dataclass(frozen=True)
class Extractors:
    """What scores videos beyond arithmetic; see `paro_jax.video_metrics` for the signature of each.

    `features` for the Fréchet distance to the dense set, `flow` for motion; `images` and `texts` together for CLIP's
    similarity of frames and caption, and `vqa` for quality, have no default, as they need a network.
    """

    features: video_metrics.FeatureExtractor | None = video_metrics.structure_features
    flow: video_metrics.FlowEstimator | None = video_metrics.lucas_kanade
    images: video_metrics.ImageEncoder | None = None
    texts: video_metrics.TextEncoder | None = None
    vqa: video_metrics.VideoScorer | None = None


def default_rows(densities: Sequence[float] = DENSITIES) -> list[Row]:
    """Every method at every density, and every width where `QUANTISED` says; the last density comes last."""
    rows = {d: [Row(m.name, d) for m in METHODS if m.densities] for d in densities}
    *most, last = rows.values()
    own = [Row(m.name, None) for m in METHODS if not m.densities]
    quantised = [(method, density) for method, density in QUANTISED if density == 1 or density in densities]
    widths = [Row(method, density, width) for method, density in quantised for width in WIDTHS]
    return list(dict.fromkeys([*(row for some in most for row in some), *own, *widths, *last]))


def evaluate(
    subject: Subject,
    *,
    out: Path,
    rows: Sequence[Row] | None = None,
    edges: Sequence[float] = (0.0, 1.0),
    at: Sequence[int],
    block: tuple[int, int] = (64, 64),
    extractors: Extractors = Extractors(),
    progress: bool = True,
) -> Table:
    """Generate every case dense and under every row, and compare.

    `edges`: of the buckets of PARO's plans. `at`: the steps of which methods see attention, some in each bucket.
    What is done is kept in `out`/cells.jsonl, so a run that was stopped goes on where it was; a method that fails on a
    case, or cannot reach a density, is a cell that says so. Writes `out`/eval.json, eval.md and eval.png.

    Raises ValueError for an unknown method or width, and where `out` holds another evaluation.
    """
    rows = default_rows() if rows is None else list(dict.fromkeys(rows))
    methods = {method.name: method for method in METHODS}
    for row in rows:
        for name, value, known in (("method", row.method, methods), ("width", row.width, WIDTHS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}.")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": subject.name, "grid": list(subject.grid.shape), "text": subject.grid.text, "steps": subject.steps,
        "block": list(block), "buckets": list(edges), "captured_steps": list(at),
        "cases": [[case.caption, case.seed, case.guidance] for case in subject.cases], "pixels": subject.pixels,
    }  # fmt: skip
    cells = _Cells(out / "cells.jsonl", settings)
    todo = [(row, i) for row in rows for i in range(len(subject.cases)) if (row, i) not in cells]
    held = [row for row in rows if (row, "attention") not in cells]
    bar = tqdm(total=len(subject.cases) + 3 + len(todo) + len(held), disable=None if progress else True, unit="cell")

    def tick(what: str) -> None:
        bar.set_description(what[:40].ljust(40))
        bar.update()

    judge = _Judge(subject, extractors)
    for case in subject.cases:
        judge.add(subject.generate(case, Setting(subject.dense(block))))
        tick("dense")
    cells.put(Row("dense", None), "videos", {"cells": judge.dense_scores()})
    about = settings | {"versions": {"paro_jax": paro_jax.__version__, "jax": jax.__version__}}
    about |= {"device": jax.devices()[0].device_kind}
    context = None
    if todo or held:
        densities = [row.density for row in rows if row.density is not None]
        samples = subject.capture(subject.calibration, at, block)
        tick("capture")
        fitting = subject.capture([subject.fitting], at, block)
        tick("capture to fit knobs")
        context = Context(subject, samples, fitting, densities=densities, edges=edges, block=block)
        heldout = few(subject.capture([subject.heldout], at, block))
        references = [_dense_of(sample, subject.dense(block)) for sample in heldout]
        tick("capture held-out")
    for row in rows:
        mine = [i for r, i in todo if r == row]
        if not mine and row not in held:
            continue
        assert context is not None
        bar.set_description(f"prepare {row}"[:40].ljust(40))
        start = time.perf_counter()
        setting, why = _attempt(lambda row=row: _prepare(context, methods[row.method], row))
        prepared = time.perf_counter() - start
        if row in held:
            found = {"error": why}
            if setting is not None:
                level, why_not = _attempt(lambda s=setting: attention_level(s, heldout, references))  # type: ignore
                found = {"error": why_not} if level is None else {**level, "prepare_seconds": prepared}
            cells.put(row, "attention", found)
            tick(str(row))
        for i in mine:
            found = {"error": why}
            if setting is not None:
                cell, why_not = _attempt(lambda i=i, s=setting: judge.cell(i, subject.generate(subject.cases[i], s)))
                found = {"error": why_not} if cell is None else cell
            cells.put(row, i, found)
            tick(str(row))
        finished = [row for row in rows if all((row, i) in cells for i in ("attention", *range(len(subject.cases))))]
        Table.of(finished, cells.found, about, judge.frechet).save(out, picture=False)
    bar.close()
    table = Table.of(rows, cells.found, about, judge.frechet)
    table.save(out)
    return table


def _prepare(context: Context, method: Method, row: Row) -> Setting:
    density = 0.0 if row.density is None else row.density
    if density == 1 and method.name not in ("PARO", "no reorder"):
        raise ValueError("density: 1 is for PARO and no reorder, which differ in what an order does for widths.")
    setting = method.prepare(context, density)
    return dataclasses.replace(setting, plan=WIDTHS[row.width](setting.plan))


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns, or None and why it could not: a marked cell, not a lost table."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Cells:
    """Finished cells, {(row, case or "attention" or "videos"): dict}, in a file that grows by a line each."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.found = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != settings:
            raise ValueError(
                f"{path}: expected cells of this evaluation, found those of other settings; give another folder, or "
                "delete the file."
            )
        if not lines:
            path.write_text(json.dumps(settings) + "\n")
        for number, line in enumerate(lines[1:], 1):
            try:
                row, case, cell = json.loads(line)
            except ValueError:  # a run was killed while it wrote
                path.write_text("".join(f"{kept}\n" for kept in lines[:number]))
                break
            self.found[Row(*row), case] = cell

    def __contains__(self, key: tuple[Row, Any]) -> bool:
        return key in self.found

    def put(self, row: Row, case: Any, cell: dict[str, Any]) -> None:
        self.found[row, case] = cell
        with self.path.open("a") as file:
            file.write(json.dumps([dataclasses.astuple(row), case, cell]) + "\n")


class _Judge:
    """Compares samples with the dense ones."""

    def __init__(self, subject: Subject, extractors: Extractors):
        self.subject, self.extractors = subject, extractors
        self.dense: list[Made] = []
        self.flows: list[Any] = []
        self.features: list[np.ndarray] = []

    def add(self, dense: Made) -> None:
        """The next case's dense sample."""
        if not np.isfinite(dense.view).all():
            raise ValueError(f"case {len(self.dense)}: the dense generation is not finite; nothing can be compared.")
        self.dense.append(dense)
        if self.subject.pixels:
            if self.extractors.features:
                self.features.append(self._features(dense.view))
            if self.extractors.flow:
                self.flows.append(video_metrics.extract_flow(dense.view[None], flow=self.extractors.flow))

    def _features(self, view: np.ndarray) -> np.ndarray:
        assert self.extractors.features is not None
        return video_metrics.extract_features(view[None], extractor=self.extractors.features)[0]

    def dense_scores(self) -> list[dict[str, Any]]:
        """What the dense samples score where there is nothing to compare with."""
        return [self._scores(i, made) | {"seconds": made.seconds} for i, made in enumerate(self.dense)]

    def cell(self, i: int, made: Made) -> dict[str, Any]:
        """All figures of a case's sample."""
        a, b = self.dense[i].view, made.view
        if not np.isfinite(b).all():
            raise ValueError("the sample is not finite")
        size = 1.0 if self.subject.pixels else float(np.ptp(a))
        psnr = float(metrics.psnr(a, b, data_range=size))
        found = {
            "psnr": psnr if np.isfinite(psnr) else None,
            "ssim": float(metrics.ssim(a, b, data_range=size)) if min(a.shape[1:3]) >= 11 else None,
            "cosine": float(metrics.cosine(2 * a - 1, 2 * b - 1) if self.subject.pixels else metrics.cosine(a, b)),
            "relative_l1": float(metrics.relative_l1(a, b)),
            "density": made.density,
            "seconds": made.seconds,
        }
        return found | self._scores(i, made)

    def _scores(self, i: int, made: Made) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not self.subject.pixels:
            return found
        video, caption, use = made.view[None], self.subject.cases[i].caption, self.extractors
        if use.features:
            found["features"] = [float(f"{x:.7g}") for x in self._features(made.view)]
        if use.flow:
            flow = video_metrics.extract_flow(video, flow=use.flow)
            found["flow"] = float(video_metrics.flow_score(flow)[0])
            found["flow_change"] = float(video_metrics.delta_flow_score(self.flows[i], flow)[0])
        if use.images and use.texts:
            scores = video_metrics.clip_similarity(video, [caption], image_encoder=use.images, text_encoder=use.texts)
            found["clip"] = float(scores[0])
        if use.vqa:
            found["vqa"] = float(video_metrics.video_quality(video, [caption], scorer=use.vqa)[0])
        return found

    def frechet(self, features: Mapping[int, Sequence[float]]) -> float | None:
        """Distance of the features of some cases to those of their dense samples: its bias depends on their number."""
        if len(features) < 2 or not self.features:
            return None
        dense = np.stack([self.features[i] for i in features])
        return video_metrics.frechet_distance(dense, np.asarray(list(features.values()), np.float32))


def _dense_of(sample: calibrate.Sample, plan: Any) -> np.ndarray:
    return np.asarray(_attend(sample.q, sample.k, sample.v, plan[sample.site]), np.float32)


@jax.jit
def _attend(q: Any, k: Any, v: Any, plan: Any) -> jax.Array:
    return paro_jax.attention(q, k, v, plan=plan)


def attention_level(
    setting: Setting, samples: Sequence[calibrate.Sample], references: Sequence[np.ndarray]
) -> dict[str, Any] | None:
    """One attention call at a time on held-out q, k, v: relative L1 and cosine, and the cost of making masks.

    `mask_cost`: time of the mask alone over that of dense attention, 0 for one made offline, least of three. All None
    for a method that remembers steps, of which a single call says nothing.
    """
    if setting.rule is sharing:
        return {"relative_l1": None, "cosine": None, "density": None, "mask_cost": None}
    if setting.rule is None:
        run = jax.jit(lambda q, k, v, plan, *_: (paro_jax.attention(q, k, v, plan=plan), (plan.mask().keep.mean(),)))
    else:
        rule = setting.rule

        def run(q, k, v, plan, knobs, memory, step):
            out, _, decided = rule(q, k, v, plan=plan, knobs=knobs, memory=memory, step=step)
            return out, decided

        run = jax.jit(run)
    l1, cosine, density = [], [], []
    args: tuple[Any, ...] = ()
    for sample, reference in zip(samples, references, strict=True):
        own = (jax.tree.map(lambda x, s=sample: jnp.asarray(x)[s.site], x) for x in (setting.knobs, setting.memory))
        args = (sample.q, sample.k, sample.v, at_sample(setting.plan, sample), *own, jnp.int32(0))
        out, decided = run(*args)
        l1.append(metrics.relative_l1(reference, out))
        cosine.append(metrics.cosine(reference, out))
        density.append(decided[0])
    cost = 0.0 if setting.rule is None else None
    if setting.rule not in (None, compensated):  # compensation is part of the output: no mask to be timed
        dense = at_sample(setting.plan, samples[-1])
        dense = dense.with_mask(dataclasses.replace(dense.mask(), keep=jnp.ones_like(dense.mask().keep)))
        # Only what was decided is asked for, so the compiler leaves attention itself out.
        mask_only = jax.jit(lambda *args: run(*args)[1])
        cost = _seconds(mask_only, *args) / _seconds(_attend, *args[:3], dense)
    means = (float(np.mean(x)) for x in (l1, cosine, density))
    return dict(zip(("relative_l1", "cosine", "density"), means, strict=True)) | {"mask_cost": cost}


def _seconds(work: Callable[..., Any], *args: Any) -> float:
    jax.block_until_ready(work(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(work(*args))
        times.append(time.perf_counter() - start)
    return min(times)
