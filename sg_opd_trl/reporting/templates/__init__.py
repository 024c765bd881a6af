"""Templates of the report and the model card."""
