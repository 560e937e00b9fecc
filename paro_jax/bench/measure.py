"""The row of one job, measured in this process: what it cost, and whether the result was right."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Norm, Request, Rope, _tiles
from pallas_kernels.arrange import arrange as kernel_arrange
from pallas_kernels.arrange import projection
from pallas_kernels.arrange.reference import normed, rotated, spread
from pallas_kernels.bench import ceilings, peers, timing
from pallas_kernels.block_attention import operand_layout
from pallas_kernels.workloads import backends
from paro_jax import AttentionPlan, QuantSpec, TokenGrid, _attention, arrange, attend, project_in
from paro_jax.bench import cases
from paro_jax.bench.cases import Case
from paro_jax.bench.jobs import SCALING_HEADS, Job, Settings

Row = dict[str, Any]
# A relative L1 error above this is no rounding: the row is a failure, however fast it was.
WRONG = {"bf16": 0.03, "int8": 0.15, "fp8": 0.25, "int4": 0.6}
_ROLES: tuple[_attention.Role, ...] = ("q", "k", "v")
_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OUT_OF_MEMORY")
_POISON = ("CUDA_ERROR", "illegal memory", "launch failure", "misaligned address", "illegal instruction")


class Missing(Exception):
    """This row cannot be had here, and nobody is at fault."""


def measure(job: Job, settings: Settings, timer: timing.Timer | None = None) -> Row:
    """The row of `job`: its facts, `status`, and what was measured. Never raises what a contestant raised.

    status: "measured"; "missing": cannot be had here, `reason` says why; "failed", "out of memory": with the reason.
    `poisoned`: the failure may have broken this process' device.
    """
    try:
        return {**job.facts, "status": "measured", **_KINDS[job.kind](job, settings, timer)}
    except Missing as why:
        return {**job.facts, "status": "missing", "reason": str(why)}
    except Exception as error:
        return {**job.facts, **failure(error)}


def failure(error: Exception) -> Row:
    """`status` and `reason` of what a contestant raised."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    if isinstance(error, MemoryError) or any(word in said for word in _MEMORY):
        return {"status": "out of memory", "reason": said}
    return {"status": "failed", "reason": said, "poisoned": any(word in said for word in _POISON)}


def sized(job: Job, settings: Settings) -> Case:
    """The case of a job at the settings' size."""
    if job.kind == "scaling":
        assert job.tokens is not None
        heads = min(SCALING_HEADS, settings.heads or SCALING_HEADS)
        return Case("scaling", TokenGrid((job.tokens,)), 1, heads, 128, settings.dtype, settings.block)
    return cases.case(
        job.name, dtype=settings.dtype, block=settings.block, tokens=settings.tokens, heads=settings.heads,
        densities=settings.densities,
    )  # fmt: skip


def requested(case: Case, job: Job, settings: Settings) -> Request:
    """What backends and tables of tiles are asked: the operands in the layout that `arrange` gives them."""
    n, quant = case.grid.tokens, QuantSpec(qk=job.qk, pv=job.pv)  # type: ignore[arg-type]
    request = Request(
        "block_attention", case.batch, case.heads, n, n, case.head_dim, case.dtype, case.block, quant.qk, quant.pv,
        quant.p_scale, settings.device,
    )  # fmt: skip
    return replace(request, layout=operand_layout(request, settings.backend))


def _ceiling(job: Job, settings: Settings, timer: timing.Timer | None) -> Row:
    name = settings.dtype if job.name == "again" else job.name
    found, rate = ceilings.measure(name, quick=settings.quick, timer=timer)
    return {**_facts(found), "of": name, "rate": rate, "unit": ceilings.NAMES[name]}


def _ours(job: Job, settings: Settings, timer: timing.Timer | None) -> Row:
    """The attention kernel alone: operands arranged and lists of kept blocks made beforehand, as peers have theirs."""
    case = sized(job, settings)
    function, arguments, plan, tiles = kernel(case, job, settings)
    found, out = timing.measure(function, arguments, seconds=settings.seconds, timer=timer)
    keep = np.asarray(plan.mask().keep)
    slots_of, out = np.asarray(plan.slots), out[-1]
    error = _error(lambda head, slots: np.asarray(out[slots_of[head][slots], head]), plan, *cases.tensors(case))
    work = {**_worked(case, keep), "tiles": tiles}
    return {**_facts(found), **_right(error, (job.qk, job.pv)), **work, "tops": work["operations"] / found.ms / 1e9}


def kernel(
    case: Case, job: Job, settings: Settings
) -> tuple[Callable[..., Any], tuple, AttentionPlan, dict[str, int] | None]:
    """(jitted call, its arguments, plan, tiles): block_attention on operands that are already in kernel order."""
    request = requested(case, job, settings)
    backend = next(b for b in backends(request) if b.name == settings.backend)
    if reason := backend.why_not(request):
        raise Missing(f"{backend.name} does not serve this: {reason}")
    plan = _plan(case, job)
    every = backend.candidates(request) if backend.candidates is not None else ()
    if job.tiles is not None:
        tiles = next(t for t in every if asdict(t) == job.tiles)
    else:
        tiles = _tiles.measured(request, backend) or next(iter(every), None)
    q, k, v = (
        jax.block_until_ready(arrange(x, plan=plan, role=role, implementation=settings.backend))
        for role, x in zip(_ROLES, cases.tensors(case), strict=True)
    )
    schedule = jax.block_until_ready((*plan.schedule(), plan.slots))
    return _kernel_call(settings.backend, tiles), (q, k, v, plan, schedule), plan, tiles and asdict(tiles)


@lru_cache
def _kernel_call(backend: str, tiles: Any) -> Callable[..., Any]:
    """Jitted once, so that other masks compile nothing."""

    def call(q, k, v, plan, schedule):
        return _attention._attended(q, k, v, plan, None, backend, False, schedule=schedule, tiles=tiles)

    return jax.jit(call)


def _peer(job: Job, settings: Settings, timer: timing.Timer | None) -> Row:
    case = sized(job, settings)
    plan = _plan(case, job)
    q, k, v = in_kernel_order(case, plan)
    keep = np.asarray(plan.mask().keep)
    problem = peers.Problem(q, k, v, keep, case.block, settings.device)
    if job.contestant in peers.Torch.MASKED:
        found = _torch(settings.torch_python).ask(job.contestant, problem, settings.seconds)
        if "missing" in found:
            raise Missing(found["missing"])
        if "failed" in found:
            raise RuntimeError(found["failed"])
        out = found.pop("out")
    else:
        peer = next(p for p in peers.PEERS if p.name == job.contestant)
        if reason := peer.why_not(problem):
            raise Missing(reason)
        try:
            function, arguments, factor = peer.prepare(problem)
        except ImportError as error:  # there, but not what it needs itself
            raise Missing(f"{peer.name} cannot be imported: {error}") from error
        timed, result = timing.measure(function, arguments, seconds=settings.seconds, timer=timer)
        out, found = np.asarray(result[-1:].astype(jnp.float32)) * factor, _facts(timed)
    error = _error(lambda head, slots: out[-1][slots, head], plan, *cases.tensors(case))
    work = _worked(case, keep)
    return {**found, **_right(error, (job.qk, job.pv)), **work, "tops": work["operations"] / found["ms"] / 1e9}


def _path(job: Job, settings: Settings, timer: timing.Timer | None) -> Row:
    """A whole attention layer, hidden states in and out, beside the dense one, and what PARO adds to it.

    Dense: three projections, q/k norm and RoPE, dense attention, output projection. Ours: project_in three times,
    attend, the same output projection. `overhead_ms` is what permuting, quantising and masks cost: what project_in
    takes beyond the dense projections, and attend beyond its attention kernel.
    """
    case = sized(job, settings)
    kernel_call, kernel_arguments, plan, tiles = kernel(case, job, settings)
    x, weights, out_weight, norm, rope = _layer(case)
    calls = _path_calls(settings.backend, "cudnn" if settings.device.startswith("sm_") else "xla")
    spent: dict[str, timing.Timing] = {}

    def time(name: str, *arguments: Any) -> Any:
        function = calls.get(name, kernel_call)
        spent[name], result = timing.measure(function, arguments, seconds=settings.seconds / 2, timer=timer)
        return result

    q, k, v = time("dense in", x, weights, norm, rope)
    o = time("dense attention", q, k, v)
    time("out", o, out_weight)
    stored = time("ours in", x, weights, norm, rope, plan)
    time("attend", *stored, plan)
    time("kernel", *stored, *kernel_arguments[len(stored) :])
    expected = time("dense layer", x, weights, norm, rope, out_weight)
    got = time("our layer", x, weights, norm, rope, out_weight, plan)
    ms = {name: found.ms for name, found in spent.items()}
    beside = ms["attend"] - ms["kernel"]
    if kernels := spent["attend"].kernels:  # where each kernel is seen: all but the attention, by far the longest
        beside = sum(kernels.values()) - max(kernels.values())
    ms["beside the kernel"] = beside
    overhead = ms["ours in"] - ms["dense in"] + beside
    expected, got = (np.asarray(y.astype(jnp.float32)) for y in (expected, got))
    return {
        **_facts(spent["our layer"]),
        **_worked(case, np.asarray(plan.mask().keep)),
        "tiles": tiles,
        "parts_ms": ms,
        "dense_layer_ms": ms["dense layer"],
        "layer_speedup": ms["dense layer"] / ms["our layer"],
        "overhead_ms": overhead,
        "overhead_of_dense_attention": overhead / ms["dense attention"],
        # Not an error: below full density the two compute different things.
        "difference_from_dense": float(np.abs(got - expected).sum() / np.abs(expected).sum()),
    }


@lru_cache
def _path_calls(backend: str, dense_name: str) -> dict[str, Callable[..., Any]]:
    """The parts of a layer and both layers whole, jitted once."""

    def dense_in(x, weights, norm, rope):
        q, k, v = (jnp.einsum("bnc,chd->bnhd", x, w) for w in weights)
        turned = (rotated(normed(y.astype(jnp.float32), norm), rope).astype(x.dtype) for y in (q, k))
        return (*turned, v)

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=dense_name)  # type: ignore[arg-type]

    def out(o, weight):
        return jnp.einsum("bnhd,hdc->bnc", o, weight)

    def ours_in(x, weights, norm, rope, plan):
        return tuple(
            project_in(x, w, plan=plan, role=role, implementation=backend, **extra)
            for w, role, extra in zip(weights, _ROLES, ({"norm": norm, "rope": rope},) * 2 + ({},), strict=True)
        )

    def ours(q, k, v, plan):
        return attend(q, k, v, plan=plan, implementation=backend)

    def dense_layer(x, weights, norm, rope, weight):
        q, k, v = dense_in(x, weights, norm, rope)
        return out(dense(q, k, v), weight)

    def our_layer(x, weights, norm, rope, weight, plan):
        q, k, v = ours_in(x, weights, norm, rope, plan)
        return out(ours(q, k, v, plan), weight)

    parts = {"dense in": dense_in, "dense attention": dense, "out": out, "ours in": ours_in, "attend": ours}
    return {name: jax.jit(f) for name, f in {**parts, "dense layer": dense_layer, "our layer": our_layer}.items()}


def _projection(job: Job, settings: Settings, timer: timing.Timer | None) -> Row:
    """One kernel from projection to blocks beside XLA's product and `arrange`, on the same tensors, one scale a token.

    `ms`: with the tiles that are fastest, of `tiles_ms`, weights and orders prepared beforehand; `whole_ms`: with their
    preparation; `apart_ms`: XLA's product, then `arrange`. `speedup` is apart_ms / ms.
    """
    case = sized(job, settings)
    n, role, width = case.grid.tokens, job.role, job.qk
    request = Request(
        "projection", case.batch, case.heads, n, n, case.head_dim, case.dtype, case.block, job.qk, job.pv,
        device=settings.device, role=role, layout="hopper",
    )  # fmt: skip
    if reason := projection.why_not(request, channels=case.channels):
        raise Missing(f"the fused kernel does not serve this: {reason}")
    plan = cases.plan(case, "dense", 1.0, job.qk, job.pv)
    x, weights, _, norm, rope = _layer(case)
    weight, extras = weights["qkv".index(role)], (norm, rope, plan.k_mean if role == "k" else None)
    block, prepare = case.block[role != "q"], partial(projection.prepared, width=width)

    @jax.jit
    def apart(x, weight, slots, norm, rope, mean):
        y = jnp.einsum("bnc,chd->bnhd", x, weight)
        return kernel_arrange(
            y, slots, role=role, width=width, group="row", block=block, norm=norm, rope=rope, mean=mean,  # type: ignore
            layout="hopper", implementation=settings.backend,
        )  # fmt: skip

    def fused(tiles):
        run = partial(projection.run, role=role, width=width, layout="hopper", tiles=tiles)
        return jax.jit(lambda x, ready, *extras: run(x, ready, None, *extras))

    def time(function, *arguments):
        return timing.measure(function, arguments, seconds=settings.seconds / 3, timer=timer)

    theirs, expected = time(apart, x, weight, plan.slots, *extras)
    ready = jax.block_until_ready(jax.jit(prepare)(weight, plan.slots))
    found: dict[projection.Tiles, timing.Timing] = {}
    errors, failed = {}, {}
    for tiles in projection.candidates(request):
        try:
            found[tiles], got = time(fused(tiles), x, ready, *extras)
        except Exception as error:
            failed[tiles] = failure(error)
            if failed[tiles].get("poisoned") or len(failed) == len(projection.candidates(request)):
                raise
            continue
        errors[tiles] = _stored_error(got, expected, n, block)
    best = min(found, key=lambda tiles: found[tiles].ms)
    both = jax.jit(lambda x, weight, slots, *extras: fused(best)(x, prepare(weight, slots), *extras))
    whole, _ = time(both, x, weight, plan.slots, *extras)
    every = {**{t: timed.ms for t, timed in found.items()}, **{t: row["reason"] for t, row in failed.items()}}
    return {
        **_facts(found[best]),
        **_right(max(errors.values()), (width, width)),
        "tokens": n, "batch": case.batch, "heads": case.heads, "head_dim": case.head_dim, "dtype": case.dtype,
        "tiles": asdict(best),
        "tiles_ms": {str(tiles): ms for tiles, ms in every.items()},
        "whole_ms": whole.ms,
        "apart_ms": theirs.ms,
        "speedup": theirs.ms / found[best].ms,
    }  # fmt: skip


def _stored_error(got: tuple, expected: tuple, tokens: int, block: int) -> float:
    """Relative L1 difference of two results of `arrange`, multiplied out, of the last batch entry and head."""
    a, b = (
        values[-1:, -1:].astype(jnp.float32) * (1 if scales is None else spread(scales[-1:, -1:], tokens, block))
        for values, scales, _ in (got, expected)
    )
    return float(jnp.abs(a - b).sum() / jnp.abs(b).sum())


_KINDS: dict[str, Callable[[Job, Settings, timing.Timer | None], Row]] = {
    "ceiling": _ceiling, "attention": _ours, "scaling": _ours, "tune": _ours, "peer": _peer, "path": _path,
    "projection": _projection,
}  # fmt: skip


# --- what rows share ------------------------------------------------------------------------------------------------


def _facts(found: timing.Timing) -> Row:
    return asdict(found)


def _worked(case: Case, keep: np.ndarray) -> Row:
    shape = {"tokens": case.grid.tokens, "grid": case.grid.shape, "text": case.grid.text, "batch": case.batch}
    shape |= {"heads": case.heads, "head_dim": case.head_dim, "dtype": case.dtype, "block": case.block}
    kept = keep.sum(-1)
    return {**shape, "kept_density": float(keep.mean()), "kept_blocks": int(keep.sum()) * case.batch,
            "kept_per_row": [int(kept.min()), int(kept.max())], "operations": case.operations(keep)}  # fmt: skip


def _plan(case: Case, job: Job) -> AttentionPlan:
    try:
        return cases.plan(case, job.mask, job.density, job.qk, job.pv)
    except ValueError as error:
        if str(error).startswith("density"):
            raise Missing(str(error)) from error
        raise


@lru_cache(maxsize=1)
def _ordered(case: Case, order: bytes) -> tuple[jax.Array, ...]:
    slots = jnp.asarray(case.grid.table())[np.frombuffer(order, np.int8)]

    @jax.jit
    def gathered(x, slots):
        return jnp.take_along_axis(x, slots.T[None, :, :, None], axis=1)

    return tuple(gathered(x, slots) for x in cases.tensors(case))


def in_kernel_order(case: Case, plan: AttentionPlan) -> tuple[jax.Array, ...]:
    """q, k, v [B, N, H, D] in the plan's orders: peers know no orders, and need not pay for them."""
    return _ordered(case, np.asarray(plan.order, np.int8).tobytes())


def _error(output: Callable[[int, np.ndarray], np.ndarray], plan: AttentionPlan, q: Any, k: Any, v: Any) -> float:
    """Relative L1 error of some rows of the last batch entry, against float64 softmax over their kept blocks.

    output(head, kernel slots) gives the rows [slots, D].
    """
    rng = np.random.default_rng(1)
    heads = sorted({0, q.shape[2] - 1, q.shape[2] // 2})
    keep, tokens, (bq, bk) = np.asarray(plan.mask().keep), q.shape[1], plan.block
    wrong = right = 0.0
    for head in heads:
        slots = np.unique(np.append(rng.integers(0, tokens, 15), tokens - 1))
        place = np.asarray(plan.slots[head])
        rows, keys, values = (np.asarray(x[-1, :, head].astype(jnp.float32), np.float64) for x in (q, k, v))
        scores = rows[place[slots]] @ keys[place].T / math.sqrt(q.shape[-1])
        kept = np.repeat(keep[head][slots // bq], bk, axis=1)[:, :tokens]
        p = np.where(kept, np.exp(scores - np.where(kept, scores, -np.inf).max(1, keepdims=True)), 0)
        expected = p / p.sum(1, keepdims=True) @ values[place]
        wrong += np.abs(np.asarray(output(head, slots), np.float64) - expected).sum()
        right += np.abs(expected).sum()
    return wrong / right


def _right(error: float, widths: tuple[str, str]) -> Row:
    """The error, or the failure that it is. NaN never passes."""
    most = max(WRONG[width] for width in widths)
    if error <= most:
        return {"error": error}
    return {"error": error, "status": "failed",
            "reason": f"wrong result: relative L1 error {error:.3g}, at most {most} is rounding"}  # fmt: skip


@lru_cache(maxsize=1)
def _layer(case: Case) -> tuple[Any, ...]:
    """(hidden states [B, N, C], three weights [C, H, D], output weight [H, D, C], norm, RoPE)."""
    keys = jax.random.split(jax.random.key(1), 5)
    shape = (case.channels, case.heads, case.head_dim)
    x = jax.random.normal(keys[0], (case.batch, case.grid.tokens, case.channels), case.dtype)
    scale = case.channels**-0.5
    weights = tuple((scale * jax.random.normal(key, shape, jnp.float32)).astype(case.dtype) for key in keys[1:4])
    out = (scale * jax.random.normal(keys[4], (*shape[1:], case.channels), jnp.float32)).astype(case.dtype)
    rates = 10000.0 ** (-jnp.arange(case.head_dim // 2) / case.head_dim * 2)
    angles = jnp.outer(jnp.arange(case.grid.tokens), rates)
    return x, weights, out, Norm("rms", jnp.ones(case.head_dim)), Rope(jnp.cos(angles), jnp.sin(angles))


@lru_cache(maxsize=1)
def _torch(python: str) -> peers.Torch:
    return peers.Torch(python)
