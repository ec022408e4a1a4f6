"""COCO JSON and COCO-Traffic, against the JSON read by hand."""

from __future__ import annotations

import json

import pytest
from data_support import coco_dict, coco_root, write_coco, write_image

from kdkernels.data import BadDataError, load_dataset
from kdkernels.data.coco import TRAFFIC_CLASSES, find_coco

TRAFFIC_IDS = {1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 14, 17, 18}
SELECTING_IDS = {2, 3, 4, 6, 7, 8, 10, 11, 13}


def _raw(root):
    return json.loads((root / "annotations.json").read_text())


def test_every_box_of_the_file_arrives(tmp_path):
    root = coco_root(tmp_path)
    raw = _raw(root)
    dataset = load_dataset(root, "coco")
    categories = sorted(raw["categories"], key=lambda c: c["id"])
    assert dataset.classes == [c["name"] for c in categories]
    assert [item.image_id for item in dataset.items] == sorted(i["id"] for i in raw["images"])
    assert sum(dataset.class_counts().values()) == len(raw["annotations"])
    for index, item in enumerate(dataset.items):
        wanted = [a for a in raw["annotations"] if a["image_id"] == item.image_id]
        target = dataset.target(index)
        assert [categories[label - 1]["id"] for label in target["labels"].tolist()] == [a["category_id"] for a in wanted]
        assert target["area"].tolist() == pytest.approx([a["area"] for a in wanted])
        for box, annotation in zip(target["boxes"].tolist(), wanted, strict=True):
            x, y, w, h = annotation["bbox"]
            assert box == pytest.approx([max(x, 0), max(y, 0), min(x + w, item.width), min(y + h, item.height)], abs=1e-3)


def test_images_are_three_channels_whatever_the_file(tmp_path):
    dataset = load_dataset(coco_root(tmp_path), "coco")
    grey, empty = 0, 0
    for i in range(len(dataset)):
        image, target = dataset[i]
        item = dataset.items[i]
        assert image.shape == (3, item.height, item.width)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        grey += bool(image[0].equal(image[1]) and image[0].equal(image[2]))
        empty += len(target["boxes"]) == 0
    assert grey >= 1
    assert empty >= 1


def test_coco_traffic_rule(tmp_path):
    root = coco_root(tmp_path)
    raw = _raw(root)
    dataset = load_dataset(root, "coco-traffic")
    names = {c["id"]: c["name"] for c in raw["categories"]}
    assert dataset.classes == [names[n] for n in sorted(TRAFFIC_IDS)] == TRAFFIC_CLASSES
    assert len(dataset.classes) == 13
    kept = sorted({a["image_id"] for a in raw["annotations"] if a["category_id"] in SELECTING_IDS})
    assert [item.image_id for item in dataset.items] == kept
    assert 0 < len(kept) < len(raw["images"])
    boxes = [a for a in raw["annotations"] if a["image_id"] in kept and a["category_id"] in TRAFFIC_IDS]
    assert sum(dataset.class_counts().values()) == len(boxes)
    first = dataset.items[0]
    assert [dataset.classes[a.label - 1] for a in first.annotations] == [
        names[a["category_id"]] for a in boxes if a["image_id"] == first.image_id
    ]


def test_person_cat_dog_and_parking_meter_do_not_select(tmp_path):
    data = coco_dict(0)
    data["categories"] = [{"id": 100 + i, "name": name} for i, name in enumerate(reversed(TRAFFIC_CLASSES))]
    numbers = {c["name"]: c["id"] for c in data["categories"]}
    rows = [["person"], ["cat", "dog"], ["parking meter"], ["person", "stop sign"], [], ["bicycle"]]
    for i, row in enumerate(rows, start=1):
        data["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        for name in row:
            entry = {"id": len(data["annotations"]) + 1, "image_id": i, "category_id": numbers[name], "bbox": [1, 1, 9, 9], "iscrowd": 0}
            data["annotations"].append(entry)
    data["annotations"][-1]["iscrowd"] = 1  # a crowd of bicycles selects as well, and stays a crowd
    dataset = load_dataset(write_coco(tmp_path, data), "coco-traffic")
    assert [item.image_id for item in dataset.items] == [4, 6]
    assert [dataset.classes[label - 1] for label in dataset[0][1]["labels"].tolist()] == ["person", "stop sign"]
    assert len(dataset[1][1]["boxes"]) == 0
    assert [a["iscrowd"] for a in dataset.coco()["annotations"]] == [0, 0, 1]


def test_coco_traffic_needs_its_categories(tmp_path):
    root = write_coco(tmp_path, coco_dict(1))
    with pytest.raises(BadDataError, match="COCO-Traffic needs the categories person, bicycle"):
        load_dataset(root, "coco-traffic")


def test_labels_are_contiguous_and_ignore_counts_as_a_crowd(tmp_path):
    data = coco_dict(1)
    data["annotations"][1]["ignore"] = 1
    data["annotations"].append({"id": 99, "image_id": 10, "category_id": 3, "bbox": [30, 30, 10, 10], "area": 50, "iscrowd": 1})
    dataset = load_dataset(write_coco(tmp_path, data), "coco")
    assert dataset.classes == ["car", "dog"]
    target = dataset[0][1]
    assert target["labels"].tolist() == [1]
    assert target["area"].tolist() == [200]
    assert target["boxes"].tolist() == [[5, 6, 25, 21]]
    assert target["image_id"] == 10
    assert [(a["id"], a["category_id"], a["iscrowd"]) for a in dataset.coco()["annotations"]] == [(1, 1, 0), (2, 2, 1), (3, 1, 1)]


def test_size_and_area_may_be_left_out(tmp_path):
    data = coco_dict(1)
    root = write_coco(tmp_path, data)
    for entry in data["images"]:
        del entry["width"], entry["height"]
    for entry in data["annotations"]:
        del entry["area"], entry["iscrowd"]
    (root / "annotations.json").write_text(json.dumps(data))
    item = load_dataset(root, "coco").items[0]
    assert (item.width, item.height) == (64, 48)
    assert [a.area for a in item.annotations] == [300, 300]


@pytest.mark.parametrize("folder", ["images", "images/train2017", "train2017", "image_2", "training/image_2", "."])
def test_where_images_may_lie(tmp_path, folder):
    data = coco_dict(2)
    write_coco(tmp_path, data, images=False, file="annotations/instances_train2017.json")
    for entry in data["images"]:
        write_image(tmp_path / folder / entry["file_name"])
    dataset = load_dataset(tmp_path, "coco")
    assert len(dataset) == 2
    assert dataset.items[1].path.parent == tmp_path / folder
    assert len(load_dataset(tmp_path / "annotations" / "instances_train2017.json", "coco")) == 2


def test_coco_s_own_two_files_are_the_split(tmp_path):
    train, val = coco_dict(6), coco_dict(3)
    for data, name in ((train, "train2017"), (val, "val2017")):
        write_coco(tmp_path, data, images=False, file=f"annotations/instances_{name}.json")
        for entry in data["images"]:
            write_image(tmp_path / name / entry["file_name"])
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert len(load_dataset(tmp_path, "coco", "train")) == 6
    assert len(load_dataset(tmp_path, "coco", "val")) == 3
    with pytest.raises(ValueError, match="several annotation files"):
        load_dataset(tmp_path, "coco")


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no COCO data"):
        find_coco(tmp_path)


def test_names_of_images_in_subfolders_differ(tmp_path):
    data = coco_dict(2)
    for entry, name in zip(data["images"], ("a/1.png", "b/1.png"), strict=True):
        entry["file_name"] = name
    dataset = load_dataset(write_coco(tmp_path, data), "coco")
    assert [item.name for item in dataset.items] == ["a/1", "b/1"]
    assert [image["file_name"] for image in dataset.coco()["images"]] == ["a/1.png", "b/1.png"]
