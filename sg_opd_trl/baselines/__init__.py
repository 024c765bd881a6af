"""Baselines through TRL's own trainers: SFT on teacher rollouts, SeqKD, and GKD on the student's rollouts.

They start from the initial student of `SGOPDTrainer` at the same seed and take as many optimizer steps of as many
rows, so that students can be compared pair by pair. SFT and GKD visit its prompts step by step. SeqKD visits them in
the same order but has one row of each, so that its steps take `num_generations` times as many prompts (128, where the
others take 16 with 8 rows each) and it is through the data set sooner.
"""
