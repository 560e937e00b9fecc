"""Converted checkpoints and `paro convert`: what they hold, onto which mesh, what a mistake says, and what is left."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import parity
import pytest
from flax import nnx
from test_cli import only_json, paro
from test_pretrained import COG, folder

from paro_jax import AttentionPlan, PlanError, TokenGrid, save_plan
from paro_jax.models import cogvideox
from paro_jax.models.weights import WeightsError, from_pretrained, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    weights, _, _ = parity.read("cogvideox_5b")
    return folder(tmp_path_factory.mktemp("source") / "transformer", weights, COG)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "cog"
    save_checkpoint(from_pretrained(source, dtype=jnp.float32), path)
    return path


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "cog")


def leaves(model):
    return {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_round_trip(source, converted):
    model, again = from_pretrained(source, dtype=jnp.float32), from_pretrained(converted, dtype=None)
    assert type(again) is cogvideox.CogVideoX and again.config == model.config
    assert leaves(model).keys() == leaves(again).keys()
    jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(model))
    _, inputs, output = parity.read("cogvideox_5b")
    np.testing.assert_allclose(jax.jit(again.__call__)(**inputs), output, atol=1e-5, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, leaves(from_pretrained(converted)), leaves(from_pretrained(source)))


def test_what_lies_there_is_orbax_and_needs_none(converted, monkeypatch):
    """Orbax reads the folder as any other of its own; we read the same numbers from its files, without it."""
    plain = leaves(load_checkpoint(converted))
    how = ocp.args.PyTreeRestore(restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in plain})
    found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(converted / "params", args=how)
    assert found.keys() == plain.keys()
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    # As it is where arrays were saved in shards: orbax restores.
    monkeypatch.setattr("paro_jax.models._checkpoint._dtype_of_one_chunk", lambda *_: None)
    jax.tree.map(np.testing.assert_array_equal, leaves(load_checkpoint(converted)), plain)


def test_another_resolution_and_another_model(converted):
    taller = dataclasses.replace(load_checkpoint(converted).config, height=16)
    assert from_pretrained(converted, model=taller).config.height == 16
    with pytest.raises(WeightsError, match="expected weights for FluxConfig, found CogVideoXConfig"):
        from_pretrained(converted, model="flux-dev")
    with pytest.raises(WeightsError, match=r"blocks.norm1.linear.bias: expected shape \(3, 384\), found \(2, 384\)"):
        load_checkpoint(converted, config=dataclasses.replace(taller, num_layers=3))
    with pytest.raises(WeightsError, match=r"text.weight: expected shape \(64, 25\), found \(64, 24\)"):
        load_checkpoint(converted, config=dataclasses.replace(taller, text_embed_dim=25))


def test_what_the_command_says(capsys, source, tmp_path):
    status, out, err = paro(capsys, "convert", source, tmp_path / "out", "--json")
    assert status == 0
    found = only_json(out)
    assert found["model"] == "CogVideoX" and found["dtypes"] == ["bfloat16"] and found["config"]["num_layers"] == 2
    assert found["bytes"] == 2 * found["parameters"] > 100_000
    jax.tree.map(
        np.testing.assert_array_equal, leaves(from_pretrained(tmp_path / "out")), leaves(from_pretrained(source))
    )
    # Once more: taken, unless told to replace it.
    status, out, err = paro(capsys, "convert", source, tmp_path / "out")
    assert status == 2 and not out and "is there already" in err and "--force" in err and err.count("\n") == 1
    status, out, err = paro(capsys, "convert", source, tmp_path / "out", "--force", "--dtype", "f32")
    assert status == 0 and "from_pretrained(" in out
    assert leaves(from_pretrained(tmp_path / "out", dtype=None))["patch.weight"].dtype == np.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_bars_for_reading_and_writing(capsys, caplog, source, tmp_path, monkeypatch):
    """Orbax tells nothing while it writes, so its bar counts the bytes that have come to lie on the disk."""
    assert paro(capsys, "convert", source, tmp_path / "a")[2].count("\r") == 0  # nobody looks
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = paro(capsys, "convert", source, tmp_path / "b")[2]
    assert "load: 100%" in err and "write: 100%" in err
    load_checkpoint(tmp_path / "b", progress=True)
    assert "load: 100%" in capsys.readouterr().err
    load_checkpoint(tmp_path / "b")
    assert not capsys.readouterr().err
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text


MISTAKES = {
    "no source": (["convert", "{tmp}/none", "{tmp}/out"], "{tmp}/none"),
    "no such model": (["convert", "{source}", "{tmp}/out", "--model", "sdxl"], "found 'sdxl'"),
    "another model": (["convert", "{source}", "{tmp}/out", "--model", "wan2.1-14b"], "expected WanTransformer3DModel"),
    "no such dtype": (["convert", "{source}", "{tmp}/out", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "no destination": (["convert", "{source}"], "the following arguments are required: DST"),
    "a file in the way": (["convert", "{source}", "{tmp}/file", "--force"], "file holds something else"),
    "a full folder in the way": (["convert", "{source}", "{tmp}/full", "--force"], "full holds something else"),
    "under a file": (["convert", "{source}", "{tmp}/file/out"], "cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, source, tmp_path, mistake):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    argv, says = MISTAKES[mistake]
    names = {"source": source, "tmp": tmp_path}
    status, out, err = paro(capsys, *(a.format(**names) for a in argv))
    assert status == 2 and not out and says.format(**names) in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine"]


def test_a_save_that_fails_leaves_what_was_there(converted, copy, monkeypatch):
    model, before = load_checkpoint(converted), sorted(copy.rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paro_jax.models._checkpoint._put", full)
    with pytest.raises(WeightsError, match="could not be written.*No space left"):
        save_checkpoint(model, copy, force=True)
    with pytest.raises(WeightsError, match="could not be written.*No space left"):
        save_checkpoint(model, copy.parent / "new")
    assert sorted(copy.rglob("*")) == before and list(copy.parent.iterdir()) == [copy]


def test_a_disk_that_is_full(capsys, source, converted, copy, monkeypatch):
    """What tensorstore says then is a ValueError, and of many lines."""
    import orbax.checkpoint as ocp

    model, before = load_checkpoint(converted), sorted(copy.rglob("*"))

    def full(self, directory, *_, **__):
        directory.mkdir()
        (directory / "half").write_text("half")
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing:\nNo space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(WeightsError, match="could not be written.*No space left"):
        save_checkpoint(model, copy, force=True)
    with pytest.raises(PlanError, match="could not be written.*No space left"):
        save_plan(AttentionPlan.dense(TokenGrid((4,)), heads=1), copy.parent / "plan")
    assert sorted(copy.rglob("*")) == before and list(copy.parent.iterdir()) == [copy]
    status, out, err = paro(capsys, "convert", source, copy.parent / "new")
    assert status == 2 and not out and "could not be written" in err.splitlines()[-1]
    assert list(copy.parent.iterdir()) == [copy]


@pytest.mark.parametrize("when", ["_sizes", "_put", "os.rename"])
def test_ctrl_c_leaves_what_was_there(capsys, source, copy, monkeypatch, when):
    """While it writes, and between the two renames that put the new folder in the place of the old."""
    before, rename = sorted(copy.rglob("*")), os.rename

    def stop(*names):
        if when == "os.rename" and (str(names[1]) != str(copy) or not str(names[0]).endswith(".tmp")):
            return rename(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"paro_jax.models._checkpoint.{when}", stop)
    assert paro(capsys, "convert", source, copy, "--force")[0] == 130
    assert sorted(copy.rglob("*")) == before and list(copy.parent.iterdir()) == [copy]


@pytest.mark.parametrize("force", [False, True])
def test_what_came_there_meanwhile_stays(converted, tmp_path, monkeypatch, force):
    """Another conversion, or anything else: it was not there when this one began."""
    from paro_jax.models import _checkpoint

    def slow(path, real=_checkpoint._sizes):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "mine").write_text("mine")
        return real(path)

    model = load_checkpoint(converted)
    monkeypatch.setattr("paro_jax.models._checkpoint._sizes", slow)
    with pytest.raises(WeightsError, match="holds something else" if force else "is there already"):
        save_checkpoint(model, tmp_path / "new", force=force)
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "mine"]


def test_what_a_kill_leaves_is_no_checkpoint(copy):
    (copy / "config.json").unlink()  # it is written last
    for model in (None, "wan2.1-1.3b"):
        with pytest.raises(WeightsError, match="config.json cannot be read"):
            from_pretrained(copy, model=model)


def damage(path, change):
    header = json.loads((path / "config.json").read_text())
    change(header)
    (path / "config.json").write_text(json.dumps(header))


def cut(path):
    big = max((p for p in (path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    big.write_bytes(big.read_bytes()[:1000])


DAMAGE = {
    "of an older version": (lambda p: damage(p, lambda h: h.update(schema=1)), "found 1; convert it again"),
    "of a newer version": (lambda p: damage(p, lambda h: h.update(schema=3)), "expected schema 2, found 3; update"),
    "of another kind": (lambda p: damage(p, lambda h: h.update(kind="x")), "expected kind 'paro_jax.models'"),
    "unknown model": (lambda p: damage(p, lambda h: h.update(model="Sora")), "not a configuration of ours"),
    "unknown setting": (lambda p: damage(p, lambda h: h["config"].update(x=1)), "not a configuration of ours"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "arrays cut short": (cut, "bytes, found 1000; copy it again"),
    "arrays lost": (lambda p: (shutil.rmtree(p / "params"), (p / "params").mkdir()), "found no file; copy it again"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named(copy, what):
    spoil, says = DAMAGE[what]
    spoil(copy)
    with pytest.raises(WeightsError) as caught:
        from_pretrained(copy)
    assert says in str(caught.value) and str(copy) in str(caught.value)


def test_only_published_models_are_saved(tmp_path):
    with pytest.raises(WeightsError, match="expected one of Flux, CogVideoX, Wan, found Linear"):
        save_checkpoint(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "x")


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from paro_jax.models.weights import from_pretrained, save_checkpoint
sys.path.insert(0, sys.argv[3])
import parity

source, out = sys.argv[1:3]
flat = lambda model: {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
whole = flat(from_pretrained(source, dtype=jnp.float32))
assert jax.device_count() == 8

def check(model, ways):
    for name, x in flat(model).items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
        assert len(x.sharding.device_set) == 8, name
        part = x.addressable_shards[0].data
        if name in ("blocks.to_q.weight", "blocks.mlp_in.weight", "patch.weight"):
            assert part.shape == (*x.shape[:-2], x.shape[-2] // ways, x.shape[-1]), (name, part.shape)
        elif name in ("blocks.to_out.weight", "blocks.mlp_out.weight"):
            assert part.shape == (*x.shape[:-1], x.shape[-1] // ways), (name, part.shape)
        elif not name.endswith("weight"):
            assert part.shape == x.shape, name

tensor = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
model = from_pretrained(source, dtype=jnp.float32, mesh=tensor)
check(model, 4)
_, inputs, output = parity.read("cogvideox_5b")
np.testing.assert_allclose(jax.jit(model.__call__)(**inputs), output, atol=1e-5, rtol=0)
save_checkpoint(model, out)
save_checkpoint(from_pretrained(source, dtype=jnp.float32), out + "_in_one_piece")

other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
with jax.set_mesh(other):  # found without being handed over, from the original and from what another mesh has saved
    check(from_pretrained(source, dtype=jnp.float32), 8)
    check(from_pretrained(out, dtype=jnp.float32), 8)
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(kind,) * 2)
    check(from_pretrained(source, dtype=jnp.float32, mesh=mesh), 4)
    check(from_pretrained(out, dtype=jnp.float32, mesh=mesh), 4)
    check(from_pretrained(out + "_in_one_piece", dtype=jnp.float32, mesh=mesh), 4)
alone = from_pretrained(out, dtype=jnp.float32)
assert all(len(x.sharding.device_set) == 1 for x in flat(alone).values())
print("equal")
"""


@pytest.mark.slow
def test_onto_meshes_of_every_shape(source, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MESHES, str(source), str(tmp_path / "out"), os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-3000:]
