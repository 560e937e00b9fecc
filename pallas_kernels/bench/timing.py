"""How long a call takes on the device: CUPTI where there is a GPU, the host's clock elsewhere; the row says which.

What is reported is the median over calls of the *sum of the kernels' own times*, so neither launch gaps nor Python
count; `wall_ms` beside it is what the host sees of many calls in a row. Every call reads other memory than the one
before: by the time a set of inputs comes round again, more than any L2 holds has passed.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

_PAST_L2 = 192 << 20  # bytes; the largest L2 of the devices we know is 126 MiB
_MOST_SETS = 64
_MOST_OUTPUT = 6 << 30  # bytes of results that may wait for the end of a measurement
_RUNS = (5, 100)


@dataclass(frozen=True)
class Timing:
    """`ms`: median of `runs` calls; `low_ms`, `high_ms`: their quartiles; `wall_ms`: the host's view of one call."""

    ms: float
    low_ms: float
    high_ms: float
    wall_ms: float
    runs: int
    sets: int  # how many sets of inputs took turns
    timer: str  # "cupti" | "host"
    timer_note: str | None = None  # why it is not CUPTI
    kernels: dict[str, float] | None = None  # milliseconds a call by kernel, most first, as CUPTI saw them


Timer = Callable[["Rotating", int], list[float]]  # (call, runs) -> milliseconds of each; raises where it cannot


class Rotating:
    """`function` on one set of arguments after the other; each call takes the next.

    It has what `jax.stages.Wrapped` asks for, so that Mosaic's profiler calls it as it is and does not compile one set
    of arguments into it.
    """

    def __init__(self, function: Callable[..., Any], sets: Sequence[tuple]):
        self.function, self.sets, self.turn = function, sets, 0
        self.kernels: dict[str, float] | None = None

    def __call__(self) -> Any:
        arguments = self.sets[self.turn % len(self.sets)]
        self.turn += 1
        return self.function(*arguments)

    def trace(self) -> Any:
        return jax.jit(self.function).trace(*self.sets[0])

    def lower(self) -> Any:
        return jax.jit(self.function).lower(*self.sets[0])


def cupti(call: Rotating, runs: int) -> list[float]:
    """Milliseconds of kernel time of each call. Raises RuntimeError where CUPTI cannot be had."""
    from jax.experimental.mosaic.gpu import profiler

    if jax.default_backend() != "gpu":
        raise RuntimeError(f"CUPTI times NVIDIA GPUs, this is {jax.default_backend()}")
    assert isinstance(call, jax.stages.Wrapped), "the profiler would compile the arguments in"
    assert runs > 1, "of one run the profiler returns another shape"
    _, launches = profiler.measure(call, aggregate=False, iterations=runs)()
    if launches is None:
        raise RuntimeError("CUPTI saw no kernel")
    total: dict[str, float] = {}
    for name, ms in itertools.chain(*launches):
        total[name] = total.get(name, 0.0) + ms / runs
    call.kernels = dict(sorted(total.items(), key=lambda item: -item[1]))
    return [sum(ms for _, ms in one) for one in launches]


def host(call: Rotating, runs: int) -> list[float]:
    """Milliseconds on the host's clock from the call until its result is there."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(
    function: Callable[..., Any], arguments: tuple, *, seconds: float = 0.3, timer: Timer | None = None
) -> tuple[Timing, Any]:
    """(how long `function(*arguments)` takes, what it returned), after calls that compile it and warm it up.

    function: jitted. seconds: about how long to measure. timer: None for CUPTI, with the host's clock behind it where
    CUPTI cannot be had. Raises what the call raises.
    """
    result = jax.block_until_ready(function(*arguments))
    sets = [arguments, *(_copied(arguments) for _ in range(_sets(arguments) - 1))]
    call = Rotating(function, sets)
    each = min(host(call, 2)) / 1e3
    fits = _MOST_OUTPUT // max(1, _nbytes(result))
    runs = int(max(2, min(fits, max(_RUNS[0], min(_RUNS[1], seconds / max(each, 1e-6))))))
    wall = _wall(call, runs)
    note = None
    try:
        times, name = (timer or cupti)(call, runs), getattr(timer, "__name__", "cupti")
    except Exception as error:  # whatever it is, the call itself ran above: only the timer is missing
        if timer is not None:
            raise
        times, name, note = host(call, runs), "host", f"{type(error).__name__}: {error}"
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(middle, low, high, wall, len(times), len(sets), name, note, call.kernels), result


def _wall(call: Rotating, runs: int) -> float:
    start = time.perf_counter()
    results = [call() for _ in range(runs)]
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - start) / runs


def _sets(arguments: tuple) -> int:
    """How many copies of the inputs are more than L2 together; fewer on a CPU, where memory is dear."""
    most = _MOST_SETS if jax.default_backend() == "gpu" else 2
    return max(1, min(most, math.ceil(_PAST_L2 / max(1, _nbytes(arguments)))))


def _copied(arguments: tuple) -> tuple:
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, arguments)


def _nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
