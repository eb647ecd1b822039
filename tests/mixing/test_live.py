"""Layers beside the base's: what they do is what merging does, row by row, and off is the base to the bit."""

import copy
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import IA3, Delta, Full, InputBOFT, LowRank, Rotation, Sparse, Sum
from sdlora.lowrank.targets import modules_of
from sdlora.mixing.live import Live, LiveTerms
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
from tests.mixing.test_cost import Operations
from tests.mixing.test_parameters import CONV, LAWS, LINEAR, numbers
from tests.tiny import tiny_pipeline

KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
DOWN, PROJECTION = "unet.down_blocks.1.downsamplers.0.conv", "unet.down_blocks.1.attentions.0.proj_in"
TIME = "unet.down_blocks.1.resnets.0.time_emb_proj"
NORMS = ("unet.mid_block.resnets.0.norm1", "text_encoder.text_model.encoder.layers.0.layer_norm1")
TUCKER = LowRank(numbers(4, 32), numbers(32, 4, seed=1), alpha=2.0, mid=numbers(4, 4, 3, 3, seed=2))
SPARSE = Sparse(torch.tensor([[0, 5, 31], [7, 0, 31]]), torch.tensor([2.0, -1.0, 0.5]), torch.tensor([32, 32]))
MORE = {
    "oft of its rotation": Rotation(torch.eye(8) + numbers(4, 8, 8)),
    "boft of peft": InputBOFT(numbers(2, 4, 8, 8), numbers(32, 1) + 1),
    "sum": Sum(LAWS["dora by output"](), Sum(LAWS["lora"](), SPARSE)),
    "sparse": SPARSE,
}
UNIFORM, ROWS = torch.tensor([[0.7, -0.4]]), torch.tensor([[0.7, -0.4], [0.0, 0.0], [-1.2, 0.3]])


def modules_in(pipeline: Any) -> dict[str, Any]:
    return modules_of(components_of(pipeline), KINDS)


@cache
def untouched() -> dict[str, Any]:
    """Modules to be copied."""
    return modules_in(tiny_pipeline())


def live_over(pipeline: Any, terms: LiveTerms, weights: Tensor | None = None) -> Live:
    modules = modules_in(pipeline)
    live = Live(modules, lambda path: parameter(modules, path))
    live.install(terms)
    if weights is not None:
        live.weigh(weights)
    return live


def parameter(modules: Mapping[str, Any], path: str) -> Tensor | None:
    module = path.removesuffix(".bias")
    return getattr(modules[module], "weight" if module == path else "bias")


def terms_of(*adapters: Mapping[str, Delta]) -> dict[str, tuple[tuple[Delta, int], ...]]:
    """Each adapter in the slot of its place."""
    paths = dict.fromkeys(path for deltas in adapters for path in deltas)
    return {path: tuple((deltas[path], i) for i, deltas in enumerate(adapters) if path in deltas) for path in paths}


@torch.no_grad()
def merge(module: nn.Module, path: str, terms: LiveTerms, weights: Tensor) -> None:
    """The oracle: W0 + sum(weight * delta) in float64, written into a module of float64."""
    for name, whole in (("weight", path), ("bias", f"{path}.bias")):
        if whole in terms:
            held = getattr(module, name)
            base = torch.zeros(len(module.weight), dtype=torch.float64) if held is None else held.double()
            change = sum(float(weights[slot]) * delta.weight(base.float()).double() for delta, slot in terms[whole])
            setattr(module, name, nn.Parameter(base + change))


def merged_copy(module: nn.Module, path: str, terms: LiveTerms, weights: Tensor) -> Any:
    copied = copy.deepcopy(module).double()
    copied._forward_hooks.clear()
    merge(copied, path, terms, weights)
    return copied


def seen_by(module: Any, batch: int) -> Tensor:
    if isinstance(module, nn.Linear):
        return numbers(batch, 5, module.in_features, seed=9)
    if isinstance(module, nn.Conv2d):
        return numbers(batch, module.in_channels, 6, 7, seed=9)
    return numbers(batch, 32, 6, 32, seed=9)  # takes both norms


@torch.no_grad()
def check(path: str, terms: LiveTerms, weights: Tensor, dtype: torch.dtype = torch.float32, most: float = 1e-5) -> None:
    """A module's output for a batch of two times the rows, against the oracle's for each row."""
    module = copy.deepcopy(untouched()[path]).to(dtype)
    x = seen_by(module, 2 * len(weights)).to(dtype)
    plain = module(x)
    live = Live({path: module}, lambda wanted: parameter({path: module}, wanted))
    live.install(terms)
    live.weigh(weights)
    found = module(x)
    assert found.dtype == dtype
    for i, row in enumerate(itertools.chain(weights, weights)):
        expected = merged_copy(module, path, terms, row)(x[i : i + 1].double())
        assert (found[i : i + 1].double() - expected).abs().max() <= most * expected.abs().max().clamp(min=1)
        if row.any():
            assert (found[i] - plain[i]).abs().max() > 1e-3, "the changes can be seen"
        else:
            assert torch.equal(found[i], plain[i])


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("path", [LINEAR, CONV, DOWN, PROJECTION])
@pytest.mark.parametrize("law", LAWS)
def test_every_law_beside_a_module_does_what_it_does_merged(law: str, path: str, weights: Tensor):
    kernel = (3, 3) if path in (CONV, DOWN) else (1, 1) if path == PROJECTION else ()
    check(path, terms_of({path: law_for(law, *kernel)}, {path: law_for(law, *kernel)}), weights)
    check(path, terms_of({path: law_for(law, *kernel)}, {path: LAWS["lora"](*kernel)}), weights)


def law_for(law: str, *kernel: int) -> Delta:
    """Hadamard and OFTv2 of test_parameters know no kernel but 3x3; a pointwise convolution is a linear layer."""
    return LAWS[law](*(() if kernel == (1, 1) and law in ("loha", "oftv2") else kernel))


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("law", MORE)
def test_rarer_laws_too(law: str, weights: Tensor):
    check(LINEAR, terms_of({LINEAR: MORE[law]}, {LINEAR: LAWS["lora"]()}), weights)


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
def test_a_tucker_core_and_a_flattened_kernel_are_folded_into_down(weights: Tensor):
    flat = LowRank(numbers(4, 32 * 9), numbers(32, 4, seed=1), alpha=2.0)
    check(CONV, terms_of({CONV: TUCKER}, {CONV: flat}), weights)


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("path", [LINEAR, CONV])
def test_more_ranks_than_the_matrix_has(path: str, weights: Tensor):
    kernel = (3, 3) if path == CONV else ()
    first, second = (
        LowRank(numbers(24, 32, *kernel, seed=i), numbers(32, 24, *[1] * len(kernel), seed=i + 1), 2.0) for i in (0, 2)
    )
    check(path, terms_of({path: first}, {path: second}), weights)


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("path", [LINEAR, CONV, *NORMS])
def test_biases_come_beside_weights_missing_ones_too(path: str, weights: Tensor):
    first = {f"{path}.bias": Full(numbers(32)), path: Full(numbers(32, seed=2))}
    if path not in NORMS:
        first[path] = LAWS["lora"](*((3, 3) if path == CONV else ()))
    second = {f"{path}.bias": IA3(numbers(32, seed=1), on_input=False)}
    check(path, terms_of(first, second), weights)


@torch.no_grad()
@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
def test_a_time_embedding_has_no_tokens(weights: Tensor):
    pipeline = tiny_pipeline()
    module, x = modules_in(pipeline)[TIME], numbers(6, 64)
    deltas = [LowRank(numbers(4, 64), numbers(32, 4), 4.0), Full(numbers(32, 64))]
    terms = terms_of(*({TIME: delta} for delta in deltas))
    live_over(pipeline, terms, weights)
    for i, row in enumerate(weights.repeat(6 // len(weights), 1)):
        expected = merged_copy(module, TIME, terms, row)(x[i : i + 1].double())
        assert (module(x)[i : i + 1] - expected).abs().max() < 1e-5


def everything(pipeline: Any, seed: int) -> dict[str, Delta]:
    """Plain LoRA on every Linear and Conv2d; whole changes, of biases and norms too, on every third module."""
    deltas = dict(random_adapter(components_of(pipeline), seed=seed).deltas)
    for i, (path, module) in enumerate(modules_in(pipeline).items()):
        if i % 3 == seed % 3:
            deltas[path] = Full(numbers(*module.weight.shape, seed=i) / module.weight[0].numel() ** 0.5)
            deltas[f"{path}.bias"] = Full(numbers(len(module.weight), seed=i) * 0.3)
    return deltas


def inputs(kind: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of the UNet; every picture of the batch is another."""
    width = 64 if kind == "sdxl" else 32
    added = {"text_embeds": numbers(batch, 32, seed=3), "time_ids": numbers(batch, 6, seed=4)}
    context = {"added_cond_kwargs": added} if kind == "sdxl" else {}
    args = (numbers(batch, 4, 8, 8, seed=1) * 3, torch.full((batch,), 500), numbers(batch, 7, width, seed=2) * 3)
    return args, context


def picked(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {name: picked(one, i) for name, one in value.items()}
    value = value[i : i + 1]
    return value.double() if value.is_floating_point() else value


@torch.no_grad()
@pytest.mark.parametrize("weights", [UNIFORM, ROWS[:2]], ids=["uniform", "rows"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_whole_models_agree_with_the_merged_way(kind: str, weights: Tensor):
    pipeline = tiny_pipeline(kind)
    terms = terms_of(everything(pipeline, 1), everything(pipeline, 2))
    merged = []
    for row in weights:
        other = tiny_pipeline(kind)
        for part in components_of(other).values():
            part.double()
        for path, module in modules_in(other).items():
            merge(module, path, terms, row)
        merged.append(other)
    live_over(pipeline, terms, weights)
    args, context = inputs(kind, 4)
    found = pipeline.unet(*args, **context).sample
    for i in range(4):
        theirs = merged[i % len(weights)].unet(*(picked(arg, i) for arg in args), **picked(context, i)).sample
        assert (found[i] - theirs[0]).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
    ids = torch.arange(4)[:, None] + torch.arange(7)
    for name in components_of(pipeline).keys() - {"unet"}:
        said = getattr(pipeline, name)(ids)[0]
        for i in range(4):
            theirs = getattr(merged[i % len(weights)], name)(ids[i : i + 1])[0]
            assert (said[i] - theirs[0]).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@torch.inference_mode()
def test_rows_with_weights_of_their_own_equal_single_runs_in_the_order_of_guidance():
    pipeline = tiny_pipeline()
    ladder = torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.25, -1.0]])
    live = live_over(pipeline, terms_of(everything(pipeline, 1), everything(pipeline, 2)), ladder)
    args, _ = inputs("sd1", 6)  # three negatives, then three prompts
    together = pipeline.unet(*args).sample
    for i in range(6):
        live.weigh(ladder[i % 3 : i % 3 + 1])
        alone = pipeline.unet(*(arg[i : i + 1] for arg in args)).sample
        assert (together[i] - alone[0]).abs().max() < 1e-5 * alone.abs().max().clamp(min=1)


@torch.inference_mode()
def test_weights_of_zero_are_the_base_to_the_bit():
    pipeline = tiny_pipeline()
    args, _ = inputs("sd1", 4)
    base, state = pipeline.unet(*args).sample, state_of(pipeline)
    live = live_over(pipeline, terms_of(everything(pipeline, 1), everything(pipeline, 2)))
    assert torch.equal(pipeline.unet(*args).sample, base), "a slot without a weight counts 0"
    live.weigh(torch.ones(1, 2))
    changed = pipeline.unet(*args).sample
    live.weigh(torch.zeros(2, 2))
    assert torch.equal(pipeline.unet(*args).sample, base)
    live.weigh(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    mixed = pipeline.unet(*args).sample
    assert torch.equal(mixed[::2], base[::2]) and (mixed[1::2] - changed[1::2]).abs().max() < 1e-5 * changed.abs().max()
    live.weigh(torch.ones(1, 2))
    assert torch.equal(pipeline.unet(*args).sample, changed)
    live.clear()
    assert torch.equal(pipeline.unet(*args).sample, base) and same_state(pipeline, state)


def hooks_of(pipeline: Any) -> int:
    return sum(len(module._forward_hooks) for module in modules_in(pipeline).values())


def test_install_and_clear_leave_nothing_behind():
    pipeline = tiny_pipeline()
    state = state_of(pipeline)
    one, two = everything(pipeline, 1), {LINEAR: LAWS["lora"](), f"{LINEAR}.bias": Full(numbers(32))}
    live = live_over(pipeline, terms_of(one))
    assert set(live.paths) == set(one) and hooks_of(pipeline) > 100
    live.install(terms_of(two))
    assert set(live.paths) == set(two) and hooks_of(pipeline) == 1
    live.install({LINEAR: ()})
    assert live.paths == () and hooks_of(pipeline) == 0
    live.install(terms_of(one))
    live.clear()
    assert live.paths == () and hooks_of(pipeline) == 0 and same_state(pipeline, state)


def test_only_modules_whose_terms_change_are_made_anew():
    pipeline, asked = tiny_pipeline(), []
    modules = modules_in(pipeline)

    def base(path: str) -> Tensor | None:
        asked.append(path)
        return parameter(modules, path)

    live = Live(modules, base)
    scaled = IA3(numbers(32), on_input=False)
    terms: dict[str, Any] = {LINEAR: ((scaled, 0),), CONV: ((scaled, 0),), PROJECTION: ((LAWS["lora"](1, 1), 0),)}
    live.install(terms)
    assert asked == [LINEAR, CONV], "a law that does not need the base does not ask for it"
    live.install(dict(reversed(terms.items())))
    assert asked == [LINEAR, CONV]
    live.install({**terms, CONV: ((scaled, 1),)})
    assert asked == [LINEAR, CONV, CONV]
    live.install({**terms, CONV: ((scaled, 1),), f"{CONV}.bias": ((scaled, 1),)})
    assert asked == [LINEAR, CONV, CONV, CONV, f"{CONV}.bias"]


@torch.inference_mode()
def test_an_installation_that_fails_anywhere_leaves_the_base(monkeypatch):
    pipeline = tiny_pipeline()
    args, _ = inputs("sd1", 2)
    base, before = pipeline.unet(*args).sample, terms_of({LINEAR: LAWS["lora"](), CONV: LAWS["lora"](3, 3)})
    wanted = terms_of(
        random_adapter(components_of(pipeline), seed=1, suffix="attn1.to_k").deltas, {CONV: LAWS["oft"]()}
    )
    register = nn.Module.register_forward_hook
    for moment in range(2 * len(wanted)):
        live, calls = live_over(pipeline, before, torch.ones(1, 2)), itertools.count()

        def interrupted(module: nn.Module, hook: Any, moment: int = moment, calls: Any = calls) -> Any:
            call = next(calls)
            if call == moment // 2 and moment % 2 == 0:
                raise KeyboardInterrupt
            handle = register(module, hook)
            if call == moment // 2:
                raise SdloraError("no more memory")
            return handle

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "register_forward_hook", interrupted)
            with pytest.raises((KeyboardInterrupt, SdloraError)):
                live.install(wanted)
        assert live.paths == () and hooks_of(pipeline) == 0
    assert torch.equal(pipeline.unet(*args).sample, base)


def test_a_base_that_cannot_be_read_is_told_and_nothing_is_installed():
    def unreadable(path: str) -> Tensor | None:
        raise SdloraError(f"{path}: quantised")

    pipeline = tiny_pipeline()
    live = Live(modules_in(pipeline), unreadable)
    plain = {LINEAR: LAWS["lora"](), CONV: LAWS["loha"](3, 3), f"{LINEAR}.bias": Full(numbers(32))}
    live.install(terms_of(plain))
    assert set(live.paths) == set(plain), "linear laws need no base"
    with pytest.raises(SdloraError, match="conv1: quantised"):
        live.install(terms_of(plain, {CONV: LAWS["dora by output"](3, 3)}))
    assert live.paths == () and hooks_of(pipeline) == 0


def test_what_cannot_be_live_is_told():
    grouped = {"unet.c": nn.Conv2d(4, 4, 1, groups=2)}
    with pytest.raises(SdloraError, match=r"unet\.c: a convolution in groups"):
        Live(grouped, lambda path: None).install({"unet.c": ((Full(torch.zeros(4, 2, 1, 1)), 0),)})
    for delta in (LAWS["lora"](3, 3), LAWS["oft"]()):
        with pytest.raises(SdloraError, match="does not fit a weight of shape 32x64"):
            live_over(tiny_pipeline(), {TIME: ((delta, 0), (Full(numbers(1, 2)), 1))})


@torch.no_grad()
def test_a_batch_that_is_no_multiple_of_the_rows_is_refused():
    pipeline = tiny_pipeline()
    live_over(pipeline, terms_of({LINEAR: LAWS["lora"]()}), torch.tensor([[1.0], [0.5]]))
    with pytest.raises(SdloraError, match="2 pictures .* a batch of 3 came"):
        modules_in(pipeline)[LINEAR](numbers(3, 5, 32))


@torch.no_grad()
def counted(pipeline: Any, batch: int = 4) -> Any:
    """Operations of a step after the first, by name."""
    args, _ = inputs("sd1", batch)
    pipeline.unet(*args)
    with Operations() as mode:
        pipeline.unet(*args)
    names: Any = type(mode.counted)()
    for (name, _), count in mode.counted.items():
        names[name] += count
    return names


VIEWS = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "unsqueeze",
    "alias",
    "as_strided",
    "detach",
)  # no launches


@pytest.mark.parametrize("rows", [1, 2])
def test_eight_adapters_launch_what_one_launches(rows: int):
    pipeline = tiny_pipeline()
    parts, weights = {"unet": pipeline.unet}, torch.rand(rows, 8, generator=torch.Generator().manual_seed(0))
    base = counted(pipeline)
    adapters = [random_adapter(parts, seed=i, rank=1).deltas for i in range(8)]
    # The last convolution is so narrow that eight ranks are more than its matrix has: they would cost less than one.
    adapters = [{path: deltas[path] for path in deltas if path != "unet.conv_out"} for deltas in adapters]
    live = live_over(pipeline, terms_of(adapters[0]), weights)
    one = counted(pipeline)
    live.install(terms_of(*adapters))
    assert counted(pipeline) == one
    added = {name: count for name, count in (one - base).items() if name.overloadpacket.__name__ not in VIEWS}
    assert sum(added.values()) == (1 + rows) * len(adapters[0]), f"down, up, and the weights of the rows: {added}"
    assert torch.ops.aten._local_scalar_dense.default not in one, "nothing waits for the numbers"
    live.weigh(torch.zeros(rows, 8))
    assert counted(pipeline) == base


def test_more_ranks_than_the_matrix_has_are_applied_as_one_change():
    pipeline = tiny_pipeline()
    base = counted(pipeline)
    many = LowRank(numbers(24, 32), numbers(32, 24, seed=1), 2.0)
    live_over(pipeline, terms_of({LINEAR: many}), torch.ones(1, 1))
    added = {name.overloadpacket.__name__: count for name, count in (counted(pipeline) - base).items()}
    assert {name: count for name, count in added.items() if name not in VIEWS} == {"addmm_": 1}


@torch.no_grad()
def test_a_move_of_a_slider_costs_one_small_tensor_and_a_pass_over_up():
    pipeline = tiny_pipeline()
    deltas = random_adapter({"unet": pipeline.unet}, seed=1, rank=2).deltas
    live = live_over(pipeline, terms_of(deltas), torch.full((1, 1), 0.5))
    steady, (args, _) = counted(pipeline), inputs("sd1", 4)
    live.weigh(torch.full((1, 1), 0.6))
    with Operations() as mode:
        pipeline.unet(*args)
    assert mode.counted.total() - steady.total() <= len(deltas) + 20


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", [LINEAR, CONV, *NORMS])
def test_half_precision(path: str, dtype: torch.dtype, weights: Tensor):
    if path in NORMS:
        first, second = Full(numbers(32)), Full(numbers(32, seed=1))
    else:
        kernel = (3, 3) if path == CONV else ()
        first, second = LAWS["lora"](*kernel), LAWS["lokr"](*kernel)
    terms = terms_of({path: first, f"{path}.bias": Full(numbers(32, seed=3))}, {path: second})
    check(path, terms, weights, dtype, most=8 * torch.finfo(dtype).eps)


def test_lopsided_factors_neither_overflow_nor_vanish_in_float16():
    lopsided = LowRank(numbers(4, 32) * 1e6, numbers(32, 4, seed=1) * 1e-6, alpha=4.0)
    check(LINEAR, terms_of({LINEAR: lopsided}), torch.ones(1, 1), torch.float16, most=8e-3)


@torch.inference_mode()
def test_another_dtype_starts_from_the_factors_again():
    pipeline = tiny_pipeline()
    terms = terms_of({LINEAR: LAWS["lora"](), f"{LINEAR}.bias": Full(numbers(32))}, {LINEAR: LAWS["loha"]()})
    live_over(pipeline, terms, UNIFORM)
    module, x = modules_in(pipeline)[LINEAR], numbers(2, 5, 32)
    first = module(x)
    module.bfloat16()(x.bfloat16())
    module.float().weight.copy_(modules_in(tiny_pipeline())[LINEAR].weight)
    assert torch.equal(module(x), first)


@torch.inference_mode()
def test_channels_last_gives_the_same():
    outputs = []
    for form in (torch.contiguous_format, torch.channels_last):
        pipeline = tiny_pipeline()
        pipeline.unet.to(memory_format=form)
        live_over(pipeline, terms_of(everything(pipeline, 1), everything(pipeline, 2)), ROWS[:2])
        args, _ = inputs("sd1", 4)
        outputs.append(pipeline.unet(args[0].to(memory_format=form), *args[1:]).sample)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max().clamp(min=1)


@pytest.mark.parametrize("weights", [UNIFORM, ROWS], ids=["uniform", "rows"])
def test_gradients_pass_through(weights: Tensor):
    pipeline = tiny_pipeline()
    terms = terms_of({LINEAR: LAWS["lora"](), f"{LINEAR}.bias": Full(numbers(32))}, {LINEAR: LAWS["loha"]()})
    live_over(pipeline, terms, weights)
    module, batch = modules_in(pipeline)[LINEAR], len(weights)
    with torch.inference_mode():
        module(numbers(batch, 5, 32))  # what is kept from here on must serve autograd too
    x = numbers(batch, 5, 32).requires_grad_()
    module(x).square().sum().backward()
    for i, row in enumerate(weights):
        theirs = x[i].detach().double().requires_grad_()
        merged_copy(module, LINEAR, terms, row)(theirs).square().sum().backward()
        assert x.grad is not None and theirs.grad is not None
        assert (x.grad[i] - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()


@torch.inference_mode()
def test_a_base_that_is_stored_in_eight_bits_and_cast_layer_by_layer():
    pipeline, rounded = tiny_pipeline(), tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    held = [m.weight for m in modules_in(pipeline).values() if m.weight.dtype == torch.float8_e4m3fn]
    assert held
    theirs = modules_in(rounded)
    for path, module in modules_in(pipeline).items():
        theirs[path].weight.copy_(module.weight.float())
        if module.bias is not None:
            theirs[path].bias.copy_(module.bias.float())
    terms = terms_of(everything(rounded, 1), everything(rounded, 2))
    args, _ = inputs("sd1", 4)
    base = pipeline.unet(*args).sample
    live = live_over(pipeline, terms, ROWS[:2])
    live_over(rounded, terms, ROWS[:2])
    expected, found = rounded.unet(*args).sample, pipeline.unet(*args).sample
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    live.clear()
    assert torch.equal(pipeline.unet(*args).sample, base)


@torch.inference_mode()
def test_a_base_that_is_offloaded_layer_by_layer():
    from accelerate import cpu_offload

    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    assert modules_in(pipeline)[LINEAR].weight.is_meta
    terms = terms_of(everything(plain, 1), everything(plain, 2))
    args, _ = inputs("sd1", 4)
    live_over(pipeline, terms, ROWS[:2])
    live_over(plain, terms, ROWS[:2])
    expected = plain.unet(*args).sample
    assert torch.equal(pipeline.unet(*args).sample, expected)


def test_a_hook_of_somebody_else_stays():
    pipeline, seen = tiny_pipeline(), []
    module = modules_in(pipeline)[LINEAR]
    module.register_forward_hook(lambda *_: seen.append(1))
    live_over(pipeline, terms_of({LINEAR: LAWS["lora"]()}), torch.ones(1, 1)).clear()
    module(numbers(1, 5, 32))
    assert seen == [1]


def test_adapters_of_the_trainer_fit_as_they_are():
    """What random_adapter makes is what files hold: modules of every shape that the models have."""
    for kind in ("sd1", "sd2", "sdxl"):
        pipeline = tiny_pipeline(kind)
        adapter: Adapter = random_adapter(components_of(pipeline), seed=1)
        assert set(live_over(pipeline, terms_of(adapter.deltas)).paths) == set(adapter.deltas)
