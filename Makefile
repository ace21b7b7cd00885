# make             finds out what this machine has, says so, and builds the trainers
# make help        the targets

CXX = g++
CXXFLAGS = -std=c++17 -O3 -Wall -Wextra -Wno-missing-field-initializers -Wno-unused-function
CPU_TRAINERS = train_gpt_lighthouse_cpu train_gpt_dense_cpu
GPU_TRAINERS = train_gpt_lighthouse train_gpt_dense
CPU_TESTS = build/test_ops build/test_causality build/test_units build/test_model build/test_golden
GOLDEN = $(wildcard dev/vectors/*.bin)
PYTHON = .venv/bin/python

GPU_TESTS = build/test_gpu_ops build/test_gpu_ops_fp32 build/test_gpu_attention build/test_gpu_attention_fp32 \
            build/test_gpu_model build/test_gpu_model_fp32

ifneq ($(MAKECMDGOALS),help)
ifneq ($(shell test -w . && echo yes),yes)
$(error this user may not write to $(CURDIR), where make builds and .venv, data and runs go: take a copy of your own)
endif
endif

# What the machine has. It is looked at on every make, and what depends on it is rebuilt only when it has changed. Several
# makes at once each write a file of their own.
ifneq ($(filter-out help clean deps deps-test quickstart test test-mpi test-gpu,$(or $(MAKECMDGOALS),all)),)
ifneq ($(shell mkdir -p build && new=build/config.$$$$ && \
        CXX="$(CXX)" GPU_COMPUTE_CAPABILITY="$(GPU_COMPUTE_CAPABILITY)" scripts/probe > $$new && \
        if cmp -s $$new build/config.mk; then rm $$new; else mv $$new build/config.mk; fi && echo ok),ok)
$(error scripts/probe failed)
endif
include build/config.mk
endif

.PHONY: all cpu help quickstart test test-mpi test-gpu sanitize test_golden deps deps-test clean found
all: cpu $(if $(GENCODE),$(GPU_TRAINERS))
cpu: found $(CPU_TRAINERS)

found:
	@echo "compiler  $(PROBE_CXX)"
	@echo "OpenMP    $(PROBE_OPENMP)"
	@echo "BLAS      $(PROBE_BLAS)"
	@echo "MPI       $(PROBE_MPI)"
	@echo "CUDA      $(PROBE_CUDA)"
	@echo "cuDNN     $(PROBE_CUDNN)"
	@echo "NCCL      $(PROBE_NCCL)"

# Each program is one source file; the compiler itself lists the files that it includes.
CPU_COMPILE = $(CXX) $(CXXFLAGS) $(MARCH) $(OPENMP) -DCPU_BACKEND $(BLAS_FLAGS) $(MPI_FLAGS) -MMD -MP -MF build/$(@F).d -MT $@
CPU_LINK = $(BLAS_LIBS) $(MPI_LIBS) -lm

%_cpu: %.cu build/config.mk
	$(CPU_COMPILE) -x c++ $< -o $@ $(CPU_LINK)
build/%_cpu: dev/%.cu build/config.mk
	$(CPU_COMPILE) -x c++ $< -o $@ $(CPU_LINK)
build/%: dev/%.cu build/config.mk
	$(CPU_COMPILE) -x c++ $< -o $@ $(CPU_LINK)
build/%: dev/%.cpp build/config.mk
	$(CPU_COMPILE) $< -o $@ $(CPU_LINK)

# The trainers and bench_nccl take several processes where NCCL and MPI are both there; the tests and benches of the
# kernels take one.
GPU_COMPILE = $(if $(GENCODE),$(NVCC),$(error CUDA $(PROBE_CUDA))) -std=c++17 -O3 -lineinfo $(GENCODE) $(CUBLAS_FLAGS) $(CUDNN_FLAGS) -Xcompiler "-O3 $(OPENMP)" -MMD -MP -MF build/$(@F).d -MT $@
GPU_LINK = $(CUBLAS_LIBS) $(CUDNN_LIBS)
$(GPU_TRAINERS): %: %.cu build/config.mk
	$(GPU_COMPILE) $(NCCL_FLAGS) $< -o $@ $(GPU_LINK) $(NCCL_LIBS)
build/bench_gpu: dev/bench_gpu.cu build/config.mk
	$(GPU_COMPILE) $< -o $@ $(GPU_LINK)
build/bench_nccl: dev/bench_nccl.cu build/config.mk
	$(GPU_COMPILE) $(NCCL_FLAGS) $< -o $@ $(GPU_LINK) $(NCCL_LIBS)
build/test_gpu_model: dev/test_model.cu build/config.mk
	$(GPU_COMPILE) $< -o $@ $(GPU_LINK)
build/test_gpu_model_fp32: dev/test_model.cu build/config.mk
	$(GPU_COMPILE) -DFLOATX_FP32 $< -o $@ $(CUBLAS_LIBS)
build/test_gpu_%_fp32: dev/test_gpu_%.cu build/config.mk
	$(GPU_COMPILE) -DFLOATX_FP32 $< -o $@ $(CUBLAS_LIBS)
build/test_gpu_%: dev/test_gpu_%.cu build/config.mk
	$(GPU_COMPILE) $< -o $@ $(GPU_LINK)
-include $(wildcard build/*.d)

# Installs what is missing with apt-get (as root or with sudo) and a Python environment in .venv.
deps:
	scripts/setup
deps-test:
	scripts/setup test

quickstart:
	scripts/setup
	$(MAKE) $(if $(filter 0,$(shell scripts/gpus)),cpu,all)
	scripts/quickstart

# Every test; closes with "N passed, N failed".
test:
	scripts/setup test
	$(MAKE) all $(CPU_TESTS)
	dev/run_tests
	@if [ "$$(scripts/gpus)" != 0 ]; then $(MAKE) test-gpu; fi

# Several ranks against one, on the CPU backend with mpirun; part of make test.
test-mpi:
	scripts/setup test
	$(MAKE) cpu
	dev/run_tests mpi

# Every kernel against its CPU twin, the model against PyTorch, GPU runs against CPU runs. Needs a GPU. Where there is no
# PyTorch to make the model's reference files with, and none is to be had, the rest still runs.
test-gpu:
	@[ -f build/oracle/deep.bin ] || .venv/bin/python -c 'import torch' 2> /dev/null || scripts/setup test || true
	$(MAKE) all $(GPU_TESTS)
	dev/run_gpu_tests
sanitize: $(GPU_TESTS)
	dev/run_gpu_tests sanitize

test_golden: build/test_golden
	build/test_golden $(GOLDEN)

clean:
	rm -rf build $(CPU_TRAINERS) $(GPU_TRAINERS)

help:
	@echo "make               find out what this machine has and build the trainers for the CPU and, with nvcc, for GPUs"
	@echo "make cpu           build only train_gpt_lighthouse_cpu and train_gpt_dense_cpu"
	@echo "make quickstart    install what is missing, prepare text, train with Lighthouse and dense, compare, plot"
	@echo "make test          build and run every test (installs what the tests need)"
	@echo "make test-mpi      the tests of several processes: mpirun on the CPU backend, 1 to 8 ranks"
	@echo "make test-gpu      every kernel against its CPU twin and GPU runs against CPU runs, on a machine with a GPU"
	@echo "make sanitize      the GPU tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck"
	@echo "make test_golden   Lighthouse attention against the official release's vectors in dev/vectors"
	@echo "make deps          install compilers, libraries and the Python environment .venv"
	@echo "make deps-test     the same with what the tests need: PyTorch, transformers"
	@echo "make clean         remove what was built"
	@echo "CXX=clang++                  another compiler"
	@echo "GPU_COMPUTE_CAPABILITY=90    the GPU architecture to build for, instead of this machine's"
