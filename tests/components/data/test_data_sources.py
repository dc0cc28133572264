"""Files, directories and hub data sets; what cannot be read says so."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from components.common.core.errors import UserError

ROWS = [
    {"instruction": "Say one", "input": "", "output": "one"},
    {"instruction": "Say two", "input": "", "output": "two"},
]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def answers(run):
    return sorted(row["chosen"][0]["content"] for row in run.train)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(run, tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert answers(run(path)) == ["one", "two"]
    assert sorted(row["id"] for row in run.train) == ["rows-1", "rows-2"]


def test_json_lines_under_the_suffix_json(run, jsonl):
    assert answers(run(jsonl(*ROWS, name="rows.json"))) == ["one", "two"]


def test_parquet(run, tmp_path):
    assert answers(run(write_parquet(tmp_path / "rows.parquet", ROWS))) == ["one", "two"]


def test_blank_lines_carry_no_row(run, jsonl):
    run(jsonl(ROWS[0], "", ROWS[1], "  "))
    assert sorted(row["id"] for row in run.train) == ["source-1", "source-3"]
    assert run.rejected == []


def test_directory_of_files_names_rows_by_file(run, tmp_path):
    folder = tmp_path / "folder"
    write_parquet(folder / "a" / "rows.parquet", ROWS[:1])
    (folder / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n{}\n")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "README.md").write_text("not data")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "rows.json").write_text("not data")
    run(folder, max_rejected_share=0.5)
    assert sorted(row["id"] for row in run.train) == ["rows-1", "rows-1-2"]
    assert [(row["file"], row["line"]) for row in run.rejected] == [("rows.jsonl", 2)]


def deita(text):
    messages = [{"content": text, "role": "user"}, {"content": f"re: {text}", "role": "assistant"}]
    return {"prompt": text, "prompt_id": f"id-{text}", "messages": messages}


def test_hub_data_set_with_splits(run, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshot"
    for split in ("train_sft", "test_sft", "train_gen"):
        write_parquet(snapshot / "data" / f"{split}-00000-of-00001.parquet", [deita(f"{split} {n}") for n in range(3)])
    asked = []
    monkeypatch.setattr("components.data.sources.fetch_hub", lambda *arguments: asked.append(arguments) or snapshot)
    name = "hf://HuggingFaceH4/deita-10k-v0-sft"
    run(name, source_split="train_sft", test_source=name, test_source_split="test_sft", test_rows=500)
    assert sorted(row["id"] for row in run.train) == [f"id-train_sft {n}" for n in range(3)]
    assert sorted(row["id"] for row in run.test) == [f"id-test_sft {n}" for n in range(3)]
    assert asked[1] == (name, "dataset", ["*train_sft*.jsonl", "*train_sft*.json", "*train_sft*.parquet"])
    assert run.statistics["format"] == "deita"


def test_split_name_is_a_whole_word(run, tmp_path):
    write_parquet(tmp_path / "d" / "train-00000-of-00001.parquet", ROWS[:1])
    write_parquet(tmp_path / "d" / "train_gen-00000-of-00001.parquet", ROWS[1:])
    assert answers(run(tmp_path / "d", source_split="train")) == ["one"]


def test_split_that_is_not_there(run, tmp_path):
    write_parquet(tmp_path / "d" / "data" / "train.parquet", ROWS)
    with pytest.raises(UserError, match=r"no file of split 'test'; found data/train.parquet"):
        run(tmp_path / "d", source_split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "rows.jsonl: no usable row: it is empty"),
        ("rows.json", "[]", "rows.json: no usable row: it is empty"),
        ("rows.jsonl", "{oops\n", "no usable row: rows.jsonl line 1: broken JSON: Expecting property name"),
        ("rows.json", '[{"a": 1}, {"b"]', "rows.json: broken JSON: Expecting ':' delimiter: line 1 column 16"),
        ("rows.parquet", "PAR1 not really", "rows.parquet: not a readable Parquet file"),
        ("rows.csv", "a,b\n", "rows.csv: a file must be one of .jsonl, .json, .parquet"),
        (
            "rows.jsonl",
            '{"text": "Hi", "label": 1}\n',
            "the first row has the fields 'text', 'label'; known are capybara: chosen and rejected as whole",
        ),
    ],
)
def test_source_that_cannot_be_read(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        run(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not run.output.exists()


def test_missing_path(run):
    with pytest.raises(UserError, match="--source /nowhere: no such file or directory"):
        run("/nowhere")


def test_empty_directory(run, tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"no .jsonl, .json, .parquet file; found nothing that could be read"):
        run(tmp_path / "d")
