"""Both drivers: in process, and once from the command line."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import MakePairs
from networks import tiny_network
from PIL import Image

import driver_load_evaluate
import driver_train_save_evaluate
import segment

ROOT = Path(__file__).parents[1]

Run = Callable[..., int]


@pytest.fixture
def train(
    make_pairs: MakePairs, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the train driver for an epoch on 12 small pairs and a tiny network."""
    make_pairs(12)
    monkeypatch.setattr(segment, "create_model", tiny_network)

    def run(*options: str) -> int:
        return driver_train_save_evaluate.main(
            [*data(tmp_path), "--image-size", "32", "32", "--epochs", "1", "--test-split", "0.25",
             "--output", str(tmp_path / "trained"), "--num-imgs", "0", *options]
        )  # fmt: skip

    return run


@pytest.fixture
def saved(make_pairs: MakePairs, tmp_path: Path) -> Path:
    """A model file as the train driver saves it, with 9 of 12 pairs to train and validate."""
    split = segment.train_val_test_split(*make_pairs(12), test_split=0.25)
    path = tmp_path / "trained" / "model.keras"
    segment.save_model(tiny_network((32, 32)), path, split=split)
    return path


@pytest.fixture
def load(tmp_path: Path, eager: None) -> Run:
    """Runs the load driver on the model of `train` or `saved`, with further options."""

    def run(*options: str) -> int:
        model, output = tmp_path / "trained" / "model.keras", tmp_path / "loaded"
        return driver_load_evaluate.main(
            [str(model), *data(tmp_path), "--output", str(output), "--num-imgs", "0", *options]
        )

    return run


def data(folder: Path, name: str = "data") -> list[str]:
    images, masks = folder / name / "images", folder / name / "masks"
    return ["--image-dir", str(images), "--mask-dir", str(masks)]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_load_driver_repeats_every_score_of_the_train_driver(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    trained = capsys.readouterr().out
    assert load() == 0
    loaded = capsys.readouterr().out
    scores = rows(tmp_path / "trained")
    assert len(scores) == 3
    assert rows(tmp_path / "loaded") == scores
    table = trained[trained.index("3 images, each") : trained.index("Scores, figures")]
    assert table in loaded
    assert "Evaluating the 3 test images held out in training" in loaded


def test_test_images_are_not_used_in_training(train: Run, tmp_path: Path) -> None:
    train()
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    split = segment.model_record(model).split
    tested = {row["id"] for row in rows(tmp_path / "trained")}
    seen = {*split["train"], *split["val"]}
    assert len(tested) + len(seen) == 12
    assert not tested & seen


def test_the_documented_files_are_written_and_hidden_files_are_kept(
    train: Run, tmp_path: Path
) -> None:
    users = {".2023-12.csv", ".12-34.keras"}
    killed = tmp_path / "trained" / ".segment-unfinished-abcd_123"
    killed.mkdir(parents=True)
    for path in (killed / "model.keras", *(tmp_path / "trained" / name for name in users)):
        path.write_text("half")
        os.utime(path, (0, 0))
    os.utime(killed, (0, 0))
    train("--inspect", "--num-imgs", "4")
    assert set(os.listdir(tmp_path / "trained")) == users | {
        "image_sizes.png", "model.keras", "training.csv", "scores.csv", "summary.json", "masks",
        "predictions.png", "worst.png", "histogram.png", "training.png", "last.keras",
        "findings.csv", "report.html",
    }  # fmt: skip


def test_resume_continues_a_training_that_was_killed(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segment, "choose_threshold", None)  # fails after training
    with pytest.raises(TypeError):
        train()
    monkeypatch.setattr(segment, "choose_threshold", lambda *_: 0.5)
    capsys.readouterr()
    assert train("--resume", "--epochs", "3") == 0
    message = "last.keras belongs to a training of 1 epochs, not 3: the learning rate now falls"
    assert message in capsys.readouterr().err
    lines = (tmp_path / "trained" / "training.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1", "2"]
    record = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras"))
    assert record.origin["options"]["epochs"] == 3
    assert train() == 0
    assert len((tmp_path / "trained" / "training.csv").read_text().splitlines()) == 2


STEPS = (
    "find_image_pairs", "usable_pairs", "inspect", "plot_image_sizes", "find_same_lesions",
    "train_val_test_split", "create_generator", "create_model", "train_model", "choose_threshold",
    "save_model", "load_model", "predict", "predict_each", "results",
)  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The documented functions in the order in which the drivers call them."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        function = getattr(segment, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_filename != segment.__file__:
                called.append(name)
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(segment, name, spy(name))
    return called


def test_the_drivers_take_the_documented_steps_in_order(
    train: Run, load: Run, steps: list[str]
) -> None:
    train("--inspect")
    assert steps == [
        "find_image_pairs", "usable_pairs", "inspect", "plot_image_sizes", "find_same_lesions",
        "train_val_test_split", *["create_generator"] * 3, "create_model", "train_model",
        "predict", "choose_threshold", "save_model", "predict_each", "create_generator", "results",
    ]  # fmt: skip
    steps.clear()
    load("--inspect")
    assert steps == [
        "find_image_pairs", "inspect", "plot_image_sizes", "load_model", "usable_pairs",
        "create_generator", "predict_each", "results",
    ]  # fmt: skip


def test_only_training_images_are_shuffled_and_augmented(
    train: Run, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create, made = segment.create_generator, []

    def spy(*args: Any, **kwargs: Any) -> segment.ImageGenerator:
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(segment, "create_generator", spy)
    train("--seed", "7")
    assert [(g.shuffle, g.augment) for g in made] == [(True, True), *[(False, False)] * 3]
    assert [len(g.image_paths) for g in made] == [8, 1, 3, 3]
    assert made[0].seed == 7
    assert not {"inspect", "plot_image_sizes", "find_same_lesions"} & set(steps)  # no --inspect


def test_another_folder_is_scored_only_with_all(
    saved: Path, load: Run, make_pairs: MakePairs, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images, masks = make_pairs(4, folder="other")
    for paths in (images, masks):
        for path in map(Path, paths):
            path.rename(path.with_name(path.name.replace("ISIC_", "other_")))
    assert load(*data(tmp_path, "other")) == 2
    assert "3 of its 3 test images are not among the 4 images" in capsys.readouterr().err
    assert load(*data(tmp_path, "other"), "--all") == 0
    assert "Warning" not in capsys.readouterr().err
    assert [row["id"] for row in rows(tmp_path / "loaded")] == [f"other_{i:07}" for i in range(4)]


def test_scoring_training_images_is_a_warning(
    saved: Path, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("--all") == 0
    assert "Warning: 9 of these images were used in training" in capsys.readouterr().err
    summary = json.loads((tmp_path / "loaded" / "summary.json").read_text())
    assert (summary["images"], summary["images_used_in_training"]) == (12, 9)


def test_a_subset_takes_the_first_pairs(train: Run, tmp_path: Path) -> None:
    train("--subset", "8")
    split = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras")).split
    names = sorted(name for part in split.values() for name in part)
    assert names == [f"ISIC_{i:07}" for i in range(8)]


def test_unusable_data_is_reported_with_status_2(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load() == 2
    assert "model.keras: there is no such file; give a model file" in capsys.readouterr().err
    (tmp_path / "data" / "images" / "ISIC_0000003.png").unlink()
    assert train() == 2
    assert "masks without an image (1: ISIC_0000003)" in capsys.readouterr().err
    (tmp_path / "data" / "masks" / "ISIC_0000003_segmentation.png").unlink()


def test_unusable_files_are_listed_together_or_left_out_with_skip_bad(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "images" / "ISIC_0000002.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "data" / "masks" / "ISIC_0000005_segmentation.png")
    assert train() == 2
    printed = capsys.readouterr().err
    assert "ISIC_0000002.png: cannot be read as an image" in printed
    assert "ISIC_0000005.png is 40 × 56" in printed
    assert "Error: 2 of 12 images cannot be used: fix the files, or leave them out" in printed
    assert train("--skip-bad") == 0
    assert "Warning: left out: unusable files: 2 files, first " in capsys.readouterr().err
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert [Path(path).stem for path in summary["left_out"]] == ["ISIC_0000002", "ISIC_0000005"]
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    assert sum(map(len, segment.model_record(model).split.values())) == 10


def test_unusable_images_are_left_out_of_the_test_set_and_without_masks(
    saved: Path, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = segment.model_record(segment.load_model(saved)).split["test"][0]
    (tmp_path / "data" / "images" / f"{bad}.png").write_bytes(b"no image")
    assert load("--skip-bad") == 0
    assert len(rows(tmp_path / "loaded")) == 2
    only = [str(saved), *data(tmp_path)[:2], "--all", "--output", str(tmp_path / "only")]
    assert driver_load_evaluate.main(only) == 2
    assert "Error: 1 of 12 images cannot be used" in capsys.readouterr().err
    assert driver_load_evaluate.main([*only, "--skip-bad"]) == 0
    assert len(rows(tmp_path / "only")) == 11
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"no image")
    assert driver_load_evaluate.main([*only, "--skip-bad"]) == 2
    assert "Error: None of the images can be used" in capsys.readouterr().err


def test_resume_refuses_other_options_and_keeps_the_checkpoint(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume") == 0
    assert "There is no checkpoint in" in capsys.readouterr().out
    last = tmp_path / "trained" / "last.keras"
    before = last.read_bytes()
    changes = ("--batch-size", "3", "--dropout", "0.1", "--learning-rate", "0.5")
    assert train("--resume", *changes) == 2
    message = "last.keras belongs to a training with another batch_size, dropout, learning_rate:"
    assert message in capsys.readouterr().err
    assert train("--resume", "--soft-masks") == 2
    assert "last.keras belongs to a training with another soft_masks:" in capsys.readouterr().err
    assert last.read_bytes() == before


def test_resume_refuses_another_seed_and_other_files(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    capsys.readouterr()
    assert train("--resume", "--seed", "1") == 2
    assert "a training with another seed, split:" in capsys.readouterr().err
    for folder in ("masks", "images"):  # the same pixels in another file
        path = sorted((tmp_path / "data" / folder).iterdir())[0]
        Image.open(path).save(path, compress_level=0)
        assert train("--resume") == 2
        named = {"masks": "sha256_of_masks", "images": "sha256_of_images, sha256_of_masks"}
        assert f"a training with another {named[folder]}:" in capsys.readouterr().err


def test_start_from_refuses_another_network(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segment.save_model(tiny_network((32, 32), num_filters=3), tmp_path / "m.keras")
    assert train("--start-from", str(tmp_path / "m.keras")) == 2
    assert "m.keras holds another network" in capsys.readouterr().err


def test_an_unknown_backend_is_reported_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "driver_load_evaluate.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "KERAS_BACKEND": "none"},
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "run pip install -r requirements.txt, and check KERAS_BACKEND" in done.stderr


@pytest.mark.parametrize("option", ["--output", "--save"])
def test_what_cannot_be_written_is_reported_before_the_files_are_decoded(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(segment, "check_pairs", None)
    (tmp_path / "file").write_text("in the way")
    assert train(option, str(tmp_path / "file" / "model.keras")) == 2
    assert "cannot be written (" in capsys.readouterr().err


class ExhaustedError(Exception):
    """As the error of TensorFlow, which has no arguments."""

    def __str__(self) -> str:
        return "OOM when allocating tensor"


@pytest.mark.parametrize("error", [
    MemoryError(), ExhaustedError(),
    RuntimeError("CUDA out of memory."),
])  # fmt: skip
def test_too_little_memory_is_reported_in_one_sentence(
    train: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(segment, "train_model", fail)
    assert train() == 2
    assert "Error: out of memory: choose a smaller --batch-size" in capsys.readouterr().err
    error = RuntimeError("no ROOM for another cause")
    with pytest.raises(RuntimeError, match="another cause"):
        train()


def test_images_that_the_starting_model_was_trained_on_are_told(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    images, masks = segment.find_image_pairs(data / "images", data / "masks")
    first = tmp_path / "first.keras"
    split = segment.train_val_test_split(images, masks, val_split=0.5, test_split=0)
    segment.save_model(tiny_network((32, 32)), first, split=split)
    assert train("--start-from", str(first)) == 0
    message = "first.keras was trained on 3 of the test images (ISIC_00"
    assert message in capsys.readouterr().err
    assert load() == 0
    assert "Warning: 3 of these images were used in training" in capsys.readouterr().err
    for output in ("trained", "loaded"):
        summary = json.loads((tmp_path / output / "summary.json").read_text())
        assert (summary["images"], summary["images_used_in_training"]) == (3, 3)
    record = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras"))
    assert len(record.split["earlier"]) == 3  # what is not among those of the new training
    assert train("--resume", "--epochs", "2") == 0  # without naming the first model again


def test_an_output_that_is_not_a_folder_is_reported_with_status_2(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train("--output", str(tmp_path / "file")) == 2
    assert re.search(r"Error: \S+: cannot be written \((File|Not a)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-dir", "x"], "--image-dir and --mask-dir belong together"),
        (["--mask-dir", "x"], "--image-dir and --mask-dir belong together"),
        (["--seed", "-1"], "--seed: -1 is not a whole number from 0"),
        (["--epochs", "0"], "--epochs: 0 is not a whole number from 1"),
        (["--batch-size", "0"], "--batch-size: 0 is not a whole number from 1"),
        (["--subset", "some"], "--subset: some is not a whole number from 1"),
        (["--image-size", "256"], "expected 2 arguments"),
        (["--image-size", "30", "32"], "--image-size [30, 32]: expected sides divisible by 16"),
        (["--test-split", "1.5"], "--test-split: 1.5 is not in [0, 1)"),
        (["--val-split", "nan"], "--val-split: nan is not in [0, 1)"),
        (["--dropout", "1"], "--dropout: 1 is not in [0, 1)"),
        (["--folds", "1"], "--folds: 1 is not a whole number from 2"),
        (["--learning-rate", "0"], "--learning-rate 0.0: expected a number above 0"),
    ],
)
def test_invalid_options_are_reported_with_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        driver_train_save_evaluate.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_keeps_the_best_epoch_and_ends_with_130(
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_epoch_end = segment._BestCheckpoint.on_epoch_end

    def interrupt(self: Any, epoch: int, logs: Any = None) -> None:
        on_epoch_end(self, epoch, logs)
        raise KeyboardInterrupt

    monkeypatch.setattr(segment._BestCheckpoint, "on_epoch_end", interrupt)
    assert train("--epochs", "9") == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    assert len(segment.model_record(model).history["loss"]) == 1


def test_ctrl_c_before_the_first_epoch_keeps_an_earlier_model(
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "trained" / "model.keras"
    segment.save_model(tiny_network((16, 16)), model)
    before = model.read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segment, "save_model", interrupt)
    assert train() == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (OSError("broken"), "broken"),
        (PermissionError(13, "Denied", "a.png"), "[Errno 13] Denied: 'a.png'"),
        (segment.SegmentError("a.png: no mask."), "a.png: no mask."),
    ],
)
def test_run_driver_reports_an_error_as_it_is(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(_: Any) -> None:
        raise error

    assert segment.run_driver(steps, None) == 2
    assert capsys.readouterr().err == f"Error: {message}\n"


def test_run_driver_reports_warnings_and_restores_their_display(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = warnings.showwarning
    assert segment.run_driver(warnings.warn, "a.png: the mask is empty.") == 0
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "Warning: a.png: the mask is empty.\n"


def test_ctrl_c_and_a_missing_package_at_the_start_are_reported(
    load: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segment, "describe_device", interrupt)
    assert load() == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
    monkeypatch.setitem(sys.modules, "segment", None)
    assert load() == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err


def test_without_validation_and_test_set_all_pairs_are_trained_on(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--val-split", "0", "--test-split", "0") == 0
    printed = capsys.readouterr().out
    assert "12 to train, 0 to validate, 0 to test on" in printed
    assert "No image was held out (--test-split 0): there is nothing to score" in printed
    split = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras")).split
    assert [len(split[part]) for part in ("train", "val", "test")] == [12, 0, 0]
    assert not (tmp_path / "trained" / "scores.csv").exists()


def test_the_pretrained_model_segments_images_without_masks(
    saved: Path, make_pairs: MakePairs, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "PRETRAINED", saved)
    make_pairs(3, folder="other")
    options = [*data(tmp_path, "other"), "--output", str(tmp_path / "out")]
    assert driver_load_evaluate.main(options[:2] + options[4:]) == 0
    assert [list(row) for row in rows(tmp_path / "out")] == [["id", "estimated_dice"]] * 3
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 3
    assert driver_load_evaluate.main(options) == 0  # with masks it scores every image
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"ISIC_{i:07}" for i in range(3)]
    assert "dice" in rows(tmp_path / "out")[0]


def test_a_model_without_masks_asks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver_load_evaluate.main(["a.keras", "--image-dir", "x"])
    assert "add --all to segment them" in capsys.readouterr().err


def test_threshold_and_estimate_are_fitted_to_the_validation_images(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = []

    def choose(generator: segment.ImageGenerator, predictions: segment.Predictions) -> float:
        choices.append((len(generator.image_paths), len(predictions), predictions.one_region))
        return 0.35

    def fit(generator: segment.ImageGenerator, predictions: segment.Predictions) -> list[float]:
        choices.append((len(generator.image_paths), len(predictions), predictions.threshold))
        return [0.1, 0.9, 0.5]

    monkeypatch.setattr(segment, "choose_threshold", choose)
    monkeypatch.setattr(segment, "fit_estimate", fit)
    train("--no-one-region", "--no-optimizer")
    assert choices == [(1, 1, False), (1, 1, 0.35)]
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    record = segment.model_record(model)
    assert (record.threshold, record.mirror, record.one_region) == (0.35, True, False)
    assert record.estimate == [0.1, 0.9, 0.5]
    assert "dice_lower_bound" in rows(tmp_path / "trained")[0]
    assert not model.compiled
    assert json.loads((tmp_path / "trained" / "summary.json").read_text())["threshold"] == 0.35


def test_start_from_takes_the_weights_of_another_frame(train: Run, tmp_path: Path) -> None:
    first, then = tmp_path / "a.keras", tmp_path / "b.keras"
    segment.save_model(tiny_network((16, 16)), first)
    again = ["--image-size", "48", "32", "--start-from", str(first), "--bfloat16"]
    again += ["--cache", str(tmp_path / "cache")]
    assert train(*again, "--learning-rate", "1e-9", "--save", str(then)) == 0
    one, two = map(segment.load_model, (first, then))
    assert two.get_layer("level1_conv").compute_dtype == "bfloat16"
    assert two.input_shape == (None, 48, 32, 3)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2 * 12  # in two frames


def test_the_same_seed_gives_the_same_model_and_the_record_names_its_origin(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []  # in place of the switch, which would slow all later tests
    experimental = sys.modules["tensorflow"].config.experimental
    monkeypatch.setattr(experimental, "enable_op_determinism", lambda: asked.append(True))
    weights, scores = [], []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.keras"
        assert train("--deterministic", "--seed", "3", "--epochs", "2", "--save", str(path)) == 0
        model = segment.load_model(path)
        weights.append(np.concatenate([weight.ravel() for weight in model.get_weights()]))
        scores.append(rows(tmp_path / "trained"))
    assert asked == [True, True]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert scores[0] == scores[1]
    origin = segment.model_record(model).origin
    assert origin["options"]["seed"] == 3
    images = sorted((tmp_path / "data" / "images").iterdir())
    content = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in images)
    assert origin["sha256_of_images"] == hashlib.sha256(content).hexdigest()


def test_the_load_driver_predicts_as_the_train_driver_did(
    train: Run, load: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, threshold = keras.Model.predict_on_batch, segment._make_mask
    batches: list[int] = []
    one_region: set[bool] = set()

    def spy_predict(model: keras.Model, images: Any) -> Any:
        batches.append(len(images))
        return predict(model, images)

    def spy_threshold(prediction: segment.Predictions, *sizes: Any) -> Any:
        one_region.add(prediction.one_region)
        return threshold(prediction, *sizes)

    monkeypatch.setattr(keras.Model, "predict_on_batch", spy_predict)
    monkeypatch.setattr(segment, "_make_mask", spy_threshold)
    train("--no-mirror", "--no-one-region", "--batch-size", "3", "--val-split", "0.3")
    assert (batches, one_region) == ([2, 3], {False})
    load()
    assert (batches, one_region) == ([2, 3, 3], {False})
    load("--mirror", "--batch-size", "2", "--one-region")  # four flips of two images
    assert (batches, one_region) == ([2, 3, 3, 8, 8], {False, True})


Decoded = list[tuple[str, Any]]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """The id and the frames of every image that is decoded."""
    decode, calls = segment._decode, []

    def spy(path: segment.StrPath, sizes: Any, *, mask: bool, **options: Any) -> Any:
        calls.extend([(segment.image_id(path), list(sizes))] * (not mask))
        return decode(path, sizes, mask=mask, **options)

    monkeypatch.setattr(segment, "_decode", spy)
    return calls


def test_the_train_driver_decodes_each_image_once(
    train: Run, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = segment.results
    before: list[str] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        before.extend(id_ for id_, _ in decoded)
        return results(*args, **kwargs)

    monkeypatch.setattr(segment, "results", spy)
    assert train("--inspect", "--epochs", "2", "--num-imgs", "0") == 0
    assert sorted(before) == [f"ISIC_{i:07}" for i in range(12)]
    assert len(decoded) == 12


def test_the_load_driver_decodes_each_image_once_and_again_for_an_overlay(
    saved: Path, load: Run, tmp_path: Path, decoded: Decoded
) -> None:
    assert load("--all", "--inspect", "--num-imgs", "0") == 0
    ids = [f"ISIC_{i:07}" for i in range(12)]
    assert sorted(id_ for id_, sizes in decoded if None not in sizes) == ids
    assert len(decoded) == 12
    decoded.clear()
    alone = [str(saved), "--all", *data(tmp_path)[:2], "--output", str(tmp_path / "alone")]
    assert driver_load_evaluate.main([*alone, "--num-imgs", "0"]) == 0
    assert sorted(id_ for id_, sizes in decoded if sizes == [(32, 32)]) == ids
    assert sorted(id_ for id_, sizes in decoded if sizes == [None]) == ids
    assert len(decoded) == 24


def test_both_drivers_take_a_threshold(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--threshold", "0.6") == 0
    summaries = [tmp_path / folder / "summary.json" for folder in ("trained", "loaded")]
    assert load() == 0
    assert [json.loads(path.read_text())["threshold"] for path in summaries] == [0.6, 0.6]
    assert load("--threshold", "0.01") == 0
    assert json.loads(summaries[1].read_text())["sensitivity"]["min"] == 1
    with pytest.raises(SystemExit):
        load("--threshold", "1.5")
    assert "--threshold 1.5: expected a probability" in capsys.readouterr().err


def test_two_runs_are_compared_and_subgroups_scored(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "people.csv"
    sexes = [f"ISIC_{i:07},{'male' if i % 2 else 'female'}" for i in range(12)]
    table.write_text("\n".join(["image_id,sex", *sexes]))
    assert train("--metadata", str(table)) == 0
    assert load("--compare", str(tmp_path / "trained" / "scores.csv")) == 0
    assert "Compared with" in capsys.readouterr().out
    trained, loaded = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("trained", "loaded")
    )
    comparison = loaded["comparison"]
    assert [comparison[name] for name in ("images", "wins", "ties", "losses")] == [3, 0, 3, 0]
    groups = [row for row in trained["subgroups"] if row["property"] == "sex"]
    counts = {row["group"]: row["images"] for row in groups}
    odd = sum(int(row["id"][-1]) % 2 for row in rows(tmp_path / "trained"))
    assert counts == {name: n for name, n in (("female", 3 - odd), ("male", odd)) if n}


@pytest.mark.parametrize("option", ["--compare", "--metadata"])
def test_a_missing_table_is_reported_before_the_training(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert train(option, "nowhere.csv") == 2
    assert "nowhere.csv: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--compare", "scores none of these 3 images"), ("--metadata", "no column holds the id")],
)
def test_a_table_of_other_images_is_reported_before_the_training(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("id,dice\nISIC_0000099,0.5\n")
    assert train(option, str(table)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "trained" / "model.keras").exists()


def test_the_sample_folder_gets_the_defaults_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sample = ["--image-dir", "images/sample/input", "--mask-dir", "images/sample/truth"]
    parse = driver_train_save_evaluate.parse_options
    for options in (parse([]), parse(sample)):
        assert (options.epochs, options.batch_size, options.image_size) == (20, 4, (128, 128))
    elsewhere = parse(["--image-dir", "tests", "--mask-dir", "tests"])
    assert (elsewhere.epochs, elsewhere.batch_size, elsewhere.image_size) == (60, 8, (96, 128))


def test_help_is_printed_without_starting_tensorflow() -> None:
    for driver in ("driver_train_save_evaluate", "driver_load_evaluate"):
        code = f"import sys, {driver} as d\ntry: d.main(['--help'])\nfinally: print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "--image-dir DIR" in done.stdout
        assert "keras" not in done.stdout.split("\n")[-2].split()


def test_both_drivers_run_from_the_command_line(make_pairs: MakePairs, tmp_path: Path) -> None:
    make_pairs(12)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *command, *data(tmp_path), "--output", str(tmp_path / "皮膚")]
        environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        environment["PYTHONIOENCODING"] = "ascii:strict"  # a terminal that cannot print 皮膚
        environment["MPLBACKEND"] = "module://of_a_notebook"  # which is not installed
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
        # On some processors TensorFlow reports that oneDNN lacks an operation.
        done.stderr = re.sub(r"E0000 .* oneDNN supports .*\n", "", done.stderr)
        return done

    size = ("--image-size", "32", "32", "--epochs", "1")
    trained = run("driver_train_save_evaluate.py", *size)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    first, *_ = trained.stdout.splitlines()
    assert first.startswith("Device: ")
    loaded = run("driver_load_evaluate.py", str(tmp_path / "皮膚" / "model.keras"))
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert trained.stdout.split("images, each")[1] == loaded.stdout.split("images, each")[1]


def test_resume_refuses_another_frame_and_names_the_missing_best_epoch(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    assert train("--resume", "--image-size", "32", "48") == 2
    assert "belongs to a training with another image_size:" in capsys.readouterr().err
    assert train("--resume", "--save", str(tmp_path / "new.keras")) == 2
    assert "new.keras does not hold the best epoch of the training in" in capsys.readouterr().err


@pytest.mark.parametrize("driver", [driver_load_evaluate, driver_train_save_evaluate])
def test_no_folder_for_temporary_files_is_reported(
    driver: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert driver.main([]) == 2
    assert re.search("No usable temporary .* TMPDIR", capsys.readouterr().err)


def test_paths_that_the_system_refuses_are_reported(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    loop, long = str(tmp_path / "loop"), f"{'x' * 300}.keras"
    assert train("--image-dir", loop) == 2
    assert "loop is not a folder" in capsys.readouterr().err
    assert train("--output", loop) == 2
    assert "loop" in capsys.readouterr().err
    assert driver_load_evaluate.main([long, *data(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "File name too long" in capsys.readouterr().err
