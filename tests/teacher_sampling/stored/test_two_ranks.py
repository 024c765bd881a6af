"""Two ranks share a folder: a file each, nothing generated twice, and a process alone reads what they wrote."""

import json
import subprocess
from pathlib import Path

import pytest
from two_ranks import FLAGS, launch, run_module

from . import two_ranks_script as script

pytestmark = pytest.mark.slow


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    succeed(launch(script.__file__, str(output)))
    return output


def test_the_second_run_of_two_ranks_generates_nothing_and_trains_the_same(folder: Path) -> None:
    first, second = json.loads((folder / "results.json").read_text())
    assert first["world"] == second["world"] == 2
    assert min(first["generated"]) > 0
    assert second["generated"] == [0, 0]
    assert sorted(second["reused"]) == sorted(first["generated"])
    assert first["misses"] == second["hits"] == [6.0, 6.0]
    assert first["hits"] == second["misses"] == [0.0, 0.0]
    assert max(first["anchor"]) > 0
    assert (second["loss"], second["anchor"]) == (first["loss"], first["anchor"])


def test_each_rank_wrote_a_file_of_its_own(folder: Path) -> None:
    files = sorted((folder / "cache").glob("rollouts-*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(files) == 2
    assert len({(tuple(line["prompt_ids"]), line["sample"]) for line in lines}) == len(lines) == 12
    assert len(list((folder / "cache" / "contexts").iterdir())) == 1


def test_one_process_reads_what_two_wrote(folder: Path) -> None:
    alone = script.one_run(folder, 4)
    assert (alone["world"], alone["generated"]) == (1, [0])
    assert alone["hits"] == [6.0, 6.0]


def test_the_command_writes_with_two_processes_what_training_with_two_asks_for(tmp_path: Path) -> None:
    from tiny import save_pair, tiny_data

    student, teacher = save_pair(tmp_path / "student", 0), save_pair(tmp_path / "teacher", 1)
    tiny_data().to_json(tmp_path / "train.jsonl")
    recipe = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "teacher_rollouts_path": str(tmp_path / "store"),
        "reward_funcs": "exact_match_reward",
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report": False,
        "disable_tqdm": True,
        "dtype": "float32",
        **script.SETTINGS,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    config = ["--config", str(tmp_path / "recipe.yaml"), *FLAGS]
    succeed(run_module("sg_opd_trl.cli", "teacher-rollouts", *config, "--batch_size", "2"))
    lines = [line for path in (tmp_path / "store").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 12
    succeed(run_module("sg_opd_trl.cli", "train", *config))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["teacher_tokens_generated"] == 0
    assert run["teacher_tokens_reused"] > 0
