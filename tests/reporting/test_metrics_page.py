"""Every metric is in the glossary, and the glossary explains no metric that does not exist."""

import re
from pathlib import Path

from sg_opd_trl.core.diagnostics import MAXIMUM_NAMES, METRIC_NAMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
TOKEN_METRICS = [
    "gate/consensus", "gate/conflict", "gate/neutral", "gate/sign_flips", "gate/advantage_consensus",
    "gate/advantage_conflict", "gate/advantage_neutral", "teacher/kl_k1", "teacher/kl_k3",
    "teacher/abs_advantage_mean", "teacher/abs_advantage_max", "teacher/phi_mean",
    "weights/prefix_mean", "weights/drift_mean", "weights/drift_max", "weights/drift_min",
]  # fmt: skip
RUN_METRICS = [
    "teacher/matching_loss", "teacher/scored_tokens", "teacher/generated_tokens", "teacher/unusable_tokens",
    "weights/special_masked", "gate/dead_zone", "skipped_steps",
    "anchor/alpha", "anchor/loss", "anchor/verified_share", "anchor/rollouts", "anchor/tokens",
    "anchor/kept", "anchor/truncated", "anchor/dropped_wrong", "anchor/dropped_no_verdict", "anchor/dropped_empty",
    "anchor/dropped_filtered", "anchor/cache_hits", "anchor/cache_misses",
    "verifier/abstained", "verifier/timeouts", "verifier/no_verdict_gold", "verifier/no_verdict_timeout",
    "verifier/no_verdict_wall_timeout", "verifier/no_verdict_memory", "verifier/no_verdict_crash",
    "verifier/no_verdict_unsure",
    "time/rollout", "time/verify", "time/teacher", "time/reference", "time/loss", "time/anchor",
]  # fmt: skip


def explained() -> dict[str, list[str]]:
    rows = [line.strip().strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_metric_is_explained_with_unit_health_and_reduction():
    glossary = explained()
    for name in TOKEN_METRICS + RUN_METRICS:
        assert len(glossary[name]) == 4, name
        assert all(glossary[name]), name


def test_own_metrics_of_the_page_exist():
    own = [
        name for name in explained() if re.match(r"((gate|teacher|weights|anchor|verifier|time)/|skipped_steps)", name)
    ]
    assert sorted(own) == sorted(TOKEN_METRICS + RUN_METRICS)


def test_token_metrics_are_those_that_are_computed():
    computed = {re.sub(r"/(right|wrong)$", "", name) for name in (*METRIC_NAMES, *MAXIMUM_NAMES)}
    assert computed == set(TOKEN_METRICS)
    for suffix in ("/right", "/wrong"):
        assert f"`{suffix}`" in PAGE
        assert {name + suffix for name in TOKEN_METRICS} <= {*METRIC_NAMES, *MAXIMUM_NAMES}


def test_everything_the_report_draws_is_explained():
    from sg_opd_trl.reporting.curves import PANELS

    drawn = {re.sub(r"/(right|wrong)$", "", series.key) for panel in PANELS for series in panel.series}
    assert drawn <= set(explained())
