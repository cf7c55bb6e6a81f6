"""Segmentation of skin lesions in ISIC images with an improved UNet.

The sections follow the data. In short::

    images, masks = segment.find_image_pairs("images/sample/input", "images/sample/truth")
    split = train, val, test = segment.train_val_test_split(images, masks)
    train_generator = segment.create_generator(*train, shuffle=True, augment=True)
    val_generator, test_generator = (segment.create_generator(*part) for part in (val, test))
    model = segment.create_model()
    segment.train_model(model, train_generator, val_generator, epochs=60)
    segment.save_model(model, "unet.keras", split=split)
    scores = segment.results(test_generator, segment.predict(model, test_generator))

Glossary, valid for every function:

- `image_paths`, `mask_paths`: files in the same order, one mask for each image.
- Image: `uint8 (height, width, 3)`, RGB in 0..255. Mask: `uint8 (height, width, 1)`, 1 for lesion
  and 0 elsewhere; its file holds 0 and 255, or 0 and 1.
- Pair: an image and its mask; decoded, one array, `uint8 (height, width, 4)`, the mask being 0 and
  255 unless soft.
- Soft masks: grey levels from 0 to 255 are the probability of lesion, such as the mean of several
  experts. Networks learn them as they are; for scores they are thresholded at half.
- `image_size`: `(height, width)` in pixels of the frame in which the network sees an image. The
  image keeps its aspect ratio and is centred on black (`letterbox`).
- `cache`: the `PairCache` in which decoded pairs are found and kept.
- `skip_bad`: leave out what cannot be used rather than raise an error.
- Probabilities: `float32 (N, height, width, 1)` in 0..1, in the order of the images.
- Threshold: the lowest probability that counts as lesion, in (0, 1).
- Mirror: average the predictions of the four flips of an image (test-time augmentation).
- One region: keep only the most certain region of a mask and fill its holes, as in ISIC masks.
- Scores: in 0..1, of one image at its original resolution. A Jaccard below 0.65 is a failure.
- Record: what a model file holds besides the network (`model_record`).
- Split: `(train, val, test)`, each `(image_paths, mask_paths)`.
- `verbose`: 1 for a progress bar, 0 for none.

Files and values that cannot be used raise a `SegmentError`, which says what was received, what was
expected and what to do. Keras uses TensorFlow unless `KERAS_BACKEND` names another backend.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import ctypes
import dataclasses
import functools
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import string
import sys
import tempfile
import threading
import time
import timeit
import warnings
import weakref
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
import PIL
from keras import layers, ops
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter
from PIL.JpegImagePlugin import jpeg_factory
from scipy import ndimage, sparse, spatial, stats
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import shuffle

__all__ = [  # noqa: RUF022, in the order of the sections
    "SegmentError", "image_id", "find_image_pairs", "unpaired_files", "find_images", "letterbox",
    "load_input_image", "load_segmented_image", "PairCache", "inspect", "plot_image_sizes",
    "check_pairs", "usable_pairs", "find_same_lesions", "train_val_test_split",
    "cross_validation_splits", "create_generator", "create_model", "METRICS", "dice_coefficient",
    "dice_loss", "dice_cross_entropy_loss", "score_masks", "boundary_distances", "train_model",
    "predict", "predict_each", "average_models", "segment_image", "choose_threshold",
    "fit_estimate", "estimate_dice", "describe_device", "data_parallel", "make_deterministic",
    "model_record", "save_model", "load_model", "load_weights", "export_model", "stored_test_split",
    "image_ids_seen", "results", "restore_masks", "summarize", "read_scores", "compare_scores",
    "read_metadata", "subgroups", "plot_predictions", "plot_dice_histogram", "plot_history",
    "save_figure", "run_driver",
]  # fmt: skip

IMAGE_SIZE = (256, 256)  # as in the original system
IMAGE_NAME = r"(?is)(?!\.).*\.(jpe?g|jpe|jfif|png|bmp|tiff?|webp)"
OTHER_IMAGE = r"(?i)[^.].*(\.(hei[cf]|avif|gif|dcm|jp2|j2k|dng|nef|cr2|arw|svg|psd|tga|p[bgpn]m))"
MASK_NAME = r"(?i)([_.-](masks?|seg|segmentation|lesion|gt|label|annotation))+$"
NO_IMAGE = r"(?i)(_superpixels|_overlay|^image_sizes|_R\d+_Label\d+)$"  # of ISIC, this program, PH2
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # all that is decoded; MPO belongs to JPEG
METRICS = ("dice", "jaccard", "thresholded_jaccard", "sensitivity", "specificity", "accuracy")
DISTANCES = ("hd95", "assd")  # of outlines, in per cent of the image's diagonal; no scores
JACCARD_FAILURE = 0.65  # below it the ISIC 2018 challenge counts a segmentation as failed
PRETRAINED = Path(__file__).with_name("pretrained.keras")
RINGS, ANGLES = 16, 64  # samples of a lesion signature
SAME_LESION = 0.63  # similarity of two signatures, chosen on the duplicates in ISIC 2017
TURNS = (None, None, 0, 3, 1, 5, 4, 6, 2)  # `Image.Transpose` by EXIF orientation, from 0
FLIPS = ((), (2,), (1,), (1, 2))  # of a batch, by axes
OUTLINE_DOUBT = 0.005  # what the outline of a mask of the whole frame costs, in Dice
DOUBT = 0.02  # misses are measured in units of DOUBT + 1 - estimate
BEST = "val_dice_coefficient"  # selects the best epoch
NEEDS_MASKS = "This needs masks: create the generator with mask_paths."

Size = tuple[int, int]
StrPath = str | os.PathLike[str]
Paths = Sequence[StrPath]
Pair = tuple[str, str | None]
Pairs = tuple[list[str], list[str]]
Lesions = list[list[Pair]]
Array = NDArray[Any]
Mask = NDArray[np.bool_]
Tensor = Any  # of any backend
Models = Any  # a keras.Model, or several, whose probabilities are averaged


# --- Errors and whole files -------------------------------------------------------------------

class SegmentError(ValueError):
    """Input that cannot be used."""


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise SegmentError(otherwise)


def _check_file_to_write(path: StrPath, suffix: str = "") -> None:
    """Refuses a file that cannot be written before the work starts; creates its folder."""
    path = Path(path)
    _require(path.name.endswith(suffix), f"{path} does not end in {suffix}: give a name that does.")
    _require(not path.is_dir(), f"{path} is a folder: give the name of a file, or a new one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SegmentError(f"{path}: cannot be written ({error.strerror}).") from error


@contextlib.contextmanager
def _written_whole(path: StrPath) -> Iterator[Path]:
    """Yields a temporary file or folder that replaces `path` once it is complete."""
    path = Path(path)
    _check_file_to_write(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".segment-unfinished-", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with contextlib.suppress(IsADirectoryError), open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut may keep the new name without the content
            temporary.replace(path)
    except OSError as error:
        raise SegmentError(f"{path}: cannot be written ({error.strerror or error}).") from error


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]], header: Sequence[str] = ()) -> None:
    with _written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(header or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of killed processes; writing a file takes seconds, not an hour."""
    for path in folder.glob(".segment-unfinished-????????/"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(path)


# --- 1. Loading: from a folder to pairs, from a file to an array ------------------------------

def image_id(path: StrPath) -> str:
    """Returns the id that an image and its mask share: the ISIC id, as `"ISIC_0012345"`.

    If the name does not begin with one, it is the name without its suffix and `_segmentation`.
    """
    stem = Path(path).stem
    isic = re.match(r"ISIC_\d+", stem, re.IGNORECASE)
    return isic[0].upper() if isic else re.sub(MASK_NAME, "", stem)


class Finding(NamedTuple):
    """What is unusable (severity `"error"`) or unusual (`"warning"`) about a file."""

    severity: str
    kind: str  # a few words, the same for all files of the kind
    path: str  # of the image, or of the mask if there is no image
    what: str  # a sentence that names the file, or the id of a file without a partner


def find_image_pairs(image_dir: StrPath, mask_dir: StrPath, *, skip_bad: bool = False) -> Pairs:
    """Returns `(image_paths, mask_paths)` of a folder and its subfolders, sorted by id.

    Takes the folders of ISIC 2016 to 2018, HAM10000 and PH2 as they are unpacked, and any others in
    which image and mask share a stem. A mask's name may end in `MASK_NAME`, as `_segmentation`; if
    both folders are the same, it must. Superpixels, hidden files and results are ignored. Ids that
    occur twice and files without a partner are an error, or with `skip_bad` a warning.
    """
    pairs, findings = _pair_files(image_dir, mask_dir)
    found = " and ".join(
        f"{kind} ({count}: {_shorten([f.what for f in findings if f.kind == kind])})"
        for kind, count in Counter(finding.kind for finding in findings).items())
    _require(not found or (skip_bad and pairs), "Expected one mask for each image, by id, "
             f"but {image_dir} and {mask_dir} hold {found}: add, rename or remove files, or leave "
             "these out with --skip-bad (skip_bad=True).")
    if found:
        warnings.warn(f"left out: {found}.", stacklevel=2)
    return _unzip([pairs])


def unpaired_files(image_dir: StrPath, mask_dir: StrPath) -> list[Finding]:
    """Returns the files that `find_image_pairs` leaves out, with `severity` `"error"`."""
    with warnings.catch_warnings(action="ignore"):  # given by find_image_pairs
        return _pair_files(image_dir, mask_dir)[1]


def _pair_files(image_dir: StrPath, mask_dir: StrPath) -> tuple[list[Pair], list[Finding]]:
    images, masks = _list_images(image_dir), _list_images(mask_dir)
    if images.keys() == masks.keys():  # one folder
        masks = {real: path for real, path in masks.items() if _is_mask(path)}
    outer = images if masks.keys() <= images.keys() else masks  # the inner one owns its files
    for real in images.keys() & masks.keys():
        del outer[real]
    named = [path for path in images.values() if not _is_mask(path)] or images.values()
    by_id: dict[str, Pairs] = {}
    for part, paths in enumerate((named, masks.values())):
        for path in paths:
            by_id.setdefault(image_id(path), ([], []))[part].append(path)
    pairs, findings = list[Pair](), list[Finding]()
    for id_, (of_images, of_masks) in sorted(by_id.items()):
        files, what = of_images + of_masks, id_
        if len(of_images) == len(of_masks) == 1:
            pairs.append((files[0], files[1]))
            continue
        kind = "images without a mask" if of_images else "masks without an image"
        if len(files) > 1:
            kind, what = "ids that several files share", f"{id_}: {' and '.join(files)}"
        findings.append(Finding("error", kind, files[0], what))
    return pairs, findings


def find_images(image_dir: StrPath) -> list[str]:
    """Finds the images of a folder and its subfolders, sorted, to segment them without masks.

    Masks, by `MASK_NAME`, are ignored, and so are superpixels, hidden files and results.
    """
    files = _list_images(image_dir).values()
    paths = [path for path in files if not _is_mask(path)]
    _require(paths, f"{image_dir} holds only masks: give the folder of the images.")
    if lost := {image_id(path) for path in files} - set(map(image_id, paths)):
        warnings.warn(f"{image_dir}: ignored files named like masks ({len(lost)}: "
                      f"{_shorten(sorted(lost))}).", stacklevel=2)
    return paths


def _list_images(folder: StrPath) -> dict[str, str]:
    """Lists images by path without links to folders; warns of what else a user may take for one."""
    _require(os.path.isdir(folder), f"{folder} is not a folder: give the folder of the files.")
    paths, ignored, walked = dict[str, str](), Counter[str](), set[str]()
    errors = list[OSError]()
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        table = Path(parent, "findings.csv")  # with which each run of a driver begins
        readable = os.path.isfile(table) and os.access(table, os.R_OK)
        header = table.read_text(errors="replace").split("\n")[0] if readable else ""
        results = header == ",".join(Finding._fields) or {"scores.csv", "summary.json"} <= {*names}
        _require(not results or parent != str(folder), f"{folder} holds the results of an earlier "
                 "run among its images: move them to a folder of their own.")
        real = os.path.realpath(parent)
        if results or real in walked:  # or a link in a circle
            folders.clear()
            continue
        walked.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            path, other = os.path.join(parent, name), re.fullmatch(OTHER_IMAGE, name)
            image = re.fullmatch(IMAGE_NAME, name)
            if os.path.isfile(path) and image and not re.search(NO_IMAGE, Path(name).stem):
                paths[os.path.join(real, name)] = path
            elif other or (image and not os.path.exists(path)):
                ignored[other[1].lower() if other else "broken links"] += 1
    _require(not errors, " ".join(f"{e.filename}: cannot be read ({e.strerror})." for e in errors))
    counts = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common())
    _require(paths, f"{folder} holds no image (JPEG, PNG, BMP, TIFF, WebP)"
             f"{counts and f', but {counts}: convert them to PNG'}.")
    broken = [ascii(path) for path in paths.values() if re.search("[\ud800-\udfff]", path)]
    _require(not broken, f"These names are not UTF-8: {_shorten(broken)}. Rename the files.")
    if counts:
        warnings.warn(f"{folder}: ignored what cannot be read: {counts}.", stacklevel=3)
    return dict(sorted(paths.items(), key=lambda item: item[1]))


def _is_mask(path: StrPath) -> bool:
    return re.search(MASK_NAME, Path(path).stem) is not None


def _shorten(names: Sequence[str], most: int = 5) -> str:
    """Joins names as `"a, b, c"`, or as `"a, b, c, d, e and 72 more"`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _zip_pairs(image_paths: Paths, mask_paths: Paths | None) -> list[Pair]:
    """Pairs of paths, whose masks are `None` where there are none."""
    for paths in (image_paths, mask_paths):
        _require(not isinstance(paths, str | os.PathLike), f"{paths} is a single path: expected a "
                 "list, such as find_image_pairs and find_images return.")
    images = list(map(str, image_paths))
    masks = [None] * len(images) if mask_paths is None else list(map(str, mask_paths))
    counts = f"{len(images)} images came with {len(masks)} masks"
    _require(len(images) == len(masks), f"{counts}: expected one for each.")
    return list(zip(images, masks, strict=True))


def _check_image_size(image_size: Size, divisor: int = 1) -> Size:
    sides = tuple(image_size) if isinstance(image_size, Iterable) else ()
    valid = len(sides) == 2 and all(side in range(divisor, 2**16, divisor) for side in sides)
    multiple = f" divisible by {divisor}" if divisor > 1 else ""
    _require(valid, f"image_size is {image_size}: expected (height, width) in pixels{multiple}.")
    return int(sides[0]), int(sides[1])


def letterbox(size: Size, image_size: Size) -> tuple[int, int, int, int]:
    """Returns the box `(top, left, height, width)` in pixels of an image of `size` in a frame."""
    scale = min(image_size[0] / size[0], image_size[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return (image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width


def load_input_image(path: StrPath, image_size: Size | None = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Loads an image into a frame, or with `None` at its original resolution.

    The EXIF orientation is applied. Palette, greyscale, RGBA, CMYK and 16-bit images become RGB.
    """
    return _decode(path, [image_size], mask=False)[0]


def load_segmented_image(path: StrPath, image_size: Size | None = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Loads a mask into a frame like its image, or with `None` at its original resolution.

    A pixel is lesion where at least half of its area is. A JPEG may be only nearly 0 and 255.
    """
    return _decode(path, [image_size], mask=True)[0] // np.uint8(255)


def _decode(
    path: StrPath, image_sizes: Sequence[Size | None], *, mask: bool, fit_to: Size | None = None,
    notes: dict[str, str] | None = None, soft: bool = False
) -> list[Array]:
    """Decodes an image, or a mask for an image of `fit_to`, once and fits it into each frame.

    A mask is 0 and 255, a `soft` one anything between; `notes` receives what is unusual about it.
    """
    frames = [frame if frame is None else _check_image_size(frame) for frame in image_sizes]
    size = fit_to or _size_of(path)
    with _open_image(path) as image:
        if not mask:  # a JPEG is decoded at the smallest scale that has about twice the pixels
            box = np.max([letterbox(size, frame or size)[2:] for frame in frames], axis=0)
            height, width = box if size == (image.height, image.width) else box[::-1]
            image.draft("RGB", (int(1.9 * width), int(1.9 * height)))
        lossy, turn = image.format in ("JPEG", "MPO"), TURNS[_orientation(image)]
        if turn is not None:  # as ImageOps.exif_transpose, which stumbles over odd EXIF tags
            image = image.transpose(Image.Transpose(turn))
        notes = {} if notes is None else notes
        image = _to_mask(image, notes, lossy, soft) if mask else _to_rgb(image)
        fitted = [np.atleast_3d(np.asarray(_fit(image, size, frame))) for frame in frames]
    return [(levels >= 128) * np.uint8(255) for levels in fitted] if mask and not soft else fitted


@contextlib.contextmanager
def _open_image(path: StrPath) -> Iterator[Image.Image]:
    """Opens an image; what fails inside the block is an error that names the file."""
    try:
        _require(os.path.exists(path), "there is no such file.")
        with open(path, "rb") as file:
            start = file.peek(12)
            heic, jpeg = start[4:8] == b"ftyp", start[:2] == b"\xff\xd8"
            _require(not heic, "is a HEIC or AVIF file by content: convert it to JPEG.")
            # Image.open has a limit of 179 megapixels; a JPEG is decoded at a reduced scale.
            image = jpeg_factory(file) if jpeg else Image.open(file, formats=FORMATS)
            pixels, most = image.width * image.height, 2**28 if jpeg else 2**26
            _require(pixels <= most, f"has {pixels} pixels, but the limit is {most}: "
                     "scale it down or leave it out.")
            yield image
    except SegmentError as error:
        raise SegmentError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        what = f"{path}: cannot be read as an image ({error})"
        raise SegmentError(f"{what}: replace the file or leave it out.") from error


def _orientation(image: Image.Image) -> int:
    # The base class reads the header alone, where that of a PNG decodes the image. Pillow applies
    # the orientation of a TIFF itself.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return int(orientation) if image.format != "TIFF" and orientation in range(1, 9) else 1


def _size_of(path: StrPath) -> Size:
    """`(height, width)` after the EXIF orientation, from the header."""
    with _open_image(path) as image:
        return image.size if _orientation(image) > 4 else image.size[::-1]


def _check_same_size(image_path: StrPath, mask_path: StrPath, fit: bool = False) -> Size:
    """Returns the size of a pair; refuses a mask of another one, but with `fit` resizable ones."""
    (height, width), (rows, columns) = _size_of(image_path), _size_of(mask_path)
    if (height, width) == (rows, columns):
        return height, width
    with _open_image(image_path) as image:
        turned = image.size == (columns, rows)
    close = max(abs(height - rows), abs(width - columns)) <= 3
    scaled = abs(height * columns - width * rows) <= max(height, width)
    cause = "is off by a few pixels" if close else "has another scale" if scaled else ""
    if fit and cause and not turned:
        return height, width
    how = f"it {cause}, which --fit-masks (PairCache(fit_masks=True)) accepts" if cause else \
          "expected a mask of the size of its image"
    if turned:
        how = "it fits the photo only without its EXIF orientation; turn it"
    raise SegmentError(f"{image_path} is {height} × {width} (height × width), but its mask "
                       f"{mask_path} is {rows} × {columns}: {how}.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # grey levels of more than 8 bits, which Pillow would clip
        levels = np.asarray(image)
        low, high = levels.min(), levels.max()
        _require(image.mode != "F" and low >= 0 and high <= 65535, f"its grey levels are "
                 f"{levels.dtype} from {low:g} to {high:g}: expected 8 or 16 bits without a sign; "
                 "convert it.")
        image = Image.fromarray((levels >> 8 if high > 255 else levels).astype(np.uint8))
    if image.mode == "P":  # Pillow converts a translucent palette correctly only through RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_mask(image: Image.Image, notes: dict[str, str], lossy: bool, soft: bool) -> Image.Image:
    """Returns a mask of 0 and 255, or a soft one as it is; an error names the values of others."""
    if image.mode == "L" and not lossy and not any(image.histogram()[1:255]):
        return image  # as nearly all masks are
    if soft:
        shades = _to_rgb(image).convert("L")
        if shades.getextrema()[1] not in (1, shades.getextrema()[0]):  # or alpha may hold the mask
            return shades
    if image.has_transparency_data:
        return _by_alpha(image.convert("RGBA"), notes)
    grey = np.asarray(image if image.mode[0] in "IF" else image.convert("L"))
    levels = np.unique(grey)
    white = int(levels[-1]) if levels[-1] in (1, 255, 65535) and not lossy else 255
    if not np.isin(levels, (0, white)).all():
        # A mask with soft edges has black, white and hardly anything in between, in thin lines.
        between = (grey >= 24) & (grey < 232)
        thin = between.mean() < 0.03 and not ndimage.binary_erosion(between, np.ones((5, 5))).any()
        if not (levels[0] < 24 and 232 <= levels[-1] <= 255 and thin):
            return _by_rim(image, notes)
        if not lossy or between.mean() >= 0.01:
            notes["masks with soft edges"] = "its edges are soft and are thresholded at half"
    return Image.fromarray(grey >= white / 2).convert("L")


def _by_rim(image: Image.Image, notes: dict[str, str]) -> Image.Image:
    """The mask of two levels or colours, of which the one that is rarer at the border is lesion."""
    levels, template = np.asarray(image), "{:g}"
    if image.mode[0] not in "IFL":  # colours, which may be equally bright
        levels, template = np.asarray(image.convert("RGB"), np.int32) @ (65536, 256, 1), "#{:06x}"
    names = [template.format(level) for level in np.unique(levels)]
    _require(len(names) == 2, "expected a mask of 0 and 255 (or 0 and 1), but it has "
             f"{len(names)} values ({_shorten(names)}): threshold it, or read it as a soft mask.")
    high = levels == levels.max()
    lesion = int(np.concatenate([high[0], high[-1], high[:, 0], high[:, -1]]).mean() <= 0.5)
    which = f"{names[lesion]} is lesion, as it is rarer at the border"
    notes["masks of two other levels"] = f"it holds {names[0]} and {names[1]}; {which}"
    return Image.fromarray(high == lesion).convert("L")


def _by_alpha(image: Image.Image, notes: dict[str, str]) -> Image.Image:
    """The mask in the alpha channel if the colours are constant, or in the colours if alpha is."""
    colors, alpha = image.convert("RGB"), image.getchannel("A")
    varied = [part for part in (colors, alpha) if part.getcolors(1) is None] or [colors]
    masks = [_to_mask(part, notes, lossy=False, soft=False) for part in varied]
    _require(masks[0].tobytes() == masks[-1].tobytes(),
             "its colours and its alpha channel hold two different masks: keep one.")
    if varied == [alpha]:
        notes["masks in the alpha channel"] = "the lesion is in its alpha channel"
    return masks[0]


def _fit(image: Image.Image, size: Size, image_size: Size | None) -> Image.Image:
    """Resizes an image whose original size is `size` to its letterbox in a black frame."""
    if image_size is None:
        return image.resize(size[::-1])
    top, left, height, width = letterbox(size, image_size)
    # Pillow's bilinear filter covers all source pixels; to average blocks first is faster.
    image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
    return image.crop((-left, -top, image_size[1] - left, image_size[0] - top))  # black around it


class PairCache:
    """Decodes each pair once and keeps it, in memory up to a budget and in a folder if asked.

    With `fit_masks`, masks of another scale or off by up to 3 pixels are resized to their images;
    with `soft_masks` they keep their grey levels. A pair takes 4 bytes of memory per pixel of the
    frame; the folder holds plain `.npy` files until its disk is full, and several processes may
    share it. A file that changed, by its length or modification time, is decoded again.
    """

    def __init__(
        self, max_bytes: int = 2**31, folder: StrPath | None = None, *, fit_masks: bool = False,
        soft_masks: bool = False
    ) -> None:
        self.bytes_left, self.fit_masks, self.soft_masks = max_bytes, fit_masks, soft_masks
        self.folder, self.full = None if folder is None else Path(folder), False
        self.notes: dict[str, dict[str, str]] = {}  # of masks, what is unusual about their values
        self._kept: dict[str, Array] = {}
        self._lock = threading.Lock()  # of budget, `full` and pairs, which several threads change
        if self.folder is not None:
            _check_file_to_write(self.folder / "pair.npy")
            _remove_leftovers(self.folder)

    def load(self, image_path: str, mask_path: str | None, *image_sizes: Size) -> Array:
        """Returns a pair in the first frame, and keeps it in all; no mask file: an empty mask."""
        names = [_entry_name(image_path, mask_path, f, self.soft_masks) for f in image_sizes]
        if (found := self._find(names[0], image_sizes[0])) is not None:
            return found
        pictures = _decode(image_path, image_sizes, mask=False)
        masks = [np.zeros_like(picture[..., :1]) for picture in pictures]
        notes: dict[str, str] = {}
        if mask_path is not None:
            size = _check_same_size(image_path, mask_path, self.fit_masks)
            masks = _decode(mask_path, image_sizes, mask=True, fit_to=size, notes=notes,
                            soft=self.soft_masks)
            self.notes[mask_path] = notes
        pairs = [np.concatenate(pair, axis=2) for pair in zip(pictures, masks, strict=True)]
        for name, pair in zip(names, pairs, strict=True):
            if not notes and not self.fit_masks:  # what is unusual is found again in the next run
                self._write(name, pair)
            self._keep(name, pair)
        return pairs[0]

    def _find(self, name: str, image_size: Size) -> Array | None:
        if name not in self._kept and self.folder is not None:
            with contextlib.suppress(Exception):  # absent, or damaged in any way
                pair: Array = np.load(self.folder / f"{name}.npy", allow_pickle=False)
                if pair.shape == (*image_size, 4) and pair.dtype == np.uint8:
                    self._keep(name, pair)
                    return pair
        return self._kept.get(name)

    def _keep(self, name: str, pair: Array) -> None:
        with self._lock:
            if name not in self._kept and pair.nbytes <= self.bytes_left:
                self.bytes_left -= pair.nbytes
                self._kept[name] = pair

    def _write(self, name: str, pair: Array) -> None:
        if self.folder is None or self.full:
            return
        try:
            with _written_whole(self.folder / f"{name}.npy") as temporary:
                np.save(temporary, pair)
        except SegmentError as error:
            with self._lock:  # so that only the first thread warns
                if not self.full:
                    warnings.warn(f"No more pairs are kept in a folder: {error}", stacklevel=3)
                self.full = True


def _entry_name(image_path: str, mask_path: str | None, image_size: Size, soft: bool) -> str:
    identity: list[Any] = [image_size, soft]
    for path in filter(None, (image_path, mask_path)):
        identity.append(os.path.abspath(path))
        with contextlib.suppress(OSError):  # reported by decoding
            status = os.stat(path)
            identity += [status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


# --- 2. Inspection: image sizes, unusable and unusual files -----------------------------------

def inspect(image_paths: Iterable[StrPath], *, skip_bad: bool = False) -> dict[Size, int]:
    """Returns `{(height, width): count}` of the images, the most frequent size first."""
    sizes, ignored = list[Size](), (SegmentError,) if skip_bad else ()
    for path in image_paths:
        with contextlib.suppress(*ignored):
            sizes.append(_size_of(path))
    return dict(Counter(sorted(sizes)).most_common())  # of two equally frequent the smaller first


def plot_image_sizes(sizes: Mapping[Size, int], *, most: int = 20) -> Figure:
    """Plots what `inspect` returned; the sizes beyond the `most` frequent share a bar."""
    bars = Counter[str]()
    for i, ((height, width), count) in enumerate(sizes.items()):
        bars[f"{height} × {width}" if i < most else f"{len(sizes) - most} other sizes"] += count
    figure, ((axes,),) = _subplots(1, 1, width=7, height=1.5 + 0.26 * len(bars))
    axes.bar_label(axes.barh(list(bars), list(bars.values()), color="tab:blue"), padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    total = f"{sum(sizes.values())} images, {len(sizes)} different sizes"
    axes.set(title=f"{total} (height × width in pixels)", xlabel="Images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def check_pairs(
    image_paths: Paths, mask_paths: Paths | None = None, *,
    image_sizes: Sequence[Size] = (IMAGE_SIZE,), cache: PairCache | None = None, verbose: int = 0
) -> list[Finding]:
    """Checks every file before a training that would fail on it an hour later.

    Errors are files that cannot be read, masks of more than two values unless their edges are soft,
    and masks of another size than their image. Warnings are an unexpected format or mode, further
    pages, duplicates, and masks that may be rotated, hold unusual values, were resized, are empty,
    full or probably inverted, or have several regions or holes. Masks are examined in the first of
    the frames. Errors come first; of a pair with errors, the first one is returned.
    """
    pairs = _zip_pairs(image_paths, mask_paths)
    sizes, cache = [_check_image_size(size) for size in image_sizes], cache or PairCache(0)
    progress = keras.utils.Progbar(len(pairs), verbose=verbose, unit_name="pair checked")
    findings = []
    with ThreadPoolExecutor() as pool:
        for found in pool.map(functools.partial(_check_pair, sizes, cache), pairs):
            findings += found
            progress.add(1)
    findings += _find_duplicates([(image, image) for image, _ in pairs], "images")
    findings += _find_duplicates([(mask, image) for image, mask in pairs if mask], "masks")
    return sorted(findings, key=lambda finding: finding.severity)


def _check_pair(image_sizes: Sequence[Size], cache: PairCache, pair: Pair) -> list[Finding]:
    image_path, mask_path = pair
    try:
        decoded = cache.load(image_path, mask_path, *image_sizes)
        found = [(image_path, *unusual) for unusual in _unusual_file(image_path, "RGB")]
        if mask_path is not None:
            mask = _crop(decoded[..., 3] >= 128, _size_of(image_path))
            found += [(mask_path, *unusual) for unusual in itertools.chain(
                cache.notes.get(mask_path, {}).items(), _unusual_file(mask_path, "L", "1", "P"),
                _unusual_mask(image_path, mask_path, mask))]
    except SegmentError as error:
        return [Finding("error", "unusable files", image_path, str(error))]
    return [Finding("warning", kind, image_path, f"{path}: {what}.") for path, kind, what in found]


def _unusual_file(path: str, *modes: str) -> Iterator[tuple[str, str]]:
    """Yields `(kind, what)` of a file."""
    expected = Image.registered_extensions().get(Path(path).suffix.lower())
    with _open_image(path) as image:
        if expected is not None and image.format not in (expected, "MPO"):  # a JPEG with a preview
            yield "wrong suffixes", f"the suffix says {expected}, but the file is a {image.format}"
        if image.mode not in modes:
            yield f"mode {image.mode}", f"the mode is {image.mode}, where {modes[0]} is usual"
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":
            yield "files of several pages", f"it has {pages} pages, of which the first is used"


def _unusual_mask(image_path: str, mask_path: str, mask: Mask) -> Iterator[tuple[str, str]]:
    """Yields `(kind, what)` where a mask does not fit its image, or is as no expert would draw."""
    (height, width), (rows, columns) = _size_of(image_path), _size_of(mask_path)
    if (height, width) != (rows, columns):
        yield "resized masks", f"it was resized from {rows} × {columns} to {height} × {width}"
    with _open_image(image_path) as image, _open_image(mask_path) as drawn:
        orientation = _orientation(image)
        if orientation != _orientation(drawn) == 1 and image.size == drawn.size:
            what = f"the photo has EXIF orientation {orientation}, but its mask has none"
            yield "orientations", f"{what} and may be rotated or mirrored"
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if not mask.any():
        yield "empty masks", f"the mask is empty at {mask.shape[0]} × {mask.shape[1]} pixels"
    elif mask.all():
        yield "full masks", "the mask is full"
    elif rim.mean() > 0.9:
        yield "inverted masks", "the mask is probably inverted, since its border is lesion"
    if (regions := ndimage.label(mask, np.ones((3, 3)))[1]) > 1:
        yield "masks of several regions", f"the mask has {regions} regions"
    if holes := ndimage.label(_fill_holes(mask) & ~mask)[1]:
        yield "masks with holes", f"the mask has holes ({holes})"


def _fill_holes(mask: Mask) -> Mask:
    """Fills what the background outside does not reach; `scipy`'s function takes much longer."""
    background = ndimage.label(~np.pad(mask, 1))[0]
    return np.asarray(background != background[0, 0])[1:-1, 1:-1]


def _find_duplicates(files: Sequence[tuple[str, str]], kind: str) -> Iterator[Finding]:
    """Finds files of equal content among `(path, image)`."""
    first: dict[bytes, str] = {}
    for path, image in files:
        digest = _digest(path)
        if digest and first.setdefault(digest, path) != path:
            what = f"{path}: a duplicate of the {kind[:-1]} {first[digest]}."
            yield Finding("warning", f"duplicate {kind}", image, what)


def _digest(path: StrPath) -> bytes:
    """SHA-256 of the content, empty for a file that cannot be read."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).digest()
    return b""


def usable_pairs(
    image_paths: Paths, mask_paths: Paths | None = None, *, skip_bad: bool = False,
    training: bool = False, findings: Sequence[Finding] = (), output_dir: StrPath | None = None,
    **options: Any
) -> tuple[list[str], list[str], list[Finding]]:
    """Returns `(image_paths, mask_paths, findings)` after `check_pairs`, which takes the options.

    What is unusual is a warning, one for each kind. The error for pairs that cannot be used lists
    all of them. In `training`, masks that are nearly all empty, full or equal are an error as well.
    Earlier `findings` are added, and all are written to `findings.csv` in the output folder.
    """
    if output_dir is not None:
        _check_file_to_write(Path(output_dir) / "findings.csv")  # before decoding
    new = check_pairs(image_paths, mask_paths or None, **options)
    findings = [*findings, *new]
    if output_dir is not None:
        rows = [finding._asdict() for finding in findings]
        _write_table(Path(output_dir) / "findings.csv", rows, Finding._fields)
    pairs, kinds = _zip_pairs(image_paths, mask_paths or None), Counter(f.kind for f in new)
    bad = {finding.path: finding.what for finding in new if finding.severity == "error"}
    listed = "".join(f"\n  {what}" for what in bad.values())
    _require(len(bad) < len(pairs), f"None of the images can be used: fix the files.{listed}")
    _require(not bad or skip_bad, f"{len(bad)} of {len(pairs)} images cannot be used: fix the "
             f"files, or leave them out with --skip-bad (skip_bad=True).{listed}")
    blank, same = kinds["empty masks"] + kinds["full masks"], kinds["duplicate masks"] + 1
    for number, what in ((blank, "empty or full"), (same, "equal")):
        _require(not training or number < max(3, 0.9 * len(pairs)), f"{number} of {len(pairs)} "
                 f"masks are {what}: export each mask again, in black and white, without "
                 "transparency.")
    for kind, count in kinds.items():
        first = next(finding for finding in new if finding.kind == kind)
        left_out = "left out: " if first.severity == "error" else ""
        several = f"{kind}: {count} files, first " if count > 1 else ""
        warnings.warn(f"{left_out}{several}{first.what}", stacklevel=2)
    return *_unzip([[pair for pair in pairs if pair[0] not in bad]]), findings


# --- 3. Split: at random, the images of one lesion together -----------------------------------

def find_same_lesions(
    image_paths: Paths, mask_paths: Paths, *, image_size: Size = IMAGE_SIZE,
    cache: PairCache | None = None
) -> list[list[str]]:
    """Finds the images of each lesion that occurs more than once; a split keeps them together.

    They may differ in light, colour, zoom and crop, and be rotated or mirrored: this shifts or
    reverses samples on circles around the centre, but keeps the magnitudes of their Fourier
    coefficients. Nearest neighbours by magnitude are compared by the highest correlation over all
    rotations. An image similar to more than four others has a common shape and belongs to no group.
    Soft or resized masks need the `cache` that reads them.
    """
    lesions = _group_lesions(_zip_pairs(image_paths, mask_paths), image_size, cache)
    return [[image for image, _ in lesion] for lesion in lesions if len(lesion) > 1]


def _group_lesions(pairs: list[Pair], image_size: Size, cache: PairCache | None) -> Lesions:
    """Groups the pairs that show the same lesion, in the order of the first of each."""
    if len(pairs) < 2:
        return [pairs]
    size, cache = _check_image_size(image_size), cache or PairCache(0)
    with ThreadPoolExecutor() as pool:
        signature_of = functools.partial(_lesion_signature, size, cache)
        signatures = np.stack(list(pool.map(signature_of, pairs)))
    unread = [pair[0] for pair, found in zip(pairs, signatures, strict=True) if not found.any()]
    if unread:
        warnings.warn(f"{len(unread)} pairs are blank or cannot be read ({_shorten(unread)}): "
                      "their lesions are not grouped.", stacklevel=3)
    magnitudes = np.abs(signatures).reshape(len(pairs), -1)
    search = NearestNeighbors(n_neighbors=min(8, len(pairs) - 1), algorithm="brute")
    links = search.fit(magnitudes).kneighbors_graph()  # sparse, (pairs, pairs)
    neighbors = links.indices.reshape(len(pairs), -1)
    similarity = [_similarity(signatures, signatures[column]) for column in neighbors.T]
    similar = np.stack(similarity, axis=1) >= SAME_LESION
    crowded = similar.sum(1) > 4
    links.data = (similar & ~crowded[:, None] & ~crowded[neighbors]).ravel()
    links.eliminate_zeros()
    count, numbers = sparse.csgraph.connected_components(links, directed=False)
    return [[pairs[i] for i in np.flatnonzero(numbers == number)] for number in range(count)]


def _lesion_signature(image_size: Size, cache: PairCache, pair: Pair) -> NDArray[np.complex64]:
    """Fourier coefficients of a lesion on circles around its centre, `(RINGS, ANGLES / 2 + 1)`.

    A band-pass removes light and colour; the weights remove the ellipse that most lesions are.
    """
    try:
        decoded = cache.load(*pair, image_size)
    except SegmentError:
        return np.zeros((RINGS, ANGLES // 2 + 1), np.complex64)
    image, mask = decoded[..., :3], decoded[..., 3] >= 128
    rows, columns = np.nonzero(mask if mask.any() else np.ones_like(mask))
    y, x, reach = rows.mean(), columns.mean(), 1.4 * math.sqrt(len(rows) / math.pi)
    patch = Image.fromarray(image).convert("L").crop((x - reach, y - reach, x + reach, y + reach))
    grey = np.asarray(patch.resize((64, 64), Image.Resampling.BILINEAR), np.float32)
    inside = ndimage.binary_erosion(grey > 20).astype(np.float32)  # neither padding nor vignette
    blur = ndimage.gaussian_filter
    fine, coarse = (blur(grey * inside, s) / (blur(inside, s) + 1e-3) for s in (1, 4))
    radius = np.linspace(2, 31, RINGS)[:, None]
    angle = np.linspace(0, 2 * math.pi, ANGLES, endpoint=False)
    points = 31.5 + radius * np.sin(angle), 31.5 + radius * np.cos(angle)
    rings = ndimage.map_coordinates((fine - coarse) * inside, points, order=1)
    rings = np.clip(rings / (rings.std() + 1e-3), -2.5, 2.5) * np.sqrt(radius)
    spectrum = np.fft.rfft(rings) * np.minimum(1, np.arange(ANGLES // 2 + 1) / 8)
    return (spectrum / (np.linalg.norm(spectrum) + 1e-6)).astype(np.complex64)


def _similarity(signatures: Array, others: Array) -> Array:
    """The highest correlation over all rotations, mirrored or not: 1 for equal images."""
    pair = signatures, signatures.conj()
    turns = (np.fft.irfft((s * others.conj()).sum(1), ANGLES) for s in pair)
    return np.asarray(ANGLES / 2 * np.maximum(*(turn.max(1) for turn in turns)))


def train_val_test_split(
    image_paths: Paths, mask_paths: Paths, *, val_split: float = 0.2, test_split: float = 0.03,
    seed: int = 0, image_size: Size = IMAGE_SIZE, cache: PairCache | None = None
) -> tuple[Pairs, Pairs, Pairs]:
    """Splits pairs at random, the same way for the same seed, each pair into exactly one set.

    `test_split` is the test fraction of all pairs, `val_split` the validation fraction of the rest,
    both in [0, 1): with the defaults 2594 pairs become 2014, 503 and 77. Counts are rounded down,
    but a fraction above 0 gets at least one lesion. The images that `find_same_lesions` groups stay
    together; if this changes the size of a set, a warning says so.
    """
    _check_seed(seed)
    lesions = _group_lesions(_zip_pairs(image_paths, mask_paths), image_size, cache)
    rest, test = _draw(lesions, test_split, seed, "test_split")
    train, val = _draw(rest, val_split, seed, "val_split")
    return _unzip(train), _unzip(val), _unzip(test)


def cross_validation_splits(
    image_paths: Paths, mask_paths: Paths, folds: int, *, val_split: float = 0.2, seed: int = 0,
    image_size: Size = IMAGE_SIZE, cache: PairCache | None = None
) -> list[tuple[Pairs, Pairs, Pairs]]:
    """Returns a split for each fold, so that every pair is in the test set of exactly one.

    `val_split` is the validation fraction of the other pairs. The images that `find_same_lesions`
    groups stay together. The test sets have the same number of lesions, give or take one.
    """
    _check_seed(seed)
    lesions = _group_lesions(_zip_pairs(image_paths, mask_paths), image_size, cache)
    enough = 2 <= folds <= len(lesions)
    _require(enough, f"folds is {folds}: expected 2 to {len(lesions)}, the number of lesions.")
    splits = []
    for rest, test in KFold(folds, shuffle=True, random_state=seed).split(lesions):
        train, val = _draw([lesions[i] for i in rest], val_split, seed, "val_split")
        splits.append((_unzip(train), _unzip(val), _unzip(lesions[i] for i in test)))
    return splits


def _draw(lesions: Lesions, fraction: float, seed: int, name: str) -> tuple[Lesions, Lesions]:
    """Draws lesions at random until they hold a fraction of the pairs: `(rest, drawn)`."""
    _require(0 <= fraction < 1, f"{name} is {fraction}: expected a fraction in [0, 1).")
    pairs = sum(map(len, lesions))
    _require(len(lesions) > 1 or fraction == 0, f"{pairs} pairs are too few for a {name} of "
             f"{fraction}: expected at least two lesions, or a {name} of 0.")
    count = max(1, math.floor(fraction * pairs + 1e-9)) if fraction else 0  # 0.29 * 100 < 29
    wanted = max(count, min(map(len, lesions))) if count else 0
    rest, drawn = Lesions(), Lesions()
    for lesion in shuffle(lesions, random_state=seed):
        if len(lesion) <= wanted:
            drawn.append(lesion)
            wanted -= len(lesion)
        else:
            rest.append(lesion)
    held_out = sum(map(len, drawn))
    if held_out != count:
        warnings.warn(f"{held_out} pairs are held out rather than {count}: the images of one "
                      "lesion stay together.", stacklevel=3)
    return rest, drawn


def _check_seed(seed: int) -> None:
    whole = isinstance(seed, int | np.integer) and 0 <= seed < 2**32
    _require(whole, f"seed is {seed}: expected a whole number from 0 to 2^32 - 1.")


def _unzip(lesions: Iterable[Iterable[Pair]]) -> Pairs:
    pairs = [pair for lesion in lesions for pair in lesion]
    return [image for image, _ in pairs], [mask for _, mask in pairs if mask]


# --- 4. Generators: batches of images and masks, augmented on demand --------------------------

# The default caches, of soft masks and of others: one budget each, freed with its last generator.
_shared: weakref.WeakValueDictionary[bool, PairCache] = weakref.WeakValueDictionary()


@dataclasses.dataclass(eq=False)
class ImageGenerator(keras.utils.PyDataset):  # type: ignore[misc]
    """Loads batches for `fit`, `evaluate` and `predict`.

    A batch is `uint8 (N, height, width, 3)` images, followed by `uint8 (N, height, width, 1)` masks
    (soft ones: `float32`) unless `mask_paths` is `None`. All randomness derives from `(seed, epoch,
    image)` and never from the order of calls, since Keras loads batches ahead of time and from
    several threads.

    Args:
        batch_size: Images per batch; the last batch may be shorter.
        shuffle: Whether each epoch has a new order of the images.
        augment: Whether images and masks are mirrored, rotated, zoomed, stretched and shifted
            together, and images changed in colour, gamma, contrast and sharpness.
        seed: Determines order and augmentation.
        cache: By default all generators with the same kind of masks share 2 GiB of memory.
        whole_batches: Whether to drop a shorter last batch, as several devices require.
        soft_masks: Whether masks are soft; a `cache` needs the same setting.
        workers: Threads that load batches. With 1, TensorFlow tunes the loading, and the end of its
            thread may delay the next epoch by up to a minute (a race in `tf.data`).
    """

    image_paths: Paths
    mask_paths: Paths | None = None
    _: dataclasses.KW_ONLY
    image_size: Size = IMAGE_SIZE
    batch_size: int = 8
    shuffle: bool = False
    augment: bool = False
    seed: int = 0
    cache: PairCache = None  # type: ignore[assignment]  # until __post_init__
    whole_batches: bool = False
    soft_masks: dataclasses.InitVar[bool] = False
    workers: dataclasses.InitVar[int] = 2

    def __post_init__(self, soft_masks: bool, workers: int) -> None:
        super().__init__(workers=workers)
        self.pairs = _zip_pairs(self.image_paths, self.mask_paths)
        self.cache = self.cache or _shared.setdefault(soft_masks, PairCache(soft_masks=soft_masks))
        _require(self.cache.soft_masks or not soft_masks, "This cache reads masks of 0 and 255: "
                 "expected PairCache(soft_masks=True).")
        self.epoch = 0  # selects order and augmentation
        self.image_size = _check_image_size(self.image_size)
        _check_seed(self.seed)
        size, count = self.batch_size, len(self.pairs)
        _require(size >= 1, f"batch_size is {size}: expected 1 or more images per batch.")
        _require(len(self) > 0, f"{count} images do not fill a batch of {size}: expected at least "
                 "one image, or batch_size of them with whole_batches.")

    def __len__(self) -> int:
        batches = len(self.pairs) / self.batch_size
        return math.floor(batches) if self.whole_batches else math.ceil(batches)

    def __getitem__(self, index: int) -> Array | tuple[Array, Array]:
        pairs = self.batch_part(index, *_this_host())
        images, masks = pairs[..., :3], pairs[..., 3:]
        if self.mask_paths is None:
            return images
        # A mask of 0 and 255 is lesion from 128 on.
        return images, (masks / np.float32(255) if self.cache.soft_masks else masks >> 7)

    def batch_part(self, index: int, part: int = 0, parts: int = 1) -> Array:
        """The pairs of a batch, `uint8 (N, height, width, 4)`, or one of its equal parts."""
        epoch = self.epoch  # read once, as Keras loads batches while it ends an epoch
        order = np.arange(len(self.pairs))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        return np.stack([self._load(i, epoch) for i in np.array_split(chosen, parts)[part]])

    def _load(self, i: int, epoch: int) -> Array:
        if not self.augment:
            return self.cache.load(*self.pairs[i], self.image_size)
        # Augmentation zooms in, so it needs more pixels than the frame has.
        twice = (2 * self.image_size[0], 2 * self.image_size[1])
        rng = np.random.default_rng((self.seed, epoch, int(i)))
        return _augment(self.cache.load(*self.pairs[i], twice), self.image_size, rng)

    def on_epoch_end(self) -> None:
        """Advances to the next order and augmentation; called by Keras."""
        self.epoch += 1


del ImageGenerator.workers  # the default, which would hide the property of Keras
create_generator = ImageGenerator  # as the original calls it


def _augment(pair: Array, image_size: Size, rng: np.random.Generator) -> Array:
    """Changes the geometry of a pair and the colours of its image.

    The nearest pixel at twice the size, then the mean of four, takes half the time of
    interpolation. The mean of a mask is rounded, so a pixel is lesion where two of four are.
    """
    source, twice = (pair.shape[1], pair.shape[0]), (2 * image_size[1], 2 * image_size[0])
    affine = _random_affine(source, twice, rng)
    four_bands = Image.frombytes("CMYK", source, pair.tobytes())
    moved = four_bands.transform(twice, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST)
    pair = np.array(moved.reduce(2))
    picture = Image.fromarray(pair[..., :3]).point(_random_colors(rng))
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.25, 1.5)))
    pair[..., :3] = picture
    return pair


def _random_affine(source: Size, size: Size, rng: np.random.Generator) -> tuple[float, ...]:
    """Upright or at any angle, mirrored or not, stretched by up to 12 %, zoomed by 0.75 to 2.2.

    The more it zooms in, the further from the centre it may look. Maps `source` to `size`, both
    `(width, height)`, by Pillow's `(a, b, c, d, e, f)`: `(x, y)` shows what was at
    `(ax + by + c, dx + ey + f)`.
    """
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else 0.0
    zoom = math.exp(rng.uniform(math.log(0.75), math.log(2.2))) if rng.random() < 0.75 else 1.0
    stretch = math.exp(rng.uniform(-0.12, 0.12))
    mirror = rng.choice((-1, 1))
    step = source[0] / size[0] / zoom
    a, b = (mirror * step * stretch * part for part in (math.cos(angle), math.sin(angle)))
    d, e = (step / stretch * part for part in (-math.sin(angle), math.cos(angle)))
    reach = 0.06 + 0.2 * max(0.0, zoom - 1)
    x, y = (0.5 + rng.uniform(-reach, reach, 2)) * size  # where the old centre moves to
    return a, b, source[0] / 2 - a * x - b * y, d, e, source[1] / 2 - d * x - e * y


def _random_colors(rng: np.random.Generator) -> list[int]:
    """A table of 3 x 256 levels: brightness, tint, gamma, contrast. Black and the padding stay."""
    gains = rng.uniform(0.85, 1.15) * rng.uniform(0.85, 1.15, (3, 1))
    gamma = math.exp(rng.uniform(math.log(0.7), math.log(1.4)))
    table = gains * np.linspace(0, 1, 256) ** gamma
    table[:, 1:] += rng.uniform(-0.2, 0.2) * (table[:, 1:] - table.mean())
    return [int(level) for level in (255 * table).clip(0, 255).round().ravel()]


# --- 5. Model: the improved UNet of Isensee et al. 2018, in two dimensions --------------------

def create_model(
    image_size: Size = IMAGE_SIZE, *, num_filters: int = 16, dropout: float = 0.3,
    bfloat16: bool = False
) -> keras.Model:
    """Creates the improved UNet, uncompiled (Isensee et al. 2018, arXiv:1802.10508).

    It maps images, `uint8` or float in 0..255, to probabilities. The encoder has five levels of
    pre-activation residual context modules, the decoder localization modules; the lesion maps of
    the three finest levels are summed. With the defaults it has 3,188,435 parameters.

    Args:
        image_size: Frame of the network, divisible by 16.
        num_filters: Filters of the finest level; each coarser level has twice as many.
        dropout: Fraction of whole feature maps that a context module drops (Tompson et al. 2015,
            arXiv:1411.4280), since neighbouring pixels carry the same information.
        bfloat16: Whether to compute in bfloat16, which is faster on recent processors and GPUs;
            weights and output stay float32. With `False`, Keras' dtype policy applies.
    """
    _require(num_filters >= 1, f"num_filters is {num_filters}: expected 1 or more.")
    _require(0 <= dropout < 1, f"dropout is {dropout}: expected a fraction in [0, 1).")
    inputs = keras.Input((*_check_image_size(image_size, 16), 3), name="image")
    scaled = layers.Rescaling(1 / 255, dtype="float32", name="rescaling")(inputs)
    lesion = _localization_pathway(_context_pathway(scaled, num_filters, dropout), num_filters)
    outputs = layers.Activation("sigmoid", dtype="float32", name="lesion_probability")(lesion)
    model = keras.Model(inputs, outputs, name="improved_unet")
    return _recast(model, "mixed_bfloat16") if bfloat16 else model


def _recast(model: keras.Model, dtype: str, name: str | None = None) -> keras.Model:
    """An uncompiled copy that computes in another dtype; its ends stay float32."""
    def recast(layer: Any) -> Any:
        """A new layer with the same settings in the other dtype."""
        if not isinstance(layer, keras.Layer):  # but a flip, which has no dtype of its own
            return type(layer).from_config(layer.get_config())
        end = isinstance(layer, (layers.Rescaling, layers.Activation, layers.Average))
        return type(layer).from_config({**layer.get_config(), "dtype": "float32" if end else dtype})

    network = keras.Model(model.inputs[0], model.outputs[0], name=name or model.name)  # uncompiled
    copy = keras.models.clone_model(network, clone_function=recast, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


NHWC = {"data_format": "channels_last"}  # whatever the user's keras.json says
_convolution = functools.partial(
    layers.Conv2D, padding="same", kernel_initializer="he_normal", **NHWC)


def _context_pathway(x: Tensor, num_filters: int, dropout: float) -> list[Tensor]:
    """The features of levels 1 to 5, each at half the resolution of the one before."""
    features = []
    for level in range(1, 6):
        name, filters = f"level{level}_context", num_filters * 2 ** (level - 1)
        x = _convolution(filters, 3, strides=min(level, 2), name=f"level{level}_conv")(x)
        y = _convolution(filters, 3, name=f"{name}1_conv")(_norm_relu(x, f"{name}1"))
        y = layers.SpatialDropout2D(dropout, name=f"{name}_dropout", **NHWC)(y)
        y = _convolution(filters, 3, name=f"{name}2_conv")(_norm_relu(y, f"{name}2"))
        x = layers.Add(name=f"{name}_add")([x, y])  # a pre-activation residual block
        features.append(x)  # (N, H / 2^(level - 1), W / 2^(level - 1), filters)
    return features


def _localization_pathway(features: list[Tensor], num_filters: int) -> Tensor:
    """The summed lesion map (logits, full resolution) of levels 3, 2 and 1."""
    *skips, x = features
    x = _norm_relu(x, "level5_out")
    lesion = None
    for level in (4, 3, 2, 1):
        name, filters = f"level{level}", num_filters * 2 ** (level - 1)
        x = layers.UpSampling2D(2, name=f"{name}_up_repeat", **NHWC)(x)
        x = _norm_relu(_convolution(filters, 3, name=f"{name}_up_conv")(x), f"{name}_up")
        x = layers.Concatenate(name=f"{name}_concat")([x, skips[level - 1]])  # 2 x filters
        local = f"{name}_local1" if level > 1 else f"{name}_final"
        x = _norm_relu(_convolution(2 * filters, 3, name=f"{local}_conv")(x), local)
        if level > 1:
            local = f"{name}_local2"
            x = _norm_relu(_convolution(filters, 1, name=f"{local}_conv")(x), local)
        if level < 4:
            finer = _convolution(1, 1, name=f"{name}_lesion_conv")(x)
            if lesion is not None:
                coarser = layers.UpSampling2D(2, name=f"{name}_lesion_repeat", **NHWC)(lesion)
                finer = layers.Add(name=f"{name}_lesion_add")([finer, coarser])
            lesion = finer
    return lesion


def _norm_relu(x: Tensor, name: str) -> Tensor:
    x = layers.GroupNormalization(groups=-1, epsilon=1e-5, name=f"{name}_norm")(x)  # per instance
    return layers.LeakyReLU(0.01, name=f"{name}_relu")(x)


def _layers(model: keras.Model) -> list[keras.Layer]:
    """The layers of a network, and those of the networks in it."""
    networks = (layer for layer in model.layers if isinstance(layer, keras.Model))
    return [*model.layers, *itertools.chain.from_iterable(map(_layers, networks))]


@contextlib.contextmanager
def _fused_norms(model: keras.Model, moments: bool = False) -> Iterator[None]:
    """Computes instance norms by one operation of TensorFlow inside the block, on a processor.

    A training step in bfloat16 takes 60 to 80 % of the time. After the block the layers are stock
    layers again. With `moments` norms are plain operations, which other programs run the fastest.
    """
    tf = keras.backend.backend() == "tensorflow" and sys.modules["tensorflow"]
    fused = moments or (tf and not tf.config.list_physical_devices("GPU"))  # XLA fuses there
    norms = [norm for norm in _layers(model) if isinstance(norm, layers.GroupNormalization)
             and fused and "call" not in vars(norm)]  # as inside another block
    for norm in norms:
        norm.call = functools.partial(_normalize, norm, moments)
    try:
        yield
    finally:
        for norm in norms:
            del norm.call


def _normalize(norm: keras.Layer, moments: bool, x: Tensor) -> Tensor:
    """Instance normalization by a batch normalization in which all images form one."""
    tensorflow = sys.modules["tensorflow"]
    plain = (norm.axis, norm.groups, norm.scale, norm.center) == (-1, x.shape[-1], True, True)
    if len(x.shape) != 4 or not plain or tensorflow.executing_eagerly():  # which gains nothing
        return type(norm).call(norm, x)
    if moments:
        mean, variance = ops.moments(x, (1, 2), keepdims=True)
        return (x - mean) * ops.rsqrt(variance + norm.epsilon) * norm.gamma + norm.beta
    count, height, width, maps = ops.shape(x)
    scale, offset = (ops.tile(ops.cast(w, "float32"), [count]) for w in (norm.gamma, norm.beta))
    x = ops.reshape(ops.transpose(x, (1, 2, 0, 3)), (1, height, width, count * maps))
    fused = functools.partial(tensorflow.raw_ops.FusedBatchNormV3, is_training=True)
    x = fused(x=x, scale=scale, offset=offset, mean=[], variance=[], epsilon=norm.epsilon).y
    return ops.transpose(ops.reshape(x, (height, width, count, maps)), (2, 0, 1, 3))


# --- 6. Dice: per image, never pooled over a batch --------------------------------------------

@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_coefficient(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Dice coefficient of each image, `float32 (N,)`, the prediction thresholded at 0.5.

    It is 1 where mask and prediction, both `(N, height, width, 1)`, are empty.
    """
    intersection, total = _overlap(ops.cast(y_true, "float32") > 0.5, y_pred > 0.5)
    return ops.where(total > 0, 2 * intersection / ops.maximum(total, 1), 1.0)


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def _pixel_accuracy(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Fraction of pixels on the same side of 0.5; Keras' own is 0 where a mask is soft."""
    same = ops.equal(ops.cast(y_true, "float32") > 0.5, y_pred > 0.5)
    return ops.mean(ops.cast(same, "float32"), axis=(1, 2, 3))


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_loss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Soft Dice loss of each image, `float32 (N,)` in 0..1.

    As in Milletari et al. 2016 (arXiv:1606.04797), but without squares, and with one pixel added to
    numerator and denominator. So the loss of an empty mask falls to 0 as the prediction empties.
    That of a soft mask is lowest where both are equal (Wang et al. 2023, arXiv:2303.16296).
    """
    intersection, total = _overlap(y_true, y_pred)
    return 1 - (2 * intersection + 1) / (total + 1)


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_cross_entropy_loss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Soft Dice loss plus the mean binary cross-entropy of each image, `float32 (N,)`.

    Dice alone drives probabilities to 0 and 1; cross-entropy keeps them calibrated.
    """
    entropy = ops.binary_crossentropy(ops.cast(y_true, "float32"), ops.cast(y_pred, "float32"))
    return dice_loss(y_true, y_pred) + ops.mean(entropy, axis=(1, 2, 3))


def _overlap(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and sum of the two areas, `float32 (N,)` in pixels."""
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    pixels = (1, 2, 3)
    shared = ops.sum(ops.minimum(y_true, y_pred), pixels)  # the product, if one is 0 or 1
    return shared, ops.sum(y_true, pixels) + ops.sum(y_pred, pixels)


def score_masks(truth: Array, prediction: Array) -> dict[str, float]:
    """Scores a mask against another of its shape, both in {0, 1} or bool, as the challenges do.

    With TP, FP, FN and TN pixels: Dice = 2 TP / (2 TP + FP + FN), Jaccard = TP / (TP + FP + FN),
    thresholded Jaccard = Jaccard, or 0 if it is below 0.65, sensitivity = TP / (TP + FN),
    specificity = TN / (TN + FP), accuracy = (TP + TN) / all. 0 / 0 counts as 1: nothing was missed.
    Returns them by their names in `METRICS`.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    _require(truth.shape == prediction.shape and truth.size > 0, "The masks have the shapes "
             f"{truth.shape} and {prediction.shape}: expected two equal ones.")
    for name, mask in {"truth": truth, "prediction": prediction}.items():
        found = f"The {name} holds values of {mask.min()} to {mask.max()}"
        _require(np.array_equal(mask, mask > 0), f"{found}: expected a mask of 0 and 1.")
    tp = int(np.count_nonzero((truth == 1) & (prediction == 1)))
    fn, fp = int(np.count_nonzero(truth)) - tp, int(np.count_nonzero(prediction)) - tp
    tn = truth.size - tp - fn - fp
    jaccard = _ratio(tp, tp + fn + fp)
    return {
        "dice": _ratio(2 * tp, 2 * tp + fn + fp),
        "jaccard": jaccard,
        "thresholded_jaccard": jaccard if jaccard >= JACCARD_FAILURE else 0.0,
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, truth.size),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def boundary_distances(truth: Array, prediction: Array) -> dict[str, float]:
    """Measures the distances between the outlines of two masks in per cent of the image's diagonal.

    An outline is the lesion pixels with background, or the edge of the image, above, below, left or
    right. As in MONAI and Metrics Reloaded, `"hd95"` is the larger directed 95th percentile and
    `"assd"` the mean over both outlines. Both are 100 if one mask is empty, and 0 if both are.
    """
    dice, size = score_masks(truth, prediction)["dice"], np.shape(truth)[:2]  # checks the masks
    masks = (np.pad(np.reshape(mask, size), 1).astype(np.int8) for mask in (truth, prediction))
    # A lesion pixel has fewer than four lesion neighbours where the Laplacian is negative.
    a, b = (np.argwhere(np.diff(m, 2, 0)[:, 1:-1] + np.diff(m, 2, 1)[1:-1] < 0) for m in masks)
    if not (len(a) and len(b)):
        return dict.fromkeys(DISTANCES, 100 * (1 - dice))
    there, back = spatial.KDTree(b).query(a)[0], spatial.KDTree(a).query(b)[0]
    hd95, percent = max(np.percentile(there, 95), np.percentile(back, 95)), 100 / math.hypot(*size)
    return {"hd95": float(percent * hd95), "assd": float(percent * np.hstack([there, back]).mean())}


# --- 7. Training and prediction ---------------------------------------------------------------

def train_model(
    model: keras.Model, train_generator: keras.utils.PyDataset,
    val_generator: keras.utils.PyDataset | None, epochs: int, *, learning_rate: float = 1e-3,
    save_path: StrPath | None = None, split: Sequence[Pairs] | None = None,
    log_path: StrPath | None = None, resume_path: StrPath | None = None, resume: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] = (), verbose: str | int = "auto"
) -> keras.callbacks.History:
    """Trains a new model, or continues to train a trained one.

    An uncompiled model gets Adam, `dice_cross_entropy_loss`, accuracy and Dice. A loaded model
    keeps its optimizer, and its epoch count continues. Afterwards, and after an interruption, the
    model is that of the best epoch: of the highest validation Dice, of the lowest validation loss
    if Dice is not among the metrics, or the last one if there is no validation.

    Args:
        model: The model; changed in place.
        train_generator: Batches to train on.
        val_generator: Batches to validate on after each epoch, or `None`.
        epochs: Number of epochs to train beyond those of the model. Epochs that an interrupted
            training has completed count towards it.
        learning_rate: Initial learning rate. It falls to nearly 0 along half a cosine over all
            epochs, including earlier ones.
        save_path: `.keras` file that always holds the best epoch so far.
        split: The split, for the record, with checksums of its files.
        log_path: CSV file with a row per epoch, including earlier ones.
        resume_path: `.keras` checkpoint of the last epoch. If it exists, an interrupted training
            continues from it and ends with the same weights, where the backend is deterministic.
        resume: Whether to continue from the checkpoint; otherwise it is removed.
        callbacks: Further Keras callbacks, such as `TensorBoard` or `EarlyStopping`; the cosine
            overrides `ReduceLROnPlateau`.
        verbose: As in `keras.Model.fit`.

    Returns:
        The `History` of these epochs; the record has that of all.
    """
    _check_training(model, [train_generator, val_generator], epochs, learning_rate)
    _check_training_files(save_path, resume_path, log_path)
    _compile(model)
    _record_training(model, train_generator, learning_rate, split)
    end = len(model_record(model).history.get("loss", ())) + epochs
    model_record(model).origin["epochs"] = end
    if resume_path is not None and not resume:
        Path(resume_path).unlink(missing_ok=True)
    resumed = _resume(model, resume_path, save_path)
    start = len(model_record(model).history.get("loss", ()))
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch, _: learning_rate * (1 + math.cos(math.pi * epoch / end)) / 2)
    with tempfile.TemporaryDirectory() as folder, _fused_norms(model):
        path = save_path or f"{folder}/best.keras"
        if start and not resumed:
            save_model(model, path)  # a continued model is the best so far
        best = _BestCheckpoint(train_generator, path, log_path, resume_path, saved=start > 0)
        try:
            return model.fit(  # generators shuffle
                train_generator, validation_data=val_generator, shuffle=False, verbose=verbose,
                callbacks=[keras.callbacks.TerminateOnNaN(), schedule, best, *callbacks],
                initial_epoch=start, epochs=end)
        except Exception as error:  # TensorFlow quotes that of a generator in one of its own
            if quoted := re.search("SegmentError: (.+)", str(error)):
                raise SegmentError(quoted[1]) from error
            raise
        finally:
            if best.saved:
                with zipfile.ZipFile(path) as archive:  # which another process may have replaced
                    _check_same_training(path, _read_record(path, archive), model_record(model))
                model.load_weights(path)


def _check_training(model: keras.Model, generators: list[Any], epochs: int, rate: float) -> None:
    trains = keras.backend.backend() in ("tensorflow", "jax", "torch")
    _require(trains, f"Keras cannot train with {keras.backend.backend()}: set KERAS_BACKEND to "
             "tensorflow, jax or torch.")
    _require(epochs >= 1, f"epochs is {epochs}: expected 1 or more.")
    _require(0 < rate < math.inf, f"learning_rate is {rate}: expected a number above 0.")
    for generator in generators:
        if isinstance(generator, ImageGenerator):  # users may pass another PyDataset
            _check_frame(model, generator)
            _require(generator.mask_paths is not None, NEEDS_MASKS)


def _check_training_files(save_path: Any, resume_path: Any, log_path: Any) -> None:
    for path, suffix in ((save_path, ".keras"), (resume_path, ".keras"), (log_path, "")):
        if path is not None:
            _check_file_to_write(path, suffix)
            _remove_leftovers(Path(path).parent)
    both = resume_path is None or save_path is not None
    _require(both, f"{resume_path} without save_path: name a file for the best epoch as well.")
    one = save_path and resume_path and Path(save_path).resolve() == Path(resume_path).resolve()
    _require(not one, f"{save_path} cannot hold both the best and the last epoch: name two files.")


def _check_frame(model: keras.Model, generator: ImageGenerator) -> None:
    frame, size = tuple(model.input_shape[1:3]), generator.image_size
    _require(frame == size, f"The model takes images of {frame}, but the generator makes {size}: "
             "create both with the same image_size.")


def _compile(model: keras.Model) -> None:
    if not model.compiled:
        accuracy = keras.metrics.MeanMetricWrapper(_pixel_accuracy, name="accuracy")
        model.compile("adam", dice_cross_entropy_loss, metrics=[accuracy, dice_coefficient])


def _record_training(
    model: keras.Model, generator: Any, learning_rate: float, split: Sequence[Pairs] | None
) -> None:
    record, versions = model_record(model), {"numpy": np.__version__, "pillow": PIL.__version__}
    dropout = [layer.rate for layer in _layers(model) if isinstance(layer, layers.Dropout)]
    record.origin |= {"learning_rate": learning_rate, "dropout": max(dropout, default=0),
                      "device": describe_device(), **versions}
    if isinstance(generator, ImageGenerator):
        record.batch_size = int(generator.batch_size)
        record.origin |= {"seed": generator.seed, "image_size": list(generator.image_size),
                          "soft_masks": generator.cache.soft_masks}
    record.estimate = []  # of other weights
    if split is not None:
        counts = Counter(os.path.realpath(image) for images, _ in split for image in images)
        twice = [image for image, count in counts.items() if count > 1]
        _require(not twice, f"{_shorten(twice)}: in more than one part of the split; keep one.")
        digest = functools.cache(_digest)
        digests = [{*map(digest, images)} for images, _ in split]
        if copies := sum(map(len, digests)) - len(set.union(*digests)):
            warnings.warn(f"{copies} images are in more than one part of the split, as copies: "
                          "remove them from one folder.", stacklevel=3)
        _set_split(record, split)
        for kind, parts in zip(("images", "masks"), zip(*split, strict=True), strict=True):
            content = b"".join(map(digest, sorted(itertools.chain(*parts))))
            record.origin[f"sha256_of_{kind}"] = hashlib.sha256(content).hexdigest()


def _resume(model: keras.Model, path: StrPath | None, best_path: StrPath | None) -> bool:
    """Loads weights, optimizer and record of an interrupted training, if there is one."""
    if path is None or best_path is None or not Path(path).exists():
        return False
    before, record = model_record(_load_same_network(path, model)), model_record(model)
    _check_same_training(path, before, record)
    end = record.origin["epochs"]
    if (planned := before.origin.get("epochs", end)) != end:
        warnings.warn(f"{path} belongs to a training of {planned} epochs, not {end}: the learning "
                      "rate now falls along another curve.", stacklevel=3)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    before.origin |= record.origin
    model.record = before
    best = model_record(load_model(best_path)) if Path(best_path).exists() else ModelRecord()
    _require(best.history, f"{best_path} does not hold the best epoch of the training in {path}: "
             "give the file that does, or start from scratch.")
    _check_same_training(best_path, best, before)
    return True


def _check_same_training(path: StrPath, before: ModelRecord, record: ModelRecord) -> None:
    facts = ("batch_size", "dropout", "image_size", "learning_rate", "seed", "sha256_of_images",
             "sha256_of_masks", "soft_masks", "split")
    now = ("train", "val", "test")  # not what an earlier training has seen
    old, new = ({**vars(r), **r.origin, "split": [*map(r.split.get, now)] if "test" in r.split
                 else None} for r in (before, record))
    known = [fact for fact in facts if None not in (old.get(fact), new.get(fact))]
    changed = [fact for fact in known if old[fact] != new[fact]]
    _require(not changed, f"{path} belongs to a training with another {_shorten(changed)}: give "
             "its images and options, or start from scratch.")


class _BestCheckpoint(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the best and the last epoch in whole files, record included."""

    def __init__(
        self, train_generator: Any, path: StrPath, log_path: StrPath | None = None,
        resume_path: StrPath | None = None, saved: bool = False
    ) -> None:
        super().__init__()
        self.train_generator, self.saved = train_generator, saved  # whether the best file is ours
        self.path, self.log_path, self.resume_path = path, log_path, resume_path

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Derives the randomness of generator and dropout from the number of the epoch."""
        self.train_generator.epoch = epoch
        seed = getattr(self.train_generator, "seed", 0)
        for i, layer in enumerate(_layers(self.model)):
            if isinstance(layer, layers.Dropout) and layer.rate > 0:  # or SpatialDropout2D
                layer.seed_generator.state.assign([(seed + i) % 2**32, epoch * 2**20 % 2**32])

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None:
        """Records the epoch, saves it if it is the best, and then as the last one."""
        loss = logs["loss"] + logs.get("val_loss", 0.0)
        _require(math.isfinite(loss), f"The loss became {loss} in epoch {epoch + 1}, where "
                 f"training stopped: try a learning rate below {logs['learning_rate']:g}.")
        record = model_record(self.model)
        # A curve that ended is dropped, or its end would be taken for its beginning.
        history = {name: [*record.history.get(name, ()), logs[name]] for name in logs}
        record.history = history
        *earlier, score = _epoch_scores(history)
        if score > max(earlier, default=-math.inf):
            save_model(self.model, self.path)
            self.saved = True  # only now is there a file to restore it from
        if self.log_path is not None:
            # All curves end with the last epoch; one that began later is empty before it.
            backwards = itertools.zip_longest(*map(reversed, history.values()), fillvalue="")
            rows = [dict(zip(history, row, strict=True)) for row in reversed([*backwards])]
            _write_table(Path(self.log_path), [{"epoch": i, **row} for i, row in enumerate(rows)])
        if self.resume_path is not None:  # last, so that a killed epoch is done again with its log
            save_model(self.model, self.resume_path)


def _epoch_scores(history: Mapping[str, Sequence[float]]) -> list[float]:
    """The scores by which the best epoch is the highest; without validation, the last is."""
    lowest_loss = [-loss for loss in history.get("val_loss", ())]
    return list(history.get(BEST) or lowest_loss or range(len(history.get("loss", ()))))


class Predictions(np.ndarray[Any, np.dtype[Any]]):
    """Probabilities that remember how masks and estimates are made of them, as in the record."""

    def __array_finalize__(self, source: Any) -> None:
        self.threshold = getattr(source, "threshold", 0.5)
        self.one_region = getattr(source, "one_region", True)
        self.estimate = getattr(source, "estimate", ())


def _remember(probabilities: Array, source: ModelRecord | Predictions) -> Predictions:
    _check_threshold(source.threshold)
    view = probabilities.view(Predictions)
    view.threshold, view.one_region = source.threshold, source.one_region
    view.estimate = source.estimate
    return view


def _check_threshold(threshold: float) -> float:
    _require(0 < threshold < 1, f"threshold is {threshold}: expected a probability in (0, 1).")
    return float(threshold)


def predict(model: Models, generator: ImageGenerator, **settings: Any) -> Predictions:
    """Returns the probabilities of all images of a generator; `settings` as in `predict_each`."""
    predictions = list(predict_each(model, generator, **settings))
    return _remember(np.stack(predictions), predictions[0])


def predict_each(
    model: Models, generator: ImageGenerator, *, mirror: bool | None = None,
    one_region: bool | None = None, threshold: float | None = None, verbose: int = 1
) -> Iterator[Predictions]:
    """Yields `float32 (height, width, 1)` for each image, in their order and not augmented.

    Several models yield the mean of their probabilities, which is uncertain where they disagree. A
    setting that is `None` comes from the record. For several models, thresholds and estimates are
    averaged; the other settings are those of the first one. The probabilities remember threshold,
    one region and estimate for `results` and `restore_masks`. A batch is predicted while the next
    one loads.
    """
    models, record = _settings(model, mirror=mirror, one_region=one_region, threshold=threshold)
    _check_frame(models[0], generator)
    images = dataclasses.replace(generator, shuffle=False, augment=False, whole_batches=False)
    size, sharing = images.batch_size, keras.distribution.distribution()
    size = size if sharing else min(size, len(images.pairs))  # devices need equal parts
    progress = keras.utils.Progbar(len(images), verbose=verbose, unit_name="batch")
    for batch in _map_ahead(images.batch_part, range(len(images)), ahead=1):
        # Filled up, so that no other batch size has to be compiled.
        full = np.pad(batch[..., :3], ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
        lesions = _predict_batch(models, full, record.mirror, once=len(images.pairs) == 1)
        progress.add(1)
        yield from _remember(lesions[: len(batch)], record)


def _map_ahead(function: Callable[..., Any], *columns: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Maps a function in threads while its results are used; at most `ahead` of them wait."""
    pool, waiting = ThreadPoolExecutor(min(ahead, os.cpu_count() or 1)), deque[Future[Any]]()
    try:
        for arguments in zip(*columns, strict=False):
            waiting.append(pool.submit(function, *arguments))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _settings(model: Models, **given: Any) -> tuple[list[keras.Model], ModelRecord]:
    """The models as a list, and the first record with the means of all and the given settings."""
    models: list[Any] = [model] if isinstance(model, keras.Model | str) else list(model)
    wrong = [type(member).__name__ for member in models if not isinstance(member, keras.Model)]
    _require(not wrong, f"Expected models, but got {_shorten(wrong)}: load them with load_model.")
    frames = sorted({str(member.input_shape[1:3]) for member in models})
    _require(len(frames) == 1, f"{len(models)} models take images of {len(frames)} sizes "
             f"({_shorten(frames)}): expected one size.")
    records = list(map(model_record, models))
    estimates = [record.estimate for record in records]
    estimate = np.mean(estimates, 0).tolist() if all(estimates) else []
    threshold = float(np.mean([record.threshold for record in records]))
    given = {name: value for name, value in given.items() if value is not None}
    settings = {"threshold": threshold, "estimate": estimate, **given}
    return models, dataclasses.replace(records[0], **settings)


def _predict_batch(
    models: Sequence[keras.Model], images: Array, mirror: bool, once: bool = False
) -> Array:
    """The mean probabilities of models and flips, flipped back; with `once` run without tracing."""
    flips = FLIPS if mirror else FLIPS[:1]
    views = np.concatenate([np.flip(images, axes) for axes in flips])  # (flips * N, H, W, 3)
    eager = once and keras.backend.backend() == "tensorflow"  # tracing takes longer than 4 views
    # The activations of more views at once leave the processor's caches: nearly twice the time.
    parts = np.split(views, len(flips) if len(images) > 2 else 1)
    back = []
    for model in models:
        predict = functools.partial(model, training=False) if eager else model.predict_on_batch
        with _fused_norms(model), _each_host_alone():
            # Each device of a TensorFlow strategy returns the whole batch.
            lesions = np.concatenate([np.asarray(predict(part))[: len(part)] for part in parts])
        flipped = np.split(lesions, len(flips))
        back += [np.flip(lesion, axes) for lesion, axes in zip(flipped, flips, strict=True)]
    return np.asarray(np.mean(back, axis=0))


def average_models(models: Sequence[keras.Model]) -> keras.Model:
    """Makes one network of several, with the mean of their probabilities, to save or export it.

    They share the four flips, so two or four models take the time of one with `mirror`, which the
    record of the new one switches off. Threshold and estimate are the mean of theirs. Its training
    set is what any of them was trained or validated on, its test set what all of them held out.
    """
    models, record = _settings(models, mirror=False)
    records = list(map(model_record, models))
    seen = set.union(*map(_seen, records))
    held_out = set.intersection(*(set(r.split.get("test", ())) for r in records)) - seen
    record.split = {"train": sorted(seen), "test": sorted(held_out)}
    record.origin, record.history = {"models": [record.origin for record in records]}, {}
    networks = [_recast(model, "float32", f"model{i}") for i, model in enumerate(models, 1)]
    image = keras.Input(models[0].input_shape[1:], name="image")
    lesions = []
    for view in range(len(networks) * math.ceil(len(FLIPS) / len(networks))):
        network, axes = networks[view % len(networks)], FLIPS[view % len(FLIPS)]
        lesion = network(ops.flip(image, axes) if axes else image)
        lesions.append(ops.flip(lesion, axes) if axes else lesion)
    model = keras.Model(image, layers.Average(name="mean")(lesions), name="average")
    model.record = record
    return model


def segment_image(model: Models, image: Any, *, threshold: float | None = None) -> Mask:
    """Segments one photograph of any size: returns its mask, `bool (height, width)`.

    `image` is a path, or `uint8 (height, width, 3)` in RGB, as an array or a Pillow image. All is
    done as in the load driver, with the settings of the record. The first call compiles the
    network, further calls only run it.
    """
    models, record = _settings(model, threshold=threshold)
    frame = models[0].input_shape[1:3]
    if isinstance(image, str | os.PathLike):
        size, (fitted,) = _size_of(image), _decode(image, [frame], mask=False)
    else:
        image = np.asarray(image)
        rgb = image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        _require(rgb and image.dtype == np.uint8, f"The image is {image.dtype} {image.shape}: "
                 "expected uint8 (height, width, 3) in RGB, or the path of a file.")
        size = image.shape[:2]
        fitted = np.asarray(_fit(Image.fromarray(image), size, frame))
    (lesion,) = _predict_batch(models, fitted[None], record.mirror)
    return _make_mask(_remember(lesion, record), size)


def _make_mask(prediction: Predictions, size: Size, shape: Size | None = None) -> Mask:
    """The mask of an image of `size`, at the resolution `shape`; all masks are made here."""
    height, width = shape or size
    low, high = float(prediction.min()), float(prediction.max())
    _require(low > -0.01 and high < 1.01, f"The predictions are {low:g} to {high:g}: expected "
             "probabilities in 0..1, as predict returns them.")
    _check_threshold(prediction.threshold)
    inside = Image.fromarray(np.ascontiguousarray(_crop(prediction, size)[..., 0], np.float32))
    lesion = np.asarray(inside.resize((width, height), Image.Resampling.BILINEAR))
    mask = lesion >= prediction.threshold
    return _one_region(lesion - prediction.threshold, mask) if prediction.one_region else mask


def _crop(frame: Array, size: Size) -> Array:
    """The letterbox of an image of `size` in a frame `(H, W, ...)`."""
    top, left, height, width = letterbox(size, (frame.shape[0], frame.shape[1]))
    return frame[top : top + height, left : left + width]


def _one_region(margin: Array, mask: Mask) -> Mask:
    """Keeps the region with the highest sum of margins, and fills its holes."""
    # A dark, clear lesion outweighs a larger stretch of skin that barely exceeds the threshold.
    regions, count = ndimage.label(mask)
    if count > 1:
        weights = ndimage.sum_labels(margin, regions, range(1, count + 1))
        mask = regions == 1 + np.argmax(weights)
    return _fill_holes(mask)


def choose_threshold(generator: ImageGenerator, predictions: Iterable[Array]) -> float:
    """Chooses the threshold with the highest mean Dice, for `save_model`.

    Takes images and masks that the model was not trained on, and what `predict` returned for them.
    Masks are made as `results` makes them, but with at most 512 pixels on the long side. The choice
    is 0.3 to 0.7 in steps of 0.05; of equal ones the closest to 0.5.
    """
    thresholds = (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7)  # of equal ones the first
    dice = _measure_dice(generator, predictions, thresholds).mean(axis=0)
    return thresholds[int(np.argmax(dice))]


def _measure_dice(
    generator: ImageGenerator, predictions: Iterable[Array], thresholds: Sequence[float]
) -> NDArray[np.float64]:
    """The Dice of each image at each threshold, `(N, thresholds)`."""
    def measure(lesion: Predictions, pair: Pair) -> list[float]:
        """The Dice of one image at each threshold."""
        size = _size_of(pair[0])
        side = min(512, max(size))
        shape, soft = letterbox(size, (side, side))[2:], generator.cache.soft_masks
        (truth,) = _decode(str(pair[1]), [shape], mask=True, fit_to=size, soft=soft)
        dice = []
        for threshold in thresholds:
            lesion.threshold = threshold
            dice.append(score_masks(truth[..., 0] >= 128, _make_mask(lesion, size, shape))["dice"])
        return dice

    _require(generator.mask_paths is not None, NEEDS_MASKS)
    lesions = _checked(generator, predictions)
    return np.array(list(_map_ahead(measure, lesions, generator.pairs, ahead=64)))


def fit_estimate(generator: ImageGenerator, predictions: Iterable[Array]) -> list[float]:
    """Fits `estimate_dice` and its lower bound, for `save_model`.

    Takes images and masks that the model was not trained on, and what `predict` returned for them.
    A line is fitted to the Dice of one half of the images. The other half sets the bound, by split
    conformal prediction (Lei et al. 2018, arXiv:1604.04173), so that it holds for 90 % of further
    images of the same kind. Fewer than 100 images are too few: the list is empty, and the estimate
    that of a new model. Set `predictions.threshold` to the chosen threshold before.
    """
    lesions = list(_checked(generator, predictions))
    dice = _measure_dice(generator, lesions, [lesions[0].threshold])[:, 0]
    certainty = np.array(list(map(_certainty, lesions)))
    fitted, held_out = np.array_split(np.random.default_rng(0).permutation(len(dice)), 2)
    if len(dice) < 100 or np.ptp(certainty[fitted]) == 0:  # as if all masks are empty
        return []
    slope, offset = np.polyfit(certainty[fitted], dice[fitted], 1)
    estimate = (offset + slope * certainty).clip(0, 1)
    misses = np.sort(((estimate - dice) / (DOUBT + 1 - estimate))[held_out])
    rank = math.ceil(0.9 * (len(misses) + 1))  # of the miss that 90 % do not exceed
    return [float(offset), float(slope), float(misses[rank - 1])]


def _certainty(prediction: Predictions) -> float:
    """Soft Dice of mask and probabilities, less what its outline may cost a mask of its size."""
    mask = _make_mask(prediction, (prediction.shape[0], prediction.shape[1]))
    if not mask.any():
        return 0.0
    lesion = np.asarray(prediction, np.float64)[..., 0]
    soft = 2 * lesion.sum(where=mask) / (lesion.sum() + np.count_nonzero(mask))
    return max(0.0, float(soft) - OUTLINE_DOUBT / math.sqrt(mask.mean()))


def estimate_dice(predictions: Iterable[Array], *, bound: bool = False) -> NDArray[np.float64]:
    """Estimates the Dice coefficient of each image without its mask, `float64 (N,)` in 0..1.

    It is the soft Dice of the predicted mask and its probabilities, less `OUTLINE_DOUBT /
    sqrt(fraction)` for a mask that covers a fraction of the frame; if `fit_estimate` was used, the
    Dice expected for this number. It is 0 for an empty mask. With `bound`, returns a lower bound of
    the Dice, which holds with a probability of 90 % for images like those of the fit; nan without
    a fit.
    """
    lesions = [np.asanyarray(lesion).view(Predictions) for lesion in predictions]
    offset, slope, miss = lesions[0].estimate or (0.0, 1.0, math.nan)
    certainty = np.array(list(map(_certainty, lesions)))
    estimates = np.where(certainty > 0, offset + slope * certainty, 0).clip(0, 1)
    return (estimates - miss * (DOUBT + 1 - estimates)).clip(0, 1) if bound else estimates


def describe_device() -> str:
    """Returns the device and the backend in one line."""
    backend = keras.backend.backend()
    device = str(ops.zeros(1).device).rpartition("device:")[-1]
    return f"{device} ({backend} {sys.modules[backend].__version__}, Keras {keras.__version__})"


def data_parallel(devices: int) -> contextlib.AbstractContextManager[Any]:
    """Shares each batch of the models created and used inside the block among several devices.

    These are GPUs if there are any, otherwise processors, with TensorFlow or JAX. Losses equal
    those of one device to rounding. Generators need `whole_batches`, and a batch size that the
    number of devices divides.

    With JAX several hosts may train one model. Each runs the same program with the variables of
    `keras.distribution.initialize`, enters this block before anything is computed, and loads its
    part of every batch. `devices` counts those of all hosts; each saves to a file of its own.
    """
    backend = keras.backend.backend()
    hosts = "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ
    _require(not hosts or backend == "jax", f"Several hosts need JAX, but this is {backend}.")
    if hosts and not sys.modules["jax"].distributed.is_initialized():
        try:
            keras.distribution.initialize()
        except (ValueError, RuntimeError) as error:
            what = "The hosts cannot connect ({}): correct or unset KERAS_DISTRIBUTION_*."
            raise SegmentError(what.format(str(error).split("\n")[0])) from error
    if devices == 1 and not hosts:
        return contextlib.nullcontext()
    found = keras.distribution.list_devices() if backend in ("tensorflow", "jax") else []
    enough = 1 < devices <= len(found) and (not hosts or devices == len(found))
    _require(enough, f"{devices} devices were requested, but {backend} can share batches among "
             f"{len(found)} ({_shorten(found)}): request {'all' if hosts else 'fewer'}.")
    if backend == "tensorflow":
        shared = sys.modules["tensorflow"].distribute.MirroredStrategy(found[:devices])
    else:
        shared = keras.distribution.DataParallel(devices=found[:devices], auto_shard_dataset=False)
    return shared.scope()  # type: ignore[no-any-return]


def _this_host() -> tuple[int, int]:
    """The number of this host, and the number of hosts."""
    if keras.backend.backend() != "jax":
        return 0, 1
    return sys.modules["jax"].process_index(), sys.modules["jax"].process_count()


@contextlib.contextmanager
def _each_host_alone() -> Iterator[None]:
    """Lets each of several hosts predict everything, since none can read what others hold."""
    sharing = keras.distribution.distribution()
    keras.distribution.set_distribution(sharing if _this_host()[1] == 1 else None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(sharing)


def make_deterministic() -> None:
    """Makes TensorFlow or PyTorch deterministic; JAX has a flag, `--xla_gpu_deterministic_ops`."""
    if keras.backend.backend() == "tensorflow":
        sys.modules["tensorflow"].config.experimental.enable_op_determinism()
    elif keras.backend.backend() == "torch":
        sys.modules["torch"].use_deterministic_algorithms(True)


# --- 8. Saving: network and record in one .keras file -----------------------------------------

RECORD_MEMBER = "segment.json"  # inside the .keras file, which is a zip archive; Keras ignores it
RECORD_FORMAT = 2
EXPORTS = {".onnx": "onnx", ".tflite": "litert", "": "tf_saved_model"}  # formats by suffix


@dataclasses.dataclass
class ModelRecord:
    """What a model file holds besides the network, so that evaluation needs nothing else."""

    split: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # ids by part
    threshold: float = 0.5
    mirror: bool = True
    one_region: bool = True
    estimate: list[float] = dataclasses.field(default_factory=list)  # as fit_estimate returned it
    batch_size: int = 8  # in training
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by epoch
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # options, versions, checksums
    geometry: str = "letterbox"  # how images are fitted into the frame
    format: int = RECORD_FORMAT


def model_record(model: keras.Model) -> ModelRecord:
    """Returns the record of a model; a new model gets a default one."""
    if not isinstance(getattr(model, "record", None), ModelRecord):
        model.record = ModelRecord()
    return model.record  # type: ignore[no-any-return]


def save_model(
    model: keras.Model, path: StrPath, *, split: Sequence[Pairs] | None = None,
    threshold: float | None = None, mirror: bool | None = None, one_region: bool | None = None,
    estimate: list[float] | None = None, optimizer: bool = True
) -> None:
    """Saves a model and its record in one `.keras` file, which is never incomplete.

    Settings that are not `None` change the record; what an earlier split trained on still counts as
    seen. Without the optimizer, the file is a third as large and computes in float32, and further
    training starts with a new optimizer.
    """
    _check_file_to_write(path, ".keras")
    fitted = estimate is None or len(estimate) in (0, 3)
    _require(fitted, f"estimate is {estimate}: expected what fit_estimate returned.")
    record = model_record(model)
    if split is not None:
        _set_split(record, split)
    record.threshold = record.threshold if threshold is None else _check_threshold(threshold)
    record.mirror = record.mirror if mirror is None else bool(mirror)
    record.one_region = record.one_region if one_region is None else bool(one_region)
    record.estimate = record.estimate if estimate is None else list(map(float, estimate))
    with _written_whole(path) as temporary:
        (model if optimizer else _recast(model, "float32")).save(temporary)
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as archive:
            fields = dataclasses.asdict(record)  # with options that may be numbers of NumPy
            archive.writestr(RECORD_MEMBER, json.dumps(fields, indent=1, default=np.generic.item))


def load_model(path: StrPath = PRETRAINED, *, bfloat16: bool | None = False) -> keras.Model:
    """Loads a model that `save_model` wrote, by default the pretrained one.

    Nothing in the file is executed (Keras' safe mode). The model is compiled as it was saved; a
    plain Keras file gets a default record. A damaged file or another kind of model is an error.
    With `bfloat16` it is an uncompiled copy that computes in bfloat16; with `None`, if the device
    computes natively in it and predicts a first batch faster.
    """
    version = tuple(map(int, re.findall(r"\d+", keras.__version__)[:3]))
    _require(version >= (3, 15, 1), f"This needs Keras 3.15.1 or newer, but found "
             f"{keras.__version__}: run pip install -r requirements.txt.")
    what = "is a folder" if Path(path).is_dir() else "there is no such file"
    _require(Path(path).is_file(), f"{path}: {what}; give a model file that save_model wrote.")
    _require(os.access(path, os.R_OK), f"{path}: cannot be read: change its permissions.")
    whole = Path(path).suffix == ".keras" and zipfile.is_zipfile(path)
    _require(whole, f"{path}: not a .keras file, or truncated; give one that save_model wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_declared_size(path, archive)
            record = _read_record(path, archive)
        model = keras.saving.load_model(path, safe_mode=True)
        model.record = record
        shapes = model.input_shape, model.output_shape
    except SegmentError:
        raise
    except Exception as error:  # a file from elsewhere can fail in any way
        reason = str(error).strip().split("\n")[0]
        raise SegmentError(f"{path}: not a whole, safe Keras 3 model file ({reason}).") from error
    fits = shapes[0][3:] == (3,) and shapes[1] == (*shapes[0][:3], 1) and None not in shapes[0][1:]
    fits = fits and not isinstance(model.output, dict)  # whose shape Keras gives all the same
    _require(fits, f"{path} maps {shapes[0]} to {shapes[1]}: expected (None, height, width, 3) to "
             "(None, height, width, 1), as create_model makes it.")
    if not bfloat16 and (bfloat16 is False or not _native_bfloat16()):
        return model
    faster = _recast(model, "mixed_bfloat16")
    faster.record = record
    return faster if bfloat16 else min((model, faster), key=_seconds_per_batch)


def _native_bfloat16() -> bool:
    linux = Path("/proc/cpuinfo")  # only there, what the processor can do is listed
    return "GPU" in describe_device() or (linux.exists() and "_bf16" in linux.read_text())


def _seconds_per_batch(model: keras.Model) -> float:
    images = np.zeros((8, *model.input_shape[1:]), np.uint8)
    predict = functools.partial(_predict_batch, [model], images, model.record.mirror)
    return min(timeit.repeat(predict, number=1, repeat=2))  # the first time traces the network


def _check_declared_size(path: StrPath, archive: zipfile.ZipFile) -> None:
    """Refuses a file that declares far more than it has bytes for, before memory is taken."""
    size = sum(member.file_size for member in archive.infolist())
    _require(size <= 2 * os.path.getsize(path) + 2**24, f"{path} would unpack to {size} bytes, far "
             "more than it has: do not trust it.")
    config = json.loads(archive.read("config.json"))
    config.pop("compile_config", None)

    def count_weights() -> int:
        """The number of weights that the file declares."""
        with keras.StatelessScope(initialize_variables=False):  # takes no memory for them
            return int(keras.saving.deserialize_keras_object(config).count_params())

    with ThreadPoolExecutor(1) as pool:  # Keras' scope belongs to a thread
        count = pool.submit(count_weights).result()
    _require(count <= size, f"{path} declares {count} weights in {size} bytes: do not trust it.")


def _read_record(path: StrPath, archive: zipfile.ZipFile) -> ModelRecord:
    if RECORD_MEMBER not in archive.namelist():
        return ModelRecord()
    fields = json.loads(archive.read(RECORD_MEMBER))
    known = fields["format"] == RECORD_FORMAT and fields["geometry"] == "letterbox"
    _require(known, f"{path} was written by another version (format {fields['format']}, geometry "
             f"{fields['geometry']}). This version reads format {RECORD_FORMAT}: use the other.")
    defaults = dataclasses.asdict(ModelRecord())
    values = {name: fields.get(name, default) for name, default in defaults.items()}
    curves, ids = values["history"].values(), itertools.chain(*values["split"].values())
    valid = (
        all(type(values[name]) is type(default) for name, default in defaults.items())
        and all(isinstance(id_, str) for id_ in ids)
        and all(isinstance(x, float) for curve in (*curves, values["estimate"]) for x in curve)
        and all(0 < len(curve) <= len(values["history"]["loss"]) for curve in curves)
        and 0 < values["threshold"] < 1 and values["batch_size"] in range(1, 2**32)
        and len(values["estimate"]) in (0, 3)
    )  # fmt: skip
    _require(valid, f"{path}: its {RECORD_MEMBER} is not as save_model writes it: do not trust it.")
    return ModelRecord(**values)


def load_weights(model: keras.Model, path: StrPath) -> None:
    """Loads weights and threshold of a file, or the first of its models, into any frame.

    The images that these weights have seen are noted in the record, for `image_ids_seen`.
    """
    loaded = _load_same_network(path, model)
    model.set_weights(loaded.get_weights())
    record, of_file = model_record(model), model_record(loaded)
    record.threshold, record.split["earlier"] = of_file.threshold, sorted(_seen(of_file))


def export_model(model: keras.Model, path: StrPath, *, mirror: bool = False) -> None:
    """Exports to ONNX (`.onnx`), LiteRT (`.tflite`) or a SavedModel (no suffix), in float32.

    With `mirror` it averages the flips. A `segment.json` describes how to use the export: in the
    metadata of ONNX, in the folder, or in the zip archive that a `.tflite` file also is. A file
    that differs from the model by more than 0.02 is refused.
    """
    path, kind, backend = Path(path), EXPORTS.get(Path(path).suffix), keras.backend.backend()
    _require(kind is not None, f"{path}: expected .onnx, .tflite or no suffix (SavedModel).")
    _require(backend == "tensorflow", f"{path} cannot be exported by {backend}: set "
             "KERAS_BACKEND=tensorflow.")
    needed = ("onnx", "onnxruntime", "tf2onnx") if kind == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    _require(not missing, f"{path} needs {_shorten(missing)}: run pip install {' '.join(needed)}.")
    network = exported = _recast(model, "float32")
    shape = model.input_shape[1:]
    facts = vars(dataclasses.replace(model_record(model), split={}, history={})) | {
        "height": shape[0], "width": shape[1], "resampling": "bilinear", "mirror_built_in": mirror,
        "input": "uint8 RGB in 0..255", "exporter": describe_device(), "fitting": "Turn by EXIF, "
        "scale evenly to fit, centre on black; crop the result, scale it back, threshold (>=)."}
    patches = np.random.default_rng(0).uniform(0, 255, (9, 16, 16, 3))  # undecided, so sensitive
    images = ops.convert_to_numpy(ops.cast(ops.image.resize(patches, shape[:2]), "uint8"))
    if mirror:
        image, flips = keras.Input(shape), [np.s_[:, ::y, ::x] for y in (1, -1) for x in (1, -1)]
        lesions = ops.split(network(ops.concatenate([image[flip] for flip in flips])), 4)
        exported = keras.Model(image, sum(y[f] for y, f in zip(lesions, flips, strict=True)) / 4)
    signature = keras.InputSpec("uint8", (None, *shape), name="image")
    with _written_whole(path) as temporary, warnings.catch_warnings(action="ignore"):
        expected = _predict_batch([network], images, mirror)
        with _fused_norms(network, moments=True):
            exported.export(temporary, kind, verbose=False, input_signature=[signature])
        run = _open_export(temporary, json.dumps(facts, indent=1))
        error = np.max([np.abs(run(images[:n]) - expected[:n]).max() for n in (1, 3, 8, 9)])
        _require(error <= 0.02, f"{path}: not written, as it differs from the model ({error:.2g}).")


def _open_export(path: Path, facts: str) -> Any:
    if path.suffix == ".onnx":
        onnx, runtime = map(importlib.import_module, ("onnx", "onnxruntime"))
        onnx.helper.set_model_props(proto := onnx.load(path), {RECORD_MEMBER: facts})
        onnx.save(proto, path)
        session = runtime.InferenceSession(path)
        return lambda images: session.run(None, {"image": images})[0]
    if path.suffix == ".tflite":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(RECORD_MEMBER, facts)
        runner = sys.modules["tensorflow"].lite.Interpreter(str(path)).get_signature_runner()
        return lambda images: runner(image=images)["output_0"]
    (path / RECORD_MEMBER).write_text(facts, encoding="utf-8")
    return keras.layers.TFSMLayer(path, call_endpoint="serve")


def _load_same_network(path: StrPath, model: keras.Model) -> keras.Model:
    """Loads a network with the layers of the model; of an average of several, the first one."""
    loaded, shapes = load_model(path), [weight.shape for weight in model.weights]
    for network in (loaded, *loaded.layers):
        if isinstance(network, keras.Model) and [w.shape for w in network.weights] == shapes:
            network.record = loaded.record
            return network
    raise SegmentError(f"{path} holds another network: give one with the same layers.")


def _set_split(record: ModelRecord, split: Sequence[Pairs]) -> None:
    """Replaces the split. What the model has seen in an earlier one remains, as another part."""
    _require(len(split) == 3, f"The split has {len(split)} parts: expected (train, val, test).")
    train, val, test = ([image_id(image) for image in images] for images, _ in split)
    earlier = sorted(_seen(record).difference(train, val))
    record.split = {"train": train, "val": val, "test": test}
    if earlier:
        record.split["earlier"] = earlier


def stored_test_split(model: keras.Model, image_paths: Paths, mask_paths: Paths) -> Pairs:
    """Returns the test set that was held out when the model was trained, in its order."""
    ids = model_record(model).split.get("test", [])
    _require(ids, "The model file names no test set: score every image (with --all).")
    found = {image_id(pair[0]): pair for pair in _zip_pairs(image_paths, mask_paths)}
    missing = [id_ for id_ in ids if id_ not in found]
    _require(not missing, f"{len(missing)} of its {len(ids)} test images are not among the "
             f"{len(found)} images ({_shorten(missing)}): give the folder on which the model was "
             "trained, or score every image of this one (with --all).")
    return _unzip([[found[id_] for id_ in ids]])


def image_ids_seen(model: Models, image_paths: Paths) -> list[str]:
    """Returns the ids of the images that a model was trained or validated on, in order."""
    seen = set.union(*(_seen(model_record(member)) for member in _settings(model)[0]))
    return [id_ for id_ in map(image_id, image_paths) if id_ in seen]


def _seen(record: ModelRecord) -> set[str]:
    parts = (record.split.get(part, ()) for part in ("earlier", "train", "val"))
    return set(itertools.chain(*parts))


# --- 9. Results: every image at its original resolution, numbers first, then figures ----------

Scores = Sequence[Mapping[str, Any]]  # of each image, as `results` returns them
History = Mapping[str, Sequence[float]]  # the learning curves of a record
Properties = Mapping[str, Mapping[str, Any]]  # {id: {property: value}}


def restore_masks(generator: ImageGenerator, predictions: Iterable[Array]) -> Iterator[Mask]:
    """Yields masks of `predictions`, `bool (height, width)` at the original resolution."""
    for lesion, (path, _) in zip(_checked(generator, predictions), generator.pairs, strict=True):
        yield _make_mask(lesion, _size_of(path))


def _checked(generator: ImageGenerator, predictions: Iterable[Array]) -> Iterator[Predictions]:
    """Yields the predictions, and refuses those that another generator gave."""
    many = len(predictions) if isinstance(predictions, Sequence | np.ndarray) else None
    _require(not generator.shuffle, "The order of shuffled images is unknown: use shuffle=False.")
    for pair, prediction in itertools.zip_longest(generator.pairs, predictions):
        shape = np.shape(prediction)
        belongs = pair is not None and shape == (*generator.image_size, 1)
        belongs = belongs and many in (None, len(generator.pairs))
        _require(belongs, f"The predictions, too few, too many or of shape {shape}, do not match "
                 f"the generator of {len(generator.pairs)} images of {generator.image_size}. "
                 "Predict with this generator, and use the result once.")
        yield np.asanyarray(prediction).view(Predictions)


def results(
    test_generator: ImageGenerator, predictions: Iterable[Array], *, num_imgs: int = 4,
    history: Any = None, output_dir: StrPath | None = None,
    notes: Mapping[str, Any] | None = None, findings: Sequence[Finding] = (),
    compare: Scores = (), metadata: Properties | None = None
) -> list[dict[str, Any]]:
    """Scores each image at its original resolution; prints, plots and writes the results.

    Plots the first `num_imgs` images with target and prediction, the `num_imgs` worst ones with
    both outlines, the histogram of Dice, and the learning curves. A notebook shows the figures.
    Images without masks get an estimate instead of scores, and an outline in `overlays/`.

    Args:
        test_generator: The images, not shuffled, with or without masks.
        predictions: What `predict` or `predict_each` returned. Of folds, an iterator over all; a
            plain array is thresholded at 0.5.
        num_imgs: Number of images in each of the two figures.
        history: The learning curves: those of a record, or what `train_model` returned.
        output_dir: Folder for `scores.csv` (a row per image, full precision), `summary.json`, the
            figures (PNG), `report.html` and `masks/`. Files of these names are replaced.
        notes: Further entries of `summary.json`.
        findings: Those of `usable_pairs`; files left out and resized masks are entries as well.
        compare: Scores of another run (`read_scores`); `compare_scores` joins the summary.
        metadata: A table about the images (`read_metadata`), by which `subgroups` are scored.

    Returns:
        For each image its `"id"` and `"estimated_dice"`, if it was fitted `"dice_lower_bound"`, and
        if it has a mask the `METRICS`, the `DISTANCES` and `"lesion"`, the id of the first image
        that shows the same lesion.
    """
    _require(not (compare or metadata) or test_generator.mask_paths is not None, NEEDS_MASKS)
    output = None if output_dir is None else Path(output_dir)
    history = getattr(history, "history", history)
    scores, drawn, thresholds = _score_all(test_generator, predictions, output, num_imgs)
    thumbnails = [score.pop("thumbnail", "") for score in scores]
    threshold = thresholds if len(thresholds) > 1 else thresholds[0]  # of several folds
    summary = {"threshold": threshold, **(notes or {})}
    summary["left_out"] = [finding.path for finding in findings if finding.severity == "error"]
    summary["resized_masks"] = sum(finding.kind == "resized masks" for finding in findings)
    if test_generator.mask_paths is not None:
        summary["subgroups"] = subgroups(scores, _examine_pairs(scores, test_generator, metadata))
    if compare:
        summary["comparison"] = compare_scores(scores, compare)
    summary |= summarize(scores)
    print(_report(summary))
    if output:
        _write_table(output / "scores.csv", scores)
        with _written_whole(output / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1, default=str), encoding="utf-8")
    _show_figures(_figures(test_generator, drawn, scores, num_imgs, history), output)
    if output:
        _write_page(output, summary, scores, thumbnails, history)
    return scores


def _show_figures(figures: Iterable[tuple[str, Figure]], output: Path | None) -> None:
    ipython: Any = sys.modules.get("IPython")
    notebook = ipython is not None and ipython.get_ipython() is not None
    for name, figure in figures if output or notebook else ():  # or nobody would see them
        if output:
            save_figure(figure, output / f"{name}.png")
        if notebook:
            ipython.display.display(figure)


def _score_all(
    generator: ImageGenerator, predictions: Iterable[Array], output: Path | None, num_imgs: int
) -> tuple[list[dict[str, Any]], dict[int, Predictions], list[float]]:
    """Scores and thumbnails of all images, the predictions to draw, and the thresholds."""
    if output:
        _check_file_to_write(output / "scores.csv")  # before the first image is predicted
        for folder in ("", "masks", "overlays"):
            _remove_leftovers(output / folder)
    scores, drawn, thresholds = list[dict[str, Any]](), dict[int, Predictions](), set[float]()
    names = _unique_names([image for image, _ in generator.pairs])
    lesions = _checked(generator, predictions)
    score_image = functools.partial(_score_image, generator, output)
    for i, score in enumerate(_map_ahead(score_image, lesions, generator.pairs, names, ahead=64)):
        drawn[i] = score.pop("prediction")
        thresholds.add(float(drawn[i].threshold))
        scores.append(score)
        worst = {*sorted(drawn, key=lambda k: _shown_score(scores[k])[1])[:num_imgs]}
        drawn = {k: drawn[k] for k in drawn if k < num_imgs or k in worst}
    # Of several folds, some may be too small to fit an estimate.
    shared = [name for name in scores[0] if all(name in score for score in scores)]
    scores = [{name: score[name] for name in shared} for score in scores]
    return scores, drawn, sorted(thresholds)


def _unique_names(paths: Sequence[str]) -> list[str]:
    """Names images by id; where images share one, by stem, by path, by number."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = list(map(image_id, paths))
    stems = [Path(path).stem for path in paths]
    for longer in (stems, [os.path.relpath(path, root) for path in paths]):
        counts = Counter(names)
        names = [other if counts[n] > 1 else n for n, other in zip(names, longer, strict=True)]
    # File systems allow 255 bytes, of which masks and temporary files need some.
    names = [re.sub(r"[/\\]", "_", name).encode()[-200:].decode(errors="ignore") for name in names]
    counts = Counter(name for name, _ in {*zip(names, paths, strict=True)})
    return [f"{name}_{i}" if counts[name] > 1 else name for i, name in enumerate(names, 1)]


def _score_image(
    generator: ImageGenerator, output: Path | None, lesion: Predictions, pair: Pair, name: str
) -> dict[str, Any]:
    image_path, mask_path = pair
    size = _size_of(image_path)
    mask = _make_mask(lesion, size)
    scores: dict[str, Any] = {"id": name, "prediction": lesion}
    if mask_path is not None:
        _check_same_size(image_path, mask_path, generator.cache.fit_masks)
        soft = generator.cache.soft_masks
        truth = _decode(mask_path, [None], mask=True, fit_to=size, soft=soft)[0][..., 0] >= 128
        scores |= score_masks(truth, mask) | boundary_distances(truth, mask)
    if output is not None:
        with _written_whole(output / "masks" / f"{name}_segmentation.png") as temporary:
            Image.fromarray(mask * np.uint8(255)).save(temporary)
        scores["thumbnail"] = _thumbnail(_pictures(generator, lesion, pair))
    if output is not None and mask_path is None:
        width = 1 + max(mask.shape) // 400
        overlay = load_input_image(image_path, None).copy()
        overlay[mask & ~ndimage.binary_erosion(mask, iterations=width)] = (255, 0, 255)
        with _written_whole(output / "overlays" / f"{name}_overlay.jpg") as temporary:
            Image.fromarray(overlay).save(temporary, quality=90)
    scores["estimated_dice"] = float(estimate_dice(lesion[None])[0])
    if lesion.estimate:
        scores["dice_lower_bound"] = float(estimate_dice(lesion[None], bound=True)[0])
    return scores


def _examine_pairs(
    scores: Sequence[dict[str, Any]], generator: ImageGenerator, metadata: Properties | None = None
) -> dict[str, dict[str, Any]]:
    """Adds the lesion to each score; returns metadata and what goes with errors in the frame."""
    ids = dict(zip(generator.pairs, (score["id"] for score in scores), strict=True))
    for lesion in _group_lesions(list(ids), generator.image_size, generator.cache):
        ids |= dict.fromkeys(lesion, ids[lesion[0]])
    properties = {}
    for score, pair in zip(scores, generator.pairs, strict=True):
        score["lesion"] = ids[pair]
        height, width = _size_of(pair[0])
        frame = _crop(generator.cache.load(*pair, generator.image_size), (height, width))
        grey, lesion_mask = frame[..., :3].mean(axis=2), frame[..., 3] >= 128
        contrast = [grey.mean(where=lesion_mask == part) if (lesion_mask == part).any() else np.nan
                    for part in (0, 1)]
        properties[score["id"]] = {
            "megapixels": height * width / 1e6, "lesion, % of the image": 100 * lesion_mask.mean(),
            "skin less lesion, grey levels": contrast[0] - contrast[1],
            **(metadata or {}).get(score["id"], {})}
    return properties


def summarize(scores: Scores) -> dict[str, Any]:
    """Summarizes the scores that `results` returned, beyond their mean.

    Returns `"images"`, the ten lowest estimates as `"doubtful": {id: estimate}`, and for each score
    `{"mean", "std", "median", "p10", "p90", "min", "max", "ci95"}`, the last one the 95 % interval
    of the mean, by lesion, or `None` for a single lesion. With masks also `"worst": {id: Dice}`,
    `"failures"`, `"estimate_rank_correlation"` (Spearman's, with Dice) and `"estimate_roc_auc"`
    (how well the estimate separates failures from successes), both `None` where undefined, and
    `"lower_bound_holds"`, the fraction of images whose Dice is at least the bound.
    """
    _require(len(scores) > 0, "There are no scores to summarize: score at least one image.")
    columns = {name: [score[name] for score in scores] for name in scores[0]}
    ids, lesions = columns.pop("id"), columns.pop("lesion", None)
    summary: dict[str, Any] = {"images": len(scores)}
    for title, name in (("worst", "dice"), ("doubtful", "estimated_dice")):
        if name in columns:
            lowest = np.argsort(columns[name], kind="stable")[:10]
            summary[title] = {ids[i]: columns[name][i] for i in lowest}
    if "dice" in columns:
        dice, estimate = columns["dice"], columns["estimated_dice"]
        failed = np.array(columns["jaccard"]) < JACCARD_FAILURE
        varied = min(len(set(dice)), len(set(estimate))) > 1
        rank = float(stats.spearmanr(dice, estimate).statistic) if varied else None
        auc = float(roc_auc_score(~failed, estimate)) if len(set(failed)) > 1 else None
        summary["failures"] = int(failed.sum())
        if "dice_lower_bound" in columns:
            holds = np.array(dice) >= columns["dice_lower_bound"]
            summary["lower_bound_holds"] = float(holds.mean())
        summary |= {"estimate_rank_correlation": rank, "estimate_roc_auc": auc}
    statistics = ("mean", "std", "median", "p10", "p90", "min", "max")
    for name, values in columns.items():
        numbers = np.mean(values), np.std(values), *np.percentile(values, (50, 10, 90, 0, 100))
        summary[name] = dict(zip(statistics, map(float, numbers), strict=True))
        summary[name]["ci95"] = _mean_interval(values, lesions or ids)
    return summary


def _mean_interval(values: Array | Sequence[float], lesions: Sequence[str]) -> list[float] | None:
    """The 95 % confidence interval of a mean, by a bootstrap that draws whole lesions."""
    _, numbers, counts = np.unique(lesions, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return None
    bounds = stats.bootstrap(
        (np.bincount(numbers, values), counts), lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True, n_resamples=2000, batch=100, method="percentile", random_state=0)
    return [float(bound) for bound in bounds.confidence_interval]


def read_scores(path: StrPath, ids: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Reads a `scores.csv` of images with masks; with `ids`, it must score at least one of them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [{key: cell if key in ("id", "lesion") else float(cell) for key, cell in
                     row.items()} for row in csv.DictReader(file)]
        scored = {row["id"] for row in rows if 0 <= float(row["dice"]) <= 1}
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise SegmentError(f"{path}: expected a scores.csv with id and dice ({error}).") from error
    ids = set(ids)
    _require(len(scored) == len(rows), f"{path} has {len(rows)} rows for {len(scored)} ids with a "
             "Dice of 0 to 1: expected one each.")
    _require(not ids or ids & scored, f"{path} scores none of these {len(ids)} images.")
    return rows


def compare_scores(scores: Scores, others: Scores) -> dict[str, Any]:
    """Compares the Dice of two runs image by image, as `results` or `read_scores` returned it.

    Returns `"images"` (in both), `"unmatched"` (in one), `"mean_difference"` (above 0 if `scores`
    are better), `"ci95"`, `"wilcoxon_p"`, `"wins"`, `"ties"`, `"losses"`, `"most_changed"` (ten).
    """
    there = {row["id"]: float(row["dice"]) for row in others if "dice" in row}
    _require(len({row["id"] for row in others}) == len(others), "The other scores have an id twice:"
             " expected one row for each.")
    both = [row for row in scores if row["id"] in there and "dice" in row]
    _require(both, "No image has a Dice in both: compare scores of the same images.")
    change = np.array([float(row["dice"]) - there[row["id"]] for row in both])
    lesions = [row.get("lesion", row["id"]) for row in both]
    _, numbers, counts = np.unique(lesions, return_inverse=True, return_counts=True)
    means = np.bincount(numbers, change) / counts  # of lesions, which are independent
    return {
        "images": len(both), "unmatched": len(scores) + len(others) - 2 * len(both),
        "mean_difference": float(change.mean()), "wins": int((change > 0).sum()),
        "ties": int((change == 0).sum()), "losses": int((change < 0).sum()),
        "ci95": _mean_interval(change, lesions),
        "wilcoxon_p": float(stats.wilcoxon(means).pvalue) if means.any() else 1.0,
        "most_changed": {both[i]["id"]: float(change[i]) for i in np.argsort(-abs(change))[:10]},
    }


def read_metadata(path: StrPath, ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Reads a table about images, as ISIC ships it: returns the row of each of the ids.

    The id column is the one that names most of them. Ids without a row are counted in a warning.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in file if line.strip() and not line.startswith("sep=")]
        delimiter = max(",;\t|", key="".join(lines[:1]).count)
        table = csv.DictReader(lines, restval="", delimiter=delimiter, skipinitialspace=True)
        rows = [{key: cell for key, cell in row.items() if key} for row in table]
    except (OSError, ValueError, csv.Error) as error:
        what = f"{path}: expected a CSV file in UTF-8 with a header"
        raise SegmentError(f"{what} ({error}).") from error
    ids, best = set(ids), dict[str, dict[str, str]]()
    columns = rows[0] if rows else ()  # of two that fit equally, the one called image
    for column in sorted(columns, key=lambda name: not re.search("(?i)image|isic", name)):
        by_id = {image_id(row[column].strip().replace("\\", "/")):
                 {name: cell for name, cell in row.items() if name != column} for row in rows}
        best = max(best, {id_: by_id[id_] for id_ in ids & by_id.keys()}, key=len)
    _require(any(best.values()), f"{path}: no column holds the id of one of these {len(ids)} "
             "images, beside columns about them.")
    if len(best) < len(ids):
        what = f"{len(ids) - len(best)} of {len(ids)} images have no row"
        warnings.warn(f"{path}: {what} ({_shorten(sorted(ids - {*best}))}).", stacklevel=2)
    return best


def subgroups(scores: Scores, properties: Properties) -> list[dict[str, Any]]:
    """Scores the groups of images that share a property, given as `{id: {property: value}}`.

    More than 8 different numbers are grouped by quartile. A property with more than 20 groups, or
    with one, is left out. Returns for each group `{"property", "group", "images", "dice", "ci95",
    "failures"}`, with the mean Dice and its interval as in `summarize`.
    """
    table = []
    for name in dict.fromkeys(itertools.chain(*properties.values())):
        known = [score for score in scores if name in properties.get(score["id"], ())]
        groups = _group(known, [properties[score["id"]][name] for score in known])
        if not 1 < len(groups) <= 20:
            continue
        for group, chosen in groups.items():
            dice = [float(score["dice"]) for score in chosen]
            interval = _mean_interval(dice, [score.get("lesion", score["id"]) for score in chosen])
            failures = sum(float(score["jaccard"]) < JACCARD_FAILURE for score in chosen)
            table.append({"property": name, "group": group, "images": len(chosen),
                          "dice": float(np.mean(dice)), "ci95": interval, "failures": failures})
    return table


def _group(scores: Scores, values: Sequence[Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups scores by their values, in the order of the values, the missing last."""
    missing = {"", "na", "nan", "none", "null", "unknown"}
    texts = [str(value).strip() for value in values]
    texts = ["missing" if text.lower() in missing else text for text in texts]
    ranks: list[Any] = [(text == "missing", text) for text in texts]
    with contextlib.suppress(ValueError):  # if one is no number
        ranks = [math.inf if text == "missing" else float(text) for text in texts]
        known = [rank for rank in ranks if rank < math.inf]
        if len(set(known)) > 8:
            edges = np.unique(np.quantile(known, (0, 0.25, 0.5, 0.75, 1)))
            bins = np.searchsorted(edges[1:-1], ranks, "right")
            texts = ["missing" if rank == math.inf else f"{edges[i]:g} to {edges[i + 1]:g}"
                     for rank, i in zip(ranks, bins, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: (ranks[i], texts[i]))
    return {text: [scores[i] for i in group]
            for text, group in itertools.groupby(order, texts.__getitem__)}


def _report(summary: Mapping[str, Any]) -> str:
    """The printed summary: a table of the scores, the failures, the images to look at first."""
    count, failures = summary["images"], summary.get("failures")
    lines = [f"{count} images, each at its original resolution",
             f"{'':19}       mean     median    p10/p90    min/max   95 % interval"]
    names = (*METRICS, *DISTANCES, "estimated_dice", "dice_lower_bound")
    for name in filter(summary.__contains__, names):
        unit, tail, end = (" %", "p90", "max") if name in DISTANCES else ("", "p10", "min")
        values = "".join(f"{summary[name][part]:11.6f}" for part in ("mean", "median", tail, end))
        interval = " to ".join(f"{bound:.4f}" for bound in summary[name]["ci95"] or ())
        lines.append(f"{name.replace('_', ' ') + unit:19}{values}  {interval}".rstrip())
    if failures is not None:
        lines.append(f"Failures (Jaccard < {JACCARD_FAILURE}): {failures} ({failures / count:.1%})")
    if "lower_bound_holds" in summary:
        lines.append(f"Dice is at least its lower bound in {summary['lower_bound_holds']:.1%}")
    titles = {"worst": "Worst images by Dice", "doubtful": "Check first, by estimated Dice"}
    for name in filter(summary.__contains__, titles):
        lines.append(f"{titles[name]}:")
        lines += [f"  {id_}  {dice:.6f}" for id_, dice in list(summary[name].items())[:5]]
    if (comparison := summary.get("comparison")) is not None:
        interval = " to ".join(f"{b:+.6f}" for b in comparison["ci95"] or ()) or "one lesion"
        lines.append("Compared with the other run: Dice {mean_difference:+.6f} ({}), "
                     "p = {wilcoxon_p:.2g}, {wins} better, {ties} equal, {losses} worse"
                     .format(interval, **comparison))
    return "\n".join(lines)


def _figures(
    generator: ImageGenerator, predictions: Mapping[int, Array], scores: Scores, num_imgs: int,
    history: History | None
) -> Iterator[tuple[str, Figure]]:
    """The figures of `results` by file name; each shows up to 20 images."""
    drawn = min(num_imgs, len(scores))
    worst = sorted(predictions, key=lambda i: _shown_score(scores[i])[1])[:drawn]
    for name, indices in (("predictions", range(drawn)), ("worst", worst)):
        for start in range(0, drawn, 20):
            page, contours = indices[start : start + 20], name == "worst"
            figure = plot_predictions(generator, predictions, scores, page, contours=contours)
            yield name + f"_{start + 1}" * (drawn > 20), figure
    yield "histogram", plot_dice_histogram(scores)
    if history:
        yield "training", plot_history(history)


def _shown_score(score: Mapping[str, Any]) -> tuple[str, float]:
    """The name and value of Dice, or of its estimate for an image without a mask."""
    if "dice" in score:
        return "Dice", score["dice"]
    return "estimated Dice", score["estimated_dice"]


def plot_predictions(
    generator: ImageGenerator, predictions: Array | Mapping[int, Array], scores: Scores,
    indices: Sequence[int], *, contours: bool = False
) -> Figure:
    """Plots input, target (if any) and prediction of the chosen images, with id and Dice.

    `predictions` are what `predict` returned, or a part of it by index, and `scores` what `results`
    returned. With `contours`, the outlines of target and prediction are drawn over the input.
    """
    _require(len(indices) > 0, "indices is empty: expected at least one image to plot.")
    columns = 2 if generator.mask_paths is None else 3
    figure, axes = _subplots(len(indices), columns, width=8, height=0.4 + 2.2 * len(indices))
    for i, cells in zip(indices, axes, strict=True):
        pictures = _pictures(generator, predictions[i].view(Predictions), generator.pairs[i])
        name, value = _shown_score(scores[i])
        titles = [scores[i]["id"], *list(pictures)[1:]]
        titles[-1] += f", {name} {value:.4f}"
        for cell, picture, title in zip(cells, pictures.values(), titles, strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1)
            cell.set_title(title, fontsize="medium", parse_math=False)
            cell.axis("off")
        if contours:
            _draw_contours(cells[0], pictures)
    if contours:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _pictures(generator: ImageGenerator, prediction: Predictions, pair: Pair) -> dict[str, Array]:
    """An image without the black bars of its frame, its target (if any) and its prediction."""
    size = _size_of(pair[0])
    frame = _crop(generator.cache.load(*pair, generator.image_size), size)
    pictures = {"Input": frame[..., :3]}
    if pair[1] is not None:
        pictures["Target"] = frame[..., 3] >= 128
    height, width = pictures["Input"].shape[:2]
    return {**pictures, "Prediction": _make_mask(prediction, size, (height, width))}


def _draw_contours(axes: Axes, pictures: Mapping[str, Array]) -> None:
    for name, color in {"Target": "lime", "Prediction": "magenta"}.items():
        if name in pictures:
            # A rim of background closes the outline of a lesion at the edge of the picture.
            padded = np.pad(pictures[name].astype(float), 1)
            if padded.any():
                x, y = (np.arange(side) - 1 for side in padded.shape[::-1])
                axes.contour(x, y, padded, levels=[0.5], colors=color, linewidths=1.5)
            axes.plot([], [], color=color, label=name)


def plot_dice_histogram(scores: Scores) -> Figure:
    """Plots the distribution of Dice, or without masks of its estimate, in the `results`."""
    title = "Dice coefficient" if "dice" in scores[0] else "Estimated Dice coefficient"
    dice = np.array([_shown_score(score)[1] for score in scores])
    figure, ((axes,),) = _subplots(1, 1, width=7, height=4)
    axes.hist(dice, bins=40, range=(0, 1), color="tab:blue", edgecolor="white")
    axes.axvline(dice.mean(), color="tab:red", label=f"Mean {dice.mean():.4f}")
    axes.axvline(np.median(dice), color="black", ls="--", label=f"Median {np.median(dice):.4f}")
    axes.set(xlabel=title, ylabel="Images", xlim=(0, 1), title=f"{title} of {len(dice)} images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    return figure


def plot_history(history: History) -> Figure:
    """Plots accuracy, loss and Dice over the epochs, as far as the history of a record has them."""
    titles = {"accuracy": "Accuracy", "loss": "Loss", "dice_coefficient": "Dice coefficient"}
    panels = [name for name in titles if history.get(name)]
    _require(panels, "The history holds no epoch: train the model first.")
    figure, (axes,) = _subplots(1, len(panels), width=4 * len(panels), height=3.6)
    epochs, scores = max(map(len, history.values())), _epoch_scores(history)
    best = epochs - len(scores) + int(np.argmax(scores)) + 1
    for cell, name in zip(axes, panels, strict=True):
        for key, label in ((name, "Training"), (f"val_{name}", "Validation")):
            if curve := history.get(key):  # which may have begun in a later epoch
                cell.plot(range(epochs - len(curve) + 1, epochs + 1), curve, ".-", label=label)
        cell.axvline(best, color="gray", ls="--", label=f"Best epoch ({best})")
        cell.set(title=titles[name], xlabel="Epoch")
        cell.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    return figure


def save_figure(figure: Figure, path: StrPath) -> None:
    """Writes a figure as a PNG file, which is never incomplete; creates its folder."""
    with _written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Array]:
    """A figure in inches and its axes, `(rows, columns)`, which pyplot neither keeps nor shows."""
    size = (width, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    plt.close(figure)
    return figure, axes


PAGE = string.Template("""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Segmented images: $total</title><style>
html { color-scheme: light dark; font: 1em sans-serif } td + td { text-align: end; padding: 0 9px }
header > :not([hidden]) { display: inline-block; max-width: 96%; margin: 0 2%; overflow: auto }
svg { height: 310px; stroke: currentColor; stroke-width: .3; fill: #8888; font-size: 4px }
form { display: flex; flex-wrap: wrap; gap: 0 2em; position: sticky; top: 0; background: Canvas }
main { display: grid; grid: auto / repeat(auto-fill, minmax(11em, 1fr)); gap: 8px }
main a { border: 2px solid gray; color: inherit; overflow-wrap: anywhere }
main a::after { content: 'Dice ' attr(data-dice) ' (estimated: ' attr(data-estimated_dice) ')' }
main img { width: 100%; aspect-ratio: 4/3; object-fit: contain } :target img { height: 85vh }
:target { position: fixed; inset: 0; background: Canvas } :target::after { content: attr(title) }
</style><h1>Segmented images: $total</h1><header>$tables $plots
<div $unscored><svg viewBox="-1 -1 102 108"><path fill="none" d="M0 0V100H100M0 100L100 0"/>$dots
<text y="106">Dice (up) over its estimate (right), 0 to 1</text></svg></div></header>
<form id="view"><label>Sort by <select name="by">$options</select></label>
<label><input type="checkbox" name="down">descending</label> <label>Id <input name="part"></label>
<label $unscored><input type="checkbox" name="failures">failures (Jaccard &lt; $failure)</label>
<span>Outlines: prediction magenta<span $unscored>, target lime</span></span></form>
<main id="gallery">$cards</main><script>
view.onsubmit = () => false;
const cards = [...gallery.children], {compare} = new Intl.Collator('en', {numeric: true});
(view.oninput = () => {
  const by = view.by.value, part = view.part.value.toLowerCase(), sign = view.down.checked ? -1 : 1;
  gallery.replaceChildren(...cards.filter(({dataset}) => dataset.id.toLowerCase().includes(part)
    && (dataset.thresholded_jaccard == 0 || !view.failures.checked)  // it is 0 for a failure
  ).sort((a, b) => sign * compare(a.dataset[by], b.dataset[by])));
})();
gallery.onclick = event => event.target.closest(':target') ? location.replace('#-') ?? false : true;
onkeydown = ({key}) => document.querySelector(  // a click on what is shown large closes it
  {ArrowLeft: ':has(+ :target)', ArrowRight: ':target + a', Escape: ':target'}[key])?.click();
</script></html>""")


def _write_page(
    output: Path, summary: Mapping[str, Any], scores: Scores, thumbnails: Any, history: Any
) -> None:
    """Writes `report.html`, a single file: tables, plots, and all images to sort and filter."""
    _, *names = scores[0]
    tables = [
        [{"": name, "value": v} for name, v in summary.items() if isinstance(v, int | float)],
        [{"": name, **summary[name]} for name in names if name in summary],
        summary.get("subgroups", []),
        [{"comparison": name, "value": f"{v:.2g}" if name == "wilcoxon_p" else v} for name, v in
         summary.get("comparison", {}).items() if not isinstance(v, dict)],
    ]
    plots = [output / f"{name}.png" for name in ("histogram", "training")[: 1 + bool(history)]]
    dots = (f'<a href="#{i}"><circle r="1" cx="{100 * score["estimated_dice"]}" '
            f'cy="{100 - 100 * score.get("dice", 0)}"/></a>' for i, score in enumerate(scores))
    with _written_whole(output / "report.html") as temporary:
        page = PAGE.substitute(
            total=len(scores), failure=JACCARD_FAILURE, unscored="hidden" * ("dice" not in names),
            tables="".join(map(_table, tables)), dots="".join(dots),
            plots="".join('<img alt="" src="data:image/png;base64,'
                          f'{base64.b64encode(plot.read_bytes()).decode()}">' for plot in plots),
            options="".join(f"<option>{name}</option>" for name in (*names, "id")),
            cards="".join(map(_card, itertools.count(), scores, thumbnails)))
        temporary.write_text(page, encoding="utf-8")


def _card(i: int, score: Mapping[str, Any], thumbnail: str) -> str:
    data = "".join(f' data-{name}="{_text(value)}"' for name, value in score.items())
    title = ", ".join(f"{name} {_text(value)}" for name, value in score.items() if name != "id")
    return f'<a id="{i}" href="#{i}" title="{title}"{data}><img loading="lazy" alt="" ' \
           f'src="data:image/jpeg;base64,{thumbnail}">{_text(score["id"])}<br></a>\n'


def _thumbnail(pictures: Mapping[str, Array]) -> str:
    """A JPEG of about 256 pixels on the long side with the outlines, in base64."""
    step = max(1, round(max(pictures["Input"].shape) / 256))
    picture, *masks = (part[::step, ::step].copy() for part in pictures.values())
    for mask, color in zip(masks, [(0, 255, 0), (255, 0, 255)][-len(masks):], strict=True):
        picture[(mask > 0) & ~ndimage.binary_erosion(mask)] = color
    Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=80, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in HTML, with a column for each of their keys."""
    columns = dict.fromkeys(itertools.chain(*rows))
    body = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    return f"<table><tr><td>{'<tr><td>'.join('<td>'.join(map(_text, row)) for row in body)}</table>"


def _text(value: Any) -> str:
    """Text in HTML: numbers with four digits, an interval as `low – high`."""
    if isinstance(value, list | None):
        return " – ".join(map(_text, value or ()))
    return html.escape(f"{value:.4f}" if isinstance(value, float) else str(value))


# --- 10. Drivers ------------------------------------------------------------------------------

def run_driver(
    steps: Callable[[Any], None], options: Any, *,
    startup: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
) -> int:
    """Runs the steps of a driver, and returns its exit status: 0, 2 (an error) or 130 (Ctrl-C)."""
    with contextlib.suppress(AttributeError):  # for names that the terminal cannot print
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    plt.switch_backend("agg")  # it draws into files, whatever the environment says
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda what, *_, **__: print(f"Warning: {what}", file=sys.stderr)
            _check_files(options)
            _reuse_freed_memory()
            logging.getLogger("tensorflow").setLevel("ERROR")  # it warns of a trace for each fold
            with startup():
                sharing, device = data_parallel(getattr(options, "devices", 1)), describe_device()
            print(f"Device: {device}")
            with sharing:
                steps(options)
            print(end="", flush=True)  # a closed pipe is an error here rather than at exit
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (SegmentError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        if not re.search(r"out of memory|\bOOM\b|RESOURCE_EXHAUSTED|MemoryError", what):
            raise
        print("Error: out of memory: choose a smaller --batch-size, or in training --image-size.",
              file=sys.stderr)
        return 2
    return 0


def _reuse_freed_memory() -> None:
    """Lets glibc keep what an operation frees for the next one, which halves a training step.

    Otherwise the system takes back large blocks, and clears each page when it is used again.
    """
    with contextlib.suppress(AttributeError, TypeError):  # of another system or C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _check_files(options: Any) -> None:
    """Refuses tables that are missing, and an output folder in which results mix with images."""
    given = getattr(options, "__dict__", {})
    for path in filter(None, map(given.get, ("compare", "metadata", "start_from"))):
        _require(Path(path).is_file(), f"{path}: there is no such file.")
    if given.get("save"):
        _check_file_to_write(options.save, ".keras")
    folders = filter(None, map(given.get, ("image_dir", "mask_dir", "val_dir", "val_masks")))
    if (output := given.get("output")) is not None:
        written = {os.path.realpath(Path(output, name)) for name in ("", "masks", "overlays")}
        _require(written.isdisjoint(map(os.path.realpath, folders)), f"--output {output} would "
                 "write among the images or masks: give a folder of its own.")
