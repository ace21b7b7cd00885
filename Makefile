# make             finds out what this machine has, says so, and builds the trainers
# make help        the targets

CXX = g++
CXXFLAGS = -std=c++17 -O3 -Wall -Wextra -Wno-missing-field-initializers -Wno-unused-function
TRAINERS = train_gpt_lighthouse_cpu train_gpt_dense_cpu
CPU_TESTS = build/test_ops build/test_ops_double build/test_units build/test_model build/test_golden
GOLDEN = $(wildcard dev/vectors/*.bin)
PYTHON = .venv/bin/python

.PHONY: all help quickstart test test_golden deps deps-test clean found
all: found $(TRAINERS)

# What the machine has. It is looked at on every make, and what depends on it is rebuilt only when it has changed.
ifneq ($(filter-out help clean deps deps-test quickstart test,$(or $(MAKECMDGOALS),all)),)
ifneq ($(shell mkdir -p build && CXX="$(CXX)" scripts/probe > build/config.new && \
        (cmp -s build/config.new build/config.mk || cp build/config.new build/config.mk) && echo ok),ok)
$(error scripts/probe failed)
endif
include build/config.mk
endif

found:
	@echo "compiler  $(PROBE_CXX)"
	@echo "OpenMP    $(PROBE_OPENMP)"
	@echo "BLAS      $(PROBE_BLAS)"
	@echo "MPI       $(PROBE_MPI)"

# Each program is one source file; the compiler itself lists the files that it includes.
CPU_COMPILE = $(CXX) $(CXXFLAGS) $(MARCH) $(OPENMP) -DCPU_BACKEND $(BLAS_FLAGS) $(MPI_FLAGS) -MMD -MP -MF build/$(@F).d -MT $@
CPU_LINK = $(BLAS_LIBS) $(MPI_LIBS) -lm

%_cpu: %.cu build/config.mk
	$(CPU_COMPILE) -x c++ $< -o $@ $(CPU_LINK)
build/%: dev/%.cu build/config.mk
	$(CPU_COMPILE) -x c++ $< -o $@ $(CPU_LINK)
build/%: dev/%.cpp build/config.mk
	$(CPU_COMPILE) $< -o $@ $(CPU_LINK)
-include $(wildcard build/*.d)

# Installs what is missing with apt-get (as root or with sudo) and a Python environment in .venv.
deps:
	scripts/setup
deps-test:
	scripts/setup test

quickstart:
	scripts/setup
	$(MAKE) all
	scripts/quickstart

# Every test; closes with "N passed, N failed".
test:
	scripts/setup test
	$(MAKE) all $(CPU_TESTS)
	dev/run_tests

test_golden: build/test_golden
	build/test_golden $(GOLDEN)

clean:
	rm -rf build $(TRAINERS)

help:
	@echo "make               find out what this machine has and build train_gpt_lighthouse_cpu and train_gpt_dense_cpu"
	@echo "make quickstart    install what is missing, prepare text, train with Lighthouse and dense, compare, plot"
	@echo "make test          build and run every test (installs what the tests need)"
	@echo "make test_golden   Lighthouse attention against the official release's vectors in dev/vectors"
	@echo "make deps          install compilers, libraries and the Python environment .venv"
	@echo "make deps-test     the same with what the tests need: PyTorch, transformers"
	@echo "make clean         remove what was built"
	@echo "CXX=clang++        another compiler"
