"""Model order to kernel order: norm, RoPE, K smoothing, reorder and quantise, in one pass over one of q, k, v."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import _check, _choose, _fp4, _hadamard
from pallas_kernels._check import mistake, require_shape
from pallas_kernels._fragments import unpacked
from pallas_kernels._packed import PACKED
from pallas_kernels.arrange import mosaic, reference, xla
from pallas_kernels.block_attention import LAYOUTS, ampere
from pallas_kernels.block_attention.hopper import HEAD_DIMS


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "bias"], meta_fields=["kind", "eps"])
@dataclass(frozen=True)
class Norm:
    """A norm over the head dimension, in f32: "rms" (x / sqrt(mean x^2 + eps)), "layer" (less its mean first)."""

    kind: Literal["rms", "layer"]
    scale: jax.Array | None = None  # [D] or [H, D]
    bias: jax.Array | None = None  # [D] or [H, D]
    eps: float = 1e-6


@partial(jax.tree_util.register_dataclass, data_fields=["cos", "sin"], meta_fields=[])
@dataclass(frozen=True)
class Rope:
    """A rotation of the interleaved pairs (x[2i], x[2i + 1]) by model token. Rows that stay: cos 1, sin 0."""

    cos: jax.Array  # f32 [N, D / 2]
    sin: jax.Array  # f32 [N, D / 2]


BACKENDS = (
    # Until they have run on a GPU, they serve only whoever names them.
    _choose.Backend("hopper", mosaic.why_not, mosaic.run, default=False, layouts=("hopper", PACKED, "rows")),
    _choose.Backend("ampere", xla.why_not_ampere, mosaic.run_ampere, default=False, layouts=("ampere", "rows")),
    _choose.Backend("xla", xla.why_not, xla.run, layouts=LAYOUTS),
    _choose.Backend("reference", reference.why_not, reference.run, default=False, layouts=LAYOUTS),
)

GROUPS = {"q": ("row", "block", "thread"), "k": ("row", "block", "thread"), "v": ("channel", "block")}


def arrange(
    x: jax.Array,
    slots: jax.Array | None,
    *,
    role: Literal["q", "k", "v"],
    width: _check.Width,
    group: str,
    block: int,
    norm: Norm | None = None,
    rope: Rope | None = None,
    mean: jax.Array | Literal["compute", "block"] | None = None,
    rotate: bool = False,
    layout: Literal["rows", "hopper", "hopper_packed", "ampere"] = "rows",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """One of q, k, v in kernel order at its stored width: norm, then RoPE, then the K mean, then reorder and round.

    x [B, N, H, D] in model order; slots int32 [H, N]: kernel slot -> model token, None: the two orders are one.
    width, group: q and k take one scale per token ("row"), per block of `block` tokens or per "thread" (SageAttention2:
    queries equal modulo 8 of 32, four key pairs modulo 8 of a block, arXiv 2411.10958); v one per channel, or per block
    and channel. `group` has no effect at width "bf16", nor at "fp4", whose groups are 16 channels of q and k and 16
    tokens of v.
    mean: what is subtracted before rounding. Of k and v: None, "compute" (over the N tokens) or an array f32 [H, D] or
    [B, H, D] (SageAttention, arXiv 2410.02367, section 4.2). Of q: None or "block", the mean of each block of `block`
    tokens in kernel order (SageAttention2, section 3.1).
    rotate: q and k only; turn the channels by a fixed random-sign Hadamard matrix after the mean, q and k alike.
    layout: "rows", or "hopper", which that attention kernel reads as it is: D padded with zeros to 64, 96, 128 or 256,
    and v below 16 bits with its keys side by side, [B, H, D, N up to whole blocks], in the order
    `_registers.KEY_ORDER` inside each 16. Width int4 is in the upper halves of bytes there. Or
    "hopper_packed": k and v are two to a byte, k [B, H, 32 ceil(N / 64), D] with keys j and j + 32 of each 64 sharing
    bytes, v [B, H, D / 2, N up to whole blocks] with channels c and c + D / 2, the former in the lower halves. Or
    "ampere": N up to whole blocks, D padded to 64, 96 or 128 (of q and k at int4 not to 96), int8 and int4 v keys side
    by side by `_fragments.key_order`, int4 two to a byte along the last axis.

    Returns (values [B, H, N, D], scales, the mean that was subtracted or None: f32 [B, H, D], of k not rotated, and
    [B, H, n, D], rotated, for "block"). scales: None at widths "bf16" and "fp4" (stored multiplied out), else f32
    [B, H, N] ("row", "thread"), [B, H, n] (q, k "block"), [B, H, 1, D] ("channel") or [B, H, n, D] (v "block"), with
    scale = max(amax, 1e-7) / qmax, so a group of zeros is zeros.
    Raises ValueError for arguments that do not fit together, NoBackend when no backend serves the request. Quantised
    widths have no gradient: differentiating through them raises ValueError.
    """
    if role not in GROUPS:
        raise mistake("role", "'q', 'k' or 'v'", repr(role))
    _check.require_width("width", width)
    if group not in GROUPS[role]:
        raise mistake("group", f"{' or '.join(map(repr, GROUPS[role]))} for role {role!r}", repr(group))
    (block, _) = _check.require_block((block, 1))
    require_shape("x", x, (None,) * 4, "[batch, tokens, heads, head_dim]")
    batch, tokens, heads, head_dim = x.shape
    if 0 in x.shape:
        raise mistake("x", "at least one batch entry, token, head and channel", f"shape {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise mistake("x", "float32, bfloat16 or float16", str(x.dtype))
    if slots is not None:
        _check.require_slots(slots, heads, tokens)
    if norm is not None:
        if norm.kind not in ("rms", "layer"):
            raise mistake("norm.kind", "'rms' or 'layer'", repr(norm.kind))
        for name, weight in (("norm.scale", norm.scale), ("norm.bias", norm.bias)):
            if weight is not None and tuple(weight.shape) not in ((head_dim,), (heads, head_dim)):
                raise mistake(name, f"shape [{head_dim}] or [{heads}, {head_dim}]", f"shape {list(weight.shape)}")
    if rope is not None:
        if head_dim % 2:
            raise mistake("rope", "an even head_dim, whose channels pair up", f"head_dim {head_dim}")
        require_shape("rope.cos", rope.cos, (tokens, head_dim // 2), "[tokens, head_dim / 2]")
        require_shape("rope.sin", rope.sin, (tokens, head_dim // 2), "[tokens, head_dim / 2]")
    if group == "thread" and role == "k" and width != "bf16" and block % 8:
        raise mistake("block", "a multiple of 8 keys, which four threads share, with group 'thread'", block)
    if rotate and (role == "v" or _hadamard.size(head_dim) == 1):
        raise mistake("rotate", "False for role 'v' and for an odd head_dim", f"{rotate}, {role!r}, {head_dim}")
    if width == "fp4" and (head_dim if role != "v" else block) % _fp4.GROUP:
        raise mistake("width", "head_dim and block in multiples of 16 for 'fp4'", f"head_dim {head_dim}, block {block}")
    if mean is not None:
        if role == "q" and not (isinstance(mean, str) and mean == "block"):
            raise mistake("mean", "None or 'block' for role 'q'", _describe(mean), "One mean for all q is not exact.")
        if isinstance(mean, str):
            if mean != "compute" and role != "q":
                raise mistake("mean", "None, 'compute' or an array", repr(mean))
        elif tuple(mean.shape) not in ((heads, head_dim), (batch, heads, head_dim)):
            shapes = f"shape [{heads}, {head_dim}] or [{batch}, {heads}, {head_dim}]"
            raise mistake("mean", shapes, f"shape {list(mean.shape)}")

    if layout not in LAYOUTS:
        raise mistake("layout", " or ".join(map(repr, LAYOUTS)), repr(layout))
    if layout != "rows" and (head_dim > HEAD_DIMS[-1] or block % 16):
        raise mistake(
            "layout", f"head_dim at most {HEAD_DIMS[-1]} and a block of whole 16s for {layout!r}",
            f"head_dim {head_dim} and block {block}",
        )  # fmt: skip

    if layout == "ampere" and (head_dim > ampere.HEAD_DIMS[-1] or block % 64 or width not in ampere.SERVED):
        raise mistake(
            "layout",
            f"head_dim <= {ampere.HEAD_DIMS[-1]}, a block of whole 64s and {', '.join(ampere.SERVED)} for 'ampere'",
            f"head_dim {head_dim}, block {block} and {width}",
        )

    request = _choose.Request(
        op="arrange",
        batch=batch,
        heads=heads,
        q_tokens=tokens,
        kv_tokens=tokens,
        head_dim=head_dim,
        dtype=str(x.dtype),
        block=(block, block),
        qk="bf16" if role == "v" else width,
        pv=width if role == "v" else "bf16",
        device=_choose.device_name(),
        role=role,
        layout=layout,
        features=tuple(
            feature
            for feature, asked in (
                ("thread-groups", group == "thread" and width != "bf16"),
                ("rotation", rotate),
                ("q-mean", role == "q" and mean is not None),
                ("v-mean", role == "v" and mean is not None),
            )
            if asked
        ),
    )
    backend = _choose.choose(request, BACKENDS, implementation)
    compute_mean = isinstance(mean, str) and mean == "compute"
    options = dict(role=role, width=width, group=group, block=block, compute_mean=compute_mean, layout=layout)
    # Named only where asked for: a backend that does not serve them need not know them.
    options |= {"rotate": True} if rotate else {}
    options |= {"block_mean": True} if isinstance(mean, str) and role == "q" else {}
    run = partial(backend.run, **options)
    arrays = (x, slots, norm, rope, None if isinstance(mean, str) else mean)
    return run(*arrays) if width == "bf16" else _check.no_gradient(run, *arrays)


def stored_rows(values: jax.Array, *, width: str, layout: str, tokens: int, head_dim: int) -> jax.Array:
    """q as `arrange` stores it in any layout -> [B, H, tokens, head_dim], not scaled."""
    if width == "int4" and layout != "rows":
        values = unpacked(values) if layout == "ampere" else values >> 4
    return values[:, :, :tokens, :head_dim]


def _describe(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"an array of shape {list(value.shape)}"
