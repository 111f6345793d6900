"""Real text that lies on every machine with Python: the standard library's own documentation.

Each client of the built-in corpus is one package of the running interpreter's standard library
and owns its docstrings, so the split is non-IID by nature. The shipped base reads the reference
manual that `help()` prints, and none of these. Sources are parsed, never imported, so neither a
module's side effects nor `python -OO` matter.
"""

import ast
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

from fslora.data.files import Rows

# The clients: in the standard library of 3.11, 3.12 and 3.13, at least 8,000 characters each.
PACKAGES = (
    "_pydecimal",
    "asyncio",
    "configparser",
    "difflib",
    "doctest",
    "email",
    "http",
    "importlib",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "multiprocessing",
    "smtplib",
    "statistics",
    "threading",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)


def module_files(name: str) -> list[Path]:
    """The source files of one standard-library package or module, sorted, without its tests.

    Empty for a module that has none, such as one written in C.
    """
    library = Path(sysconfig.get_path("stdlib"))
    if (library / f"{name}.py").is_file():
        return [library / f"{name}.py"]
    files = sorted((library / name).rglob("*.py"))
    return [file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts)]


def docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, cleaned, in the order of the file."""
    with tokenize.open(file) as source:
        tree = ast.parse(source.read())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [(ast.get_docstring(node) or "").strip() for node in nodes]
    return [text for text in texts if text]


def python_docs(packages: Sequence[str] = PACKAGES) -> Rows:
    """The built-in corpus: one row per docstring, in the order of the files.

    Returns:
        Rows with the columns `package` (the client) and `text`.

    Raises:
        FileNotFoundError: this Python was installed without the sources of its library.
    """
    rows = []
    for package in packages:
        files = module_files(package)
        if not files:
            raise _no_sources(package)
        rows += [{"package": package, "text": text} for file in files for text in docstrings(file)]
    return rows


def _no_sources(package: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the sources of the standard library's {package} are not in "
        f"{sysconfig.get_path('stdlib')}: install Python with its library's .py files "
        "(on Debian: libpython3-stdlib), or name another --data"
    )
