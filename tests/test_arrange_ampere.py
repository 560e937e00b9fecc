"""arrange on Ampere and Ada: reference, interpreter, ahead-of-time compile, a GPU. The kernel is Hopper's without TMA;
test_arrange_hopper.py has what they share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_arrange_hopper import Case, placed

from pallas_kernels import _fragments, arrange, compile_report, device_name, interpret
from pallas_kernels.arrange import _lanes, mosaic
from pallas_kernels.block_attention import ampere
from pallas_kernels.workloads import WORKLOADS

REQUEST = replace(WORKLOADS["cogvideox_5b"], op="arrange", device="sm_80", role="k")

# Every role at every width and group. Head dims, lengths and blocks take turns.
CASES = [
    Case("q", "int4", "row", "ampere", norm="rms", rope=True),
    Case("q", "int8", "block", "ampere", tokens=130, block=128, permuted=False),
    Case("q", "bf16", "row", "ampere", head_dim=40, dtype="float16"),
    Case("k", "int4", "block", "ampere", head_dim=96, tokens=126, block=128, mean="compute", dtype="float32"),
    Case("k", "int8", "row", "ampere", norm="layer", rope=True, mean="head", head_dim=96, tokens=1, batch=2),
    Case("v", "int4", "channel", "ampere", head_dim=96),
    Case("v", "int4", "block", "ampere", head_dim=128, tokens=65),
    Case("v", "int8", "channel", "ampere", head_dim=128, tokens=33, block=128),
    Case("v", "int8", "block", "ampere", tokens=64, norm="rms"),
    Case("v", "bf16", "channel", "ampere", head_dim=96, tokens=70),
    Case("q", "int8", "row", "rows", tokens=33),
]


def check(case: Case, found: tuple[jax.Array, ...]) -> None:
    """The reference's integers, but for ratios so near to a half that float32's rounding of a division decides."""
    expected = case.solve("reference")
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype)
    a, b = found[0], expected[0]
    if case.width == "int4" and case.layout == "ampere":
        a, b = _fragments.unpacked(a), _fragments.unpacked(b)
    a, b = (np.asarray(y, np.float32) for y in (a, b))
    summed = case.norm is not None or case.mean == "compute" or case.rope
    if case.width == "bf16":
        np.testing.assert_array_equal(a, b)
    else:
        assert np.abs(a - b).max() <= 1 and (a != b).sum() <= 2 + a.size * 2e-3
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=2e-6 if summed else 2e-7, atol=1e-6 if summed else 0)


@pytest.fixture
def kernels(monkeypatch) -> list[mosaic._Call]:
    """The launches of Mosaic's kernel during a test."""
    found = []
    launch = mosaic._Call.launch
    monkeypatch.setattr(mosaic._Call, "launch", lambda call, *args: [found.append(call), launch(call, *args)][1])
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_is_the_reference(case, kernels):
    with interpret("sm_86"):
        found = jax.block_until_ready(case.solve("ampere"))
    check(case, found)
    assert kernels and all(call.direct for call in kernels)


def test_what_the_kernel_does_not_serve_xla_does(kernels):
    """A mean per block of queries, which the attention kernel's delta is for: the same layout, no launch."""
    x, slots, _ = Case("q").arrays
    options = dict(role="q", width="int4", group="row", block=64, mean="block", layout="ampere")
    with interpret("sm_80"):
        found = arrange(x, slots, **options, implementation="ampere")
    for a, b in zip(found, arrange(x, slots, **options, implementation="reference"), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
    assert not kernels


def test_v_at_four_bits_lies_by_the_key_order():
    """Number 32 g + p of the key-major V is key 32 g + key_order[p]: what the address of each part must name."""
    order = np.asarray(_fragments.key_order("int4"))
    row, part = np.arange(16)[:, None], np.arange(4)[None]
    eight = row & 7
    key = 4 * (row - eight) + 16 * (eight & 1) + 8 * (part >> 1) + (eight & 6) + (part & 1)
    position = 4 * row + part
    np.testing.assert_array_equal(key, position // 32 * 32 + order[position % 32])


@pytest.mark.parametrize("dim", ampere.HEAD_DIMS)
def test_two_that_share_a_byte_lie_in_one_thread(dim):
    """By Mosaic's own layouts: byte c of a row is columns 2c and 2c + 1, whoever holds them."""
    for layout, shape in ((_lanes.rows(dim, 8).tile, (64, dim)), (_lanes.columns().transpose, (dim, 64))):
        whole = placed(layout, shape)
        half = placed(_lanes.half_layout(layout), (shape[0], shape[1] // 2))
        np.testing.assert_array_equal(whole[..., 0::2, :], half * [1, 2])
        np.testing.assert_array_equal(whole[..., 1::2, :], half * [1, 2] + [0, 1])


# ---- the compiler, the GPU ------------------------------------------------------------------------------------------

AHEAD = {
    "q int4, 64": dict(role="q", qk="int4"),
    "k int4, 128": dict(role="k", qk="int4", head_dim=128, block=(128, 128)),
    "v int4, 128": dict(role="v", pv="int4", head_dim=128, block=(128, 128)),
    "v int8, 64": dict(role="v", pv="int8"),
    "k bf16, 96": dict(role="k", head_dim=96),
}


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
@pytest.mark.parametrize("case", AHEAD)
def test_compiles_without_spills_and_below_the_memory(case, target):
    request = replace(REQUEST, q_tokens=1000, kv_tokens=1000, heads=2, device=target, layout="ampere", **AHEAD[case])
    row = compile_report.measure(case, request, target)
    assert row["spills"] == 0 and 0 < row["registers"] <= 255
    assert row["bound_ratio"] == 1  # what it computes takes less than what it moves


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1030])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_is_the_reference(case, tokens):
    if device_name() not in ampere.DEVICES:
        pytest.skip(f"needs one of {', '.join(ampere.DEVICES)}, this is {device_name()}")
    case = replace(case, tokens=tokens)
    check(case, case.solve("ampere"))
    for a, b in zip(case.solve("ampere"), case.solve("ampere"), strict=True):
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_list_that_points_outside_reads_nothing_outside():
    """Traced, so nothing before the launch can catch it; the interpreter gives NaN for a read out of bounds."""
    x, slots, options = Case(width="bf16", layout="ampere").arrays

    @jax.jit
    def call(slots):
        return arrange(x, slots, **options, implementation="ampere")[0]

    with interpret("sm_80"):
        wild = call(jnp.where(slots % 2 == 0, 10**6, -5))
        last = call(jnp.where(slots % 2 == 0, 69, 0))
    np.testing.assert_array_equal(np.asarray(wild, np.float32), np.asarray(last, np.float32))
