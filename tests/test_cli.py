"""The `paro` command: what it prints, where, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paro_jax
from paro_jax import __main__ as command
from paro_jax import _files
from paro_jax._cli import _demo, _show

GRID = paro_jax.TokenGrid((3, 4, 5), text=4)


def paro(capsys, *argv):
    """Run in this process. Returns (status, stdout, stderr)."""
    try:
        status = command.main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def only_json(out):
    """stdout is one JSON value and nothing else, with no NaN or Infinity in it."""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    """A plan of 2 buckets, 3 sites, 2 heads with a different mask and order everywhere."""
    rng = np.random.default_rng(0)
    nq, nk = GRID.blocks((16, 16))
    keep = rng.random((2, 3, 2, nq, nk)) < 0.5
    keep[..., 0] = True
    order = rng.choice(np.array(GRID.orders), (2, 3, 2)).tolist()
    mask = paro_jax.BlockMask(keep, (16, 16))
    first = rng.integers(0, nk, (2, 3, 2, nq, 1))
    plan = paro_jax.AttentionPlan.build(GRID, order=order, mask=mask, bucket_edges=(0.0, 0.5, 1.0), first=first)
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    paro_jax.save_plan(plan, path, model="a test model", provenance={"prompts": 2})
    return path, plan, keep, np.array(order)


def captures(path, *, sites=2, steps=(0.0, 0.5), tokens=GRID.tokens, rename=None, dtype=np.float32):
    """A capture file of random q, k and v, [2, tokens, 2, 8]."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    tensors = {
        f"site{s}/step{t}/{role}": rng.standard_normal((2, tokens, 2, 8)).astype(dtype)
        for s in range(sites)
        for t in steps
        for role in "qkv"
    }
    save_file(rename(tensors) if rename else tensors, str(path))
    return path


# Nothing, help, version.


def test_without_arguments_it_helps(capsys):
    status, out, err = paro(capsys)
    assert status == 0 and not err
    for name in ("demo", "calibrate", "inspect", "bench", "compile-report", "doctor"):
        assert f"\n    {name}" in out


def test_version(capsys):
    assert paro(capsys, "--version")[:2] == (0, f"paro {paro_jax.__version__}\n")


def test_python_m_and_the_script_are_the_same_command():
    from importlib.metadata import entry_points

    (script,) = (e for e in entry_points(group="console_scripts", name="paro"))
    assert script.load() is command.main
    done = subprocess.run([sys.executable, "-m", "paro_jax", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"paro {paro_jax.__version__}\n"


# A user's mistake: status 2, nothing on stdout, one line on stderr that says what and which.

ON_DEMO = ["calibrate", "--model", "demo", "--density", "0.5", "-o", "{tmp}/p"]
ON_FILE = ["calibrate", "--samples", "{tmp}/good.safetensors", "--grid", "3x4x5", "--text", "4"]
MISTAKES = {
    "no such command": (["frobnicate"], "frobnicate"),
    "prompts not positive": (["demo", "--prompts", "0"], "--prompts: invalid positive integer value: '0'"),
    "no plan": (["inspect", "{tmp}/none.safetensors"], "none.safetensors"),
    "not a plan": (["inspect", "{tmp}/junk.safetensors"], "junk.safetensors"),
    "no such site": (["inspect", "{plan}", "--site", "3"], "--site: this plan has 3, numbered from 0 to 2; got 3"),
    "density above 1": (
        ["calibrate", "--model", "demo", "--density", "1.5", "-o", "p.safetensors"],
        "--density: invalid density in (0, 1] value: '1.5'",
    ),
    "density NaN": (
        ["calibrate", "--model", "demo", "--density", "nan", "-o", "p.safetensors"],
        "--density: invalid density in (0, 1] value: 'nan'",
    ),
    "no source": (["calibrate", "--density", "0.5", "-o", "p.safetensors"], "--model --samples"),
    "samples without a grid": (
        ["calibrate", "--samples", "{tmp}/good.safetensors", "--density", "0.5", "-o", "p.safetensors"],
        "--samples needs --grid",
    ),
    "bad grid": (
        ["calibrate", "--samples", "x", "--grid", "3xfour", "--density", "0.5", "-o", "p.safetensors"],
        "--grid: invalid sizes such as 13x30x45 value: '3xfour'",
    ),
    "grid of another size": (
        ["calibrate", "--samples", "{tmp}/good.safetensors", "--grid", "3x4x6", "--density", "0.5", "-o", "{tmp}/p"],
        "expected [B, 72, heads, D]",
    ),
    "capture file missing": (
        ["calibrate", "--samples", "{tmp}/none", "--grid", "3x4x5", "--density", "0.5", "-o", "{tmp}/p.safetensors"],
        "--samples: expected a .safetensors capture file, found no file at",
    ),
    "unknown order": (
        [*ON_FILE, "--orders", "XYZ",
         "--density", "0.9", "-o", "{tmp}/p.safetensors"],
        "XYZ",
    ),
    "prompts of a capture file": (
        [*ON_FILE, "--density", "0.5", "--prompts", "3", "-o", "{tmp}/p"],
        "--prompts belongs to --model; a capture file",
    ),
    "text position of the demo": ([*ON_DEMO, "--text-position", "first"], "--text-position belongs to --samples"),
    "no text of the demo": ([*ON_DEMO, "--text", "0"], "--text belongs to --samples"),
    "more buckets than steps": ([*ON_DEMO, "--buckets", "13"], "--buckets: the demo model has 12 steps"),
    "one density twice": (
        [*ON_FILE, "--density", "0.5", "0.6", "0.50000001", "-o", "{tmp}/p.safetensors"],
        "--out and --out are both {tmp}/p-0.5.safetensors",
    ),
    "plan and report in one place": (
        [*ON_FILE, "--density", "0.5", "-o", "{tmp}/p", "--report", "{tmp}/q/../p"], "--out and --report are both"
    ),
    "report inside the plan": (
        [*ON_FILE, "--density", "0.5", "-o", "{tmp}/p", "--report", "{tmp}/p/report"], "lies in the plan"
    ),
    "plan over the capture file": (
        [*ON_FILE, "--density", "0.5", "-o", "{tmp}/good.safetensors"], "--out and --samples are both"
    ),
    "plan over another file": (
        [*ON_FILE, "--density", "0.9", "-o", "{tmp}/junk.safetensors"], "another kind of file"
    ),
    "report over a file": (
        [*ON_FILE, "--density", "0.9", "-o", "{tmp}/p", "--report", "{tmp}/junk.safetensors"],
        "--report: {tmp}/junk.safetensors cannot be written",
    ),
    "checkpoint over a folder": (
        [*ON_FILE, "--density", "0.9", "-o", "{tmp}/p", "--checkpoint", "{tmp}"], "--checkpoint: {tmp} is a folder"
    ),
    "bench into a file": (["bench", "--promises", "import", "--out", "{tmp}/junk.safetensors"], "--out: {tmp}/junk"),
    "unknown workload": (["bench", "--workloads", "sora"], "--workloads: expected some of cogvideox_5b, "),
    "unknown kernel": (["bench", "--backend", "cuda"], "--backend: expected one of hopper, "),
    "unknown widths": (["bench", "--widths", "int3/int8"], "pair of widths such as int8/bf16"),
    "negative seed": (["demo", "--seed", "-1"], "--seed: invalid non-negative integer value: '-1'"),
    "too many steps": (["demo", "--steps", "1001"], "--steps: invalid number of steps, 1 to 1000, value: '1001'"),
    "unknown bench": (["bench", "--promises", "speed"], "speed"),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_status_2_and_one_line(capsys, tmp_path, plan_file, argv, named):
    (tmp_path / "junk.safetensors").write_bytes(b"not a plan at all")
    captures(tmp_path / "good.safetensors")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = paro(capsys, *(a.format(tmp=tmp_path, plan=plan_file[0]) for a in argv))
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert named.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


CAPTURE_MISTAKES = {
    "another name": (lambda t: {"layer0/q": t["site0/step0.0/q"]}, "holds a tensor 'layer0/q'"),
    "step of 1": (lambda t: {"site0/step1/q": t["site0/step0.0/q"]}, "site0/step1/q: the step is a fraction in [0, 1)"),
    "one step twice": (
        lambda t: t | {"site0/step0.50/q": t["site0/step0.5/q"]},
        "holds both site0/step0.5",
    ),
    "no key": (
        lambda t: {k: v for k, v in t.items() if k != "site1/step0.5/k"},
        "site1/step0.5 needs q and k, got q, v",
    ),
    "no site 0": (lambda t: {k: v for k, v in t.items() if k[4] == "1"}, "without gaps, got [1]"),
    "nothing": (lambda t: {}, "holds no tensor"),
    "rank": (lambda t: {"site0/step0/q": t["site0/step0.0/q"][0, 0]}, "site0/step0/q: expected [B, 64, heads, D]"),
    "NaN": (lambda t: {k: v * np.nan if k == "site1/step0.5/k" else v for k, v in t.items()}, "1"),
}


@pytest.mark.parametrize(("rename", "named"), CAPTURE_MISTAKES.values(), ids=CAPTURE_MISTAKES.keys())
def test_a_wrong_capture_file_is_named(capsys, tmp_path, rename, named):
    file = captures(tmp_path / "c.safetensors", rename=rename)
    out_file = tmp_path / "plan.safetensors"
    status, out, err = paro(
        capsys, "calibrate", "--samples", file, "--grid", "3x4x5", "--text", 4, "--density", 0.9, "--block", 16, 16,
        "-o", out_file
    )  # fmt: skip
    assert (status, out) == (2, "")
    assert named in err.splitlines()[-1]
    assert not out_file.exists()


def test_a_truncated_capture_file_is_named(capsys, tmp_path):
    file = captures(tmp_path / "c.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    status, _, err = paro(
        capsys, "calibrate", "--samples", file, "--grid", "3x4x5", "--text", 4, "--density", 0.9, "-o", tmp_path / "p"
    )
    assert status == 2 and "is not a whole safetensors file" in err


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="none"):
        command.main(["--traceback", "inspect", str(tmp_path / "none.safetensors")])


def test_a_bug_is_not_dressed_up_as_a_mistake(monkeypatch):
    monkeypatch.setattr(_demo, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(["demo"])


def test_ctrl_c_is_130_and_one_line(capsys, monkeypatch):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_demo, "run", stopped)
    status, out, err = paro(capsys, "demo")
    assert (status, out, err) == (130, "", "\nparo: stopped by Ctrl-C\n")


def test_ctrl_c_while_it_imports(capsys, monkeypatch):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "paro_jax._cli._doctor":
                raise KeyboardInterrupt

    import paro_jax._cli

    monkeypatch.delitem(sys.modules, "paro_jax._cli._doctor", raising=False)
    monkeypatch.delattr(paro_jax._cli, "_doctor", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert paro(capsys, "doctor") == (130, "", "\nparo: stopped by Ctrl-C\n")


def test_a_closed_pipe_is_silent(plan_file):
    done = subprocess.run(
        f"{sys.executable} -m paro_jax inspect {plan_file[0]} | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# inspect


def test_inspect_says_what_the_plan_holds(capsys, plan_file):
    path, plan, keep, order = plan_file
    status, out, err = paro(capsys, "inspect", path, "--bucket", 1, "--site", 2, "--head", 1)
    assert (status, err) == (0, "")
    assert (
        "a test model" in out and "3 x 4 x 5, text 4 first: 64 tokens" in out and "16 x 16 tokens, 4 x 4 blocks" in out
    )
    for g, s, h in np.ndindex(2, 3, 2):
        assert [str(g), str(s), str(h), order[g, s, h], f"{keep[g, s, h].mean():.4g}"] in [
            line.split() for line in out.splitlines()
        ]
    assert "1 heaviest of each row" in out
    assert f"mask of bucket 1, site 2, head 1, in order {order[1, 2, 1]}" in out
    assert paro_jax.BlockMask(keep[1, 2, 1], (16, 16)).draw() in out


def test_inspect_json(capsys, plan_file):
    path, plan, keep, order = plan_file
    status, out, err = paro(capsys, "inspect", path, "--json")
    value = only_json(out)
    assert (status, err) == (0, "")
    assert value["density"] == pytest.approx(keep.mean())
    assert len(value["heads"]) == 12
    assert value["heads"][-1] == {
        "bucket": 1,
        "site": 2,
        "head": 1,
        "order": order[1, 2, 1],
        "density": keep[1, 2, 1].mean(),
    }


@pytest.mark.parametrize("lead", [(), (3,), (30,)], ids=str)
def test_inspect_any_leading_axes(capsys, tmp_path, lead):
    mask = paro_jax.BlockMask(np.ones((*lead, 2, 1, 1), bool), (64, 64))
    paro_jax.save_plan(paro_jax.AttentionPlan.build(GRID, order="WFH", mask=mask), tmp_path / "p.safetensors")
    status, out, err = paro(capsys, "inspect", tmp_path / "p.safetensors")
    assert (status, err) == (0, "")
    assert "WFH" in out and "no text" not in out


def test_inspect_draws_a_png(capsys, tmp_path, plan_file):
    import matplotlib.image

    picture = tmp_path / "new" / "plan.png"
    status, out, err = paro(capsys, "inspect", plan_file[0], "--png", picture, "--json")
    only_json(out)
    assert status == 0
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05  # a picture, and not a blank one


# calibrate


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_calibrate_a_capture_file(capsys, tmp_path, dtype):
    file, out_file = captures(tmp_path / "c.safetensors", dtype=dtype), tmp_path / "plan.safetensors"
    argv = ["calibrate", "--samples", file, "--grid", "3x4x5", "--text", 4, "--block", 16, 16, "--density", 0.6,
            "--buckets", 2, "-o", out_file]  # fmt: skip
    status, out, err = paro(capsys, *argv, "--json")
    assert status == 0, err
    value = only_json(out)
    plan = paro_jax.load_plan(out_file, grid=GRID)
    assert plan.lead == (2, 2) and plan.heads == 2 and plan.block == (16, 16)
    assert plan.density == pytest.approx(0.6, abs=0.05)
    assert value["plans"][0]["density"] == pytest.approx(plan.density)
    assert np.asarray(plan.mask().keep)[..., GRID.always_keep((16, 16))].all()
    first = out_file.read_bytes()
    assert paro(capsys, *argv)[0] == 0
    again = paro_jax.load_plan(out_file)
    np.testing.assert_array_equal(again.keep_bits, plan.keep_bits)
    assert len(first) > 0


def test_calibrate_several_densities_writes_a_plan_each(capsys, tmp_path):
    file = captures(tmp_path / "c.safetensors", steps=(0.0,))
    status, out, err = paro(
        capsys, "calibrate", "--samples", file, "--grid", "3x4x5", "--text", 4, "--block", 16, 16,
        "--density", 0.9, 0.6,
        "--report", tmp_path / "report", "-o", tmp_path / "plan.safetensors"
    )  # fmt: skip
    assert status == 0, err
    for density in (0.9, 0.6):
        path = tmp_path / f"plan-{density}.safetensors"
        assert str(path) in out
        assert paro_jax.load_plan(path).density == pytest.approx(density, abs=0.05)
        assert list((tmp_path / f"report-{density}").glob("*.png"))
    assert not (tmp_path / "plan.safetensors").exists()


def test_the_checkpoint_stays_until_the_plans_are_saved(capsys, tmp_path, monkeypatch):
    file, checkpoint = captures(tmp_path / "c.safetensors", steps=(0.0,)), tmp_path / "new" / "state.npz"
    argv = ["calibrate", "--samples", file, "--grid", "3x4x5", "--text", 4, "--block", 16, 16, "--density", 0.6,
            "--checkpoint", checkpoint, "-o", tmp_path / "plan.safetensors"]  # fmt: skip

    def full(*args, **kwargs):
        raise paro_jax.PlanError("path: no room. Free some space")

    with monkeypatch.context() as patch:
        patch.setattr(paro_jax, "save_plan", full)
        status, out, err = paro(capsys, *argv)
    assert (status, out) == (2, "") and "no room" in err and checkpoint.exists()

    import calibrate

    def again(*args, **kwargs):
        raise AssertionError("it was computed already")

    monkeypatch.setattr(calibrate._score, "chosen_mass", again)
    status, out, err = paro(capsys, *argv)
    assert status == 0 and err == "" and not checkpoint.exists()  # and no progress bar where nobody looks
    assert paro_jax.load_plan(tmp_path / "plan.safetensors").lead == (2,)


# demo: the run itself is tested with the demo; here only what the command adds.


@pytest.fixture
def fake_demo(monkeypatch):
    calls = []

    def run_demo(**kwargs):
        calls.append(kwargs)
        row = dict(method="dense", density=1.0, qk="bf16", pv="bf16", psnr=np.float32(np.inf), ssim=1.0, cosine=1.0)
        return {"rows": [row | dict(retained_mass=np.float32(1), seconds=2.5)], "grid": (3, 4, 5)}

    module = type(sys)("paro_jax.demo.run")
    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "paro_jax.demo.run", module)
    return calls


def test_demo_hands_its_arguments_over(capsys, tmp_path, fake_demo):
    out_dir = tmp_path / "a" / "b"
    argv = ["demo", "--quick", "--prompts", 8, "--seed", 3, "--steps", 5, "--out", out_dir]
    status, out, err = paro(capsys, *argv, "--json")
    assert (status, err) == (0, "")
    assert fake_demo == [dict(out=out_dir, quick=True, prompts=8, seed=3, steps=5, progress=True)]
    assert only_json(out)["rows"][0] == {
        "method": "dense", "density": 1.0, "qk": "bf16", "pv": "bf16", "psnr": None, "ssim": 1.0, "cosine": 1.0,
        "retained_mass": 1.0, "seconds": 2.5,
    }  # fmt: skip
    status, out, err = paro(capsys, *argv)
    assert status == 0 and "retained mass" in out and "dense" in out and "inf" in out


def test_demo_into_a_place_that_is_a_file(capsys, tmp_path, fake_demo):
    (tmp_path / "file").write_text("")
    status, out, err = paro(capsys, "demo", "--out", tmp_path / "file")
    assert (status, out, fake_demo) == (2, "", [])
    assert err.count("\n") == 1 and str(tmp_path / "file") in err


# doctor, bench


def test_doctor(capsys):
    status, out, err = paro(capsys, "doctor")
    assert (status, err) == (0, "")
    import jax
    import jaxlib

    assert jax.__version__ in out and jaxlib.__version__ in out and "xla" in out and "reference" in out
    status, out, _ = paro(capsys, "doctor", "--json")
    report = only_json(out)
    assert report["packages"]["jax"] == jax.__version__
    assert report["devices"][0]["platform"] == jax.default_backend()
    served = {row["workload"]: row["backend"] for row in report["workloads"] if row["op"] == "block_attention"}
    assert "none" not in served.values() and len(served) >= 3
    assert report["support_table"].strip()


def test_bench_import(capsys, tmp_path):
    status, out, err = paro(
        capsys, "bench", "--backend", "xla", "--promises", "import", "--json", "--out", tmp_path / "b"
    )
    assert status == 0
    value = only_json(out)
    assert value == only_json((tmp_path / "b" / "promises.json").read_text())
    names = {row["name"]: row for row in value["rows"]}
    assert set(names) == {"import paro_jax beyond import jax", "heavy packages imported by import paro_jax"}
    assert all(isinstance(row["met"], bool) for row in value["rows"])
    assert names["heavy packages imported by import paro_jax"]["met"], names


@pytest.mark.slow
def test_bench_invisibility_on_a_few_problems(capsys, tmp_path):
    status, out, _ = paro(capsys, "bench", "--promises", "invisibility", "--problems", 12, "--json", "--out", tmp_path)
    assert status == 0
    (row,) = only_json(out)["rows"]
    assert row["problems"] >= 12 and row["met"] and 0 < row["measured"] <= 1e-5


# _show


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_keeps_every_cell(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    rows = [dict(name="a[b]", value=1.25, ok=True, gone=None), dict(name="c", value=12345.0, ok=False, gone=2)]
    _show.table("a title", rows)
    out = capsys.readouterr().out
    for text in ("a title", "a[b]", "1.25", "12,345", "yes", "no", "-"):
        assert text in out


def test_write_json_leaves_the_old_file_when_the_disk_is_full(monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    _show.write_json(path, {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        _show.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_path_in_an_os_error_is_named(capsys, tmp_path, fake_demo):
    status, _, err = paro(capsys, "demo", "--out", Path("/dev/null/x"))
    assert status == 2 and "/dev/null" in err and err.startswith("paro: error: ")
