"""Weights: safetensors in, one module out; every problem with them is collected and raised once.

`load` and `save` use our own parameter names; `from_diffusers` reads a peer's, by a table that each model provides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class WeightsError(ValueError):
    """A weight file that does not fit its model: names the file, what was expected, what was found, what to do."""


def load[M: nnx.Module](build: Callable[[], M], path: str | os.PathLike, dtype=jnp.float32) -> M:
    """The module of `build()` with the weights of a safetensors file whose tensors are named by parameter path.

    `build` is only traced, never run, so no random initialisation is paid for. Tensors are read one by one and cast to
    `dtype` (None keeps the file's).

    Raises:
      WeightsError: a missing, half-written or foreign file; any missing, unexpected or mis-shaped tensor, all listed.
    """
    graph, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    shapes = {".".join(str(k) for k in p): (p, v.get_value()) for p, v in nnx.to_flat_state(params)}
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            found = set(file.keys())
            problems = [f"missing {name}" for name in sorted(shapes.keys() - found)]
            problems += [f"unexpected {name}" for name in sorted(found - shapes.keys())]
            for name in sorted(found & shapes.keys()):
                shape = tuple(file.get_slice(name).get_shape())
                if shape != shapes[name][1].shape:
                    problems.append(f"{name}: expected shape {shapes[name][1].shape}, found {shape}")
            _raise_if(problems, path)
            flat = [
                (key, nnx.Param(jnp.asarray(file.get_tensor(name), dtype=dtype))) for name, (key, _) in shapes.items()
            ]
    except FileNotFoundError as e:
        raise WeightsError(f"{os.fspath(path)}: no such file; check the path.") from e
    except SafetensorError as e:
        raise WeightsError(
            f"{os.fspath(path)} is not a complete safetensors file ({e}); fetch or export it again."
        ) from e
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def save(module: nnx.Module, path: str | os.PathLike, dtype: Any = jnp.bfloat16) -> None:
    """Write every parameter of a module to one safetensors file, cast to `dtype`, atomically; `load` reads it back."""
    flat = {
        ".".join(str(k) for k in key): jax.device_get(value.get_value().astype(dtype))
        for key, value in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    temporary = f"{os.fspath(path)}.tmp"
    try:
        save_file(flat, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A module that is part of a fused one: the rows (output channels) of `name` in these ranges, in this order."""

    name: str
    ranges: tuple[tuple[int, int], ...]


Names = Mapping[str, "str | Rows"]  # our module (or bare parameter) -> theirs; "{}" stands for the number of the layer

_READ = ("F64", "F32", "F16", "BF16")  # a file of fp8 or integers needs its scales: we do not guess them

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
    _raise_if(problems, where)
    return wanted


def from_diffusers[M: nnx.Module](
    build: Callable[[], M], path: str | os.PathLike, names: Names, dtype: Any = jnp.float32
) -> M:
    """The module of `build()` with weights in a peer's names: a safetensors file, or a folder that diffusers saved.

    `names`: our modules -> theirs, as `cogvideox.diffusers_names(config)` gives. `build` is only traced, never run.
    Each parameter is read and cast to `dtype` once, layer by layer into its stack: no second copy of the model exists.

    Raises:
      WeightsError: no such file; a shard that is absent or cut short; quantised tensors; any missing, unexpected,
        repeated or mis-shaped key.
    """
    graph, _, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        problems = []
        for file in _shards(pathlib.Path(path)):
            try:
                opened = stack.enter_context(safe_open(os.fspath(file), framework="numpy"))
            except (SafetensorError, OSError) as e:
                raise WeightsError(f"{file} is not a complete safetensors file ({e}); fetch it again.") from e
            problems += [f"{key} is in two files, one of them {file.name}" for key in opened.keys() if key in files]
            files.update(dict.fromkeys(opened.keys(), opened))
        slices = {key: file.get_slice(key) for key, file in files.items()}
        kinds = {key: str(part.get_dtype()) for key, part in slices.items()}
        problems += [f"{key}: expected {_READ}, found {kind}" for key, kind in kinds.items() if kind not in _READ]
        _raise_if(problems, path)
        found = {key: tuple(part.get_shape()) for key, part in slices.items()}
        flat = []
        for source in sources(build, names, found, path):
            buffer = np.empty((len(source.keys), *source.piece), dtype)
            for slot, key in zip(buffer, source.keys, strict=True):
                source.store(files[key].get_tensor(key), slot)
            flat.append((source.path, nnx.Param(jax.device_put(buffer if source.stacked else buffer[0]))))
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a file or folder, by its index where there is one."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or folder; check the path.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        names = set(json.loads(indices[0].read_text())["weight_map"].values())
        absent = sorted(name for name in names if not (path / name).is_file())
        if absent:
            raise WeightsError(f"{path}: {indices[0].name} names files that are not there: {absent}; fetch them.")
        return sorted(path / name for name in names)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(
            f"{path}: expected one .safetensors file, or several and their .safetensors.index.json; found {len(files)} "
            f"and {len(indices)} indices. Name the file, or the folder of the transformer."
        )
    return files


def _raise_if(problems: list[str], where: Any) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise WeightsError(
            f"{where} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(shown) + "\n"
            "Check that file and model configuration belong together."
        )
