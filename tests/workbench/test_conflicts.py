"""Conflicts held against whole deltas in float64, put together by hand."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora import toybox
from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1
from sdlora.formats.architectures import toybox as toybox_architecture
from sdlora.formats.checkpoints import Checkpoint, open_checkpoint
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import IA3, Delta, Full, LowRank
from sdlora.mixing.tokens import learned
from sdlora.workbench.conflicts import at_present_size, clashing, conflicts
from tests.workbench.pairs import DOWN, MODULES, TEXT, VALUE, low_rank, saved, scaled, told


def whole(delta: Delta, module: str) -> Tensor:
    return delta.weight(torch.zeros(toybox_architecture().shapes[module])).double().flatten(1)


def correlation(one: Tensor, other: Tensor) -> float:
    one, other = (both - both.trace() / len(both) * torch.eye(len(both)) for both in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(toybox.path())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, LowRank], dict[str, LowRank], list[Path]]:
    """Two adapters that share some directions, and their files; the second leaves one module alone."""
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES)}
    second = {
        module: LowRank(
            torch.cat([delta.down, low_rank(module, 20 + i).down]),
            torch.cat([-0.5 * delta.up, low_rank(module, 20 + i).up], 1),
            3.0,
        )
        for i, (module, delta) in enumerate(first.items())
        if module != f"{DOWN}.{VALUE}"
    }
    return first, second, [saved(tmp_path / "A.safetensors", first), saved(tmp_path / "B.safetensors", second)]


def test_blocks_are_put_together_as_the_whole_deltas_are(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]],
) -> None:
    first, second, files = pair
    found = conflicts(files).pairs[0]
    groups = {
        "IN01": MODULES[:2],
        "M00": MODULES[2:3],
        "OUT00": MODULES[3:4],
        "text_encoder": MODULES[4:],
        "all": MODULES,
    }
    assert [block.name for block in (*found.blocks, found.whole)] == list(groups)
    for block in (*found.blocks, found.whole):
        modules = groups[block.name]
        ones = [whole(first[module], module) for module in modules]
        others = [
            whole(second[one], one) if one in second else torch.zeros_like(whole(first[one], one)) for one in modules
        ]
        norms = [float(torch.cat([one.flatten() for one in side]).norm()) for side in (ones, others)]
        assert block.norms == pytest.approx(norms, rel=1e-5) and block.relative == (None, None)
        inner = sum(float((one * other).sum()) for one, other in zip(ones, others, strict=True))
        assert block.cosine == pytest.approx(inner / (norms[0] * norms[1]), rel=1e-4)
        columns = rows = 0.0
        for one, other in zip(ones, others, strict=True):
            if other.any():
                weight = float(one.norm() * other.norm()) / (norms[0] * norms[1])
                columns += weight * correlation(one @ one.T, other @ other.T)
                rows += weight * correlation(one.T @ one, other.T @ other)
        assert (block.columns, block.rows) == pytest.approx((columns, rows), rel=1e-4)
    assert [component.name for component in found.components] == ["unet", "text_encoder"]
    squares = [block.norms[0] ** 2 for block in found.blocks[:3]]
    assert found.components[0].norms[0] == pytest.approx(sum(squares) ** 0.5)


def test_sizes_are_told_against_the_parameters_that_are_changed(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]], base: Checkpoint
) -> None:
    _, second, files = pair
    found = conflicts(files, base)
    assert found.base == base.path
    for which, modules in enumerate((MODULES, tuple(second))):
        weights = torch.cat([base.tensor(module).double().flatten() for module in modules])
        wanted = found.adapters[which].norm / float(weights.norm())
        assert found.adapters[which].relative == pytest.approx(wanted, rel=1e-6)
        assert found.pairs[0].whole.relative[which] == pytest.approx(wanted, rel=1e-6)
    block = found.pairs[0].blocks[0]
    query = float(base.tensor(MODULES[0]).double().norm())
    assert block.name == "IN01" and block.relative[1] == pytest.approx(block.norms[1] / query, rel=1e-6)


def test_only_what_is_changed_is_read_of_the_base_and_only_once(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]],
    base: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, second, files = pair
    cache = tmp_path / "cache" / "norms.json"
    read: list[str] = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, parameter: read.append(parameter) or tensor(self, parameter))
    once = saved(tmp_path / "C.safetensors", {module: second[module] for module in MODULES[2:4]})
    conflicts([once, once], base, cache=cache)
    assert sorted(read) == sorted(MODULES[2:4])
    read.clear()
    first_time = conflicts(files, base, cache=cache)
    assert sorted(read) == sorted({*MODULES} - {*MODULES[2:4]})
    read.clear()
    assert conflicts(files, base, cache=cache).as_dict() == first_time.as_dict()
    assert not read


def test_a_base_that_has_changed_is_read_again(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json"):
        (model / part).parent.mkdir(parents=True, exist_ok=True)
        (model / part).write_bytes((toybox.path() / part).read_bytes())
    cache = tmp_path / "norms.json"
    before = conflicts(pair[2], open_checkpoint(model), cache=cache)
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    after = conflicts(pair[2], open_checkpoint(model), cache=cache)
    unet = [found.pairs[0].components[0].relative[0] or 0 for found in (before, after)]
    assert unet[1] == pytest.approx(unet[0] / 2, rel=1e-4)
    assert before.pairs[0].components[1].relative == after.pairs[0].components[1].relative
    cache.write_text('{"format": 1')
    assert conflicts(pair[2], open_checkpoint(model), cache=cache).as_dict() == after.as_dict()
    told = json.loads(cache.read_text())
    told["files"] = {file: {**entry, "norms": {MODULES[0]: "many"}} for file, entry in told["files"].items()}
    cache.write_text(json.dumps(told))
    assert conflicts(pair[2], open_checkpoint(model), cache=cache).as_dict() == after.as_dict()


@pytest.mark.parametrize("with_base", [False, True])
def test_at_the_equalised_weights_all_have_one_size(tmp_path: Path, base: Checkpoint, with_base: bool) -> None:
    model = base if with_base else None
    sizes = (1.0, 0.2, 5.0)
    adapters = [{module: low_rank(module, i, size=size) for module in MODULES[i:]} for i, size in enumerate(sizes)]
    files = [saved(tmp_path / f"{i}.safetensors", dict(deltas)) for i, deltas in enumerate(adapters)]
    weights = conflicts(files, model).equalised
    assert weights is not None and torch.tensor(weights).log().sum() == pytest.approx(0, abs=1e-6)
    for path, deltas, weight in zip(files, adapters, weights, strict=True):
        saved(path, {module: scaled(delta, weight) for module, delta in deltas.items()})
    again = conflicts(files, model)
    assert again.equalised == pytest.approx((1, 1, 1), rel=1e-4)
    equal = [one.relative if with_base else one.norm for one in again.adapters]
    assert equal == pytest.approx([equal[0]] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("equalised", "now", "wanted"),
    [
        ((2.0, 0.5), (0.8, 0.2), (0.8, 0.2)),  # of one size already
        ((1.0, 1.0), (-0.8, 0.8), (-0.8, 0.8)),
        ((2.0, 0.5), (-0.4, -0.4), (-0.8, -0.2)),
        ((4.0, 0.25), (1.0, 1.0), (2.0, 0.125)),  # a slider ends at 2
        ((400.0, 1 / 400), (0.8, 0.8), (2.0, 1.25e-5)),
        ((2.0, 0.5), (0.0, -3.0), (2.0, -0.5)),
    ],
)
def test_equalised_weights_keep_the_mean_and_the_signs_of_those_that_are_set(
    equalised: tuple[float, ...], now: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    assert at_present_size(equalised, now, 2.0) == pytest.approx(wanted, rel=5e-3)


def test_tokens_that_both_teach_are_named(tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        vectors = torch.full((1, 128), float(seed > 0))
        adapter = Adapter({TEXT: low_rank(TEXT, seed)}, {}, {"<zib>": {"text_encoder": vectors}})
        files.append(tmp_path / f"{seed}.safetensors")
        write(adapter, files[-1], "kohya")
    first, second, third = conflicts(files).pairs
    assert first.tokens == second.tokens == ("<zib>",) and third.tokens == ()  # the last two teach it alike
    assert first.advice.startswith("0 and 1 both teach <zib>: only one of them can be loaded")


@pytest.mark.parametrize(
    ("ours", "theirs", "clash"),
    [
        ({"Tok": {"text_encoder": 1.0}}, {"tok": {"text_encoder": 2.0}}, ("Tok",)),
        ({"Tok": {"text_encoder": 1.0}}, {"tOK": {"text_encoder": 1.0}}, ()),
        ({"tok": {"text_encoder": 1.0}}, {"tok": {"text_encoder": 1.0, "text_encoder_2": 1.0}}, ("tok",)),
        ({"tok": {"text_encoder": 1.0}}, {"token": {"text_encoder": 2.0}}, ()),
    ],
)
def test_tokens_clash_where_the_mixer_refuses_both(ours: Any, theirs: Any, clash: tuple[str, ...]) -> None:
    one, other = (
        Adapter(
            {}, {}, {token: {on: torch.full((1, 8), value) for on, value in by.items()} for token, by in all.items()}
        )
        for all in (ours, theirs)
    )
    with pytest.raises(SdloraError) if clash else nullcontext():
        learned({"one": one, "other": other})
    assert clashing(one, other) == clash


def test_folders_with_the_same_weights_and_other_alphas_are_two(tmp_path: Path) -> None:
    """A PEFT folder's config counts as its weights do."""
    one, other, again = (tmp_path / name for name in ("one", "other", "again"))
    write(Adapter({module: low_rank(module, i) for i, module in enumerate(MODULES[:4])}), one, "peft")
    for copy in (other, again):
        shutil.copytree(one, copy)
    config = other / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 1.5', '"lora_alpha": 3'))
    first, second = (found.norm for found in conflicts([one, other]).adapters)
    assert second == pytest.approx(2 * first)
    assert "are the same file" not in conflicts([one, other]).pairs[0].advice
    assert "are the same file" in conflicts([one, again]).pairs[0].advice


def test_the_same_file_twice_is_said(pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]]) -> None:
    found = conflicts([pair[2][0], pair[2][0]])
    assert [one.label for one in found.adapters] == ["A (1)", "A (2)"]
    assert "are the same file" in found.pairs[0].advice
    assert found.pairs[0].whole.cosine == pytest.approx(1) and found.equalised == pytest.approx((1, 1))


def test_names_that_are_alike_get_their_folder_and_long_ones_lose_their_middle(tmp_path: Path) -> None:
    files = []
    for place in ("one/style", "two/style", f"two/{'x' * 90}-end"):
        path = tmp_path / f"{place}.safetensors"
        path.parent.mkdir(exist_ok=True)
        files.append(saved(path, {TEXT: low_rank(TEXT, len(files))}))
    labels = [one.label for one in conflicts(files).adapters]
    assert labels[:2] == ["one/style", "two/style"] and labels[2].endswith("x-end") and len(labels[2]) <= 40


def test_three_are_compared_two_by_two(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{i}.safetensors", {TEXT: low_rank(TEXT, i)}) for i in range(3)]
    assert [(pair.first, pair.second) for pair in conflicts(files).pairs] == [(0, 1), (0, 2), (1, 2)]


def test_the_closest_is_the_parameter_of_the_largest_inner_product(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]],
) -> None:
    first, second, files = pair
    closest = conflicts(files).pairs[0].closest
    assert closest is not None
    inner = {
        module: abs(float((whole(first[module], module) * whole(second[module], module)).sum())) for module in second
    }
    assert closest.parameter == max(inner, key=inner.__getitem__)
    columns = [torch.linalg.qr(deltas[closest.parameter].up.double()).Q for deltas in (first, second)]
    cosines = torch.linalg.svdvals(columns[0].T @ columns[1]).clamp(max=1)
    assert len(closest.columns) == 3
    assert closest.columns == pytest.approx(torch.rad2deg(torch.acos(cosines)).tolist(), abs=0.1)


def test_biases_and_norms_have_a_size_and_a_cosine_and_no_overlap(tmp_path: Path) -> None:
    norm = f"{DOWN}.norm"
    width = toybox_architecture().norms[norm][0]
    one, other = torch.ones(width), torch.ones(width)
    other[: width // 2] = -1 / 3
    found = told(tmp_path, {norm: Full(one)}, {norm: Full(other)}).pairs[0]
    assert found.whole.cosine == pytest.approx(float(one @ other / (one.norm() * other.norm())))
    assert found.whole.columns is None and found.whole.rows is None and found.closest is None


def test_what_depends_on_the_base_is_named_where_there_is_none(tmp_path: Path, base: Checkpoint) -> None:
    width = toybox_architecture().shapes[MODULES[0]][0]
    scaling = IA3(torch.linspace(-0.5, 0.5, width), False)
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES)}
    second = {MODULES[0]: scaling, TEXT: low_rank(TEXT, 9)}
    found = told(tmp_path, first, second)
    assert list(found.adapters[1].unmeasured) == [MODULES[0]] and not found.adapters[0].unmeasured
    assert "give that model" in found.adapters[1].unmeasured[MODULES[0]]
    assert found.equalised is None and "give that model" in found.why_not
    assert found.pairs[0].advice.endswith("1 of their changes could not be measured")
    only = found.pairs[0]
    assert only.whole.norms[1] == pytest.approx(float(whole(second[TEXT], TEXT).norm()), rel=1e-4)  # type: ignore[arg-type]
    found = told(tmp_path, first, second, base)
    weight = base.tensor(MODULES[0]).double()
    change = weight * scaling.vector.double()[:, None]
    delta = whole(first[MODULES[0]], MODULES[0])
    block = found.pairs[0].blocks[0]
    assert not found.adapters[1].unmeasured and found.equalised is not None
    assert block.norms[1] == pytest.approx(float(change.norm()), rel=1e-5)
    inner = float((delta * change).sum())
    assert block.cosine == pytest.approx(inner / (block.norms[0] * block.norms[1]), rel=1e-3)


def test_loras_of_two_architectures_are_refused_with_the_evidence(tmp_path: Path) -> None:
    small = saved(tmp_path / "small.safetensors", {module: low_rank(module, i) for i, module in enumerate(MODULES)})
    key = f"{DOWN}.{VALUE}"
    out, into = sd1().shapes[key]
    other = saved(tmp_path / "large.safetensors", {key: LowRank(torch.ones(2, into), torch.ones(out, 2), 2.0)})
    with pytest.raises(
        SdloraError, match=r"small\.safetensors is for toybox .*large\.safetensors is for SD 1\.x \(.*768"
    ):
        conflicts([small, other])
    with pytest.raises(SdloraError, match="two files or more"):
        conflicts([small])
    with pytest.raises(SdloraError, match=r"small.* is for toybox .*large.* is for SD 1\.x"):
        conflicts([small, small, other])


def test_with_partial_what_fits_of_another_model_is_compared(tmp_path: Path) -> None:
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES)}
    small = saved(tmp_path / "small.safetensors", first)
    foreign = {f"unet.down_blocks.{i}.attentions.{j}.{VALUE}": None for i in (0, 1, 2) for j in (0, 1)}
    deltas: dict[str, Any] = {
        key: LowRank(torch.ones(2, sd1().shapes[key][1]), torch.ones(sd1().shapes[key][0], 2), 2.0) for key in foreign
    }
    other = saved(tmp_path / "other.safetensors", {**deltas, MODULES[0]: first[MODULES[0]]})
    with pytest.raises(SdloraError):
        conflicts([small, other])
    found = conflicts([small, other], partial=True)
    assert found.pairs[0].blocks[0].cosine is not None and found.adapters[1].receipt.misfit


def test_a_cache_that_cannot_be_written_does_no_harm(
    pair: tuple[dict[str, LowRank], dict[str, LowRank], list[Path]], base: Checkpoint
) -> None:
    assert conflicts(pair[2], base, cache=pair[2][0] / "norms.json").equalised
