"""Subgroups of the images by a table or by what is measured in them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segment


def score(i: int, dice: float) -> dict[str, object]:
    return {"id": f"ISIC_{i:07}", "dice": dice, "jaccard": dice / (2 - dice), "lesion": str(i // 2)}


def table(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "metadata.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8-sig"))
    return path


def test_each_group_has_its_count_mean_and_failures() -> None:
    scores = [score(i, dice) for i, dice in enumerate((0.9, 0.8, 0.5, 0.7, 0.95))]
    sexes = {f"ISIC_{i:07}": {"sex": sex} for i, sex in enumerate(("f", "m", "f", "Unknown", "m"))}
    rows = segment.subgroups(scores, sexes)
    shown = [(row["property"], row["group"], row["images"], row["failures"]) for row in rows]
    assert shown == [("sex", "f", 2, 1), ("sex", "m", 2, 0), ("sex", "missing", 1, 1)]
    assert [row["dice"] for row in rows] == pytest.approx([0.7, 0.875, 0.7])
    assert rows[2]["ci95"] is None


def test_numbers_are_grouped_by_quartile_and_few_ones_as_they_are() -> None:
    scores = [score(i, 0.9) for i in range(20)]
    ages = {str(row["id"]): {"age": i, "stage": i % 3} for i, row in enumerate(scores)}
    rows = segment.subgroups(scores, ages)
    groups = [(row["group"], row["images"]) for row in rows]
    assert groups == [
        ("0 to 4.75", 5), ("4.75 to 9.5", 5), ("9.5 to 14.25", 5), ("14.25 to 19", 5),
        ("0", 7), ("1", 7), ("2", 6),
    ]  # fmt: skip
    ages["ISIC_0000000"]["age"] = ""  # type: ignore[assignment]
    missing = [row for row in segment.subgroups(scores, ages) if row["group"] == "missing"]
    assert [row["images"] for row in missing] == [1]


def test_quartiles_of_large_numbers_have_names_of_their_own() -> None:
    scores = [score(i, 0.9) for i in range(100)]
    sizes = {str(row["id"]): {"size": 100_000 + i} for i, row in enumerate(scores)}
    assert [row["images"] for row in segment.subgroups(scores, sizes)] == [25] * 4


def test_ids_and_constants_are_not_grouped() -> None:
    scores = [score(i, 0.9) for i in range(30)]
    names = {str(row["id"]): {"name": f"n{i}", "source": "ISIC"} for i, row in enumerate(scores)}
    assert segment.subgroups(scores, names) == []


@pytest.mark.parametrize(
    "text",
    [
        "image_id,age,sex\nISIC_0000001,55,male\nISIC_0000009,60,\n",
        "lesion_id;image;age;sex\nHAM_1;ISIC_0000001.jpg;55;male\nHAM_1;other;1;\n",
        "image,age,sex\nISIC_0000001,55,male,a cell too many\nISIC_0000003\n",
        "age\tsex\tisic_id\n55\tmale\tisic_0000001\n",
        'image,note,age,sex\nISIC_0000001,"a ""b"", c",55,male\n',
        "sep=;\n\nimage;age;sex\n ISIC_0000001 ; 55; male\n",
        "row,age,image,sex\nISIC_0000001,1,x,f\nx,55,ISIC_0000001,male\n",
        "file|age|sex\nC:\\photos\\ISIC_0000001.jpg|55|male\n",
    ],
)
def test_a_table_is_matched_by_the_column_of_the_ids(tmp_path: Path, text: str) -> None:
    path = table(tmp_path, text)
    with pytest.warns(UserWarning, match=r"1 of 2 images have no row \(ISIC_0000002\)"):
        rows = segment.read_metadata(path, ["ISIC_0000001", "ISIC_0000002"])
    assert list(rows) == ["ISIC_0000001"]
    assert (rows["ISIC_0000001"]["age"], rows["ISIC_0000001"]["sex"]) == ("55", "male")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,age\nISIC_7,55\n", r"metadata\.csv: no column holds the id of one of these 1"),
        ("", r"metadata\.csv: no column holds the id"),
        ("Our table\nimage,age\nISIC_0000001,55\n", "no column .*, beside columns about them"),
        (b"\xff\xfe\0", r"metadata\.csv: expected a CSV file"),
    ],
)
def test_a_table_of_other_images_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(segment.SegmentError, match=message):
        segment.read_metadata(table(tmp_path, text), ["ISIC_0000001"])
    with pytest.raises(segment.SegmentError, match=r"nowhere\.csv: expected a CSV file"):
        segment.read_metadata(tmp_path / "nowhere.csv", ["ISIC_0000001"])


def test_size_and_contrast_are_measured_in_the_decoded_pair(tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    image[10:20, 10:40], mask[10:20, 10:40] = 80, 255
    for name, pixels in {"ISIC_1.png": image, "ISIC_1_segmentation.png": mask}.items():
        Image.fromarray(pixels).save(tmp_path / name)
    pairs = segment.find_image_pairs(tmp_path, tmp_path)
    generator = segment.create_generator(*pairs, image_size=(40, 60))
    row = {"id": "ISIC_1"}
    properties = segment._examine_pairs([row], generator)["ISIC_1"].values()
    assert list(properties) == pytest.approx([0.0024, 12.5, 120])
    assert row["lesion"] == "ISIC_1"
