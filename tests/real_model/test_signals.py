"""What the gate makes of a teacher that is the student, and of one that was shown worked examples."""

from pathlib import Path
from typing import Any

from tiny import ScriptedVerifier, inject_rollouts, logged, tiny_config

from real_model.smollm import NEEDS_MODEL, WORKED_EXAMPLES, in_order, rows
from sg_opd_trl import SGOPDTrainer

pytestmark = NEEDS_MODEL


def step(where: Path, folder: str, tokenizer: Any, answers: list[str], verdicts: list[float], **columns: Any) -> Any:
    """One step on given answers to the first two problems, with or without a prompt for the teacher alone."""
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-5,
        "teacher_sampling_enable": False,
    }
    verifier = ScriptedVerifier(verdicts)
    data = rows(**columns)
    trainer = SGOPDTrainer(folder, verifier, tiny_config(where, **settings), train_dataset=data, teacher_model=folder)
    inject_rollouts(trainer, in_order([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in answers]))
    trainer.train()
    return trainer


WRONG = [r"\boxed{12}", "I do not know.", "cats", "3 + 2 = 5"]


def test_a_teacher_that_is_the_student_leaves_neutral_tokens_alone(
    folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    answers = [*(r"\boxed{3}", *WRONG[:3]), *(r"\boxed{7}", *WRONG[1:])]
    trainer = step(tmp_path, folder, tokenizer, answers, [1.0, 0.0, 0.0, 0.0] * 2)
    for name, share in (("gate/neutral", 1.0), ("gate/consensus", 0.0), ("gate/conflict", 0.0)):
        assert logged(trainer, name) == [share]
    # Far from the dead zone, in which they are: the rounding of float32 in two layouts.
    assert logged(trainer, "teacher/abs_advantage_max")[0] < trainer.args.gate_dead_zone / 2


def test_worked_examples_make_the_teacher_like_right_answers_better(
    folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    answers = [*(r"\boxed{3}", *WRONG[:3]), *(r"\boxed{7}", *WRONG[1:])]
    trainer = step(
        tmp_path, folder, tokenizer, answers, [1.0, 0.0, 0.0, 0.0] * 2, shown=False, teacher_system=WORKED_EXAMPLES
    )
    right, wrong = (-logged(trainer, f"teacher/kl_k1/{kind}")[0] for kind in ("right", "wrong"))  # mean a2
    assert right > 0.5
    assert right > wrong
    assert logged(trainer, "gate/consensus/right")[0] > logged(trainer, "gate/conflict/right")[0]
