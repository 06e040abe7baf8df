"""What a study consists of: grids of cells, read from YAML files, at a scale that they name."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.experiment import command_line
from dskd_keras.experiment.config import ExperimentConfig

_HERE = Path(__file__).parent
KEPT = _HERE.parent / "results" / "study"


@dataclasses.dataclass(frozen=True)
class Scale:
    """The data, the teacher and the training that the cells of several grids share.

    Attributes:
        name: Of its file in scales/.
        about: One line.
        classes: Keep the classes whose label is a multiple of this number; 1 keeps all.
        teacher: Fields in which the training of the teacher differs from that of the students.
        config: The students' configuration; a pair stands for what its file in configs/ holds.
    """

    name: str
    about: str
    classes: int
    teacher: dict[str, Any]
    config: dict[str, Any]

    def trains_teacher(self) -> bool:
        """Returns whether the teacher is trained here, as its configuration names no weights."""
        return self.config.get("teacher_weights") is None

    def teacher_weights(self) -> Path:
        """Returns where the trained teacher is kept."""
        return KEPT / self.name / f"{self.config['teacher']}.weights.h5"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        name: What is different about it; one name is one setting at a scale, in all grids.
        seed: Of the student.
        fields: Where its configuration differs from its scale's.
    """

    name: str
    seed: int
    fields: dict[str, Any]

    def kept(self, scale: Scale) -> Path:
        """Returns the file that keeps what came of it."""
        return KEPT / scale.name / self.name / f"seed-{self.seed}.json"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells that answer one question.

    Attributes:
        name: Of its file in grids/.
        about: The question.
        scale: At which its cells are run.
        measured_on: "validation" while something is chosen by it, "test" for a claim.
        baseline: Name of the cells that the others are compared with.
        seeds: For each name there is a cell of every seed.
        cells: From names to fields of the configuration.
    """

    name: str
    about: str
    scale: Scale
    measured_on: str
    baseline: str
    seeds: list[int]
    cells: dict[str, dict[str, Any]]

    def all_cells(self) -> list[Cell]:
        """Returns all cells, seed by seed, so that an unfinished grid compares like with like."""
        return [
            Cell(name, seed, fields) for seed in self.seeds for name, fields in self.cells.items()
        ]


def names() -> list[str]:
    """Returns the names of all grids."""
    return sorted(path.stem for path in (_HERE / "grids").glob("*.yaml"))


def read(name: str) -> Grid:
    """Reads a grid and its scale.

    Raises:
        InputError: There is no such grid, or a file is not what it should be.
    """
    if name not in names():
        raise unknown_name("name", name, names())
    content = _read(_HERE / "grids" / f"{name}.yaml", Grid)
    content["scale"] = read_scale(content["scale"])
    grid = Grid(name=name, **content)
    if grid.measured_on not in ("validation", "test"):
        raise wrong("measured_on", grid.measured_on, "validation or test")
    if grid.baseline not in grid.cells:
        raise unknown_name("baseline", grid.baseline, grid.cells)
    for fields in ({}, *grid.cells.values()):
        configuration(grid.scale, fields)  # refused before anything is trained
    return grid


def read_scale(name: str) -> Scale:
    """Reads a scale.

    Raises:
        InputError: Its file is not what it should be.
    """
    content = _read(_HERE / "scales" / f"{name}.yaml", Scale)
    config = content["config"]
    if "pair" in config:
        file = command_line.pair_files()[config["pair"]]
        content["config"] = yaml.safe_load(file.read_text(encoding="utf-8")) | config
    return Scale(name=name, **content)


def smoke(grid: Grid) -> Grid:
    """Returns a grid whose cells train for two steps, with one seed, on few images."""
    shortened = {
        "epochs": 1,
        "train_examples": 2 * grid.scale.config["batch_size"],
        "min_teacher_accuracy": 0.0,
    }
    scale = dataclasses.replace(
        grid.scale,
        teacher={**grid.scale.teacher, "epochs": 1},
        config=grid.scale.config | shortened,
    )
    return dataclasses.replace(grid, scale=scale, seeds=grid.seeds[:1])


def _read(path: Path, kind: type) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = {field.name for field in dataclasses.fields(kind)} - {"name"}
    if not isinstance(content, dict) or set(content) != wanted:
        raise InputError(f"{path.name}: should have exactly {', '.join(sorted(wanted))}.")
    return content


def configuration(scale: Scale, fields: dict[str, Any], **more: Any) -> ExperimentConfig:
    """Returns the configuration of a cell.

    Raises:
        InputError: A field is unknown, or its value can't be used.
    """
    values = scale.config | fields | more
    known = ExperimentConfig.__dataclass_fields__
    for field in values:
        if field not in known:
            raise unknown_name("cells", field, known)
    return ExperimentConfig(**values)


def teacher_cell(scale: Scale) -> Cell:
    """Returns the cell that trains a scale's teacher: its student is the teacher."""
    fields = {"method": "ce", "student": scale.config["teacher"]}
    for field in ("epochs", "learning_rate"):
        if scale.config.get(f"teacher_{field}") is not None:
            fields[field] = scale.config[f"teacher_{field}"]
    return Cell("teacher", scale.config.get("teacher_seed", 0), fields | scale.teacher)
