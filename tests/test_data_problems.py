"""Bad data: every problem in one report of file, line and reason; `skip_bad` leaves those images out; nothing on disk changes."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from data_support import CAR, coco_dict, line, write_coco, write_image, write_kitti

from kdkernels.data import BadDataError, Problem, load_dataset


def _report(root, **options):
    with pytest.raises(BadDataError) as caught:
        load_dataset(root, **options)
    return caught.value.problems


def _hashes(root):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "text, reason",
    [
        (line("Car", (10, 20, 10, 39)), "box without area (10, 20, 10, 39)"),
        (line("Car", (29, 20, 10, 39)), "box without area (29, 20, 10, 39)"),
        (line("Car", (70, 20, 90, 39)), "box (70, 20, 91, 40) outside the image of 64 x 48 pixels"),
        (line("Car", (-9, 20, 30, 39)), "box (-9, 20, 31, 40) outside the image of 64 x 48 pixels"),
        (line("Car", (10, 20, 30, 52)), "box (10, 20, 31, 53) outside the image of 64 x 48 pixels"),
        (line("Lorry"), "unknown class 'Lorry'"),
        (line("car"), "unknown class 'car'"),
        (CAR.replace("39.00", "nan"), "column 8 is nan"),
        (CAR.replace("20.00 -1.57", "inf -1.57"), "column 14 is inf"),
        (CAR.replace("29.00", "x"), "column 7 is not a number: 'x'"),
        (CAR.rpartition(" ")[0], "14 columns, 15 wanted"),
        (CAR + " 0.9", "16 columns, 15 wanted (a 16th, the score, belongs to result files)"),
        ("Car", "1 columns, 15 wanted"),
    ],
)
def test_bad_line(tmp_path, text, reason):
    root = write_kitti(tmp_path, {"a": [CAR, text, CAR], "b": [CAR]})
    (problem,) = _report(root)
    assert problem.file == str(root / "training" / "label_2" / "a.txt")
    assert problem.line == 2
    assert problem.reason.startswith(reason)


@pytest.mark.parametrize("edge", [-2, -1.5, -0.4])
def test_rounding_outside_the_image_is_clipped(tmp_path, edge):
    root = write_kitti(tmp_path, {"a": [line("Car", (edge, edge, 64.9, 48.9))]})
    assert load_dataset(root)[0][1]["boxes"].tolist() == [[0, 0, 64, 48]]


def test_a_box_that_only_the_tolerance_would_save_is_refused(tmp_path):
    root = write_kitti(tmp_path, {"a": [line("Car", (64.2, 3, 64.8, 30))]})
    assert "outside the image" in _report(root)[0].reason


def test_everything_at_once(tmp_path):
    names = ("cut", "empty", "good", "nolabel", "notimage", "text", "twice", "unknown")
    root = write_kitti(tmp_path, {name: [CAR] for name in names})
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:2000])
    (images / "notimage.png").write_text("hello")
    (images / "empty.png").write_bytes(b"")
    write_image(images / "twice.jpg")
    (labels / "nolabel.txt").unlink()
    (labels / "text.txt").write_bytes(CAR.encode() + b"\n\xff\xfe\x00\n")
    (labels / "unknown.txt").write_text(f"{line('Bus')}\n{CAR}\n{line('Train')}\n")
    (labels / "orphan.txt").write_text(CAR)
    before = _hashes(root)
    problems = _report(root)
    found = {(p.file.rpartition("/")[2], p.line): p.reason for p in problems}
    assert set(found) == {
        ("cut.png", None), ("notimage.png", None), ("empty.png", None), ("twice.png", None), ("nolabel.txt", None), ("text.txt", 2),
        ("unknown.txt", 1), ("unknown.txt", 3), ("orphan.txt", None),
    }  # fmt: skip
    assert len(problems) == len(found)
    assert "image cannot be read" in found["cut.png", None]
    assert "label file is missing" in found["nolabel.txt", None]
    assert "not UTF-8" in found["text.txt", 2]
    assert "second image of the name twice" in found["twice.png", None]
    assert "without an image" in found["orphan.txt", None]

    dataset = load_dataset(root, skip_bad=True)
    assert [item.name for item in dataset.items] == ["good", "twice"]
    assert dataset.problems == problems
    assert dataset[0][1]["labels"].tolist() == [1]
    assert _hashes(root) == before


def test_the_message_lists_every_problem(tmp_path):
    root = write_kitti(tmp_path, {"a": ["x"], "b": None})
    with pytest.raises(BadDataError) as caught:
        load_dataset(root)
    text = str(caught.value)
    assert text.startswith("2 problems in the data:")
    assert f"{root}/training/label_2/a.txt:1: 1 columns, 15 wanted" in text
    assert f"{root}/training/label_2/b.txt: label file is missing" in text
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert str(again) == text


def test_without_verify_headers_are_trusted(tmp_path):
    root = write_kitti(tmp_path, {"a": [CAR]})
    path = root / "training" / "image_2" / "a.png"
    path.write_bytes(path.read_bytes()[:2000])
    assert len(load_dataset(root, verify=False)) == 1
    assert "image cannot be read" in _report(root)[0].reason


def test_truncated_jpeg(tmp_path):
    root = write_kitti(tmp_path, {"a": [CAR]}, ".jpg")
    path = root / "training" / "image_2" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    assert "image cannot be read" in _report(root)[0].reason


def test_only_the_asked_split_is_checked_and_progress_is_told(tmp_path):
    root = write_kitti(tmp_path, {f"{i:03d}": [CAR if i != 7 else "x"] for i in range(20)})
    seen = []
    parts = {split: load_dataset(root, split=split, skip_bad=True, progress=lambda *a: seen.append(a)) for split in ("train", "val")}
    assert sum(len(part.problems) for part in parts.values()) == 1
    assert len(parts["train"]) + len(parts["val"]) == 19
    assert len(seen) == 20
    assert {done for done, total in seen if done == total} == {total for _, total in seen}


COCO_CASES = {
    "bbox of three": (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "is not four numbers"),
    "bbox text": (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, "4"]), "is not four numbers"),
    "bbox missing": (lambda d: d["annotations"][0].pop("bbox"), "bbox None is not four numbers"),
    "bbox nan": (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "is not finite"),
    "no width": (lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 4]), "box without area"),
    "outside": (lambda d: d["annotations"][0].update(bbox=[60, 2, 20, 4]), "outside the image of 64 x 48"),
    "area": (lambda d: d["annotations"][0].update(area=float("nan")), "area nan"),
    "category": (lambda d: d["annotations"][0].update(category_id=4), "unknown class: category 4"),
    "category missing": (lambda d: d["annotations"][0].pop("category_id"), "unknown class: category None"),
    "annotation id": (lambda d: d["annotations"][0].update(id=d["annotations"][1]["id"]), "repeats an id"),
    "annotation id text": (lambda d: d["annotations"][0].update(id="7"), "no whole number"),
    "image id": (lambda d: d["images"][0].update(id=d["images"][1]["id"]), "repeats the id 20"),
    "image entry": (lambda d: d["images"][0].pop("file_name"), "images[0] has no whole number 'id' and text 'file_name'"),
    "no such image": (lambda d: d["annotations"][0].update(image_id=99), "names the image 99, which is not in the file"),
    "annotation entry": (lambda d: d["annotations"].append(3), "annotations[6] is no object"),
    "category entry": (lambda d: d["categories"].append({"id": "x"}), "categories[2] has no whole number"),
    "category twice": (lambda d: d["categories"].append({"id": 3, "name": "x"}), "categories[2] repeats the id 3"),
    "size": (lambda d: d["images"][0].update(width=48, height=64), "image of 64 x 48 pixels, the annotations say 48 x 64"),
}


@pytest.mark.parametrize("case", COCO_CASES)
def test_bad_coco(tmp_path, case):
    change, reason = COCO_CASES[case]
    data = coco_dict(3)
    root = write_coco(tmp_path, data)
    change(data)
    (root / "annotations.json").write_text(json.dumps(data))
    problems = _report(root, format="coco")
    assert any(reason in p.reason for p in problems), problems
    dataset = load_dataset(root, "coco", skip_bad=True)
    assert dataset.problems == problems
    whole = case in ("annotation entry", "category entry", "category twice", "no such image")
    assert 1 <= len(dataset) <= 3
    assert (len(dataset) == 3) == whole
    assert all(len(target["boxes"]) in (1, 2) for _, target in (dataset[i] for i in range(len(dataset))))


@pytest.mark.parametrize(
    "content, line_number, reason",
    [
        (b'{"images": [],\n "annotations": oops}', 2, "no JSON"),
        (b"[1, 2]", None, "the list 'images' is missing"),
        (b'{"images": [], "annotations": []}', None, "the list 'categories' is missing"),
        (b'{"images": "\xff"}', None, "cannot be read"),
    ],
)
def test_no_coco_file(tmp_path, content, line_number, reason):
    (tmp_path / "annotations.json").write_bytes(content)
    for skip_bad in (False, True):
        (problem,) = _report(tmp_path, format="coco", skip_bad=skip_bad)
        assert problem.line == line_number
        assert reason in problem.reason


def test_missing_image_of_a_coco_file(tmp_path):
    root = write_coco(tmp_path, coco_dict(2))
    (root / "images" / "000020.png").unlink()
    (problem,) = _report(root, format="coco")
    assert problem == Problem(str(root / "images" / "000020.png"), None, "image file is missing")
    assert len(load_dataset(root, "coco", skip_bad=True)) == 1
