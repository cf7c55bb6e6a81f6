"""Checking the files before a training."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment


def found(
    pairs: segment.Pairs, image_sizes: Sequence[segment.Size] = (segment.IMAGE_SIZE,)
) -> list[tuple[str, str]]:
    """Severity and sentence of each finding, without the folder."""
    folder = str(Path(pairs[0][0]).parents[1])
    findings = segment.check_pairs(*pairs, image_sizes=image_sizes)
    return [(finding.severity, finding.what.replace(folder, "")) for finding in findings]


def test_good_pairs_have_no_findings(make_pairs: MakePairs) -> None:
    assert found(make_pairs(4)) == []


def test_all_unusable_files_are_reported_before_the_warnings(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(6)
    Path(images[0]).write_bytes(Path(images[0]).read_bytes()[:500])
    Path(images[1]).write_bytes(b"")
    Path(images[2]).unlink()
    Image.new("L", (40, 56), 255).save(masks[3])
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(masks[4])
    Image.new("L", (56, 40), 255).save(masks[5])
    findings = found(pairs)
    assert [severity for severity, _ in findings] == ["error"] * 5 + ["warning"]
    assert findings.pop()[1] == "/masks/ISIC_0000005_segmentation.png: the mask is full."
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


def test_a_pair_with_errors_gets_one_finding(make_pairs: MakePairs) -> None:
    images, masks = pairs = make_pairs(2)
    for path in (images[0], masks[0], masks[1]):
        Path(path).write_bytes(b"nothing")
    findings = segment.check_pairs(*pairs)
    assert [finding.path for finding in findings if finding.severity == "error"] == images
    assert findings[0].what.startswith(f"{images[0]}: cannot be read as an image")
    assert findings[1].what.startswith(f"{masks[1]}: cannot be read as an image")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([(0, 9)], "is full"),
        ([(3, 5)], None),
        ([(1, 3), (5, 7)], "has 2 regions"),
        ([(0, 3), (5, 9)], "has 2 regions"),
    ],
)
def test_masks_that_no_expert_would_draw_are_reported(
    make_pairs: MakePairs, rows: list[tuple[int, int]], what: str | None
) -> None:
    pairs = make_pairs(1, (9, 9))
    mask: np.ndarray = np.zeros((9, 9), np.uint8)
    for start, end in rows:
        mask[start:end] = 255
    Image.fromarray(mask).save(pairs[1][0])
    expected = [f"/masks/ISIC_0000000_segmentation.png: the mask {what}."] if what else []
    assert found(pairs) == [("warning", sentence) for sentence in expected]


def test_holes_and_an_inverted_mask_are_reported(make_pairs: MakePairs) -> None:
    pairs = make_pairs(1, (9, 9))
    mask: np.ndarray = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 255
    mask[4, 4] = 0
    Image.fromarray(mask).save(pairs[1][0])
    assert [what.split(": ")[1] for _, what in found(pairs)] == ["the mask has holes (1)."]
    Image.fromarray(255 - mask).save(pairs[1][0])
    assert [what.split(": ")[1] for _, what in found(pairs)] == [
        "the mask is probably inverted, since its border is lesion.",
        "the mask has 2 regions.",
        "the mask has holes (1).",
    ]


def test_duplicates_and_a_wrong_suffix_are_reported(make_pairs: MakePairs) -> None:
    pairs = images, masks = make_pairs(3)
    Path(images[2]).write_bytes(Path(images[0]).read_bytes())
    Path(masks[2]).write_bytes(Path(masks[0]).read_bytes())
    Image.open(images[1]).convert("RGB").save(images[1], format="JPEG")
    assert [what for _, what in found(pairs)] == [
        "/images/ISIC_0000001.png: the suffix says PNG, but the file is a JPEG.",
        "/images/ISIC_0000002.png: a duplicate of the image /images/ISIC_0000000.png.",
        "/masks/ISIC_0000002_segmentation.png: a duplicate of the mask "
        "/masks/ISIC_0000000_segmentation.png.",
    ]


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (20_000, "cannot be read as an image (Image size (400000000 pixels)"),
        (8_200, "has 67240000 pixels, but the limit is 67108864"),
    ],
)
def test_an_image_of_absurd_size_is_an_error(make_pairs: MakePairs, side: int, reason: str) -> None:
    images, masks = make_pairs(1)
    Image.new("1", (side, side)).save(images[0])
    errors = [what for severity, what in found((images, masks)) if severity == "error"]
    assert reason in errors[0]


def test_an_unusual_format_and_mode_of_one_file_are_both_reported(make_pairs: MakePairs) -> None:
    (image,), (mask,) = pairs = make_pairs(1)
    Image.open(image).convert("CMYK").save(image, format="JPEG")
    Image.open(mask).convert("RGB").save(mask, format="TIFF")
    assert found(pairs) == [
        ("warning", f"{path}: {what}.")
        for path, what in (
            ("/images/ISIC_0000000.png", "the suffix says PNG, but the file is a JPEG"),
            ("/images/ISIC_0000000.png", "the mode is CMYK, where RGB is usual"),
            ("/masks/ISIC_0000000_segmentation.png", "the suffix says PNG, but the file is a TIFF"),
            ("/masks/ISIC_0000000_segmentation.png", "the mode is RGB, where L is usual"),
        )
    ]


def test_a_lesion_that_vanishes_in_the_first_frame_is_reported_as_empty(
    make_pairs: MakePairs,
) -> None:
    pairs = make_pairs(1, (400, 200))
    mask: np.ndarray = np.zeros((400, 200), np.uint8)
    mask[101:103, 101:103] = 255
    Image.fromarray(mask).save(pairs[1][0])
    assert found(pairs, [(400, 400), (40, 40)]) == []
    assert [what.split(": ")[1] for _, what in found(pairs, [(40, 40), (400, 400)])] == [
        "the mask is empty at 40 × 20 pixels."
    ]


def test_files_that_cannot_be_opened_are_not_duplicates_of_each_other(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = pairs = make_pairs(2)
    Path(images[1]).write_bytes(Path(images[0]).read_bytes())

    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert found(pairs) == []


def test_images_are_checked_without_masks(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(2)
    Path(images[1]).write_bytes(b"nothing")
    (finding,) = segment.check_pairs(images)
    assert (finding.severity, finding.path) == ("error", images[1])
    assert finding.what.startswith(f"{images[1]}: cannot be read as an image")


def test_an_invalid_frame_is_refused() -> None:
    with pytest.raises(segment.SegmentError, match="image_size is 0: expected"):
        segment.check_pairs(["a.png"], image_sizes=[0])  # type: ignore[list-item]


def test_files_without_a_suffix_are_checked(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    plain = [Path(image).rename(Path(image).with_suffix("")) for image in images]
    assert segment.check_pairs(plain, masks) == []
    plain[1].write_bytes(b"nothing")
    assert [finding.path for finding in segment.check_pairs(plain, masks)] == [str(plain[1])]


def test_all_unusable_pairs_are_listed_in_one_error(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(4)
    for path in (images[1], masks[3]):
        Path(path).write_bytes(b"nothing")
    with pytest.raises(segment.SegmentError) as refused:
        segment.usable_pairs(images, masks)
    title, *listed = str(refused.value).split("\n")
    assert title.startswith("2 of 4 images cannot be used: fix the files, or leave them out with ")
    assert [line.split(": ")[0] for line in listed] == [f"  {images[1]}", f"  {masks[3]}"]


def test_skip_bad_leaves_unusable_pairs_out_with_a_warning(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(4)
    Path(masks[1]).write_bytes(b"nothing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = segment.usable_pairs(images, masks, skip_bad=True)
    assert used[:2] == (images[:1] + images[2:], masks[:1] + masks[2:])
    assert [(f.severity, f.path) for f in used[2]] == [("error", images[1])]
    (warning,) = caught
    assert str(warning.message).startswith(f"left out: {masks[1]}: cannot be read")


def test_no_usable_pair_at_all_is_an_error_even_with_skip_bad(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    for path in images:
        Path(path).write_bytes(b"nothing")
    with pytest.raises(segment.SegmentError, match=r"None of the images can be used.*\n.*\n"):
        segment.usable_pairs(images, masks, skip_bad=True)


def test_unusual_pairs_are_used_with_a_warning(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    Image.new("L", (56, 40), 255).save(masks[1])
    with pytest.warns(UserWarning, match=r"ISIC_0000001_segmentation\.png: the mask is full"):
        assert segment.usable_pairs(images, masks)[:2] == (images, masks)


def test_images_without_masks_are_usable_without_masks(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(3)
    Path(images[0]).write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="left out: "):
        used = segment.usable_pairs(images, [], skip_bad=True, image_sizes=[(16, 16)])
    assert used[:2] == (images[1:], [])
    assert [(f.severity, f.path) for f in used[2]] == [("error", images[0])]
