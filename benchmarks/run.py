"""Run the benchmarks and print what they measured as markdown: `python -m benchmarks.run`."""

import argparse
import importlib
import time
import warnings

from benchmarks.harness import Options, environment

THEMES = ["data_seek", "data_throughput", "data_memory", "data_loader", "data_rekey", "data_resume"]
THEMES += [
    "chkpt_save",
    "chkpt_async",
    "chkpt_load",
    "chkpt_start",
    "chkpt_migrate",
    "chkpt_find",
    "chkpt_sharded",
]
THEMES += ["trainer_overhead", "trainer_start", "trainer_stall", "trainer_ranks"]


def main() -> None:
    """Run all themes, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("themes", nargs="*", metavar="theme", help=f"of {', '.join(THEMES)}; none is all")
    parser.add_argument(
        "--large", action="store_true", help="also peers at 1e8 (up to 14 GiB), longer rounds"
    )
    parser.add_argument(
        "--mib",
        type=int,
        default=1024,
        help="MiB of the state in the checkpoint themes, from 64 (default: 1024)",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.themes) - set(THEMES)
    if unknown:
        parser.error(f"there is no {sorted(unknown)[0]!r}; the themes are {', '.join(THEMES)}")
    if arguments.mib < 64:
        parser.error(f"--mib: expected at least 64, got {arguments.mib}")
    options = Options(arguments.large, arguments.mib)
    warnings.simplefilter("ignore")  # what peers have to say about deprecations
    begin = time.perf_counter()
    print(f"{time.strftime('%Y-%m-%d')}. {environment()}", flush=True)
    for theme in arguments.themes or THEMES:
        module = importlib.import_module(f"benchmarks.{theme}")
        print(f"\n## {module.TITLE}\n\n{module.NOTES}\n\n{module.run(options)}", flush=True)
    print(f"\nIn {time.perf_counter() - begin:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
