"""Baselines keep what they have done as `SGOPDTrainer` does: whole checkpoints, and the last finished step."""

from pathlib import Path
from typing import Any

from ..checkpoints import check_checkpoint, newest_whole_checkpoint
from ..ending import kept
from ..precision import check_trained_dtype, tell_lost_updates, train_in_float32
from ..run_folder import is_owned, read_resume
from ..trl_seam import WholeFiles, keep_base_weights


class KeptTrainer(WholeFiles):
    """To stand before a trainer of TRL: its files are whole, and whatever ends it leaves its last finished step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        train_in_float32(self.model, {})
        check_trained_dtype(self.model)
        tell_lost_updates(self.model, self.args, self.accelerator)
        engine = getattr(self, "vllm_generation", None)
        if engine is not None:
            keep_base_weights(engine)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; True starts where there is none, and goes on from the
                newest whole one otherwise. Default: that of the configuration.
            args: see `transformers.Trainer.train`, as for `kwargs`.
            kwargs: see there.

        Returns:
            transformers' account of the training.

        Raises:
            CheckpointError: `resume_from_checkpoint` names a checkpoint that is not whole.
        """
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint: Path | bool | None = read_resume(given)
        if checkpoint is True:
            checkpoint = newest_whole_checkpoint(self.args.output_dir)
        elif isinstance(checkpoint, Path) and not is_owned(self.args):
            check_checkpoint(checkpoint)
        run: Any = self  # a run has more, of which keeping asks nothing
        with kept(run):
            # False where the run starts: None would ask the configuration.
            return super().train(str(checkpoint) if checkpoint else False, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss. Wrapped models send their buffers around in its forward: ranks say before that all are well."""
        self.before_exchange()
        return super().compute_loss(*args, **kwargs)
