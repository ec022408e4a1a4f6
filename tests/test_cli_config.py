"""The configuration of `train` and `distill`: file, flags, --set, --print-config; and the losses that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import kdkernels

from kdkernels import recipes
from kdkernels.losses import AIDLoss, BMFILoss, GKDLoss


def printed(*arguments: str | Path) -> dict[str, Any]:
    result = kdkernels(*arguments, "--print-config")
    assert result.exit_code == 0, result.stderr
    return yaml.safe_load(result.stdout)


def test_print_config_has_every_key_and_reads_back_as_itself(tmp_path: Path) -> None:
    first = printed(
        "distill", "--data", "here", "--teacher", "t", "--aid", "--size", "320x96", "--lr", "1e-3", "--set", "losses.bmfi.lambda_=0.2"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(first), encoding="utf-8")
    assert printed("distill", "--config", tmp_path / "run.yaml") == first
    assert set(first) == {"data", "model", "teacher", "losses", "train"}
    assert first["data"]["root"] == "here" and first["teacher"] == "t"
    assert (first["model"]["min_size"], first["model"]["max_size"]) == (96, 320)
    assert first["train"]["learning_rate"] == 1e-3 and first["train"]["run_dir"] == "runs/distill"
    bmfi, gkd = first["losses"]["bmfi"], first["losses"]["gkd"]
    assert (bmfi["type"], bmfi["alpha"], bmfi["granularity"]) == ("aid", 0.1, None)
    assert bmfi["base"] == {**bmfi["base"], **recipes.LOSSES["bmfi"], "lambda_": 0.2} and bmfi["base"]["expand"] == 2.0
    assert gkd["base"] == {**gkd["base"], **recipes.LOSSES["gkd"], "preset": "paper"}


def test_flags_win_over_the_file_and_set_over_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {root: a, format: coco}\ntrain: {epochs: 3, seed: 1, batch_size: 2, weight_decay: 1e-3}\n", encoding="utf-8")
    found = printed(
        "train", "-c", file, "--data", "b", "--epochs", "4", "--seed", "2", "--set", "train.seed=5", "--set", "train.levels=[a, b]"
    )
    assert found["data"]["root"] == "b" and found["data"]["format"] == "coco"
    train = found["train"]
    assert (train["epochs"], train["seed"], train["batch_size"], train["weight_decay"]) == (4, 5, 2, 1e-3)
    assert train["levels"] == ["a", "b"] and train["run_dir"] == "runs/train"
    assert found["losses"] == {}


#: A value other than the default for every key whose default is nothing or one of several words.
OTHER = {
    "data.root": "r", "data.val": "v", "data.format": "coco", "data.mapping": "grouped", "data.size": 64,
    "model.detector": "retinanet", "model.backbone": "resnet18", "model.min_size": 64, "model.max_size": 128, "model.pretrained": True,
    "model.neck_channels": 32, "model.neck_norm": False, "model.head_convs": 1, "model.levels": 5, "model.anchor_scale": 2.0,
    "model.score_thresh": 0.1, "model.nms_thresh": 0.4, "model.detections": 7, "model.reg_max": 16,
    "model.proposals": 20, "model.rois": 8,
    "train.run_dir": "x", "train.steps": 7, "train.optimizer": "sgd", "train.learning_rate": 0.5, "train.schedule": "step",
    "train.mixed_precision": "bf16", "train.device": "cpu", "train.mode": "explicit", "train.levels": ["0"], "train.student_tap": "a",
    "train.teacher_tap": "b", "train.kd_schedule": "cosine", "train.teacher_weights": "argmin",
}  # fmt: skip


def test_every_key_of_the_file_can_be_set() -> None:
    before = printed("train")
    wanted = dict(OTHER)
    for section in ("data", "model", "train"):
        for key, value in before[section].items():
            name = f"{section}.{key}"
            if name in ("train.resume", *OTHER):
                continue
            wanted[name] = not value if isinstance(value, bool) else value + 0.5 if isinstance(value, float) else value + 1
    sets = [
        part
        for key, value in wanted.items()
        for part in ("--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}")
    ]
    after = printed("train", *sets, "--set", "teacher=t")
    assert {f"{section}.{key}": value for section in ("data", "model", "train") for key, value in after[section].items()} == {
        **wanted,
        "train.resume": False,
    }
    assert after["teacher"] == "t"


def test_losses_of_a_file_start_from_the_recipe_and_keep_their_names(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "losses:\n  bmfi: {alpha: 2e-3}\n  imitation: {type: gkd-imitation, weight: 5}\n"
        "  careful: {type: aid, alpha: 0.2, base: {type: gkd}}\n",
        encoding="utf-8",
    )
    entries = printed("distill", "-c", file)["losses"]
    losses = recipes.build_losses(entries)
    assert list(losses) == ["bmfi", "imitation", "careful"]
    assert isinstance(losses["bmfi"], BMFILoss) and (losses["bmfi"].alpha, losses["bmfi"].lambda_) == (2e-3, 0.3)
    assert isinstance(losses["imitation"], GKDLoss) and (losses["imitation"].form, losses["imitation"].weight) == ("imitation", 5)
    assert isinstance(losses["careful"], AIDLoss) and losses["careful"].alpha == 0.2 and isinstance(losses["careful"].base, GKDLoss)
    assert printed("distill", "-c", file, "--method", "gkd")["losses"] == {"gkd": recipes.expand("gkd", None)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.epoch=3"], "unknown key train.epoch; valid are run_dir, seed, epochs"),
        (["--set", "epochs=3"], "unknown key epochs; did you mean train.epochs?"),
        (["--set", "data.root.x=3", "--data", "d"], "data.root.x: data.root is a value and has no keys"),
        (["--set", "train.seed"], "write KEY=VALUE"),
        (["--set", "train.seed=[1"], "the value is not YAML"),
        (["--set", "train.seed=abc"], "train: seed is 'abc', should be int"),
        (["--set", "train.optimizer=adam"], "train: optimizer is 'adam', should be one of adamw, sgd"),
        (["--set", "data.skip_bad=3"], "data.skip_bad is 3, should be bool"),
        (["--set", "model.levels=x"], "model.levels is 'x', should be int or nothing"),
        (["--set", "data=3"], "data should be key: value, is 3"),
        (["--size", "96"], "--size 96: write two numbers of pixels, such as 96x320"),
        (["--method", "gkd+nonsense"], "loss 'nonsense': unknown type 'nonsense'; the types are "),
        (["--method", "fgd,cwd"], "several methods are joined by +: --method fgd+cwd"),
        (["--method", "fgd+"], "--method 'fgd+': names are joined by +, and one is empty"),
        (["--method", "+"], "--method '+': names are joined by +, and one is empty"),
        (["--method", "fgd+cwd+fgd"], "--method 'fgd+cwd+fgd': fgd stands there more than once"),
        (["--method", "fgd", "--set", "losses.fgd.preset=bogus"], "loss 'fgd': preset must be one of one-stage, two-stage, "),
        (["--method", "fgd", "--set", "losses.fgd.bogus=1"], "loss 'fgd': unknown options bogus; fgd has weight, preset"),
        (["--method", "fgd", "--aid", "--set", "losses.fgd.base.bogus=1"], "loss 'fgd': unknown options base; fgd has"),
        (["--method", "fgd", "--set", "losses.fgd.alpha=x"], "loss 'fgd': alpha must be a finite number; got 'x'"),
        (["--method", "ld", "--set", "losses.ld.temperature=hot"], "loss 'ld': temperature must be a finite number; got 'hot'"),
        (["--method", "bmfi", "--set", "losses.bmfi.area_norm=no thanks"], "loss 'bmfi': area_norm must be true or false; got 'no thanks'"),
        (["--method", "gkd+aid"], "to weigh every method by AID, name the methods and give --aid"),
        (["--teacher", "t", "--teacher-weights", "softmax"], "--teacher-weights is about several teachers: give --teacher more than once"),
        (["--self", "ema", "--teacher-weights", "argmin"], "--teacher-weights is about several teachers"),
        (["--set", "losses.x={type: aid}"], "loss 'x': type aid needs base"),
        (["--set", "losses=3"], "losses should be name: options, is 3"),
        (["--config", "no/such.yaml"], "there is no configuration no/such.yaml"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str) -> None:
    result = kdkernels("distill", *arguments, "--print-config")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for text, message in (
        ("a: [1", "cannot be read as YAML"),
        ("- 1\n", "should hold keys and values, holds a list"),
        ("lossses: {}\n", "lossses"),
    ):
        file = tmp_path / "c.yaml"
        file.write_text(text, encoding="utf-8")
        result = kdkernels("train", "-c", file, "--print-config")
        assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "bmfi", "alfa": 1}, "loss 'x': unknown options alfa; bmfi has weight, alpha"),
        ({"type": "bmfi", "mask": "round"}, "loss 'x': mask"),
        ({"type": "gkd", "weight": "much"}, "loss 'x': "),
        ({"type": "aid", "base": {"type": "gkd", "distance": "l3"}}, "loss 'x': distance"),
    ],
)
def test_a_loss_that_cannot_be_built_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipes.build_losses({"x": entry})
    assert str(caught.value).startswith(message)


def test_the_rows_of_the_demo_have_the_losses_of_their_names() -> None:
    kinds = {name: {key: type(loss) for key, loss in recipes.demo_losses(name).items()} for name in recipes.STUDENTS}
    assert kinds == {
        "student": {},
        "student, equal time": {},
        "student + BMFI": {"bmfi": BMFILoss},
        "student + GKD-BMFI": {"gkd": GKDLoss, "bmfi": BMFILoss},
        "student + AID-BMFI": {"bmfi": AIDLoss},
    }
    with pytest.raises(ValueError, match="no row 'x'; the rows are 'student', "):
        recipes.demo_losses("x")
