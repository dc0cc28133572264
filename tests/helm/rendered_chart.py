"""The chart, rendered by the real Helm engine."""

from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "helm" / "sapo-pipelines"
NAMESPACE = "team-a"
CI = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


class StrictLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, as Helm does when it installs and PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


def ci_values(name: str) -> dict[str, Any]:
    """Values of `ci/NAME-values.yaml`."""
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text(encoding="utf-8"))


def rendered(values: dict[str, Any] | None = None) -> dict[str, str]:
    """Template -> text; refuses what values.schema.json refuses, as `helm install` does."""
    chart().validate_schema(values or {})
    texts = chart().render(values or {}, name="sapo", namespace=NAMESPACE)
    return {path.removeprefix("sapo-pipelines/templates/"): text for path, text in texts.items()}


def objects(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every Kubernetes object that these values make."""
    made = []
    for path, text in rendered(values).items():
        if path != "NOTES.txt":
            made += [document for document in yaml.load_all(text, StrictLoader) if document]
    return made


def find(made: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one object of that kind and name."""
    (found,) = (item for item in made if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


def plain_environment(container: dict[str, Any], places: dict[str, Path]) -> dict[str, str]:
    """Variables that a container states as text, with a test's directories for its mounts, over those of the images."""
    stated = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    for mount, place in places.items():
        stated = {name: value.replace(mount, str(place)) for name, value in stated.items()}
    return {"PYTHONPATH": "/opt/sapo", "PYTHONSAFEPATH": "1"} | stated
