"""Reads a configuration dataclass from a command's flags and YAML files."""

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from dskd_keras.errors import InputError, unknown_name


def parse(config_class: type, argv: Sequence[str], configs: Path, command: str):
    """Reads a configuration from flags and YAML files.

    `--pair NAME`, in upper or lower case, reads `configs/NAME.yaml`, `--config FILE` any other file
    on top of it, and other flags come on top of both, in whatever order they are given.

    Args:
        config_class: `ExperimentConfig`, or a dataclass derived from it.
        argv: The command's arguments.
        configs: Folder of the pairs' files.
        command: The command's name, for `--help`.

    Returns:
        A `config_class`.

    Raises:
        InputError: An unknown pair, field or value; the message is one line.
        SystemExit: After `--help` or `--print_config`.
    """
    argv = _complete(config_class, argv)
    parser = jsonargparse.ArgumentParser(
        prog=command,
        description=(config_class.__doc__ or "").partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these fields.")
    parser.add_class_arguments(config_class, as_group=False)
    wanted = _value_of("pair", argv)
    if wanted is not None:
        pairs = {path.stem.casefold(): path.stem for path in sorted(configs.glob("*.yaml"))}
        pair = pairs.get(wanted.casefold())
        if pair is None:
            raise unknown_name("pair", wanted, pairs.values())
        parser.default_config_files = [str(configs / f"{pair}.yaml")]
    try:
        # A file read later would overrule the flags before it.
        values = parser.parse_args(_files_first(argv)).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise _one_line(config_class, str(error)) from None
    if wanted is not None:
        values["pair"] = pair  # as the file spells it
    return _build(config_class, values)


def _build(config_class, values):
    hints = typing.get_type_hints(config_class)
    return config_class(
        **{
            field.name: _build(hints[field.name], values[field.name])
            if dataclasses.is_dataclass(hints[field.name])
            else values[field.name]
            for field in dataclasses.fields(config_class)
        }
    )


def _kinds(config_class):
    """Returns the type of every field by its name, `outer.inner` within a nested dataclass."""
    kinds = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{inner}": part for inner, part in _kinds(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def _of_list(kind):
    """Returns the type of a list's items, None if `kind` takes no list."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind]
    lists = [part for part in parts if typing.get_origin(part) is list]
    return typing.get_args(lists[0])[0] if lists else None


def _complete(config_class, argv):
    """Allows `--seeds 0 1 2` for lists and a bare `--nesterov` for switches."""
    kinds = _kinds(config_class)
    completed, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        completed.append(argument)
        kind = kinds.get(argument.removeprefix("--")) if argument.startswith("--") else None
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        given = values[0] if values else ""
        if _of_list(kind) is not None and not given.startswith("[") and given != "null":
            values = [f"[{', '.join(values)}]"]
        if kind is bool and not values:
            values = ["true"]
        completed += values
    return completed


def _value_of(field, argv):
    for position, argument in enumerate(argv):
        if argument == f"--{field}" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"--{field}="):
            return argument.partition("=")[2]
    return None


def _files_first(argv):
    first, rest, argv = [], [], list(argv)
    while argv:
        argument = argv.pop(0)
        if argument == "--config" and argv:
            first += [argument, argv.pop(0)]
        elif argument.startswith("--config="):
            first.append(argument)
        else:
            rest.append(argument)
    return first + rest


def _one_line(config_class, message):
    """Turns what the parser says into one line with the field, the value and the choices."""
    hints = _kinds(config_class)
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        return unknown_name("configuration", unknown[1], hints)
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        group = f"{unknown[1]}."
        inner = [name.removeprefix(group) for name in hints if name.startswith(group)]
        return unknown_name(unknown[1], unknown[2], inner)
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        return unknown_name("option", unknown[1], [f"--{name}" for name in hints])
    wrong = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if wrong and wrong[1] in hints:
        field, value = wrong.groups()
        kind = hints[field]
        if typing.get_origin(_of_list(kind)) is Literal:
            kind = _of_list(kind)
            given = re.findall(r"[^\s,'\"\[\]]+", value)
            value = next((name for name in given if name not in typing.get_args(kind)), value)
        if typing.get_origin(kind) is Literal:
            return unknown_name(field, value.strip(), typing.get_args(kind))
        return InputError(f"{field} should be {_kind_name(kind)}. Received: {value.strip()!r}.")
    if missing := re.search(r"arguments are required: (\w+)", message):
        return InputError(f"{missing[1]}: not given. Choose a pair (--pair NAME) or name a model.")
    message = message.replace("Problems parsing config:", "config: not valid YAML:")
    message = message.replace('in "<unicode string>", ', "").replace(
        'Parser key "config"', "config"
    )
    return InputError(" ".join(message.split()))


def _kind_name(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    if isinstance(kind, types.UnionType):
        return " or ".join(
            "null" if part is type(None) else _kind_name(part) for part in typing.get_args(kind)
        )
    if typing.get_origin(kind) is list:
        return f"a list, each of it {_kind_name(typing.get_args(kind)[0])}"
    return names.get(kind, str(kind))
