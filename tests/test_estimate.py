"""The fitted estimate of the Dice coefficient, and its lower bound."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import tiny_network
from PIL import Image
from scipy import stats

import segment

SIZE = (32, 32)
Discs = Callable[..., tuple[segment.ImageGenerator, segment.Predictions]]


@pytest.fixture
def discs(tmp_path: Path) -> Discs:
    """Discs and predictions of them, which are the further off the less certain they are."""

    def make(count: int, seed: int = 0) -> tuple[segment.ImageGenerator, segment.Predictions]:
        rng, (y, x) = np.random.default_rng(seed), np.mgrid[:32, :32]
        paths: tuple[list[str], list[str]] = ([], [])
        predictions = np.zeros((count, *SIZE, 1), np.float32)
        for i, doubt in enumerate(rng.uniform(0.02, 0.3, count)):
            radius, off = rng.uniform(5, 13), rng.normal(0, 9 * doubt, 2)
            truth = np.hypot(y - 16, x - 16) < radius
            found = np.hypot(y - 16 - off[0], x - 16 - off[1]) < radius
            predictions[i, ..., 0] = np.where(found, 1 - doubt, doubt / 4)
            for folder, kind in zip(paths, ("image", "mask"), strict=True):
                folder.append(str(tmp_path / f"{seed}_{i}_{kind}.png"))
                picture = truth if kind == "mask" else np.repeat(truth[..., None], 3, 2)
                Image.fromarray(picture.astype(np.uint8) * 255).save(folder[-1])
        generator = segment.create_generator(*paths, image_size=SIZE)
        return generator, predictions.view(segment.Predictions)

    return make


def measured(generator: segment.ImageGenerator, predictions: segment.Predictions) -> np.ndarray:
    truth = np.concatenate([generator[i][1] for i in range(len(generator))])[..., 0] == 1
    found = np.stack(list(segment.restore_masks(generator, predictions)))
    both = (truth & found).sum((1, 2))
    return np.asarray(2 * both / (truth.sum((1, 2)) + found.sum((1, 2))))


def test_a_fitted_estimate_is_right_on_average_and_its_bound_holds_for_nine_tenths(
    discs: Discs,
) -> None:
    fitted, others = discs(400), discs(600, seed=1)
    unfitted = segment.estimate_dice(others[1])
    others[1].estimate = segment.fit_estimate(*fitted)
    dice, estimate = measured(*others), segment.estimate_dice(others[1])
    assert abs(estimate.mean() - dice.mean()) < 0.02 < abs(unfitted.mean() - dice.mean())
    bound = segment.estimate_dice(others[1], bound=True)
    assert 0.86 < (dice >= bound).mean() < 0.94
    assert ((bound >= 0) & (bound <= estimate)).all()
    certain = estimate > np.median(estimate)  # where the bound is closer
    assert (estimate - bound)[certain].max() < (estimate - bound)[~certain].min() + 1e-9


def test_half_of_the_images_fit_the_estimate_and_the_others_set_the_bound(discs: Discs) -> None:
    generator, predictions = discs(101)
    offset, slope, miss = segment.fit_estimate(generator, predictions)
    order = np.random.default_rng(0).permutation(101)
    dice, found = measured(generator, predictions), np.asarray(predictions)[..., 0] > 0.5
    p = np.asarray(predictions, float)[..., 0]
    soft = 2 * (p * found).sum((1, 2)) / (p.sum((1, 2)) + found.sum((1, 2)))
    x = soft - 0.005 / found.mean((1, 2)) ** 0.5
    line = stats.linregress(x[order[:51]], dice[order[:51]])
    assert (offset, slope) == pytest.approx((line.intercept, line.slope))
    estimate = np.clip(line.intercept + line.slope * x, 0, 1)[order[51:]]
    exceeded = (dice[order[51:]] < estimate - miss * (1.02 - estimate) - 1e-9).sum()
    assert exceeded == 50 - 46  # the 46th of 50 misses: 0.9 * 51, rounded up


def test_too_few_images_fit_no_estimate(discs: Discs) -> None:
    generator, predictions = discs(99)
    assert segment.fit_estimate(generator, predictions) == []
    assert np.isnan(segment.estimate_dice(predictions, bound=True)).all()
    blind = segment.create_generator(generator.image_paths, image_size=SIZE)
    with pytest.raises(segment.SegmentError, match="This needs masks"):
        segment.fit_estimate(blind, predictions)


def test_an_empty_mask_has_an_estimate_and_a_bound_of_zero() -> None:
    record = segment.ModelRecord(estimate=[0.9, 0.1, 0.5])
    predictions = segment._remember(np.zeros((1, *SIZE, 1)), record)
    assert segment.estimate_dice(predictions) == segment.estimate_dice(predictions, bound=True) == 0


def test_the_model_file_holds_the_estimate_and_several_models_their_mean(tmp_path: Path) -> None:
    models = []
    for i in (1, 2):
        segment.save_model(tiny_network(SIZE), tmp_path / "m.keras", estimate=[0.5 * i, 1, i])
        models.append(segment.load_model(tmp_path / "m.keras"))
    assert segment.model_record(models[1]).estimate == [1, 1, 2]
    image = tmp_path / "image.png"
    Image.new("RGB", SIZE).save(image)
    generator = segment.create_generator([str(image)], image_size=SIZE)
    assert segment.predict(models, generator, verbose=0).estimate == [0.75, 1, 1.5]
    segment.model_record(models[0]).estimate = []
    assert segment.predict(models, generator, verbose=0).estimate == []


@pytest.mark.parametrize("estimate", [[1.0], [1.0, 2.0, "3"], {"a": 1.0}])
def test_a_damaged_estimate_is_refused(tmp_path: Path, estimate: Any) -> None:
    model = tiny_network(SIZE)
    segment.model_record(model).estimate = estimate
    segment.save_model(model, tmp_path / "m.keras")
    with pytest.raises(segment.SegmentError, match="is not as save_model writes it"):
        segment.load_model(tmp_path / "m.keras")


def test_the_results_have_the_bound_and_how_often_it_holds(
    discs: Discs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, predictions = discs(8)
    dice = measured(generator, predictions)
    predictions.estimate = [float(np.sort(dice)[2]), 0.0, 0.0]  # a bound that two are below
    scores = segment.results(generator, predictions, output_dir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["lower_bound_holds"] == 6 / 8
    assert "Dice is at least its lower bound in 75.0%" in capsys.readouterr().out
    with open(tmp_path / "scores.csv", newline="") as file:
        written = [float(row["dice_lower_bound"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(written, np.sort(dice)[2])
    assert [score["estimated_dice"] for score in scores] == written
    assert "<option>dice_lower_bound" in (tmp_path / "report.html").read_text()


def test_a_fold_without_a_fitted_estimate_leaves_out_the_bound_of_all(discs: Discs) -> None:
    generator, predictions = discs(4)
    for fitted in ((0, 1), (2, 3)):
        mixed = [prediction.copy() for prediction in predictions]
        for i in fitted:
            mixed[i].estimate = [0.0, 1.0, 0.1]
        scores = segment.results(generator, iter(mixed))
        assert not any("dice_lower_bound" in score for score in scores)


def test_a_resized_mask_is_scored_as_in_the_results(tmp_path: Path) -> None:
    y, x = np.mgrid[:60, :60]
    disc = np.hypot(y - 30, x - 30) < 20
    image, mask = str(tmp_path / "image.png"), str(tmp_path / "mask.png")
    Image.fromarray(disc.astype(np.uint8) * 255).save(mask)
    Image.open(mask).convert("RGB").resize((57, 60)).save(image)
    cache = segment.PairCache(fit_masks=True)
    generator = segment.create_generator([image], [mask], image_size=(60, 60), cache=cache)
    predictions = generator[0][1].astype(np.float32)
    (score,) = segment.results(generator, predictions)
    assert segment._measure_dice(generator, predictions, [0.5]) == pytest.approx(score["dice"])


def test_empty_masks_fit_no_estimate(discs: Discs) -> None:
    generator, predictions = discs(100)
    assert segment.fit_estimate(generator, np.zeros_like(predictions)) == []
