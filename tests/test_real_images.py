"""What only real ISIC images can show; skipped where they are absent."""

from pathlib import Path

import numpy as np
import pytest
from conftest import folders
from PIL import Image

import segment

pytestmark = pytest.mark.real


def test_the_official_folders_pair_up(isic_2017: Path) -> None:
    images, masks = segment.find_image_pairs(*folders(isic_2017))
    assert len(images) == len(masks) == 1974
    assert [*map(segment.image_id, images)] == [*map(segment.image_id, masks)]


def test_native_lesions_keep_their_area_in_the_frame(isic_2017: Path) -> None:
    _, masks = segment.find_image_pairs(*folders(isic_2017, native=True))
    for frame in ((128, 128), (192, 256), (256, 256)):
        changes = []
        for path in masks:
            whole = segment.load_segmented_image(path, None)
            _, _, height, width = segment.letterbox(whole.shape[:2], frame)
            area = segment.load_segmented_image(path, frame).sum() / (height * width)
            changes.append(area / whole.mean() - 1)
        assert np.abs(changes).max() < 0.02
        assert np.abs(changes).mean() < 0.005


def test_native_masks_resized_to_the_frame_and_restored_are_the_same(isic_2017: Path) -> None:
    images, masks = segment.find_image_pairs(*folders(isic_2017, native=True))
    generator = segment.create_generator(images, masks)
    frames = np.stack([segment.load_segmented_image(path) for path in masks]).astype(np.float32)
    for path, restored in zip(masks, segment.restore_masks(generator, frames), strict=True):
        truth = segment.load_segmented_image(path, None)[..., 0]
        assert segment.score_masks(truth, restored)["dice"] > 0.97


def test_native_images_load_as_if_decoded_whole(isic_2017: Path) -> None:
    images, _ = segment.find_image_pairs(*folders(isic_2017, native=True))
    differences = []
    for path in images:
        top, left, height, width = segment.letterbox(segment._size_of(path), (256, 256))
        loaded = segment.load_input_image(path)[top : top + height, left : left + width]
        with Image.open(path) as image:
            whole = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        differences.append(np.abs(loaded.astype(int) - np.asarray(whole)).mean())
    assert np.mean(differences) < 0.5


def test_the_native_sizes_are_counted(isic_2017: Path) -> None:
    images, _ = segment.find_image_pairs(*folders(isic_2017, native=True))
    sizes = segment.inspect(images)
    assert (len(sizes), sum(sizes.values())) == (22, 29)
    assert min(sizes) == (542, 718)
