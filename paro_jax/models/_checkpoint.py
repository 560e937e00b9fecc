"""Converted checkpoints: a folder with orbax arrays and a `config.json`, ready to be restored onto any mesh.

Orbax writes each array as a folder of its own (zarr), uncompressed, in one file for each shard. An array that came from
one device is then a file of plain numbers, and is read as a tensor of safetensors is, straight into its place: orbax
would hold a second copy of what it reads. What was saved from a mesh, orbax restores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from paro_jax import _files
from paro_jax.models import _published, _stream
from paro_jax.models._mapping import Source, raise_if
from paro_jax.models._published import Config, Model
from paro_jax.models._safetensors import DTYPES, Tensor, WeightsError, open_file, read_json

_KIND = "paro_jax.models"
_SCHEMA = 2  # 1 had kernels [in, out]
# Trained weights do not compress: it costs time and saves a fifth at best. And an array is a folder of its own.
_PACKING = dict(use_compression=False, use_ocdbt=False, use_zarr3=False)


def is_one(path: Path) -> bool:
    """Whether `save_checkpoint` wrote the folder `path`, whole or not."""
    return (path / "params").is_dir()


def save_checkpoint(model: Model, path: str | os.PathLike, *, force: bool = False, progress: bool = False) -> None:
    """Write FLUX, CogVideoX or Wan to the folder `path`: parameters by orbax in `params/`, hyperparameters beside.

    Atomic: the folder appears whole or not at all. What is there already is an error; with `force` a checkpoint is
    replaced, but never anything else. `progress`: a bar on stderr, if that is a terminal.

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
        with _watched(new, sum(x.nbytes for x in _params(model).values()), progress), _quiet():
            _files.save_arrays(new / "params", _params(model), **_PACKING)
        header |= {
            "config": dataclasses.asdict(config),
            "params": {name: x.shape for name, x in _params(model).items()},
            "files": _sizes(new),
        }
        (new / "config.json").write_text(json.dumps(header, indent=1) + "\n")
        check_free(path, force=force)  # again: writing takes minutes, in which something else may have come there
        _put(new, path)
    except OSError as error:
        raise WeightsError(f"{path} could not be written ({error}); what was there is as it was.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_checkpoint(
    path: str | os.PathLike,
    *,
    config: Config | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Model:
    """The model in a folder of `save_checkpoint`, cast to `dtype` (None keeps it), sharded as `from_pretrained` does.

    `config`: used instead of the stored one, for another resolution. The mesh need not be the one of the saving.
    `progress`: a bar on stderr, if that is a terminal.

    Raises:
      WeightsError: no such checkpoint, one of a newer paro_jax, a damaged one, or one of another model than `config`.
    """
    path = Path(os.path.realpath(_files.expanded(path, "a checkpoint", WeightsError)))
    header = _header(path)
    config = _config_for(header, path, config)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: _published.build(config)), nnx.Param, ...)
    _check(header, params, path)
    mesh = _stream.mesh_or_current(mesh)
    dtype_of = _published.dtypes(config, dtype)
    with _plain(path / "params", params) as (sources, tensors):
        if sources is None:
            state = _restore(path, params, dtype_of, mesh)
        else:
            state = _stream.read(sources, tensors, dtype_of, mesh, progress)
    return nnx.merge(graph, state, rest)


@contextlib.contextmanager
def _plain(folder: Path, params: nnx.State) -> Iterator[tuple[list[Source] | None, dict[str, Tensor]]]:
    """Where every parameter is, if all of them are files of plain numbers; else None. Layers one by one, as usual."""
    sources: list[Source] = []
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for path, value in nnx.to_flat_state(params):
            name, shape = ".".join(map(str, path)), value.get_value().shape
            dtype = _dtype_of_one_chunk(folder / name, shape)
            if dtype is None:
                yield None, {}
                return
            file = folder / name / ".".join("0" * len(shape))
            stream = stack.enter_context(open_file(file))
            stacked = len(shape) > 2
            keys = tuple(f"{name} {i}" for i in range(shape[0])) if stacked else (name,)
            sources.append(Source(path, shape, keys, (), stacked, False))
            size = sources[-1].rows * sources[-1].width * dtype.itemsize
            for i, key in enumerate(keys):
                tensors[key] = Tensor(file, stream.fileno(), i * size, dtype, sources[-1].piece)
        yield sources, tensors


def _dtype_of_one_chunk(folder: Path, shape: tuple[int, ...]) -> np.dtype | None:
    """That of a zarr array in one file, uncompressed, in the order of C; None if it is anything else."""
    try:
        about = json.loads((folder / ".zarray").read_text())
    except (OSError, ValueError):
        return None
    plain = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C", "dimension_separator": "."}
    if not shape or {**about, **plain} != about or not about["shape"] == about["chunks"] == list(shape):
        return None
    found = str(about.get("dtype")).removeprefix("<")
    return next((dtype for dtype in DTYPES.values() if found in (dtype.name, dtype.str[1:])), None)


def _restore(path: Path, params: nnx.State, dtype_of: Callable[[str], Any], mesh: Mesh | None) -> nnx.State:
    """The same by orbax, from any number of chunks."""
    import orbax.checkpoint as ocp

    alone = jnp.zeros(()).sharding  # the default device
    how: dict[str, Any] = {}
    for key, value in nnx.to_flat_state(params):
        name, shape = ".".join(map(str, key)), value.get_value().shape
        sharding = alone if mesh is None else NamedSharding(mesh, _stream.partition(name, shape, mesh))
        how[name] = ocp.ArrayRestoreArgs(dtype=dtype_of(name), sharding=sharding, global_shape=shape, strict=True)
    try:
        with _files.orbax(**_PACKING) as checkpointer:
            found = checkpointer.restore(path / "params", args=ocp.args.PyTreeRestore(restore_args=how))
    except (ValueError, KeyError, TypeError, OSError) as error:
        what = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path / 'params'} is damaged ({what}); convert it again.") from error
    flat = [(key, value.replace(found[".".join(map(str, key))])) for key, value in nnx.to_flat_state(params)]
    return nnx.from_flat_state(flat)


def stored_config(path: Path, wanted: Config | None) -> Config:
    """The configuration of a checkpoint, or `wanted`, which must be of the same class."""
    return _config_for(_header(path), path, wanted)


def check_free(path: str | os.PathLike, *, force: bool = False) -> Path:
    """`path` made absolute, its links followed; WeightsError unless a checkpoint may be written there."""
    place = Path(os.path.realpath(_files.expanded(path, "a checkpoint", WeightsError)))
    if os.path.lexists(place):
        if not force:
            raise WeightsError(f"{place} is there already; choose another folder, or replace it with force (--force).")
        if not place.is_dir() or any(place.iterdir()):
            try:
                _header(place)
            except WeightsError as error:
                raise WeightsError(f"{place} holds something else than a checkpoint; choose another folder.") from error
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
    finally:  # after Ctrl-C too
        if old.exists() and not path.exists():
            os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _header(path: Path) -> dict[str, Any]:
    where = path / "config.json"
    header = read_json(where)
    if header.get("kind") != _KIND:
        raise WeightsError(
            f"{where}: expected kind {_KIND!r}, found {header.get('kind')!r}; name a converted checkpoint."
        )
    if (found := header.get("schema")) != _SCHEMA:
        advice = "convert it again" if found == 1 else "update paro_jax"
        raise WeightsError(f"{where}: expected schema {_SCHEMA}, found {found!r}; {advice}.")
    return header


def _config_for(header: dict[str, Any], path: Path, wanted: Config | None) -> Config:
    """`wanted`, which must be of the class of the stored config, or else that."""
    classes = {module.__name__: config for config, module in _published.CLASSES.items()}
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in header["config"].items()}
        stored = classes[header["model"]](**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path / 'config.json'}: not a configuration of ours ({error}); convert it again."
        ) from error
    if wanted is not None and type(stored) is not type(wanted):
        raise WeightsError(f"{path}: expected weights for {type(wanted).__name__}, found {type(stored).__name__}.")
    return stored if wanted is None else wanted


def _check(header: dict[str, Any], params: nnx.State, path: Path) -> None:
    """WeightsError unless every file has its size and every parameter its shape: orbax would notice one at a time."""
    files, stored = header.get("files"), header.get("params")
    if not isinstance(files, dict) or not isinstance(stored, dict):
        raise WeightsError(f"{path / 'config.json'}: expected files and params, found none; convert it again.")
    sizes = _sizes(path)
    for name, size in files.items():
        if sizes.get(name) != size:
            raise WeightsError(
                f"{path / name}: expected {size} bytes, found {sizes.get(name, 'no file')}; copy it again."
            )
    wanted = {".".join(map(str, key)): list(value.get_value().shape) for key, value in nnx.to_flat_state(params)}
    problems = [f"missing {name}" for name in wanted if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in wanted]
    problems += [
        f"{name}: expected shape {tuple(shape)}, found {tuple(stored[name])}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    raise_if(problems, path)


def _params(model: nnx.Module) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, key)): value.get_value() for key, value in flat}


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of every file in `params/`, by its path from the checkpoint's folder."""
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in sorted(path.glob("params/**/*")) if p.is_file()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's warning that it finds no OCDBT to merge, which was asked for."""

    def is_news(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


@contextlib.contextmanager
def _watched(folder: Path, size: int, progress: bool) -> Iterator[None]:
    """A bar of the bytes that lie in `folder`, looked at again and again, as orbax tells nothing while it writes."""
    done = threading.Event()
    # None: only where a person looks.
    with tqdm(total=size, desc="write", unit="B", unit_scale=True, disable=None if progress else True) as bar:

        def look() -> None:
            bar.update(min(_written(folder), size) - bar.n)

        def watch() -> None:
            while not done.wait(0.2):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if not bar.disable:
                thread.join()
                look()


def _written(folder: Path) -> int:
    """Bytes of the files in `folder`, which come, grow and change their names meanwhile."""
    size = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(place, file)).st_size
    return size
