"""Others' attention on the same tensors. One that cannot run here is a row that says why, never no row.

A peer is a name, a `why_not`, and a `prepare` that returns a jitted function and its arguments, with whatever it wants
to have beforehand (a width, a layout) done: like ours, it is timed from there. PyTorch runs in a process of its own.
"""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Prepared = tuple[Callable[..., Any], tuple, float]  # jitted function, arguments, what its output is multiplied by


@dataclass(frozen=True)
class Problem:
    """One attention call in kernel order: q, k, v [B, N, H, D]; `keep` bool [H, nq, nk], or None for a dense peer."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    keep: np.ndarray | None
    block: tuple[int, int]
    device: str  # as `Request.device`


class Peer(NamedTuple):
    name: str
    widths: tuple[str, str]
    why_not: Callable[[Problem], str | None]
    prepare: Callable[[Problem], Prepared]


def _on_a_gpu(problem: Problem) -> str | None:
    return None if problem.device.startswith("sm_") else f"it needs an NVIDIA GPU, this is {problem.device}"


def _hopper(problem: Problem) -> str | None:
    return None if problem.device == "sm_90" else f"it needs an H100 or H200, this is {problem.device}"


def _cudnn(problem: Problem) -> Prepared:
    return (
        jax.jit(partial(jax.nn.dot_product_attention, implementation="cudnn")),
        (problem.q, problem.k, problem.v),
        1.0,
    )


def _cudnn_fp8(problem: Problem) -> Prepared:
    # Private: jax.nn has no way to ask for fp8 (jax 0.11.2 to 0.12).
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    most, arrays, scales = float(jnp.finfo(jnp.float8_e4m3fn).max), [], {}
    for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
        scale = jnp.max(jnp.abs(x)).astype(jnp.float32) / most
        arrays.append((x.astype(jnp.float32) / scale).astype(jnp.float8_e4m3fn))
        scales[f"descale_{name}"] = scale
    # P lies in [0, 1]; the output, a mean of v, is stored at v's scale.
    scales |= {"scale_s": most, "descale_s": 1 / most, "scale_o": 1 / scales["descale_v"]}
    shaped = {name: jnp.asarray(value, jnp.float32).reshape(1, 1, 1, 1) for name, value in scales.items()}
    params = {name: shaped.get(name, jnp.ones((1, 1, 1, 1), jnp.float32)) for name in cudnn.fp8_params_keys}
    scale = 1 / math.sqrt(problem.q.shape[-1])

    @jax.jit
    def call(q, k, v, params):
        return cudnn.dot_product_attention(q, k, v, fp8_params=params, scale=scale, use_fp8=True)[0]

    return call, (*arrays, params), float(scales["descale_v"])


def _jax_nn(problem: Problem) -> Prepared:
    return jax.jit(partial(jax.nn.dot_product_attention, implementation="xla")), (problem.q, problem.k, problem.v), 1.0


def _on_a_cpu(problem: Problem) -> str | None:
    return (
        "on a GPU it writes all scores to memory; cuDNN stands for jax.nn there" if _on_a_gpu(problem) is None else None
    )


_MGPU_KEYS = 128


def _mgpu_why_not(problem: Problem) -> str | None:
    if reason := _hopper(problem):
        return reason
    tokens = problem.q.shape[1]
    return f"it needs whole blocks of {_MGPU_KEYS} tokens, these are {tokens}" if tokens % _MGPU_KEYS else None


def _mgpu(problem: Problem) -> Prepared:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=_MGPU_KEYS, max_concurrent_steps=2)
    # It does not scale, and its scratch is float16 whatever comes in.
    arrays = (problem.q * problem.q.shape[-1] ** -0.5, problem.k, problem.v)
    return jax.jit(partial(attention_mgpu.attention, config=config)), tuple(x.astype(jnp.float16) for x in arrays), 1.0


def _tokamax_why_not(problem: Problem) -> str | None:
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed (pip install tokamax)"
    return _on_a_gpu(problem)


def _tokamax(problem: Problem) -> Prepared:
    import tokamax  # pyright: ignore[reportMissingImports]

    kind = "mosaic" if problem.device == "sm_90" else "triton"
    return jax.jit(partial(tokamax.dot_product_attention, implementation=kind)), (problem.q, problem.k, problem.v), 1.0


PEERS = (
    Peer("cudnn bf16", ("bf16", "bf16"), _on_a_gpu, _cudnn),
    Peer("cudnn fp8", ("fp8", "fp8"), _hopper, _cudnn_fp8),
    Peer("jax.nn", ("bf16", "bf16"), _on_a_cpu, _jax_nn),
    Peer("attention_mgpu", ("bf16", "bf16"), _mgpu_why_not, _mgpu),
    Peer("tokamax", ("bf16", "bf16"), _tokamax_why_not, _tokamax),
)


FOLDER = "paro-bench-"  # how the names of `Torch`'s folders start


class Torch:
    """PyTorch's attention, by `torch_peer.py` in a process of its own: another Python if need be, memory apart.

    Tensors go by way of files. `close` ends the process.
    """

    MASKED = {"torch sdpa": False, "torch flex": True}  # whether it takes the mask

    def __init__(self, python: str):
        self.python, self.process = python, None
        # By the number of this process: whoever ends it by force removes the folder.
        self.folder = tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-")
        self.written: tuple[Any, ...] = ()

    def ask(self, name: str, problem: Problem, seconds: float) -> dict[str, Any]:
        """{"ms", "low_ms", ..., "out": the last batch entry, [1, N, H, D]}, {"missing": why} or {"failed": why}."""
        folder = Path(self.folder.name)
        tensors = (problem.q, problem.k, problem.v)
        if not (len(self.written) == 3 and all(a is b for a, b in zip(self.written, tensors, strict=True))):
            for letter, x in zip("qkv", tensors, strict=True):
                # [B, H, N, D]; bfloat16 as its bits, numpy has none.
                x = np.asarray(jnp.swapaxes(x, 1, 2))
                np.save(folder / f"{letter}.npy", x.view(np.uint16) if x.dtype.itemsize == 2 else x)
            self.written = tensors
        if problem.keep is not None:
            np.save(folder / "keep.npy", problem.keep)
        job = {"peer": name, "folder": str(folder), "dtype": str(problem.q.dtype), "block": problem.block,
               "gpu": problem.device.startswith("sm_"), "seconds": seconds}  # fmt: skip
        if self.process is None:
            self.process = subprocess.Popen(
                [self.python, str(Path(__file__).with_name("torch_peer.py"))], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended is still there to read
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self._stop()
            return {"failed": f"the process of {name} ended with status {status}"}
        try:
            found = json.loads(line)
        except ValueError:
            self._stop()
            return {"failed": f"the process of {name} answered {line.strip()[:200]!r}; is {self.python} a Python?"}
        if "ms" in found:
            found["out"] = np.load(folder / "out.npy").swapaxes(1, 2)
        return found

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):  # what it never read
                self.process.communicate()
            self.process = None

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()
