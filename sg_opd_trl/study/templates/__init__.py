"""Template of the study page."""
