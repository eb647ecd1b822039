"""Folders that peft itself writes are read to the weights that peft itself merges."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
)

from sdlora.formats.architectures import architecture_of
from sdlora.formats.read import read
from sdlora.lowrank.targets import modules_of
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.formats.hcp_files import hcp_tensors
from tests.tiny import tiny_pipeline

TARGETS = ["to_k", "to_out.0", "conv1", "proj_in"]
LINEAR = ["to_k", "to_out.0"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora, patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"conv1": 2, "attn1.to_k": 3},
        alpha_pattern={"attn2.to_k": 1, "to_out.0": 9},
    ),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "lora bias": LoraConfig(r=4, lora_alpha=6, target_modules=["to_out.0"], lora_bias=True),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr, whole": LoKrConfig(r=64, alpha=6, target_modules=LINEAR),
    "ia3": IA3Config(target_modules=["to_k", "to_out.0", "conv1"], feedforward_modules=["to_out.0"]),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=LINEAR),
}


def trained(unet: torch.nn.Module, config: Any) -> Any:
    """A peft model whose own parameters are noticeably random."""
    model = get_peft_model(copy.deepcopy(unet), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            start = parameter.data if "magnitude" in name or "ia3" in name or "boft_s" in name else 0
            parameter.data = start + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_has_the_weights_that_peft_merges(tmp_path: Path, name: str) -> None:
    pipeline = tiny_pipeline("sd1")
    architecture = architecture_of(components_of(pipeline))
    before = modules_of({"unet": pipeline.unet})
    model = trained(pipeline.unet, CONFIGS[name])
    model.save_pretrained(str(tmp_path / "unet"))
    adapter, receipt = read(tmp_path / "unet", architecture)
    assert receipt.complete and receipt.applied, receipt.summary()
    after = modules_of({"unet": model.merge_and_unload()})
    changed = 0
    for path, module in before.items():
        for parameter, base, merged in (
            (path, module.weight, after[path].weight),
            (f"{path}.bias", module.bias, after[path].bias),
        ):
            if merged is None:
                continue
            base = torch.zeros_like(merged) if base is None else base.detach()
            wanted = merged.detach() - base
            delta = adapter.deltas.get(parameter)
            found = torch.zeros_like(wanted) if delta is None else delta.weight(base)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-6, msg=lambda m, p=parameter: f"{p}: {m}")
            changed += bool(wanted.abs().max() > 1e-4)
    assert changed >= 30


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_folder_with_a_part_for_each_component_is_one_adapter(tmp_path: Path, kind: str) -> None:
    """The two text encoders of SDXL have modules of the same names: only the folders tell them apart."""
    pipeline = tiny_pipeline(kind)
    components = components_of(pipeline)
    for component, module in components.items():
        config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "q_proj"])
        trained(module, config).save_pretrained(str(tmp_path / component))
    adapter, receipt = read(tmp_path, architecture_of(components))
    assert receipt.complete and set(receipt.components) == set(components)
    assert all(path.endswith(("to_q", "q_proj")) for path in adapter.deltas)
    assert len(receipt.sha256) == 64


@pytest.mark.parametrize("old", [False, True])
def test_hcp_diffusion_has_a_file_for_each_component(tmp_path: Path, old: bool) -> None:
    from safetensors.torch import save_file

    components = components_of(tiny_pipeline("sd1"))
    adapter = random_adapter(components, seed=3)
    for component in components:
        save_file(hcp_tensors(adapter, (component,), old=old), tmp_path / f"{component}-1000.safetensors")
    again, receipt = read(tmp_path, architecture_of(components))
    assert receipt.complete, receipt.summary()
    for path, delta in adapter.deltas.items():
        base = torch.zeros(delta.shape)
        torch.testing.assert_close(again.deltas[path].weight(base), delta.weight(base))
