"""LD (methods.md 6.10): localisation distillation on the positives and on the valuable localisation region, and of the classes."""

from __future__ import annotations

from .atss import Boxes, positives, region
from .logits import best_probability, divergence
from .tape import Number, Rows, split, total


def distilled(teacher: list[Number], student: list[Number], temperature: float) -> Number:
    """T^2 mean_bins q (log q - log p)."""
    return divergence(teacher, student, temperature) * (temperature * temperature / len(teacher))


def terms(
    classes_s: list,
    bins_s: list,
    classes_t: list,
    bins_t: list,
    anchors: list[Boxes],
    boxes: list[Boxes],
    ld: float = 0.25,
    vlr: float = 0.25,
    kd: float = 10.0,
    temperature: float = 10.0,
    class_temperature: float = 2.0,
) -> dict[str, Rows]:
    """classes (N, A, K) and bins (N, A, 4, bins) a level. The class term is a mean over the level's positives of the batch."""
    chosen = [positives(anchors, own) for own in boxes]
    valued = [region(anchors, own) for own in boxes]
    found: dict[str, Rows] = {"localization": [], "region": [], "classification": []}
    for level in range(len(anchors)):
        rows: dict[str, list[Number]] = {term: [] for term in found}
        images = range(len(boxes))
        for n in images:
            place, valuable, kind = [], [], []
            for i in range(len(anchors[level])):
                edges = zip(bins_t[level][n][i], bins_s[level][n][i], strict=True)
                positive, worth = chosen[n][level][i], valued[n][level][i]
                if positive or worth > 0:
                    apart = total([distilled(a, b, temperature) for a, b in edges])
                    if positive:
                        place.append(apart * (ld / 4.0 * best_probability(classes_s[level][n][i])))
                    if worth > 0:
                        valuable.append(apart * (vlr / 16.0 * worth))
                if positive:
                    kind.append(distilled(classes_t[level][n][i], classes_s[level][n][i], class_temperature))
            rows["localization"].append(total(place))
            rows["region"].append(total(valuable))
            rows["classification"].append(total(kind))
        count = sum(sum(chosen[n][level]) for n in images)
        whole = total(rows["classification"]) * (kd / count if count else 0.0)
        rows["classification"] = split([whole], [rows["classification"]])[0]
        for term in found:
            found[term].append(rows[term])
    return found
