"""The embedded sample and the script that draws it."""

from pathlib import Path

import numpy as np
import pytest
from make_sample import FIRST_ID, draw_pair, main
from PIL import Image
from scipy import ndimage

import segment

SAMPLE = Path(__file__).parents[1] / "images" / "sample"


def test_the_sample_has_64_pairs_with_ids_above_those_of_the_challenges() -> None:
    images, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    assert len(images) == len(masks) == 64
    ids = [segment.image_id(path) for path in images]
    assert ids == [f"ISIC_{number}" for number in range(9_200_000, 9_200_064)]
    assert "synthetic" in (SAMPLE / "README.txt").read_text()


def test_the_sample_is_small_and_varied() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*.*")) < 2_000_000
    images, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    sizes = segment.inspect(images)
    assert len(sizes) >= 6
    assert any(height > width for height, width in sizes)
    areas = [segment.load_segmented_image(path, None).mean() for path in masks]
    assert min(areas) < 0.05
    assert max(areas) > 0.35


def test_every_lesion_is_one_region_without_holes() -> None:
    _, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    for path in masks:
        with Image.open(path) as mask:
            assert mask.mode == "L"
            levels = np.asarray(mask)
        assert set(np.unique(levels)) == {0, 255}
        assert ndimage.label(levels)[1] == 1
        np.testing.assert_array_equal(ndimage.binary_fill_holes(levels), levels > 0)


@pytest.mark.parametrize("index", [0, 31, 63])
def test_drawing_a_pair_again_reproduces_the_shipped_pair(index: int) -> None:
    image, mask = draw_pair(2017, index)
    name = f"ISIC_{FIRST_ID + index}"
    shipped = segment.load_segmented_image(SAMPLE / "truth" / f"{name}_segmentation.png", None)
    np.testing.assert_array_equal(np.asarray(mask) > 0, shipped[..., 0])
    photograph = segment.load_input_image(SAMPLE / "input" / f"{name}.jpg", None)
    assert np.abs(np.asarray(image).astype(int) - photograph).mean() < 4


def test_the_script_writes_as_many_pairs_as_requested(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--count", "3", "--seed", "5"])
    images, _ = segment.find_image_pairs(tmp_path / "input", tmp_path / "truth")
    assert [Path(path).name for path in images] == [f"ISIC_920000{i}.jpg" for i in range(3)]
