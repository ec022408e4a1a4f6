"""What the order of the two products of a non-local block costs: theta (phi^T g) against (theta phi^T) g, forward and backward.

`python -m benchmarks.studies.non_local` writes non-local.json into the device's folder of benchmarks/results, and
`python -m benchmarks.report.tables` the tables of docs/non-local.md from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.losses.fbkd import POOLS, REDUCTIONS
from kdkernels.losses.non_local import NonLocal
from kdkernels.report.tables import Table

from ..measure.clock import Clock
from ..measure.memory import peak_bytes
from ..measure.provenance import device_label, provenance
from ..report.text import number

RESULTS = Path(__file__).resolve().parents[1] / "results"
NAME = "non-local.json"
CHANNELS = 256
#: P3 to P7 of an image of 800 x 1344 pixels.
SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
#: Milliseconds of one form in a round.
LEAST = 5.0
#: Entries of the matrix of all pairs beyond which a case is left out.
MOST_PAIRS = {"cpu": 1 << 25, "cuda": 1 << 29}


class Level(NamedTuple):
    name: str
    height: int
    width: int
    inner: int
    pool: int

    @property
    def pairs(self) -> int:
        """Entries of an image's matrix of all pairs."""
        pooled = (self.height // min(self.pool, self.height)) * (self.width // min(self.pool, self.width))
        return self.height * self.width * pooled


def quadratic(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """As `NonLocal.attend`, with the matrix of all pairs, as the published code does it."""
    affinity = torch.bmm(theta.transpose(1, 2), phi) / phi.shape[2]
    return torch.bmm(g, affinity.transpose(1, 2))


FORMS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"quadratic": quadratic, "associative": NonLocal.attend}


def levels() -> list[Level]:
    """As FBKD pools them, and without pooling."""
    found = [
        Level(f"P{3 + i}", *size, CHANNELS // reduction, pool)
        for i, (size, reduction, pool) in enumerate(zip(SIZES, REDUCTIONS, POOLS, strict=True))
    ]
    return found + [level._replace(pool=1) for level in found]


def study(level: Level, images: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Both forms of the products alone and of the whole block: paired times of alternating calls, and the most memory held at a time."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    block = NonLocal(CHANNELS, level.inner, level.pool).to(device)
    torch.nn.init.ones_(block.norm.weight)
    x = torch.randn(images, CHANNELS, level.height, level.width, generator=generator).to(device).requires_grad_()
    parts = [part.detach().requires_grad_() for part in block.embed(x)]
    up, inner_up = torch.randn_like(x), torch.randn_like(parts[0])

    def products(form: str) -> list[Tensor]:
        y = FORMS[form](*parts)
        return [y, *torch.autograd.grad(y, parts, inner_up)]

    def whole(form: str) -> list[Tensor]:
        block.attend = FORMS[form]  # type: ignore[method-assign, assignment]
        z = block(x)
        return [z, *torch.autograd.grad(z, [x, *block.parameters()], up)]

    result: dict[str, Any] = {**level._asdict(), "pairs": level.pairs, "images": images, "channels": CHANNELS}
    a, b = (products(form) for form in FORMS)
    result["largest difference"] = max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(a, b, strict=True))
    for name, call in (("products", products), ("block", whole)):
        calls = [lambda form=form, call=call: call(form) for form in FORMS]
        times = paired(Clock(device), calls, rounds)
        ratios = [q / a for q, a in times]
        bounds = quantiles(ratios, n=5, method="inclusive")
        result[name] = {
            "ms": {form: median(own) for form, own in zip(FORMS, zip(*times, strict=True), strict=True)},
            "ratio": {"median": median(ratios), "p20": bounds[0], "p80": bounds[-1]},
            "peak_bytes": {form: peak_bytes(device, one) for form, one in zip(FORMS, calls, strict=True)},
        }
    return result


def paired(clock: Clock, calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Mean milliseconds of every call in every round; a round runs each so often that the fastest takes `LEAST` in it."""
    fastest = min(min(clock.measure([call] * 3)) for call in calls)
    count = max(1, round(LEAST / fastest))
    times = []
    for i in range(rounds):
        # Every other round the other way round, so that neither is always the one that finds the other's data in the caches.
        order = range(len(calls)) if i % 2 == 0 else range(len(calls))[::-1]
        own = {k: sum(clock.measure([calls[k]] * count)) / count for k in order}
        times.append([own[k] for k in range(len(calls))])
    return times


def table(found: Mapping[str, Any]) -> Table:
    """A row a level, from the file that `main` writes."""
    of = found["provenance"]
    rows = []
    for case in found["levels"]:
        ratios = [case[name]["ratio"] for name in ("products", "block")]
        memory = [case[name]["peak_bytes"][form] for name in ("products", "block") for form in FORMS]
        rows.append(
            [
                f"{case['name']}, {case['height']} x {case['width']}",
                str(case["pool"]),
                str(case["inner"]),
                *(f"{number(r['median'])} ({number(r['p20'])} to {number(r['p80'])})" for r in ratios),
                *(number(None if x is None else x / 1e6) for x in memory),
            ]
        )
    times = [f"{name}, quadratic / associative" for name in ("products", "block")]
    memories = [f"{name}, {form}, MB" for name in ("products", "block") for form in FORMS]
    title = f"{of['device']}, torch {of['versions']['torch']}, {found['images']} image of {CHANNELS} channels, fp32, {of['threads']} thread"
    largest = max(case["largest difference"] for case in found["levels"])
    notes = [
        f"Median (p20 to p80) of {found['rounds']} paired ratios of the time of forward and backward; memory: the most held at a time.",
        f"The largest difference of a result or gradient between the two, relative to its largest entry: {largest:.1e}.",
    ]
    return Table(title, ["level", "pool", "inner", *times, *memories], rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = [level for level in levels() if level.pairs * args.images <= MOST_PAIRS[device.type]]
    found = {
        "provenance": provenance(device, 0),
        "images": args.images,
        "rounds": args.rounds,
        "levels": [study(level, args.images, args.rounds, device) for level in chosen],
    }
    path = RESULTS / device_label(device) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
