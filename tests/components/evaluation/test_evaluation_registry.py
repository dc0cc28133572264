"""A benchmark is an entry: the settings, the help, the run and the results follow from it."""

import json
import sys
import types
from pathlib import Path

import pytest

from components.evaluation.__main__ import main
from components.evaluation.benchmark import Benchmark, Metric, Outcome
from components.evaluation.context import load_benchmark
from components.evaluation.registry import BENCHMARKS


def test_every_entry_names_a_module_with_its_functions():
    for name in BENCHMARKS:
        module = load_benchmark(name)
        assert callable(module.check) and callable(module.run)


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark "length": the number of letters in the model's name."""
    module = types.ModuleType("length_benchmark")
    module.check = lambda name, config: "count letters"  # type: ignore[attr-defined]

    def run(name, config, context):
        entry = Metric(
            benchmark=name,
            metric="letters",
            value=float(len(context.name)),
            stderr=None,
            interval=None,
            n=1,
            higher_is_better=True,
            description="letters of the name",
        )
        return Outcome([entry])

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "length_benchmark", module)
    monkeypatch.setitem(BENCHMARKS, "length", Benchmark(module="length_benchmark", about="letters of the model's name"))


@pytest.mark.usefixtures("another")
def test_another_benchmark_is_an_entry(micro_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--model", str(micro_model), "--benchmarks", "length", "--name", "four", "--output", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [(entry["metric"], entry["value"]) for entry in results["results"]] == [("letters", 4.0)]
    assert "length/letters" in capsys.readouterr().out
    main(["--help"])
    assert "letters of the model's name" in capsys.readouterr().out
