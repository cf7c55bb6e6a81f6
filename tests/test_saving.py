"""Model files: network, optimizer and record in one file, on any backend."""

import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from networks import tiny_network

import segment

ROOT = Path(__file__).parents[1]
SPLIT = ((["x/a.jpg", "x/b.jpg"], ["a", "b"]), (["x/c.jpg"], ["c"]), (["x/d.jpg"], ["d"]))


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return tiny_network((16, 32), num_filters=2)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)


def test_a_loaded_model_predicts_the_same_in_a_new_process(tmp_path: Path) -> None:
    model = small_model()
    segment.save_model(model, tmp_path / "m.keras")
    np.save(tmp_path / "images.npy", images())
    code = (
        "import numpy, segment, sys; folder = sys.argv[1]; model = segment.load_model(folder + "
        "'/m.keras'); numpy.save(folder + '/there.npy', "
        "model.predict(numpy.load(folder + '/images.npy'), verbose=0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    here = model.predict(images(), verbose=0)
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), here)


@pytest.mark.usefixtures("eager")
def test_loss_and_metrics_are_saved_and_loaded(tmp_path: Path) -> None:
    model = small_model()
    segment._compile(model)
    masks = np.random.default_rng(1).integers(0, 2, (3, 16, 32, 1))
    model.train_on_batch(images(), masks)
    segment.save_model(model, tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    scores = loaded.evaluate(images(), masks, return_dict=True, verbose=0)
    assert loaded.loss is segment.dice_cross_entropy_loss
    assert scores == pytest.approx(
        model.evaluate(images(), masks, return_dict=True, verbose=0), abs=1e-6
    )
    assert set(scores) == {"loss", "accuracy", "dice_coefficient"}


def test_the_record_is_saved_and_loaded(tmp_path: Path) -> None:
    model = small_model()
    segment.model_record(model).history = {"loss": [0.5, 0.25]}
    segment.model_record(model).batch_size = 3
    settings: dict[str, Any] = {"threshold": 0.4, "mirror": False, "one_region": False}
    segment.save_model(model, tmp_path / "new" / "m.keras", split=SPLIT, **settings)
    record = segment.model_record(segment.load_model(tmp_path / "new" / "m.keras"))
    split = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    history = {"loss": [0.5, 0.25]}
    assert record == segment.ModelRecord(split=split, history=history, batch_size=3, **settings)
    segment.save_model(segment.load_model(tmp_path / "new" / "m.keras"), tmp_path / "n.keras")
    assert segment.model_record(segment.load_model(tmp_path / "n.keras")) == record


def test_the_test_set_is_found_in_its_order_and_after_images_were_renamed(tmp_path: Path) -> None:
    parts = (["x/b.jpg"], ["b"]), (["x/c.jpg"], ["c"]), (["x/d.jpg", "x/a.jpg"], ["d", "a"])
    segment.save_model(small_model(), tmp_path / "m.keras", split=parts)
    model = segment.load_model(tmp_path / "m.keras")
    images, masks = [[f"y/{name}.png" for name in "abcd"], [f"m/{name}.png" for name in "abcd"]]
    found = segment.stored_test_split(model, images, masks)
    assert found == (["y/d.png", "y/a.png"], ["m/d.png", "m/a.png"])
    assert segment.image_ids_seen(model, images) == ["b", "c"]


def test_a_test_set_that_is_not_in_the_folder_is_refused() -> None:
    model = small_model()
    with pytest.raises(segment.SegmentError, match="names no test set: score every image"):
        segment.stored_test_split(model, ["a.jpg"], ["a.png"])
    segment.model_record(model).split = {"test": ["a", "e"]}
    with pytest.raises(segment.SegmentError, match=r"1 of its 2 test images are .*\(e\)"):
        segment.stored_test_split(model, ["a.jpg"], ["a.png"])


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, fraction: float
) -> None:
    model, path = small_model(), tmp_path / "m.keras"
    segment.save_model(model, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fraction * len(before)), limits[1]))
    try:
        with pytest.raises(segment.SegmentError, match=r"m\.keras: .*\(File too large"):
            segment.save_model(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.keras"]


def test_a_wrong_suffix_a_folder_and_an_invalid_threshold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match=r"m\.h5 does not end in \.keras"):
        segment.save_model(small_model(), tmp_path / "m.h5")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(segment.SegmentError, match=r"folder\.keras is a folder"):
        segment.save_model(small_model(), tmp_path / "folder.keras")
    with pytest.raises(segment.SegmentError, match=r"threshold is 1\.5"):
        segment.save_model(small_model(), tmp_path / "m.keras", threshold=1.5)


def test_a_missing_a_truncated_and_a_foreign_file_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match="there is no such file; give a model file"):
        segment.load_model(tmp_path / "none.keras")
    with pytest.raises(segment.SegmentError, match="is a folder; give a model file"):
        segment.load_model(tmp_path)
    segment.save_model(small_model(), tmp_path / "m.keras")
    content = (tmp_path / "m.keras").read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(segment.SegmentError, match=r"cut\.keras: not a \.keras file, or truncated"):
        segment.load_model(tmp_path / "cut.keras")
    with zipfile.ZipFile(tmp_path / "foreign.keras", "w") as archive:
        archive.writestr("letter.txt", "Dear network")
    with pytest.raises(segment.SegmentError, match=r"foreign\.keras: not a whole, safe"):
        segment.load_model(tmp_path / "foreign.keras")


def test_a_model_file_with_code_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.Lambda(lambda x: x[..., :1], output_shape=(16, 16, 1))(inputs)
    keras.Model(inputs, outputs).save(tmp_path / "code.keras")
    with pytest.raises(segment.SegmentError, match=r"code\.keras: not a whole, safe"):
        segment.load_model(tmp_path / "code.keras")


def test_a_model_that_is_not_for_segmentation_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((16, 16, 3))
    keras.Model(inputs, keras.layers.Flatten()(inputs)).save(tmp_path / "flat.keras")
    with pytest.raises(segment.SegmentError, match=r"\(None, 768\): expected \(None, height"):
        segment.load_model(tmp_path / "flat.keras")


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    small_model().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive:
        archive.writestr("segment.json", json.dumps({"format": 3, "geometry": "letterbox"}))
    with pytest.raises(segment.SegmentError, match="written by another version"):
        segment.load_model(tmp_path / "m.keras")


def test_a_plain_keras_file_gets_a_default_record(tmp_path: Path) -> None:
    small_model().save(tmp_path / "m.keras")
    record = segment.model_record(segment.load_model(tmp_path / "m.keras"))
    assert record == segment.ModelRecord()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", "high"), ("threshold", 7), ("threshold", None), ("split", ["a.jpg"]),
        ("split", {"test": 3}), ("history", {"loss": ["low"]}), ("format", "one"),
        ("threshold", math.nan), ("history", {"loss": [1], "val_dice_coefficient": []}),
        ("history", {"loss": [1], "accuracy": [0, 1]}), ("history", {"accuracy": [1]}),
        ("origin", [1]), ("batch_size", 0), ("batch_size", "many"),
    ],
)  # fmt: skip
def test_a_record_of_invalid_values_is_refused_by_load_model(
    tmp_path: Path, field: str, value: Any
) -> None:
    record = {"format": 2, "geometry": "letterbox", "threshold": 0.5, "split": {}, "history": {}}
    small_model().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive:
        archive.writestr("segment.json", json.dumps({**record, field: value}))
    with pytest.raises(
        segment.SegmentError, match=r"m\.keras.* (not a whole|its segment\.json|written by)"
    ):
        segment.load_model(tmp_path / "m.keras")


@pytest.mark.usefixtures("eager")
def test_a_model_with_a_large_metric_is_saved_and_loaded(tmp_path: Path) -> None:
    model, masks = small_model(), np.random.default_rng(1).integers(0, 2, (3, 16, 32, 1))
    model.compile("sgd", "binary_crossentropy", metrics=[keras.metrics.AUC(2000)])
    model.train_on_batch(images(), masks)
    segment.save_model(model, tmp_path / "m.keras")
    loaded = segment.load_model(tmp_path / "m.keras")
    scores = loaded.evaluate(images(), masks, return_dict=True, verbose=0)
    assert scores == pytest.approx(
        model.evaluate(images(), masks, return_dict=True, verbose=0), abs=1e-6
    )


def test_load_weights_takes_another_frame_but_not_another_network(tmp_path: Path) -> None:
    segment.save_model(small_model(), tmp_path / "m.keras")
    larger = tiny_network((32, 48), num_filters=2)
    segment.load_weights(larger, tmp_path / "m.keras")
    for one, other in zip(larger.get_weights(), small_model().get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(segment.SegmentError, match=r"m\.keras holds another network"):
        segment.load_weights(tiny_network((16, 32), num_filters=3), tmp_path / "m.keras")


def test_only_temporary_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with segment._written_whole(tmp_path / "a.keras") as temporary:
        temporary.write_bytes(b"whole")
    ours, being_written = temporary.parent, tmp_path / ".segment-unfinished-abcd_123"
    users = ".2023-12.csv", ".12-34.keras", ".segment-unfinished-note.txt", "a.keras"
    kept_folder = tmp_path / ".segment-unfinished-of-a-user"
    for folder in (ours, being_written, kept_folder):
        folder.mkdir()
        (folder / "a.keras").write_bytes(b"half")
    for name in users:
        (tmp_path / name).write_bytes(b"half")
    for path in {*tmp_path.iterdir()} - {being_written}:
        os.utime(path, (0, 0))
    segment._remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {being_written.name, kept_folder.name, *users}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_without_the_optimizer_a_file_is_small_and_float32(tmp_path: Path, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = tiny_network((16, 32), num_filters=2)
        segment._compile(model)
        model.optimizer.build(model.trainable_variables)
        segment.save_model(model, tmp_path / "whole.keras", split=SPLIT)
        segment.save_model(model, tmp_path / "bare.keras", optimizer=False)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("level1_conv").compute_dtype == policy.removeprefix("mixed_")
    bare = segment.load_model(tmp_path / "bare.keras")
    assert not bare.compiled
    assert {layer.compute_dtype for layer in bare.layers} == {"float32"}
    assert segment.model_record(bare).split == segment.model_record(model).split
    for kept, weight in zip(bare.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, weight)
    rounding = bare.predict(images(), verbose=0) - model.predict(images(), verbose=0)
    assert np.abs(rounding).mean() < 0.02  # bfloat16 has three digits
    sizes = [(tmp_path / f"{name}.keras").stat().st_size for name in ("whole", "bare")]
    assert sizes[1] < sizes[0]


def test_settings_may_be_numpy_scalars(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    numbers: Any = np.array([0.25, 1, 0.5], np.float32)
    model = tiny_network((16, 16))
    segment.save_model(model, path, threshold=numbers[0], estimate=list(numbers))
    record = segment.model_record(segment.load_model(path))
    assert (record.threshold, record.estimate) == (0.25, [0.25, 1, 0.5])


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    model = small_model()
    record: Any = segment.model_record(model)
    record.batch_size, record.origin = np.int64(70_000), {"options": {"rate": np.float32(0.5)}}
    switches: Any = {"mirror": np.False_, "one_region": 1}
    segment.save_model(model, tmp_path / "m.keras", **switches)
    loaded = segment.model_record(segment.load_model(tmp_path / "m.keras"))
    assert (loaded.batch_size, loaded.origin) == (70_000, {"options": {"rate": 0.5}})
    assert (loaded.mirror, loaded.one_region) == (False, True)


def test_what_would_not_load_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match=r"estimate is \[1, 2\]: expected what fit_est"):
        segment.save_model(small_model(), tmp_path / "m.keras", estimate=[1, 2])
    with pytest.raises(segment.SegmentError, match=r"split has 2 parts: expected \(train, val, t"):
        segment.save_model(small_model(), tmp_path / "m.keras", split=SPLIT[:2])
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_dictionary_of_outputs_is_refused(tmp_path: Path) -> None:
    model = small_model()
    keras.Model(model.input, {"lesion": model.output}).save(tmp_path / "m.keras")
    with pytest.raises(segment.SegmentError, match=r"m\.keras maps .*: expected \(None, height"):
        segment.load_model(tmp_path / "m.keras")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_model_with_a_sequence_of_one_output_is_loaded(tmp_path: Path, kind: type) -> None:
    model = small_model()
    keras.Model([model.input], kind([model.output])).save(tmp_path / "m.keras")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = segment.segment_image(model, image)
    assert 0 < expected.mean() < 1
    loaded = segment.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(segment.segment_image(loaded, image), expected)
