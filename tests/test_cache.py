"""Decoded pairs in memory and in the folder of a cache."""

import gc
import os
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs
from PIL import Image

import segment

SIZE = (32, 48)
TWICE = (64, 96)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images and masks that are decoded, in order."""
    paths: list[str] = []

    def spy(path: str, sizes: Any, *, mask: bool, **options: Any) -> Any:
        paths.append(path)
        return decode(path, sizes, mask=mask, **options)

    decode = segment._decode
    monkeypatch.setattr(segment, "_decode", spy)
    return paths


def test_a_new_process_reads_the_decoded_pair_from_the_folder(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    (image,), (mask,) = make_pairs(1)
    pairs = [segment.PairCache(0, tmp_path / "cache").load(image, mask, SIZE) for _ in range(2)]
    assert decoded == [image, mask]
    expected = segment.load_input_image(image, SIZE), 255 * segment.load_segmented_image(mask, SIZE)
    for pair in pairs:
        assert pair.dtype == np.uint8
        np.testing.assert_array_equal(pair, np.concatenate(expected, axis=2))


def test_every_frame_is_kept_after_a_single_decoding(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    (image,), (mask,) = make_pairs(1)
    cache = segment.PairCache(folder=tmp_path / "cache")
    assert cache.load(image, mask, TWICE, SIZE).shape == (*TWICE, 4)
    for other in (cache, segment.PairCache(0, tmp_path / "cache")):
        pair = other.load(image, mask, SIZE)
        np.testing.assert_array_equal(pair[..., 3:], 255 * segment.load_segmented_image(mask, SIZE))
    assert Counter(decoded) == {image: 1, mask: 3}  # twice by the line above


def test_another_frame_and_a_changed_file_are_decoded_again(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    (image,), (mask,) = make_pairs(1)
    cache = segment.PairCache(folder=tmp_path / "cache")
    cache.load(image, mask, SIZE)
    assert cache.load(image, mask, (16, 16)).shape == (16, 16, 4)
    Image.new("RGB", Image.open(image).size, (1, 2, 3)).save(image)
    os.utime(image, ns=(0, 0))
    assert cache.load(image, mask, SIZE)[..., :3].max() == 3
    assert segment.PairCache(0, tmp_path / "cache").load(image, mask, SIZE)[..., :3].max() == 3
    assert decoded == [image, mask] * 3


@pytest.mark.parametrize(
    "damage", ["empty", "text", "truncated", "header", "another shape", "another type"]
)
def test_a_damaged_entry_is_decoded_again_and_replaced(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str], damage: str
) -> None:
    (image,), (mask,) = make_pairs(1)
    expected = segment.PairCache(0, tmp_path).load(image, mask, SIZE)
    (file,) = tmp_path.glob("*.npy")
    if damage == "another shape":
        np.save(file, expected[1:])
    elif damage == "another type":
        np.save(file, expected.astype(np.float32))
    else:
        whole = file.read_bytes()
        damaged = {"empty": b"", "text": b"none", "header": whole.replace(b")", b" ", 1)}
        file.write_bytes(damaged.get(damage, whole[:-1]))
    for _ in range(2):
        pair = segment.PairCache(0, tmp_path).load(image, mask, SIZE)
        np.testing.assert_array_equal(pair, expected)
    assert decoded == [image, mask] * 2


def test_an_entry_appears_in_the_folder_only_when_it_is_complete(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,), (mask,) = make_pairs(1)
    entries: list[list[Path]] = []
    save = np.save

    def spy(file: Any, pair: segment.Array) -> None:
        save(file, pair)
        entries.append([path for path in tmp_path.glob("*.npy") if path.name[0] != "."])

    monkeypatch.setattr(np, "save", spy)
    segment.PairCache(0, tmp_path).load(image, mask, SIZE)
    assert entries == [[]]
    assert [path.name[0] == "." for path in tmp_path.glob("*.npy")] == [False]


def test_threads_that_share_a_folder_leave_one_complete_entry(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    (image,), (mask,) = make_pairs(1)
    folder = tmp_path / "cache"
    caches = [segment.PairCache(0, folder) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(lambda cache: cache.load(image, mask, SIZE), caches))
    (file,) = folder.iterdir()  # no temporary file is left
    for pair in pairs:
        np.testing.assert_array_equal(np.load(file), pair)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(segment.SegmentError, match=r"pair\.npy: cannot be written"):
        segment.PairCache(0, tmp_path / "file" / "cache")


def test_a_full_disk_gives_one_warning_although_eight_threads_write(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_at_once = threading.Barrier(8)

    def full(file: Any, pair: segment.Array) -> None:
        Path(file).write_bytes(b"incomplete")
        all_at_once.wait(20)
        raise OSError(28, "No space left on device")

    cache = segment.PairCache(0, tmp_path / "cache")
    monkeypatch.setattr(np, "save", full)
    images, masks = make_pairs(8)
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        pairs = list(pool.map(cache.load, images, masks, [SIZE] * 8))
        cache.load(images[0], masks[0], SIZE)  # no longer tries to write
    assert [pair.shape for pair in pairs] == [(*SIZE, 4)] * 8
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("No more pairs are kept in a folder: ")
    assert "No space left on device" in message
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_folder_holds_is_read_even_when_its_disk_is_full(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = make_pairs(2)
    cache = segment.PairCache(0, tmp_path / "cache")
    pair = cache.load(images[0], masks[0], SIZE)

    def full(file: Any, pair: segment.Array) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No more pairs are kept in a folder: .*No space left"):
        cache.load(images[1], masks[1], SIZE)
    monkeypatch.setattr(segment, "_decode", None)
    np.testing.assert_array_equal(cache.load(images[0], masks[0], SIZE), pair)


def test_a_pair_that_two_threads_decode_at_once_is_counted_once(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,), (mask,) = make_pairs(1)
    both, decode = threading.Barrier(2), segment._decode

    def wait(path: str, sizes: Any, *, mask: bool, **options: Any) -> list[segment.Array]:
        both.wait(10)
        return decode(path, sizes, mask=mask, **options)

    monkeypatch.setattr(segment, "_decode", wait)
    cache = segment.PairCache(max_bytes=10**6)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(cache.load, [image] * 2, [mask] * 2, [SIZE] * 2)
    np.testing.assert_array_equal(first, second)
    assert cache.bytes_left == 10**6 - first.nbytes


def test_a_pair_that_two_threads_keep_at_once_is_counted_once(
    make_pairs: MakePairs,
) -> None:
    class SlowDict(dict[str, Any]):
        """Lets another thread run between the look-up of a name and what depends on it."""

        def __contains__(self, name: object) -> bool:
            found = super().__contains__(name)
            time.sleep(0.1)
            return found

    (image,), (mask,) = make_pairs(1)
    cache = segment.PairCache(max_bytes=10**6)
    cache._kept = SlowDict()
    with ThreadPoolExecutor(4) as pool:
        pair, *_ = pool.map(cache.load, [image] * 4, [mask] * 4, [SIZE] * 4)
    assert cache.bytes_left == 10**6 - pair.nbytes


def test_generators_without_a_cache_share_one_budget_until_they_are_gone(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_shared", type(segment._shared)())  # of this test only
    pairs = make_pairs(2)
    generators = [segment.create_generator(*pairs, image_size=size) for size in (SIZE, SIZE, TWICE)]
    assert len({id(generator.cache) for generator in generators}) == 1
    used = 0
    for generator, new in zip(generators, (SIZE, None, TWICE), strict=True):
        generator.batch_part(0)
        used += 2 * 4 * new[0] * new[1] if new else 0
        assert generator.cache.bytes_left == 2**31 - used
    del generators, generator
    gc.collect()
    fresh = segment.create_generator(*pairs, image_size=SIZE)
    assert fresh.cache.bytes_left == 2**31


def test_each_file_is_decoded_once_from_the_check_to_the_end_of_the_training(
    make_pairs: MakePairs, decoded: list[str]
) -> None:
    pairs = images, masks = make_pairs(5)
    cache = segment.PairCache()
    segment.check_pairs(*pairs, image_sizes=[TWICE, SIZE], cache=cache)
    segment.find_same_lesions(*pairs, image_size=SIZE, cache=cache)
    segment.train_val_test_split(*pairs, image_size=SIZE, cache=cache)
    train = segment.create_generator(
        *pairs, image_size=SIZE, augment=True, shuffle=True, cache=cache
    )
    val = segment.create_generator(*pairs, image_size=SIZE, cache=cache)
    for _ in range(2):
        for generator in (train, val):
            assert generator.batch_part(0).shape == (5, *SIZE, 4)
            generator.on_epoch_end()
    assert sorted(decoded) == sorted(images + masks)


def test_the_next_check_and_training_read_everything_from_the_folder(
    make_pairs: MakePairs, tmp_path: Path, decoded: list[str]
) -> None:
    pairs = images, masks = make_pairs(3)
    Image.new("L", Image.open(masks[1]).size).save(masks[1])
    what = f"{masks[1]}: the mask is empty at {SIZE[0]} × 45 pixels."
    for _ in range(2):
        cache = segment.PairCache(folder=tmp_path / "cache")
        findings = segment.check_pairs(*pairs, image_sizes=[SIZE, TWICE], cache=cache)
        assert [finding.what for finding in findings] == [what]
        train = segment.create_generator(*pairs, image_size=SIZE, augment=True, cache=cache)
        assert train.batch_part(0).shape == (3, *SIZE, 4)
    assert sorted(decoded) == sorted(images + masks)


def test_a_missing_mask_is_not_taken_for_an_image_without_a_mask(make_pairs: MakePairs) -> None:
    (image,), _ = make_pairs(1)
    cache = segment.PairCache()
    assert segment.create_generator([image], image_size=SIZE, cache=cache).batch_part(0).any()
    batches = segment.create_generator([image], ["gone.png"], image_size=SIZE, cache=cache)
    with pytest.raises(segment.SegmentError, match=r"gone\.png: there is no such file"):
        batches.batch_part(0)
