"""The baselines' teacher and tokenizer, loaded before TRL's trainer exists."""

import os
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from ..errors import SGOPDConfigError, TeacherError
from ..evaluation_sampling import encode_prompt
from ..student_files import check_student
from ..teachers.fit import SharedVocabulary, check_chat_templates, check_tokenizers
from ..trl_seam import create_model_from_path

RENDERED = 8
"""Chats that the templates of student and teacher must render alike."""


@dataclass
class TeacherUse:
    """What one process of a run took from its teacher.

    Attributes:
        tokens_scored: completion tokens that it scored.
        tokens_generated: tokens that it wrote in this run.
        tokens_reused: tokens of rollouts that an earlier run had stored.
        seconds: wall time of writing, before the first step.
    """

    tokens_scored: int = 0
    tokens_generated: int = 0
    tokens_reused: int = 0
    seconds: float = 0.0


def load_tokenizer(student: str, args: Any) -> Any:
    """The student's tokenizer, with a padding token; the student itself is loaded from the same place.

    Raises:
        CheckpointError: the student there is half in its place.
    """
    check_student(student)
    revision = (args.model_init_kwargs or {}).get("revision") or "main"
    tokenizer = AutoTokenizer.from_pretrained(student, revision=revision, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_teacher(args: Any, tokenizer: Any, prompts: list) -> Any:
    """The frozen teacher on this process's device, with the student's dtype and attention unless set otherwise.

    Args:
        args: a baseline's configuration.
        tokenizer: of the student.
        prompts: of the data set; some chats are rendered by both templates.

    Raises:
        SGOPDConfigError: weights are sharded over processes.
        TeacherError: the teacher's tokens, or its rendering of the prompts, are not the student's.
        CheckpointError: the teacher is a student that is half in its place.
    """
    _refuse_sharding(args)
    name, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    check_student(name)
    student = args.model_init_kwargs or {}
    options = {key: student[key] for key in ("dtype", "attn_implementation") if student.get(key) is not None}
    options |= {"trust_remote_code": args.trust_remote_code} | dict(args.teacher_model_init_kwargs or {})
    if revision is not None:
        options["revision"] = revision
    other = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    check_tokenizers(tokenizer, other, "teacher")
    chats = [prompt for prompt in prompts[:RENDERED] if not isinstance(prompt, str)]
    kwargs = args.chat_template_kwargs or {}
    rendered = [encode_prompt(tokenizer, chat, kwargs) for chat in chats]
    check_chat_templates(chats, rendered, other, "teacher", template_kwargs=kwargs)
    # Each process has a whole copy: device maps are for one process.
    model = create_model_from_path(name, **options | {"device_map": None})
    # More ids than the tokenizer has are padding of the embedding; fewer leave tokens that cannot be scored.
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise TeacherError(
            f"The teacher must have all {len(tokenizer)} ids of the student's tokenizer, got a vocabulary of "
            f"{model.config.get_text_config().vocab_size}. Choose a teacher of the student's family."
        )
    return model.requires_grad_(False).eval().to(args.device)


def padding_ids(model: Any, tokenizer: Any) -> list[int] | None:
    """Ids that the model has and the tokenizer has not, for `suppress_tokens`; None where there are none."""
    return SharedVocabulary(tokenizer, [model.config.get_text_config().vocab_size]).unusable or None


def _refuse_sharding(args: Any) -> None:
    plugin = args.deepspeed_plugin
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp or (plugin is not None and plugin.zero_stage == 3):
        raise SGOPDConfigError(
            f"`method` sft, seqkd and gkd must run without sharded weights, got {'FSDP' if fsdp else 'ZeRO-3'}. Every "
            "process holds a whole teacher. Use `accelerate_config: ddp` or `zero2`."
        )
