"""The package's modules and what each imports, by floor: `python tests/import_graph.py`.

It ends with status 1 where modules import one another in a circle, or where one imports from a
floor above its own. Imports within functions count, too.
"""

import graphlib
import sys

import grimp

# From the ground up: a module may import from its own floor and from those below.
FLOORS = {
    "ground": (
        "_lazy", "answering", "checks", "csv_cells", "errors", "files", "progress", "startup",
        "yaml_files",
    ),
    "method": (
        "coefficients", "copying", "depthwise", "distiller", "endings", "ensemble", "feature_maps",
        "folding", "freezing", "fused_normalization", "graph", "heads", "inputs",
        "keras_internals", "labels", "layer_table", "losses", "maps", "naming", "objective",
        "optimizers", "pairing", "replicas", "teacher", "term_means", "terms", "traced_training",
        "tracing", "walking", "weighting",
    ),
    "parts": ("callbacks", "data", "drawing", "export", "models"),
    "report": ("report",),
    "runner": ("experiment",),
    "search": ("tuning",),
    "commands": ("commands",),
}  # fmt: skip


def imports():
    """Returns the modules that each module imports, without those that are lazily reached."""
    graph = grimp.build_graph("dskd_keras", exclude_type_checking_imports=True, cache_dir=None)
    found = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    # The package itself holds what it has imported from its modules, and a version.
    return {
        name.removeprefix("dskd_keras."): {
            other.removeprefix("dskd_keras.") for other in others if other != "dskd_keras"
        }
        for name, others in found.items()
        if name != "dskd_keras"
    }


def floor(module):
    """Returns the number of a module's floor, from the ground."""
    part = module.partition(".")[0]
    (number,) = (n for n, parts in enumerate(FLOORS.values()) if part in parts)
    return number


def main():
    """Prints the graph; returns the exit status."""
    graph = imports()
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        print("A circle:", " → ".join(reversed(error.args[1])))
        return 1
    wrong = []
    for number, name in enumerate(FLOORS):
        print(f"{name}")
        for module in (module for module in order if floor(module) == number):
            used = sorted(graph[module], key=order.index)
            print(f"  {module:32} {', '.join(used)}")
            wrong += [f"{module} imports {other}" for other in used if floor(other) > number]
    print("\n".join(wrong) or f"{len(order)} modules, no circle, none imports from a floor above.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
