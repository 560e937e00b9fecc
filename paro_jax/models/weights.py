"""Weights: checkpoints in, one module out; every problem with them is collected and raised once.

`from_pretrained` reads the published models, as diffusers or their authors store them, or as `save_checkpoint` and
`paro convert` do. `load` and `save` are for any module, in one safetensors file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from paro_jax import _files
from paro_jax.models import _checkpoint, _published, _stream
from paro_jax.models._checkpoint import check_free, load_checkpoint, save_checkpoint
from paro_jax.models._mapping import Names, Rows, sources
from paro_jax.models._published import PRESETS, Config, Model
from paro_jax.models._safetensors import Tensor, WeightsError, check_dtype, opened, read_json
from paro_jax.models._stream import partition

__all__ = [
    "PRESETS",
    "Config",
    "Model",
    "Names",
    "Rows",
    "WeightsError",
    "check_free",
    "config_of",
    "from_pretrained",
    "load",
    "load_checkpoint",
    "partition",
    "save",
    "save_checkpoint",
]


def from_pretrained(
    path: str | os.PathLike,
    *,
    model: str | Config | None = None,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Model:
    """A published model, FLUX.1, CogVideoX or Wan (text to image and text to video), with its weights.

    Memory: each parameter is read band by band into its place, and cast on the way, so that no second copy of the model
    exists; on a mesh each device gets its shard alone.

    Args:
      path: a folder that diffusers saved, of the whole pipeline (its `transformer/` is taken) or of one transformer
        (of Wan 2.2 A14B, which has two, `transformer/` or `transformer_2/`); one safetensors file, in diffusers' layout
        or, for FLUX and Wan, in their authors'; a folder that `paro convert` wrote; or, with the extra `[port]` and a
        network, what diffusers has on the Hugging Face hub: "black-forest-labs/FLUX.1-dev", or with the name of the
        folder behind it, "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer_2".
      model: None reads the `config.json` beside the weights. Else a name in `PRESETS`, such as "flux-dev", or a config:
        that then decides, for a file that has no `config.json` or for another resolution.
      dtype: of the parameters: float32, bfloat16 or float16. What the originals keep in float32 (Wan's time embedding,
        its tables and the norm before cross-attention) is never narrower than that. None keeps the dtypes of the file.
      mesh: shards the parameters over it as `partition` says. None takes the mesh of `jax.set_mesh`, else one device.
      progress: a bar on stderr, if that is a terminal.

    Raises:
      WeightsError: names the file, the key or the setting, what was expected, what was found and what to do: files that
        are absent, incomplete, quantised or pickled, another class of model, a setting that our models do not have, and
        every key that is missing, unexpected, mis-shaped or mapped twice.
    """
    place = _locate(path)
    wanted = _named(model)
    if _checkpoint.is_one(place):
        return load_checkpoint(place, config=wanted, dtype=dtype, mesh=mesh, progress=progress)
    config = _config(place, wanted)

    def names(found: dict[str, Tensor]) -> Names:
        return _published.names(config, found)

    return _load(lambda: _published.build(config), place, names, _published.dtypes(config, dtype), mesh, progress)


def config_of(path: str | os.PathLike, *, model: str | Config | None = None) -> Config:
    """The configuration of what `from_pretrained` would load; no weights are read, only JSON.

    Arguments as of `from_pretrained`. WeightsError as there, for all that a `config.json` can tell.
    """
    place = _locate(path)
    wanted = _named(model)
    return _checkpoint.stored_config(place, wanted) if _checkpoint.is_one(place) else _config(place, wanted)


def load[M: nnx.Module](
    build: Callable[[], M],
    path: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    names: Names | None = None,
    mesh: Mesh | None = None,
) -> M:
    """The module of `build()` with the weights of a safetensors file, or of a folder with several and their index.

    `build` is only traced, never run, so no random initialisation is paid for. `names`: our modules -> those of the
    file, as `cogvideox.diffusers_names(config)` gives; None for a file of `save`. `dtype`, `mesh` and what is raised:
    as `from_pretrained`.
    """
    place = _files.expanded(path, "weights", WeightsError)
    check_dtype(dtype)
    return _load(build, place, lambda _: names, lambda _: dtype, mesh, progress=False)


def _load[M: nnx.Module](
    build: Callable[[], M],
    path: Path,
    names: Callable[[dict[str, Tensor]], Names | None],
    dtype_of: Callable[[str], Any],
    mesh: Mesh | None,
    progress: bool,
) -> M:
    graph, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    with opened(path) as (tensors, problems):
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        wanted = sources(params, names(tensors), shapes, path, problems)
        state = _stream.read(wanted, tensors, dtype_of, _stream.mesh_or_current(mesh), progress)
    return nnx.merge(graph, state, rest)


def save(module: nnx.Module, path: str | os.PathLike, dtype: Any = jnp.bfloat16) -> None:
    """Write every parameter of a module to one safetensors file, cast to `dtype`, atomically; `load` reads it back.

    Raises WeightsError for a dtype that weights do not have, and for a path that cannot be written.
    """
    check_dtype(dtype)
    path = _files.expanded(path, "weights", WeightsError)
    flat = {
        ".".join(str(k) for k in key): jax.device_get(value.get_value().astype(dtype))
        for key, value in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    try:
        with _files.replacing(path) as new:
            save_file(flat, new)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} could not be written ({error}); what was there is as it was.") from error


def _named(model: str | Config | None) -> Config | None:
    if isinstance(model, str) and model in PRESETS:
        return PRESETS[model]
    if model is None or isinstance(model, Config):
        return model
    raise WeightsError(f"model: expected one of {', '.join(PRESETS)}, or a config of one; found {model!r}.")


def _config(place: Path, wanted: Config | None) -> Config:
    """What the weights at `place` are of: `wanted`, or else their `config.json`; WeightsError if the two contradict."""
    where = (place if place.is_dir() else place.parent) / "config.json"
    if not where.exists():
        if wanted is None:
            raise WeightsError(
                f"{where}: no such file; name the folder that has the weights themselves, or say with model= what they "
                f"are of: {', '.join(PRESETS)}."
            )
        return wanted
    settings = read_json(where)
    if wanted is None:
        return _published.config_from_diffusers(settings, where)
    _published.check_class(settings, wanted, where)
    return wanted


_EXPERTS = ("transformer", "transformer_2")  # of Wan 2.2 A14B: for much noise, and for little
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?")


def _locate(path: str | os.PathLike) -> Path:
    """The file or folder that has the weights themselves; from the hub if `path` names nothing here."""
    place = _files.expanded(path, "weights", WeightsError)
    if not place.exists() and not place.is_symlink() and (hub := _HUB_ID.fullmatch(os.fspath(path))):
        return _download(hub[1], hub[2] or "transformer")
    if not place.exists():
        raise WeightsError(f"{place}: no such file or folder; check the path.")
    if (place / "model_index.json").is_file() and not (place / "transformer").is_dir():
        raise WeightsError(f"{place}: a pipeline without its transformer/; fetch that folder, or name where it is.")
    if all((place / expert).is_dir() for expert in _EXPERTS):
        raise WeightsError(f"{place}: a pipeline of two models, {' and '.join(_EXPERTS)}; name the folder of one.")
    return place / "transformer" if (place / "transformer").is_dir() else place


def _download(name: str, folder: str) -> Path:
    """A transformer from the Hugging Face hub, in its cache; WeightsError without the package or a network."""
    advice = f"If a local folder was meant, there is no {name} here. Else "
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"{name}: expected a folder that exists, or the extra that downloads: pip install 'paro_jax[port]'."
        ) from error
    try:
        root = huggingface_hub.snapshot_download(name, allow_patterns=[f"{folder}/*.safetensors", f"{folder}/*.json"])
    except Exception as error:  # a connection that breaks raises what its HTTP client has, another in each version
        raise WeightsError(
            f"{name} could not be fetched from the hub ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
            f"{advice}check name, network, and for gated models your login and their licence."
        ) from error
    place = Path(root) / folder
    if not place.is_dir():
        raise WeightsError(f"{name} has no folder {folder}/; name a repository that diffusers can read.")
    return place
