"""What calibration decided: one order and one block mask per head, as an ordinary pytree."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer

from paro_jax._grid import TokenGrid, check_block, is_int
from paro_jax._mask import BlockMask, _density, check_first
from paro_jax._quant import QuantSpec

_UNQUANTISED = QuantSpec()


def _static() -> Any:
    return field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Order, mask and widths of every head. *lead is (), (sites,), (buckets,) or (buckets, sites).

    Pass it as a call argument: it scans over layers, shards over heads, and changing orders or masks never recompiles.
    Make one with `dense`, `build`, `load_plan` or calibration; the constructor does not validate, because JAX builds
    pytrees with placeholders in them.

    `order`: int8 [*lead, heads], position in `order_names`. `keep_bits`: uint8 [*lead, heads, nq, ceil(nk / 8)], the
    mask as `BlockMask.pack` gives it. `k_mean`: float32 [*lead, heads, head_dim], the calibrated mean of K after norm
    and RoPE, or None. Static: `grid`, `block` (bq, bk) in tokens, `order_names`, `quant`, `bucket_edges` (fractions of
    the schedule from 0 to 1; bucket g covers [edges[g], edges[g+1]); more than one bucket makes a bucket axis).
    `wide`: bool [*lead], where `wide_quant` (static) takes the place of `quant`; both None when all is `quant`.
    `first`: uint16 [*lead, heads, nq, m], the kept key blocks of greatest calibrated mass, heaviest first, or None:
    what a kernel visits before the others (`schedule`). But for rounding it changes no result, only the time.
    """

    order: jax.Array
    keep_bits: jax.Array
    k_mean: jax.Array | None
    grid: TokenGrid = _static()
    block: tuple[int, int] = _static()
    order_names: tuple[str, ...] = _static()
    quant: QuantSpec = _static()
    bucket_edges: tuple[float, ...] = _static()
    wide: jax.Array | None = None
    wide_quant: QuantSpec | None = field(default=None, metadata=dict(static=True))
    first: jax.Array | None = None

    @classmethod
    def dense(
        cls,
        grid: TokenGrid,
        *,
        heads: int,
        sites: int | None = None,
        order: str | Sequence[str] | None = None,
        quant: QuantSpec = _UNQUANTISED,
        block: tuple[int, int] = (64, 64),
    ) -> "AttentionPlan":
        """A plan that keeps every block. `order`: one name, a name per head, or None for model order.

        Raises ValueError for a bad count, block, or order name.
        """
        for name, value in (("heads", heads), ("sites", sites)):
            if not (value is None and name == "sites") and not (is_int(value) and value > 0):  # type: ignore[operator]
                raise ValueError(f"{name} must be a positive int; got {value!r}.")
        _check_type("grid", grid, TokenGrid)
        block = check_block(block)
        lead = () if sites is None else (sites,)
        mask = BlockMask(np.ones((*lead, heads, *grid.blocks(block)), bool), block)  # type: ignore[arg-type]
        return cls.build(grid, order=grid.orders[0] if order is None else order, mask=mask, quant=quant)

    @classmethod
    def build(
        cls,
        grid: TokenGrid,
        *,
        order: str | Sequence[Any],
        mask: BlockMask,
        quant: QuantSpec = _UNQUANTISED,
        k_mean: Any | None = None,
        bucket_edges: Sequence[float] = (0.0, 1.0),
        first: Any | None = None,
    ) -> "AttentionPlan":
        """A plan from its parts. `mask.keep` [*lead, heads, nq, nk] fixes *lead and the number of heads.

        `order`: a name, or names nested as [heads], [sites, heads] or [*lead, heads]; leading axes broadcast. `first`:
        integers [*lead, heads, nq, m] from 0 to nk - 1.
        Raises ValueError for parts that do not fit each other.
        """
        _check_type("grid", grid, TokenGrid)
        _check_type("mask", mask, BlockMask)
        _check_type("quant", quant, QuantSpec)
        block = check_block(mask.block)
        keep = mask.keep
        if not hasattr(keep, "dtype") or not hasattr(keep, "shape"):
            keep = np.asarray(keep)
        nq, nk = grid.blocks(block)
        if keep.dtype != bool or not 3 <= keep.ndim <= 5 or keep.shape[-2:] != (nq, nk) or 0 in keep.shape:
            raise ValueError(
                f"mask.keep must be bool [*lead, heads, {nq}, {nk}] with at most two leading axes, for {grid.tokens} "
                f"tokens in blocks of {block}; got {keep.dtype} {tuple(keep.shape)}."
            )
        lead_heads = tuple(keep.shape[:-2])
        edges = _check_edges(bucket_edges, lead_heads[:-1])
        if k_mean is not None:
            k_mean = jnp.asarray(k_mean, jnp.float32)
            if k_mean.ndim != len(lead_heads) + 1 or k_mean.shape[:-1] != lead_heads:
                raise ValueError(f"k_mean must be [*lead, heads, head_dim] = {[*lead_heads, 'D']}; got {k_mean.shape}.")
            if not isinstance(k_mean, Tracer) and not np.isfinite(np.asarray(k_mean)).all():
                raise ValueError("k_mean must be finite; got NaN or infinity. Check the samples it was computed from.")
        if first is not None:
            first = check_first(first, keep.shape)
            known = None if isinstance(first, Tracer) else np.asarray(first)
            if known is not None and ((known < 0) | (known >= nk)).any():
                raise ValueError(f"first must name key blocks, 0 to {nk - 1}; got {known.min()} to {known.max()}.")
            first = first.astype(jnp.uint16)
        ids = jnp.asarray(_order_ids(grid, order, lead_heads))
        bits = BlockMask(keep, block).pack()
        return cls(ids, bits, k_mean, grid, block, grid.orders, quant, edges, first=first)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes: () for one site, else (sites,), (buckets,) or (buckets, sites)."""
        return tuple(self.order.shape[:-1])

    @property
    def heads(self) -> int:
        """Attention heads of a site."""
        return self.order.shape[-1]

    @property
    def slots(self) -> jax.Array:
        """int32 [*lead, heads, tokens], kernel slot -> model token of every head."""
        # Derived on use: 1 byte a head is kept, not 4 bytes a head and token.
        return jnp.asarray(self.grid.table())[self.order]

    @property
    def density(self) -> float | jax.Array:
        """Kept blocks / all blocks, text included. A float; a float32 scalar under a trace."""
        nk = self.grid.blocks(self.block)[1]
        return _density(jnp.sum(jax.lax.population_count(self.keep_bits), -1, dtype=jnp.int32), nk)

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def mask(self) -> BlockMask:
        """The masks, unpacked: `keep` [*lead, heads, nq, nk]."""
        return BlockMask.unpack(self.keep_bits, nk=self.grid.blocks(self.block)[1], block=self.block)

    def schedule(self) -> tuple[jax.Array, jax.Array]:
        """(count, index) as of `BlockMask.schedule`, the walk that `attend` takes: `first`, then ascending.

        Ascending alone where P is rounded relative to the running maximum: everything behind a row's largest scores is
        then rounded coarsely, and with them in front that is all the rest (pallas_kernels/NOTES.md).
        """
        running = self.quant.pv != "bf16" and self.quant.p_scale == "running"
        return self.mask().schedule(None if running else self.first)

    def with_mask(self, mask: BlockMask, order: Any = None) -> "AttentionPlan":
        """This plan with another mask of the same shape: how an online policy, alone or `&` ours, reaches `attend`.

        `order`: int8 [*lead, heads], positions in `order_names`, where the policy chooses orders too; may be traced.
        `first` stays as it is: of what it names only kept blocks are visited early.
        """
        _check_type("mask", mask, BlockMask)
        expected = (*self.order.shape, *self.grid.blocks(self.block))
        if mask.block != self.block or tuple(mask.keep.shape) != expected or mask.keep.dtype != bool:
            raise ValueError(
                f"mask must be bool {expected} in blocks of {self.block} to fit this plan; got {mask.keep.dtype} "
                f"{tuple(mask.keep.shape)} in blocks of {mask.block}."
            )
        if order is None:
            return replace(self, keep_bits=mask.pack())
        order = jnp.asarray(order)
        known = None if isinstance(order, Tracer) else np.asarray(order)
        inside = known is None or ((known >= 0) & (known < len(self.order_names))).all()
        if order.shape != self.order.shape or not jnp.issubdtype(order.dtype, jnp.integer) or not inside:
            raise ValueError(
                f"order must be integers {list(self.order.shape)} from 0 to {len(self.order_names) - 1}, positions in "
                f"{', '.join(self.order_names)}; got {order.dtype} {list(order.shape)}: {order}."
            )
        return replace(self, keep_bits=mask.pack(), order=order.astype(jnp.int8))

    def with_wide(self, quant: QuantSpec, where: Any) -> "AttentionPlan":
        """This plan with `quant` instead of its own at some sites and buckets: mixed widths.

        `where`: bool [*lead] or what broadcasts to it, e.g. `jnp.arange(sites) < 2` for the first two layers, or
        `(jnp.arange(buckets) == 0)[:, None]` for the first steps. It is data: under a scan over layers or steps both
        widths are compiled, one runs, and another `where` compiles nothing. q, k and v are then rounded in `attend`,
        a pass over them that a plan of one width does not need.

        Raises ValueError for a `where` that is not boolean or does not fit.
        """
        _check_type("quant", quant, QuantSpec)
        where = jnp.asarray(where)
        lead = self.lead
        fits = where.ndim <= len(lead) and all(a in (1, b) for a, b in zip(where.shape[::-1], lead[::-1], strict=False))
        if where.dtype != bool or not fits:
            raise ValueError(
                f"where must be bool and broadcast to the leading axes of the plan, {list(lead)}; got {where.dtype} "
                f"{list(where.shape)}."
            )
        where = jnp.broadcast_to(where.reshape((1,) * (len(lead) - where.ndim) + where.shape), lead)
        return replace(self, wide=where, wide_quant=quant)

    def order_list(self) -> list[Any]:
        """Names of the orders, nested as [*lead][heads]."""
        return np.asarray(self.order_names, dtype=object)[np.asarray(self.order)].tolist()

    def __getitem__(self, i: Any) -> "AttentionPlan":
        """Peel one leading axis: plan[site], or plan[bucket] when there are buckets. `i`: an int, which may be traced.

        Raises IndexError when out of range, ValueError when there is nothing to peel.
        """
        if not self.lead:
            raise ValueError(f"plan[i] peels a leading axis; this plan has none left, only {self.heads} heads.")
        if is_int(i):
            if not -self.lead[0] <= i < self.lead[0]:
                raise IndexError(f"plan[i] needs i < {self.lead[0]} (leading axes {self.lead}); got {i}.")
        elif not (isinstance(i, jax.Array) and i.ndim == 0 and jnp.issubdtype(i.dtype, jnp.integer)):
            raise ValueError(f"plan[i] takes one int; got {i!r}. Use jax.tree.map for slices.")
        peeled = jax.tree.map(lambda x: x[i], self)
        # Buckets, where there are any, are the leading axis: after peeling none are left.
        return replace(peeled, bucket_edges=(0.0, 1.0))

    def at_step(self, step: Any, total_steps: int) -> "AttentionPlan":
        """The plan of the bucket that holds denoising step `step` (0-based, may be traced) of `total_steps`.

        Exact: edges are read as fractions and compared in integers, so 3/10 of 30 steps is step 9, never 8.
        Raises ValueError for a step outside [0, total_steps).
        """
        if not (is_int(total_steps) and total_steps > 0):
            raise ValueError(f"total_steps must be a positive int, known when tracing; got {total_steps!r}.")
        if is_int(step):
            if not 0 <= step < total_steps:
                raise ValueError(f"step must be in [0, total_steps = {total_steps}); got {step}.")
        elif not (isinstance(step, jax.Array) and step.ndim == 0 and jnp.issubdtype(step.dtype, jnp.integer)):
            raise ValueError(f"step must be one int; got {step!r}.")
        buckets = len(self.bucket_edges) - 1
        if buckets == 1:
            return self[0] if len(self.lead) == 2 else self
        if not self.lead or self.lead[0] != buckets:
            raise ValueError(
                f"at_step needs a leading axis of {buckets} buckets (bucket_edges {self.bucket_edges}); this plan has "
                f"leading axes {self.lead}. Call it before the bucket axis is peeled or sliced."
            )
        starts = _bucket_starts(self.bucket_edges, int(total_steps))
        if is_int(step):
            return self[sum(int(step) >= start for start in starts)]
        return self[jnp.sum(step.astype(jnp.int32) >= jnp.asarray(starts, jnp.int32))]

    def __repr__(self) -> str:
        shape = getattr(self.order, "shape", None)
        return (
            f"AttentionPlan(order={shape}, grid={self.grid}, block={self.block}, quant={self.quant}, "
            f"bucket_edges={self.bucket_edges}, k_mean={'no' if self.k_mean is None else 'yes'}"
            + ("" if self.wide_quant is None else f", wide_quant={self.wide_quant}")
            + ("" if self.first is None else f", first={getattr(self.first, 'shape', None)}")
            + ")"
        )


def _static_to_json(static: tuple[Any, ...]) -> bytes:
    grid, block, names, quant, edges, wide = static
    wide = None if wide is None else asdict(wide)
    return json.dumps([asdict(grid), block, names, asdict(quant), edges, wide]).encode()


def _static_from_json(data: bytes | bytearray) -> tuple[Any, ...]:
    grid, block, names, quant, edges, wide = json.loads(bytes(data))
    wide = None if wide is None else QuantSpec(**wide)
    return TokenGrid(**grid), tuple(block), tuple(names), QuantSpec(**quant), tuple(edges), wide


# An exported function that takes a plan can be written to disk and read where paro_jax is imported.
export.register_pytree_node_serialization(
    AttentionPlan,
    serialized_name="paro_jax.AttentionPlan",
    serialize_auxdata=_static_to_json,
    deserialize_auxdata=_static_from_json,
)


@lru_cache(maxsize=256)
def _fractions(edges: tuple[float, ...]) -> tuple[Fraction, ...]:
    # 0.3 is not three tenths in binary; the nearest fraction with a small denominator is what the author meant.
    return tuple(Fraction(edge).limit_denominator(10**6) for edge in edges)


def _bucket_starts(edges: tuple[float, ...], total_steps: int) -> list[int]:
    """First step of each bucket but the first: the smallest s with s / total_steps >= edge."""
    return [-((-total_steps * f.numerator) // f.denominator) for f in _fractions(edges)[1:-1]]


def check_fits(plan: Any, *, sites: int, heads: int | None = None, grid: TokenGrid | None = None) -> None:
    """ValueError unless `plan` has one leading axis (sites,), and the heads and the tokens of the model if given.

    A plan of another grid with as many tokens would run, and move every token to a wrong place.
    """
    if not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan: expected an AttentionPlan, found {type(plan).__name__}; load_plan(path) reads one.")
    if plan.lead != (sites,):
        buckets = "; of several buckets take plan.at_step(step, steps)" if len(plan.lead) == 2 else ""
        raise ValueError(f"plan: expected leading axes ({sites},), one of each layer, found {plan.lead}{buckets}.")
    if heads is not None and plan.heads != heads:
        raise ValueError(f"plan: expected {heads} heads as the model has, found {plan.heads}.")
    if grid is not None and plan.grid.place != grid.place:
        raise ValueError(
            f"plan: expected one for (shape, text, text_position) {grid.place} of these inputs, found "
            f"{plan.grid.place}; calibrate for this resolution and length of text."
        )


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}; got {value!r}.")


def _check_edges(edges: Sequence[float], lead: tuple[int, ...]) -> tuple[float, ...]:
    numbers = isinstance(edges, (tuple, list)) and all(isinstance(e, (int, float)) for e in edges)
    increasing = numbers and all(a < b for a, b in pairwise(edges))
    if not increasing or len(edges) < 2 or (edges[0], edges[-1]) != (0, 1):
        raise ValueError(f"bucket_edges must increase from 0.0 to 1.0 (fractions of the schedule); got {edges!r}.")
    edges = tuple(float(e) for e in edges)
    buckets = len(edges) - 1
    if lead[:1] != (buckets,) and (buckets > 1 or len(lead) == 2):
        raise ValueError(
            f"bucket_edges {edges} make {buckets} bucket(s), so the leading axes must be ({buckets}, sites); the mask "
            f"has leading axes {lead}."
        )
    return edges


def _order_ids(grid: TokenGrid, order: object, lead_heads: tuple[int, ...]) -> np.ndarray:
    """int8 [*lead, heads] from nested names."""
    names = np.asarray(order, dtype=object) if not isinstance(order, str) else np.full(lead_heads, order, dtype=object)
    fits = 1 <= names.ndim and names.shape == lead_heads[-names.ndim :]
    if not fits or not all(isinstance(name, str) for name in names.flat):
        raise ValueError(
            f"order must be one name, or a name per head nested as {list(lead_heads)} (heads last; leading axes may be "
            f"left out); got shape {list(names.shape)}: {order!r}."
        )
    ids = np.array([grid.order_id(name) for name in names.flat], np.int8).reshape(names.shape)
    return np.broadcast_to(ids, lead_heads)
