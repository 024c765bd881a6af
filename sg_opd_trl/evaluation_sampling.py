"""Sampling and judging for `evaluation`: prompts to token ids, batches of completions, verdicts.

Apart from `evaluation`, because this needs torch and transformers: a report reads results without them.
"""

import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerState

from .data import flat_prompt
from .errors import DataError, SGOPDConfigError, VerifierError
from .evaluation_plan import Decoding, EvaluationPlan, short_hash
from .models.generate import generate_completions
from .models.sampling import END_TOKENS, end_tokens
from .random_state import mixed_seed
from .verifiers.calls import read_completions, reward_arguments


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
    """A model, its tokenizer and how to sample from them.

    Attributes:
        name: what results call the model: the name that was given, else its own.
        base_model: of an adapter, the model that it is on; None for any other.
    """

    model: Any
    processing_class: Any
    name: str
    base_model: str | None
    decoding: Decoding
    chat_template_kwargs: Mapping[str, Any]

    @classmethod
    def build(cls, model: Any, processing_class: Any, plan: EvaluationPlan, name: str | None = None) -> "Sampler":
        """Load what is given by name; keep what is given as an object where and as it is."""
        if isinstance(model, (str, os.PathLike)):
            from .tasks import resolve

            given = os.fspath(model)
            name = name or given
            path = resolve(given)
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(path)
            model = to_accelerator(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
        elif processing_class is None:
            raise SGOPDConfigError(
                "`processing_class` must be the model's tokenizer, got None. A model object does not bring one. Set "
                "`processing_class=AutoTokenizer.from_pretrained(...)`."
            )
        # Here and not above: TRL is large, and a model that is loaded by its name was in none of its trainers.
        from .trl_seam import own_forward

        own_forward(model)
        adapters = active_adapters(model)
        base = _base_name(model)
        own = f"{base} with adapter {' and '.join(adapters)}" if adapters else base
        return cls(
            model, processing_class, name or own, base if adapters else None, plan.decoding, plan.chat_template_kwargs
        )

    def model_hash(self, prompt_ids: Sequence[list[int]]) -> str:
        """A short hash of all that the samples depend on besides problems and settings."""
        digest = hashlib.sha256()
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        for tensor_name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            digest.update(f"{tensor_name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:  # what is offloaded to a disk is known by its shape alone
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return short_hash([digest.hexdigest(), active_adapters(self.model), self.eos_ids, list(prompt_ids)])

    def check(self) -> None:
        """Where completions depend on the prompts beside them, sample prompts of one length at a time, or refuse.

        Raises:
            SGOPDConfigError: what it writes is not what its logits say.
        """
        from .agreement import check_writer

        check_writer(self.model, self.processing_class)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; chats get the template and the generation prompt."""
        return encode_prompt(self.processing_class, prompt, self.chat_template_kwargs)

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a completion."""
        own = self.decoding.generation_kwargs.get(END_TOKENS)
        if own is not None:
            return sorted(end_tokens(own, self.processing_class))
        return end_token_ids(self.model, self.processing_class)

    @property
    def generation_config(self) -> GenerationConfig:
        """Exactly the settings of `decoding`, with the KV cache on unless they say otherwise."""
        sampled = self.decoding.temperature > 0
        settings = {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p, "top_k": 0}
        eos_ids = self.eos_ids
        fixed = {
            "do_sample": sampled,
            "max_new_tokens": self.decoding.max_new_tokens,
            "pad_token_id": self._pad_id(eos_ids),
            "use_cache": True,
        }
        # transformers warns about a temperature beside greedy decoding.
        further = (settings if sampled else {}) | dict(self.decoding.generation_kwargs)
        return GenerationConfig(**(fixed | further | {END_TOKENS: eos_ids or None}))

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
    sampler: Sampler,
    plan: EvaluationPlan,
    prompt_ids: Sequence[list[int]],
    known: Sequence[Sample],
    keep: Callable[[list[Sample]], None],
    progress: bool,
) -> list[Sample]:
    """Samples of all problems, in batches, of which each has random numbers of its own.

    So a batch comes out the same whatever was sampled before it, and those that are known need not be made again.

    Args:
        sampler: whose samples.
        plan: the problems.
        prompt_ids: of each.
        known: samples that an earlier call made.
        keep: is given every new batch as soon as it is judged.
        progress: show a bar.
    """
    batches = batches_of(plan, prompt_ids)
    stored = {(sample.problem, sample.sample): sample for sample in known}
    label = f"Evaluating {os.path.basename(sampler.name.rstrip(os.sep)) or sampler.name}"
    samples: list[Sample] = []
    config = sampler.generation_config
    with (
        _bounded(plan) as reward_func,
        tqdm(
            total=sum(map(len, batches)), desc=label, unit=" completions", disable=not progress, dynamic_ncols=True
        ) as bar,
        _untouched_state(sampler),
    ):
        if len(stored) < sum(map(len, batches)):
            sampler.check()
        for number, batch in enumerate(batches):
            if all(job in stored for job in batch):
                samples += [stored[job] for job in batch]
            else:
                # The first has the seed itself: what fits into one batch is what it was before batches had seeds.
                _seed(sampler.model, mixed_seed(sampler.decoding.seed, number) if number else sampler.decoding.seed)
                completion_ids = sampler.generate([prompt_ids[problem] for problem, _ in batch], config)
                judged = _judge_batch(sampler, plan, reward_func, batch, completion_ids)
                keep(judged)
                samples += judged
            bar.set_postfix_str(_so_far(samples), refresh=False)
            bar.update(len(batch))
    return samples


def batches_of(plan: EvaluationPlan, prompt_ids: Sequence[list[int]]) -> list[list[tuple[int, int]]]:
    """All samples to draw, `(problem, number)`, as they are generated together."""
    # Longest prompts first: prompts of a batch are of like length, and a lack of memory shows at once.
    order = sorted(range(len(plan.rows)), key=lambda problem: -len(prompt_ids[problem]))
    jobs = [(problem, sample) for problem in order for sample in range(plan.num_samples)]
    size = plan.decoding.batch_size
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def whole_batches(plan: EvaluationPlan, prompt_ids: Sequence[list[int]], samples: Sequence[Sample]) -> list[Sample]:
    """The samples of those batches of which all are there; a part of one cannot be gone on with."""
    stored = {(sample.problem, sample.sample): sample for sample in samples}
    whole = (batch for batch in batches_of(plan, prompt_ids) if all(job in stored for job in batch))
    return [stored[job] for batch in whole for job in batch]


def _so_far(samples: Sequence[Sample]) -> str:
    judged = [sample.verdict for sample in samples if sample.verdict is not None]
    right = f"{sum(judged) / len(judged):.1%} right" if judged else "none judged"
    without = len(samples) - len(judged)
    return f"{right}, {without} without a verdict" if without else right


def _judge_batch(
    sampler: Sampler,
    plan: EvaluationPlan,
    reward_func: Callable[..., Any],
    batch: list[tuple[int, int]],
    completion_ids: list[list[int]],
) -> list[Sample]:
    rows = plan.rows
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


@contextmanager
def _bounded(plan: EvaluationPlan) -> Iterator[Callable[..., Any]]:
    """The verifier, in a process of its own where the plan gives it a limit."""
    from .verifiers import math_reward

    functions = [plan.reward_func or math_reward]
    if plan.verifier_timeout is None:
        yield functions[0]
        return
    from .verifiers.bounded import bounded, close  # here: an evaluation does without TRL otherwise

    functions = bounded(functions, plan.verifier_timeout)
    try:
        yield functions[0]
    finally:
        close(functions)


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


def active_adapters(model: Any) -> list[str]:
    """Names of the PEFT adapters that have a say in what the model writes."""
    if not hasattr(model, "peft_config"):
        return []
    # Of a layer it is a flag; a model of transformers has a method of that name.
    off = (module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters"))
    if any(flag is True for flag in off):
        return []
    names = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    return list(names)


def _base_name(model: Any) -> str:
    """What the model itself is called, without its adapters."""
    owner = _generation_owner(model)
    return owner.config.name_or_path or type(owner).__name__


def _devices(model: Any) -> list[torch.device]:
    """Accelerators that hold a part of the model."""
    return list({parameter.device for parameter in model.parameters()} - {torch.device("cpu")})


def _seed(model: Any, seed: int) -> None:
    # torch.manual_seed would seed every device of the machine, also those that are not restored.
    torch.default_generator.manual_seed(seed)
    for device in _devices(model):
        module = torch.get_device_module(device)
        with module.device(device):
            module.manual_seed(seed)


@contextmanager
def _untouched_state(sampler: Sampler) -> Iterator[None]:
    """Evaluation mode inside; afterwards random state and module modes are as before."""
    modes = [(module, module.training) for module in sampler.model.modules()]
    with torch.random.fork_rng(devices=sorted(device.index for device in _devices(sampler.model))):
        try:
            sampler.model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
