"""Weights: one safetensors file in, one module out; every problem with it is collected and raised once."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
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
            if problems:
                shown = "\n  ".join(problems[:20]) + (
                    f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
                )
                raise WeightsError(
                    f"{os.fspath(path)} does not fit the model ({len(problems)} problems):\n  {shown}\n"
                    "Check that file and model configuration belong together."
                )
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


def save(module: nnx.Module, path: str | os.PathLike, dtype: jnp.dtype = jnp.bfloat16) -> None:
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
