"""Estimates of memory and time, worked out by hand."""

import torch
from tiny import tiny_model

from sg_opd_trl.inspection.machine import Need, estimated_need, memory_of, memory_row, time_row

GIB = 2**30


def test_memory_is_counted_from_weights_and_sizes():
    student, teacher = tiny_model(0), tiny_model(1)
    weights = sum(each.numel() for each in student.parameters()) * 4
    need = estimated_need(student, [teacher], 100, checkpointing=False)
    # Weights, gradients and AdamW's two states; 17 numbers of 4 bytes per token, layer (2) and unit of width (32).
    assert need == Need(4 * weights, weights, 100 * 17 * 2 * 32 * 4)
    assert need.total == 5 * weights + 435_200
    # With checkpointing one number per layer, and one layer in full.
    assert estimated_need(student, [], 100, checkpointing=True).activations == 100 * (17 + 2) * 32 * 4
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    assert estimated_need(student, [], 0, checkpointing=False) == Need(weights, 0, 0)


def test_a_step_that_does_not_fit_is_red_and_a_tight_one_yellow():
    need = Need(2 * GIB, GIB, GIB)
    assert [memory_row(need, size * GIB).state for size in (3, 4, 6)] == ["red", "yellow", "green"]
    assert memory_row(need, 3 * GIB).found.startswith("About 4 GiB are needed and 3 are there (estimate: 2, 1, 1 ")


def test_a_host_has_what_is_free_and_what_the_process_has():
    assert memory_of(torch.device("cpu")) > 2**27


def test_time_is_in_proportion_to_rows():
    row = time_row({"rollouts": 4.0, "student": 1.0, "anchor": 2.0}, 16, 64, 30, checkpointing=False)
    # (4 + 3 * 1) * 64 / 16 + 2 = 30 seconds a step, 900 in all.
    assert row.found.startswith("About 30 s a step, 15 min for 30 steps (estimate: 16 rollouts took 4 s")
    with_more = time_row({"rollouts": 4.0, "student": 1.0}, 16, 64, 30, checkpointing=True)
    assert with_more.found.startswith("About 32 s a step")
