"""Reward functions of the caller's in processes of their own: limits, ends, what goes in and what comes out."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reward_functions as functions
from repository import PATIENCE, python_path
from transformers import TrainerState

from sg_opd_trl.data import required_columns
from sg_opd_trl.errors import VerifierError
from sg_opd_trl.inspection.verifier import gold_column
from sg_opd_trl.verifiers import bounded as module
from sg_opd_trl.verifiers import exact_match_reward, math_reward
from sg_opd_trl.verifiers.bounded import BoundedFunction, bounded, close
from sg_opd_trl.verifiers.child import ChildSilent

AMPLE, SHORT = 300.0, 0.5  # seconds
MANY = 100  # seconds in which a busy machine has ended a call with a short limit


@pytest.fixture
def bound() -> Iterator[Callable[..., BoundedFunction]]:
    made: list[BoundedFunction] = []

    def make(function: Any, limit: float = AMPLE) -> BoundedFunction:
        (one,) = bounded(function, limit)
        assert isinstance(one, BoundedFunction)
        made.append(one)
        return one

    yield make
    close(made)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(functions.FOLDER, str(tmp_path))
    return tmp_path


def call(function: Any, completions: list | None = None, **arguments: Any) -> Any:
    completions = ["one", "three"] if completions is None else completions
    state = TrainerState(global_step=3)
    return function(completions=completions, **{"completion_ids": [[1]], "trainer_state": state, **arguments})


def pid_of(function: BoundedFunction) -> int:
    assert function._process is not None
    return function._process._child.pid


def is_there(pid: int) -> bool:
    """Running, or a zombie that nobody asks for its status."""
    return Path(f"/proc/{pid}").exists()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def silence(words: str, *_: Any) -> Any:
    raise ChildSilent(words)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MANY
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


# --- what goes in and what comes out ---------------------------------------------------------------------------------
def test_it_is_called_like_the_function_itself(bound: Any, capfd: pytest.CaptureFixture) -> None:
    logged: list[tuple] = []
    function = bound(functions.talkative)
    answer = call(
        *(function, [[{"role": "assistant", "content": "x"}], "three"]),
        log_extra=lambda *values: logged.append(("extra", *values)),
        log_metric=lambda *values, **named: logged.append(("metric", *values, *named.values())),
        prompts=["p", "q"],
        solution=[{"a": 1}, None],
    )
    assert answer == [1.0, 1.0]
    seen = {"completion_ids": [[1]], "trainer_state": 3, "prompts": ["p", "q"], "solution": [{"a": 1}, None]}
    assert logged == [
        ("metric", "rewards/talkative/unanswered", 0.0),
        ("extra", "length", [1, 5]),
        ("metric", "mine/number", 0.25),
        ("metric", "mine/number", 0.75),
        ("extra", "seen", [repr(seen)] * 2),
    ]
    # What it prints reaches nobody's protocol.
    assert call(function) == [1.0, 1.0]
    printed = capfd.readouterr().err
    assert printed.count("a verdict 2\n") == printed.count("past Python\n") == 2


def test_it_is_taken_for_the_function_itself(bound: Any) -> None:
    function = bound(functions.thresholded)
    assert function.__name__ == "thresholded"
    assert required_columns([function]) == ["threshold"]
    assert gold_column(function) == "threshold"
    assert bound(functools.partial(functions.thresholded, threshold=3)).__name__ == "thresholded"
    assert bound(function, 7.0).limit == 7.0
    assert bound(function, 7.0).__wrapped__ is functions.thresholded


def test_one_process_serves_many_calls_from_any_thread(bound: Any) -> None:
    function = bound(functions.sleeps_on_asking)
    call(function)
    pid, answers = pid_of(function), []
    threads = [threading.Thread(target=lambda n=n: answers.append(call(function, ["x"] * n))) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, answers)) == [1, 2, 3, 4, 5]
    assert pid_of(function) == pid


def test_large_batches_stream_through_full_pipes(bound: Any) -> None:
    completions = ["x" * 100_000] * 100
    assert call(bound(functions.talkative), completions) == [1.0] * 100


def test_what_is_random_depends_on_the_batch_alone(bound: Any) -> None:
    first, second = bound(functions.draws), bound(functions.draws)
    drawn = call(first, completion_ids=[[1, 2]])
    call(first, completion_ids=[[5]])
    assert call(first, completion_ids=[[1, 2]]) == drawn == call(second, completion_ids=[[1, 2]])
    assert call(first, completion_ids=[[5]]) != drawn


def test_values_that_cannot_be_sent_are_named(bound: Any) -> None:
    with pytest.raises(VerifierError, match=r"`verifier_timeout` must be None.*\['lock'\] for `parity`.*Leave such"):
        call(bound(functions.parity), lock=[threading.Lock()])


def test_an_answer_that_cannot_be_sent_is_told(bound: Any) -> None:
    with pytest.raises(TypeError, match="what it returned or logged cannot be sent on"):
        call(bound(functions.answers_a_function))


def test_environments_stay_with_the_training(bound: Any, caplog: pytest.LogCaptureFixture) -> None:
    function = bound(functions.talkative)
    for _ in range(2):
        call(function, environments=[object()])
    assert [record.getMessage() for record in caplog.records if "environments" in record.getMessage()] == [
        "`talkative` is not given `environments`, as it runs in a process of its own (`verifier_timeout`). Name the "
        "parameter in its signature to have it stay with them."
    ]


# --- secrets ---------------------------------------------------------------------------------------------------------
def test_no_secret_is_in_its_environment(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD", "github_pat"]
    for name in secrets:
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("SOME_PROXY", "http://user:canary@host")
    monkeypatch.setenv("HARMLESS", "value")
    seen = call(bound(functions.environment))[0]
    assert "canary" not in repr(seen)
    # Nothing else is different: threads, hash seed and paths are those of the run.
    kept = {name: value for name, value in os.environ.items() if "canary" not in value}
    assert kept.items() - seen.items() == {(n, v) for n, v in kept.items() if n not in seen}
    assert seen["HARMLESS"] == "value"
    assert seen["PATH"] == os.environ["PATH"]


def test_it_imports_from_where_the_run_does(bound: Any) -> None:
    seen = call(bound(functions.path))[0]
    assert seen == [os.path.abspath(entry) for entry in sys.path]


# --- functions that do not answer ------------------------------------------------------------------------------------
@pytest.mark.parametrize("hanging", [functions.sleeps, functions.holds_the_interpreter])
def test_one_that_never_answers_has_no_verdict(hanging: Any, bound: Any, caplog: pytest.LogCaptureFixture) -> None:
    logged: list[tuple] = []
    function = bound(hanging, SHORT)
    start = time.monotonic()
    for _ in range(2):
        assert call(function, log_metric=lambda *values: logged.append(values)) == [None, None]
    assert SHORT < time.monotonic() - start < MANY
    assert function._process is None
    assert logged == [(f"rewards/{hanging.__name__}/unanswered", 2.0)] * 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"`{hanging.__name__}` took longer than `verifier_timeout`, 0.5 seconds (File " in message
    assert f" in {hanging.__name__}), and was killed, after 3 finished steps. The completions of this" in message


def test_it_is_killed_with_all_that_it_has_started(bound: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    stop = module._FunctionProcess.stop
    monkeypatch.setattr(module._FunctionProcess, "stop", lambda self: (killed.append(self._child.pid), stop(self))[1])
    assert call(bound(functions.starts_others, 5.0)) == [None, None]
    other = int((folder / "other.pid").read_text(encoding="utf-8"))
    assert len(killed) == 1
    assert not is_there(killed[0])
    wait_until(lambda: not is_running(other))


def test_the_next_call_starts_anew(bound: Any) -> None:
    function = bound(functions.sleeps_on_asking, 5.0)
    assert call(function) == [1.0, 1.0]
    pid = pid_of(function)
    assert call(function, ["sleep"]) == [None]
    assert not is_there(pid)
    assert call(function) == [1.0, 1.0]
    assert pid_of(function) != pid


def test_columns_of_the_table_stay_of_one_length(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function, columns = bound(functions.talkative), []
    call(function)
    monkeypatch.setattr(function, "_asked_once", functools.partial(silence, ""))
    call(function, log_extra=lambda *values: columns.append(values))
    assert columns == [("length", [None, None]), ("seen", [None, None])]


def test_after_five_calls_in_a_row_without_an_answer_the_run_ends(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = bound(functions.sleeps_on_asking, SHORT)
    ask = function._asked_once
    silent = functools.partial(silence, "")
    monkeypatch.setattr(function, "_asked_once", silent)
    for _ in range(4):
        assert call(function, ["sleep"]) == [None]
    monkeypatch.setattr(function, "limit", AMPLE)
    monkeypatch.setattr(function, "_asked_once", ask)
    assert call(function) == [1.0, 1.0]  # One answer, and the count begins anew.
    monkeypatch.setattr(function, "limit", SHORT)
    monkeypatch.setattr(function, "_asked_once", silent)
    for _ in range(4):
        assert call(function, ["sleep"]) == [None]
    monkeypatch.setattr(function, "_asked_once", ask)
    with pytest.raises(VerifierError, match=r"took longer than `verifier_timeout`, 0.5 seconds.*5 in a row.*Mend"):
        call(function, ["sleep"])


def test_one_that_dies_is_asked_once_more(bound: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert call(bound(functions.dies_once)) == [1.0, 1.0]
    assert (folder / "died").exists()
    assert caplog.records == []


def test_one_that_dies_twice_has_no_verdict(bound: Any, caplog: pytest.LogCaptureFixture) -> None:
    function = bound(functions.dies)
    for _ in range(2):
        assert call(function) == [None, None]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "`dies` ended its process twice, with exit status 7, after 3 finished steps." in message


def test_one_that_was_killed_between_calls_is_started_again(bound: Any) -> None:
    function = bound(functions.sleeps_on_asking)
    call(function)
    os.kill(pid_of(function), signal.SIGKILL)
    assert call(function) == [1.0, 1.0]


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, SystemExit])
def test_what_it_raises_is_raised_here(kind: type[BaseException], bound: Any) -> None:
    function = bound(functions.raises)
    with pytest.raises(kind) as caught:
        call(function, error=[kind.__name__])
    assert caught.value.args == ((3,) if kind is SystemExit else ("in the function",))
    (note,) = caught.value.__notes__
    assert "Raised by `raises` in a process of its own (`verifier_timeout`), whose environment has no" in note
    assert "reward_functions.py" in note
    assert "function_worker.py" not in note


def test_an_error_that_cannot_be_sent_is_told_by_its_words(bound: Any) -> None:
    with pytest.raises(VerifierError, match="`raises` ended in TwoPartError: one, two"):
        call(bound(functions.raises), error=["TwoPartError"])


def test_a_module_that_cannot_be_imported_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: Any
) -> None:
    source = "import os\nos.environ['SERVICE_API_KEY']\ndef judge(completions, **_):\n    return [1.0]\n"
    (tmp_path / "needs_a_key.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SERVICE_API_KEY", "canary")
    import needs_a_key

    with pytest.raises(VerifierError, match=r"`judge` must be importable(.|\n)*KeyError: 'SERVICE_API_KEY'") as caught:
        call(bound(needs_a_key.judge))
    assert "canary" not in str(caught.value)
    assert "set verifier_timeout to None" in str(caught.value)


# --- what stays ------------------------------------------------------------------------------------------------------
def closure() -> Callable[..., Any]:
    own = [1.0]

    def inner(completions: list, **_: Any) -> list[float]:
        return own * len(completions)

    return inner


def of_a_script() -> Callable[..., Any]:
    """As it would be in a script or a notebook, whose main module has it."""
    main = sys.modules["__main__"]
    exec("def in_a_script(completions, **_): return [1.0]", vars(main))
    return main.in_a_script


STAYING: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a lambda": (lambda: lambda completions, **_: [1.0], "<lambda>", "cannot be found by its name"),
    "a closure": (closure, "inner", "cannot be found by its name"),
    "of a script": (of_a_script, "in_a_script", "in a script or a notebook"),
    "async": (lambda: functions.asynchronous, "asynchronous", "async"),
    "environments": (lambda: functions.with_environments, "with_environments", "asks for `environments`"),
    "an object": (functions.Counting, "Counting", "state of its own (Counting)"),
    "a method": (lambda: functions.Counting().judge, "judge", "state of its own"),
    "a partial": (lambda: functools.partial(functions.parity, a=functions.Counting()), "parity", "state of its own"),
}


@pytest.mark.parametrize("case", STAYING)
def test_what_cannot_be_moved_stays_with_a_warning(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, name, reason = STAYING[case]
    function = make()
    assert bounded([function], 30.0) == [function]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"`verifier_timeout=30` does not bound `{name}`: ")
    assert reason in message
    assert "Put it into a module of its own" in message


@pytest.mark.parametrize(
    "function",
    [
        functions.parity,
        functools.partial(functions.thresholded, threshold=3),
        functions.cached,
        functions.Stateless(),
    ],
    ids=["a function", "a partial", "a cached one", "an object like any other"],
)
def test_what_can_be_moved_is(function: Any, bound: Any, caplog: pytest.LogCaptureFixture) -> None:
    moved = bound(function)
    if function is not functions.cached:  # which takes no lists
        assert call(moved) == call(function)
        assert pid_of(moved) != os.getpid()
    assert caplog.records == []


def test_what_has_limits_of_its_own_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    model = torch.nn.Linear(1, 1)
    given = [math_reward, functools.partial(exact_match_reward, a=1), model, "a/reward-model"]
    assert bounded(given, 30.0) == given
    assert bounded(functions.parity, None) is functions.parity
    assert bounded(None, 30.0) is None
    assert caplog.records == []


# --- the ends of both sides ------------------------------------------------------------------------------------------
def test_a_waiting_call_can_be_interrupted(bound: Any) -> None:
    function = bound(functions.sleeps_on_asking)
    call(function)
    pid = pid_of(function)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call(function, ["sleep"])
    timer.join()
    assert not is_there(pid)
    assert call(function) == [1.0, 1.0]  # Not the answer to what was interrupted.


def test_it_ends_with_whoever_refers_to_it() -> None:
    (function,) = bounded(functions.parity, AMPLE)
    call(function)
    pid = pid_of(function)
    del function
    gc.collect()
    assert not is_there(pid)


def test_a_fork_has_a_process_of_its_own(bound: Any) -> None:
    function = bound(functions.sleeps_on_asking)
    call(function)
    pid = pid_of(function)
    function._lock.acquire()  # As if another thread were calling while this one forks.
    child = os.fork()
    if child == 0:
        signal.alarm(MANY)  # Ends it, should it wait for the lock.
        right = call(function) == [1.0, 1.0] and pid_of(function) != pid
        function.close()
        os._exit(0 if right else 1)
    function._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call(function) == [1.0, 1.0]
    assert pid_of(function) == pid


SCRIPT = """
import os, sys, threading, time
import reward_functions
from sg_opd_trl.verifiers.bounded import bounded

print("started", flush=True)
(judge,) = bounded(reward_functions.sleeps_on_asking, 300.0)
print(judge(completions=["x"]), judge._process._child.pid, flush=True)
if sys.argv[1] == "hang":
    if os.fork() == 0:  # as a data loader does: it must not keep the pipes open
        os.close(1)
        time.sleep(600)
    judge(completions=["sleep"])
"""


def start_script(folder: Path, action: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": python_path(Path(functions.__file__).parent)}
    return subprocess.Popen(
        [sys.executable, str(script), action],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    process = start_script(tmp_path, "leave")
    lines = process.communicate(timeout=PATIENCE)[0].splitlines()
    assert process.returncode == 0
    assert lines[0] == "started"
    assert lines[1].startswith("[1.0] ")
    assert len(lines) == 2
    assert not is_there(int(lines[1].split()[-1]))


@pytest.mark.slow
def test_it_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    process = start_script(tmp_path, "hang")
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "started\n"
        pid = int(process.stdout.readline().split()[-1])
        time.sleep(0.5)
        assert is_running(pid)
        process.kill()
        process.wait()
        wait_until(lambda: not is_running(pid))
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the fork
        process.stdout.close()
