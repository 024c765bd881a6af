"""Runs `sg-opd` commands one after the other, as a process whose client of the Hub is the real one.

Its argument is a JSON list of command lines. On both streams a line with the number of the command precedes what it
says, and its status follows on standard output.
"""

import json
import sys
import time

from sg_opd_trl.cli import main

for number, words in enumerate(json.loads(sys.argv[1])):
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {number}", file=stream, flush=True)
    start = time.perf_counter()
    try:
        status = main(words)
    except Exception as error:  # noqa: BLE001  # the test looks at whatever it is
        status = f"raised {type(error).__name__}"
        sys.excepthook(type(error), error, error.__traceback__)
    print(f"--- {json.dumps([status, time.perf_counter() - start])}", flush=True)
