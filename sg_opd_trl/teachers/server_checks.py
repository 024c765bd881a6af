"""What a teacher server must be able to do, asked of it before the first step."""

import logging
import math
from typing import TYPE_CHECKING, Any

from ..data import TEACHER_PROMPT, first_prompts
from ..errors import SGOPDConfigError, TeacherError
from .remote.answers import SequenceScores
from .remote.refusals import TOO_MANY_LOGPROBS, RefusedRequest
from .remote.settings import temperature_problem
from .server_sampling import check_generation_kwargs

if TYPE_CHECKING:
    from .server import ServerTeacher

logger = logging.getLogger(__name__)

ADVISED_DEAD_ZONE = 0.05
"""`gate_dead_zone` that keeps the numerical noise of a bfloat16 server away from the gate's signs (our choice)."""

_PROMPT_TOKENS, _SAMPLED_IDS = 32, 32
_WITH_SUPPORT = ("topk_logits", "asymmetric")
# Largest sum of probabilities that rounding explains.
_WHOLE = 1.001
# Replicas of one model differ by the noise of its dtype, other models by nats (our choice).
_SAME_MODEL = 0.2


def check_server(teacher: "ServerTeacher", trainer: Any, tokenizer: Any) -> None:
    """Connect, and compare settings, model, tokenizer and context with what the trainer will ask for.

    Raises:
        SGOPDConfigError: a setting that a server cannot serve.
        TeacherError: a server that does not answer, or has another model or tokenizer.
    """
    args = trainer.args
    if trainer.temperature != 1:
        raise SGOPDConfigError(temperature_problem(trainer.temperature))
    if args.teacher_sampling_enable:
        check_generation_kwargs(args.generation_kwargs or {})
    teacher.client.connect(teacher.expected)
    prompts = _first_prompts(trainer)
    _check_context(teacher, trainer, prompts)
    probe = _probe_ids(trainer.tokenizer, prompts[0])
    top = args.support_size if args.distillation_mode in _WITH_SUPPORT else 1
    _check_scores(teacher, _probe(teacher, probe, top))
    told = _check_tokenizer(teacher, trainer.tokenizer, probe)
    if not told and tokenizer is None:
        logger.warning(
            "That the teacher server %s has the student's tokenizer is taken on trust: it does not tell. Set "
            "`teacher_model_name_or_path` to the teacher's folder or Hub id, or pass `teacher_processing_class`.",
            teacher.client.replicas[0].address,
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


def _first_prompts(trainer: Any) -> list[list[int]]:
    """Token ids of some prompts as the teacher will read them."""
    if trainer.environment_factories is not None:
        return [list(trainer.tokenizer.get_vocab().values())[:_PROMPT_TOKENS]]
    return trainer.tokenize_prompts(first_prompts(trainer.train_dataset, TEACHER_PROMPT))


def _check_context(teacher: "ServerTeacher", trainer: Any, prompts: list[list[int]]) -> None:
    args = trainer.args
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
        if error.kind != TOO_MANY_LOGPROBS:
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
    for replica, scores in zip(teacher.client.replicas[1:], others, strict=True):
        apart = [abs(left - right) for left, right in zip(first.logps, scores.logps, strict=True)]
        if sum(apart) / len(apart) > _SAME_MODEL:
            raise TeacherError(
                f"The replicas in `teacher_model_server_url` must serve one model, got log-probs of the same tokens "
                f"that differ by {sum(apart) / len(apart):.2g} nats on average between "
                f"{teacher.client.replicas[0].address} and {replica.address}. Rows would be taught by either. Start "
                "both with the same weights."
            )


def _check_tokenizer(teacher: "ServerTeacher", tokenizer: Any, probe: list[int]) -> bool:
    """Compare what both make of one text; False where a server does not tell."""
    text = tokenizer.decode(probe)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = teacher.client.tokenize(text)
    for replica, theirs in zip(teacher.client.replicas, answers, strict=True):
        if theirs is None or theirs == own:
            continue
        pairs = enumerate(zip(own, theirs, strict=False))
        at = next((i for i, (left, right) in pairs if left != right), min(len(own), len(theirs)))
        raise TeacherError(
            f"The teacher server's tokenizer must be the student's, got other ids for the same text at "
            f"{replica.address} (student and teacher): {own[at : at + 4]} and {theirs[at : at + 4]} from token {at} "
            "on. Log-probs of the same id would belong to different tokens. Serve a teacher of the student's family."
        )
    return all(answer is not None for answer in answers)
