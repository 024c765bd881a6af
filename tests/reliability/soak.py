"""Kill a run at random moments, start it again by the same command, and hold its student against an undisturbed one.

    python tests/reliability/soak.py alone|ranks|served --output_dir FOLDER [--steps 300] [--every 20] [--seed 0]

`alone` is one process, `ranks` two of them over gloo, `served` one whose teacher is a server of its own, which is
killed as well. Every `--every` seconds of running time, at a random moment of them, all its processes get SIGKILL. The
last line is JSON; the status is 0 if the students are equal in every bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from repository import ROOT, python_path
from teachers.fake_server import FakeServer
from tiny import same_saved_student
from two_ranks import FLAGS

from sg_opd_trl.tasks import resolve

MODES = ("alone", "ranks", "served")
# The built-in recipe in steps short enough that a life of twenty seconds gets somewhere.
SETTINGS = {
    **{"per_device_train_batch_size": 64, "max_completion_length": 32, "logging_steps": 50, "report": "false"},
    **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "resume_from_checkpoint": "true"},
}


def command(mode: str, folder: Path, steps: int, url: str | None) -> list[str]:
    """The one command that starts the run and goes on with it."""
    settings = SETTINGS | {"max_steps": steps, "output_dir": folder}
    if mode == "ranks":
        settings["per_device_train_batch_size"] = SETTINGS["per_device_train_batch_size"] // 2
    if url is not None:
        # Long enough for a server that comes back.
        settings |= {
            "teacher_model_server_url": url,
            "teacher_model_name_or_path": "null",
            "teacher_request_timeout": 60,
        }
    recipe = ROOT / "recipes" / "arithmetic" / "sg_opd.yaml"
    words = [sys.executable, "-m", "sg_opd_trl.cli", "train", *(FLAGS if mode == "ranks" else ())]
    return [*words, "--config", str(recipe), *(f"--{name}={value}" for name, value in settings.items())]


def started(words: list[str], log: Path) -> subprocess.Popen:
    """In a process group of its own, so that an interrupted soak does not interrupt it."""
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT, ROOT / "tests")}
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | threads, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a launcher and its ranks, which have sessions of their own, and no time in between."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    _, alive = psutil.wait_procs(tree, timeout=10)
    if alive:
        raise RuntimeError(f"These processes outlive SIGKILL: {alive}.")


# --- the served teacher ----------------------------------------------------------------------------------------------
def serve(port: int) -> None:
    """The built-in teacher behind the protocol of vLLM, until somebody kills the process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("builtin/arithmetic-teacher")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def logps(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [rows[0].tolist(), *rows[:-1].tolist()]

    def complete(ids: list[int], request: dict) -> list[int]:
        generator, written = torch.Generator().manual_seed(request["seed"]), list[int]()
        while len(written) < request["max_tokens"] and not set(written) & set(request["stop_token_ids"]):
            with torch.no_grad():
                logits = model(torch.tensor([ids + written])).logits[0, -1].float()
            for token, bias in request.get("logit_bias", {}).items():
                logits[int(token)] += bias
            written.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        return written

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    server = FakeServer(logps=logps, complete=complete, tokenize=tokenize)
    server.port = port
    server.start()
    signal.pause()


class Teacher:
    """The server's process; nothing for runs that have none."""

    def __init__(self, mode: str, log: Path) -> None:
        self.log, self.process = log, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}" if mode == "served" else None

    def start(self) -> None:
        if self.url is not None and self.process is None:
            self.process = started([sys.executable, __file__, "serve", "--port", str(self.port)], self.log)
            self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        raise TimeoutError(f"The teacher did not start; see {self.log}.")

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)
            self.process = None


# --- the soak --------------------------------------------------------------------------------------------------------
def moments(every: float, seed: int) -> Iterator[float]:
    """Seconds of running time at which to kill: a random moment of each span."""
    chance, span = random.Random(seed), 0
    while True:
        yield (span + chance.random()) * every
        span += 1


def undisturbed(mode: str, folder: Path, steps: int, teacher: Teacher) -> float:
    """Seconds that the run takes."""
    teacher.start()
    since = time.monotonic()
    process = started(command(mode, folder, steps, teacher.url), folder.with_suffix(".log"))
    if process.wait():
        raise RuntimeError(f"The undisturbed run failed; see {folder.with_suffix('.log')}.")
    return time.monotonic() - since


def soaked(mode: str, folder: Path, steps: int, teacher: Teacher, every: float, seed: int) -> dict:
    """Kill and start again until the command ends by itself."""
    log, ran, kills, teacher_kills = folder.with_suffix(".log"), 0.0, 0, 0
    for moment in moments(every, seed):
        teacher.start()
        since = time.monotonic()
        process = started(command(mode, folder, steps, teacher.url), log)
        while True:
            try:
                status = process.wait(timeout=max(0.0, moment - ran - (time.monotonic() - since)))
            except subprocess.TimeoutExpired:
                status = None
            # The teacher goes alone at every other kill: the run has to wait for it.
            if status is not None or teacher.process is None or teacher_kills > kills:
                break
            teacher.kill()
            teacher_kills += 1
            teacher.start()
            moment += every / 2
        ran += time.monotonic() - since
        if status is None:
            kill(process)
            kills += 1
        elif status:
            raise RuntimeError(f"The run ended with status {status}; see {log}.")
        else:
            return {"kills": kills, "teacher_kills": teacher_kills, "running_seconds": round(ran)}
    raise AssertionError("moments never end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=(*MODES, "serve"))
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.mode == "serve":
        serve(options.port)
        return 0
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        # A finished run would only say so, and two old students would be compared.
        parser.error(f"--output_dir must be a new folder, got {str(options.output_dir)!r}, which has files.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    whole, cut = options.output_dir / "undisturbed", options.output_dir / "killed"
    teacher = Teacher(options.mode, options.output_dir / "teacher.log")
    try:
        seconds = undisturbed(options.mode, whole, options.steps, teacher)
        outcome = soaked(options.mode, cut, options.steps, teacher, options.every, options.seed)
    finally:
        teacher.kill()
    same = same_saved_student(whole, cut)
    facts = {"mode": options.mode, "steps": options.steps, "undisturbed_seconds": round(seconds)}
    sys.stdout.write(json.dumps(facts | outcome | {"same_student": same}) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
