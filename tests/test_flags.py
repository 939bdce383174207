"""The flags of the scripts that decode: each has a help text with its default, and a row in docs/decoding.md."""

import argparse
import importlib
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from blockwise.decoding.settings import Settings, add_flags


class Parsed(Exception):
    """Ends a script where it has made its parser."""


@pytest.fixture
def flags(monkeypatch):
    """flags(script) -> {flag: its argparse action} of a script, without what argparse itself adds."""

    def stop(parser, *_):
        raise Parsed(parser)

    def read(name):
        script = importlib.import_module(name)
        with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
            patch.setattr(sys, "argv", [f"{name}.py"])
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            script.main()
        parser = caught.value.args[0]
        either = {id(action) for group in parser._mutually_exclusive_groups for action in group._group_actions}
        return {
            action.option_strings[0]: (action, action.required or id(action) in either)
            for action in parser._actions
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings
        }

    return read


@pytest.mark.parametrize("script", ["generate", "chat", "eval"])
def test_each_flag_says_what_it_does_and_its_default(flags, script):
    found = flags(script)
    assert "--model" in found and {f"--{field.name}" for field in fields(Settings)} <= found.keys()
    for flag, (action, needed) in found.items():
        text = (action.help or "") % vars(action)
        assert len(text.split()) >= 3, f"{script}.py {flag} has no help text"
        if not needed:
            assert f"(default: {shown(action.default)}" in text, f"{script}.py {flag} does not say its default: {text}"


def shown(default):
    """How a help text has a default; that of a flag without a value of its own may be any word."""
    if default is None:
        return ""
    return "off" if default is False else default or "none" if isinstance(default, list) else str(default)


def test_the_table_of_settings_has_each_flag_with_its_default():
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    section = (ROOT / "docs/decoding.md").read_text().split("## Settings")[1].split("\n## ")[0]
    for action in parser._actions:
        (row,) = [row for row in section.splitlines() if row.startswith(f"| `{action.option_strings[0]}` | ")]
        default = row.split("|")[2].strip()
        assert default == shown(action.default) or action.default is None, row
