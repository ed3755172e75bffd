"""The strong augmentation: what comes out, and that each part does what it says."""

import numpy as np
import pytest

from modeling_udon.data.augment import StrongTransform

PLAIN = {"flip": False, "min_area": 1.0, "max_rotation": 0.0, "colour": 0.0, "erase": 0.0}


def ramp(height: int, width: int) -> np.ndarray:
    """Red rises to the right, green downwards."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (np.stack([columns, rows, np.zeros_like(rows)], axis=2) * 200 + 20).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (64, 48), (300, 200)])
def test_any_image_comes_out_at_the_size_asked_for(shape: tuple[int, int]) -> None:
    result = StrongTransform(32)(ramp(*shape), np.random.default_rng(0))
    assert result.shape == (32, 32, 3) and result.dtype == np.uint8


def test_the_generator_decides_all() -> None:
    transform, image = StrongTransform(32), ramp(50, 60)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_geometry_keeps_right_right_and_down_down() -> None:
    transform = StrongTransform(32, **PLAIN)
    for seed in range(10):
        result = transform(ramp(60, 80), np.random.default_rng(seed)).astype(int)
        assert (np.diff(result[..., 0], axis=1) >= 0).all() and (np.diff(result[..., 1], axis=0) >= 0).all()
        # At an area of 1 one side is whole, the other at least exp(-1/8) of it.
        assert min(np.ptp(result[..., 0]), np.ptp(result[..., 1])) > 165 and np.ptp(result[..., :2]) > 190


def test_half_are_mirrored() -> None:
    transform = StrongTransform(32, **PLAIN | {"flip": True})
    rises = [
        transform(ramp(60, 80), np.random.default_rng(seed)).astype(int)[16, [0, -1], 0].tolist() for seed in range(200)
    ]
    assert 70 < sum(left > right for left, right in rises) < 130


def test_a_turned_crop_is_turned_by_as_much_as_allowed() -> None:
    transform = StrongTransform(64, **PLAIN | {"max_rotation": 30.0})
    tilts = []
    for seed in range(100):
        result = transform(ramp(100, 100), np.random.default_rng(seed)).astype(float)
        middle = result[24:40, 24:40, 0]
        tilts.append(np.degrees(np.arctan2(np.diff(middle, axis=0).mean(), np.diff(middle, axis=1).mean())))
    # A crop's aspect of up to exp(1/4) bends the angle a little.
    assert -37 < min(tilts) < -20 and 20 < max(tilts) < 37


def test_colours_change_within_their_bounds() -> None:
    grey = np.full((20, 20, 3), 100, np.uint8)
    transform = StrongTransform(16, **PLAIN | {"colour": 0.4})
    results = np.array([transform(grey, np.random.default_rng(seed))[8, 8] for seed in range(200)]).astype(float)
    assert np.abs(results.mean() - 100) < 6 and results.min() < 75 and results.max() > 125
    assert (results.max(axis=1) != results.min(axis=1)).mean() > 0.9


def test_colours_change_by_contrast_then_light_then_saturation() -> None:
    image = np.random.default_rng(0).integers(60, 180, (40, 40, 3)).astype(np.uint8)
    plain = StrongTransform(32, **PLAIN)(image, np.random.default_rng(3)).astype(float)
    changed = StrongTransform(32, **PLAIN | {"colour": 0.4})(image, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.uniform(size=5)  # What the crop draws.
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    channels = rng.uniform(1 - 0.4 / 3, 1 + 0.4 / 3, 3)
    expected = ((plain - plain.mean()) * contrast + plain.mean()) * brightness * channels
    grey = expected.mean(axis=2, keepdims=True)
    expected = ((expected - grey) * saturation + grey).clip(0, 255)
    assert np.abs(expected - changed).max() < 1 and np.abs(expected - changed).mean() < 0.3


def test_a_rectangle_is_erased_as_often_as_said() -> None:
    black = np.zeros((40, 40, 3), np.uint8)
    transform = StrongTransform(32, **PLAIN | {"erase": 0.25})
    erased = [transform(black, np.random.default_rng(seed)).any() for seed in range(300)]
    assert 50 < sum(erased) < 100


def test_a_size_that_no_image_has_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1. Got 0"):
        StrongTransform(0)


def test_a_teachers_view_has_the_students_colours_side_and_turn() -> None:
    student, image = StrongTransform(32, erase=0.0), ramp(60, 80)
    same, larger = student.for_teacher(32, student.min_area), student.for_teacher(64, student.min_area)
    for seed in range(10):
        small, again, large = (one(image, np.random.default_rng(seed)) for one in (student, same, larger))
        assert np.array_equal(small, again)
        halved = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(halved - small).max() < 4


def test_a_teachers_view_of_more_of_the_image_holds_the_students_and_nothing_is_painted_over() -> None:
    student = StrongTransform(32, max_rotation=0.0, colour=0.0, erase=1.0)
    teacher = student.for_teacher(32, 0.9)
    for seed in range(20):
        large = teacher(ramp(60, 80), np.random.default_rng(seed)).astype(int)
        small = StrongTransform(32, max_rotation=0.0, colour=0.0, erase=0.0)(ramp(60, 80), np.random.default_rng(seed))
        for channel in (0, 1):
            assert large[..., channel].min() <= small[..., channel].min() + 1
            assert small[..., channel].max() <= large[..., channel].max() + 1
        # Smooth: a rectangle of one colour would have edges.
        assert max(np.abs(np.diff(large, axis=axis)).max() for axis in (0, 1)) < 16
