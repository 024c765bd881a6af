"""`sg-opd evaluate`: avg@k and pass@k of one model on one data set; and what `demo` and `study` use of it."""

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import DataError, SGOPDConfigError
from .command import CommandParser, say
from .outside import check_vocabulary, concerning, explained

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import EvaluationResult

logger = logging.getLogger(__name__)


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd evaluate --model PATH --dataset_name NAME [...]`: print a table and, with `--output`, write JSON.

    With `--output` or `--samples_path` an interrupted evaluation goes on where it stopped, see `evaluate_model`.

    Args:
        argv: words after `evaluate`.
        debug: not used; errors are shown by `main`.

    Returns:
        0.
    """
    options = _parser().parse(argv)
    settings = _checked(options)
    rows = _rows(options)
    _check_files(options, settings, rows)
    with explained(lambda: vars(options)):
        _evaluate(options, settings, rows)
    return 0


def _evaluate(options: argparse.Namespace, settings: dict[str, Any], rows: Any) -> None:
    # Not before the flags are read: `--help` and a misspelt flag are answered at once.
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..evaluation import evaluate_model
    from ..evaluation_sampling import to_accelerator
    from ..tasks import resolve

    folder = resolve(options.model)
    loading = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    with concerning("model", options.model):
        model = to_accelerator(AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype, **loading))
        tokenizer = AutoTokenizer.from_pretrained(folder, **loading)
    check_vocabulary("model", options.model, tokenizer)
    result = evaluate_model(
        model,
        tokenizer,
        rows,
        **settings,
        samples_path=options.samples_path,
        output_path=options.output,
        name=options.model if options.revision == "main" else f"{options.model}@{options.revision}",
        dataset_name=options.dataset_name,
    )
    title = f"{options.dataset_name}, {result.num_problems} problems"
    label = result.model if result.base_model is None else f"{result.model}, adapter on {result.base_model}"
    Console().print(results_table({label: result}, title))
    if options.output is not None:
        say(f"Result written to {options.output}")


def check(argv: Sequence[str]) -> None:
    """Do all of an evaluation that needs no model: flags and their bounds, verifier, data set, split, columns.

    Args:
        argv: as for `run`.

    Raises:
        SGOPDError, ValueError: what `run` would raise; a `ValueError` is what `datasets` says to an unknown
            configuration.
    """
    options = _parser().parse(argv)
    _checked(options)
    _rows(options)


_DECODING = ("temperature", "top_p", "max_new_tokens", "batch_size", "seed", "generation_kwargs")


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `evaluate_model` that are settings, after all checks that need no data set."""
    from ..evaluation import pass_at_k
    from ..evaluation_files import EvaluationFiles
    from ..evaluation_plan import Decoding
    from .rewards import load_reward_funcs

    EvaluationFiles(options.samples_path, options.output)
    pass_at_k(options.num_samples, 0, options.num_samples if options.k is None else options.k)
    decoding = {name: getattr(options, name) for name in _DECODING}
    Decoding(**decoding)
    if options.verifier_timeout is not None:
        from ..verifiers.bounded import check_limit

        check_limit(options.verifier_timeout)
    return {
        **decoding,
        **{name: getattr(options, name) for name in ("num_samples", "k", "chat_template_kwargs", "verifier_timeout")},
        "reward_func": load_reward_funcs([options.reward_func])[0],
    }


def _check_files(options: argparse.Namespace, settings: dict[str, Any], rows: Any) -> None:
    """Refuse files of another evaluation, as far as that is seen without the model."""
    from ..evaluation import plan_evaluation
    from ..evaluation_files import EvaluationFiles
    from ..evaluation_plan import Decoding

    decoding = Decoding(**{name: settings[name] for name in _DECODING})
    others = {name: value for name, value in settings.items() if name not in _DECODING}
    plan = plan_evaluation(rows, decoding, **others)
    EvaluationFiles(options.samples_path, options.output).check(plan.identity)


def cached_evaluation(model: str, rows: Any, cache: Path, dataset_name: str, **settings: Any) -> "EvaluationResult":
    """Evaluate a local model folder, or read the result that an earlier run left.

    The name of the stored file hashes everything the result depends on: the bytes of the model's folder, the rows, the
    decoding settings and the version of this package.

    Args:
        model: local folder.
        rows: data set with `prompt` and `solution`.
        cache: folder of stored results.
        dataset_name: what reports call the rows.
        settings: keyword arguments of `evaluate_model`, JSON values only.

    Returns:
        The evaluation.
    """
    from ..evaluation import EvaluationResult, evaluate_model

    # The bytes, not their dates: a student that was trained again in its folder is another model, a copied folder not.
    key = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.is_file():
            key.update(path.name.encode() + path.read_bytes())
    key.update(json.dumps([list(rows), settings, __version__], sort_keys=True).encode())
    stored = cache / f"{key.hexdigest()[:24]}.json"
    if stored.is_file():
        try:
            return EvaluationResult.from_dict(json.loads(stored.read_text(encoding="utf-8")))
        except (DataError, ValueError, TypeError) as error:
            logger.warning("stored evaluation %s is not readable and is made again: %s", stored, error)
    result = evaluate_model(model, None, rows, dataset_name=dataset_name, **settings)
    result.save(stored)
    return result


def results_table(results: Mapping[str, "EvaluationResult"], title: str) -> "Table":
    """Accuracies in percent with 95% intervals, one row per model; what has no verdict, and what that leaves open."""
    from rich.table import Table

    first = next(iter(results.values()))
    average, passed = f"avg@{first.num_samples}", f"pass@{first.k}"
    missing = any(result.abstained for result in results.values())
    caption = "95% intervals: bootstrap over problems"
    if missing:
        caption += "\nno verdict: left out; in parentheses with all of them wrong to all of them right"
    table = Table(title=title, caption=caption)
    table.add_column("")
    for heading in (average, "95% interval", passed, "95% interval", "no verdict"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            _accuracy(result.avg_at_k, result.avg_bounds if missing else None),
            _between(result.avg_interval),
            _accuracy(result.pass_at_k, result.pass_bounds if missing else None),
            _between(result.pass_interval),
            f"{result.abstained} of {result.num_completions}" if result.abstained else "0",
        )
    return table


def _accuracy(share: float | None, bounds: tuple[float, float] | None) -> str:
    shown = "no verdict" if share is None else _percent(share)
    return shown if bounds is None else f"{shown} ({_between(bounds)})"


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else " to ".join(map(_percent, interval))


def _parser() -> CommandParser:
    parser = CommandParser(
        "sg-opd evaluate", "Sample completions for every problem, judge them, print avg@k and pass@k."
    )
    parser.flag("model", required=True, help="model folder, Hub id or built-in name")
    parser.flag("dataset_name", required=True, help="file, folder, Hub id or built-in name")
    parser.flag("dataset_config", help="configuration of a Hub data set")
    parser.flag("dataset_split", default="test", help="split to evaluate on")
    parser.flag("question_column", help="column that becomes the user's message; without it there must be `prompt`")
    parser.flag("answer_column", help="column of the gold answers; without it `solution`")
    parser.flag("instruction", help="text appended to every question on a new line")
    parser.flag("system_prompt", help="system message of every chat that has none")
    parser.flag("chat_template_kwargs", type=_mapping, default={}, help="JSON, e.g. '{\"enable_thinking\": false}'")
    parser.flag("num_samples", type=int, default=8, help="completions per problem")
    parser.flag("k", type=int, help="k of pass@k; `num_samples` by default")
    parser.flag("temperature", type=float, default=1.0, help="0 decodes greedily")
    parser.flag("top_p", type=float, default=1.0, help="nucleus mass")
    parser.flag("max_new_tokens", type=int, default=1024, help="longest completion in tokens")
    parser.flag("batch_size", type=int, default=64, help="completions generated at once")
    parser.flag(
        "generation_kwargs", type=_mapping, default={}, help="JSON, e.g. '{\"top_k\": 20}': further sampling settings"
    )
    parser.flag("limit", type=int, help="first rows only")
    parser.flag("reward_func", default="math_reward", help="verifier: a name or a dotted import path")
    parser.flag("verifier_timeout", type=float, help="seconds that one call of a verifier of your own may take")
    parser.flag("seed", type=int, default=0, help="seed of sampling and bootstrap")
    parser.flag(
        "dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="dtype of the weights"
    )
    parser.flag("revision", default="main", help="branch, tag or commit of the model")
    parser.flag("trust_remote_code", action="store_true", help="run code of the model's repository")
    parser.flag("samples_path", help="JSON Lines file that receives every sample; an interrupted call goes on from it")
    parser.flag("output", help="JSON file for the result; samples are kept beside it until then")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _rows(options: argparse.Namespace) -> Any:
    from ..data import prepare_dataset
    from .loading import first_rows, load_splits, pick_split

    if options.limit is not None and options.limit < 1:
        raise SGOPDConfigError(
            f"`limit` must be at least 1, got {options.limit}. It is a count. Leave it out for all rows."
        )
    splits = load_splits(options.dataset_name, options.dataset_config)
    return prepare_dataset(
        first_rows(pick_split(splits, options.dataset_split, "dataset_split"), options.limit),
        question_column=options.question_column,
        answer_column=options.answer_column,
        instruction=options.instruction,
        system_prompt=options.system_prompt,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
