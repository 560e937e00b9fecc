"""How floor 0 says no, and the facts of each width."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Width = Literal["bf16", "fp8", "int8", "int4", "fp4"]
FLOATS = ("float32", "bfloat16", "float16")


class WidthFacts(NamedTuple):
    """How one width stores an operand. `store` None: at the dtype of the inputs."""

    store: Any
    qmax: float  # scale = max(amax, 1e-7) / qmax
    p_levels: float  # P is stored as round(p_levels * p), or e4m3(p_levels * p)


WIDTHS: dict[str, WidthFacts] = {
    "bf16": WidthFacts(None, 1.0, 1.0),
    # P fills e4m3's range, as in SageAttention2. (FlashAttention-3 stops at 256, which only loses a bit below 2^-14.)
    "fp8": WidthFacts(jnp.float8_e4m3fn, 448.0, 448.0),
    "int8": WidthFacts(jnp.int8, 127.0, 127.0),
    # int4 on a 4-bit grid stored in int8: [-7, 7] for q, k, v; [0, 15] for P, which has no sign.
    "int4": WidthFacts(jnp.int8, 7.0, 15.0),
    # e2m1 in groups of 16 along what the product sums over, each with an e4m3 scale (NVFP4). Stored multiplied out:
    # six bits of mantissa, which bfloat16 holds exactly, so there are no scales beside it.
    "fp4": WidthFacts(jnp.bfloat16, 6.0, 6.0 * 448.0),
}


def mistake(argument: str, expected: Any, found: Any, advice: str = "") -> ValueError:
    """The error for a caller's mistake: the argument by name, what was expected, what came, what to do."""
    return ValueError(f"{argument}: expected {expected}, got {found}." + (f" {advice}" if advice else ""))


def require_shape(argument: str, array: Any, shape: tuple[int | None, ...], names: str) -> None:
    """Raise ValueError unless `array.shape` is `shape`; None matches any extent, `names` is the shape in words."""
    found = tuple(array.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        want = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise mistake(argument, f"shape {names} = [{want}]", f"shape {list(found)}")


def require_block(block: Any) -> tuple[int, int]:
    """`block` as two positive ints, or ValueError."""
    try:
        bq, bk = (int(extent) for extent in block)
    except (TypeError, ValueError):
        raise mistake("block", "two positive integers (query tokens, key tokens)", repr(block)) from None
    if bq < 1 or bk < 1:
        raise mistake("block", "two positive integers (query tokens, key tokens)", repr(block))
    return bq, bk


def require_width(argument: str, width: Any) -> None:
    """Raise ValueError for a width that does not exist."""
    if width not in WIDTHS:
        raise mistake(argument, f"one of {', '.join(map(repr, WIDTHS))}", repr(width))


def require_int32(argument: str, array: Any) -> None:
    """Raise ValueError unless the array holds int32."""
    if array.dtype != jnp.int32:
        raise mistake(argument, "dtype int32", f"dtype {array.dtype}", "Convert with .astype(jnp.int32).")


def require_scale(scale: Any) -> float:
    """The softmax scale as a finite Python float, or ValueError."""
    if isinstance(scale, Tracer):
        raise mistake("scale", "a plain number known when the call is traced", "a traced value")
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise mistake("scale", "a finite number", repr(scale)) from None
    if not math.isfinite(value):
        raise mistake("scale", "a finite number", repr(scale), "1/sqrt(head_dim) is the usual choice.")
    return value


def concrete(array: Any) -> np.ndarray | None:
    """The array's values, or None where it has none here: traced, or partly on another host."""
    elsewhere = isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True)
    return None if elsewhere else np.asarray(array)


def require_slots(slots: Any, heads: int, tokens: int) -> None:
    """Raise ValueError unless `slots` is int32 [heads, tokens] and, where values are known, a permutation per head."""
    require_shape("slots", slots, (heads, tokens), "[heads, tokens]")
    require_int32("slots", slots)
    values = concrete(slots)
    if values is not None and tokens and not (np.sort(values, axis=1) == np.arange(tokens)).all():
        raise mistake(
            "slots",
            f"a permutation of 0..{tokens - 1} in every head",
            f"values from {values.min()} to {values.max()} with repeats or gaps",
            "Row h lists, for each kernel slot, the model token it holds.",
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def no_gradient(function: Callable[..., Any], *arrays: Any) -> Any:
    """function(*arrays), which refuses to be differentiated: rounding has no gradient, a silent zero trains nothing."""
    return function(*arrays)


def _no_gradient_fwd(function, *arrays):
    return function(*arrays), None


def _no_gradient_bwd(function, saved, cotangents):
    raise ValueError(
        "gradient: expected unquantised widths, got a gradient through a quantised one. "
        'Quantised widths have no gradient; use QuantSpec() (qk="bf16", pv="bf16") where you differentiate.'
    )


no_gradient.defvjp(_no_gradient_fwd, _no_gradient_bwd)


def share_mesh_axes(*arrays: Any) -> tuple[Any, ...]:
    """Inside shard_map, mark every array as varying over each mesh axis that any of them varies over.

    A loop's carry must keep one type, and it mixes all the inputs. Outside shard_map nothing happens. None passes.
    """
    axes = frozenset[Any]().union(*(_varying(array) for array in arrays if array is not None))

    def widen(array):
        missing = () if array is None else tuple(sorted(axes - _varying(array), key=str))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return tuple(widen(array) for array in arrays)


def _varying(array: jax.Array) -> frozenset:
    """The shard_map axes over which `array` differs from device to device."""
    return jax.typeof(array).manual_axis_type.varying
