"""Arithmetic that Mosaic GPU has no name for: P from the scores' registers to those of the next product's left operand.

Private names of Mosaic live here: registers are what they are about.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# 1.5 * 2^23: an integer below 2^22 in magnitude added to these bits reads, as float32, as MAGIC plus the integer.
MAGIC = 12582912.0
MAGIC_BITS = 0x4B400000

# The keys at 16 positions of the left operand: thread t of four holds scores 2t, 2t+1, 8+2t, 8+2t+1 and packs 4t..4t+3.
KEY_ORDER = tuple(key for t in range(4) for key in (2 * t, 2 * t + 1, 8 + 2 * t, 8 + 2 * t + 1))


def mosaic() -> Any:
    """Mosaic GPU, imported on first use (half a second). Untyped: its annotations do not describe what it does."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def key_major(v: jax.Array, block: int, *, permuted: bool) -> jax.Array:
    """v [B, H, N, D] -> [B, H, D, N up to whole blocks]; `permuted`: keys by KEY_ORDER inside each 16.

    wgmma wants the keys of an 8-bit right operand contiguous.
    """
    batch, heads, tokens, dim = v.shape
    v = jnp.pad(v, ((0, 0), (0, 0), (0, -tokens % block), (0, 0)))
    if permuted:
        v = v.reshape(batch, heads, -1, 16, dim)[:, :, :, jnp.asarray(KEY_ORDER)].reshape(batch, heads, -1, dim)
    return jnp.swapaxes(v, 2, 3)


def pack(p: jax.Array) -> jax.Array:
    """f32 MAGIC + integer in the accumulator's layout -> int8 in the left operand's, keys by KEY_ORDER.

    No value changes its thread: the low bytes of four scores become one register.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    plgpu = mosaic()
    out = plgpu.ShapeDtypeStruct(p.shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    def packed(ctx: Any, p: Any) -> Any:
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        registers = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(p.shape), dtype=object)
        source = p.registers.reshape(p.registers.shape[0], p.registers.shape[1], -1)
        target = registers.reshape(registers.shape[0], registers.shape[1], -1)

        def bits(pair: Any, element: int) -> Any:
            place = ir.DenseI64ArrayAttr.get([element])
            return arith.bitcast(i32, vector.extract(pair, dynamic_position=[], static_position=place))

        def bytes_of(low: Any, high: Any, chosen: int) -> Any:
            return mgpu.prmt(low, high, arith.constant(i32, ir.IntegerAttr.get(i32, chosen)))

        for sixteen in range(target.shape[1]):
            for half in range(2):  # of the rows that a thread holds
                left, right = source[0, 2 * sixteen, half], source[0, 2 * sixteen + 1, half]
                low = bytes_of(bits(left, 0), bits(left, 1), 0x0040)
                high = bytes_of(bits(right, 0), bits(right, 1), 0x0040)
                four = bytes_of(low, high, 0x5410)
                target[0, sixteen, half] = mgpu.bitcast(four, ir.VectorType.get((4,), i8))
        return fa.FragmentedArray(
            _registers=target.reshape(registers.shape), _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True
        )

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=out)
    return inline(packed)(p)
