"""Confidence intervals of the mean scores, by lesion."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment


def rows(values: np.ndarray, lesions: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Scores of images without masks, which no other statistic needs; with lesions or without."""
    scores = [{"id": str(i), "estimated_dice": float(value)} for i, value in enumerate(values)]
    for score, lesion in zip(scores, () if lesions is None else lesions, strict=False):
        score["lesion"] = str(lesion)
    return scores


def interval(values: np.ndarray, lesions: np.ndarray | None = None) -> list[float]:
    bounds: list[float] = segment.summarize(rows(values, lesions))["estimated_dice"]["ci95"]
    return bounds


def draw(rng: np.random.Generator, lesions: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed scores of 0.882 on average, and their lesions of 1 to 6 images that are alike."""
    sizes = rng.choice([1, 2, 3, 4, 5, 6], lesions, p=[0.3, 0.1, 0.1, 0.1, 0.1, 0.3])
    numbers = np.repeat(np.arange(lesions), sizes)
    lost = 1 - rng.beta(9, 1.2, lesions)[numbers]
    return np.clip(1 - lost * rng.gamma(4, 0.25, len(numbers)), 0, 1), numbers


def test_the_interval_of_single_images_is_that_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(0).beta(9, 1.2, 80)
    rng = np.random.default_rng(1)
    means = [rng.choice(values, 80).mean() for _ in range(20_000)]
    expected = np.percentile(means, (2.5, 97.5))
    assert interval(values) == pytest.approx(list(expected), abs=0.05 * np.ptp(expected))


def test_lesions_are_drawn_whole_and_weighted_by_their_images() -> None:
    values, lesions = draw(np.random.default_rng(3), 40)
    rng = np.random.default_rng(1)
    means = []
    for _ in range(20_000):
        drawn = np.bincount(rng.integers(0, 40, 40), minlength=40)[lesions]
        means.append(np.average(values, weights=drawn))
    expected = np.percentile(means, (2.5, 97.5))
    tolerance = 0.05 * np.ptp(expected)
    assert interval(values, lesions) == pytest.approx(list(expected), abs=tolerance)
    assert np.ptp(interval(values)) < np.ptp(expected) - 2 * tolerance  # by image it is too narrow


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    true_mean = draw(np.random.default_rng(0), 300_000)[0].mean()
    rng, held = np.random.default_rng(1), {"lesion": 0, "image": 0}
    for _ in range(200):
        values, lesions = draw(rng, 60)
        for name, bounds in (("lesion", interval(values, lesions)), ("image", interval(values))):
            held[name] += bounds[0] <= true_mean <= bounds[1]
    assert 0.89 < held["lesion"] / 200 < 0.98
    assert held["image"] / 200 < 0.8


def test_the_same_scores_in_any_order_of_calls_give_the_same_interval() -> None:
    values, lesions = draw(np.random.default_rng(0), 30)
    first = interval(values, lesions)
    np.random.default_rng().random()
    interval(values[:9])
    assert interval(values, lesions) == first


def test_equal_scores_give_an_interval_without_width() -> None:
    assert interval(np.full(7, 0.75)) == [0.75, 0.75]


def test_a_single_lesion_has_no_interval_and_none_is_printed(
    make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interval(np.array([0.5, 0.7]), np.array([1, 1])) is None
    generator = segment.create_generator(*make_pairs(1), image_size=(64, 64))
    segment.results(generator, generator[0][1].astype(float))
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("dice"))
    assert len(line.split()) == 5


@pytest.fixture
def repeated(make_pairs: MakePairs) -> segment.ImageGenerator:
    """Four lesions, of which the third is also the last image, mirrored."""
    images, masks = make_pairs(4, (150, 200))
    for paths in (images, masks):
        path = Path(paths[2])
        again = path.with_name(path.name.replace("0002", "0009"))
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(again)
        paths.append(str(again))
    return segment.create_generator(images, masks, image_size=(128, 128))


def test_a_table_names_the_lesion_of_each_image_and_the_summary_draws_by_it(
    repeated: segment.ImageGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = repeated[0][1].astype(float)
    for i in range(5):
        predictions[i, :, : 40 + 10 * i] = 0
    scores = segment.results(repeated, predictions, output_dir=tmp_path)
    printed = capsys.readouterr().out
    with open(tmp_path / "scores.csv", newline="") as file:
        lesions = [row["lesion"] for row in csv.DictReader(file)]
    assert lesions == [f"ISIC_000000{i}" for i in (0, 1, 2, 3, 2)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in (*segment.METRICS, *segment.DISTANCES, "estimated_dice"):
        by_lesion = interval(np.array([score[name] for score in scores]), np.array(lesions))
        assert summary[name]["ci95"] == by_lesion
    low, high = summary["dice"]["ci95"]
    assert low < summary["dice"]["mean"] < high
    assert f"{summary['dice']['min']:11.6f}  {low:.4f} to {high:.4f}\n" in printed


def test_lesions_are_found_in_the_cache_and_not_without_masks(
    repeated: segment.ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = repeated[0][1].astype(float)
    frames, decode = [], segment._decode

    def spy(path: segment.StrPath, sizes: Any, **options: Any) -> Any:
        frames.extend(sizes)
        return decode(path, sizes, **options)

    monkeypatch.setattr(segment, "_decode", spy)
    segment.results(repeated, predictions, num_imgs=0)
    assert frames == [None] * 5  # the masks, at their own size
    blind = segment.create_generator(repeated.image_paths, image_size=(128, 128))
    scores = segment.results(blind, predictions, num_imgs=0)
    assert [list(score) for score in scores] == [["id", "estimated_dice"]] * 5
    assert segment.summarize(scores)["estimated_dice"]["ci95"] is not None


def test_a_pair_that_occurs_twice_is_one_lesion(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2, (150, 200))
    generator = segment.create_generator([*images, images[0]], [*masks, masks[0]])
    predictions = np.ones((3, 256, 256, 1))
    scores = segment.results(generator, predictions, num_imgs=0)
    assert [score["lesion"] for score in scores] == [score["id"] for score in scores]
    assert scores[0] == scores[2]
