"""`sg-opd evaluate`: avg@k and pass@k of one model on one data set."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sg_opd_trl.cli.suggest import did_you_mean
from sg_opd_trl.errors import SGOPDConfigError


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are the package's, and which names the nearest flag."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.names: list[str] = []

    def flag(self, name: str, **settings: Any) -> None:
        """Add `--name`, also under its hyphenated spelling."""
        self.names.append(name)
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            SGOPDConfigError: an unknown flag, or a value of the wrong type.
        """
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0]
            raise SGOPDConfigError(
                f"Unknown key `{name}` in the command line.{did_you_mean(name, self.names)} `{self.prog} --help` "
                "lists all."
            )
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raises `SGOPDConfigError` instead of leaving the process."""
        raise SGOPDConfigError(f"The command line is not valid: {message}. `{self.prog} --help` lists all flags.")


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd evaluate --model PATH --dataset_name NAME [...]`: print a table and, with `--output`, write JSON.

    Args:
        argv: words after `evaluate`.
        debug: not used; errors are shown by `main`.

    Returns:
        0.
    """
    options = _parser().parse(argv)
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sg_opd_trl.cli.measuring import results_table
    from sg_opd_trl.cli.rewards import load_reward_funcs
    from sg_opd_trl.evaluation import evaluate_model
    from sg_opd_trl.tasks import resolve

    rows = _rows(options)
    folder = resolve(options.model)
    loading = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    result = evaluate_model(
        _to_accelerator(AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype, **loading)),
        AutoTokenizer.from_pretrained(folder, **loading),
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
    console = Console()
    console.print(results_table({options.model: result}, f"{options.dataset_name}, {result.num_problems} problems"))
    if options.output is not None:
        console.print(f"Result written to {result.save(Path(options.output))}", markup=False, soft_wrap=True)
    return 0


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
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _rows(options: argparse.Namespace) -> Any:
    from sg_opd_trl.cli.loading import first_rows, load_splits, pick_split
    from sg_opd_trl.data import prepare_dataset

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


def _to_accelerator(model: Any) -> Any:
    """The model on the GPU where there is one."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model if accelerator is None else model.to(accelerator)
