"""The bar shows the watched numbers, on the main process only, and starts where the run starts."""

import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from sg_opd_trl.reporting import CompactProgressCallback


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=False)


def state(step=0, main=True):
    return TrainerState(max_steps=10, global_step=step, is_world_process_zero=main)


def train(callback, arguments, logs, start=0, main=True):
    control = TrainerControl()
    callback.on_train_begin(arguments, state(start, main), control)
    for step, entry in enumerate(logs, start=start + 1):
        callback.on_step_end(arguments, state(step, main), control)
        callback.on_log(arguments, state(step, main), control, logs=entry)
    shown = None if callback.training_bar is None else str(callback.training_bar)
    callback.on_train_end(arguments, state(start + len(logs), main), control)
    return shown


LOG = {"reward": 0.123456, "gate/consensus": 0.25, "teacher/kl_k3": 0.5, "anchor/alpha": 0.2, "loss": 0.7}


def test_watched_numbers_and_nothing_else(arguments, capfd):
    shown = train(CompactProgressCallback(), arguments, [LOG, LOG])
    assert shown.startswith("Distilling:  20%")
    assert "2/10" in shown
    assert "reward=0.123, consensus=0.25, kl=0.5, alpha=0.2" in shown
    assert "loss" not in shown
    written = capfd.readouterr()
    assert "{'reward'" not in written.err + written.out


def test_other_logs_leave_the_bar_as_it_is(arguments):
    shown = train(CompactProgressCallback(), arguments, [LOG, {"eval_reward": 0.9}, {"train_runtime": 3.0}])
    assert "reward=0.123" in shown


def test_missing_metrics_are_left_out(arguments):
    shown = train(CompactProgressCallback("Training"), arguments, [LOG, {"reward": 1.0}])
    assert shown.startswith("Training:")
    assert "reward=1" in shown
    assert "alpha" not in shown, "an old value must not pass for a new one"


def test_resumed_run_starts_where_it_stopped(arguments):
    callback = CompactProgressCallback()
    callback.on_train_begin(arguments, state(6), TrainerControl())
    assert callback.training_bar.n == callback.training_bar.initial == 6
    callback.on_step_end(arguments, state(7), TrainerControl())
    assert callback.training_bar.n == 7
    callback.on_train_end(arguments, state(7), TrainerControl())


def test_other_processes_show_nothing(arguments, capfd):
    assert train(CompactProgressCallback(), arguments, [LOG], main=False) is None
    assert capfd.readouterr().err == ""


def test_log_outside_training_is_fine(arguments):
    CompactProgressCallback().on_log(arguments, state(), TrainerControl(), logs=LOG)


def test_disabled_bars_stay_silent(arguments, capfd):
    arguments.disable_tqdm = True
    train(CompactProgressCallback(), arguments, [LOG])
    assert capfd.readouterr().err == ""


def test_is_found_and_removed_as_a_progress_callback():
    assert issubclass(CompactProgressCallback, ProgressCallback)


@pytest.fixture
def _plain_logging():
    """Loggers as in a program of its own: pytest's handlers would take the messages elsewhere."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, [logging.StreamHandler()]
    yield
    root.handlers = before


@pytest.mark.usefixtures("_plain_logging")
def test_warnings_stand_above_the_bar_and_are_counted_in_it(arguments, capfd):
    callback, control = CompactProgressCallback(), TrainerControl()
    handlers = logging.getLogger().handlers[:]
    callback.on_train_begin(arguments, state(), control)
    callback.on_log(arguments, state(1), control, logs=LOG)
    logging.getLogger("sg_opd_trl.reporting.symptoms").warning("All %d completions are empty.", 8)
    logging.getLogger("another_library").warning("not ours")
    logging.getLogger("sg_opd_trl.trainer").info("no warning")
    assert "reward=0.123" in str(callback.training_bar)
    assert "warnings=1" in str(callback.training_bar)
    callback.on_log(arguments, state(2), control, logs={"reward": 0.5})
    assert "reward=0.5, warnings=1" in str(callback.training_bar)
    callback.on_train_end(arguments, state(2), control)
    # At the beginning of a line of its own, not behind the bar.
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert "All 8 completions are empty." in lines
    assert "not ours" in lines
    assert logging.getLogger().handlers == handlers
    assert callback._warnings not in logging.getLogger("sg_opd_trl").handlers


def test_the_next_run_counts_anew_also_after_one_that_failed(arguments):
    callback, control = CompactProgressCallback(), TrainerControl()
    package = logging.getLogger("sg_opd_trl")
    before = package.handlers[:]
    callback.on_train_begin(arguments, state(), control)
    package.warning("in the run that fails")
    callback.on_train_begin(arguments, state(), control)
    callback.on_log(arguments, state(1), control, logs=LOG)
    assert "warnings" not in str(callback.training_bar)
    callback.on_train_end(arguments, state(1), control)
    assert package.handlers == before
