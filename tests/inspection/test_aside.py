"""What an inspection samples, judges and scores leaves nothing in the run but what the teacher has done."""

import copy

import torch
from tiny import ANCHOR, copied_weights, tiny_trainer


def after_two_steps(folder, *, checked):
    trainer = tiny_trainer(folder, settings=ANCHOR)
    if checked:
        trainer.check()
    torch.manual_seed(3)
    trainer.train()
    logs = [
        {
            k: v
            for k, v in entry.items()
            if not k.startswith(("time/", "train_", "step_time", "teacher/generated", "teacher/scored"))
        }
        for entry in trainer.state.log_history
    ]
    return copied_weights(trainer.model), logs


def test_a_run_after_a_check_is_the_run_without_in_every_bit(tmp_path):
    weights, logs = after_two_steps(tmp_path, checked=True)
    expected, expected_logs = after_two_steps(tmp_path, checked=False)
    assert logs == expected_logs
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_metrics_counts_and_draws_stay(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model.eval()
    before = copy.deepcopy((trainer._metrics, trainer._logs)), torch.random.get_rng_state()
    trainer.check()
    assert (trainer._metrics, trainer._logs) == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert not trainer.model.training
    assert trainer.state.num_input_tokens_seen == 0
    assert trainer.metrics.drain("train") == {}
    assert dict(trainer.seconds) == {}
    assert trainer.teacher_tokens == (0, 0)
