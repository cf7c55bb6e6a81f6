"""Distances between the outlines of two masks."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import segment

repeatable = functools.partial(settings, deadline=None, derandomize=True, database=None)


def mask(*rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def outline(mask: np.ndarray) -> list[tuple[int, int]]:
    lesion = set(zip(*map(list, np.nonzero(mask)), strict=True))
    around = ((-1, 0), (1, 0), (0, -1), (0, 1))
    return [(y, x) for y, x in lesion if any((y + i, x + j) not in lesion for i, j in around)]


def by_brute_force(truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """The distances of not empty masks by comparing every pixel with every other."""
    a, b = outline(truth), outline(prediction)
    there = [min(math.dist(p, q) for q in b) for p in a]
    back = [min(math.dist(p, q) for q in a) for p in b]
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    percent = 100 / math.dist((0, 0), truth.shape)
    return {"hd95": percent * hd95, "assd": percent * sum(there + back) / len(there + back)}


@repeatable(max_examples=300)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 0.9])
)
def test_small_masks_are_measured_as_by_brute_force(
    height: int, width: int, seed: int, density: float
) -> None:
    truth, prediction = np.random.default_rng(seed).random((2, height, width)) < density
    truth[height // 2, width // 2] = prediction[0, 0] = True
    measured = segment.boundary_distances(truth, prediction)
    assert measured == pytest.approx(by_brute_force(truth, prediction))


def test_two_pixels_are_as_far_apart_as_a_ruler_says() -> None:
    measured = segment.boundary_distances(mask("#..", "...", "..."), mask("...", "...", ".#."))
    assert measured == pytest.approx(dict.fromkeys(("hd95", "assd"), 100 * math.sqrt(5 / 18)))


def test_hd95_is_the_larger_directed_percentile_and_assd_the_mean_of_all_distances() -> None:
    dot, line = mask("#....", "....."), mask("#####", ".....")
    percent = 100 / math.hypot(2, 5)
    # From the line to the dot 0 1 2 3 4, whose 95th percentile is 3.8; from the dot to the line 0.
    expected = {"hd95": 3.8 * percent, "assd": 10 / 6 * percent}
    assert segment.boundary_distances(dot, line) == pytest.approx(expected)
    assert segment.boundary_distances(line, dot) == pytest.approx(expected)


def test_only_the_outline_counts_and_neighbours_at_a_corner_do_not() -> None:
    square = mask("#####", "#####", "#####", "#####", "#####")
    hole = mask("#####", "#####", "##.##", "#####", "#####")
    corner = mask(".####", "#####", "#####", "#####", "#####")
    percent = 100 / math.hypot(5, 5)
    # The hole adds its four neighbours, each 1 from the ring of 16 pixels.
    assert segment.boundary_distances(square, hole)["assd"] == pytest.approx(4 / 36 * percent)
    # The corner is 1 from the ring without it, to which the pixel inside it does not belong.
    assert segment.boundary_distances(square, corner)["assd"] == pytest.approx(1 / 31 * percent)


def test_shared_frame_edges_count_as_agreement() -> None:
    full = np.ones((5, 5), bool)
    assert segment.boundary_distances(full, full) == {"hd95": 0, "assd": 0}
    short = np.pad(np.ones((5, 4), bool), ((0, 0), (0, 1)))
    # 5 of the 16 pixels of one ring and 3 of the 14 of the other are 1 apart, all others 0.
    percent = 100 / math.hypot(5, 5)
    expected = {"hd95": percent, "assd": 8 / 30 * percent}
    assert segment.boundary_distances(full, short) == pytest.approx(expected)


def test_an_empty_mask_is_0_from_an_empty_one_and_100_from_any_other() -> None:
    empty, dot = mask("...", "..."), mask("...", ".#.")
    assert segment.boundary_distances(empty, empty) == {"hd95": 0, "assd": 0}
    worst = {"hd95": 100, "assd": 100}
    assert segment.boundary_distances(empty, dot) == worst
    assert segment.boundary_distances(dot, empty) == worst
    ends = segment.boundary_distances(np.eye(1, 99), np.eye(1, 99, 98))
    assert 98 < ends["hd95"] < 100  # no two lesions are that far apart


def test_the_distances_are_the_same_at_any_resolution() -> None:
    y, x = np.ogrid[-1:1:200j, -1.5:1.5:300j]
    disks = np.hypot(y, x) < 0.6, np.hypot(y, x - 0.2) < 0.7
    larger = (np.kron(disk, np.ones((3, 3))) for disk in disks)
    small, large = segment.boundary_distances(*disks), segment.boundary_distances(*larger)
    assert large == pytest.approx(small, rel=0.02)
    assert small["hd95"] == pytest.approx(100 * 0.3 / math.hypot(2, 3), rel=0.03)


def test_masks_of_a_generator_are_measured_and_other_input_is_refused() -> None:
    dot, line = np.eye(1, 4, dtype=np.uint8), np.ones((1, 4), np.uint8)
    measured = segment.boundary_distances(dot[..., None], line[..., None])
    assert measured == segment.boundary_distances(dot, line) == by_brute_force(dot, line)
    with pytest.raises(segment.SegmentError, match=r"shapes \(1, 4\) and \(4, 1\)"):
        segment.boundary_distances(dot, dot.T)
    with pytest.raises(segment.SegmentError, match="prediction holds values of 0 to 255"):
        segment.boundary_distances(dot, dot * 255)


def test_the_scores_hold_the_distances_of_the_masks_that_are_written(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator = segment.create_generator(*make_pairs(2, (90, 120)), image_size=(64, 64))
    predictions = np.zeros((2, 64, 64, 1))
    predictions[0, 20:40, 10:50] = 1
    scores = segment.results(generator, predictions, output_dir=tmp_path)
    truth = segment.load_segmented_image(str(generator.pairs[0][1]), None)[..., 0]
    written = np.asarray(Image.open(tmp_path / "masks" / "ISIC_0000000_segmentation.png")) > 0
    expected = by_brute_force(truth, written)
    assert {name: scores[0][name] for name in segment.DISTANCES} == pytest.approx(expected)
    assert (scores[1]["hd95"], scores[1]["assd"]) == (100, 100)
    assert list(scores[0])[6:10] == ["accuracy", "hd95", "assd", "estimated_dice"]


def test_large_distances_are_the_bad_tail(
    make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = segment.create_generator(*make_pairs(4), image_size=(64, 64))
    predictions = np.concatenate([generator[0][1]] * 1).astype(float)
    predictions[0, :, :32], predictions[1] = 0, 0
    scores = segment.results(generator, predictions)
    hd95 = [score["hd95"] for score in scores]
    numbers = np.mean(hd95), np.median(hd95), np.percentile(hd95, 90), max(hd95)
    row = "".join(f"{number:11.6f}" for number in numbers)
    assert f"\nhd95 %             {row}  " in capsys.readouterr().out
