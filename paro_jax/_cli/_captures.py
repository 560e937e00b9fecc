"""Capture files: the attention inputs of any model, written by anything, calibrated by `paro calibrate --samples`.

A capture file is one `.safetensors` file whose tensors are named

    site{S}/step{T}/q    site{S}/step{T}/k    site{S}/step{T}/v

S is the number of the attention layer, counted from 0 without gaps. T is how far denoising has come, a decimal
fraction in [0, 1) of the schedule: step 9 of 30 is `step0.3`. Every tensor is [B, N, heads, D] (or [N, heads, D]) after
norm and RoPE, in the model's token order; q and k are needed, v only for `--objective error` and for output errors in
the report. In JAX:

    from safetensors.numpy import save_file
    save_file({"site0/step0.3/q": q, "site0/step0.3/k": k, "site0/step0.3/v": v}, "captures.safetensors")
"""

import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from calibrate import Sample
from paro_jax import TokenGrid

_NAME = re.compile(r"site(\d+)/step(\d+(?:\.\d+)?)/([qkv])")


class CaptureFile:
    """A re-iterable of `calibrate.Sample`, site by site, step by step; one sample is in memory at a time.

    Raises:
      ValueError: not a safetensors file, a tensor of another name, a site or a q or k that is missing, a tensor that
        is not [B, N, heads, D] with N the tokens of `grid`. The message names the tensor.
    """

    def __init__(self, path: Path, grid: TokenGrid) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"--samples: expected a .safetensors capture file, found no file at {path}")
        found: dict[tuple[int, float], dict[str, str]] = {}
        try:
            with safe_open(path, framework="flax") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    match = _NAME.fullmatch(name)
                    if not match:
                        raise ValueError(
                            f"--samples: {path.name} holds a tensor {name!r}; expected names such as site0/step0.25/q"
                        )
                    site, step, role = int(match[1]), float(match[2]), match[3]
                    if step >= 1:
                        raise ValueError(f"--samples: {name}: the step is a fraction in [0, 1) of the schedule")
                    shape = tuple(file.get_slice(name).get_shape())
                    if len(shape) not in (3, 4) or shape[-3] != grid.tokens:
                        raise ValueError(
                            f"--samples: {name}: expected [B, {grid.tokens}, heads, D] for {grid.tokens} tokens "
                            f"(grid {grid.shape}, text {grid.text}), got {shape}; change --grid or --text"
                        )
                    roles = found.setdefault((site, step), {})
                    if role in roles:
                        raise ValueError(
                            f"--samples: {path.name} holds both {roles[role]} and {name}, the same step of the same "
                            "site; keep one of them"
                        )
                    roles[role] = name
        except SafetensorError as error:
            raise ValueError(f"--samples: {path} is not a whole safetensors file ({error})") from error
        if not found:
            raise ValueError(f"--samples: {path} holds no tensor; expected names such as site0/step0.25/q")
        sites = sorted({site for site, _ in found})
        if sites != list(range(len(sites))):
            raise ValueError(f"--samples: sites are counted from 0 without gaps, got {sites}")
        for (site, step), roles in found.items():
            if not {"q", "k"} <= roles.keys():
                raise ValueError(f"--samples: site{site}/step{step:g} needs q and k, got {', '.join(sorted(roles))}")
        self._found = dict(sorted(found.items()))

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Sample]:
        for (site, step), roles in self._found.items():
            with safe_open(self.path, framework="flax") as file:
                arrays = {role: jnp.asarray(file.get_tensor(name)) for role, name in roles.items()}
            arrays = {role: x[None] if x.ndim == 3 else x for role, x in arrays.items()}
            yield Sample(site, step, arrays["q"], arrays["k"], arrays.get("v"))
