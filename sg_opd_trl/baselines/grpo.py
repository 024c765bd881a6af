"""Plain reinforcement learning: `trl.GRPOTrainer` as it is, apart from what becomes of it where the Hub fails."""

from trl import GRPOTrainer

from ..trl_seam import PlainHubSeam


class PlainGRPOTrainer(PlainHubSeam, GRPOTrainer):
    """`trl.GRPOTrainer`, whose failed pushes are told."""
