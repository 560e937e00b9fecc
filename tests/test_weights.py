"""Weight files: round trip, every problem named at once, tables that map whole, and memory that a model needs once."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from paro_jax.models._mapping import sources
from paro_jax.models.layers import Linear
from paro_jax.models.weights import Rows, WeightsError, load, save


class Net(nnx.Module):
    def __init__(self, wide: int = 3, *, rngs: nnx.Rngs):
        self.a = Linear(2, wide, rngs=rngs)
        self.b = nnx.LayerNorm(wide, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.safetensors"
    save(Net(rngs=nnx.Rngs(1)), path, dtype=jnp.float32)
    return path


def build():
    return Net(rngs=nnx.Rngs(0))


def test_round_trip(file):
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(load(build, file)(x), Net(rngs=nnx.Rngs(1))(x))
    assert set(load_file(file)) == {"a.weight", "a.bias", "b.scale", "b.bias"}
    assert jax.tree.leaves(nnx.state(load(build, file, dtype=jnp.bfloat16)))[0].dtype == jnp.bfloat16


def test_all_problems_are_collected(file):
    tensors = load_file(file)
    del tensors["a.bias"]
    tensors["c"] = np.zeros(1, np.float32)
    tensors["b.scale"] = np.zeros(4, np.float32)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as e:
        load(build, file)
    text = str(e.value)
    assert "3 problems" in text and "missing a.bias" in text and "unexpected c" in text
    assert "b.scale: expected shape (3,), found (4,)" in text and file.name in text


def test_half_a_file_and_no_file(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=r"net.safetensors is not a complete safetensors file"):
        load(build, file)
    with pytest.raises(WeightsError, match=r"none.safetensors: no such file"):
        load(build, tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paro_jax.models.weights.save_file", full)
    with pytest.raises(WeightsError, match="net.safetensors could not be written.*No space left"):
        save(Net(rngs=nnx.Rngs(2)), file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


# --- tables of names ------------------------------------------------------------------------------------------------

FOUND = {"one.weight": (3, 2), "one.bias": (3,), "two.weight": (3,), "two.bias": (3,)}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"a": "one", "b": "one"}, "one.weight is mapped twice, to a.weight and b.scale"),
        ({"a": Rows("one", ((0, 1), (1, 2), (1, 2))), "b": "two"}, "one.bias is mapped twice, to a.bias and a.bias"),
        ({"a": Rows("one", ((2, 5),)), "b": "two"}, "one.weight: rows 0 to 2 are mapped to nothing"),
        ({"a": "one"}, "nothing in the file is mapped to b.bias, b.scale"),
    ],
)
def test_a_table_that_is_not_one_to_one_is_refused(names, says):
    with pytest.raises(WeightsError) as caught:
        sources(build, names, FOUND, "here")
    assert says in str(caught.value), str(caught.value)


def test_a_kernel_of_flax_is_not_taken_for_a_weight(tmp_path):
    """It is the transpose, and a square one would fit."""

    def square():
        return nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    save(square(), tmp_path / "net.safetensors", dtype=jnp.float32)
    np.testing.assert_array_equal(load(square, tmp_path / "net.safetensors").kernel, square().kernel)  # its own name
    with pytest.raises(WeightsError, match=r"found kernels \[in, out\], kernel\. .*layers\.Linear"):
        load(square, tmp_path / "net.safetensors", names={"": "one"})


# --- memory and devices, each in a process of its own ---------------------------------------------------------------

MEMORY = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from paro_jax.models import cogvideox, weights

config = cogvideox.CogVideoXConfig(num_layers=8, num_heads=8, text_embed_dim=64)
build = lambda: cogvideox.CogVideoX(config, rngs=nnx.Rngs(0))
path, action = sys.argv[1:]

def status(name):
    # Bytes of memory that this process has (VmRSS), or has had at most (VmHWM; ru_maxrss would count its parent's).
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

if action == "write":
    from safetensors.numpy import save_file
    from paro_jax.models._mapping import every_source
    tensors = {}
    for source in every_source(nnx.state(nnx.eval_shape(build), nnx.Param), cogvideox.diffusers_names(config)):
        for key in source.keys:
            tensors[key] = np.ones(source.piece, np.float32)
    save_file(tensors, path)
    weights.save_checkpoint(weights.from_pretrained(path, model=config, dtype=jnp.float32), path + ".converted")
else:
    weights.load(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)), path.replace("big", "small"))  # what loading imports
    before = status("VmRSS")
    path, of = (path, config) if action == "load" else (path + ".converted", None)
    model = weights.from_pretrained(path, model=of, dtype=jnp.float32)
    print((status("VmHWM") - before) / sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_model_is_in_memory_once(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # What an allocator keeps for later is not what loading needs.
    environment = {key: value for key, value in environment.items() if not key.startswith("MALLOC_")}
    save(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "small.safetensors")

    def run(action):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "big.safetensors"), action]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("write")
    for action in ("load", "converted"):
        peak = float(run(action))
        # Below 1 it would not be the whole model; at 2 there would be two.
        assert 0.9 < peak <= 1.2, (action, peak)
