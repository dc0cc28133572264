"""Everything the report shows, gathered once and rendered as HTML, Markdown and plain text."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from components.report.artifacts import Evaluation, Pair, Training, early_and_late_pairs, is_number
from components.report.comparison import MISSING, Table, build_table, number
from components.report.config import ReportConfig
from components.report.curves import CurveGroup, curve_groups
from components.report.paper import PaperTable, paper_tables
from components.report.radar import Radar, mt_bench_radar
from components.report.ranking import Ranking, rankings

# How much of a text a card shows; the rest is counted. 24 pairs stay below about 200 kB.
PROMPT_LIMIT, SEGMENT_LIMIT, CONTEXT_LIMIT = 1600, 2400, 900

_TRAINING_FIGURES = {  # key of the log: heading in the table of trainings, decimals
    "loss": ("loss", 4),
    "eval_loss": ("held-out loss", 4),
    "eval_rewards/margins": ("held-out margin", 4),
    "eval_rewards/accuracies": ("held-out accuracy", 3),
}
_WALL_CLOCK = {  # key of a training's summary: heading in the table of where the time went
    "seconds/generate": "generating",
    "seconds/train": "training",
    "seconds/wait": "waiting",
    "seconds/first_step": "until first step",
    "tokens/generated": "tokens generated",
    "tokens/trained": "tokens trained",
}
_PAIRED_STAGES = ("sapo", "spin")  # stages that make their rejected responses, and log some of the pairs
_TURN = re.compile(r"<\|im_start\|>(\w+)\n|<\|(system|user|assistant)\|>\n")  # headers of our two chat templates
_END_OF_TURN = re.compile(r"(<\|im_end\|>|</s>|<\|endoftext\|>)?\s*$")


@dataclass
class PairCard:
    """A pair with its long texts clipped; `turns` are (role, text) of the prompt."""

    pair: Pair
    turns: list[tuple[str, str]]
    a: str
    b: str
    b_prime: str
    c: str


@dataclass
class PairGroup:
    """What one run sampled, early and late."""

    name: str
    stage: str
    early: list[PairCard]
    late: list[PairCard]

    @property
    def periods(self) -> list[tuple[str, list[PairCard]]]:
        """(heading, cards) of the early and the late pairs, where there are any."""
        return [
            (f"{title}: {_steps(cards)}", cards)
            for title, cards in (("Early", self.early), ("Late", self.late))
            if cards
        ]


@dataclass
class Provenance:
    """Where figures come from: one stage's run time, settings and versions."""

    stage: str
    name: str
    seconds: float | None
    settings: dict[str, Any]
    versions: dict[str, Any]
    summary: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)  # of what the stage read: data, model, code

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the settings as JSON with sorted keys."""
        return (
            hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
            if self.settings
            else MISSING
        )

    @property
    def wall_clock(self) -> str:
        return duration(self.seconds)

    @property
    def versions_text(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items()) or MISSING

    @property
    def inputs(self) -> list[str]:
        """Digests of the data, the model and the code, where the stage recorded them."""
        return [self.digests.get(name, MISSING) for name in ("data", "model", "code")]

    @property
    def details(self) -> str:
        shown = {"settings": self.settings, "summary": self.summary}
        return json.dumps({key: value for key, value in shown.items() if value}, indent=2, ensure_ascii=False)


@dataclass
class Report:
    title: str
    table: Table
    missing: list[str]
    training_header: list[str]
    training_rows: list[list[str]]
    wall_clock_header: list[str]
    wall_clock_rows: list[list[str]]
    paper_tables: list[PaperTable]
    rankings: list[Ranking]
    radar: Radar | None
    curves: list[CurveGroup]
    pairs: list[PairGroup]
    provenance: list[Provenance]
    total_wall_clock: str
    baseline_name: str

    @property
    def has_spin_pairs(self) -> bool:
        return any(group.stage == "spin" for group in self.pairs)


def build_report(config: ReportConfig, evaluations: list[Evaluation], trainings: list[Training]) -> Report:
    """Computes all that the report shows; what is absent goes to `missing` as sentences."""
    table = build_table(evaluations, config.baseline_name)
    header, rows = _training_table(trainings)
    wall_clock = _wall_clock_rows(trainings)
    pairs = _pair_groups(trainings, config.pairs_per_report)
    provenance = [Provenance(t.stage, t.name, t.seconds, t.settings, t.versions, t.summary) for t in trainings]
    provenance += [
        Provenance("evaluation", e.name, e.seconds, e.settings, e.versions, e.benchmarks, e.provenance)
        for e in evaluations
    ]
    beside = paper_tables(table, evaluations)
    return Report(
        title=config.title,
        table=table,
        missing=[
            *_missing(config, evaluations, trainings),
            *table.notes,
            *dict.fromkeys(p.missing for p in beside if p.missing),
        ],
        training_header=header,
        training_rows=rows,
        wall_clock_header=["run", "wall-clock", *_WALL_CLOCK.values()],
        wall_clock_rows=wall_clock,
        paper_tables=beside,
        rankings=rankings(table),
        radar=mt_bench_radar(evaluations),
        curves=curve_groups(trainings),
        pairs=pairs,
        provenance=provenance,
        total_wall_clock=duration(sum(p.seconds or 0.0 for p in provenance)),
        baseline_name=config.baseline_name,
    )


def duration(seconds: float | None) -> str:
    """A time for people: `12.3 s`, `1 min 21 s`, `2 h 05 min`."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def chat_turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of a prompt rendered with one of our chat templates; other text comes back whole with no role."""
    headers = list(_TURN.finditer(prompt))
    if not headers:
        return [("", prompt)]
    turns = [("", prompt[: headers[0].start()].strip())]  # a beginning-of-sequence token, or what a cut left over
    ends = [header.start() for header in headers[1:]] + [len(prompt)]
    for header, end in zip(headers, ends, strict=True):
        turns.append((header[1] or header[2], _END_OF_TURN.sub("", prompt[header.end() : end])))
    return [(role, text) for role, text in turns if text]


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _missing(config: ReportConfig, evaluations: list[Evaluation], trainings: list[Training]) -> list[str]:
    evaluated, trained = [e.name for e in evaluations], [t.name for t in trainings]
    notes = []
    if not evaluations:
        notes.append("No evaluation was given, so there is no table of results.")
    elif config.baseline_name not in evaluated:
        notes.append(f"No evaluation is named {config.baseline_name!r}, so there are no deltas.")
    if not trainings:
        notes.append("No training log was given, so there are no curves and no sampled pairs.")
    elif untrained := [name for name in evaluated if name not in (*trained, config.base_name)]:
        notes.append(f"Without a training log, so without curves: {', '.join(untrained)}.")
    if evaluations and (unevaluated := [name for name in trained if name not in evaluated]):
        notes.append(f"Trained but not evaluated: {', '.join(unevaluated)}.")
    notes += [f"{t.name} has an empty log_history.jsonl or none, so no curves." for t in trainings if not t.history]
    notes += [f"{t.name} logged no pairs.jsonl." for t in trainings if t.stage in _PAIRED_STAGES and not _has_pairs(t)]
    return notes


def _has_pairs(training: Training) -> bool:
    path = training.folder / "pairs.jsonl"
    return path.is_file() and path.stat().st_size > 0


def _training_table(trainings: list[Training]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of trainings; a column without any value is left out."""
    keys = [key for key in _TRAINING_FIGURES if any(t.last(key) is not None for t in trainings)]
    header = ["run", "stage", "steps", "wall-clock", *(_TRAINING_FIGURES[key][0] for key in keys)]
    rows = []
    for training in trainings:
        steps = MISSING if training.steps is None else f"{training.steps:,}"
        last = [(training.last(key), _TRAINING_FIGURES[key][1]) for key in keys]
        figures = [MISSING if value is None else number(value, decimals) for value, decimals in last]
        rows.append([training.name, training.stage, steps, duration(training.seconds), *figures])
    return header, rows


def _wall_clock_rows(trainings: list[Training]) -> list[list[str]]:
    """Where each training's time went; nothing when none of them says."""
    rows = []
    for training in trainings:
        cells = [_wall_clock_cell(key, training.summary.get(key)) for key in _WALL_CLOCK]
        rows.append([training.name, duration(training.seconds), *cells])
    return rows if any(cell != MISSING for row in rows for cell in row[2:]) else []


def _wall_clock_cell(key: str, value: Any) -> str:
    if not is_number(value):
        return MISSING
    return duration(value) if key.startswith("seconds/") else number(value, 0)


def _pair_groups(trainings: list[Training], total: int) -> list[PairGroup]:
    with_pairs = [training for training in trainings if _has_pairs(training)]
    groups = []
    for training, count in zip(with_pairs, shares(total, len(with_pairs)) if with_pairs else [], strict=True):
        early, late = early_and_late_pairs(training, count)
        groups.append(
            PairGroup(training.name, training.stage, [_card(pair) for pair in early], [_card(pair) for pair in late])
        )
    return [group for group in groups if group.early]


def _card(pair: Pair) -> PairCard:
    """The end of the prompt and of A, and the start of B, B' and C: what surrounds the point where they part."""
    return PairCard(
        pair=pair,
        turns=chat_turns(_clipped_start(pair.prompt, PROMPT_LIMIT)),
        a=_clipped_start(pair.a, CONTEXT_LIMIT),
        b=_clipped_end(pair.b, SEGMENT_LIMIT),
        b_prime=_clipped_end(pair.b_prime, SEGMENT_LIMIT),
        c=_clipped_end(pair.c, CONTEXT_LIMIT),
    )


def _clipped_start(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"[{len(text) - limit:,} characters] … {text[-limit:]}"


def _clipped_end(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … [{len(text) - limit:,} characters]"


def _steps(cards: list[PairCard]) -> str:
    first, last = cards[0].pair.step, cards[-1].pair.step
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
