"""The KITTI reader against files parsed by hand, on the real frames where they are."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from data_support import CAR, kitti_root, line, write_image, write_kitti
from PIL import Image

from kdkernels.data import load_dataset
from kdkernels.data.kitti import MAPPINGS, kitti_box, read_labels

TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")


def _raw(root):
    """name -> columns of every line."""
    return {p.stem: [t.split() for t in p.read_text().splitlines()] for p in sorted((root / "training" / "label_2").glob("*.txt"))}


@pytest.mark.parametrize("mapping", ["strict", "grouped"])
def test_every_object_of_the_folder_arrives(tmp_path, mapping):
    root = kitti_root(tmp_path)
    raw = _raw(root)
    dataset = load_dataset(root, "kitti", mapping=mapping)
    assert dataset.classes == ["Car", "Pedestrian", "Cyclist"]
    assert [item.name for item in dataset.items] == sorted(raw)
    assert [item.image_id for item in dataset.items] == list(range(1, len(raw) + 1))
    counts = Counter(MAPPINGS[mapping][columns[0]] for lines in raw.values() for columns in lines)
    assert dataset.class_counts() == {name: counts[name] for name in dataset.classes}
    for item in dataset.items:
        with Image.open(item.path) as image:
            assert image.size == (item.width, item.height)
        assert len(item.annotations) == len(raw[item.name])
        for annotation, columns in zip(item.annotations, raw[item.name], strict=True):
            assert annotation.type == columns[0]
            assert annotation.truncated == float(columns[1])
            assert annotation.occluded == int(columns[2])
            x1, y1, x2, y2 = (float(v) for v in columns[4:8])
            # Inclusive pixels become edges; what sticks out of the image by rounding is cut.
            expected = (max(x1, 0), max(y1, 0), min(x2 + 1, item.width), min(y2 + 1, item.height))
            assert annotation.box == pytest.approx(expected, abs=1e-9)
            assert annotation.area == pytest.approx((expected[2] - expected[0]) * (expected[3] - expected[1]))
            name = MAPPINGS[mapping][columns[0]]
            assert annotation.ignore == (name is None)
            assert annotation.label == (0 if name is None else dataset.classes.index(name) + 1)


def test_mappings_name_every_type_of_the_devkit():
    for mapping in MAPPINGS.values():
        assert sorted(mapping) == sorted(TYPES)
    assert {kind for kind, name in MAPPINGS["strict"].items() if name} == {"Car", "Pedestrian", "Cyclist"}
    assert {kind for kind, name in MAPPINGS["grouped"].items() if name == "Car"} == {"Car", "Van", "Truck", "Tram"}
    assert {kind for kind, name in MAPPINGS["grouped"].items() if name == "Pedestrian"} == {"Pedestrian", "Person_sitting"}


def test_inclusive_pixels(tmp_path):
    root = write_kitti(tmp_path, {"000000": [line("Car", (0, 0, 63, 47)), line("Cyclist", (10, 20, 29, 39))]})
    image, target = load_dataset(root)[0]
    assert image.shape == (3, 48, 64)
    assert target["boxes"].tolist() == [[0, 0, 64, 48], [10, 20, 30, 40]]
    assert target["labels"].tolist() == [1, 3]
    assert target["area"].tolist() == [64 * 48, 400]
    assert kitti_box((10, 20, 30, 40)) == (10, 20, 29, 39)


def test_ignored_types_do_not_train_but_are_in_the_ground_truth(tmp_path):
    root = write_kitti(tmp_path, {"a": [line("Van", (1, 2, 20, 30)), line("DontCare", (5, 5, 9, 9), -1, -1), line("Pedestrian")]})
    dataset = load_dataset(root)
    target = dataset[0][1]
    assert target["labels"].tolist() == [2]
    assert target["iscrowd"].tolist() == [0]
    annotations = dataset.coco()["annotations"]
    ignored = [a for a in annotations if a["iscrowd"]]
    assert sorted((a["type"], a["category_id"]) for a in ignored) == sorted((t, c) for t in ("Van", "DontCare") for c in (1, 2, 3))
    assert all(a["ignore"] == 1 for a in ignored)
    van = load_dataset(root, mapping="grouped")[0][1]
    assert van["labels"].tolist() == [1, 2]


def test_conversion_to_coco(tmp_path):
    root = kitti_root(tmp_path)
    dataset = load_dataset(root)
    data = json.loads(json.dumps(dataset.coco()))
    assert [c["id"] for c in data["categories"]] == [1, 2, 3]
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    assert min(image["id"] for image in data["images"]) == 1
    raw = _raw(root)
    names = {image["id"]: image["file_name"].partition(".")[0] for image in data["images"]}
    kept = [a for a in data["annotations"] if not a["iscrowd"]]
    wanted = [(name, c) for name, lines in raw.items() for c in lines if MAPPINGS["strict"][c[0]]]
    assert len(kept) == len(wanted)
    for annotation, (name, columns) in zip(kept, wanted, strict=True):
        assert names[annotation["image_id"]] == name
        assert (annotation["type"], annotation["truncated"], annotation["occluded"]) == (columns[0], float(columns[1]), int(columns[2]))
        assert data["categories"][annotation["category_id"] - 1]["name"] == columns[0]
        x, y, w, h = annotation["bbox"]
        assert annotation["area"] == pytest.approx(w * h)
        assert w == pytest.approx(float(columns[6]) - float(columns[4]) + 1, abs=2)
    ignored = sum(MAPPINGS["strict"][c[0]] is None for lines in raw.values() for c in lines)
    assert len(data["annotations"]) - len(kept) == 3 * ignored


def test_conversion_reads_back(tmp_path):
    root = write_kitti(tmp_path, {f"{i:06d}": [line("Car", truncated=0.5, occluded=2), line("DontCare", (1, 1, 9, 9))] for i in range(5)})
    kitti = load_dataset(root)
    (root / "annotations.json").write_text(json.dumps(kitti.coco()))
    coco = load_dataset(root, "coco")
    assert coco.classes == kitti.classes
    assert coco.coco() == kitti.coco()
    assert coco[2][1]["boxes"].equal(kitti[2][1]["boxes"])
    assert coco.hash() == kitti.hash()
    assert [i.name for i in load_dataset(root, "coco", "val").items] == [i.name for i in load_dataset(root, "kitti", "val").items]


def test_image_endings_grey_images_and_images_without_objects(tmp_path):
    root = write_kitti(tmp_path, {"a": [CAR], "b": []})
    write_kitti(root, {"c": [CAR]}, ".jpg")
    write_image(root / "training" / "image_2" / "d.PNG", mode="L")
    (root / "training" / "label_2" / "d.txt").write_text("\n" + CAR + "\r\n\n")
    for other in ("image_2/Thumbs.db", "image_2/._a.png", "label_2/._a.txt"):  # what file managers leave behind
        (root / "training" / other).write_bytes(b"no image")
    dataset = load_dataset(root)
    assert [item.path.name for item in dataset.items] == ["a.png", "b.png", "c.jpg", "d.PNG"]
    image, target = dataset[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64
    image, target = dataset[3]
    assert image.shape == (3, 48, 64)
    assert image[0].equal(image[1])
    assert len(target["boxes"]) == 1


def test_16_bit_palette_and_alpha_images(tmp_path):
    root = write_kitti(tmp_path, {"a": [], "b": [], "c": []})
    folder = root / "training" / "image_2"
    Image.new("I;16", (64, 48), 257 * 100).save(folder / "a.png")
    Image.new("P", (64, 48), 0).save(folder / "b.png")
    Image.new("RGBA", (64, 48), (10, 20, 30, 0)).save(folder / "c.png")
    dataset = load_dataset(root)
    assert dataset.pixels(0)[0, 0].tolist() == [100, 100, 100]
    assert dataset.pixels(1).shape == (48, 64, 3)
    assert dataset.pixels(2)[5, 5].tolist() == [10, 20, 30]


def test_training_folder_itself_as_root(tmp_path):
    root = write_kitti(tmp_path, {"a": [CAR]})
    assert len(load_dataset(root / "training")) == 1


def test_no_kitti_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no KITTI data in .*image_2 is not a folder"):
        load_dataset(tmp_path)


def test_read_labels_keeps_good_lines_next_to_bad_ones(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(f"{CAR}\nCar 1 2 3\n{CAR}\n")
    annotations, problems = read_labels(path, 64, 48)
    assert len(annotations) == 2
    assert [(p.line, p.reason) for p in problems] == [(2, "4 columns, 15 wanted")]
