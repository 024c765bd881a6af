"""The Hub, whose failures cost a run nothing but the push.

A run asks for its repository before it does anything that takes long, and pushes last. What the Hub does not take in
between, a checkpoint, is a warning; what it does not take at the end is one message with the command that pushes
again. Where a trainer of transformers pushes is in `trl_seam.py`.
"""

import logging
import shlex
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from .errors import PushError, SGOPDConfigError
from .scrubbing import shown

logger = logging.getLogger(__name__)

NOT_PUSHED = ("checkpoint-*", "*-in-progress/*", "skipped_steps/*", "_*")
"""Patterns of what a folder holds beside the student: for going on, for looking into a fault, for this machine."""


def reach_hub(args: Any, name: str | None = None, *, repo_type: str | None = None) -> None:
    """Make the repository of a run that is to be pushed, before anything that takes long or costs money.

    Args:
        args: configuration of a trainer; all processes must call it.
        name: of the repository, if that is not the run's.
        repo_type: None is a model's.

    Raises:
        SGOPDConfigError: the Hub cannot be reached or refuses it; says which. On every process.
    """
    if not args.push_to_hub and name is None:
        return
    outcome: list[Any] = [None]
    if args.process_index == 0:
        name = name or args.hub_model_id or Path(str(args.output_dir)).absolute().name
        try:
            make_repository(name, private=args.hub_private_repo, token=args.hub_token, repo_type=repo_type)
        except SGOPDConfigError as error:
            outcome[0] = error
    # The others would wait for the one that has ended.
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def make_repository(name: str, *, private: bool | None, token: str | None, repo_type: str | None = None) -> None:
    """Make a repository where there is none, which asks the Hub whether it takes a push.

    Raises:
        SGOPDConfigError: the Hub cannot be reached or refuses it; says which.
    """
    try:
        made = huggingface_hub.HfApi(token=token).create_repo(
            name, private=private, repo_type=repo_type, exist_ok=True
        )
    except Exception as error:
        raise unusable(error) from error
    check_may_write(made.repo_id, token=token, repo_type=repo_type)


def check_may_write(repository: str, *, token: str | None, repo_type: str | None = None) -> None:
    """Refuse a token that may only read: a repository that is there already, `create_repo` takes for made.

    Raises:
        SGOPDConfigError: the Hub says so. A Hub that cannot be asked that way is taken at its push.
    """
    try:
        huggingface_hub.HfApi(token=token).auth_check(repository, repo_type=repo_type, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise unusable(error) from error
    except Exception as error:  # noqa: BLE001  # whatever it is, the push will tell
        logger.info("Whether %s may be written to could not be asked: %s.", repository, _words(error))


def upload_run(repository: str, args: Any) -> str:
    """Upload the folder of a run; the address of the commit."""
    commit = huggingface_hub.HfApi(token=args.hub_token).upload_folder(
        repo_id=repository,
        folder_path=args.output_dir,
        commit_message="End of training",
        revision=args.hub_revision,
        ignore_patterns=list(NOT_PUSHED),
    )
    return str(commit.commit_url)


def not_pushed(repository: str, args: Any, error: Exception) -> PushError:
    """What failed, where the student of a run is, and the command that pushes it."""
    command = push_command(repository, str(args.output_dir), revision=args.hub_revision, exclude=NOT_PUSHED)
    return push_error(f"the student, its card and its report are in {args.output_dir}", command, error)


def push_error(kept: str, command: str, error: Exception) -> PushError:
    """The message for a push that failed.

    Args:
        kept: what is where, as a clause.
        command: that pushes again.
        error: of the Hub or its client.
    """
    return PushError(
        f"`push_to_hub` must reach a Hub that takes what is pushed, got {_words(error)}. {_reason(error)} Nothing is "
        f"lost: {kept}. Push again with\n  {command}\n"
        "with a token that may write in HF_TOKEN, or after `hf auth login`."
    )


def push_command(
    repository: str,
    folder: str,
    *,
    revision: str | None = None,
    repo_type: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> str:
    """The command line that pushes a folder, its patterns as for `HfApi.upload_folder`."""
    words = ["hf", "upload"]
    words += ["--type", repo_type] if repo_type is not None else []
    words += ["--revision", revision] if revision is not None else []
    # Each pattern has a flag of its own.
    words += [word for pattern in include for word in ("--include", pattern)]
    words += [word for pattern in exclude for word in ("--exclude", pattern)]
    # A name may begin with a hyphen.
    return shlex.join([*words, "--", repository, folder, "."])


def unusable(error: Exception) -> SGOPDConfigError:
    """The message for a Hub that takes nothing; says whether it is not there or does not want to."""
    return SGOPDConfigError(
        f"`push_to_hub` must find a Hub that takes `hub_model_id`, got {_words(error)}. {_reason(error)} Or set "
        "push_to_hub=False, and push the folder afterwards with `hf upload`."
    )


def is_of_the_hub(error: Exception) -> bool:
    """Whether an error comes from the Hub or its client."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(str(frame.f_globals.get("__name__", "")).startswith("huggingface_hub.") for frame in frames)


def _words(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{f': {shown(first)}' if first else ''}".rstrip(". ")


def _reason(error: Exception) -> str:
    """What a failure of the Hub is, and the way out."""
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is not asked, as HF_HUB_OFFLINE is set. Unset it."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return (
            f"The Hub answers {status}: it does not let this token write there. Set a token that may in HF_TOKEN, or "
            "log in with `hf auth login`, and look whose `hub_model_id` is."
        )
    if status is not None and status >= 500:
        return f"The Hub answers {status}: the fault is on its side. Try again later."
    if status is not None:
        return f"The Hub answers {status}. Correct `hub_model_id` or `hub_revision`."
    if isinstance(error, ValueError):
        return "Correct `hub_model_id`, `hub_revision` or the token."
    return "The Hub does not answer. Look at the network, and at HF_ENDPOINT if it is set."


def tell_if_failed(job: Any) -> None:
    """Warn of a push in the background that has failed."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        tell_of_a_checkpoint(error)


def tell_of_a_checkpoint(error: BaseException) -> None:
    """Warn of a checkpoint that the Hub did not take."""
    logger.warning("A checkpoint was not pushed; it is in its folder, and training goes on: %s.", _words(error))
