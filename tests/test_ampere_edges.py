"""The Ampere kernel where inputs are extreme: keys past the end, scales of zero, scores beyond float32's integers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, assert_close, bounds
from test_ampere import REQUEST, TINY, mma_on_a_cpu  # noqa: F401  (a fixture of this module too)

from pallas_kernels import interpret
from pallas_kernels.block_attention import ampere


@pytest.mark.parametrize(
    ("qk", "k_group", "kv_tokens", "added"),
    [("bf16", "block", 64, False), ("int8", "row", 1, False), ("int8", "block", 192, True)],
)
def test_half_a_block_past_the_end(qk, k_group, kv_tokens, added):
    """A bf16 P walks 128 keys in halves; the second one of the last block has no key here, and counts for nothing."""
    facts = dict(q_tokens=9, kv_tokens=kv_tokens, head_dim=64, block=(128, 128), dtype="bfloat16", mask="ones")
    problem = Problem(heads=1, qk=qk, k_group=k_group, batch=2 if added else 1, **facts)
    shape = (problem.batch, 1, 1, kv_tokens)  # lower than the zeros of padded keys
    delta = jnp.asarray(np.random.default_rng(0).normal(size=shape) - 300, jnp.float32) if added else None
    with interpret("sm_80"):
        found = jax.block_until_ready(problem.solve("ampere", delta=delta))
    for a, b, bound in zip(found, problem.solve("reference", delta=delta), bounds(problem), strict=True):
        assert_close(a, b, bound)


def test_scales_of_zero_do_not_bring_masked_keys_back():
    """Zeros that somebody else rounded may have a scale of zero: all scores are then zero, of real keys alone."""
    problem = Problem(**TINY | dict(heads=1, q_tokens=9, kv_tokens=70), qk="int8", pv="int8", mask="ones")
    q_scale = problem.operands["q_scale"].at[:, :, :4].set(0.0)
    with interpret("sm_80"):
        found = jax.block_until_ready(problem.solve("ampere", q_scale=q_scale))
    for a, b, bound in zip(found, problem.solve("reference", q_scale=q_scale), bounds(problem), strict=True):
        assert_close(a, b, bound)


LARGE = {  # what scores are multiplied by: the rounding of the largest, in halvings, passes 0.005, 2^6 and 2^20
    "bf16": (1e9, dict(dtype="bfloat16")),
    "bf16, far beyond": (1e13, dict(dtype="bfloat16")),
    "int8, scales by key": (1e5, dict(qk="int8", pv="int8", k_group="row")),
    "int8 scores, running": (1e9, dict(qk="int8", pv="int4", p_scale="running")),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_however_large_the_scores(case):
    """As Hopper's: the product of a score and its scale is rounded once; each row is its largest keys."""
    scale, changed = LARGE[case]
    problem = Problem(**dict(heads=1, q_tokens=70, kv_tokens=130, head_dim=64, block=(128, 64)) | changed)
    with interpret("sm_80"):
        o, lse = jax.block_until_ready(problem.solve("ampere", scale=scale))
    expected, expected_lse = problem.solve("reference", scale=scale)
    assert_close(o, expected, 2e-2 * float(jnp.abs(problem.qkv[2].astype(jnp.float32)).max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-2 if problem.qk == "bf16" else 1e-6)


def test_the_interpreter_refuses_what_an_output_of_float32_would_hang(monkeypatch):
    """96 KiB of it, which bfloat16 operands of the same shape stay below."""
    request = replace(REQUEST, batch=1, heads=1, q_tokens=384, kv_tokens=64, head_dim=64, dtype="bfloat16")
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with interpret("sm_80"):
        assert "needs 4 threads for arrays of 98304 bytes" in str(ampere.why_not(request))
        assert ampere.why_not(replace(request, q_tokens=256)) is None
