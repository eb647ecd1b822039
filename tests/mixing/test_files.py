"""LoRA files and folders in the mixer: read again when any of their files changes, swapped in one step."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight, Plan
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import State, same_state, state_of
from tests.tiny import tiny_pipeline

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def written(path: Path, pipeline: Any, seed: int = 0, token: str = "<s1>") -> Path:
    """A kohya file with a learned token of its own vectors."""
    tensors = {}
    for module, delta in random_adapter(components_of(pipeline), seed, suffix="to_q").deltas.items():
        stem = f"lora_{module.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": delta.down, f"{stem}.lora_up.weight": delta.up}
    generator = torch.Generator().manual_seed(seed)
    tensors[f"bundle_emb.{token}.string_to_param.*"] = torch.randn(2, 32, generator=generator)
    save_file(tensors, path)
    return path


def peft_folder(folder: Path, alpha: int, below: str = "") -> Path:
    """A PEFT folder for the UNet, in the folder of the adapter's name if `below`."""
    (folder / below).mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["to_q"]}
    (folder / below / "adapter_config.json").write_text(json.dumps(config))
    keys = {f"base_model.model.{PATH}.lora_{name}.weight" for name in "AB"}
    save_file({key: torch.ones(4, 16) if "_A" in key else torch.ones(16, 4) for key in keys}, _weights(folder / below))
    return folder


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("below", ["", "style"])
def test_a_folder_is_read_again_when_any_of_its_files_changes(tmp_path: Path, below: str):
    pipeline = tiny_pipeline()
    mixer, folder = Mixer(pipeline), peft_folder(tmp_path / "mine-1.5", 4, below)
    weight = mixer._base.modules[f"unet.{PATH}"].weight
    base = weight.detach().clone()
    receipt = mixer.load(folder)
    assert mixer.names == ("mine-1.5",) and mixer.load(folder) is receipt
    mixer.set({"mine-1.5": 1.0})
    assert (weight - base - 4).abs().max() < 1e-5
    peft_folder(folder, 20, below)
    assert mixer.load(folder) is not receipt
    assert (weight - base - 20).abs().max() < 1e-5
    save_file(
        {
            f"base_model.model.{PATH}.lora_{name}.weight": torch.zeros(shape)
            for name, shape in (("A", (4, 16)), ("B", (16, 4)))
        },
        _weights(folder / below),
    )
    mixer.load(folder)
    assert torch.equal(weight, base)


def test_a_learned_token_comes_with_its_file_and_goes_with_it(tmp_path: Path):
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    assert "tokens <s1>" in mixer.load(written(tmp_path / "one.safetensors", pipeline)).summary()
    assert pipeline.tokenizer.tokenize("a <s1>") == ["a</w>", "<s1>"]
    mixer.unload("one")
    assert same_state(pipeline, base)


def plan_of(*files: Path, **weights: float) -> Plan:
    return Plan("", tuple(LoraWeight(path=str(file), **weights) for file in files))  # type: ignore[arg-type]


def test_holding_swaps_loras_that_bring_the_same_token(tmp_path: Path):
    pipeline, other = tiny_pipeline(), tiny_pipeline()
    files = [written(tmp_path / f"{seed}.safetensors", pipeline, seed) for seed in range(2)]
    mixer, alone = Mixer(pipeline), Mixer(other)
    first, second = mixer.hold(plan_of(files[0])), mixer.hold(plan_of(files[1], unet=0.5, text_encoder=0.0))
    name = str(files[1])
    assert mixer.names == (name,) and mixer.weights == {name: {"unet": 0.5, "text_encoder": 0.0}}
    receipt = mixer.receipt(name)
    assert receipt and receipt.sha256 == second[0].loras[0].sha256 != first[0].loras[0].sha256
    alone.load(files[1], "new")
    alone.set({"new": {"unet": 0.5}})
    assert same_state(pipeline, state_of(other))
    mixer.hold(plan_of(files[1]))
    assert mixer.receipt(name) is receipt, "an unchanged file is not read again"
    mixer.hold(plan_of())
    assert same_state(pipeline, state_of(tiny_pipeline())) and mixer.names == ()


def test_holding_what_cannot_be_had_changes_nothing(tmp_path: Path):
    pipeline = tiny_pipeline()
    one, two = (written(tmp_path / f"{name}.safetensors", pipeline, seed) for seed, name in enumerate(("one", "two")))
    mixer = Mixer(pipeline)
    mixer.hold(plan_of(one, unet=0.5))
    before, plans = state_of(pipeline), mixer.plans
    for wanted, message in (
        (plan_of(two, tmp_path / "gone.safetensors"), "gone.safetensors cannot be read"),
        (plan_of(one, two), "one.safetensors and .*two.safetensors bring the token '<s1>'"),
        (plan_of(one, tmp_path / "." / ".." / tmp_path.name / "one.safetensors"), "one.safetensors is given twice"),
    ):
        with pytest.raises(SdloraError, match=message):
            mixer.hold(wanted)
        assert same_state(pipeline, before) and mixer.plans == plans
        assert mixer.names == (str(one),)
    with pytest.raises(SdloraError, match="overflows"):
        mixer.hold(plan_of(two, unet=1e39))
    assert same_state(pipeline, state_of_one(one)) and mixer.names == (str(one),) and mixer.state == "base"


def test_a_file_that_is_gone_is_missed_though_it_is_known(tmp_path: Path):
    pipeline = tiny_pipeline()
    file = written(tmp_path / "one.safetensors", pipeline, 0)
    mixer = Mixer(pipeline)
    mixer.hold(plan_of(file))
    before = state_of(pipeline)
    file.unlink()
    with pytest.raises(SdloraError, match="one.safetensors cannot be read"):
        mixer.hold(plan_of(file, unet=0.5))
    assert same_state(pipeline, before)


def state_of_one(file: Path) -> State:
    """Of a base that knows the file's tokens and has none of its weights."""
    pipeline = tiny_pipeline()
    Mixer(pipeline).load(file)
    return state_of(pipeline)


def test_a_part_is_taken_when_it_is_asked_for_and_not_remembered_otherwise(tmp_path: Path):
    pipeline = tiny_pipeline()
    mixer, path = Mixer(pipeline), written(tmp_path / "a.safetensors", pipeline)
    tensors = load_file(path)
    gone = [key for key in tensors if "up_blocks" in key and "lora_up" in key]
    save_file({key: value for key, value in tensors.items() if key not in gone}, path)
    with pytest.raises(SdloraError, match="in part.*--partial"):
        mixer.load(path, "a")
    receipt = mixer.load(path, "a", partial=True)
    assert len(receipt.incomplete) == len(gone) and "in part as asked" in receipt.summary()
    with pytest.raises(SdloraError, match="--partial"):
        mixer.hold(plan_of(path))
    mixer.hold(plan_of(path), partial=True)
    assert mixer.receipt(str(path)) == receipt


def test_new_content_under_the_same_time_and_size_is_seen(tmp_path: Path):
    """As when a trainer writes twice within one tick of the disk's clock."""
    pipeline = tiny_pipeline()
    mixer, path = Mixer(pipeline), written(tmp_path / "a.safetensors", pipeline, seed=0)
    first = mixer.load(path, "a")
    assert mixer.load(path, "a") is first
    status = path.stat()
    written(path, pipeline, seed=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and mixer.load(path, "a").sha256 != first.sha256


def test_what_has_settled_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline()
    mixer, path = Mixer(pipeline), written(tmp_path / "a.safetensors", pipeline)
    os.utime(path, (1, 1))
    receipt = mixer.load(path, "a")
    monkeypatch.setattr("sdlora.mixing.shelf.read", lambda *_: pytest.fail("it is read again"))
    assert mixer.load(path, "a") is receipt
