"""Data sets by name: built-in, local folder or file, saved data set, or Hub id."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import filter_long_prompts, is_stream, prepare_dataset, required_columns
from ..errors import DataError, SGOPDConfigError, did_you_mean
from ..tasks import resolve
from .outside import concerning, missing

if TYPE_CHECKING:
    from .parsing import TrainSettings

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_splits(name: str, config: str | None = None, *, streaming: bool = False) -> Any:
    """All splits of a data set.

    Args:
        name: `builtin/...`, a JSON, JSON Lines, Parquet or CSV file (its split is `train`), a folder of such files, a
            folder written by `save_to_disk`, or a Hub id.
        config: configuration of a Hub data set.
        streaming: read rows as they are needed.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`.

    Raises:
        DataError: no such data set.
    """
    path = Path(resolve(name))
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"`dataset_name` must hold rows, got {name!r}, an empty file. Set it to another file.")
    try:
        with concerning("dataset_name", name):
            return _load(path, config, streaming)
    except SGOPDConfigError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, ConnectionError)):
            raise
        seen = missing(name).rstrip(".") or error.__cause__
        raise DataError(
            f"`dataset_name` must be a built-in name, a file, a folder or a Hub id, got {name!r}: {seen}. "
            "Nothing can be read there. Check the name and the connection."
        ) from error


def _load(path: Path, config: str | None, streaming: bool) -> Any:
    import datasets

    if path.suffix in FILE_FORMATS and path.is_file():
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), streaming=streaming)
    # What `save_to_disk` wrote has a loader of its own: `load_dataset` does not find its splits.
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, dict) else datasets.DatasetDict({"train": saved})
    return datasets.load_dataset(str(path), name=config, streaming=streaming)


def pick_split(splits: Any, split: str, setting: str) -> Any:
    """One split by name.

    Raises:
        DataError: no such split.
    """
    if split not in splits:
        raise DataError(
            f"`{setting}` must be one of {list(splits)}, got {split!r}. The data set has no other splits."
            f"{did_you_mean(split, list(splits))}"
        )
    return splits[split]


def load_training_data(
    settings: "TrainSettings", reward_funcs: Sequence[Callable[..., Any]], tokenizer: Any
) -> tuple[Any, Any]:
    """Training rows, and evaluation rows where the run evaluates.

    Args:
        settings: of the run.
        reward_funcs: their parameters are columns to keep.
        tokenizer: measures prompts where `max_prompt_tokens` is set.

    Returns:
        Training data set, and evaluation data set or None.

    Raises:
        DataError: no data set named, or none found, or missing splits or columns.
    """
    script = settings.script
    if settings.mixture.datasets:
        from trl import get_dataset

        with concerning("datasets", [each.path for each in settings.mixture.datasets]):
            splits = get_dataset(settings.mixture)
    elif script.dataset_name is not None:
        splits = load_splits(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise DataError("`dataset_name` must be set, got None. It holds the problems. Set it to `builtin/arithmetic`.")

    train = _prepare(
        pick_split(splits, script.dataset_train_split, "dataset_train_split"), settings, reward_funcs, tokenizer
    )
    if settings.training.eval_strategy == "no":
        return train, None
    test = _prepare(
        pick_split(splits, script.dataset_test_split, "dataset_test_split"), settings, reward_funcs, tokenizer
    )
    return train, first_rows(test, script.eval_samples)


def first_rows(dataset: Any, count: int | None) -> Any:
    """The first `count` rows, all of them for None or when there are fewer."""
    if count is None:
        return dataset
    return dataset.take(count) if is_stream(dataset) else dataset.select(range(min(count, len(dataset))))


def _prepare(dataset: Any, settings: "TrainSettings", reward_funcs: Sequence[Any], tokenizer: Any) -> Any:
    script = settings.script
    dataset = prepare_dataset(
        dataset,
        question_column=script.question_column,
        answer_column=script.answer_column,
        instruction=script.instruction,
        system_prompt=script.system_prompt,
        difficulty_column=script.difficulty_column,
        min_difficulty=script.min_difficulty,
        keep_columns=required_columns(reward_funcs),
    )
    if script.max_prompt_tokens is None:
        return dataset
    given = settings.training.chat_template_kwargs
    kwargs = given if isinstance(given, dict) else {}
    return filter_long_prompts(dataset, tokenizer, script.max_prompt_tokens, chat_template_kwargs=kwargs)
