"""Generated problems for floor 0: hypothesis strategies, builders, and oracles written in numpy float64."""

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import arrange, block_attention

LENGTHS = (1, 63, 65, 128, 200)
HEAD_DIMS = (32, 64, 96, 128, 256)
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))
MASKS = (
    "ones",
    "random",
    "ragged",
    "empty rows",
    "first skipped",
    "last skipped",
    "runs of 1",
    "runs of 2",
    "runs of 3",
)
# Every pair of products that differ on Hopper; int4 is int8 with other levels.
PAIRS = (*((qk, pv) for qk in ("bf16", "fp8", "int8") for pv in ("bf16", "fp8", "int8")), ("int4", "int4"))
# Tokens of queries and keys, by what they are to blocks of 64 and 128.
TOKENS = {
    "whole blocks": (128, 128),
    "odd tail": (67, 67),
    "q is not kv": (70, 130),
    "one block": (64, 64),
    "one": (1, 1),
}
WIDTHS = (("bf16", "bf16"), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("int8", "bf16"), ("bf16", "int8"))

# Largest |o - exact| / max |v|: a few roundings of the stored dtype.
ROUNDING = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def keep_blocks(kind: str, heads: int, nq: int, nk: int, seed: int = 0) -> np.ndarray:
    """A mask bool [heads, nq, nk] of a named kind; but for "empty rows", every row keeps a block."""
    rng = np.random.default_rng(seed)
    keep = np.ones((heads, nq, nk), bool)
    column = np.arange(nk)
    if kind == "random":
        keep = rng.random(keep.shape) < 0.4
    elif kind == "ragged":  # the fullest row keeps about ten times what the emptiest does
        share = rng.permutation(np.linspace(0.1, 1.0, heads * nq)).reshape(heads, nq, 1)
        keep = rng.random(keep.shape) < share
    elif kind == "empty rows":
        keep = rng.random(keep.shape) < 0.5
        keep[0, 0] = False
        keep[-1, -1] = False
    elif kind == "first skipped":
        keep[..., 0] = False
    elif kind == "last skipped":
        keep[..., -1] = False
    elif kind.startswith("runs of"):  # skip `run`, keep one, ...; each head and row shifted by one more
        run = int(kind.split()[-1])
        shift = np.arange(heads)[:, None, None] + np.arange(nq)[None, :, None]
        keep = (column + shift) % (run + 1) == 0
    elif kind != "ones":
        raise ValueError(kind)
    if kind != "empty rows":
        empty = ~keep.any(axis=-1)
        keep[empty, rng.integers(0, nk, empty.sum())] = True
    return keep


def schedule(keep: np.ndarray, walk: str = "ascending") -> tuple[jax.Array, jax.Array]:
    """bool [heads, nq, nk] -> (count, index): kept blocks packed left, the rest of each row is junk.

    walk: "ascending", "reversed" or "shuffled", each row on its own.
    """
    count = keep.sum(axis=-1)
    place = np.broadcast_to(np.arange(keep.shape[-1]), keep.shape)
    if walk != "ascending":
        place = {"reversed": -place, "shuffled": np.random.default_rng(4).permuted(place, axis=-1)}[walk]
    index = np.argsort(np.where(keep, place, keep.shape[-1]), axis=-1, kind="stable")
    index = np.where(np.arange(keep.shape[-1]) < count[..., None], index, -7)  # ignored, whatever it is
    return jnp.asarray(count, jnp.int32), jnp.asarray(index, jnp.int32)


@dataclass(frozen=True)
class Problem:
    """One call of block_attention, made from a seed."""

    batch: int = 1
    heads: int = 2
    q_tokens: int = 200
    kv_tokens: int = 200
    head_dim: int = 32
    block: tuple[int, int] = (64, 64)
    dtype: str = "float32"
    mask: str = "random"
    qk: str = "bf16"
    pv: str = "bf16"
    p_scale: str = "block"
    q_group: str = "row"
    k_group: str = "block"
    v_group: str = "channel"
    permuted: bool = True
    seed: int = 0
    walk: str = "ascending"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @cached_property
    def keep(self) -> np.ndarray:
        nq, nk = -(-self.q_tokens // self.block[0]), -(-self.kv_tokens // self.block[1])
        return keep_blocks(self.mask, self.heads, nq, nk, self.seed)

    @property
    def walks(self) -> list[list[int]]:
        """The kept blocks of each row of each head, as they are walked."""
        count, index = map(np.asarray, schedule(self.keep, self.walk))
        return [index[at][:n].tolist() for at, n in np.ndenumerate(count)]

    @cached_property
    def elements(self) -> np.ndarray:
        """The mask by token, bool [1, heads, q_tokens, kv_tokens], kernel order."""
        rows = np.repeat(self.keep, self.block[0], axis=1)[:, : self.q_tokens]
        return np.repeat(rows, self.block[1], axis=2)[None, :, :, : self.kv_tokens]

    @cached_property
    def slots(self) -> jax.Array | None:
        """Each head's own permutation of the queries."""
        if not self.permuted:
            return None
        rng = np.random.default_rng(self.seed + 1)
        with jax.ensure_compile_time_eval():  # made once, also when first asked for inside a trace
            return jnp.asarray([rng.permutation(self.q_tokens) for _ in range(self.heads)], jnp.int32)

    @cached_property
    def qkv(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Kernel order, [B, H, N, D]; each key block has its own size, so a wrong block or scale shows."""
        rng = np.random.default_rng(self.seed + 2)
        q, k, v = (
            rng.normal(size=(self.batch, self.heads, n, self.head_dim))
            for n in (self.q_tokens, self.kv_tokens, self.kv_tokens)
        )
        size = 0.5 + (np.arange(self.kv_tokens) // self.block[1] % 5) / 2
        k, v = k * size[:, None], v * size[:, None]
        with jax.ensure_compile_time_eval():
            return tuple(jnp.asarray(x, jnp.dtype(self.dtype)) for x in (q, k, v))  # type: ignore[return-value]

    @cached_property
    def operands(self) -> dict[str, jax.Array | None]:
        """q, k, v at their stored widths, and their scales (of the reference; K is not smoothed)."""
        widths, groups = (self.qk, self.qk, self.pv), (self.q_group, self.k_group, self.v_group)
        blocks = (self.block[0], self.block[1], self.block[1])
        stored = {}
        for x, role, width, group, block in zip(self.qkv, "qkv", widths, groups, blocks, strict=True):
            values, scales = x, None
            if width != "bf16":
                with jax.ensure_compile_time_eval():
                    values, scales, _ = arrange(
                        jnp.swapaxes(x, 1, 2), None, role=role, width=width, group=group, block=block,
                        implementation="reference",
                    )  # fmt: skip
            stored |= {role: values, f"{role}_scale": scales}
        return stored

    def solve(self, implementation: str | None = None, **changed) -> tuple[jax.Array, jax.Array]:
        """(o, lse) of block_attention, model order; `changed` replaces operands or options."""
        count, index = schedule(self.keep, self.walk)
        options = dict(
            block=self.block, scale=self.scale, slots=self.slots, qk=self.qk, pv=self.pv, p_scale=self.p_scale,
            implementation=implementation, return_residual=True, count=count, index=index,
        )  # fmt: skip
        return block_attention(**(self.operands | options | changed))

    def to_model(self, x: np.ndarray) -> np.ndarray:
        """[B, H, N, ...] in kernel order -> [B, N, H, ...] in model order, one token at a time."""
        out = np.swapaxes(x, 1, 2).copy()
        if self.slots is not None:
            for head, slots in enumerate(np.asarray(self.slots)):
                out[:, slots, head] = x[:, head]
        return out

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """(o, lse) in float64 by the textbook from the unquantised q, k, v, model order."""
        o, lse = dense_softmax(*self.qkv, self.elements, self.scale)
        return self.to_model(o), self.to_model(lse)


def covering(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every value of the first axis with every one of the second; each other value beside each of every other axis at
    least once, as far as that many rows allow (greedy; `assert_covered` says whether they did)."""
    (one, first), (two, second), *others = axes.items()
    seen: collections.Counter = collections.Counter()
    rows = []
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        row = {one: a, two: b}
        for name, values in others:
            shift = (i + 2 * j) % len(values)  # among equals another one in every row
            beside = {value: [seen[other, row[other], name, value] for other in row] for value in values}
            row[name] = max(
                [*values[shift:], *values[:shift]],
                key=lambda value, beside=beside: (beside[value].count(0), -sum(beside[value])),
            )
            seen.update((other, row[other], name, row[name]) for other in row)
        rows.append(row)
    return rows


# What a problem for the Hopper kernel is made of; the reference and XLA see the same ones.
AXES: dict[str, Sequence[Any]] = dict(
    widths=PAIRS,
    head_dim=(64, 96, 128, 256, 40),
    tokens=tuple(TOKENS),
    block=((64, 64), (128, 64), (128, 128)),
    mask=("ones", "random", "empty rows", "last skipped"),
    groups=(("row", "block", "channel"), ("block", "row", "block")),  # of q, k, v
    p_scale=("block", "running"),
    permuted=(True, False),
)


def problem_of(widths, tokens, groups=("row", "block", "channel"), **facts) -> Problem:
    """The problem that a row of `AXES` names; a product of 16-bit floats is one of bfloat16.

    tokens: a class in TOKENS, or (queries, keys).
    """
    names = ("qk", "pv", "q_tokens", "kv_tokens", "q_group", "k_group", "v_group")
    facts |= dict(zip(names, (*widths, *TOKENS.get(tokens, tokens), *groups), strict=True))
    return Problem(**dict(heads=1, dtype="bfloat16" if "bf16" in widths else "float32") | facts)


def covering_rows() -> list[Any]:
    """`covering(**AXES)` as parameters of a test: ten rows that have every value of every axis; the others, which pair
    them all, are marked `covering`."""
    rows = covering(**AXES)
    few = [5 * i + (3 * i + 2) % 5 for i in range(10)]
    assert all({str(rows[i][name]) for i in few} == set(map(str, values)) for name, values in AXES.items())
    marks = {i: () if i in few else pytest.mark.covering for i in range(len(rows))}
    return [pytest.param(row, id=row_id(row), marks=marks[i]) for i, row in enumerate(rows)]


def row_id(row: dict[str, Any]) -> str:
    """What a row of `AXES` is called, in its first four words."""
    qk, pv = row["widths"]
    bq, bk = row["block"]
    return f"{qk} {pv} {row['head_dim']} {bq}x{bk} {row['tokens']}"


def assert_covered(rows: Sequence[dict[str, Any]], axes: dict[str, Sequence[Any]]) -> None:
    """Each value of each axis stands beside each value of every other one in some row."""
    for one, two in itertools.combinations(axes, 2):
        missing = set(itertools.product(axes[one], axes[two])) - {(row[one], row[two]) for row in rows}
        assert not missing, (one, two, sorted(missing, key=str))


def dense_softmax(q, k, v, elements: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Masked softmax attention in float64: (o [B, H, Nq, D], lse [B, H, Nq]); an empty row gives 0 and -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.where(elements, scale * np.einsum("bhqd,bhkd->bhqk", q, k), -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    p = np.exp(scores - top)
    total = p.sum(axis=-1, keepdims=True)
    o = np.einsum("bhqk,bhkd->bhqd", p, v) / np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        return o, (top + np.log(total))[..., 0]


def emulated(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The arithmetic of one problem at any widths, in float64, row of blocks by row of blocks, real int32 products:
    (o [B, H, Nq, D], lse [B, H, Nq]), kernel order."""
    stored, (bq, bk) = {k: np.asarray(v) for k, v in problem.operands.items() if v is not None}, problem.block
    batch, heads, levels = problem.batch, problem.heads, {"bf16": 1, "fp8": 448, "int8": 127, "int4": 15}[problem.pv]
    integers = {width: np.int32 for width in ("int8", "int4")}

    def per_token(name: str, tokens: int, block: int) -> np.ndarray:
        scales = stored.get(name, np.ones((batch, heads, tokens)))
        return scales if scales.shape[-1] == tokens else scales.repeat(block, -1)[..., :tokens]

    def rounded(p: np.ndarray) -> np.ndarray:
        """P in [0, 1] in levels."""
        if problem.pv in integers:
            return np.rint(levels * p)
        kind = {"bf16": problem.dtype, "fp8": jnp.float8_e4m3fn}[problem.pv]
        return p if kind == "float32" else (levels * p).astype(np.float32).astype(kind).astype(np.float64)

    q_scale = per_token("q_scale", problem.q_tokens, bq) * problem.scale * np.log2(np.e)
    k_scale = per_token("k_scale", problem.kv_tokens, bk)
    q, k = (stored[x].astype(integers.get(problem.qk, np.float64)) for x in "qk")
    v = stored["v"].astype(integers.get(problem.pv, np.float64))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    nq, walks = problem.keep.shape[1], problem.walks
    for b, h, i in np.ndindex(batch, heads, nq):
        rows, kept = slice(i * bq, (i + 1) * bq), walks[h * nq + i]
        s = (q[b, h, rows] @ k[b, h].T) * q_scale[b, h, rows, None] * k_scale[b, h, None]
        blocks = [slice(j * bk, (j + 1) * bk) for j in kept]
        tops = [s[:, keys].max(axis=1, keepdims=True) for keys in blocks]
        whole = np.max(tops, axis=0) if tops else 0.0
        if problem.pv == "bf16":
            tops = [whole] * len(tops)
        elif problem.p_scale == "running":
            tops = list(np.maximum.accumulate(tops)) if tops else tops
        total, acc = 0.0, 0.0
        for j, keys, top in zip(kept, blocks, tops, strict=True):
            p, weight = rounded(np.exp2(s[:, keys] - top)), np.exp2(top - whole)
            product = p.astype(v.dtype) @ v[b, h, keys]
            scale = 1.0 if problem.pv == "bf16" else stored["v_scale"][b, h, 0 if problem.v_group == "channel" else j]
            total, acc = total + weight * p.sum(axis=1, keepdims=True), acc + weight * product * scale
        if len(kept):
            out[b, h, rows] = acc / total
            lse[b, h, rows] = np.log(2) * (whole + np.log2(total / levels))[:, 0]
    return out, lse


@st.composite
def problems(draw, dtypes=("float32",), widths=(("bf16", "bf16"),)) -> Problem:
    """Any problem of floor 0, small enough for a CPU."""
    qk, pv = draw(st.sampled_from(widths))
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        q_tokens=draw(st.sampled_from(LENGTHS)),
        kv_tokens=draw(st.sampled_from(LENGTHS)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block=draw(st.sampled_from(BLOCKS)),
        dtype=draw(st.sampled_from(dtypes)),
        mask=draw(st.sampled_from(MASKS)),
        qk=qk,
        pv=pv,
        p_scale=draw(st.sampled_from(("block", "running"))),
        q_group=draw(st.sampled_from(("row", "block"))),
        k_group=draw(st.sampled_from(("row", "block"))),
        v_group=draw(st.sampled_from(("channel", "block"))),
        permuted=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )


def bounds(problem: Problem) -> tuple[float, float]:
    """Largest |difference| of a kernel's output and log-sum-exp from the reference's: the contract's 2e-3 max |v|, or
    the rounding of a bf16 output."""
    quantised = "bf16" not in (problem.qk, problem.pv) and problem.dtype == "float32"
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    half = "bf16" in (problem.qk, problem.pv)
    return (2e-3 if quantised else ROUNDING["bfloat16"]) * largest, 2e-2 if half else 1e-4


def check(problem: Problem, implementation: str, expected: Any = None, **changed) -> None:
    """A kernel's output and log-sum-exp are the reference's, or as `expected`: the same integers, so far within the
    contract.

    `changed`: operands of the kernel's call alone.
    """
    # Waited for: else XLA runs the reference beside an interpreter's callbacks.
    every = jax.block_until_ready(problem.solve(implementation, **changed))
    expected = problem.solve("reference") if expected is None else expected
    for found, wanted, bound in zip(every, expected, bounds(problem), strict=True):
        assert_close(found, wanted, bound)


def check_where_exponentials_differ(problem: Problem, implementation: str, expected: Any = None) -> None:
    """`check` on a GPU, and of scores that are no integers: a last bit decides how a P next to a half rounds.

    It does in one row of a thousand, also of float64 against the reference. Such a row is a step of P off, relative to
    a sum that is at least 1.
    """
    step = {"bf16": 2.0**-8, "fp8": 2.0**-4, "int8": 1 / 127, "int4": 1 / 15}[problem.pv]
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    expected = problem.solve("reference") if expected is None else expected
    pairs = zip(problem.solve(implementation), expected, strict=True)
    for (found, expected), usual, once in zip(pairs, bounds(problem), (2 * step * largest, 2 * step), strict=True):
        assert_close(found, expected, max(usual, once))
        found, expected = (
            np.asarray(x, np.float64).reshape(problem.batch * problem.q_tokens * problem.heads, -1)
            for x in (found, expected)
        )
        with np.errstate(invalid="ignore"):  # -inf less itself
            off = (np.abs(found - expected) > usual).any(axis=1)
        assert off.sum() <= 1 + len(off) // 200, f"{off.sum()} of {len(off)} rows"


def assert_close(found, expected, bound: float) -> None:
    """Equal within `bound`, finite, and -inf in the same places."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    empty = np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(found), empty)
    found, expected = found[~empty], expected[~empty]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max(initial=0.0) <= bound
