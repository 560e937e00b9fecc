"""Converted checkpoints: a folder with orbax arrays and a `config.json`, ready to be restored onto any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from paro_jax import _files
from paro_jax.models import _published, _stream
from paro_jax.models._published import Config
from paro_jax.models._safetensors import WeightsError, read_json

_KIND = "paro_jax.models"
_SCHEMA = 1


def is_one(path: Path) -> bool:
    """Whether `save_checkpoint` wrote the folder `path`."""
    return (path / "config.json").is_file() and (path / "params").is_dir()


def save_checkpoint(model: nnx.Module, path: str | os.PathLike, *, force: bool = False) -> None:
    """Write FLUX, CogVideoX or Wan to the folder `path`: parameters by orbax in `params/`, hyperparameters beside.

    Atomic: the folder appears whole or not at all. What is there already is an error; with `force` a checkpoint is
    replaced, but never anything else.

    Raises:
      WeightsError: another kind of model; `path` is taken or cannot be written.
    """
    from paro_jax import __version__

    config = getattr(model, "config", None)
    if not isinstance(config, Config) or type(model) is not _published.CLASSES[type(config)]:
        names = ", ".join(c.__name__ for c in _published.CLASSES.values())
        raise WeightsError(f"model: expected one of {names}, found {type(model).__name__}; use weights.save for it.")
    path = check_free(path, force=force)
    header = {"kind": _KIND, "schema": _SCHEMA, "paro_jax": __version__, "model": type(model).__name__}
    new = _files.beside(path)
    try:
        new.mkdir()
        with _orbax() as checkpointer:
            checkpointer.save(new / "params", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        (new / "config.json").write_text(json.dumps(header | {"config": dataclasses.asdict(config)}, indent=1) + "\n")
        _put(new, path)
    except OSError as error:
        raise WeightsError(f"{path} could not be written ({error}); what was there is as it was.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_checkpoint(
    path: str | os.PathLike, *, config: Config | None = None, dtype: Any = None, mesh: Mesh | None = None
) -> nnx.Module:
    """The model in a folder of `save_checkpoint`, cast to `dtype` (None keeps it), sharded as `from_pretrained` does.

    `config`: used instead of the stored one, for another resolution. The mesh need not be the one of the saving.

    Raises:
      WeightsError: no such checkpoint, one of a newer paro_jax, a damaged one, or one of another model than `config`.
    """
    import orbax.checkpoint as ocp

    path = Path(os.path.realpath(Path(path).expanduser()))
    config = _stored_config(path) if config is None else _same_weights(config, path)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: _published.build(config)), nnx.Param, ...)
    mesh = _stream.mesh_or_current(mesh)
    dtype_of = _published.dtypes(config, dtype)
    device = SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])
    flat, how = [], []
    for key, value in nnx.to_flat_state(params):
        name, shape = ".".join(map(str, key)), value.get_value().shape
        sharding = device if mesh is None else NamedSharding(mesh, _stream.partition(name, shape, mesh))
        flat.append(key)
        how.append(ocp.ArrayRestoreArgs(dtype=dtype_of(name), sharding=sharding, global_shape=shape, strict=True))
    try:
        with _orbax() as checkpointer:
            restored = checkpointer.restore(
                path / "params", args=ocp.args.PyTreeRestore(restore_args=_nested(flat, how))
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        what = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path / 'params'} is damaged or of another model ({what}); convert it again.") from error
    nnx.replace_by_pure_dict(params, restored)
    return nnx.merge(graph, params, rest)


def check_free(path: str | os.PathLike, *, force: bool = False) -> Path:
    """`path` made absolute, its links followed; WeightsError unless a checkpoint may be written there."""
    place = Path(os.path.realpath(Path(path).expanduser()))
    if os.path.lexists(place):
        if not force:
            raise WeightsError(f"{place} is there already; choose another folder, or replace it with force (--force).")
        if not is_one(place) and (not place.is_dir() or any(place.iterdir())):
            raise WeightsError(f"{place} holds something else than a converted checkpoint; choose another folder.")
    try:
        _files.probe(place)
    except OSError as error:
        raise WeightsError(f"{place} cannot be written ({error.strerror or error}); choose another folder.") from error
    return place


def _put(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; a checkpoint there goes, but only once the new one has its place."""
    old = _files.beside(path, "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _stored_config(path: Path) -> Config:
    where = path / "config.json"
    header = read_json(where)
    if header.get("kind") != _KIND:
        raise WeightsError(
            f"{where}: expected kind {_KIND!r}, found {header.get('kind')!r}; name a converted checkpoint."
        )
    if header.get("schema") != _SCHEMA:
        raise WeightsError(f"{where}: expected schema {_SCHEMA}, found {header.get('schema')!r}; update paro_jax.")
    classes = {module.__name__: config for config, module in _published.CLASSES.items()}
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in header["config"].items()}
        return classes[header["model"]](**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{where}: not a configuration of ours ({error}); convert the weights again.") from error


def _same_weights(config: Config, path: Path) -> Config:
    """`config`, or WeightsError if the checkpoint is of another class."""
    stored = _stored_config(path)
    if type(stored) is not type(config):
        raise WeightsError(f"{path}: expected weights for {type(config).__name__}, found {type(stored).__name__}.")
    return config


def _nested(keys: list[tuple], values: list[Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for (*above, leaf), value in zip(keys, values, strict=True):
        branch = tree
        for key in above:
            branch = branch.setdefault(key, {})
        branch[leaf] = value
    return tree


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # Trained weights do not compress: packing them costs time and saves a fifth at best.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
