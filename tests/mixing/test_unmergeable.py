"""Bases that cannot be written to: quantised and offloaded ones take adapters live, and keep their weights."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.test_parameters import adapter_of_everything
from tests.tiny import tiny_pipeline

FLOAT8 = torch.float8_e4m3fn


PLACES: dict[str, Callable[[Any], object]] = {
    "float8 storage": lambda unet: unet.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32),
    "offloaded layers": lambda unet: accelerate.cpu_offload(unet, execution_device=torch.device("cpu")),
    "offloaded groups": lambda unet: apply_group_offloading(
        unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "offloaded blocks": lambda unet: apply_group_offloading(
        unet,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    ),
}


def mixed(pipeline: Any, laws: bool) -> Mixer:
    mixer = Mixer(pipeline)
    mixer.add(random_adapter(components_of(pipeline), seed=0), "lora")
    mixer.add(adapter_of_everything(tiny_pipeline(), seed=5), "laws")
    mixer.set({"lora": {"unet": 0.4, "text_encoder": 0.3}, "laws": {"unet": 0.5 if laws else 0.0}})
    return mixer


@torch.inference_mode()
def output(pipeline: Any) -> torch.Tensor:
    text = torch.linspace(-1, 1, 77 * 32).reshape(1, 77, 32)
    return pipeline.unet(torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.tensor(500), text).sample


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("laws", [False, True])
def test_a_base_that_cannot_be_written_to_takes_every_law_live(place: str, laws: bool):
    there, plain = tiny_pipeline(), tiny_pipeline()
    PLACES[place](there.unet)
    if place == "float8 storage":
        plain.unet.load_state_dict({key: value.float() for key, value in there.unet.state_dict().items()})
    base = output(there)
    assert torch.allclose(base, output(plain), atol=1e-6), "both start from one base"
    mixer, merged = mixed(there, laws), mixed(plain, laws)
    assert mixer.state == "merged and live" and merged.state == "merged", "the text encoder lies where it can be merged"
    assert (output(there) - output(plain)).abs().max() <= 1e-5 * max(1.0, float(output(plain).abs().max()))
    assert not torch.allclose(output(there), base, atol=1e-2)
    mixer.set({})
    assert torch.equal(output(there), base) and mixer.state == "base"
