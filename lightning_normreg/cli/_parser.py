"""The parser: help that fits a screen for each group, and errors that say what to do. And where tables are printed."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_normreg.cli._meant import remedies
from lightning_normreg.cli._subcommands import PROGRAM, epilog

# What jsonargparse says of types is for those who know them.
PLAIN_WORDS = (
    (r"\n *(Subtypes: .*|Given value type: .*|Errors:|- Expected a <class 'NoneType'>)", ""),
    (r"\n *(- )?Does not validate against any of the Union subtypes", ""),
    (r"\n\n *- Expected a path but \S+(?<!yaml)(?<!json) either not accessible or invalid", ""),
    (r"\n *- Expected '.*' to be a subclass of ReduceLROnPlateau\.", ""),
    (r"\n *- Not a valid subclass of \w+\n *Subclass types expect one of:(\n *- a .*)*", ""),
    (r"\n *What it takes is shown by .*", ""),  # an option of a parser inside of this one
    (r"\n *- Problem with given class_path 'lightning_normreg\.cli\._groups\.\w+':", ""),
    (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
    (r"Type \S*Callable.* expects a function or a callable class: ", ""),
    (r"NestedArg\(key='(.*?)', val='?(.*?)'?\)", r"\1=\2"),
    (r"(\n *Given|\. Got) value: Namespace\(.*\)", ""),
    (r"Expected a dot import path string: (\S+)", r"No class of this name is known: \1"),
    (r"<class '([\w.]+)'>", r"\1"),
)
ALIAS = """A pattern that begins with * is quoted in YAML: ["*.weight"]. In a shell: --KEY '["*.weight"]'."""
REMEDIES = {
    "SequentialLR": "In YAML, a SchedulerSequence takes the place of SequentialLR.",
    "ChainedScheduler": "In YAML, a SchedulerChain takes the place of ChainedScheduler.",
    "scanning an alias": ALIAS,
    "undefined alias": ALIAS,
    "value: *": ALIAS,
    "value: [*": ALIAS,
    "_dataloader` must be implemented": "A data module is given by --data.",
}


class Parser(ArgumentParser):
    """That of subcommands which are not LightningCLI's; those have it mixed into Lightning's own."""

    _folded: Sequence[argparse.Action] = ()

    def format_usage(self) -> str:
        """One line: there are a hundred options."""
        config = "[--config FILE] " if "--config" in self._option_string_actions else ""
        self.usage = f"{self.prog.replace(' [options]', '')} {config}[--KEY VALUE ...]"
        return super().format_usage()

    def format_help(self, *args: Any, **options: Any) -> str:
        """The groups, then the epilog as it is."""
        self.format_usage()
        epilog, self.epilog = self.epilog, None
        helps = [action.help for action in self._folded]
        for action in self._folded:
            action.help = argparse.SUPPRESS  # no longer than this: what has no help is not saved in a config.yaml
        text = super().format_help(*args, **options)
        self.epilog = epilog
        for action, shown in zip(self._folded, helps, strict=True):
            action.help = shown
        return f"{text}\n{epilog}\n" if epilog else text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say it in plain words, with a remedy, and exit with 2."""
        for pattern, words in PLAIN_WORDS:
            message = re.sub(pattern, words, message)
        message = "\n".join(dict.fromkeys(message.rstrip().split("\n")))
        known = [remedy for word, remedy in REMEDIES.items() if word in message]
        known += filter(None, remedies(message, getattr(ex, "subcommand_parser", self)))
        # A parser inside of this one may have said it already.
        super().error("\n  ".join([message, *(said for said in dict.fromkeys(known) if said not in message)]), ex)

    def add_method_arguments(self, theclass: Any, themethod: str, *args: Any, **options: Any) -> Any:
        """Put the method's name above its arguments, in place of its docstring."""
        added = super().add_method_arguments(theclass, themethod, *args, **options)
        self._action_groups[-1].title = themethod
        return added

    def title(self, key: str, title: str, description: str | None = None) -> None:
        """Put words for people above a group."""
        group = (self.groups or {})[key]
        group.title, group.description = title, description

    def fold(self, key: str) -> None:
        """Show the names of a group's arguments in one paragraph, and their help on ``--<key>.help``."""
        group = (self.groups or {})[key]
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        names = [a.option_strings[0].removeprefix(f"--{key}.") for a in actions]
        shown = ", ".join(name for name in names if not name.endswith((".help", f"--{key}")))
        self._folded = actions
        group.description = textwrap.fill(f"{group.description} {shown}.", 90)
        group.add_argument(f"--{key}.help", action=_Unfold, title=group.title, folded=actions)


def parser_of(subcommand: str, description: str) -> Parser:
    """A parser for a subcommand that needs no Lightning, which takes long to import."""
    prefix = "PL"  # of environment variables, as LightningCLI has it
    return Parser(prog=f"{PROGRAM} {subcommand}", description=description, epilog=epilog(subcommand), env_prefix=prefix)


def add_optional(group: Any, key: str, kind: Any, metavar: str | None = None, text: str | None = None) -> None:
    """Add an argument that is None where it is left out."""
    group.add_argument(f"--{key}", type=kind | None, default=None, metavar=metavar, help=text)


def console() -> Console:
    """The terminal, or a page that is wide enough for every table where the output is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=160)


class _Unfold(argparse.Action):
    """Show a folded group and exit."""

    def __init__(self, option_strings: Any, dest: Any, title: Any, folded: Any, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help="Show them all.")
        self.title, self.folded = title, folded

    def __call__(self, parser: Any, *args: Any) -> NoReturn:
        formatter = parser._get_formatter()
        formatter.start_section(self.title)
        formatter.add_arguments(self.folded)
        formatter.end_section()
        print(formatter.format_help())
        raise SystemExit(0)
