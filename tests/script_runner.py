"""Runs example scripts in processes of their own, kills among them, and returns what they say."""

import json
import subprocess
import sys

RUNNER = """
import importlib, json, os, runpy, sys, traceback
import torch._dynamo  # which the first optimizer imports
importlib.import_module(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    if (child := os.fork()) == 0:
        try:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    # On a line of its own: a bar that was killed leaves its line open.
    print("\\nstatus", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_whole_and_killed(folder, library, *scripts, options=()):
    """Run each script whole, and then killed twice with other numbers of workers.

    Args:
        folder: where the runs and their log are put.
        library: what the scripts import, which is imported once for all of them.
        *scripts: scripts that take --root, --workers and --die-at, and print a digest at their end.
        options: more arguments for all of them.

    Returns:
        What was said, six for each script: digest and status of the whole run, the statuses of the two that
        were killed, digest and status of the one that went on to the end.
    """
    runs = []
    for script in scripts:
        whole, killed = folder / f"{script.stem}-whole", folder / f"{script.stem}-killed"
        runs += [
            (script, *options, "--root", whole, "--workers", 0),
            (script, *options, "--root", killed, "--workers", 2, "--die-at", 12),
            (script, *options, "--root", killed, "--workers", 0, "--die-at", 17),
            (script, *options, "--root", killed, "--workers", 2),
        ]
    log = folder / "log.txt"
    with log.open("w") as output:  # a file, since the workers of a killed run keep a pipe open for seconds
        arguments = json.dumps([[str(each) for each in run] for run in runs])
        command = [sys.executable, "-c", RUNNER, library, arguments]
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
    lines = log.read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith(("status", "digest"))]
