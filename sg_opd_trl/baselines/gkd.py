"""GKD on the student's own rollouts: `trl.experimental.gkd.GKDTrainer` with the prompts of SG-OPD's steps.

Imported for `method: gkd` alone, its configuration included: TRL warns where its experimental trainers are imported.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from trl.experimental.gkd import GKDConfig, GKDTrainer

from ..agreement import check_for_trl
from ..errors import TeacherError
from ..evaluation_sampling import encode_prompt, end_token_ids
from ..hub import reach_hub
from ..models.batch import pad_rows
from ..models.experts import without_router_logits
from ..models.sampling import without_own_settings
from ..precision import precision_problems, settle_bf16
from ..run_folder import folder_problems
from .checkpoints import KeptTrainer
from .config import FIXED, PairedFields, moved, no_teacher, not_positive, outside, raise_problems
from .order import plan_steps
from .teacher import RENDERED, TeacherUse, load_teacher, load_tokenizer, padding_ids

_FIXED_GKD = {
    "completion_only_loss": "The loss is on the student's own rollout.",
    "lmbda": "All rows are the student's own rollouts; there are no other completions.",
    "seq_kd": "All rows are the student's own rollouts.",
    "loss_type": "The loss is the generalized Jensen-Shannon divergence.",
    "label_smoothing_factor": "The loss has no labels to smooth.",
    "padding_free": "Prompts are padded for generation.",
}


@dataclass
class OnPolicyGKDConfig(PairedFields, GKDConfig):
    """Configuration of `method: gkd`: `trl.experimental.gkd.GKDConfig`, all rows the student's own rollouts.

    Raises:
        SGOPDConfigError: no teacher, a value out of range, or a setting of TRL that would break the pairing.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GKDConfig._VALID_DICT_FIELDS,
        "chat_template_kwargs",
    ]

    lmbda: float = field(default=1.0, metadata={"help": "1: all rows are the student's own rollouts."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the student's rollouts."})
    num_generations: int = field(
        default=8, metadata={"help": "Rollouts per prompt, so that a step has as many prompts as SG-OPD's."}
    )

    def __post_init__(self) -> None:
        raise_problems(
            [
                *moved(self, FIXED | _FIXED_GKD),
                *no_teacher(self),
                *not_positive(self, "max_new_tokens", "num_generations"),
                *outside(self, "temperature", math.inf, "It divides the logits that rollouts are drawn from."),
                *precision_problems(self),
                *folder_problems(self),
            ]
        )
        settle_bf16(self)
        super().__post_init__()

    @property
    def max_completion_length(self) -> int:
        """Longest rollout, under the name that the other methods have for it."""
        return self.max_new_tokens


class OnPolicyGKDTrainer(KeptTrainer, GKDTrainer):
    """`GKDTrainer` that counts what the teacher scores, and divides its loss by the tokens it is summed over.

    TRL's data collator counts the tokens of the data set's completions before the student writes its own, and the loss
    would be divided by that number. Here it is the mean over a micro-batch's own completion tokens, averaged over
    micro-batches and processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers then divides the loss by the number of micro-batches, and passes no count of tokens.
        self.model_accepts_loss_kwargs = False
        student = self.accelerator.unwrap_model(self.model)
        # TRL's ends at the model's own end tokens alone, and lets it write ids that the tokenizer does not have.
        self.generation_config.eos_token_id = end_token_ids(student, self.processing_class)
        self.generation_config.suppress_tokens = padding_ids(student, self.processing_class)
        self._scored = torch.zeros((), dtype=torch.long)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss; the tokens that it compares are counted."""
        # TRL has put the student's own rollout into the batch by now: the labels are its completion's tokens.
        self._scored += (inputs["labels"] != -100).sum().to(self._scored.device)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @staticmethod
    def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's rollouts, shaped by the run's settings alone: the others do not heed the student's own."""
        with without_own_settings(model), without_router_logits(model):
            return GKDTrainer.generate_on_policy_outputs(_Writer(model), inputs, generation_config)

    @property
    def teacher_use(self) -> TeacherUse:
        """What this process has taken from the teacher so far."""
        return TeacherUse(tokens_scored=int(self._scored))


class _Writer:
    """A model as TRL's rollouts use it. TRL gives one setting beside the others, of which transformers warns."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, *, generation_config: Any, return_dict_in_generate: bool, **inputs: Any) -> Any:
        """Write, with all settings in one place."""
        settings = copy.copy(generation_config)
        settings.return_dict_in_generate = return_dict_in_generate
        return self._model.generate(generation_config=settings, **inputs)


class PromptCollator:
    """Pads prompts on the left, under the names that `GKDTrainer` reads; their labels count nothing."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        """Rows with `prompt_ids` -> a batch."""
        ids, mask = pad_rows([example["prompt_ids"] for example in examples], self.pad_token_id, left=True)
        return {
            "prompts": ids,
            "prompt_attention_mask": mask,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.full_like(ids, -100),
        }


def build_gkd_trainer(
    student: str,
    args: OnPolicyGKDConfig,
    train_dataset: Any,
    *,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> OnPolicyGKDTrainer:
    """Build the trainer on the prompts of SG-OPD's steps, each as often as it is answered.

    Args:
        student: name or path.
        args: configuration.
        train_dataset: rows with `prompt`.
        quantization_config: of the student.
        peft_config: of the student.

    Raises:
        DataError: too few rows.
        SGOPDConfigError: a batch that does not hold whole groups, or sharded weights.
        TeacherError: the teacher's tokens or its vocabulary's size are not the student's.
    """
    reach_hub(args)
    tokenizer = load_tokenizer(student, args)
    plan = plan_steps(args, train_dataset, args.num_generations)
    teacher = load_teacher(args, tokenizer, train_dataset.select(range(min(RENDERED, len(train_dataset))))["prompt"])
    # A copy: the caller's settings go into the report as they were given.
    ordered: Any = copy.copy(args)
    ordered.max_steps, ordered.shuffle_dataset = len(plan.steps), False
    ordered.teacher_model_init_kwargs = None  # the teacher is loaded already
    if quantization_config is not None:
        ordered.model_init_kwargs = {**(ordered.model_init_kwargs or {}), "quantization_config": quantization_config}
    rows = [row for step in plan.steps for row in step for _ in range(args.num_generations)]
    try:
        trainer = OnPolicyGKDTrainer(
            model=student,
            teacher_model=teacher,
            args=ordered,
            data_collator=PromptCollator(tokenizer.pad_token_id),
            train_dataset=prompt_rows(train_dataset, tokenizer, rows, args.chat_template_kwargs or {}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except ValueError as error:
        if "vocab_size" not in str(error):
            raise
        raise TeacherError(
            f"The teacher's vocabulary must have the student's size: {error} With `method: sg_opd` padded "
            "embeddings may differ."
        ) from error
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        check_for_trl(model, tokenizer, role=role, method="gkd")
    return trainer


def prompt_rows(dataset: Any, tokenizer: Any, rows: list[int], kwargs: Any) -> Dataset:
    """Rendered prompts of training rows, in the given order."""
    distinct = sorted(set(rows))
    prompts = dataset.select(distinct)["prompt"]
    rendered = {row: encode_prompt(tokenizer, prompt, kwargs) for row, prompt in zip(distinct, prompts, strict=True)}
    return Dataset.from_list([{"prompt_ids": rendered[row]} for row in rows])
