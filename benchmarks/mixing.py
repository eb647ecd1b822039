"""What a denoising step costs with LoRAs on an SD-1.5-sized UNet with random weights: none, ours merged, peft's live.

    python -m benchmarks.mixing                                      # SD 1.5 at 256 px, rank 16, attention
    python -m benchmarks.mixing --widths 32,64,128,128 --rounds 3    # a minute less, to see that it runs

A step is one forward pass of the batch of two that guidance needs. Rounds are interleaved, so that whatever else the
machine does meets all alike; the first is not counted. "none again" is the base a second time: how far its ratio is
from 1 tells how far to trust the others. The time from moving a slider to the first step is measured too: ours is
`mixer.set`, peft's is what fused weights need, unfuse, set the scales, fuse.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, LoraModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.lowrank.targets import modules_of
from sdlora.mixing.mixer import Mixer
from sdlora.models.load import load_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
State = Callable[[], AbstractContextManager[None]]  # brings the UNet into a state, and back


def pipeline_of(widths: tuple[int, ...]) -> StableDiffusionPipeline:
    """A pipeline that has what a mixer works on: a UNet, and a text encoder that no LoRA here touches."""
    text = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
    unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768).eval().requires_grad_(False)
    return StableDiffusionPipeline(
        None, text, load_pipeline("toybox").tokenizer, unet, None, None, None, requires_safety_checker=False
    )  # type: ignore[arg-type]


def adapter_of(unet: UNet2DConditionModel, rank: int, seed: int) -> Adapter:
    """Random low-rank deltas on all attention projections."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, module in modules_of({"unet": unet}).items():
        if path.endswith(ATTENTION):
            rows, columns = module.weight.shape
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            deltas[path] = LowRank(down, torch.randn(rows, rank, generator=generator) * 0.01, float(rank))
    return Adapter(deltas)


def states(unet: UNet2DConditionModel, mixer: Mixer, rank: int) -> dict[str, State]:
    """The contenders: each brings the one UNet into a state and leaves it as it was."""

    def ours(count: int) -> State:
        @contextmanager
        def state() -> Iterator[None]:
            mixer.set({f"lora {i}": 0.3 for i in range(count)})
            yield
            mixer.set({})

        return state

    def pefts(count: int) -> State:
        @contextmanager
        def state() -> Iterator[None]:
            tuner = live(unet, count, rank)
            yield
            tuner.unload()

        return state

    return {"none": nullcontext, "none again": nullcontext, "sdlora, 5": ours(5), "peft, 3": pefts(3)}


def live(unet: UNet2DConditionModel, count: int, rank: int) -> LoraModel:
    """peft's layers around the UNet's, `count` adapters in force."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION), init_lora_weights=False)
    tuner = LoraModel(unet, config, "lora 0")  # type: ignore[arg-type]
    for i in range(1, count):
        tuner.peft_config[f"lora {i}"] = config
        tuner.inject_adapter(unet, f"lora {i}")
    tuner.set_adapter([f"lora {i}" for i in range(count)])
    return tuner


def step_times(
    unet: UNet2DConditionModel, wanted: Mapping[str, State], latents: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward pass by contender, one figure a round; the warm-up round is left out.

    In each state the first pass is not counted: it also pays for the memory that entering the state let go.
    """
    times: dict[str, list[float]] = {name: [] for name in wanted}
    timesteps, text = torch.full((len(latents),), 500), torch.zeros(len(latents), 77, 768)
    for number in range(rounds + 1):
        for name, state in wanted.items():
            with state(), torch.inference_mode():
                unet(latents, timesteps, text)
                start = time.perf_counter()
                unet(latents, timesteps, text)
                elapsed = time.perf_counter() - start
            if number:
                times[name].append(elapsed)
    return times


def slider_times(unet: UNet2DConditionModel, mixer: Mixer, rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds from a slider's move until the weights of 3 adapters are in force, merged or fused."""
    times: dict[str, list[float]] = {"sdlora": [], "peft": []}
    for number in range(rounds):
        start = time.perf_counter()
        mixer.set({f"lora {i}": 0.1 * (number + 1) for i in range(3)})
        times["sdlora"].append(time.perf_counter() - start)
    mixer.set({})
    tuner = live(unet, 3, rank)
    tuner.merge_adapter()
    for number in range(rounds):
        start = time.perf_counter()
        tuner.unmerge_adapter()
        for module in unet.modules():
            if hasattr(module, "lora_A"):
                for i in range(3):
                    module.set_scale(f"lora {i}", 0.1 * (number + 1))  # type: ignore[operator]
        tuner.merge_adapter()
        times["peft"].append(time.perf_counter() - start)
    tuner.unload()
    return times


def table(times: Mapping[str, list[float]]) -> str:
    """Ratios are to the first row."""
    first = next(iter(times.values()))
    rows = [f"{'':14}{'median s':>10}{'fastest s':>11}{'of fastest':>12}{'median of ratios':>18}"]
    for name, values in times.items():
        paired = statistics.median(mine / base for mine, base in zip(values, first, strict=True))
        fastest = f"{min(values):11.3f}{min(values) / min(first):12.3f}"
        rows.append(f"{name:14}{statistics.median(values):10.3f}{fastest}{paired:18.3f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default 10)")
    parser.add_argument("--pixels", type=int, default=256, help="picture size (default 256)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--widths", default="320,640,1280,1280", help="channels of the four levels (default SD 1.5's)")
    options = parser.parse_args()
    torch.manual_seed(0)
    pipeline = pipeline_of(tuple(int(width) for width in options.widths.split(",")))
    unet, mixer = pipeline.unet, Mixer(pipeline)
    for i in range(5):
        mixer.add(adapter_of(unet, options.rank, i), f"lora {i}")
    print(f"{options.pixels} px, batch 2, rank {options.rank}, attention, {options.rounds} rounds")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\na step with that many adapters")
    latents = torch.randn(2, 4, options.pixels // 8, options.pixels // 8)
    print(table(step_times(unet, states(unet, mixer, options.rank), latents, options.rounds)))
    print("\nfrom a slider's move to weights in force, 3 adapters")
    print(table(slider_times(unet, mixer, options.rank, options.rounds)))


if __name__ == "__main__":
    main()
