"""Weights from disk into their place: band by band, cast once, each device only its shard."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from paro_jax.models._mapping import Source
from paro_jax.models._safetensors import Tensor

_BYTES = 1 << 22  # in a band that goes straight into its place
_CACHED = 1 << 19  # in one that is read into a cache first
_ROW_PARALLEL = ("to_out", "mlp_out")  # their input is what the layer before has sharded

Bounds = tuple[tuple[int, int], ...]


def mesh_or_current(mesh: Mesh | None) -> Mesh | None:
    """`mesh`, or else the one that `jax.set_mesh` has set."""
    current = jax.sharding.get_mesh() if mesh is None else mesh
    return None if current.empty else current


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is sharded by default (tensor parallelism as in Megatron, arXiv 1909.08053).

    Weights `[..., out, in]` and Flax's kernels `[..., in, out]` along their heads or features: `out`, or `in` for the
    projection that ends an attention or a feed-forward. Along the mesh axis "model", or the last one if none has that
    name. The rest is replicated, and a matrix too whose axis does not divide.
    """
    axis = "model" if "model" in mesh.axis_names else mesh.axis_names[-1]
    *module, leaf = name.split(".")
    if leaf not in ("weight", "kernel") or len(shape) < 2:
        return PartitionSpec()
    out, into = (-2, -1) if leaf == "weight" else (-1, -2)
    dim = len(shape) + (into if module and module[-1] in _ROW_PARALLEL else out)
    if shape[dim] % mesh.shape[axis]:
        return PartitionSpec()
    return PartitionSpec(*[None] * dim, axis)


def read(
    sources: Sequence[Source],
    tensors: Mapping[str, Tensor],
    dtype_of: Callable[[str], Any],
    mesh: Mesh | None,
    progress: bool = False,
) -> nnx.State:
    """All parameters. `dtype_of`: name of a parameter -> its dtype, None for that of the file."""
    size = sum(s.rows * s.width * tensors[key].dtype.itemsize for s in sources for key in s.keys)
    flat: list[tuple[tuple, nnx.Param]] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=size, desc="load", unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        local = threading.local()
        for source in sources:
            array = _parameter(source, tensors, dtype_of(source.name), mesh, pool, local, bar)
            if flat:  # one transfer to a device at a time is under way, while the next parameter is read
                jax.block_until_ready(flat[-1][1].get_value())
            flat.append((source.path, nnx.Param(array)))
    return nnx.from_flat_state(flat)


def _parameter(
    source: Source,
    tensors: Mapping[str, Tensor],
    dtype: Any,
    mesh: Mesh | None,
    pool: ThreadPoolExecutor,
    local: threading.local,
    bar: tqdm,
) -> jax.Array:
    dtype = np.dtype(dtype or jnp.result_type(*{tensors[key].dtype for key in source.keys}))
    whole: Bounds = tuple((0, n) for n in source.shape)
    sharding, places = None, {None: whole}
    if mesh is not None:
        sharding = NamedSharding(mesh, partition(source.name, source.shape, mesh))
        indices = sharding.addressable_devices_indices_map(source.shape)
        places = {
            device: tuple(part.indices(n)[:2] for part, n in zip(index or (), source.shape, strict=True))
            for device, index in indices.items()
        }
    parts = {bounds: _aligned(tuple(b - a for a, b in bounds), dtype) for bounds in set(places.values())}
    axis = 2 if source.stacked else 1
    # Whole rows of the right dtype go from the file into their place; a part of a row, or a cast, by way of a cache.
    straight = all(bounds[axis:] == whole[axis:] for bounds in parts)
    straight = straight and all(tensors[key].dtype == dtype for key in source.keys)

    def band(job: tuple[int, str, int, int, int]) -> int:
        layer, key, first, last, at = job
        tensor, rows = tensors[key], None
        nbytes = source.width * tensor.dtype.itemsize
        for bounds, part in parts.items():
            start, stop, place = _place(source, layer, at, at + last - first, bounds, part)
            if start >= stop:
                continue
            if straight:
                tensor.read_into(memoryview(place.reshape(-1).view(np.uint8)), (first + start - at) * nbytes)
            else:
                rows = _rows(tensor, source, first, last, local) if rows is None else rows
                _copy(rows[(slice(start - at, stop - at), *(slice(a, b) for a, b in bounds[axis:]))], place)
        return (last - first) * nbytes

    for nbytes in pool.map(band, _bands(source, tensors, _BYTES if straight else _CACHED)):
        bar.update(nbytes)
    if sharding is None:
        return jax.device_put(parts[whole])  # on the default device, and free to move
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in places.items()]
    return jax.make_array_from_single_device_arrays(source.shape, sharding, arrays)


def _bands(source: Source, tensors: Mapping[str, Tensor], size: int) -> list[tuple[int, str, int, int, int]]:
    """(layer, key, first and last row of theirs, where they go in ours) of bands of `size` bytes, or one row."""
    bands = []
    for layer, key in enumerate(source.keys):
        step = max(size // max(source.width * tensors[key].dtype.itemsize, 1), 1)
        at = 0
        for a, b in source.claims:
            for first in range(a, b, step):
                last = min(first + step, b)
                bands.append((layer, key, first, last, at))
                at += last - first
    return bands


def _place(
    source: Source, layer: int, first: int, last: int, bounds: Bounds, part: np.ndarray
) -> tuple[int, int, np.ndarray]:
    """Which of rows `first` to `last` of a layer of ours a shard (`bounds`) has, and where it has them."""
    if source.stacked:
        (start, stop), bounds = bounds[0], bounds[1:]
        if not start <= layer < stop:
            return first, first, part[:0]
        part = part[layer - start, ...]
    (start, stop), part = (bounds[0], part) if bounds else ((0, 1), part.reshape(1))
    first, last = max(first, start), min(last, stop)
    return first, last, part[first - start : max(last - start, 0)]


def _rows(tensor: Tensor, source: Source, first: int, last: int, local: Any) -> np.ndarray:
    """Rows of a tensor, in memory of this thread that the next call overwrites."""
    size = (last - first) * source.width * tensor.dtype.itemsize
    memory = getattr(local, "memory", None)
    if memory is None or memory.size < size:
        memory = local.memory = np.empty(size, np.uint8)
    memory = memory[:size]
    tensor.read_into(memoryview(memory), first * source.width * tensor.dtype.itemsize)
    return memory.view(tensor.dtype).reshape(last - first, *source.piece[1:])


def _copy(rows: np.ndarray, place: np.ndarray) -> None:
    """Into `place`, and cast if it has another dtype."""
    if rows.dtype == place.dtype:  # as integers: NumPy is slow with a dtype that is not its own
        unsigned = np.dtype(f"u{place.dtype.itemsize}")
        rows, place = rows.view(unsigned), place.view(unsigned)
    place[...] = rows


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Empty memory that begins a cache line: what JAX on a CPU takes over as it is, instead of copying it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
