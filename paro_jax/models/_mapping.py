"""Where each of our parameters comes from in a checkpoint: by a table of names, checked whole before any reading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from paro_jax.models._safetensors import WeightsError


@dataclasses.dataclass(frozen=True)
class Rows:
    """A module that is part of a fused one: the rows (output channels) of `name` in these ranges, in this order."""

    name: str
    ranges: tuple[tuple[int, int], ...]


Names = Mapping[str, "str | Rows"]  # our module (or bare parameter) -> theirs; "{}" stands for the number of the layer

_THEIR_LEAF = {"weight": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: `keys` has one name, or one per layer of a stacked parameter.

    Every tensor is taken as a matrix of rows, the same in theirs and ours. `is_weight`: ours is `[out, in]`, and theirs
    may be a convolution's, whose axes behind the first are `in`.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    stacked: bool
    is_weight: bool

    @property
    def name(self) -> str:
        return _name(self.path)

    @property
    def piece(self) -> tuple[int, ...]:
        """Our shape of one layer."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def rows(self) -> int:
        """Rows of theirs that make one layer of ours."""
        return (*self.piece, 1)[0]

    @property
    def width(self) -> int:
        """Numbers in such a row."""
        return math.prod(self.piece) // max(self.rows, 1)

    @property
    def claims(self) -> tuple[tuple[int, int], ...]:
        """Ranges of their rows, in the sequence of ours."""
        return self.ranges or ((0, self.rows),)

    def problem(self, key: str, shape: tuple[int, ...], rows: int) -> str | None:
        """A weight of theirs has shape `[rows, ...]`, in any rank; the rest is shaped as ours but for axes of 1."""
        ours = (rows, *self.piece[1:])
        if self.is_weight:
            fits = len(shape) >= 2 and shape[0] == rows and math.prod(shape[1:]) == self.piece[1]
        else:
            fits = [n for n in shape if n != 1] == [n for n in ours if n != 1]
        return None if fits else f"{key}: expected shape {ours}, found {tuple(shape)}"


def sources(
    build: Callable[[], nnx.Module] | nnx.State,
    names: Names | None,
    found: Mapping[str, tuple[int, ...]],
    where: Any,
    problems: Sequence[str] = (),
) -> list[Source]:
    """Where every parameter of `build()` comes from among tensors `found` (key -> shape). `names` None: they are ours.

    `build` may also be the parameters themselves, abstract or not: tracing a model takes a good part of a second.

    Raises WeightsError with `problems` and every key that is missing, unexpected, mis-shaped, or mapped twice or in
    part; `where` names the file in it.
    """
    params = build if isinstance(build, nnx.State) else nnx.state(nnx.eval_shape(build), nnx.Param)
    if names is not None:
        paths = [path for path, _ in nnx.to_flat_state(params)]
        if lost := [_name(path) for path in paths if _theirs(path, names) is None]:
            raise WeightsError(
                f"{where}: nothing in the file is mapped to {', '.join(lost)}; complete the table of names."
            )
        if turned := [_name(path) for path in paths if path[-1] == "kernel"]:  # a square one would go unnoticed
            raise WeightsError(
                f"{where}: expected weights [out, in], as in the file; found kernels [in, out], {', '.join(turned)}. "
                "Build the module with paro_jax.models.layers.Linear."
            )
    wanted = every_source(params, names)
    claims: dict[str, list[tuple[int, int, str]]] = {}
    for source in wanted:
        for key in source.keys:
            claims.setdefault(key, []).extend((a, b, source.name) for a, b in source.claims)
    problems = [*problems, *(f"missing {key}" for key in claims if key not in found)]
    problems += [f"unexpected {key}" for key in found if key not in claims]
    for key, parts in claims.items():
        end, before = 0, "nothing"
        for first, last, name in sorted(parts):
            if first < end:
                problems.append(f"{key} is mapped twice, to {before} and {name}")
            elif first > end:
                problems.append(f"{key}: rows {end} to {first} are mapped to nothing")
            end, before = max(end, last), name
    for source in wanted:
        for key in source.keys:
            # A fused tensor has as many rows as the furthest of its parts asks for.
            rows = max(last for _, last, _ in claims[key])
            if key in found and (problem := source.problem(key, found[key], rows)) and problem not in problems:
                problems.append(problem)
    raise_if(problems, where)
    return wanted


def every_source(params: nnx.State, names: Names | None) -> list[Source]:
    """Where every one of `params` comes from, by a table that has them all."""
    return [_source(path, value.get_value().shape, names) for path, value in nnx.to_flat_state(params)]


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _theirs(path: tuple, names: Names) -> str | Rows | None:
    """What the table has for a parameter, or else for its module."""
    return names.get(_name(path), names.get(_name(path[:-1])))


def _source(path: tuple, shape: tuple[int, ...], names: Names | None) -> Source:
    bare, leaf = _name(path), str(path[-1])
    if names is None:
        return Source(path, shape, (bare,), (), False, False)
    theirs = _theirs(path, names)
    assert theirs is not None
    name, ranges = (theirs.name, theirs.ranges) if isinstance(theirs, Rows) else (theirs, ())
    key = name if bare in names else f"{name}.{_THEIR_LEAF[leaf]}"
    stacked = "{}" in key
    keys = tuple(key.format(i) for i in range(shape[0])) if stacked else (key,)
    return Source(path, shape, keys, ranges, stacked, leaf == "weight" and len(shape) == 2 + stacked)


def raise_if(problems: Sequence[str], where: Any) -> None:
    """WeightsError with all of `problems`, if there are any."""
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        raise WeightsError(
            f"{where} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(shown) + "\n"
            "Check that file and model configuration belong together."
        )
