"""Ways to damage a file, each of a draft, a place in it, and a number that chooses how."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from tests.formats.valid_files import MODULES, QUERY, Draft

Mutation = Callable[[Draft, int, int], None]

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
WIDTHS |= {"C64": 8, "F8_E8M0": 1, "F4": 1, "F33": 4, "": 1}  # bytes by dtype; of the last ones too much is wrong
SIZES = (0, 1, 2, 3, 4, 8, 9, 16, 20, 320, 768, 2**20, 2**62, -1)
ENDS = sorted({end for kind in MODULES.values() for parts in kind.values() for end in parts if end})
# fmt: off
NAMES = (
    "", ".", "alpha", ".alpha", "weight", "__metadata__", "a\nb", "\u202egpj", "\ud800", "bundle_emb.", "unet:0:up",
    "bundle_emb..clip_l", "x" * 600, "text_encoder:99999:up", "lora_unet_conv_in.diff", f"{QUERY}.lora_A.weight",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight", "unet/x.alpha", "emb_params",
)
BYTES = (
    b"\0", b"\xff\xff", b"\x7c\x00\x7c", b"\x00\x7e", b'"', b"{", b"}", b"[" * 2000, b"\n", b"9" * 400, b"\xf0\x9f",
)
TEXTS: tuple[Any, ...] = (
    "", "{", "[" * 5000, '{"a":' * 3000, "[]", "{}", "null", "9" * 5000, "NaN", "1e999", "x" * 99999, "\0\n\r",
    '{"a": {"b": 1e999}}', '{"a": {"b": NaN}}', '{"a": []}', '{"a": {"b": "c"}}', '{"a": null}', '"\\ud800"',
    '{"r": 0}', '{"unet.r": -1}', '{"unet.rank_pattern": {"(a+)+$": 1}}', '{"unet.lora_alpha": 1e30}',
    '{"rank_pattern": {"^(.*)*x": 4}}', '{"": 1, ".": {}}', '{"unet.r": "\\n"}', '["ResnetBlock2D"]',
    '["CLIPAttention", 1]', 7, None, ["a"], {"a": "b"},
)
FIELDS = (
    "lora_adapter_metadata", "ss_tag_frequency", "ss_base_model_version", "ss_v2", "modelspec.architecture", "<s1>",
    "modelspec.trigger_phrase", "ss_sd_model_name", "unet", "text_encoder", "ss_dataset_dirs", "a\nb",
)
SETTING = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "init_lora_weights",
    "feedforward_modules", "modules_to_save", "bias", "fan_in_fan_out", "trainable_token_indices", "block_share",
)
VALUES: tuple[Any, ...] = (
    None, 0, -1, 1e30, float("nan"), float("inf"), 10**400, "", "IA3", "LOKR", "OFT", True, [], [[]], {}, {"[": 1},
    {"(x+x+)+y": 4}, {"to_q": "a"}, {"": 1}, {"to_q": 0}, ["to_q", 3], "pissa", "(a|a)*b", [1e9], "\ud800\n",
)
# fmt: on
FILLS = (float("nan"), float("inf"), -float("inf"), 1e30, 65504.0, 0.0, -1.0, 1e-8)


def _at(draft: Draft, place: int) -> int:
    return place % len(draft.tensors)


def rename(draft: Draft, place: int, how: int) -> None:
    """To a strange name, or to that of another part of the same module."""
    if not draft.tensors:
        return
    key, *rest = draft.tensors[_at(draft, place)]
    names = [*NAMES, *(f"{key.split('.')[0]}.{end}" for end in ENDS)]
    draft.tensors[_at(draft, place)] = (names[how % len(names)], *rest)


def swap_names(draft: Draft, place: int, how: int) -> None:
    if draft.tensors:
        one, other = _at(draft, place), _at(draft, how)
        (first, *mine), (second, *its) = draft.tensors[one], draft.tensors[other]
        draft.tensors[one] = (second, *mine)
        draft.tensors[other] = (second if one == other else first, *its)


def repeat(draft: Draft, place: int, how: int) -> None:
    """Under the same name, or as another part of another module."""
    if draft.tensors:
        draft.tensors.insert(_at(draft, how), draft.tensors[_at(draft, place)])
        if how % 2:
            rename(draft, how, place)


def drop(draft: Draft, place: int, how: int) -> None:
    if draft.tensors:
        del draft.tensors[_at(draft, place) : _at(draft, place) + 1 + how % 3]


def dtype(draft: Draft, place: int, how: int) -> None:
    """Another dtype, with the bytes that it needs or with those that are there."""
    if draft.tensors:
        key, old, shape, content = draft.tensors[_at(draft, place)]
        new = list(WIDTHS)[how % len(WIDTHS)]
        needed = len(content) // WIDTHS[old] * WIDTHS[new]
        kept = content if how // len(WIDTHS) % 2 else (content * 8)[:needed]
        draft.tensors[_at(draft, place)] = (key, new, shape, kept)


def shape(draft: Draft, place: int, how: int) -> None:
    """Axes changed, added, taken away or reversed, with the bytes that these need or with those that are there."""
    if not draft.tensors:
        return
    key, kind, old, content = draft.tensors[_at(draft, place)]
    size = SIZES[how % len(SIZES)]
    axis = how // 16 % (len(old) or 1)
    forms = (
        [*old[:axis], size, *old[axis + 1 :]],
        [*old, size],
        old[:axis] + old[axis + 1 :],
        old[::-1],
        [*old, *[1] * (how // 64 % 9)],
        [size],
    )
    new, needed = forms[how // 256 % len(forms)], WIDTHS[kind]
    for each in new:
        needed *= each
    honest = 0 <= needed <= 300_000 and how // 2048 % 4
    draft.tensors[_at(draft, place)] = (
        key,
        kind,
        new,
        (content or b"\0").ljust(needed, b"\x11")[:needed] if honest else content,
    )


def values(draft: Draft, place: int, how: int) -> None:
    """One number of a tensor, or all, by the dtype it has."""
    if draft.tensors:
        key, kind, form, content = draft.tensors[_at(draft, place)]
        types = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}
        if kind in types and content and len(content) % WIDTHS[kind] == 0:
            numbers = torch.frombuffer(bytearray(content), dtype=types[kind])
            numbers[how % len(numbers) if how % 3 else slice(None)] = FILLS[how % len(FILLS)]
            draft.tensors[_at(draft, place)] = (key, kind, form, numbers.view(torch.uint8).numpy().tobytes())


def metadata(draft: Draft, place: int, how: int) -> None:
    draft.metadata[FIELDS[place % len(FIELDS)]] = TEXTS[how % len(TEXTS)]


def config(draft: Draft, place: int, how: int) -> None:
    """A setting of PEFT, beside the file or in its metadata; or all of them replaced by a text."""
    value = VALUES[how % len(VALUES)]
    name = SETTING[place % len(SETTING)]
    if draft.config is None:
        told = json.dumps({f"unet.{name}": value})
        draft.metadata["lora_adapter_metadata"] = told
    elif how % 5 == 0:
        draft.config = str(TEXTS[how % len(TEXTS)])
    else:
        draft.config = draft.config[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}"


def flip(draft: Draft, place: int, how: int) -> None:
    def change(file: bytearray) -> None:
        if file:
            file[place % len(file)] ^= 1 << how % 8

    draft.raw.append(change)


def flip_head(draft: Draft, place: int, how: int) -> None:
    flip(draft, place % 1500, how)


def cut(draft: Draft, place: int, how: int) -> None:
    def change(file: bytearray) -> None:
        start = place % (len(file) + 1)
        del file[start : None if how % 2 else start + how % 300]

    draft.raw.append(change)


def insert(draft: Draft, place: int, how: int) -> None:
    def change(file: bytearray) -> None:
        start = place % (1500 if how % 2 else len(file) + 1)
        file[start:start] = BYTES[how % len(BYTES)]

    draft.raw.append(change)


def swap_bytes(draft: Draft, place: int, how: int) -> None:
    def change(file: bytearray) -> None:
        one, other = place % (len(file) + 1), how * 37 % (len(file) + 1)
        file[one : one + 8], file[other : other + 8] = file[other : other + 8], file[one : one + 8]

    draft.raw.append(change)


MUTATIONS: tuple[Mutation, ...] = (rename, swap_names, repeat, drop, dtype, shape, values, metadata, config)
MUTATIONS += (flip, flip_head, cut, insert, swap_bytes)
