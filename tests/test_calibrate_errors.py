"""Bad samples and bad arguments: what the message names."""

import numpy as np
import pytest
from samples import make, sample, samples

import calibrate
from calibrate import Sample
from paro_jax import TokenGrid


def nan_in(role, at=2):
    given = samples()
    bad = np.array(getattr(given[at], role))
    bad[0, 5, 1, 3] = np.nan if role == "q" else np.inf
    given[at] = given[at]._replace(**{role: bad})
    return given


def other(**change):
    given = samples()
    given[3] = given[3]._replace(**change)
    return given


FLOAT = np.float32
BAD_SAMPLES = {
    "empty": ([], "samples must hold at least one calibrate.Sample; it is empty"),
    "generator": ((s for s in samples()), "samples must be an iterable .* iterated again.*got generator.*__iter__"),
    "not iterable": (7, "samples must be an iterable .*got int"),
    "not a sample": ([samples()[0], (1, 2, 3)], "samples must hold calibrate.Sample.*number 1 is a tuple"),
    "NaN in q": (nan_in("q"), r"q of site 0, step 0\.6 \(bucket 1\) holds NaN or infinity, 1 of 1024 values"),
    "inf in k": (nan_in("k", 1), r"k of site 1, step 0\.1 \(bucket 0\) holds NaN or infinity, 1 of 1024 values"),
    "inf in v": (nan_in("v"), r"v of site 0, step 0\.6 \(bucket 1\) holds NaN or infinity"),
    "gap": ([sample(0), sample(2)], "number sites from 0 without gaps; the highest is 2, but there is none of site 1"),
    "no site 0": ([sample(1)], "without gaps; the highest is 1, but there is none of site 0"),
    "bucket": (samples(steps=(0.1,)), r"none for bucket 1 \(steps from 0\.5 to under 1\) of site 0, 1.*bucket_edges"),
    "bucket of one site": (samples()[:3], r"none for bucket 1 .* of site 1"),
    "site": (other(site=-1), "site must be the number of an attention layer, an int from 0; number 3 has -1"),
    "site type": (other(site="1"), "site must be .*number 3 has '1'"),
    "step": (other(step=1.0), r"step must be a fraction of the schedule in \[0, 1\).*number 3 \(site 1\) has 1\.0"),
    "step NaN": (other(step=float("nan")), "step must be a fraction .*has nan"),
    "step type": (other(step="half"), "step must be a fraction .*has 'half'"),
    "rank": (other(q=np.zeros((64, 2, 8), FLOAT)), r"q of site 1, step 0\.6 .* \[B, 64, heads, D\] .*got \[64, 2, 8\]"),
    "tokens": ([sample(grid=TokenGrid((60,)))], r"heads, D\] for 64 tokens \(grid \(3, 4, 5\), text 4\).*\[1, 60"),
    "k unlike q": (other(k=np.zeros((1, 64, 2, 4), FLOAT)), r"k of .*got \[1, 64, 2, 4\] \(q is \[1, 64, 2, 8\]\)"),
    "v unlike q": (other(v=np.zeros((1, 64, 1, 8), FLOAT)), r"v of .*got \[1, 64, 1, 8\] \(q is \[1, 64, 2, 8\]\)"),
    "two shapes": (
        [sample(0, 0.1), sample(1, 0.6, heads=3)],
        r"heads and head dim; site 0, step 0\.1 .* has \[1, 64, 2, 8\], site 1, step 0\.6 .* has \[1, 64, 3, 8\]",
    ),
    "two head dims": ([sample(0, 0.1), sample(1, 0.6, dim=16)], "same heads and head dim"),
    "integers": (other(q=np.zeros((1, 64, 2, 8), np.int32)), "q of .* must be floating point; got int32"),
    "overflow": ([Sample(0, 0.0, *np.full((2, 1, 64, 2, 8), 1e20, FLOAT))], "of site 0, step 0 .* beyond float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAMPLES)
@pytest.mark.parametrize("orders", [None, ["FHW"]], ids=["two passes", "one pass"])
def test_bad_samples(name, orders):
    given, named = BAD_SAMPLES[name]
    with pytest.raises(ValueError, match=named):
        make(given, bucket_edges=(0, 0.5, 1), orders=orders)


BAD_ARGUMENTS = {
    "density 0": ({"density": 0.0}, r"density must be kept blocks / all blocks, in \(0, 1\]; got 0\.0"),
    "density above 1": ({"density": 1.5}, r"density must be .*got 1\.5"),
    "density NaN": ({"density": float("nan")}, "density must be .*got nan"),
    "density type": ({"density": "0.5"}, "density must be .*got '0.5'"),
    "floor": (
        {"density": 0.4},
        r"density must be at least 0\.4375 here: 7 of a head's 4 x 4 blocks .*got 0\.4, which is 6 blocks",
    ),
    "objective": (
        {"objective": "best"},
        "objective must be one of 'mass', 'paro', 'error', or a calibrate.ParoMetric; got 'best'",
    ),
    "order": ({"orders": ["FHW", "XYZ"]}, "order must be one of FHW, FWH.*got 'XYZ'"),
    "brick of no grid": ({"orders": ["brick2x2x2"]}, "got 'brick2x2x2'"),
    "no orders": ({"orders": []}, r"orders must be a sequence of names of grid\.orders \(FHW, .*got \[\]"),
    "orders a string": ({"orders": "FHW"}, "orders must be a sequence .*got 'FHW'"),
    "orders a number": ({"orders": 5}, "orders must be a sequence .*got 5"),
    "orders of numbers": ({"orders": [1]}, "order must be one of FHW, .*got 1"),
    "rule": ({"rule": "columns"}, "rule must be one of 'global', 'head', 'row', 'error'; got 'columns'"),
    "edges": (
        {"bucket_edges": (0, 0.7, 0.5, 1)},
        r"bucket_edges must increase from 0\.0 to 1\.0.*got \(0, 0\.7, 0\.5, 1\)",
    ),
    "edges end": ({"bucket_edges": (0, 0.5)}, "bucket_edges must increase"),
    "edges type": ({"bucket_edges": 4}, "bucket_edges must increase .*got 4"),
    "block": ({"block": (16, 0)}, r"block must be .*got \(16, 0\)"),
    "block a number": ({"block": 16}, "block must be .*got 16"),
    "grid": ({"grid": (3, 4, 5)}, r"grid must be a TokenGrid; got \(3, 4, 5\)"),
    "quant": ({"quant": "int8"}, "quant must be a QuantSpec; got 'int8'"),
    "heldout generator": ({"heldout": (s for s in samples())}, "heldout must be an iterable .*got generator"),
    "heldout heads": (
        {"heldout": [sample(heads=3)]},
        r"heldout must hold samples of the sites that were calibrated.*got site 0, step 0 \(bucket 0\), 3 heads of 8",
    ),  # fmt: skip
    "heldout site": ({"heldout": [sample(2)]}, "heldout must hold samples .*sites 0 to 1, 2 heads of 8; got site 2"),
    "heldout NaN": ({"heldout": nan_in("q")}, r"heldout: q of site 0, step 0\.6 \(bucket 0\) holds NaN"),
    "no v": (
        {"objective": "error", "given": samples(v=False)},
        'objective "error" needs v in every sample; site 0, step 0.1',
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    change, named = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=named):
        make(**change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": 0}, "eps must be a positive number.*got 0"),
        ({"eps": float("nan")}, "eps must be .*got nan"),
        ({"sigma": 1.2}, r"sigma must be in \[0, 1\]; got 1\.2"),
        ({"alpha": -1}, r"alpha must be in \[0, 1\]; got -1"),
        ({"sign": 0}, r"sign must be \+1 .*got 0"),
    ],
)
def test_bad_options_of_the_papers_metric(change, named):
    with pytest.raises(ValueError, match=named):
        calibrate.ParoMetric(**change)


def test_samples_that_change():
    class Changing:
        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter([sample(seed=self.seed)])

    with pytest.raises(
        ValueError, match="samples must be the same each time.*number 0, site 0, step 0 .*Fix the seeds"
    ):
        make(Changing())

    class Shrinking(Changing):
        def __iter__(self):
            self.seed += 1
            return iter([sample(seed=i) for i in range(3 - self.seed)])

    with pytest.raises(ValueError, match="there were 2, now there are 1"):
        make(Shrinking())

    class Growing(Changing):
        def __iter__(self):
            self.seed += 1
            return iter([sample(site) for site in range(self.seed)])

    for orders in (None, ["FHW", "WFH"]):
        with pytest.raises(
            ValueError, match=r"there were 1, now there are more: number 1 is site 1, step 0 \(bucket 0\)"
        ):
            make(Growing(), orders=orders)


def test_another_v_is_another_sample():
    class Changing:
        seed = 0.0

        def __iter__(self):
            self.seed += 1
            return iter([sample()._replace(v=np.full((1, 64, 2, 8), self.seed, FLOAT))])

    with pytest.raises(ValueError, match="number 0, site 0, step 0 .*is not what it was"):
        make(Changing(), objective="error")


@pytest.mark.parametrize("role", "qkv")
def test_one_channel_more_is_another_sample(role):
    """A digest that looks at every D-th number would only see the first channel."""
    given = Sample(0, 0.0, *np.zeros((3, 1, 64, 16, 64), FLOAT))
    other = given._replace(**{role: np.broadcast_to(np.arange(64, dtype=FLOAT), given.q.shape)})
    first, second = (next(calibrate._capture.read([s], TokenGrid((64,)), (0.0, 1.0))).digest() for s in (given, other))
    assert first != second


@pytest.mark.parametrize("densities", [None, [], "0.5", (d for d in ())], ids=["None", "empty", "text", "spent"])
def test_densities_that_are_none(densities):
    with pytest.raises(ValueError, match="densities must be a sequence of at least one density"):
        calibrate.make_plans(samples(), TokenGrid((64,)), densities=densities)


def test_a_mistake_in_what_is_held_out_is_known_before_the_work(monkeypatch):
    def never(*args):
        raise AssertionError("worked before it looked at heldout")

    monkeypatch.setattr(calibrate._make_plan._score, "errors", never)
    for heldout, named in (([sample(heads=3)], "heldout must hold samples of .* 3 heads of 8"), ([7], "is a int")):
        with pytest.raises(ValueError, match=named):
            make(heldout=heldout)
