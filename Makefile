# make help lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo quick test check deb bench mutants campaign clean

python := .venv/bin/python
cache := $(CURDIR)/.cache
# Tests mostly wait, so more of them than processors fit side by side.
jobs ?= 3
pytest := $(python) -m pytest -n $(jobs)
# What needs neither server nor process. In one process: to start more takes longer.
quick := WORKERD_TEST_QUICK=1 $(python) -m pytest -q -m pure \
	tests/unit/core tests/unit/config $(wildcard tests/unit/test_*.py)
# Each of these files boots a Debian of its own.
system := $(pytest) --dist loadfile -m system
# Multiplies every time limit of the tests; only a test that fails ever waits so long.
export WORKERD_TEST_SCALE ?= 3

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: ## a private RabbitMQ, restarted under the tutorial's jobs; each runs once
	@tests/install demo
	@$(python) -m tests.demo

quick: ## the pure tests of core, configuration and leaves, in ten seconds; no server, no process
	@tests/install check
	$(quick)

test: check ## install what is missing and run every test: two RabbitMQs, three pikas, two Debians
	@tests/install test
	$(quick) --cov=workerd.core --cov=workerd.config --cov-report=term:skip-covered
	WORKERD_TEST_PIKA=$(cache)/pika-1.2.0 WORKERD_TEST_RABBITMQ=3.10 $(pytest) -m 'not system'
	WORKERD_TEST_PIKA=$(cache)/pika-1.3.2 WORKERD_TEST_RABBITMQ=4.0 $(pytest) \
		-m 'not pure and not system'
	WORKERD_TEST_RABBITMQ=3.10 $(pytest) -m pika
	WORKERD_TEST_RABBITMQ=3.10 $(system)
	WORKERD_TEST_RABBITMQ=4.0 $(system)

check: ## linters, formatting, types
	@tests/install check
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

deb: ## build the Debian package: dist/workerd_<version>_all.deb
	@tests/install deb
	@packaging/deb/build dist

bench: ## workerd beside Celery, Dramatiq, pika and amqp-consume: only="python submit" options=--quick
	@tests/install bench
	@$(cache)/bench/bin/python -m benchmarks $(only) $(options)

mutants: ## plant every known bug, one at a time, and see its test catch it
	@tests/install test
	$(python) -m tests.mutants run

campaign: ## the tests with random moments, with many more seeds
	@tests/install test
	WORKERD_TEST_SEEDS=100 $(pytest) -m campaign
	WORKERD_TEST_PIKA=$(cache)/pika-1.3.2 WORKERD_TEST_RABBITMQ=4.0 WORKERD_TEST_SEEDS=100 \
		$(pytest) -m campaign

clean: ## remove what the other targets made in this checkout
	rm -rf .venv .cache .coverage dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
