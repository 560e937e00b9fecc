"""`import paro_jax` is light: soon done, no heavy package, no device touched; and the public names are there."""

import inspect
import subprocess
import sys

import pytest

import paro_jax

HEAVY = ("flax", "orbax", "optax", "matplotlib", "safetensors", "hypothesis", "torch", "tqdm", "rich")

PUBLIC = (
    "AttentionPlan BlockMask NoBackend Norm PlanError QuantSpec Rope TokenBlocks TokenGrid Width arrange attend "
    "attention load_plan plan_info project_in save_plan"
).split()


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.mark.parametrize("module", ["paro_jax", "paro_jax.policies", "pallas_kernels"])
def test_no_heavy_package_is_imported(module):
    found = run(f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])").split()
    assert found == []


def test_it_adds_less_than_a_second_and_a_half_to_jax():
    """Time of this process alone, so that a busy machine does not matter. The figure is in `paro bench --promises`."""
    code = "import time, jax; start = time.process_time(); import paro_jax; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(2)) < 1.5


def test_no_device_is_touched():
    """Multi-host programs configure JAX after their imports; that fails once a backend is up."""
    out = run("import jax, paro_jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())")
    assert out.strip() == "3"


def test_the_public_names_are_there_and_no_others():
    for name in PUBLIC:
        assert getattr(paro_jax, name) is not None
    own = {name for name, value in vars(paro_jax).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert own == set(PUBLIC)


def test_every_public_thing_says_what_it_is():
    for name in set(PUBLIC) - {"Width"}:
        assert inspect.getdoc(getattr(paro_jax, name)), name
