"""The example of the component's README runs as it stands there."""

import re
from pathlib import Path

from components.common.models import load_model

README = Path(__file__).parents[3] / "components" / "sapo" / "README.md"


def test_example_runs(tmp_path, monkeypatch, micro_model):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) < 40
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model").symlink_to(micro_model)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    load_model("runs/example/final")
