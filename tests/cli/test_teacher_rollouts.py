"""`sg-opd teacher-rollouts`: what it writes is what training asks for, however often it was interrupted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.cli.teacher_rollouts import _parser, _trainer, store_folder
from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.teacher_sampling.stored.cache import RolloutCache
from sg_opd_trl.teacher_sampling.stored.precompute import planned_rollouts, precompute, total_steps
from sg_opd_trl.teacher_sampling.stored.store import open_store

ANCHOR = ("--teacher_sampling_phase1_end_frac", "1.0", "--teacher_sampling_phase2_end_frac", "1.0")
#: Six teacher prompts in two steps.
SIX = (*ANCHOR, "--teacher_sampling_ratio", "0.6")


def rows(folder: Path) -> list[dict]:
    files = sorted(folder.glob("rollouts-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def settings(recipe: Path, *flags: str) -> Any:
    return build_settings(read_command_line(["--config", str(recipe), *flags]))


def test_training_reads_what_was_written_and_generates_nothing(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher-rollouts", "--config", str(tiny_recipe), "--output", str(tmp_path / "store"), *SIX]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    stored = rows(tmp_path / "store")
    tokens = sum(len(row["completion_ids"]) for row in stored)
    assert f"6 teacher rollouts in {tmp_path / 'store'}: 0 were there, 6 written ({tokens} tokens" in said
    assert len(stored) == 6
    assert {row["verdict"] for row in stored} <= {0.0, 1.0, None}
    assert not list((tmp_path / "student").glob("*")), "nothing was trained"

    assert main(words) == 0
    assert "6 were there, 0 written" in " ".join(capsys.readouterr().out.split())
    assert rows(tmp_path / "store") == stored

    recipe = ["--config", str(tiny_recipe), "--report", "false", "--teacher_rollouts_path", str(tmp_path / "store")]
    assert main(["train", *recipe, *SIX]) == 0
    run = json.loads((tmp_path / "student" / "run.json").read_text(encoding="utf-8"))
    assert (run["teacher_tokens_generated"], run["teacher_tokens_reused"]) == (0, tokens)
    assert rows(tmp_path / "store") == stored


def test_the_second_run_of_a_sweep_generates_no_teacher_token_and_both_say_what_they_cost(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--config", str(tiny_recipe), "--report", "false", "--teacher_rollouts_path", str(tmp_path / "store")]
    costs, said = [], []
    for number, lambda_high in enumerate(("1.8", "1.25")):
        folder = tmp_path / f"run{number}"
        words = [*recipe, *SIX, "--lambda_high", lambda_high, "--output_dir", str(folder)]
        assert main(["train", *words]) == 0
        costs.append(json.loads((folder / "run.json").read_text(encoding="utf-8")))
        said.append(" ".join(capsys.readouterr().out.split()))
    first, second = costs
    assert (first["teacher_tokens_reused"], second["teacher_tokens_generated"]) == (0, 0)
    assert second["teacher_tokens_reused"] == first["teacher_tokens_generated"] > 0
    for cost, text in zip(costs, said, strict=True):
        assert f"2 steps in {cost['seconds']:.1f} s; tokens of the teacher: " in text
        generated, reused = cost["teacher_tokens_generated"], cost["teacher_tokens_reused"]
        assert f"scored, {generated} generated, {reused} read from stored rollouts" in text


def test_a_killed_command_goes_on_where_it_stopped(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sg_opd_trl.teachers import LocalTeacher

    generate, calls = LocalTeacher.generate, []

    def killed(self: Any, *arguments: Any) -> list[list[int]]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    words = ["teacher-rollouts", "--config", str(tiny_recipe), "--output", str(tmp_path / "store"), *SIX]
    monkeypatch.setattr(LocalTeacher, "generate", killed)
    assert main([*words, "--batch_size", "2"]) == 130
    before = rows(tmp_path / "store")
    assert len(before) == 4
    assert main([*words, "--batch_size", "2"]) == 0
    assert "4 were there, 2 written" in " ".join(capsys.readouterr().out.split())
    after = rows(tmp_path / "store")
    assert len(after) == 6
    assert all(row in after for row in before)
    assert len({arguments[2] for arguments in calls[:2] + calls[3:]}) == 3, "every batch has a seed of its own"


def _cut(content: bytes, line: int, *, at: float = 0.0, extra: int = 0) -> bytes:
    """What is left up to a share of a line, or some bytes after its beginning."""
    lines = content.splitlines(keepends=True)
    before = b"".join(lines[:line])
    return before + (lines[line][: round(at * len(lines[line])) + extra] if line < len(lines) else b"")


#: Of six rollouts in batches of four and two.
CUTS = {
    "nothing is left": lambda content: b"",
    "one letter is left": lambda content: content[:1],
    "half of the first line": lambda content: _cut(content, 0, at=0.5),
    "the first line, not its end": lambda content: _cut(content, 1)[:-1],
    "between two lines of a batch": lambda content: _cut(content, 2),
    "behind the first letter of a line": lambda content: _cut(content, 3, extra=1),
    "half of the last line of a batch": lambda content: _cut(content, 3, at=0.5),
    "the end of the last line of a batch": lambda content: _cut(content, 4)[:-1],
    "between two batches": lambda content: _cut(content, 4),
    "half a line of the last batch": lambda content: _cut(content, 4, at=0.5),
    "between the lines of the last batch": lambda content: _cut(content, 5),
    "half of the last line": lambda content: _cut(content, 5, at=0.5),
    "the very end": lambda content: content[:-1],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_store_that_was_cut_goes_on_to_the_same_rollouts(
    cut: str, uninterrupted: tuple[Any, bytes, dict], tmp_path: Path
) -> None:
    trainer, content, expected = uninterrupted
    (tmp_path / "rollouts-0.jsonl").write_bytes(CUTS[cut](content))
    assert completed(trainer, tmp_path) == expected


def completed(trainer: Any, folder: Path) -> dict[tuple, list[int]]:
    """All rollouts of the schedule, after what a folder lacks has been written into it."""
    trainer.rollout_cache = RolloutCache(trainer, open_store(str(folder)))
    precompute(trainer, planned_rollouts(trainer), batch_size=4)
    # As the next run reads them.
    return dict(RolloutCache(trainer, open_store(str(folder))).store._rollouts)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> tuple[Any, bytes, dict]:
    """A trainer that only writes rollouts, the file of one that was not interrupted, and what it holds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = _trainer(settings(tiny.recipe(folder), *SIX), folder / "store")
    rollouts = completed(trainer, folder / "store")
    assert len(rollouts) == 6
    (path,) = (folder / "store").glob("rollouts-*.jsonl")
    return trainer, path.read_bytes(), rollouts


def test_the_schedule_is_that_of_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    run = settings(tiny_recipe, *SIX, "--teacher_num_generations", "2")
    trainer = _trainer(run, tmp_path / "store")
    wanted = planned_rollouts(trainer)
    assert len(wanted) == len(set(wanted)) == 12
    assert len(planned_rollouts(trainer, processes=2)) == 24
    assert set(wanted) < set(planned_rollouts(trainer, processes=2))
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 2
    # 12 prompts, two of them in a step.
    assert total_steps(trainer) == 12
    with pytest.raises(SGOPDConfigError, match="`train_processes` must be left out where `max_steps` is not set"):
        planned_rollouts(trainer, processes=2)
    trainer.args.max_steps = 2
    counts = precompute(trainer, wanted, batch_size=5)
    assert (counts.stored, counts.written) == (0, 12)
    assert counts.right <= 12
    trainer.train()
    assert trainer.teacher.tokens_generated == counts.tokens == trainer.rollout_cache.tokens_reused


def test_a_push_uploads_the_folder_beside_the_student(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[tuple] = []

    def push(folder: Path, repo_id: str, *, private: bool | None, token: str | None) -> str:
        pushed.append((folder, repo_id, private, len(rows(folder))))
        return "https://example.org/commit"

    asked = []
    monkeypatch.setattr("sg_opd_trl.hub.make_repository", lambda name, **_: asked.append(name))
    monkeypatch.setattr("sg_opd_trl.cli.teacher_rollouts.push_store", push)
    words = ["--config", str(tiny_recipe), "--push_to_hub", "user/rollouts", "--hub_private_repo", "true", *ANCHOR]
    assert main(["teacher-rollouts", *words]) == 0
    assert pushed == [(tmp_path / "student" / "teacher_rollouts", "user/rollouts", True, 2)]
    assert asked == ["user/rollouts"]
    assert "Pushed: https://example.org/commit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "`output` must be set, got None"),
        (("--teacher_rollouts_path", "user/rollouts"), "teacher_rollouts_path='user/rollouts'"),
        (("--output", "x", "--teacher_sampling_enable", "false"), "`teacher_sampling_enable` must be true"),
        (("--output", "x", "--teacher_sampling_prompts", "share"), "`teacher_sampling_prompts` must be 'reserve'"),
        (("--output", "x", "--batch_size", "0"), "`batch_size` must be at least 1, got 0"),
        (("--output", "x", "--train_processes", "0"), "`train_processes` must be at least 1"),
        (("--output", "x", "--methd", "sft"), "Did you mean `method`?"),
        (("--output", "x", "--batch_size", "many"), "invalid int value: 'many'"),
    ],
)
def test_refused_command_lines(
    tiny_recipe: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher-rollouts", "--config", str(tiny_recipe), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_without_an_anchor_is_refused(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps with the default schedule: phase 1 ends before the first."""
    assert main(["teacher-rollouts", "--config", str(tiny_recipe), "--output", str(tmp_path / "store")]) == 2
    assert "asks for no teacher rollout" in " ".join(capsys.readouterr().err.split())


def test_another_method_is_refused(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny_recipe.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("teacher_model")]
    tiny_recipe.write_text("\n".join(["method: grpo", *lines]), encoding="utf-8")
    assert main(["teacher-rollouts", "--config", str(tiny_recipe), "--output", "x"]) == 2
    assert "`method` must be 'sg_opd', got 'grpo'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (("--output", "a/b"), lambda student: Path("a/b")),
        (("--output", "a", "--teacher_rollouts_path", "./c"), lambda student: Path("a")),
        (("--teacher_rollouts_path", "./c"), lambda student: Path("./c")),
        (("--push_to_hub", "user/set"), lambda student: student / "teacher_rollouts"),
        (("--push_to_hub", "user/set", "--teacher_rollouts_path", "./c"), lambda student: Path("./c")),
        (("--push_to_hub", "user/set", "--teacher_rollouts_path", "user/set"), lambda s: s / "teacher_rollouts"),
    ],
)
def test_where_the_rollouts_go(
    tiny_recipe: Path, tmp_path: Path, flags: tuple[str, ...], folder: Callable[[Path], Path]
) -> None:
    options, rest = _parser().parse_known_args(["--config", str(tiny_recipe), *flags])
    assert store_folder(settings(tiny_recipe, *rest), options) == folder(tmp_path / "student")


def test_the_launcher_starts_the_same_command(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(
        "sg_opd_trl.cli.teacher_rollouts.launch",
        lambda command, words, *, debug, name: seen.append((words, command.launch_flags, name)) or 0,
    )
    words = ["--config", str(tiny_recipe), "--output", "x", "--batch_size", "3", "--max_steps", "4"]
    assert main(["teacher-rollouts", *words, "--multi_gpu", "--num_processes", "2"]) == 0
    ((given, launcher, name),) = seen
    assert given == words
    assert launcher == ["--multi_gpu", "--num_processes", "2"]
    assert name == "teacher-rollouts"
