"""A teacher behind vLLM's OpenAI-compatible HTTP API."""

import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..dealing import mixed_seed
from ..errors import SGOPDConfigError, TeacherError
from ..generation import cut_after_eos
from ..heads import OutputHead
from ..scoring import TokenBatch
from .base import HiddenScores, Sampling, SupportScores
from .model_scoring import check_ids
from .remote import CompletionsClient, RequestLimits, read_servers
from .remote.answers import SequenceScores
from .remote.settings import MAX_RETRIES, TIMEOUT, api_key
from .server_checks import check_server, too_long
from .server_sampling import request_settings

logger = logging.getLogger(__name__)

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

    def bind(self, trainer: Any, tokenizer: Any) -> None:
        """Connect, and check that the servers can do what the trainer will ask.

        Args:
            trainer: whose settings and data they must fit.
            tokenizer: the teacher's, where it is known.

        Raises:
            SGOPDConfigError: a setting that a server cannot serve.
            TeacherError: a server that does not answer, or has another model or tokenizer.
        """
        self.vocab_size = max(trainer.tokenizer.get_vocab().values()) + 1
        check_server(self, trainer, tokenizer)
        self.identity = {
            "name": self.client.model,
            "root": self.client.root,
            "revision": trainer.args.teacher_model_revision,
            "dtype": _served_dtype(trainer),
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
        """Stop scores that were begun and not asked for."""
        self.client.drop_scores()

    def _score(self, batch: TokenBatch, rows: Tensor, size: int, vocab_size: int) -> SupportScores:
        check_ids(batch, rows, self.vocab_size, self.role)
        chosen = (rows & batch.completion_mask.bool().any(dim=1)).nonzero().flatten().tolist()
        prompts = [_tokens(batch.prompt_ids, batch.prompt_mask, row) for row in chosen]
        completions = [_tokens(batch.completion_ids, batch.completion_mask, row) for row in chosen]
        sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        self._check_lengths(sequences)
        found = self._ask(sequences, [len(prompt) for prompt in prompts], size, vocab_size)
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

    def _ask(self, sequences: list[list[int]], firsts: list[int], size: int, vocab_size: int) -> list[SequenceScores]:
        """Scores; where ids that another model lacks took places among the likeliest, asked again for more."""
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
        """Stop what was begun and not asked for."""
        self.client.drop_completions()
        self.client.drop_scores()

    def _settings(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[dict[str, Any]]:
        """What is asked of the server for each prompt."""
        settings = request_settings(sampling, self.vocab_size)
        self._check_lengths(prompts, settings["max_tokens"])
        return [settings | {"seed": one} for one in _seeds(prompts, seed)]

    def _usable(self, ids: list[int]) -> list[int]:
        """The completion up to an id that the student's tokenizer does not have."""
        end = next((place for place, token in enumerate(ids) if token >= self.vocab_size), len(ids))
        if end < len(ids):
            logger.warning(
                "A rollout of the teacher server is cut after %d of %d tokens: id %d is no token of the student's.",
                end,
                len(ids),
                ids[end],
            )
        return ids[:end]


def _served_dtype(trainer: Any) -> str:
    """What `sg-opd serve-teacher` serves in, as a server does not tell: the teacher's own, else the student's."""
    given = (trainer.args.teacher_model_init_kwargs or {}).get("dtype")
    return str(given or trainer.model.dtype).removeprefix("torch.")


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
