import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.models.families import family_of, truncated
from sdlora.models.load import load_pipeline
from tests.tiny import tiny_folder, tiny_pipeline


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_folders_load_with_their_weights(tmp_path, kind):
    pipeline = load_pipeline(str(tiny_folder(tmp_path, kind)))
    expected = tiny_pipeline(kind).unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.unet.state_dict().items())
    assert family_of(pipeline).name == ("sdxl" if kind == "sdxl" else "sd")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_that_lacks_a_part_is_named(tmp_path, part):
    shutil.rmtree(tiny_folder(tmp_path) / part)
    with pytest.raises(SdloraError, match=f"lacks {part}"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "file"), [("tokenizer", "tokenizer.json"), ("scheduler", "scheduler_config.json"), ("unet", "config.json")]
)
def test_a_part_without_its_file_is_named(tmp_path, part, file):
    folder = tiny_folder(tmp_path)
    for name in (file, "vocab.json"):
        (folder / part / name).unlink(missing_ok=True)
    with pytest.raises(SdloraError, match=f"lacks {part}"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_part_that_lacks_a_weight_is_named(tmp_path, part):
    (file,) = (tiny_folder(tmp_path, "sdxl") / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("bias"))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SdloraError, match=f"{part} lacks 1 weights such as .*{name.partition('.')[2]}"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000])
def test_paths_that_cannot_be_are_no_model(name):
    with pytest.raises(SdloraError, match="no model at"):
        load_pipeline(name)


@pytest.mark.parametrize("index", ['{"_class_name": ["x"]}', "[" * 100_000, "{}", "[]"])
def test_a_damaged_index_is_one_line(tmp_path, index):
    (tiny_folder(tmp_path) / "model_index.json").write_text(index)
    with pytest.raises(SdloraError, match="model_index.json is damaged|is a \\['x'\\]"):
        load_pipeline(str(tmp_path))


def test_a_cut_weight_file_is_one_line(tmp_path):
    file = tiny_folder(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SdloraError, match="cannot be loaded") as error:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.ckpt").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for name, message in {
        "nowhere/at/all": "no model at",
        "folder": "no model_index.json",
        "m.ckpt": "is a pickle",
        "cut.safetensors": "no whole .safetensors",
        "lora.safetensors": "is it a LoRA",
        "flux": "is a FluxPipeline",
    }.items():
        with pytest.raises(SdloraError, match=message):
            load_pipeline(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_conditioning_equals_that_of_diffusers_and_carries_gradients(kind):
    pipeline = tiny_pipeline(kind)
    told = family_of(pipeline).encode(pipeline, ["a red cat", ""])
    theirs = pipeline.encode_prompt(
        ["a red cat", ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(told["encoder_hidden_states"], theirs[0])
    if kind == "sdxl":
        assert torch.equal(told["text_embeds"], theirs[2])
    sum(value.sum() for value in told.values()).backward()
    assert pipeline.text_encoder.get_input_embeddings().weight.grad is not None


def test_what_a_caption_loses_is_said():
    pipeline = tiny_pipeline()
    assert truncated(pipeline, "a red cat") == ""
    assert truncated(pipeline, "y" * 75 + " lost words") == "lost words"
