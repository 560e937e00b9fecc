"""What `paro_jax.maxdiffusion` needs of maxdiffusion, small and our own.

The table of kernels, how an attention op calls it, and how FLUX.1 (Linen) and Wan (NNX) scan their layers. Names of
modules and parameters are those of the original.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

KERNEL_REGISTRY = {}
HEADS, DIM = 2, 16


def register_kernel(name):
    def keep(function):
        KERNEL_REGISTRY[name] = function
        return function

    return keep


def route(op, q, k, v, mask=None):
    context = dict(heads=op.heads, dim_head=DIM // HEADS, scale=op.scale, dtype=jnp.float32, attention_mask=mask)
    return KERNEL_REGISTRY[op.attention_kernel](q, k, v, context | dict(is_causal=False, split_head_dim=True))


@register_kernel("dot_product")
def dot_product(q, k, v, context):
    def split(x):
        return x if x.ndim == 4 else x.reshape(*x.shape[:2], context["heads"], -1).swapaxes(1, 2)

    q, k, v = split(q), split(k), split(v)
    weights = jax.nn.softmax(jnp.einsum("bhsd,bhtd->bhst", q, k) * context["scale"])
    o = jnp.einsum("bhst,bhtd->bshd", weights, v)
    return o.reshape(*o.shape[:2], -1)


# --- Wan, NNX -------------------------------------------------------------------------------------------------------


class NNXAttentionOp(nnx.Module):
    def __init__(self, attention_kernel, heads, scale):
        self.attention_kernel, self.heads, self.scale = attention_kernel, heads, scale

    def apply_attention(self, query, key, value, attention_mask=None):
        return route(self, query, key, value, attention_mask)


class FlaxWanAttention(nnx.Module):
    def __init__(self, kernel, rngs):
        self.query, self.key, self.value, self.proj_attn = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(4))
        self.attention_op = NNXAttentionOp(kernel, HEADS, (DIM // HEADS) ** -0.5)

    def __call__(self, x, text=None):
        other = x if text is None else text
        q, k, v = self.query(x), self.key(other), self.value(other)
        if text is None:  # after the rotation: [B, heads, S, D]
            q, k, v = (z.reshape(*z.shape[:2], HEADS, -1).swapaxes(1, 2) for z in (q, k, v))
        return self.proj_attn(self.attention_op.apply_attention(q, k, v))


class WanBlock(nnx.Module):
    def __init__(self, kernel, rngs):
        self.attn1 = FlaxWanAttention(kernel, rngs)
        self.attn2 = FlaxWanAttention(kernel, rngs)

    def __call__(self, x, text):
        x = x + self.attn1(x)
        return x + self.attn2(x, text)


class WanModel(nnx.Module):
    blocks: Any

    def __init__(self, layers, kernel, scan_layers, rngs):
        self.scan_layers = scan_layers
        if scan_layers:
            self.blocks = nnx.vmap(lambda r: WanBlock(kernel, r))(rngs.split(layers))
        else:
            self.blocks = nnx.data([WanBlock(kernel, rngs) for _ in range(layers)])

    def __call__(self, x, text):
        if not self.scan_layers:
            for block in self.blocks:
                x = block(x, text)
            return x

        def layer(x, block):
            return block(x, text), None

        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, self.blocks)[0]


# --- FLUX.1, Linen --------------------------------------------------------------------------------------------------


class AttentionOp(nn.Module):
    attention_kernel: str
    heads: int
    scale: float

    def apply_attention(self, query, key, value, attention_mask=None):
        return route(self, query, key, value, attention_mask)


class FlaxFluxAttention(nn.Module):
    attention_kernel: str

    def setup(self):
        self.attention_op = AttentionOp(self.attention_kernel, HEADS, (DIM // HEADS) ** -0.5)
        self.qkv = nn.Dense(3 * DIM, name="i_qkv")
        self.proj_attn = nn.Dense(DIM, name="i_proj")

    def __call__(self, x):  # [B, S, heads * D] all the way
        return self.proj_attn(self.attention_op.apply_attention(*jnp.split(self.qkv(x), 3, axis=-1)))


class FluxTransformerBlock(nn.Module):
    attention_kernel: str

    def setup(self):
        self.attn = FlaxFluxAttention(self.attention_kernel)

    def __call__(self, x):
        return x + self.attn(x)


class FluxSingleTransformerBlock(FluxTransformerBlock):
    pass


class _Double(nn.Module):
    attention_kernel: str

    @nn.compact
    def __call__(self, x, _):
        return FluxTransformerBlock(self.attention_kernel)(x), None


class _Single(nn.Module):
    attention_kernel: str

    @nn.compact
    def __call__(self, x, _):
        return FluxSingleTransformerBlock(self.attention_kernel)(x), None


class FluxTransformer2DModel(nn.Module):
    num_layers: int
    num_single_layers: int
    attention_kernel: str

    def setup(self):
        def scan(block, length):
            return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)

        self.scanned_double_blocks = scan(_Double, self.num_layers)(self.attention_kernel)
        self.scanned_single_blocks = scan(_Single, self.num_single_layers)(self.attention_kernel)

    def __call__(self, x):
        x, _ = self.scanned_double_blocks(x, None)
        return self.scanned_single_blocks(x, None)[0]
