"""What several test files draw on: small pictures of known content, and where real ones lie."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["MPLBACKEND"] = "agg"

import keras
import numpy as np
import pytest
from PIL import Image, ImageDraw

import segment

ISIC_2017 = Path(os.environ.get("ISIC_2017", Path(__file__).parents[2] / "shared" / "isic2017"))

MakePairs = Callable[..., segment.Pairs]


def draw_lesion(size: tuple[int, int], seed: int) -> tuple[Image.Image, Image.Image]:
    """A dark, jagged spot on bright, noisy skin and its mask; `size` is `(height, width)`."""
    rng = np.random.default_rng(seed)
    height, width = size
    mask = Image.new("L", (width, height))
    center = rng.uniform(0.4, 0.6, 2) * (width, height)
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    reach = rng.uniform(0.13, 0.38, (14, 1)) * (width, height)
    rim = center + reach * np.stack([np.cos(angle), np.sin(angle)], 1)
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in rim], fill=255)
    skin = Image.new("RGB", (width, height), (222, 180, 160))
    skin.paste((110, 60, 40), mask=mask)
    noisy = np.asarray(skin) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), mask


def with_threshold(probabilities: np.ndarray, threshold: float) -> segment.Predictions:
    """The probabilities, to be thresholded elsewhere than at 0.5."""
    predictions = np.array(probabilities).view(segment.Predictions)
    predictions.threshold = threshold
    return predictions


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """Writes `count` pairs of drawn lesions to two folders; returns their paths."""

    def make(count: int, size: tuple[int, int] = (40, 56), folder: str = "data") -> segment.Pairs:
        images, masks = tmp_path / folder / "images", tmp_path / folder / "masks"
        for directory in (images, masks):
            directory.mkdir(parents=True)
        for i in range(count):
            image, mask = draw_lesion(size, i)
            image.save(images / f"ISIC_{i:07}.png")
            mask.save(masks / f"ISIC_{i:07}_segmentation.png")
        return segment.find_image_pairs(images, masks)

    return make


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains without tracing a graph first, which would take longer than a few small steps."""
    if keras.backend.backend() == "tensorflow":  # elsewhere eager training is the slower one
        always = property(lambda model: True, lambda model, value: None)
        monkeypatch.setattr(keras.Model, "run_eagerly", always)


@pytest.fixture(scope="session")
def isic_2017() -> Path:
    """The folder of the real images, or a skipped test."""
    if not ISIC_2017.is_dir():
        pytest.skip(f"needs the real ISIC 2017 images: set ISIC_2017 to their folder ({ISIC_2017})")
    return ISIC_2017


def folders(root: Path, native: bool = False) -> tuple[Path, Path]:
    """The folders of images and masks as ISIC 2017 names them."""
    root = root / "native" if native else root
    return root / "ISIC-2017_Training_Data", root / "ISIC-2017_Training_Part1_GroundTruth"
