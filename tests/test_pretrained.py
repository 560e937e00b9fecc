"""`from_pretrained`: every layout of the published models, their settings, and every kind of bad file by name."""

import dataclasses
import errno
import json
import os
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from safetensors.numpy import save_file

from paro_jax.models import cogvideox, flux, wan
from paro_jax.models._published import config_from_diffusers
from paro_jax.models.weights import PRESETS, WeightsError, from_pretrained, load, save

COG = dict(_class_name="CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=32, in_channels=4)
COG |= dict(out_channels=4, time_embed_dim=16, text_embed_dim=24, num_layers=2, sample_width=12, sample_height=8)
COG |= dict(sample_frames=9, max_text_seq_length=10, use_rotary_positional_embeddings=True)
FLUX = dict(_class_name="FluxTransformer2DModel", num_layers=2, num_single_layers=2, num_attention_heads=2)
FLUX |= dict(attention_head_dim=16, in_channels=12, axes_dims_rope=[4, 6, 6], joint_attention_dim=20)
FLUX |= dict(pooled_projection_dim=24, guidance_embeds=True)
WAN = dict(_class_name="WanTransformer3DModel", num_layers=2, num_attention_heads=2, attention_head_dim=24)
WAN |= dict(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64)
SMALL_FLUX = flux.FluxConfig(
    num_double=2, num_single=2, num_heads=2, head_dim=16, in_channels=3, text_embed_dim=20, pooled_dim=24,
    rope_dims=(4, 6, 6),
)  # fmt: skip
SMALL_WAN = wan.WanConfig(
    num_layers=2, num_heads=2, head_dim=24, in_channels=4, out_channels=6, text_embed_dim=16, time_embed_dim=32,
    mlp_dim=64,
)  # fmt: skip


def folder(path, weights, settings, shards=1):
    """Weights as diffusers saves them, in one file or several and an index."""
    path.mkdir(parents=True, exist_ok=True)
    stem, keys = "diffusion_pytorch_model", sorted(weights)
    if shards == 1:
        save_file(weights, path / f"{stem}.safetensors")
    else:
        names = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        parts = {name: keys[i::shards] for i, name in enumerate(names)}
        for name, part in parts.items():
            save_file({key: weights[key] for key in part}, path / name)
        index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if settings is not None:
        (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def cog(tmp_path):
    """A transformer's folder in two shards, and a pipeline around it."""
    weights, _, _ = parity.read("cogvideox_5b")
    return folder(tmp_path / "pipeline" / "transformer", weights, COG, shards=2)


def shard(path):
    return sorted(path.glob("*.safetensors"))[0]


def fails(path, **kwargs):
    """The message of the WeightsError, which names the path."""
    with pytest.raises(WeightsError) as caught:
        from_pretrained(path, **kwargs)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "pipeline"])
def test_a_folder_of_diffusers(cog, name):
    _, inputs, output = parity.read("cogvideox_5b")
    net = from_pretrained(cog if name == "transformer" else cog.parent, dtype=jnp.float32)
    assert isinstance(net, cogvideox.CogVideoX)
    assert dataclasses.replace(cogvideox.COGVIDEOX_5B, num_layers=2, num_heads=2, head_dim=32, in_channels=4,
                               out_channels=4, time_embed_dim=16, text_embed_dim=24, text_length=10, frames=3, height=8,
                               width=12) == net.config  # fmt: skip
    np.testing.assert_allclose(jax.jit(net.__call__)(**inputs), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["flux_dev", "flux_dev_bfl"])
def test_flux_in_both_layouts(tmp_path, layout):
    weights, inputs, output = parity.read(layout)
    if layout == "flux_dev":
        net = from_pretrained(folder(tmp_path, weights, FLUX), dtype=jnp.float32)
    else:
        save_file(weights, tmp_path / "flux1-dev.safetensors")
        net = from_pretrained(tmp_path / "flux1-dev.safetensors", model=SMALL_FLUX, dtype=jnp.float32)
    assert net.config == SMALL_FLUX
    np.testing.assert_allclose(jax.jit(net.__call__)(**inputs), output, atol=1e-5, rtol=0)


def to_original(key):
    """A key of diffusers' Wan in the authors' file."""
    for theirs, original in [
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        (".attn1.", ".self_attn."),
        (".attn2.", ".cross_attn."),
        ("to_out.0", "o"),
        ("to_", ""),
        (".norm2.", ".norm3."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ]:
        key = key.replace(theirs, original)
    return "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_wan_in_both_layouts(tmp_path, layout):
    weights, inputs, output = parity.read("wan")
    weights = weights if layout == "diffusers" else {to_original(key): value for key, value in weights.items()}
    assert ("blocks.0.self_attn.q.weight" in weights) == (layout == "original")
    save_file(weights, tmp_path / "wan.safetensors")
    net = from_pretrained(tmp_path / "wan.safetensors", model=SMALL_WAN, dtype=jnp.float32)
    np.testing.assert_allclose(jax.jit(net.__call__)(**inputs), output, atol=1e-5, rtol=0)


def test_dtypes(tmp_path):
    weights, _, _ = parity.read("wan")
    save_file(weights, tmp_path / "wan.safetensors")
    net = from_pretrained(tmp_path / "wan.safetensors", model=SMALL_WAN)
    kept = {
        ".".join(map(str, key)) for key, p in nnx.to_flat_state(nnx.state(net)) if p.get_value().dtype == np.float32
    }
    linear = {f"{name}.{leaf}" for name in ("time_in", "time_out") for leaf in ("weight", "bias")}
    assert kept == linear | {"table", "blocks.table", "blocks.norm_cross.scale", "blocks.norm_cross.bias"}
    assert net.blocks.mlp_in.weight[...].dtype == jnp.bfloat16
    # The very bits that casting the file's numbers gives.
    bf16 = jnp.asarray(weights["blocks.1.ffn.net.2.weight"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(net.blocks.mlp_out.weight[1], bf16)

    half = {key: value.astype(np.float16) for key, value in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    stored = from_pretrained(tmp_path / "half.safetensors", model=SMALL_WAN, dtype=None)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(stored))} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(stored.blocks.table[1], half["blocks.1.scale_shift_table"][0])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, bool, jnp.float8_e4m3fn, jnp.float64, "bf16", object], ids=str)
def test_a_dtype_that_weights_do_not_have(cog, tmp_path, dtype):
    """Whole numbers would round them all to nothing, without a word."""
    for call in (
        lambda: from_pretrained(cog, dtype=dtype),
        lambda: load(lambda: None, cog, dtype),  # type: ignore[arg-type,return-value]
        lambda: save(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "x.safetensors", dtype),
    ):
        with pytest.raises(WeightsError, match="dtype: expected float32, bfloat16, float16 or None, found"):
            call()
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # straight into its place; cast
@pytest.mark.parametrize("rows", [1, 3, 512])
def test_bands_of_any_height_give_the_same_bits(tmp_path, monkeypatch, rows, dtype):
    weights, _, _ = parity.read("flux_dev_bfl")
    save_file(weights, tmp_path / "flux.safetensors")
    monkeypatch.setattr("paro_jax.models._stream._CACHED", 64 * rows)
    monkeypatch.setattr("paro_jax.models._stream._BYTES", 64 * rows)
    net = from_pretrained(tmp_path / "flux.safetensors", model=SMALL_FLUX, dtype=dtype)
    weights = {key: value.astype(jnp.dtype(dtype)) for key, value in weights.items()}
    qkv = weights["double_blocks.1.txt_attn.qkv.weight"]
    np.testing.assert_array_equal(net.double.text.to_k.weight[1], qkv[32:64])
    linear = weights["single_blocks.0.linear1.weight"]
    np.testing.assert_array_equal(net.single.mlp_in.weight[0], linear[96:])
    swapped = weights["final_layer.adaLN_modulation.1.bias"]
    np.testing.assert_array_equal(net.modulation_out.bias[...], np.concatenate([swapped[32:], swapped[:32]]))


# --- settings -------------------------------------------------------------------------------------------------------

# What the published config.json files say.
FLUX_JSON = """{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0",
"_name_or_path": "../checkpoints/flux-dev/transformer", "attention_head_dim": 128, "guidance_embeds": true,
"in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
"patch_size": 1, "pooled_projection_dim": 768}"""
COG_2B_JSON = """{"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.30.0.dev0",
"activation_fn": "gelu-approximate", "attention_bias": true, "attention_head_dim": 64, "dropout": 0.0,
"flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 16, "max_text_seq_length": 226,
"norm_elementwise_affine": true, "norm_eps": 1e-05, "num_attention_heads": 30, "num_layers": 30, "out_channels": 16,
"patch_size": 2, "sample_frames": 49, "sample_height": 60, "sample_width": 90, "spatial_interpolation_scale": 1.875,
"temporal_compression_ratio": 4, "temporal_interpolation_scale": 1.0, "text_embed_dim": 4096, "time_embed_dim": 512,
"timestep_activation_fn": "silu", "use_rotary_positional_embeddings": false}"""
COG_5B_JSON = (
    COG_2B_JSON.replace('heads": 30', 'heads": 48').replace('layers": 30', 'layers": 42').replace("false", "true")
)
COG_1_5_JSON = COG_5B_JSON.replace(
    '"sample_frames": 49, "sample_height": 60, "sample_width": 90',
    '"patch_bias": false, "patch_size_t": 2, "ofs_embed_dim": null, "use_learned_positional_embeddings": false,'
    '"sample_frames": 81, "sample_height": 300, "sample_width": 300',
)
WAN_1_3B_JSON = """{"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0",
"added_kv_proj_dim": null, "attention_head_dim": 128, "cross_attn_norm": true, "eps": 1e-06, "ffn_dim": 8960,
"freq_dim": 256, "image_dim": null, "in_channels": 16, "num_attention_heads": 12, "num_layers": 30,
"out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
"text_dim": 4096}"""
WAN_14B_JSON = WAN_1_3B_JSON.replace("8960", "13824").replace('heads": 12', 'heads": 40')
WAN_14B_JSON = WAN_14B_JSON.replace('layers": 30', 'layers": 40')
WAN_5B_JSON = WAN_1_3B_JSON.replace("8960", "14336").replace('heads": 12', 'heads": 24')
WAN_5B_JSON = WAN_5B_JSON.replace('channels": 16', 'channels": 48')
PUBLISHED = {
    "flux-dev": FLUX_JSON,
    "flux-schnell": FLUX_JSON.replace("true", "false"),
    "cogvideox-2b": COG_2B_JSON,
    "cogvideox-5b": COG_5B_JSON,
    "cogvideox1.5-5b": COG_1_5_JSON,
    "wan2.1-1.3b": WAN_1_3B_JSON,
    "wan2.1-14b": WAN_14B_JSON,
    "wan2.2-a14b": WAN_14B_JSON.replace('"image_dim"', '"pos_embed_seq_len": null, "image_dim"'),
    "wan2.2-5b": WAN_5B_JSON,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_the_published_settings_say(name):
    assert config_from_diffusers(json.loads(PUBLISHED[name]), "config.json") == PRESETS[name]


def test_every_preset_was_seen():
    assert set(PUBLISHED) == set(PRESETS)


def test_newer_files_spell_out_the_defaults():
    settings = json.loads(FLUX_JSON) | {"axes_dims_rope": [16, 56, 56], "out_channels": None}
    assert config_from_diffusers(settings, "config.json") == flux.FLUX_DEV


BAD_SETTINGS = {
    "another class": (FLUX, "_class_name", "SD3Transformer2DModel", "expected one of FluxTransformer2DModel"),
    "no class": (FLUX, "_class_name", None, "found None"),
    "unknown": (FLUX, "rope_scaling", {"type": "linear"}, "rope_scaling = {'type': 'linear'}, which is unknown to us"),
    "FLUX Fill": (FLUX | {"out_channels": 12}, "in_channels", 72, "out_channels = 12, where we have only None or 72"),
    "rope of another size": (FLUX, "axes_dims_rope", [4, 6, 8], "add up to attention_head_dim"),
    "two rope axes": (FLUX, "axes_dims_rope", [8, 8], "axes_dims_rope = (8, 8), where a value like (16, 56, 56)"),
    "packing": (FLUX, "patch_size", 2, "patch_size = 2, where we have only 1"),
    "CogVideoX I2V": (COG, "in_channels", 8, "in_channels = 8, where we have only 4"),
    "learned positions": (COG, "use_learned_positional_embeddings", True, "use_learned_positional_embeddings = True"),
    "no patch bias": (COG, "patch_bias", False, "patch_bias = False, where we have only True"),
    "image to video 1.5": (COG | {"patch_size_t": 2}, "ofs_embed_dim", 512, "ofs_embed_dim = 512"),
    "odd rotation": (COG, "attention_head_dim", 40, "attention_head_dim = 40"),
    "Wan I2V": (WAN, "added_kv_proj_dim", 48, "added_kv_proj_dim = 48, where we have only None"),
    "Wan 2.2 I2V": (WAN, "in_channels", 9, "in_channels = 9, where we have only 4"),
    "Wan rope": (WAN, "rope_max_seq_len", 32, "rope_max_seq_len = 32, where we have only 1024"),
    "a word for a number": (WAN, "num_layers", "two", "num_layers = 'two', where a value like 40 is expected"),
    "null for a number": (WAN, "num_layers", None, "num_layers = None, where a value like 40 is expected"),
    "no layers": (WAN, "num_layers", 0, "num_layers = 0"),
    "true for a number": (WAN, "num_layers", True, "num_layers = True"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SETTINGS)
def test_settings_that_we_lack_are_refused(tmp_path, bad):
    settings, key, value, says = BAD_SETTINGS[bad]
    folder(tmp_path, {"x": np.zeros(1, np.float32)}, settings | {key: value})
    message = fails(tmp_path)
    assert says in message and str(tmp_path / "config.json") in message and "\n" not in message


def test_all_of_them_at_once():
    with pytest.raises(WeightsError, match="dropout = 0.5.*norm_eps = 0.1"):
        config_from_diffusers(COG | {"dropout": 0.5, "norm_eps": 0.1}, "config.json")


def test_another_model_than_the_one_asked_for(cog):
    message = fails(cog, model="flux-dev")
    assert "expected FluxTransformer2DModel" in message and "found 'CogVideoXTransformer3DModel'" in message
    assert "model: expected one of flux-dev" in fails(cog, model="flux-medium")
    assert "or a config of one; found <class" in fails(cog, model=cogvideox.CogVideoX)
    # The right class and the wrong size: the keys tell.
    assert "missing transformer_blocks.2.norm1.linear.weight" in fails(
        cog, model=dataclasses.replace(cogvideox.COGVIDEOX_5B, num_layers=3)
    )


# --- bad files: one line that names the file and what to do ---------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def retype(path, kind):
    """The tensors of a file declared to be of another kind."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = 0
    for key in sorted(header.keys() - {"__metadata__"}, key=lambda k: header[k]["data_offsets"]):
        size = int(np.prod(header[key]["shape"], dtype=int))
        header[key] |= {"dtype": kind, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def rename(path, name):
    path.rename(path.with_name(name))


BAD_FILES = {
    "cut short": (lambda f: cut(shard(f)), "-00001-of-00002.safetensors is not a complete safetensors file (it has "),
    "nothing": (lambda f: shard(f).write_bytes(b""), "it has 0 bytes); fetch it again"),
    "noise": (lambda f: shard(f).write_bytes(bytes(range(200))), "do not begin with a whole header"),
    "header of noise": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 20) + b'{"a": [1, 2, 3], "b"'), "cannot be understood"
    ),
    "LFS pointer": (
        lambda f: shard(f).write_text("version https://git-lfs\noid sha256:00\nsize 9\n"), "git lfs pull"
    ),
    "GGUF": (lambda f: shard(f).write_bytes(b"GGUF" + bytes(100)), "a GGUF file, quantised); get a safetensors file"),
    "a pickle by name of safetensors": (lambda f: shard(f).write_bytes(b"PK\x03\x04" + bytes(99)), "PyTorch pickle"),
    "fp8": (lambda f: retype(shard(f), "F8_E4M3"), "tensors: expected F64, F32, F16, BF16, found F8_E4M3"),
    "shard that is missing": (lambda f: shard(f).unlink(), "names files that are not there: ['diffusion_pytorch_mod"),
    "download under way": (
        lambda f: rename(shard(f), "abc.incomplete"), "(the download of abc.incomplete has not finished)"
    ),
    "no index": (
        lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").unlink(), "several and their .safetensors.inde"
    ),
    "an index of noise": (
        lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").write_text("{"), "index.json is not JSON"
    ),
    "an index that leaves the folder": (
        lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        "expected names of files in this folder, found ['../x']",
    ),
    "an index without a map": (
        lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"), "expected a weight_map"
    ),
    "broken config.json": (lambda f: (f / "config.json").write_text('{"_class_name": "Fl'), "config.json is not JSON"),
    "config.json of a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "no such file; name the folder that has the weights"),
    "only pickles": (
        lambda f: [rename(p, f"{i}.bin") for i, p in enumerate(f.glob("*safetensors*"))], "only pickles such as 0.bin"
    ),
    "empty": (lambda f: [p.unlink() for p in f.glob("*safetensors*")] and [(f / "config.json").rename(f / "c.json")],
              "or say with model= what they are of: flux-dev"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_named(cog, bad):
    spoil, says = BAD_FILES[bad]
    spoil(cog)
    message = fails(cog)
    assert says in message and str(cog) in message
    assert bad == "fp8" or "\n" not in message


def test_files_that_are_no_weights(tmp_path):
    assert "no such file or folder" in fails(tmp_path / "a" / "b", model="flux-dev")
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in fails(tmp_path / "empty", model="flux-dev")
    (tmp_path / "x.incomplete").write_bytes(b"12")
    assert "a download that has not finished" in fails(tmp_path / "x.incomplete", model="flux-dev")
    (tmp_path / "model_index.json").write_text("{}")
    assert "a pipeline without its transformer/" in fails(tmp_path)


def test_a_pipeline_of_two_experts_is_not_half_of_it(cog):
    cog.with_name("transformer_2").symlink_to(cog)
    assert "two models, transformer and transformer_2; name the folder of one" in fails(cog.parent)
    assert from_pretrained(cog.parent / "transformer_2").config == from_pretrained(cog).config


def test_the_home_folder(cog, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_pretrained("~/pipeline").config.num_layers == 2
    linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    save(linear, "~/x.safetensors")
    load(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(1)), "~/x.safetensors")
    for path in ("~no_such_user_here/x", "", None):
        with pytest.raises(WeightsError, match="path"):
            from_pretrained(path)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="none/x.safetensors could not be written"):
        save(linear, tmp_path / "none" / "x.safetensors")


def test_a_file_that_may_not_be_read(cog, monkeypatch):
    real = open

    def forbidden(path, *args, **kwargs):
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", forbidden)
    message = fails(cog)
    assert f"{shard(cog)} cannot be read (Permission denied)" in message and "\n" not in message


def test_every_problem_is_in_one_message(cog):
    """Missing, unexpected, mis-shaped, in two files, in another file than the index says: all of them."""
    weights, _, _ = parity.read("cogvideox_5b")
    first, second = sorted(cog.glob("*.safetensors"))
    keys = sorted(weights)
    assert "proj_out.weight" in keys[1::2]
    lost = keys[3]
    one = {k: weights[k] for k in keys[::2]} | {"proj_out.weight": np.zeros((63, 64), np.float32)}
    two = {k: weights[k] for k in keys[1::2] if k not in ("proj_out.weight", lost)}
    save_file(one | {"more": np.zeros(2, np.float32)}, first)
    save_file(two | {keys[0]: weights[keys[0]]}, second)
    message = fails(cog)
    for line in (
        f"{keys[0]} is in two files, {first.name} and {second.name}",
        f"missing {lost}",
        f"{lost} is not in {second.name}, where the index puts it",
        "unexpected more",
        "proj_out.weight: expected shape (16, 64), found (63, 64)",
        f"proj_out.weight is in {first.name}, and the index says {second.name}",
    ):
        assert line in message, message


# --- the hub --------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub(cog, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(cog.parent)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert from_pretrained("someone/CogVideoX").config.num_layers == 2
    assert asked == [("someone/CogVideoX", ["transformer/*.safetensors", "transformer/*.json"])]
    assert "has no folder transformer_2/" in fails("someone/Wan/transformer_2")

    class RemoteProtocolError(Exception):
        """What httpx raises in the middle of a download."""

    for error in (OSError("Cannot reach\nthe hub"), ValueError("bad id"), RemoteProtocolError("peer closed")):

        def failing(name, error=error, **_):
            raise error

        hub.snapshot_download = failing
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        assert f"someone/CogVideoX could not be fetched from the hub ({what})" in fails("someone/CogVideoX")


def test_a_name_on_the_hub_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = fails("black-forest-labs/FLUX.1-dev")
    assert "black-forest-labs/FLUX.1-dev" in message and "pip install 'paro_jax[port]'" in message
