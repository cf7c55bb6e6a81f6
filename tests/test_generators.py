"""Batches of images and masks."""

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment

SIZE = (32, 48)


def generator(pairs: segment.Pairs, **options: Any) -> segment.ImageGenerator:
    return segment.create_generator(*pairs, **{"image_size": SIZE, "batch_size": 4, **options})


def images_of(batches: segment.ImageGenerator) -> list[bytes]:
    """Every image of an epoch, in order, as bytes that tell it from the others."""
    return [image.tobytes() for index in range(len(batches)) for image in batches[index][0]]


def test_batches_hold_what_the_loaders_load_in_order(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(6)
    batches = generator(pairs)
    assert [len(batches[i][0]) for i in range(len(batches))] == [4, 2]
    for i in range(6):
        image, mask = (array[i % 4] for array in batches[i // 4])
        np.testing.assert_array_equal(image, segment.load_input_image(images[i], SIZE))
        np.testing.assert_array_equal(mask, segment.load_segmented_image(masks[i], SIZE))
        assert (image.dtype, mask.dtype) == (np.uint8, np.uint8)


def test_each_epoch_shuffles_the_images_not_just_the_batches(make_pairs: MakePairs) -> None:
    pairs = make_pairs(9)
    plain, shuffled = generator(pairs), generator(pairs, shuffle=True)
    first = images_of(shuffled)
    shuffled.on_epoch_end()
    second = images_of(shuffled)
    assert sorted(first) == sorted(second) == sorted(images_of(plain))
    assert first != second
    assert {frozenset(first[:4]), frozenset(first[4:8])} != {
        frozenset(second[:4]), frozenset(second[4:8])
    }  # fmt: skip


def test_shuffled_images_keep_their_masks(make_pairs: MakePairs) -> None:
    pairs = make_pairs(9)
    mask_of = dict(zip(images_of(generator(pairs)), pairs[1], strict=True))
    batches = generator(pairs, shuffle=True, seed=5)
    for i in range(len(batches)):
        for image, mask in zip(*batches[i], strict=True):
            expected = segment.load_segmented_image(mask_of[image.tobytes()], SIZE)
            np.testing.assert_array_equal(mask, expected)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone(make_pairs: MakePairs) -> None:
    pairs = make_pairs(5)
    options = {"shuffle": True, "augment": True, "seed": 3}
    one, two = generator(pairs, **options), generator(pairs, **options)
    np.random.default_rng().random(7)
    assert one[1][0].tobytes() == two[1][0].tobytes()
    assert images_of(one) == list(images_of(two))
    one.epoch = two.epoch = 7
    assert images_of(one) == images_of(two)
    assert images_of(one) != images_of(generator(pairs, **{**options, "seed": 4}))


def test_augmentation_moves_image_and_mask_together(tmp_path: Path, make_pairs: MakePairs) -> None:
    images, masks = make_pairs(1, SIZE)
    mask = segment.load_segmented_image(masks[0], None)
    Image.fromarray((255 * mask * [0, 1, 1] + [[[200, 0, 0]]]).astype(np.uint8)).save(images[0])
    batches = generator((images, masks), augment=True)
    areas = set()
    for epoch in range(20):
        batches.epoch = epoch
        (image,), (moved,) = batches[0]
        assert segment.score_masks(moved[..., 0], (image[..., 1] >= 108))["dice"] > 0.9
        areas.add(int(moved.sum()))
    assert len(areas) > 10


def test_geometry_turns_mirrors_scales_and_shifts_within_the_stated_ranges() -> None:
    turns, scales, mirrored, shifts = [], [], [], []
    for i in range(400):
        a, b, c, d, e, f = segment._random_affine((200, 100), (100, 50), np.random.default_rng(i))
        matrix = np.array([[a, b], [d, e]]) / 2
        turns.append(math.atan2(b, e))
        scales.append(abs(np.linalg.det(matrix)) ** -0.5)
        mirrored.append(np.linalg.det(matrix) < 0)
        # Where the old centre comes to lie: the solution of M (x, y) + (c, f) = (100, 50).
        shifts.append(np.linalg.solve(2 * matrix, np.subtract((100, 50), (c, f))) - (50, 25))
    assert np.histogram(turns, bins=8, range=(-math.pi, math.pi))[0].min() > 20
    assert 0.75 <= min(scales) < 0.78
    assert 2.1 < max(scales) <= 2.2
    assert 0.15 < np.mean(np.isclose(scales, 1)) < 0.35
    assert 0.4 < np.mean(mirrored) < 0.6
    small, zoomed = (
        np.abs(np.array(shifts)[chosen]).max(axis=0)
        for chosen in (np.array(scales) < 1.001, np.array(scales) > 1.8)
    )
    np.testing.assert_allclose(small, (6, 3), rtol=0.1)
    assert (zoomed > (18, 9)).all()
    assert (zoomed <= (30, 15)).all()


def test_colours_change_the_image_but_neither_the_padding_nor_the_mask() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[4:12] = 128
    tables = [segment._random_colors(np.random.default_rng(i)) for i in range(50)]
    changed = [np.asarray(Image.fromarray(image).point(table)) for table in tables]
    assert all(not picture[:4].any() for picture in changed)
    levels = np.array([picture[8, 8] for picture in changed])
    assert levels.std(axis=0).min() > 10
    assert levels.min() > 50
    assert levels.max() < 220
    tint = levels.astype(float) / levels.mean(axis=1, keepdims=True)
    assert tint.std(axis=0).min() > 0.03


def test_without_augmentation_every_epoch_is_the_same(make_pairs: MakePairs) -> None:
    batches = generator(make_pairs(3))
    first = images_of(batches)
    batches.on_epoch_end()
    assert images_of(batches) == first


def test_images_without_masks_can_be_predicted_and_keep_their_order(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(6)
    mean = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.GlobalAveragePooling2D()])
    batches = segment.create_generator(images, image_size=SIZE, batch_size=4)
    expected = [segment.load_input_image(path, SIZE).mean((0, 1)) for path in images]
    np.testing.assert_allclose(mean.predict(batches, verbose=0), expected, rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit_sees_every_image_once_an_epoch_whatever_the_workers(
    make_pairs: MakePairs, workers: int
) -> None:
    pairs = make_pairs(7)
    batches = generator(pairs, shuffle=True, batch_size=2, workers=workers)
    seen: list[float] = []

    class Recorder(keras.Model):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            seen.extend(np.asarray(x).mean((1, 2, 3)).tolist())
            return keras.ops.mean(x, axis=(1, 2, 3))

    model = Recorder()
    model.compile("sgd", loss=lambda y, p: keras.ops.mean(p) * 0, run_eagerly=True)
    if keras.backend.backend() != "tensorflow":
        pytest.skip("eager training is TensorFlow's")
    model.fit(batches, epochs=3, verbose=0, shuffle=False)
    expected = sorted(segment.load_input_image(path, SIZE).mean() for path in pairs[0])
    epochs = [seen[-7 * k : len(seen) - 7 * (k - 1)] for k in (3, 2, 1)]
    for epoch in epochs:
        np.testing.assert_allclose(sorted(epoch), expected, rtol=1e-4)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_bad_image_in_mid_epoch_is_named(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(5)
    Path(images[4]).write_bytes(b"no image")
    model = segment.create_model(SIZE, num_filters=1)
    with pytest.raises(segment.SegmentError, match=r"ISIC_0000004\.png: cannot be read"):
        segment.predict(model, generator((images, masks)), verbose=0)


def test_a_mask_of_another_size_is_refused_and_both_files_are_named(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    Image.new("L", (40, 56)).save(masks[1])
    message = r"ISIC_0000001\.png is 40 × 56 .* its mask .*segmentation\.png is 56 × 40"
    with pytest.raises(segment.SegmentError, match=message):
        generator((images, masks))[0]


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(segment.SegmentError, match="at least one image"):
        segment.create_generator([], [])
    with pytest.raises(segment.SegmentError, match="2 images came with 1 masks"):
        segment.create_generator(["a", "b"], ["c"])
    with pytest.raises(segment.SegmentError, match="batch_size is 0"):
        segment.create_generator(["a"], ["b"], batch_size=0)
    with pytest.raises(segment.SegmentError, match="seed is -1"):
        segment.create_generator(["a"], ["b"], seed=-1)
    with pytest.raises(segment.SegmentError, match=r"image_size is \(64,\)"):
        segment.create_generator(["a"], ["b"], image_size=(64,))  # type: ignore[arg-type]


def test_paths_in_an_array_serve_as_well_as_in_a_list(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(3)
    batches = segment.create_generator(np.array(images), np.array(masks), image_size=SIZE)  # type: ignore[arg-type]
    assert images_of(batches) == images_of(generator((images, masks)))


def test_images_are_decoded_once_as_far_as_the_memory_of_the_cache_goes(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, decode, decoded = make_pairs(5), segment.load_input_image, []

    def spy(path: str, size: segment.Size) -> Any:
        decoded.append(path)
        return decode(path, size)

    monkeypatch.setattr(segment, "load_input_image", spy)
    need = 5 * 4 * (2 * SIZE[0]) * (2 * SIZE[1])
    for max_bytes, times in ((need, 5), (need - 1, 7), (0, 15)):
        decoded.clear()
        cache = segment.PairCache(max_bytes)
        batches = generator(pairs, shuffle=True, augment=True, cache=cache)
        epochs = []
        for _ in range(3):
            epochs.append(images_of(batches))
            batches.on_epoch_end()
        assert len(decoded) == times
        assert set(decoded) == set(pairs[0])
    fresh = generator(pairs, shuffle=True, augment=True)
    fresh.epoch = 2
    assert images_of(fresh) == epochs[2]
