"""The procedural videos: a function of the seed, captions that mean what is drawn, an exact latent transform."""

import numpy as np
import pytest

from paro_jax.demo import data
from paro_jax.demo.data import Scene


def scene(motion="still", camera="static", shape="disc", colour="red", seed=3):
    other = ("white", "plain", "square", "still")
    return Scene(((colour, "plain", shape, motion), other), "grass", camera, seed)


def test_rendering_is_a_function_of_the_scene():
    a, b = data.render(data.random_scene(5)), data.render(data.random_scene(5))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (13, 44, 52, 3) and a.dtype == np.float32 and np.abs(a).max() <= 1
    assert not np.array_equal(a, data.render(data.random_scene(6)))


def centre(video, is_it):
    """Mean (row, column) of the pixels of one kind, per frame."""
    return np.array([np.mean(np.nonzero(is_it(f)), axis=1) for f in video])


def red(frame):
    return (frame[..., 0] > 0.5) & (frame[..., 1] < -0.4)


@pytest.mark.parametrize("motion, axis, sign", [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_motion_words_move_the_shape(motion, axis, sign):
    moved = np.diff(centre(data.render(scene(motion)), red)[3:10], axis=0)
    assert (sign * moved[:, axis] > 0.3).all()
    assert np.abs(moved[:, 1 - axis]).max() < 0.6


def test_still_is_still_and_spinning_turns_in_place():
    still = data.render(scene("still", shape="triangle"))
    np.testing.assert_array_equal(still[0], still[-1])
    spin = data.render(scene("spinning", shape="triangle"))
    assert not np.array_equal(spin[0], spin[4])
    assert np.abs(np.diff(centre(spin, red), axis=0)).max() < 1.5


def test_the_first_shape_is_in_front():
    for seed in range(40):
        one = Scene((("red", "plain", "disc", "still"), ("white", "plain", "disc", "still")), "night", "static", seed)
        other = Scene((("red", "plain", "disc", "still"), ("blue", "plain", "disc", "still")), "night", "static", seed)
        full = np.array(data.COLOURS["red"], np.float32) * 2 - 1  # fully covered pixels, the soft border aside
        a, b = (np.abs(data.render(x)[0] - full).max(-1) < 1e-4 for x in (one, other))
        np.testing.assert_array_equal(a, b)  # whatever lies behind, all of the red disc is seen
        assert a.sum() > 60


def test_the_camera_moves_the_ground():
    still, pan = data.render(scene()), data.render(scene(camera="panright"))
    assert np.array_equal(still[0, 0], still[5, 0]) and not np.array_equal(pan[0, 0], pan[5, 0])


def test_captions_become_words():
    s = data.random_scene(9)
    ids = data.tokenise(s.caption)
    assert ids.shape == (12,) and ids.dtype == np.int32
    assert " ".join(data.WORDS[i] for i in ids if i) == s.caption
    assert len(set(data.WORDS)) == len(data.WORDS)
    longest = max(len(data.random_scene(i).caption.split()) for i in range(200))
    assert longest <= data.CAPTION_WORDS
    with pytest.raises(ValueError, match=r"caption: expected at most 12 of the words.*found \['dragon'\]"):
        data.tokenise("red plain dragon left")


def test_latents_are_exact_and_local():
    video = data.render(data.random_scene(1))
    latents = data.to_latents(video)
    assert latents.shape == (13, 12, 22, 26)
    np.testing.assert_array_equal(data.to_video(latents), video)
    np.testing.assert_array_equal(data.to_latents(video[None])[0], latents)
    # One latent pixel is one 2 x 2 patch of video pixels.
    changed = video.copy()
    changed[3, 10, 21] += 0.01
    where = np.argwhere(data.to_latents(changed) != latents)
    assert {(f, h, w) for f, _, h, w in where} == {(3, 5, 10)}
