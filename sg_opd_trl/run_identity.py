"""What makes a run the run it is, and what may be different where it goes on from a checkpoint.

Every setting is of one kind: of the mathematics, of how the work is carried out, or of what surrounds it. A name that
nobody has sorted counts as mathematics, so that a new field of TRL is asked about rather than passed over.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset

from . import __version__
from .errors import SGOPDConfigError, did_you_mean
from .scrubbing import without_secrets
from .trl_seam import STATE_FILE

logger = logging.getLogger(__name__)

Identity = dict[str, Any]
"""Settings by name, and what else makes a run; JSON-ready."""

RUN_FILE = "run.json"


def _names(text: str) -> frozenset[str]:
    """Words, apart from what stands behind a `#`."""
    return frozenset(word for line in text.splitlines() for word in line.partition("#")[0].split())


MATHEMATICS = _names("""
    # the optimizer, the schedule, the order of the rows
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim optim_args optim_target_modules max_grad_norm max_steps num_train_epochs per_device_train_batch_size
    gradient_accumulation_steps average_tokens_across_devices label_smoothing_factor neftune_noise_alpha seed data_seed
    dataloader_drop_last accelerator_config train_sampling_strategy shuffle_dataset ignore_data_skip bf16 fp16
    auto_find_batch_size
    # rollouts and TRL's loss
    num_generations num_iterations steps_per_generation max_completion_length temperature top_p top_k min_p
    repetition_penalty generation_kwargs cache_implementation chat_template_kwargs max_tool_calling_iterations
    vllm_structured_outputs_regex beta delta epsilon epsilon_high loss_type importance_sampling_level scale_rewards
    reward_weights multi_objective_aggregation mask_truncated_completions disable_dropout top_entropy_quantile
    off_policy_mask_threshold sync_ref_model ref_model_mixup_alpha ref_model_sync_steps router_aux_loss_coef
    sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    use_bias_correction_kl cast_lm_head_to_fp32 use_adaptive_entropy entropy_coef entropy_coef_delta entropy_coef_max
    entropy_coef_min entropy_target vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
    model_init_kwargs
    # SG-OPD
    teacher_model_name_or_path teacher_model_revision teacher_model_init_kwargs reference_model_name_or_path
    reference_model_revision reference_model_init_kwargs sign_gated_extrapolation lambda_high lambda_base disagree_mode
    disagree_interp_beta disagree_cell_lambdas neutral_mode gate_dead_zone verifier_reward_func gate_signal
    wrong_rollout_advantage task_reward_coef teacher_kl_coef coef_schedule coef_phase_end_fracs
    stability_tau stability_norm iw_opd_gamma drift_gate_tau drift_gate_block drift_gate_mean
    special_token_mask special_token_mask_scope distillation_mode distillation_topk asymmetric_threshold
    asymmetric_forward_kl_scale teacher_sampling_enable teacher_sampling_ratio teacher_sampling_prompts
    teacher_num_generations teacher_sampling_filter_correct teacher_sampling_phase1_end_frac
    teacher_sampling_phase2_end_frac teacher_sampling_time_separated teacher_sft_alpha_start teacher_sft_alpha_end
    teacher_sft_phi teacher_sft_reduction teacher_max_completion_length
    # SFT and GKD
    rollout_batch_size lmbda seq_kd max_new_tokens max_length truncation_mode packing packing_strategy padding_free
    assistant_only_loss completion_only_loss chat_template_path dataset_kwargs dataset_text_field eos_token pad_token
    # what no setting says
    method reward_funcs peft_config load_in_8bit load_in_4bit world_size train_dataset
""")
"""Another value would make another run: an error, unless `allow_changed` names it."""

CARRIED_OUT = _names("""
    use_cpu tf32 full_determinism gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs activation_offloading use_cache torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel liger_kernel_config deepspeed fsdp fsdp_config parallelism_config ddp_backend
    pad_to_multiple_of ds3_gather_for_generation use_transformers_paged use_transformers_continuous_batching
    transformers_continuous_batching_config use_vllm vllm_mode vllm_model_impl vllm_tensor_parallel_size
    vllm_max_model_length max_tokens_per_scoring_batch teacher_rollouts_path model_name_or_path model_revision version
    trl transformers restore_callback_states_from_checkpoint
""")
"""The same sums in another order, or elsewhere: a warning, as what follows is equal up to rounding."""

SURROUNDINGS = _names("""
    # output, saving, logging, evaluation, the Hub
    output_dir overwrite_output_dir allow_changed resume_from_checkpoint run_name project save_on_each_node
    save_only_model save_steps save_strategy save_total_limit enable_jit_checkpoint load_best_model_at_end
    metric_for_best_model greater_is_better log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy report_to disable_tqdm debug skip_memory_metrics
    include_num_input_tokens_seen include_for_metrics trackio_bucket_id trackio_space_id trackio_static_space_id
    log_completions log_completions_hub_repo log_multimodal log_unique_prompts num_completions_to_print do_train
    do_eval do_predict eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object batch_eval_metrics per_device_eval_batch_size prediction_loss_only bf16_full_eval
    fp16_full_eval num_generations_eval eval_packing eval_with_teacher preflight push_to_hub hub_always_push
    max_skipped_steps verifier_timeout hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    trust_remote_code
    # devices, processes and servers
    local_rank ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc torch_empty_cache_steps vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout teacher_model_server_url teacher_request_timeout teacher_max_retries teacher_offload
    # follow from others, or say what columns are called
    generation_batch_size label_names length_column_name remove_unused_columns
""")
"""No number of the training depends on it: nothing is said."""

# Names of models, whose weights are compared themselves where a run knows them.
_KNOWN_BY_WEIGHTS = {
    "teacher": ("teacher_model_name_or_path", "teacher_model_revision"),
    "reference": ("reference_model_name_or_path", "reference_model_revision"),
}
# Rows that are read for a fingerprint at most, evenly over the data.
_FINGERPRINT_ROWS = 10_000


# --- what makes a run ------------------------------------------------------------------------------------------------
def settings_identity(args: Any, **more: Any) -> Identity:
    """The settings that a run compares, without what surrounds it.

    Args:
        args: a configuration of transformers or TRL.
        more: what no setting says, by a name of `MATHEMATICS` or `CARRIED_OUT`.
    """
    versions = {"version": __version__, "trl": trl.__version__, "transformers": transformers.__version__}
    values = args.to_dict() | versions | {"world_size": args.world_size} | more
    return {name: _plain(value) for name, value in sorted(values.items()) if name not in SURROUNDINGS}


def data_fingerprint(dataset: Any) -> str | None:
    """Short hash of the rows of a data set and of how many there are; None for one that cannot be looked into.

    Of a large one, rows at even distances: it tells other data from these, it does not prove equality.
    """
    if not isinstance(dataset, Dataset):
        return None
    images = [name for name in ("image", "images") if name in dataset.column_names]
    rows = dataset.remove_columns(images).with_format(None)
    step = -(-len(rows) // _FINGERPRINT_ROWS) or 1
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in rows.select(range(0, len(rows), step)):
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


def peft_identity(model: Any) -> dict[str, Any] | None:
    """What adapters of a PEFT model compute, beside their weights; None without any."""
    if not hasattr(model, "peft_config"):
        return None
    kept = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora")
    return {
        name: {key: _plain(value) for key, value in config.to_dict().items() if key in kept}
        for name, config in model.peft_config.items()
    }


def _plain(value: Any) -> Any:
    """The value as a JSON file gives it back, without secrets."""
    return json.loads(json.dumps(without_secrets(_sorted(value)), default=str, sort_keys=True))


def _sorted(value: Any) -> Any:
    """The value with sets in one order, which is not that of every process."""
    if isinstance(value, Mapping):
        return {str(key): _sorted(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_sorted(each) for each in value] if isinstance(value, (list, tuple)) else value


# --- the identity of a checkpoint ------------------------------------------------------------------------------------
def stored_identity(folder: Path) -> Identity | None:
    """The identity of the run that wrote a checkpoint or owned a folder; None where nothing says it."""
    for name in (STATE_FILE, RUN_FILE):
        identity = read_json(folder / name).get("identity")
        if isinstance(identity, dict) and identity:
            return identity
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not readable and is taken as missing: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


def changes(before: Identity, now: Identity, names: Collection[str] | None = None) -> dict[str, tuple[Any, Any]]:
    """What differs, as name -> (before, now); what only one of them has cannot be compared.

    Args:
        before: of the checkpoint.
        now: of the run that would go on.
        names: to look at; all by default.
    """
    both = before.keys() & now.keys() - {"teacher", "reference"}
    known = {name for role, group in _KNOWN_BY_WEIGHTS.items() if before.get(role) and now.get(role) for name in group}
    # A fingerprint of None tells nothing.
    unknown = {"train_dataset"} if None in (before.get("train_dataset"), now.get("train_dataset")) else set()
    looked_at = sorted((both if names is None else both & set(names)) - known - unknown)
    return {name: (before[name], now[name]) for name in looked_at if before[name] != now[name]}


def compare(before: Identity, now: Identity, source: str, allowed: Collection[str]) -> bool:
    """Refuse to go on with other mathematics than a checkpoint's, and name what else is different.

    Args:
        before: of the checkpoint.
        now: of the run.
        source: of the checkpoint, for messages.
        allowed: names that may differ.

    Returns:
        Whether the mathematics is the same.

    Raises:
        SGOPDConfigError: names every difference that is not allowed, with both values.
    """
    found = changes(before, now)
    mathematics = {name: values for name, values in found.items() if name not in CARRIED_OUT}
    refused = {name: values for name, values in mathematics.items() if name not in allowed}
    if refused:
        names = ", ".join(sorted({*refused, *allowed}))
        raise SGOPDConfigError(
            f"`resume_from_checkpoint` must go on with the run of its checkpoint, got {told(refused)} in {source}. "
            f"The result would be of neither run. Set it back; or set `allow_changed: [{names}]` if it is meant; or "
            "start a new run in another `output_dir`."
        )
    rest = {name: values for name, values in found.items() if name not in refused}
    if rest:
        logger.warning("The run that goes on from %s differs from it: %s.", source, told(rest))
    return not mathematics


def told(found: Mapping[str, tuple[Any, Any]]) -> str:
    """What `changes` has found, for a message."""
    return "; ".join(f"`{name}` {_short(now)} in place of {_short(before)}" for name, (before, now) in found.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- settings --------------------------------------------------------------------------------------------------------
def allowed_problems(config: Any) -> Iterator[str]:
    """What is wrong with `allow_changed`: names that are no setting, or that nobody compares."""
    others = CARRIED_OUT | SURROUNDINGS
    known = (MATHEMATICS | {each.name for each in fields(config)}) - others
    for name in config.allow_changed or ():
        if name not in known:
            why = "It may differ anyway." if name in others else f"Nothing is called so.{did_you_mean(name, known)}"
            yield (
                f"`allow_changed` must name what a resumed run must have in common with its checkpoint, got {name!r}. "
                f"{why} Correct it, or leave it out."
            )
