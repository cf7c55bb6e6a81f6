"""Segmentation of skin lesions in the ISIC data set with an improved UNet.

The module reads in the order in which the data flows: loading, inspection, split, generators,
model, Dice, training, saving, results. In short::

    image_paths, mask_paths = segment.find_image_pairs("images/sample/input", "images/sample/truth")
    train, val, test = segment.train_val_test_split(image_paths, mask_paths)
    train_generator = segment.create_generator(*train, shuffle=True, augment=True)
    val_generator, test_generator = (segment.create_generator(*part) for part in (val, test))
    model = segment.create_model()
    segment.train_model(model, train_generator, val_generator, epochs=60)
    segment.save_model(model, "unet.keras", split=(train, val, test))
    scores = segment.results(test_generator, segment.predict(model, test_generator))

Image sizes are `(height, width)` in pixels everywhere. Nothing runs on import. The module works on
Keras' backends TensorFlow (unless `KERAS_BACKEND` says otherwise), JAX and PyTorch.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter
from scipy import ndimage, sparse, stats
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import shuffle

__all__ = [  # noqa: RUF022, by the alphabet
    "check_pairs",
    "checksum",
    "choose_threshold",
    "create_generator",
    "create_model",
    "data_parallel",
    "describe_device",
    "dice_coefficient",
    "dice_cross_entropy_loss",
    "dice_loss",
    "estimate_dice",
    "find_image_pairs",
    "find_images",
    "find_same_lesions",
    "Finding",
    "image_id",
    "image_ids_seen",
    "IMAGE_SIZE",
    "ImageGenerator",
    "inspect",
    "letterbox",
    "load_input_image",
    "load_model",
    "load_segmented_image",
    "load_weights",
    "make_deterministic",
    "METRICS",
    "model_record",
    "ModelRecord",
    "PairCache",
    "plot_dice_histogram",
    "plot_history",
    "plot_image_sizes",
    "plot_predictions",
    "predict",
    "predict_each",
    "restore_masks",
    "results",
    "save_figure",
    "save_model",
    "score_masks",
    "SegmentError",
    "stored_test_split",
    "summarize",
    "train_model",
    "train_val_test_split",
]

IMAGE_SIZE = (256, 256)  # the network's frame, as in the original
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
METRICS = ("dice", "jaccard", "thresholded_jaccard", "sensitivity", "specificity", "accuracy")
JACCARD_FAILURE = 0.65  # below it the ISIC 2018 challenge counts a segmentation as failed
FORMATS = ("JPEG", "PNG", "BMP", "TIFF")  # all that is decoded; MPO comes with JPEG
MAX_PIXELS = 2**26  # of a photograph; ISIC's largest have half of that
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
QUARTER_TURNS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}
PRETRAINED = Path(__file__).with_name("pretrained.keras")  # what load_model takes by default
REPORTED = ("mean", "median", "p10", "min")  # what results prints of each score
RINGS, ANGLES = 16, 64  # samples of a lesion, to tell whether two images show the same one
SAME_LESION = 0.63  # of the likeness of two images: found on real ones, see the README
OUTLINE_DOUBT = 0.005  # the Dice it costs a mask of the whole frame: see tests/experiments.md
BEST = "val_dice_coefficient"  # what the best epoch is best in

Size = tuple[int, int]
StrPath = str | os.PathLike[str]
Pair = tuple[str, str]
Pairs = tuple[list[str], list[str]]
Array = NDArray[Any]
Tensor = Any  # of whichever backend


class SegmentError(ValueError):
    """Input that cannot be used; says what was received, what was expected and what to do."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SegmentError(otherwise)


# ----------------------------------------------------------------------------------------------
# 1. Loading: from a folder to pairs, from a file to an array
# ----------------------------------------------------------------------------------------------


def image_id(path: StrPath) -> str:
    """The id that an image and its mask share.

    Args:
        path: Path or name of an image or of a mask.

    Returns:
        The ISIC id, `"ISIC_0012345"`, wherever the name begins with one; else the name without its
        suffix and without a closing `_segmentation` (in any case).
    """
    stem = Path(path).stem
    isic = re.match(r"ISIC_\d+", stem, re.IGNORECASE)
    return isic[0].upper() if isic else re.sub(r"_segmentation$", "", stem, flags=re.IGNORECASE)


def find_image_pairs(image_dir: StrPath, mask_dir: StrPath) -> Pairs:
    """Finds the images of a folder and the mask of each.

    Takes the ISIC 2016, 2017 and 2018 folders as they are unpacked, and plain folders in which
    image and mask share a stem. Superpixels, CSVs, licences and hidden files are passed over. One
    folder may hold both, as in ISIC 2016 part 3B: then names in `_segmentation` are the masks.

    Args:
        image_dir: Folder of the images (.jpg, .jpeg, .png, .bmp, .tif or .tiff, in any case).
        mask_dir: Folder of the masks.

    Returns:
        `(image_paths, mask_paths)`, two lists of equal length in the order of the ids.

    Raises:
        SegmentError: If a folder is missing or holds no image, if an id occurs twice, or if an
            image or a mask stands alone; counts the cases and names the first few.
    """
    one_folder = Path(image_dir).resolve() == Path(mask_dir).resolve()
    image_files = [path for path in _list_images(image_dir) if not _is_mask(path)]
    mask_files = [path for path in _list_images(mask_dir) if _is_mask(path) or not one_folder]
    images = {image_id(path): path for path in image_files}
    masks = {image_id(path): path for path in mask_files}
    problems = {
        "ids that several images share": _repeated(image_files),
        "ids that several masks share": _repeated(mask_files),
        "images without a mask": sorted(images.keys() - masks.keys()),
        "masks without an image": sorted(masks.keys() - images.keys()),
    }
    if any(problems.values()):
        found = (f"{len(ids)} {what} ({_shorten(ids)})" for what, ids in problems.items() if ids)
        raise SegmentError(
            f"Expected one mask for each image, by id, but {image_dir} and {mask_dir} hold "
            f"{' and '.join(found)}: rename or remove these files."
        )
    ids = sorted(images)
    return [images[id_] for id_ in ids], [masks[id_] for id_ in ids]


def find_images(image_dir: StrPath) -> list[str]:
    """Finds the images of a folder, to predict them without masks.

    Args:
        image_dir: Folder of the images. Superpixels, masks (names in `_segmentation`), other files
            and hidden ones are passed over.

    Returns:
        The paths, in the order of the names.

    Raises:
        SegmentError: If the folder is missing or holds no image, or if an id occurs twice.
    """
    paths = [path for path in _list_images(image_dir) if not _is_mask(path)]
    ids = _repeated(paths)
    _require(bool(paths), f"{image_dir} holds masks alone: give the folder of the images.")
    _require(not ids, f"{image_dir} holds several images of one id ({_shorten(ids)}): rename them.")
    return paths


def _list_images(folder: StrPath) -> list[str]:
    _require(Path(folder).is_dir(), f"{folder} is not a folder: give the one that holds the files.")
    paths = [
        str(path)
        for path in sorted(Path(folder).iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.stem.lower().endswith("_superpixels")
        and path.is_file()
    ]
    _require(bool(paths), f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    odd = [ascii(path) for path in paths if re.search("[\ud800-\udfff]", path)]
    _require(not odd, f"{len(odd)} file names are not UTF-8 ({_shorten(odd)}): rename the files.")
    return paths


def _is_mask(path: StrPath) -> bool:
    return Path(path).stem.lower().endswith("_segmentation")


def _repeated(paths: Sequence[str]) -> list[str]:
    return sorted(id_ for id_, count in Counter(map(image_id, paths)).items() if count > 1)


def _shorten(names: Sequence[str], most: int = 5) -> str:
    """`"a, b, c"`, or with many names `"a, b, c, d, e and 72 more"`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_lengths(image_paths: Sequence[StrPath], mask_paths: Sequence[StrPath]) -> None:
    images, masks = len(image_paths), len(mask_paths)
    _require(images == masks, f"{images} images came with {masks} masks: expected one for each.")


def _check_image_size(image_size: Size, divisor: int = 1) -> Size:
    sides = tuple(image_size) if isinstance(image_size, Iterable) else ()
    valid = len(sides) == 2 and all(side in range(divisor, 2**16, divisor) for side in sides)
    multiple = f" divisible by {divisor}" if divisor > 1 else ""
    _require(valid, f"image_size is {image_size}: expected (height, width) in pixels{multiple}.")
    return int(sides[0]), int(sides[1])


def letterbox(size: Size, image_size: Size) -> tuple[int, int, int, int]:
    """Fits a picture into a frame: aspect ratio kept, centred, as large as it can be.

    This is the whole geometry of the project. Loading resizes a picture onto the box and leaves
    the rest of the frame black; `restore_masks` crops the box and resizes it back onto the picture,
    so that edges and centres come to lie exactly where they were.

    Args:
        size: `(height, width)` of the picture.
        image_size: `(height, width)` of the frame.

    Returns:
        `(top, left, height, width)` of the picture inside the frame, in pixels.
    """
    scale = min(image_size[0] / size[0], image_size[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return (image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width


def load_input_image(path: StrPath, image_size: Size | None = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Loads a photograph into the network's frame.

    The EXIF orientation is applied; palette, greyscale, RGBA, CMYK and 16-bit pictures become RGB.

    Args:
        path: Image file.
        image_size: `(height, width)` of the frame, `None` for the picture's own size.

    Returns:
        `uint8 (height, width, 3)` in 0..255, black where the frame is wider or taller.

    Raises:
        SegmentError: If the file cannot be read as an image, or `image_size` is none.
    """
    with _open_image(path) as image:
        size = _upright_size(image)
        if image_size is not None:
            # A JPEG is decoded at the smallest scale that still has about twice the pixels needed.
            height, width = letterbox(size, _check_image_size(image_size))[2:]
            box = (width, height) if size == (image.height, image.width) else (height, width)
            image.draft("RGB", (int(1.9 * box[0]), int(1.9 * box[1])))
        return np.asarray(_fit(_to_rgb(_put_upright(image), path), size, image_size))


def load_segmented_image(path: StrPath, image_size: Size | None = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Loads a mask into the network's frame, by the same geometry as its photograph.

    A pixel of the frame is lesion where at least half of what it covers is, so that lesions
    neither grow nor shrink.

    Args:
        path: Mask file, of 0 and 255 or of 0 and 1.
        image_size: `(height, width)` of the frame, `None` for the mask's own size.

    Returns:
        `uint8 (height, width, 1)` in {0, 1}.

    Raises:
        SegmentError: If the file cannot be read, or holds other values. A JPEG whose values hug
            black and white is taken.
    """
    return _fit_mask(_open_mask(path), image_size)


def _open_mask(path: StrPath) -> Image.Image:
    """A mask at its own size, upright, of grey levels 0 and 255."""
    with _open_image(path) as image:
        lossy = image.format in ("JPEG", "MPO")
        return _to_black_and_white(_put_upright(image), lossy, path)


def _fit_mask(mask: Image.Image, image_size: Size | None) -> NDArray[np.uint8]:
    fitted = np.asarray(_fit(mask, (mask.height, mask.width), image_size))
    return (fitted >= 128).astype(np.uint8)[..., None]


@contextlib.contextmanager
def _open_image(path: StrPath) -> Iterator[Image.Image]:
    """An opened picture; what Pillow raises on a bad file becomes one sentence with its name."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            _require(
                pixels <= MAX_PIXELS,
                f"{path}: has {pixels} pixels, but no photograph of skin has more than "
                f"{MAX_PIXELS}: scale it down or leave it out.",
            )
            yield image
    except SegmentError:
        raise
    except FileNotFoundError:
        raise SegmentError(f"{path}: there is no such file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SegmentError(
            f"{path}: cannot be read as an image ({error}); replace the file or leave it out."
        ) from error


def _upright_size(image: Image.Image) -> Size:
    """`(height, width)` after the EXIF orientation, from the header alone."""
    quarter = _turn(image) in QUARTER_TURNS
    return (image.width, image.height) if quarter else (image.height, image.width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts a picture upright. Pillow's own `exif_transpose` decodes a PNG to find out."""
    if image.format == "TIFF":  # which Pillow turns itself
        return None
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return TURNS.get(orientation)


def _put_upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, path: StrPath) -> Image.Image:
    if image.mode[0] in "IF":  # grey levels of more than 8 bits, which Pillow would clip
        levels = np.asarray(image)
        lowest, highest = levels.min(), levels.max()
        if image.mode == "F" or lowest < 0 or highest > 65535:
            raise SegmentError(
                f"{path}: its grey levels are {levels.dtype} from {lowest:g} to {highest:g}: "
                "expected 8 or 16 bits without a sign; convert it."
            )
        image = Image.fromarray((levels >> 8 if highest > 255 else levels).astype(np.uint8))
    if image.mode == "P":  # may be translucent, which Pillow converts cleanly only by way of RGBA
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _to_black_and_white(image: Image.Image, lossy: bool, path: StrPath) -> Image.Image:
    """A mask as grey levels 0 and 255, or an error that names the values that it holds."""
    if image.mode == "L" and not lossy and (np.asarray(image) + np.uint8(1) <= 1).all():
        return image  # as nearly all are: 255 + 1 is 0
    grey, levels, counts = _count_levels(image)
    if image.mode == "P" and not np.isin(levels, (0, 255)).all():  # labels in colours
        grey, levels, counts = _count_levels(Image.fromarray(np.asarray(image)))
    white = int(levels[-1]) if levels[-1] in (1, 255, 65535) and not lossy else 255
    # A lossy mask blurs, but keeps its black, its white and next to nothing in between.
    hugging = lossy and levels[0] < 24 and levels[-1] >= 232
    hugging = hugging and counts[(levels >= 24) & (levels < 232)].sum() < 0.01 * counts.sum()
    if not (hugging or np.isin(levels, (0, white)).all()):
        raise SegmentError(
            f"{path}: expected a mask of 0 and 255 (or 0 and 1) alone, but it has {len(levels)} "
            f"values ({_shorten([f'{level:g}' for level in levels])}): threshold it, if it is one."
        )
    if grey.mode == "L":
        return grey.point([255 * (level >= white / 2) for level in range(256)])
    return Image.fromarray((np.asarray(grey) >= white / 2).astype(np.uint8) * 255)


def _count_levels(image: Image.Image) -> tuple[Image.Image, Array, Array]:
    """A picture in grey, the levels that occur in it, and how often each does."""
    if image.mode[0] in "IF":  # more than 8 bits
        return image, *np.unique(np.asarray(image), return_counts=True)
    grey = image.convert("L")
    counts = np.array(grey.histogram())  # which takes no sorting of the pixels
    return grey, np.flatnonzero(counts), counts[counts > 0]


def _fit(image: Image.Image, size: Size, image_size: Size | None) -> Image.Image:
    """Resizes a picture whose full size is `size` onto its box in a black frame."""
    if image_size is None:
        return image
    top, left, height, width = letterbox(size, _check_image_size(image_size))
    frame = Image.new(image.mode, (image_size[1], image_size[0]))
    # Pillow's bilinear filter averages over all that a smaller pixel covers: no aliasing. Whole
    # blocks of pixels are averaged first, down to twice the size, which is faster.
    filter_ = Image.Resampling.BILINEAR
    frame.paste(image.resize((width, height), filter_, reducing_gap=2), (left, top))
    return frame


class PairCache:
    """Decodes each pair once: kept in memory up to a budget, beyond it in files of a folder.

    An entry belongs to the paths, lengths and times of change of both files and to the frame, so
    that a file that changed is decoded again. A file of an entry is written beside and renamed:
    several processes may share the folder, and one that is killed leaves none that is half
    there. Files are read, not mapped, so that a training's memory stays flat. To empty the cache,
    remove the folder.

    Args:
        max_bytes: How much to keep in memory; a pair takes 4 bytes a pixel of the frame.
        folder: Where to keep the rest; `None` decodes it each time, and so does a disk that is
            full, after a warning.

    Raises:
        SegmentError: If the folder cannot be written to.
    """

    def __init__(self, max_bytes: int = 2**31, folder: StrPath | None = None) -> None:
        self.bytes_left = max_bytes
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, Decoded] = {}
        self._lock = threading.Lock()  # of the two above, which several threads change
        if self.folder is not None:
            _check_file_to_write(self.folder / "entry.npy")
            _remove_leftovers(self.folder)

    def load(self, image_path: str, mask_path: str | None, image_size: Size) -> Decoded:
        """A decoded pair; without a mask, an empty one.

        Raises:
            SegmentError: If a file cannot be used, or image and mask differ in size.
        """
        key = _entry_name(image_path, mask_path, image_size)
        if key in self._kept:
            return self._kept[key]
        file = self.folder and self.folder / f"{key}.npy"
        decoded = _read_entry(file) if file else None
        if decoded is None:
            decoded = _decode(image_path, mask_path, image_size)
            if file:
                self._write(decoded, file)
        with self._lock:
            if key not in self._kept and decoded.nbytes <= self.bytes_left:
                self.bytes_left -= decoded.nbytes
                self._kept[key] = decoded
        return decoded

    def _write(self, decoded: Decoded, file: Path) -> None:
        try:
            _write_entry(decoded, file)
        except SegmentError as error:
            self.folder = None  # and no more warnings
            warnings.warn(f"Pairs are decoded each time from now on: {error}", stacklevel=2)


class Decoded(NamedTuple):
    """`uint8 (H, W, 3)`, `uint8 (H, W, 1)` in {0, 1}, and what is odd about the two files."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    oddities: list[str]

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return self.image.nbytes + self.mask.nbytes


def _decode(image_path: str, mask_path: str | None, image_size: Size) -> Decoded:
    image = load_input_image(image_path, image_size)
    oddities = _file_oddities(image_path, ("RGB",))
    if mask_path is None:
        return Decoded(image, np.zeros((*image_size, 1), np.uint8), oddities)
    _check_same_size(image_path, mask_path)
    mask = _open_mask(mask_path)
    return Decoded(image, _fit_mask(mask, image_size), oddities + _mask_oddities(mask, mask_path))


def _check_same_size(image_path: str, mask_path: str) -> None:
    size, mask_size = _size_of(image_path), _size_of(mask_path)
    _require(
        size == mask_size,
        f"{image_path} is {size[0]} × {size[1]} (height × width), but its mask {mask_path} is "
        f"{mask_size[0]} × {mask_size[1]}: expected a mask of the size of its image.",
    )


def _entry_name(image_path: str, mask_path: str | None, image_size: Size) -> str:
    identity: list[Any] = [image_size]
    for path in filter(None, (image_path, mask_path)):
        identity.append(os.path.abspath(path))
        with contextlib.suppress(OSError):  # which decoding tells in a sentence
            status = os.stat(path)
            identity += [status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _read_entry(file: Path) -> Decoded | None:
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() != digest:
        return None  # damaged: decoded again
    stream = io.BytesIO(content)
    image, mask = (np.load(stream, allow_pickle=False) for _ in range(2))
    return Decoded(image, mask, json.load(stream))


def _write_entry(decoded: Decoded, file: Path) -> None:
    # Two arrays and a list behind their checksum: read faster than from an .npz archive.
    stream = io.BytesIO()
    np.save(stream, decoded.image)
    np.save(stream, decoded.mask)
    stream.write(json.dumps(decoded.oddities).encode())
    content = stream.getvalue()
    with _written_whole(file) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


# ----------------------------------------------------------------------------------------------
# 2. Inspection: sizes, and what is wrong with the files
# ----------------------------------------------------------------------------------------------


def inspect(image_paths: Iterable[StrPath]) -> dict[Size, int]:
    """Counts the sizes that occur, from the files' headers alone.

    Args:
        image_paths: Image files.

    Returns:
        `{(height, width): count}` in pixels, the most frequent first.

    Raises:
        SegmentError: If a file cannot be read as an image.
    """
    counts = Counter(map(_size_of, image_paths))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _size_of(path: StrPath) -> Size:
    with _open_image(path) as image:
        return _upright_size(image)


def plot_image_sizes(sizes: Mapping[Size, int], *, most: int = 20) -> Figure:
    """Draws the occurrence of each image size as bars.

    Args:
        sizes: What `inspect` returned.
        most: How many sizes get a bar of their own; the others share the last one.

    Returns:
        The figure.
    """
    shown = list(sizes.items())[:most]
    names = [f"{height} × {width}" for (height, width), _ in shown]
    counts = [count for _, count in shown]
    if len(sizes) > most:
        names.append(f"{len(sizes) - most} other sizes")
        counts.append(sum(sizes.values()) - sum(counts))
    figure, (axes,) = _subplots(1, 1, width=7, height=1.5 + 0.26 * len(names))
    axes.bar_label(axes.barh(names, counts, color="tab:blue"), padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    total = f"{sum(sizes.values())} images, {len(sizes)} different sizes"
    axes.set(title=f"{total} (height × width in pixels)", xlabel="Images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


class Finding(NamedTuple):
    """What `check_pairs` found; an error spoils the pair, a warning is worth a look."""

    severity: str
    path: str
    what: str


def check_pairs(
    image_paths: Sequence[StrPath],
    mask_paths: Sequence[StrPath] | None = None,
    *,
    image_size: Size = (64, 64),
    cache: PairCache | None = None,
    verbose: int = 0,
) -> list[Finding]:
    """Looks at every file before a training that would stumble over it an hour later.

    Errors are files that cannot be read (cut short, empty, too large to be a photograph), masks
    with other values than two, and masks of another size than their image. Warnings are files of
    another type than their name says or of an odd mode (CMYK, 16 bits), files that occur twice,
    and masks that are empty, full, seemingly inverted, of several regions or with holes.

    Args:
        image_paths: Image files.
        mask_paths: Their masks, in the same order; `None` to check images alone.
        image_size: Frame in which good pairs are decoded.
        cache: Receives them. At the `decoded_size` of the generator that will ask for them, the
            first epoch has nothing left to decode; with a folder, nor has the next check.
        verbose: 1 for a progress bar.

    Returns:
        The findings, errors first: `severity` (`"error"` or `"warning"`), `path` of the image and
        `what`, a sentence that names the file at fault.

    Raises:
        SegmentError: If the lists differ in length, or `image_size` is none.
    """
    _check_lengths(image_paths, image_paths if mask_paths is None else mask_paths)
    images = [str(path) for path in image_paths]
    masks = [None] * len(images) if mask_paths is None else [str(path) for path in mask_paths]
    size, cache = _check_image_size(image_size), cache or PairCache(0)
    progress = keras.utils.Progbar(len(images), verbose=verbose, unit_name="pair checked")
    findings = []
    with ThreadPoolExecutor() as pool:
        for found in pool.map(functools.partial(_check_pair, size, cache), images, masks):
            findings += found
            progress.add(1)
    findings += _find_duplicates([(image, image) for image in images], "image")
    pairs = zip(masks, images, strict=True)
    findings += _find_duplicates([(mask, image) for mask, image in pairs if mask], "mask")
    return sorted(findings, key=lambda finding: finding.severity)


def _check_pair(
    image_size: Size, cache: PairCache, image_path: str, mask_path: str | None
) -> list[Finding]:
    try:
        oddities = cache.load(image_path, mask_path, image_size).oddities
        return [Finding("warning", image_path, what) for what in oddities]
    except SegmentError:  # the first of several faults, perhaps
        pass
    looks = [functools.partial(_look_at_image, image_path)]
    if mask_path is not None:
        looks.append(functools.partial(_look_at_mask, mask_path))
        looks.append(functools.partial(_look_at_sizes, image_path, mask_path))
    findings = []
    for look in looks:
        try:
            findings += [Finding("warning", image_path, what) for what in look()]
        except SegmentError as error:
            findings.append(Finding("error", image_path, str(error)))
    return list(dict.fromkeys(findings))  # of a file without a header two looks say the same


def _look_at_image(path: str) -> list[str]:
    load_input_image(path)
    return _file_oddities(path, ("RGB",))


def _look_at_mask(path: str) -> list[str]:
    return _mask_oddities(_open_mask(path), path)


def _look_at_sizes(image_path: str, mask_path: str) -> list[str]:
    _check_same_size(image_path, mask_path)
    return []


def _file_oddities(path: str, modes: Sequence[str]) -> list[str]:
    """Another type than the name says, another mode than the usual ones."""
    expected = Image.registered_extensions().get(Path(path).suffix.lower())
    with _open_image(path) as image:
        known = expected is None or image.format in (expected, "MPO")  # a JPEG with a preview
        found = {
            f"the file is a {image.format}, whatever its name says": not known,
            f"the mode is {image.mode}, where {modes[0]} is usual": image.mode not in modes,
        }
    return [f"{path}: {what}." for what, odd in found.items() if odd]


def _mask_oddities(mask: Image.Image, path: str) -> list[str]:
    """What an expert's outline would not look like, in a quarter of a million blocks or fewer."""
    levels = mask.getextrema()
    # A block is 255 where all of its pixels are lesion, and more than 0 where any is.
    blocks = np.asarray(mask.reduce(1 + max(mask.size) // 512))
    rim = np.concatenate([blocks[0], blocks[-1], blocks[:, 0], blocks[:, -1]])
    regions = ndimage.label(blocks, np.ones((3, 3)))[1]
    whole = blocks == 255
    holes = ndimage.label(ndimage.binary_fill_holes(whole) & ~whole)[1]
    inverted = levels == (0, 255) and (rim >= 128).mean() > 0.9
    found = {
        "is empty": levels == (0, 0),
        "is full": levels == (255, 255),
        "seems to be inverted, since its rim is lesion": inverted,
        f"has {regions} regions": regions > 1,
        f"has holes ({holes})": holes > 0,
    }
    oddities = [f"{path}: the mask {what}." for what, odd in found.items() if odd]
    return _file_oddities(path, ("L", "1", "P")) + oddities


def checksum(paths: Sequence[StrPath]) -> str:
    """SHA-256 of the names and contents of files, in their order."""
    with ThreadPoolExecutor() as pool:
        contents = pool.map(_digest, paths)
        parts = (
            Path(path).name.encode() + content
            for path, content in zip(paths, contents, strict=True)
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest(path: StrPath) -> bytes:
    """SHA-256 of a file's content, nothing of one that cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return b""


def _find_duplicates(files: Sequence[tuple[str, str]], kind: str) -> list[Finding]:
    """Of `(path, image)` the paths with the same bytes; only those of one length are read."""
    lengths = [os.path.getsize(path) if os.path.isfile(path) else 0 for path, _ in files]
    common = Counter(lengths)
    first: dict[bytes, str] = {}
    findings = []
    for (path, image), length in zip(files, lengths, strict=True):
        digest = _digest(path) if length and common[length] > 1 else b""
        if digest and first.setdefault(digest, path) != path:
            what = f"{path}: the same {kind} as {first[digest]}."
            findings.append(Finding("warning", image, what))
    return findings


# ----------------------------------------------------------------------------------------------
# 3. Split: at random, the images of one lesion on one side
# ----------------------------------------------------------------------------------------------


def find_same_lesions(
    image_paths: Sequence[StrPath], mask_paths: Sequence[StrPath]
) -> list[list[str]]:
    """Finds the images that show one lesion, which a split must not tear apart.

    They may differ in light, colour, zoom and crop, be turned or mirrored. Each lesion is sampled
    on circles around its centre, as wide as it is itself. A turn shifts the samples along the
    circles and mirroring reverses them, and neither changes the magnitudes of their Fourier
    coefficients: nearest neighbours by those are then correlated in every turn, mirrored or not.

    Args:
        image_paths: Image files.
        mask_paths: Their masks, in the same order.

    Returns:
        The images of each lesion that occurs more than once. Images that are like more than four
        others show a plain shape rather than one lesion, and one that cannot be read is like none.

    Raises:
        SegmentError: If the lists differ in length.
    """
    _check_lengths(image_paths, mask_paths)
    pairs = [(str(image), str(mask)) for image, mask in zip(image_paths, mask_paths, strict=True)]
    groups = _group([image for image, _ in pairs], _number_lesions(pairs))
    return [images for images in groups if len(images) > 1]


def _number_lesions(pairs: Sequence[Pair]) -> Sequence[int]:
    """A number for each pair, the same for all that show one lesion."""
    if len(pairs) < 2:
        return range(len(pairs))
    with ThreadPoolExecutor() as pool:
        prints = np.stack(list(pool.map(_lesion_print, pairs)))
    magnitudes = np.abs(prints).reshape(len(pairs), -1)
    search = NearestNeighbors(n_neighbors=min(8, len(pairs) - 1), algorithm="brute")
    neighbors = search.fit(magnitudes).kneighbors(return_distance=False)  # (pairs, 8)
    alike = np.stack([_likeness(prints, prints[column]) for column in neighbors.T], 1)
    alike = alike >= SAME_LESION
    crowded = alike.sum(1) > 4
    pair, column = np.nonzero(alike & ~crowded[:, None] & ~crowded[neighbors])
    links = sparse.coo_array(
        (np.ones(len(pair)), (pair, neighbors[pair, column])), (len(pairs), len(pairs))
    )
    numbers: list[int] = sparse.csgraph.connected_components(links, directed=False)[1].tolist()
    return numbers


def _lesion_print(pair: Pair) -> NDArray[np.complex64]:
    """Fourier coefficients of a lesion on circles around its centre, `(RINGS, ANGLES / 2 + 1)`.

    A band-pass takes light and colour away, the weights the plain ellipse that most lesions are.
    """
    try:
        image, mask = load_input_image(pair[0]), load_segmented_image(pair[1])[..., 0]
    except SegmentError:
        return np.zeros((RINGS, ANGLES // 2 + 1), np.complex64)
    rows, columns = np.nonzero(mask if mask.any() else np.ones_like(mask))
    y, x, reach = rows.mean(), columns.mean(), 1.4 * math.sqrt(len(rows) / math.pi)
    box = tuple(round(side) for side in (x - reach, y - reach, x + reach, y + reach))
    patch = Image.fromarray(image).convert("L").crop(box)
    grey = np.asarray(patch.resize((64, 64), Image.Resampling.BILINEAR), np.float32)
    inside = ndimage.binary_erosion(grey > 20).astype(np.float32)  # neither padding nor vignette
    fine, coarse = (
        ndimage.gaussian_filter(grey * inside, sigma)
        / (ndimage.gaussian_filter(inside, sigma) + 1e-3)
        for sigma in (1, 4)
    )
    radius = np.linspace(2, 31, RINGS)[:, None]
    angle = np.linspace(0, 2 * math.pi, ANGLES, endpoint=False)
    points = 31.5 + radius * np.sin(angle), 31.5 + radius * np.cos(angle)
    rings = ndimage.map_coordinates((fine - coarse) * inside, points, order=1)
    rings = np.clip(rings / (rings.std() + 1e-3), -2.5, 2.5) * np.sqrt(radius)
    spectrum = np.fft.rfft(rings) * np.minimum(1, np.arange(ANGLES // 2 + 1) / 8)
    return (spectrum / (np.linalg.norm(spectrum) + 1e-6)).astype(np.complex64)


def _likeness(prints: Array, others: Array) -> Array:
    """The highest correlation over all turns, mirrored or not: 1 for the same picture."""
    turns = (np.fft.irfft((a * others.conj()).sum(1), ANGLES) for a in (prints, prints.conj()))
    best: Array = ANGLES / 2 * np.maximum(*(turn.max(1) for turn in turns))
    return best


def _group(items: Sequence[Any], numbers: Sequence[int]) -> list[list[Any]]:
    """The items of each number, in the order of their first ones."""
    groups: dict[int, list[Any]] = {}
    for item, number in zip(items, numbers, strict=True):
        groups.setdefault(number, []).append(item)
    return list(groups.values())


def train_val_test_split(
    image_paths: Sequence[StrPath],
    mask_paths: Sequence[StrPath],
    *,
    val_split: float = 0.2,
    test_split: float = 0.03,
    seed: int = 0,
    group: bool = True,
) -> tuple[Pairs, Pairs, Pairs]:
    """Splits pairs at random into a training, a validation and a test set.

    Args:
        image_paths: Image files.
        mask_paths: Their masks, in the same order.
        val_split: Share of what is left after the test set that validates, in [0, 1).
        test_split: Share of all that tests, in [0, 1). Counts are rounded down, but a share
            above 0 gets at least one lesion.
        seed: The same seed gives the same split.
        group: Whether images that `find_same_lesions` takes for one lesion stay together.

    Returns:
        `(train, val, test)`, each `(image_paths, mask_paths)`: 2014, 503 and 77 of 2594 pairs, or
        the nearest below that the lesions allow (above, where the smallest one has more pairs),
        which it warns of. Every pair is in exactly one of them.

    Raises:
        SegmentError: If the lists differ in length, a share is out of range, or nothing is left
            to train on.
    """
    _check_lengths(image_paths, mask_paths)
    _check_seed(seed)
    for name, share in {"val_split": val_split, "test_split": test_split}.items():
        _require(0 <= share < 1, f"{name} is {share}: expected a share from 0 to below 1.")
    pairs = [(str(image), str(mask)) for image, mask in zip(image_paths, mask_paths, strict=True)]
    lesions = _group(pairs, _number_lesions(pairs) if group else range(len(pairs)))
    rest, test = _draw(lesions, _count(test_split, len(pairs)), seed)
    train, val = _draw(rest, _count(val_split, sum(map(len, rest))), seed)
    _require(bool(train), f"{len(pairs)} pairs are too few to train, validate and test on.")
    return _unzip(train), _unzip(val), _unzip(test)


def _count(share: float, pairs: int) -> int:
    return max(1, math.floor(share * pairs + 1e-9)) if share else 0  # 0.29 * 100 is 28.99...


def _draw(
    lesions: list[list[Pair]], count: int, seed: int
) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """Draws lesions at random until they hold `count` pairs: `(rest, drawn)`."""
    wanted = max(count, min(map(len, lesions), default=0)) if count else 0
    rest: list[list[Pair]] = []
    drawn: list[list[Pair]] = []
    for lesion in shuffle(lesions, random_state=seed):
        fits = len(lesion) <= wanted
        wanted -= fits * len(lesion)
        (drawn if fits else rest).append(lesion)
    if sum(map(len, drawn)) != count:
        warnings.warn(
            f"{sum(map(len, drawn))} pairs are put aside rather than {count}, since the images of "
            "one lesion stay together.",
            stacklevel=3,
        )
    return rest, drawn


def _check_seed(seed: int) -> None:
    _require(seed in range(2**32), f"seed is {seed}: expected a whole number from 0 to 2^32 - 1.")


def _unzip(lesions: Sequence[Sequence[Pair]]) -> Pairs:
    pairs = [pair for lesion in lesions for pair in lesion]
    return [image for image, _ in pairs], [mask for _, mask in pairs]


# ----------------------------------------------------------------------------------------------
# 4. Generators: batches of images and masks, augmented on demand
# ----------------------------------------------------------------------------------------------


def create_generator(
    image_paths: Sequence[StrPath],
    mask_paths: Sequence[StrPath] | None = None,
    *,
    image_size: Size = IMAGE_SIZE,
    batch_size: int = 8,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    workers: int = 1,
    cache: PairCache | None = None,
    whole_batches: bool = False,
) -> ImageGenerator:
    """Creates a data set of batches for `fit`, `evaluate` and `predict`.

    Args:
        image_paths: Image files.
        mask_paths: Their masks in the same order; `None` to predict without ground truth.
        image_size: `(height, width)` of the network's frame.
        batch_size: Images a batch; the last batch may be shorter.
        shuffle: Whether each epoch draws a new order of the images.
        augment: Whether images and masks are mirrored, turned, zoomed, stretched and shifted
            together, and the images alone changed in colour, gamma, contrast and sharpness.
        seed: With the epoch it determines order and augmentation, whatever else draws numbers.
        workers: Threads that load batches.
        cache: Where decoded pairs are kept, by default 2 GiB of memory: 2,048 pairs of 512 x 512,
            as which a frame of 256 x 256 has them to be augmented. The rest is decoded each time.
        whole_batches: Whether to leave a shorter last batch out, as several devices need it.

    Returns:
        An `ImageGenerator`, whose batches are `uint8 (N, height, width, 3)` in 0..255, followed by
        `uint8 (N, height, width, 1)` in {0, 1} where there are masks.

    Raises:
        SegmentError: If there are no images, the lists differ in length, or a number is out of
            range.
    """
    _require(len(image_paths) > 0, "A generator needs at least one image, but the list is empty.")
    _check_lengths(image_paths, image_paths if mask_paths is None else mask_paths)
    _require(batch_size >= 1, f"batch_size is {batch_size}: expected 1 or more images a batch.")
    _check_seed(seed)
    _require(
        not whole_batches or batch_size <= len(image_paths),
        f"{len(image_paths)} images do not make one whole batch of {batch_size}: lower batch_size.",
    )
    return ImageGenerator(
        [str(path) for path in image_paths],
        None if mask_paths is None else [str(path) for path in mask_paths],
        _check_image_size(image_size), batch_size, shuffle, augment, seed,
        PairCache() if cache is None else cache, whole_batches, workers,
    )  # fmt: skip


@dataclasses.dataclass(eq=False)
class ImageGenerator(keras.utils.PyDataset):  # type: ignore[misc]
    """Loads a batch when it is asked for; made by `create_generator`, whose arguments it keeps.

    All randomness derives from `(seed, epoch, image)`, never from the order of calls, since Keras
    asks for batches ahead of time, for more than it uses, and from several threads.

    Attributes:
        epoch: Selects order and augmentation; counted up after every epoch.
        failure: What a file that could not be loaded raised, since a backend may wrap it.
    """

    image_paths: list[str]
    mask_paths: list[str] | None
    image_size: Size
    batch_size: int
    shuffle: bool
    augment: bool
    seed: int
    cache: PairCache
    whole_batches: bool
    workers: dataclasses.InitVar[int]
    epoch: int = 0
    failure: SegmentError | None = None

    def __post_init__(self, workers: int) -> None:
        super().__init__(workers=workers)

    def __len__(self) -> int:
        batches = len(self.image_paths) / self.batch_size
        return math.floor(batches) if self.whole_batches else math.ceil(batches)

    def __getitem__(self, index: int) -> Array | tuple[Array, Array]:
        return self.share(index, *_this_host())

    def share(self, index: int, host: int, hosts: int) -> Array | tuple[Array, Array]:
        """Of a batch what one of several hosts computes: the rows in as many equal parts."""
        epoch = self.epoch
        chosen = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        try:
            samples = [self._load(int(i), epoch) for i in np.array_split(chosen, hosts)[host]]
        except SegmentError as error:
            self.failure = error
            raise
        images = np.stack([image for image, _ in samples])
        if self.mask_paths is None:
            return images
        return images, np.stack([mask for _, mask in samples])

    def on_epoch_end(self) -> None:
        """Goes on to the next order and augmentation; Keras calls it."""
        self.epoch += 1

    def _order(self, epoch: int) -> Array:
        count = len(self.image_paths)
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(count) if self.shuffle else np.arange(count)

    @property
    def decoded_size(self) -> Size:
        """`(height, width)` as which pairs are decoded: zooming in needs more than the frame."""
        height, width = self.image_size
        return (2 * height, 2 * width) if self.augment else (height, width)

    def _load(self, i: int, epoch: int) -> tuple[Array, Array]:
        mask_path = None if self.mask_paths is None else self.mask_paths[i]
        image, mask, _ = self.cache.load(self.image_paths[i], mask_path, self.decoded_size)
        if self.augment:
            rng = np.random.default_rng((self.seed, epoch, i))
            return _augment(image, mask, self.image_size, rng)
        return image, mask


def _augment(
    image: Array, mask: Array, image_size: Size, rng: np.random.Generator
) -> tuple[Array, Array]:
    """One random change of geometry for both, one of colour for the image alone.

    Pillow does both a whole picture at a time, without the interpreter's lock. The nearest pixel at
    twice the size, then the mean of four, takes half the time of interpolation.
    """
    twice = (2 * image_size[1], 2 * image_size[0])
    affine = _random_affine((image.shape[1], image.shape[0]), twice, rng)
    picture, target = (
        Image.fromarray(array)
        .transform(twice, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST)
        .reduce(2)
        for array in (image, mask[..., 0] * 255)
    )
    picture = picture.point(_random_colors(rng))
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.25, 1.5)))
    return np.asarray(picture), (np.asarray(target) >= 128).astype(np.uint8)[..., None]


def _random_affine(
    source: tuple[int, int], size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, ...]:
    """Upright or at any angle, mirrored or not, stretched by up to 12 %, zoomed by 0.75 to 2.2.

    The more it zooms in, the further from the centre it may look. From a picture of `(width,
    height)` `source` to one of `size`; `(a, b, c, d, e, f)` as Pillow has it: `(x, y)` shows what
    was at `(ax + by + c, dx + ey + f)`.
    """
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else 0.0
    zoom = math.exp(rng.uniform(math.log(0.75), math.log(2.2))) if rng.random() < 0.75 else 1.0
    stretch = math.exp(rng.uniform(-0.12, 0.12))
    mirror = rng.choice((-1, 1))
    step = source[0] / size[0] / zoom
    a, b = (mirror * step * stretch * part for part in (math.cos(angle), math.sin(angle)))
    d, e = (step / stretch * part for part in (-math.sin(angle), math.cos(angle)))
    reach = 0.06 + 0.2 * max(0.0, zoom - 1)
    x, y = (0.5 + rng.uniform(-reach, reach, 2)) * size  # where the old centre comes to lie
    return a, b, source[0] / 2 - a * x - b * y, d, e, source[1] / 2 - d * x - e * y


def _random_colors(rng: np.random.Generator) -> list[int]:
    """A table of 3 x 256 new levels: other light, other tint, gamma of 0.7 to 1.4, contrast.

    Black stays black, and with it the padding.
    """
    gains = rng.uniform(0.85, 1.15) * rng.uniform(0.85, 1.15, (3, 1))
    gamma = math.exp(rng.uniform(math.log(0.7), math.log(1.4)))
    table = gains * np.linspace(0, 1, 256) ** gamma
    table[:, 1:] += rng.uniform(-0.2, 0.2) * (table[:, 1:] - table.mean())
    return [int(level) for level in (255 * table).clip(0, 255).round().ravel()]


# ----------------------------------------------------------------------------------------------
# 5. Model: the improved UNet of Isensee et al. 2017, in two dimensions
# ----------------------------------------------------------------------------------------------


def create_model(
    image_size: Size = IMAGE_SIZE,
    *,
    num_filters: int = 16,
    dropout: float = 0.3,
    bfloat16: bool = False,
) -> keras.Model:
    """Creates the improved UNet, uncompiled.

    Five levels of pre-activation residual context modules on the way down; localization modules on
    the way up; the lesion maps of the three finest levels are summed (arXiv:1802.10508).

    Args:
        image_size: `(height, width)` of the frame, both divisible by 16.
        num_filters: Filters of the finest level; each coarser level has twice as many.
        dropout: Share of the feature maps dropped between the convolutions of a context module:
            whole ones (Tompson et al. 2015, arXiv:1411.4280), since pixels beside each other say
            much the same.
        bfloat16: Whether to compute in bfloat16, which recent processors and GPUs do faster;
            weights and output stay float32. Without it Keras' dtype policy decides.

    Returns:
        A functional model from `(N, height, width, 3)`, `uint8` or float in 0..255, to lesion
        probabilities `float32 (N, height, width, 1)`. With the defaults it has 3,188,435
        parameters.

    Raises:
        SegmentError: If `image_size` is not divisible by 16, or another number is out of range.
    """
    _require(num_filters >= 1, f"num_filters is {num_filters}: expected 1 or more.")
    _require(0 <= dropout < 1, f"dropout is {dropout}: expected a share from 0 to below 1.")
    inputs = keras.Input((*_check_image_size(image_size, 16), 3), name="image")
    scaled = layers.Rescaling(1 / 255, dtype="float32", name="rescaling")(inputs)
    with _dtype_policy("mixed_bfloat16") if bfloat16 else contextlib.nullcontext():
        lesion = _localization_path(_context_path(scaled, num_filters, dropout), num_filters)
    outputs = layers.Activation("sigmoid", dtype="float32", name="lesion_probability")(lesion)
    return _fuse_norms(keras.Model(inputs, outputs, name="improved_unet"))


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """The policy of the layers that are made meanwhile; Keras' own setting is as before after."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _context_path(x: Tensor, num_filters: int, dropout: float) -> list[Tensor]:
    """The features of levels 1 to 5, each at half the resolution of the one before."""
    features = []
    for level in range(1, 6):
        filters = num_filters * 2 ** (level - 1)
        x = _convolution(x, filters, 3, f"level{level}_conv", strides=1 if level == 1 else 2)
        x = _context_module(x, filters, dropout, f"level{level}_context")
        features.append(x)  # (N, H / 2^(level - 1), W / 2^(level - 1), filters)
    return features


def _localization_path(features: list[Tensor], num_filters: int) -> Tensor:
    """The summed lesion map (logits, full resolution) of levels 3, 2 and 1."""
    *skips, x = features
    x = _norm_relu(x, "level5_out")
    lesion = None
    for level in (4, 3, 2, 1):
        filters = num_filters * 2 ** (level - 1)
        x = _upsampling_module(x, filters, f"level{level}_up")
        x = layers.Concatenate(name=f"level{level}_concat")([x, skips[level - 1]])  # 2 x filters
        if level > 1:
            x = _localization_module(x, filters, f"level{level}_local")
        else:
            x = _norm_relu(_convolution(x, 2 * filters, 3, "level1_final_conv"), "level1_final")
        if level < 4:
            lesion = _add_lesion_map(lesion, x, f"level{level}_lesion")
    return lesion


def _context_module(x: Tensor, filters: int, dropout: float, name: str) -> Tensor:
    """Pre-activation residual block: norm and activation come before each convolution."""
    y = _convolution(_norm_relu(x, f"{name}1"), filters, 3, f"{name}1_conv")
    y = layers.SpatialDropout2D(dropout, name=f"{name}_dropout")(y)
    y = _convolution(_norm_relu(y, f"{name}2"), filters, 3, f"{name}2_conv")
    return layers.Add(name=f"{name}_add")([x, y])


def _upsampling_module(x: Tensor, filters: int, name: str) -> Tensor:
    x = layers.UpSampling2D(2, name=f"{name}_repeat")(x)
    return _norm_relu(_convolution(x, filters, 3, f"{name}_conv"), name)


def _localization_module(x: Tensor, filters: int, name: str) -> Tensor:
    """Recombines the features after a skip connection, then halves their number."""
    x = _norm_relu(_convolution(x, 2 * filters, 3, f"{name}1_conv"), f"{name}1")
    return _norm_relu(_convolution(x, filters, 1, f"{name}2_conv"), f"{name}2")


def _add_lesion_map(coarser: Tensor, x: Tensor, name: str) -> Tensor:
    """This level's own lesion map, plus that of the coarser levels at twice their size."""
    lesion = _convolution(x, 1, 1, f"{name}_conv")
    if coarser is None:
        return lesion
    repeated = layers.UpSampling2D(2, name=f"{name}_repeat")(coarser)
    return layers.Add(name=f"{name}_add")([lesion, repeated])


def _convolution(x: Tensor, filters: int, kernel: int, name: str, strides: int = 1) -> Tensor:
    return layers.Conv2D(
        filters, kernel, strides, "same", kernel_initializer="he_normal", name=name
    )(x)


def _norm_relu(x: Tensor, name: str) -> Tensor:
    """Instance normalization and leaky ReLU."""
    x = layers.GroupNormalization(groups=-1, epsilon=1e-5, name=f"{name}_norm")(x)
    return layers.LeakyReLU(0.01, name=f"{name}_relu")(x)


def _fuse_norms(model: keras.Model) -> keras.Model:
    """Has TensorFlow compute each instance normalization in one operation, if on a processor.

    The same function: a training step in bfloat16 takes 60 to 80 % of the time. Layers and files
    stay those of Keras.
    """
    tensorflow = keras.backend.backend() == "tensorflow" and sys.modules["tensorflow"]
    if tensorflow and not tensorflow.config.list_physical_devices("GPU"):  # where XLA fuses it
        for layer in model.layers:
            if _is_instance_norm(layer):
                layer.call = functools.partial(_normalize, layer)
    return model


def _is_instance_norm(layer: keras.Layer) -> bool:
    if not isinstance(layer, layers.GroupNormalization) or len(layer.output.shape) != 4:
        return False
    usual = layer.axis == -1 and layer.scale and layer.center
    return bool(usual and layer.groups == layer.output.shape[3])


def _normalize(norm: keras.Layer, x: Tensor) -> Tensor:
    """Instance normalization by the fused batch normalization of one image at a time.

    While Keras traces the network it does not know how many images a batch will have: eight are
    taken one by one, of which some may be missing; what is left becomes further maps of one image.
    """
    tensorflow = sys.modules["tensorflow"]
    if tensorflow.executing_eagerly():  # so many small operations gain nothing outside of a graph
        return layers.GroupNormalization.call(norm, x)
    fused = functools.partial(
        tensorflow.raw_ops.FusedBatchNormV3,
        mean=[], variance=[], epsilon=norm.epsilon, is_training=True,
    )  # fmt: skip
    scale, offset = ops.cast(norm.gamma, "float32"), ops.cast(norm.beta, "float32")
    count, height, width, maps = ops.shape(x)
    there, more = ops.clip(count - np.arange(8), 0, 1), ops.maximum(count - 8, 0)
    *images, rest = tensorflow.split(x, ops.append(there, more), num=9)
    # No gradient from an image that is missing, where XLA would divide by no pixels.
    scales = ops.unstack(ops.where(there[:, None] > 0, scale, 1.0), 8)
    parts = [fused(x=i, scale=s, offset=offset).y for i, s in zip(images, scales, strict=True)]
    rest = ops.reshape(ops.transpose(rest, (1, 2, 0, 3)), (1, height, width, more * maps))
    rest = fused(x=rest, scale=ops.tile(scale, [more]), offset=ops.tile(offset, [more])).y
    rest = ops.transpose(ops.reshape(rest, (height, width, more, maps)), (2, 0, 1, 3))
    return tensorflow.concat([*parts, rest], 0)


# ----------------------------------------------------------------------------------------------
# 6. Dice: per image, never pooled over a batch
# ----------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_coefficient(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Dice coefficient of each image, the prediction cut at 0.5.

    Args:
        y_true: Masks in {0, 1}, `(N, height, width, 1)`.
        y_pred: Probabilities in 0..1, of the same shape.

    Returns:
        `float32 (N,)` in 0..1; 1 where mask and prediction are both empty.
    """
    intersection, total = _overlap(ops.cast(y_true, "float32") > 0.5, y_pred > 0.5)
    return ops.where(total > 0, 2 * intersection / ops.maximum(total, 1), 1.0)


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_loss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Soft Dice loss of each image (Milletari et al. 2016, arXiv:1606.04797).

    One pixel is added to numerator and denominator: an empty mask then divides nothing by zero,
    and its loss falls to 0 as the prediction empties.

    Args:
        y_true: Masks in {0, 1}, `(N, height, width, 1)`.
        y_pred: Probabilities in 0..1, of the same shape.

    Returns:
        `float32 (N,)` in 0..1.
    """
    intersection, total = _overlap(y_true, y_pred)
    return 1 - (2 * intersection + 1) / (total + 1)


@keras.saving.register_keras_serializable("segment")  # type: ignore[untyped-decorator]
def dice_cross_entropy_loss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Soft Dice loss plus the mean binary cross-entropy of each image.

    Dice alone drives probabilities to 0 and 1; cross-entropy keeps them honest.

    Args:
        y_true: Masks in {0, 1}, `(N, height, width, 1)`.
        y_pred: Probabilities in 0..1, of the same shape.

    Returns:
        `float32 (N,)`, 0 or more.
    """
    target, lesion = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    entropy = ops.mean(ops.binary_crossentropy(target, lesion), axis=(1, 2, 3))
    return dice_loss(y_true, y_pred) + entropy


def _overlap(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and sum of the two areas, `float32 (N,)` in pixels."""
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    pixels = tuple(range(1, len(y_pred.shape)))
    return ops.sum(y_true * y_pred, pixels), ops.sum(y_true, pixels) + ops.sum(y_pred, pixels)


def score_masks(truth: Array, prediction: Array) -> dict[str, float]:
    """Scores one binary mask against another, as the ISIC challenges do.

    With TP, FP, FN and TN pixels: Dice = 2 TP / (2 TP + FP + FN), Jaccard = TP / (TP + FP + FN),
    thresholded Jaccard = Jaccard, or 0 if it is below 0.65, sensitivity = TP / (TP + FN),
    specificity = TN / (TN + FP), accuracy = (TP + TN) / all. 0 / 0 counts as 1: of nothing,
    nothing was missed.

    Args:
        truth: Mask in {0, 1} or bool, of any shape.
        prediction: Mask of the same shape.

    Returns:
        The six scores by their names in `METRICS`, each in 0..1.

    Raises:
        SegmentError: If the shapes differ, are empty, or a value is neither 0 nor 1.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    shapes = f"{truth.shape} and {prediction.shape}"
    same = truth.shape == prediction.shape and truth.size > 0
    _require(same, f"The masks have the shapes {shapes}: expected the same one twice.")
    for name, mask in {"truth": truth, "prediction": prediction}.items():
        if not np.isin(mask, (0, 1)).all():
            span = f"{mask.min()} to {mask.max()}"
            raise SegmentError(f"The {name} holds values of {span}: expected a mask of 0 and 1.")
    hit = int(np.count_nonzero((truth == 1) & (prediction == 1)))
    missed, extra = int(np.count_nonzero(truth)) - hit, int(np.count_nonzero(prediction)) - hit
    rest = truth.size - hit - missed - extra
    jaccard = _ratio(hit, hit + missed + extra)
    return {
        "dice": _ratio(2 * hit, 2 * hit + missed + extra),
        "jaccard": jaccard,
        "thresholded_jaccard": jaccard if jaccard >= JACCARD_FAILURE else 0.0,
        "sensitivity": _ratio(hit, hit + missed),
        "specificity": _ratio(rest, rest + extra),
        "accuracy": _ratio(hit + rest, truth.size),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


# ----------------------------------------------------------------------------------------------
# 7. Training and prediction
# ----------------------------------------------------------------------------------------------


def train_model(
    model: keras.Model,
    train_generator: keras.utils.PyDataset,
    val_generator: keras.utils.PyDataset | None,
    epochs: int,
    *,
    learning_rate: float = 1e-3,
    save_path: StrPath | None = None,
    split: Sequence[Pairs] | None = None,
    log_path: StrPath | None = None,
    resume_path: StrPath | None = None,
    resume: bool = True,
    verbose: str | int = "auto",
) -> keras.callbacks.History:
    """Trains a new model, or goes on with one that was trained before.

    A model that is not compiled gets Adam, `dice_cross_entropy_loss`, accuracy and Dice. A loaded
    one keeps its optimizer, and its epochs are counted on. The learning rate falls along a
    half cosine, from `learning_rate` in epoch 0 to nearly 0 in the last; a model with epochs behind
    it enters the curve there. In the end, and also if training was interrupted after an epoch, the
    model is that of the best epoch, optimizer included: the one with the highest validation Dice
    (the lowest validation loss, if it was compiled without `dice_coefficient`; the last, if there
    is no validation).

    Args:
        model: What `create_model` or `load_model` returned; changed in place.
        train_generator: Batches to train on.
        val_generator: Batches to validate on after each epoch, `None` for no validation.
        epochs: How many epochs to train, in addition to those before.
        learning_rate: Peak of the learning rate.
        save_path: `.keras` file that from the end of the first epoch on holds the best one so far.
        split: `(train, val, test)` as `train_val_test_split` returned it, for the file.
        log_path: CSV file with a line an epoch, those before included.
        resume_path: `.keras` file that holds the last epoch. If it is there already, a training
            that was killed goes on from it to the same end: the same weights, where the backend
            computes alike twice. Its best epoch is in `save_path`, which it needs.
        resume: Whether to do so; otherwise such a file is removed.
        verbose: Progress display, as in `keras.Model.fit`.

    Returns:
        The `History` of these epochs: loss, accuracy, Dice and learning rate. That of all epochs is
        `model_record(model).history`.

    Raises:
        SegmentError: If `epochs` or `learning_rate` is not positive, the generators do not fit the
            model, a file cannot be loaded or written, or the loss is not a finite number.
    """
    _check_training(model, (train_generator, val_generator), epochs, learning_rate)
    _check_files_of_training(save_path, resume_path, log_path)
    _compile(model)
    if split is not None:
        model_record(model).split = _split_names(split)
    end = _count_epochs(model) + epochs
    resumed = resume and resume_path is not None and Path(resume_path).exists()
    if resumed:
        _resume(model, str(resume_path))
    elif resume_path is not None:
        Path(resume_path).unlink(missing_ok=True)
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch, _: learning_rate * (1 + math.cos(math.pi * epoch / end)) / 2
    )
    with tempfile.TemporaryDirectory() as folder:
        best_path = Path(save_path or f"{folder}/best.keras")
        best_there = resumed and save_path is not None
        keeper = _EpochKeeper(train_generator, best_path, log_path, resume_path, best_there)
        try:
            with _naming_the_file(train_generator, val_generator):
                return model.fit(
                    train_generator, validation_data=val_generator,
                    callbacks=[keras.callbacks.TerminateOnNaN(), schedule, keeper],
                    initial_epoch=_count_epochs(model), epochs=end, verbose=verbose,
                    shuffle=False,  # the generator shuffles by itself
                )  # fmt: skip
        finally:
            keeper.restore()


def _check_training(
    model: keras.Model, generators: Iterable[Any], epochs: int, learning_rate: float
) -> None:
    _require(epochs >= 1, f"epochs is {epochs}: expected 1 or more.")
    positive = 0 < learning_rate < math.inf
    _require(positive, f"learning_rate is {learning_rate}: expected a number above 0.")
    for generator in generators:
        if isinstance(generator, ImageGenerator):  # and not some data set of the user's own
            _check_frame(model, generator)
            _masks_of(generator)


def _check_files_of_training(
    save_path: StrPath | None, resume_path: StrPath | None, log_path: StrPath | None
) -> None:
    for path, suffix in ((save_path, ".keras"), (resume_path, ".keras"), (log_path, "")):
        if path is not None:
            _check_file_to_write(path, suffix)
            _remove_leftovers(Path(path).parent)
    same = None not in (save_path, resume_path) and Path(save_path or "") == Path(resume_path or "")
    _require(not same, f"{save_path} cannot hold both the best and the last epoch: name two files.")


def _check_frame(model: keras.Model, generator: ImageGenerator) -> None:
    frame = tuple(model.input_shape[1:3])
    _require(
        frame == generator.image_size,
        f"The model takes images of {frame}, but the generator makes {generator.image_size}: "
        "create both with the same image_size.",
    )


def _compile(model: keras.Model) -> None:
    if model.compiled:
        schedule = isinstance(model.optimizer.get_config().get("learning_rate"), dict)
        _require(not schedule, "The optimizer has a schedule of its own: give it a plain rate.")
        return
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss=dice_cross_entropy_loss,
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy"), dice_coefficient],
    )


def _count_epochs(model: keras.Model) -> int:
    return len(model_record(model).history.get("loss", ()))


def _resume(model: keras.Model, path: str) -> None:
    """Puts weights, optimizer and record of a training that was interrupted into a model."""
    before = model_record(_load_same_network(path, model))
    old, new = (_facts(record) for record in (before, model_record(model)))
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    _require(
        not changed,
        f"{path} is of a training with other values of {_shorten(sorted(changed))}: give the "
        "images and the options of the one that was interrupted, or begin anew.",
    )
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    before.origin |= model_record(model).origin  # which may tell of more epochs
    model.record = before


def _facts(record: ModelRecord) -> dict[str, Any]:
    """What must be the same for a training to go on, as far as it is told."""
    told = {"split": record.split, **record.origin, **record.origin.get("options", {})}
    names = ("split", "sha256_of_images", "sha256_of_masks", "seed", "batch_size", "learning_rate")
    return {name: told[name] for name in names if name in told}


@dataclasses.dataclass(eq=False)
class _EpochKeeper(keras.callbacks.Callback):  # type: ignore[misc]
    """Records every epoch in the model's record and keeps the best and the last one in files.

    Unlike `keras.callbacks.ModelCheckpoint`, `BackupAndRestore` and `CSVLogger` it writes files
    whole or not at all, with the record in them, and puts the best epoch back into the model.
    """

    train_generator: Any
    path: Path
    log_path: StrPath | None = None
    resume_path: StrPath | None = None
    resumed: bool = False
    best: float | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Takes a model that goes on for the best so far, unless that was interrupted."""
        earlier = _epoch_scores(model_record(self.model).history)
        if self.resumed:
            best = _epoch_scores(model_record(load_model(self.path)).history)
            _require(bool(best), f"{self.path} is not of the training to go on with: begin anew.")
            self.best = max(best)
        elif earlier:
            self._keep(max(earlier))
        self._write_log()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Ties all randomness to the number of the epoch: what the generator and dropout draw."""
        self.train_generator.epoch = epoch
        seed = getattr(self.train_generator, "seed", 0)
        for i, layer in enumerate(self.model.layers):
            if isinstance(layer, layers.Dropout) and layer.rate > 0:  # or SpatialDropout2D
                layer.seed_generator.state.assign([(seed + i) % 2**32, epoch * 2**20 % 2**32])

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Records the epoch, and keeps it if it is the best."""
        logs = {name: float(value) for name, value in (logs or {}).items()}
        loss = logs["loss"] + logs.get("val_loss", 0.0)
        _require(
            math.isfinite(loss),
            f"The loss became {loss} in epoch {epoch + 1}, where training stopped: try a learning "
            f"rate below {logs['learning_rate']:g}.",
        )
        history = model_record(self.model).history
        for name, value in logs.items():
            history.setdefault(name, []).append(value)
        score = _epoch_scores(history)[-1]
        if self.best is None or score > self.best:
            self._keep(score)
        if self.resume_path is not None:
            save_model(self.model, self.resume_path)
        self._write_log()

    def _write_log(self) -> None:
        history, count = model_record(self.model).history, _count_epochs(self.model)
        if self.log_path is None or not history:
            return
        # A curve that began in a later epoch is empty before it.
        columns: dict[str, list[Any]] = {"epoch": list(range(count))}
        columns |= {name: [""] * (count - len(curve)) + curve for name, curve in history.items()}
        rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]
        _write_text(Path(self.log_path), _table(rows))

    def _keep(self, best: float) -> None:
        save_model(self.model, self.path)
        self.best = best  # only now is there a file to restore it from

    def restore(self) -> None:
        """Puts the best epoch back into the model, if there was one."""
        if self.best is not None:
            self.model.load_weights(self.path)


def _epoch_scores(history: Mapping[str, Sequence[float]]) -> list[float]:
    """What the best epoch is best in; without validation, in being the last."""
    if BEST in history:
        return list(history[BEST])
    if "val_loss" in history:
        return [-loss for loss in history["val_loss"]]
    return [float(epoch) for epoch in range(len(history.get("loss", ())))]


@contextlib.contextmanager
def _naming_the_file(*generators: Any) -> Iterator[None]:
    """A backend wraps what a generator raises in an error of its own; raises the generator's."""
    for generator in generators:
        if hasattr(generator, "failure"):
            generator.failure = None
    try:
        yield
    except Exception as error:
        for generator in generators:
            failure = getattr(generator, "failure", None)
            if failure is not None:
                generator.failure = None
                raise failure from error
        raise


def predict(
    model: keras.Model,
    generator: ImageGenerator,
    *,
    mirror: bool = True,
    one_region: bool = True,
    verbose: str | int = "auto",
) -> Array:
    """Predicts every image of a generator.

    Args:
        model: A trained model.
        generator: The images, taken as they are and in their order; masks are not looked at.
        mirror: Whether each image is predicted in its four mirrorings, which are then averaged.
        one_region: Whether to keep the most certain region alone and to fill its holes, as ISIC
            masks are one region without holes.
        verbose: Progress display, as in `keras.Model.predict`.

    Returns:
        Lesion probabilities `float32 (images, height, width, 1)` in the order of
        `generator.image_paths`; more than 256 MiB of them lie in a file that vanishes with them.

    Raises:
        SegmentError: If a file cannot be loaded, the frame is not the one of the model, or the
            disk has no room for the predictions.
    """
    each = predict_each(model, generator, mirror=mirror, one_region=one_region, verbose=verbose)
    predictions = _room_for(_prediction_shape(generator))
    for place, prediction in zip(predictions, each, strict=True):
        place[...] = prediction
    return predictions


def predict_each(
    model: keras.Model,
    generator: ImageGenerator,
    *,
    mirror: bool = True,
    one_region: bool = True,
    verbose: str | int = "auto",
) -> Iterator[Array]:
    """Predicts as `predict` does, but one part after the other, when its images are asked for.

    A part has 128 images or one batch: `results` scores those of one while the next is predicted.

    Args:
        model: A trained model.
        generator: The images, taken as they are and in their order; masks are not looked at.
        mirror: Whether each image is predicted in its four mirrorings, which are then averaged.
        one_region: Whether to keep the most certain region alone and to fill its holes.
        verbose: Progress display, as in `keras.Model.predict`.

    Yields:
        Lesion probabilities `float32 (height, width, 1)` in the order of `generator.image_paths`.

    Raises:
        SegmentError: If a file cannot be loaded, or the frame is not the one of the model.
    """
    _check_frame(model, generator)
    generator = dataclasses.replace(
        generator, mask_paths=None, shuffle=False, augment=False, workers=generator.workers
    )
    network = _mirrored(model) if mirror else model
    images, size = len(generator.image_paths), generator.batch_size
    batches = range(math.ceil(images / size))
    at_once = math.ceil(128 / size)  # batches
    for first in batches[::at_once]:
        some = _FullBatches(generator, batches[first : first + at_once])
        with _naming_the_file(generator), _each_host_alone():
            predicted = np.asarray(network.predict(some, verbose=verbose))
        for prediction in predicted[: images - first * size]:
            if one_region:
                prediction[..., 0] = _one_region(prediction[..., 0], model_record(model).threshold)
            yield prediction


def _prediction_shape(generator: ImageGenerator) -> tuple[int, ...]:
    return (len(generator.image_paths), *generator.image_size, 1)


def _room_for(shape: tuple[int, ...], in_memory: int = 2**28) -> Array:
    """A `float32` array, in a file without a name if it takes more bytes than `in_memory`."""
    size = 4 * math.prod(shape)
    if size <= in_memory:
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # or a disk that fills up would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float32, "w+", shape=shape)
    except OSError as error:
        raise SegmentError(
            f"{tempfile.gettempdir()} has no room for {size} bytes of predictions "
            f"({error.strerror}): set TMPDIR to a folder that has."
        ) from error


def _put(arriving: Iterable[Array], places: Array) -> Iterator[Array]:
    """Puts each array into its place as it arrives, and gives it on from there."""
    for place, array in itertools.zip_longest(places, arriving):
        _require(
            np.shape(place) == np.shape(array),
            f"These predictions, too few, too many or of shape {np.shape(array)}, do not belong to "
            f"this generator, which gives {places.shape}: predict with it, and use them once.",
        )
        place[...] = array
        yield place


class _FullBatches(keras.utils.PyDataset):  # type: ignore[misc]
    """Some images of a generator, the last batch filled up: nothing is compiled for it anew."""

    def __init__(self, generator: ImageGenerator, batches: range) -> None:
        super().__init__(workers=generator.workers)
        self.generator = generator
        self.batches = batches
        self._load = functools.lru_cache(2)(self._fill)  # Keras has a look at the first two before

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Array:
        return self._load(index)

    def _fill(self, index: int) -> Array:
        images = self.generator.share(self.batches[index], 0, 1)
        wanted = self.generator.batch_size
        if keras.distribution.distribution() is None:  # no devices that need equal parts
            wanted = min(wanted, len(self.generator.image_paths))
        return np.pad(images, ((0, wanted - len(images)), (0, 0), (0, 0), (0, 0)))


def _mirrored(model: keras.Model) -> keras.Model:
    """The mean of what a model says of an image upright, mirrored, upside down and both."""
    mirrorings = ((), (2,), (1,), (1, 2))
    image = keras.Input(model.input_shape[1:])
    lesion = model(ops.concatenate([ops.flip(image, axes) for axes in mirrorings]))
    lesion = ops.reshape(lesion, (len(mirrorings), -1, *model.output_shape[1:]))
    views = [ops.flip(lesion[i], axes) for i, axes in enumerate(mirrorings)]
    return keras.Model(image, sum(views) / len(views))


def _one_region(lesion: Array, threshold: float) -> Array:
    """Probabilities `(H, W)`, pushed below the threshold outside of the most certain region.

    A dark, clear lesion outweighs a larger stretch of skin that only just passes the threshold.
    """
    inside = lesion >= threshold
    regions, count = ndimage.label(inside)
    weights = ndimage.sum_labels(lesion - threshold, regions, range(1, count + 1))
    kept = regions == 1 + np.argmax(weights) if count else inside
    holes = ndimage.binary_fill_holes(kept) & ~kept
    lesion = np.where(kept, lesion, np.minimum(lesion, 0.999 * threshold))
    return np.where(holes, np.maximum(lesion, min(1.001 * threshold, 1)), lesion)


def choose_threshold(generator: ImageGenerator, predictions: Array) -> float:
    """Chooses the threshold that gives the highest mean Dice, for `save_model`.

    Args:
        generator: Images and masks that the model was not trained on, not shuffled.
        predictions: Lesion probabilities `(images, height, width, 1)`.

    Returns:
        A threshold of 0.3 to 0.7 in steps of 0.05; of equal ones the closest to 0.5.

    Raises:
        SegmentError: If there are no masks, or the predictions do not belong to the generator.
    """
    _check_predictions(generator, predictions)
    _masks_of(generator)
    thresholds = np.array([0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7])
    dice = np.zeros(len(thresholds))
    for i, prediction in enumerate(predictions):
        truth = generator._load(i, generator.epoch)[1]
        cut = (prediction >= thresholds[:, None, None, None]).astype(np.float32)
        dice += ops.convert_to_numpy(dice_coefficient(np.broadcast_to(truth, cut.shape), cut))
    return float(thresholds[np.argmax(dice)])


def estimate_dice(predictions: Array, *, threshold: float = 0.5) -> NDArray[np.float64]:
    """Estimates the Dice coefficient of each image without knowing its mask.

    It is the soft Dice between the predicted mask and the probabilities behind it, low where the
    mirrorings of an image disagree, less `OUTLINE_DOUBT / sqrt(share)` for a mask that takes a
    share of the frame: an outline that is slightly off costs a small lesion more.

    Args:
        predictions: Lesion probabilities `(images, height, width, 1)`, as `predict` returned them.
        threshold: Probability from which a pixel is lesion, in 0..1.

    Returns:
        `float64 (images,)` in 0..1, never below 0; 0 for an empty mask.
    """
    estimates = np.zeros(len(predictions))
    for i, lesion in enumerate(predictions):
        mask = lesion >= threshold
        if mask.any():
            inside = lesion.sum(where=mask, dtype=np.float64)
            soft = 2 * inside / (lesion.sum(dtype=np.float64) + np.count_nonzero(mask))
            estimates[i] = max(0, soft - OUTLINE_DOUBT / math.sqrt(mask.mean()))
    return estimates


def describe_device() -> str:
    """The backend and the device that it computes on, in one line."""
    backend = keras.backend.backend()
    device = str(ops.zeros(1).device).rpartition("device:")[-1]
    return f"{device} ({backend} {sys.modules[backend].__version__}, Keras {keras.__version__})"


def data_parallel(devices: int) -> contextlib.AbstractContextManager[Any]:
    """Has models that are created and used inside share each batch among several devices.

    GPUs where there are some, else processors: by `tf.distribute.MirroredStrategy` on TensorFlow,
    by `keras.distribution.DataParallel` on JAX. The losses are those of one device with the same
    batches, to rounding. Generators need a `batch_size` that divides and `whole_batches`.

    On JAX several hosts may train one model. Each runs the same program, with the variables
    `KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES` and `_PROCESS_ID` of
    `keras.distribution.initialize`, enters this context before anything is computed, and loads its
    own share of every batch. All must save when one does, each to a file of its own.

    Args:
        devices: How many, those of all hosts together; with 1 everything is as without.

    Returns:
        A context.

    Raises:
        SegmentError: If there are not so many devices, the backend cannot share, or the hosts do
            not find each other.
    """
    backend = keras.backend.backend()
    together = "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ
    _require(not together or backend == "jax", f"Several hosts need JAX, but this is {backend}.")
    if together and not sys.modules["jax"].distributed.is_initialized():
        try:
            keras.distribution.initialize()
        except (ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise SegmentError(
                f"The hosts cannot be joined ({reason}): mend KERAS_DISTRIBUTION_JOB_ADDRESSES, "
                "_NUM_PROCESSES and _PROCESS_ID, or unset them."
            ) from error
    if devices == 1 and not together:
        return contextlib.nullcontext()
    found = keras.distribution.list_devices() if backend in ("tensorflow", "jax") else []
    _require(
        1 < devices <= len(found) and (not together or devices == len(found)),
        f"{devices} devices were asked for, but {backend} can share batches among {len(found)} "
        f"({_shorten(found)}): ask for {'all' if together else 'fewer'}.",
    )
    if backend == "tensorflow":
        strategy = sys.modules["tensorflow"].distribute.MirroredStrategy(found[:devices])
    else:
        strategy = keras.distribution.DataParallel(
            devices=found[:devices], auto_shard_dataset=False
        )
    scope: contextlib.AbstractContextManager[Any] = strategy.scope()
    return scope


def _this_host() -> tuple[int, int]:
    """The number of this host, and how many compute together."""
    if keras.backend.backend() != "jax":
        return 0, 1
    jax = sys.modules["jax"]
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def _each_host_alone() -> Iterator[None]:
    """Among several hosts each predicts everything, since it cannot read what others hold."""
    sharing = keras.distribution.distribution()
    if _this_host()[1] > 1:
        keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(sharing)


def make_deterministic() -> None:
    """Has TensorFlow or PyTorch use algorithms alone that compute the same twice, to the last bit.

    JAX does so on the CPU by itself; on a GPU it needs `--xla_gpu_deterministic_ops` in
    `XLA_FLAGS`. Seeds are set by `keras.utils.set_random_seed`.
    """
    backend = sys.modules[keras.backend.backend()]
    if keras.backend.backend() == "tensorflow":
        backend.config.experimental.enable_op_determinism()
    elif keras.backend.backend() == "torch":
        backend.use_deterministic_algorithms(True)


# ----------------------------------------------------------------------------------------------
# 8. Saving: network, split, threshold and history in one .keras file
# ----------------------------------------------------------------------------------------------

RECORD_MEMBER = "segment.json"  # inside the .keras file, which is a zip archive; Keras ignores it
RECORD_FORMAT = 1


@dataclasses.dataclass
class ModelRecord:
    """What a model file knows besides the network, so that evaluation needs nothing else.

    Attributes:
        split: File names of the images under `"train"`, `"val"` and `"test"`.
        threshold: Probability from which a pixel is lesion, in 0..1.
        history: A value an epoch under `"loss"`, `"val_loss"`, `"accuracy"` and so on.
        origin: How the model came about, as far as told: options, versions, checksum of the data.
        geometry: How images were fitted into the frame.
        format: Version of the record.
    """

    split: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    threshold: float = 0.5
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    geometry: str = "letterbox"
    format: int = RECORD_FORMAT


def model_record(model: keras.Model) -> ModelRecord:
    """The record that belongs to a model; an empty one for a model that has none yet."""
    if not isinstance(getattr(model, "record", None), ModelRecord):
        model.record = ModelRecord()
    record: ModelRecord = model.record
    return record


def save_model(
    model: keras.Model,
    path: StrPath,
    *,
    split: Sequence[Pairs] | None = None,
    threshold: float | None = None,
    optimizer: bool = True,
) -> None:
    """Saves a model in one `.keras` file, whole or not at all.

    Args:
        model: The model; its record is saved with it.
        path: A file name that ends in `.keras`; folders are made, a file there is replaced.
        split: `(train, val, test)` as `train_val_test_split` returned it; as before if `None`.
        threshold: Probability from which a pixel is lesion; as before if `None`.
        optimizer: Whether to save the optimizer with it, for further training. Without, the file
            is a third as large and predicts in float32.

    Raises:
        SegmentError: If the name does not end in `.keras`, the file cannot be written, or the
            threshold is not between 0 and 1.
    """
    _check_file_to_write(path, ".keras")
    record = model_record(model)
    if split is not None:
        record.split = _split_names(split)
    if threshold is not None:
        record.threshold = _check_threshold(threshold)
    with _written_whole(path) as temporary:
        (model if optimizer else _bare(model)).save(temporary)
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(RECORD_MEMBER, json.dumps(dataclasses.asdict(record), indent=1))


def _bare(model: keras.Model) -> keras.Model:
    """A copy without optimizer, its layers in float32."""
    config = json.dumps(model.get_config()).replace("mixed_bfloat16", "float32")
    bare = keras.Model.from_config(json.loads(config))
    bare.set_weights(model.get_weights())
    return bare


def load_model(path: StrPath = PRETRAINED) -> keras.Model:
    """Loads a model that `save_model` wrote; without a path the trained one that comes along.

    Nothing that the file holds is executed (Keras' safe mode).

    Args:
        path: The `.keras` file.

    Returns:
        The model, compiled as it was, its record under `model_record`. A plain Keras file gets an
        empty record.

    Raises:
        SegmentError: If there is no such file, or it is not a whole, known model file.
    """
    what = "is a folder" if Path(path).is_dir() else "there is no such file"
    _require(Path(path).is_file(), f"{path}: {what}; give a model file that save_model wrote.")
    whole = Path(path).suffix == ".keras" and zipfile.is_zipfile(path)
    _require(whole, f"{path}: not a .keras file, or cut short; give one that save_model wrote.")
    try:
        _check_members(path)
        record = _read_record(path)
        _check_weights(path)
        model = _fuse_norms(keras.saving.load_model(path, safe_mode=True))
        model.record = record
        shapes = model.input_shape, model.output_shape
    except SegmentError:
        raise
    except Exception as error:  # anything at all can be wrong with a file from elsewhere
        reason = str(error).strip().split("\n")[0]
        raise SegmentError(f"{path}: not a whole, safe Keras 3 model file ({reason}).") from error
    if shapes[0][3:] != (3,) or shapes[1] != (*shapes[0][:3], 1) or None in shapes[0][1:]:
        raise SegmentError(
            f"{path} maps {shapes[0]} to {shapes[1]}: expected (None, height, width, 3) to "
            "(None, height, width, 1), as create_model makes it."
        )
    return model


def _check_members(path: StrPath) -> None:
    """Refuses what a model file does not need, or would fill the memory, before reading it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    expected = {"metadata.json", "config.json", "model.weights.h5", RECORD_MEMBER}
    odd = [member.filename for member in members if member.filename not in expected]
    _require(not odd, f"{path} holds what no model file does ({_shorten(odd)}): do not trust it.")
    size = sum(member.file_size for member in members)
    _require(
        size <= 2 * os.path.getsize(path) + 2**24,
        f"{path} would unpack to {size} bytes, far more than it has: do not trust it.",
    )


def _check_weights(path: StrPath) -> None:
    """Refuses a file that declares more weights, in either place, than it has bytes for."""
    with zipfile.ZipFile(path) as archive:
        config, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    compiled = {**(config.pop("compile_config", None) or {}), "optimizer": None}
    items: list[Any] = []
    links: list[Any] = []
    with h5py.File(io.BytesIO(weights)) as file:
        file.visititems(lambda _, item: items.append(item))
        file.visititems_links(lambda _, link: links.append(link))
        size = sum(getattr(item, "nbytes", 0) for item in items)
        elsewhere = any(getattr(item, "external", None) for item in items)
    elsewhere = elsewhere or any(not isinstance(link, h5py.HardLink) for link in links)
    _require(not elsewhere, f"{path} has weights that lie elsewhere: do not trust it.")
    # In a thread of its own, since Keras remembers by thread which variables have no values yet.
    with ThreadPoolExecutor(1) as pool:
        count = pool.submit(_count_parameters, config).result()
    _require(
        max(size, count) <= len(weights),
        f"{path} declares {count} weights and {size} bytes of them, but holds {len(weights)}: do "
        "not trust it.",
    )
    largest = max(_integers(compiled), default=0)  # such as the classes of a confusion matrix
    _require(largest <= 1024, f"{path} has metrics of size {largest}: do not trust it.")


def _count_parameters(config: dict[str, Any]) -> int:
    """How many a network would have, without the memory for them."""
    with keras.StatelessScope(initialize_variables=False):
        return int(keras.saving.deserialize_keras_object(config).count_params())


def _integers(tree: Any) -> list[int]:
    """All whole numbers of a JSON document."""
    if isinstance(tree, int):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [number for branch in branches for number in _integers(branch)]


def _read_record(path: StrPath) -> ModelRecord:
    with zipfile.ZipFile(path) as archive:
        if RECORD_MEMBER not in archive.namelist():
            return ModelRecord()
        fields = json.loads(archive.read(RECORD_MEMBER))
    if fields["format"] > RECORD_FORMAT or fields["geometry"] != "letterbox":
        raise SegmentError(
            f"{path} was written by a newer version (format {fields['format']}, geometry "
            f"{fields['geometry']}), this one knows format {RECORD_FORMAT}: update segment.py."
        )
    # Values of another type raise here rather than where they are used.
    record = ModelRecord(
        split={part: [str(name) for name in names] for part, names in fields["split"].items()},
        threshold=float(fields["threshold"]),
        history={name: list(map(float, curve)) for name, curve in fields["history"].items()},
        origin={"options": {}, **fields.get("origin", {})},
    )
    lengths = [len(curve) for curve in record.history.values()]
    valid = 0 < record.threshold < 1 and isinstance(record.origin["options"], dict)
    valid = valid and all(0 < length <= len(record.history["loss"]) for length in lengths)
    _require(valid, f"{path}: its {RECORD_MEMBER} is not as save_model writes it: do not trust it.")
    return record


def load_weights(model: keras.Model, path: StrPath) -> None:
    """Puts the weights of a model file into a model, whatever the frames of both are.

    Args:
        model: What `create_model` returned; changed in place.
        path: The `.keras` file of a model of as many filters.

    Raises:
        SegmentError: If the file cannot be loaded, or is of another network.
    """
    model.set_weights(_load_same_network(path, model).get_weights())


def _load_same_network(path: StrPath, model: keras.Model) -> keras.Model:
    loaded = load_model(path)
    found, expected = ([weight.shape for weight in unet.weights] for unet in (loaded, model))
    _require(found == expected, f"{path} is of another network: give one with the same layers.")
    return loaded


def _split_names(split: Sequence[Pairs]) -> dict[str, list[str]]:
    parts = zip(("train", "val", "test"), split, strict=True)
    return {name: [Path(image).name for image in images] for name, (images, _) in parts}


def stored_test_split(
    model: keras.Model,
    image_paths: Sequence[StrPath],
    mask_paths: Sequence[StrPath],
    *,
    left_out: Iterable[StrPath] = (),
) -> Pairs:
    """The test set that was put aside when the model was trained.

    Args:
        model: A loaded model.
        image_paths: Image files of the folder that it was trained on.
        mask_paths: Their masks, in the same order.
        left_out: Images of the test set to do without.

    Returns:
        `(image_paths, mask_paths)` of the test set, in the order of the split.

    Raises:
        SegmentError: If the model holds no test set, or part of it is not among the images.
    """
    without = {Path(image).name for image in left_out}
    names = [name for name in model_record(model).split.get("test", ()) if name not in without]
    _require(bool(names), "The model file names no test set: score every image (with --all).")
    pairs = zip(map(str, image_paths), map(str, mask_paths), strict=True)
    found = {Path(image).name: (image, mask) for image, mask in pairs}
    missing = [name for name in names if name not in found]
    _require(
        not missing,
        f"This is not the folder that the model was trained on: {len(missing)} of its {len(names)} "
        f"test images are not among the {len(found)} images ({_shorten(missing)}). Give that "
        "folder, or score every image of this one (with --all).",
    )
    return _unzip([[found[name] for name in names]])


def image_ids_seen(model: keras.Model, image_paths: Sequence[StrPath]) -> list[str]:
    """Ids of those images that the model was trained or validated on, by name, in order."""
    split = model_record(model).split
    seen = {image_id(name) for part in ("train", "val") for name in split.get(part, ())}
    return [image_id(path) for path in image_paths if image_id(path) in seen]


def _check_file_to_write(path: StrPath, suffix: str = "") -> None:
    """Complains before the work, not after it; makes the folder."""
    path = Path(path)
    _require(path.name.endswith(suffix), f"{path} does not end in {suffix}: give a name that does.")
    _require(not path.is_dir(), f"{path} is a folder: give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SegmentError(f"{path}: cannot be written ({error.strerror}).") from error
    writable = os.access(path.parent, os.W_OK)
    _require(writable, f"{path}: cannot be written (the folder does not allow it).")


@contextlib.contextmanager
def _written_whole(path: StrPath) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place only when it is complete."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}{path.suffix}")
    _check_file_to_write(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut might keep the new name and not the content
        temporary.replace(path)
    except OSError as error:
        raise SegmentError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left half-written, which takes seconds to write."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            old = path.stat().st_mtime < time.time() - 3600
            if old and re.fullmatch(r"\.\d+-\d+\.\w+", path.name):
                path.unlink()


# ----------------------------------------------------------------------------------------------
# 9. Results: every image at its own size, numbers first, then figures
# ----------------------------------------------------------------------------------------------


def restore_masks(
    generator: ImageGenerator, predictions: Array, *, threshold: float = 0.5
) -> Iterator[NDArray[np.bool_]]:
    """Puts predictions back onto the original pictures, one at a time.

    The inverse of `letterbox`: the box is cropped, resized to the picture's own size, and cut.

    Args:
        generator: What the predictions were made from.
        predictions: Lesion probabilities `(images, height, width, 1)`.
        threshold: Probability from which a pixel is lesion, in 0..1.

    Yields:
        `bool (height, width)` at each picture's own size, in the order of `generator.image_paths`.

    Raises:
        SegmentError: If the predictions do not belong to the generator.
    """
    _check_predictions(generator, predictions)
    _check_threshold(threshold)
    for path, prediction in zip(generator.image_paths, predictions, strict=True):
        yield _restore_mask(path, prediction, threshold)


def _restore_mask(path: str, prediction: Array, threshold: float) -> NDArray[np.bool_]:
    size = _size_of(path)
    inside = Image.fromarray(_crop(prediction, size)[..., 0].astype(np.float32))
    return np.asarray(inside.resize((size[1], size[0]), Image.Resampling.BILINEAR)) >= threshold


def _crop(frame: Array, size: Size) -> Array:
    """The part of a frame `(H, W, ...)` in which a picture of `size` lies."""
    top, left, height, width = letterbox(size, (frame.shape[0], frame.shape[1]))
    return frame[top : top + height, left : left + width]


def _check_predictions(generator: ImageGenerator, predictions: Array) -> None:
    expected = _prediction_shape(generator)
    _require(
        predictions.shape == expected,
        f"Predictions of shape {predictions.shape} do not belong to this generator, which gives "
        f"{expected}: predict with it.",
    )
    _require(
        not generator.shuffle,
        "The predictions of a generator that shuffles cannot be told apart: use shuffle=False.",
    )


def _check_threshold(threshold: float) -> float:
    valid = 0 < threshold < 1
    _require(valid, f"threshold is {threshold}: expected a probability between 0 and 1.")
    return threshold


def _write_mask(mask: NDArray[np.bool_], image_path: str, output_dir: StrPath) -> None:
    with _written_whole(Path(output_dir) / f"{image_id(image_path)}_segmentation.png") as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)


def results(
    test_generator: ImageGenerator,
    predictions: Array | Iterator[Array],
    *,
    num_imgs: int = 4,
    threshold: float = 0.5,
    history: Mapping[str, Sequence[float]] | None = None,
    output_dir: StrPath | None = None,
    notes: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Scores each prediction at its picture's own size; prints, draws and writes the outcome.

    Prints the summary and the worst images. Draws the first `num_imgs` images with target and
    prediction, the `num_imgs` worst ones with both contours, the histogram of Dice, and the
    learning curves. A notebook shows these figures; a script gets them through `output_dir`.
    Images without masks are estimated instead of scored, and all of them outlined in `overlays/`.

    Args:
        test_generator: The images, not shuffled, with their masks or without.
        predictions: Lesion probabilities `(images, height, width, 1)`, as `predict` returned them,
            or what `predict_each` returned: then scored while the next are predicted.
        num_imgs: How many images to draw in each of the two forms.
        threshold: Probability from which a pixel is lesion, in 0..1.
        history: `model_record(model).history`, for the learning curves.
        output_dir: Folder for `scores.csv` (a row an image, full precision), `summary.json`, the
            figures as PNG (20 images each), and the predicted masks under `masks/`. Files of these
            names are replaced, others stay.
        notes: What else `summary.json` shall say.

    Returns:
        For each image, in the order of the generator, its `"id"`, the scores in `METRICS` (with a
        mask) and `"estimated_dice"`.

    Raises:
        SegmentError: If a file cannot be loaded or written, a mask has not its image's size, or the
            predictions do not belong to the generator.
    """
    output = None if output_dir is None else Path(output_dir)
    if output:
        _check_file_to_write(output / "scores.csv")  # before the first image is predicted
        for folder in ("", "masks", "overlays"):
            _remove_leftovers(output / folder)
    arriving = iter(predictions)
    if not isinstance(predictions, np.ndarray):
        predictions = _room_for(_prediction_shape(test_generator))
        arriving = _put(arriving, predictions)
    _check_predictions(test_generator, predictions)
    scores = _score_images(test_generator, arriving, threshold, output)
    summary = {"threshold": threshold, **(notes or {}), **summarize(scores)}
    print(_report(summary))
    if output:
        _write_text(output / "scores.csv", _table(scores))
        _write_text(output / "summary.json", json.dumps(summary, indent=1))
    figures = _figures(test_generator, predictions, scores, num_imgs, threshold, history)
    for name, figure in figures:
        if output:
            save_figure(figure, output / f"{name}.png")
        _show(figure)
    return scores


def _score_images(
    generator: ImageGenerator, arriving: Iterator[Array], threshold: float, output: Path | None
) -> list[dict[str, Any]]:
    """Scores (and writes) full-size masks as predictions arrive, one on each processor."""
    _check_threshold(threshold)
    masks = generator.mask_paths or itertools.repeat(None)
    pool, scores = ThreadPoolExecutor(os.cpu_count()), list[Future[dict[str, Any]]]()
    try:
        for image in zip(arriving, generator.image_paths, masks, strict=False):
            scores.append(pool.submit(_score_image, threshold, output, *image))
            if len(scores) >= 128:  # no more shall wait, nor an error for the end
                scores[-128].result()
        return [score.result() for score in scores]
    finally:
        pool.shutdown(cancel_futures=True)


def _score_image(
    threshold: float,
    output_dir: Path | None,
    prediction: Array,
    image_path: str,
    mask_path: str | None,
) -> dict[str, Any]:
    mask = _restore_mask(image_path, prediction, threshold)
    scores: dict[str, Any] = {"id": image_id(image_path)}
    if mask_path is not None:
        _check_same_size(image_path, mask_path)
        scores |= score_masks(load_segmented_image(mask_path, None)[..., 0], mask)
    if output_dir is not None:
        _write_mask(mask, image_path, output_dir / "masks")
    if output_dir is not None and mask_path is None:
        _write_overlay(mask, image_path, output_dir / "overlays")
    (estimate,) = estimate_dice(prediction[None], threshold=threshold)
    return {**scores, "estimated_dice": float(estimate)}


def _write_overlay(mask: NDArray[np.bool_], image_path: str, output_dir: Path) -> None:
    """The picture at its own size, the predicted lesion outlined."""
    picture = load_input_image(image_path, None).copy()
    width = 1 + max(mask.shape) // 400
    picture[mask & ~ndimage.binary_erosion(mask, iterations=width)] = (255, 0, 255)
    with _written_whole(output_dir / f"{image_id(image_path)}_overlay.jpg") as temporary:
        Image.fromarray(picture).save(temporary, quality=90)


def _masks_of(generator: ImageGenerator) -> list[str]:
    if generator.mask_paths is None:
        raise SegmentError(
            "This needs the masks of the images: create the generator with mask_paths (predict "
            "and results do without)."
        )
    return generator.mask_paths


def summarize(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums the scores of many images up, beyond their mean.

    Args:
        scores: What `results` returned, at least one image.

    Returns:
        `{"images": count, "doubtful": {id: estimated Dice}}` of the ten lowest, and for each score
        `{"mean", "median", "std", "p10", "min"}`. With masks also `"worst": {id: Dice}` of the ten
        lowest, `"failures"`, the number of images with a Jaccard below 0.65, and how well the
        estimate tells them: `"estimate_rank_correlation"` (Spearman's, with Dice) and
        `"estimate_roc_area"` (for failures), `None` where they are not defined.

    Raises:
        SegmentError: If there is no score.
    """
    _require(len(scores) > 0, "There are no scores to sum up: score at least one image.")
    columns = {name: [score[name] for score in scores] for name in scores[0]}
    ids = columns.pop("id")
    summary: dict[str, Any] = {"images": len(scores)}
    for title, name in (("worst", "dice"), ("doubtful", "estimated_dice")):
        if name in columns:
            lowest = np.argsort(columns[name], kind="stable")[:10]
            summary[title] = {ids[i]: columns[name][i] for i in lowest}
    if "dice" in columns:
        summary.update(_judge_estimate(columns))
    for name, values in columns.items():
        p10, median = np.percentile(values, (10, 50))
        numbers = (np.mean(values), median, np.std(values), p10, min(values))
        names = ("mean", "median", "std", "p10", "min")
        summary[name] = dict(zip(names, map(float, numbers), strict=True))
    return summary


def _judge_estimate(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    dice, estimate = columns["dice"], columns["estimated_dice"]
    failed = np.array(columns["jaccard"]) < JACCARD_FAILURE
    varied = min(len(set(dice)), len(set(estimate))) > 1
    rank = float(stats.spearmanr(dice, estimate).statistic) if varied else None
    area = float(roc_auc_score(~failed, estimate)) if len(set(failed)) > 1 else None
    return {
        "failures": int(failed.sum()),
        "estimate_rank_correlation": rank,
        "estimate_roc_area": area,
    }


def _report(summary: Mapping[str, Any]) -> str:
    """The printed summary: a table of the scores, the failures, where to look first."""
    scored = "dice" in summary
    verb = "scored" if scored else "segmented"
    lines = [f"{summary['images']} images, each {verb} at its own size"]
    lines.append(f"{'':20}" + "".join(f"{column:>10}" for column in REPORTED))
    for name in filter(summary.__contains__, (*METRICS, "estimated_dice")):
        values = "".join(f"{summary[name][column]:10.6f}" for column in REPORTED)
        lines.append(f"{name.replace('_', ' '):20}{values}")
    if scored:
        share = summary["failures"] / summary["images"]
        lines.append(f"Jaccard below {JACCARD_FAILURE}: {summary['failures']} images ({share:.1%})")
    titles = {"worst": "Worst images by Dice", "doubtful": "To look at first, by estimated Dice"}
    for name in filter(summary.__contains__, titles):
        lines.append(f"{titles[name]}:")
        lines += [f"  {id_}  {dice:.6f}" for id_, dice in list(summary[name].items())[:5]]
    return "\n".join(lines)


def _table(scores: Sequence[Mapping[str, Any]]) -> str:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(scores[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(scores)
    return table.getvalue()


def _write_text(path: Path, text: str) -> None:
    with _written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _figures(
    generator: ImageGenerator,
    predictions: Array,
    scores: Sequence[Mapping[str, Any]],
    num_imgs: int,
    threshold: float,
    history: Mapping[str, Sequence[float]] | None,
) -> Iterator[tuple[str, Figure]]:
    """The figures of `results` by file name; 20 images a figure, which its first one numbers."""
    drawn = min(num_imgs, len(scores))
    key = "dice" if "dice" in scores[0] else "estimated_dice"
    worst = sorted(range(len(scores)), key=lambda i: scores[i][key])[:drawn]
    for name, indices in (("predictions", range(drawn)), ("worst", worst)):
        for start in range(0, drawn, 20):
            page = indices[start : start + 20]
            figure = plot_predictions(
                generator, predictions, scores, page, threshold=threshold, contours=name == "worst"
            )
            yield name + f"_{start + 1}" * (drawn > 20), figure
    yield "histogram", plot_dice_histogram(scores)
    if history:
        yield "training", plot_history(history)


def plot_predictions(
    generator: ImageGenerator,
    predictions: Array,
    scores: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    *,
    threshold: float = 0.5,
    contours: bool = False,
) -> Figure:
    """Draws a row of input, target and prediction for each chosen image, with id and Dice.

    Args:
        generator: The images; without masks there is no target.
        predictions: Lesion probabilities `(images, height, width, 1)`.
        scores: What `results` returned.
        indices: Which images to draw, in this order.
        threshold: Probability from which a pixel is lesion, in 0..1.
        contours: Whether to draw the outlines of target and prediction over the input.

    Returns:
        The figure.
    """
    columns = 2 if generator.mask_paths is None else 3
    figure, axes = _subplots(len(indices), columns, width=8, height=0.4 + 2.2 * len(indices))
    for row, i in enumerate(indices):
        masks = _masks_to_draw(generator, predictions[i], i, threshold)
        image = load_input_image(generator.image_paths[i], generator.image_size)
        image = _crop(image, _size_of(generator.image_paths[i]))
        kind = "dice" if "dice" in scores[i] else "estimated_dice"
        titles = [scores[i]["id"], *masks]
        titles[-1] += f", {kind.replace('_d', ' D').replace('dice', 'Dice')} {scores[i][kind]:.4f}"
        cells = axes[columns * row : columns * (row + 1)]
        for cell, picture, title in zip(cells, (image, *masks.values()), titles, strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1)
            cell.set_title(title, fontsize="medium", parse_math=False)
            cell.axis("off")
        if contours:
            _draw_contours(cells[0], masks)
    if contours:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _masks_to_draw(
    generator: ImageGenerator, prediction: Array, i: int, threshold: float
) -> dict[str, Array]:
    """Target, if there is one, and prediction of an image, without the frame's black bars."""
    size = _size_of(generator.image_paths[i])
    masks = {"Prediction": _crop(prediction[..., 0] >= threshold, size)}
    if generator.mask_paths is None:
        return masks
    target = load_segmented_image(generator.mask_paths[i], generator.image_size)[..., 0]
    return {"Target": _crop(target, size), **masks}


def _draw_contours(axes: Axes, masks: Mapping[str, Array]) -> None:
    for name, mask in masks.items():
        color = "lime" if name == "Target" else "magenta"
        # A rim of background closes the outline of a lesion that the picture's edge cuts.
        padded = np.pad(mask.astype(float), 1)
        if mask.any():
            x, y = (np.arange(side + 2) - 1 for side in mask.shape[::-1])
            axes.contour(x, y, padded, levels=[0.5], colors=color, linewidths=1.5)
        axes.plot([], [], color=color, label=name)


def plot_dice_histogram(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how Dice (the estimate, without masks) is distributed in the scores of `results`."""
    title = "Dice coefficient" if "dice" in scores[0] else "Estimated Dice coefficient"
    dice = np.array([score.get("dice", score["estimated_dice"]) for score in scores])
    figure, (axes,) = _subplots(1, 1, width=7, height=4)
    axes.hist(dice, bins=40, range=(0, 1), color="tab:blue", edgecolor="white")
    axes.axvline(dice.mean(), color="tab:red", label=f"Mean {dice.mean():.4f}")
    axes.axvline(np.median(dice), color="black", ls="--", label=f"Median {np.median(dice):.4f}")
    axes.set(xlabel=title, ylabel="Images", xlim=(0, 1), title=f"{title} of {len(dice)} images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    return figure


def plot_history(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draws accuracy, loss and Dice over the epochs, the best epoch marked.

    Args:
        history: `model_record(model).history`, or the `history` of a Keras `History`.

    Returns:
        The figure: a panel for each quantity, with training and validation curve.

    Raises:
        SegmentError: If there is none of these quantities.
    """
    titles = {"accuracy": "Accuracy", "loss": "Loss", "dice_coefficient": "Dice coefficient"}
    panels = [name for name in titles if history.get(name)]
    _require(bool(panels), "The history holds no epoch: train the model first.")
    figure, axes = _subplots(1, len(panels), width=4 * len(panels), height=3.6)
    epochs, scores = len(history[panels[0]]), _epoch_scores(history)
    best = epochs - len(scores) + int(np.argmax(scores)) + 1
    for cell, name in zip(axes, panels, strict=True):
        for key, label in ((name, "Training"), (f"val_{name}", "Validation")):
            curve = history.get(key, ())
            first = epochs - len(curve) + 1  # of a curve that began in a later epoch
            if curve:
                cell.plot(range(first, epochs + 1), curve, ".-", label=label)
        cell.axvline(best, color="gray", ls="--", label=f"Best epoch ({best})")
        cell.set(title=titles[name], xlabel="Epoch")
        cell.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    return figure


def save_figure(figure: Figure, path: StrPath) -> None:
    """Writes a figure as a PNG file, whole or not at all; folders are made."""
    with _written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure in inches and its axes, which pyplot does not keep alive or show by itself."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    plt.close(figure)
    return figure, list(axes.flat)


def _show(figure: Figure) -> None:
    """Shows a figure in a notebook; elsewhere nothing opens and nothing blocks."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        ipython.display.display(figure)
