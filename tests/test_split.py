"""Splitting pairs into training, validation and test set, the images of one lesion together."""

from pathlib import Path

import pytest
from conftest import MakePairs, draw_lesion
from PIL import Image, ImageOps

import segment

IMAGES = [f"images/{i:04}.jpg" for i in range(2594)]
MASKS = [f"masks/{i:04}.png" for i in range(2594)]


def test_2594_pairs_become_2014_503_and_77() -> None:
    parts = segment.train_val_test_split(IMAGES, MASKS, val_split=0.2, test_split=0.03)
    assert [len(images) for images, _ in parts] == [2014, 503, 77]


def test_every_pair_is_in_exactly_one_set() -> None:
    parts = segment.train_val_test_split(IMAGES, MASKS)
    assert sorted(image for images, _ in parts for image in images) == IMAGES
    assert sorted(mask for _, masks in parts for mask in masks) == MASKS


def test_image_and_mask_stay_together_and_are_mixed() -> None:
    for images, masks in segment.train_val_test_split(IMAGES, MASKS):
        assert [image[7:11] for image in images] == [mask[6:10] for mask in masks]
        assert images != sorted(images)


def test_the_seed_decides() -> None:
    first, again, other = (
        segment.train_val_test_split(IMAGES, MASKS, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_callers_lists_are_untouched() -> None:
    images, masks = list(IMAGES), list(MASKS)
    segment.train_val_test_split(images, masks)
    assert (images, masks) == (IMAGES, MASKS)


def test_a_share_of_zero_leaves_a_set_empty_and_a_small_one_gets_a_pair() -> None:
    parts = segment.train_val_test_split(IMAGES[:10], MASKS[:10], val_split=0, test_split=0.03)
    assert [len(images) for images, _ in parts] == [9, 0, 1]


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(segment.SegmentError, match="3 images came with 2 masks"):
        segment.train_val_test_split(IMAGES[:3], MASKS[:2])
    with pytest.raises(segment.SegmentError, match=r"val_split is 1\.5: expected a share"):
        segment.train_val_test_split(IMAGES, MASKS, val_split=1.5)
    with pytest.raises(segment.SegmentError, match="2 pairs are too few"):
        segment.train_val_test_split(IMAGES[:2], MASKS[:2])


def test_a_seed_that_is_none_is_refused() -> None:
    with pytest.raises(segment.SegmentError, match="seed is -1: expected"):
        segment.train_val_test_split(["a", "b"], ["c", "d"], seed=-1)


@pytest.fixture
def repeated(make_pairs: MakePairs, tmp_path: Path) -> segment.Pairs:
    """Eight lesions; the first is also there turned, and mirrored, nearer and in other colours."""
    make_pairs(8, size=(150, 200))
    for number, turn, box in ((8, 130, None), (9, -40, (20, 15, 180, 135))):
        for folder, picture, end in zip(
            ("images", "masks"), draw_lesion((150, 200), 0), ("", "_segmentation"), strict=True
        ):
            seen = picture.rotate(turn, fillcolor=(222, 180, 160) if not end else 0)
            if box is not None:
                seen = ImageOps.mirror(seen).resize((200, 150), box=box).convert(picture.mode)
                seen = seen.point(lambda level: level * 0.8) if not end else seen
            if end:
                seen = seen.point(lambda level: 255 * (level > 127))
            seen.save(tmp_path / "data" / folder / f"ISIC_{number:07}{end}.png")
    return segment.find_image_pairs(tmp_path / "data" / "images", tmp_path / "data" / "masks")


def test_one_lesion_is_found_turned_mirrored_nearer_and_in_other_colours(
    repeated: segment.Pairs,
) -> None:
    (same,) = segment.find_same_lesions(*repeated)
    assert [segment.image_id(path)[-1] for path in same] == ["0", "8", "9"]


def test_the_images_of_one_lesion_stay_on_one_side(repeated: segment.Pairs) -> None:
    torn = 0
    for seed in range(10):
        for group in (True, False):
            parts = segment.train_val_test_split(
                *repeated, val_split=0.3, test_split=0.3, seed=seed, group=group
            )
            assert sorted(path for images, _ in parts for path in images) == repeated[0]
            sides = sum(any(path[-5] in "089" for path in images) for images, _ in parts)
            assert sides == 1 or not group
            torn += sides > 1
    assert torn > 5  # without groups


def test_sizes_are_exact_where_the_lesions_allow_it(repeated: segment.Pairs) -> None:
    sizes = set()
    for seed in range(10):
        parts = segment.train_val_test_split(*repeated, val_split=0.3, test_split=0.3, seed=seed)
        sizes.add(tuple(len(images) for images, _ in parts))
    assert sizes == {(5, 2, 3)}


def test_a_share_above_zero_gets_a_lesion_though_it_be_larger_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment, "_number_lesions", lambda pairs: [0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    with pytest.warns(UserWarning, match="2 pairs are put aside rather than 1"):
        train, _, test = segment.train_val_test_split(
            IMAGES[:10], MASKS[:10], val_split=0, test_split=0.1
        )
    assert test == (IMAGES[3:5], MASKS[3:5])
    assert len(train[0]) == 8


def test_plain_shapes_are_not_taken_for_one_lesion(tmp_path: Path) -> None:
    images, masks = [], []
    for i in range(12):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (20 - i, 20, 44 + i, 44))
        for path, picture in ((f"{i}.png", ImageOps.invert(mask)), (f"{i}_m.png", mask)):
            picture.save(tmp_path / path)
        images.append(str(tmp_path / f"{i}.png"))
        masks.append(str(tmp_path / f"{i}_m.png"))
    assert max(map(len, segment.find_same_lesions(images, masks) or [[]])) <= 5


def test_files_that_cannot_be_read_are_like_no_other() -> None:
    assert segment.find_same_lesions(IMAGES[:20], MASKS[:20]) == []
    assert segment.find_same_lesions(IMAGES[:1], MASKS[:1]) == []
