"""Comparing recipes: runs x paired seeds as child processes, resumable, with intervals on every difference.

`spec` says what a study file may hold, `plan` turns it into jobs, `execution` runs them, `tuning` chooses a setting
per run, `statistics` and `summary` make the numbers, `tables`, `figures` and `page` show them. Nothing here imports
torch or the command line: jobs are commands of `sg-opd` that run in processes of their own.
"""
