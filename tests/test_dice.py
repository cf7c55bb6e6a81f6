"""Dice and the other scores, compared with hand counts, sets and scikit-learn."""

import keras
import numpy as np
import pytest
from sklearn import metrics

import segment

CROSS = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
TOP = [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
CORNER = [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
NONE = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
ALL = [[1, 1, 1], [1, 1, 1], [1, 1, 1]]

TABLE = [  # truth, prediction, Dice, Jaccard
    (CROSS, CROSS, 1, 1),
    (CROSS, TOP, 2 / 8, 1 / 7),
    (TOP, CROSS, 2 / 8, 1 / 7),
    (CROSS, ALL, 10 / 14, 5 / 9),
    (CROSS, CORNER, 0, 0),
    (CROSS, NONE, 0, 0),
    (NONE, CORNER, 0, 0),
    (NONE, NONE, 1, 1),
    (ALL, ALL, 1, 1),
]


def batch(*masks: list[list[int]]) -> np.ndarray:
    return np.array(masks, np.float32)[..., None]


@pytest.mark.parametrize(("truth", "prediction", "dice", "jaccard"), TABLE)
def test_small_masks_score_as_counted_by_hand(
    truth: list[list[int]], prediction: list[list[int]], dice: float, jaccard: float
) -> None:
    scores = segment.score_masks(np.array(truth), np.array(prediction))
    assert scores["dice"] == pytest.approx(dice)
    assert scores["jaccard"] == pytest.approx(jaccard)
    assert scores["thresholded_jaccard"] == pytest.approx(jaccard if jaccard >= 0.65 else 0)
    metric = segment.dice_coefficient(batch(truth), batch(prediction))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(metric), [dice], rtol=1e-6)


def test_random_masks_score_as_with_sets_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, prediction = rng.random((2, 12, 17)) < rng.random((2, 1, 1))
        a, b = (set(np.flatnonzero(mask)) for mask in (truth, prediction))
        scores = segment.score_masks(truth, prediction)
        assert scores["dice"] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        flat = truth.ravel(), prediction.ravel()
        assert scores["jaccard"] == pytest.approx(metrics.jaccard_score(*flat))
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(*flat))
        recall = metrics.recall_score(*flat, zero_division=1)
        assert scores["sensitivity"] == pytest.approx(recall)
        recall = metrics.recall_score(~flat[0], ~flat[1], zero_division=1)
        assert scores["specificity"] == pytest.approx(recall)


def test_scores_without_any_lesion_or_background_are_defined() -> None:
    scores = segment.score_masks(np.array(NONE), np.array(NONE))
    assert set(scores.values()) == {1.0}
    assert segment.score_masks(np.array(NONE), np.array(CORNER))["specificity"] == 8 / 9
    assert segment.score_masks(np.array(ALL), np.array(CORNER))["specificity"] == 1


def test_the_thresholded_jaccard_is_zero_below_065() -> None:
    truth = np.arange(20) < 20
    assert segment.score_masks(truth, np.arange(20) < 13)["thresholded_jaccard"] == 0.65
    assert segment.score_masks(truth, np.arange(20) < 12)["thresholded_jaccard"] == 0


def test_the_metric_averages_over_images_rather_than_pixels() -> None:
    truth, prediction = batch(ALL, CORNER), batch(ALL, TOP)
    per_image = keras.ops.convert_to_numpy(segment.dice_coefficient(truth, prediction))
    np.testing.assert_allclose(per_image, [1, 0])
    metric = keras.metrics.MeanMetricWrapper(segment.dice_coefficient)
    metric.update_state(truth, prediction)
    metric.update_state(batch(NONE), batch(NONE))
    assert float(metric.result()) == pytest.approx(2 / 3)


def test_the_metric_thresholds_probabilities_at_a_half() -> None:
    probabilities = 0.2 + 0.4 * batch(CROSS)  # 0.2 and 0.6
    metric = segment.dice_coefficient(batch(CROSS), probabilities)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(metric), [1])


def test_the_dice_loss_equals_its_formula() -> None:
    probabilities = 0.5 * batch(ALL, ALL)
    loss = segment.dice_loss(batch(CROSS, NONE).astype(np.uint8), probabilities)
    expected = [1 - (2 * 2.5 + 1) / (5 + 4.5 + 1), 1 - 1 / (4.5 + 1)]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-6)


def test_the_default_loss_adds_the_mean_cross_entropy_of_each_image() -> None:
    truth, lesion = batch(CROSS, NONE), 0.2 + 0.5 * batch(CROSS, TOP)
    entropy = -(truth * np.log(lesion) + (1 - truth) * np.log(1 - lesion)).mean((1, 2, 3))
    dice = keras.ops.convert_to_numpy(segment.dice_loss(truth, lesion))
    loss = keras.ops.convert_to_numpy(segment.dice_cross_entropy_loss(truth, lesion))
    np.testing.assert_allclose(loss, dice + entropy, rtol=1e-5)
    sure = keras.ops.convert_to_numpy(segment.dice_cross_entropy_loss(truth, truth))
    np.testing.assert_allclose(sure, [0, 0], atol=1e-5)


def test_the_dice_loss_of_a_perfect_or_empty_mask_is_zero() -> None:
    loss = segment.dice_loss(batch(NONE, CROSS), batch(NONE, CROSS))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), [0, 0], atol=1e-6)


def test_an_empty_mask_does_not_change_the_loss_of_other_images() -> None:
    alone = segment.dice_loss(batch(CROSS), 0.7 * batch(TOP))
    together = segment.dice_loss(batch(CROSS, NONE), 0.7 * batch(TOP, NONE))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(together)[0], keras.ops.convert_to_numpy(alone)[0], rtol=1e-6
    )


def test_masks_of_other_shapes_or_values_are_refused() -> None:
    with pytest.raises(segment.SegmentError, match=r"shapes \(3, 3\) and \(2, 3\)"):
        segment.score_masks(np.zeros((3, 3)), np.zeros((2, 3)))
    with pytest.raises(segment.SegmentError, match=r"prediction holds values of 0 to 255"):
        segment.score_masks(np.zeros((2, 2)), np.array([[0, 255], [0, 0]]))
    with pytest.raises(segment.SegmentError, match=r"truth holds values of 0\.5 to 1\.0"):
        segment.score_masks(np.array([0.5, 1.0]), np.array([0, 1]))
    with pytest.raises(segment.SegmentError, match=r"shapes \(0,\) and \(0,\)"):
        segment.score_masks(np.zeros(0), np.zeros(0))


def test_masks_may_be_lists() -> None:
    assert segment.score_masks(CROSS, TOP)["dice"] == 2 / 8  # type: ignore[arg-type]
