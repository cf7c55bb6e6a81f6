"""The check of the files before a training."""

from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment


def found(pairs: segment.Pairs) -> list[tuple[str, str]]:
    """Severity and sentence of each finding, the folder left out."""
    folder = str(Path(pairs[0][0]).parents[1])
    return [(f.severity, f.what.replace(folder, "")) for f in segment.check_pairs(*pairs)]


def test_nothing_is_wrong_with_good_pairs(make_pairs: MakePairs) -> None:
    assert found(make_pairs(4)) == []


def test_files_that_cannot_be_used_are_all_listed_errors_first(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(6)
    Path(images[0]).write_bytes(Path(images[0]).read_bytes()[:500])
    Path(images[1]).write_bytes(b"")
    Path(images[2]).unlink()
    Image.new("L", (40, 56)).save(masks[3])
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(masks[4])
    findings = found(pairs)
    assert [severity for severity, _ in findings] == ["error"] * 5
    for (_, what), message in zip(
        findings,
        (
            "/images/ISIC_0000000.png: cannot be read", "/images/ISIC_0000001.png: cannot be read",
            "/images/ISIC_0000002.png: there is no such", "/images/ISIC_0000003.png is 40 × 56",
            "/masks/ISIC_0000004_segmentation.png: expected a mask of 0 and 255",
        ),
        strict=True,
    ):  # fmt: skip
        assert what.startswith(message)


def test_both_files_of_a_pair_are_told(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(1)
    for path in (images[0], masks[0]):
        Path(path).write_bytes(b"nothing")
    assert [what.split(":")[0] for _, what in found(pairs)] == [
        "/images/ISIC_0000000.png", "/masks/ISIC_0000000_segmentation.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([(0, 9)], "is full"),
        ([(3, 5)], None),
        ([(1, 3), (5, 7)], "has 2 regions"),
        ([(0, 3), (5, 9)], "has 2 regions"),
    ],
)
def test_masks_no_expert_would_draw_are_warned_of(
    make_pairs: MakePairs, rows: list[tuple[int, int]], what: str | None
) -> None:
    pairs = make_pairs(1, (9, 9))
    mask: np.ndarray = np.zeros((9, 9), np.uint8)
    for start, end in rows:
        mask[start:end] = 255
    Image.fromarray(mask).save(pairs[1][0])
    expected = [f"/masks/ISIC_0000000_segmentation.png: the mask {what}."] if what else []
    assert found(pairs) == [("warning", sentence) for sentence in expected]


def test_a_ring_has_a_hole_and_an_inverted_mask_is_suspected(make_pairs: MakePairs) -> None:
    pairs = make_pairs(1, (9, 9))
    mask: np.ndarray = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 255
    mask[4, 4] = 0
    Image.fromarray(mask).save(pairs[1][0])
    assert [what.split(": ")[1] for _, what in found(pairs)] == ["the mask has holes (1)."]
    Image.fromarray(255 - mask).save(pairs[1][0])
    assert "the mask seems to be inverted" in found(pairs)[0][1]


def test_the_same_image_twice_and_a_wrong_suffix_are_warned_of(make_pairs: MakePairs) -> None:
    pairs = images, _ = make_pairs(3)
    Path(images[2]).write_bytes(Path(images[0]).read_bytes())
    picture = Image.open(images[1]).convert("RGB")
    picture.save(images[1], format="JPEG")
    assert sorted(what for _, what in found(pairs)) == [
        "/images/ISIC_0000001.png: the file is a JPEG, whatever its name says.",
        "/images/ISIC_0000002.png: the same image as /images/ISIC_0000000.png.",
    ]


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(1)
    Image.new("1", (20_000, 20_000)).save(images[0])
    ((severity, what),) = found((images, masks))
    assert severity == "error"
    assert "cannot be read as an image (Image size (400000000 pixels)" in what


def test_files_without_a_known_suffix_are_checked_too(make_pairs: MakePairs) -> None:
    (image,), (mask,) = make_pairs(1)
    plain = Path(image).rename(Path(image).with_suffix(""))
    assert segment.check_pairs([plain], [mask]) == []
