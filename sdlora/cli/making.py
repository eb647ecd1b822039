"""The verbs that make LoRAs and pictures: train, generate, app and demo."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from sdlora.cli.flags import Whole, flag, whole
from sdlora.errors import SdloraError
from sdlora.formats.block_weights import PresetsIn, blocks_of
from sdlora.formats.sources import name_of
from sdlora.generation.job import SCHEDULERS, Job, parse_lora, parse_size
from sdlora.training.config import TrainConfig, load


def _flags_of(config: type) -> type:
    """A class of the config's fields as flags, all None until they are given; help comes from the fields."""
    hints = get_type_hints(config)
    flags = []
    for i, one in enumerate(fields(config)):
        help = one.metadata["help"]
        if "choices" in one.metadata:
            help += f"; one of {', '.join(one.metadata['choices'])}"
        if one.default not in (MISSING, None, "", ()) and one.default is not False:
            help += f" [default: {' '.join(one.default) if isinstance(one.default, tuple) else one.default}]"
        hint = list[str] if hints[one.name] == tuple[str, ...] else hints[one.name]
        parsed = Parameter(converter=whole if hint in (int, int | None) else None)
        shown = field(default=None, kw_only=i > 0, metadata={"help": help})
        flags.append((one.name, Annotated[hint | None, parsed], shown))
    made = make_dataclass(f"{config.__name__}Flags", flags, frozen=True)
    made.__module__ = __name__  # else it counts as one of Python's own types, which have no flags
    return made


TrainFlags: Any = _flags_of(TrainConfig)


def train(
    flags: Annotated[TrainFlags, Parameter(name="*")] = TrainFlags(),  # type: ignore[valid-type] # noqa: B008
    *,
    config: Annotated[Path | None, Parameter(help="TOML file with settings by the same names; flags win")] = None,
) -> None:
    """Train a LoRA from a folder of captioned pictures.

    Everything goes into the run folder. Ctrl-C saves; --resume goes on.
    """
    settings = load(config, {name: value for name, value in vars(flags).items() if value is not None})
    from sdlora.training.run import run_training

    run_training(settings)


LORA = (
    "FILE, FILE:WEIGHT or FILE:UNET:TEXT_ENCODER, and behind that :unet=, :te=, :te2=, :blocks= and :schedule=, "
    "such as FILE:0.8:te=0.4:blocks=OUTALL:schedule=0.2-0.8; repeat it to mix several"
)
LADDER = (
    "weights of the first --lora, a picture each, such as 0,0.25,0.5, and a sheet of all; "
    "text encoders that have the UNet's weight go along"
)


@dataclass(frozen=True)
class GenerateFlags:
    """What `sdlora generate` is told."""

    prompt: str = field(metadata={"help": "what to paint"})
    lora: list[str] | None = flag(None, LORA)
    library: list[str] | None = flag(None, "folder with LoRAs that tags name, and lbwpresets.txt [default: outputs]")
    compose: str = flag("sum", "how several LoRAs come together: sum, switch (in turns) or composite (mean)")
    switch_every: Whole = flag(1, "with --compose switch: steps after which the next LoRA has its turn")
    ladder: str | None = flag(None, LADDER)
    grid: str | None = flag(None, "weights of the second --lora, one row of the sheet each; with --ladder")
    partial: bool = flag(False, "take what fits of LoRAs that are for another model or not whole")
    negative_prompt: str = flag("", "what not to paint")
    model: str = flag("toybox", "base model: toybox, a diffusers folder, a .safetensors file or a hub id")
    seed: Whole = flag(0, "seed of the first picture, the next ones count up")
    steps: Whole = flag(20, "denoising steps")
    guidance: float = flag(5.0, "guidance scale; 1 is none")
    scheduler: str = flag("default", f"default (the model's own), {', '.join(SCHEDULERS)}")
    size: str | None = flag(None, "pixels, such as 512 or 512x768 [default: the model's own]")
    count: Whole = flag(1, "number of pictures")
    output: Path = flag(Path("outputs/pictures"), "folder for the pictures")

    def job(self, presets: Mapping[str, str]) -> Job:
        """The job that the flags describe. presets: of block weights, by name."""
        width, height = parse_size(self.size) if self.size is not None else (None, None)
        return Job(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            model=self.model,
            loras=tuple(parse_lora(text, presets) for text in self.lora or ()),
            compose=self.compose,
            switch_every=self.switch_every,
            partial=self.partial,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance,
            scheduler=self.scheduler,
            width=width,
            height=height,
            count=self.count,
        )

    def cells(self, job: Job) -> tuple[Job, ...]:
        """The job, or those of its ladder or grid."""
        from sdlora.generation.composition import grid, ladder

        if self.ladder is None:
            if self.grid is not None:
                raise SdloraError("--grid has no --ladder; give the weights of the first LoRA with --ladder")
            return (job,)
        axes = 1 if self.grid is None else 2
        if len(job.loras) < axes or job.count > 1:
            told = f"{axes} LoRAs" if axes > 1 else "a LoRA"
            raise SdloraError(f"a {'ladder' if self.grid is None else 'grid'} wants {told} (--lora) and a count of 1")
        weights = _numbers(self.ladder)
        return ladder(job, 0, weights) if self.grid is None else grid(job, 0, weights, 1, _numbers(self.grid))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise SdloraError(f"{text!r} are no weights; write them with commas, such as 0,0.25,0.5") from None


def generate(flags: Annotated[GenerateFlags, Parameter(name="*")]) -> None:
    """Make pictures from a prompt and any mix of LoRAs. The PNGs carry all settings."""
    library = _library(flags.library)
    presets = PresetsIn(library)
    job = flags.job(presets)
    from tqdm import tqdm

    from sdlora.generation.open import open_mixer
    from sdlora.generation.png import check_folder, save, save_sheet
    from sdlora.generation.prompts.tags import names_of, resolved
    from sdlora.generation.render import Picture, hold, render
    from sdlora.generation.sheet import compared

    check_folder(flags.output)
    job = resolved(job, names_of(library), presets)
    jobs = flags.cells(job)
    mixer = open_mixer(job.model)
    hold(mixer, jobs[:1])
    _tell_loras(mixer, jobs)
    pictures = []
    with tqdm(unit="step", leave=False, disable=None) as bar:
        for event in render(mixer, *jobs):
            if isinstance(event, Picture):
                pictures.append(event)
                tqdm.write(str(save(event, flags.output)))
            else:
                bar.total = job.count * len(jobs) * event.steps
                bar.update(event.picture * event.steps + event.together * event.step - bar.n)
    if flags.ladder is not None:
        columns, second = len(_numbers(flags.ladder)), 1 if flags.grid else -1
        image = compared([(picture.job, picture.image) for picture in pictures], columns, 0, second)
        print(save_sheet(image, flags.output, job))


def _library(folders: list[str] | None) -> list[Path]:
    """Where tags look. What is named must be there, what is looked at anyway need not."""
    if folders is None:
        return [folder for folder in (Path("outputs"),) if folder.is_dir()]
    missing = next((folder for folder in folders if not Path(folder).is_dir()), None)
    if missing:
        raise SdloraError(f"--library {missing} is no folder; name the folder where your LoRAs lie")
    return [Path(folder) for folder in folders]


def _tell_loras(mixer: Any, jobs: Sequence[Job]) -> None:
    """What of each LoRA is applied, which of its blocks are off, and which of its settings do nothing."""
    from sdlora.cli.show import escaped
    from sdlora.generation.notes import left_out

    notes = [note for job in jobs for note in left_out(mixer, job)]
    for lora in jobs[0].loras:
        print(escaped(mixer.receipt(lora.path).summary()))
        off = [block for block, factor in lora.blocks if not factor and block in blocks_of(mixer.architecture)]
        notes += [f"{name_of(Path(lora.path))}: {', '.join(off)} switched off"] if off else []
    for note in dict.fromkeys(notes):
        print(f"note: {escaped(note)}", file=sys.stderr)


@dataclass(frozen=True)
class AppFlags:
    """What `sdlora app` is told."""

    model: list[str] | None = flag(None, "base model, repeat it to offer several [default: toybox]")
    library: list[str] | None = flag(None, "folder with LoRA files, repeat it for several [default: outputs]")
    output: str = flag("outputs/pictures", "folder for the pictures")
    host: str = flag("127.0.0.1", "address to listen on; one that others can reach needs a --password")
    port: Whole = flag(7860, "port to listen on")
    password: str = flag("", "password of the user sdlora")
    open_browser: bool = flag(False, "open the page in the browser")


def web_app(flags: Annotated[AppFlags, Parameter(name="*")] = AppFlags()) -> None:  # noqa: B008
    """Mix LoRAs with sliders in the browser, until Ctrl-C."""
    from sdlora.web.app import serve

    serve(
        models=flags.model or ["toybox"],
        libraries=flags.library or [],
        output=flags.output,
        host=flags.host,
        port=flags.port,
        password=flags.password,
        open_browser=flags.open_browser,
    )


def demo(*, datasets: Path = Path("datasets"), output: Path = Path("outputs/demo")) -> None:
    """Train a style and a character on toybox, and draw a sheet in which sliders blend them.

    Parameters
    ----------
    datasets: folder with the sample datasets
    output: folder for the two runs and the sheet
    """
    from sdlora.demo import run_demo

    print(run_demo(datasets, output))
