"""Prediction: mirrorings, one region, the threshold, and the estimate of its own Dice."""

import errno
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import MakePairs

import segment

SIZE = (32, 48)

pytestmark = pytest.mark.usefixtures("eager")


def generator(make_pairs: MakePairs, count: int = 3) -> segment.ImageGenerator:
    return segment.create_generator(*make_pairs(count), image_size=SIZE, batch_size=2)


def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return segment.create_model(SIZE, num_filters=2)


def test_plain_prediction_is_that_of_the_model(make_pairs: MakePairs) -> None:
    batches, unet = generator(make_pairs), model()
    plain = segment.predict(unet, batches, mirror=False, one_region=False, verbose=0)
    assert plain.shape == (3, *SIZE, 1)
    assert plain.dtype == np.float32
    # to rounding, since the last batch is filled up
    np.testing.assert_allclose(plain, unet.predict(batches, verbose=0), atol=1e-6)


def test_many_images_are_predicted_in_parts_that_come_in_order(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(3)
    chosen = np.random.default_rng(0).integers(0, 3, 400)  # parts of 150, the last one short
    many = segment.create_generator([images[i] for i in chosen], image_size=(16, 16), batch_size=50)
    unet = segment.create_model((16, 16), num_filters=1)
    each = unet.predict(segment.create_generator(images, image_size=(16, 16)), verbose=0)
    predictions = segment.predict(unet, many, mirror=False, one_region=False, verbose=0)
    np.testing.assert_allclose(predictions, each[chosen], atol=1e-5)
    assert len({prediction.tobytes() for prediction in each}) == 3


def test_images_are_predicted_when_they_are_asked_for_and_a_bad_one_is_named(
    make_pairs: MakePairs,
) -> None:
    images, _ = make_pairs(2)
    Path(images[1]).write_bytes(b"damaged")
    many = segment.create_generator([images[0]] * 128 + images[1:], image_size=(16, 16))
    unet = segment.create_model((16, 16), num_filters=1)
    each = segment.predict_each(unet, many, verbose=0)
    assert next(each).shape == (16, 16, 1)
    with pytest.raises(segment.SegmentError, match=r"0000001\.\w+: cannot be read as an image"):
        list(each)
    with pytest.raises(segment.SegmentError, match="cannot be read as an image"):
        segment.results(many, segment.predict_each(unet, many, verbose=0))


def test_images_come_in_their_order_as_they_are_and_without_their_masks(
    make_pairs: MakePairs,
) -> None:
    images, masks = make_pairs(3)
    unet = segment.create_model((16, 16), num_filters=1)
    plain = segment.create_generator(images, image_size=(16, 16))
    for path in masks:
        Path(path).unlink()
    training = segment.create_generator(
        images, masks, image_size=(16, 16), shuffle=True, augment=True
    )
    predictions = segment.predict(unet, training, verbose=0)
    np.testing.assert_array_equal(predictions, segment.predict(unet, plain, verbose=0))


def test_more_predictions_than_memory_shall_hold_lie_in_a_file_and_are_used_alike() -> None:
    lesions = np.random.default_rng(0).random((3, 16, 16, 1)).astype(np.float32)
    filed = segment._room_for(lesions.shape, in_memory=100)
    assert isinstance(filed, np.memmap)
    assert type(segment._room_for(lesions.shape)) is np.ndarray
    filed[...] = lesions
    np.testing.assert_array_equal(filed, lesions)
    np.testing.assert_array_equal(segment.estimate_dice(filed), segment.estimate_dice(lesions))


def test_a_disk_without_room_for_the_predictions_is_told_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)  # not everywhere
    with pytest.raises(segment.SegmentError, match=r"room for 400 bytes .*No space left"):
        segment._room_for((1, 10, 10, 1), in_memory=100)


def test_mirrorings_are_put_back_and_averaged(make_pairs: MakePairs) -> None:
    batches, unet = generator(make_pairs), model()
    images = np.concatenate([batches[i][0] for i in range(len(batches))])
    views = [
        np.flip(unet.predict(np.flip(images, axes), verbose=0), axes)
        for axes in ((), (1,), (2,), (1, 2))
    ]
    predictions = segment.predict(unet, batches, one_region=False, verbose=0)
    np.testing.assert_allclose(predictions, np.mean(views, axis=0), atol=1e-6)


def test_one_region_without_holes_is_left_of_each_mask() -> None:
    lesion: np.ndarray = np.zeros((12, 12), np.float32)
    lesion[1:7, 1:7] = 0.9
    lesion[3, 3] = 0.1  # a hole
    lesion[9:11, 9:11] = 0.99  # another region, of less weight
    lesion[0, 11] = 0.3  # doubt elsewhere
    tidy = segment._one_region(lesion, 0.5)
    square: np.ndarray = np.zeros((12, 12), bool)
    square[1:7, 1:7] = True
    np.testing.assert_array_equal(tidy >= 0.5, square)
    assert tidy[0, 11] == np.float32(0.3)
    assert tidy[9, 9] > 0.49  # which the estimate still counts as doubt
    np.testing.assert_array_equal(segment._one_region(0 * lesion, 0.5), 0 * lesion)


def test_a_clear_region_outweighs_a_larger_doubtful_one() -> None:
    lesion: np.ndarray = np.zeros((12, 12), np.float32)
    lesion[:, 6:] = 0.52
    lesion[2:5, 1:4] = 0.95
    tidy = segment._one_region(lesion, 0.5)
    np.testing.assert_array_equal(tidy >= 0.5, lesion > 0.9)


def test_regions_are_told_apart_at_the_threshold_of_the_model(make_pairs: MakePairs) -> None:
    batches, unet = generator(make_pairs), model()
    raw = segment.predict(unet, batches, one_region=False, verbose=0)
    threshold = float(np.quantile(raw, 0.9))
    segment.model_record(unet).threshold = threshold
    tidy = segment.predict(unet, batches, verbose=0)
    for before, after in zip(raw[..., 0], tidy[..., 0], strict=True):
        np.testing.assert_array_equal(after, segment._one_region(before, threshold))


def test_the_threshold_is_that_of_the_highest_mean_dice(make_pairs: MakePairs) -> None:
    batches = generator(make_pairs)
    truth = np.concatenate([batches[i][1] for i in range(len(batches))])
    rim = np.roll(truth, 2, axis=2)
    predictions = np.where(truth == 1, 0.62, np.where(rim == 1, 0.58, 0.1)).astype(np.float32)
    assert segment.choose_threshold(batches, predictions) == 0.6
    assert segment.choose_threshold(batches, truth.astype(np.float32)) == 0.5
    blind = segment.create_generator(batches.image_paths, image_size=SIZE)
    with pytest.raises(segment.SegmentError, match="needs the masks"):
        segment.choose_threshold(blind, predictions)


def test_the_estimate_is_the_soft_dice_less_the_doubt_of_the_outline() -> None:
    lesion = np.array([[0.9, 0.8], [0.4, 0.0]])
    predictions = np.stack([lesion, lesion > 0.5, 0 * lesion])[..., None]
    # Of the first: mask of 2 of 4 pixels, 1.7 of 2.1 pixels of lesion within it.
    doubt = 0.005 / 0.5**0.5
    expected = [2 * 1.7 / (2.1 + 2) - doubt, 1 - doubt, 0]
    np.testing.assert_allclose(segment.estimate_dice(predictions), expected)
    (cut,) = segment.estimate_dice(predictions[:1], threshold=0.3)
    assert cut == pytest.approx(2 * 2.1 / (2.1 + 3) - 0.005 / 0.75**0.5)


def test_of_two_certain_lesions_the_smaller_one_is_trusted_less() -> None:
    predictions = np.zeros((3, 400, 400, 1), np.float32)
    for prediction, side in zip(predictions, (200, 40, 1), strict=True):
        prediction[:side, :side] = 1
    # A half, a tenth and a four-hundredth of the frame's side: the last would be below 0.
    np.testing.assert_allclose(segment.estimate_dice(predictions), [0.99, 0.95, 0], atol=1e-9)


def test_a_batch_size_beyond_the_images_takes_no_more_memory(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(2)
    batches = segment.create_generator(images, image_size=(16, 16), batch_size=10**9)
    model = segment.create_model((16, 16), num_filters=1)
    assert segment.predict(model, batches, verbose=0).shape == (2, 16, 16, 1)
