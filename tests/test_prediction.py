"""Prediction: test-time augmentation, masks, the threshold, and the Dice estimate."""

from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import MakePairs, with_threshold
from networks import tiny_network
from PIL import Image
from scipy import ndimage

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
    np.testing.assert_allclose(plain, unet.predict(batches, verbose=0), atol=1e-5)


def test_many_images_are_predicted_in_their_order(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(3)
    chosen = np.random.default_rng(0).integers(0, 3, 120)  # the last batch is short
    many = segment.create_generator([images[i] for i in chosen], image_size=(16, 16), batch_size=50)
    unet = segment.create_model((16, 16), num_filters=1)
    each = unet.predict(segment.create_generator(images, image_size=(16, 16)), verbose=0)
    predictions = segment.predict(unet, many, mirror=False, one_region=False, verbose=0)
    np.testing.assert_allclose(predictions, each[chosen], atol=1e-5)
    assert len({prediction.tobytes() for prediction in each}) == 3


def test_predictions_are_made_on_demand_and_an_unusable_image_is_named(
    make_pairs: MakePairs,
) -> None:
    images, _ = make_pairs(2)
    Path(images[1]).write_bytes(b"damaged")
    many = segment.create_generator([images[0]] * 24 + images[1:], image_size=(16, 16))
    unet = tiny_network((16, 16))
    each = segment.predict_each(unet, many, verbose=0)
    assert next(each).shape == (16, 16, 1)
    with pytest.raises(segment.SegmentError, match=r"0000001\.\w+: cannot be read as an image"):
        list(each)
    with pytest.raises(segment.SegmentError, match="cannot be read as an image"):
        segment.results(many, segment.predict_each(unet, many, verbose=0))


def test_only_a_few_results_wait_to_be_used() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    each = segment._map_ahead(str, numbers(), ahead=3)
    assert next(each) == "0"
    assert taken == [0, 1, 2, 3]
    assert list(each) == list(map(str, range(1, 100)))


def test_prediction_neither_shuffles_nor_augments(
    make_pairs: MakePairs,
) -> None:
    images, masks = make_pairs(3)
    unet = segment.create_model((16, 16), num_filters=1)
    plain = segment.create_generator(images, image_size=(16, 16))
    training = segment.create_generator(
        images, masks, image_size=(16, 16), shuffle=True, augment=True
    )
    predictions = segment.predict(unet, training, verbose=0)
    np.testing.assert_array_equal(predictions, segment.predict(unet, plain, verbose=0))
    Path(masks[1]).unlink()
    with pytest.raises(segment.SegmentError, match=r"_segmentation\.png: there is no such file"):
        segment.predict(unet, training, verbose=0)


def test_the_four_flips_are_flipped_back_and_averaged(make_pairs: MakePairs) -> None:
    batches, unet = generator(make_pairs), model()
    images = np.concatenate([batches[i][0] for i in range(len(batches))])
    views = [
        np.flip(unet.predict(np.flip(images, axes), verbose=0), axes)
        for axes in ((), (1,), (2,), (1, 2))
    ]
    predictions = segment.predict(unet, batches, one_region=False, verbose=0)
    np.testing.assert_allclose(predictions, np.mean(views, axis=0), atol=1e-6)


def two_regions() -> np.ndarray:
    """Probabilities of a lesion with a hole, and a region that a bridge of 0.53 joins to it."""
    lesion: np.ndarray = np.full((32, 48), 0.1, np.float32)
    lesion[4:24, 4:20] = 0.9
    lesion[10:14, 8:12] = 0.2
    lesion[10:14, 20:28] = 0.53
    lesion[8:20, 28:40] = 0.7
    return lesion


def first_region() -> np.ndarray:
    square: np.ndarray = np.zeros((32, 48), bool)
    square[4:24, 4:20] = True
    return square


def red_model() -> keras.Model:
    """A model whose probability is the red of the image."""
    image = keras.Input((*SIZE, 3))
    red = keras.layers.Conv2D(1, 1, use_bias=False)
    red_only = keras.Model(image, red(image))
    red.set_weights([np.reshape([1 / 255, 0, 0], (1, 1, 3, 1))])
    return red_only


def test_one_region_without_holes_is_kept() -> None:
    margin = two_regions() - 0.6
    np.testing.assert_array_equal(segment._one_region(margin, margin >= 0), first_region())
    empty = np.zeros((32, 48), bool)
    np.testing.assert_array_equal(segment._one_region(margin, empty), empty)


def test_a_clear_region_outweighs_a_larger_doubtful_one() -> None:
    margin: np.ndarray = np.full((12, 12), -0.5, np.float32)
    margin[:, 6:] = 0.02
    margin[2:5, 1:4] = 0.45
    np.testing.assert_array_equal(segment._one_region(margin, margin >= 0), margin > 0.4)


def test_a_loaded_model_determines_threshold_and_region_of_the_masks(tmp_path: Path) -> None:
    red = np.zeros((*SIZE, 3), np.uint8)
    red[..., 0] = (255 * two_regions()).round()
    Image.fromarray(red).save(tmp_path / "a.png")
    segment.save_model(red_model(), tmp_path / "m.keras", threshold=0.6)
    model = segment.load_model(tmp_path / "m.keras")
    generator = segment.create_generator([tmp_path / "a.png"], image_size=SIZE)
    predictions = segment.predict(model, generator, verbose=0)
    np.testing.assert_allclose(predictions[0, ..., 0], two_regions(), atol=0.003)
    each = segment.predict_each(model, generator, verbose=0)
    for made in (predictions, each):
        segment.results(generator, made, output_dir=tmp_path / "out")
        written = np.asarray(Image.open(tmp_path / "out" / "masks" / "a_segmentation.png"))
        np.testing.assert_array_equal(written > 0, first_region())


def test_arguments_and_record_determine_what_predictions_remember(make_pairs: MakePairs) -> None:
    batches, unet = generator(make_pairs), model()
    segment.model_record(unet).threshold = 0.35
    default = segment.predict(unet, batches, verbose=0)
    assert (default.threshold, default.one_region) == (0.35, True)
    several = segment.predict(unet, batches, one_region=False, verbose=0)
    some = several[1:]
    assert isinstance(some, segment.Predictions)
    assert (some.threshold, some.one_region) == (0.35, False)
    np.testing.assert_array_equal(several, default)
    segment.model_record(unet).one_region = False
    assert not next(segment.predict_each(unet, batches, verbose=0)).one_region


def test_every_step_makes_identical_masks(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = segment.create_generator(*make_pairs(1, (60, 100)), image_size=SIZE)
    scored: list[np.ndarray] = []
    score_masks = segment.score_masks

    def record(truth: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        scored.append(mask)
        return score_masks(truth, mask)

    monkeypatch.setattr(segment, "score_masks", record)
    predictions = two_regions()[None, ..., None]
    segment.choose_threshold(batches, predictions)
    chosen = list(scored)
    for i, threshold in ((0, 0.5), (4, 0.6)):
        predictions = with_threshold(predictions, threshold)
        segment.results(batches, predictions, output_dir=tmp_path)
        written = np.asarray(Image.open(tmp_path / "masks" / "ISIC_0000000_segmentation.png")) > 0
        (restored,) = segment.restore_masks(batches, predictions)
        assert ndimage.label(restored)[1] == ndimage.label(~restored)[1] == 1
        for mask in (chosen[i], scored[-1], written):
            np.testing.assert_array_equal(mask, restored)


def test_the_threshold_is_that_of_the_highest_mean_dice(make_pairs: MakePairs) -> None:
    batches = segment.create_generator(*make_pairs(3, SIZE), image_size=SIZE, batch_size=2)
    truth = np.concatenate([batches[i][1] for i in range(len(batches))])
    rim = np.roll(truth, 2, axis=2)
    predictions = np.where(truth == 1, 0.62, np.where(rim == 1, 0.58, 0.1)).astype(np.float32)
    assert segment.choose_threshold(batches, predictions) == 0.6
    assert segment.choose_threshold(batches, truth.astype(np.float32)) == 0.5
    blind = segment.create_generator(batches.image_paths, image_size=SIZE)
    with pytest.raises(segment.SegmentError, match="needs masks"):
        segment.choose_threshold(blind, predictions)


def test_the_estimate_is_the_soft_dice_less_a_doubt_about_the_outline() -> None:
    lesion = np.array([[0.9, 0.8], [0.4, 0.0]])
    predictions = np.stack([lesion, lesion > 0.5, 0 * lesion])[..., None]
    # Of the first: mask of 2 of 4 pixels, 1.7 of 2.1 pixels of lesion within it.
    doubt = 0.005 / 0.5**0.5
    expected = [2 * 1.7 / (2.1 + 2) - doubt, 1 - doubt, 0]
    np.testing.assert_allclose(segment.estimate_dice(predictions), expected)
    (cut,) = segment.estimate_dice(with_threshold(predictions[:1], 0.3))
    assert cut == pytest.approx(2 * 2.1 / (2.1 + 3) - 0.005 / 0.75**0.5)


def test_of_two_certain_lesions_the_smaller_one_is_trusted_less() -> None:
    predictions = np.zeros((3, 400, 400, 1), np.float32)
    for prediction, side in zip(predictions, (200, 40, 1), strict=True):
        prediction[:side, :side] = 1
    # A half, a tenth and a four-hundredth of the frame's side: the last would be below 0.
    np.testing.assert_allclose(segment.estimate_dice(predictions), [0.99, 0.95, 0], atol=1e-9)


def test_a_batch_is_never_larger_than_the_number_of_images(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(2)
    batches = segment.create_generator(images, image_size=(16, 16), batch_size=10**9)
    model = segment.create_model((16, 16), num_filters=1)
    assert segment.predict(model, batches, verbose=0).shape == (2, 16, 16, 1)


def test_what_is_not_a_model_is_named(make_pairs: MakePairs) -> None:
    generator = segment.create_generator(*make_pairs(2), image_size=SIZE)
    for model in ("unet.keras", [Path("unet.keras")], generator):
        with pytest.raises(segment.SegmentError, match=r"Expected models, but got .*: load them"):
            segment.predict(model, generator)
