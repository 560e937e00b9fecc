"""Where a model's tokens sit: the (frames, height, width) grid, the text beside it, and the orders a head may use.

One type owns the geometry. An *order* is a named reordering of the grid tokens, e.g. "FWH". Text is never reordered; it
goes last in kernel order, so the text blocks of every head are the same. `index(order)` is the table kernel slot ->
model token (PAROAttention, arXiv 2506.16054, token reorder); its inverse is derived, never written by hand.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np

from paro_jax._gilbert import gilbert as _gilbert_places

# The sequence fixes ties: calibration prefers the earlier name, and the first one, model order, costs nothing.
_AXIS_ORDERS = {1: ("N",), 2: ("HW", "WH"), 3: ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")}
_AXES = {1: "N", 2: "HW", 3: "FHW"}


def is_int(x: object) -> bool:
    """True for a plain or numpy integer, False for bool and everything else."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, (bool, np.bool_))


def check_block(block: object) -> tuple[int, int]:
    """`block` as a pair (tokens per query block, tokens per key block) of positive ints, or ValueError."""
    ok = isinstance(block, (tuple, list)) and len(block) == 2 and all(is_int(b) and b > 0 for b in block)
    if not ok:
        raise ValueError(f"block must be two positive ints (query tokens, key tokens), e.g. (64, 64); got {block!r}.")
    bq, bk = block  # type: ignore[misc]
    return int(bq), int(bk)


@dataclass(frozen=True)
class TokenGrid:
    """The token geometry of one model at one resolution. Hashable: part of the jit key.

    `shape`: (frames, height, width), (height, width) or (tokens,), in tokens. `text`: tokens outside the grid.
    `text_position`: where the model keeps them, "first" or "last". `bricks`: brick sizes, one per extra order: a brick
    order visits the grid brick by brick, e.g. (4, 4, 4) adds "brick4x4x4"; bricks at the edges may be ragged.
    `gilbert`: True adds the order "gilbert", a Hilbert curve through a box of any size.

    Raises ValueError for sizes that are not positive ints, an unknown text position or a brick of another rank.
    """

    shape: tuple[int, ...]
    text: int = 0
    text_position: Literal["first", "last"] = "first"
    bricks: tuple[tuple[int, ...], ...] = ()
    gilbert: bool = False

    def __post_init__(self) -> None:
        shape = self.shape
        ints = isinstance(shape, (tuple, list)) and all(is_int(n) and n > 0 for n in shape)
        if not ints or not 1 <= len(shape) <= 3:
            raise ValueError(
                "shape must be 1 to 3 positive ints, in tokens: (frames, height, width), (height, width) or (tokens,); "
                f"got {shape!r}."
            )
        if not is_int(self.text) or self.text < 0:
            raise ValueError(f"text must be a number of tokens, an int >= 0; got {self.text!r}.")
        if self.text_position not in ("first", "last"):
            raise ValueError(
                f'text_position must be "first" or "last" (where the model keeps text); got {self.text_position!r}.'
            )
        bricks = self.bricks
        if not isinstance(bricks, (tuple, list)):
            raise ValueError(f"bricks must be a tuple of brick sizes, e.g. ((4, 4, 4),); got {bricks!r}.")
        for brick in bricks:
            if (
                not isinstance(brick, (tuple, list))
                or len(brick) != len(shape)
                or not all(is_int(n) and n > 0 for n in brick)
            ):
                raise ValueError(
                    f"bricks must hold one tuple of {len(shape)} positive ints (the rank of shape {tuple(shape)}) per "
                    f"brick order, e.g. ({(4,) * len(shape)},); got {brick!r}."
                )
        # Lists and numpy ints become plain tuples of int, so that equal grids hash alike.
        object.__setattr__(self, "shape", tuple(int(n) for n in shape))
        object.__setattr__(self, "text", int(self.text))
        object.__setattr__(self, "bricks", tuple(tuple(int(n) for n in brick) for brick in bricks))
        if len(set(self.bricks)) != len(self.bricks):
            raise ValueError(f"bricks must not repeat a size; got {self.bricks}.")
        if not isinstance(self.gilbert, bool):
            raise ValueError(f"gilbert must be True or False; got {self.gilbert!r}.")

    @property
    def grid_tokens(self) -> int:
        """Tokens on the grid, text not counted."""
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        """All tokens N: grid and text."""
        return self.grid_tokens + self.text

    @property
    def place(self) -> tuple[tuple[int, ...], int, str]:
        """(shape, text, text_position): grids with the same place hold the same tokens, whatever bricks they have."""
        return self.shape, self.text, self.text_position if self.text else "first"

    @property
    def orders(self) -> tuple[str, ...]:
        """Names of the orders: model order, the other axis orders, the brick orders, "gilbert"."""
        bricks = tuple("brick" + "x".join(map(str, brick)) for brick in self.bricks)
        return _AXIS_ORDERS[len(self.shape)] + bricks + ("gilbert",) * self.gilbert

    def index(self, order: str) -> np.ndarray:
        """int32 [tokens], kernel slot -> model token: grid tokens in `order`, then text. Read-only."""
        return _index(self, self.order_id(order))

    def inverse(self, order: str) -> np.ndarray:
        """int32 [tokens], model token -> kernel slot: the inverse permutation of `index(order)`. Read-only."""
        return _inverse(self, self.order_id(order))

    def table(self) -> np.ndarray:
        """int32 [orders, tokens]: `index` of every order, in the sequence of `orders`. Read-only."""
        return _table(self)

    def order_id(self, order: str) -> int:
        """Position of `order` in `orders`. Raises ValueError for a name this grid does not have."""
        if order not in self.orders:
            raise ValueError(
                f"order must be one of {', '.join(self.orders)} for a grid of shape {self.shape}; got {order!r}. "
                "Brick orders exist after TokenGrid(..., bricks=((4, 4, 4),)), the Hilbert curve after gilbert=True."
            )
        return self.orders.index(order)

    def blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        """(nq, nk): how many query and key blocks cover the tokens, the partial last one included."""
        bq, bk = check_block(block)
        return -(-self.tokens // bq), -(-self.tokens // bk)

    def block_tokens(self, size: int) -> np.ndarray:
        """int32 [ceil(tokens / size)]: tokens in each block of `size`; all `size` except perhaps the last."""
        check_block((size, size))
        starts = np.arange(0, self.tokens, size)
        return np.minimum(size, self.tokens - starts).astype(np.int32)

    def always_keep(self, block: tuple[int, int], *, columns: bool = True) -> np.ndarray:
        """bool [nq, nk]: True in every row and column whose block holds text. All False without text.

        Text is dense in the paper as well: it is a few blocks and attends everywhere. `columns` False: in every row
        only; the text sees everything, but what sees the text is then to be decided like the rest.
        """
        bq, bk = check_block(block)
        nq, nk = self.blocks(block)
        rows = (np.arange(nq) + 1) * bq > self.grid_tokens
        seen = ((np.arange(nk) + 1) * bk > self.grid_tokens) & columns
        return (rows[:, None] | seen[None, :]) & (self.text > 0)


def _grid_order(grid: TokenGrid, order_id: int) -> np.ndarray:
    """[grid_tokens]: row-major grid positions in the sequence the order visits them."""
    positions = np.arange(grid.grid_tokens, dtype=np.int32).reshape(grid.shape)
    names = _AXIS_ORDERS[len(grid.shape)]
    if order_id < len(names):
        axes = _AXES[len(grid.shape)]
        return positions.transpose([axes.index(letter) for letter in names[order_id]]).reshape(-1)
    if order_id == len(names) + len(grid.bricks):
        return positions[tuple(_gilbert_places(grid.shape).T)]
    brick = grid.bricks[order_id - len(names)]
    starts = product(*(range(0, n, b) for n, b in zip(grid.shape, brick, strict=True)))
    cuts = (tuple(slice(s, s + b) for s, b in zip(start, brick, strict=True)) for start in starts)
    return np.concatenate([positions[cut].reshape(-1) for cut in cuts])


@lru_cache(maxsize=256)
def _index(grid: TokenGrid, order_id: int) -> np.ndarray:
    shift = grid.text if grid.text_position == "first" else 0
    text_start = 0 if grid.text_position == "first" else grid.grid_tokens
    text = np.arange(text_start, text_start + grid.text, dtype=np.int32)
    return _frozen(np.concatenate([_grid_order(grid, order_id) + shift, text]))


@lru_cache(maxsize=256)
def _inverse(grid: TokenGrid, order_id: int) -> np.ndarray:
    inverse = np.empty(grid.tokens, np.int32)
    inverse[_index(grid, order_id)] = np.arange(grid.tokens, dtype=np.int32)
    return _frozen(inverse)


@lru_cache(maxsize=64)
def _table(grid: TokenGrid) -> np.ndarray:
    return _frozen(np.stack([_index(grid, i) for i in range(len(grid.orders))]))


def _frozen(x: np.ndarray) -> np.ndarray:
    # The cache hands the same array to everybody.
    x = x.astype(np.int32, copy=False)
    x.flags.writeable = False
    return x
