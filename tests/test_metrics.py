"""Metrics of a logging window: sums and counts, divided once; and what a run logs against a count by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ScriptedVerifier, logged, script_generation, tiny_data, tiny_model, tiny_trainer
from torch import Tensor

from sg_opd_trl import SGOPDTrainer, TeacherAnchorCallback
from sg_opd_trl.bookkeeping import TrainingMetrics, reduce_over_ranks
from sg_opd_trl.core.diagnostics import MAXIMUM_NAMES, METRIC_NAMES, TokenStatistics


def statistics(index: int, total: float, count: float, largest: float = 0.0) -> TokenStatistics:
    """(sum, count) of one metric, nothing in the others; the maximum of each row group."""
    totals = torch.zeros(2 * len(METRIC_NAMES))
    totals[2 * index], totals[2 * index + 1] = total, count
    return TokenStatistics(totals, torch.tensor([largest] + [0.0] * (len(MAXIMUM_NAMES) - 1)))


# --- totals ----------------------------------------------------------------------------------------------------------
def test_a_metric_is_the_sum_of_totals_over_the_sum_of_counts() -> None:
    metrics = TrainingMetrics()
    metrics.add("train", "share", 1.0, 4.0)
    metrics.add("train", "share", 3.0, 1.0)  # (1 + 3) / (4 + 1), not the mean of .25 and 3
    metrics.add("train", "each", 2.0)
    metrics.add("train", "each", 4.0)
    metrics.add("train", "nothing", 0.0, 0.0)
    assert metrics.drain("train") == {"share": 0.8, "each": 3.0}


def test_drain_starts_a_new_window_of_its_mode_only() -> None:
    metrics = TrainingMetrics()
    metrics.add("train", "share", 1.0, 2.0)
    metrics.add("eval", "share", 3.0, 4.0)
    metrics.add_tokens("eval", statistics(0, 1.0, 1.0))
    assert metrics.drain("train") == {"share": 0.5}
    assert metrics.drain("train") == {}
    metrics.add("train", "share", 1.0, 1.0)
    assert metrics.drain("train") == {"share": 1.0}
    assert metrics.drain("eval") == {"share": 0.75, METRIC_NAMES[0]: 1.0}
    assert metrics.drain("eval") == {}


def test_token_statistics_are_merged_over_micro_batches() -> None:
    metrics, first = TrainingMetrics(), METRIC_NAMES.index("teacher/kl_k1")
    metrics.add_tokens("train", statistics(first, 2.0, 4.0, largest=3.0))
    metrics.add_tokens("train", statistics(first, 4.0, 2.0, largest=1.0))
    assert metrics.drain("train") == {"teacher/kl_k1": 1.0, "teacher/abs_advantage_max": 3.0}
    assert metrics.drain("train") == {}


class Ranks:
    """An accelerator on the first of several ranks; counts its exchanges."""

    def __init__(self, others: list[Tensor]) -> None:
        self.others = others
        self.exchanges = 0

    def gather(self, tensor: Tensor) -> Tensor:
        self.exchanges += 1
        return torch.cat([tensor, *self.others])


def test_ranks_are_summed_and_their_maxima_compared_in_one_exchange() -> None:
    names = 2 * len(METRIC_NAMES)
    other = torch.cat([torch.full((names,), 2.0), torch.tensor([5.0, 0.25, 0.0]), torch.tensor([10.0, 0.0])])
    ranks = Ranks([other.unsqueeze(0), 2 * other.unsqueeze(0)])
    own = TokenStatistics(torch.ones(names), torch.tensor([1.0, 1.0, 0.0]))
    reduced, sums = reduce_over_ranks(ranks, own, torch.tensor([1.0, 3.0]))
    assert ranks.exchanges == 1
    assert reduced.totals.tolist() == [1.0 + 2.0 + 4.0] * names
    assert reduced.maxima.tolist() == [10.0, 1.0, 0.0]
    assert sums == [1.0 + 10.0 + 20.0, 3.0]


# --- a run -----------------------------------------------------------------------------------------------------------
EOS = 1  # alone it is an empty rollout, whatever its verdict
VERDICTS = [1.0, 0.0, None, 1.0, 0.0, 0.0, 0.0, 0.0]
SETTINGS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 2,
    "gate_dead_zone": 0.05, "stability_tau": 0.3, "teacher_sampling_ratio": 0.75, "learning_rate": 1e-2,
    "teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0,
}  # fmt: skip


class Watched(SGOPDTrainer):
    """Keeps what each decision returned, by token, with the verdict of its row; and the anchor's parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tokens: list[dict[str, float]] = []
        self.anchors: list[float] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def route_advantages(self, gate: Any, *args: Any) -> Tensor:
        self.gate, self.routed = gate, super().route_advantages(gate, *args)
        return self.routed

    def compute_token_weights(self, teacher_advantages: Tensor, mask: Tensor, inputs: dict) -> Tensor:
        weights = super().compute_token_weights(teacher_advantages, mask, inputs)
        for row, column in mask.nonzero().tolist():
            names = {"gate": self.gate, "a": self.routed, "a2": teacher_advantages, "phi": weights}
            token = {name: float(values[row, column]) for name, values in names.items()}
            self.tokens.append(token | {"verdict": float(self.inputs["verdicts"][row])})
        return weights

    def anchor_loss(self, anchor_logps: Tensor, batch: Any, total: float) -> Tensor:
        loss = super().anchor_loss(anchor_logps, batch, total)
        self.anchors.append(loss.item())
        return loss


class Counted(TeacherAnchorCallback):
    """Keeps every verdict and length of the teacher's rollouts."""

    judged: list[float | None]

    def keep(self, args: Any, verdict: float | None) -> bool:
        self.__dict__.setdefault("judged", []).append(verdict)
        return super().keep(args, verdict)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    callback, verifier = Counted(), ScriptedVerifier(VERDICTS)
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("run"),
        settings=SETTINGS,
        trainer_class=Watched,
        model=script_generation(tiny_model(0)),
        teacher_model=script_generation(tiny_model(1)),
        reference_model=tiny_model(2),
        reward_funcs=verifier,
        callbacks=[callback],
    )
    gather, trainer.exchanged = trainer.accelerator.gather, []
    trainer.accelerator.gather = lambda tensor: trainer.exchanged.append(tensor.numel()) or gather(tensor)
    trainer.train()
    trainer.counted, trainer.verifier_calls = callback, verifier.calls
    return trainer


def mean(values: list[float]) -> float:
    assert values
    return sum(values) / len(values)


@pytest.mark.parametrize(("suffix", "verdict"), [("", None), ("/right", 1.0), ("/wrong", 0.0)])
def test_the_window_counts_every_token_once(run: Any, suffix: str, verdict: float | None) -> None:
    tokens = [t for t in run.tokens if verdict is None or t["verdict"] == verdict]
    classes = {"consensus": 1, "conflict": -1, "neutral": 0}
    expected = {f"gate/{name}": mean([float(t["gate"] == sign) for t in tokens]) for name, sign in classes.items()}
    for name, sign in classes.items():
        expected[f"gate/advantage_{name}"] = mean([t["a"] for t in tokens if t["gate"] == sign])
    expected["gate/sign_flips"] = mean([float(t["a"] * t["a2"] < 0) for t in tokens if t["gate"] == 1])
    expected["teacher/kl_k1"] = mean([-t["a2"] for t in tokens])
    expected["teacher/abs_advantage_mean"] = mean([abs(t["a2"]) for t in tokens])
    expected["teacher/abs_advantage_max"] = max(abs(t["a2"]) for t in tokens)
    expected["teacher/phi_mean"] = mean([t["phi"] for t in tokens])
    for name, value in expected.items():
        assert logged(run, name + suffix) == [pytest.approx(value, abs=1e-5)], name
    assert 0 < len(tokens) <= len(run.tokens)


def test_abstentions_are_neither_right_nor_wrong(run: Any) -> None:
    verdicts = [t["verdict"] for t in run.tokens]
    assert any(v != v for v in verdicts)
    assert {v for v in verdicts if v == v} == {0.0, 1.0}


def test_the_anchor_reports_means_per_step(run: Any) -> None:
    written = [ids for _, calls in run.verifier_calls for ids in calls if len(calls) != len(VERDICTS)]
    judged = run.counted.judged
    assert logged(run, "anchor/alpha") == [pytest.approx(0.2)]
    assert logged(run, "anchor/loss") == [pytest.approx(sum(run.anchors) / 2, rel=1e-5)]
    assert len(run.anchors) > 2, "several micro-batches of a step hold anchor rows"
    assert logged(run, "anchor/rollouts") == [len(judged) / 2] == [len(written) / 2]
    kept = [len(ids) for ids, verdict in zip(written, judged, strict=True) if verdict == 1 and ids[0] != EOS]
    assert logged(run, "anchor/tokens") == [sum(kept) / 2], "rollouts that were not kept enter no loss"
    assert logged(run, "anchor/verified_share") == [pytest.approx(mean([float(v == 1) for v in judged]))]
    assert 0 < logged(run, "anchor/verified_share")[0] < 1


def test_one_exchange_per_micro_batch_for_all_of_it(run: Any) -> None:
    packed = 2 * len(METRIC_NAMES) + len(MAXIMUM_NAMES) + 4  # the anchor, what is not finite, the matching loss
    assert run.exchanged.count(packed) == 2 * 4
    assert sum(size > 20 for size in run.exchanged) == 2 * 4


def test_times_are_per_step_and_their_sum_is_the_step(run: Any) -> None:
    parts = ("rollout", "verify", "teacher", "reference", "loss")
    seconds = [value for part in parts for value in logged(run, f"time/{part}")]
    (anchor,), (step,), (runtime,) = (logged(run, name) for name in ("time/anchor", "step_time", "train_runtime"))
    assert len(seconds) == len(parts)
    assert min(*seconds, anchor) > 0
    assert step - 1e-6 <= sum(seconds)  # TRL's clock is inside ours
    assert 2 * (sum(seconds) + anchor) <= runtime + 1e-3  # rounded


@pytest.mark.parametrize("with_teacher", [True, False])
def test_evaluation_logs_under_its_own_name(tmp_path: Path, with_teacher: bool) -> None:
    settings = SETTINGS | {"eval_with_teacher": with_teacher, "per_device_eval_batch_size": 4}
    trainer = tiny_trainer(tmp_path, settings=settings, eval_dataset=tiny_data(3))
    trainer.seconds["rollout"] = 2.0  # of a training step that is not over
    values = trainer.evaluate()
    assert trainer.seconds == {"rollout": 2.0}
    own = {name for name in values if name.startswith(("eval_gate/", "eval_teacher/", "eval_anchor/", "eval_time/"))}
    assert ("eval_gate/consensus" in own) == ("eval_teacher/kl_k1" in own) == with_teacher
    assert bool(own) == with_teacher
    assert not {name for name in own if "anchor" in name}
    assert trainer.metrics.drain("eval") == trainer.metrics.drain("train") == {}
