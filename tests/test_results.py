"""Scores at the original resolution, tables, masks and figures."""

import csv
import json
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import MakePairs, with_threshold
from matplotlib.patches import Rectangle
from PIL import Image

import segment

FRAME = (64, 64)


def prepare(
    make_pairs: MakePairs, count: int = 5, size: segment.Size = (90, 120)
) -> tuple[segment.ImageGenerator, np.ndarray]:
    """A generator and predictions of which each later one misses a wider strip of the lesion."""
    generator = segment.create_generator(*make_pairs(count, size), image_size=FRAME)
    predictions = np.concatenate([generator[i][1] for i in range(len(generator))]).astype(float)
    for i in range(count):
        predictions[i, :, : 20 + 6 * i] = 0
    return generator, predictions


def dice_by_hand(mask_path: str, prediction: np.ndarray, size: segment.Size) -> float:
    """Dice of a mask file and a prediction, put back by repeating pixels, as sets."""
    top, left, height, width = segment.letterbox(size, FRAME)
    rows = top + (np.arange(size[0]) + 0.5) * height / size[0]
    columns = left + (np.arange(size[1]) + 0.5) * width / size[1]
    restored = prediction[rows.astype(int)[:, None], columns.astype(int), 0] >= 0.5
    a, b = (set(np.flatnonzero(m)) for m in (np.asarray(Image.open(mask_path)), restored))
    return 2 * len(a & b) / (len(a) + len(b))


def test_images_are_scored_at_their_original_resolution(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    scores = segment.results(generator, predictions)
    assert generator.mask_paths is not None
    for score, path, prediction in zip(scores, generator.mask_paths, predictions, strict=True):
        expected = dice_by_hand(str(path), prediction, (90, 120))
        assert score["dice"] == pytest.approx(expected, abs=0.015)


def test_images_are_scored_while_the_next_are_predicted(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, predictions = prepare(make_pairs)
    went_on, score = threading.Event(), segment._score_image

    def predict() -> Iterator[np.ndarray]:
        yield predictions[0]
        went_on.set()  # while the first one is being scored
        yield from predictions[1:]

    def score_late(*image: Any) -> dict[str, Any]:
        assert went_on.wait(20)
        return score(*image)

    monkeypatch.setattr(segment, "_score_image", score_late)
    scores = segment.results(generator, predict())
    assert scores == segment.results(generator, predictions.astype(np.float32))


def test_an_output_that_cannot_be_written_is_refused_before_prediction(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator, predictions = prepare(make_pairs, 2)
    (tmp_path / "file").write_text("")
    untouched = iter(predictions)
    with pytest.raises(segment.SegmentError, match=r"scores\.csv: cannot be written"):
        segment.results(generator, untouched, output_dir=tmp_path / "file")
    assert len(list(untouched)) == 2


def test_picture_id_and_score_belong_together_when_sorted(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    order = [3, 0, 4, 1, 2]
    assert generator.mask_paths is not None
    mixed = segment.create_generator(
        [generator.image_paths[i] for i in order],
        [generator.mask_paths[i] for i in order],
        image_size=FRAME,
    )
    by_id = {score["id"]: score for score in segment.results(generator, predictions)}
    again = segment.results(mixed, predictions[order])
    assert [score["id"] for score in again] == [f"ISIC_{i:07}" for i in order]
    assert all(by_id[score["id"]] == score for score in again)


def test_the_summary_is_printed_with_the_worst_first(
    make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, predictions = prepare(make_pairs)
    scores = segment.results(generator, predictions)
    printed = capsys.readouterr().out
    dice = [score["dice"] for score in scores]
    assert f"dice               {np.mean(dice):11.6f}{np.median(dice):11.6f}" in printed
    failures = sum(score["jaccard"] < 0.65 for score in scores)
    assert f"Failures (Jaccard < 0.65): {failures} ({failures / 5:.1%})" in printed
    listed = [line.split() for line in printed.splitlines() if line.startswith("  ISIC")]
    for rows, key in ((listed[:5], "dice"), (listed[5:], "estimated_dice")):
        ranked = sorted(scores, key=lambda score: score[key])
        assert rows == [[score["id"], f"{score[key]:.6f}"] for score in ranked]


def test_tables_hold_every_image_in_full_precision(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs)
    predictions = with_threshold(predictions, 0.4)
    scores = segment.results(generator, predictions, output_dir=tmp_path / "out")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == (
        "id,dice,jaccard,thresholded_jaccard,sensitivity,specificity,accuracy,hd95,assd,"
        "estimated_dice,lesion"
    )
    read = [[row[0], *map(float, row[1:-1]), row[-1]] for row in rows]
    assert read == [list(score.values()) for score in scores]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dice"]["mean"] == pytest.approx(np.mean([s["dice"] for s in scores]))
    assert (summary["images"], summary["threshold"]) == (5, 0.4)
    ranked = sorted((s["dice"], s["id"]) for s in scores)
    assert list(summary["worst"].items()) == [(id_, dice) for dice, id_ in ranked]


def test_the_summary_lists_the_thresholds_of_several_models(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator, predictions = prepare(make_pairs)
    thresholds = (0.6, 0.4, 0.6, 0.4, 0.5)
    lesions = [with_threshold(p, t) for p, t in zip(predictions, thresholds, strict=True)]
    segment.results(generator, iter(lesions), output_dir=tmp_path, num_imgs=0)
    assert json.loads((tmp_path / "summary.json").read_text())["threshold"] == [0.4, 0.5, 0.6]


def test_masks_are_written_as_the_challenge_requires(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs, 2)
    segment.results(generator, predictions, output_dir=tmp_path / "out")
    restored = list(segment.restore_masks(generator, predictions))
    for i in range(2):
        with Image.open(tmp_path / "out" / "masks" / f"ISIC_{i:07}_segmentation.png") as mask:
            assert (mask.mode, mask.size) == ("L", (120, 90))
            np.testing.assert_array_equal(np.asarray(mask), 255 * restored[i])


def test_without_masks_images_are_estimated_and_outlined(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, predictions = prepare(make_pairs, 3)
    blind = segment.create_generator(generator.image_paths, image_size=FRAME)
    predictions[1] *= 0.6
    out = tmp_path / "out"
    scores = segment.results(blind, predictions, output_dir=out)
    assert [list(score) for score in scores] == [["id", "estimated_dice"]] * 3
    printed = capsys.readouterr().out
    assert "3 images, each at its original resolution" in printed
    assert printed.splitlines()[-3].split()[0] == "ISIC_0000001"
    assert {path.name for path in out.iterdir()} == {
        "scores.csv", "summary.json", "masks", "overlays", "predictions.png", "worst.png",
        "histogram.png", "report.html",
    }  # fmt: skip
    mask = np.asarray(Image.open(out / "masks" / "ISIC_0000000_segmentation.png")) > 0
    overlay = np.asarray(Image.open(out / "overlays" / "ISIC_0000000_overlay.jpg")).astype(int)
    outlined = (overlay[..., 0] > 180) & (overlay[..., 1] < 90) & (overlay[..., 2] > 140)
    assert outlined.any()
    assert not (outlined & ~mask)[:, 10:].any()
    assert outlined.sum() < mask.sum() / 3


def test_figures_without_masks_show_the_image_and_its_prediction(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 2)
    blind = segment.create_generator(generator.image_paths, image_size=FRAME)
    scores = segment.results(blind, predictions)
    figure = segment.plot_predictions(blind, predictions, scores, [1], contours=True)
    titles = [axes.get_title() for axes in figure.axes]
    estimate = f"{scores[1]['estimated_dice']:.4f}"
    assert titles == ["ISIC_0000001", f"Prediction, estimated Dice {estimate}"]
    assert len(figure.axes[0].collections) == 1
    histogram = segment.plot_dice_histogram(scores).axes[0]
    assert histogram.get_xlabel() == "Estimated Dice coefficient"


def test_rows_show_input_target_and_prediction_with_id_and_dice(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    scores = segment.results(generator, predictions)
    figure = segment.plot_predictions(generator, predictions, scores, [4, 2])
    titles = [axes.get_title() for axes in figure.axes]
    for row, i in enumerate((4, 2)):
        assert titles[3 * row] == scores[i]["id"] == f"ISIC_{i:07}"
        assert titles[3 * row + 2] == f"Prediction, Dice {scores[i]['dice']:.4f}"
    image, target, prediction = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3])
    assert target.shape == prediction.shape == segment.letterbox((90, 120), FRAME)[2:]
    # Without the black bars of the frame
    np.testing.assert_array_equal(image, generator[0][0][4, 8:56])
    np.testing.assert_array_equal(prediction, predictions[4, 8:56, :, 0] >= 0.5)


def test_the_outlines_of_target_and_prediction_are_drawn(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    predictions[1] = 0
    scores = segment.results(generator, predictions)
    figure = segment.plot_predictions(generator, predictions, scores, [0, 1], contours=True)
    assert [len(axes.collections) for axes in figure.axes[::3]] == [2, 1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Target", "Prediction"]


def test_as_many_images_are_drawn_as_asked_for(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs, 23)
    history = {
        f"{prefix}{name}": [0.1, 0.9, 0.5]
        for name in ("loss", "accuracy", "dice_coefficient")
        for prefix in ("", "val_")
    }
    segment.results(generator, predictions, num_imgs=99, output_dir=tmp_path, history=history)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "predictions_1.png", "predictions_21.png", "worst_1.png", "worst_21.png",
        "histogram.png", "training.png",
    }  # fmt: skip
    heights = [Image.open(tmp_path / f"worst_{k}.png").height for k in (1, 21)]
    assert heights[0] > 5 * heights[1]


def test_a_single_page_of_figures_has_no_number(make_pairs: MakePairs, tmp_path: Path) -> None:
    segment.results(*prepare(make_pairs, 2), num_imgs=99, output_dir=tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"predictions.png", "worst.png", "histogram.png"}


def test_the_worst_figure_shows_the_worst_and_its_outlines_in_their_colours(
    make_pairs: MakePairs,
) -> None:
    generator, predictions = prepare(make_pairs)
    scores = segment.results(generator, predictions)
    figures = dict(segment._figures(generator, dict(enumerate(predictions)), scores, 2, None))
    titles = [axes.get_title() for axes in figures["worst"].axes[::3]]
    ranked = sorted((score["dice"], score["id"]) for score in scores)
    assert titles == [id_ for _, id_ in ranked[:2]]
    target, prediction = figures["worst"].axes[0].collections
    colors = [np.asarray(c.get_edgecolor())[0, :3].tolist() for c in (target, prediction)]
    assert colors == [[0, 1, 0], [1, 0, 1]]  # lime and magenta, as the legend has it
    left = [np.asarray(c.get_paths()[0].vertices)[:, 0].min() for c in (target, prediction)]
    assert left[0] < left[1]  # the predictions lack the lesion's left side
    assert not figures["predictions"].axes[0].collections


def test_statistics_are_those_of_numpy() -> None:
    dice = [0.1, 0.5, 0.9, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4, 1.0, 0.95]
    metrics = (*segment.METRICS, *segment.DISTANCES, "estimated_dice")
    scores = [{"id": str(i), **dict.fromkeys(metrics, d)} for i, d in enumerate(dice)]
    summary = segment.summarize(scores)
    expected = {"mean": np.mean(dice), "std": np.std(dice), "median": 0.6, "p10": 0.2}
    expected |= {"p90": 0.95, "min": 0.1, "max": 1.0}
    for name in metrics:
        del summary[name]["ci95"]
        assert summary[name] == pytest.approx(expected)
    assert summary["failures"] == 6
    assert list(summary["worst"].values()) == sorted(dice)[:10]
    with pytest.raises(segment.SegmentError, match="at least one image"):
        segment.summarize([])


def test_every_step_applies_the_threshold(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, _ = prepare(make_pairs, 1)
    predictions = 0.2 + 0.6 * np.tile(np.linspace(0, 1, 64)[:, None], (1, 64, 1, 1))
    areas = []
    for threshold in (0.35, 0.65):
        chosen = with_threshold(predictions, threshold)
        (score,) = segment.results(generator, chosen, output_dir=tmp_path)
        written = np.asarray(Image.open(tmp_path / "masks" / f"{score['id']}_segmentation.png"))
        assert generator.mask_paths is not None
        truth = segment.load_segmented_image(generator.mask_paths[0], None)[..., 0]
        assert segment.score_masks(truth, written // 255)["dice"] == score["dice"]
        figure = segment.plot_predictions(generator, chosen, [score], [0])
        shown = np.asarray(figure.axes[2].images[0].get_array())
        areas.append((written.mean() / 255, shown.mean()))
    np.testing.assert_allclose(areas, [(0.75, 0.75), (0.25, 0.25)], atol=0.02)


def test_a_mask_of_another_size_is_refused_when_scored(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 2)
    assert generator.mask_paths is not None
    Image.new("L", (90, 120)).save(generator.mask_paths[1])
    with pytest.raises(segment.SegmentError, match=r"_0000001\.png is 90 × 120 .* is 120 × 90"):
        segment.results(generator, predictions)


def test_without_images_to_draw_only_the_histogram_is_written(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator, predictions = prepare(make_pairs, 1)
    segment.results(generator, predictions, num_imgs=0, output_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["histogram.png"]
    with pytest.raises(segment.SegmentError, match="indices is empty"):
        segment.plot_predictions(generator, predictions, [], [])


def test_the_histogram_counts_every_image(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    scores = segment.results(generator, predictions)
    axes = segment.plot_dice_histogram(scores).axes[0]
    assert sum(bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)) == 5
    legend = axes.get_legend()
    assert legend is not None
    mean = np.mean([score["dice"] for score in scores])
    assert legend.get_texts()[0].get_text() == f"Mean {mean:.4f}"


def test_the_learning_curves_mark_the_best_epoch() -> None:
    values = {"loss": [3.0, 2, 1], "accuracy": [0.1, 0.2, 0.3], "dice_coefficient": [0.4, 0.9, 0.8]}
    history = {f"{prefix}{name}": v for name, v in values.items() for prefix in ("", "val_")}
    figure = segment.plot_history(history)
    assert [axes.get_title() for axes in figure.axes] == ["Accuracy", "Loss", "Dice coefficient"]
    for axes, name in zip(figure.axes, ("accuracy", "loss", "dice_coefficient"), strict=True):
        training, validation, best = axes.get_lines()
        np.testing.assert_array_equal(training.get_xydata(), list(enumerate(values[name], 1)))
        np.testing.assert_array_equal(validation.get_ydata(), values[name])
        assert list(np.asarray(best.get_xdata())) == [2, 2]


def test_a_curve_that_began_later_ends_with_the_others() -> None:
    figure = segment.plot_history({"loss": [4, 3, 2, 1], "accuracy": [0.5, 0.6]})
    accuracy, loss = (list(axes.lines[0].get_xdata()) for axes in figure.axes)  # type: ignore[arg-type]
    assert (accuracy, loss) == ([3, 4], [1, 2, 3, 4])


def test_curves_without_validation_or_without_epochs() -> None:
    figure = segment.plot_history({"loss": [3.0, 2, 1], "learning_rate": [1.0, 1, 1]})
    assert [axes.get_title() for axes in figure.axes] == ["Loss"]
    assert list(np.asarray(figure.axes[0].get_lines()[-1].get_xdata())) == [3, 3]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["Training", "Best epoch (3)"]
    with pytest.raises(segment.SegmentError, match="holds no epoch"):
        segment.plot_history({"loss": []})


def test_two_empty_masks_score_one(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 1)
    assert generator.mask_paths is not None
    Image.new("L", (120, 90)).save(generator.mask_paths[0])
    assert segment.results(generator, 0 * predictions)[0]["dice"] == 1
    assert segment.results(generator, predictions)[0]["dice"] == 0


def test_predictions_of_another_generator_are_refused(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 3)
    for others in (predictions[:2], predictions[[0, 1, 2, 2]], predictions[:, :32]):
        for given in (others, iter(others)):
            with pytest.raises(segment.SegmentError, match="too few, too many or of shape"):
                segment.results(generator, given)
    generator.shuffle = True
    with pytest.raises(segment.SegmentError, match="use shuffle=False"):
        segment.results(generator, predictions)


def test_a_full_disk_leaves_no_incomplete_file(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs, 3)
    output = tmp_path / "output"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # too little for a figure
    try:
        with pytest.raises(segment.SegmentError, match=r"\.png: .*\(File too large"):
            segment.results(generator, predictions, output_dir=output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(output)) == ["masks", "scores.csv", "summary.json"]
    assert json.loads((output / "summary.json").read_text())["images"] == 3
    assert len((output / "scores.csv").read_text().splitlines()) == 4


def test_the_summary_has_rank_correlation_and_roc_auc_of_the_estimate() -> None:
    dice, estimate = [0.9, 0.8, 0.5, 0.95, 0.4], [0.8, 0.9, 0.6, 0.95, 0.7]
    scores = [
        {"id": str(i), **dict.fromkeys(segment.METRICS, d), "estimated_dice": e}
        for i, (d, e) in enumerate(zip(dice, estimate, strict=True))
    ]
    summary = segment.summarize(scores)
    # Ranks 4 3 2 5 1 and 3 4 1 5 2: squared differences sum to 4, so 1 - 6 * 4 / (5 * 24).
    assert summary["estimate_rank_correlation"] == pytest.approx(0.8)
    assert summary["estimate_roc_auc"] == 1  # both failures lie below all the others
    assert list(summary["doubtful"]) == ["2", "4", "0", "1", "3"]
    single = segment.summarize(scores[:1])
    assert (single["estimate_rank_correlation"], single["estimate_roc_auc"]) == (None, None)


def test_outlines_run_along_the_edges_of_the_pixels(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 1)
    predictions[0] = 0
    predictions[0, 20:40, :30] = 1  # closed at the edge of the picture
    scores = segment.results(generator, predictions)
    figure = segment.plot_predictions(generator, predictions, scores, [0], contours=True)
    for outline, axes in zip(figure.axes[0].collections, figure.axes[1:], strict=True):
        rows, columns = np.nonzero(np.asarray(axes.images[0].get_array()))
        corners = np.asarray(outline.get_paths()[0].vertices)
        assert corners.min(0).tolist() == [columns.min() - 0.5, rows.min() - 0.5]
        assert corners.max(0).tolist() == [columns.max() + 0.5, rows.max() + 0.5]


@pytest.mark.parametrize(("size", "width"), [((40, 90), 1), ((400, 900), 3)])
def test_the_outline_of_an_overlay_is_wider_in_a_larger_image(
    tmp_path: Path, size: segment.Size, width: int
) -> None:
    Image.new("RGB", size[::-1], (200, 200, 200)).save(tmp_path / "a.png")
    generator = segment.create_generator([tmp_path / "a.png"], image_size=size)
    left, right = size[1] // 5, size[1] // 2
    predictions = np.zeros((1, *size, 1))
    predictions[:, size[0] // 4 : size[0] // 2, left:right] = 1
    segment.results(generator, predictions, num_imgs=0, output_dir=tmp_path)
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "a_overlay.jpg").convert("L"))
    outlined = np.flatnonzero(overlay[size[0] * 3 // 8] < 150)
    expected = [*range(left, left + width), *range(right - width, right)]
    assert outlined.tolist() == expected


def test_only_the_predictions_that_are_drawn_are_kept(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, predictions = prepare(make_pairs, 7)
    references: list[weakref.ref[np.ndarray]] = []
    kept: list[tuple[int, int]] = []
    plot_predictions = segment.plot_predictions

    def predict() -> Iterator[np.ndarray]:
        for prediction in predictions:
            one = prediction.copy()
            references.append(weakref.ref(one))
            yield one

    def record(generator: Any, some: Any, *rest: Any, **options: Any) -> Any:
        kept.append((len(some), sum(reference() is not None for reference in references)))
        return plot_predictions(generator, some, *rest, **options)

    monkeypatch.setattr(segment, "plot_predictions", record)
    segment.results(generator, predict(), num_imgs=2, output_dir=tmp_path)
    assert [count for count, _ in kept] == [4, 4]
    assert max(alive for _, alive in kept) <= 6  # those drawn and what the loops still name


def test_images_of_equal_scores_are_drawn(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs, 4)
    predictions[1:] = 0  # three equally bad ones, none of them among the first
    segment.results(generator, predictions, num_imgs=1, output_dir=tmp_path)
    assert (tmp_path / "worst.png").is_file()


def test_lists_of_predictions_and_the_history_of_fit_are_taken(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs)
    history = keras.callbacks.History()
    history.history = {"loss": [0.5], "accuracy": [0.9]}
    scores = segment.results(generator, list(predictions), history=history)
    assert scores == segment.results(generator, predictions)
    masks = segment.restore_masks(generator, list(predictions))
    assert [mask.shape for mask in masks] == [(90, 120)] * 5
    for function in (segment.choose_threshold, segment.fit_estimate):
        assert function(generator, list(predictions)) == function(generator, predictions)
    assert len(segment.estimate_dice(list(predictions))) == 5


def test_too_few_predictions_are_refused_before_anything_is_written(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator, predictions = prepare(make_pairs)
    with pytest.raises(segment.SegmentError, match="too few, too many or of shape"):
        segment.results(generator, predictions[:4], output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("wrong", [np.nan, -3.0, 255.0])
def test_what_is_no_probability_is_refused(make_pairs: MakePairs, wrong: float) -> None:
    generator, predictions = prepare(make_pairs, 2)
    predictions[1, 0, 0] = wrong
    with pytest.raises(segment.SegmentError, match=r"predictions are \S+ to \S+: expected prob"):
        segment.results(generator, predictions)


def test_a_threshold_in_per_cent_is_refused(make_pairs: MakePairs) -> None:
    generator, predictions = prepare(make_pairs, 2)
    with pytest.raises(segment.SegmentError, match="threshold is 30: expected a probability"):
        segment.results(generator, with_threshold(predictions, 30))


def test_notes_of_any_kind_are_written(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator, predictions = prepare(make_pairs, 2)
    notes = {"rate": np.float32(0.5), "folder": tmp_path}
    segment.results(generator, predictions, output_dir=tmp_path, notes=notes)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rate"], summary["folder"]) == ("0.5", str(tmp_path))


def test_figures_that_nobody_sees_are_not_drawn(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, predictions = prepare(make_pairs)
    monkeypatch.setattr(segment, "plot_dice_histogram", None)
    assert len(segment.results(generator, predictions)) == 5
    with pytest.raises(TypeError):  # in a folder they are seen
        segment.results(generator, predictions, output_dir=tmp_path)
