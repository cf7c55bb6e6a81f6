"""Both drivers: in process, and once as a person runs them."""

import csv
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs
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
    """Runs the train driver for an epoch on 12 small pairs and a thin network."""
    make_pairs(12)
    thin = functools.partial(segment.create_model, num_filters=2)
    monkeypatch.setattr(segment, "create_model", thin)

    def run(*options: str) -> int:
        return driver_train_save_evaluate.main(
            [*data(tmp_path), "--image-size", "32", "32", "--epochs", "1", "--test-split", "0.25",
             "--output", str(tmp_path / "trained"), *options]
        )  # fmt: skip

    return run


@pytest.fixture
def saved(make_pairs: MakePairs, tmp_path: Path) -> Path:
    """A model file as the train driver leaves it on 12 pairs, of which 9 were trained on."""
    split = segment.train_val_test_split(*make_pairs(12), test_split=0.25)
    path = tmp_path / "trained" / "model.keras"
    segment.save_model(segment.create_model((32, 32), num_filters=2), path, split=split)
    return path


@pytest.fixture
def load(tmp_path: Path, eager: None) -> Run:
    """Runs the load driver on what `train` or `saved` left, with further options."""

    def run(*options: str) -> int:
        model, output = tmp_path / "trained" / "model.keras", tmp_path / "loaded"
        return driver_load_evaluate.main(
            [str(model), *data(tmp_path), "--output", str(output), *options]
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
    assert "Evaluating the 3 test images put aside in training" in loaded


def test_the_test_images_were_never_trained_or_validated_on(train: Run, tmp_path: Path) -> None:
    train()
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    split = segment.model_record(model).split
    tested = {row["id"] for row in rows(tmp_path / "trained")}
    seen = {segment.image_id(name) for part in ("train", "val") for name in split[part]}
    assert len(tested) + len(seen) == 12
    assert not tested & seen


def test_everything_documented_is_written(train: Run, tmp_path: Path) -> None:
    train("--inspect")
    assert set(os.listdir(tmp_path / "trained")) == {
        "image_sizes.png", "model.keras", "training.csv", "scores.csv", "summary.json", "masks",
        "predictions.png", "worst.png", "histogram.png", "training.png", "last.keras",
    }  # fmt: skip


def test_a_training_that_was_killed_goes_on_with_resume(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "choose_threshold", segment._subplots)  # fails after training
    with pytest.raises(TypeError):
        train()
    monkeypatch.setattr(segment, "choose_threshold", lambda *_: 0.5)
    assert train("--resume", "--epochs", "3") == 0
    lines = (tmp_path / "trained" / "training.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1", "2"]
    record = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras"))
    assert record.origin["options"]["epochs"] == 3
    assert train() == 0
    assert len((tmp_path / "trained" / "training.csv").read_text().splitlines()) == 2


STEPS = (
    "find_image_pairs", "check_pairs", "inspect", "plot_image_sizes", "find_same_lesions",
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


def test_the_steps_come_in_the_documented_order(train: Run, load: Run, steps: list[str]) -> None:
    train("--inspect")
    assert steps == [
        "find_image_pairs", "check_pairs", "inspect", "plot_image_sizes", "find_same_lesions",
        "train_val_test_split", *["create_generator"] * 3, "create_model", "train_model",
        "predict", "choose_threshold", "save_model", "predict_each", "results",
    ]  # fmt: skip
    steps.clear()
    load("--inspect")
    assert steps == [
        "find_image_pairs", "check_pairs", "inspect", "plot_image_sizes", "load_model",
        "create_generator", "predict_each", "results",
    ]  # fmt: skip


def test_only_training_images_are_shuffled_and_augmented_and_sizes_inspected_on_demand(
    train: Run, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create, made = segment.create_generator, []

    def spy(*args: Any, **kwargs: Any) -> segment.ImageGenerator:
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(segment, "create_generator", spy)
    train("--seed", "7")
    assert [(g.shuffle, g.augment) for g in made] == [(True, True), (False, False), (False, False)]
    assert [len(g.image_paths) for g in made] == [8, 1, 3]
    assert made[0].seed == 7
    assert not {"inspect", "plot_image_sizes", "find_same_lesions"} & set(steps)


def test_another_folder_is_scored_whole_only_with_all(
    saved: Path, load: Run, make_pairs: MakePairs, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images, masks = make_pairs(4, folder="other")
    for paths in (images, masks):
        for path in map(Path, paths):
            path.rename(path.with_name(path.name.replace("ISIC_", "other_")))
    assert load(*data(tmp_path, "other")) == 2
    assert "not the folder that the model was trained on" in capsys.readouterr().err
    assert load(*data(tmp_path, "other"), "--all") == 0
    assert "Warning" not in capsys.readouterr().err
    assert [row["id"] for row in rows(tmp_path / "loaded")] == [f"other_{i:07}" for i in range(4)]


def test_training_images_in_a_test_are_never_passed_over_in_silence(
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
    assert names == [f"ISIC_{i:07}.png" for i in range(8)]


def test_bad_data_ends_in_a_sentence_and_status_2(
    train: Run, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load() == 2
    assert "model.keras: there is no such file; give a model file" in capsys.readouterr().err
    assert train("--image-size", "30", "32") == 2
    assert "divisible by 16" in capsys.readouterr().err
    assert train("--test-split", "1.5") == 2
    assert "test_split is 1.5: expected a share" in capsys.readouterr().err
    (tmp_path / "data" / "images" / "ISIC_0000003.png").unlink()
    assert train() == 2
    assert "1 masks without an image (ISIC_0000003)" in capsys.readouterr().err
    (tmp_path / "data" / "masks" / "ISIC_0000003_segmentation.png").unlink()


def test_bad_files_are_listed_at_once_and_left_out_on_demand(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "images" / "ISIC_0000002.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "data" / "masks" / "ISIC_0000005_segmentation.png")
    assert train() == 2
    printed = capsys.readouterr().err
    assert "ISIC_0000002.png: cannot be read as an image" in printed
    assert "ISIC_0000005.png is 40 × 56" in printed
    assert "Error: 2 of 12 images cannot be used (see above)" in printed
    assert train("--skip-bad") == 0
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert [Path(path).stem for path in summary["left_out"]] == ["ISIC_0000002", "ISIC_0000005"]
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    assert sum(map(len, segment.model_record(model).split.values())) == 10


def test_a_bad_test_image_is_left_out_and_images_are_checked_without_masks_too(
    saved: Path, load: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = segment.model_record(segment.load_model(saved)).split["test"][0]
    (tmp_path / "data" / "images" / bad).write_bytes(b"no image")
    assert load("--skip-bad") == 0
    assert len(rows(tmp_path / "loaded")) == 2
    only = [str(saved), *data(tmp_path)[:2], "--all", "--output", str(tmp_path / "only")]
    assert driver_load_evaluate.main(only) == 2
    assert f"Error: {tmp_path}" in capsys.readouterr().err
    assert driver_load_evaluate.main([*only, "--skip-bad"]) == 0
    assert len(rows(tmp_path / "only")) == 11
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"no image")
    assert driver_load_evaluate.main([*only, "--skip-bad"]) == 2
    assert "Error: None of the images can be used" in capsys.readouterr().err


def test_a_training_with_other_options_is_not_gone_on_with_and_stays(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume") == 0
    assert "There is no training to go on with" in capsys.readouterr().out
    last = tmp_path / "trained" / "last.keras"
    before = last.read_bytes()
    assert train("--resume", "--learning-rate", "0.5", "--batch-size", "3") == 2
    told = capsys.readouterr().err
    assert "last.keras is of a training with other values of batch_size, learning_rate" in told
    assert train("--learning-rate", "-1") == 2
    assert last.read_bytes() == before


def test_weights_of_another_network_are_no_start(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segment.save_model(segment.create_model((32, 32), num_filters=3), tmp_path / "m.keras")
    assert train("--start-from", str(tmp_path / "m.keras")) == 2
    assert "m.keras is of another network" in capsys.readouterr().err


def test_an_unknown_backend_is_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "driver_load_evaluate.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "KERAS_BACKEND": "none"},
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "none: pip install -r requirements.txt, and mind KERAS_BACKEND" in done.stderr


def test_an_output_that_is_no_folder_ends_in_a_sentence_and_status_2(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train("--output", str(tmp_path / "file")) == 2
    assert re.search(r"Error: \S+: cannot be written \((File|Not a)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-dir", "x"], "--image-dir came without --mask-dir"),
        (["--mask-dir", "x"], "--mask-dir came without --image-dir"),
        (["--save", "model.h5"], "ends in .keras"),
        (["--seed", "-1"], "--seed: -1 is not a whole number from 0"),
        (["--epochs", "0"], "--epochs: 0 is not a whole number from 1"),
        (["--batch-size", "0"], "--batch-size: 0 is not a whole number from 1"),
        (["--subset", "some"], "--subset: some is not a whole number from 1"),
        (["--image-size", "256"], "expected 2 arguments"),
    ],
)
def test_wrong_options_end_in_a_sentence_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        driver_train_save_evaluate.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_the_best_model_and_ends_with_130(
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep = segment._EpochKeeper.on_epoch_end

    def interrupt(self: Any, epoch: int, logs: Any = None) -> None:
        keep(self, epoch, logs)
        raise KeyboardInterrupt

    monkeypatch.setattr(segment._EpochKeeper, "on_epoch_end", interrupt)
    assert train("--epochs", "9") == 130
    assert "The best epoch so far is in" in capsys.readouterr().err
    model = segment.load_model(tmp_path / "trained" / "model.keras")
    assert len(segment.model_record(model).history["loss"]) == 1


def test_ctrl_c_before_the_first_epoch_does_not_claim_a_model(
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "trained" / "model.keras"
    segment.save_model(segment.create_model((16, 16)), model)
    before = model.read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segment, "save_model", interrupt)
    assert train() == 130
    assert "best epoch" not in capsys.readouterr().err
    assert model.read_bytes() == before


def test_ctrl_c_and_a_missing_package_at_start_up_are_sentences_too(
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


def test_everything_can_be_trained_on_and_nothing_validated_or_tested(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--val-split", "0", "--test-split", "0") == 0
    printed = capsys.readouterr().out
    assert "12 to train, 0 to validate, 0 to test on" in printed
    assert "there is nothing to score" in printed
    split = segment.model_record(segment.load_model(tmp_path / "trained" / "model.keras")).split
    assert [len(split[part]) for part in ("train", "val", "test")] == [12, 0, 0]
    assert not (tmp_path / "trained" / "scores.csv").exists()


def test_the_trained_model_segments_a_folder_of_images_without_masks(
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


def test_a_model_named_without_masks_asks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver_load_evaluate.main(["a.keras", "--image-dir", "x"])
    assert "add --all to segment them" in capsys.readouterr().err


def test_prediction_and_threshold_are_chosen_on_validation_images_and_can_be_switched(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = segment.predict_each, []

    def spy(model: Any, generator: Any, *, mirror: bool, one_region: bool, **options: Any) -> Any:
        calls.append((len(generator.image_paths), {"mirror": mirror, "one_region": one_region}))
        return predict(model, generator, mirror=mirror, one_region=one_region, **options)

    monkeypatch.setattr(segment, "predict_each", spy)
    monkeypatch.setattr(segment, "choose_threshold", lambda *_: 0.35)
    train("--no-mirror", "--no-one-region")
    options = {"mirror": False, "one_region": False}
    assert calls == [(1, options), (3, options)]
    saved = segment.load_model(tmp_path / "trained" / "model.keras")
    assert segment.model_record(saved).threshold == 0.35


def test_training_begins_with_the_weights_of_another_frame(train: Run, tmp_path: Path) -> None:
    first, then = tmp_path / "a.keras", tmp_path / "b.keras"
    segment.save_model(segment.create_model((16, 16)), first)
    again = ["--image-size", "48", "32", "--start-from", str(first), "--bfloat16"]
    assert train(*again, "--learning-rate", "1e-9", "--save", str(then)) == 0
    one, two = map(segment.load_model, (first, then))
    assert two.get_layer("level1_conv").compute_dtype == "bfloat16"
    assert two.input_shape == (None, 48, 32, 3)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_the_file_says_where_it_came_from(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []  # and not done, since it would slow every test that follows
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
    told = b"".join(p.name.encode() + hashlib.sha256(p.read_bytes()).digest() for p in images)
    assert origin["sha256_of_images"] == hashlib.sha256(told).hexdigest()


def test_the_load_driver_predicts_as_the_train_driver_did(
    train: Run, load: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = segment.predict_each, []

    def spy(model: Any, generator: Any, **options: Any) -> Any:
        calls.append((generator.batch_size, options))
        return predict(model, generator, **options)

    monkeypatch.setattr(segment, "predict_each", spy)
    train("--no-mirror", "--no-one-region", "--batch-size", "3")
    load()
    assert calls[-1] == calls[-2] == (3, {"mirror": False, "one_region": False})
    load("--mirror", "--batch-size", "2")
    assert calls[-1] == (2, {"mirror": True, "one_region": False})
    options = driver_load_evaluate.parse_options([])
    driver_load_evaluate.predict_as_trained(options, {"batch_size": "many", "mirror": 7})
    assert (options.batch_size, options.mirror, options.one_region) == (8, True, True)


def test_a_threshold_can_be_given_to_both_drivers(
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


def test_the_sample_is_recognised_when_it_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sample = ["--image-dir", "images/sample/input", "--mask-dir", "images/sample/truth"]
    parse = driver_train_save_evaluate.parse_options
    for options in (parse([]), parse(sample)):
        assert (options.epochs, options.batch_size, options.image_size) == (20, 4, (128, 128))
    elsewhere = parse(["--image-dir", "tests", "--mask-dir", "tests"])
    assert (elsewhere.epochs, elsewhere.batch_size, elsewhere.image_size) == (60, 8, (96, 128))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_output_that_cannot_be_printed_is_a_sentence() -> None:
    code = "import driver_load_evaluate as d, sys; sys.exit(d.run(lambda _: print('x'), None))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: what the driver prints cannot be written (No space left")
    assert len(done.stderr.splitlines()) == 1


def test_help_comes_without_starting_tensorflow() -> None:
    for driver in ("driver_train_save_evaluate", "driver_load_evaluate"):
        code = f"import sys, {driver} as d\ntry: d.main(['--help'])\nfinally: print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "--image-dir DIR" in done.stdout
        assert "keras" not in done.stdout.split("\n")[-2].split()


def test_a_person_runs_both_drivers(make_pairs: MakePairs, tmp_path: Path) -> None:
    make_pairs(12)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *command, *data(tmp_path), "--output", str(tmp_path / "皮膚")]
        environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        environment["PYTHONIOENCODING"] = "ascii:strict"  # a terminal without these letters
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)

    size = ("--image-size", "32", "32", "--epochs", "1")
    trained = run("driver_train_save_evaluate.py", *size)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    first, *_ = trained.stdout.splitlines()
    assert first.startswith("Device: ")
    loaded = run("driver_load_evaluate.py", str(tmp_path / "皮膚" / "model.keras"))
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert trained.stdout.split("images, each")[1] == loaded.stdout.split("images, each")[1]
