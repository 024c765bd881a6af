"""What the package leans on in TRL 1.16, name by name: a TRL that moves one must fail here and not in a run."""

import ast
import dataclasses
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.generation.vllm_generation
from repository import MODULES, PACKAGE, check_none, name_of
from tiny import parity_verifier, save_pair, tiny_data, tiny_model, tiny_trainer
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from sg_opd_trl import SGOPDConfig, SGOPDTrainer
from sg_opd_trl.trl_seam import GRPOSeam, WholeFiles, has_adapters_inside

SEAM = PACKAGE / "trl_seam.py"
OTHERS = [path for path in MODULES if path != SEAM]
# Class attributes that TRL asks subclasses to set.
DECLARED = {"_tag_names", "_name", "_paper", "_VALID_DICT_FIELDS"}
# method -> parameters that the seam passes on by position or name
SIGNATURES = {
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_generate": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_tokenize_prompts": ["self", "prompts"],
    "_get_output_dir": ["self", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "init_hf_repo": ["self", "token", "private"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_get_train_sampler": ["self", "dataset"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "log": ["self", "logs", "start_time"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
}
OVERRIDABLE = set(dir(GRPOTrainer)) - set(dir(object))
ATTRIBUTES = [
    "_tokenizer", "_is_vlm", "_metrics", "_logs", "_buffered_inputs", "_step", "accelerator", "num_generations",
    "num_generations_eval", "max_completion_length", "reward_funcs", "reward_func_names", "processing_class",
    "temperature", "eos_token_ids", "environment_factories", "ref_model", "callback_handler", "eval_dataset",
]  # fmt: skip


def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def private_names_of_trl() -> set[str]:
    """Everything private that TRL's and transformers' trainers define or set on themselves."""
    modules = [inspect.getmodule(kind) for kind in (GRPOTrainer, GRPOTrainer.__mro__[1], Trainer)]
    assigned = {name for module in modules for name in re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(module))}
    return {name for name in assigned | set(dir(GRPOTrainer)) if re.match(r"_[a-zA-Z]", name)}


def private_names_touched(path: Path) -> list[str]:
    """Where a file reads or writes names of TRL's trainers, but for those of a class of its own (`self._step`)."""
    nodes = list(ast.walk(syntax(path)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    forbidden = private_names_of_trl() - DECLARED
    return [
        f"{name_of(path)}:{node.lineno}: {node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr in forbidden
        and not (node.attr in own and isinstance(node.value, ast.Name) and node.value.id == "self")
    ]


def imports_from_inside_trl(path: Path) -> list[str]:
    found = []
    for node in ast.walk(syntax(path)):
        modules = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        public = ("trl.scripts", "trl.experimental")
        inside = [name for name in modules if name.startswith("trl.") and not name.startswith(public)]
        found += [f"{name_of(path)}:{node.lineno}: {name}" for name in inside]
    return found


def test_the_supported_version() -> None:
    assert re.match(r"1\.16\.", trl.__version__), "read the release notes, run this file, then widen the pin"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert parameters[: len(SIGNATURES[name])] == SIGNATURES[name]


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for kind in (GRPOSeam, WholeFiles)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and name in OVERRIDABLE
    ),
)
def test_overrides_accept_what_trl_passes(name: str) -> None:
    ours, theirs = (getattr(kind, name) for kind in (GRPOSeam, GRPOTrainer))
    own, parent = (inspect.signature(method).parameters.values() for method in (ours, theirs))
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own):
        return
    assert [parameter.name for parameter in own] == [parameter.name for parameter in parent]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own trainer after one step, with what its private steps were given and returned."""
    seen: dict[str, Any] = {"forwards": 0}

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
            seen["examples"], seen["rollouts"] = inputs, super()._generate_and_score_completions(inputs)
            seen["metrics"] = {name: list(values) for name, values in self._metrics["train"].items()}
            return seen["rollouts"]

        def _generate(self, prompts: list) -> Any:
            seen["written"] = super()._generate(prompts)
            return seen["written"]

        def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
            seen["rewards"] = super()._calculate_rewards(*arguments)
            return seen["rewards"]

        def _compute_loss(self, model: Any, inputs: dict) -> torch.Tensor:
            before = seen["forwards"]
            loss = super()._compute_loss(model, inputs)
            seen["inputs"], seen["forwards_in_loss"] = inputs, seen["forwards"] - before
            return loss

        def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
            seen["forwards"] += 1
            seen["scores"] = super()._get_per_token_logps_and_entropies(*arguments, **named)
            return seen["scores"]

    trainer = Watched(
        save_pair(tmp_path_factory.mktemp("student"), 0),
        parity_verifier,
        GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("plain")), per_device_train_batch_size=8, num_generations=4,
            max_completion_length=6, max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            gradient_checkpointing=False, beta=0.1, num_iterations=2, disable_tqdm=True,
        ),
        train_dataset=tiny_data(),
    )  # fmt: skip
    trainer.train()
    trainer.seen = seen
    return trainer


def test_attributes(plain: Any) -> None:
    assert [name for name in ATTRIBUTES if not hasattr(plain, name)] == []


def test_kinds_of_the_attributes(plain: Any) -> None:
    assert isinstance(plain._metrics["train"]["a new name"], list)
    assert isinstance(plain._buffered_inputs, list)
    assert plain._step == 1
    assert plain.eos_token_ids == [1]
    assert isinstance(plain._tokenize_prompts([tiny_data()[0]["prompt"]])[0][0][0], int)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("prompt_ids", "BP"), ("prompt_mask", "BP"), ("completion_ids", "BT"), ("completion_mask", "BT"),
        ("advantages", "B"), ("old_per_token_logps", "BT"), ("ref_per_token_logps", "BT"), ("num_items_in_batch", ""),
    ],
)  # fmt: skip
def test_entries_of_the_rollouts(plain: Any, key: str, shape: str) -> None:
    rollouts = plain.seen["rollouts"]
    sizes = {"B": 8, "P": rollouts["prompt_ids"].size(1), "T": rollouts["completion_ids"].size(1)}
    assert rollouts[key].shape == tuple(sizes[letter] for letter in shape)
    assert len(plain.seen["examples"]) == 8


def test_what_is_written_begins_with_prompts_and_completions_in_the_order_of_the_examples(plain: Any) -> None:
    prompts, completions = plain.seen["written"][:2]
    assert prompts == plain._tokenize_prompts([example["prompt"] for example in plain.seen["examples"]])[0]
    rollouts = plain.seen["rollouts"]
    pairs = zip(rollouts["completion_ids"], rollouts["completion_mask"], strict=True)
    assert completions == [ids[mask == 1].tolist() for ids, mask in pairs]


def test_rewards_are_of_all_ranks_with_one_column_per_function(plain: Any) -> None:
    assert plain.seen["rewards"].shape == (8, 1)


def test_the_last_generation_batch_is_kept_for_the_logs_in_its_order(plain: Any) -> None:
    written, rewards = plain.seen["written"][1], plain.seen["rewards"][:, 0].tolist()
    assert list(plain._logs["completion"]) == [
        [{"role": "assistant", "content": plain._tokenizer.decode(ids, skip_special_tokens=True)}] for ids in written
    ]
    assert {name: list(values) for name, values in plain._logs["rewards"].items()} == {"parity_verifier": rewards}
    assert plain.seen["metrics"]["completions/max_length"][-1] == max(map(len, written))
    cut_off = sum(ids[-1] != 1 for ids in written) / len(written)
    assert plain.seen["metrics"]["completions/clipped_ratio"][-1] == pytest.approx(cut_off)


def test_the_loss_runs_the_policy_once_and_gets_three_values(plain: Any) -> None:
    assert plain.seen["forwards_in_loss"] == 1
    logps, entropies, auxiliary_loss = plain.seen["scores"]
    assert logps.shape == entropies.shape == plain.seen["rollouts"]["completion_ids"].shape
    assert auxiliary_loss is None


def test_the_loss_takes_advantages_per_token_and_reads_them_after_its_forward(plain: Any) -> None:
    inputs = dict(plain.seen["inputs"])
    plain.model.train()
    per_row = plain._compute_loss(plain.model, dict(inputs)).item()
    tokens = inputs["advantages"].unsqueeze(1).expand(inputs["completion_ids"].shape)
    assert plain._compute_loss(plain.model, inputs | {"advantages": tokens.clone()}).item() == pytest.approx(per_row)
    doubled = dict(inputs)
    forward = plain._get_per_token_logps_and_entropies

    def write_then_return(*arguments: Any, **named: Any) -> Any:
        doubled["advantages"] = 2 * tokens
        return forward(*arguments, **named)

    plain._get_per_token_logps_and_entropies = write_then_return
    late = plain._compute_loss(plain.model, doubled).item()
    plain._get_per_token_logps_and_entropies = forward
    assert late == pytest.approx(plain._compute_loss(plain.model, inputs | {"advantages": 2 * tokens}).item())
    assert late != pytest.approx(per_row)


def test_rows_of_added_entries_travel_through_shuffle_and_split() -> None:
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    rows = torch.arange(6)
    batch = {"completion_ids": rows.unsqueeze(1), "example_index": rows, "teacher_logps": -rows.float().unsqueeze(1)}
    scalar = {"stability_denominator": torch.tensor(2.0)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch | scalar), 3)
    assert len(parts) == 3
    assert sorted(int(i) for part in parts for i in part["example_index"]) == list(range(6))
    for part in parts:
        assert torch.equal(part["teacher_logps"].squeeze(1), -part["example_index"].float())
        assert torch.equal(part["completion_ids"].squeeze(1), part["example_index"])
        assert part["stability_denominator"] == 2.0


def test_functions_around_models() -> None:
    from trl.distributed import DistributedBackend
    from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, is_async_callable

    head = inspect.signature(add_fused_lm_head).parameters
    assert {"temperature", "cast_lm_head_to_fp32", "outputs"} <= head.keys()
    assert {"is_fsdp", "is_zero3", "summon_full_params"} <= set(dir(DistributedBackend)) | set(
        re.findall(r"self\.(\w+)", inspect.getsource(DistributedBackend))
    )
    assert list(inspect.signature(prepare_deepspeed).parameters)[:2] == ["model", "accelerator"]
    assert list(inspect.signature(prepare_fsdp).parameters)[:2] == ["model", "accelerator"]
    assert list(inspect.signature(unwrap_model_for_generation).parameters)[:2] == ["model", "accelerator"]
    assert next(iter(inspect.signature(disable_gradient_checkpointing).parameters)) == "model"
    assert next(iter(inspect.signature(create_model_from_path).parameters)) == "model_id"
    assert get_config_model_id(tiny_model(0).config) == ""
    assert not is_async_callable(parity_verifier)


def test_the_fused_head_asks_one_function_which_positions_to_project() -> None:
    """`compact_head` replaces that function by name where the head looks it up, and nothing else uses the name."""
    from trl.trainer import utils

    assert inspect.getsource(utils.add_fused_lm_head).count("_use_triton(") == 1
    assert inspect.getsource(utils).count("_use_triton(") == 1
    assert list(inspect.signature(utils._use_triton).parameters) == ["device"]
    assert inspect.getsource(utils.add_fused_lm_head).count("_CHUNKED_LOGPROB_CHUNK_SIZE") == 1


def test_what_the_second_output_of_a_head_leans_on() -> None:
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, maybe_gather_lm_head_ctx

    model = tiny_model(0)
    add_fused_lm_head(model, temperature=0.5, cast_lm_head_to_fp32=True)
    settings = inspect.getclosurevars(model.forward.__func__).nonlocals
    assert (settings["temperature"], settings["cast_lm_head_to_fp32"]) == (0.5, True)
    assert (settings["logit_scale"], settings["final_logit_softcapping"]) == (1.0, None)
    assert getattr(model, settings["backbone_attr"]) is model.model
    assert {"log_probs", "entropy", "aux_loss"} <= {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    assert next(iter(inspect.signature(maybe_gather_lm_head_ctx).parameters.values())).kind.name == "VAR_POSITIONAL"


def test_what_a_forward_of_ones_own_leans_on(tmp_path: Path) -> None:
    """The names by which forwards of TRL and accelerate are told, and what is beneath them."""
    from accelerate import Accelerator
    from accelerate.utils.operations import ConvertOutputsToFp32
    from trl.trainer.utils import add_fused_lm_head

    model = tiny_model(0)
    add_fused_lm_head(model)
    held = inspect.getclosurevars(model.forward.__func__).nonlocals
    assert held["outputs"] == ("log_probs",)
    assert held["original_forward"].__self__ is model
    assert held["original_forward"].__func__ is type(model).forward
    beneath = model.forward.__func__
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp = True
    accelerator.prepare_model(model, evaluation_mode=True)
    around = inspect.getclosurevars(model.forward.__func__).nonlocals["model_forward"]
    assert isinstance(around, ConvertOutputsToFp32)
    assert around.model_forward.__wrapped__ is beneath
    assert vars(model)["_original_forward"].__func__ is beneath
    assert "_is_accelerate_prepared" in inspect.getsource(Accelerator)
    # The head that is computed in float32 keeps to the layer it was made for, by this name.
    student = tiny_trainer(tmp_path, settings={"cast_lm_head_to_fp32": True, "teacher_sampling_enable": False}).model
    assert set(inspect.getclosurevars(student.lm_head.forward).nonlocals) == {"lm_head"}


def test_transformers_restores_callbacks_in_one_place() -> None:
    loading = inspect.getsource(Trainer._init_training_state)
    assert loading.count("self._load_callback_state()") == 1
    restoring = inspect.getsource(Trainer._load_callback_state)
    assert "self.state.stateful_callbacks.items()" in restoring
    assert "type(callback)(**args)" in restoring


def test_rewards_are_gathered_past_the_accelerator_by_one_name() -> None:
    """The seam has it gather by the accelerator: before that a rank whose reward function fails says so."""
    rewards = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert rewards.count(" gather(") == 1
    assert rewards.index("reward_func(") < rewards.index(" gather(")
    assert "accelerator.gather" not in rewards


def test_transformers_gathers_losses_where_it_logs() -> None:
    for loop in (Trainer._run_epoch, Trainer._inner_training_loop):
        assert "nested_gather" not in inspect.getsource(loop)
    assert "nested_gather(tr_loss" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_the_scoring_step_does_nothing_with_the_model_but_call_it_once() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "model"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func in uses]
    assert len(uses) == len(calls) == 1
    assert {keyword.arg for keyword in calls[0].keywords} == {None, "labels", "fused_lm_head"}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_a_token_with_a_ratio_of_one_loses_its_advantage_with_its_gradient(plain: Any, loss_type: str) -> None:
    """What `matched_advantages` stands on, for advantages of both signs, ties of the clipping included."""
    inputs = dict(plain.seen["inputs"])
    logps = torch.full(inputs["completion_ids"].shape, -1.0)
    advantages = torch.linspace(-3, 5, logps.numel()).view(logps.shape).requires_grad_()
    plain._get_per_token_logps_and_entropies = lambda *_, **__: (logps, -logps, None)
    before = plain.loss_type, plain.beta, plain.args.delta
    plain.loss_type, plain.beta, plain.args.delta = loss_type, 0.0, 1.0
    loss = plain._compute_loss(plain.model, inputs | {"advantages": advantages, "old_per_token_logps": logps})
    plain.loss_type, plain.beta, plain.args.delta = before
    del plain._get_per_token_logps_and_entropies
    (gradient,) = torch.autograd.grad(loss, advantages)
    assert loss.item() == pytest.approx((gradient * advantages).sum().item(), rel=1e-5, abs=1e-6), "linear"
    counted = inputs["completion_mask"] != 0
    assert (gradient[counted] < 0).all()
    assert (gradient[~counted] == 0).all()
    rows = [row[mask] for row, mask in zip(gradient, counted, strict=True)]
    assert all((row - row[0]).abs().max() < 1e-8 for row in rows), "tokens of a row weigh the same"


# --- nobody else does -----------------------------------------------------------------------------------------------
def test_an_engine_is_given_weights_by_one_method_that_merges_and_unmerges() -> None:
    """`keep_base_weights` stands around it, in the instance."""
    engine = trl.generation.vllm_generation.VLLMGeneration
    assert inspect.isgeneratorfunction(engine._iter_named_params)
    assert {"merge_adapter", "unmerge_adapter"} <= set(
        re.findall(r"\w+", inspect.getsource(engine._iter_named_params))
    )
    assert "self._iter_named_params()" in inspect.getsource(engine.sync_weights)
    assert "merge_adapter" not in inspect.getsource(engine.sync_weights)


def test_no_other_file_touches_private_names_of_trl() -> None:
    check_none([offence for path in OTHERS for offence in private_names_touched(path)])


def test_no_other_file_imports_from_inside_trl() -> None:
    check_none([offence for path in OTHERS for offence in imports_from_inside_trl(path)])


def test_the_seam_does_touch_them() -> None:
    """The two tests above can fail: the same search finds the seam's names and imports."""
    touched = {offence.rpartition(" ")[2] for offence in private_names_touched(SEAM)}
    # Not `_buffered_inputs` and `_step`: what a file assigns itself counts as its own.
    assert {"_metrics", "_is_vlm", "_tokenizer"} <= touched
    assert {"_metrics", "_generate_and_score_completions", "_attn_implementation"} & private_names_of_trl() == {
        "_metrics",
        "_generate_and_score_completions",
    }
    assert "trl.trainer.utils" in {offence.rpartition(" ")[2] for offence in imports_from_inside_trl(SEAM)}


def test_our_own_private_names_hide_none_of_trls() -> None:
    above = set(SGOPDTrainer.__mro__[: SGOPDTrainer.__mro__.index(GRPOSeam)])
    own = {name for kind in above for name in vars(kind) if re.match(r"_[a-z]", name)}
    own |= {name for kind in above for name in re.findall(r"\bself\.(_[a-z]\w*) *[:=][^=]", inspect.getsource(kind))}
    assert own
    assert own & (private_names_of_trl() - DECLARED) == set()


def test_fields_of_the_configuration_hide_none_of_trls() -> None:
    """Seven defaults are the paper's on purpose; every other name of ours is new."""
    overridden = {name for name in vars(SGOPDConfig)["__annotations__"] if name in GRPOConfig.__dataclass_fields__}
    assert overridden == {
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "loss_type",
        "delta",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
    }


def test_adapters_loaded_into_a_plain_model_are_told() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(0)
    assert not has_adapters_inside(model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert has_adapters_inside(model)
    assert not has_adapters_inside(torch.nn.Linear(1, 1))
