"""A few handwritten rows of each leaderboard data set and of IFEval, in the files and columns that the hub has."""

import json
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

Rows = list[dict[str, Any]]
CITIES = ["Rome", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Paris", "Delhi"]


def write_all(folder: Path) -> Path:
    """Copies of all seven data sets, as `hf download --local-dir` lays them out."""
    write(folder / "allenai/ai2_arc", {"ARC-Challenge": {"train": arc(25), "validation": arc(2), "test": arc(4)}})
    write(folder / "Rowan/hellaswag", {"default": {"train": hellaswag(10), "validation": hellaswag(4)}})
    write(folder / "cais/mmlu", {name: {"dev": mmlu(5), "test": mmlu(2)} for name in subjects()})
    write(folder / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": truthfulqa(4)}})
    write(folder / "allenai/winogrande", {"winogrande_xl": {"train": winogrande(5), "validation": winogrande(4)}})
    write(folder / "openai/gsm8k", {"main": {"train": gsm8k(5), "test": gsm8k(4)}})
    write(folder / "google/IFEval", {"default": {"train": ifeval()}})
    return folder


def write(folder: Path, configs: dict[str, dict[str, Rows]]) -> None:
    """A data set's JSON Lines, and the header of its README.md, which tells `datasets` what is where."""
    listed = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def subjects() -> list[str]:
    """MMLU's subjects, from lm-eval's own tasks."""
    index = TaskManager(include_defaults=False, include_path=[folder_of("mmlu/default")]).task_index
    return sorted(entry.cfg["dataset_name"] for entry in index.values() if entry.cfg and "dataset_name" in entry.cfg)


def folder_of(name: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / name


def arc(count: int) -> Rows:
    return [
        {
            "id": f"arc-{i}",
            "question": f"Which city is number {i}?",
            "choices": {"text": [CITIES[(i + k) % 8] + " town" * (k % 2) for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(count)
    ]


def hellaswag(count: int) -> Rows:
    return [
        {
            "ind": i,
            "activity_label": "Travelling",
            "ctx_a": f"A woman leaves {CITIES[i % 8]}.",
            "ctx_b": "she",
            "ctx": f"A woman leaves {CITIES[i % 8]}. she",
            "endings": [f"goes to {CITIES[(i + k) % 8]}" + " at once" * (k % 2) + "." for k in range(4)],
            "label": str(i % 4),
        }
        for i in range(count)
    ]


def mmlu(count: int) -> Rows:
    return [
        {"question": f"What is {i} + 1?", "choices": [str(i + k) for k in range(4)], "answer": i % 4}
        for i in range(count)
    ]


def truthfulqa(count: int) -> Rows:
    return [
        {
            "question": f"Is {CITIES[i % 8]} a city?",
            "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["Yes, it is", "It is one", "No", "It is a fruit"], "labels": [1, 1, 0, 0]},
        }
        for i in range(count)
    ]


def winogrande(count: int) -> Rows:
    return [
        {
            "sentence": f"Ann took the bus to {CITIES[i % 8]} and not Beth, because _ had a ticket.",
            "option1": "Ann",
            "option2": "Beth",
            "answer": "12"[i % 2],
        }
        for i in range(count)
    ]


def gsm8k(count: int) -> Rows:
    return [
        {"question": f"Tom has {i} coins and gets 1,000. How many?", "answer": f"{i} + 1000\n#### {1000 + i}"}
        for i in range(count)
    ]


def ifeval() -> Rows:
    return [
        {
            "key": 1,
            "prompt": "Write without commas and with 'river' in it.",
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["river"]}],
        },
        {
            "key": 2,
            "prompt": "Write at least 3 sentences.",
            "instruction_id_list": ["length_constraints:number_sentences"],
            "kwargs": [{"num_sentences": 3, "relation": "at least"}],
        },
        {
            "key": 3,
            "prompt": "Answer in French, in quotation marks.",
            "instruction_id_list": ["language:response_language", "startend:quotation"],
            "kwargs": [{"language": "fr"}, {}],
        },
    ]
