"""What a mix costs, counted, not timed: merged weights run the operations of the base and no others."""

from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline


class Operations(TorchDispatchMode):
    """Counts operations by name and the shapes of the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))
        self.counted[func, shapes] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(unet: Any) -> Counter[tuple[Any, ...]]:
    """Of one pass of the batch of two that guidance needs."""
    with Operations() as mode:
        unet(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), torch.zeros(2, 77, 32))
    return mode.counted


def test_five_loras_cost_a_step_nothing():
    pipeline = tiny_pipeline()
    base = operations(pipeline.unet)
    mixer = Mixer(pipeline)
    for i in range(5):
        mixer.add(random_adapter(components_of(pipeline), seed=i), f"lora {i}")
    mixer.set({f"lora {i}": 0.3 for i in range(5)})
    assert operations(pipeline.unet) == base
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    live = tiny_pipeline().unet
    LoraModel(live, config, "one")
    assert operations(live).total() > base.total(), "the count sees what layers beside the base's cost"
