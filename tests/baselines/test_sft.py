"""SFT on teacher rollouts and SeqKD: what is trained on, and that nothing is written twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_pair import Pair
from tiny import (
    GradientRecorder,
    changed_weights,
    copied_weights,
    parity_verifier,
    relative_difference,
    save_pair,
    tiny_data,
    tiny_model,
    tiny_trainer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.baselines import rollouts as rollouts_module
from sg_opd_trl.baselines.config import SeqKDConfig, TeacherSFTConfig
from sg_opd_trl.baselines.order import StepPlan
from sg_opd_trl.baselines.rollouts import ROLLOUTS_FILE, Rollout
from sg_opd_trl.baselines.sft import build_sft_trainer, requested_rows, training_rows
from sg_opd_trl.errors import DataError, SGOPDConfigError, TeacherError

SFT = {"num_generations": 4, "max_completion_length": 6, "rollout_batch_size": 4}


def built(
    pair: Pair, folder: Path, kind: Any = TeacherSFTConfig, verifier: Any = parity_verifier, **changes: Any
) -> Any:
    own = SFT if kind is TeacherSFTConfig else {name: SFT[name] for name in list(SFT)[1:]}
    args = kind(**pair.settings(folder, **(own | changes)))
    return build_sft_trainer(pair.student, args, [verifier], tiny_data())


def stored(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / ROLLOUTS_FILE).read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(
    ("group", "greedy", "rows", "steps"),
    [
        (1, True, [4, 7], [[0, 1], [1, 0]]),
        (1, False, [4, 7, 7, 4], [[0, 1], [2, 3]]),
        (2, False, [4, 4, 7, 7, 7, 7, 4, 4], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_a_prompt_that_comes_again_gets_new_samples_but_the_same_greedy_output(
    group: int, greedy: bool, rows: list[int], steps: list[list[int]]
) -> None:
    plan = StepPlan(steps=[[4, 7], [7, 4]], rows_per_step=2 * group)
    assert requested_rows(plan, group, greedy=greedy) == (rows, steps)


def test_labels_are_the_completion_and_nothing_else() -> None:
    rows = training_rows([[1, 0]], [[7, 8], [9]], [Rollout([3, 1], 1.0), Rollout([4], 1.0)])
    assert rows.to_list() == [
        {"input_ids": [7, 8, 3, 1], "labels": [-100, -100, 3, 1]},
        {"input_ids": [9, 4], "labels": [-100, 4]},
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_steps_gradient_is_the_mean_cross_entropy_of_completion_tokens(
    pair: Pair, tmp_path: Path, accumulation: int
) -> None:
    """Against a loop over single rows without padding."""
    changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    trainer = built(pair, tmp_path, max_steps=1, max_grad_norm=1e9, teacher_sampling_filter_correct=False, **changes)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    tokenizer, chats = AutoTokenizer.from_pretrained(pair.student), tiny_data()["prompt"]
    model = tiny_model(0)
    loss, tokens = torch.zeros(()), 0
    chosen = step_prompts(trainer, pair, tmp_path)[0]
    assert len(chosen) == 8
    for chat, line in zip(chosen, stored(tmp_path), strict=True):
        prompt = tokenizer.apply_chat_template(chats[chat], add_generation_prompt=True, return_dict=False)
        completion = line["completion_ids"]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        loss = loss - logits.log_softmax(-1)[range(len(completion)), completion].sum()
        tokens += len(completion)
    (loss / tokens).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(recorder.steps[0], expected) < 1e-5


def step_prompts(trainer: Any, pair: Pair, folder: Path) -> list[list[int]]:
    """Numbers of the training rows by step, read back from what SG-OPD visits at the same seed."""
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "shuffle_dataset": True}
    settings |= {"teacher_sampling_enable": False, "max_completion_length": 6}
    loader = tiny_trainer(folder / "paired", settings=settings).get_train_dataloader()
    prompts = list(tiny_data()["prompt"])
    return [[prompts.index(example["prompt"]) for example in batch] for batch in loader]


def test_prompts_are_rendered_as_the_students_are(pair: Pair, tmp_path: Path) -> None:
    trainer = built(pair, tmp_path, teacher_sampling_filter_correct=False)
    paired = tiny_trainer(tmp_path / "paired", settings={"teacher_sampling_enable": False})
    prompts = paired.tokenize_prompts(list(tiny_data()["prompt"]))
    for step, rows in enumerate(step_prompts(trainer, pair, tmp_path)[:2]):
        wanted = sorted(prompts[row] for row in rows)
        dealt = trainer.train_dataset.select(range(8 * step, 8 * step + 8)).to_list()
        assert sorted(row["input_ids"][: row["labels"].count(-100)] for row in dealt) == wanted


def test_only_verified_rollouts_are_trained_on_and_steps_keep_their_rows(pair: Pair, tmp_path: Path) -> None:
    trainer = built(pair, tmp_path, max_steps=4)
    lines = stored(tmp_path)
    assert len(lines) == len(trainer.train_dataset) == 4 * 8
    assert {line["verdict"] for line in lines} == {0.0, 1.0}
    right = [line["completion_ids"] for line in lines if line["verdict"]]
    for row in trainer.train_dataset:
        assert [label for label in row["labels"] if label != -100] in right


def test_training_changes_the_student_and_the_order_stays(pair: Pair, tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = built(pair, tmp_path)
    original = trainer.compute_loss

    def recording(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["labels"].clone())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    initial = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    assert changed_weights(trainer.model, copied_weights(initial)) == []
    before = copied_weights(trainer.model)
    trainer.train()
    assert len(changed_weights(trainer.model, before)) == len(before)
    assert trainer.state.global_step == 2
    rows = [[label for label in row.tolist() if label != -100] for batch in seen for row in batch]
    assert rows == [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]


def test_a_second_run_reads_what_the_first_wrote(pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    first = built(pair, tmp_path)
    lines = stored(tmp_path)
    tokens = sum(len(line["completion_ids"]) for line in lines)
    assert (first.teacher_use.tokens_generated, first.teacher_use.tokens_reused) == (tokens, 0)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher wrote again")

    monkeypatch.setattr(rollouts_module, "generate_completions", never)
    second = built(pair, tmp_path, learning_rate=1e-3)
    assert (second.teacher_use.tokens_generated, second.teacher_use.tokens_reused) == (0, tokens)
    assert second.train_dataset.to_list() == first.train_dataset.to_list()
    assert stored(tmp_path) == lines


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"temperature": 0.7}, {"top_p": 0.9}, {"max_completion_length": 5}, {"rollout_batch_size": 8}],
)
def test_other_settings_are_written_anew(pair: Pair, tmp_path: Path, changes: dict) -> None:
    built(pair, tmp_path)
    again = built(pair, tmp_path, **changes)
    assert again.teacher_use.tokens_reused == 0
    assert again.teacher_use.tokens_generated == sum(len(line["completion_ids"]) for line in stored(tmp_path))


def test_a_start_with_other_settings_takes_nothing_from_what_is_stored(pair: Pair, tmp_path: Path) -> None:
    first = built(pair, tmp_path)
    lines = stored(tmp_path)
    built(pair, tmp_path, seed=1)
    back = built(pair, tmp_path)
    assert back.teacher_use.tokens_generated == 0
    assert back.teacher_use.tokens_reused == first.teacher_use.tokens_generated
    assert stored(tmp_path) == lines
    assert built(pair, tmp_path, seed=1).teacher_use.tokens_generated == 0


def test_another_teacher_writes_anew(pair: Pair, tmp_path: Path) -> None:
    built(pair, tmp_path)
    assert built(pair, tmp_path, teacher_model_name_or_path=pair.student).teacher_use.tokens_reused == 0


def test_stored_rollouts_are_judged_anew(pair: Pair, tmp_path: Path) -> None:
    """A verifier that was edited has its old name, and its verdicts are others."""

    def parity_verifier(completion_ids: list, **_: Any) -> list[float]:
        return [float((len(ids) + ids[0]) % 2 == 1) for ids in completion_ids]

    built(pair, tmp_path)
    before = stored(tmp_path)
    again = built(pair, tmp_path, verifier=parity_verifier)
    after = stored(tmp_path)
    assert again.teacher_use.tokens_generated == 0
    assert [line["completion_ids"] for line in after] == [line["completion_ids"] for line in before]
    assert [line["verdict"] for line in after] == parity_verifier([line["completion_ids"] for line in after])
    assert [line["verdict"] for line in after] != [line["verdict"] for line in before]
    right = [line["completion_ids"] for line in after if line["verdict"]]
    for row in again.train_dataset:
        assert [label for label in row["labels"] if label != -100] in right


@pytest.mark.parametrize("cut", ["after a batch", "inside a batch", "inside a line"])
def test_a_killed_run_goes_on_where_it_stopped(pair: Pair, tmp_path: Path, cut: str) -> None:
    whole = built(pair, tmp_path)
    file = tmp_path / ROLLOUTS_FILE
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    kept = {"after a batch": 5, "inside a batch": 7, "inside a line": 6}[cut]
    file.write_text("".join(lines[:kept]) + ('{"comple' if cut == "inside a line" else ""), encoding="utf-8")
    resumed = built(pair, tmp_path)
    assert file.read_text(encoding="utf-8") == text
    assert resumed.train_dataset.to_list() == whole.train_dataset.to_list()
    reused = sum(len(json.loads(line)["completion_ids"]) for line in lines[1:5])
    assert resumed.teacher_use.tokens_reused == reused


def test_seqkd_trains_on_the_teachers_greedy_outputs(pair: Pair, tmp_path: Path) -> None:
    """Against a loop that takes the most likely token again and again."""
    trainer = built(pair, tmp_path, SeqKDConfig, teacher_sampling_filter_correct=False, max_steps=3)
    teacher = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32)
    rows = trainer.train_dataset.to_list()
    assert len(rows) == 3 * 8
    distinct = {tuple(row["input_ids"]) for row in rows}
    # 16 rows in 2 steps of 8 prompts, each written for once; the third step visits 8 of them again.
    assert len(stored(tmp_path)) == 16
    assert len(distinct) <= 16
    for row in rows[:8]:
        prompt = row["input_ids"][: row["labels"].count(-100)]
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 1):
            ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["input_ids"] == ids


def test_seqkd_does_not_depend_on_the_sampling_seed_but_on_the_order(pair: Pair, tmp_path: Path) -> None:
    built(pair, tmp_path, SeqKDConfig, shuffle_dataset=False, teacher_sampling_filter_correct=False)
    again = built(pair, tmp_path, SeqKDConfig, shuffle_dataset=False, teacher_sampling_filter_correct=False, seed=3)
    assert again.teacher_use.tokens_generated == 0


@pytest.mark.parametrize("keep_all", [True, False])
def test_an_end_token_alone_is_not_learned(pair: Pair, tmp_path: Path, keep_all: bool) -> None:
    """The first stored rollout becomes an end token alone, which this verifier calls right, as all others."""
    settings = {"teacher_sampling_filter_correct": not keep_all}
    right = {"verifier": lambda completions, **_: [1.0] * len(completions)}
    whole = built(pair, tmp_path, **settings, **right)
    file = tmp_path / ROLLOUTS_FILE
    head, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lone = json.dumps(json.loads(lines[0]) | {"completion_ids": [1]}) + "\n"
    file.write_text("".join([head, lone, *lines[1:]]), encoding="utf-8")
    left = built(pair, tmp_path, **settings, **right)
    completions = [row["input_ids"][row["labels"].count(-100) :] for row in left.train_dataset.to_list()]
    assert len(completions) == len(whole.train_dataset)
    assert [1] not in completions


def test_nothing_right_is_an_error_before_training(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="judged right, got none of 16"):
        built(pair, tmp_path, verifier=lambda completions, **_: [0.0] * len(completions))


def test_a_teacher_with_other_tokens_is_refused(pair: Pair, tmp_path: Path) -> None:
    from tiny import tiny_tokenizer

    tiny_model(2).save_pretrained(tmp_path / "other")
    tiny_tokenizer("abcdefgh0123456789+= ").save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherError, match="differences"):
        built(pair, tmp_path, teacher_model_name_or_path=str(tmp_path / "other"))


def test_a_teacher_that_renders_the_prompts_otherwise_is_refused(pair: Pair, tmp_path: Path) -> None:
    from tiny import TEMPLATE, tiny_tokenizer

    tiny_model(2).save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("assistant", "user")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherError, match="chat template"):
        built(pair, tmp_path, teacher_model_name_or_path=str(tmp_path / "other"))


def test_padded_rows_of_the_teachers_embedding_are_never_written(pair: Pair, tmp_path: Path) -> None:
    """Half of this teacher's ids mean nothing to the tokenizer, which has 26."""
    teacher = save_pair(tmp_path / "padded", 3, vocab_size=52)
    built(pair, tmp_path, teacher_model_name_or_path=teacher, teacher_sampling_filter_correct=False)
    written = {token for line in stored(tmp_path) for token in line["completion_ids"]}
    assert max(written) < 26


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packing", True),
        ("max_length", 100),
        ("completion_only_loss", False),
        ("train_sampling_strategy", "random"),
        ("eval_strategy", "steps"),
        ("temperature", 0.0),
        ("top_p", 1.5),
        ("num_generations", 0),
        ("rollout_batch_size", 0),
        ("teacher_model_name_or_path", None),
    ],
)
def test_settings_that_break_the_pairing_are_refused(pair: Pair, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(SGOPDConfigError, match=f"`{name}` must"):
        TeacherSFTConfig(**pair.settings(tmp_path, **(SFT | {name: value})))


def test_sharded_weights_are_refused(pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SGOPDConfigError, match="FSDP"):
        built(pair, tmp_path)


def test_lora_trains_the_adapter_only(pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    args = TeacherSFTConfig(**pair.settings(tmp_path, **SFT))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = build_sft_trainer(pair.student, args, [parity_verifier], tiny_data(), peft_config=config)
    before = copied_weights(trainer.model)
    trainer.train()
    changed = changed_weights(trainer.model, before)
    assert changed
    assert all("lora_" in name for name in changed)
