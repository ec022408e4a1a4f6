"""`kdkernels bench choose`: who is timed on what, who is kept out, and the table that `auto` then follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from choice_support import PRIMITIVES, level, taken, two_backends
from torch import Tensor

from benchmarks import tables as written
from benchmarks.call import bind
from benchmarks.choose import contest, run, subjects
from benchmarks.cli import main
from benchmarks.measure.gate import Checked
from benchmarks.measure.samples import samples
from benchmarks.providers import Provider, providers
from benchmarks.registry import ENTRIES, Case
from kdkernels import backend, choice
from kdkernels.tables import DTYPES, LAYOUTS, SIZES, Key

CPU = torch.device("cpu")
ONE_LAUNCH = "terms_persistent"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with two_backends(tmp_path, monkeypatch):
        yield tmp_path


class Timed:
    """A cell whose calls take what `ms` says, with a little noise; `wrong`: backend -> why the gate keeps it out."""

    def __init__(self, ms: Mapping[str, float], wrong: Mapping[str, str] | None = None, late: str = "") -> None:
        self.ms, self.wrong, self.late, self.turns = ms, wrong or {}, late, 0
        self.attempts: dict[str, Any] = {}

    @property
    def admitted(self) -> list[str]:
        return [name for name, attempt in self.attempts.items() if not attempt.checked.reason]

    def admit(self, provider: Provider) -> None:
        self.attempts[provider.name] = SimpleNamespace(checked=Checked(self.wrong.get(provider.name, ""), None, None))

    def contents(self) -> list[Any]:
        return []

    def warm(self, name: str, seconds: float) -> float:
        return 0.0

    def turn(self, name: str, calls: int) -> list[float]:
        self.turns += 1
        return [self.ms[name] * (1 + 0.001 * (self.turns % 3))] * calls

    def recheck(self, before: list[Any]) -> None:
        if self.late:
            self.attempts["native"].checked = Checked(self.late, None, None)


PAIR = [providers()[name] for name in choice.BACKENDS]


@pytest.mark.parametrize(
    ("native_ms", "verdict", "rounds"), [(0.5, "faster", 8), (2.0, "slower", 8), (1.0, "same", 8), (0.979, "undecided", 12)]
)
def test_both_get_times_in_turns_until_there_is_a_verdict(native_ms: float, verdict: str, rounds: int) -> None:
    cell = Timed({"triton": 1.0, "native": native_ms})
    found = contest.contest(cell, *PAIR, rounds=12)  # type: ignore[arg-type]
    assert found.ms == pytest.approx({"triton": 1.0, "native": native_ms}, rel=0.003) and list(found.ms) == list(choice.BACKENDS)
    assert (found.judgement.verdict, found.rounds, cell.turns) == (verdict, rounds, 2 * rounds)


@pytest.mark.parametrize("about", [{"wrong": {"native": "values differ"}}, {"late": "values differ"}])
def test_who_is_wrong_gets_no_entry(about: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="^native: values differ$") as caught:
        contest.contest(Timed({"triton": 1.0, "native": 0.5}, **about), *PAIR, rounds=8)  # type: ignore[arg-type]
    assert "triton" not in str(caught.value)


def test_a_grid_has_every_fused_primitive_and_each_key_once() -> None:
    assert set(subjects.SUBJECTS) == set(PRIMITIVES)
    keys = subjects.grid(tuple(subjects.SUBJECTS), tuple(DTYPES.values()), LAYOUTS, tuple(written.CASES))
    of = {name: [(key, case) for key, case in keys if key.name == name] for name in PRIMITIVES}
    assert {len(found) for name, found in of.items() if name not in ("map_distance", "box_mask", "feature_imitation", ONE_LAUNCH)} == {18}
    # It takes no fp16, and is held against what the entries before it make of the others.
    assert len(of[ONE_LAUNCH]) == 12 and [key.name for key, _ in keys[-12:]] == [ONE_LAUNCH] * 12
    assert "fp16" not in {case.dtype for _, case in of[ONE_LAUNCH]}
    assert len(dict(keys)) == len(keys)
    # Maps and boxes are fp32 and small, on whatever features: the largest case stands for them.
    ((key, case),) = of["map_distance"]
    assert str(key) == "map_distance fp32 contiguous small" and case.pyramid == "frcnn" and case.batch == 8


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_a_key_is_that_of_the_primitives_call(primitive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tiny", batch=1, channels=8, dtype="bf16", layout="channels_last")
    asked: list[Key] = []
    resolve, prefers = backend.resolve, backend.prefers

    def ask(name: str, tensors: Sequence[Tensor]) -> None:
        if name == primitive and tensors[0].dtype in DTYPES:
            asked.append(choice.key_of(name, tensors))
            assert sum(x.numel() for x in tensors) == sum(x.numel() for x in subjects.SUBJECTS[primitive].tensors(case))

    def resolved(name: str, tensors: Sequence[Tensor], *args: Any) -> Any:
        ask(name, tensors)
        return resolve(name, tensors, *args)

    def preferred(backend: str, name: str, tensors: Sequence[Tensor]) -> bool:
        ask(name, tensors)
        return prefers(backend, name, tensors)

    entry, mode, _ = subjects.SUBJECTS[primitive]
    monkeypatch.setattr("benchmarks.measure.samples.cache_bytes", lambda device: 0)
    (one, *_) = samples(ENTRIES[entry], case, mode, CPU, 0)
    monkeypatch.setattr(backend, "resolve", resolved)
    # What is a primitive only where it is the fastest.
    monkeypatch.setattr(backend, "prefers", preferred)
    bind(ENTRIES[entry], ENTRIES[entry].call, mode, True)(one)
    assert set(asked) == {subjects.key(primitive, case)}


def test_a_provider_of_one_primitive_leaves_the_others_to_auto() -> None:
    x = torch.ones(1, 2, 3, 4)
    with Provider("triton", lambda entry: entry.call, "triton", "channel_mean").active():
        assert backend._assigned == {"channel_mean": "triton"} and backend._choice == "auto"
        assert taken(x, "attention", [x], 0.5) != "triton"
    assert backend._assigned == {}


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which native takes half of Triton's time for `terms`, and Triton's of native's for everything else."""

    def cell(entry: Any, case: Case, mode: str, device: torch.device, seed: int) -> Timed:
        return Timed({"triton": 1.0, "native": 0.5 if (entry.name, mode) == ("gkd_bmfi", "backward") else 2.0})

    monkeypatch.setattr("benchmarks.measure.cell.Cell", cell)
    monkeypatch.setattr(run, "refusal", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(written, "provenance", lambda device, seed: {"time": "then"})


@pytest.mark.usefixtures("measuring")
def test_what_is_measured_is_what_auto_then_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["choose", "--device", "cpu", "--primitive", "terms,channel_mean", "--case", "tiny,frcnn", "--layout", "contiguous"]
    assert main([*words, "--dtype", "bf16"]) == 0
    assert "terms bf16 contiguous large: triton 1" in capsys.readouterr().err
    found = choice.TABLE.read(folder / "sm_90.json")
    assert found["runs"] == [{"time": "then"}] and len(found["entries"]) == 4
    assert found["entries"]["terms bf16 contiguous large"]["case"]["batch"] == 8
    assert found["entries"]["terms bf16 contiguous large"]["ratio"]["verdict"] == "faster"
    assert [choice.order(name, [level(size)])[0] for name in ("terms", "channel_mean") for size in SIZES] == [
        *("native", "triton", "native"),
        *("triton", "triton", "triton"),
    ]
    assert main([*words, "--dtype", "bf16,fp32"]) == 0
    assert "4 entries to measure, 4 are there" in capsys.readouterr().err
    assert {entry["run"] for entry in choice.TABLE.read(folder / "sm_90.json")["entries"].values()} == {0, 1}
    assert list(folder.iterdir()) == [folder / "sm_90.json"]


@pytest.mark.usefixtures("measuring")
def test_the_one_launch_is_measured_last_against_the_passes_of_the_table_just_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stands beside nothing else: what is measured would not be called."""
    seen: list[tuple[str, dict[str, str], str]] = []
    inner = contest.contest

    def contested(*args: Any) -> contest.Outcome:
        seen.append((args[1].primitive, dict(backend._assigned), choice.order("terms", [level()])[0]))
        return inner(*args)

    monkeypatch.setattr(contest, "contest", contested)
    assert choice.order("terms", [level()])[0] == "triton"
    words = ["choose", "--device", "cpu", "--case", "tiny", "--layout", "contiguous", "--dtype", "bf16"]
    assert main([*words, "--primitive", f"{ONE_LAUNCH},terms,channel_mean"]) == 0
    alone = {ONE_LAUNCH: "reference"}
    assert seen == [("terms", alone, "triton"), ("channel_mean", alone, "native"), (ONE_LAUNCH, {}, "native")]
    assert backend._assigned == {} and backend.prefers("native", ONE_LAUNCH, [level()])


def test_it_refuses_without_a_gpu_and_without_a_backend(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["choose", "--device", "cpu"]) == 2
    assert "takes a CUDA GPU" in capsys.readouterr().err and list(folder.iterdir()) == []
    monkeypatch.setattr(run, "absent", lambda provider, device: f"no {provider.name}" if provider.name == "native" else "")
    assert run.refusal(torch.device("cuda")) == "native cannot run here: no native"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "compute capability" in run.refusal(torch.device("cuda"))
