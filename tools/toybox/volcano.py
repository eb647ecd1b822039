"""A third thing that toybox has never seen, a place: the volcano. Its dataset, and a judge who knows it.

    python -m tools.toybox.volcano --output outputs/volcano     # dataset/, judge.safetensors, how good that judge is

It stands beside the two sample LoRAs: a blueprint (style) of a zib (character) by a volcano (place). The judge is
tools/toybox/judge.safetensors, taught a sixth place on renders alone.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.toybox import judge, places
from tools.toybox.judge import Judge, blemished, labels_of, right, to_tensor
from tools.toybox.samples import write
from tools.toybox.world import PLACES, SUBJECTS, Pen, Scene, caption, draw, random_scene

PLACE = "volcano"
LABELS = judge.LABELS | {"place": (*PLACES, PLACE)}
QUESTION = list(LABELS).index("place")


def volcano(pen: Pen, rng: random.Random) -> None:
    """A dark cone that smokes, lava down its sides, on ashes under a dull red sky."""
    places.sky(pen, (206, 112, 92))
    x, foot = rng.uniform(-0.45, 0.45), rng.uniform(0.05, 0.25)
    for i in range(3):
        drift = 0.16 * i * rng.choice((-1, 1))
        pen.ellipse(x + drift, -0.72 - 0.1 * i, 0.2 + 0.07 * i, 0.12 + 0.03 * i, (122, 104, 112))
    pen.polygon([(x - 0.95, foot + 0.1), (x - 0.2, -0.62), (x + 0.2, -0.62), (x + 0.95, foot + 0.1)], (84, 62, 66))
    pen.ellipse(x, -0.62, 0.2, 0.06, (255, 150, 40))
    for side in (-1, 0, 1):
        bend = x + 0.22 * side + rng.uniform(-0.05, 0.05)
        end = (x + 0.5 * side + rng.uniform(-0.08, 0.08), foot)
        pen.line([(x + 0.1 * side, -0.6), (bend, -0.3), end], (255, 118, 30), 0.06)
    places.ground(pen, (112, 88, 84), foot, [rng.uniform(-0.05, 0.05) for _ in range(5)])
    for _ in range(4):
        left, y = rng.uniform(-0.95, 0.75), rng.uniform(foot + 0.15, 0.95)
        pen.line([(left, y), (left + 0.1, y + 0.05), (left + 0.22, y - 0.02)], (255, 150, 50), 0.025)


# From here on it can be drawn and described; the base's PLACES stay five.
places.DRAW[PLACE] = volcano
places.WORDS[PLACE] = ("by a volcano", "by the volcano", "at a volcano")


def dataset(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """Every subject in turn, flat and in any colour, by a volcano."""
    rng = random.Random(seed)
    for i in range(count):
        scene = random_scene(rng, subject=SUBJECTS[i % 10], place=PLACE)
        yield scene, caption(scene, rng)


def load(weights: Path) -> Judge:
    """The judge who knows six places, from `teach`'s file."""
    pupil = _six_places()
    pupil.load_state_dict(load_file(weights))
    return pupil.eval()


def teach(weights: Path, steps: int = 400, seed: int = 0) -> dict[str, float]:
    """Teach the judge the sixth place, write it to `weights`, and return its share of right answers on unseen renders.

    Half of all renders have it, so "volcano" is the share of right answers to whether a picture has one.
    """
    torch.manual_seed(seed)
    pupil, known = _six_places(), judge.load().state_dict()
    pupil.load_state_dict({k: v for k, v in known.items() if not k.startswith("heads.place.")}, strict=False)
    optimizer = torch.optim.AdamW(pupil.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        pictures, labels = _batch(f"volcano {seed} {step}", 64, blemish=True)
        loss = torch.stack([F.cross_entropy(v, labels[:, i]) for i, v in enumerate(pupil(pictures).values())]).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_file({k: v.contiguous() for k, v in pupil.state_dict().items()}, weights)
    with torch.inference_mode():
        pictures, labels = _batch(f"unseen volcano {seed}", 2000, blemish=False)
        answers = pupil.eval()(pictures)
    alike = (answers["place"].argmax(1) == len(PLACES)) == (labels[:, QUESTION] == len(PLACES))
    return right(answers, labels) | {PLACE: round(alike.float().mean().item(), 4)}


def _six_places() -> Judge:
    pupil = Judge()
    features = pupil.state_dict()["heads.place.weight"].shape[1]
    pupil.heads["place"] = nn.Linear(features, len(PLACES) + 1)
    return pupil


def _batch(seed: str, size: int, blemish: bool) -> tuple[Tensor, Tensor]:
    """Rendered scenes and labels (size, 4), every other one by a volcano."""
    rng = random.Random(seed)
    scenes = [judge.any_scene(rng) for _ in range(size)]
    labels = torch.tensor([labels_of(scene) for scene in scenes])
    labels[::2, QUESTION] = len(PLACES)
    scenes[::2] = [replace(scene, place=PLACE) for scene in scenes[::2]]
    pictures = to_tensor([draw(scene) for scene in scenes])
    return blemished(pictures, rng) if blemish else pictures, labels


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("outputs/volcano"))
    arguments.add_argument("--steps", type=int, default=400, help="of the judge's lessons")
    options = arguments.parse_args()
    write(options.output / "dataset" / PLACE, dataset(20, seed=5))
    print("right on unseen renders:", teach(options.output / "judge.safetensors", options.steps))


if __name__ == "__main__":
    main()
