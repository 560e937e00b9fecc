"""Train the demo model: `python -m paro_jax.demo.train --minutes 90 --out checkpoints/demo`.

v-prediction on procedural videos. Some steps see single frames of many videos, which teaches what words look like for
little; the others see whole videos. Muon for matrices, Adam for the rest, an exponential average of the weights. Orbax
checkpoints; a killed run resumes, and `--start FILE` goes on from exported weights.

The weights that ship took five hours on two busy cores, some 11 300 steps, the last of them

    make train ARGS="--start WEIGHTS --frames 0.95 --minutes 30"
    make train ARGS="--start WEIGHTS --frames 0.6 --minutes 46"

What taught outlines and motions to follow their words was to see single frames mostly at high noise (`loss`): in 30
minutes the error of the first guess from pure noise, beyond what the caption leaves open, fell from 0.04 to 0.01; after
200 minutes of evenly drawn timesteps it was 0.05.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from safetensors.numpy import save_file

from paro_jax.demo import data, model
from paro_jax.models import weights

# (frames, batch): single frames and whole videos.
FRAMES, VIDEOS = (1, 12), (data.FRAMES, 2)
HELD_OUT = 1_000_000  # training seeds lie below; calibration and demo use seeds from here on


def batch(step: int, frames: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents `[B, F, C, H, W]` of that many frames in a row, word ids `[B, T]`, first frames `[B]`, by `step`."""
    r = np.random.default_rng((step, 3))
    latents, words, first = [], [], r.integers(data.FRAMES - frames + 1, size=size)
    for start in first.tolist():
        scene = data.random_scene(int(r.integers(HELD_OUT)))
        latents.append(data.to_latents(data.render(scene, range(start, start + frames))))
        # One caption in ten is dropped, so that guidance is possible.
        words.append(data.tokenise(scene.caption) if r.random() > 0.1 else np.zeros(data.CAPTION_WORDS, np.int32))
    return np.stack(latents), np.stack(words), first.astype(np.int32)


def loss(graph, params, latents, words, first, key) -> jax.Array:
    """Mean squared error of v, all in f32.

    A timestep is 1000 u ** (1 / 2), u uniform, for videos and 1000 u ** (1 / 4) for single frames: where nearly all is
    noise the caption alone decides, and what a word does to the picture is not drowned by what the noise does.
    """
    k1, k2 = jax.random.split(key)
    alphas = jnp.asarray(model.SCHEDULE.alphas_cumprod(), jnp.float32)
    # Stratified: one timestep of the batch in each of as many equally likely slices.
    b = latents.shape[0]
    u = (jnp.arange(b) + jax.random.uniform(k1, (b,))) / b
    t = (u ** (0.25 if latents.shape[1] == 1 else 0.5) * len(alphas)).astype(jnp.int32)
    a = alphas[t][:, None, None, None, None]
    noise = jax.random.normal(k2, latents.shape)
    noisy = jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise
    v = jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * latents
    found = nnx.merge(graph, params)(noisy, t.astype(jnp.float32), words, first, attention_fn=attention)
    return jnp.mean((found - v) ** 2)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention `[B, N, heads, D]`, one head after the other: on a CPU three times as fast as all at once."""

    def heads_first(x):
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])

    o = jax.lax.map(lambda qkv: _one_head(*qkv), (heads_first(q * q.shape[3] ** -0.5), heads_first(k), heads_first(v)))
    return jnp.swapaxes(o.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]), 1, 2)


def _halves(tokens: int) -> tuple[slice, slice]:
    """Queries in two parts: their scores stay in cache."""
    return slice(0, tokens // 2), slice(tokens // 2, tokens)


@jax.custom_vjp
def _one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v of `[N, D]`; its gradient computes P again from the log-sum-exp (arXiv 2307.08691)."""
    return _one_head_fwd(q, k, v)[0]


def _one_head_fwd(q, k, v):
    o, lse = [], []
    for part in _halves(len(q)):
        s = q[part] @ k.T
        top = s.max(1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(1, keepdims=True)
        o.append(p @ v / total)
        lse.append(top + jnp.log(total))
    o, lse = jnp.concatenate(o), jnp.concatenate(lse)
    return o, (q, k, v, o, lse)


def _one_head_bwd(saved, do):
    q, k, v, o, lse = saved
    offset = (do * o).sum(1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for part in _halves(len(q)):
        p = jnp.exp(q[part] @ k.T - lse[part])
        ds = p * (do[part] @ v.T - offset[part])
        dq.append(ds @ k)
        dk += ds.T @ q[part]
        dv += p.T @ do[part]
    return jnp.concatenate(dq), dk, dv


_one_head.defvjp(_one_head_fwd, _one_head_bwd)


def optimiser(rate) -> optax.GradientTransformation:
    """Muon for the hidden matrices (last two axes; a stacked layer axis in front), Adam for all else."""

    def dimensions(params):
        def pick(path, x):
            name = jax.tree_util.keystr(path)
            if "blocks" in name and "kernel" in name and x.ndim == 3:
                return optax.contrib.MuonDimensionNumbers(1, 2)
            return None

        return jax.tree_util.tree_map_with_path(pick, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            lambda s: rate(s) * 10, adam_learning_rate=rate, muon_weight_dimension_numbers=dimensions, weight_decay=0.01
        ),
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--minutes", type=float, default=90)
    p.add_argument("--frames", type=float, default=0.6, help="share of the steps that see single frames")
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--start", type=pathlib.Path, help="exported weights to start from (default: random)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("checkpoints/demo"))
    args = p.parse_args()

    def build():
        return model.DemoModel(rngs=nnx.Rngs(0))

    graph, params = nnx.split(weights.load(build, args.start) if args.start else build(), nnx.Param)
    params = nnx.to_pure_dict(params)
    # The rate falls with the share of the time that is gone, so a run always ends annealed; it enters as data.
    opt = optax.inject_hyperparams(lambda rate: optimiser(lambda _: rate))(rate=args.rate)
    state: dict[str, Any] = {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": opt.init(params),
        "step": 0,
        "seconds": 0.0,
    }

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, ema, opt_state, rate, decay, latents, words, first, key):
        opt_state.hyperparams["rate"] = rate
        value, grads = jax.value_and_grad(lambda p: loss(graph, _as_state(p), latents, words, first, key))(params)
        changes, opt_state = opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)
        return params, ema, opt_state, value

    manager = ocp.CheckpointManager(args.out.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if manager.latest_step() is not None:
        state = dict(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state)))
        print(f"resumed at step {state['step']}, {state['seconds'] / 60:.1f} minutes in", flush=True)

    def what(step: int):
        """The frames and batch of a step."""
        return FRAMES if np.random.default_rng((step, 4)).random() < args.frames else VIDEOS

    total = args.minutes * 60
    start, seconds0, saved, shown, losses = time.time(), float(state["seconds"]), time.time(), time.time(), []
    pool = concurrent.futures.ThreadPoolExecutor(1)
    gone = seconds0 / total
    ahead = pool.submit(batch, int(state["step"]), *what(int(state["step"])))
    while gone < 1:
        step = int(state["step"])
        latents, words, first = ahead.result()
        ahead = pool.submit(batch, step + 1, *what(step + 1))
        rate = args.rate * min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1 - gone) / 0.5))
        state["params"], state["ema"], state["opt"], value = update(
            state["params"], state["ema"], state["opt"], rate, min(0.998, step / (step + 10)), latents, words, first,
            jax.random.key(step),
        )  # fmt: skip
        losses.append(value)
        state["step"] = step + 1
        state["seconds"] = seconds0 + time.time() - start
        gone = state["seconds"] / total
        if time.time() - shown > 20:
            mean = float(jnp.mean(jnp.stack(losses)))
            print(f"step {step + 1}  {100 * gone:.1f} %  loss {mean:.4f}  batch {latents.shape}", flush=True)
            shown, losses = time.time(), []
        if time.time() - saved > 240 or gone >= 1:
            manager.save(state["step"], args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            export(state["ema"], args.out / "weights.safetensors")
            saved = time.time()


def _as_state(params):
    return nnx.State(jax.tree.map(nnx.Param, params))


def export(params, path: pathlib.Path) -> None:
    """The averaged weights, bf16, one tensor per parameter named by its path ("transformer.blocks.to_q.kernel")."""
    flat = {
        ".".join(str(getattr(k, "key", k)) for k in path_): np.asarray(jnp.asarray(x, jnp.bfloat16))
        for path_, x in jax.tree_util.tree_leaves_with_path(params)
    }
    save_file(flat, path)


if __name__ == "__main__":
    main()
