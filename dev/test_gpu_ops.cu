// Proves that every CUDA operation of the trainer but attention computes what its twin in dev/cpu_ops.h states, then
// times it.
//
//   nvcc -O3 -std=c++17 -arch=native -Xcompiler -fopenmp,-march=native dev/test_gpu_ops.cu -lcublasLt -lcudnn
//        -o build/test_gpu_ops
//   build/test_gpu_ops                      everything; 45 GB of device memory
//   build/test_gpu_ops gelu rope            only operations whose name begins so
//   build/test_gpu_ops --small              only small shapes, for compute-sanitizer
//   build/test_gpu_ops --check | --time     only one of the two halves
// With -DFLOATX_FP32 the kernels work in fp32 and must agree to fp32 rounding.
//
// Inputs are random numbers that the host can make again for any index, rounded to the type in memory first, so that
// both sides see the same. Outputs are poisoned with NaN before each run (accumulated ones start from random numbers),
// every element is compared, bytes behind the end must survive, and a second run must give the same bits. At sizes past
// 2^31 elements a sample of rows is compared, the last one among it. Errors are ||gpu - cpu|| / ||cpu||, or a tenth of
// that of the worst 64 neighbours.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include "cpu_ops.h"
#include "gpu_harness.cuh"
#include <algorithm>
#include <functional>

// fp32 results differ by the order of additions and by fast exp and division. bf16 results differ by their
// rounding, 1.6e-3 of a uniformly spread mantissa; twice that where the result passes through memory twice.
const double FLOAT_TOLERANCE = 1e-5;
const double TOLERANCE = sizeof(floatX) == 4 ? FLOAT_TOLERANCE : 4e-3;
// Tensor cores cut off the bits that an addition to their fp32 sums shifts out, instead of rounding, every 16 products.
const double TENSOR_CORE_TOLERANCE = sizeof(floatX) == 4 ? FLOAT_TOLERANCE : 1e-4;

bool small_only;
std::vector<std::string> wanted;
double copy_gbs;

bool is_wanted(const char* op) {
    if (wanted.empty()) return true;
    for (auto& name : wanted) {
        if (strncmp(op, name.c_str(), name.size()) == 0) return true;
    }
    return false;
}

template <typename... Args> std::string format(const char* f, Args... args) {
    char line[512];
    snprintf(line, sizeof(line), f, args...);
    return line;
}

// ---- random numbers, the same on both sides -------------------------------------------------------------------------
__host__ __device__ inline uint64_t random_bits(uint64_t seed, int64_t i) {
    uint64_t x = (seed << 40) + (uint64_t)i + 1;
    x *= 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
// Four 16-bit numbers added: nearly normal, variance 1, and exact until the one multiplication.
__host__ __device__ inline float random_normal(uint64_t seed, int64_t i, float scale, float offset) {
    uint64_t x = random_bits(seed, i);
    int sum = (int)(x & 65535) + (int)(x >> 16 & 65535) + (int)(x >> 32 & 65535) + (int)(x >> 48) - 131070;
    return fmaf((float)sum, scale / 37837.0f, offset);
}
struct Random { uint64_t seed; float scale, offset; };

template <typename T> __global__ void fill_kernel(T* p, int64_t n, Random r) {
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) p[i] = (T)random_normal(r.seed, i, r.scale, r.offset);
}
__global__ void fill_int_kernel(int* p, int64_t n, uint64_t seed, int limit, int skew) {
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    double u = (double)(random_bits(seed, i) >> 11) / 9007199254740992.0, v = u;
    for (int k = 1; k < skew; k++) v *= u;
    p[i] = (int)(v * limit);
}

template <typename T> Floats host_random(int64_t n, Random r, int64_t first = 0) {
    Floats x(n);
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) x[i] = (float)(T)random_normal(r.seed, first + i, r.scale, r.offset);
    return x;
}

// ---- device memory ------------------------------------------------------------------------------------------------
template <typename T> T* device_random(int64_t n, Random r) {
    T* p = device_array<T>(n);
    fill_kernel<<<grid_for(n, 256), 256, 0, main_stream>>>(p, n, r);
    cudaCheck(cudaGetLastError());
    return p;
}
// skew 1: uniform below limit; more: small ones are frequent.
int* device_random_ints(int64_t n, uint64_t seed, int limit, int skew) {
    int* p = device_array<int>(n);
    fill_int_kernel<<<grid_for(n, 256), 256, 0, main_stream>>>(p, n, seed, limit, skew);
    cudaCheck(cudaGetLastError());
    return p;
}
template <typename T> Floats floats_to_host(const T* p, int64_t n) { return to_host<float>(p, n); }

// ---- comparisons ----------------------------------------------------------------------------------------------------
// Of the whole, and of the worst 64 neighbours, which may be ten times as far off: one wrong row of many shows in no norm
// of the whole. What neighbours miss counts against their own norm, or the usual one where theirs is smaller.
struct Output {
    const char* name;
    void* p;  // device
    int64_t n;
    int bytes;  // of an element
    Random initial;  // scale 0: poisoned
    Floats expected;
    double tolerance;
};
Output overwritten(const char* name, floatX* p, const Floats& expected) {
    return {name, p, (int64_t)expected.size(), sizeof(floatX), {}, expected, TOLERANCE};
}
Output overwritten_float(const char* name, float* p, const Floats& expected) {
    return {name, p, (int64_t)expected.size(), sizeof(float), {}, expected, FLOAT_TOLERANCE};
}
// inp of an in-place operation, or what "+=" adds to
Output updated(const char* name, floatX* p, Random initial, const Floats& expected) {
    return {name, p, (int64_t)expected.size(), sizeof(floatX), initial, expected, TOLERANCE};
}
Output updated_float(const char* name, float* p, Random initial, const Floats& expected,
                     double tolerance = FLOAT_TOLERANCE) {
    return {name, p, (int64_t)expected.size(), sizeof(float), initial, expected, tolerance};
}

Output looser(Output o, double more) {
    o.tolerance += more;
    return o;
}

void prepare(const Output& o) {
    if (o.initial.scale == 0.0f) {
        cudaCheck(cudaMemsetAsync(o.p, 0xff, o.n * o.bytes, main_stream));
    } else if (o.bytes == 4) {
        fill_kernel<<<grid_for(o.n, 256), 256, 0, main_stream>>>((float*)o.p, o.n, o.initial);
    } else {
        fill_kernel<<<grid_for(o.n, 256), 256, 0, main_stream>>>((floatX*)o.p, o.n, o.initial);
    }
    cudaCheck(cudaGetLastError());
}

// Runs the operation twice from the same state and compares all outputs.
void check(const std::string& title, const std::vector<Output>& outputs, const std::function<void()>& run) {
    bool ok = true;
    std::string line = title + ":";
    std::vector<std::vector<char>> first;
    for (int turn = 0; turn < 2; turn++) {
        for (auto& o : outputs) prepare(o);
        run();
        for (size_t k = 0; k < outputs.size(); k++) {
            const Output& o = outputs[k];
            std::vector<char> bytes = to_host((const char*)o.p, o.n * o.bytes + GUARD);
            if (turn == 1) {
                if (memcmp(bytes.data(), first[k].data(), o.n * o.bytes) != 0) {
                    ok = false;
                    line += format(" %s differs in a second run;", o.name);
                }
                continue;
            }
            for (size_t i = 0; i < GUARD; i++) {
                if (bytes[o.n * o.bytes + i] == GUARD_BYTE) continue;
                ok = false;
                line += format(" %s: written behind its end;", o.name);
                break;
            }
            Floats got(o.n);
            for (int64_t i = 0; i < o.n; i++) {
                got[i] = o.bytes == 4 ? ((float*)bytes.data())[i] : (float)((floatX*)bytes.data())[i];
            }
            double error = relative_error(got, o.expected);
            bool good = error <= o.tolerance;
            ok = ok && good;
            line += format(good ? " %s %.1e" : " %s %.1e (at most %.0e)", o.name, error, o.tolerance);
            if (!good) {
                int64_t shown = 0;
                double norm = 0;
                for (float x : o.expected) norm += (double)x * x;
                double typical = sqrt(norm / o.n);
                for (int64_t i = 0; i < o.n && shown < 3; i++) {
                    if (fabs((double)got[i] - o.expected[i]) <= 10 * o.tolerance * typical) continue;
                    line += format(" [%lld] %g not %g", (long long)i, got[i], o.expected[i]);
                    shown++;
                }
            }
            first.push_back(bytes);
        }
    }
    report(ok, line);
}

// Rows to look at in a tensor of N rows of C: both ends, both sides of element 2^31, some between.
std::vector<int64_t> sample_rows(int64_t N, int64_t C) {
    std::vector<int64_t> rows = {0, 1, N / 2, N - 2, N - 1};
    for (int64_t edge : {(int64_t)1 << 31, (int64_t)1 << 32}) {
        if (edge / C + 1 < N) rows.insert(rows.end(), {edge / C - 1, edge / C, edge / C + 1});
    }
    for (int i = 0; i < 16; i++) rows.push_back(random_bits(99, i) % N);
    return rows;
}
template <typename T> Floats device_rows(const T* p, const std::vector<int64_t>& rows, int64_t C) {
    Floats all;
    for (int64_t row : rows) {
        Floats x = floats_to_host(p + row * C, C);
        all.insert(all.end(), x.begin(), x.end());
    }
    return all;
}
template <typename T> Floats random_rows(const std::vector<int64_t>& rows, int64_t C, Random r) {
    Floats all;
    for (int64_t row : rows) {
        Floats x = host_random<T>(C, r, row * C);
        all.insert(all.end(), x.begin(), x.end());
    }
    return all;
}
void check_sample(const std::string& title, const char* name, const Floats& got, const Floats& expected,
                  double tolerance) {
    double error = relative_error(got, expected);
    report(error <= tolerance, title + format(": sample of %s %.1e (at most %.0e)", name, error, tolerance));
}

void need_scratch(size_t bytes) {
    if (bytes <= op_scratch_bytes) return;
    cudaCheck(cudaStreamSynchronize(main_stream));
    if (op_scratch) cudaCheck(cudaFree(op_scratch));
    cudaCheck(cudaMalloc(&op_scratch, bytes));
    op_scratch_bytes = bytes;
}

// ---- encoder --------------------------------------------------------------------------------------------------------
void check_encoder(int B, int64_t T, int C, int V, int Vp, int64_t t0, bool positions, int skew) {
    std::string shape = format("B=%d T=%lld C=%d V=%d%s", B, (long long)T, C, V, skew > 100 ? ", one token only" : "");
    int64_t N = B * T, maxT = t0 + T + 3;
    Random word = {1, 0.5f, 0}, position = {2, 0.5f, 0}, gradient = {3, 1, 0}, before = {4, 1, 0},
           before_wpe = {5, 1, 0};
    int* tokens = device_random_ints(N, 6, V, skew);
    std::vector<int> host_tokens = to_host(tokens, N);
    need_scratch(encoder_backward_scratch_bytes(N, C));

    floatX* wte = device_random<floatX>((int64_t)Vp * C, word);
    floatX* wpe = positions ? device_random<floatX>(maxT * C, position) : NULL;
    floatX* out = device_array<floatX>(N * C);
    Floats host_wte = host_random<floatX>((int64_t)Vp * C, word), host_wpe = host_random<floatX>(maxT * C, position);
    Floats expected(N * C);
    cpu::encoder_forward(expected.data(), host_tokens.data(), host_wte.data(), positions ? host_wpe.data() : NULL, B, T,
                         C, t0);
    check("encoder_forward " + shape, {overwritten("out", out, expected)},
          [&] { encoder_forward(out, tokens, wte, wpe, B, T, C, t0); });

    floatX* dout = device_random<floatX>(N * C, gradient);
    float* dwte = device_array<float>((int64_t)Vp * C);
    float* dwpe = positions ? device_array<float>(maxT * C) : NULL;
    Floats host_dout = host_random<floatX>(N * C, gradient), host_dwte = host_random<float>((int64_t)Vp * C, before),
           host_dwpe = host_random<float>(maxT * C, before_wpe);
    cpu::encoder_backward(host_dwte.data(), positions ? host_dwpe.data() : NULL, host_dout.data(), host_tokens.data(),
                          B, T, C, t0, Vp);
    std::vector<Output> outputs = {updated_float("dwte", dwte, before, host_dwte)};
    if (positions) outputs.push_back(updated_float("dwpe", dwpe, before_wpe, host_dwpe));
    check("encoder_backward " + shape, outputs, [&] { encoder_backward(dwte, dwpe, dout, tokens, B, T, C, t0, Vp); });
    free_device_arrays();
}

void check_encoder_large() {
    int64_t N = (1 << 21) + 5;
    int C = 1024, V = 257, Vp = 384;
    std::string shape = format("N=%lld C=%d V=%d", (long long)N, C, V);
    Random word = {1, 0.5f, 0}, gradient = {3, 1, 0}, before = {4, 1, 0};
    int* tokens = device_random_ints(N, 6, V, 3);
    std::vector<int> host_tokens = to_host(tokens, N);
    std::vector<int64_t> rows = sample_rows(N, C), words;
    for (int64_t row : rows) words.push_back(host_tokens[row]);
    floatX* wte = device_random<floatX>((int64_t)Vp * C, word);
    floatX* out = device_array<floatX>(N * C);
    encoder_forward(out, tokens, wte, NULL, 1, N, C, 0);
    check_sample("encoder_forward " + shape, "out", device_rows(out, rows, C), random_rows<floatX>(words, C, word),
                 TOLERANCE);

    need_scratch(encoder_backward_scratch_bytes(N, C));
    floatX* dout = device_random<floatX>(N * C, gradient);
    float* dwte = device_random<float>((int64_t)Vp * C, before);
    encoder_backward(dwte, NULL, dout, tokens, 1, N, C, 0, Vp);
    Floats got = floats_to_host(dwte, (int64_t)Vp * C), some, expected;
    for (int c : {0, 7, 8, 513, 1023}) {
        std::vector<double> sum(Vp);
        for (int w = 0; w < Vp; w++) sum[w] = random_normal(before.seed, (int64_t)w * C + c, 1, 0);
        for (int64_t i = 0; i < N; i++) {
            sum[host_tokens[i]] += (float)(floatX)random_normal(gradient.seed, i * C + c, 1, 0);
        }
        for (int w = 0; w < Vp; w++) {
            some.push_back(got[(int64_t)w * C + c]);
            expected.push_back((float)sum[w]);
        }
    }
    check_sample("encoder_backward " + shape, "dwte", some, expected, FLOAT_TOLERANCE);
    free_device_arrays();
}

// ---- layernorm ------------------------------------------------------------------------------------------------------
void check_layernorm(int64_t N, int C, float offset) {
    std::string shape = format("N=%lld C=%d mean %g", (long long)N, C, offset);
    Random input = {1, 1, offset}, w = {2, 0.3f, 1}, b = {3, 0.3f, 0}, gradient = {4, 1, 0}, before = {5, 1, 0},
           before_w = {6, 1, 0}, before_b = {7, 1, 0}, before_s = {8, 1, 0};
    floatX* inp = device_random<floatX>(N * C, input);
    floatX* weight = device_random<floatX>(C, w);
    floatX* bias = device_random<floatX>(C, b);
    floatX* dout = device_random<floatX>(N * C, gradient);
    floatX* out = device_array<floatX>(N * C);
    floatX* dinp = device_array<floatX>(N * C);
    float *mean = device_array<float>(N), *rstd = device_array<float>(N);
    float *dweight = device_array<float>(C), *dbias = device_array<float>(C), *dsum = device_array<float>(C);
    need_scratch(layernorm_backward_scratch_bytes(C));

    Floats x = host_random<floatX>(N * C, input), hw = host_random<floatX>(C, w), hb = host_random<floatX>(C, b),
           hd = host_random<floatX>(N * C, gradient), y(N * C), m(N), r(N);
    // In fp32 a mean of 100 is rounded by 6e-6, on either side, and x - mean by as much.
    double of_mean = 3 * offset * 6e-8;
    cpu::layernorm_forward(y.data(), m.data(), r.data(), x.data(), hw.data(), hb.data(), N, C);
    check("layernorm_forward " + shape, {looser(overwritten("out", out, y), of_mean), overwritten_float("mean", mean, m),
          overwritten_float("rstd", rstd, r)}, [&] { layernorm_forward(out, mean, rstd, inp, weight, bias, N, C); });

    Floats dx = host_random<floatX>(N * C, before), dw = host_random<float>(C, before_w),
           db = host_random<float>(C, before_b), ds = host_random<float>(C, before_s);
    cpu::layernorm_backward(dx.data(), dw.data(), db.data(), ds.data(), hd.data(), x.data(), hw.data(), m.data(),
                            r.data(), N, C);
    check("layernorm_backward " + shape,
          {updated("dinp", dinp, before, dx), looser(updated_float("dweight", dweight, before_w, dw), of_mean),
           updated_float("dbias", dbias, before_b, db), looser(updated_float("dsum", dsum, before_s, ds), of_mean)},
          [&] { layernorm_backward(dinp, dweight, dbias, dsum, dout, inp, weight, mean, rstd, N, C); });
    check("layernorm_backward without dsum " + shape, {updated("dinp", dinp, before, dx)},
          [&] { layernorm_backward(dinp, dweight, dbias, NULL, dout, inp, weight, mean, rstd, N, C); });
    free_device_arrays();
}

void check_layernorm_large() {
    int64_t N = (1 << 21) + 3;
    int C = 1024;
    std::string shape = format("N=%lld C=%d", (long long)N, C);
    Random input = {1, 1, 0.5f}, w = {2, 0.3f, 1}, b = {3, 0.3f, 0}, gradient = {4, 1, 0}, before = {5, 1, 0},
           before_w = {6, 1, 0}, before_b = {7, 1, 0};
    floatX* inp = device_random<floatX>(N * C, input);
    floatX* weight = device_random<floatX>(C, w);
    floatX* bias = device_random<floatX>(C, b);
    floatX* out = device_array<floatX>(N * C);
    float *mean = device_array<float>(N), *rstd = device_array<float>(N);
    std::vector<int64_t> rows = sample_rows(N, C);
    int64_t R = rows.size();
    Floats x = random_rows<floatX>(rows, C, input), hw = host_random<floatX>(C, w), hb = host_random<floatX>(C, b),
           y(R * C), m(R), r(R);
    cpu::layernorm_forward(y.data(), m.data(), r.data(), x.data(), hw.data(), hb.data(), R, C);
    layernorm_forward(out, mean, rstd, inp, weight, bias, N, C);
    check_sample("layernorm_forward " + shape, "out", device_rows(out, rows, C), y, TOLERANCE);
    check_sample("layernorm_forward " + shape, "rstd", device_rows(rstd, rows, 1), r, FLOAT_TOLERANCE);

    need_scratch(layernorm_backward_scratch_bytes(C));
    floatX* dout = device_random<floatX>(N * C, gradient);
    floatX* dinp = device_random<floatX>(N * C, before);
    float *dweight = device_random<float>(C, before_w), *dbias = device_random<float>(C, before_b);
    layernorm_backward(dinp, dweight, dbias, NULL, dout, inp, weight, mean, rstd, N, C);
    Floats dx = random_rows<floatX>(rows, C, before), hd = random_rows<floatX>(rows, C, gradient), ignored(C);
    cpu::layernorm_backward(dx.data(), ignored.data(), ignored.data(), NULL, hd.data(), x.data(), hw.data(), m.data(),
                            r.data(), R, C);
    check_sample("layernorm_backward " + shape, "dinp", device_rows(dinp, rows, C), dx, TOLERANCE);
    Floats all_m = floats_to_host(mean, N), all_r = floats_to_host(rstd, N), dw = floats_to_host(dweight, C),
           db = floats_to_host(dbias, C), got, expected;
    for (int c : {0, 9, 600, 1023}) {
        double sum_w = random_normal(before_w.seed, c, 1, 0), sum_b = random_normal(before_b.seed, c, 1, 0);
        for (int64_t i = 0; i < N; i++) {
            double d = (float)(floatX)random_normal(gradient.seed, i * C + c, 1, 0);
            sum_w += d * ((float)(floatX)random_normal(input.seed, i * C + c, input.scale, input.offset) - all_m[i]) *
                     all_r[i];
            sum_b += d;
        }
        got.insert(got.end(), {dw[c], db[c]});
        expected.insert(expected.end(), {(float)sum_w, (float)sum_b});
    }
    check_sample("layernorm_backward " + shape, "dweight, dbias", got, expected, FLOAT_TOLERANCE);
    free_device_arrays();
}

// ---- matmul ---------------------------------------------------------------------------------------------------------
void check_matmul(int64_t N, int C, int OC, bool with_bias, bool with_addend, bool with_dinp) {
    std::string shape = format("N=%lld C=%d OC=%d%s%s", (long long)N, C, OC, with_bias ? " bias" : "",
                               with_addend ? " addend" : "");
    Random input = {1, 1, 0}, w = {2, 0.05f, 0}, b = {3, 1, 0}, add = {4, 1, 0}, gradient = {5, 1, 0},
           before = {6, 1, 0}, before_b = {7, 1, 0};
    floatX* inp = device_random<floatX>(N * C, input);
    floatX* weight = device_random<floatX>((int64_t)OC * C, w);
    floatX* bias = with_bias ? device_random<floatX>(OC, b) : NULL;
    floatX* addend = with_addend ? device_random<floatX>(N * OC, add) : NULL;
    floatX* out = device_array<floatX>(N * OC);
    Floats x = host_random<floatX>(N * C, input), hw = host_random<floatX>((int64_t)OC * C, w),
           hb = host_random<floatX>(OC, b), ha = host_random<floatX>(N * OC, add), y(N * OC);
    cpu::matmul_forward(y.data(), x.data(), hw.data(), with_bias ? hb.data() : NULL, with_addend ? ha.data() : NULL, N,
                        C, OC);
    check("matmul_forward " + shape, {overwritten("out", out, y)},
          [&] { matmul_forward(out, inp, weight, bias, addend, N, C, OC); });

    need_scratch(column_sums_scratch_bytes(OC));
    floatX* dout = device_random<floatX>(N * OC, gradient);
    floatX* dinp = with_dinp ? device_array<floatX>(N * C) : NULL;
    float* dweight = device_array<float>((int64_t)OC * C);
    float* dbias = with_bias ? device_array<float>(OC) : NULL;
    Floats hd = host_random<floatX>(N * OC, gradient), dx(N * C), dw = host_random<float>((int64_t)OC * C, before),
           db = host_random<float>(OC, before_b);
    cpu::matmul_backward(with_dinp ? dx.data() : NULL, dw.data(), false, with_bias ? db.data() : NULL, hd.data(), x.data(),
                         hw.data(), NULL, N, C, OC);
    std::vector<Output> outputs = {updated_float("dweight", dweight, before, dw, TENSOR_CORE_TOLERANCE)};
    if (with_dinp) outputs.push_back(overwritten("dinp", dinp, dx));
    if (with_bias) outputs.push_back(updated_float("dbias", dbias, before_b, db));
    check("matmul_backward " + shape, outputs,
          [&] { matmul_backward(dinp, dweight, false, dbias, dout, inp, weight, NULL, N, C, OC); });
    if (with_dinp) {  // inp = GELU(x); the twin multiplies by GELU' before it rounds, as the tensor cores' epilogue does
        Random before_gelu = {8, 2, 0};
        floatX* gelu_inp = device_random<floatX>(N * C, before_gelu);
        Floats hg = host_random<floatX>(N * C, before_gelu), dg(N * C), fresh((int64_t)OC * C);
        cpu::matmul_backward(dg.data(), fresh.data(), true, NULL, hd.data(), x.data(), hw.data(), hg.data(), N, C, OC);
        check("matmul_backward with GELU, fresh " + shape,
              {overwritten("dinp", dinp, dg), looser(overwritten_float("dweight", dweight, fresh), TENSOR_CORE_TOLERANCE)},
              [&] { matmul_backward(dinp, dweight, true, NULL, dout, inp, weight, gelu_inp, N, C, OC); });
    }
    free_device_arrays();
}

void check_matmul_large() {
    int64_t N = (1 << 20) + 3;
    int C = 64, OC = 2304;
    std::string shape = format("N=%lld C=%d OC=%d", (long long)N, C, OC);
    Random input = {1, 1, 0}, w = {2, 0.1f, 0}, b = {3, 1, 0}, add = {4, 1, 0}, gradient = {5, 1, 0},
           before = {6, 1, 0}, before_b = {7, 1, 0};
    floatX* inp = device_random<floatX>(N * C, input);
    floatX* weight = device_random<floatX>((int64_t)OC * C, w);
    floatX* bias = device_random<floatX>(OC, b);
    floatX* addend = device_random<floatX>(N * OC, add);
    floatX* out = device_array<floatX>(N * OC);
    std::vector<int64_t> rows = sample_rows(N, OC);
    int64_t R = rows.size();
    Floats x = random_rows<floatX>(rows, C, input), hw = host_random<floatX>((int64_t)OC * C, w),
           hb = host_random<floatX>(OC, b), ha = random_rows<floatX>(rows, OC, add), y(R * OC);
    cpu::matmul_forward(y.data(), x.data(), hw.data(), hb.data(), ha.data(), R, C, OC);
    matmul_forward(out, inp, weight, bias, addend, N, C, OC);
    check_sample("matmul_forward " + shape, "out", device_rows(out, rows, OC), y, TOLERANCE);

    need_scratch(column_sums_scratch_bytes(OC));
    floatX* dout = addend;
    gradient = add;
    floatX* dinp = device_array<floatX>(N * C);
    float *dweight = device_random<float>((int64_t)OC * C, before), *dbias = device_random<float>(OC, before_b);
    matmul_backward(dinp, dweight, false, dbias, dout, inp, weight, NULL, N, C, OC);
    Floats hd = random_rows<floatX>(rows, OC, gradient), dx(R * C), ignored((int64_t)OC * C);
    cpu::matmul_backward(dx.data(), ignored.data(), false, NULL, hd.data(), x.data(), hw.data(), NULL, R, C, OC);
    check_sample("matmul_backward " + shape, "dinp", device_rows(dinp, rows, C), dx, TOLERANCE);
    Floats dw = floats_to_host(dweight, (int64_t)OC * C), db = floats_to_host(dbias, OC), got_w, want_w, got_b, want_b;
    for (int o : {0, 300, 1111, 2303}) {
        for (int c : {0, 33, 63}) {
            double sum = random_normal(before.seed, (int64_t)o * C + c, 1, 0),
                   sum_b = random_normal(before_b.seed, o, 1, 0);
            for (int64_t i = 0; i < N; i++) {
                double d = (float)(floatX)random_normal(gradient.seed, i * OC + o, 1, 0);
                sum += d * (float)(floatX)random_normal(input.seed, i * C + c, 1, 0);
                sum_b += d;
            }
            got_w.push_back(dw[(int64_t)o * C + c]);
            want_w.push_back((float)sum);
            got_b.push_back(db[o]);
            want_b.push_back((float)sum_b);
        }
    }
    // A million products a sum: 2^16 additions, each cut off below 2^-24 of the sum.
    check_sample("matmul_backward " + shape, "dweight", got_w, want_w, 4e-3);
    check_sample("matmul_backward " + shape, "dbias", got_b, want_b, FLOAT_TOLERANCE);
    free_device_arrays();
}

// ---- gelu -----------------------------------------------------------------------------------------------------------
void check_gelu(int64_t n) {
    std::string shape = format("n=%lld", (long long)n);
    Random input = {1, 3, 0}, gradient = {2, 1, 0};
    floatX* inp = device_random<floatX>(n, input);
    floatX* dout = device_random<floatX>(n, gradient);
    floatX *out = device_array<floatX>(n), *dinp = device_array<floatX>(n);
    Floats x = host_random<floatX>(n, input), d = host_random<floatX>(n, gradient), y(n), dx(n);
    cpu::gelu_forward(y.data(), x.data(), n);
    cpu::gelu_backward(dx.data(), d.data(), x.data(), n);
    check("gelu_forward " + shape, {overwritten("out", out, y)}, [&] { gelu_forward(out, inp, n); });
    check("gelu_backward " + shape, {overwritten("dinp", dinp, dx)}, [&] { gelu_backward(dinp, dout, inp, n); });
    check("gelu_backward in place " + shape, {updated("dinp", dout, gradient, dx)},
          [&] { gelu_backward(dout, dout, inp, n); });
    free_device_arrays();
}

void check_gelu_large() {
    int64_t C = 4096, N = (1 << 19) + 5, n = N * C;
    std::string shape = format("n=%lld", (long long)n);
    Random input = {1, 3, 0}, gradient = {2, 1, 0};
    floatX* inp = device_random<floatX>(n, input);
    floatX* dout = device_random<floatX>(n, gradient);
    floatX* out = device_array<floatX>(n);
    std::vector<int64_t> rows = sample_rows(N, C);
    Floats x = random_rows<floatX>(rows, C, input), d = random_rows<floatX>(rows, C, gradient), y(x.size()),
           dx(x.size());
    cpu::gelu_forward(y.data(), x.data(), x.size());
    cpu::gelu_backward(dx.data(), d.data(), x.data(), x.size());
    gelu_forward(out, inp, n);
    check_sample("gelu_forward " + shape, "out", device_rows(out, rows, C), y, TOLERANCE);
    gelu_backward(dout, dout, inp, n);
    check_sample("gelu_backward " + shape, "dinp", device_rows(dout, rows, C), dx, TOLERANCE);
    free_device_arrays();
}

// ---- FP8 ------------------------------------------------------------------------------------------------------------
// A matrix in FP8 on the device, and the twin's.
struct Fp8Pair {
    Fp8Matrix device, host;
    int64_t n;
    std::vector<fp8_t> rows, columns;
    Fp8Scale scale;
};
void fp8_allocate(Fp8Pair* p, int64_t n) {
    p->n = n;
    p->device = {device_array<fp8_t>(n), device_array<fp8_t>(n), device_array<Fp8Scale>(1)};
    p->rows.resize(n);
    p->columns.resize(n);
    p->host = {p->rows.data(), p->columns.data(), &p->scale};
}
void fp8_both(Fp8Matrix y, float* dbias, const floatX* x, const floatX* pre, int64_t N, int C, bool gradient) {
    cudaCheck(cudaMemsetAsync(y.scale, 0, sizeof(Fp8Scale), main_stream));
    fp8_amax(y.scale, x, pre, N * C);
    fp8_quantize(y, dbias, x, pre, N, C, gradient);
}
void fp8_twin(Fp8Pair* p, float* dbias, const float* x, const float* pre, int64_t N, int C, bool gradient) {
    p->scale = {};
    cpu::fp8_amax(&p->scale, x, pre, N * C);
    cpu::fp8_quantize(p->host, dbias, x, pre, N, C, gradient);
}
// Bytes of a device matrix that differ from the twin's, and whether the bytes behind its end were left alone.
int64_t fp8_different(const fp8_t* device, const std::vector<fp8_t>& host, bool* guarded) {
    std::vector<fp8_t> got = to_host(device, host.size() + GUARD);
    int64_t different = 0;
    for (size_t i = 0; i < host.size(); i++) different += got[i] != host[i];
    for (size_t i = 0; i < GUARD; i++) *guarded = *guarded && got[host.size() + i] == GUARD_BYTE;
    return different;
}
Floats fp8_values(const std::vector<fp8_t>& q, float inverse, bool gradient) {
    Floats x(q.size());
    for (size_t i = 0; i < q.size(); i++) x[i] = cpu::fp8_value(q[i], gradient) * inverse;
    return x;
}

// Every byte of both layouts equals the twin's, also when only one of them is asked for. Where GELU is computed on the
// way, exp differs in its last bits and a few numbers round to the other side.
void check_fp8_quantize(const char* what, int64_t N, int C, bool gradient, bool gelu, const Floats& values) {
    std::string title = format("fp8_quantize N=%lld C=%d %s%s %s", (long long)N, C, gradient ? "e5m2" : "e4m3",
                               gelu ? " GELU" : "", what);
    std::vector<floatX> rounded(values.begin(), values.end());
    Floats x(rounded.begin(), rounded.end()), pre = host_random<floatX>(N * C, {2, 2, 0});
    Floats db = host_random<float>(C, {3, 1, 0});
    bool has_x = gradient || !gelu;
    floatX* device_x = has_x ? to_device(rounded) : NULL;
    floatX* device_pre = gelu ? device_random<floatX>(N * C, {2, 2, 0}) : NULL;
    float* dbias = device_random<float>(C, {3, 1, 0});
    need_scratch(column_sums_scratch_bytes(C));
    Fp8Pair p;
    fp8_allocate(&p, N * C);
    fp8_twin(&p, gradient ? db.data() : NULL, has_x ? x.data() : NULL, gelu ? pre.data() : NULL, N, C, gradient);
    fp8_both(p.device, gradient ? dbias : NULL, device_x, device_pre, N, C, gradient);
    Fp8Scale scale = to_host(p.device.scale, 1)[0];
    bool ok = true, guarded = true;
    if (gelu) {
        double error = relative_error(fp8_values(to_host(p.device.rows, p.n), scale.inverse, gradient),
                                      fp8_values(p.rows, p.scale.inverse, gradient));
        std::vector<fp8_t> got_rows = to_host(p.device.rows, p.n), got_columns = to_host(p.device.columns, p.n);
        int64_t different = 0;
        for (int64_t i = 0; i < N; i++) {
            for (int64_t c = 0; c < C; c++) different += got_rows[i * C + c] != got_columns[c * N + i];
        }
        ok = error <= 2e-3 && different == 0 && memcmp(&scale, &p.scale, sizeof scale) == 0;
        title += format(": differs by %.1e (at most 2e-03), %lld elements between the layouts", error,
                        (long long)different);
    } else {
        int64_t rows = fp8_different(p.device.rows, p.rows, &guarded),
                columns = fp8_different(p.device.columns, p.columns, &guarded);
        Fp8Pair single;  // one layout at a time
        fp8_allocate(&single, N * C);
        fp8_both({single.device.rows, NULL, single.device.scale}, NULL, device_x, NULL, N, C, gradient);
        fp8_both({NULL, single.device.columns, single.device.scale}, NULL, device_x, NULL, N, C, gradient);
        rows += fp8_different(single.device.rows, p.rows, &guarded);
        columns += fp8_different(single.device.columns, p.columns, &guarded);
        ok = rows == 0 && columns == 0 && memcmp(&scale, &p.scale, sizeof scale) == 0;
        if (std::isnan(p.scale.inverse)) ok = rows == 0 && columns == 0 && std::isnan(scale.inverse);
        title += format(": %lld and %lld bytes differ, scale %g / %g", (long long)rows, (long long)columns, scale.amax,
                        scale.inverse);
    }
    if (gradient && std::isfinite(p.scale.amax)) {
        double error = relative_error(floats_to_host(dbias, C), db);
        ok = ok && error <= FLOAT_TOLERANCE;
        title += format(", dbias %.1e", error);
    }
    report(ok && guarded, title + (guarded ? "" : ", written behind its end"));
    free_device_arrays();
}

void check_fp8_special_numbers() {
    int64_t N = 32;
    int C = 48;
    Floats plain = host_random<float>(N * C, {1, 1, 0});
    for (bool gradient : {false, true}) {
        struct { const char* name; float scale, one; } cases[] = {
            {"zeros", 0, 0}, {"one number among zeros", 0, -0.75f}, {"huge", 5e36f, 1e38f}, {"denormal", 1e-39f, 0},
            {"tiny", 1e-30f, 0}, {"a wide range", 1e-4f, 1000}, {"an infinity", 1, -INFINITY}, {"a NaN", 1, NAN}};
        for (auto& k : cases) {
            Floats x = plain;
            for (float& value : x) value *= k.scale;
            if (k.one != 0) x[777] = k.one;
            check_fp8_quantize(k.name, N, C, gradient, false, x);
        }
    }
}

// cuBLASLt's products of FP8 matrices against the twin's of the same bytes. Hopper's tensor cores keep 14 bits of a sum
// and cut the rest off: the forward product over a whole row, 4096 numbers in 128 steps here, the others over 128 numbers.
const double FP8_FORWARD_TOLERANCE = 1e-2, FP8_BACKWARD_TOLERANCE = 5e-3, FP8_DWEIGHT_TOLERANCE = 3e-3;

void check_fp8_matmul(int64_t N, int C, int OC, bool with_bias, bool with_addend) {
    std::string shape = format("N=%lld C=%d OC=%d%s%s", (long long)N, C, OC, with_bias ? " bias" : "",
                               with_addend ? " addend" : "");
    Random input = {1, 1, 0}, w = {2, 0.05f, 0}, b = {3, 1, 0}, add = {4, 1, 0}, gradient = {5, 1e-3f, 0},
           before = {6, 0.01f, 0};
    Floats x = host_random<floatX>(N * C, input), hw = host_random<floatX>((int64_t)OC * C, w),
           hd = host_random<floatX>(N * OC, gradient), hb = host_random<floatX>(OC, b),
           ha = host_random<floatX>(N * OC, add), dw = host_random<float>((int64_t)OC * C, before), y(N * OC),
           dx(N * C);
    Fp8Pair inp, weight, dout;
    fp8_allocate(&inp, N * C);
    fp8_allocate(&weight, (int64_t)OC * C);
    fp8_allocate(&dout, N * OC);
    fp8_twin(&inp, NULL, x.data(), NULL, N, C, false);
    fp8_twin(&weight, NULL, hw.data(), NULL, OC, C, false);
    fp8_twin(&dout, NULL, hd.data(), NULL, N, OC, true);
    fp8_both(inp.device, NULL, device_random<floatX>(N * C, input), NULL, N, C, false);
    fp8_both(weight.device, NULL, device_random<floatX>((int64_t)OC * C, w), NULL, OC, C, false);
    fp8_both(dout.device, NULL, device_random<floatX>(N * OC, gradient), NULL, N, OC, true);
    floatX *bias = with_bias ? device_random<floatX>(OC, b) : NULL;
    floatX *addend = with_addend ? device_random<floatX>(N * OC, add) : NULL;
    floatX *out = device_array<floatX>(N * OC), *dinp = device_array<floatX>(N * C);
    float* dweight = device_array<float>((int64_t)OC * C);
    cpu::fp8_matmul_forward(y.data(), inp.host, weight.host, with_bias ? hb.data() : NULL,
                            with_addend ? ha.data() : NULL, N, C, OC);
    Output o = overwritten("out", out, y);
    o.tolerance = FP8_FORWARD_TOLERANCE;
    check("fp8_matmul_forward " + shape, {o},
          [&] { fp8_matmul_forward(out, inp.device, weight.device, bias, addend, N, C, OC); });
    cpu::fp8_matmul_backward(dx.data(), dw.data(), false, dout.host, inp.host, weight.host, N, C, OC);
    o = overwritten("dinp", dinp, dx);
    o.tolerance = FP8_BACKWARD_TOLERANCE;
    check("fp8_matmul_backward " + shape,
          {o, updated_float("dweight", dweight, before, dw, FP8_DWEIGHT_TOLERANCE)},
          [&] { fp8_matmul_backward(dinp, dweight, false, dout.device, inp.device, weight.device, N, C, OC); });
    free_device_arrays();
}

// The largest magnitude is planted as the last element, so that the factor is known without a look at all the others.
void check_fp8_large() {
    int64_t N = (1 << 20) + 16;
    int C = 64, OC = 2304;
    const float planted = 7.25f;
    std::string shape = format("N=%lld C=%d OC=%d", (long long)N, C, OC);
    Random input = {1, 1, 0}, w = {2, 0.1f, 0}, gradient = {4, 1, 0}, before = {6, 1, 0}, before_b = {7, 1, 0};
    need_scratch(column_sums_scratch_bytes(OC));
    floatX *x = device_random<floatX>(N * C, input), *wide_w = device_random<floatX>((int64_t)OC * C, w);
    floatX* d = device_random<floatX>(N * OC, gradient);
    const floatX largest = (floatX)planted;
    cudaCheck(cudaMemcpyAsync(x + N * C - 1, &largest, sizeof largest, cudaMemcpyHostToDevice, main_stream));
    cudaCheck(cudaMemcpyAsync(d + N * OC - 1, &largest, sizeof largest, cudaMemcpyHostToDevice, main_stream));
    auto device_fp8 = [](int64_t n) -> Fp8Matrix {
        return {device_array<fp8_t>(n), device_array<fp8_t>(n), device_array<Fp8Scale>(1)};
    };
    Fp8Matrix inp = device_fp8(N * C), weight = device_fp8((int64_t)OC * C), dout = device_fp8(N * OC);
    float *dweight = device_random<float>((int64_t)OC * C, before), *dbias = device_random<float>(OC, before_b);
    fp8_both(inp, NULL, x, NULL, N, C, false);
    fp8_both(weight, NULL, wide_w, NULL, OC, C, false);
    fp8_both(dout, dbias, d, NULL, N, OC, true);
    Fp8Scale scale = to_host(dout.scale, 1)[0], inp_scale = to_host(inp.scale, 1)[0];
    report(scale.amax == planted && inp_scale.amax == planted,
           "fp8_amax " + shape + format(": %g and %g, not %g", scale.amax, inp_scale.amax, planted));

    std::vector<int64_t> rows = sample_rows(N, OC);
    int64_t R = rows.size();
    Floats hd = random_rows<floatX>(rows, OC, gradient), hx = random_rows<floatX>(rows, C, input);
    for (int64_t r = 0; r < R; r++) {
        if (rows[r] == N - 1) hd[r * OC + OC - 1] = hx[r * C + C - 1] = planted;
    }
    std::vector<fp8_t> d8(R * OC), x8(R * C);
    cpu::fp8_quantize({d8.data(), NULL, &scale}, NULL, hd.data(), NULL, R, OC, true);
    cpu::fp8_quantize({x8.data(), NULL, &inp_scale}, NULL, hx.data(), NULL, R, C, false);
    int64_t different = 0;
    for (int64_t r = 0; r < R; r++) {
        std::vector<fp8_t> got = to_host(dout.rows + rows[r] * OC, OC);
        for (int64_t c = 0; c < OC; c++) different += got[c] != d8[r * OC + c];
        for (int64_t c : {0, 1151, 2303})
            different += to_host(dout.columns + c * N + rows[r], 1)[0] != d8[r * OC + c];
    }
    report(different == 0, "fp8_quantize " + shape + format(": %lld bytes of a sample differ", (long long)different));

    Fp8Pair w8;
    fp8_allocate(&w8, (int64_t)OC * C);
    Floats hw = host_random<floatX>((int64_t)OC * C, w), y(R * OC), dx(R * C), ignored((int64_t)OC * C);
    fp8_twin(&w8, NULL, hw.data(), NULL, OC, C, false);
    floatX *out = device_array<floatX>(N * OC), *dinp = device_array<floatX>(N * C);
    fp8_matmul_forward(out, inp, weight, NULL, d, N, C, OC);
    cpu::fp8_matmul_forward(y.data(), {x8.data(), NULL, &inp_scale}, w8.host, NULL, hd.data(), R, C, OC);
    check_sample("fp8_matmul_forward " + shape, "out", device_rows(out, rows, OC), y, FP8_FORWARD_TOLERANCE);
    fp8_matmul_backward(dinp, dweight, false, dout, inp, weight, N, C, OC);
    cpu::fp8_matmul(dx.data(), d8.data(), w8.columns.data(), NULL, NULL, R, C, OC, scale.inverse * w8.scale.inverse,
                    true);
    check_sample("fp8_matmul_backward " + shape, "dinp", device_rows(dinp, rows, C), dx, FP8_BACKWARD_TOLERANCE);
    Floats dw = floats_to_host(dweight, (int64_t)OC * C), db = floats_to_host(dbias, OC), got_w, want_w, got_b, want_b;
    for (int o : {0, 1111, 2302}) {
        std::vector<fp8_t> column = to_host(dout.columns + o * N, N);
        double sum_b = random_normal(before_b.seed, o, 1, 0);
        for (int64_t i = 0; i < N; i++) sum_b += (float)(floatX)random_normal(gradient.seed, i * OC + o, 1, 0);
        got_b.push_back(db[o]);
        want_b.push_back((float)sum_b);
        for (int c : {0, 33, 62}) {
            std::vector<fp8_t> inp_column = to_host(inp.columns + c * N, N);
            double sum = 0;
            for (int64_t i = 0; i < N; i++)
                sum += (double)cpu::fp8_value(column[i], true) * cpu::fp8_value(inp_column[i], false);
            got_w.push_back(dw[(int64_t)o * C + c]);
            want_w.push_back((float)(sum * scale.inverse * inp_scale.inverse +
                                     random_normal(before.seed, (int64_t)o * C + c, 1, 0)));
        }
    }
    check_sample("fp8_matmul_backward " + shape, "dweight", got_w, want_w, 5e-3);
    check_sample("fp8_quantize " + shape, "dbias", got_b, want_b, FLOAT_TOLERANCE);
    free_device_arrays();
}

void check_fp8() {
    struct { int64_t N; int C; } sizes[] = {{16, 16}, {48, 80}, {144, 272}, {1040, 528}, {4112, 1600}, {16, 6400}};
    for (auto& s : sizes) {
        if (small_only && s.N > 200) continue;
        for (bool gradient : {false, true}) {
            for (bool gelu : {false, true})
                check_fp8_quantize("random", s.N, s.C, gradient, gelu,
                                   host_random<float>(s.N * s.C, {1, gradient ? 1e-5f : 1, 0}));
        }
    }
    check_fp8_special_numbers();
    int major, minor;
    cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    cudaCheck(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    if (sizeof(floatX) == 4 || 10 * major + minor < 89) {
        printf("     the FP8 products need bf16 and compute capability 8.9: not tested here\n");
        return;
    }
    check_fp8_matmul(16, 16, 16, true, true);
    check_fp8_matmul(144, 272, 80, true, false);
    check_fp8_matmul(80, 128, 400, false, true);
    if (small_only) return;
    check_fp8_matmul(1040, 1600, 528, true, false);
    check_fp8_matmul(528, 4096, 256, true, true);
    check_fp8_matmul(8208, 256, 768, true, true);
    check_fp8_large();
}

// ---- cross-entropy --------------------------------------------------------------------------------------------------
void check_crossentropy(int64_t N, int V, int Vp, float scale) {
    std::string shape = format("N=%lld V=%d Vp=%d logits of size %g", (long long)N, V, Vp, scale);
    Random input = {1, scale, 0};
    floatX* logits = device_array<floatX>(N * Vp);
    float* losses = device_array<float>(N);
    std::vector<int> targets(N);
    for (int64_t i = 0; i < N; i++) targets[i] = i % 7 == 3 ? -1 : (int)(random_bits(8, i) % V);
    targets[0] = V - 1;
    int* device_targets = to_device(targets);
    Floats x = host_random<floatX>(N * Vp, input), y = x, l(N);
    cpu::crossentropy_forward_backward(y.data(), l.data(), targets.data(), 0.37f, N, V, Vp, true);
    check("crossentropy " + shape, {updated("dlogits", logits, input, y), overwritten_float("losses", losses, l)},
          [&] { crossentropy_forward_backward(logits, losses, device_targets, 0.37f, N, V, Vp, true); });
    check("crossentropy no gradient " + shape,
          {updated("logits", logits, input, x), overwritten_float("losses", losses, l)},
          [&] { crossentropy_forward_backward(logits, losses, device_targets, 0.37f, N, V, Vp, false); });
    free_device_arrays();
}

void check_crossentropy_large(int64_t N, int V, int Vp) {
    std::string shape = format("N=%lld V=%d", (long long)N, V);
    Random input = {1, 2, 0};
    floatX* logits = device_random<floatX>(N * Vp, input);
    float* losses = device_array<float>(N);
    int* targets = device_random_ints(N, 8, V, 1);
    std::vector<int64_t> rows = sample_rows(N, Vp);
    std::vector<int> all = to_host(targets, N), some;
    for (int64_t row : rows) some.push_back(all[row]);
    Floats y = random_rows<floatX>(rows, Vp, input), l(rows.size());
    cpu::crossentropy_forward_backward(y.data(), l.data(), some.data(), 1.0f, rows.size(), V, Vp, true);
    crossentropy_forward_backward(logits, losses, targets, 1.0f, N, V, Vp, true);
    check_sample("crossentropy " + shape, "dlogits", device_rows(logits, rows, Vp), y, TOLERANCE);
    check_sample("crossentropy " + shape, "losses", device_rows(losses, rows, 1), l, FLOAT_TOLERANCE);
    free_device_arrays();
}

// ---- RoPE -----------------------------------------------------------------------------------------------------------
void check_rope(int B, int64_t T, int H, int D, int64_t t0, bool large) {
    std::string shape = format("B=%d T=%lld H=%d D=%d t0=%lld", B, (long long)T, H, D, (long long)t0);
    int64_t row = 3 * (int64_t)H * D, N = B * T, table_size = (1024 + (t0 + T + 1023) / 1024) * D;
    Floats table(table_size);
    rope_table(table.data(), t0 + T, D, 10000.0);
    float* device_table = to_device(table);
    Random input = {1, 1, 0};
    floatX* qkv = device_random<floatX>(N * row, input);
    if (large) {
        std::vector<int64_t> rows = sample_rows(N, row);
        Floats y = random_rows<floatX>(rows, row, input);
        for (size_t i = 0; i < rows.size(); i++) {
            for (int h = 0; h < 2 * H; h++) cpu::rope_turn(&y[i * row + h * D], table.data(), t0 + rows[i] % T, 1, D);
        }
        rope_rotate(qkv, device_table, 1, B, T, H, D, t0);
        check_sample("rope_rotate " + shape, "qkv", device_rows(qkv, rows, row), y, TOLERANCE);
    } else {
        for (int direction : {1, -1}) {
            Floats y = host_random<floatX>(N * row, input);
            cpu::rope_rotate(y.data(), table.data(), direction, B, T, H, D, t0);
            check(format("rope_rotate %+d ", direction) + shape, {updated("qkv", qkv, input, y)},
                  [&] { rope_rotate(qkv, device_table, direction, B, T, H, D, t0); });
        }
    }
    free_device_arrays();
}

// ---- context parallelism --------------------------------------------------------------------------------------------
void check_heads(int B, int64_t R, int W, int n) {
    std::string shape = format("B=%d R=%lld W=%d n=%d", B, (long long)R, W, n);
    int64_t size = B * R * W * n;
    Random input = {1, 1, 0};
    floatX *inp = device_random<floatX>(size, input), *out = device_array<floatX>(size);
    Floats x = host_random<floatX>(size, input), y(size);
    auto moved = [&] {  // bit for bit
        Output o = overwritten("out", out, y);
        o.tolerance = 0;
        return o;
    };
    cpu::heads_pack(y.data(), x.data(), B, R, W, n);
    check("heads_pack " + shape, {moved()}, [&] { heads_pack(out, inp, B, R, W, n); });
    cpu::heads_unpack(y.data(), x.data(), B, R, W, n);
    check("heads_unpack " + shape, {moved()}, [&] { heads_unpack(out, inp, B, R, W, n); });
    free_device_arrays();
}

void check_heads_large() {
    int W = 4, n = 256;
    int64_t R = (1 << 20) + 3, blocks = R * W;
    std::string shape = format("R=%lld W=%d n=%d", (long long)R, W, n);
    Random input = {1, 1, 0};
    floatX *inp = device_random<floatX>(2 * blocks * n, input), *out = device_array<floatX>(2 * blocks * n);
    std::vector<int64_t> rows = sample_rows(2 * blocks, n), packed, unpacked;  // where each block of out comes from
    for (int64_t i : rows) {
        int64_t b = i / blocks * blocks, j = i % blocks;
        packed.push_back(b + j % R * W + j / R);
        unpacked.push_back(b + j % W * R + j / W);
    }
    heads_pack(out, inp, 2, R, W, n);
    check_sample("heads_pack " + shape, "out", device_rows(out, rows, n), random_rows<floatX>(packed, n, input), 0);
    heads_unpack(out, inp, 2, R, W, n);
    check_sample("heads_unpack " + shape, "out", device_rows(out, rows, n), random_rows<floatX>(unpacked, n, input), 0);
    free_device_arrays();
}

// ---- sums, AdamW ----------------------------------------------------------------------------------------------------
void check_sums(int64_t n, int shift) {
    std::string shape = format("n=%lld, %d elements off alignment", (long long)n, shift);
    Random input = {1, 1, 0.25f};
    need_scratch(sum_scratch_bytes());
    float* x = device_random<float>(n + shift, input) + shift;
    double sum = 0, squares = 0;
    #pragma omp parallel for reduction(+ : sum, squares)
    for (int64_t i = 0; i < n; i++) {
        double v = random_normal(input.seed, i + shift, input.scale, input.offset);
        sum += v;
        squares += v * v;
    }
    double* total = device_array<double>(1);
    auto added = [&](void (*op)(double*, const float*, int64_t), double start) {  // what op adds to start
        copy_to_device(total, &start, sizeof start);
        op(total, x, n);
        double end;
        copy_to_host(&end, total, sizeof end);
        return end - start;
    };
    double got = added(sum_losses, 0), got_squares = added(sum_squares, 0);
    report(fabs(got - sum) <= 1e-6 * fabs(squares) && got == added(sum_losses, 0), "sum_losses " + shape +
           format(": relative error %.1e, same bits again", fabs(got / sum - 1)));
    report(fabs(got_squares / squares - 1) <= 1e-6 && got_squares == added(sum_squares, 0), "sum_squares " + shape +
           format(": relative error %.1e, same bits again", fabs(got_squares / squares - 1)));
    report(fabs(added(sum_squares, squares) / squares - 1) <= 1e-6, "sum_squares adds to its total " + shape);
    if (n <= 100000000) {
        Floats host = floats_to_host(x, n);
        double twin = 0, twin_sum = 0;
        cpu::sum_squares(&twin, host.data(), n);
        cpu::sum_losses(&twin_sum, host.data(), n);
        report(fabs(twin / got_squares - 1) <= 1e-6 && fabs(twin_sum - got) <= 1e-6 * squares,
               "sums as the twin's " + shape);
    }
    free_device_arrays();
}

void check_adamw(int64_t n, bool masters) {
    std::string shape = format("n=%lld%s", (long long)n, masters ? "" : ", no masters");
    Random p = {1, 1, 0}, m = {2, 0.01f, 0}, v = {3, 1e-5f, 1e-4f}, g = {4, 0.1f, 0};
    float *dp = device_array<float>(n), *dm = device_array<float>(n), *dv = device_array<float>(n);
    float* grads = device_random<float>(n, g);
    floatX* params = device_array<floatX>(n);
    Floats hp = host_random<float>(n, p), hm = host_random<float>(n, m), hv = host_random<float>(n, v),
           hg = host_random<float>(n, g), twin_params(n);
    AdamW adamw = {3e-2f, 0.9f, 0.95f, 1 - powf(0.9f, 5), 1 - powf(0.95f, 5), 1e-8f, 0.1f, 0.7f};
    cpu::adamw_update(twin_params.data(), hp.data(), hm.data(), hv.data(), hg.data(), n, adamw);
    std::vector<Output> outputs = {updated_float("master", dp, p, hp), updated_float("m", dm, m, hm),
                                   updated_float("v", dv, v, hv)};
    if (masters) {
        outputs.push_back(overwritten("params", params, hp));
        check("adamw_update " + shape, outputs, [&] {
            adamw_update(params, dp, dm, dv, grads, n, adamw);
        });
        Floats got = floats_to_host(params, n), master = floats_to_host(dp, n);
        int64_t different = 0;
        for (int64_t i = 0; i < n; i++) different += got[i] != (float)(floatX)master[i];
        report(different == 0, format("adamw_update n=%lld: %lld parameters are not their master rounded", (long long)n,
                                      (long long)different));
    } else {
        check("adamw_update " + shape, outputs, [&] {
            adamw_update((floatX*)dp, NULL, dm, dv, grads, n, adamw);
        });
    }
    free_device_arrays();
}

void check_adamw_large() {
    int64_t n = ((int64_t)1 << 31) + 13;
    Random p = {1, 1, 0}, m = {2, 0.01f, 0}, v = {3, 1e-5f, 1e-4f}, g = {4, 0.1f, 0};
    float *dp = device_random<float>(n, p), *dm = device_random<float>(n, m), *dv = device_random<float>(n, v),
          *grads = device_random<float>(n, g);
    floatX* params = device_array<floatX>(n);
    AdamW adamw = {3e-2f, 0.9f, 0.95f, 0.4f, 0.2f, 1e-8f, 0.1f, 0.7f};
    adamw_update(params, dp, dm, dv, grads, n, adamw);
    Floats got, expected;
    for (int64_t first : {(int64_t)0, ((int64_t)1 << 31) - 1000, n - 1001}) {
        Floats hp = host_random<float>(1001, p, first), hm = host_random<float>(1001, m, first),
               hv = host_random<float>(1001, v, first), hg = host_random<float>(1001, g, first), ignored(1001);
        cpu::adamw_update(ignored.data(), hp.data(), hm.data(), hv.data(), hg.data(), 1001, adamw);
        Floats x = floats_to_host(params + first, 1001);
        got.insert(got.end(), x.begin(), x.end());
        expected.insert(expected.end(), hp.begin(), hp.end());
    }
    check_sample(format("adamw_update n=%lld", (long long)n), "params", got, expected, TOLERANCE);
    free_device_arrays();
}

void check_all() {
    if (is_wanted("encoder")) {
        check_encoder(1, 1, 8, 257, 384, 0, true, 1);
        check_encoder(2, 515, 72, 50257, 50304, 7, true, 1);
        check_encoder(3, 1000, 264, 257, 384, 0, false, 2);
        check_encoder(1, 2049, 40, 100, 128, 0, false, 1000000);
        check_encoder(1, 4133, 8, 300000, 300032, 0, false, 3);
        if (!small_only) {
            check_encoder(2, 3000, 768, 50257, 50304, 7, true, 4);
            check_encoder(1, 98304, 64, 257, 384, 0, false, 3);
            check_encoder(1, 200001, 40, 70000, 70016, 0, false, 6);
            check_encoder(1, 16387, 2056, 257, 384, 0, false, 1000000);
            check_encoder_large();
        }
    }
    if (is_wanted("layernorm")) {
        check_layernorm(1, 8, 0);
        check_layernorm(33, 264, 3);
        check_layernorm(301, 768, 0.5f);
        check_layernorm(37, 4096, 0);
        if (!small_only) {
            check_layernorm(9001, 1600, 10);
            check_layernorm(5003, 1024, 100);
            check_layernorm_large();
        }
    }
    if (is_wanted("matmul")) {
        check_matmul(1, 8, 8, true, true, true);
        check_matmul(67, 72, 200, true, false, true);
        check_matmul(130, 256, 264, false, true, false);
        if (!small_only) {
            check_matmul(1001, 768, 2304, true, false, true);
            check_matmul(999, 3072, 768, true, true, true);
            check_matmul(257, 768, 50304, false, false, true);
            check_matmul(20000, 64, 1024, true, false, true);
            check_matmul_large();
        }
    }
    if (is_wanted("gelu")) {
        check_gelu(8);
        check_gelu(4096 * 7 + 8 * 13);
        if (!small_only) {
            check_gelu(10000008);
            check_gelu_large();
        }
    }
    if (is_wanted("fp8")) check_fp8();
    if (is_wanted("crossentropy")) {
        check_crossentropy(1, 5, 8, 1);
        check_crossentropy(77, 257, 384, 2);
        check_crossentropy(29, 1021, 1024, 2);
        check_crossentropy(5, 1025, 1032, 20);
        check_crossentropy(13, 50257, 50304, 2);
        if (!small_only) {
            check_crossentropy(5001, 257, 512, 10);
            check_crossentropy(300, 50257, 50304, 5);
            check_crossentropy(9, 200019, 200064, 3);
            check_crossentropy_large(42752, 50257, 50304);
            check_crossentropy_large(5600000, 257, 384);
        }
    }
    if (is_wanted("rope")) {
        check_rope(1, 1, 1, 16, 0, false);
        check_rope(2, 1030, 3, 64, 0, false);
        check_rope(1, 333, 5, 32, 777, false);
        if (!small_only) {
            check_rope(3, 4100, 8, 128, 5000, false);
            check_rope(1, (1 << 20) + 1, 8, 128, 0, true);
        }
    }
    if (is_wanted("heads")) {
        check_heads(1, 1, 1, 8);
        check_heads(2, 9, 3, 64);
        check_heads(3, 33, 2, 320);
        if (!small_only) {
            check_heads(2, 4099, 8, 128);
            check_heads_large();
        }
    }
    if (is_wanted("sum")) {
        check_sums(1, 0);
        check_sums(13, 3);
        check_sums(100003, 1);
        if (!small_only) {
            check_sums(50000000, 0);
            check_sums(((int64_t)1 << 31) + 9, 2);
        }
    }
    if (is_wanted("adamw")) {
        check_adamw(5, true);
        check_adamw(100003, true);
        if (sizeof(floatX) == 4) check_adamw(100003, false);
        if (!small_only) check_adamw_large();
    }
}

// ---- timing ---------------------------------------------------------------------------------------------------------
// Median of 15 runs, each between two events, after 3 that do not count. Tensors are several times the L2.
double median_ms(const std::function<void()>& run) {
    cudaEvent_t begin, end;
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 18; i++) {
        float ms;
        cudaCheck(cudaEventRecord(begin, main_stream));
        run();
        cudaCheck(cudaEventRecord(end, main_stream));
        cudaCheck(cudaEventSynchronize(end));
        cudaCheck(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 3) times.push_back(ms);
    }
    cudaCheck(cudaEventDestroy(begin));
    cudaCheck(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}
// bytes: each input read once, each output written once
void time_bytes(const std::string& title, double bytes, const std::function<void()>& run) {
    double ms = median_ms(run), gbs = bytes / ms * 1e-6;
    printf("time %-58s %8.3f ms %6.0f GB/s %4.0f%% of copy\n", title.c_str(), ms, gbs, 100 * gbs / copy_gbs);
    fflush(stdout);
}
void time_flops(const std::string& title, double flops, const std::function<void()>& run) {
    double ms = median_ms(run);
    printf("time %-58s %8.3f ms %6.0f TFLOP/s\n", title.c_str(), ms, flops / ms * 1e-9);
    fflush(stdout);
}

void time_copy() {
    size_t n = (size_t)4 << 30;
    char *a = device_array<char>(n), *b = device_array<char>(n);
    fill_kernel<<<grid_for(n / 4, 256), 256, 0, main_stream>>>((float*)a, n / 4, Random{1, 1, 0});
    double ms = median_ms([&] { cudaCheck(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice, main_stream)); });
    copy_gbs = 2.0 * n / ms * 1e-6;
    printf("time %-58s %8.3f ms %6.0f GB/s\n", "device copy of 4 GiB, bytes read + written", ms, copy_gbs);
    free_device_arrays();
}

void time_encoder(int64_t N, int C, int V, int Vp, int skew) {
    std::string shape = format("N=%lld C=%d V=%d%s", (long long)N, C, V, skew > 1 ? " skewed" : "");
    int* tokens = device_random_ints(N, 6, V, skew);
    std::vector<int> host_tokens = to_host(tokens, N);
    std::sort(host_tokens.begin(), host_tokens.end());
    double words = std::unique(host_tokens.begin(), host_tokens.end()) - host_tokens.begin();
    floatX* wte = device_random<floatX>((int64_t)Vp * C, {1, 1, 0});
    floatX* out = device_random<floatX>(N * C, {2, 1, 0});
    float* dwte = device_random<float>((int64_t)Vp * C, {3, 1, 0});
    need_scratch(encoder_backward_scratch_bytes(N, C));
    double row = C * sizeof(floatX);
    time_bytes("encoder_forward " + shape, N * row + words * row,
               [&] { encoder_forward(out, tokens, wte, NULL, 1, N, C, 0); });
    time_bytes("encoder_backward " + shape, N * row + words * C * 8,
               [&] { encoder_backward(dwte, NULL, out, tokens, 1, N, C, 0, Vp); });
    free_device_arrays();
}

void time_layernorm(int64_t N, int C) {
    std::string shape = format("N=%lld C=%d", (long long)N, C);
    floatX *inp = device_random<floatX>(N * C, {1, 1, 0}), *out = device_random<floatX>(N * C, {2, 1, 0}),
           *dinp = device_random<floatX>(N * C, {3, 1, 0}), *weight = device_random<floatX>(C, {4, 1, 0}),
           *bias = device_random<floatX>(C, {5, 1, 0});
    float *mean = device_array<float>(N), *rstd = device_array<float>(N);
    float *dweight = device_random<float>(C, {6, 1, 0}), *dbias = device_random<float>(C, {7, 1, 0});
    need_scratch(layernorm_backward_scratch_bytes(C));
    double size = (double)N * C * sizeof(floatX);
    time_bytes("layernorm_forward " + shape, 2 * size,
               [&] { layernorm_forward(out, mean, rstd, inp, weight, bias, N, C); });
    time_bytes("layernorm_backward " + shape, 4 * size,
               [&] { layernorm_backward(dinp, dweight, dbias, dweight, out, inp, weight, mean, rstd, N, C); });
    free_device_arrays();
}

void time_matmul(int64_t N, int C, int OC, bool with_bias, bool with_addend) {
    std::string shape = format("N=%lld C=%d OC=%d%s%s", (long long)N, C, OC, with_bias ? " bias" : "",
                               with_addend ? " addend" : "");
    floatX *inp = device_random<floatX>(N * C, {1, 1, 0}), *weight = device_random<floatX>((int64_t)OC * C, {2, 1, 0}),
           *bias = device_random<floatX>(OC, {3, 1, 0}), *addend = device_random<floatX>(N * OC, {4, 1, 0}),
           *out = device_array<floatX>(N * OC), *dinp = device_array<floatX>(N * C);
    float *dweight = device_random<float>((int64_t)OC * C, {5, 1, 0}), *dbias = device_random<float>(OC, {6, 1, 0});
    need_scratch(column_sums_scratch_bytes(OC));
    double flops = 2.0 * N * C * OC;
    time_flops("matmul_forward " + shape, flops, [&] {
        matmul_forward(out, inp, weight, with_bias ? bias : NULL, with_addend ? addend : NULL, N, C, OC);
    });
    time_flops("matmul_backward dinp and dweight, " + shape, 2 * flops,
               [&] { matmul_backward(dinp, dweight, false, NULL, addend, inp, weight, NULL, N, C, OC); });
    time_flops("matmul_backward only dweight, " + shape, flops,
               [&] { matmul_backward(NULL, dweight, false, NULL, addend, inp, weight, NULL, N, C, OC); });
    if (with_bias) {
        time_bytes("bias_backward " + shape, (double)N * OC * sizeof(floatX),
                   [&] { bias_backward(dbias, addend, N, OC); });
    }
    free_device_arrays();
}

// What a layer's product costs with FP8 operands: bytes of the two passes over each of them, and the products.
void time_fp8(int64_t N, int C, int OC) {
    if (sizeof(floatX) == 4) return;
    std::string shape = format("N=%lld C=%d OC=%d", (long long)N, C, OC);
    floatX *inp = device_random<floatX>(N * C, {1, 1, 0}), *wide = device_random<floatX>((int64_t)OC * C, {2, 1, 0}),
           *dout = device_random<floatX>(N * OC, {3, 1, 0}), *pre = device_random<floatX>(N * OC, {4, 1, 0}),
           *bias = device_random<floatX>(OC, {5, 1, 0}), *out = device_array<floatX>(N * OC);
    float *dweight = device_random<float>((int64_t)OC * C, {6, 1, 0}), *dbias = device_random<float>(OC, {7, 1, 0});
    auto device_fp8 = [](int64_t n) -> Fp8Matrix {
        return {device_array<fp8_t>(n), device_array<fp8_t>(n), device_array<Fp8Scale>(1)};
    };
    Fp8Matrix x = device_fp8(N * C), w = device_fp8((int64_t)OC * C), d = device_fp8(N * OC);
    need_scratch(column_sums_scratch_bytes(OC));
    for (auto& y : {x, w, d}) cudaCheck(cudaMemsetAsync(y.scale, 0, sizeof(Fp8Scale), main_stream));
    double n = (double)N * C, dn = (double)N * OC, flops = 2.0 * N * C * OC;
    time_bytes("fp8_amax of inp " + shape, 2 * n, [&] { fp8_amax(x.scale, inp, NULL, N * C); });
    time_bytes("fp8_quantize inp, both layouts " + shape, 4 * n,
               [&] { fp8_quantize(x, NULL, inp, NULL, N, C, false); });
    time_bytes("fp8_amax of dout " + shape, 2 * dn, [&] { fp8_amax(d.scale, dout, NULL, N * OC); });
    time_bytes("fp8_quantize dout, bias " + shape, 4 * dn, [&] { fp8_quantize(d, dbias, dout, NULL, N, OC, true); });
    time_bytes("fp8_quantize GELU " + shape, 4 * dn, [&] { fp8_quantize(d, NULL, NULL, pre, N, OC, false); });
    time_bytes("fp8_quantize GELU', bias " + shape, 6 * dn, [&] { fp8_quantize(d, dbias, dout, pre, N, OC, true); });
    fp8_both(w, NULL, wide, NULL, OC, C, false);
    time_flops("fp8_matmul_forward " + shape, flops, [&] { fp8_matmul_forward(out, x, w, bias, NULL, N, C, OC); });
    time_flops("fp8_matmul_backward " + shape, 2 * flops,
               [&] { fp8_matmul_backward(inp, dweight, false, d, x, w, N, C, OC); });
    free_device_arrays();
}

void time_rope(int64_t T, int H, int D) {
    Floats table((1024 + (T + 1023) / 1024) * D);
    rope_table(table.data(), T, D, 10000.0);
    float* device_table = to_device(table);
    floatX* qkv = device_random<floatX>(T * 3 * H * D, {1, 1, 0});
    time_bytes(format("rope_rotate T=%lld H=%d D=%d", (long long)T, H, D), 2.0 * T * 2 * H * D * sizeof(floatX),
               [&] { rope_rotate(qkv, device_table, 1, 1, T, H, D, 0); });
    free_device_arrays();
}

void time_heads(int64_t R, int W, int n) {
    floatX *inp = device_random<floatX>(R * W * n, {1, 1, 0}), *out = device_array<floatX>(R * W * n);
    std::string shape = format("R=%lld W=%d n=%d", (long long)R, W, n);
    double bytes = 2.0 * R * W * n * sizeof(floatX);
    time_bytes("heads_pack " + shape, bytes, [&] { heads_pack(out, inp, 1, R, W, n); });
    time_bytes("heads_unpack " + shape, bytes, [&] { heads_unpack(out, inp, 1, R, W, n); });
    free_device_arrays();
}

void time_all() {
    time_copy();
    int64_t N = 98304;
    if (is_wanted("encoder")) {
        time_encoder(N, 1024, 257, 384, 1);
        time_encoder(N, 1024, 257, 384, 3);
        time_encoder(N, 1024, 50257, 50304, 1);
        time_encoder(N, 1024, 50257, 50304, 4);
        time_encoder(N, 768, 50257, 50304, 4);
        time_encoder(1 << 20, 1024, 257, 384, 3);
        time_encoder(1 << 20, 1024, 50257, 50304, 4);
    }
    if (is_wanted("layernorm")) {
        for (int C : {768, 1024, 1280, 1600}) time_layernorm(N, C);
    }
    if (is_wanted("gelu")) {
        int64_t n = N * 4096;
        floatX *inp = device_random<floatX>(n, {1, 1, 0}), *out = device_random<floatX>(n, {2, 1, 0});
        double size = (double)n * sizeof(floatX);
        time_bytes("gelu_forward N=98304 4C=4096", 2 * size, [&] { gelu_forward(out, inp, n); });
        time_bytes("gelu_backward in place, N=98304 4C=4096", 3 * size, [&] { gelu_backward(out, out, inp, n); });
        free_device_arrays();
    }
    if (is_wanted("crossentropy")) {
        struct { int64_t N; int V, Vp; } shapes[] = {{1280, 50257, 50304}, {4096, 50257, 50304}, {32768, 50257, 50304},
                                                     {N, 257, 384}, {N, 512, 512}, {8 * N, 257, 384}};
        for (auto& s : shapes) {
            floatX* logits = device_array<floatX>(s.N * s.Vp);
            float* losses = device_array<float>(s.N);
            int* targets = device_random_ints(s.N, 8, s.V, 1);
            double size = (double)s.N * s.Vp * sizeof(floatX);
            auto shape = format(" N=%lld V=%d", (long long)s.N, s.V);
            fill_kernel<<<grid_for(s.N * s.Vp, 256), 256, 0, main_stream>>>(logits, s.N * s.Vp, Random{1, 1, 0});
            time_bytes("crossentropy no gradient" + shape, size,
                       [&] { crossentropy_forward_backward(logits, losses, targets, 1.0f, s.N, s.V, s.Vp, false); });
            time_bytes("crossentropy" + shape, 2 * size,  // from the second run on its input is its own gradient
                       [&] { crossentropy_forward_backward(logits, losses, targets, 1.0f, s.N, s.V, s.Vp, true); });
            free_device_arrays();
        }
    }
    if (is_wanted("rope")) {
        time_rope(N, 8, 128);
        time_rope(N, 12, 64);
        time_rope(1 << 20, 8, 128);
    }
    if (is_wanted("heads")) {
        for (int W : {2, 8}) time_heads(3 * (1 << 17), W, 1024 / W);
        time_heads(3 * (1 << 17), 4, 192);
    }
    if (is_wanted("sum") || is_wanted("adamw")) {
        int64_t n = 429000000;
        float *p = device_random<float>(n, {1, 1, 0}), *m = device_random<float>(n, {2, 1, 0}),
              *v = device_random<float>(n, {3, 0.1f, 1}), *g = device_random<float>(n, {4, 1, 0});
        floatX* params = device_array<floatX>(n);
        double* result = device_array<double>(1);
        need_scratch(sum_scratch_bytes());
        time_bytes("sum_squares n=429M", 4.0 * n, [&] { sum_squares(result, g, n); });
        time_bytes("adamw_update n=429M", n * (28.0 + sizeof(floatX)), [&] {
            adamw_update(params, p, m, v, g, n, {1e-3f, 0.9f, 0.95f, 0.1f, 0.05f, 1e-8f, 0.1f, 1.0f});
        });
        free_device_arrays();
    }
    if (is_wanted("fp8")) {
        struct { int64_t N; int C; } shapes[] = {{16384, 1600}, {N, 1024}};
        for (auto& s : shapes) {
            time_fp8(s.N, s.C, 3 * s.C);
            time_fp8(s.N, s.C, s.C);
            time_fp8(s.N, s.C, 4 * s.C);
            time_fp8(s.N, 4 * s.C, s.C);
        }
    }
    if (is_wanted("matmul")) {
        for (int C : {1024, 768}) {
            time_matmul(N, C, 3 * C, true, false);
            time_matmul(N, C, C, true, true);
            time_matmul(N, C, 4 * C, true, false);
            time_matmul(N, 4 * C, C, true, true);
        }
        for (int64_t rows : {1280, 4096, 8192}) time_matmul(rows, 1024, 50304, false, false);
        time_matmul(N, 1024, 384, false, false);
    }
}

int main(int argc, char** argv) {
    bool checks = true, times = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--small") == 0) { small_only = true; times = false; }
        else if (strcmp(argv[i], "--check") == 0) times = false;
        else if (strcmp(argv[i], "--time") == 0) checks = false;
        else if (argv[i][0] == '-') { fprintf(stderr, "unknown option %s\n", argv[i]); return EXIT_FAILURE; }
        else wanted.push_back(argv[i]);
    }
    device_open(0);
    cudaCheck(cudaMalloc(&cublaslt_workspace, cublaslt_workspace_bytes));
    cudaDeviceProp device;
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    printf("%s, %d multiprocessors, %s activations\n", device.name, device.multiProcessorCount,
           sizeof(floatX) == 4 ? "fp32" : "bf16");
    if (checks) check_all();
    if (times) time_all();
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
