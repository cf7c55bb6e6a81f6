"""One photograph in, its mask out; and computing in bfloat16."""

from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import draw_lesion
from networks import tiny_network
from PIL import Image

import segment

SIZE = (32, 48)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    draw_lesion((90, 70), 0)[0].save(path)
    return path


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = tiny_network(SIZE)
    segment.model_record(model).threshold = 0.45
    return model


def test_a_path_and_an_array_give_the_mask_of_the_load_driver(
    photo: Path, model: keras.Model
) -> None:
    generator = segment.create_generator([photo], image_size=SIZE)
    prediction = segment.predict(model, generator, verbose=0)
    (expected,) = segment.restore_masks(generator, prediction)
    assert 0 < expected.mean() < 1
    for image in (photo, str(photo), np.asarray(Image.open(photo))):
        mask = segment.segment_image(model, image)
        assert mask.shape == (90, 70)
        np.testing.assert_array_equal(mask, expected, strict=True)


def test_a_threshold_replaces_that_of_the_record(photo: Path, model: keras.Model) -> None:
    segment.model_record(model).one_region = False
    generator = segment.create_generator([photo], image_size=SIZE)
    lesion = segment.predict(model, generator, verbose=0)[0]
    low, high = (float(np.quantile(lesion, part)) for part in (0.3, 0.7))
    sizes = [segment.segment_image(model, photo, threshold=t).mean() for t in (low, high)]
    assert sizes[0] > sizes[1] > 0
    with pytest.raises(segment.SegmentError, match="threshold is 0: expected a probability"):
        segment.segment_image(model, photo, threshold=0)


def test_the_second_call_traces_nothing(photo: Path, model: keras.Model) -> None:
    traced = []
    layer = model.get_layer("level1_conv")
    call = layer.call

    def spy(x: object) -> object:  # runs only while tracing
        traced.append(1)
        return call(x)

    layer.call = spy
    segment.segment_image(model, photo)
    first = len(traced)
    segment.segment_image(model, np.asarray(Image.open(photo))[:50])
    generator = segment.create_generator([photo] * 4, image_size=SIZE, batch_size=2)
    segment.predict(model, generator, verbose=0)
    before = len(traced)
    segment.predict(model, generator, verbose=0)
    assert (first, before) == (1, 2)  # once for each size of a batch
    assert len(traced) == before


def test_one_photograph_is_predicted_without_tracing(photo: Path, model: keras.Model) -> None:
    generator = segment.create_generator([photo], image_size=SIZE)
    lesion = segment.predict(model, generator, verbose=0)
    assert model.predict_function is None
    several = segment.create_generator([photo] * 2, image_size=SIZE)
    np.testing.assert_allclose(lesion[0], segment.predict(model, several, verbose=0)[1], atol=1e-6)


def test_invalid_images_are_refused(model: keras.Model) -> None:
    for wrong in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)):
        with pytest.raises(segment.SegmentError, match=r"expected uint8 \(height, width, 3\)"):
            segment.segment_image(model, wrong)
    with pytest.raises(segment.SegmentError, match=r"nowhere\.jpg: there is no such file"):
        segment.segment_image(model, "nowhere.jpg")


def test_bfloat16_gives_nearly_the_same_probabilities(
    photo: Path, model: keras.Model, tmp_path: Path
) -> None:
    segment.save_model(model, tmp_path / "model.keras")
    fast = segment.load_model(tmp_path / "model.keras", bfloat16=True)
    assert fast.get_layer("level1_conv").compute_dtype == "bfloat16"
    assert segment.model_record(fast).threshold == 0.45
    generator = segment.create_generator([photo] * 2, image_size=SIZE)
    exact, rounded = (segment.predict(m, generator, verbose=0) for m in (model, fast))
    assert 0 < np.abs(exact - rounded).max() < 0.02


@pytest.mark.parametrize(
    ("native", "faster", "dtype"),
    [(True, "bfloat16", "bfloat16"), (True, "float32", "float32"), (False, "bfloat16", "float32")],
)
def test_bfloat16_is_used_where_the_device_has_it_and_it_is_faster(
    model: keras.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    native: bool, faster: str, dtype: str,
) -> None:  # fmt: skip
    def seconds(model: keras.Model) -> float:
        return 1.0 + bool(model.get_layer("level1_conv").compute_dtype != faster)

    monkeypatch.setattr(segment, "_native_bfloat16", lambda: native)
    monkeypatch.setattr(segment, "_seconds_per_batch", seconds)
    segment.save_model(model, tmp_path / "model.keras")
    loaded = segment.load_model(tmp_path / "model.keras", bfloat16=None)
    assert loaded.get_layer("level1_conv").compute_dtype == dtype


def test_a_batch_is_timed_in_both_precisions(model: keras.Model, tmp_path: Path) -> None:
    segment.save_model(model, tmp_path / "model.keras")
    for bfloat16 in (False, True):
        loaded = segment.load_model(tmp_path / "model.keras", bfloat16=bfloat16)
        assert 0 < segment._seconds_per_batch(loaded) < 60


@pytest.mark.parametrize(
    ("flags", "native"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)]
)
def test_the_flags_of_the_processor_say_whether_it_computes_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, flags: str, native: bool
) -> None:
    monkeypatch.setattr(segment, "describe_device", lambda: "CPU:0")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags : sse2 {flags} fma")
    assert segment._native_bfloat16() == native


def test_an_image_of_pillow_is_taken_as_well(photo: Path, model: keras.Model) -> None:
    expected = segment.segment_image(model, photo)
    with Image.open(photo) as image:
        np.testing.assert_array_equal(segment.segment_image(model, image), expected)
        with pytest.raises(
            segment.SegmentError, match=r"uint8 \(90, 70\): expected uint8 \(height"
        ):
            segment.segment_image(model, image.convert("L"))
