"""The pretrained model."""

from pathlib import Path

import numpy as np

import segment

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "images" / "sample"


def test_the_pretrained_model_is_small_and_holds_no_optimizer() -> None:
    assert segment.PRETRAINED.stat().st_size < 16e6
    model = segment.load_model()
    assert model.count_params() == 3_188_435
    assert not model.compiled
    assert {layer.compute_dtype for layer in segment._layers(model)} == {"float32"}
    record = segment.model_record(model)
    assert len(record.split["train"]) == 1974
    assert (record.threshold, record.mirror, len(record.estimate)) == (0.55, True, 3)


def test_a_new_network_of_another_frame_starts_with_its_weights() -> None:
    model = segment.create_model((64, 64))
    segment.load_weights(model, segment.PRETRAINED)
    for found, weights in zip(model.get_weights(), segment.load_model().get_weights(), strict=True):
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
