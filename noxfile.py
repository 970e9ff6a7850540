"""What is run on this project, here and in CI: `python -m nox -s SESSION`.

Everything is installed by pip, under constraints.txt, which pins the torch that is developed with.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types", "contracts", "isolation", "demo"]

ROOT = Path(__file__).parent
PACKAGES = ["helios-rng", "helios-data", "helios-chkpt", "helios-trainer"]
# What each may find of its siblings once it is installed.
SIBLINGS = {
    "helios-rng": set(),
    "helios-data": {"helios-rng"},
    "helios-chkpt": set(),
    "helios-trainer": {"helios-rng", "helios-data", "helios-chkpt"},
}
# To compile all of torch takes longer than to unpack it, and little of it is imported.
UNCOMPILED = "--no-compile"
# Bounds on siblings as in a release, so that pip takes them from the command line; see hatch_build.py.
AS_RELEASED = {"HELIOS_RELEASE": "1"}


def install_packages(session: nox.Session, *others: str) -> None:
    """Install the four packages, editable, and other requirements; options of pip are taken too."""
    editable = [argument for name in PACKAGES for argument in ("-e", f"packages/{name}")]
    session.install("-c", "constraints.txt", *editable, *others, env=AS_RELEASED)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests of the packages, then those of the whole; arguments go to pytest."""
    # The trainers and the loader that helios-data is used inside of are the real ones.
    others = ["lightning>=2.6", "accelerate>=1.15", "torchdata>=0.11"]
    install_packages(session, "pytest", "hypothesis", "pytest-xdist", *others)
    # Two at a time: most of a test's time is a process that starts or a disk that syncs.
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install_packages(session, UNCOMPILED, "mypy", "types-tqdm")
    session.run("mypy")


@nox.session
def contracts(session: nox.Session) -> None:
    """Check which package imports which."""
    session.install("import-linter")
    sources = [str(ROOT / "packages" / name / "src") for name in PACKAGES]
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": ":".join(sources)})


@nox.session
def isolation(session: nox.Session) -> None:
    """Prove that each package works from its wheel with only the siblings it declares."""
    session.install("build", "hatchling", "virtualenv")
    with tempfile.TemporaryDirectory() as folder:  # not in the checkout
        work = Path(folder)
        for name in PACKAGES:
            arguments = ["--wheel", "--no-isolation", "--outdir", str(work), f"packages/{name}"]
            session.run("python", "-m", "build", *arguments, env=AS_RELEASED, silent=True)
        for name in PACKAGES:
            isolate(session, name, work, work / name)


def isolate(session: nox.Session, name: str, wheels: Path, place: Path) -> None:
    """Install one package into a fresh environment, import all of it and run its tests, all elsewhere."""
    session.run("python", "-m", "virtualenv", "-q", str(place / "venv"))
    python = str(place / "venv" / "bin" / "python")

    def pip(*arguments: str) -> None:
        options = ("-q", UNCOMPILED, "-c", "constraints.txt")
        session.run(python, "-m", "pip", "install", *options, *arguments, external=True)

    own = [
        str(next(wheels.glob(f"{each.replace('-', '_')}-*.whl"))) for each in sorted({name} | SIBLINGS[name])
    ]
    pip(*own)
    check = str(ROOT / "tests" / "isolated_import.py")
    with session.chdir(place):
        session.run(python, "-I", check, name, *sorted(SIBLINGS[name]), external=True)
    pip("pytest", "pytest-xdist", "hypothesis")
    shutil.copytree(ROOT / "packages" / name / "tests", place / "tests")
    shutil.copy(ROOT / "packages" / name / "README.md", place)  # its examples are tested
    if (docs := ROOT / "packages" / name / "docs").exists():  # and what its pages say
        shutil.copytree(docs, place / "docs")
    with session.chdir(place):
        options = [
            "--import-mode=importlib",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            "2",
            "--dist",
            "worksteal",
        ]
        # What long tests find does not depend on where a package is installed, and the session `tests` runs them.
        options += ["-m", "not long"]
        session.run(python, "-I", "-m", "pytest", *options, "tests", external=True)
    if SIBLINGS[name]:
        # In a checkout the folder alone is enough: its siblings come from beside it.
        session.run(python, "-m", "pip", "uninstall", "-q", "-y", name, *SIBLINGS[name], external=True)
        pip(f"./packages/{name}")
        with session.chdir(place):
            session.run(python, "-I", check, name, *sorted(SIBLINGS[name]), external=True)
    shutil.rmtree(place / "venv")


@nox.session
def demo(session: nox.Session) -> None:
    """Train the digits, train them again while killing the run, and prove that nothing differs."""
    install_packages(session, "-r", "examples/requirements.txt")
    session.run("python", "examples/prove_resume.py", *session.posargs)


@nox.session
def statistics(session: nox.Session) -> None:
    """Slow, about 5 minutes: is the shuffle as good as a random one? Beside it, shuffles that must be found out."""
    install_packages(session, "pytest")
    tests = ["tests/statistics/test_scores.py", "tests/statistics/permutation.py"]
    session.run("pytest", "-s", *tests, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Slow: time and memory of helios-data, helios-chkpt and their peers, as tables; wants a quiet machine."""
    install_packages(session, "-r", "benchmarks/requirements.txt")
    session.run("python", "-m", "benchmarks.run", *session.posargs)


@nox.session
def storm(session: nox.Session) -> None:
    """Slow: the demo ten times for each unit, with other random moments; or as many as the argument says."""
    install_packages(session, "-r", "examples/requirements.txt")
    for seed in range(int(session.posargs[0]) if session.posargs else 10):
        for unit in ("iteration", "epoch"):
            session.run("python", "examples/prove_resume.py", "--seed", str(seed), "--unit", unit)


@nox.session
def matrix(session: nox.Session) -> None:
    """Slow, about 5 minutes: 400 cases of the matrix of kills, or as many as the argument says, or `all`."""
    install_packages(session)
    session.run("python", "tests/matrix_session.py", *session.posargs)


@nox.session
def ranks(session: nox.Session) -> None:
    """Slow, about 15 minutes: 200 cases of the matrix on several ranks, other numbers of ranks, dead ones; or `all`."""
    install_packages(session)
    session.run("python", "tests/rank_matrix_session.py", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Slow, about 25 minutes: kills by the thousand, every bit, 1e5 bits of a large file; prints the fault table."""
    install_packages(session)
    session.run("python", "packages/helios-chkpt/tests/fault_session.py", *session.posargs)


assert sys.version_info >= (3, 11), "Helios needs Python 3.11 or later"
