"""Baselines through TRL's own trainers: SFT on teacher rollouts, SeqKD, and GKD on the student's rollouts.

They visit the prompts that `SGOPDTrainer` visits at the same seed, from the same initial student, in as many optimizer
steps of as many rows, so that students can be compared pair by pair.
"""
