"""The run's verifier: the one reward function whose verdicts are the trust signal for the teacher."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import SGOPDConfigError, VerifierError
from ..trl_seam import is_async_callable
from .calls import reward_arguments


class RunVerifier:
    """Picks the verifier among the reward functions, checks its verdicts and asks it about teacher rollouts.

    Args:
        reward_funcs: of the trainer.
        names: their names, as logged.
        wanted: `verifier_reward_func`; None takes the first.
        binary: whether verdicts must be 1, 0 or None; off where nothing depends on them.
        event_loop: running loop of another thread, where an async verifier is called; None without one.

    Attributes:
        index: of the verifier among the reward functions.
        name: of the verifier.
        function: the verifier itself.
        binary: whether its verdicts must be 1, 0 or None.

    Raises:
        SGOPDConfigError: no reward function has the wanted name, or it is a reward model where verdicts are binary.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Any],
        names: Sequence[str],
        wanted: str | None,
        *,
        binary: bool,
        event_loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if wanted is not None and wanted not in names:
            raise SGOPDConfigError(
                f"`verifier_reward_func` must name one of the reward functions {list(names)}, got {wanted!r}. Its "
                "verdicts gate the teacher. Set it to one of them, or to None for the first."
            )
        self.index = 0 if wanted is None else list(names).index(wanted)
        self.name = names[self.index]
        self.binary = binary
        self._event_loop = event_loop
        self.function: Callable[..., Any] = reward_funcs[self.index]
        self._logged: dict[str, tuple[float, int]] = {}
        if binary and isinstance(self.function, nn.Module):
            raise SGOPDConfigError(
                "`verifier_reward_func` must be a function that answers 1, 0 or None, got the reward model "
                f"{self.name!r}. Its scores have no right and wrong. Put a verifier such as math_reward first, name "
                "it in verifier_reward_func, or set sign_gated_extrapolation=False and teacher_sampling_enable=False."
            )

    def verdicts(self, rewards: Tensor) -> Tensor:
        """The verifier's column of TRL's rewards.

        Args:
            rewards: `(N, reward functions)`, NaN where a function abstained.

        Returns:
            `(N,)`: 1 right, 0 wrong, NaN abstained.

        Raises:
            VerifierError: another value, where verdicts must be binary.
        """
        verdicts = rewards[:, self.index]
        if self.binary:
            bad = ~((verdicts == 0) | (verdicts == 1) | verdicts.isnan())
            if bad.any():
                self._refuse(float(verdicts[bad][0]))
        return verdicts

    def judge(
        self, examples: list[dict], completions: list, completion_ids: list[list[int]], trainer_state: Any
    ) -> list[float | None]:
        """Verdicts on completions that are no student rollouts: 1 right, 0 wrong, None no verdict.

        Nothing of it enters TRL's logs. What the verifier gives to `log_metric` is kept for `take_metrics`; what it
        gives to `log_extra` is left out, since it belongs to the table of the student's completions.

        Args:
            examples: rows of the data set, one per completion.
            completions: as TRL gives them to reward functions: texts, or lists of one message.
            completion_ids: the same as token ids.
            trainer_state: of transformers.

        Raises:
            VerifierError: the wrong number of verdicts, or a value other than 1, 0 and None.
        """
        verdicts = self._call(
            **reward_arguments(
                examples,
                completions,
                completion_ids,
                trainer_state,
                log_extra=_leave_out,
                log_metric=self._keep_metric,
            )
        )
        if len(verdicts) != len(examples):
            raise VerifierError(
                f"`{self.name}` must return one verdict per completion, got {len(verdicts)} for {len(examples)}."
            )
        for verdict in verdicts:
            if verdict is not None and verdict == verdict and verdict not in (0, 1):
                self._refuse(float(verdict))
        return [None if verdict is None or verdict != verdict else float(verdict) for verdict in verdicts]

    def take_metrics(self) -> dict[str, tuple[float, int]]:
        """What the verifier logged in `judge` since this was last called: sum and number of values by name."""
        logged, self._logged = self._logged, {}
        return logged

    def _keep_metric(self, name: str, value: float) -> None:
        # Sums, not values: a command that judges without taking must not grow.
        total, times = self._logged.get(name, (0.0, 0))
        self._logged[name] = total + float(value), times + 1

    def _call(self, **arguments: Any) -> list:
        if not is_async_callable(self.function):
            return self.function(**arguments)
        if self._event_loop is not None:
            # Not asyncio.run: a notebook's thread has a running loop, and sessions belong to the loop they met.
            return asyncio.run_coroutine_threadsafe(self.function(**arguments), self._event_loop).result()
        return asyncio.run(self.function(**arguments))

    def _refuse(self, value: float) -> None:
        raise VerifierError(
            f"`{self.name}` must answer 1 (right), 0 (wrong) or None (no verdict), got {value:g}. Its verdict is the "
            "sign that gates the teacher; nothing was updated. Return 1.0, 0.0 or None, or name another function in "
            "verifier_reward_func."
        )


def _leave_out(column: str, values: list) -> None:
    """Stands in for TRL's `log_extra`, whose columns make a table of the student's completions."""
