"""The same plan gives the same bits, whatever came before: a thousand plans over all laws, merged and live."""

import random
from functools import cache
from hashlib import sha256
from typing import Any

import torch

from sdlora.formats.block_weights import BLOCKS
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight, Plan
from sdlora.mixing.schedule import ALWAYS, Schedule
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
from tests.mixing.test_parameters import adapter_of_everything
from tests.tiny import tiny_pipeline

COUNT = 6


@cache
def adapters() -> dict[str, Adapter]:
    """Half of them plain LoRA everywhere, half all laws mixed with biases and norms."""
    pipeline = tiny_pipeline()
    plain = [random_adapter(components_of(pipeline), seed=i, suffix=("to_q", "proj_in", "q_proj")[i]) for i in range(3)]
    mixed = [Adapter(adapter_of_everything(pipeline, i).deltas) for i in range(3, COUNT)]
    return {f"lora {i}": adapter for i, adapter in enumerate((*plain, *mixed))}


def mixer_with_all() -> Mixer:
    mixer = Mixer(tiny_pipeline())
    for name, adapter in adapters().items():
        mixer.add(adapter, name)
    return mixer


def plan_of(rng: random.Random, mixer: Mixer) -> Plan:
    """Of up to four adapters, with everything that a plan can say."""
    loras = []
    for name in rng.sample(sorted(adapters()), rng.randrange(5)):
        blocks = tuple((block, rng.choice([0.0, 0.5, -1.0])) for block in rng.sample(BLOCKS, rng.choice([0, 0, 3])))
        moves = Schedule(((0.0, rng.random()), (0.5, 1.0), (0.5, 0.0)))
        loras.append(
            LoraWeight(
                path=name,
                unet=rng.choice([0.0, 1.0, rng.uniform(-1, 1)]),
                text_encoder=rng.choice([0.0, rng.uniform(-1, 1)]),
                blocks=blocks,
                on=rng.random() < 0.9,
                schedule=rng.choice([ALWAYS, ALWAYS, moves, Schedule(((0, 0.5),))]),
                sha256=mixer.plan({name: 1.0}).loras[0].sha256,
            )
        )
    return Plan("", tuple(loras))


@torch.inference_mode()
def fingerprint(mixer: Mixer) -> str:
    """Of all parameters and, where layers beside them count, of what they do early and late in the denoising."""
    digest, pipeline = sha256(), mixer.pipeline
    for part in components_of(pipeline).values():
        for key, value in part.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
    seen: list[Any] = []
    if "live" in mixer.state:
        seen.append(pipeline.text_encoder(torch.arange(8)[None])[0])
        for progress in (0.2, 0.9):
            mixer.at(progress)
            noise = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
            seen.append(pipeline.unet(noise, torch.tensor(500), seen[0], return_dict=False)[0])
    for one in seen:
        digest.update(one.numpy().tobytes())
    return digest.hexdigest()


def test_a_thousand_plans_give_the_bits_that_each_gives_alone():
    rng, mixer = random.Random(0), mixer_with_all()
    base, clean = fingerprint(mixer), state_of(mixer.pipeline)
    cases = [(plan_of(rng, mixer), rng.random() < 0.2) for _ in range(120)]
    found: dict[int, str] = {}
    for change in range(1000):
        index = rng.randrange(len(cases))
        plan, live = cases[index]
        mixer.apply(plan, live=live)
        if index in found or change % 3 == 0:
            bits = fingerprint(mixer)
            assert found.setdefault(index, bits) == bits
        if change % 50 == 0:
            mixer.apply()
            assert mixer.state == "base" and fingerprint(mixer) == base
    assert len(set(found.values())) > 80, "the plans differ"
    for index in list(found)[:15]:
        alone = mixer_with_all()
        alone.apply(Plan("", tuple(reversed(cases[index][0].loras))), live=cases[index][1])
        assert fingerprint(alone) == found[index], "neither what came before nor the order in the plan counts"
    mixer.apply()
    assert same_state(mixer.pipeline, clean)


def test_a_weight_of_zero_is_the_base_to_the_bit_however_it_is_said():
    mixer = mixer_with_all()
    base = fingerprint(mixer)
    for weights in (
        {"lora 0": 0.0, "lora 4": 0.0},
        {"lora 3": {"unet": 0.7, "on": False}},
        {"lora 0": {"unet": 1.0, "blocks": "ALL:0"}},
        {"lora 5": {"unet": 1.0, "schedule": "0:0"}},
    ):
        mixer.set(weights)
        assert fingerprint(mixer) == base and mixer.state == "base"


def test_merged_and_live_are_one_result():
    rng, mixer = random.Random(1), mixer_with_all()
    text, noise = torch.randn(1, 77, 32), torch.randn(2, 4, 8, 8)
    compared = 0
    while compared < 25:
        plan = plan_of(rng, mixer)
        if any(lora.schedule.level is None for lora in plan.loras) or not plan.loras:
            continue
        outputs = []
        for live in (False, True):
            mixer.apply(plan, live=live)
            assert live or "live" not in mixer.state
            with torch.inference_mode():
                hidden = mixer.pipeline.text_encoder(torch.arange(8)[None])[0]
                outputs.append((mixer.pipeline.unet(noise, torch.tensor(9), text.repeat(2, 1, 1)).sample, hidden))
        for merged, beside in zip(*outputs, strict=True):
            assert (merged - beside).abs().max() <= 1e-5 * max(1.0, float(merged.abs().max()))
        compared += 1


def test_a_plan_means_its_content_whatever_it_is_called():
    mixer = mixer_with_all()
    plan = mixer.plan({"lora 1": 0.8})
    mixer.apply(plan)
    wanted = fingerprint(mixer)
    mixer.unload("lora 1")
    mixer.add(adapters()["lora 1"], "another name")
    mixer.apply(plan)
    assert fingerprint(mixer) == wanted


def test_using_a_plan_gives_back_what_was_before():
    mixer = mixer_with_all()
    mixer.set({"lora 0": 0.5, "lora 3": {"unet": 1.0, "schedule": "0.5-"}})
    before = fingerprint(mixer)
    with mixer.using(mixer.plan({"lora 2": 1.0})) as same:
        assert same is mixer and mixer.lock.locked() and fingerprint(mixer) != before
    assert fingerprint(mixer) == before and not mixer.lock.locked()
