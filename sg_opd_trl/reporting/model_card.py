"""The model card of a distilled student: what taught it, how, and how well it does."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..core.routing import DISAGREE_MODES, DISAGREE_ROUTES
from ..evaluation import EvaluationResult
from .settings import display_name, is_local, show_value, shown_results
from .templates import render

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Only these settings show, in this order; those that a config does not have are passed over.
_METHOD_FIELDS = (
    "sign_gated_extrapolation", "lambda_high", "lambda_base", "disagree_mode", "disagree_interp_beta",
    "disagree_cell_lambdas", "neutral_mode", "gate_dead_zone", "verifier_reward_func",
    "task_reward_coef", "teacher_kl_coef", "coef_schedule", "coef_phase_end_fracs", "stability_tau",
    "stability_norm", "iw_opd_gamma", "drift_gate_tau", "drift_gate_block", "distillation_mode",
    "distillation_topk", "teacher_sampling_enable", "teacher_sampling_ratio", "teacher_sampling_prompts",
    "teacher_num_generations", "teacher_sampling_filter_correct", "teacher_sampling_phase1_end_frac",
    "teacher_sampling_phase2_end_frac", "teacher_sft_alpha_start", "teacher_sft_alpha_end", "teacher_sft_phi",
    "teacher_sft_reduction", "teacher_max_completion_length",
)  # fmt: skip
# Settings of the routes that the configuration calls otherwise.
_FIELDS_OF_ROUTES = {"cell_lambdas": "disagree_cell_lambdas"}
_TRAINING_FIELDS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "loss_type",
    "epsilon", "epsilon_high", "delta", "beta", "num_iterations", "scale_rewards", "num_generations",
    "temperature", "top_p", "top_k", "max_completion_length", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "use_vllm", "bf16",
    "fp16", "seed",
)  # fmt: skip


def build_model_card(
    *,
    model_name: str,
    base_model: str | None,
    teacher_model: str | None,
    reference_model: str | None,
    dataset_name: str | None,
    tags: Iterable[str],
    config: Mapping[str, Any],
    is_adapter: bool,
    evaluations: Mapping[str, EvaluationResult | Mapping[str, Any]] | None,
    citation: str,
) -> ModelCard:
    """Write the card; nothing is looked up anywhere, and what is not known is left out.

    Args:
        model_name: Hub id or folder of the student that the card is for.
        base_model: Hub id or folder of the student before the run.
        teacher_model: Hub id, folder or address of the teacher.
        reference_model: Hub id or folder of the reference; `None` means the student's initial weights.
        dataset_name: Hub id or folder of the training prompts.
        tags: of the front matter.
        config: settings of the run, `SGOPDConfig.to_dict()`; only settings of the method and the optimization show.
        is_adapter: whether only adapter weights are saved.
        evaluations: label -> result (or its `to_dict`) for the results table. The one whose label has the word
            "after" is this model's and becomes its `model-index`.
        citation: BibTeX entry of the method.

    Returns:
        The card; local folders appear by their last part.
    """
    results = shown_results(evaluations or {})
    name = display_name(model_name)
    # Front matter holds links of the Hub: a folder of this machine would be a link to nowhere.
    on_hub = is_hub_id(base_model)
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=[str(dataset_name)] if is_hub_id(dataset_name) else None,
        eval_results=_model_index(results) or None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        teacher_model=show_value(teacher_model) if teacher_model else None,
    )
    body = render(
        "model_card.md.jinja",
        **_method_of(config),
        model_name=name,
        base_model=_shown(base_model),
        teacher_model=_shown(teacher_model),
        reference_model=_shown(reference_model),
        dataset_name=_shown(dataset_name),
        is_adapter=is_adapter,
        results={_cell(label): result for label, result in results.items()},
        decoding=sorted({_cell(result.describe_settings()) for result in results.values()}),
        citation=citation.strip(),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def is_hub_id(name: str | None) -> bool:
    """Whether the Hub can resolve a name: `owner/name`, neither a local folder nor built in."""
    if name is None or name.startswith("builtin/"):
        return False
    return _HUB_ID.fullmatch(name) is not None and not is_local(name)


def _method_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the body says of the settings."""
    mode = DISAGREE_ROUTES[config.get("disagree_mode", DISAGREE_MODES[0])]
    factors = [f"`{_FIELDS_OF_ROUTES.get(name, name)}`" for name in sorted(mode.consensus.settings())]
    return {
        "consensus": " and ".join(factors) or "a fixed factor",
        "conflict": _cell(mode.help),
        "neutral_as_conflict": config.get("neutral_mode") == "conflict",
        "gated": config.get("sign_gated_extrapolation", True),
        "anchored": config.get("teacher_sampling_enable", True),
        "max_new_tokens": config.get("max_completion_length") or 1024,
        "temperature": config.get("temperature", 1.0),
        "method": _settings(config, _METHOD_FIELDS),
        "training": _settings(config, _TRAINING_FIELDS),
    }


def _shown(name: str | None) -> str | None:
    return _cell(show_value(name)) if name else None


def _settings(config: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, _cell(show_value(config[name]))) for name in names if config.get(name) is not None]


def _cell(text: str) -> str:
    """Text that cannot end a table cell, start markup or open a tag."""
    return re.sub(r"([|`<\[\]*])", r"\\\1", " ".join(text.split()))


def _model_index(results: Mapping[str, EvaluationResult]) -> list[EvalResult]:
    # "after" as a word: a label such as "thereafter" names no model of this run.
    own = [result for label, result in results.items() if re.search(r"\bafter\b", label, re.IGNORECASE)]
    if len(own) != 1:
        return []
    result = own[0]
    settings = {
        name: getattr(result, name) for name in ("num_samples", "temperature", "top_p", "max_new_tokens", "seed")
    }
    metrics = (
        (f"avg@{result.num_samples}", result.avg_at_k, result.avg_interval),
        (f"pass@{result.k}", result.pass_at_k, result.pass_interval),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(result.dataset) if is_hub_id(result.dataset) else "other",
            dataset_name=result.dataset or "evaluation problems",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 4),
            metric_args={
                **settings,
                "num_problems": result.num_problems,
                "interval_95": [round(x, 4) for x in interval],
                **({"no_verdict": result.abstained} if result.abstained else {}),
            },
        )
        for metric, value, interval in metrics
        if value is not None and interval is not None
    ]
