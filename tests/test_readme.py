"""What the README shows is what there is: defaults, commands, files."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT

from tokenclean_ray.cli import _parser
from tokenclean_ray.config import Config

README = (ROOT / "README.md").read_text()
CONFIGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.S)]
# where the README shows an example in place of the default
EXAMPLES = {
    *("output", "data.path", "data.warmup", "data.held_out", "model.base", "model.reference"),
    *("train.data", "train.model"),
}
COMMANDS = re.findall(r"^(?:\$ )?(tokenclean [a-z].+)$|`(tokenclean [a-z]+ [^`]+)`", README, re.M)


def settings(values, known, key=""):
    """Key, shown value and default of every setting."""
    for name, value in values.items():
        if isinstance(value, dict) and value and isinstance(known[name], dict):
            yield from settings(value, known[name], f"{key}{name}.")
        else:
            yield f"{key}{name}", value, known[name]


def test_the_configs_show_the_defaults():
    known = Config(output="x").model_dump(mode="json")
    shown = [one for config in CONFIGS[:2] for one in settings(config, known)]
    assert len(shown) > 40
    assert [(key, value) for key, value, default in shown if value != default and key not in EXAMPLES] == []


@pytest.mark.parametrize("command", sorted({one or other for one, other in COMMANDS}))
def test_the_commands_are_there(command):
    _, *arguments = shlex.split(command, comments=True)
    _parser().parse_known_args(arguments)  # it exits where it knows them not


def test_the_tree_has_every_module():
    tree = README[README.index("tokenclean_ray/     (") :]
    modules = {path.name for path in (ROOT / "tokenclean_ray").glob("*.py")}
    listed = set(re.findall(r"^  (\w+\.py)", tree, re.M))
    assert modules - {"__init__.py", "__main__.py"} == listed - {"clean.py", "oracle.py"}
    for folder in ("jobs", "cluster"):
        assert all(path.name in tree for path in (ROOT / folder).iterdir() if path.is_file())
