"""Norms, biases and every law: what they do is W0 + weight * (W' - W0), and off is the base to the bit."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, GLoRA, Hadamard, Kronecker, LowRank, Replacement
from sdlora.lowrank.laws.input_rotation import OFTv2
from sdlora.lowrank.laws.orthogonal import BOFT, OFT
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
LINEAR, CONV = f"{BLOCK}.attn1.to_q", "unet.down_blocks.1.resnets.1.conv1"  # 32 to 32 both, without and with bias
GROUP_NORM, LAYER_NORM = "unet.mid_block.resnets.0.norm1", "text_encoder.text_model.encoder.layers.0.layer_norm1"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def lora(*kernel: int) -> LowRank:
    return LowRank(numbers(4, 32, *kernel), numbers(32, 4, *[1] * len(kernel), seed=1), alpha=2.0)


LAWS: dict[str, Callable[..., Delta]] = {
    "lora": lora,
    "full": lambda *kernel: Full(numbers(32, 32, *kernel)),
    "replacement": lambda *kernel: Replacement(numbers(32, 32, *kernel)),
    "loha": lambda *k: Hadamard(*(numbers(*s, seed=i) for i, s in enumerate(hada_shapes(*k))), alpha=2.0),
    "lokr": lambda *kernel: Kronecker(2.0, w1=numbers(4, 4), w2=numbers(8, 8, *kernel)),
    "ia3 on outputs": lambda *_: IA3(numbers(32), on_input=False),
    "ia3 on inputs": lambda *_: IA3(numbers(32), on_input=True),
    "dora by output": lambda *kernel: DoRA(lora(*kernel), numbers(32, 1, *[1] * len(kernel)) + 1),
    "dora by input": lambda *kernel: DoRA(lora(*kernel), numbers(1, 32, *[1] * len(kernel)) + 1),
    "glora": lambda *kernel: GLoRA(
        numbers(32, 4), numbers(4, 32), numbers(32, 4), numbers(4, 32, *kernel, seed=1), alpha=2.0
    ),
    "oft": lambda *_: OFT(numbers(4, 8, 8), constraint=0.0),
    "boft": lambda *_: BOFT(numbers(2, 4, 8, 8), constraint=0.0),
    "oftv2": lambda *kernel: OFTv2(numbers(4 * (9 if kernel else 1), 28)),
}


def hada_shapes(*kernel: int) -> tuple[tuple[int, int], ...]:
    flat = 32 * (9 if kernel else 1)
    return ((32, 4), (4, flat), (32, 4), (4, flat))


@pytest.mark.parametrize("weight", [1.0, 0.4, -0.7])
@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize("law", LAWS)
def test_every_law_starts_from_the_untouched_weight_at_any_weight(law: str, path: str, weight: float):
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    parameter = mixer._base.modules[path].weight
    before = parameter.detach().double()
    delta = LAWS[law](*parameter.shape[2:])
    mixer.add(Adapter({path: delta}), "one")
    mixer.add(Adapter({path: Full(numbers(*parameter.shape, seed=5))}), "a second")
    mixer.set({"a second": 0.5})
    mixer.set({"a second": 0.5, "one": weight})
    expected = (
        before + weight * delta.weight(before.float()).double() + 0.5 * numbers(*parameter.shape, seed=5).double()
    )
    assert (parameter.double() - expected).abs().max() < 1e-6
    assert (parameter.double() - before).abs().max() > 1e-2
    mixer.set({})
    assert same_state(pipeline, base)


@pytest.mark.parametrize("path", [GROUP_NORM, LAYER_NORM])
def test_norms_take_a_change_of_weight_and_bias(path: str):
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    module, width = mixer._base.modules[path], mixer._base.modules[path].weight.shape[0]
    weight, bias = (getattr(module, name).detach().clone() for name in ("weight", "bias"))
    diff, diff_b = numbers(width), numbers(width, seed=1)
    mixer.add(Adapter({path: Full(diff), f"{path}.bias": Full(diff_b)}), "norm")
    assert same_state(pipeline, base)
    mixer.set({"norm": -0.5})
    assert torch.equal(module.weight, weight - 0.5 * diff) and torch.equal(module.bias, bias - 0.5 * diff_b)
    mixer.unload("norm")
    assert same_state(pipeline, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_that_the_base_lacks_comes_with_the_first_delta_and_goes_with_the_last(dtype: torch.dtype):
    pipeline = tiny_pipeline().to(dtype)
    base, mixer, module = state_of(pipeline), Mixer(pipeline), pipeline.unet.get_submodule(LINEAR.removeprefix("unet."))
    seen = torch.randn(3, 32).to(dtype)
    plain = module(seen)
    diffs = [numbers(32, seed=seed) for seed in range(2)]
    for i, diff in enumerate(diffs):
        mixer.add(Adapter({f"{LINEAR}.bias": Full(diff)}), str(i))
    assert module.bias is None
    mixer.set({"0": 0.5, "1": -2.0})
    expected = (0.5 * diffs[0] - 2.0 * diffs[1]).to(dtype)
    assert torch.equal(module.bias, expected) and module.bias.dtype == dtype
    assert (module(seen) - plain - expected).abs().max() < 10 * torch.finfo(dtype).eps
    bias = module.bias
    mixer.set({"1": 1.0})
    assert module.bias is bias and torch.equal(bias, diffs[1].to(dtype))
    mixer.unload("1")
    assert module.bias is None and same_state(pipeline, base) and torch.equal(module(seen), plain)


def test_a_bias_law_that_scales_has_nothing_to_scale_where_there_is_none():
    mixer = Mixer(tiny_pipeline())
    mixer.add(Adapter({f"{LINEAR}.bias": IA3(numbers(32), on_input=False)}), "one")
    mixer.set({"one": 1.0})
    assert torch.equal(mixer._base.modules[LINEAR].bias, torch.zeros(32))


def test_a_mix_that_overflows_a_created_bias_is_refused_and_leaves_none():
    pipeline = tiny_pipeline().to(torch.float16)
    base, mixer = state_of(pipeline), Mixer(pipeline)
    mixer.add(Adapter({LINEAR: Full(numbers(32, 32)), f"{LINEAR}.bias": Full(torch.full((32,), 1e5))}), "huge")
    with pytest.raises(SdloraError, match=r"to_q\.bias: the mix overflows float16"):
        mixer.set({"huge": 1.0})
    assert same_state(pipeline, base) and mixer.weights == {}


@pytest.mark.parametrize("wanted", [{}, {"a": 0.5, "b": 1.0}, {"b": 1.0}])
def test_a_change_of_biases_interrupted_anywhere_leaves_the_base(monkeypatch, wanted):
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    paths = [f"{path}.bias" for path in (CONV, LINEAR, GROUP_NORM, f"{BLOCK}.attn1.to_k")]
    adapters = {"a": paths, "b": paths[1:]}
    for seed, (name, touched) in enumerate(adapters.items()):
        width = {path: mixer._base.modules[path.removesuffix(".bias")].weight.shape[0] for path in touched}
        mixer.add(Adapter({path: Full(numbers(width[path], seed=seed)) for path in touched}), name)
    write = torch.nn.Module.__setattr__
    copy = Tensor.copy_
    for moment in range(8):
        mixer.set({"a": 1.0})
        calls = iter(range(100))

        def interrupted(own, original, *values, moment=moment, calls=calls):
            call = next(calls)
            if call == moment // 2:
                if moment % 2:
                    original(own, *values)
                raise KeyboardInterrupt
            return original(own, *values)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", lambda own, source, go=interrupted: go(own, copy, source))
            patch.setattr(torch.nn.Module, "__setattr__", lambda own, *to, go=interrupted: go(own, write, *to))
            with pytest.raises(KeyboardInterrupt):
                mixer.set(wanted)
        assert same_state(pipeline, base) and mixer.state == "base" and mixer.names == ("a", "b")


@pytest.mark.parametrize(
    ("path", "delta", "message"),
    [
        (GROUP_NORM, Full(torch.zeros(31)), "norm1 has shape 31, the model's is 32;"),
        (f"{LINEAR}.bias", Full(torch.zeros(32, 32)), r"to_q\.bias has shape 32x32, the model's is 32;"),
        ("unet.nothing.bias", Full(torch.zeros(32)), r"no module unet\.nothing\.bias"),
        ("text_encoder.text_model.embeddings.token_embedding", Full(torch.zeros(514, 32)), "no module text_encoder"),
    ],
)
def test_a_change_that_does_not_fit_is_named(path: str, delta: Delta, message: str):
    with pytest.raises(SdloraError, match=message):
        Mixer(tiny_pipeline()).add(Adapter({path: delta}), "one")


def adapter_of_everything(pipeline, seed: int) -> Adapter:
    """Laws of weights, changes of norms and of biases, missing ones too; a token that all bring, and an own one.

    The third brings other vectors of the common one.
    """
    rng, modules = random.Random(seed), Mixer(pipeline)._base.modules
    deltas: dict[str, Delta] = {LINEAR: LAWS[rng.choice(list(LAWS))](), CONV: LAWS[rng.choice(list(LAWS))](3, 3)}
    for path in rng.sample(sorted(modules), 12):
        deltas[f"{path}.bias"] = Full(numbers(modules[path].weight.shape[0], seed=seed))
    for path in (GROUP_NORM, LAYER_NORM):
        deltas[path] = Full(numbers(modules[path].weight.shape[0], seed=seed))
    encoders = [name for name in components_of(pipeline) if name != "unet"]
    common, own = numbers(2, 32, seed=seed // 2), numbers(1, 32, seed=seed)
    return Adapter(deltas, embeddings={"<s1>": dict.fromkeys(encoders, common), f"own{seed}": {encoders[-1]: own}})


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_histories_with_biases_norms_and_tokens_return_the_base(kind: str, dtype: torch.dtype):
    pipeline = tiny_pipeline(kind).to(dtype)
    base, rng = state_of(pipeline), random.Random(1)
    mixer = Mixer(pipeline)
    adapters = {f"lora {i}": adapter_of_everything(pipeline, i) for i in range(3)}
    refused = 0
    for change in range(150):
        name, action = rng.choice(list(adapters)), rng.random()
        if action < 0.3:
            try:
                mixer.add(adapters[name], name)
            except SdloraError:
                refused += 1
        elif action < 0.45 and name in mixer.names:
            mixer.unload(name)
        else:
            mixer.set({n: rng.choice([0.0, -0.7, 1.0, {"unet": rng.uniform(-2, 2)}]) for n in mixer.names})
        if change % 30 == 29:
            for one in mixer.names:
                mixer.unload(one)
            assert same_state(pipeline, base)
    assert not mixer._base.copied and not mixer._base.changed and mixer._vocabularies == mixer._own
    assert refused, "two adapters brought one token with different vectors"


def test_the_same_mix_has_the_same_bits_and_token_numbers_whatever_came_before():
    pipelines = [tiny_pipeline(), tiny_pipeline()]
    adapters = [adapter_of_everything(pipelines[0], i) for i in (0, 1, 4)]
    adapters[2] = Adapter(adapters[2].deltas, embeddings={"last": adapters[2].embeddings["own4"]})
    for pipeline, order in zip(pipelines, [(0, 1, 2), (2, 1, 0)], strict=True):
        mixer = Mixer(pipeline)
        for i in order:
            mixer.add(adapters[i], f"lora {i}")
            mixer.set({f"lora {i}": 0.7})
        mixer.set({f"lora {i}": 0.1 * (i + 1) for i in order})
        mixer.unload("lora 1")
    assert pipelines[0].tokenizer.tokenize("last") == ["last"]
    assert same_state(pipelines[0], state_of(pipelines[1]))
