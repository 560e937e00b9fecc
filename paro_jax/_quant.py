"""How an attention call is computed: the widths of its two products and what one quantisation scale covers."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

Width = Literal["bf16", "fp8", "int8", "int4", "fp4"]


@dataclass(frozen=True)
class QuantSpec:
    """Widths and scale groups of one attention call. Static: part of the jit key.

    `qk`, `pv`: width of the operands of QK^T and of PV. "bf16" means not quantised: the product is computed at the
    dtype of the inputs (float32, bfloat16 or float16) with float32 softmax and accumulation. "int8" and "int4" are
    symmetric, rounded half to even, scale = amax / 127 or amax / 7; "fp8" is e4m3, scale = amax / 448; "fp4" is NVFP4,
    e2m1 in groups of 16 (channels of q and k, tokens of v and P) with an e4m3 scale each, whatever the groups below.
    `smooth_k`: subtract a per-channel mean from K before it is quantised. softmax does not notice, the scales shrink
    (SageAttention, section 4.2). No effect when qk is "bf16".
    `q_group`, `k_group`: one scale per token ("row"), per block of tokens ("block"), or per "thread": what one thread
    of a tensor core instruction holds (SageAttention2: queries equal modulo 8 of 32, four key pairs modulo 8 of a
    block).
    `v_group`: one scale per channel, or per block and channel ("block").
    `p_scale`: P is quantised relative to its row's maximum inside the key block ("block") or to the running maximum
    over the kept blocks so far ("running"). "block" keeps small tails alive: under one scale a P below 1/254 is lost.
    `smooth_q`: subtract from each query block its mean and add that mean's scores, which are not quantised, back
    (SageAttention2's delta S). It costs nq N numbers a head. No effect when qk is "bf16".
    `smooth_v`: subtract a per-channel mean from V and add it to the output, exact because kept weights sum to 1. No
    effect when pv is "bf16".
    `qk_rotate`: turn the channels of q and k by a random-sign Hadamard matrix, which q k^T does not notice
    (FlashAttention-3's incoherent processing). No effect when qk is "bf16".

    `packed`: K and V of width "int4" are stored two values to a byte, in backends that read that (Hopper's, and
    Ampere's, which knows no other way); the others refuse. No bit of a result changes.

    Presets of published methods: `paro_jax.recipes`. Raises ValueError for a value outside these sets, and for `packed`
    where nothing is "int4".
    """

    qk: Width = "bf16"
    pv: Width = "bf16"
    smooth_k: bool = True
    q_group: Literal["row", "block", "thread"] = "row"
    k_group: Literal["block", "row", "thread"] = "block"
    v_group: Literal["channel", "block"] = "channel"
    p_scale: Literal["block", "running"] = "block"
    smooth_q: bool = False
    smooth_v: bool = False
    qk_rotate: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = (True, False) if _TYPES[field.name] is bool else get_args(_TYPES[field.name])
            # `in` alone would take 1 for True.
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ValueError(
                    f"QuantSpec {field.name} must be one of {', '.join(map(repr, allowed))}; got {value!r}."
                )
        if self.packed and "int4" not in (self.qk, self.pv):
            raise ValueError(
                f"QuantSpec packed must be False unless qk or pv is 'int4'; got qk={self.qk!r} and pv={self.pv!r}."
            )

    @property
    def quantised(self) -> bool:
        """True when either product runs below the width of the inputs."""
        return self.qk != "bf16" or self.pv != "bf16"

    @property
    def smooths_k(self) -> bool:
        """True when a K mean is subtracted."""
        return self.smooth_k and self.qk != "bf16"

    @property
    def smooths_q(self) -> bool:
        """True when the mean of every query block is subtracted."""
        return self.smooth_q and self.qk != "bf16"

    @property
    def smooths_v(self) -> bool:
        """True when a V mean is subtracted."""
        return self.smooth_v and self.pv != "bf16"

    def rotates(self, role: str) -> bool:
        """True when the channels of role "q", "k" or "v" are turned."""
        return self.qk_rotate and self.qk != "bf16" and role != "v"

    def width(self, role: str) -> Width:
        """Width at which role "q", "k" or "v" is stored."""
        return self.pv if role == "v" else self.qk

    def group(self, role: str) -> str:
        """What one scale of role "q", "k" or "v" covers."""
        return {"q": self.q_group, "k": self.k_group, "v": self.v_group}[role]


_TYPES = get_type_hints(QuantSpec)
