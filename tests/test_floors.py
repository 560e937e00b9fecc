"""Arrows point down: parses every import of every package and fails on an upward one.

roof       paro_jax/__main__.py, paro_jax/_cli, demo, evaluation and bench of paro_jax     (tests and notebooks too)
floor 2    calibrate
floor 1    paro_jax      inside it, models are leaves: nothing below imports them
floor 0    pallas_kernels      jax, numpy and the standard library only
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "paro_jax", "calibrate")
ROOF = ("paro_jax.demo", "paro_jax.evaluation", "paro_jax.bench", "paro_jax._cli", "paro_jax.__main__")
# Where Flax and what comes with it may be imported while a module of floor 1 loads.
FLAX = ("paro_jax.flax", "paro_jax.maxdiffusion", "paro_jax.models", *ROOF)
HEAVY = ("flax", "orbax", "optax", "matplotlib", "safetensors", "torch", "huggingface_hub", "PIL", "dm_pix")


def inside(module: str, *names: str) -> bool:
    """Whether `module` is one of `names` or lies in one of them."""
    return any(module == name or module.startswith(name + ".") for name in names)


def floor(module: str) -> int:
    if inside(module, *ROOF):
        return 3
    return {"pallas_kernels": 0, "paro_jax": 1, "calibrate": 2}[module.split(".")[0]]


def imports(source: str, module: str) -> list[tuple[str, int, bool]]:
    """(imported module, line, whether it is imported when the module loads) for every import in `source`."""
    tree = ast.parse(source)
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # `from paro_jax import demo` names a module, `from paro_jax import attention` does not: both are checked.
            found += [(f"{base}.{alias.name}", node.lineno, id(node) not in lazy) for alias in node.names]
    return found


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    bad = []
    for name, line, at_load in imports(source, module):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top in PACKAGES:
            if floor(name) > floor(module):
                bad.append(f"{where}: floor {floor(module)} must not import floor {floor(name)}")
            if inside(name, *FLAX[:3]) and floor(module) < 3 and not inside(module, *FLAX):
                bad.append(f"{where}: models and the Flax adapters are leaves")
        elif floor(module) == 0 and top not in ("jax", "jaxlib", "numpy") and top not in sys.stdlib_module_names:
            # The bench measures real peers, lazily and only when asked to.
            if at_load or not inside(module, "pallas_kernels.bench"):
                bad.append(f"{where}: floor 0 imports jax, numpy and the standard library only")
        elif floor(module) == 1 and at_load and top in HEAVY and not inside(module, *FLAX, "paro_jax.metrics"):
            bad.append(f"{where}: import it in the function that needs it")
        elif top in ("tests", "notebooks"):
            bad.append(f"{where}: nothing imports tests or notebooks")
    return bad


def modules() -> list[tuple[str, Path]]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]


def test_no_import_points_up():
    found = [line for module, path in modules() for line in complaints(module, path.read_text())]
    assert not found, "\n".join(found)


def test_every_package_was_seen():
    assert {module.split(".")[0] for module, _ in modules()} == set(PACKAGES) and len(modules()) > 20


@pytest.mark.parametrize(
    "module, line, says",
    [
        ("pallas_kernels.arrange", "import paro_jax", "floor 0 must not import floor 1"),
        ("pallas_kernels.arrange", "from paro_jax._grid import TokenGrid", "floor 0 must not import floor 1"),
        ("pallas_kernels._choose", "import flax", "standard library only"),
        ("pallas_kernels._choose", "def f():\n    import scipy", "standard library only"),
        ("paro_jax._plan", "import calibrate", "floor 1 must not import floor 2"),
        ("paro_jax._plan", "def f():\n    from calibrate import make_plan", "floor 1 must not import floor 2"),
        ("paro_jax._plan", "from paro_jax import demo", "floor 1 must not import floor 3"),
        ("paro_jax._plan", "from paro_jax._cli import _show", "floor 1 must not import floor 3"),
        ("paro_jax.models.wan", "from paro_jax.demo.data import scene", "floor 1 must not import floor 3"),
        ("paro_jax._plan", "from .models import flux", "leaves"),
        ("paro_jax._plan", "from . import flax", "leaves"),
        ("calibrate._score", "import paro_jax.models.flux", "leaves"),
        ("calibrate._score", "from paro_jax.demo import run", "floor 2 must not import floor 3"),
        ("paro_jax._plan_file", "import orbax.checkpoint", "in the function"),
        ("paro_jax._mask", "class A:\n    import matplotlib", "in the function"),
        ("calibrate.__init__", "from tests import problems", "tests"),
        ("paro_jax.__init__", "from .flax import attention_fn", "leaves"),
    ],
)
def test_an_upward_import_is_caught(module, line, says):
    (found,) = complaints(module, line)
    assert says in found and module in found


@pytest.mark.parametrize(
    "module, line",
    [
        ("pallas_kernels.bench.peers", "def peers():\n    import tokamax"),
        ("paro_jax._attention", "from pallas_kernels.arrange import arrange"),
        ("paro_jax._plan_file", "def f():\n    import orbax.checkpoint as ocp"),
        ("paro_jax.flax", "from flax import nnx"),
        ("paro_jax.models.flux", "from flax import nnx\nfrom paro_jax import attention"),
        ("paro_jax.demo.run", "import calibrate\nfrom paro_jax.models import cogvideox"),
        ("calibrate._make_plan", "from paro_jax import AttentionPlan, policies"),
    ],
)
def test_a_downward_import_is_not(module, line):
    assert complaints(module, line) == []
