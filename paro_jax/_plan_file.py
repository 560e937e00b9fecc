"""Plan files: one portable `.safetensors` file, or a directory written by orbax. Checked in full, saved atomically.

A header (JSON) says what the arrays mean: schema number, grid, block, order *names*, bucket edges, widths, model,
provenance and versions. It carries a SHA-256 of the file it stands in, taken with the digest's own place zeroed, so
that one altered byte anywhere is noticed. In a `.safetensors` file that is the whole file, the header being its only
metadata entry. A directory has the header in `plan.json`, with the SHA-256 of every file that orbax wrote into
`arrays/`.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paro_jax import _files
from paro_jax._grid import TokenGrid, check_block
from paro_jax._plan import AttentionPlan, _check_edges
from paro_jax._quant import QuantSpec

SCHEMA = 3
# Schema 1 knows fewer fields of quant and no wide_quant, 2 no `first`; what they lack has the value it had then.
_READS = (1, 2, 3)

_KIND = "paro_jax.AttentionPlan"
_NO_DIGEST = "0" * 64
# In a .safetensors file the header is a JSON string inside JSON, so its quotes are escaped there.
_DIGEST = re.compile(rb'\\?"sha256\\?":\\?"([0-9a-f]{64})\\?"')
_DTYPES = {"order": "int8", "keep_bits": "uint8", "k_mean": "float32", "wide": "bool", "first": "uint16"}
_OPTIONAL = ("k_mean", "wide", "first")

Arrays = dict[str, np.ndarray]


class PlanError(ValueError):
    """A plan file that cannot be read or written; says what was expected, what was found and what to do."""


def save_plan(
    plan: AttentionPlan, path: str | os.PathLike, *, model: str = "", provenance: dict[str, Any] | None = None
) -> None:
    """Write `plan` to `path`: one file if it ends in ".safetensors", else a directory written by orbax.

    `model`: the name `load_plan(model=...)` is to check. `provenance`: JSON values that say how the plan was made.
    A "~" is the home folder, and a link stays a link: what it points to is written. Atomic: until the new plan is whole
    on disk the old one stays, also when the disk is full; of several that save to one place at once, the last to finish
    wins. (A directory is swapped in by two renames; a crash between them leaves the old plan beside its place, named
    "*.old".)

    Raises ValueError for arguments of the wrong kind, PlanError when `path` cannot be written.
    """
    if not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan must be an AttentionPlan; got {type(plan).__name__}.")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(plan)):
        raise ValueError("plan must hold arrays, not traced values; got a plan inside jit. Save it outside.")
    if not isinstance(model, str):
        raise ValueError(f"model must be a string; got {model!r}.")
    path, single = _target(path)
    arrays = {name: np.asarray(getattr(plan, name)) for name in _DTYPES if getattr(plan, name) is not None}
    header = _header(plan, arrays, model, _plain(provenance or {}))
    if not path.parent.is_dir():
        raise PlanError(f"path must lie in a folder that exists; there is no {path.parent}. Create it first.")
    try:
        if single:
            _save_file(header, arrays, path)
        else:
            _save_directory(header, arrays, path)
    except OSError as error:
        size = sum(x.nbytes for x in arrays.values())
        raise PlanError(
            f"path {path} could not be written: expected room and permission for {size} bytes, got {error}. What was "
            "there before is as it was. Free some space or choose another path."
        ) from error


def load_plan(path: str | os.PathLike, *, model: str | None = None, grid: TokenGrid | None = None) -> AttentionPlan:
    """Read a plan and check all of it. With `model` or `grid`, also that it was made for them (bricks do not matter).

    Raises PlanError for a path without a plan, a file that is truncated or altered, a newer schema, an unknown order or
    width, shapes that contradict each other, another model or another grid.
    """
    path = _path(path)
    header, arrays = _read(path)
    plan = _check(header, arrays, path)
    if model is not None and header["model"] != model:
        found = repr(header["model"]) if header["model"] else "no model name"
        raise PlanError(f"model: expected a plan for {model!r}, found {found} in {path}. Calibrate for this model.")
    if grid is not None and grid.place != plan.grid.place:
        raise PlanError(
            f"grid: expected a plan for (shape, text, text_position) {grid.place}, found {plan.grid.place} in {path}. "
            "Calibrate for this resolution."
        )
    return plan


def plan_info(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a plan file as plain values, checked as `load_plan` does.

    Keys: schema, model, grid, block, order_names, quant, wide_quant, bucket_edges, arrays, provenance, versions,
    sha256, lead, heads, density, nbytes. Raises PlanError as `load_plan` does.
    """
    path = _path(path)
    header, arrays = _read(path)
    plan = _check(header, arrays, path)
    facts = {"lead": list(plan.lead), "heads": plan.heads, "density": plan.density, "nbytes": plan.nbytes}
    return {name: value for name, value in header.items() if name not in ("kind", "files")} | facts


def probe(path: str | os.PathLike) -> None:
    """Find out now whether `save_plan` will be able to write to `path`, before the work that makes the plan.

    Makes the folder it lies in. Raises PlanError for a place that cannot be written, and for one that holds anything
    but a plan.
    """
    place, single = _target(path)
    if place.is_file() and single:
        _read(place)
    elif single:
        _require_file(place)
    else:
        _require_directory(place)
    try:
        _files.probe(place)
    except OSError as error:
        raise PlanError(f"path: expected a place that can be written, found {error}. Choose another path.") from error


# --- what a header says ---------------------------------------------------------------------------------------------


def _header(plan: AttentionPlan, arrays: Arrays, model: str, provenance: dict[str, Any]) -> dict[str, Any]:
    from paro_jax import __version__  # at the top it would be a circle

    return {
        "sha256": _NO_DIGEST,  # first, so that no text of the caller's can be taken for it
        "kind": _KIND,
        "schema": SCHEMA,
        "model": model,
        "grid": asdict(plan.grid),
        "block": plan.block,
        "order_names": plan.order_names,
        "quant": asdict(plan.quant),
        "wide_quant": None if plan.wide_quant is None else asdict(plan.wide_quant),
        "bucket_edges": plan.bucket_edges,
        "arrays": {name: {"dtype": str(x.dtype), "shape": x.shape} for name, x in arrays.items()},
        "provenance": provenance,
        "versions": {"paro_jax": __version__, "jax": jax.__version__},
    }


def _plain(provenance: Any) -> dict[str, Any]:
    """`provenance` as JSON holds it, numpy values and paths included; ValueError for anything else."""

    def convert(x: Any) -> Any:
        if isinstance(x, (np.generic, np.ndarray)):
            return x.tolist()
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        raise TypeError(f"{type(x).__name__} {x!r}")

    try:
        plain = json.loads(json.dumps(provenance, default=convert, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must be a dict of JSON values; got {error}.") from None
    if not isinstance(plain, dict):
        raise ValueError(f"provenance must be a dict of JSON values; got {type(provenance).__name__}.")
    return plain


def _check(header: dict[str, Any], arrays: Arrays, path: Any) -> AttentionPlan:
    """The plan that header and arrays describe, or PlanError. The bytes are known to be those that were written."""

    def wrong(what: str, expected: Any, found: Any, advice: str = "Calibrate again, or use the program that wrote it."):
        return PlanError(f"{what} in {path}: expected {expected}, found {found}. {advice}")

    schema = header.get("schema")
    if schema not in _READS or isinstance(schema, bool):
        advice = "Upgrade paro_jax." if isinstance(schema, int) and schema > SCHEMA else "Calibrate again."
        raise wrong("schema", f"{SCHEMA}, the newest this paro_jax reads", repr(schema), advice)
    try:
        grid = TokenGrid(**header["grid"])
        quant = QuantSpec(**header["quant"])
        wide_quant = header.get("wide_quant")
        wide_quant = None if wide_quant is None else QuantSpec(**wide_quant)
        block = check_block(header["block"])
        names = header["order_names"]
        versions, provenance, model = header["versions"], header["provenance"], header["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise wrong("header", "grid, quant, block, order_names and model of a plan", f"{error}") from error
    if not isinstance(model, str) or not isinstance(provenance, dict) or not isinstance(versions, dict):
        raise wrong("header", "model a string, provenance and versions dicts", f"{model!r}")
    unknown = [name for name in names if name not in grid.orders]
    if unknown:
        raise wrong(
            "order_names", f"names among {', '.join(grid.orders)}", ", ".join(map(repr, unknown)), "Upgrade paro_jax."
        )

    found = {name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in arrays.items()}
    if found != header.get("arrays"):
        raise wrong("arrays", header.get("arrays"), found)
    for name, dtype in _DTYPES.items():
        x = arrays.get(name)
        if (x is None and name not in _OPTIONAL) or (x is not None and str(x.dtype) != dtype):
            raise wrong(name, f"an array of {dtype}", "none" if x is None else str(x.dtype))
    if set(arrays) - set(_DTYPES):
        raise wrong("arrays", f"only {', '.join(_DTYPES)}", ", ".join(sorted(set(arrays) - set(_DTYPES))))

    order, bits = arrays["order"], arrays["keep_bits"]
    k_mean, wide, first = (arrays.get(name) for name in _OPTIONAL)
    if not 1 <= order.ndim <= 3 or order.size == 0:
        raise wrong("order", "shape [*lead, heads] with at most two leading axes", list(order.shape))
    if order.min() < 0 or order.max() >= len(names):
        raise wrong(
            "order", f"0 to {len(names) - 1}, one of {len(names)} order names", f"{order.min()} to {order.max()}"
        )
    nq, nk = grid.blocks(block)
    shape = (*order.shape, nq, -(-nk // 8))
    if bits.shape != shape:
        raise wrong("keep_bits", f"shape {list(shape)} for {grid.tokens} tokens in blocks of {block}", list(bits.shape))
    if nk % 8 and (bits[..., -1] >> (nk % 8)).any():
        raise wrong("keep_bits", f"zeros behind the {nk} blocks of a row", "ones")
    if k_mean is not None and (k_mean.ndim != order.ndim + 1 or k_mean.shape[:-1] != order.shape):
        raise wrong("k_mean", f"shape {[*order.shape, 'head_dim']}", list(k_mean.shape))
    if k_mean is not None and not np.isfinite(k_mean).all():
        raise wrong("k_mean", "finite numbers", "NaN or infinity")
    if (wide is None) != (wide_quant is None) or (wide is not None and wide.shape != order.shape[:-1]):
        found = "no array" if wide is None else f"{list(wide.shape)} and wide_quant {header.get('wide_quant')}"
        raise wrong("wide", f"shape {list(order.shape[:-1])} with a wide_quant, or neither", found)
    if first is not None and first.shape[:-1] != (*order.shape, nq):
        raise wrong("first", f"shape {[*order.shape, nq, 'm']}", list(first.shape))
    if first is not None and (first >= nk).any():
        raise wrong("first", f"key blocks, 0 to {nk - 1}", f"up to {first.max()}")
    try:
        edges = _check_edges(header["bucket_edges"], order.shape[:-1])
    except (KeyError, ValueError) as error:
        raise wrong("bucket_edges", f"edges that fit the leading axes {order.shape[:-1]}", f"{error}") from error

    # Ids count along the names in the file; this version may list them in another sequence.
    ids = np.array([grid.order_id(name) for name in names], np.int8)[order]
    mean = None if k_mean is None else jnp.asarray(k_mean)
    wide, first = (None if x is None else jnp.asarray(x) for x in (wide, first))
    return AttentionPlan(
        jnp.asarray(ids), jnp.asarray(bits), mean, grid, block, grid.orders, quant, edges, wide, wide_quant, first
    )


# --- paths ----------------------------------------------------------------------------------------------------------


def _path(path: Any) -> Path:
    return _files.expanded(path, "a plan", PlanError)


def _target(path: Any) -> tuple[Path, bool]:
    """Where `path` is to be written, links followed, and whether as a single file."""
    given = _path(path)
    # Renaming onto a link would put the plan in the link's place and leave what it pointed to as it was.
    real = Path(os.path.realpath(given))
    return real, ".safetensors" in (given.suffix.lower(), real.suffix.lower())


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise PlanError(f"path {path}: expected a file or nothing, found a folder. Choose another path.")


def _require_directory(path: Path) -> None:
    if path.exists() and not (path / "plan.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        found = "a folder that holds something else" if path.is_dir() else "a file"
        raise PlanError(
            f"path {path}: expected a plan directory or nothing, found {found}, and it will not be replaced. Choose "
            "another path, or one that ends in .safetensors for a single file."
        )


# --- bytes ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of the plan at `path`, which are known to be those that were written, or PlanError."""
    try:
        if path.is_dir():
            return _read_directory(path)
        return _read_file(path)
    except OSError as error:
        raise PlanError(f"path: expected a plan that can be read, got {error}. Check the path {path}.") from error


def _save_file(header: dict[str, Any], arrays: Arrays, path: Path) -> None:
    from safetensors.numpy import save

    _require_file(path)
    data = _signed(save(arrays, metadata={"paro_jax": _dumps(header)}))
    with _files.replacing(path) as new:
        _write(new, data)


def _read_file(path: Path) -> tuple[dict[str, Any], Arrays]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = path.read_bytes()
    _verify(data, path)
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["paro_jax"])
        arrays = load(data)
    except (ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
        raise PlanError(f"{path}: expected a plan written by save_plan, found {error}. Calibrate again.") from error
    return _require_header(header, path), arrays


def _save_directory(header: dict[str, Any], arrays: Arrays, path: Path) -> None:
    _require_directory(path)
    new = _files.beside(path)
    try:
        new.mkdir()
        _files.save_arrays(new / "arrays", arrays)
        sums = {name: _sha256((new / name).read_bytes()) for name in _files_of(new)}
        _write(new / "plan.json", _signed(_dumps(header | {"files": sums}).encode()))
        _swap_in(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _files_of(directory: Path) -> list[str]:
    """Everything in `arrays/` that is not a folder, relative to the plan directory."""
    return sorted(x.relative_to(directory).as_posix() for x in (directory / "arrays").rglob("*") if not x.is_dir())


def _swap_in(new: Path, path: Path) -> None:
    """Put the directory `new` in the place of `path`. Another may do the same at the same time: then try again."""
    while True:
        old = _files.beside(path, "old")
        try:
            os.replace(path, old)
        except FileNotFoundError:
            old = None
        try:
            os.replace(new, path)
        except BaseException as error:
            if old is not None:
                _put_back(old, path)
            if not _taken(error):
                raise
        else:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
            return


def _put_back(old: Path, path: Path) -> None:
    try:
        os.replace(old, path)
    except OSError as error:
        if not _taken(error):
            raise PlanError(
                f"path {path} could not be written ({error}). What was there before is now {old}."
            ) from error
        shutil.rmtree(old, ignore_errors=True)  # another one's plan, whole and newer, stands there


def _taken(error: BaseException) -> bool:
    """True when a directory could not be renamed because there is one of that name."""
    return isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)


def _read_directory(path: Path) -> tuple[dict[str, Any], Arrays]:
    import orbax.checkpoint as ocp

    file = path / "plan.json"
    if not file.is_file():
        raise PlanError(f"path {path}: expected a plan directory with plan.json in it, found none. Check the path.")
    data = file.read_bytes()
    _verify(data, file)
    try:
        header = _require_header(json.loads(data), file)
        sums, names = dict(header["files"]), list(header["arrays"])
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file}: expected a header written by save_plan, found {error}. Calibrate again.") from error
    extra = sorted(set(_files_of(path)) - set(sums))
    if extra:
        raise PlanError(
            f"{path}: expected the files that save_plan wrote, found {', '.join(extra)} too. Move what is not of the "
            "plan out of arrays/, or copy the whole directory again."
        )
    for name, expected in sums.items():
        part = path / name
        found = _sha256(part.read_bytes()) if part.is_file() else "no such file"
        if found != expected:
            raise PlanError(
                f"{part}: expected SHA-256 {expected}, found {found}: it was altered after save_plan wrote it. Copy "
                "the whole directory again, or calibrate again."
            )
    restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    try:
        with _files.orbax() as checkpointer:
            arrays = checkpointer.restore(path.absolute() / "arrays", args=ocp.args.PyTreeRestore(restore_args=restore))
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: expected the arrays {names}, found {error}. Calibrate again.") from error
    return header, {name: np.asarray(x) for name, x in arrays.items()}


def _require_header(header: Any, path: Path) -> dict[str, Any]:
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise PlanError(f"{path}: expected the header of a plan, kind {_KIND!r}, found another. Check the path.")
    return header


def _dumps(header: dict[str, Any]) -> str:
    return json.dumps(header, separators=(",", ":"), allow_nan=False)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _signed(data: bytes) -> bytes:
    """`data` with its zero digest replaced by its SHA-256."""
    place = _DIGEST.search(data)
    assert place is not None and place[1].decode() == _NO_DIGEST
    return data[: place.start(1)] + _sha256(data).encode() + data[place.end(1) :]


def _verify(data: bytes, path: Path) -> None:
    """PlanError unless `data` is, byte for byte, what save_plan wrote."""
    place = _DIGEST.search(data)
    if place is None:
        raise PlanError(
            f"{path}: expected a plan written by save_plan, found {len(data)} bytes without its SHA-256. It is another "
            "kind of file, or damaged; copy it again, or calibrate again."
        )
    found = _sha256(data[: place.start(1)] + _NO_DIGEST.encode() + data[place.end(1) :])
    if found != place[1].decode():
        raise PlanError(
            f"{path}: expected SHA-256 {place[1].decode()}, found {found} over {len(data)} bytes: the file was "
            "truncated or altered after save_plan wrote it. Copy it again, or calibrate again."
        )


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a full disk may only say so here
