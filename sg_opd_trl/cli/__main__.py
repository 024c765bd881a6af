"""`python -m sg_opd_trl.cli`."""

from sg_opd_trl.cli import main

raise SystemExit(main())
