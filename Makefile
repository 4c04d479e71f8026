.DEFAULT_GOAL := help
PYTHON ?= python

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: ## compile, verify and run a real encoder as an int8 engine
	$(PYTHON) -m bmgraph demo

test: ## the quick tests
	$(PYTHON) -m pytest

slow: ## the slow tests: trained models, large shapes
	$(PYTHON) -m pytest -m slow

links:
	@rm -rf build/types && mkdir -p build/types/bmgraph
	@for entry in bmgraph/*; do ln -s "$(CURDIR)/$$entry" build/types/bmgraph/; done
	@for folder in passes backends runtime; do ln -s "$(CURDIR)/$$folder" build/types/bmgraph/$$folder; done

types: links ## check the types, strictly
	$(PYTHON) -m mypy -p bmgraph

lint: ## check style and imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## mend style and imports
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

peers: ## make build/peers, the environment of the libraries that the benchmarks compare with
	python3 -m venv build/peers
	build/peers/bin/pip install -q 'torch>=2.11,<2.14'
	build/peers/bin/pip install -q -e '.[engines,demo]' openvino nncf ctranslate2 scikit-learn
	build/peers/bin/pip install -q onnxruntime-genai gguf accelerate
	CMAKE_ARGS='-DGGML_NATIVE=ON' build/peers/bin/pip install -q --no-binary llama-cpp-python llama-cpp-python || echo 'llama.cpp does not build here: benchmarks.decode leaves it out'
	DS_BUILD_OPS=0 build/peers/bin/pip install -q deepspeed || echo 'DeepSpeed does not install here: benchmarks.training leaves it out'

bench: ## run the benchmarks (needs: make peers)
	build/peers/bin/python -m benchmarks.encoder
	build/peers/bin/python -m benchmarks.auto
	build/peers/bin/python -m benchmarks.decode
	build/peers/bin/python -m benchmarks.large
	build/peers/bin/python -m benchmarks.moe

docs: ## write the generated pages of docs/
	$(PYTHON) -m docs.generate

.PHONY: help demo test slow links types lint format peers bench docs
