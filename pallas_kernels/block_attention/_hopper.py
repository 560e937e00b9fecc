"""The Hopper kernel itself: one warpgroup that fetches, two that multiply. `hopper.py` says what it is about.

Words: a row of the mask is a query block with its list of kept key blocks; a step is one key block of a list, or half
of one; an item is what a program does between two draws: 128 query tokens, one row or two.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _packed, _registers
from pallas_kernels._check import WIDTHS
from pallas_kernels._registers import LEVEL, MAGIC, MAGIC_BITS, SLACK
from pallas_kernels.block_attention import _work

ROWS = 64  # query tokens of one consumer warpgroup: the M of wgmma
_SUMMED_KEYS = (2**31 - 1) // 127**2  # what an int32 sum of P @ V has room for
FAR = 2.0**13  # of a score in log2 units: beyond, its float32 is too coarse to subtract others from
_NOBODYS, _NO_MORE = -1, -2  # instead of a number of steps: a list without a query block, no item any more
_MASKED_BITS = -0x4800000  # of -2^120, as an int32: a score that gives P = 0 at any factor above 2^-112
_LEAST = MAGIC - 2.0**22  # below every integer score beside MAGIC
_LOWEST = -3.4028235e38  # a maximum before the first score: finite, so that a masked score of -inf gives exp2(-inf) = 0


def lists(block: tuple[int, int]) -> int:
    """Lists of kept blocks a program walks: one for 128 rows, one for each consumer with 64."""
    return 2 * ROWS // block[0]


def out_channels(dim: int, size: int) -> int:
    """Channels of the output, of `size` bytes each, staged at once: their dtype, which why_not never sees, must fit."""
    return dim if dim < 128 else 128 // size


def _modulo(number: Any, ring: int) -> Any:
    """A number of steps, not negative, modulo a ring's length: of powers of two one instruction, if one says so."""
    if ring & (ring - 1) == 0:
        return number & (ring - 1)
    return lax.rem(number, jnp.array(ring, number.dtype))


@dataclass(frozen=True)
class Call:
    """One launch: its static facts, and the kernel's two halves as methods."""

    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    dim: int
    block: tuple[int, int]
    to_log2: float  # what a score is multiplied by beyond its scales
    qk: str
    pv: str
    p_scale: str
    out_dtype: Any
    tiles: Any  # hopper.Tiles
    qk_dtype: Any
    pv_dtype: Any
    packed: tuple[str, ...]  # which of "k" and "v" come two values to a byte
    interpreted: bool

    @property
    def integer_scores(self) -> bool:
        return self.qk in ("int8", "int4")

    @property
    def integer_p(self) -> bool:
        return self.pv in ("int8", "int4")

    @property
    def chunk(self) -> int:
        """Channels of one product: a rounded P's product needs registers beside the accumulator."""
        return self.dim if self.pv == "bf16" else min(self.dim, 128)

    @property
    def parts(self) -> int:
        """Steps per key block."""
        return self.block[1] // self.tiles.keys

    @property
    def width(self) -> int:
        """Channels of the output staged at once."""
        return out_channels(self.dim, jnp.dtype(self.out_dtype).itemsize)

    def run(self, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(o [B, Nq, H, dim], lse f32 [B, H, nq * bq] in kernel order)."""
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        nq, dim, keys = arrays["index"].shape[1], self.dim, self.tiles.keys
        walks, stages, width = lists(self.block), self.tiles.stages, self.width
        names = tuple(arrays)

        def tiled(shape, dtype):
            """Shared memory as wgmma reads it: tiles of 8 rows and as many bytes as the swizzle."""
            swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
            tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
            return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

        def plain(*shape, dtype=jnp.float32):
            return plgpu.SMEM(shape, dtype)

        ring, queries = walks * stages, self.tiles.queries
        v_shape = (ring, keys, dim) if self.pv == "bf16" else (ring, dim, keys)
        scratch = dict(
            drawn=plain(1, dtype=jnp.int32),
            item=plain(queries, 2 + 2 * walks, dtype=jnp.int32),  # its head, batch entry, query blocks and their steps
            q=tiled((2 * queries, ROWS, dim), self.qk_dtype),
            k=tiled((ring, keys, dim), self.qk_dtype),
            v=tiled(v_shape, self.pv_dtype),
            facts=plain(ring, 2),  # of a step's keys: their block's scale, and how many are real
            slots=plain(2 * queries, ROWS, dtype=jnp.int32),
            # Tiles of one row are plain rows: what the copies of single rows below need to be told.
            o=plgpu.SMEM((2, ROWS, width), self.out_dtype, transforms=(plgpu.TilingTransform((1, width)),)),
            lse=plain(2, ROWS),
        )
        two_to_a_byte = {"k": (ring, keys // 2, dim), "v": (ring, dim // 2, keys)}
        scratch |= {f"{name}_packed": tiled(two_to_a_byte[name], jnp.int8) for name in self.packed}
        if self.interpreted:  # which has no product of registers
            scratch["p"] = tiled((2, ROWS, keys), self.pv_dtype)
        if "q_row" in arrays:
            scratch["q_row"] = plain(2 * queries, ROWS)
        if "k_row" in arrays:
            scratch["k_row"] = plain(ring, keys)
        if "v_channel" in arrays:
            scratch["v_channel"] = plain(queries, dim)
        if "v_block" in arrays:
            scratch["v_block"] = plain(ring, dim)
        readers = 2 // walks
        barriers = dict(
            item=plgpu.Barrier(num_barriers=queries),
            item_free=plgpu.Barrier(num_arrivals=2, num_barriers=queries),
            q=plgpu.Barrier(num_arrivals=4 + 2 * ("q_row" in scratch) + ("v_channel" in scratch), num_barriers=queries),
            k=plgpu.Barrier(num_arrivals=1 + ("k" not in self.packed) + ("k_row" in scratch), num_barriers=ring),
            v=plgpu.Barrier(num_arrivals=1 + ("v_block" in scratch), num_barriers=ring),
            k_free=plgpu.Barrier(num_arrivals=readers, num_barriers=ring),
            v_free=plgpu.Barrier(num_arrivals=readers, num_barriers=ring),
            **{f"{name}_packed": plgpu.Barrier(num_barriers=ring) for name in self.packed},
        )

        def kernel(*refs):
            gmem = dict(zip(names, refs[: len(names)], strict=True)) | {"o": refs[-2], "lse": refs[-1]}

            def scoped(smem, bars):
                # One branch with two sides: after two branches the producer's registers would be kept in the first.
                consumes = lax.axis_index("wg") < 2
                lax.cond(consumes, lambda: self.consumer(gmem, smem, bars), lambda: self.producer(gmem, smem, bars))

            pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

        call = plgpu.kernel(
            kernel,
            out_type=(
                jax.ShapeDtypeStruct((self.batch, self.q_tokens, self.heads, dim), self.out_dtype),
                jax.ShapeDtypeStruct((self.batch, self.heads, nq * self.block[0]), jnp.float32),
            ),
            grid=(self.programs(arrays["items"]),),
            grid_names=("program",),
            num_threads=3,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )
        return call(*arrays.values())

    def programs(self, items: Any) -> int:
        return _work.programs(items.shape[0], interpreted=self.interpreted)

    def shape(self, gmem: dict) -> tuple[int, int]:
        """(query blocks, key blocks)"""
        return gmem["index"].shape[1:]

    def producer(self, gmem: dict, smem: dict, bars: dict) -> None:
        """Fetches K and V of each list's kept blocks, a ring of stages ahead of the consumers."""
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        plgpu.set_max_registers(40, action="decrease")
        (nq, nk), walks, programs = self.shape(gmem), lists(self.block), self.programs(gmem["items"])
        places, queries = -(-nq // walks), self.tiles.queries

        def draw(turn):
            """(head, batch entry, query blocks, steps) of this program's next item, which the consumers are told."""
            held = _modulo(turn, queries)
            pl.when(turn >= queries)(lambda: plgpu.barrier_wait(bars["item_free"].at[held]))
            number = _work.draw(gmem["counters"], smem["drawn"], turn, programs, interpreted=self.interpreted)
            items = gmem["items"].shape[0]
            code = gmem["items"][jnp.minimum(number, items - 1)]
            head, batch, place = (
                code // (places * self.batch),
                lax.rem(code // places, self.batch),
                lax.rem(code, places),
            )
            order = [place * walks + which for which in range(walks)]
            rows = tuple(gmem["rows"][head, jnp.minimum(n, nq - 1)] for n in order)
            steps = tuple(jnp.clip(gmem["count"][head, row], 0, nk) * self.parts for row in rows)
            # An odd number of lists leaves one over: nobody's.
            steps = tuple(jnp.where(n < nq, some, _NOBODYS) for n, some in zip(order, steps, strict=True))
            steps = tuple(jnp.where(number < items, some, _NO_MORE) for some in steps)
            for n, fact in enumerate((head, batch, *rows, *steps)):
                smem["item"][held, n] = fact
            plgpu.barrier_arrive(bars["item"].at[held])
            return head, batch, rows, steps

        def one(carry):
            turn, done, (head, batch, rows, steps) = carry
            steps = tuple(jnp.maximum(some, 0) for some in steps)
            self.feed(gmem, smem, bars, turn, done, head, batch, rows, steps)
            return turn + 1, tuple(a + b for a, b in zip(done, steps, strict=True)), draw(turn + 1)

        start = jnp.int32(0), (jnp.int32(0),) * walks, draw(jnp.int32(0))
        turns, steps, _ = lax.while_loop(lambda carry: carry[2][3][0] > _NO_MORE, one, start)
        _work.done(gmem["counters"], programs, interpreted=self.interpreted)

        # No barrier may be left with an arrival that nobody waited for.
        def drain(ring, names, first, step, _):
            slot = first + _modulo(step, ring)
            for name in names:
                plgpu.barrier_wait(bars[name].at[slot])

        stages = self.tiles.stages
        for which in range(walks):
            last = partial(drain, stages, ("k_free", "v_free"), which * stages)
            lax.fori_loop(jnp.maximum(steps[which] - stages, 0), steps[which], last, None)
        last = partial(drain, queries, ("item_free",), 0)
        lax.fori_loop(jnp.maximum(turns + 1 - queries, 0), turns, last, None)

    def feed(self, gmem: dict, smem: dict, bars: dict, turn, done, head, batch, rows, steps) -> None:
        """One item's queries, then K and V of its kept blocks. done: steps of each list before this item's."""
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        nk, walks = self.shape(gmem)[1], lists(self.block)
        stages, keys, parts, queries = self.tiles.stages, self.tiles.keys, self.parts, self.tiles.queries

        def listed(which, step):
            """The key block of a step, wherever the index points: clamped, so nothing outside K and V is ever read."""
            entry = jnp.minimum(step // parts, nk - 1) if parts > 1 else jnp.minimum(step, nk - 1)
            return jnp.clip(gmem["index"][head, rows[which], entry], 0, nk - 1)

        def copy(source, name, slot, barrier, number=None, mode=None):
            number = slot if number is None else number
            plgpu.copy_gmem_to_smem(source, smem[name].at[slot], bars[barrier].at[number], oob_mode=mode)

        small = partial(copy, mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        def unpack(name, slot, half):
            plgpu.barrier_wait(bars[f"{name}_packed"].at[slot])
            _packed.unpack(smem[f"{name}_packed"].at[slot], smem[name].at[slot], half, interpreted=self.interpreted)

        def place(which, step, block):
            """(stage, step's number among the parts of key blocks, its key tokens)"""
            slot = which * stages + _modulo(done[which] + step, stages)
            part = block * parts + _modulo(step, parts) if parts > 1 else block
            return slot, part, pl.ds(part * keys, keys)

        def fetch(which, step, block):
            """What is packed comes a ring of stages before its step: unpacking it frees its stage, no consumer."""
            slot, part, tokens = place(which, step, block)
            if "k" in self.packed:
                rows = pl.ds(part * (keys // 2), keys // 2)
                copy(gmem["k"].at[batch, head, rows], "k_packed", slot, "k_packed")
            if "v" in self.packed:
                copy(gmem["v"].at[batch, head, :, tokens], "v_packed", slot, "v_packed")

        def load(which, step, block):
            slot, part, tokens = place(which, step, block)
            scale = gmem["k_block"][batch, head, block] if "k_block" in gmem else 1.0
            again = done[which] + step >= stages
            pl.when(again)(lambda: plgpu.barrier_wait(bars["k_free"].at[slot]))
            if "k_row" in smem:
                small(gmem["k_row"].at[batch, head, tokens], "k_row", slot, "k")
            if "k" not in self.packed:
                copy(gmem["k"].at[batch, head, tokens], "k", slot, "k")
            # By ordinary stores, as they are read: what a bulk copy overwrites the consumers would have to fence.
            smem["facts"][slot, 0] = jnp.float32(scale)
            smem["facts"][slot, 1] = jnp.clip(self.kv_tokens - part * keys, 0, keys).astype(jnp.float32)
            if "k" in self.packed:
                unpack("k", slot, _packed.KEYS)
            plgpu.barrier_arrive(bars["k"].at[slot])
            pl.when(again)(lambda: plgpu.barrier_wait(bars["v_free"].at[slot]))
            if "v_block" in smem:
                small(gmem["v_block"].at[batch, head, block], "v_block", slot, "v")
            if "v" in self.packed:
                unpack("v", slot, self.dim // 2)
                plgpu.barrier_arrive(bars["v"].at[slot])
            elif self.pv == "bf16":
                copy(gmem["v"].at[batch, head, tokens], "v", slot, "v")
            else:
                copy(gmem["v"].at[batch, head, :, tokens], "v", slot, "v")

        held = _modulo(turn, queries)
        for half in range(2):
            tokens = pl.ds(self.first_token(rows, half), ROWS)
            copy(gmem["q"].at[batch, head, tokens], "q", 2 * held + half, "q", held)
            small(gmem["slots"].at[head, tokens], "slots", 2 * held + half, "q", held)
            if "q_row" in smem:
                small(gmem["q_row"].at[batch, head, tokens], "q_row", 2 * held + half, "q", held)
        if "v_channel" in smem:
            small(gmem["v_channel"].at[batch, head], "v_channel", held, "q")

        # The next entries are read before a step waits, so their latency is hidden.
        far = (0, stages) if self.packed else (0,)

        def advance(step, ahead):
            following = tuple([listed(which, step + 1 + more) for more in far] for which in range(walks))
            for which in range(walks):
                near, *further = ahead[which]
                pl.when(step < steps[which])(partial(load, which, step, near))
                for block in further:
                    pl.when(step + stages < steps[which])(partial(fetch, which, step + stages, block))
            return following

        for which in range(walks):
            for step in range(stages if self.packed else 0):
                step = jnp.int32(step)
                pl.when(step < steps[which])(lambda which=which, step=step: fetch(which, step, listed(which, step)))
        longest = steps[0] if walks == 1 else jnp.maximum(*steps)
        lax.fori_loop(
            0, longest, advance, tuple([listed(which, jnp.int32(more)) for more in far] for which in range(walks))
        )

    def first_token(self, rows: Any, half: int) -> Any:
        """Of 64 query tokens, of the query block that both consumers share or of each one's own."""
        return rows[half] * self.block[0] if len(rows) == 2 else rows[0] * self.block[0] + half * ROWS

    def consumer(self, gmem: dict, smem: dict, bars: dict) -> None:
        """Its half of one item after another, as the producer draws them."""
        plgpu = _registers.mosaic()
        plgpu.set_max_registers(232, action="increase")
        walks, wg = lists(self.block), lax.axis_index("wg")
        which = wg if walks == 2 else jnp.int32(0)

        def told(turn):
            """Steps of this program's turn-th item."""
            held = _modulo(turn, self.tiles.queries)
            plgpu.barrier_wait(bars["item"].at[held])
            return smem["item"][held, 2 + walks + which]

        def one(carry):
            turn, done, steps = carry
            done = self.attend(gmem, smem, bars, turn, which, done, done + jnp.maximum(steps, 0))
            return turn + 1, done, told(turn + 1)

        start = jnp.int32(0)
        lax.while_loop(lambda carry: carry[2] > _NO_MORE, one, (start, start, told(start)))
        plgpu.wait_smem_to_gmem(0)

    def attend(self, gmem: dict, smem: dict, bars: dict, turn, which, start, end) -> Any:
        """64 query tokens of one query block: online softmax over its kept blocks, then the output, row by row.

        which: of the lists; start, end: of its steps, counted from the program's first. What only the end needs is read
        there: while the blocks are walked every register counts. Returns `end`.
        """
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        wg = lax.axis_index("wg")
        keys, stages, chunk, walks = self.tiles.keys, self.tiles.stages, self.chunk, lists(self.block)
        held = _modulo(turn, self.tiles.queries)
        mine = 2 * held + wg
        levels = WIDTHS[self.pv].p_levels
        folded = self.integer_scores and self.pv != "fp8" and "k_row" not in smem
        # Against the running maximum every block's P counts the same levels: wgmma sums them in int32, across blocks.
        local = self.pv != "bf16" and self.p_scale == "block"
        summed = self.pv == "int8" and not local and "v_block" not in smem and self.kv_tokens <= _SUMMED_KEYS
        # P that is rounded relative to the running maximum has no level above it.
        slack = SLACK if local or self.pv == "bf16" else 0.0
        row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

        plgpu.barrier_wait(bars["q"].at[held])

        def vector(x):
            return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), row_layout)

        def matrix(columns, x, dtype=jnp.float32):
            return plgpu.layout_cast(jnp.full((ROWS, columns), x, dtype), plgpu.Layout.WGMMA)

        def by_row(x, columns):
            return lax.broadcast_in_dim(x, (ROWS, columns), [0])

        def by_column(ref, columns):
            x = plgpu.load(ref, layout=column_layout, optimized=False)
            return lax.broadcast_in_dim(x, (ROWS, columns), [1])

        def product(a, b, start=None, dtype=jnp.float32):
            """start + a @ b in start's dtype; no start: in `dtype`, and the first instruction overwrites."""
            if start is not None and not self.interpreted:
                return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(start))

            def issue(acc):  # the interpreter has no ACC.init
                plgpu.wgmma(acc, a, b)
                return acc[...]

            fresh = pl.run_scoped(issue, plgpu.ACC((ROWS, b.shape[1]), dtype if start is None else start.dtype))
            return fresh if start is None else start + fresh

        def release(barrier, slot, *, read):
            """Gives a stage back; read: threads did what a bulk copy is to overwrite, which takes a proxy fence."""
            if read and self.interpreted:
                plgpu.commit_smem()
            elif read:
                _registers.fence()
            plgpu.barrier_arrive(bars[barrier].at[slot])

        def masked(s, real):
            """Keys past the end become -inf; of integers, the bits of -2^120, which are below every score's."""
            if self.kv_tokens % self.block[1] == 0:
                return s
            lowest = _MASKED_BITS if s.dtype == jnp.int32 else -jnp.inf

            def mask(s):
                if not self.interpreted:
                    return _registers.first_columns(s, vector(real), lowest)
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=plgpu.Layout.WGMMA)
                return jnp.where(key.astype(jnp.float32) < real, s, lowest)

            return lax.cond(real < keys, mask, lambda s: s, s)

        def scores(slot):
            """(s f32 [64, keys], top f32 [64], factor f32 [64]): factor * s is the scores in log2 units, top the
            maximum of s; with `folded`, both are MAGIC higher."""
            start = matrix(keys, MAGIC_BITS, jnp.int32) if self.integer_scores else None
            s = product(smem["q"].at[mine], smem["k"].at[slot].transpose((1, 0)), start)
            scale, real = smem["facts"][slot, 0], smem["facts"][slot, 1]
            if "k_row" in smem:
                if self.integer_scores:
                    s = lax.bitcast_convert_type(s, jnp.float32) - MAGIC
                s = s * by_column(smem["k_row"].at[slot], keys)
            release("k_free", slot, read="k_row" in smem)
            s = masked(s, real)
            integers, top = s.dtype == jnp.int32, s.max(axis=1)
            if integers:  # positive floats order as their bits do, and integers have a maximum of three
                s, top = (lax.bitcast_convert_type(x, jnp.float32) for x in (s, top))
            if self.parts > 1:  # half a block may lie past the end: -inf * 0 is NaN, a masked score less itself P = 1
                top = jnp.maximum(top, _LEAST if integers else _LOWEST)
            if integers and not folded:
                s, top = s - MAGIC, top - MAGIC
            scale = scale * self.to_log2
            factor = vector(scale)
            if "q_row" in smem:
                factor = plgpu.load(smem["q_row"].at[mine], layout=row_layout, optimized=False) * scale
            return s, top, factor

        def exponents(s, top, factor, behind):
            """(x f32 [64, keys], gained f32 [64]): 2^x is P in levels, of an integer P times LEVEL.

            P is 1 where a score is `behind` above `top` (None: nothing), but for 2^gained: that row's rounding.
            """
            height = math.log2(levels * LEVEL) if self.integer_p else math.log2(levels)
            # Too large a score is too coarse to have others subtracted: integers are the sum with MAGIC.
            size, far = (factor, FAR / MAGIC) if folded else (top * factor, FAR)
            s, top = _registers.within_reach(s, top, size, far, interpreted=self.interpreted)
            fma = partial(_registers.fma, interpreted=self.interpreted)
            reference = fma(top, factor, vector(-height) if behind is None else behind - height)
            gained = fma(top, factor, -reference) - height
            if self.interpreted:  # a CPU may round the product
                x = _registers.product_error(s, by_row(factor, keys), by_row(-reference, keys))
                return jnp.where(s == -jnp.inf, s, x), gained
            return s * by_row(factor, keys) - by_row(reference, keys), gained

        def rounded(p):
            """P in levels (of an integer P times LEVEL) -> (rounded, as the product's left operand, its row sums).

            Of an 8-bit P each thread's own, so that none waits for another.
            """
            if self.pv != "bf16" and not self.interpreted:
                return _registers.pack(p, self.pv_dtype)
            short = (jnp.round(p / LEVEL) if self.integer_p else p).astype(self.pv_dtype)
            # Without the barrier the compiler rounds one score at a time, on the exponentials' unit.
            short = lax.optimization_barrier(short)
            row_sum = short.astype(jnp.float32).sum(axis=1)
            if not self.interpreted:
                return short, row_sum
            smem["p"][wg] = short
            plgpu.commit_smem()
            return smem["p"].at[wg], row_sum

        def step(i, carry):
            accs, top, total = carry
            slot = (which * stages if walks == 2 else 0) + _modulo(i, stages)
            plgpu.barrier_wait(bars["k"].at[slot])
            s, s_top, factor = scores(slot)
            # Rounded, for good: contracted with a difference below it would be another number.
            block_top = lax.optimization_barrier((s_top - MAGIC if folded else s_top) * factor)
            *accs, total, top = _registers.rescaled((*accs, total), top, block_top, slack, interpreted=self.interpreted)
            # A block 128 halvings behind has P = 0, like one further behind.
            behind = None if local else jnp.minimum(top - block_top, 128.0)
            x, gained = exponents(s, s_top, factor, behind)
            p, row_sum = rounded(_registers.exp2(x, self.tiles.cubics, interpreted=self.interpreted))
            weight = jnp.exp2(block_top - top - gained) if local else None
            total = total + scaled(row_sum, weight)
            plgpu.barrier_wait(bars["v"].at[slot])
            v = smem["v"].at[slot]
            if self.pv == "bf16":
                accs = (product(p, v, accs[0]),)
            elif summed:
                channels = (v.at[pl.ds(n * chunk, chunk)].transpose((1, 0)) for n in range(len(accs)))
                accs = tuple(product(p, v, acc) for v, acc in zip(channels, accs, strict=True))
            else:
                accs = tuple(acc + scaled(block_out(p, v, slot, n * chunk), weight) for n, acc in enumerate(accs))
            release("v_free", slot, read="v_block" in smem)
            return tuple(accs), top, total

        def scaled(x, weight):
            """x times weight by row; no weight is 1."""
            if weight is None:
                return x
            return x * (by_row(weight, x.shape[1]) if x.ndim == 2 else weight)

        def block_out(p, v, slot, channel):
            """P @ V of `chunk` channels, with V's scale where it differs by block."""
            channels = pl.ds(channel, chunk)
            o = product(p, v.at[channels].transpose((1, 0)), dtype=jnp.int32 if self.integer_p else jnp.float32)
            o = o.astype(jnp.float32)
            return o * by_column(smem["v_block"].at[slot, channels], chunk) if "v_block" in smem else o

        zero = (0, jnp.int32) if summed else (0.0, jnp.float32)
        zeros = tuple(matrix(chunk, *zero) for _ in range(self.dim // chunk))
        accs, top, total = lax.fori_loop(start, end, step, (zeros, vector(_LOWEST), vector(0.0)))
        total = total if self.pv == "bf16" else _registers.over_threads(total, interpreted=self.interpreted)

        some = total != 0  # NaN stays NaN
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, math.log(2) * (top + jnp.log2(total / levels)), -jnp.inf)
        plgpu.wait_smem_to_gmem(0)  # the item before has left
        _registers.store(smem["lse"].at[wg], lse, row_layout)
        width = self.width
        head, batch, row, steps = (smem["item"][held, n] for n in (0, 1, 2 + which, 2 + walks + which))
        first = row * self.block[0] + (0 if walks == 2 else wg * ROWS)
        writes = jnp.where(steps == _NOBODYS, 0, jnp.clip(self.q_tokens - first, 0, ROWS))
        for channel in range(0, self.dim, width):
            acc = accs[channel // chunk][:, channel % chunk : channel % chunk + width]
            o = acc.astype(jnp.float32) / by_row(total, width)
            if "v_channel" in smem:
                o = o * by_column(smem["v_channel"].at[held, pl.ds(channel, width)], width)
            plgpu.wait_smem_to_gmem(0)  # the chunk before has left
            _registers.store(smem["o"].at[wg], o.astype(self.out_dtype), plgpu.Layout.WGMMA, (1, width))
            plgpu.commit_smem()

            def store(r, _, channel=channel):
                target = gmem["o"].at[batch, pl.ds(smem["slots"][mine, r], 1), head, pl.ds(channel, width)]
                plgpu.copy_smem_to_gmem(smem["o"].at[wg, pl.ds(r, 1)], target)

            lax.fori_loop(0, writes, store, None)
        target = gmem["lse"].at[batch, head, pl.ds(first, ROWS)]
        pl.when(writes > 0)(lambda: plgpu.copy_smem_to_gmem(smem["lse"].at[wg], target))
        release("item_free", held, read=True)
        return end
