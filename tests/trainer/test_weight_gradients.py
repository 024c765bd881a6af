"""Gradients of whole steps with optional weights, masks and controls, against float64 loops.

`oracle` gives log-probs, classes, advantages and clipping; the weights are written once more here.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VERDICTS, Step, Weights, advantage, clipped, float64_model, group_advantages, log_probs
from oracle import token_class as class_of
from tiny import logged, relative_difference, tiny_tokenizer

from sg_opd_trl import SGOPDTrainer
from trainer.test_gradient_oracle import LIMIT, train

NEWLINE = "0123456789+=abcdefg\n "
VOCAB = tiny_tokenizer(NEWLINE).get_vocab()
#: Occur in most of the scripted rollouts, some of them twice.
SPECIAL = ["<eos>", "4", "8", "d"]


class Recorded(SGOPDTrainer):
    """Keeps the random numbers and which rows the models scored, by row of the generation batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.numbers: dict[int, list[float]] = {}
        self.batches: list[list[int]] = []
        self.scored: dict[str, list[list[bool]]] = {"teacher": [], "reference": []}
        Recorded.latest = self
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        rows = inputs["example_index"].tolist()
        if "gate_numbers" in inputs:
            self.batches.append(rows)
            self.numbers |= dict(zip(rows, inputs["gate_numbers"].tolist(), strict=True))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def score_with_teacher(self, batch: Any, rows: Any, inputs: dict) -> Any:
        self.scored["teacher"].append(rows.tolist())
        return super().score_with_teacher(batch, rows, inputs)

    def score_with_reference(self, batch: Any, rows: Any, inputs: dict) -> Any:
        self.scored["reference"].append(rows.tolist())
        return super().score_with_reference(batch, rows, inputs)


def kept(args: Any, completion: list[int]) -> list[bool]:
    special = {VOCAB[string] for string in args.special_token_mask or []}
    first = args.special_token_mask_scope == "first"
    return [not (y in special and not (first and y in completion[:t])) for t, y in enumerate(completion)]


def spans(args: Any, completion: list[int]) -> list[int]:
    if args.drift_gate_block != "newline":
        return [t // int(args.drift_gate_block) for t in range(len(completion))]
    return [completion[:t].count(VOCAB["\n"]) for t in range(len(completion))]


def unit_mean(weights: dict[int, float]) -> dict[int, float]:
    mean = sum(weights.values()) / len(weights)
    return {t: weight / mean for t, weight in weights.items()}


def drift_weights(args: Any, completion: list[int], tokens: list[int], ls: list, current: list) -> dict[int, float]:
    if args.drift_gate_tau is None:
        return dict.fromkeys(tokens, 1.0)
    block, drift = spans(args, completion), {t: ls[t] - current[t].item() for t in tokens}
    if args.drift_gate_mean == "absolute":
        drift = {t: abs(delta) for t, delta in drift.items()}
    means = {b: [drift[t] for t in tokens if block[t] == b] for b in set(block)}
    return unit_mean({t: math.exp(-args.drift_gate_tau * abs(sum(m := means[block[t]]) / len(m))) for t in tokens})


def teacher_weights(args: Any, a2: dict[int, float]) -> dict[int, float]:
    """phi and the prefix weight."""
    phi = unit_mean({t: min(1.0, args.stability_tau / abs(a)) for t, a in a2.items()})
    total, before, result = sum(map(abs, a2.values())), 0.0, {}
    for t in sorted(a2):
        result[t] = phi[t] * (1 + args.iw_opd_gamma * (1 - before / total))
        before += abs(a2[t])
    return result


def reference_gradient(
    args: Any, step: Step, batches: list[list[int]] | None = None, numbers: dict[int, list[float]] | None = None
) -> tuple[Weights, Counter]:
    student, *frozen = map(float64_model, (step.student, step.behaviour, step.teacher, step.reference))
    with torch.no_grad():
        scores = [[[float(x) for x in log_probs(m, r, args.temperature)] for m in frozen] for r in step.rollouts]
    masks = [kept(args, row.completion) for row in step.rollouts]
    wrong = [args.wrong_rollout_advantage is not None and verdict == 0 for verdict in VERDICTS]
    kinds = {
        (i, t): class_of(args, group_advantages()[i], scores[i][1][t] - scores[i][0][t])
        for i, mask in enumerate(masks) for t, ok in enumerate(mask) if ok and not wrong[i]
    }  # fmt: skip
    for batch in batches or []:
        decided = [key for key in kinds if key[0] in batch and kinds[key] != "neutral"]
        wanted = sum(kinds[key] == "consensus" for key in decided)
        chosen = sorted(decided, key=lambda key: numbers[key[0]][key[1]])[:wanted]
        kinds |= {key: "consensus" if key in chosen else "conflict" for key in decided}
    loss, rows, tokens = torch.zeros((), dtype=torch.float64), len(step.rollouts), sum(map(sum, masks))
    for i, row in enumerate(step.rollouts):
        ls, lt, lr = scores[i]
        current, counted = log_probs(student, row, args.temperature), [t for t, ok in enumerate(masks[i]) if ok]
        if not counted:
            continue
        drift = drift_weights(args, row.completion, counted, ls, current)
        a2 = {t: lt[t] - ls[t] for t in counted}
        weights = dict.fromkeys(counted, 1.0) if wrong[i] else teacher_weights(args, a2)
        for t in counted:
            a = args.wrong_rollout_advantage
            if not wrong[i]:
                a = advantage(args, kinds[i, t], group_advantages()[i], ls[t], lt[t], lr[t])
            a *= weights[t]
            gain = a * current[t] if step.student is step.behaviour else clipped(args, current[t], ls[t], a)
            loss = loss - drift[t] * gain / (tokens if args.loss_type == "dapo" else rows * len(counted))
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}, Counter(kinds.values())


def compare(args: Any, gradient: Weights, step: Step, **random: Any) -> tuple[Weights, Counter]:
    expected, classes = reference_gradient(args, step, **random)
    difference = relative_difference(gradient, expected)
    assert difference < LIMIT, f"relative difference {difference:.2e}"
    return expected, classes


def changed(args: Any, step: Step, expected: Weights, **settings: Any) -> float:
    """How far the expected gradient moves where settings are undone: the setting matters in this test."""
    for name, value in settings.items():
        setattr(args, name, value)
    return relative_difference(reference_gradient(args, step)[0], expected)


def run(folder: Path, settings: dict, steps: int = 1) -> tuple[Any, list[Weights], list[Step]]:
    tokenizers = {name: tiny_tokenizer(NEWLINE) for name in ("processing_class", "teacher_processing_class")}
    return train(folder, settings, steps=steps, trainer_class=Recorded, **tokenizers)


def test_prefix_weights(tmp_path: Path) -> None:
    args, (gradient,), (step,) = run(tmp_path, {"iw_opd_gamma": 0.5})
    expected, _ = compare(args, gradient, step)
    assert changed(args, step, expected, iw_opd_gamma=0.0) > 0.05
    assert 1.0 < logged(Recorded.latest, "weights/prefix_mean")[0] < 1.5


SPECIAL_TOKENS = {
    "grpo": {"special_token_mask_scope": "first"},
    "all": {"special_token_mask_scope": "all"},
    "dapo": {"loss_type": "dapo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_tokens(tmp_path: Path, name: str) -> None:
    args, (gradient,), (step,) = run(tmp_path, {"special_token_mask": SPECIAL} | SPECIAL_TOKENS[name])
    expected, classes = compare(args, gradient, step)
    every = sum(len(row.completion) for row in step.rollouts)
    share = logged(Recorded.latest, "weights/special_masked")[0]
    assert share == pytest.approx(1 - classes.total() / every) and 0.1 < share < 0.5
    both = [kept(args, row.completion) for row in step.rollouts]
    args.special_token_mask_scope = {"first": "all", "all": "first"}[args.special_token_mask_scope]
    assert [kept(args, row.completion) for row in step.rollouts] != both, "no token occurs twice"
    assert changed(args, step, expected, special_token_mask=None) > 0.05


DRIFT = {
    "blocks": {"drift_gate_block": "2"},
    "newline": {"drift_gate_block": "newline"},
    "absolute": {"drift_gate_block": "3", "drift_gate_mean": "absolute"},
    "everything": {
        "drift_gate_block": 2, "special_token_mask": ["a", "d"], "iw_opd_gamma": 0.5, "wrong_rollout_advantage": -0.3
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFT)
def test_drift_gate_in_the_second_inner_update(tmp_path: Path, name: str) -> None:
    settings = {"num_iterations": 2, "learning_rate": 0.02, "drift_gate_tau": 5.0}
    args, gradients, (first, second) = run(tmp_path, settings | DRIFT[name], steps=2)
    second = second._replace(behaviour=first.student)
    compare(args, gradients[0], first)
    expected, _ = compare(args, gradients[1], second)
    lowest, mean, highest = (logged(Recorded.latest, f"weights/drift_{kind}") for kind in ("min", "mean", "max"))
    assert lowest[0] == pytest.approx(1.0, abs=1e-4) and highest[0] <= 1.0
    assert 0 < lowest[1] < mean[1] < highest[1] <= 1
    assert changed(args, second, expected, drift_gate_tau=None) > 0.05


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_random_gate(tmp_path: Path, micro_batches: int) -> None:
    sizes = {"per_device_train_batch_size": 12 // micro_batches, "gradient_accumulation_steps": micro_batches}
    args, (gradient,), (step,) = run(tmp_path, {"gate_signal": "random"} | sizes)
    trainer = Recorded.latest
    assert len(trainer.batches) == micro_batches and sorted(row for rows in trainer.batches for row in rows) == list(
        range(12)
    )
    _, classes = compare(args, gradient, step, batches=trainer.batches, numbers=trainer.numbers)
    verifier, verified = reference_gradient(args, step)
    assert classes == verified and classes["consensus"] >= 5 <= classes["conflict"]
    assert relative_difference(gradient, verifier) > 0.05
    tokens = sum(classes.values())
    assert logged(trainer, "gate/consensus")[0] == pytest.approx(classes["consensus"] / tokens)


def test_random_gate_is_the_same_in_both_inner_updates_and_in_other_runs(tmp_path: Path) -> None:
    settings = {"gate_signal": "random", "num_iterations": 2, "learning_rate": 0.02}
    args, gradients, (first, second) = run(tmp_path / "1", settings, steps=2)
    trainer, second = Recorded.latest, second._replace(behaviour=first.student)
    for gradient, step in zip(gradients, (first, second), strict=True):
        compare(args, gradient, step, batches=trainer.batches[:1], numbers=trainer.numbers)
    run(tmp_path / "2", {"gate_signal": "random"})
    assert Recorded.latest.numbers == trainer.numbers
    run(tmp_path / "3", {"gate_signal": "random", "seed": 7})
    assert Recorded.latest.numbers != trainer.numbers


@pytest.mark.parametrize(
    "settings",
    [{}, {"stability_norm": "sequence", "iw_opd_gamma": 0.5}, {"gate_signal": "random"}, {"lambda_base": 1.25}],
    ids=str,
)
def test_fixed_advantage_of_wrong_rollouts(tmp_path: Path, settings: dict) -> None:
    args, (gradient,), (step,) = run(tmp_path, {"wrong_rollout_advantage": -0.7} | settings)
    trainer, random = Recorded.latest, {}
    if "gate_signal" in settings:
        random = {"batches": trainer.batches, "numbers": trainer.numbers}
    _, classes = compare(args, gradient, step, **random)
    assert classes["consensus"] >= 5 <= classes["conflict"]
    assert trainer.scored["teacher"] == [[verdict != 0 for verdict in VERDICTS]]
    assert not any(any(rows[i] for i, v in enumerate(VERDICTS) if v == 0) for rows in trainer.scored["reference"])
    names = set(trainer.state.log_history[0])
    assert "teacher/kl_k1/right" in names and "teacher/kl_k1/wrong" not in names


def test_batch_norm_of_phi_leaves_fixed_rollouts_out(tmp_path: Path) -> None:
    """The weights of the other rollouts have mean 1, though they are damped a lot before."""
    settings = {"wrong_rollout_advantage": -0.7, "stability_norm": "batch", "stability_tau": 0.1}
    run(tmp_path, settings)
    assert logged(Recorded.latest, "teacher/phi_mean") == [pytest.approx(1.0, abs=1e-5)]
    run(tmp_path, settings | {"stability_norm": "none"})
    assert logged(Recorded.latest, "teacher/phi_mean")[0] < 0.8
