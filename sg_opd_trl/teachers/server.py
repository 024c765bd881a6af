"""A teacher behind vLLM's OpenAI-compatible HTTP API, and what is checked when it is bound to a run."""

import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..data import TEACHER_PROMPT, first_prompts
from ..errors import SGOPDConfigError, TeacherError
from ..models.batch import TokenBatch
from ..models.generate import cut_after_eos
from ..models.head import OutputHead
from ..models.sampling import END_TOKENS
from ..random_state import mixed_seed
from ..run import Run
from ..setting import AUTO
from .answers import RefusedRequest, SequenceScores
from .base import HiddenScores, Sampling, SupportScores
from .client import CompletionsClient
from .fit import first_difference
from .http import RequestLimits
from .local import check_ids
from .urls import (
    ADVISED_DEAD_ZONE,
    MAX_RETRIES,
    TIMEOUT,
    api_key,
    dead_zone_problem,
    read_servers,
    temperature_problem,
)

logger = logging.getLogger(__name__)

# How much more is asked for where some of the likeliest tokens are ids that another model lacks (our choice).
_WIDER = 4


class ServerTeacher:
    """A teacher that one or more vLLM servers run.

    Token ids are exchanged, never text. The scores are those of temperature 1, the only one that vLLM has for given
    tokens. Requests run at the same time; each is tried again, or goes to another replica, until its time is over.
    What will be asked can be begun ahead of time, see `PrefetchingTeacher`.

    Args:
        url: of the server, or of several with the same model.
        model: name, path or Hub id of the model; default: the only one served.
        timeout: seconds that a request may take, its retries included.
        max_retries: how often a request that failed everywhere is sent again.
        concurrency: requests of this process to a server at a time.
        headers: of every request; default: the key in SG_OPD_TEACHER_API_KEY as a bearer token, if it is set.

    Attributes:
        tokens_scored: completion tokens scored so far by this process.
        tokens_generated: tokens generated so far by this process.

    Raises:
        SGOPDConfigError: a URL that is none, or one with credentials, a header or key that HTTP cannot send, or limits
            out of range.
    """

    role = "teacher"
    #: What it can serve: a server sends log-probs, of the likeliest tokens too, but no hidden states.
    distillation_modes = frozenset({"sampled_token", "topk_logits", "asymmetric"})

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float = TIMEOUT,
        max_retries: int = MAX_RETRIES,
        concurrency: int = 64,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        servers = read_servers(url)
        if isinstance(servers, dict):
            raise SGOPDConfigError(
                "ServerTeacher must be given the URLs of one teacher, got a mapping. Each `teacher_id` has a teacher "
                "of its own. Pass {name: ServerTeacher(url), ...} as `teacher_model`."
            )
        if headers is None:
            key = api_key()
            headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = CompletionsClient(servers, RequestLimits(timeout, max_retries, concurrency), headers)
        self.expected = model
        self.vocab_size = 0
        self.identity: dict = {"name": model, "root": None, "fingerprint": None}
        self.tokens_scored = 0
        self.tokens_generated = 0

    def bind(self, run: Run, tokenizer: Any) -> None:
        """Connect, and check that the servers can do what the run will ask.

        Args:
            run: whose settings and data they must fit.
            tokenizer: the teacher's, where it is known.

        Raises:
            SGOPDConfigError: a setting that a server cannot serve.
            TeacherError: a server that does not answer, or has another model or tokenizer.
        """
        self.vocab_size = max(run.tokenizer.get_vocab().values()) + 1
        check_server(self, run, tokenizer)
        self.identity = {
            "name": self.client.model,
            "root": self.client.root,
            "revision": run.args.teacher_model_revision,
            "dtype": _served_dtype(run),
            "fingerprint": None,
        }

    # --- scoring -------------------------------------------------------------------------------------------------
    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Log-probs of the completions' own tokens, see `Teacher.score`; the server sizes its batches itself."""
        return self._score(batch, rows, 0, self.vocab_size).logps

    def score_support(
        self, batch: TokenBatch, rows: Tensor, max_tokens: int, size: int, vocab_size: int
    ) -> SupportScores:
        """The likeliest tokens of each position and their log-probs, see `Teacher.score_support`."""
        return self._score(batch, rows, size, vocab_size)

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        """Refused: see `distillation_modes`.

        Raises:
            SGOPDConfigError: always.
        """
        raise _no_hidden_states()

    def output_heads(self) -> list[OutputHead]:
        """Refused: see `distillation_modes`.

        Raises:
            SGOPDConfigError: always.
        """
        raise _no_hidden_states()

    def prefetch_scores(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        size: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Begin what `score` or `score_support` will return, see `PrefetchingTeacher`."""
        pairs = [
            (prompt + completion, len(prompt)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        # What cannot be sent is an error of `score`.
        known = [pair for pair in pairs if max(pair[0]) < self.vocab_size and self._has_room(pair[0])]
        limit = self.vocab_size if vocab_size is None else vocab_size
        self.client.prefetch_scores([ids for ids, _ in known], [first for _, first in known], size, limit)

    def drop_prefetched_scores(self) -> None:
        """Stop scores that were begun and nobody asked for."""
        self.client.drop_scores()

    def _score(self, batch: TokenBatch, rows: Tensor, size: int, vocab_size: int) -> SupportScores:
        check_ids(batch, rows, self.vocab_size, self.role)
        chosen = (rows & batch.completion_mask.bool().any(dim=1)).nonzero().flatten().tolist()
        prompts = [_tokens(batch.prompt_ids, batch.prompt_mask, row) for row in chosen]
        completions = [_tokens(batch.completion_ids, batch.completion_mask, row) for row in chosen]
        sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        self._check_lengths(sequences)
        found = self._found(sequences, [len(prompt) for prompt in prompts], size, vocab_size)
        width = batch.completion_ids.shape
        logps = torch.zeros(width, dtype=torch.float32)
        ids = torch.zeros(*width, size, dtype=torch.long)
        support = torch.zeros(*width, size, dtype=torch.float32)
        for row, scores in zip(chosen, found, strict=True):
            counted = batch.completion_mask[row].bool().cpu()
            logps[row, counted] = torch.tensor(scores.logps, dtype=torch.float32)
            if size:
                pairs = torch.tensor(scores.support, dtype=torch.float64)
                support[row, counted], ids[row, counted] = pairs[..., 0].float(), pairs[..., 1].long()
        self.tokens_scored += sum(map(len, completions))
        device = batch.completion_ids.device
        return SupportScores(logps.to(device), ids.to(device), support.to(device))

    def _found(
        self, sequences: list[list[int]], firsts: list[int], size: int, vocab_size: int
    ) -> list[SequenceScores]:
        """The servers' scores; where ids that another model lacks are among the likeliest, more are asked for."""
        found = self.client.score(sequences, firsts, size, vocab_size)
        short = [i for i, scores in enumerate(found) if any(len(ids) < size for ids in scores.support)]
        if short:
            wider = self.client.score(
                [sequences[i] for i in short], [firsts[i] for i in short], _WIDER * size, vocab_size
            )
            for i, scores in zip(short, wider, strict=True):
                found[i] = scores._replace(support=[ids[:size] for ids in scores.support])
                if any(len(ids) < size for ids in found[i].support):
                    raise TeacherError(
                        f"The teacher server must know {size} likeliest tokens that all models have at each position, "
                        f"got fewer among {_WIDER * size}. The others are ids that some model lacks. Lower "
                        "`distillation_topk`, or set distillation_mode='sampled_token'."
                    )
        return found

    def _check_lengths(self, sequences: list[list[int]], new_tokens: int = 1) -> None:
        longest = max(sequences, key=len, default=[])
        if self.client.max_length is not None and not self._has_room(longest, new_tokens):
            raise too_long(len(longest) + new_tokens, self.client.max_length)

    def _has_room(self, ids: list[int], new_tokens: int = 1) -> bool:
        return self.client.max_length is None or len(ids) + new_tokens <= self.client.max_length

    # --- generating ----------------------------------------------------------------------------------------------
    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """One completion per prompt, see `Teacher.generate`.

        Each has a seed of its own, made of `seed`, its prompt and how often that prompt came before: neither the
        order of arrival nor the other prompts change it.
        """
        written = self.client.generate(prompts, self._settings(prompts, sampling, seed))
        completions = [self._usable(cut_after_eos(ids, sampling.eos_token_ids)) for ids in written]
        self.tokens_generated += sum(map(len, written))
        return completions

    def prefetch_rollouts(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> None:
        """Begin what `generate` will return, see `PrefetchingTeacher`."""
        self.client.drop_completions()
        # What cannot be sent is an error of `generate`.
        with suppress(SGOPDConfigError):
            self.client.prefetch_completions(prompts, self._settings(prompts, sampling, seed))

    def stop_generating(self) -> None:
        """Stop what was begun, and close the connections that are not used; scoring opens what it needs."""
        self.client.drop_completions()
        self.client.close()

    def drop_prefetched(self) -> None:
        """Stop what was begun and nobody asked for."""
        self.client.drop_completions()
        self.client.drop_scores()

    def _settings(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[dict[str, Any]]:
        """What is asked of the server for each prompt."""
        settings = request_settings(sampling, self.vocab_size)
        self._check_lengths(prompts, settings["max_tokens"])
        return [settings | {"seed": one} for one in _seeds(prompts, seed)]

    def _usable(self, ids: list[int]) -> list[int]:
        """The completion up to an id that the student's tokenizer does not have."""
        end = next((i for i, token in enumerate(ids) if token >= self.vocab_size), len(ids))
        if end < len(ids):
            logger.warning(
                "A rollout of the teacher server is cut after %d of %d tokens: the next is none of the student's.",
                end,
                len(ids),
            )
        return ids[:end]


def _served_dtype(run: Run) -> str:
    """What `sg-opd serve-teacher` serves in, as a server does not tell: the teacher's own, else the student's."""
    args: Any = run.args  # its JSON strings are dictionaries by now
    given = (args.teacher_model_init_kwargs or {}).get("dtype")
    return str(given or run.model.dtype).removeprefix("torch.")


def _no_hidden_states() -> SGOPDConfigError:
    return SGOPDConfigError(
        "`distillation_mode='full_logits'` is not supported with a teacher server: it sends no hidden states. Set "
        "distillation_mode='topk_logits'."
    )


def _tokens(ids: Tensor, mask: Tensor, row: int) -> list[int]:
    return ids[row][mask[row] != 0].tolist()


def _seeds(prompts: Sequence[list[int]], seed: int) -> Iterator[int]:
    seen: Counter = Counter()
    for prompt in prompts:
        name = repr(prompt)
        yield mixed_seed(seed, zlib.crc32(name.encode()), seen[name])
        seen[name] += 1


# --- how a server samples --------------------------------------------------------------------------------------------
# Fields of `transformers.GenerationConfig` -> those of a request.
_REQUEST_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_SUPPRESSED = "suppress_tokens"
# A logit this much lower is never drawn; vLLM takes none beyond.
_NEVER = -100.0


def request_settings(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """The sampling settings of a completion request.

    Every one that a server has a default for is there: it may have taken its own from the model's files.

    Args:
        sampling: how the student samples.
        vocab_size: ids from here on cannot be named to the server.

    Raises:
        SGOPDConfigError: a field of `generation_kwargs` that vLLM has nothing for.
    """
    given = dict(sampling.generation_kwargs)
    check_generation_kwargs(given)
    given.pop(END_TOKENS, None)
    suppressed = given.pop(_SUPPRESSED, None) or ()
    settings = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.eos_token_ids),
        # The teacher's own end tokens end nothing: the student's do.
        "ignore_eos": True,
    }
    settings |= {_REQUEST_FIELDS[name]: value for name, value in given.items()}
    settings["min_p"] = settings["min_p"] or 0.0
    bias = {str(token): _NEVER for token in suppressed if token < vocab_size}
    return settings | ({"logit_bias": bias} if bias else {})


def check_generation_kwargs(given: Mapping[str, Any]) -> None:
    """Refuse fields that a server would not sample by.

    Raises:
        SGOPDConfigError: names them.
    """
    # End tokens are a field of `Sampling` itself.
    odd = sorted(given.keys() - _REQUEST_FIELDS.keys() - {_SUPPRESSED, END_TOKENS})
    if odd:
        raise SGOPDConfigError(
            f"`generation_kwargs` must hold {', '.join([*_REQUEST_FIELDS, _SUPPRESSED])} and nothing else with a "
            f"teacher server that generates, got {odd}. The teacher samples as the student does, and vLLM has no such "
            "setting. Leave them out, or set teacher_sampling_enable=False."
        )


# --- checked when it is bound ----------------------------------------------------------------------------------------
# The first request: so many tokens of a real prompt, and so many ids from all over the vocabulary (our choice).
_PROMPT_TOKENS, _SAMPLED_IDS = 32, 32
# The values of `distillation_mode` that ask for the likeliest tokens.
_WITH_SUPPORT = ("topk_logits", "asymmetric")
# Largest sum of probabilities that rounding explains.
_WHOLE = 1.001
# Replicas of one model differ by the noise of its dtype, other models by nats (our choice).
_SAME_MODEL = 0.2


def check_server(teacher: "ServerTeacher", run: Run, tokenizer: Any) -> None:
    """Connect, and compare settings, model, tokenizer and context with what the run will ask for.

    Raises:
        SGOPDConfigError: a setting that a server cannot serve.
        TeacherError: a server that does not answer, or has another model or tokenizer.
    """
    args: Any = run.args  # its JSON strings are dictionaries by now
    if run.temperature != 1:
        raise SGOPDConfigError(temperature_problem(run.temperature))
    if args.sign_gated_extrapolation and args.gate_dead_zone == AUTO:
        raise SGOPDConfigError(dead_zone_problem())
    if args.teacher_sampling_enable:
        check_generation_kwargs(args.generation_kwargs or {})
    teacher.client.connect(teacher.expected)
    prompts = _first_prompts(run)
    _check_context(teacher, run, prompts)
    probe = _probe_ids(run.tokenizer, prompts[0])
    top = args.support_size if args.distillation_mode in _WITH_SUPPORT else 1
    _check_scores(teacher, _probe(teacher, probe, top))
    told = _check_tokenizer(teacher, run.tokenizer, probe)
    if not told and tokenizer is None:
        logger.warning(
            "That the teacher server %s has the student's tokenizer is taken on trust: it does not tell. Set "
            "`teacher_model_name_or_path` to the teacher's folder or Hub id, or pass `teacher_processing_class`.",
            teacher.client.addresses[0],
        )
    if args.sign_gated_extrapolation and args.gate_dead_zone < ADVISED_DEAD_ZONE:
        logger.warning(
            "`gate_dead_zone`=%g is below the numerical noise of a teacher server in bfloat16, where about %g keeps "
            "signs that are noise out of the gate. Set it so unless the server and the student run in float32.",
            args.gate_dead_zone,
            ADVISED_DEAD_ZONE,
        )


def too_long(needed: int, allowed: int) -> SGOPDConfigError:
    """The message for sequences that the server's context has no room for."""
    return SGOPDConfigError(
        f"The teacher server must take {needed} tokens (prompt, completion and the one that scoring adds), got "
        f"{allowed} as its longest. It would refuse the request. Start it with --max-model-len {needed} or more, or "
        "lower `max_completion_length` or `max_prompt_tokens`."
    )


def _first_prompts(run: Run) -> list[list[int]]:
    """Token ids of some prompts as the teacher will read them."""
    # An environment writes its own prompts, which nobody knows yet: any tokens do.
    if run.environment_factories is not None:
        return [list(run.tokenizer.get_vocab().values())[:_PROMPT_TOKENS]]
    return run.tokenize_prompts(first_prompts(run.train_dataset, TEACHER_PROMPT))


def _check_context(teacher: "ServerTeacher", run: Run, prompts: list[list[int]]) -> None:
    args = run.args
    written = args.teacher_completion_length if args.teacher_sampling_enable else 0
    needed = max(map(len, prompts)) + max((args.max_completion_length or 0) + 1, written)
    if teacher.client.max_length is not None and needed > teacher.client.max_length:
        raise too_long(needed, teacher.client.max_length)


def _probe_ids(tokenizer: Any, prompt: list[int]) -> list[int]:
    """The beginning of a real prompt, then ids from all over the vocabulary, its last one among them."""
    known = sorted(tokenizer.get_vocab().values())
    step = max(1, len(known) // _SAMPLED_IDS)
    return [*prompt[:_PROMPT_TOKENS], *known[::step], known[-1]]


def _probe(teacher: "ServerTeacher", ids: list[int], top: int) -> list[SequenceScores]:
    try:
        return teacher.client.probe(ids, top)
    except RefusedRequest as error:
        if not error.too_many_logprobs:
            raise
        raise SGOPDConfigError(
            f"`distillation_topk` must not exceed the log-probs that the teacher server allows at a position, got "
            f"{top}. It refused the first request. Start it with --max-logprobs -1, as `sg-opd serve-teacher` does, "
            "or lower distillation_topk."
        ) from None


def _check_scores(teacher: "ServerTeacher", found: list[SequenceScores]) -> None:
    """Log-probs that are a distribution's, and replicas that agree."""
    first, *others = found
    whole = max((sum(math.exp(logp) for logp, _ in entries) for entries in first.support), default=0.0)
    if whole > _WHOLE:
        raise TeacherError(
            f"The teacher server must send log-probs, got values whose probabilities add up to {whole:.3g}. It seems "
            "to send logits. Start it with --logprobs-mode processed_logprobs."
        )
    for address, scores in zip(teacher.client.addresses[1:], others, strict=True):
        apart = [abs(left - right) for left, right in zip(first.logps, scores.logps, strict=True)]
        if sum(apart) / len(apart) > _SAME_MODEL:
            raise TeacherError(
                f"The replicas in `teacher_model_server_url` must serve one model, got log-probs of the same tokens "
                f"that differ by {sum(apart) / len(apart):.2g} nats on average between "
                f"{teacher.client.addresses[0]} and {address}. Rows would be taught by either. Start "
                "both with the same weights."
            )


def _check_tokenizer(teacher: "ServerTeacher", tokenizer: Any, probe: list[int]) -> bool:
    """Compare what both make of one text; False where a server does not tell. What it sent is not shown."""
    text = tokenizer.decode(probe)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = teacher.client.tokenize(text)
    for address, theirs in zip(teacher.client.addresses, answers, strict=True):
        if theirs is None or theirs == own:
            continue
        at = first_difference(own, theirs)
        raise TeacherError(
            f"The teacher server's tokenizer must be the student's, got other ids for the same text at "
            f"{address} from token {at} on, where the student has {own[at : at + 4]}. Log-probs of the same "
            "id would belong to different tokens. Serve a teacher of the student's family."
        )
    return all(answer is not None for answer in answers)
