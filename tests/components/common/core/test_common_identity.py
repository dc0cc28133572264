"""Whether two runs are the same: what counts, what does not, and what a refusal says."""

import dataclasses
import enum
from typing import Any, ClassVar

import pytest

from components.common.core.errors import UserError
from components.common.core.identity import (
    Identity,
    Role,
    differences,
    digest,
    digest_of_rows,
    identity_of,
    plain,
    refuse_other_run,
    roles_of,
)
from components.common.stage.config import setting


class Library:
    """Stands for a library's config class and the table of its roles."""

    inherited_roles: ClassVar = {"steps": Role.RESULT, "logging": Role.OPERATION}


@dataclasses.dataclass(kw_only=True)
class Config(Library):
    steps: int = 3
    logging: int = 10
    unheard_of: int = 0
    beta: float = setting(0.1, "Strength.")
    name: str = setting("a", "Name.", role=Role.SCOPE)
    data: str = setting("d", "Data.", role=Role.INPUT)


def identity(data: str | None = "rows", **settings: Any) -> Identity:
    return identity_of([Config(**settings)], {"data": data}, versions={"torch": "2.9"})


def test_a_role_is_given_by_the_setting_or_by_the_table_and_else_the_result_depends_on_it():
    roles = roles_of(Config)
    assert roles["logging"] == Role.OPERATION
    assert roles["name"] == Role.SCOPE
    assert roles["unheard_of"] == Role.RESULT


def test_what_the_result_does_not_depend_on_does_not_count():
    assert identity(logging=1) == identity()
    assert digest(identity(logging=1)) == digest(identity())


def test_every_difference_is_named_with_what_it_was_and_is():
    with pytest.raises(UserError) as error:
        refuse_other_run("runs/out", identity(), identity(beta=0.2, steps=4, data="other rows"))
    assert str(error.value) == (
        "runs/out: is of another run: beta was 0.1, is 0.2; steps was 3, is 4; other data; "
        "give the settings it was made with, another --output, or --overwrite to start anew"
    )


def test_the_scope_counts_once_the_output_is_complete():
    refuse_other_run("out", identity(), identity(name="b"))
    with pytest.raises(UserError, match="name was 'a', is 'b'"):
        refuse_other_run("out", identity(), identity(name="b"), complete=True)


def test_an_input_that_was_not_looked_at_is_not_compared():
    assert differences(identity(), identity(data=None)) == []
    assert differences(identity(), identity(data="others")) == ["other data"]


def test_versions_are_written_down_and_not_compared():
    newer = identity()
    newer["versions"] = {"torch": "3.0"}
    assert differences(identity(), newer, complete=True) == []


@pytest.mark.parametrize("saved", [None, {}, {"settings": {"beta": 0.1}, "data": "x"}, {**identity(), "schema": 0}])
def test_a_record_of_another_form_is_refused_in_one_line(saved):
    with pytest.raises(UserError, match="out: has no record of its run that this version can compare; give the"):
        refuse_other_run("out", saved, identity())


def test_a_setting_that_only_one_of_them_knows_is_named():
    older = identity()
    del older["settings"]["beta"]
    assert differences(older, identity()) == ["beta was not known, is 0.1"]


def test_long_values_are_cut():
    (said,) = differences(identity(), {**identity(), "settings": {**identity()["settings"], "beta": "x" * 999}})
    assert len(said) < 100


class Kind(enum.Enum):
    DPO = "dpo"


def test_equal_values_are_equal_in_whatever_form_they_were_given():
    assert plain({"a": (1, 2.0)}) == plain({"a": [1.0, 2]})
    assert plain(Kind.DPO) == "dpo"
    assert plain({"b", "a"}) == ["a", "b"]
    assert plain(True) is True
    assert plain(2.5) == 2.5


def test_rows_are_told_apart_by_content_and_order():
    rows = [{"id": "a", "ids": [1]}, {"id": "b", "ids": [2]}]
    assert digest_of_rows(rows) == digest_of_rows(tuple(dict(reversed(row.items())) for row in rows))
    assert digest_of_rows(rows) != digest_of_rows(rows[::-1])
    assert digest_of_rows(rows, ["ids"]) == digest_of_rows([{"ids": [1]}, {"ids": [2]}])
