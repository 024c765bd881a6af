"""Set-ups that cannot go well, each named in one line of the report."""

import itertools
import json
import math
import shutil

import pytest
from models.architectures import SIZES
from teachers.fake_server import FakeServer, scripted_logps
from tiny import TEMPLATE, tiny_data, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import sg_opd_trl.inspection.run as page
from sg_opd_trl.inspection.stack import TESTED

OWN = "inspection.own_verifiers."
THINKING = TEMPLATE.replace(
    "assistant{% endif %}",
    "assistant{% if enable_thinking is defined and not enable_thinking %}=+={% endif %}{% endif %}",
)


def told(report, name, state, *words):
    """The row is in that state, in one line, with these words."""
    row = report.of(name)
    line = str(row)
    assert row.state == state, str(report)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return row


@pytest.fixture
def other(pair, tmp_path):
    """A copy of the student or teacher with another tokenizer."""

    def saved(name, tokenizer):
        folder = tmp_path / name
        shutil.copytree(pair / name, folder, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
        tokenizer.save_pretrained(folder)
        return folder

    return saved


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- tokens and chats ------------------------------------------------------------------------------------------------
def test_a_teacher_with_another_tokenizer(look, other):
    report = look(teacher_model_name_or_path=other("teacher", tiny_tokenizer("9876543210+=abcdefgh ")))
    told(report, "teacher", "red", "must map tokens to the student's ids", "student's family")
    assert report.of("verifier").state == "green"


def test_a_teacher_whose_template_renders_otherwise(look, other):
    report = look(teacher_model_name_or_path=other("teacher", with_template(TEMPLATE.replace("<eos>", ""))))
    told(report, "chat template", "red", "Student and teacher render the prompt of row 0 in other ways")


def test_a_teacher_without_a_template(look, other):
    report = look(teacher_model_name_or_path=other("teacher", with_template(None)))
    told(report, "chat template", "yellow", "teacher has no chat template")


def test_a_thinking_mode_on_one_side_that_renders_alike(look, other):
    report = look(model_name_or_path=other("student", with_template(THINKING)))
    told(report, "thinking", "yellow", "is there in student, and not in teacher", "enable_thinking: false")


def test_a_thinking_mode_that_is_off_on_one_side(look, other):
    report = look(
        model_name_or_path=other("student", with_template(THINKING)),
        chat_template_kwargs='{"enable_thinking": false}',
    )
    told(report, "chat template", "red", "assistant=+=")
    told(report, "thinking", "yellow", "False")


def test_answers_that_the_template_ends_otherwise_than_rollouts(look, other):
    template = TEMPLATE.replace("<eos>", "<unk>")
    models = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
    report = look(**{setting: other(name, with_template(template)) for setting, name in models.items()})
    told(report, "end token", "yellow", "'<unk>'", "none of the end tokens '<eos>'")


# --- models ----------------------------------------------------------------------------------------------------------
def test_a_context_that_is_too_small(look):
    told(look(max_completion_length=120), "context", "yellow", "take 131", "student 128, teacher 128", "get worse")


def test_a_model_whose_rows_cannot_be_scored_together(look, tmp_path):
    config = AutoConfig.for_model("modernbert-decoder", **SIZES | {"local_attention": 8, "bos_token_id": 2})
    folder = tmp_path / "strange"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    report = look(model_name_or_path=folder, max_completion_length=16)
    told(report, "settings", "red", "the log-probs of each row alone", "ModernBertDecoderForCausalLM")


def test_a_teacher_that_is_the_student(look, pair):
    told(look(teacher_model_name_or_path=pair / "student"), "teacher", "red", "says what the student says")


def test_a_dead_zone_that_leaves_nothing_to_the_gate(look):
    told(look(gate_dead_zone=50), "gate", "yellow", "100% neutral (dead zone 50)")


def test_a_dead_zone_below_the_noise_of_bfloat16(look, monkeypatch):
    # As in a model that must have its prompts padded on the left.
    monkeypatch.setattr("sg_opd_trl.trl_seam.padding_behind", lambda *arguments: False)
    report = look(bf16="true", gradient_checkpointing="true")
    told(report, "rounding", "yellow", "The dead zone is 0.0001", 'gate_dead_zone="auto"')


# --- verifier and golds ----------------------------------------------------------------------------------------------
def test_a_verifier_that_rejects_its_own_golds(look):
    row = told(look(reward_funcs=OWN + "rejects_everything"), "verifier", "red", "says no to 20 of 20 golds")
    assert "such as '0'" in row.found


def test_a_verifier_that_accepts_anything(look):
    told(look(reward_funcs=OWN + "accepts_anything"), "verifier", "red", "says yes to a wrong answer")


def test_a_verifier_that_never_answers(look):
    report = look(reward_funcs=OWN + "never_sure")
    told(report, "verifier", "red", "says yes to 0 of 20 golds")
    told(report, "golds", "red", "20 of 20 golds")
    told(report, "verdicts", "red", "0 have a verdict")


def test_a_verifier_that_fails(look):
    report = look(reward_funcs=OWN + "raises")
    told(report, "verifier", "red", "ends in KeyError: 'answer'")
    told(report, "rollouts", "red", "KeyError: 'answer'")


def test_a_verifier_that_scores(look):
    told(look(reward_funcs=OWN + "scores"), "verifier", "red", "must answer 1 (right), 0 (wrong) or None")


def rows_of(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    tiny_data(24).map(change, with_indices=True).to_json(path)
    return path


def test_golds_that_cannot_be_read(look, tmp_path):
    path = rows_of(tmp_path, lambda row, number: {"solution": "proof" if number % 8 == 5 else row["solution"]})
    report = look(dataset_name=path, reward_funcs="math_reward")
    told(report, "golds", "yellow", "3 of 24 golds of `train_dataset` cannot be judged (row 5: 'proof'")


def test_the_question_in_the_place_of_the_answer(look, tmp_path):
    path = rows_of(tmp_path, lambda row, number: {"question": f"what is the sum of {number}+1=", "prompt": None})
    report = look(dataset_name=path, question_column="question", answer_column="question", reward_funcs="math_reward")
    told(report, "golds", "red", "24 of 24 golds of `train_dataset` stand in their own prompt", "answer_column")


# --- rollouts --------------------------------------------------------------------------------------------------------
def test_rollouts_that_are_all_cut_off(look):
    report = look(max_completion_length=1)
    told(report, "rollouts", "red", "16 of 16 rollouts are cut off at 1 tokens", "max_completion_length")


def test_problems_that_no_rollout_solves(look, tmp_path):
    path = rows_of(tmp_path, lambda row, number: {"solution": "a"})
    told(look(dataset_name=path), "verdicts", "yellow", "0 of 16 rollouts are right", "easier")


# --- servers ---------------------------------------------------------------------------------------------------------
def served(look, *servers, **changes):
    urls = json.dumps([server.url for server in servers])
    return look(
        teacher_model_name_or_path=None,
        teacher_model_server_url=urls,
        teacher_request_timeout=5,
        teacher_max_retries=0,
        **changes,
    )


def test_a_server_that_is_not_there(look):
    with FakeServer() as server:
        pass
    report = served(look, server)
    told(report, "teacher", "red", "got none from http://127.0.0.1", "Start the server")
    assert report.of("verifier").state == "green"


def noisy(size):
    numbers = itertools.count()

    def logps(ids):
        rows = [[value + size * math.sin(next(numbers)) for value in row] for row in scripted_logps(ids)]
        totals = [math.log(sum(map(math.exp, row))) for row in rows]
        return [[value - total for value in row] for row, total in zip(rows, totals, strict=True)]

    return logps


def test_a_server_that_says_something_else_when_asked_again(look):
    with FakeServer(logps=noisy(2.0)) as server:
        told(served(look, server), "teacher server", "red", "when asked twice", "deterministic")


def test_a_server_whose_noise_is_above_the_dead_zone(look):
    with FakeServer(logps=noisy(0.02)) as server:
        told(served(look, server), "teacher server", "yellow", "above the dead zone (0.0001)", "gate_dead_zone above")


def test_replicas_that_disagree(look):
    def turned(ids):
        return [row[::-1] for row in scripted_logps(ids)]

    with FakeServer() as one, FakeServer(logps=turned) as other:
        told(served(look, one, other), "teacher", "red", "must serve one model", "same weights")


# --- the machine -----------------------------------------------------------------------------------------------------
def test_too_little_memory(look, monkeypatch):
    monkeypatch.setattr(page, "memory_of", lambda device: 2**20)
    told(look(), "memory", "red", "0.000977 are there", "per_device_train_batch_size")


def test_a_library_that_was_not_tested(look, monkeypatch):
    monkeypatch.setattr("sg_opd_trl.inspection.stack._installed", lambda: {**TESTED, "transformers": "5.24.1"})
    told(look(), "versions", "yellow", "transformers 5.24.1", TESTED["transformers"])
