"""Reads the fixtures of tests/golden/make_models.py."""

import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from paro_jax.models._mapping import sources
from paro_jax.models.weights import Rows
from paro_jax.models.weights import load as load_weights

FOLDER = pathlib.Path(__file__).parent / "golden"

Names = Mapping[str, str | Rows]


def read(name: str) -> tuple[dict, dict, np.ndarray]:
    """weights under the peer's names, inputs by name, and the peer's output."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    weights, inputs = (
        {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("weights.", "input.")
    )
    return weights, inputs, tensors["output"]


def load(weights: dict, build: Callable[[], nnx.Module], names: Names, folder: pathlib.Path):
    """The module with these weights, by way of a file, as a user has them."""
    save_file(weights, folder / "weights.safetensors")
    return load_weights(build, folder / "weights.safetensors", names=names)


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published model at full size."""
    lines = (line.split() for line in (FOLDER / f"{name}.keys.txt").read_text().splitlines())
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


def assert_nothing_left_over(build: Callable[[], nnx.Module], names: Names, name: str, tensors: int) -> None:
    """Every published tensor goes somewhere, and the model has as many parameters as the published one."""
    found = published(name)
    assert len(found) == tensors
    assert sum(math.prod(s.shape) for s in sources(build, names, found, name)) == sum(map(math.prod, found.values()))
