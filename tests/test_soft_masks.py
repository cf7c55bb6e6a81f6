"""Masks whose grey levels are probabilities, such as the mean of several experts."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs, draw_lesion
from networks import tiny_network
from PIL import Image

import driver_load_evaluate
import driver_train_save_evaluate
import segment

SIZE = (32, 48)


@pytest.fixture
def pairs(tmp_path: Path) -> segment.Pairs:
    """Twelve images with the mean of two experts, of which one draws more than the other."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(12):
        image, mask = draw_lesion(SIZE, i)
        levels = np.full(SIZE, 51, np.uint8)  # a fifth, the rest of what the second one drew
        levels[np.asarray(mask) > 0] = 204
        image.save(tmp_path / "images" / f"{i:02}.png")
        Image.fromarray(levels).save(tmp_path / "masks" / f"{i:02}.png")
    images = sorted(map(str, (tmp_path / "images").iterdir()))
    return images, sorted(map(str, (tmp_path / "masks").iterdir()))


def test_a_batch_holds_the_grey_levels_as_probabilities(pairs: segment.Pairs) -> None:
    generator = segment.create_generator(*pairs, image_size=SIZE, batch_size=12, soft_masks=True)
    images, masks = generator[0]
    assert (images.dtype, masks.dtype) == (np.uint8, np.float32)
    expected = np.stack([np.asarray(Image.open(path)) for path in pairs[1]]) / 255
    np.testing.assert_allclose(masks[..., 0], expected, atol=1e-6)
    assert set(np.unique(expected)) == {0.2, 0.8}


def test_augmentation_moves_the_grey_levels_with_the_image(pairs: segment.Pairs) -> None:
    images, masks = segment.create_generator(
        *pairs, image_size=SIZE, batch_size=12, augment=True, soft_masks=True
    )[0]
    inside = images.max(axis=3) > 0  # the rest is the black around the image
    dark = images[..., 0] < images[..., 0].mean(where=inside)
    lesion = masks[..., 0].mean(where=inside & dark)
    assert masks[..., 0].mean(where=inside & ~dark) < 0.35 < 0.65 < lesion < 0.81


def test_without_the_option_grey_masks_are_refused(tmp_path: Path, pairs: segment.Pairs) -> None:
    levels = np.arange(32 * 48, dtype=np.uint8).reshape(SIZE)
    Image.fromarray(levels).save(pairs[1][0])
    with pytest.raises(segment.SegmentError, match="expected a mask of 0 and 255"):
        segment.PairCache(0).load(pairs[0][0], pairs[1][0], SIZE)
    soft = segment.PairCache(0, soft_masks=True).load(pairs[0][0], pairs[1][0], SIZE)
    np.testing.assert_array_equal(soft[..., 3], levels)


def test_a_mask_of_0_and_1_is_one_of_0_and_255(pairs: segment.Pairs) -> None:
    hard = np.asarray(Image.open(pairs[1][0])) > 128
    Image.fromarray(hard.astype(np.uint8)).save(pairs[1][0])
    pair = segment.PairCache(0, soft_masks=True).load(pairs[0][0], pairs[1][0], SIZE)
    np.testing.assert_array_equal(pair[..., 3], hard * 255)


def test_soft_and_other_masks_do_not_share_the_entries_of_a_folder(
    pairs: segment.Pairs, tmp_path: Path
) -> None:
    image, mask = pairs[0][0], pairs[1][0]
    for soft, expected in ((True, {51, 204}), (False, {0, 255}), (True, {51, 204})):
        cache = segment.PairCache(folder=tmp_path / "cache", soft_masks=soft)
        assert set(np.unique(cache.load(image, mask, SIZE)[..., 3])) == expected


def test_scores_and_threshold_take_the_mask_at_half(pairs: segment.Pairs) -> None:
    generator = segment.create_generator(*pairs, image_size=SIZE, soft_masks=True)
    hard = np.stack([np.asarray(Image.open(path)) > 128 for path in pairs[1]])
    predictions = np.where(hard, 0.62, 0.1).astype(np.float32)[..., None]
    predictions = segment._remember(predictions, segment.ModelRecord(one_region=False))
    assert {score["dice"] for score in segment.results(generator, predictions)} == {1.0}
    assert segment.choose_threshold(generator, predictions) == 0.5


@pytest.mark.parametrize("loss", [segment.dice_loss, segment.dice_cross_entropy_loss])
@pytest.mark.parametrize("expert", [0.2, 0.4, 0.6])
def test_the_losses_are_lowest_where_the_prediction_is_the_probability(
    loss: Callable[..., Any], expert: float
) -> None:
    target = np.zeros((1, 16, 16, 1), np.float32)
    target[:, 4:12, 4:12] = 1  # a core that is certain, and a rim of which the experts are not
    rim = (target == 0) & (np.arange(16)[:, None, None] > 1) & (np.arange(16)[:, None, None] < 14)
    target[rim] = expert
    choices = np.linspace(0.05, 0.95, 19)
    losses = [float(loss(target, np.where(rim, p, target).astype(np.float32))[0]) for p in choices]
    assert choices[np.argmin(losses)] == pytest.approx(expert)


@pytest.mark.parametrize("kind", ["full", "rgb", "white with alpha", "black with alpha"])
def test_masks_of_two_levels_are_read_as_without_the_option(
    pairs: segment.Pairs, kind: str
) -> None:
    image, path = pairs[0][0], pairs[1][0]
    mask = np.asarray(Image.open(path)) > 128
    pictures = {
        "full": np.ones(SIZE, np.uint8),
        "rgb": np.repeat(mask[..., None], 3, 2).astype(np.uint8),
        "white with alpha": np.dstack([np.full((*SIZE, 3), 255), mask * 255]).astype(np.uint8),
        "black with alpha": np.dstack([np.zeros((*SIZE, 3)), mask * 255]).astype(np.uint8),
    }
    Image.fromarray(pictures[kind]).save(path)
    soft, hard = (
        segment.PairCache(soft_masks=soft).load(image, path, SIZE) for soft in (True, False)
    )
    np.testing.assert_array_equal(soft, hard)
    assert hard[..., 3].max() == 255


@pytest.mark.usefixtures("eager")
def test_the_accuracy_of_a_training_takes_the_mask_at_half(
    pairs: segment.Pairs, tmp_path: Path
) -> None:
    generator = segment.create_generator(*pairs, image_size=SIZE, batch_size=4, soft_masks=True)
    model = tiny_network(SIZE, dropout=0.0)
    history = segment.train_model(model, generator, generator, 1, learning_rate=1e-9, verbose=0)
    lesion = np.asarray(segment.predict(model, generator, mirror=False, verbose=0)) > 0.5
    hard = np.concatenate([generator[i][1] for i in range(3)]) > 0.5
    expected = pytest.approx((lesion == hard).mean(), abs=1e-4)
    assert history.history["val_accuracy"] == [expected]
    segment.save_model(model, tmp_path / "m.keras")
    assert (
        segment.load_model(tmp_path / "m.keras").evaluate(generator, verbose=0, return_dict=True)[
            "accuracy"
        ]
        == expected
    )


@pytest.mark.usefixtures("eager")
def test_both_drivers_take_soft_masks(
    make_pairs: MakePairs, pairs: segment.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "create_model", tiny_network)
    levels = np.asarray(Image.open(pairs[1][0])).astype(int) + np.arange(48) % 20  # no two levels
    Image.fromarray(levels.astype(np.uint8)).save(pairs[1][0])
    data = ["--image-dir", str(tmp_path / "images"), "--mask-dir", str(tmp_path / "masks")]
    model = tmp_path / "model.keras"
    output = ["--output", str(tmp_path / "out"), "--num-imgs", "0"]
    train = [*data, *output, "--save", str(model), "--image-size", "32", "48", "--epochs", "1"]
    assert driver_train_save_evaluate.main(train) == 2
    assert driver_train_save_evaluate.main([*train, "--soft-masks"]) == 0
    assert driver_load_evaluate.main([str(model), "--all", *data, *output, "--soft-masks"]) == 0
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


def test_lesions_of_soft_masks_are_not_lost_without_a_word(pairs: segment.Pairs) -> None:
    for path in pairs[1]:
        Image.fromarray(np.arange(32 * 48, dtype=np.uint8).reshape(SIZE)).save(path)
    with pytest.warns(UserWarning, match=r"pairs are blank or cannot be read .* not grouped"):
        segment.find_same_lesions(*pairs, image_size=SIZE)
