"""The config: one source for TOML, flags and help; every mistake is one line that says what and where."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.training.config import TrainConfig, load, to_toml


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


def test_toml_and_flags_with_flags_winning(tmp_path: Path) -> None:
    path = written(tmp_path, 'dataset = "pictures"\nrank = 4\nlearning_rate = 1\ntargets = "attention+ff"\n')
    config = load(path, {"rank": 8, "sample_prompts": ["a", "b"]})
    assert config == TrainConfig(
        dataset="pictures", rank=8, learning_rate=1.0, targets=("attention+ff",), sample_prompts=("a", "b")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 3, "trigger": 'a "quoted" \\ ümlaut\x7f', "targets": ("a.*", "b")},
        {"learning_rate": 1e-05, "min_snr_gamma": 5.0, "gradient_checkpointing": True, "resolution": 256},
        {"sample_prompts": ("a cat, blue", "x = [1]"), "output": "runs/one"},
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, changes: dict[str, object]) -> None:
    config = replace(TrainConfig(dataset="pictures"), **changes)  # pyright: ignore[reportArgumentType]
    text = to_toml(config)
    assert load(written(tmp_path, text), {}) == config
    assert "# inner size of each LoRA pair\nrank = 16" in text


def test_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, 'dataset = "x"\nlearningrate = 1e-4\n')
    with pytest.raises(SdloraError, match=r"config .*run\.toml: unknown key 'learningrate' \(nearest: learning_rate"):
        load(path, {})


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rank", "abc", "a whole number"),
        ("rank", True, "a whole number"),
        ("rank", 2.5, "a whole number"),
        ("rank", 0, "at least 1"),
        ("alpha", 0, "above 0"),
        ("alpha", float("nan"), "a number"),
        ("learning_rate", float("inf"), "a number"),
        ("gradient_checkpointing", 1, "true or false"),
        ("dataset", 3, "a text"),
        ("sample_prompts", [1], "a text or a list of texts"),
        ("dropout", 1.0, "below 1"),
        ("caption_dropout", 1.5, "at most 1"),
        ("resolution", 100, "a multiple of 8"),
        ("optimizer", "adamx", "one of adamw"),
        ("min_snr_gamma", 0, "above 0"),
        ("epochs", 0, "at least 1"),
    ],
)
def test_wrong_values_are_one_line(key: str, value: object, wanted: str) -> None:
    with pytest.raises(SdloraError, match=wanted) as caught:
        load(None, {"dataset": "x", key: value})
    assert str(caught.value).startswith(key) and "\n" not in str(caught.value)


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="steps and epochs"):
        load(None, {"dataset": "x", "steps": 5, "epochs": 5})
    path = written(tmp_path, 'dataset = "x"\nsteps = 5\n')
    assert load(path, {"epochs": 2}).epochs == 2


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="cannot be read"):
        load(tmp_path / "none.toml", {})
    with pytest.raises(SdloraError, match="is not TOML"):
        load(written(tmp_path, "rank == 3"), {})
    with pytest.raises(SdloraError, match="no dataset"):
        load(written(tmp_path, "rank = 3"), {})


def test_every_setting_has_help_and_the_folder_has_a_default() -> None:
    assert all(one.metadata["help"] for one in fields(TrainConfig))
    assert TrainConfig(dataset="some/where/dog6").folder == Path("outputs/dog6")
    assert TrainConfig(dataset="dog6", output="here").folder == Path("here")
