"""Keys of other people's recipes, and what they are called here.

The nearest known name helps against misspelling. A key of open-r1, of an older TRL or transformers, or of a file of
accelerate's is spelt right and means something: the nearest name (`dataset_config` for `dataset_prompt_column`) leads
astray.
"""

from collections.abc import Collection, Mapping

_RENAMED: Mapping[str, str] = {
    "dataset_prompt_column": "question_column",
    "dataset_solution_column": "answer_column",
    "dataset_id_or_path": "dataset_name",
    "dataset_configs": "dataset_config",
    "dataset_splits": "dataset_train_split",
    "torch_dtype": "dtype",
    "max_prompt_length": "max_prompt_tokens",
    "max_seq_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_completion_len": "max_completion_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "hub_model_revision": "hub_revision",
    "vllm_max_model_len": "vllm_max_model_length",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "student_model_name_or_path": "model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "reference_model": "reference_model_name_or_path",
    "ref_model": "reference_model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}
_BY_ENV: Mapping[str, str] = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_run_group": "WANDB_RUN_GROUP",
    "wandb_entity": "WANDB_ENTITY",
}
# Keys of the files that `accelerate config` writes; its launcher has no flag of that name.
_OF_ACCELERATE = frozenset(
    {
        "compute_environment",
        "deepspeed_config",
        "distributed_type",
        "dynamo_config",
        "main_process_ip_address",
        "megatron_lm_config",
        "mpirun_config",
        "tpu_env",
        "tpu_use_sudo_env",
    }
)
_WITHOUT_USE: Mapping[str, str] = {
    "save_safetensors": "Models are always saved so.",
    "benchmarks": "Measure with `sg-opd evaluate`.",
    "callbacks": "Add them in Python: `trainer.add_callback`.",
    "push_to_hub_revision": "Set `push_to_hub`, and `hub_revision` for a branch.",
    "overwrite_hub_revision": "Set `hub_revision`.",
    "vllm_device": "vLLM is in the training processes (`vllm_mode: colocate`) or a server of its own.",
    "chat_template": "Set `chat_template_path`, or save the template with the tokenizer.",
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR.",
}
# Settings of open-r1's reward functions: a function of one's own has its own.
_OF_REWARDS = ("cosine_", "repetition_", "code_", "e2b_", "morph_", "ioi_", "soft_punish_", "parallel_code_")


def advice_for(name: str, known: Collection[str]) -> str:
    """What to do about a key from elsewhere, as a sentence; "" for one that nobody has."""
    if name == "warmup_ratio" and "warmup_steps" in known:
        return "Here it is `warmup_steps`, where a number below 1 is a share of all steps."
    if name in _RENAMED and _RENAMED[name] in known:
        return f"Here it is `{_RENAMED[name]}`."
    if name in _BY_ENV:
        variable = _BY_ENV[name]
        if variable == "WANDB_ENTITY":  # no recipe may send a run to another account
            return f"Export {variable} in the shell."
        return f"Set it as a variable: `env: {{{variable}: ...}}`."
    if name in _OF_ACCELERATE:
        return "It belongs into a file for accelerate: name that with `accelerate_config`."
    if name.startswith(_OF_REWARDS):
        return "It is of open-r1's reward functions. Name a function of yours in `reward_funcs`."
    if name in _WITHOUT_USE:
        return f"It has no use here. {_WITHOUT_USE[name]}"
    return ""
