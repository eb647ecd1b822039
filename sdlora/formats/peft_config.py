"""What PEFT says of an adapter beside its tensors: adapter_config.json, and what diffusers puts into metadata of it.

Scales are told there alone. Whatever else in it changes numbers is told, or refused with the reason. Nothing in it is
followed: no path, no name of a model, and no regular expression that could take for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sdlora.errors import SdloraError

KEY = "lora_adapter_metadata"  # of safetensors metadata
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
MEND = "save it again with peft"
LONGEST = 4 * 2**20  # characters of a config
LARGEST = 1e12  # of any number in it
MOST_EXPRESSIONS = 200  # patterns that are more than the end of a path
MOST_BRANCHES = 64  # ways through one pattern

_INITS = ("gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: these leave the base as it was
# Settings that, if set, make a file something else than factors for the base as it is.
_REFUSED = {
    "layer_replication": "repeats layers of the base",
    "use_qalora": "pools inputs for a quantised base",
    "alora_invocation_tokens": "counts from certain tokens on only",
    "use_bdlora": "keeps blocks of its factors only",
    "arrow_config": "chooses between adapters as it runs",
    "kasa_config": "takes a part out of the base",
    "monteclora_config": "draws its factors at random",
    "coft": "is projected anew at each use (COFT)",
}
_PLAIN = re.compile(r"[\w./-]+")
_TOKEN = re.compile(r"\\[.-]|(?:\\d|\[0-9\])\+?|\[[\w-]+\]|\((?:\?:)?|\)|\||[\w.-]")


@dataclass(frozen=True)
class Expression:
    """A pattern that is more than a name, made safe: nothing in it can be matched in more than a few ways."""

    regex: re.Pattern[str]
    anchored: bool

    def ends(self, module: str) -> bool:
        """Whether it matches the whole of the module's path, or, unless anchored, the end of it behind a dot."""
        ends = (module,) if self.anchored else _ends(module)
        return any(self.regex.fullmatch(end) for end in ends)


@dataclass(frozen=True)
class Patterns:
    """Values for the modules that a pattern names, by the rule of peft: the first counts that a path ends with.

    whole, ends: for plain names, the place of the pattern in the list and its value; expressions: the same for others.
    A dot in a pattern is a dot.
    """

    whole: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    ends: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    expressions: tuple[tuple[int, float, Expression], ...] = ()

    def find(self, module: str) -> float | None:
        """The value for a module, by its path within the model; None if no pattern names it."""
        found = [self.whole[module]] if module in self.whole else []
        if self.ends:
            found += [self.ends[end] for end in _ends(module) if end in self.ends]
        found += [(place, value) for place, value, expression in self.expressions if expression.ends(module)]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class PeftConfig:
    """The settings of one adapter that bear on its numbers.

    kind: LORA, LOHA, LOKR, OFT, BOFT or IA3. rank, alpha: of modules that no pattern names.
    rslora: alpha counts by the root of the rank. fan_in_fan_out: of layers that Stable Diffusion does not have.
    lora_bias: lora_B has biases. bias: "none", or which of the base's biases were trained and are in the file whole.
    modules_to_save: whole modules in the file. trainable_tokens: by module, the tokens whose embeddings are in it.
    feedforward: ends of the paths of modules whose inputs (IA)^3 scales, not outputs; feedforward_paths: the same by an
    expression for whole paths.
    series: of OFT, the factors of Q, Q^2, ... in its rotation R = I + ..., None for Cayley's formula itself.
    block_share: of OFT, one rotation for all blocks.
    base: the model that it was trained on, to be shown.
    """

    kind: str
    rank: int
    alpha: float
    rank_pattern: Patterns = Patterns()
    alpha_pattern: Patterns = Patterns()
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    feedforward: tuple[str, ...] = ()
    feedforward_paths: Expression | None = None
    series: tuple[float, ...] | None = None
    block_share: bool = False
    base: str = ""

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha with which alpha / rank is the scale of a module's factors.

        module: its path within the model, as peft saw it: no component, no "base_model.model."; rank: of its factors.
        """
        if self.kind not in ("LORA", "LOHA", "LOKR"):
            return float(rank)
        alpha = self._alpha(module)
        if self.kind != "LORA":
            return self.scale_of(module) * rank
        return alpha * rank**0.5 if self.rslora else alpha  # rsLoRA (arXiv:2312.03732): the scale is alpha / sqrt(rank)

    def scale_of(self, module: str) -> float:
        """The scale by the config alone, for factors that have no rank: peft scales a whole LoKr by alpha / r too."""
        if self.kind not in ("LORA", "LOHA", "LOKR"):
            return 1.0
        rank = self.rank_pattern.find(module) or self.rank
        return self._alpha(module) / (rank**0.5 if self.rslora else rank)

    def is_feedforward(self, module: str) -> bool:
        """Whether (IA)^3 scales the inputs of a module; else its outputs, and its bias with them."""
        by_path = self.feedforward_paths is not None and self.feedforward_paths.regex.fullmatch(module) is not None
        return by_path or module.endswith(self.feedforward)

    def _alpha(self, module: str) -> float:
        special = self.alpha_pattern.find(module)
        return self.alpha if special is None else special


def parse(config: str | Mapping[str, Any], where: str) -> PeftConfig:
    """The config in a text (adapter_config.json) or a mapping of its fields; where: the file, for errors.

    SdloraError: damaged, of wrong types, of a law that is not known, or of a training that changed the base as well.
    """
    fields = _loaded(config, where) if isinstance(config, str) else config
    kind = _text(fields, "peft_type", where, "LORA").upper()
    if kind not in KINDS:
        raise SdloraError(f"{where}: {kind[:40]!r} adapters are not known; train it as one of {', '.join(KINDS)}")
    _refuse_changed_base(fields, where)
    feedforward = fields.get("feedforward_modules") or ()
    expression = _expression(feedforward, "feedforward_modules", where) if isinstance(feedforward, str) else None
    found = PeftConfig(
        kind=kind,
        rank=int(_number(fields, "r", where, 8, whole=True)),
        alpha=_number(fields, "lora_alpha" if kind == "LORA" else "alpha", where, 8),
        rank_pattern=_patterns(fields, "rank_pattern", where, whole=True),
        alpha_pattern=_patterns(fields, "alpha_pattern", where),
        rslora=kind == "LORA" and _flag(fields, "use_rslora", where),
        dora=_flag(fields, "use_dora", where),
        fan_in_fan_out=_flag(fields, "fan_in_fan_out", where),
        lora_bias=_flag(fields, "lora_bias", where),
        bias=_text(fields, "bias", where, "none"),
        modules_to_save=_names(fields, "modules_to_save", where),
        trainable_tokens=_tokens(fields, where),
        feedforward=() if expression else _names(fields, "feedforward_modules", where),
        feedforward_paths=expression,
        series=_series(fields, where) if kind == "OFT" else None,
        block_share=_flag(fields, "block_share", where),
        base=_text(fields, "base_model_name_or_path", where, "")[:500],
    )
    if not found.rank and kind in ("LORA", "LOHA", "LOKR"):
        raise SdloraError(f"{where}: r is 0, which is no rank; {MEND}")
    return found


def by_component(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """The configs that diffusers puts into the metadata, {} if there is none: unet.r, text_encoder.lora_alpha, ...

    Fields without a component are the UNet's: a model that is saved alone has them so. SdloraError as `parse`.
    """
    if KEY not in metadata:
        return {}
    where = f"{where}: {KEY}"
    components: dict[str, dict[str, Any]] = {}
    for key, value in _loaded(metadata[KEY], where).items():
        component, dot, name = key.partition(".")
        components.setdefault(component if dot else "unet", {})[name if dot else key] = value
    return {component: parse(fields, f"{where} of {component[:40]!r}") for component, fields in components.items()}


def _loaded(text: str, where: str) -> Mapping[str, Any]:
    if len(text) > LONGEST:
        raise SdloraError(f"{where} has {len(text)} characters, which no config needs; {MEND}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SdloraError(f"{where} is damaged ({' '.join(str(error).split())[:100]}); {MEND}") from error
    if not isinstance(found, dict):
        raise SdloraError(f"{where} is damaged (it holds no settings by name); {MEND}")
    return found


def _refuse_changed_base(fields: Mapping[str, Any], where: str) -> None:
    init = fields.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)):
        raise SdloraError(
            f"{where}: {_shown(init)} changed the base as well when it began, so it is no LoRA for the base as it is; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    for name, reason in _REFUSED.items():
        if fields.get(name):
            raise SdloraError(f"{where}: {name} is set, so the adapter {reason}; train it without")


def _wrong(name: str, value: Any, wanted: str, where: str) -> SdloraError:
    return SdloraError(f"{where}: {name} is {_shown(value)} where {wanted} is wanted; {MEND}")


def _shown(value: Any) -> str:
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # deep, or an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."


def _value(value: Any, name: str, where: str, whole: bool) -> float:
    wanted = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise _wrong(name, value, wanted, where)
    if not -LARGEST <= value <= LARGEST or not isfinite(value) or (whole and value < 0):
        raise _wrong(name, value, f"{wanted} of a sensible size", where)
    return float(value)


def _number(fields: Mapping[str, Any], name: str, where: str, default: float, whole: bool = False) -> float:
    value = fields.get(name)
    return default if value is None else _value(value, name, where, whole)


def _flag(fields: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise _wrong(name, value, "true or false", where)
    return default if value is None else value


def _text(fields: Mapping[str, Any], name: str, where: str, default: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str | None):
        raise _wrong(name, value, "a text", where)
    return value or default


def _names(fields: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = fields.get(name) or ()
    if not isinstance(value, list | tuple | set) or not all(isinstance(one, str) and one for one in value):
        raise _wrong(name, value, "a list of names", where)
    return tuple(sorted(value))


def _tokens(fields: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    value = fields.get("trainable_token_indices") or {}
    by_module = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict) or not all(isinstance(tokens, list) for tokens in by_module.values()):
        raise _wrong("trainable_token_indices", value, "a list of tokens", where)
    name = "trainable_token_indices"
    return {
        module: tuple(int(_value(token, name, where, whole=True)) for token in tokens)
        for module, tokens in by_module.items()
    }


def _series(fields: Mapping[str, Any], where: str) -> tuple[float, ...] | None:
    """OFT's rotation as peft 0.21 computes it (oft/layer.py). Before 0.18, which first told its version, all are 2."""
    if not _flag(fields, "use_cayley_neumann", where, True):
        return None
    terms = int(_number(fields, "num_cayley_neumann_terms", where, 5, whole=True))
    if terms > 100:
        raise _wrong("num_cayley_neumann_terms", terms, "a small number", where)
    if terms < 3 or "peft_version" not in fields:
        return (2.0,) * max(terms - 1, 0)
    return (2.0,) * (max(terms, 4) - 2) + (1.0,)


def _patterns(fields: Mapping[str, Any], name: str, where: str, whole: bool = False) -> Patterns:
    given = fields.get(name) or {}
    if not isinstance(given, dict):
        raise _wrong(name, given, "a number by pattern", where)
    wholes: dict[str, tuple[int, float]] = {}
    ends: dict[str, tuple[int, float]] = {}
    expressions = []
    for place, (pattern, value) in enumerate(given.items()):
        number = _value(value, f"{name} of {_shown(pattern)}", where, whole)
        if whole and not number:
            raise _wrong(f"{name} of {_shown(pattern)}", value, "a rank", where)
        plain = _plain(pattern)
        if plain is None:
            expressions.append((place, number, _expression(pattern, name, where)))
        else:
            (wholes if pattern.startswith("^") else ends).setdefault(plain, (place, number))
    if len(expressions) > MOST_EXPRESSIONS:
        raise SdloraError(f"{where}: {name} has {len(expressions)} expressions; write the names of modules instead")
    return Patterns(wholes, ends, tuple(expressions))


def _plain(pattern: str) -> str | None:
    """The name that a pattern is, if it is no more than that."""
    name = re.sub(r"\\([./-])", r"\1", pattern.removeprefix("^").removesuffix("$"))
    return name if _PLAIN.fullmatch(name) else None


def _expression(pattern: str, name: str, where: str) -> Expression:
    """A pattern of names, dots, digits, classes and alternatives, in which no part can be read in many ways."""
    body = pattern.removeprefix("^").removesuffix("$")
    tokens = _TOKEN.findall(body)
    source = _source(tokens) if tokens and "".join(tokens) == body else None
    if source is None:
        raise SdloraError(
            f"{where}: {name} has the pattern {_shown(pattern)}, which could take for ever to match; "
            r"write the ends of names, such as attn1.to_q, with \d, [kqv] and (a|b) at most"
        )
    try:
        return Expression(re.compile(source), pattern.startswith("^"))
    except re.error as error:
        raise SdloraError(f"{where}: {name} has a damaged pattern {_shown(pattern)} ({error}); {MEND}") from error


def _source(tokens: list[str]) -> str | None:
    """The tokens as a regular expression; None if it could be matched in more than MOST_BRANCHES ways."""
    inside, inner, outer, groups = False, 1, 1, 1  # alternatives in this group, outside of groups, of all groups
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token.startswith("(") == inside and token[0] in "()":
            return None
        if token[0] in "()":
            groups, inner, inside = groups * inner, 1, not inside
        elif token == "|":
            inner, outer = inner + inside, outer + (not inside)
        elif token.endswith("+") and following not in ("", ".", r"\."):  # digits end where none can follow
            return None
        if groups * inner * outer > MOST_BRANCHES:
            return None
    return None if inside else "".join({".": r"\.", "(": "(?:"}.get(token, token) for token in tokens)


def _ends(module: str) -> Iterator[str]:
    """The path and what follows each of its dots."""
    yield module
    yield from (module[dot.end() :] for dot in re.finditer(r"\.", module))
