// Proves that our Lighthouse attention is the authors': against vectors made by their PyTorch release (fp32, no RoPE,
// tile 128), the selection is equal entry by entry, the output and the three gradients to 1e-5 relative l2.
//
//   flags="-std=c++17 -O3 -march=native -fopenmp -DCPU_BACKEND -DUSE_CBLAS"
//   g++ $flags dev/test_golden.cpp -o build/test_golden -lopenblas
//   build/test_golden dev/vectors/*.bin
//
// A file: int32[64] header (20260506, 1, B, N, H, D, L, p, k, S); float32 q, k, v, dout, each (B,N,H,D); int32 index
// (B,H,S); float32 out (B,H,N,D); float32 dq, dk, dv, each (B,N,H,D). Little-endian.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include <vector>

typedef std::vector<float> Floats;
static const double TOLERANCE = 1e-5;  // two fp32 programs that add in different orders differ by a few 1e-7
static int passed = 0, failed = 0;

static void report(bool ok, const char* name, const char* figures) {
    printf("%s %s: %s\n", ok ? "ok  " : "FAIL", name, figures);
    ok ? passed++ : failed++;
}

static void compare(const char* file, const char* array, const Floats& got, const Floats& expected) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        double difference = (double)got[i] - expected[i];
        error += difference * difference;
        norm += (double)expected[i] * expected[i];
    }
    double relative = sqrt(error / norm);
    char name[1024], figures[128];
    snprintf(name, sizeof(name), "%s %s", file, array);
    snprintf(figures, sizeof(figures), "relative l2 %.2e, at most %.0e", relative, TOLERANCE);
    report(relative <= TOLERANCE, name, figures);  // NaN fails
}

static bool read_all(FILE* file, void* into, size_t bytes) { return fread(into, 1, bytes, file) == bytes; }

static void test_file(const char* path) {
    char figures[512];
    FILE* file = fopen(path, "rb");
    if (!file) return report(false, path, "cannot be opened");
    fseek(file, 0, SEEK_END);
    int64_t size = ftell(file);
    rewind(file);
    int32_t header[64];
    if (!read_all(file, header, sizeof(header))) {
        fclose(file);
        return report(false, path, "is shorter than its header of 256 bytes");
    }
    if (header[0] != 20260506 || header[1] != 1) {
        snprintf(figures, sizeof(figures), "begins with %d, %d, not with 20260506, 1", header[0], header[1]);
        fclose(file);
        return report(false, path, figures);
    }
    int B = header[2], H = header[4], D = header[5];
    int64_t T = header[3];
    LighthouseShape s;
    std::string why = "B, N, H and D are at least 1";
    if (B >= 1 && T >= 1 && H >= 1 && D >= 1) why = lighthouse_shape(&s, T, H, D, header[6], header[7], header[8], 128);
    if (why != "") {
        snprintf(figures, sizeof(figures), "B %d, N %d, H %d, D %d is no valid shape: %s", B, header[3], H, D,
                 why.c_str());
        fclose(file);
        return report(false, path, figures);
    }
    size_t tokens = (size_t)B * T, elements = tokens * H * D, indices = (size_t)B * H * s.S;
    int64_t expected_size = sizeof(header) + (8 * elements + indices) * 4;
    if (header[9] != s.S || size != expected_size) {
        snprintf(figures, sizeof(figures), "S %d, %lld bytes; by its header's shape S is %lld, the size %lld bytes",
                 header[9], (long long)size, (long long)s.S, (long long)expected_size);
        fclose(file);
        return report(false, path, figures);
    }
    Floats inputs[4], out_heads(elements), expected[3];  // q, k, v, dout; (B,H,N,D); dq, dk, dv
    std::vector<int32_t> expected_index(indices);
    bool whole = true;
    for (Floats& x : inputs) { x.resize(elements); whole &= read_all(file, x.data(), elements * 4); }
    whole &= read_all(file, expected_index.data(), indices * 4);
    whole &= read_all(file, out_heads.data(), elements * 4);
    for (Floats& x : expected) { x.resize(elements); whole &= read_all(file, x.data(), elements * 4); }
    fclose(file);
    if (!whole) return report(false, path, "cannot be read to its end");

    size_t row = (size_t)H * D, slots = (size_t)B * s.S * row;
    Floats qkv(3 * elements), scores(2 * B * H * s.off[s.levels]), qkv_slots(3 * slots), attn(slots), out(elements);
    Floats stats(indices), dattn(slots), dslots(3 * slots), dqkv(3 * elements);
    std::vector<int32_t> index(indices), slot(B * H * s.off[s.levels]);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t part = 0; part < 3; part++) memcpy(&qkv[(t * 3 + part) * row], &inputs[part][t * row], row * 4);
    }
    lighthouse_scores(scores.data(), qkv.data(), B, &s);
    lighthouse_select(index.data(), scores.data(), B, &s);
    lighthouse_invert(slot.data(), index.data(), B, &s);
    lighthouse_gather(qkv_slots.data(), qkv.data(), index.data(), NULL, B, &s, 0);
    sdpa_forward(attn.data(), stats.data(), qkv_slots.data(), B, s.S, H, D);
    lighthouse_scatter(out.data(), attn.data(), NULL, slot.data(), B, &s);
    lighthouse_scatter_backward(dattn.data(), inputs[3].data(), NULL, index.data(), B, &s);
    sdpa_backward(dslots.data(), dattn.data(), qkv_slots.data(), attn.data(), stats.data(), B, s.S, H, D);
    lighthouse_gather_backward(dqkv.data(), dslots.data(), slot.data(), NULL, B, &s, 0, false);

    size_t differ = 0, first = 0;
    for (size_t i = indices; i-- > 0;) {
        if (index[i] != expected_index[i]) { differ++; first = i; }
    }
    if (differ) {
        snprintf(figures, sizeof(figures), "%zu of %zu differ, the first at %zu: %d, expected %d", differ, indices,
                 first, index[first], expected_index[first]);
    } else {
        snprintf(figures, sizeof(figures), "all %zu equal", indices);
    }
    char name[1024];
    snprintf(name, sizeof(name), "%s index", path);
    report(differ == 0, name, figures);
    Floats expected_out(elements);
    for (size_t b = 0; b < (size_t)B; b++) {
        for (size_t h = 0; h < (size_t)H; h++) {
            for (size_t t = 0; t < (size_t)T; t++) {
                memcpy(&expected_out[((b * T + t) * H + h) * D], &out_heads[((b * H + h) * T + t) * D], D * 4);
            }
        }
    }
    compare(path, "out", out, expected_out);
    const char* gradients[3] = {"dq", "dk", "dv"};
    for (size_t part = 0; part < 3; part++) {
        Floats got(elements);
        for (size_t t = 0; t < tokens; t++) memcpy(&got[t * row], &dqkv[(t * 3 + part) * row], row * 4);
        compare(path, gradients[part], got, expected[part]);
    }
}

int main(int argc, char** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s FILE...\n", argv[0]);
        return 2;
    }
    for (int i = 1; i < argc; i++) test_file(argv[i]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
