"""Sampling and judging for `evaluation`: prompts to token ids, batches of completions, verdicts.

Apart from `evaluation`, because this needs torch and transformers: a report reads results without them.
"""

import inspect
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerState

from .data import flat_prompt
from .errors import DataError, SGOPDConfigError, VerifierError
from .models.generate import generate_completions
from .models.sampling import end_tokens
from .verifiers.calls import read_completions, reward_arguments


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled.

    Raises:
        SGOPDConfigError: if a setting is out of range.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number >= 0",
             "It divides the logits. Set it to 0 for greedy decoding."),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]", "It is a share of probability. Set it to 1 for all tokens."),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1", "It bounds a completion. Set it to 1024, say."),
            ("batch_size", self.batch_size >= 1, "at least 1", "It is generated at once. Set it to 1 to save memory."),
        )  # fmt: skip
        for name, valid, bound, reason in checks:
            if not valid:
                raise SGOPDConfigError(f"`{name}` must be {bound}, got {getattr(self, name)}. {reason}")


@dataclass(frozen=True)
class Sample:
    """One judged completion: `problem` and `sample` count from 0, `verdict` is 1 right, 0 wrong, `None` abstained."""

    problem: int
    sample: int
    prompt: Any
    completion: str
    solution: Any
    verdict: float | None
    num_tokens: int
    truncated: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Sampler:
    """A model, its tokenizer and how to sample from them."""

    model: Any
    processing_class: Any
    name: str
    decoding: Decoding
    chat_template_kwargs: Mapping[str, Any]

    @classmethod
    def build(
        cls, model: Any, processing_class: Any, decoding: Decoding, chat_template_kwargs: Mapping[str, Any]
    ) -> "Sampler":
        """Load what is given by name; keep what is given as an object where and as it is."""
        if isinstance(model, (str, os.PathLike)):
            from .tasks import resolve

            name = os.fspath(model)
            path = resolve(name)
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(path)
            model = to_accelerator(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
        elif processing_class is None:
            raise SGOPDConfigError(
                "`processing_class` must be the model's tokenizer, got None. A model object does not bring one. Set "
                "`processing_class=AutoTokenizer.from_pretrained(...)`."
            )
        else:
            name = model.config.name_or_path or type(model).__name__
        return cls(model, processing_class, name, decoding, chat_template_kwargs)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; chats get the template and the generation prompt."""
        return encode_prompt(self.processing_class, prompt, self.chat_template_kwargs)

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a completion."""
        return end_token_ids(self.model, self.processing_class)

    @property
    def generation_config(self) -> GenerationConfig:
        """Exactly the settings of `decoding`, with the KV cache on."""
        sampled = self.decoding.temperature > 0
        settings = {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p, "top_k": 0}
        eos_ids = self.eos_ids
        return GenerationConfig(
            do_sample=sampled,
            # transformers warns about a temperature beside greedy decoding.
            **(settings if sampled else {}),
            max_new_tokens=self.decoding.max_new_tokens,
            eos_token_id=eos_ids or None,
            pad_token_id=self._pad_id(eos_ids),
            use_cache=True,
        )

    def generate(self, prompt_ids: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        """Completion ids of each prompt, the end-of-sequence id included, padding and prompt not."""
        return generate_completions(self.model, prompt_ids, config, role="model")

    def _pad_id(self, eos_ids: list[int]) -> int:
        """Any id will do: padding is masked on the left and cut off on the right."""
        pad_id = self.processing_class.pad_token_id
        return pad_id if pad_id is not None else next(iter(eos_ids), 0)


def to_accelerator(model: Any) -> Any:
    """The model on the accelerator, where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model if accelerator is None else model.to(accelerator)


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: the generation config's and the tokenizer's, see `end_tokens`."""
    return sorted(end_tokens(_generation_owner(model).generation_config.eos_token_id, tokenizer))


def encode_prompt(processing_class: Any, prompt: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt as TRL's trainers render it; chats get the template and the generation prompt.

    Raises:
        DataError: a chat, and the tokenizer has no chat template.
    """
    prompt = flat_prompt(prompt)
    if isinstance(prompt, str):
        return list(processing_class(text=prompt)["input_ids"])
    if processing_class.chat_template is None:
        raise DataError(
            "`processing_class` must have a chat template, got none. The prompts are chats. Set "
            "`processing_class.chat_template`, or give prompts as strings."
        )
    encoded = processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
    )
    return list(encoded["input_ids"])


def draw_samples(
    sampler: Sampler, rows: list[dict[str, Any]], num_samples: int, reward_func: Callable[..., Any], progress: bool
) -> Generator[Sample, None, None]:
    """Samples of all problems, batch by batch, in the order of `order`."""
    prompt_ids = [sampler.encode(row["prompt"]) for row in rows]
    # Longest prompts first: prompts of a batch are of like length, and a lack of memory shows at once.
    order = sorted(range(len(rows)), key=lambda problem: -len(prompt_ids[problem]))
    jobs = [(problem, sample) for problem in order for sample in range(num_samples)]
    size = sampler.decoding.batch_size
    label = f"Evaluating {os.path.basename(sampler.name.rstrip(os.sep)) or sampler.name}"
    right = done = 0
    config = sampler.generation_config
    with (
        tqdm(total=len(jobs), desc=label, unit=" completions", disable=not progress, dynamic_ncols=True) as bar,
        _untouched_state(sampler),
    ):
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            completion_ids = sampler.generate([prompt_ids[problem] for problem, _ in batch], config)
            samples = _judge_batch(sampler, rows, batch, completion_ids, reward_func)
            right, done = right + sum(sample.verdict == 1.0 for sample in samples), done + len(samples)
            bar.set_postfix_str(f"{right / done:.1%} right", refresh=False)
            bar.update(len(batch))
            yield from samples


def _judge_batch(
    sampler: Sampler,
    rows: list[dict[str, Any]],
    batch: list[tuple[int, int]],
    completion_ids: list[list[int]],
    reward_func: Callable[..., Any],
) -> list[Sample]:
    texts = sampler.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    own = [rows[problem] for problem, _ in batch]
    completions = read_completions(
        sampler.processing_class,
        [row["prompt"] for row in own],
        completion_ids,
        lambda prompts: [sampler.encode(prompt) for prompt in prompts],
    )
    verdicts = _judge(reward_func, own, completions, completion_ids)
    ends = set(sampler.eos_ids)
    return [
        Sample(
            problem=problem,
            sample=sample,
            prompt=rows[problem]["prompt"],
            completion=text,
            solution=rows[problem].get("solution"),
            verdict=verdict,
            num_tokens=len(ids),
            truncated=ids[-1] not in ends,
        )
        for (problem, sample), text, ids, verdict in zip(batch, texts, completion_ids, verdicts, strict=True)
    ]


def _judge(
    reward_func: Callable[..., Any],
    rows: list[dict[str, Any]],
    completions: list[Any],
    completion_ids: list[list[int]],
) -> list[float | None]:
    """Call the verifier as TRL calls reward functions."""
    arguments = reward_arguments(
        rows, completions, completion_ids, TrainerState(), log_extra=_ignore, log_metric=_ignore
    )
    answers = reward_func(**arguments)
    if inspect.isawaitable(answers) or len(answers) != len(rows):
        got = type(answers).__name__ if inspect.isawaitable(answers) else f"{len(answers)} answers"
        raise VerifierError(
            f"`reward_func` must return {len(rows)} verdicts, one per completion, got {got}. Each sample is counted "
            "once. Set it to a plain (not async) function that returns a list."
        )
    return [_verdict(answer) for answer in answers]


def _verdict(answer: Any) -> float | None:
    if answer is None or math.isnan(answer):
        return None
    if float(answer) not in (0.0, 1.0):
        raise VerifierError(
            f"`reward_func` must answer 1 (right), 0 (wrong) or None, got {answer!r}. Accuracy counts right answers. "
            "Set `reward_func` to a verifier, not to a graded reward."
        )
    return float(answer)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's logging callbacks: an evaluation has no training log."""


def _generation_owner(model: Any) -> Any:
    """The model whose generation config `generate` reads: inside a PEFT wrapper it is the base model's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _untouched_state(sampler: Sampler) -> Iterator[None]:
    """Seeds sampling inside; afterwards random state and module modes are as before."""
    modes = [(module, module.training) for module in sampler.model.modules()]
    devices = {parameter.device for parameter in sampler.model.parameters()} - {torch.device("cpu")}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        # torch.manual_seed would seed every device of the machine, also those that are not restored.
        torch.default_generator.manual_seed(sampler.decoding.seed)
        for device in devices:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(sampler.decoding.seed)
        try:
            sampler.model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
