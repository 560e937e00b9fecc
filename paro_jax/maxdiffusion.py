"""Plans inside maxdiffusion's models (AI-Hypercomputer/maxdiffusion): FLUX.1 in Linen, Wan in NNX.

maxdiffusion chooses attention by name from a table of kernels, and a kernel is told neither layer nor step. So there
are two halves, and neither edits maxdiffusion:

    paro_jax.maxdiffusion.register()                              # once; then `attention: paro` in the configuration

    paro_jax.maxdiffusion.put_in_wan(model, plan)                 # Wan: scanned or not
    params, planned = paro_jax.maxdiffusion.put_in_flux(params, plan)
    with flax.linen.intercept_methods(planned):                   # FLUX.1: while it is traced, `jit` inside or outside
        model.apply({"params": params}, ...)

The kernel "paro" is dense attention for calls without a plan, such as those that look at text. A plan becomes part of
the model's own state with a leading axis of layers, so maxdiffusion's scans hand every layer its part and another plan
of the same shapes compiles nothing. Its token order is ours: text first in FLUX.1, none in Wan's self-attention. Of
several buckets put `plan.at_step(step, steps)`.

Written for maxdiffusion at commit 7cfb880 (August 2026). Its FLUX.1 differs from the original there (issue 482).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

import paro_jax
from paro_jax._plan import AttentionPlan, check_fits
from paro_jax.flax import PAROTable

_TABLE = "maxdiffusion.models.attention_flax"
_FLUX_ATTENTION = (
    ("scanned_double_blocks", "FluxTransformerBlock_0", "attn"),
    ("scanned_single_blocks", "FluxSingleTransformerBlock_0", "attn"),
)


def register(name: str = "paro") -> None:
    """Add dense attention under `name` to maxdiffusion's table of kernels; calls with a plan do not come by there.

    Raises ImportError without maxdiffusion or its table, ValueError for a name that maxdiffusion would take for one of
    its own kinds.
    """
    if not name or "ring" in name or "ulysses" in name:
        raise ValueError(
            f'name: expected one without "ring" and "ulysses", which maxdiffusion looks for; found {name!r}.'
        )
    _attention_module("register_kernel").register_kernel(name)(_dense)


def _attention_module(needed: str) -> Any:
    try:
        module = importlib.import_module(_TABLE)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "maxdiffusion":
            raise ImportError(
                f"{_TABLE} is not there; put a checkout of AI-Hypercomputer/maxdiffusion (its src/) on PYTHONPATH."
            ) from error
        raise ImportError(f"maxdiffusion could not be imported: it wants {error.name}; install that first.") from error
    if not hasattr(module, needed):
        raise ImportError(f"{_TABLE} has no {needed}; use a maxdiffusion of 2026, which keeps its kernels in a table.")
    return module


def _dense(query: jax.Array, key: jax.Array, value: jax.Array, context: Mapping[str, Any]) -> jax.Array:
    """A kernel as maxdiffusion calls it: `[B, S, heads * D]` or `[B, heads, S, D]` -> `[B, S, heads * D]`."""
    if context.get("is_causal"):
        raise ValueError("is_causal: expected False, found True; diffusion transformers look both ways.")
    mask = context.get("attention_mask")  # bool [B, keys], True: look at it
    q, k, v = _heads(query, key, value, context["heads"])
    mask = None if mask is None else mask[:, None, None, :]
    return _flat(paro_jax.attention(q, k, v, mask=mask, scale=context["scale"]))


def _planned(query: Any, key: Any, value: Any, mask: Any, plan: AttentionPlan, heads: int, scale: float) -> jax.Array:
    if mask is not None:
        raise ValueError("attention_mask: expected None where a plan is, found an array; let the prompt be padded.")
    q, k, v = _heads(query, key, value, heads)
    return _flat(paro_jax.attention(q, k, v, plan=plan, scale=scale))


def _heads(query: jax.Array, key: jax.Array, value: jax.Array, heads: int) -> list[jax.Array]:
    """Either layout -> `[B, S, heads, D]`, at the dtype of value: rotation leaves q and k in float32."""
    both = (x.swapaxes(1, 2) if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    return [x.astype(value.dtype) for x in both]


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


class PlannedAttention(nnx.Module):
    """Stands in for maxdiffusion's `NNXAttentionOp` of a self-attention; its plan is scanned along with the layer."""

    def __init__(self, plan: AttentionPlan, *, heads: int, scale: float):
        self.table = PAROTable(plan)
        self.heads = heads
        self.scale = scale

    def apply_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, attention_mask: Any = None
    ) -> jax.Array:
        """`[B, heads, S, D]` or `[B, S, heads * D]` -> `[B, S, heads * D]`."""
        return _planned(query, key, value, attention_mask, self.table.get_value(), self.heads, self.scale)


def put_in_wan(model: Any, plan: AttentionPlan) -> None:
    """Give every self-attention of a maxdiffusion `WanModel` its part of a plan with leading axis (layers,).

    Again with another plan replaces it. Raises ValueError for a plan of another number of layers or heads, or a model
    that is not built as said.
    """
    blocks: Any = getattr(model, "blocks", None)
    unrolled: list[Any] = list(blocks) if isinstance(blocks, (list, tuple, nnx.List)) else []
    one = unrolled[0] if unrolled else blocks
    op = getattr(getattr(one, "attn1", None), "attention_op", None)
    if op is None:
        raise ValueError(f"model: expected a WanModel with blocks.attn1.attention_op, found {type(model).__name__}.")
    layers = len(unrolled) or len(jax.tree.leaves(nnx.state(one, nnx.Param))[0])
    check_fits(plan, sites=layers, heads=op.heads)
    for i, block in enumerate(unrolled or [one]):
        mine = plan[i] if unrolled else plan
        block.attn1.attention_op = PlannedAttention(mine, heads=op.heads, scale=op.scale)


def put_in_flux(params: Mapping[str, Any], plan: AttentionPlan) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Parameters of a maxdiffusion `FluxTransformer2DModel` with a plan in them, and the interceptor that uses it.

    `plan`: leading axis (layers,), double blocks first. The interceptor is for `flax.linen.intercept_methods` and fits
    every plan of the same grid, block and quantisation. Raises ValueError for another number of layers, or parameters
    that are not those of the scanned model; whether heads and tokens fit shows when the model runs.
    """
    groups = [_at(params, path) for path in _FLUX_ATTENTION]
    counts = [len(jax.tree.leaves(group)[0]) for group in groups]
    check_fits(plan, sites=sum(counts))
    leaves, tree = jax.tree.flatten(plan)
    for path, start, count in zip(_FLUX_ATTENTION, (0, counts[0]), counts, strict=True):
        mine = {f"paro_{i}": leaf[start : start + count] for i, leaf in enumerate(leaves)}
        params = _with(params, path, mine)
    names = [f"paro_{i}" for i in range(len(leaves))]

    def intercept(run: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        owner = module.parent
        is_attention = context.method_name == "apply_attention" and hasattr(owner, "get_variable")
        if not is_attention or not owner.has_variable("params", names[0]):
            return run(*args, **kwargs)
        one = jax.tree.unflatten(tree, [owner.get_variable("params", name) for name in names])
        given = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | kwargs
        mask = given.pop("attention_mask", None)
        return _planned(**given, mask=mask, plan=one, heads=module.heads, scale=module.scale)

    return dict(params), intercept


def _at(params: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for i, name in enumerate(path):
        if name not in params:
            where = ".".join(path[: i + 1])
            raise ValueError(
                f"params: expected {where} of a scanned FluxTransformer2DModel, found {', '.join(params)}."
            )
        params = params[name]
    return params


def _with(params: Mapping[str, Any], path: tuple[str, ...], more: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `params` with `more` at `path`; arrays are shared."""
    if not path:
        return {**params, **more}
    return {**params, path[0]: _with(params[path[0]], path[1:], more)}
