"""What the data set must look like: how rows become it, and what is checked before a model is asked for anything.

A training row needs `prompt` (a string or a chat, the list of messages up to the question) and whatever columns the
reward functions ask for by name; the built-in verifiers ask for `solution`, the bare gold answer. `teacher_id` and
`teacher_prompt` are optional; what they mean is in `teachers.routed`.
"""

import inspect
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from heapq import nlargest
from itertools import islice
from typing import Any

from .errors import DataError
from .run import Run

logger = logging.getLogger(__name__)

TEACHER_ID = "teacher_id"
"""Column that names a row's teacher, where there are several."""
TEACHER_PROMPT = "teacher_prompt"
"""Column with the prompt that the teacher reads in place of `prompt`, e.g. with privileged context."""
HEAVY_COLUMN_CHARACTERS = 1000
"""A column nobody asked for is dropped above this mean length (our choice): worked solutions fill most of a disk."""
ROWS_CHECKED = 1000
"""Rows that are looked at before the run (our choice): as many as cost no noticeable time."""
STREAMED_ROWS_CHECKED = 8
"""The same for a stream, whose rows may each be a download."""
PROMPTS_RENDERED = 8
"""Prompts that are rendered and compared before the run (our choice)."""
PROVIDED_BY_TRAINER = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
"""Parameters of a reward function that TRL fills itself, so that no column has to."""
_IMAGE_COLUMNS = ("image", "images")  # TRL's names

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


# --- rows -> `prompt` and `solution` ---------------------------------------------------------------------------------
def prepare_dataset(
    dataset: Any,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    instruction: str | None = None,
    system_prompt: str | None = None,
    difficulty_column: str = "difficulty",
    min_difficulty: float | None = None,
    keep_columns: Collection[str] = (),
    name: str = "dataset",
) -> Any:
    """Map rows to `prompt` and `solution`, filters by difficulty and drops rows and columns that cannot be used.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset`, rows as they come from the Hub or a file.
        question_column: text column that becomes the user's message. Without it there must be `prompt` already. A
            point leads into a column that holds dictionaries: `extra.question`. So it does for the other columns.
        answer_column: column that becomes `solution`. Texts are kept as given, numbers become strings, a list of one
            answer becomes that. Without it an existing `solution` is used; without either, rows have no `solution`.
        instruction: appended to the user's message on a new line, e.g. how to mark the final answer.
        system_prompt: first message of every chat that has no system message. `teacher_prompt`, where it exists,
            becomes a chat and gets the instruction and the system message as the prompt does.
        difficulty_column: column that `min_difficulty` refers to: numbers, or texts with one number ("Level 3").
        min_difficulty: rows below it, or without a value, are dropped.
        keep_columns: columns kept whatever their size, e.g. those that a reward function needs.
        name: how messages call this data set.

    Returns:
        The same type as given, with `prompt` and, where golds exist, `solution`.

    Raises:
        DataError: a named column does not exist, or there is neither `prompt` nor `question_column`; no row is left;
            or a gold answer is a dictionary or several answers.
    """
    columns = column_names(dataset)
    question, answer = question_column or "prompt", answer_column or "solution"
    for column, setting in ((question, "question_column"), (answer_column, "answer_column")):
        _require_column(column, setting, columns, name)
    if min_difficulty is not None:
        _require_column(difficulty_column, "difficulty_column", columns, name)
        limit = float(min_difficulty)
        before = dataset
        dataset = _filter(
            dataset, lambda row: _at_least(cell(row, difficulty_column), limit), name, f"difficulty < {limit:g}"
        )
        _require_difficult_rows(before, dataset, difficulty_column, limit, name)

    with_gold = answer_column is not None or answer in columns
    before = dataset
    dataset = _filter(
        dataset,
        lambda row: not is_empty_prompt(cell(row, question)) and not (with_gold and is_empty_gold(cell(row, answer))),
        name,
        "no prompt or no solution",
    )
    _require_rows(
        before,
        dataset,
        name,
        f"`{question}`{f' and `{answer}`' if with_gold else ''} must be filled",
        "Every row lacks a prompt or a solution. Set question_column and answer_column to columns that have them.",
    )
    read = {question, answer} & set(columns)
    kept = {*keep_columns, TEACHER_ID, TEACHER_PROMPT}
    unused = read - set(keep_columns) | _heavy_columns(dataset, columns, read | kept, name)
    # Written under a new name and renamed at the end: a column that is written again keeps its old type.
    sources = {"prompt": question} | ({"solution": answer} if with_gold else {})
    sources |= {TEACHER_PROMPT: TEACHER_PROMPT} if TEACHER_PROMPT in columns else {}
    written = {column: f"{column} for {question}" for column in sources}
    unused |= {"prompt", "solution", TEACHER_PROMPT} & set(columns)

    def value(column: str, given: Any) -> Any:
        if column == "solution":
            return as_gold(given, answer)
        _require_prompt(given, sources[column], name)
        return as_prompt(given, instruction, system_prompt, always_chat=question_column is not None)

    def to_row(row: Mapping[str, Any]) -> dict[str, Any]:
        return {written[column]: value(column, cell(row, source)) for column, source in sources.items()}

    mapped = dataset.map(to_row, remove_columns=sorted(unused))
    return mapped.rename_columns({new: column for column, new in written.items()})


def filter_long_prompts(
    dataset: Any,
    processing_class: Any,
    max_prompt_tokens: int,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "dataset",
) -> Any:
    """Drop rows whose prompt, chat template and generation prompt included, is longer than `max_prompt_tokens` tokens.

    Raises:
        DataError: `max_prompt_tokens` is below 1.
    """
    if max_prompt_tokens < 1:
        raise DataError(
            f"`max_prompt_tokens` must be at least 1, got {max_prompt_tokens}. It is the longest prompt that is kept. "
            "Leave it out to keep all."
        )

    def fits(row: Mapping[str, Any]) -> bool:
        prompt = flat_prompt(row["prompt"])
        if isinstance(prompt, str):
            ids = processing_class(text=prompt)["input_ids"]
        else:
            text = processing_class.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
            )
            # The template has written the special tokens already.
            ids = processing_class(text=text, add_special_tokens=False)["input_ids"]
        return len(ids) <= max_prompt_tokens

    kept = _filter(dataset, fits, name, f"prompt longer than {max_prompt_tokens} tokens")
    _require_rows(
        dataset,
        kept,
        name,
        "`max_prompt_tokens` must leave rows",
        "All prompts are longer. Raise it.",
        got=max_prompt_tokens,
    )
    return kept


def as_prompt(question: Any, instruction: str | None, system_prompt: str | None, always_chat: bool) -> Any:
    """A question (string or chat, None stays None) as the prompt that is trained on.

    Args:
        question: as the data set has it.
        instruction: appended to the last message on a new line.
        system_prompt: first message of a chat that has none.
        always_chat: whether a string becomes a chat without a system prompt too.
    """
    if question is None:
        return None
    if isinstance(question, str):
        text = _with_instruction(question, instruction) if instruction else question
        if not always_chat and system_prompt is None:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        messages = [dict(message) for message in question]
        if instruction:
            messages[-1]["content"] = _with_instruction(messages[-1]["content"], instruction)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _with_instruction(content: Any, instruction: str) -> Any:
    """Content is a string, or a list of typed parts as multimodal templates have it."""
    if isinstance(content, str):
        return f"{content}\n{instruction}"
    return [*content, {"type": "text", "text": f"\n{instruction}"}]


def as_gold(gold: Any, column: str = "solution") -> Any:
    """The gold answer as it is given, numbers as text; a list of one answer is that answer.

    Raises:
        DataError: a dictionary, or a list of several: which of them is the answer, or whether all are, nobody knows.
    """
    while isinstance(gold, (list, tuple)) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, float) and math.isfinite(gold):
        return f"{Decimal(repr(gold)):f}"  # not 1e-05, which no mathematician writes
    if isinstance(gold, Mapping):
        raise DataError(
            f"`answer_column` must lead to one answer a row, got {dict(gold)!r} in `{column}`. Which of its entries "
            f"is the answer is not known. Set it to one of {[f'{column}.{key}' for key in gold]}."
        )
    if isinstance(gold, (list, tuple)):
        raise DataError(
            f"`answer_column` must lead to one answer a row, got the list {list(gold)!r} in `{column}`. Whether each "
            "is right or only all of them is not known. Write one text, such as '1, 2' for both."
        )
    return str(gold) if isinstance(gold, int) else gold


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; where there is none of that name, a point leads into one that holds dictionaries."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_empty_prompt(prompt: Any) -> bool:
    """Whether a prompt (string or chat) is missing or says nothing."""
    if isinstance(prompt, str):
        return not prompt.strip()
    if not isinstance(prompt, (list, tuple)):
        return prompt is None  # what it is instead is told elsewhere
    messages = [message for message in prompt if isinstance(message, Mapping)]
    return not prompt or (bool(messages) and all(_is_empty_content(message.get("content")) for message in messages))


def _is_empty_content(content: Any) -> bool:
    if not isinstance(content, list):
        return not content
    return all(isinstance(part, Mapping) and part.get("type") == "text" and not part.get("text") for part in content)


def flat_prompt(prompt: Any) -> Any:
    """A chat with the text parts of each message joined, as templates that know parts join them; others as they are.

    Raises:
        DataError: a part that is no text.
    """
    if not isinstance(prompt, list):
        return prompt
    return [
        {**message, "content": "".join(map(_text_of, message["content"]))}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise DataError(
            f"`prompt` must hold text alone, got a part of type {kind!r}. Student and teacher read no images and "
            "no audio. Drop such rows with `dataset.filter`, or give the text as `{'type': 'text', 'text': ...}`."
        )
    return text


def without_images(example: dict[str, Any]) -> dict[str, Any]:
    """A row without the image columns that a mixed data set left in it.

    Raises:
        DataError: a row that has an image.
    """
    found = [name for name in _IMAGE_COLUMNS if name in example]
    filled = [name for name in found if example[name]]
    if filled:
        raise DataError(
            f"the column {filled[0]!r} must be empty with a text-only student, got a row with "
            f"{type(example[filled[0]]).__name__} in it. The question may need what the student cannot see. Drop such "
            f"rows with `dataset.filter`, or the column with `dataset.remove_columns({filled[0]!r})`."
        )
    return {name: value for name, value in example.items() if name not in found} if found else example


def ends_with_an_answer(prompt: Any) -> bool:
    """Whether the last word of a chat is the assistant's."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def is_empty_gold(gold: Any) -> bool:
    """Whether a row has no gold answer; a list has none where all its entries are none."""
    if isinstance(gold, (list, tuple)):
        return all(map(is_empty_gold, gold))
    return gold is None or (isinstance(gold, str) and not gold.strip()) or gold != gold  # NaN is a missing number


def _require_column(column: str | None, setting: str, columns: list[str], name: str) -> None:
    if column is None or column in columns or column.partition(".")[0] in columns:
        return
    raise DataError(
        f"`{setting}` must name a column of the {name}, got {column!r}; it has {columns}. Rows are built from it. Set "
        f"`{setting}` to one of them."
    )


def _filter(dataset: Any, keep: Callable[[Any], bool], name: str, reason: str) -> Any:
    filtered = dataset.filter(keep)
    if is_stream(dataset):
        logger.info("%s: rows are skipped while streaming: %s", name, reason)
    elif len(filtered) < len(dataset):
        logger.warning("%s: dropped %d of %d rows: %s", name, len(dataset) - len(filtered), len(dataset), reason)
    return filtered


def _require_rows(before: Any, after: Any, name: str, must: str, advice: str, *, got: Any = None) -> None:
    """Refuse a filter that leaves nothing. What a stream has is not known before it is read."""
    if is_stream(after) or len(after) > 0:
        return
    found = f"{got}, which leaves none of {len(before)}" if got is not None else f"none in {len(before)} rows"
    raise DataError(f"{must}, got {found} in the {name}. {advice}")


def _require_difficult_rows(before: Any, after: Any, column: str, limit: float, name: str) -> None:
    if is_stream(after) or len(after) > 0:
        return
    numbers = [each for each in (_difficulty(cell(row, column)) for row in before) if each is not None]
    if numbers:
        _require_rows(
            before,
            after,
            name,
            "`min_difficulty` must leave rows",
            f"The largest in `{column}` is {max(numbers):g}. Lower it.",
            got=f"{limit:g}",
        )
    example = next((cell(row, column) for row in before), None)
    raise DataError(
        f"`difficulty_column` must lead to numbers, or texts with one number, got {example!r} in `{column}` of the "
        f"{name}. `min_difficulty` is compared with them. Set it to another column, or leave min_difficulty out."
    )


def _require_prompt(value: Any, column: str, name: str) -> None:
    chat = isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value)
    if value is not None and not isinstance(value, str) and not chat:
        raise DataError(
            f"`question_column` must lead to texts or chats, got {value!r} in `{column}` of the {name}. It becomes "
            "the user's message. Set it to another column; a point leads into a dictionary."
        )


def _at_least(value: Any, limit: float) -> bool:
    number = _difficulty(value)
    return number is not None and number >= limit


def _difficulty(value: Any) -> float | None:
    """A number, also from a text that has one ("Level 3"); None where there is none, or several."""
    if not isinstance(value, str):
        return None if value is None else float(value)
    found = _NUMBER.findall(value)
    return float(found[0]) if len(found) == 1 else None


def _heavy_columns(dataset: Any, columns: list[str], kept: set[str], name: str) -> set[str]:
    """Unused columns whose text is long: worked solutions, generations of other models."""
    candidates = [column for column in columns if column not in kept]
    rows = list(islice(dataset, STREAMED_ROWS_CHECKED)) if candidates else []
    heavy = {
        column
        for column in candidates
        if rows and sum(len(str(row[column])) for row in rows) > HEAVY_COLUMN_CHARACTERS * len(rows)
    }
    if heavy:
        logger.warning("%s: dropped the long unused columns %s", name, sorted(heavy))
    return heavy


# --- checked before the run ------------------------------------------------------------------------------------------
def check_dataset(
    dataset: Any,
    *,
    reward_funcs: Sequence[Any],
    processing_class: Any,
    prompts_per_generation_batch: int,
    name: str = "train_dataset",
) -> None:
    """Refuse a data set that would fail later, at the first batch or in a reward function.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset` that the trainer would use.
        reward_funcs: reward functions; a parameter without a default that the trainer does not provide is a required
            column. Model ids and models need no column.
        processing_class: tokenizer or processor, which renders chats.
        prompts_per_generation_batch: prompts that one generation batch takes, `generation_batch_size /
            num_generations`.
        name: how messages call this data set.

    Raises:
        DataError: empty, too small, a missing column, empty prompts among the first 1000 rows (8 of a stream), or
            chats for a tokenizer without a chat template.
    """
    rows = first_rows(dataset)
    if not rows:
        raise DataError(f"`{name}` must have rows, got none. Check `dataset_name`, the split and the filters.")
    if not is_stream(dataset) and len(dataset) < prompts_per_generation_batch:
        raise DataError(
            f"`{name}` must have at least {prompts_per_generation_batch} rows, got {len(dataset)}. One generation "
            "batch takes `generation_batch_size / num_generations` prompts and an incomplete one is dropped, so no "
            "step would run. Lower `generation_batch_size` (or `per_device_train_batch_size`, "
            "`gradient_accumulation_steps`), or add rows."
        )
    found = column_names(dataset) or list(rows[0])
    required = ["prompt", *required_columns(reward_funcs)]
    missing = [column for column in required if column not in found]
    if missing:
        raise DataError(
            f"`{name}` must have the columns {required}, got {found}: {missing} missing. `prompt` is what is "
            "generated from, the others are parameters of the reward functions. Rename columns with "
            "`dataset.rename_column`, or with `sg_opd_trl.data.prepare_dataset(question_column=..., "
            "answer_column=...)` (the same names on the command line)."
        )
    for row in rows:
        without_images(row)
    _check_prompts([row["prompt"] for row in rows], processing_class, name)


def required_columns(reward_funcs: Sequence[Any]) -> list[str]:
    """Parameters without a default that only a column can fill, in order of appearance."""
    from torch import nn

    names: dict[str, None] = {}
    for reward_func in reward_funcs:
        if isinstance(reward_func, (str, nn.Module)):
            continue
        for parameter in inspect.signature(reward_func).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and parameter.name not in PROVIDED_BY_TRAINER:
                names[parameter.name] = None
    return list(names)


def _check_prompts(prompts: list[Any], processing_class: Any, name: str) -> None:
    wrong = [
        index for index, prompt in enumerate(prompts) if prompt is not None and not isinstance(prompt, (str, list))
    ]
    if wrong:
        raise DataError(
            f"`prompt` must be a string or a list of messages, got {type(prompts[wrong[0]]).__name__} in row "
            f"{wrong[0]} of `{name}`. Nothing else can be tokenized. Convert the column before training."
        )
    empty = [index for index, prompt in enumerate(prompts) if is_empty_prompt(prompt)]
    if empty:
        raise DataError(
            f"`prompt` must not be empty, got {len(empty)} empty rows among the first {len(prompts)} of `{name}` "
            f"(first: row {empty[0]}). An empty prompt conditions on nothing. Drop them with `dataset.filter` or "
            "`sg_opd_trl.data.prepare_dataset`."
        )
    for index, prompt in enumerate(prompts):
        flat_prompt(prompt)
        if ends_with_an_answer(prompt):
            raise DataError(
                f"`prompt` must not end with an assistant's message, got one in row {index} of `{name}`. Templates "
                "close it, and the student would answer anew instead of going on with it. Drop the message, or move "
                "its text into the question."
            )
    chats = any(isinstance(prompt, list) for prompt in prompts)
    if chats and processing_class.chat_template is None:
        raise DataError(
            f"`processing_class` must have a chat template, got {type(processing_class).__name__} without one. The "
            f"prompts of `{name}` are chats and cannot be rendered. Set `processing_class.chat_template`, or give "
            "prompts as strings."
        )


# --- reading a data set ----------------------------------------------------------------------------------------------
def datasets_of(run: Run) -> list[tuple[str, Any]]:
    """The data sets of a run with the names that messages use, `train_dataset` first."""
    evaluation = run.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    found = [(f"eval_dataset {key}".strip(), dataset) for key, dataset in named.items() if dataset is not None]
    # An environment that owns the data brings its own prompts; TRL then drives it with placeholder rows.
    return found if run.environment_factories is not None else [("train_dataset", run.train_dataset), *found]


def column_names(dataset: Any) -> list[str]:
    """Columns of a map-style or streamed data set; a stream that does not declare them is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return next((list(row) for row in dataset), [])


def is_stream(dataset: Any) -> bool:
    """Whether the data set has no length, so that rows cannot be counted or drawn at random."""
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def first_rows(dataset: Any) -> list[dict[str, Any]]:
    """The rows that are checked before the run: the first 1000, or the first 8 of a stream."""
    if is_stream(dataset):
        return list(islice(dataset, STREAMED_ROWS_CHECKED))
    return [dict(row) for row in dataset.select(range(min(ROWS_CHECKED, len(dataset))))]


def first_prompts(dataset: Any, column: str = "prompt") -> list:
    """The prompts that are rendered before the run, those of the first 8 rows; of a column where a row has it."""
    rows = first_rows(dataset)[:PROMPTS_RENDERED]
    return [row["prompt"] if row.get(column) is None else row[column] for row in rows]


def longest_prompts(dataset: Any, column: str = "prompt") -> list:
    """Those of a column that have the most characters, as many as are rendered before a run; of a stream its first.

    Counting characters is quick where rendering every prompt is not, and tokens go with them.
    """
    if column not in column_names(dataset):
        return []
    prompts = (row.get(column) for row in first_rows(dataset)) if is_stream(dataset) else dataset[column]
    return nlargest(PROMPTS_RENDERED, (x for x in prompts if x is not None), key=lambda prompt: len(str(prompt)))
