"""SFT on teacher rollouts, and SeqKD: `trl.SFTTrainer` on what the teacher wrote before the first step."""

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState
from trl import SFTTrainer

from ..evaluation_sampling import encode_prompt, end_token_ids
from ..hub import reach_hub
from ..teacher_sampling.rollouts import drop_reason
from ..verifiers.bounded import bounded, close
from ..verifiers.verdicts import RunVerifier
from .checkpoints import KeptTrainer
from .config import SeqKDConfig, TeacherSFTConfig
from .order import StepPlan, fill_steps, plan_steps
from .rollouts import ROLLOUTS_FILE, Judge, Rollout, RolloutRequest, teacher_rollouts
from .teacher import RENDERED, TeacherUse, load_teacher, load_tokenizer

logger = logging.getLogger(__name__)


class TeacherSFTTrainer(KeptTrainer, SFTTrainer):
    """`trl.SFTTrainer`, which remembers what its rows cost."""

    teacher_use: TeacherUse


def build_sft_trainer(
    student: str,
    args: TeacherSFTConfig | SeqKDConfig,
    reward_funcs: Sequence[Callable[..., Any]],
    train_dataset: Any,
    *,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> TeacherSFTTrainer:
    """Have the teacher write its rollouts, or read them, and build the trainer on them.

    Args:
        student: name or path.
        args: with `SeqKDConfig` the teacher decodes greedily, once per prompt.
        reward_funcs: the first, or `verifier_reward_func`, judges rollouts.
        train_dataset: rows with `prompt` and what the verifier needs.
        quantization_config: of the student.
        peft_config: of the student.

    Raises:
        DataError: too few rows, or no rollout that is right.
        SGOPDConfigError: a batch that does not hold whole groups, or sharded weights.
        TeacherError: the teacher's tokens are not the student's.
    """
    # Before the teacher writes: its rollouts are what costs.
    reach_hub(args)
    tokenizer = load_tokenizer(student, args)
    group = 1 if isinstance(args, SeqKDConfig) else args.num_generations
    plan = plan_steps(args, train_dataset, group)
    rows, steps = requested_rows(plan, group, greedy=isinstance(args, SeqKDConfig))
    request, prompts = _request(args, train_dataset, tokenizer, rows)
    rollouts, use, ends = _written(args, tokenizer, request, reward_funcs)
    wanted = [not args.teacher_sampling_filter_correct or rollout.verdict == 1.0 for rollout in rollouts]
    # As the anchor's: an end token alone is not learned, whatever the filter says.
    reasons = (
        drop_reason(own, rollout.verdict, rollout.completion_ids, ends)
        for own, rollout in zip(wanted, rollouts, strict=True)
    )
    kept = [reason is None for reason in reasons]
    logger.info("%d of %d teacher rollouts are used.", sum(kept), len(kept))
    trainer = TeacherSFTTrainer(
        model=student,
        args=_ordered(args, len(plan.steps)),
        train_dataset=training_rows(fill_steps(steps, kept), prompts, rollouts),
        processing_class=tokenizer,
        quantization_config=quantization_config,
        peft_config=peft_config,
    )
    trainer.teacher_use = use
    return trainer


def requested_rows(plan: StepPlan, group: int, *, greedy: bool) -> tuple[list[int], list[list[int]]]:
    """Training rows that the teacher writes for, one entry per rollout, and the rollouts of each step.

    A prompt that is visited again gets new samples, but only one greedy output: all are the same.
    """
    if greedy:
        rows = list(dict.fromkeys(row for step in plan.steps for row in step))
        number = {row: i for i, row in enumerate(rows)}
        return rows, [[number[row] for row in step] for step in plan.steps]
    rows = [row for step in plan.steps for row in step for _ in range(group)]
    size = plan.rows_per_step
    return rows, [list(range(start, start + size)) for start in range(0, len(rows), size)]


def training_rows(steps: list[list[int]], prompts: list[list[int]], rollouts: list[Rollout]) -> Dataset:
    """Token ids and labels in the order of training; the prompt's labels are -100, which no loss counts.

    Args:
        steps: numbers of the rollouts of each step; inside a step, long rows come first.
        prompts: rendered prompt of each rollout.
        rollouts: by number.
    """
    rows = []
    for step in steps:
        # A micro-batch is cut from neighbours: rows of like length need little padding.
        for i in sorted(step, key=lambda i: -len(prompts[i]) - len(rollouts[i].completion_ids)):
            completion = rollouts[i].completion_ids
            rows.append({"input_ids": prompts[i] + completion, "labels": [-100] * len(prompts[i]) + completion})
    return Dataset.from_list(rows)


def _request(args: Any, dataset: Any, tokenizer: Any, rows: list[int]) -> tuple[RolloutRequest, list[list[int]]]:
    distinct = sorted(set(rows))
    examples = dict(zip(distinct, dataset.select(distinct).to_list(), strict=True))
    kwargs = args.chat_template_kwargs or {}
    rendered = {row: encode_prompt(tokenizer, examples[row]["prompt"], kwargs) for row in distinct}
    prompts = [rendered[row] for row in rows]
    request = RolloutRequest(
        prompt_ids=prompts,
        examples=[examples[row] for row in rows],
        max_new_tokens=args.max_completion_length,
        temperature=getattr(args, "temperature", None),
        top_p=getattr(args, "top_p", 1.0),
        seed=args.seed,
        batch_size=args.rollout_batch_size,
    )
    return request, prompts


def _written(
    args: Any, tokenizer: Any, request: RolloutRequest, reward_funcs: Sequence[Callable[..., Any]]
) -> tuple[list[Rollout], TeacherUse, list[int]]:
    """The rollouts, what they cost, and the ids that end one."""
    # Prompts from all over the run: the first few may be of one kind.
    spread = request.examples[:: max(1, len(request.examples) // RENDERED)]
    teacher = load_teacher(args, tokenizer, [example["prompt"] for example in spread])
    judge = None
    if args.teacher_sampling_filter_correct:
        names = [getattr(function, "__name__", type(function).__name__) for function in reward_funcs]
        reward_funcs = bounded(reward_funcs, args.verifier_timeout)
        verifier = RunVerifier(reward_funcs, names, args.verifier_reward_func, binary=True)
        judge = _judge(verifier)
    path = Path(args.output_dir) / ROLLOUTS_FILE
    try:
        rollouts, use = teacher_rollouts(teacher, tokenizer, request, judge, path=path, args=args)
    finally:
        close(reward_funcs)
    ends = end_token_ids(teacher, tokenizer)
    # The student's trainer comes next and needs the memory; the model's own cycles would keep it for a while.
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rollouts, use, ends


def _judge(verifier: RunVerifier) -> Judge:
    def judge(examples: list[dict], completions: list, completion_ids: list[list[int]]) -> list[float | None]:
        return verifier.judge(examples, completions, completion_ids, TrainerState())

    return judge


def _ordered(args: Any, steps: int) -> Any:
    """The configuration as TRL's trainer gets it: rows are in order already, and last exactly for the run."""
    ordered = copy.copy(args)
    ordered.max_steps = steps
    ordered.shuffle_dataset = False
    return ordered
