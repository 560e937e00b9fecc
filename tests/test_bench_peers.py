"""The peers of `paro bench` that this machine cannot run: how they are called, and that what they lack is told."""

import sys
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import peers, torch_peer
from paro_jax.bench import cases


def test_of_a_compilers_output_the_error_is_told():
    said = torch_peer.reason(
        RuntimeError("C++ compile error\n" + "warning: dull\n" * 99 + "x.cpp:1: error: no f\nmore")
    )
    assert said.startswith("RuntimeError: C++ compile error warning") and said.endswith("... x.cpp:1: error: no f")
    assert torch_peer.reason(KeyError("k")) == "KeyError: 'k'"


def test_pytorch_that_is_not_installed_is_missing_by_name():
    """By its real process, whose Python finds no torch."""
    q = jnp.ones((1, 8, 1, 16))
    torch = peers.Torch(sys.executable)
    try:
        found = torch.ask("torch sdpa", peers.Problem(q, q, q, None, (64, 64), "cpu"), 0.0)
    finally:
        torch.close()
    try:
        import torch  # noqa: F401
    except ImportError:
        assert "torch cannot be imported by" in found["missing"] and "--torch-python" in found["missing"]
    else:
        assert found["ms"] > 0
    gone = peers.Torch("false")
    try:
        found = gone.ask("torch sdpa", peers.Problem(q, q, q, None, (64, 64), "cpu"), 0.0)
        assert "ended with status" in found["failed"]
    finally:
        gone.close()
    rude = peers.Torch("echo")
    try:
        found = rude.ask("torch sdpa", peers.Problem(q, q, q, None, (64, 64), "cpu"), 0.0)
        assert "torch_peer.py" in found["failed"] and "is echo a Python?" in found["failed"]
    finally:
        rude.close()


@pytest.mark.parametrize("gpu", [False, True], ids=["host", "CUDA events"])
def test_pytorchs_times_with_a_stand_in(tmp_path, gpu):
    class Tensor:
        def __getitem__(self, which):
            assert which == slice(-1, None)  # one batch entry is checked, and need not travel alone
            return self

        def float(self):
            return self

        cpu = float

        def numpy(self):
            return np.ones((1, 1, 2, 3), np.float32)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.calls = len(used)

        def elapsed_time(self, other):
            return 7.0 * (other.calls - self.calls)

    used, slept = [], []
    cuda = types.SimpleNamespace(synchronize=lambda: None, Event=Event, _sleep=slept.append)
    torch = types.SimpleNamespace(__version__="0", cuda=cuda)
    job = {"gpu": gpu, "seconds": 0}
    found = torch_peer.timed(torch, lambda x: used.append(x) or Tensor(), [["a"], ["b"]], job, tmp_path)
    assert found["timer"] == ("events" if gpu else "host") and found["runs"] == 5 and len(slept) == gpu
    assert 0 <= found["low_ms"] <= found["ms"] <= found["high_ms"] and (found["ms"] == 7.0 or not gpu)
    assert set(used[1:]) == {"a", "b"} and used[3] != used[4] and np.load(tmp_path / "out.npy").shape == (1, 1, 2, 3)


@pytest.mark.parametrize(("block", "tiles"), [((128, 128), None), ((128, 64), {"BLOCK_M": 128, "BLOCK_N": 64})])
def test_flexattention_gets_our_kept_blocks_and_never_goes_on_uncompiled(monkeypatch, tmp_path, block, tiles):
    """With a stand-in for torch. After 8 shapes PyTorch would drop the compiled kernel, and with it the block mask."""
    made, compiled, called = [], [], []

    class Array(np.ndarray):
        device, is_cuda = "cuda", True

        def to(self, device):
            return self

    class BlockMask:
        @staticmethod
        def from_kv_blocks(*lists, BLOCK_SIZE, seq_lengths):
            made.append((lists, BLOCK_SIZE, seq_lengths))
            return "mask"

    def compile(function, **options):
        compiled.append(options)
        return lambda *arrays, **options: called.append((arrays, options))

    flex_attention = types.ModuleType("torch.nn.attention.flex_attention")
    flex_attention.__dict__.update(BlockMask=BlockMask, flex_attention=None)
    for name in ("torch", "torch.nn", "torch.nn.attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, flex_attention.__name__, flex_attention)
    config = types.SimpleNamespace(recompile_limit=8)
    torch = types.SimpleNamespace(
        from_numpy=lambda x: x.view(Array), zeros_like=np.zeros_like, compile=compile,
        _dynamo=types.SimpleNamespace(config=config),
    )  # fmt: skip
    keep, held = cases.random_mask((3, 4, 5), 0.3), {}
    np.save(tmp_path / "keep.npy", keep)
    q = np.zeros((2, 3, 500, 64)).view(Array)
    for _ in range(2):
        torch_peer.flex(torch, [q, q, q], tmp_path, list(block), held)("q", "k", "v")
    assert compiled == [{"dynamic": False, "fullgraph": True}] and config.recompile_limit >= 64
    ((count, index, full_count, full_index), size, tokens), _ = made
    assert not count.any() and index is not full_index and size == block and tokens == (500, 500)
    kept = np.zeros_like(keep)
    for head, row in np.ndindex(keep.shape[:2]):
        kept[head, row, full_index[0, head, row, : full_count[0, head, row]]] = True
    np.testing.assert_array_equal(kept, keep)
    assert called[1] == (("q", "k", "v"), {"block_mask": "mask", "kernel_options": tiles})


@pytest.mark.parametrize("name", ["cudnn bf16", "cudnn fp8", "attention_mgpu"])
def test_peers_that_need_a_gpu_are_called_as_the_installed_jax_wants(monkeypatch, name):
    """Traced, not run: their own checks of shapes, dtypes and arguments pass."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(attention_mgpu, "cuda_versions", types.SimpleNamespace(cuda_runtime_get_version=lambda: 13000))
    q = jax.random.normal(jax.random.key(0), (2, 256, 3, 64), jnp.bfloat16)
    problem = peers.Problem(q, q, q, None, (128, 128), "sm_90")
    peer = next(p for p in peers.PEERS if p.name == name)
    assert peer.why_not(problem) is None
    function, arguments, factor = peer.prepare(problem)
    found = jax.eval_shape(function, *arguments)
    assert found.shape == q.shape and factor > 0
    dtypes = {"cudnn bf16": jnp.bfloat16, "cudnn fp8": jnp.float8_e4m3fn, "attention_mgpu": jnp.float16}
    assert found.dtype == dtypes[name]
    odd = peer.why_not(replace(problem, q=q[:, :255]))
    assert odd is None if name != "attention_mgpu" else "these are 255" in odd
