"""The configuration: YAML, overrides, errors."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from kdkernels.training import TrainConfig, load_config


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 40\nlearning_rate: 1e-3\noptimizer: sgd\nlevels: ['0', '1']\n")
    config = load_config(file, {"steps": 50, "channels_last": "false", "levels": "0,2", "ema_decay": "0.5"})
    assert (config.steps, config.peak_rate, config.optimizer, config.decay) == (50, 1e-3, "sgd", "step")
    assert config.channels_last is False and config.levels == ["0", "2"] and config.ema_decay == 0.5
    assert load_config() == TrainConfig()


def test_written_file_gives_the_same_configuration(tmp_path: Path) -> None:
    config = TrainConfig(steps=3, levels=["0"], run_dir="x", weight_decay=0.05, seed=7)
    config.write(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_unknown_key_lists_all_valid_ones(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1\n")
    with pytest.raises(ValueError, match="unknown keys in .*c.yaml: lr; valid are") as error:
        load_config(file)
    assert all(f.name in str(error.value) for f in fields(TrainConfig))
    with pytest.raises(ValueError, match="unknown keys in the configuration: stepz"):
        load_config(None, {"stepz": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": "four"}, "batch_size is 'four', should be int"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": 0}, "epochs is 0, should be at least 1"),
        ({"weight_decay": -1}, "weight_decay is -1.0, should not be negative"),
        ({"optimizer": "lion"}, "optimizer is 'lion', should be one of adamw, sgd"),
        ({"channels_last": 3}, "channels_last is 3, should be bool"),
        ({"learning_rate": 0}, "learning_rate is 0.0, should be positive"),
        ({"ema_decay": 1}, "ema_decay is 1.0"),
        ({"resume": True}, "resume needs run_dir"),
        ({"seed": None}, "seed is None, should be int"),
    ],
)
def test_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, values)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n"])
def test_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="c.yaml"):
        load_config(file)
