"""`paro eval`'s engine on a tiny model: what a table holds, what executed density means, what happens to failures."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import only_json, paro
from test_cli_published import SIZE, models  # noqa: F401  (a fixture)
from tiny_models import TINY

import paro_jax
from paro_jax import evaluation, policies
from paro_jax.evaluation import Case, Context, Row, Setting, Subject
from paro_jax.models import samplers

TINY_VIDEO = TINY["cogvideox"]
STEPS, BLOCK, EDGES, AT = 4, (8, 8), (0.0, 0.5, 1.0), (0, 2)
HOW = dict(edges=EDGES, at=AT, block=BLOCK, progress=False)


def view(latents):
    """Three of the four channels as colours."""
    return np.moveaxis(np.clip(latents[0, :, :3] / 8 + 0.5, 0, 1), 1, -1)


def case(prompt, seed):
    r = np.random.default_rng(prompt)
    text = r.standard_normal((2, 6, 24)).astype(np.float32)
    noise = np.random.default_rng((prompt, seed)).standard_normal((1, *TINY_VIDEO.latents)).astype(np.float32)
    return Case(f"prompt {prompt}", seed, (text,), noise, 2.0)


@pytest.fixture(scope="module")
def subject():
    config = TINY_VIDEO.config
    return Subject(
        name="tiny", net=TINY_VIDEO.net(), grid=config.grid, sites=3, heads=2, head_dim=config.head_dim, steps=STEPS,
        sample=samplers.ddim, view=view, pixels=True, cases=[case(p, s) for p in (0, 1) for s in (0, 1)],
        calibration=[case(7, 0)], fitting=case(9, 0), heldout=case(8, 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def context(subject):
    samples = subject.capture(subject.calibration, AT, BLOCK)
    fitting = subject.capture([subject.fitting], AT, BLOCK)
    return Context(subject, samples, fitting, densities=(0.6,), edges=EDGES, block=BLOCK)


ROWS = [
    Row("PARO", 0.6),
    Row("PARO", 0.6, "PARO INT4"),
    Row("SpargeAttn", 0.6),
    Row("window", 0.05),
    Row("DiTFastAttn", 0.8),
]


@pytest.fixture(scope="module")
def table(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    return out, evaluation.evaluate(subject, out=out, rows=ROWS, **HOW)


def test_a_table_has_its_rows_and_says_what_it_could_not(table, subject):
    out, found = table
    dense, paro, int4, sparge, window, shared = found.rows
    assert [row["method"] for row in found.rows] == ["dense", *(row.method for row in ROWS)]
    assert dense["flow"] > 0 and dense["failed"] == paro["failed"] == 0
    assert 0.5 < paro["density"] <= 0.6 and paro["psnr"] > int4["psnr"] > 5 and paro["psnr_spread"] > 0
    assert paro["mask_cost"] == 0 and sparge["mask_cost"] > 0 and 0.5 < sparge["density"] < 0.7
    assert 0 < paro["attention_relative_l1"] < 0.5 < paro["attention_cosine"] <= 1 and paro["frechet"] > 0
    # A full step computes the window as well.
    part = float(policies.window(subject.grid, density=0.8 - 1 / 4, block=BLOCK).density)
    assert shared["density"] == pytest.approx((1 + 4 * part) / 4, abs=1e-5)
    assert shared["attention_relative_l1"] is None
    assert window["failed"] == 4 and window["psnr"] is None
    assert [failure["row"] for failure in found.failures] == ["window 0.05 bf16"]
    assert "density must be at least" in found.failures[0]["reason"]
    saved = json.loads((out / "eval.json").read_text())
    assert saved["rows"] == found.rows and saved["about"]["steps"] == STEPS
    text = (out / "eval.md").read_text()
    assert "| PARO | bf16 | 0.6 |" in text and "window 0.05 bf16: ValueError: density" in text
    assert (out / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_the_means_are_those_of_the_cells(table):
    out, found = table
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()[1:]]
    psnr = {(tuple(row), i): cell["psnr"] for row, i, cell in lines if "psnr" in cell}
    paro = np.array([psnr[("PARO", 0.6, "bf16"), i] for i in range(4)])
    sparge = np.array([psnr[("SpargeAttn", 0.6, "bf16"), i] for i in range(4)])
    row = found.rows[3]
    assert row["psnr"] == pytest.approx(sparge.mean()) and row["over_paro"] == pytest.approx((sparge - paro).mean())
    assert row["over_paro_error"] == pytest.approx(np.std(sparge - paro, ddof=1) / 2)
    by_seed = sparge.reshape(2, 2).mean(0)  # cases are prompts x seeds
    assert row["psnr_spread"] == pytest.approx(np.std(by_seed, ddof=1))
    assert found.rows[2]["over_paro"] == pytest.approx(
        np.mean([psnr[("PARO", 0.6, "PARO INT4"), i] for i in range(4)] - paro)
    )


def test_what_is_done_is_not_done_again(table, subject, monkeypatch):
    out, found = table
    before = (out / "cells.jsonl").read_text()
    whole, (kept, dropped) = before, before.rstrip("\n").rsplit("\n", 1)
    (out / "cells.jsonl").write_text(kept + "\n" + dropped[:20])  # killed while it wrote
    generated = []
    generate = Subject.generate

    def counting(self, case, setting):
        generated.append(setting.rule)
        return generate(self, case, setting)

    monkeypatch.setattr(Subject, "generate", counting)
    again = evaluation.evaluate(subject, out=out, rows=ROWS, **HOW)
    assert generated[:4] == [None] * 4 and len(generated) == 5, "the dense ones, to compare with, and what was cut off"
    assert [row["psnr"] for row in again.rows] == pytest.approx([row["psnr"] for row in found.rows])
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert len(lines) == len(whole.splitlines()) + 1 and all(json.loads(line) for line in lines)
    (out / "cells.jsonl").write_text(whole)
    with pytest.raises(ValueError, match="another folder"):
        evaluation.evaluate(subject, out=out, rows=ROWS, **{**HOW, "at": (1, 3)})


def test_a_static_row_is_the_model_called_with_its_plan(context, subject):
    plan = context.calibrated(0.6, rule="row")
    assert plan.lead == (2, 3) and plan.density <= 0.6
    first = subject.cases[0]

    def predict(x, t, step):
        return subject.net(x, t, *first.inputs, plan=plan.at_step(step, STEPS))

    latents = samplers.ddim(samplers.guided(predict, 2.0), jnp.asarray(first.noise), steps=STEPS)
    made = subject.generate(first, Setting(plan))
    np.testing.assert_allclose(made.view, view(np.asarray(latents)), atol=1e-5)
    assert made.density == pytest.approx(np.mean(plan.mask().keep))


def test_a_rule_sees_its_knobs_and_its_memory_and_its_density_is_counted(subject):
    dense = subject.dense(BLOCK)

    def rule(q, k, v, *, plan, knobs, memory, step):
        out = paro_jax.attention(q, k, v, plan=plan)
        return out, memory + 1, (knobs * (memory == step),)

    knobs = np.array([0.2, 0.4, 0.9], np.float32)
    made = subject.generate(subject.cases[0], Setting(dense, rule, knobs, np.zeros(3, np.int32)))
    assert made.density == pytest.approx(0.5)
    np.testing.assert_allclose(made.view, subject.generate(subject.cases[0], Setting(dense)).view, atol=1e-5)


DENSE_HERE = ("Radial", "Gilbert + SpargeAttn")  # on so small a grid everything is near
REACHES = [method for method in evaluation.METHODS if method.name not in ("SpargeAttn, tuned", "PARO", *DENSE_HERE)]


@pytest.mark.parametrize("method", REACHES, ids=lambda method: method.name)
def test_every_method_makes_a_setting_of_about_the_density(context, subject, method):
    """One attention call of the setting, without a generation: quick, and the density that it executes."""
    setting = method.prepare(context, 0.8)
    if method.name == "DiTFastAttn":
        density = np.mean(setting.knobs == policies.Share.FULL) + setting.plan.density
    else:
        samples = [s for s in context.samples if s.step == context.samples[0].step]
        references = [np.asarray(paro_jax.attention(s.q, s.k, s.v)) for s in samples]
        level = evaluation.attention_level(setting, samples, references)
        density = level["density"]
        assert 0 <= level["relative_l1"] < 0.6 and level["cosine"] > 0.8
    assert 0.45 < density < 0.85


def test_a_density_out_of_reach_is_an_error(context):
    for method in evaluation.METHODS:
        if method.name in (*DENSE_HERE, "window", "SparseVideoGen"):
            with pytest.raises(ValueError, match="density"):
                method.prepare(context, 0.05)


def test_fitted_knobs_come_from_below(context):
    plan = context.subject.dense(BLOCK)

    def policy(q, k, plan, knob):
        return policies.top_blocks(jnp.zeros((2, *plan.grid.blocks(BLOCK))), 0.5, block=BLOCK)

    assert (context.fit(lambda q, k, p, knob: policies.sparge(q, k, plan=p, topk=knob), plan, 0.8) < 0.8).all()
    with pytest.raises(ValueError, match="density"):
        context.fit(policy, plan, 0.8)


def test_a_method_that_fails_on_one_sample_is_a_marked_cell(subject, tmp_path):
    bad = subject.cases[1].noise

    made = []

    class Breaks(Subject):
        def generate(self, case, setting):
            found = Subject.generate(self, case, setting)
            made.append(case)
            return (
                dataclasses.replace(found, view=found.view * np.nan) if case.noise is bad and len(made) > 2 else found
            )

    breaks = Breaks(**{f.name: getattr(subject, f.name) for f in dataclasses.fields(subject)})  # what is compiled, too
    breaks = dataclasses.replace(breaks, cases=subject.cases[:2])
    found = evaluation.evaluate(breaks, out=tmp_path, rows=[Row("window", 0.6), Row("no reorder", 0.6)], **HOW)
    assert [row["failed"] for row in found.rows] == [0, 1, 1] and all(row["psnr"] for row in found.rows[1:])
    assert {failure["reason"] for failure in found.failures} == {"ValueError: the sample is not finite"}
    assert "failed" in found.markdown()


def test_extractors_are_asked_and_checked(subject, tmp_path):
    asked = []

    def images(frames):
        asked.append(frames.shape)
        return frames.mean((1, 2))

    use = evaluation.Extractors(
        features=lambda videos: videos.mean((2, 3)).reshape(len(videos), -1), flow=None, images=images,
        texts=lambda captions: np.ones((len(captions), 3)), vqa=lambda videos, captions: videos.mean((1, 2, 3, 4)),
    )  # fmt: skip
    two = dataclasses.replace(subject, cases=subject.cases[:2])
    found = evaluation.evaluate(two, out=tmp_path / "a", rows=[Row("window", 0.6)], extractors=use, **HOW)
    row = found.rows[1]
    assert 0.9 < row["clip"] <= 1 and 0 < row["vqa"] < 1 and row["frechet"] > 0 and "flow" not in row["method"]
    assert row["flow"] is None and set(asked) == {(3, 8, 12, 3)}
    wrong = evaluation.Extractors(features=lambda videos: np.zeros(5))
    with pytest.raises(ValueError, match="extractor"):
        evaluation.evaluate(two, out=tmp_path / "b", rows=[Row("window", 0.6)], extractors=wrong, **HOW)


def test_unknown_names_are_refused(subject, tmp_path, says):
    for row, words in ((Row("PARQ", 0.5), ("method", "PARO", "PARQ")), (Row("PARO", 0.5, "int3"), ("width", "int3"))):
        with says(*words):
            evaluation.evaluate(subject, out=tmp_path, rows=[row], **HOW)


def test_the_command_lists_and_refuses(capsys, tmp_path):
    status, printed, _ = paro(capsys, "eval", "--list", "--json")
    assert status == 0 and {m["method"] for m in only_json(printed)["methods"]} >= {"PARO", "SpargeAttn", "STA"}
    for argv, words in (
        (["--methods", "PARQ"], ("--methods", "PARQ", "PARO")),
        (["--widths", "int3"], ("--widths", "int3")),
        (["--vqa", "nowhere:score"], ("--vqa", "nowhere")),
        (["--clip-images", "math:sin"], ("--clip-texts",)),
        (["--weights", "x"], ("--weights", "demo")),
        (["--steps", "1001"], ("--steps", "1000")),
        (["--model", "wan"], ("--model wan", "--weights")),
    ):
        status, printed, err = paro(capsys, "eval", *argv, "--out", tmp_path / "e")
        assert status == 2 and not printed and err.count("\n") == 1, err
        assert all(word in err for word in words), err


def test_a_published_model_from_the_shell(capsys, tmp_path, models):  # noqa: F811
    folder, path = models["wan"]
    argv = ["--model", "wan", "--weights", folder, "--embeddings", path, *SIZE["wan"], "--methods", "PARO", "window"]
    more = ["--density", 0.8, "--block", 8, 8, "--steps", 2, "--out", tmp_path / "eval", "--json"]
    status, printed, err = paro(capsys, "eval", *argv, *more)
    assert status == 0, err
    dense, *rows = only_json(printed)["rows"]
    assert dense["method"] == "dense" and [row["method"] for row in rows] == ["PARO", "window"]
    assert all(row["psnr"] > 10 and 0.75 < row["density"] < 0.81 and row["failed"] == 0 for row in rows)
    status, _, err = paro(capsys, "eval", *argv, *more, "--prompts", 2)
    assert status == 2 and "--prompts" in err and "at most 1" in err
