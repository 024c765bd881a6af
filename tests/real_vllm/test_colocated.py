"""The student's rollouts from vLLM in the training process, whose weights follow the student's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from real_vllm.serving import NEEDS_VLLM

pytestmark = NEEDS_VLLM

VARIABLES = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "VLLM_PLUGINS": "cpu_unpacked",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.mark.parametrize("use_peft", ["false", "true"], ids=["full", "lora"])
def test_rollouts_are_the_current_students(tmp_path: Path, use_peft: str) -> None:
    script = Path(__file__).with_name("colocated_script.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path), use_peft],
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen["engine_at_start"] < 1e-4
    assert seen["moved"] > 0.05
    assert seen["engine_at_end"] < 1e-4
    # Were the engine a step behind, its log-probs would differ from the student's by about what a step moves.
    assert max(seen["rollouts_off_policy"]) < 1e-3
    assert len(seen["loss"]) == 3
    assert all(map(math.isfinite, seen["loss"]))
    assert max(seen["anchor"]) > 0
