"""Selections that keep nothing, each in one line that says what to change. What is kept: test_rounds, test_settle."""

import pytest
from conftest import chat
from test_rounds import config_for, some_rows

from tokenclean_ray import rounds
from tokenclean_ray.errors import UserError
from tokenclean_ray.masking import EVERYTHING, find_selection
from tokenclean_ray.run import open_run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize(
    ("scope", "of"),
    [
        ("sample", r", scope sample, keeps none of \d+ tokens"),
        ("global", r" keeps none of \d+ response tokens: raise it"),
        ("source", r" keeps none of \d+ response tokens in any source: raise it"),
    ],
)
def test_nothing_kept_is_one_line_in_every_scope(tmp_path, model_pair, scope, of):
    select = {"scope": scope, "keep_ratio": 0.01}
    with pytest.raises(UserError, match=rf"^select.keep_ratio 0.01{of}"):
        rounds.clean(config_for(tmp_path, model_pair, [chat("the fox", "the dog")], select=select))


def test_a_scorer_that_rules_everything_out_is_an_error(tmp_path, model_pair):
    select = {"scorer": "probability", "above": 0.999999}
    with pytest.raises(UserError, match="rules out all"):
        rounds.clean(config_for(tmp_path, model_pair, some_rows(120), select=select))


def test_rows_without_a_response_token_name_what_to_change(tmp_path, model_pair):
    config = config_for(tmp_path, model_pair, some_rows(5))
    with open_run(config, "clean") as run, pytest.raises(UserError, match=r"no response token.*num_subsets"):
        find_selection(run, {}, {}, EVERYTHING)
