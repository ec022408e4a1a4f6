"""The step benchmark: models that are what they say, a gate that is not blind, shares that add up, records that can be read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.providers import Provider
from benchmarks.registry import ENTRIES
from benchmarks.steps import gate, run, session, timing
from benchmarks.steps.pairs import PAIRS, make_batch, make_models
from benchmarks.steps.step import Bench, Variant, variants

CPU = torch.device("cpu")
FCOS = replace(PAIRS["fcos-small"], image=(64, 96))
FRCNN = replace(PAIRS["frcnn-small"], image=(64, 96), rois=8)
GKD_BMFI = ENTRIES["gkd_bmfi"]
GRADIENTS = frozenset({"teacher_gradients"})
GKD_GRADIENTS = ["student_gradients", "teacher_gradients"]


def provider(change: Callable[[Any], Any]) -> Provider:
    """The eager baseline with its arguments changed (`change` of a dict) or its value (`change` of a tensor)."""

    def function(**inputs: Any) -> Any:
        inputs = change(inputs) if change.__name__ == "arguments" else inputs
        value = GKD_BMFI.eager(**inputs)
        return value if change.__name__ == "arguments" else change(value)

    return Provider("fake", lambda entry: function)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(FCOS, 2, CPU)


@pytest.fixture(scope="module")
def truth(bench: Bench) -> gate.Truth:
    return gate.truth(bench, Variant(GRADIENTS, "gkd_bmfi"), GKD_BMFI)


def error(bench: Bench, truth: gate.Truth, by: Provider, mode: str = "explicit") -> float:
    return gate.error(bench.step(Variant(GRADIENTS, "gkd_bmfi", by.name, mode), GKD_BMFI, by), truth)


@pytest.mark.parametrize("pair", [FCOS, FRCNN])
def test_detectors_see_the_images_as_they_are(pair: Any) -> None:
    batch = make_batch(pair, 2, CPU)
    teacher, student = make_models(pair, batch, CPU)
    for model in (teacher, student):
        images, targets = model.transform(batch.images, batch.targets)
        assert images.tensors.shape == (2, 3, *pair.image)
        assert torch.equal(targets[0]["boxes"], batch.targets[0]["boxes"])
    features = [list(model.eval().backbone(images.tensors).values()) for model in (teacher, student)]
    assert [x.shape for x in features[0]] == [x.shape for x in features[1]]
    assert all(0.1 < x.std() < 10 for x in features[0]), "a teacher's features have the scale of normalised ones"


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_boxes_lie_inside_and_have_an_area(pair: Any) -> None:
    height, width = pair.image
    assert height % 32 == width % 32 == 0
    for target in make_batch(pair, 3, CPU).targets:
        boxes = target["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 15.9).all()
        assert target["labels"].min() >= 1 and target["labels"].max() < pair.classes


def test_variants_hold_the_probes_that_their_losses_are_measured_against() -> None:
    plan = variants([GKD_BMFI, ENTRIES["aid_bmfi"]], ["eager", "reference"], ["inline", "explicit"])
    assert [v.name for v in plan if v.loss is None] == ["student", "+ teacher forward", "+ teacher head gradient", "+ teacher losses"]
    assert all(v.probe in plan for v in plan)
    assert [v.mode for v in plan if v.loss == "gkd_bmfi"] == ["inline", "explicit"] * 2
    assert [v.mode for v in plan if v.loss == "aid_bmfi"] == ["either"] * 2, "no student gradient: both modes are the same"


@pytest.mark.parametrize("mode", ["inline", "explicit"])
@pytest.mark.parametrize("name", ["paper", "eager", "reference"])
def test_gate_admits_honest_providers(bench: Bench, truth: gate.Truth, name: str, mode: str) -> None:
    assert gate.refusal(error(bench, truth, gate.providers()[name], mode), amp=False) == ""


@pytest.mark.parametrize("mode", ["inline", "explicit"])
def test_gate_rejects_wrong_gradients(bench: Bench, truth: gate.Truth, mode: str) -> None:
    def doubled(value: Tensor) -> Tensor:
        return 2 * value

    def slightly_off(value: Tensor) -> Tensor:
        return 1.01 * value

    def detached(value: Tensor) -> Tensor:
        return value.detach() + 0 * value

    def nan(value: Tensor) -> Tensor:
        return value * float("nan")

    def arguments(inputs: dict[str, Any]) -> dict[str, Any]:
        features = inputs["student_features"]
        return {**inputs, "student_features": [*features[:-1], features[-1].detach()]}

    for change in (doubled, slightly_off, detached, nan, arguments):
        found = error(bench, truth, provider(change), mode)
        assert gate.refusal(found, amp=False), f"{change.__name__} was admitted with an error of {found}"


@pytest.mark.parametrize("part", ["gkd", "bmfi"])
def test_gate_sees_each_part_of_a_loss(bench: Bench, truth: gate.Truth, part: str) -> None:
    entry = ENTRIES[part]
    needed = ["student_features", "teacher_features", *(["boxes", "image_size"] if part == "bmfi" else GKD_GRADIENTS)]
    half = Provider("half", lambda _: lambda **inputs: entry.eager(**{name: inputs[name] for name in needed}))
    assert gate.refusal(error(bench, truth, half), amp=True), f"a provider that computes {part} alone was admitted"


def test_gate_weighs_distillation_as_the_task(truth: gate.Truth) -> None:
    assert truth.factor >= 1
    ratio = (truth.wanted.norm() / truth.plain.norm()).item()
    assert 0.5 < ratio < 2 or truth.factor == 1


def test_gate_refuses_a_loss_that_adds_nothing(bench: Bench) -> None:
    def losses() -> dict[str, Any]:
        made = GKD_BMFI.losses()
        for loss in made.values():
            loss.weight = 0.0
        return made

    with pytest.raises(ValueError, match="nothing to compare"):
        gate.truth(bench, Variant(GRADIENTS, "gkd_bmfi"), replace(GKD_BMFI, losses=losses))


def test_sampling_detectors_repeat_themselves_after_a_reset() -> None:
    bench = Bench(FRCNN, 2, CPU)
    variant = Variant(GRADIENTS, "gkd_bmfi", "reference", "explicit")
    found = gate.truth(bench, variant, GKD_BMFI)
    bench.step(Variant(frozenset()))()  # disturbs the random streams
    for mode in ("explicit", "inline"):
        assert gate.error(bench.step(replace(variant, mode=mode), GKD_BMFI, gate.providers()["reference"]), found) < 1e-4


def test_aid_in_a_step_takes_the_teachers_losses(bench: Bench) -> None:
    entry = ENTRIES["aid_bmfi"]
    variant = Variant(frozenset({"teacher_losses"}), "aid_bmfi", "eager", "either")
    found = gate.truth(bench, variant, entry)
    assert gate.error(bench.step(variant, entry, gate.providers()["eager"]), found) < 1e-3


def test_step_updates_the_students_copy_and_frees_its_gradients(bench: Bench) -> None:
    step = bench.step(Variant(frozenset()))
    before = [p.detach().clone() for p in step.model.parameters()]
    assert step().isfinite()
    assert all(p.grad is None for p in step.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, step.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(before, bench.student.parameters(), strict=True))


def test_bf16_autocast_has_a_gate_of_its_own() -> None:
    bench = Bench(FCOS, 1, CPU, amp=True)
    variant = Variant(GRADIENTS, "gkd_bmfi", "eager", "inline")
    found = gate.error(bench.step(variant, GKD_BMFI, gate.providers()["eager"]), gate.truth(bench, variant, GKD_BMFI))
    assert gate.refusal(found, amp=True) == "" and gate.refusal(0.05, amp=True)


def test_shares_are_differences_within_rounds() -> None:
    loss, aid = Variant(GRADIENTS, "gkd_bmfi", "eager", "inline"), Variant(frozenset({"teacher_losses"}), "aid_bmfi", "eager", "either")
    drift = [0.0, 100.0, 400.0]
    above = {Variant(None): 10, Variant(frozenset()): 13, Variant(GRADIENTS): 20, aid.probe: 18, loss: 21, aid: 20}
    times = {variant: [ms + d for d in drift] for variant, ms in above.items()}
    p50 = {name: part and part["p50"] for name, part in timing.shares(loss, times).items()}
    assert p50 == {"teacher_forward_ms": 3, "teacher_head_gradient_ms": 7, "teacher_losses_ms": None, "distillation_ms": 1}
    p50 = {name: part and part["p50"] for name, part in timing.shares(aid, times).items()}
    assert p50 == {"teacher_forward_ms": 3, "teacher_head_gradient_ms": None, "teacher_losses_ms": 5, "distillation_ms": 2}
    assert set(timing.shares(Variant(None), times).values()) == {None}
    assert timing.ratio(times, loss) == pytest.approx(121 / 110)


def test_a_step_is_held_against_those_of_the_same_loss_and_mode() -> None:
    native, reference = (Variant(GRADIENTS, "gkd_bmfi", name, "inline") for name in ("native", "reference"))
    others = {
        Variant(None): 1.0,
        native.probe: 1.0,
        replace(native, mode="explicit"): 9.0,
        Variant(GRADIENTS, "gkd", "eager", "inline"): 9.0,
    }
    times = {variant: [ms] * 3 for variant, ms in others.items()} | {native: [10.0, 100.0, 20.0], reference: [12.0, 150.0, 22.0]}
    assert timing.against(times, native) == {"reference": pytest.approx(1.2)}, "the median of the rounds' ratios"
    assert timing.against(times, reference) == {"native": pytest.approx(1 / 1.2)}
    assert timing.against(times, Variant(None)) == {} and timing.against(times, native.probe) == {}


def test_every_backend_has_its_steps() -> None:
    plan = variants([GKD_BMFI], ["reference", "native"], run.MODES)
    assert [v.label for v in plan if v.provider == "native"] == ["+ gkd_bmfi native inline", "+ gkd_bmfi native explicit"]


def test_turns_are_shuffled_and_an_interrupted_round_does_not_count() -> None:
    calls: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def call() -> None:
            if len(calls) == 17:
                raise KeyboardInterrupt
            calls.append(name)

        return call

    steps = {Variant(None): step("a"), Variant(frozenset()): step("b"), Variant(GRADIENTS): step("c")}
    times = timing.in_turns(steps, CPU, 50)
    assert {len(values) for values in times.values()} == {5}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 15, 3)]
    assert all(set(r) == {"a", "b", "c"} for r in rounds) and len(set(rounds)) > 1


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args([*words, "--device", "cpu"])


def test_run_writes_a_record_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(run.PAIRS, "fcos-small", FCOS)
    path = tmp_path / "steps.jsonl"
    words = ["--provider", "eager,reference,native", "--mode", "inline", "--rounds", "2", "--batch", "1", "--output", str(path)]
    monkeypatch.setattr(session, "absent", lambda provider, device: "not built" if provider.name == "native" else "")
    assert run.main(arguments(*words)) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["variant"] for r in records] == ["student", "+ teacher forward", "+ teacher head gradient", *["+ gkd_bmfi"] * 3]
    assert [r["status"] for r in records] == ["measured"] * 5 + ["absent"] and records[-1]["reason"] == "not built"
    assert all(r["kind"] == "step" and r["image"] == [64, 96] and r["pair"] == "fcos-small" and r["batch"] == 1 for r in records)
    student, eager = records[0], records[3]
    assert student["ratio_to_student"] == 1 and student["rounds"] == 2 and student["peak_mb"] > 1
    assert set(student["ms"]) == {"p20", "p50", "p80"} and set(student["shares"].values()) == {None}
    assert eager["provider"] == "eager" and eager["mode"] == "inline" and 0 <= eager["error"] < 1e-3
    assert all(eager["shares"][name] is not None for name in ("teacher_forward_ms", "teacher_head_gradient_ms", "distillation_ms"))
    assert {"before", "after", "threads", "native"} <= set(eager["provenance"])
    assert list(eager["against"]) == ["reference"] and eager["against"]["reference"] > 0 and student["against"] == {}
    shown = capsys.readouterr()
    assert "| + gkd_bmfi eager inline |" in shown.out and "absent: not built" in shown.out
    assert "round 2 of 2" in shown.err


def test_a_broken_or_wrong_provider_gets_no_time_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(value: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    def wrong(value: Tensor) -> Tensor:
        return 3 * value

    fakes = {"paper": provider(broken), "eager": provider(wrong)}
    monkeypatch.setattr(session, "providers", lambda: {**gate.providers(), **fakes})
    monkeypatch.setitem(run.PAIRS, "fcos-small", FCOS)
    path = tmp_path / "steps.jsonl"
    assert run.main(arguments("--provider", "paper,eager,reference", "--mode", "inline", "--rounds", "1", "--output", str(path))) == 1
    paper, eager, reference = [json.loads(line) for line in path.read_text().splitlines()][3:]
    assert paper["status"] == "failed" and paper["reason"] == "RuntimeError: out of luck" and paper["ms"] is None
    assert eager["status"] == "rejected" and "off by 2" in eager["reason"] and eager["ms"] is None
    assert eager["error"] == pytest.approx(2, rel=0.01)
    assert reference["status"] == "measured"


def test_ctrl_c_keeps_what_was_timed_and_says_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.PAIRS, "fcos-small", FCOS)

    def statuses(stop: str, after: int) -> list[str]:
        """Of all variants when the `after`-th call of that function is interrupted."""
        calls, function = 0, getattr(session, stop)

        def interrupted(*args: Any, **given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt
            return function(*args, **given)

        path = tmp_path / f"{stop}{after}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(session, stop, interrupted)
            words = ["--provider", "eager,reference", "--mode", "inline", "--rounds", "1", "--batch", "1", "--output", str(path)]
            assert run.main(arguments(*words)) == 130
        return [json.loads(line)["status"] for line in path.read_text().splitlines()]

    assert statuses("refusal", 2) == ["skipped"] * 5, "while the second loss was admitted"
    assert statuses("peak_bytes", 3) == ["measured"] * 5, "after the timing"


def test_a_step_that_fails_once_all_are_there_costs_only_its_own_shares() -> None:
    made = session.Session(FCOS, 1, CPU, False, 0, lambda line: None)
    plan = [Variant(None), Variant(frozenset()), Variant(GRADIENTS)]
    made.admit(plan)

    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    made.steps[plan[1]] = fails  # type: ignore[assignment]
    made.measure(1)
    student, forward, gradient = map(made.result, plan)
    assert forward["status"] == "failed" and "out of memory" in forward["reason"] and forward["ms"] is None
    assert student["status"] == gradient["status"] == "measured" and gradient["ratio_to_student"] > 0
    assert gradient["shares"]["teacher_forward_ms"] is None


def test_steps_that_end_in_nan_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = session.Session(FCOS, 1, CPU, False, 0, lambda line: None)
    variant = Variant(None)
    made.admit([variant])
    with torch.no_grad():
        next(made.steps[variant].model.parameters()).fill_(float("nan"))
    made.measure(1)
    found = made.result(variant)
    assert found["status"] == "failed" and "not finite" in found["reason"] and found["ms"] is None


@pytest.mark.parametrize("words", [["--pair", "fcos-r99"], ["--provider", "eager,magic"], ["--loss", "mse"], ["--rounds", "0"]])
def test_wrong_names_are_refused_with_the_choices(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(*words)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "choose from" in shown or "1 or more" in shown
