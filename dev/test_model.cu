// Proves that the whole model's loss, logits and every gradient, dense and in the first phase, agree with PyTorch's, for every
// recompute level; and that all recompute levels, also mixed, give the same bits. Reference files are made by dev/oracle.py.
//   make build/test_model && build/test_model FILE...
// The bounds are shares of each tensor's norm; the oracle computes in fp64. fp32: 1e-5 on the CPU, 1e-4 on the GPU, whose fast
// exponentials differ more. bf16 rounds weights and activations to 2^-9: 0.03 for dense and window attention; under Lighthouse (L and C) the
// rounding turns close calls of the selection round, so there only the loss is compared, to 1%. With FP8 products, where the
// device has them, e5m2 rounds each gradient to 2^-3, which moves a product's result by 6%: 0.3, and 2% of the loss.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"

#ifdef CPU_BACKEND
static const double BOUND = 1e-5;
#else
static const double BOUND = sizeof(floatX) == 4 ? 1e-4 : 0.03;
#endif
static const char* tensor_name[TENSORS] = {"wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
                                           "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb"};
static int passed = 0, failed = 0;

static void poison(void* p, size_t bytes) {  // NaN: whatever is read must have been written
#ifdef CPU_BACKEND
    memset(p, 0xFF, bytes);
#else
    cudaCheck(cudaMemsetAsync(p, 0xFF, bytes, main_stream));
#endif
}

#ifdef CPU_BACKEND
static const bool backend_is_cpu = true;
static bool has_fp8() { return true; }
#else
static const bool backend_is_cpu = false;
static bool has_fp8() {
    cudaDeviceProp device;
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    return sizeof(floatX) == 2 && 10 * device.major + device.minor >= 89;
}
#endif

static bool same_loss(double mine, double reference) {
    return fabs(mine - reference) < (sizeof(floatX) == 4 ? BOUND : 0.01) * reference;
}

static void check(bool ok, const std::string& name, const std::string& figures) {
    printf("%s %s: %s\n", ok ? "ok  " : "FAIL", name.c_str(), figures.c_str());
    ok ? passed++ : failed++;
}

// ||a - b|| / ||b||; a NaN anywhere makes it NaN, which no bound accepts.
static double relative_error(const float* a, const float* b, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

// Weights in a file's order, to the model.
static void set_all_weights(Model* m, const float* weights) {
    for (const Piece& p : own_pieces(m)) set_weights(m, p, 0, weights + p.file, p.count);
}

// Gradients from the model, in a file's order.
static void get_all_gradients(const Model* m, float* grads) {
    for (int t = 0; t < TENSORS; t++)
        for (int l = 0; l < (tensor_is_stacked(t) ? m->dims.L : 1); l++)
            copy_to_host(grads + m->file_offset[t] + l * layer_size(m, t), gradient(m, t, l), layer_size(m, t) * 4);
}

// FP8's gradients against the CPU's with FP8, tensor by tensor, which differ by bf16's rounding where it turns one of FP8: the CPU
// program writes its beside the reference file, and the GPU program compares. A matrix's gradient averages over all rows; of
// wpe's each row has B terms, and a vector's cancel (up to 0.19 and 0.12 on an H100, matrices up to 0.12).
static void fp8_twin(const Model* m, const char* reference, const float* grads, const char* name) {
    std::string twin_path = text("%s.fp8", reference);
    const char* path = twin_path.c_str();
    size_t bytes = m->parameters * sizeof(float);
    int fd = open(path, backend_is_cpu ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0666);
    if (backend_is_cpu) {
        if (fd < 0 || !write_at(fd, grads, bytes, 0)) fatal("cannot write %s: %s", path, strerror(errno));
    } else if (fd < 0) {
        check(false, text("%s twin", name), text("%s is missing: make build/test_model && build/test_model %s", path, reference));
    } else {
        float* twin = (float*)malloc(bytes);
        read_at(fd, twin, bytes, 0, path);
        double worst[2] = {};
        for (int t = 0; t < TENSORS; t++) {
            bool matrix = tensor_is_matrix(t) && t != WPE;
            double e = m->size[t] ? relative_error(grads + m->file_offset[t], twin + m->file_offset[t], m->size[t]) : 0;
            if (!(e <= worst[matrix])) worst[matrix] = e;
            if (!(e < (matrix ? 0.15 : 0.25))) printf("     gradient of %s differs from the CPU's by %.1e\n", tensor_name[t], e);
        }
        check(worst[true] < 0.15 && worst[false] < 0.25, text("%s twin", name),
              text("from the CPU's with FP8 the worst matrix differs by %.1e, the worst other tensor by %.1e", worst[true], worst[false]));
        free(twin);
    }
    if (fd >= 0) close(fd);
}

static double loss_sum(const Model* m) {
    double sums[2];
    copy_to_host(sums, m->sums, sizeof sums);
    return sums[LOSS_SUM];
}

static void test_file(const char* path) {
    int64_t size;
    int fd = open_to_read(path, &size);
    int h[64];
    read_at(fd, h, sizeof h, 0, path);
    if (h[0] != 20260520 || h[1] != 2) fatal("%s is no reference file of this dev/oracle.py", path);
    Config c;
    char* no_arguments[] = {(char*)"test_model"};
    parse_options(&c, 1, no_arguments);
    c.batch_size = h[2]; c.seq_len = h[3];
    c.levels = h[10]; c.pool = h[11]; c.topk = h[12]; c.tile = h[13];
    int64_t at = sizeof h, B = h[2], T = h[3], N = B * T, V = h[4];
    double reference[3];  // theta, loss in the first phase, loss under dense attention
    read_at(fd, reference, sizeof reference, at, path);
    at += sizeof reference;

    static Model model;
    Model* m = &model;
    memset(m, 0, sizeof *m);
    model_layout(m, {T, h[4], h[5], h[6], h[7], h[8], h[9] == 0, (float)reference[0]});
    char letters[MAX_LAYERS + 1] = {};
    for (int l = 0; l < h[6]; l++) letters[l] = (char)h[15 + l];
    choose_attention(m, letters);
    m->windows = 1;
    m->window[0] = h[14];
    if (uses_slots(m)) end_if(lighthouse_shape(&m->shape, T, h[7], h[8] / h[7], h[10], h[11], h[12], h[13]));
    Plan plan = {};
    size_t activations = 0;  // here every kind of pass runs: room for the largest one's
    int sums = 4 * m->dims.L + 1;
    for (c.fp8 = 0; c.fp8 <= has_fp8(); c.fp8++)
        for (int recompute = 0; recompute < sums; recompute++) {
            plan = memory_plan(m, &c, 0, recompute, (int)B);
            activations = std::max(activations, plan_part(&plan, "activations"));
        }
    c.fp8 = has_fp8();
    for (int i = 0; i < plan.parts; i++)
        if (!strcmp(plan.name[i], "activations")) plan.bytes[i] = activations;
    model_allocate(m, &c, &plan);

    int64_t n = m->parameters;
    float *weights = (float*)malloc(n * 4), *logits[2], *grads[2], *mine = (float*)malloc(n * 4), *first = (float*)malloc(n * 4);
    Batch* batch = &m->batch[0];
    read_at(fd, weights, n * 4, at, path); at += n * 4;
    read_at(fd, batch->tokens, N * 4, at, path); at += N * 4;
    read_at(fd, batch->targets, N * 4, at, path); at += N * 4;
    for (int phase = DENSE_PHASE; phase >= FIRST_PHASE; phase--, at += N * V * 4) read_at(fd, logits[phase] = (float*)malloc(N * V * 4), N * V * 4, at, path);
    for (int phase = FIRST_PHASE; phase <= DENSE_PHASE; phase++, at += n * 4) read_at(fd, grads[phase] = (float*)malloc(n * 4), n * 4, at, path);
    if (at != size) fatal("%s: %ld bytes, %ld were expected", path, size, at);
    close(fd);
    set_all_weights(m, weights);
    fp8_weights_update(m);

    for (int phase = FIRST_PHASE; phase <= DENSE_PHASE; phase++) {
        const char* kind = phase == FIRST_PHASE ? m->pattern : "dense";
        Run eval = {(int)B, T, (Phase)phase, m->window[0], false, 0};
        float* out = (float*)malloc(N * V * 4);
        device_zero(m->sums, 2 * sizeof(double));
        model_trunk(m, batch->tokens, eval);
        for (int64_t i = 0; i < N; i++) model_logits(m, i / T, i % T, eval, out + i * V);
        double error = relative_error(out, logits[phase], N * V);
        model_head(m, batch->targets, eval, 0);
        double loss = loss_sum(m) / N;
        bool selects = phase == FIRST_PHASE && uses_slots(m), compare = sizeof(floatX) == 4 || !selects;
        check((error < BOUND || !compare) && same_loss(loss, reference[1 + phase]), text("%s %s forward", path, kind),
              text("loss %.6f, PyTorch %.6f; logits differ by %.1e", loss, reference[1 + phase], error));
        free(out);
        // A micro-step over rubbish in the activations; leaves its loss and, in mine, its gradients. With r.first the
        // gradients are begun as a step begins them, over rubbish too.
        auto micro_step = [&](Run r) {
            poison(m->arena.base, plan_part(&plan, "activations"));
            device_zero(m->grads, m->padded * 4);
            if (r.first) {
                poison(m->grads, m->padded * 4);
                begin_gradients(m);
            }
            device_zero(m->sums, 2 * sizeof(double));
            model_micro_step(m, batch, r, 1.0f / N);
            loss = loss_sum(m) / N;
            get_all_gradients(m, mine);
        };
        for (int pass = 0; pass < sums * (1 + c.fp8); pass++) {  // every sum of levels, then again with FP8
            int recompute = pass % sums;
            bool fp8 = pass >= sums;
            std::string twin = text("%s %s%s", path, kind, fp8 ? " FP8" : "");
            const char* name = twin.c_str();
            double bound = fp8 ? 0.3 : BOUND, loss_bound = fp8 ? 0.02 * reference[1 + phase] : 0;
            micro_step({(int)B, T, (Phase)phase, m->window[0], true, recompute, fp8, recompute > 0});
            if (recompute == 0) {
                double worst = 0;
                bool compare_gradients = compare && !(fp8 && selects);
                for (int t = 0; t < TENSORS; t++) {
                    if (m->size[t] == 0) continue;
                    double e = relative_error(mine + m->file_offset[t], grads[phase] + m->file_offset[t], m->size[t]);
                    if (!(e <= worst)) worst = e;
                    if (!(e < bound) && compare_gradients) printf("     gradient of %s differs by %.1e\n", tensor_name[t], e);
                }
                bool same = same_loss(loss, reference[1 + phase]) || fabs(loss - reference[1 + phase]) < loss_bound;
                check((worst < bound || !compare_gradients) && same, text("%s gradients", name),
                      text("loss %.6f; the worst of %d tensors differs by %.1e", loss, m->dims.rope ? TENSORS - 1 : TENSORS, worst));
                if (fp8 && phase == DENSE_PHASE) fp8_twin(m, path, mine, name);
                memcpy(first, mine, n * 4);
            } else {
                check(!memcmp(first, mine, n * 4), text("%s recompute %.3g", name, (double)recompute / m->dims.L), "same bits as recompute 0");
            }
        }
        // The head in chunks of 128 rows, whose gradients add up; above it had all rows in one.
        int64_t usual = head_chunk_bytes;
        head_chunk_bytes = 1;
        micro_step({(int)B, T, (Phase)phase, m->window[0], true, 0, false, true});
        error = relative_error(mine, grads[phase], m->size[WTE]);
        check(head_rows(m, N) < N && same_loss(loss, reference[1 + phase]) && (error < BOUND || !compare),
              text("%s %s head in %lld chunks", path, kind, (long long)ceil_div(N, head_rows(m, N))),
              text("loss %.6f; WTE's gradient differs by %.1e", loss, error));
        head_chunk_bytes = usual;
    }
}

int main(int argc, char** argv) {
    if (argc < 2) fatal("usage: %s FILE...: reference files made by dev/oracle.py", argv[0]);
    device_open(0);
#ifndef CPU_BACKEND
    sdpa_deterministic = true;
#endif
    for (int i = 1; i < argc; i++) test_file(argv[i]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
