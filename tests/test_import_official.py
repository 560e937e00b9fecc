"""Plan files of the method's authors: files that torch wrote, and files that mean harm."""

import io
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import calibrate
from calibrate import _import_official
from paro_jax import QuantSpec, TokenGrid

FILES = Path(__file__).parent / "golden" / "official"  # written by golden/make_official_plans.py
GRID = TokenGrid((5, 10, 13), text=70)
ORDERS = [["FHW", "FWH", "HWF"], ["HFW", "WHF", "WFH"]]


def imported(permute="permute_plan", sparse="sparse_plan", grid=GRID, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = calibrate.import_official(FILES / f"{permute}.pth", FILES / f"{sparse}.pth", grid, **options)
    return plan, [str(w.message) for w in caught]


def their_mask():
    """bool [masks, layers, heads, 12, 12] as make_official_plans.py has it"""
    mask = (np.arange(2 * 2 * 3 * 12 * 12).reshape(2, 2, 3, 12, 12) * 5) % 29 == 0
    mask[..., :2, :], mask[..., :2], mask[..., -1, :], mask[..., -1] = True, True, True, True
    return mask


def test_the_numbers_of_orders():
    plan, _ = imported()
    assert plan.order_list() == [ORDERS, ORDERS]
    assert plan.lead == (2, 2) and plan.bucket_edges == (0.0, 0.5, 1.0)
    assert plan.block == (64, 64) and plan.grid == GRID and plan.k_mean is None and plan.quant == QuantSpec()
    assert imported(quant=QuantSpec(qk="int8"))[0].quant == QuantSpec(qk="int8")


def test_nothing_that_was_kept_is_lost_and_nothing_else_is_kept():
    """Token by token: they have 70 tokens of text first, we last; the image tokens are in the same order."""
    plan, _ = imported()
    tokens = np.arange(GRID.tokens)
    theirs = their_mask()[..., tokens // 64, :][..., tokens // 64]
    image = np.roll(tokens, -70)[:650]
    pairs = theirs[..., image, :][..., image]
    edges = np.arange(0, 650, 64)
    kept = np.logical_or.reduceat(np.logical_or.reduceat(pairs, edges, -2), edges, -1)
    expected = np.ones((2, 2, 3, 12, 12), bool)
    expected[..., :11, :11] = kept
    expected |= GRID.always_keep((64, 64))
    np.testing.assert_array_equal(plan.mask().keep, expected)


@pytest.mark.parametrize("sparse", ["sparse_plan_image", "sparse_plan_short"])
def test_the_ways_to_count_blocks(sparse):
    """All blocks; without text (uint8, a view with strides); without text and the partial last (float, transposed)."""
    np.testing.assert_array_equal(imported()[0].mask().keep, imported(sparse=sparse)[0].mask().keep)


def test_text_that_fills_its_blocks_needs_no_change():
    """Their blocks are ours, only that text comes last."""
    grid = TokenGrid((5, 8, 16), text=128)
    plan, messages = imported(grid=grid)
    theirs = their_mask()
    expected = np.roll(theirs, (-2, -2), (-2, -1))
    np.testing.assert_array_equal(plan.mask().keep, expected)
    assert messages == []


def test_no_text():
    grid = TokenGrid((5, 10, 15))
    plan, messages = imported(grid=grid)
    np.testing.assert_array_equal(plan.mask().keep, their_mask())
    assert messages == []
    with pytest.raises(
        ValueError, match=r"'sparse' has 10 x 10 blocks, but grid \(5, 10, 15\) with text 0 has 12 a side"
    ):
        imported(grid=grid, sparse="sparse_plan_image")


def test_unpadded_text_is_warned_about():
    plan, (message,) = imported()
    there, here = their_mask().mean(), np.asarray(plan.mask().keep).mean()
    assert there < here
    assert f"density {there:.4f} there is {here:.4f} here" in message
    assert "70 tokens, 1.09 blocks" in message and "Calibrate anew" in message


def test_a_stated_density_that_is_not_the_masks_is_warned_about():
    _, messages = imported(sparse="sparse_plan_short")
    rate = their_mask()[0, 0, 0].mean()
    assert (
        f"12 of 12 heads, most at (mask, layer, head) (0, 0, 0): {rate + 0.1:.4f} stated, {rate:.4f} found"
        in messages[1]
    )


def test_empty_heads_are_warned_about():
    plan, messages = imported("permute_plan_empty")
    assert "1 heads are flagged as empty" in messages[0]
    np.testing.assert_array_equal(plan.mask().keep, imported()[0].mask().keep)


def test_torch_is_not_needed():
    assert "torch" not in sys.modules


BAD = {
    "unknown order": ({"permute": "permute_plan_unknown"}, r"permute_plan_unknown.*orders 0 to 5; it also has \[6\]"),
    "not 0 and 1": ({"sparse": "sparse_plan_twos"}, r"sparse_plan_twos.*0 \(skip\) and 1 \(keep\) only; mask \(0, 0\)"),
    "a bare tensor": (
        {"sparse": "kernel_sparse_plan"},
        "expected a dict with a tensor 'sparse'; it holds a bare ndarray",
    ),
    "files exchanged": (
        {"permute": "sparse_plan", "sparse": "permute_plan"},
        "expected a dict with a tensor 'permute'; it holds 'sparse', 'dense_rate'",
    ),
    "layers": (
        {"sparse": "sparse_plan_one_layer"},
        r"\(layers, heads\) = \(2, 3\), as in .*permute_plan.pth; got \(2, 1, 3, 12, 12\)",
    ),
    "another resolution": (
        {"grid": TokenGrid((13, 30, 45), text=226)},
        r"12 x 12 blocks, but grid \(13, 30, 45\) with text 226 has 278 or 274 or 273 a side .*resolution",
    ),
    "an image": ({"grid": TokenGrid((64, 64), text=512)}, r"grid must be \(frames, height, width\) with text first"),
    "text last": ({"grid": TokenGrid((5, 10, 13), text=70, text_position="last")}, "grid must be .* with text first"),
    "no file": ({"permute": "permute"}, "permute.pth: there is no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_plan_that_does_not_fit(name):
    change, named = BAD[name]
    with pytest.raises(ValueError, match=named):
        imported(**change)


# Files that torch did not write


def pth(path, data, storages=(), compression=zipfile.ZIP_STORED, pickled=None):
    """A file in torch's zip format with `data` as its pickle."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(data)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("plan/data.pkl", buffer.getvalue() if pickled is None else pickled)
        for i, values in enumerate(storages):
            archive.writestr(f"plan/data/{i}", values)
    return path


class Tensor:
    """What the pickle of a torch tensor asks for."""

    def __init__(self, kind="LongStorage", key="0", count=6, offset=0, size=(2, 3), stride=(3, 1), pid=None):
        self.pid = pid or ("storage", Name("torch", kind), key, "cpu", count)
        self.arguments = offset, size, stride, False, OrderedDict()


class Name(str):
    """Pickled as the global module.name, whether that exists or not."""

    def __new__(cls, module, name):
        made = super().__new__(cls, name)
        made.module = module
        return made


class Storage:
    def __init__(self, pid):
        self.pid = pid


class Pickler(pickle._Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(b"c" + f"{obj.module}\n{obj}\n".encode())
        elif isinstance(obj, Tensor):
            self.save(Name("torch._utils", "_rebuild_tensor_v2"))
            self.save((Storage(obj.pid), *obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


SIX = np.arange(6, dtype="<i8").tobytes()


def test_a_file_made_by_hand_is_read(tmp_path):
    """The tests below differ from this one in one thing each."""
    found = _import_official.load_tensors(pth(tmp_path / "p.pth", {"permute": Tensor()}, [SIX]))
    np.testing.assert_array_equal(found["permute"], [[0, 1, 2], [3, 4, 5]])
    assert not found["permute"].flags.writeable
    turned = pth(tmp_path / "t.pth", OrderedDict(permute=Tensor(size=(3, 2), stride=(1, 3))), [SIX])
    np.testing.assert_array_equal(_import_official.load_tensors(turned)["permute"], [[0, 3], [1, 4], [2, 5]])


def test_big_endian(tmp_path):
    path = pth(tmp_path / "p.pth", {"permute": Tensor()}, [np.arange(6, dtype=">i8").tobytes()])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("plan/byteorder", "big")
    np.testing.assert_array_equal(_import_official.load_tensors(path)["permute"], [[0, 1, 2], [3, 4, 5]])


def harmful(module, name, *arguments):
    """A pickle that calls module.name(*arguments) when it is loaded."""
    inner = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + inner + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("__builtin__", "getattr"), ("numpy", "load"),
     ("torch", "load"), ("torch._utils", "_rebuild_tensor"), ("collections", "Counter"), ("subprocess", "Popen"),
     ("torch", "dtype"), ("torch.storage", "UntypedStorage"), ("os.path", "join")],
)  # fmt: skip
def test_a_pickle_that_calls_anything_is_refused(tmp_path, module, name):
    mark = tmp_path / "harm"
    path = pth(tmp_path / "p.pth", None, pickled=harmful(module, name, f"touch {mark}"))
    with pytest.raises(ValueError, match=rf"p\.pth: its pickle asks for {module}\.{name}; only tensors .*do not load"):
        _import_official.load_tensors(path)
    assert not mark.exists()


def test_the_harm_would_have_been_real(tmp_path):
    pickle.loads(harmful("os", "system", f"touch {tmp_path / 'harm'}"))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("hidden", [b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", b"(S'id'\nios\nsystem\n."])
def test_other_ways_to_name_a_function(tmp_path, hidden):
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        _import_official.load_tensors(pth(tmp_path / "p.pth", None, pickled=hidden))


# {"x": 1}, the same as slots, and the state of a big-endian dtype
STATES = [
    b"}X\x01\x00\x00\x00xK\x01s",
    b"N}X\x01\x00\x00\x00xK\x01s\x86",
    b"(K\x03X\x01\x00\x00\x00>NNNK\x00K\x00K\x00t",
]


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD on what find_class returned, to plant attributes there."""
    for name in (b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nLongStorage\n"):
        for state in STATES:
            path = pth(tmp_path / "p.pth", None, pickled=b"\x80\x02" + name + state + b"b.")
            with pytest.raises(ValueError, match="its pickle is damaged"):
                _import_official.load_tensors(path)
    assert not hasattr(dict, "x") and not hasattr(_import_official._Rebuild, "x")
    assert np.dtype("int64").byteorder == "="


def test_a_pickle_cannot_change_a_tensor(tmp_path):
    """Items set, and a state given, after the tensor is made."""
    for change in (b"K\x00K\x01s", b"(K\x01K\x06\x85U\x02i8K\x00U\x00tb", b"}X\x01\x00\x00\x00xK\x01sb"):
        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(Tensor())
        path = pth(tmp_path / "p.pth", None, [SIX], pickled=buffer.getvalue()[:-1] + change + b".")
        with pytest.raises(ValueError, match="damaged|read-only"):
            _import_official.load_tensors(path)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (Tensor(size=(2, 4)), "overruns its 6 numbers"),
        (Tensor(offset=1), "overruns its 6 numbers"),
        (Tensor(stride=(4, 1)), "overruns its 6 numbers"),
        (Tensor(size=(1 << 40, 3), stride=(0, 0)), "overruns its 6 numbers"),
        (Tensor(stride=(-3, 1)), r"has offset 0, size \(2, 3\), stride \(-3, 1\)"),
        (Tensor(offset=-1), "has offset -1"),
        (Tensor(size=(2.0, 3)), r"size \(2\.0, 3\)"),
        (Tensor(stride=(3,)), r"stride \(3,\)"),
        (Tensor(count=7), r"plan/data/0 must have 7 x 8 bytes; it has 48"),
        (Tensor(kind="IntStorage"), r"plan/data/0 must have 6 x 4 bytes; it has 48"),
        (Tensor(key="1"), r"plan/data/1 must have 6 x 8 bytes; it has None"),
        (Tensor(key="../data/0"), r"plan/data/\.\./data/0 must have"),
        (Tensor(kind="ComplexFloatStorage"), r"asks for torch\.ComplexFloatStorage"),
        (Tensor(pid=("module", "os")), r"refers to \('module', 'os'\); expected a tensor's storage"),
        (Tensor(pid=("storage", "Storage", "0", "cpu", 6)), "expected a tensor's storage"),
        (Tensor(pid=("storage", Name("torch", "LongStorage"), "0", "cpu", True)), "expected a tensor's storage"),
    ],
)
def test_a_tensor_that_lies(tmp_path, tensor, named):
    with pytest.raises(ValueError, match=named):
        _import_official.load_tensors(pth(tmp_path / "p.pth", {"permute": tensor}, [SIX]))


def test_not_a_torch_file(tmp_path):
    path = tmp_path / "p.pth"
    path.write_bytes(pickle.dumps({"permute": 1}))  # torch before 1.6
    with pytest.raises(ValueError, match="p.pth is not a whole file in torch's zip format.*before torch 1.6"):
        _import_official.load_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ValueError, match=r"expected one small <name>/data\.pkl; got \[\]"):
        _import_official.load_tensors(path)
    pth(path, None, pickled=b"\x80\x02" + b"0" * (2 << 20))
    with pytest.raises(ValueError, match="expected one small"):
        _import_official.load_tensors(path)
    pth(path, {"permute": Tensor()}, [SIX], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="an entry is compressed"):
        _import_official.load_tensors(path)
    pth(path, None, pickled=b"\x80\x02K\x01")
    with pytest.raises(ValueError, match="its pickle is damaged"):
        _import_official.load_tensors(path)
    pth(path, {"permute": 3})
    with pytest.raises(ValueError, match="expected a dict with a tensor 'permute'; it holds 'permute'"):
        calibrate.import_official(path, FILES / "sparse_plan.pth", GRID)


@pytest.mark.parametrize("cut", [10, 500, 1500])
def test_a_truncated_file(tmp_path, cut):
    path = tmp_path / "sparse_plan.pth"
    path.write_bytes((FILES / "sparse_plan.pth").read_bytes()[:-cut])
    with pytest.raises(ValueError, match="is not a whole file in torch's zip format"):
        calibrate.import_official(FILES / "permute_plan.pth", path, GRID)


def test_an_altered_byte(tmp_path):
    """The zip format's checksum sees it."""
    path = tmp_path / "sparse_plan.pth"
    shutil.copy(FILES / "sparse_plan.pth", path)
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[data.index(b"sparse_plan/data/0") + 600] ^= 1
    path.write_bytes(data)
    assert os.path.getsize(path) == os.path.getsize(FILES / "sparse_plan.pth") and entry.file_size == 1728
    with pytest.raises(ValueError, match="is not a whole file in torch's zip format"):
        calibrate.import_official(FILES / "permute_plan.pth", path, GRID)
