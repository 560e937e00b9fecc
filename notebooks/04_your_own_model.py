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
# # Your own model
#
# `paro_jax` knows three published models, but needs none of them. If your Flax model calls an attention function, it
# can use a plan: four steps, in NNX and in Linen, without touching anything but that one call.
#
# 1. say how its tokens lie: a `TokenGrid`
# 2. record its attention on a few inputs: `calibrate.capture`
# 3. decide: `calibrate.make_plan`
# 4. hand the plan to the slot that Flax has for attention: `paro_jax.flax`

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen, nnx

import calibrate
import paro_jax.flax
from paro_jax import TokenGrid, metrics

# %% tags=["parameters"]
FRAMES, HEIGHT, WIDTH = 12, 8, 10  # tokens along each axis
LAYERS = 3
DENSITY = 0.25  # the part of all blocks that we want to compute
BLOCK = 32  # tokens along each side of a block; 64 on real models

# %% [markdown]
# ## A video transformer in NNX
#
# An ordinary pre-norm transformer. Its layers are stacked along a leading axis and run by `lax.scan`, as large models
# do, so one trace serves all of them. Nothing in it has heard of `paro_jax`.

# %%
HEADS, D = 3, 32
DIM = HEADS * D


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)
        self.mlp_in = nnx.Linear(DIM, 4 * DIM, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * DIM, DIM, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(x)))


class VideoModel(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.vmap(lambda r: Block(rngs=r))(rngs.split(LAYERS))

    def __call__(self, x):
        return jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]


model = VideoModel(rngs=nnx.Rngs(0))

# %% [markdown]
# Random weights look at nothing in particular, so in place of training we give the heads something to see. Tokens
# carry their place in the grid as waves. Head 0 reads waves that hardly change from frame to frame: it looks at the
# same spot in all frames. Head 1 looks along columns of the image, head 2 along rows.

# %%
grid = TokenGrid((FRAMES, HEIGHT, WIDTH))
rng = np.random.default_rng(0)
place = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1).reshape(grid.tokens, 3)
waves = []
for axis in range(HEADS):
    stretch = np.where(np.arange(3) == axis, 1 / 40, 1.0)  # along its own axis a head's waves are long
    waves.append(np.cos((place * stretch) @ rng.normal(size=(3, D)) + rng.uniform(0, 2 * np.pi, D)))
waves = np.concatenate(waves, axis=-1)

attention = model.blocks.attention
looks = np.eye(DIM).reshape(DIM, HEADS, D) + 0.05 * rng.normal(size=(LAYERS, DIM, HEADS, D))
attention.query.kernel[...] = attention.key.kernel[...] = jnp.asarray(1.2 * looks, jnp.float32)
attention.out.kernel[...] *= 0.5
model.blocks.mlp_out.kernel[...] *= 0.3


def clip(seed):
    """A batch of one clip: tokens [1, N, DIM]."""
    content = np.random.default_rng(seed).normal(size=waves.shape)
    return jnp.asarray(waves + 0.15 * content, jnp.float32)[None]


x = clip(0)
dense = jax.jit(lambda model, x: model(x))(model, x)
print(f"{grid.tokens} tokens, {LAYERS} layers of {HEADS} heads; orders to choose from: {', '.join(grid.orders)}")

# %% [markdown]
# ## Record
#
# `calibrate.capture` calls your function once with an attention to use, and records what passes through it, scan and
# jit included. It runs the model as it is: `attention=` says what computes the output. A model too large to keep the
# q, k and v of all layers at once can yield them layer by layer into `calibrate.LiveSamples`; notebook 03 does so.

# %%


def record(seed):
    def run(attention_fn):
        model.blocks.attention.attention_fn = attention_fn
        model(clip(seed))

    own = model.blocks.attention.attention_fn
    try:
        return calibrate.capture(run, step=0.0, attention=own)
    finally:
        model.blocks.attention.attention_fn = own


samples = [sample for seed in (1, 2) for sample in record(seed)]
print([(sample.site, sample.q.shape) for sample in samples[:LAYERS]])

# %% [markdown]
# ## Decide

# %%
options = dict(block=(BLOCK, BLOCK), progress=False)
plan, report = calibrate.make_plan(samples, grid, density=DENSITY, **options)
print("orders by layer and head:", plan.order_list())

figure, axes = plt.subplots(HEADS, 3, figsize=(9, 9.2), layout="constrained")
first, local = samples[0], plan[0]
for head, (row, order) in enumerate(zip(axes, local.order_list(), strict=True)):
    for ax, name in zip(row, (grid.orders[0], order), strict=False):
        q, k = first.q[:, :, [head]], first.k[:, :, [head]]
        picture = np.asarray(calibrate.attention_map(q, k, grid, name, size=240))[0]
        ax.imshow(np.sqrt(picture), cmap="Blues", vmax=np.sqrt(np.quantile(picture, 0.995)), interpolation="nearest")
        ax.set_title(f"head {head}, {name}" + (": the model's order" if ax is row[0] else ": its order"))
    keep = np.asarray(local.mask().keep)[head]
    mass = calibrate.block_mass(q, k, grid, order, plan.block)[0]
    row[2].imshow(keep, cmap="Greys", interpolation="nearest")
    row[2].set_title(f"{keep.mean():.0%} of blocks, {float(metrics.retained_mass(mass, keep)):.0%} of attention")
    for ax in row:
        ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Head 0 gets its frames side by side, heads 1 and 2 their columns and rows. What lay in stripes lies near the
# diagonal, and a quarter of the blocks hold nearly all of it.
#
# ## Use it: NNX
#
# `PAROAttention` is a module that goes where Flax takes an `attention_fn`. It holds the plan in a Variable, so the
# scan hands each layer its own part, a checkpoint can save it, and the optimizer, which asks for `nnx.Param`, never
# sees it. (`nnx.data`, because the slot held a plain function before; given to the constructor of
# `nnx.MultiHeadAttention` it needs no such word.)

# %%
fast = nnx.clone(model)
fast.blocks.attention.attention_fn = nnx.data(paro_jax.flax.PAROAttention(plan))

traces = []


@jax.jit
def run(model, x):
    traces.append("traced")
    return model(x)


sparse = run(fast, x)
print(f"relative L1 error at density {plan.density:.2f}: {float(metrics.relative_l1(dense, sparse)):.4f}")

# %% [markdown]
# One channel of the output, every third frame:

# %%
shown = range(0, FRAMES, 3)
pictures = {"dense": dense, f"{plan.density:.0%} of blocks": sparse, "difference × 10": 10 * (sparse - dense)}
figure, axes = plt.subplots(3, len(shown), figsize=(2.1 * len(shown), 5.4), squeeze=False, layout="constrained")
for row, (name, y) in zip(axes, pictures.items(), strict=True):
    for ax, frame in zip(row, shown, strict=True):
        ax.imshow(y[0, :, 3].reshape(grid.shape)[frame], cmap="RdBu", vmin=-2.5, vmax=2.5, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=f"frame {frame}" if name == "dense" else "")
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# ## Another plan does not compile again
#
# Orders and masks are arrays. Only another grid, block size or width of numbers is another program. So one compiled
# model can go through plans of several densities, here with orders chosen for each head and in the model's order
# alone.

# %%
densities = (0.1, 0.15, 0.25, 0.4, 0.6, 1.0)
errors = {}
for name, orders in (("orders chosen for each head", None), ("model order only", grid.orders[:1])):
    for other, _ in calibrate.make_plans(samples, grid, densities=densities, orders=orders, **options):
        fast.blocks.attention.attention_fn.table.set_value(other)
        errors.setdefault(name, []).append(float(metrics.relative_l1(dense, run(fast, x))))
fast.blocks.attention.attention_fn.table.set_value(plan)
print(f"{2 * len(densities) + 1} plans, traced {len(traces)} time(s)")

figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, line), colour in zip(errors.items(), ("tab:blue", "tab:gray"), strict=True):
    ax.plot(densities, line, "o-", color=colour, label=name)
ax.set(xlabel="density: kept blocks / all blocks", ylabel="relative L1 error of the output", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
# ## Use it: Linen
#
# In Linen the plan travels best as an argument: `linen.scan` cuts it up along the layers, and `attention_fn(plan)`
# fits the slot of `MultiHeadDotProductAttention`. To show that it is the same thing, this model takes over the
# weights above.

# %%


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, plan):
        fn = linen.dot_product_attention if plan is None else paro_jax.flax.attention_fn(plan)
        h = linen.LayerNorm(name="norm")(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, name="attention")(h)
        h = linen.Dense(4 * DIM, name="mlp_in")(x)
        return x + linen.Dense(DIM, name="mlp_out")(linen.gelu(h)), None


class LinenVideoModel(linen.Module):
    @linen.compact
    def __call__(self, x, plan=None):
        scan = linen.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="blocks")(x, plan)[0]


params = {"blocks": nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))}
linen_run = jax.jit(LinenVideoModel().apply)
for name, given, expected in (("dense", None, dense), ("with the plan", plan, sparse)):
    difference = float(jnp.max(jnp.abs(linen_run({"params": params}, x, given) - expected)))
    print(f"{name}: largest difference between Linen and NNX {difference:.1e}")
    assert difference < 1e-4

# %% [markdown]
# ## A model that calls attention itself
#
# Then there is nothing to adapt: `paro_jax.attention(q, k, v, plan=plan)` takes [batch, tokens, heads, head
# dimension] and gives the same, in the model's order. Tokens outside the grid, such as text, are `TokenGrid(shape,
# text=77)`; they stay where they are and are always computed.
#
# - A plan of several *buckets* of steps: `calibrate.make_plan(..., bucket_edges=(0, 0.3, 1))`, and in the sampler
#   `plan.at_step(step, total_steps)`.
# - Products in 8 bits: `quant=paro_jax.QuantSpec(qk="int8", pv="int8")`.
# - Several devices: heads and batch shard, tokens do not; `jax.shard_map` over heads takes the plan along.
