// Proves the small parts of the trainer that a whole run does not show one by one: the permutation of an epoch, the sequences
// of the loader, the detector of outliers, the tokenizer's encoder, JSON strings, the checksum, the random numbers.
//   make build/test_units && build/test_units
// or  g++ -x c++ -std=c++17 -O2 -fopenmp -DCPU_BACKEND dev/test_units.cu -o build/test_units
// With an argument it serves dev/test_trainer.py: `options` prints the table of options, `encode TOKENIZER` the token ids of
// each line of standard input (with \n, \t and \\ escaped), `json` standard input as a JSON string.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#include <vector>

static int passed = 0, failed = 0;

static void check(bool ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf(ok ? "ok   " : "FAIL ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    ok ? passed++ : failed++;
}

// ---- the permutation

// Every n: each of 0..n-1 exactly once, in every epoch; from 16 sequences on no two epochs, and no two seeds, agree.
static void test_permutation() {
    const int64_t sizes[] = {1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 100, 1000, 1023, 1024, 1025, 4096, 4097, 100003};
    for (int64_t n : sizes) {
        const int epochs = 4;
        int64_t* order = (int64_t*)malloc(epochs * n * sizeof(int64_t));
        char* seen = (char*)malloc(n);
        bool once = true, differ = true;
        for (int e = 0; e < epochs; e++) {
            memset(seen, 0, n);
            for (int64_t i = 0; i < n; i++) {
                int64_t x = permute(i, n, mix64(1337) ^ (uint64_t)e);
                order[e * n + i] = x;
                if (x < 0 || x >= n || seen[x]++) once = false;
            }
            for (int f = 0; f < e; f++) differ &= memcmp(order + e * n, order + f * n, n * sizeof(int64_t)) != 0;
        }
        check(once, "permutation of %lld: each index once in each of %d epochs", (long long)n, epochs);
        if (n >= 16) check(differ, "permutation of %lld: another order in every epoch", (long long)n);
        free(order); free(seen);
    }
    // Mixed well: neighbours end up far apart. The mean distance of two independent places is n/3; a lazy cipher gives less.
    const int64_t n = 10000;
    double distance = 0, displacement = 0;
    for (int64_t i = 0; i + 1 < n; i++) {
        distance += llabs(permute(i + 1, n, mix64(7)) - permute(i, n, mix64(7))) / (double)(n - 1);
        displacement += llabs(permute(i, n, mix64(7)) - i) / (double)n;
    }
    check(fabs(distance * 3 / n - 1) < 0.1, "permutation: mean distance of neighbours %.0f, of random places %.0f", distance, n / 3.0);
    check(fabs(displacement * 3 / n - 1) < 0.1, "permutation: mean displacement %.0f, of random places %.0f", displacement, n / 3.0);
    int64_t large = (1ll << 40) + 12345, x = permute(large - 1, large, 99);
    check(x >= 0 && x < large, "permutation of 2^40 + 12345 stays inside");
}

// ---- the loader

// A shard whose token at place i is (base + i) mod 251: a sequence's first token tells where it began.
static void write_shard(const char* path, int64_t tokens, int base, int width) {
    FILE* f = fopen(path, "wb");
    if (!f) fatal("cannot write %s", path);
    int32_t header[256] = {width == 2 ? 20240520 : 20240801, width == 2 ? 1 : 7, (int32_t)tokens};
    fwrite(header, 4, 256, f);
    for (int64_t i = 0; i < tokens; i++) {
        uint32_t id = (uint32_t)((base + i) % 251);
        fwrite(&id, width, 1, f);
    }
    fclose(f);
}

static void test_loader() {
    char dir[] = "/tmp/test_units_XXXXXX";
    if (!mkdtemp(dir)) fatal("cannot make a directory in /tmp");
    const int64_t T = 10;
    // 5, 0 (too short), 1 (exactly one sequence) and 3 sequences; bases 0, 60, 100, 200
    std::string path[4];
    int64_t tokens[4] = {5 * T + 1 + 3, T, T + 1, 3 * T + 1};
    int base[4] = {0, 60, 100, 200}, width[4] = {2, 2, 4, 2};
    for (int i = 0; i < 4; i++) {
        path[i] = text("%s/train_%06d.bin", dir, i);
        write_shard(path[i].c_str(), tokens[i], base[i], width[i]);
    }
    std::string files = text("%s/train_*.bin", dir);
    const char* pattern = files.c_str();
    int starts[9] = {0, 10, 20, 30, 40, 100, 200, 210, 220};
    Loader d;
    loader_init(&d, pattern, T, false, 1);
    check(d.sequences == 9, "loader: 9 sequences in shards of 54, 10, 11 and 31 tokens at T = 10 (%lld)", (long long)d.sequences);
    bool order = true, shifted = true, shared = true;
    int inputs[T], targets[T], last_target = -1;
    for (int64_t i = 0; i < 27; i++) {  // three epochs
        loader_sequence(&d, i, inputs, targets);
        order &= inputs[0] == starts[i % 9];
        for (int t = 0; t < T; t++) shifted &= inputs[t] == (starts[i % 9] + t) % 251 && targets[t] == (starts[i % 9] + t + 1) % 251;
        int w = i % 9;
        if (w > 0 && w != 5 && w != 6) shared &= inputs[0] == last_target;  // sequences of one shard share one token
        last_target = targets[T - 1];
    }
    check(order, "loader: without shuffling the sequences come in the order of the shards, the same in every epoch");
    check(shifted, "loader: targets are the inputs one token on");
    check(shared, "loader: a sequence's last target is the next one's first input, and nothing else is shared");
    bool slices = true;
    for (int cp : {2, 5}) {  // each process of a group reads its part
        for (int rank = 0; rank < cp; rank++) {
            procs.cp = cp;
            procs.cp_rank = rank;
            loader_sequence(&d, 5, inputs, targets);
            for (int t = 0, at = 100 + rank * T / cp; t < T / cp; t++)
                slices &= inputs[t] == (at + t) % 251 && targets[t] == (at + t + 1) % 251;
        }
    }
    procs.cp = 1;
    procs.cp_rank = 0;
    check(slices, "loader: the slices of 2 and of 5 processes are the sequence");

    loader_init(&d, pattern, T, true, 1);
    bool once = true;
    int first[4][9], differ = 0;
    for (int e = 0; e < 4; e++) {
        int seen[9] = {0};
        for (int i = 0; i < 9; i++) {
            loader_sequence(&d, e * 9 + i, inputs, targets);
            first[e][i] = inputs[0];
            for (int w = 0; w < 9; w++) seen[w] += inputs[0] == starts[w] && targets[T - 1] == (starts[w] + T) % 251;
        }
        for (int w = 0; w < 9; w++) once &= seen[w] == 1;
        if (e) differ += memcmp(first[e], first[e - 1], sizeof first[e]) != 0;
    }
    check(once, "loader: with shuffling every epoch visits every sequence of every shard exactly once");
    check(differ == 3, "loader: with shuffling the epochs' orders differ");
    Loader other;
    loader_init(&d, pattern, T, true, 1);
    loader_init(&other, pattern, T, true, 2);
    int a[T], seeds_differ = 0;
    for (int i = 0; i < 9; i++) {
        loader_sequence(&d, i, inputs, targets);
        loader_sequence(&other, i, a, targets);
        seeds_differ += a[0] != inputs[0];
    }
    check(seeds_differ > 0, "loader: another seed, another order");
    // Ids up to the largest of each width.
    for (int wide : {0, 1}) {
        const uint32_t largest = wide ? (1u << 24) - 1 : 65535;
        write_shard(path[0].c_str(), T + 1, 0, wide ? 4 : 2);
        int fd = open(path[0].c_str(), O_WRONLY);
        if (pwrite(fd, &largest, wide ? 4 : 2, 1024) < 0) fatal("cannot write %s", path[0].c_str());
        close(fd);
        loader_init(&d, path[0].c_str(), T, false, 1);
        loader_sequence(&d, 0, inputs, targets);
        check(inputs[0] == (int)largest && inputs[1] == 1, "loader: id %u is read from a shard of %d bits", largest, wide ? 32 : 16);
        d.vocab = largest + 1;
        loader_sequence(&d, 0, inputs, targets);  // which ends here if it takes the id for one too large
    }
    for (int i = 0; i < 4; i++) unlink(path[i].c_str());
    rmdir(dir);
}

// Another token in any of a few sequences, or in the last of many, is other data.
static void test_fingerprint() {
    char path[] = "/tmp/test_units_XXXXXX";
    close(mkstemp(path));
    const int64_t T = 4;
    auto of = [&](int64_t sequences, int64_t first, int64_t end, int64_t t = 0) {  // of which these have another token t
        write_shard(path, sequences * T + 1, 0, 2);
        int fd = open(path, O_WRONLY);
        uint16_t other = 300;
        for (int64_t w = first; w < end; w++)
            if (pwrite(fd, &other, 2, 1024 + (w * T + t) * 2) != 2) fatal("cannot write %s", path);
        close(fd);
        Loader d;
        loader_init(&d, path, T, false, 1);
        return loader_fingerprint(&d);
    };
    bool noticed = true;
    for (int64_t w = 0; w < 9; w++)
        for (int64_t t = 0; t < T; t++) noticed &= of(9, w, w + 1, t) != of(9, 0, 0);
    check(noticed, "fingerprint: another token in any of 9 sequences is noticed");
    check(of(5000, 4995, 5000) != of(5000, 0, 0), "fingerprint: and in the last thousandth of many");
    unlink(path);
}

// ---- the detector

static void test_detector() {
    static Detector d;
    memset(&d, 0, sizeof d);
    bool silent = true;
    for (int i = 0; i < 128; i++) silent &= detector_score(&d, i == 50 ? 1e6 : i % 2 ? 1.0 : -1.0) == 0;
    check(silent, "detector: no score before 128 values are seen, whatever they are");
    memset(&d, 0, sizeof d);
    for (int i = 0; i < 128; i++) detector_score(&d, i % 2 ? 1.0 : -1.0);  // mean 0, deviation 1
    double z = detector_score(&d, 5.0);
    check(fabs(z - 5) < 1e-9, "detector: 5 deviations above the mean score 5 (%.9f)", z);
    double mean = 6.0 / 128, var = 0;  // a -1 made room for the 5
    for (int i = 0; i < 128; i++) {
        double x = i == 0 ? 5 : i % 2 ? 1 : -1;
        var += (x - mean) * (x - mean) / 128;
    }
    z = detector_score(&d, -3.0);
    check(fabs(z - (-3 - mean) / sqrt(var)) < 1e-9, "detector: the newest value has replaced the oldest, and low values score below 0 (%.6f)", z);
    z = detector_score(&d, NAN);
    int64_t seen = d.seen;
    detector_score(&d, INFINITY);
    check(d.seen == seen, "detector: values that are not finite do not join");
    z = detector_score(&d, 1.0);
    check(isfinite(z), "detector: and leave no trace in the next score (%.3f)", z);
    memset(&d, 0, sizeof d);
    for (int i = 0; i < 128; i++) detector_score(&d, 2.0);
    z = detector_score(&d, 2.0);
    check(z == 0, "detector: a constant row scores its own value 0 (%.3g)", z);
}

// ---- learning rates at the ends of the run; dev/test_trainer.py compares every step of whole runs

static void test_schedules() {
    Config c;
    char* arguments[] = {(char*)"test"};
    const char* names[] = {"cosine", "linear", "constant", "wsd"};
    for (const char* name : names) {
        parse_options(&c, 1, arguments);
        c.lr_schedule = name;
        c.learning_rate = 0.5; c.final_lr_frac = 0.25; c.warmup_steps = 10;
        bool falls = true, bounded = true;
        for (int64_t s = 0; s < 100; s++) {
            double lr = learning_rate(&c, s, 100);
            bounded &= lr > 0 && lr <= 0.5 && (s < 10 || lr >= 0.125);
            if (s > 10) falls &= lr <= learning_rate(&c, s - 1, 100);
        }
        check(bounded && falls, "schedule %s: within its bounds, never rising after the warmup", name);
        check(fabs(learning_rate(&c, 0, 100) - 0.05) < 1e-12 && fabs(learning_rate(&c, 9, 100) - 0.5) < 1e-12,
              "schedule %s: the warmup goes from 1/10 to the peak in 10 steps", name);
        double end = learning_rate(&c, 100, 100);
        check(fabs(end - (strcmp(name, "constant") ? 0.125 : 0.5)) < 1e-12, "schedule %s: reaches its final rate (%.3f)",
              name, end);
    }
}

// ---- options: each has a field of its own, and no field is without

static void test_options() {
    std::vector<bool> taken(sizeof(Config) / 8);  // every field has 8 bytes
    bool apart = sizeof(Config) == option_count * 8;
    for (const Option& o : options) {
        apart &= o.offset % 8 == 0 && !taken[o.offset / 8];
        taken[o.offset / 8] = true;
    }
    check(apart, "%d options have as many fields, one each", option_count);
}

// ---- the tokenizer

static void test_words() {
    struct { const char* text; int length; } cases[] = {
        {"the cat", 3}, {" the", 4}, {"  the", 1}, {"   ", 3}, {" ", 1}, {"\n\nx", 1}, {"\n", 1}, {"\nx", 1}, {" \n x", 2},
        {"it's", 2}, {"'s", 2}, {"'ll go", 3}, {"'x", 1}, {" 's", 2}, {"''s", 2}, {"12ab", 2}, {" 12ab", 3}, {"ab12", 2}, {"!?a", 2},
        {" !?a", 3}, {"a!", 1},
        {"'t", 2}, {"'rex", 3}, {"'ve", 3}, {"'m", 2}, {"'llx", 3}, {"'d", 2}, {"'r", 1}, {"'v e", 1}, {"'l", 1}, {"'e", 1},
        {"'S", 1}, {" 'll", 2}, {"caf\xC3\xA9 x", 5}, {"\xC3\xA9t\xC3\xA9.", 5}, {"_x", 1}};
    for (auto& c : cases) {
        int n = word_length(c.text);
        check(n == c.length, "first word of %s: %d bytes (%d)", json_string(c.text).c_str(), c.length, n);
    }
}

// ---- sampling

// Chances at every 1/4096 against what top-k and the temperature say: shares of the softmax, written out.
static void test_draws() {
    const int V = 50, N = 4096;
    float logits[V], sorted[V];
    for (int v = 0; v < V; v++) logits[v] = (float)(4 * uniform(3, v));
    for (int64_t k : {0, 1, 2, 7, V - 1, V, 2 * V})
        for (double temperature : {0.25, 1.0, 3.0}) {
            double share[V], sum = 0;
            int drawn[V] = {0}, kept = 0;
            for (int v = 0; v < V; v++) {
                int above = 0;
                for (int u = 0; u < V; u++) above += logits[u] > logits[v];
                share[v] = k == 0 || above < k ? exp(logits[v] / temperature) : 0;
                sum += share[v];
                kept += share[v] > 0;
            }
            for (int i = 0; i < N; i++) drawn[draw_token(logits, sorted, V, k, temperature, (i + 0.5) / N)]++;
            double worst = 0;
            bool within = kept == (k == 0 ? V : std::min<int64_t>(k, V));
            for (int v = 0; v < V; v++) {
                worst = std::max(worst, fabs(drawn[v] - N * share[v] / sum));
                within &= share[v] > 0 || drawn[v] == 0;
            }
            check(within && worst < 1.01, "draws: top %ld at temperature %g (the worst token is %.2f of %d off)", (long)k, temperature, worst, N);
        }
    for (int v = 0; v < V; v++) logits[v] = NAN;
    int next = draw_token(logits, sorted, V, 7, 1, 0.5);
    check(next >= 0 && next < V, "draws: of a model that is lost, some token");
}

// ---- JSON strings

static void test_json() {
    struct { const char *in, *out; } cases[] = {
        {"", "\"\""}, {"plain", "\"plain\""}, {"\"\\", "\"\\\"\\\\\""}, {"\n\t\x01\x7F", "\"\\u000a\\u0009\\u0001\\u007f\""},
        {"\xC3\xA9", "\"\xC3\xA9\""}, {"\xE2\x82\xAC", "\"\xE2\x82\xAC\""}, {"\xF0\x9F\x98\x80", "\"\xF0\x9F\x98\x80\""},
        {"\x80", "\"\\ufffd\""}, {"\xC3", "\"\\ufffd\""}, {"\xC3(", "\"\\ufffd(\""}, {"\xE2\x82", "\"\\ufffd\\ufffd\""},
        {"\xC0\x80", "\"\\ufffd\\ufffd\""}, {"\xED\xA0\x80", "\"\\ufffd\\ufffd\\ufffd\""}, {"\xF5\x80", "\"\\ufffd\\ufffd\""},
        {"\xF4\x90\x80\x80", "\"\\ufffd\\ufffd\\ufffd\\ufffd\""}, {"\xF0\x8F\xBF\xBF", "\"\\ufffd\\ufffd\\ufffd\\ufffd\""},
        {"\xE0\x80\xAF", "\"\\ufffd\\ufffd\\ufffd\""}};
    for (auto& c : cases) {
        std::string s = json_string(c.in);
        check(s == c.out, "JSON %s (%s)", c.out, s.c_str());
    }
}

// ---- operations of a step, from the sizes: 2 a multiply-add, forward once and backward twice, half of the attention square

static void test_flops() {
    static Model m;
    const int L = 5, C = 32, T = 256;
    model_layout(&m, {T, 300, 384, L, 4, C, true, 10000});
    m.shape.S = 96;
    choose_attention(&m, "DLLDW");
    double matrices = 2.0 * (L * (C * 3 * C + C * C + C * 4 * C + 4 * C * C) + C * 384), tokens = 3 * T;  // the head last
    auto attention = [&](double rows) { return 2 * (2 * rows * rows * C) / 2; };  // scores, and their products with v
    double dense = 3 * (matrices * tokens + L * 3 * attention(T));
    double windows = 2 * attention(100) + attention(56);  // T = 256 in windows of 100
    double first = 3 * (matrices * tokens + 2 * 3 * attention(T) + 2 * 3 * attention(96) + 3 * windows);
    double got = step_flops(&m, DENSE_PHASE, 0, T, tokens);
    check(fabs(got / dense - 1) < 1e-12, "operations of a dense step: %.6g (%.6g)", dense, got);
    got = step_flops(&m, FIRST_PHASE, 100, T, tokens);
    check(fabs(got / first - 1) < 1e-12, "operations of a step of two dense, two Lighthouse and a window layer: %.6g (%.6g)", first, got);
    end_if(lighthouse_shape(&m.shape, T, 4, 8, 3, 2, 32, 8));  // 4 tiles of 64 tokens, each with 16 + 8 + 8 leaves
    choose_attention(&m, "DC");
    double pairs = 0;
    for (int tile = 0; tile < 4; tile++) pairs += 64 * (64 / 2 + 32 * tile);  // its own tokens, the leaves of those before
    first = 3 * (matrices * tokens + 3 * 3 * attention(T) + 2 * 3 * 4 * C * pairs);
    got = step_flops(&m, FIRST_PHASE, 0, T, tokens);
    check(fabs(got / first - 1) < 1e-12, "operations of a step of three dense and two Causal Lighthouse layers: %.6g (%.6g)",
          first, got);
}

// Of 100 steps the first 60 have one dense layer and one of Lighthouse.
static void test_seconds_left() {
    static Trainer t;
    const int T = 256;
    Model* m = &t.model;
    model_layout(m, {T, 300, 384, 2, 4, 32, true, 10000});
    m->shape.S = 96;
    choose_attention(m, "DL");
    m->windows = 1; m->window[0] = T;
    t.config.seq_len = T; t.config.total_batch_size = 3 * T;
    t.steps = 100; t.switch_step = 60;
    double ratio = step_flops(m, DENSE_PHASE, 0, T, 3 * T) / step_flops(m, FIRST_PHASE, T, T, 3 * T);
    auto left = [&](int64_t first, double first_s, int64_t dense, double dense_s) {
        t.state.step = first + dense;
        t.state.phase_steps[FIRST_PHASE] = first; t.state.phase_steps[DENSE_PHASE] = dense;
        t.state.phase_s[FIRST_PHASE] = first_s; t.state.phase_s[DENSE_PHASE] = dense_s;
        return seconds_left(&t, dense ? DENSE_PHASE : FIRST_PHASE, T);
    };
    auto is = [](double x, double expected) { return fabs(x - expected) < 1e-9 * (1 + expected); };
    check(is(left(10, 5, 0, 0), 50 * 0.5 + 40 * 0.5 * ratio), "time left: a phase not yet seen is taken at the other's rate of operations");
    check(is(left(60, 30, 20, 24), 20 * 1.2) && is(left(60, 30, 40, 48), 0), "time left: behind the switch, and at the end");
    t.switch_step = 0;
    check(is(left(0, 0, 5, 10), 95 * 2), "time left: of a dense run");
    t.switch_step = 100;
    check(is(left(25, 50, 0, 0), 75 * 2), "time left: of a run without a dense phase");
}

static void test_durations() {
    struct { double seconds; const char* text; } cases[] = {
        {0, "0:00:00"}, {59.4, "0:00:59"}, {59.6, "0:01:00"}, {3725, "1:02:05"}, {86399, "23:59:59"}, {86400, "1d00h"},
        {3 * 86400 + 7 * 3600 + 3599, "3d07h"}};
    for (auto& c : cases)
        check(duration(c.seconds) == c.text, "%.9g s are %s (%s)", c.seconds, c.text, duration(c.seconds).c_str());
}

// ---- checksum, random numbers

static void test_checksum() {
    unsigned char data[83];
    for (int i = 0; i < 83; i++) data[i] = (unsigned char)mix64(i);
    uint64_t whole = checksum(data, 83);
    bool noticed = true;
    for (int i = 0; i < 83 * 8; i++) {
        data[i / 8] ^= 1 << i % 8;
        noticed &= checksum(data, 83) != whole;
        data[i / 8] ^= 1 << i % 8;
    }
    check(noticed, "checksum: every flipped bit of 83 bytes is noticed");
    bool lengths = true;
    memset(data, 0, sizeof data);
    for (int n = 1; n <= 83; n++) lengths &= checksum(data, n) != checksum(data, n - 1);
    check(lengths, "checksum: of zeros of every length differs from one byte less");
}

// The sums of a checkpoint's chunks: a body written in parts, in any order, by any process.
static void test_sums() {
    const int64_t bytes = CHUNK + 4096;  // two chunks
    char* data = (char*)malloc(bytes);
    for (int64_t i = 0; i < bytes / 8; i++) ((uint64_t*)data)[i] = mix64(i);
    uint64_t whole[2] = {0, 0}, parts[2] = {0, 0};
    add_to_sums(whole, data, 0, bytes);
    const int64_t cut[] = {0, 4, 400, CHUNK - 8, CHUNK + 12, bytes};
    for (int i = 4; i >= 0; i--) add_to_sums(parts, data + cut[i], cut[i], cut[i + 1] - cut[i]);
    check(whole[0] == parts[0] && whole[1] == parts[1], "chunk sums: of parts, last part first, are those of the whole");
    bool noticed = true;
    for (int i = 0; i < 32 * 1024; i++) {
        data[CHUNK + i / 8] ^= 1 << i % 8;
        uint64_t sums[2] = {0, 0};
        add_to_sums(sums, data + CHUNK, CHUNK, 4096);
        noticed &= sums[0] == 0 && sums[1] != whole[1];
        data[CHUNK + i / 8] ^= 1 << i % 8;
    }
    check(noticed, "chunk sums: every flipped bit of 4096 bytes is noticed, in its chunk only");
    std::swap(((uint32_t*)data)[0], ((uint32_t*)data)[1]);
    uint64_t swapped[2] = {0, 0};
    add_to_sums(swapped, data, 0, bytes);
    check(swapped[0] != whole[0], "chunk sums: two exchanged words are noticed");
    free(data);
}

// ---- the parameters' layout

static void test_layout() {
    Processes before = procs;
    const Dims shapes[] = {{64, 257, 384, 3, 2, 16, true, 1e4f}, {100, 300, 384, 2, 3, 48, false, 0},
                           {64, 131, 131, 1, 1, 6, true, 1e4f}};
    for (const Dims& d : shapes) {
        for (int world : {1, 2, 3, 4, 7, 64}) {
            procs.world = world;
            static Model m;
            model_layout(&m, d);
            char* seen = (char*)malloc(m.parameters);
            memset(seen, 0, m.parameters);
            bool inside = true, same_place = true, aligned = m.owned * world == m.padded, decayed = true;
            for (procs.rank = 0; procs.rank < world; procs.rank++) {
                for (const Piece& p : own_pieces(&m)) {
                    inside &= p.owned >= 0 && p.owned + p.count <= m.owned && p.memory + p.count <= m.padded;
                    for (int64_t i = 0; i < p.count; i++) seen[p.file + i]++;
                    int64_t size = layer_size(&m, p.tensor), element = p.file - m.file_offset[p.tensor];
                    int l = (int)(element / size);
                    same_place &= p.memory == layer_offset(&m, p.tensor, l) + element % size;
                    int u = tensor_is_stacked(p.tensor) ? 1 + l : 0;
                    decayed &= tensor_is_matrix(p.tensor) ==
                               (p.memory - unit_begin(&m, u) < m.unit_matrices[u > 0]);
                    same_place &= p.memory - slice_begin(&m, u) == p.owned - slice_owned(&m, u);
                }
            }
            for (int t = 0; t < TENSORS; t++)
                for (int l = 0; l < d.L; l++) aligned &= layer_offset(&m, t, l) % 128 == 0;
            int once = 0;
            for (int64_t i = 0; i < m.parameters; i++) once += seen[i] == 1;
            check(once == m.parameters && inside, "layout of %ld parameters on %d processes: every one has one owner", m.parameters,
                  world);
            check(same_place && aligned && decayed, "layout of %ld parameters on %d processes: slices, tensors and matrices begin where they "
                  "should", m.parameters, world);
            free(seen);
        }
    }
    procs = before;
}

static void test_random() {
    const int n = 200000;
    double mean = 0, var = 0, fourth = 0, lowest = 1, highest = 0, u = 0;
    for (int i = 0; i < n; i++) {
        double g = gaussian(1337, i), x = uniform(1337, i);
        mean += g / n; var += g * g / n; fourth += g * g * g * g / n;
        u += x / n;
        lowest = fmin(lowest, x); highest = fmax(highest, x);
    }
    // four standard errors each
    check(fabs(mean) < 4 / sqrt(n), "gaussian: mean %.5f", mean);
    check(fabs(var - 1) < 4 * sqrt(2.0 / n), "gaussian: variance %.5f", var);
    check(fabs(fourth - 3) < 4 * sqrt(96.0 / n), "gaussian: fourth moment %.4f, a normal's is 3", fourth);
    check(fabs(u - 0.5) < 4 / sqrt(12.0 * n) && lowest > 0 && highest < 1, "uniform: mean %.5f, inside (0, 1)", u);
}

// ---- what dev/test_trainer.py asks for

static int print_options() {
    for (int i = 0; i < option_count; i++) {
        const Option* o = &options[i];
        const char* types[] = {"int", "real", "text"};
        printf("%s\t%s\t%s\t%.17g\t%.17g\t%s\n", o->name, o->letter, types[o->type], o->min, o->max, o->fallback);
    }
    return 0;
}

static int print_encoded(const char* path) {
    Tokenizer k;
    tokenizer_read(&k, path, 1 << 24);
    char* line = NULL;
    size_t room = 0;
    for (ssize_t n; (n = getline(&line, &room, stdin)) > 0;) {
        char *w = line, *r = line, *end = line + n;
        if (end[-1] == '\n') end--;
        while (r < end) {
            if (*r != '\\') { *w++ = *r++; continue; }
            *w++ = r[1] == 'n' ? '\n' : r[1] == 't' ? '\t' : r[1];
            r += 2;
        }
        *w = 0;
        std::vector<int> ids = tokenizer_encode(&k, line);
        bool none = std::count(ids.begin(), ids.end(), -1);
        for (size_t i = 0; i < ids.size() && !none; i++) printf("%s%d", i ? " " : "", ids[i]);
        printf("%s\n", none ? "none" : "");
    }
    return 0;
}

static int print_json() {
    char* data = (char*)malloc(1 << 20);
    size_t n = fread(data, 1, (1 << 20) - 1, stdin);
    data[n] = 0;
    fputs(json_string(data).c_str(), stdout);
    return 0;
}

// Under mpirun: sums whose result depends on the order of the ranks are the same everywhere, in rank order.
static int print_rank_sums(int* argc, char*** argv) {
    processes_start(argc, argv);
    const double values[] = {1e16, 1, -1e16, 1};
    double x = values[procs.rank % 4], expected = 0;
    for (int r = 0; r < procs.world; r++) expected += values[r % 4];
    check(all_sum(x) == expected, "rank %d: sum in rank order", procs.rank);
    std::vector<float> rows(2 * procs.world * 3), sums(2);
    for (float& y : rows) y = (float)(procs.rank % 4 == 1 || procs.rank % 4 == 3 ? 1 : procs.rank % 4 ? -1e8 : 1e8);
    for (int r = 0; r < procs.world; r++) sums[0] += (float)(r % 4 == 1 || r % 4 == 3 ? 1 : r % 4 ? -1e8 : 1e8);
    reduce_scatter_start(rows.data(), 2, procs.world * 3);
    for (int row = 0; row < 2; row++)
        for (int i = 0; i < 3; i++) check(rows[(row * procs.world + procs.rank) * 3 + i] == sums[0], "rank %d: sums of pieces in rank order", procs.rank);
    check(all_max(procs.rank == 1 ? 7 : -procs.rank) == 7, "rank %d: maximum", procs.rank);
    processes_end();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

int main(int argc, char** argv) {
    if (argc == 2 && !strcmp(argv[1], "ranks")) return print_rank_sums(&argc, &argv);
    if (argc == 2 && !strcmp(argv[1], "options")) return print_options();
    if (argc == 3 && !strcmp(argv[1], "encode")) return print_encoded(argv[2]);
    if (argc == 2 && !strcmp(argv[1], "json")) return print_json();
    test_permutation();
    test_loader();
    test_fingerprint();
    test_detector();
    test_schedules();
    test_options();
    test_words();
    test_draws();
    test_json();
    test_flops();
    test_seconds_left();
    test_durations();
    test_checksum();
    test_sums();
    test_layout();
    test_random();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
