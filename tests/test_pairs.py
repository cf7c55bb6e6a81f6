"""Finding images and their masks."""

import os
from pathlib import Path

import pytest

import segment


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_isic_2016_folders_pair_by_id_despite_the_capital_s(tmp_path: Path) -> None:
    images = touch(tmp_path / "i", "ISIC_0000001.jpg", "ISIC_0000000.jpg")
    masks = touch(tmp_path / "m", "ISIC_0000000_Segmentation.png", "ISIC_0000001_Segmentation.png")
    found_images, found_masks = segment.find_image_pairs(images, masks)
    assert names(found_images) == ["ISIC_0000000.jpg", "ISIC_0000001.jpg"]
    assert names(found_masks) == ["ISIC_0000000_Segmentation.png", "ISIC_0000001_Segmentation.png"]


def test_isic_2016_part_3b_has_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    folder = touch(tmp_path, "ISIC_0000000.jpg", "ISIC_0000000_Segmentation.png")
    images, masks = segment.find_image_pairs(folder, folder)
    assert names(images + masks) == ["ISIC_0000000.jpg", "ISIC_0000000_Segmentation.png"]


def test_isic_2017_superpixels_and_tables_are_ignored(tmp_path: Path) -> None:
    others = ("ISIC_0000000_superpixels.png", "ISIC-2017_Training_Data_metadata.csv", ".DS_Store")
    images = touch(tmp_path / "i", "ISIC_0000000.jpg", *others)
    masks = touch(tmp_path / "m", "ISIC_0000000_segmentation.png")
    assert names(segment.find_image_pairs(images, masks)[0]) == ["ISIC_0000000.jpg"]


def test_isic_2018_licences_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    others = ("LICENSE.txt", "ATTRIBUTION.txt", "._ISIC_0000000.jpg")
    images = touch(tmp_path / "i", "ISIC_0000000.jpg", *others)
    masks = touch(tmp_path / "m", "ISIC_0000000_segmentation.png", "LICENSE.txt")
    assert names(segment.find_image_pairs(images, masks)[0]) == ["ISIC_0000000.jpg"]


def test_plain_folders_pair_by_stem_whatever_the_suffix(tmp_path: Path) -> None:
    images = touch(tmp_path / "i", "a.JPG", "b.jpeg", "c.BMP", "d.tif", "e.PNG")
    masks = touch(tmp_path / "m", "e.png", "d.png", "c.png", "b.png", "a_segmentation.PNG")
    found_images, found_masks = segment.find_image_pairs(images, masks)
    assert names(found_images) == ["a.JPG", "b.jpeg", "c.BMP", "d.tif", "e.PNG"]
    assert names(found_masks) == ["a_segmentation.PNG", "b.png", "c.png", "d.png", "e.png"]


def test_images_and_masks_of_another_order_pair_by_id(tmp_path: Path) -> None:
    images = touch(tmp_path / "i", "ISIC_0000002.JPG", "ISIC_0000010.jpg", "ISIC_0000001.png")
    ids = ("ISIC_0000010", "ISIC_0000001", "ISIC_0000002")
    masks = touch(tmp_path / "m", *(f"{id_}_segmentation.png" for id_ in ids))
    pairs = zip(*segment.find_image_pairs(images, masks), strict=True)
    stems = [(Path(image).stem, Path(mask).stem) for image, mask in pairs]
    assert stems == [(id_, f"{id_}_segmentation") for id_ in sorted(ids)]


def test_all_images_and_masks_without_a_partner_are_reported_together(tmp_path: Path) -> None:
    images = touch(tmp_path / "i", *(f"{i}.jpg" for i in range(1, 9)))
    masks = touch(tmp_path / "m", "8.png", "9.png")
    with pytest.raises(segment.SegmentError) as error:
        segment.find_image_pairs(images, masks)
    assert "images without a mask (7: 1, 2, 3, 4, 5 and 2 more)" in str(error.value)
    assert "masks without an image (1: 9)" in str(error.value)


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    images = touch(tmp_path / "i", "ISIC_0000000.jpg", "ISIC_0000000.png")
    masks = touch(tmp_path / "m", "ISIC_0000000_segmentation.png")
    message = r"ids that several files share \(1: ISIC_0000000: .*0\.jpg and .*0\.png and"
    with pytest.raises(segment.SegmentError, match=message):
        segment.find_image_pairs(images, masks)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match=r"empty holds no image"):
        segment.find_image_pairs(touch(tmp_path / "empty"), tmp_path)
    with pytest.raises(segment.SegmentError, match=r"missing is not a folder"):
        segment.find_image_pairs(tmp_path / "missing", tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(segment.SegmentError, match=r"names are not UTF-8: .*caf\\udce9.*\. Rename"):
        segment.find_image_pairs(tmp_path, tmp_path)


def test_images_without_masks_are_found_for_prediction(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "a_segmentation.png", "c_superpixels.png", ".d.png", "e.csv")
    assert names(segment.find_images(tmp_path)) == ["a.png", "b.JPG"]
    touch(tmp_path, "b.png")
    assert names(segment.find_images(tmp_path)) == ["a.png", "b.JPG", "b.png"]
    with pytest.raises(segment.SegmentError, match="holds only masks"):
        segment.find_images(touch(tmp_path / "masks", "a_segmentation.png"))
