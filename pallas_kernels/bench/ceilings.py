"""The most this device does, measured: a large copy, and large products at each width. What percentages are of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing

# What is measured, and in which unit: bytes read and written, or operations, a multiply-add as two.
NAMES = {"copy": "GB/s", "bfloat16": "TOPS", "float32": "TOPS", "int8": "TOPS", "float8_e4m3fn": "TOPS"}


def measure(name: str, *, quick: bool = False, timer: timing.Timer | None = None) -> tuple[timing.Timing, float]:
    """(time, rate) of one ceiling; `quick` for sizes that a CPU has patience for. Raises what XLA raises."""
    function, arguments, work = _problem(name, quick)
    found, _ = timing.measure(function, arguments, timer=timer)
    return found, work / (found.ms / 1e3) / (1e9 if name == "copy" else 1e12)


def _problem(name: str, quick: bool) -> tuple[Callable[..., Any], tuple, float]:
    """(function, arguments, bytes or operations)."""
    if name == "copy":
        # An elementwise kernel: a plain copy is no kernel, and CUPTI would not see it.
        x = jax.random.bits(jax.random.key(0), ((4 << 20) if quick else (256 << 20),), jnp.uint32)
        return jax.jit(jnp.bitwise_not), (x,), 2 * x.nbytes
    n, dtype = 512 if quick else 8192, jnp.dtype(name)
    keys = jax.random.split(jax.random.key(0))
    if name == "int8":
        a, b = (jax.random.randint(key, (n, n), -127, 128, jnp.int8) for key in keys)
    else:  # never zeros: they run faster than data
        a, b = (jax.random.normal(key, (n, n), jnp.float32).astype(dtype) for key in keys)
    out = {"int8": jnp.int32, "float32": jnp.float32}.get(name, jnp.bfloat16)
    # Both operands with the summed axis last, the one layout that 8-bit tensor cores read.
    product = partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=out)
    return jax.jit(product), (a, b), 2 * n**3


def of_widths(qk: str, pv: str, dtype: str, rates: dict[str, float]) -> float | None:
    """TOPS that attention at these widths could reach: half its operations at each width's ceiling; None if unknown.

    int4 is multiplied by the int8 unit. fp8 counts against int8, the same unit's rate, where its own is not known.
    """
    names = {"bf16": dtype, "int8": "int8", "int4": "int8", "fp8": "float8_e4m3fn"}
    halves = [rates.get(names[width]) or (rates.get("int8") if width == "fp8" else None) for width in (qk, pv)]
    return 2 / sum(1 / rate for rate in halves if rate) if all(halves) else None
