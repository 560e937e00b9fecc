"""How long a launch takes by the order in which its items are begun: `python -m pallas_kernels.bench.launch`.

Arithmetic, no timing: 132 cores, each doing one item after another; an item takes a step for each kept block, and some
steps (LOST) in which its core multiplies nothing. A program that ends with its item loses the launch, the first fetch
and the way out; one that goes on to its next item fetches that while it still multiplies.
"""

import argparse
import heapq
import json
from typing import Any

import numpy as np

from pallas_kernels.block_attention._work import TOGETHER

Row = dict[str, Any]

CORES = 132  # of an H100 or H200
LOST = {"a program an item": 3.0, "programs that go on": 1.0}  # steps; a step is half a microsecond
# Name, heads x batch, rows and key blocks of 128 tokens, bytes of K and V of a head at int8.
SHAPES = (
    ("CogVideoX-5B", 96, 139, 139, 2 * 17776 * 64),
    ("FLUX 1024", 24, 36, 36, 2 * 4608 * 128),
    ("FLUX 2048", 24, 132, 132, 2 * 16896 * 128),
    ("Wan-14B 480p", 40, 256, 256, 2 * 32760 * 128),
    ("Wan-14B 720p", 40, 591, 591, 2 * 75600 * 128),
)


def counts(kind: str, heads: int, rows: int, blocks: int, density: float) -> np.ndarray:
    """Kept blocks int [heads, rows]: "even", every block by the same chance, or "uneven": heads and rows differ."""
    rng = np.random.default_rng(0)
    if kind == "even":
        return rng.binomial(blocks, density, (heads, rows))
    head = np.clip(density * rng.uniform(0.3, 2.0, (heads, 1)) / 1.15, 0, 1)
    row = rng.lognormal(-0.125, 0.5, (heads, rows))
    return np.clip(head * row * blocks, 1, blocks).astype(int)


def finish(items: np.ndarray, lost: float, cores: int = CORES) -> float:
    """Steps until the last core is done, when whoever is free begins the next item."""
    busy = [0.0] * cores
    for item in items:
        heapq.heappush(busy, heapq.heappop(busy) + float(item) + lost)
    return max(busy)


def dealt(items: np.ndarray, lost: float, cores: int = CORES) -> float:
    """The same where items are dealt in turn, there and back again, and nobody waits for who is free."""
    busy = np.zeros(cores)
    for turn, first in enumerate(range(0, len(items), cores)):
        some = items[first : first + cores]
        place = np.arange(len(some))
        busy[cores - 1 - place if turn % 2 else place] += some + lost
    return float(busy.max())


def rows() -> list[Row]:
    """One row per shape and mask: steps over those that 132 cores need when none is lost and none waits."""
    out: list[Row] = []
    alone, on = LOST.values()
    for name, heads, nq, nk, size in SHAPES:
        for kind, density in (("even", 1.0), ("even", 0.2), ("uneven", 0.5), ("uneven", 0.2)):
            count = -np.sort(-counts(kind, heads, nq, nk, density), axis=1)
            together = max(1, TOGETHER // size)
            grouped = [-np.sort(-count[i : i + together].reshape(-1)) for i in range(0, heads, together)]
            by_head, by_group = count.reshape(-1), np.concatenate(grouped)
            least = count.sum() / CORES
            out.append(
                {
                    "workload": name,
                    "mask": f"{kind}, {density:.0%}",
                    "by head, a program an item": finish(by_head, alone) / least,
                    "by group, a program an item": finish(by_group, alone) / least,
                    "by group, dealt": dealt(by_group, on) / least,
                    "by group, drawn": finish(by_group, on) / least,
                }
            )
    return out


def table(rows: list[Row]) -> str:
    """The rows as the table in NOTES.md."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else x for x in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.launch", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    found = rows()
    print(json.dumps(found, indent=1) if parser.parse_args().json else table(found))


if __name__ == "__main__":
    main()
