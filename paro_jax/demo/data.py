"""Videos drawn by a program, with captions: the demo model's whole world.

Two textured shapes move, turn and pass behind each other over a textured ground while the camera pans. A caption names
colour, texture, shape and motion of each, the ground and the camera. Everything follows from an integer seed.

The caption fixes nearly all of a video: the nearer shape stands left of the middle, the farther right of it, each
within a pixel or two of its place. So small a world can be learned on a CPU in hours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FRAMES, HEIGHT, WIDTH = 13, 44, 52  # pixels; 4 x 4 pixels make one token: a grid of 13 x 11 x 13

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.25, 0.80),
    "white": (0.95, 0.95, 0.95),
}
TEXTURES = ("plain", "striped", "dotted")
SHAPES = ("disc", "square", "triangle", "ring")
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "spinning": (0, 0), "still": (0, 0)}
GROUNDS = {
    "sky": (0.45, 0.65, 0.85),
    "grass": (0.30, 0.45, 0.20),
    "sand": (0.75, 0.65, 0.45),
    "night": (0.10, 0.10, 0.20),
}
PLACES = ((0.5, 0.38), (0.5, 0.62))  # of the shapes, as shares of height and width
SIZE, CHANCE = 10, 1.5  # of a shape, and how far it may stand from its place, in pixels
SPEED, CAMERA_SPEED, TURN = 1.6, 1.2, 0.2  # pixels, pixels and radians a frame
CAMERAS = {"static": (0, 0), "panleft": (0, -1), "panright": (0, 1), "panup": (-1, 0)}

WORDS = (
    "<none>", *COLOURS, *TEXTURES, *SHAPES, *MOTIONS, "and", "over", *GROUNDS, *CAMERAS,
)  # fmt: skip
CAPTION_WORDS = 12


@dataclasses.dataclass(frozen=True)
class Scene:
    """One video's description; `seed` fixes what the caption leaves open (exact places, the ground's phases)."""

    shapes: tuple[tuple[str, str, str, str], ...]  # (colour, texture, shape, motion), nearest to the camera first
    ground: str
    camera: str
    seed: int

    @property
    def caption(self) -> str:
        return " and ".join(" ".join(s) for s in self.shapes) + f" over {self.ground} {self.camera}"


def random_scene(seed: int) -> Scene:
    """A scene drawn uniformly."""
    r = np.random.default_rng((seed, 0))

    def pick(options) -> str:
        return str(r.choice(list(options)))

    shapes = tuple((pick(COLOURS), pick(TEXTURES), pick(SHAPES), pick(MOTIONS)) for _ in range(2))
    return Scene(shapes, pick(GROUNDS), pick(CAMERAS), seed)


def tokenise(caption: str) -> np.ndarray:
    """Word ids int32 `[CAPTION_WORDS]`. An unknown word is a `ValueError` that lists the known ones."""
    words = caption.split()
    unknown = [w for w in words if w not in WORDS]
    if unknown or len(words) > CAPTION_WORDS:
        raise ValueError(
            f"caption: expected at most {CAPTION_WORDS} of the words {WORDS}, found {unknown or len(words)}."
        )
    return np.array([WORDS.index(w) for w in words] + [0] * (CAPTION_WORDS - len(words)), np.int32)


def _coverage(shape: str, y: np.ndarray, x: np.ndarray, size: float) -> np.ndarray:
    """Soft inside-ness in [0, 1] of points in the shape's own frame; one pixel of anti-aliasing."""
    if shape == "disc":
        d = np.hypot(y, x) - size
    elif shape == "ring":
        d = np.abs(np.hypot(y, x) - 0.75 * size) - 0.3 * size
    elif shape == "square":
        d = np.maximum(np.abs(y), np.abs(x)) - 0.85 * size
    else:  # triangle, pointing up
        d = np.maximum(y - 0.7 * size, 0.87 * np.abs(x) - 0.5 * y - 0.55 * size)
    return np.clip(0.5 - d, 0, 1)


def _texture(kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Brightness in [0.35, 1] in the shape's own frame, so that it moves and turns with the shape."""
    if kind == "striped":
        return 0.675 + 0.325 * np.sin(2 * np.pi * x / 6)
    if kind == "dotted":
        return 0.675 + 0.325 * np.sign(np.cos(2 * np.pi * x / 7) * np.cos(2 * np.pi * y / 7))
    return np.ones_like(y)


def render(scene: Scene, frames: range = range(FRAMES)) -> np.ndarray:
    """Those frames of the scene as f32 `[len(frames), HEIGHT, WIDTH, 3]` in [-1, 1]."""
    r = np.random.default_rng((scene.seed, 1))
    t = np.array(frames, np.float32)[:, None, None]
    y, x = np.meshgrid(np.arange(HEIGHT, dtype=np.float32), np.arange(WIDTH, dtype=np.float32), indexing="ij")
    camera_y, camera_x = (CAMERA_SPEED * c for c in CAMERAS[scene.camera])
    world_y, world_x = y[None] + camera_y * t, x[None] + camera_x * t

    p, q = r.uniform(0, 2 * np.pi, 2).tolist()
    waves = 0.5 * np.sin(0.25 * world_x + 0.3 * world_y + p) + 0.5 * np.sin(0.25 * world_y - 0.2 * world_x + q)
    shade = 1 + 0.3 * waves - 0.25 * (y[None] / HEIGHT - 0.5)
    video = np.array(GROUNDS[scene.ground], np.float32) * shade[..., None]

    # The farthest first, nearer ones cover it.
    for place, (colour, texture, shape, motion) in reversed(list(zip(PLACES, scene.shapes, strict=True))):
        step_y, step_x = (SPEED * m for m in MOTIONS[motion])
        # Where the shape is in the middle frame.
        y0, x0 = (share * n + r.uniform(-CHANCE, CHANCE) for share, n in zip(place, (HEIGHT, WIDTH), strict=True))
        dy = y[None] - y0 - (step_y - 0.5 * camera_y) * (t - FRAMES // 2)
        dx = x[None] - x0 - (step_x - 0.5 * camera_x) * (t - FRAMES // 2)
        angle = TURN * t if motion == "spinning" else np.zeros_like(t)
        own_y, own_x = np.cos(angle) * dy - np.sin(angle) * dx, np.sin(angle) * dy + np.cos(angle) * dx
        cover = _coverage(shape, own_y, own_x, SIZE)[..., None]
        paint = np.array(COLOURS[colour], np.float32) * _texture(texture, own_y, own_x)[..., None]
        video = video * (1 - cover) + paint * cover
    return (np.clip(video, 0, 1) * 2 - 1).astype(np.float32)


def to_latents(video: np.ndarray) -> np.ndarray:
    """`[..., F, H, W, 3]` -> `[..., F, 12, H/2, W/2]`: 2 x 2 pixels become channels. Exact, in place of a VAE."""
    *lead, f, h, w, c = video.shape
    x = video.reshape(*lead, f, h // 2, 2, w // 2, 2, c)
    return np.moveaxis(x, (-1, -4, -2), (-5, -4, -3)).reshape(*lead, f, c * 4, h // 2, w // 2)


def to_video(latents: np.ndarray) -> np.ndarray:
    """Inverse of `to_latents`, clipped to [-1, 1]."""
    *lead, f, c, h, w = latents.shape
    x = np.asarray(latents).reshape(*lead, f, c // 4, 2, 2, h, w)
    x = np.moveaxis(x, (-5, -4, -3), (-1, -4, -2)).reshape(*lead, f, h * 2, w * 2, c // 4)
    return np.clip(x, -1, 1)
