from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fslora.data import python_docs
from fslora.data.python_docs import PACKAGES, docstrings, module_files
from fslora.data.rows import read_rows


@pytest.fixture(scope="module")
def rows():
    return read_rows("python-docs")


def test_every_client_has_enough_real_text(rows):
    sizes = Counter()
    for row in rows:
        sizes[row["package"]] += len(row["text"])
    assert list(sizes) == list(PACKAGES)
    assert len(PACKAGES) == 20
    assert min(sizes.values()) >= 8_000
    asyncio = [row["text"] for row in rows if row["package"] == "asyncio"]
    assert any("Run the event loop until stop() is called." in text for text in asyncio)


def test_the_base_never_reads_a_clients_text(rows):
    base_text = "\n".join(topics.values())
    assert not [row for row in rows if len(row["text"]) > 200 and row["text"] in base_text]
    assert len(base_text) > 400_000


def test_text_is_parsed_not_imported(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        '"""Module."""\nraise SystemExit\nclass C:\n    """Class.\n\n    More.\n    """\n'
        '    async def f(self):\n        "Method."\n    def g(self): ""\ndef h():\n    "Last."\n'
    )
    assert docstrings(file) == ["Module.", "Class.\n\nMore.", "Method.", "Last."]


def test_a_library_without_sources_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"install Python with its library's \.py files"):
        python_docs.python_docs()


def test_tests_of_the_library_are_left_out():
    assert not any("test" in Path(file).parts for file in module_files("unittest"))
    assert module_files("math") == []
    assert [file.name for file in module_files("difflib")] == ["difflib.py"]
