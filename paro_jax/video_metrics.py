"""What a set of generated videos is worth beside the dense ones: Fréchet distance, motion, caption and quality scores.

The networks that the field scores with (I3D, RAFT, CLIP, DOVER) are the caller's: each is a plain callable, from any
framework, and what it returns is checked. Two small built-in ones need no download, `structure_features` and
`lucas_kanade`; their numbers rank methods against one dense set and compare with nobody's I3D or RAFT.

Everything takes videos `[n, F, H, W, 3]` in [0, 1], hands f32 NumPy arrays to the callables and runs on the host, since
most of those networks do. Scores are one f32 number a video, so that the spread over seeds can be seen. A video that is
not finite is refused by its index: leave it out and mark its cell.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

FeatureExtractor = Callable[[np.ndarray], Any]  # videos f32 [n, F, H, W, 3] -> [n, d]
FlowEstimator = Callable[[np.ndarray], Any]  # frames f32 [F, H, W, 3] of one video -> [F - 1, H, W, 2], x before y
ImageEncoder = Callable[[np.ndarray], Any]  # frames f32 [F, H, W, 3] of one video -> [F, d]
TextEncoder = Callable[[list[str]], Any]  # n captions -> [n, d]
VideoScorer = Callable[[np.ndarray, list[str]], Any]  # videos f32 [n, F, H, W, 3] and their captions -> [n]

_SLACK = 1e-3  # how far a pixel may lie outside [0, 1]: what a resize or a bf16 decoder overshoots
_SCALES = (1, 2, 4)  # of structure_features: pixels averaged into one, each way
_CELLS = 2  # of structure_features: the image is described in 2 x 2 parts
_COARSEST = 16  # pixels: lucas_kanade halves the frames while the smaller side stays this long
_STEPS = 6  # Gauss-Newton steps of lucas_kanade at each scale
_WINDOW = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1], np.float32) / 256  # its window: binomial, sigma 1.4 pixels
_FLAT = 1e-5  # squared slope, (intensity / pixel)^2, under which it calls a direction textureless


def frechet_distance(features_a, features_b) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, squared as FID and FVD report it.

    d^2 = |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Dowson and Landau 1982; Heusel et al. 2017 (FID),
    Unterthiner et al. 2018 (FVD). With the features of the dense model's videos as one set it is "FVD-FP16".

    No matrix square root is taken and nothing is regularised. With A and B the centred features over sqrt(samples - 1),
    so that C_a = A'A, the covariance term is min |A - U B|^2 over rotations U (orthogonal Procrustes), which U from the
    SVD of A B' attains. It is a sum of squares: never negative, exact for fewer samples than features too, and equal
    sets give 0 to the last digit rather than the difference of two large traces.

    Args:
      features_a: [n, d], one row a video; n >= 2.
      features_b: [m, d]; m >= 2, m may differ from n.

    Returns:
      A float >= 0, in squared units of the features, computed in f64. Two samples of one distribution do not give 0 but
      a bias that falls with n and m: compare only numbers with the same extractor and the same n and m.

    Raises:
      ValueError: not two [n, d] arrays of one d, fewer than two rows, or a feature that is not finite.
    """
    a, b = _features("features_a", features_a), _features("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features_b: expected {a.shape[1]} features a video, as in features_a, got shape {b.shape}; "
            "use one extractor for both"
        )
    shift = a.mean(0) - b.mean(0)
    a, b = _covariance_root(a), _covariance_root(b)
    rows = max(len(a), len(b))
    a, b = (np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (a, b))
    left, _, right = np.linalg.svd(a @ b.T)
    return float(np.sum(shift**2) + np.sum((a - left @ right @ b) ** 2))


def extract_features(videos, *, extractor: FeatureExtractor) -> np.ndarray:
    """The features of `extractor`, checked, for `frechet_distance`.

    Args:
      videos: [n, F, H, W, 3] in [0, 1].
      extractor: called once with all videos as f32; returns [n, d]. `structure_features`, or a network of yours such as
        I3D; batching, resizing and normalising are its business.

    Returns:
      f32 [n, d].

    Raises:
      ValueError: wrong videos (`extractor` is then not called), or `extractor` returned another shape or count, or
        something that is not finite.
    """
    videos = _videos(videos)
    return _checked("extractor", extractor, extractor(videos), (len(videos), None))


def structure_features(videos) -> np.ndarray:
    """84 statistics a video: colour, contrast, edges and motion at three scales. A stand-in when no network is at hand.

    In each quarter of the image: the mean colour (3), and, with the video averaged over 1, 2 and 4 pixels each way, the
    mean of the 3-D structure tensor over pixels, frames and colours: the six products of the slopes along t, y and x
    (Bigün and Granlund 1987). The squares tell contrast, sharpness and flicker; y-x how edges lie; t-y and t-x which
    way things move. Square roots are taken, keeping the sign, so that every feature has the unit of an intensity.
    Nothing is learned or drawn at random. **The numbers compare with nobody's I3D**: they tell methods apart on one
    model.

    Args:
      videos: [n, F, H, W, 3] in [0, 1]; H and W at least 8. With one frame (images) the slopes along t are 0.

    Returns:
      f32 [n, 84].

    Raises:
      ValueError: wrong videos, or fewer than 8 pixels a side.
    """
    videos = _videos(videos)
    if min(videos.shape[2:4]) < _CELLS * _SCALES[-1]:
        raise ValueError(
            f"videos: structure_features needs at least {_CELLS * _SCALES[-1]} pixels a side, got {videos.shape}"
        )
    found = [_cell_means(videos).mean(1)]
    for scale in _SCALES:
        x = _pool(videos, scale)
        t = np.gradient(x, axis=1) if x.shape[1] > 1 else np.zeros_like(x)
        y, x = np.gradient(x, axis=2), np.gradient(x, axis=3)
        products = [np.mean(p * q, -1) for p, q in ((t, t), (y, y), (x, x), (t, y), (t, x), (y, x))]
        tensor = _cell_means(np.stack(products, -1)).mean(1)
        found.append(np.sign(tensor) * np.sqrt(np.abs(tensor)))
    return np.concatenate([f.reshape(len(videos), -1) for f in found], -1)


def extract_flow(videos, *, flow: FlowEstimator) -> np.ndarray:
    """The optical flow of every video, checked, for `flow_score`, `delta_flow_score` and `endpoint_error`.

    Args:
      videos: [n, F, H, W, 3] in [0, 1]; F at least 2.
      flow: called once a video with its frames, f32 [F, H, W, 3]; returns [F - 1, H, W, 2] in pixels a frame, (x, y) as
        RAFT does: what is at pixel (y, x) of frame f is at (y + flow[f, y, x, 1], x + flow[f, y, x, 0]) of frame f + 1.
        `lucas_kanade`, or a network of yours such as RAFT, which often wants frames times 255.

    Returns:
      f32 [n, F - 1, H, W, 2].

    Raises:
      ValueError: wrong videos, a single frame, or `flow` returned another shape or something that is not finite.
    """
    videos = _videos(videos)
    if videos.shape[1] < 2:
        raise ValueError(f"videos: optical flow needs at least two frames, got shape {videos.shape}")
    shape = (videos.shape[1] - 1, *videos.shape[2:4], 2)
    return np.stack([_checked("flow", flow, flow(frames), shape) for frames in videos])


def lucas_kanade(frames) -> np.ndarray:
    """Optical flow by least squares in a small window, from coarse to fine. A stand-in when no network is at hand.

    Lucas and Kanade 1981 on a pyramid (Bouguet 2001), over all colours, with a binomial window of 9 pixels. Meant for
    motions of a few pixels a frame. Where nothing has texture the flow stays what the coarser scale says, 0 at last;
    along an edge only the motion across it is seen. **The numbers compare with nobody's RAFT.**

    Args:
      frames: [F, H, W, C] in [0, 1]; F, H and W at least 2.

    Returns:
      f32 [F - 1, H, W, 2], (x, y) in pixels a frame; see `extract_flow`.

    Raises:
      ValueError: not such an array.
    """
    frames = np.asarray(frames, np.float32)
    if frames.ndim != 4 or min(frames.shape[:3]) < 2 or frames.shape[3] == 0:
        raise ValueError(f"frames: expected [F, H, W, C] with F, H and W at least 2, got shape {frames.shape}")
    pyramid = [frames]
    while min(pyramid[-1].shape[1:3]) >= 2 * _COARSEST:
        pyramid.append(_pool(pyramid[-1], 2))
    flow = np.zeros((len(frames) - 1, *pyramid[-1].shape[1:3], 2), np.float32)
    for level in reversed(pyramid):
        flow = _resize_flow(flow, *level.shape[1:3])
        for _ in range(_STEPS):
            flow = flow + _lucas_kanade_step(level[:-1], level[1:], flow)
    return flow


def flow_score(flow) -> np.ndarray:
    """How much a video moves: the mean length of its flow over pixels and frames.

    The Flow-Score of EvalCrafter (Liu et al. 2023), there with RAFT. More is not better; see `delta_flow_score`.

    Args:
      flow: [n, F - 1, H, W, 2] in pixels a frame, from `extract_flow`.

    Returns:
      f32 [n], pixels a frame.

    Raises:
      ValueError: not such an array.
    """
    return _mean_length(_flow("flow", flow))


def delta_flow_score(reference, flow) -> np.ndarray:
    """|flow_score(flow) - flow_score(reference)|: how much more or less a video moves than the dense one.

    The PAROAttention paper's Delta-FScore, lower is better, 0 for the dense model. How the paper averages is not
    published; the mean of these over videos cannot hide one video's excess behind another's lack.

    Args:
      reference: flow of the dense videos, [n, F - 1, H, W, 2] in pixels a frame.
      flow: flow of the same prompts and seeds under the method; of the same shape.

    Returns:
      f32 [n], pixels a frame.

    Raises:
      ValueError: not such arrays, or their shapes differ.
    """
    a, b = _flow_pair(reference, flow)
    return np.abs(_mean_length(b) - _mean_length(a))


def endpoint_error(reference, flow) -> np.ndarray:
    """Mean length of flow - reference over pixels and frames: sees where and which way things move, not only how much.

    Baker et al. 2011, "A database and evaluation methodology for optical flow". At least `delta_flow_score`.

    Args: as `delta_flow_score`.

    Returns:
      f32 [n], pixels a frame; 0 when equal.

    Raises:
      ValueError: as `delta_flow_score`.
    """
    a, b = _flow_pair(reference, flow)
    return _mean_length(b - a)


def clip_similarity(
    videos, captions: Sequence[str], *, image_encoder: ImageEncoder, text_encoder: TextEncoder
) -> np.ndarray:
    """CLIPSIM: cosine between a caption's embedding and each frame's, averaged over frames (Wu et al. 2021, GODIVA).

    With transformers 5 (before, no `.pooler_output`), `clip` the `CLIPModel` of `name`, under `torch.inference_mode()`
    (frames are in [0, 1] already, hence `do_rescale`):

        prepare = functools.partial(CLIPProcessor.from_pretrained(name), return_tensors="pt")
        see = lambda frames: clip.get_image_features(**prepare(images=list(frames), do_rescale=False)).pooler_output
        read = lambda texts: clip.get_text_features(**prepare(text=texts, padding=True, truncation=True)).pooler_output

    Args:
      videos: [n, F, H, W, 3] in [0, 1].
      captions: n strings.
      image_encoder: called once a video with its frames, f32 [F, H, W, 3]; returns [F, d].
      text_encoder: called once with the list of captions; returns [n, d]. Neither need be normalised.

    Returns:
      f32 [n] in [-1, 1].

    Raises:
      ValueError: wrong videos, another number of captions, or an encoder returned another shape, another d, something
        that is not finite or a zero embedding.
    """
    videos = _videos(videos)
    captions = _captions(captions, len(videos))
    texts = _checked("text_encoder", text_encoder, text_encoder(captions), (len(videos), None))
    texts = _normalised("text_encoder", text_encoder, texts)
    scores = []
    for frames, text in zip(videos, texts, strict=True):
        images = _checked("image_encoder", image_encoder, image_encoder(frames), (len(frames), len(text)))
        scores.append(np.mean(_normalised("image_encoder", image_encoder, images) @ text))
    return np.clip(np.array(scores, np.float32), -1, 1)


def video_quality(videos, captions: Sequence[str], *, scorer: VideoScorer) -> np.ndarray:
    """VQA: the quality that a network of the caller's gives each video, checked.

    The field uses DOVER (Wu et al. 2023) in EvalCrafter's setting, 0 to 100, more is better, which ignores captions; a
    vision-language model may want them. With `clip` and `prepare` as in `clip_similarity`, CLIP-IQA (Wang et al. 2023)
    of the middle frames:

        def scorer(videos, captions):
            middle, ask = list(videos[:, videos.shape[1] // 2]), ["Good photo.", "Bad photo."]
            logits = clip(**prepare(text=ask, images=middle, do_rescale=False, padding=True)).logits_per_image
            return 100 * logits.softmax(-1)[:, 0]

    Args:
      videos: [n, F, H, W, 3] in [0, 1].
      captions: n strings.
      scorer: called once with the videos as f32 and the list of captions; returns [n].

    Returns:
      f32 [n], in the scorer's unit.

    Raises:
      ValueError: wrong videos, another number of captions, or `scorer` returned another shape or count, or something
        that is not finite.
    """
    videos = _videos(videos)
    captions = _captions(captions, len(videos))
    return _checked("scorer", scorer, scorer(videos, captions), (len(videos),))


def _covariance_root(x: np.ndarray) -> np.ndarray:
    """R [min(n, d), d] with R'R the sample covariance of x [n, d]."""
    x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.linalg.qr(x, mode="r")


def _features(name: str, features) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: expected [n, d], one row a video and at least two of them for a covariance, got shape {x.shape}"
        )
    _refuse_not_finite(name, x)
    return x


def _refuse_not_finite(what: str, x: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
    if bad.size:
        raise ValueError(
            f"{what}: expected finite numbers, found NaN or infinity at index {_listed(bad)}; leave it out"
        )


def _listed(indices: np.ndarray) -> str:
    return ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")


def _videos(videos) -> np.ndarray:
    """f32 [n, F, H, W, 3] in [0, 1], or a ValueError: nothing is rescaled in silence."""
    x = np.asarray(videos)
    if x.ndim != 5 or x.shape[-1] != 3 or x.size == 0:
        raise ValueError(f"videos: expected [n, frames, height, width, 3], not empty, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"videos: expected floating point in [0, 1], got {x.dtype}; divide uint8 by 255")
    x = _float32(x)
    _refuse_not_finite("videos", x)
    low, high = float(x.min()), float(x.max())
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(
            f"videos: expected values in [0, 1], found {low:.4g} to {high:.4g}; (x + 1) / 2 brings [-1, 1] there"
        )
    return x


def _captions(captions: Sequence[str], n: int) -> list[str]:
    found = [captions] if isinstance(captions, str) else list(captions)
    if isinstance(captions, str) or len(found) != n or not all(isinstance(c, str) for c in found):
        raise ValueError(f"captions: expected a list of {n} strings, one a video, got {captions!r:.200}")
    return found


def _checked(role: str, function: Callable, found: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """What a callable of the user's returned as finite f32 of `shape` (None: any positive size), or a ValueError."""
    who = f"{role} {_name(function)}"
    wanted = "[" + ", ".join("d" if n is None else str(n) for n in shape) + "]"
    x, cause = None, None
    try:
        x = np.asarray(found)
    except Exception as error:  # whatever a foreign array raises: a tensor on a GPU, a ragged list
        cause = error
    if x is None or not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(
            f"{who}: expected an array of real numbers {wanted}, got {type(found).__name__}; "
            "return NumPy, for a torch tensor .detach().cpu().float().numpy()"
        ) from cause
    if x.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, x.shape, strict=True)) or not x.size:
        raise ValueError(f"{who}: expected {wanted}, got shape {x.shape}")
    x = _float32(x)
    _refuse_not_finite(who, x)
    return x


def _float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused in words
        return x.astype(np.float32)


def _name(function: Callable) -> str:
    function = getattr(function, "func", function)  # of a functools.partial
    return getattr(function, "__qualname__", type(function).__name__)


def _normalised(role: str, function: Callable, embeddings: np.ndarray) -> np.ndarray:
    # Over the largest entry first, so that squares neither overflow nor vanish.
    largest = np.abs(embeddings).max(-1, keepdims=True)
    if not largest.all():
        zeros = np.flatnonzero(largest[:, 0] == 0)
        raise ValueError(f"{role} {_name(function)}: expected embeddings, got all zeros at index {_listed(zeros)}")
    embeddings = embeddings / largest
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _flow(name: str, flow) -> np.ndarray:
    x = np.asarray(flow, np.float32)
    if x.ndim != 5 or x.shape[-1] != 2 or x.size == 0:
        raise ValueError(f"{name}: expected [n, frames - 1, height, width, 2], not empty, got shape {x.shape}")
    return x


def _flow_pair(reference, flow) -> tuple[np.ndarray, np.ndarray]:
    a, b = _flow("reference", reference), _flow("flow", flow)
    if a.shape != b.shape:
        raise ValueError(f"flow: expected the shape of reference, {a.shape}, got {b.shape}")
    return a, b


def _mean_length(vectors: np.ndarray) -> np.ndarray:
    """[n, ..., 2] -> f32 [n]."""
    return np.hypot(vectors[..., 0], vectors[..., 1]).mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32)


def _pool(x: np.ndarray, size: int) -> np.ndarray:
    """Means over size x size pixels of [..., H, W, C]; rows and columns left over at the end are dropped."""
    *lead, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[..., : h * size, : w * size, :].reshape(*lead, h, size, w, size, c)
    return x.mean(axis=(-4, -2))


def _cell_means(x: np.ndarray) -> np.ndarray:
    """[n, F, H, W, C] -> [n, F, cells, cells, C]: means over the quarters of each frame."""
    rows = [np.mean(part, 2) for part in np.array_split(x, _CELLS, axis=2)]
    return np.stack([np.stack([np.mean(p, 2) for p in np.array_split(row, _CELLS, axis=2)], 2) for row in rows], 2)


def _resize_flow(flow: np.ndarray, h: int, w: int) -> np.ndarray:
    """Flow of one scale as a first guess for the next: each pixel becomes 2 x 2, each vector twice as long."""
    if flow.shape[1:3] == (h, w):
        return flow
    flow = 2 * flow.repeat(2, 1).repeat(2, 2)
    return np.pad(flow, ((0, 0), (0, h - flow.shape[1]), (0, w - flow.shape[2]), (0, 0)), mode="edge")


def _window(x: np.ndarray) -> np.ndarray:
    """[F, H, W] weighted over the window around each pixel; beyond the border there is nothing."""
    for axis in (1, 2):
        reach = len(_WINDOW) // 2
        wide = np.pad(x, [(reach, reach) if axis == i else (0, 0) for i in range(3)])
        x = sum(
            (tap * np.take(wide, np.arange(i, i + x.shape[axis]), axis) for i, tap in enumerate(_WINDOW)),
            np.zeros_like(x),
        )
    return x


def _sample(frames: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """frames [F, H, W, C] at the end of each flow vector, bilinear, and f32 [F, H, W]: 1 where that is inside."""
    count, h, w, _ = frames.shape
    f, y, x = np.ogrid[:count, :h, :w]
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    x0, y0 = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
    dx, dy = (x - x0).astype(np.float32)[..., None], (y - y0).astype(np.float32)[..., None]
    top = frames[f, y0, x0] * (1 - dx) + frames[f, y0, x0 + 1] * dx
    bottom = frames[f, y0 + 1, x0] * (1 - dx) + frames[f, y0 + 1, x0 + 1] * dx
    return top * (1 - dy) + bottom * dy, inside.astype(np.float32)


def _lucas_kanade_step(a: np.ndarray, b: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """One Gauss-Newton step towards a(p) = b(p + flow): [F, H, W, 2], at most a pixel each way."""
    warped, inside = _sample(b, flow)
    t = warped - a
    y, x = (np.asarray(slope) for slope in np.gradient((a + warped) / 2, axis=(1, 2)))

    def total(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return _window(inside * np.sum(p * q, -1))

    xx, yy, xy, xt, yt = total(x, x) + _FLAT, total(y, y) + _FLAT, total(x, y), total(x, t), total(y, t)
    determinant = xx * yy - xy * xy  # at least _FLAT squared
    step = np.stack([xy * yt - yy * xt, xy * xt - xx * yt], -1) / determinant[..., None]
    return np.clip(step, -1, 1)
