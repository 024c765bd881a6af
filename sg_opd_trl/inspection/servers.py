"""A teacher server: does it say the same twice, and do its replicas say the same?"""

from collections.abc import Sequence

from ..errors import SGOPDError
from ..teachers.answers import SequenceScores
from ..teachers.server import ServerTeacher
from .report import Row, rows_of_error

# Mean difference in nats from which it is no rounding (our choice).
_ANOTHER_MODEL = 0.2


def server_rows(teachers: Sequence[object], ids: Sequence[int], dead_zone: float) -> list[Row]:
    """Ask every server for the scores of one sequence, twice.

    Args:
        teachers: of the run; those that are no servers are left out.
        ids: token ids of a real prompt, at least two.
        dead_zone: |a2| up to which a token is neutral.
    """
    rows = []
    for teacher in teachers:
        if isinstance(teacher, ServerTeacher):
            try:
                first, second = (teacher.client.probe(ids, 1) for _ in range(2))
            except SGOPDError as error:
                rows += rows_of_error("teacher server", error)
                continue
            rows.append(_row(teacher.client.addresses, first, second, dead_zone))
    return rows


def _row(
    addresses: Sequence[str], first: Sequence[SequenceScores], second: Sequence[SequenceScores], dead_zone: float
) -> Row:
    again = max(_apart(one, other) for one, other in zip(first, second, strict=True))
    replicas = max((_apart(first[0], other) for other in first[1:]), default=0.0)
    said = f"{', '.join(addresses)} answers; the same tokens differ by {again:.2g} nats on average when asked twice"
    said += f", by {replicas:.2g} between replicas." if len(addresses) > 1 else "."
    if again > _ANOTHER_MODEL:
        return Row("teacher server", "red", said, "It must be deterministic: nothing that it says can be learnt.")
    if replicas > _ANOTHER_MODEL:
        return Row("teacher server", "red", said, "Start all replicas with the same weights.")
    if max(again, replicas) > dead_zone:
        change = f"Set gate_dead_zone above {max(again, replicas):.2g}, or serve in float32."
        return Row("teacher server", "yellow", f"{said} That is above the dead zone ({dead_zone:g}).", change)
    return Row("teacher server", "green", said)


def _apart(one: SequenceScores, other: SequenceScores) -> float:
    apart = [abs(left - right) for left, right in zip(one.logps, other.logps, strict=True)]
    return sum(apart) / len(apart)
