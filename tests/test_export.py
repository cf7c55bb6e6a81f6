"""Exported networks: in other runtimes, with what a program needs, and without Keras."""

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import draw_lesion
from networks import tiny_network
from PIL import Image

import segment

onnxruntime = pytest.importorskip("onnxruntime", reason="exporting ONNX needs onnxruntime")
for package in ("onnx", "tf2onnx"):
    pytest.importorskip(package, reason=f"exporting ONNX needs {package}")
if keras.backend.backend() != "tensorflow":
    pytest.skip("only TensorFlow exports", allow_module_level=True)

import run_onnx  # noqa: E402, after the check for onnxruntime

SIZE = (32, 48)
FORMATS = ("m.onnx", "m.tflite", "saved")


@pytest.fixture
def model() -> keras.Model:
    """A network in which every weight matters, the scales and offsets of the norms included."""
    network, rng = tiny_network(SIZE, num_filters=4), np.random.default_rng(0)
    network.set_weights([rng.normal(0, 2, weight.shape) for weight in network.get_weights()])
    return network


def images() -> np.ndarray:
    """Nine images, the first of hardly any contrast, where the epsilon of the norms counts."""
    contrast = np.linspace(2, 128, 9).reshape(9, 1, 1, 1)
    noise = np.random.default_rng(0).uniform(-1, 1, (9, *SIZE, 3))
    return (128 + contrast * noise).astype(np.uint8)


def runtime(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The exported file in its runtime."""
    tensorflow = sys.modules["tensorflow"]
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return lambda batch: np.asarray(session.run(None, {"image": batch})[0])
    if path.suffix == ".tflite":
        runner = tensorflow.lite.Interpreter(str(path)).get_signature_runner("serving_default")
        return lambda batch: np.asarray(*runner(image=batch).values())
    loaded = tensorflow.saved_model.load(path)
    return lambda batch: np.asarray(loaded.serve(batch))


def segment_json(path: Path) -> dict[str, Any]:
    """What an exported file says about its use."""
    if path.suffix == ".onnx":
        text = (
            onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["segment.json"]
        )
    elif path.suffix == ".tflite":
        text = zipfile.ZipFile(path).read("segment.json")
    else:
        text = (path / "segment.json").read_text()
    return dict(json.loads(text))


def flip_mean(model: keras.Model, batch: np.ndarray) -> np.ndarray:
    views = [np.flip(model(np.flip(batch, axes)), axes) for axes in ((), 1, 2, (1, 2))]
    return np.asarray(np.mean(views, axis=0))


@pytest.mark.filterwarnings("ignore::UserWarning")  # tf.lite is to move to another package
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_file_gives_the_probabilities_of_the_model_in_any_batch(
    model: keras.Model, tmp_path: Path, name: str, mirror: bool
) -> None:
    segment.export_model(model, tmp_path / name, mirror=mirror)
    expected = flip_mean(model, images()) if mirror else np.asarray(model(images()))
    assert expected.std() > 0.1
    run = runtime(tmp_path / name)
    for count in (1, 3, 8, 9):
        probabilities = run(images()[:count])
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # tf.lite is to move to another package
@pytest.mark.parametrize("name", FORMATS)
def test_the_average_of_several_models_is_exported(
    model: keras.Model, tmp_path: Path, name: str
) -> None:
    average = segment.average_models([model, tiny_network(SIZE)])
    segment.export_model(average, tmp_path / name)
    run = runtime(tmp_path / name)
    np.testing.assert_allclose(run(images()), np.asarray(average(images())), atol=1e-5)
    assert not segment_json(tmp_path / name)["mirror"]


def test_a_bfloat16_model_is_exported_in_float32(model: keras.Model, tmp_path: Path) -> None:
    segment.export_model(segment._recast(model, "mixed_bfloat16"), tmp_path / "m.onnx")
    run = runtime(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(images()), np.asarray(model(images())), atol=1e-5)


def test_norms_of_other_groups_are_exported_as_well(tmp_path: Path) -> None:
    image = keras.Input((*SIZE, 3))
    x = keras.layers.GroupNormalization(groups=2)(keras.layers.Conv2D(4, 3, padding="same")(image))
    model = keras.Model(image, keras.layers.Conv2D(1, 1, activation="sigmoid")(x))
    segment.export_model(model, tmp_path / "m.onnx")
    run = runtime(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(images()), np.asarray(model(images())), atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_file_says_how_to_use_it(model: keras.Model, tmp_path: Path, name: str) -> None:
    record = segment.model_record(model)
    record.threshold, record.mirror, record.one_region = 0.4, False, False
    record.split, record.origin = {"train": ["a", "b"]}, {"data": "drawn (CC-0)"}
    segment.export_model(model, tmp_path / name, mirror=True)
    facts = segment_json(tmp_path / name)
    expected = {
        "height": 32, "width": 48, "threshold": 0.4, "mirror": False, "one_region": False,
        "mirror_built_in": True, "geometry": "letterbox", "resampling": "bilinear", "format": 2,
        "input": "uint8 RGB in 0..255", "origin": {"data": "drawn (CC-0)"}, "split": {},
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert f"Keras {keras.__version__}" in facts["exporter"]
    assert record.split == {"train": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "factor"), [("m.onnx", 0.9), ("m.onnx", np.nan), ("m.tflite", 0.9), ("saved", 0.9)]
)
def test_a_wrong_export_is_refused_and_leaves_an_old_file(
    model: keras.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
) -> None:
    @contextlib.contextmanager
    def spoiled(network: keras.Model, moments: bool = False) -> Iterator[None]:
        if moments:
            network.set_weights([weight * factor for weight in network.get_weights()])
        yield

    if name != "saved":
        (tmp_path / name).write_bytes(b"old")
    before = os.listdir(tmp_path)
    monkeypatch.setattr(segment, "_fused_norms", spoiled)
    with pytest.raises(
        segment.SegmentError, match=rf"{name}: not written, as it differs from the model"
    ):
        segment.export_model(model, tmp_path / name)
    assert os.listdir(tmp_path) == before
    assert name == "saved" or (tmp_path / name).read_bytes() == b"old"


def test_a_missing_package_is_named_before_the_work_with_the_command_that_installs_it(
    model: keras.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    command = "needs onnxruntime: run pip install onnx onnxruntime tf2onnx"
    with pytest.raises(segment.SegmentError, match=command):
        segment.export_model(model, tmp_path / "m.onnx")
    segment.export_model(model, tmp_path / "saved")


def test_other_suffixes_backends_and_folders_are_refused(
    model: keras.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(segment.SegmentError, match=r"m\.pb: expected \.onnx, \.tflite or no"):
        segment.export_model(model, tmp_path / "m.pb")
    (tmp_path / "saved").mkdir()
    with pytest.raises(segment.SegmentError, match=r"saved is a folder: .* or a new one"):
        segment.export_model(model, tmp_path / "saved")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(segment.SegmentError, match=r"exported by jax: .* KERAS_BACKEND=tensorflow"):
        segment.export_model(model, tmp_path / "m.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Photos of several kinds and sizes, some on their side, some rounded to even in the frame."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(300, 400), (90, 61), (33, 96), (500, 340), (47, 120)]):
        image = draw_lesion(size, i)[0]
        exif = image.getexif()
        exif[0x0112] = 6 if i in (1, 3) else 1
        image.save(folder / f"isic_{i:07}.jpg", exif=exif, quality=95)
    draw_lesion((410, 550), 5)[0].save(folder / "Lesion 5.png")
    return segment.find_images(folder)


def test_the_runner_loads_images_and_restores_masks_as_segment_does(photos: list[str]) -> None:
    generator = segment.create_generator(photos, image_size=SIZE)
    coarse = np.random.default_rng(0).uniform(size=(len(photos), 9, 9, 1))
    predictions = np.array(keras.ops.image.resize(coarse, SIZE)).view(segment.Predictions)
    predictions[0] = 0.1
    predictions[0, 2:20, 5:40], predictions[0, 24:30, 20:40] = 0.51, 0.9  # the small one is clearer
    for threshold, one_region in ((0.5, True), (0.3, True), (0.99, True), (0.5, False)):
        predictions.threshold, predictions.one_region = threshold, one_region
        facts = {"threshold": threshold, "one_region": one_region}
        masks = segment.restore_masks(generator, predictions)
        for path, lesion, mask in zip(photos, predictions, masks, strict=True):
            image, size = run_onnx.load(path, SIZE)
            np.testing.assert_array_equal(image, segment.load_input_image(path, SIZE))
            ours = run_onnx.restore(np.asarray(lesion)[..., 0], size, facts)
            np.testing.assert_array_equal(ours, mask)
        assert (threshold == 0.99) != mask.any()


@pytest.mark.parametrize("built_in", [False, True])
def test_the_runner_segments_as_segment_does_without_keras(
    model: keras.Model, photos: list[str], tmp_path: Path, built_in: bool
) -> None:
    generator = segment.create_generator(photos, image_size=SIZE)
    median = np.median(segment.predict(model, generator, mirror=True, verbose=0))
    segment.model_record(model).threshold = float(median)
    segment.export_model(model, tmp_path / "m.onnx", mirror=built_in)
    code = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'keras', 'tensorflow', 'segment', 'scipy'} & {*sys.modules}"
    )
    runner = Path(__file__).with_name("run_onnx.py")
    (tmp_path / "out").mkdir()
    options = [str(tmp_path / "m.onnx"), str(tmp_path / "out"), *photos]
    subprocess.run([sys.executable, "-c", code, runner, *options], check=True)
    names = ["Lesion 5", *(f"ISIC_{i:07}" for i in range(5))]
    lesions = segment.predict(model, generator, verbose=0)
    assert 0.1 < np.mean(lesions >= median) < 0.9
    for name, mask in zip(names, segment.restore_masks(generator, lesions), strict=True):
        ours = np.asarray(Image.open(tmp_path / "out" / f"{name}_segmentation.png"))
        assert (ours != mask * np.uint8(255)).mean() < 1e-3  # by the rounding of probabilities
