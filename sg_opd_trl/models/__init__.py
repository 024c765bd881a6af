"""Running a causal language model well; nothing of distillation."""
