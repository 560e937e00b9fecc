"""Video metrics against closed forms, planted motions and independent derivations; what a network may not return."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from paro_jax import video_metrics as vm
from paro_jax.demo import data


def sample(mean, covariance):
    """2 d points whose sample mean and sample covariance are exactly these."""
    root = np.linalg.cholesky(np.atleast_2d(covariance)).T
    points = np.concatenate([root, -root]) * np.sqrt((2 * len(root) - 1) / 2)
    return points + np.asarray(mean, float)


def frechet_by_eigenvalues(a, b):
    """The formula as it stands: C_a^(1/2) and the eigenvalues of C_a^(1/2) C_b C_a^(1/2), both symmetric."""
    ca, cb = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(ca)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca) + np.trace(cb) - 2 * middle


def scenes(n):
    return np.stack([(data.render(data.random_scene(seed)) + 1) / 2 for seed in range(n)])


def texture(seed, waves=24):
    """A smooth random colour picture that can be drawn at any real coordinate, in [0, 1]."""
    r = np.random.default_rng(seed)
    length, angle, phase = r.uniform([[[0.15]], [[0]], [[0]]], [[[0.9]], [[2 * np.pi]], [[2 * np.pi]]], (3, waves, 3))

    def draw(y, x):
        along = np.cos(angle) * x[..., None, None] + np.sin(angle) * y[..., None, None]
        return np.clip(0.5 + 0.35 * np.cos(length * along + phase).sum(-2) / np.sqrt(waves), 0, 1)

    return draw


def grid(h, w):
    return np.meshgrid(np.arange(h, dtype=float), np.arange(w, dtype=float), indexing="ij")


def test_frechet_distance_of_known_gaussians():
    # One feature: (difference of means)^2 + (difference of standard deviations)^2.
    assert vm.frechet_distance(sample([1.0], 4.0), sample([-2.0], 0.25)) == pytest.approx(3**2 + 1.5**2)
    # Covariances that commute: the same for each axis.
    a, b = sample([0, 0, 1], np.diag([1.0, 4.0, 9.0])), sample([2, 0, 1], np.diag([4.0, 4.0, 1.0]))
    assert vm.frechet_distance(a, b) == pytest.approx(4 + 1 + 0 + 4)
    # Covariances that do not: for two features tr (C_a C_b)^(1/2) = sqrt(tr(C_a C_b) + 2 sqrt(det(C_a C_b))).
    ca, cb = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    middle = np.sqrt(np.trace(ca @ cb) + 2 * np.sqrt(np.linalg.det(ca @ cb)))
    expected = 2 + np.trace(ca) + np.trace(cb) - 2 * middle
    assert vm.frechet_distance(sample([1, 0], ca), sample([0, 1], cb)) == pytest.approx(expected, rel=1e-12)
    # Covariances of different subspaces: nothing in common.
    a, b = np.zeros((4, 6)), np.zeros((4, 6))
    a[:, :2], b[:, 3:5] = sample([0, 0], ca), sample([0, 0], cb)
    assert vm.frechet_distance(a, b) == pytest.approx(np.trace(ca) + np.trace(cb))


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 8), (5, 7, 12), (3, 40, 12), (2, 2, 1)], ids=str)
def test_frechet_distance_matches_the_formula(n, m, d):
    rng = np.random.default_rng(n)
    a = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    b = 0.5 + rng.standard_normal((m, d)) @ rng.standard_normal((d, d))
    # The oracle takes roots of eigenvalues that should be 0 and are 1e-16 or so.
    assert vm.frechet_distance(a, b) == pytest.approx(frechet_by_eigenvalues(a, b), rel=1e-6)
    assert vm.frechet_distance(b, a) == pytest.approx(vm.frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_equal_and_of_shifted_sets():
    x = 1e3 * np.random.default_rng(0).standard_normal((16, 84))
    assert 0 <= vm.frechet_distance(x, x) < 1e-15
    assert 0 <= vm.frechet_distance(x, x[::-1]) < 1e-15
    assert 0 <= vm.frechet_distance(x[:, :5], x[:, :5]) < 1e-15
    assert vm.frechet_distance(x, x + 2) == pytest.approx(4 * 84, rel=1e-9)
    constant = np.ones((3, 4))  # no variance at all
    assert vm.frechet_distance(constant, constant - 1) == pytest.approx(4)


def test_structure_features_of_a_ramp():
    """Intensity 0.3 + 0.01 x - 0.02 t: the slopes are known, and pooling s pixels makes that along x s times it."""
    f, h, w = 4, 16, 24
    y, x = grid(h, w)
    video = np.stack([0.3 + 0.01 * x - 0.02 * t + 0 * y for t in range(f)])[..., None].repeat(3, -1)
    found = vm.structure_features(video[None])[0]
    colour = found[:12].reshape(2, 2, 3)
    np.testing.assert_allclose(colour[:, 0], 0.3 + 0.01 * 5.5 - 0.02 * 1.5, rtol=1e-5)
    np.testing.assert_allclose(colour[:, 1], 0.3 + 0.01 * 17.5 - 0.02 * 1.5, rtol=1e-5)
    for scale, tensor in zip((1, 2, 4), found[12:].reshape(3, 4, 6), strict=True):
        expected = [0.02, 0, 0.01 * scale, 0, -np.sqrt(0.02 * 0.01 * scale), 0]  # tt yy xx ty tx yx
        np.testing.assert_allclose(tensor, np.tile(expected, (4, 1)), atol=1e-5)


def test_structure_features_see_time():
    video = scenes(2)
    ahead, back = vm.structure_features(video), vm.structure_features(video[:, ::-1])
    tensors = slice(12, None)
    flip = np.tile([1, 1, 1, -1, -1, 1], 12)  # t-y and t-x change sign with the arrow of time, nothing else does
    np.testing.assert_allclose(back[:, tensors], ahead[:, tensors] * flip, atol=1e-4)
    still = vm.structure_features(video[:, :1])
    assert np.isfinite(still).all() and not still[:, tensors].reshape(2, 12, 6)[..., [0, 3, 4]].any()


def test_frechet_distance_of_worse_videos_is_larger():
    dense = scenes(4)
    noise = np.random.default_rng(0).standard_normal(dense.shape)
    reference = vm.extract_features(dense, extractor=vm.structure_features)

    def distance(videos):
        return vm.frechet_distance(reference, vm.extract_features(videos, extractor=vm.structure_features))

    none, little, more = (distance(np.clip(dense + s * noise, 0, 1)) for s in (0, 0.02, 0.1))
    assert none < 1e-15 and 1e-5 < little < more / 5
    assert distance(dense[:, ::-1]) > little  # the same frames, played backwards


def test_an_extractor_is_handed_f32_and_may_be_of_any_framework():
    def extractor(videos):
        assert type(videos) is np.ndarray and videos.dtype == np.float32 and videos.shape == (3, 2, 8, 9, 3)
        return jnp.asarray(videos).mean((1, 2, 3)).astype(jnp.bfloat16)

    found = vm.extract_features(jnp.full((3, 2, 8, 9, 3), 0.5, jnp.bfloat16), extractor=extractor)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.full((3, 3), 0.5))


# (x, y), pixels a frame; the mean endpoint error may be so large. Up to four pixels, on 44 x 52 as in the demo.
@pytest.mark.parametrize(
    ("motion", "tolerance"), [((0, 0), 0), ((0.5, -0.25), 0.1), ((-1.5, 0.75), 0.1), ((3, 2), 0.1)]
)
def test_lucas_kanade_finds_planted_translations(motion, tolerance):
    draw, (y, x) = texture(1), grid(44, 52)
    frames = np.stack([draw(y - motion[1] * t, x - motion[0] * t) for t in range(4)])
    flow = vm.extract_flow(frames[None], flow=vm.lucas_kanade)
    assert flow.shape == (1, 3, 44, 52, 2) and flow.dtype == np.float32
    truth = np.broadcast_to(np.float32(motion), flow.shape)
    assert vm.endpoint_error(truth, flow) <= tolerance
    assert vm.flow_score(flow) == pytest.approx(np.hypot(*motion), abs=tolerance)
    assert vm.delta_flow_score(truth, flow) <= tolerance


def test_lucas_kanade_tells_a_moving_thing_from_the_ground():
    ground, thing, (y, x) = texture(1), texture(2), grid(48, 64)
    frames = []
    for t in range(3):
        left = 20 + 2 * t
        inside = (np.abs(y - 24) < 12) & (x >= left) & (x < left + 24)
        frames.append(np.where(inside[..., None], thing(y, x - left), ground(y, x)))
    flow = vm.lucas_kanade(np.stack(frames))
    np.testing.assert_allclose(flow[0, 18:31, 26:39].mean((0, 1)), [2, 0], atol=0.1)
    assert np.abs(flow[0, :6]).max() < 0.1 and np.abs(flow[0, :, :8]).max() < 0.1


def test_lucas_kanade_without_texture_and_on_tiny_frames():
    assert not vm.lucas_kanade(np.full((3, 40, 40, 3), 0.5)).any()
    assert vm.lucas_kanade(np.random.default_rng(0).random((2, 2, 3, 1))).shape == (1, 2, 3, 2)


def test_flow_numbers_of_known_flows():
    east, west, none = np.full((2, 3, 4, 5, 2), 0.0), np.zeros((2, 3, 4, 5, 2)), np.zeros((2, 3, 4, 5, 2))
    east[0], east[1, ..., 0] = [3, 4], 2
    west[:] = -east
    np.testing.assert_allclose(vm.flow_score(east), [5, 2])
    np.testing.assert_allclose(vm.delta_flow_score(none, east), [5, 2])
    np.testing.assert_allclose(vm.delta_flow_score(east, none), [5, 2])
    np.testing.assert_allclose(vm.delta_flow_score(east, west), [0, 0])
    np.testing.assert_allclose(vm.endpoint_error(east, west), [10, 4])
    half = np.concatenate([east[:, :, :2], none[:, :, 2:]], axis=2)
    np.testing.assert_allclose(vm.flow_score(half), [2.5, 1])


def test_a_flow_estimator_sees_one_video_at_a_time():
    videos = np.random.default_rng(0).random((2, 3, 4, 5, 3)).astype(np.float32)
    seen = []

    def estimator(frames):
        seen.append(frames)
        return np.full((2, 4, 5, 2), len(seen))

    flow = vm.extract_flow(videos, flow=estimator)
    np.testing.assert_array_equal(np.stack(seen), videos)
    np.testing.assert_array_equal(flow[:, 0, 0, 0, 0], [1, 2])


COLOUR = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "grey": [1.0, 1.0, 1.0]}


def see(frames):
    return frames.mean((1, 2))


def read(captions, scale=1.0):
    return [[scale * part for part in COLOUR[caption]] for caption in captions]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30], ids=str)
def test_clip_similarity_is_the_mean_cosine(scale):
    videos = np.zeros((3, 4, 8, 8, 3))
    videos[0, ..., 0] = 0.7
    videos[1, :3, ..., 0], videos[1, 3:, ..., 1] = 0.2, 0.9  # red for three frames, green for one
    videos[2] = [0.5, 0.25, 0]
    found = vm.clip_similarity(
        videos, ("red", "red", "grey"), image_encoder=see, text_encoder=functools.partial(read, scale=scale)
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [1, 0.75, 0.75 / np.sqrt(3 * 0.3125)], rtol=1e-6)


def test_video_quality_is_what_the_scorer_says():
    videos = np.stack([np.full((2, 8, 8, 3), value) for value in (0.25, 0.5)])
    found = vm.video_quality(
        videos, ["a", "bbb"], scorer=lambda v, captions: 100 * v.mean((1, 2, 3, 4)) + [len(c) for c in captions]
    )
    np.testing.assert_allclose(found, [26, 53])
    assert found.dtype == np.float32


class Torch:
    """Stands for a tensor on a GPU."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def not_finite(shape):
    x = np.zeros(shape)
    x[1] = np.nan
    return x


def returning(result):
    def network(*_):
        return result

    return network


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (np.zeros((3, 5)), ["[2, d]", "(3, 5)"]),
        (np.zeros(2), ["[2, d]", "(2,)"]),
        (np.zeros((2, 0)), ["[2, d]", "(2, 0)"]),
        (not_finite((2, 5)), ["finite", "index 1"]),
        (np.full((2, 5), 1e300), ["finite", "index 0, 1"]),
        ([[1.0], [2.0, 3.0]], ["[2, d]", "list"]),
        (None, ["[2, d]", "NoneType"]),
        (np.ones((2, 5)) * 1j, ["real numbers", "ndarray"]),
        (Torch(), ["Torch", ".detach().cpu()"]),
    ],
    ids=["count", "rank", "empty", "nan", "too large", "ragged", "none", "complex", "gpu"],
)
def test_a_wrong_extractor_is_named(says, result, words):
    with says("extractor", "returning.<locals>.network", *words):
        vm.extract_features(np.zeros((2, 3, 8, 8, 3)), extractor=returning(result))


def test_other_wrong_networks_are_named(says):
    videos, captions = np.zeros((2, 3, 8, 8, 3)), ["a", "b"]
    with says("flow", "network", "[2, 8, 8, 2]", "(3, 8, 8, 2)"):
        vm.extract_flow(videos, flow=returning(np.zeros((3, 8, 8, 2))))
    with says("flow", "network", "finite", "index 1"):
        vm.extract_flow(videos, flow=returning(not_finite((2, 8, 8, 2))))
    with says("text_encoder", "network", "[2, d]", "(1, 4)"):
        vm.clip_similarity(videos, captions, image_encoder=see, text_encoder=returning(np.ones((1, 4))))
    with says("image_encoder", "network", "[3, 4]", "(3, 5)"):
        vm.clip_similarity(
            videos, captions, image_encoder=returning(np.ones((3, 5))), text_encoder=returning(np.ones((2, 4)))
        )
    with says("image_encoder", "see", "zeros", "index 0, 1, 2"):
        vm.clip_similarity(videos, captions, image_encoder=see, text_encoder=returning(np.ones((2, 3))))
    with says("scorer", "network", "[2]", "(2, 1)"):
        vm.video_quality(videos, captions, scorer=returning(np.ones((2, 1))))


@pytest.mark.parametrize(
    ("videos", "words"),
    [
        (np.zeros((3, 8, 8, 3)), ["[n, frames, height, width, 3]", "(3, 8, 8, 3)"]),
        (np.zeros((1, 3, 8, 8, 1)), ["(1, 3, 8, 8, 1)"]),
        (np.zeros((0, 3, 8, 8, 3)), ["not empty"]),
        (np.zeros((1, 3, 8, 8, 3), np.uint8), ["uint8", "255"]),
        (np.linspace(-1, 1, 576).reshape(1, 3, 8, 8, 3), ["[0, 1]", "-1", "(x + 1) / 2"]),
        (np.stack([np.zeros((3, 8, 8, 3)), np.full((3, 8, 8, 3), np.inf)]), ["finite", "index 1"]),
    ],
    ids=["rank", "grey", "empty", "uint8", "range", "infinite"],
)
def test_wrong_videos_never_reach_a_network(says, videos, words):
    def network(*_):
        raise AssertionError("called")

    captions = ["a"] * len(videos)
    for call in (
        lambda: vm.extract_features(videos, extractor=network),
        lambda: vm.extract_flow(videos, flow=network),
        lambda: vm.clip_similarity(videos, captions, image_encoder=network, text_encoder=network),
        lambda: vm.video_quality(videos, captions, scorer=network),
        lambda: vm.structure_features(videos),
    ):
        with says("videos", *words):
            call()


def test_other_mistakes_are_named(says):
    videos = np.zeros((2, 1, 8, 8, 3))
    with says("features_a", "[n, d]", "(4,)"):
        vm.frechet_distance(np.zeros(4), np.zeros((4, 1)))
    with says("features_b", "at least two", "(1, 4)"):
        vm.frechet_distance(np.zeros((2, 4)), np.zeros((1, 4)))
    with says("features_b", "4 features", "(2, 5)"):
        vm.frechet_distance(np.zeros((2, 4)), np.zeros((2, 5)))
    with says("features_a", "finite", "index 1"):
        vm.frechet_distance(not_finite((3, 4)), np.zeros((2, 4)))
    with says("two frames", "(2, 1, 8, 8, 3)"):
        vm.extract_flow(videos, flow=vm.lucas_kanade)
    with says("8 pixels", "(2, 1, 8, 7, 3)"):
        vm.structure_features(videos[:, :, :, :7])
    with says("frames", "[F, H, W, C]", "(1, 8, 8, 3)"):
        vm.lucas_kanade(videos[0])
    with says("reference", "height, width, 2", "(4, 5, 2)"):
        vm.endpoint_error(np.zeros((4, 5, 2)), np.zeros((1, 3, 4, 5, 2)))
    with says("flow", "(1, 3, 4, 5, 2)", "(1, 2, 4, 5, 2)"):
        vm.delta_flow_score(np.zeros((1, 3, 4, 5, 2)), np.zeros((1, 2, 4, 5, 2)))
    for captions in ("ab", ["a"], ["a", 1]):
        with says("captions", "2 strings", repr(captions)):
            vm.video_quality(videos, captions, scorer=see)
