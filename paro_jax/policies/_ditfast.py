"""DiTFastAttn (arXiv 2406.08552): what a step may reuse of the step before, and of the other half of guidance.

The window alone is `window(grid, width=...)`, a mask like any other. The rest needs memory between steps, which is a
value here: `shared_attention` takes a layer's memory and returns the next. A model hands each layer its own, a sampler
carries them all from step to step:

    def attention_fn(q, k, v, *, plan, carry):
        memory, method = carry
        return shared_attention(q, k, v, memory, method, window=plan)

    def predict(x, timestep, step, memories):  # the plan of windows, memories and methods[step]: one for each layer
        return net(x, timestep, text, plan=plan, attention_fn=attention_fn, carry=(memories, methods[step]))

    latents, _ = ddim(guided(predict, 6.0), noise, steps=50, carry=Memory.empty((layers, 2, N, heads, D)))
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._attention import attention
from paro_jax._plan import AttentionPlan
from paro_jax.policies._basic import dense
from paro_jax.policies._parts import check_number, check_site, check_tokens


class Share(enum.IntEnum):
    """What a layer computes at a step, cheapest first, as the greedy search tries them."""

    OUTPUT = 0  # nothing: the output of the step before
    WINDOW_HALF = 1  # the window and the cached residual, of the half with the prompt; the other half is a copy
    WINDOW = 2  # the window and the cached residual
    FULL_HALF = 3  # everything, of the half with the prompt
    FULL = 4  # everything; the residual is cached


class Memory(NamedTuple):
    """What a layer remembers of the steps before, [B, N, heads, D] each, at the dtype of attention."""

    output: jax.Array
    residual: jax.Array  # full less window, at the last full step

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any = jnp.float32) -> "Memory":
        """Before the first step, which has to be FULL. `shape`: [*layers, B, N, heads, D]."""
        return cls(jnp.zeros(tuple(shape), dtype), jnp.zeros(tuple(shape), dtype))


def shared_attention(
    query: Any, key: Any, value: Any, memory: Memory, method: Any, *, window: AttentionPlan
) -> tuple[jax.Array, Memory]:
    """Attention by one of the methods of `Share`: output [B, N, heads, D] and the layer's next memory.

    `window`: the plan with the window's mask, whose orders and widths the full steps use too. `method` may be traced,
    an element of a table [steps, layers]; one branch runs. WINDOW: window(q, k, v) + residual. The HALF methods
    compute batch entries B/2 to B, which `guided` gives the prompt, and copy the output to the others.

    The output is shared before the model's output projection, which acts on tokens: the same as after it, at the price
    of one matmul. Full steps compute the window as well, for the residual. Raises ValueError for a memory of another
    shape, a method outside `Share`, and HALF with an odd batch (for a traced method, with any odd batch).
    """
    plan = check_site(window)
    q, k, v = check_tokens(plan.grid.tokens, plan.heads, query=query, key=key, value=value)
    for name, x in zip(Memory._fields, memory, strict=True):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(
                f"memory.{name} must be {q.dtype} {list(q.shape)}, as query; got {x.dtype} {list(x.shape)}. Start with "
                "Memory.empty(query.shape, query.dtype)."
            )
    known = isinstance(method, (int, np.integer)) and not isinstance(method, bool)
    if known and method not in list(Share):
        raise ValueError(f"method must be one of {', '.join(f'{m} ({m.name})' for m in Share)}; got {method!r}.")
    half = q.shape[0] // 2
    halves = (not known or method in (Share.WINDOW_HALF, Share.FULL_HALF)) and half * 2 != q.shape[0]
    if halves:
        raise ValueError(f"query must have an even batch, without the prompt and with it, to share; got {q.shape[0]}.")
    full = plan.with_mask(dense(plan.grid, block=plan.block, heads=plan.heads))

    def windowed(rows):
        return attention(q[rows], k[rows], v[rows], plan=plan)

    def everything(rows):
        out = attention(q[rows], k[rows], v[rows], plan=full)
        return out, out - windowed(rows)

    def twice(x):
        return jnp.concatenate([x, x])

    prompted = slice(half, None)

    def output(memory):
        return memory

    def window_half(memory):
        return memory._replace(output=twice(windowed(prompted) + memory.residual[prompted]))

    def window_all(memory):
        return memory._replace(output=windowed(slice(None)) + memory.residual)

    def full_half(memory):
        return Memory(*(twice(x) for x in everything(prompted)))

    def full_all(memory):
        return Memory(*everything(slice(None)))

    branches = (output, window_half, window_all, full_half, full_all)
    memory = branches[int(method)](memory) if known else jax.lax.switch(jnp.asarray(method), branches, memory)
    return memory.output, memory


def greedy_sharing(
    loss: Callable[[np.ndarray, int], float],
    *,
    steps: int,
    layers: int,
    threshold: float,
    methods: Sequence[Share] = tuple(Share)[:-1],
) -> np.ndarray:
    """DiTFastAttn's search (arXiv 2406.08552, section 3.5): which method each layer uses at each step; offline.

    int8 [steps, layers] of `Share`. The first step is FULL. At every later one, layer by layer, the first of `methods`
    is taken for which `loss(table, step)`, a run of the whole model with the choices so far against a dense run, is
    below threshold (layer + 1) / layers; else FULL. At most len(methods) layers runs a step. `sharing_loss` is the loss
    published. Raises ValueError for methods outside `Share` and a threshold below 0.
    """
    check_number("threshold", threshold, 0, np.inf)
    if not all(isinstance(method, Share) for method in methods):
        raise ValueError(f"methods must be members of Share; got {methods!r}.")
    table = np.full((steps, layers), Share.FULL, np.int8)
    for step in range(1, steps):
        for layer in range(layers):
            for method in sorted(methods):
                table[step, layer] = method
                if loss(table.copy(), step) < threshold * (layer + 1) / layers:
                    break
            else:
                table[step, layer] = Share.FULL
    return table


def sharing_loss(found: Any, dense: Any) -> jax.Array:
    """Mean of |found - dense| over the larger magnitude of the two, at most 10 each: float32 scalar.

    The original divides by the larger value, sign and all, which is wrong where both are negative.
    """
    a, b = (jnp.asarray(x, jnp.float32) for x in (found, dense))
    return jnp.clip(jnp.abs(a - b) / (jnp.maximum(jnp.abs(a), jnp.abs(b)) + 1e-6), 0, 10).mean()
