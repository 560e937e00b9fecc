"""PyTorch's attention on tensors in files, timed: a program for any Python that has torch, of `peers.Torch`.

Reads a JSON line per job, answers each with one: {"ms", "low_ms", "high_ms", "wall_ms", "runs", "sets", "timer"}, or
{"missing": why}, or {"failed": why}. Needs torch and numpy, and nothing of this package.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path


def main() -> int:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    held = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            answer = {
                "missing": f"torch cannot be imported by {sys.executable} ({error}); --torch-python names another"
            }
        else:
            try:
                answer = run(torch, job, held)
            except Exception as error:  # a peer that throws is a row that says so
                answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def run(torch, job: dict, held: dict) -> dict:
    device = "cuda" if job["gpu"] else "cpu"
    if job["gpu"] and not torch.cuda.is_available():
        return {"missing": f"torch {torch.__version__} of {sys.executable} sees no GPU"}
    folder = Path(job["folder"])
    stamp = tuple((folder / f"{name}.npy").stat().st_mtime_ns for name in "qkv")
    if held.get("stamp") != stamp:
        held.pop("sets", None)  # two of them may not fit
        held.update(stamp=stamp, sets=tensors(torch, folder, job["dtype"], device))
    sets = held["sets"]
    if job["peer"] == "torch sdpa":
        call = torch.nn.functional.scaled_dot_product_attention
    else:
        call = flex(torch, sets[0], folder, job["block"], held)
    with torch.no_grad():
        return timed(torch, call, sets, job, folder)


def tensors(torch, folder: Path, dtype: str, device: str) -> list:
    """Sets of (q, k, v) to take turns, together past the L2 of a GPU."""
    import numpy as np

    one = []
    for name in "qkv":
        x = torch.from_numpy(np.load(folder / f"{name}.npy").astype("int16" if dtype == "bfloat16" else dtype))
        one.append((x.view(torch.bfloat16) if dtype == "bfloat16" else x).to(device))
    size = sum(x.nbytes for x in one)
    return [one] + [
        [x.clone() for x in one] for _ in range(min(8 if device == "cuda" else 2, -(-(192 << 20) // size)) - 1)
    ]


def flex(torch, one: list, folder: Path, block: list, held: dict):
    """FlexAttention compiled, with the kept blocks as its full blocks, which need no mask function."""
    import numpy as np
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        BlockMask,
        flex_attention,
    )

    keep = np.load(folder / "keep.npy")[None]
    order = np.argsort(~keep, axis=-1, kind="stable").astype("int32")
    count, index = (torch.from_numpy(x).to(one[0].device) for x in (keep.sum(-1).astype("int32"), order))
    tokens = one[0].shape[2]
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count), index, count, index, BLOCK_SIZE=tuple(block), seq_lengths=(tokens, tokens)
    )
    compiled = held.setdefault("flex", torch.compile(flex_attention, dynamic=False))
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def timed(torch, call, sets: list, job: dict, folder: Path) -> dict:
    """Median and quartiles: of CUDA events around each of many calls in a row, or of the host's clock on a CPU."""
    import numpy as np

    gpu, turn = job["gpu"], 0
    wait = torch.cuda.synchronize if gpu else lambda: None

    def once():
        nonlocal turn
        turn += 1
        return call(*sets[turn % len(sets)])

    np.save(folder / "out.npy", call(*sets[0]).float().cpu().numpy())
    once()
    wait()
    start = time.perf_counter()
    once()
    wait()
    each = time.perf_counter() - start
    runs = int(max(5, min(100, job["seconds"] / max(each, 1e-6))))
    if gpu:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(runs)]
        start = time.perf_counter()
        for before, after in marks:
            before.record()
            once()
            after.record()
        wait()
        wall = time.perf_counter() - start
        times = [before.elapsed_time(after) for before, after in marks]
    else:
        times, start = [], time.perf_counter()
        for _ in range(runs):
            began = time.perf_counter()
            once()
            times.append(1e3 * (time.perf_counter() - began))
        wall = time.perf_counter() - start
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "low_ms": low, "high_ms": high, "wall_ms": 1e3 * wall / runs, "runs": runs,
            "sets": len(sets), "timer": "events" if gpu else "host", "version": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
