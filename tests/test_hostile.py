"""Generated and damaged input: it is used correctly, or refused with a `SegmentError`."""

# ruff: noqa: PT017, either outcome is correct

import csv
import functools
import io
import json
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import segment

repeatable = functools.partial(settings, deadline=None, derandomize=True, database=None)

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
sides = st.one_of(st.integers(1, 40), st.sampled_from([399, 4000]))


def encoded(mode: str, height: int, width: int, kind: str, seed: int) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(levels).convert("L" if mode == "LA" else "RGB").convert(mode)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@repeatable(max_examples=60)
@given(st.sampled_from(MODES), sides, st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_an_image_of_any_mode_and_size_is_fitted_into_the_frame(
    mode: str, long: int, short: int, upright: bool, seed: int
) -> None:
    height, width = (long, short) if upright else (short, long)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        kind = "TIFF" if mode == "CMYK" else "PNG"
        path.write_bytes(encoded(mode, height, width, kind, seed))
        frame = segment.load_input_image(path, (32, 48))
        assert frame.shape == (32, 48, 3)
        assert segment.inspect([path]) == {(height, width): 1}
        full = segment.load_input_image(path, None)
        assert full.shape == (height, width, 3)
    top, left, inner_height, inner_width = segment.letterbox((height, width), (32, 48))
    outside = np.ones((32, 48), bool)
    outside[top : top + inner_height, left : left + inner_width] = False
    assert not frame[outside].any()
    assert min(inner_height, inner_width) >= 1
    assert inner_height == 32 or inner_width == 48


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=9)


@repeatable(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "TIFF", "BMP"]), damage, st.floats(0.02, 1))
def test_a_damaged_image_is_loaded_or_refused_by_name(
    kind: str, changes: list[tuple[float, int]], kept: float
) -> None:
    content = bytearray(encoded("RGB", 23, 31, kind, 0))
    for place, value in changes:
        content[int(place * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind.lower()}"
        path.write_bytes(content[: int(kept * len(content))])
        refused = set()
        for load in (segment.load_input_image, segment.load_segmented_image):
            try:
                assert load(path, (32, 32)).shape[:2] == (32, 32)
            except segment.SegmentError as error:
                assert str(path) in str(error)
                refused.add(load)
        found = {finding.severity for finding in segment.check_pairs([path])}
        assert ("error" in found) == (segment.load_input_image in refused)


@repeatable(max_examples=100)
@given(
    st.integers(2, 60),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**32 - 1),
)
def test_every_pair_is_in_exactly_one_set_of_a_split(
    count: int, val: float, test: float, seed: int
) -> None:
    images = [f"{i}.jpg" for i in range(count)]
    try:
        parts = segment.train_val_test_split(
            images, images, val_split=val, test_split=test, seed=seed
        )
    except segment.SegmentError as error:
        assert "too few" in str(error)
        return
    assert sorted(path for part, _ in parts for path in part) == sorted(images)
    assert all(part == masks for part, masks in parts)
    assert len(parts[2][0]) == (max(1, int(test * count + 1e-9)) if test else 0)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of a model file."""
    path = tmp_path_factory.mktemp("model") / "a.keras"
    segment.save_model(segment.create_model((16, 16), num_filters=1), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_model_file_that_unpacks_to_far_more_than_it_has_is_refused(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    bomb = {**members, "config.json": b" " * 2**26}
    path = packed(tmp_path / "a.keras", bomb, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(segment.SegmentError, match="would unpack to 67"):
        segment.load_model(path)


def test_a_network_of_more_weights_than_the_file_holds_is_refused(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:  # in a thread, Keras allocates no memory for them
        wide = pool.submit(wide_config).result()
    path = packed(tmp_path / "a.keras", {**members, "config.json": wide.encode()})
    with pytest.raises(segment.SegmentError, match=r"declares 12\d{9} weights"):
        segment.load_model(path)


def wide_config() -> str:
    with keras.StatelessScope(initialize_variables=False):
        model = segment.create_model((16, 16), num_filters=1000)
        return json.dumps(keras.saving.serialize_keras_object(model))


@pytest.mark.parametrize("link", ["external link", "soft link", "external data"])
def test_weights_outside_the_model_file_are_refused(
    members: dict[str, bytes], tmp_path: Path, link: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))
    stream, name = io.BytesIO(members["model.weights.h5"]), "layers/conv2d/vars/1"
    with h5py.File(stream, "a") as file:  # the bias of the first convolution, one float32
        assert file[name].shape == (1,)
        del file[name]
        if link == "external data":
            file.create_dataset(name, (1,), "f4", external=[(str(tmp_path / "secret"), 0, 4)])
        else:
            soft = h5py.SoftLink("/layers/conv2d_1/vars/1")
            file[name] = soft if link == "soft link" else h5py.ExternalLink("/etc/passwd", "/")
    path = packed(tmp_path / "a.keras", {**members, "model.weights.h5": stream.getvalue()})
    with pytest.raises(segment.SegmentError, match="not a whole, safe Keras 3 model file"):
        segment.load_model(path)


@repeatable(max_examples=12)
@given(st.data())
def test_a_damaged_model_file_is_loaded_or_refused_by_name(
    members: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(members)))
    content = bytearray(members[name])
    for place, value in data.draw(damage):
        content[int(place * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = packed(Path(folder) / "a.keras", {**members, name: bytes(content)})
        try:
            assert segment.load_model(path).input_shape[1:] == (16, 16, 3)
        except segment.SegmentError as error:
            assert str(path) in str(error)


def test_unusual_file_names_are_kept_in_the_scores_and_the_masks(tmp_path: Path) -> None:
    names = ["a b", "it's", 'say "x"', "-rf", "=1+1", "@cmd", "naïve 皮膚", "two\nlines", "a,b"]
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (*names, ".hidden"):
        Image.new("RGB", (8, 8), (90, 80, 70)).save(folder / f"{name}.png")
    images = segment.find_images(folder)
    batches = segment.create_generator(images, image_size=(16, 16))
    predictions = np.ones((len(images), 16, 16, 1), np.float32)
    segment.results(batches, predictions, num_imgs=0, output_dir=tmp_path / "out")
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert sorted(ids) == sorted(names)
    masks = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert masks == {f"{name}_segmentation.png" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
