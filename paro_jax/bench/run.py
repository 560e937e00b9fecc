"""One row after the other, within a budget; what is known of all of them is kept after each."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from paro_jax.bench.jobs import Job

Row = dict[str, Any]
Ask = Callable[[Job, float], Row]  # (job, seconds it may take) -> its row
_LEAST = 10.0  # seconds that a row has, however little is left
GOOD = ("measured", "missing", "not reached")


def run(
    jobs: Sequence[Job],
    ask: Ask,
    *,
    limit: float,
    budget: float | None = None,
    known: Iterable[Row] = (),
    note: Callable[[str], None] = lambda message: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """A row for every job, in their sequence; `keep` gets those so far after each.

    limit: seconds a row may take. budget: seconds for all rows; those it does not reach are named so. known: rows of an
    earlier run, which are taken over where they were measured or are missing.
    """
    start, rows, hung = clock(), [], {}
    earlier = {row["job"]: row for row in known if row["status"] in ("measured", "missing")}
    for number, job in enumerate(jobs, 1):
        spent = clock() - start
        left = None if budget is None else budget - spent
        if (row := earlier.get(str(job))) is None:
            # Ceilings are soon measured, and the last one tells whether the GPU slowed down.
            if budget is not None and spent >= budget and job.kind != "ceiling":
                row = _not_reached(job, budget)
            elif (what := _call(job)) in hung:  # a kernel that waits for itself would take the time of all others
                row = {**job.facts, "status": "failed", "reason": f"not tried: {hung[what]} gave no answer"}
            else:
                note(f"[{number}/{len(jobs)}, {spent:.0f} s] {job}")
                row = ask(job, limit if left is None else max(_LEAST, min(limit, left)))
                if row["status"] == "timed out":
                    hung[what] = str(job)
                    cut = budget if left is not None and left < limit else None
                    row = {**row, "status": "failed"} if cut is None else _not_reached(job, cut)
                if row["status"] not in GOOD:
                    note(f"  {row['status']}: {row['reason']}")
        rows.append(row)
        keep(rows)
    return rows


def status(rows: Iterable[Row]) -> int:
    """The exit status: 1 where a row failed or ran out of memory, or none of ours was measured.

    What is missing here is no failure.
    """
    rows = list(rows)
    ours = [row["status"] for row in rows if row["kind"] in ("attention", "tune")]
    return int(any(row["status"] not in GOOD for row in rows) or (bool(ours) and "measured" not in ours))


def _call(job: Job) -> tuple[str, ...]:
    """What rows share that differ in their masks only."""
    return job.name, job.contestant, job.qk, job.pv, str(job.tiles)


def _not_reached(job: Job, budget: float) -> Row:
    return {**job.facts, "status": "not reached", "reason": f"the {budget:.0f} s for all rows were spent"}
