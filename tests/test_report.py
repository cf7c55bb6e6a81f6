"""The page `report.html`: tables, plots and a gallery in a single file."""

import base64
import errno
import io
import os
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakePairs, draw_lesion
from PIL import Image

import segment

FRAME = (64, 64)
UNCLOSED = {"meta", "img", "input", "br", "path", "circle", "tr", "td"}  # or closed at once
HISTORY = {"loss": [3.0, 2, 1], "val_loss": [3.0, 2, 2]}
NAMES = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "it's", "a & b &amp; c", "a#b",
    "100%25", "naïve 皮膚", "$dots", "<!-- cards -->", "two\nlines",
]  # fmt: skip


class _Page(HTMLParser):
    """The elements of a page as `[tag, attributes, text]`, all of which must be closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [len(self.elements)] * (tag not in UNCLOSED)
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.elements if name == tag]

    def cards(self) -> list[tuple[dict[str, str], str]]:
        return [(attrs, text) for attrs, text in self.all("a") if "data-id" in attrs]

    def thumbnails(self) -> list[np.ndarray]:
        images = [attrs["src"] for attrs, _ in self.all("img") if "loading" in attrs]
        files = [base64.b64decode(re.sub("^data:image/jpeg;base64,", "", src)) for src in images]
        return [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in files]

    def table(self, i: int) -> list[list[str]]:
        rows = re.findall("<table>(.*?)</table>", self.source)[i].split("<tr><td>")[1:]
        return [[unescape(cell) for cell in row.split("<td>")] for row in rows]


def predict(generator: segment.ImageGenerator) -> np.ndarray:
    """The true masks, each later one without a wider strip of the lesion's left."""
    predictions = np.concatenate([generator[i][1] for i in range(len(generator))]).astype(float)
    for i, prediction in enumerate(predictions):
        prediction[:, : 20 + 6 * i] = 0
    return predictions


def rim(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask beside one that is not, or beside the edge."""
    around = np.pad(mask > 0, 1)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return (mask > 0) & ~inside


def like(picture: np.ndarray, name: str) -> np.ndarray:
    """The pixels that are closer to a colour than to the others of a drawn lesion with outlines."""
    colors = {"skin": (222, 180, 160), "lesion": (110, 60, 40), "lime": (0, 255, 0)}
    colors["magenta"] = (255, 0, 255)
    distances = [np.abs(picture - color).sum(-1) for color in colors.values()]
    return np.asarray(np.argmin(distances, axis=0) == list(colors).index(name))


def is_outline(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether all but a few pixels are the same, since a JPEG blurs the tips."""
    return bool((found != expected).sum() <= 0.03 * expected.sum())


def test_the_page_is_a_single_well_formed_file(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator = segment.create_generator(*make_pairs(3, (90, 120)), image_size=FRAME)
    segment.results(generator, predict(generator), output_dir=tmp_path, history=HISTORY)
    page = _Page(tmp_path)
    written = re.sub(r"base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|[\"'(]//|url\(|@import", written)
    sources = [attrs["src"] for _, attrs, _ in page.elements if "src" in attrs]
    assert Counter(src[:16] for src in sources) == {"data:image/jpeg;": 3, "data:image/png;b": 2}
    links = [attrs["href"] for _, attrs, _ in page.elements if "href" in attrs]
    assert set(links) == {"#0", "#1", "#2"}
    assert [attrs for attrs, _ in page.all("script")] == [{}]
    assert not any(name.startswith("on") for _, attrs, _ in page.elements for name in attrs)


def test_every_image_has_one_card_with_its_scores(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator = segment.create_generator(*make_pairs(5, (90, 120)), image_size=FRAME)
    scores = segment.results(generator, predict(generator), output_dir=tmp_path)
    page = _Page(tmp_path)
    assert [text.strip() for _, text in page.cards()] == [score["id"] for score in scores]
    for i, ((attrs, _), score) in enumerate(zip(page.cards(), scores, strict=True)):
        assert (attrs["id"], attrs["href"], attrs["data-id"]) == (f"{i}", f"#{i}", score["id"])
        numbers = {name: segment._text(value) for name, value in score.items() if name != "id"}
        assert {name: attrs[f"data-{name}"] for name in numbers} == numbers
        assert attrs["title"] == ", ".join(f"{name} {number}" for name, number in numbers.items())
    options = [text for _, text in page.all("option")]
    scores_and_lesion = [*segment.METRICS, *segment.DISTANCES, "estimated_dice", "lesion"]
    assert options == [*scores_and_lesion, "id"]  # the first one is selected
    assert len(page.all("circle")) == 5
    for (dot, _), score in zip(page.all("circle"), scores, strict=True):
        place = 100 * score["estimated_dice"], 100 - 100 * score["dice"]
        assert (float(dot["cx"]), float(dot["cy"])) == pytest.approx(place)


def test_failures_are_marked_by_a_thresholded_jaccard_of_zero(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator = segment.create_generator(*make_pairs(5, (90, 120)), image_size=FRAME)
    scores = segment.results(generator, predict(generator), output_dir=tmp_path)
    cards = [attrs for attrs, _ in _Page(tmp_path).cards()]
    failed = [attrs["data-id"] for attrs in cards if attrs["data-thresholded_jaccard"] == "0.0000"]
    assert failed == [score["id"] for score in scores if score["jaccard"] < 0.65]
    assert 0 < len(failed) < 5


def test_thumbnails_show_both_outlines_at_their_pixels(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator = segment.create_generator(*make_pairs(3, (90, 120)), image_size=FRAME)
    predictions = predict(generator)
    segment.results(generator, predictions, output_dir=tmp_path)
    images, targets = generator[0]
    for i, thumbnail in enumerate(_Page(tmp_path).thumbnails()):
        assert thumbnail.shape == (48, 64, 3)  # without the black bars of the frame
        target, prediction = (rim(mask[i, 8:56, :, 0]) for mask in (targets, predictions >= 0.5))
        assert is_outline(like(thumbnail, "magenta"), prediction)
        assert is_outline(like(thumbnail, "lime"), target & ~prediction)
        rest = ~(target | prediction)
        assert np.abs(thumbnail - images[i, 8:56])[rest].mean() < 12  # a JPEG


@pytest.mark.parametrize(("side", "expected"), [(64, 64), (256, 256), (320, 320), (512, 256)])
def test_thumbnails_have_about_256_pixels(side: int, expected: int) -> None:
    image, mask = (np.asarray(picture) for picture in draw_lesion((side * 3 // 4, side), 0))
    coded = segment._thumbnail({"Input": image, "Prediction": mask > 0})
    thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded)))).astype(int)
    assert thumbnail.shape == (expected * 3 // 4, expected, 3)
    small = mask[:: side // expected, :: side // expected]
    assert is_outline(like(thumbnail, "magenta"), rim(small))
    assert not like(thumbnail, "lime").any()
    assert len(coded) < 25_000  # so that 2,000 of them take less than 50 MB


def test_names_are_shown_as_they_are_and_never_executed(tmp_path: Path) -> None:
    scores = [{"id": name, "estimated_dice": 0.5} for name in NAMES]
    (tmp_path / "histogram.png").write_bytes(b"")
    summary = segment.summarize(scores)
    segment._write_page(tmp_path, summary, scores, [""] * len(NAMES), None)
    page = _Page(tmp_path)
    assert [attrs["data-id"] for attrs, _ in page.cards()] == NAMES
    assert [text for _, text in page.cards()] == NAMES
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == len(NAMES) + 1


def test_odd_file_names_arrive_in_the_page(tmp_path: Path) -> None:
    names = [name for name in NAMES if "/" not in name]
    (tmp_path / "in").mkdir()
    for name in names:
        Image.new("RGB", (8, 8), (90, 80, 70)).save(tmp_path / "in" / f"{name}.png")
    batches = segment.create_generator(segment.find_images(tmp_path / "in"), image_size=(16, 16))
    predictions = np.ones((len(names), 16, 16, 1), np.float32)
    segment.results(batches, predictions, num_imgs=0, output_dir=tmp_path / "out")
    ids = [attrs["data-id"] for attrs, _ in _Page(tmp_path / "out").cards()]
    assert sorted(ids) == sorted(names)


def test_without_masks_the_page_shows_estimates(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator = segment.create_generator(make_pairs(3, (90, 120))[0], image_size=FRAME)
    predictions = np.zeros((3, *FRAME, 1))
    predictions[:, 20:40, 20:50] = 0.9
    segment.results(generator, predictions, output_dir=tmp_path)
    page = _Page(tmp_path)
    assert [text for _, text in page.all("option")] == ["estimated_dice", "id"]
    assert all("data-dice" not in attrs for attrs, _ in page.cards())
    hidden = [(tag, "".join(text)) for tag, attrs, text in page.elements if "hidden" in attrs]
    assert [tag for tag, _ in hidden] == ["div", "label", "span"]  # plot, filter, legend
    assert "failures" in hidden[1][1]
    for thumbnail in page.thumbnails():
        expected = rim(np.pad(np.ones((20, 30)), ((12, 16), (20, 14))))
        assert is_outline(like(thumbnail, "magenta"), expected)
        assert not like(thumbnail, "lime").any()


def test_the_learning_curves_are_shown_only_if_there_is_a_history(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    generator = segment.create_generator(*make_pairs(1, (90, 120)), image_size=FRAME)
    for history, names in ((HISTORY, ["histogram", "training"]), ({}, ["histogram"])):
        segment.results(generator, predict(generator), output_dir=tmp_path, history=history)
        page = _Page(tmp_path)  # an earlier training.png is still there
        files = [base64.b64encode((tmp_path / f"{name}.png").read_bytes()) for name in names]
        plots = [attrs["src"] for attrs, _ in page.all("img") if "loading" not in attrs]
        assert plots == [f"data:image/png;base64,{file.decode()}" for file in files]
        assert not any("hidden" in attrs for _, attrs, _ in page.elements)
        assert len(page.cards()) == 1


def test_the_tables_hold_the_numbers_of_the_summary_and_no_path(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = segment.create_generator(*make_pairs(4, (90, 120)), image_size=FRAME)
    monkeypatch.setattr(segment, "_mean_interval", lambda *_: [0.25, 0.75])
    bad, fitted = (("error", "unusable", "/home/jane/b.png"), ("warning", "resized masks", "a.png"))
    findings = [segment.Finding(*bad, "damaged"), *[segment.Finding(*fitted, "resized")] * 2]
    notes = {"model": "/home/jane/unet.keras"}
    scores = segment.results(
        generator, predict(generator), output_dir=tmp_path, notes=notes, findings=findings
    )
    page, summary = _Page(tmp_path), segment.summarize(scores)
    facts = dict(page.table(0)[1:])
    assert "jane" not in page.source
    assert (facts["resized_masks"], facts["images"], facts["threshold"]) == ("2", "4", "0.5000")
    assert facts["failures"] == str(summary["failures"])
    header, *rows = page.table(1)
    assert header == ["", "mean", "std", "median", "p10", "p90", "min", "max", "ci95"]
    numbers = [f"{summary['dice'][name]:.4f}" for name in header[1:-1]]
    assert rows[0] == ["dice", *numbers, "0.2500 – 0.7500"]
    assert [row[0] for row in rows] == [*segment.METRICS, *segment.DISTANCES, "estimated_dice"]


def test_any_rows_become_a_table() -> None:
    rows = [{"site": "<leg>", "n": 7}, {"site": "arm", "dice": 0.123456, "ci95": [0.1, None]}]
    assert segment._table(rows) == (
        "<table><tr><td>site<td>n<td>dice<td>ci95<tr><td>&lt;leg&gt;<td>7<td><td>"
        "<tr><td>arm<td><td>0.1235<td>0.1000 – </table>"
    )


def test_no_image_is_decoded_again_for_the_page(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = make_pairs(4, (90, 120))
    generator = segment.create_generator(images, masks, image_size=FRAME)
    decode, decoded = segment._decode, list[str]()

    def spy(path: str, *rest: Any, **options: Any) -> Any:
        decoded.append(path)
        return decode(path, *rest, **options)

    monkeypatch.setattr(segment, "_decode", spy)
    segment.results(generator, predict(generator), output_dir=tmp_path)
    assert Counter(decoded) == {**dict.fromkeys(images, 1), **dict.fromkeys(masks, 2)}


def test_a_page_that_cannot_be_written_is_named_and_left_whole(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = segment.create_generator(*make_pairs(2, (90, 120)), image_size=FRAME)
    segment.results(generator, predict(generator), output_dir=tmp_path)
    before, files = _Page(tmp_path).source, sorted(os.listdir(tmp_path))

    def fail(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment, "_card", fail)
    with pytest.raises(segment.SegmentError, match=r"report\.html: cannot be written \(No space"):
        segment.results(generator, predict(generator), output_dir=tmp_path)
    assert (_Page(tmp_path).source, sorted(os.listdir(tmp_path))) == (before, files)


def test_thumbnails_are_not_among_the_scores(make_pairs: MakePairs, tmp_path: Path) -> None:
    generator = segment.create_generator(*make_pairs(1, (90, 120)), image_size=FRAME)
    written = segment.results(generator, predict(generator), output_dir=tmp_path)
    assert written == segment.results(generator, predict(generator))
    assert [path.name for path in tmp_path.glob("*.html")] == ["report.html"]
