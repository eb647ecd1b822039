"""Settings of PEFT mean what peft takes them for, and none of them can be used against the reader."""

import json
import re

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from sdlora.errors import SdloraError
from sdlora.formats.peft_config import KEY, Patterns, by_component, parse
from sdlora.lowrank.laws import OFTv2


def attention() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("to_q", "to_k", "to_v")})


def unet() -> nn.Module:
    """Paths as in Stable Diffusion's UNet, some of which end like others."""
    blocks = [nn.ModuleDict({"attn1": attention(), "attn2": attention()}) for _ in range(3)]
    return nn.ModuleDict({"down_blocks": nn.ModuleList(blocks), "mid_block": attention(), "xattn1": attention()})


def saved(model: nn.Module, folder) -> str:
    """The adapter_config.json that peft writes for a model of it."""
    model.save_pretrained(folder)
    return (folder / "adapter_config.json").read_text()


PATTERNS = [
    {},
    {"to_q": 2},
    {"attn1.to_q": 2, "to_q": 3},
    {"to_q": 3, "attn1.to_q": 2},
    {"^mid_block.to_q": 2, "down_blocks.1.attn1.to_k": 5},
    {"^to_q": 2, "q": 3},
    {r"down_blocks\.1\.attn1\.to_q": 2},
    {r"down_blocks.\d+.attn1.to_q": 2, "to_q$": 6},
    {"down_blocks.[02].attn1.to_[kq]": 2},
    {"attn2.(to_q|to_k)": 2, "(attn1|attn2).(?:to_v|to_k)": 7},
    {"to_q|attn1.to_k": 2},
    {r"^down_blocks\.[0-9]+\.attn2\.to_v$": 2},
]


@pytest.mark.parametrize("ranks", PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_are_those_of_peft(tmp_path, ranks, rslora):
    """Those of a model that peft loads: in the file the patterns are sorted, and the first that matches counts."""
    alphas = {pattern: rank + 1 for pattern, rank in reversed(ranks.items())}
    targets = ["to_q", "to_k", "to_v"]
    settings = LoraConfig(
        r=4, lora_alpha=10, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora, target_modules=targets
    )
    config = parse(saved(get_peft_model(unet(), settings), tmp_path), "a")
    model = get_peft_model(unet(), LoraConfig.from_pretrained(tmp_path))
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "scaling")}
    assert len(layers) == 24
    for name, layer in layers.items():
        rank = layer.lora_A["default"].out_features
        assert config.alpha_of(name, rank) / rank == pytest.approx(layer.scaling["default"], rel=1e-12), name
        assert config.scale_of(name) == pytest.approx(layer.scaling["default"], rel=1e-12), name


@pytest.mark.parametrize("settings", [LoHaConfig, LoKrConfig])
def test_scales_of_loha_and_lokr_are_those_of_peft(tmp_path, settings):
    ranks, alphas = {"attn1.to_q": 2, "to_k": 100}, {"attn1.to_q": 5}
    targets = ["to_q", "to_k", "to_v"]
    model = get_peft_model(
        unet(), settings(r=4, alpha=10, rank_pattern=ranks, alpha_pattern=alphas, target_modules=targets)
    )
    config = parse(saved(model, tmp_path), "a")
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "scaling")}
    assert config.kind == settings(target_modules=targets).peft_type.value and len(layers) == 24
    for name, layer in layers.items():
        assert config.scale_of(name) == pytest.approx(layer.scaling["default"], rel=1e-12), name
        assert config.alpha_of(name, 3) / 3 == pytest.approx(layer.scaling["default"], rel=1e-12), name


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (["to_q", "to_k"], ["to_k"]),
        (["to_q", "to_k"], []),
        (r".*to_[qk]", ["1.to_q", "o_k"]),
        (r".*to_[qk]", r"down_blocks\.\d+\.attn1\.to_q"),
        (r".*to_[qk]", "mid_block.to_q"),
    ],
)
def test_feedforward_modules_are_those_of_peft(tmp_path, targets, feedforward):
    model = get_peft_model(unet(), IA3Config(target_modules=targets, feedforward_modules=feedforward))
    config = parse(saved(model, tmp_path), "a")
    layers = {name: one for name, one in model.base_model.model.named_modules() if hasattr(one, "is_feedforward")}
    assert config.kind == "IA3" and len(layers) == 16
    for name, layer in layers.items():
        assert config.is_feedforward(name) == layer.is_feedforward, name


@pytest.mark.parametrize("neumann", [True, False])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
def test_the_series_of_oft_is_that_of_peft(tmp_path, neumann, terms):
    settings = OFTConfig(
        r=0,
        oft_block_size=4,
        use_cayley_neumann=neumann,
        num_cayley_neumann_terms=terms,
        init_weights=False,
        target_modules=["to_q"],
    )
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"to_q": nn.Linear(16, 16, bias=False)}), settings)
    config = parse(saved(model, tmp_path), "a")
    layer = model.base_model.model["to_q"]
    base = layer.get_base_layer().weight.detach().clone()
    law = OFTv2(layer.oft_R["default"].weight.detach() * 10, series=config.series, peft=True)
    layer.oft_R["default"].weight.data *= 10  # so that the terms differ
    layer.merge()
    assert config.kind == "OFT" and config.alpha_of("to_q", 4) == 4.0
    torch.testing.assert_close(law.weight(base), layer.get_base_layer().weight.detach() - base, atol=1e-5, rtol=1e-4)


def test_before_0_18_the_series_ended_otherwise():
    """Read from peft 0.16.0 and 0.17.1, oft/layer.py, which wrote no version into the config."""
    old = {"peft_type": "OFT", "r": 0, "oft_block_size": 4}
    assert parse(old, "a").series == (2, 2, 2, 2)
    assert parse({**old, "peft_version": "0.18.0"}, "a").series == (2, 2, 2, 1)
    assert parse({**old, "num_cayley_neumann_terms": 3}, "a").series == (2, 2)


MODULES = [
    "a.b.to_q",
    "to_q",
    "xto_q",
    "a.to_q.b",
    "a.layers.12.b",
    "a.layers.b",
    "a.b",
    "b",
    "ab",
    "a.b.",
    "layers.1.b",
]


@pytest.mark.parametrize(
    "pattern", ["to_q", "^to_q", "b", "^a.b", r"a\.b", r"layers.\d+.b", r"layers\.[0-9]\.b", "a|b", "(a|b)", "[ab]"]
)
def test_patterns_match_as_in_peft(pattern):
    found = parse({"rank_pattern": {pattern: 3}}, "a").rank_pattern
    for module in MODULES:
        wanted = 3 if get_pattern_key([pattern], module) == pattern else None
        assert found.find(module) == wanted, module


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|aa)*b",
        ".*.*.*.*b",
        "(.*a){20}",
        "([a-z]+)*",
        r"\d+\d+\d+x",
        r"\d+[0-9]",
        "(a|b" + "|c" * 70 + ")",
        "(a|b)" * 7,
        "((a|b)|c)",
        "a)",
        "(a",
        "(?=a)b",
        r"(a)\1",
        "a**",
        "",
        "^",
        r"to_q\$",
        "[z-a]",
        "a\nb",
    ],
)
def test_expressions_that_could_take_for_ever_are_refused_by_name(pattern):
    for settings in ({"rank_pattern": {pattern: 3}}, {"alpha_pattern": {pattern: 3}}):
        with pytest.raises(SdloraError, match="^a: (rank|alpha)_pattern has ") as caught:
            parse(settings, "a")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", [r"a.\d+.\d+.\d+.\d+.b", "(a|aa)" * 5 + "b", r"a\d+", "[ab]" * 60 + "x"])
def test_what_is_allowed_is_matched_in_a_moment(pattern):
    """Were it not, this would not end."""
    found = parse({"rank_pattern": {pattern: 3}}, "a").rank_pattern
    for module in ("a" * 500, "1." * 250, "a.1" * 160, "aa" * 249 + "b."):
        assert found.find(module) is None


def test_many_names_are_found_by_looking_up():
    ranks = {f"^down_blocks.{i}.attn1.to_q": i + 1 for i in range(5000)}
    found = parse({"rank_pattern": ranks}, "a").rank_pattern
    assert found.expressions == () and found.find("down_blocks.4999.attn1.to_q") == 5000
    with pytest.raises(SdloraError, match="201 expressions; write the names"):
        parse({"rank_pattern": {rf"blocks.{i}.\d.to_q": 1 for i in range(201)}}, "a")


def test_what_the_reader_must_act_on_is_told():
    config = parse(
        {
            "peft_type": "LORA",
            "lora_bias": True,
            "use_dora": True,
            "bias": "lora_only",
            "fan_in_fan_out": True,
            "modules_to_save": ["conv_out", "conv_in"],
            "trainable_token_indices": [49408, 49409],
            "base_model_name_or_path": "../../etc/passwd",
            "init_lora_weights": "gaussian",
            "inference_mode": True,
            "loftq_config": {},
        },
        "a",
    )
    assert (config.lora_bias, config.dora, config.bias, config.fan_in_fan_out) == (True, True, "lora_only", True)
    assert config.modules_to_save == ("conv_in", "conv_out") and config.base == "../../etc/passwd"
    assert config.trainable_tokens == {"embed_tokens": (49408, 49409)}
    assert parse({"trainable_token_indices": {"token_embedding": [3]}}, "a").trainable_tokens == {
        "token_embedding": (3,)
    }


def test_what_is_missing_is_what_peft_takes_it_for():
    assert parse({}, "a") == parse(LoraConfig().to_dict(), "a")
    defaults = parse({}, "a")
    assert (defaults.kind, defaults.rank, defaults.alpha, defaults.rank_pattern) == ("LORA", 8, 8.0, Patterns())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 3])
def test_a_training_that_changed_the_base_is_refused_with_the_reason(init):
    with pytest.raises(SdloraError, match=f"^a: {re.escape(ascii(init))} changed the base as well"):
        parse({"init_lora_weights": init}, "a")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_a_training_that_left_the_base_alone_is_not(init):
    assert parse({"init_lora_weights": init}, "a").rank == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_replication": [[0, 4]]}, "layer_replication is set, so the adapter repeats layers"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"peft_type": "OFT", "coft": True}, "coft is set"),
        ({"peft_type": "VERA"}, "'VERA' adapters are not known; train it as one of LORA"),
        ({"peft_type": 3}, "peft_type is 3 where a text is wanted"),
        ({"r": 0}, "r is 0, which is no rank"),
        ({"r": -1}, "r is -1 where a whole number of a sensible size"),
        ({"r": 2.5}, "r is 2.5 where a whole number is wanted"),
        ({"r": True}, "r is True where a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8' where a number is wanted"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan where a number of a sensible size"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 1e30}, r"lora_alpha is 1e\+30"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 1000.*\.\.\. where a number"),
        ({"lora_alpha": 10**5000}, "lora_alpha is int where a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes' where true or false"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\] where a number by pattern"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern of 'a' is 0 where a rank"),
        ({"rank_pattern": {"a": None}}, "rank_pattern of 'a' is None"),
        ({"alpha_pattern": {"a": "b"}}, "alpha_pattern of 'a' is 'b'"),
        ({"modules_to_save": "conv_in"}, "modules_to_save is 'conv_in' where a list of names"),
        ({"modules_to_save": [1]}, "modules_to_save is"),
        ({"trainable_token_indices": {"a": 1}}, "trainable_token_indices is"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices is 'a'"),
        ({"feedforward_modules": ".*.*x"}, "feedforward_modules has the pattern"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is"),
    ],
)
def test_settings_that_make_no_sense_get_one_clear_line(settings, message):
    with pytest.raises(SdloraError, match=f"^a.json: {message}") as caught:
        parse(settings, "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "[" * 100_000, '{"r": 1' + "0" * 5000 + "}", '{"a":' * 100_000, " " * (4 * 2**20 + 1)],
)
def test_damaged_configs_get_one_clear_line(text):
    for read in (lambda: parse(text, "a.json"), lambda: by_component({KEY: text}, "a.json")):
        with pytest.raises(SdloraError, match="^a.json.*save it again") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_metadata_of_diffusers_is_told_by_component():
    unet_settings = LoraConfig(r=4, lora_alpha=8, alpha_pattern={"^down_blocks.0.attn1.to_q": 2}).to_dict()
    encoder_settings = LoraConfig(r=2, lora_alpha=1, use_rslora=True).to_dict()
    settings = {f"unet.{key}": value for key, value in unet_settings.items()}
    settings |= {f"text_encoder.{key}": value for key, value in encoder_settings.items()}
    configs = by_component({KEY: json.dumps(settings, default=list, indent=2, sort_keys=True)}, "a")
    assert configs.keys() == {"unet", "text_encoder"}
    assert configs["unet"].alpha_of("down_blocks.0.attn1.to_q", 4) == 2.0
    assert configs["unet"].alpha_of("x.down_blocks.0.attn1.to_q", 4) == 8.0
    assert configs["text_encoder"].alpha_of("text_model.x", 2) == pytest.approx(2**0.5)


def test_metadata_of_a_model_saved_alone_is_the_unets():
    assert by_component({KEY: '{"r": 4, "lora_alpha": 6}'}, "a")["unet"].alpha == 6.0
    assert by_component({"other": "{"}, "a") == {}
    with pytest.raises(SdloraError, match=f"^a: {KEY} of 'unet': lora_alpha is"):
        by_component({KEY: '{"unet.lora_alpha": []}'}, "a")
