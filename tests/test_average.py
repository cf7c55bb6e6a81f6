"""Several networks in one file, whose probabilities are averaged."""

from pathlib import Path

import keras
import numpy as np
import pytest
from networks import tiny_network

import segment

SIZE = (16, 32)
FLIPS = ((), (2,), (1,), (1, 2))

pytestmark = pytest.mark.usefixtures("eager")


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)


def members(count: int) -> list[keras.Model]:
    keras.utils.set_random_seed(0)
    return [tiny_network(SIZE) for _ in range(count)]


def flipped_prediction(model: keras.Model, axes: tuple[int, ...]) -> np.ndarray:
    return np.flip(model.predict(np.flip(images(), axes), verbose=0), axes)


def test_two_networks_share_the_four_flips() -> None:
    first, second = members(2)
    average = segment.average_models([first, second])
    views = [(first, ()), (second, (2,)), (first, (1,)), (second, (1, 2))]
    expected = np.mean([flipped_prediction(model, axes) for model, axes in views], axis=0)
    np.testing.assert_allclose(average.predict(images(), verbose=0), expected, atol=1e-6)
    assert not segment.model_record(average).mirror
    assert average.count_params() == 2 * first.count_params()


@pytest.mark.parametrize(("count", "views"), [(1, 4), (3, 6), (5, 5)])
def test_each_network_sees_as_many_flips_as_the_others(count: int, views: int) -> None:
    models = members(count)
    average = segment.average_models(models)
    expected = [flipped_prediction(models[i % count], FLIPS[i % 4]) for i in range(views)]
    found = average.predict(images(), verbose=0)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-6)


def test_the_average_is_saved_loaded_cast_and_has_fused_norms(tmp_path: Path) -> None:
    average = segment.average_models(members(2))
    here = average.predict(images(), verbose=0)
    segment.save_model(average, tmp_path / "average.keras", optimizer=False)
    loaded = segment.load_model(tmp_path / "average.keras")
    np.testing.assert_array_equal(loaded.predict(images(), verbose=0), here)
    assert not segment.model_record(loaded).mirror
    with segment._fused_norms(loaded, moments=True):
        norms = [layer for layer in segment._layers(loaded) if "call" in vars(layer)]
    assert len(norms) == 2
    fast = segment.load_model(tmp_path / "average.keras", bfloat16=True)
    assert {layer.compute_dtype for layer in segment._layers(fast)} == {"bfloat16", "float32"}
    assert fast.get_layer("mean").compute_dtype == "float32"
    np.testing.assert_allclose(fast.predict(images(), verbose=0), here, atol=0.02)


def test_its_record_combines_those_of_the_networks() -> None:
    first, second = members(2)
    split = {"train": ["a", "b"], "val": ["c"], "test": ["d", "e", "g"]}
    estimate = [0.1, 0.9, 1.0]
    origin = {"options": {"seed": 3}}
    first.record = segment.ModelRecord(
        split, 0.5, estimate=estimate, history={"loss": [1.0]}, origin=origin
    )
    split = {"train": ["a", "d"], "val": ["f"], "test": ["e", "b", "g"], "earlier": ["g"]}
    second.record = segment.ModelRecord(split, 0.6, estimate=[0.3, 0.7, 2.0])
    record = segment.model_record(segment.average_models([first, second]))
    assert record.split == {"train": ["a", "b", "c", "d", "f", "g"], "test": ["e"]}
    assert record.threshold == pytest.approx(0.55)
    assert record.estimate == pytest.approx([0.2, 0.8, 1.5])
    assert record.origin == {"models": [origin, {}]}
    assert record.history == {}
    assert first.record.history == {"loss": [1.0]}  # which does not change


def test_an_average_can_be_trained_without_changing_its_members() -> None:
    models = members(2)
    before = models[0].get_weights()
    average = segment.average_models(models)
    segment._compile(average)
    masks = np.random.default_rng(1).integers(0, 2, (3, *SIZE, 1))
    average.train_on_batch(images(), masks)
    changed = [
        np.abs(now - then).max()
        for now, then in zip(average.get_layer("model1").get_weights(), before, strict=True)
    ]
    assert max(changed) > 0
    for now, then in zip(models[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_single_network_starts_with_the_weights_of_the_first(tmp_path: Path) -> None:
    models = members(2)
    segment.save_model(segment.average_models(models), tmp_path / "average.keras", threshold=0.6)
    single = tiny_network(SIZE)
    segment.load_weights(single, tmp_path / "average.keras")
    for found, expected in zip(single.get_weights(), models[0].get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert segment.model_record(single).threshold == 0.6


def test_networks_of_different_frames_are_refused() -> None:
    models = [tiny_network(SIZE), tiny_network((32, 32))]
    with pytest.raises(segment.SegmentError, match="expected one size"):
        segment.average_models(models)


def test_averages_of_averages_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    first, second, third = (tiny_network(SIZE, num_filters=n) for n in (1, 2, 3))
    inner = segment.average_models([first, second])
    parts = [segment.average_models([inner, other]) for other in (third, inner)]
    outer = segment.average_models(parts)
    segment.save_model(outer, tmp_path / "m.keras")
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    loaded = segment.load_model(tmp_path / "m.keras").predict(images, verbose=0)
    np.testing.assert_allclose(loaded, outer.predict(images, verbose=0), atol=1e-6)
