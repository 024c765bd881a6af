import logging

import pytest
from datasets import Dataset, IterableDataset

from sg_opd_trl.data import check_dataset, filter_long_prompts, prepare_dataset
from sg_opd_trl.errors import DataError
from sg_opd_trl.verifiers import math_reward


class Tokenizer:
    """One token per character; a chat becomes its contents, one `<role>` in front of each."""

    chat_template = "yes"

    def __call__(self, text, **kwargs):
        return {"input_ids": list(text)}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **kwargs):
        end = ">" if add_generation_prompt else ""
        return "".join(message["content"] for message in messages) + end + kwargs.get("suffix", "")


def raw_rows():
    return {
        "question": ["1+1?", "2+2?", "3+3?", "4+4?"],
        "final_answer": ["2", "4", "6", "8"],
        "difficulty": [5.5, 6.0, None, 7.0],
        "worked": ["x" * 2000] * 4,
        "topic": ["sum"] * 4,
    }


def chat(text):
    return [{"role": "user", "content": text}]


def test_question_and_answer_become_prompt_and_solution():
    prepared = prepare_dataset(
        Dataset.from_dict(raw_rows()), question_column="question", answer_column="final_answer", instruction="Go."
    )
    assert prepared["prompt"][0] == chat("1+1?\nGo.")
    assert list(prepared["solution"]) == ["2", "4", "6", "8"]


def test_mapped_and_heavy_columns_are_dropped_small_ones_stay(caplog):
    with caplog.at_level(logging.WARNING):
        prepared = prepare_dataset(
            Dataset.from_dict(raw_rows()), question_column="question", answer_column="final_answer"
        )
    assert set(prepared.column_names) == {"prompt", "solution", "difficulty", "topic"}
    assert "worked" in caplog.text


def test_a_column_that_is_asked_for_stays_whatever_its_size():
    prepared = prepare_dataset(
        Dataset.from_dict(raw_rows()),
        question_column="question",
        answer_column="final_answer",
        keep_columns=["worked", "question"],
    )
    assert {"worked", "question"} <= set(prepared.column_names)


def test_difficulty_filter_drops_lower_and_missing_and_says_how_many(caplog):
    with caplog.at_level(logging.WARNING):
        prepared = prepare_dataset(Dataset.from_dict(raw_rows()), question_column="question", min_difficulty=6)
    assert [row[0]["content"] for row in prepared["prompt"]] == ["2+2?", "4+4?"]
    assert "dropped 2 of 4 rows: difficulty < 6" in caplog.text


@pytest.mark.parametrize("question", [None, "", "  "])
@pytest.mark.parametrize("gold", ["7", None, " "])
def test_rows_without_prompt_or_solution_are_dropped_with_a_count(caplog, question, gold):
    rows = {"question": ["a", question, "b"], "answer": ["1", gold, "2"]}
    with caplog.at_level(logging.WARNING):
        prepared = prepare_dataset(Dataset.from_dict(rows), question_column="question", answer_column="answer")
    assert list(prepared["solution"]) == ["1", "2"]
    assert "dropped 1 of 3 rows" in caplog.text


def test_a_gold_of_zero_is_a_gold_and_numbers_become_strings():
    rows = {"question": ["a", "b"], "answer": [0, 12]}
    prepared = prepare_dataset(Dataset.from_dict(rows), question_column="question", answer_column="answer")
    assert list(prepared["solution"]) == ["0", "12"]


def test_numeric_solution_column_becomes_text_too():
    prepared = prepare_dataset(Dataset.from_dict({"prompt": ["a"], "solution": [12]}))
    assert list(prepared["solution"]) == ["12"]


def test_answer_column_replaces_a_worked_solution():
    rows = {"problem": ["a"], "solution": ["long text"], "answer": ["5"]}
    prepared = prepare_dataset(Dataset.from_dict(rows), question_column="problem", answer_column="answer")
    assert prepared[0] == {"prompt": chat("a"), "solution": "5"}


def test_ready_chats_pass_unchanged():
    rows = {"prompt": [chat("a"), chat("b")], "solution": ["1", "2"]}
    prepared = prepare_dataset(Dataset.from_dict(rows))
    assert list(prepared["prompt"]) == rows["prompt"]


def test_plain_prompts_stay_plain_until_a_system_prompt_is_asked_for():
    rows = Dataset.from_dict({"prompt": ["a"]})
    assert prepare_dataset(rows)[0] == {"prompt": "a"}
    assert prepare_dataset(rows, instruction="Go.")[0]["prompt"] == "a\nGo."
    with_system = prepare_dataset(rows, system_prompt="You add.")[0]["prompt"]
    assert with_system == [{"role": "system", "content": "You add."}, {"role": "user", "content": "a"}]


def test_a_system_message_that_exists_is_kept_and_the_instruction_goes_to_the_last_message():
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "q"}]
    prepared = prepare_dataset(Dataset.from_dict({"prompt": [own]}), system_prompt="yours", instruction="Go.")
    assert prepared[0]["prompt"] == [own[0], {"role": "user", "content": "q\nGo."}]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "question_column"),
        ({"question_column": "problem"}, "problem"),
        ({"question_column": "question", "answer_column": "gold"}, "gold"),
        ({"question_column": "question", "difficulty_column": "level", "min_difficulty": 1}, "level"),
    ],
)
def test_a_missing_column_is_named_with_the_ones_found(settings, named):
    with pytest.raises(DataError) as error:
        prepare_dataset(Dataset.from_dict(raw_rows()), **settings)
    assert named in str(error.value)
    assert "final_answer" in str(error.value)


def test_streams_are_prepared_like_data_sets():
    def rows():
        yield from Dataset.from_dict(raw_rows())

    settings = {"question_column": "question", "answer_column": "final_answer", "min_difficulty": 6}
    streamed = list(prepare_dataset(IterableDataset.from_generator(rows), **settings))
    assert streamed == list(prepare_dataset(Dataset.from_dict(raw_rows()), **settings))
    assert len(streamed) == 2


def level_rows(*levels):
    return Dataset.from_dict({"problem": ["q"] * len(levels), "answer": ["1"] * len(levels), "level": list(levels)})


def test_a_difficulty_may_be_a_text_with_one_number():
    rows = level_rows("Level 3", "Level 5", "Level ?", None, "grades 3 to 5")
    columns = {"question_column": "problem", "answer_column": "answer", "difficulty_column": "level"}
    assert list(prepare_dataset(rows, **columns, min_difficulty=3)["level"]) == ["Level 3", "Level 5"]
    assert list(prepare_dataset(rows, **columns, min_difficulty=4)["level"]) == ["Level 5"]
    with pytest.raises(DataError, match=r"`min_difficulty` must leave rows, got 6.*largest in `level` is 5"):
        prepare_dataset(rows, **columns, min_difficulty=6)
    with pytest.raises(DataError, match=r"`difficulty_column` must lead to numbers.*'hard'.*`level`"):
        prepare_dataset(level_rows("hard", "easy"), **columns, min_difficulty=6)


def test_rows_that_are_all_without_a_prompt_or_a_solution_are_refused():
    rows = Dataset.from_dict({"problem": ["q", ""], "answer": ["", "1"]})
    with pytest.raises(DataError, match="`problem` and `answer` must be filled, got none in 2 rows"):
        prepare_dataset(rows, question_column="problem", answer_column="answer")


@pytest.mark.parametrize(
    ("gold", "solution"),
    [(["2"], "2"), ([["2"]], "2"), ([7], "7"), (1e-5, "0.00001"), (2.5, "2.5"), (1e22, "1" + 22 * "0"), (3, "3")],
)
def test_a_gold_is_one_text(gold, solution):
    rows = Dataset.from_dict({"prompt": ["q"], "answer": [gold]})
    assert prepare_dataset(rows, answer_column="answer")[0]["solution"] == solution


@pytest.mark.parametrize(
    ("gold", "named"),
    [(["1", "2"], "the list .*'1', '2'"), ({"ground_truth": "2", "style": "r"}, "gold.ground_truth")],
)
def test_a_gold_that_is_several_things_is_refused(gold, named):
    with pytest.raises(DataError, match=f"`answer_column` must lead to one answer.*{named}"):
        prepare_dataset(Dataset.from_dict({"prompt": ["q"], "gold": [gold]}), answer_column="gold")


@pytest.mark.parametrize("gold", [[], [""], [None], float("nan")])
def test_a_gold_that_says_nothing_is_none(gold):
    rows = Dataset.from_list([{"prompt": "q", "solution": gold}])
    with pytest.raises(DataError, match="must be filled"):
        prepare_dataset(rows)


def test_a_point_leads_into_columns_of_dictionaries():
    rows = Dataset.from_dict(
        {"ask": [{"text": "q", "level": 1}, {"text": "r", "level": 9}], "reward_model": [{"ground_truth": "2"}] * 2}
    )
    prepared = prepare_dataset(
        rows,
        question_column="ask.text",
        answer_column="reward_model.ground_truth",
        difficulty_column="ask.level",
        min_difficulty=5,
    )
    assert prepared[0]["prompt"] == chat("r")
    assert prepared[0]["solution"] == "2"
    with pytest.raises(DataError, match=r"`question_column`.*'nope\.text'"):
        prepare_dataset(rows, question_column="nope.text")
    with pytest.raises(DataError, match="must be filled"):
        prepare_dataset(rows, question_column="ask.txt")


@pytest.mark.parametrize("question", [{"text": "q"}, 3, ["q"]])
def test_a_question_that_is_no_text_and_no_chat_is_refused(question):
    with pytest.raises(DataError, match=r"`question_column` must lead to texts or chats.*`ask`"):
        prepare_dataset(Dataset.from_dict({"ask": [question]}), question_column="ask")


def test_long_prompts_are_dropped_with_template_and_generation_prompt_counted():
    # With the generation prompt ">" the chats have 4 and 5 tokens, the plain prompts 3 and 4.
    rows = Dataset.from_dict({"prompt": [chat("aaa"), chat("bbbb")]})
    assert list(filter_long_prompts(rows, Tokenizer(), 4)["prompt"]) == [chat("aaa")]
    with pytest.raises(DataError, match="`max_prompt_tokens` must leave rows, got 4, which leaves none of 2"):
        filter_long_prompts(rows, Tokenizer(), 4, chat_template_kwargs={"suffix": "!"})
    plain = Dataset.from_dict({"prompt": ["aaa", "bbbb"]})
    assert list(filter_long_prompts(plain, Tokenizer(), 3)["prompt"]) == ["aaa"]
    with pytest.raises(DataError, match="max_prompt_tokens"):
        filter_long_prompts(plain, Tokenizer(), 0)


def check(dataset, reward_funcs=(math_reward,), tokenizer=None, prompts=1, name="train_dataset"):
    check_dataset(
        dataset,
        reward_funcs=list(reward_funcs),
        processing_class=tokenizer or Tokenizer(),
        prompts_per_generation_batch=prompts,
        name=name,
    )


def good(rows=4):
    return Dataset.from_dict({"prompt": [chat(f"q{i}") for i in range(rows)], "solution": ["1"] * rows})


def test_good_data_passes():
    check(good(4), prompts=4)


def test_empty_data_set_and_empty_stream_are_refused():
    with pytest.raises(DataError, match="must have rows"):
        check(Dataset.from_dict({"prompt": [], "solution": []}))
    with pytest.raises(DataError, match="must have rows"):
        check(IterableDataset.from_generator(lambda: iter(())))


def test_fewer_rows_than_one_generation_batch_is_refused():
    with pytest.raises(DataError, match=r"at least 5 rows, got 4"):
        check(good(4), prompts=5)


def test_missing_columns_list_required_and_found():
    with pytest.raises(DataError) as error:
        check(Dataset.from_dict({"question": ["a"], "solution": ["1"]}), name="eval_dataset")
    message = str(error.value)
    assert "['prompt', 'solution']" in message
    assert "['question', 'solution']" in message
    assert "eval_dataset" in message


def test_only_parameters_that_nothing_else_fills_are_required_columns():
    def needs_topic(completions, topic, *, level, prompts, log_extra, weight=1.0, **kwargs):
        return [0.0] * len(completions)

    rows = Dataset.from_dict({"prompt": ["a"], "topic": ["t"]})
    with pytest.raises(DataError) as error:
        check(rows, [needs_topic])
    assert "['level'] missing" in str(error.value)
    check(rows.add_column("level", [1]), [needs_topic])


def test_reward_models_and_functions_that_take_anything_need_no_column():
    import torch

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    def anything(completions, **kwargs):
        return [0.0] * len(completions)

    check(Dataset.from_dict({"prompt": ["a"]}), ["org/reward-model", Model(), anything])


@pytest.mark.parametrize("bad", [None, "", "   "])
def test_an_empty_prompt_in_the_first_thousand_is_refused(bad):
    prompts = ["a"] * 999 + [bad]
    with pytest.raises(DataError, match="row 999"):
        check(Dataset.from_dict({"prompt": prompts, "solution": ["1"] * 1000}))


@pytest.mark.parametrize("bad", [[], [{"role": "user", "content": ""}]])
def test_an_empty_chat_is_refused(bad):
    with pytest.raises(DataError, match="must not be empty, got 1"):
        check(Dataset.from_dict({"prompt": [chat("a"), bad], "solution": ["1", "1"]}))


def test_a_prompt_of_another_type_is_refused():
    with pytest.raises(DataError, match="got int in row 0"):
        check(Dataset.from_dict({"prompt": [1], "solution": ["1"]}))


def test_chats_need_a_chat_template_plain_prompts_do_not():
    class Bare(Tokenizer):
        chat_template = None

    with pytest.raises(DataError, match="chat template"):
        check(good(), tokenizer=Bare())
    check(Dataset.from_dict({"prompt": ["a"], "solution": ["1"]}), tokenizer=Bare())


def test_a_stream_is_checked_on_its_first_rows():
    def rows():
        yield {"prompt": "a", "solution": "1"}
        yield {"prompt": "", "solution": "1"}

    with pytest.raises(DataError, match="row 1"):
        check(IterableDataset.from_generator(rows), prompts=100)
