"""`python -m sg_opd_trl.cli`."""

from . import program

raise SystemExit(program())
