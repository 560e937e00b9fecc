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

_THEIR_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: `keys` has one name, or one per layer of a stacked parameter.

    Every tensor of theirs is taken as a matrix of rows. Of a kernel, theirs is `[out, in]` (a convolution's axes behind
    the first are `in`) and ours the transpose; of anything else the rows are those of ours.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    stacked: bool
    is_kernel: bool

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
        return self.piece[-1] if self.is_kernel else (*self.piece, 1)[0]

    @property
    def width(self) -> int:
        """Numbers in such a row."""
        return math.prod(self.piece) // max(self.rows, 1)

    @property
    def claims(self) -> tuple[tuple[int, int], ...]:
        """Ranges of their rows, in the sequence of ours."""
        return self.ranges or ((0, self.rows),)

    def problem(self, key: str, shape: tuple[int, ...], rows: int) -> str | None:
        """A kernel of theirs has shape `[rows, ...]`, in any rank; the rest is shaped as ours but for axes of 1."""
        if self.is_kernel:
            ours = (rows, self.piece[0])
            fits = len(shape) >= 2 and shape[0] == rows and math.prod(shape[1:]) == self.piece[0]
        else:
            ours = (rows, *self.piece[1:])
            fits = [n for n in shape if n != 1] == [n for n in ours if n != 1]
        return None if fits else f"{key}: expected shape {ours}, found {tuple(shape)}"


def sources(
    build: Callable[[], nnx.Module],
    names: Names | None,
    found: Mapping[str, tuple[int, ...]],
    where: Any,
    problems: Sequence[str] = (),
) -> list[Source]:
    """Where every parameter of `build()` comes from among tensors `found` (key -> shape). `names` None: they are ours.

    Raises WeightsError with `problems` and every key that is missing, unexpected, mis-shaped, or mapped twice or in
    part; `where` names the file in it.
    """
    if lost := [] if names is None else [_name(p) for p, _ in _parameters(build) if _theirs(p, names) is None]:
        raise WeightsError(f"{where}: nothing in the file is mapped to {', '.join(lost)}; complete the table of names.")
    wanted = every_source(build, names)
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


def every_source(build: Callable[[], nnx.Module], names: Names | None) -> list[Source]:
    """Where every parameter of `build()` comes from, by a table that has them all."""
    return [_source(path, value.get_value().shape, names) for path, value in _parameters(build)]


def _parameters(build: Callable[[], nnx.Module]) -> list[tuple[tuple, Any]]:
    return list(nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param)))


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
    return Source(path, shape, keys, ranges, stacked, leaf == "kernel")


def raise_if(problems: Sequence[str], where: Any) -> None:
    """WeightsError with all of `problems`, if there are any."""
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        raise WeightsError(
            f"{where} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(shown) + "\n"
            "Check that file and model configuration belong together."
        )
