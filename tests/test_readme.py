"""Nothing in README.md is only text: its Python runs, its commands are run or checked, its links and pictures exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from paro_jax import __main__ as command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks(README, "bash") for line in block.splitlines() if line.strip()]
PARO = [line for line in COMMANDS if line.startswith("paro ")]
# Run from here by their own tests or by .ci/run, because they take minutes or set an environment up.
MAKE = [line for line in COMMANDS if line.startswith("make ")]
PIP = [line for line in COMMANDS if line.startswith("pip ")]


def test_every_command_is_of_a_kind_that_is_tested():
    assert PARO and MAKE and PIP
    assert set(COMMANDS) == {*PARO, *MAKE, *PIP}


def test_the_python_of_the_readme_runs_as_one_program(tmp_path):
    snippets = blocks(README, "python")
    assert len(snippets) >= 2
    done = subprocess.run([sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.safetensors").exists()


# bench takes minutes in full, so its cheapest figure stands for it; test_bench.py and test_cli.py have the others.
SHORTER = {"bench": ["--promises", "import"]}
# Minutes too, most of them compiling: `.ci/run` runs it as it stands, from the wheel; test_demo reads what it writes.
IN_CI = ["paro demo --quick"]


@pytest.mark.slow
def test_the_paro_commands_of_the_readme_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for line in PARO:
        if line in IN_CI:
            continue
        name, *rest = shlex.split(line)[1:]
        status = command.main([name, *rest, *SHORTER.get(name, [])])
        captured = capsys.readouterr()
        assert status == 0, f"{line}\n{captured.err}"
        assert captured.out.strip(), line
    assert (tmp_path / "out/plan.safetensors").exists()


def test_what_is_left_to_ci_is_run_there():
    ci = [line.split("|")[0].strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert "set -euo pipefail" in ci and "test -s out/demo/report.json" in ci
    for line in IN_CI:
        assert line in PARO and line in ci


@pytest.mark.parametrize("line", re.findall(r"`(paro [a-z][^`]*?)`", README))
def test_a_command_in_running_text_is_understood(line):
    assert set(re.findall(r"\b[A-Z]{3,}\b", line)) <= {"COMMAND", "PLAN", "DIR", "FILE", "CHECKPOINT"}
    if "COMMAND" not in line:  # `paro COMMAND --help`
        command.parser().parse_args(shlex.split(line)[1:])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("line", sorted({*MAKE, "make lint", "make test-oldest"}))
def test_a_make_target_exists_and_would_run_its_tool(line):
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = {"demo": "-m paro_jax demo", "test": "-m pytest", "test-oldest": "-m pytest", "lint": "-m pyright"}
    assert tool[line.split()[1]] in done.stdout


@pytest.mark.parametrize("line", PIP)
def test_a_pip_line_names_the_constraints_and_an_extra_that_exists(line):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, verb, *rest = shlex.split(line)
    assert verb == "install" and rest[:3] == ["-c", "constraints.txt", "-e"]
    extras = re.fullmatch(r"\.(?:\[(.+)\])?", rest[3])[1]
    assert set(extras.split(",") if extras else []) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_the_readme_shows_a_picture_before_it_explains():
    first_picture, first_section = README.index("!["), README.index("\n## ")
    assert first_picture < first_section
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        if target.endswith(".png"):
            pixels = matplotlib.image.imread(ROOT / target)
            assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05


def test_paths_in_contributing_exist():
    for path in re.findall(r"`((?:paro_jax|pallas_kernels|calibrate|tests|notebooks)/[\w/]*(?:\.py)?)`", CONTRIBUTING):
        assert (ROOT / path).exists(), path


def test_constraints_are_plain_and_hold_every_requirement():
    import tomllib

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9.]+", line) for line in lines), (
        "name==version and nothing else"
    )
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.\-]+", w)[0]).lower() for w in wanted}
    assert names <= pinned
