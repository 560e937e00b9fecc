"""arrange for any device XLA knows: elementwise steps that fuse, one gather, one rounding pass.

Method: PAROAttention (arXiv 2506.16054), section 3.1, and SageAttention (arXiv 2410.02367), section 4.2. Unusual: the
gather's gradient is the gather by the inverse permutation.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import _hadamard, _permute
from pallas_kernels._check import FLOATS
from pallas_kernels._choose import ALL_WIDTHS, Request, widths_served
from pallas_kernels.arrange.reference import FEATURES, block_means, laid_out, normed, quantised, rotated
from pallas_kernels.block_attention import ampere


def why_not(request: Request) -> str | None:
    """Serves every width, feature and device at float32, bfloat16 and float16."""
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return widths_served(request, ALL_WIDTHS, FEATURES)


def why_not_ampere(request: Request) -> str | None:
    """The same for the devices of that attention kernel, whose name then serves a whole call."""
    if request.device not in ampere.DEVICES:
        return f"device {request.device} is not served; it serves {', '.join(ampere.DEVICES)}"
    return widths_served(request, ampere.SERVED, FEATURES) or why_not(request)


_STATIC = ("role", "width", "group", "block", "compute_mean", "layout", "rotate", "block_mean")


@partial(jax.jit, static_argnames=_STATIC)
def run(
    x, slots, norm, rope, mean, *, role, width, group, block, compute_mean, layout="rows", rotate=False,
    block_mean=False,
):  # fmt: skip
    """See arrange; arguments are checked there."""
    batch, _, heads, head_dim = x.shape
    y = x
    if norm is not None:
        y = normed(y.astype(jnp.float32), norm)
    if rope is not None:
        y = rotated(y.astype(jnp.float32), rope)
    if compute_mean:
        mean = y.astype(jnp.float32).mean(axis=1)
    if mean is not None:
        mean = jnp.broadcast_to(mean.astype(jnp.float32).reshape(-1, heads, head_dim), (batch, heads, head_dim))
    if width == "bf16" and not rotate and not block_mean:
        y = (y if mean is None else y.astype(jnp.float32) - mean[:, None]).astype(x.dtype)
        return laid_out(_to_kernel(y, slots), role, width, block, layout), None, mean
    y = _to_kernel(y, slots).astype(jnp.float32)
    if mean is not None:
        y = y - mean[:, :, None]
    y = _hadamard.rotate(y) if rotate else y
    if block_mean:
        mean = block_means(y, block)
        y = y - jnp.repeat(mean, block, axis=2)[:, :, : y.shape[2]]
    values, scales = (y.astype(x.dtype), None) if width == "bf16" else quantised(y, role, width, group, block)
    return laid_out(values, role, width, block, layout), scales, mean


def _to_kernel(x: jax.Array, slots: jax.Array | None) -> jax.Array:
    return jnp.swapaxes(x, 1, 2) if slots is None else _permute.to_kernel(x, slots)
