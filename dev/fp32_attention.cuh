// Causal attention of the trainer's fp32 build, which is for tests: plain kernels, simple and slow. cuDNN's attention,
// which the bf16 build calls, knows no fp32. The trainer includes this file where it would call cuDNN.

static int64_t sdpa_prepare(bool, bool, const SdpaShape&) { return 0; }

// A warp owns one row and walks the others; a lane holds every 32nd dimension.
static const int SDPA_MAX_D = 256;
#define SDPA_EACH_DIM(i, d) for (int i = 0, d = threadIdx.x % 32; i < SDPA_MAX_D / 32; i++, d += 32) if (d < D)

struct SdpaRow {
    bool inside;
    int64_t t, q, k, dq, out, stats, C;  // where its query, its head's keys and so on begin, each in its tensor
};
// Row t of the queries or, with of_keys, of the keys.
__device__ __forceinline__ SdpaRow sdpa_row(const SdpaShape& s, bool of_keys) {
    int64_t row = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32, rows = of_keys ? s.Tk : s.T;
    int64_t t = row % rows, h = row / rows % s.H, b = row / rows / s.H, C = (int64_t)s.H * s.D, head = h * s.D;
    return {row < s.B * s.H * rows, t, b * s.q_step * 3 * C + head, b * s.k_step * 3 * C + head,
            s.cross ? b * s.T * C + head : b * s.q_step * 3 * C + head, b * s.out_step * C + head,
            b * s.stats_step + h * s.stats_head, C};
}

__global__ void sdpa_forward_kernel(float* out, float* stats, const float* q_all, const float* k_all, SdpaShape s) {
    SdpaRow r = sdpa_row(s, false);
    if (!r.inside) return;
    int D = s.D;
    int64_t C = r.C, keys = s.cross ? s.Tk : r.t + 1;
    float q[SDPA_MAX_D / 32], o[SDPA_MAX_D / 32] = {}, top = -INFINITY, sum = 0.0f, scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) q[i] = q_all[r.q + r.t * 3 * C + d] * scale;
    for (int64_t j = 0; j < keys; j++) {
        const float* k = k_all + r.k + j * 3 * C;
        float score = 0.0f;
        SDPA_EACH_DIM(i, d) score += q[i] * k[d];
        score = warp_sum(score);
        float new_top = fmaxf(top, score), shrink = expf(top - new_top), weight = expf(score - new_top);
        top = new_top;
        sum = sum * shrink + weight;
        SDPA_EACH_DIM(i, d) o[i] = o[i] * shrink + weight * k[C + d];
    }
    SDPA_EACH_DIM(i, d) out[r.out + r.t * C + d] = o[i] / sum;
    if (stats && threadIdx.x % 32 == 0) stats[r.stats + r.t] = top + logf(sum);
}

__global__ void sdpa_backward_dq_kernel(float* dq_all, const float* dout, const float* q_all, const float* k_all,
                                        const float* out, const float* stats, SdpaShape s) {
    SdpaRow r = sdpa_row(s, false);
    if (!r.inside) return;
    int D = s.D;
    int64_t C = r.C, keys = s.cross ? s.Tk : r.t + 1;
    float q[SDPA_MAX_D / 32], g[SDPA_MAX_D / 32], dq[SDPA_MAX_D / 32] = {}, dot = 0.0f, scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) {
        q[i] = q_all[r.q + r.t * 3 * C + d] * scale;
        g[i] = dout[r.out + r.t * C + d];
        dot += g[i] * out[r.out + r.t * C + d];
    }
    dot = warp_sum(dot);
    for (int64_t j = 0; j < keys; j++) {
        const float* k = k_all + r.k + j * 3 * C;
        float score = 0.0f, dweight = 0.0f;
        SDPA_EACH_DIM(i, d) { score += q[i] * k[d]; dweight += g[i] * k[C + d]; }
        float ds = expf(warp_sum(score) - stats[r.stats + r.t]) * (warp_sum(dweight) - dot);
        SDPA_EACH_DIM(i, d) dq[i] += ds * k[d];
    }
    SDPA_EACH_DIM(i, d) dq_all[r.dq + r.t * (s.cross ? C : 3 * C) + d] = dq[i] * scale;
}

__global__ void sdpa_backward_dkv_kernel(float* dk_all, const float* dout, const float* q_all, const float* k_all,
                                         const float* out, const float* stats, SdpaShape s) {
    SdpaRow r = sdpa_row(s, true);
    if (!r.inside) return;
    int D = s.D;
    int64_t C = r.C;
    float k[SDPA_MAX_D / 32], v[SDPA_MAX_D / 32], dk[SDPA_MAX_D / 32] = {}, dv[SDPA_MAX_D / 32] = {};
    float scale = 1.0f / sqrtf((float)D);
    SDPA_EACH_DIM(i, d) {
        k[i] = k_all[r.k + r.t * 3 * C + d] * scale;
        v[i] = k_all[r.k + r.t * 3 * C + C + d];
    }
    for (int64_t j = s.cross ? 0 : r.t; j < s.T; j++) {
        const float *q = q_all + r.q + j * 3 * C, *g = dout + r.out + j * C, *o = out + r.out + j * C;
        float score = 0.0f, dweight = 0.0f;  // the weight's gradient less the row's sum: g (v - o)
        SDPA_EACH_DIM(i, d) { score += q[d] * k[i]; dweight += g[d] * (v[i] - o[d]); }
        float weight = expf(warp_sum(score) - stats[r.stats + j]), ds = weight * warp_sum(dweight);
        SDPA_EACH_DIM(i, d) { dk[i] += ds * q[d]; dv[i] += weight * g[d]; }
    }
    SDPA_EACH_DIM(i, d) {
        dk_all[r.k + r.t * 3 * C + d] = dk[i] * scale;
        dk_all[r.k + r.t * 3 * C + C + d] = dv[i];
    }
}

static void sdpa_attend(floatX* out, float* stats, const floatX* q, const floatX* k, const SdpaShape& s) {
    opRequire(s.D <= SDPA_MAX_D, "attention with D = %d: at most %d in fp32", s.D, SDPA_MAX_D);
    LAUNCH(sdpa_forward_kernel, grid_for(s.B * s.H * s.T, 8), 256, out, stats, q, k, s);
}

static void sdpa_attend_backward(floatX* dq, floatX* dk, const floatX* dout, const floatX* q, const floatX* k,
                                 const floatX* out, const float* stats, const SdpaShape& s) {
    opRequire(s.D <= SDPA_MAX_D, "attention with D = %d: at most %d in fp32", s.D, SDPA_MAX_D);
    LAUNCH(sdpa_backward_dq_kernel, grid_for(s.B * s.H * s.T, 8), 256, dq, dout, q, k, out, stats, s);
    LAUNCH(sdpa_backward_dkv_kernel, grid_for(s.B * s.H * s.Tk, 8), 256, dk, dout, q, k, out, stats, s);
}
