"""Training: from scratch, continued and resumed."""

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import MakePairs
from networks import tiny_network

import segment

SIZE = (32, 32)

pytestmark = pytest.mark.usefixtures("eager")


def generators(make_pairs: MakePairs) -> tuple[segment.ImageGenerator, segment.ImageGenerator]:
    images, masks = make_pairs(6)
    options: dict[str, Any] = {"image_size": SIZE, "batch_size": 2}
    train = segment.create_generator(images[:4], masks[:4], shuffle=True, augment=True, **options)
    return train, segment.create_generator(images[4:], masks[4:], **options)


def new_model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return tiny_network(SIZE, num_filters=2)


def test_an_uncompiled_model_is_trained_and_every_epoch_recorded(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    model, log = new_model(), tmp_path / "logs" / "training.csv"
    history = segment.train_model(model, *generators(make_pairs), 3, log_path=log, verbose=0)
    names = {"loss", "accuracy", "dice_coefficient"}
    assert set(history.history) == {"learning_rate", *names, *(f"val_{name}" for name in names)}
    assert history.epoch == [0, 1, 2]
    assert segment.model_record(model).history == history.history
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(history.history["val_loss"])


def test_the_learning_rate_falls_along_a_half_cosine(make_pairs: MakePairs) -> None:
    history = segment.train_model(
        new_model(), *generators(make_pairs), 4, learning_rate=0.002, verbose=0
    )
    expected = [0.002 * math.cos(math.pi * epoch / 8) ** 2 for epoch in range(4)]
    assert history.history["learning_rate"] == pytest.approx(expected)


def test_training_lowers_the_loss(make_pairs: MakePairs) -> None:
    losses = segment.train_model(
        new_model(), *generators(make_pairs), 12, learning_rate=0.1, verbose=0
    ).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_model_ends_as_its_best_epoch_and_so_does_the_file(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    train, val = generators(make_pairs)
    model, path = new_model(), tmp_path / "best.keras"
    history = segment.train_model(
        model, train, val, 5, learning_rate=0.05, save_path=path, verbose=0
    )
    best = max(history.history["val_dice_coefficient"])
    scores = model.evaluate(val, return_dict=True, verbose=0)
    assert scores["dice_coefficient"] == pytest.approx(best, abs=1e-6)
    saved = segment.load_model(path)
    assert saved.evaluate(val, return_dict=True, verbose=0) == pytest.approx(scores, abs=1e-6)
    kept = segment.model_record(saved).history["val_dice_coefficient"]
    assert kept[-1] == best == max(kept)


def test_a_loaded_model_continues_with_its_optimizer_and_epochs(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    train, val = generators(make_pairs)
    model, path, log = new_model(), tmp_path / "a.keras", tmp_path / "log.csv"
    segment.train_model(model, train, val, 2, log_path=log, verbose=0)
    segment.save_model(model, path)
    loaded = segment.load_model(path)
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) > 0
    history = segment.train_model(loaded, train, val, 2, log_path=log, verbose=0)
    assert history.epoch == [2, 3]
    assert history.history["learning_rate"] == pytest.approx([0.5e-3, 1e-3 * (2 - 2**0.5) / 4])
    assert len(segment.model_record(loaded).history["loss"]) == 4
    with open(log, newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]


def test_further_training_never_makes_the_model_worse(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    train, val = generators(make_pairs)
    model = new_model()
    segment.train_model(model, train, val, 3, learning_rate=0.01, verbose=0)
    best = max(segment.model_record(model).history["val_dice_coefficient"])
    model.optimizer.iterations.assign(0)
    segment.train_model(model, train, val, 1, learning_rate=100.0, verbose=0)
    after = model.evaluate(val, return_dict=True, verbose=0)["dice_coefficient"]
    assert after >= best - 1e-6


def test_a_loss_that_is_not_a_number_stops_the_training(make_pairs: MakePairs) -> None:
    train, val = generators(make_pairs)
    model = new_model()
    model.get_layer("level1_conv").bias.assign([math.nan, 0])
    with pytest.raises(segment.SegmentError, match=r"loss became nan in epoch 1, .* below 0\.001"):
        segment.train_model(model, train, val, 3, verbose=0)
    assert not segment.model_record(model).history


def test_a_file_that_vanishes_is_named_and_the_best_epoch_stays(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    train, val = generators(make_pairs)
    model, path = new_model(), tmp_path / "best.keras"
    segment.train_model(model, train, val, 1, save_path=path, verbose=0)
    weights = model.get_weights()
    Path(train.image_paths[2]).unlink()
    with pytest.raises(segment.SegmentError, match=r"ISIC_0000002\.png: there is no such file"):
        segment.train_model(model, train, val, 1, save_path=path, verbose=0)
    for kept in (model, segment.load_model(path)):
        for now, before in zip(kept.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(now, before)


def test_a_first_save_that_fails_never_brings_back_an_older_file(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = generators(make_pairs)
    path = tmp_path / "old.keras"
    old = tiny_network(SIZE, num_filters=2)
    segment.save_model(old, path)

    def disk_full(*_: Any, **__: Any) -> None:
        raise segment.SegmentError("disk full")

    monkeypatch.setattr(segment, "save_model", disk_full)
    model = new_model()
    with pytest.raises(segment.SegmentError, match="disk full"):
        segment.train_model(model, train, val, 1, save_path=path, verbose=0)
    kernels = [m.get_layer("level1_conv").get_weights()[0] for m in (model, old)]
    assert not np.array_equal(*kernels)


def test_a_validation_loss_that_is_not_a_number_is_never_the_best_epoch(
    tmp_path: Path,
) -> None:
    callback = segment._BestCheckpoint(None, tmp_path / "best.keras")
    callback.set_model(new_model())
    logs = {"loss": 0.5, "val_loss": math.nan, segment.BEST: 0.9, "learning_rate": 0.001}
    with pytest.raises(segment.SegmentError, match="loss became nan in epoch 1"):
        callback.on_epoch_end(0, logs)
    assert not (tmp_path / "best.keras").exists()


def test_an_interruption_leaves_the_best_epoch_in_the_file(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = generators(make_pairs)
    keep = segment._BestCheckpoint.on_epoch_end

    def interrupt(self: Any, epoch: int, logs: Any = None) -> None:
        keep(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(segment._BestCheckpoint, "on_epoch_end", interrupt)
    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        segment.train_model(model, train, val, 5, save_path=tmp_path / "a.keras", verbose=0)
    best = segment.model_record(model).history
    assert len(best["loss"]) == 2
    history = segment.model_record(segment.load_model(tmp_path / "a.keras")).history
    dice = best["val_dice_coefficient"]
    assert history == {name: curve[: 1 + dice.index(max(dice))] for name, curve in best.items()}


def test_invalid_arguments_and_another_frame_are_refused(make_pairs: MakePairs) -> None:
    train, val = generators(make_pairs)
    with pytest.raises(segment.SegmentError, match="epochs is 0"):
        segment.train_model(new_model(), train, val, 0)
    with pytest.raises(segment.SegmentError, match="learning_rate is -1: expected"):
        segment.train_model(new_model(), train, val, 1, learning_rate=-1)
    small = tiny_network((16, 16), num_filters=1)
    with pytest.raises(segment.SegmentError, match=r"takes images of \(16, 16\).*\(32, 32\)"):
        segment.predict(small, val)
    with pytest.raises(segment.SegmentError, match=r"takes images of \(16, 16\).*\(32, 32\)"):
        segment.train_model(small, train, val, 1)
    blind = segment.create_generator(train.image_paths, image_size=SIZE)
    with pytest.raises(segment.SegmentError, match="This needs masks"):
        segment.train_model(new_model(), blind, val, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_path": "model.h5"}, r"model\.h5 does not end in \.keras"),
        ({"save_path": "file/model.keras"}, r"model\.keras: cannot be written \(File exists|Not a"),
        ({"log_path": "."}, "is a folder: give the name of a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_first_epoch(
    make_pairs: MakePairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    model = new_model()
    with pytest.raises(segment.SegmentError, match=message):
        segment.train_model(model, *generators(make_pairs), 1, **options)  # type: ignore[arg-type]
    assert not segment.model_record(model).history


def test_an_optimizer_with_a_learning_rate_schedule_is_refused(make_pairs: MakePairs) -> None:
    model = new_model()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
    model.compile(keras.optimizers.Adam(schedule), loss=segment.dice_loss)
    with pytest.raises(TypeError, match="instantiate the optimizer with a float `learning_rate`"):
        segment.train_model(model, *generators(make_pairs), 1)


def test_without_validation_the_last_epoch_is_kept(make_pairs: MakePairs, tmp_path: Path) -> None:
    train, _ = generators(make_pairs)
    model, path = new_model(), tmp_path / "a.keras"
    history = segment.train_model(model, train, None, 3, save_path=path, verbose=0).history
    assert set(history) == {"loss", "accuracy", "dice_coefficient", "learning_rate"}
    saved = segment.load_model(path)
    assert segment.model_record(saved).history == history
    for here, there in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(here, there)
    segment.train_model(saved, train, None, 1, save_path=path, verbose=0)
    assert len(segment.model_record(segment.load_model(path)).history["loss"]) == 4


def test_further_training_without_dice_compares_with_the_earlier_losses(
    make_pairs: MakePairs,
) -> None:
    train, val = generators(make_pairs)
    model = new_model()
    model.compile("adam", loss="binary_crossentropy")
    segment.train_model(model, train, val, 2, learning_rate=0.01, verbose=0)
    best = min(segment.model_record(model).history["val_loss"])
    model.optimizer.iterations.assign(0)
    segment.train_model(model, train, val, 1, learning_rate=100.0, verbose=0)
    assert model.evaluate(val, verbose=0) <= best + 1e-6


def test_a_model_compiled_by_hand_keeps_the_epoch_of_the_lowest_loss(make_pairs: MakePairs) -> None:
    train, val = generators(make_pairs)
    model = new_model()
    model.compile("adam", loss="binary_crossentropy")
    losses = segment.train_model(model, train, val, 3, verbose=0).history["val_loss"]
    assert model.evaluate(val, verbose=0) == pytest.approx(min(losses), abs=1e-6)
    figure = segment.plot_history(segment.model_record(model).history)
    assert [axes.get_title() for axes in figure.axes] == ["Loss"]


def train_from(
    folder: Path, make_pairs: MakePairs, epochs: int = 4, seed: int = 0, **options: Any
) -> tuple[keras.Model, list[dict[str, str]]]:
    """Trains with every file in `folder`; returns the model and the log."""
    images, masks = (
        segment.find_image_pairs(*(folder.parent / "data" / name for name in ("images", "masks")))
        if (folder.parent / "data").exists()
        else make_pairs(6)
    )
    shape: dict[str, Any] = {"image_size": SIZE, "batch_size": 2}
    train = segment.create_generator(
        images[:4], masks[:4], shuffle=True, augment=True, seed=seed, **shape
    )
    val = segment.create_generator(images[4:], masks[4:], **shape)
    model = options.pop("model", None) or new_model()
    paths: dict[str, Any] = {
        "save_path": "best.keras",
        "log_path": "log.csv",
        "resume_path": "last.keras",
    }
    segment.train_model(
        model, train, val, epochs, learning_rate=0.01, verbose=0,
        **{name: folder / path for name, path in paths.items()}, **options,
    )  # fmt: skip
    with open(folder / "log.csv", newline="") as file:
        return model, list(csv.DictReader(file))


def test_a_killed_training_resumes_and_ends_with_the_same_weights(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log = train_from(tmp_path / "whole", make_pairs, 2)
    real, kills = segment._written_whole, iter((4, 2))
    writes: list[int] = []

    def killed(path: Any) -> Any:  # before the first, the second, ... file of a run is written
        writes[0] -= 1
        if writes[0] == 0:
            raise SystemExit("killed")
        return real(path)

    monkeypatch.setattr(segment, "_written_whole", killed)
    for kill in kills:
        writes[:] = [kill]
        with pytest.raises(SystemExit):
            train_from(tmp_path / "killed", make_pairs, 2)
    writes[:] = [1000]
    model, killed_log = train_from(tmp_path / "killed", make_pairs, 2)
    assert killed_log == log
    assert [row["epoch"] for row in log] == ["0", "1"]
    for there, here in zip(whole.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(there, here)
    finished, again = train_from(tmp_path / "killed", make_pairs, 2)  # nothing is left to do
    assert again == log
    np.testing.assert_array_equal(finished.get_weights()[0], whole.get_weights()[0])


def test_resume_refuses_another_split_seed_or_network(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    folder, other = tmp_path / "run", [(["a.png"], ["a.png"]), ([], []), ([], [])]
    split = [(["b.png"], ["b.png"]), ([], []), ([], [])]
    train_from(folder, make_pairs, 1, split=split)
    before = (folder / "last.keras").read_bytes()
    checkpoint = r"last\.keras belongs to a training with another"
    with pytest.raises(segment.SegmentError, match=f"{checkpoint} split: give"):
        train_from(folder, make_pairs, split=other)
    with pytest.raises(segment.SegmentError, match=f"{checkpoint} seed: give"):
        train_from(folder, make_pairs, seed=1, split=split)
    wide = tiny_network(SIZE, num_filters=3)
    with pytest.raises(segment.SegmentError, match=r"last\.keras holds another network"):
        train_from(folder, make_pairs, model=wide)
    assert (folder / "last.keras").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"PK damaged"])
def test_resuming_without_the_best_epoch_is_an_error(
    make_pairs: MakePairs, tmp_path: Path, eager: None, content: bytes | None
) -> None:
    best, last = tmp_path / "best.keras", tmp_path / "last.keras"
    train = segment.create_generator(*make_pairs(2), image_size=(16, 16))
    model = tiny_network((16, 16), num_filters=1)
    segment.train_model(model, train, None, 1, save_path=best, resume_path=last, verbose=0)
    best.write_bytes(content) if content else best.unlink()
    again = tiny_network((16, 16), num_filters=1)
    with pytest.raises(segment.SegmentError, match=r"best\.keras"):
        segment.train_model(again, train, None, 1, save_path=best, resume_path=last, verbose=0)


def test_best_and_last_epoch_need_two_files(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = segment.create_generator(*make_pairs(1), image_size=(16, 16))
    model = tiny_network((16, 16), num_filters=1)
    monkeypatch.chdir(tmp_path)
    absolute, relative = str(tmp_path / "one.keras"), "one.keras"
    for best, last in ((absolute, absolute), (absolute, relative), (relative, absolute)):
        with pytest.raises(segment.SegmentError, match="cannot hold both the best and the last"):
            segment.train_model(model, train, None, 1, save_path=best, resume_path=last)


def test_callbacks_are_passed_on_to_keras(make_pairs: MakePairs) -> None:
    ended: list[int] = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended.append(epoch))
    # No epoch is better by 1, so training stops after the second.
    stop = keras.callbacks.EarlyStopping("loss", min_delta=1.0, patience=1)
    history = segment.train_model(
        new_model(), *generators(make_pairs), 4, callbacks=[record, stop], verbose=0
    )
    assert ended == history.epoch == [0, 1]


def test_training_and_prediction_leave_stock_layers(make_pairs: MakePairs) -> None:
    train, val = generators(make_pairs)
    model = new_model()
    segment.train_model(model, train, None, 1, verbose=0)
    assert [layer.name for layer in model.layers if "call" in vars(layer)] == []
    segment.predict(model, val, verbose=0)
    assert [layer.name for layer in model.layers if "call" in vars(layer)] == []
    Path(train.image_paths[0]).write_bytes(b"damaged")
    with pytest.raises(segment.SegmentError, match="cannot be read as an image"):
        segment.train_model(model, train, None, 1, verbose=0)
    assert [layer.name for layer in model.layers if "call" in vars(layer)] == []


@pytest.mark.parametrize("first", [True, False])
def test_validation_may_begin_or_end_with_further_training(
    make_pairs: MakePairs, tmp_path: Path, first: bool
) -> None:
    train, val = generators(make_pairs)
    model, log = new_model(), tmp_path / "training.csv"
    segment.train_model(model, train, val if first else None, 3, verbose=0)
    before = model.get_weights()
    segment.train_model(model, train, None if first else val, 2, log_path=log, verbose=0)
    assert any((new != old).any() for new, old in zip(model.get_weights(), before, strict=True))
    history = segment.model_record(model).history
    assert (len(history["loss"]), len(history.get("val_loss", ()))) == (5, 0 if first else 2)
    with open(log, newline="") as file:
        losses = [row.get("val_loss") for row in csv.DictReader(file)]
    assert [bool(loss) for loss in losses] == [False] * 3 + [not first] * 2


def test_training_discards_the_estimate_that_was_fitted_to_other_weights(
    make_pairs: MakePairs,
) -> None:
    model = new_model()
    segment.model_record(model).estimate = [0.0, 1.0, 0.1]
    segment.train_model(model, *generators(make_pairs), 1, verbose=0)
    assert segment.model_record(model).estimate == []


def test_resume_refuses_the_best_epoch_of_another_training(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    split = [(["a.png"], ["a.png"]), ([], []), ([], [])]
    for folder, seed in (("one", 0), ("two", 1)):
        train_from(tmp_path / folder, make_pairs, 1, split=split, seed=seed)
    shutil.copy(tmp_path / "two" / "best.keras", tmp_path / "one" / "best.keras")
    with pytest.raises(segment.SegmentError, match=r"best\.keras belongs to .* another seed: give"):
        train_from(tmp_path / "one", make_pairs, 1, split=split)


def test_a_backend_that_cannot_train_is_named(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = segment.create_generator(*make_pairs(2), image_size=SIZE)
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(segment.SegmentError, match="cannot train with numpy: set KERAS_BACKEND"):
        segment.train_model(tiny_network(SIZE), train, None, 1)


def test_the_best_epoch_of_another_process_is_not_taken_over(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    train_from(tmp_path / "other", make_pairs, 1, seed=1)

    class Replace(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_end(self, logs: Any = None) -> None:
            shutil.copy(tmp_path / "other" / "best.keras", tmp_path / "run" / "best.keras")

    with pytest.raises(segment.SegmentError, match=r"best\.keras belongs to .* another seed"):
        train_from(tmp_path / "run", make_pairs, 1, callbacks=[Replace()])


def test_a_checkpoint_needs_a_file_for_the_best_epoch(make_pairs: MakePairs) -> None:
    train = segment.create_generator(*make_pairs(2), image_size=SIZE)
    with pytest.raises(segment.SegmentError, match=r"last\.keras without save_path: name a file"):
        segment.train_model(new_model(), train, None, 1, resume_path="last.keras")
