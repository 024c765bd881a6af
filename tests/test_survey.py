"""The log-prob check and the sampler against plain logits, for the causal language models of transformers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import transformers
from models.architectures import ARCHITECTURES, NOT_BUILT
from survey import AGREES, REFUSED, SELECTION, SLOWER, WRONG, Finding, survey

ROOT = Path(__file__).parents[1]


def page() -> list[str]:
    return (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("build_models", ROOT / "docs" / "build_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_none_is_wrong(findings: list[Finding]) -> None:
    wrong = [finding.reason for finding in findings if finding.outcome == WRONG]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_one_model_of_each_kind_is_as_the_page_says() -> None:
    found = list(survey(SELECTION))
    check_none_is_wrong(found)
    assert {finding.outcome for finding in found} == {AGREES, SLOWER, REFUSED}
    lines, build = page(), builder()
    # The page tells the versions it was made with; other versions may judge otherwise.
    if any(f"transformers {transformers.__version__}," in line for line in lines):
        assert [row for row in map(build.row_of, found) if row not in lines] == [], "run `make survey`"


def test_the_page_has_every_model_and_no_other() -> None:
    rows = [line.split("|")[1].strip(" `") for line in page() if line.startswith("| `")]
    if any(f"transformers {transformers.__version__}," in line for line in page()):
        assert rows == list(ARCHITECTURES)
    assert set(NOT_BUILT) <= set(ARCHITECTURES)


@pytest.mark.full
def test_every_model_is_judged_as_the_oracle_does() -> None:
    found = list(survey())
    check_none_is_wrong(found)
    assert len(found) == len(ARCHITECTURES)
    assert sum(finding.outcome in (AGREES, SLOWER, REFUSED) for finding in found) >= 130
