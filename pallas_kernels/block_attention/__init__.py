"""Attention over kept blocks: q, k, v in kernel order in, model order out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _check, _choose, _packed, _tiles
from pallas_kernels._check import mistake, require_shape
from pallas_kernels.block_attention import ampere, hopper, reference, xla

LAYOUTS = ("rows", "hopper", _packed.PACKED, "ampere")
BACKENDS = (
    # Until they have run on a GPU, they serve only whoever names them.
    _choose.Backend(
        "hopper",
        hopper.why_not,
        hopper.run,
        default=False,
        layouts=("hopper", _packed.PACKED, "rows"),
        candidates=hopper.candidates,
    ),
    _choose.Backend(
        "ampere",
        ampere.why_not,
        ampere.run,
        default=False,
        layouts=("ampere", "rows"),
        candidates=ampere.candidates,
    ),
    _choose.Backend("xla", xla.why_not, xla.run, candidates=xla.candidates),
    _choose.Backend("reference", reference.why_not, reference.run, default=False),
)


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    count: jax.Array,
    index: jax.Array,
    *,
    block: tuple[int, int],
    scale: float,
    slots: jax.Array | None = None,
    qk: _check.Width = "bf16",
    pv: _check.Width = "bf16",
    p_scale: str = "block",
    q_scale: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    delta: jax.Array | None = None,
    out_dtype: Any = None,
    layout: str = "rows",
    head_dim: int | None = None,
    q_tokens: int | None = None,
    kv_tokens: int | None = None,
    implementation: str | None = None,
    tiles: Any = None,
    return_residual: bool = False,
) -> Any:
    """softmax(scale * q k^T) v over the kept blocks, renormalised over them (PAROAttention, section 3.2).

    q [B, H, Nq, D]; k, v [B, H, Nk, D]: kernel order, at their stored width: float32, bfloat16 or float16 for "bf16",
    int8 for "int8" and "int4", float8_e4m3fn for "fp8", bfloat16 for "fp4", which has no scales beside its values.
    count int32 [H, nq]; index int32 [H, nq, nk]: the kept key blocks of each query block, packed left, in the sequence
    in which they are walked, none twice; entries past count are ignored. nq = ceil(Nq / bq), nk = ceil(Nk / bk). Traced
    values out of range are clamped. A walk changes the result by rounding alone.
    slots int32 [H, Nq]: kernel slot -> model token of the queries; None: kernel order is model order.
    q_scale f32 [B, H, Nq] or [B, H, nq]; k_scale f32 [B, H, Nk] or [B, H, nk]; v_scale f32 [B, H, 1, D] or
    [B, H, nk, D]: what a stored value is multiplied by, per token or block (v: per channel, or block and channel).
    p_scale: P is rounded relative to its row's maximum in the key block ("block") or to the running one ("running"),
    that over the blocks walked so far.
    delta f32 [B, H, nq, Nk]: added to q k^T of all queries of a block, before `scale` (SageAttention2's delta S, arXiv
    2411.10958: what q k^T lacks when a block's mean query was subtracted; as there, nq Nk numbers a head).
    layout: "rows", or that of `arrange` which made the operands (it says what they look like), "hopper",
    "hopper_packed" or "ampere"; then head_dim is how many of the padded channels are real, and q_tokens and kv_tokens
    how many tokens, which whole blocks and a packed K do not show.
    tiles: one of the backend's `candidates`; None: the fastest in this device's table (`paro bench --tune`), else the
    first.
    out_dtype: default v's dtype, else q's, where that is a float, else float32.

    Returns o [B, Nq, H, D] in model order; with return_residual also lse f32 [B, Nq, H], the natural log-sum-exp of the
    kept scores. A row with no kept block gives 0 and -inf.
    Raises ValueError for arguments that do not fit together, NoBackend when no backend serves the request. Quantised
    widths have no gradient: differentiating through them raises ValueError.
    """
    bq, bk = _check.require_block(block)
    scale = _check.require_scale(scale)
    for argument, width in (("qk", qk), ("pv", pv)):
        _check.require_width(argument, width)
    if p_scale not in ("block", "running"):
        raise mistake("p_scale", "'block' or 'running'", repr(p_scale))
    require_shape("q", q, (None,) * 4, "[batch, heads, query tokens, head_dim]")
    batch, heads = q.shape[:2]
    if layout not in LAYOUTS:
        raise mistake("layout", " or ".join(map(repr, LAYOUTS)), repr(layout))
    given = (q_tokens, kv_tokens, head_dim)
    require = _require_ampere if layout == "ampere" else _require_hopper
    q_tokens, kv_tokens, head_dim = require(q, k, v, given, block=(bq, bk), widths=(qk, pv), layout=layout)
    if 0 in (batch, heads, q_tokens, kv_tokens, head_dim):
        raise mistake("q, k", "at least one batch entry, head, token and channel", f"{q.shape} and {k.shape}")

    stored = {"q": _stored(q, "q", qk), "k": _stored(k, "k", qk), "v": _stored(v, "v", pv)}
    floats = {name: array.dtype for name, array in (("q", q), ("k", k), ("v", v)) if not stored[name]}
    if len(set(floats.values())) > 1:
        raise mistake(
            " and ".join(floats), "one dtype for all unquantised operands", ", ".join(map(str, floats.values()))
        )
    if out_dtype is None:
        out_dtype = next(iter(floats.values()), jnp.dtype(jnp.float32))
    elif jnp.dtype(out_dtype).name not in _check.FLOATS:
        raise mistake("out_dtype", "None, float32, bfloat16 or float16", str(jnp.dtype(out_dtype)))
    out_dtype = jnp.dtype(out_dtype)

    nq, nk = -(-q_tokens // bq), -(-kv_tokens // bk)
    require_shape("count", count, (heads, nq), "[heads, query blocks]")
    require_shape("index", index, (heads, nq, nk), "[heads, query blocks, key blocks]")
    _check.require_int32("count", count)
    _check.require_int32("index", index)
    _require_schedule(count, index, nk)
    if slots is not None:
        _check.require_slots(slots, heads, q_tokens)
    _require_scales("q_scale", q_scale, "qk", qk, [(batch, heads, q_tokens), (batch, heads, nq)])
    _require_scales("k_scale", k_scale, "qk", qk, [(batch, heads, kv_tokens), (batch, heads, nk)])
    _require_scales("v_scale", v_scale, "pv", pv, [(batch, heads, 1, head_dim), (batch, heads, nk, head_dim)])
    if delta is not None:
        require_shape("delta", delta, (batch, heads, nq, kv_tokens), "[batch, heads, query blocks, key tokens]")
        if delta.dtype != jnp.float32:
            raise mistake("delta", "dtype float32", f"dtype {delta.dtype}")
        if qk == "bf16":
            raise mistake("delta", "None at qk='bf16', which has nothing to make up for", "an array")

    request = _choose.Request(
        op="block_attention",
        batch=batch,
        heads=heads,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        head_dim=head_dim,
        dtype=str(next(iter(floats.values()), out_dtype)),
        block=(bq, bk),
        qk=qk,
        pv=pv,
        p_scale=p_scale,
        device=_choose.device_name(),
        layout=layout,
        features=() if delta is None else ("delta",),
    )
    backend = _choose.choose(request, BACKENDS, implementation)
    options = dict(block=(bq, bk), scale=scale, qk=qk, pv=pv, p_scale=p_scale, out_dtype=out_dtype)
    tiles = _tiles.measured(request, backend) if tiles is None else _tiles.candidate(tiles, request, backend)
    options |= {} if tiles is None else {"tiles": tiles}
    if layout != "rows":
        options |= dict(layout=layout, kv_tokens=kv_tokens)
    if layout == "ampere":
        options |= dict(q_tokens=q_tokens, head_dim=head_dim)
    run = partial(backend.run, **options)
    arrays = (q, k, v, count, index, slots, q_scale, k_scale, v_scale, *(() if delta is None else (delta,)))
    o, lse = run(*arrays) if qk == pv == "bf16" else _check.no_gradient(run, *arrays)
    o = o[..., :head_dim]
    return (o, lse) if return_residual else o


def operand_layout(request: _choose.Request, implementation: str | None) -> str:
    """How to arrange the operands of `request`: in the layout of the backend that will get them.

    request.layout "rows" asks; any other is the answer. Raises NoBackend when none is named and none can serve.
    """
    if request.layout != "rows":
        return request.layout
    named = [backend for backend in BACKENDS if backend.name == implementation]
    (backend,) = named or [_choose.choose(request, BACKENDS, implementation)]
    return backend.layouts[0]


def reader(layout: str) -> str | None:
    """The only backend that reads `layout`, or None where there are others."""
    able = [backend.name for backend in BACKENDS if layout in backend.layouts]
    return able[0] if len(able) == 1 else None


def _require_hopper(q, k, v, given, *, block, widths, layout) -> tuple[int, int, int]:
    """(query tokens, key tokens, head_dim) of operands in layout "rows" or Hopper's, or ValueError where they do not
    fit."""
    q_tokens, kv_tokens, head_dim = given
    (batch, heads, tokens, channels), (qk, pv), bk = q.shape, widths, block[1]
    if q_tokens not in (None, tokens):
        raise mistake("q_tokens", f"None or {tokens}, as in q, for layout {layout!r}", q_tokens)
    require_shape("k", k, (batch, heads, None, channels), "[batch, heads, key tokens, head_dim] as q's")
    packed = hopper.packed(qk, pv, layout)
    least, most = (2 * k.shape[2] - 2 * _packed.KEYS + 1, 2 * k.shape[2]) if "k" in packed else (k.shape[2],) * 2
    if kv_tokens is None and "k" in packed:
        raise mistake("kv_tokens", f"{least} to {most} for a packed k of {k.shape[2]} rows", None)
    kv_tokens = k.shape[2] if kv_tokens is None else kv_tokens
    if not least <= kv_tokens <= most or ("k" in packed and k.shape[2] % _packed.KEYS):
        raise mistake("kv_tokens", f"{least} to {most} for a k of {k.shape[2]} rows", kv_tokens)
    head_dim = channels if head_dim is None else head_dim
    if (head_dim != channels) if layout == "rows" else not 0 < head_dim <= channels:
        raise mistake("head_dim", f"None or at most the {channels} channels of q, and all of them for 'rows'", head_dim)
    if layout != "rows" and channels not in hopper.HEAD_DIMS:
        served = ", ".join(map(str, hopper.HEAD_DIMS))
        raise mistake("q", f"{served} channels for layout {layout!r}", channels, "pallas_kernels.arrange makes it.")
    if layout != "rows" and pv != "bf16":
        shape = (batch, heads, channels // 2 if "v" in packed else channels, -(-kv_tokens // bk) * bk)
        require_shape("v", v, shape, "[batch, heads, head_dim (packed: half), key tokens up to whole blocks]")
    else:
        require_shape("v", v, (batch, heads, kv_tokens, channels), "[batch, heads, key tokens, head_dim] as k's")
    return tokens, kv_tokens, head_dim


def _require_ampere(q, k, v, given, *, block, widths, layout) -> tuple[int, int, int]:
    """The same of layout "ampere", whose shapes follow from the three numbers."""
    q_tokens, kv_tokens, head_dim = given
    most = ampere.HEAD_DIMS[-1]
    for name, number in (("q_tokens", q_tokens), ("kv_tokens", kv_tokens)):
        if not isinstance(number, int) or number < 1:
            raise mistake(name, f"how many tokens are real, for layout {layout!r}, which has whole blocks", number)
    if not isinstance(head_dim, int) or not 0 < head_dim <= most:
        raise mistake("head_dim", f"1 to {most} real channels for layout {layout!r}", head_dim)
    (bq, bk), (qk, pv) = block, widths
    for name, x, width, tokens, size in (
        ("q", q, qk, q_tokens, bq), ("k", k, qk, kv_tokens, bk), ("v", v, pv, kv_tokens, bk)
    ):  # fmt: skip
        shape = (*q.shape[:2], *ampere.stored_shape(name, width, tokens, head_dim, size))
        require_shape(name, x, shape, f"[batch, heads, ...] as arrange stores it in layout {layout!r}")
    return q_tokens, kv_tokens, head_dim


def _stored(array: jax.Array, name: str, width: str) -> bool:
    """Whether `array` holds a quantised width; ValueError when its dtype is not the one `width` is stored at."""
    store = _check.WIDTHS[width].store
    if store is None:
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
            raise mistake(name, "float32, bfloat16 or float16 at width 'bf16'", str(array.dtype))
        return False
    if array.dtype != store:
        raise mistake(
            name, f"{jnp.dtype(store).name} at width {width!r}", str(array.dtype), "pallas_kernels.arrange makes it."
        )
    return True


def _require_schedule(count: jax.Array, index: jax.Array, nk: int) -> None:
    """Raise ValueError where the values of count and index are known and wrong."""
    counts, indices = _check.concrete(count), _check.concrete(index)
    if counts is None or indices is None:
        return
    if counts.min() < 0 or counts.max() > nk:
        raise mistake("count", f"0 to {nk} kept key blocks", f"{counts.min()} to {counts.max()}")
    used = np.arange(nk) < counts[..., None]
    if not ((indices >= 0) & (indices < nk) | ~used).all():
        raise mistake(
            "index",
            f"kept key blocks 0 to {nk - 1} in the first `count` entries",
            f"{indices.min()} to {indices.max()}",
        )
    # Entries past count become numbers of their own, so that only a repeat is equal to its neighbour.
    walked = np.sort(np.where(used, indices, np.arange(nk, 2 * nk, dtype=indices.dtype)), axis=-1)
    if (walked[..., 1:] == walked[..., :-1]).any():
        raise mistake("index", "each kept key block once", "a row with a repeat", "BlockMask.schedule() makes it.")


def _require_scales(argument: str, scales: Any, widths: str, width: str, shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless `scales` is f32 of one of `shapes` exactly when `width` is quantised."""
    if (scales is None) != (width in ("bf16", "fp4")):
        found = "None" if scales is None else f"an array of shape {list(scales.shape)}"
        wanted = "None" if width in ("bf16", "fp4") else "scales"
        raise mistake(argument, f"{wanted} at {widths}={width!r}", found)
    if scales is None:
        return
    if tuple(scales.shape) not in shapes:
        raise mistake(argument, f"shape {' or '.join(str(list(s)) for s in shapes)}", f"shape {list(scales.shape)}")
    if scales.dtype != jnp.float32:
        raise mistake(argument, "dtype float32", f"dtype {scales.dtype}")
