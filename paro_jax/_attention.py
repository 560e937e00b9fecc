"""The verbs: bring q, k and v into kernel order, attend over kept blocks, return in model order.

`attention` composes `arrange` three times and `attend`; a model that folds the reorder into its projections
calls `project_in` and `attend`. Everything here checks and names; pallas_kernels computes.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import Norm, Request, Rope, _hadamard, device_name
from pallas_kernels._check import concrete
from pallas_kernels.arrange import arrange as _kernel_arrange
from pallas_kernels.arrange import stored_rows
from pallas_kernels.block_attention import block_attention as _kernel_block_attention
from pallas_kernels.block_attention import operand_layout, reader
from paro_jax._grid import TokenGrid
from paro_jax._plan import AttentionPlan
from paro_jax._quant import QuantSpec, Width

Role = Literal["q", "k", "v"]

_DTYPES = ("float32", "bfloat16", "float16")
_ARGUMENTS = {"q": "query", "k": "key", "v": "value"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """One of q, k, v in kernel order, at its stored width; a pytree. Made by `arrange` or `project_in`, for `attend`.

    `values`; `scales`: float32, one per group, None at widths "bf16" and "fp4"; `mean`: float32, the mean that was
    subtracted or None: [B, heads, D] of K or V, [B, heads, nq, D] of the query blocks; `order`: int8 [heads]; `exact`:
    K before rounding, where the query means need it (`smooth_q`), or None. Static: `role`, `width`, the `grid` and
    `block` of its plan, the `group` that one scale covers, `dtype` before quantisation, `head_dim`, `layout`, of the
    backend, and `rotated`: whether the channels were turned (`qk_rotate`). `values` is [B, heads, N, D] in layout
    "rows"; pallas_kernels.arrange says what others look like.
    """

    values: jax.Array
    scales: jax.Array | None
    mean: jax.Array | None
    order: jax.Array
    role: Role = field(metadata=dict(static=True))
    width: Width = field(metadata=dict(static=True))
    grid: TokenGrid = field(metadata=dict(static=True))
    block: tuple[int, int] = field(metadata=dict(static=True))
    group: str = field(metadata=dict(static=True))
    dtype: str = field(metadata=dict(static=True))
    layout: str = field(metadata=dict(static=True))
    head_dim: int = field(metadata=dict(static=True))
    exact: jax.Array | None = None
    rotated: bool = field(default=False, metadata=dict(static=True))


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    plan: AttentionPlan | None = None,
    scale: float | None = None,
    quant: QuantSpec | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Drop-in for `jax.nn.dot_product_attention`; with a plan, block-sparse quantised attention in each head's order.

    Without a plan this is `jax.nn.dot_product_attention`, with the arguments it shares. With one, `query`, `key` and
    `value` are [B, N, heads, D] in model order, float32, bfloat16 or float16, and so is the result. `scale`: a plain
    number, None for 1/sqrt(D). `quant` overrides `plan.quant`. `implementation`: with a plan a backend of
    `pallas_kernels` ("xla", "hopper", "ampere", "reference"), without one what jax.nn takes; None chooses.
    `return_residual`: also return the log-sum-exp of the kept scores, natural log, float32 [B, N, heads], of the K that
    came in, smoothed or not.

    A skipped block leaves the softmax altogether, its denominator included; a query with no kept block gets 0 and -inf
    (PAROAttention, arXiv 2506.16054).

    Raises ValueError for what a plan cannot honour: `bias`, an element `mask`, grouped heads, shapes or dtypes that do
    not fit, a plan with leading axes; and for a scale that is not a finite plain number. Raises NoBackend when no
    backend serves the request.
    """
    scale = _check_scale(scale)
    if plan is None:
        if quant is not None:
            raise ValueError(
                f"quant needs a plan: expected plan=AttentionPlan or quant=None; got plan=None and {quant}. "
                "AttentionPlan.dense(grid, heads=..., quant=quant) keeps every block."
            )
        return _unplanned(query, key, value, bias, mask, scale, implementation, return_residual)
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None:
            raise ValueError(
                f"{name} must be None with a plan, which skips whole blocks and knows no single elements; got "
                f"{_describe(given)}. Drop it, put whole blocks into the plan's BlockMask, or call without a plan."
            )
    plan = _check_plan(plan, quant)
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_tokens(name, x, plan, like=query)
    return _planned(query, key, value, plan, scale, implementation, return_residual)


def arrange(
    x: Any,
    *,
    plan: AttentionPlan,
    role: Role,
    norm: Norm | None = None,
    rope: Rope | None = None,
    implementation: str | None = None,
) -> TokenBlocks:
    """x [B, N, heads, D] in model order -> kernel order at the plan's width: norm, RoPE, K mean, reorder, round.

    `role`: "q", "k" or "v". `norm` and `rope` see the tokens in model order, before they move. K is smoothed when the
    plan quantises QK^T: by `plan.k_mean` if it has one, else by the mean over its tokens. A plan of mixed widths
    (`with_wide`) leaves the rounding to `attend`.

    Raises ValueError for arguments that do not fit, NoBackend when no backend serves the request.
    """
    plan = _check_plan(plan)
    _check_role(role)
    x = jnp.asarray(x)
    _check_tokens("x", x, plan)
    _check_extras(norm, rope)
    return _arranged(x, plan, role, norm, rope, implementation)


def project_in(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    plan: AttentionPlan,
    role: Role,
    norm: Norm | None = None,
    rope: Rope | None = None,
    implementation: str | None = None,
) -> TokenBlocks:
    """A projection that stores where attention wants it: x [B, N, C], kernel [C, heads, D], bias [heads, D].

    Matmul and bias at the promoted dtype of x and kernel, then as `arrange`. Raises as `arrange` does.
    """
    plan = _check_plan(plan)
    _check_role(role)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 3 or x.shape[1] != plan.grid.tokens:
        raise ValueError(f"x must be [batch, tokens = {plan.grid.tokens}, channels]; got shape {list(x.shape)}.")
    if kernel.ndim != 3 or kernel.shape[:2] != (x.shape[2], plan.heads):
        raise ValueError(
            f"kernel must be [channels = {x.shape[2]}, heads = {plan.heads}, head_dim]; got {list(kernel.shape)}. "
            "Reshape a [channels, heads * head_dim] kernel."
        )
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != kernel.shape[1:]:
            raise ValueError(
                f"bias must be [heads, head_dim] = {list(kernel.shape[1:])}; got shape {list(bias.shape)}."
            )
    _check_dtype("x", x)
    _check_dtype("kernel", kernel)
    _check_extras(norm, rope)
    return _projected(x, kernel, bias, plan, role, norm, rope, implementation)


def attend(
    q: TokenBlocks,
    k: TokenBlocks,
    v: TokenBlocks,
    *,
    plan: AttentionPlan,
    scale: float | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention over the plan's kept blocks: kernel order in, model order [B, N, heads, D] out, at the model's dtype.

    `return_residual`: as in `attention`, with q as it is stored. Raises ValueError when q, k and v were not arranged
    for this plan and for each other (role, grid, block, width, layout, shape), NoBackend when no backend serves the
    request.
    """
    scale = _check_scale(scale)
    plan = _check_plan(plan)
    layout = q.layout if isinstance(q, TokenBlocks) else "rows"
    if implementation is None:
        implementation = reader(layout)
    elif isinstance(q, TokenBlocks):
        layout = _layout(plan, q.values.shape[0], q.head_dim, q.dtype, implementation)
    _check_blocks(q, k, v, plan, layout)
    return _attended(q, k, v, plan, scale, implementation, return_residual)


def _unplanned(query, key, value, bias, mask, scale, implementation, return_residual):
    dense = partial(jax.nn.dot_product_attention, bias=bias, mask=mask, scale=scale, implementation=implementation)
    if not return_residual:
        return dense(query, key, value)
    dtype = jnp.asarray(query).dtype
    if dtype == jnp.float32 or dtype == jnp.float64:
        return dense(query, key, value, return_residual=True)
    if implementation == "cudnn":
        raise ValueError(
            f"return_residual must be False with cuDNN, which rounds the log-sum-exp to {dtype} where we promise "
            'float32; got True. Use implementation=None or "xla", float32 inputs, or a plan.'
        )
    # jax.nn casts the log-sum-exp to the output's dtype; only a float32 call still has it whole.
    _, residual = dense(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), return_residual=True)
    return dense(query, key, value), residual


@partial(jax.jit, static_argnames=("scale", "implementation", "return_residual"))
def _planned(query, key, value, plan, scale, implementation, return_residual):
    q, k, v = (
        _arranged(x, plan, role, None, None, implementation) for role, x in (("q", query), ("k", key), ("v", value))
    )
    return _attended(q, k, v, plan, scale, implementation, return_residual, query)


@partial(jax.jit, static_argnames=("role", "implementation"))
def _projected(x, kernel, bias, plan, role, norm, rope, implementation):
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    y = jnp.einsum("bnc,chd->bnhd", x.astype(dtype), kernel.astype(dtype))
    if bias is not None:
        y = y + bias.astype(dtype)[None, None]
    return _arranged(y, plan, role, norm, rope, implementation)


@partial(jax.jit, static_argnames=("role", "implementation"))
def _arranged(x, plan, role, norm, rope, implementation) -> TokenBlocks:
    layout = _layout(plan, x.shape[0], x.shape[-1], str(x.dtype), implementation)
    return _rounded(x, plan.slots, plan, _arranged_at(plan), role, norm, rope, layout, implementation)


def _arranged_at(plan: AttentionPlan) -> QuantSpec:
    """The widths that `arrange` rounds to: those of the plan, or none yet where a site may have one of two."""
    return plan.quant if plan.wide is None else QuantSpec()


def _rounded(x, slots, plan, quant: QuantSpec, role, norm, rope, layout, implementation) -> TokenBlocks:
    """x [B, N, heads, D], whose kernel slots are `slots` (None: it is in kernel order), as `quant` says."""
    mean = "block" if role == "q" and quant.smooths_q else "compute" if role == "v" and quant.smooths_v else None
    if role == "k" and quant.smooths_k:
        mean = "compute" if plan.k_mean is None else plan.k_mean
        if plan.k_mean is not None and plan.k_mean.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"key must have head_dim {plan.k_mean.shape[-1]}, that of plan.k_mean; got {x.shape[-1]}. The plan was "
                "calibrated for another model."
            )
    stored = partial(
        _kernel_arrange,
        x,
        slots,
        role=role,
        group=quant.group(role),
        block=plan.block[0] if role == "q" else plan.block[1],
        norm=norm,
        rope=rope,
        rotate=quant.rotates(role),
        layout=layout,
        implementation=implementation,
    )
    values, scales, mean = stored(width=quant.width(role), mean=mean)
    exact = stored(width="bf16", mean=mean, layout="rows")[0] if role == "k" and quant.smooths_q else None
    return TokenBlocks(
        values,
        scales,
        mean,
        plan.order,
        role,
        quant.width(role),
        plan.grid,
        plan.block,
        quant.group(role),
        str(x.dtype),
        layout,
        x.shape[-1],
        exact,
        quant.rotates(role),
    )


@partial(jax.jit, static_argnames=("scale", "implementation", "return_residual", "tiles"))
def _attended(
    q: TokenBlocks,
    k: TokenBlocks,
    v: TokenBlocks,
    plan: AttentionPlan,
    scale,
    implementation,
    return_residual,
    query=None,
    schedule=None,  # (count, index, slots) where they were unpacked before, and the backend's tiles: for `paro bench`
    tiles=None,
):
    if plan.wide is not None:

        def at(quant):
            local = replace(plan, quant=quant, wide=None, wide_quant=None)
            layout = _layout(local, q.values.shape[0], q.head_dim, q.dtype, implementation)
            # [B, heads, N, D] in kernel order back to the axes that `arrange` takes.
            rounded = [
                _rounded(jnp.swapaxes(x.values, 1, 2), None, local, quant, x.role, None, None, layout, implementation)
                for x in (q, k, v)
            ]
            return _attended(*rounded, local, scale, implementation, return_residual, query)

        return jax.lax.cond(plan.wide, lambda: at(plan.wide_quant), lambda: at(plan.quant))

    scale = 1.0 / math.sqrt(q.head_dim) if scale is None else scale
    count, index, slots = (*plan.schedule(), plan.slots) if schedule is None else schedule
    delta = None
    if q.mean is not None and k.exact is not None:
        delta = jnp.einsum("bhid,bhkd->bhik", q.mean, k.exact.astype(jnp.float32), precision="highest")
    dtype = jnp.dtype(v.dtype)
    o, lse = _kernel_block_attention(
        q.values,
        k.values,
        v.values,
        count,
        index,
        block=plan.block,
        scale=scale,
        slots=slots,
        qk=plan.quant.qk,
        pv=plan.quant.pv,
        p_scale=plan.quant.p_scale,
        q_scale=q.scales,
        k_scale=k.scales,
        v_scale=v.scales,
        delta=delta,
        out_dtype=dtype if v.mean is None else jnp.float32,
        layout=v.layout,
        head_dim=v.head_dim,
        q_tokens=plan.grid.tokens,
        kv_tokens=plan.grid.tokens,
        implementation=implementation,
        tiles=tiles,
        return_residual=True,
    )
    if v.mean is not None:  # weights sum to 1, except where there are none
        o = jnp.where(lse[..., None] == -jnp.inf, 0.0, o + v.mean[:, None]).astype(dtype)
    if not return_residual or k.mean is None:
        return (o, lse) if return_residual else o
    # q.(k - mean) lacks q.mean, one number per query: softmax does not see it, the log-sum-exp does.
    if query is not None:  # not rounded, so the error does not grow with the mean that was smoothed away
        lacking = jnp.einsum("bnhd,bhd->bnh", query.astype(jnp.float32), k.mean, precision="highest")
    else:
        mean = _hadamard.rotate(k.mean) if plan.quant.rotates("k") else k.mean
        lacking = _model_order(_row_products(q, mean), slots)
    return o, lse + scale * lacking


def _row_products(q: TokenBlocks, mean: jax.Array) -> jax.Array:
    """float32 [B, heads, N]: the stored q of every kernel slot times the K mean of its head."""
    values = stored_rows(q.values, width=q.width, layout=q.layout, tokens=q.grid.tokens, head_dim=q.head_dim)
    products = jnp.einsum("bhnd,bhd->bhn", values.astype(jnp.float32), mean, precision="highest")
    tokens = products.shape[-1]

    def per_token(x):
        return x if x.shape[-1] == tokens else jnp.repeat(x, q.block[0], axis=-1)[..., :tokens]

    if q.scales is not None:
        products = products * per_token(q.scales)
    if q.mean is not None:
        products = products + per_token(jnp.einsum("bhid,bhd->bhi", q.mean, mean, precision="highest"))
    return products


def _model_order(x: jax.Array, slots: jax.Array) -> jax.Array:
    """[B, heads, N] by kernel slot -> [B, N, heads] by model token."""
    return jax.vmap(lambda rows, slot: jnp.zeros_like(rows).at[:, slot].set(rows), (1, 0), 2)(x, slots)


def _check_scale(scale: Any) -> float | None:
    if scale is None:
        return None
    if isinstance(scale, Tracer):
        raise ValueError(
            "scale must be a plain number, known when tracing; got a traced value. Multiply query by it and "
            "pass scale=1.0."
        )
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise ValueError(f"scale must be a plain number, or None for 1/sqrt(head_dim); got {_describe(scale)}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, or None for 1/sqrt(head_dim); got {scale}.")
    return float(scale)


def _check_plan(plan: Any, quant: Any = None) -> AttentionPlan:
    if not isinstance(plan, AttentionPlan):
        raise ValueError(
            f"plan must be an AttentionPlan; got {_describe(plan)}. load_plan(path) reads one from a file."
        )
    if plan.lead:
        raise ValueError(
            f"plan must be that of one site, order [heads]; this one has leading axes {plan.lead}. Peel them: "
            "plan.at_step(step, total_steps) for buckets, then plan[site], or scan over the plan."
        )
    if quant is not None and not isinstance(quant, QuantSpec):
        raise ValueError(
            f"quant must be a QuantSpec or None; got {quant!r}. QuantSpec(qk={quant!r}, pv={quant!r}) is one."
        )
    return plan if quant is None else replace(plan, quant=quant, wide=None, wide_quant=None)


def _check_role(role: Any) -> None:
    if role not in _ARGUMENTS:
        raise ValueError(f'role must be "q", "k" or "v"; got {role!r}.')


def _check_extras(norm: Any, rope: Any) -> None:
    for name, extra, kind in (("norm", norm, Norm), ("rope", rope, Rope)):
        if extra is not None and not isinstance(extra, kind):
            raise ValueError(f"{name} must be a paro_jax.{kind.__name__} or None; got {_describe(extra)}.")


def _check_dtype(name: str, x: jax.Array) -> None:
    if str(x.dtype) not in _DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 (quant=QuantSpec(...) quantises inside); got {x.dtype}."
        )


def _check_tokens(name: str, x: jax.Array, plan: AttentionPlan, like: jax.Array | None = None) -> None:
    """ValueError unless x is [B, N, heads, D] for the plan and agrees with `like`, the query."""
    if x.ndim != 4:
        raise ValueError(
            f"{name} must have rank 4, [batch, tokens, heads, head_dim]; got rank {x.ndim}, {list(x.shape)}."
        )
    _check_dtype(name, x)
    grid, (batch, tokens, heads, head_dim) = plan.grid, x.shape
    if tokens != grid.tokens:
        hint = "Use the plan of this resolution."
        if tokens < grid.text:
            hint = f"The text alone is longer: text={grid.text} > {tokens} tokens."
        raise ValueError(
            f"{name} must have {grid.tokens} tokens (axis 1) to fit the plan's grid {grid.shape} with {grid.text} text "
            f"tokens; got {tokens}. {hint}"
        )
    if like is not None and heads != like.shape[2]:
        raise ValueError(
            f"{name} must have as many heads as query, {like.shape[2]} (axis 2); got {heads}. A plan has no grouped "
            f"heads: repeat them with jnp.repeat({name}, {max(1, like.shape[2] // heads)}, axis=2)."
        )
    if heads != plan.heads:
        raise ValueError(
            f"{name} must have {plan.heads} heads (axis 2), those of the plan; got {heads}. Use the plan of this model."
        )
    if batch < 1 or head_dim < 1:
        raise ValueError(f"{name} must have at least one batch entry and one channel; got shape {list(x.shape)}.")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of query, {list(like.shape)}; got {list(x.shape)}.")
    if like is not None and x.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of query, {like.dtype}; got {x.dtype}. Cast one of them.")


def _layout(plan: AttentionPlan, batch: int, head_dim: int, dtype: str, implementation: str | None) -> Any:
    """The layout that q, k and v are to have: that of the backend which `attend` will choose."""
    tokens, quant = plan.grid.tokens, plan.quant
    if plan.wide is not None:  # `attend` is yet to round
        return "rows"
    request = Request(
        "block_attention", batch, plan.heads, tokens, tokens, head_dim, dtype, plan.block, quant.qk, quant.pv,
        quant.p_scale, device_name(), layout="hopper_packed" if quant.packed and implementation != "ampere" else "rows",
        features=("delta",) if quant.smooths_q else (),
    )  # fmt: skip
    return operand_layout(request, implementation)


def _check_blocks(q: Any, k: Any, v: Any, plan: AttentionPlan, layout: str) -> None:
    quant = _arranged_at(plan)
    for role, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, TokenBlocks):
            raise ValueError(
                f'{role} must be TokenBlocks, as arrange(x, plan=plan, role="{role}") returns; got {_describe(x)}.'
            )
        facts = (
            ("role", x.role, role),
            ("grid", x.grid, plan.grid),
            ("block", x.block, plan.block),
            ("width", x.width, quant.width(role)),
            ("qk_rotate", x.rotated, quant.rotates(role)),
            ("smooth_q", (x.mean if role == "q" else x.exact) is not None, quant.smooths_q and role != "v"),
            ("layout", x.layout, layout),
            ("heads", x.values.shape[1], plan.heads),
        )
        for name, found, expected in facts:
            if found != expected:
                raise ValueError(
                    f"{role} was arranged with {name} {found!r}; attend with this plan expects {name} {expected!r}. "
                    "Arrange q, k and v with the plan that attend gets."
                )
        found, expected = concrete(x.order), concrete(plan.order)  # under a trace the caller is trusted
        if found is not None and expected is not None and not np.array_equal(found, expected):
            names = [[plan.order_names[i] for i in ids] for ids in (found, expected)]
            raise ValueError(
                f"{role} was arranged in the orders {names[0]}; attend with this plan expects {names[1]}. Arrange q, k "
                "and v with the plan that attend gets."
            )
        if (x.values.shape[0], x.head_dim, x.dtype) != (q.values.shape[0], q.head_dim, q.dtype):
            shapes = [[y.values.shape[0], plan.heads, plan.grid.tokens, y.head_dim] for y in (q, x)]
            raise ValueError(
                f"{role} must have the shape and dtype of q, {shapes[0]} {q.dtype}; got {shapes[1]} {x.dtype}."
            )


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array {x.dtype} {list(x.shape)}"
    return f"{type(x).__name__} {x!r}"
