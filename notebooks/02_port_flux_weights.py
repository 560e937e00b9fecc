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
# # Port FLUX weights, and generate with PARO
#
# From a folder that diffusers saved to pictures generated with a plan, step by step:
#
# 1. read the weights into our Flax NNX model, every name and shape checked
# 2. keep them as an orbax checkpoint that loads without conversion
# 3. encode prompts once, with diffusers, into a file
# 4. generate dense, calibrate a plan, generate with it
# 5. decode the latents with diffusers
#
# Set `WEIGHTS` to a real folder and this notebook ports FLUX.1. As it stands it makes a tiny FLUX with weights of its
# own, writes them *as diffusers would*, and goes the same way with them, on a laptop, with no download.

# %%
import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import calibrate
from paro_jax import TokenGrid, metrics
from paro_jax.models import flux, samplers, weights

# %% tags=["parameters"]
WEIGHTS = None  # a folder such as "FLUX.1-dev", as diffusers saves it; None makes a tiny one
EMBEDDINGS = None  # a file of encoded prompts (section 3); None makes them up
HEIGHT, WIDTH = 32, 48  # of the latents: pixels / 8; FLUX.1 makes 1024 x 1024 pixels from 128 x 128
STEPS = 8  # of denoising; FLUX.1-dev wants 28
DENSITY, BLOCK = 0.35, 32  # the part of the blocks that we want; tokens along each side of a block (64 on real models)
DTYPE = jnp.float32  # bfloat16 for real weights

# %% [markdown]
# ## What is in FLUX.1-dev
#
# The full-size model can be looked at without its 24 GB: `nnx.eval_shape` builds it from shapes alone.

# %%
full = nnx.eval_shape(lambda: flux.Flux(flux.FLUX_DEV, rngs=nnx.Rngs(0)))
sizes = {}
for path, value in nnx.to_flat_state(nnx.state(full, nnx.Param)):
    part = ".".join(map(str, path[:2])) if path[0] == "double" else str(path[0])
    group = {"double.image": "19 double blocks, image", "double.text": "19 double blocks, text"}.get(part)
    group = group or ("38 single blocks" if part == "single" else "embedders, final layer")
    kind = "modulation" if "modulation" in str(path) else "feed-forward" if "mlp" in str(path) else "attention"
    kind = "other" if group.startswith("emb") else kind
    # A single block has one matrix out of both: a fifth of its inputs are attention's.
    shares = {kind: 1.0}
    if part == "single" and path[1] == "to_out":
        shares = {"attention": 0.2, "feed-forward": 0.8}
    for name, share in shares.items():
        sizes[group, name] = sizes.get((group, name), 0) + share * np.prod(value.get_value().shape) / 1e9

groups, kinds = sorted({g for g, _ in sizes}, reverse=True), ("attention", "feed-forward", "modulation", "other")
figure, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
left = np.zeros(len(groups))
for kind, colour in zip(kinds, ("tab:blue", "tab:orange", "tab:green", "tab:gray"), strict=True):
    width = np.array([sizes.get((group, kind), 0) for group in groups])
    ax.barh(groups, width, left=left, color=colour, label=kind)
    left += width
ax.set(xlabel="parameters, billions", xlim=(0, 6), title=f"FLUX.1-dev: {left.sum():.2f} billion parameters")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## 1. A folder of diffusers
#
# `config.json` says what the model is, one or more `.safetensors` files hold the tensors, and names are those of the
# PyTorch modules. Ours differ in name alone: `flux.diffusers_names` is the whole table, and a linear layer keeps its
# `weight` as `[out, in]`, unlike the `kernel` of `nnx.Linear`, so that nothing is turned round on the way.
#
# The stand-in: random weights, but for the queries and keys. FLUX turns both by their place in the image (RoPE), so
# if they were constant, a token would look at its neighbours and nothing else. Each head gets constants that favour
# rows, columns or both, the way heads of trained models do.

# %%
folder = TemporaryDirectory()
TINY = dict(
    _class_name="FluxTransformer2DModel",
    in_channels=16,  # 4 latent channels of 2 x 2 pixels
    num_layers=2,
    num_single_layers=2,
    num_attention_heads=3,
    attention_head_dim=32,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=[4, 14, 14],
)


def write_tiny(path):
    """What `FluxTransformer2DModel.save_pretrained` would write, of a model with planted heads."""
    config = flux.FluxConfig(
        num_double=2,
        num_single=2,
        num_heads=3,
        head_dim=32,
        in_channels=4,
        text_embed_dim=24,
        pooled_dim=16,
        rope_dims=(4, 14, 14),
    )
    net, names = flux.Flux(config, rngs=nnx.Rngs(0)), flux.diffusers_names(config)
    tensors = {}
    for path_, value in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        *module, leaf = map(str, path_)
        name, whole = names[".".join(module)], np.asarray(value.get_value())
        if module[-1] in ("to_q", "to_k"):
            axes = np.repeat([[0, 0.2, 1], [0, 1, 0.2], [0, 0.7, 0.7]], [4, 14, 14], axis=1)  # head 0: columns
            pairs = np.tile([1.0, 0.0], 16)  # RoPE turns pairs of channels
            whole = np.broadcast_to((axes * pairs).reshape(-1), whole.shape) if leaf == "bias" else 0.15 * whole
        if module[-1] in ("norm_q", "norm_k"):
            whole = whole * 2.2  # sharper attention
        for i, x in enumerate(whole if "{}" in name else [whole]):
            key = f"{name.format(i)}.{'bias' if leaf == 'bias' else 'weight'}"
            tensors[key] = np.array(x, np.float32)
    path.mkdir()
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(TINY))


source = Path(WEIGHTS) if WEIGHTS else Path(folder.name) / "transformer"
if WEIGHTS is None:
    write_tiny(source)
    with safe_open(source / "diffusion_pytorch_model.safetensors", framework="numpy") as file:
        for key in list(file.keys())[:6]:
            print(f"{key:60} {file.get_slice(key).get_shape()}")
        print(f"... {len(file.keys())} tensors")

# %% [markdown]
# Reading is one call. Each tensor is read, cast and put in its place one by one, layers into their stack, so memory
# never holds two copies; with a mesh (`mesh=jax.make_mesh(...)`) every device gets its shard alone. Whatever is
# missing, left over or of another shape is reported at once, and nothing is loaded.

# %%
net = weights.from_pretrained(source, dtype=DTYPE)
print(f"{type(net).__name__}, {sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param))) / 1e6:.2f} M parameters")
print(net.config)

# %% [markdown]
# ## 2. Keep it: an orbax checkpoint
#
# The converted weights as arrays of JAX, restored onto any number of devices; names, dtype and layers are settled. The
# shell has `paro convert FLUX.1-dev flux-dev-orbax`.

# %%
checkpoint = Path(folder.name) / "flux-orbax"
weights.save_checkpoint(net, checkpoint)
restored = weights.load_checkpoint(checkpoint)
pairs = zip(jax.tree.leaves(nnx.state(net)), jax.tree.leaves(nnx.state(restored)), strict=True)
print("the same, bit for bit:", all(bool((a == b).all()) for a, b in pairs))
print("files:", sorted(path.name for path in checkpoint.iterdir()))
net = restored

# %% [markdown]
# ## 3. Prompts, encoded once
#
# The text encoders (T5 with 4.8 billion parameters, and CLIP) are not rebuilt here. On any machine with PyTorch:
#
# ```python
# import torch
# from diffusers import FluxPipeline
# from safetensors.torch import save_file
#
# pipe = FluxPipeline.from_pretrained("FLUX.1-dev", transformer=None, vae=None, torch_dtype=torch.bfloat16)
# with torch.no_grad():
#     text, pooled, _ = pipe.encode_prompt(["a harbour at dawn", "a cat on a piano"], prompt_2=None)
# save_file({"prompt_embeds": text, "pooled_prompt_embeds": pooled}, "embeddings.safetensors")
# ```
#
# The same file serves `paro calibrate --embeddings`. Here, numbers drawn at random stand in for it.

# %%
config = net.config
if EMBEDDINGS is None:
    r = np.random.default_rng(1)
    drawn = {
        "prompt_embeds": r.normal(size=(2, 16, config.text_embed_dim)),
        "pooled_prompt_embeds": r.normal(size=(2, config.pooled_dim)),
    }
    save_file({k: v.astype(np.float32) for k, v in drawn.items()}, Path(folder.name) / "embeddings.safetensors")
tensors = load_file(EMBEDDINGS or Path(folder.name) / "embeddings.safetensors")
prompts = [
    tuple(jnp.asarray(tensors[name][i : i + 1], DTYPE) for name in ("prompt_embeds", "pooled_prompt_embeds"))
    for i in range(2)
]
grid = TokenGrid((HEIGHT // 2, WIDTH // 2), text=prompts[0][0].shape[1])
print(f"{grid.tokens} tokens: an image of {grid.shape} and {grid.text} of text")

# %% [markdown]
# ## 4. Generate, calibrate, generate
#
# FLUX predicts the flow from image to noise and is sampled by Euler steps; guidance is an input, so each step asks
# the model once. The whole loop is one compiled program. `plan=None` is dense attention.

# %%
schedule = samplers.FlowSchedule(samplers.flux_shift(grid.shape[0] * grid.shape[1]))
guidance = jnp.full(1, 3.5, DTYPE) if config.guided else None


@jax.jit
def generate(net, prompt, noise, plan=None):
    """Latents before each step, and the last: [STEPS + 1, 1, channels, height, width]."""
    sigmas = jnp.asarray(schedule.sigmas(STEPS), jnp.float32)

    def advance(x, step):
        now = None if plan is None else plan.at_step(step, STEPS)
        flow = net(x.astype(DTYPE), sigmas[step][None], *prompt, guidance, plan=now)
        return x + (sigmas[step + 1] - sigmas[step]) * flow.astype(jnp.float32), x

    last, before = jax.lax.scan(advance, noise, jnp.arange(STEPS))
    return jnp.concatenate([before, last[None]])


noise = jax.random.normal(jax.random.key(0), (2, 1, config.in_channels, HEIGHT, WIDTH))
dense = generate(net, prompts[0], noise[0])


def as_picture(latents):
    """Three latent channels as colours; the VAE is not here."""
    low, high = np.quantile(dense[-1], [0.01, 0.99])
    return np.clip((np.asarray(latents[0, :3]).transpose(1, 2, 0) - low) / (high - low), 0, 1)


shown = np.linspace(0, STEPS, 5).round().astype(int)
figure, axes = plt.subplots(1, len(shown), figsize=(12, 2.2), layout="constrained")
for ax, step in zip(axes, shown, strict=True):
    ax.imshow(as_picture(dense[step]), interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=f"step {step}")
figure.suptitle("Latents on their way from noise (three channels as colours)")
plt.show()

# %% [markdown]
# Made-up weights paint no harbours; what matters below is whether the picture with a plan is *this* picture.
#
# Calibration looks at the attention of the dense model, here on the other prompt, early and late. `net.capture` hands
# it out layer by layer, double blocks first, so that one layer's q, k and v are in memory at a time.

# %%
other = generate(net, prompts[1], noise[1])
runs = []
for step in (STEPS // 4, 3 * STEPS // 4):
    inputs = (other[step].astype(DTYPE), jnp.full(1, schedule.sigmas(STEPS)[step]), *prompts[1], guidance)
    runs.append((step / STEPS, functools.partial(net.capture, *inputs)))
samples = calibrate.LiveSamples(runs, sites=config.sites)
plan, report = calibrate.make_plan(samples, grid, density=DENSITY, block=(BLOCK, BLOCK), progress=False)
print(f"density {plan.density:.3f}; orders by layer and head: {plan.order_list()}")

# %%
q, k, _ = next(iter(net.capture(*inputs)))
local = plan[0]
figure, axes = plt.subplots(3, 3, figsize=(9.5, 9.8), layout="constrained")
for head, (row, order) in enumerate(zip(axes, local.order_list(), strict=False)):
    for ax, name in zip(row, (grid.orders[0], order), strict=False):
        picture = np.asarray(calibrate.attention_map(q[:, :, [head]], k[:, :, [head]], grid, name, size=200))[0]
        ax.imshow(np.sqrt(picture), cmap="Blues", vmax=np.sqrt(np.quantile(picture, 0.99)), interpolation="nearest")
        ax.set_title(f"head {head}, {name}" + (": the model's order" if ax is row[0] else ": its order"))
    keep = np.asarray(local.mask().keep)[head]
    mass = calibrate.block_mass(q[:, :, [head]], k[:, :, [head]], grid, order, plan.block)[0]
    row[2].imshow(keep, cmap="Greys", interpolation="nearest")
    row[2].set_title(f"{keep.mean():.0%} of blocks, {float(metrics.retained_mass(mass, keep)):.0%} of attention")
    for ax in row:
        ax.set(xticks=[], yticks=[])
figure.suptitle("The first layer: attention in the model's order and in the head's own, and the kept blocks")
plt.show()

# %% [markdown]
# In kernel order the text stands last: the dark rows and columns at the end. Every token may always look at it.

# %%
sparse = generate(net, prompts[0], noise[0], plan)
pictures = {
    "dense": as_picture(dense[-1]),
    f"{plan.density:.0%} of blocks": as_picture(sparse[-1]),
    "difference × 5": np.clip(5 * np.abs(as_picture(sparse[-1]) - as_picture(dense[-1])), 0, 1),
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
for ax, (name, picture) in zip(axes, pictures.items(), strict=True):
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=name)
plt.show()
print(f"relative L1 error of the latents: {float(metrics.relative_l1(dense[-1], sparse[-1])):.4f}")

# %% [markdown]
# ## 5. Latents to pixels
#
# The VAE, too, stays with diffusers. Save the latents, and decode them where PyTorch is:
#
# ```python
# from diffusers import AutoencoderKL
# from diffusers.image_processor import VaeImageProcessor
#
# vae = AutoencoderKL.from_pretrained("FLUX.1-dev", subfolder="vae")
# latents = load_file("latents.safetensors")["latents"] / vae.config.scaling_factor + vae.config.shift_factor
# with torch.no_grad():
#     VaeImageProcessor().postprocess(vae.decode(latents).sample)[0].save("harbour.png")
# ```

# %%
save_file({"latents": np.asarray(sparse[-1], np.float32)}, Path(folder.name) / "latents.safetensors")
folder.cleanup()

# %% [markdown]
# The same from the shell, for weights of any size:
#
# ```bash
# paro convert FLUX.1-dev flux-dev-orbax
# paro calibrate --model flux --weights flux-dev-orbax --embeddings embeddings.safetensors \
#     --density 0.5 --checkpoint calibrate.tmp -o plan.safetensors
# paro inspect plan.safetensors
# ```
