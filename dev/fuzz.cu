// Proves that no bytes from outside make the trainer read or write where it should not: every parser of files, options and
// text under libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer. dev/reliability fuzz builds and runs it:
//   clang++ -x c++ -std=c++17 -O1 -g -DCPU_BACKEND -fsanitize=fuzzer,address,undefined dev/fuzz.cu -o build/fuzz
//   FUZZ=shard|tokenizer|model|checkpoint|options|text build/fuzz CORPUS
// What the parsers refuse ends in fatal(), which here ends the one input. Checksums are made right where an input's last
// byte is odd, so that what lies behind them is reached.
#include <stdlib.h>
#include <thread>
struct Refused {};
[[noreturn]] static void refuse(int) { throw Refused(); }
#define exit refuse
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#undef exit

static const char* target;
static char path[64];
static Trainer trainer;
static Tokenizer tokenizer;

static void sign(uint8_t* data, size_t size) {
    CheckpointHeader* h = (CheckpointHeader*)data;
    if (size < sizeof *h) return;
    size_t front = (size_t)h->state_bytes + (size_t)h->chunks * 8;
    if (front <= size - sizeof *h) h->state_checksum = checksum(data + sizeof *h, front);
    h->header_checksum = checksum(h, sizeof *h - 8);
}

static void command_line(char* text, size_t size) {  // one argument a line
    char* arguments[64] = {(char*)"fuzz"};
    int count = 1;
    for (char* rest = text; count < 64 && rest < text + size; rest += strlen(rest) + 1) arguments[count++] = rest;
    Trainer* t = &trainer;
    parse_options(&t->config, count, arguments);
    t->config.seq_len = std::min<int64_t>(t->config.seq_len, 1 << 16);  // the search for a geometry takes longer beyond
    procs.world = 1;
    processes_split(t->config.cp);
    t->train.sequences = 100;
    setup_run(t);
}

static void one_input(uint8_t* data, size_t size) {
    Model* m = &trainer.model;
    if (!strcmp(target, "options")) return command_line((char*)data, size);
    if (!strcmp(target, "text")) {
        tokenizer_encode(&tokenizer, (char*)data);
        json_string((char*)data);
    } else if (!strcmp(target, "tokenizer")) {
        Tokenizer k;
        tokenizer_read(&k, path, 300);
        for (size_t i = 0; i < k.token.size(); i += 40) tokenizer_find(&k, k.token[i]);
    } else if (!strcmp(target, "shard")) {
        Shard shard = shard_header(path);
        const int64_t T = 4;
        int64_t n = shard.sequences = shard.tokens > 0 ? (shard.tokens - 1) / T : 0;
        Loader d = {{shard}, T, n, shard.tokens, 0, true, 1, 300, 0, 0};
        int inputs[T], targets[T];
        for (int64_t i = 0; i < n; i++) loader_sequence(&d, i, inputs, targets);
        if (n) loader_fingerprint(&d);
    } else if (!strcmp(target, "model")) {
        ModelFile f;
        if (model_file_open(&f, path) != "") return;
        close(f.fd);
        if (f.dims.L == m->dims.L && f.dims.C == m->dims.C && f.dims.Vp == m->dims.Vp && f.dims.rope == m->dims.rope)
            weights_read(m, path, true);
    } else if (!strcmp(target, "checkpoint")) {
        RunState state;
        checkpoint_read(m, path, &state);
    } else abort();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
    static unsigned first_free = open("/dev/null", O_RDONLY);
    uint8_t* data = (uint8_t*)malloc(size + 1);
    memcpy(data, input, size);
    data[size] = 0;
    if (!strcmp(target, "checkpoint") && size && input[size - 1] % 2) sign(data, size);
    int fd = open(path, O_RDWR);
    if (fd < 0 || ftruncate(fd, 0) || !write_at(fd, data, size, 0)) abort();
    close(fd);
    try {
        one_input(data, size);
    } catch (Refused) {}
    free(data);
    close_range(first_free, ~0u, 0);  // what was open when an input was refused
    return 0;
}

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    target = getenv("FUZZ");
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd_create("input", 0));
    char* none[] = {(char*)"fuzz"};
    Trainer* t = &trainer;
    parse_options(&t->config, 1, none);
    Model* m = &t->model;
    model_layout(m, {16, 20, 128, 1, 2, 8, true, 10000});
    m->params = (floatX*)device_alloc(m->padded * sizeof(floatX));
    m->m = (float*)device_alloc(m->owned * sizeof(float));
    m->v = (float*)device_alloc(m->owned * sizeof(float));
    tokenizer.token = {" ", "'", "a", "e", "l", "s", "t", "h", "1", "\n", ".", "\xC3", "th", "the", " the", "'s", "ll", "", "\n\n"};
    tokenizer.end_of_text = (int)tokenizer.token.size() - 2;
    const char* seeds = getenv("SEEDS");  // a folder to write the first inputs of the model and checkpoint parsers to
    if (!seeds) return 0;
    RunState state = {};
    state.step = state.updates = state.sequences = state.phase_steps[DENSE] = 3;
    state.seq_len = state.total_batch = 16;
    state.epoch = 10;
    model_initialize(m, 1);
    model_write(m, text("%s/model.bin", seeds), 3);
    checkpoint_write(m, text("%s/ckpt.bin", seeds), &state);
    _exit(0);
}
