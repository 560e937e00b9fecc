"""Generated problems for floor 0: hypothesis strategies, builders, and oracles written in numpy float64."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
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


def schedule(keep: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """bool [heads, nq, nk] -> (count, index): kept blocks packed left, the rest of each row is junk."""
    count = keep.sum(axis=-1)
    index = np.argsort(~keep, axis=-1, kind="stable")
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

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @cached_property
    def keep(self) -> np.ndarray:
        nq, nk = -(-self.q_tokens // self.block[0]), -(-self.kv_tokens // self.block[1])
        return keep_blocks(self.mask, self.heads, nq, nk, self.seed)

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
        count, index = schedule(self.keep)
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


def emulated(problem: Problem) -> np.ndarray:
    """The integer arithmetic of one problem, block by block with real int32 products: o [B, H, Nq, D], kernel order."""
    stored, (bq, bk) = {k: np.asarray(v) for k, v in problem.operands.items() if v is not None}, problem.block
    levels = {"int8": 127, "int4": 15}[problem.pv]

    def per_token(name: str, tokens: int, block: int) -> np.ndarray:
        scales = stored[name]
        return (scales if scales.shape[-1] == tokens else scales.repeat(block, -1)[..., :tokens]).astype(np.float32)

    q_scale = per_token("q_scale", problem.q_tokens, bq) * np.float32(problem.scale * np.log2(np.e))
    k_scale = per_token("k_scale", problem.kv_tokens, bk)
    out = np.zeros(stored["q"].shape)
    for b, h, i in np.ndindex(problem.batch, problem.heads, problem.keep.shape[1]):
        rows = slice(i * bq, (i + 1) * bq)
        q = stored["q"][b, h, rows].astype(np.int32)
        top, total, acc = np.full((len(q), 1), -np.inf), 0.0, 0.0
        for j in np.flatnonzero(problem.keep[h, i]):
            keys = slice(j * bk, (j + 1) * bk)
            product = q @ stored["k"][b, h, keys].astype(np.int32).T
            s = product.astype(np.float32) * (q_scale[b, h, rows, None] * k_scale[b, h, None, keys])
            new_top = np.maximum(top, s.max(axis=1, keepdims=True))
            block_top = s.max(axis=1, keepdims=True) if problem.p_scale == "block" else new_top
            p = np.rint(np.float32(levels) * np.exp2(s - block_top.astype(np.float32))).astype(np.int32)
            weight, fade = np.exp2(block_top - new_top), np.exp2(top - new_top)
            v_scale = stored["v_scale"][b, h, 0 if stored["v_scale"].shape[2] == 1 else j]
            values = stored["v"][b, h, keys].astype(np.int32)
            total = total * fade + weight * p.sum(axis=1, keepdims=True)
            acc = acc * fade + weight * (p @ values) * v_scale
            top = new_top
        out[b, h, rows] = acc / total if problem.keep[h, i].any() else 0.0
    return out


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


def assert_close(found, expected, bound: float) -> None:
    """Equal within `bound`, finite, and -inf in the same places."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    empty = np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(found), empty)
    found, expected = found[~empty], expected[~empty]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max(initial=0.0) <= bound
