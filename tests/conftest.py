"""What every test runs under: strict modes, and a few fixtures.

Warnings are errors (pyproject.toml), ranks never broadcast by accident (`jax_numpy_rank_promotion`), and hypothesis
draws the same examples on every machine. No hook checks types: our pytrees hold placeholders while JAX flattens them,
which it would take for wrong arrays, and public functions check shapes themselves, with better words.
"""

import os
import sys

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# pytest -m gpu -n 8: eight processes share the device's memory, none may take most of it at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# XLA's threads on a CPU. An interpreted kernel keeps one for each of its three warpgroups while they wait for each
# other; where a core means a thread and there are two, it hangs.
os.environ.setdefault("NPROC", "8")

hypothesis.settings.register_profile("paro", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("paro")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "live comparison with torch and diffusers (pytest -m parity)")
    group.addoption("--peer-python", metavar="PATH", default=sys.executable, help="a python that has them")
    group.addoption("--peer-seed", metavar="N", type=int, default=1, help="of the weights and inputs (default 1)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `compile` need the CUDA compiler packages, and say what is missing."""
    if item.get_closest_marker("compile") is not None:
        from pallas_kernels import compile_report

        if reason := compile_report.missing():
            pytest.skip(reason)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def says():
    """`with says("argument", "expected", "found"):` the block raises ValueError and its message has all these words."""
    from contextlib import contextmanager

    @contextmanager
    def check(*words: object, error: type[Exception] = ValueError):
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        missing = [str(word) for word in words if str(word) not in message]
        assert not missing, f"the message lacks {missing}: {message}"

    return check


@pytest.fixture
def hopper_here():
    from pallas_kernels import device_name

    if device_name() != "sm_90":
        pytest.skip(f"needs an H100 or H200, this is {device_name()}")
