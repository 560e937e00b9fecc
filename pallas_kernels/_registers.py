"""Arithmetic that Mosaic GPU has no name for: P from the scores' registers to those of the next product's left operand.

Private names of Mosaic live here: registers are what they are about.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._interpret import interpreted_device

# 1.5 * 2^23: an integer below 2^22 in magnitude added to these bits reads, as float32, as MAGIC plus the integer.
MAGIC = 12582912.0
MAGIC_BITS = 0x4B400000

# A float16 below the normal ones is a whole number of these, and its bits are that number.
LEVEL = 2.0**-24

# 2^x for |x| <= 1/2, lowest power first: the cubic of least relative error, 7.5e-5 (Remez).
_CUBIC = (0.99992806, 0.69326109, 0.24261133, 0.05517132)
_LEAST = -120.0  # an exponent whose power is 0 in levels, and not yet below the normal numbers

SLACK = 8.0  # halvings that a maximum may rise before an output is rescaled: its weights then reach 2^8

# The keys at 16 positions of the left operand: thread t of four holds scores 2t, 2t+1, 8+2t, 8+2t+1 and packs 4t..4t+3.
KEY_ORDER = tuple(key for t in range(4) for key in (2 * t, 2 * t + 1, 8 + 2 * t, 8 + 2 * t + 1))


def mosaic() -> Any:
    """Mosaic GPU, imported on first use (half a second). Untyped: its annotations do not describe what it does."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def store(ref: Any, value: jax.Array, layout: Any = None, tiling: tuple[int, ...] = ()) -> None:
    """ref[...] = value, whatever the layout: some that are needed here have bank conflicts, which Mosaic wants said.

    layout: value's; tiling: the reference's, of whole rows; what jax before 0.12, which cannot be told, needs to know.
    """
    plgpu = mosaic()
    if hasattr(plgpu, "store"):  # jax 0.12
        plgpu.store(ref, value, optimized=False)
    elif layout is None or interpreted_device() is not None:
        ref[...] = value
    else:
        from jax.experimental.mosaic.gpu import utils as mgpu

        def put(ctx: Any, ref: Any, value: Any) -> None:
            value.store_untiled(mgpu.memref_reshape(ref, value.shape), optimized=False)

        transforms = (plgpu.TilingTransform(tiling),) if tiling else ()
        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), layout))
        inline(put)(ref, value)


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


def key_major(v: jax.Array, block: int, *, permuted: bool = True) -> jax.Array:
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


def pack(p: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """P f32, accumulator's layout -> (P rounded to `dtype`, in the left operand's layout, keys by KEY_ORDER; its sums).

    dtype int8: p is numbers of LEVELs, at most 127. A float16 below 2^-14 is a whole number of LEVELs whose bits are
    that number: one instruction rounds two scores to integers and puts them side by side. float8_e4m3fn: p itself.
    No value changes its thread. Sums, f32 [rows], are each thread's own: a row's four differ until `over_threads`.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    plgpu = mosaic()
    integer = dtype == jnp.int8
    (rows, columns), row = p.shape, plgpu.Layout.WGMMA.reduce(1)
    out = plgpu.ShapeDtypeStruct((rows, columns), dtype, layout=plgpu.Layout.WGMMA_8BIT)

    def four_integers(four: list[Any], total: Any) -> tuple[Any, Any]:
        i32 = ir.IntegerType.get_signless(32)

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        halves = [
            llvm.inline_asm(i32, [high, low], "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", asm_dialect=0)
            for low, high in (four[:2], four[2:])
        ]
        word = mgpu.prmt(halves[0], halves[1], constant(0x6420))
        start = constant(MAGIC_BITS) if total is None else total
        return word, llvm.inline_asm(
            i32, [word, constant(0x01010101), start], "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", asm_dialect=0
        )

    def four_floats(four: list[Any], total: Any) -> tuple[Any, Any]:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        word = llvm.inline_asm(
            i32, four,
            "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
            "mov.b32 $0, {a, b}; }",
            "=r,f,f,f,f", asm_dialect=0,
        )  # fmt: skip
        back = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * 4), [word],
            "{ .reg .b16 a, b, w, x, y, z; .reg .b32 c, d; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 c, a; "
            "cvt.rn.f16x2.e4m3x2 d, b; mov.b32 {w, x}, c; mov.b32 {y, z}, d; cvt.f32.f16 $0, w; cvt.f32.f16 $1, x; "
            "cvt.f32.f16 $2, y; cvt.f32.f16 $3, z; }",
            "=f,=f,=f,=f,r", asm_dialect=0,
        )  # fmt: skip
        for place in range(4):
            number = llvm.extractvalue(f32, back, [place])
            total = number if total is None else arith.addf(total, number)
        return word, total

    def packed(ctx: Any, p: Any) -> Any:
        element = ir.IntegerType.get_signless(8) if integer else ir.Float8E4M3FNType.get()
        f32 = ir.F32Type.get()
        registers = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(p.shape), dtype=object)
        source = p.registers.reshape(p.registers.shape[0], p.registers.shape[1], -1)
        target = registers.reshape(registers.shape[0], registers.shape[1], -1)
        totals: list[Any] = [None] * target.shape[2]
        for sixteen in range(target.shape[1]):
            for half in range(target.shape[2]):  # of the rows that a thread holds
                four = [e for i in range(2) for e in _elements(source[0, 2 * sixteen + i, half])]
                word, totals[half] = (four_integers if integer else four_floats)(four, totals[half])
                target[0, sixteen, half] = mgpu.bitcast(word, ir.VectorType.get((4,), element))
        whole = fa.FragmentedArray(
            _registers=target.reshape(registers.shape),
            _layout=fa.WGMMA_LAYOUT_8BIT,
            _is_signed=True if integer else None,
        )
        return whole, _by_row(rows, [arith.bitcast(f32, total) if integer else total for total in totals])

    sums = plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=row)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(out, sums))
    whole, total = inline(packed)(p)
    return whole, total - MAGIC if integer else total


def over_threads(x: jax.Array, *, interpreted: bool) -> jax.Array:
    """Row sums f32 [rows] of `pack`, added over the four threads that share a row."""
    if interpreted:
        return x

    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir.dialects import arith

    def add(ctx: Any, x: Any) -> Any:
        sums = [_elements(register)[0] for register in x.registers.flat]
        for distance in (1, 2):
            sums = [arith.addf(one, mgpu.shfl_bfly(one, distance)) for one in sums]
        return _by_row(x.shape[0], sums)

    row = mosaic().Layout.WGMMA.reduce(1)
    inline: Any = mosaic().inline_mgpu(
        arg_types=(row,), return_type=mosaic().ShapeDtypeStruct(x.shape, x.dtype, layout=row)
    )
    return inline(add)(x)


def _by_row(rows: int, numbers: list[Any]) -> Any:
    """f32 [rows] of a thread's two numbers."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    kind = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.empty(fa.WGMMA_ROW_LAYOUT.registers_shape((rows,)), dtype=object)
    registers.flat[:] = [vector.from_elements(kind, [number]) for number in numbers]
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_ROW_LAYOUT, _is_signed=None)


def exp2(x: jax.Array, shared: int, *, interpreted: bool) -> jax.Array:
    """2^x, f32 [64, columns], accumulator's layout: of each thread's numbers `shared` (an even number) by a cubic.

    The unit of exponentials does 16 a clock, that of multiply-adds 128: a program that waits for the first gives the
    second some of its work (FlashAttention-4, arXiv 2603.05451). Evenly spread, so that neither waits for the other.
    """
    chosen = _spread(x.shape[1] // 4, shared // 2)
    if interpreted:
        column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        pair = column // 8 * 2 + column % 2
        cubic = jnp.zeros(x.shape, bool)
        for place in chosen:
            cubic = cubic | (pair == place)
        return jnp.where(cubic, exp2_cubic(x), jnp.exp2(x))
    if not chosen:
        return jnp.exp2(x)

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    def powers(ctx: Any, x: Any) -> Any:
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

        def constant(value: float) -> Any:
            return arith.constant(f32, ir.FloatAttr.get(f32, value))

        def fma(a: Any, b: Any, c: Any) -> Any:
            return llvm.inline_asm(f32, [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", asm_dialect=0)

        def cubic(x: Any) -> Any:
            x = arith.maximumf(x, constant(_LEAST))
            near = arith.addf(x, constant(MAGIC))
            x = arith.subf(x, arith.subf(near, constant(MAGIC)))
            power = constant(_CUBIC[3])
            for coefficient in _CUBIC[2::-1]:
                power = fma(power, x, constant(coefficient))
            halvings = arith.shli(arith.bitcast(i32, near), arith.constant(i32, ir.IntegerAttr.get(i32, 23)))
            return arith.bitcast(f32, arith.addi(arith.bitcast(i32, power), halvings))

        whole = x.exp2(approx=True)
        registers = whole.registers.copy()
        pairs, given = (a.reshape(a.shape[0], a.shape[1], -1) for a in (registers, x.registers))
        for place in chosen:
            eight, element = divmod(place, 2)
            for half in range(pairs.shape[2]):
                both = _elements(pairs[0, eight, half])
                both[element] = cubic(_elements(given[0, eight, half])[element])
                pairs[0, eight, half] = vector.from_elements(ir.VectorType.get((2,), f32), both)
        return fa.FragmentedArray(_registers=pairs.reshape(registers.shape), _layout=x.layout, _is_signed=None)

    layout = mosaic().Layout.WGMMA
    out = mosaic().ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
    inline: Any = mosaic().inline_mgpu(arg_types=(layout,), return_type=out)
    return inline(powers)(x)


def exp2_cubic(x: jax.Array) -> jax.Array:
    """2^x, f32, by a cubic of what x lacks to a whole number, whose power of two is added to the exponent's bits."""
    x = jnp.maximum(x, _LEAST)
    whole = jnp.round(x)
    x = x - whole
    power = ((_CUBIC[3] * x + _CUBIC[2]) * x + _CUBIC[1]) * x + _CUBIC[0]
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _spread(places: int, chosen: int) -> tuple[int, ...]:
    """So many of range(places), evenly spread."""
    return tuple((2 * i + 1) * places // (2 * chosen) for i in range(chosen))


def rescaled(
    arrays: tuple[jax.Array, ...], top: jax.Array, new: jax.Array, slack: float, *, interpreted: bool
) -> tuple[jax.Array, ...]:
    """(*arrays times 2^(top - larger) by row, larger), larger = max(top, new); where new is at most `slack` above top,
    (*arrays, top): what they are relative to need not be the maximum itself (FlashAttention-4, arXiv 2603.05451).

    arrays [64, columns] or [64], accumulator's layout, int32 rounded to nearest; top, new f32 [64]. A warp does one or
    the other for all its rows.
    """
    if interpreted:
        larger = jnp.where(new <= top + slack, top, jnp.maximum(top, new))
        fade = jnp.exp2(top - larger)
        scaled = [x.astype(jnp.float32) * (fade[:, None] if x.ndim == 2 else fade) for x in arrays]
        whole = [
            jnp.round(y).astype(x.dtype) if x.dtype == jnp.int32 else y for x, y in zip(arrays, scaled, strict=True)
        ]
        return (*whole, larger)

    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    def faded(arrays: list[Any], limit: Any, new: Any) -> list[Any]:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        *arrays, top = arrays
        larger = top.max(new)
        factor = (top - larger).exp2(approx=True)

        def rounded(register: Any) -> Any:
            whole = [
                llvm.inline_asm(i32, [e], "cvt.rni.s32.f32 $0, $1;", "=r,f", asm_dialect=0) for e in _elements(register)
            ]
            return vector.from_elements(ir.VectorType.get((len(whole),), i32), whole)

        def scaled(array: Any) -> list[Any]:
            rows = factor.broadcast_in_dim(array.shape, (0,), array.layout) if len(array.shape) == 2 else factor
            if array.mlir_dtype == f32:
                return list((array * rows).registers.flat)
            return [rounded(register) for register in (array.astype(f32) * rows).registers.flat]

        return [*(register for array in arrays for register in scaled(array)), *larger.registers.flat]

    # Unordered: a NaN is above everything, and stays; an integer P would hide it.
    vote = "setp.gtu.f32 p, $3, $1; setp.gtu.or.f32 p, $4, $2, p;"
    return _where_any(vote, faded, (*arrays, top), (top + slack, new))


def within_reach(
    s: jax.Array, top: jax.Array, size: jax.Array, far: float, *, interpreted: bool
) -> tuple[jax.Array, jax.Array]:
    """(s, top), or (s - top, 0) by row where |size| > far (in a warp, where any row's is): differences of what lies
    close are exact, where a product with them no longer is. s f32 [64, columns], top and size f32 [64].
    """
    if interpreted:
        beyond = jnp.abs(size) > far
        return jnp.where(beyond[:, None], s - top[:, None], s), jnp.where(beyond, 0.0, top)

    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    def differences(arrays: list[Any], _: Any) -> list[Any]:
        s, top = arrays
        less = s - top.broadcast_in_dim(s.shape, (0,), s.layout)
        kind = ir.VectorType.get((1,), ir.F32Type.get())
        zero = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(ir.F32Type.get(), 0.0)))
        return [*less.registers.flat, *[zero] * top.registers.size]

    bits = f"0f{np.float32(far).view(np.uint32):08X}"
    vote = (
        f"{{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; setp.gt.f32 p, a, {bits}; setp.gt.or.f32 p, b, {bits}, p; }}"
    )
    return _where_any(vote, differences, (s, top), (size,))


def _where_any(vote: str, then: Any, arrays: tuple[jax.Array, ...], rows: tuple[jax.Array, ...]) -> Any:
    """then(arrays, *rows)'s registers in warps where a thread's `vote` sets predicate p, else arrays as they are.

    vote: PTX over $1, $2, ..: a thread's two values of each of `rows`. arrays f32 or int32, [64, columns] or [64], in
    the accumulator's layout.
    """
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    plgpu = mosaic()

    def branch(ctx: Any, *operands: Any) -> Any:
        given, facts = operands[: len(arrays)], operands[len(arrays) :]
        i32 = ir.IntegerType.get_signless(32)
        pairs = [e for x in facts for register in x.registers.flat for e in _elements(register)]
        assert len(pairs) == 2 * len(facts), "a thread holds two rows"
        some = llvm.inline_asm(
            i32,
            pairs,
            f"{{ .reg .pred p, q; {vote} vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }}",
            ",".join(["=r", *"f" * len(pairs)]),
            has_side_effects=True,
            asm_dialect=0,
        )
        zero = arith.constant(i32, ir.IntegerAttr.get(i32, 0))
        registers = [register for array in given for register in array.registers.flat]
        any_does = arith.cmpi(arith.CmpIPredicate.ne, some, zero)
        chosen: Any = scf.IfOp(any_does, [register.type for register in registers], has_else=True)
        with ir.InsertionPoint(chosen.then_block):
            scf.yield_(then(list(given), *facts))
        with ir.InsertionPoint(chosen.else_block):
            scf.yield_(registers)
        results, out = list(chosen.results), []
        for array in given:
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
    inline: Any = plgpu.inline_mgpu(arg_types=(*layouts, *(row for _ in rows)), return_type=out)
    return inline(branch)(*arrays, *rows)


def _elements(register: Any) -> list[Any]:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    places = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
    return [vector.extract(register, dynamic_position=[], static_position=place) for place in places]


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, interpreted: bool) -> jax.Array:
    """a * b + c, f32 [rows], rounded once."""
    if interpreted:  # the rest of the product and that of the sum (Knuth's two-sum), exact both
        rest = product_error(a, b, -(a * b))
        whole = a * b + c
        back = whole - a * b
        return whole + (((a * b - (whole - back)) + (c - back)) + rest)

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
