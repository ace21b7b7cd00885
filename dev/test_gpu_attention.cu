// Proves that the CUDA attention, cuDNN's SDPA and every Lighthouse kernel, computes what its twin in dev/cpu_ops.h
// states and what the published Lighthouse release computed (dev/vectors); then times it.
//
//   make build/test_gpu_attention           or build/test_gpu_attention_fp32; by hand:
//   nvcc -O3 -std=c++17 -arch=native -Xcompiler -fopenmp dev/test_gpu_attention.cu -lcublasLt -lcudnn -o build/...
//   build/test_gpu_attention                all parts; run from the repository's folder
//   build/test_gpu_attention ops sdpa       only these of: ops sdpa vectors million times
//   build/test_gpu_attention quick          the Lighthouse kernels at small shapes, for compute-sanitizer
//   build/test_gpu_attention kernels        the times without those of attention over all tokens
//   build/test_gpu_attention times json     the times; each shape's also as a line of JSON, for scripts/bench
//   build/test_gpu_attention once           one run of each kernel, for a profiler
// With -DFLOATX_FP32 the kernels work in fp32 and must agree to fp32 rounding; there sdpa is the plain fp32 kernel.
//
// Inputs are fresh random numbers rounded to floatX, so that both sides see the same. Outputs are poisoned with NaN (or
// -1) before each run, the bytes behind them must survive, and a second run must give the same bits. Errors are
// ||gpu - cpu|| / ||cpu||, or a tenth of that of the worst 64 neighbours.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include "cpu_ops.h"
#include "gpu_harness.cuh"

typedef std::vector<int32_t> Ints;

static const bool IS_BF16 = sizeof(floatX) == 2;
// A result rounded once to bf16: 1.6e-3 where mantissas spread evenly, 3.9e-3 at worst. In fp32: the additions' order.
static const double ROUNDED = IS_BF16 ? 2.5e-3 : 3e-6;
// Attention in bf16 also rounds the weights before they meet V, and dS before it meets K and Q.
static const double SDPA_OUT = IS_BF16 ? 5e-3 : 1e-5, SDPA_GRADIENT = IS_BF16 ? 8e-3 : 3e-5;

// The worst of the rows' errors, for samples whose rows differ in size.
static double worst_row_error(const Floats& x, const Floats& reference, int64_t row) {
    double worst = 0;
    for (size_t i = 0; i < x.size(); i += row) {
        worst = fmax(worst, relative_error(Floats(&x[i], &x[i] + row), Floats(&reference[i], &reference[i] + row)));
    }
    return worst;
}

// ---- random numbers that the host can make again for any index ----------------------------------------------------
// 8 significant bits and a scale of a power of 2, so that bf16 holds them exactly.
__host__ __device__ static float random_value(uint64_t seed, int64_t i) {
    uint64_t x = (seed << 40) + (uint64_t)i + 1;
    x *= 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    int sum = (int)(x & 63) + (int)(x >> 8 & 63) + (int)(x >> 16 & 63) + (int)(x >> 24 & 63) - 126;  // nearly normal
    return sum / 32.0f;
}
__global__ void fill_kernel(floatX* p, int64_t n, uint64_t seed) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] = (floatX)random_value(seed, i);
}
static Floats random_host(int64_t n, uint64_t seed, float scale = 1) {
    Floats x(n);
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) x[i] = (float)(floatX)(random_value(seed, i) * scale);
    return x;
}

// ---- device arrays ------------------------------------------------------------------------------------------------
static floatX* device_random(int64_t n, uint64_t seed) {
    floatX* p = device_array<floatX>(n);
    fill_kernel<<<grid_for(n, 256), 256, 0, main_stream>>>(p, n, seed);
    cudaCheck(cudaGetLastError());
    return p;
}
// Makes the workspace large enough for a shape, as the trainer's memory plan does.
static void workspace_of(size_t bytes) {
    if (bytes <= sdpa_workspace_bytes) return;
    cudaCheck(cudaStreamSynchronize(main_stream));
    if (sdpa_workspace) cudaCheck(cudaFree(sdpa_workspace));
    cudaCheck(cudaMalloc((void**)&sdpa_workspace, bytes));
    sdpa_workspace_bytes = bytes;
}
static void prepare_sdpa(int B, int64_t T, int H, int D, bool stats, bool backward) {
    workspace_of(sdpa_prepare(B, T, H, D, stats, backward));
}

// Runs an operation twice on a poisoned output of n elements; returns it, and whether both runs gave the same bits,
// with the guard intact.
template <typename To, typename T, typename Op> static std::vector<To> run_twice(T* out, int64_t n, bool* same, Op op) {
    std::vector<unsigned char> bits[2];
    for (int run = 0; run < 2; run++) {
        cudaCheck(cudaMemsetAsync(out, 0xff, n * sizeof(T), main_stream));
        op();
        cudaCheck(cudaStreamSynchronize(main_stream));
        bits[run] = to_host<unsigned char>((unsigned char*)out, n * sizeof(T) + GUARD);
    }
    *same = bits[0] == bits[1];
    for (size_t i = n * sizeof(T); i < bits[0].size(); i++) *same = *same && bits[0][i] == GUARD_BYTE;
    const T* x = (const T*)bits[0].data();
    return std::vector<To>(x, x + n);
}

struct Case { int B; int64_t T; int H, D, levels, pool, topk, tile; };
static std::string case_name(const Case& c) {
    char name[128];
    snprintf(name, sizeof(name), "B %d T %lld H %d D %d, L %d p %d k %d m %d", c.B, (long long)c.T, c.H, c.D, c.levels,
             c.pool, c.topk, c.tile);
    return name;
}
static LighthouseShape case_shape(const Case& c) {
    LighthouseShape s;
    std::string why = lighthouse_shape(&s, c.T, c.H, c.D, c.levels, c.pool, c.topk, c.tile);
    if (why != "") fatal("%s: %s", case_name(c).c_str(), why.c_str());
    return s;
}

// ---- every Lighthouse kernel against its twin ---------------------------------------------------------------------
static void test_select(const char* what, const Floats& scores, int B, const LighthouseShape& s,
                        const std::string& name) {
    int64_t n = (int64_t)B * s.H * s.S;
    Ints reference(n);
    cpu::lighthouse_select(reference.data(), scores.data(), B, &s);
    float* d_scores = to_device<float>(scores);
    int32_t* d_index = device_array<int32_t>(n);
    bool same;
    Ints index = run_twice<int32_t>(d_index, n, &same, [&] { lighthouse_select(d_index, d_scores, B, &s); });
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) wrong += index[i] != reference[i];
    report(wrong == 0 && same, "select, %s: %lld of %lld places differ%s | %s", what, (long long)wrong, (long long)n,
           same ? "" : ", runs differ", name.c_str());
}

static void report_floats(const char* what, const Floats& x, const Floats& reference, double limit, bool same,
                          const std::string& name) {
    double error = relative_error(x, reference);
    report(error <= limit && same, "%s: error %.1e (limit %.1e)%s | %s", what, error, limit,
           same ? "" : ", runs differ", name.c_str());
}

static void report_rows(const char* what, const Floats& x, const Floats& reference, int64_t row, double limit,
                        const std::string& name) {
    double error = worst_row_error(x, reference, row);
    report(error <= limit, "%s: error of the worst row %.1e (limit %.1e) | %s", what, error, limit, name.c_str());
}

static void test_ops(const Case& c, uint64_t seed) {
    LighthouseShape s = case_shape(c);
    std::string name = case_name(c);
    int64_t B = c.B, T = c.T, C = (int64_t)c.H * c.D, S = s.S, E = s.off[s.levels], heads = B * c.H;
    Floats qkv = random_host(B * T * 3 * C, seed), attn = random_host(B * S * C, seed + 1);
    Floats dout = random_host(B * T * C, seed + 2), dslots = random_host(B * S * 3 * C, seed + 3);
    floatX *d_qkv = to_device<floatX>(qkv), *d_attn = to_device<floatX>(attn);
    floatX *d_dout = to_device<floatX>(dout), *d_dslots = to_device<floatX>(dslots);
    bool same;

    float* d_scores = device_array<float>(2 * heads * E);
    Floats scores = run_twice<float>(d_scores, 2 * heads * E, &same, [&] {
        lighthouse_scores(d_scores, d_qkv, B, &s);
    });
    Floats reference(2 * heads * E);
    cpu::lighthouse_scores(reference.data(), qkv.data(), B, &s);
    report_floats("scores", scores, reference, 1e-6, same, name);  // fp32 sums of exact squares

    Floats holes = qkv;  // NaN at tokens that come first among their entry's, last, and alone
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < 3 * C && (t % s.pool == 0 || t % 7 == 3 || t < 2 * s.pool); i += c.D) holes[t * 3 * C + i] = NAN;
    floatX* d_holes = to_device<floatX>(holes);
    Floats with_nan = run_twice<float>(d_scores, 2 * heads * E, &same, [&] { lighthouse_scores(d_scores, d_holes, B, &s); });
    cpu::lighthouse_scores(reference.data(), holes.data(), B, &s);
    int64_t unlike = 0, nan = 0;
    for (int64_t i = 0; i < 2 * heads * E; i++) {
        nan += reference[i] != reference[i];
        unlike += reference[i] != reference[i] ? with_nan[i] == with_nan[i] : !(fabs(with_nan[i] - reference[i]) <= 1e-5 * reference[i]);
    }
    report(unlike == 0 && nan > 0 && same, "scores with NaN: %lld of %lld unlike, %lld NaN | %s", (long long)unlike, (long long)(2 * heads * E),
           (long long)nan, name.c_str());

    test_select("the norms", scores, B, s, name);
    Floats odd = scores;  // few values, so that nearly every pick is a tie
    for (float& x : odd) x = floorf(x * 4);
    test_select("ties", odd, B, s, name);
    for (float& x : odd) x = 0;
    test_select("all zero", odd, B, s, name);
    for (size_t i = 0; i < odd.size(); i++) odd[i] = i % 7 == 3 ? NAN : i % 11 == 5 ? INFINITY : scores[i];
    test_select("with NaN and infinity", odd, B, s, name);

    Ints index(heads * S), slot_reference(heads * E);
    cpu::lighthouse_select(index.data(), scores.data(), B, &s);
    cpu::lighthouse_invert(slot_reference.data(), index.data(), B, &s);
    int32_t *d_index = to_device<int32_t>(index), *d_slot = device_array<int32_t>(heads * E);
    Ints slot = run_twice<int32_t>(d_slot, heads * E, &same, [&] { lighthouse_invert(d_slot, d_index, B, &s); });
    bool equal = slot == slot_reference;
    report(equal && same, "invert: %s | %s", equal ? "equal" : "differs", name.c_str());

    Floats table((1024 + (T + 1023) / 1024) * c.D);
    rope_table(table.data(), T, c.D, 10000);
    float* d_table = to_device<float>(table);
    floatX* d_slots = device_array<floatX>(B * S * 3 * C);
    floatX* d_dqkv = device_array<floatX>(B * T * 3 * C);
    for (int rope = 0; rope < 2; rope++) {
        Floats slots = run_twice<float>(d_slots, B * S * 3 * C, &same, [&] {
            lighthouse_gather(d_slots, d_qkv, d_index, rope ? d_table : NULL, B, &s, 0);
        });
        Floats slots_reference(B * S * 3 * C);
        cpu::lighthouse_gather(slots_reference.data(), qkv.data(), index.data(), rope ? table.data() : NULL, B, &s, 0);
        report_floats(rope ? "gather, rope" : "gather", slots, slots_reference, ROUNDED, same, name);

        Floats dqkv = run_twice<float>(d_dqkv, B * T * 3 * C, &same, [&] {
            lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, rope ? d_table : NULL, B, &s, 0);
        });
        Floats dqkv_reference(B * T * 3 * C);
        cpu::lighthouse_gather_backward(dqkv_reference.data(), dslots.data(), slot.data(),
                                        rope ? table.data() : NULL, B, &s, 0);
        report_floats(rope ? "gather backward, rope" : "gather backward", dqkv, dqkv_reference, ROUNDED, same, name);

    }

    floatX* d_out = device_array<floatX>(B * T * C);
    Floats out = run_twice<float>(d_out, B * T * C, &same, [&] {
        lighthouse_scatter(d_out, d_attn, NULL, d_slot, B, &s);
    });
    Floats out_reference(B * T * C);
    cpu::lighthouse_scatter(out_reference.data(), attn.data(), NULL, slot.data(), B, &s);
    report_floats("scatter", out, out_reference, ROUNDED, same, name);

    floatX* d_dattn = device_array<floatX>(B * S * C);
    Floats dattn = run_twice<float>(d_dattn, B * S * C, &same, [&] {
        lighthouse_scatter_backward(d_dattn, d_dout, NULL, d_index, B, &s);
    });
    Floats dattn_reference(B * S * C);
    cpu::lighthouse_scatter_backward(dattn_reference.data(), dout.data(), NULL, index.data(), B, &s);
    report_floats("scatter backward", dattn, dattn_reference, ROUNDED, same, name);
    free_device_arrays();
}

// ---- parts of sequences -------------------------------------------------------------------------------------------
// What each kernel gives over sequences, or over the part of them that begins at token t0; the halo is for the next
// part. Fresh device arrays with a poisoned result and a guard for each.
struct Part { Ints index, slot; Floats slots, out, dattn, dqkv, halo; bool same; };
static Part run_part(const Floats& qkv, const Floats& attn, const Floats& dout, const Floats& dslots,
                     const Floats& halo, const Floats& dout_halo, const float* d_table, int B,
                     const LighthouseShape& s, int64_t t0) {
    int64_t C = (int64_t)s.H * s.D, heads = (int64_t)B * s.H, E = s.off[s.levels], halo_size = B * (s.levels - 1) * C;
    floatX *d_qkv = to_device<floatX>(qkv), *d_attn = to_device<floatX>(attn), *d_dout = to_device<floatX>(dout);
    floatX* d_dslots = to_device<floatX>(dslots);
    floatX* d_halo = halo.empty() ? NULL : to_device<floatX>(halo);
    floatX* d_dout_halo = dout_halo.empty() ? NULL : to_device<floatX>(dout_halo);
    float* d_scores = device_array<float>(2 * heads * E);
    int32_t *d_index = device_array<int32_t>(heads * s.S), *d_slot = device_array<int32_t>(heads * E);
    floatX *d_slots = device_array<floatX>(dslots.size()), *d_out = device_array<floatX>(dout.size());
    floatX *d_dattn = device_array<floatX>(attn.size()), *d_dqkv = device_array<floatX>(qkv.size());
    floatX* d_next = device_array<floatX>(halo_size);
    bool same[6];
    Part y;
    lighthouse_scores(d_scores, d_qkv, B, &s);
    y.index = run_twice<int32_t>(d_index, heads * s.S, &same[0], [&] { lighthouse_select(d_index, d_scores, B, &s); });
    lighthouse_invert(d_slot, d_index, B, &s);
    y.slot = to_host<int32_t>(d_slot, heads * E);
    y.slots = run_twice<float>(d_slots, dslots.size(), &same[1], [&] {
        lighthouse_gather(d_slots, d_qkv, d_index, d_table, B, &s, t0);
    });
    y.out = run_twice<float>(d_out, dout.size(), &same[2], [&] {
        lighthouse_scatter(d_out, d_attn, d_halo, d_slot, B, &s);
    });
    y.dattn = run_twice<float>(d_dattn, attn.size(), &same[3], [&] {
        lighthouse_scatter_backward(d_dattn, d_dout, d_dout_halo, d_index, B, &s);
    });
    y.dqkv = run_twice<float>(d_dqkv, qkv.size(), &same[4], [&] {
        lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, d_table, B, &s, t0);
    });
    y.halo = run_twice<float>(d_next, halo_size, &same[5], [&] { lighthouse_halo(d_next, d_attn, d_slot, B, &s); });
    y.same = true;
    for (bool x : same) y.same = y.same && x;
    return y;
}

// Rows [first, first + count) of each of B sequences, of x (B, rows, n).
static Floats cut(const Floats& x, int B, int64_t rows, int64_t first, int64_t count) {
    int64_t n = x.size() / B / rows;
    Floats y;
    for (int b = 0; b < B; b++) y.insert(y.end(), &x[(b * rows + first) * n], &x[(b * rows + first) * n] + count * n);
    return y;
}

// Sequences cut into W parts of whole tiles, as context parallelism cuts them: each part works by itself but for the
// halos, and what comes out is what whole sequences give, bit for bit.
static void test_parts(const Case& c, int W, uint64_t seed) {
    LighthouseShape s = case_shape(c), p = case_shape({c.B, c.T / W, c.H, c.D, c.levels, c.pool, c.topk / W, c.tile});
    int64_t C = (int64_t)c.H * c.D, L = c.levels, reach = s.T / s.n[L - 1] - 1;
    int B = c.B;
    Floats qkv = random_host(B * s.T * 3 * C, seed), attn = random_host(B * s.S * C, seed + 1), halo;
    Floats dout = random_host(B * s.T * C, seed + 2), dslots = random_host(B * s.S * 3 * C, seed + 3);
    Floats table((1024 + (s.T + 1023) / 1024) * c.D);
    rope_table(table.data(), s.T, c.D, 10000);
    float* d_table = to_device<float>(table);
    Part whole = run_part(qkv, attn, dout, dslots, {}, {}, d_table, B, s, 0);
    bool selection = true, slots = true, out = true, dattn = true, dqkv = true, halos = true, same = whole.same;
    for (int w = 0; w < W; w++) {
        Floats dout_halo, part_attn = cut(attn, B, s.S, w * p.S, p.S);
        if (w + 1 < W) dout_halo = cut(dout, B, s.T, (w + 1) * p.T, reach);
        Part y = run_part(cut(qkv, B, s.T, w * p.T, p.T), part_attn, cut(dout, B, s.T, w * p.T, p.T),
                          cut(dslots, B, s.S, w * p.S, p.S), halo, dout_halo, d_table, B, p, w * p.T);
        for (size_t i = 0; i < y.index.size(); i++) {
            int64_t e, width, level = cpu::entry_level(&e, &width, y.index[i], &p);
            selection = selection &&
                        whole.index[i / p.S * s.S + w * p.S + i % p.S] == s.off[level] + w * p.n[level] + e;
        }
        slots = slots && y.slots == cut(whole.slots, B, s.S, w * p.S, p.S);
        out = out && y.out == cut(whole.out, B, s.T, w * p.T, p.T);
        dattn = dattn && y.dattn == cut(whole.dattn, B, s.S, w * p.S, p.S);
        dqkv = dqkv && y.dqkv == cut(whole.dqkv, B, s.T, w * p.T, p.T);
        same = same && y.same;
        halo.resize(B * (L - 1) * C);
        cpu::lighthouse_halo(halo.data(), part_attn.data(), y.slot.data(), B, &p);
        halos = halos && y.halo == halo;
    }
    auto differs = [](bool equal, const char* what) { return equal ? "" : what; };
    report(selection && slots && out && dattn && dqkv && halos && same, "%d parts and the whole: %s%s%s%s%s%s%s%s | %s",
           W, differs(selection, "selection "), differs(slots, "gather "), differs(out, "scatter "),
           differs(dattn, "scatter backward "), differs(dqkv, "gather backward "), differs(halos, "halo "),
           differs(same, "runs "), selection && slots && out && dattn && dqkv && halos && same ? "equal" : "differ",
           case_name(c).c_str());
    free_device_arrays();
}

// ---- SDPA against its twin ----------------------------------------------------------------------------------------
// One of the three parts of a packed (N,3,C) tensor.
static Floats part_of(const Floats& packed, int part, int64_t C) {
    Floats x(packed.size() / 3);
    for (size_t i = 0; i < x.size(); i++) x[i] = packed[(i / C * 3 + part) * C + i % C];
    return x;
}

static void test_sdpa(int B, int64_t T, int H, int D, bool deterministic, bool by_head, uint64_t seed) {
    char name[128];
    snprintf(name, sizeof(name), "B %d T %lld H %d D %d%s%s", B, (long long)T, H, D,
             deterministic ? ", deterministic" : "", by_head ? ", head by head" : "");
    int64_t C = (int64_t)H * D, N = B * T;
    Floats qkv = random_host(N * 3 * C, seed), dout = random_host(N * C, seed + 1);
    floatX *d_qkv = to_device<floatX>(qkv), *d_dout = to_device<floatX>(dout), *d_out = device_array<floatX>(N * C);
    float* d_stats = device_array<float>(N * H);
    int64_t bound = sdpa_deterministic_bytes;
    sdpa_deterministic = deterministic;
    if (by_head) sdpa_deterministic_bytes = 0;
    prepare_sdpa(B, T, H, D, true, true);
    bool same, same_stats;
    Floats out = run_twice<float>(d_out, N * C, &same, [&] { sdpa_forward(d_out, d_stats, d_qkv, B, T, H, D); });
    Floats stats = run_twice<float>(d_stats, N * H, &same_stats, [&] {
        sdpa_forward(d_out, d_stats, d_qkv, B, T, H, D);
    });
    Floats out_reference(N * C), stats_reference(N * H);
    cpu::sdpa_forward(out_reference.data(), stats_reference.data(), qkv.data(), B, T, H, D);
    report_floats("sdpa forward", out, out_reference, SDPA_OUT, same, name);
    double worst = 0;
    for (int64_t i = 0; i < N * H; i++) worst = fmax(worst, fabs((double)stats[i] - stats_reference[i]));
    report(worst <= 2e-5 && same_stats, "sdpa statistics: at most %.1e off (limit 2e-05) | %s", worst, name);
    if (!deterministic) {
        prepare_sdpa(B, T, H, D, false, false);
        Floats plain = run_twice<float>(d_out, N * C, &same, [&] { sdpa_forward(d_out, NULL, d_qkv, B, T, H, D); });
        report_floats("sdpa forward without statistics", plain, out_reference, SDPA_OUT, same, name);
    }

    // The backward pass starts from the forward's rounded output on both sides.
    floatX* d_dqkv = device_array<floatX>(N * 3 * C);
    Floats dqkv = run_twice<float>(d_dqkv, N * 3 * C, &same, [&] {
        sdpa_backward(d_dqkv, d_dout, d_qkv, d_out, d_stats, B, T, H, D);
    });
    if (!deterministic && IS_BF16) same = true;  // not promised
    Floats dqkv_reference(N * 3 * C), used = to_host<float>(d_out, N * C);
    cpu::sdpa_backward(dqkv_reference.data(), dout.data(), qkv.data(), used.data(), stats_reference.data(), B, T, H, D);
    for (int part = 0; part < 3; part++) {
        char what[32];
        snprintf(what, sizeof(what), "sdpa d%c", "qkv"[part]);
        report_floats(what, part_of(dqkv, part, C), part_of(dqkv_reference, part, C), SDPA_GRADIENT, same, name);
    }
    sdpa_deterministic = false;
    sdpa_deterministic_bytes = bound;
    free_device_arrays();
}

// A window layer's attention: rows of the CPU twin over the same windows, the last of each sequence shorter.
static void test_windows(int B, int64_t T, int64_t window, int H, int D, uint64_t seed) {
    char name[128];
    snprintf(name, sizeof(name), "B %d T %lld window %lld H %d D %d", B, (long long)T, (long long)window, H, D);
    int64_t C = (int64_t)H * D, N = B * T;
    Floats qkv = random_host(N * 3 * C, seed), dout = random_host(N * C, seed + 1);
    Floats out_reference(N * C), stats_reference(N * H), dqkv_reference(N * 3 * C);
    floatX *d_qkv = to_device<floatX>(qkv), *d_dout = to_device<floatX>(dout), *d_out = device_array<floatX>(N * C);
    floatX* d_dqkv = device_array<floatX>(N * 3 * C);
    float* d_stats = device_array<float>(N * H);
    each_window(B, T, window, [&](int64_t, int n, int64_t length) { prepare_sdpa(n, length, H, D, true, true); });
    bool same;
    Floats out = run_twice<float>(d_out, N * C, &same, [&] {
        each_window(B, T, window, [&](int64_t row, int n, int64_t length) {
            sdpa_forward(d_out + row * C, d_stats + row * H, d_qkv + row * 3 * C, n, length, H, D);
        });
    });
    Floats dqkv = run_twice<float>(d_dqkv, N * 3 * C, &same, [&] {
        each_window(B, T, window, [&](int64_t row, int n, int64_t length) {
            sdpa_backward(d_dqkv + row * 3 * C, d_dout + row * C, d_qkv + row * 3 * C, d_out + row * C, d_stats + row * H,
                          n, length, H, D);
        });
    });
    for (int b = 0; b < B; b++) {  // independent of each_window: window by window
        for (int64_t t = 0; t < T; t += window) {
            int64_t row = b * T + t, length = std::min(window, T - t);
            cpu::sdpa_forward(&out_reference[row * C], &stats_reference[row * H], &qkv[row * 3 * C], 1, length, H, D);
            cpu::sdpa_backward(&dqkv_reference[row * 3 * C], &dout[row * C], &qkv[row * 3 * C], &out_reference[row * C],
                               &stats_reference[row * H], 1, length, H, D);
        }
    }
    report_floats("windows forward", out, out_reference, SDPA_OUT, true, name);
    for (int part = 0; part < 3; part++) {
        char what[32];
        snprintf(what, sizeof(what), "windows d%c", "qkv"[part]);
        report_floats(what, part_of(dqkv, part, C), part_of(dqkv_reference, part, C), SDPA_GRADIENT, true, name);
    }
    free_device_arrays();
}

// Causal Lighthouse: leaves, rectangles of calls and their merging, against one softmax over all that a token sees.
static const double MERGED = IS_BF16 ? 8e-3 : 2e-5;  // output and gradients of q and slots are rounded once a rectangle
static void test_causal(const Case& c, bool deterministic, uint64_t seed) {
    LighthouseShape s = case_shape(c), leaf = leaf_shape(&s);
    std::string name = case_name(c) + (deterministic ? ", deterministic" : "");
    const int64_t B = c.B, T = c.T, H = c.H, C = H * c.D, N = B * T, S = leaf.S, E = s.off[s.levels], heads = B * H;
    Floats qkv = random_host(N * 3 * C, seed), dout = random_host(N * C, seed + 1), scores(2 * heads * E);
    Ints index(heads * s.S), slot(heads * E), leaves_reference(heads * S), leaf_slot(heads * E);
    cpu::lighthouse_scores(scores.data(), qkv.data(), B, &s);
    cpu::lighthouse_select(index.data(), scores.data(), B, &s);
    cpu::lighthouse_invert(slot.data(), index.data(), B, &s);
    cpu::lighthouse_leaves(leaves_reference.data(), index.data(), slot.data(), B, &s);
    cpu::lighthouse_invert(leaf_slot.data(), leaves_reference.data(), B, &leaf);
    int32_t *d_index = to_device<int32_t>(index), *d_slot = to_device<int32_t>(slot), *d_leaves = device_array<int32_t>(heads * S);
    bool same;
    Ints leaves = run_twice<int32_t>(d_leaves, heads * S, &same, [&] { lighthouse_leaves(d_leaves, d_index, d_slot, B, &s); });
    report(leaves == leaves_reference && same, "leaves: %s | %s", leaves == leaves_reference ? "equal" : "differ", name.c_str());

    sdpa_deterministic = deterministic;
    workspace_of(causal_prepare(B, &s, true));
    floatX *d_qkv = to_device<floatX>(qkv), *d_dout = to_device<floatX>(dout), *d_out = device_array<floatX>(N * C);
    floatX *d_slots = device_array<floatX>(B * S * 3 * C), *d_dslots = device_array<floatX>(B * S * 3 * C);
    floatX* d_dqkv = device_array<floatX>(N * 3 * C);
    float* d_stats = device_array<float>(heads * T);
    lighthouse_gather(d_slots, d_qkv, d_leaves, NULL, B, &leaf, 0);
    Floats slots = to_host<float>(d_slots, B * S * 3 * C);
    Floats out = run_twice<float>(d_out, N * C, &same, [&] { causal_forward(d_out, d_stats, d_qkv, d_slots, B, &s); });
    Floats stats = to_host<float>(d_stats, heads * T), out_reference(N * C), stats_reference(heads * T);
    cpu::causal_forward(out_reference.data(), stats_reference.data(), qkv.data(), slots.data(), B, &s);
    report_floats("causal forward", out, out_reference, MERGED, same, name);
    double worst = 0;
    for (int64_t i = 0; i < heads * T; i++) worst = fmax(worst, fabs((double)stats[i] - stats_reference[i]));
    report(worst <= 5e-5, "causal statistics: at most %.1e off (limit 5e-05) | %s", worst, name.c_str());

    Floats dslots, dqkv = run_twice<float>(d_dqkv, N * 3 * C, &same, [&] {
        causal_backward(d_dqkv, d_dslots, d_dout, d_qkv, d_slots, d_out, d_stats, B, &s);
    });
    if (!deterministic && IS_BF16) same = true;  // not promised
    dslots = to_host<float>(d_dslots, B * S * 3 * C);
    Floats dqkv_reference(N * 3 * C), dslots_reference(B * S * 3 * C), used = to_host<float>(d_out, N * C);
    cpu::causal_backward(dqkv_reference.data(), dslots_reference.data(), dout.data(), qkv.data(), slots.data(),
                         used.data(), stats_reference.data(), B, &s);
    for (int part = 0; part < 3; part++) {
        char what[32];
        snprintf(what, sizeof(what), "causal d%c", "qkv"[part]);
        report_floats(what, part_of(dqkv, part, C), part_of(dqkv_reference, part, C), part ? SDPA_GRADIENT : MERGED, same, name);
        if (s.tiles == 1) continue;  // nobody asks its slots
        snprintf(what, sizeof(what), "causal d%c of slots", "qkv"[part]);
        report_floats(what, part_of(dslots, part, C), part_of(dslots_reference, part, C), MERGED, true, name);
    }

    floatX *d_given = to_device<floatX>(dslots_reference), *d_sum = device_array<floatX>(N * 3 * C);
    Floats given = to_host<float>(d_given, B * S * 3 * C), sum_reference = dout;
    sum_reference.resize(N * 3 * C);
    for (int64_t i = 0; i < N * 3 * C; i++) sum_reference[i] = qkv[i];
    int32_t* d_leaf_slot = device_array<int32_t>(heads * E);
    lighthouse_invert(d_leaf_slot, d_leaves, B, &leaf);
    report(to_host<int32_t>(d_leaf_slot, heads * E) == leaf_slot, "leaves, inverted | %s", name.c_str());
    Floats sum = run_twice<float>(d_sum, N * 3 * C, &same, [&] {
        cudaCheck(cudaMemcpyAsync(d_sum, d_qkv, N * 3 * C * sizeof(floatX), cudaMemcpyDeviceToDevice, main_stream));
        lighthouse_gather_backward(d_sum, d_given, d_leaf_slot, NULL, B, &leaf, 0, true);
    });
    cpu::lighthouse_gather_backward(sum_reference.data(), given.data(), leaf_slot.data(), NULL, B, &leaf, 0, true);
    report_floats("gather backward, added", sum, sum_reference, ROUNDED, same, name);
    sdpa_deterministic = false;
    free_device_arrays();
}

// ---- the published release's own numbers --------------------------------------------------------------------------
// The selection must agree exactly from the same fp32 scores. The rest starts from the release's selection, because q
// and k rounded to bf16 may select otherwise; it then differs by the rounding of the inputs and of every stage to bf16.
// Heads smaller than 64 are padded with zeros, and q takes the factor that the padded 1/sqrt(D) lacks.
static void test_vectors(const char* file) {
    FILE* f = fopen(file, "rb");
    int32_t header[64];
    if (!f || fread(header, 4, 64, f) != 64 || header[0] != 20260506) {
        report(false, "vectors: %s is missing or no file of vectors", file);
        if (f) fclose(f);
        return;
    }
    int B = header[2], H = header[4], d = header[5], D = IS_BF16 && d < 64 ? 64 : d;
    int64_t T = header[3], S = header[9], N = B * T, C = (int64_t)H * D;
    Case c = {B, T, H, D, header[6], header[7], header[8], 128};
    LighthouseShape s = case_shape(c), s_small = s;
    s_small.D = d;
    std::string name = std::string(file) + " " + case_name(c);
    auto read_floats = [&](int64_t n) {
        Floats x(n);
        if ((int64_t)fread(x.data(), 4, n, f) != n) report(false, "vectors: %s is too short", file);
        return x;
    };
    Floats part[3], wanted[4];
    for (int i = 0; i < 3; i++) part[i] = read_floats(N * H * d);
    Floats dout_small = read_floats(N * H * d);
    Ints index(B * H * S);
    if (fread(index.data(), 4, index.size(), f) != index.size()) report(false, "vectors: %s is too short", file);
    Floats out_heads = read_floats(N * H * d);  // (B,H,T,d)
    for (int i = 0; i < 3; i++) wanted[1 + i] = read_floats(N * H * d);
    fclose(f);
    wanted[0].resize(N * H * d);  // (B,T,H,d) like the gradients
    for (int64_t i = 0; i < N * H * d; i++) {
        int64_t b = i / (T * H * d), t = i / (H * d) % T, h = i / d % H;
        wanted[0][i] = out_heads[((b * H + h) * T + t) * d + i % d];
    }

    float factor = sqrtf((float)D / d);
    Floats qkv_small(N * 3 * H * d), qkv(N * 3 * C), dout(N * C);
    for (int64_t i = 0; i < N * H * d; i++) {
        int64_t row = i / d, t = row / H, h = row % H, e = i % d;
        for (int p = 0; p < 3; p++) {
            qkv_small[((t * 3 + p) * H + h) * d + e] = part[p][i];
            qkv[((t * 3 + p) * H + h) * D + e] = p == 0 ? part[p][i] * factor : part[p][i];
        }
        dout[row * D + e] = dout_small[i];
    }
    int64_t heads = (int64_t)B * H, E = s.off[s.levels];
    Floats scores(2 * heads * E);
    cpu::lighthouse_scores(scores.data(), qkv_small.data(), B, &s_small);
    float* d_scores = to_device<float>(scores);
    int32_t *d_index = device_array<int32_t>(heads * S), *d_slot = device_array<int32_t>(heads * E);
    lighthouse_select(d_index, d_scores, B, &s);
    Ints selected = to_host<int32_t>(d_index, heads * S);
    report(S == s.S && selected == index, "vectors, select from fp32 scores: %s | %s",
           selected == index ? "equal" : "differs", name.c_str());

    floatX *d_qkv = to_device<floatX>(qkv), *d_dout = to_device<floatX>(dout);
    lighthouse_scores(d_scores, d_qkv, B, &s);
    lighthouse_select(d_index, d_scores, B, &s);
    selected = to_host<int32_t>(d_index, heads * S);
    int64_t common = 0;
    for (int64_t bh = 0; bh < heads; bh++) {
        std::vector<char> in(E);
        for (int64_t r = 0; r < S; r++) in[index[bh * S + r]] = 1;
        for (int64_t r = 0; r < S; r++) common += in[selected[bh * S + r]];
    }
    double share = (double)common / (heads * S), least = IS_BF16 ? 0.95 : 0.9999;
    report(share >= least, "vectors, select from q and k: %.4f the same (limit %.4f) | %s", share, least, name.c_str());

    cudaCheck(cudaMemcpyAsync(d_index, index.data(), index.size() * 4, cudaMemcpyHostToDevice, main_stream));
    floatX *d_slots = device_array<floatX>(B * S * 3 * C), *d_attn = device_array<floatX>(B * S * C);
    floatX *d_dattn = device_array<floatX>(B * S * C), *d_dslots = device_array<floatX>(B * S * 3 * C);
    floatX *d_out = device_array<floatX>(N * C), *d_dqkv = device_array<floatX>(N * 3 * C);
    float* d_stats = device_array<float>(heads * S);
    prepare_sdpa(B, S, H, D, true, true);
    lighthouse_invert(d_slot, d_index, B, &s);
    lighthouse_gather(d_slots, d_qkv, d_index, NULL, B, &s, 0);
    sdpa_forward(d_attn, d_stats, d_slots, B, S, H, D);
    lighthouse_scatter(d_out, d_attn, NULL, d_slot, B, &s);
    lighthouse_scatter_backward(d_dattn, d_dout, NULL, d_index, B, &s);
    sdpa_backward(d_dslots, d_dattn, d_slots, d_attn, d_stats, B, S, H, D);
    lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, NULL, B, &s, 0);
    Floats out = to_host<float>(d_out, N * C), dqkv = to_host<float>(d_dqkv, N * 3 * C);
    for (int i = 0; i < 4; i++) {
        Floats x(N * H * d);
        for (int64_t j = 0; j < N * H * d; j++) {
            int64_t row = j / d, t = row / H, h = row % H, e = j % d;
            x[j] = i == 0 ? out[row * D + e] : dqkv[((t * 3 + i - 1) * H + h) * D + e] * (i == 1 ? factor : 1);
        }
        const char* what[] = {"vectors, out", "vectors, dq", "vectors, dk", "vectors, dv"};
        report_floats(what[i], x, wanted[i], IS_BF16 ? (i == 0 ? 6e-3 : 1.2e-2) : 1e-5, true, name);
    }
    free_device_arrays();
}

// ---- a million tokens: more than 2^31 elements, a sample of the results -------------------------------------------
static void test_million() {
    const Case c = {1, 1 << 20, 8, 128, 4, 4, 4096, 128};
    LighthouseShape s = case_shape(c);
    std::string name = case_name(c);
    const int64_t T = c.T, H = c.H, D = c.D, C = H * D, S = s.S, E = s.off[s.levels], SAMPLES = 4000;
    floatX *d_qkv = device_random(T * 3 * C, 1), *d_dout = device_random(T * C, 2);
    floatX *d_attn = device_random(S * C, 3), *d_dslots = device_random(S * 3 * C, 4);
    Floats table((1024 + (T + 1023) / 1024) * D);
    rope_table(table.data(), T, D, 500000);
    float* d_table = to_device<float>(table);

    float* d_scores = device_array<float>(2 * H * E);
    lighthouse_scores(d_scores, d_qkv, 1, &s);
    Floats scores = to_host<float>(d_scores, 2 * H * E);
    Floats sample, reference;
    for (int64_t i = 0; i < SAMPLES; i++) {  // norms here, every maximum below
        int64_t t = i == 0 ? T - 1 : cpu::min64(T - 1, (int64_t)((random_value(5, i) + 4) / 8 * T)), r = i % (2 * H);
        double square = 0;
        for (int64_t d = 0; d < D; d++) {
            double x = (float)(floatX)random_value(1, (t * 3 * H + r) * D + d);
            square += x * x;
        }
        reference.push_back(sqrt(square));
        sample.push_back(scores[r * E + t]);
    }
    report_floats("a million tokens, norms", sample, reference, 1e-6, true, name);
    int64_t wrong = 0;
    for (int64_t r = 0; r < 2 * H; r++) {
        for (int l = 1; l < s.levels; l++) {
            for (int64_t i = 0; i < s.n[l]; i++) {
                const float* child = &scores[r * E + s.off[l - 1] + i * s.pool];
                float top = child[0];
                for (int j = 1; j < s.pool; j++) top = fmaxf(top, child[j]);
                wrong += scores[r * E + s.off[l] + i] != top;
            }
        }
    }
    report(wrong == 0, "a million tokens, maxima: %lld differ | %s", (long long)wrong, name.c_str());

    Ints index(H * S), slot(H * E);
    cpu::lighthouse_select(index.data(), scores.data(), 1, &s);
    cpu::lighthouse_invert(slot.data(), index.data(), 1, &s);
    int32_t *d_index = device_array<int32_t>(H * S), *d_slot = device_array<int32_t>(H * E);
    lighthouse_select(d_index, d_scores, 1, &s);
    lighthouse_invert(d_slot, d_index, 1, &s);
    report(to_host<int32_t>(d_index, H * S) == index, "a million tokens, select | %s", name.c_str());
    report(to_host<int32_t>(d_slot, H * E) == slot, "a million tokens, invert | %s", name.c_str());

    // Whole outputs come back, samples of them are computed again from the random numbers.
    struct Entry { int l; int64_t i, width; };
    auto entry = [&](int32_t flat) {
        Entry e;
        e.l = (int)cpu::entry_level(&e.i, &e.width, flat, &s);
        return e;
    };
    floatX* d_slots = device_array<floatX>(S * 3 * C);
    lighthouse_gather(d_slots, d_qkv, d_index, d_table, 1, &s, 0);
    Floats slots = to_host<float>(d_slots, S * 3 * C), row(D), got, want;
    for (int64_t i = 0; i < SAMPLES; i++) {
        int64_t r = i == 0 ? S - 1 : i * 7919 % S, h = i % H, part = i / H % 3;
        Entry e = entry(index[h * S + r]);
        for (int64_t d = 0; d < D; d++) {
            row[d] = 0;
            for (int64_t t = e.i * e.width; t < (e.i + 1) * e.width; t++) {
                row[d] += (float)(floatX)random_value(1, ((t * 3 + part) * H + h) * D + d) / e.width;
            }
        }
        if (part < 2) cpu::rope_turn(row.data(), table.data(), (e.i + 1) * e.width - 1, +1, D);
        const float* x = &slots[((r * 3 + part) * H + h) * D];
        got.insert(got.end(), x, x + D);
        want.insert(want.end(), row.begin(), row.end());
    }
    report_rows("a million tokens, gather", got, want, D, 1.5 * ROUNDED, name);

    floatX* d_dattn = device_array<floatX>(S * C);
    lighthouse_scatter_backward(d_dattn, d_dout, NULL, d_index, 1, &s);
    Floats dattn = to_host<float>(d_dattn, S * C);
    got.clear(), want.clear();
    for (int64_t i = 0; i < SAMPLES; i++) {
        int64_t r = i == 0 ? S - 1 : i * 7919 % S, h = i % H;
        Entry e = entry(index[h * S + r]);
        for (int64_t d = 0; d < D; d++) {
            row[d] = 0;
            for (int64_t t = (e.i + 1) * e.width - 1; t < cpu::min64(T, (e.i + 2) * e.width - 1); t++) {
                row[d] += (float)(floatX)random_value(2, (t * H + h) * D + d);
            }
        }
        got.insert(got.end(), &dattn[(r * H + h) * D], &dattn[(r * H + h) * D] + D);
        want.insert(want.end(), row.begin(), row.end());
    }
    report_rows("a million tokens, scatter backward", got, want, D, 1.5 * ROUNDED, name);

    floatX* d_out = device_array<floatX>(T * C);
    lighthouse_scatter(d_out, d_attn, NULL, d_slot, 1, &s);
    std::vector<floatX> out = to_host<floatX>(d_out, T * C);
    got.clear(), want.clear();
    for (int64_t i = 0; i < SAMPLES; i++) {
        int64_t t = i == 0 ? T - 1 : i * 104729 % T, h = i % H;
        std::fill(row.begin(), row.end(), 0.0f);
        for (int l = 0; l < s.levels; l++) {
            int64_t e = (t + 1) / (T / s.n[l]) - 1, r = e < 0 ? -1 : slot[h * E + s.off[l] + e];
            for (int64_t d = 0; r >= 0 && d < D; d++) row[d] += (float)(floatX)random_value(3, (r * H + h) * D + d);
        }
        for (int64_t d = 0; d < D; d++) got.push_back((float)out[(t * H + h) * D + d]);
        want.insert(want.end(), row.begin(), row.end());
    }
    report_rows("a million tokens, scatter", got, want, D, 1.5 * ROUNDED, name);

    floatX* d_dqkv = device_array<floatX>(T * 3 * C);
    lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, d_table, 1, &s, 0);
    got.clear(), want.clear();
    for (int64_t i = 0; i < SAMPLES; i++) {
        int64_t t = i == 0 ? T - 1 : i * 104729 % T, h = i % H, part = i / H % 3;
        Floats sum(D, 0.0f);
        for (int l = 0; l < s.levels; l++) {
            int64_t width = T / s.n[l], e = t / width, r = slot[h * E + s.off[l] + e];
            if (r < 0) continue;
            for (int64_t d = 0; d < D; d++) row[d] = (float)(floatX)random_value(4, ((r * 3 + part) * H + h) * D + d);
            if (part < 2) cpu::rope_turn(row.data(), table.data(), (e + 1) * width - 1, -1, D);
            for (int64_t d = 0; d < D; d++) sum[d] += row[d] / width;
        }
        Floats x = to_host<float>(d_dqkv + ((t * 3 + part) * H + h) * D, D);
        got.insert(got.end(), x.begin(), x.end());
        want.insert(want.end(), sum.begin(), sum.end());
    }
    report_rows("a million tokens, gather backward", got, want, D, 1.5 * ROUNDED, name);
    free_device_arrays();
}

// Dense attention at a length where a whole reference is out of reach: rows of out and dq, and late rows of dk and dv.
static void test_sdpa_samples(int64_t T, int H, int D, bool deterministic) {
    char name[128];
    snprintf(name, sizeof(name), "B 1 T %lld H %d D %d%s", (long long)T, H, D, deterministic ? ", deterministic" : "");
    int64_t C = (int64_t)H * D;
    floatX *d_qkv = device_random(T * 3 * C, 1), *d_dout = device_random(T * C, 2);
    floatX *d_out = device_array<floatX>(T * C), *d_dqkv = device_array<floatX>(T * 3 * C);
    float* d_stats = device_array<float>(T * H);
    sdpa_deterministic = deterministic;
    prepare_sdpa(1, T, H, D, true, true);
    sdpa_forward(d_out, d_stats, d_qkv, 1, T, H, D);
    sdpa_backward(d_dqkv, d_dout, d_qkv, d_out, d_stats, 1, T, H, D);
    Floats stats = to_host<float>(d_stats, T * H);
    auto value = [&](int64_t t, int part, int64_t h, int64_t d) -> double {  // of q, k, v and, as the fourth, dout
        float x = part < 3 ? random_value(1, ((t * 3 + part) * H + h) * D + d) : random_value(2, (t * H + h) * D + d);
        return (float)(floatX)x;
    };
    const double scale = 1 / sqrt((double)D);
    const int ROWS = 12, LATE = 40;
    Floats got_out, out, got_dq, dq;
    double worst = 0;
    for (int i = 0; i < ROWS; i++) {
        int64_t t = i == 0 ? T - 1 : i == 1 ? 100 : (int64_t)((i + 0.37) / ROWS * T), h = i * 5 % H;
        std::vector<double> score(t + 1), dweight(t + 1);
        #pragma omp parallel for
        for (int64_t j = 0; j <= t; j++) {
            double a = 0, b = 0;
            for (int64_t d = 0; d < D; d++) {
                a += value(t, 0, h, d) * value(j, 1, h, d);
                b += value(t, 3, h, d) * value(j, 2, h, d);
            }
            score[j] = a * scale;
            dweight[j] = b;
        }
        double top = score[0], sum = 0, dot = 0;
        for (double x : score) top = fmax(top, x);
        for (double& x : score) sum += x = exp(x - top);
        for (int64_t j = 0; j <= t; j++) dot += (score[j] /= sum) * dweight[j];
        worst = fmax(worst, fabs(top + log(sum) - stats[h * T + t]));
        Floats o(D), g(D);
        #pragma omp parallel for
        for (int64_t d = 0; d < D; d++) {
            double o_sum = 0, g_sum = 0;
            for (int64_t j = 0; j <= t; j++) {
                o_sum += score[j] * value(j, 2, h, d);
                g_sum += score[j] * (dweight[j] - dot) * value(j, 1, h, d);
            }
            o[d] = o_sum;
            g[d] = g_sum * scale;
        }
        out.insert(out.end(), o.begin(), o.end());
        dq.insert(dq.end(), g.begin(), g.end());
        Floats x = to_host<float>(d_out + t * C + h * D, D), y = to_host<float>(d_dqkv + t * 3 * C + h * D, D);
        got_out.insert(got_out.end(), x.begin(), x.end());
        got_dq.insert(got_dq.end(), y.begin(), y.end());
    }
    report_rows("sdpa forward, sampled", got_out, out, D, SDPA_OUT, name);
    report(worst <= 2e-5, "sdpa statistics, sampled: at most %.1e off (limit 2e-05) | %s", worst, name);
    report_rows("sdpa dq, sampled", got_dq, dq, D, SDPA_GRADIENT, name);
    Floats got_dk, dk, got_dv, dv;  // of the last keys, which few queries see
    for (int64_t h = 0; h < H; h++) {
        std::vector<double> sum_k(LATE * D), sum_v(LATE * D);
        for (int64_t t = T - LATE; t < T; t++) {
            Floats o = to_host<float>(d_out + t * C + h * D, D);
            double dot = 0;
            for (int64_t d = 0; d < D; d++) dot += value(t, 3, h, d) * o[d];
            for (int64_t j = T - LATE; j <= t; j++) {
                double a = 0, b = 0;
                for (int64_t d = 0; d < D; d++) {
                    a += value(t, 0, h, d) * value(j, 1, h, d);
                    b += value(t, 3, h, d) * value(j, 2, h, d);
                }
                double weight = exp(a * scale - stats[h * T + t]), ds = weight * (b - dot);
                for (int64_t d = 0; d < D; d++) {
                    sum_k[(j - T + LATE) * D + d] += ds * scale * value(t, 0, h, d);
                    sum_v[(j - T + LATE) * D + d] += weight * value(t, 3, h, d);
                }
            }
        }
        for (int64_t j = T - LATE; j < T; j++) {
            const floatX* row = d_dqkv + j * 3 * C + h * D;
            Floats x = to_host<float>(row + C, D), y = to_host<float>(row + 2 * C, D);
            got_dk.insert(got_dk.end(), x.begin(), x.end());
            got_dv.insert(got_dv.end(), y.begin(), y.end());
        }
        dk.insert(dk.end(), sum_k.begin(), sum_k.end());
        dv.insert(dv.end(), sum_v.begin(), sum_v.end());
    }
    report_rows("sdpa dk of the last keys", got_dk, dk, D, SDPA_GRADIENT, name);
    report_rows("sdpa dv of the last keys", got_dv, dv, D, SDPA_GRADIENT, name);
    sdpa_deterministic = false;
    free_device_arrays();
}

// ---- times --------------------------------------------------------------------------------------------------------
static double fastest_ms, slowest_ms;  // of the runs of the last median

template <typename Op> static double median_ms(int runs, Op op) {
    cudaEvent_t begin, end;
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    std::vector<float> ms;
    for (int run = runs > 2 ? -2 : 0; run < runs; run++) {
        cudaCheck(cudaEventRecord(begin, main_stream));
        op();
        cudaCheck(cudaEventRecord(end, main_stream));
        cudaCheck(cudaEventSynchronize(end));
        float x;
        cudaCheck(cudaEventElapsedTime(&x, begin, end));
        if (run >= 0) ms.push_back(x);
    }
    std::sort(ms.begin(), ms.end());
    fastest_ms = ms.front();
    slowest_ms = ms.back();
    return ms[ms.size() / 2];
}

static double copy_gbs;  // what a copy of 4 GB reaches, bytes read and written

static double time_line(const char* what, double bytes, double ms) {
    if (bytes > 0) {
        printf("     %-26s %8.3f ms  %6.0f GB/s  %3.0f%% of a copy\n", what, ms, bytes / ms / 1e6,
               100 * bytes / ms / 1e6 / copy_gbs);
    } else {
        printf("     %-26s %8.3f ms\n", what, ms);
    }
    fflush(stdout);
    return ms;
}

static void time_case(const Case& c, int runs, int dense_runs, bool json = false) {
    static Case dense_case;  // dense attention depends on these of its sizes only: B, T, H, D
    static double dense_forward, dense_backward;
    LighthouseShape s = case_shape(c), cs = case_shape({1, c.T, c.H, c.D, 4, 4, (int)(c.T / 256), 16});
    LighthouseShape leaf = leaf_shape(&cs);  // cs: Causal Lighthouse's usual shape
    const int64_t T = c.T, H = c.H, D = c.D, C = H * D, S = s.S, E = std::max(s.off[s.levels], cs.off[cs.levels]);
    const double X = sizeof(floatX);
    printf("times, %s, S %lld:\n", case_name(c).c_str(), (long long)S);
    Floats table((1024 + (T + 1023) / 1024) * D);
    rope_table(table.data(), T, D, 500000);
    float *d_table = to_device<float>(table), *d_scores = device_array<float>(2 * H * E);
    floatX *d_qkv = device_random(T * 3 * C, 1), *d_dqkv = device_array<floatX>(T * 3 * C);
    floatX *d_dout = device_random(T * C, 2), *d_out = device_array<floatX>(T * C);
    floatX* d_slots = device_array<floatX>(S * 3 * C);
    floatX *d_attn = device_array<floatX>(S * C), *d_dattn = device_array<floatX>(S * C);
    floatX* d_dslots = device_array<floatX>(S * 3 * C);
    float* d_stats = device_array<float>(T * H);
    int32_t *d_index = device_array<int32_t>(H * S), *d_slot = device_array<int32_t>(H * E);
    prepare_sdpa(1, S, H, D, true, true);
    double around = 0;
    #define TIME(what, bytes, op) time_line(what, bytes, median_ms(runs, [&] { op; }))
    around += TIME("scores", 2 * T * C * X + 8.0 * H * E, lighthouse_scores(d_scores, d_qkv, 1, &s));
    around += TIME("select", 0, lighthouse_select(d_index, d_scores, 1, &s));
    around += TIME("invert", 0, lighthouse_invert(d_slot, d_index, 1, &s));
    around += TIME("gather", 3 * T * C * X + 3 * S * C * X,
                   lighthouse_gather(d_slots, d_qkv, d_index, d_table, 1, &s, 0));
    double forward = TIME("sdpa forward, S slots", 0, sdpa_forward(d_attn, d_stats, d_slots, 1, S, H, D));
    around += TIME("scatter", S * C * X + T * C * X, lighthouse_scatter(d_out, d_attn, NULL, d_slot, 1, &s));
    around += TIME("scatter backward", S * C * X + T * C * X,
                   lighthouse_scatter_backward(d_dattn, d_dout, NULL, d_index, 1, &s));
    double backward = TIME("sdpa backward, S slots", 0,
                           sdpa_backward(d_dslots, d_dattn, d_slots, d_attn, d_stats, 1, S, H, D));
    around += TIME("gather backward", 3 * S * C * X + 3 * T * C * X,
                   lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, d_table, 1, &s, 0));
    #undef TIME
    double whole = median_ms(runs, [&] {
        lighthouse_scores(d_scores, d_qkv, 1, &s);
        lighthouse_select(d_index, d_scores, 1, &s);
        lighthouse_invert(d_slot, d_index, 1, &s);
        lighthouse_gather(d_slots, d_qkv, d_index, d_table, 1, &s, 0);
        sdpa_forward(d_attn, d_stats, d_slots, 1, S, H, D);
        lighthouse_scatter(d_out, d_attn, NULL, d_slot, 1, &s);
        lighthouse_scatter_backward(d_dattn, d_dout, NULL, d_index, 1, &s);
        sdpa_backward(d_dslots, d_dattn, d_slots, d_attn, d_stats, 1, S, H, D);
        lighthouse_gather_backward(d_dqkv, d_dslots, d_slot, d_table, 1, &s, 0);
    });
    double whole_fastest = fastest_ms, whole_slowest = slowest_ms;
    time_line("all but sdpa, summed", 0, around);
    time_line("all, one after the other", 0, whole);
    double windows[2];
    for (int i = 0; i < 2; i++) {
        int64_t window = i ? 4096 : 1024;
        prepare_sdpa((int)(T / window), window, H, D, true, true);
        windows[i] = median_ms(runs, [&] {
            sdpa_forward(d_out, d_stats, d_qkv, (int)(T / window), window, H, D);
            sdpa_backward(d_dqkv, d_dout, d_qkv, d_out, d_stats, (int)(T / window), window, H, D);
        });
        time_line(i ? "windows of 4,096 tokens" : "windows of 1,024 tokens", 0, windows[i]);
    }
    int32_t* d_leaves = device_array<int32_t>(H * leaf.S);
    floatX *d_leaf_slots = device_array<floatX>(leaf.S * 3 * C), *d_dleaf_slots = device_array<floatX>(leaf.S * 3 * C);
    double began = seconds();
    workspace_of(causal_prepare(1, &cs, true));
    printf("     causal: %ld slots, plans built in %.1f s, workspace %.2f GB\n", leaf.S, seconds() - began, causal_prepare(1, &cs, true) / 1e9);
    double causal[4] = {
        median_ms(runs, [&] {
            lighthouse_scores(d_scores, d_qkv, 1, &cs);
            lighthouse_select(d_index, d_scores, 1, &cs);
            lighthouse_invert(d_slot, d_index, 1, &cs);
            lighthouse_leaves(d_leaves, d_index, d_slot, 1, &cs);
            lighthouse_gather(d_leaf_slots, d_qkv, d_leaves, NULL, 1, &leaf, 0);
        }),
        median_ms(runs, [&] { causal_forward(d_out, d_stats, d_qkv, d_leaf_slots, 1, &cs); }),
        median_ms(runs, [&] { causal_backward(d_dqkv, d_dleaf_slots, d_dout, d_qkv, d_leaf_slots, d_out, d_stats, 1, &cs); }),
        median_ms(runs, [&] {
            lighthouse_invert(d_slot, d_leaves, 1, &leaf);
            lighthouse_gather_backward(d_dqkv, d_dleaf_slots, d_slot, NULL, 1, &leaf, 0, true);
        })};
    time_line("causal: scores to slots", 0, causal[0]);
    time_line("causal forward", 0, causal[1]);
    time_line("causal backward", 0, causal[2]);
    time_line("causal: slots to tokens", 0, causal[3]);
    double causal_all = causal[0] + causal[1] + causal[2] + causal[3];
    time_line("causal, summed", 0, causal_all);
    if (dense_runs > 0) {
        if (memcmp(&c, &dense_case, offsetof(Case, levels))) {
            dense_case = c;
            prepare_sdpa(1, T, H, D, true, true);
            dense_forward = median_ms(dense_runs, [&] { sdpa_forward(d_out, d_stats, d_qkv, 1, T, H, D); });
            dense_backward = median_ms(dense_runs, [&] {
                sdpa_backward(d_dqkv, d_dout, d_qkv, d_out, d_stats, 1, T, H, D);
            });
        }
        time_line("sdpa forward, T tokens", 0, dense_forward);
        time_line("sdpa backward, T tokens", 0, dense_backward);
        if (dense_runs > 1 && !json) {
            sdpa_deterministic = true;
            for (int64_t N : {S, T}) {
                prepare_sdpa(1, N, H, D, true, true);
                double ms = median_ms(dense_runs, [&] {
                    if (N == S) sdpa_backward(d_dslots, d_dattn, d_slots, d_attn, d_stats, 1, S, H, D);
                    else sdpa_backward(d_dqkv, d_dout, d_qkv, d_out, d_stats, 1, T, H, D);
                });
                printf("     deterministic backward, %lld: %.2f ms, workspace %.2f GB\n", (long long)N, ms,
                       sdpa_prepare(1, N, H, D, true, true) / 1e9);
            }
            sdpa_deterministic = false;
        }
        printf("     over tokens / over slots: forward %.1f, backward %.1f; dense / all of Lighthouse: %.1f, of Causal "
               "Lighthouse: %.1f\n", dense_forward / forward, dense_backward / backward,
               (dense_forward + dense_backward) / whole, (dense_forward + dense_backward) / causal_all);
    }
    if (json) {
        double bytes = (10 * T + 8 * S) * C * X      // each tensor once per kernel that reads or writes it;
                       + 28.0 * H * E + 20.0 * H * S;  // scores and slots of the entries, the index
        printf("{\"T\":%ld,\"H\":%ld,\"D\":%ld,\"levels\":%d,\"pool\":%d,\"topk\":%d,\"S\":%ld,\"copy_GBps\":%.1f,"
               "\"around_ms\":%.4f,\"around_bytes\":%.0f,\"slots_ms\":%.4f,\"ms\":[%.4f,%.4f,%.4f],\"window_1024_ms\":%.4f,\"window_4096_ms\":%.4f,"
               "\"causal_ms\":%.4f,\"dense_ms\":%s}\n",
               T, H, D, c.levels, c.pool, c.topk, S, copy_gbs, around, bytes, forward + backward, whole_fastest, whole,
               whole_slowest, windows[0], windows[1], causal_all, dense_runs ? json_number(dense_forward + dense_backward).c_str() : "null");
        fflush(stdout);
    }
    free_device_arrays();
}

int main(int argc, char** argv) {
    auto wanted = [&](const char* part) {
        for (int i = 1; i < argc; i++) if (!strcmp(argv[i], part)) return true;
        return argc == 1;
    };
    double began = seconds();
    auto took = [&](const char* part) {
        printf("     %s: %.0f s\n", part, seconds() - began);
        began = seconds();
    };
    device_open(0);
    op_scratch_bytes = column_sums_scratch_bytes(3 * 36 * 128);  // of the widest case
    op_scratch = (char*)device_alloc(op_scratch_bytes);
    size_t free_bytes = 0, total_bytes = 0;
    cudaCheck(cudaMemGetInfo(&free_bytes, &total_bytes));
    const bool large = free_bytes > (size_t)45e9;  // what a million tokens take
    if (!large) printf("     %.0f GB of memory are free: the parts million and times, which need 45, are left out\n",
                       free_bytes / 1e9);
    const Case cases[] = {
        {1, 512, 1, 64, 2, 4, 128, 128},     // one tile, every coarse entry expanded
        {2, 1024, 2, 128, 2, 4, 128, 128},
        {1, 4096, 3, 128, 3, 4, 256, 128},
        {2, 2048, 2, 64, 3, 2, 256, 128},
        {1, 4096, 2, 64, 5, 2, 64, 16},
        {1, 2048, 12, 64, 2, 8, 64, 64},
        {2, 1512, 3, 64, 4, 2, 48, 16},      // T no multiple of the scores' 64 tokens
        {1, 8192, 2, 32, 3, 8, 32, 16},      // p = m/2
        {1, 4096, 2, 16, 4, 4, 32, 8},
        {1, 16384, 2, 64, 5, 4, 16, 8},      // entries of 256 tokens
        {1, 8192, 1, 128, 3, 16, 32, 32},    // 16 children; one tile, all of it
        {3, 1000, 5, 64, 2, 2, 8, 4},
        {1, 2048, 36, 128, 2, 2, 128, 128},  // more heads than a block of the scores has groups
        {1, 32768, 1, 32, 2, 2, 8, 8},       // 16384 candidates in a tile
        {1, 131072, 1, 16, 2, 2, 8, 8},      // more candidates than fit into shared memory
        {1, 1024, 2, 64, 8, 2, 4, 4},        // 8 levels
    };
    if (wanted("ops") || wanted("quick")) {
        uint64_t seed = 100;
        for (const Case& c : cases) test_ops(c, seed += 10);
        for (const Case& c : cases)
            for (int W : {2, 4}) if (c.topk / c.tile % W == 0) test_parts(c, W, seed += 10);
        took("ops");
    }
    if (wanted("sdpa")) {
        test_sdpa(2, 65, 2, 64, false, false, 1);
        test_sdpa(1, 1000, 2, 128, false, false, 2);
        test_sdpa(2, 1024, 12, 64, false, false, 3);
        test_sdpa(2, 1024, 2, 128, true, false, 4);
        test_sdpa(2, 520, 3, 64, true, true, 5);
        test_windows(2, 1024, 256, 4, 64, 6);
        test_windows(2, 1000, 384, 2, 128, 7);  // the last window of a sequence is shorter
        test_windows(1, 4160, 1024, 3, 128, 8);
        took("sdpa");
    }
    if (wanted("causal")) {
        test_causal({1, 1024, 2, 64, 2, 4, 64, 64}, false, 20);     // one tile
        test_causal({2, 2048, 2, 64, 3, 2, 64, 32}, false, 21);     // two
        test_causal({2, 1512, 3, 64, 4, 2, 48, 16}, false, 22);     // three: the last range is cut
        test_causal({1, 4096, 3, 128, 3, 4, 256, 32}, false, 23);   // every coarse entry expanded: no leaves there
        test_causal({1, 3200, 2, 128, 2, 16, 160, 32}, false, 24);  // five; leaves of two levels
        test_causal({1, 12288, 2, 128, 3, 4, 192, 16}, false, 25);  // twelve tiles of 1,024 tokens
        test_causal({1, 12288, 2, 128, 4, 4, 48, 16}, false, 27);   // three of 4,096, as 98,304 has 24
        test_causal({2, 2816, 2, 64, 3, 2, 176, 16}, true, 26);     // eleven
        took("causal");
    }
    if (wanted("vectors")) {
        test_vectors("dev/vectors/a_n1024_l2_p4_k128.bin");
        test_vectors("dev/vectors/b_n2048_l3_p2_k256.bin");
    }
    if (wanted("million") && large) {
        test_million();
        took("million");
        if (IS_BF16) test_sdpa_samples(1 << 20, 8, 128, false);
        if (IS_BF16) test_sdpa_samples(32768, 4, 128, true);
        took("sdpa, sampled");
    }
    if ((wanted("times") || wanted("kernels")) && large && IS_BF16) {
        bool dense = wanted("times"), json = argc > 1 && wanted("json");
        size_t bytes = (size_t)2 << 30;
        char *a = device_array<char>(bytes), *b = device_array<char>(bytes);
        copy_gbs = 2 * bytes / 1e6 / median_ms(10, [&] {
            cudaCheck(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, main_stream));
        });
        free_device_arrays();
        printf("     a copy on the device: %.0f GB/s\n", copy_gbs);
#ifndef FLOATX_FP32
        printf("     cuDNN %zu\n", cudnnGetVersion());
#endif
        time_case({1, 98304, 8, 128, 3, 4, 1536, 128}, 15, dense ? 3 : 0, json);
        if (!json) time_case({1, 98304, 12, 64, 3, 4, 1536, 128}, 15, 0);
        time_case({1, 262144, 8, 128, 3, 4, 4096, 128}, 15, dense ? 1 : 0, json);
        time_case({1, 524288, 8, 128, 4, 4, 4096, 128}, 15, dense ? 1 : 0, json);
        time_case({1, 524288, 8, 128, 3, 4, 8192, 128}, 15, dense ? 1 : 0, json);  // the sparsity of the paper's table
    }
    if (argc > 1 && wanted("once")) time_case({1, 98304, 8, 128, 3, 4, 1536, 128}, 1, 0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
