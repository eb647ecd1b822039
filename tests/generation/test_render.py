from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import SdloraError
from sdlora.formats.write import write
from sdlora.generation import png
from sdlora.generation.job import SCHEDULERS, Job, LoraWeight, parse_lora, parse_size
from sdlora.generation.render import Picture, Progress, denoise, hold, render
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

JOB = Job(prompt="a red cat", negative_prompt="blue", model="tiny", seed=7, steps=4, width=64, height=48)


def pictures(mixer: Mixer, job: Job) -> list[Picture]:
    return [event for event in render(mixer, job) if isinstance(event, Picture)]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("scheduler", ["default", "dpmpp_2m", "euler_a"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_equal_those_of_diffusers_own_pipeline(kind: str, scheduler: str, prediction_type: str):
    pipeline = tiny_pipeline(kind, prediction_type=prediction_type)
    job = replace(JOB, scheduler=scheduler, negative_prompt="")
    *_, latents = denoise(Mixer(pipeline), [job])
    if scheduler != "default":
        import diffusers

        pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler][0]).from_config(pipeline.scheduler.config)
    theirs = pipeline(
        job.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="latent",
    ).images
    assert (latents - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_renders(scheduler: str):
    (picture,) = pictures(Mixer(tiny_pipeline()), replace(JOB, scheduler=scheduler))
    assert picture.image.size == (64, 48)


def test_a_picture_does_not_depend_on_the_count():
    mixer = Mixer(tiny_pipeline())
    three = pictures(mixer, replace(JOB, count=3))
    (alone,) = pictures(mixer, replace(JOB, seed=JOB.seed + 2))
    assert [picture.job.seed for picture in three] == [7, 8, 9]
    assert np.array_equal(np.asarray(three[2].image), np.asarray(alone.image))
    assert three[2].job == alone.job


def test_progress_counts_steps_and_closing_frees_the_pipeline():
    mixer = Mixer(tiny_pipeline())
    events = render(mixer, JOB)
    assert next(events) == Progress(0, 1, 4)
    assert mixer.lock.locked()
    events.close()  # type: ignore[attr-defined]
    assert not mixer.lock.locked()


def test_progress_counts_the_steps_that_the_scheduler_takes():
    events = [e for e in render(Mixer(tiny_pipeline()), replace(JOB, scheduler="heun")) if isinstance(e, Progress)]
    assert [event.step for event in events] == list(range(1, 8)) and {event.steps for event in events} == {7}


def test_there_is_room_for_as_many_pictures_as_their_own_size_allows(monkeypatch):
    monkeypatch.setattr("sdlora.generation.render.AT_ONCE", 4 * 64 * 48)
    jobs = [replace(JOB, width=32, height=24), *(replace(JOB, seed=seed, steps=1) for seed in range(6))]
    seen = {e.picture: e.together for e in render(Mixer(tiny_pipeline()), *jobs) if isinstance(e, Progress)}
    assert seen == {0: 1, 1: 4, 5: 2}


def test_no_guidance_needs_no_second_pass(monkeypatch):
    pipeline, sizes = tiny_pipeline(), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pictures(Mixer(pipeline), replace(JOB, guidance_scale=1.0))
    assert set(sizes) == {1}


def test_a_prompt_past_the_window_counts_to_its_end():
    mixer, long = Mixer(tiny_pipeline()), "x" * 75
    one, other = (pictures(mixer, replace(JOB, prompt=f"{long} {end}"))[0] for end in ("cat", "dog"))
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_a_picture_carries_its_job(tmp_path):
    (picture,) = pictures(Mixer(tiny_pipeline()), JOB)
    path = png.save(picture, tmp_path)
    assert png.read_job(path) == picture.job
    assert png.save(picture, tmp_path) != path
    text = png.parameters(picture.job)
    assert text.startswith(
        "a red cat\nNegative prompt: blue\nSteps: 4, Sampler: Automatic, CFG scale: 5, Seed: 7, Size: 64x48"
    )


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    (picture,) = pictures(Mixer(tiny_pipeline()), JOB)

    def full(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(SdloraError, match="No space left"):
        png.save(picture, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refused_lora_leaves_the_mix_as_it_was(tmp_path):
    mixer = Mixer(tiny_pipeline())
    write(random_adapter(components_of(mixer.pipeline), 0, suffix="to_q"), tmp_path / "mine.safetensors")
    write(random_adapter(components_of(tiny_pipeline("sdxl")), 0), tmp_path / "other.safetensors")
    mine, other = (LoraWeight(path=str(tmp_path / f"{name}.safetensors")) for name in ("mine", "other"))
    hold(mixer, [replace(JOB, loras=(mine,))])
    before = mixer.names, mixer.weights
    assert before[1]
    with pytest.raises(SdloraError, match="other.safetensors"):
        hold(mixer, [replace(JOB, loras=(other,))])
    assert (mixer.names, mixer.weights) == before


def test_a_picture_is_not_made_again_with_a_file_that_has_changed(tmp_path):
    mixer = Mixer(tiny_pipeline())
    write(random_adapter(components_of(mixer.pipeline), 0, suffix="to_q"), tmp_path / "a.safetensors")
    (picture,) = pictures(mixer, replace(JOB, loras=(LoraWeight(path=str(tmp_path / "a.safetensors")),)))
    assert pictures(mixer, picture.job)[0].image.tobytes() == picture.image.tobytes()
    write(random_adapter(components_of(mixer.pipeline), 1, suffix="to_q"), tmp_path / "a.safetensors")
    with pytest.raises(SdloraError, match=r"a\.safetensors has changed \(sha256"):
        pictures(mixer, picture.job)


def test_a_lora_that_is_loaded_by_name_is_a_jobs_too():
    mixer = Mixer(tiny_pipeline())
    mixer.add(random_adapter(components_of(mixer.pipeline), 0), "style")
    (picture,) = pictures(mixer, replace(JOB, loras=(LoraWeight(path="style"),)))
    assert picture.job.loras[0].sha256 and mixer.names == ("style",)


def test_tags_that_nobody_has_looked_up_are_not_read_as_words():
    for job in (replace(JOB, prompt="a <lora:nobody:0.8>"), replace(JOB, negative_prompt="<lora:nobody>")):
        with pytest.raises(SdloraError, match="name LoRAs; call resolved"):
            pictures(Mixer(tiny_pipeline()), job)


def test_a_job_within_a_plan_in_use_is_refused_and_not_waited_for():
    mixer = Mixer(tiny_pipeline())
    with mixer.using(mixer.plan({})), pytest.raises(SdloraError, match="using a plan"):
        pictures(mixer, JOB)


def test_an_offloaded_pipeline_renders_what_it_renders_at_home():
    plain, away = tiny_pipeline("sdxl"), tiny_pipeline("sdxl")
    for part in (away.unet, away.text_encoder, away.text_encoder_2, away.vae):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    images = [np.asarray(pictures(Mixer(pipeline), JOB)[0].image) for pipeline in (plain, away)]
    assert np.array_equal(*images)


def test_a_pipeline_that_changes_its_dtype_is_asked_anew():
    mixer = Mixer(tiny_pipeline())
    pictures(mixer, JOB)
    mixer.pipeline.to(torch.bfloat16)
    assert pictures(mixer, JOB)[0].image.size == (64, 48)


def test_a_picture_has_the_same_bits_after_a_short_job_that_was_made_live(tmp_path):
    pipelines = tiny_pipeline(), tiny_pipeline()
    write(random_adapter(components_of(pipelines[0]), 0), tmp_path / "a.safetensors")
    job = replace(JOB, loras=(LoraWeight(path=str(tmp_path / "a.safetensors"), unet=0.5, text_encoder=0.5),))
    mixers = [Mixer(pipeline) for pipeline in pipelines]
    pictures(mixers[0], replace(job, steps=1))
    first, second = (list(denoise(mixer, hold(mixer, [job])))[-1] for mixer in mixers)
    assert torch.equal(first, second)


def test_a_vae_in_float8_stays_so():
    pipeline = tiny_pipeline()
    pipeline.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    count = sum(weight.dtype == torch.float8_e4m3fn for weight in pipeline.vae.parameters())
    assert pictures(Mixer(pipeline), JOB)[0].image.size == (64, 48)
    assert count == sum(weight.dtype == torch.float8_e4m3fn for weight in pipeline.vae.parameters()) > 0


@pytest.mark.parametrize(
    "told",
    ['{"job": {"loras": ["a"]}}', '{"job": ' + "[" * 100_000, '{"job": {"loras": [{"path": 5}], "prompt": "a"}}', "[]"],
)
def test_a_picture_with_settings_of_nonsense_is_one_line(tmp_path, told: str):
    text = PngInfo()
    text.add_text("sdlora", told)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(SdloraError):
        png.read_job(tmp_path / "a.png")


def test_a_picture_of_nans_is_an_error_not_a_black_square():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(SdloraError, match="has become nan"):
        pictures(Mixer(pipeline), JOB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "multiple of 8, such as"),
        ({"seed": 10**400}, "between 0"),
        ({"guidance_scale": 10**400}, "between 0"),
        ({"prompt": "caf\udce9"}, "the prompt holds bytes that are no text"),
        ({"steps": 0}, "between 1 and"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"scheduler": "eular"}, "nearest: euler"),
        ({"seed": -1}, "between 0"),
        ({"count": 1.5}, "whole number"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(SdloraError, match=message):
        replace(JOB, **settings)


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", LoraWeight(path="a.safetensors")),
        ("a.safetensors:0.8", LoraWeight(path="a.safetensors", unet=0.8, text_encoder=0.8)),
        ("C:/x:y.safetensors:-1:0.5", LoraWeight(path="C:/x:y.safetensors", unet=-1, text_encoder=0.5)),
        ("a.safetensors:0.8:te=0.4", LoraWeight(path="a.safetensors", unet=0.8, text_encoder=0.4)),
        ("a.safetensors:unet=0.8", LoraWeight(path="a.safetensors", unet=0.8)),
        ("a.safetensors:lbw=IN04@0.5", LoraWeight(path="a.safetensors", blocks="IN04:0.5")),
        ("a.safetensors:blocks=IN04:0.5,OUT:0:te=1", LoraWeight(path="a.safetensors", blocks="IN04:0.5,OUT:0")),
        ("a.safetensors:schedule=0@0,1@1", LoraWeight(path="a.safetensors", schedule="0:0, 1:1")),
    ],
)
def test_loras_on_the_command_line(text, lora):
    assert parse_lora(text) == lora


def test_a_folder_on_the_command_line_may_have_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:y").mkdir()
    assert parse_lora("x:y") == LoraWeight(path="x:y")
    assert parse_lora("x:y:0.5:0:te2=1") == LoraWeight(path="x:y", unet=0.5, text_encoder=0, text_encoder_2=1)


@pytest.mark.parametrize("text", ["a.safetensors:abc", "a.safetensors:1:2:3", "a.safetensors:nan", "a.safetensorsx"])
def test_weights_that_are_none(text):
    with pytest.raises(SdloraError):
        parse_lora(text)


@pytest.mark.parametrize("said", ["0.5:unet=1", "0.5:1:te=1", "te=1:te=1", "blocks=INS:lbw=INS", "te2=0:te2=1"])
def test_what_is_said_twice_of_a_lora_is_refused(said):
    with pytest.raises(SdloraError, match=f"{said.rpartition(':')[2].partition('=')[0]}= is given already"):
        parse_lora(f"a.safetensors:{said}")


def test_sizes():
    assert parse_size("512") == (512, 512) and parse_size("512x768") == (512, 768)
    for text in ("big", "9" * 5000):
        with pytest.raises(SdloraError, match="write 512"):
            parse_size(text)
