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
# # Calibrate a video model
#
# A plan says two things of every attention head: in which order its tokens are written, and which blocks of its
# attention are computed at all. Both are decided once, before anything is generated, by looking at the attention of
# the unchanged model on a few prompts. This notebook does that from end to end on a CogVideoX of our own, small
# enough for a laptop, with *trained* weights that ship with `paro_jax`. A published CogVideoX differs in size only:
# notebook 02 shows how to load one, and the last cell here has the command that does it all from the shell.

# %%
import functools
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import calibrate
from paro_jax import TokenGrid, load_plan, metrics, save_plan
from paro_jax.demo import data
from paro_jax.demo.model import CONFIG, SCHEDULE
from paro_jax.demo.run import load_model
from paro_jax.models import samplers

# %% tags=["parameters"]
STEPS = 8  # of denoising
DENSITY = 0.4  # the part of all blocks that we want to compute
BLOCK = 64  # tokens along each side of a block
FRAMES, HEIGHT, WIDTH = CONFIG.frames, CONFIG.height, CONFIG.width  # of the latent video

# %% [markdown]
# ## The model, dense
#
# Captions in, video out. Each denoising step asks the model twice in one batch, with the caption and without, and
# goes a bit further than the difference says (classifier-free guidance). `plan=None` is ordinary attention.

# %%
net = load_model()
patch = CONFIG.patch_size
grid = TokenGrid((FRAMES, HEIGHT // patch, WIDTH // patch), text=CONFIG.text_length)
print(f"{CONFIG.num_layers} layers x {CONFIG.num_heads} heads over {grid.tokens} tokens: grid {grid.shape} and text")


@jax.jit
def generate(net, words, noise, plan=None):
    """Latents before each step, and the last: [STEPS + 1, 1, frames, channels, height, width]."""
    times = jnp.asarray(SCHEDULE.timesteps(STEPS), jnp.float32)

    def advance(x, step):
        now = None if plan is None else plan.at_step(step, STEPS)
        both = net(jnp.concatenate([x, x]), jnp.broadcast_to(times[step], 2), words, plan=now)
        plain, captioned = jnp.split(both, 2)
        v = plain + 3.0 * (captioned - plain)
        return samplers.ddim_step(x, v, step, steps=STEPS, schedule=SCHEDULE), x

    last, before = jax.lax.scan(advance, noise, jnp.arange(STEPS))
    return jnp.concatenate([before, last[None]])


def video(net, words, noise, plan=None):
    """Pixels in [-1, 1]: [frames, height, width, 3]."""
    return data.to_video(np.asarray(generate(net, words, noise, plan)[-1, 0]))


def prompt(seed):
    """A caption, its word ids beside those of no caption, and the noise to start from."""
    scene = data.random_scene(seed)
    words = np.stack([np.zeros(CONFIG.text_length, np.int32), data.tokenise(scene.caption)])
    noise = np.random.default_rng(seed).standard_normal((1, FRAMES, CONFIG.out_channels, HEIGHT, WIDTH), np.float32)
    return scene.caption, jnp.asarray(words), jnp.asarray(noise)


caption, words, noise = prompt(2**41)
dense = video(net, words, noise)


def draw_frames(videos, title):
    shown = np.linspace(0, FRAMES - 1, 6).round().astype(int)
    figure, axes = plt.subplots(
        len(videos), len(shown), figsize=(11, 0.5 + 1.6 * len(videos)), squeeze=False, layout="constrained"
    )
    for row, (name, pixels) in zip(axes, videos.items(), strict=True):
        for ax, frame in zip(row, shown, strict=True):
            ax.imshow((pixels[frame] + 1) / 2, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.suptitle(title)
    plt.show()


draw_frames({"dense": dense}, f'"{caption}"')

# %% [markdown]
# ## Look at the attention while it runs
#
# `net.capture(...)` takes the arguments of a call and runs the model one layer at a time, handing out q, k and v of
# each as attention sees them: after their norm and rotation, in the model's token order. One layer is in memory at a
# time, and one compiled program serves all of them. At full size that is not a luxury: the q, k and v of all 42
# layers of CogVideoX-5B are 27 GB for one step.
#
# We calibrate on another caption than the one above. Attention changes most while the video takes shape, so the plan
# gets two sets of masks: one for the first third of the steps, one for the rest. From each of these *buckets* we look
# at one step.

# %%
BUCKETS = (0.0, 0.35, 1.0)
at = [max(STEPS // 6, 0), max(2 * STEPS // 3, 1)]

_, other_words, other_noise = prompt(2**40)
latents, runs = generate(net, other_words, other_noise), []
for step in at:
    x = latents[step]
    inputs = (jnp.concatenate([x, x]), jnp.full(2, float(SCHEDULE.timesteps(STEPS)[step])), other_words)
    runs.append((step / STEPS, functools.partial(net.capture, *inputs)))
samples = calibrate.LiveSamples(runs, sites=CONFIG.num_layers)

q, k, v = next(iter(net.capture(*inputs)))
print(f"{len(samples)} samples; q of the first layer: {q.shape} [batch, tokens, heads, head dimension]")

# %% [markdown]
# ## Two passes, one plan
#
# `make_plan` goes over the samples twice: first to find the order in which each head's attention is most compact,
# then to weigh every block in that order. It never holds an N × N map. One threshold over all heads spends the
# budget: a head whose attention sits in few blocks leaves its share to one that needs more.

# %%
plan, report = calibrate.make_plan(
    samples, grid, density=DENSITY, block=(BLOCK, BLOCK), bucket_edges=BUCKETS, progress=False
)
print(f"density {plan.density:.3f}, {plan.nbytes / 1e3:.0f} kB in memory")

# %% [markdown]
# What did the heads choose? The letters name the axes from the slowest to the fastest: FHW is the model's own order,
# frame after frame, and HWF puts the same place of all frames side by side. On the right is how much of its attention
# each head may compute.

# %%
names = [row["order"] for row in report.rows if row["bucket"] == 0]
orders = np.array([grid.orders.index(name) for name in names]).reshape(CONFIG.num_layers, CONFIG.num_heads)
spent = np.asarray(plan.mask().keep, np.float32).mean((0, -2, -1))

figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
colours = plt.get_cmap("Set2", len(grid.orders))
axes[0].imshow(orders, cmap=colours, vmin=-0.5, vmax=len(grid.orders) - 0.5)
axes[1].imshow(spent, cmap="Greens", vmin=0, vmax=1)
for site, head in np.ndindex(orders.shape):
    axes[0].text(head, site, grid.orders[orders[site, head]], ha="center", va="center", fontsize=9)
    ink = "white" if spent[site, head] > 0.6 else "black"
    axes[1].text(head, site, f"{spent[site, head]:.0%}", ha="center", va="center", fontsize=9, color=ink)
for ax, title in zip(axes, ("the order each head chose", "the blocks each head keeps"), strict=True):
    ax.set(title=title, xlabel="head", ylabel="layer")
plt.show()

# %% [markdown]
# ## A few heads, before and after
#
# These are the heads that gain most from their order. In the model's order their attention lies in thin stripes,
# spread over most blocks. In the chosen order it falls together, and the mask keeps little else. (Pixels average over
# several tokens. These pictures are the only place where a map is drawn.)

# %%
gains = []  # attention inside the best blocks of the plan's number: chosen order against model order
for site, (q, k, _) in enumerate(net.capture(*inputs)):
    local = plan[-1][site]
    keep = np.asarray(local.mask().keep)
    chosen = calibrate.block_mass(q, k, grid, local.order_list(), plan.block)
    model = np.asarray(calibrate.block_mass(q, k, grid, grid.orders[0], plan.block))
    for head, order in enumerate(local.order_list()):
        best = np.sort(model[head].ravel())[::-1][: keep[head].sum()].sum() / grid.tokens
        kept = float(metrics.retained_mass(chosen[head], keep[head]))
        gains.append((kept - best, site, head, order, best, kept))
chosen = sorted(gains, reverse=True)[:4]

figure, axes = plt.subplots(2, len(chosen), figsize=(10.2, 5.6), squeeze=False, layout="constrained")
for site, (q, k, _) in enumerate(net.capture(*inputs)):
    for column, (_, where, head, order, best, kept) in enumerate(chosen):
        if where != site:
            continue
        for row, name, title in (
            (0, grid.orders[0], f"layer {site}, head {head}: {grid.orders[0]}\nbest blocks hold {best:.0%}"),
            (1, order, f"{order}\nkept blocks hold {kept:.0%}"),
        ):
            picture = np.asarray(calibrate.attention_map(q[1:, :, [head]], k[1:, :, [head]], grid, name, size=180))[0]
            ax = axes[row, column]
            ax.imshow(np.sqrt(np.minimum(picture, np.quantile(picture, 0.995))), cmap="magma", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=10)
plt.show()

# %% [markdown]
# ## Generate with the plan
#
# The plan is one more argument. It is an ordinary pytree, so it goes through `jit` and the scan over layers, and
# `plan.at_step` picks the masks of a step inside the compiled loop. Same noise, same caption:

# %%
sparse = video(net, words, noise, plan)
psnr = metrics.psnr((dense + 1) / 2, (sparse + 1) / 2, data_range=1.0)
draw_frames({"dense": dense, f"{plan.density:.0%} of blocks": sparse}, f'"{caption}"')
print(f"PSNR against dense {float(psnr):.1f} dB, cosine {float(metrics.cosine(dense, sparse)):.4f}")

# %% [markdown]
# How far can one go? The samples are looked at once for several densities.

# %%
densities = [round(DENSITY + part * (1 - DENSITY), 2) for part in (-0.25, 0, 0.5)]
options = dict(densities=densities, block=(BLOCK, BLOCK), bucket_edges=BUCKETS, progress=False)
curves = {
    "orders chosen for each head": calibrate.make_plans(samples, grid, **options),
    "model order only": calibrate.make_plans(samples, grid, orders=grid.orders[:1], **options),
}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, made), colour in zip(curves.items(), ("tab:blue", "tab:gray"), strict=True):
    errors = [float(metrics.relative_l1(dense, video(net, words, noise, plan))) for plan, _ in made]
    ax.plot([plan.density for plan, _ in made], errors, "o-", color=colour, label=name)
ax.set(xlabel="density: kept blocks / all blocks", ylabel="relative L1 error of the video", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
# One caption of a young model decides little here; the numbers of `paro demo` are averages. What carries over is the
# procedure.
#
# ## Keep it
#
# A plan file says what it is for, and loading it for another grid is an error.

# %%
with TemporaryDirectory() as folder:
    save_plan(plan, f"{folder}/plan.safetensors", model="demo", provenance={"steps": STEPS, "at": at})
    again = load_plan(f"{folder}/plan.safetensors", grid=grid)
print(again.grid, again.bucket_edges, again.order_list()[0][0])

# %% [markdown]
# A published CogVideoX from the shell, with the prompts that diffusers encoded (notebook 02 shows how):
#
# ```bash
# paro calibrate --model cogvideox --weights CogVideoX-5b --embeddings embeddings.safetensors \
#     --density 0.5 --buckets 2 --checkpoint calibrate.tmp -o plan.safetensors
# paro inspect plan.safetensors
# ```
