"""Width int4 in the layouts of the Hopper kernels: a value in the upper half of its byte, or two values to a byte.

wgmma multiplies bytes. A 4-bit value in the upper half of one counts 16 times itself, which its scale takes back: a
power of two, so no bit of a result knows. Two to a byte, rows of a matrix share bytes in pairs `half` rows apart, so
that unpacking is a shift and a mask: nothing moves between columns, and no sign is extended.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _registers

PACKED = "hopper_packed"  # the layout: "hopper" with k and v of width int4 two values to a byte
UNIT = {"int4": 16.0}  # what 1 is stored as in either layout; 1 at other widths
KEYS = 32  # K: keys j and j + 32 of each 64 share bytes. V: channels c and c + D / 2.


def upper(values: jax.Array) -> jax.Array:
    """int8 in [-7, 7] -> int8, in the upper halves of their bytes."""
    return values * jnp.int8(16)


def pack(values: jax.Array, half: int) -> jax.Array:
    """int8 [..., R, C] in [-7, 7] -> int8 [..., R / 2, C], R a multiple of 2 `half`.

    Of each 2 `half` rows the first half in the lower halves of the bytes, the second in the upper.
    """
    *lead, rows, columns = values.shape
    pairs = values.reshape(*lead, rows // (2 * half), 2, half, columns)
    low, high = pairs[..., 0, :, :], pairs[..., 1, :, :]
    return ((low & 15) | upper(high)).reshape(*lead, rows // 2, columns)


def unpacked(two: jax.Array, half: int) -> jax.Array:
    """Bytes of `pack`, int8 [..., R / 2, C] -> the values in the upper halves of bytes, [..., R, C]."""
    *lead, rows, columns = two.shape
    halves = two.reshape(*lead, rows // half, 1, half, columns)
    return jnp.concatenate([halves << 4, halves & -16], axis=-3).reshape(*lead, 2 * rows, columns)


def unpack(source: Any, target: Any, half: int, *, interpreted: bool) -> None:
    """`unpacked` in shared memory, by a warpgroup; then wgmma may read the target, a bulk copy overwrite the source."""
    from jax.experimental import pallas as pl

    plgpu = _registers.mosaic()
    if interpreted:
        target[...] = unpacked(source[...], half)
        return plgpu.commit_smem()
    rows = math.gcd(half, 32)
    for first in range(0, source.shape[0], rows):
        two = plgpu.load(source.at[pl.ds(first, rows)], layout=_layout(rows, source.shape[1]), optimized=False)
        low = first + first // half * half
        for start, values in zip((low, low + half), _halves(two), strict=True):
            _registers.store(target.at[pl.ds(start, rows)], values)
    return plgpu.commit_smem()


def _halves(two: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 in `_layout` -> (the lower halves of the bytes, the upper ones), each as an upper half."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    plgpu, tile = _registers.mosaic(), _layout(*two.shape)

    def split(ctx: Any, two: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((two.layout.vector_length // 4,), i32)  # a byte at a time it would be a shift a byte

        def every(value: int) -> Any:
            return arith.constant(words, ir.DenseElementsAttr.get_splat(words, ir.IntegerAttr.get(i32, value)))

        halves = np.empty((2, *two.registers.shape), dtype=object)
        for place, register in np.ndenumerate(two.registers):
            word = mgpu.bitcast(register, words)
            for i, moved in enumerate((arith.shli(word, every(4)), word)):
                halves[i, *place] = mgpu.bitcast(arith.andi(moved, every(-0x0F0F0F10)), register.type)
        low, high = (fa.FragmentedArray(_registers=half, _layout=two.layout, _is_signed=True) for half in halves)
        return low, high

    out = plgpu.ShapeDtypeStruct(two.shape, jnp.int8, layout=tile)
    inline: Any = plgpu.inline_mgpu(arg_types=(tile,), return_type=(out, out))
    return inline(split)(two)


def _layout(rows: int, columns: int) -> Any:
    """Who holds what of bytes that are unpacked: as many side by side in a thread as 128 threads share evenly."""
    vector = next(v for v in (16, 8, 4) if rows % _registers.row_layout_height(columns, v) == 0)
    return _registers.row_layout(columns, vector)
