"""Counting and plotting image sizes."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

import segment


def widths(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]


def test_sizes_are_counted_with_the_most_frequent_first(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    sizes = [(30, 20), (10, 40), (30, 20), (10, 40), (30, 20), (8, 8)]  # (width, height)
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size).save(path)
    assert list(segment.inspect(paths).items()) == [((20, 30), 3), ((40, 10), 2), ((8, 8), 1)]


def test_only_the_header_is_read(tmp_path: Path) -> None:
    Image.effect_noise((200, 100), 50).save(tmp_path / "a.jpg")
    (tmp_path / "head.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])
    assert segment.inspect([tmp_path / "head.jpg"]) == {(100, 200): 1}
    with pytest.raises(segment.SegmentError, match="cannot be read"):
        segment.load_input_image(tmp_path / "head.jpg")


def test_skip_bad_ignores_files_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    assert segment.inspect(paths, skip_bad=True) == {(20, 30): 1}
    with pytest.raises(segment.SegmentError, match=r"b\.png: cannot be read as an image"):
        segment.inspect(paths)


def test_each_of_three_sizes_gets_a_bar() -> None:
    axes = segment.plot_image_sizes({(20, 30): 5, (40, 10): 2, (8, 8): 1}).axes[0]
    assert widths(axes) == [5, 2, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["20 × 30", "40 × 10", "8 × 8"]


def test_the_rarest_of_170_sizes_share_a_bar() -> None:
    sizes = {(100 + i, 200): 200 - i for i in range(170)}
    axes = segment.plot_image_sizes(sizes).axes[0]
    assert len(axes.patches) == 21
    assert axes.get_yticklabels()[-1].get_text() == "150 other sizes"
    assert sum(widths(axes)) == sum(sizes.values())
