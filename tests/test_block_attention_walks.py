"""block_attention walks a row's kept blocks as `index` has them: any walk gives the same result, each block once."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from emulation import hopper_numbers
from problems import Problem, assert_close, check, emulated
from test_ampere import mma_on_a_cpu  # noqa: F401  (a fixture of this module too)
from test_block_attention_uses import IMPLEMENTATIONS, dense_oracle

from pallas_kernels import interpret

RULES = [("bf16", "block"), ("int8", "block"), ("int8", "running")]
RAGGED = dict(q_tokens=450, mask="empty rows", walk="shuffled")  # 200 keys: the last of four blocks has eight


def test_shuffled_walks_have_the_partial_block_anywhere():
    walks = Problem(**RAGGED).walks
    assert {walk.index(3) for walk in walks if 3 in walk[:-1]} and {walk.index(3) for walk in walks if 3 in walk[1:]}
    assert [] in walks


@pytest.mark.parametrize(("width", "p_scale"), RULES)
def test_the_reference_takes_the_walk(width, p_scale):
    """Against numpy, block by block; relative to the running maximum a walk decides how P rounds."""
    problem = Problem(**RAGGED, qk=width, pv=width, p_scale=p_scale)
    found, expected = problem.solve("reference"), emulated(problem)
    largest = float(np.abs(np.asarray(problem.qkv[2])).max())
    for a, b, bound in zip(found, expected, (1e-5 * largest, 1e-5), strict=True):
        assert_close(a, problem.to_model(b), bound)
    ascending = replace(problem, walk="ascending").solve("reference")[0]
    moved = float(np.abs(np.asarray(found[0]) - np.asarray(ascending)).max()) / largest
    assert (moved > 1e-4) if p_scale == "running" else (moved < 1e-6)


@pytest.mark.parametrize(("width", "p_scale"), RULES)
def test_xla_takes_the_walk(width, p_scale):
    problem = Problem(q_tokens=330, kv_tokens=330, mask="ragged", walk="shuffled", qk=width, pv=width, p_scale=p_scale)
    check(problem, "xla")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_knows_no_walk(implementation):
    problem = Problem(**RAGGED, permuted=False)
    weight = np.random.default_rng(0).normal(size=(1, 2, 450, 32)).astype(np.float32)

    def by_blocks(q, k, v):
        return (problem.solve(implementation, q=q, k=k, v=v)[0].swapaxes(1, 2) * weight).sum()

    def by_elements(q, k, v):
        return (dense_oracle(q, k, v, problem.elements, problem.scale)[0] * weight).sum()

    expected = jax.grad(by_elements, (0, 1, 2))(*problem.qkv)
    for a, b in zip(jax.grad(by_blocks, (0, 1, 2))(*problem.qkv), expected, strict=True):
        assert_close(a, b, 2e-5 * max(1.0, float(np.abs(b).max())))


# 130 keys: the last block has two, and comes first where a walk is reversed; halves of a bf16 P's one have none or two.
KERNELS = {
    "int8 running": dict(qk="int8", pv="int8", p_scale="running", head_dim=64, block=(64, 64)),
    "int8 block": dict(qk="int8", pv="int8", head_dim=64, block=(128, 64)),
    "bf16 in halves": dict(dtype="bfloat16", head_dim=128, block=(128, 128)),
}


@pytest.mark.parametrize("case", KERNELS)
@pytest.mark.parametrize(("backend", "device"), [("hopper", "sm_90"), ("ampere", "sm_80")])
def test_a_kernel_takes_the_walk(backend, device, case):
    problem = Problem(heads=1, q_tokens=70, kv_tokens=130, mask="ones", walk="reversed", **KERNELS[case])
    with interpret(device):
        check(problem, backend, hopper_numbers(problem) if backend == "hopper" else None)
