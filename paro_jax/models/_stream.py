"""Weights from disk into their place: band by band, cast once, transposed in cache, each device only its shard."""

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

# Rows of theirs in a band. Ours are written in runs of that many elements, and a band still fits a cache.
_ROWS = 512
_BYTES = 1 << 22  # in a band of what is not transposed
_ROW_PARALLEL = ("to_out", "mlp_out")  # their input is what the layer before has sharded

Bounds = tuple[tuple[int, int], ...]


def mesh_or_current(mesh: Mesh | None) -> Mesh | None:
    """`mesh`, or else the one that `jax.set_mesh` has set."""
    current = jax.sharding.get_mesh() if mesh is None else mesh
    return None if current.empty else current


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is sharded by default (tensor parallelism as in Megatron, arXiv 1909.08053).

    Kernels `[..., in, out]` along their heads or features: `out`, or `in` for the projection that ends an attention or
    a feed-forward. Along the mesh axis "model", or the last one if none has that name. The rest is replicated, and a
    kernel too whose axis does not divide.
    """
    axis = "model" if "model" in mesh.axis_names else mesh.axis_names[-1]
    *module, leaf = name.split(".")
    dim = len(shape) - (2 if module and module[-1] in _ROW_PARALLEL else 1)
    if leaf != "kernel" or shape[dim] % mesh.shape[axis]:
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

    def band(job: tuple[int, str, int, int, int]) -> int:
        layer, key, first, last, at = job
        tensor = tensors[key]
        nbytes = source.width * tensor.dtype.itemsize
        if whole in parts and len(parts) == 1 and tensor.dtype == dtype and not source.is_kernel:
            place = (parts[whole][layer, ...] if source.stacked else parts[whole]).reshape(-1).view(np.uint8)
            tensor.read_into([memoryview(place)[at * nbytes : (at + last - first) * nbytes]], first * nbytes)
        else:
            rows = _rows(tensor, source, first, last, dtype, local)
            for bounds, part in parts.items():
                _copy(rows, source, layer, at, bounds, part)
        return (last - first) * nbytes

    for nbytes in pool.map(band, _bands(source, tensors)):
        bar.update(nbytes)
    if sharding is None:
        return jax.device_put(parts[whole])  # on the default device, and free to move
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in places.items()]
    return jax.make_array_from_single_device_arrays(source.shape, sharding, arrays)


def _bands(source: Source, tensors: Mapping[str, Tensor]) -> list[tuple[int, str, int, int, int]]:
    """(layer, key, first and last row of theirs, where they go in ours) of everything that is to be read."""
    bands = []
    for layer, key in enumerate(source.keys):
        step = _ROWS if source.is_kernel else max(_BYTES // max(source.width * tensors[key].dtype.itemsize, 1), 1)
        at = 0
        for a, b in source.claims:
            for first in range(a, b, step):
                last = min(first + step, b)
                bands.append((layer, key, first, last, at))
                at += last - first
    return bands


def _rows(tensor: Tensor, source: Source, first: int, last: int, dtype: np.dtype, local: Any) -> np.ndarray:
    """Rows of a tensor, cast, in memory of this thread that the next call overwrites."""
    nbytes = source.width * tensor.dtype.itemsize
    geometry = (last - first, nbytes, tensor.dtype, source.is_kernel)
    if getattr(local, "geometry", None) != geometry:
        # For a transpose, an odd number of cache lines from row to row: were it a power of two, all of a column would
        # compete for one set of the cache.
        stride = (-(-nbytes // 64) | 1) * 64 if source.is_kernel else nbytes
        scratch = _aligned((last - first, stride), np.dtype(np.uint8))
        local.geometry, local.rows = geometry, scratch[:, :nbytes].view(tensor.dtype)
        local.views = (
            [memoryview(row[:nbytes]) for row in scratch] if source.is_kernel else [memoryview(scratch.ravel())]
        )
    tensor.read_into(local.views, first * nbytes)
    return local.rows if tensor.dtype == dtype else local.rows.astype(dtype)


def _copy(rows: np.ndarray, source: Source, layer: int, at: int, bounds: Bounds, part: np.ndarray) -> None:
    """What a shard (`bounds` of ours) has of a band of rows that goes `at` some place of ours."""
    if source.stacked:
        (start, stop), bounds = bounds[0], bounds[1:]
        if not start <= layer < stop:
            return
        part = part[layer - start, ...]
    # Numbers of one kind are copied as integers: NumPy is slow with a dtype that is not its own.
    unsigned = np.dtype(f"u{part.dtype.itemsize}")
    rows, part = rows.view(unsigned), part.view(unsigned)
    if not bounds:  # a number alone
        part[...] = rows.reshape(())
        return
    if source.is_kernel:
        part, bounds = part.T, bounds[::-1]
    else:
        rows = rows.reshape(len(rows), *source.piece[1:])
    (start, stop), *rest = bounds
    first, last = max(at, start), min(at + len(rows), stop)
    if first < last:
        part[first - start : last - start] = rows[(slice(first - at, last - at), *(slice(a, b) for a, b in rest))]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Empty memory that begins a cache line: what JAX on a CPU takes over as it is, instead of copying it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
