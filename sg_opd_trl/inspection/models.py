"""Models: their log-probs against plain logits of each row alone, and room for prompt and completion."""

from collections.abc import Mapping, Sequence

from ..agreement import Agreement
from .report import Row, listed


def log_prob_row(agreements: Sequence[Agreement]) -> Row:
    """What the check of `agreement` has found; a model that it cannot be right for is refused there."""
    if not agreements:
        return Row(
            "log-probs",
            "yellow",
            "Models are sharded or moved when training starts: their log-probs are checked then.",
            "Look in one process.",
        )
    largest = max(found.difference for found in agreements)
    rounding = max(found.tolerance for found in agreements)
    return Row(
        "log-probs",
        "green",
        f"Rows that are scored together get what each gets alone, within {largest:.1g} nats (rounding: up to "
        f"{rounding:g}): {', '.join(map(_told, agreements))}.",
    )


def _told(found: Agreement) -> str:
    kinds = {"packed": found.layouts.packed, "padded": found.layouts.padded, "flush left": not found.layouts.padded}
    layouts = listed([name for name, used in kinds.items() if used])
    slower = f", as {found.reason.rstrip('.')}" if found.reason is not None else ""
    return f"{found.role} {found.model} {layouts}{slower}"


def context_row(rooms: Mapping[str, int | None], prompt: int, completion: int) -> Row:
    """Whether prompt and completion fit.

    Args:
        rooms: tokens that each model has positions for, None where nothing says.
        prompt: longest prompt.
        completion: longest completion.
    """
    needed = prompt + completion
    told = ", ".join(f"{name} {room if room is not None else 'without a limit'}" for name, room in rooms.items())
    said = f"A prompt of {prompt} and a completion of {completion} tokens take {needed}; there is room for: {told}."
    if any(room is not None and room < needed for room in rooms.values()):
        # A model that ends in an error beyond its positions is refused where the run is set up.
        change = "Log-probs get worse beyond it. Lower max_completion_length, or take models with a longer context."
        return Row("context", "yellow", said, change)
    return Row("context", "green", said)
