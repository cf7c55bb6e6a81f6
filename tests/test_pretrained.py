"""The pretrained model."""

from pathlib import Path

import numpy as np

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


def test_the_pretrained_model_holds_two_networks_that_share_the_flips() -> None:
    model = segment.load_model()
    image = np.random.default_rng(0).integers(0, 256, (1, *model.input_shape[1:]), np.uint8)
    views = [("model1", ()), ("model2", (2,)), ("model1", (1,)), ("model2", (1, 2))]
    expected = [np.flip(model.get_layer(name)(np.flip(image, axes)), axes) for name, axes in views]
    np.testing.assert_allclose(model(image), np.mean(expected, axis=0), atol=1e-5)


def test_a_new_network_starts_with_the_weights_of_the_first() -> None:
    model = segment.create_model((64, 64))
    segment.load_weights(model, segment.PRETRAINED)
    expected = segment.load_model().get_layer("model1").get_weights()
    for found, weights in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(found, weights)


def test_the_pretrained_model_segments_the_sample_that_it_was_not_trained_on() -> None:
    images, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    model = segment.load_model()
    assert segment.image_ids_seen(model, images) == []
    frame = model.input_shape[1:3]
    batches = segment.create_generator(images[::4], masks[::4], image_size=frame)
    predictions = segment.predict(model, batches, verbose=0)
    assert predictions.threshold == 0.55
    scores = segment.results(batches, predictions, num_imgs=0)
    assert min(score["jaccard"] for score in scores) > 0.65
    assert segment.summarize(scores)["dice"]["mean"] > 0.94
