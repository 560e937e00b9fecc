"""The state of a calibration, and the file it survives in when the run is killed."""

import json
import os
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from calibrate._score import Task
from paro_jax import _files

_FORMAT = "paro_jax calibration checkpoint 3"
_EVERY = 30.0  # seconds between two saves; a save may also take no more than a twentieth of the time


@dataclass
class Sum:
    """A running mean: a sum and how many went in. Refuses what would broadcast."""

    total: np.ndarray
    count: int = 0

    def add(self, x: np.ndarray) -> None:
        if x.shape != self.total.shape:
            raise ValueError(f"a running sum of shape {self.total.shape} cannot take {x.shape}.")
        self.total += x
        self.count += 1

    @property
    def mean(self) -> np.ndarray:
        return self.total / np.asarray(self.count, self.total.dtype)


Sums = dict[tuple[int, ...], Sum]


@dataclass
class State:
    """Everything that calibration remembers of the samples it saw.

    `digests`: one number per sample, of the first pass. `errors` {(bucket, site): float64 [densities, orders,
    heads]}; `mass` {(density, bucket, site): float32 [heads, nq, nk]}, and `block_errors` alike, which only the rule
    "error" fills; `k` {(bucket, site): float64 [heads, D]}.
    `passed`: samples that the orders pass and the mass pass have behind them.
    """

    digests: list[int] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=lambda: {"orders": 0, "mass": 0})
    finished: dict[str, bool] = field(default_factory=lambda: {"orders": False, "mass": False})
    errors: Sums = field(default_factory=dict)
    mass: Sums = field(default_factory=dict)
    block_errors: Sums = field(default_factory=dict)
    k: Sums = field(default_factory=dict)


def over_buckets(sums: Sums, site: int) -> np.ndarray:
    """The mean over buckets of each bucket's mean: a bucket that was sampled more often does not count for more."""
    means = [sums[key].mean for key in sorted(sums) if key[-1] == site]
    return np.mean(means, axis=0)


def add(sums: Sums, key: tuple[int, ...], x: np.ndarray) -> None:
    """Add `x` to the mean of `key`, which starts with it."""
    if key not in sums:
        sums[key] = Sum(np.zeros_like(x))
    sums[key].add(x)


class Checkpoint:
    """Saves a `State` to a file now and then, atomically. Without a path it does nothing."""

    def __init__(self, path: str | os.PathLike | None, task: Task):
        self.path = None if path is None else _files.expanded(path, "a checkpoint")
        # Through JSON, so that tuples compare as the file has them.
        self.settings = json.loads(json.dumps(asdict(task) | {"objective": repr(task.objective)}))
        self.saved = self.cost = float("-inf")
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> State:
        """The state of the file, or a new one when there is no file.

        Raises ValueError for another kind of file, a damaged one, and one that was written under other settings.
        """
        if self.path is None or not self.path.exists():
            return State()
        advice = "Delete it to start anew, or pass another path."
        try:
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            written = header["format"]
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
            raise ValueError(
                f"checkpoint {self.path} is not a whole calibration checkpoint ({error}). {advice}"
            ) from error
        if written != _FORMAT:
            raise ValueError(f"checkpoint {self.path}: expected {_FORMAT!r}, found {written!r}. {advice}")
        for name, here in self.settings.items():
            if header["settings"].get(name) != here:
                there = header["settings"].get(name)
                raise ValueError(
                    f"checkpoint {self.path} was written by a run with {name} = {there!r}, this one has {here!r}. "
                    f"{advice}"
                )
        state = State(header["digests"], header["passed"], header["finished"])
        for name, (part, *key, count) in header["sums"].items():
            getattr(state, part)[tuple(key)] = Sum(arrays[name], count)
        return state

    def save(self, state: State, *, now: bool = False) -> None:
        """Save unless that was done a moment ago. A disk that is full costs a warning, not the run."""
        start = time.monotonic()
        if self.path is None or not (now or start - self.saved >= max(_EVERY, 20 * self.cost)):
            return
        try:
            self._write(self.path, state)
        except OSError as error:
            warnings.warn(f"checkpoint {self.path} could not be saved ({error}); calibration goes on.", stacklevel=2)
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def done(self) -> None:
        """The plan exists: the file has served."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, path: Path, state: State) -> None:
        arrays, index = {}, {}
        for part in ("errors", "mass", "block_errors", "k"):
            for key, entry in getattr(state, part).items():
                name = f"a{len(arrays)}"
                arrays[name], index[name] = entry.total, [part, *key, entry.count]
        header = {"format": _FORMAT, "settings": self.settings, "sums": index}
        header |= {"digests": state.digests, "passed": state.passed, "finished": state.finished}
        with _files.replacing(path) as new, open(new, "xb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
