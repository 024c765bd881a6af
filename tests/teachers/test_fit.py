"""Whether a model's ids mean what the student's mean, and what becomes of ids that not every model has."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, TEMPLATE, GradientRecorder, inject_rollouts, logged, tiny_model, tiny_tokenizer, tiny_trainer

from sg_opd_trl import TeacherError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers.fit import SharedVocabulary, check_chat_templates, check_tokenizers, check_vocabulary_sizes


def test_equal_tokenizers_pass() -> None:
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer(), "teacher")


def test_another_chat_template_passes() -> None:
    """Only ids are exchanged, and the student's template writes them; what it writes is compared below."""
    other = tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    check_tokenizers(tiny_tokenizer(), other, "teacher")


def test_swapped_ids() -> None:
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), tiny_tokenizer("0213456789+=abcdefgh "), "teacher")
    message = str(caught.value)
    assert "got 2 differences (student and teacher): '1': 6 and 7, '2': 7 and 6." in message
    assert "Choose a teacher of the student's family" in message


@pytest.mark.parametrize(
    ("student", "other", "shown"), [("01", "012", "'2': None and 7"), ("012", "01", "'2': 7 and None")]
)
def test_a_token_that_one_side_lacks(student: str, other: str, shown: str) -> None:
    with pytest.raises(TeacherError, match=shown):
        check_tokenizers(tiny_tokenizer(student), tiny_tokenizer(other), "reference")


def test_no_more_than_five_differences_are_shown() -> None:
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer("0123456789"), tiny_tokenizer("9876543210"), "reference")
    assert "got 10 differences (student and reference)" in str(caught.value)
    assert str(caught.value).count(" and ") == 1 + 5


def test_another_end_token() -> None:
    other = tiny_tokenizer()
    other.eos_token = "user"
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), other, "teacher")
    assert "got 'user' (3) and '<eos>' (1)" in str(caught.value)
    assert "Use two models of one kind" in str(caught.value)


def test_sizes_of_a_model_without_a_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TeacherError, match="must have all 26 ids of the student's tokenizer, got a vocabulary of 25"):
        check_vocabulary_sizes(tiny_tokenizer(), 25, "teacher")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        check_vocabulary_sizes(tiny_tokenizer(), 26, "teacher")
        check_vocabulary_sizes(tiny_tokenizer(), 32, "teacher")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "taken on trust" in caplog.records[0].getMessage()
    assert "`teacher_processing_class`" in caplog.records[0].getMessage()


def test_another_first_token() -> None:
    other = tiny_tokenizer()
    other.bos_token = "user"
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), other, "reference")
    assert "The reference's first token must be the student's, got 'user' (3) and None (None)" in str(caught.value)


def test_padding_may_differ() -> None:
    """Qwen's base and chat models pad with different ids; padding is never scored."""
    other = tiny_tokenizer()
    other.pad_token = "<unk>"
    check_tokenizers(tiny_tokenizer(), other, "teacher")


# --- chat templates --------------------------------------------------------------------------------------------------
CHATS = [[{"role": "user", "content": "1+2="}], [{"role": "user", "content": "12+3="}]]


# The student's, with a switch that adds a token to the prompt, as for thinking.
THINKING = TEMPLATE.replace("assistant{% endif %}", "assistant{% if think %}h{% endif %}{% endif %}")


def rendered(template: str = TEMPLATE, **kwargs: Any) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.apply_chat_template(c, chat_template=template, add_generation_prompt=True, tokenize=True,
                                          return_dict=True, **kwargs)["input_ids"] for c in CHATS]  # fmt: skip


def with_template(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_render_alike_pass(caplog: pytest.LogCaptureFixture) -> None:
    check_chat_templates(CHATS, rendered(), with_template(TEMPLATE), "teacher")
    check_chat_templates(CHATS, rendered(), with_template(THINKING), "teacher")
    check_chat_templates(
        CHATS, rendered(THINKING, think=True), with_template(THINKING), "teacher", template_kwargs={"think": True}
    )
    assert not caplog.records


def test_templates_that_render_otherwise_are_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        check_chat_templates(CHATS, rendered(), with_template(THINKING), "teacher", template_kwargs={"think": True})
    message = str(caught.value)
    assert "a difference in row 0 (student and teacher): '2=<eos>assistant' and '2=<eos>assistanth' from" in message
    assert "Set `chat_template_kwargs`" in message
    assert "pass the student's tokenizer as `teacher_processing_class`" in message
    with pytest.raises(TeacherError, match="pass the reference as a model"):
        check_chat_templates(CHATS, rendered(), with_template("{{ messages[0]['content'] }}"), "reference")


def test_a_difference_in_a_later_prompt_is_found() -> None:
    odd = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | replace('12', '21') }}")
    with pytest.raises(TeacherError, match=r"row 1 .*'user12\+3=?.*' and 'user21\+3=?"):
        check_chat_templates(CHATS, rendered(), with_template(odd), "teacher math")


def test_a_template_that_refuses_the_prompt() -> None:
    refusing = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(TeacherError, match="and the error no system message, please"):
        check_chat_templates(CHATS, rendered(), with_template(refusing), "teacher")


def test_without_a_template_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_chat_templates(CHATS, rendered(), with_template(None), "teacher")
    assert "The teacher's tokenizer has no chat template" in caplog.text


# --- ids that not every model has ------------------------------------------------------------------------------------
STEP = {"max_steps": 1, "max_grad_norm": 1e9}


def test_unusable_ids() -> None:
    """The tokenizer has the ids 0 to 25; 24 and 25 are beyond the smallest model, 26 to 31 padding."""
    assert SharedVocabulary(tiny_tokenizer(), [26, 26]).unusable == []
    assert SharedVocabulary(tiny_tokenizer(), [32, 24]).unusable == [24, 25, 26, 27, 28, 29, 30, 31]


def test_suppressed_beside_those_that_the_run_suppresses() -> None:
    vocabulary = SharedVocabulary(tiny_tokenizer(), [28, 26])
    assert vocabulary.without_unusable({"suppress_tokens": [3, 27], "top_k": 4}) == {
        "suppress_tokens": [3, 26, 27],
        "top_k": 4,
    }
    assert vocabulary.without_unusable(None) == {"suppress_tokens": [26, 27]}
    assert SharedVocabulary(tiny_tokenizer(), [26, 26]).without_unusable({"top_k": 4}) == {"top_k": 4}


def test_everything_from_the_first_unusable_id_is_left_out() -> None:
    vocabulary = SharedVocabulary(tiny_tokenizer(), [28, 26])
    ids = torch.tensor([[5, 27, 6, 7], [5, 6, 27, 27], [5, 6, 7, 26]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])  # the second row ends before its odd ids
    tools = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    rollouts = {"completion_ids": ids, "completion_mask": mask, "tool_mask": tools}
    kept, left_out = vocabulary.leave_out(rollouts, lambda x: torch.cat([x, x]))  # two ranks alike
    assert kept["tool_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    assert (left_out, int(kept["num_items_in_batch"])) == (8, 10)
    assert torch.equal(kept["completion_mask"], mask), "attention still sees every token"
    batch = vocabulary.cut(TokenBatch(ids[:, :1], mask[:, :1], ids, mask), 0)
    assert batch.completion_mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.completion_ids.tolist() == [[5, 0, 0, 0], [5, 6, 27, 27], [5, 6, 7, 0]]
    written = [[5, 27, 6, 7], [5, 6], [5, 6, 7, 26]]
    assert [vocabulary.usable(row) for row in written] == [[5], [5, 6], [5, 6, 7]]


def test_nothing_changes_where_nothing_is_left_out() -> None:
    vocabulary = SharedVocabulary(tiny_tokenizer(), [28, 26])
    rollouts = {"completion_ids": torch.tensor([[5, 6]]), "completion_mask": torch.tensor([[1, 1]])}
    assert vocabulary.leave_out(rollouts, lambda x: x) == (rollouts, 0)


def larger(seed: int, vocab_size: int, factor: float = 4.0) -> Any:
    """`tiny_model` with padded rows that it likes better than any token."""
    small, model = tiny_model(seed), tiny_model(seed, vocab_size=vocab_size)
    weights = small.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            known = weights[name]
            value[: len(known)] = known
            if value.shape != known.shape:
                value[len(known) :] = known[5] * factor
    return model


@pytest.mark.parametrize("sizes", [(32, 26), (26, 32), (40, 32)], ids=str)
def test_padded_rows_are_never_sampled(tmp_path: Path, sizes: tuple[int, int]) -> None:
    student, teacher = (larger(seed, size) for seed, size in enumerate(sizes))
    seen: list[list[int]] = []

    def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(row % 2) for row in range(len(completion_ids))]

    settings = ANCHOR | {"max_steps": 2, "teacher_sampling_ratio": 0.5, "teacher_num_generations": 4}
    trainer = tiny_trainer(tmp_path, settings=settings, model=student, teacher_model=teacher, reward_funcs=verifier)
    trainer.train()
    assert len(seen) == 2 * (8 + 8), "rollouts of student and teacher"
    assert max(max(ids) for ids in seen) < 26
    assert logged(trainer, "teacher/unusable_tokens") == [0.0, 0.0]


def gradient(folder: Path, write: Any, **arguments: Any) -> tuple[Any, dict]:
    recorder = GradientRecorder()
    settings = STEP | {"teacher_sampling_enable": False, "loss_type": arguments.pop("loss_type", "grpo")}
    trainer = tiny_trainer(
        folder,
        settings=settings,
        callbacks=[recorder],
        reward_funcs=lambda completion_ids, **_: [float(i % 2) for i in range(len(completion_ids))],
        **arguments,
    )
    inject_rollouts(trainer, write)
    trainer.train()
    return trainer, recorder.steps[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_sampler_that_was_not_told(tmp_path: Path, loss_type: str) -> None:
    """An injected id that the teacher has no embedding for: counted, and the tokens before it count as ever.

    Rows that hold one only are as if all of their tokens were masked; `dapo` divides by the tokens that are left.
    """

    def odd(prompt: list[int], row: int) -> list[int]:
        return [5 + row, 7, 30, 9] if row % 2 else [30, 8, 9]

    def cut(prompt: list[int], row: int) -> list[int]:
        return [5 + row, 7] if row % 2 else [8]

    student, teacher = larger(0, 32), tiny_model(1)
    trainer, found = gradient(tmp_path, odd, model=student, teacher_model=teacher, loss_type=loss_type)
    assert logged(trainer, "teacher/unusable_tokens") == [4 * 2 + 4 * 3]

    # The same rows without what is left out; rows without any token are switched off by their weight.
    def switched_off(self: Any, teacher_advantages: torch.Tensor, mask: torch.Tensor, inputs: dict) -> torch.Tensor:
        weights = core.stability_weight(teacher_advantages, mask, self.args.stability_tau, self.args.stability_norm)
        return weights * (inputs["completion_mask"].sum(1, keepdim=True) > 1)

    from sg_opd_trl import SGOPDTrainer, core

    kind = type("Switched", (SGOPDTrainer,), {"compute_token_weights": switched_off})
    _, expected = gradient(
        tmp_path, cut, model=larger(0, 32), teacher_model=teacher, loss_type=loss_type, trainer_class=kind
    )
    # dapo: 8 tokens are left where the other run counts its 4 switched-off ones too
    scale = 12 / 8 if loss_type == "dapo" else 1.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], scale * value, rtol=1e-4, atol=1e-6)
