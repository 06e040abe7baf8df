"""Reads a configuration dataclass from a command's flags and YAML files, without Keras."""

import argparse
import copy
import dataclasses
import shutil
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

import docstring_parser
import jsonargparse
import yaml
from docstring_parser import DocstringStyle

from dskd_keras import yaml_files
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.experiment.config import ExperimentConfig

Config = TypeVar("Config", bound=ExperimentConfig)
# Of a flag: a list of 1,000 seeds has fewer.
_MOST_LETTERS = 20_000
# What the parser raises for a value that it refuses, or that is nested too deep for it.
_REFUSED = (jsonargparse.ArgumentError, RecursionError, TypeError, ValueError)

# The groups of `--help`, by the first field of each.
_GROUPS = {
    "teacher": "models", "dataset": "data", "student_layers": "objective",
    "dtype_policy": "training", "teacher_weights": "the teacher", "run_dir": "files",
    "tuner": "search", "ranges.temperature": "what is searched",
    "search_seed": "how the search goes",
}  # fmt: skip


class _HelpFormatter(argparse.HelpFormatter):
    """Says the default of each field, and choices where there are some, but not its type."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size()[0]))


def parse(config_class: type[Config], argv: Sequence[str], command: str) -> Config:
    """Reads a configuration from flags and YAML files.

    `--pair NAME`, in upper or lower case, reads the file of that pair, `--config FILE` any other
    file on top of it, and other flags come on top of both, in whatever order they are given.

    Args:
        config_class: `ExperimentConfig`, or one derived from it.
        argv: The command's arguments.
        command: The command's name, for `--help`.

    Returns:
        A `config_class`.

    Raises:
        InputError: An unknown pair, field or value; the message is one line.
        SystemExit: After `--help` or `--print_config`.
    """
    kinds = _kinds(config_class)
    flags = _split(argv, kinds)
    if "help" in flags:
        _parser(config_class, command).print_help()
        raise SystemExit(0)
    given: dict[str, Any] = {}
    if "pair" in flags:
        pairs = pair_files()
        found = {name.casefold(): name for name in pairs}.get(flags["pair"].casefold())
        if found is None:
            raise unknown_name("pair", flags["pair"], pairs)
        given |= _read_file(pairs[found], kinds)
        flags["pair"] = found  # as the file spells it
    for path in flags.pop("config", ()):
        given |= _read_file(Path(path), kinds)
    show = flags.pop("print_config", False)
    given |= flags
    if str(given.get("method")) == "ce" and "student" in given:
        given.setdefault("teacher", given["student"])  # nobody teaches
    for field in dataclasses.fields(config_class):
        if (
            field.default is field.default_factory is dataclasses.MISSING
            and field.name not in given
        ):
            raise InputError(
                f"{field.name}: not given. Choose a pair (--pair NAME) or name a model. Pairs: "
                f"{', '.join(pair_files())}."
            )
    parser = _parser(config_class, command)
    try:
        values = parser.parse_object(_nested(given), defaults=False).as_dict()
    except _REFUSED:
        raise _first_wrong(parser, given, kinds) from None
    config = _build(config_class, values)
    if show:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return config


def pair_files() -> dict[str, Path]:
    """Returns the YAML files of the pairs by name."""
    package = Path(__file__).parent.parent
    # In an installed package they are inside, in a clone beside it.
    folder = next(
        path for path in (package / "configs", package.parent / "configs") if path.is_dir()
    )
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _parser(config_class: type[Config], command: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=command,
        usage=f"{command} --pair NAME [--FIELD VALUE ...]",
        formatter_class=_HelpFormatter,
        description=(config_class.__doc__ or "").partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="A YAML file with any of these fields.")
    parser.add_argument("--print_config", action="store_true", help="Show the result as YAML.")
    _add_fields(parser, parser, config_class, "")
    return parser


def _add_fields(
    parser: jsonargparse.ArgumentParser, group: Any, config_class: type, prefix: str
) -> Any:
    """Adds a dataclass's fields to their groups; returns the group of the last one."""
    # Field by field: `add_class_arguments` looks for all kinds of classes, in twice the time.
    helps: dict[str, str | None] = {}
    for base in reversed(config_class.__mro__):
        described = docstring_parser.parse(base.__doc__ or "", DocstringStyle.GOOGLE)
        helps |= {part.arg_name: part.description for part in described.params}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(kind := hints[field.name]):
            group = _add_fields(parser, group, typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        name = f"{prefix}{field.name}"
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        options: dict[str, Any] = {"required": True}
        if field.default is not dataclasses.MISSING:
            options = {"default": field.default}
        elif field.default_factory is not dataclasses.MISSING:
            options = {"default": field.default_factory()}
        text = " ".join((helps.get(field.name) or "").split())
        if "default" in options and options["default"] is not None:
            text += f" Default: {_shown(options['default'])}."
        options["metavar"] = "NAME" if name == "pair" else _placeholder(kind)
        # Beside --config: a pair is a file of settings, too.
        place = parser if name == "pair" else group
        action = place.add_argument(f"--{name}", type=kind, help=text, **options)
        # Without the form that appends to a list, `--seeds+`: a list is given as a whole.
        action.option_strings = action.option_strings[:1]
    return group


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _placeholder(kind: Any) -> str:
    """Returns what stands for a value in the help."""
    item = _of_list(kind)
    if item is not None:
        return f"{_placeholder(item)} ..."
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(typing.get_args(kind))}}}"
    if isinstance(kind, UnionType):
        return _placeholder(typing.get_args(kind)[0])
    return {int: "N", float: "X", bool: "{true,false}"}.get(kind, "TEXT")


def _is_switch(kind: Any) -> bool:
    return kind is bool or (isinstance(kind, UnionType) and bool in typing.get_args(kind))


def _kinds(config_class: type) -> dict[str, Any]:
    """Returns the type of every field by its name, `outer.inner` within a nested dataclass."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {
                f"{name}.{inner}": part for inner, part in _kinds(typing.cast(type, kind)).items()
            }
        else:
            kinds[name] = kind
    return kinds


def _split(argv: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags' texts by field: a list is YAML's, a bare switch is "true"."""
    flags: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, inline = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help"):
            return {"help": True}
        if not argument.startswith("--") or name not in {*kinds, "config", "print_config"}:
            raise unknown_name("option", argument, [f"--{known}" for known in kinds])
        values = [inline] if equals else []
        while rest and not equals and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        kind = kinds.get(name)
        # A field may take one name or a list of them.
        takes_one = isinstance(kind, UnionType) and str in typing.get_args(kind)
        is_whole = (takes_one and len(values) == 1) or (
            values and values[0].startswith(("[", "null"))
        )
        if _of_list(kind) is not None and not is_whole:
            flags[name] = f"[{', '.join(values)}]"
        elif name == "print_config" or (_is_switch(kind) and not values):
            flags[name] = "true"
        elif len(values) != 1:
            raise wrong(name, " ".join(values), "one value")
        elif name == "config":
            flags.setdefault(name, []).append(values[0])
        elif name == "pair" and name in flags:
            # Elsewhere the last one counts. Here each stands for a file of settings.
            raise InputError(f"pair: given twice, {flags[name]!r} and {values[0]!r}. Give one.")
        else:
            flags[name] = values[0]
        if len(flags[name]) > _MOST_LETTERS:
            raise wrong(name, flags[name], f"a text of at most {_MOST_LETTERS:,} letters")
    return flags


def _read_file(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that a YAML file gives, `outer.inner` for a nested one."""
    values = yaml_files.read("config", path)
    given = {}
    for name, value in values.items():
        inner = [known.partition(".")[2] for known in kinds if known.startswith(f"{name}.")]
        if not inner:
            if name not in kinds:
                raise unknown_name(f"config '{path}'", name, kinds)
            given[name] = value
            continue
        if not isinstance(value, dict):
            raise wrong(name, value, f"fields of {', '.join(inner)}")
        for part in value:
            if part not in inner:
                raise unknown_name(name, part, inner)
        given |= {f"{name}.{part}": of_part for part, of_part in value.items()}
    return given


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    # A copy: the parser changes lists in place.
    for name, value in copy.deepcopy(dict(given)).items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def _first_wrong(
    parser: jsonargparse.ArgumentParser, given: Mapping[str, Any], kinds: Mapping[str, Any]
) -> InputError:
    """Returns the error for the first field whose value the parser refuses."""
    needed = {name: given[name] for name in ("teacher", "student")}
    # Flags come last, and are more often wrong than files.
    for field, value in reversed(list(given.items())):
        try:
            parser.parse_object(_nested(needed | {field: value}), defaults=False)
        except _REFUSED:
            break
    kind = kinds[field]
    item = _of_list(kind)
    if typing.get_origin(item) is Literal:
        names = yaml.safe_load(value) if isinstance(value, str) else value
        unknown = [name for name in names if name not in typing.get_args(item)]
        return unknown_name(field, unknown[0] if unknown else value, typing.get_args(item))
    if typing.get_origin(kind) is Literal:
        return unknown_name(field, value, typing.get_args(kind))
    return wrong(field, value, _described(kind))


def _build(config_class: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        # The parser takes it for all.
        if value is None and type(None) not in typing.get_args(hints[name]):
            raise wrong(name, value, _described(hints[name]))
    return config_class(
        **{
            name: _build(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def _of_list(kind: Any) -> Any:
    """Returns the type of a list's items, None if `kind` takes no list."""
    parts = typing.get_args(kind) if isinstance(kind, UnionType) else [kind]
    lists = [part for part in parts if typing.get_origin(part) is list]
    return typing.get_args(lists[0])[0] if lists else None


def _described(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    if isinstance(kind, UnionType):
        return " or ".join(
            "null" if part is type(None) else _described(part) for part in typing.get_args(kind)
        )
    if typing.get_origin(kind) is list:
        return f"a list, each of it {_described(typing.get_args(kind)[0])}"
    return names.get(kind, str(kind))
