"""`paro calibrate --model flux|cogvideox|wan`: from weights and encoded prompts to a plan file."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import only_json, paro
from tiny_models import TINY

import calibrate
import paro_jax
from calibrate import _score
from paro_jax.__main__ import parser
from paro_jax._cli import _calibrate
from paro_jax.models import weights

SIZE = {
    "flux": ["--height", 128, "--width", 96],
    "cogvideox": [],  # its config.json says the size
    "wan": ["--height", 64, "--width", 96, "--frames", 9],
}
DENSITY = ["--density", 0.8, "--block", 8, 8]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of weights and a file of embeddings for every family."""
    made = {}
    for name, tiny in TINY.items():
        folder = tmp_path_factory.mktemp(name)
        tiny.save(tiny.net(), folder / "pipeline" / "transformer")
        r = np.random.default_rng(3)
        tensors = {"prompt_embeds": r.standard_normal((2, 6, 24))}
        if name == "flux":
            tensors |= {"pooled_prompt_embeds": r.standard_normal((2, 20)), "guidance": np.asarray([2.5])}
        else:
            tensors["negative_prompt_embeds"] = r.standard_normal((1, 6, 24))
        if name == "cogvideox":
            tensors["latents"] = r.standard_normal((2, *tiny.latents))
        path = folder / "embeddings.safetensors"
        save_file({key: x.astype(np.float32) for key, x in tensors.items()}, path)
        made[name] = (folder / "pipeline", path)
    return made


def command(models, name, out, *more, embeddings=None, model=None):
    folder, path = models[name]
    source = ["--model", model or name, "--weights", folder, "--embeddings", embeddings or path]
    return ["calibrate", *source, *DENSITY, *SIZE[name], "-o", out, *more]


@pytest.mark.parametrize("name", TINY)
def test_a_plan_from_the_shell(capsys, tmp_path, models, name):
    tiny, out = TINY[name], tmp_path / "plan.safetensors"
    argv = command(models, name, out, "--steps", 3, "--at", 0, 2, "--buckets", 2, "--json", "--seed", 5)
    status, printed, err = paro(capsys, *argv)
    assert status == 0, err
    assert only_json(printed)["plans"][0]["path"] == str(out)
    plan = paro_jax.load_plan(out, grid=tiny.config.grid)
    assert plan.lead == (2, tiny.sites) and plan.heads == 2 and 0.7 < plan.density <= 0.8
    status, printed, _ = paro(capsys, "inspect", out, "--json")
    about = only_json(printed)
    assert status == 0 and type(tiny.net()).__name__ in str(about) and "'at': [0, 2]" in str(about)


def test_the_first_step_is_the_noise_and_both_halves_of_guidance(capsys, tmp_path, models):
    """What the command calibrates on, put together by hand: noise, first timestep, negative and prompt, bfloat16."""
    folder, path = models["cogvideox"]
    argv = command(models, "cogvideox", tmp_path / "plan", "--steps", 4, "--at", 0, "--prompts", 1)
    status, _, err = paro(capsys, *argv)
    assert status == 0, err
    net, tensors = weights.from_pretrained(folder), load_file(path)
    text = np.concatenate([tensors["negative_prompt_embeds"], tensors["prompt_embeds"][:1]])
    noise = np.concatenate([tensors["latents"][:1]] * 2)
    inputs = (jnp.asarray(noise, jnp.bfloat16), jnp.full(2, 999.0), jnp.asarray(text, jnp.bfloat16))
    samples = calibrate.LiveSamples([(0.0, functools.partial(net.capture, *inputs))], sites=3)
    options: dict[str, Any] = dict(density=0.8, block=(8, 8), progress=False)
    expected, _ = calibrate.make_plan(samples, TINY["cogvideox"].config.grid, **options)
    found = paro_jax.load_plan(tmp_path / "plan")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stopped_run_goes_on(capsys, tmp_path, models, monkeypatch):
    argv = command(models, "wan", tmp_path / "a.safetensors", "--steps", 2, "--at", 0, "--prompts", 1)
    assert paro(capsys, *argv)[0] == 0
    calls, mass = [], _score.chosen_mass

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mass(*args)

    monkeypatch.setattr("calibrate._score.chosen_mass", stop_at_the_third)
    argv[argv.index("-o") + 1] = tmp_path / "b.safetensors"
    argv += ["--checkpoint", tmp_path / "c"]
    assert paro(capsys, *argv)[0] == 130 and (tmp_path / "c").exists()
    assert paro(capsys, *argv)[0] == 0 and not (tmp_path / "c").exists()
    a, b = (paro_jax.load_plan(tmp_path / f"{name}.safetensors") for name in "ab")
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


MISTAKES = {
    "no file": ("wan", {}, ["--embeddings", "{tmp}/none"], "--embeddings: expected a .safetensors file"),
    "no weights": ("wan", {}, ["--weights", "{tmp}/none"], "none: no such file or folder; check the path"),
    "another model": ("wan", {}, ["--model", "flux"], "--model flux: {folder} holds Wan; give --model wan"),
    "no model at all": ("wan", {}, ["--model", "sora"], "found 'sora'"),
    "odd height": ("wan", {}, ["--height", "72"], "--height: expected a multiple of 16 pixels"),
    "odd frames": ("wan", {}, ["--frames", "10"], "--frames: expected 4 k + 1, such as 9 or 13; found 10"),
    "frames of an image": ("flux", {}, ["--frames", "9"], "--frames belongs to video models"),
    "shift of CogVideoX": ("cogvideox", {}, ["--shift", "3"], "--shift belongs to FLUX.1 and Wan"),
    "no shift": ("wan", {}, ["--shift", "0"], "shift: expected a number above 0"),
    "endless shift": ("flux", {}, ["--shift", "inf"], "shift: expected a number above 0, such as 3, found inf"),
    "a bucket without a step": (
        "wan",
        {},
        ["--at", "0", "--buckets", "3"],
        "in each of 3 buckets, found none in bucket 1",
    ),
    "guidance from nothing": (
        "wan",
        {"negative_prompt_embeds": None, "guidance": (1,)},
        [],
        "guidance needs negative_prompt_embeds",
    ),
    # Known before the model has run, which may take an hour.
    "an order that is none": ("wan", {}, ["--orders", "XYZ"], "XYZ"),
    "too low a density": ("flux", {}, ["--density", "0.01"], "density must be at least"),
    "step beyond": ("wan", {}, ["--at", "3"], "--at: expected steps from 0 to 2, found 3"),
    "more buckets than steps": ("wan", {}, ["--buckets", "4"], "--buckets: expected at most one for each of 3 steps"),
    "more prompts": ("wan", {}, ["--prompts", "3"], "--prompts: expected at most 2"),
    "grid": ("wan", {}, ["--grid", "3x4x6"], "--grid belongs to --samples"),
    "text width": ("wan", {"prompt_embeds": (2, 6, 25), "negative_prompt_embeds": None}, [], "expected 24 channels"),
    "pooled width": ("flux", {"pooled_prompt_embeds": (2, 21)}, [], "pooled_prompt_embeds: expected 20 channels"),
    "no pooled": ("flux", {"pooled_prompt_embeds": None}, [], "FLUX.1 needs pooled_prompt_embeds [P, 20]"),
    "pooled for Wan": ("wan", {"pooled_prompt_embeds": (2, 20)}, [], "were the prompts encoded for FLUX.1?"),
    "negative for FLUX": ("flux", {"negative_prompt_embeds": (1, 6, 24)}, [], "negative_prompt_embeds: this FLUX.1"),
    "negative width": ("wan", {"negative_prompt_embeds": (1, 5, 24)}, [], "expected [*, 6, 24]"),
    "latents of another size": ("wan", {"latents": (2, 4, 3, 8, 8)}, [], "expected (2, 4, 3, 8, 12) for this Wan"),
    "rows": ("flux", {"pooled_prompt_embeds": (1, 20)}, [], "the first of 2 prompts; found (1, 20)"),
    "rank": ("wan", {"prompt_embeds": (6, 24)}, [], "prompt_embeds: expected 3 axes"),
    "another tensor": ("wan", {"text": (2, 6, 24)}, [], "found negative_prompt_embeds, prompt_embeds, text"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(capsys, tmp_path, models, mistake, monkeypatch):
    """And is told before any weights are read, which takes minutes."""
    monkeypatch.setattr("paro_jax.models._stream.read", lambda *_: pytest.fail("weights were read"))
    name, changed, more, says = MISTAKES[mistake]
    tensors = load_file(models[name][1])
    for key, shape in changed.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / "e.safetensors")
    argv = command(models, name, tmp_path / "plan", "--steps", 3, embeddings=tmp_path / "e.safetensors")
    monkeypatch.setattr("paro_jax._cli._published._watch", lambda *_: pytest.fail("the model ran"))
    for option, value in zip(more[::2], more[1::2], strict=True):
        value = value.format(tmp=tmp_path)
        if option in argv:
            argv[argv.index(option) + 1] = value
        else:
            argv += [option, value]
    status, _, err = paro(capsys, *argv)
    line = err.strip().splitlines()[-1]
    assert status == 2 and says.format(folder=models[name][0]) in line, err
    assert not (tmp_path / "plan").exists()


def test_a_file_cut_short_and_numbers_that_are_not(capsys, tmp_path, models):
    whole, path = models["wan"][1], tmp_path / "e.safetensors"
    path.write_bytes(whole.read_bytes()[:-9])
    status, _, err = paro(capsys, *command(models, "wan", tmp_path / "plan", embeddings=path))
    assert status == 2 and "is not a whole safetensors file" in err
    tensors = load_file(whole)
    tensors["prompt_embeds"][1, 2, 3] = np.nan
    save_file(tensors, path)
    status, _, err = paro(capsys, *command(models, "wan", tmp_path / "plan", embeddings=path))
    assert status == 2 and "prompt_embeds holds NaN or infinity" in err


def test_where_plans_go(tmp_path, monkeypatch):
    """One for each density: the suffix stays last, a folder's name with a dot is whole, and "~" is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {
        "~/p.safetensors": ["p-0.5.safetensors", "p-0.25.safetensors"],
        "~/flux.1": ["flux.1-0.5", "flux.1-0.25"],
    }
    for out, names in expected.items():
        args = parser().parse_args(["calibrate", "--model", "demo", "--density", "0.5", "0.25", f"--out={out}"])
        assert _calibrate._outputs(args)[0] == [tmp_path / name for name in names]


def test_weights_and_embeddings_go_together(capsys, tmp_path):
    argv = ["calibrate", "--model", "wan", "--density", "0.5", "-o", tmp_path / "plan"]
    assert "--model wan needs --weights" in paro(capsys, *argv)[2]
    assert "--model wan needs --embeddings" in paro(capsys, *argv, "--weights", "w")[2]
    argv[2] = "demo"
    assert "--weights belongs to --model flux" in paro(capsys, *argv, "--weights", "w")[2]
