"""`sg-opd train --help`: the settings that most runs touch, a line each; all others are in `--help_all`."""

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..setting import default_of
from .methods import METHODS

_WIDTH, _COLUMN = 100, 36

# Flags that are no field of the run, and fields whose own help begins with something else.
_OWN = {
    "config": "YAML file with any of these settings; flags win over it.",
    "accelerate_config": "Starts several processes: a file of accelerate's, or ddp, zero2, zero3, fsdp, ...",
    "num_processes": "How many processes; any other flag of `accelerate launch` works too.",
    "method": "sg_opd, or a baseline with TRL's own trainers: grpo, sft, seqkd, gkd.",
    "model_name_or_path": "The student: a folder, a Hub id, or builtin/arithmetic-student.",
    "output_dir": "Folder of the student, its checkpoints, report and model card.",
    "max_steps": "Steps of the optimizer, in place of num_train_epochs.",
    "resume_from_checkpoint": "true: start, go on from the newest checkpoint, or nothing if finished; or a path.",
    "overwrite_output_dir": "Whether the run that is in output_dir may be replaced.",
    "allow_changed": "Settings that may differ from those of the checkpoint that the run goes on from.",
    "dataset_name": "Problems: a file, a folder, a Hub id, or builtin/arithmetic.",
    "reward_funcs": "The verifier first: math_reward, exact_match_reward, or dotted import paths.",
    "report_to": "none, trackio, wandb, tensorboard, ...",
    "help_all": "All fields, those of TRL and transformers included.",
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Run": (
        "config",
        "method",
        "output_dir",
        "seed",
        "max_steps",
        "num_train_epochs",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "allow_changed",
        "preflight",
    ),
    "Models": (
        *("model_name_or_path", "teacher_model_name_or_path", "teacher_model_server_url"),
        *("reference_model_name_or_path", "dtype", "use_peft"),
    ),
    "Data and verifier": (
        *("dataset_name", "question_column", "answer_column", "instruction", "system_prompt", "min_difficulty"),
        *("max_prompt_tokens", "reward_funcs"),
    ),
    "A step": (
        *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
        *("max_completion_length", "temperature"),
    ),
    "SG-OPD": (
        *("sign_gated_extrapolation", "disagree_mode", "lambda_base", "lambda_high", "gate_dead_zone"),
        *("stability_tau", "distillation_mode", "teacher_sampling_enable", "teacher_sampling_phase1_end_frac"),
        *("teacher_sampling_phase2_end_frac", "teacher_rollouts_path"),
    ),
    "Processes and machine": ("accelerate_config", "num_processes", "use_vllm", "use_cpu", "bf16"),
    "While it runs, and after": ("report_to", "logging_steps", "eval_strategy", "save_strategy", "push_to_hub"),
    "More": ("help_all",),
}
"""Headings and what is under each; a method shows those that it has."""


def short_help(method: str, kinds: Iterable[Any]) -> str:
    """The help of `sg-opd train` for one method.

    Args:
        method: of the run.
        kinds: the dataclasses that hold its fields.
    """
    known = {field.name: field for kind in kinds for field in fields(kind)}
    lines = [
        "usage: sg-opd train --config RECIPE [--FIELD VALUE ...]",
        "",
        f"Distil a student as a recipe says (method {method}; there are {', '.join(METHODS)}).",
        "Every field can stand in the recipe or be a flag.",
    ]
    for title, names in GROUPS.items():
        shown = [name for name in names if name in _OWN or name in known]
        if shown:
            lines += ["", f"{title}:"]
        for name in shown:
            lines += _line(name, _OWN[name] if name in _OWN else _first_sentence(known[name]))
    return "\n".join([*lines, ""])


def _line(name: str, text: str) -> list[str]:
    flag = f"  --{name}"
    rest = textwrap.wrap(text, _WIDTH - _COLUMN) or [""]
    first = [f"{flag:<{_COLUMN}}{rest[0]}"] if len(flag) < _COLUMN else [flag, " " * _COLUMN + rest[0]]
    return first + [" " * _COLUMN + line for line in rest[1:]]


def _first_sentence(field: Any) -> str:
    text = re.split(r"(?<=[.:;])\s|\s\(", " ".join(str(field.metadata.get("help", "")).split()), maxsplit=1)[0]
    default = default_of(field)
    shown = "" if default is None or default == [] else f" [{default}]"
    return f"{text.rstrip('.:;')}.{shown}"
