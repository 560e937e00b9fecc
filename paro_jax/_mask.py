"""What is computed: which (query block, key block) pairs of each head are kept."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paro_jax._grid import check_block

_DRAWN_HEADS = 4  # a printed mask shows at most this many heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept blocks of every head; a pytree. Printing it draws it.

    `keep`: bool [*lead, heads, nq, nk], True where block (i, j) is computed. Static: `block`, (bq, bk) tokens.
    A skipped block leaves the softmax altogether, its denominator included: attention renormalises over kept blocks.
    """

    keep: jax.Array | np.ndarray
    block: tuple[int, int] = field(metadata=dict(static=True))

    @property
    def density(self) -> float | jax.Array:
        """Kept blocks / all blocks. A float; a float32 scalar under a trace."""
        keep = jnp.asarray(self.keep, bool)
        return _density(jnp.sum(keep, axis=-1, dtype=jnp.int32), keep.shape[-1])

    def schedule(self, first: jax.Array | np.ndarray | None = None) -> tuple[jax.Array, jax.Array]:
        """The kernel's form: count int32 [*lead, heads, nq] and index int32 [*lead, heads, nq, nk].

        index[..., :count] are the kept key blocks in the sequence in which a kernel walks them: those that `first`
        names, as it names them, then the others ascending. Entries past count are in range and mean nothing. `first`:
        integers [*lead, heads, nq, m]. A skipped block stays skipped, and a second mention does nothing.

        Raises ValueError for a `first` of another shape or dtype.
        """
        keep = jnp.asarray(self.keep, bool)
        nk = keep.shape[-1]
        named = jnp.zeros((*keep.shape[:-1], 0), jnp.int32) if first is None else check_first(first, keep.shape)
        column, m = jax.lax.broadcasted_iota(jnp.int32, keep.shape, keep.ndim - 1), named.shape[-1]
        rank = jnp.where(keep, m, m + 1)  # skipped columns sort behind kept ones
        for place in reversed(range(m)):
            rank = jnp.where(keep & (column == named[..., place : place + 1].astype(jnp.int32)), place, rank)
        # One int32 sort is cheaper than an argsort with its payload.
        packed = jnp.sort(rank * nk + column, axis=-1)
        return jnp.sum(keep, axis=-1, dtype=jnp.int32), packed % nk

    def pack(self) -> jax.Array:
        """uint8 [*lead, heads, nq, ceil(nk / 8)]: one bit a block, key block 0 in the lowest bit, padding bits 0."""
        return jnp.packbits(jnp.asarray(self.keep, bool), axis=-1, bitorder="little")

    @classmethod
    def unpack(cls, bits: jax.Array, *, nk: int, block: tuple[int, int]) -> "BlockMask":
        """The inverse of `pack`: `nk` says how many of the bits are blocks.

        Raises ValueError when `bits` is not uint8 or its last axis is not ceil(nk / 8).
        """
        bits = jnp.asarray(bits)
        if bits.dtype != jnp.uint8 or bits.ndim < 1 or bits.shape[-1] != -(-nk // 8):
            raise ValueError(
                f"bits must be uint8 [..., {-(-nk // 8)}] for nk = {nk} key blocks; got {bits.dtype} {bits.shape}."
            )
        keep = jnp.unpackbits(bits, axis=-1, count=nk, bitorder="little").astype(bool)
        return cls(keep, check_block(block))

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """Blocks that both keep; leading axes broadcast, a plan's mask against one of each batch entry for one."""
        mine, theirs = _both_keeps(self, other)
        return BlockMask(mine & theirs, self.block)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """Blocks that either keeps; leading axes broadcast."""
        mine, theirs = _both_keeps(self, other)
        return BlockMask(mine | theirs, self.block)

    def __repr__(self) -> str:
        shape = getattr(self.keep, "shape", type(self.keep).__name__)
        return f"BlockMask(keep={shape}, block={self.block})"

    def __str__(self) -> str:
        keep = self.keep
        if isinstance(keep, Tracer) or getattr(keep, "ndim", 0) < 2:
            return repr(self)
        return self.draw()

    def draw(self, width: int = 64, heads: int = _DRAWN_HEADS) -> str:
        """The mask as text: half blocks, two block rows to a line; the first `heads` heads, `width` columns at most."""
        keep = np.asarray(self.keep)
        nq, nk = keep.shape[-2:]
        maps = keep.reshape(-1, nq, nk)
        lines = [f"{nq} x {nk} blocks of {self.block[0]} x {self.block[1]} tokens, density {keep.mean():.3f}"]
        step = max(-(-nk // width), -(-nq // (2 * width)))
        if step > 1:
            lines[0] += f"; a mark is {step} x {step} blocks, inked where denser than its head"
        for i, one in enumerate(maps[:heads]):
            if len(maps) > 1:
                where = ", ".join(map(str, np.unravel_index(i, keep.shape[:-2])))
                lines.append(f"[{where}] density {one.mean():.3f}")
            lines += _half_blocks(_shrink(one, step))
        if len(maps) > heads:
            lines.append(f"... and {len(maps) - heads} more")
        return "\n".join(lines)


def _density(kept: jax.Array, nk: int) -> float | jax.Array:
    """Density from the kept blocks of each row. Exact outside a trace: 10^10 blocks do not fit an int32 sum."""
    if isinstance(kept, Tracer):
        return jnp.mean(kept.astype(jnp.float32)) / nk
    return float(np.asarray(kept).sum(dtype=np.int64) / (kept.size * nk))


def check_first(first: Any, keep: tuple[int, ...]) -> jax.Array:
    """`first` as an array; ValueError unless it is integers [*lead, heads, nq, m] for a mask of the shape `keep`."""
    first = jnp.asarray(first)
    if first.shape[:-1] != keep[:-1] or not jnp.issubdtype(first.dtype, jnp.integer):
        raise ValueError(
            f"first must be integers {[*keep[:-1], 'm']}, key blocks of each query block; got {first.dtype} "
            f"{list(first.shape)}."
        )
    return first


def _both_keeps(mask: BlockMask, other: object) -> tuple[jax.Array, jax.Array]:
    if not isinstance(other, BlockMask) or other.block != mask.block:
        found = f"block {other.block}" if isinstance(other, BlockMask) else repr(other)
        raise ValueError(f"masks combine only with equal blocks: expected a BlockMask of {mask.block}; got {found}.")
    mine, theirs = jnp.asarray(mask.keep), jnp.asarray(other.keep)
    rank = max(mine.ndim, theirs.ndim)
    # Said aloud, so that a rank never broadcasts by accident.
    return mine.reshape((1,) * (rank - mine.ndim) + mine.shape), theirs.reshape(
        (1,) * (rank - theirs.ndim) + theirs.shape
    )


def _shrink(keep: np.ndarray, step: int) -> np.ndarray:
    """bool [ceil(nq / step), ceil(nk / step)]: cells at least as dense as the whole; a thin diagonal stays visible."""
    if step == 1:
        return keep
    rows, columns = (np.arange(0, n, step) for n in keep.shape)
    kept = np.add.reduceat(np.add.reduceat(keep, rows, 0, dtype=np.int64), columns, 1)
    heights, widths = (np.minimum(step, n - np.arange(0, n, step)) for n in keep.shape)
    return (kept > 0) & (kept * keep.size >= np.outer(heights, widths) * int(keep.sum()))


def _half_blocks(cells: np.ndarray) -> list[str]:
    if len(cells) % 2:
        cells = np.concatenate([cells, np.zeros_like(cells[:1])])
    marks = np.array([" ", "▄", "▀", "█"])
    return ["".join(line) for line in marks[2 * cells[::2] + cells[1::2]]]
