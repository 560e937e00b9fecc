"""QuantSpec: widths and groups, and nothing else."""

from dataclasses import FrozenInstanceError

import pytest

from paro_jax import QuantSpec


def test_the_default_does_not_quantise():
    spec = QuantSpec()
    assert not spec.quantised and not spec.smooths_k
    assert [spec.width(role) for role in "qkv"] == ["bf16"] * 3


def test_widths_and_groups_by_role():
    spec = QuantSpec(qk="int4", pv="fp8", q_group="block", v_group="block")
    assert spec.quantised and spec.smooths_k
    assert [spec.width(role) for role in "qkv"] == ["int4", "int4", "fp8"]
    assert [spec.group(role) for role in "qkv"] == ["block", "block", "block"]
    assert not QuantSpec(qk="int4", smooth_k=False).smooths_k
    assert QuantSpec(pv="int8").quantised and not QuantSpec(pv="int8").smooths_k


def test_it_is_a_key():
    assert {QuantSpec(qk="int8"): 1}[QuantSpec(qk="int8")] == 1
    with pytest.raises(FrozenInstanceError):
        QuantSpec().qk = "int8"  # type: ignore[misc]


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("qk", "int2", "'bf16', 'fp8', 'int8', 'int4'"),
        ("pv", 8, "'bf16', 'fp8', 'int8', 'int4'"),
        ("pv", ["int8"], "'bf16', 'fp8', 'int8', 'int4'"),
        ("smooth_k", 1, "True, False"),
        ("smooth_k", None, "True, False"),
        ("q_group", "tensor", "'row', 'block'"),
        ("k_group", "channel", "'block', 'row'"),
        ("v_group", "row", "'channel', 'block'"),
        ("p_scale", "static", "'block', 'running'"),
    ],
)
def test_a_value_outside_the_set_is_refused(says, field, value, allowed):
    with says(field, allowed, repr(value)):
        QuantSpec(**{field: value})
