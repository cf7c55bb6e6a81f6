"""Cross-validation, several models at once, and a validation set of its own."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MakePairs
from networks import tiny_network
from test_split import IMAGES, MASKS

import driver_load_evaluate
import driver_train_save_evaluate
import segment

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "create_model", tiny_network)


@pytest.fixture
def validated(make_pairs: MakePairs, tmp_path: Path) -> Path:
    """The output of three folds of twelve pairs, which are trained once for all tests."""
    make_pairs(12)
    kept = tmp_path.parent / "validated"
    if not kept.exists():
        assert cross_validate(tmp_path, "out") == 0
        (tmp_path / "out").rename(kept)
    return kept


def folders(tmp_path: Path, name: str = "data") -> tuple[str, str]:
    return str(tmp_path / name / "images"), str(tmp_path / name / "masks")


def cross_validate(tmp_path: Path, output: str, *options: str) -> int:
    images, masks = folders(tmp_path)
    return driver_train_save_evaluate.main(
        ["--image-dir", images, "--mask-dir", masks, "--image-size", "32", "32", "--epochs", "1",
         "--batch-size", "4", "--folds", "3", "--output", str(tmp_path / output), "--num-imgs", "0",
         *options]
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open(path / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_pair_is_in_the_test_set_of_one_fold() -> None:
    splits = segment.cross_validation_splits(IMAGES[:103], MASKS[:103], 5)
    assert sorted(path for *_, (images, _) in splits for path in images) == IMAGES[:103]
    for split in splits:
        assert sorted(path for images, _ in split for path in images) == IMAGES[:103]
        assert [len(images) for images, _ in split][1:] in ([16, 20], [16, 21])
        assert all(
            image[7:11] == mask[6:10] for part in split for image, mask in zip(*part, strict=True)
        )


def test_the_images_of_a_lesion_are_in_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(zip(IMAGES[:30], MASKS[:30], strict=True))
    lesions = [pairs[i : i + 3] for i in range(0, 30, 3)]
    monkeypatch.setattr(segment, "_group_lesions", lambda *_: lesions)
    for split in segment.cross_validation_splits(IMAGES[:30], MASKS[:30], 4):
        parts = [{int(image[7:11]) // 3 for image in images} for images, _ in split]
        assert sum(map(len, parts)) == 10 == len(set.union(*parts))


def test_the_seed_determines_the_folds() -> None:
    first, again, other = (
        segment.cross_validation_splits(IMAGES[:20], MASKS[:20], 2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert [test for *_, test in first] != [test for *_, test in other]


@pytest.mark.parametrize("folds", [1, 11])
def test_an_impossible_number_of_folds_is_refused(folds: int) -> None:
    with pytest.raises(segment.SegmentError, match=rf"folds is {folds}: expected 2 to 10"):
        segment.cross_validation_splits(IMAGES[:10], MASKS[:10], folds)


@pytest.mark.parametrize("val_split", [float("nan"), -0.5, 1.0])
def test_an_impossible_fraction_to_validate_on_is_refused(val_split: float) -> None:
    with pytest.raises(segment.SegmentError, match=f"val_split is {val_split}: expected a fracti"):
        segment.cross_validation_splits(IMAGES[:10], MASKS[:10], 2, val_split=val_split)
    with pytest.raises(segment.SegmentError, match="1 pairs are too few for a val_split of"):
        segment.cross_validation_splits(IMAGES[:2], MASKS[:2], 2)


def test_each_image_is_scored_by_the_model_that_has_not_seen_it(
    validated: Path, tmp_path: Path
) -> None:
    scores = {row["id"]: row for row in rows(validated)}
    assert len(scores) == 12
    images, masks = folders(tmp_path)
    for fold in (1, 2, 3):
        model, alone = validated / f"fold{fold}" / "model.keras", tmp_path / f"alone{fold}"
        arguments = [str(model), "--image-dir", images, "--mask-dir", masks, "--num-imgs", "0"]
        assert driver_load_evaluate.main([*arguments, "--output", str(alone)]) == 0
        for row in rows(alone):
            assert float(scores.pop(row["id"])["dice"]) == pytest.approx(float(row["dice"]), 1e-3)
    assert not scores
    assert len(list((validated / "masks").iterdir())) == 12


def test_an_interrupted_cross_validation_resumes_in_its_fold(
    validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model, calls = segment.train_model, list[Path]()

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(Path(str(kwargs["save_path"])).parent)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_model(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(segment, "train_model", interrupted)
    assert cross_validate(tmp_path, "parts") == 130
    first = (tmp_path / "parts" / "fold1" / "last.keras").read_bytes()
    assert cross_validate(tmp_path, "parts", "--resume") == 0
    assert [path.name for path in calls] == ["fold1", "fold2", "fold1", "fold2", "fold3"]
    assert (tmp_path / "parts" / "fold1" / "last.keras").read_bytes() == first
    assert rows(tmp_path / "parts") == rows(validated)


def test_several_models_predict_the_mean_of_their_probabilities(make_pairs: MakePairs) -> None:
    images, masks = make_pairs(3)
    models = [tiny_network((32, 32)) for _ in range(3)]
    for model, threshold in zip(models, (0.3, 0.5, 0.55), strict=True):
        segment.model_record(model).threshold = threshold
    generator = segment.create_generator(images, masks, image_size=(32, 32))
    each = [segment.predict(model, generator, verbose=0) for model in models]
    mean = segment.predict(models, generator, verbose=0)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), atol=1e-6)
    assert mean.threshold == pytest.approx(0.45)
    for path, mask in zip(images, segment.restore_masks(generator, mean), strict=True):
        np.testing.assert_array_equal(segment.segment_image(models, path), mask)
    with pytest.raises(segment.SegmentError, match="0 models take images of 0 sizes"):
        segment.predict([], generator)
    with pytest.raises(segment.SegmentError, match=r"2 sizes \(\(32, 32\), \(48, 32\)\)"):
        segment.predict([*models, tiny_network((48, 32))], generator)
    with pytest.raises(segment.SegmentError, match=r"2 sizes \(\(32, 32\), \(48, 32\)\)"):
        segment.segment_image([*models, tiny_network((48, 32))], images[0])


def test_the_load_driver_takes_the_folder_of_the_folds(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = folders(tmp_path)
    output = tmp_path / "all"
    data = ["--image-dir", images, "--mask-dir", masks, "--output", str(output), "--num-imgs", "0"]
    assert driver_load_evaluate.main([str(validated), *data]) == 0
    assert "12 of these images were used in training" in capsys.readouterr().err
    models = [segment.load_model(path) for path in sorted(validated.glob("fold*/model.keras"))]
    generator = segment.create_generator(
        *segment.find_image_pairs(images, masks), image_size=(32, 32)
    )
    expected = segment.results(generator, segment.predict(models, generator, verbose=0))
    assert driver_load_evaluate.main([str(validated), *data[:2], *data[4:]]) == 0
    assert len(rows(output)) == 12  # segmented without masks
    summary = json.loads((output / "summary.json").read_text())
    assert summary["images_used_in_training"] == 12
    assert not (output / "training.png").exists()  # which would be of one model
    assert driver_load_evaluate.main([str(validated), *data]) == 0
    dice = [float(row["dice"]) for row in rows(output)]
    assert dice == pytest.approx([row["dice"] for row in expected], 1e-3)
    assert len(json.loads((output / "summary.json").read_text())["model"].split(", ")) == 3


def test_val_dir_replaces_the_random_split(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(8)
    make_pairs(5, folder="official")
    for path in (tmp_path / "official").rglob("*.png"):
        path.rename(path.with_name(path.name.replace("_00", "_77")))
    images, masks = folders(tmp_path, "official")
    given = ["--val-dir", images, "--val-masks", masks]
    assert cross_validate(tmp_path, "official", *given) == 2
    assert "would write among the images" in capsys.readouterr().err
    assert cross_validate(tmp_path, "out", *given) == 0
    assert "5 images are in more than one part of the split, as copies" in capsys.readouterr().err
    for path in tmp_path.glob("out/fold*/model.keras"):
        split = segment.model_record(segment.load_model(path)).split
        assert split["val"] == [f"ISIC_77{i:05}" for i in range(5)]
        assert len(split["train"]) + len(split["test"]) == 8


def test_an_image_to_train_and_to_validate_on_is_refused(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(8)
    images, masks = folders(tmp_path)
    assert cross_validate(tmp_path, "out", "--val-dir", images, "--val-masks", masks) == 2
    assert "in more than one part of the split" in capsys.readouterr().err
    for wrong in (["--val-dir", images], ["--save", "x.keras"]):
        with pytest.raises(SystemExit):
            cross_validate(tmp_path, "out", *wrong)
    message = capsys.readouterr().err
    assert "--val-dir and --val-masks belong together" in message
    assert "--folds saves a model for each fold" in message


def test_folds_of_another_run_are_not_mixed_with_new_ones(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").symlink_to(validated)
    with pytest.raises(SystemExit):
        cross_validate(tmp_path, "out", "--folds", "2")
    assert "holds more folds, of another run: give a new folder" in capsys.readouterr().err


def test_a_fold_without_a_model_is_not_left_out_silently(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(validated, tmp_path / "out")
    (tmp_path / "out" / "fold2" / "model.keras").unlink()
    images, masks = folders(tmp_path)
    given = ["--image-dir", images, "--mask-dir", masks, "--output", str(tmp_path / "again")]
    assert driver_load_evaluate.main([str(tmp_path / "out"), *given]) == 2
    assert "fold2/model.keras: there is no such file" in capsys.readouterr().err


def test_an_output_with_too_long_a_name_is_reported(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(4)
    assert cross_validate(tmp_path, "x" * 300) == 2
    assert "File name too long" in capsys.readouterr().err
