import random
from pathlib import Path

import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.mixing import base as base_module
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline


def snapshot(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in components_of(pipeline).items()
        for key, value in part.state_dict().items()
    }


def same(pipeline, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in snapshot(pipeline).items())


def mixer_with(pipeline, count: int = 3) -> Mixer:
    mixer = Mixer(pipeline)
    for i in range(count):
        mixer.add(random_adapter(components_of(pipeline), seed=i), f"lora {i}")
    return mixer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_changes_leave_the_base_bit_equal(dtype):
    pipeline = tiny_pipeline().to(dtype)
    before, rng = snapshot(pipeline), random.Random(0)
    components = components_of(pipeline)
    adapters = [random_adapter(components, seed=i, suffix="to_q") for i in range(4)]
    mixer = Mixer(pipeline)
    for change in range(1000):
        name = f"lora {rng.randrange(4)}"
        action = rng.random()
        if action < 0.3:
            mixer.add(adapters[int(name[-1])], name)
        elif action < 0.4 and name in mixer.names:
            mixer.unload(name)
        else:
            mixer.set({n: rng.choice([0.0, -0.7, 1.0, {"unet": rng.uniform(-2, 2)}]) for n in mixer.names})
        if change % 100 == 50:
            mixer.set({})
            assert same(pipeline, before)
    for name in mixer.names:
        mixer.unload(name)
    assert same(pipeline, before)
    assert not mixer._base.copied, "copies of weights that nothing changes are held"


def test_the_same_mix_has_the_same_bits_whatever_came_before():
    first, second = tiny_pipeline(), tiny_pipeline()
    mixer = mixer_with(first)
    mixer.set({"lora 0": 0.3, "lora 2": -0.4})
    other = Mixer(second)
    for i in (2, 1, 0):
        other.add(random_adapter(components_of(second), seed=i), f"lora {i}")
        other.set({f"lora {i}": 1.5})
    other.set({"lora 2": -0.4, "lora 0": 0.3})
    assert same(second, snapshot(first))


def test_weights_are_the_base_plus_the_weighted_deltas_in_float64():
    pipeline = tiny_pipeline()
    before = snapshot(pipeline)
    mixer = mixer_with(pipeline, 2)
    mixer.set({"lora 0": {"unet": 0.8, "text_encoder": 0.0}, "lora 1": -0.5})
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for component, weights in (("unet", (0.8, -0.5)), ("text_encoder", (0.0, -0.5))):
        path = path if component == "unet" else "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        module = mixer._base.modules[path]
        key = next(name for name in before if name.endswith(path.removeprefix(f"{component}.text_model.") + ".weight"))
        expected = before[key].double()
        for i, weight in enumerate(weights):
            delta = random_adapter(components_of(pipeline), seed=i).deltas[path]
            expected += weight * delta.alpha / delta.rank * delta.up.double() @ delta.down.double()
        assert (module.weight.double() - expected).abs().max() < 1e-6


def test_parameters_stay_the_same_objects():
    pipeline = tiny_pipeline()
    parameters = {id(p) for p in pipeline.unet.parameters()}
    mixer = mixer_with(pipeline, 1)
    mixer.set({"lora 0": 1.0})
    assert {id(p) for p in pipeline.unet.parameters()} == parameters


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("wanted", [{}, {"lora 0": 0.5, "lora 1": 1.0}, {"lora 1": {"unet": 1.0, "schedule": "0.5-"}}])
def test_a_change_that_fails_at_any_parameter_leaves_the_base(monkeypatch, wanted, failure):
    pipeline = tiny_pipeline()
    base, mixer = snapshot(pipeline), Mixer(pipeline)
    for i in range(2):
        mixer.add(random_adapter(components_of(pipeline), seed=i, suffix="to_q"), f"lora {i}")
    done = {"merge": base_module.merge, "copy": torch.Tensor.copy_, "hook": torch.nn.Module.register_forward_hook}

    def change(moment: int) -> int:
        """The change with a failure before (even) or behind (odd) one of its steps; how many steps it had."""
        calls = 0

        def failing(name, *values):
            nonlocal calls
            calls += 1
            if calls - 1 == moment // 2 and not moment % 2:
                raise failure
            result = done[name](*values)
            if calls - 1 == moment // 2:
                raise failure
            return result

        with monkeypatch.context() as patch:
            patch.setattr(base_module, "merge", lambda *values: failing("merge", *values))
            patch.setattr(torch.Tensor, "copy_", lambda *values: failing("copy", *values))
            patch.setattr(torch.nn.Module, "register_forward_hook", lambda *values: failing("hook", *values))
            mixer.set(wanted)
        return calls

    mixer.set({"lora 0": 1.0})
    steps = change(-2)
    assert steps >= 10
    for moment in range(2 * steps):
        mixer.set({"lora 0": 1.0})
        with pytest.raises(failure):
            change(moment)
        assert same(pipeline, base) and not any(module._forward_hooks for module in pipeline.unet.modules())
        assert mixer.state == "base" and mixer.weights == {} and mixer.names == ("lora 0", "lora 1")


def test_a_mix_that_overflows_is_refused_and_leaves_the_base():
    pipeline = tiny_pipeline().to(torch.float16)
    base = snapshot(pipeline)
    mixer = mixer_with(pipeline, 1)
    adapter = mixer._books["lora 0"].adapter
    huge = {path: LowRank(delta.down * 1e6, delta.up, delta.alpha) for path, delta in adapter.deltas.items()}
    for change in (lambda: mixer.set({"lora 0": 1e6}), lambda: mixer.add(Adapter(huge), "lora 0")):
        mixer.set({"lora 0": 0.5})
        with pytest.raises(SdloraError, match=r"(unet|text_encoder)\..*overflows float16"):
            change()
        assert same(pipeline, base) and mixer._books["lora 0"].adapter is adapter and mixer.state == "base"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mix_is_rounded_once(dtype):
    """Every merged weight is within half a unit in the last place of the sum in float64, and float32's own error."""
    pipeline = tiny_pipeline().to(dtype)
    mixer, path = Mixer(pipeline), "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    base = mixer._base.modules[path].weight.detach().double()
    adapters = [random_adapter(components_of(pipeline), seed=i, suffix="to_q") for i in range(3)]
    exact = base.clone()
    for i, adapter in enumerate(adapters):
        mixer.add(adapter, f"lora {i}")
        delta = adapter.deltas[path]
        exact += 0.3 * (i + 1) * delta.scale * delta.up.double() @ delta.down.double()
    mixer.set({f"lora {i}": 0.3 * (i + 1) for i in range(3)})
    error = (mixer._base.modules[path].weight.double() - exact).abs()
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=torch.finfo(dtype).tiny)))
    assert (error <= 0.5 * torch.finfo(dtype).eps * 2**exponent + 1e-6).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora O": 1.0}, "no LoRA named 'lora O'.*nearest: lora 0"),
        ({"lora 0": {"vae": 1.0}}, "no component 'vae'; it has unet, text_encoder"),
        ({"lora 0": float("nan")}, "must be a finite number"),
        ({"lora 0": "abc"}, "must be a finite number"),
        (["lora 0"], r"are no weights by name; write them as in \{"),
    ],
)
def test_wrong_weights_change_nothing(weights, message):
    mixer = mixer_with(tiny_pipeline(), 1)
    mixer.set({"lora 0": 0.5})
    with pytest.raises(SdloraError, match=message):
        mixer.set(weights)
    assert mixer.weights == {"lora 0": {"unet": 0.5, "text_encoder": 0.5}}


def test_an_adapter_of_another_model_is_refused():
    other = random_adapter(components_of(tiny_pipeline("sdxl")), seed=0)
    mixer = Mixer(tiny_pipeline("sd1"))
    with pytest.raises(SdloraError):
        mixer.add(other, "other")
    assert mixer.names == ()


def test_a_retrained_file_of_the_same_name_is_seen(tmp_path: Path):
    pipeline = tiny_pipeline()
    file, mixer = tmp_path / "style.safetensors", Mixer(pipeline)
    for seed in (1, 2):
        adapter = random_adapter(components_of(pipeline), seed=seed, suffix="to_q")
        write(Adapter(adapter.deltas), file, "kohya")
        mixer.load(file)
        path, delta = next(iter(adapter.deltas.items()))
        assert torch.equal(mixer._books["style"].adapter.deltas[path].up, delta.up)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_outputs_equal_those_of_diffusers_with_peft(tmp_path: Path, kind: str, naming: str):
    ours, theirs = tiny_pipeline(kind), tiny_pipeline(kind)
    weights = {"one": 0.8, "two": -0.6}
    mixer = Mixer(ours)
    for seed, name in enumerate(weights):
        adapter = random_adapter(components_of(ours), seed, suffix="_proj" if seed else "")
        # diffusers 0.42 takes kohya's name of SDXL's added embedding apart wrongly.
        deltas = {path: delta for path, delta in adapter.deltas.items() if "add_embedding" not in path}
        write(Adapter(deltas), tmp_path / f"{name}.safetensors", naming)
        mixer.load(tmp_path / f"{name}.safetensors")
        theirs.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    mixer.set(weights)
    theirs.set_adapters(list(weights), list(weights.values()))
    from sdlora.models.families import family_of

    family, latents = family_of(ours), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    results = []
    with torch.inference_mode():
        for pipeline in (ours, theirs):
            told = family.encode(pipeline, ["a red cat", "b"])
            results.append(
                (
                    told["encoder_hidden_states"],
                    family.predict(pipeline.unet, latents, torch.tensor([5, 900]), told, None),
                )
            )
    for mine, other in zip(*results, strict=True):
        assert (mine - other).abs().max() <= 1e-5
