"""Weights: safetensors in, one module out; every problem with them is collected and raised once.

`load` and `save` use our own parameter names; `from_diffusers` reads a peer's, by a table that each model provides.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paro_jax.models import _published
from paro_jax.models._mapping import Names, Rows, WeightsError, raise_if, sources  # noqa: F401


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
            raise_if(problems, path)
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


_READ = ("F64", "F32", "F16", "BF16")  # a file of fp8 or integers needs its scales: we do not guess them


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
        raise_if(problems, path)
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


def from_pretrained(
    path: str | os.PathLike,
    *,
    model: str | _published.Config | None = None,
    dtype: Any = jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
) -> nnx.Module:
    """A published model: FLUX.1, CogVideoX or Wan, with its weights.

    Args:
      path: a folder as diffusers saves it, of the transformer or of the whole pipeline (its `transformer/` is taken;
        for the second expert of Wan 2.2 A14B name `transformer_2/` itself), or one safetensors file.
      model: None reads `config.json` beside the weights. Else a name of `PRESETS`, such as "flux-dev", or a config.
      dtype: of the parameters.
      mesh: devices to shard onto.

    Raises:
      WeightsError: names the file or key, what was expected, what was found, and what to do.
    """
    folder = pathlib.Path(path)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if model is None:
        where = (folder if folder.is_dir() else folder.parent) / "config.json"
        if not where.is_file():
            raise WeightsError(f"{where}: no such file; name the model, one of {', '.join(_published.PRESETS)}.")
        config = _published.config_from_diffusers(json.loads(where.read_text()), where)
    elif isinstance(model, str):
        if model not in _published.PRESETS:
            raise WeightsError(f"model: expected one of {', '.join(_published.PRESETS)}; found {model!r}.")
        config = _published.PRESETS[model]
    else:
        config = model
    keys: dict[str, None] = {}
    for file in _shards(folder):
        with safe_open(os.fspath(file), framework="numpy") as opened:
            keys.update(dict.fromkeys(opened.keys()))
    return from_diffusers(lambda: _published.build(config), folder, _published.names(config, keys), dtype)
