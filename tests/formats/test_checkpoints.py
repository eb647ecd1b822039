"""Base models as files: every parameter under its path, whatever the container; what is no whole model is named."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from sdlora import toybox
from sdlora.errors import SdloraError
from sdlora.formats.architectures import architecture_of, known
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.models.families import components_of
from tests.formats.test_architectures import real_components
from tests.originals import original
from tests.tiny import tiny_folder, tiny_pipeline

KINDS = ["sd1", "sd2", "sdxl"]


def single_file(path: Path, kind: str) -> Path:
    save_file(original(components_of(tiny_pipeline(kind)), kind), path, {"format": "pt"})
    return path


def expected(kind: str) -> dict[str, torch.Tensor]:
    """The parameters by our paths, from the modules."""
    found = {}
    for component, module in components_of(tiny_pipeline(kind)).items():
        for key, tensor in module.state_dict().items():
            flat = component != "unet" and not key.startswith(("text_model.", "text_projection"))
            path = f"{component}.{'text_model.' if flat else ''}{key}".removesuffix(".weight")
            found[path] = tensor
    return found


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_read_under_its_path(tmp_path, kind, single):
    made = single_file(tmp_path / "a.safetensors", kind) if single else tiny_folder(tmp_path / "a", kind)
    checkpoint = open_checkpoint(made)
    wanted = expected(kind)
    assert checkpoint.parameters == {path: tuple(tensor.shape) for path, tensor in wanted.items()}
    for path, tensor in wanted.items():
        assert torch.equal(checkpoint.tensor(path), tensor), path
    architecture = architecture_of(components_of(tiny_pipeline(kind)))
    assert checkpoint.architecture.shapes == architecture.shapes
    assert checkpoint.architecture.norms == architecture.norms
    assert checkpoint.single == single


@pytest.mark.parametrize("kind", KINDS)
def test_the_single_files_of_these_tests_are_what_diffusers_takes_for_such(kind):
    parts = components_of(tiny_pipeline(kind))
    tensors = original(parts, kind)
    unet = convert_ldm_unet_checkpoint(dict(tensors), parts["unet"].config)
    assert_same(unet, parts["unet"].state_dict())
    if kind == "sd2":
        assert_same(convert_open_clip_checkpoint(parts["text_encoder"], tensors), parts["text_encoder"].state_dict())
    else:
        assert_same(convert_ldm_clip_checkpoint(tensors), parts["text_encoder"].state_dict())
    if kind == "sdxl":
        second = parts["text_encoder_2"]
        converted = convert_open_clip_checkpoint(second, tensors, prefix="conditioner.embedders.1.model.")
        assert_same(converted, second.state_dict())


def assert_same(converted, state):
    """Each tensor of the state is in the conversion, with or without the level text_model."""
    for key, tensor in state.items():
        there = converted.get(key, converted.get(f"text_model.{key}"))
        assert there is not None and torch.equal(there, tensor), key


@pytest.mark.parametrize("architecture", [one for one in known() if one.name != "toybox"], ids=lambda one: one.name)
def test_released_models_are_recognised_from_the_header_of_a_single_file(tmp_path, architecture):
    tensors = original(real_components(architecture.name), architecture.name)
    path = tmp_path / "a.safetensors"
    header, end = {}, 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:  # full size, without a byte of content on the disk
        file.truncate(8 + len(text) + end)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.name == architecture.name
    assert checkpoint.architecture.shapes == architecture.shapes
    assert checkpoint.architecture.norms == architecture.norms
    biases = {path for path in checkpoint.parameters if path.endswith(".bias")}
    assert all(architecture.shape_of(bias) == checkpoint.parameters[bias] for bias in biases)


def test_toybox_opens_and_is_recognised():
    checkpoint = open_checkpoint(toybox.path())
    assert checkpoint.architecture.name == "toybox"
    assert checkpoint.tensor("unet.conv_in").shape == checkpoint.architecture.shapes["unet.conv_in"]


def test_a_unet_alone_in_a_single_file_is_a_model(tmp_path):
    tensors = original(components_of(tiny_pipeline("sd1")), "sd1")
    save_file({key: one for key, one in tensors.items() if key.startswith("model.")}, tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path / "a.safetensors").components == ("unet",)


def test_old_folders_have_the_level_text_model_and_16_bit_variants(tmp_path):
    folder = tiny_folder(tmp_path / "a", "sd1")
    file = folder / "text_encoder/model.safetensors"
    tensors = {f"text_model.{key}": tensor.half() for key, tensor in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, folder / "text_encoder/model.fp16.safetensors", {"format": "pt"})
    file.unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.parameters.keys() == expected("sd1").keys()
    assert checkpoint.tensor("text_encoder.text_model.encoder.layers.0.mlp.fc1").dtype == torch.float16


def shard(folder: Path, count: int = 3) -> Path:
    """The UNet of a folder in several files with an index."""
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::count]}
        save_file(part, folder / "unet" / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    size = sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return index


def test_shards_are_one_model(tmp_path):
    folder = tiny_folder(tmp_path / "a", "sd1")
    shard(folder)
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) == 4
    for path, tensor in expected("sd1").items():
        assert torch.equal(checkpoint.tensor(path), tensor), path


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny_folder(tmp_path / "a", "sd1")
    shard(folder)
    (folder / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SdloraError, match="lacks diffusion_pytorch_model-00002-of-00003.safetensors; copy"):
        open_checkpoint(folder)


@pytest.mark.parametrize("told", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../a"}}', "[" * 100_000])
def test_a_damaged_index_leads_nowhere(tmp_path, told):
    folder = tiny_folder(tmp_path / "a", "sd1")
    shard(folder).write_text(told)
    with pytest.raises(SdloraError, match="index.json is damaged"):
        open_checkpoint(folder)


def damage(folder: Path, file: Path, kind: str) -> Path:
    """Make what `kind` says of a good folder or file, and say which of the two."""
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if kind == "absent":
        file.unlink()
    elif kind == "pickle":
        return file.rename(file.with_suffix(".ckpt"))
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "lora":
        save_file({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4)}, file)
    elif kind == "hole":
        del tensors["model.diffusion_model.middle_block.1.norm.weight"]
        save_file(tensors, file)
    elif kind == "axes":
        save_file(tensors | {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.tensor(1.0)}, file)
    elif kind == "quantised":
        save_file(tensors | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, file)
    elif kind == "integers":
        save_file(tensors | {"model.diffusion_model.out.2.weight": torch.ones(4, 16, 3, 3, dtype=torch.int8)}, file)
    elif kind == "no index":
        (folder / "model_index.json").unlink()
        return folder
    elif kind == "no unet":
        unet.unlink()
        unet.parent.joinpath("config.json").unlink()
        unet.parent.rmdir()
        return folder
    elif kind == "pickles":
        unet.rename(unet.with_suffix(".bin"))
        return folder
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no model at .*give a diffusers folder or a .safetensors file"),
        ("pickle", "is a pickle, which can run code"),
        ("cut short", "is damaged or cut short"),
        ("lora", "is no checkpoint of SD 1.x, SD 2.x or SDXL; is it a LoRA"),
        ("axes", "is no checkpoint"),
        ("hole", "lacks 1 tensors .* such as model.diffusion_model.middle_block.1.norm.weight; fetch it again"),
        ("quantised", r"is quantised \(it holds model.diffusion_model.out.2.scale_weight"),
        ("integers", r"is quantised \(it holds model.diffusion_model.out.2.weight in I8\)"),
        ("no index", "has no model_index.json; give the folder of a diffusers pipeline"),
        ("no unet", "has no folder unet"),
        ("pickles", r"its weights are in a pickle \(diffusion_pytorch_model.bin\), which is not read"),
    ],
)
def test_what_is_no_whole_model_gets_one_clear_line(tmp_path, kind, message):
    made = damage(tiny_folder(tmp_path / "a", "sd1"), single_file(tmp_path / "b.safetensors", "sd1"), kind)
    with pytest.raises(SdloraError, match=message) as caught:
        open_checkpoint(made)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_not_read_on(tmp_path):
    file = single_file(tmp_path / "a.safetensors", "sd1")
    checkpoint = open_checkpoint(file)
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    with pytest.raises(SdloraError, match="was changed while it was read"):
        checkpoint.tensor("unet.conv_in")
