"""The dataset class, the split, resizing and augmentation."""

from __future__ import annotations

import pickle

import pytest
import torch
from data_support import CAR, kitti_root, line, write_kitti
from torch.utils.data import DataLoader

from kdkernels.data import Augment, DetectionDataset, collate, load_dataset, sample_seed
from kdkernels.data.split import names_hash, position, split_names
from kdkernels.data.transforms import IMAGE_MEAN, IMAGE_STD, hflip


@pytest.fixture
def dataset(tmp_path):
    return load_dataset(
        write_kitti(tmp_path, {f"{i:06d}": [line("Car", (i, 2, i + 9, 21)), line("Cyclist")][: 1 + i % 2] for i in range(10)})
    )


def test_a_sample(dataset):
    image, target = dataset[3]
    assert (image.dtype, image.shape) == (torch.float32, (3, 48, 64))
    assert image.is_contiguous()
    assert image.mul(255).round().byte().permute(1, 2, 0).numpy().tolist() == dataset.pixels(3).tolist()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in target.items() if k != "image_id"} == {
        "boxes": (torch.float32, (2, 4)),
        "labels": (torch.int64, (2,)),
        "area": (torch.float32, (2,)),
        "iscrowd": (torch.int64, (2,)),
    }
    assert target["image_id"] == 4
    assert dataset[-1][1]["image_id"] == 10
    with pytest.raises(IndexError):
        dataset[10]
    assert len(list(dataset)) == 10


def test_changing_a_sample_does_not_change_the_next(dataset):
    image, target = dataset[0]
    before = image.clone()
    image.zero_()
    target["boxes"].zero_()
    assert dataset[0][0].equal(before)
    assert dataset[0][1]["boxes"].sum() > 0


def test_the_cache_reads_a_file_once(dataset):
    first = dataset[2][0]
    dataset.items[2].path.unlink()
    assert dataset[2][0].equal(first)
    assert dataset.subset([2])[0][0].equal(first)
    uncached = DetectionDataset(dataset.items, dataset.classes, cache=False)
    assert uncached[1][0].equal(dataset[1][0])
    with pytest.raises(FileNotFoundError):
        uncached[2]


def test_subset_keeps_order_ids_and_classes(dataset):
    part = dataset.subset([7, 1])
    assert [part[i][1]["image_id"] for i in range(2)] == [8, 2]
    assert part.classes == dataset.classes
    assert [image["id"] for image in part.coco()["images"]] == [8, 2]
    assert [a["id"] for a in part.coco()["annotations"]] == [1, 2, 3, 4]
    assert part.hash() == names_hash(["000001", "000007"]) != dataset.hash()


def test_resize_to_a_size_and_to_a_shorter_side(tmp_path):
    root = write_kitti(tmp_path, {"a": [line("Car", (8, 12, 31, 35))]})
    whole = load_dataset(root)
    for size, shape in (((24, 128), (24, 128)), (96, (96, 128)), (24, (24, 32))):
        dataset = load_dataset(root, size=size)
        image, target = dataset[0]
        assert image.shape[1:] == shape
        sy, sx = shape[0] / 48, shape[1] / 64
        assert target["boxes"].tolist() == [[8 * sx, 12 * sy, 32 * sx, 36 * sy]]
        assert target["area"].tolist() == [24 * 24 * sx * sy]
        assert dataset.coco()["annotations"][0]["bbox"] == [8 * sx, 12 * sy, 24 * sx, 24 * sy]
        assert dataset.coco()["images"][0]["width"] == shape[1]
        assert float((image.mean() - whole[0][0].mean()).abs()) < 0.01


def test_resize_real_frames(tmp_path):
    dataset = load_dataset(kitti_root(tmp_path), split="val", size=32)
    image, target = dataset[0]
    assert min(image.shape[1:]) == 32
    item = dataset.items[0]
    assert image.shape[1:] == (item.height, item.width)
    assert bool((target["boxes"][:, 2:] <= torch.tensor([item.width, item.height])).all())


def test_collate_and_workers_give_the_same_batches(dataset):
    augmented = dataset.with_transform(Augment())
    order = [[(i, sample_seed(0, 1, i)) for i in rows] for rows in ((3, 1, 4), (5, 9, 2))]
    plain = list(DataLoader(augmented, batch_sampler=order, collate_fn=collate))
    parallel = list(DataLoader(augmented, batch_sampler=order, collate_fn=collate, num_workers=1))
    for (images, targets), (images2, targets2), rows in zip(plain, parallel, order, strict=True):
        assert isinstance(images, list)
        assert [t["image_id"] for t in targets] == [i + 1 for i, _ in rows]
        assert all(a.equal(b) for a, b in zip(images, images2, strict=True))
        assert all(a["boxes"].equal(b["boxes"]) for a, b in zip(targets, targets2, strict=True))


def test_pickle(dataset):
    again = pickle.loads(pickle.dumps(dataset))
    assert again.items == dataset.items
    assert again[4][0].equal(dataset[4][0])


def test_flip_moves_boxes_with_the_pixels():
    image = torch.zeros(3, 8, 10)
    image[:, 2:5, 1:4] = 1
    target = {"boxes": torch.tensor([[1.0, 2, 4, 5]]), "labels": torch.tensor([1])}
    flipped, moved = hflip(image, target)
    x1, y1, x2, y2 = (int(v) for v in moved["boxes"][0])
    assert (x1, y1, x2, y2) == (6, 2, 9, 5)
    assert float(flipped[:, y1:y2, x1:x2].min()) == 1
    assert float(flipped.sum()) == 3 * 9
    again = hflip(flipped, moved)
    assert again[0].equal(image)
    assert again[1]["boxes"].equal(target["boxes"])
    assert target["boxes"].tolist() == [[1, 2, 4, 5]]
    assert hflip(image, {"boxes": torch.zeros(0, 4)})[1]["boxes"].shape == (0, 4)


def test_augmentation_is_that_of_the_normalised_image():
    image = torch.rand(3, 6, 7, dtype=torch.float64) * 0.2 + 0.4
    target = {"boxes": torch.tensor([[1.0, 2, 4, 5]])}
    generator = torch.Generator().manual_seed(5)
    flip, c, b = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    c, b = 0.75 + 0.5 * c, 0.3 * (2 * b - 1)
    got, _ = Augment(flip=0.0)(image, target, 5)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    want = ((image - mean) / std * c + b) * std + mean
    assert torch.allclose(got, want.clamp(0, 1), atol=1e-12)
    assert Augment(flip=1.0)(image, target, 5)[0].equal(got.flip(-1))


def test_augmentation_draws():
    image, target = torch.full((3, 4, 6), 0.5), {"boxes": torch.tensor([[1.0, 0, 3, 2]])}
    augment = Augment()
    flips, values = 0, []
    for seed in range(400):
        got, moved = augment(image, target, seed)
        flips += moved["boxes"][0, 0].item() == 3
        values.append(got[0, 0, 0].item())
    assert 160 < flips < 240
    # One grey: x = mean + c (0.5 - mean) + b std with c in 0.75..1.25 and |b| <= 0.3.
    spread = 0.25 * (0.5 - IMAGE_MEAN[0]) + 0.3 * IMAGE_STD[0]
    assert max(abs(v - 0.5) for v in values) <= spread + 1e-6
    assert max(values) - min(values) > 1.5 * spread
    assert image.unique().tolist() == [0.5]
    same, kept = Augment(flip=0, contrast=(1, 1), brightness=0)(image, target, 3)
    assert same is image
    assert kept is target
    assert 0 <= float(augment(torch.ones(3, 2, 2), {"boxes": torch.zeros(0, 4)}, 1)[0].max()) <= 1


def test_seeded_samples(dataset):
    augmented = dataset.with_transform(Augment())
    assert augmented[3, 17][0].equal(augmented[3, 17][0])
    assert not augmented[3, 17][0].equal(augmented[3, 18][0])
    assert augmented[3][0].equal(dataset[3][0])
    assert dataset[3, 17][0].equal(dataset[3][0])
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)}
    assert len(seeds) == 450
    assert all(0 <= s < 2**63 for s in seeds)


def test_split_is_a_partition_of_about_8_to_2():
    names = [f"{i:06d}" for i in range(4000)]
    train, val = (split_names(names, part, 3) for part in ("train", "val"))
    assert sorted(train + val) == list(range(4000))
    assert 0.78 < len(train) / 4000 < 0.82
    assert split_names(names, "train", 4) != train
    assert train == sorted(train)


def test_adding_images_does_not_move_the_others():
    names = [f"{i:04d}" for i in range(300)]
    few = {names[i] for i in split_names(names[:200], "val", 0)}
    many = {names[i] for i in split_names(names, "val", 0)}
    assert few == {name for name in many if int(name) < 200}


def test_split_values_are_fixed():
    # From sha256sum; the places must not change between releases, or recorded splits would be others.
    assert [round(position(name, 0), 6) for name in ("000000", "000001", "a/b")] == [0.325299, 0.896572, 0.865212]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_a_small_set_has_both_parts(count, seed):
    names = [f"n{i}" for i in range(count)]
    assert split_names(names, "train", seed)
    assert split_names(names, "val", seed)


def test_split_of_the_real_frames(tmp_path):
    root = kitti_root(tmp_path)
    parts = [load_dataset(root, split=part, seed=1, verify=False) for part in ("train", "val")]
    whole = load_dataset(root, verify=False)
    names = [[item.name for item in part.items] for part in (*parts, whole)]
    assert sorted(names[0] + names[1]) == names[2]
    assert len(names[0]) > len(names[1]) > 0
    ids = {item.name: item.image_id for item in whole.items}
    assert all(ids[item.name] == item.image_id for part in parts for item in part.items)


@pytest.mark.parametrize("argument", [{"format": "voc"}, {"split": "test"}, {"mapping": "loose"}])
def test_arguments_are_checked(tmp_path, argument):
    root = write_kitti(tmp_path, {"a": [CAR]})
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be one of"):
        load_dataset(root, **argument)
