"""Flax adapters: attention with a plan where Flax takes an `attention_fn`.

    nnx.MultiHeadAttention(..., attention_fn=paro_jax.flax.attention_fn(plan), rngs=rngs)
    linen.MultiHeadDotProductAttention(..., attention_fn=paro_jax.flax.attention_fn(plan))
    nnx.MultiHeadAttention(..., attention_fn=paro_jax.flax.PAROAttention(plan), rngs=rngs)

The function holds its plan as a constant of the trace. `PAROAttention` holds it in a Variable: `nnx.state` shows it,
`nnx.scan` slices it by layer, and another plan of the same shapes does not recompile.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from paro_jax._attention import attention
from paro_jax._plan import AttentionPlan
from paro_jax._quant import QuantSpec


class PAROTable(nnx.Variable[AttentionPlan]):
    """The Variable that holds a plan: `nnx.state(model, PAROTable)` selects it, optimizers on nnx.Param skip it."""


def attention_fn(
    plan: AttentionPlan, *, quant: QuantSpec | None = None, implementation: str | None = None
) -> Callable[..., jax.Array]:
    """A function with the plan in it, for the `attention_fn` of `nnx.MultiHeadAttention` and its Linen counterpart.

    It names every argument that either of them passes, because Linen drops the ones a function does not name. `dtype`
    and `promote_dtype` are honoured; the softmax is always float32. Raises ValueError for what a plan cannot honour:
    `bias`, an element `mask`, `is_causal`, active dropout, weights to sow (`module`), a precision, custom einsums,
    positions.
    """
    _check_plan(plan)

    return partial(_paro_attention, plan, quant, implementation)


def _paro_attention(
    plan: AttentionPlan,
    quant: QuantSpec | None,
    implementation: str | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    input_positions: Any = None,
) -> jax.Array:
    # These three only say how: nothing is dropped, the softmax is float32 already.
    del broadcast_dropout, dropout_rng, force_fp32_for_softmax
    _refuse("is_causal", is_causal, "a plan is not causal")
    _refuse("dropout_rate", 0.0 if deterministic else dropout_rate, "pass deterministic=True or dropout_rate=0")
    _refuse("module", module, "attention weights never exist, so they cannot be sown; pass sow_weights=False")
    _refuse("precision", precision, "operands keep their dtype, sums are float32; leave precision=None")
    _refuse("qk_attn_weights_einsum", qk_attn_weights_einsum, "the kernels have no einsum to replace")
    _refuse("attn_weights_value_einsum", attn_weights_value_einsum, "the kernels have no einsum to replace")
    _refuse("input_positions", input_positions, "rotate q and k before attention, or use arrange(rope=...)")
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    else:
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    shape = query.shape
    if len(shape) >= 3 and shape == key.shape == value.shape:  # any number of batch axes, as Flax
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    out = attention(query, key, value, bias, mask, plan=plan, quant=quant, implementation=implementation)
    return out.reshape(shape)


def _with_named_arguments(call: Callable) -> Callable:
    """Give a method the arguments of `_paro_attention` to show: Linen passes on only what a signature names."""
    named = list(inspect.signature(_paro_attention).parameters.values())[3:]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(call)["__signature__"] = inspect.Signature([own, *named])
    return call


class PAROAttention(nnx.Module):
    """Block-sparse attention as an NNX module, and an `attention_fn` for `nnx.MultiHeadAttention`.

    `plan` sits in `self.table`; give it a leading axis (sites,) where `nnx.scan` or `nnx.vmap` runs over layers.
    A model that is built already takes it as `layer.attention_fn = nnx.data(PAROAttention(plan))`.
    `quant` overrides the plan's, `implementation` names a backend. Arguments of a call as for `attention_fn`.
    """

    def __init__(self, plan: AttentionPlan, *, quant: QuantSpec | None = None, implementation: str | None = None):
        _check_plan(plan)
        self.table = PAROTable(plan)
        self.quant = quant
        self.implementation = implementation

    @_with_named_arguments
    def __call__(self, *arguments: Any, **named: Any) -> jax.Array:
        """query, key, value [*batch, N, heads, D] in model order -> the same. Raises as `attention_fn` does."""
        fn = attention_fn(self.table.get_value(), quant=self.quant, implementation=self.implementation)
        return fn(*arguments, **named)


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan must be an AttentionPlan; got {type(plan).__name__}. load_plan(path) reads one.")


def _refuse(name: str, value: Any, why: str) -> None:
    if value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0):
        found = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise ValueError(f"{name} cannot be honoured with a plan: expected None, False or 0, got {found}; {why}.")
