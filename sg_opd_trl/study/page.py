"""Writing what a study has found: Markdown, JSON, one HTML page that loads nothing, and PNG plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..files import write_atomically
from ..reporting.curves import can_draw
from ..reporting.report import installed_versions
from ..reporting.templates import render
from . import tables
from .figures import Plot, draw_group
from .results import write_json
from .spec import Study
from .summary import Group


def write_study(
    study: Study, groups: Sequence[Group], choices: Mapping[str, Any] | None, failures: Sequence[str]
) -> list[Path]:
    """Write `NAME.md`, `NAME.json`, `NAME.html` and, where matplotlib is installed, `plots/NAME-*.png`.

    Args:
        study: the study.
        groups: its rows.
        choices: what was tuned, None where nothing was.
        failures: one line per job that failed.

    Returns:
        The files, the Markdown page first.
    """
    plots = [draw_group(study, group, f"g{index}-") if can_draw() else [] for index, group in enumerate(groups)]
    stem = study.output_dir / study.name
    written = [Path(f"{stem}.md"), Path(f"{stem}.json"), Path(f"{stem}.html")]
    write_atomically(written[0], tables.to_markdown(study, groups, choices, failures))
    write_json(written[1], tables.to_json(study, groups, choices, failures))
    write_atomically(written[2], _page(study, groups, plots, choices, failures))
    for plot in (plot for found in plots for plot in found):
        path = study.output_dir / "plots" / f"{study.name}-{plot.name}.png"
        write_atomically(path, plot.png)
        written.append(path)
    return written


def _page(
    study: Study,
    groups: Sequence[Group],
    plots: Sequence[Sequence[Plot]],
    choices: Mapping[str, Any] | None,
    failures: Sequence[str],
) -> str:
    sections = [
        {
            "title": group.pair or "Results",
            "rows": [*(tables.cells(study, row) for row in group.rows), *tables.model_cells(study, group)],
            "note": tables.without_verdict(group),
            "contrasts": tables.contrast_cells(study, group),
            "plots": [(plot, Markup(plot.svg)) for plot in found],
        }
        for group, found in zip(groups, plots, strict=True)
    ]
    return render(
        "study.html.jinja",
        title=study.name,
        description=tables.describe(study),
        baseline=study.baseline,
        headings=tables.columns(study),
        contrast_headings=tables.CONTRAST_COLUMNS,
        sections=sections,
        can_draw=can_draw(),
        choices=tables.choice_cells(choices),
        choice_headings=tables.CHOICE_COLUMNS,
        choice_title=tables.choice_title(choices) if choices else "",
        failures=failures,
        intervals=tables.INTERVALS,
        versions=installed_versions(),
    )
