"""Whole models and samplers against the torch and diffusers that are installed, weights and inputs randomised afresh.

    python -m pytest -m parity --peer-python PATH [--peer-seed N]

The peer runs in a process of its own, under a Python of its own (torch's CPU build and JAX want different ones):
tests/golden/make_models.py writes what it computes into a temporary folder, and we compute the same.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import parity
import pytest
import test_parity_cogvideox as cogvideox
import test_parity_flux as flux
import test_parity_wan as wan
import test_samplers as samplers

pytestmark = pytest.mark.parity

MODELS = {
    **{name: (cogvideox.model, cogvideox.diffusers_names, config) for name, config in cogvideox.STYLES.items()},
    **{name: (flux.model, flux.flux.diffusers_names, flux.STYLES[name]) for name in ("flux_dev", "flux_schnell")},
    **{name: (wan.model, wan.diffusers_names, config) for name, config in wan.STYLES.items()},
}
SCHEDULERS = sorted({name for name, _ in samplers.RUNS})


def peer(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Constructors never need the hub; our paths are no business of another Python.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=240)


@pytest.fixture(scope="module")
def live(request, tmp_path_factory) -> pathlib.Path:
    """The folder the peer has written to."""
    python, seed = request.config.getoption("--peer-python"), request.config.getoption("--peer-seed")
    found = peer(python, "-c", "import torch, diffusers, safetensors; print(torch.__version__, diffusers.__version__)")
    if found.returncode:
        missing = (found.stderr.splitlines() or ["no reason given"])[-1]
        pytest.skip(f"{python} cannot run the peer ({missing}); name one with torch and diffusers: --peer-python PATH")
    folder = tmp_path_factory.mktemp("live")
    script = parity.FOLDER / "make_models.py"
    ran = peer(python, script, "--folder", folder, "--seed", seed, *MODELS, *SCHEDULERS)
    assert ran.returncode == 0, ran.stderr
    sys.stdout.write(f"seed {seed}; torch, diffusers: {found.stdout}")
    return folder


def report(name: str, error: float) -> None:
    sys.stdout.write(f"{name}: largest error {error:.1e}\n")


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(live, name, tmp_path):
    model, names, config = MODELS[name]
    weights, inputs, output = parity.read(name, live)
    stale, _, _ = parity.read(name)
    assert all(not np.array_equal(weights[key], stale[key]) for key in stale), "weights are those of the fixture"
    net = parity.load(weights, lambda: model(config), names(config), tmp_path)
    error = np.abs(jax.jit(net.__call__)(**inputs) - output).max()
    report(name, error)
    assert error <= 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whole_runs_of_samplers(live, name):
    golden = samplers.golden_runs(name, live)
    errors = {
        key: np.abs(run(golden) - golden[key]).max() for (file, key), run in samplers.RUNS.items() if file == name
    }
    report(name, max(errors.values()))
    assert errors and max(errors.values()) <= 1e-4, errors
