"""Synthetic road scenes in KITTI's folder layout: cars, pedestrians and cyclists with perspective, occlusion, truncation, clutter, noise.

A scene is painted at twice its size and box-filtered to 96 x 320 pixels. Image i of a seed depends on (seed, i) alone, so the first images
of a larger set are those of a smaller one, and the same seed gives the same bytes (with the same releases of Pillow and numpy).
Objects of which less than 35 % is to be seen, or that are lower than 7 or narrower than 2.5 pixels, get no label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .actors import Actor, ground_shadow, make_actor, paint_actor
from .canvas import HEIGHT, SCALE, WIDTH, Canvas
from .kitti import kitti_box
from .scenery import CLUTTER, CLUTTER_SHARE, Street, make_canvas, make_street, paint_clutter, paint_ground, paint_walls

MAX_OCCLUDED = 0.65
MIN_HEIGHT, MIN_WIDTH = 7.0, 2.5


def render_scene(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    """Image `index` of `seed`: (96, 320, 3) uint8 and its KITTI label lines."""
    rng = np.random.default_rng([seed, index])
    canvas = make_canvas(rng)
    street = make_street(rng)
    paint_ground(canvas, street, rng)
    actors = _place(rng, street)
    strength = rng.uniform(0.25, 0.65)
    for actor in actors:
        ground_shadow(canvas, actor, strength)
    canvas.cast_shadows()
    paint_walls(canvas, street, rng)
    things: list[tuple[float, Actor | tuple[str, float]]] = [(actor.z, actor) for actor in actors]
    things += [(z, (kind, x)) for kind, x, z in _clutter(rng, street)]
    drawn: list[tuple[Any, ...]] = []
    for z, thing in sorted(things, key=lambda entry: -entry[0]):
        if isinstance(thing, Actor):
            ident = len(drawn) + 1
            canvas.begin(ident, z)
            paint_actor(canvas, thing, rng)
            drawn.append((thing, ident, *_extent(canvas, ident)))
        else:
            paint_clutter(canvas, thing[0], thing[1], z, rng)
    labels = [line for entry in drawn if (line := _label(canvas, *entry))]
    return _develop(canvas, rng), labels


def render_dataset(out: str | Path, images: int, seed: int, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write `images` scenes of `seed` to out/training/image_2/%06d.png and out/training/label_2/%06d.txt; returns `out`.

    `progress` is called with (images done, images in all). Raises FileExistsError when `out` holds KITTI data already.
    """
    out = Path(out)
    folders = out / "training" / "image_2", out / "training" / "label_2"
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty")
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        pixels, labels = render_scene(seed, index)
        Image.fromarray(pixels).save(folders[0] / f"{index:06d}.png", compress_level=3)
        (folders[1] / f"{index:06d}.txt").write_text("".join(line + "\n" for line in labels), encoding="utf-8", newline="\n")
        if progress is not None:
            progress(index + 1, images)
    return out


def _place(rng: np.random.Generator, street: Street) -> list[Actor]:
    """Actors on lanes, at the kerb and on the pavement, in groups, not inside each other."""
    actors: list[Actor] = []
    wanted = int(rng.choice(np.arange(1, 11), p=np.array((5, 9, 13, 16, 17, 14, 11, 8, 5, 2)) / 100))
    for _ in range(40):
        if len(actors) >= wanted:
            break
        kind = str(rng.choice(("Car", "Pedestrian", "Cyclist"), p=(0.50, 0.275, 0.225)))
        z = 186 * (1.55 if kind == "Car" else 1.7) / math.exp(rng.uniform(math.log(17 if kind == "Car" else 22), math.log(66)))
        reach = 0.92 * z * WIDTH / 2 / 186
        if kind == "Car":
            lane = rng.random()
            x = rng.choice((street.left + 1.1, street.right - 1.1)) if lane < 0.55 else rng.uniform(street.left + 1, street.right - 1)
            heading = (0.0 if x > (street.left + street.right) / 2 else math.pi) + rng.normal(0, 0.12)
            if rng.random() < 0.1:
                heading += rng.uniform(0, 2 * math.pi)
        else:
            side = rng.random()
            x = rng.uniform(street.left, street.right) if side < 0.4 else rng.choice((street.left, street.right)) + rng.normal(0, 1.2)
            heading = rng.uniform(0, 2 * math.pi)
        if abs(x) > reach + 0.8:
            x = rng.uniform(-reach, reach)
        size = int(rng.integers(2, 4)) if kind == "Pedestrian" and rng.random() < 0.1 else 1
        for _ in range(size):
            actor = make_actor(rng, kind, float(x), float(z), float(heading))
            if actor.z > 2.6 + actor.size[2] / 2 - 0.6 and all(_apart(actor, other) for other in actors):
                actors.append(actor)
            x, z = x + rng.choice((-1, 1)) * rng.uniform(0.45, 0.8), z + rng.normal(0, 0.4)
    return actors


def _apart(a: Actor, b: Actor) -> bool:
    return math.hypot(a.x - b.x, a.z - b.z) > (a.radius + b.radius) * (1.0 if "Car" in (a.kind, b.kind) else 0.7)


def _clutter(rng: np.random.Generator, street: Street) -> list[tuple[str, float, float]]:
    things = []
    for _ in range(rng.integers(2, 7)):
        sign = rng.choice((-1, 1))
        border = street.left if sign < 0 else street.right
        z = math.exp(rng.uniform(math.log(4), math.log(30)))
        things.append((str(rng.choice(CLUTTER, p=CLUTTER_SHARE)), float(border + sign * abs(rng.normal(0.6, 1.6))), z))
    return things


def _extent(canvas: Canvas, ident: int) -> tuple[tuple[float, float, float, float], float, int]:
    """Right after painting: the box inside the image, the part of the whole box that the image's border cuts off, the pixels."""
    x1, y1, x2, y2 = canvas.extent
    wide, high = WIDTH * SCALE, HEIGHT * SCALE
    cut = (max(x1, 0), max(y1, 0), min(x2, wide), min(y2, high))
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        return (0, 0, 0, 0), 1.0, 0
    mask = canvas.owned(ident)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0), 1.0, 0
    box = (columns[0] / SCALE, rows[0] / SCALE, (columns[-1] + 1) / SCALE, (rows[-1] + 1) / SCALE)
    whole = max((x2 - x1) * (y2 - y1), 1e-6)
    return box, 1 - (cut[2] - cut[0]) * (cut[3] - cut[1]) / whole, int(mask.sum())


def _label(canvas: Canvas, actor: Actor, ident: int, box: tuple[float, float, float, float], truncated: float, pixels: int) -> str | None:
    """The 15 columns of an actor, or None when it is too small or too much hidden."""
    if not pixels or box[3] - box[1] < MIN_HEIGHT or box[2] - box[0] < MIN_WIDTH:
        return None
    hidden = 1 - int(canvas.owned(ident).sum()) / pixels
    if hidden > MAX_OCCLUDED:
        return None
    occluded = 0 if hidden < 0.1 else 1 if hidden < 0.4 else 2
    rotation = _wrap(actor.heading - math.pi / 2)
    alpha = _wrap(rotation - math.atan2(actor.x, actor.z))
    numbers = [alpha, *kitti_box(box), *actor.size, actor.x, canvas.camera.height, actor.z, rotation]
    return f"{actor.kind} {truncated:.2f} {occluded} " + " ".join(f"{value:.2f}" for value in numbers)


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _develop(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Box filter, light, colour cast, vignette, blur and noise: (96, 320, 3) uint8."""
    painted = canvas.image
    if rng.random() < 0.2:
        painted = painted.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.9)))
    image = np.asarray(painted.reduce(SCALE), dtype=np.float32) / 255
    grain = np.asarray(Image.fromarray(rng.normal(0, 0.05, (24, 80)).astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    image *= 1 + grain[:, :, None]
    contrast, middle = rng.uniform(0.75, 1.1), rng.uniform(0.42, 0.56)
    image = (image - 0.5) * contrast + middle
    image *= rng.uniform(0.9, 1.1, 3).astype(np.float32)
    x, y = np.linspace(-1, 1, WIDTH, dtype=np.float32), np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    image *= (1 - rng.uniform(0, 0.25) * (x * x * 0.7 + y * y * 0.3))[:, :, None]
    noise = rng.uniform(0.005, 0.02)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(noise)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
