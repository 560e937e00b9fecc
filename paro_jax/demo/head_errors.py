"""Whose rounding costs a head how much, and what would cost less: `python -m paro_jax.demo.head_errors`.

The demo model's own q, k and v, model order, blocks of 128 x 128, by an emulation that shares no code with the
backends: each operand rounded alone, then all of them as a kernel does, then with one thing changed. The error is the
relative L1 distance from unquantised attention over the same blocks: of a head, of a site (its output
[B, N, heads, D]), and of all sites together. Minutes on two cores; the table is kept in pallas_kernels/NOTES.md.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from paro_jax import AttentionPlan, TokenGrid
from paro_jax.demo import p_scale, run

Row = dict[str, Any]

BLOCK = p_scale.BLOCK[1]
LIMITS = {"int8": 0.02, "int4": 0.10}  # relative L1
_LEVELS = {"int8": (127, 127), "int4": (7, 15)}  # of q, k and v; of P


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What is rounded, to how many levels (None: not at all), and how."""

    q: int | None = None
    k: int | None = None
    p: int | None = None
    v: int | None = None
    k_tokens: int = BLOCK  # that share a scale of K
    v_tokens: int | None = None  # that share a scale of a channel of V; None: all
    p_keys: int = BLOCK  # that share a maximum of P
    k_mean: bool = True  # K is rounded less its mean, if at all
    q_mean: bool = False  # Q less the mean of each block, whose product with K is added back (arXiv 2411.10958, 3.1)
    clip: bool = False  # scales of q, k and v by the least squared error, not by the largest value
    v_mean: bool = False  # V's mean is left out and added to the output: softmax's rows sum to 1
    balance: bool = False  # channels of K and Q scaled against each other (SmoothQuant, arXiv 2211.10438)
    rotate: bool = False  # Q and K times a Hadamard matrix


def variants(width: str) -> dict[str, Numerics]:
    """Each operand alone, then all of them, then all with one change."""
    x, p = _LEVELS[width]
    every = Numerics(q=x, k=x, p=p, v=x)
    changes: Mapping[str, Any] = {
        "K by token": dict(k_tokens=1),
        "K by 64 tokens": dict(k_tokens=64),
        "V by block": dict(v_tokens=BLOCK),
        "V less its mean": dict(v_mean=True),
        "Q and K balanced": dict(balance=True),
        "Q and K rotated": dict(rotate=True),
        "scales by squared error": dict(clip=True),
        "P by 64 keys": dict(p_keys=64),
        "P of twice the levels": dict(p=2 * p),
        "K by token, rotated, V by block": dict(k_tokens=1, rotate=True, v_tokens=BLOCK),
    }
    alone = {"Q": Numerics(q=x), "K": Numerics(k=x), "P": Numerics(p=p), "V": Numerics(v=x)}
    changed = {name: dataclasses.replace(every, **change) for name, change in changes.items()}
    return {f"{name} alone": one for name, one in alone.items()} | {"all": every} | changed


@functools.partial(jax.jit, static_argnames="numerics")
def attend(q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array, numerics: Numerics) -> jax.Array:
    """q, k, v f32 [heads, N, D], kernel order; keep bool [heads, N, key blocks] -> o [heads, N, D]."""
    return jax.lax.map(lambda head: _head(head[0], head[1], head[2], head[3], numerics), (q, k, v, keep))


def _head(q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array, x: Numerics) -> jax.Array:
    tokens, dim = q.shape
    if x.k is not None and x.k_mean:
        k = k - k.mean(axis=0, keepdims=True)
    if x.balance:
        ratio = jnp.sqrt(jnp.abs(k).max(axis=0) / jnp.abs(q).max(axis=0))
        q, k = q * ratio[None], k / ratio[None]
    if x.rotate:
        q, k = (y @ jnp.asarray(_hadamard(dim)) for y in (q, k))
    delta = jnp.zeros((1, tokens))
    if x.q_mean:
        blocks, count = jnp.arange(tokens) // BLOCK, -(-tokens // BLOCK)
        means = jax.ops.segment_sum(q, blocks, count) / jnp.bincount(blocks, length=count)[:, None]
        delta, q = (means @ k.T)[blocks], q - means[blocks]
    mean = v.mean(axis=0) if x.v_mean else jnp.zeros(dim)
    q, k = _rounded(q, x.q, 1, x.clip), _rounded(k, x.k, x.k_tokens, x.clip)
    v = _rounded(v - mean[None], x.v, x.v_tokens or tokens, x.clip, by_channel=True)
    scores = jnp.pad((q @ k.T + delta) * dim**-0.5, ((0, 0), (0, -tokens % BLOCK)), constant_values=-jnp.inf)
    scores = jnp.where(jnp.repeat(keep, BLOCK, axis=1), scores, -jnp.inf)
    scores = scores.reshape(tokens, -1, x.p_keys)
    top = scores.max(axis=(1, 2))[:, None]
    own = jnp.maximum(scores.max(axis=2), top - 100) if x.p is not None else jnp.broadcast_to(top, scores.shape[:2])
    p = jnp.exp(scores - own[..., None])
    p = p if x.p is None else jnp.round(x.p * p)
    p = (p * jnp.exp(own - top)[..., None]).reshape(tokens, -1)[:, :tokens]
    return p @ v / p.sum(axis=1, keepdims=True) + mean[None]


def _rounded(x: jax.Array, levels: int | None, rows: int, clip: bool, by_channel: bool = False) -> jax.Array:
    """x [N, D] on a grid of 2 levels + 1 values; `rows` tokens share a scale."""
    if levels is None:
        return x
    groups = jnp.pad(x, ((0, -len(x) % rows), (0, 0))).reshape(-1, rows, x.shape[1])
    axis = 1 if by_channel else (1, 2)
    largest = jnp.maximum(jnp.abs(groups).max(axis=axis, keepdims=True), 1e-7)
    best, least = jnp.zeros_like(groups), jnp.full_like(largest, jnp.inf)
    for share in np.linspace(1.0, 0.4, 13) if clip else (1.0,):
        scale = share * largest / levels
        found = jnp.clip(jnp.round(groups / scale), -levels, levels) * scale
        error = ((found - groups) ** 2).sum(axis=axis, keepdims=True)
        best, least = jnp.where(error < least, found, best), jnp.minimum(error, least)
    return best.reshape(-1, x.shape[1])[: len(x)]


def _hadamard(dim: int) -> np.ndarray:
    """Orthogonal f32 [dim, dim] of one magnitude; dim a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(dim)).astype(np.float32)


def measure(
    samples: Iterable[calibrate.Sample],
    grid: TokenGrid,
    *,
    densities: Sequence[float] = p_scale.DENSITIES,
    widths: Sequence[str] = tuple(LIMITS),
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per density, width and variant: `mean` and `worst` of the heads' errors, `above` the width's limit of
    `heads`, `worst_site`, and `together`: the error of all sites as one array.

    `samples`: with v; tokens as in `grid`. A density under 1 keeps a band of blocks around the diagonal of every head.
    """
    sums: dict[tuple[float, str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    order = np.asarray(grid.index(grid.orders[0]))
    for sample in samples:
        batch, _, heads, dim = sample.q.shape
        assert sample.v is not None, "samples are captured with v"
        by_head = (np.swapaxes(x[:, order], 1, 2) for x in (sample.q, sample.k, sample.v))
        q, k, v = (jnp.asarray(x, jnp.float32).reshape(batch * heads, -1, dim) for x in by_head)
        dense = AttentionPlan.dense(grid, heads=heads, block=p_scale.BLOCK)
        for density in densities:
            note(f"site {sample.site}, step {sample.step:.2f}, density {density:g}")
            plan = dense if density == 1 else run.window_plan(dense, density)
            keep = jnp.repeat(plan.mask().keep, BLOCK, axis=1)[:, : grid.tokens]
            keep = jnp.tile(keep, (batch, 1, 1))
            every = {(density, width, name): x for width in widths for name, x in variants(width).items()}
            for key, found in distances(q, k, v, keep, every).items():
                sums.setdefault(key, []).append(found)
    rows = []
    for (density, width, name), found in sums.items():
        rows.append({"density": density, "width": width, "what": name} | summary(found, LIMITS[width]))
    return sorted(rows, key=lambda row: (-row["density"], row["width"] != "int8"))


def distances(q, k, v, keep, every: Mapping[Any, Numerics]) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """Of each variant: by head, how far its output is from the exact one, and how large that is (sums of |x|)."""
    exact = attend(q, k, v, keep, Numerics())
    size = np.asarray(jnp.abs(exact).sum((1, 2)))
    return {key: (np.asarray(jnp.abs(attend(q, k, v, keep, x) - exact).sum((1, 2))), size) for key, x in every.items()}


def summary(found: Sequence[tuple[np.ndarray, np.ndarray]], limit: float) -> Row:
    """`distances` of several samples as `heads`, `mean`, `worst`, `above` the limit, `worst_site`, `together`."""
    apart, size = (np.stack(x) for x in zip(*found, strict=True))  # [samples, B * heads]
    error, site = apart / size, apart.sum(axis=1) / size.sum(axis=1)
    row: Row = {"heads": error.size, "mean": float(error.mean()), "worst": float(error.max())}
    row |= {"above": int((error > limit).sum()), "worst_site": float(site.max())}
    return row | {"together": float(apart.sum() / size.sum())}


def table(rows: Sequence[Row]) -> str:
    """The rows as in NOTES.md: per cent."""
    names = "density", "width", "rounded", "head: mean", "worst", "above the limit", "site: worst", "together"
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        mean, worst, site, together = (f"{100 * row[x]:.2f}" for x in ("mean", "worst", "worst_site", "together"))
        above = f"{row['above']} of {row['heads']}"
        cells = f"{100 * row['density']:g} %", row["width"], row["what"], mean, worst, above, site, together
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.head_errors", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args()
    rows = measure(*p_scale.captured(), note=(lambda message: None) if args.json else print)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
