"""How often all that several LoRAs bring is in one picture, by the way in which they come together.

    python -m benchmarks.compositions                            # trains the three LoRAs and the judge first
    python -m benchmarks.compositions STYLE CHARACTER FRAME      # LoRA files that are there already

A style (blueprint), a character (zib) and an extra (frame) on toybox, in the base's five places: all three in one
picture, and each pair. Every way has the same prompts and seeds, 20 steps and guidance 3. A classifier looks at the
pictures, which has learned from renders only: tools/toybox/frame.py. Sheets of some of the pictures of every way go
to --output; look at them before you believe the figures.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from sdlora.demo import CHARACTER, GUIDANCE_SCALE, STYLE, Lesson, train
from sdlora.generation.job import Job, LoraWeight
from sdlora.generation.open import open_mixer
from sdlora.generation.render import Picture, render
from sdlora.mixing.mixer import Mixer
from sdlora.workbench.conflicts import conflicts
from tools.toybox import frame
from tools.toybox.judge import Judge, Verdict, verdicts
from tools.toybox.places import WORDS
from tools.toybox.world import PLACES, STYLES, SUBJECTS, contact_sheet

THIRD = Lesson(frame.FRAMED, 1200, 1.3e-3, 1.5e-3)
TRIGGERS = (STYLE.trigger, CHARACTER.trigger, THIRD.trigger)
ON_SHEET = 12  # pictures
Z = 1.96  # standard deviations either way: 95 % of a normal distribution


@dataclass(frozen=True)
class Way:
    """How LoRAs come together; weights: of style, character and frame, in the text encoders at most 1.

    A LoRA that works in one step of three, or in one prediction of three, does a third of the work; hence those at 1.5.
    """

    name: str
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    compose: str = "sum"
    switch_every: int = 1


def ways(loras: Sequence[Path]) -> tuple[Way, ...]:
    equalised = conflicts(loras).equalised
    assert equalised
    return (
        Way("sum at 1.0"),
        Way("sum at 0.8", (0.8, 0.8, 0.8)),
        Way("sum at 0.6", (0.6, 0.6, 0.6)),
        Way(f"sum, equalised ({', '.join(f'{weight:.2f}' for weight in equalised)})", equalised),
        Way("switch, every step", compose="switch"),
        Way("switch, every 2 steps", compose="switch", switch_every=2),
        Way("switch, every 5 steps", compose="switch", switch_every=5),
        Way("switch, every step, at 1.5", (1.5, 1.5, 1.5), compose="switch"),
        Way("composite", compose="composite"),
        Way("composite at 1.5", (1.5, 1.5, 1.5), compose="composite"),
    )


@dataclass(frozen=True)
class Wish:
    """What a picture is to show, some of it from LoRAs, the rest the base's own."""

    style: str
    subject: str
    place: str
    framed: bool

    @property
    def prompt(self) -> str:
        words, (place, *_) = STYLES[self.style].words or ("",), WORDS[self.place]
        thing = f"{'an' if self.subject[0] in 'aeiou' else 'a'} {self.subject}"
        return f"{words[0]} {thing} {place}{', framed' if self.framed else ''}".strip()

    @property
    def loras(self) -> list[int]:
        """The numbers of the LoRAs that it takes."""
        return [i for i, here in enumerate((self.style == "blueprint", self.subject == "zib", self.framed)) if here]

    def met(self, verdict: Verdict) -> list[bool]:
        """Whether style, subject, frame and place are as wanted."""
        place, _, framed = verdict.place.partition(", ")
        return [
            verdict.style == self.style,
            verdict.subject == self.subject,
            bool(framed) == self.framed,
            place == self.place,
        ]


THREE = [Wish("blueprint", "zib", place, True) for place in PLACES]
PAIRS = (
    [Wish("blueprint", "zib", place, False) for place in PLACES],
    [Wish("blueprint", subject, place, True) for subject, place in zip(SUBJECTS, 2 * PLACES, strict=True)],
    [Wish("flat", "zib", place, True) for place in PLACES],
)
ALONE = (
    [Wish("blueprint", subject, place, False) for subject, place in zip(SUBJECTS, 2 * PLACES, strict=True)],
    [Wish("flat", "zib", place, False) for place in PLACES],
    [Wish("flat", subject, place, True) for subject, place in zip(SUBJECTS, 2 * PLACES, strict=True)],
)


@dataclass(frozen=True)
class Studio:
    """Paints wishes and judges the pictures."""

    mixer: Mixer
    loras: Sequence[Path]
    judge: Judge
    output: Path

    def met(self, way: Way, wishes: Sequence[Wish], count: int) -> list[list[bool]]:
        """Of `count` pictures, whether style, subject, frame and place are as wanted. Writes a sheet of some."""
        cases = [wishes[i * len(wishes) // count] for i in range(count)]
        jobs = [self._job(way, wish, seed) for seed, wish in enumerate(cases)]
        pictures = [event.image for event in render(self.mixer, *jobs) if isinstance(event, Picture)]
        some = pictures[:: max(1, count // ON_SHEET)]
        contact_sheet(some).save(self.output / f"{way.name} {cases[0].prompt}.png".replace(" ", "-").replace(",", ""))
        found = verdicts(self.judge, pictures, frame.LABELS)
        return [wish.met(verdict) for wish, verdict in zip(cases, found, strict=True)]

    def _job(self, way: Way, wish: Wish, seed: int) -> Job:
        held = ((str(self.loras[i]), way.weights[i]) for i in wish.loras)
        loras = (LoraWeight(path=path, unet=weight, text_encoder=min(weight, 1.0)) for path, weight in held)
        return Job(
            prompt=wish.prompt,
            loras=tuple(loras),
            compose=way.compose,
            switch_every=way.switch_every,
            seed=seed,
            guidance_scale=GUIDANCE_SCALE,
        )


def row(studio: Studio, way: Way, many: int, few: int) -> str:
    """A way's line: traits, place and all three traits where all are asked for; then both traits of each pair."""
    three = studio.met(way, THREE, many)
    cells = [share([one[i] for one in three]) for i in range(4)]
    cells.append(f"**{share([all(one[:3]) for one in three], interval=True)}**")
    for wishes in PAIRS:
        pair = studio.met(way, wishes, few)
        both = [all(one[i] for i in wishes[0].loras) for one in pair]
        cells.append(share(both, interval=True))
    return f"| {way.name} | {' | '.join(cells)} |"


def share(hits: Sequence[bool], interval: bool = False) -> str:
    """How many of how many; with Wilson's 95 % interval if asked for."""
    count, found = len(hits), sum(hits)
    if not interval:
        return f"{found}/{count}"
    middle, spread = found + Z**2 / 2, Z * sqrt(found * (count - found) / count + Z**2 / 4)
    low, high = ((middle + side * spread) / (count + Z**2) for side in (-1, 1))
    return f"{found}/{count} ({low:.0%} to {high:.0%})"


def trained(output: Path) -> list[Path]:
    """The three LoRAs, trained as the demo trains two of them; runs that are there already go on or are done."""
    frame.write(output / "datasets" / THIRD.trigger)
    lessons = ((STYLE, Path("datasets")), (CHARACTER, Path("datasets")), (THIRD, output / "datasets"))
    return [train(lesson, datasets, output / lesson.trigger) for lesson, datasets in lessons]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", type=Path, nargs="*", metavar="LORA", help="of the style, the character and the frame")
    parser.add_argument("--output", type=Path, default=Path("outputs/compositions"))
    parser.add_argument("--pictures", type=int, default=100, help="of all three LoRAs, for each way")
    parser.add_argument("--pairs", type=int, default=40, help="pictures of each pair")
    options = parser.parse_args()
    if len(options.loras) not in (0, 3):
        parser.error("give three LoRA files, or none to train them")
    options.output.mkdir(parents=True, exist_ok=True)
    loras = options.loras or trained(options.output)
    weights = options.output / "judge.safetensors"
    if not weights.exists():
        print("the judge, right on unseen renders:", frame.teach(weights))
    studio = Studio(open_mixer("toybox"), loras, frame.load(weights), options.output)
    for wishes in ALONE:
        met = studio.met(Way("alone"), wishes, options.pairs)
        brought, kept = share([one[wishes[0].loras[0]] for one in met]), share([all(one) for one in met])
        print(f"{TRIGGERS[wishes[0].loras[0]]} alone at 1.0: {brought}, with all else right {kept}")
    pairs = [" + ".join(TRIGGERS[i] for i in wishes[0].loras) for wishes in PAIRS]
    heads = ["", *TRIGGERS, "the place", "all three (95 %)", *(f"{pair} (95 %)" for pair in pairs)]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for way in ways(loras):
        print(row(studio, way, options.pictures, options.pairs), flush=True)


if __name__ == "__main__":
    main()
