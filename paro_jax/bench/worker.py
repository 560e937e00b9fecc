"""A process that measures rows, and the handle on it: one that crashes, hangs or spoils its GPU costs one row.

The parent never touches the device. Jobs go in and rows come out as JSON lines; the first line out says what machine
this is. `python -m paro_jax.bench.worker` is the process.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pallas_kernels.bench.peers import FOLDER
from paro_jax.bench.jobs import Job, Settings

Row = dict[str, Any]
START_S = 180.0  # a start may take this long: imports, and a GPU's driver


class Worker:
    """`ask` for a row; a process that is gone is started anew. `close` it."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "paro_jax.bench.worker")):
        self.command = list(command)
        # A GPU is shared with PyTorch's process: memory is taken as it is needed.
        self.environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        self.process: subprocess.Popen | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader: threading.Thread | None = None
        self.said: Any = None

    def machine(self, limit: float = START_S) -> Row:
        """What the process runs on: `machine.machine()`, or {"problem": why there is none}. limit: seconds to start."""
        self.close()
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.said = tempfile.TemporaryFile("w+", errors="replace")
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.said, text=True, start_new_session=True, env=self.environment | {"PYTHONPATH": path},
        )  # fmt: skip
        self.reader = threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True)
        self.reader.start()
        found = self._answer(limit)
        return found if "failed" not in found else {"problem": found["failed"]}

    def ask(self, job: Job, settings: Settings, limit: float) -> Row:
        """The row of `job`; of status "failed", with what the process said last, where it ended or took over `limit` s.

        The time that a new process needs to start is not counted; it may take as long, or a minute where that is more.
        """
        start = min(START_S, max(60.0, limit))
        if self.process is None and (problem := self.machine(start).get("problem")) is not None:
            return {**job.facts, "status": "failed", "reason": problem}
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: the answer says so
            self.process.stdin.write(json.dumps({"job": asdict(job), "settings": asdict(settings)}) + "\n")
            self.process.stdin.flush()
        row = self._answer(limit)
        if "failed" in row:
            return {**job.facts, "status": row["status"], "reason": row["failed"]}
        if row.pop("poisoned", False):
            self.close()
        return row

    def close(self) -> None:
        """End the process and what it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}{self.process.pid}-*"):
                shutil.rmtree(folder, ignore_errors=True)  # tensors for PyTorch
            if self.reader is not None:  # it ends with the stream
                self.reader.join(timeout=5)
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self.process = None
        if self.said is not None:
            self.said.close()
            self.said = None

    def _answer(self, limit: float) -> Row:
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            return {"failed": f"no answer within {limit:g} s", "status": "timed out"}
        if line is not None:
            return json.loads(line)
        assert self.process is not None
        status, last = self.process.wait(), self._last_words()
        self.close()
        if status == -signal.SIGKILL:
            why = "the process was killed, by the system if it ran out of memory"
            return {"failed": f"{why}: {last}", "status": "out of memory"}
        name = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return {"failed": f"the process ended with {name}: {last}", "status": "failed"}

    def _last_words(self) -> str:
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        return " | ".join(lines[-2:])[-400:] or "without a word"


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def main() -> int:
    """The process: a line about the machine, then a row for each job on stdin."""
    # What libraries print must not get between the rows.
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: Row) -> None:
        from paro_jax.bench.machine import plain

        rows.write(json.dumps(plain(value)) + "\n")
        rows.flush()

    from paro_jax.bench.machine import machine
    from paro_jax.bench.measure import measure

    say(machine())
    for line in sys.stdin:
        given = json.loads(line)
        say(measure(Job(**given["job"]), Settings.of_json(given["settings"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
