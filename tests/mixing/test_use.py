"""The mixer as its users meet it: plans by content, `using`, other mixers, callbacks, and what is refused."""

import copy
import gc
import io
import threading
from contextlib import closing
from typing import Any

import accelerate
import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.generation.job import Job
from sdlora.generation.render import render
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight, Plan
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline


def adapter(seed: int = 0) -> Adapter:
    return random_adapter(components_of(tiny_pipeline()), seed, suffix="to_q")


def mixer_with(*names: str) -> Mixer:
    """The same adapter under each of the names."""
    mixer = Mixer(tiny_pipeline())
    for name in names:
        mixer.add(adapter(), name)
    return mixer


def paint(mixer: Mixer, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return mixer.pipeline("a cat", num_inference_steps=4, generator=generator, output_type="pt", **options).images


def interrupted(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A callback that gives up in the middle."""
    if step == 2:
        raise KeyboardInterrupt
    return values


def test_one_adapter_under_two_names_is_applied_twice_and_never_lost():
    mixer, once = mixer_with("a", "b"), mixer_with("a")
    plan = mixer.plan({"a": 0.5, "b": 0.25})
    mixer.apply(plan)
    once.set({"a": 0.75})
    weights = [
        one.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight for one in (mixer, once)
    ]
    assert torch.allclose(*weights, atol=1e-6)
    mixer.unload("a")
    with pytest.raises(SdloraError, match="b is given twice"):
        mixer.apply(plan)


def test_a_plan_that_finds_an_adapter_by_content_goes_by_its_name():
    mixer = mixer_with("a")
    base, plan = state_of(tiny_pipeline()), mixer.plan({"a": 1.0})
    mixer.unload("a")
    mixer.add(adapter(), "b")
    mixer.apply(plan)
    assert mixer.weights == {"b": {"unet": 1.0, "text_encoder": 1.0}}
    mixer.add(adapter(1), "b")
    mixer.unload("b")
    assert same_state(mixer.pipeline, base)


def test_using_gives_back_what_the_names_hold_then():
    mixer, other = mixer_with("a", "b"), mixer_with("a")
    mixer.apply(mixer.plan({"a": 1.0}), live=True)
    with mixer.using(mixer.plan({"b": 0.5})):
        mixer.add(adapter(1), "a")
        mixer.unload("b")
    other.add(adapter(1), "a")
    other.apply(other.plan({"a": 1.0}), live=True)
    assert mixer.state == "live" and torch.equal(paint(mixer), paint(other))
    with mixer.using(mixer.plan({})):
        mixer.unload("a")
    assert mixer.state == "base"


def test_using_within_using_is_refused_and_not_waited_for():
    mixer = mixer_with("a")
    with mixer.using(mixer.plan({"a": 1.0})):
        with pytest.raises(SdloraError, match="using a plan of the mixer already"), mixer.using(mixer.plan({})):
            pass
        assert mixer.state == "merged"
    assert mixer.state == "base" and not mixer.lock.locked()


def test_threads_that_come_after_the_one_that_uses_a_plan_are_others():
    """The system gives them the number that it had."""
    mixer, refused = mixer_with("a"), []

    def change() -> None:
        try:
            mixer.set({})
        except SdloraError as error:
            refused.append(str(error))

    context = mixer.using(mixer.plan({"a": 1.0}))
    for work in (context.__enter__, change, change, change):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 3 and mixer.state == "merged"
    context.__exit__(None, None, None)
    assert mixer.state == "base" and not mixer.lock.locked()


def test_an_error_within_using_gives_back_what_was_before():
    mixer = mixer_with("a")
    with pytest.raises(ZeroDivisionError), mixer.using(mixer.plan({"a": 1.0})):
        raise ZeroDivisionError
    assert mixer.state == "base" and not mixer.lock.locked()


MOVING = {"a": {"unet": 8.0, "schedule": "0:0, 0.5:1, 0.5:0.2"}}


def predicted(unet: Any, timestep: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=chance), torch.randn(1, 3, 32, generator=chance)
    with torch.no_grad():
        return unet(latents, timestep, text).sample


def test_diffusers_own_call_follows_a_schedule():
    mixer, by_hand = mixer_with("a"), mixer_with("a")
    with mixer.using(mixer.plan(MOVING)):
        first = paint(mixer)
    mixer.set(MOVING)
    assert torch.equal(first, paint(mixer))
    with pytest.raises(KeyboardInterrupt):
        paint(mixer, callback_on_step_end=interrupted)
    assert torch.equal(first, paint(mixer)), "a picture that was given up leaves nothing to the next"
    mixer.set({})
    weights = iter([6.0, 1.6, 1.6, 1.6])
    by_hand.set({"a": {"unet": 2.0}})

    def turn(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        by_hand.set({"a": {"unet": next(weights)}})
        return values

    assert torch.allclose(first, paint(by_hand, callback_on_step_end=turn), atol=1e-4)
    assert not torch.allclose(first, paint(by_hand), atol=1e-3)


def test_schedules_follow_timesteps_again_after_jobs_and_loops_of_ones_own():
    mixer = mixer_with("a")
    mixer.set(MOVING)
    first = paint(mixer)
    job = Job(prompt="a cat", loras=mixer.plan(MOVING).loras, steps=3, width=32, height=32)
    list(render(mixer, job))
    assert torch.equal(first, paint(mixer))
    with closing(render(mixer, job)) as events:
        next(events)
    assert torch.equal(first, paint(mixer)), "after a job that was given up"
    mixer.at(0.9)
    assert not torch.equal(first, paint(mixer))
    mixer.at(None)
    assert torch.equal(first, paint(mixer))


def test_a_unet_that_is_copied_or_saved_while_a_schedule_moves_goes_its_own_way():
    mixer = mixer_with("a")
    mixer.set(MOVING)
    unet = mixer.pipeline.unet
    early, late = predicted(unet, 900), predicted(unet, 400)
    assert not torch.allclose(early, late)
    copied = copy.deepcopy(unet)
    assert torch.equal(predicted(copied, 900), early), "the copy follows"
    assert torch.equal(predicted(copied, 400), late)
    predicted(copied, 900)
    mixer._live._unfollow()
    assert torch.equal(predicted(unet, 400), late), "the copy leaves the weights of the original alone"
    mixer.at(None)
    predicted(unet, 400)
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(predicted(loaded, 400), late), "what is saved keeps the weights that were in force"


def test_a_unet_whose_pipeline_is_gone_keeps_the_weights_that_it_had():
    mixer = mixer_with("a")
    mixer.set(MOVING)
    unet = mixer.pipeline.unet
    late = predicted(unet, 400)
    del mixer
    gc.collect()
    assert torch.equal(predicted(unet, 400), late)


def test_a_pipeline_has_one_mixer_with_loras():
    mixer, base = mixer_with("a"), state_of(tiny_pipeline())
    pipeline = mixer.pipeline
    with pytest.raises(SdloraError, match="another mixer has LoRAs"):
        Mixer(pipeline)
    mixer.apply(mixer.plan({"a": {"unet": 1.0, "schedule": "0.5-"}}))
    mixer.add(Adapter({}, embeddings={"<s1>": {"text_encoder": torch.ones(1, 32)}}), "token")
    del mixer
    gc.collect()
    assert pipeline.tokenizer.tokenize("<s1>") == ["<s1>"], "what it did stays"
    assert Mixer(pipeline).state == "base" and same_state(pipeline, base), "until another one begins"
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


def test_what_others_have_put_into_a_pipeline_is_not_taken_for_the_base():
    from peft import LoraConfig

    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(SdloraError, match="unload_lora_weights"):
        Mixer(pipeline)
    pipeline = tiny_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(SdloraError, match="has no text_encoder"):
        Mixer(pipeline)


def test_offloading_a_base_that_holds_a_mix_is_found_out():
    mixer = mixer_with("a")
    mixer.set({"a": 1.0})
    accelerate.cpu_offload(mixer.pipeline.unet, execution_device=torch.device("cpu"))
    with pytest.raises(SdloraError, match="was offloaded with LoRAs merged into it"):
        mixer.set({})
    assert mixer.state != "base"


def test_an_offloaded_text_encoder_cannot_learn_tokens():
    pipeline = tiny_pipeline()
    accelerate.cpu_offload(pipeline.text_encoder, execution_device=torch.device("cpu"))
    with pytest.raises(SdloraError, match="text_encoder is offloaded and cannot learn tokens"):
        Mixer(pipeline).add(Adapter({}, embeddings={"<s1>": {"text_encoder": torch.ones(1, 32)}}), "a")


def test_a_mix_set_within_inference_mode_can_be_changed_outside():
    mixer = mixer_with("a")
    path = next(path for path in adapter().deltas if mixer.pipeline.unet.get_submodule(path[5:]).bias is None)
    from sdlora.lowrank.laws import Full

    width = mixer.pipeline.unet.get_submodule(path[5:]).weight.shape[0]
    mixer.add(Adapter({f"{path}.bias": Full(torch.ones(width))}), "bias")
    with torch.inference_mode():
        mixer.set({"bias": 1.0, "a": 0.5})
    mixer.set({"bias": 0.5, "a": -0.5})
    mixer.set({})
    assert same_state(mixer.pipeline, state_of(tiny_pipeline()))


@pytest.mark.parametrize(
    "weights",
    [
        {"blocks": 5},
        {"blocks": ["IN04"]},
        {"blocks": {"IN4": 1}},
        {"blocks": None},
        {"schedule": 5},
        {"schedule": None},
        {"schedule": "soon"},
        {"on": "false"},
        {"unet": "much"},
        None,
        "1.0",
        True,
    ],
)
def test_weights_of_nonsense_are_one_line_and_change_nothing(weights: Any):
    mixer = mixer_with("a")
    with pytest.raises(SdloraError):
        mixer.set({"a": weights})
    assert mixer.state == "base"


def test_what_is_no_plan_is_refused():
    mixer = mixer_with("a")
    for wrong in ("a", {"a": 1.0}, None):
        with pytest.raises(SdloraError, match=r"is no plan; make one with mixer\.plan"):
            mixer.apply(wrong)  # type: ignore[arg-type]
    with pytest.raises(SdloraError, match="no LoRA with its weights"):
        Plan("", ("a",))  # type: ignore[arg-type]
    mine = Mixer(tiny_pipeline(), "a name of my own")
    with pytest.raises(SdloraError, match="the plan is for the model toybox, this one is a name of my own"):
        mine.apply(Plan("toybox"))


def test_a_weight_takes_text_and_tables_and_is_equal_to_what_means_the_same():
    told = LoraWeight(path="a", blocks="M00:0.5, IN04:0", schedule="0.5-")  # type: ignore[arg-type]
    table = LoraWeight(path="a", blocks={"IN04": 0, "OUT01": 1.0, "M00": 0.5}, schedule=told.schedule)  # type: ignore[arg-type]
    assert told == table and hash(told) == hash(table)
