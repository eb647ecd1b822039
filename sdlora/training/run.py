"""A whole run: from a config to the final LoRA, with everything that belongs to it in the run folder."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdlora.data.buckets import Bucketing
from sdlora.data.folder import Dataset, listed, scan
from sdlora.errors import SdloraError
from sdlora.formats.architectures import architecture_of
from sdlora.formats.metadata import TrainingFacts, to_metadata
from sdlora.formats.write import write as write_lora
from sdlora.models.families import components_of, truncated
from sdlora.models.load import load_pipeline
from sdlora.training import checkpoints, run_folder, samples
from sdlora.training.config import TrainConfig
from sdlora.training.interrupt import interruptible
from sdlora.training.loop import Diverged, Step, Training, train
from sdlora.training.prepare import bucketed, open_accelerator, prepare
from sdlora.training.progress import Progress

OnStep = Callable[[Step], None]

# What kohya's ss_* metadata calls our settings, where other programs know them.
KOHYA_NAMES = {
    "learning_rate": "unet_lr",
    "text_encoder_learning_rate": "text_encoder_lr",
    "steps": "max_train_steps",
    "epochs": "num_epochs",
    "batch_size": "total_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "optimizer": "optimizer",
    "lr_scheduler": "lr_scheduler",
    "warmup_steps": "lr_warmup_steps",
    "seed": "seed",
    "mixed_precision": "mixed_precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "caption_dropout": "caption_dropout_rate",
    "noise_offset": "noise_offset",
    "min_snr_gamma": "min_snr_gamma",
    "max_grad_norm": "max_grad_norm",
    "dropout": "network_dropout",
}


def run_training(config: TrainConfig, on_step: OnStep | None = None, say: Callable[[str], None] = print) -> Path:
    """Train as the config says, in its run folder, and return the path of the final LoRA.

    on_step: called after every step on the main process (None: a live line on stderr); say: prints what is to be told.
    Ctrl-C ends with the step at hand saved and KeyboardInterrupt, whose text says how to resume. SdloraError: bad
    input, found before anything is written; or a loss that is nan, with the step, the pictures and the last checkpoint.
    """
    checkpoint = run_folder.checkpoint_to_resume(config)
    accelerator = open_accelerator(config)
    say = say if accelerator.is_main_process else _nothing
    dataset = scan(Path(config.dataset), config.trigger)
    say(dataset.summary())
    pipeline = load_pipeline(config.model)
    bucketing = bucketed(config, pipeline, dataset)
    say(bucketing.summary())
    ends = _ends_unseen(pipeline, dataset, say)
    architecture = architecture_of(components_of(pipeline)).name
    training = prepare(config, accelerator, pipeline, dataset, bucketing)
    say(training.injection.report().summary())
    run = Run(training, pipeline, dataset, bucketing, architecture, say)
    done = run.restore(checkpoint) if checkpoint else 0
    accelerator.wait_for_everyone()  # every process has seen an empty folder before the first one fills it
    try:
        if accelerator.is_main_process:
            run.open_folder(run_folder.describe(dataset, bucketing, ends), done)
        run.drive(done, on_step)
        return run.finish()
    finally:
        accelerator.end_training()
        accelerator.free_memory()


@dataclass(frozen=True, eq=False)
class Run:
    """A training under way and its folder. pipeline: what is left of it is used for sample pictures."""

    training: Training
    pipeline: Any
    dataset: Dataset
    bucketing: Bucketing
    architecture: str
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        return self.training.config.folder

    def open_folder(self, description: Mapping[str, Any], done: int) -> None:
        """Write what is known before the first step."""
        try:
            run_folder.write(self.folder, self.training.config, description, done)
        except OSError as error:
            raise SdloraError(
                f"output {self.folder} cannot be written ({error.strerror}); name another --output"
            ) from error

    def drive(self, done: int, on_step: OnStep | None) -> None:
        """Take the steps that are left; write metrics, checkpoints and samples as they fall due."""
        config, accelerator = self.training.config, self.training.accelerator
        if config.tracker != "none":
            accelerator.init_trackers(config.tracker, init_kwargs={"tensorboard": {"purge_step": done + 1}})
        live = Progress()
        with interruptible() as asked, closing(live):
            try:
                for step in train(self.training, done):
                    self.record(step, on_step or live)
                    stop = self.agreed(asked.is_set())
                    if stop or step.index == step.steps or _due(step.index, config.save_every):
                        self.save(step.index)
                    if stop and step.index < step.steps:
                        raise KeyboardInterrupt(self.how_to_resume(step))
                    if _due(step.index, config.sample_every):
                        live.close()
                        self.sample(step.index)
            except Diverged as error:
                raise SdloraError(f"{error}; {self.last_good(error.step)}") from error
            except OSError as error:
                raise SdloraError(
                    f"{self.folder} cannot be written ({error.strerror or error}); "
                    f"free space there, then go on with: {self.command_to_resume()}"
                ) from error

    def record(self, step: Step, on_step: OnStep) -> None:
        """Metrics to the run folder and the tracker, the step to whoever watches."""
        if self.training.accelerator.is_main_process:
            run_folder.append_metrics(self.folder, step)
            on_step(step)
        self.training.accelerator.log(run_folder.metrics(step), step=step.index)

    def agreed(self, asked: bool) -> bool:
        """Whether any process was asked to stop; all of them must stop after the same step."""
        accelerator = self.training.accelerator
        if accelerator.num_processes == 1:
            return asked
        if asked:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def save(self, step: int) -> None:
        """A checkpoint, written by the main process."""
        training = self.training
        if training.accelerator.is_main_process:
            scaler = training.accelerator.scaler
            plain = {"optimizer": training.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            state = checkpoints.State(step, self.parameters(), plain, self.facts())
            checkpoints.save(self.folder, state, partial(self.write_lora, step))
        training.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> int:
        """Put the training where a checkpoint left it, to the bit, and return the steps done."""
        state = checkpoints.load(checkpoint)
        if state.step > self.training.steps:
            raise SdloraError(
                f"{checkpoint} is past the {self.training.steps} steps that are wanted; give more --steps"
            )
        for what, now in self.facts().items():
            if state.facts[what] != now:
                raise SdloraError(f"cannot resume from {checkpoint}: {_OTHER[what].format(state.facts[what], now)}")
        parameters = self.parameters()
        if parameters.keys() != state.parameters.keys():
            raise SdloraError(f"cannot resume from {checkpoint}: the model has other modules than it was trained on")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.parameters[name])
        self.training.optimizer.load_state_dict(state.plain["optimizer"])
        if self.training.accelerator.scaler is not None and state.plain["scaler"]:
            self.training.accelerator.scaler.load_state_dict(state.plain["scaler"])
        self.say(f"resumed from {checkpoint}, {state.step} of {self.training.steps} steps done")
        return state.step

    def facts(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        seen = run_folder.fingerprint(self.dataset, self.bucketing)
        return {"dataset": seen, "global_batch": self.training.global_batch}

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trained factors by the path of their module."""
        return {
            f"{path}.{name}": factor.weight
            for path, layer in self.training.injection.layers.items()
            for name, factor in (("down", layer.down), ("up", layer.up))
        }

    def sample(self, step: int) -> None:
        """Sample pictures, rendered by the main process with the LoRA as it is now."""
        if self.training.accelerator.is_main_process:
            samples.render_samples(self.training, self.pipeline, self.folder / "samples", step)
        self.training.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the final LoRA and return its path."""
        path = self.folder / f"{self.folder.resolve().name}.safetensors"
        if self.training.accelerator.is_main_process:
            self.write_lora(self.training.steps, path)
            self.say(f"wrote {path}")
        self.training.accelerator.wait_for_everyone()
        return path

    def write_lora(self, step: int, path: Path) -> None:
        """The LoRA as it is now, in a file that says how it was made."""
        config, training = self.training.config, self.training
        settings = {name: value for name, value in asdict(config).items() if name in KOHYA_NAMES}
        facts = TrainingFacts(
            title=path.stem,
            model=config.model,
            architecture=self.architecture,
            dataset=self.dataset.folder.resolve().name,
            captions=tuple(record.caption for record in self.dataset.records),
            resolution=self.bucketing.resolution,
            prediction_type=training.prediction_type,
            trigger=config.trigger,
            step=step,
            settings={KOHYA_NAMES[name]: value for name, value in settings.items()},
        )
        adapter = replace(training.injection.adapter(), metadata=to_metadata(facts))
        write_lora(adapter, path, config.naming)

    def how_to_resume(self, step: Step) -> str:
        return f"stopped after step {step.index} of {step.steps} and saved it; go on with: {self.command_to_resume()}"

    def command_to_resume(self) -> str:
        return run_folder.command_to_resume(self.training.config, self.training.accelerator.num_processes)

    def last_good(self, failed: int) -> str:
        """Where to go on from after a divergence at step `failed`: its own weights, saved the step before, are bad."""
        checkpoint = checkpoints.latest(self.folder, before=failed - 1)
        if checkpoint is None:
            return "there is no good checkpoint yet; begin anew with a lower learning_rate"
        return (
            f"last good checkpoint: {checkpoint}; delete later ones and go on from it with --resume and a lower "
            "learning_rate"
        )


_OTHER = {
    "dataset": "the pictures, captions or buckets are not those that it was trained on",
    "global_batch": "it was trained with {} samples per step (batch_size x gradient_accumulation x processes), not {}",
}


def _ends_unseen(pipeline: Any, dataset: Dataset, say: Callable[[str], None]) -> dict[str, str]:
    """By caption, the end of it that is too long for the text encoder; said, by picture."""
    ends = {caption: truncated(pipeline, caption) for caption in {r.caption for r in dataset.records}}
    cut = [record.name for record in dataset.records if ends[record.caption]]
    if cut:
        say(f"{len(cut)} captions are longer than the text encoder reads, their ends are cut off: {listed(cut)}")
    return ends


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _nothing(_: str) -> None:
    """What processes other than the main one say."""
