"""One file for network, split, threshold and history, on whichever backend."""

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

import segment

ROOT = Path(__file__).parents[1]
SPLIT = ((["x/a.jpg", "x/b.jpg"], ["a", "b"]), (["x/c.jpg"], ["c"]), (["x/d.jpg"], ["d"]))


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return segment.create_model((16, 32), num_filters=2)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)


def test_a_new_process_predicts_the_same(tmp_path: Path) -> None:
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
def test_loss_and_metric_come_back_by_name(tmp_path: Path) -> None:
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


def test_split_threshold_and_history_travel_in_the_file(tmp_path: Path) -> None:
    model = small_model()
    segment.model_record(model).history = {"loss": [0.5, 0.25]}
    segment.save_model(model, tmp_path / "deep" / "m.keras", split=SPLIT, threshold=0.4)
    record = segment.model_record(segment.load_model(tmp_path / "deep" / "m.keras"))
    assert record.split == {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"], "test": ["d.jpg"]}
    assert record.threshold == 0.4
    assert record.history == {"loss": [0.5, 0.25]}


def test_the_stored_test_set_is_found_again_and_its_order_kept() -> None:
    model = small_model()
    segment.model_record(model).split = {"train": ["b.jpg"], "test": ["d.jpg", "a.jpg"]}
    folder = (["y/a.jpg", "y/b.jpg", "y/d.jpg"], ["m/a.png", "m/b.png", "m/d.png"])
    assert segment.stored_test_split(model, *folder) == (
        ["y/d.jpg", "y/a.jpg"], ["m/d.png", "m/a.png"],
    )  # fmt: skip
    assert segment.image_ids_seen(model, ["z/a.png", "z/b.png"]) == ["b"]


def test_another_folder_is_not_taken_for_the_test_set() -> None:
    model = small_model()
    with pytest.raises(segment.SegmentError, match="names no test set: score every image"):
        segment.stored_test_split(model, ["a.jpg"], ["a.png"])
    segment.model_record(model).split = {"test": ["a.jpg", "e.jpg"]}
    with pytest.raises(segment.SegmentError, match=r"1 of its 2 test images are .*\(e\.jpg\)"):
        segment.stored_test_split(model, ["a.jpg"], ["a.png"])


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, share: float
) -> None:
    model, path = small_model(), tmp_path / "m.keras"
    segment.save_model(model, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        with pytest.raises(segment.SegmentError, match=r"m\.keras: .*\(File too large"):
            segment.save_model(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.keras"]


def test_a_name_without_keras_and_an_odd_threshold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match=r"m\.h5 does not end in \.keras"):
        segment.save_model(small_model(), tmp_path / "m.h5")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(segment.SegmentError, match=r"folder\.keras is a folder"):
        segment.save_model(small_model(), tmp_path / "folder.keras")
    with pytest.raises(segment.SegmentError, match=r"threshold is 1\.5"):
        segment.save_model(small_model(), tmp_path / "m.keras", threshold=1.5)


def test_a_missing_a_cut_and_a_foreign_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(segment.SegmentError, match="there is no such file; give a model file"):
        segment.load_model(tmp_path / "none.keras")
    with pytest.raises(segment.SegmentError, match="is a folder; give a model file"):
        segment.load_model(tmp_path)
    segment.save_model(small_model(), tmp_path / "m.keras")
    content = (tmp_path / "m.keras").read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(segment.SegmentError, match=r"cut\.keras: not a \.keras file, or cut short"):
        segment.load_model(tmp_path / "cut.keras")
    with zipfile.ZipFile(tmp_path / "odd.keras", "w") as archive:
        archive.writestr("letter.txt", "Dear network")
    with pytest.raises(segment.SegmentError, match=r"odd\.keras holds what no model file does"):
        segment.load_model(tmp_path / "odd.keras")


def test_a_model_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.Lambda(lambda x: x[..., :1], output_shape=(16, 16, 1))(inputs)
    keras.Model(inputs, outputs).save(tmp_path / "code.keras")
    with pytest.raises(segment.SegmentError, match=r"code\.keras: not a whole, safe"):
        segment.load_model(tmp_path / "code.keras")


def test_a_model_that_segments_nothing_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((16, 16, 3))
    keras.Model(inputs, keras.layers.Flatten()(inputs)).save(tmp_path / "flat.keras")
    with pytest.raises(segment.SegmentError, match=r"\(None, 768\): expected \(None, height"):
        segment.load_model(tmp_path / "flat.keras")


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    small_model().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive:
        archive.writestr("segment.json", json.dumps({"format": 2, "geometry": "letterbox"}))
    with pytest.raises(segment.SegmentError, match="written by a newer version"):
        segment.load_model(tmp_path / "m.keras")


def test_a_plain_keras_file_gets_an_empty_record(tmp_path: Path) -> None:
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
        ("origin", []), ("origin", {"options": [1]}),
    ],
)  # fmt: skip
def test_a_record_of_odd_types_is_refused_when_it_is_loaded(
    tmp_path: Path, field: str, value: Any
) -> None:
    record = {"format": 1, "geometry": "letterbox", "threshold": 0.5, "split": {}, "history": {}}
    small_model().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive:
        archive.writestr("segment.json", json.dumps({**record, field: value}))
    with pytest.raises(
        segment.SegmentError, match=r"m\.keras: (not a whole|its segment\.json is not)"
    ):
        segment.load_model(tmp_path / "m.keras")


def test_weights_of_another_frame_are_taken_over_and_those_of_another_network_refused(
    tmp_path: Path,
) -> None:
    segment.save_model(small_model(), tmp_path / "m.keras")
    larger = segment.create_model((32, 48), num_filters=2)
    segment.load_weights(larger, tmp_path / "m.keras")
    for one, other in zip(larger.get_weights(), small_model().get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(segment.SegmentError, match=r"m\.keras is of another network"):
        segment.load_weights(segment.create_model((16, 32), num_filters=3), tmp_path / "m.keras")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = (".12-34.keras", ".12-35.png", ".12-36.keras", ".hidden.keras", "a.keras")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        if name != ".12-36.keras":  # which somebody may be writing right now
            os.utime(tmp_path / name, (0, 0))
    segment._remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".12-36.keras", ".hidden.keras", "a.keras"]


def test_without_the_optimizer_the_file_is_small_predicts_the_same_and_is_float32(
    tmp_path: Path,
) -> None:
    model = segment.create_model((16, 32), num_filters=2, bfloat16=True)
    segment._compile(model)
    model.optimizer.build(model.trainable_variables)
    segment.save_model(model, tmp_path / "whole.keras", split=SPLIT)
    segment.save_model(model, tmp_path / "bare.keras", optimizer=False)
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
