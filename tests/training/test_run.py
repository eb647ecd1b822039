"""Whole runs: the folder they leave, resuming to the bit, several processes, bad input that changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdlora.errors import SdloraError
from sdlora.training import loop
from sdlora.training.config import TrainConfig, load, to_toml
from sdlora.training.loop import Step
from sdlora.training.run import run_training
from sdlora.training.run_folder import command_to_resume

Configure = Callable[..., TrainConfig]
# All that keeps state or draws chance.
EVERYTHING = {
    "steps": 4,
    "text_encoder_learning_rate": 5e-4,
    "dropout": 0.2,
    "caption_dropout": 0.3,
    "noise_offset": 0.1,
    "min_snr_gamma": 5.0,
    "gradient_accumulation": 2,
    "lr_scheduler": "cosine",
    "warmup_steps": 1,
}


def quiet(_: object) -> None:
    pass


def run(config: TrainConfig, on_step: Callable[[Step], None] = quiet) -> Path:
    return run_training(config, on_step, say=quiet)


def stop_after(index: int) -> Callable[[Step], None]:
    """What a person does who presses Ctrl-C during a step."""

    def press(step: Step) -> None:
        if step.index == index:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_run_folder_is_the_whole_truth(configure: Configure, tmp_path: Path, dataset: Path) -> None:
    pictures = copytree(dataset, tmp_path / "pictures")
    (pictures / "0.txt").unlink()
    (pictures / "broken.png").write_text("text")
    (pictures / "1.txt").write_text("a green ball " + "and so on " * 30)
    said: list[str] = []
    changes = {"dataset": str(pictures), "trigger": "sks", "steps": 4, "save_every": 2, "sample_every": 3}
    config = configure(**changes, sample_prompts=("a ball", "a cube"), tracker="tensorboard")
    path = run_training(config, quiet, said.append)
    folder = config.folder
    assert path == folder / "run.safetensors"
    assert load(folder / "config.toml", {}) == config
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000002", "000004"]
    assert_same(path, folder / "checkpoints" / "000004" / "run-000004.safetensors")
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["000003-0.png", "000003-1.png"]
    assert list((folder / "tensorboard").glob("events*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0].keys() == {
        *("step", "loss", "grad_norm", "learning_rate/unet", "seconds", "images_per_second", "pictures")
    }
    described = json.loads((folder / "dataset.json").read_text())
    by_name = {picture["name"]: picture for picture in described["pictures"]}
    assert by_name["0.png"]["caption_from"] == "trigger" and by_name["0.png"]["caption"] == "sks"
    assert by_name["3.png"]["bucket"] == [80, 48] and len(by_name["3.png"]["sha256"]) == 64
    assert by_name["1.png"]["caption_cut_off"].endswith("so on") and not by_name["2.png"]["caption_cut_off"]
    assert [skipped["name"] for skipped in described["skipped"]] == ["broken.png"]
    told = "\n".join(said)
    for words in ("5 pictures", "broken.png", 'trigger "sks"', "cut off: 1.png", "unet: 128 modules", "wrote"):
        assert words in told


def test_the_final_file_says_how_it_was_made(configure: Configure) -> None:
    path = run(configure(steps=1, trigger="sks dog"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert metadata["ss_network_dim"] == "4" and metadata["modelspec.architecture"]
    assert "ball" in metadata["ss_tag_frequency"]


def test_resuming_continues_to_the_bit(configure: Configure, tmp_path: Path) -> None:
    """N steps, Ctrl-C, M steps: the same bits as N + M steps at a stretch, though one of them draws samples."""
    straight = run(configure(**EVERYTHING, output=str(tmp_path / "straight")))
    config = configure(**EVERYTHING, sample_every=1, sample_prompts=("a ball",))
    with pytest.raises(
        KeyboardInterrupt, match=r"after step 2 of 4 .*sdlora train --config .*run/config\.toml --resume"
    ):
        run(config, stop_after(2))
    assert not (config.folder / "run.safetensors").exists()
    indexes: list[int] = []
    resumed = run(replace(config, resume=True), lambda step: indexes.append(step.index))
    assert indexes == [3, 4]
    assert_same(straight, resumed)
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor"])
def test_every_optimizer_resumes_to_the_bit(configure: Configure, tmp_path: Path, optimizer: str) -> None:
    straight = run(configure(optimizer=optimizer, output=str(tmp_path / "straight")))
    config = configure(optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_after(1))
    assert_same(straight, run(replace(config, resume=True)))


def test_a_crash_is_resumed_from_the_last_checkpoint(configure: Configure, tmp_path: Path) -> None:
    straight = run(configure(steps=4, output=str(tmp_path / "straight")))
    config = configure(steps=4, save_every=2)

    def crash(step: Step) -> None:
        if step.index == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(config, crash)
    assert_same(straight, run(replace(config, resume=True)))
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_finished_run_can_be_prolonged(configure: Configure, tmp_path: Path) -> None:
    straight = run(configure(steps=3, output=str(tmp_path / "straight")))
    config = configure(steps=2)
    run(config)
    assert_same(straight, run(replace(config, steps=3, resume=True)))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_refuses_what_would_change_the_training(configure: Configure, tmp_path: Path, dataset: Path) -> None:
    pictures = copytree(dataset, tmp_path / "pictures")
    config = configure(dataset=str(pictures), steps=1, lr_scheduler="linear")
    run(config)
    before = snapshot(config.folder)
    for change, named in (
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"steps": 2}, "steps was 1 and is 2"),
        ({"batch_size": 2}, "1 samples per step .*not 2"),
    ):
        with pytest.raises(SdloraError, match=named):
            run(replace(config, resume=True, **change))
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(SdloraError, match="captions or buckets are not those"):
        run(replace(config, resume=True))
    assert snapshot(config.folder) == before


def test_folders_that_are_in_use_or_hold_no_run(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    with pytest.raises(SdloraError, match="no run to resume"):
        run(replace(config, resume=True))
    config.folder.mkdir()
    (config.folder / "mine.txt").write_text("keep me")
    with pytest.raises(SdloraError, match=r"is not empty; resume .*--resume"):
        run(config)
    assert [path.name for path in config.folder.iterdir()] == ["mine.txt"]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SdloraError, match="is a file"):
        run(replace(config, output=str(file)))


@pytest.mark.parametrize(
    "change",
    [{"dataset": "nowhere"}, {"model": "nowhere"}, {"targets": ("nonsense",)}, {"optimizer": "adamw8bit"}],
    ids=str,
)
def test_bad_input_leaves_everything_as_it_was(configure: Configure, change: dict[str, object]) -> None:
    config = configure(**change)
    with pytest.raises(SdloraError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not config.folder.exists()


def test_divergence_does_not_take_the_weights_that_diverged_for_good(configure: Configure) -> None:
    config = configure(steps=9, save_every=1, learning_rate=1e25, max_grad_norm=0.0)
    with pytest.raises(SdloraError, match=r"nan or infinite at step 2 on \d\.png; there is no good checkpoint yet"):
        run(config)
    assert not (config.folder / "run.safetensors").exists()


def test_divergence_names_the_last_good_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config, losses = configure(steps=9, save_every=1), loop.objective.sample_losses
    calls = iter(range(1, 100))
    monkeypatch.setattr(
        loop.objective, "sample_losses", lambda *told: losses(*told) * (math.nan if next(calls) == 4 else 1)
    )
    with pytest.raises(SdloraError, match=r"nan or infinite at step 4 on \d\.png; last good checkpoint: .*000002"):
        run(config)


def test_a_run_cannot_go_on_to_fewer_steps_than_it_has(configure: Configure) -> None:
    final = run(configure(steps=3))
    before = final.read_bytes(), load(final.parent / "config.toml", {})
    with pytest.raises(SdloraError, match="000003 is past the 2 steps that are wanted"):
        run(configure(steps=2, resume=True))
    assert (final.read_bytes(), load(final.parent / "config.toml", {})) == before


def test_a_damaged_line_of_metrics_does_not_stop_a_resume(configure: Configure) -> None:
    folder = run(configure(steps=2)).parent
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\xff\n[]\n")
    run(configure(steps=3, resume=True))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_run_in_its_own_dataset_is_refused(configure: Configure) -> None:
    config = configure()
    with pytest.raises(SdloraError, match="lies in the dataset"):
        run(replace(config, output=str(Path(config.dataset) / "run")))
    assert not (Path(config.dataset) / "run").exists()


def test_a_full_disk_is_one_line_that_says_how_to_go_on(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdlora.training.run.checkpoints.save", full)
    with pytest.raises(
        SdloraError, match=r"No space left on device\); free space there, then go on with: sdlora train"
    ):
        run(configure(steps=1))


def test_what_accelerate_is_told_otherwise_is_not_ignored(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SdloraError, match="Accelerate is told 'bf16' and sdlora 'no'.*--mixed-precision bf16"):
        run(configure())


def test_the_command_to_resume_can_be_typed() -> None:
    config = TrainConfig(dataset="d", output="my runs/zib")
    assert command_to_resume(config, 1) == "sdlora train --config 'my runs/zib/config.toml' --resume"
    assert command_to_resume(config, 2).startswith("accelerate launch --num_processes 2 -m sdlora train ")


def test_two_processes_train_as_one_does(configure: Configure, tmp_path: Path) -> None:
    """The same global batch of 4: one process with 4 pictures, two with 2 (and with 1 and accumulation)."""
    # SGD, for Adam divides by the gradient's own size and so makes much of how a small one was rounded.
    common = {"steps": 3, "optimizer": "sgd", "learning_rate": 0.1, "text_encoder_learning_rate": 0.1}
    common |= {"caption_dropout": 0.3, "lr_scheduler": "linear"}
    alone = load_file(run(configure(**common, batch_size=4)))
    for batch_size, accumulation in ((2, 1), (1, 2)):
        folder = tmp_path / f"pair-{batch_size}"
        changes = {"batch_size": batch_size, "gradient_accumulation": accumulation, "output": str(folder)}
        config = tmp_path / "pair.toml"
        config.write_text(to_toml(configure(**common, **changes, save_every=2)))
        launch(config)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], len(line["pictures"])) for line in lines] == [(1, 4), (2, 4), (3, 4)]
        together = load_file(folder / f"{folder.name}.safetensors")
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor, together[name], rtol=1e-3, atol=1e-6, msg=name)


def launch(config: Path) -> None:
    """Run the config in two processes on the CPU.

    As a person would with `accelerate launch`; its --cpu starts one process only, whatever --num_processes says.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = Path(__file__).with_name("launched.py")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [*command, str(script), str(config)], cwd=root, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
