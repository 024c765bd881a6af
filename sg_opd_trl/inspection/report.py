"""What was found: rows in green, yellow and red, as text, as a table, for a notebook and for machines."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from markupsafe import escape
from rich.table import Table
from rich.text import Text

State = Literal["green", "yellow", "red"]
STATES: tuple[State, ...] = ("green", "yellow", "red")
"""As it should be; doubtful, or not known; cannot go well. From the best to the worst."""


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: of `STATES`.
        found: in one line, with the numbers.
        change: what to change; "" where there is nothing to.
    """

    name: str
    state: State
    found: str
    change: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (f"{self.state:<6} {self.name}: {self.found}", self.change) if part)


@dataclass(frozen=True)
class Report:
    """The rows of one inspection, in the order of a run.

    `print(report)` is text, a notebook shows a table, `as_dict` is for machines.

    Attributes:
        rows: what was looked at.
        seconds: that it took.
    """

    rows: tuple[Row, ...]
    seconds: float = 0.0

    @property
    def state(self) -> State:
        """The worst of all rows."""
        return max((row.state for row in self.rows), key=STATES.index, default="green")

    def of(self, name: str) -> Row:
        """The row of that name; the worst where there are several.

        Raises:
            KeyError: there is none.
        """
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(name)
        return max(found, key=lambda row: STATES.index(row.state))

    def in_state(self, state: State) -> Iterator[Row]:
        """The rows in one state."""
        return (row for row in self.rows if row.state == state)

    def as_dict(self) -> dict:
        """JSON-ready: `state`, `seconds` and `rows`, of which each has the attributes of `Row`."""
        rows = [asdict(row) for row in self.rows]
        return {"state": self.state, "seconds": round(self.seconds, 3), "rows": rows}

    def table(self) -> Table:
        """The table of a console."""
        table = Table("", "looked at", "found", "what to change", show_lines=True)
        for row in self.rows:
            style = row.state if row.state != "red" else "bold red"
            table.add_row(*(Text(text, style) for text in (row.state, row.name)), Text(row.found), Text(row.change))
        return table

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in ("", "looked at", "found", "what to change"))
        body = "".join(
            f'<tr><td style="color:{_COLOURS[row.state]}">{row.state}</td><td>{escape(row.name)}</td>'
            f'<td style="text-align:left">{escape(row.found)}</td>'
            f'<td style="text-align:left">{escape(row.change)}</td></tr>'
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# Yellow letters on white cannot be read.
_COLOURS = {"green": "green", "yellow": "darkorange", "red": "red"}


def rows_of_error(name: str, error: Exception) -> list[Row]:
    """What the package refuses, as red rows: its last sentence is the way out. An error may list several, by line."""
    return [Row(name, "red", *_split(line)) for line in str(error).splitlines() if line.strip()]


def _split(message: str) -> tuple[str, str]:
    sentences = re.split(r"(?<=[.?!]) (?=[A-Z])", message.strip())
    return (message.strip(), "") if len(sentences) == 1 else (" ".join(sentences[:-1]), sentences[-1])


def listed(names: Sequence[str]) -> str:
    """Names in one line: a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else "none"
