"""Makes the pretrained model: a network, or the mean of several, in half precision.

Usage: python tests/make_pretrained.py MODEL.keras... --folds DIR --image-dir DIR --mask-dir DIR

The networks are trained on all images. The folds, which `driver_train_save_evaluate.py --folds`
wrote, have predictions of images that they have not seen, to which the estimate is fitted.
"""

import argparse
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np

import segment


def round_weights(model: keras.Model) -> None:
    """Rounds the weights to half precision, so that half of their bytes are 0 and compress."""
    weights = model.get_weights()
    model.set_weights([weight.astype(np.float16).astype(np.float32) for weight in weights])


def compress(path: Path) -> None:
    """Compresses the members of a zip archive, as `.keras` files are; Keras itself stores them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def fit_estimate(folds: Path, image_dir: str, mask_dir: str, threshold: float) -> list[float]:
    """Fits the estimate to all images, each predicted by the fold that has not seen it."""
    images, masks = segment.find_image_pairs(image_dir, mask_dir)
    paths: segment.Pairs = ([], [])
    lesions, size = list[np.ndarray](), segment.IMAGE_SIZE
    for path in sorted(folds.glob("fold*/model.keras")):
        model = segment.load_model(path, bfloat16=None)
        test, size = segment.stored_test_split(model, images, masks), model.input_shape[1:3]
        generator = segment.create_generator(*test, image_size=size)
        lesions += segment.predict_each(model, generator)
        paths = (paths[0] + test[0], paths[1] + test[1])
    predictions = np.stack(lesions).view(segment.Predictions)
    predictions.threshold = threshold
    return segment.fit_estimate(segment.create_generator(*paths, image_size=size), predictions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL.keras")
    parser.add_argument("--folds", type=Path, required=True, metavar="DIR")
    parser.add_argument("--image-dir", required=True, metavar="DIR")
    parser.add_argument("--mask-dir", required=True, metavar="DIR")
    parser.add_argument("--threshold", type=float, default=0.55, metavar="P")
    options = parser.parse_args()
    models = list(map(segment.load_model, options.models))
    model = segment.average_models(models) if len(models) > 1 else models[0]
    round_weights(model)
    estimate = fit_estimate(options.folds, options.image_dir, options.mask_dir, options.threshold)
    segment.save_model(
        model, "pretrained.keras", threshold=options.threshold, estimate=estimate,
        optimizer=False,
    )  # fmt: skip
    compress(Path("pretrained.keras"))
