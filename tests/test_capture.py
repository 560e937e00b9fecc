"""Capture on all three models: what attention sees, layer by layer, in memory that does not grow with the layers."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

import calibrate
from paro_jax import AttentionPlan, TokenGrid
from paro_jax.models import layers

run_block: Any = layers.run_block  # jit's own count of programs has no type


class Case:
    """A tiny model, its inputs, and what capture made of them."""

    def __init__(self, name: str):
        self.name, self.tiny = name, TINY[name]
        self.net, self.inputs = self.tiny.net(), self.tiny.inputs()
        before = run_block._cache_size()
        self.captured = list(self.net.capture(*self.inputs))
        self.programs = run_block._cache_size() - before


@pytest.fixture(scope="module", params=TINY)
def case(request):
    return Case(request.param)


def test_capture_gives_what_attention_sees(case):
    """The model's own calls of dense attention, recorded one by one, are the oracle."""
    expected = calibrate.capture(lambda attention: case.net(*case.inputs, attention_fn=attention), step=0.5)
    assert len(case.captured) == len(expected) == case.tiny.sites
    for qkv, sample in zip(case.captured, expected, strict=True):
        assert qkv[0].shape == (2, case.tiny.config.grid.tokens, 2, case.tiny.config.head_dim)
        for got, want in zip(qkv, (sample.q, sample.k, sample.v), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_one_program_serves_all_layers_and_samples(case):
    """FLUX has two kinds of block."""
    assert case.programs == (2 if case.name == "flux" else 1)
    before, (latents, *rest) = run_block._cache_size(), case.inputs
    assert len(list(case.net.capture(latents / 2, *rest))) == case.tiny.sites
    assert run_block._cache_size() == before


def test_memory_does_not_grow_with_the_number_of_layers(case):
    """What a compiled layer needs beside its arguments; only shapes, nothing runs."""
    tiny, plan = case.tiny, AttentionPlan.dense(TokenGrid((case.tiny.config.grid.tokens,)), heads=2)

    def measure(layers):
        net = nnx.eval_shape(lambda: tiny.build(tiny.layers(layers)))
        x, context, *_ = jax.eval_shape(type(net).enter, net, *case.inputs)
        blocks = net.double if case.name == "flux" else net.blocks
        sizes = run_block.lower(blocks, 1, x, context, plan).compile().memory_analysis()
        return sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes

    few, many = measure(2), measure(8)
    assert many[0] > 3 * few[0], "the weights do grow"
    assert many[1] <= few[1] * 1.01 and many[2] == few[2] > 0


def test_one_layer_is_in_memory_at_a_time(case):
    live = [sum(a.nbytes for a in jax.live_arrays()) for _ in case.net.capture(*case.inputs)]
    qkv = sum(a.nbytes for a in case.captured[0])
    assert max(live) - live[0] < qkv and len(live) > 2


def test_calibrate_runs_on_live_samples(case):
    tiny, net, (latents, *rest) = case.tiny, case.net, case.inputs
    runs = [(step, functools.partial(net.capture, latents * step, *rest)) for step in (0.2, 0.7)]
    samples = calibrate.LiveSamples(runs, sites=tiny.sites)
    assert len(samples) == len(list(samples)) == 2 * tiny.sites
    options: dict[str, Any] = dict(density=0.8, block=(8, 8), bucket_edges=(0.0, 0.5, 1.0), progress=False)
    plan, _ = calibrate.make_plan(samples, tiny.config.grid, **options)
    kept, _ = calibrate.make_plan(list(samples), tiny.config.grid, **options)
    assert plan.lead == (2, tiny.sites) and 0.7 < plan.density <= 0.8
    for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)
    dense, sparse = net(latents, *rest), net(latents, *rest, plan=plan.at_step(0, 4))
    error = np.abs(sparse - dense).max() / np.abs(dense).max()
    assert 0 < error < 0.5


def test_a_wrong_number_of_sites_is_refused(says):
    q = np.ones((1, 4, 1, 8), np.float32)
    samples = calibrate.LiveSamples([(0.25, lambda: [(q, q, q)] * 2)], sites=3)
    with says("sites", "step 0.25 gave 2", "expected 3", "sites=2"):
        list(samples)
