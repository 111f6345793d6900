import gzip
import sys
from types import SimpleNamespace

import pytest

from fslora.data.rows import column, columns, read_rows

# DATA: the file, how to read it, its rows, its columns.
SHARED = [
    ("glue/SST-2/train.tsv.gz", {}, 67349, ["sentence", "label"]),
    ("glue/SST-2/dev.tsv.gz", {}, 872, ["sentence", "label"]),
    ("glue/CoLA/train.tsv.gz", {"header": False}, 8551, ["0", "1", "2", "3"]),
    ("glue/CoLA/dev.tsv", {"header": False}, 1043, ["0", "1", "2", "3"]),
    ("glue/CoLA/test.tsv", {}, 1063, ["index", "sentence"]),
    ("glue/MRPC/train.tsv.gz", {}, 3668, None),
    ("glue/MRPC/dev.tsv.gz", {}, 408, None),
    ("glue/MRPC/test_labelled_msr.tsv.gz", {}, 1725, None),
    ("agnews/train_10k.tsv.gz", {"header": False}, 10001, ["0", "1"]),
    ("agnews/test.tsv.gz", {"header": False}, 7600, ["0", "1"]),
    ("commonsense/boolq/train.json.gz", {}, 9427, None),
    ("commonsense/boolq/test.json.gz", {}, 3270, None),
    ("commonsense/ARC-Easy/train.json.gz", {}, 2251, None),
    ("commonsense/ARC-Easy/test.json.gz", {}, 2376, None),
    ("commonsense/openbookqa/train.json.gz", {}, 4957, None),
    ("commonsense/openbookqa/test.json.gz", {}, 500, None),
    ("dolly15k", {}, 14931 + 80, ["instruction", "context", "response", "category", "file"]),
    # 7222 paragraphs, of which 125 are a name without a word.
    ("tinyshakespeare/input.txt.gz", {"reader": "play"}, 7097, ["speaker", "text"]),
    ("tinystories", {}, 1, ["text"]),
]
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
COMMONSENSE = ["instruction", "input", "output", "answer"]


@pytest.mark.parametrize(("name", "options", "count", "names"), SHARED, ids=str)
def test_real_data_reads_whole(shared_data, name, options, count, names):
    rows = read_rows(str(shared_data / name), **options)
    names = names or (MRPC if "MRPC" in name else COMMONSENSE)
    assert len(rows) == count
    assert all(list(row) == names for row in rows)


def test_real_labels_and_speakers(shared_data):
    labels = column(read_rows(str(shared_data / "glue/SST-2/train.tsv.gz")), "label")
    assert labels.count("1") == 37569
    assert labels.count("0") == 67349 - 37569
    test = column(read_rows(str(shared_data / "agnews/test.tsv.gz"), header=False), 1)
    assert sorted(test.count(name) for name in set(test)) == [1900] * 4
    play = str(shared_data / "tinyshakespeare/input.txt.gz")
    speakers = column(read_rows(play, reader="play"), "speaker")
    assert sum(speakers.count(name) >= 20 for name in set(speakers)) == 98
    assert len(read_rows(play)[0]["text"]) == 1_115_394


def test_a_folder_is_its_known_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": "second"}\n')
    (tmp_path / "a.csv").write_text("a\nfirst\n")
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "deeper.csv").mkdir()
    rows = [{"a": "first", "file": "a"}, {"a": "second", "file": "b"}]
    assert read_rows(str(tmp_path)) == rows
    assert read_rows(str(tmp_path / "[ab]*")) == rows
    assert read_rows(str(tmp_path / "*.csv")) == [{"a": "first"}], "one file needs no name"
    with pytest.raises(ValueError, match=r"c\*: no data file"):
        read_rows(str(tmp_path / "c*"))


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no data")
    with pytest.raises(ValueError, match=r"no data file in this folder; known types are .*\.csv"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    "source", ["./x", "/x/y", "a/b/c", "x.tsv", "x.csv.gz", "~/x", "..", "a b"]
)
def test_a_missing_path_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "..":
        source = "../missing"
    with pytest.raises(FileNotFoundError, match="no such file or folder; name one that exists"):
        read_rows(source)


def test_a_play_must_be_a_file():
    with pytest.raises(FileNotFoundError):
        read_rows("python-docs", reader="play")


def test_a_dataset_id_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fslora\[data\]'"):
        read_rows("org/name")


class FakeDatasets(SimpleNamespace):
    """The two names of the `datasets` library that reading a data set needs."""

    class ClassLabel:
        names = ("negative", "positive")

    def __init__(self, records):
        super().__init__(calls=[], records=records)

    def load_dataset(self, name, config, *, split):
        self.calls.append((name, config, split))
        if isinstance(self.records, Exception):
            raise self.records
        return self

    features = {"label": ClassLabel(), "text": None}  # noqa: RUF012

    def __iter__(self):
        return iter(self.records)


def test_a_dataset_is_read_with_its_class_names(monkeypatch):
    records = [{"label": 1, "text": "x"}, {"label": 0, "text": None}, {"label": -1, "text": "z"}]
    records.append({"label": None, "text": "none"})
    library = FakeDatasets(records)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read_rows("org/na.me-v1.0:config", split="test") == [
        {"label": "positive", "text": "x"},
        {"label": "negative", "text": ""},
        {"label": "", "text": "z"},
        {"label": "", "text": "none"},
    ]
    assert library.calls == [("org/na.me-v1.0", "config", "test")]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no rows; name another split"),
        (ConnectionError("no net"), "no net; check the id"),
        (RuntimeError("scripts"), "scripts; check the id"),
        (type("DatasetGenerationError", (Exception,), {})("cast"), "cast; check the id"),
    ],
)
def test_a_dataset_that_does_not_load_is_explained(monkeypatch, records, message):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(records))
    with pytest.raises(ValueError, match=message):
        read_rows("name")


def test_columns_are_named_or_counted():
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    assert column(rows, "b") == column(rows, 1) == column(rows, "1") == ["x", "y"]
    assert columns(rows, ("b", 0)) == [("x", "1"), ("y", "2")]
    assert column([{"1": "name first", "0": "z"}], 1) == ["name first"]


def test_a_missing_column_lists_the_others():
    rows = [{"a": "1", "b": "x"}, {"a": "2"}]
    with pytest.raises(ValueError, match="no column 'c'; the columns are 'a', 'b'"):
        column(rows, "c")
    with pytest.raises(ValueError, match="no column 2; the columns are 'a', 'b'"):
        column(rows, 2)
    with pytest.raises(ValueError, match="row 1 has no column 'b', only a"):
        column(rows, "b")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["2024.01.txt", "2024.02.txt"], ["2024.01", "2024.02"]),
        (["train.csv", "train.jsonl", "more.json"], ["more", "train.csv", "train.jsonl"]),
        (["part_1.json.gz", "part_2.json.gz"], ["part_1", "part_2"]),
    ],
)
def test_each_file_of_a_folder_has_a_name_of_its_own(tmp_path, files, names):
    for name in files:
        content = {"csv": b"text\na\n", "txt": b"a"}.get(name[-3:], b'{"text": "a"}\n')
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row["file"] for row in read_rows(str(tmp_path))] == names


def test_a_folder_s_files_may_have_suffixes_in_capitals(tmp_path):
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.TXT").write_text("B")
    (tmp_path / "c.CSV").write_text("text\nC\n")
    (tmp_path / "d.TXT.GZ").write_bytes(gzip.compress(b"D"))
    rows = read_rows(str(tmp_path))
    assert [(row["text"], row["file"]) for row in rows] == list(zip("ABCD", "abcd", strict=True))
