"""A Hilbert curve for boxes of any size: neighbours along it are neighbours in the box.

The generalised Hilbert ("Gilbert") curve halves a box like Hilbert's curve does, but at any length: a long box into two
along its long side, any other into pieces that the curve walks through one corner to the next. Known to fit video
tokens from xDiT.
"""

import numpy as np

# A leg of the walk: (axis, signed length). A box is a start corner and three legs; the walk ends along the first one.
_Leg = tuple[int, int]


def gilbert(shape: tuple[int, ...]) -> np.ndarray:
    """int64 [tokens, rank]: the places of a grid of rank 1 to 3 in the sequence the curve visits them."""
    sides = (*shape, 1, 1)[:3]
    legs = sorted(enumerate(sides), key=lambda leg: -leg[1])  # the longest first; equal ones as they come
    places: list[tuple[int, ...]] = []
    _walk((0, 0, 0), legs[0], legs[1], legs[2], places)
    return np.array(places)[:, : len(shape)]


def _walk(start: tuple[int, ...], a: _Leg, b: _Leg, c: _Leg, places: list[tuple[int, ...]]) -> None:
    w, h, d = abs(a[1]), abs(b[1]), abs(c[1])
    if w * h * d == max(w, h, d):  # a line
        leg = max(a, b, c, key=lambda leg: abs(leg[1]))
        places.extend(_at(start, (leg[0], _sign(leg) * step)) for step in range(abs(leg[1])))
        return
    (a1, a2), (b1, b2), (c1, c2) = _halves(a), _halves(b), _halves(c)
    end_a = _last(a)  # to the far side along a
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes, one behind the other
        _walk(start, a1, b, c, places)
        _walk(_at(start, a1), a2, b, c, places)
    elif 3 * h > 4 * d or 3 * d > 4 * h:  # flat: up the near half of a, across, down the far half
        if 3 * h > 4 * d:
            _walk(start, b1, c, a1, places)
            _walk(_at(start, b1), a, b2, c, places)
            _walk(_at(start, end_a, _last(b1)), _back(b1), c, _back(a2), places)
        else:
            _walk(start, c1, a1, b, places)
            _walk(_at(start, c1), a, b, c2, places)
            _walk(_at(start, end_a, _last(c1)), _back(c1), _back(a2), b, places)
    else:  # a cube: the five moves of Hilbert's curve
        _walk(start, b1, c1, a1, places)
        _walk(_at(start, b1), c, a1, b2, places)
        _walk(_at(start, _last(b1), _last(c)), a, _back(b1), _back(c2), places)
        _walk(_at(start, end_a, b1, _last(c)), _back(c), _back(a2), b2, places)
        _walk(_at(start, end_a, _last(b1)), _back(b1), c1, _back(a2), places)


def _halves(leg: _Leg) -> tuple[_Leg, _Leg]:
    """Two legs that make one, the first of even length where there is room, as the curve likes it."""
    axis, length = leg
    half = abs(length) // 2
    half += half % 2 if abs(length) > 2 else 0
    return (axis, _sign(leg) * half), (axis, length - _sign(leg) * half)


def _sign(leg: _Leg) -> int:
    return 1 if leg[1] > 0 else -1


def _last(leg: _Leg) -> _Leg:
    """The step from the first place of a leg to its last."""
    return leg[0], leg[1] - _sign(leg)


def _back(leg: _Leg) -> _Leg:
    return leg[0], -leg[1]


def _at(start: tuple[int, ...], *steps: _Leg) -> tuple[int, ...]:
    place = list(start)
    for axis, length in steps:
        place[axis] += length
    return tuple(place)
