"""Bad input to the verbs: each message names the argument, what was expected, what came, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paro_jax import (
    AttentionPlan,
    BlockMask,
    NoBackend,
    Norm,
    QuantSpec,
    Rope,
    TokenGrid,
    arrange,
    attend,
    attention,
    project_in,
)

GRID = TokenGrid((3, 4, 5), text=7)
PLAN = AttentionPlan.dense(GRID, heads=2, order=["WFH", "FHW"])
N = GRID.tokens
INT8 = QuantSpec(qk="int8", pv="int8")


def x(batch=1, n=N, heads=2, head_dim=8, dtype=jnp.float32):
    return jnp.zeros((batch, n, heads, head_dim), dtype)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(bias=jnp.zeros((1, 1, N, N))), ("bias", "None", "[1, 1, 67, 67]", "without a plan")),
        (dict(mask=np.ones((1, 1, N, N), bool)), ("mask", "None", "bool [1, 1, 67, 67]", "BlockMask")),
        (dict(query=jnp.zeros((N, 2, 8))), ("query", "rank 4", "rank 3", "[67, 2, 8]")),
        (dict(key=jnp.zeros((1, 1, N, 2, 8))), ("key", "rank 4", "rank 5")),
        (dict(query=x(n=N + 1), key=x(n=N + 1), value=x(n=N + 1)), ("query", "67 tokens", "got 68", "resolution")),
        (dict(key=x(n=50)), ("key", "67 tokens", "got 50")),
        (dict(query=x(n=3)), ("query", "67 tokens", "got 3", "text=7 > 3")),
        (dict(key=x(heads=1), value=x(heads=1)), ("key", "heads as query, 2", "got 1", "jnp.repeat(key, 2, axis=2)")),
        (dict(query=x(heads=3), key=x(heads=3), value=x(heads=3)), ("query", "2 heads", "got 3", "plan of this model")),
        (dict(key=x(head_dim=16)), ("key", "shape of query, [1, 67, 2, 8]", "[1, 67, 2, 16]")),
        (dict(value=x(head_dim=16)), ("value", "shape of query, [1, 67, 2, 8]", "[1, 67, 2, 16]")),
        (dict(value=x(batch=2)), ("value", "shape of query, [1, 67, 2, 8]", "[2, 67, 2, 8]")),
        (dict(query=x(batch=0), key=x(batch=0), value=x(batch=0)), ("query", "at least one", "[0, 67, 2, 8]")),
        (dict(value=x(dtype=jnp.bfloat16)), ("value", "dtype of query, float32", "bfloat16")),
        (dict(query=x(dtype=jnp.int8)), ("query", "float32, bfloat16 or float16", "int8")),
        (dict(query=x(dtype=jnp.float8_e4m3fn)), ("query", "float32, bfloat16 or float16", "float8_e4m3fn")),
        (dict(key=x(dtype=jnp.complex64)), ("key", "float32, bfloat16 or float16", "complex64")),
        (dict(scale=float("nan")), ("scale", "finite", "nan")),
        (dict(scale=float("inf")), ("scale", "finite", "inf")),
        (dict(scale="0.1"), ("scale", "plain number", "'0.1'")),
        (dict(scale=True), ("scale", "plain number", "True")),
        (dict(scale=jnp.ones(())), ("scale", "plain number", "float32 []")),
        (dict(scale=np.ones(2)), ("scale", "plain number", "float64 [2]")),
        (dict(plan="plan.safetensors"), ("plan", "AttentionPlan", "plan.safetensors", "load_plan")),
        (dict(plan=AttentionPlan.dense(GRID, heads=2, sites=4)), ("plan", "one site", "(4,)", "plan[site]")),
        (dict(quant="int8"), ("quant", "QuantSpec", "'int8'")),
    ],
)
def test_attention_with_a_plan_refuses(says, arguments, words):
    with says(*words):
        attention(**(dict(query=x(), key=x(), value=x(), plan=PLAN) | arguments))


@pytest.mark.parametrize("scale", [float("nan"), -float("inf"), "1", 1j])
def test_a_bad_scale_is_refused_without_a_plan_too(says, scale):
    with says("scale", scale):
        attention(x(), x(), x(), scale=scale)


def test_a_traced_scale_is_refused(says):
    for plan in (None, PLAN):
        with says("scale", "plain number", "traced", "Multiply query"):
            jax.jit(lambda s, plan=plan: attention(x(), x(), x(), plan=plan, scale=s))(0.1)


def test_quant_needs_a_plan(says):
    with says("quant", "plan", "None", "AttentionPlan.dense"):
        attention(x(), x(), x(), quant=INT8)


def test_a_residual_that_cudnn_would_round_is_refused(says):
    half = x(dtype=jnp.bfloat16)
    with says("return_residual", "False", "cuDNN", "bfloat16", "got True"):
        attention(half, half, half, implementation="cudnn", return_residual=True)


def test_a_k_mean_of_another_head_dim_is_refused(says):
    plan = AttentionPlan.build(GRID, order="FHW", mask=PLAN.mask(), quant=INT8, k_mean=jnp.zeros((2, 16)))
    with says("head_dim 16", "plan.k_mean", "got 8"):
        attention(x(), x(), x(), plan=plan)


@pytest.mark.parametrize("name", ["cudnn", "hopperr"])
def test_a_backend_that_does_not_exist_is_named_with_those_that_do(name):
    with pytest.raises((NoBackend, ValueError), match=name) as caught:
        attention(x(), x(), x(), plan=PLAN, implementation=name)
    assert "xla" in str(caught.value) and "reference" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(role="o"), ("role", '"q", "k" or "v"', "'o'")),
        (dict(plan=None), ("plan", "AttentionPlan", "None")),
        (dict(x=x(heads=5)), ("x", "2 heads", "got 5")),
        (dict(x=x(n=5)), ("x", "67 tokens", "got 5")),
        (dict(x=jnp.zeros((N, 8))), ("x", "rank 4", "rank 2")),
        (dict(x=x(dtype=jnp.int32)), ("x", "float32, bfloat16 or float16", "int32")),
        (dict(norm="rms"), ("norm", "paro_jax.Norm", "'rms'")),
        (dict(rope=(1, 2)), ("rope", "paro_jax.Rope", "(1, 2)")),
        (dict(norm=Norm("rms", jnp.ones(9))), ("norm.scale", "[8]", "[9]")),
        (dict(rope=Rope(jnp.ones((N, 8)), jnp.ones((N, 8)))), ("rope.cos", "[67, 4]", "[67, 8]")),
    ],
)
def test_arrange_refuses(says, arguments, words):
    with says(*words):
        arrange(**(dict(x=x(), plan=PLAN, role="k") | arguments))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(x=jnp.zeros((1, N, 2, 8))), ("x", "[batch, tokens = 67, channels]", "[1, 67, 2, 8]")),
        (dict(x=jnp.zeros((1, 5, 6))), ("x", "tokens = 67", "[1, 5, 6]")),
        (dict(kernel=jnp.zeros((6, 16))), ("kernel", "[channels = 6, heads = 2, head_dim]", "[6, 16]", "Reshape")),
        (dict(kernel=jnp.zeros((5, 2, 8))), ("kernel", "channels = 6", "[5, 2, 8]")),
        (dict(kernel=jnp.zeros((6, 3, 8))), ("kernel", "heads = 2", "[6, 3, 8]")),
        (dict(bias=jnp.zeros(16)), ("bias", "[2, 8]", "[16]")),
        (dict(x=jnp.zeros((1, N, 6), jnp.int32)), ("x", "float32", "int32")),
        (dict(kernel=jnp.zeros((6, 2, 8), jnp.int8)), ("kernel", "float32", "int8")),
        (dict(role=None), ("role", '"q"', "None")),
        (dict(norm=3), ("norm", "Norm", "3")),
    ],
)
def test_project_in_refuses(says, arguments, words):
    with says(*words):
        project_in(**(dict(x=jnp.zeros((1, N, 6)), kernel=jnp.zeros((6, 2, 8)), plan=PLAN, role="q") | arguments))


def test_attend_refuses_blocks_that_were_not_made_for_each_other(says):
    def blocks(plan=PLAN, head_dim=8, dtype=jnp.float32):
        return {role: arrange(x(head_dim=head_dim, dtype=dtype), plan=plan, role=role) for role in ("q", "k", "v")}

    ours = blocks()
    with says("q", "role 'k'", "expects role 'q'"):
        attend(ours["k"], ours["q"], ours["v"], plan=PLAN)
    with says("v", "TokenBlocks", "arrange", "float32 [1, 67, 2, 8]"):
        attend(ours["q"], ours["k"], x(), plan=PLAN)
    other_grid = blocks(AttentionPlan.dense(TokenGrid((3, 4, 5), text=7, text_position="last"), heads=2))
    with says("k", "grid", "'first'", "'last'"):
        attend(ours["q"], other_grid["k"], ours["v"], plan=PLAN)
    other_block = blocks(AttentionPlan.dense(GRID, heads=2, block=(128, 64)))
    with says("q", "block (128, 64)", "block (64, 64)"):
        attend(other_block["q"], ours["k"], ours["v"], plan=PLAN)
    int8 = blocks(AttentionPlan.dense(GRID, heads=2, quant=INT8))
    with says("v", "width 'int8'", "width 'bf16'", "Arrange q, k and v"):
        attend(ours["q"], ours["k"], int8["v"], plan=PLAN)
    with says("k", "shape and dtype of q", "[1, 2, 67, 8]", "[1, 2, 67, 16]"):
        attend(ours["q"], blocks(head_dim=16)["k"], ours["v"], plan=PLAN)
    with says("v", "float32", "bfloat16"):
        attend(ours["q"], ours["k"], blocks(dtype=jnp.bfloat16)["v"], plan=PLAN)
    three_heads = AttentionPlan.dense(GRID, heads=3)
    with says("q", "heads 2", "heads 3"):
        attend(*ours.values(), plan=three_heads)
    foreign = jax.tree.map(lambda leaf: leaf, ours["v"])
    object.__setattr__(foreign, "layout", "transposed")
    with says("v", "layout 'transposed'", "layout 'rows'"):
        attend(ours["q"], ours["k"], foreign, plan=PLAN)
    with says("scale", "finite", "inf"):
        attend(*ours.values(), plan=PLAN, scale=float("inf"))


def test_a_mask_for_another_length_never_reaches_attention(says):
    with says("mask.keep", "2, 2]", "(2, 3, 3)"):
        AttentionPlan.build(GRID, order="FHW", mask=BlockMask(np.ones((2, 3, 3), bool), (64, 64)))
