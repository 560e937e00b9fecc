"""Arithmetic by thread that Mosaic GPU has no name for: a gather, a rotation of pairs, a transposition in registers.

Each function has two bodies of one meaning: Mosaic's registers, and plain jnp for the interpreter, which knows no
inline code. Private names of Mosaic live here, as in `_registers`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._registers import mosaic, row_layout, tiled_layout


class Lanes(NamedTuple):
    """Who holds what of a tile f32 [rows, dim], of its pairs' tables [rows, dim / 2], and of its transpose."""

    tile: Any
    pairs: Any
    transpose: Any  # [dim, 4 * rows], of four tiles; None where rows are stored as they are


@cache
def rows(dim: int, vector: int) -> Lanes:
    """A thread holds `vector` channels and its neighbour the next ones, so that warps load and store whole rows."""
    return Lanes(row_layout(dim, vector), row_layout(dim // 2, vector // 2), None)


@cache
def columns() -> Lanes:
    """A thread holds 2 channels of one row, and so of four tiles the 2 x 4 values that are words of their transpose."""

    def layout(vector: int) -> Any:
        return tiled_layout(((16, 8 * vector), (4, 8 * vector), (vector,)), (-5,), (-3, -2))

    return Lanes(layout(2), layout(1), tiled_layout(((16, 64), (16, 16), (2, 4)), (-5,), (-3, -4)))


def take(source: Any, index: jax.Array, layout: Any, *, interpreted: bool, again: bool = False) -> jax.Array:
    """source[index], the source a reference [n] in device memory; nothing checks the index here.

    The elements a thread holds side by side must be neighbours in the source: it loads them at once. again: after a
    store the compiler must load the same element anew, and does not keep it.
    """
    if interpreted:
        return source[...].at[index].get(mode="fill")  # NaN or the smallest integer where out of range

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    plgpu = mosaic()
    signed = True if jnp.issubdtype(source.dtype, jnp.integer) else None

    def load(ctx: Any, source: Any, index: Any) -> Any:
        i64 = ir.IntegerType.get_signless(64)
        element = ir.MemRefType(source.type).element_type
        vector = index.layout.registers_element_type(element)
        size = index.layout.vector_length * mgpu.bitwidth(element) // 8
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.memref_ptr(source))
        registers = np.empty(index.registers.shape, dtype=object)
        for place, first in np.ndenumerate(index.registers):
            address = mgpu.getelementptr(pointer, [arith.extsi(i64, _element(first, 0))], element)
            registers[place] = llvm.load(vector, address, alignment=min(size, 16), invariant=not again)
        return fa.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=signed)

    out = plgpu.ShapeDtypeStruct(index.shape, source.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=out)
    return inline(load)(source, index)


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, lanes: Lanes, *, interpreted: bool) -> jax.Array:
    """x f32 [rows, dim] with each pair (x[2i], x[2i + 1]) turned; cos, sin f32 [rows, dim / 2]."""
    if interpreted:
        even, odd = x[:, 0::2], x[:, 1::2]
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir.dialects import arith, math, vector

    plgpu = mosaic()

    def turn(ctx: Any, x: Any, cos: Any, sin: Any) -> Any:
        registers = np.empty(x.registers.shape, dtype=object)
        flat = zip(x.registers.flat, cos.registers.flat, sin.registers.flat, strict=True)
        for place, (pairs, c, s) in enumerate(flat):
            turned = []
            for i in range(cos.layout.vector_length):
                even, odd = _element(pairs, 2 * i), _element(pairs, 2 * i + 1)
                ci, si = _element(c, i), _element(s, i)
                turned.append(math.fma(arith.negf(odd), si, arith.mulf(even, ci)))  # no contraction unless asked
                turned.append(math.fma(odd, ci, arith.mulf(even, si)))
            registers.flat[place] = vector.from_elements(pairs.type, turned)
        return fa.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    out = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=lanes.tile)
    inline: Any = plgpu.inline_mgpu(arg_types=(lanes.tile, lanes.pairs, lanes.pairs), return_type=out)
    return inline(turn)(x, cos, sin)


def transposed(tiles: Sequence[jax.Array], *, interpreted: bool) -> jax.Array:
    """Four tiles f32 [rows, dim] of `columns` -> [dim, 4 * rows] whose column 4r + s is row r of tile s.

    No value changes its thread, and no instruction is spent: registers get other names.
    """
    if interpreted:
        return jnp.stack(tuple(tiles), axis=1).reshape(-1, tiles[0].shape[1]).T

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    plgpu, lanes = mosaic(), columns()
    height, dim = tiles[0].shape

    def rename(ctx: Any, *tiles: Any) -> Any:
        four = ir.VectorType.get((4,), ir.F32Type.get())
        layout = lanes.transpose.to_mgpu()
        registers = np.empty(layout.registers_shape((dim, 4 * height)), dtype=object)
        down, across = height // 16, dim // 16
        sources = [tile.registers.reshape(down, across) for tile in tiles]
        target = registers.reshape(across, down, 2)
        for i, j, channel in np.ndindex(across, down, 2):
            target[i, j, channel] = vector.from_elements(four, [_element(s[j, i], channel) for s in sources])
        return fa.FragmentedArray(_registers=target.reshape(registers.shape), _layout=layout, _is_signed=None)

    out = plgpu.ShapeDtypeStruct((dim, 4 * height), jnp.float32, layout=lanes.transpose)
    inline: Any = plgpu.inline_mgpu(arg_types=(lanes.tile,) * 4, return_type=out)
    return inline(rename)(*tiles)


def halved(x: jax.Array, layout: Any, *, interpreted: bool) -> jax.Array:
    """x int32 [rows, columns], its values in the low four bits -> int8 [rows, columns / 2], the first in the low half.

    `layout`: of x, who holds at least two columns side by side.
    """
    if interpreted:
        return ((x[:, 0::2] & 15) | (x[:, 1::2] << 4)).astype(jnp.int8)

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    plgpu, half = mosaic(), half_layout(layout)

    def join(ctx: Any, x: Any) -> Any:
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        low, four = (arith.constant(i32, ir.IntegerAttr.get(i32, value)) for value in (15, 4))
        target = half.to_mgpu()
        registers = np.empty(x.registers.shape, dtype=object)
        for place, register in np.ndenumerate(x.registers):
            pairs = []
            for i in range(target.vector_length):
                first, second = _element(register, 2 * i), _element(register, 2 * i + 1)
                pairs.append(arith.trunci(i8, arith.ori(arith.andi(first, low), arith.shli(second, four))))
            registers[place] = vector.from_elements(ir.VectorType.get((len(pairs),), i8), pairs)
        return fa.FragmentedArray(_registers=registers, _layout=target, _is_signed=True)

    out = plgpu.ShapeDtypeStruct((x.shape[0], x.shape[1] // 2), jnp.int8, layout=half)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    return inline(join)(x)


def half_layout(layout: Any) -> Any:
    """The layout in which a thread's pairs of neighbouring columns are one column each: half as wide."""
    whole = layout.to_mgpu()
    tiles = tuple((*tile[:-1], tile[-1] // 2) for tile in whole.tiling.tiles)
    return tiled_layout(tiles, whole.warp_dims, whole.lane_dims)


def _element(register: Any, place: int) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([place]))


@cache
def quads(vector: int) -> Lanes:
    """Four threads share a row of 32, each with `vector` channels side by side: half of the rows of wgmma's sums."""

    def layout(vector: int) -> Any:
        return tiled_layout(((32, 4 * vector), (8, 4 * vector), (vector,)), (-5,), (-3, -2))

    return Lanes(layout(vector), layout(vector // 2), None)


def for_quads(x: jax.Array, vector: int) -> jax.Array:
    """The last axis as a right operand's columns, so that wgmma's sums have `vector` channels side by side in a thread.

    Thread t of four holds columns 2t and 2t + 1 of each 8: column 2t + i of eight j is channel 2j + i of the thread.
    """
    fours = x.reshape(*x.shape[:-1], -1, 4, vector // 2, 2)
    return jnp.swapaxes(fours, -3, -2).reshape(x.shape)


def by_quad(sums: jax.Array, half: int, vector: int, *, interpreted: bool) -> jax.Array:
    """f32 [64, columns] as wgmma leaves it, its columns as of `for_quads` -> [32, columns] as `quads` holds them.

    Rows 8 half .. 8 half + 7 of each 16, channels in order. No value changes its thread, and no instruction is spent:
    registers get other names.
    """
    if interpreted:
        rows = sums.reshape(4, 2, 8, -1)[:, half]
        fours = rows.reshape(32, -1, vector // 2, 4, 2)
        return jnp.swapaxes(fours, -3, -2).reshape(32, sums.shape[1])

    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector as vectors

    plgpu, lanes, shape = mosaic(), quads(vector), (32, sums.shape[1])

    def rename(ctx: Any, sums: Any) -> Any:
        layout = lanes.tile.to_mgpu()
        source = sums.registers.reshape(-1, 2)[:, half]  # each has two columns
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        several = ir.VectorType.get((vector,), ir.F32Type.get())
        for place in range(registers.size):
            own = range(place * vector, (place + 1) * vector)
            registers.flat[place] = vectors.from_elements(several, [_element(source[n // 2], n % 2) for n in own])
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=lanes.tile)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=out)
    return inline(rename)(sums)


def put(target: Any, first: jax.Array, values: jax.Array, lanes: Lanes, *, interpreted: bool) -> None:
    """target[first[r] : first[r] + columns] = values[r] for each row r whose `first` is not negative.

    target: a reference [n] in device memory; first int32 [32]; values [32, columns] as `quads` holds them, a multiple
    of 4 bytes a thread, or [32], one for each row.
    """
    from jax.experimental import pallas as pl

    if interpreted:

        def row(r: Any, _: None) -> None:
            place = pl.ds(first[r], values.shape[1]) if values.ndim == 2 else first[r]

            def write() -> None:
                target[place] = values[r]

            pl.when(first[r] >= 0)(write)

        return lax.fori_loop(0, values.shape[0], row, None)

    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    plgpu = mosaic()

    def store(ctx: Any, target: Any, first: Any, values: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        # As an integer: LLVM has no eight-bit floats to count addresses by.
        element = ir.IntegerType.get_signless(mgpu.bitwidth(ir.MemRefType(target.type).element_type))
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.memref_ptr(target))

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        vector = values.layout.vector_length
        own = arith.muli(arith.remui(mgpu.thread_idx(), constant(4)), constant(vector))
        size = vector * mgpu.bitwidth(element) // 8
        (where,) = first.registers.flat
        start = _element(where, 0)
        inside = arith.cmpi(arith.CmpIPredicate.sge, start, constant(0))
        start = arith.addi(start, own) if len(values.shape) == 2 else start
        with ir.InsertionPoint(scf.IfOp(inside).then_block):
            for m, register in enumerate(values.registers.flat):
                place = arith.addi(start, constant(4 * vector * m))
                address = mgpu.getelementptr(pointer, [arith.extsi(i64, place)], element)
                words = mgpu.bitcast(register, ir.VectorType.get((size // 4,), i32))
                llvm.store(words, address, alignment=min(size, 16))
            scf.yield_([])

    row = lanes.tile.reduce(1)
    kinds = (plgpu.RefType(), row, lanes.tile if values.ndim == 2 else row)
    inline: Any = plgpu.inline_mgpu(arg_types=kinds)
    inline(store)(target, first, values)
