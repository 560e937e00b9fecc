"""Plan files: what is written is what is read, and nothing else is ever accepted or lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paro_jax import (
    AttentionPlan,
    BlockMask,
    PlanError,
    QuantSpec,
    TokenGrid,
    _plan_file,
    load_plan,
    plan_info,
    recipes,
    save_plan,
)

GRID = TokenGrid((3, 5, 7), text=16, bricks=((2, 2, 2),))
NAMES = ["plan.safetensors", "plan"]  # one file, and a directory written by orbax


def make_plan(seed=0, lead=(2,), k_mean=True, wide=None, first=True, **settings) -> AttentionPlan:
    rng = np.random.default_rng(seed)
    keep = rng.random((*lead, 3, *GRID.blocks((64, 32)))) < 0.5
    order = rng.choice(GRID.orders, (*lead, 3)).tolist()
    mean = rng.normal(size=(*lead, 3, 4)) if k_mean else None
    heaviest = rng.integers(0, keep.shape[-1], (*keep.shape[:-1], 1)) if first else None
    mask = BlockMask(keep, (64, 32))
    plan = AttentionPlan.build(GRID, order=order, mask=mask, k_mean=mean, first=heaviest, **settings)
    return plan if wide is None else plan.with_wide(*wide)


def same(a: AttentionPlan, b: AttentionPlan) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves
    )


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(lead=(), k_mean=False, first=False),
        dict(quant=recipes.SAGE_2, wide=(QuantSpec("int8", "int8"), np.array([True, False]))),
        dict(lead=(3, 2), bucket_edges=(0.0, 0.1, 0.3, 1.0), quant=QuantSpec("int8", "int4", smooth_k=False)),
    ],
    ids=["sites", "one site", "mixed widths", "buckets"],
)
def test_what_is_written_is_what_is_read(tmp_path, name, settings):
    plan = make_plan(**settings)
    save_plan(plan, tmp_path / name, model="demo")
    loaded = load_plan(tmp_path / name, model="demo", grid=GRID)
    assert same(loaded, plan)
    assert loaded.order_list() == plan.order_list() and loaded.density == plan.density
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert left_in(tmp_path) == {name}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_schema_1_loads(tmp_path, name):
    """As they were written before recipes: fewer fields of quant, no wide_quant."""
    plan = make_plan(quant=QuantSpec("int8", "int4"), first=False)
    header, arrays = header_and_arrays(plan)
    for field in ("smooth_q", "smooth_v", "qk_rotate"):
        del header["quant"][field]
    del header["wide_quant"]
    header["schema"] = 1
    save = _plan_file._save_file if name.endswith("safetensors") else _plan_file._save_directory
    save(header, arrays, tmp_path / name)
    assert same(load_plan(tmp_path / name), plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_schema_2_loads(tmp_path, name):
    """As they were written when no block was first."""
    plan = make_plan(first=False, wide=(QuantSpec("int8", "int8"), np.array([True, False])))
    header, arrays = header_and_arrays(plan)
    save = _plan_file._save_file if name.endswith("safetensors") else _plan_file._save_directory
    save(header | {"schema": 2}, arrays, tmp_path / name)
    assert same(load_plan(tmp_path / name), plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_plan_replaces_the_old(tmp_path, name):
    save_plan(make_plan(0), tmp_path / name)
    save_plan(make_plan(1), str(tmp_path / name))  # a string will do
    assert same(load_plan(tmp_path / name), make_plan(1)) and left_in(tmp_path) == {name}


def test_equal_plans_make_equal_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_plan(make_plan(), tmp_path / name, model="m", provenance={"z": 1, "a": 2})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_info_is_the_header_in_plain_values(tmp_path, name):
    provenance = {"samples": np.int64(8), "density": 0.5, "path": Path("x"), "edges": np.arange(2), "sha256": "0" * 64}
    plan = make_plan()
    save_plan(plan, tmp_path / name, model="demo", provenance=provenance)
    info = plan_info(tmp_path / name)
    json.dumps(info)
    assert info["model"] == "demo" and info["schema"] == 3 and info["order_names"] == list(GRID.orders)
    plain = {"samples": 8, "density": 0.5, "path": "x", "edges": [0, 1], "sha256": "0" * 64}
    assert info["provenance"] == plain
    assert info["grid"] == {
        "shape": [3, 5, 7],
        "text": 16,
        "text_position": "first",
        "bricks": [[2, 2, 2]],
        "gilbert": False,
    }
    assert info["arrays"]["order"] == {"dtype": "int8", "shape": [2, 3]}
    assert (info["lead"], info["heads"], info["density"], info["nbytes"]) == ([2], 3, plan.density, plan.nbytes)
    assert set(info["versions"]) == {"paro_jax", "jax"}


def test_the_arrays_open_with_the_tools_of_each_format(tmp_path):
    from safetensors.numpy import load_file

    plan = make_plan()
    save_plan(plan, tmp_path / "p.safetensors")
    arrays = load_file(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(arrays["keep_bits"], plan.keep_bits)

    import orbax.checkpoint as ocp

    save_plan(plan, tmp_path / "p")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(tmp_path / "p" / "arrays")
    assert shapes is not None


def test_orders_are_stored_by_name(tmp_path):
    """A file whose names stand in another sequence than ours loads as the same orders."""
    plan = make_plan(k_mean=False)
    header, arrays = header_and_arrays(plan)
    shuffled = list(reversed(header["order_names"]))
    arrays["order"] = np.int8(len(shuffled) - 1) - arrays["order"]
    _plan_file._save_file(header | {"order_names": shuffled}, arrays, tmp_path / "p.safetensors")
    loaded = load_plan(tmp_path / "p.safetensors")
    assert loaded.order_list() == plan.order_list() and same(loaded, plan)


# --- another model, another grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_for_another_model_or_grid_is_refused(tmp_path, says, name):
    path = tmp_path / name
    save_plan(make_plan(), path, model="cogvideox-5b")
    with says("model", "'wan-14b'", "'cogvideox-5b'", "Calibrate", error=PlanError):
        load_plan(path, model="wan-14b")
    for grid in (TokenGrid((3, 5, 8), text=16), TokenGrid((3, 5, 7), text=17), TokenGrid((3, 5, 7), 16, "last")):
        with says("grid", grid.shape, grid.text, "(3, 5, 7)", "Calibrate", error=PlanError):
            load_plan(path, grid=grid)
    load_plan(path, grid=TokenGrid((3, 5, 7), text=16))  # which orders were candidates is the file's business
    save_plan(make_plan(), path)
    with says("model", "'wan-14b'", "no model name", error=PlanError):
        load_plan(path, model="wan-14b")


# --- damaged files --------------------------------------------------------------------------------------------------


def test_one_altered_byte_anywhere_is_noticed(tmp_path):
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(lead=()), path, model="m")
    data = path.read_bytes()
    accepted = []
    for i in range(len(data)):
        for altered in {data[i] ^ 1, data[i] ^ 0x20, 0} - {data[i]}:
            path.write_bytes(data[:i] + bytes([altered]) + data[i + 1 :])
            try:
                load_plan(path)
                accepted.append(i)
            except PlanError as error:
                assert str(path) in str(error)
    assert accepted == [] and len(data) > 1000


def test_a_truncated_or_extended_file_is_noticed(tmp_path, says):
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(lead=()), path, model="m")
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), 8, 9, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(PlanError):
            load_plan(path)
    path.write_bytes(data[:-5])
    with says("expected SHA-256", "found", f"{len(data) - 5} bytes", "truncated", "Copy it again", error=PlanError):
        load_plan(path)
    path.write_bytes(data + b"\0")
    with says("truncated or altered", error=PlanError):
        plan_info(path)


def test_one_altered_byte_in_any_file_of_a_directory_is_noticed(tmp_path):
    path = tmp_path / "plan"
    save_plan(make_plan(lead=()), path, model="m")
    accepted, files = [], [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        data = file.read_bytes()
        for i in range(len(data)):
            file.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
            try:
                load_plan(path)
                accepted.append((file, i))
            except PlanError as error:
                assert str(path) in str(error)
        file.write_bytes(data[:-1])
        with pytest.raises(PlanError):
            load_plan(path)
        file.unlink()
        with pytest.raises(PlanError):
            load_plan(path)
        file.write_bytes(data)
    assert accepted == [] and len(files) > 3
    load_plan(path)


def test_other_files_are_not_plans(tmp_path, says):
    from safetensors.numpy import save_file

    with says("path", "No such file", "nowhere.safetensors", error=PlanError):
        load_plan(tmp_path / "nowhere.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "weights.safetensors")
    with says("weights.safetensors", "save_plan", "another kind of file", error=PlanError):
        load_plan(tmp_path / "weights.safetensors")
    with says("plan.json", "none", error=PlanError):
        load_plan(tmp_path)
    (tmp_path / "p.safetensors").write_bytes(b"")
    with says("p.safetensors", "0 bytes", error=PlanError):
        load_plan(tmp_path / "p.safetensors")


# --- files that are whole but wrong: the writer's mistakes, or a newer writer ---------------------------------------


def header_and_arrays(plan):
    arrays = {name: np.asarray(getattr(plan, name)) for name in _plan_file._DTYPES if getattr(plan, name) is not None}
    return json.loads(json.dumps(_plan_file._header(plan, arrays, "m", {}))), arrays


def set_grid(**change):
    return lambda header, arrays: header["grid"].update(change)


def set_header(**change):
    return lambda header, arrays: header.update(change)


def set_array(name, change):
    def apply(header, arrays):
        arrays[name] = change(arrays.get(name))
        header["arrays"] = {k: {"dtype": str(x.dtype), "shape": list(x.shape)} for k, x in arrays.items()}

    return apply


@pytest.mark.parametrize(
    "change, words",
    [
        (set_header(schema=4), ("schema", "expected 3", "found 4", "Upgrade")),
        (set_header(schema=True), ("schema", "True")),
        (set_header(wide_quant={"qk": "int8"}), ("wide", "[2]", "no array")),
        (set_array("wide", lambda _: np.ones(2, bool)), ("wide", "with a wide_quant")),
        (set_header(wide_quant={"qk": "int2"}), ("header", "'int2'")),
        (set_header(schema="1"), ("schema", "'1'")),
        (set_header(kind="something"), ("kind", "AttentionPlan")),
        (set_header(order_names=["FHW", "gilbert"]), ("order_names", "FHW, FWH", "'gilbert'", "Upgrade")),
        (set_header(quant={"qk": "int2"}), ("header", "qk", "'int2'")),
        (set_header(quant={"colour": "red"}), ("header", "colour")),
        (set_header(block=[64, 0]), ("header", "block", "[64, 0]")),
        (set_header(model=None), ("header", "model", "None")),
        (set_header(bucket_edges=[0.0, 0.5]), ("bucket_edges", "0.0 to 1.0")),
        (set_header(bucket_edges=[0.0, 0.2, 0.5, 1.0]), ("bucket_edges", "(3, sites)", "(2,)")),
        (set_header(arrays={}), ("arrays", "expected", "found", "keep_bits")),
        (set_grid(shape=[3, 5]), ("header", "bricks")),
        (set_grid(shape=[3, 5, 70]), ("keep_bits", "1066 tokens", "found [2, 3, 2, 1]")),
        (set_grid(text=-1), ("header", "text", "-1")),
        (set_array("order", lambda x: x + 50), ("order", "0 to 6", "50")),
        (set_array("order", lambda x: -x - 1), ("order", "0 to 6", "-")),
        (set_array("order", lambda x: x.astype(np.int32)), ("order", "int8", "int32")),
        (set_array("order", lambda x: x[0]), ("keep_bits", "[3, 2, 1]", "[2, 3, 2, 1]")),
        (set_array("order", lambda x: x[None, None]), ("order", "at most two leading axes", "[1, 1, 2, 3]")),
        (set_array("keep_bits", lambda x: x[..., :1, :]), ("keep_bits", "[2, 3, 2, 1]", "[2, 3, 1, 1]")),
        (set_array("keep_bits", lambda x: x | 0x80), ("keep_bits", "zeros behind the 4 blocks", "ones")),
        (set_array("keep_bits", lambda x: x.astype(bool)), ("keep_bits", "uint8", "bool")),
        (set_array("k_mean", lambda x: x[0]), ("k_mean", "[2, 3, 'head_dim']", "[3, 4]")),
        (set_array("k_mean", lambda x: x * np.float32("nan")), ("k_mean", "finite", "NaN")),
        (set_array("k_mean", lambda x: x.astype(np.float16)), ("k_mean", "float32", "float16")),
        (set_array("first", lambda x: x[0]), ("first", "[2, 3, 2, 'm']", "[3, 2, 1]")),
        (set_array("first", lambda x: x + np.uint16(4)), ("first", "key blocks, 0 to 3", "up to ")),
        (set_array("first", lambda x: x.astype(np.int32)), ("first", "uint16", "int32")),
        (set_array("extra", lambda x: np.zeros(2)), ("arrays", "only order", "extra")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_that_is_wrong_is_refused(tmp_path, says, name, change, words):
    path = tmp_path / name
    header, arrays = header_and_arrays(make_plan())
    change(header, arrays)
    (_plan_file._save_file if path.suffix else _plan_file._save_directory)(header, arrays, path)
    with says(*words, error=PlanError):
        load_plan(path)


def test_a_missing_or_empty_array_is_refused(tmp_path, says):
    header, arrays = header_and_arrays(make_plan())
    set_array("order", lambda x: x[:0])(header, arrays)
    _plan_file._save_file(header, arrays, tmp_path / "p.safetensors")
    with says("order", "[*lead, heads]", "[0, 3]", error=PlanError):
        load_plan(tmp_path / "p.safetensors")
    header, arrays = header_and_arrays(make_plan())
    del arrays["keep_bits"], header["arrays"]["keep_bits"]
    _plan_file._save_file(header, arrays, tmp_path / "p.safetensors")
    with says("keep_bits", "uint8", "none", error=PlanError):
        load_plan(tmp_path / "p.safetensors")


# --- saving fails, nothing is lost ----------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_when_the_disk_is_full_the_old_plan_survives(tmp_path, monkeypatch, says, name, call):
    path, old = tmp_path / name, make_plan(0)
    save_plan(old, path)
    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(_plan_file, "open", lambda *args: FullDisk(*args), raising=False)
        else:
            patch.setattr(_plan_file.os, call, no_space)
        with says("path", str(path), "No space left on device", "as it was", "Free some space", error=PlanError):
            save_plan(make_plan(1), path)
    assert left_in(tmp_path) == {name}
    assert same(load_plan(path), old)


class FullDisk:
    """A file that opens and then has no room, half way through."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        no_space()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_when_orbax_fails_the_old_plan_survives(tmp_path, monkeypatch, says):
    import orbax.checkpoint as ocp

    path, old = tmp_path / "plan", make_plan(0)
    save_plan(old, path)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", no_space)
        with says("No space left on device", error=PlanError):
            save_plan(make_plan(1), path)
    assert left_in(tmp_path) == {"plan"} and same(load_plan(path), old)


def test_a_real_limit_on_the_size_of_a_file(tmp_path):
    """No monkeypatching: the kernel refuses the bytes past the limit, in a process of its own."""
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(0), path)
    code = (
        "import resource, sys, numpy as np, paro_jax as pj\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "plan = pj.AttentionPlan.dense(pj.TokenGrid((20, 20, 20)), heads=8)\n"
        "try:\n    pj.save_plan(plan, sys.argv[1])\n"
        "except pj.PlanError as error:\n    assert 'could not be written' in str(error), error\n"
        "else:\n    raise SystemExit('saved')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
    assert left_in(tmp_path) == {path.name} and same(load_plan(path), make_plan(0))


def test_interrupted_by_the_user_it_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(0), path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_plan_file.os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_plan(make_plan(1), path)
    assert left_in(tmp_path) == {path.name} and same(load_plan(path), make_plan(0))


def test_what_is_not_a_plan_is_never_replaced(tmp_path, says):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with says("notes", "a folder that holds something else", error=PlanError):
        save_plan(make_plan(), tmp_path / "notes")
    (tmp_path / "file").write_text("x")
    with says("file", "found a file", ".safetensors", error=PlanError):
        save_plan(make_plan(), tmp_path / "file")
    (tmp_path / "folder.safetensors").mkdir()
    with says("folder.safetensors", "found a folder", error=PlanError):
        save_plan(make_plan(), tmp_path / "folder.safetensors")
    assert left_in(tmp_path) == {"notes", "file", "folder.safetensors"}
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_bad_arguments_are_refused(tmp_path, says):
    path = tmp_path / "p.safetensors"
    with says("plan", "AttentionPlan", "dict"):
        save_plan({}, path)  # type: ignore[arg-type]
    with says("model", "string", "7"):
        save_plan(make_plan(), path, model=7)  # type: ignore[arg-type]
    with says("provenance", "JSON", "object"):
        save_plan(make_plan(), path, provenance={"x": object()})
    with says("provenance", "JSON"):
        save_plan(make_plan(), path, provenance={"x": float("nan")})
    with says("provenance", "dict", "list"):
        save_plan(make_plan(), path, provenance=["x"])  # type: ignore[arg-type]
    with says("path", "no", "missing", "Create it", error=PlanError):
        save_plan(make_plan(), tmp_path / "missing" / "p.safetensors")
    with says("plan", "traced", "outside"):
        jax.jit(lambda p: save_plan(p, path) or jnp.zeros(()))(make_plan())
    assert left_in(tmp_path) == set()
