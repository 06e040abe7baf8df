from dskd_commands import startup

# As train.py: the same kernels, and so the same bits, in this process and in those it starts.
startup.set_tensorflow_options()

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "once: no backend has a part in what is tested, and it takes long: run on PyTorch alone, "
        "which compiles nothing",
    )
    config.addinivalue_line("markers", "slow: takes long on PyTorch; `make check` leaves it out")


def pytest_collection_modifyitems(items):
    # Not above: workers collect, and the process that starts them needs no backend.
    import keras

    if keras.backend.backend() != "torch":
        for item in items:
            if item.get_closest_marker("once"):
                item.add_marker(pytest.mark.skip(reason="run on PyTorch alone"))


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)
