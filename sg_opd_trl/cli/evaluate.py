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
from .outside import check_file, check_vocabulary, concerning, explained

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import EvaluationResult

logger = logging.getLogger(__name__)


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd evaluate --model PATH --dataset_name NAME [...]`: print a table and, with `--output`, write JSON.

    Args:
        argv: words after `evaluate`.
        debug: not used; errors are shown by `main`.

    Returns:
        0.
    """
    options = _parser().parse(argv)
    _check_options(options)
    rows = _rows(options)
    with explained(lambda: vars(options)):
        _evaluate(options, rows)
    return 0


def _evaluate(options: argparse.Namespace, rows: Any) -> None:
    # Not before the flags are read: `--help` and a misspelt flag are answered at once.
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..evaluation import evaluate_model
    from ..evaluation_sampling import to_accelerator
    from ..tasks import resolve
    from .rewards import load_reward_funcs

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
        num_samples=options.num_samples,
        k=options.k,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        reward_func=load_reward_funcs([options.reward_func])[0],
        seed=options.seed,
        samples_path=options.samples_path,
        chat_template_kwargs=options.chat_template_kwargs,
        dataset_name=options.dataset_name,
    )
    title = f"{options.dataset_name}, {result.num_problems} problems"
    Console().print(results_table({options.model: result}, title))
    if options.output is not None:
        say(f"Result written to {result.save(Path(options.output))}")


def check(argv: Sequence[str]) -> None:
    """Do all of an evaluation that needs no model: flags and their bounds, verifier, data set, split, columns.

    Args:
        argv: as for `run`.

    Raises:
        SGOPDError, ValueError: what `run` would raise; a `ValueError` is what `datasets` says to an unknown
            configuration.
    """
    options = _parser().parse(argv)
    _check_options(options)
    _rows(options)


def _check_options(options: argparse.Namespace) -> None:
    from ..evaluation import pass_at_k
    from ..evaluation_sampling import Decoding
    from .rewards import load_reward_funcs

    # The bootstrap takes the seed after everything is sampled, and the files are written last of all.
    if options.seed < 0:
        raise SGOPDConfigError(f"`seed` must be at least 0, got {options.seed}. It seeds sampling. Set it to 0.")
    for name in ("output", "samples_path"):
        check_file(name, getattr(options, name))
    pass_at_k(options.num_samples, 0, options.num_samples if options.k is None else options.k)
    Decoding(options.temperature, options.top_p, options.max_new_tokens, options.batch_size, options.seed)
    load_reward_funcs([options.reward_func])


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
    """Accuracies in percent with 95% intervals, one row per model."""
    from rich.table import Table

    first = next(iter(results.values()))
    table = Table(title=title, caption="95% intervals: bootstrap over problems")
    table.add_column("")
    for heading in (f"avg@{first.num_samples}", "95% interval", f"pass@{first.k}", "95% interval"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            _percent(result.avg_at_k),
            " to ".join(map(_percent, result.avg_interval)),
            _percent(result.pass_at_k),
            " to ".join(map(_percent, result.pass_interval)),
        )
    return table


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
    parser.flag("limit", type=int, help="first rows only")
    parser.flag("reward_func", default="math_reward", help="verifier: a name or a dotted import path")
    parser.flag("seed", type=int, default=0, help="seed of sampling and bootstrap")
    parser.flag(
        "dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="dtype of the weights"
    )
    parser.flag("revision", default="main", help="branch, tag or commit of the model")
    parser.flag("trust_remote_code", action="store_true", help="run code of the model's repository")
    parser.flag("samples_path", help="JSON Lines file that receives every sample")
    parser.flag("output", help="JSON file for the result")
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
