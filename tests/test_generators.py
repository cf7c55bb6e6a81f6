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
    """Every image of an epoch, in order, as bytes that identify it."""
    return [image.tobytes() for index in range(len(batches)) for image in batches[index][0]]


def test_batches_hold_the_loaded_images_and_masks_in_order(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(6)
    batches = generator(pairs)
    assert [len(batches[i][0]) for i in range(len(batches))] == [4, 2]
    for i in range(6):
        image, mask = (array[i % 4] for array in batches[i // 4])
        np.testing.assert_array_equal(image, segment.load_input_image(images[i], SIZE))
        np.testing.assert_array_equal(mask, segment.load_segmented_image(masks[i], SIZE))
        assert (image.dtype, mask.dtype) == (np.uint8, np.uint8)


def test_each_epoch_shuffles_images_rather_than_batches(make_pairs: MakePairs) -> None:
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


def test_seed_and_epoch_determine_order_and_augmentation(make_pairs: MakePairs) -> None:
    pairs = make_pairs(5)
    options = {"shuffle": True, "augment": True, "seed": 3}
    one, two = generator(pairs, **options), generator(pairs, **options)
    np.random.default_rng().random(7)
    assert one[1][0].tobytes() == two[1][0].tobytes()
    assert images_of(one) == images_of(two)
    one.epoch = two.epoch = 7
    assert images_of(one) == images_of(two)
    assert images_of(one) != images_of(generator(pairs, **{**options, "seed": 4}))


def test_augmentation_transforms_image_and_mask_together(
    tmp_path: Path, make_pairs: MakePairs
) -> None:
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


def test_random_geometry_covers_the_documented_ranges() -> None:
    turns, scales, mirrored, shifts, stretches = [], [], [], [], []
    for i in range(400):
        a, b, c, d, e, f = segment._random_affine((200, 100), (100, 50), np.random.default_rng(i))
        matrix = np.array([[a, b], [d, e]]) / 2
        turns.append(math.atan2(b, e))
        stretches.append(math.hypot(a, b) / math.hypot(d, e))
        scales.append(abs(np.linalg.det(matrix)) ** -0.5)
        mirrored.append(np.linalg.det(matrix) < 0)
        # Where the old centre comes to lie: the solution of M (x, y) + (c, f) = (100, 50).
        shifts.append(np.linalg.solve(2 * matrix, np.subtract((100, 50), (c, f))) - (50, 25))
    assert np.histogram(turns, bins=8, range=(-math.pi, math.pi))[0].min() > 20
    assert 0.75 <= min(scales) < 0.78
    assert 2.1 < max(scales) <= 2.2
    assert 0.15 < np.mean(np.isclose(scales, 1)) < 0.35
    assert 0.4 < np.mean(mirrored) < 0.6
    log_stretches = np.log(stretches) / 2
    np.testing.assert_allclose([log_stretches.min(), log_stretches.max()], [-0.12, 0.12], rtol=0.1)
    small, zoomed = (
        np.abs(np.array(shifts)[chosen]).max(axis=0)
        for chosen in (np.array(scales) < 1.001, np.array(scales) > 1.8)
    )
    np.testing.assert_allclose(small, (6, 3), rtol=0.1)
    assert (zoomed > (18, 9)).all()
    assert (zoomed <= (30, 15)).all()


def test_random_colors_change_the_image_but_not_the_padding() -> None:
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


def test_random_colors_raise_and_lower_the_contrast() -> None:
    tables = [
        np.reshape(segment._random_colors(np.random.default_rng(i)), (3, 256)) for i in range(100)
    ]
    # Without a change of contrast, level 1 would become at most 7, and level 6 at least 1.
    lowered = [table[:, 1].min() > 7 for table in tables]
    raised = [table[:, 6].max() == 0 for table in tables]
    assert 0.2 < np.mean(lowered) < 0.5
    assert 0.3 < np.mean(raised) < 0.6


def test_a_fifth_of_the_augmented_images_is_blurred() -> None:
    rng = np.random.default_rng(0)
    pair = np.full((128, 128, 4), 128, np.uint8)
    pair[..., :3] += rng.integers(0, 2, (128, 128, 1), np.uint8) * 64
    pair[..., 3] = (pair[..., 0] > 128) * np.uint8(255)
    noise = []
    for i in range(200):
        augmented = segment._augment(pair, (64, 64), np.random.default_rng(i))
        inside = augmented[16:48, 16:48, 1].astype(float)
        noise.append(inside.std() / inside.mean())
        # The mask is not blurred: a pixel is the mean of four.
        assert set(np.unique(augmented[..., 3])) <= {0, 64, 128, 191, 255}
    assert 0.1 < np.mean(np.array(noise) < 0.5 * np.median(noise)) < 0.3


def test_every_epoch_is_the_same_without_shuffling_and_augmentation(make_pairs: MakePairs) -> None:
    batches = generator(make_pairs(3))
    first = images_of(batches)
    batches.on_epoch_end()
    assert images_of(batches) == first


def test_the_parts_of_a_batch_are_its_pairs_in_order(make_pairs: MakePairs) -> None:
    batches = generator(make_pairs(6), shuffle=True, augment=True)
    whole = batches.batch_part(0)
    parts = [batches.batch_part(0, part, 2) for part in range(2)]
    assert [part.shape for part in parts] == [(2, *SIZE, 4)] * 2
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    images, masks = batches[0]
    np.testing.assert_array_equal(images, whole[..., :3])
    np.testing.assert_array_equal(masks, whole[..., 3:] >= 128)


def test_whole_batches_drop_a_shorter_last_batch(make_pairs: MakePairs) -> None:
    assert len(generator(make_pairs(6), whole_batches=True)) == 1
    assert len(generator(make_pairs(8, folder="more"), whole_batches=True)) == 2


def test_images_without_masks_are_predicted_in_order(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(6)
    mean = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.GlobalAveragePooling2D()])
    batches = segment.create_generator(images, image_size=SIZE, batch_size=4)
    expected = [segment.load_input_image(path, SIZE).mean((0, 1)) for path in images]
    np.testing.assert_allclose(mean.predict(batches, verbose=0), expected, rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit_sees_every_image_once_per_epoch_with_any_number_of_workers(
    make_pairs: MakePairs, workers: int
) -> None:
    pairs = make_pairs(7)
    batches = generator(pairs, shuffle=True, batch_size=2, workers=workers)
    assert batches.workers == workers
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


def test_two_threads_load_batches_by_default(make_pairs: MakePairs) -> None:
    batches = generator(make_pairs(1))
    assert batches.workers == 2  # one thread would leave it to tf.data, which may delay epochs


def test_an_unreadable_image_in_a_later_batch_is_reported(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(5)
    Path(images[4]).write_bytes(b"no image")
    model = segment.create_model(SIZE, num_filters=1)
    with pytest.raises(segment.SegmentError, match=r"ISIC_0000004\.png: cannot be read"):
        segment.predict(model, generator((images, masks)), verbose=0)


def test_a_mask_of_another_size_is_refused(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    Image.new("L", (40, 56)).save(masks[1])
    message = r"ISIC_0000001\.png is 40 × 56 .* its mask .*segmentation\.png is 56 × 40"
    with pytest.raises(segment.SegmentError, match=message):
        generator((images, masks))[0]


def test_invalid_arguments_are_refused() -> None:
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


def test_paths_may_be_an_array(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(3)
    batches = segment.create_generator(np.array(images), np.array(masks), image_size=SIZE)
    assert images_of(batches) == images_of(generator((images, masks)))


@pytest.mark.parametrize(("budget", "decodings"), [(5, 5), (4.99, 7), (0, 15)])
def test_images_are_decoded_once_as_far_as_the_budget_of_the_cache_suffices(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch, budget: float, decodings: int
) -> None:
    pairs, decode, decoded = make_pairs(5), segment._decode, []

    def spy(path: str, sizes: Any, *, mask: bool, **options: Any) -> Any:
        decoded.extend([path] * (not mask))
        return decode(path, sizes, mask=mask, **options)

    monkeypatch.setattr(segment, "_decode", spy)
    cache = segment.PairCache(int(budget * 4 * (2 * SIZE[0]) * (2 * SIZE[1])))
    batches = generator(pairs, shuffle=True, augment=True, cache=cache)
    for _ in range(3):
        epoch = images_of(batches)
        batches.on_epoch_end()
    assert len(decoded) == decodings
    assert set(decoded) == set(pairs[0])
    fresh = generator(pairs, shuffle=True, augment=True)
    fresh.epoch = 2
    assert images_of(fresh) == epoch


def test_a_seed_may_be_a_number_of_numpy(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    first = generator(pairs, augment=True, seed=2_000_000_000)
    assert images_of(generator(pairs, augment=True, seed=np.int64(2_000_000_000))) == images_of(
        first
    )
    for seed in (None, 1.5, -1, 2**32):
        with pytest.raises(segment.SegmentError, match=r"seed is \S+: expected a whole number"):
            generator(pairs, seed=seed)


def test_a_path_is_not_taken_for_a_list_of_paths(make_pairs: MakePairs, tmp_path: Path) -> None:
    images, masks = make_pairs(2)
    for paths in ((images[0], masks[0]), (images, Path(masks[0])), (tmp_path, None)):
        with pytest.raises(segment.SegmentError, match="is a single path: expected a list"):
            segment.create_generator(*paths)


def test_a_cache_of_other_masks_is_refused(make_pairs: MakePairs) -> None:
    with pytest.raises(segment.SegmentError, match=r"expected PairCache\(soft_masks=True\)"):
        generator(make_pairs(2), soft_masks=True, cache=segment.PairCache())
