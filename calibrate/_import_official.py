"""Reads the plan files of the method's authors, `permute_plan.pth` and `sparse_plan.pth`, without torch.

A .pth file is a zip archive with a pickle in it, and a pickle can run anything. Ours can only rebuild tensors: every
other name in it is refused before it is looked up.
"""

import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid

_BLOCK = 64
# The numbers of the plan files. An older kernel of the authors numbers the same six orders differently.
_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
_STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
_PICKLE_BYTES = 1 << 20  # a plan's pickle has a few hundred bytes; the numbers lie beside it
_RATE_TOLERANCE = 0.005  # between the density a file states and the one its mask has


def import_official(
    permute_plan: str | os.PathLike,
    sparse_plan: str | os.PathLike,
    grid: TokenGrid,
    *,
    quant: QuantSpec = QuantSpec(),
) -> AttentionPlan:
    """The authors' plan as an `AttentionPlan`, in blocks of 64 x 64, with as many buckets as the file has masks.

    permute_plan: "permute" int [layers, heads]. sparse_plan: "sparse" 0/1 [masks, layers, heads, n, n] and
    "dense_rate".
    grid: of the model the plan is for, e.g. TokenGrid((13, 30, 45), text=226) for CogVideoX-5B.

    The authors put text first, unpadded, and cut blocks from token 0 of text; we put it last. Where text does not fill
    its blocks, each of our blocks lies over two of theirs a side and is kept when any of them is: nothing that was
    kept is lost, but the density grows. A warning says by how much. n may be that of all blocks, of the blocks without
    text, or of those without the partial last one, which the authors always keep, as they do text. Stated densities
    that differ from the mask's, and heads flagged as empty, which we do not skip, are warned about.

    Raises ValueError for a file that is not torch's zip format, holds anything but tensors, lacks a key, has another
    shape, order numbers other than 0 to 5, or a mask that is not 0 and 1.
    """
    if len(grid.shape) != 3 or (grid.text and grid.text_position != "first"):
        raise ValueError(
            f"grid must be (frames, height, width) with text first, as the authors' models have; got {grid}."
        )
    permute, sparse = Path(permute_plan), Path(sparse_plan)
    ids, flags = _tensors(permute, "permute", "empty")
    masks, rates = _tensors(sparse, "sparse", "dense_rate")
    assert ids is not None and masks is not None
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{permute}: 'permute' must be integers [layers, heads]; got {ids.dtype} {ids.shape}.")
    if not ((ids >= 0) & (ids < len(_ORDERS))).all():
        unknown = sorted({int(i) for i in ids.flat} - set(range(len(_ORDERS))))
        raise ValueError(f"{permute}: 'permute' must number the orders 0 to {len(_ORDERS) - 1}; it also has {unknown}.")
    if masks.ndim != 5 or masks.shape[1:3] != ids.shape or masks.shape[3] != masks.shape[4] or 0 in masks.shape:
        raise ValueError(
            f"{sparse}: 'sparse' must be [masks, layers, heads, n, n] with (layers, heads) = {ids.shape}, as in "
            f"{permute}; got {masks.shape}."
        )
    keep, density = _our_blocks(sparse, masks, grid)
    if flags is not None and np.any(flags):
        warnings.warn(
            f"{permute}: {np.count_nonzero(flags)} heads are flagged as empty; their masks are imported like any "
            "other.",
            stacklevel=2,
        )
    _warn_of_density(sparse, grid, density, keep, rates)
    buckets = len(keep)
    return AttentionPlan.build(
        grid,
        order=[[_ORDERS[i] for i in layer] for layer in ids.tolist()],
        mask=BlockMask(jnp.asarray(keep if buckets > 1 else keep[0]), (_BLOCK, _BLOCK)),
        quant=quant,
        bucket_edges=[i / buckets for i in range(buckets)] + [1.0],
    )


def _our_blocks(path: Path, masks: np.ndarray, grid: TokenGrid) -> tuple[np.ndarray, np.ndarray]:
    """bool [masks, layers, heads, nq, nk] in our layout, and float64 [masks, layers, heads], the density in theirs."""
    total, text = -(-grid.tokens // _BLOCK), -(-grid.text // _BLOCK)
    n = masks.shape[-1]
    # Without text there is one way to count; with text the authors' own scripts count in three.
    front, back = {total: (0, 0), total - text: (text, 0), total - text - 1: (text, 1)}.get(n, (-1, -1))
    if front < 0 or (text == 0 and n != total):
        counts = [total, total - text, total - text - 1] if text else [total]
        raise ValueError(
            f"{path}: 'sparse' has {n} x {n} blocks, but grid {grid.shape} with text {grid.text} has "
            f"{' or '.join(map(str, counts))} a side ({grid.tokens} tokens in blocks of {_BLOCK}). Is the plan for "
            "another resolution?"
        )
    image_blocks = -(-grid.grid_tokens // _BLOCK)
    starts = np.arange(image_blocks) * _BLOCK
    first = (grid.text + starts) // _BLOCK
    last = (grid.text + np.minimum(starts + _BLOCK, grid.grid_tokens) - 1) // _BLOCK
    always = grid.always_keep((_BLOCK, _BLOCK))
    keep = np.ones((*masks.shape[:3], total, total), bool)
    density = np.empty(masks.shape[:3])
    for index in np.ndindex(*masks.shape[:2]):  # a layer at a time: a whole plan has gigabytes
        if masks.dtype != bool and not ((masks[index] == 0) | (masks[index] == 1)).all():
            raise ValueError(f"{path}: 'sparse' must hold 0 (skip) and 1 (keep) only; mask {index} has other values.")
        theirs = np.pad(masks[index].astype(bool), [(0, 0), (front, back), (front, back)], constant_values=True)
        theirs[:, :text], theirs[:, :, :text], theirs[:, -1], theirs[:, :, -1] = True, True, True, True
        density[index] = theirs.mean((-2, -1))
        rows = theirs[:, first] | theirs[:, last]
        keep[index][:, :image_blocks, :image_blocks] = rows[:, :, first] | rows[:, :, last]
        keep[index] |= always
    return keep, density


def _warn_of_density(
    path: Path, grid: TokenGrid, density: np.ndarray, keep: np.ndarray, rates: np.ndarray | None
) -> None:
    if grid.text % _BLOCK:
        there, here = density.mean(), np.count_nonzero(keep) / keep.size
        warnings.warn(
            f"{path}: the authors do not pad text ({grid.text} tokens, {grid.text / _BLOCK:.2f} blocks), so their "
            f"blocks straddle ours; density {there:.4f} there is {here:.4f} here. Calibrate anew for the density you "
            "want.",
            stacklevel=3,
        )
    if rates is None:
        return
    if rates.shape != density.shape:
        warnings.warn(f"{path}: 'dense_rate' is {rates.shape}, not {density.shape}; ignored.", stacklevel=3)
        return
    off = np.abs(rates.astype(np.float64) - density)
    # NaN counts as off.
    if not (off <= _RATE_TOLERANCE).all():
        where = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
        warnings.warn(
            f"{path}: 'dense_rate' differs from the density of the mask for "
            f"{np.count_nonzero(~(off <= _RATE_TOLERANCE))} of {off.size} heads, most at (mask, layer, head) "
            f"{tuple(map(int, where))}: {rates[where]:.4f} stated, {density[where]:.4f} found. The mask is used.",
            stacklevel=3,
        )


def _tensors(path: Path, needed: str, optional: str) -> tuple[np.ndarray, np.ndarray | None]:
    found = load_tensors(path)
    if not isinstance(found, dict) or not isinstance(found.get(needed), np.ndarray):
        has = ", ".join(map(repr, found)) if isinstance(found, dict) else f"a bare {type(found).__name__}"
        raise ValueError(f"{path}: expected a dict with a tensor {needed!r}; it holds {has or 'nothing'}.")
    other = found.get(optional)
    return found[needed], other if isinstance(other, np.ndarray) else None


def load_tensors(path: Path) -> Any:
    """What a .pth file holds, tensors as numpy arrays. Raises ValueError for anything but tensors, dicts and
    numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpickle(path, archive)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a whole file in torch's zip format ({error}). Download it again; a file from before torch "
            "1.6 must be loaded and saved again with a newer torch."
        ) from error


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or entries[pickles[0]].file_size > _PICKLE_BYTES:
        raise ValueError(
            f"{path} is not a plan in torch's zip format: expected one small <name>/data.pkl; got {pickles}."
        )
    root = pickles[0].removesuffix("data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError(f"{path}: an entry is compressed, which torch never does; refused.")
    order = archive.read(root + "byteorder").strip() if root + "byteorder" in entries else b"little"

    def read(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        name = f"{root}data/{key}"
        if name not in entries or entries[name].file_size != count * dtype.itemsize:
            size = entries[name].file_size if name in entries else None
            raise ValueError(f"{path}: {name} must have {count} x {dtype.itemsize} bytes; it has {size}.")
        values = np.frombuffer(archive.read(name), dtype.newbyteorder(">" if order == b"big" else "<"))
        return values.astype(dtype, copy=False)

    try:
        return _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), path, read).load()
    except (zipfile.BadZipFile, ValueError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path}: its pickle is damaged ({type(error).__name__}: {error}).") from error


class _TensorUnpickler(pickle.Unpickler):
    """Knows the names that a file of tensors needs. What it gives for them can neither do nor hold anything else."""

    def __init__(self, file: io.BytesIO, path: Path, read: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file)
        self._path, self._read = path, read

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name  # not the dtype: a pickle can set the state of that
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild(self._path)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(
            f"{self._path}: its pickle asks for {module}.{name}; only tensors are loaded. The file is no plan, or it "
            "is meant to run code: do not load it elsewhere."
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        fine = isinstance(pid, tuple) and len(pid) == 5 and all(isinstance(part, str) for part in pid[:3])
        if not fine or pid[0] != "storage" or pid[1] not in _STORAGES or type(pid[4]) is not int:
            raise ValueError(f"{self._path}: its pickle refers to {pid!r}; expected a tensor's storage.")
        return self._read(np.dtype(_STORAGES[pid[1]]), pid[2], pid[4])


class _Rebuild:
    """torch._utils._rebuild_tensor_v2, and no place where a pickle could leave anything."""

    __slots__ = ("_path",)

    def __init__(self, path: Path):
        self._path = path

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> np.ndarray:
        numbers = (offset, *size, *stride)
        wrong = len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers)
        if wrong or not isinstance(storage, np.ndarray):
            raise ValueError(f"{self._path}: a tensor has offset {offset}, size {size}, stride {stride}.")
        end = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
        if math.prod(size) > storage.size or (math.prod(size) and end > storage.size):
            raise ValueError(
                f"{self._path}: a tensor of size {size}, stride {stride} overruns its {storage.size} numbers."
            )
        strides = tuple(s * storage.itemsize for s in stride)
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
