"""What the kernels make of integers, number by number in NumPy: with their own roundings, unlike the reference.

P's reference is a row's maximum as far as one float32 beside MAGIC can tell (`exponents` in _hopper.py), and some
exponentials are a cubic's. Shares nothing with the kernel but constants.
"""

import math

import numpy as np
from problems import Problem, schedule

from pallas_kernels._check import WIDTHS
from pallas_kernels._choose import Request
from pallas_kernels._registers import LEVEL, MAGIC
from pallas_kernels.block_attention import hopper
from pallas_kernels.block_attention._hopper import FAR

f32 = np.float32
CUBIC = (0.99992806, 0.69326109, 0.24261133, 0.05517132)


def cubic(x: np.ndarray) -> np.ndarray:
    whole = np.rint(x)
    rest = x - whole
    return sum(c * rest**i for i, c in enumerate(CUBIC)) * np.exp2(whole)


def integers(problem: Problem, cubics: int = 0, *, ampere: bool = False, **changed) -> tuple[np.ndarray, np.ndarray]:
    """(o f64 [B, Nq, H, D], lse f64 [B, Nq, H]) of a problem with integer q, k and P and scales by block.

    cubics: of a thread's exponentials of a step. ampere: as that kernel does, which takes differences first and then
    adds what turns P into levels. `changed`: operands that take the place of the problem's.
    """
    operands = {name: np.asarray(x) for name, x in (problem.operands | changed).items()}
    unit = 16.0 if problem.qk == "int4" and not ampere else 1.0  # what 1 is stored as
    height = math.log2(WIDTHS[problem.pv].p_levels * LEVEL)
    (bq, bk), (batch, heads, tokens, dim) = problem.block, operands["q"].shape
    count, index = map(np.asarray, schedule(problem.keep, problem.walk))
    pairs = bk // 4
    places = [(2 * i + 1) * pairs // cubics for i in range(cubics // 2)]
    column = np.arange(bk)
    by_cubic = np.isin(column // 8 * 2 + column % 2, places)
    to_log2 = f32(problem.scale * math.log2(math.e))

    o, lse = np.zeros((batch, heads, tokens, dim)), np.full((batch, heads, tokens), -np.inf)
    for b, h, row in np.ndindex(batch, heads, tokens):
        acc, total, top = np.zeros(dim), 0.0, -np.inf
        query = unit * operands["q"][b, h, row].astype(np.float64)
        scale = operands["q_scale"][b, h]
        scale = f32(scale[row if len(scale) == tokens else row // bq] / f32(unit))
        for block in index[h, row // bq, : count[h, row // bq]]:
            keys = slice(block * bk, (block + 1) * bk)
            s = MAGIC + unit * operands["k"][b, h, keys].astype(np.float64) @ query
            of_block = f32(operands["k_scale"][b, h, block] / f32(unit))
            one, other = (of_block, scale) if ampere else (scale, of_block)
            factor = np.float64(f32(f32(one * to_log2) * other))
            largest = s.max()
            own = f32((largest - MAGIC) * factor)
            rising = max(top, own)
            behind = 0.0 if problem.p_scale == "block" else min(f32(rising - own), 128.0)
            if ampere or factor > f32(FAR / MAGIC):
                s, largest = s - largest, 0.0
            above = np.float64(f32(f32(behind) - f32(height)))
            reference = np.float64(f32(largest * factor + above))
            x = ((s * factor).astype(f32) if ampere else s * factor) - reference
            x = x.astype(f32).astype(np.float64)
            p = np.rint(np.where(by_cubic[: len(x)], cubic(np.maximum(x, -120)), np.exp2(x)) / LEVEL)
            gained = largest * factor - reference - height
            weight = np.exp2(own - rising - gained) if problem.p_scale == "block" else 1.0
            fade = np.exp2(top - rising)
            product = p @ operands["v"][b, h, keys].astype(np.float64)
            by_block = operands["v_scale"].shape[2] > 1
            acc = acc * fade + weight * product * operands["v_scale"][b, h, block if by_block else 0]
            total, top = total * fade + weight * p.sum(), rising
        if total:
            o[b, h, row] = acc / total
            lse[b, h, row] = math.log(2) * (top + np.log2(total / WIDTHS[problem.pv].p_levels))
    return problem.to_model(o), problem.to_model(lse)


def ampere_numbers(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The same of Ampere's kernel."""
    if {problem.qk, problem.pv} <= {"int8", "int4"} and problem.k_group != "row":
        return integers(problem, ampere=True)
    return tuple(np.asarray(x, np.float64) for x in problem.solve("reference"))


def hopper_numbers(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel is to give: those integers where it has some, else the reference's numbers."""
    if {problem.qk, problem.pv} <= {"int8", "int4"} and problem.k_group != "row":
        request = Request(
            "block_attention", problem.batch, problem.heads, problem.q_tokens, problem.kv_tokens, problem.head_dim,
            problem.dtype, problem.block, problem.qk, problem.pv, problem.p_scale, "sm_90",
        )  # fmt: skip
        return integers(problem, hopper.candidates(request)[0].cubics)
    return tuple(np.asarray(x, np.float64) for x in problem.solve("reference"))
