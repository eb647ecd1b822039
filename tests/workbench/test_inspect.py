"""Norms by block, and what cannot be measured without the base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.formats.names import kohya
from sdlora.workbench.inspect import by_block, inspect


def test_squares_of_norms_add_within_a_block_and_blocks_come_in_the_model_s_order() -> None:
    norms = {
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": 7.0,
        "unet.conv_out": 5.0,
        "unet.up_blocks.0.resnets.0.conv1": 1.0,
        "unet.mid_block.attentions.0.proj_in": 2.0,
        "unet.down_blocks.1.resnets.0.conv1": 3.0,
        "unet.down_blocks.1.resnets.0.conv1.bias": 4.0,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 6.0,
    }
    assert list(by_block(norms).items()) == [
        ("BASE", 5.0),
        ("IN04", 5.0),
        ("M00", 2.0),
        ("OUT00", 1.0),
        ("text_encoder", 6.0),
        ("text_encoder_2", 7.0),
    ]


def test_a_law_that_needs_the_base_is_named_where_there_is_none(tmp_path: Path) -> None:
    first, second = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{one}" for one in "qk")
    names = kohya([first, second])
    tensors = {
        f"{names[first]}.weight": torch.ones(1280),
        f"{names[first]}.on_input": torch.tensor(1.0),
        f"{names[second]}.diff": torch.full((1280, 1280), 0.5),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    found = inspect(tmp_path / "a.safetensors")
    assert found.norms == pytest.approx({second: 640.0})
    assert list(found.unmeasured) == [first] and "depends on the base model's weights" in found.unmeasured[first]
    assert inspect(tmp_path / "a.safetensors", header_only=True).unmeasured == {}
