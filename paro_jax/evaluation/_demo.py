"""The model that ships with the project, as a subject."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from paro_jax.demo import data, model
from paro_jax.demo import run as demo
from paro_jax.evaluation._subject import Case, Subject
from paro_jax.models import samplers

_SEEDS = 1 << 16  # between the noises of one prompt


def demo_subject(*, prompts: int, seeds: int, steps: int, seed: int = 0) -> Subject:
    """Held-out captions, each from several noises; calibrated, fitted and judged on a caption of its own each."""
    scenes = [data.random_scene(demo.DEMO_SEED + (seed << 20) + i) for i in range(prompts)]
    cases = [
        _case(dataclasses.replace(scene, seed=scene.seed + s * _SEEDS), s) for scene in scenes for s in range(seeds)
    ]
    config = model.CONFIG
    return Subject(
        name="demo",
        net=demo.load_model(),
        grid=config.grid,
        sites=config.num_layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        steps=steps,
        sample=functools.partial(samplers.ddim, schedule=model.SCHEDULE),
        view=_view,
        pixels=True,
        cases=cases,
        calibration=[_case(data.random_scene(demo.CALIBRATION_SEED), 0)],
        fitting=_case(data.random_scene(demo.CALIBRATION_SEED + 1), 0),
        heldout=_case(data.random_scene(demo.CALIBRATION_SEED + 2), 0),
    )


def _case(scene: data.Scene, seed: int) -> Case:
    words = demo.words_for(scene)[::-1].copy()  # without the caption first, as `samplers.guided` wants it
    return Case(scene.caption, seed, (words,), model.initial_noise(scene.seed), demo.GUIDANCE)


def _view(latents: np.ndarray) -> np.ndarray:
    return (data.to_video(latents[0]) + 1) / 2
