"""Operands of `mma.sync` in registers: P from the scores' registers, 4-bit products, rows stored by address.

Mosaic GPU names none of it. Each function has two bodies of one meaning, as in `arrange/_lanes.py`: Mosaic's registers,
and plain jnp for the interpreter, which knows no inline code. Private names of Mosaic live here. A thread's scores and
the left operand's registers hold the same rows, so what P needs is a fixed order of V's keys, and no shuffle:

    width   one register holds       from the score columns (thread t of four)        keys repeat every
    bf16    positions 2t, 2t+1       2t, 2t+1                                         8
    int8    positions 4t .. 4t+3     2t, 2t+1 of two neighbouring 8s                  16
    int4    positions 8t .. 8t+7     2t, 2t+1 of four neighbouring 8s                 32
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._registers import LEVEL, mosaic

_EIGHTS = {"int8": 2, "int4": 4}  # score columns, in eights, that one register of the left operand holds


def key_order(width: str) -> tuple[int, ...]:
    """The keys at consecutive positions of the left operand: 16 of them for "int8", 32 for "int4"."""
    return tuple(8 * eight + 2 * t + e for t in range(4) for eight in range(_EIGHTS[width]) for e in range(2))


def packed(x: jax.Array) -> jax.Array:
    """int8 [..., 2n] on a 4-bit grid -> int8 [..., n], two to a byte, the first in the low half."""
    low, high = x[..., 0::2], x[..., 1::2]
    return (low & 15) | (high << 4)


def unpacked(x: jax.Array, *, unsigned: bool = False) -> jax.Array:
    """int8 [..., n] of two values each -> int8 [..., 2n]: what `packed` packed, in [-8, 7], or [0, 15] if unsigned."""
    low, high = (x & 15, (x >> 4) & 15) if unsigned else ((x << 4) >> 4, x >> 4)
    return jnp.stack([low, high], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])


def key_major(v: jax.Array, block: int, width: str) -> jax.Array:
    """v int8 [B, H, N, D] -> int8 [B, H, D, N up to whole blocks], keys by `key_order`; int4 packed.

    mma wants the keys of a right operand below 16 bits contiguous.
    """
    order = jnp.asarray(key_order(width))
    batch, heads, tokens, dim = v.shape
    v = jnp.pad(v, ((0, 0), (0, 0), (0, -tokens % block), (0, 0)))
    v = v.reshape(batch, heads, -1, len(order), dim)[:, :, :, order].reshape(batch, heads, -1, dim)
    v = jnp.swapaxes(v, 2, 3)
    return packed(v) if width == "int4" else v


# ---- in a kernel ----------------------------------------------------------------------------------------------------


def operand(parts: Sequence[jax.Array], width: str, dtype: Any, *, interpreted: bool) -> jax.Array:
    """P as the left operand of its product, [64, keys], from its parts f32 [64, some keys] in the accumulator's layout.

    width "bf16": of values, rounded to `dtype`. "int8", "int4": of numbers of LEVELs up to 127 or 15, rounded to whole
    ones as `_registers.pack` does, by `key_order`; int4 is [64, keys / 2] bytes. No value changes its thread.
    """
    rows, keys = parts[0].shape[0], sum(part.shape[1] for part in parts)
    if interpreted:
        whole = jnp.concatenate(parts, axis=1)
        if width == "bf16":
            return whole.astype(dtype)
        whole = jnp.round(whole / LEVEL).astype(jnp.int8)
        whole = whole.reshape(rows, -1, _EIGHTS[width], 4, 2).swapaxes(2, 3).reshape(rows, keys)  # by key_order
        return packed(whole) if width == "int4" else whole

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    plgpu = mosaic()
    columns = keys // 2 if width == "int4" else keys
    layout = plgpu.Layout.MMA_LHS(dtype)

    def pack(ctx: Any, *parts: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        # [row of the thread's two][eight] -> the pair of scores a thread holds
        pairs = np.concatenate([part.registers.reshape(-1, 2) for part in parts]).T

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def both(low: Any, high: Any, kind: str) -> Any:  # one instruction for two scores
            return llvm.inline_asm(i32, [high, low], f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "=r,f,f", asm_dialect=0)

        def word(four: list[Any]) -> Any:
            left, right = (both(four[i], four[i + 1], "f16") for i in (0, 2))
            return mgpu.prmt(left, right, constant(0x6420))

        if width == "bf16":
            kind = "f16" if dtype == jnp.float16 else "bf16"
            element = ir.F16Type.get() if kind == "f16" else ir.BF16Type.get()

            def register(pair: Any) -> Any:
                return mgpu.bitcast(both(_element(pair, 0), _element(pair, 1), kind), ir.VectorType.get((2,), element))

            words = [register(pairs[half, eight]) for eight in range(keys // 8) for half in range(2)]
        else:
            each = _EIGHTS[width]
            words = []
            for first in range(0, keys // 8, each):
                for half in range(2):
                    some = pairs[half, first : first + each]
                    if width == "int8":
                        four = word([_element(pair, e) for pair in some for e in range(2)])
                    else:
                        even, odd = (word([_element(pair, e) for pair in some]) for e in range(2))
                        four = arith.addi(arith.shli(odd, constant(4)), even)
                    words.append(mgpu.bitcast(four, ir.VectorType.get((4,), ir.IntegerType.get_signless(8))))
        target = layout.to_mgpu()
        registers = np.empty(target.registers_shape((rows, columns)), dtype=object)
        registers.flat[:] = words
        signed = None if width == "bf16" else True
        return fa.FragmentedArray(_registers=registers, _layout=target, _is_signed=signed)

    out = plgpu.ShapeDtypeStruct((rows, columns), dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * len(parts), return_type=out)
    return inline(pack)(*parts)


def product4(acc: jax.Array, a: jax.Array, b: jax.Array, *, unsigned: bool, interpreted: bool) -> jax.Array:
    """acc + a @ b, int32 [64, n], of 4-bit integers two to a byte: a int8 [64, k / 2], b int8 [k / 2, n].

    b is signed, a is or is not. The bytes of an 8-bit operand lie in the registers in which a 4-bit one wants its
    halves, so the same load serves both. Mosaic's own `plgpu.mma` takes operands of one sign only, hence not that.
    """
    plgpu = mosaic()
    if interpreted:
        return plgpu.mma(acc, unpacked(a, unsigned=unsigned), unpacked(b.T).T)

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jax.experimental.mosaic.gpu.mma import MMALayouts, mma
    from jaxlib.mlir import ir

    def multiply(ctx: Any, acc: Any, a: Any, b: Any) -> Any:
        i4 = ir.IntegerType.get_signless(4)
        layouts = MMALayouts(i4)

        def halves(x: Any, shape: tuple[int, int], layout: Any, signed: bool) -> Any:
            registers = np.empty(layout.registers_shape(shape), dtype=object)
            registers.flat[:] = [mgpu.bitcast(register, ir.VectorType.get((8,), i4)) for register in x.registers.flat]
            return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

        left = halves(a, (a.shape[0], 2 * a.shape[1]), layouts.lhs, not unsigned)
        return mma(acc, left, halves(b, (2 * b.shape[0], b.shape[1]), layouts.rhs, True))

    eight = jnp.dtype(jnp.int8)
    layout = plgpu.Layout
    out = plgpu.ShapeDtypeStruct(acc.shape, jnp.int32, layout=layout.WGMMA)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout.WGMMA, layout.MMA_LHS(eight), layout.MMA_RHS(eight)), return_type=out
    )
    return inline(multiply)(acc, a, b)


def meet() -> None:
    """All threads of a program wait for each other. Not in the interpreter, which wants a barrier with a name."""
    from jaxlib.mlir.dialects import gpu

    def wait(ctx: Any) -> None:
        gpu.barrier()

    inline: Any = mosaic().inline_mgpu()
    inline(wait)()


def scatter(target: Any, x: jax.Array, place: jax.Array, first: int = 0, *, interpreted: bool) -> None:
    """target[place[r], first:first + columns] = x[r], for each row r whose place is not negative.

    target: a reference in device memory of any shape whose last axis is x's columns and others, its rows numbered
    through; x [64, columns] in the accumulator's layout, or [64] with a target of numbers; place int32 [64].
    """
    wide = x.ndim == 2
    x = x.astype(target.dtype)
    if interpreted:
        from jax.experimental import pallas as pl

        lead = target.shape[:-1] if wide else target.shape

        def row(r: Any, _: Any) -> None:
            index = jnp.unravel_index(jnp.maximum(place[r], 0), lead)

            @pl.when(place[r] >= 0)
            def _() -> None:
                if wide:
                    target[(*index, pl.ds(first, x.shape[1]))] = x[r]
                else:
                    target[index] = x[r]

        jax.lax.fori_loop(0, x.shape[0], row, None)
        return

    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    plgpu = mosaic()
    stride = target.shape[-1] if wide else 1

    def store(ctx: Any, target: Any, x: Any, place: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        element = ir.MemRefType(target.type).element_type
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.memref_ptr(target))

        def constant(kind: Any, value: int) -> Any:
            return arith.constant(kind, ir.IntegerAttr.get(kind, value))

        column = arith.muli(arith.remui(mgpu.thread_idx(), constant(i32, 4)), constant(i32, 2))
        registers = x.registers.reshape(-1, 2)  # of the rows that a thread holds
        for half, number in enumerate(place.registers.flat):
            row = _element(number, 0)
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, row, constant(i32, 0))):
                start = arith.muli(arith.extsi(i64, row), constant(i64, stride))
                if wide:
                    start = arith.addi(start, arith.extsi(i64, column))
                for eight, value in enumerate(registers[:, half]):
                    at = arith.addi(start, constant(i64, first + 8 * eight)) if wide else start
                    llvm.store(value if wide else _element(value, 0), mgpu.getelementptr(pointer, [at], element))

    layout = plgpu.Layout.WGMMA if wide else plgpu.Layout.WGMMA.reduce(1)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.Layout.WGMMA.reduce(1)))
    inline(store)(target, x, place)


def _element(register: Any, place: int) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([place]))
