"""GKD on the student's rollouts: TRL's loss, on the prompts of SG-OPD's steps, divided by its own tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_pair import Pair
from tiny import (
    GradientRecorder,
    changed_weights,
    copied_weights,
    relative_difference,
    save_pair,
    tiny_data,
    tiny_model,
    tiny_trainer,
)
from transformers import AutoModelForCausalLM

from sg_opd_trl.baselines.gkd import OnPolicyGKDConfig, OnPolicyGKDTrainer, PromptCollator, build_gkd_trainer
from sg_opd_trl.errors import SGOPDConfigError, TeacherError

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")


def built(pair: Pair, folder: Path, data: Any = None, peft_config: Any = None, **changes: Any) -> Any:
    args = OnPolicyGKDConfig(**pair.settings(folder, **({"num_generations": 4, "max_new_tokens": 6} | changes)))
    return build_gkd_trainer(pair.student, args, data or tiny_data(), peft_config=peft_config)


def recorded(trainer: Any) -> list[dict]:
    """The micro-batches that the loss sees."""
    seen: list[dict] = []
    original = trainer.compute_loss

    def recording(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return seen


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Half the KL divergences of both to their mean, from logits `(T, V)`, summed."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    mean = (p + q) / 2
    return ((q * (q / mean).log()).sum() + (p * (p / mean).log()).sum()) / 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_steps_gradient_is_the_mean_divergence_of_the_rollouts_tokens(
    pair: Pair, tmp_path: Path, accumulation: int
) -> None:
    """Against a loop over single rows in float64, without padding; micro-batches are averaged."""
    changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    trainer = built(pair, tmp_path, max_steps=1, max_grad_norm=1e9, **changes)
    recorder, seen = GradientRecorder(), recorded(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    assert len(seen) == accumulation
    for batch in seen:
        loss, tokens = torch.zeros((), dtype=torch.float64), 0
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row, counted = ids[mask == 1][None], labels[mask == 1] != -100
            positions = counted.nonzero().flatten() - 1
            with torch.no_grad():
                target = teacher(row).logits[0, positions]
            loss = loss + jensen_shannon(student(row).logits[0, positions], target)
            tokens += len(positions)
        (loss / tokens / accumulation).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert relative_difference(recorder.steps[0], expected) < 1e-4


def test_rows_are_the_students_answers_to_the_prompts_of_sg_opd(pair: Pair, tmp_path: Path) -> None:
    trainer = built(pair, tmp_path, temperature=1e-6)
    seen = recorded(trainer)
    trainer.train()
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "shuffle_dataset": True}
    paired = tiny_trainer(tmp_path / "paired", settings=settings | {"teacher_sampling_enable": False})
    wanted = [
        paired.tokenize_prompts([example["prompt"] for example in batch]) for batch in paired.get_train_dataloader()
    ]
    student = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    for step, batch in enumerate(seen):
        for i in range(8):
            row, counted = batch["input_ids"][i], batch["labels"][i] != -100
            prompt = row[(batch["attention_mask"][i] == 1) & ~counted].tolist()
            assert prompt == wanted[step][i]
            if step == 0:  # at a temperature near 0 the most likely token, end token included
                ids = list(prompt)
                while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 1):
                    ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
                assert prompt + row[counted].tolist() == ids


def test_training_changes_the_student_and_counts_what_the_teacher_scores(pair: Pair, tmp_path: Path) -> None:
    trainer = built(pair, tmp_path)
    seen = recorded(trainer)
    before, teacher = copied_weights(trainer.model), copied_weights(trainer.teacher_model)
    initial = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    assert changed_weights(trainer.model, copied_weights(initial)) == []
    trainer.train()
    assert len(changed_weights(trainer.model, before)) == len(before)
    assert changed_weights(trainer.teacher_model, teacher) == []
    assert trainer.teacher_use.tokens_scored == sum(int((batch["labels"] != -100).sum()) for batch in seen)
    assert trainer.teacher_use.tokens_generated == 0


def test_the_students_end_token_ends_a_rollout(pair: Pair, tmp_path: Path) -> None:
    """Also where the model's own generation config names none."""
    model = tiny_model(0)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "student")
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "student")
    trainer = built(Pair(str(tmp_path / "student"), pair.teacher), tmp_path / "run")
    assert trainer.generation_config.eos_token_id == [1]


def test_the_students_own_settings_do_not_shape_its_rollouts(pair: Pair, tmp_path: Path) -> None:
    from tiny import tiny_tokenizer

    labels = []
    for name, own in (("plain", {}), ("talkative", {"min_new_tokens": 6, "suppress_tokens": [*range(3, 20)]})):
        model = tiny_model(0)
        model.generation_config.update(**own)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        trainer = built(Pair(str(tmp_path / name), pair.teacher), tmp_path / "run")
        seen = recorded(trainer)
        trainer.train()
        labels.append([batch["labels"].tolist() for batch in seen])
    assert labels[0] == labels[1]


def test_all_settings_of_a_rollout_are_in_one_place(pair: Pair, tmp_path: Path) -> None:
    """transformers warns, in every run, of a setting beside a `generation_config`."""
    trainer, given = built(pair, tmp_path, max_steps=1), []
    student = trainer.accelerator.unwrap_model(trainer.model)
    original = student.generate

    def generate(**settings: Any) -> Any:
        given.append(settings)
        return original(**settings)

    student.generate = generate
    trainer.train()
    (settings,) = given
    assert settings.keys() == {"input_ids", "attention_mask", "generation_config"}
    assert settings["generation_config"].return_dict_in_generate
    assert not trainer.generation_config.return_dict_in_generate


def test_prompts_are_padded_on_the_left_and_count_nothing() -> None:
    batch = PromptCollator(0)([{"prompt_ids": [5, 6]}, {"prompt_ids": [7]}])
    assert batch["prompts"].tolist() == [[5, 6], [0, 7]]
    assert batch["prompt_attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert set(batch["labels"].flatten().tolist()) == {-100}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lmbda", 0.5),
        ("seq_kd", True),
        ("loss_type", "dft"),
        ("max_length", 64),
        ("num_generations", 0),
        ("temperature", 0.0),
        ("teacher_model_name_or_path", None),
    ],
)
def test_settings_that_would_do_nothing_are_refused(pair: Pair, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(SGOPDConfigError, match=f"`{name}` must"):
        OnPolicyGKDConfig(**pair.settings(tmp_path, **{name: value}))


def test_a_vocabulary_of_another_size_is_refused(pair: Pair, tmp_path: Path) -> None:
    teacher = save_pair(tmp_path / "larger", 3, vocab_size=30)
    with pytest.raises(TeacherError, match="vocabulary must have the student's size"):
        built(pair, tmp_path, teacher_model_name_or_path=teacher)


def test_lora_trains_the_adapter_only(pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = built(pair, tmp_path, peft_config=config)
    before = copied_weights(trainer.model)
    trainer.train()
    changed = changed_weights(trainer.model, before)
    assert changed
    assert all("lora_" in name for name in changed)


def test_the_loss_is_trls(pair: Pair, tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer

    assert OnPolicyGKDTrainer.generalized_jsd_loss is GKDTrainer.generalized_jsd_loss
    assert OnPolicyGKDTrainer.training_step is GKDTrainer.training_step
