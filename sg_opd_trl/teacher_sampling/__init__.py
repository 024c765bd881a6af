"""Phased teacher sampling: prompts, one plan per step, and stored rollouts."""
