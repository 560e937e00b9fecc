"""Mosaic kernels on a CPU: JAX's GPU interpreter, with its barriers, its asynchronous copies and its race detector.

Private JAX names live here: the interpreter has no public way to ask whether it is on, to read what its race detector
found, or to clean up after a kernel that failed (jax 0.11.2 to 0.12).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import jax


class Race(AssertionError):
    """Two threads of an interpreted kernel touched the same memory without an order between them."""


@contextmanager
def interpret(device: str = "sm_90", *, detect_races: bool = True) -> Iterator[None]:
    """`with interpret():` Mosaic kernels called inside run on this CPU, as if it were a GPU of kind `device`.

    What is traced inside knows it (the context is part of jit's key), so nothing leaks out and nothing stale leaks in.
    Slow: seconds for a few hundred tokens. Raises Race where `detect_races` finds one (jax 0.12 raises by itself, at
    the kernel), ValueError for a device that is not a compute capability.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not device.startswith("sm_") or not device[3:].isdigit():
        raise ValueError(f"device: expected a compute capability such as 'sm_90', got {device!r}.")
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with plgpu.force_gpu_interpret_mode(_params()(detect_races=detect_races, device=device)):
            yield
            jax.effects_barrier()
        races = gpu_callbacks._races  # None where no kernel ran
        if races is not None and races.races_found:
            raise Race("an interpreted kernel has a race; the interpreter printed the two accesses")
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@cache
def _params() -> type:
    """The interpreter's parameters and the device it stands for; made on first use, Mosaic takes a while to import."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @dataclass(frozen=True, kw_only=True)
    class Params(plgpu.InterpretGPUParams):
        device: str

    return Params


# Below this XLA hands an array to a callback at once; a larger one is copied by its thread pool, while a kernel's three
# warpgroups wait for each other inside callbacks of the same pool. With two threads it hangs (jax 0.12). The pool has a
# thread for each core, or as many as NPROC says where that is set before JAX makes its first array.
_AT_ONCE = 96 * 1024
_THREADS = 4


def interpreter_would_hang(nbytes: int) -> str | None:
    """A reason when a kernel with an array of `nbytes` may wait for itself in the interpreter on this machine."""
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if nbytes < _AT_ONCE or threads >= _THREADS:
        return None
    return (
        f"the interpreter needs {_THREADS} threads for arrays of {_AT_ONCE} bytes and more, XLA has {threads} here; "
        "set NPROC=8 in the environment before Python starts, or interpret something smaller"
    )


def interpreted_device() -> str | None:
    """The device that the interpreter stands for here, or None where kernels are compiled."""
    from jax._src import config

    return getattr(config.pallas_tpu_interpret_mode_context_manager.value, "device", None)
