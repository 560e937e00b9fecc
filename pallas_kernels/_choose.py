"""Who can serve a request, and if nobody can, why not.

A backend is a name, a `why_not`, a `run`, and the tiles it could run with. `choose` takes the first whose `why_not` is
None. The same function answers the call, filters the tests, prints the support table and feeds `paro doctor`, so a
choice is never silent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels._check import WIDTHS
from pallas_kernels._interpret import interpreted_device


@dataclass(frozen=True)
class Request:
    """One piece of work, by its static facts: the key of a choice, the id of a test, the line of a bench.

    `dtype` is that of the unquantised arrays (for wholly quantised operands: of the output). `block` is (query tokens,
    key tokens). `device` is "cpu", "tpu", or an NVIDIA compute capability such as "sm_90". `role` belongs to arrange.
    """

    op: str  # "block_attention" | "arrange"
    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    head_dim: int
    dtype: str
    block: tuple[int, int]
    qk: str = "bf16"
    pv: str = "bf16"
    p_scale: str = "block"
    device: str = "cpu"
    role: str = ""
    layout: str = "rows"  # of the operands; see arrange
    features: tuple[str, ...] = ()  # what is asked for beyond widths, of FEATURES

    def __str__(self) -> str:
        tokens = f"{self.q_tokens}" if self.q_tokens == self.kv_tokens else f"{self.q_tokens}x{self.kv_tokens}"
        shape = f"b{self.batch}-h{self.heads}-n{tokens}-d{self.head_dim}"
        role = (f"-{self.role}" if self.role else "") + (f"-{self.layout}" if self.layout != "rows" else "")
        blocks = f"{self.block[0]}x{self.block[1]}"
        widths = f"qk_{self.qk}-pv_{self.pv}-{self.p_scale}"
        more = "".join(f"-{feature}" for feature in self.features)
        return f"{self.op}{role}-{shape}-{self.dtype}-{blocks}-{widths}-{self.device}{more}"


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    `refuses` says of a request in one of `layouts` why it cannot serve it, or None. `layouts`: of the operands that
    attention reads or arrange makes, the one that attention should get first. `default` False: serves only when named.
    """

    name: str
    refuses: Callable[[Request], str | None]
    run: Callable[..., Any]
    default: bool = True
    layouts: tuple[str, ...] = ("rows",)
    candidates: Callable[[Request], Sequence[Any]] | None = None  # its tiles, the likely fastest first; for `tiles=`

    def why_not(self, request: Request) -> str | None:
        """Why it cannot serve `request`, or None."""
        if request.layout in self.layouts:
            return self.refuses(request)
        return f"layout {request.layout!r} is not served; it serves {', '.join(map(repr, self.layouts))}"


class NoBackend(NotImplementedError):
    """Nothing can serve this request here. The message carries every backend's reason."""


def choose(request: Request, backends: Sequence[Backend], implementation: str | None = None) -> Backend:
    """The first backend that can serve `request`, or the one named `implementation`.

    Raises ValueError for a name that does not exist, NoBackend when the named one cannot serve (its reason, and who
    can), or when none is named and none can (every reason).
    """
    if implementation is None:
        able = [b for b in backends if b.default]
    else:
        able = [b for b in backends if b.name == implementation]
        if not able:
            names = ", ".join(repr(b.name) for b in backends)
            raise ValueError(f"implementation: expected None or one of {names}, got {implementation!r}.")
    reasons = []
    for backend in able:
        reason = backend.why_not(request)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    message = f"no backend can serve {request}: " + "; ".join(reasons or ["no backend is chosen by default"]) + "."
    others = [b.name for b in backends if b.why_not(request) is None]
    help_line = f" Able: {', '.join(others)} (implementation=...)." if others else " No other backend can either."
    raise NoBackend(message + help_line)


def device_name() -> str:
    """The default device as `Request.device` names it: "cpu", "tpu", "sm_90", or the platform's own name.

    Inside `pallas_kernels.interpret` the device that the interpreter stands for.
    """
    if (interpreted := interpreted_device()) is not None:
        return interpreted
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and isinstance(capability, str) and capability[:1].isdigit():
        return "sm_" + capability.replace(".", "")
    return device.platform


def widths_served(request: Request, widths: Sequence[str], features: Sequence[str] = ()) -> str | None:
    """A reason when `request` asks for a width that is not in `widths`, or for a feature not in `features`."""
    for argument, width in (("qk", request.qk), ("pv", request.pv)):
        if width not in widths:
            return f"{argument} width {width!r} is not served; it serves {', '.join(widths)}"
    for feature in request.features:
        if feature not in features:
            return f"{FEATURES[feature]} is not served"
    return None


ALL_WIDTHS = tuple(WIDTHS)
KERNEL_WIDTHS = tuple(width for width in WIDTHS if width != "fp4")  # which exists as an emulation alone

# What a recipe may ask for beyond widths and groups that every backend has. A backend names those it serves.
FEATURES = {
    "thread-groups": 'group "thread" (one scale per register set of a tensor core)',
    "rotation": "a Hadamard rotation of q and k",
    "q-mean": "a mean per query block",
    "v-mean": "a mean of v",
    "delta": "delta, scores added per query block and key",
}
