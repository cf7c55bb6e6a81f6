"""Splitting pairs into training, validation and test sets by lesion."""

from pathlib import Path

import pytest
from conftest import MakePairs, draw_lesion
from PIL import Image, ImageDraw, ImageOps

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


def test_image_and_mask_stay_together_and_are_shuffled() -> None:
    for images, masks in segment.train_val_test_split(IMAGES, MASKS):
        assert [image[7:11] for image in images] == [mask[6:10] for mask in masks]
        assert images != sorted(images)


def test_the_seed_determines_the_split() -> None:
    first, again, other = (
        segment.train_val_test_split(IMAGES, MASKS, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_lists_passed_in_stay_unchanged() -> None:
    images, masks = list(IMAGES), list(MASKS)
    segment.train_val_test_split(images, masks)
    assert (images, masks) == (IMAGES, MASKS)


def test_a_fraction_of_zero_gives_no_pair_and_any_other_at_least_one() -> None:
    parts = segment.train_val_test_split(IMAGES[:10], MASKS[:10], val_split=0, test_split=0.03)
    assert [len(images) for images, _ in parts] == [9, 0, 1]
    parts = segment.train_val_test_split(IMAGES[:100], MASKS[:100], val_split=0, test_split=0.29)
    assert [len(images) for images, _ in parts] == [71, 0, 29]


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(segment.SegmentError, match="3 images came with 2 masks"):
        segment.train_val_test_split(IMAGES[:3], MASKS[:2])
    with pytest.raises(segment.SegmentError, match=r"val_split is 1\.5: expected a fraction"):
        segment.train_val_test_split(IMAGES, MASKS, val_split=1.5)
    with pytest.raises(segment.SegmentError, match="1 pairs are too few for a val_split of"):
        segment.train_val_test_split(IMAGES[:2], MASKS[:2])


def test_an_invalid_seed_is_refused() -> None:
    with pytest.raises(segment.SegmentError, match="seed is -1: expected"):
        segment.train_val_test_split(["a", "b"], ["c", "d"], seed=-1)


@pytest.fixture
def repeated(make_pairs: MakePairs, tmp_path: Path) -> segment.Pairs:
    """Eight lesions; the first also rotated, and mirrored, zoomed in and in other colours."""
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


def test_one_lesion_is_found_rotated_mirrored_zoomed_and_in_other_colours(
    repeated: segment.Pairs,
) -> None:
    (same,) = segment.find_same_lesions(*repeated)
    assert [segment.image_id(path)[-1] for path in same] == ["0", "8", "9"]


def test_the_images_of_one_lesion_stay_in_one_set(repeated: segment.Pairs) -> None:
    splits = set()
    for seed in range(10):
        parts = segment.train_val_test_split(*repeated, val_split=0.3, test_split=0.3, seed=seed)
        assert sorted(path for images, _ in parts for path in images) == repeated[0]
        holding = [any(path[-5] in "089" for path in images) for images, _ in parts]
        assert sum(holding) == 1
        splits.add(holding.index(True))
    assert len(splits) > 1  # not always in the training set


def test_set_sizes_are_exact_where_the_lesions_allow_it(repeated: segment.Pairs) -> None:
    sizes = set()
    for seed in range(10):
        parts = segment.train_val_test_split(*repeated, val_split=0.3, test_split=0.3, seed=seed)
        sizes.add(tuple(len(images) for images, _ in parts))
    assert sizes == {(5, 2, 3)}


def test_a_lesion_larger_than_a_set_is_drawn_whole_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        segment, "_group_lesions", lambda pairs, *_: [pairs[:3], pairs[3:5], pairs[5:]]
    )
    with pytest.warns(UserWarning, match="2 pairs are held out rather than 1: the images"):
        train, _, test = segment.train_val_test_split(
            IMAGES[:10], MASKS[:10], val_split=0, test_split=0.1
        )
    assert test == (IMAGES[3:5], MASKS[3:5])
    assert len(train[0]) == 8


def write_discs(folder: Path, count: int) -> segment.Pairs:
    """Images of the same plain shape, as several lesions have it."""
    images, masks = [], []
    for i in range(count):
        mask = Image.new("L", (64, 64))
        ImageDraw.Draw(mask).ellipse((12 + i % 3, 16, 44 + i % 3, 40), fill=255)
        for path, picture in ((f"{i}.png", ImageOps.invert(mask)), (f"{i}_m.png", mask)):
            picture.save(folder / path)
        images.append(str(folder / f"{i}.png"))
        masks.append(str(folder / f"{i}_m.png"))
    return images, masks


def test_a_plain_shape_of_many_images_is_not_one_lesion(tmp_path: Path) -> None:
    few = write_discs(tmp_path, 4)
    assert segment.find_same_lesions(*few) == [few[0]]
    assert segment.find_same_lesions(*write_discs(tmp_path, 12)) == []


def test_lesions_are_compared_in_the_frame_and_cache_that_are_given(
    repeated: segment.Pairs,
) -> None:
    cache, frame = segment.PairCache(), (48, 64)
    (same,) = segment.find_same_lesions(*repeated, image_size=frame, cache=cache)
    assert [segment.image_id(path)[-1] for path in same] == ["0", "8", "9"]
    kept = 10 * 4 * frame[0] * frame[1]
    assert cache.bytes_left == 2**31 - kept
    segment.train_val_test_split(*repeated, image_size=frame, cache=cache)
    assert cache.bytes_left == 2**31 - kept


def test_unreadable_files_are_not_grouped() -> None:
    assert segment.find_same_lesions(IMAGES[:20], MASKS[:20]) == []
    assert segment.find_same_lesions(IMAGES[:1], MASKS[:1]) == []


def test_a_wrong_size_is_refused_rather_than_no_lesion_found_twice(make_pairs: MakePairs) -> None:
    with pytest.raises(segment.SegmentError, match="image_size is 256"):
        segment.find_same_lesions(*make_pairs(2), image_size=256)  # type: ignore[arg-type]
