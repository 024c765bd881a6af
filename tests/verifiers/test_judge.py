"""The judging child: restarts, limits, isolation, cache, threads and forks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from repository import PATIENCE

from sg_opd_trl.errors import VerifierError
from sg_opd_trl.verifiers import Judge
from sg_opd_trl.verifiers.judge import Judgement
from sg_opd_trl.verifiers.process import WorkerProcess, worker_environment

HALF = (r"$\frac{1}{2}$", r"\boxed{0.5}")
THIRD = (r"$\frac{1}{3}$", r"\boxed{0.5}")
ENDLESS = ("$5$", r"\boxed{9^{9^{9^{9}}}}")


def start(judge: Judge) -> int:
    """Starts the judge's child and returns its process id."""
    assert judge.verdicts([("$1$", r"\boxed{1}")]) == [True]
    assert judge.worker_pid is not None
    return judge.worker_pid


def signal_soon(pid: int, number: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, number))
    timer.start()
    return timer


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_killed_between_items(judge: Judge) -> None:
    pid = start(judge)
    os.kill(pid, signal.SIGKILL)
    assert judge.verdicts([HALF, THIRD]) == [True, False]
    assert judge.worker_pid != pid


def test_killed_during_an_item_is_tried_once_more() -> None:
    # About 0.5 s of honest work, so that the signal meets the item in progress.
    judge = Judge(time_limit=20.0)
    slow = ("$5$", r"\boxed{" + r"\sqrt{2+" * 150 + "2" + "}" * 150 + "}")
    pid = start(judge)
    timer = signal_soon(pid, signal.SIGKILL, 0.1)
    judgements = judge.judge([slow, HALF])
    timer.join()
    assert [judgement.verdict for judgement in judgements] == [False, True]
    assert judge.worker_pid != pid
    judge.close()


def test_dying_twice_abstains_and_goes_on(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    real = WorkerProcess.replies
    killed: list[int] = []

    def replies(self, requests, wall_limit):  # type: ignore[no-untyped-def]
        if b"$13$" in requests[0]:
            killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return real(self, requests, wall_limit)

    fatal = ("$13$", r"\boxed{13}")
    with monkeypatch.context() as patch:
        patch.setattr(WorkerProcess, "replies", replies)
        assert judge.judge([fatal, HALF]) == [Judgement(None, "crash"), Judgement(True, "", "0.5")]
    assert len(killed) == len(set(killed)) == 2
    assert judge.verdicts([fatal]) == [True]  # A crash is not cached.


def test_processor_time_limit_is_cached(judge: Judge) -> None:
    assert judge.judge([HALF, ENDLESS, THIRD, ENDLESS]) == [
        Judgement(True, "", "0.5"),
        Judgement(None, "timeout"),
        Judgement(False, "", "0.5"),
        Judgement(None, "timeout"),
    ]
    pid = judge.worker_pid
    assert judge.verdicts([ENDLESS]) == [None]
    assert judge.worker_pid == pid  # Not asked again: nothing was killed.


def test_limit_holds_where_the_parent_ignores_the_signal(judge: Judge) -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        assert judge.judge([ENDLESS, HALF]) == [Judgement(None, "timeout"), Judgement(True, "", "0.5")]
    finally:
        signal.signal(signal.SIGPROF, before)


def test_wall_clock_limit_is_not_cached() -> None:
    judge = Judge(time_limit=1.0, wall_limit=1.5)
    pid = start(judge)
    os.kill(pid, signal.SIGSTOP)  # A stopped child uses no processor time.
    begin = time.monotonic()
    assert judge.judge([HALF]) == [Judgement(None, "wall_timeout")]
    assert 1.4 < time.monotonic() - begin < 10
    assert not is_running(pid)
    assert judge.verdicts([HALF]) == [True]
    judge.close()


def test_large_batch_streams_through_full_pipes(judge: Judge) -> None:
    # 1.5 MB of requests, more replies than a pipe holds: a writer that does not read meanwhile would block for ever.
    pairs = [(f"${number}$", rf"\boxed{{{number - number % 2}}}" + " " * 1500) for number in range(1000)]
    assert judge.verdicts(pairs) == [number % 2 == 0 for number in range(1000)]


def test_repeated_answers_are_judged_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    real = WorkerProcess.replies
    asked: list[int] = []

    def replies(self, requests, wall_limit):  # type: ignore[no-untyped-def]
        asked.append(len(requests))
        return real(self, requests, wall_limit)

    monkeypatch.setattr(WorkerProcess, "replies", replies)
    assert judge.verdicts([HALF, THIRD] * 50) == [True, False] * 50
    assert judge.verdicts([THIRD, HALF]) == [False, True]
    assert asked == [1, 2]  # The child's own start, then the two different pairs.


def test_cache_is_bounded_and_drops_the_least_recent() -> None:
    judge = Judge(cache_size=2)
    one, two, three = [(f"${number}$", r"\boxed{1}") for number in (1, 2, 3)]
    assert judge.verdicts([one, two, three]) == [True, False, False]
    assert len(judge._cache) == 2
    judge.verdicts([two])
    judge.verdicts([one])  # Drops three.
    pid = judge.worker_pid
    os.kill(pid or 0, signal.SIGKILL)
    assert judge.verdicts([two, one]) == [False, True]
    assert judge.worker_pid == pid  # Answered from the cache, so the dead child went unnoticed.
    assert judge.verdicts([three]) == [False]
    assert judge.worker_pid != pid
    judge.close()


def test_interrupted_batch_leaves_no_stale_replies(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    start(judge)
    real = WorkerProcess.replies

    def replies(self, requests, wall_limit):  # type: ignore[no-untyped-def]
        yield next(real(self, requests, wall_limit))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkerProcess, "replies", replies)
        with pytest.raises(KeyboardInterrupt):
            judge.verdicts([HALF, THIRD, ("$7$", r"\boxed{7}")])
    assert judge.verdicts([("$8$", r"\boxed{9}"), HALF]) == [False, True]


def test_payloads_leave_no_file(judge: Judge, tmp_path: Path) -> None:
    target = tmp_path / "written"
    path = str(target)
    command = f"open('{path}','w').write('x')"
    shell = f"__import__('os').system('touch {path}')"
    answers = [
        form.replace("CODE", code)
        for code in (command, shell, shell.replace("_", r"\_"))
        for form in (
            r"\boxed{CODE}",
            r"\boxed{\text{CODE}}",
            "the answer is $CODE$",
            "the answer is CODE",
            r"\boxed{\mathrm{CODE}(1)}",
        )
    ]
    pairs = [("$5$", answer) for answer in answers] + [(f"${code}$", r"\boxed{5}") for code in (command, shell)]
    assert True not in judge.verdicts(pairs)
    assert not target.exists()


def test_child_cannot_write_and_sees_no_secret(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "wandb_api_key", "MY_SECRET_X", "DB_PASSWORD", "PYTHONPATH", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "canary")
    for name in ("GITHUB_PASSPHRASE", "PGPASS", "MYSQL_PWD", "GH_PAT", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("https_proxy", "http://me:canary@proxy:3128")
    monkeypatch.setenv("HARMLESS", "kept")
    kept = worker_environment()
    assert not any("canary" in value for value in kept.values())
    assert kept["PATH"] == os.environ["PATH"]
    pid = start(judge)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"canary" not in environment
    assert b"HARMLESS=kept" in environment
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert soft["Max file size"] == "0"
    assert soft["Max address space"] == str(4 << 30)


def test_close_ends_the_child_and_the_judge_stays_usable(judge: Judge) -> None:
    pid = start(judge)
    judge.close()
    assert judge.worker_pid is None
    assert not is_running(pid)
    judge.close()
    assert judge.verdicts([HALF]) == [True]


@pytest.mark.parametrize("ending", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_child_ends_with_its_parent(ending: str) -> None:
    code = (
        "from sg_opd_trl.verifiers import Judge\n"
        "judge = Judge()\n"
        r"judge.verdicts([('$1$', '\\boxed{1}')])" + "\n"
        f"print(judge.worker_pid, flush=True)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_forked_process_uses_a_child_of_its_own(judge: Judge) -> None:
    pid = start(judge)
    judge._lock.acquire()  # As if another thread were judging while this one forks.
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # Ends it, should it wait for the lock.
        right = judge.verdicts([HALF, THIRD]) == [True, False] and judge.worker_pid != pid
        judge.close()
        os._exit(0 if right else 1)
    judge._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judge.verdicts([THIRD, HALF]) == [False, True]
    assert judge.worker_pid == pid


def test_missing_math_verify_is_named(judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    source = Path(sys.modules[WorkerProcess.__module__].__file__ or "").with_name("worker.py").read_text()
    worker.write_text(source.replace("from math_verify import", "from math_verify_absent import"))
    monkeypatch.setattr("sg_opd_trl.verifiers.process._WORKER_FILE", worker)
    with pytest.raises(VerifierError, match="judging process, got: No module named 'math_verify_absent'"):
        judge.verdicts([HALF])
    worker.write_text("raise RuntimeError('broken start')")
    with pytest.raises(VerifierError, match=r"exit status 1(.|\n)*RuntimeError: broken start"):
        judge.verdicts([HALF])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 0}, "`time_limit` must be positive and finite, got 0"),
        ({"time_limit": float("nan")}, "`time_limit` must be positive and finite, got nan"),
        ({"wall_limit": float("inf")}, "`wall_limit` must be positive and finite, got inf"),
        ({"time_limit": 3.0, "wall_limit": 2.0}, "`wall_limit` must be at least time_limit = 3.0, got 2.0"),
        ({"cache_size": 0}, "`cache_size` must be positive"),
    ],
)
def test_limits_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(VerifierError, match=message):
        Judge(**settings)  # type: ignore[arg-type]
