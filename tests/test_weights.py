"""Weight files: round trip, and every problem named at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from paro_jax.models.weights import WeightsError, load, save


class Net(nnx.Module):
    def __init__(self, wide: int = 3, *, rngs: nnx.Rngs):
        self.a = nnx.Linear(2, wide, rngs=rngs)
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
    assert set(load_file(file)) == {"a.kernel", "a.bias", "b.scale", "b.bias"}
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
    with pytest.raises(OSError):
        save(Net(rngs=nnx.Rngs(2)), file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
