"""The untouched base is read back from the model's files, to the bit, or copied; a changed file is never believed."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.errors import SdloraError
from sdlora.lowrank.targets import modules_of
from sdlora.mixing.untouched import Untouched
from sdlora.models.families import components_of
from tests.originals import original
from tests.tiny import tiny_folder, tiny_pipeline

KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
CONV = "unet.conv_in"
UNET = "unet/diffusion_pytorch_model.safetensors"


def settle(*files: Path) -> None:
    """As if written to an hour ago: a newer file might change again without another time."""
    hour_ago = time.time_ns() - 3600 * 10**9
    for file in files:
        os.utime(file, ns=(hour_ago, hour_ago))


def folder(path: Path, kind: str = "sd1", dtype: torch.dtype = torch.float32) -> Path:
    tiny_folder(path, kind)
    for file in path.rglob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
        settle(file)
    return path


def parameters(pipeline: Any) -> dict[str, Tensor | None]:
    modules = modules_of(components_of(pipeline), KINDS)
    weights: dict[str, Tensor | None] = {path: module.weight for path, module in modules.items()}
    return weights | {f"{path}.bias": module.bias for path, module in modules.items()}


def bits(parameter: Tensor | None) -> tuple[Any, ...] | None:
    if parameter is None:
        return None
    return parameter.dtype, parameter.shape, parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def kept(untouched: Untouched, held: dict[str, Tensor | None]) -> dict[str, Any]:
    """All parameters kept, then overwritten; what they were."""
    before = {path: bits(parameter) for path, parameter in held.items()}
    for path, parameter in held.items():
        untouched.keep(path, parameter)
        if parameter is not None:
            parameter.fill_(7)
        untouched.keep(path, parameter)
    return before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_lies_in_the_files_is_read_back_to_the_bit_and_not_copied(tmp_path, stored, dtype):
    untouched = Untouched(folder(tmp_path, dtype=stored))
    pipeline = tiny_pipeline().to(stored).to(dtype)
    before = kept(untouched, parameters(pipeline))
    assert untouched.held == 0
    assert {path: bits(untouched[path]) for path in before} == before
    assert None in before.values() and CONV in before


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("odd", [0, 1])
def test_single_files_do_as_well_with_their_fused_and_transposed_weights(tmp_path, kind, odd):
    pipeline, file = tiny_pipeline(kind), tmp_path / "model.safetensors"
    save_file(original(components_of(pipeline), kind), file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * odd  # old files begin their tensors anywhere
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    settle(file)
    untouched = Untouched(file)
    before = kept(untouched, parameters(pipeline))
    assert untouched.held == 0
    assert {path: bits(untouched[path]) for path in before} == before


@torch.no_grad()
def test_what_differs_from_the_file_in_one_bit_is_copied(tmp_path):
    pipeline = tiny_pipeline()
    weight = pipeline.unet.conv_in.weight
    weight[0, 0, 0, 0] = 0.0
    pipeline.save_pretrained(tmp_path)
    settle(*tmp_path.rglob("*.safetensors"))
    weight[0, 0, 0, 0] = -0.0
    untouched, before = Untouched(tmp_path), weight.clone()
    untouched.keep(CONV, weight)
    assert untouched.held == weight.nbytes
    weight.zero_()
    found = untouched[CONV]
    assert found is not None and torch.equal(found, before) and found[0, 0, 0, 0].signbit()


@torch.no_grad()
def test_without_files_that_can_be_read_all_is_copied(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for source in (None, tmp_path, tmp_path / "nothing.safetensors"):
        module = nn.Linear(3, 2)
        before = module.weight.clone()
        untouched = Untouched(source)
        untouched.keep("unet.one", module.weight)
        untouched.keep("unet.one.bias", None)
        module.weight.zero_()
        assert torch.equal(untouched["unet.one"], before) and untouched["unet.one.bias"] is None
        assert untouched.held == 24 and "unet.one.bias" in untouched and "unet.two" not in untouched


def test_a_parameter_that_the_files_lack_or_have_in_another_shape_is_copied(tmp_path):
    untouched = Untouched(folder(tmp_path))
    for path, shape in (("unet.another", (3, 2)), (CONV, (16, 4, 1, 1))):
        untouched.keep(path, torch.ones(shape))
        assert bits(untouched[path]) == bits(torch.ones(shape))
    assert untouched.held == 4 * (6 + 64)


def test_what_is_forgotten_is_no_longer_there_and_may_be_kept_anew(tmp_path):
    untouched = Untouched(folder(tmp_path))
    weight = tiny_pipeline().unet.conv_in.weight.detach()
    other = torch.ones_like(weight)
    for parameter in (weight, other, weight):
        untouched.keep(CONV, parameter)
        assert torch.equal(untouched[CONV], parameter)
        untouched.forget(CONV)
        assert CONV not in untouched and untouched.held == 0


def test_a_file_that_was_written_just_now_is_not_relied_on(tmp_path):
    untouched = Untouched(folder(tmp_path))
    (tmp_path / UNET).touch()
    weight = tiny_pipeline().unet.conv_in.weight
    untouched.keep(CONV, weight)
    assert untouched.held == weight.nbytes


def rewritten(file: Path) -> None:
    """In place, at the same size."""
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x01\x02\x03\x04"
    with file.open("r+b") as opened:
        opened.write(content)


@pytest.mark.parametrize("change", [rewritten, lambda file: os.truncate(file, 100), lambda file: os.truncate(file, 0)])
def test_a_file_that_is_written_to_in_use_is_refused_in_one_line(tmp_path, change):
    untouched = Untouched(folder(tmp_path))
    weight = tiny_pipeline().unet.conv_in.weight.detach()
    untouched.keep(CONV, weight)
    untouched.check()
    change(tmp_path / UNET)
    for read in (lambda: untouched[CONV], untouched.check):
        with pytest.raises(SdloraError, match=r"safetensors has changed while it was in use; load the model again$"):
            read()
    bias = torch.ones(16)
    untouched.keep(f"{CONV}.bias", bias)
    assert untouched.held == bias.nbytes and torch.equal(untouched[f"{CONV}.bias"], bias)


def test_a_file_that_another_takes_the_place_of_serves_on(tmp_path):
    untouched = Untouched(folder(tmp_path / "model"))
    weight = tiny_pipeline().unet.conv_in.weight.detach()
    untouched.keep(CONV, weight)
    file, new = tmp_path / "model" / UNET, tmp_path / "new.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, new)
    new.replace(file)
    assert torch.equal(untouched[CONV], weight)
    file.unlink()
    assert torch.equal(untouched[CONV], weight)
    untouched.check()


def test_a_file_that_was_replaced_before_it_was_needed_is_not_taken_for_the_model(tmp_path):
    untouched = Untouched(folder(tmp_path))
    weight = tiny_pipeline().unet.conv_in.weight.detach()
    untouched.keep("text_encoder.text_model.final_layer_norm.bias", torch.zeros(32))  # the headers are read now
    tiny_pipeline(seed=1).save_pretrained(tmp_path)
    settle(*tmp_path.rglob("*.safetensors"))
    untouched.keep(CONV, weight)
    assert untouched.held >= weight.nbytes and torch.equal(untouched[CONV], weight)
