"""Names what a new version of KerasTuner, or of TensorFlow for a search, has taken away."""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from dskd_keras import tuning

BACKEND = keras.backend.backend()
FOLDER = Path(tuning.__file__).parent
# KerasTuner's private methods that classes of the package override: they can't be reached through
# functions of the adapter.
BAYESIAN = "keras_tuner.oracles.BayesianOptimizationOracle"
HOOKS = {
    # The first trial is the configuration as it is.
    "keras_tuner.Oracle._random_values": "dskd_keras.tuning.oracles.DurableOracle",
    # The state of all trials is one file.
    "keras_tuner.Oracle._save_trial": "dskd_keras.tuning.oracles.DurableOracle",
    # A failed trial counts as a bad one.
    f"{BAYESIAN}._vectorize_trials": "dskd_keras.tuning.oracles.Bayesian",
    # Takes a bracket that the trials are enough for.
    "keras_tuner.oracles.HyperbandOracle._start_new_bracket": "dskd_keras.tuning.oracles.Hyperband",
}
ADAPTERS = ("keras_tuner_internals.py", "tensorflow_internals.py")
CASES = {}


def private(name):
    """Registers the check of a private name."""

    def register(check):
        CASES[name] = pytest.param(name, check, id=name)
        return check

    return register


def internals(name="keras_tuner"):
    return importlib.import_module(f"dskd_keras.tuning.{name}_internals")


def new_oracle(kind=RandomSearchOracle, **arguments):
    space = keras_tuner.HyperParameters()
    space.Float("temperature", 1.0, 10.0, default=4.0)
    oracle = kind(keras_tuner.Objective("val_accuracy", "max"), hyperparameters=space, **arguments)
    oracle.save = lambda: None
    oracle.verbose = 0
    return oracle


@private("keras_tuner.src.config.DEBUG")
def debug():
    config = importlib.import_module("keras_tuner.src.config")
    base_tuner = importlib.import_module("keras_tuner.src.engine.base_tuner")
    assert isinstance(config.DEBUG, bool)
    assert "config_module.DEBUG" in inspect.getsource(base_tuner)


class Server:
    """Notes what a gRPC server would answer."""

    def add_generic_rpc_handlers(self, handlers):
        self.handlers = handlers

    def add_registered_method_handlers(self, name, handlers):
        self.methods = handlers


@private("keras_tuner.src.protos.get_service_grpc")
def get_service_grpc():
    server = Server()
    internals().add_servicer(new_oracle(), server)
    assert server.handlers


@private("keras_tuner.src.distribute.oracle_chief.OracleServicer")
def oracle_servicer():
    from keras_tuner.src import protos
    from keras_tuner.src.distribute import oracle_chief

    oracle = new_oracle()
    servicer = oracle_chief.OracleServicer(oracle)
    oracle.populate_space = lambda trial_id: {"status": "STOPPED"}
    assert servicer.stop_triggered is False
    servicer.CreateTrial(protos.get_service().CreateTrialRequest(tuner_id="a"), None)
    assert servicer.stop_triggered is True


@private("keras_tuner.src.distribute.oracle_client.TIMEOUT")
def timeout():
    from keras_tuner.src.distribute import oracle_client

    assert oracle_client.TIMEOUT > 0
    assert "timeout=TIMEOUT" in inspect.getsource(oracle_client.OracleClient.create_trial)


@private("keras_tuner.Oracle._retry_queue")
def retry_queue():
    oracle = new_oracle()
    oracle._save_trial = lambda trial: None
    trial = oracle.create_trial("a")
    oracle.ongoing_trials.clear()
    internals().waiting_trials(oracle).append(trial.trial_id)
    assert oracle.create_trial("b").trial_id == trial.trial_id


@private("keras_tuner.Oracle._duplicate")
def duplicate():
    oracle = new_oracle()
    oracle._save_trial = lambda trial: None
    values = oracle.create_trial("a").hyperparameters.values
    assert internals().was_tried(oracle, values)
    assert not internals().was_tried(oracle, {"temperature": 0.5})


@private("keras_tuner.Oracle._random_values")
def random_values():
    oracle = new_oracle()
    oracle._random_values = lambda: {"temperature": 3.0}
    assert oracle.populate_space("0")["values"] == {"temperature": 3.0}


@private("keras_tuner.Oracle._save_trial")
def save_trial():
    oracle, saved = new_oracle(), []
    oracle._save_trial = saved.append
    assert saved == [oracle.create_trial("a")]


@private("keras_tuner.oracles.BayesianOptimizationOracle._random_state")
def random_state():
    oracle = new_oracle(BayesianOptimizationOracle)
    assert isinstance(oracle._random_state, np.random.RandomState)
    state = np.random.RandomState(1)
    internals().set_random_state(oracle, state)
    assert "self._random_state.uniform" in inspect.getsource(type(oracle).populate_space)


@private(f"{BAYESIAN}._vectorize_trials")
def vectorize_trials():
    oracle = new_oracle(BayesianOptimizationOracle)
    oracle._save_trial = lambda trial: None
    for number, status in enumerate(["COMPLETED", "FAILED", "COMPLETED"]):
        trial = oracle.create_trial("a")
        if status == "COMPLETED":
            oracle.update_trial(trial.trial_id, {"val_accuracy": number / 4})
        trial.status = status
        oracle.end_trial(trial)
    places, losses = oracle._vectorize_trials()
    # A row of places in [0, 1] and a loss for each, without the failed one: why it is overridden.
    assert places.shape == (2, len(oracle.hyperparameters.space)) and places.min() >= 0
    assert losses.tolist() == [0.0, -0.5]


@private("keras_tuner.oracles.HyperbandOracle._current_bracket")
def current_bracket():
    oracle = new_oracle(HyperbandOracle, max_epochs=9)
    assert oracle._current_bracket == 2
    for most, expected in ((13, 2), (12, 1), (2, 0)):
        internals().lower_bracket(oracle, most)
        oracle._start_new_bracket()
        assert oracle.get_state()["brackets"][-1]["bracket_num"] == expected


@private("keras_tuner.oracles.HyperbandOracle._get_size")
def get_size():
    oracle = new_oracle(HyperbandOracle, max_epochs=9)
    assert [internals().trials_of_bracket(oracle, number) for number in range(3)] == [3, 7, 13]


@private("keras_tuner.oracles.HyperbandOracle._start_new_bracket")
def start_new_bracket():
    started = []

    class Hyperband(HyperbandOracle):
        def _start_new_bracket(self):
            started.append(self)
            super()._start_new_bracket()

    assert started == [new_oracle(Hyperband, max_epochs=9)]


@private("tensorflow.python.framework.ops.gradient_registry._registry")
def registry():
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's alone")
    import tensorflow as tf

    module = internals("tensorflow")
    with module.clean_gradient_registry():
        before = len(module.gradient_registry())

        @tf.function
        def traced():
            tf.custom_gradient(lambda x: (x, lambda upstream: upstream))(tf.constant(1.0))

        traced()
        assert len(module.gradient_registry()) > before, "it holds no gradients of functions"
    assert len(module.gradient_registry()) == before


@pytest.mark.parametrize("name, check", CASES.values())
def test_what_is_used_is_there(name, check):
    try:
        check()
    except Exception as error:
        package = "tensorflow" if name.startswith("tensorflow") else "keras-tuner"
        pytest.fail(
            f"{name} has gone or changed in {package} {version(package)}: "
            f"{type(error).__name__}: {error}"
        )


def parsed(path):
    return list(ast.walk(ast.parse(path.read_text())))


def private_attributes(nodes):
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.mark.once
def test_every_private_name_that_is_used_has_a_case():
    used = set().union(*(private_attributes(parsed(FOLDER / name)) for name in ADAPTERS))
    used |= {hook.rpartition(".")[2] for hook in HOOKS}
    cases = {name.rpartition(".")[2] for name in CASES}
    assert used == {name for name in cases if name.startswith("_")}


@pytest.mark.once
def test_hooks_override_what_keras_tuner_has():
    for hook, overridden_by in HOOKS.items():
        owner, _, method = hook.rpartition(".")
        module, _, name = overridden_by.rpartition(".")
        assert method in vars(getattr(importlib.import_module(module), name))
        module, _, base = owner.rpartition(".")
        assert hasattr(getattr(importlib.import_module(module), base), method)


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_else_reaches_into_keras_tuner(path):
    if path.name in ADAPTERS:
        return
    nodes = parsed(path)
    own = {getattr(node, "name", None) for node in nodes}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    own |= {hook.rpartition(".")[2] for hook in HOOKS}
    assert not private_attributes(nodes) - own
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith(("keras_tuner.src", "tensorflow."))]
