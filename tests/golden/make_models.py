"""Makes the fixtures: small models of diffusers with every weight random, their inputs and their outputs, and whole
runs of its schedulers.

    HF_HUB_OFFLINE=1 python tests/golden/make_models.py [--folder DIR] [--seed N] [NAME ...]

Runs under Python 3.11 with torch==2.13.0 (CPU), diffusers==0.42.1 and safetensors, in an environment of its own: the
suite only reads what this writes. `NAME.safetensors` holds "weights.*" under diffusers' names, "input.*" and "output",
or a run's "noise" and where it ends; `NAME.keys.txt` the names and shapes of a published model at full size. Versions
are recorded in the header. Into another folder than this one it writes with whatever versions are installed:
tests/test_live_parity.py runs it so, with another seed.
"""

import argparse
import ast
import json
import math
import pathlib
import sys

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.schedulers import scheduling_dpm_cogvideox
from safetensors.torch import save_file

PINNED = {"torch": "2.13.0", "diffusers": "0.42.1"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0, help="of every weight and input; 0 is that of the fixtures")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FIXTURES)}")
    return parser.parse_args()


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__}
    if found != PINNED and ARGUMENTS.folder.resolve() == pathlib.Path(__file__).parent.resolve():
        raise SystemExit(f"expected {PINNED}, found {found}; fixtures are compared across machines.")
    return found


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * ARGUMENTS.seed + seed)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norm scales around 1: default values hide a missing norm or a swapped gate."""
    generator = random(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.08)
            if "norm" in name and name.endswith("weight") and p.ndim == 1:
                p.add_(1.0)
    return model.eval()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=random(seed))


def write(name: str, model: torch.nn.Module, inputs: dict, output: torch.Tensor, config: dict) -> None:
    tensors = {f"weights.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"input.{k}": v for k, v in inputs.items()} | {"output": output}
    header = versions() | {"config": json.dumps(config)}
    path = ARGUMENTS.folder / f"{name}.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata=header)
    sys.stdout.write(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, output std {output.std():.2f}\n")


def keys(name: str, build) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    lines = [f"{key} {','.join(map(str, value.shape))}" for key, value in sorted(state.items())]
    (ARGUMENTS.folder / f"{name}.keys.txt").write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{name}.keys.txt: {len(lines)} tensors\n")


COGVIDEOX = dict(
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=24,
    num_layers=2,
    sample_width=12,
    sample_height=8,
    sample_frames=9,
    patch_size=2,
    temporal_compression_ratio=4,
    max_text_seq_length=10,
)


def pipeline_parts(wanted) -> list[ast.AST]:
    """Parts of CogVideoX's pipeline, taken from its file: importing the pipeline would want transformers."""
    file = pathlib.Path(diffusers.__file__).parent / "pipelines/cogvideo/pipeline_cogvideox.py"
    return [n for n in ast.walk(ast.parse(file.read_text())) if wanted(n)]


def crop_region(grid: tuple[int, int], width: int, height: int):
    """The pipeline's own function."""
    name = "get_resize_crop_region_for_grid"
    scope: dict = {}
    exec(compile(ast.Module(pipeline_parts(lambda n: getattr(n, "name", "") == name), []), name, "exec"), scope)
    return scope[name](grid, width, height)


def dynamic_guidance(scale: float, steps: int, t: torch.Tensor) -> float:
    """The pipeline's own expression for `use_dynamic_cfg`."""
    (branch,) = pipeline_parts(lambda n: isinstance(n, ast.If) and ast.unparse(n.test) == "use_dynamic_cfg")
    scope = {"math": math, "guidance_scale": scale, "num_inference_steps": steps, "t": t}
    return eval(ast.unparse(branch.body[0].value), scope)


def cogvideox(name: str, height: int = 8, width: int = 12, frames: int = 3, **options) -> None:
    """Latents [2, frames, 4, height, width]; the model is trained at [3, 8, 12]."""
    model = randomise(CogVideoXTransformer3DModel(**COGVIDEOX | options))
    inputs = {
        "latents": normal(2, frames, 4, height, width, seed=1),
        "timestep": torch.tensor([987.0, 41.0]),
        "text": normal(2, 10, 24, seed=2),
    }
    rope, grid = None, (height // 2, width // 2)
    if "patch_size_t" in options:
        steps = frames // options["patch_size_t"]
        rope = get_3d_rotary_pos_embed(32, None, grid, steps, grid_type="slice", max_size=(max(grid), max(grid)))
    elif options.get("use_rotary_positional_embeddings"):
        crop = crop_region(grid, 12 // 2, 8 // 2)
        rope = get_3d_rotary_pos_embed(32, crop, grid, frames)
    with torch.no_grad():
        output = model(inputs["latents"], inputs["text"], inputs["timestep"], image_rotary_emb=rope, return_dict=False)[
            0
        ]
    write(name, model, inputs, output, COGVIDEOX | options)


WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=6,
    text_dim=16,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
    rope_max_seq_len=32,
)


def wan(name: str, timestep: torch.Tensor) -> None:
    model = randomise(WanTransformer3DModel(**WAN))
    inputs = {"latents": normal(2, 4, 3, 8, 12, seed=1), "timestep": timestep, "text": normal(2, 10, 16, seed=2)}
    with torch.no_grad():
        output = model(inputs["latents"], timestep, inputs["text"], return_dict=False)[0]
    write(name, model, inputs, output, WAN)


FLUX = dict(
    in_channels=12,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
)


def flux_inputs(guided: bool) -> dict[str, torch.Tensor]:
    inputs = {"latents": normal(2, 3, 16, 12, seed=1), "timestep": torch.tensor([0.987, 0.041])}
    inputs |= {"text": normal(2, 10, 20, seed=2), "pooled": normal(2, 24, seed=3)}
    return inputs | ({"guidance": torch.tensor([3.5, 1.25])} if guided else {})


def pack(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, C * 4], as the pipeline does."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    x = x.view(len(x), height // 2, width // 2, -1, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, height, width)


def image_ids(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def flux(name: str, guided: bool) -> None:
    model = randomise(FluxTransformer2DModel(**FLUX, guidance_embeds=guided))
    inputs = flux_inputs(guided)
    with torch.no_grad():
        output = model(
            hidden_states=pack(inputs["latents"]),
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["timestep"],
            guidance=inputs.get("guidance"),
            img_ids=image_ids(8, 6),
            txt_ids=torch.zeros(10, 3),
            return_dict=False,
        )[0]
    write(name, model, inputs, unpack(output, 16, 12), FLUX | {"guidance_embeds": guided})


def authors_flux(**options):
    """FLUX as its authors wrote it; wants einops, and src/ of github.com/black-forest-labs/flux on PYTHONPATH."""
    from flux.model import Flux, FluxParams

    return Flux(FluxParams(theta=10000, mlp_ratio=4.0, qkv_bias=True, guidance_embed=True, **options))


def flux_bfl() -> None:
    model = authors_flux(
        in_channels=12,
        out_channels=12,
        vec_in_dim=24,
        context_in_dim=20,
        hidden_size=32,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
    )
    for parameter_name, p in randomise(model).named_parameters():
        if parameter_name.endswith("norm.scale"):
            p.data += 1.0
    inputs = flux_inputs(guided=True)
    with torch.no_grad():
        output = model(
            img=pack(inputs["latents"]),
            img_ids=image_ids(8, 6).expand(2, -1, -1),
            txt=inputs["text"],
            txt_ids=torch.zeros(2, 10, 3),
            timesteps=inputs["timestep"],
            y=inputs["pooled"],
            guidance=inputs["guidance"],
        )
    write("flux_dev_bfl", model, inputs, unpack(output, 16, 12), {"hidden_size": 32})


def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A model that can be written in one line; t from 0 to 1000."""
    return torch.tanh(0.7 * x + t / 1000) - 0.3 * x.roll(1, -1)


def write_runs(name: str, tensors: dict[str, torch.Tensor]) -> None:
    path = ARGUMENTS.folder / f"{name}.safetensors"
    save_file(tensors, path, metadata=versions())
    sys.stdout.write(f"{path.name}: {path.stat().st_size / 1e3:.1f} kB\n")


def v_scheduler(kind, steps: int, shift: float):
    """As CogVideoX's configuration sets it up."""
    scheduler = kind(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=shift,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def ddim() -> None:
    tensors = {"noise": normal(2, 3, 4, seed=3)}
    for shift in (1.0, 3.0):
        for steps in (7, 30, 50):
            scheduler = v_scheduler(CogVideoXDDIMScheduler, steps, shift)
            x = tensors["noise"]
            for t in scheduler.timesteps:
                x = scheduler.step(flow(x, t), t, x, return_dict=False)[0]
            tensors[f"shift{shift:g}.steps{steps}"] = x
    write_runs("ddim", tensors)


def dpm() -> None:
    """CogVideoX's DPM; "guided" is a run with dynamic guidance. "fresh" is the noise that each step adds."""
    tensors = {"noise": normal(2, 3, 4, seed=3), "fresh": normal(50, 2, 3, 4, seed=5)}

    def run(steps: int, shift: float, predict) -> torch.Tensor:
        scheduler = v_scheduler(CogVideoXDPMScheduler, steps, shift)
        x, clean, before = tensors["noise"], None, None
        for i, t in enumerate(scheduler.timesteps):
            # The scheduler draws for itself, and where it draws twice it drops the first: both are this step's noise.
            scheduling_dpm_cogvideox.randn_tensor = lambda shape, i=i, **_: tensors["fresh"][i]
            x, clean = scheduler.step(predict(x, t, steps), clean, t, before, x, return_dict=False)
            before = t
        return x

    def guided(x, t, steps):
        without, prompted = flow(0.5 * x, t), flow(x, t)
        return without + dynamic_guidance(6.0, steps, t) * (prompted - without)

    for shift in (1.0, 3.0):
        for steps in (1, 2, 7, 30, 50):
            tensors[f"shift{shift:g}.steps{steps}"] = run(steps, shift, lambda x, t, steps: flow(x, t))
    tensors["guided"] = run(50, 1.0, guided)
    write_runs("dpm", tensors)


def flow_euler() -> None:
    """Whole runs of flow-match Euler: FLUX.1-dev's shift for 300 and 4096 tokens, schnell's, and Wan's."""
    tensors = {"noise": normal(2, 3, 4, seed=3)}
    for name, steps, mu, shift in (
        ("300", 28, 0.0, 1.0),
        ("4096", 28, 1.15, 1.0),
        ("none", 4, None, 1.0),
        ("5", 50, None, 5.0),
    ):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=mu is not None, shift=shift)
        if name == "300":  # the pipeline's calculate_shift
            slope = (1.15 - 0.5) / (4096 - 256)
            mu = 300 * slope + (0.5 - slope * 256)
        scheduler.set_timesteps(sigmas=[1 + (1 / steps - 1) * i / (steps - 1) for i in range(steps)], mu=mu)
        x = tensors["noise"]
        for t in scheduler.timesteps:
            x = scheduler.step(flow(x, t), t, x, return_dict=False)[0]
        tensors[name] = x
    write_runs("flow_euler", tensors)


def unipc() -> None:
    """UniPC as Wan's configuration sets it up, at its shifts for 480p, 720p and Wan 2.2."""
    tensors = {"noise": normal(2, 3, 4, seed=3)}
    for shift in (3.0, 5.0, 12.0):
        for steps in (1, 2, 3, 7, 30, 50):
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
            )
            scheduler.set_timesteps(steps)
            x = tensors["noise"]
            scheduler.set_begin_index(0)
            for t in scheduler.timesteps:
                x = scheduler.step(flow(x, t), t, x, return_dict=False)[0]
            tensors[f"shift{shift:g}.steps{steps}"] = x
    write_runs("unipc", tensors)


COGVIDEOX_5B = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)

FIXTURES = {
    "cogvideox_2b": lambda: cogvideox("cogvideox_2b"),
    "cogvideox_5b": lambda: cogvideox("cogvideox_5b", use_rotary_positional_embeddings=True),
    "cogvideox_5b_tall": lambda: cogvideox("cogvideox_5b_tall", 12, 8, 2, use_rotary_positional_embeddings=True),
    "cogvideox_1_5": lambda: cogvideox(
        "cogvideox_1_5", frames=4, use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False
    ),
    "cogvideox_keys": lambda: keys("cogvideox_5b", lambda: CogVideoXTransformer3DModel(**COGVIDEOX_5B)),
    "ddim": ddim,
    "dpm": dpm,
    "flow_euler": flow_euler,
    "flux_dev": lambda: flux("flux_dev", guided=True),
    "flux_schnell": lambda: flux("flux_schnell", guided=False),
    "flux_keys": lambda: keys("flux_dev", lambda: FluxTransformer2DModel(guidance_embeds=True)),
    "flux_bfl": flux_bfl,
    "flux_bfl_keys": lambda: keys(
        "flux_dev_bfl",
        lambda: authors_flux(
            in_channels=64,
            out_channels=64,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=3072,
            num_heads=24,
            depth=19,
            depth_single_blocks=38,
            axes_dim=[16, 56, 56],
        ),
    ),
    "unipc": unipc,
    "wan": lambda: wan("wan", torch.tensor([987.0, 41.0])),
    "wan_per_token": lambda: wan("wan_per_token", (normal(2, 72, seed=4).abs() * 300).round()),
    "wan_keys": lambda: keys("wan_14b", WanTransformer3DModel),
}

if __name__ == "__main__":
    ARGUMENTS = arguments()
    for fixture in ARGUMENTS.names or FIXTURES:
        FIXTURES[fixture]()
