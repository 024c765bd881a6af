"""What an evaluation is to do: checked before a model is loaded, and named, so that no file mixes two."""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .data import ends_with_an_answer, is_empty_prompt
from .errors import DataError, SGOPDConfigError

# Raised when the same settings begin to give other samples.
_SAMPLING_VERSION = 2
# Settings that `Decoding` has under these names, and that `generation_kwargs` would set a second time.
_OWN_ARGUMENTS = ("temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled; `generation_kwargs` are further fields of `transformers.GenerationConfig`.

    Raises:
        SGOPDConfigError: if a setting is out of range.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    seed: int
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = (
            ("temperature", (int, float), lambda value: math.isfinite(value) and value >= 0, "a finite number >= 0",
             "It divides the logits. Set it to 0 for greedy decoding."),
            ("top_p", (int, float), lambda value: 0 < value <= 1, "in (0, 1]",
             "It is a share of probability. Set it to 1 for all tokens."),
            ("max_new_tokens", int, lambda value: value >= 1, "at least 1",
             "It bounds a completion. Set it to 1024, say."),
            ("batch_size", int, lambda value: value >= 1, "at least 1",
             "It is generated at once. Set it to 1 to save memory."),
            ("seed", int, lambda value: 0 <= value < 2**63, "at least 0 and below 2^63",
             "It seeds sampling and bootstrap. Set it to 0."),
        )  # fmt: skip
        for name, kind, valid, bound, reason in checks:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
                raise SGOPDConfigError(f"`{name}` must be {bound}, got {value!r}. {reason}")
        if self.generation_kwargs:
            self._check_generation_kwargs()

    def _check_generation_kwargs(self) -> None:
        # Here and not above: results can be read without transformers.
        from .models.sampling import check_generation_kwargs

        for name in _OWN_ARGUMENTS:
            if name in self.generation_kwargs:
                raise SGOPDConfigError(
                    f"`generation_kwargs` must not set {name!r}, got {self.generation_kwargs[name]!r}: it is an "
                    f"argument of its own. Set `{name}`."
                )
        check_generation_kwargs(self.generation_kwargs, use_vllm=False, local_teacher_writes=False)


@dataclass(frozen=True)
class Identity:
    """What samples depend on, in three parts, each as a short hash: equal hashes, equal samples.

    Attributes:
        problems: all rows.
        settings: number of samples, decoding, chat template's arguments, verifier, version of the package.
        model: weights, active adapters and prompts as token ids; None while no model is loaded.
    """

    problems: str
    settings: str
    model: str | None = None

    def differences(self, other: Any) -> list[str]:
        """Which parts another evaluation's identity, as it is in a file, has otherwise; what is not known is equal."""
        if not isinstance(other, Mapping):
            return ["nothing that says whose it is"]
        words = {"problems": "other problems", "settings": "other settings", "model": "another model"}
        own = asdict(self)
        return [said for name, said in words.items() if own[name] is not None and other.get(name) != own[name]]


@dataclass(frozen=True)
class EvaluationPlan:
    """Problems and settings of an evaluation.

    Attributes:
        rows: with `prompt`; other columns go to the verifier.
        decoding: how completions are sampled.
        num_samples: completions per problem.
        k: of pass@k.
        reward_func: verifier; None means `math_reward`.
        chat_template_kwargs: passed on to the chat template.
        verifier_timeout: seconds that a call of the verifier may take; None: without a limit. No part of the identity.
    """

    rows: list[dict[str, Any]]
    decoding: Decoding
    num_samples: int
    k: int
    reward_func: Callable[..., Any] | None
    chat_template_kwargs: Mapping[str, Any]
    verifier_timeout: float | None = None

    @property
    def identity(self) -> Identity:
        """All of it but the model."""
        settings = [
            *(_SAMPLING_VERSION, __version__, asdict(self.decoding), self.num_samples, self.k),
            *(dict(self.chat_template_kwargs), _source(self.reward_func)),
        ]
        return Identity(short_hash(self.rows), short_hash(settings))


def short_hash(value: Any) -> str:
    """Sixteen hexadecimal digits for a value; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_rows(dataset: Any) -> list[dict[str, Any]]:
    """The rows of a data set, checked.

    Raises:
        DataError: no rows, or rows without a prompt that can be answered.
    """
    if isinstance(dataset, Mapping):
        raise DataError(
            f"`dataset` must be one split, got the splits {list(dataset)}. One result belongs to one set of problems. "
            "Set `dataset=dataset[...]` to one of them."
        )
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError("`dataset` must have rows, got none. An accuracy needs problems. Set another split or filter.")
    if "prompt" not in rows[0]:
        raise DataError(
            f"`dataset` must have the column `prompt`, got {sorted(rows[0])}. Completions are sampled from it. "
            "Set it with `dataset.rename_column` or `sg_opd_trl.data.prepare_dataset`."
        )
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise DataError(
                f"the rows of `dataset` must have the same columns, got {sorted(row)} in row {index} and "
                f"{sorted(rows[0])} in row 0. Columns go to the verifier as lists. Set what is missing to None."
            )
        if not isinstance(row["prompt"], (str, list)) or is_empty_prompt(row["prompt"]):
            raise DataError(
                f"`prompt` must be a chat or a string that is not empty, got {row['prompt']!r} in row {index}. There "
                "is nothing to answer. Drop the row with `dataset.filter`."
            )
        if ends_with_an_answer(row["prompt"]):
            raise DataError(
                f"`prompt` must not end with an assistant's message, got one in row {index}. Templates close it, and "
                "the model would answer anew instead of going on with it. Drop the message, or move its text into the "
                "question."
            )
    return rows


def _source(reward_func: Callable[..., Any] | None) -> list[str]:
    """Name of a verifier and, of one that is not this package's, its module's text: a mended one judges otherwise."""
    if reward_func is None:
        from .verifiers import math_reward

        reward_func = math_reward
    # What stands around a function, as a trainer's `verifier_timeout` does, is in another file.
    reward_func = inspect.unwrap(reward_func)
    # A callable object has no name of its own.
    named = reward_func if hasattr(reward_func, "__qualname__") else type(reward_func)
    name = f"{named.__module__}.{named.__qualname__}"
    if named.__module__.startswith(f"{__package__}."):
        return [name]
    try:
        return [name, Path(inspect.getfile(named)).read_text(encoding="utf-8")]
    except (OSError, TypeError):
        return [name]  # written into a session of Python
