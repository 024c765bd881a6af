import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import PATIENCE, python_path
from torch.distributed.elastic.multiprocessing.api import SignalException

from sg_opd_trl.cli import launching, main
from sg_opd_trl.cli.launching import check_world_size, find_accelerate_config, launch, launch_words, wants_launch
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.errors import SGOPDConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION", launching.EXPECTED_PROCESSES):
        monkeypatch.delenv(name, raising=False)


def command(tmp_path, text="", *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: 1\n{text}", encoding="utf-8")
    return read_command_line(["--config", str(path), *flags])


def test_only_launcher_keys_ask_for_the_launcher(tmp_path):
    assert not wants_launch(command(tmp_path))
    assert wants_launch(command(tmp_path, "num_processes: 2\n"))
    assert wants_launch(command(tmp_path, "", "--multi_gpu"))
    assert wants_launch(command(tmp_path, "", "--accelerate_config", "ddp"))


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_launched_process_trains_whatever_the_recipe_says(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    assert not wants_launch(command(tmp_path, "num_processes: 2\n"))


def test_launcher_flags_in_a_launched_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SGOPDConfigError, match="must come before"):
        wants_launch(command(tmp_path, "", "--num_processes", "2"))


def test_recipe_keys_become_words_and_flags_come_last(tmp_path):
    words = launch_words(
        command(
            tmp_path,
            "num_processes: 4\nmulti_gpu: true\nuse_fsdp: false\nmixed_precision: 'no'\n",
            "--num_processes",
            "2",
        )
    )
    assert words == [
        *("--num_processes", "4", "--multi_gpu", "--mixed_precision", "no"),
        *("--num_processes", "2"),
    ]


def test_the_flag_for_the_accelerate_configuration_wins(tmp_path):
    words = launch_words(command(tmp_path, "accelerate_config: ddp\n", "--accelerate_config=cpu2"))
    assert words == ["--config_file", str(find_accelerate_config("cpu2"))]


def test_a_list_is_no_launcher_value(tmp_path):
    with pytest.raises(SGOPDConfigError, match="`gpu_ids` must be a single value"):
        launch_words(command(tmp_path, "gpu_ids: [0, 1]\n"))


def test_accelerate_configurations_are_found_by_path_by_our_name_and_by_trls(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("num_processes: 1\n", encoding="utf-8")
    assert find_accelerate_config(str(path)) == path
    assert find_accelerate_config("zero2") == ROOT / "recipes" / "accelerate_configs" / "zero2.yaml"
    assert find_accelerate_config("fsdp1").parts[-2:] == ("accelerate_configs", "fsdp1.yaml")
    with pytest.raises(SGOPDConfigError, match=r"'zeroo2'.*`zero2`"):
        find_accelerate_config("zeroo2")


def test_the_module_is_launched_with_the_runs_own_words(tmp_path, monkeypatch):
    seen = {}

    def record(arguments):
        seen.update(vars(arguments), expected=os.environ[launching.EXPECTED_PROCESSES])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", record)
    status = main(["train", "--accelerate_config", "cpu2", "--max_steps", "3", "--report", "false"])
    assert status == 0
    assert (seen["module"], seen["training_script"]) == (True, "sg_opd_trl.cli")
    assert seen["training_script_args"] == ["train", "--max_steps", "3", "--report", "false"]
    assert seen["expected"] == "2"
    assert launching.EXPECTED_PROCESSES not in os.environ


def test_the_status_of_a_failed_process_is_handed_on(tmp_path, monkeypatch):
    def fail(arguments):
        raise subprocess.CalledProcessError(returncode=7, cmd=["x"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert launch(command(tmp_path, "num_processes: 1\n"), [], debug=False) == 7


def test_a_launcher_that_is_asked_to_end_does_so_without_a_traceback(tmp_path, monkeypatch):
    def end(arguments):
        raise SignalException("got signal 15", signal.SIGTERM)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", end)
    assert launch(command(tmp_path, "num_processes: 1\n"), [], debug=False) == 143


def test_signals_mean_what_they_meant_once_a_launcher_has_ended(tmp_path, monkeypatch):
    def leave_a_handler(arguments):
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", leave_a_handler)
    launch(command(tmp_path, "num_processes: 1\n"), [], debug=False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_fewer_processes_than_asked_for_are_refused(monkeypatch):
    check_world_size(1)
    monkeypatch.setenv(launching.EXPECTED_PROCESSES, "2")
    check_world_size(2)
    with pytest.raises(SGOPDConfigError, match="got 2 while 1 runs"):
        check_world_size(1)


def test_processes_of_torchrun_that_would_train_alone_are_refused(monkeypatch):
    """Without an accelerator and without use_cpu there is no group of them."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(SGOPDConfigError, match=r"`use_cpu` must be true for processes.*got 2 of them"):
        check_world_size(1)


def test_processes_that_do_not_find_each_other_are_told_where_they_looked(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting")

    monkeypatch.setattr("sg_opd_trl.cli.arguments.RunParser.parse_args_into_dataclasses", fail)
    with pytest.raises(SGOPDConfigError, match=r"did not find each other: process 1 of 2.*node-a:29500.*GLOO_SOCKET"):
        build_settings(command(tmp_path))


def run(words, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(ROOT)}
    variables |= environment
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


LAUNCHES = {
    "in process": ["-m", "sg_opd_trl.cli", "train"],
    "relaunched": ["-m", "sg_opd_trl.cli", "train", "--accelerate_config", "cpu2"],
    "accelerate launch": [
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "0", "-m", "sg_opd_trl.cli", "train"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", LAUNCHES)
def test_an_unknown_key_fails_in_every_way_to_launch(tmp_path, way):
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "arithmetic" / "sg_opd.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace("lambda_high:", "lamda_high:"), encoding="utf-8")
    by_recipe = run([*LAUNCHES[way], "--config", str(recipe)])
    by_flag = run([*LAUNCHES[way], "--max_stepz", "3"])
    for outcome, wrong, right in ((by_recipe, "lamda_high", "lambda_high"), (by_flag, "max_stepz", "max_steps")):
        assert outcome.returncode != 0
        assert f"Unknown key `{wrong}`" in outcome.stderr
        assert f"Did you mean `{right}`?" in outcome.stderr
    assert str(recipe) in by_recipe.stderr.replace("\n", "")
    if way == "accelerate launch":
        assert "Error on rank 1" in by_recipe.stderr


@pytest.mark.slow
def test_one_cpu_process_instead_of_two_is_an_error():
    outcome = run(["-m", "sg_opd_trl.cli", "train", "--cpu", "--num_processes", "2", "--use_cpu", "true"])
    assert outcome.returncode == 2
    assert "got 2 while 1 runs" in outcome.stderr


def test_our_two_cpu_processes_are_what_accelerate_takes_for_two():
    config = yaml.safe_load(find_accelerate_config("cpu2").read_text(encoding="utf-8"))
    assert config["distributed_type"] == "MULTI_GPU"
    assert config["num_processes"] == 2
