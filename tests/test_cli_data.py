"""`kdkernels data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import kdkernels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert kdkernels("data", "synthetic", tmp_path / "road", "--images", "4", "--seed", "5").exit_code == 0
    return tmp_path / "road"


def test_synthetic_data_is_kittis_layout_and_the_same_for_the_same_seed(data: Path, tmp_path: Path) -> None:
    kdkernels("data", "synthetic", tmp_path / "again", "-n", "4", "--seed", "5")
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 8 and Path("training/label_2/000003.txt") in files
    assert all((data / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_synthetic_does_not_overwrite(data: Path) -> None:
    result = kdkernels("data", "synthetic", data)
    assert result.exit_code == 2 and str(data) in result.stderr


def test_check_of_good_data_counts_the_objects(data: Path) -> None:
    result = kdkernels("data", "check", data)
    labels = " ".join(p.read_text(encoding="utf-8") for p in data.rglob("*.txt")).split()
    assert result.exit_code == 0
    assert "problems: 0; images without problems: 4" in result.stderr
    for name in ("Car", "Pedestrian", "Cyclist"):
        assert any(line.split()[1:4:2] == [name, str(labels.count(name))] for line in result.stdout.splitlines() if name in line)


def test_check_reports_every_problem_with_file_line_and_reason_and_changes_nothing(data: Path) -> None:
    labels = data / "training" / "label_2"
    (labels / "000000.txt").write_text(
        "Car 0 0 0 10 10 20 20 1 1 1 0 0 0 0\nBus 0 0\nCar 0 0 0 20 10 20 20 1 1 1 0 0 0 0\n", encoding="utf-8"
    )
    (labels / "000001.txt").unlink()
    (data / "training" / "image_2" / "000002.png").write_bytes(b"not an image")
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    result = kdkernels("data", "check", data)
    lines = result.stdout.splitlines()
    assert result.exit_code == 2
    assert f"{labels / '000000.txt'}:2: 3 columns, 15 wanted" in lines
    assert f"{labels / '000000.txt'}:3: box without area (20, 10, 20, 20)" in lines
    assert f"{labels / '000001.txt'}: label file is missing" in lines
    assert any(line.startswith(f"{data / 'training' / 'image_2' / '000002.png'}: image cannot be read") for line in lines)
    assert "problems: 4; images without problems: 1" in result.stderr
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before


def test_check_of_no_data_says_what_is_wanted(tmp_path: Path) -> None:
    result = kdkernels("data", "check", tmp_path)
    assert result.exit_code == 2 and "wanted: training/image_2 and training/label_2" in result.stderr


def test_convert_writes_coco_json_that_is_read_as_the_same_data(data: Path, tmp_path: Path) -> None:
    from kdkernels.data import load_dataset

    out = tmp_path / "sub" / "road.json"
    result = kdkernels("data", "convert", data, out)
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text(encoding="utf-8")) == load_dataset(data, "kitti").coco()
    assert f"4 images, {len(json.loads(out.read_text())['annotations'])} annotations, 3 classes in {out}" in result.stderr.replace(
        "\n", " "
    )


def test_convert_takes_a_part_of_the_split(data: Path, tmp_path: Path) -> None:
    names = []
    for part in ("train", "val"):
        kdkernels("data", "convert", data, tmp_path / f"{part}.json", "--split", part)
        images = json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8"))["images"]
        names += [Path(image["file_name"]).name for image in images]
    assert sorted(names) == [f"{i:06d}.png" for i in range(4)]


def test_convert_refuses_bad_data_and_skips_it_when_told(data: Path, tmp_path: Path) -> None:
    (data / "training" / "label_2" / "000002.txt").write_text("Car nan\n", encoding="utf-8")
    result = kdkernels("data", "convert", data, tmp_path / "x.json")
    assert result.exit_code == 2
    assert "000002.txt:1: 2 columns, 15 wanted" in result.stderr and "--skip-bad" in result.stderr
    assert not (tmp_path / "x.json").exists()
    assert kdkernels("data", "convert", data, tmp_path / "x.json", "--skip-bad").exit_code == 0
    assert len(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["images"]) == 3
