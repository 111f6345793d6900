import gzip
import json
import sys

import pytest

from fslora.data.files import read_file


def written(folder, name, text):
    path = folder / name
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_tsv_takes_quotes_as_they_are(tmp_path, end):
    path = written(
        tmp_path, "t.tsv" + end, 'label\ttext\r\n1\t"He said\r\n0\tso" \u2028 "\'\r\n\r\n'
    )
    assert read_file(path) == [
        {"label": "1", "text": '"He said'},
        {"label": "0", "text": 'so" \u2028 "\''},
    ]


def test_csv_reads_quotes_commas_and_line_ends_in_fields(tmp_path):
    path = written(tmp_path, "t.csv", '\ufefflabel,text\n1,"one, ""two""\nthree"\n\n2,x\n')
    assert read_file(path) == [
        {"label": "1", "text": 'one, "two"\nthree'},
        {"label": "2", "text": "x"},
    ]


@pytest.mark.parametrize(("name", "line"), [("t.tsv", "u\tv\nx\ty\n"), ("t.csv", "u,v\nx,y\n")])
def test_without_header_columns_are_positions(tmp_path, name, line):
    rows = read_file(written(tmp_path, name, line), header=False)
    assert rows == [{"0": "u", "1": "v"}, {"0": "x", "1": "y"}]


ROWS = [{"a": "x", "b": 1}, {"a": None, "b": [True, "é"]}]
READ = [{"a": "x", "b": "1"}, {"a": "", "b": '[true, "é"]'}]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.json.gz", "t.jsonl.gz"])
@pytest.mark.parametrize("as_list", [True, False])
def test_json_is_a_list_or_lines_whatever_the_suffix(tmp_path, name, as_list):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n"
    text = json.dumps(ROWS, indent=2) if as_list else lines
    assert read_file(written(tmp_path, name, text)) == READ


@pytest.mark.parametrize("end", ["", ".gz"])
def test_parquet_values_become_strings(tmp_path, end):
    import pyarrow
    from pyarrow import parquet

    plain = tmp_path / "plain"
    parquet.write_table(pyarrow.table({"text": ["x", None], "label": [1, 0]}), plain)
    path = written(tmp_path, "t.parquet" + end, plain.read_bytes())
    assert read_file(path) == [{"text": "x", "label": "1"}, {"text": "", "label": "0"}]


def test_text_that_parquet_has_as_bytes_is_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = {"text": ["caf\u00e9".encode(), b""], "image": [b"\xff\xd8", None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    rows = read_file(tmp_path / "t.parquet")
    assert [row["text"] for row in rows] == ["caf\u00e9", ""]
    assert rows[1]["image"] == ""


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'fslora\[data\]'"):
        read_file(written(tmp_path, "t.parquet", "x"))


def test_text_is_one_row(tmp_path):
    assert read_file(written(tmp_path, "t.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]


def test_play_is_a_row_per_turn(tmp_path):
    text = "ANN:\nHello: you\nthere.\n\n\nBOB:\n\nANN:\nTwo\n\nparagraphs.\n\nBOB:\nBye.\n"
    assert read_file(written(tmp_path, "t.txt", text), play=True) == [
        {"speaker": "ANN", "text": "Hello: you\nthere."},
        {"speaker": "ANN", "text": "Two\n\nparagraphs."},
        {"speaker": "BOB", "text": "Bye."},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "a\tb\n1\t2\n\n1\n", "line 4 has 1 fields, but the first line has 2"),
        ("t.csv", 'a,b\n"x\ny",2\n1,2,3\n', "line 4 has 3 fields, but the first line has 2"),
        ("t.csv", 'a,b\n"x,2\n', "line 2: unexpected end"),
        ("t.csv", 'a,b\nx,1\n"y"z,2\n', "line 3: .*quote in it doubled"),
        ("t.tsv", "a\ta\n1\t2\n", r"line 1 names a column twice.*--no-header"),
        ("t.tsv", "a\tb\n", "no rows"),
        ("t.csv", "", "no rows"),
        ("t.txt", " \n", "no rows"),
        ("t.json", "[]", "no rows"),
        ("t.jsonl", '{"a": 1}\n\n{"a": \n', r"line 3 is no JSON .*list of objects"),
        ("t.json", "[1]", "item 1 is no object"),
        ("t.jsonl", '{"a": 1}\n"b"\n', "line 2 is no object"),
        ("t.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', r"line 2 has half a character, '\\ud83d'"),
        ("t.json", '[{"a": "\\ud83d\\ude00"}, {"\\ude00": 1}]', "item 2 has half a character"),
        ("t.json", '[{"a": ' + "[" * 100_000, "nested too deeply"),
        ("t.tsv", b"a\tb\n1\t\xff\n", "line 2 is not UTF-8"),
        ("t.xls", "a", r"unknown file type; known are .*\.tsv"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_file(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"a\tb\n",
        lambda whole: whole[:-9],
        lambda whole: whole[:20] + b"\xff" * 20 + whole[40:],
    ],
    ids=["plain", "short", "overwritten"],
)
def test_a_damaged_gzip_file_is_refused(tmp_path, damaged):
    whole = gzip.compress("".join(f"{n}\t{n * n}\n" for n in range(100)).encode())
    (tmp_path / "t.tsv.gz").write_bytes(damaged(whole))
    with pytest.raises(ValueError, match=r"t\.tsv\.gz: "):
        read_file(tmp_path / "t.tsv.gz")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t\.parquet: .*[Pp]arquet"):
        read_file(written(tmp_path, "t.parquet", "PAR1 no more"))


def test_a_speaker_may_have_blanks_behind_the_colon(tmp_path):
    path = written(tmp_path, "t.txt", "ROMEO:\nI speak.\n\nJULIET: \nI answer.\n")
    assert [row["speaker"] for row in read_file(path, play=True)] == ["ROMEO", "JULIET"]


def test_the_play_reader_refuses_what_is_no_play(tmp_path):
    with pytest.raises(ValueError, match="drop --reader play"):
        read_file(written(tmp_path, "t.tsv", "a\tb\n"), play=True)
    with pytest.raises(ValueError, match="a play's turn is NAME:"):
        read_file(written(tmp_path, "t.txt", "Once upon a time.\n"), play=True)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "texts.txt").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*texts.txt: Is a directory"):
        read_file(tmp_path / "texts.txt")


def test_a_csv_field_may_be_long(tmp_path):
    long = "x" * 200_000
    path = written(tmp_path, "t.csv", f"text,label\n{long},a\n")
    assert read_file(path) == [{"text": long, "label": "a"}]
