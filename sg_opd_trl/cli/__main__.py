"""`python -m sg_opd_trl.cli`."""

from . import main

raise SystemExit(main())
