"""A pinhole camera over a flat ground and a canvas that paints shaded polygons from far to near, remembering which object owns a pixel.

Everything is painted at `SCALE` times the delivered size. World axes: X right, Y down (the camera is at 0, the ground at `camera.height`),
Z forward, in metres. Colours are (r, g, b) in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SCALE = 2
WIDTH, HEIGHT = 320, 96

Colour = tuple[float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Camera:
    """Focal length and horizon in painted pixels, height above the ground in metres."""

    focal: float
    horizon: float
    height: float

    def point(self, x: float, up: float, z: float) -> Point:
        """The painted pixel of a place `up` metres above the ground. Nothing comes nearer than 0.8 m."""
        z = max(z, 0.8)
        return WIDTH * SCALE / 2 + self.focal * x / z, self.horizon + self.focal * (self.height - up) / z


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def scaled(colour: Colour, gain: float) -> Colour:
    return (colour[0] * gain, colour[1] * gain, colour[2] * gain)


class Canvas:
    """The picture, the owner of every pixel (0: nobody) and a mask of shadows that lie on the ground."""

    def __init__(self, camera: Camera, haze: Colour, haze_length: float, sun: tuple[float, float, float], ambient: float) -> None:
        self.camera, self.haze, self.haze_length, self.sun, self.ambient = camera, haze, haze_length, sun, ambient
        size = (WIDTH * SCALE, HEIGHT * SCALE)
        self.image = Image.new("RGB", size)
        self.owners = Image.new("L", size)
        self.shadows = Image.new("L", size)
        self._draw, self._own, self._shade = (ImageDraw.Draw(i) for i in (self.image, self.owners, self.shadows))
        self._ident, self._distance = 0, 0.0
        self.extent = [math.inf, math.inf, -math.inf, -math.inf]

    def begin(self, ident: int, distance: float) -> None:
        """What follows belongs to object `ident` at that many metres; `extent` then collects its box in painted pixels, unclipped."""
        self._ident, self._distance = ident, distance
        self.extent = [math.inf, math.inf, -math.inf, -math.inf]

    def rgb(self, colour: Colour) -> tuple[int, int, int]:
        """A colour behind the haze of the current distance, as 8 bit."""
        seen = mix(colour, self.haze, 1 - math.exp(-self._distance / self.haze_length))
        return tuple(int(255 * min(max(c, 0.0), 1.0)) for c in seen)  # type: ignore[return-value]

    def lit(self, colour: Colour, normal: tuple[float, float, float]) -> Colour:
        """A colour on a face with that normal: ambient light and the sun."""
        towards = normal[0] * self.sun[0] + normal[1] * self.sun[1] + normal[2] * self.sun[2]
        return scaled(colour, self.ambient + (1.15 - self.ambient) * max(0.0, towards))

    def _grow(self, points: Sequence[Point]) -> None:
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        e = self.extent
        e[0], e[1], e[2], e[3] = min(e[0], *xs), min(e[1], *ys), max(e[2], *xs), max(e[3], *ys)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon(points, fill=self.rgb(colour))
        self._own.polygon(points, fill=self._ident)
        self._grow(points)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, line: int = 0) -> None:
        """A filled ellipse, or its outline `line` pixels wide."""
        box = (x - rx, y - ry, x + rx, y + ry)
        if line:
            self._draw.ellipse(box, outline=self.rgb(colour), width=line)
            self._own.ellipse(box, outline=self._ident, width=line)
        else:
            self._draw.ellipse(box, fill=self.rgb(colour))
            self._own.ellipse(box, fill=self._ident)
        self._grow(((box[0], box[1]), (box[2], box[3])))

    def limb(self, a: Point, b: Point, wide_a: float, wide_b: float, colour: Colour) -> None:
        """A tapered bar from a to b; the widths are in painted pixels."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length / 2, dx / length / 2
        wide_a, wide_b = max(wide_a, 1.0), max(wide_b, 1.0)
        self.polygon(
            [
                (a[0] + nx * wide_a, a[1] + ny * wide_a),
                (b[0] + nx * wide_b, b[1] + ny * wide_b),
                (b[0] - nx * wide_b, b[1] - ny * wide_b),
                (a[0] - nx * wide_a, a[1] - ny * wide_a),
            ],
            colour,
        )

    def ground(self, outline: Sequence[tuple[float, float]], colour: Colour) -> None:
        """A flat area given by (x, z) corners."""
        self.polygon([self.camera.point(x, 0.0, z) for x, z in outline], colour)

    def shadow(self, outline: Sequence[tuple[float, float]], strength: float) -> None:
        """Darken the ground inside (x, z) corners by `strength` (0..1) once `cast_shadows` is called."""
        self._shade.polygon([self.camera.point(x, 0.0, z) for x, z in outline], fill=int(255 * strength))

    def round_shadow(self, x: float, z: float, rx: float, rz: float, strength: float) -> None:
        turns = [2 * math.pi * k / 10 for k in range(10)]
        self.shadow([(x + rx * math.cos(t), z + rz * math.sin(t)) for t in turns], strength)

    def cast_shadows(self) -> None:
        """Apply the shadows to what is painted so far: call it after the ground and before what stands on it."""
        self.image.paste((0, 0, 0), (0, 0), self.shadows)

    def owned(self, ident: int) -> np.ndarray:
        """Which pixels an object owns, (H, W) bool at painted size."""
        return np.asarray(self.owners) == ident


class Solid:
    """A rotated frame on the ground for things made of flat faces: local x forward, up, and z to the right of the heading."""

    def __init__(self, canvas: Canvas, x: float, z: float, heading: float) -> None:
        """`heading` 0 looks away from the camera, pi / 2 to the right."""
        self.canvas, self.x, self.z = canvas, x, z
        self.sin, self.cos = math.sin(heading), math.cos(heading)

    def world(self, p: tuple[float, float, float]) -> tuple[float, float, float]:
        """Local (forward, up, right) to (x, up, z)."""
        forward, up, right = p
        return self.x + self.sin * forward + self.cos * right, up, self.z + self.cos * forward - self.sin * right

    def pixel(self, p: tuple[float, float, float]) -> Point:
        return self.canvas.camera.point(*self.world(p))

    def face(self, corners: Sequence[tuple[float, float, float]], centre: tuple[float, float, float], colour: Colour) -> bool:
        """Paint a flat face if the camera sees its outer side (the one away from the solid's `centre`); says whether it did."""
        a, b, c = (self.world(p) for p in (corners[0], corners[1], corners[2]))
        mid = self.world(centre)
        u, v = [q - p for p, q in zip(a, b, strict=True)], [q - p for p, q in zip(a, c, strict=True)]
        normal = (u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0])
        length = math.sqrt(sum(n * n for n in normal)) or 1.0
        if sum(n * (p - q) for n, p, q in zip(normal, a, mid, strict=True)) < 0:
            length = -length
        normal = (normal[0] / length, normal[1] / length, normal[2] / length)
        eye = (-a[0], self.canvas.camera.height - a[1], -a[2])
        if sum(n * e for n, e in zip(normal, eye, strict=True)) <= 0:
            return False
        self.canvas.polygon([self.pixel(p) for p in corners], self.canvas.lit(colour, normal))
        return True

    def block(self, low: tuple[float, float, float], high: tuple[float, float, float], colour: Colour) -> None:
        """A cuboid between two local corners."""
        self.frustum(low, high, 0.0, 0.0, 0.0, colour)

    def frustum(
        self,
        low: tuple[float, float, float],
        high: tuple[float, float, float],
        front: float,
        back: float,
        side: float,
        colour: Colour,
        panes: Colour | None = None,
    ) -> None:
        """A cuboid whose top is drawn in by `front`, `back` and `side` metres; `panes` puts a window on each side face."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        bottom = [(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)]
        top = [(x0 + back, y1, z0 + side), (x1 - front, y1, z0 + side), (x1 - front, y1, z1 - side), (x0 + back, y1, z1 - side)]
        centre = ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2)
        self.face(top, centre, colour)
        for k in range(4):
            j = (k + 1) % 4
            corners = [bottom[k], bottom[j], top[j], top[k]]
            if self.face(corners, centre, colour) and panes is not None:
                middle = tuple(sum(p[i] for p in corners) / 4 for i in range(3))
                window = [tuple(m + 0.8 * (q - m) for m, q in zip(middle, p, strict=True)) for p in corners]
                self.face(window, centre, panes)  # type: ignore[arg-type]
