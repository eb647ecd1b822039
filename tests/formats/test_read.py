"""Reading: key by key, with a receipt; what cannot be applied is named, what does not belong is refused."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture, architecture_of, sd1, sdxl
from sdlora.formats.names import kohya
from sdlora.formats.read import read
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

WILD = Path(__file__).parents[3] / "shared/data/loras"
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def factors(architecture: Architecture, path: str, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    out, into = architecture.shapes[path][:2]
    return torch.randn(rank, into), torch.randn(out, rank)


def attention_lora(architecture: Architecture, rank: int = 2) -> Adapter:
    paths = [path for path in architecture.shapes if path.endswith(("to_q", "to_k", "q_proj"))]
    return Adapter({path: LowRank(*factors(architecture, path, rank), alpha=1.0) for path in paths})


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_is_written_is_read_again(tmp_path, kind, naming):
    components = components_of(tiny_pipeline(kind))
    adapter = random_adapter(components, seed=0)
    write(adapter, tmp_path / "a.safetensors", naming)
    again, receipt = read(tmp_path / "a.safetensors", architecture_of(components))
    assert receipt.complete and set(receipt.applied) == set(adapter.deltas)
    for path, delta in adapter.deltas.items():
        base = torch.zeros(delta.shape)
        assert torch.equal(again.deltas[path].weight(base), delta.weight(base)), path


def test_content_is_all_that_counts_of_what_was_read(tmp_path):
    """Of a plain file that is its hash; of a PEFT folder its config counts too, which alone tells the alpha."""
    architecture, file = architecture_of(components_of(tiny_pipeline())), tmp_path / "a.safetensors"
    write(attention_lora(architecture), file, "kohya")
    receipt = read(file, architecture)[1]
    assert receipt.content == receipt.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    write(attention_lora(architecture), tmp_path / "one", "peft")
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    config = tmp_path / "other" / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 1,', '"lora_alpha": 2,'))
    one, same, other = (read(tmp_path / name, architecture)[1] for name in ("one", "same", "other"))
    assert one.sha256 == same.sha256 == other.sha256
    assert one.content == same.content != other.content
    assert one.content not in (one.sha256, "")


def test_names_are_decided_key_by_key(tmp_path):
    """Five ways of naming in one file: kohya, the original code's blocks, and three of diffusers."""
    expected, tensors = {}, {}
    for path, down_key, up_key in [
        (QUERY, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "lora_up"),
        (KEY, "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_k.lora_down.weight", "lora_up"),
        (CLIP, f"{CLIP}.lora_linear_layer.down.weight", "up"),
        (CLIP.replace(".0.", ".1."), f"{CLIP.replace('.0.', '.1.')}.lora_A.weight", "lora_B"),
        (QUERY.replace("to_q", "to_v"), f"{QUERY.replace('to_q', 'to_v')}.lora.down.weight", "up"),
    ]:
        down, up = factors(sd1(), path)
        stem, part = down_key.removesuffix(".weight").rsplit(".", 1)
        tensors |= {f"{stem}.{part}.weight": down, f"{stem}.{up_key}.weight": up}
        expected[path] = up.flatten(1) @ down.flatten(1)
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapter, receipt = read(tmp_path / "mixed.safetensors", sd1())
    assert receipt.complete
    assert adapter.deltas.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.deltas[path].weight(torch.zeros_like(delta)), delta)


def test_pointwise_convolutions_and_linear_layers_are_the_same(tmp_path):
    path = "unet.down_blocks.0.attentions.0.proj_in"  # a convolution in SD 1.x, linear in SD 2.x
    stem = kohya([path])[path]
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, 320), f"{stem}.lora_up.weight": torch.randn(320, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", sd1())
    assert receipt.complete
    assert adapter.deltas[path].weight(torch.zeros(320, 320, 1, 1)).shape == (320, 320, 1, 1)


def test_unknown_keys_are_named_and_the_rest_is_applied(tmp_path):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors |= {
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
        "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2),
    }
    tensors |= {"emb_params": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    _, receipt = read(tmp_path / "a.safetensors", sd1())
    assert receipt.unknown == ("emb_params", "lora_unet_nowhere.lora_down.weight", "lora_unet_nowhere.lora_up.weight")
    assert len(receipt.applied) == len(attention_lora(sd1()).deltas)
    assert "NOT applied: 3 keys not known: emb_params" in receipt.summary()


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ("rescale", "has rescale, which do not belong to its law"),
        ("lora_up.weight", r"down \(2, 320\) and up \(3, 4\) are no low-rank pair"),
        ("lora_mid.weight", r"mid \(320,\) is no core"),
        ("dora_scale", r"\(3, 4\) is no DoRA magnitude"),
    ],
)
def test_a_module_with_a_part_that_it_cannot_have_is_not_applied_without_it(tmp_path, part, why):
    stem = kohya([QUERY])[QUERY]
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    odd = torch.ones(3, 4) if part in ("dora_scale", "lora_up.weight") else torch.ones(320)
    save_file(load_file(tmp_path / "a.safetensors") | {f"{stem}.{part}": odd}, tmp_path / "a.safetensors")
    _, receipt = read(tmp_path / "a.safetensors", sd1())
    assert QUERY not in receipt.applied and len(receipt.applied) == len(attention_lora(sd1()).deltas) - 1
    (line,) = receipt.incomplete
    assert re.match(f"{stem} {why}", line)


def test_half_a_pair_is_not_applied(tmp_path):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    del tensors[f"{kohya([QUERY])[QUERY]}.lora_up.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    _, receipt = read(tmp_path / "a.safetensors", sd1())
    assert QUERY not in receipt.applied
    assert receipt.incomplete == (f"{kohya([QUERY])[QUERY]} lacks up",)
    assert "NOT applied: 1 modules not whole" in receipt.summary()


def test_parts_of_two_laws_in_one_module_are_refused(tmp_path):
    stem = kohya([QUERY])[QUERY]
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    save_file(
        load_file(tmp_path / "a.safetensors") | {f"{stem}.diff": torch.ones(320, 320)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(SdloraError, match=f"{stem} has parts of 2 laws: alpha, diff, down, up; delete"):
        read(tmp_path / "a.safetensors", sd1())


def test_half_of_a_file_is_refused_unless_asked_for_in_part(tmp_path):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    kept = {key: value for key, value in tensors.items() if "up_blocks" not in key or "lora_up" not in key}
    save_file(kept, tmp_path / "a.safetensors")
    with pytest.raises(SdloraError, match="can only be applied in part: .* lacks up; .*--partial"):
        read(tmp_path / "a.safetensors", sd1())
    _, receipt = read(tmp_path / "a.safetensors", sd1(), partial=True)
    assert receipt.applied and "in part as asked" in receipt.summary()


@pytest.mark.parametrize(
    ("settings", "alphas"),
    [
        ({}, (4.0, 4.0)),
        ({"unet.r": 4, "unet.lora_alpha": 8}, (8.0, 4.0)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}, "text_encoder.lora_alpha": 1}, (2.0, 1.0)),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, (16.0, 4.0)),
    ],
)
def test_diffusers_files_may_carry_alpha_in_their_metadata(tmp_path, settings, alphas):
    tensors = {}
    for path in (QUERY, CLIP):
        down, up = factors(sd1(), path)
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    adapter, _ = read(tmp_path / "a.safetensors", sd1())
    assert (adapter.deltas[QUERY].alpha, adapter.deltas[CLIP].alpha) == alphas


@pytest.mark.parametrize(
    ("made_for", "read_for", "message"),
    [
        (sdxl(), sd1(), "is a LoRA for SDXL .* the model, which is SD 1.x"),
        (sd1(), sdxl(), "is a LoRA for SD 1.x .* the model, which is SDXL"),
        (sd1(), architecture_of(components_of(tiny_pipeline())), "is a LoRA for SD 1.x"),
        (architecture_of(components_of(tiny_pipeline())), sd1(), "trained on another model.*other shapes, such as"),
    ],
)
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_lora_for_another_architecture_is_refused(tmp_path, made_for, read_for, message, naming):
    write(attention_lora(made_for), tmp_path / "a.safetensors", naming)
    with pytest.raises(SdloraError, match=message):
        read(tmp_path / "a.safetensors", read_for)


def damage(path: Path, kind: str) -> None:
    stem = kohya([QUERY])[QUERY]
    tensors = load_file(path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "no tensor file":
        path.write_text("hello, I am a text")
    elif kind == "empty":
        save_file({}, path)
    elif kind == "no LoRA":
        save_file({"model.diffusion_model.out.2.weight": torch.ones(3)}, path)
    elif kind == "alpha":
        save_file(tensors | {f"{stem}.alpha": torch.ones(4)}, path)
    elif kind == "nan":
        save_file(tensors | {f"{stem}.lora_up.weight": torch.full((320, 2), torch.nan)}, path)
    elif kind == "complex":
        save_file(tensors | {f"{stem}.lora_up.weight": torch.ones(320, 2, dtype=torch.complex64)}, path)
    elif kind == "metadata":
        save_file(tensors, path, {"lora_adapter_metadata": "{"})
    elif kind == "absent":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", "damaged or cut short"),
        ("no tensor file", "damaged or cut short"),
        ("empty", "is empty"),
        ("no LoRA", "is a whole UNet; choose it as the base model"),
        ("alpha", "alpha is no single number"),
        ("nan", "nan or infinite"),
        ("complex", "holds complex64 where numbers with a fraction belong"),
        ("metadata", "lora_adapter_metadata"),
        ("absent", "cannot be read .*check the path"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, kind, message):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    damage(tmp_path / "a.safetensors", kind)
    with pytest.raises(SdloraError, match=message) as caught:
        read(tmp_path / "a.safetensors", sd1())
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not WILD.is_dir(), reason="the folder of files from the wild is not here")
@pytest.mark.parametrize(
    ("name", "rank", "tokens"), [("analog_svd_rank4", 4, ()), ("lora_disney", 1, ("<s1>", "<s2>"))]
)
def test_lists_of_2022_are_read_whole(name, rank, tokens):
    adapter, receipt = read(WILD / f"{name}.safetensors", sd1())
    assert receipt.complete and receipt.made_for == ("sd1",) and receipt.tokens == tokens
    assert len(adapter.component("unet")) == 144 and len(adapter.component("text_encoder")) == 48
    assert {delta.rank for delta in adapter.deltas.values()} == {rank}
    assert {token: vectors["text_encoder"].shape for token, vectors in adapter.embeddings.items()} == {
        token: (1, 768) for token in tokens
    }
    with pytest.raises(SdloraError, match="is a LoRA for SD 1.x .* the model, which is SDXL"):
        read(WILD / f"{name}.safetensors", sdxl())


def test_one_wrong_shape_among_many_is_told_by_the_receipt(tmp_path):
    path = "unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"
    adapter = attention_lora(sd1())
    assert len(adapter.deltas) > 20 and path in adapter.deltas
    odd = LowRank(torch.ones(2, 8), torch.ones(4, 2), 2.0)
    write(Adapter({**adapter.deltas, path: odd}), tmp_path / "a.safetensors")
    read_back, receipt = read(tmp_path / "a.safetensors", sd1())
    assert set(read_back.deltas) == set(adapter.deltas) - {path}
    assert receipt.misfit == (f"{kohya([path])[path]} (4x8, the model's is 640x640)",)
    assert "NOT applied: 1 modules of another shape" in receipt.summary()


def test_an_inpainting_model_takes_what_was_trained_on_its_parent(tmp_path):
    shapes = {**sd1().shapes, "unet.conv_in": (320, 9, 3, 3)}
    ends = LowRank(torch.ones(2, 4, 3, 3), torch.ones(320, 2, 1, 1), 2.0)
    write(Adapter({**attention_lora(sd1()).deltas, "unet.conv_in": ends}), tmp_path / "a.safetensors")
    _, receipt = read(tmp_path / "a.safetensors", Architecture("sd1", shapes))
    assert receipt.misfit == ("lora_unet_conv_in (320x4x3x3, the model's is 320x9x3x3)",)


def test_a_module_told_twice_is_refused_with_both_names(tmp_path):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    down, up = factors(sd1(), QUERY)
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors | {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}, tmp_path / "a.safetensors")
    with pytest.raises(SdloraError, match=f"tells 1 modules twice, such as {kohya([QUERY])[QUERY]} and {QUERY}"):
        read(tmp_path / "a.safetensors", sd1())


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_file_that_is_written_again_keeps_its_strength(tmp_path, naming):
    down, up = factors(sd1(), QUERY)
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 8})
    tensors = {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    adapter, _ = read(tmp_path / "a.safetensors", sd1())
    write(adapter, tmp_path / "b.safetensors", naming)
    again, _ = read(tmp_path / "b.safetensors", sd1())
    base = torch.zeros(320, 320)
    assert torch.allclose(again.deltas[QUERY].weight(base), adapter.deltas[QUERY].weight(base))


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": "[" * 100_000},
        {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"},
        {"ss_tag_frequency": "[" * 100_000},
        {"ss_tag_frequency": '{"a": {"b": Infinity}}'},
    ],
)
def test_metadata_bombs_do_not_go_off(tmp_path, metadata):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", metadata)
    if "ss_tag_frequency" in metadata:
        assert read(tmp_path / "a.safetensors", sd1())[1].trigger_words == ()
    else:
        with pytest.raises(SdloraError, match="lora_adapter_metadata.*save it again"):
            read(tmp_path / "a.safetensors", sd1())


BUNDLES = {
    "sd1": {"bundle_emb.zib.string_to_param.*": (2, 768), "bundle_emb.my.dots.emb_params": (1, 768)},
    "sdxl": {
        "bundle_emb.zib.clip_l": (2, 768),
        "bundle_emb.zib.clip_g": (2, 1280),
        "bundle_emb.my.dots.clip_g": (1280,),
    },
}


@pytest.mark.parametrize("architecture", [sd1(), sdxl()], ids=["sd1", "sdxl"])
def test_bundled_tokens_come_with_the_adapter(tmp_path, architecture):
    write(attention_lora(architecture), tmp_path / "a.safetensors")
    bundle = {key: torch.randn(shape) for key, shape in BUNDLES[architecture.name].items()}
    save_file(load_file(tmp_path / "a.safetensors") | bundle, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", architecture)
    assert receipt.complete and receipt.tokens == ("my.dots", "zib")
    first, second = ("string_to_param.*", "emb_params") if architecture.name == "sd1" else ("clip_l", "clip_g")
    assert torch.equal(adapter.embeddings["zib"]["text_encoder"], bundle[f"bundle_emb.zib.{first}"])
    (vectors,) = adapter.embeddings["my.dots"].values()
    assert torch.equal(vectors, bundle[f"bundle_emb.my.dots.{second}"].reshape(1, -1))


def test_tokens_of_another_width_and_of_an_unknown_kind_are_named(tmp_path):
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    odd = {"bundle_emb.zib.clip_g": torch.ones(2, 1280), "bundle_emb.zib.clip_l_out": torch.ones(2, 768)}
    save_file(load_file(tmp_path / "a.safetensors") | odd, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", sd1())
    assert not adapter.embeddings and not receipt.complete
    assert receipt.unknown == ("bundle_emb.zib.clip_l_out",)
    assert len(receipt.misfit) == 1 and receipt.misfit[0].startswith("token zib (bundle_emb.zib.clip_g ")


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(torch.tensor(8), 2.0), (torch.tensor([2.0]), 0.5), (torch.tensor(-4.0, dtype=torch.float16), -1.0), (None, 1.0)],
)
def test_alpha_may_have_any_dtype_and_be_missing(tmp_path, alpha, scale):
    stem = kohya([QUERY])[QUERY]
    down, up = factors(sd1(), QUERY)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | ({} if alpha is None else {f"{stem}.alpha": alpha}), tmp_path / "a.safetensors")
    adapter, _ = read(tmp_path / "a.safetensors", sd1())
    wanted = scale * up.double() @ down.double()
    assert (adapter.deltas[QUERY].weight(torch.zeros(320, 320)).double() - wanted).abs().max() < 1e-5


def test_an_alpha_of_nothing_is_told(tmp_path):
    stem = kohya([QUERY])[QUERY]
    write(attention_lora(sd1()), tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors") | {f"{stem}.alpha": torch.tensor(0.0)}, tmp_path / "a.safetensors")
    _, receipt = read(tmp_path / "a.safetensors", sd1())
    assert f"alpha is 0 in 1 modules such as {QUERY}: they have no effect" in receipt.summary()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf, 1.0, -0.0, 448.0, -448.0])
def test_numbers_that_are_not_finite_are_found_in_every_dtype(tmp_path, dtype, value):
    """As torch itself judges what it has rounded the number to."""
    down, up = factors(sd1(), QUERY)
    up[-1, -1] = value
    held = up.clamp(-448, 448).where(up.isfinite(), up).to(getattr(torch, dtype))
    stem = kohya([QUERY])[QUERY]
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": held}, tmp_path / "a.safetensors")
    if torch.isfinite(held.float()).all():
        assert read(tmp_path / "a.safetensors", sd1())[1].finite
    else:
        with pytest.raises(SdloraError, match=f"{stem}.lora_up.weight holds numbers that are nan or infinite"):
            read(tmp_path / "a.safetensors", sd1())


ONES = torch.ones
STEM = kohya([QUERY])[QUERY]
SCALED = {
    "lora": ({"lora_down.weight": ONES(4, 320), "lora_up.weight": ONES(320, 4)}, 4.0),
    "loha": ({f"hada_w{i}_{ab}": ONES((320, 2) if ab == "a" else (2, 320)) for i in (1, 2) for ab in "ab"}, 4.0),
    "lokr, a pair": ({"lokr_w1": ONES(4, 4), "lokr_w2_a": ONES(80, 2), "lokr_w2_b": ONES(2, 80)}, 2.0),
    "lokr, whole": ({"lokr_w1": ONES(4, 4), "lokr_w2": ONES(80, 80)}, 1.0),
    "full": ({"diff": ONES(320, 320)}, 1.0),
}


@pytest.mark.parametrize("law", SCALED)
@pytest.mark.parametrize(
    ("numbers", "scale"),
    [({}, 1.0), ({"scale": 0.5}, 0.5), ({"scalar": 3.0}, 3.0), ({"scale": 0.5, "scalar": 3.0}, 1.5)],
)
def test_a_scale_stands_for_alpha_by_rank_and_a_scalar_multiplies_it(tmp_path, law, numbers, scale):
    parts, product = SCALED[law]
    tensors = {f"{STEM}.{name}": value for name, value in parts.items()}
    tensors |= {f"{STEM}.{name}": torch.tensor(value) for name, value in numbers.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", sd1())
    assert receipt.complete
    assert torch.allclose(adapter.deltas[QUERY].weight(torch.zeros(320, 320)), torch.full((320, 320), product * scale))


def test_a_scale_beside_a_law_that_none_scales_is_told(tmp_path):
    tensors = {f"{STEM}.oft_blocks": torch.zeros(4, 80, 80), f"{STEM}.scale": torch.tensor(0.001)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SdloraError, match=f"such as {STEM} has scale, which do not belong to its law; check"):
        read(tmp_path / "a.safetensors", sd1())


def test_a_limit_below_nothing_and_ranks_beyond_use_are_told(tmp_path):
    tensors = {f"{STEM}.oft_blocks": torch.zeros(4, 80, 80), f"{STEM}.alpha": torch.tensor(-1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert f"rotations such as {QUERY} is below 0 and not used" in read(tmp_path / "a.safetensors", sd1())[1].summary()
    save_file(
        {f"{STEM}.lora_down.weight": ONES(400, 320), f"{STEM}.lora_up.weight": ONES(320, 400)},
        tmp_path / "a.safetensors",
    )
    assert "ranks are larger than 1 modules can use" in read(tmp_path / "a.safetensors", sd1())[1].summary()


def test_a_magnitude_of_another_size_is_what_does_not_fit(tmp_path):
    parts = SCALED["lora"][0] | {"dora_scale": ONES(1, 7)}
    save_file({f"{STEM}.{name}": value for name, value in parts.items()}, tmp_path / "a.safetensors")
    with pytest.raises(SdloraError, match=r"down 4x320, magnitude 1x7, up 320x4, the model's is 320x320"):
        read(tmp_path / "a.safetensors", sd1())
