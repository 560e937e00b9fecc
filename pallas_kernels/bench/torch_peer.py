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
                answer = {"failed": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def reason(error: Exception) -> str:
    """What an exception says, shortened; of a compiler's output the first line with an error, which is far down."""
    said = str(error)
    wrong = next((line for line in said.splitlines() if "error:" in line), "")
    return f"{type(error).__name__}: {' '.join((said[:200] + ' ... ' + wrong if wrong else said).split())[:400]}"


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
        [x.clone() for x in one] for _ in range(min(64 if device == "cuda" else 2, -(-(192 << 20) // size)) - 1)
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
    # No partial blocks. Their index is another tensor: the CPU's compiler declares one that is passed twice only once.
    partial = torch.zeros_like(count), torch.zeros_like(index)
    mask = BlockMask.from_kv_blocks(*partial, count, index, BLOCK_SIZE=tuple(block), seq_lengths=(tokens, tokens))
    if "flex" not in held:
        # After 8 shapes torch would go on without compiling: all scores in memory, and the kept blocks not asked.
        # fullgraph raises instead.
        torch._dynamo.config.recompile_limit = 256
        held["flex"] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # Its tiles must fit into the blocks of the mask; the default ones are of up to 128.
    small = {"BLOCK_M": min(128, block[0]), "BLOCK_N": min(64, block[1])}
    options = small if one[0].is_cuda and min(block) < 128 else None
    return lambda q, k, v: held["flex"](q, k, v, block_mask=mask, kernel_options=options)


def timed(torch, call, sets: list, job: dict, folder: Path) -> dict:
    """Median and quartiles: of CUDA events around each of many calls in a row, or of the host's clock on a CPU."""
    import numpy as np

    gpu, turn = job["gpu"], 0
    wait = torch.cuda.synchronize if gpu else lambda: None

    def once():
        nonlocal turn
        turn += 1
        return call(*sets[turn % len(sets)])

    np.save(folder / "out.npy", call(*sets[0])[-1:].float().cpu().numpy())  # the last batch entry is checked
    once()
    wait()
    start = time.perf_counter()
    once()
    wait()
    each = time.perf_counter() - start
    runs = int(max(5, min(100, job["seconds"] / max(each, 1e-6))))
    start = time.perf_counter()
    for _ in range(runs):
        once()
    wait()
    wall = time.perf_counter() - start
    if gpu:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(runs)]
        # The GPU waits for about as long as all calls took, so that the host gets ahead: else the events around short
        # kernels time the host. In cycles of some 2 GHz.
        torch.cuda._sleep(int(2e9 * min(1.0, wall)))
        for before, after in marks:
            before.record()
            once()
            after.record()
        wait()
        times = [before.elapsed_time(after) for before, after in marks]
    else:
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            once()
            times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "low_ms": low, "high_ms": high, "wall_ms": 1e3 * wall / runs, "runs": runs,
            "sets": len(sets), "timer": "events" if gpu else "host", "version": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
