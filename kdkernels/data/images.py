"""Reading image files with Pillow: any mode to 8-bit RGB, and a check that decodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

#: File endings that count as images (compared in lower case).
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The image as a (H, W, 3) uint8 array, resized to `size` (height, width) when given and different.

    Grey, palette, alpha and 16-bit files are converted. EXIF rotation is not applied: labels refer to the stored pixels.
    Raises OSError (or what Pillow raises) for a file that is missing, cut short or no image.
    """
    with Image.open(path) as file:
        if file.mode.startswith("I"):
            grey = np.asarray(file, dtype=np.int64)
            image = Image.fromarray(np.clip(grey // 257, 0, 255).astype(np.uint8)).convert("RGB")
        else:
            image = file.convert("RGB")
    if size is not None and (image.height, image.width) != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(image)


@dataclass(frozen=True, slots=True)
class Probe:
    """What opening a file gave: its size in pixels, or the reason why it cannot be used."""

    width: int = 0
    height: int = 0
    error: str = ""


def probe_image(path: Path, decode: bool = True) -> Probe:
    """Open a file and, with `decode`, read every pixel: only that finds a file that was cut short."""
    if not path.is_file():
        return Probe(error="image file is missing")
    try:
        with Image.open(path) as file:
            size = file.size
            if decode:
                file.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for broken files
        return Probe(error=f"image cannot be read ({type(error).__name__}: {error})")
    return Probe(*size)


def probe_images(paths: Sequence[Path], decode: bool = True, progress: Callable[[int, int], None] | None = None) -> list[Probe]:
    """`probe_image` for many files, on as many threads as there are cores (decoding releases the interpreter lock)."""
    probes: list[Probe] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, probe in enumerate(pool.map(lambda path: probe_image(path, decode), paths), start=1):
            probes.append(probe)
            if progress is not None:
                progress(done, len(paths))
    return probes
