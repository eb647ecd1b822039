"""Whether a base's weights can be merged into, and what they say where they cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError
from sdlora.lowrank.targets import shape_of
from sdlora.mixing.placement import obstacle, readable
from tests.mixing.test_live import modules_in
from tests.tiny import tiny_pipeline


class Packed(nn.Parameter):
    """Two numbers of four bits, -8 to 7, in a byte: (out, in) packed as (out * in / 2, 1), as bitsandbytes does."""

    def __new__(cls, packed: Tensor) -> "Packed":
        return torch.Tensor._make_subclass(cls, packed, False)


class Readable(Packed):
    """The same, by a library that can read it back: torchao, quanto."""

    def dequantize(self) -> Tensor:
        both = self.detach().as_subclass(Tensor)
        return torch.cat([both // 16, both % 16], 1).float().reshape(-1, 8) - 8


def packed(kind: Any) -> nn.Linear:
    layer = nn.Linear(8, 4)
    layer.weight = kind(torch.arange(16, dtype=torch.uint8)[:, None] * 15)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_can_be_merged_into_and_are_not_copied_to_be_read(dtype: torch.dtype):
    for kind in ("sd1", "sdxl"):
        pipeline = tiny_pipeline(kind).to(dtype)
        for path, module in modules_in(pipeline).items():
            assert obstacle(module) == ""
            assert readable(module, "weight", path) is module.weight and readable(module, "bias", path) is module.bias
            assert shape_of(module, "weight") == tuple(module.weight.shape)
            assert shape_of(module, "bias") == (len(module.weight),)
        assert obstacle(pipeline.unet) == obstacle(pipeline.text_encoder) == ""


def test_weights_of_eight_bits_are_quantised_and_can_be_read():
    pipeline = tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    layer = modules_in(pipeline)["unet.conv_in"]
    layers = [layer for layer in modules_in(pipeline).values() if layer.weight.dtype == torch.float8_e4m3fn]
    assert layers and {obstacle(layer) for layer in layers} == {"its weights are quantised (float8_e4m3fn)"}
    assert obstacle(pipeline.unet) == "its weights are quantised (float8_e4m3fn)"
    assert obstacle(pipeline.text_encoder) == ""
    layer = layers[0]
    found = readable(layer, "weight", "unet.it")
    assert found is not None and found.dtype == torch.float32 and torch.equal(found, layer.weight.float())


def test_packed_weights_have_their_true_shape_and_are_read_only_by_who_can():
    for kind in (Packed, Readable):
        layer = packed(kind)
        assert obstacle(layer) == f"its weights are quantised ({kind.__name__})"
        assert shape_of(layer, "weight") == (4, 8) and shape_of(layer, "bias") == (4,)
    found = readable(packed(Readable), "weight", "unet.it")
    assert found is not None and found.shape == (4, 8) and found[0, 0] == -8 and found[1, 0] == (4 * 15) // 16 - 8
    with pytest.raises(SdloraError, match=r"unet\.it: .*base's weight, which is quantised \(Packed\)"):
        readable(packed(Packed), "weight", "unet.it")


def test_whole_numbers_are_no_weights_to_merge_into():
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    assert obstacle(layer) == "its weights are quantised (int8)"
    with pytest.raises(SdloraError, match="quantised"):
        readable(layer, "weight", "unet.it")


def test_weights_that_accelerate_offloads_are_read_where_they_lie():
    from accelerate import cpu_offload

    pipeline, plain = tiny_pipeline(), modules_in(tiny_pipeline())
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    for path, module in modules_in(pipeline).items():
        offloaded = path.startswith("unet.")
        assert obstacle(module) == ("its weights are offloaded" if offloaded else "")
        for attribute in ("weight", "bias"):
            found, held = readable(module, attribute, path), getattr(plain[path], attribute)
            assert (found is None and held is None) or torch.equal(found, held)
    assert obstacle(pipeline.unet) == "its weights are offloaded"


def test_weights_that_are_nowhere_are_told_by_path():
    with torch.device("meta"):
        layer = nn.Linear(8, 4)
    assert obstacle(layer) == "its weights are offloaded" and shape_of(layer, "weight") == (4, 8)
    with pytest.raises(SdloraError, match=r"unet\.it: its weight is offloaded"):
        readable(layer, "weight", "unet.it")


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_a_component_that_is_offloaded_in_groups(level: str):
    pipeline = tiny_pipeline()
    pipeline.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
    )
    assert obstacle(pipeline.unet) == "its weights are offloaded in groups"
