"""The decisions: which order a head uses, and which blocks are kept for a budget."""

from fractions import Fraction
from typing import Literal, get_args

import numpy as np

Rule = Literal["global", "head", "row", "error"]
RULES: tuple[str, ...] = get_args(Rule)
TIE = 1e-6  # orders whose scores differ less are equal; the first one wins, and model order is free
_CHUNK = 1 << 26  # values compared at a time


def orders(errors: np.ndarray) -> np.ndarray:
    """int [..., heads]: position of the first order within `TIE` of the least error. errors: [..., orders, heads]."""
    return np.argmax(errors <= errors.min(-2, keepdims=True) + TIE, axis=-2)


def floor_blocks(always: np.ndarray) -> int:
    """Blocks of a head that are kept whatever the budget: always_keep, and one in each row that has none of those."""
    return int(always.sum() + (~always.any(1)).sum())


def budget_of(density: float, blocks: int) -> int:
    """Blocks to keep of `blocks`: the largest number whose density is not above `density`, counted in fractions."""
    return int(Fraction(density).limit_denominator(10**6) * blocks)


def retained(mass: np.ndarray, always: np.ndarray, density: float) -> np.ndarray:
    """float64 [...]: part of the mass that a budget of its own retains, blocks always kept counted first.

    mass: [..., nq, nk] sums of P over blocks. The rest of the budget goes to the heaviest blocks, row or no row: this
    is R of the method's objective. (A mask also keeps a block in every row, which costs little mass and is the same
    idea for every order.)
    """
    forced, free = mass[..., always], mass[..., ~always]
    room = min(budget_of(density, always.size) - forced.shape[-1], free.shape[-1])
    best = (
        np.partition(free, free.shape[-1] - room, axis=-1)[..., free.shape[-1] - room :] if room > 0 else free[..., :0]
    )
    return (forced.sum(-1, dtype=np.float64) + best.sum(-1, dtype=np.float64)) / mass.sum((-2, -1), dtype=np.float64)


def kept_mass(mass: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """float64 [...]: part of the mass [..., nq, nk] that `keep` keeps."""
    return np.where(keep, mass, 0).sum((-2, -1), dtype=np.float64) / mass.sum((-2, -1), dtype=np.float64)


def mask(
    share: np.ndarray, always: np.ndarray, density: float, rule: str = "global", errors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks are kept: bool [..., heads, nq, nk], and the threshold that decided, float32.

    share: float32 [..., heads, nq, nk], >= 0, attention mass of a block over the rows of its query block (s_ij, rows
    sum to 1). Kept are the blocks whose share reaches a threshold, one for everything ("global"), one per head or one
    per row; or whose `gains`, to which `errors` [..., heads, nq, nk] belong, reach one for everything ("error"). The
    threshold is the least that keeps the density at or under `density`. Equal blocks are kept or skipped together.

    `always` [nq, nk] comes first, with the heaviest block of each row that has none of those. Next, while the budget
    lasts, the heaviest block of every other row: a query that sees only text is worse than its mass tells.
    A threshold above 1 (above the largest gain) says that the budget ended there. "row" splits what the always dense
    rows leave evenly; the few blocks that are left over go to the rows whose next block is heaviest, one each.
    """
    heads, (nq, nk) = share.shape[:-2], share.shape[-2:]
    value, top = np.array(share, np.float32), np.float32(1)  # shares are at most 1
    if rule == "error":
        assert errors is not None
        value = gains(share, errors, always)
        top = value.max(initial=0, where=np.isfinite(value))
    # Three tiers in one number: infinity is kept anyway, a row's best block stands above all others.
    for index in np.ndindex(heads):
        one = value[index]
        heaviest = np.argmax(np.where(always, -1, one), axis=-1)[:, None]
        raised = np.take_along_axis(one, heaviest, -1) + top
        np.put_along_axis(one, heaviest, np.where(always.any(1)[:, None], raised, np.float32(np.inf)), -1)
        one[always] = np.inf
    if rule in ("global", "error"):
        groups, budget = value.reshape(1, -1), np.array([budget_of(density, value.size)])
    elif rule == "head":
        groups = value.reshape(-1, nq * nk)
        budget = np.full(len(groups), budget_of(density, nq * nk))
    elif rule == "row":
        groups = value.reshape(-1, nk)
        budget = _row_budgets(value.reshape(-1, nq, nk), always.all(1), budget_of(density, nq * nk)).ravel()
    else:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}.")
    threshold = _threshold(groups, budget)
    shape = {"head": heads, "row": (*heads, nq)}.get(rule, ())
    threshold = threshold.reshape(shape)
    return value >= (threshold[..., None, None] if rule != "row" else threshold[..., None]), threshold


def heaviest(share: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """uint16 [..., nq, 1]: of each row of [..., nq, nk] the kept block of most share, the first of equals."""
    found = np.empty((*share.shape[:-1], 1), np.uint16)
    for index in np.ndindex(share.shape[:-2]):  # one head at a time: shares of a large model are gigabytes
        found[index] = np.argmax(np.where(keep[index], share[index], -1), axis=-1)[:, None]
    return found


def gains(share: np.ndarray, errors: np.ndarray, always: np.ndarray) -> np.ndarray:
    """float32 [..., nq, nk] >= 0: how much of the output's squared error keeping each block saves.

    When the blocks S leave the softmax and the rest is renormalised, the output o_r of a query r changes by exactly

        -sum_{c in S} P_rc (v_c - o_r) / (1 - sum_{c in S} P_rc)

    Over a row of blocks, with the parts of different blocks taken as independent, that is a squared error of

        e_i(S) = sum_{j in S} E_ij / (1 - sum_{j in S} s_ij)^2

    with E = `errors` [..., nq, nk] (`_mass.block_errors`) and s = `share`. Blocks join a row in the sequence of falling
    E, after what is always kept; the gain of one is by how much e_i then falls, and at most that of the one before. So
    the blocks above one threshold are the first few of each row, those that save most: the least total error that the
    budget can buy. The denominator is what makes a starved row dear. Infinity for what is kept anyway.
    """
    found = np.empty(share.shape, np.float32)
    for index in np.ndindex(share.shape[:-2]):
        order = np.argsort(np.where(always, -np.inf, -errors[index]), axis=-1, kind="stable")
        s, e = (np.take_along_axis(x[index], order, -1).astype(np.float64) for x in (share, errors))
        kept = np.maximum(np.cumsum(s, -1), 1e-6)  # 1 - the share of S; what has no weight is of no use either
        left = np.maximum(e.sum(-1, keepdims=True) - np.cumsum(e, -1), 0) / kept**2
        gain = np.full(left.shape, np.inf)
        gain[:, 1:] = np.maximum(left[:, :-1] - left[:, 1:], 0)
        gain[np.take_along_axis(always, order, -1)] = np.inf
        np.put_along_axis(found[index], order, np.minimum.accumulate(gain, -1).astype(np.float32), -1)
    return found


def _row_budgets(value: np.ndarray, dense: np.ndarray, budget: int) -> np.ndarray:
    """Blocks of every row [heads, nq], `budget` of each head, for values [heads, nq, nk]; `dense` rows have all."""
    heads, nq, nk = value.shape
    rows, free = np.full((heads, nq), nk), np.flatnonzero(~dense)
    if not free.size:
        return rows
    even, left = divmod(budget - nk * int(dense.sum()), free.size)
    rows[:, free] = min(even, nk)
    if even < nk:
        for head in range(heads):
            following = np.partition(value[head, free], nk - 1 - even, axis=-1)[:, nk - 1 - even]
            rows[head, free[np.argsort(-following, kind="stable")[:left]]] += 1
    return rows


def _threshold(values: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """float32 [groups]: the least t with count(values >= t) <= budget, for values [groups, n] >= 0.

    Floats >= 0 sort like their bits, so bisecting the bits ends at the exact float after 31 steps.
    """
    low = np.zeros(len(values), np.int64)
    high = np.full(
        len(values), np.float32(np.inf).view(np.int32), np.int64
    )  # what is kept anyway fits: checked at the start
    while (low < high).any():
        middle = (low + high) // 2
        fits = _count(values, _from_bits(middle)) <= budget
        high, low = np.where(fits, middle, high), np.where(fits, low, np.minimum(middle + 1, high))
    return _from_bits(high)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.int32).view(np.float32)


def _count(values: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    step = max(1, _CHUNK // len(values))
    parts = (values[:, i : i + step] >= threshold[:, None] for i in range(0, values.shape[1], step))
    return sum((np.count_nonzero(part, axis=1) for part in parts), np.zeros(len(values), np.int64))
