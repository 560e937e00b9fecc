"""What calibration looks at: q and k of attention layers, recorded while a model runs, and their checks."""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

import paro_jax
from calibrate import _mass
from paro_jax import AttentionPlan, TokenGrid

_PROBED = 1024  # numbers of q, of k and of v that tell one sample from another


class Sample(NamedTuple):
    """One call of one attention layer.

    `site`: number of the attention layer, from 0 without gaps. `step`: how far denoising has come, in [0, 1). `q`, `k`:
    [B, N, heads, D] after norm and RoPE, in model order; the batch (both halves of classifier-free guidance, say) is
    averaged. `v`: the same shape, or None; needed for the "error" objective and for output errors in the report, which
    are those of float32 where q, k and v differ in dtype.
    """

    site: int
    step: float
    q: Any
    k: Any
    v: Any = None


Samples = Iterable[Sample]  # an iterable of Sample that can be iterated again and gives the same samples each time


def capture(
    run: Callable[[Callable[..., jax.Array]], Any], *, step: float, attention: Callable[..., jax.Array] | None = None
) -> list[Sample]:
    """Record every attention call of a model: one Sample per call, sites numbered in the sequence of the calls.

    `run(attention)` must call the model once with the `attention` it is given in place of the model's own attention
    function, `attention(query, key, value, ...)`; jit and scan inside are fine. `step`: how far denoising has come.
    `attention`: what computes the output, further arguments included. The default is exact attention: streamed over all
    blocks of a dense plan, without an N x N map; but `jax.nn.dot_product_attention`, which may hold the map, for a call
    with a bias, a mask, grouped heads, or keys of another number than queries.

    Raises ValueError when `run` never calls attention, as a model does that was compiled with another attention before.
    """
    inner = _streamed if attention is None else attention
    seen: list[tuple[np.ndarray, ...]] = []

    def keep(*qkv):
        seen.append(tuple(map(np.array, qkv)))

    def recording(query, key, value, *args, **kwargs):
        io_callback(keep, None, query, key, value, ordered=True)
        return inner(query, key, value, *args, **kwargs)

    jax.block_until_ready(run(recording))
    jax.effects_barrier()
    if not seen:
        raise ValueError(
            "run must call the attention function it is given, once per attention layer; it was never called. A "
            "function that was compiled earlier keeps the attention it was compiled with: build or jit the model "
            "inside run."
        )
    return [Sample(site, step, *qkv) for site, qkv in enumerate(seen)]


def _streamed(query, key, value, bias=None, mask=None, **kwargs):
    """Exact attention that a capture of a video model survives: at 17776 tokens one head's map is 1.3 GB."""
    plain = bias is None and mask is None and set(kwargs) <= {"scale"}
    alike = query.ndim == 4 and query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    if not (plain and alike):
        return paro_jax.attention(query, key, value, bias, mask, **kwargs)
    plan = AttentionPlan.dense(TokenGrid((query.shape[1],)), heads=query.shape[2])
    return paro_jax.attention(query, key, value, plan=plan, **kwargs)


class LiveSamples:
    """Samples made anew on every pass: the model runs again, so that one layer's q, k and v exist at a time.

    All of them at once would be terabytes for a video model: 27 GB for a single forward of CogVideoX-5B.

    `runs`: pairs (step, run). `step`: how far denoising has come, in [0, 1). `run()` gives (q, k, v) of each attention
    layer in turn, as `capture` of every model in `paro_jax.models` does:

        calibrate.LiveSamples([(0.3, lambda: net.capture(latents, timestep, text))], sites=42)

    `sites`: how many layers there are. Raises ValueError, on a pass, for a run that gives another number of them.
    """

    def __init__(self, runs: Iterable[tuple[float, Callable[[], Iterable[tuple[Any, Any, Any]]]]], *, sites: int):
        self.runs = list(runs)
        self.sites = sites

    def __len__(self) -> int:
        return len(self.runs) * self.sites

    def __iter__(self) -> Iterator[Sample]:
        for step, run in self.runs:
            site = -1
            for site, qkv in enumerate(run()):
                yield Sample(site, step, *qkv)
            if site + 1 != self.sites:
                raise ValueError(
                    f"sites must be the number of attention layers; the run at step {step:g} gave {site + 1}, expected "
                    f"{self.sites}. Give sites={site + 1}, or let the run yield every layer once."
                )


class Checked(NamedTuple):
    """A sample that passed the checks: `number` in the sequence, `bucket` of its step, q, k and v on the device."""

    number: int
    site: int
    step: float
    bucket: int
    q: jax.Array
    k: jax.Array
    v: jax.Array | None

    @property
    def name(self) -> str:
        return f"site {self.site}, step {self.step:g} (bucket {self.bucket})"

    def digest(self) -> int:
        """A number that differs for another sample; made from about a thousand of its numbers, so it costs nothing."""
        given = [x for x in (self.q, self.k, self.v) if x is not None]
        # An odd stride: one that head_dim divides would only ever see the first channel.
        probe = [np.asarray(x.reshape(-1)[:: x.size // _PROBED | 1]) for x in given]
        about = repr((self.site, self.step, self.q.shape, [str(x.dtype) for x in given])).encode()
        return functools.reduce(lambda crc, x: zlib.crc32(x.tobytes(), crc), probe, zlib.crc32(about))


def check_reiterable(samples: Any, name: str = "samples") -> None:
    """ValueError unless `samples` can be iterated more than once."""
    if isinstance(samples, Iterator) or not (isinstance(samples, Iterable) or hasattr(samples, "__getitem__")):
        raise ValueError(
            f"{name} must be an iterable of calibrate.Sample that can be iterated again, such as a list or an object "
            f"whose __iter__ starts anew (calibration passes over it more than once); got {type(samples).__name__}. "
            "Put a generator's code into the __iter__ of a class."
        )


def check_edges(edges: Any) -> tuple[float, ...]:
    """`bucket_edges` as a tuple of floats, or ValueError."""
    try:
        found = tuple(float(e) for e in edges)
    except (TypeError, ValueError):
        found = ()
    if len(found) < 2 or found[0] != 0 or found[-1] != 1 or any(not a < b for a, b in pairwise(found)):
        raise ValueError(
            f"bucket_edges must increase from 0.0 to 1.0, e.g. (0.0, 0.5, 1.0) for two buckets; got {edges!r}."
        )
    return found


def read(samples: Samples, grid: TokenGrid, edges: Sequence[float], *, name: str = "samples") -> Iterator[Checked]:
    """The samples one by one, each checked.

    Raises ValueError, naming the sample, for anything that is not a Sample of this grid, for samples of two shapes,
    and for NaN or infinity.
    """
    first: tuple[str, tuple[int, ...]] | None = None  # not the arrays: they may be gigabytes
    for number, sample in enumerate(samples):
        checked = _check(number, sample, grid, edges, name)
        first = (checked.name, checked.q.shape) if first is None else first
        if checked.q.shape[2:] != first[1][2:]:
            raise ValueError(
                f"{name} must all have the same heads and head dim; {first[0]} has {list(first[1])}, "
                f"{checked.name} has {_shape(checked.q)}. Calibrate layers of another shape on their own."
            )
        yield checked


def _check(number: int, sample: Any, grid: TokenGrid, edges: Sequence[float], name: str) -> Checked:
    if not isinstance(sample, Sample):
        raise ValueError(
            f"{name} must hold calibrate.Sample(site, step, q, k, v); number {number} is a {type(sample).__name__}."
        )
    site, step = sample.site, sample.step
    if isinstance(site, bool) or not isinstance(site, (int, np.integer)) or site < 0:
        raise ValueError(
            f"{name}: site must be the number of an attention layer, an int from 0; number {number} has {site!r}."
        )
    try:
        step = float(step)
    except (TypeError, ValueError):
        step = float("nan")
    if not 0 <= step < 1:
        raise ValueError(
            f"{name}: step must be a fraction of the schedule in [0, 1), e.g. 9 / 30; number {number} (site {site}) "
            f"has {sample.step!r}."
        )
    bucket = bucket_of(step, edges)
    q, k = jnp.asarray(sample.q), jnp.asarray(sample.k)
    v = None if sample.v is None else jnp.asarray(sample.v)
    checked = Checked(number, int(site), step, bucket, q, k, v)
    for role, x in {"q": q, "k": k, "v": v}.items():
        if x is None:
            continue
        if x.ndim != 4 or x.shape[1] != grid.tokens or 0 in x.shape or x.shape != q.shape:
            other = "" if role == "q" else f" (q is {_shape(q)})"
            raise ValueError(
                f"{name}: {role} of {checked.name} must be [B, {grid.tokens}, heads, D] for {grid.tokens} tokens (grid "
                f"{grid.shape}, text {grid.text}), the same for q, k and v; got {_shape(x)}{other}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: {role} of {checked.name} must be floating point; got {x.dtype}.")
        if not _mass.finite(x):
            bad = int(np.count_nonzero(~np.isfinite(np.asarray(x, np.float32))))
            raise ValueError(
                f"{name}: {role} of {checked.name} holds NaN or infinity, {bad} of {x.size} values. The model already "
                "produced them: check its weights and dtype (float16 overflows at 65504), or leave this sample out."
            )
    return checked


def bucket_of(step: float, edges: Sequence[float]) -> int:
    """The bucket that holds `step`, as `AttentionPlan.at_step` counts: in fractions, so 3/10 is not below 0.3."""
    at = Fraction(step).limit_denominator(10**6)
    return sum(at >= Fraction(edge).limit_denominator(10**6) for edge in edges[1:-1])


def _shape(x: jax.Array) -> str:
    return str(list(x.shape))
