"""Machine code as nvdisasm prints it: the main loop of a kernel, and which of its steps jump over what."""

import collections
import re
from collections.abc import Callable
from typing import NamedTuple

_TENSOR = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")


class Loop(NamedTuple):
    """The main loop of a kernel: opcodes with their modifiers, in order.

    `instructions`: those of a step that takes every shortcut; `every`: also those that some steps jump over, such as
    masking the keys past the end or rescaling the output where a maximum rose.
    """

    instructions: list[str]
    every: list[str]


def tensor(instructions: list[str]) -> list[str]:
    """The tensor instructions among some."""
    return [op for op in instructions if op.split(".")[0] in _TENSOR]


class _Instruction(NamedTuple):
    name: str
    target: str | None  # the label it may jump to
    falls: bool  # whether the next instruction may follow


def main_loop(sass: str, wanted: Callable[[list[str]], list[str]] = tensor) -> Loop:
    """The innermost loop with the most tensor instructions, or others that are wanted, in nvdisasm's text."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.x]+)([^;]*)", line):
            predicate, name, operands = found.groups()
            target = re.search(r"L_x_\d+", operands) if name.startswith("BRA") else None
            always = not predicate and not re.search(r"U?P\d|UR\d", operands)
            ends = name.startswith(("BRA", "EXIT", "RET")) and always
            code.append(_Instruction(name, target[0] if target else None, not ends))
    jumps = {i: labels[op.target] for i, op in enumerate(code) if op.target in labels}
    follow = [
        ([i + 1] if op.falls and i + 1 < len(code) else []) + ([jumps[i]] if i in jumps else [])
        for i, op in enumerate(code)
    ]
    before: list[list[int]] = [[] for _ in code]
    for i, after in enumerate(follow):
        for j in after:
            before[j].append(i)

    heads: dict[int, list[int]] = {}
    for i, start in jumps.items():
        if start <= i:
            heads.setdefault(start, []).append(i)
    loops: list[tuple[set[int], Loop]] = []
    for start, ends in heads.items():
        inside, todo = {start}, list(ends)
        while todo:  # what reaches the jump back without passing the start
            if (i := todo.pop()) not in inside:
                inside.add(i)
                todo += before[i]
        if not wanted([code[i].name for i in sorted(inside)]):
            continue
        if path := _shortest(code, follow, start, ends, inside, wanted):
            loops.append((inside, Loop([code[i].name for i in path], [code[i].name for i in sorted(inside)])))
    # A program that does one item after another has a loop around it all.
    inner = [loop for inside, loop in loops if not any(other < inside for other, _ in loops)]
    best = max(inner, key=lambda loop: (len(wanted(loop.instructions)), -len(loop.every)), default=None)
    if best is None or not wanted(best.instructions):
        raise RuntimeError("the machine code has no loop with tensor instructions; an attention kernel's has one")
    return best


def _shortest(
    code: list[_Instruction], follow: list[list[int]], start: int, ends: list[int], inside: set[int],
    wanted: Callable[[list[str]], list[str]],
) -> list[int]:  # fmt: skip
    """The way from `start` to one of `ends` past most wanted instructions, and of those the one with fewest others.

    Forward only: neither into a loop inside nor to code that lies behind the loop. Empty where there is none.
    """
    cost = {start: (-len(wanted([code[start].name])), 1)}
    came: dict[int, int] = {}
    for i in sorted(inside):
        for j in follow[i] if i in cost else ():
            if i < j and j in inside:
                new = (cost[i][0] - len(wanted([code[j].name])), cost[i][1] + 1)
                if j not in cost or new < cost[j]:
                    cost[j], came[j] = new, i
    reached = [end for end in ends if end in cost]
    if not reached:
        return []
    path = [min(reached, key=lambda end: cost[end])]
    while path[-1] != start:
        path.append(came[path[-1]])
    return path[::-1]


def opcodes(instructions: list[str]) -> dict[str, int]:
    """How often each opcode comes, most frequent first: what to look at when a bound is too high."""
    return dict(collections.Counter(op.split(".")[0] for op in instructions).most_common())
