"""The pretrained model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import MakePairs
from networks import tiny_network

import segment

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "images" / "sample"


def test_the_pretrained_model_is_small_and_holds_no_optimizer() -> None:
    assert segment.PRETRAINED.stat().st_size < 16e6
    model = segment.load_model()
    assert model.count_params() == 2 * 3_188_435
    assert not model.compiled
    assert {layer.compute_dtype for layer in segment._layers(model)} == {"float32"}
    record = segment.model_record(model)
    assert len(record.split["train"]) == 1974
    assert (record.threshold, record.mirror, len(record.estimate)) == (0.55, False, 3)


def test_it_holds_two_networks_that_share_the_flips_and_can_be_started_from() -> None:
    model = segment.load_model()
    image = np.random.default_rng(0).integers(0, 256, (1, *model.input_shape[1:]), np.uint8)
    views = [("model1", ()), ("model2", (2,)), ("model1", (1,)), ("model2", (1, 2))]
    expected = [np.flip(model.get_layer(name)(np.flip(image, axes)), axes) for name, axes in views]
    np.testing.assert_allclose(model(image), np.mean(expected, axis=0), atol=1e-5)
    single = segment.create_model((64, 64))
    segment.load_weights(single, segment.PRETRAINED)
    first = model.get_layer("model1").get_weights()
    for found, weights in zip(single.get_weights(), first, strict=True):
        np.testing.assert_array_equal(found, weights)


def test_the_script_makes_a_small_model_of_networks_and_folds(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    images, masks = make_pairs(4)
    options = ["--folds", str(tmp_path), "--image-dir", str(Path(images[0]).parent)]
    options += ["--mask-dir", str(Path(masks[0]).parent), "--threshold", "0.45"]
    for i, split in enumerate(segment.cross_validation_splits(images, masks, 2, val_split=0)):
        path = tmp_path / f"fold{i}" / "model.keras"
        segment.save_model(tiny_network((32, 32)), path, split=split)
    network = segment.create_model((16, 16), num_filters=2)
    segment.save_model(network, tmp_path / "network.keras")
    subprocess.run(
        [sys.executable, ROOT / "tests" / "make_pretrained.py", "network.keras", *options],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    made = segment.load_model(tmp_path / "pretrained.keras")
    record = segment.model_record(made)
    assert (record.threshold, record.estimate) == (0.45, [])  # fitted to 100 images or more
    for found, weights in zip(made.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(found, weights.astype(np.float16))
    sizes = [(tmp_path / name).stat().st_size for name in ("pretrained.keras", "network.keras")]
    assert sizes[0] < 0.8 * sizes[1]


def test_the_pretrained_model_segments_the_sample_that_it_was_not_trained_on() -> None:
    images, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    model = segment.load_model()
    assert segment.image_ids_seen(model, images) == []
    frame = model.input_shape[1:3]
    batches = segment.create_generator(images[::8], masks[::8], image_size=frame)
    predictions = segment.predict(model, batches, verbose=0)
    assert predictions.threshold == 0.55
    scores = segment.results(batches, predictions, num_imgs=0)
    assert min(score["jaccard"] for score in scores) > 0.65
    assert segment.summarize(scores)["dice"]["mean"] > 0.94
