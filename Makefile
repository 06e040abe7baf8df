# Needs Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

# Mostly one thread each: compiling, many small models. PyTorch's threads would fight.
PARALLEL := -n 2 --dist loadfile
# Tests of like models compile the same programs, and run them once or twice: less is optimised.
JAX_TESTS := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

.PHONY: demo test clean

demo: .venv/ready
	$(VENV)/python train.py --pair resnet20_resnet8
	@$(VENV)/python -c "import sys; sys.modules['dskd_keras'] = None; import keras; \
		student = keras.models.load_model('runs/resnet20_resnet8/dskd/seed-0/student.keras'); \
		print('Loaded again without dskd_keras:', student.name, student.input_shape, '->', \
		student.output_shape)"

test: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	KERAS_BACKEND=tensorflow $(VENV)/python -m pytest $(PARALLEL)
	KERAS_BACKEND=jax $(JAX_TESTS) $(VENV)/python -m pytest $(PARALLEL)
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(VENV)/python -m pytest $(PARALLEL)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable ".[jax,torch,export,dev]"
	touch $@

clean:
	rm -rf .venv
