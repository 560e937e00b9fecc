"""How published methods compute attention, as `QuantSpec`s: `attention(q, k, v, plan=plan, quant=recipes.SAGE_2)`.

A recipe says nothing of the mask or the order: a dense plan in model order is the method as published, any other plan
combines it with PARO. Blocks are the plan's; the methods take 128 queries by 64 keys. All run on the "xla" and
"reference" backends; a kernel that cannot serve one says so (`NoBackend`).

Two things are ours in every recipe. Rounding is half to even under a scale of at least 1e-7, where the CUDA and Triton
sources differ among themselves (half away from zero, amax / 127 + 1e-7). And the row sum is taken of the rounded P, so
that the weights that multiply V sum to 1.
"""

from paro_jax._quant import QuantSpec

# SageAttention (arXiv 2410.02367): q and k int8 by block, K less its mean; P and V at 16 bits.
SAGE = QuantSpec(qk="int8", q_group="block", k_group="block", smooth_k=True)

# SageAttention2 (arXiv 2411.10958): q and k int4 by thread, both less a mean, the query means' scores added back; V
# e4m3 by channel, P e4m3 times 448 relative to the running row maximum.
SAGE_2 = QuantSpec(
    qk="int4", pv="fp8", q_group="thread", k_group="thread", v_group="channel", p_scale="running",
    smooth_k=True, smooth_q=True,
)  # fmt: skip

# SageAttention3 (arXiv 2505.11594): everything NVFP4, P in two levels (first its row's maximum in the block, then 16
# keys at a time); K less its mean, q less its block's, whose scores are added back.
SAGE_3 = QuantSpec(qk="fp4", pv="fp4", p_scale="block", smooth_k=True, smooth_q=True)

# FlashAttention-3's FP8 (arXiv 2407.08608): e4m3 by block, q and k turned by a random-sign Hadamard matrix, nothing
# smoothed. Theirs scales V by block, ours by block and channel; theirs multiplies P by 256, ours by 448.
FA3_FP8 = QuantSpec(
    qk="fp8", pv="fp8", q_group="block", k_group="block", v_group="block", p_scale="running",
    smooth_k=False, qk_rotate=True,
)  # fmt: skip

# Naive round to nearest, the "RTN" that PAROAttention (arXiv 2506.16054, table 1) compares with: q and k by token, V by
# channel, P by row (under the running maximum, as one pass has it), nothing smoothed.
NAIVE_INT8 = QuantSpec(
    qk="int8", pv="int8", q_group="row", k_group="row", v_group="channel", p_scale="running", smooth_k=False
)
NAIVE_INT4 = QuantSpec(
    qk="int4", pv="int4", q_group="row", k_group="row", v_group="channel", p_scale="running", smooth_k=False
)

# PAROAttention (arXiv 2506.16054): both products integer, one scale for a block of q, of k and (by channel) of V; P
# relative to its row's maximum in the block. The K mean is SageAttention's; the paper does not name its smoothing.
PARO_INT8 = QuantSpec(qk="int8", pv="int8", q_group="block", k_group="block", v_group="block", p_scale="block")
PARO_INT4 = QuantSpec(qk="int4", pv="int4", q_group="block", k_group="block", v_group="block", p_scale="block")

# Ours, the best four bits that we know: PARO_INT4 with a scale for each token of q and k, which a Hadamard matrix has
# turned, and each query block's mean kept out of q. On the demo model its attention is half as far off as that of
# NAIVE_INT4 (docs/better_than_the_paper.md).
SMOOTH_INT4 = QuantSpec(
    qk="int4", pv="int4", q_group="row", k_group="row", v_group="block", p_scale="block",
    smooth_k=True, smooth_q=True, qk_rotate=True,
)  # fmt: skip

# Every recipe under its name in a table.
ALL: dict[str, QuantSpec] = {
    "SageAttention": SAGE,
    "SageAttention2": SAGE_2,
    "SageAttention3": SAGE_3,
    "FA3 FP8": FA3_FP8,
    "naive INT8": NAIVE_INT8,
    "naive INT4": NAIVE_INT4,
    "PARO INT8": PARO_INT8,
    "PARO INT4": PARO_INT4,
    "smooth INT4": SMOOTH_INT4,
}
