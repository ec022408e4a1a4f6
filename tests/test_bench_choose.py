"""`kdkernels bench choose`: who is timed on what, who is kept out, and the table that `auto` then follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from choice_support import PRIMITIVES, level, table, taken, two_backends
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
from kdkernels.tables import DTYPES, IMAGE_SIZES, LAYOUTS, SIZES, Key, size_of
from kdkernels.tables import sizes as sizes_of

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
    # Those that read two pyramids have no small ones.
    others = ("map_distance", "box_mask", "feature_imitation", "logit_bce", "logit_kl", "channel_kl", "correlation", ONE_LAUNCH)
    assert {len(found) for name, found in of.items() if name not in others} == {18}
    # It takes no fp16, and is held against what the entries before it make of the others; by sizes of an image and numbers of images.
    assert len(of[ONE_LAUNCH]) == 24 and [key.name for key, _ in keys[-24:]] == [ONE_LAUNCH] * 24
    assert "fp16" not in {case.dtype for _, case in of[ONE_LAUNCH]}
    assert len(dict(keys)) == len(keys)
    # Maps and boxes are fp32 and small, on whatever features: the largest case stands for them.
    ((key, case),) = of["map_distance"]
    assert str(key) == "map_distance fp32 contiguous small" and case.pyramid == "frcnn" and case.batch == 8


def test_one_launch_is_decided_by_images_as_large_and_as_many() -> None:
    """Eight images of FCOS are as many elements as two of a pyramid from P2 on, but one image of the latter is four times the memory."""
    keys = {case.name: str(key) for key, case in subjects.grid([ONE_LAUNCH], ["bf16"], ["contiguous"], list(written.CASES))}
    sizes = {name.partition(" C=")[0]: key.rpartition(" ")[2] for name, key in keys.items()}
    assert sizes == {
        **{"tiny N=2": "small", "fcos N=2": "medium", "frcnn N=2": "large"},
        **{"tiny N=8": "small-x8", "fcos N=8": "medium-x8", "frcnn N=8": "large-x8"},
    }
    assert {choice.key_of("terms", subjects.SUBJECTS["terms"].tensors(Case(name, 8))).size for name in ("fcos", "frcnn")} == {"large"}
    for case in written.CASES.values():
        elements = case.channels * case.pixels
        (end,) = (end for size, end in IMAGE_SIZES.items() if size == sizes[f"{case.pyramid} N=2"])
        assert end is not None and elements < end < 2 * elements, "what is measured is little below the end of its size"


@pytest.mark.parametrize(
    ("images", "elements", "size"),
    [
        *((images, 1 << 19, size) for images, size in ((0, "small-x1"), (1, "small-x1"), (2, "small"), (7, "small"), (8, "small-x8"))),
        *((8, elements, f"{size}-x8") for elements, size in ((1 << 20, "medium"), (6 << 20, "large"), (24 << 20, "huge"))),
        *((9, elements, f"{size}-x8") for elements, size in (((1 << 20) - 8, "small"), ((6 << 20) - 8, "medium"))),
    ],
)
def test_sizes_of_images(images: int, elements: int, size: str) -> None:
    levels = [torch.empty(images, 8, 1, part // 8, device="meta") for part in (elements - 8, 8)]
    assert size_of(levels, ONE_LAUNCH) == size and size in sizes_of(ONE_LAUNCH)
    assert size_of(levels) == size_of(levels, "terms") and size_of(levels) in SIZES


def test_what_has_no_entry_of_its_own_goes_by_passes(folder: Path) -> None:
    """No call of one image, and none of larger images or more of them than were measured for an entry."""
    (folder / "sm_90.json").write_text(table({f"{ONE_LAUNCH} bf16 contiguous medium-x8": (2.0, 1.0)}))
    taken_by = {size: choice.order(ONE_LAUNCH, [level(size)])[0] for size in sizes_of(ONE_LAUNCH)}
    assert [size for size, name in taken_by.items() if name == "native"] == ["medium-x8"] and len(taken_by) == 12
    (folder / "sm_90.json").write_text(table({"terms bf16 contiguous medium-x8": (2.0, 1.0)}))
    choice.forget()
    with pytest.raises(ValueError, match="terms bf16 contiguous medium-x8: size must be one of small, medium, large"):
        choice.order("terms", [level()])


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
    assert seen == [("terms", alone, "triton"), ("channel_mean", alone, "native"), *[(ONE_LAUNCH, {}, "native")] * 2]
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
