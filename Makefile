# Needs Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

# Mostly one thread each: compiling, many small models. PyTorch's threads would fight.
PARALLEL := -n 2 --dist worksteal
TORCH := KERAS_BACKEND=torch OMP_NUM_THREADS=1
# Tests of like models compile the same programs, and run them once or twice: less is optimised.
JAX := KERAS_BACKEND=jax \
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

.PHONY: demo check test lint docs graph coverage clean

demo: .venv/ready
	$(VENV)/python train.py --pair resnet20_resnet8
	@KERAS_BACKEND=numpy $(VENV)/python -c "import sys; sys.modules['dskd_keras'] = None; \
		import keras; \
		student = keras.models.load_model('runs/resnet20_resnet8/dskd/seed-0/student.keras'); \
		print('Loaded again without dskd_keras:', student.name, student.input_shape, '->', \
		student.output_shape)"
	@echo "Compare with plain distillation:  $(VENV)/python train.py --pair resnet20_resnet8 --method kd"
	@echo "A model of your own:              docs/getting-started.md"

# While working: what can break, on the backend that compiles nothing.
check: lint docs
	$(TORCH) $(VENV)/python -m pytest $(PARALLEL) -m "not slow"

test: lint docs
	KERAS_BACKEND=tensorflow $(VENV)/python -m pytest $(PARALLEL)
	$(JAX) $(VENV)/python -m pytest $(PARALLEL)
	$(TORCH) $(VENV)/python -m pytest $(PARALLEL)

lint: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	@$(VENV)/python tests/import_graph.py | tail -1

# The pages and the reference, into site/. A broken link is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --quiet --strict

# The modules of the package, floor by floor, with what each imports.
graph: .venv/ready
	$(VENV)/python tests/import_graph.py

coverage: .venv/ready
	$(TORCH) $(VENV)/python -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
