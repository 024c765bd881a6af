"""Tests that run the trainer."""

import gc

from sg_opd_trl import SGOPDConfig, SGOPDTrainer  # noqa: F401  # before the freeze, with all that they import

# Every `train` collects garbage, which would scan all imported modules each time.
gc.freeze()
