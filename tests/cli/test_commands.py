"""Flags, TOML keys and fields are one; the verbs do what they say."""

import sys
from dataclasses import fields
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from PIL import Image

from sdlora import cli
from sdlora.cli.making import TrainFlags
from sdlora.formats.write import write
from sdlora.generation.png import read_job
from sdlora.mixing.schedule import window
from sdlora.models.families import components_of
from sdlora.training.config import TrainConfig
from tests.conftest import random_adapter
from tests.tiny import tiny_folder, tiny_pipeline


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configs that `sdlora train` trains with; nothing is trained."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr("sdlora.training.run.run_training", configs.append)
    return configs


def test_every_setting_has_a_flag() -> None:
    assert [one.name for one in fields(TrainFlags)] == [one.name for one in fields(TrainConfig)]


def test_flags_win_over_the_file(told: list[TrainConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('dataset = "pictures"\nrank = 4\nalpha = 2\ngradient_checkpointing = true\ntargets = ["linear"]\n')
    cli.main(
        f"train --config {file} --rank 8 --no-gradient-checkpointing --targets *attn1* --targets *attn2*".split()
    )  # fmt: skip
    cli.main(["train", "--config", str(file), "--text_encoder_learning_rate", "1e-5"])
    expected = TrainConfig(dataset="pictures", rank=8, alpha=2, targets=("*attn1*", "*attn2*"))
    assert told[0] == expected
    assert told[1].text_encoder_learning_rate == 1e-5 and told[1].gradient_checkpointing
    assert told[1].targets == ("linear",)


def test_generate_compares_weights_and_takes_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "tiny")
    for seed, name in enumerate(("one", "two")):
        adapter = random_adapter(components_of(tiny_pipeline()), seed, suffix="to_q")
        write(adapter, tmp_path / "loras" / f"{name}.safetensors", "kohya")
    shared = ["--model", str(model), "--steps", "2", "--size", "64", "--output", str(tmp_path / "out")]
    library = ["--library", str(tmp_path / "loras")]
    cli.main(
        [
            "generate",
            "<lora:one:0.5> a cat <lora:two:step=0-1>",
            "--ladder",
            "0,1",
            "--grid",
            "0.5,1",
            *shared,
            *library,
        ]
    )
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:2]] == ["one.safetensors", "two.safetensors"]
    *pictures, sheet = map(Path, told[2:])
    jobs = [read_job(path) for path in pictures]
    assert [[lora.unet for lora in job.loras] for job in jobs] == [[0, 0.5], [1, 0.5], [0, 1], [1, 1]]
    assert {job.prompt for job in jobs} == {"a cat"} and jobs[0].loras[1].schedule == window(0, 0.5)
    assert "sheet" in sheet.name and Image.open(sheet).size[0] > 2 * 64


def test_generate_paints_with_files_whose_names_the_terminal_cannot_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, names = tiny_folder(tmp_path / "tiny"), ("тест", "caf\udce9", "red\u202eder")
    command = ["generate", "a cat", "--model", str(model), "--steps", "2", "--size", "64", "--ladder", "0,1"]
    for seed, name in enumerate(names):
        write(random_adapter(components_of(tiny_pipeline()), seed, suffix="to_q"), tmp_path / f"{name}.safetensors")
        command += ["--lora", f"{tmp_path / name}.safetensors:0.5:schedule=0.3-0.4"]
    monkeypatch.setattr("sys.stdout", TextIOWrapper(BytesIO(), "ascii"))
    cli.main([*command, "--output", str(tmp_path / "out")])
    sys.stdout.seek(0)
    *told, first, _, _ = sys.stdout.read().splitlines()
    shown = (r"\u0442\u0435\u0441\u0442", r"caf\udce9", r"red\u202eder")
    assert [line.partition(".")[0] for line in told] == list(shown)
    assert [Path(lora.path).stem for lora in read_job(Path(first)).loras] == list(names)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 3 and rf"note: {shown[2]}: the schedule is 0" in notes[1], "once for all cells"


def test_generate_knows_the_presets_of_its_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, library = tiny_folder(tmp_path / "tiny"), tmp_path / "loras"
    for seed, name in enumerate(("one", "two")):
        adapter = random_adapter(components_of(tiny_pipeline()), seed, suffix="to_q")
        write(adapter, library / f"{name}.safetensors", "kohya")
    (library / "lbwpresets.txt").write_text("MINE:0.5,1,1,1,1,1,1,1,1,1,1,0.25\n")
    command = ["generate", "a cat <lora:two:lbw=MINE>", "--lora", f"{library / 'one.safetensors'}:blocks=MINE"]
    command += ["--library", str(library), "--model", str(model), "--steps", "1", "--size", "64"]
    cli.main([*command, "--output", str(tmp_path / "out")])
    job = read_job(Path(capsys.readouterr().out.splitlines()[-1]))
    assert [(dict(lora.blocks)["BASE"], dict(lora.blocks)["OUT05"]) for lora in job.loras] == [(0.5, 0.25)] * 2
    (library / "lbwpresets.txt").write_text("MINE:0.5,1\n")
    with pytest.raises(SystemExit):
        cli.main(command)
    assert f"{library / 'lbwpresets.txt'}, line 1: MINE: 2 numbers" in capsys.readouterr().err
    command[1:4] = ["a cat <lora:two:0.5:1>", "--lora", f"{library / 'one.safetensors'}:0.5"]
    cli.main([*command, "--output", str(tmp_path / "out")])  # which names no preset
    assert [lora.text_encoder for lora in read_job(Path(capsys.readouterr().out.splitlines()[-1])).loras] == [0.5, 0.5]


def test_generate_writes_pictures_that_carry_their_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "tiny")
    cli.main(
        ["generate", "a red cat", "--model", str(model), "--steps", "2", "--seed", "5", "--count", "2", "--size", "64"]
        + ["--guidance", "3", "--scheduler", "euler", "--negative-prompt", "dull", "--output", str(tmp_path / "out")]
    )
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    jobs = [read_job(path) for path in paths]
    assert [(job.seed, job.prompt, job.negative_prompt, job.scheduler) for job in jobs] == [
        (seed, "a red cat", "dull", "euler") for seed in (5, 6)
    ]
    first, second = (Image.open(path) for path in paths)
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()
