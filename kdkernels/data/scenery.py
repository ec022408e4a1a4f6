"""What surrounds the labelled things: sky, ground, road, facades, and clutter that partly looks like them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .actors import bicycle, cloth
from .canvas import HEIGHT, SCALE, WIDTH, Camera, Canvas, Colour, Solid, mix, scaled

CLUTTER = ("tree", "bush", "lamp", "sign", "lights", "bin", "kiosk", "post", "bicycle", "poster", "hydrant")
# Riderless bicycles and posters of people are rare: traps, not the task.
CLUTTER_SHARE = (0.16, 0.1, 0.12, 0.16, 0.1, 0.08, 0.08, 0.1, 0.03, 0.03, 0.04)


@dataclass
class Street:
    """The layout of a scene: x of the road's borders, width of the pavement, distance of the facades (metres)."""

    left: float
    right: float
    pavement: float
    wall: float


def _colour(rng: np.random.Generator, low: Colour, high: Colour) -> Colour:
    """Between two colours: one step along all channels, a smaller one of each on its own."""
    r, g, b = (np.array(low) + np.subtract(high, low) * (0.75 * rng.random() + 0.25 * rng.random(3))).tolist()
    return r, g, b


def make_street(rng: np.random.Generator) -> Street:
    left, right = -rng.uniform(2.5, 7.5), rng.uniform(2.2, 6.0)
    pavement = rng.uniform(1.5, 3.5)
    return Street(left, right, pavement, rng.uniform(0.3, 6.0))


def make_canvas(rng: np.random.Generator) -> Canvas:
    """A camera, light and air at random, and the sky."""
    camera = Camera(SCALE * rng.uniform(178, 195), SCALE * rng.uniform(33, 42), rng.uniform(1.5, 1.75))
    grey = rng.uniform(0.45, 0.9)
    low = mix((grey, grey, grey), _colour(rng, (0.55, 0.6, 0.65), (1.0, 0.93, 0.85)), 0.4)
    high = mix(low, _colour(rng, (0.25, 0.4, 0.6), (0.5, 0.65, 0.95)), rng.uniform(0.1, 1.0))
    turn, up = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.95)
    flat = math.sqrt(1 - up * up)
    sun = (flat * math.cos(turn), up, flat * math.sin(turn))
    canvas = Canvas(camera, low, float(rng.choice((40.0, 90.0, 250.0))), sun, rng.uniform(0.35, 0.75))
    rows = np.linspace(0, 1, HEIGHT * SCALE, dtype=np.float32)[:, None, None] ** 0.8
    sky = np.asarray(high, np.float32) * (1 - rows) + np.asarray(low, np.float32) * rows
    clouds = Image.fromarray(rng.uniform(0, rng.choice((0.02, 0.12, 0.25)), (5, 9)).astype(np.float32))
    sky = sky + np.asarray(clouds.resize(canvas.image.size, Image.Resampling.BICUBIC))[:, :, None]
    canvas.image.paste(Image.fromarray((sky.clip(0, 1) * 255).astype(np.uint8)))
    return canvas


def paint_ground(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Skyline, verge, pavement, road, lane marks and patches."""
    far, near = 120.0, 1.0
    canvas.begin(0, 60.0)
    hills = rng.random() < 0.5
    base = _colour(rng, (0.12, 0.2, 0.1), (0.3, 0.4, 0.25)) if hills else _colour(rng, (0.3, 0.3, 0.3), (0.55, 0.5, 0.48))
    x = -20.0
    while x < WIDTH * SCALE + 20:
        wide, tall = rng.uniform(15, 70), rng.uniform(3, 14 if hills else 40)
        if hills:
            canvas.ellipse(x, canvas.camera.horizon, wide, tall, scaled(base, rng.uniform(0.8, 1.2)))
        else:
            bottom, top = canvas.camera.horizon, canvas.camera.horizon - tall
            canvas.polygon([(x, bottom), (x, top), (x + wide, top), (x + wide, bottom)], scaled(base, rng.uniform(0.6, 1.3)))
        x += wide * rng.uniform(0.5, 1.4)
    canvas.begin(0, 12.0)
    sunny = canvas.ambient + (1.05 - canvas.ambient) * max(0.0, canvas.sun[1])
    green = scaled(_colour(rng, (0.2, 0.3, 0.12), (0.45, 0.48, 0.3)), sunny)
    stone = scaled(_colour(rng, (0.42, 0.4, 0.38), (0.7, 0.67, 0.64)), sunny)
    tar = scaled((1.0, 0.99, 1.0), sunny * rng.uniform(0.2, 0.48))
    verge = green if rng.random() < 0.55 else stone
    canvas.ground([(-200, far), (200, far), (200, near), (-200, near)], verge)
    bend = rng.uniform(-8, 8) if rng.random() < 0.4 else 0.0
    steps = [1.0, 2.0, 4.0, 7.0, 12.0, 20.0, 35.0, far]

    def strip(a: float, b: float, colour: Colour) -> None:
        curve = [(bend * (z / 40) ** 2, z) for z in steps]
        canvas.ground([(a + dx, z) for dx, z in curve] + [(b + dx, z) for dx, z in reversed(curve)], colour)

    strip(street.left - street.pavement, street.right + street.pavement, stone)
    strip(street.left, street.right, tar)
    mark = mix(tar, (0.9, 0.9, 0.86), rng.uniform(0.3, 0.9))
    for border in (street.left, street.right):
        if rng.random() < 0.6:
            strip(border - 0.06, border + 0.06, mark)
    middle, shift = (street.left + street.right) / 2, rng.uniform(0, 4)
    for k in range(10):
        z = 2.0 + 4.0 * k + shift
        dx = bend * (z / 40) ** 2
        canvas.ground([(middle + dx - 0.07, z), (middle + dx + 0.07, z), (middle + dx + 0.07, z + 2), (middle + dx - 0.07, z + 2)], mark)
    if rng.random() < 0.25:
        z, x = rng.uniform(4, 14), street.left
        while x < street.right:
            canvas.ground([(x, z), (x + 0.5, z), (x + 0.5, z + 2.2), (x, z + 2.2)], mark)
            x += 1.0
    for _ in range(rng.integers(0, 4)):
        x, z = rng.uniform(street.left, street.right), rng.uniform(3, 20)
        w, d = rng.uniform(0.4, 2.5), rng.uniform(0.5, 5)
        canvas.ground([(x, z), (x + w, z), (x + w, z + d), (x, z + d)], scaled(tar, rng.uniform(0.75, 1.2)))
    for _ in range(rng.integers(0, 4)):
        x, z = rng.uniform(-9, 9), rng.uniform(3, 25)
        canvas.round_shadow(x, z, rng.uniform(0.8, 4), rng.uniform(0.4, 3), rng.uniform(0.1, 0.5))


def paint_walls(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Rows of houses, walls or hedges on both sides, from far to near."""
    for sign in (-1, 1):
        if rng.random() < 0.3:
            continue
        border = (street.left if sign < 0 else street.right) + sign * (street.pavement + street.wall)
        hedge = rng.random() < 0.25
        z = rng.uniform(45, 60)
        while z > 3:
            depth = rng.uniform(3, 12)
            tall = rng.uniform(1.0, 2.2) if hedge else rng.uniform(3, 11)
            low, high = ((0.12, 0.2, 0.08), (0.25, 0.35, 0.18)) if hedge else ((0.3, 0.25, 0.2), (0.85, 0.78, 0.7))
            colour = _colour(rng, low, high)
            canvas.begin(0, max(z - depth / 2, 1.0))
            if rng.random() < 0.85:
                pane = None if hedge else scaled(colour, rng.uniform(0.3, 0.7))
                _house(canvas, border, sign, max(z - depth, 1.2), z, tall, colour, pane)
            z -= depth


def _house(canvas: Canvas, border: float, sign: int, z0: float, z1: float, tall: float, wall: Colour, pane: Colour | None) -> None:
    point = canvas.camera.point
    front = canvas.lit(wall, (0.0, 0.0, -1.0))
    back = border + sign * 8
    canvas.polygon([point(border, 0, z0), point(border, tall, z0), point(back, tall, z0), point(back, 0, z0)], front)
    face = canvas.lit(wall, (-sign * 1.0, 0.0, 0.0))
    canvas.polygon([point(border, 0, z0), point(border, tall, z0), point(border, tall, z1), point(border, 0, z1)], face)
    if pane is None:
        return
    storeys, columns = int(tall // 2.8), int((z1 - z0) // 1.8)
    for row in range(storeys):
        y0 = 0.9 + 2.8 * row
        for column in range(columns):
            z = z0 + 0.5 + 1.8 * column
            corners = ((y0, z), (y0 + 1.3, z), (y0 + 1.3, z + 0.9), (y0, z + 0.9))
            canvas.polygon([point(border, up, along) for up, along in corners], pane)


def paint_clutter(canvas: Canvas, kind: str, x: float, z: float, rng: np.random.Generator) -> None:
    """One thing without a label at (x, z)."""
    canvas.begin(0, z)
    px, scale = canvas.camera.point, canvas.camera.focal / max(z, 0.8)
    light = canvas.ambient + (1.1 - canvas.ambient) * rng.uniform(0.3, 0.9)
    colour = scaled(cloth(rng), light)
    heading = rng.choice((0.0, math.pi / 2)) + rng.normal(0, 0.2)
    metal = scaled((0.4, 0.41, 0.42), light * rng.uniform(0.4, 1.2))
    if kind in ("tree", "bush"):
        leaf = scaled(_colour(rng, (0.12, 0.22, 0.08), (0.38, 0.42, 0.2)), light)
        trunk = rng.uniform(1.5, 2.8) if kind == "tree" else 0.2
        crown = rng.uniform(0.8, 1.9) if kind == "tree" else rng.uniform(0.4, 1.0)
        canvas.limb(px(x, 0, z), px(x, trunk + 0.3, z), 0.3 * scale, 0.2 * scale, scaled((0.28, 0.22, 0.17), light))
        for _ in range(7):
            cx, cy = px(x + rng.normal(0, 0.45) * crown, trunk + crown * rng.uniform(0.2, 1.3), z)
            r = crown * rng.uniform(0.35, 0.65) * scale
            canvas.ellipse(cx, cy, r, r * rng.uniform(0.7, 1), scaled(leaf, rng.uniform(0.65, 1.3)))
    elif kind in ("lamp", "sign", "lights"):
        tall = rng.uniform(4.5, 7) if kind == "lamp" else rng.uniform(2.0, 3.0)
        canvas.limb(px(x, 0, z), px(x, tall, z), 0.14 * scale, 0.09 * scale, metal)
        cx, cy = px(x, tall, z)
        if kind == "lamp":
            canvas.limb((cx, cy), px(x - math.copysign(1.3, x), tall + 0.2, z), 0.1 * scale, 0.16 * scale, metal)
        elif kind == "sign":
            r = rng.uniform(0.25, 0.42) * scale
            corners = int(rng.choice((3, 4, 20)))
            turns = [math.pi / 2 + 2 * math.pi * k / corners for k in range(corners)]
            for grow, paint in ((1.0, scaled((0.75, 0.1, 0.1), light)), (0.7, scaled((0.9, 0.9, 0.88), light))):
                canvas.polygon([(cx + grow * r * math.cos(t), cy - grow * r * math.sin(t)) for t in turns], paint)
        else:
            canvas.limb((cx, cy), px(x, tall - 0.9, z), 0.32 * scale, 0.32 * scale, (0.07, 0.07, 0.07))
            lamp = int(rng.integers(3))
            for k, paint in enumerate(((1.0, 0.2, 0.1), (1.0, 0.7, 0.1), (0.1, 0.9, 0.4))):
                bx, by = px(x, tall - 0.18 - 0.28 * k, z)
                canvas.ellipse(bx, by, 0.1 * scale, 0.1 * scale, paint if k == lamp else scaled(paint, 0.2))
    elif kind in ("bin", "kiosk"):
        low, high = ((0.9, 0.6, 0.6), (1.4, 1.4, 2.4)) if kind == "bin" else ((1.8, 1.4, 1.5), (2.6, 1.8, 3.0))
        h, w, n = rng.uniform(low, high)
        solid = Solid(canvas, x, z, heading)
        if rng.random() < 0.5:
            solid.frustum((-n / 2, 0.1, -w / 2), (n / 2, h, w / 2), 0.1, 0.1, 0.05, colour, None if kind == "bin" else scaled(colour, 0.4))
        else:
            solid.block((-n / 2, 0.1, -w / 2), (n / 2, h * 0.85, w / 2), colour)
            solid.frustum((-n / 2, h * 0.85, -w / 2), (n / 2, h, w / 2), 0.15, 0.15, 0.1, scaled(colour, 0.6))
    elif kind in ("post", "hydrant"):
        tall, wide = (rng.uniform(1.1, 1.8), rng.uniform(0.22, 0.5)) if kind == "post" else (rng.uniform(0.6, 0.9), 0.3)
        canvas.limb(px(x, 0, z), px(x, tall, z), wide * scale, wide * scale * rng.uniform(0.7, 1), colour)
        canvas.ellipse(*px(x, tall, z), wide * 0.5 * scale, rng.uniform(0.1, 0.2) * scale, mix(colour, metal, rng.random()))
    elif kind == "bicycle":
        bicycle(canvas, x, z, heading, rng)
    else:
        w, h, up = rng.uniform(0.8, 2.5), rng.uniform(1.0, 1.8), rng.uniform(0.4, 1.6)
        for leg in (-w / 2 + 0.1, w / 2 - 0.1):
            canvas.limb(px(x + leg, 0, z), px(x + leg, up, z), 0.1 * scale, 0.1 * scale, metal)
        canvas.polygon([px(x - w / 2, up, z), px(x - w / 2, up + h, z), px(x + w / 2, up + h, z), px(x + w / 2, up, z)], colour)
        for _ in range(3):
            cx, cy = px(x + rng.uniform(-0.3, 0.3) * w, up + h * rng.uniform(0.3, 0.7), z)
            canvas.ellipse(cx, cy, 0.12 * w * scale, rng.uniform(0.1, 0.3) * h * scale, scaled(cloth(rng), light))
