"""The README agrees with the code."""

import re
from pathlib import Path

import numpy as np
import pytest

import segment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"{title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_function_table_names_every_public_function_and_no_other() -> None:
    table = "\n".join(re.findall(r"^\| (`.*?) \|", section("## segment.py"), re.MULTILINE))
    public = {name for name in segment.__all__ if name.islower()}  # create_generator is a class
    assert all(callable(getattr(segment, name)) for name in public)
    helpers = {"describe_device", "image_id", "letterbox", "save_figure", "summarize"}
    assert set(re.findall(r"`(\w+)`", table)) == public - helpers


@pytest.mark.parametrize("driver", ["driver_train_save_evaluate", "driver_load_evaluate"])
def test_the_drivers_number_their_steps_as_documented(driver: str) -> None:
    flows = section("## The documented flows")
    listed = re.split(r"^`driver", flows, flags=re.MULTILINE)
    (flow,) = (text for text in listed if f"`driver{text}".startswith(f"`{driver}"))
    code = (ROOT / f"{driver}.py").read_text()
    steps = re.findall(r"^\s+# (\d\. \w+)", code, re.MULTILINE)
    assert len(steps) > 5
    assert steps == re.findall(r"^(\d\. \w+)", flow, re.MULTILINE)


def test_ci_runs_the_documented_test_command() -> None:
    install, run = re.findall(r"pip install -r (tests/\S+) && (.*)", README)[0]
    check = (ROOT / ".ci" / "run").read_text()
    assert f"-r {install}" in check
    assert check.endswith(f"{run}\n")


@pytest.mark.parametrize("page", ["README.md", "tests/experiments.md"])
def test_every_link_to_a_file_or_a_heading_leads_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)(.*?)\)", (ROOT / page).read_text())
    assert len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), link
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE) if anchor else [""]
        assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_the_program_segments_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    (cell,) = re.findall(r"```python\n(.*?)```", section("## Use it in a program"), re.DOTALL)
    exported: list[object] = []
    monkeypatch.setattr(segment, "export_model", lambda *args, **_: exported.append(args[1]))
    photo, *_ = sorted((ROOT / "images" / "sample" / "input").iterdir())
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(cell, names)
    mask = names["mask"]
    assert isinstance(mask, np.ndarray)
    truth = segment.load_segmented_image(
        ROOT / "images" / "sample" / "truth" / f"{photo.stem}_segmentation.png", None
    )
    assert segment.score_masks(truth[..., 0], mask)["jaccard"] > 0.65
    assert exported == ["unet.onnx"]
