"""What the verbs about files print: receipts with bars for the norms, and tables of what was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from sdlora.formats.architectures import LABELS
from sdlora.formats.metadata import tags
from sdlora.workbench.inspect import Inspected, by_block

if TYPE_CHECKING:
    from sdlora.lowrank.truncation import Kept

BAR = 40  # characters of the longest bar
PARTS = " ▏▎▍▌▋▊▉█"  # eighths of a character
SHOWN = 40  # names and tags that a text lists; JSON has all


def escaped(text: str) -> str:
    """Text of unknown origin for a terminal: what is not printed but obeyed, or reverses a line, is written out."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)


def receipt_lines(inspected: Inspected) -> Iterator[str]:
    """The receipt of a file as text, for people."""
    yield escaped(f"{inspected.receipt.path}  ({_bytes(inspected.receipt.size)})")
    for name, text in _facts(inspected):
        if text:
            yield f"  {name:<13} {escaped(text)}"
    receipt = inspected.receipt
    yield from _listed("not known", receipt.unknown)
    yield from _listed("not whole", receipt.incomplete)
    yield from _listed("wrong shape", receipt.misfit)
    yield from _listed("notes", receipt.notes)
    yield from _bars(by_block(inspected.norms))
    reasons = Counter(inspected.unmeasured.values()).most_common()
    yield from _listed("not measured", [f"{count} changes: {why}" for why, count in reasons])
    counts = tags(receipt.metadata)
    yield from _listed(f"{len(counts)} tags", [f"{count:>6}  {tag}" for tag, count in counts.items()])


def _facts(inspected: Inspected) -> Iterator[tuple[str, str]]:
    receipt = inspected.receipt
    labels = " or ".join(LABELS.get(name, name) for name in receipt.made_for) or "no known model"
    yield "made for", labels + (f" ({', '.join(receipt.evidence)})" if receipt.evidence else "")
    yield "base model", receipt.base_model
    held = ", ".join(f"{name} {count}" for name, count in receipt.components.items())
    yield "applies", f"{len(receipt.applied)} changes ({held or 'none'}), {'all' if receipt.complete else 'NOT all'}"
    yield "left out", "; ".join(
        f"{name}: {', '.join(f'{count} {what}' for what, count in kinds.items())}"
        for name, kinds in receipt.left_out.items()
    )
    yield "laws", ", ".join(f"{name} {count}" for name, count in receipt.laws.items())
    yield "ranks", receipt.ranks()
    yield "alphas", receipt.alphas() if receipt.sha256 else ""
    yield "dtypes", ", ".join(receipt.dtypes)
    yield "finite", {True: "yes", False: "no", None: "not looked at"}[receipt.finite]
    yield "tokens", ", ".join(receipt.tokens)
    yield "trigger words", ", ".join(receipt.trigger_words)
    yield "sha256", f"{receipt.sha256} (AutoV2 {inspected.hashes.autov2.upper()})" if receipt.sha256 else ""
    yield "autov3", f"{receipt.autov3} (AutoV3 {inspected.hashes.autov3_short.upper()})" if receipt.autov3 else ""


def _bars(blocks: Mapping[str, float]) -> Iterator[str]:
    if blocks:
        yield "  norms by block"
    longest, largest = max(map(len, blocks), default=0), max(blocks.values(), default=0.0) or 1.0
    for block, size in blocks.items():
        yield f"    {block:<{longest}} {size:>10.4g} {_bar(size / largest)}".rstrip()


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + PARTS[eighths % 8].strip()


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield f"  {title}"
    yield from (f"    {escaped(line)}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    and {len(lines) - SHOWN} more; --json has all"


def kept_lines(kept: Mapping[str, Kept]) -> Iterator[str]:
    """A table of what each parameter kept, and the totals."""
    if not kept:
        return
    widest = max(map(len, map(escaped, kept)))
    yield f"{'parameter':<{widest}}  rank  of  energy  error"
    for path, one in kept.items():
        before = "-" if one.rank_before is None else str(one.rank_before)
        yield f"{escaped(path):<{widest}} {one.rank:>5} {before:>3} {one.energy:>7.2%} {one.error:>6.2%}"
    ranks = [one.rank for one in kept.values()]
    energies, errors = [one.energy for one in kept.values()], [one.error for one in kept.values()]
    yield (
        f"{len(kept)} parameters, ranks {min(ranks)} to {max(ranks)}, "
        f"mean {sum(ranks) / len(ranks):.1f}; energy kept: mean {sum(energies) / len(energies):.2%}, "
        f"least {min(energies):.2%}; error: mean {sum(errors) / len(errors):.2%}, largest {max(errors):.2%}"
    )


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
