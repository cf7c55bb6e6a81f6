"""The scores of two runs, compared image by image."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs
from scipy import stats

import segment

FRAME = (64, 64)
DICE = {"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.25, "e": 1.0}
OTHER = {"e": 0.875, "c": 0.7, "b": 0.75, "a": 0.8, "x": 0.1, "y": 0.2}


def rows(dice: dict[str, float]) -> list[dict[str, object]]:
    return [{"id": id_, "dice": value} for id_, value in dice.items()]


def test_images_are_paired_by_id_and_the_differences_counted() -> None:
    comparison = segment.compare_scores(rows(DICE), rows(OTHER))
    assert {name: comparison[name] for name in ("images", "wins", "ties", "losses")} == {
        "images": 4, "wins": 2, "ties": 1, "losses": 1,
    }  # fmt: skip
    assert comparison["unmatched"] == 3  # d of one run, x and y of the other
    assert comparison["mean_difference"] == pytest.approx((0.1 - 0.25 + 0 + 0.125) / 4)
    expected = {"b": -0.25, "e": 0.125, "a": 0.1, "c": 0}
    assert list(comparison["most_changed"]) == list(expected)
    assert comparison["most_changed"] == pytest.approx(expected)


def test_swapping_the_runs_flips_every_sign() -> None:
    there, back = (segment.compare_scores(*pair) for pair in (
        (rows(DICE), rows(OTHER)), (rows(OTHER), rows(DICE)))
    )  # fmt: skip
    assert back["mean_difference"] == -there["mean_difference"]
    assert (back["wins"], back["losses"]) == (there["losses"], there["wins"])
    assert back["wilcoxon_p"] == there["wilcoxon_p"]
    assert back["most_changed"] == {id_: -d for id_, d in there["most_changed"].items()}


def test_only_the_ten_largest_changes_are_listed() -> None:
    before = {str(i): 0.5 for i in range(30)}
    after = {id_: 0.5 + (-1) ** int(id_) * int(id_) / 100 for id_ in before}
    comparison = segment.compare_scores(rows(after), rows(before))
    assert list(comparison["most_changed"]) == [str(i) for i in range(29, 19, -1)]


def test_p_is_that_of_wilcoxon_and_1_if_nothing_changed() -> None:
    rng = np.random.default_rng(0)
    before = {str(i): float(dice) for i, dice in enumerate(rng.beta(9, 1.2, 40))}
    after = {id_: dice + float(rng.normal(0.01, 0.02)) for id_, dice in before.items()}
    comparison = segment.compare_scores(rows(after), rows(before))
    expected = stats.wilcoxon(list(after.values()), list(before.values())).pvalue
    assert comparison["wilcoxon_p"] == pytest.approx(expected)
    same = segment.compare_scores(rows(before), rows(before))
    assert (same["wilcoxon_p"], same["ties"], same["ci95"]) == (1, 40, [0, 0])


def test_the_interval_is_that_of_the_paired_differences_by_lesion() -> None:
    rng = np.random.default_rng(0)
    lesions = np.repeat(np.arange(12), 3)
    level, gain = rng.uniform(0.2, 0.8, 36), np.repeat(rng.normal(0.02, 0.02, 12), 3)
    scores = [
        {"id": str(i), "dice": level[i] + gain[i], "lesion": str(lesions[i])} for i in range(36)
    ]
    others = rows({str(i): level[i] for i in range(36)})
    means = rng.choice(gain[::3], (20_000, 12)).mean(1)  # narrow, whatever the levels are
    expected = np.percentile(means, (2.5, 97.5))
    interval = segment.compare_scores(scores, others)["ci95"]
    assert interval == pytest.approx(list(expected), abs=0.06 * np.ptp(expected))
    assert segment.compare_scores(scores[:3], others)["ci95"] is None  # of one lesion


def test_the_images_of_a_lesion_count_once_in_the_test_of_wilcoxon() -> None:
    rng = np.random.default_rng(0)
    gains = np.repeat(rng.normal(0.02, 0.05, 10), 4)
    scores = [{"id": str(i), "dice": 0.7 + gains[i], "lesion": str(i // 4)} for i in range(40)]
    others = rows({str(i): 0.7 for i in range(40)})
    p = segment.compare_scores(scores, others)["wilcoxon_p"]
    assert p == pytest.approx(stats.wilcoxon(gains[::4]).pvalue)
    assert p > 10 * stats.wilcoxon(gains).pvalue


def test_runs_without_a_common_image_or_without_masks_are_refused() -> None:
    blind = [{"id": "a", "estimated_dice": 0.5}]
    for others in (rows({"x": 0.5}), blind, []):
        with pytest.raises(segment.SegmentError, match="No image has a Dice in both"):
            segment.compare_scores(rows(DICE), others)
    with pytest.raises(segment.SegmentError, match="No image has a Dice in both"):
        segment.compare_scores(blind, rows(DICE))


Run = Callable[..., list[dict[str, object]]]


@pytest.fixture
def run(make_pairs: MakePairs, tmp_path: Path) -> Run:
    """Scores five lesions, of which the prediction misses a strip; writes and compares."""
    generator = segment.create_generator(*make_pairs(5, (90, 120)), image_size=FRAME)
    targets = generator[0][1].astype(float)

    def score(strip: int, name: str, compare: Path | None = None) -> list[dict[str, object]]:
        predictions = targets.copy()
        predictions[:, :, :strip] = 0
        others = segment.read_scores(compare) if compare else ()
        return segment.results(
            generator, iter(predictions), num_imgs=0, output_dir=tmp_path / name, compare=others
        )

    return score


def test_a_table_is_read_as_it_was_returned_and_as_text_it_compares_alike(
    run: Run, tmp_path: Path
) -> None:
    scores, others = run(20, "new"), run(30, "old")
    table = tmp_path / "new" / "scores.csv"
    assert segment.read_scores(table) == scores
    with open(table, newline="") as file:
        text = list(csv.DictReader(file))
    assert segment.compare_scores(text, others) == segment.compare_scores(scores, others)
    summary = segment.summarize(segment.read_scores(table))
    assert summary["dice"] == json.loads((table.parent / "summary.json").read_text())["dice"]
    saved_by_a_spreadsheet = tmp_path / "bom.csv"
    saved_by_a_spreadsheet.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert segment.read_scores(saved_by_a_spreadsheet) == scores


def test_results_print_and_write_the_comparison(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = run(30, "same")
    table = tmp_path / "same" / "scores.csv"
    capsys.readouterr()
    scores = run(20, "same", table)  # which replaces the table that it is compared with
    printed = capsys.readouterr().out
    comparison = json.loads((tmp_path / "same" / "summary.json").read_text())["comparison"]
    assert comparison == segment.compare_scores(scores, others)
    gains = [new["dice"] - old["dice"] for new, old in zip(scores, others, strict=True)]  # type: ignore[operator]
    low, high = comparison["ci95"]
    expected = f"Dice {np.mean(gains):+.6f} ({low:+.6f} to {high:+.6f}), p = "
    assert f"Compared with the other run: {expected}" in printed
    assert printed.endswith(
        f"{sum(g > 0 for g in gains)} better, {gains.count(0)} equal, 0 worse\n"
    )


def test_without_another_run_nothing_is_compared(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(20, "alone")
    assert "comparison" not in json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert "Compared" not in capsys.readouterr().out


HEADER = "id,dice,jaccard\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"id and dice \(\[Errno 2\] No such file"),
        ("epoch,loss\n1,0.5\n", r"expected a scores\.csv with id and dice"),
        ("id,estimated_dice\na,0.5\n", r"expected a scores\.csv with id and dice \('dice'\)"),
        ("id;dice\na;0,5\n", r"expected a scores\.csv"),
        (HEADER + "a,high,0.5\n", r"expected a scores\.csv .*'high'"),
        (HEADER + "a,0.5\n", r"expected a scores\.csv"),
        (HEADER + "a,0.5,0.4,0.3\n", r"expected a scores\.csv"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"expected a scores\.csv"),
        (HEADER + "a,0.5,0.4\nb,1,1\na,0.5,0.4\n", r"scores\.csv has 3 rows for 2 ids"),
        (HEADER + "a,0.5,0.4\nb,nan,1\n", r"scores\.csv has 2 rows for 1 ids"),
        (HEADER + "other,0.5,0.4\n", r"scores\.csv scores none of these 2 images"),
        ("", r"scores\.csv scores none of these 2 images"),
    ],
)
def test_a_table_that_cannot_be_compared_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    table = tmp_path / "scores.csv"
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(segment.SegmentError, match=message) as error:
        segment.read_scores(table, ["a", "b"])
    assert str(table) in str(error.value)


def test_images_without_masks_are_not_compared(run: Run, make_pairs: MakePairs) -> None:
    scores = run(20, "old")
    images, _ = make_pairs(5, folder="blind")
    generator = segment.create_generator(images, image_size=FRAME)
    untouched = iter(np.zeros((5, *FRAME, 1)))
    with pytest.raises(segment.SegmentError, match="This needs masks"):
        segment.results(generator, untouched, compare=scores)
    assert len(list(untouched)) == 5


def test_an_id_that_occurs_twice_is_not_compared() -> None:
    rows = [{"id": "x", "dice": 0.9}, {"id": "x", "dice": 0.1}]
    with pytest.raises(segment.SegmentError, match="have an id twice: expected one row"):
        segment.compare_scores(rows[:1], rows)
