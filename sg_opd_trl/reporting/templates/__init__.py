"""The templates of the run's report, the study's page and the model card, and how they are filled in."""

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render(name: str, **values: Any) -> str:
    """Fill in a template of this folder.

    Args:
        name: of its file; what is named `.html.jinja` is escaped, and may use `style`, the style sheet of all pages.
        values: that the template uses.

    Returns:
        The text. A page holds its own style sheet: it loads nothing from anywhere.
    """
    is_page = name.endswith(".html.jinja")
    # StrictUndefined: a value that is forgotten here is an error, not an empty place on somebody's page.
    environment = Environment(autoescape=is_page, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    if is_page:
        values["style"] = Markup(_read("report.css"))
    return environment.from_string(_read(name)).render(**values)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
