"""One kernel from projection to blocks, for Hopper (sm_90): x @ kernel whose sums leave as what attention reads.

Method: PAROAttention (arXiv 2506.16054), section 3.1 (reorder), with SageAttention's rounding (arXiv 2410.02367,
section 4.2). One warpgroup fetches x and the kernel by TMA, two multiply with wgmma and keep 64 tokens of some heads
each in registers, where bias, norm, RoPE, K's calibrated mean and rounding happen; then every (token, head) is stored
at the address of its kernel slot. The projection itself is never in device memory.

Tiles are in model order: in kernel order each head wants other rows of x, which would be fetched once a head. So what
one scale covers must lie in one token: group "row". A scale over a block of kernel-order tokens (K by default), or over
all tokens (V), is not known inside a tile.

Unusual: (1) The kernel's columns are stored in the order in which wgmma's sums make the channels of a thread
neighbours (`prepared`, once for a model's weights): a rotation of pairs then stays in a thread, RoPE's tables are
loaded and values stored 16 bytes at a time, with neither shared memory nor a shuffle between. (2) Programs are
persistent: while two warpgroups round, the third fetches for the next tile. (3) A cluster's programs share each fetch
of the kernel's columns.

Not chosen by anything: `paro bench --kinds projection` measures it beside XLA's product and `arrange`.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _check, _permute
from pallas_kernels._check import WIDTHS
from pallas_kernels._choose import Request
from pallas_kernels._interpret import interpreted_device, interpreter_would_hang
from pallas_kernels._registers import MAGIC, mosaic
from pallas_kernels.arrange import _lanes
from pallas_kernels.arrange.mosaic import bytes_moved as bytes_arranged
from pallas_kernels.block_attention.hopper import why_not_here

HEAD_DIMS = (64, 128)
ROWS = 64  # tokens of one wgmma
HALF = ROWS // 2  # tokens that a warpgroup finishes at a time
DEPTH = 64  # channels of x a step: 128 bytes, the widest swizzle
_SMEM = 232448 - 4096  # bytes a program may have, less what barriers and alignment take


@dataclass(frozen=True)
class Tiles:
    """What one program makes at a time: 128 tokens by some channels of the projection."""

    channels: int  # whole heads
    stages: int  # steps of 64 channels of x in flight
    cluster: int  # programs that share each fetch of the kernel, with tokens of their own
    turns: bool  # each consumer has a tile of its own and rounds it while the other multiplies; else 64 tokens each

    def __post_init__(self) -> None:
        assert self.channels in (128, 256) and self.stages >= 2 and self.cluster in (1, 2), f"{self=}"
        assert self.channels == 128 or not self.turns, f"{self=}"

    @property
    def rows(self) -> int:
        """Tokens of one consumer."""
        return 2 * ROWS if self.turns else ROWS


def why_not(request: Request, *, channels: int, group: str = "row") -> str | None:
    """Serves sm_90 (and the interpreter) where everything a value is rounded by lies in its own token and head.

    request: of op "projection" and of one role; channels: those of x.
    """
    if reason := why_not_here(request):
        return reason
    width = request.pv if request.role == "v" else request.qk
    if request.dtype == "float32":
        return "float32 is not served (wgmma multiplies 16-bit floats at most); cast to bfloat16"
    if request.role == "v" and width != "bf16":
        return f"v of width {width} has scales over tokens of kernel order, which a tile in model order does not know"
    if group != "row" and width != "bf16":
        return f"group {group!r} is over tokens of kernel order, which a tile in model order does not know; use 'row'"
    if request.head_dim not in HEAD_DIMS:
        return f"head_dim {request.head_dim} is not served; it serves {', '.join(map(str, HEAD_DIMS))}"
    if channels % 8:
        return f"{channels} channels are no multiple of 8, which TMA asks for"
    if not candidates(request):
        return f"{request.heads} heads of {request.head_dim} are no multiple of 128 channels, the smallest tile"
    elements = request.batch * request.heads * request.kv_tokens * request.head_dim
    if elements >= 2**31:
        return f"{elements} elements, and 2^31 or more are beyond an int32 address; split the batch"
    if interpreted_device() is not None:
        most = max(request.batch * request.kv_tokens, request.heads * request.head_dim)
        return interpreter_would_hang(4 * max(elements, most * channels))
    return None


def candidates(request: Request) -> tuple[Tiles, ...]:
    """The tiles that fit, the one that should be fastest first."""
    wide = request.heads * request.head_dim
    shapes = ((256, 4, False), (128, 6, True))
    every = [Tiles(channels, stages, cluster, turns) for channels, stages, turns in shapes for cluster in (2, 1)]
    return tuple(tiles for tiles in every if wide % tiles.channels == 0 and shared_memory(tiles) <= _SMEM)


def shared_memory(tiles: Tiles) -> int:
    """Bytes of shared memory a program takes, barriers apart."""
    return 2 * tiles.stages * DEPTH * (2 * ROWS + tiles.channels)


class Prepared(NamedTuple):
    """What depends on weights and orders alone."""

    kernel: jax.Array  # [C, H, D], each head's columns as of `_lanes.for_quads`
    places: jax.Array | None  # int32 [H, N]: model token -> kernel slot


def prepared(kernel: jax.Array, slots: jax.Array | None, *, width: str) -> Prepared:
    """kernel [C, H, D] and slots int32 [H, N] (kernel slot -> model token) as `run` reads them for a `width`."""
    return Prepared(_lanes.for_quads(kernel, _vector(width)), None if slots is None else _permute.inverse(slots))


def _vector(width: str) -> int:
    """Channels of a head that a thread has side by side: 16 bytes of what it stores."""
    return 8 if width == "bf16" else 16


@partial(jax.jit, static_argnames=("role", "width", "layout", "tiles", "programs"))
def run(x, weights, bias, norm, rope, mean, *, role, width, layout="rows", tiles=None, programs=None):
    """x [B, N, C] and `prepared` weights -> what `arrange` returns of the projection: (values, scales, mean).

    bias [H, D] or None; norm, rope as of `arrange`; mean f32 [H, D], subtracted before rounding, or None. Sums stay
    f32 up to the norm, where XLA's projection is rounded first. layout: "rows" or "hopper", which differ for k of width
    int4 alone. tiles: None for the first candidate; programs: None for one a multiprocessor.
    """
    (batch, tokens, channels), (_, heads, head_dim), dtype = x.shape, weights.kernel.shape, str(x.dtype)
    request = Request("projection", batch, heads, tokens, tokens, head_dim, dtype, (64, 64))
    tiles = tiles or candidates(request)[0]

    def per_head(weight):
        """[D] or [H, D] as f32 [H, D]."""
        return jnp.broadcast_to(weight.astype(jnp.float32).reshape(-1, head_dim), (heads, head_dim))

    # TMA takes tiles of eight rows from whole eights; added rows are past the end.
    flat = x.reshape(batch * tokens, channels)
    arrays = {"x": jnp.pad(flat, ((0, -flat.shape[0] % 8), (0, 0))), "kernel": weights.kernel.reshape(channels, -1)}
    if weights.places is not None:
        arrays["places"] = weights.places.reshape(-1)
    if rope is not None:
        arrays |= {"cos": rope.cos.astype(jnp.float32).reshape(-1), "sin": rope.sin.astype(jnp.float32).reshape(-1)}
    given = {"bias": bias, "mean": mean}
    given |= {} if norm is None else {"norm scale": norm.scale, "norm bias": norm.bias}
    arrays |= {name: per_head(weight) for name, weight in given.items() if weight is not None}
    call = _Call(
        batch, heads, tokens, channels, head_dim, x.dtype, width, tiles, programs or _multiprocessors(),
        upper=layout == "hopper" and width == "int4",
        norm=None if norm is None else (norm.kind, norm.eps), interpreted=interpreted_device() is not None,
    )  # fmt: skip
    values, scales = call.run(dict(zip(arrays, _check.share_mesh_axes(*arrays.values()), strict=True)))
    mean = None if mean is None else jnp.broadcast_to(per_head(mean), (batch, heads, head_dim))
    values, scales, mean, _ = _check.share_mesh_axes(values, scales, mean, x)  # Mosaic's say nothing about a mesh
    return values, scales, mean


def _multiprocessors() -> int:
    """Of the default device; of an H100 or H200 where that is no GPU. One program fits in each."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def bytes_moved(request: Request, *, channels: int, rope: bool) -> dict[str, int]:
    """Bytes of device memory that a call must read and write by shape alone, and that it saves.

    "read": x and the kernel once, places once a batch entry, RoPE's tables once. "written": values and scales. "saved":
    of XLA's product and `arrange`, which write the projection and read it again.
    """
    rows = request.batch * request.kv_tokens
    wide, size = request.heads * request.head_dim, jnp.dtype(request.dtype).itemsize
    width = request.pv if request.role == "v" else request.qk
    places = 4 * rows * request.heads
    tables = 4 * request.kv_tokens * request.head_dim if rope else 0
    written = bytes_arranged(request, width=width, group="row", rope=False)["written"]
    return {
        "read": size * channels * (rows + wide) + places + tables,
        "written": written,
        "saved": 2 * rows * wide * size,
    }


# ---- the kernel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One launch: its static facts, and the kernel's two halves as methods."""

    batch: int
    heads: int
    tokens: int
    channels: int  # of x
    head_dim: int
    dtype: Any
    width: str
    tiles: Tiles
    programs: int  # at most; whole clusters of them
    upper: bool  # values in the upper halves of their bytes
    norm: tuple[str, float] | None
    interpreted: bool

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return -(-self.channels // DEPTH)

    @property
    def extent(self) -> tuple[int, int]:
        """Tiles of a cluster together: (along the tokens of all batch entries, along the projection's channels)."""
        rows = 2 * ROWS * self.tiles.cluster
        return -(-self.batch * self.tokens // rows), self.heads * self.head_dim // self.tiles.channels

    @property
    def clusters(self) -> int:
        """That run at once."""
        down, across = self.extent
        return max(1, min(self.programs // self.tiles.cluster, down * across))

    def run(self, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """(values [B, H, N, D], scales f32 [B, H, N] or None)."""
        from jax.experimental import pallas as pl

        plgpu = mosaic()
        names, (channels, stages, cluster) = tuple(arrays), (self.tiles.channels, self.tiles.stages, self.tiles.cluster)
        rows = self.batch * self.heads * self.tokens
        out = [jax.ShapeDtypeStruct((rows * self.head_dim,), WIDTHS[self.width].store or self.dtype)]
        if self.width != "bf16":
            out.append(jax.ShapeDtypeStruct((rows,), jnp.float32))
        transforms = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
        scratch = dict(
            x=plgpu.SMEM((stages, 2 * ROWS, DEPTH), self.dtype, transforms=transforms),
            kernel=plgpu.SMEM((stages, DEPTH, channels), self.dtype, transforms=transforms),
        )
        free = plgpu.Barrier if cluster == 1 else partial(plgpu.ClusterBarrier, collective_axes=("member",))
        turns = self.tiles.turns
        barriers = dict(  # of `full` a stage has one for each consumer that waits for other tiles than the other
            full=plgpu.Barrier(num_arrivals=2, num_barriers=(1 + turns) * stages),
            free=free(num_arrivals=2 - turns, num_barriers=stages),
        )

        def kernel(*refs):
            gmem = dict(zip(names, refs[: len(names)], strict=True)) | {"values": refs[len(names)]}
            if len(out) == 2:
                gmem["scales"] = refs[-1]

            def scoped(smem, bars):
                consumes = lax.axis_index("wg") < 2
                lax.cond(consumes, lambda: self.consumer(gmem, smem, bars), lambda: self.producer(gmem, smem, bars))

            pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")

        shared = dict(cluster=(cluster,), cluster_names=("member",)) if cluster > 1 else {}
        call = plgpu.kernel(
            kernel,
            out_type=tuple(out),
            grid=(self.clusters,),
            grid_names=("program",),
            num_threads=3,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **shared,
        )
        values, *scales = call(*arrays.values())
        lead = self.batch, self.heads, self.tokens
        return values.reshape(*lead, self.head_dim), scales[0].reshape(lead) if scales else None

    def over_tiles(self, body: Any, start: Any = 0, stride: int = 1) -> None:
        """body(number, first row of x, first channel of the projection) for tiles of this program, in turn."""
        down, across = self.extent
        program = lax.axis_index("program")
        mine = (down * across - program + self.clusters - 1) // self.clusters
        member = lax.axis_index("member") if self.tiles.cluster > 1 else 0

        def tile(turn, _):
            number = start + turn * stride
            # Neighbours share rows of x: the programs that run at once cover all of the kernel and few rows.
            place = program + number * self.clusters
            row = (place // across * self.tiles.cluster + member) * (2 * ROWS)
            body(number, row, place % across * self.tiles.channels)

        lax.fori_loop(0, (mine - start + stride - 1) // stride, tile, None)

    def slot(self, number: Any, step: Any) -> tuple[Any, Any, Any]:
        """(stage of a tile's step, its place among the barriers of `full`, which step of the program it is)"""
        all_steps, stages = number * self.steps + step, self.tiles.stages
        slot = lax.rem(all_steps, jnp.array(stages, all_steps.dtype))
        return slot, slot + lax.rem(number, jnp.int32(2)) * stages if self.tiles.turns else slot, all_steps

    def producer(self, gmem: dict, smem: dict, bars: dict) -> None:
        """Fetches x and the kernel, a ring of stages ahead of the consumers and from one tile into the next."""
        from jax.experimental import pallas as pl

        plgpu = mosaic()
        plgpu.set_max_registers(40, action="decrease")
        stages = self.tiles.stages
        shared = dict(collective_axes="member") if self.tiles.cluster > 1 else {}

        def tile(number, row, channel):
            def load(step, _):
                slot, full, all_steps = self.slot(number, step)
                depth = pl.ds(step * DEPTH, DEPTH)
                pl.when(all_steps >= stages)(lambda: plgpu.barrier_wait(bars["free"].at[slot]))
                x, kernel = (gmem["x"].at[pl.ds(row, 2 * ROWS), depth],
                             gmem["kernel"].at[depth, pl.ds(channel, self.tiles.channels)])  # fmt: skip
                plgpu.copy_gmem_to_smem(x, smem["x"].at[slot], bars["full"].at[full])
                plgpu.copy_gmem_to_smem(kernel, smem["kernel"].at[slot], bars["full"].at[full], **shared)

            lax.fori_loop(0, self.steps, load, None)

            def drain(step, _):
                plgpu.barrier_wait(bars["free"].at[self.slot(number, step)[0]])

            # No barrier may be left with an arrival that nobody waited for, nor a program end while others arrive.
            def last():
                lax.fori_loop(jnp.maximum(self.steps - stages, -number * self.steps), self.steps, drain, None)

            down, across = self.extent
            pl.when(lax.axis_index("program") + (number + 1) * self.clusters >= down * across)(last)

        self.over_tiles(tile)

    def consumer(self, gmem: dict, smem: dict, bars: dict) -> None:
        """64 tokens of each tile: their sums, then the way to their blocks."""
        from jax.experimental import pallas as pl

        plgpu = mosaic()
        plgpu.set_max_registers(232, action="increase")
        wg, rows, turns = lax.axis_index("wg"), self.tiles.rows, self.tiles.turns
        first = 0 if turns else wg * rows

        def tile(number, row, channel):
            def release(step):
                plgpu.barrier_arrive(bars["free"].at[self.slot(number, step)[0]])

            def multiply(acc):
                def one(step, _):
                    slot, full, _ = self.slot(number, step)
                    plgpu.barrier_wait(bars["full"].at[full])
                    x = smem["x"].at[slot] if turns else smem["x"].at[slot, pl.ds(first, rows)]
                    plgpu.wgmma(acc, x, smem["kernel"].at[slot])
                    plgpu.wgmma_wait(1)  # the step before is done, this one runs on
                    pl.when(step > 0)(lambda: release(step - 1))

                lax.fori_loop(0, self.steps, one, None)
                return acc[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((rows, self.tiles.channels), jnp.float32))
            release(self.steps - 1)
            for part in range(0, rows, ROWS):
                self.store(gmem, sums[part : part + ROWS], row + first + part, channel // self.head_dim)

        self.over_tiles(tile, wg if turns else 0, 1 + turns)

    def store(self, gmem: dict, sums: jax.Array, first: Any, head: Any) -> None:
        """Sums f32 [64, channels] of the rows of x from `first` and the heads from `head`, to their kernel slots.

        In halves of eight rows a warp: what a thread needs beside its sums, RoPE's angles above all, is then half.
        """
        plgpu, vector = mosaic(), _vector(self.width)
        lanes, take = _lanes.quads(vector), partial(_lanes.take, interpreted=self.interpreted)
        put = partial(_lanes.put, lanes=lanes, interpreted=self.interpreted)
        own = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=lanes.tile.reduce(1))
        for start, half in itertools.product(range(0, sums.shape[1], self.head_dim), range(2)):
            row = first + 2 * own - (own & 7) + 8 * half
            token = lax.rem(row, jnp.int32(self.tokens))
            heads = head + start // self.head_dim
            columns = sums[:, start : start + self.head_dim]
            y = _lanes.by_quad(columns, half, vector, interpreted=self.interpreted)
            y, factor = self.finished(gmem, y, token, heads, lanes)
            place = token + heads * self.tokens
            if "places" in gmem:
                place = take(gmem["places"], place, lanes.tile.reduce(1)) + heads * self.tokens
            place = place + lax.div(row, jnp.int32(self.tokens)) * (self.heads * self.tokens)
            place = jnp.where(row < self.batch * self.tokens, place, -self.head_dim)
            if self.width != "bf16":
                amax = jnp.abs(y).max(axis=1)
                amax = amax if factor is None else amax * factor
                scale = jnp.maximum(amax, 1e-7) / WIDTHS[self.width].qmax
                put(gmem["scales"], place, scale)
                factor = 1.0 / scale if factor is None else factor / scale
            y = y if factor is None else y * lax.broadcast_in_dim(factor, y.shape, [0])
            if self.width in ("int8", "int4"):  # the low byte is the integer, half to even
                y = lax.bitcast_convert_type(y + MAGIC, jnp.int32) << (4 * self.upper)
            put(gmem["values"], place * self.head_dim, y.astype(WIDTHS[self.width].store or self.dtype))

    def finished(
        self, gmem: dict, y: jax.Array, token: jax.Array, head: Any, lanes: _lanes.Lanes
    ) -> tuple[jax.Array, jax.Array | None]:
        """(y, factor): f32 [32, D] times [32], or times nothing, is y after bias, norm, RoPE and the mean.

        Where all that follows a norm is linear its factor waits for the one that rounds: a product less for each value.
        """
        plgpu, factor = mosaic(), None

        def by_row(vector):
            return lax.broadcast_in_dim(vector, y.shape, [0])

        def by_channel(name):
            vector = plgpu.load(gmem[name].at[head], layout=lanes.tile.reduce(0), optimized=False)
            return lax.broadcast_in_dim(vector, y.shape, [1])

        y = y + by_channel("bias") if "bias" in gmem else y
        if self.norm is not None:
            kind, eps = self.norm
            y = y - by_row(y.sum(axis=1) * (1.0 / self.head_dim)) if kind == "layer" else y
            factor = lax.rsqrt((y * y).sum(axis=1) * (1.0 / self.head_dim) + eps)
            if "norm bias" in gmem or "mean" in gmem:
                y, factor = y * by_row(factor), None
            y = y * by_channel("norm scale") if "norm scale" in gmem else y
            y = y + by_channel("norm bias") if "norm bias" in gmem else y
        if "cos" in gmem:
            pairs = (HALF, self.head_dim // 2)
            column = plgpu.broadcasted_iota(jnp.int32, pairs, 1, layout=lanes.pairs)
            pair = lax.broadcast_in_dim(token * pairs[1], pairs, [0]) + column
            # Heads share a token's angles: loaded once, they would take registers that there are not.
            take = partial(_lanes.take, again=True, interpreted=self.interpreted)
            cos, sin = (take(gmem[name], pair, lanes.pairs) for name in ("cos", "sin"))
            y = _lanes.rotated(y, cos, sin, lanes, interpreted=self.interpreted)
        return (y - by_channel("mean") if "mean" in gmem else y), factor
