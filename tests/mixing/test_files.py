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
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
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
    weight = mixer._modules[f"unet.{PATH}"].weight
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


def test_holding_swaps_loras_that_bring_the_same_token(tmp_path: Path):
    pipeline, other = tiny_pipeline(), tiny_pipeline()
    files = [written(tmp_path / f"{seed}.safetensors", pipeline, seed) for seed in range(2)]
    mixer, alone = Mixer(pipeline), Mixer(other)
    receipts = [mixer.hold({"lora": (files[0], 1.0)}), mixer.hold({"new": (files[1], {"unet": 0.5})})]
    assert mixer.names == ("new",) and mixer.weights == {"new": {"unet": 0.5}}
    assert receipts[0]["lora"].sha256 != receipts[1]["new"].sha256
    alone.load(files[1], "new")
    alone.set({"new": {"unet": 0.5}})
    assert same_state(pipeline, state_of(other))
    assert mixer.hold({"new": (files[1], 1.0)})["new"] is receipts[1]["new"], "an unchanged file is not read again"
    mixer.hold({})
    assert same_state(pipeline, state_of(tiny_pipeline())) and mixer.names == ()


def test_holding_what_cannot_be_had_changes_nothing(tmp_path: Path):
    pipeline = tiny_pipeline()
    one, two = (written(tmp_path / f"{name}.safetensors", pipeline, seed) for seed, name in enumerate(("one", "two")))
    mixer = Mixer(pipeline)
    receipt = mixer.hold({"one": (one, 0.5)})["one"]
    before = state_of(pipeline)
    for wanted, message in (
        ({"two": (two, 1.0), "gone": (tmp_path / "gone.safetensors", 1.0)}, "gone.safetensors cannot be read"),
        ({"one": (one, 1.0), "two": (two, 1.0)}, "one and two bring the token '<s1>'"),
        ({"two": (two, {"vae": 1.0})}, "no component 'vae'"),
        ({"two": (two, float("nan"))}, "no finite number"),
        ({"two": (two, 1e39)}, "overflows"),
    ):
        with pytest.raises(SdloraError, match=message):
            mixer.hold(wanted)
        assert same_state(pipeline, before) and mixer.weights == {"one": {"unet": 0.5, "text_encoder": 0.5}}
        assert mixer.names == ("one",) and mixer.load(one) is receipt


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
        mixer.hold({"a": (path, 1.0)})
    assert mixer.hold({"a": (path, 1.0)}, partial=True) == {"a": receipt}


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
    monkeypatch.setattr("sdlora.mixing.mixer.read", lambda *_: pytest.fail("it is read again"))
    assert mixer.load(path, "a") is receipt
