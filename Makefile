# Two commands are all a user needs: `make up` and `make test`. Each sets up all it needs, in .venv.
#
#   make up ARGS="--port 8701 --data-dir D"     the whole stack on this machine; see `cwg up --help`
#   make up PYTHON=python3.12                   with this Python
#
# The CPU build of torch is not on the package index. Where pip is told to look besides (pip.conf, PIP_FIND_LINKS,
# PIP_EXTRA_INDEX_URL, PIP_INDEX_URL), there everything installed here is looked for as well.

VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
AGENTS := $(VENV)/agents
IS_FIT := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c "$(IS_FIT)" 2>/dev/null && echo $(p))))

INDEXES = $(shell $(BIN)/pip config list | sed -nE "s/^.*\.(find-links|index-url|extra-index-url)='(.*)'$$/\1 \2/p" \
	| while read -r option values; do for value in $$values; do printf -- '--%s %s ' $$option $$value; done; done)
# Any index may have any version, as it is with pip. Compiled at once, or else every process of a stack would do it.
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --index-strategy unsafe-best-match $(INDEXES)
WITH = $(INSTALL) --python $(BIN)/python --constraints constraints.txt --overrides overrides-cpu.txt

# Hundreds of processes start in a test run: where Python may keep no bytecode, each would compile the gateway anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: up test lint docs fuzz attack bench bench-relay bench-thaw bench-identity bench-compare bench-disconnects bench-verbs soak agents-tour clean

up: $(VENV)/with-local
	@exec $(BIN)/cwg up $(ARGS)

# Those that start vLLM in one process, the others in another.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(VENV)/with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What in docs/ is made from the code.
docs: $(VENV)/with-test
	$(BIN)/python -m tests.support.generate_error_docs

# 10,000 requests made up from the OpenAPI document; `make fuzz ARGS="--stack"` sends them to the real stack.
fuzz: $(VENV)/with-test
	$(BIN)/python -m loadtests.fuzz $(ARGS)

# What was once found to stop, fill or fool a gateway, tried again; ten minutes. `make attack ARGS=--stack` tries what
# needs vLLM and LMCache as well, ARGS="--only NAME" one trial, ARGS=--list names them.
attack: $(VENV)/with-test
	$(BIN)/python -m loadtests.attack $(ARGS)

bench: bench-relay bench-thaw bench-identity

bench-relay: $(VENV)/with-bench $(PEERS)/bin/litellm
	$(BIN)/python -m loadtests.relay_overhead --litellm $(PEERS)/bin/litellm \
		--vllm-router $(PEERS)/bin/vllm-router --agentic-api $(PEERS)/bin/agentic-api $(ARGS)

bench-thaw: $(VENV)/with-bench
	$(BIN)/python -m loadtests.thaw_speed $(ARGS)

# Another checkout of the gateway beside this one, interleaved: make bench-compare OTHER=../before
bench-compare: $(VENV)/with-bench
	$(BIN)/python -m loadtests.relay_compare $(OTHER) $(ARGS)

bench-disconnects: $(VENV)/with-bench
	$(BIN)/python -m loadtests.disconnects $(ARGS)

bench-verbs: $(VENV)/with-bench
	$(BIN)/python -m loadtests.verbs_speed $(ARGS)

# An hour before the real stack; `make soak ARGS="--canned --minutes 10"` is another.
soak: $(VENV)/with-bench
	$(BIN)/python -m loadtests.soak $(or $(ARGS),--stack)

# Agents as people install them, through the gateway. Needs npm.
agents-tour: $(VENV)/with-local $(VENV)/with-agents
	$(BIN)/python -m loadtests.agents_tour --agents-python $(AGENTS)/bin/python \
		--npm-bin $(AGENTS)/node_modules/.bin $(ARGS)

bench-identity: $(VENV)/with-bench
	$(BIN)/python -m loadtests.identity_replay $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each set of extras, out of date when a file is newer that decides what is in it.
$(VENV)/with-local: $(VENV)/with-torch
	@echo "installing vLLM, LMCache and the gateway into $(VENV)" >&2
	@$(WITH) --editable '.[local]'
	@touch $@

$(VENV)/with-test: $(VENV)/with-local
	@echo "installing what the tests need into $(VENV)" >&2
	@$(WITH) --editable '.[local,test]'
	@touch $@

$(VENV)/with-bench: $(VENV)/with-local
	@$(WITH) --editable '.[local,bench]'
	@touch $@

# In an environment of their own: litellm wants other versions of rich and uvicorn than we do.
$(PEERS)/bin/litellm: $(BIN)/uv
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	@$(INSTALL) --python $(PEERS)/bin/python 'litellm[proxy]>=1.80,<2' 'vllm-router>=0.1.17,<0.2' 'agentic-api>=0.9,<1'

# openai-agents wants another version of websockets than vLLM does.
$(VENV)/with-agents: $(BIN)/uv
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(AGENTS)
	@$(INSTALL) --python $(AGENTS)/bin/python 'openai-agents>=0.24,<1'
	@npm install --silent --no-fund --no-audit --prefix $(AGENTS) @anthropic-ai/claude-code @openai/codex opencode-ai
	@touch $@

$(VENV)/with-torch: $(BIN)/uv pyproject.toml constraints.txt overrides-cpu.txt
	@echo "installing torch into $(VENV)" >&2
	@$(WITH) torch==2.13.0+cpu 2>$(VENV)/torch.log || { echo "error: torch==2.13.0+cpu for $$($(BIN)/python -V)" \
		"was not found; set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it (see $(VENV)/torch.log)" >&2; exit 1; }
	@touch $@

$(BIN)/uv:
	@$(or $(PYTHON),false) -c "$(IS_FIT)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed, and $(or $(PYTHON),python3)" \
		"is none; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment;" \
		"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
