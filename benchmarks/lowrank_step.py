"""What low-rank layers add to a training step of an SD-1.5-sized UNet with random weights: none, ours, peft's.

    python benchmarks/lowrank_step.py                               # SD 1.5 at 256 px, batch 1, rank 16, attention
    python benchmarks/lowrank_step.py --widths 32,64,128,128 --rounds 3      # a minute less, to see that it runs

A step is forward and backward to an input that wants a gradient; "+ AdamW" adds gradient clipping and the optimizer.
Rounds are interleaved, so that whatever else the machine does meets all contenders alike; the first is not counted.
"frozen again" is the frozen pass a second time: how far its ratio is from 1 tells how far to trust the others.
On a busy machine take --clock cpu with OMP_NUM_THREADS=1: it counts the processor time that the step itself used.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from torch.optim import Optimizer

from sdlora.lowrank.inject import inject

PEFT_TARGETS = {
    "attention": r".*\.(to_q|to_k|to_v|to_out\.0)",
    "attention+ff": r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)",
}
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
# Puts its layers in, yields what is to be trained, takes them out.
Contender = Callable[[UNet2DConditionModel], AbstractContextManager[list[nn.Parameter]]]


def contenders(targets: str, rank: int) -> dict[str, Contender]:
    @contextmanager
    def ours(unet: UNet2DConditionModel) -> Iterator[list[nn.Parameter]]:
        with inject({"unet": unet}, targets, rank, rank, generator=torch.Generator().manual_seed(0)) as injection:
            yield injection.parameters()

    @contextmanager
    def pefts(unet: UNet2DConditionModel) -> Iterator[list[nn.Parameter]]:
        tuner = LoraModel(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=PEFT_TARGETS[targets]), "default")
        yield [parameter for parameter in unet.parameters() if parameter.requires_grad]
        tuner.unload()

    def nothing(_: UNet2DConditionModel) -> AbstractContextManager[list[nn.Parameter]]:
        return nullcontext([])

    return {"frozen": nothing, "frozen again": nothing, "sdlora": ours, "sdlora + AdamW": ours, "peft": pefts}


def seconds(unet: UNet2DConditionModel, latents: Tensor, optimizer: Optimizer | None, clock: Clock) -> float:
    """Time of one step on latents of shape (batch, 4, height, width)."""
    timesteps = torch.full((len(latents),), 500)
    text = torch.zeros(len(latents), 77, unet.config["cross_attention_dim"])
    start = clock()
    unet(latents, timesteps, text).sample.square().mean().backward()
    if optimizer:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
    return clock() - start


def warm_adamw(parameters: list[nn.Parameter]) -> Optimizer:
    """AdamW that already has its state, which the first step makes."""
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def measure(
    unet: UNet2DConditionModel, latents: Tensor, wanted: dict[str, Contender], rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds by contender, one figure a round; the warm-up round is left out."""
    times: dict[str, list[float]] = {name: [] for name in wanted}
    for number in range(rounds + 1):
        for name, contender in wanted.items():
            latents.grad = None
            with contender(unet) as parameters:
                optimizer = warm_adamw(parameters) if "AdamW" in name else None
                elapsed = seconds(unet, latents, optimizer, clock)
            if number:
                times[name].append(elapsed)
    return times


def table(times: dict[str, list[float]]) -> str:
    frozen = times["frozen"]
    rows = [
        f"{'':16}{'median s':>10}{'fastest s':>11}{'ratio of medians':>18}{'of fastest':>12}{'median of ratios':>18}"
    ]
    for name, values in times.items():
        median = statistics.median(values)
        paired = statistics.median(mine / base for mine, base in zip(values, frozen, strict=True))
        rows.append(
            f"{name:16}{median:10.3f}{min(values):11.3f}{median / statistics.median(frozen):18.3f}"
            f"{min(values) / min(frozen):12.3f}{paired:18.3f}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default 10)")
    parser.add_argument(
        "--pixels", type=int, default=256, help="picture size; latents are an eighth of it (default 256)"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=PEFT_TARGETS, default="attention")
    parser.add_argument("--widths", default="320,640,1280,1280", help="channels of the four levels (default SD 1.5's)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.manual_seed(0)
    widths = tuple(int(width) for width in options.widths.split(","))
    unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768).eval().requires_grad_(False)
    latents = torch.randn(options.batch, 4, options.pixels // 8, options.pixels // 8, requires_grad=True)
    with inject({"unet": unet}, options.targets, options.rank, options.rank, generator=torch.Generator()) as injection:
        print(injection.report().summary())
    size = f"{options.pixels} px, batch {options.batch}, rank {options.rank}"
    print(f"{size}, {options.targets}, {options.rounds} rounds")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.clock} clock\n")
    wanted = contenders(options.targets, options.rank)
    print(table(measure(unet, latents, wanted, options.rounds, CLOCKS[options.clock])))


if __name__ == "__main__":
    main()
