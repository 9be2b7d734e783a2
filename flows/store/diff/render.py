"""Render a comparison of codes on a terminal."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flows.store.diff.agreement import Agreement
    from flows.store.diff.diff import CodesDiff


def shown(made: "CodesDiff") -> "RenderableType":
    """Render facts, the table of before and after, and the least equal images."""
    facts = [f"before {made.before}", f"after  {made.after}"]
    facts += [f"{name}: {before} -> {after}" for name, (before, after) in made.settings.items()]
    if not made.same_images:
        facts.append("made from different images: an id may stand for other pixels")
    for what, counts in (("images", made.images), ("views", made.views)):
        facts.append(
            f"{what}: {counts['both']:,} in both, {counts['only_before']:,} only before,"
            f" {counts['only_after']:,} only after"
        )
    parts: list[RenderableType] = [Text(fact) for fact in facts]
    if made.agreement:
        parts += _agreement(made.agreement)
    elif not made.views["both"]:
        parts.append(Text("no view is in both: codes cannot be compared one by one"))
    parts.append(_frequencies(made))
    if made.agreement and made.agreement.worst:
        worst = Table("least equal images", "equal codes", box=SIMPLE_HEAD, pad_edge=False)
        for image_id, share in made.agreement.worst:
            worst.add_row(Text(image_id, overflow="fold"), f"{share:.1%}")
        parts.append(worst)
    parts += [Text(f"stale: {ref} was trained on the codes before") for ref in made.stale]
    return Group(*parts)


def _agreement(made: "Agreement") -> "list[RenderableType]":
    shares = " ".join(f"{100 * share:.1f}" for share in made.per_position)
    return [
        Text(f"equal codes: {made.codes:.2%} ({made.chance:.2%} by chance)"),
        Text(f"all codes equal: {made.views_all_equal:.2%} of views, {made.images_all_equal:.2%} of images"),
        Text(f"equal codes by position, %: {shares}"),
    ]


def _frequencies(made: "CodesDiff") -> Table:
    table = Table("codebook", "before", "after", box=SIMPLE_HEAD, pad_edge=False)
    old, new = made.frequencies
    table.add_row("usage", f"{old.usage:.2%}", f"{new.usage:.2%}")
    table.add_row("entropy, bits", f"{old.entropy_bits:.3f}", f"{new.entropy_bits:.3f}")
    table.add_row("perplexity", f"{old.perplexity:.1f}", f"{new.perplexity:.1f}")
    if made.drift:
        table.add_row("Jensen-Shannon divergence, bits", "", f"{made.drift.js_divergence_bits:.4f}")
        table.add_row("Jensen-Shannon distance (its root)", "", f"{made.drift.js_distance:.4f}")
        table.add_row("total variation", "", f"{made.drift.total_variation:.4f}")
    return table
