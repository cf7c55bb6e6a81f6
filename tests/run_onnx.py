"""Segments images with a model that `segment.export_model` wrote, without Keras and `segment`.

Usage: python tests/run_onnx.py MODEL.onnx IMAGE... --output DIR

NumPy, Pillow and ONNX Runtime are enough. The comments say what a program in another language has
to do. Images of 16 bits, which `segment` reads as well, are refused. Of images that share a name,
the mask of the last one stays.
"""

import argparse
import json
import re
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
    if image.mode[0] in "IF":
        raise SystemExit(f"{path}: has more than 8 bits: convert it.")
    # EXIF orientations above 4 swap the sides; Pillow turns a TIFF itself.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    size = (image.width, image.height) if turned else (image.height, image.width)
    top, left, height, width = letterbox(size, frame)
    # A JPEG is decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 that gives 1.9 times the
    # pixels of the box, here before it is turned. Decoding it whole changes few pixels of a mask.
    box = (height, width) if turned else (width, height)
    image.draft("RGB", (int(1.9 * box[0]), int(1.9 * box[1])))
    image = ImageOps.exif_transpose(image)
    image = image.convert("RGB")
    # Bilinear with antialiasing: a triangle that covers all pixels, after averages of 2 x 2 and so
    # on while twice the box is left. The rest of the frame is black.
    small = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
    framed = Image.new("RGB", (frame[1], frame[0]))
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
    if not facts["one_region"]:
        return mask
    # Keep the region with the highest sum of probability - threshold.
    regions = label(mask)
    weights = np.bincount(regions.ravel(), (lesion - facts["threshold"]).ravel())
    mask &= regions == np.argmax(weights)
    # Fill the holes: what the background outside of the image does not reach.
    background = label(~np.pad(mask, 1))
    return np.asarray(background != background[0, 0])[1:-1, 1:-1]


def label(mask: Array) -> Array:
    """Numbers the regions of pixels that share a side, above 0; elsewhere it is 0."""
    row = mask.shape[1] + 1  # the runs of True in a row end before an added column of False
    flat = np.pad(mask, ((0, 0), (0, 1))).ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    starts, ends = edges[::2], edges[1::2]
    # Run i touches the runs first[i] to last[i] - 1 in the row below.
    first, last = np.searchsorted(ends, starts + row, "right"), np.searchsorted(starts, ends + row)
    parents = list(range(len(starts)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    for run in range(len(starts)):
        for below in range(first[run], last[run]):
            parents[root(below)] = root(run)
    regions = np.zeros(flat.shape, np.int32)
    for run, (start, end) in enumerate(zip(starts, ends, strict=True)):
        regions[start:end] = 1 + root(run)
    return regions.reshape(-1, row)[:, :-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["segment.json"])
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.images:
        image, size = load(path, (facts["height"], facts["width"]))
        mask = restore(predict(session, facts, image), size, facts)
        isic = re.match(r"(?i)ISIC_\d+", Path(path).name)
        name = isic[0].upper() if isic else Path(path).stem
        Image.fromarray(mask * np.uint8(255)).save(options.output / f"{name}_segmentation.png")
