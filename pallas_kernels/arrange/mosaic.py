"""arrange in Mosaic GPU, for Hopper (sm_90) and for Ampere and Ada (sm_80, sm_86, sm_89): one kernel from projected q,
k or v to what attention reads.

Method: PAROAttention (arXiv 2506.16054), section 3.1 (reorder), and SageAttention (arXiv 2410.02367), section 4.2
(smooth K, then round). A program makes one tile of kernel order: each thread fetches its channels of a token from the
address that the head's order names, and the norm, RoPE, the mean, rounding and V's transpose happen in registers.

Unusual: a permutation costs no pass and no shared memory, it is an address. x is read once and its values are written
once. Where that is not all: (1) a mean or a scale over *all* tokens (K's computed mean, V's scale per channel) is known
only after a first launch of the same kernel, which reads x once more and writes a row of channels per 256 tokens. (2)
RoPE's tables are read once a head, from L2 where they fit. (3) A block of 128 tokens of 256 channels is fetched twice,
the second time from L2. (4) XLA cuts padding off, a copy: of row scales if their tiles are not full, of values that
are stored by token if the tokens are no multiple of 8, and in layout "rows" if head_dim is none of 64, 96, 128, 256.
Rows past the last token repeat it, so that nothing outside is read.

Hopper's values go through shared memory and leave by TMA. Below sm_90 there is none, and none is needed: a thread holds
4 to 16 bytes that lie side by side, a warp whole sectors, and stores them from registers. Two 4-bit values that share a
byte are neighbours in a thread there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _check, _packed, _registers
from pallas_kernels._check import WIDTHS
from pallas_kernels._choose import Request, device_name
from pallas_kernels._interpret import interpreted_device, interpreter_would_hang
from pallas_kernels._packed import PACKED
from pallas_kernels._registers import MAGIC, mosaic
from pallas_kernels.arrange import _lanes, xla
from pallas_kernels.block_attention import ampere
from pallas_kernels.block_attention.hopper import HEAD_DIMS, padded_dim, why_not_here

BLOCKS = (64, 128)
STATISTIC_TOKENS = 256  # tokens whose sum or largest magnitude is one row of the first launch's output
_PROGRAMS = 65535  # that a launch may have along its second axis
_HELD = 16384  # values a program keeps in registers, 128 a thread, between finding their scale and rounding them


@dataclass(frozen=True)
class Tiles:
    """What one program makes."""

    tokens: int  # of kernel order
    chunk: int  # tokens fetched and rounded at a time

    def __post_init__(self) -> None:
        assert self.tokens % self.chunk == 0, f"{self=}"


def why_not(request: Request) -> str | None:
    """Serves sm_90 (and the interpreter, which stands for one) at every width."""
    return why_not_here(request) or unfit(request)


def unfit(request: Request) -> str | None:
    """What keeps the kernel from a request on any device."""
    if request.head_dim > HEAD_DIMS[-1]:
        return f"head_dim {request.head_dim} > {HEAD_DIMS[-1]}"
    if request.head_dim % 8:
        return f"head_dim {request.head_dim} is no multiple of 8, the channels that a thread fetches at once"
    for name, block in zip(("query", "key"), request.block, strict=True):
        if block not in BLOCKS:
            return f"block of {block} {name} tokens is not served; it serves {', '.join(map(str, BLOCKS))}"
    elements = request.batch * request.heads * max(request.q_tokens, request.kv_tokens) * request.head_dim
    if elements >= 2**31:
        return f"{elements} elements, and 2^31 or more are beyond an int32 address; split the batch"
    tokens, (tiles, *_) = request.kv_tokens, candidates(padded_dim(request.head_dim), "bf16", "row", 64, False)
    if -(-tokens // tiles.tokens) > _PROGRAMS:
        return f"{tokens} tokens of {request.head_dim} channels are more than {_PROGRAMS} programs of {tiles.tokens}"
    if interpreted_device() is not None:
        return interpreter_would_hang(4 * elements)
    return None


def candidates(dim: int, width: str, group: str, block: int, key_major: bool, pairs: bool = False) -> tuple[Tiles, ...]:
    """The tiles that serve, the one that should be fastest first: 32 values a thread, or the whole of a group.

    pairs: rows share bytes in pairs, so that half of them must be whole layouts.
    """
    chunk = 64 if key_major else {64: 64, 96: 64 if pairs else 32, 128: 32, 256: 16}[dim]
    tokens = block if group == "block" and width != "bf16" else chunk
    return (Tiles(tokens, chunk),)


@partial(jax.jit, static_argnames=("role", "width", "group", "block", "compute_mean", "layout", "direct"))
def run(x, slots, norm, rope, mean, *, role, width, group, block, compute_mean, layout="rows", direct=False):
    """See arrange; arguments are checked there. direct: without TMA, as on GPUs below sm_90."""
    options = _Options(role, width, group, block, compute_mean, layout, direct)
    arrays = _together(x, slots, norm, rope, mean)
    return _differentiable(options, *arrays) if width == "bf16" else _forward(options, *arrays)


def run_ampere(x, slots, norm, rope, mean, *, rotate=False, block_mean=False, **options):
    """`run` for the GPUs of the Ampere attention kernel, which have no TMA; what it does not serve XLA's passes do."""
    batch, tokens, heads, head_dim = x.shape
    role, width, block = options["role"], options["width"], options["block"]
    request = Request(
        "arrange", batch, heads, tokens, tokens, head_dim, str(x.dtype), (block, block), device=device_name(),
    )  # fmt: skip
    kernel = width in ampere.SERVED and options["group"] != "thread" and not (rotate or block_mean)
    kernel = kernel and not (role == "v" and (options["compute_mean"] or mean is not None))
    if kernel and unfit(request) is None:
        return run(x, slots, norm, rope, mean, direct=True, **options)
    return xla.run(x, slots, norm, rope, mean, rotate=rotate, block_mean=block_mean, **options)


class _Options(NamedTuple):
    role: str
    width: str
    group: str
    block: int
    compute_mean: bool
    layout: str
    direct: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(options, *arrays):
    return _forward(options, *arrays)


def _differentiable_fwd(options, *arrays):
    return _forward(options, *arrays), arrays


def _differentiable_bwd(options, arrays, cotangents):
    """XLA's: of the arguments, not of anything that a kernel made."""
    same = {name: option for name, option in options._asdict().items() if name != "direct"}
    return jax.vjp(partial(xla.run, **same), *arrays)[1](cotangents)


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


def _forward(options: _Options, x, slots, norm, rope, mean):
    role, width, group, block, compute_mean, layout, direct = options
    batch, tokens, heads, head_dim = x.shape
    dim = padded_dim(head_dim)
    key_major = layout != "rows" and role == "v" and width != "bf16"
    form = layout if width == "int4" else "rows"
    form = "hopper" if form == PACKED and role == "q" else form
    if layout == "ampere":
        dim = ampere.padded_dim(head_dim, "bf16" if role == "v" else width)
    (tiles, *_) = candidates(dim, width, group, block, key_major, form == PACKED)

    def per_head(weight):
        """[D], [H, D] or [B, H, D] as f32 [1 or B, H, D]."""
        weight = weight.astype(jnp.float32).reshape((1,) * (3 - weight.ndim) + weight.shape)
        return jnp.broadcast_to(weight, (weight.shape[0], heads, head_dim))

    def padded(weight):
        return jnp.pad(weight, ((0, 0), (0, 0), (0, dim - head_dim)))

    arrays = {"x": x.reshape(-1)}
    if slots is not None:
        arrays["slots"] = slots.reshape(-1)
    if rope is not None:
        arrays |= {"cos": rope.cos.astype(jnp.float32).reshape(-1), "sin": rope.sin.astype(jnp.float32).reshape(-1)}
    for name in ("scale", "bias"):
        if norm is not None and (weight := getattr(norm, name)) is not None:
            arrays[name] = padded(per_head(weight))[0]
    call = _Call(
        batch, heads, tokens, head_dim, dim, str(x.dtype), width, group, block, tiles, key_major, role == "v",
        form, None if norm is None else (norm.kind, norm.eps), direct,
        whole=layout == "ampere", interpreted=interpreted_device() is not None,
    )  # fmt: skip
    if compute_mean:
        mean = call.over_tokens("sum", arrays).sum(axis=2)[..., :head_dim] / tokens
    if mean is not None:
        mean = jnp.broadcast_to(per_head(mean), (batch, heads, head_dim))
        arrays["mean"] = padded(mean)
    scales = None
    if width != "bf16" and group == "channel":
        amax = call.over_tokens("amax", arrays).max(axis=2, keepdims=True)
        scales = jnp.maximum(amax, 1e-7) / WIDTHS[width].qmax
        arrays["channel"] = scales[:, :, 0]
    values, own = call.run(arrays)
    values = values if key_major or form == PACKED or layout == "ampere" else values[:, :, :tokens]
    scales = own if scales is None else scales
    if scales is not None and role == "v":
        scales = scales[..., :head_dim]
    elif scales is not None and group == "row":
        scales = scales[:, :, :tokens]
    values, scales, mean, _ = _check.share_mesh_axes(values, scales, mean, x)  # Mosaic's say nothing about a mesh
    return values[..., :head_dim] if layout == "rows" else values, scales, mean


def _together(*trees: Any) -> tuple[Any, ...]:
    """The arguments, all of their arrays varying over the same mesh axes."""
    leaves, structure = jax.tree.flatten(trees)
    return jax.tree.unflatten(structure, _check.share_mesh_axes(*leaves))


def bytes_moved(request: Request, *, width: str, group: str, rope: bool, compute_mean: bool = False) -> dict[str, int]:
    """Bytes that a call must read and write by shape alone, for a fraction of the copy bandwidth.

    "read", "written": of the launch that stores values. "first": of the launch before it, where a mean or a scale is
    over all tokens. "tables": of `read`, RoPE's tables once a head; memory sees them once if L2 holds them.
    """
    rows = request.batch * request.heads * request.kv_tokens
    size = jnp.dtype(request.dtype).itemsize
    dim, blocks = request.head_dim, -(-request.kv_tokens // request.block[1])
    tables = 4 * rows * dim if rope else 0
    slots = 4 * rows
    per_group = {"row": rows, "channel": 0, "block": request.batch * request.heads * blocks}[group]
    per_group *= dim if request.role == "v" else 1
    scales = 0 if width == "bf16" else 4 * per_group
    values = rows * dim * (size if width == "bf16" else 1)
    if width == "int4" and (request.layout == "ampere" or (request.layout == PACKED and request.role != "q")):
        values //= 2
    first = 0
    if compute_mean or (width != "bf16" and group == "channel"):
        sums = request.batch * request.heads * -(-request.kv_tokens // STATISTIC_TOKENS) * dim * 4
        first = rows * dim * size + tables + sums
    return {"read": rows * dim * size + tables + slots, "written": values + scales, "first": first, "tables": tables}


# ---- the kernel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One launch: its static facts, and the kernel as methods."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dim: int  # head_dim padded to what is stored
    dtype: str
    width: str
    group: str
    block: int
    tiles: Tiles
    key_major: bool  # values [B, H, dim, whole blocks] instead of [B, H, N, dim]
    by_channel: bool  # scales differ by channel
    form: str  # of bytes: "rows" is a value each, "hopper" its upper half, "hopper_packed" and "ampere" two values
    norm: tuple[str, float] | None
    direct: bool  # values go from registers to device memory, not through shared memory
    whole: bool  # whole blocks of tokens are stored, in every role
    interpreted: bool
    statistic: str = ""  # "sum" or "amax": write that of each channel instead of values

    @property
    def lanes(self) -> _lanes.Lanes:
        if self.key_major:
            return _lanes.columns()
        # 8 channels of bfloat16 are the 16 bytes of one load; Mosaic adds across warps what comes in fours at most.
        across_warps = self.statistic or (self.by_channel and self.group == "block")
        return _lanes.rows(self.dim, 4 if across_warps else 8)

    @property
    def pairs(self) -> bool:
        """Whether rows share bytes in pairs: keys j and j + 32 of each 64."""
        return self.form == PACKED and not self.key_major and not self.statistic

    @property
    def programs(self) -> int:
        whole = self.block if self.key_major or self.whole else max(self.tiles.tokens, 2 * _packed.KEYS * self.pairs)
        return -(-self.tokens // whole) * whole // self.tiles.tokens

    def over_tokens(self, statistic: str, arrays: dict[str, jax.Array]) -> jax.Array:
        """f32 [B, H, n, dim]: the sum or the largest magnitude of each channel over every 256 tokens."""
        arrays = {name: array for name, array in arrays.items() if name != "slots"}  # the order does not matter
        (tiles, *_) = candidates(self.dim, "bf16", "row", 64, False)
        tiles = Tiles(STATISTIC_TOKENS, tiles.chunk)
        call = replace(self, statistic=statistic, key_major=False, whole=False, tiles=tiles)
        out = jax.ShapeDtypeStruct((self.batch, self.heads, call.programs, self.dim), jnp.float32)
        return call.launch(arrays, [out])[0]

    def run(self, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """(values, scales f32 [B, H, whole tiles], [B, H, n], [B, H, n, dim], or None)."""
        lead, padded = (self.batch, self.heads), self.programs * self.tiles.tokens
        store = WIDTHS[self.width].store or jnp.dtype(self.dtype)
        # A bulk copy of rows takes them in whole eights, and plain stores know no end; the rest is cut off again.
        rows = padded if self.direct else -(-self.tokens // 8) * 8
        shape = (self.dim, padded) if self.key_major else (rows, self.dim)
        if self.form == "ampere":
            shape = (shape[0], shape[1] // 2)
        elif self.form == PACKED:
            shape = (self.dim // 2, padded) if self.key_major else (-(-self.tokens // 64) * _packed.KEYS, self.dim)
        out = [jax.ShapeDtypeStruct((*lead, *shape), store)]
        if self.width != "bf16" and self.group != "channel":
            shape = {"row": (padded,), "block": (self.programs,)}[self.group]
            out.append(jax.ShapeDtypeStruct((*lead, *shape, *((self.dim,) if self.by_channel else ())), jnp.float32))
        values, *scales = self.launch(arrays, out)
        return values, scales[0] if scales else None

    def launch(self, arrays: dict[str, jax.Array], out: list[Any]) -> list[jax.Array]:
        from jax.experimental import pallas as pl

        plgpu = mosaic()
        names = tuple(arrays)
        chunks, chunk = self.tiles.tokens // self.tiles.chunk, self.tiles.chunk
        rows, columns = (self.dim, chunk) if self.key_major else (chunk, self.dim)
        shape = (chunks, rows // 2 if self.form == PACKED else rows, columns)

        def kernel(*refs):
            gmem = dict(zip(names, refs[: len(names)], strict=True))
            if self.statistic:
                return self.summarise(gmem, refs[-1])
            values, scales = (refs[-2], refs[-1]) if len(out) == 2 else (refs[-1], None)
            if self.direct:
                return self.store(gmem, values, scales)
            return pl.run_scoped(partial(self.store, gmem, values, scales), plgpu.SMEM(shape, out[0].dtype))

        call = plgpu.kernel(
            kernel,
            out_type=tuple(out),
            grid=(self.batch, self.programs, self.heads),  # the last one runs fastest: heads lie side by side in x
            grid_names=("batch", "tile", "head"),
        )
        return call(*arrays.values())

    def place(self, chunk: Any, part: int) -> jax.Array:
        """int32 [rows]: the slot of kernel order that each row of a chunk's part holds; may lie past the last."""
        plgpu = mosaic()
        layout = self.lanes.tile.reduce(1)
        first = lax.axis_index("tile") * self.tiles.tokens + chunk * self.tiles.chunk
        rows = self.rows
        row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)
        if self.key_major:
            # The transpose puts row 4m + q of part s at column 16m + 4q + s; _registers.KEY_ORDER names its key.
            if self.form == "ampere":  # the same in _fragments.key_order, of which 32 keys are 8 rows
                eight = row & 7
                row = 4 * (row - eight) + 16 * (eight & 1) + 8 * (part >> 1) + (eight & 6) + (part & 1)
            else:
                four = row & 3
                row = 4 * (row - four) + 2 * four + (part & 1) + 8 * (part >> 1)
        if self.pairs:
            row = row + first // 2
            return 2 * row - (row & (_packed.KEYS - 1)) + _packed.KEYS * part
        return row + first

    @property
    def rows(self) -> int:
        """Rows of one part of a chunk."""
        return self.tiles.chunk // self.parts

    @property
    def parts(self) -> int:
        """Parts of a chunk: one, or what is to be joined to words or bytes."""
        return 4 if self.key_major else 1 + self.pairs

    def fetch(self, gmem: dict, chunk: Any) -> list[jax.Array]:
        """A chunk's values after norm, RoPE and mean, f32 [rows, dim] each: one part or several, to be joined."""
        return [self.part(gmem, self.place(chunk, part)) for part in range(self.parts)]

    def part(self, gmem: dict, place: jax.Array) -> jax.Array:
        plgpu = mosaic()
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        lanes, shape = self.lanes, (place.shape[0], self.dim)
        take = partial(_lanes.take, interpreted=self.interpreted)
        token = jnp.minimum(place, self.tokens - 1)
        if "slots" in gmem:
            token = take(gmem["slots"], token + head * self.tokens, lanes.tile.reduce(1))
            token = jnp.clip(token, 0, self.tokens - 1)  # wherever the list points, nothing outside is read

        def row(name, number, layout, pairs=1):
            """Row `number` of an array, one element for every `pairs` channels. Padding is some other element."""
            wide, channels = (shape[0], self.dim // pairs), self.head_dim // pairs
            column = plgpu.broadcasted_iota(jnp.int32, wide, 1, layout=layout)
            if wide[1] != channels:
                column = jnp.where(column < channels, column, column & (8 // pairs - 1))
            return take(gmem[name], lax.broadcast_in_dim(number * channels, wide, [0]) + column, layout)

        def by_row(vector):
            return lax.broadcast_in_dim(vector, shape, [0])

        def by_channel(ref):
            vector = plgpu.load(ref, layout=lanes.tile.reduce(0), optimized=False)
            return lax.broadcast_in_dim(vector, shape, [1])

        def real(y):
            """y with zeros in the channels that only pad."""
            if self.dim == self.head_dim:
                return y
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=lanes.tile)
            return jnp.where(column < self.head_dim, y, 0.0)

        number = (batch * self.tokens + token) * self.heads + head
        y = real(row("x", number, lanes.tile).astype(jnp.float32))
        if self.norm is not None:
            kind, eps = self.norm
            if kind == "layer":
                y = real(y - by_row(y.sum(axis=1) * (1.0 / self.head_dim)))
            y = y * by_row(lax.rsqrt((y * y).sum(axis=1) * (1.0 / self.head_dim) + eps))
            y = y * by_channel(gmem["scale"].at[head]) if "scale" in gmem else y
            y = y + by_channel(gmem["bias"].at[head]) if "bias" in gmem else y
        if "cos" in gmem:
            cos, sin = (row(name, token, lanes.pairs, 2) for name in ("cos", "sin"))
            y = _lanes.rotated(y, cos, sin, lanes, interpreted=self.interpreted)
        if "mean" in gmem:
            y = y - by_channel(gmem["mean"].at[batch, head])
        stored_whole = (self.key_major or self.pairs or self.whole) and self.tokens % max(self.block, 64)
        if stored_whole or (self.statistic == "sum" and self.tokens % self.tiles.tokens):
            y = jnp.where(by_row(place) < self.tokens, y, 0.0)
        return y

    def summarise(self, gmem: dict, out: Any) -> None:
        """The first launch, where one is needed: a statistic of each channel over the program's tokens."""
        plgpu = mosaic()
        head, tile, batch = (lax.axis_index(name) for name in ("head", "tile", "batch"))

        def step(chunk, carry):
            (y,) = self.fetch(gmem, chunk)
            return carry + y if self.statistic == "sum" else jnp.maximum(carry, jnp.abs(y))

        zeros = plgpu.layout_cast(jnp.zeros((self.tiles.chunk, self.dim), jnp.float32), self.lanes.tile)
        total = lax.fori_loop(0, self.tiles.tokens // self.tiles.chunk, step, zeros)
        found = total.sum(axis=0) if self.statistic == "sum" else total.max(axis=0)
        _registers.store(out.at[batch, head, tile], found)

    def store(self, gmem: dict, values: Any, scales: Any, smem: Any = None) -> None:
        """The launch that writes values, and their scales where they are its own."""
        from jax.experimental import pallas as pl

        plgpu = mosaic()
        head, tile, batch = (lax.axis_index(name) for name in ("head", "tile", "batch"))
        chunks = self.tiles.tokens // self.tiles.chunk
        # What is too much to keep is fetched again, from L2 where it still is; in a loop, or the compiler keeps it.
        held = [self.fetch(gmem, chunk) for chunk in range(chunks)] if self.tiles.tokens * self.dim <= _HELD else None

        def over_chunks(step: Callable[..., Any], carry: Any) -> Any:
            """step(chunk, its parts, carry) for each chunk."""
            if held is None:
                return lax.fori_loop(0, chunks, lambda chunk, carry: step(chunk, self.fetch(gmem, chunk), carry), carry)
            for chunk, parts in enumerate(held):
                carry = step(chunk, parts, carry)
            return carry

        def scale_of(amax):
            return jnp.maximum(amax, 1e-7) / WIDTHS[self.width].qmax

        inverse: Any = None  # of the scale, where one holds for all chunks
        if self.width != "bf16" and self.group == "channel":
            stored = plgpu.load(gmem["channel"].at[batch, head], layout=self.lanes.tile.reduce(0), optimized=False)
            inverse = 1.0 / stored
        elif self.width != "bf16" and self.group == "block":

            def larger(chunk, parts, carry):
                return reduce(jnp.maximum, map(jnp.abs, parts), carry)

            zeros = jnp.zeros((self.rows, self.dim), jnp.float32)
            largest = over_chunks(larger, plgpu.layout_cast(zeros, self.lanes.tile))
            scale = scale_of(largest.max(axis=0) if self.by_channel else largest.max(axis=1).max())
            inverse = 1.0 / scale
            if self.by_channel:
                _registers.store(scales.at[batch, head, tile], scale)
            else:
                scales[batch, head, tile] = scale

        def divided(y, inverse):
            if inverse is None or not inverse.ndim:
                return y if inverse is None else y * inverse
            return y * lax.broadcast_in_dim(inverse, y.shape, [1 if self.by_channel else 0])

        def rounded(ratios):
            """Ratios of at most qmax as they are stored, half to even: one array, or two that share bytes."""
            if self.width in ("bf16", "fp8"):
                return ratios[0].astype(values.dtype)
            # The low byte is the integer.
            integers = [lax.bitcast_convert_type(ratio + MAGIC, jnp.int32) for ratio in ratios]
            if self.form == "ampere":
                kind = self.lanes.transpose if self.key_major else self.lanes.tile
                return _lanes.halved(integers[0], kind, interpreted=self.interpreted)
            if self.form != "rows":
                integers[-1] = integers[-1] << 4
            if self.form == PACKED:
                integers = [integers[0] & 15 | integers[1]]
            return integers[0].astype(jnp.int8)

        def write(chunk, parts, carry):
            factors, first = [inverse] * self.parts, chunk * self.tiles.chunk
            if self.width != "bf16" and self.group == "row":
                factors = [1.0 / row_scale(scale_of(jnp.abs(y).max(axis=1)), first, n) for n, y in enumerate(parts)]
            ratios = [divided(y, factor) for y, factor in zip(parts, factors, strict=True)]
            if self.key_major:
                y = _lanes.transposed(ratios, interpreted=self.interpreted)
                half = self.dim // 2
                ratios = [y[:half], y[half:]] if self.form == PACKED else [y]
            stored = rounded(ratios)
            if self.direct:
                window = [pl.ds(extent * part, extent) for extent, part in zip(stored.shape, at(chunk), strict=True)]
                _registers.store(values.at[batch, head, *window], stored)
            else:
                _registers.store(smem.at[chunk], stored)
            return carry

        def at(chunk):
            """Which of the tiles that a chunk makes this is, downwards and across."""
            number = tile * chunks + chunk
            return (0, number) if self.key_major else (number, 0)

        def row_scale(scale, first, part):
            """Stores the scales of a part's rows, which lie side by side."""
            row = tile * self.tiles.tokens + first
            if self.pairs:
                row = row - (row // 2 & (_packed.KEYS - 1)) + _packed.KEYS * part
            _registers.store(scales.at[batch, head, pl.ds(row, self.rows)], scale)
            return scale

        over_chunks(write, None)
        if self.direct:
            return
        plgpu.commit_smem()
        for chunk in range(chunks):
            first = tile * self.tiles.tokens + chunk * self.tiles.chunk
            tokens = pl.ds(first, self.tiles.chunk)
            window = (
                (slice(None), tokens) if self.key_major else (pl.ds(first // 2, self.rows) if self.pairs else tokens,)
            )
            plgpu.copy_smem_to_gmem(smem.at[chunk], values.at[batch, head, *window])
        plgpu.wait_smem_to_gmem(0)
