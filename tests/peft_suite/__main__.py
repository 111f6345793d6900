"""Run PEFT's own LoRA tests vanilla and fused, and write down how the outcomes differ."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

import fslora_kernels
from benchmarks.timing import git_commit
from tests.peft_suite.models import save_models
from tests.peft_suite.plugin import read
from tests.peft_suite.report import WANTED, compare, markdown, to_fuse

HERE = Path(__file__).parent
FILES = ["custom", "decoder", "encoder_decoder", "feature_extraction"]
EPILOG = """\
examples:
  python -m tests.peft_suite                              everything, about ten minutes on one core
  python -m tests.peft_suite --files custom               one file, two minutes
  python -m tests.peft_suite -k mixed_adapter --out -     a few cases, the page printed
  python -m tests.peft_suite --source peft-0.21.2.tar.gz  no download

Outcomes are kept under --work, per version of PEFT and state of fslora_kernels: a run that was
interrupted continues, and a changed layer is run again while the vanilla outcomes stay. The exit
status is 1 where under 98% of what vanilla passes passes fused, or a failure is not explained in
report.py.
"""


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="PEFT's source distribution or checkout, of the installed version (default: download)",
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=FILES,
        metavar="NAME",
        help=f"which test_NAME_models.py or test_NAME.py to run (default: {' '.join(FILES)})",
    )
    parser.add_argument(
        "-k", "--limit-k", default="", metavar="EXPR", help="run only cases that match, as pytest's"
    )
    parser.add_argument("--out", default="docs/peft.md", help="page to write; - prints it")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/peft_suite"), help="where outcomes are kept"
    )
    return parser.parse_args(arguments)


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def get_source(source, work):
    """Return a folder with PEFT's source of the installed version, downloading if none is given.

    Raises:
        ValueError: the source is of another version, or has no tests.
    """
    installed = version("peft")
    if source is None:
        source = work / f"peft-{installed}.tar.gz"
        if not source.exists():
            say(f"downloading the source distribution of peft {installed}")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--no-binary", ":all:", f"peft=={installed}", "--dest", str(work)]
            subprocess.run(pip, check=True)
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(work, filter="data")
            source = work / archive.getnames()[0].split("/")[0]
    about = source / "src" / "peft" / "__init__.py"
    found = re.search(r'__version__ = "(.+?)"', about.read_text()) if about.exists() else None
    if found is None or not (source / "tests").is_dir():
        raise ValueError(f"{source} is no source of PEFT with its tests")
    if found[1] != installed:
        raise ValueError(f"{source} is PEFT {found[1]}, but {installed} is installed: give its own")
    return source


def lay_out(source, work):
    """Put PEFT's tests under ``work/tests``, as the package that they are in its repository."""
    shutil.rmtree(work / "tests", ignore_errors=True)
    shutil.copytree(source / "tests", work / "tests")
    (work / "tests" / "__init__.py").touch()
    (work / "pytest.ini").write_text("[pytest]\n")
    (work / "cwd").mkdir(exist_ok=True)
    save_models(work / "cwd")


def fingerprint(*paths, salt=""):
    """Return twelve hexadecimal digits that name the state of sources and of packages."""
    state = hashlib.sha256(salt.encode())
    for package in ("peft", "torch", "transformers"):
        state.update(f"{package} {version(package)}\n".encode())
    for path in paths:
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            state.update(source.read_bytes())
    return state.hexdigest()[:12]


def run(work, file, mode, outcomes, *, only=None, limit=""):
    """Run one of PEFT's test files in one mode; return its rows.

    Raises:
        RuntimeError: pytest did not get through; what it did is kept.
    """
    path = work / "tests" / f"test_{file}_models.py"
    path = path if path.exists() else work / "tests" / f"test_{file}.py"
    if not path.exists():
        raise ValueError(f"PEFT has neither test_{file}_models.py nor test_{file}.py")
    command = [sys.executable, "-m", "pytest", "-c", str(work / "pytest.ini")]
    command += ["--rootdir", str(work), "-p", "plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--no-header", "--tb=no", "--show-capture=no", "-rN", "--disable-warnings"]
    command += [str(path), "-k", limit, "--lora-mode", mode, "--lora-outcomes", str(outcomes)]
    if only is not None:
        (work / "only.json").write_text(json.dumps(only))
        command += ["--lora-only", str(work / "only.json")]
    here = {
        "PYTHONPATH": str(HERE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hub"),
    }
    say(f"\n{file}, {mode}")
    status = subprocess.run(
        command, cwd=work / "cwd", env=os.environ | here, check=False
    ).returncode
    if status not in (0, 1, 5):
        done = read(outcomes)
        last = f"after {done[-1]['id']}" if done else "before the first test"
        raise RuntimeError(
            f"pytest ended {last} with status {status}; the same command continues there, and "
            f"without --tb=no this one says why: {shlex.join(command)}"
        )
    return read(outcomes)


def main(arguments=None):
    """Run, compare, write the page; return the exit status."""
    options = parse(arguments)
    disable_progress_bar()
    work = (options.work / version("peft")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    lay_out(get_source(options.source, work), work)
    limit = options.limit_k
    layer = Path(fslora_kernels.__file__).parent
    judge = [HERE / "plugin.py", HERE / "models.py"]
    vanilla_key, fused_key = fingerprint(*judge, salt=limit), fingerprint(*judge, layer, salt=limit)
    sources = fingerprint(layer)
    verdicts = {}
    for file in options.files:
        vanilla = run(work, file, "vanilla", work / f"{file}-{vanilla_key}.jsonl", limit=limit)
        only = to_fuse(vanilla)
        fused = run(
            work, file, "fused", work / f"{file}-{fused_key}-fused.jsonl", only=only, limit=limit
        )
        verdicts[f"test_{file}"] = compare(vanilla, fused)
    if fingerprint(layer) != sources:
        raise ValueError("fslora_kernels changed while the tests ran; run again")
    facts = [
        ", ".join(f"{name} {version(name)}" for name in ("peft", "torch", "transformers"))
        + f", Python {platform.python_version()}, on a processor, one thread",
        f"commit {git_commit()}: `fslora_kernels` whose sources, with these versions, hash to "
        f"{sources}",
    ]
    if limit:
        facts.append(f"only cases that match `-k {limit!r}`")
    page = markdown(verdicts, facts)
    if options.out == "-":
        say(page)
    else:
        Path(options.out).write_text(page, encoding="utf-8")
        say(f"\nwrote {options.out}")
    for name, verdict in verdicts.items():
        say(
            f"{name}: {len(verdict.passed) - len(verdict.failed)} of {len(verdict.passed)} that "
            f"vanilla passes, {len(verdict.unexplained)} unexplained"
        )
    return int(any(v.share < WANTED or v.unexplained for v in verdicts.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
