"""What must not change an update: batch layout, padding, order, evaluation; and what a plain distillation run is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ScriptedVerifier,
    StepRecorder,
    copied_weights,
    logged,
    relative_difference,
    script_generation,
    tiny_data,
    tiny_model,
    tiny_trainer,
)
from transformers import TrainerCallback

from sg_opd_trl import SGOPDTrainer, TeacherAnchorCallback
from sg_opd_trl.core import anchor_cross_entropy, anchor_token_weights
from sg_opd_trl.teacher_sampling.callback import AnchorStep

MIXED = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
NO_ANCHOR = {"teacher_sampling_enable": False}
ANCHOR = {
    "teacher_sampling_ratio": 0.6,  # 3 teacher prompts for 2 student prompts
    "teacher_sampling_phase1_end_frac": 1.0,
    "teacher_sampling_phase2_end_frac": 1.0,
    "teacher_sft_alpha_start": 0.7,
}
PLAIN = NO_ANCHOR | {"stability_tau": None, "lambda_high": 1.0, "lambda_base": 1.0, "disagree_interp_beta": 1.0}


def build(folder: Path, settings: dict, *, scripted: bool = True, **arguments: Any) -> tuple[Any, StepRecorder]:
    """A trainer whose rollouts depend on the prompts alone, and on the random state unless `scripted`."""
    recorder = StepRecorder()
    models = {"model": tiny_model(0), "teacher_model": tiny_model(1)}
    models |= {name: arguments.pop(name) for name in models if name in arguments}
    if scripted:
        models = {name: script_generation(model) for name, model in models.items()}
    base = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "stability_tau": 0.3}
    callbacks = [recorder, *arguments.pop("callbacks", [])]
    trainer = tiny_trainer(folder, settings=base | settings, callbacks=callbacks, **models, **arguments)
    return trainer, recorder


def final_weights(folder: Path, settings: dict, **arguments: Any) -> dict[str, torch.Tensor]:
    trainer, recorder = build(folder, settings, **arguments)
    trainer.train()
    weights = copied_weights(trainer.model)
    assert relative_difference(weights, recorder.weights[0]) > 0.01, "the run hardly changed the student"
    return weights


# --- plain distillation ----------------------------------------------------------------------------------------------
class InputsRecorder(SGOPDTrainer):
    """Keeps the micro-batches as the loss gets them."""

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)


def plain_log_probs(weights: dict[str, torch.Tensor], inputs: dict) -> tuple[torch.nn.Module, torch.Tensor]:
    model = tiny_model(0)
    model.load_state_dict(weights)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].size(1)
    logits = model.double()(ids, attention_mask=mask).logits[:, -width - 1 : -1]
    return model, logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


def test_without_gate_it_is_the_hand_written_distillation_loss(tmp_path: Path) -> None:
    settings = PLAIN | {"sign_gated_extrapolation": False, "max_steps": 1}
    trainer, recorder = build(tmp_path, settings, trainer_class=InputsRecorder)
    trainer.train()
    (inputs,) = trainer.seen
    student, student_logps = plain_log_probs(recorder.weights[0], inputs)
    _, teacher_logps = plain_log_probs(copied_weights(tiny_model(1)), inputs)
    mask = inputs["completion_mask"]
    advantages = (teacher_logps - student_logps).detach()
    loss = -((advantages * student_logps * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    gradient = {name: p.grad for name, p in student.named_parameters()}
    assert relative_difference(recorder.steps[0], gradient) < 1e-5
    value = -((advantages * mask).sum(1) / mask.sum(1)).mean()  # TRL's surrogate has the ratio 1 in place of log pi
    assert logged(trainer, "loss") == pytest.approx([value.item()], abs=1e-5)


def test_with_all_lambdas_one_the_verdicts_do_not_matter(tmp_path: Path) -> None:
    plain = PLAIN | {"max_steps": 1}
    trainer, expected = build(tmp_path, plain | {"sign_gated_extrapolation": False})
    trainer.train()
    value = logged(trainer, "loss")
    for verdicts in (MIXED, [1.0 - v for v in MIXED], [1.0] * 8, [0.0] * 8, [0.0, None, 1.0, 1.0] * 2):
        trainer, recorder = build(tmp_path, plain, reward_funcs=ScriptedVerifier(verdicts))
        trainer.train()
        assert logged(trainer, "loss") == value
        assert relative_difference(recorder.steps[0], expected.steps[0]) == 0.0


LAYOUTS = {
    "one_batch": {},
    "rows_apart": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "scored_row_by_row": {"max_tokens_per_scoring_batch": 1},
    "scored_at_once": {"max_tokens_per_scoring_batch": 10**6, "per_device_train_batch_size": 4,
                       "gradient_accumulation_steps": 2},
    "padded": {"pad_to_multiple_of": 16},
    "beside_an_anchor": ANCHOR | {"teacher_sampling_filter_correct": False, "teacher_max_completion_length": 9},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_equal_to_the_student_says_nothing(tmp_path: Path, layout: str) -> None:
    settings = NO_ANCHOR | {"max_steps": 1} | LAYOUTS[layout]
    trainer, _ = build(tmp_path, settings, teacher_model=tiny_model(0), reward_funcs=ScriptedVerifier(MIXED))
    trainer.train()
    assert max(logged(trainer, "teacher/abs_advantage_max")) <= 1e-5
    assert logged(trainer, "gate/neutral") == [1.0]


# --- batch layout ----------------------------------------------------------------------------------------------------
ANCHORS = {
    "no_anchor": NO_ANCHOR,
    "reserve": ANCHOR,
    "share": ANCHOR | {"teacher_sampling_prompts": "share", "teacher_sft_reduction": "seq_mean"},
    "batch_norm": NO_ANCHOR | {"stability_norm": "batch", "loss_type": "dapo"},
}


@pytest.mark.parametrize("anchor", ANCHORS)
def test_accumulation_gives_the_same_update(tmp_path: Path, anchor: str) -> None:
    def weights(rows: int, steps: int) -> dict[str, torch.Tensor]:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return final_weights(tmp_path, ANCHORS[anchor] | sizes)

    expected = weights(8, 1)
    for rows, steps in ((1, 8), (4, 2)):
        assert relative_difference(weights(rows, steps), expected) < 1e-6


class Reorder(TrainerCallback):
    """Another random state at each step, so that rows are shuffled in another order."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(1000 + state.global_step)


class Untrimmed(InputsRecorder):
    """Runs micro-batches as wide as TRL hands them over."""

    def on_micro_batch(self, inputs: dict) -> dict:
        super().on_micro_batch(inputs)
        return inputs


SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
PADDED = {"pad_to_multiple_of": 16}


@pytest.mark.parametrize("anchor", ["no_anchor", "reserve"])
def test_padding_trimming_and_row_order_change_nothing(tmp_path: Path, anchor: str) -> None:
    def run(settings: dict, **arguments: Any) -> tuple[dict[str, torch.Tensor], list[dict]]:
        trainer, _ = build(tmp_path, ANCHORS[anchor] | SMALL | settings, **arguments)
        trainer.train()
        return copied_weights(trainer.model), trainer.seen

    expected, inputs = run({}, trainer_class=InputsRecorder)
    padded, padded_inputs = run(PADDED, trainer_class=Untrimmed)
    trimmed, trimmed_inputs = run(PADDED, trainer_class=InputsRecorder)
    reordered, reordered_inputs = run({}, trainer_class=InputsRecorder, callbacks=[Reorder()])
    for other in (padded, trimmed, reordered):
        assert relative_difference(other, expected) < 1e-6
    assert {x["completion_ids"].size(1) for x in padded_inputs} == {16}
    assert all((x["completion_mask"].sum(0) > 0).all() for x in inputs)
    assert {x["completion_ids"].size(1) % 16 for x in trimmed_inputs} == {0}, "`pad_to_multiple_of` is kept"
    orders = [torch.cat([x["example_index"] for x in seen]) for seen in (inputs, reordered_inputs)]
    assert not torch.equal(*orders)


class WeighAll(TeacherAnchorCallback):
    """Hands every teacher rollout to the loss; only those judged right count in the denominator."""

    def keep(self, args: Any, verdict: float | None) -> bool:
        return True

    def fill(self, alpha: float, step: int) -> None:
        super().fill(alpha, step)
        micro_batches = self._bound().anchor.micro_batches
        right = [row for rows in micro_batches for row in rows if row.verdict == 1]
        assert 0 < len(right) < sum(map(len, micro_batches))
        total = float(sum(len(row.completion_ids) for row in right))
        self._bound().anchor = AnchorStep(alpha=alpha, kept=len(right), total=total, micro_batches=micro_batches)


class ZeroWeights(SGOPDTrainer):
    """Multiplies wrong teacher rollouts by zero instead of leaving them out."""

    def anchor_loss(self, anchor_logps: torch.Tensor, batch: Any, total: float) -> torch.Tensor:
        mask = batch.completion_mask
        right = (mask.sum(1) + batch.completion_ids[:, 0]) % 2 == 0  # as the verifier judges
        weights = anchor_token_weights(anchor_logps, mask, "chord")
        return anchor_cross_entropy(anchor_logps, mask, right, weights, reduction="token_mean", total=total)


def test_filtered_and_zero_weighted_teacher_rollouts_are_the_same_update(tmp_path: Path) -> None:
    settings = ANCHOR | SMALL | {"teacher_sampling_ratio": 0.8}
    expected = final_weights(tmp_path, settings)
    weighted = final_weights(tmp_path, settings, trainer_class=ZeroWeights, callbacks=[WeighAll()])
    assert relative_difference(weighted, expected) < 1e-6
    assert relative_difference(final_weights(tmp_path, settings | NO_ANCHOR), expected) > 1e-3


@pytest.mark.parametrize(
    "extra", [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}, {"loss_type": "bnpo"}], ids=str
)
def test_the_anchor_adds_the_same_gradient_to_any_student_loss(tmp_path: Path, extra: dict) -> None:
    def gradient(settings: dict) -> dict[str, torch.Tensor]:
        trainer, recorder = build(tmp_path, {"max_steps": 1} | settings)
        trainer.train()
        return recorder.steps[0]

    pairs = [(gradient(ANCHOR | more), gradient(NO_ANCHOR | more)) for more in ({}, extra)]
    added, expected = ({name: both[name] - alone[name] for name in both} for both, alone in pairs)
    assert relative_difference(added, expected) < 1e-5
    assert relative_difference(pairs[1][1], pairs[0][1]) > 1e-3, "the setting changed nothing"


def test_a_short_last_step_weighs_like_a_full_one(tmp_path: Path) -> None:
    # 6 prompts are 3 micro-batches of 8 rows: steps of 2 and of 1 with accumulation, 3 steps without. With a learning
    # rate of 0 the last step of both sees the same weights, rows and teacher prompts.
    settings = ANCHOR | {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "steps_per_generation": 1}
    settings |= {"teacher_sampling_prompts": "share", "teacher_sampling_ratio": 0.5}
    gradients = []
    for steps in (1, 2):
        trainer, recorder = build(
            tmp_path, settings | {"gradient_accumulation_steps": steps}, train_dataset=tiny_data(6)
        )
        trainer.train()
        assert logged(trainer, "anchor/rollouts") == {1: [2, 2, 2], 2: [4, 2]}[steps]
        assert logged(trainer, "anchor/loss")[-1] > 0
        gradients.append(recorder.steps[-1])
    assert relative_difference(*gradients) < 1e-6


def test_gradient_checkpointing_gives_the_same_update(tmp_path: Path) -> None:
    expected = final_weights(tmp_path, ANCHOR)
    assert relative_difference(final_weights(tmp_path, ANCHOR | {"gradient_checkpointing": True}), expected) < 1e-6


# --- evaluation and inner updates ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("prompts", "generation"), [("reserve", 4), ("share", 8)])
def test_evaluating_between_steps_gives_the_same_run(tmp_path: Path, prompts: str, generation: int) -> None:
    """Also between the two steps that share a generation batch of 8 micro-batches."""
    settings = ANCHOR | SMALL | {"max_steps": 3, "per_device_eval_batch_size": 4}
    settings |= {"teacher_sampling_prompts": prompts, "steps_per_generation": generation}
    expected = final_weights(tmp_path, settings, scripted=False)
    again = final_weights(tmp_path, settings | {"data_seed": 5, "seed": 7}, scripted=False)
    assert relative_difference(again, expected) > 1e-3, "rollouts do not depend on the random state"
    for with_teacher in (False, True):
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_with_teacher": with_teacher}
        weights = final_weights(tmp_path, settings | evaluation, scripted=False, eval_dataset=tiny_data(3))
        assert relative_difference(weights, expected) == 0.0


class SignalRecorder(InputsRecorder):
    """Keeps a2 and the gate of every micro-batch."""

    def compute_gate(self, verifier_advantages: torch.Tensor, teacher_advantages: torch.Tensor) -> torch.Tensor:
        gate = super().compute_gate(verifier_advantages, teacher_advantages)
        self.__dict__.setdefault("signals", []).append((teacher_advantages.clone(), gate))
        return gate


@pytest.mark.parametrize("anchor", ["no_anchor", "reserve", "share"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_signals_stay_those_of_the_rollout_policy(tmp_path: Path, iterations: int, anchor: str) -> None:
    """Two optimizer steps per pass over a generation batch, `iterations` passes."""
    steps = 2 * iterations
    settings = {"steps_per_generation": 2, "num_iterations": iterations, "max_steps": steps}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer, recorder = build(tmp_path, ANCHORS[anchor] | settings, trainer_class=SignalRecorder)
    trainer.train()
    assert len(trainer.signals) == len(recorder.weights) == steps
    for step, (inputs, (a2, gate)) in enumerate(zip(trainer.seen, trainer.signals, strict=True)):
        _, behaviour = plain_log_probs(recorder.weights[0], inputs)
        _, current = plain_log_probs(recorder.weights[step], inputs)
        mask = inputs["completion_mask"]
        expected = (inputs["teacher_logps"] - behaviour) * mask
        assert (a2 * mask - expected).abs().max() < 1e-5
        if step:
            assert ((current - behaviour) * mask).abs().max() > 0.01, "the student hardly moved"
        if step >= 2:
            assert torch.equal(a2, trainer.signals[step - 2][0])
            assert torch.equal(gate, trainer.signals[step - 2][1])
