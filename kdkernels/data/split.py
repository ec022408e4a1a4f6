"""A seeded 8:2 split that stays put when images are added: each image is placed by a hash of its own name.

Frames of one drive are nearly equal; where a data set holds such neighbours (KITTI does) a split by image leaks between the parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

TRAIN_FRACTION = 0.8
SPLITS = ("train", "val")


def position(name: str, seed: int) -> float:
    """The place of an image in [0, 1): SHA-256 of "seed:name"."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def split_names(names: Sequence[str], split: str, seed: int = 0) -> list[int]:
    """Indices of the images that belong to `split` ("train": position < 0.8, "val": the rest), in the given order.

    The parts are 8:2 on average. Of two or more images each part gets at least one: the nearest to the border.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    places = [position(name, seed) for name in names]
    train = {i for i, place in enumerate(places) if place < TRAIN_FRACTION}
    if len(places) > 1 and len(train) == len(places):
        train.remove(max(train, key=places.__getitem__))
    elif len(places) > 1 and not train:
        train.add(min(range(len(places)), key=places.__getitem__))
    return [i for i in range(len(places)) if (i in train) == (split == "train")]


def names_hash(names: Sequence[str]) -> str:
    """SHA-256 of the sorted names: two runs with the same value used the same images."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
