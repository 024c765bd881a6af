"""Every mode runs with LoRA, with two updates per rollout, with the anchor, with accumulation and on two ranks.

Or it is refused at construction, and then it is in the table of refused cells: a cell that changes sides fails.

`make test` varies one axis at a time: every mode alone, and every axis for the modes in `ALWAYS`. The other cells are
marked `full`.
"""

import gc
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tiny import relative_difference, tiny_config
from two_ranks import launch

from sg_opd_trl import SGOPDConfigError, core
from trainer.distributed_script import check_same_weights
from trainer.mode_grid import AXES, COMMON, KINDS, MODES, PHASED, Cell, run, run_once

LIMIT = 1e-5
#: One mode whose loss is over the sampled tokens, and one whose loss is over distributions.
ALWAYS = ("gate", "topk_logits")
FULL = [axis for axis in AXES if "lora" not in AXES[axis]]
MATCHING = ("topk_logits", "full_logits")
#: (setting, value, reason, way out), in parts of the message.
NO_FROZEN_BASE = ("AdapterTeacher", "/adapter'", "must share a frozen base", "train the student with LoRA")
NO_USE = ("A reference", "got 'reference_model'", "would never be run", "Leave the reference out, or set lambda_base")
#: (axis, mode) -> why
REFUSED = {
    **{(axis, "AdapterTeacher"): NO_FROZEN_BASE for axis in FULL},
    **{(axis, "OPD with a reference"): NO_USE for axis in AXES},
}
TRAINED = [mode for mode in MODES if ("alone", mode) not in REFUSED]
#: The same for pairs: (kind, mode).
REFUSED_KINDS = {
    (kind, mode): (f"`disagree_mode={mode!r}`", kind, why, "Set disagree_mode='interp'")
    for kinds, modes, why in (
        (MATCHING, core.modes_without_distribution(), "names no distribution to match"),
        (("asymmetric",), core.modes_without_forward_kl(), "whatever their route is"),
    )
    for kind in kinds
    for mode in modes
}
DRIFT = [mode for mode in MODES if mode.startswith("drift gate")]
#: axis -> modes with one gradient: weights that need a second update, and blocks that no rollout fills.
SAME = {axis: [["gate", *DRIFT], ["several teachers", "RoutedTeacher"]] for axis in AXES}
SAME["two updates"][0] = SAME["together"][0] = ["gate", "drift gate, 64 tokens"]
for axis in ("LoRA", "together"):
    SAME[axis].append(["AdapterTeacher", "adapter merged"])
#: The random gate deals its consensus tokens out within each micro-batch of each rank.
DEPENDS_ON_SPLIT = {"random gate"}
#: Cells of `together` in which models are asked for distributions, on two ranks.
DISTRIBUTED = ("several teachers", "AdapterTeacher", "fixed wrong rollouts", "truncated rollouts masked")


def cells(axes: list[str], modes: list[str]) -> list[Any]:
    """(axis, mode), as parameters; what varies on two axes at a time is marked."""
    return [
        pytest.param(axis, mode, marks=() if axis == "alone" or mode in ALWAYS else pytest.mark.full)
        for axis in axes
        for mode in modes
    ]


def of_the_grid(modes: list[str]) -> list[Any]:
    """Modes that are compared on two axes."""
    return [pytest.param(mode, marks=() if mode in ALWAYS else pytest.mark.full) for mode in modes]


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> Iterator[None]:
    """Each training run collects garbage; the imported modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    run_once.cache_clear()
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


def check_refused(cell: Cell, parts: tuple[str, ...] | None) -> bool:
    """Whether the cell is refused, as it has to be."""
    if parts is None:
        assert not cell.refused
        return False
    assert cell.refused, "this cell is listed as refused and was trained"
    assert all(part in cell.refused for part in parts), cell.refused
    return True


def check_trained(cell: Cell, axis: str, mode: str) -> None:
    values = [value for entry in cell.logs for value in entry.values()]
    assert len(cell.gradients) == len(cell.logs) == 2
    assert all(math.isfinite(value) for value in values)
    assert all(torch.isfinite(value).all() for step in cell.gradients for value in step.values())
    assert cell.changed
    if "lora" in AXES[axis]:
        assert all(".default." in name for name in cell.changed)
    settings = COMMON | AXES[axis] | MODES[mode].settings
    # In stage 1 of TimeSep the student writes nothing.
    once = "num_iterations" in settings or "teacher_sampling_time_separated" in settings
    assert cell.batches == (1 if once else 2)
    if settings["teacher_sampling_enable"]:
        assert cell.logs[0]["anchor/tokens"] > 0


def vector(cell: Cell) -> torch.Tensor:
    """All gradients of both steps in one."""
    steps = (sorted(step.items()) for step in cell.gradients)
    return torch.cat([value.flatten().double() for step in steps for _, value in step])


def apart(vector: torch.Tensor, other: torch.Tensor) -> float:
    return float((vector - other).norm() / other.norm())


def check_apart(cells: dict[str, Cell], same: list[list[str]]) -> None:
    """Each setting does something: no two modes give one gradient, but for the groups in `same`, which do."""
    vectors = {mode: vector(cell) for mode, cell in cells.items()}
    for mode, other in itertools.combinations(vectors, 2):
        together = any({mode, other} <= set(group) for group in same)
        difference = apart(vectors[mode], vectors[other])
        assert difference < LIMIT if together else difference > 1e-3, (mode, other, difference)


# --- the grid in one process -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("axis", "mode"), cells(list(AXES), list(MODES)))
def test_every_cell(axis: str, mode: str, folder: Path) -> None:
    cell = run_once(folder, axis, mode)
    if not check_refused(cell, REFUSED.get((axis, mode))):
        check_trained(cell, axis, mode)


@pytest.mark.parametrize(
    "axis",
    [pytest.param(axis, marks=() if axis == "alone" else pytest.mark.full) for axis in AXES if axis != "together"],
)
def test_every_setting_does_something(axis: str, folder: Path) -> None:
    trained = {mode: run_once(folder, axis, mode) for mode in MODES if (axis, mode) not in REFUSED}
    check_apart(trained, SAME[axis])


@pytest.mark.parametrize(("axis", "mode"), cells(["two updates", "accumulation"], TRAINED))
def test_the_first_update_is_that_of_one_micro_batch(axis: str, mode: str, folder: Path) -> None:
    first, alone = (run_once(folder, name, mode).gradients[0] for name in (axis, "alone"))
    difference = relative_difference(first, alone)
    dealt_anew = axis == "accumulation" and mode in DEPENDS_ON_SPLIT
    assert difference > 1e-2 if dealt_anew else difference < LIMIT


@pytest.mark.parametrize("mode", of_the_grid(TRAINED))
def test_the_anchor_adds_the_same_to_every_mode(mode: str, folder: Path) -> None:
    def added(mode: str) -> dict[str, torch.Tensor]:
        with_anchor, without = (run_once(folder, axis, mode).gradients[0] for axis in ("anchor", "alone"))
        return {name: value - without[name] for name, value in with_anchor.items()}

    if "teacher_sampling_enable" in MODES[mode].settings:
        assert not any(value.any() for value in added(mode).values()), "it brings an anchor of its own"
    elif mode == "teacher_prompt":
        # The teacher writes something else after its own prompts.
        assert relative_difference(added(mode), added("gate")) > 0.1
    else:
        # A difference of gradients several times its size.
        assert relative_difference(added(mode), added("gate")) < 10 * LIMIT


@pytest.mark.parametrize("mode", of_the_grid(TRAINED))
def test_the_gradient_of_lora_is_that_of_all_weights(mode: str, folder: Path) -> None:
    """dL/dB = scaling * dL/dW A^T, and dL/dA = 0, for a new adapter."""
    low, full = (run_once(folder, axis, mode) for axis in ("LoRA", "alone"))
    scaling = 8 / 4  # PEFT's default lora_alpha over r
    for name, gradient in low.gradients[0].items():
        layer = re.sub(r"base_model\.model\.|\.lora_.*", "", name)
        expected = torch.zeros_like(gradient)
        if ".lora_B." in name:
            down = low.weights[name.replace("lora_B", "lora_A")]
            expected = scaling * full.gradients[0][f"{layer}.weight"] @ down.t()
            assert expected.any()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert len(low.gradients[0]) == 8  # A and B of q and v in both layers


# --- settings that exclude each other --------------------------------------------------------------------------------
OTHERS = {
    "TimeSep without teacher sampling": {"teacher_sampling_enable": False, "teacher_sampling_time_separated": True},
    "TimeSep on shared prompts": PHASED
    | {"teacher_sampling_time_separated": True, "teacher_sampling_prompts": "share"},
    "KL penalty": {"beta": 0.1},
    "small delta": {"delta": 0.5},
}
_NO_GATE = ("`gate_signal='random'`", "sign_gated_extrapolation=False", "no consensus to deal out", "Set sign_gated")
_TIMED = "`teacher_sampling_time_separated=True`"
#: A pair, or a setting with anything -> (setting, value, reason, way out)
REFUSED_PAIRS = {
    **{("random gate", mode): _NO_GATE for mode in ("OPD", "OPD with a reference", "ExOPD")},
    ("TimeSep without teacher sampling", ""): (_TIMED, "=False", "there is no anchor", "Set teacher_sampling_enable"),
    ("TimeSep on shared prompts", ""): (_TIMED, "'share'", "no student prompts to share", "'reserve'"),
    **{(mode, kind): parts for (kind, mode), parts in REFUSED_KINDS.items()},
    **{
        ("KL penalty", kind): ("`beta=0.1`", kind, "gives way to that of the distributions", "Set beta=0")
        for kind in KINDS[1:]
    },
    **{
        ("small delta", kind): ("`delta=0.5`", kind, "scale losses whose ratio is 1", "Set delta")
        for kind in KINDS[1:]
    },
}


def test_every_pair_of_settings(tmp_path: Path) -> None:
    settings = {mode: MODES[mode].settings for mode in MODES} | OTHERS
    found = set()
    for pair in itertools.combinations_with_replacement(settings, 2):
        one, other = (settings[name] for name in pair)
        if any(one[name] != other[name] for name in one.keys() & other.keys()):
            continue
        key = next((key for key in REFUSED_PAIRS if set(key) - {""} <= set(pair)), None)
        try:
            tiny_config(tmp_path, **(COMMON | one | other))
        except SGOPDConfigError as error:
            assert key is not None, f"{pair}: {error}"
            assert all(part in str(error) for part in REFUSED_PAIRS[key]), error
            found.add(key)
        else:
            assert key is None, f"{pair} is listed as refused and was accepted"
    assert found == set(REFUSED_PAIRS)


# --- all axes at once, every distillation_mode with every other mode -------------------------------------------------
@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_modes(kind: str, folder: Path) -> None:
    trained = {}
    for mode in MODES:
        cell = run_once(folder, "together", mode, kind)
        if not check_refused(cell, REFUSED.get(("together", mode), REFUSED_KINDS.get((kind, mode)))):
            check_trained(cell, "together", mode)
            trained[mode] = cell
    # Here these modes are one: the kind is the pair's.
    check_apart({mode: cell for mode, cell in trained.items() if mode not in KINDS}, SAME["together"])


# --- two ranks -------------------------------------------------------------------------------------------------------
# Ranks alone, ranks with everything, and pairs in which teachers are asked for distributions.
CELLS: list[tuple[str, str, str | None]] = [
    *((axis, mode, None) for axis in ("alone", "together") for mode in MODES),
    *(("together", mode, kind) for mode in DISTRIBUTED for kind in KINDS[1:]),
]
COMPARED = ("gate/", "teacher/", "weights/", "anchor/")


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The cells that this run has selected, in one launch."""
    asked = [item.callspec.params for item in request.session.items if item.originalname == "test_two_ranks"]
    words = json.dumps([[cell["axis"], cell["mode"], cell["kind"]] for cell in asked if "kind" in cell])
    output = tmp_path_factory.mktemp("two") / "results.pt"
    done = launch(__file__, str(output), words, timeout=1100)
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(output, weights_only=True)
    assert results.pop("ranks") == 2
    return {key: Cell(**cell) for key, cell in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "mode", "kind"),
    [pytest.param(*cell, marks=() if cell[1] in ALWAYS and cell[2] is None else pytest.mark.full) for cell in CELLS],
)
def test_two_ranks(axis: str, mode: str, kind: str | None, two_ranks: dict, folder: Path) -> None:
    two, one = two_ranks[axis, mode, kind], run_once(folder, axis, mode, kind)
    if check_refused(two, REFUSED.get((axis, mode))):
        assert one.refused
        return
    check_trained(two, axis, mode)
    if mode in DEPENDS_ON_SPLIT:
        assert apart(vector(two), vector(one)) > 1e-3
        return
    for left, right in zip(two.gradients, one.gradients, strict=True):
        assert relative_difference(left, right) < LIMIT
    for left, right in zip(two.logs, one.logs, strict=True):
        assert left.keys() == right.keys()
        compared = [name for name in left if name.startswith(COMPARED)]
        assert {n: left[n] for n in compared} == {n: pytest.approx(right[n], rel=1e-4, abs=1e-6) for n in compared}


def run_on_this_rank(output: str, cells: str) -> None:
    """The cells; ranks with different weights are an error, and the main process saves what came out."""
    state = PartialState(cpu=True)
    results: dict = {"ranks": state.num_processes}
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for key in map(tuple, json.loads(cells)):
            results[key] = run(Path(folder), *key, check=check_same_weights)._asdict()
    if state.is_main_process:
        torch.save(results, output)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    run_on_this_rank(*sys.argv[1:])
