"""docs/linear_layers.md: qwix for the linear layers of our models, PARO for their attention."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paro_jax import AttentionPlan, metrics
from paro_jax.models.cogvideox import CogVideoX, CogVideoXConfig

pytest.importorskip("qwix", reason='needs qwix: pip install "paro_jax[quant]"')
# qwix 0.1.8 calls what flax 0.12 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = CogVideoXConfig(
    num_layers=2,
    num_heads=2,
    head_dim=32,
    in_channels=3,
    out_channels=3,
    time_embed_dim=16,
    text_embed_dim=24,
    text_length=5,
    frames=3,
    height=8,
    width=12,
)


@pytest.fixture(scope="module")
def made():
    """What the example of the document made: its names, with a tiny model and plan for `net` and `plan`."""
    page = Path(__file__).parents[1] / "docs" / "linear_layers.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    net = CogVideoX(CONFIG, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.02, 0.1, x.shape) + (x == 1), jnp.float32), params)
    names = {
        "net": nnx.merge(graph, params),
        "latents": jnp.asarray(rng.standard_normal((1, 3, 3, 8, 12)), jnp.float32),
        "timestep": jnp.asarray([500.0]),
        "text": jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.float32),
        "plan": AttentionPlan.dense(CONFIG.grid, heads=2, sites=2, order="HWF", block=(16, 16)),
    }
    exec(compile(code, str(page), "exec"), names)
    return names


def call(made, net, plan=None):
    return net(made["latents"], made["timestep"], made["text"], plan=plan)


def test_both_are_at_work_and_close_to_the_original(made):
    exact = call(made, made["net"])
    linear, attention, both = (
        float(metrics.relative_l1(exact, x))
        for x in (call(made, made["quantised"]), call(made, made["net"], made["plan"]), made["video"])
    )
    assert 1e-4 < attention < 0.02 and 1e-4 < linear < 0.03  # each rounds, to eight bits
    assert max(attention, linear) / 2 < both < 1.5 * (attention + linear)


def test_the_layers_named_multiply_integers_and_no_others(made):
    def integer_products(net):
        text = str(jax.make_jaxpr(lambda: call(made, net))())
        return len(re.findall(r":i32\[[^\]]*\] = dot_general", text))

    assert integer_products(made["net"]) == 0
    # to_out, mlp_in and mlp_out, once in the scanned block.
    assert integer_products(made["quantised"]) == 3


def test_the_original_is_as_it_was(made):
    """qwix patches jax while a quantised model runs; nothing of it may stay behind."""
    before = call(made, made["net"])
    call(made, made["quantised"])
    np.testing.assert_array_equal(call(made, made["net"]), before)
