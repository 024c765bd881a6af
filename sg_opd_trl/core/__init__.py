"""The equations of sign-gated on-policy distillation, one function each. Imports torch and nothing else."""

from sg_opd_trl.core.anchor import (
    ANCHOR_REDUCTIONS,
    ANCHOR_WEIGHTS,
    anchor_cross_entropy,
    anchor_denominator,
    anchor_token_weights,
)
from sg_opd_trl.core.controls import fixed_on_rows, random_gate
from sg_opd_trl.core.diagnostics import (
    MAXIMUM_NAMES,
    METRIC_NAMES,
    TokenStatistics,
    combine,
    finalize,
    token_statistics,
)
from sg_opd_trl.core.gate import (
    DISAGREE_MODES,
    NEUTRAL_MODES,
    RouteReferences,
    route_advantages,
    route_gated_advantages,
    routes_need_reference,
    sign_consistency_gate,
)
from sg_opd_trl.core.log_ratio import extrapolated_advantage, reverse_kl_advantage
from sg_opd_trl.core.matching import (
    RoutedLambdas,
    asymmetric_tokens,
    extrapolated_log_probs,
    forward_kl_on_support,
    matched_advantages,
    route_lambdas,
)
from sg_opd_trl.core.objective import (
    anchored_loss,
    masked_sum_and_count,
    mean_of,
    rows_needing_reference,
    weighted_advantages,
)
from sg_opd_trl.core.schedule import anchor_schedule, separated_prompts, separated_schedule
from sg_opd_trl.core.support import local_support_matching
from sg_opd_trl.core.verifier import verifier_group_advantages
from sg_opd_trl.core.weights import (
    drift_gate,
    prefix_importance_weight,
    span_numbers,
    stability_weight,
    without_special_tokens,
)

__all__ = [
    "ANCHOR_REDUCTIONS",
    "ANCHOR_WEIGHTS",
    "DISAGREE_MODES",
    "MAXIMUM_NAMES",
    "METRIC_NAMES",
    "NEUTRAL_MODES",
    "RouteReferences",
    "RoutedLambdas",
    "TokenStatistics",
    "anchor_cross_entropy",
    "anchor_denominator",
    "anchor_schedule",
    "anchor_token_weights",
    "anchored_loss",
    "asymmetric_tokens",
    "combine",
    "drift_gate",
    "extrapolated_advantage",
    "extrapolated_log_probs",
    "finalize",
    "fixed_on_rows",
    "forward_kl_on_support",
    "local_support_matching",
    "masked_sum_and_count",
    "matched_advantages",
    "mean_of",
    "prefix_importance_weight",
    "random_gate",
    "reverse_kl_advantage",
    "route_advantages",
    "route_gated_advantages",
    "route_lambdas",
    "routes_need_reference",
    "rows_needing_reference",
    "separated_prompts",
    "separated_schedule",
    "sign_consistency_gate",
    "span_numbers",
    "stability_weight",
    "token_statistics",
    "verifier_group_advantages",
    "weighted_advantages",
    "without_special_tokens",
]
