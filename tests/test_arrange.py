"""arrange: the oracle against numpy, XLA against the oracle bit for bit, and each promise of the docstring once."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BLOCKS, HEAD_DIMS, LENGTHS

from pallas_kernels import Norm, Rope, _permute, arrange
from pallas_kernels._check import WIDTHS
from pallas_kernels.arrange import BACKENDS, GROUPS

# Those that run anywhere; test_arrange_hopper.py has the rest.
IMPLEMENTATIONS = [backend.name for backend in BACKENDS if backend.name not in ("hopper", "ampere")]
# fp4 has groups of its own: test_recipes.py.
CASES = [(role, width, group) for role in GROUPS for group in GROUPS[role] for width in WIDTHS if width != "fp4"]
few = settings(max_examples=6, deadline=None, derandomize=True)


def made(batch=2, tokens=130, heads=3, dim=32, dtype=jnp.float32, seed=0):
    """(x [B, N, H, D], slots [H, N]) of a seed; a channel and a token of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, tokens, heads, dim)) * rng.uniform(0.1, 3.0, size=(heads, dim))
    x[..., 5] = 0.0
    x[:, tokens // 2] = 0.0
    slots = np.stack([rng.permutation(tokens) for _ in range(heads)])
    return jnp.asarray(x, dtype), jnp.asarray(slots, jnp.int32)


def tables(tokens, dim, seed=0):
    """Norm weights and a RoPE table; the first three tokens do not rotate."""
    rng = np.random.default_rng(seed)
    angle = rng.normal(size=(tokens, dim // 2))
    angle[:3] = 0.0
    rope = Rope(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))
    return jnp.asarray(rng.normal(size=dim), jnp.float32), jnp.asarray(rng.normal(size=dim), jnp.float32), rope


def by_hand(x, slots, role, width, group, block):
    """One scale at a time, in numpy: (values, scales) of [B, N, H, D] reordered."""
    x = np.stack([np.asarray(x, np.float32)[:, slots[h], h] for h in range(x.shape[2])], axis=1)
    batch, heads, tokens, dim = x.shape
    blocks = -(-tokens // block)
    qmax = WIDTHS[width].qmax
    values = np.zeros_like(x)
    shape = {
        "row": (tokens,),
        "thread": (tokens,),
        "channel": (1, dim),
        "block": (blocks, dim) if role == "v" else (blocks,),
    }[group]
    scales = np.zeros((batch, heads, *shape), np.float32)
    if group == "thread":  # see SageAttention2: which of 8 rows of 32 queries, which of 4 pairs of 8 keys
        token = np.arange(tokens)
        ids = token // 32 * 8 + token % 8 if role == "q" else token // block * 4 + token % 8 // 2
        for b, h, n in np.ndindex(x.shape[:3]):
            amax = np.abs(x[b, h, ids == ids[n]]).max()
            scales[b, h, n] = np.maximum(amax, np.float32(1e-7)) / np.float32(qmax)
        ratio = x / scales[..., None]
        return (ratio.astype(ml_dtypes.float8_e4m3fn) if width == "fp8" else np.rint(ratio)).astype(x.dtype), scales
    for place in np.ndindex(scales.shape):
        rows = {"row": place[2], "channel": slice(None), "block": slice(place[2] * block, (place[2] + 1) * block)}[
            group
        ]
        part = (*place[:2], rows, place[3] if len(place) == 4 else slice(None))
        scales[place] = np.maximum(np.abs(x[part]).max(), np.float32(1e-7)) / np.float32(qmax)
        ratio = x[part] / scales[place]
        values[part] = ratio.astype(ml_dtypes.float8_e4m3fn) if width == "fp8" else np.rint(ratio)
    return values, scales


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("role", "width", "group"), [case for case in CASES if case[1] != "bf16"])
def test_every_scale_is_that_of_its_group(role, width, group, implementation):
    x, slots = made()
    values, scales, mean = arrange(
        x, slots, role=role, width=width, group=group, block=64, implementation=implementation
    )  # fmt: skip
    expected, expected_scales = by_hand(x, np.asarray(slots), role, width, group, 64)
    assert mean is None and values.dtype == WIDTHS[width].store and scales.dtype == jnp.float32
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
    step = np.asarray(values, np.float32) - expected
    if width == "fp8":  # half-way cases may fall either way by one part in eight
        assert (np.abs(step) <= np.abs(expected) / 8 + 2.0**-9).all()
    else:
        assert (np.abs(step) <= 1).all()  # a ratio that lies within float32's rounding of a half
    assert (step != 0).mean() < 1e-3
    assert np.abs(np.asarray(values, np.float32)).max() == WIDTHS[width].qmax


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rounding_is_half_to_even_and_levels_are_symmetric(implementation):
    # amax 127 makes the scale 1, so the values are what is rounded.
    row = np.array([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], np.float32)
    values, scales, _ = arrange(
        jnp.asarray(row)[None, None, None], None, role="q", width="int8", group="row", block=64,
        implementation=implementation,
    )  # fmt: skip
    assert scales.item() == 1.0
    np.testing.assert_array_equal(values[0, 0, 0], [127, -127, 0, 2, 2, 0, -2, 126])


@given(
    st.sampled_from(CASES),
    st.sampled_from(LENGTHS),
    st.sampled_from(HEAD_DIMS),
    st.sampled_from(BLOCKS),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.booleans(),
    st.sampled_from([None, "rms", "layer"]),
)
@few
def test_xla_is_the_reference(case, tokens, dim, block, dtype, rotate, kind):
    role, width, group = case
    x, slots = made(tokens=tokens, dim=dim, dtype=jnp.dtype(dtype))
    weight, bias, rope = tables(tokens, dim)
    mean = "compute" if role == "k" and width != "bf16" else None
    options = dict(role=role, width=width, group=group, block=block[1], mean=mean, rope=rope if rotate else None,
                   norm=Norm(kind, weight, bias) if kind else None)  # fmt: skip
    found = arrange(x, slots, **options)
    expected = arrange(x, slots, implementation="reference", **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
    # XLA may fuse a norm's sums otherwise: float32 apart in the last bits, so one level apart where it rounds.
    one = {"bf16": float(jnp.finfo(x.dtype).eps), "fp8": 1 / 8}.get(width)
    a, b = (np.asarray(y, np.float32) for y in (found[0], expected[0]))
    assert (np.abs(a - b) <= (1.0 if one is None else 2 * one * np.abs(b) + 2.0**-9)).all()
    assert (a != b).mean() <= (0.01 if width != "bf16" else 0.2)
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("role", "width", "group"), CASES)
def test_xla_is_the_reference_bit_for_bit_without_norm(role, width, group):
    x, slots = made(dtype=jnp.bfloat16)
    found = arrange(x, slots, role=role, width=width, group=group, block=64)
    expected = arrange(x, slots, role=role, width=width, group=group, block=64, implementation="reference")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_then_rope_then_mean_then_order(kind, implementation):
    x, slots = made(tokens=70)
    before = np.asarray(x).copy()
    weight, bias, rope = tables(70, 32)
    values, scales, mean = arrange(
        x, slots, role="k", width="bf16", group="row", block=64, mean="compute", rope=rope,
        norm=Norm(kind, weight, bias, 1e-5), implementation=implementation,
    )  # fmt: skip
    y = np.asarray(x, np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight) + np.asarray(bias)
    turn = (np.asarray(rope.cos) + 1j * np.asarray(rope.sin))[None, :, None]
    turned = (y[..., 0::2] + 1j * y[..., 1::2]) * turn
    y = np.stack([turned.real, turned.imag], -1).reshape(y.shape)
    np.testing.assert_allclose(mean, y.mean(1), atol=1e-5)
    y = y - y.mean(1, keepdims=True)
    expected = np.stack([y[:, np.asarray(slots)[h], h] for h in range(3)], axis=1)
    assert scales is None and mean.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, atol=2e-5)
    np.testing.assert_array_equal(x, before)  # the inputs are untouched


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rope_turns_by_model_token_and_leaves_still_rows_alone(implementation):
    x, slots = made(tokens=70)
    _, _, rope = tables(70, 32)
    turned, _, _ = arrange(
        x, slots, role="q", width="bf16", group="row", block=64, rope=rope, implementation=implementation
    )
    plain, _, _ = arrange(x, slots, role="q", width="bf16", group="row", block=64, implementation=implementation)
    still = np.asarray(slots) < 3
    np.testing.assert_array_equal(np.asarray(turned)[:, still], np.asarray(plain)[:, still])
    moved = np.abs(np.asarray(turned) - np.asarray(plain)).max(-1) > 1e-3
    assert moved[:, ~still].mean() > 0.95
    lengths = [np.linalg.norm(np.asarray(y), axis=-1) for y in (turned, plain)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_a_norm_may_differ_by_head(implementation):
    x, slots = made()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 32)), jnp.float32)
    options = dict(role="q", width="bf16", group="row", block=64, implementation=implementation)
    together, _, _ = arrange(x, slots, norm=Norm("rms", weight), **options)
    for head in range(3):
        one = slice(head, head + 1)
        alone, _, _ = arrange(x[:, :, one], slots[one], norm=Norm("rms", weight[head]), **options)
        np.testing.assert_allclose(together[:, one], alone, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_given_mean_is_subtracted_and_returned(implementation):
    x, slots = made()
    options = dict(role="k", width="int8", group="block", block=64, implementation=implementation)
    computed = arrange(x, slots, mean="compute", **options)
    given_by_batch = arrange(x, slots, mean=x.mean(axis=1), **options)
    for a, b in zip(computed, given_by_batch, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-6)
    by_head = jnp.ones((3, 32))
    values, scales, mean = arrange(x, slots, mean=by_head, **options)
    plain = arrange(x - 1.0, slots, **options)
    assert mean.shape == (2, 3, 32) and (np.asarray(mean) == 1).all()
    np.testing.assert_array_equal(values, plain[0])
    np.testing.assert_array_equal(scales, plain[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", ["int8", "int4", "fp8"])
def test_a_group_of_zeros_is_zeros(width, implementation):
    x, slots = made()
    values, scales, _ = arrange(
        x, slots, role="v", width=width, group="channel", block=64, implementation=implementation
    )
    assert (np.asarray(values, np.float32)[..., 5] == 0).all()
    np.testing.assert_allclose(scales[..., 5], 1e-7 / WIDTHS[width].qmax)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_visible_in_its_group_and_only_there(implementation):
    x, slots = made()
    x = x.at[0, 7, 1, 2].set(jnp.nan)
    _, scales, _ = arrange(x, slots, role="q", width="int8", group="block", block=64, implementation=implementation)
    expected = np.zeros(scales.shape, bool)
    expected[0, 1, int(np.flatnonzero(np.asarray(slots[1]) == 7)[0]) // 64] = True
    np.testing.assert_array_equal(np.isnan(scales), expected)


def test_no_slots_is_model_order():
    x, _ = made()
    for implementation in IMPLEMENTATIONS:
        values, _, _ = arrange(x, None, role="q", width="bf16", group="row", block=64, implementation=implementation)
        np.testing.assert_array_equal(values, jnp.swapaxes(x, 1, 2))


def test_permutation_round_trip_and_its_gradient():
    x, slots = made(tokens=65)
    np.testing.assert_array_equal(_permute.to_model(_permute.to_kernel(x, slots), slots), x)
    np.testing.assert_array_equal(
        jnp.take_along_axis(slots, _permute.inverse(slots), axis=1), np.arange(65)[None].repeat(3, 0)
    )
    weight = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 65, 32)), jnp.float32)
    # x appears once in the sum, times the weight of the slot it went to.
    gradient = jax.grad(lambda x: (_permute.to_kernel(x, slots) * weight).sum())(x)
    np.testing.assert_array_equal(_permute.to_kernel(gradient, slots), weight)
    back = jax.grad(lambda y: (_permute.to_model(y, slots) * x).sum())(weight)
    np.testing.assert_array_equal(back, _permute.to_kernel(x, slots))


def test_gradient_is_that_of_the_plain_steps():
    x, slots = made(tokens=65)
    weight, bias, rope = tables(65, 32)

    def loss(implementation):
        def of(x, weight, bias):
            values, _, mean = arrange(
                x, slots, role="k", width="bf16", group="row", block=64, mean="compute", rope=rope,
                norm=Norm("layer", weight, bias), implementation=implementation,
            )  # fmt: skip
            return jnp.sin(values).sum() + (mean**2).sum()

        return jax.grad(of, (0, 1, 2))(x, weight, bias)

    for a, b in zip(loss("xla"), loss("reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", ["int8", "int4", "fp8"])
def test_quantised_widths_refuse_a_gradient(width, implementation):
    x, slots = made()

    def loss(x):
        values, scales, _ = arrange(
            x, slots, role="q", width=width, group="row", block=64, implementation=implementation
        )
        return (values.astype(jnp.float32) * scales[..., None]).sum()

    with pytest.raises(ValueError, match=r"gradient: expected unquantised widths.*QuantSpec\(\)"):
        jax.grad(loss)(x)


def test_a_new_order_compiles_nothing():
    x, slots = made()
    traces = []

    @jax.jit
    def call(x, slots):
        traces.append(1)
        return arrange(x, slots, role="q", width="int8", group="row", block=64)[:2]

    call(x, slots)
    call(x, slots[::-1])
    assert len(traces) == 1 and call._cache_size() == 1


_X, _SLOTS = made()


def _changed(**changed):
    options = dict(x=_X, slots=_SLOTS, role="q", width="int8", group="row", block=64) | changed
    return lambda: arrange(options.pop("x"), options.pop("slots"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_changed(role="k", group="thread", block=60), r"block: expected a multiple of 8 keys.*got 60"),
        (_changed(width="fp4", x=_X[..., :30]), r"width: expected head_dim and block in multiples of 16.*head_dim 30"),
        (_changed(role="v", width="fp4", group="block", block=40), r"width: expected .*multiples of 16.*block 40"),
        (_changed(role="v", group="channel", rotate=True), r"rotate: expected False for role 'v'"),
        (_changed(rotate=True, x=_X[..., :31]), r"rotate: expected False .*odd head_dim, got True, 'q', 31"),
        (_changed(role="o"), r"role: expected 'q', 'k' or 'v', got 'o'"),
        (_changed(width="int2"), r"width: expected one of 'bf16', .*got 'int2'"),
        (_changed(group="channel"), r"group: expected 'row' or 'block' or 'thread' for role 'q', got 'channel'"),
        (_changed(role="v", group="row"), r"group: expected 'channel' or 'block' for role 'v', got 'row'"),
        (_changed(block=0), r"block: expected two positive integers .*got \(0, 1\)"),
        (_changed(x=_X[0]), r"x: expected shape \[batch, tokens, heads, head_dim\].*got shape \[130, 3, 32\]"),
        (_changed(x=_X[:, :0], slots=None), r"x: expected at least one .*got shape \[2, 0, 3, 32\]"),
        (_changed(x=_X.astype(jnp.int32)), r"x: expected float32, bfloat16 or float16, got int32"),
        (_changed(slots=_SLOTS[:2]), r"slots: expected shape .* = \[3, 130\], got shape \[2, 130\]"),
        (_changed(slots=_SLOTS.astype(jnp.int16)), r"slots: expected dtype int32, got dtype int16"),
        (_changed(slots=_SLOTS * 0), r"slots: expected a permutation of 0..129 in every head, got values from 0 to 0"),
        (_changed(norm=Norm("batch")), r"norm.kind: expected 'rms' or 'layer', got 'batch'"),  # type: ignore[arg-type]
        (_changed(norm=Norm("rms", jnp.ones(33))), r"norm.scale: expected shape \[32\] or \[3, 32\], got shape \[33\]"),
        (_changed(norm=Norm("rms", None, jnp.ones((2, 32)))), r"norm.bias: expected shape .*got shape \[2, 32\]"),
        (_changed(rope=tables(129, 32)[2]), r"rope.cos: expected shape .* = \[130, 16\], got shape \[129, 16\]"),
        (_changed(rope=tables(130, 32)[2], x=_X[..., :31]), r"rope: expected an even head_dim.*got head_dim 31"),
        (_changed(mean="compute"), r"mean: expected None or 'block' for role 'q', got 'compute'"),
        (_changed(role="k", mean="average"), r"mean: expected None, 'compute' or an array, got 'average'"),
        (_changed(role="k", mean=jnp.ones(32)), r"mean: expected shape \[3, 32\] or \[2, 3, 32\], got shape \[32\]"),
        (
            _changed(implementation="mosaic"),
            r"implementation: expected None or one of 'hopper', 'ampere', 'xla', 'reference', got 'mosaic'",
        ),
    ],
)
def test_a_mistake_names_the_argument_the_expected_and_the_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()
