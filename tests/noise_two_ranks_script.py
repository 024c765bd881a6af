"""A run on two gloo ranks, started by `test_noise.py`, each of which measures another noise."""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import tiny_model, tiny_trainer
from torch import Tensor

from sg_opd_trl import noise, trl_seam
from sg_opd_trl.launcher import leave_group

if __name__ == "__main__":
    output, state = Path(sys.argv[1]), PartialState()
    settings = {"max_steps": 1, "bf16": True, "gradient_checkpointing": True, "gate_dead_zone": "auto"}
    settings |= {"teacher_sampling_enable": False, "max_completion_length": 16}
    # Prompts padded on the left in training: without that there is hardly any noise.
    vars(trl_seam)["padding_behind"] = lambda *arguments: False
    trainer = tiny_trainer(output, settings=settings, model=tiny_model(0), teacher_model=tiny_model(0))
    measured, own = noise.noise_of, []

    def noise_of_this_rank(run: Any) -> Tensor:
        values = measured(run) * (1 + state.process_index)
        own.append(float(values.quantile(noise.QUANTILE)))
        return values

    noise.noise_of = noise_of_this_rank
    trainer.train()
    results = gather_object(own), gather_object([trainer.gate_noise.dead_zone])
    if state.is_main_process:
        (output / "results.json").write_text(json.dumps(results))
    leave_group()
