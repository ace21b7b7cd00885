// Measures the floor of a training step for scripts/bench: the step's matrix products and its attention, each alone on
// a rested card; the same ones after another as in a step, pass after pass until the card is as warm as in training,
// when its power limit lowers the clock; and the rate of a copy on the device, at which the rest could move its bytes.
// Prints one line of JSON.
//
//   make build/bench_gpu
//   build/bench_gpu B=1 T=98304 L=30 C=1024 NH=8 Vp=512 S=18432 dense=4    dense: the layers whose attention is over T
//   build/bench_gpu B=1 T=98304 L=30 C=1024 NH=8 Vp=512 dense=2 windows=28 window=1024    28 layers over windows
//   build/bench_gpu B=16 T=1024 L=48 C=1600 NH=25 Vp=50304 dense=48 fp8=1  the layers' products with e4m3 operands
//   build/bench_gpu ... again=5 dense_again=2 windows_again=3  layers at recompute level 3, of the dense ones at 4, ...
//
// A product runs with the fastest of the kernels that cuBLASLt proposes, whichever the trainer takes; the head's with
// as many rows at a time as the trainer. Operands are random: zeros take less power and so run faster.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include <cuda_fp8.h>
#include <functional>
#include <vector>

struct Shape { int64_t B, T, L, C, NH, Vp, S, dense, windows, window, again, dense_again, windows_again, fp8; };

// Nearly normal, standard deviation 1.
template <typename T> __global__ void fill_kernel(T* p, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t x = (uint64_t)i * 0x9E3779B97F4A7C15ull;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        int sum = (int)(x & 255) + (int)(x >> 8 & 255) + (int)(x >> 16 & 255) + (int)(x >> 24 & 255) - 510;
        p[i] = (T)(sum / 148.0f);
    }
}
template <typename T> static void* random_array(int64_t n) {
    void* p = device_alloc(n * sizeof(T));
    fill_kernel<<<device_sms * 8, 256, 0, main_stream>>>((T*)p, n);
    cudaCheck(cudaGetLastError());
    return p;
}

struct Buffers {         // W the widest row of a product
    void *inp, *dout;    // (N, W) random, of the type that the layers' products take
    void* weights;       // (W, C) likewise
    floatX *head_inp, *head_dout, *wte;  // (chunk, C), (chunk, Vp), (Vp, C) random
    floatX *qkv, *datt;  // (N, 3C), (N, C) random
    floatX* out;         // (N, W) whatever a product or the attention writes
    float* sums;         // (W, C) gradients of weights
    float* stats;        // (B, NH, T)
};

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// Milliseconds of each of a list of launches, which the GPU runs without a pause between them.
static std::vector<double> times_of(const std::vector<const std::function<void()>*>& launches) {
    static std::vector<cudaEvent_t> events;
    while (events.size() <= launches.size()) {
        events.push_back(NULL);
        cudaCheck(cudaEventCreate(&events.back()));
    }
    cudaCheck(cudaEventRecord(events[0], main_stream));
    for (size_t i = 0; i < launches.size(); i++) {
        (*launches[i])();
        cudaCheck(cudaEventRecord(events[i + 1], main_stream));
    }
    device_synchronize();
    std::vector<double> ms;
    for (size_t i = 0; i < launches.size(); i++) {
        float x;
        cudaCheck(cudaEventElapsedTime(&x, events[i], events[i + 1]));
        ms.push_back(x);
    }
    return ms;
}
static double median_ms(int runs, const std::function<void()>& op) {
    std::vector<double> ms = times_of(std::vector<const std::function<void()>*>(runs + 1, &op));
    return median(std::vector<double>(ms.begin() + 1, ms.end()));
}

// Returns what runs d (m,n) = op(a) op(b), column major; with sum d += in fp32, as the weights' gradients are made.
// cuBLASLt multiplies e4m3 only with a transposed and b not: the time of the other products is that of this one.
static std::function<void()> product(void* d, const void* a, const void* b, int64_t m, int64_t n, int64_t k,
                                     bool trans_a, bool trans_b, bool sum, bool fp8) {
    if (fp8) trans_a = true, trans_b = false;
    cudaDataType_t type = fp8 ? CUDA_R_8F_E4M3 : FLOATX_CUDA, result = sum ? CUDA_R_32F : FLOATX_CUDA;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasLtMatmulPreference_t preference;
    cublasOperation_t op_a = trans_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaCheck(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cudaCheck(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    cudaCheck(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    cudaCheck(cublasLtMatrixLayoutCreate(&la, type, trans_a ? k : m, trans_a ? m : k, trans_a ? k : m));
    cudaCheck(cublasLtMatrixLayoutCreate(&lb, type, trans_b ? n : k, trans_b ? k : n, trans_b ? n : k));
    cudaCheck(cublasLtMatrixLayoutCreate(&ld, result, m, n, m));
    cudaCheck(cublasLtMatmulPreferenceCreate(&preference));
    cudaCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                   &cublaslt_workspace_bytes, sizeof cublaslt_workspace_bytes));
    cublasLtMatmulHeuristicResult_t found[6];
    int count = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cublaslt_handle, desc, la, lb, ld, ld, preference, 6, found,
                                                           &count);
    opRequire(status == CUBLAS_STATUS_SUCCESS && count > 0, "cuBLASLt knows no kernel for m = %ld, n = %ld, k = %ld, "
              "trans %d %d, fp8 %d: %s", m, n, k, trans_a, trans_b, fp8, cublasLtGetStatusString(status));
    cudaCheck(cublasLtMatmulPreferenceDestroy(preference));
    auto with = [=](cublasLtMatmulAlgo_t algo) {
        return [=] {
            const float one = 1.0f, beta = sum ? 1.0f : 0.0f;
            cudaCheck(cublasLtMatmul(cublaslt_handle, desc, &one, a, la, b, lb, &beta, d, ld, d, ld, &algo,
                                     cublaslt_workspace, cublaslt_workspace_bytes, main_stream));
        };
    };
    int best = 0;
    double best_ms = INFINITY;
    for (int i = 0; i < count; i++) {
        double ms = median_ms(5, with(found[i].algo));
        if (ms < best_ms) best = i, best_ms = ms;
    }
    return with(found[best].algo);
}

struct Launch {
    const char* part;          // what its time is counted under
    int64_t times;             // in a step
    std::function<void()> op;
    std::vector<double> ms;    // of all its launches, pass by pass
};

// The three products of a layer inp (N,C) -> out (N,OC), the forward one in `again` layers twice.
static void add_products(std::vector<Launch>* step, const char* part, const Buffers& x, int64_t N, int64_t C,
                         int64_t OC, int64_t layers, int64_t again, bool fp8) {
    step->push_back({part, layers + again, product(x.out, x.weights, x.inp, OC, N, C, true, false, false, fp8), {}});
    step->push_back({part, layers, product(x.out, x.weights, x.dout, C, N, OC, false, false, false, fp8), {}});
    step->push_back({part, layers, product(x.sums, x.inp, x.dout, C, OC, N, false, true, true, fp8), {}});
}

// Attention of sequences of T tokens, over `span` of them at once.
static void add_attention(std::vector<Launch>* step, const char* part, const Buffers& x, const Shape& s, int64_t T,
                          int64_t span, int64_t layers, int64_t again) {
    int B = (int)s.B, NH = (int)s.NH, D = (int)(s.C / s.NH);
    int64_t C = s.C;
    floatX* dqkv = x.out + B * T * C;
    step->push_back({part, layers + again, [=] {
        each_window(B, T, span, [=](int64_t row, int n, int64_t length) {
            sdpa_forward(x.out + row * C, x.stats + row * NH, x.qkv + row * 3 * C, n, length, NH, D);
        });
    }, {}});
    step->push_back({part, layers, [=] {
        each_window(B, T, span, [=](int64_t row, int n, int64_t length) {
            sdpa_backward(dqkv + row * 3 * C, x.datt + row * C, x.qkv + row * 3 * C, x.out + row * C,
                          x.stats + row * NH, n, length, NH, D);
        });
    }, {}});
}

int main(int argc, char** argv) {
    Shape s = {};
    const struct { const char* name; int64_t* value; bool needed; } fields[] = {
        {"B", &s.B, true}, {"T", &s.T, true}, {"L", &s.L, true}, {"C", &s.C, true}, {"NH", &s.NH, true},
        {"Vp", &s.Vp, true}, {"S", &s.S, false}, {"dense", &s.dense, false},
        {"windows", &s.windows, false}, {"window", &s.window, false}, {"again", &s.again, false},
        {"dense_again", &s.dense_again, false}, {"windows_again", &s.windows_again, false}, {"fp8", &s.fp8, false}};
    for (int i = 1; i < argc; i++) {
        bool known = false;
        for (auto& f : fields) {
            size_t n = strlen(f.name);
            if (strncmp(argv[i], f.name, n) || argv[i][n] != '=') continue;
            *f.value = atoll(argv[i] + n + 1);
            known = true;
        }
        if (!known)
            fatal("\"%s\" is no size: give B= T= L= C= NH= Vp= dense= windows= window= S= again= dense_again= "
                  "windows_again= fp8=", argv[i]);
    }
    for (auto& f : fields)
        if (f.needed && *f.value < 1) fatal("%s is %ld: give %s=N, N at least 1", f.name, *f.value, f.name);
    if (s.B * s.T % 8) fatal("B T is %ld: it must be a multiple of 8", s.B * s.T);
    int64_t sparse = s.L - s.dense - s.windows;
    if (sparse && s.S < 1) fatal("%ld of %ld layers are neither dense nor windows: give S=, their slots", sparse, s.L);
    if (s.windows && s.window < 1) fatal("%ld of %ld layers have windows: give window=, their tokens", s.windows, s.L);
    device_open(0);
    int64_t N = s.B * s.T, C = s.C, X = sizeof(floatX), wide = 4 * C, copied = (int64_t)1 << 30;
    int64_t chunk = std::min(N, std::max<int64_t>((512ll << 20) / (s.Vp * X) / 128 * 128, 128));  // as head_rows()
    int64_t chunks = ceil_div(N, chunk);
    chunk = N / chunks / 8 * 8;  // equal ones
    int64_t results = std::max({N * wide, chunk * s.Vp, 2 * copied / X}), attention = 0;
    auto prepare = [&](int64_t, int n, int64_t length) {
        attention = std::max<int64_t>(attention, sdpa_prepare(n, length, (int)s.NH, (int)(C / s.NH), true, true));
    };
    if (s.dense) prepare(0, (int)s.B, s.T);
    if (sparse) prepare(0, (int)s.B, s.S);
    if (s.windows) each_window((int)s.B, s.T, s.window, prepare);
    int64_t need = (2 * N * wide + 4 * N * C + chunk * (C + s.Vp) + results) * X + attention;
    if (need + (1 << 30) > (int64_t)device_memory_free())
        fatal("the measurement takes %.1f GB, the GPU has %.1f GB free", (need + (1 << 30)) / 1e9,
              device_memory_free() / 1e9);
    operations_allocate(cublaslt_workspace_bytes, attention);
    auto operands = [&](int64_t n) { return s.fp8 ? random_array<__nv_fp8_e4m3>(n) : random_array<floatX>(n); };
    Buffers x;
    x.inp = operands(N * wide);
    x.dout = operands(N * wide);
    x.weights = operands(wide * C);
    x.head_inp = (floatX*)random_array<floatX>(chunk * C);
    x.head_dout = (floatX*)random_array<floatX>(chunk * s.Vp);
    x.wte = (floatX*)random_array<floatX>(s.Vp * C);
    x.qkv = (floatX*)random_array<floatX>(N * 3 * C);
    x.datt = (floatX*)random_array<floatX>(N * C);
    x.out = (floatX*)device_alloc(results * X);
    x.sums = (float*)device_alloc(std::max(wide, s.Vp) * C * sizeof(float));
    x.stats = (float*)device_alloc(N * s.NH * sizeof(float));

    std::vector<Launch> step;
    add_products(&step, "qkv", x, N, C, 3 * C, s.L, s.again, s.fp8);
    if (s.dense) add_attention(&step, "attention_T", x, s, s.T, s.T, s.dense, s.dense_again);
    if (s.windows) add_attention(&step, "attention_W", x, s, s.T, s.window, s.windows, s.windows_again);
    if (sparse) add_attention(&step, "attention_S", x, s, s.S, s.S, sparse, 0);
    add_products(&step, "attproj", x, N, C, C, s.L, s.again, s.fp8);
    add_products(&step, "fc", x, N, C, 4 * C, s.L, s.again, s.fp8);
    add_products(&step, "fcproj", x, N, 4 * C, C, s.L, 0, s.fp8);
    Buffers h = x;
    h.inp = x.head_inp; h.dout = x.head_dout; h.weights = x.wte;
    add_products(&step, "head", h, chunk, C, s.Vp, chunks, 0, false);

    double alone = 0;
    for (Launch& t : step) {
        usleep(100000);
        std::vector<double> ms = times_of({&t.op, &t.op, &t.op});
        alone += t.times * *std::min_element(ms.begin(), ms.end());
    }

    // A pass does layer after layer, as a step does: the card's clock follows the power of the mixture.
    std::vector<const std::function<void()>*> launches;
    std::vector<size_t> which;
    for (int64_t l = 0; l < s.L; l++) {
        for (size_t i = 0; i < step.size(); i++) {
            int64_t runs = step[i].times * (l + 1) / s.L - step[i].times * l / s.L;
            launches.insert(launches.end(), runs, &step[i].op);
            which.insert(which.end(), runs, i);
        }
    }
    std::vector<double> passes;
    for (double began = seconds(); passes.size() < 3 || (seconds() - began < 4 && passes.size() < 200);) {
        std::vector<double> ms = times_of(launches);
        double pass = 0;
        for (Launch& t : step) t.ms.push_back(0);
        for (size_t i = 0; i < ms.size(); i++) {
            step[which[i]].ms.back() += ms[i];
            pass += ms[i];
        }
        passes.push_back(pass);
    }
    auto warm = [](const std::vector<double>& ms) {  // the later half
        return median(std::vector<double>(ms.begin() + ms.size() / 2, ms.end()));
    };
    char* source = (char*)x.out;
    double copy = median_ms(20, [&] {
        cudaCheck(cudaMemcpyAsync(source + copied, source, copied, cudaMemcpyDeviceToDevice, main_stream));
    });
    printf("{\"device\":\"%s\",\"cudnn\":%zu,\"copy_GBps\":%.1f,\"alone_ms\":%.4f,\"loop_ms\":%.4f,\"passes\":%zu,"
           "\"parts\":{", device_name().c_str(), cudnnGetVersion(), 2 * copied / copy / 1e6, alone, warm(passes), passes.size());
    for (size_t i = 0; i < step.size(); ) {
        double ms = 0;
        size_t first = i;
        for (; i < step.size() && !strcmp(step[i].part, step[first].part); i++) ms += warm(step[i].ms);
        printf("%s\"%s\":%.4f", first ? "," : "", step[first].part, ms);
    }
    printf("}}\n");
    return 0;
}
