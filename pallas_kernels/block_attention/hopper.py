"""Block-sparse attention on Hopper (sm_90: H100, H200) in Mosaic GPU, for every width.

Method: PAROAttention (arXiv 2506.16054) with FlashAttention-3's warp specialisation (arXiv 2407.08608) and
SageAttention's numerics (arXiv 2410.02367). One warpgroup fetches kept K and V blocks by TMA, two multiply with wgmma;
a skipped block costs nothing, not even a branch.

Unusual: (1) A query block of 128 rows is shared by both consumers; with blocks of 64 rows each consumer has its own
row, list and ring of stages, and rows are paired by their number of kept blocks. (2) Integer scores start at the bits
of 1.5 * 2^23, so that the int32 sum read as float32 *is* a float: no conversion per score. (3) P goes from the scores'
registers to the A operand's without a shuffle, because V's keys are stored in the order in which they then meet. (4)
Nothing is rescaled while no maximum rises, by eight halvings where P has room for them. With int8 P against the running
maximum, which has none, the output stays in the int32 accumulator of wgmma meanwhile. A rise rounds it once and brings
127 levels to its row, so the roundings of all rises together move the output by less than max |v| / 2 / 127^2. (5) The
output leaves row by row, each to its model token.
int4 is values on a 4-bit grid through the int8 unit; in layout "hopper_packed" its K and V come two to a byte, and the
fetching warpgroup unpacks them on their way.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import _check, _packed, _permute, _registers
from pallas_kernels._check import FLOATS
from pallas_kernels._choose import KERNEL_WIDTHS, Request, widths_served
from pallas_kernels._interpret import interpreted_device, interpreter_would_hang
from pallas_kernels._packed import PACKED, UNIT
from pallas_kernels.block_attention import _work
from pallas_kernels.block_attention._hopper import ROWS, Call, lists, out_channels
from pallas_kernels.block_attention.reference import token_scales
from pallas_kernels.block_attention.xla import Spec, attend_bwd

HEAD_DIMS = (64, 96, 128, 256)  # others are padded with zeros to the next
BLOCKS = ((64, 64), (128, 64), (128, 128))
_SMEM = 232448  # bytes a program may have
_RESERVED = 2048 + 512  # of them: Mosaic's for reductions, and barriers
_CUBICS = {("block", 64): 4, ("block", 96): 2, ("running", 64): 8, ("running", 96): 8}  # at other widths of head: 0


@dataclass(frozen=True)
class Tiles:
    """What one program holds."""

    keys: int  # key tokens a step: the block's, or half of them where registers are short
    stages: int  # steps whose K and V are in flight, per list of kept blocks
    cubics: int = 0  # of a thread's exponentials of a step, which are keys / 2: how many the multiply-add unit does
    queries: int = 1  # items whose queries are held: with 2, the next one's come while this one is computed

    def __post_init__(self) -> None:
        assert self.keys in (64, 128) and 1 <= self.stages <= 4, f"{self=}"
        assert self.cubics % 2 == 0 and 0 <= self.cubics <= self.keys // 4 and self.queries in (1, 2), f"{self=}"


def why_not(request: Request) -> str | None:
    """Serves sm_90 (and the interpreter, which stands for one) at every width, where tiles fit in shared memory."""
    if reason := why_not_here(request):
        return reason
    if request.dtype == "float32" and "bf16" in (request.qk, request.pv):
        return "float32 products are not served (wgmma multiplies 16-bit floats at most); cast to bfloat16 or quantise"
    if request.block not in BLOCKS:
        return f"block {request.block} is not served; it serves {', '.join(map(str, BLOCKS))}"
    if request.head_dim > HEAD_DIMS[-1]:
        return f"head_dim {request.head_dim} > {HEAD_DIMS[-1]}"
    if not candidates(request):
        return f"no tile fits in {_SMEM} bytes of shared memory"
    if interpreted_device() is not None:
        tokens = max(request.q_tokens, request.kv_tokens)
        return interpreter_would_hang(4 * request.batch * request.heads * tokens * padded_dim(request.head_dim))
    return None


def why_not_here(request: Request) -> str | None:
    """What keeps any kernel for sm_90 from a request: its device, its widths, its dtype."""
    if request.device != "sm_90":
        return f"device {request.device} is not sm_90 (H100, H200); pallas_kernels.interpret() stands for one on a CPU"
    if reason := widths_served(request, KERNEL_WIDTHS):
        return reason
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return None


def candidates(request: Request) -> tuple[Tiles, ...]:
    """The tiles that fit, the one that should be fastest first."""
    keys, dim = request.block[1], padded_dim(request.head_dim)
    # A block may be walked in halves only where P is not rounded relative to its block. Without it these spill.
    if request.pv == "bf16" and dim >= 128:
        keys = 64
    # As many as bring both units to the same time, by the compile report.
    cubics = _CUBICS.get((request.p_scale, dim), 0) if request.pv in ("int8", "int4") and keys == 128 else 0
    fitting = []
    for some, stages in itertools.product(dict.fromkeys((cubics, 0)), (4, 3, 2, 1)):
        tiles = (Tiles(keys, stages, some, queries) for queries in (2, 1))
        fitting += list(filter(lambda tiles: shared_memory(request, tiles) <= _SMEM, tiles))[:1]
    # Two steps in flight before two items' queries.
    return tuple(sorted(fitting, key=lambda tiles: (tiles.cubics != cubics, tiles.stages < 2, tiles.queries < 2)))


def padded_dim(head_dim: int) -> int:
    """The served head dimension that holds `head_dim` channels."""
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def shared_memory(request: Request, tiles: Tiles) -> int:
    """Bytes of shared memory a program takes at most, which is where K's scales differ by key and V's by block.

    Less the interpreter's P, which has no limit.
    """
    dim, keys, rows = padded_dim(request.head_dim), tiles.keys, 2 * ROWS
    qk, pv = (2 if width == "bf16" else 1 for width in (request.qk, request.pv))
    out = 4 if request.dtype == "float32" else 2
    ring, queries = lists(request.block) * tiles.stages, tiles.queries
    arrays = [4, queries * 24, ring * 8, queries * rows * 4, rows * 4]  # number drawn, item, facts, slots, log-sum-exp
    arrays += [queries * rows * dim * qk, ring * keys * dim * qk, ring * keys * dim * pv]
    arrays += [ring * keys * dim // 2] * len(packed(request.qk, request.pv, request.layout))
    arrays += [rows * out_channels(dim, out) * out]
    if request.qk != "bf16":
        arrays += [queries * rows * 4, ring * keys * 4]  # scales of q and k
    if request.pv != "bf16":
        arrays += [max(ring, queries) * dim * 4]
    return sum(-(-size // 1024) * 1024 for size in arrays) + _RESERVED  # Mosaic aligns each


def packed(qk: str, pv: str, layout: str) -> tuple[str, ...]:
    """Which of K and V are stored two values to a byte."""
    return tuple(name for name, width in (("k", qk), ("v", pv)) if layout == PACKED and width == "int4")


@partial(
    jax.jit, static_argnames=("block", "scale", "qk", "pv", "p_scale", "out_dtype", "layout", "kv_tokens", "tiles")
)
def run(
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, *, block, scale, qk, pv, p_scale, out_dtype,
    layout="rows", kv_tokens=None, tiles=None,
):  # fmt: skip
    """See block_attention; arguments are checked there. Returns (o [B, Nq, H, D], lse f32 [B, Nq, H])."""
    spec = Spec(block, scale, qk, pv, p_scale, out_dtype)
    kv_tokens = k.shape[2] if kv_tokens is None else kv_tokens
    (batch, heads, q_tokens, head_dim), dtype = q.shape, str(jnp.dtype(out_dtype))
    request = Request(
        "block_attention", batch, heads, q_tokens, kv_tokens, head_dim, dtype, block, qk, pv, p_scale, "sm_90",
        layout=layout,
    )  # fmt: skip
    tiles = tiles or candidates(request)[0]
    arrays = _check.share_mesh_axes(q, k, v, count, index, slots, q_scale, k_scale, v_scale)
    q, k, v, count, index, slots, q_scale, k_scale, v_scale = arrays
    if qk == pv == "bf16":
        return _attend(spec, tiles, q, k, v, count, index, slots)
    return _forward(spec, tiles, q, k, v, count, index, slots, q_scale, k_scale, v_scale, layout, kv_tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, tiles, q, k, v, count, index, slots):
    return _forward(spec, tiles, q, k, v, count, index, slots)


def _attend_fwd(spec, tiles, q, k, v, count, index, slots):
    o, lse = _forward(spec, tiles, q, k, v, count, index, slots)
    return (o, lse), (q, k, v, count, index, slots, o, lse)


def _attend_bwd(spec, tiles, saved, cotangents):
    """XLA's: it needs the output and the log-sum-exp, whoever made them."""
    return attend_bwd(spec, saved, cotangents)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
    spec: Spec, tiles: Tiles, q, k, v, count, index, slots, q_scale=None, k_scale=None, v_scale=None, layout="rows",
    kv_tokens=None,
):  # fmt: skip
    """Shapes everything as the kernel reads it, and calls it."""
    block, scale, qk, pv, p_scale, out_dtype = spec
    batch, heads, q_tokens, head_dim = q.shape
    kv_tokens = k.shape[2] if kv_tokens is None else kv_tokens
    bq, bk = block
    nq, nk = index.shape[1:]
    dim, f32, interpreted = padded_dim(head_dim), jnp.float32, interpreted_device() is not None
    if scale <= 0:  # the kernel takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    to_log2 = scale * math.log2(math.e)

    if layout == "rows":
        q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, dim - head_dim)]) for x in (q, k, v))
        v = v if pv == "bf16" else _registers.key_major(v, bk, permuted=not interpreted)
        q, k, v = (_packed.upper(x) if width in UNIT else x for x, width in ((q, qk), (k, qk), (v, pv)))
    elif pv != "bf16" and interpreted:  # its P goes through shared memory, and keys in their own order
        v = v.reshape(*v.shape[:3], -1, 16)[..., jnp.argsort(jnp.asarray(_registers.KEY_ORDER))].reshape(v.shape)
    q_scale, k_scale, v_scale = (
        None if scales is None else scales / UNIT.get(width, 1.0)
        for scales, width in ((q_scale, qk), (k_scale, qk), (v_scale, pv))
    )
    # TMA takes tiles of eight rows from whole eights (any length up to eight); added keys are past the end.
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % 8), (0, 0)]) for x in (q, k, v))
    by_row = k_scale is not None and k_scale.shape[2] != nk
    q_row = k_row = v_channel = v_block = None
    if q_scale is not None:
        q_row = _padded(_registers.factors(token_scales(q_scale, q_tokens, bq) * f32(to_log2)), nq * bq)
        to_log2 = 1.0
    k_block = None if by_row or k_scale is None else _registers.factors(k_scale)
    if by_row and k_scale is not None:
        k_row = _padded(_registers.factors(k_scale), nk * bk)
    if v_scale is not None:
        v_scale = jnp.pad(v_scale, [(0, 0)] * 3 + [(0, dim - v_scale.shape[3])])
        v_channel, v_block = (v_scale[:, :, 0], None) if v_scale.shape[2] == 1 else (None, v_scale)
    if slots is None:
        slots = jnp.broadcast_to(jnp.arange(q_tokens, dtype=jnp.int32), (heads, q_tokens))
    slots = _padded(jnp.clip(slots, 0, q_tokens - 1), nq * bq)
    head_bytes = 2 * kv_tokens * dim * max(k.dtype.itemsize, v.dtype.itemsize)
    rows, items = _work.in_order(jnp.clip(count, 0, nk), batch, lists(block), head_bytes)

    call = Call(
        batch, heads, q_tokens, kv_tokens, dim, block, to_log2, qk, pv, p_scale, out_dtype, tiles,
        qk_dtype=q.dtype, pv_dtype=v.dtype, packed=packed(qk, pv, layout), interpreted=interpreted,
    )  # fmt: skip
    counters = _work.counters(items, q)
    arrays = dict(counters=counters, items=items, rows=rows, count=count, index=index, slots=slots, q=q, k=k, v=v,
                  q_row=q_row, k_block=k_block, k_row=k_row, v_channel=v_channel, v_block=v_block)  # fmt: skip
    o, lse = call.run({name: array for name, array in arrays.items() if array is not None})
    o, lse, _ = _check.share_mesh_axes(o, lse, q)  # Mosaic's results say nothing about a mesh
    return o[..., :head_dim], _permute.to_model(lse[:, :, :q_tokens, None], slots[:, :q_tokens])[..., 0]


def _padded(x: jax.Array, length: int) -> jax.Array:
    """The last axis filled with zeros up to `length`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
