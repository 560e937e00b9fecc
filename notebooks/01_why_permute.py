# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why permute?
#
# A video model cuts a video into a grid of tokens, *frames × height × width*, and writes the grid out as one long
# line: all of frame 0 row by row, then all of frame 1, and so on. Attention compares every token with every other
# one, and that is where 60 to 80 % of the time goes.
#
# Most attention heads look at few tokens. A head that follows a spot through time looks at *the same place in every
# frame*. In the grid that is one neat column; in the long line it is a token here, a token far away, and so on: the
# map of what looks at what is full of thin stripes. A GPU cannot skip between thin stripes, because it works in
# blocks of 64 × 64.
#
# PAROAttention (arXiv 2506.16054) writes the line out in another order for such a head, here with time running
# fastest. The stripes fall together into blocks, and whole blocks can be skipped. This notebook does it to one head,
# step by step, on a CPU.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import calibrate
import paro_jax
from paro_jax import metrics, policies

# %% tags=["parameters"]
FRAMES, HEIGHT, WIDTH = 16, 8, 12  # tokens along each axis
BLOCK = 32  # tokens along each side of a block; 64 on real models
DENSITY = 0.2  # the part of the blocks that we want to keep

# %% [markdown]
# ## A head that is local along time
#
# Tokens whose place in the image is near should match, whatever their frame. We give every place a random wave
# pattern (random Fourier features): the product of two patterns is large for near places and close to zero for far
# ones. The frame adds only a little.

# %%
D = 64  # head dimension
grid = paro_jax.TokenGrid((FRAMES, HEIGHT, WIDTH))
rng = np.random.default_rng(0)

frame, row, column = np.meshgrid(np.arange(FRAMES), np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
place = np.stack([frame / 40, row, column], axis=-1).reshape(grid.tokens, 3)
waves = place @ rng.normal(size=(3, D)) + rng.uniform(0, 2 * np.pi, D)
pattern = 8 * np.sqrt(2 / D) * np.cos(waves)

# [batch, tokens, heads, head dimension], tokens in the model's order
query = jnp.asarray(pattern + 0.1 * rng.normal(size=pattern.shape), jnp.float32)[None, :, None]
key = jnp.asarray(pattern + 0.1 * rng.normal(size=pattern.shape), jnp.float32)[None, :, None]
value = jnp.asarray(rng.normal(size=pattern.shape), jnp.float32)[None, :, None]
print(f"{grid.tokens} tokens in a grid of {FRAMES} frames x {HEIGHT} rows x {WIDTH} columns")
print("orders this grid can be written in:", ", ".join(grid.orders))

# %% [markdown]
# ## The attention map, in the model's order and with time fastest
#
# `grid.index(order)` says which token stands at each place of the line. "HWF" means: height slowest, then width, and
# frames fastest, so that the tokens of one spot stand next to each other. We draw the whole map here, N × N numbers,
# only to look at it. Neither calibration nor attention ever builds it.

# %%
scores = query[0, :, 0] @ key[0, :, 0].T / np.sqrt(D)
attention_map = np.asarray(jax.nn.softmax(scores))


def reordered(order):
    index = grid.index(order)
    return attention_map[index][:, index]


def draw_map(ax, order, title):
    # Pixels are fewer than tokens: each shows the largest number under it, so that thin stripes stay visible.
    step = max(1, grid.tokens // 256)
    small = np.maximum.reduceat(reordered(order), np.arange(0, grid.tokens, step), axis=0)
    small = np.maximum.reduceat(small, np.arange(0, grid.tokens, step), axis=1)
    ax.imshow(np.sqrt(small), cmap="Blues", extent=(0, grid.tokens, grid.tokens, 0), interpolation="nearest")
    ax.set(title=title, xlabel="key token", ylabel="query token")


figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
draw_map(axes[0], "FHW", "FHW: the model's order")
draw_map(axes[1], "HWF", "HWF: time fastest")
figure.suptitle("One head's attention, twice: the same numbers in two orders")
plt.show()

# %% [markdown]
# ## What a block mask can keep
#
# Add up the attention inside each block, keep the heaviest blocks until the budget is spent, and ask how much
# attention they hold. `calibrate` asks exactly this question for every order.

# %%
blocks = -(-grid.tokens // BLOCK)


def block_mass(order):
    padded = np.zeros((blocks * BLOCK, blocks * BLOCK), np.float32)
    padded[: grid.tokens, : grid.tokens] = reordered(order)
    return padded.reshape(blocks, BLOCK, blocks, BLOCK).sum(axis=(1, 3))


always = grid.always_keep((BLOCK, BLOCK))  # blocks with text in them; this grid has none


def heaviest(order, density):
    return policies.top_blocks(block_mass(order)[None], density, always, block=(BLOCK, BLOCK))


masks = {order: heaviest(order, DENSITY) for order in grid.orders}
kept = {order: float(metrics.retained_mass(block_mass(order), masks[order].keep[0])) for order in grid.orders}

figure, ax = plt.subplots(figsize=(7, 3))
ax.bar(list(kept), [100 * part for part in kept.values()], color=["tab:gray"] + ["tab:blue"] * (len(kept) - 1))
ax.set(ylabel="attention kept, %", ylim=(0, 100), title=f"the best {DENSITY:.0%} of the blocks, in each order")
plt.show()
print({order: round(part, 3) for order, part in kept.items()})

# %% [markdown]
# Same head, same budget. In the model's order the kept blocks miss much of the attention, because every block holds a
# bit of a stripe. With time fastest they hold most of it. These are the kept blocks:

# %% tags=["readme"]
best = max(kept, key=kept.get)  # the first of equals: model order comes first and costs nothing
figure, axes = plt.subplots(2, 2, figsize=(8, 8.4), layout="constrained")
for column, (order, title) in enumerate({"FHW": "FHW: the model's order", best: f"{best}: reordered"}.items()):
    draw_map(axes[0, column], order, title)
    ax = axes[1, column]
    ax.imshow(masks[order].keep[0], cmap="Greys", interpolation="nearest")
    ax.set(xlabel="key block", ylabel="query block")
    ax.set_title(f"{DENSITY:.0%} of the blocks keep {kept[order]:.0%} of the attention")
plt.show()

# %% [markdown]
# ## A plan, and attention with it
#
# An order and a mask for each head make an `AttentionPlan`. `paro_jax.attention` takes it as one more argument;
# everything else is as in `jax.nn.dot_product_attention`. It stores the tokens in the head's order, computes the kept
# blocks, and puts the result back in the model's order, so the rest of the model never knows.
#
# First the sanity check that the whole idea rests on: **an order alone changes nothing.** With every block kept, any
# order gives what `jax.nn` gives, up to rounding.

# %%
dense = jax.nn.dot_product_attention(query, key, value)
for order in grid.orders:
    plan = paro_jax.AttentionPlan.dense(grid, heads=1, order=order, block=(BLOCK, BLOCK))
    difference = jnp.max(jnp.abs(paro_jax.attention(query, key, value, plan=plan) - dense))
    print(f"{order}: largest difference from dense attention {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# Now skip blocks, and look at the error of the *output*, which is what the model sees, over density.

# %%
densities = sorted({0.1, 0.15, 0.3, 0.5, 0.75, DENSITY})
errors = {}
for order in ("FHW", best):
    for density in densities:
        plan = paro_jax.AttentionPlan.build(grid, order=[order], mask=heaviest(order, density))
        output = paro_jax.attention(query, key, value, plan=plan)
        errors[order, density] = float(metrics.relative_l1(dense, output))

figure, ax = plt.subplots(figsize=(7, 3.5))
ax.plot(densities, [errors["FHW", d] for d in densities], "o-", color="tab:gray", label="FHW, the model's order")
ax.plot(densities, [errors[best, d] for d in densities], "o-", color="tab:blue", label=f"{best}, reordered")
ax.set(xlabel="density: kept blocks / all blocks", ylabel="relative L1 error of the output", ylim=(0, None))
ax.legend()
plt.show()
before, after = errors["FHW", DENSITY], errors[best, DENSITY]
print(f"at density {DENSITY}: error {before:.3f} in model order, {after:.3f} in order {best}")

# %% [markdown]
# ## Blocks that are alike also quantise better
#
# After the stripes are gone, the numbers inside a block are of one size, so one scale per block fits them.
# *Incoherence*, the largest number of a block over its mean, says how hard a block is to write down in 8 or 4 bits: 1
# is easiest. A lone stripe in a 64 × 64 block has 64. We look at the blocks that are kept, since the others are never
# computed.

# %%
for order in ("FHW", best):
    per_block = np.asarray(metrics.incoherence(reordered(order), group=(BLOCK, BLOCK)))
    print(
        f"{order}: incoherence of the kept blocks, median {np.median(per_block[np.asarray(masks[order].keep[0])]):.1f}"
    )

for width in ("bf16", "int8", "int4"):  # "bf16" means not quantised
    quant = paro_jax.QuantSpec(qk=width, pv=width)
    plan = paro_jax.AttentionPlan.build(grid, order=[best], mask=masks[best], quant=quant)
    error = metrics.relative_l1(dense, paro_jax.attention(query, key, value, plan=plan))
    print(f"{best}, density {DENSITY}, {width:4}: relative L1 error {error:.3f}")

# %% [markdown]
# ## The same thing with one call
#
# `calibrate.make_plan` does all of this for every head of a model, in two streaming passes that never hold an N × N
# map. A sample says which attention layer (`site`) and which moment of denoising (`step`, from 0 to 1) its q and k
# come from.

# %%
samples = [calibrate.Sample(site=0, step=0.0, q=query, k=key)]
plan, report = calibrate.make_plan(samples, grid, density=DENSITY, block=(BLOCK, BLOCK), progress=False)
print("order chosen:", plan.order_list(), " density:", round(plan.density, 3))
print(plan.mask())

# %% [markdown]
# ## Where to go from here
#
# - `paro demo` does this to a small video model with trained weights, and shows the video with and without.
# - `paro inspect PLAN` shows what a plan file holds.
# - `paro calibrate --help` says how to hand over captures of your own model.
# - In a model, write `paro_jax.attention(q, k, v, plan=plan)` where it calls `jax.nn.dot_product_attention`.
