"""Which rows are held out, in which order rows come, and their counterparts for the paired methods."""

import hashlib
from collections import defaultdict
from dataclasses import replace

from components.common.core.errors import UserError
from components.data.rows import Example, characters


def split(examples: list[Example], test_rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows; whole conversations go to one side.

    Depends on the conversations and the seed only, not on the order of the rows.
    """
    groups = defaultdict(list)
    for example in examples:
        groups[example.conversation].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for conversation in sorted(groups, key=lambda name: _rank(name, seed)):
        fits = len(test) + len(groups[conversation]) <= test_rows
        (test if fits else train).extend(groups[conversation])
    return train, test


def shuffled(examples: list[Example], seed: int) -> list[Example]:
    return sorted(examples, key=lambda example: _rank(example.digest, seed))


def _rank(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def with_rejected(examples: list[Example], split_name: str) -> list[Example]:
    """Gives rows without a `rejected` one: the response of another conversation that is nearest in length.

    Raises:
        UserError: there is no other conversation.
    """
    by_length = sorted(examples, key=lambda example: (characters(example.row["chosen"]), example.digest))
    place = {example.digest: number for number, example in enumerate(by_length)}
    paired = []
    for example in examples:
        if "rejected" not in example.row:
            other = _nearest_other(by_length, place[example.digest])
            if other is None:
                raise UserError(
                    f"rejected = other_conversation needs two conversations or more among the {split_name} rows"
                )
            example = replace(example, row={**example.row, "rejected": other.row["chosen"]})
        paired.append(example)
    return paired


def _nearest_other(by_length: list[Example], position: int) -> Example | None:
    """The nearest neighbour in the list that is of another conversation and says something else."""
    own = by_length[position]
    steps = (step for distance in range(1, len(by_length)) for step in (distance, -distance))
    neighbours = (by_length[position + step] for step in steps if 0 <= position + step < len(by_length))
    return next(
        (n for n in neighbours if n.conversation != own.conversation and n.row["chosen"] != own.row["chosen"]), None
    )
