"""`SGOPDConfig`: the settings of SG-OPD on top of `trl.GRPOConfig`.

The fields live in `config_fields`, one file per group; each one's meaning is written once, in its `help`, with its
source. Bounds and refused combinations live in `config_checks`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from .config_checks import check_config
from .config_fields import AnchorFields, GateFields, ObjectiveFields, RunningFields, TeacherFields, WeightFields
from .core import RouteReferences, routes_need_reference
from .teachers.remote.settings import parsed as parsed_servers


@dataclass
class SGOPDConfig(RunningFields, AnchorFields, ObjectiveFields, WeightFields, GateFields, TeacherFields, GRPOConfig):
    """Configuration of `SGOPDTrainer`.

    All of `trl.GRPOConfig`, with the defaults of the paper's recipe (arXiv:2606.09304, appendix C), plus the teacher,
    the reference, the sign-consistency gate (Eq. 4-8), the stability weight (Eq. 9) and phased teacher sampling
    (Eq. 2-3).

    Raises:
        SGOPDConfigError: a value out of range or NaN, or a combination that is not supported; all of them are listed.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "reference_model_init_kwargs",
    ]

    # --- TRL's own fields, with the paper's values ---------------------------------------------------------------
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Initial learning rate of AdamW. Paper, appendix C: 1e-5."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule. Paper, appendix C: constant, no warm-up."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW. Paper, appendix C: 0.01."})
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "Reduction of the per-token loss: 'grpo' (mean over sequences of the mean over tokens; paper, "
            "Eq. 10), 'bnpo', 'dr_grpo' or 'dapo'."
        },
    )
    delta: float | None = field(
        default=3.0,
        metadata={"help": "Upper bound of the probability ratio (dual clip). The paper's code base uses 3.0."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "Rollout importance correction, see `trl.GRPOConfig`. Paper, appendix C: per token, truncated."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=5.0, metadata={"help": "Cap of the rollout importance ratio. Paper, appendix C: 5.0, no lower bound."}
    )

    def __post_init__(self) -> None:
        self.teacher_model_server_url = parsed_servers(self.teacher_model_server_url)
        check_config(self)
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether any route has a lambda other than 1, so that a reference model is used at all."""
        return any(self.open_routes)

    @property
    def open_routes(self) -> RouteReferences:
        """Whether consensus, conflict and neutral tokens use the reference (design: only used forwards)."""
        return routes_need_reference(sign_gated=self.sign_gated_extrapolation, **self.route_settings)

    @property
    def route_settings(self) -> dict[str, Any]:
        """What the routing functions of `core` take beside their tensors."""
        return {
            "lambda_high": self.lambda_high,
            "lambda_base": self.lambda_base,
            "disagree_mode": self.disagree_mode,
            "disagree_interp_beta": self.disagree_interp_beta,
            "neutral_mode": self.neutral_mode,
            "cell_lambdas": tuple(self.disagree_cell_lambdas),
        }

    @property
    def support_size(self) -> int:
        """K, the teacher's likeliest tokens at a position: as set, or as the mode's paper has it."""
        return self.distillation_topk or (10 if self.distillation_mode == "asymmetric" else 32)

    @property
    def teacher_completion_length(self) -> int:
        """Longest teacher rollout in tokens."""
        return self.teacher_max_completion_length or self.max_completion_length or 0
