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


def tiled_layout(tiles: tuple[tuple[int, ...], ...], warps: tuple[int, ...], lanes: tuple[int, ...]) -> Any:
    """Who holds what: Mosaic's layout of these tiles, its vectors along the last dimension."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    layout = fa.TiledLayout(
        fa.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1, _check_canonical=False
    ).canonicalize()
    return mosaic().Layout.TILED(
        layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
    )


def row_layout(columns: int, vector: int) -> Any:
    """A thread holds `vector` columns and its neighbour the next ones, so that warps load and store whole rows."""
    height = row_layout_height(columns, vector)
    width = 128 // height * vector
    return tiled_layout(((height, width), (height // 4, width), (vector,)), (-5,), (-3, -2))


def row_layout_height(columns: int, vector: int) -> int:
    """Rows that the 128 threads of `row_layout` hold at once."""
    across = 1
    while across < 32 and columns // vector % (2 * across) == 0:
        across *= 2
    return 128 // across


def key_major(v: jax.Array, block: int, *, permuted: bool) -> jax.Array:
    """v [B, H, N, D] -> [B, H, D, N up to whole blocks]; `permuted`: keys by KEY_ORDER inside each 16.

    wgmma wants the keys of an 8-bit right operand contiguous.
    """
    batch, heads, tokens, dim = v.shape
    v = jnp.pad(v, ((0, 0), (0, 0), (0, -tokens % block), (0, 0)))
    if permuted:
        v = v.reshape(batch, heads, -1, 16, dim)[:, :, :, jnp.asarray(KEY_ORDER)].reshape(batch, heads, -1, dim)
    return jnp.swapaxes(v, 2, 3)


def fence() -> None:
    """One instruction, no wait for others: what a thread read of shared memory stays before later bulk copies to it."""
    from jaxlib.mlir.dialects import nvvm

    def between_proxies(ctx: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    inline: Any = mosaic().inline_mgpu()
    inline(between_proxies)()


def pack(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 MAGIC + integer in [0, 127], accumulator's layout -> (int8 in the left operand's, keys by KEY_ORDER; sums).

    No value changes its thread: the low bytes of four scores become one register. Sums, f32 [rows, 8]: a row of them
    adds up to the row's integers; four bytes are added by one instruction.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    plgpu = mosaic()
    rows, columns = p.shape
    sums = plgpu.ShapeDtypeStruct((rows, 8), jnp.float32, layout=plgpu.Layout.WGMMA)
    out = plgpu.ShapeDtypeStruct((rows, columns), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    def packed(ctx: Any, p: Any) -> Any:
        i32, i8, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), ir.F32Type.get()
        registers = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(p.shape), dtype=object)
        source = p.registers.reshape(p.registers.shape[0], p.registers.shape[1], -1)
        target = registers.reshape(registers.shape[0], registers.shape[1], -1)

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def bits(pair: Any, element: int) -> Any:
            place = ir.DenseI64ArrayAttr.get([element])
            return arith.bitcast(i32, vector.extract(pair, dynamic_position=[], static_position=place))

        def bytes_of(low: Any, high: Any, chosen: int) -> Any:
            return mgpu.prmt(low, high, constant(chosen))

        def plus_bytes(total: Any, four: Any) -> Any:
            return llvm.inline_asm(
                i32, [four, constant(0x01010101), total], "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", asm_dialect=0
            )

        totals = [constant(MAGIC_BITS)] * target.shape[2]
        for sixteen in range(target.shape[1]):
            for half in range(target.shape[2]):  # of the rows that a thread holds
                left, right = source[0, 2 * sixteen, half], source[0, 2 * sixteen + 1, half]
                low = bytes_of(bits(left, 0), bits(left, 1), 0x0040)
                high = bytes_of(bits(right, 0), bits(right, 1), 0x0040)
                four = bytes_of(low, high, 0x5410)
                totals[half] = plus_bytes(totals[half], four)
                target[0, sixteen, half] = mgpu.bitcast(four, ir.VectorType.get((4,), i8))
        sums = np.empty(fa.WGMMA_LAYOUT.registers_shape((rows, 8)), dtype=object)
        for half, total in enumerate(totals):
            pair = [arith.bitcast(f32, x) for x in (total, constant(MAGIC_BITS))]
            sums.reshape(-1)[half] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        biased = fa.FragmentedArray(_registers=sums, _layout=fa.WGMMA_LAYOUT, _is_signed=None)
        whole = fa.FragmentedArray(
            _registers=target.reshape(registers.shape), _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True
        )
        return whole, biased

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(out, sums))
    whole, biased = inline(packed)(p)
    return whole, biased - MAGIC


def rescaled(arrays: tuple[jax.Array, ...], old: jax.Array, new: jax.Array) -> tuple[jax.Array, ...]:
    """Each of `arrays` ([64, columns] or [64], accumulator's layout) times 2^(old - new) by row; old, new f32 [64].

    Skipped by a warp in which old is new: the same bits as the product, of int32 rounded to nearest.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf, vector

    plgpu = mosaic()

    def branch(ctx: Any, *operands: Any) -> Any:
        *arrays, old, new = operands
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def elements(register: Any) -> list[Any]:
            places = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
            return [vector.extract(register, dynamic_position=[], static_position=place) for place in places]

        def rounded(register: Any) -> Any:
            whole = [
                llvm.inline_asm(i32, [e], "cvt.rni.s32.f32 $0, $1;", "=r,f", asm_dialect=0) for e in elements(register)
            ]
            return vector.from_elements(ir.VectorType.get((len(whole),), i32), whole)

        def scaled(array: Any, factor: Any) -> list[Any]:
            rows = factor.broadcast_in_dim(array.shape, (0,), array.layout) if len(array.shape) == 2 else factor
            if array.mlir_dtype == f32:
                return list((array * rows).registers.flat)
            return [rounded(register) for register in (array.astype(f32) * rows).registers.flat]

        pairs = [e for x in (old, new) for register in x.registers.flat for e in elements(register)]
        assert len(pairs) == 4, "a thread holds two rows"
        some = llvm.inline_asm(  # a vote of the warp; NaN is not equal
            i32,
            pairs,
            "{ .reg .pred p, q; setp.neu.f32 p, $1, $3; setp.neu.or.f32 p, $2, $4, p; "
            "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }",
            "=r,f,f,f,f",
            has_side_effects=True,
            asm_dialect=0,
        )
        zero = arith.constant(i32, ir.IntegerAttr.get(i32, 0))
        registers = [register for array in arrays for register in array.registers.flat]
        rises = arith.cmpi(arith.CmpIPredicate.ne, some, zero)
        chosen: Any = scf.IfOp(rises, [register.type for register in registers], has_else=True)
        with ir.InsertionPoint(chosen.then_block):
            factor = (old - new).exp2(approx=True)
            scf.yield_([register for array in arrays for register in scaled(array, factor)])
        with ir.InsertionPoint(chosen.else_block):
            scf.yield_(registers)
        results, out = list(chosen.results), []
        for array in arrays:
            own, results = results[: array.registers.size], results[array.registers.size :]
            out.append(
                fa.FragmentedArray(
                    _registers=np.array(own, dtype=object).reshape(array.registers.shape),
                    _layout=array.layout,
                    _is_signed=array.is_signed,
                )
            )
        return tuple(out)

    row = plgpu.Layout.WGMMA.reduce(1)
    layouts = tuple(plgpu.Layout.WGMMA if x.ndim == 2 else row for x in arrays)
    out = tuple(
        plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout) for x, layout in zip(arrays, layouts, strict=True)
    )
    inline: Any = plgpu.inline_mgpu(arg_types=(*layouts, row, row), return_type=out)
    return inline(branch)(*arrays, old, new)


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c, f32 [rows], rounded once."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    plgpu = mosaic()

    def fused(ctx: Any, a: Any, b: Any, c: Any) -> Any:
        f32, first = ir.F32Type.get(), ir.DenseI64ArrayAttr.get([0])
        registers = np.empty(a.registers.shape, dtype=object)
        for place in np.ndindex(registers.shape):
            row = [vector.extract(x.registers[place], dynamic_position=[], static_position=first) for x in (a, b, c)]
            once = llvm.inline_asm(f32, row, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", asm_dialect=0)
            registers[place] = vector.from_elements(ir.VectorType.get((1,), f32), [once])
        return fa.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    row = plgpu.Layout.WGMMA.reduce(1)
    out = plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=row)
    inline: Any = plgpu.inline_mgpu(arg_types=(row,) * 3, return_type=out)
    return inline(fused)(a, b, c)


def factors(scales: jax.Array) -> jax.Array:
    """Scales with next to nothing for 0, under which a key that is masked (-inf, or -2^120) would be a score of 0."""
    return jnp.where(scales == 0, 2.0**-40, scales)


def product_error(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c, f32, exact where c is a * b rounded and negative: what fma gives, in operations that the CPU has.

    Each factor in two halves whose products are exact (Dekker 1971), so that no contraction changes anything.
    """

    def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)
        return high, x - high

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return ((a_high * b_high + c) + a_high * b_low + a_low * b_high) + a_low * b_low


def first_columns(x: jax.Array, count: jax.Array, other: float) -> jax.Array:
    """x f32 or int32, accumulator's layout, with `other` past its first `count` columns; count f32 [rows], all alike.

    What a thread compares depends on `count` alone. Left to itself the compiler keeps every column's number in a
    register, all loop long.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    plgpu = mosaic()

    def masked(ctx: Any, x: Any, count: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def at(pair: Any, element: int) -> Any:
            place = ir.DenseI64ArrayAttr.get([element])
            return vector.extract(pair, dynamic_position=[], static_position=place)

        kind = x.mlir_dtype
        attribute = ir.IntegerAttr if isinstance(kind, ir.IntegerType) else ir.FloatAttr
        instead = arith.constant(kind, attribute.get(kind, other))
        # Thread t of four holds columns 2t and 2t + 1 of each 8.
        first = arith.muli(arith.remui(mgpu.thread_idx(), constant(4)), constant(2))
        left = arith.subi(arith.fptosi(i32, at(count.registers.flat[0], 0)), first)
        registers = x.registers.copy()
        eights = registers.reshape(registers.shape[0], registers.shape[1], -1)
        for _, eight, half in np.ndindex(eights.shape):
            pair = []
            for i in range(2):
                inside = arith.cmpi(arith.CmpIPredicate.sgt, left, constant(8 * eight + i))
                pair.append(arith.select(inside, at(eights[0, eight, half], i), instead))
            eights[0, eight, half] = vector.from_elements(ir.VectorType.get((2,), kind), pair)
        return fa.FragmentedArray(_registers=eights.reshape(registers.shape), _layout=x.layout, _is_signed=x.is_signed)

    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=out)
    return inline(masked)(x, count)
