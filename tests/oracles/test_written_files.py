"""Written files hold every law to the last bit, and diffusers and peft make the same outputs of them as the mixer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from sdlora.formats.architectures import architecture_of, sd1
from sdlora.formats.names import NAMINGS
from sdlora.formats.read import read
from sdlora.formats.spelled import PLAIN
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import (
    BOFT,
    IA3,
    OFT,
    Delta,
    DoRA,
    Full,
    GLoRA,
    Hadamard,
    Kronecker,
    LowRank,
    OFTv2,
    Replacement,
    Rotation,
)
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of, family_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

KINDS = ("sd1", "sd2", "sdxl")
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
KERNEL = "unet.mid_block.resnets.0.conv1"
NORM = "unet.mid_block.resnets.0.norm1"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.1


def varied(kind: str, one_alpha: bool) -> Adapter:
    """Other ranks from module to module, and other alphas unless `one_alpha`; no alpha is its rank throughout."""
    deltas: dict[str, Delta] = {}
    for i, (path, delta) in enumerate(random_adapter(components_of(tiny_pipeline(kind)), seed=3).deltas.items()):
        assert isinstance(delta, LowRank)
        # transformers knows no rank pattern for a text projection in kohya's names
        rank = 2 if path.endswith("text_projection") else 1 + i % 4
        alpha = 3.0 if one_alpha else (0.5, 2.0, 3.0)[i % 3]
        deltas[path] = LowRank(delta.down[:rank], delta.up[:, :rank], alpha)
    return Adapter(deltas)


def with_magnitudes(kind: str) -> Adapter:
    deltas = varied(kind, one_alpha=False).deltas
    return Adapter({path: DoRA(delta, draw(delta.shape[0]).abs() + 0.5) for path, delta in deltas.items()})


def place(folder: Path, naming: str) -> Path:
    return folder / ("a" if naming == "peft" else "a.safetensors")


def loaded(path: Path, kind: str, naming: str) -> Any:
    """The pipeline with the file, as diffusers and peft load it."""
    pipeline = tiny_pipeline(kind)
    if naming != "peft":
        pipeline.load_lora_weights(str(path))
        return pipeline
    for component in components_of(pipeline):
        peft = PeftModel.from_pretrained(getattr(pipeline, component), str(path / component))
        setattr(pipeline, component, peft.merge_and_unload())
    return pipeline


@torch.no_grad()
def outputs(pipeline: Any) -> list[torch.Tensor]:
    """Conditioning of two captions and the UNet's prediction from it."""
    family = family_of(pipeline)
    told = family.encode(pipeline, ["a red cat", "zib on a beach"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [*told.values(), family.predict(pipeline.unet, latents, torch.tensor([10, 500]), told, None)]


CASES: list[tuple[str, str, Callable[[str], Adapter]]] = [
    # diffusers mixes up alphas in kohya's names where modules have different ones
    *(("kohya", kind, lambda kind: varied(kind, one_alpha=True)) for kind in KINDS),
    *((naming, kind, lambda kind: varied(kind, one_alpha=False)) for naming in PLAIN for kind in KINDS[:1]),
    *((naming, "sdxl", with_magnitudes) for naming in PLAIN),
]


@pytest.mark.parametrize(("naming", "kind", "make"), CASES)
def test_diffusers_and_peft_make_the_same_of_a_file_as_the_mixer(tmp_path, naming, kind, make) -> None:
    path = place(tmp_path, naming)
    write(make(kind), path, naming)
    ours = tiny_pipeline(kind)
    base = outputs(ours)
    mixer = Mixer(ours)
    assert mixer.load(path, "a").complete
    mixer.set({"a": 1.0})
    for without, mixed, oracle in zip(base, outputs(ours), outputs(loaded(path, kind, naming)), strict=True):
        assert (without - mixed).abs().max() > 1e-3, "the LoRA has no effect"
        assert (mixed - oracle).abs().max() <= 1e-5 * max(1.0, float(oracle.abs().max()))


@pytest.mark.parametrize(("naming", "kind"), [*((naming, "sdxl") for naming in NAMINGS), ("comfyui", "sd1")])
def test_every_module_is_read_back_under_its_path(tmp_path, kind, naming) -> None:
    adapter = varied(kind, one_alpha=False)
    path = place(tmp_path, naming)
    write(adapter, path, naming)
    model = architecture_of(components_of(tiny_pipeline(kind)))
    back, receipt = read(path, model)
    assert receipt.complete and back.deltas.keys() == adapter.deltas.keys()
    for name, delta in adapter.deltas.items():
        assert_same(back.deltas[name], delta, model.shapes[name])


def _loha(out: int, inputs: int) -> Hadamard:
    return Hadamard(draw(out, 3), draw(3, inputs), draw(out, 3, seed=1), draw(3, inputs, seed=1), alpha=1.5)


def laws(out: int, inputs: int, kernel: tuple[int, ...]) -> dict[str, Delta]:
    """A delta of each law for a weight of this shape; both divide by 4."""
    flat = inputs * kernel[0] * kernel[1] if kernel else inputs
    ones = (1,) * len(kernel)
    low = LowRank(draw(3, inputs, *kernel), draw(out, 3, *ones), alpha=1.25)
    found: dict[str, Delta] = {
        "lora": low,
        "loha": _loha(out, flat),
        "lokr whole": Kronecker(2.0, w1=draw(4, 4), w2=draw(out // 4, inputs // 4, *kernel)),
        "lokr pair": Kronecker(2.0, w1=draw(4, 4), w2_a=draw(out // 4, 2), w2_b=draw(2, flat // 4)),
        "full": Full(draw(out, inputs, *kernel)),
        "ia3 out": IA3(draw(out), on_input=False),
        "ia3 in": IA3(draw(inputs), on_input=True),
        "oft": OFT(draw(out // 4, 4, 4), constraint=2**-10, rescale=1 + draw(out, 1, *ones)),
        "boft": BOFT(draw(2, out // 4, 4, 4), constraint=0.0),
        "oft_diag": Rotation(torch.eye(4) + draw(out // 4, 4, 4)),
        "oftv2": OFTv2(draw(flat // 4, 6), scaled=True),
        "dora out": DoRA(low, draw(out).abs() + 0.5),
        "dora of peft": DoRA(low, draw(1, out, *ones).abs() + 0.5, by_output=True),
        "dora in": DoRA(low, draw(1, inputs, *ones).abs() + 0.5),
        "dora of loha": DoRA(_loha(out, flat), draw(out, 1, *ones).abs() + 0.5),
        "glora": GLoRA(draw(inputs, 2), draw(2, inputs), draw(out, 2), draw(2, inputs, *kernel), alpha=0.625),
    }
    if kernel:
        found["tucker"] = LowRank(draw(3, inputs, 1, 1), draw(out, 3, 1, 1), 0.75, mid=draw(3, 3, *kernel))
        core = {"t1": draw(2, 2, *kernel), "t2": draw(2, 2, *kernel, seed=1)}
        found["loha tucker"] = Hadamard(draw(2, out), draw(2, inputs), draw(2, out), draw(2, inputs), 1.25, **core)
    return found


def assert_same(back: Delta, delta: Delta, shape: tuple[int, ...]) -> None:
    """To the last bit, on any base."""
    base = draw(*shape, seed=9)
    assert back.name == delta.name
    assert torch.equal(back.weight(base), delta.weight(base))


@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
@pytest.mark.parametrize("path", [LINEAR, KERNEL])
def test_every_law_is_read_back_to_the_last_bit(tmp_path, path, naming) -> None:
    model = architecture_of(components_of(tiny_pipeline("sd1")))
    out, inputs, *kernel = model.shapes[path]
    for name, delta in laws(out, inputs, tuple(kernel)).items():
        write(Adapter({path: delta}), tmp_path / "a.safetensors", naming)
        back, receipt = read(tmp_path / "a.safetensors", model)
        assert receipt.complete and list(back.deltas) == [path], name
        assert_same(back.deltas[path], delta, model.shapes[path])


@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
def test_norms_biases_and_tokens_are_read_back(tmp_path, naming) -> None:
    model = architecture_of(components_of(tiny_pipeline("sd1")))
    width, side = model.norms[NORM][0], model.shapes[LINEAR]
    deltas: dict[str, Delta] = {
        NORM: Full(draw(width)),
        f"{NORM}.bias": Full(draw(width, seed=1)),
        LINEAR: LowRank(draw(2, side[1]), draw(side[0], 2), 1.0),
        f"{LINEAR}.bias": Full(draw(side[0])),
        f"{KERNEL}.bias": Full(draw(model.shapes[KERNEL][0])),
    }
    tokens = {"zib": {"text_encoder": draw(2, 32)}}
    path = tmp_path / "a.safetensors"
    write(Adapter(deltas, embeddings=tokens), path, naming)
    back, receipt = read(path, model)
    assert receipt.complete and receipt.tokens == ("zib",)
    assert torch.equal(back.embeddings["zib"]["text_encoder"], tokens["zib"]["text_encoder"])
    assert back.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert torch.equal(back.deltas[name].weight(torch.zeros(delta.shape)), delta.weight(torch.zeros(delta.shape)))
    with safe_open(path, "pt") as file:
        endings = {key.rpartition(".")[2] for key in file.keys()}
    assert {"w_norm", "b_norm", "diff_b"} <= endings


def test_a_replacement_is_for_comfyui_alone(tmp_path) -> None:
    model = architecture_of(components_of(tiny_pipeline("sd1")))
    delta = Replacement(draw(*model.shapes[LINEAR]))
    write(Adapter({LINEAR: delta}), tmp_path / "a.safetensors", "comfyui")
    back, _ = read(tmp_path / "a.safetensors", model)
    assert_same(back.deltas[LINEAR], delta, model.shapes[LINEAR])


def test_two_encoders_share_a_token_under_the_keys_of_sdxl(tmp_path) -> None:
    tokens = {"zib": {"text_encoder": draw(1, 768), "text_encoder_2": draw(1, 1280)}}
    write(Adapter({}, embeddings=tokens), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"bundle_emb.zib.clip_l", "bundle_emb.zib.clip_g"}


# As kohya's sd-scripts (SDXL), ComfyUI and the tables of their conversions name these modules.
SPELLED = {
    ("sdxl", "kohya", "unet.up_blocks.0.upsamplers.0.conv"): "lora_unet_output_blocks_2_2_conv",
    ("sdxl", "kohya", "unet.add_embedding.linear_1"): "lora_unet_label_emb_0_0",
    ("sdxl", "kohya", "unet.down_blocks.2.attentions.1.proj_in"): "lora_unet_input_blocks_8_1_proj_in",
    ("sdxl", "comfyui", "unet.down_blocks.1.downsamplers.0.conv"): "diffusion_model.input_blocks.6.0.op",
    ("sdxl", "comfyui", "text_encoder_2.text_projection"): "text_encoders.clip_g.transformer.text_projection",
    ("sd1", "kohya", "unet.down_blocks.2.attentions.1.proj_in"): "lora_unet_down_blocks_2_attentions_1_proj_in",
    ("sd1", "comfyui", "unet.up_blocks.0.upsamplers.0.conv"): "diffusion_model.output_blocks.2.1.conv",
    ("sd1", "comfyui", "unet.down_blocks.2.attentions.1.proj_in"): "diffusion_model.input_blocks.8.1.proj_in",
}


@pytest.mark.parametrize(("kind", "naming", "path"), SPELLED)
def test_modules_have_the_names_that_other_programs_know(tmp_path, kind, naming, path) -> None:
    write(varied(kind, one_alpha=True), tmp_path / "a.safetensors", naming)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert f"{SPELLED[kind, naming, path]}.lora_down.weight" in set(file.keys())


def test_comfyui_calls_the_text_encoder_of_sd2_clip_h(tmp_path) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    write(Adapter({layer: LowRank(draw(2, 1024), draw(4096, 2), 1.0)}), tmp_path / "a.safetensors", "comfyui")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert all(key.startswith("text_encoders.clip_h.transformer.text_model.") for key in file.keys())


def test_a_part_of_a_model_is_named_as_the_whole(tmp_path) -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    write(Adapter({path: LowRank(draw(2, 768), draw(640, 2), 1.0)}), tmp_path / "a.safetensors", "comfyui")
    back, receipt = read(tmp_path / "a.safetensors", sd1())
    assert list(back.deltas) == [path] and receipt.complete
