# make demo | demo DATA=path/to/KuaiRand-Pure | mend FILE=path/to/quarantine | up | down | jax | test | check | bench-features | bench-index | bench-recall-speed | bench-recall DATA=path/to/KuaiRand-Pure | bench-ralm DATA=path/to/KuaiRand-Pure | bench-sequence-speed | bench-sequence DATA=path/to/beauty.txt | bench-rank-speed | bench-rank DATA=path/to/KuaiRand-Pure | bench-model-server | bench-serve | soak | bench-sparse-experts | bench-weights | position-trials | expert-trials | gate-trials | ab-trials | image | image-check | scheduler-check | reconcile | release-trials | bench-swaps
PYTHON ?= python3
DATA ?=
KEEP ?= 1
QUICK ?=
SEEDS ?=

UV_VERSION := 0.13.9
UV := build/uv/bin/uv
BIN := .venv/bin
READY := .venv/.ready
SCHEDULER := build/scheduler/.ready
JAX := build/jax/.ready
TORCH := build/peers/torch/.ready
DEEPMATCH := build/peers/deepmatch/.ready

# uv does not read pip's configuration; a mirror set there holds for it too.
INDEX = $(or $(UV_DEFAULT_INDEX),$(shell $(PYTHON) -m pip config get global.index-url 2>/dev/null))

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BASE ?=
IMAGES ?= step gateway airflow scheduler

SHELL := bash
.SHELLFLAGS := -o pipefail -c

# Peers that the recall and the rank benchmarks are held against, in environments of their own.
PEERS := build/peers/recall/.ready
TREES := build/peers/rank/.ready

# What the tests of the feature stores start themselves, on ports and in directories of their own.
SERVERS := redis-server postgresql openjdk-17-jre-headless
HAVE_SERVERS = command -v redis-server && command -v java && ls /usr/lib/postgresql/*/bin/postgres

export TF_CPP_MIN_LOG_LEVEL ?= 3
# JAX, where it is asked for.
BACKEND := $(if $(filter jax,$(KERAS_BACKEND)),$(JAX))
export PYTHONPATH := $(CURDIR)$(if $(BACKEND),:$(CURDIR)/$(dir $(JAX)))

.PHONY: setup jax servers faketime demo up down status mend test check bench-features bench-index bench-recall bench-ralm bench-recall-speed bench-sequence bench-sequence-speed bench-rank bench-rank-speed bench-model-server bench-serve bench-swaps soak release-trials reconcile bench-sparse-experts bench-weights position-trials expert-trials gate-trials ab-trials features-doc lock image image-check scheduler-check clean

setup: $(READY)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Penstock needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11."; exit 1; }
	@$(PYTHON) -m venv build/uv || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)."; exit 1; }
	@build/uv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)

$(READY): requirements.lock | $(UV)
	@echo "Installing the environment into .venv (once, about 4 GB) ..."
	@$(UV) venv -q --allow-existing --no-python-downloads --python $(PYTHON) .venv
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip sync --python $(BIN)/python --require-hashes requirements.lock 2>&1 \
		| sed -u "/^ [-+~] /d"
	@touch $@

build/peers/%/.ready: benchmarks/%-peers.lock | $(UV) $(READY)
	@$(UV) venv -q --allow-existing --no-python-downloads --python $(PYTHON) $(@D)
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip sync -q --python $(@D)/bin/python --require-hashes $<
	@touch $@

# Beside the environment, not in it: TensorFlow imports the JAX that it finds, two seconds of each process.
$(JAX): requirements-jax.lock | $(UV) $(READY)
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip install -q --python $(BIN)/python --target $(@D) --no-deps --require-hashes -r $<
	@touch $@

jax: $(JAX)

$(SCHEDULER): requirements-scheduler.lock | $(UV)
	@$(UV) venv -q --allow-existing --no-python-downloads --python $(PYTHON) $(@D)
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip sync -q --python $(@D)/bin/python --require-hashes $<
	@touch $@

# Without root or apt the tests go on, and those that need a server say which is missing.
servers:
	@if ! { $(HAVE_SERVERS); } >/dev/null 2>&1; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing $(SERVERS) (once) ..."; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SERVERS) >/dev/null; \
		else \
			echo "The tests of the feature stores need: apt-get install $(SERVERS)"; \
		fi; \
	fi

demo: $(READY)
	@$(BIN)/python -m local demo --data "$(DATA)" --keep $(KEEP)

up: $(READY)
	@$(BIN)/python -m local up

down: $(READY)
	@$(BIN)/python -m local down

status: $(READY)
	@$(BIN)/python -m local status

# Corrected rows of a quarantine go back into the next log.
mend: $(READY)
	@$(if $(FILE),$(BIN)/python -m local mend "$(FILE)",echo "Say which: make mend FILE=path/to/quarantine"; exit 1)

# What is live against what the model server, the release store and MLflow have; MEND=1 brings them together.
reconcile: $(READY)
	@$(BIN)/python -m local reconcile $(if $(MEND),--mend)

# Turns the clock of a process back; without it those faults are left out.
faketime:
	@if ! ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing faketime (once) ..."; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends faketime >/dev/null; \
		else \
			echo "Faults of the clock are left out; they need: apt-get install faketime"; \
		fi; \
	fi

# Some 220 faults over every step of a release, under constant requests, in some fifteen minutes; QUICK=1 is a smaller form.
release-trials: $(READY) servers faketime
	@$(BIN)/python -W ignore -m benchmarks.release_trials $(if $(QUICK),--quick)

# Releases swapped twenty times under load, in some five minutes; QUICK=1 is a smaller form.
bench-swaps: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.swaps $(if $(QUICK),--quick)

test: $(READY) $(JAX) servers
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

# Our feature stores beside plain Feast, in some ten minutes; QUICK=1 is a smaller form.
bench-features: $(READY) servers
	@$(BIN)/python -W ignore -m benchmarks.features $(if $(QUICK),--quick)

# Every recall model and loss beside baselines, 3 seeds each (SEEDS=1: the first), in five hours; QUICK=1 is a smaller form.
bench-recall: $(READY) $(PEERS)
	@$(BIN)/python -W ignore -m benchmarks.recall $(if $(QUICK),--quick) $(if $(AGAIN),--again) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data "$(DATA)")

# Look-alike on new items beside other scores, with the simulator's audience, and how fast, in an hour; QUICK=1 is a smaller form.
bench-ralm: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.ralm $(if $(QUICK),--quick) $(if $(AGAIN),--again) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data "$(DATA)")

# Training steps beside PyTorch, DeepMatch and plain Keras at four sizes of the vocabulary, in half an hour; QUICK=1 is a smaller form.
bench-recall-speed: $(READY) $(BACKEND) $(TORCH) $(if $(QUICK),,$(DEEPMATCH))
	@$(BIN)/python -W ignore -m benchmarks.recall_speed $(if $(QUICK),--quick)

# Sequence models on Amazon Beauty beside baselines and a published table, in some hours; QUICK=1 is a smaller form.
bench-sequence: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.sequence $(if $(QUICK),--quick) $(if $(AGAIN),--again) $(if $(DATA),--data "$(DATA)")

# Training steps of SASRec beside PyTorch, in some ten minutes; QUICK=1 is a smaller form.
bench-sequence-speed: $(READY) $(TORCH)
	@$(BIN)/python -W ignore -m benchmarks.sequence_speed $(if $(QUICK),--quick)

# A step of sparse experts beside the dense mixture, by how many there are and how many are asked, in a minute.
bench-sparse-experts: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.sparse_experts $(if $(QUICK),--quick)

# Both position towers on twenty simulated logs whose truth is known, in about an hour; QUICK=1 is a smaller form.
position-trials: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.position $(if $(QUICK),--quick) $(if $(AGAIN),--again)

# The search of the output weights beside loops over scikit-learn, in some fifteen minutes; QUICK=1 is a smaller form.
bench-weights: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.weights $(if $(QUICK),--quick)

# Gates of twenty seeds of both mixtures, with gate dropout and without, in about an hour; QUICK=1 is a smaller form.
expert-trials: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.experts $(if $(QUICK),--quick)

# Bad candidates of every kind, the same model under other seeds, and true improvements before the gate, in an hour.
gate-trials: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.gate_trials $(if $(QUICK),--quick)

# Equal and unequal releases under peeking, harmful canaries, and wrong splits, in some ten minutes; QUICK=1 is a smaller form.
ab-trials: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.ab_trials $(if $(QUICK),--quick)

# Every rank model beside gradient-boosted trees, 5 seeds each, in about three hours; QUICK=1 is a smaller form.
bench-rank: $(READY) $(TREES)
	@$(BIN)/python -W ignore -m benchmarks.rank $(if $(QUICK),--quick) $(if $(AGAIN),--again) $(if $(DATA),--data "$(DATA)")

# Training steps of MMoE beside PyTorch and DeepCTR, in some ten minutes; QUICK=1 is a smaller form.
bench-rank-speed: $(READY) $(BACKEND) $(TORCH) $(if $(QUICK),,$(DEEPMATCH))
	@$(BIN)/python -W ignore -m benchmarks.rank_speed $(if $(QUICK),--quick)

# The embedded model server beside the model called in process, in two minutes; QUICK=1 is a smaller form.
bench-model-server: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.model_server $(if $(QUICK),--quick)

$(TORCH): | $(UV)
	@echo "Installing PyTorch into build/peers/torch (once, about 5 GB) ..."
	@$(UV) venv -q --allow-existing --no-python-downloads --python $(PYTHON) build/peers/torch
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip install -q --python build/peers/torch torch==2.15.0 numpy==2.4.6
	@touch $@

# It is made for TensorFlow with Keras 2, and brings DeepCTR. The benchmarks go on without it.
$(DEEPMATCH): | $(UV)
	@echo "Installing DeepMatch and DeepCTR into build/peers/deepmatch (once, about 2 GB) ..."
	@-$(UV) venv -q --allow-existing --no-python-downloads --python $(PYTHON) build/peers/deepmatch && \
		$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip install -q --python build/peers/deepmatch \
		deepmatch==0.3.2 deepctr==0.9.4 tensorflow==2.15.1 && touch $@

# The item index beside exact search and faiss at a million items, in some fifteen minutes; QUICK=1 is a smaller form.
bench-index: $(READY) $(PEERS)
	@$(BIN)/python -W ignore -m benchmarks.index $(if $(QUICK),--quick)

# /recommend under load with a million items beside the raw calls of its models, in some ten minutes; QUICK=1 is a smaller form.
bench-serve: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.serve $(if $(QUICK),--quick)

# Half an hour at 70 % of the throughput, with the memory of gateway and model server; QUICK=1 is a smaller form.
soak: $(READY)
	@$(BIN)/python -W ignore -m benchmarks.soak $(if $(QUICK),--quick)

# docs/features.md, from what Feast is told; the tests hold it current.
features-doc: $(READY)
	@$(BIN)/python -m feature_repo.describe

# New versions: edit pyproject.toml, then make lock.
lock: | $(UV)
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --extra dev --extra s3 --extra spark \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header pyproject.toml -o requirements.lock
	@grep -oE '"jax==[^"]+' pyproject.toml | tr -d '"' > build/jax.in
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes -c requirements.lock \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header build/jax.in \
		| awk '/^[^ ]/ { jax = /^jax/ } jax' > requirements-jax.lock
	@echo "tensorflow[and-cuda]$$(grep -oE '"tensorflow==[^"]+' pyproject.toml | sed 's/"tensorflow//')" > build/gpu.in
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes -c requirements.lock \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header build/gpu.in \
		| awk '/^[^ ]/ { cuda = /^nvidia-/ } cuda' > requirements-gpu.lock
	@grep -oE '^[a-z0-9.-]+==[^ ]+' requirements.lock | grep -v '^kubernetes==' > build/scheduler.constraints
	@{ echo "$$(grep -oE '"apache-airflow==[^"]+' pyproject.toml | tr -d '"')"; echo apache-airflow-providers-cncf-kubernetes; echo 'psycopg[binary]'; } > build/scheduler.in
	@$(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes -c build/scheduler.constraints \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header build/scheduler.in -o requirements-scheduler.lock

# The images of the Dockerfile, all but that of GPUs; BASE= where no registry can be reached (deploy/image-base.sh makes one).
image:
	@for target in $(IMAGES); do \
		docker build --network host --target $$target -t penstock/$$target:$(VERSION) \
			$(if $(BASE),--build-arg BASE="$(BASE)") $(if $(INDEX),--build-arg INDEX="$(INDEX)") \
			--build-arg VERSION=$(VERSION) --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" . || exit 1; \
	done

# The step's image is built, and held to what it must be: a stage of the project in it, and containers that fail at once.
image-check: $(READY)
	@$(MAKE) --no-print-directory image IMAGES=step
	@PENSTOCK_CHECK_IMAGE=penstock/step:$(VERSION) $(BIN)/python -m pytest -p no:cacheprovider tests/components/test_image.py tests/components/test_docker.py

# Airflow as on a cluster, with a scheduler of the environment that its image has, in two minutes; pods are processes.
scheduler-check: $(READY) $(SCHEDULER) servers
	@PENSTOCK_CHECK_SCHEDULER=$(CURDIR)/$(dir $(SCHEDULER)) $(BIN)/python -m pytest -p no:cacheprovider tests/deploy/test_executor.py

clean:
	rm -rf .venv build
