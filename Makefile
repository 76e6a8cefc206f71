# SPDX-License-Identifier: Apache-2.0
# What a user, a developer and CI type. Servers come from lab/, results go to build/.

PYTHON ?= python3
VENV := build/venv

.PHONY: demo test test-unit fault-report bench bench-many bench-policies style sample lab down

demo: lab            ## a real snapshot on real servers, side by side with stock Nova's
	lab/lab exec 31 python3 /src/demo/demo.py

test:                ## every suite, on real servers; ends with the sum of all
	$(PYTHON) -m tests.run

test-unit: $(VENV)/ready   ## seconds, with neither Ceph nor Nova
	$(VENV)/bin/python -m pytest tests/unit tests/faults tests/contract -m 'not real'

fault-report: lab $(VENV)/ready   ## the whole fault matrix; prints a table and writes build/fault-report.json
	lab/lab up
	$(VENV)/bin/python -m tests.fault_report

style: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell --skip build,.git,LICENSE

bench: lab           ## prints a table and writes build/bench.json; leave the machine alone meanwhile
	lab/lab exec 31 python3 /src/benchmarks/bench.py

bench-policies:      ## each policy of flattening, and deletions; leave the machine alone meanwhile
	lab/lab up 34
	lab/lab install 34
	lab/lab exec 34 python3 /src/benchmarks/policies.py

bench-copies: lab    ## full copies, where nothing can be cloned; adds to build/bench.json; leave the machine alone meanwhile
	lab/lab up ceph16
	lab/lab exec 31 python3 /src/benchmarks/copies.py

bench-many: lab      ## sixteen snapshots at once beside one; leave the machine alone meanwhile
	lab/lab exec 31 python3 /src/benchmarks/many.py

lab:                 ## Ceph, and OpenStack with Nova 31 and this plug-in
	lab/lab up 31
	lab/lab install 31

down:                ## removes the lab's containers
	lab/lab down

sample: $(VENV)/ready      ## the option sample, from the options
	$(VENV)/bin/oslo-config-generator --config-file etc/nova/generator.conf

$(VENV)/ready: requirements.txt test-requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV) || { apt-get update -q && apt-get install -q -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt --requirement test-requirements.txt
	PBR_VERSION=0.0.1 $(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
