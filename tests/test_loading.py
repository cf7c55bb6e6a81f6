"""From a file to an array in the frame of the network, and back."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs, draw_lesion, with_threshold
from PIL import Image, ImageOps

import segment

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int, height: int) -> Image.Image:
    """Red and green above blue and white."""
    colors = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    return Image.fromarray(colors.repeat(height // 2, 0).repeat(width // 2, 1))


def test_a_wide_picture_lies_centred_between_black_bars(tmp_path: Path) -> None:
    quarters(40, 20).save(tmp_path / "a.png")
    image = segment.load_input_image(tmp_path / "a.png", (32, 32))
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert not image[:8].any()
    assert not image[24:].any()
    assert [tuple(image[y, x]) for y, x in ((9, 1), (9, 30), (22, 1), (22, 30))] == [
        RED, GREEN, BLUE, WHITE,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "frame", "box"),
    [
        ((100, 200), (64, 64), (16, 0, 32, 64)),
        ((200, 100), (64, 64), (0, 16, 64, 32)),
        ((30, 40), (192, 256), (0, 0, 192, 256)),
        ((4499, 6748), (256, 256), (42, 0, 171, 256)),
        ((4000, 3), (64, 64), (0, 31, 64, 1)),
    ],
)
def test_the_letterbox_is_as_large_as_it_can_be_and_centred(
    size: segment.Size, frame: segment.Size, box: tuple[int, ...]
) -> None:
    assert segment.letterbox(size, frame) == box


def test_the_exif_orientation_is_applied_to_loading_and_to_inspection(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    quarters(40, 20).save(tmp_path / "a.png", exif=exif)
    image = segment.load_input_image(tmp_path / "a.png", (40, 20))
    assert [tuple(image[y, x]) for y, x in ((1, 1), (1, 18), (38, 1), (38, 18))] == [
        BLUE, RED, WHITE, GREEN,
    ]  # fmt: skip
    assert segment.inspect([tmp_path / "a.png"]) == {(40, 20): 1}


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_other_colour_modes_give_the_same_picture(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    quarters(40, 20).convert(mode).save(path)
    expected = np.asarray(quarters(40, 20))
    np.testing.assert_allclose(segment.load_input_image(path, None), expected, atol=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_levels_of_8_and_16_bits_become_the_same_rgb(tmp_path: Path, dtype: type) -> None:
    levels = np.arange(256, dtype=dtype).reshape(16, 16) * dtype(257 if dtype == np.uint16 else 1)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = segment.load_input_image(tmp_path / "a.png", (16, 16))
    np.testing.assert_array_equal(image, np.arange(256).reshape(16, 16, 1).repeat(3, 2))


def test_a_large_jpeg_loads_as_if_it_had_been_decoded_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").resize((128, 96), Image.Resampling.BILINEAR)
    image = segment.load_input_image(tmp_path / "a.jpg", (96, 128))
    assert np.abs(image.astype(int) - np.asarray(whole)).mean() < 0.5


def labels_in_colours(levels: np.ndarray) -> Image.Image:
    """A palette picture in which 0 is black and 1 dark red, as in PASCAL VOC."""
    picture = Image.frombytes("P", levels.shape[::-1], (levels // 255).tobytes())
    picture.putpalette([0, 0, 0, 128, 0, 0])
    return picture


def save_mask(path: Path, kind: str) -> np.ndarray:
    """A lesion's mask in one of the ways that people store them; returns the truth."""
    mask = draw_lesion((60, 80), 3)[1]
    levels = np.asarray(mask)
    pictures = {
        "1 bit": mask.convert("1"),
        "0 and 1": Image.fromarray(levels // 255),
        "16 bits": Image.fromarray(levels.astype(np.uint16) * 257),
        "rgb": mask.convert("RGB"),
        "rgba": mask.convert("RGBA"),
        "palette": mask.convert("P"),
        "labels in colours": labels_in_colours(levels),
        "jpeg": mask,
    }
    pictures[kind].save(path, quality=75)  # which only a JPEG heeds
    return levels > 0


@pytest.mark.parametrize(
    "kind",
    ["1 bit", "0 and 1", "16 bits", "rgb", "rgba", "palette", "labels in colours", "jpeg"],
)
def test_a_mask_is_read_however_it_is_stored(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.jpg" if kind == "jpeg" else "a.png")
    truth = save_mask(path, kind)
    mask = segment.load_segmented_image(path, None)
    assert mask.shape == (60, 80, 1)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(mask[..., 0], truth)


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 60, 120), (0, 60, 120, 180)])
def test_a_mask_of_other_values_is_refused_and_they_are_named(
    tmp_path: Path, values: tuple[int, ...]
) -> None:
    levels = np.zeros((50, 50), np.uint8)
    levels[0, : len(values)] = values
    Image.fromarray(levels).save(tmp_path / "labels.png")
    with pytest.raises(segment.SegmentError, match=rf"labels\.png: .* values \({values[0]}, "):
        segment.load_segmented_image(tmp_path / "labels.png")


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("a.jpg", (0, 1), np.uint8),
        ("a.jpg", (2, 9, 16), np.uint8),
        ("a.png", (0, 100, 65535), np.uint16),
        ("a.tif", (0, 65536), np.int32),
        ("a.tif", (0, -1), np.int32),
        ("a.tif", (0, 0.5), np.float32),
    ],
)
def test_a_mask_is_never_misread_as_empty(
    tmp_path: Path, name: str, values: tuple[float, ...], dtype: type
) -> None:
    levels: np.ndarray = np.full((64, 64), values[0], dtype)
    for i, value in enumerate(values):
        levels[16 * i : 16 * i + 16] = value
    Image.fromarray(levels).save(tmp_path / name)
    if len(values) == 2:  # unambiguous, since the lesion is rarer at the border
        mask = segment.load_segmented_image(tmp_path / name, None)[..., 0]
        np.testing.assert_array_equal(mask, levels == values[1])
    else:
        with pytest.raises(segment.SegmentError, match="expected a mask of 0 and 255"):
            segment.load_segmented_image(tmp_path / name)


def test_a_photograph_is_refused_as_a_mask(tmp_path: Path) -> None:
    draw_lesion((60, 80), 0)[0].save(tmp_path / "photo.jpg")
    with pytest.raises(segment.SegmentError, match="expected a mask of 0 and 255"):
        segment.load_segmented_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("frame", [(64, 64), (96, 128), (256, 256)])
def test_lesions_neither_shrink_nor_grow_in_the_frame(tmp_path: Path, frame: segment.Size) -> None:
    changes = []
    for seed in range(8):
        mask = draw_lesion((450, 600), seed)[1]
        mask.save(tmp_path / "a.png")
        _, _, height, width = segment.letterbox((450, 600), frame)
        area = segment.load_segmented_image(tmp_path / "a.png", frame).sum() / (height * width)
        changes.append(area / (np.asarray(mask) > 0).mean() - 1)
    assert np.abs(changes).max() < 0.02
    assert abs(np.mean(changes)) < 0.005


@pytest.mark.parametrize("size", [(300, 401), (401, 300), (50, 37)])
def test_a_mask_resized_to_the_frame_and_restored_is_the_same_mask(
    tmp_path: Path, size: segment.Size, make_pairs: MakePairs
) -> None:
    images, masks = make_pairs(1, size)
    frame = segment.load_segmented_image(masks[0], (256, 256))
    generator = segment.create_generator(images, masks, image_size=(256, 256))
    (restored,) = segment.restore_masks(generator, frame[None].astype(np.float32))
    truth = segment.load_segmented_image(masks[0], None)[..., 0]
    assert restored.shape == size
    assert segment.score_masks(truth, restored)["dice"] > 0.985


def test_a_restored_mask_is_not_mirrored(make_pairs: MakePairs) -> None:
    images, _ = make_pairs(1, (30, 60))
    prediction = np.zeros((1, 64, 64, 1), np.float32)
    prediction[0, :, :16] = 1
    (mask,) = segment.restore_masks(
        segment.create_generator(images, image_size=(64, 64)), prediction
    )
    np.testing.assert_array_equal(mask, np.tile(np.arange(60) < 15, (30, 1)))


def test_a_truncated_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    draw_lesion((60, 80), 0)[0].save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "empty.jpg"):
        with pytest.raises(segment.SegmentError, match=rf"{name}: cannot be read as an image"):
            segment.load_input_image(tmp_path / name)
    with pytest.raises(segment.SegmentError, match=r"none\.jpg: there is no such file"):
        segment.load_input_image(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.array([[0, 70000]], np.int32), r"int32 from 0 to 70000: expected 8 or 16 bits"),
        (np.array([[-3, 9]], np.int32), r"int32 from -3 to 9"),
        (np.array([[0, 0.5]], np.float32), r"float32 from 0 to 0\.5"),
    ],
)
def test_grey_levels_of_unknown_range_are_refused(
    tmp_path: Path, levels: np.ndarray, message: str
) -> None:
    Image.fromarray(levels).save(tmp_path / "a.tif")
    with pytest.raises(segment.SegmentError, match=rf"a\.tif: its grey levels are {message}"):
        segment.load_input_image(tmp_path / "a.tif")


def test_the_exif_orientation_turns_the_mask_as_well(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(np.array([[255, 0, 0], [0, 0, 0]], np.uint8)).save(
        tmp_path / "a.png", exif=exif
    )
    mask = segment.load_segmented_image(tmp_path / "a.png", None)[..., 0]
    np.testing.assert_array_equal(mask, [[0, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("levels", [(0, 255), (8, 247)])
def test_a_jpeg_mask_with_intermediate_grey_levels_is_refused(
    tmp_path: Path, levels: tuple[int, int]
) -> None:
    halves: np.ndarray = np.full((64, 64), levels[0], np.uint8)
    halves[:, 32:] = levels[1]
    Image.fromarray(halves).save(tmp_path / "a.jpg", quality=100)
    mask = segment.load_segmented_image(tmp_path / "a.jpg", None)[..., 0]
    np.testing.assert_array_equal(mask, halves > 128)
    halves[:8, :8] = 128
    Image.fromarray(halves).save(tmp_path / "a.jpg", quality=100)
    with pytest.raises(segment.SegmentError, match="expected a mask of 0 and 255"):
        segment.load_segmented_image(tmp_path / "a.jpg", None)


def test_a_mask_is_thresholded_after_it_is_resized(
    make_pairs: MakePairs,
) -> None:
    images, _ = make_pairs(1, (64, 128))
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None], (1, 64, 1, 1))
    generator = segment.create_generator(images, image_size=(64, 64))
    for threshold in (0.25, 0.6):
        (mask,) = segment.restore_masks(generator, with_threshold(ramp, threshold))
        # Interpolated twofold, the ramp reaches the threshold at this column to a quarter pixel.
        assert abs((~mask[0]).sum() - 2 * (63 * threshold + 0.5)) <= 0.5
        assert (mask == mask[0]).all()


@pytest.mark.parametrize("image_size", [64, (64,), (-3, 5), (0, 64), (6.5, 64)])
def test_an_invalid_image_size_is_refused(make_pairs: MakePairs, image_size: Any) -> None:
    images, masks = make_pairs(1)
    for load, path in (
        (segment.load_input_image, images[0]), (segment.load_segmented_image, masks[0])
    ):  # fmt: skip
        with pytest.raises(segment.SegmentError, match=r"image_size is .*expected \(height, width"):
            load(path, image_size)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_once_in_every_format(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    quarters(64, 32).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert segment.inspect([path]) == {upright.shape[:2]: 1}
    assert np.array_equal(segment.load_input_image(path, None), upright)


@pytest.mark.parametrize("white", [0, 1, 255, 65535])
def test_a_mask_of_16_bits_is_reduced_like_any_other(tmp_path: Path, white: int) -> None:
    levels = np.zeros((768, 1024), np.uint16)
    levels[:, 512:] = white
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = segment.load_segmented_image(tmp_path / "mask.png", (48, 64))[..., 0]
    assert np.array_equal(mask[:, 32:], np.full((48, 32), white > 0))
    assert not mask[:, :32].any()


def test_other_formats_are_refused_whatever_their_name(tmp_path: Path) -> None:
    quarters(8, 8).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    with pytest.raises(segment.SegmentError, match=r"a\.jpg: cannot be read as an image"):
        segment.load_input_image(tmp_path / "a.jpg")


def test_an_orientation_behind_the_pixels_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    quarters(64, 32).save(path, exif=exif)
    data = path.read_bytes()
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert segment.inspect([path]) == {(32, 64): 1}
    assert np.array_equal(segment.load_input_image(path, None), np.asarray(quarters(64, 32)))


def test_odd_exif_tags_do_not_hide_the_orientation(tmp_path: Path) -> None:
    length = struct.pack(">HHI4s", 0x0101, 2, 4, b"abc")  # text, where a number is expected
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + length + turned + bytes(4)
    quarters(64, 32).save(tmp_path / "a.jpg", exif=exif)
    assert segment.load_input_image(tmp_path / "a.jpg", None).shape == (64, 32, 3)


def test_a_turned_mask_in_a_jpeg_may_be_only_nearly_0_and_255(tmp_path: Path) -> None:
    image, mask = draw_lesion((64, 48), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = str(tmp_path / "a.jpg"), str(tmp_path / "a_mask.jpg")
    image.save(paths[0], exif=exif)
    mask.save(paths[1], exif=exif, quality=75)
    cache = segment.PairCache(0)
    pair = cache.load(*paths, (48, 64))
    assert cache.notes[paths[1]] == {}
    expected = np.rot90(np.asarray(mask), -1) > 0
    assert (expected != (pair[..., 3] > 0)).mean() < 0.01
