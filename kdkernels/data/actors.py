"""The labelled things of a synthetic road scene: cars, pedestrians and cyclists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Colour, Point, Solid, mix, scaled

CLASSES = ("Car", "Pedestrian", "Cyclist")

_PAINTS: tuple[Colour, ...] = (
    (0.85, 0.85, 0.86), (0.62, 0.63, 0.65), (0.30, 0.31, 0.33), (0.10, 0.10, 0.12), (0.55, 0.10, 0.10),
    (0.12, 0.20, 0.45), (0.18, 0.36, 0.24), (0.70, 0.62, 0.30), (0.42, 0.33, 0.26), (0.35, 0.48, 0.60),
)  # fmt: skip
_SKINS: tuple[Colour, ...] = ((0.85, 0.68, 0.56), (0.68, 0.50, 0.38), (0.42, 0.29, 0.22))


@dataclass
class Actor:
    """A thing on the ground: class, place (x, z) in metres, heading, and (height, width, length) in metres."""

    kind: str
    x: float
    z: float
    heading: float
    size: tuple[float, float, float]

    @property
    def radius(self) -> float:
        return 0.5 * max(self.size[1], 0.6 * self.size[2])


def cloth(rng: np.random.Generator) -> Colour:
    """A random colour for clothes: mostly muted, sometimes bright."""
    colour = rng.uniform(0.08, 0.85, 3)
    grey = colour.mean()
    r, g, b = (grey + (colour - grey) * rng.choice((0.25, 0.5, 1.0))).tolist()
    return r, g, b


def make_actor(rng: np.random.Generator, kind: str, x: float, z: float, heading: float) -> Actor:
    if kind == "Car":
        size = (rng.uniform(1.38, 1.75), rng.uniform(1.6, 1.85), rng.uniform(3.5, 4.6))
    elif kind == "Pedestrian":
        size = (rng.uniform(1.45, 1.9) if rng.random() > 0.12 else rng.uniform(1.05, 1.4), 0.6, 0.6)
    else:
        size = (rng.uniform(1.6, 1.85), 0.6, 1.75)
    return Actor(kind, x, z, heading, size)


def ground_shadow(canvas: Canvas, actor: Actor, strength: float) -> None:
    """A contact shadow under the actor, drawn out away from the sun."""
    dx, dz = -canvas.sun[0] * actor.size[0] * 0.5, -canvas.sun[2] * actor.size[0] * 0.5
    if actor.kind == "Car":
        solid = Solid(canvas, actor.x, actor.z, actor.heading)
        h, w, n = actor.size
        corners = [solid.world(p) for p in ((n / 2, 0, -w / 2), (n / 2, 0, w / 2), (-n / 2, 0, w / 2), (-n / 2, 0, -w / 2))]
        canvas.shadow([(x + dx, z + dz) for x, _, z in corners], strength * 0.7)
        canvas.shadow([(x, z) for x, _, z in corners], strength)
    else:
        wide = 0.3 if actor.kind == "Pedestrian" else 0.3 + 0.55 * abs(math.sin(actor.heading))
        canvas.round_shadow(actor.x + dx, actor.z + dz, wide + abs(dx) * 0.6, 0.2 + abs(dz) * 0.6, strength * 0.7)
        canvas.round_shadow(actor.x, actor.z, wide, 0.25, strength)


def paint_actor(canvas: Canvas, actor: Actor, rng: np.random.Generator) -> None:
    {"Car": _car, "Pedestrian": _pedestrian, "Cyclist": _cyclist}[actor.kind](canvas, actor, rng)


def _car(canvas: Canvas, actor: Actor, rng: np.random.Generator) -> None:
    h, w, n = actor.size
    tint = np.array(_PAINTS[rng.integers(len(_PAINTS))]) * rng.uniform(0.75, 1.2) + rng.normal(0, 0.03, 3)
    paint: Colour = tuple(tint.clip(0.03, 0.95).tolist())
    glass = mix((0.08, 0.10, 0.12), canvas.haze, rng.uniform(0.05, 0.5))
    belt = h * rng.uniform(0.54, 0.62)
    estate, box = rng.random() < 0.4, rng.random() < 0.2
    bonnet = n * (0.08 if box else rng.uniform(0.2, 0.28))
    boot = n * (0.02 if estate or box else rng.uniform(0.1, 0.18))
    solid = Solid(canvas, actor.x, actor.z, actor.heading)
    clear = 0.28 * h * 0.5
    tyre: Colour = (0.05, 0.05, 0.055)
    solid.block((-n / 2 + 0.1, 0.08, -w / 2 + 0.08), (n / 2 - 0.1, clear + 0.1, w / 2 - 0.08), tyre)
    solid.frustum((-n / 2, clear, -w / 2), (n / 2, belt, w / 2), 0.06, 0.05, 0.04, paint)
    low, high = (-n / 2 + boot, belt, -w / 2 + 0.05), (n / 2 - bonnet, h, w / 2 - 0.05)
    solid.frustum(low, high, h * 0.32, h * (0.1 if estate or box else 0.28), 0.14, paint, glass)
    centre = (0.0, h / 2, 0.0)
    for side in (-w / 2 - 0.01, w / 2 + 0.01):
        for along in (-n * 0.31, n * 0.31):
            for radius, colour in ((0.31, tyre), (0.16, (0.45, 0.45, 0.47))):
                turns = [2 * math.pi * k / 10 for k in range(10)]
                solid.face([(along + radius * math.cos(t), 0.31 + radius * math.sin(t), side) for t in turns], centre, colour)
    braking = rng.random() < 0.3
    for end, lamp in ((n / 2 + 0.01, (0.95, 0.93, 0.85)), (-n / 2 - 0.01, (1.3, 0.15, 0.1) if braking else (0.6, 0.08, 0.07))):
        for side in (-1, 1):
            a, b = side * w * 0.46, side * w * 0.28
            y0, y1 = belt * 0.68, belt * 0.88
            solid.face([(end, y0, a), (end, y1, a), (end, y1, b), (end, y0, b)], centre, lamp)
        for y0, y1, wide, colour in ((clear, clear + 0.12, w * 0.42, scaled(paint, 0.45)), (0.42, 0.54, 0.24, (0.8, 0.8, 0.74))):
            solid.face([(end, y0, -wide), (end, y1, -wide), (end, y1, wide), (end, y0, wide)], centre, colour)


# Thinner limbs than these end in fractions of a pixel, and the box's edges with them.
STOUT = 1.4


class _Flat:
    """A picture that always faces the camera: local metres (right, up) at a place on the ground."""

    def __init__(self, canvas: Canvas, x: float, z: float, stretch: float = 1.0) -> None:
        self.canvas, self.x, self.z, self.stretch = canvas, x, z, stretch
        self.scale = canvas.camera.focal / max(z, 0.8)

    def at(self, right: float, up: float) -> Point:
        return self.canvas.camera.point(self.x + right * self.stretch, up, self.z)

    def limb(self, a: Point, b: Point, wide_a: float, wide_b: float, colour: Colour) -> None:
        self.canvas.limb(self.at(*a), self.at(*b), STOUT * wide_a * self.scale, STOUT * wide_b * self.scale, colour)

    def blob(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        self.canvas.ellipse(*self.at(*centre), rx * self.scale, ry * self.scale, colour)


def _pedestrian(canvas: Canvas, actor: Actor, rng: np.random.Generator) -> None:
    h = actor.size[0]
    k = h / 1.75
    side = abs(math.sin(actor.heading))
    way = 1.0 if math.sin(actor.heading) > 0 else -1.0
    # Broader than people are: a detector of stride 8 sees nothing that is thinner than one of its cells.
    flat = _Flat(canvas, actor.x, actor.z, 1.5)
    light = canvas.ambient + (1.1 - canvas.ambient) * rng.uniform(0.3, 0.9)
    coat, legs, skin = (scaled(c, light) for c in (cloth(rng), cloth(rng), _SKINS[rng.integers(3)]))
    hair = scaled(cloth(rng), 0.5 * light)
    stride = rng.uniform(-0.36, 0.36) * k * (0.3 + 0.7 * side)
    hip, neck = 0.86 * k, 1.45 * k
    wide = (0.34 + 0.2 * (1 - side)) * k * rng.uniform(0.9, 1.25)
    apart = 0.09 * k * (1 - side)
    dark = scaled(legs, 0.8)
    for sign, colour in ((1, dark), (-1, legs)):
        foot = sign * (stride + apart)
        knee = 0.55 * foot + way * 0.05 * side
        flat.limb((sign * apart * 0.8, hip + 0.05), (knee, hip * 0.5), 0.17 * k, 0.13 * k, colour)
        flat.limb((knee, hip * 0.52), (foot, 0.05), 0.13 * k, 0.09 * k, colour)
        flat.limb((foot - 0.05, 0.03), (foot + way * 0.15 * side + 0.05, 0.03), 0.08, 0.08, (0.06, 0.05, 0.05))
    if rng.random() < 0.2:
        flat.limb((0, hip + 0.1), (0, hip * rng.uniform(0.25, 0.6)), wide, wide * 1.35, coat)
    swing = rng.uniform(-0.3, 0.3) * k * (0.4 + 0.6 * side)
    spread = wide * (1 - side)
    flat.limb((0.42 * spread, neck - 0.08), (-swing + 0.6 * spread, hip + 0.02), 0.11 * k, 0.08 * k, scaled(coat, 0.75))
    flat.limb((0, neck + 0.02), (0, hip - 0.05), wide, wide * 0.85, coat)
    if rng.random() < 0.3:
        bag = scaled(cloth(rng), light)
        flat.blob((-way * wide * 0.55 * side, neck - 0.3 * k), 0.14 * k, 0.2 * k, bag)
    flat.limb((-0.45 * spread, neck - 0.08), (swing - 0.6 * spread, hip + 0.02), 0.11 * k, 0.08 * k, scaled(coat, 0.9))
    flat.limb((0, neck - 0.02), (way * 0.02 * side, neck + 0.1 * k), 0.1 * k, 0.09 * k, skin)
    flat.blob((way * 0.03 * side, 1.63 * k), 0.095 * k, 0.125 * k, skin)
    flat.blob((-way * 0.02 * side, 1.68 * k), 0.1 * k, 0.085 * k, hair)


def bicycle(canvas: Canvas, x: float, z: float, heading: float, rng: np.random.Generator) -> _Flat:
    """A bicycle without a rider; returns its picture plane so that one can be put on it."""
    way = 1.0 if math.sin(heading) > 0 else -1.0
    thin = max(abs(math.sin(heading)), 0.18)
    flat = _Flat(canvas, x, z, way * thin)
    frame = scaled(cloth(rng), 0.9)
    tyre: Colour = (0.06, 0.06, 0.065)
    for along in (-0.52, 0.52):
        cx, cy = flat.at(along, 0.34)
        canvas.ellipse(cx, cy, max(0.34 * thin, 0.05) * flat.scale, 0.34 * flat.scale, tyre, max(1, round(0.055 * flat.scale)))
    for a, b in (((-0.52, 0.34), (-0.12, 0.82)), ((-0.52, 0.34), (0.0, 0.32)), ((0.0, 0.32), (-0.15, 0.9)), ((-0.12, 0.8), (0.4, 0.84)),
                 ((0.0, 0.32), (0.4, 0.8)), ((0.52, 0.34), (0.38, 1.0))):  # fmt: skip
        flat.limb(a, b, 0.05, 0.05, frame)
    handle = 0.06 + 0.2 * (1 - thin)
    hx, hy = flat.at(0.4, 1.02)
    canvas.limb((hx - handle * flat.scale, hy), (hx + handle * flat.scale, hy), 0.05 * flat.scale, 0.05 * flat.scale, tyre)
    return flat


def _cyclist(canvas: Canvas, actor: Actor, rng: np.random.Generator) -> None:
    k = actor.size[0] / 1.75
    flat = bicycle(canvas, actor.x, actor.z, actor.heading, rng)
    light = canvas.ambient + (1.1 - canvas.ambient) * rng.uniform(0.3, 0.9)
    coat, legs, skin, helmet = (scaled(c, light) for c in (cloth(rng), cloth(rng), _SKINS[rng.integers(3)], cloth(rng)))
    turn = rng.uniform(0, 2 * math.pi)
    lean = rng.uniform(0.2, 0.42)
    front = 1 - abs(flat.stretch)
    hip, shoulder = (-0.14, 0.98), (-0.14 + lean, 1.42 * k)
    for sign, colour in ((-1, scaled(legs, 0.8)), (1, legs)):
        pedal = (0.02 + 0.17 * math.cos(turn) * sign, 0.34 + 0.17 * math.sin(turn) * sign)
        knee = ((hip[0] + pedal[0]) / 2 + 0.22 + sign * 0.1 * front, (hip[1] + pedal[1]) / 2 + 0.06)
        flat.limb(hip, knee, 0.17, 0.13, colour)
        flat.limb(knee, pedal, 0.12, 0.09, colour)
    wide = 0.24 + 0.16 * front
    flat.limb(hip, shoulder, wide * 0.9, wide, coat)
    flat.limb((shoulder[0], shoulder[1] - 0.06), (0.4, 1.04), 0.1, 0.08, scaled(coat, 0.85))
    head = (shoulder[0] + 0.08, 1.6 * k)
    flat.blob(head, 0.1, 0.125 * k, skin)
    flat.blob((head[0] - 0.02, head[1] + 0.05), 0.11, 0.09, helmet)
