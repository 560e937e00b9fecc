"""`paro bench` as a command: the whole of it once, then what it says and writes with a stand-in for its process."""

import errno
import json
import os
import signal
import types

import jax
import pytest

from paro_jax import __main__ as command

ARGV = ["bench", "--quick", "--tokens", "160", "--heads", "1", "--workloads", "cogvideox_5b", "--widths", "bf16/bf16",
        "--density", "0.4", "--masks", "random"]  # fmt: skip


@pytest.mark.slow
def test_the_command_from_end_to_end(capsys, tmp_path, monkeypatch):
    """On a CPU with its own process: the tables, the file, the picture."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert command.main([*ARGV, "--kinds", "attention", "peer", "--out", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    for words in ("ceilings", "attention", "missing: it needs an NVIDIA GPU", "timed on the host"):
        assert words in out, out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    about = result["about"]["machine"]
    assert about["backends_see"] == "cpu" and about["jax"] == jax.__version__ and about["date"][:2] == "20"
    statuses = {row["job"]: row["status"] for row in result["rows"]}
    assert set(statuses.values()) == {"measured", "missing"} and len(statuses) == len(result["rows"]), statuses
    assert statuses["cogvideox_5b peer cudnn fp8, dense"] == "missing"
    assert statuses["cogvideox_5b attention xla bf16/bf16, 40 % random"] == "measured"
    assert statuses["cogvideox_5b peer jax.nn, dense"] == "measured" and result["targets"] == []


@pytest.fixture
def toy(monkeypatch):
    """A stand-in for the process: what it was asked for, and what it says of its machine and of each job."""
    toy = types.SimpleNamespace(
        asked=[], about={"device": "cpu", "backends_see": "cpu", "jax": "1", "no_gpu": "no driver"},
        says=lambda job: {"status": "missing", "reason": "a toy"},
    )  # fmt: skip

    class Toy:
        def machine(self):
            return toy.about

        def ask(self, job, settings, limit):
            toy.asked.append(str(job))
            return {**job.facts, **toy.says(job)}

        def close(self):
            pass

    monkeypatch.setattr("paro_jax.bench.worker.Worker", Toy)
    return toy


def test_a_run_is_resumed_on_the_same_machine_alone(capsys, tmp_path, toy):
    argv = [*ARGV, "--json", "--out", str(tmp_path)]

    def says(job):
        if len(toy.asked) == 6:
            raise KeyboardInterrupt
        return (
            {"status": "failed", "reason": "no luck"} if len(toy.asked) == 2 else {"status": "missing", "reason": "-"}
        )

    toy.says = says
    assert command.main(argv) == 130
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 5
    first = toy.asked[:]

    def stopped(job):
        raise KeyboardInterrupt

    toy.says = stopped
    assert command.main([*argv, "--resume"]) == 130  # stopped again: nothing that was known is lost
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 5
    toy.says = lambda job: {"status": "missing", "reason": "-"}
    toy.asked.clear()
    assert command.main([*argv, "--resume"]) == 1  # nothing of ours was measured
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert toy.asked[0] == first[1] and toy.asked[1] == first[5]  # what had failed, and what was not reached
    assert len(rows) == len(toy.asked) + 4 and {row["status"] for row in rows} == {"missing"}
    toy.about = {**toy.about, "jax": "2"}
    assert command.main([*argv, "--resume"]) == 2
    assert "is of another run: jax 1 then, 2 now" in capsys.readouterr().err
    toy.about = {**toy.about, "jax": "1"}
    assert command.main([*argv, "--resume", "--block", "128", "128"]) == 2
    assert "block [64, 64] then, [128, 128] now" in capsys.readouterr().err
    (tmp_path / "bench.json").write_text("{}")
    assert command.main([*argv, "--resume"]) == 2
    assert "is not what paro bench writes" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [False, True], ids=["no GPU", "a driver that fails"])
def test_without_the_gpu_that_was_asked_for_every_row_says_why(capsys, tmp_path, toy, broken):
    if broken:
        toy.about = {"problem": "the process ended with status 1: CUDA driver version is insufficient"}
    assert command.main(["bench", "--gpu", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    says = "driver version is insufficient" if broken else "no GPU: jax sees cpu alone (no driver)"
    assert len(rows) > 200 and all(row["status"] == "failed" and says in row["reason"] for row in rows)
    assert any(row["contestant"] == "hopper" for row in rows) and says in out and toy.asked == []
    assert len(err.splitlines()) == 1 and says in err  # said once, not 286 times
    assert out.count("not measured: ") == 12 and "kept  " not in out  # each target says so; no tables of nothing


def test_a_disk_that_is_full_costs_the_files_and_not_the_tables(capsys, tmp_path, toy, monkeypatch):
    def write(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("paro_jax._cli._show.write_json", write)
    monkeypatch.setattr("paro_jax.bench.run.status", lambda rows: 0)  # whatever the rows say
    assert command.main([*ARGV, "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "missing: a toy" in out and f"not all could be written to {tmp_path}" in out
    assert "bench.json cannot be written: No space left on device" in err


def test_what_timeout_sends_stops_the_run_like_ctrl_c(tmp_path, toy):
    def says(job):
        if len(toy.asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"status": "missing", "reason": "-"}

    toy.says, before = says, signal.getsignal(signal.SIGTERM)
    assert command.main([*ARGV, "--out", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_torch_python_that_is_not_there_is_a_mistake(capsys, tmp_path):
    assert command.main([*ARGV, "--torch-python", "/no/python", "--out", str(tmp_path)]) == 2
    assert "--torch-python: expected a program, found none at /no/python" in capsys.readouterr().err


def test_the_workloads_are_whole_on_a_gpu_and_targets_are_listed(capsys, tmp_path, toy):
    toy.about = {"device": "NVIDIA H200", "backends_see": "sm_90", "gpu": {"driver_version": "580.1"}}
    facts = dict(status="measured", ms=1.0, low_ms=1.0, high_ms=1.0, tops=5.0, rate=1.0, dtype="bfloat16")
    toy.says = lambda job: {
        **facts, "of": job.name, "kept_density": job.density, "kept_blocks": job.tokens,
        "overhead_of_dense_attention": 0.0, "overhead_ms": 0.0,
    }  # fmt: skip
    assert command.main(["bench", "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    arguments = result["about"]["arguments"]
    assert (arguments["tokens"], arguments["dtype"], arguments["backend"]) == (None, "bfloat16", "hopper")
    assert arguments["block"] == [128, 128] and not arguments["quick"]
    assert len(result["targets"]) == 12 and all(target["met"] is not None for target in result["targets"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000
