"""What makes an order good: objectives that turn one sample into an error per order and head, the lower the better."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import paro_jax
from calibrate import _choose, _mass
from calibrate._capture import Checked
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid

OBJECTIVES = ("mass", "paro", "error")
TEXT_COLUMNS = ("keep", "sparse")


@dataclass(frozen=True)
class ParoMetric:
    """The paper's metric (its eq. 1-3), literally, as an objective: `make_plan(objective=ParoMetric(...))`.

    On the grid part of the map, cut in blocks: M_sparse is the share of blocks in which at least `sigma` of the
    elements are under `eps`; M_quant the mean over blocks of max P / mean P. The order with the least
    alpha M_sparse / sum(M_sparse) + (1 - alpha) M_quant / sum(M_quant) wins, sums over the candidate orders.

    `eps` is 17.5 times the mean of P at the 17.5k tokens of the paper's video model but 4 times at 4096 tokens: scale
    it as c / N. `sign`: +1 is the formula as printed, although a larger M_sparse sounds better; -1 takes 1 - M_sparse
    in its place. Which of the two finds the better order depends on eps N (a diagonal leaves a block "sparse" that
    cannot be skipped), hence the default objective, "mass". `alpha` is unpublished.

    Raises ValueError for eps not above 0, sigma or alpha outside [0, 1], or another sign.
    """

    eps: float = 1e-3
    sigma: float = 0.9
    alpha: float = 0.5
    sign: int = 1

    def __post_init__(self) -> None:
        if not self.eps > 0 or not np.isfinite(self.eps):
            raise ValueError(f"eps must be a positive number, an attention probability such as 1e-3; got {self.eps!r}.")
        for name in ("sigma", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)!r}.")
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be +1 (the formula as printed) or -1 (1 - M_sparse); got {self.sign!r}.")


Objective = str | ParoMetric


@dataclass(frozen=True)
class Task:
    """What an order is judged for; the validated arguments of `make_plan`."""

    grid: TokenGrid
    block: tuple[int, int]
    densities: tuple[float, ...]
    orders: tuple[str, ...]
    objective: Objective
    quant: QuantSpec
    bucket_edges: tuple[float, ...]
    rule: str
    text_columns: str = "keep"

    @property
    def always(self) -> np.ndarray:
        return self.grid.always_keep(self.block, columns=self.text_columns == "keep")


def errors(task: Task, sample: Checked) -> np.ndarray:
    """float64 [densities, orders, heads]: the error of every candidate order on one sample."""
    lse = _row_lse(sample)
    if isinstance(task.objective, ParoMetric):  # which knows no density
        error = paro_error(*_paro_terms(task, task.objective, sample, lse), task.objective)
        return np.stack([error] * len(task.densities))
    judge = _lost_mass if task.objective == "mass" else _output_error
    return np.stack([judge(task, sample, name, lse) for name in task.orders], axis=1)


def chosen_mass(task: Task, sample: Checked, names: Sequence[str], lse: jax.Array | None = None) -> np.ndarray:
    """float32 [heads, nq, nk]: block mass of a sample in the order of each head."""
    lse = _row_lse(sample) if lse is None else lse
    slots = _mass.head_slots(task.grid, names)
    return np.asarray(_mass.block_sums(sample.q, sample.k, lse, slots, block=task.block))


def block_errors(task: Task, sample: Checked, names: Sequence[str], lse: jax.Array | None = None) -> np.ndarray:
    """float32 [heads, nq, nk]: squared error of the output when a block is skipped, over the site's squared output.

    Relative to the site and not to the head: a projection mixes the heads of a site, so what is small stays small.
    """
    if sample.v is None:
        raise ValueError(f'rule "error" needs v in every sample; {sample.name} has none. Record v, or use rule="row".')
    lse = _row_lse(sample) if lse is None else lse
    slots = _mass.head_slots(task.grid, names)
    errors, size = _mass.block_errors(sample.q, sample.k, sample.v, lse, slots, block=task.block)
    return np.asarray(errors) / max(np.asarray(size).sum(), np.finfo(np.float32).tiny)


def incoherence(task: Task, sample: Checked, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over blocks of max P / mean P of a sample, in the order of each head and in model order: float64 [heads]."""
    lse = _row_lse(sample)
    found = []
    for order in (names, [task.grid.orders[0]] * len(names)):
        slots = _mass.head_slots(task.grid, order)
        found.append(np.asarray(_mass.block_peaks(sample.q, sample.k, lse, slots, block=task.block)[0], np.float64))
    return found[0], found[1]


def share(task: Task, mass: np.ndarray) -> np.ndarray:
    """s_ij: mass over the tokens of the query block, so that the rows of a map sum to 1."""
    return mass / task.grid.block_tokens(task.block[0])[:, None].astype(np.float32)


def output_error(sample: Checked, plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """Relative L1 and cosine of a site's output under a plan against dense attention: float64 [heads] each."""
    dense = AttentionPlan.dense(plan.grid, heads=plan.heads, block=plan.block)  # not jax.nn: that holds the N x N map
    assert sample.v is not None
    qkv = sample.q, sample.k, sample.v
    if len({x.dtype for x in qkv}) > 1 or sample.q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        qkv = (x.astype(jnp.float32) for x in qkv)  # attention takes one dtype, of these
    l1, size, inner, norm, norm_dense = _compare(*qkv, plan, dense)
    relative = np.where(size > 0, l1 / np.where(size > 0, size, 1), np.where(l1 > 0, np.inf, 0))
    scale = np.sqrt(norm) * np.sqrt(norm_dense)
    same = (norm == 0) & (norm_dense == 0)
    return relative, np.where(scale > 0, inner / np.where(scale > 0, scale, 1), same)


def _row_lse(sample: Checked) -> jax.Array:
    lse = _mass.row_lse(sample.q, sample.k)
    if not _mass.finite(lse):
        raise ValueError(
            f"samples: q and k of {sample.name} are finite, but q k / sqrt(D) is beyond float32. Check the model's "
            "weights."
        )
    return lse


def _lost_mass(task: Task, sample: Checked, name: str, lse: jax.Array) -> np.ndarray:
    """float64 [densities, heads]"""
    mass = chosen_mass(task, sample, [name] * sample.q.shape[2], lse)
    return 1 - np.stack([_choose.retained(mass, task.always, density) for density in task.densities])


def _output_error(task: Task, sample: Checked, name: str, lse: jax.Array) -> np.ndarray:
    """float64 [densities, heads]"""
    if sample.v is None:
        raise ValueError(
            f'objective "error" needs v in every sample; {sample.name} has none. Record v, or use objective="mass".'
        )
    mass = chosen_mass(task, sample, [name] * sample.q.shape[2], lse)
    errors = []
    for density in task.densities:
        keep, _ = _choose.mask(share(task, mass), task.always, density, "head")
        mask = BlockMask(jnp.asarray(keep), task.block)
        errors.append(output_error(sample, AttentionPlan.build(task.grid, order=name, mask=mask, quant=task.quant))[0])
    return np.stack(errors)


@jax.jit
def _compare(q, k, v, plan: AttentionPlan, dense: AttentionPlan):
    a, b = (paro_jax.attention(q, k, v, plan=p).astype(jnp.float32) for p in (plan, dense))
    sums = (abs(a - b), abs(b), a * b, a * a, b * b)
    return [jnp.sum(x, (0, 1, 3)) for x in sums]


def _paro_terms(task: Task, metric: ParoMetric, sample: Checked, lse: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """M_sparse and M_quant, float64 [orders, heads], averaged over the batch; text, last in kernel order, left out."""
    sparse, quant = [], []
    for name in task.orders:
        slots = _mass.head_slots(task.grid, [name] * sample.q.shape[2])[:, : task.grid.grid_tokens]
        small, psi = _mass.block_shapes(sample.q, sample.k, lse, slots, metric.eps, block=task.block)
        sparse.append(np.mean(np.asarray(small) >= np.float32(metric.sigma), (1, 2, 3)))
        quant.append(np.mean(np.asarray(psi), (1, 2, 3), dtype=np.float64))
    return np.stack(sparse), np.stack(quant)


def paro_error(sparse: np.ndarray, quant: np.ndarray, metric: ParoMetric) -> np.ndarray:
    """The paper's M of every order, float64 [orders, heads], from M_sparse and M_quant of every order."""
    sparse = sparse if metric.sign > 0 else 1 - sparse
    total = sparse.sum(0)
    # No order has a sparse block: the term says nothing, and must not be 0 / 0.
    first = np.divide(sparse, total, out=np.zeros_like(sparse), where=total > 0)
    return metric.alpha * first + (1 - metric.alpha) * quant / quant.sum(0)
