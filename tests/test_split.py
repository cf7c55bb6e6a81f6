"""Splitting pairs into training, validation and test set."""

import pytest

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
