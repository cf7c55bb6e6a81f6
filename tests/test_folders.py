"""Folders as people have them: other names, layouts, masks and sizes than those of ISIC."""

import csv
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import MakePairs, draw_lesion
from networks import tiny_network
from PIL import Image

import driver_load_evaluate
import driver_train_save_evaluate
import segment


def save(image: Image.Image, path: Path, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


def files(folder: Path, *names: str) -> list[str]:
    return [save(Image.new("RGB", (8, 8), (9 * i, 0, 0)), folder / n) for i, n in enumerate(names)]


def mask_array() -> np.ndarray:
    """Lesion in the middle of 20 x 30 pixels, 0 and 1."""
    mask: np.ndarray = np.zeros((20, 30), np.uint8)
    mask[6:13, 8:21] = 1
    return mask


def data(folder: Path) -> list[str]:
    images, masks = folder / "data" / "images", folder / "data" / "masks"
    return ["--image-dir", str(images), "--mask-dir", str(masks)]


def said(caught: list[warnings.WarningMessage]) -> str:
    return "\n".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "name",
    ["x_mask.png", "x-MASKS.png", "x.seg.png", "x_Segmentation.bmp", "x_lesion.png", "x.gt.tif",
     "x-label.png", "x_annotation.webp", "x_seg_mask.png"],
)  # fmt: skip
def test_the_usual_names_of_masks_are_recognised_in_both_uses(tmp_path: Path, name: str) -> None:
    image, mask = files(tmp_path, "x.jpg", name)
    assert segment.find_images(tmp_path) == [image]
    assert segment.find_image_pairs(tmp_path, tmp_path) == ([image], [mask])


def test_no_other_name_is_guessed(tmp_path: Path) -> None:
    files(tmp_path, "x.jpg", "x_outline.png", "mask_x.png")
    assert len(segment.find_images(tmp_path)) == 3
    with pytest.raises(segment.SegmentError, match=r"images without a mask \(3: mask_x, x, x_o"):
        segment.find_image_pairs(tmp_path, tmp_path)


def test_two_masks_of_one_image_are_an_error_that_shows_both(tmp_path: Path) -> None:
    files(tmp_path, "x.jpg", "x_mask.png", "x_seg.png")
    with pytest.raises(segment.SegmentError, match=r"x: \S+x.jpg and \S+x_mask.png and \S+x_seg.p"):
        segment.find_image_pairs(tmp_path, tmp_path)


def test_images_may_be_named_like_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    images = files(tmp_path / "i", "a_lesion.jpg", "b_lesion.jpg")
    masks = files(tmp_path / "m", "a_lesion_mask.png", "b_lesion_mask.png")
    assert segment.find_image_pairs(tmp_path / "i", tmp_path / "m") == (images, masks)


def test_ham10000_has_two_folders_of_images_and_one_of_masks(tmp_path: Path) -> None:
    ids = ["ISIC_0024306", "ISIC_0024307"]
    images = [*files(tmp_path / "HAM10000_images_part_1", f"{ids[0]}.jpg"),
              *files(tmp_path / "HAM10000_images_part_2", f"{ids[1]}.jpg")]  # fmt: skip
    masks = files(tmp_path / "masks", *(f"{id_}_segmentation.png" for id_ in ids))
    for mask_dir in (tmp_path / "masks", tmp_path):
        assert segment.find_image_pairs(tmp_path, mask_dir) == (images, masks)


def test_ph2_has_a_folder_for_every_file(tmp_path: Path) -> None:
    images, masks = list[str](), list[str]()
    for id_ in ("IMD002", "IMD003"):
        images += files(tmp_path / id_ / f"{id_}_Dermoscopic_Image", f"{id_}.bmp")
        masks += files(tmp_path / id_ / f"{id_}_lesion", f"{id_}_lesion.bmp")
        files(tmp_path / id_ / f"{id_}_roi", f"{id_}_R1_Label4.bmp")
    assert segment.find_image_pairs(tmp_path, tmp_path) == (images, masks)
    assert segment.find_images(tmp_path) == images


def test_masks_in_a_subfolder_of_the_images_belong_to_it(tmp_path: Path) -> None:
    images, masks = files(tmp_path, "a.jpg", "b.jpg"), files(tmp_path / "masks", "a.png", "b.png")
    assert segment.find_image_pairs(tmp_path, tmp_path / "masks") == (images, masks)
    below = files(tmp_path / "masks" / "photos", "a.jpg", "b.jpg")
    assert segment.find_image_pairs(tmp_path / "masks" / "photos", tmp_path / "masks") == (
        below, masks,
    )  # fmt: skip


def test_one_stem_in_two_subfolders_is_an_error_only_in_pairing(tmp_path: Path) -> None:
    images = files(tmp_path / "1", "a.jpg") + files(tmp_path / "2", "a.jpg")
    files(tmp_path / "m", "a.png")
    with pytest.raises(segment.SegmentError, match=r"a: \S+1/a.jpg and \S+2/a.jpg"):
        segment.find_image_pairs(tmp_path, tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert segment.find_images(tmp_path) == images
    assert segment._unique_names(images) == ["1_a.jpg", "2_a.jpg"]
    names = ["x/ISIC_0000001.jpg", "x/ISIC_0000001_aug1.jpg", "x/b.jpg", "x/b.png", "x/c.png"]
    assert segment._unique_names(names) == [
        "ISIC_0000001", "ISIC_0000001_aug1", "b.jpg", "b.png", "c",
    ]  # fmt: skip


def test_ignored_files_are_counted_and_system_files_are_not(tmp_path: Path) -> None:
    image, jfif, webp = files(tmp_path, "a.jpg", "b.jfif", "c.webp")
    for name in ("d.heic", "e.HEIC", "f.gif", "g.dcm", "h.jp2", ".DS_Store", "._a.jpg", "Thumbs.db",
                 "t.csv", "LICENSE.txt"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "i.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match="ignored what cannot be read") as caught:
        assert segment.find_images(tmp_path) == [image, jfif, webp]
    assert "read: .heic (2), " in said(list(caught))
    assert {".gif (1)", ".dcm (1)", ".jp2 (1)", "broken links (1)"} <= set(
        said(list(caught)).split("read: ")[1].removesuffix(".").split(", ")
    )
    assert segment.load_input_image(webp).shape == (256, 256, 3)


def test_a_folder_and_a_link_to_it_are_one_folder(tmp_path: Path) -> None:
    image, mask = files(tmp_path / "data", "a.jpg", "a_mask.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    images, masks = segment.find_image_pairs(tmp_path / "data", tmp_path / "link")
    assert (images, [Path(path).name for path in masks]) == ([image], [Path(mask).name])


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (image,) = files(tmp_path, "a.jpg")
    (tmp_path / "again").symlink_to(tmp_path)
    assert segment.find_images(tmp_path) == [image]


def test_results_of_a_run_are_never_taken_for_images(tmp_path: Path) -> None:
    (image,) = files(tmp_path, "a.jpg")
    files(tmp_path / "evaluation", "predictions.png")
    files(tmp_path / "evaluation" / "overlays", "a_overlay.jpg")
    for name in ("scores.csv", "summary.json"):
        (tmp_path / "evaluation" / name).write_text("")
    (tmp_path / "findings.csv").write_text("patient,finding\n")  # of somebody else
    assert segment.find_images(tmp_path) == [image]
    files(tmp_path / "interrupted" / "masks", "a_segmentation.png")
    (tmp_path / "interrupted" / "findings.csv").write_text("severity,kind,path,what\n")
    with pytest.raises(segment.SegmentError, match="images without a mask"):
        segment.find_image_pairs(tmp_path, tmp_path)
    for name in ("scores.csv", "summary.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(segment.SegmentError, match="holds the results of an earlier run"):
        segment.find_images(tmp_path)


@pytest.mark.parametrize("output", ["data/images", "data/masks", "data", "data/images/../images"])
def test_an_output_among_images_or_masks_is_refused(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    make_pairs(2)
    before = sorted(tmp_path.rglob("*"))
    folders = [
        "--image-dir",
        str(tmp_path / "data/images"),
        "--mask-dir",
        str(tmp_path / "data/masks"),
    ]
    for driver in (driver_load_evaluate, driver_train_save_evaluate):
        assert driver.main([*folders, "--output", str(tmp_path / output)]) == 2
        assert "give a folder of its own" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def alpha_masks() -> dict[str, Image.Image]:
    level = Image.fromarray(mask_array() * 255)
    black, white = Image.new("L", level.size, 0), Image.new("L", level.size, 255)
    palette = Image.fromarray(mask_array()).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    return {
        "RGBA": Image.merge("RGBA", (black, black, black, level)),
        "colour": Image.merge("RGBA", (white, black, black, level)),
        "LA": Image.merge("LA", (white, level)),
        "palette": palette,
        "opaque": Image.merge("RGBA", (level, level, level, white)),
        "both": Image.merge("RGBA", (level, level, level, level)),
    }


@pytest.mark.parametrize("kind", ["RGBA", "colour", "LA", "palette", "opaque", "both"])
def test_a_mask_may_be_in_the_alpha_channel(tmp_path: Path, kind: str) -> None:
    options = {"transparency": b"\x00\xff"} if kind == "palette" else {}
    path = save(alpha_masks()[kind], tmp_path / "m.png", **options)
    np.testing.assert_array_equal(segment.load_segmented_image(path, None)[..., 0], mask_array())


def test_colours_and_alpha_that_differ_are_an_error(tmp_path: Path) -> None:
    level = Image.fromarray(mask_array() * 255)
    other = Image.fromarray(np.roll(mask_array(), 3, 1) * 255)
    path = save(Image.merge("RGBA", (level, level, level, other)), tmp_path / "m.png")
    with pytest.raises(segment.SegmentError, match=r"m\.png: its colours and its alpha channel"):
        segment.load_segmented_image(path)


def colored(low: Any, high: Any) -> Image.Image:
    return Image.fromarray(np.where(mask_array()[..., None] == 1, high, low).astype(np.uint8))


def two_levels() -> dict[str, tuple[Image.Image, str]]:
    mask = mask_array()
    label = Image.fromarray(mask * 2).convert("P")
    label.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
    return {
        "0/128": (Image.fromarray(mask * 128), "it holds 0 and 128; 128 is lesion"),
        "1/2": (Image.fromarray(mask + 1), "it holds 1 and 2; 2 is lesion"),
        "inverse": (Image.fromarray(200 - 100 * mask), "it holds 100 and 200; 100 is lesion"),
        "colours": (colored((0, 128, 0), (255, 0, 0)), "#ff0000 is lesion"),
        "equally bright": (colored((76, 76, 76), (255, 0, 0)), "#ff0000 is lesion"),
        "label": (label, "#c80000 is lesion"),
        "16 bits": (Image.fromarray(mask.astype(np.uint16) * 7), "it holds 0 and 7; 7 is lesion"),
    }


@pytest.mark.parametrize("kind", list(two_levels()))
def test_masks_of_two_other_levels_are_taken_with_a_warning(tmp_path: Path, kind: str) -> None:
    mask, what = two_levels()[kind]
    image = save(Image.new("RGB", mask.size), tmp_path / "a.png")
    path = save(mask, tmp_path / "a_mask.png")
    np.testing.assert_array_equal(segment.load_segmented_image(path, None)[..., 0], mask_array())
    findings = segment.check_pairs([image], [path])
    assert any(what in f.what and "rarer at the border" in f.what for f in findings)
    assert {f.severity for f in findings} == {"warning"}


@pytest.mark.parametrize(("soft", "accepted"), [(10, True), (200, False)])
def test_soft_edges_are_thresholded_at_half_if_they_are_few(
    tmp_path: Path, soft: int, accepted: bool
) -> None:
    grey = mask_array() * np.uint8(255)
    grey.ravel()[:soft] = np.linspace(100, 127, soft).astype(np.uint8)
    image = save(Image.new("RGB", (30, 20)), tmp_path / "a.png")
    path = save(Image.fromarray(grey), tmp_path / "a_mask.png")
    (finding, *_) = segment.check_pairs([image], [path])
    assert finding.severity == ("warning" if accepted else "error")
    assert ("its edges are soft" if accepted else "expected a mask of 0 and 255") in finding.what


def test_a_speckled_picture_is_no_mask(tmp_path: Path) -> None:
    grey = mask_array() * np.uint8(255)
    grey[::4, ::4] = np.arange(100, 140).reshape(5, 8)  # each on its own, as in a drawing
    with pytest.raises(segment.SegmentError, match="expected a mask of 0 and 255"):
        segment.load_segmented_image(save(Image.fromarray(grey), tmp_path / "m.png"))


def test_a_mask_in_the_alpha_channel_is_a_warning(tmp_path: Path) -> None:
    image = save(Image.new("RGB", (30, 20)), tmp_path / "a.png")
    mask = save(alpha_masks()["RGBA"], tmp_path / "a_mask.png")
    kinds = [finding.kind for finding in segment.check_pairs([image], [mask])]
    assert "masks in the alpha channel" in kinds


def test_notes_on_a_mask_are_given_in_every_run_that_shares_a_folder(tmp_path: Path) -> None:
    image = save(Image.new("RGB", (30, 20)), tmp_path / "a.png")
    mask = save(Image.fromarray(mask_array() * 128), tmp_path / "a_mask.png")
    for _ in range(2):
        cache = segment.PairCache(0, tmp_path / "cache")
        assert "128 is lesion" in segment.check_pairs([image], [mask], cache=cache)[0].what


@pytest.mark.parametrize("level", [0, 255])
def test_no_training_on_masks_that_are_all_empty_or_full(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str], level: int
) -> None:
    images, masks = make_pairs(12)
    mask: np.ndarray = np.full((40, 56), level, np.uint8)
    for i, path in enumerate(masks[1:]):
        if i == 6:
            with warnings.catch_warnings(action="ignore"):
                assert len(segment.usable_pairs(images, masks, training=True)[0]) == 12
        Image.fromarray(mask).save(path, compress_level=i % 9)
    with pytest.raises(segment.SegmentError, match="11 of 12 masks are empty or full: export"):
        segment.usable_pairs(images, masks, training=True)
    folders = ["--image-dir", str(Path(images[0]).parent), "--mask-dir", str(Path(masks[0]).parent)]
    assert driver_train_save_evaluate.main([*folders, "--output", str(tmp_path / "o")]) == 2
    assert "11 of 12 masks are empty or full" in capsys.readouterr().err


def test_no_training_on_masks_that_are_all_the_same(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(4)
    for path in masks[1:]:
        shutil.copy(masks[0], path)
    with pytest.raises(segment.SegmentError, match="4 of 4 masks are equal"):
        segment.usable_pairs(images, masks, training=True)


def with_orientation(image: Image.Image, path: Path, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(image, path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "size", "warned"),
    [(3, (40, 60), True), (2, (40, 60), True), (6, (50, 50), True), (1, (40, 60), False)],
)
def test_a_photo_with_an_orientation_whose_mask_has_none_is_a_warning(
    tmp_path: Path, orientation: int, size: segment.Size, warned: bool
) -> None:
    photo, mask = draw_lesion(size, 0)
    image = with_orientation(photo, tmp_path / "a.jpg", orientation)
    path = save(mask, tmp_path / "a_mask.png")
    what = "".join(finding.what for finding in segment.check_pairs([image], [path]))
    assert (
        f"the photo has EXIF orientation {orientation}, but its mask has none" in what
    ) == warned


def test_a_mask_that_fits_the_upright_photo_is_no_warning_and_one_that_fits_the_other_an_error(
    tmp_path: Path,
) -> None:
    photo, mask = draw_lesion((40, 60), 0)
    image = with_orientation(photo, tmp_path / "a.jpg", 6)
    upright = save(mask.transpose(Image.Transpose.ROTATE_270), tmp_path / "m1" / "a.png")
    assert not [f for f in segment.check_pairs([image], [upright]) if "orient" in f.kind]
    (finding,) = segment.check_pairs([image], [save(mask, tmp_path / "m2" / "a.png")])
    assert "it fits the photo only without its EXIF orientation" in finding.what


@pytest.mark.parametrize(
    ("size", "cause"),
    [((80, 112), "it has another scale"), ((20, 28), "it has another scale"),
     ((41, 56), "it is off by a few pixels"), ((37, 59), "it is off by a few pixels"),
     ((56, 40), None), ((44, 56), None)],
)  # fmt: skip
def test_masks_of_another_scale_or_off_by_a_few_pixels_fit_on_request(
    make_pairs: MakePairs, tmp_path: Path, size: segment.Size, cause: str | None
) -> None:
    (image,), (mask,) = make_pairs(1)
    original = segment.load_segmented_image(mask, None)
    Image.open(mask).resize(size[::-1], Image.Resampling.NEAREST).save(mask)
    strict, lax = segment.PairCache(), segment.PairCache(fit_masks=True)
    with pytest.raises(segment.SegmentError, match=cause or "expected a mask of the size"):
        strict.load(image, mask, (32, 48))
    if cause is None:
        with pytest.raises(segment.SegmentError, match="expected a mask of the size"):
            lax.load(image, mask, (32, 48))
        return
    (finding,) = segment.check_pairs([image], [mask], cache=lax)
    assert finding.kind == "resized masks"
    assert f"from {size[0]} × {size[1]} to 40 × 56" in finding.what
    segment.PairCache(0, tmp_path / "cache", fit_masks=True).load(image, mask, (32, 48))
    with pytest.raises(segment.SegmentError, match=cause):
        segment.PairCache(0, tmp_path / "cache").load(image, mask, (32, 48))
    generator = segment.create_generator([image], [mask], image_size=(32, 48), cache=lax)
    truth = segment.PairCache(fit_masks=True).load(image, mask, (40, 56))[None, ..., 3:]
    assert (truth[0] == 255 * original).mean() > 0.93
    probabilities = np.full((1, 32, 48, 1), 0.0, np.float32)
    (score,) = segment.results(generator, probabilities, num_imgs=1)
    assert score["specificity"] == 1
    with pytest.raises(segment.SegmentError, match=cause):
        segment.results(
            segment.create_generator([image], [mask], image_size=(32, 48)), probabilities
        )


def test_partly_labelled_data_is_used_on_request_and_the_rest_is_listed(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images, masks = make_pairs(12)
    Path(images[3]).unlink()
    Path(masks[5]).unlink()
    monkeypatch.setattr(segment, "create_model", tiny_network)
    folders = [
        "--image-dir",
        str(tmp_path / "data/images"),
        "--mask-dir",
        str(tmp_path / "data/masks"),
    ]
    options = [
        *folders,
        "--image-size",
        "32",
        "32",
        "--epochs",
        "1",
        "--output",
        str(tmp_path / "o"),
    ]
    assert driver_train_save_evaluate.main([*options, "--test-split", "0.3"]) == 2
    assert "leave these out with --skip-bad" in capsys.readouterr().err
    assert driver_train_save_evaluate.main([*options, "--test-split", "0.3", "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert "10 pairs in" in printed.out
    assert "left out: masks without an image (1: ISIC_0000003) and images without" in printed.err
    with open(tmp_path / "o" / "findings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["kind"], row["path"]) for row in rows} == {
        ("masks without an image", masks[3]), ("images without a mask", images[5]),
    }  # fmt: skip


def test_warnings_are_grouped_by_kind(make_pairs: MakePairs, tmp_path: Path) -> None:
    images, masks = make_pairs(5)
    for path in images[1:]:
        Image.open(path).convert("CMYK").save(path.replace(".png", ".jpg"))
        Path(path).unlink()
    images = images[:1] + [path.replace(".png", ".jpg") for path in images[1:]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        segment.usable_pairs(images, masks, output_dir=tmp_path)
    first = f"{images[1]}: the mode is CMYK, where RGB is usual."
    assert said(caught) == f"mode CMYK: 4 files, first {first}"
    assert (tmp_path / "findings.csv").read_text().count("mode CMYK") == 4


def test_further_pages_are_a_warning(make_pairs: MakePairs, tmp_path: Path) -> None:
    _, (mask,) = make_pairs(1)
    pages = [Image.new("RGB", (56, 40), (level, 0, 0)) for level in (50, 60, 70)]
    image = save(pages[0], tmp_path / "ISIC_0000000.tif", save_all=True, append_images=pages[1:])
    kinds = {finding.kind: finding.what for finding in segment.check_pairs([image], [mask])}
    assert "it has 3 pages, of which the first is used" in kinds["files of several pages"]


def test_an_older_keras_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "__version__", "3.10.0")
    with pytest.raises(segment.SegmentError, match=r"needs Keras 3\.15\.1 or newer, but found 3\."):
        segment.load_model()


def test_a_jpeg_of_a_phone_may_have_200_megapixels_and_heic_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (16_000, 12_500), (200, 150, 120)).save(tmp_path / "a.jpg")
    assert segment.load_input_image(tmp_path / "a.jpg", (64, 64)).max() > 190
    assert segment.inspect([tmp_path / "a.jpg"]) == {(12_500, 16_000): 1}
    for brand in (b"heic", b"mif1", b"avif"):
        (tmp_path / "b.jpg").write_bytes(b"\x00\x00\x00\x18ftyp" + brand + bytes(100))
        with pytest.raises(segment.SegmentError, match=r"b\.jpg: is a HEIC or AVIF file"):
            segment.load_input_image(tmp_path / "b.jpg")


def test_too_few_pairs_name_the_least_number(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(2)
    with pytest.raises(segment.SegmentError, match="expected at least two lesions, or a val_split"):
        segment.train_val_test_split(images, masks)
    train, val, test = segment.train_val_test_split(images, masks, val_split=0, test_split=0)
    assert [len(part[0]) for part in (train, val, test)] == [2, 0, 0]


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, "a.jpg")
    files(tmp_path / "closed", "b.jpg")
    scan = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(segment.SegmentError, match=r"closed: cannot be read \(Permission denied\)"):
        segment.find_images(tmp_path)


def test_every_image_has_a_name_of_its_own_that_a_file_system_can_hold() -> None:
    names = segment._unique_names(["d/p/1/a.jpg", "d/p_1/a.jpg", "d/p_1/a.jpg", "d/b.jpg"])
    assert (len(set(names)), names[3]) == (4, "b")
    (long,) = segment._unique_names([f"{'皮膚' * 60}.jpg"])
    assert 190 < len(long.encode()) <= 200
    twice = segment._unique_names([f"{'x' * 250}{i}.jpg" for i in (1, 2)])
    assert len(set(twice)) == 2
