// The CPU operations: the readable statement of what each kernel of the trainer computes, the oracle of the GPU tests,
// and the CPU backend. Same names and arguments as the kernels' launchers, everything in fp32.
//
// The includer defines LighthouseShape, Fp8Scale, Fp8Matrix and AdamW before. Compile with -O3 -march=native -fopenmp;
// with -DUSE_CBLAS the matmuls go through cblas_sgemm. Every result is owned by one loop iteration, so that with the
// same number of threads the same bits come out. Counts that involve the number of tokens are 64-bit.
#ifndef CPU_OPS_H  // no pragma once: dev/test_ops.cpp includes it a second time, with double in the place of float
#define CPU_OPS_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef USE_CBLAS
#include <cblas.h>
extern "C" void openblas_set_num_threads(int) __attribute__((weak));  // NULL where the library is not OpenBLAS
#endif

namespace cpu {

typedef float floatX;

// ---- small things ---------------------------------------------------------------------------------------------

static void* allocate(size_t count, size_t size) {
    void* p = NULL;
    if (posix_memalign(&p, 64, count * size + 64) != 0) {
        fprintf(stderr, "CPU operations: no memory for %zu bytes; lower the batch or the context\n", count * size);
        exit(EXIT_FAILURE);
    }
    return p;
}
static float* allocate_floats(size_t count) { return (float*)allocate(count, sizeof(float)); }

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// exp of x <= 0 to 1e-7 relative, without branches or calls, so that the loops round it vectorize. x = i ln2 + f with
// |f| at most ln2/2: 2^i goes into the exponent bits, e^f is a polynomial. Adding 1.5 2^23 rounds to an integer, which
// then stands in the lowest bits. Exponent bits 0 make the result 0 below x = -87.7; x is held at -88 by bit masks
// because the compiler turns a conditional here into a branch. NaN stays NaN. (The test build, whose float is double,
// takes the library's.)
static inline float exp_fast(float x) {
    if (sizeof(float) == sizeof(double)) return std::exp(x);
    union { float value; uint32_t bits; } c, lowest, exponent, power;
    c.value = x;
    lowest.value = -88.0f;
    uint32_t below = -(uint32_t)(x < -88.0f);
    c.bits = (c.bits & ~below) | (lowest.bits & below);
    exponent.value = c.value * 1.44269504f + (12582912.0f + 127.0f);
    float i = exponent.value - (12582912.0f + 127.0f);
    float f = (c.value - i * 0.693145752f) - i * 1.42860682e-6f;
    float g = 0.49999993f + f * (0.16666521f + f * (0.041668388f + f * (0.0083687169f + f * 0.0013814598f)));
    power.bits = exponent.bits << 23;
    return (1.0f + f + f * f * g) * power.value;
}

// ---- matrix products ------------------------------------------------------------------------------------------
// block_product is the one inner loop of this file: C (M,N) = A (M,K) B (K,N), or += when accumulate. Element (i,k) of
// A is A[i*ai + k*ak], so that A may be transposed; rows of B and C are contiguous. M is a multiple of MR, N of NR, the
// rows of B and C are aligned to a vector: callers pad. MR x NR accumulators stay in registers.

#if defined(__AVX512F__)
static const int LANES = 16, MR = 8;
#elif defined(__AVX__)
static const int LANES = 8, MR = 4;
#else
static const int LANES = 4, MR = 4;
#endif
static const int NR = 2 * LANES;
typedef float vector_t __attribute__((vector_size(LANES * sizeof(float)), may_alias));

static inline void block_product(float* C, int64_t ldc, const float* A, int64_t ai, int64_t ak,
                                 const float* B, int64_t ldb, int64_t M, int64_t N, int64_t K, bool accumulate) {
    for (int64_t i = 0; i < M; i += MR) {
        for (int64_t j = 0; j < N; j += NR) {
            vector_t acc[MR][2];
            for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = vector_t{};
            const float* a = A + i * ai;
            const float* b = B + j;
            for (int64_t k = 0; k < K; k++, a += ak, b += ldb) {
                vector_t b0 = *(const vector_t*)b, b1 = *(const vector_t*)(b + LANES);
                for (int r = 0; r < MR; r++) {
                    acc[r][0] += a[r * ai] * b0;
                    acc[r][1] += a[r * ai] * b1;
                }
            }
            for (int r = 0; r < MR; r++) {
                vector_t* c = (vector_t*)(C + (i + r) * ldc + j);
                c[0] = accumulate ? c[0] + acc[r][0] : acc[r][0];
                c[1] = accumulate ? c[1] + acc[r][1] : acc[r][1];
            }
        }
    }
}

// Packs rows of x (row r at x + r*stride, each of D) into out (padded_rows, padded), zeros round it.
static inline void pack_rows(float* out, int64_t padded_rows, int64_t padded, const float* x, int64_t stride,
                             int64_t rows, int64_t D, float scale) {
    for (int64_t r = 0; r < padded_rows; r++) {
        int64_t width = r < rows ? D : 0;
        for (int64_t d = 0; d < width; d++) out[r * padded + d] = x[r * stride + d] * scale;
        for (int64_t d = width; d < padded; d++) out[r * padded + d] = 0;
    }
}

// The same, transposed: out (D, padded_rows).
static inline void pack_columns(float* out, int64_t padded_rows, const float* x, int64_t stride,
                                int64_t rows, int64_t D, float scale) {
    for (int64_t d = 0; d < D; d++) {
        for (int64_t r = 0; r < rows; r++) out[d * padded_rows + r] = x[r * stride + d] * scale;
        for (int64_t r = rows; r < padded_rows; r++) out[d * padded_rows + r] = 0;
    }
}

// C (M,N) = op(A) op(B), or += when accumulate; all row-major and dense. ta: A is stored (K,M); tb: B is stored (N,K).
#ifdef USE_CBLAS
// Our threads split the longer side and each calls a one-threaded sgemm: two thread pools, OpenMP's and the library's,
// would wait for each other's spinning threads.
static void matmul(float* C, const float* A, bool ta, const float* B, bool tb,
                   int64_t M, int64_t N, int64_t K, bool accumulate) {
    if (openblas_set_num_threads) openblas_set_num_threads(1);
    #pragma omp parallel
    {
        int64_t side = M > N ? M : N, parts = 1, part = 0;
        #ifdef _OPENMP
        parts = omp_get_num_threads(), part = omp_get_thread_num();
        #endif
        int64_t chunk = ((side + parts - 1) / parts + 15) / 16 * 16;
        int64_t first = min64(side, part * chunk), count = min64(side - first, chunk);
        int64_t i = M > N ? first : 0, j = M > N ? 0 : first;
        int64_t m = M > N ? count : M, n = M > N ? N : count;
        if (m > 0 && n > 0) {
            cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n, K, 1.0f,
                        A + (ta ? i : i * K), ta ? M : K, B + (tb ? j * K : j), tb ? K : N,
                        accumulate ? 1.0f : 0.0f, C + i * N + j, N);
        }
    }
}
#else
static void matmul(float* C, const float* A, bool ta, const float* B, bool tb,
                   int64_t M, int64_t N, int64_t K, bool accumulate) {
    const int64_t TILE = 128, DEPTH = 256;  // a packed tile of B is 128 KiB, within a core's cache
    int64_t tiles_m = (M + TILE - 1) / TILE, tiles_n = (N + TILE - 1) / TILE;
    #pragma omp parallel
    {
        float* a = allocate_floats(TILE * DEPTH);
        float* b = allocate_floats(TILE * DEPTH);
        float* c = allocate_floats(TILE * TILE);
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < tiles_m * tiles_n; job++) {
            int64_t i0 = job / tiles_n * TILE, m = min64(TILE, M - i0);
            int64_t j0 = job % tiles_n * TILE, n = min64(TILE, N - j0);
            int64_t padded_m = (m + MR - 1) / MR * MR, padded_n = (n + NR - 1) / NR * NR;
            for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
                int64_t depth = min64(DEPTH, K - k0);
                if (ta) pack_columns(a, DEPTH, A + k0 * M + i0, M, depth, m, 1);
                else pack_rows(a, m, DEPTH, A + i0 * K + k0, K, m, depth, 1);
                for (int64_t i = m; i < padded_m; i++) memset(a + i * DEPTH, 0, DEPTH * sizeof(float));
                if (tb) pack_columns(b, padded_n, B + j0 * K + k0, K, n, depth, 1);
                else pack_rows(b, depth, padded_n, B + k0 * N + j0, N, depth, n, 1);
                block_product(c, TILE, a, DEPTH, 1, b, padded_n, padded_m, padded_n, depth, k0 > 0);
            }
            for (int64_t i = 0; i < m; i++) {
                float* row = C + (i0 + i) * N + j0;
                for (int64_t j = 0; j < n; j++) row[j] = accumulate ? row[j] + c[i * TILE + j] : c[i * TILE + j];
            }
        }
        free(a); free(b); free(c);
    }
}
#endif

// out (N,OC) = bias (OC) + addend (N,OC), either of which may be NULL. Returns whether there was one.
static bool add_up(float* out, const float* bias, const float* addend, int64_t N, int64_t OC) {
    if (!bias && !addend) return false;
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        for (int64_t o = 0; o < OC; o++) out[i * OC + o] = (bias ? bias[o] : 0) + (addend ? addend[i * OC + o] : 0);
    }
    return true;
}

void matmul_forward(floatX* out /*(N,OC)*/, const floatX* inp /*(N,C)*/, const floatX* weight /*(OC,C)*/,
                    const floatX* bias /*(OC) or NULL*/, const floatX* addend /*(N,OC) or NULL, may not alias out*/,
                    int64_t N, int C, int OC) {
    matmul(out, inp, false, weight, true, N, OC, C, add_up(out, bias, addend, N, OC));
}

// ---- embedding, LayerNorm, GELU, cross-entropy ----------------------------------------------------------------

void encoder_forward(floatX* out /*(B,T,C)*/, const int* tokens /*(B,T)*/, const floatX* wte /*(Vp,C)*/,
                     const floatX* wpe /*(maxT,C) or NULL*/, int B, int64_t T, int C,
                     int64_t t0 /*position of token 0*/) {
    #pragma omp parallel for
    for (int64_t bt = 0; bt < B * T; bt++) {
        const floatX* token = wte + (int64_t)tokens[bt] * C;
        const floatX* position = wpe ? wpe + (t0 + bt % T) * C : NULL;
        for (int64_t c = 0; c < C; c++) out[bt * C + c] = token[c] + (position ? position[c] : 0);
    }
}

// A thread owns a range of channels, because tokens repeat: rows of dwte have many writers.
void encoder_backward(float* dwte /*+=*/, float* dwpe /*+= or NULL*/, const floatX* dout, const int* tokens,
                      int B, int64_t T, int C, int64_t t0, int Vp) {
    (void)Vp;
    #pragma omp parallel for
    for (int64_t c0 = 0; c0 < C; c0 += 32) {
        int64_t c1 = min64(C, c0 + 32);
        for (int64_t bt = 0; bt < B * T; bt++) {
            float* token = dwte + (int64_t)tokens[bt] * C;
            for (int64_t c = c0; c < c1; c++) token[c] += dout[bt * C + c];
            if (dwpe) {
                float* position = dwpe + (t0 + bt % T) * C;
                for (int64_t c = c0; c < c1; c++) position[c] += dout[bt * C + c];
            }
        }
    }
}

void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                       const floatX* bias, int64_t N, int C) {
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const floatX* x = inp + i * C;
        float sum = 0, square = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; c++) sum += x[c];
        float m = sum / C;
        #pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < C; c++) square += (x[c] - m) * (x[c] - m);
        float r = 1 / std::sqrt(square / C + (float)1e-5);
        for (int64_t c = 0; c < C; c++) out[i * C + c] = (x[c] - m) * r * weight[c] + bias[c];
        mean[i] = m;
        rstd[i] = r;
    }
}

void layernorm_backward(floatX* dinp /*+=*/, float* dweight /*+=*/, float* dbias /*+=*/,
                        float* dsum /*(C) += the sums of dinp's columns, or NULL*/, const floatX* dout,
                        const floatX* inp, const floatX* weight, const float* mean, const float* rstd,
                        int64_t N, int C) {
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const floatX* x = inp + i * C;
        const floatX* dy = dout + i * C;
        float m = mean[i], r = rstd[i], sum = 0, dot = 0;  // of dnorm = weight * dout, and of dnorm * norm
        #pragma omp simd reduction(+ : sum, dot)
        for (int64_t c = 0; c < C; c++) {
            float dnorm = weight[c] * dy[c];
            sum += dnorm;
            dot += dnorm * (x[c] - m) * r;
        }
        sum /= C;
        dot /= C;
        for (int64_t c = 0; c < C; c++) dinp[i * C + c] += (weight[c] * dy[c] - sum - (x[c] - m) * r * dot) * r;
    }
    #pragma omp parallel for
    for (int64_t c0 = 0; c0 < C; c0 += 32) {
        int64_t c1 = min64(C, c0 + 32);
        float dw[32] = {0}, db[32] = {0}, ds[32] = {0};
        for (int64_t i = 0; i < N; i++) {
            for (int64_t c = c0; c < c1; c++) {
                dw[c - c0] += dout[i * C + c] * (inp[i * C + c] - mean[i]) * rstd[i];
                db[c - c0] += dout[i * C + c];
                ds[c - c0] += dinp[i * C + c];
            }
        }
        for (int64_t c = c0; c < c1; c++) {
            dweight[c] += dw[c - c0];
            dbias[c] += db[c - c0];
            if (dsum) dsum[c] += ds[c - c0];
        }
    }
}

// The tanh approximation, 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), is x sigmoid(2u): written so,
// nothing cancels for large negative x.
static inline float gelu_sigmoid(float x) {
    float z = (float)1.5957691216057308 * (x + (float)0.044715 * x * x * x);
    float e = exp_fast(-std::fabs(z)), positive = 1 / (1 + e), negative = e * positive;
    return z < 0 ? negative : positive;
}

void gelu_forward(floatX* out, const floatX* inp, int64_t n) {
    #pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] = inp[i] * gelu_sigmoid(inp[i]);
}

void gelu_backward(floatX* dinp, const floatX* dout, const floatX* inp, int64_t n) {  // dinp may be dout
    #pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        float x = inp[i], sigmoid = gelu_sigmoid(x);
        float slope = (float)1.5957691216057308 * (1 + (float)0.134145 * x * x);  // of 2u
        dinp[i] = dout[i] * sigmoid * (1 + x * (1 - sigmoid) * slope);
    }
}

void matmul_backward(floatX* dinp /*(N,C) or NULL*/, float* dweight /*(OC,C) +=, or = if fresh*/, bool fresh,
                     float* dbias /*(OC) += or NULL*/, const floatX* dout /*(N,OC)*/, const floatX* inp,
                     const floatX* weight,
                     const floatX* gelu_inp /*(N,C) with inp = GELU(gelu_inp): dinp is its gradient; or NULL*/,
                     int64_t N, int C, int OC) {
    if (dinp) matmul(dinp, dout, false, weight, false, N, C, OC, false);
    if (dinp && gelu_inp) gelu_backward(dinp, dinp, gelu_inp, N * C);
    matmul(dweight, dout, true, inp, false, OC, C, N, !fresh);
    if (dbias) {
        #pragma omp parallel for
        for (int64_t o0 = 0; o0 < OC; o0 += 64) {
            int64_t o1 = min64(OC, o0 + 64);
            float sum[64] = {0};
            for (int64_t i = 0; i < N; i++) {
                for (int64_t o = o0; o < o1; o++) sum[o - o0] += dout[i * OC + o];
            }
            for (int64_t o = o0; o < o1; o++) dbias[o] += sum[o - o0];
        }
    }
}

// FP8: a gradient's numbers are e5m2 (2 bits of mantissa, exponents down to -14), the others e4m3 (3 bits, down to -6).
static inline uint8_t fp8_round(float x, bool gradient) {  // to nearest, ties to even; past the largest: the largest
    int bits = gradient ? 2 : 3, lowest = gradient ? -14 : -6;
    float most = gradient ? 57344 : 448, size = std::fabs(x);
    if (x != x) return 0x7f;
    if (size > most) size = most;
    int exponent = size > 0 ? std::max(std::ilogb(size), lowest) : lowest;
    int mantissa = (int)std::nearbyint(std::ldexp(size, bits - exponent));  // with the leading bit, if there is one
    return (uint8_t)((((exponent - lowest) << bits) + mantissa) | (std::signbit(x) ? 0x80 : 0));
}
static inline float fp8_value(uint8_t q, bool gradient) {
    int bits = gradient ? 2 : 3, lowest = gradient ? -14 : -6;
    int exponent = (q & 0x7f) >> bits, mantissa = q & ((1 << bits) - 1);
    if ((q & 0x7f) == 0x7f) return NAN;
    float size = exponent ? std::ldexp((float)(mantissa + (1 << bits)), exponent - 1 + lowest - bits)
                          : std::ldexp((float)mantissa, lowest - bits);
    return q & 0x80 ? -size : size;
}

// The largest magnitude, or where GELU is in between a bound: GELU(pre) is no larger than pre, GELU'(pre) than 1.13.
void fp8_amax(Fp8Scale* scale, const floatX* x /*(n) or NULL*/, const floatX* pre /*(n) or NULL*/, int64_t n) {
    const floatX* source = x ? x : pre;
    float most = 0, times = x && pre ? 1.13f : 1.0f;
    bool nan = scale->amax != scale->amax;
    #pragma omp parallel for reduction(max : most) reduction(|| : nan)
    for (int64_t i = 0; i < n; i++) {
        float size = std::fabs(source[i]);
        most = std::max(most, size);
        nan = nan || size != size;
    }
    scale->amax = nan ? NAN : std::max((float)scale->amax, most * times);
}

// What is quantized: x, GELU(pre), or for a gradient x GELU'(pre).
static inline float fp8_source(const floatX* x, const floatX* pre, int64_t i, bool gradient) {
    if (!pre) return x[i];
    float u = pre[i], sigmoid = gelu_sigmoid(u), slope = (float)1.5957691216057308 * (1 + (float)0.134145 * u * u);
    return gradient ? x[i] * sigmoid * (1 + u * (1 - sigmoid) * slope) : u * sigmoid;
}

void fp8_quantize(Fp8Matrix y /*(N,C)*/, float* dbias /*(C) += or NULL*/, const floatX* x /*(N,C) or NULL*/,
                  const floatX* pre /*(N,C) or NULL*/, int64_t N, int C, bool gradient) {
    float factor = std::min((float)0x1p120, (gradient ? 57344 : 448) / (float)y.scale->amax);  // of a NaN 2^120
    y.scale->inverse = std::isfinite(y.scale->amax) ? 1 / factor : y.scale->amax;
    #pragma omp parallel for
    for (int64_t c = 0; c < C; c++) {
        float sum = 0;
        for (int64_t i = 0; i < N; i++) {
            float value = fp8_source(x, pre, i * C + c, gradient);
            uint8_t q = fp8_round(value * factor, gradient);
            if (y.rows) y.rows[i * C + c] = q;
            if (y.columns) y.columns[c * N + i] = q;
            sum += value;
        }
        if (dbias) dbias[c] += sum;
    }
}

// The numbers of x (n), times factor; to be freed.
static float* fp8_widen(const uint8_t* x, int64_t n, float factor, bool gradient) {
    float value[256], *wide = allocate_floats(n);
    for (int q = 0; q < 256; q++) value[q] = fp8_value(q, gradient) * factor;
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) wide[i] = value[x[i]];
    return wide;
}

// out = a b^T factor + bias + addend, as GPUs multiply FP8: rows by rows. addend may be out.
static void fp8_matmul(float* out /*(N,M)*/, const uint8_t* a /*(N,K)*/, const uint8_t* b /*(M,K) e4m3*/,
                       const float* bias /*(M) or NULL*/, const float* addend /*(N,M) or NULL*/, int64_t N, int64_t M,
                       int64_t K, float factor, bool a_gradient) {
    float *wide_a = fp8_widen(a, N * K, factor, a_gradient), *wide_b = fp8_widen(b, M * K, 1, false);
    matmul(out, wide_a, false, wide_b, true, N, M, K, add_up(out, bias, addend, N, M));
    free(wide_a); free(wide_b);
}

void fp8_matmul_forward(floatX* out /*(N,OC)*/, Fp8Matrix inp /*(N,C) rows*/, Fp8Matrix weight /*(OC,C) rows*/,
                        const floatX* bias /*(OC) or NULL*/, const floatX* addend /*(N,OC) or NULL*/, int64_t N, int C,
                        int OC) {
    fp8_matmul(out, inp.rows, weight.rows, bias, addend, N, OC, C, (float)inp.scale->inverse * weight.scale->inverse,
               false);
}

void fp8_matmul_backward(floatX* dinp /*(N,C)*/, float* dweight /*(OC,C) +=, or = if fresh*/, bool fresh,
                         Fp8Matrix dout /*(N,OC) both*/, Fp8Matrix inp /*(N,C) columns*/,
                         Fp8Matrix weight /*(OC,C) columns*/, int64_t N, int C, int OC) {
    fp8_matmul(dinp, dout.rows, weight.columns, NULL, NULL, N, C, OC,
               (float)dout.scale->inverse * weight.scale->inverse, true);
    fp8_matmul(dweight, dout.columns, inp.columns, NULL, fresh ? NULL : dweight, OC, C, N,
               (float)dout.scale->inverse * inp.scale->inverse, true);
}

// Columns from V on are padding, outside the softmax; their gradient is 0. A target below 0: no loss, no gradient.
void crossentropy_forward_backward(floatX* logits /*(N,Vp) in, dlogits out when grad*/, float* losses /*(N)*/,
                                   const int* targets /*(N)*/, float dloss /*gradient of each row's loss*/,
                                   int64_t N, int V, int Vp, bool grad) {
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        floatX* x = logits + i * Vp;
        int target = targets[i];
        losses[i] = 0;
        if (target < 0) {
            if (grad) memset(x, 0, Vp * sizeof(floatX));
            continue;
        }
        float top = x[0], sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < V; v++) top = x[v] > top ? x[v] : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < V; v++) sum += exp_fast(x[v] - top);
        losses[i] = std::log(sum) + top - x[target];
        if (!grad) continue;
        float scale = dloss / sum;
        for (int64_t v = 0; v < V; v++) x[v] = exp_fast(x[v] - top) * scale;
        x[target] -= dloss;
        for (int64_t v = V; v < Vp; v++) x[v] = 0;
    }
}

// ---- rotary positions -----------------------------------------------------------------------------------------

// Turns one head's vector: dimension d is paired with d + D/2. direction -1 turns back, which is also the gradient.
static inline void rope_turn(floatX* x /*(D)*/, const float* table, int64_t position, int direction, int D) {
    int64_t half = D / 2;
    const float* fine = table + (position & 1023) * D;
    const float* coarse = table + (1024 + (position >> 10)) * D;
    for (int64_t d = 0; d < half; d++) {
        float cosine = fine[2 * d] * coarse[2 * d] - fine[2 * d + 1] * coarse[2 * d + 1];
        float sine = (fine[2 * d] * coarse[2 * d + 1] + fine[2 * d + 1] * coarse[2 * d]) * direction;
        float re = x[d], im = x[d + half];
        x[d] = re * cosine - im * sine;
        x[d + half] = re * sine + im * cosine;
    }
}

void rope_rotate(floatX* qkv /*(B,T,3,H,D), q and k in place*/, const float* table,
                 int direction /*+1 forward, -1 inverse = backward*/, int B, int64_t T, int H, int D,
                 int64_t t0 /*position of token 0*/) {
    #pragma omp parallel for
    for (int64_t bt = 0; bt < B * T; bt++) {
        for (int64_t h = 0; h < 2 * H; h++) rope_turn(qkv + (bt * 3 * H + h) * D, table, t0 + bt % T, direction, D);
    }
}

// ---- causal attention -----------------------------------------------------------------------------------------
// Blocks of queries times blocks of keys, never a (T,T) buffer. A job owns one block of rows and their outputs, and
// walks over the blocks that it needs in a fixed order. The owned block lies transposed, its rows along the vector
// lanes. Rows past T are zeros, masked or never written.

static const int64_t BLOCK = 64;

void sdpa_forward(floatX* out /*(B,T,H,D)*/, float* stats /*(B,H,T) natural-log logsumexp of scaled scores*/,
                  const floatX* qkv, int B, int64_t T, int H, int D) {
    int64_t blocks = (T + BLOCK - 1) / BLOCK, padded = (D + NR - 1) / NR * NR;
    int64_t C = (int64_t)H * D, stride = 3 * C;
    float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel
    {
        float* q = allocate_floats(D * BLOCK);        // (D, queries), scaled
        float* k = allocate_floats(BLOCK * padded);   // (keys, D)
        float* v = allocate_floats(BLOCK * padded);   // (keys, D)
        float* p = allocate_floats(BLOCK * BLOCK);    // (keys, queries): scores, then their exponentials
        float* o = allocate_floats(BLOCK * padded);   // (queries, D)
        float top[BLOCK], sum[BLOCK], shrink[BLOCK];  // per query: running maximum, sum; factor on what came before
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < blocks * B * H; job++) {
            int64_t qb = blocks - 1 - job / (B * H), bh = job % (B * H), b = bh / H, h = bh % H;  // longest first
            int64_t q0 = qb * BLOCK, rows = min64(BLOCK, T - q0);
            const floatX* base = qkv + b * T * stride + h * D;
            pack_columns(q, BLOCK, base + q0 * stride, stride, rows, D, scale);
            memset(o, 0, BLOCK * padded * sizeof(float));
            for (int64_t i = 0; i < BLOCK; i++) { top[i] = -INFINITY; sum[i] = 0; }
            for (int64_t kb = 0; kb <= qb; kb++) {
                int64_t k0 = kb * BLOCK, keys = min64(BLOCK, T - k0);
                pack_rows(k, BLOCK, padded, base + k0 * stride + C, stride, keys, D, 1);
                pack_rows(v, BLOCK, padded, base + k0 * stride + 2 * C, stride, keys, D, 1);
                block_product(p, BLOCK, k, padded, 1, q, BLOCK, BLOCK, BLOCK, D, false);
                for (int64_t j = 0; kb == qb && j < BLOCK; j++) {
                    for (int64_t i = 0; i < j; i++) p[j * BLOCK + i] = -INFINITY;
                }
                float before[BLOCK];
                memcpy(before, top, sizeof(top));
                for (int64_t j = 0; j < BLOCK; j++) {
                    #pragma omp simd
                    for (int64_t i = 0; i < BLOCK; i++) top[i] = p[j * BLOCK + i] > top[i] ? p[j * BLOCK + i] : top[i];
                }
                #pragma omp simd
                for (int64_t i = 0; i < BLOCK; i++) {
                    shrink[i] = exp_fast(before[i] - top[i]);
                    sum[i] *= shrink[i];
                }
                for (int64_t j = 0; j < BLOCK; j++) {
                    #pragma omp simd
                    for (int64_t i = 0; i < BLOCK; i++) {
                        p[j * BLOCK + i] = exp_fast(p[j * BLOCK + i] - top[i]);
                        sum[i] += p[j * BLOCK + i];
                    }
                }
                for (int64_t i = 0; i < BLOCK; i++) {
                    for (int64_t d = 0; d < padded; d++) o[i * padded + d] *= shrink[i];
                }
                block_product(o, padded, p, 1, BLOCK, v, padded, BLOCK, padded, BLOCK, true);
            }
            for (int64_t i = 0; i < rows; i++) {
                floatX* row = out + (b * T + q0 + i) * C + h * D;
                for (int64_t d = 0; d < D; d++) row[d] = o[i * padded + d] / sum[i];
                stats[bh * T + q0 + i] = top[i] + std::log(sum[i]);
            }
        }
        free(q); free(k); free(v); free(p); free(o);
    }
}

// With P = exp(S - stats) and delta = sum(dout * out) of a row: dS = P (dout V^T - delta), dV = P^T dout,
// dQ = scale dS K, dK = scale dS^T Q. Two passes make S twice, one that owns keys and one that owns queries, so that no
// output is shared between jobs.
void sdpa_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* stats,
                   int B, int64_t T, int H, int D) {
    int64_t blocks = (T + BLOCK - 1) / BLOCK, padded = (D + NR - 1) / NR * NR;
    int64_t C = (int64_t)H * D, stride = 3 * C;
    float scale = 1 / std::sqrt((float)D);
    float* delta = allocate_floats((size_t)B * H * T);  // (B,H,T)
    #pragma omp parallel
    {
        #pragma omp for
        for (int64_t bt = 0; bt < B * T; bt++) {
            for (int64_t h = 0; h < H; h++) {
                float dot = 0;
                #pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; d++) dot += dout[bt * C + h * D + d] * out[bt * C + h * D + d];
                delta[(bt / T * H + h) * T + bt % T] = dot;
            }
        }
        float* own0 = allocate_floats(D * BLOCK);        // (D, owned rows): k and v, or scaled q and dout
        float* own1 = allocate_floats(D * BLOCK);
        float* walk0 = allocate_floats(BLOCK * padded);  // (walking rows, D): scaled q and dout, or k and v
        float* walk1 = allocate_floats(BLOCK * padded);
        float* p = allocate_floats(BLOCK * BLOCK);       // (walking rows, owned rows)
        float* ds = allocate_floats(BLOCK * BLOCK);
        float* grad0 = allocate_floats(BLOCK * padded);  // (owned rows, D): dk and dv, or dq
        float* grad1 = allocate_floats(BLOCK * padded);
        for (int pass = 0; pass < 2; pass++) {
            bool keys = pass == 0;  // the owned rows are keys, the walking rows queries; else the other way round
            #pragma omp for schedule(dynamic)
            for (int64_t job = 0; job < blocks * B * H; job++) {  // the longest first
                int64_t ob = keys ? job / (B * H) : blocks - 1 - job / (B * H), bh = job % (B * H), b = bh / H;
                int64_t o0 = ob * BLOCK, rows = min64(BLOCK, T - o0);
                const floatX* q = qkv + b * T * stride + bh % H * D;
                const floatX* dy = dout + b * T * C + bh % H * D;
                const float* stat = stats + bh * T;
                const float* del = delta + bh * T;
                float own_stat[BLOCK] = {0}, own_del[BLOCK] = {0};
                if (keys) {
                    pack_columns(own0, BLOCK, q + o0 * stride + C, stride, rows, D, 1);
                    pack_columns(own1, BLOCK, q + o0 * stride + 2 * C, stride, rows, D, 1);
                } else {
                    pack_columns(own0, BLOCK, q + o0 * stride, stride, rows, D, scale);
                    pack_columns(own1, BLOCK, dy + o0 * C, C, rows, D, 1);
                    memcpy(own_stat, stat + o0, rows * sizeof(float));
                    memcpy(own_del, del + o0, rows * sizeof(float));
                }
                memset(grad0, 0, BLOCK * padded * sizeof(float));
                memset(grad1, 0, BLOCK * padded * sizeof(float));
                for (int64_t wb = keys ? ob : 0; wb < (keys ? blocks : ob + 1); wb++) {
                    int64_t w0 = wb * BLOCK, walking = min64(BLOCK, T - w0);
                    if (keys) {
                        pack_rows(walk0, BLOCK, padded, q + w0 * stride, stride, walking, D, scale);
                        pack_rows(walk1, BLOCK, padded, dy + w0 * C, C, walking, D, 1);
                    } else {
                        pack_rows(walk0, BLOCK, padded, q + w0 * stride + C, stride, walking, D, 1);
                        pack_rows(walk1, BLOCK, padded, q + w0 * stride + 2 * C, stride, walking, D, 1);
                    }
                    block_product(p, BLOCK, walk0, padded, 1, own0, BLOCK, BLOCK, BLOCK, D, false);
                    block_product(ds, BLOCK, walk1, padded, 1, own1, BLOCK, BLOCK, BLOCK, D, false);
                    for (int64_t i = 0; i < walking; i++) {
                        int64_t first = keys ? i + 1 : 0, end = keys ? BLOCK : i;  // keys after their query
                        for (int64_t j = first; wb == ob && j < end; j++) p[i * BLOCK + j] = -INFINITY;
                        float row_stat = keys ? stat[w0 + i] : 0, row_del = keys ? del[w0 + i] : 0;
                        #pragma omp simd
                        for (int64_t j = 0; j < BLOCK; j++) {
                            p[i * BLOCK + j] = exp_fast(p[i * BLOCK + j] - (row_stat + own_stat[j]));
                            ds[i * BLOCK + j] = p[i * BLOCK + j] * (ds[i * BLOCK + j] - (row_del + own_del[j]));
                        }
                    }
                    block_product(grad0, padded, ds, 1, BLOCK, walk0, padded, BLOCK, padded, walking, true);
                    if (keys) block_product(grad1, padded, p, 1, BLOCK, walk1, padded, BLOCK, padded, walking, true);
                }
                for (int64_t r = 0; r < rows; r++) {
                    floatX* dq = dqkv + (b * T + o0 + r) * stride + bh % H * D;
                    for (int64_t d = 0; d < D; d++) {
                        if (!keys) dq[d] = grad0[r * padded + d] * scale;
                        if (keys) dq[C + d] = grad0[r * padded + d];
                        if (keys) dq[2 * C + d] = grad1[r * padded + d];
                    }
                }
            }
        }
        free(own0); free(own1); free(walk0); free(walk1); free(p); free(ds); free(grad0); free(grad1);
    }
    free(delta);
}

// ---- Lighthouse -----------------------------------------------------------------------------------------------
// Entry (l, i) stands for the c_l = pool^l tokens from i c_l on; its flat index is off[l] + i. Its last token, where it
// is rotated and from where on it is written back, is (i+1) c_l - 1.

static inline int64_t entry_level(int64_t* i /*out: entry within the level*/, int64_t* width /*out: c_l*/, int64_t flat,
                                  const LighthouseShape* s) {
    int64_t l = 0, w = 1;
    for (; flat >= s->off[l + 1]; l++) w *= s->pool;
    *i = flat - s->off[l];
    *width = w;
    return l;
}

// The norms of q and k at level 0; above, the maximum over the tokens covered, which is the maximum over the children.
void lighthouse_scores(float* scores /*(2,B,H,E): a then b*/, const floatX* qkv /*raw, before RoPE*/, int B,
                       const LighthouseShape* s) {
    int64_t T = s->T, H = s->H, D = s->D, E = s->off[s->levels];
    #pragma omp parallel for collapse(3)
    for (int64_t part = 0; part < 2; part++) {
        for (int64_t b = 0; b < B; b++) {
            for (int64_t h = 0; h < H; h++) {
                float* score = scores + ((part * B + b) * H + h) * E;
                for (int64_t t = 0; t < T; t++) {
                    const floatX* x = qkv + (((b * T + t) * 3 + part) * H + h) * D;
                    float square = 0;
                    #pragma omp simd reduction(+ : square)
                    for (int64_t d = 0; d < D; d++) square += x[d] * x[d];
                    score[t] = std::sqrt(square);
                }
                for (int l = 1; l < s->levels; l++) {
                    for (int64_t i = 0; i < s->n[l]; i++) {
                        const float* child = score + s->off[l - 1] + i * s->pool;
                        float top = child[0];  // NaN only where all are: the maximum is fmax's
                        for (int64_t c = 1; c < s->pool; c++) top = child[c] > top || top != top ? child[c] : top;
                        score[s->off[l] + i] = top;
                    }
                }
            }
        }
    }
}

// What one tile keeps while it is selected: per level, its candidates in ascending order and whether each is expanded.
// The children of the e-th expanded candidate of level l are candidates e p ... e p + p - 1 of level l-1.
struct TileSelection {
    int64_t* candidate[LH_MAX_LEVELS];
    char* expanded[LH_MAX_LEVELS];
    int64_t emitted[LH_MAX_LEVELS];  // expanded candidates of the level that the walk has passed
};

// Writes the subtree of candidate j of level l in post-order: by the end of the window, children before their parent.
static int32_t* emit_subtree(int32_t* out, TileSelection* tile, int l, int64_t j, const LighthouseShape* s) {
    if (tile->expanded[l][j]) {
        int64_t first = tile->emitted[l]++ * s->pool;
        for (int64_t c = 0; c < s->pool; c++) out = emit_subtree(out, tile, l - 1, first + c, s);
    }
    *out++ = (int32_t)(s->off[l] + tile->candidate[l][j]);
    return out;
}

// Marks the count best by score among those not yet expanded. Ties: the lower index. NaN counts as infinity, so that
// the order is total and the selection has its size whatever the scores are.
static void mark_best(char* expanded, int64_t* order /*scratch*/, const int64_t* candidate, int64_t n,
                      const float* score, int64_t count) {
    int64_t open = 0;
    for (int64_t j = 0; j < n; j++) {
        if (!expanded[j]) order[open++] = j;
    }
    std::nth_element(order, order + count - 1, order + open, [=](int64_t x, int64_t y) {
        float sx = score[candidate[x]], sy = score[candidate[y]];
        if (sx != sx) sx = INFINITY;
        if (sy != sy) sy = INFINITY;
        return sx > sy || (sx == sy && x < y);
    });
    for (int64_t r = 0; r < count; r++) expanded[order[r]] = 1;
}

void lighthouse_select(int32_t* index /*(B,H,S) flat entry index in sequence order*/, const float* scores, int B,
                       const LighthouseShape* s) {
    int64_t E = s->off[s->levels], heads = (int64_t)B * s->H, coarse = s->n[s->levels - 1] / s->tiles;
    int64_t below = (int64_t)s->pool * s->tile, most = coarse > below ? coarse : below;
    #pragma omp parallel
    {
        int64_t* order = (int64_t*)allocate(most, sizeof(int64_t));
        TileSelection tile;
        for (int l = 0; l < s->levels; l++) {
            tile.candidate[l] = (int64_t*)allocate(most, sizeof(int64_t));
            tile.expanded[l] = (char*)allocate(most, 1);
        }
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < heads * s->tiles; job++) {
            const float* a = scores + job / s->tiles * E;
            const float* b = a + heads * E;
            int64_t n = coarse;
            for (int64_t j = 0; j < n; j++) tile.candidate[s->levels - 1][j] = job % s->tiles * coarse + j;
            for (int l = s->levels - 1; l >= 0; l--) {
                tile.emitted[l] = 0;
                memset(tile.expanded[l], 0, n);
                if (l == 0) break;
                mark_best(tile.expanded[l], order, tile.candidate[l], n, a + s->off[l], s->tile / 2);
                mark_best(tile.expanded[l], order, tile.candidate[l], n, b + s->off[l], s->tile / 2);
                int64_t children = 0;
                for (int64_t j = 0; j < n; j++) {
                    for (int64_t c = 0; c < s->pool && tile.expanded[l][j]; c++) {
                        tile.candidate[l - 1][children++] = tile.candidate[l][j] * s->pool + c;
                    }
                }
                n = children;
            }
            int32_t* out = index + job * s->tile_slots;
            for (int64_t j = 0; j < coarse; j++) out = emit_subtree(out, &tile, s->levels - 1, j, s);
        }
        free(order);
        for (int l = 0; l < s->levels; l++) { free(tile.candidate[l]); free(tile.expanded[l]); }
    }
}

void lighthouse_invert(int32_t* slot /*(B,H,E) slot of the entry, or -1*/, const int32_t* index, int B,
                       const LighthouseShape* s) {
    int64_t E = s->off[s->levels];
    #pragma omp parallel for
    for (int64_t bh = 0; bh < (int64_t)B * s->H; bh++) {
        for (int64_t e = 0; e < E; e++) slot[bh * E + e] = -1;
        for (int64_t r = 0; r < s->S; r++) slot[bh * E + index[bh * s->S + r]] = (int32_t)r;
    }
}

// A slot holds the mean of q, of k and of v over its tokens; q and k are rotated after pooling, at the last of them.
void lighthouse_gather(floatX* slots /*(B,S,3,H,D)*/, const floatX* qkv, const int32_t* index,
                       const float* rope /*table or NULL*/, int B, const LighthouseShape* s,
                       int64_t t0 /*position of token 0*/) {
    int64_t T = s->T, H = s->H, D = s->D, S = s->S;
    #pragma omp parallel for
    for (int64_t br = 0; br < B * S; br++) {
        int64_t b = br / S, r = br % S;
        for (int64_t h = 0; h < H; h++) {
            int64_t i, width;
            entry_level(&i, &width, index[(b * H + h) * S + r], s);
            for (int64_t part = 0; part < 3; part++) {
                floatX* x = slots + ((br * 3 + part) * H + h) * D;
                for (int64_t d = 0; d < D; d++) x[d] = 0;
                for (int64_t t = i * width; t < (i + 1) * width; t++) {
                    for (int64_t d = 0; d < D; d++) x[d] += qkv[(((b * T + t) * 3 + part) * H + h) * D + d];
                }
                for (int64_t d = 0; d < D; d++) x[d] /= width;
                if (rope && part < 2) rope_turn(x, rope, t0 + (i + 1) * width - 1, +1, s->D);
            }
        }
    }
}

// What the last entry of each level above 0 gives to the tokens that follow: zeros where it is not in the sequence.
void lighthouse_halo(floatX* halo /*(B,L-1,H,D)*/, const floatX* attn /*(B,S,H,D)*/, const int32_t* slot, int B,
                     const LighthouseShape* s) {
    int64_t L = s->levels, H = s->H, D = s->D;
    for (int64_t b = 0; b < B; b++) {
        for (int64_t l = 1; l < L; l++) {
            for (int64_t h = 0; h < H; h++) {
                int64_t r = slot[(b * H + h) * s->off[L] + s->off[l + 1] - 1];
                floatX* x = halo + ((b * (L - 1) + l - 1) * H + h) * D;
                for (int64_t d = 0; d < D; d++) x[d] = r < 0 ? 0 : attn[((b * s->S + r) * H + h) * D + d];
            }
        }
    }
}

// Slot (l, i) is added to c_l tokens from the last one it covers on, so token t receives from each level entry
// floor((t+1)/c_l) - 1 where that is in the sequence. Tokens that nothing reaches are zero. Where the tokens are a
// part of a sequence, entry -1 is the last one of the part before, in its halo.
void lighthouse_scatter(floatX* out /*(B,T,H,D)*/, const floatX* attn /*(B,S,H,D)*/,
                        const floatX* halo /*(B,L-1,H,D) or NULL*/, const int32_t* slot, int B,
                        const LighthouseShape* s) {
    int64_t T = s->T, L = s->levels, H = s->H, D = s->D, S = s->S, E = s->off[L];
    #pragma omp parallel for
    for (int64_t bt = 0; bt < B * T; bt++) {
        int64_t b = bt / T, t = bt % T;
        for (int64_t h = 0; h < H; h++) {
            floatX* x = out + (bt * H + h) * D;
            for (int64_t d = 0; d < D; d++) x[d] = 0;
            for (int64_t l = 0, width = 1; l < L; l++, width *= s->pool) {
                int64_t i = (t + 1) / width - 1, r = i < 0 ? -1 : slot[(b * H + h) * E + s->off[l] + i];
                const floatX* y = r >= 0 ? attn + ((b * S + r) * H + h) * D
                                : i < 0 && halo ? halo + ((b * (L - 1) + l - 1) * H + h) * D : NULL;
                for (int64_t d = 0; y && d < D; d++) x[d] += y[d];
            }
        }
    }
}

// halo: the first rows of the dout of the part behind, into which the last entry of each level reaches.
void lighthouse_scatter_backward(floatX* dattn /*(B,S,H,D)*/, const floatX* dout /*(B,T,H,D)*/,
                                 const floatX* halo /*(B,c_{L-1}-1,H,D) or NULL*/, const int32_t* index, int B,
                                 const LighthouseShape* s) {
    int64_t T = s->T, H = s->H, D = s->D, S = s->S, behind = T / s->n[s->levels - 1] - 1;
    #pragma omp parallel for
    for (int64_t br = 0; br < B * S; br++) {
        int64_t b = br / S, r = br % S;
        for (int64_t h = 0; h < H; h++) {
            int64_t i, width;
            entry_level(&i, &width, index[(b * H + h) * S + r], s);
            floatX* x = dattn + (br * H + h) * D;
            for (int64_t d = 0; d < D; d++) x[d] = 0;
            for (int64_t t = (i + 1) * width - 1; t < min64((i + 2) * width - 1, halo ? T + behind : T); t++) {
                const floatX* y = t < T ? dout + (b * T + t) * H * D : halo + (b * behind + t - T) * H * D;
                for (int64_t d = 0; d < D; d++) x[d] += y[h * D + d];
            }
        }
    }
}

// Each token adds, for every level whose entry floor(t/c_l) is in the sequence, that slot's gradient / c_l, with the
// rotation undone.
void lighthouse_gather_backward(floatX* dqkv /*(B,T,3,H,D)*/, const floatX* dslots /*(B,S,3,H,D)*/,
                                const int32_t* slot, const float* rope, int B, const LighthouseShape* s,
                                int64_t t0 /*position of token 0*/, bool add = false /*to what dqkv holds*/) {
    int64_t T = s->T, H = s->H, D = s->D, S = s->S, E = s->off[s->levels];
    #pragma omp parallel
    {
        float* turned = allocate_floats(D);
        #pragma omp for
        for (int64_t bt = 0; bt < B * T; bt++) {
            int64_t b = bt / T, t = bt % T;
            for (int64_t h = 0; h < H; h++) {
                for (int64_t part = 0; part < 3; part++) {
                    floatX* x = dqkv + ((bt * 3 + part) * H + h) * D;
                    for (int64_t d = 0; d < D && !add; d++) x[d] = 0;
                    for (int64_t l = 0, width = 1; l < s->levels; l++, width *= s->pool) {
                        int64_t i = t / width, r = slot[(b * H + h) * E + s->off[l] + i];
                        if (r < 0) continue;
                        memcpy(turned, dslots + (((b * S + r) * 3 + part) * H + h) * D, D * sizeof(float));
                        if (rope && part < 2) rope_turn(turned, rope, t0 + (i + 1) * width - 1, -1, s->D);
                        for (int64_t d = 0; d < D; d++) x[d] += turned[d] / width;
                    }
                }
            }
        }
        free(turned);
    }
}

// ---- Causal Lighthouse ----------------------------------------------------------------------------------------
// Token t of tile i attends, in one softmax, to the tokens of its own tile up to t and to all slots of tiles 0 to i-1.

// The leaves of the selection, tile by tile in sequence order: what was not expanded. slot: of index.
void lighthouse_leaves(int32_t* leaves /*(B,H,S') S' slots of leaf_shape*/, const int32_t* index /*(B,H,S)*/,
                       const int32_t* slot /*(B,H,E)*/, int B, const LighthouseShape* s) {
    for (int64_t r = 0; r < B * s->H * s->S; r++) {
        int64_t i, width, l = entry_level(&i, &width, index[r], s), first = r / s->S * s->off[s->levels];
        bool expanded = l > 0 && slot[first + s->off[l - 1] + i * s->pool] >= 0;  // then its first child is there
        if (!expanded) *leaves++ = index[r];
    }
}

// k of the j-th row that tokens see, v C further: first all slots of the earlier tiles, then the tile's own tokens.
template <typename Real>
static Real* causal_row(Real* qkv, Real* slots, int64_t j, int64_t earlier, int64_t first_token, int64_t C) {
    return (j < earlier ? slots + j * 3 * C : qkv + (first_token + j - earlier) * 3 * C) + C;
}

void causal_forward(floatX* out /*(B,T,H,D)*/, float* stats /*(B,H,T) natural-log logsumexp of what a token sees*/,
                    const floatX* qkv /*(B,T,3,H,D) rotated*/, const floatX* slots /*(B,S',3,H,D)*/, int B,
                    const LighthouseShape* s) {
    int64_t T = s->T, H = s->H, D = s->D, C = H * D, w = T / s->tiles, S = leaf_shape(s).S;
    float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel
    {
        float* p = allocate_floats(S + w);  // logits, then their exponentials
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < B * H * s->tiles; job++) {
            int64_t tile = s->tiles - 1 - job / (B * H), bh = job % (B * H), b = bh / H, h = bh % H;  // longest first
            int64_t earlier = tile * leaf_shape(s).tile_slots;
            const floatX *own = qkv + b * T * 3 * C + h * D, *others = slots + b * S * 3 * C + h * D;
            for (int64_t t = tile * w; t < (tile + 1) * w; t++) {
                int64_t n = earlier + t - tile * w + 1;
                const floatX* q = qkv + (b * T + t) * 3 * C + h * D;
                float top = -INFINITY, sum = 0;
                for (int64_t j = 0; j < n; j++) {
                    const floatX* k = causal_row(own, others, j, earlier, tile * w, C);
                    float dot = 0;
                    #pragma omp simd reduction(+ : dot)
                    for (int64_t d = 0; d < D; d++) dot += q[d] * k[d];
                    p[j] = dot * scale;
                    top = p[j] > top ? p[j] : top;
                }
                #pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < n; j++) {
                    p[j] = exp_fast(p[j] - top);
                    sum += p[j];
                }
                floatX* o = out + (b * T + t) * C + h * D;
                for (int64_t d = 0; d < D; d++) o[d] = 0;
                for (int64_t j = 0; j < n; j++) {
                    const floatX* v = causal_row(own, others, j, earlier, tile * w, C) + C;
                    for (int64_t d = 0; d < D; d++) o[d] += p[j] * v[d];
                }
                for (int64_t d = 0; d < D; d++) o[d] /= sum;
                stats[bh * T + t] = top + std::log(sum);
            }
        }
        free(p);
    }
}

// Writes the gradients of the tokens' q, k and v, of k and v what comes from the own tile, and of the slots (of q
// zeros). A job owns one head of a sequence, since later tiles share the slots.
void causal_backward(floatX* dqkv, floatX* dslots /*(B,S',3,H,D)*/, const floatX* dout, const floatX* qkv,
                     const floatX* slots, const floatX* out, const float* stats, int B, const LighthouseShape* s) {
    int64_t T = s->T, H = s->H, D = s->D, C = H * D, w = T / s->tiles, S = leaf_shape(s).S;
    float scale = 1 / std::sqrt((float)D);
    memset(dqkv, 0, B * T * 3 * C * sizeof(floatX));
    memset(dslots, 0, B * S * 3 * C * sizeof(floatX));
    #pragma omp parallel for schedule(dynamic)
    for (int64_t bh = 0; bh < B * H; bh++) {
        int64_t b = bh / H, h = bh % H, of_tokens = b * T * 3 * C + h * D, of_slots = b * S * 3 * C + h * D;
        for (int64_t t = 0; t < T; t++) {
            int64_t tile = t / w, earlier = tile * leaf_shape(s).tile_slots;
            const floatX *q = qkv + (b * T + t) * 3 * C + h * D, *dy = dout + (b * T + t) * C + h * D;
            const floatX* y = out + (b * T + t) * C + h * D;
            floatX* dq = dqkv + (b * T + t) * 3 * C + h * D;
            float delta = 0;
            #pragma omp simd reduction(+ : delta)
            for (int64_t d = 0; d < D; d++) delta += dy[d] * y[d];
            for (int64_t j = 0; j < earlier + t % w + 1; j++) {
                const floatX* k = causal_row(qkv + of_tokens, slots + of_slots, j, earlier, tile * w, C);
                floatX* dk = causal_row(dqkv + of_tokens, dslots + of_slots, j, earlier, tile * w, C);
                float dot = 0, dp = 0;
                #pragma omp simd reduction(+ : dot, dp)
                for (int64_t d = 0; d < D; d++) {
                    dot += q[d] * k[d];
                    dp += dy[d] * k[C + d];
                }
                float p = std::exp(dot * scale - stats[bh * T + t]), ds = p * (dp - delta) * scale;
                #pragma omp simd
                for (int64_t d = 0; d < D; d++) {
                    dq[d] += ds * k[d];
                    dk[d] += ds * q[d];
                    dk[C + d] += p * dy[d];
                }
            }
        }
    }
}

// ---- context parallelism --------------------------------------------------------------------------------------
// A row of all heads is W blocks of n elements, one block for each process. Packed, all rows of a process's block lie
// together.

void heads_pack(floatX* out /*(B,W,R,n)*/, const floatX* inp /*(B,R,W,n)*/, int B, int64_t R, int W, int n) {
    #pragma omp parallel for
    for (int64_t br = 0; br < B * R; br++) {
        int64_t b = br / R, r = br % R;
        for (int64_t w = 0; w < W; w++)
            memcpy(out + ((b * W + w) * R + r) * n, inp + (br * W + w) * n, n * sizeof(floatX));
    }
}

void heads_unpack(floatX* out /*(B,R,W,n)*/, const floatX* inp /*(B,W,R,n)*/, int B, int64_t R, int W, int n) {
    #pragma omp parallel for
    for (int64_t br = 0; br < B * R; br++) {
        int64_t b = br / R, r = br % R;
        for (int64_t w = 0; w < W; w++)
            memcpy(out + (br * W + w) * n, inp + ((b * W + w) * R + r) * n, n * sizeof(floatX));
    }
}

// ---- sums and the optimizer -----------------------------------------------------------------------------------

// Partial sums over fixed pieces, added in order: the same bits with any number of threads.
static double sum_pieces(const float* x, int64_t n, bool square) {
    const int64_t PIECE = 1 << 16;
    int64_t pieces = (n + PIECE - 1) / PIECE;
    double* partial = (double*)allocate(pieces, sizeof(double));
    #pragma omp parallel for
    for (int64_t j = 0; j < pieces; j++) {
        double sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = j * PIECE; i < min64(n, (j + 1) * PIECE); i++) sum += square ? (double)x[i] * x[i] : x[i];
        partial[j] = sum;
    }
    double total = 0;
    for (int64_t j = 0; j < pieces; j++) total += partial[j];
    free(partial);
    return total;
}
void sum_squares(double* total /*+=*/, const float* x, int64_t n) { *total += sum_pieces(x, n, true); }
void sum_losses(double* total /*+=*/, const float* x, int64_t n) { *total += sum_pieces(x, n, false); }

void adamw_update(floatX* params, float* master /*or NULL: params are fp32*/, float* m, float* v, const float* grads,
                  int64_t n, AdamW a) {
    #pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        float g = grads[i] * a.grad_scale;
        m[i] = a.beta1 * m[i] + (1 - a.beta1) * g;
        v[i] = a.beta2 * v[i] + (1 - a.beta2) * g * g;
        float p = master ? master[i] : (float)params[i];
        p -= a.lr * (m[i] / a.beta1_correction / (std::sqrt(v[i] / a.beta2_correction) + a.eps) + a.weight_decay * p);
        if (master) master[i] = p;
        params[i] = (floatX)p;
    }
}

}  // namespace cpu
#endif
