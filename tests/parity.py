"""Reads the fixtures of tests/golden/make_models.py."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from paro_jax import AttentionPlan, TokenGrid
from paro_jax.models._mapping import sources
from paro_jax.models.weights import Rows
from paro_jax.models.weights import load as load_weights

FOLDER = pathlib.Path(__file__).parent / "golden"

Names = Mapping[str, str | Rows]


def read(name: str, folder: pathlib.Path = FOLDER) -> tuple[dict, dict, np.ndarray]:
    """weights under the peer's names, inputs by name, and the peer's output."""
    tensors = load_file(folder / f"{name}.safetensors")
    weights, inputs = (
        {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("weights.", "input.")
    )
    return weights, inputs, tensors["output"]


def load(weights: dict, build: Callable[[], nnx.Module], names: Names, folder: pathlib.Path):
    """The module with these weights, by way of a file, as a user has them."""
    save_file(weights, folder / "weights.safetensors")
    return load_weights(build, folder / "weights.safetensors", names=names)


@jax.jit
def answer(net: nnx.Module, inputs: dict, plan: AttentionPlan | None = None) -> jax.Array:
    """The model's output. Weights are an argument: models of one shape are compiled once, and nothing is folded."""
    return net(**inputs, plan=plan)


def dense_plans(grid: TokenGrid, *, sites: int) -> Iterator[AttentionPlan]:
    """Plans that keep every block, for two heads: every axis order and a brick order, another in each head and site."""
    grid = dataclasses.replace(grid, bricks=((2,) * len(grid.shape),))
    for pair in itertools.pairwise([*grid.orders, grid.orders[0]]):
        order = [pair if site % 2 == 0 else pair[::-1] for site in range(sites)]
        yield AttentionPlan.dense(grid, heads=2, sites=sites, order=order, block=(16, 32))


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published model at full size."""
    lines = (line.split() for line in (FOLDER / f"{name}.keys.txt").read_text().splitlines())
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


def assert_nothing_left_over(build: Callable[[], nnx.Module], names: Names, name: str, tensors: int) -> None:
    """Every published tensor goes somewhere, and the model has as many parameters as the published one."""
    found = published(name)
    assert len(found) == tensors
    assert sum(math.prod(s.shape) for s in sources(build, names, found, name)) == sum(map(math.prod, found.values()))
