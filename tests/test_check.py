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
    Image.new("L", (40, 56), 255).save(masks[3])
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(masks[4])
    findings = found(pairs)
    assert [severity for severity, _ in findings] == ["error"] * 5 + ["warning"]
    assert findings.pop()[1] == "/masks/ISIC_0000003_segmentation.png: the mask is full."
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


@pytest.mark.parametrize(
    ("side", "told"),
    [
        (20_000, "cannot be read as an image (Image size (400000000 pixels)"),
        (8_200, "has 67240000 pixels, but no photograph of skin has more"),
    ],
)
def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(
    make_pairs: MakePairs, side: int, told: str
) -> None:
    images, masks = make_pairs(1)
    Image.new("1", (side, side)).save(images[0])
    errors = [what for severity, what in found((images, masks)) if severity == "error"]
    assert told in errors[0]


def test_every_fault_of_a_pair_is_told(make_pairs: MakePairs) -> None:
    (image,), (mask,) = pairs = make_pairs(1)
    Image.new("CMYK", (30, 20)).save(image, format="JPEG")
    Image.fromarray(np.arange(2240).reshape(40, 56).astype(np.uint8)).save(mask, format="TIFF")
    text = "\n".join(": ".join(finding) for finding in found(pairs))
    for what in (
        "error: /masks/ISIC_0000000_segmentation.png: expected a mask of 0 and 255",
        "error: /images/ISIC_0000000.png is 20 × 30 (height × width), but its mask",
        "warning: /images/ISIC_0000000.png: the file is a JPEG, whatever its name says",
        "warning: /images/ISIC_0000000.png: the mode is CMYK, where RGB is usual",
    ):
        assert what in text


def test_a_lesion_of_four_pixels_in_four_million_is_not_called_empty(make_pairs: MakePairs) -> None:
    pairs = make_pairs(1, (2000, 2000))
    mask: np.ndarray = np.zeros((2000, 2000), np.uint8)
    mask[1001:1003, 1001:1003] = 255
    Image.fromarray(mask).save(pairs[1][0])
    assert found(pairs) == []
    Image.fromarray(255 - mask).save(pairs[1][0])
    assert [what.split(": ")[1] for _, what in found(pairs)] == [
        "the mask seems to be inverted, since its rim is lesion.", "the mask has holes (1).",
    ]  # fmt: skip


def test_the_same_mask_twice_is_warned_of_and_a_file_that_cannot_be_read_is_like_no_other(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = _, masks = make_pairs(2)
    Path(masks[1]).write_bytes(Path(masks[0]).read_bytes())
    assert [what for _, what in found(pairs)] == [
        "/masks/ISIC_0000001_segmentation.png: the same mask as "
        "/masks/ISIC_0000000_segmentation.png."
    ]

    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert found(pairs) == []


def test_images_are_checked_without_masks_and_a_frame_that_is_none_is_refused(
    make_pairs: MakePairs,
) -> None:
    images, masks = make_pairs(2)
    Path(images[1]).write_bytes(b"nothing")
    (finding,) = segment.check_pairs(images)
    assert finding.severity == "error"
    assert finding.what.startswith(f"{images[1]}: cannot be read as an image")
    with pytest.raises(segment.SegmentError, match="image_size is 0: expected"):
        segment.check_pairs(images, masks, image_size=0)  # type: ignore[arg-type]


def test_files_without_a_known_suffix_are_checked_too(make_pairs: MakePairs) -> None:
    (image,), (mask,) = make_pairs(1)
    plain = Path(image).rename(Path(image).with_suffix(""))
    assert segment.check_pairs([plain], [mask]) == []
