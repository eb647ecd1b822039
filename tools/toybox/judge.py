"""Toybox's judge: a small classifier trained on rendered scenes only, applied to generated pictures.

python -m tools.toybox.judge train          trains it, writes judge.safetensors beside this file
python -m tools.toybox.judge base           the base model's figures and its sheet
python -m tools.toybox.judge demo STYLE CHARACTER    what the demo's two LoRAs learned
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.toybox import subjects
from tools.toybox.samples import without_colour
from tools.toybox.world import COLOURS, HELD_OUT, PLACES, STYLES, Scene, contact_sheet, draw, random_scene
from tools.toybox.world import caption as describe

WEIGHTS = Path(__file__).with_name("judge.safetensors")
LABELS: dict[str, tuple[str, ...]] = {
    "subject": tuple(subjects.DRAW),
    "colour": tuple(COLOURS),
    "place": PLACES,
    "style": tuple(STYLES),
}
NO_LABEL = -100  # what cross entropy ignores: the colour of a line drawing


class Judge(nn.Module):
    """Pictures (n, 3, 128, 128) in -1..1 to logits by question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in zip(widths, widths[1:], strict=False)
            )
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], len(choices)) for name, choices in LABELS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.body(pictures)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Verdict:
    subject: str
    colour: str
    place: str
    style: str


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def any_scene(rng: random.Random) -> Scene:
    """Any subject in any style, the sample character and the sample style included."""
    subject, style = rng.choice(LABELS["subject"]), rng.choice(LABELS["style"])
    if rng.random() < 0.4:
        style = "flat"
    return random_scene(
        rng, subject=subject, style=style, colour=rng.choice(LABELS["colour"]), size=rng.uniform(0.38, 0.72)
    )


def labels_of(scene: Scene) -> list[int]:
    found = [choices.index(getattr(scene, name)) for name, choices in LABELS.items()]
    if scene.subject == "zib" or not STYLES[scene.style].keep_subject_colour:
        found[1] = NO_LABEL
    return found


def batch(seed: str, size: int, blemish: bool) -> tuple[Tensor, Tensor]:
    """Rendered scenes and labels (size, 4); `blemish`: as a decoder might show them."""
    rng = random.Random(seed)
    scenes = [any_scene(rng) for _ in range(size)]
    pictures = to_tensor([draw(scene) for scene in scenes])
    if blemish:
        pictures = blemished(pictures, rng)
    return pictures, torch.tensor([labels_of(scene) for scene in scenes])


def blemished(pictures: Tensor, rng: random.Random) -> Tensor:
    """Pictures (n, 3, 128, 128) blurred, off in their colours and speckled, each by a share of its own."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    pictures = pictures.lerp(blurred, share)
    pictures = pictures * (1 + 0.2 * (torch.rand(len(pictures), 3, 1, 1, generator=generator) - 0.5))
    return pictures + 0.08 * share * torch.randn(pictures.shape, generator=generator)


def right(logits: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Share of right answers by question, over the pictures that have one."""
    found = {}
    for i, (name, values) in enumerate(logits.items()):
        known = labels[:, i] != NO_LABEL
        found[name] = round((values.argmax(1) == labels[:, i])[known].float().mean().item(), 4)
    return found


def train(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        pictures, labels = batch(f"train {seed} {step}", 64, blemish=True)
        loss = sum(F.cross_entropy(values, labels[:, i]) for i, values in enumerate(judge(pictures).values()))
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"judge {step + 1}/{steps} loss {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
    judge.eval()
    with torch.inference_mode():
        pictures, labels = batch(f"unseen {seed}", 2000, blemish=False)
        print("right on unseen renders:", right(judge(pictures), labels))
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, WEIGHTS)


def load() -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval()


@torch.inference_mode()
def verdicts(judge: Judge, pictures: list[Image.Image], labels: dict[str, tuple[str, ...]] = LABELS) -> list[Verdict]:
    answers = {name: logits.argmax(1).tolist() for name, logits in judge(to_tensor(pictures)).items()}
    return [
        Verdict(*(labels[name][row] for name, row in zip(labels, rows, strict=True)))
        for rows in zip(*answers.values(), strict=True)
    ]


def generate(pipeline: Any, prompts: list[str], first_seed: int, guidance_scale: float = 7.5) -> list[Image.Image]:
    """One picture a prompt in 20 steps, seeds counted up from `first_seed`, by diffusers' own pipeline."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 20):
        some = prompts[start : start + 20]
        seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(some))]
        pictures += pipeline(some, num_inference_steps=20, guidance_scale=guidance_scale, generator=seeds).images
    return pictures


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def judge_base(folder: Path, pairs: int, sheet: Path) -> None:
    """The figures of the README beside this file: 200 prompts, and as many on pairs never seen in training."""
    from diffusers import StableDiffusionPipeline

    from tools.toybox import vae

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge, rng = load(), random.Random(2024)
    scenes = [random_scene(rng) for _ in range(pairs)]
    pictures = generate(pipeline, [describe(scene, rng) for scene in scenes], 1000)
    found = verdicts(judge, pictures)
    for name in ("subject", "colour", "place", "style"):
        right = [getattr(v, name) == getattr(s, name) for v, s in zip(found, scenes, strict=True)]
        print(f"{name} right: {share(right):.1%}")
    unseen = [random_scene(rng, subject=s, colour=c) for s, c in sorted(HELD_OUT) for _ in range(max(1, pairs // 10))]
    found = verdicts(judge, generate(pipeline, [describe(scene, rng) for scene in unseen], 5000))
    both = [v.subject == s.subject and v.colour == s.colour for v, s in zip(found, unseen, strict=True)]
    print(f"subject and colour right on pairs never seen: {share(both):.1%}")
    for style in STYLES:
        print(f"VAE, {style}: {vae.psnr(pipeline.vae, vae.style_pictures(style, 64)):.1f} dB")
    began = time.monotonic()
    generate(pipeline, ["a red cat in a meadow"], 0)
    print(f"one picture, 20 steps with guidance: {time.monotonic() - began:.2f} s on {torch.get_num_threads()} threads")
    contact_sheet(pictures[:48], 12).save(sheet)


def judge_demo(style: Path, character: Path, model: str, count: int) -> None:
    """What the demo's two LoRAs learned, on prompts that are in neither dataset."""
    from sdlora.demo import BLEND, GUIDANCE_SCALE
    from sdlora.mixing.mixer import Mixer
    from sdlora.models.load import load_pipeline

    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    mixer, judge = Mixer(pipeline), load()
    mixer.load(style, name="style")
    mixer.load(character, name="character")
    known = {file.read_text().strip() for file in Path("datasets").glob("[!h]*/*.txt")}

    def answers(weights: dict[str, float], seed: int, **fixed: object) -> tuple[list[Scene], list[Verdict]]:
        rng, scenes, prompts = random.Random(seed), [], []
        while len(scenes) < count:
            scene = random_scene(rng, **fixed)
            prompt = without_colour(describe(scene, rng), scene) if scene.subject == "zib" else describe(scene, rng)
            if prompt not in known:
                scenes.append(scene)
                prompts.append(prompt)
        mixer.set(weights)
        return scenes, verdicts(judge, generate(pipeline, prompts, seed, GUIDANCE_SCALE))

    scenes, found = answers({"style": 1.0}, 100, style="blueprint")
    print(f"style LoRA at 1.0: in the style {share([v.style == 'blueprint' for v in found]):.1%} (wanted 90%)")
    kept = [v.subject == s.subject for v, s in zip(found, scenes, strict=True)]
    print(f"style LoRA at 1.0: right subject kept {share(kept):.1%} (wanted 80%)")
    _, found = answers({"character": 1.0}, 200, subject="zib", colour="red")
    print(f"character LoRA at 1.0, named: recognised {share([v.subject == 'zib' for v in found]):.1%} (wanted 85%)")
    _, found = answers({"character": 1.0}, 300)
    print(f"character LoRA at 1.0, not named: seen {share([v.subject == 'zib' for v in found]):.1%} (at most 5%)")
    _, found = answers({"style": BLEND[0], "character": BLEND[1]}, 400, subject="zib", colour="red", style="blueprint")
    both = [v.subject == "zib" and v.style == "blueprint" for v in found]
    print(f"blended at {BLEND[0]} and {BLEND[1]}: both {share(both):.1%} (wanted 70%)")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = arguments.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("--steps", type=int, default=2500)
    training.add_argument("--seed", type=int, default=0)
    base = verbs.add_parser("base")
    base.add_argument("--model", type=Path, default=Path("sdlora/toybox/model"))
    base.add_argument("--pairs", type=int, default=200)
    base.add_argument("--sheet", type=Path, default=Path("tools/toybox/sheet.png"))
    demo = verbs.add_parser("demo")
    demo.add_argument("style", type=Path)
    demo.add_argument("character", type=Path)
    demo.add_argument("--model", default="toybox")
    demo.add_argument("--count", type=int, default=40)
    options = arguments.parse_args()
    if options.verb == "train":
        train(options.steps, options.seed)
    elif options.verb == "demo":
        judge_demo(options.style, options.character, options.model, options.count)
    else:
        judge_base(options.model, options.pairs, options.sheet)


if __name__ == "__main__":
    main()
