"""The synthetic road scenes: repeatable, valid KITTI, and a problem that is neither empty nor trivial."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from kdkernels.data import load_dataset
from kdkernels.data.canvas import SCALE, Camera, Canvas
from kdkernels.data.synthetic import MAX_OCCLUDED, MIN_HEIGHT, MIN_WIDTH, render_dataset, render_scene


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(3, i) for i in range(120)]


def test_same_seed_same_bytes(tmp_path):
    hashes = []
    for name, count, seed in (("a", 4, 5), ("b", 4, 5), ("c", 6, 5), ("d", 4, 6)):
        seen = []
        root = render_dataset(tmp_path / name, count, seed, progress=lambda *done, seen=seen: seen.append(done))
        assert seen == [(i + 1, count) for i in range(count)]
        files = sorted(p for p in root.rglob("*") if p.is_file())
        assert [str(p.relative_to(root)) for p in files] == [f"training/image_2/{i:06d}.png" for i in range(count)] + [
            f"training/label_2/{i:06d}.txt" for i in range(count)
        ]
        hashes.append({str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert hashes[0] == hashes[1]
    assert hashes[0].items() <= hashes[2].items()  # an image does not depend on how many there are
    assert not set(hashes[0].values()) & set(hashes[3].values())


def test_files_hold_what_was_rendered(tmp_path):
    root = render_dataset(tmp_path, 3, 1)
    dataset = load_dataset(root)
    for i in range(3):
        pixels, lines = render_scene(1, i)
        assert np.array_equal(np.asarray(Image.open(root / "training" / "image_2" / f"{i:06d}.png")), pixels)
        assert len(dataset.items[i].annotations) == len(lines)
    assert dataset.problems == []


def test_a_folder_with_data_is_left_alone(tmp_path):
    render_dataset(tmp_path, 1, 0)
    before = (tmp_path / "training" / "image_2" / "000000.png").read_bytes()
    with pytest.raises(FileExistsError):
        render_dataset(tmp_path, 1, 1)
    assert (tmp_path / "training" / "image_2" / "000000.png").read_bytes() == before


def test_pictures(scenes):
    for pixels, _ in scenes:
        assert (pixels.shape, pixels.dtype) == ((96, 320, 3), np.uint8)
        assert pixels.std() > 4  # never an empty picture
    means = [pixels.mean() for pixels, _ in scenes]
    assert max(means) - min(means) > 30  # different light


def test_labels(scenes):
    classes, heights, occluded, truncated, counts = Counter(), [], Counter(), 0, []
    for _, lines in scenes:
        counts.append(len(lines))
        for text in lines:
            columns = text.split()
            assert len(columns) == 15
            x1, y1, x2, y2 = (float(v) for v in columns[4:8])
            assert 0 <= x1 <= x2 + 1 <= 320
            assert 0 <= y1 <= y2 + 1 <= 96
            assert y2 + 1 - y1 >= MIN_HEIGHT
            assert x2 + 1 - x1 >= MIN_WIDTH
            assert 0 <= float(columns[1]) <= 1
            assert all(-3.15 <= float(columns[k]) <= 3.15 for k in (3, 14))
            classes[columns[0]] += 1
            occluded[columns[2]] += 1
            truncated += float(columns[1]) > 0.1
            heights.append(y2 + 1 - y1)
    total = sum(classes.values())
    share = {name: count / total for name, count in classes.items()}
    assert set(share) == {"Car", "Pedestrian", "Cyclist"}
    assert 0.35 < share["Car"] < 0.55
    assert 0.22 < share["Pedestrian"] < 0.45
    assert 0.12 < share["Cyclist"] < 0.33
    assert 3.2 < np.mean(counts) < 4.7
    assert 12 < np.percentile(heights, 5) < 24
    assert 54 < np.percentile(heights, 95) < 72
    assert occluded["1"] / total > 0.05
    assert occluded["2"] / total > 0.02
    assert truncated / total > 0.05


def test_visible_share_decides_about_labels():
    # The rule itself, on rectangles: half hidden keeps its label, two thirds do not.
    from kdkernels.data.actors import Actor
    from kdkernels.data.synthetic import _extent, _label

    canvas = Canvas(Camera(372.0, 76.0, 1.65), (0.5, 0.5, 0.5), 90.0, (0.0, 1.0, 0.0), 0.5)
    actor = Actor("Car", 0.0, 10.0, 0.0, (1.5, 1.7, 4.0))

    def rectangle(x1, y1, x2, y2):
        canvas.polygon([(x1, y1), (x2 - 1, y1), (x2 - 1, y2 - 1), (x1, y2 - 1)], (1.0, 0.0, 0.0))

    canvas.begin(1, 10.0)
    rectangle(100, 60, 200, 100)
    box, truncated, pixels = _extent(canvas, 1)
    assert box == (50, 30, 100, 50)
    assert truncated == 0
    assert pixels == 100 * 40
    assert _label(canvas, actor, 1, box, truncated, pixels).split()[:8] == ["Car", "0.00", "0", "-1.57", "50.00", "30.00", "99.00", "49.00"]
    canvas.begin(0, 5.0)
    rectangle(100, 60, 100 + round(100 * (MAX_OCCLUDED - 0.05)), 100)
    assert _label(canvas, actor, 1, box, truncated, pixels).split()[2] == "2"
    rectangle(100, 60, 100 + round(100 * (MAX_OCCLUDED + 0.05)), 100)
    assert _label(canvas, actor, 1, box, truncated, pixels) is None


def test_truncation_is_the_part_outside_the_picture():
    from kdkernels.data.synthetic import _extent

    canvas = Canvas(Camera(372.0, 76.0, 1.65), (0.5, 0.5, 0.5), 90.0, (0.0, 1.0, 0.0), 0.5)
    canvas.begin(1, 10.0)
    canvas.polygon([(-50, 60), (50, 60), (50, 100), (-50, 100)], (1.0, 0.0, 0.0))
    box, truncated, _ = _extent(canvas, 1)
    assert box[0] == 0
    assert truncated == pytest.approx(0.5)
    canvas.begin(2, 10.0)
    canvas.polygon([(700, 60), (800, 60), (800, 100)], (1.0, 0.0, 0.0))
    assert _extent(canvas, 2)[2] == 0


def test_camera():
    camera = Camera(372.0, 76.0, 1.65)
    assert camera.point(0.0, 0.0, 10.0) == pytest.approx((320, 76 + 372 * 1.65 / 10))
    assert camera.point(1.0, 1.65, 10.0) == pytest.approx((320 + 37.2, 76))
    # A thing of 1.5 m at 10 m is 27.9 of the delivered pixels high.
    assert (camera.point(0, 0, 10)[1] - camera.point(0, 1.5, 10)[1]) / SCALE == pytest.approx(27.9)


def test_validation_scenes_are_others(scenes):
    others = {render_scene(4, i)[0].tobytes() for i in range(10)}
    assert not others & {pixels.tobytes() for pixels, _ in scenes}
