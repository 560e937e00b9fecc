"""Block-sparse attention on Ampere and Ada (sm_80, sm_86, sm_89) in Mosaic GPU: bf16, int8, and int4 as int4.

Method: PAROAttention (arXiv 2506.16054) with FlashAttention-2's loop (arXiv 2307.08691) and SageAttention's numerics
(arXiv 2410.02367). Each warpgroup keeps 64 queries and their output in registers, multiplies with mma.sync, and fetches
the next kept blocks of K and V by cp.async while it does; a skipped block costs nothing, not even a branch.

Unusual: (1) int4 is two to a byte in device memory and in shared memory, and goes to the tensor cores as it is; P is
unsigned there, [0, 15], against signed values. (2) P goes from the scores' registers to the left operand's without a
shuffle, because V's keys are stored in the order in which they then meet. (3) Integer sums start at the bits of
1.5 * 2^23, so that the int32 sum read as float32 *is* a float: no conversion per score. (4) The row sums of the rounded
P are one more product, with a column of ones. (5) A query block of 128 rows is two warpgroups that share K and V.
Tensor memory access and wgmma are not needed: the kernel also runs on sm_90, where 4-bit products are emulated, with
TMA in the place of cp.async; so does the interpreter.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _check, _fragments, _registers
from pallas_kernels._check import FLOATS, WIDTHS
from pallas_kernels._choose import Request, device_name, widths_served
from pallas_kernels._interpret import interpreted_device, interpreter_would_hang
from pallas_kernels._registers import LEVEL, MAGIC, MAGIC_BITS, SLACK
from pallas_kernels.block_attention.reference import token_scales
from pallas_kernels.block_attention.xla import Spec, attend_bwd

HEAD_DIMS = (64, 96, 128)  # others are padded with zeros to the next
BLOCKS = ((64, 64), (128, 64), (128, 128))
SERVED = ("bf16", "int8", "int4")
FEATURES = ("delta",)
ROWS = 64  # query tokens of one warpgroup
# Bytes of shared memory a program may have, and all programs of an SM together (each is charged 1 KiB more).
_SMEM = {"sm_80": (166912, 167936), "sm_86": (101376, 102400), "sm_89": (101376, 102400), "sm_90": (232448, 233472)}
DEVICES = tuple(_SMEM)
_ALIGNED = 1024  # of each buffer
CHANNELS = 32  # of an integer P @ V that are multiplied at a time
_MASKED = -(2.0**120)  # a score that gives P = 0 at any factor not below _SMALLEST
_SMALLEST = 2.0**-100  # as a factor of scores: their differences are nothing there, nor below
_LOWEST = -3.4028235e38  # a maximum before the first score: finite, so that a masked score of -inf gives exp2(-inf) = 0


@dataclass(frozen=True)
class Tiles:
    """What one program holds."""

    keys: int  # key tokens a step: the block's, or half of them where registers and shared memory are short
    stages: int  # steps whose K and V have room: one in use, the others in flight

    def __post_init__(self) -> None:
        assert self.keys in (64, 128) and 2 <= self.stages <= 4, f"{self=}"


def why_not(request: Request) -> str | None:
    """Serves sm_80, sm_86, sm_89 (sm_90 as a stand-in for them) at bf16, int8 and int4, where tiles fit."""
    if request.device not in DEVICES:
        served = ", ".join(DEVICES)
        return f"device {request.device} is not served; it serves {served}, and pallas_kernels.interpret() of one"
    if reason := widths_served(request, SERVED, FEATURES):
        return reason
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    if request.dtype == "float32" and "bf16" in (request.qk, request.pv):
        return "float32 products are not served (mma multiplies 16-bit floats at most); cast to bfloat16 or quantise"
    if request.block not in BLOCKS:
        return f"block {request.block} is not served; it serves {', '.join(map(str, BLOCKS))}"
    if request.head_dim > HEAD_DIMS[-1]:
        return f"head_dim {request.head_dim} > {HEAD_DIMS[-1]}"
    if not candidates(request):
        return f"no tile fits in {_SMEM[request.device][0]} bytes of shared memory"
    if interpreted_device() is not None:
        return interpreter_would_hang(_largest_array(request))
    return None


def candidates(request: Request) -> tuple[Tiles, ...]:
    """The tiles that fit, the one that should be fastest first."""
    keys, (most, together) = request.block[1], _SMEM[request.device]
    if request.pv == "bf16":  # not rounded relative to its block, so a block may be walked in halves
        keys = 64
    fit = [tiles for stages in (4, 3, 2) if shared_memory(request, tiles := Tiles(keys, stages)) <= most]
    # Registers have room for eight warps an SM: two programs of 64 rows. Where that costs stages, two are enough.
    programs = 2 if request.block[0] == ROWS else 1
    beside = [tiles for tiles in fit if programs * (shared_memory(request, tiles) + 1024) <= together]
    return tuple(beside + [tiles for tiles in fit if tiles not in beside])


def _largest_array(request: Request) -> int:
    """Bytes of the largest array that the kernel reads or writes."""
    (bq, bk), out = request.block, 4  # of the output's dtype, which a request does not say, at most
    qk, v = padded_dim(request.head_dim, request.qk), padded_dim(request.head_dim)
    rows, keys = -(-request.q_tokens // bq) * bq, -(-request.kv_tokens // bk) * bk
    each = (
        rows * stored_bytes(qk, request.qk), keys * stored_bytes(qk, request.qk), keys * stored_bytes(v, request.pv),
        request.q_tokens * v * out, len(request.features) * rows // bq * keys * 4,
    )  # fmt: skip
    return request.batch * request.heads * max(each)


def padded_dim(head_dim: int, width: str = "bf16") -> int:
    """The served number of channels that holds `head_dim`; of q and k at int4, summed 64 at a time, whole 64s."""
    return next(dim for dim in HEAD_DIMS if dim >= head_dim and (width != "int4" or dim % 64 == 0))


def stored_shape(role: str, width: str, tokens: int, head_dim: int, block: int) -> tuple[int, int]:
    """The last two extents of q, k or v as the kernel reads them: see `laid_out`."""
    dim, whole = padded_dim(head_dim, "bf16" if role == "v" else width), -(-tokens // block) * block
    rows, columns = (dim, whole) if role == "v" and width != "bf16" else (whole, dim)
    return rows, columns // 2 if width == "int4" else columns


def stored_bytes(channels: int, width: str) -> int:
    """Bytes of so many values at a width."""
    return channels * {"bf16": 4, "int8": 2, "int4": 1}[width] // 2


def shared_memory(request: Request, tiles: Tiles) -> int:
    """Bytes of shared memory a program takes, barriers apart."""
    k = tiles.keys * stored_bytes(padded_dim(request.head_dim, request.qk), request.qk)
    v = stored_bytes(tiles.keys, request.pv) * padded_dim(request.head_dim)
    return sum(-(-tiles.stages * each // _ALIGNED) * _ALIGNED for each in (k, v))


@partial(
    jax.jit,
    static_argnames=(
        "block", "scale", "qk", "pv", "p_scale", "out_dtype", "layout", "q_tokens", "kv_tokens", "head_dim", "tiles",
        "device",
    ),
)  # fmt: skip
def run(
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta=None, *, block, scale, qk, pv, p_scale, out_dtype,
    layout="rows", q_tokens=None, kv_tokens=None, head_dim=None, tiles=None, device=None,
):  # fmt: skip
    """See block_attention; arguments are checked there. Returns (o [B, Nq, H, D], lse f32 [B, Nq, H])."""
    device, head_dim = device or device_name(), head_dim or q.shape[3]
    tokens = q_tokens or q.shape[2], kv_tokens or k.shape[2]
    if tiles is None:
        (batch, heads), dtype = q.shape[:2], str(jnp.dtype(out_dtype))
        request = Request("block_attention", batch, heads, *tokens, head_dim, dtype, block, qk, pv, p_scale, device)
        (tiles, *_) = candidates(request)
    arrays = _check.share_mesh_axes(q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta)
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta = arrays
    launch = _Launch(Spec(block, scale, qk, pv, p_scale, out_dtype), tiles, device, *tokens, head_dim)
    if qk == pv == "bf16":  # differentiable, in the layout that XLA reads
        q, k, v = (x[:, :, :n, :head_dim] for x, n in ((q, tokens[0]), (k, tokens[1]), (v, tokens[1])))
        return _attend(launch, q, k, v, count, index, slots)
    if layout == "rows":
        (bq, bk) = block
        q, k, v = (laid_out(*each) for each in ((q, "q", qk, bq), (k, "k", qk, bk), (v, "v", pv, bk)))
    return _forward(launch, q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta)


class _Launch(NamedTuple):
    """What is static of one call."""

    spec: Spec
    tiles: Tiles
    device: str
    q_tokens: int
    kv_tokens: int
    head_dim: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(launch, q, k, v, count, index, slots):
    bq, bk = launch.spec.block
    q, k, v = laid_out(q, "q", "bf16", bq), laid_out(k, "k", "bf16", bk), laid_out(v, "v", "bf16", bk)
    return _forward(launch, q, k, v, count, index, slots)


def _attend_fwd(launch, q, k, v, count, index, slots):
    o, lse = _attend(launch, q, k, v, count, index, slots)
    return (o, lse), (q, k, v, count, index, slots, o, lse)


def _attend_bwd(launch, saved, cotangents):
    """XLA's: it needs the output and the log-sum-exp, whoever made them."""
    return attend_bwd(launch.spec, saved, cotangents)


_attend.defvjp(_attend_fwd, _attend_bwd)


def laid_out(x: jax.Array, role: str, width: str, block: int) -> jax.Array:
    """x [B, H, N, D] at its stored dtype -> as the kernel reads it: whole blocks of tokens, served channels, V below 16
    bits key-major, int4 two to a byte."""
    dim = padded_dim(x.shape[3], "bf16" if role == "v" else width)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, dim - x.shape[3])))
    if role == "v" and width != "bf16":
        return _fragments.key_major(x, block, width)
    return _fragments.packed(x) if width == "int4" else x


def _forward(launch, q, k, v, count, index, slots, q_scale=None, k_scale=None, v_scale=None, delta=None):
    """q, k, v laid out -> the rest as the kernel reads it, and the call."""
    (block, scale, qk, pv, p_scale, out_dtype), tiles, device, q_tokens, kv_tokens, head_dim = launch
    (batch, heads), (bq, bk), (nq, nk) = q.shape[:2], block, index.shape[1:]
    dim, f32 = padded_dim(head_dim), jnp.float32
    if delta is not None:
        delta = _padded(delta * f32(scale * math.log2(math.e)), nk * bk)
    if scale <= 0:  # the kernel takes maxima before it scales, so K takes the sign
        k, scale = (_negated(k, qk), -scale) if scale < 0 else (jnp.zeros_like(k), 1.0)
    to_log2 = scale * math.log2(math.e)
    arrays = dict(count=count, index=index, q=q, k=k, v=v)
    if q_scale is not None:
        arrays["q_row"] = _padded(token_scales(q_scale, q_tokens, bq) * f32(to_log2), nq * bq)
        to_log2 = 1.0
    if k_scale is not None:
        by_block = k_scale.shape[2] == nk
        arrays["k_block" if by_block else "k_row"] = k_scale if by_block else _padded(k_scale, nk * bk)
    if delta is not None:
        arrays["delta"] = delta
    if v_scale is not None:
        v_scale = _padded(v_scale, dim)
        by_channel = v_scale.shape[2] == 1
        arrays["v_channel" if by_channel else "v_block"] = v_scale[:, :, 0] if by_channel else v_scale
    if slots is None:
        slots = jnp.broadcast_to(jnp.arange(q_tokens, dtype=jnp.int32), (heads, q_tokens))
    arrays["slots"] = _padded(jnp.clip(slots, 0, q_tokens - 1), nq * bq, -1)
    # Longest rows first: they start first.
    arrays["rows"] = jnp.argsort(-count, axis=1, stable=True).astype(jnp.int32)

    call = _Call(
        batch, heads, q_tokens, kv_tokens, dim, block, to_log2, qk, pv, p_scale, out_dtype, tiles,
        dtypes=(q.dtype, v.dtype), bulk=interpreted_device() is not None or device == "sm_90",
        interpreted=interpreted_device() is not None,
    )  # fmt: skip
    o, lse = call.run(arrays)
    o, lse, _ = _check.share_mesh_axes(o, lse, q)  # Mosaic's results say nothing about a mesh
    return o[..., :head_dim], lse


def _negated(x: jax.Array, width: str) -> jax.Array:
    return _fragments.packed(-_fragments.unpacked(x)) if width == "int4" else -x


def _padded(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """The last axis filled up to `length`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)


# ---- the kernel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One launch: its static facts, and the kernel as methods."""

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
    tiles: Tiles
    dtypes: tuple[Any, Any]  # as stored: of q and k, of v
    bulk: bool  # fetch by TMA and its barriers instead of cp.async
    interpreted: bool

    @property
    def groups(self) -> int:
        """Warpgroups of a program: each has 64 rows of its query block."""
        return self.block[0] // ROWS

    @property
    def parts(self) -> int:
        """Steps per key block."""
        return self.block[1] // self.tiles.keys

    @property
    def a_byte(self) -> int:
        """Keys of V to a byte, where it is key-major."""
        return 2 if self.pv == "int4" else 1

    @property
    def columns(self) -> int:
        """Keys of Q @ K^T that are multiplied at a time: what registers the right operand takes is 32 or 16."""
        return 16 if "bf16" in (self.qk, self.pv) else 32

    def run(self, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(o [B, Nq, H, dim], lse f32 [B, Nq, H]), model order."""
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        nq, names, stages = arrays["rows"].shape[1], tuple(arrays), self.tiles.stages

        def ring(rows, columns, dtype):
            """Stages of shared memory as ldmatrix reads it without conflicts: tiles of 8 rows, swizzled."""
            swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
            tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
            return plgpu.SMEM((stages, rows, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

        keys, (qk_dtype, pv_dtype) = self.tiles.keys, self.dtypes
        v_shape = (keys, self.dim) if self.pv == "bf16" else (self.dim, keys // self.a_byte)
        scratch = dict(k=ring(keys, arrays["k"].shape[3], qk_dtype), v=ring(*v_shape, pv_dtype))
        barriers = {}
        if self.bulk:
            barriers["full"] = plgpu.Barrier(num_arrivals=2 * self.groups, num_barriers=stages)
        if self.groups == 2:
            barriers["step"] = plgpu.Barrier(num_arrivals=2)

        def kernel(*refs):
            gmem = dict(zip(names, refs[: len(names)], strict=True)) | {"o": refs[-2], "lse": refs[-1]}
            pl.run_scoped(lambda smem, bars: self.program(gmem, smem, bars), scratch, barriers, collective_axes="wg")

        call = plgpu.kernel(
            kernel,
            out_type=(
                jax.ShapeDtypeStruct((self.batch, self.q_tokens, self.heads, self.dim), self.out_dtype),
                jax.ShapeDtypeStruct((self.batch, self.q_tokens, self.heads), jnp.float32),
            ),
            grid=(self.heads, nq, self.batch),
            grid_names=("head", "program", "batch"),
            num_threads=self.groups,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )
        return call(*arrays.values())

    def program(self, gmem: dict, smem: dict, bars: dict) -> None:
        """One query block: queries into registers, online softmax over kept blocks, the output to its tokens."""
        from jax.experimental import pallas as pl

        plgpu = _registers.mosaic()
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        (bq, bk), keys, stages, parts = self.block, self.tiles.keys, self.tiles.stages, self.parts
        qk_dtype, pv_dtype = self.dtypes
        row = gmem["rows"][head, lax.axis_index("program")]
        nk = gmem["index"].shape[2]
        steps = jnp.clip(gmem["count"][head, row], 0, nk) * parts
        first = row * bq + wg * ROWS
        local = self.pv != "bf16" and self.p_scale == "block"
        levels = WIDTHS[self.pv].p_levels
        # P that is rounded relative to the running maximum has no level above it.
        slack = SLACK if local or self.pv == "bf16" else 0.0
        whole = "delta" in gmem  # scores leave their product with every factor and addend
        biased = self.qk != "bf16" and "k_row" not in gmem and not whole  # scores are MAGIC higher
        acc_layout = plgpu.Layout.WGMMA  # which is that of mma's accumulator
        row_layout, column_layout = acc_layout.reduce(1), acc_layout.reduce(0)

        # -- arithmetic

        def vector(x):
            return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), row_layout)

        def matrix(columns, x, dtype=jnp.float32):
            return plgpu.layout_cast(jnp.full((ROWS, columns), x, dtype), acc_layout)

        def by_row(x, like):
            return lax.broadcast_in_dim(x, like.shape, [0])

        def by_column(ref):
            x = plgpu.load(ref, layout=column_layout, optimized=False)
            return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])

        def plus_product(acc, a, b, width, unsigned=False):
            if width == "int4":
                return _fragments.product4(acc, a, b, unsigned=unsigned, interpreted=self.interpreted)
            return plgpu.mma(acc, a, b)

        def scores_of(a, b):
            """a @ b as float32; of integers MAGIC higher."""
            if self.qk == "bf16":
                return plgpu.mma(matrix(b.shape[1], 0.0), a, b)
            acc = plus_product(matrix(b.shape[1], MAGIC_BITS, jnp.int32), a, b, self.qk)
            return lax.bitcast_convert_type(acc, jnp.float32)

        def values_of(p, v):
            """p @ v of integers, as float32. From zero, for which registers need no start, and there are few here."""
            acc = plus_product(matrix(v.shape[1], 0, jnp.int32), p, v, self.pv, unsigned=True)
            return lax.bitcast_convert_type(acc + MAGIC_BITS, jnp.float32) - MAGIC

        # -- the ring of stages

        def slot_of(step):
            return lax.rem(step, jnp.array(stages, step.dtype))

        def listed(step):
            """The key block of a step, wherever the index points: clamped, so nothing outside K and V is ever read."""
            entry = jnp.minimum(step // parts if parts > 1 else step, nk - 1)
            return jnp.clip(gmem["index"][head, row, entry], 0, nk - 1)

        def tokens(step, block, each=1):
            """Where a step's keys start, `each` of them to a byte; a product, whose factors Mosaic sees."""
            if parts == 1:
                return block * (bk // each)
            return block * (bk // each) + lax.rem(step, jnp.array(parts, step.dtype)) * (keys // each)

        def fetch(name, step, block):
            """Start to fetch a step's K or V; of two warpgroups each fetches half of it."""
            slot = slot_of(step)
            if self.bulk:
                plgpu.commit_smem()  # what was read here is read before TMA overwrites it

            def copy(rows, start, *columns):
                """Rows from `start` on. cp.async wants 32 at a time: halves of 96 are two overlapping 64."""
                size = rows // self.groups
                size = size if size % 32 == 0 or self.bulk else 64
                offset = wg * (rows - size)
                source = gmem[name].at[(batch, head, pl.ds(start + offset, size), *columns)]
                target = smem[name].at[slot, pl.ds(offset, size)]
                if self.bulk:
                    plgpu.copy_gmem_to_smem(source, target, bars["full"].at[slot])
                else:
                    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

            if name == "k" or self.pv == "bf16":
                copy(keys, tokens(step, block))
            else:
                copy(self.dim, 0, pl.ds(tokens(step, block, self.a_byte), keys // self.a_byte))

        def arrived(step):
            """Wait until a step's K and V are there, and all warpgroups are done with the step before."""
            if self.bulk:
                plgpu.barrier_wait(bars["full"].at[slot_of(step)])
            elif stages == 2:
                plgpu.wait_gmem_to_smem(0)
            else:  # what may stay in flight is fetched for the stages - 2 steps after it, if there are so many
                behind = (stages - 2) * 2
                lax.cond(
                    step + stages - 2 < steps,
                    lambda: plgpu.wait_gmem_to_smem(behind),
                    lambda: plgpu.wait_gmem_to_smem(0),
                )
            if self.groups == 2 and self.bulk:
                plgpu.barrier_arrive(bars["step"])
                plgpu.barrier_wait(bars["step"])
            elif self.groups == 2:
                _fragments.meet()

        # -- a step

        def right(ref, dtype):
            """The right operand of a product, [depth, columns]."""
            return plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(jnp.dtype(dtype)), optimized=False)

        def scores(slot, start, factor, prefetch):
            """Q @ K^T in f32, parts of [64, columns], of integers MAGIC higher where nothing is done to single keys."""
            parts = []
            for n in range(0, keys, self.columns):
                if n == keys // 2:
                    prefetch("k")
                k = right(smem["k"].at[slot, pl.ds(n, self.columns)].transpose((1, 0)), qk_dtype)
                s = scores_of(q, k)
                single = pl.ds(start + n, self.columns)
                if self.qk != "bf16" and not biased:
                    s = s - MAGIC
                if "k_row" in gmem:
                    s = s * by_column(gmem["k_row"].at[batch, head, single])
                    s = s if whole else lax.optimization_barrier(s)  # rounded before the maximum is taken from it
                if whole:
                    s = s * by_row(factor, s) + by_column(gmem["delta"].at[batch, head, row, single])
                parts.append(s)
            return parts

        def masked(parts, real):
            """Keys past the end become so low that they get P = 0."""
            if self.kv_tokens % bk == 0:
                return parts

            def mask(parts):
                return tuple(first_columns(part, real - n * self.columns) for n, part in enumerate(parts))

            return lax.cond(real < keys, mask, lambda parts: parts, tuple(parts))

        def first_columns(part, count):
            if not self.interpreted:
                return _registers.first_columns(part, vector(count.astype(jnp.float32)), _MASKED)
            return jnp.where(lax.broadcasted_iota(jnp.int32, part.shape, 1) < count, part, _MASKED)

        def exponent(s, top, factor, relative, behind):
            """log2 of P, in levels where it is an integer, 1 where scores are `relative`; behind: how far that is above
            top, None for nothing."""
            height = 0.0 if self.pv == "bf16" else math.log2(levels * LEVEL)
            if whole:
                return s - by_row(relative - height, s)
            # The difference first: of integers it is exact, and a large product less its rounded self is not zero.
            x = (s - by_row(top, s)) * by_row(factor, s)
            return x + height if behind is None else x - by_row(behind - height, x)

        def scaled(x, weight):
            """x times weight by row; no weight is 1."""
            return x if weight is None else x * by_row(weight, x)

        def plus_values(accs, total, p, slot, block, weight, prefetch):
            """The sums of P @ V and of P, with a block's own."""
            if self.pv == "bf16":
                (acc,) = accs
                for n, part in enumerate(p):
                    if n == len(p) // 2:
                        prefetch("v")
                    depth = part.shape[1]
                    acc = plgpu.mma(acc, part, right(smem["v"].at[slot, pl.ds(n * depth, depth)], pv_dtype))
                    total = plgpu.mma(total, part, ones(depth))
                return (acc,), total
            summed = []
            for n, acc in enumerate(accs):
                if n == len(accs) // 2:
                    prefetch("v")
                channels = pl.ds(n * CHANNELS, CHANNELS)
                v = right(smem["v"].at[slot, channels].transpose((1, 0)), pv_dtype)
                o = values_of(p, v)
                if "v_block" in gmem:
                    o = o * by_column(gmem["v_block"].at[batch, head, block, channels])
                summed.append(acc + scaled(o, weight))
            row_sum = values_of(p, ones(p.shape[1]))
            return tuple(summed), total + scaled(row_sum, weight)

        def ones(depth):
            """A right operand [depth, 8] of ones: of two to a byte, 0x11."""
            one = jnp.full((depth, 8), 17 if self.pv == "int4" else 1, pv_dtype)
            return plgpu.layout_cast(one, plgpu.Layout.MMA_RHS(jnp.dtype(pv_dtype)))

        def probabilities(parts, top, factor, relative, behind):
            """P as the left operand of its product; of bf16 in parts."""
            operand = partial(_fragments.operand, width=self.pv, dtype=pv_dtype, interpreted=self.interpreted)
            p = [jnp.exp2(exponent(part, top, factor, relative, behind)) for part in parts]
            if self.pv == "bf16":
                return [operand([part]) for part in p]
            return operand(p)

        def scale_of(block):
            return gmem["k_block"][batch, head, block] if "k_block" in gmem else jnp.float32(1.0)

        def step(i, carry):
            accs, top, total, (block, k_block, following, ahead) = carry
            # Read a step before they are needed, so their latency is hidden.
            upcoming = (following, scale_of(following), listed(i + 2), listed(i + stages))
            arrived(i)

            def prefetch(name):  # branches amid the products: over them no loads move, which would take registers
                pl.when(i + stages - 1 < steps)(lambda: fetch(name, i + stages - 1, ahead))

            slot, start = slot_of(i), tokens(i, block)
            factor = vector(k_block * self.to_log2)
            factor = jnp.maximum(factor if q_row is None else factor * q_row, _SMALLEST)
            s = masked(scores(slot, start, factor, prefetch), self.kv_tokens - start)
            s_top = reduce(jnp.maximum, s).max(axis=1)
            if self.qk == "bf16":  # all scores of a block may be -inf, whose difference is NaN
                s_top = jnp.maximum(s_top, _LOWEST)
            # Rounded, for good: Mosaic lets a product be contracted with the difference below it.
            block_top = s_top if whole else lax.optimization_barrier((s_top - MAGIC if biased else s_top) * factor)
            *accs, total, top = _registers.rescaled((*accs, total), top, block_top, slack, interpreted=self.interpreted)
            relative, behind = (block_top, None) if local else (top, top - block_top)
            p = probabilities(s, s_top, factor, relative, behind)
            weight = jnp.exp2(block_top - top) if local else None
            accs, total = plus_values(accs, total, p, slot, block, weight, prefetch)
            return accs, top, total, upcoming

        for i, name in product(range(stages - 1), ("k", "v")):
            pl.when(i < steps)(partial(fetch, name, jnp.int32(i), listed(jnp.int32(i))))
        rows = pl.ds(first, ROWS)
        q_layout = plgpu.Layout.MMA_LHS(jnp.dtype(qk_dtype))
        q = plgpu.load(gmem["q"].at[batch, head, rows], layout=q_layout, optimized=False)
        q_row = None
        if "q_row" in gmem:
            q_row = plgpu.load(gmem["q_row"].at[batch, head, rows], layout=row_layout, optimized=False)
        width = self.dim if self.pv == "bf16" else CHANNELS
        zeros = tuple(matrix(width, 0.0) for _ in range(self.dim // width))
        block = listed(jnp.int32(0))
        ahead = (block, scale_of(block), listed(jnp.int32(1)), listed(jnp.int32(stages - 1)))
        carry = (zeros, vector(_LOWEST), matrix(8, 0.0), ahead)
        accs, top, total, _ = lax.fori_loop(0, steps, step, carry)

        # -- the output

        total = total.sum(axis=1) * (1 / 8)  # eight columns of the same, exactly
        some = total != 0  # NaN stays NaN
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, math.log(2) * (top + jnp.log2(total * (1 / levels))), -jnp.inf)
        slot = plgpu.load(gmem["slots"].at[head, rows], layout=row_layout, optimized=False)
        place = jnp.where(slot < 0, -1, (batch * self.q_tokens + slot) * self.heads + head)
        scatter = partial(_fragments.scatter, interpreted=self.interpreted)
        scatter(gmem["lse"], lse, place)
        inverse = 1.0 / total
        for n, acc in enumerate(accs):
            o = scaled(acc, inverse)
            if "v_channel" in gmem:
                o = o * by_column(gmem["v_channel"].at[batch, head, pl.ds(n * width, width)])
            scatter(gmem["o"], o, place, n * width)
