// Proves which kinds of attention see the future: one token of a sequence is exchanged, the whole model is computed
// anew, the selection too, and the losses before that token that have changed are counted. There must be none in any
// kind of attention but the published Lighthouse (L), whose selection goes by the norms of later tokens: there, some.
//   make build/test_causality && build/test_causality
// A kind that is added to --attention is tested by its letter alone, and must see nothing unless it is named here.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"

static const char sees_the_future[] = "L";
static int passed = 0, failed = 0;

// Weights large enough that attention is far from uniform: a change is then a change of bits.
static void set_random_weights(Model* m) {
    for (const Piece& p : own_pieces(m)) {
        bool ones = p.tensor == LN1W || p.tensor == LN2W || p.tensor == LNFW;
        float scale = tensor_is_matrix(p.tensor) ? 1 / sqrtf(m->dims.C) : 0.2f;
        std::vector<float> host(p.count);
        for (int64_t i = 0; i < p.count; i++) host[i] = ones + scale * (float)gaussian(1, p.file + i);
        set_weights(m, p, 0, host.data(), p.count);
    }
}

static void losses_of(Model* m, Run r, float* losses) {
    model_trunk(m, m->batch[0].tokens, r);
    model_head(m, m->batch[0].targets, r, 0);
    copy_to_host(losses, m->acts.losses, run_rows(r) * sizeof(float));
}

// Exchanges tokens, one at a time, and counts the losses that changed: before the token, and from it on.
static void test_pattern(const char* pattern) {
    const int T = 256, V = 64, trials = 32;
    Trainer* t = new Trainer();
    Model* m = &t->model;
    char* arguments[] = {(char*)"test_causality", (char*)"--attention", (char*)pattern, (char*)"--seq-len=256",
                         (char*)"--steps=1", (char*)"--switch-step=1.0", (char*)"--window=64", (char*)"--levels=3",
                         (char*)"--pool=2", (char*)"--topk=16", (char*)"--tile=8"};
    parse_options(&t->config, sizeof arguments / sizeof *arguments, arguments);
    int layers = std::max(2, (int)strlen(pattern));
    model_layout(m, {T, V, 128, layers, 2, 64, true, 10000.0f});
    setup_run(t);
    Plan plan = memory_plan(m, &t->config, 0, 0, 1);
    model_allocate(m, &t->config, &plan);
    set_random_weights(m);

    int *tokens = m->batch[0].tokens, before = 0, after = 0;
    for (int i = 0; i < 2 * T; i++) tokens[i] = mix64(i) % V;  // the targets lie behind them; they stay
    Run r = {1, T, FIRST_PHASE, m->window[0]};
    float original[T], changed[T];
    losses_of(m, r, original);
    for (int trial = 0; trial < trials; trial++) {
        int at = mix64(1000 + trial) % T, token = tokens[at];
        tokens[at] = (token + 1 + mix64(2000 + trial) % (V - 1)) % V;
        losses_of(m, r, changed);
        tokens[at] = token;
        for (int i = 0; i < T; i++) (i < at ? before : after) += changed[i] != original[i];
    }
    bool sees = strpbrk(pattern, sees_the_future);
    bool ok = after > trials && (sees ? before > 0 : before == 0);
    printf("%s --attention %s: of %d exchanged tokens, %d losses before them changed (%s), %d from them on\n",
           ok ? "ok  " : "FAIL", pattern, trials, before, sees ? "it sees the future: some must" : "none may", after);
    ok ? passed++ : failed++;
}

int main() {
    device_open(0);
    for (const char* letter = attention_letters; *letter; letter++) test_pattern(text("%c", *letter).c_str());
    for (const char* letter = attention_letters; *letter; letter++) test_pattern(text("DW%c", *letter).c_str());
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
