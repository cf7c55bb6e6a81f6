"""The trained model that comes along."""

from pathlib import Path

import segment

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "images" / "sample"


def test_it_is_small_and_holds_nothing_but_what_prediction_needs() -> None:
    assert segment.PRETRAINED.stat().st_size < 16e6
    model = segment.load_model()
    assert model.count_params() == 3_188_435
    assert not model.compiled
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    record = segment.model_record(model)
    assert len(record.split["train"]) == 1974
    assert record.threshold == 0.55


def test_it_segments_the_drawn_sample_that_it_never_saw() -> None:
    images, masks = segment.find_image_pairs(SAMPLE / "input", SAMPLE / "truth")
    model = segment.load_model()
    assert segment.image_ids_seen(model, images) == []
    batches = segment.create_generator(images, masks, image_size=model.input_shape[1:3])
    predictions = segment.predict(model, batches, verbose=0)
    threshold = segment.model_record(model).threshold
    scores = segment.results(batches, predictions, num_imgs=0, threshold=threshold)
    assert min(score["jaccard"] for score in scores) > 0.65
    assert segment.summarize(scores)["dice"]["mean"] > 0.94
