"""Decoded pairs in memory and in the folder of a cache."""

import hashlib
import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment

SIZE = (32, 48)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were decoded, in order."""
    paths: list[str] = []
    decode = segment.load_input_image

    def spy(path: str, *arguments: Any) -> Any:
        paths.append(path)
        return decode(path, *arguments)

    monkeypatch.setattr(segment, "load_input_image", spy)
    return paths


def test_a_new_process_finds_in_the_folder_what_the_loaders_would_give(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    (image,), (mask,) = make_pairs(1)
    for _ in range(2):  # each with nothing in memory
        entry = segment.PairCache(0, tmp_path / "cache").load(image, mask, SIZE)
        np.testing.assert_array_equal(entry.mask, segment.load_segmented_image(mask, SIZE))
    assert decoded == [image]
    np.testing.assert_array_equal(entry.image, segment.load_input_image(image, SIZE))


def test_another_frame_and_a_file_that_changed_are_decoded_again(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    (image,), (mask,) = make_pairs(1)
    cache = segment.PairCache(folder=tmp_path / "cache")
    cache.load(image, mask, SIZE)
    assert cache.load(image, mask, (16, 16)).image.shape == (16, 16, 3)
    Image.new("RGB", Image.open(image).size, (1, 2, 3)).save(image)
    os.utime(image, ns=(0, 0))
    assert cache.load(image, mask, SIZE).image.max() == 3
    assert segment.PairCache(0, tmp_path / "cache").load(image, mask, SIZE).image.max() == 3
    assert len(decoded) == 3


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_damaged_entry_is_decoded_again_and_replaced(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str], content: bytes | None
) -> None:
    (image,), (mask,) = make_pairs(1)
    expected = segment.PairCache(0, tmp_path).load(image, mask, SIZE)
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    for _ in range(2):
        np.testing.assert_array_equal(
            segment.PairCache(0, tmp_path).load(image, mask, SIZE).image, expected.image
        )
    assert len(decoded) == 2


def test_threads_that_share_a_folder_leave_one_whole_entry(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    (image,), (mask,) = make_pairs(1)
    folder = tmp_path / "cache"
    caches = [segment.PairCache(0, folder) for _ in range(8)]
    threads = [threading.Thread(target=c.load, args=(image, mask, SIZE)) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    assert hashlib.sha256(content[32:]).digest() == content[:32]
    assert np.load(io.BytesIO(content[32:])).shape == (*SIZE, 3)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(segment.SegmentError, match=r"entry\.npy: cannot be written"):
        segment.PairCache(0, tmp_path / "file" / "cache")


def test_a_disk_that_fills_up_is_warned_of_once_and_stops_nothing(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    cache = segment.PairCache(0, tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    (image, other), (mask, another) = make_pairs(2)
    with pytest.warns(UserWarning, match=r"each time from now on: .*No space left"):
        assert cache.load(image, mask, SIZE).mask.shape == (*SIZE, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(other, another, SIZE).mask.shape == (*SIZE, 1)
    assert not list((tmp_path / "cache").iterdir())


def test_what_two_threads_decode_at_once_is_counted_once(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,), (mask,) = make_pairs(1)
    both, decode = threading.Barrier(2), segment._decode

    def wait(*arguments: Any) -> segment.Decoded:
        both.wait(10)
        return decode(*arguments)

    monkeypatch.setattr(segment, "_decode", wait)
    cache = segment.PairCache(max_bytes=10**6)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(cache.load, [image] * 2, [mask] * 2, [SIZE] * 2)
    np.testing.assert_array_equal(first.image, second.image)
    assert cache.bytes_left == 10**6 - first.nbytes


def test_the_check_leaves_nothing_to_decode_for_the_training_and_for_the_next_check(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    pairs = images, masks = make_pairs(3)
    Image.new("L", Image.open(masks[1]).size).save(masks[1])
    batches = segment.create_generator(*pairs, image_size=SIZE, augment=True)
    for _ in range(2):
        batches.cache = segment.PairCache(folder=tmp_path)
        findings = segment.check_pairs(*pairs, image_size=batches.decoded_size, cache=batches.cache)
        assert [finding.what for finding in findings] == [f"{masks[1]}: the mask is empty."]
        assert batches[0][0].shape == (3, *SIZE, 3)
    assert sorted(decoded) == sorted(images)


def test_a_missing_mask_is_never_taken_for_none(make_pairs: MakePairs) -> None:
    (image,), _ = make_pairs(1)
    cache = segment.PairCache()
    segment.create_generator([image], image_size=(16, 16), cache=cache)[0]
    batches = segment.create_generator([image], ["gone.png"], image_size=(16, 16), cache=cache)
    with pytest.raises(segment.SegmentError, match=r"gone\.png: there is no such file"):
        batches[0]


def test_an_entry_with_a_changed_byte_is_decoded_again(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    (image,), (mask,) = make_pairs(1)
    expected = segment.PairCache(0, tmp_path / "cache").load(image, mask, (16, 16))
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    for position in range(0, len(whole), 97):
        entry.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        found = segment.PairCache(0, tmp_path / "cache").load(image, mask, (16, 16))
        assert np.array_equal(found.image, expected.image)
        assert np.array_equal(found.mask, expected.mask)
