"""`kdkernels` itself: help, exit codes, missing packages, info, inspect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import kdkernels
from torch import nn

COMMANDS = [
    "demo",
    "train",
    "distill",
    "evaluate",
    "inspect",
    "info",
    "methods",
    "compare-methods",
    "data",
    "data synthetic",
    "data check",
    "data convert",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_says_what_it_does_and_the_exit_codes(command: str) -> None:
    result = kdkernels(*command.split(), "--help")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert f"Usage: kdkernels {command}" in text or f"Usage: root {command}" in text
    assert "Exit codes: 0 done; 1 failed while running; 2 bad input or usage" in text
    goes_on = "the same command goes on" if command in ("demo", "compare-methods") else "--resume goes on"
    assert "130 interrupted" in text and goes_on in text and ("--resume" in goes_on) == ("--resume" in text)


def test_all_commands_are_listed_without_loading_torchvision() -> None:
    program = (
        "import sys; sys.argv = ['kdkernels', '--help']\n"
        "from kdkernels.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print([m for m in ('torchvision', 'accelerate', 'pycocotools', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip().endswith("[]")
    assert all(f"│ {command} " in run.stdout for command in COMMANDS[:9])


def test_without_typer_the_extra_is_named() -> None:
    program = "import sys; sys.modules['typer'] = None\nfrom kdkernels.cli import main\nmain()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "kdkernels: the command line needs typer: pip install 'kdkernels[cli]'"


def test_a_command_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = kdkernels("train", "--data", tmp_path)
    assert result.exit_code == 2
    assert "this command needs accelerate: pip install 'kdkernels[train]'" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train", "--epochs", "0"], ["train", "--nonsense"], ["data", "check", "x", "--format", "voc"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert kdkernels(*arguments).exit_code == 2


def test_info_says_versions_devices_backends_and_why_one_is_not_there() -> None:
    from kdkernels import backend_info

    result = kdkernels("info")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert f"torch {torch.__version__}" in text
    assert "devices: cpu" in text
    for name, values in backend_info().items():
        assert name in text and values["reason"] in text
    assert "pycocotools" in text


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_a_backend_that_cannot_run_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kdkernels import backend, native

    monkeypatch.setitem(native._loaded, "cpu", native.Library(None, "there is no library"))
    monkeypatch.setattr(backend, "_choice", name)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        backend.resolve("attention", [torch.zeros(1, 1, 1, 1)])
    reason = " ".join(str(caught.value).split())
    for arguments in (["train", "--data", tmp_path], ["demo", "--output", tmp_path / "out"]):
        result = kdkernels(*arguments)
        assert result.exit_code == 2 and reason in " ".join(result.stderr.split())
    assert reason in " ".join(kdkernels("info").stdout.split())


def test_inspect_lists_taps_with_channels_and_strides_and_marks_the_default() -> None:
    result = kdkernels("inspect", "fcos/slim-student", "--size", "96x320")
    rows = {cells[1]: cells for cells in map(_cells, result.stdout.splitlines()) if len(cells) == 5}
    assert result.exit_code == 0
    assert rows["backbone"] == ["default", "backbone", "0, 1, 2", "64, 64, 64", "8, 16, 32"]
    assert rows["backbone.body"] == ["", "backbone.body", "0, 1, 2", "32, 64, 128", "8, 16, 32"]
    assert "head:input" in rows and "head" not in rows
    assert "96 x 320" in result.stderr


def test_what_inspect_lists_can_be_tapped() -> None:
    from kdkernels import FeatureTap
    from kdkernels.cli.inspect_model import find_model, tappable

    model, (height, width) = find_model("fasterrcnn/resnet18", (64, 96))
    paths, frame, default = tappable(model, height, width)
    assert frame == (64, 96) and default == "backbone" and len(paths) > 3
    image = torch.rand(3, height, width)
    model.eval()
    for path, levels in paths:
        with torch.no_grad(), FeatureTap(model, path) as tap:
            model([image])
        assert {name: tuple(x.shape[1:]) for name, x in tap.features.items()} == dict(levels)


def test_inspect_takes_a_callable_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_inspect.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Neck(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Conv2d(3, 5, 3, 2, 1)\n"
        "        self.b = nn.Conv2d(5, 7, 3, 2, 1)\n"
        "    def forward(self, x):\n"
        "        a = self.a(x)\n"
        "        return a, self.b(a)\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.neck = Neck()\n"
        "    def forward(self, x):\n"
        "        assert x.shape[-1] % 4 == 0, 'sides must be multiples of 4'\n"
        "        return sum(y.mean() for y in self.neck(x))\n"
        "number = lambda: 3\n"
        "plain = lambda: nn.Sequential(nn.Conv2d(3, 4, 3))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    result = kdkernels("inspect", "mine_for_inspect:Model", "--size", "64x64")
    rows = [cells for cells in map(_cells, result.stdout.splitlines()) if len(cells) == 5]
    assert result.exit_code == 0
    assert ["", "neck", "0, 1", "5, 7", "2, 4"] in rows

    for argument, message in (
        ("mine_for_inspect:Model", None),
        ("mine_for_inspect:number", "gave a int, should give a torch.nn.Module"),
        ("mine_for_inspect:nothing", "has no 'nothing'"),
        ("mine_for_inspect:plain", "no module of mine_for_inspect:plain gives or takes several feature maps"),
        ("no_such_module_at_all:x", "No module named 'no_such_module_at_all'"),
    ):
        size = ("--size", "62x62") if message is None else ()
        result = kdkernels("inspect", argument, *size)
        assert result.exit_code == 2
        assert (message or "cannot take an image of 62 x 62 pixels: AssertionError: sides must be multiples of 4") in result.stderr


def test_inspect_says_what_it_knows_when_it_knows_nothing_of_that_name() -> None:
    result = kdkernels("inspect", "yolo")
    assert result.exit_code == 2
    assert "detectors: fcos, retinanet, ssdlite, fasterrcnn" in result.stderr


def test_inspect_leaves_the_model_as_it_was() -> None:
    from kdkernels.cli.inspect_model import find_model, tappable

    model, size = find_model("slim-student", (64, 64))
    model.train()
    model.backbone.eval()
    before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    tappable(model, *size)
    assert {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()} == before
    assert isinstance(model, nn.Module)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").split("│")] if line.startswith("│") else []
