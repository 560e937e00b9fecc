"""Where each of our parameters comes from in a peer's checkpoint: a table of names, checked whole before any reading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx


class WeightsError(ValueError):
    """A weight file that does not fit its model: names the file, what was expected, what was found, what to do."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A module that is part of a fused one: the rows (output channels) of `name` in these ranges, in this order."""

    name: str
    ranges: tuple[tuple[int, int], ...]


Names = Mapping[str, "str | Rows"]  # our module (or bare parameter) -> theirs; "{}" stands for the number of the layer

_THEIR_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one of our parameters comes from: `keys` has one name, or one per layer of a stacked parameter."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    stacked: bool
    is_kernel: bool

    @property
    def piece(self) -> tuple[int, ...]:
        """Our shape of one layer."""
        return self.shape[1:] if self.stacked else self.shape

    def problem(self, key: str, shape: tuple[int, ...], rows: int) -> str | None:
        """A kernel of theirs has shape `[rows, ...]`, in any rank; the rest is shaped as ours but for axes of 1."""
        if self.is_kernel:
            ours = (rows, self.piece[0])
            fits = len(shape) >= 2 and shape[0] == rows and math.prod(shape[1:]) == self.piece[0]
        else:
            ours = (rows, *self.piece[1:])
            fits = [n for n in shape if n != 1] == [n for n in ours if n != 1]
        return None if fits else f"{key}: expected shape {ours}, found {tuple(shape)}"

    def store(self, theirs: np.ndarray, slot: np.ndarray) -> None:
        """Their tensor into ours of one layer: rows chosen, transposed if a kernel, cast."""
        if self.ranges:
            theirs = np.concatenate([theirs[a:b] for a, b in self.ranges])
        if not self.is_kernel:
            slot[...] = theirs.reshape(self.piece)
            return
        theirs = theirs.reshape(len(theirs), -1)
        # In narrow bands that stay in cache: transposing the whole at once is three to four times slower.
        for row in range(0, len(theirs), 32):
            slot[:, row : row + 32] = theirs[row : row + 32].T


def sources(
    build: Callable[[], nnx.Module], names: Names, found: Mapping[str, tuple[int, ...]], where: Any
) -> list[_Source]:
    """Where every parameter of `build()` comes from among tensors `found` (key -> shape).

    Raises WeightsError with every missing, unexpected and mis-shaped key; `where` names the file in it.
    """
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    wanted: list[_Source] = []
    for path, value in params:
        *module, leaf = (str(k) for k in path)
        bare = ".".join([*module, leaf])
        theirs = names[bare if bare in names else ".".join(module)]
        name, ranges = (theirs.name, theirs.ranges) if isinstance(theirs, Rows) else (theirs, ())
        key = name if bare in names else f"{name}.{_THEIR_LEAF[leaf]}"
        stacked = "{}" in key
        shape = tuple(value.get_value().shape)
        keys = tuple(key.format(i) for i in range(shape[0])) if stacked else (key,)
        wanted.append(_Source(path, shape, keys, ranges, stacked, leaf == "kernel"))
    # A fused tensor has as many rows as the furthest of its parts asks for.
    rows: dict[str, int] = {}
    for source in wanted:
        last = max(b for _, b in source.ranges) if source.ranges else source.piece[-1 if source.is_kernel else 0]
        for key in source.keys:
            rows[key] = max(last, rows.get(key, 0))
    problems = [f"missing {key}" for key in rows if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in rows]
    for source in wanted:
        for key in source.keys:
            if key in found and (problem := source.problem(key, found[key], rows[key])) and problem not in problems:
                problems.append(problem)
    raise_if(problems, where)
    return wanted


def raise_if(problems: list[str], where: Any) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise WeightsError(
            f"{where} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(shown) + "\n"
            "Check that file and model configuration belong together."
        )
