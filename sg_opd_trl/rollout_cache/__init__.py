"""Teacher rollouts that are written once and read by every run that asks for the same ones.

The teacher is frozen and the prompts of the anchor are known beforehand, so that runs of a sweep would only generate
them again. Store and keys import neither torch nor transformers.
"""
