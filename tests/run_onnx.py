"""Segments images with what `segment.export_model` wrote: NumPy, Pillow and ONNX Runtime suffice.

Usage: python tests/run_onnx.py MODEL.onnx DIR IMAGE...

The comments say what a program in another language has to do. Images have 8 bits per channel.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Array = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]  # (height, width)


def letterbox(size: Size, frame: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of an image in the frame; `round` takes halves to even."""
    scale = min(frame[0] / size[0], frame[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return (frame[0] - height) // 2, (frame[1] - width) // 2, height, width


def load(path: str, frame: Size) -> tuple[Array, Size]:
    """The image in its frame, uint8 (height, width, 3), RGB, and its original size."""
    image: Image.Image = Image.open(path)
    # EXIF orientations above 4 swap the sides; Pillow turns a TIFF itself.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    size = (image.width, image.height) if turned else (image.height, image.width)
    top, left, height, width = letterbox(size, frame)
    # A JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1 with 1.9 times the pixels of the box.
    box = (height, width) if turned else (width, height)
    image.draft("RGB", (int(1.9 * box[0]), int(1.9 * box[1])))
    image = ImageOps.exif_transpose(image).convert("RGB")
    # Bilinear with antialiasing, after averages of 2 x 2 and so on while twice the box is left.
    small = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
    framed = Image.new("RGB", (frame[1], frame[0]))  # black
    framed.paste(small, (left, top))
    return np.asarray(framed), size


def predict(session: onnxruntime.InferenceSession, facts: dict[str, Any], image: Array) -> Array:
    """The probabilities of an image in its frame, float32 (height, width)."""
    # Mirror: the mean over the four flips, each flipped back, unless the network does that.
    flips: list[Any] = [np.s_[::y, ::x] for y in (1, -1) for x in (1, -1)]
    flips = flips if facts["mirror"] and not facts["mirror_built_in"] else flips[:1]
    (lesions,) = session.run(None, {"image": np.stack([image[flip] for flip in flips])})
    back = [lesion[flip] for lesion, flip in zip(lesions[..., 0], flips, strict=True)]
    return np.asarray(sum(back) / len(back))


def restore(lesion: Array, size: Size, facts: dict[str, Any]) -> Array:
    """The mask of probabilities, bool, at the original size of the image."""
    # First crop the box, then resize the probabilities (plain bilinear), then threshold.
    top, left, height, width = letterbox(size, lesion.shape)
    box = Image.fromarray(np.ascontiguousarray(lesion[top : top + height, left : left + width]))
    lesion = np.asarray(box.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    mask: Array = lesion >= facts["threshold"]
    if facts["one_region"] and mask.any():
        # Keep the region with the highest sum of probability - threshold, and fill its holes: what
        # the background around the image does not reach.
        regions = label(mask)
        weights = np.bincount(regions[mask], (lesion - facts["threshold"])[mask])
        background = label(~np.pad(regions == np.argmax(weights), 1))
        mask = (background != background[0, 0])[1:-1, 1:-1]
    return mask


def label(mask: Array) -> Array:
    """Numbers the regions of pixels that share a side, above 0; elsewhere it is 0."""
    regions = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:  # until no pixel has a neighbour of its region with a higher number
        wider = spread(spread(regions).T).T
        if np.array_equal(wider, regions):
            return regions
        regions = wider


def spread(regions: Array) -> Array:
    """Gives each run of pixels above 0 in a row the highest number in it."""
    flat = np.pad(regions, ((0, 0), (0, 1))).ravel()  # an added column of 0 ends the runs of a row
    starts = np.append(0, 1 + np.flatnonzero(np.diff(flat > 0)))
    highest = np.repeat(np.maximum.reduceat(flat, starts), np.diff(starts, append=len(flat)))
    return np.asarray(highest.reshape(len(regions), -1)[:, :-1])


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    _, model, output, *paths = sys.argv
    Path(output).mkdir(parents=True, exist_ok=True)
    session = onnxruntime.InferenceSession(model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["segment.json"])
    for path in paths:
        image, size = load(path, (facts["height"], facts["width"]))
        mask = restore(predict(session, facts, image), size, facts)
        isic = re.match(r"(?i)ISIC_\d+", Path(path).name)
        name = isic[0].upper() if isic else Path(path).stem
        Image.fromarray(mask * np.uint8(255)).save(Path(output, f"{name}_segmentation.png"))
