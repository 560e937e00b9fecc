"""Which program does what, when: a launch has as many programs as the GPU has cores, and each draws one item of work
after another until there is none, the longest first.

An item is a query block of a head, or two that share a program. Where items differ tenfold, as a static mask's do,
whoever draws the last long one decides when all are done; and a program that goes on to its next item fetches that
item's first blocks while it still multiplies the last of the one before.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _registers

TOGETHER = 32 * 2**20  # bytes of K and V that programs may share at a time: they are read from L2, which holds 50 MB


def in_order(count: jax.Array, batch: int, lists: int, head_bytes: int) -> tuple[jax.Array, jax.Array]:
    """(rows int32 [H, nq], items int32 [H * B * T]) of count int32 [H, nq].

    Item n is head, batch entry and place of [H, B, T], flattened; at place t a program has rows t `lists` .. of `rows`.
    Longest first among as many heads as L2 holds (head_bytes: K and V of one).
    """
    heads, nq = count.shape
    if lists == 1:
        rows, cost = jnp.broadcast_to(jnp.arange(nq, dtype=jnp.int32), count.shape), count
    else:  # two rows that share a program end together
        rows = jnp.argsort(-count, axis=1, stable=True).astype(jnp.int32)
        cost = jnp.take_along_axis(count, rows[:, ::lists], axis=1)
    cost = jnp.broadcast_to(cost[:, None], (heads, batch, cost.shape[1])).reshape(heads * batch, -1)
    group = jnp.arange(heads * batch, dtype=jnp.int32) // max(1, TOGETHER // head_bytes)
    order = jnp.lexsort((-cost.reshape(-1), jnp.repeat(group, cost.shape[1])))
    return rows, order.astype(jnp.int32)


def programs(items: int, *, interpreted: bool) -> int:
    """How many programs share them."""
    if interpreted:
        return min(items, 2)
    here = jax.devices()[0]
    return min(items, here.core_count if here.platform == "gpu" else 132)  # ahead of time: an H100's or H200's


def counters(items: jax.Array, like: jax.Array) -> jax.Array:
    """int32 [2], zeros for `draw`: items drawn and programs done. Where vmap gives `like` an axis, each has its own.

    As far as XLA knows they depend on `items`: they are made anew for each launch, and no constant that others share.
    """
    below = (items[:1] < 0).astype(jnp.int32)  # none is
    return jnp.broadcast_to(below, (2,)) + 0 * like.reshape(-1)[:1].astype(jnp.int32)


def draw(counters: Any, drawn: Any, turn: Any, programs: int, *, interpreted: bool) -> Any:
    """The number of the next item; a program's turn-th. Called by a warpgroup; drawn: int32 [1] in shared memory.

    The interpreter, which has no atomics, deals them out in turn.
    """
    if interpreted:
        return turn * programs + jax.lax.axis_index("program")

    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir.dialects import llvm

    def take(ctx: Any, counters: Any, drawn: Any) -> None:
        mgpu.warpgroup_barrier()  # all have read the number before
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            llvm.store(_incremented(counters, 0), mgpu.memref_ptr(drawn))
        mgpu.warpgroup_barrier()

    inline: Any = _registers.mosaic().inline_mgpu(arg_types=(_registers.mosaic().RefType(),) * 2)
    inline(take)(counters, drawn)
    return drawn[0]


def done(counters: Any, programs: int, *, interpreted: bool) -> None:
    """Called once by each program that drew a number beyond the last: the last of them leaves zeros again.

    So nothing is written as far as XLA can see, to which counters are an input like another.
    """
    if interpreted:
        return

    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    def leave(ctx: Any, counters: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            last = arith.cmpi(arith.CmpIPredicate.eq, _incremented(counters, 1), constant(programs - 1))
            with mgpu.when(last):
                for place in range(2):
                    llvm.store(constant(0), _place(counters, place))

    inline: Any = _registers.mosaic().inline_mgpu(arg_types=(_registers.mosaic().RefType(),))
    inline(leave)(counters)


def _place(counters: Any, place: int) -> Any:
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.memref_ptr(counters))
    return mgpu.getelementptr(pointer, [place], i32)


def _incremented(counters: Any, place: int) -> Any:
    """counters[place], which grows by one."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    one = arith.constant(i32, ir.IntegerAttr.get(i32, 1))
    return llvm.atomicrmw(llvm.AtomicBinOp.add, _place(counters, place), one, llvm.AtomicOrdering.monotonic)
