// Causal attention of the trainer's fp32 build, which is for tests: plain kernels, simple and slow. cuDNN's attention,
// which the bf16 build calls, knows no fp32. The trainer includes this file where it would call cuDNN.

static int64_t sdpa_prepare(int, int64_t, int, int, bool, bool) { return 0; }

// A warp owns one row and walks the others; a lane holds every 32nd dimension.
static const int SDPA_MAX_D = 256;
#define SDPA_EACH_DIM(i, d) for (int i = 0, d = threadIdx.x % 32; i < SDPA_MAX_D / 32; i++, d += 32) if (d < D)

struct SdpaRow {
    int64_t row, bh, t;   // of (B,H,T); bh counts heads over the batch
    int64_t base, base3;  // where the head begins in a (B,T,H,D) and in a packed (B,T,3,H,D) tensor
};
__device__ __forceinline__ SdpaRow sdpa_row(int64_t T, int H, int D) {
    int64_t row = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32, bh = row / T, C = (int64_t)H * D;
    return {row, bh, row % T, bh / H * T * C + bh % H * D, bh / H * T * 3 * C + bh % H * D};
}

__global__ void sdpa_forward_kernel(float* out, float* stats, const float* qkv, int B, int64_t T, int H, int D) {
    auto [row, bh, t, base, base3] = sdpa_row(T, H, D);
    if (row >= B * H * T) return;
    int64_t C = (int64_t)H * D;
    float q[SDPA_MAX_D / 32], o[SDPA_MAX_D / 32] = {}, top = -INFINITY, sum = 0.0f, scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) q[i] = qkv[base3 + t * 3 * C + d] * scale;
    for (int64_t j = 0; j <= t; j++) {
        const float* k = qkv + base3 + j * 3 * C + C;
        float score = 0.0f;
        SDPA_EACH_DIM(i, d) score += q[i] * k[d];
        score = warp_sum(score);
        float new_top = fmaxf(top, score), shrink = expf(top - new_top), weight = expf(score - new_top);
        top = new_top;
        sum = sum * shrink + weight;
        SDPA_EACH_DIM(i, d) o[i] = o[i] * shrink + weight * k[C + d];
    }
    SDPA_EACH_DIM(i, d) out[base + t * C + d] = o[i] / sum;
    if (stats && threadIdx.x % 32 == 0) stats[row] = top + logf(sum);
}

__global__ void sdpa_backward_dq_kernel(float* dqkv, const float* dout, const float* qkv, const float* out,
                                        const float* stats, int B, int64_t T, int H, int D) {
    auto [row, bh, t, base, base3] = sdpa_row(T, H, D);
    if (row >= B * H * T) return;
    int64_t C = (int64_t)H * D;
    float q[SDPA_MAX_D / 32], g[SDPA_MAX_D / 32], dq[SDPA_MAX_D / 32] = {}, dot = 0.0f, scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) {
        q[i] = qkv[base3 + t * 3 * C + d] * scale;
        g[i] = dout[base + t * C + d];
        dot += g[i] * out[base + t * C + d];
    }
    dot = warp_sum(dot);
    for (int64_t j = 0; j <= t; j++) {
        const float* k = qkv + base3 + j * 3 * C + C;
        float score = 0.0f, dweight = 0.0f;
        SDPA_EACH_DIM(i, d) { score += q[i] * k[d]; dweight += g[i] * k[C + d]; }
        float ds = expf(warp_sum(score) - stats[row]) * (warp_sum(dweight) - dot);
        SDPA_EACH_DIM(i, d) dq[i] += ds * k[d];
    }
    SDPA_EACH_DIM(i, d) dqkv[base3 + t * 3 * C + d] = dq[i] * scale;
}

__global__ void sdpa_backward_dkv_kernel(float* dqkv, const float* dout, const float* qkv, const float* out,
                                         const float* stats, int B, int64_t T, int H, int D) {
    auto [row, bh, t, base, base3] = sdpa_row(T, H, D);
    if (row >= B * H * T) return;
    int64_t C = (int64_t)H * D;
    float k[SDPA_MAX_D / 32], v[SDPA_MAX_D / 32], dk[SDPA_MAX_D / 32] = {}, dv[SDPA_MAX_D / 32] = {};
    float scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) {
        k[i] = qkv[base3 + t * 3 * C + C + d] * scale;
        v[i] = qkv[base3 + t * 3 * C + 2 * C + d];
    }
    for (int64_t j = t; j < T; j++) {
        const float *q = qkv + base3 + j * 3 * C, *g = dout + base + j * C, *o = out + base + j * C;
        float score = 0.0f, dweight = 0.0f;  // the weight's gradient less the row's sum: g (v - o)
        SDPA_EACH_DIM(i, d) { score += q[d] * k[i]; dweight += g[d] * (v[i] - o[d]); }
        float weight = expf(warp_sum(score) - stats[bh * T + j]), ds = weight * warp_sum(dweight);
        SDPA_EACH_DIM(i, d) { dk[i] += ds * q[d]; dv[i] += weight * g[d]; }
    }
    SDPA_EACH_DIM(i, d) {
        dqkv[base3 + t * 3 * C + C + d] = dk[i] * scale;
        dqkv[base3 + t * 3 * C + 2 * C + d] = dv[i];
    }
}

static void sdpa_forward(floatX* out, float* stats, const floatX* qkv, int B, int64_t T, int H, int D) {
    opRequire(D <= SDPA_MAX_D, "attention with D = %d: at most %d in fp32", D, SDPA_MAX_D);
    LAUNCH(sdpa_forward_kernel, grid_for(B * H * T, 8), 256, out, stats, qkv, B, T, H, D);
}

static void sdpa_backward(floatX* dqkv, const floatX* dout, const floatX* qkv, const floatX* out, const float* stats,
                          int B, int64_t T, int H, int D) {
    opRequire(D <= SDPA_MAX_D, "attention with D = %d: at most %d in fp32", D, SDPA_MAX_D);
    LAUNCH(sdpa_backward_dq_kernel, grid_for(B * H * T, 8), 256, dqkv, dout, qkv, out, stats, B, T, H, D);
    LAUNCH(sdpa_backward_dkv_kernel, grid_for(B * H * T, 8), 256, dqkv, dout, qkv, out, stats, B, T, H, D);
}
