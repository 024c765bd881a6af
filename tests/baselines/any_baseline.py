"""A trainer of each baseline on the tiny pair, with four steps of eight rows."""

import warnings
from pathlib import Path
from typing import Any

from baseline_pair import Pair
from tiny import parity_verifier, tiny_data

METHODS = ["sft", "seqkd", "gkd", "grpo"]
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def any_baseline(method: str, pair: Pair, folder: Path, **changes: Any) -> Any:
    settings = pair.settings(folder, **(SAVING | changes))
    if method == "grpo":
        from sg_opd_trl.baselines.config import PlainGRPOConfig
        from sg_opd_trl.baselines.grpo import build_grpo_trainer

        del settings["teacher_model_name_or_path"]
        args = PlainGRPOConfig(**settings, num_generations=4, max_completion_length=6)
        return build_grpo_trainer(pair.student, args, [parity_verifier], tiny_data(), None)
    if method == "gkd":
        with warnings.catch_warnings():
            # TRL's: an experimental trainer.
            warnings.simplefilter("ignore")
            from sg_opd_trl.baselines.gkd import OnPolicyGKDConfig, build_gkd_trainer
        return build_gkd_trainer(
            pair.student, OnPolicyGKDConfig(**settings, num_generations=4, max_new_tokens=6), tiny_data()
        )
    from sg_opd_trl.baselines.config import SeqKDConfig, TeacherSFTConfig
    from sg_opd_trl.baselines.sft import build_sft_trainer

    own: Any = {"max_completion_length": 6, "teacher_sampling_filter_correct": False}
    config = SeqKDConfig(**settings, **own) if method == "seqkd" else TeacherSFTConfig(**settings, **own)
    return build_sft_trainer(pair.student, config, [parity_verifier], tiny_data())
