/*
Pretrains GPT-2-class models at contexts of 32K to 1M tokens with Lighthouse attention (arXiv 2605.06554), in plain C/CUDA.

Most steps run Lighthouse attention: q, k and v are pooled into a pyramid, a parameter-free score picks a few thousand
entries, ordinary causal SDPA runs on those, and the result is scattered back. At the switch step the run goes on with dense
SDPA in every layer (the resumption) and ends in a plain dense checkpoint. train_gpt_dense.cu is the same program without
Lighthouse, the baseline to compare with.

 1. configuration          the options, one table; the geometry of Lighthouse
 2. errors, files, memory  what every later section stands on
 3. processes              rank, world, collectives
 4. data                   token shards in, windows of T+1 tokens out
 5. operations             forward and backward of each operation (CPU twins: dev/cpu_ops.h)
 6. Lighthouse attention   the operations composed round the same SDPA call
 7. model                  parameters, activations, memory plan, forward, backward
 8. optimizer              AdamW, learning rate schedules, outlier detection
 9. checkpoints            model files and whole run states
10. evaluation, logs       validation, sampling, main.log, log.jsonl, the progress line
11. main                   the loop

Letters: B batch, T tokens of a sequence, C channels, NH heads, D head size, V vocabulary, Vp V padded to 128, L layers,
S slots of the gathered Lighthouse sequence. Every pointer is declared with its shape. Build with make; ./program --help.
*/
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <dirent.h>
#ifdef USE_MPI
#include <mpi.h>
#endif

// ===================================================================================================================
// 1. Configuration: one struct, one table that gives every option its name, default, bounds and help line.

#ifdef DENSE_ONLY
static const bool lighthouse_built = false;
#define PROGRAM "dense"
#else
static const bool lighthouse_built = true;
#define PROGRAM "lighthouse"
#endif

struct Config {
    // data
    const char *train_data, *val_data;
    int64_t shuffle, seed;
    // output
    const char* out_dir;
    int64_t checkpoint_every, keep_last, keep_every, resume;
    // model
    const char *model, *positions;
    int64_t depth, channels, heads, vocab_size;
    double rope_theta;
    // batch and length of the run
    int64_t batch_size, seq_len, total_batch_size, steps;
    // optimizer
    double learning_rate, final_lr_frac, decay_frac;
    const char* lr_schedule;
    int64_t warmup_steps;
    double weight_decay, beta1, beta2, adam_eps, grad_clip, skip_loss_z, skip_grad_z;
    // Lighthouse
    int64_t levels, pool, topk, tile;
    const char *dense_layers, *switch_step;
    // evaluation
    int64_t val_every, val_batches, sample_every, sample_tokens, sample_top_k;
    const char *prompt, *tokenizer;
    double temperature;
    // memory
    int64_t recompute, deterministic, dry_run;
};

enum OptionType { OPT_INT, OPT_REAL, OPT_TEXT, OPT_FLAG };

struct Option {
    const char* name;
    const char* letter;    // llm.c's letter for the same thing, or ""
    OptionType type;
    size_t offset;
    const char* fallback;  // the default, as it would be typed
    double min, max;       // bounds of the numbers, both included
    const char* help;      // a line that starts a new group begins with "[group] "
};

#define AT(field) offsetof(Config, field)
static const Option options[] = {
    {"train-data", "i", OPT_TEXT, AT(train_data), "data/pystdlib_bytes/train_*.bin", 0, 0,
     "[data] token shards to train on: a file or a glob"},
    {"val-data", "j", OPT_TEXT, AT(val_data), "data/pystdlib_bytes/val_*.bin", 0, 0,
     "token shards to validate on; empty: no validation"},
    {"shuffle", "", OPT_INT, AT(shuffle), "1", 0, 1, "1: visit the windows of each epoch in a seeded random order"},
    {"seed", "", OPT_INT, AT(seed), "1337", 0, 4294967295.0, "seed of the initialization, the shuffling and the samples"},
    {"out-dir", "o", OPT_TEXT, AT(out_dir), "runs/" PROGRAM, 0, 0, "[output] directory of the logs and checkpoints"},
    {"checkpoint-every", "n", OPT_INT, AT(checkpoint_every), "1000", 0, 1e12,
     "steps between checkpoints; 0: only at the end and on SIGTERM or SIGINT"},
    {"keep-last", "nk", OPT_INT, AT(keep_last), "2", 0, 1e6, "checkpoints to keep, newest first; 0: all"},
    {"keep-every", "nm", OPT_INT, AT(keep_every), "0", 0, 1e12, "also keep checkpoints of every m-th step; 0: none"},
    {"resume", "y", OPT_INT, AT(resume), "0", 0, 1, "1: go on from the newest whole checkpoint in out-dir, if there is one"},
    {"model", "e", OPT_TEXT, AT(model), "d12", 0, 0,
     "[model] d6, d12, d24, d36, d48, d60, lh30, or a model or checkpoint file to start from"},
    {"depth", "", OPT_INT, AT(depth), "0", 0, 1024, "layers; 0: as the descriptor says"},
    {"channels", "", OPT_INT, AT(channels), "0", 0, 65536, "channels; 0: as the descriptor says"},
    {"heads", "", OPT_INT, AT(heads), "0", 0, 1024, "heads; 0: as the descriptor says"},
    {"vocab-size", "", OPT_INT, AT(vocab_size), "0", 0, 16777216,
     "token ids; 0: 257 if the data holds bytes, 50257 if it fits GPT-2's ids"},
    {"positions", "", OPT_TEXT, AT(positions), "rope", 0, 0, "rope, or learned as in GPT-2"},
    {"rope-theta", "", OPT_REAL, AT(rope_theta), "500000", 1, 1e12, "base of the rotary frequencies"},
    {"batch-size", "b", OPT_INT, AT(batch_size), "1", 1, 65536, "[batch] sequences per process and micro-step"},
    {"seq-len", "t", OPT_INT, AT(seq_len), "32768", 1, 1073741824, "tokens of a sequence"},
    {"total-batch-size", "d", OPT_INT, AT(total_batch_size), "0", 0, 1e12,
     "tokens of a step, over all processes and micro-steps; 0: one micro-step"},
    {"steps", "x", OPT_INT, AT(steps), "-1", -1, 1e12, "optimizer steps of the whole run; -1: one epoch"},
    {"learning-rate", "l", OPT_REAL, AT(learning_rate), "3e-4", 0, 10, "[optimizer] peak learning rate"},
    {"lr-schedule", "k", OPT_TEXT, AT(lr_schedule), "cosine", 0, 0, "cosine, linear, constant, or wsd (warmup, stable, decay)"},
    {"warmup-steps", "u", OPT_INT, AT(warmup_steps), "-1", -1, 1e12, "linear warmup; -1: 2% of the steps"},
    {"final-lr-frac", "q", OPT_REAL, AT(final_lr_frac), "0.1", 0, 1, "learning rate at the end, as a share of the peak"},
    {"decay-frac", "", OPT_REAL, AT(decay_frac), "0.2", 0, 1, "share of the steps that wsd decays over"},
    {"weight-decay", "c", OPT_REAL, AT(weight_decay), "0.1", 0, 10, "decoupled weight decay of the matrices"},
    {"beta1", "", OPT_REAL, AT(beta1), "0.9", 0, 0.999999, "AdamW: decay of the first moment"},
    {"beta2", "", OPT_REAL, AT(beta2), "0.95", 0, 0.999999, "AdamW: decay of the second moment"},
    {"adam-eps", "", OPT_REAL, AT(adam_eps), "1e-8", 1e-30, 1, "AdamW: epsilon"},
    {"grad-clip", "", OPT_REAL, AT(grad_clip), "1.0", 0, 1e9, "largest gradient norm; 0: no clipping"},
    {"skip-loss-z", "sl", OPT_REAL, AT(skip_loss_z), "0", 0, 1e9,
     "skip the update when the loss lies this many standard deviations above its last 128 values; 0: never"},
    {"skip-grad-z", "sg", OPT_REAL, AT(skip_grad_z), "0", 0, 1e9, "the same for the gradient norm"},
#ifndef DENSE_ONLY
    {"levels", "", OPT_INT, AT(levels), "3", 2, 8, "[lighthouse] levels of the pyramid, the tokens included"},
    {"pool", "", OPT_INT, AT(pool), "4", 2, 64, "pooling factor from level to level, a power of 2"},
    {"topk", "", OPT_INT, AT(topk), "0", 0, 1e9, "entries expanded per level; 0: about seq-len/64"},
    {"tile", "", OPT_INT, AT(tile), "0", 0, 4096, "entries each tile expands per level; 0: 128, less for short sequences"},
    {"dense-layers", "", OPT_TEXT, AT(dense_layers), "auto", 0, 0,
     "layers that stay dense: 0,1,28,29, or none, all, auto (two at each end; one below 12 layers, none below 3)"},
    {"switch-step", "", OPT_TEXT, AT(switch_step), "0.625", 0, 0,
     "first dense step: a step, or with a point a share of the steps (1.0: never dense; 0: dense throughout)"},
#endif
    {"val-every", "v", OPT_INT, AT(val_every), "250", 0, 1e12, "[evaluation] steps between validations; 0: at the end only"},
    {"val-batches", "m", OPT_INT, AT(val_batches), "20", 1, 1e9, "micro-batches of a validation"},
    {"sample-every", "s", OPT_INT, AT(sample_every), "0", 0, 1e12, "steps between samples; 0: never"},
    {"sample-tokens", "g", OPT_INT, AT(sample_tokens), "64", 1, 65536, "tokens to generate"},
    {"sample-top-k", "", OPT_INT, AT(sample_top_k), "50", 0, 16777216, "draw from this many likeliest tokens; 0: all"},
    {"prompt", "", OPT_TEXT, AT(prompt), "", 0, 0, "text to continue; empty: from the end-of-text token"},
    {"tokenizer", "", OPT_TEXT, AT(tokenizer), "", 0, 0, "tokenizer.bin; empty: the one beside the training data"},
    {"temperature", "", OPT_REAL, AT(temperature), "1.0", 0.01, 100, "softmax temperature of the samples"},
    {"recompute", "r", OPT_INT, AT(recompute), "-1", -1, 4,
     "[memory] 0: keep all activations; 1: recompute GELU; 2: and LayerNorm; 3: all but attention; 4: and dense attention; "
     "-1: the least that fits"},
    {"deterministic", "", OPT_INT, AT(deterministic), "0", 0, 1, "1: dense attention's backward gives the same bits every run"},
    {"dry-run", "", OPT_FLAG, AT(dry_run), "0", 0, 1, "print the configuration and the memory plan, and stop"},
};
static const int option_count = sizeof(options) / sizeof(options[0]);
static bool option_given[sizeof(options) / sizeof(options[0])];  // on the command line

// ---- Lighthouse geometry
// Symbols of arXiv 2605.06554: L levels, pooling factor p, budget k (topk), tile quota m. Level 0 holds the tokens;
// entry i of level l covers tokens [i p^l, (i+1) p^l).

#define LH_MAX_LEVELS 8

struct LighthouseShape {
    int64_t T;                       // tokens
    int H, D;                        // heads, head size
    int levels, pool, topk, tile;    // L, p, k, m
    int tiles;                       // k/m contiguous tiles, each selected on its own
    int64_t n[LH_MAX_LEVELS];        // n[l] = T / p^l, entries of level l
    int64_t off[LH_MAX_LEVELS + 1];  // first flat index of level l; off[levels] = entries of all levels
    int64_t S;                       // slots of the gathered sequence: n[L-1] + (L-1) p k
    int64_t tile_slots;              // S / tiles
};

// Fills s and checks the rules of validity. Returns false and a sentence in why, naming the rule that failed.
static bool lighthouse_shape(LighthouseShape* s, int64_t T, int H, int D, int levels, int pool, int topk, int tile,
                             char* why, size_t why_size) {
    memset(s, 0, sizeof(*s));
    if (levels < 2 || levels > LH_MAX_LEVELS) {
        snprintf(why, why_size, "levels is %d; it must be 2 to %d", levels, LH_MAX_LEVELS);
        return false;
    }
    if (pool < 2 || (pool & (pool - 1))) {
        snprintf(why, why_size, "pool is %d; it must be a power of 2, at least 2", pool);
        return false;
    }
    if (tile < 4 || tile % 2 || pool > tile / 2) {
        snprintf(why, why_size, "tile is %d; it must be even and at least twice pool (%d)", tile, pool);
        return false;
    }
    if (topk < tile || topk % tile) {
        snprintf(why, why_size, "topk is %d; it must be a positive multiple of tile (%d): try %d", topk, tile,
                 topk < tile ? tile : topk / tile * tile);
        return false;
    }
    int tiles = topk / tile;
    int64_t coarse = 1;  // tokens under one coarsest entry
    for (int l = 1; l < levels; l++) {
        coarse *= pool;
        if (coarse > T) break;
    }
    int64_t unit = coarse * tiles;
    if (coarse > T || T % unit) {
        snprintf(why, why_size,
                 "T = %lld is not divisible by pool^(levels-1) * topk/tile = %lld: the nearest lengths are %lld and %lld",
                 (long long)T, (long long)unit, (long long)(T / unit * unit), (long long)((T / unit + 1) * unit));
        return false;
    }
    if (T / unit < tile) {
        int64_t most = T / coarse / tile * tile;
        char fewer[64] = "";
        if (most > 0) snprintf(fewer, sizeof fewer, "topk to at most %lld, or ", (long long)most);
        snprintf(why, why_size, "a tile has %lld coarsest entries, fewer than tile = %d: lower %stile, levels or pool",
                 (long long)(T / unit), tile, fewer);
        return false;
    }
    s->T = T; s->H = H; s->D = D;
    s->levels = levels; s->pool = pool; s->topk = topk; s->tile = tile;
    s->tiles = tiles;
    s->n[0] = T;
    for (int l = 1; l < levels; l++) s->n[l] = s->n[l - 1] / pool;
    for (int l = 0; l < levels; l++) s->off[l + 1] = s->off[l] + s->n[l];
    s->S = s->n[levels - 1] + (int64_t)(levels - 1) * pool * topk;
    s->tile_slots = s->S / tiles;
    return true;
}

// Settings the user left at 0 are chosen from T: a tile of 128 or, for short sequences, the largest power of two that
// T/64 reaches; then the valid multiple of it that is nearest to T/64. The paper's T = 98304 gives its k = 1536.
static bool lighthouse_defaults(LighthouseShape* s, const Config* c, int H, int D, char* why, size_t why_size) {
    int64_t want = c->seq_len / 64, tile = c->tile;
    if (tile == 0) {
        tile = c->topk ? (c->topk % 128 == 0 ? 128 : c->topk) : 128;
        if (!c->topk) while (tile > want && tile > 2 * c->pool) tile /= 2;
    }
    if (c->topk) return lighthouse_shape(s, c->seq_len, H, D, c->levels, c->pool, c->topk, tile, why, why_size);
    int64_t nearest = (want + tile / 2) / tile;
    for (int64_t d = 0; d <= nearest; d++) {
        if (nearest - d >= 1 &&
            lighthouse_shape(s, c->seq_len, H, D, c->levels, c->pool, (nearest - d) * tile, tile, why, why_size)) return true;
        if (lighthouse_shape(s, c->seq_len, H, D, c->levels, c->pool, (nearest + d) * tile, tile, why, why_size)) return true;
    }
    return lighthouse_shape(s, c->seq_len, H, D, c->levels, c->pool, tile, tile, why, why_size);
}

// ===================================================================================================================
// 2. Errors and checks, files, memory, timers.

static void stop_all_processes();  // section 3: a failing process must not leave the others waiting

// Prints one message that says what is wrong, with which value, and what would be right; ends the program.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2), noreturn))
#endif
static void fatal(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "error: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    stop_all_processes();
    exit(1);
}

static void* host_alloc(size_t bytes) {
    void* p = malloc(bytes ? bytes : 1);
    if (!p) fatal("out of host memory: %zu bytes were asked for", bytes);
    return p;
}

// A string made by printf, to be freed by the caller.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static char* text(const char* format, ...) {
    va_list args;
    va_start(args, format);
    char* s = NULL;
    if (vasprintf(&s, format, args) < 0) fatal("out of host memory");
    va_end(args);
    return s;
}

static int open_to_read(const char* path) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) fatal("cannot read %s: %s", path, strerror(errno));
    return fd;
}

static void read_at(int fd, void* buffer, size_t bytes, int64_t offset, const char* path) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char*)buffer + done, bytes - done, offset + done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fatal("reading %s: %s", path, strerror(errno));
        if (n == 0) fatal("%s ends at byte %lld; %zu more bytes were expected", path, (long long)(offset + done), bytes - done);
        done += n;
    }
}

// Returns false with errno set, so that a half-written file can be removed before the message.
static bool write_at(int fd, const void* buffer, size_t bytes, int64_t offset) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(fd, (const char*)buffer + done, bytes - done, offset + done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        done += n;
    }
    return true;
}

static int64_t file_size(int fd, const char* path) {
    struct stat st;
    if (fstat(fd, &st)) fatal("%s: %s", path, strerror(errno));
    return st.st_size;
}

static void make_directories(const char* path) {
    char* s = text("%s", path);
    for (char* p = s + 1;; p++) {
        if (*p != '/' && *p != 0) continue;
        char end = *p;
        *p = 0;
        if (mkdir(s, 0777) && errno != EEXIST) fatal("cannot make directory %s: %s", s, strerror(errno));
        *p = end;
        if (end == 0) break;
    }
    free(s);
}

// FNV-1a over 8-byte words: every step is a bijection of the state, so no change of a single word goes unnoticed.
static uint64_t checksum(const void* data, size_t bytes) {
    uint64_t h = 14695981039346656037ull, word;
    const char* p = (const char*)data;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        memcpy(&word, p, 8);
        h = (h ^ word) * 1099511628211ull;
    }
    for (; bytes > 0; bytes--, p++) h = (h ^ (uint8_t)*p) * 1099511628211ull;
    return h ^ (h >> 32);
}

static double seconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// SplitMix64, the one source of randomness: every stream is a function of its seed and a counter, so nothing but
// counters need saving.
static uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
static double uniform(uint64_t seed, uint64_t counter) {  // in (0, 1)
    return ((mix64(mix64(seed) ^ counter) >> 11) + 0.5) * 0x1p-53;
}
static double gaussian(uint64_t seed, uint64_t counter) {
    return sqrt(-2 * log(uniform(seed, 2 * counter))) * cos(2 * M_PI * uniform(seed, 2 * counter + 1));
}

// ---- device memory: on the CPU backend the device is the host

#ifdef CPU_BACKEND
typedef float floatX;
static const char* backend_name = "cpu";

static void* device_alloc(size_t bytes) {  // zeroed
    void* p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fatal("out of memory: %zu bytes were asked for", bytes);
    return p;
}
static void device_zero(void* p, size_t bytes) { memset(p, 0, bytes); }
static void copy_to_device(void* device, const void* host, size_t bytes) { memcpy(device, host, bytes); }
static void copy_to_host(void* host, const void* device, size_t bytes) { memcpy(host, device, bytes); }
static void device_synchronize() {}
static size_t device_memory_free() {
    FILE* f = fopen("/proc/meminfo", "r");
    char line[256];
    long long kib = 0;
    while (f && fgets(line, sizeof line, f)) if (sscanf(line, "MemAvailable: %lld", &kib) == 1) break;
    if (f) fclose(f);
    return (size_t)kib * 1024;
}
static void device_name(char* name, size_t size) {
    FILE* f = fopen("/proc/cpuinfo", "r");
    char line[256], model[200] = "CPU";
    while (f && fgets(line, sizeof line, f)) if (sscanf(line, "model name : %199[^\n]", model) == 1) break;
    if (f) fclose(f);
    snprintf(name, size, "%s, %ld cores", model, sysconf(_SC_NPROCESSORS_ONLN));
}
#endif

// Hands out pieces of one allocation. With base NULL it only counts, so that one layout function both plans and places.
struct Arena {
    char* base;
    size_t used;
};
static void* take(Arena* a, size_t bytes) {
    void* p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 255) / 256 * 256;
    return p;
}
#define TAKE(arena, type, count) ((type*)take(arena, (size_t)(count) * sizeof(type)))

// ===================================================================================================================
// 3. Processes: one per device. MPI starts them and carries the collectives of the CPU backend.

struct Processes {
    int rank, world;
};
static Processes procs = {0, 1};

static void stop_all_processes() {
#ifdef USE_MPI
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized && procs.world > 1) MPI_Abort(MPI_COMM_WORLD, 1);
#endif
}

static void processes_start(int* argc, char*** argv) {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"};
    int started = 1;
    for (int i = 0; i < 3 && started == 1; i++) if (getenv(names[i])) started = atoi(getenv(names[i]));
#ifdef USE_MPI
    if (started > 1 || getenv("OMPI_COMM_WORLD_SIZE")) {  // a single process needs no MPI, and starts faster without
        MPI_Init(argc, argv);
        MPI_Comm_rank(MPI_COMM_WORLD, &procs.rank);
        MPI_Comm_size(MPI_COMM_WORLD, &procs.world);
    }
#else
    (void)argc; (void)argv;
    if (started > 1 && !getenv("SLURM_NTASKS"))
        fatal("started as %d processes, but this program was built without MPI: install libopenmpi-dev and run make again", started);
#endif
}

static void processes_end() {
#ifdef USE_MPI
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized) MPI_Finalize();
#endif
}

// Sums over the processes, in place, in rank order on every process. Counts may exceed 2^31.
static void all_sum(float* x, int64_t n) {
    (void)x; (void)n;
#ifdef USE_MPI
    for (int64_t i = 0; procs.world > 1 && i < n; i += 1 << 26) {
        int count = n - i < (1 << 26) ? (int)(n - i) : 1 << 26;
        MPI_Allreduce(MPI_IN_PLACE, x + i, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    }
#endif
}
static double all_sum(double x) {
#ifdef USE_MPI
    if (procs.world > 1) MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
#endif
    return x;
}
static void barrier() {
#ifdef USE_MPI
    if (procs.world > 1) MPI_Barrier(MPI_COMM_WORLD);
#endif
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static void say(const char* format, ...) {  // rank 0 speaks for all
    if (procs.rank) return;
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    fflush(stdout);
}

// ===================================================================================================================
// 4. Data: token shards in llm.c's format, mapped read-only; windows of T+1 tokens out.
// A window is T consecutive tokens of one shard and the one after. Sequence i of the run is window i mod W of epoch
// i / W; with shuffling each epoch visits the W windows by its own keyed permutation. So the whole position is i.

static const int shard_header_ints = 256;

struct Shard {
    const char* path;
    const char* map;       // the whole file
    int64_t bytes, tokens, windows;
    int width;             // bytes of a token id: 2 or 4
};

struct Loader {
    Shard* shards;
    int count;
    int64_t T, windows;    // windows: over all shards
    bool shuffle;
    uint64_t seed;
    int64_t largest_id;
};

static int shard_token(const Shard* s, int64_t i) {
    const char* body = s->map + shard_header_ints * 4;
    return s->width == 2 ? ((const uint16_t*)body)[i] : (int)((const uint32_t*)body)[i];
}

static void shard_open(Shard* s, const char* path) {
    s->path = path;
    int fd = open_to_read(path);
    s->bytes = file_size(fd, path);
    int header[shard_header_ints];
    if (s->bytes < (int64_t)sizeof header)
        fatal("%s is no token shard: it has %lld bytes, less than the header's %zu", path, (long long)s->bytes, sizeof header);
    read_at(fd, header, sizeof header, 0, path);
    bool narrow = header[0] == 20240520 && header[1] == 1, wide = header[0] == 20240801 && header[1] == 7;
    if (!narrow && !wide)
        fatal("%s is no token shard: magic %d, version %d; expected 20240520, 1 (16-bit ids) or 20240801, 7 (32-bit ids). "
              "data/prepare.py writes such files", path, header[0], header[1]);
    s->width = narrow ? 2 : 4;
    s->tokens = header[2];
    int64_t expected = (int64_t)sizeof header + s->tokens * s->width;
    if (s->tokens < 0 || s->bytes != expected)
        fatal("%s: its header says %lld tokens, so %lld bytes, but the file has %lld: it is cut or damaged", path,
              (long long)s->tokens, (long long)expected, (long long)s->bytes);
    s->map = (const char*)mmap(NULL, s->bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (s->map == MAP_FAILED) fatal("cannot map %s: %s", path, strerror(errno));
    close(fd);
}

// Opens every shard that matches the pattern, in the order of their names. A vocabulary of 0: not known yet.
static void loader_open(Loader* d, const char* pattern, int64_t T, int64_t vocab, bool shuffle, uint64_t seed) {
    memset(d, 0, sizeof *d);
    glob_t found;
    if (glob(pattern, GLOB_TILDE, NULL, &found) || found.gl_pathc == 0)
        fatal("no file matches %s: data/prepare.py makes token shards, or name yours with --train-data and --val-data", pattern);
    d->count = (int)found.gl_pathc;
    d->shards = (Shard*)host_alloc(d->count * sizeof(Shard));
    d->T = T; d->shuffle = shuffle; d->seed = seed;
    int64_t tokens = 0;
    for (int i = 0; i < d->count; i++) {
        Shard* s = &d->shards[i];
        shard_open(s, text("%s", found.gl_pathv[i]));
        s->windows = s->tokens > 0 ? (s->tokens - 1) / T : 0;
        d->windows += s->windows;
        tokens += s->tokens;
        int64_t largest = -1;
        #pragma omp parallel for reduction(max : largest)
        for (int64_t t = 0; t < s->tokens; t++) {
            int64_t id = (uint32_t)shard_token(s, t);
            if (id > largest) largest = id;
        }
        if (vocab && largest >= vocab) {
            int64_t t = 0;
            while ((uint32_t)shard_token(s, t) < vocab) t++;
            fatal("%s: token %lld is id %u, but the vocabulary has %lld ids (0 to %lld): was it made with another tokenizer? "
                  "--vocab-size sets the vocabulary", s->path, (long long)t, (uint32_t)shard_token(s, t), (long long)vocab,
                  (long long)vocab - 1);
        }
        if (largest > d->largest_id) d->largest_id = largest;
    }
    globfree(&found);
    if (d->windows == 0)
        fatal("%s: %d shard(s) of together %lld tokens hold no window of seq-len + 1 = %lld tokens: lower --seq-len or prepare "
              "more data", pattern, d->count, (long long)tokens, (long long)T + 1);
}

static void loader_close(Loader* d) {
    for (int i = 0; i < d->count; i++) {
        munmap((void*)d->shards[i].map, d->shards[i].bytes);
        free((void*)d->shards[i].path);
    }
    free(d->shards);
    memset(d, 0, sizeof *d);
}

// A keyed permutation of 0..n-1 without a table: a 4-round Feistel network on the next even number of bits, walked
// along its cycle until it lands inside.
static int64_t permute(int64_t i, int64_t n, uint64_t key) {
    int half = 1;
    while ((1ll << (2 * half)) < n) half++;
    uint64_t mask = (1ull << half) - 1, x = i;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (int round = 0; round < 4; round++) {
            uint64_t next = left ^ (mix64(key ^ mix64(right * 4 + round)) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// Writes sequence i of the run: inputs (T) and targets (T), the inputs shifted by one.
static void loader_sequence(const Loader* d, int64_t i, int* inputs, int* targets) {
    int64_t epoch = i / d->windows, w = i % d->windows;
    if (d->shuffle) w = permute(w, d->windows, mix64(d->seed) ^ (uint64_t)epoch);
    const Shard* s = d->shards;
    while (w >= s->windows) w -= (s++)->windows;
    for (int64_t t = 0; t < d->T; t++) {
        inputs[t] = shard_token(s, w * d->T + t);
        targets[t] = shard_token(s, w * d->T + t + 1);
    }
}

// Tells other data of the same size apart: a checksum of the first tokens of windows from everywhere. It does not depend on
// how the tokens are cut into shards.
static uint64_t loader_fingerprint(const Loader* d) {
    const int64_t samples = 1024, length = d->T < 64 ? d->T : 64;
    int* tokens = (int*)host_alloc(samples * length * sizeof(int));
    for (int64_t i = 0; i < samples; i++) {
        int64_t w = (int64_t)((double)i / samples * d->windows);
        const Shard* s = d->shards;
        while (w >= s->windows) w -= (s++)->windows;
        for (int64_t t = 0; t < length; t++) tokens[i * length + t] = shard_token(s, w * d->T + t);
    }
    uint64_t sum = checksum(tokens, samples * length * sizeof(int));
    free(tokens);
    return sum;
}

// ===================================================================================================================
// 5. Operations. Here the device kernels with their launchers; their plain-C twins of the same signatures are the CPU
// backend and the oracle of the kernels' tests.

#ifdef CPU_BACKEND
#include "dev/cpu_ops.h"
using namespace cpu;
#endif

// ===================================================================================================================
// 6. Lighthouse attention, composed of the operations: scores -> selection -> gather (pool, rotate) -> SDPA -> scatter.
// The selection gets no gradient; the backward pass uses the index that the forward pass kept.

struct LighthouseBuffers {  // of one layer; E entries of all levels, S slots
    float* scores;      // (2, B, NH, E) shared by the layers
    int32_t* slot;      // (B, NH, E)    shared by the layers: slot of each entry, or -1
    int32_t* index;     // (B, NH, S)    the selection, in sequence order
    floatX* slots;      // (B, S, 3, NH, D) pooled and rotated q, k, v
    floatX* attn;       // (B, S, NH, D) attention output of the slots
    float* stats;       // (B, NH, S)
    floatX* dslots;     // (B, S, 3, NH, D) shared by the layers
    floatX* dattn;      // (B, S, NH, D)    shared by the layers
};

// What of the forward pass runs: all of it, or, for the backward pass, what was not kept.
static void lighthouse_forward(floatX* out, LighthouseBuffers* b, const floatX* qkv, const float* rope, int B,
                               const LighthouseShape* s, bool again, bool regather) {
    if (!again) {
        lighthouse_scores(b->scores, qkv, B, s);
        lighthouse_select(b->index, b->scores, B, s);
    }
    lighthouse_invert(b->slot, b->index, B, s);
    if (!again || regather) lighthouse_gather(b->slots, qkv, b->index, rope, B, s);
    if (!again) sdpa_forward(b->attn, b->stats, b->slots, B, s->S, s->H, s->D);
    if (!again || regather) lighthouse_scatter(out, b->attn, b->slot, B, s);
}

static void lighthouse_backward(floatX* dqkv, const floatX* dout, LighthouseBuffers* b, const float* rope, int B,
                                const LighthouseShape* s) {
    lighthouse_scatter_backward(b->dattn, dout, b->index, B, s);
    sdpa_backward(b->dslots, b->dattn, b->slots, b->attn, b->stats, B, s->S, s->H, s->D);
    lighthouse_gather_backward(dqkv, b->dslots, b->index, b->slot, rope, B, s);
}

// ===================================================================================================================
// 7. Model: GPT-2 with pre-LayerNorm blocks; parameters, activations, the memory plan, forward, backward.

enum Phase { LIGHTHOUSE, DENSE };  // of the run; also the kind of attention that a layer uses
static const char* phase_name[] = {"lighthouse", "dense"};

// The parameter tensors in the order of llm.c's model file. A RoPE model has no WPE.
enum Tensor {
    WTE,       // (Vp, C)    token embedding and, tied, the output head
    WPE,       // (maxT, C)  learned positions
    LN1W,      // (L, C)
    LN1B,      // (L, C)
    QKVW,      // (L, 3C, C)
    QKVB,      // (L, 3C)
    ATTPROJW,  // (L, C, C)
    ATTPROJB,  // (L, C)
    LN2W,      // (L, C)
    LN2B,      // (L, C)
    FCW,       // (L, 4C, C)
    FCB,       // (L, 4C)
    FCPROJW,   // (L, C, 4C)
    FCPROJB,   // (L, C)
    LNFW,      // (C)
    LNFB,      // (C)
    TENSORS
};
static bool tensor_is_matrix(int t) {
    return t == WTE || t == WPE || t == QKVW || t == ATTPROJW || t == FCW || t == FCPROJW;
}
static bool tensor_is_stacked(int t) { return t >= LN1W && t <= FCPROJB; }

struct Dims {
    int64_t maxT;  // learned positions: rows of wpe; RoPE: the length trained at
    int V, Vp, L, NH, C;
    bool rope;
    float theta;
};

static const int MAX_LAYERS = 1024;

// Activations of one layer. What the recompute level does not keep points to buffers that all layers share.
struct LayerActs {
    floatX* x;                 // (B, T, C) input of the block
    floatX* ln1;               // (B, T, C)
    float *ln1_mean, *ln1_rstd;  // (B, T)
    floatX* qkv;               // (B, T, 3, NH, D) rotated in a dense layer, raw in a Lighthouse layer
    floatX* att;               // (B, T, C)
    float* stats;              // (B, NH, T) dense layers only
    LighthouseBuffers lh;      // Lighthouse layers only
    floatX* x2;                // (B, T, C) after the attention residual
    floatX* ln2;               // (B, T, C)
    float *ln2_mean, *ln2_rstd;  // (B, T)
    floatX* fch;               // (B, T, 4C) before GELU
    floatX* gelu;              // (B, T, 4C)
};

// What a pass runs over. The same arena holds the activations of every kind of pass, one after the other.
struct Run {
    int B;
    int64_t T;
    Phase phase;
    bool train;     // activations are kept, gradients are made
    int recompute;  // 0..4, see the option
};

struct Activations {
    LayerActs layer[MAX_LAYERS];
    floatX* x_final;           // (B, T, C) output of the last block
    floatX* lnf;               // (B, T, C)
    float *lnf_mean, *lnf_rstd;  // (B, T)
    floatX* logits;            // (head_rows, Vp) one chunk of rows
    float* losses;             // (B, T)
    floatX* dres;              // (B, T, C) gradient of the residual stream
    floatX* dbtc;              // (B, T, C)
    floatX* dwide;             // (B, T, 4C) gradient of fch, then of qkv
};

struct Model {
    Dims dims;
    int64_t size[TENSORS], offset[TENSORS];  // elements
    int64_t parameters;
    bool lighthouse_layer[MAX_LAYERS];       // in the Lighthouse phase; in the dense phase no layer is
    bool has_lighthouse;                     // at least one layer is, for part of the run
    LighthouseShape shape;
    floatX* params;            // (parameters) what the operations read
    float* master;             // (parameters) fp32; on the CPU the same memory as params
    float *grads, *m, *v;      // (parameters) gradient, first and second moment
    float* rope;               // (1024 + T/1024, D/2, 2) or NULL
    int *tokens, *targets;     // (B, T)
    Arena arena;               // the activations
    Activations acts;
    int* host_tokens;          // (2, B, T) a batch on its way to the device
};

static floatX* weight(const Model* m, int t, int l) {
    return m->params + m->offset[t] + (tensor_is_stacked(t) ? l * (m->size[t] / m->dims.L) : 0);
}
static float* gradient(const Model* m, int t, int l) {
    return m->grads + m->offset[t] + (tensor_is_stacked(t) ? l * (m->size[t] / m->dims.L) : 0);
}

static void model_layout(Model* m, Dims d) {
    m->dims = d;
    int64_t C = d.C, L = d.L;
    int64_t size[TENSORS] = {d.Vp * C, d.rope ? 0 : d.maxT * C, L * C, L * C, L * 3 * C * C, L * 3 * C, L * C * C, L * C,
                             L * C, L * C, L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C, C, C};
    m->parameters = 0;
    for (int t = 0; t < TENSORS; t++) {
        m->size[t] = size[t];
        m->offset[t] = m->parameters;
        m->parameters += size[t];
    }
}

// GPT-2's: 0.02, projections into the residual stream smaller by 1/sqrt(2L). Every element is a function of the seed and
// its place, so any number of processes makes the same model.
static void model_initialize(Model* m, float* host, uint64_t seed) {
    for (int t = 0; t < TENSORS; t++) {
        float scale = t == ATTPROJW || t == FCPROJW ? 0.02f / sqrtf(2.0f * m->dims.L) : 0.02f;
        bool ones = t == LN1W || t == LN2W || t == LNFW;
        float* w = host + m->offset[t];
        #pragma omp parallel for
        for (int64_t i = 0; i < m->size[t]; i++)
            w[i] = tensor_is_matrix(t) ? scale * (float)gaussian(seed, m->offset[t] + i) : ones ? 1.0f : 0.0f;
    }
}

// The one place that says which attention a layer uses.
static Phase attention_kind(const Model* m, int l, Phase phase) {
    return lighthouse_built && phase == LIGHTHOUSE && m->lighthouse_layer[l] ? LIGHTHOUSE : DENSE;
}

// Rows of the logits made at a time: about 128 MiB, never the whole sequence's.
static int64_t head_rows(const Model* m, int64_t rows) {
    int64_t chunk = (128ll << 20) / ((int64_t)m->dims.Vp * sizeof(floatX)) / 128 * 128;
    if (chunk < 128) chunk = 128;
    return rows < chunk ? rows : chunk;
}

// Places the activations of a pass in the arena. A tensor that the recompute level keeps gets its own place in every layer;
// one that it does not keep is placed once, for layer 0, and shared.
static void activations_layout(Activations* a, Arena* arena, const Model* m, Run r) {
    const Dims* d = &m->dims;
    int64_t N = r.B * r.T, C = d->C, NH = d->NH;
    const LighthouseShape* s = &m->shape;
    int64_t entries = r.B * NH * s->off[s->levels], slots = r.B * s->S;
    bool any_lighthouse = false, any_dense = false;
    for (int l = 0; l < d->L; l++) (attention_kind(m, l, r.phase) == LIGHTHOUSE ? any_lighthouse : any_dense) = true;
    int level = r.train ? r.recompute : 5;  // 5: nothing is kept

    LayerActs shared;
    memset(&shared, 0, sizeof shared);
    floatX* ping_pong = NULL;
    if (!r.train) ping_pong = TAKE(arena, floatX, N * C);
    if (level >= 1) shared.gelu = TAKE(arena, floatX, N * 4 * C);
    if (level >= 2) {
        shared.ln1 = TAKE(arena, floatX, N * C);
        shared.ln2 = TAKE(arena, floatX, N * C);
        if (any_lighthouse) shared.lh.slots = TAKE(arena, floatX, slots * 3 * C);
        if (any_lighthouse || level >= 4) shared.att = TAKE(arena, floatX, N * C);
    }
    if (level >= 3) {
        shared.qkv = TAKE(arena, floatX, N * 3 * C);
        shared.x2 = TAKE(arena, floatX, N * C);
        shared.fch = TAKE(arena, floatX, N * 4 * C);
    }
    if (level >= 4 && any_dense) shared.stats = TAKE(arena, float, N * NH);
    if (any_lighthouse) {
        shared.lh.scores = TAKE(arena, float, 2 * entries);
        shared.lh.slot = TAKE(arena, int32_t, entries);
        if (r.train) {
            shared.lh.dslots = TAKE(arena, floatX, slots * 3 * C);
            shared.lh.dattn = TAKE(arena, floatX, slots * C);
        }
    }
    for (int l = 0; l < d->L; l++) {
        LayerActs* y = &a->layer[l];
        bool lighthouse = attention_kind(m, l, r.phase) == LIGHTHOUSE;
        if (!r.train && l > 0) {  // every layer uses the buffers of the first; the residual stream alternates
            *y = a->layer[0];
            y->x = l % 2 ? ping_pong : a->layer[0].x;
            y->stats = a->layer[0].stats;
            continue;
        }
        *y = shared;
        y->x = TAKE(arena, floatX, N * C);
        y->ln1_mean = TAKE(arena, float, N);
        y->ln1_rstd = TAKE(arena, float, N);
        y->ln2_mean = TAKE(arena, float, N);
        y->ln2_rstd = TAKE(arena, float, N);
        if (level < 1) y->gelu = TAKE(arena, floatX, N * 4 * C);
        if (level < 2) {
            y->ln1 = TAKE(arena, floatX, N * C);
            y->ln2 = TAKE(arena, floatX, N * C);
            if (lighthouse) y->lh.slots = TAKE(arena, floatX, slots * 3 * C);
        }
        if (level < (lighthouse ? 2 : 4)) y->att = TAKE(arena, floatX, N * C);
        if (level < 3) {
            y->qkv = TAKE(arena, floatX, N * 3 * C);
            y->x2 = TAKE(arena, floatX, N * C);
            y->fch = TAKE(arena, floatX, N * 4 * C);
        }
        if (level < 4 && !lighthouse) y->stats = TAKE(arena, float, N * NH);
        if (lighthouse || (!r.train && any_lighthouse)) {  // S rows, not T: always kept
            y->lh.attn = TAKE(arena, floatX, slots * C);
            y->lh.stats = TAKE(arena, float, slots * NH);
            y->lh.index = TAKE(arena, int32_t, slots * NH);
        }
    }
    a->x_final = r.train ? TAKE(arena, floatX, N * C) : d->L % 2 ? ping_pong : a->layer[0].x;
    a->lnf = TAKE(arena, floatX, N * C);
    a->lnf_mean = TAKE(arena, float, N);
    a->lnf_rstd = TAKE(arena, float, N);
    a->logits = TAKE(arena, floatX, head_rows(m, N) * d->Vp);
    a->losses = TAKE(arena, float, N);
    if (r.train) {
        a->dres = TAKE(arena, floatX, N * C);
        a->dbtc = TAKE(arena, floatX, N * C);
        a->dwide = TAKE(arena, floatX, N * 4 * C);
    }
}

static size_t activations_bytes(const Model* m, Run r) {
    static Activations a;
    Arena count = {NULL, 0};
    activations_layout(&a, &count, m, r);
    return count.used;
}

// The forward pass of block l, from layer[l].x to x_next. With again, only what the backward pass needs and the recompute
// level did not keep: the same operations on the same numbers, so the same bits.
static void block_forward(Model* m, int l, Run r, floatX* x_next, bool again) {
    const Dims* d = &m->dims;
    int64_t N = r.B * r.T;
    int C = d->C, D = d->C / d->NH;
    LayerActs* y = &m->acts.layer[l];
    bool lighthouse = attention_kind(m, l, r.phase) == LIGHTHOUSE;
    #define NEEDED(level) (!again || r.recompute >= (level))
    if (NEEDED(2)) layernorm_forward(y->ln1, y->ln1_mean, y->ln1_rstd, y->x, weight(m, LN1W, l), weight(m, LN1B, l), N, C);
    if (NEEDED(3)) {
        matmul_forward(y->qkv, y->ln1, weight(m, QKVW, l), weight(m, QKVB, l), NULL, N, C, 3 * C);
        if (d->rope && !lighthouse) rope_rotate(y->qkv, m->rope, +1, r.B, r.T, d->NH, D);
    }
    if (lighthouse) lighthouse_forward(y->att, &y->lh, y->qkv, m->rope, r.B, &m->shape, again, NEEDED(2));
    else if (NEEDED(4)) sdpa_forward(y->att, y->stats, y->qkv, r.B, r.T, d->NH, D);
    if (NEEDED(3)) matmul_forward(y->x2, y->att, weight(m, ATTPROJW, l), weight(m, ATTPROJB, l), y->x, N, C, C);
    if (NEEDED(2)) layernorm_forward(y->ln2, y->ln2_mean, y->ln2_rstd, y->x2, weight(m, LN2W, l), weight(m, LN2B, l), N, C);
    if (NEEDED(3)) matmul_forward(y->fch, y->ln2, weight(m, FCW, l), weight(m, FCB, l), NULL, N, C, 4 * C);
    if (NEEDED(1)) gelu_forward(y->gelu, y->fch, N * 4 * C);
    if (!again) matmul_forward(x_next, y->gelu, weight(m, FCPROJW, l), weight(m, FCPROJB, l), y->x2, N, 4 * C, C);
    #undef NEEDED
}

// dres comes in as the gradient of the block's output and leaves as that of its input.
static void block_backward(Model* m, int l, Run r) {
    const Dims* d = &m->dims;
    int64_t N = r.B * r.T;
    int C = d->C, D = d->C / d->NH;
    Activations* a = &m->acts;
    LayerActs* y = &a->layer[l];
    bool lighthouse = attention_kind(m, l, r.phase) == LIGHTHOUSE;
    if (r.recompute > 0 || lighthouse) block_forward(m, l, r, NULL, true);

    matmul_backward(a->dwide, gradient(m, FCPROJW, l), gradient(m, FCPROJB, l), a->dres, y->gelu, weight(m, FCPROJW, l),
                    N, 4 * C, C);
    gelu_backward(a->dwide, a->dwide, y->fch, N * 4 * C);
    matmul_backward(a->dbtc, gradient(m, FCW, l), gradient(m, FCB, l), a->dwide, y->ln2, weight(m, FCW, l), N, C, 4 * C);
    layernorm_backward(a->dres, gradient(m, LN2W, l), gradient(m, LN2B, l), a->dbtc, y->x2, weight(m, LN2W, l),
                       y->ln2_mean, y->ln2_rstd, N, C);

    matmul_backward(a->dbtc, gradient(m, ATTPROJW, l), gradient(m, ATTPROJB, l), a->dres, y->att, weight(m, ATTPROJW, l),
                    N, C, C);
    floatX* dqkv = a->dwide;
    if (lighthouse) {
        lighthouse_backward(dqkv, a->dbtc, &y->lh, m->rope, r.B, &m->shape);
    } else {
        sdpa_backward(dqkv, a->dbtc, y->qkv, y->att, y->stats, r.B, r.T, d->NH, D);
        if (d->rope) rope_rotate(dqkv, m->rope, -1, r.B, r.T, d->NH, D);
    }
    matmul_backward(a->dbtc, gradient(m, QKVW, l), gradient(m, QKVB, l), dqkv, y->ln1, weight(m, QKVW, l), N, C, 3 * C);
    layernorm_backward(a->dres, gradient(m, LN1W, l), gradient(m, LN1B, l), a->dbtc, y->x, weight(m, LN1W, l),
                       y->ln1_mean, y->ln1_rstd, N, C);
}

// From tokens to the final LayerNorm's output.
static void model_trunk(Model* m, const int* host_tokens, Run r) {
    const Dims* d = &m->dims;
    m->arena.used = 0;
    activations_layout(&m->acts, &m->arena, m, r);
    copy_to_device(m->tokens, host_tokens, r.B * r.T * sizeof(int));
    Activations* a = &m->acts;
    encoder_forward(a->layer[0].x, m->tokens, weight(m, WTE, 0), d->rope ? NULL : weight(m, WPE, 0), r.B, r.T, d->C, 0);
    for (int l = 0; l < d->L; l++) block_forward(m, l, r, l + 1 < d->L ? a->layer[l + 1].x : a->x_final, false);
    layernorm_forward(a->lnf, a->lnf_mean, a->lnf_rstd, a->x_final, weight(m, LNFW, 0), weight(m, LNFB, 0), r.B * r.T, d->C);
}

// The head and its cross-entropy, chunk by chunk; with r.train the gradients too, in the same pass, each row's loss with
// the weight dloss. Leaves the gradient of lnf in dbtc. Returns the sum of the losses of the rows with a target >= 0.
static double model_head(Model* m, const int* host_targets, Run r, float dloss) {
    const Dims* d = &m->dims;
    Activations* a = &m->acts;
    int64_t N = r.B * r.T, chunk = head_rows(m, N);
    copy_to_device(m->targets, host_targets, N * sizeof(int));
    for (int64_t i = 0; i < N; i += chunk) {
        int64_t rows = N - i < chunk ? N - i : chunk;
        floatX* x = a->lnf + i * d->C;
        matmul_forward(a->logits, x, weight(m, WTE, 0), NULL, NULL, rows, d->C, d->Vp);
        crossentropy_forward_backward(a->logits, a->losses + i, m->targets + i, dloss, rows, d->V, d->Vp, r.train);
        if (r.train)
            matmul_backward(a->dbtc + i * d->C, gradient(m, WTE, 0), NULL, a->logits, x, weight(m, WTE, 0), rows, d->C, d->Vp);
    }
    return sum_losses(a->losses, N);
}

static void model_backward(Model* m, Run r) {
    const Dims* d = &m->dims;
    Activations* a = &m->acts;
    int64_t N = r.B * r.T;
    device_zero(a->dres, N * d->C * sizeof(floatX));
    layernorm_backward(a->dres, gradient(m, LNFW, 0), gradient(m, LNFB, 0), a->dbtc, a->x_final, weight(m, LNFW, 0),
                       a->lnf_mean, a->lnf_rstd, N, d->C);
    for (int l = d->L - 1; l >= 0; l--) block_backward(m, l, r);
    encoder_backward(gradient(m, WTE, 0), d->rope ? NULL : gradient(m, WPE, 0), a->dres, m->tokens, r.B, r.T, d->C, 0, d->Vp);
}

// One micro-step: adds the gradients of sum(loss) * dloss to grads and returns sum(loss).
static double model_micro_step(Model* m, const int* tokens, const int* targets, Run r, float dloss) {
    model_trunk(m, tokens, r);
    double loss = model_head(m, targets, r, dloss);
    model_backward(m, r);
    return loss;
}

// Logits of `rows` rows from row `first` on, of the last trunk, to host memory: (rows, V).
static void model_logits(Model* m, int64_t first, int64_t rows, float* host) {
    const Dims* d = &m->dims;
    floatX* chunk = (floatX*)host_alloc((size_t)d->Vp * sizeof(floatX));
    for (int64_t i = 0; i < rows; i++) {
        matmul_forward(m->acts.logits, m->acts.lnf + (first + i) * d->C, weight(m, WTE, 0), NULL, NULL, 1, d->C, d->Vp);
        copy_to_host(chunk, m->acts.logits, d->Vp * sizeof(floatX));
        for (int v = 0; v < d->V; v++) host[i * d->V + v] = (float)chunk[v];
    }
    free(chunk);
}

// Floating-point operations of a step over `tokens` tokens, forward and backward (twice the forward), nothing recomputed:
// the matrices, and the causal half of the attention square, over S slots in a Lighthouse layer.
static double step_flops(const Model* m, Phase phase, int64_t T, double tokens) {
    const Dims* d = &m->dims;
    double matrices = (double)d->Vp * d->C + 12.0 * d->L * d->C * d->C, attention = 0;
    for (int l = 0; l < d->L; l++) {
        double rows = attention_kind(m, l, phase) == LIGHTHOUSE ? (double)m->shape.S : (double)T;
        attention += rows * rows * d->C;
    }
    return 6 * matrices * tokens + 6 * attention * (tokens / T);
}

// ---- the memory plan: everything that the run will ever take, both phases', before anything is taken

struct Plan {
    const char* name[16];
    size_t bytes[16], total;
    int parts;
};

static void plan_add(Plan* p, const char* name, size_t bytes) {
    p->name[p->parts] = name;
    p->bytes[p->parts++] = bytes;
    p->total += bytes;
}

struct Passes {  // every kind of pass of the run
    Run run[8];
    int count;
};

static Passes run_passes(const Model* m, const Config* c, int64_t sample_T, int recompute, int B) {
    Passes p = {{}, 0};
    for (int phase = LIGHTHOUSE; phase <= DENSE; phase++) {
        if (phase == LIGHTHOUSE && !m->has_lighthouse) continue;
        p.run[p.count++] = {B, c->seq_len, (Phase)phase, true, recompute};
        p.run[p.count++] = {B, c->seq_len, (Phase)phase, false, 0};
    }
    if (sample_T) p.run[p.count++] = {1, sample_T, DENSE, false, 0};
    return p;
}

static size_t rope_table_bytes(int64_t T, int D) { return (size_t)(1024 + ceil_div(T, 1024)) * (D / 2) * 2 * sizeof(float); }

static Plan memory_plan(const Model* m, const Config* c, int64_t sample_T, int recompute, int B) {
    Plan p;
    memset(&p, 0, sizeof p);
    int64_t n = m->parameters;
    plan_add(&p, "parameters", n * sizeof(floatX));
    if (sizeof(floatX) != sizeof(float)) plan_add(&p, "fp32 masters", n * sizeof(float));
    plan_add(&p, "gradients", n * sizeof(float));
    plan_add(&p, "AdamW moments", 2 * n * sizeof(float));
    if (m->dims.rope) plan_add(&p, "rotary table", rope_table_bytes(c->seq_len, m->dims.C / m->dims.NH));
    plan_add(&p, "tokens", 2 * (size_t)B * c->seq_len * sizeof(int));
    Passes passes = run_passes(m, c, sample_T, recompute, B);
    size_t activations = 0;
    for (int i = 0; i < passes.count; i++) {
        size_t bytes = activations_bytes(m, passes.run[i]);
        if (bytes > activations) activations = bytes;
    }
    plan_add(&p, "activations", activations);
    return p;
}

static size_t plan_part(const Plan* p, const char* name) {
    for (int i = 0; i < p->parts; i++) if (!strcmp(p->name[i], name)) return p->bytes[i];
    return 0;
}

static void model_allocate(Model* m, const Config* c, const Plan* p) {
    int64_t n = m->parameters;
    m->params = (floatX*)device_alloc(n * sizeof(floatX));
    m->master = sizeof(floatX) == sizeof(float) ? (float*)m->params : (float*)device_alloc(n * sizeof(float));
    m->grads = (float*)device_alloc(n * sizeof(float));
    m->m = (float*)device_alloc(n * sizeof(float));
    m->v = (float*)device_alloc(n * sizeof(float));
    size_t batch = (size_t)c->batch_size * c->seq_len;
    m->tokens = (int*)device_alloc(batch * sizeof(int));
    m->targets = (int*)device_alloc(batch * sizeof(int));
    m->host_tokens = (int*)host_alloc(2 * batch * sizeof(int));
    m->arena.base = (char*)device_alloc(plan_part(p, "activations"));
    if (m->dims.rope) {
        int D = m->dims.C / m->dims.NH;
        size_t bytes = rope_table_bytes(c->seq_len, D);
        float* table = (float*)host_alloc(bytes);
        rope_table(table, c->seq_len, D, m->dims.theta);
        m->rope = (float*)device_alloc(bytes);
        copy_to_device(m->rope, table, bytes);
        free(table);
    }
}

// ===================================================================================================================
// 8. Optimizer: AdamW, gradient clipping, learning-rate schedules, outlier detection.

static double learning_rate(const Config* c, int64_t step, int64_t steps) {
    int64_t warmup = c->warmup_steps < 0 ? steps / 50 : c->warmup_steps;
    double peak = c->learning_rate, final = peak * c->final_lr_frac;
    if (step < warmup) return peak * (step + 1) / warmup;
    int64_t rest = steps - warmup;
    double done = rest > 0 ? (double)(step - warmup) / rest : 1;  // 0..1 after the warmup
    if (done > 1) done = 1;
    if (!strcmp(c->lr_schedule, "constant")) return peak;
    if (!strcmp(c->lr_schedule, "linear")) return peak + (final - peak) * done;
    if (!strcmp(c->lr_schedule, "cosine")) return final + (peak - final) * 0.5 * (1 + cos(M_PI * done));
    int64_t decay = (int64_t)(c->decay_frac * steps);  // wsd: 1 - sqrt over the last steps (arXiv 2405.18392)
    if (decay == 0 || step < steps - decay) return peak;
    return final + (peak - final) * (1 - sqrt((double)(step - (steps - decay)) / decay));
}

// The last values of a quantity, to tell how far out a new one lies.
static const int DETECTOR_WINDOW = 128;
struct Detector {
    double values[DETECTOR_WINDOW];
    int64_t seen;
};

// The z-score of x against the window, 0 while that is not full; then x joins the window.
static double detector_score(Detector* d, double x) {
    double z = 0;
    if (d->seen >= DETECTOR_WINDOW) {
        double mean = 0, var = 0;
        for (int i = 0; i < DETECTOR_WINDOW; i++) mean += d->values[i] / DETECTOR_WINDOW;
        for (int i = 0; i < DETECTOR_WINDOW; i++) var += (d->values[i] - mean) * (d->values[i] - mean) / DETECTOR_WINDOW;
        z = (x - mean) / sqrt(var > 1e-24 ? var : 1e-24);
    }
    if (isfinite(x)) d->values[d->seen++ % DETECTOR_WINDOW] = x;
    return z;
}

// One AdamW update; `update` counts from 1. Weight decay falls on the matrices only.
static void model_update(Model* m, const Config* c, double lr, double grad_scale, int64_t update) {
    for (int t = 0; t < TENSORS; t++) {
        int64_t i = m->offset[t];
        if (m->size[t] == 0) continue;
        adamw_update(m->params + i, sizeof(floatX) == sizeof(float) ? NULL : m->master + i, m->m + i, m->v + i, m->grads + i,
                     m->size[t], lr, c->beta1, c->beta2, 1 - pow(c->beta1, update), 1 - pow(c->beta2, update), c->adam_eps,
                     tensor_is_matrix(t) ? c->weight_decay : 0, grad_scale);
    }
}

// ===================================================================================================================
// 9. Checkpoints. Two kinds of file:
// - a model file, llm.c's: 256 int32 header, then the tensors in the order of enum Tensor. Versions 3 (fp32) and 5 (bf16);
//   RoPE models have 103 and 105, no WPE, and the bits of theta in header[8]. header[9] is the step.
// - a checkpoint, the state of a run: header (4096 bytes) | RunState | checksum of each 16 MiB of the body | body. The body is
//   the fp32 weights, first and second moments, by parameter offset and not by process, so any number of processes reads it.
// Files are written beside, fsynced and renamed, so a file with its final name is whole unless the disk failed.

static const int CHECKPOINT_MAGIC = 20260511, CHECKPOINT_VERSION = 1, MODEL_MAGIC = 20240326;
static const int64_t CHUNK = 16 << 20;

struct RunState {
    int64_t step, sequences, updates;  // done so far; sequences is the position in the data
    double train_s, wall_s;            // seconds inside training steps; and of everything
    int64_t phase_steps[2];
    double phase_s[2];
    Detector loss, norm;
    int64_t seq_len, total_batch, windows, seed, shuffle;  // what must not change in a resume
    uint64_t data;                                         // loader_fingerprint
};

struct CheckpointHeader {
    int32_t magic, version;
    char reserved[1016];
    int32_t model[256];        // at byte 1024: a model file's header
    int64_t weights_offset;    // at byte 2048
    int64_t parameters;
    int64_t file_bytes, state_bytes, chunks;
    uint64_t state_checksum;   // of RunState and the chunk table
    char padding[4096 - 2048 - 6 * 8 - 8];
    uint64_t header_checksum;  // of the bytes before it
};
static_assert(sizeof(CheckpointHeader) == 4096, "the header is 4096 bytes");
static_assert(offsetof(CheckpointHeader, weights_offset) == 2048, "the weights' offset is at byte 2048");

static void model_header(int32_t* h, const Dims* d, int64_t step) {
    memset(h, 0, 256 * sizeof(int32_t));
    h[0] = MODEL_MAGIC; h[1] = d->rope ? 103 : 3;
    h[2] = (int32_t)d->maxT; h[3] = d->V; h[4] = d->L; h[5] = d->NH; h[6] = d->C; h[7] = d->Vp;
    if (d->rope) memcpy(&h[8], &d->theta, sizeof(float));
    h[9] = (int32_t)step;
}

// The state and the chunks' checksums behind a checkpoint's header, to be freed, into *front. Returns NULL or what is wrong.
static char* checkpoint_front(int fd, const char* path, const CheckpointHeader* h, char** front) {
    size_t bytes = h->state_bytes + h->chunks * 8;
    *front = (char*)host_alloc(bytes);
    read_at(fd, *front, bytes, sizeof *h, path);
    return h->state_checksum == checksum(*front, bytes) ? NULL : text("%s is damaged: wrong checksum of the run's state", path);
}

// Reads and checks chunk i of a checkpoint's body. Returns NULL or what is wrong.
static char* checkpoint_chunk(int fd, const char* path, const CheckpointHeader* h, const char* front, int64_t i, char* buffer,
                              int64_t* bytes) {
    int64_t body = h->file_bytes - h->weights_offset, at = h->weights_offset + i * CHUNK;
    *bytes = body - i * CHUNK < CHUNK ? body - i * CHUNK : CHUNK;
    uint64_t sum;
    memcpy(&sum, front + h->state_bytes + 8 * i, 8);
    read_at(fd, buffer, *bytes, at, path);
    return sum == checksum(buffer, *bytes) ? NULL : text("%s is damaged: wrong checksum of bytes %lld to %lld", path, (long long)at,
                                                         (long long)(at + *bytes));
}

// Reads and checks the header of a model file or checkpoint. Returns where the weights begin; *bf16: 2-byte weights.
static int64_t model_file_open(const char* path, int* fd, Dims* d, bool* bf16) {
    *fd = open_to_read(path);
    CheckpointHeader c;
    int32_t h[256];
    if (file_size(*fd, path) < (int64_t)sizeof h) fatal("%s is no model file: it has %lld bytes, less than a header's 1024", path,
                                                        (long long)file_size(*fd, path));
    read_at(*fd, h, sizeof h, 0, path);
    int64_t offset = sizeof h;
    if (h[0] == CHECKPOINT_MAGIC) {
        read_at(*fd, &c, sizeof c, 0, path);
        if (c.header_checksum != checksum(&c, sizeof c - 8)) fatal("%s: the header's checksum is wrong: the file is damaged", path);
        if (file_size(*fd, path) != c.file_bytes) fatal("%s is cut: %lld bytes of %lld", path, (long long)file_size(*fd, path),
                                                        (long long)c.file_bytes);
        memcpy(h, c.model, sizeof h);
        offset = c.weights_offset;
    }
    if (h[0] != MODEL_MAGIC || (h[1] != 3 && h[1] != 5 && h[1] != 103 && h[1] != 105))
        fatal("%s is no model file: magic %d, version %d; expected %d and version 3, 5, 103 or 105", path, h[0], h[1], MODEL_MAGIC);
    *bf16 = h[1] % 100 == 5;
    *d = {h[2], h[3], h[7], h[4], h[5], h[6], h[1] > 100, 0};
    if (d->rope) memcpy(&d->theta, &h[8], sizeof(float));
    if (d->maxT < 1 || d->V < 1 || d->Vp < d->V || d->L < 1 || d->L > MAX_LAYERS || d->NH < 1 || d->C < 1 || d->C % d->NH)
        fatal("%s: impossible sizes in the header: T %lld, V %d, padded %d, layers %d, heads %d, channels %d", path,
              (long long)d->maxT, d->V, d->Vp, d->L, d->NH, d->C);
    Model m;
    model_layout(&m, *d);
    int64_t expected = offset + m.parameters * (*bf16 ? 2 : 4);
    if (h[0] == MODEL_MAGIC && offset == sizeof h && file_size(*fd, path) != expected)
        fatal("%s: %lld bytes, but a model of its header's sizes has %lld: it is cut, or of another program", path,
              (long long)file_size(*fd, path), (long long)expected);
    return offset;
}

static void params_from_host(Model* m, const float* host) {
    copy_to_device(m->master, host, m->parameters * sizeof(float));
    if ((void*)m->master == (void*)m->params) return;
    floatX* rounded = (floatX*)host_alloc(m->parameters * sizeof(floatX));
    #pragma omp parallel for
    for (int64_t i = 0; i < m->parameters; i++) rounded[i] = (floatX)host[i];
    copy_to_device(m->params, rounded, m->parameters * sizeof(floatX));
    free(rounded);
}

// The weights of a model file or checkpoint whose sizes are the model's.
static void model_load(Model* m, const char* path) {
    int fd;
    Dims d;
    bool bf16;
    int64_t offset = model_file_open(path, &fd, &d, &bf16), n = m->parameters;
    float* host = (float*)host_alloc(n * sizeof(float));
    CheckpointHeader h;
    read_at(fd, &h.magic, sizeof h.magic, 0, path);
    if (h.magic == CHECKPOINT_MAGIC) {
        read_at(fd, &h, sizeof h, 0, path);
        char *front, *buffer = (char*)host_alloc(CHUNK), *why = checkpoint_front(fd, path, &h, &front);
        int64_t bytes, all = n * sizeof(float);
        for (int64_t i = 0; !why && i * CHUNK < all; i++) {
            why = checkpoint_chunk(fd, path, &h, front, i, buffer, &bytes);
            memcpy((char*)host + i * CHUNK, buffer, all - i * CHUNK < bytes ? all - i * CHUNK : bytes);
        }
        if (why) fatal("%s", why);
        free(front); free(buffer);
    } else read_at(fd, host, n * (bf16 ? 2 : 4), offset, path);
    if (bf16) {  // widen from the end, in place: a bf16 is the upper half of a float
        for (int64_t i = n - 1; i >= 0; i--) {
            uint32_t bits = (uint32_t)((uint16_t*)host)[i] << 16;
            memcpy(&host[i], &bits, 4);
        }
    }
    close(fd);
    params_from_host(m, host);
    free(host);
}

// A file on its way to its final name.
struct NewFile {
    char *path, *partial;
    int fd;
};

static NewFile new_file(const char* path) {
    NewFile f = {text("%s", path), text("%s.partial", path), -1};
    f.fd = open(f.partial, O_RDWR | O_CREAT | O_TRUNC, 0666);
    if (f.fd < 0) fatal("cannot write %s: %s", f.partial, strerror(errno));
    return f;
}

static void new_file_write(NewFile* f, const void* data, size_t bytes, int64_t offset) {
    if (write_at(f->fd, data, bytes, offset)) return;
    int why = errno;
    unlink(f->partial);
    fatal("writing %s at byte %lld: %s. Earlier checkpoints are untouched; make room and resume", f->partial, (long long)offset,
          strerror(why));
}

static void new_file_finish(NewFile* f) {
    if (fsync(f->fd) || close(f->fd) || rename(f->partial, f->path)) {
        int why = errno;
        unlink(f->partial);
        fatal("finishing %s: %s. Earlier checkpoints are untouched", f->path, strerror(why));
    }
    char* slash = strrchr(f->path, '/');
    char* dir = slash ? text("%.*s", (int)(slash - f->path), f->path) : text(".");
    int fd = open(*dir ? dir : "/", O_RDONLY);
    if (fd >= 0) { fsync(fd); close(fd); }
    free(dir); free(f->path); free(f->partial);
}

// The plain dense model file: what llm.c and scripts/export_hf read.
static void model_write(const Model* m, const char* path, int64_t step) {
    int32_t header[256];
    model_header(header, &m->dims, step);
    NewFile f = new_file(path);
    new_file_write(&f, header, sizeof header, 0);
    char* buffer = (char*)host_alloc(CHUNK);
    int64_t bytes = m->parameters * sizeof(float);
    for (int64_t i = 0; i < bytes; i += CHUNK) {
        int64_t n = bytes - i < CHUNK ? bytes - i : CHUNK;
        copy_to_host(buffer, (char*)m->master + i, n);
        new_file_write(&f, buffer, n, sizeof header + i);
    }
    free(buffer);
    new_file_finish(&f);
}

// The body's bytes [i, i + n) lie in one of three arrays; a chunk may span two.
static void checkpoint_body(const Model* m, char* host, int64_t i, int64_t n, bool write_to_device) {
    int64_t section = m->parameters * sizeof(float);
    char* arrays[3] = {(char*)m->master, (char*)m->m, (char*)m->v};
    while (n > 0) {
        int64_t at = i % section, part = section - at < n ? section - at : n;
        char* device = arrays[i / section] + at;
        if (write_to_device) copy_to_device(device, host, part);
        else copy_to_host(host, device, part);
        i += part; n -= part; host += part;
    }
}

static int64_t checkpoint_bytes(const Model* m) {
    int64_t body = 3 * m->parameters * sizeof(float);
    return ceil_div(sizeof(CheckpointHeader) + sizeof(RunState) + ceil_div(body, CHUNK) * 8, 4096) * 4096 + body;
}

static void checkpoint_write(const Model* m, const char* path, const RunState* state) {
    int64_t body = 3 * m->parameters * sizeof(float);
    CheckpointHeader h;
    memset(&h, 0, sizeof h);
    h.magic = CHECKPOINT_MAGIC; h.version = CHECKPOINT_VERSION;
    model_header(h.model, &m->dims, state->step);
    h.parameters = m->parameters;
    h.file_bytes = checkpoint_bytes(m);
    h.weights_offset = h.file_bytes - body;
    h.state_bytes = sizeof(RunState);
    h.chunks = ceil_div(body, CHUNK);
    size_t front_bytes = sizeof(RunState) + h.chunks * 8;
    char* front = (char*)host_alloc(front_bytes);
    memcpy(front, state, sizeof(RunState));
    char* buffer = (char*)host_alloc(CHUNK);
    NewFile f = new_file(path);
    for (int64_t i = 0; i < h.chunks; i++) {
        int64_t n = body - i * CHUNK < CHUNK ? body - i * CHUNK : CHUNK;
        checkpoint_body(m, buffer, i * CHUNK, n, false);
        uint64_t sum = checksum(buffer, n);
        memcpy(front + sizeof(RunState) + 8 * i, &sum, 8);
        new_file_write(&f, buffer, n, h.weights_offset + i * CHUNK);
    }
    h.state_checksum = checksum(front, front_bytes);
    h.header_checksum = checksum(&h, sizeof h - 8);
    new_file_write(&f, front, front_bytes, sizeof h);
    new_file_write(&f, &h, sizeof h, 0);
    new_file_finish(&f);
    free(front); free(buffer);
}

// Reads a checkpoint into the model and the state. Returns NULL, or a sentence on why the file cannot be used, with
// nothing of the state changed; the weights may then be partly overwritten.
static char* checkpoint_read(Model* m, const char* path, RunState* state) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return text("%s: %s", path, strerror(errno));
    CheckpointHeader h;
    char *front = NULL, *buffer = NULL, *why = NULL;
    int64_t size = file_size(fd, path);
    if (size < (int64_t)sizeof h) why = text("%s is cut: %lld bytes, less than a header", path, (long long)size);
    if (!why) read_at(fd, &h, sizeof h, 0, path);
    if (!why && (h.magic != CHECKPOINT_MAGIC || h.version != CHECKPOINT_VERSION))
        why = text("%s is no checkpoint of this program: magic %d, version %d; expected %d, %d", path, h.magic, h.version,
                   CHECKPOINT_MAGIC, CHECKPOINT_VERSION);
    if (!why && h.header_checksum != checksum(&h, sizeof h - 8)) why = text("%s is damaged: wrong checksum of the header", path);
    if (!why && size != h.file_bytes)
        why = text("%s is cut: %lld bytes of %lld", path, (long long)size, (long long)h.file_bytes);
    int32_t want[256];
    model_header(want, &m->dims, h.model[9]);
    if (!why && (memcmp(want, h.model, sizeof want) || h.parameters != m->parameters || h.state_bytes != sizeof(RunState)))
        fatal("%s holds another model: T %d, V %d, layers %d, heads %d, channels %d, %s positions; this run's has T %lld, V %d, "
              "layers %d, heads %d, channels %d, %s (and the same theta): use the same options, or --model %s in another out-dir "
              "to start from its weights", path, h.model[2], h.model[3], h.model[4], h.model[5], h.model[6],
              h.model[1] > 100 ? "rope" : "learned", (long long)m->dims.maxT, m->dims.V, m->dims.L, m->dims.NH, m->dims.C,
              m->dims.rope ? "rope" : "learned", path);
    if (!why) {
        buffer = (char*)host_alloc(CHUNK);
        why = checkpoint_front(fd, path, &h, &front);
        for (int64_t i = 0, n; !why && i < h.chunks; i++) {
            why = checkpoint_chunk(fd, path, &h, front, i, buffer, &n);
            if (!why) checkpoint_body(m, buffer, i * CHUNK, n, true);
        }
        if (!why) memcpy(state, front, sizeof(RunState));
    }
    free(front); free(buffer);
    close(fd);
    return why;
}

static int compare_steps(const void* a, const void* b) {
    int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Steps of the checkpoints in a directory, newest first; to be freed.
static int64_t* checkpoint_list(const char* dir, int* count) {
    int64_t* steps = NULL;
    *count = 0;
    DIR* d = opendir(dir);
    for (struct dirent* e; d && (e = readdir(d));) {
        long long step;
        if (sscanf(e->d_name, "ckpt_%lld.bin", &step) != 1 || step < 0) continue;
        char name[64];
        snprintf(name, sizeof name, "ckpt_%08lld.bin", step);
        if (strcmp(name, e->d_name)) continue;
        steps = (int64_t*)realloc(steps, (*count + 1) * sizeof(int64_t));
        steps[(*count)++] = step;
    }
    if (d) closedir(d);
    if (steps) qsort(steps, *count, sizeof(int64_t), compare_steps);
    return steps;
}

static char* checkpoint_path(const Config* c, int64_t step) { return text("%s/ckpt_%08lld.bin", c->out_dir, (long long)step); }

// Later steps than the one just written can only be damaged files that the resume passed over: they do not count.
static void checkpoint_prune(const Config* c, int64_t written) {
    int count, later = 0;
    int64_t* steps = checkpoint_list(c->out_dir, &count);
    while (later < count && steps[later] > written) later++;
    for (int i = later; c->keep_last > 0 && i < count; i++) {
        if (i - later < c->keep_last || (c->keep_every && steps[i] % c->keep_every == 0)) continue;
        char* path = checkpoint_path(c, steps[i]);
        unlink(path);
        free(path);
    }
    free(steps);
}

// The newest whole checkpoint of out-dir, into the model and the state. Names and passes over damaged ones. Rank 0 reads
// the directory last to write to it, so all processes see the same files.
static bool checkpoint_resume(Model* m, const Config* c, RunState* state, char** path) {
    int count;
    int64_t* steps = checkpoint_list(c->out_dir, &count);
    bool found = false;
    for (int i = 0; i < count && !found; i++) {
        *path = checkpoint_path(c, steps[i]);
        char* why = checkpoint_read(m, *path, state);
        found = !why;
        if (why) say("warning: %s; trying the one before\n", why);
        free(why);
    }
    free(steps);
    if (count > 0 && !found) fatal("%s: none of the %d checkpoints is whole", c->out_dir, count);
    if (found && sizeof(floatX) != sizeof(float)) {
        float* host = (float*)host_alloc(m->parameters * sizeof(float));
        copy_to_host(host, m->master, m->parameters * sizeof(float));
        params_from_host(m, host);
        free(host);
    }
    return found;
}

// ===================================================================================================================
// 10. Evaluation and sampling; logs and progress.

// Mean loss over the validation data, each process taking every world-th sequence. A batch that is not full has its rest
// filled with targets of -1, which do not count.
static double evaluate(Model* m, const Config* c, const Loader* data, Phase phase) {
    Run r = {(int)c->batch_size, c->seq_len, phase, false, 0};
    int64_t T = c->seq_len, B = r.B;
    int64_t sequences = c->val_batches * B * procs.world;
    if (sequences > data->windows) sequences = data->windows;
    int *inputs = m->host_tokens, *targets = m->host_tokens + B * T;
    double sum = 0;
    for (int64_t i = 0; i < sequences; i += B * procs.world) {
        int64_t valid = 0;
        for (int64_t b = 0; b < B; b++) {
            int64_t sequence = i + b * procs.world + procs.rank;
            loader_sequence(data, sequence % data->windows, inputs + b * T, targets + b * T);
            if (sequence < sequences) valid++;
            else for (int64_t t = 0; t < T; t++) targets[b * T + t] = -1;
        }
        if (valid == 0) continue;
        model_trunk(m, inputs, r);
        sum += model_head(m, targets, r, 0);
    }
    return all_sum(sum) / ((double)sequences * T);
}

struct Tokenizer {
    int count, end_of_text;
    char** piece;  // (count) bytes of each token
    int* length;
};

static bool tokenizer_open(Tokenizer* k, const char* path, int V) {
    memset(k, 0, sizeof *k);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return false;
    int64_t size = file_size(fd, path), at = 1024;
    unsigned char* file = (unsigned char*)host_alloc(size < 1024 ? 1024 : size);
    read_at(fd, file, size, 0, path);
    close(fd);
    int32_t* h = (int32_t*)file;
    if (size < 1024 || h[0] != 20240328 || h[1] != 2)
        fatal("%s is no tokenizer file: magic %d, version %d; expected 20240328, 2", path, size < 8 ? 0 : h[0], size < 8 ? 0 : h[1]);
    k->count = h[2]; k->end_of_text = h[3];
    if (k->count < 1 || k->count > V || k->end_of_text < 0 || k->end_of_text >= k->count)
        fatal("%s: %d tokens, end of text %d; the model's vocabulary has %d ids", path, k->count, k->end_of_text, V);
    k->piece = (char**)host_alloc(k->count * sizeof(char*));
    k->length = (int*)host_alloc(k->count * sizeof(int));
    for (int i = 0; i < k->count; i++) {
        if (at >= size || at + 1 + file[at] > size) fatal("%s is cut: it ends inside token %d of %d", path, i, k->count);
        k->length[i] = file[at];
        k->piece[i] = (char*)file + at + 1;
        at += 1 + file[at];
    }
    return true;
}

static int tokenizer_find(const Tokenizer* k, const char* s, int n) {
    for (int i = 0; i < k->count; i++)
        if (i != k->end_of_text && k->length[i] == n && !memcmp(k->piece[i], s, n)) return i;
    return -1;
}

// Length of the next word as GPT-2 splits text: a run of letters, of digits or of other signs, each with one space before
// it; a contraction; or white space. Bytes above 127 count as letters.
static int word_length(const char* s) {
    #define KIND(ch) (isspace((unsigned char)(ch)) ? 0 : isalpha((unsigned char)(ch)) || (ch) & 0x80 ? 1 : isdigit((unsigned char)(ch)) ? 2 : 3)
    static const char* contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) if (!strncmp(s, contractions[i], strlen(contractions[i]))) return strlen(contractions[i]);
    int n = s[0] == ' ' && s[1] && KIND(s[1]) != 0;
    int kind = KIND(s[n]);
    int end = n + 1;
    while (s[end] && KIND(s[end]) == kind) end++;
    if (kind == 0 && s[end] && end > 1) end--;  // the last white space belongs to the next word
    return end;
    #undef KIND
}

// Byte-pair encoding with ids as ranks: in each word merge the pair whose joint token has the lowest id, until none does.
// Returns the number of tokens; -1 where a byte has no token.
static int tokenizer_encode(const Tokenizer* k, const char* s, int* out, int room) {
    int count = 0;
    while (*s) {
        int n = word_length(s), parts = n;
        int* start = (int*)host_alloc((n + 1) * sizeof(int));
        for (int i = 0; i <= n; i++) start[i] = i;
        while (parts > 1) {
            int best = -1, where = 0;
            for (int i = 0; i + 1 < parts; i++) {
                int id = tokenizer_find(k, s + start[i], start[i + 2] - start[i]);
                if (id >= 0 && (best < 0 || id < best)) { best = id; where = i; }
            }
            if (best < 0) break;
            memmove(start + where + 1, start + where + 2, (parts - where - 1) * sizeof(int));
            parts--;
        }
        for (int i = 0; i < parts && count < room; i++) {
            out[count] = tokenizer_find(k, s + start[i], start[i + 1] - start[i]);
            if (out[count++] < 0) { free(start); return -1; }
        }
        free(start);
        s += n;
    }
    return count;
}

// Length of the window that samples are drawn in: the prompt and the new tokens, to the next multiple of 64, at most T.
static int64_t sample_length(const Config* c) {
    if (c->sample_every == 0) return 0;
    int64_t want = ceil_div(1 + (int64_t)strlen(c->prompt) + c->sample_tokens, 64) * 64;
    return want < c->seq_len ? want : c->seq_len;
}

// Continues the prompt with dense attention, one whole forward pass a token. Returns the text, to be freed.
static char* sample(Model* m, const Config* c, const Tokenizer* k, int64_t step) {
    int64_t T = sample_length(c);
    int V = m->dims.V;
    Run r = {1, T, DENSE, false, 0};
    int* tokens = (int*)host_alloc(T * sizeof(int));
    float* logits = (float*)host_alloc(V * sizeof(float));
    float* sorted = (float*)host_alloc(V * sizeof(float));
    for (int64_t t = 0; t < T; t++) tokens[t] = k->end_of_text;
    int encoded = tokenizer_encode(k, c->prompt, tokens + 1, (int)T - 1);
    int64_t length = 1 + encoded, end = length + c->sample_tokens < T ? length + c->sample_tokens : T;
    char* out = text("%s", c->prompt);
    size_t out_length = strlen(out);
    for (; length < end; length++) {
        model_trunk(m, tokens, r);
        model_logits(m, length - 1, 1, logits);
        float threshold = -INFINITY;
        if (c->sample_top_k > 0 && c->sample_top_k < V) {  // the k-th largest, by partial selection
            memcpy(sorted, logits, V * sizeof(float));
            for (int64_t i = 0; i < c->sample_top_k; i++) {
                int64_t best = i;
                for (int v = (int)i + 1; v < V; v++) if (sorted[v] > sorted[best]) best = v;
                float swap = sorted[i]; sorted[i] = sorted[best]; sorted[best] = swap;
            }
            threshold = sorted[c->sample_top_k - 1];
        }
        double largest = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) if (logits[v] > largest) largest = logits[v];
        for (int v = 0; v < V; v++) sum += logits[v] >= threshold ? exp((logits[v] - largest) / c->temperature) : 0;
        double draw = uniform(c->seed ^ 0x5A4D504C45ull, step * 65536 + length) * sum;
        int next = -1;
        for (int v = 0; v < V; v++) {
            if (logits[v] < threshold) continue;
            draw -= exp((logits[v] - largest) / c->temperature);
            next = v;
            if (draw < 0) break;
        }
        if (next == k->end_of_text) break;
        tokens[length] = next;
        if (next >= k->count) continue;  // an id of the padding of a file that holds fewer tokens than the vocabulary
        out = (char*)realloc(out, out_length + k->length[next] + 1);
        for (int i = 0; i < k->length[next]; i++)  // a C string has no byte 0: 0xFF is no text either
            out[out_length + i] = k->piece[next][i] ? k->piece[next][i] : (char)0xFF;
        out_length += k->length[next];
        out[out_length] = 0;
    }
    free(tokens); free(logits); free(sorted);
    return out;
}

// ---- logs: main.log has llm.c's lines, log.jsonl one object per event; a resumed run appends

struct Logs {
    FILE *main, *jsonl;
    bool terminal;  // standard output is one: draw the bar
};

// Opens a log to append to. A last line that a crash or a full disk cut off is ended, so that it spoils no other.
static FILE* log_open(const char* path) {
    FILE* f = fopen(path, "a+");
    if (!f) fatal("cannot write %s: %s", path, strerror(errno));
    if (!fseek(f, -1, SEEK_END) && fgetc(f) != '\n') {
        fseek(f, 0, SEEK_END);  // between reading and writing
        fputc('\n', f);
    }
    return f;
}

static Logs logs_open(const Config* c) {
    Logs g = {NULL, NULL, false};
    if (procs.rank) return g;
    char *main_path = text("%s/main.log", c->out_dir), *json_path = text("%s/log.jsonl", c->out_dir);
    g.main = log_open(main_path);
    g.jsonl = log_open(json_path);
    g.terminal = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);  // under mpirun the first is one even when it ends in a file
    free(main_path); free(json_path);
    return g;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void log_line(FILE* f, const char* format, ...) {
    if (!f) return;
    va_list args;
    va_start(args, format);
    vfprintf(f, format, args);
    va_end(args);
    fputc('\n', f);
    if (fflush(f)) fatal("writing a log: %s", strerror(errno));
}

// A JSON string. Bytes that are no UTF-8 become U+FFFD: samples may cut a character.
static char* json_string(const char* s) {
    size_t n = strlen(s), w = 0;
    char* out = (char*)host_alloc(6 * n + 3);
    const unsigned char* p = (const unsigned char*)s;
    out[w++] = '"';
    while (*p) {
        int extra = *p >= 0xF0 && *p < 0xF5 ? 3 : *p >= 0xE0 && *p < 0xF0 ? 2 : *p >= 0xC2 && *p < 0xE0 ? 1 : 0;
        bool valid = *p < 0x80 || extra;
        for (int i = 1; i <= extra && valid; i++) valid = (p[i] & 0xC0) == 0x80;
        if (valid && extra >= 2)  // overlong forms, surrogates, beyond U+10FFFF
            valid = !(*p == 0xE0 && p[1] < 0xA0) && !(*p == 0xED && p[1] > 0x9F) && !(*p == 0xF0 && p[1] < 0x90) && !(*p == 0xF4 && p[1] > 0x8F);
        if (!valid) { w += sprintf(out + w, "\\ufffd"); p++; continue; }
        if (*p == '"' || *p == '\\') { out[w++] = '\\'; out[w++] = *p; }
        else if (*p < 0x20 || *p == 0x7F) w += sprintf(out + w, "\\u%04x", *p);
        else for (int i = 0; i <= extra; i++) out[w++] = p[i];
        p += extra + 1;
    }
    out[w++] = '"';
    out[w] = 0;
    return out;
}

static char* json_number(double x) { return isfinite(x) ? text("%.9g", x) : text("null"); }

static char* duration(double s) {
    int64_t n = (int64_t)(s + 0.5);
    return n >= 86400 ? text("%lldd%02lldh", (long long)(n / 86400), (long long)(n % 86400 / 3600))
                      : text("%lld:%02lld:%02lld", (long long)(n / 3600), (long long)(n % 3600 / 60), (long long)(n % 60));
}

static void progress_bar(const Logs* g, int64_t step, int64_t steps, const char* eta) {
    if (!g->terminal) return;
    char bar[41];
    int filled = steps ? (int)(40 * step / steps) : 40;
    for (int i = 0; i < 40; i++) bar[i] = i < filled ? '#' : '.';
    bar[40] = 0;
    printf("[%s] %3.0f%%  ETA %s", bar, steps ? 100.0 * step / steps : 100.0, eta);
    fflush(stdout);
}
static void progress_clear(const Logs* g) { if (g->terminal) printf("\r\033[K"); }

// ===================================================================================================================
// 11. Main: options, set-up, the loop.

static void print_help(const char* program) {
    printf("usage: %s [--option value | --option=value | -letter value] ...\n", program);
    printf("Pretrains a GPT-2-class model%s.\n", lighthouse_built ? ": Lighthouse attention up to the switch step, dense after it"
                                                                   : " with dense attention, the baseline of train_gpt_lighthouse");
    for (int i = 0; i < option_count; i++) {
        const Option* o = &options[i];
        const char* help = o->help;
        if (*help == '[') {
            const char* end = strchr(help, ']');
            printf("\n%.*s\n", (int)(end - help - 1), help + 1);
            help = end + 2;
        }
        char* name = text("--%s%s%s", o->name, *o->letter ? ", -" : "", o->letter);
        printf("  %-26s %s%s%s%s\n", name, help, o->type == OPT_FLAG ? "" : " (", o->type == OPT_FLAG ? "" : *o->fallback ? o->fallback : "none",
               o->type == OPT_FLAG ? "" : ")");
        free(name);
    }
}

static void set_option(Config* c, const Option* o, const char* value) {
    char* field = (char*)c + o->offset;
    if (o->type == OPT_TEXT) {
        *(const char**)field = value;
        return;
    }
    char* end;
    errno = 0;
    double x = strtod(value, &end);
    if (end == value || *end || errno || !isfinite(x)) fatal("--%s is \"%s\"; it must be a number. %s", o->name, value, o->help);
    if (o->type != OPT_REAL && x != floor(x)) fatal("--%s is %s; it must be a whole number. %s", o->name, value, o->help);
    if (x < o->min || x > o->max) fatal("--%s is %s; it must be %.12g to %.12g. %s", o->name, value, o->min, o->max, o->help);
    if (o->type == OPT_REAL) *(double*)field = x;
    else *(int64_t*)field = (int64_t)x;
}

static void parse_options(Config* c, int argc, char** argv) {
    for (int i = 0; i < option_count; i++) set_option(c, &options[i], options[i].fallback);
    if (!lighthouse_built) {
        c->switch_step = "0"; c->dense_layers = "all";
    }
    for (int i = 1; i < argc; i++) {
        const char* a = argv[i];
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            if (procs.rank == 0) print_help(argv[0]);
            processes_end();
            exit(0);
        }
        if (a[0] != '-') fatal("\"%s\" is no option: options begin with --; %s --help lists them", a, argv[0]);
        bool is_long = a[1] == '-';
        const char *name = a + (is_long ? 2 : 1), *equals = is_long ? strchr(name, '=') : NULL;
        size_t length = equals ? (size_t)(equals - name) : strlen(name);
        const Option* o = NULL;
        for (int j = 0; j < option_count && !o; j++) {
            const char* known = is_long ? options[j].name : options[j].letter;
            if (length && strlen(known) == length && !strncmp(known, name, length)) o = &options[j];
        }
        if (!o) fatal("unknown option %s; %s --help lists the options", a, argv[0]);
        option_given[o - options] = true;
        if (o->type == OPT_FLAG && equals) fatal("--%s takes no value", o->name);
        if (o->type == OPT_FLAG) set_option(c, o, "1");
        else if (equals) set_option(c, o, equals + 1);
        else if (i + 1 < argc) set_option(c, o, argv[++i]);
        else fatal("--%s needs a value. %s", o->name, o->help);
    }
    const char* schedules[] = {"cosine", "linear", "constant", "wsd"};
    bool known = false;
    for (int i = 0; i < 4; i++) known |= !strcmp(c->lr_schedule, schedules[i]);
    if (!known) fatal("--lr-schedule is \"%s\"; it must be cosine, linear, constant or wsd", c->lr_schedule);
    if (strcmp(c->positions, "rope") && strcmp(c->positions, "learned"))
        fatal("--positions is \"%s\"; it must be rope or learned", c->positions);
    if (!*c->out_dir) fatal("--out-dir is empty; it must be a directory");
}

static bool given(const char* name) {
    for (int i = 0; i < option_count; i++) if (!strcmp(options[i].name, name)) return option_given[i];
    return false;
}

// The model's sizes from a file's header, or from the descriptor, the explicit sizes and the data's largest token id.
static Dims choose_dims(const Config* c, int64_t largest_id, bool* from_file) {
    static const struct { const char* name; int layers, channels, heads; } descriptors[] = {
        {"d6", 6, 384, 6}, {"d12", 12, 768, 12}, {"d24", 24, 1024, 16}, {"d36", 36, 1280, 20}, {"d48", 48, 1600, 25},
        {"d60", 60, 1920, 30}, {"lh30", 30, 1024, 8}};
    int known = -1;
    for (int i = 0; i < 7; i++) if (!strcmp(c->model, descriptors[i].name)) known = i;
    Dims d;
    *from_file = known < 0;
    if (*from_file) {
        if (access(c->model, R_OK))
            fatal("--model is \"%s\": neither a readable file nor one of d6, d12, d24, d36, d48, d60, lh30", c->model);
        int fd;
        bool bf16;
        model_file_open(c->model, &fd, &d, &bf16);
        close(fd);
        if (c->depth || c->channels || c->heads || c->vocab_size)
            fatal("--depth, --channels, --heads and --vocab-size go with a descriptor; the sizes of %s are in the file", c->model);
        if (given("positions") && d.rope != !strcmp(c->positions, "rope"))
            fatal("--positions is %s, but %s has %s positions", c->positions, c->model, d.rope ? "rope" : "learned");
        if (!d.rope && c->seq_len > d.maxT)
            fatal("--seq-len is %lld, but %s has learned positions up to %lld", (long long)c->seq_len, c->model, (long long)d.maxT);
        if (d.rope) d.maxT = c->seq_len;
        if (d.rope && given("rope-theta")) d.theta = (float)c->rope_theta;
        return d;
    }
    d.L = c->depth ? (int)c->depth : descriptors[known].layers;
    d.C = c->channels ? (int)c->channels : descriptors[known].channels;
    d.NH = c->heads ? (int)c->heads : descriptors[known].heads;
    d.V = (int)c->vocab_size;
    if (d.V == 0) d.V = largest_id < 257 ? 257 : 50257;
    if (c->vocab_size == 0 && largest_id >= d.V) fatal("the data holds token ids up to %lld, more than GPT-2's 50257: give --vocab-size", (long long)largest_id);
    d.Vp = (d.V + 127) / 128 * 128;
    d.maxT = c->seq_len;
    d.rope = !strcmp(c->positions, "rope");
    d.theta = d.rope ? (float)c->rope_theta : 0;
    if (d.C % d.NH) fatal("--channels %d is not divisible by --heads %d", d.C, d.NH);
    if (d.rope && d.C / d.NH % 2) fatal("heads of %d channels: rotary positions need an even head size", d.C / d.NH);
    return d;
}

static int64_t parse_switch_step(const Config* c, int64_t steps) {
    char* end;
    const char* s = c->switch_step;
    double x = strtod(s, &end);
    bool share = strchr(s, '.') != NULL;
    if (end == s || *end || !(x >= 0) || (share && x > 1) || (!share && (x > steps || x != floor(x))))
        fatal("--switch-step is \"%s\"; it must be a step from 0 to the run's %lld, or with a point a share such as 0.625", s,
              (long long)steps);
    return share ? (int64_t)llround(x * steps) : (int64_t)x;
}

static void choose_lighthouse_layers(Model* m, const Config* c) {
    int L = m->dims.L;
    const char* s = c->dense_layers;
    int ends = L >= 12 ? 2 : L >= 3 ? 1 : 0;
    for (int l = 0; l < L; l++)
        m->lighthouse_layer[l] = !strcmp(s, "none") || (!strcmp(s, "auto") && l >= ends && l < L - ends) || isdigit((unsigned char)*s);
    if (isdigit((unsigned char)*s)) {
        while (*s) {
            char* end;
            long l = strtol(s, &end, 10);
            if (end == s || (*end && *end != ',') || l < 0 || l >= L)
                fatal("--dense-layers is \"%s\"; it must be layers from 0 to %d with commas between, none, all or auto", c->dense_layers, L - 1);
            m->lighthouse_layer[l] = false;
            s = *end ? end + 1 : end;
        }
    } else if (strcmp(s, "none") && strcmp(s, "auto") && strcmp(s, "all")) {
        fatal("--dense-layers is \"%s\"; it must be layers such as 0,1,10,11, none, all or auto", s);
    }
    m->has_lighthouse = false;
    for (int l = 0; l < L; l++) m->has_lighthouse |= m->lighthouse_layer[l];
}

// The rate of the device's own matrix product at this model's widest layer: what MFU is measured against. The weights
// themselves serve as random input: zeros would run faster than real data.
static double measure_device(Model* m, int64_t T) {
    int C = m->dims.C;
    int64_t N = (int64_t)m->dims.L * 4 * C, room = activations_bytes(m, {1, T, DENSE, false, 0});  // the arena is no smaller
    if (N > 8192) N = 8192;
    if (N > room / (int64_t)(4 * C * sizeof(floatX))) N = room / (4 * C * sizeof(floatX));
    double best = INFINITY, began = seconds();
    for (int i = 0; i < 4 || seconds() - began < 0.2; i++) {  // the first is a warm-up
        device_synchronize();
        double start = seconds();
        matmul_forward((floatX*)m->arena.base, weight(m, FCW, 0), weight(m, FCW, 0), NULL, NULL, N, C, 4 * C);
        device_synchronize();
        double t = seconds() - start;
        if (i > 0 && t < best) best = t;
    }
    return 2.0 * N * C * 4 * C / best;
}

static double gib(double bytes) { return bytes / (1024.0 * 1024 * 1024); }

// Chooses the recompute level if it is left to us and refuses what does not fit, with what would.
static Plan choose_plan(Model* m, Config* c, int64_t sample_T) {
    size_t room = device_memory_free();
    if (!strcmp(backend_name, "cpu")) room /= procs.world;
    Plan p;
    int B = (int)c->batch_size, first = c->recompute < 0 ? 0 : (int)c->recompute, last = c->recompute < 0 ? 4 : first;
    for (int level = first; level <= last; level++) {
        p = memory_plan(m, c, sample_T, level, B);
        c->recompute = level;
        if (p.total <= room) return p;
    }
    Plan least = memory_plan(m, c, sample_T, 4, B), single = memory_plan(m, c, sample_T, 4, 1);
    char* hint = least.total <= room ? text("--recompute 4 would fit (%.2f GiB)", gib(least.total))
               : single.total <= room ? text("--batch-size 1 --recompute 4 would fit (%.2f GiB)", gib(single.total))
               : text("even --batch-size 1 --recompute 4 takes %.2f GiB: lower --seq-len or take a smaller model", gib(single.total));
    fatal("this run takes %.2f GiB and %.2f GiB are free, %.2f GiB too few: %s", gib(p.total), gib(room), gib(p.total - room), hint);
}

struct Trainer {
    Config config;
    Model model;
    Loader train, val;
    bool has_val;
    Tokenizer tokenizer;
    RunState state;
    Logs logs;
    int64_t steps, switch_step, accumulation;  // micro-steps of a step
    double device_flops, started, wall_before; // wall_before: of the run before this process
};

static Phase phase_at(const Trainer* t, int64_t step) { return step < t->switch_step ? LIGHTHOUSE : DENSE; }
static double wall_seconds(const Trainer* t) { return t->wall_before + seconds() - t->started; }

static void log_configuration(const Trainer* t, const Plan* plan, const char* device) {
    const Config* c = &t->config;
    const Model* m = &t->model;
    const Dims* d = &m->dims;
    FILE* f = t->logs.jsonl;
    if (!f) return;
    char stamp[32];
    time_t now = time(NULL);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
    fprintf(f, "{\"event\":\"config\",\"program\":\"%s\",\"version\":1,\"time\":\"%s\",\"options\":{", PROGRAM, stamp);
    for (int i = 0; i < option_count; i++) {
        const Option* o = &options[i];
        const char* field = (const char*)c + o->offset;
        char* value = o->type == OPT_TEXT ? json_string(*(const char**)field) : o->type == OPT_REAL ? json_number(*(const double*)field)
                    : text("%lld", (long long)*(const int64_t*)field);
        fprintf(f, "%s\"%s\":%s", i ? "," : "", o->name, value);
        free(value);
    }
    fprintf(f, "},\"model\":{\"layers\":%d,\"channels\":%d,\"heads\":%d,\"vocab\":%d,\"padded_vocab\":%d,\"parameters\":%lld,"
            "\"positions\":\"%s\",\"rope_theta\":%.9g},\"lighthouse\":", d->L, d->C, d->NH, d->V, d->Vp, (long long)m->parameters,
            d->rope ? "rope" : "learned", d->theta);
    if (t->switch_step > 0) {
        const LighthouseShape* s = &m->shape;
        fprintf(f, "{\"levels\":%d,\"pool\":%d,\"topk\":%d,\"tile\":%d,\"slots\":%lld,\"dense_layers\":[", s->levels, s->pool, s->topk,
                s->tile, (long long)s->S);
        for (int l = 0, n = 0; l < d->L; l++) if (!m->lighthouse_layer[l]) fprintf(f, "%s%d", n++ ? "," : "", l);
        fprintf(f, "]}");
    } else fprintf(f, "null");
    char* device_json = json_string(device);
    log_line(f, ",\"steps\":%lld,\"switch_step\":%lld,\"tokens_per_step\":%lld,\"processes\":%d,\"device\":%s,\"backend\":\"%s\","
             "\"measured_flops\":%.6g}", (long long)t->steps, (long long)t->switch_step, (long long)c->total_batch_size, procs.world,
             device_json, backend_name, t->device_flops);
    free(device_json);
    fprintf(f, "{\"event\":\"memory\",\"total_bytes\":%zu,\"parts\":{", plan->total);
    for (int i = 0; i < plan->parts; i++) fprintf(f, "%s\"%s\":%zu", i ? "," : "", plan->name[i], plan->bytes[i]);
    log_line(f, "}}");
}

static void print_configuration(const Trainer* t, const Plan* plan, const char* device) {
    const Config* c = &t->config;
    const Model* m = &t->model;
    const Dims* d = &m->dims;
    say("device      %s (%s), %d process(es)\n", device, backend_name, procs.world);
    say("model       %s: %d layers, %d channels, %d heads of %d, %d tokens (padded %d), %s positions, %lld parameters\n", c->model,
        d->L, d->C, d->NH, d->C / d->NH, d->V, d->Vp, d->rope ? "rotary" : "learned", (long long)m->parameters);
    say("data        %s: %d shard(s), %lld windows of %lld tokens\n", c->train_data, t->train.count, (long long)t->train.windows,
        (long long)c->seq_len);
    say("batch       %lld tokens a step: %lld micro-step(s) of %lld x %lld on %d process(es)\n", (long long)c->total_batch_size,
        (long long)t->accumulation, (long long)c->batch_size, (long long)c->seq_len, procs.world);
    double tokens = (double)t->steps * c->total_batch_size;
    say("run         %lld steps, %.3g tokens, %.2f epochs; %s to %.3g, %s\n", (long long)t->steps, tokens,
        tokens / c->seq_len / t->train.windows, "learning rate up", c->learning_rate, c->lr_schedule);
    if (t->switch_step > 0) {
        const LighthouseShape* s = &m->shape;
        int lighthouse = 0;
        for (int l = 0; l < d->L; l++) lighthouse += m->lighthouse_layer[l];
        double T = (double)c->seq_len, S = (double)s->S;
        say("lighthouse  steps 0 to %lld in %d of %d layers: levels %d, pool %d, topk %d, tile %d (%d tiles)\n",
            (long long)t->switch_step - 1, lighthouse, d->L, s->levels, s->pool, s->topk, s->tile, s->tiles);
        say("            %lld slots for %lld tokens: %.2f%% of dense attention's operations in such a layer\n", (long long)s->S,
            (long long)c->seq_len, 100 * S * S / (T * T));
        say("dense       steps %lld to %lld%s\n", (long long)t->switch_step, (long long)t->steps - 1,
            t->switch_step == t->steps ? ": none" : "");
    } else say("attention   dense throughout\n");
    for (int phase = LIGHTHOUSE; phase <= DENSE; phase++)
        if (phase == DENSE || t->switch_step > 0)
            say("operations  %.4g TFLOP a %s step\n", step_flops(m, (Phase)phase, c->seq_len, (double)c->total_batch_size) * 1e-12,
                phase_name[phase]);
    say("memory      %.2f GiB of %.2f GiB free, recompute level %lld:", gib(plan->total), gib(device_memory_free()), (long long)c->recompute);
    for (int i = 0; i < plan->parts; i++) say("%s %s %.2f", i ? "," : "", plan->name[i], gib(plan->bytes[i]));
    say("\n");
}

static void setup(Trainer* t, int argc, char** argv) {
    Config* c = &t->config;
    Model* m = &t->model;
    memset(t, 0, sizeof *t);
    t->started = seconds();
    parse_options(c, argc, argv);

    loader_open(&t->train, c->train_data, c->seq_len, 0, c->shuffle, c->seed);
    bool from_file;
    Dims dims = choose_dims(c, t->train.largest_id, &from_file);
    if (t->train.largest_id >= dims.V) {  // a model file's vocabulary: open again, to name the shard and the token
        loader_close(&t->train);
        loader_open(&t->train, c->train_data, c->seq_len, dims.V, c->shuffle, c->seed);
    }
    t->has_val = *c->val_data != 0;
    if (t->has_val) loader_open(&t->val, c->val_data, c->seq_len, dims.V, false, 0);
    model_layout(m, dims);

    int64_t micro = c->batch_size * c->seq_len * procs.world;
    if (c->total_batch_size == 0) c->total_batch_size = micro;
    if (c->total_batch_size % micro)
        fatal("--total-batch-size is %lld; it must be a multiple of batch-size x seq-len x processes = %lld: try %lld",
              (long long)c->total_batch_size, (long long)micro, (long long)(ceil_div(c->total_batch_size, micro) * micro));
    t->accumulation = c->total_batch_size / micro;
    t->steps = c->steps >= 0 ? c->steps : t->train.windows * c->seq_len / c->total_batch_size;
    if (t->steps == 0 && c->steps < 0)
        fatal("one epoch, %lld tokens, is less than one step of %lld: lower --total-batch-size, or give --steps",
              (long long)(t->train.windows * c->seq_len), (long long)c->total_batch_size);
    if (c->warmup_steps > t->steps)
        fatal("--warmup-steps is %lld, more than the run's %lld steps", (long long)c->warmup_steps, (long long)t->steps);
    t->switch_step = parse_switch_step(c, t->steps);
    choose_lighthouse_layers(m, c);
    if (t->switch_step > 0 && !m->has_lighthouse) {
        say("note: --dense-layers leaves no layer to Lighthouse attention: the run is dense throughout\n");
        t->switch_step = 0;
    }
    m->has_lighthouse = t->switch_step > 0;
    char why[512];
    if (m->has_lighthouse && !lighthouse_defaults(&m->shape, c, dims.NH, dims.C / dims.NH, why, sizeof why))
        fatal("Lighthouse attention at seq-len %lld: %s", (long long)c->seq_len, why);

    if (c->sample_every) {
        char* path = text("%s", c->tokenizer);
        if (!*path) {  // beside the training data
            const char* slash = strrchr(c->train_data, '/');
            free(path);
            path = text("%.*stokenizer.bin", slash ? (int)(slash + 1 - c->train_data) : 0, c->train_data);
        }
        if (!tokenizer_open(&t->tokenizer, path, dims.V))
            fatal("cannot read the tokenizer %s: %s. --tokenizer names it; --sample-every 0 does without", path, strerror(errno));
        free(path);
        int room = (int)strlen(c->prompt) + 1, *ids = (int*)host_alloc(room * sizeof(int));
        int encoded = tokenizer_encode(&t->tokenizer, c->prompt, ids, room);
        free(ids);
        if (encoded < 0) fatal("--prompt \"%s\" has a byte that the tokenizer has no token for", c->prompt);
        if (1 + encoded >= c->seq_len)
            fatal("--prompt has %d tokens and begins after one more, which leaves no room for a new token in seq-len %lld: shorten it",
                  encoded, (long long)c->seq_len);
    }

    int64_t sample_T = sample_length(c);
    Plan plan = choose_plan(m, c, sample_T);
    char device[256];
    device_name(device, sizeof device);
    print_configuration(t, &plan, device);
    if (c->dry_run) {
        processes_end();
        exit(0);
    }

    make_directories(c->out_dir);
    int earlier;
    free(checkpoint_list(c->out_dir, &earlier));
    if (earlier && !c->resume)
        fatal("%s holds %d checkpoint(s) of an earlier run: --resume 1 goes on from the newest, or give another --out-dir", c->out_dir, earlier);
    struct statvfs disk;
    double need = (double)checkpoint_bytes(m) + m->parameters * 4.0;
    if (procs.rank == 0 && !statvfs(c->out_dir, &disk) && (double)disk.f_bavail * disk.f_frsize < need)
        fatal("%s has %.2f GiB free; a checkpoint and the model take %.2f GiB", c->out_dir, gib((double)disk.f_bavail * disk.f_frsize), gib(need));
    barrier();  // every process has looked before rank 0 writes

    model_allocate(m, c, &plan);
    char* path = NULL;
    bool resumed = c->resume && checkpoint_resume(m, c, &t->state, &path);
    RunState* s = &t->state;
    if (!resumed) {
        if (from_file) model_load(m, c->model);
        else {
            float* host = (float*)host_alloc(m->parameters * sizeof(float));
            model_initialize(m, host, c->seed);
            params_from_host(m, host);
            free(host);
        }
        s->seq_len = c->seq_len; s->total_batch = c->total_batch_size;
        s->windows = t->train.windows; s->seed = c->seed; s->shuffle = c->shuffle;
        s->data = loader_fingerprint(&t->train);
    }
    #define UNCHANGED(field, now, what) if (s->field != (now)) fatal("%s was made with %s %lld, now it is %lld: a resumed run " \
        "continues the same sequence of batches, so restore it, or start a new run from its weights with --model %s", path, what, \
        (long long)s->field, (long long)(now), path)
    UNCHANGED(seq_len, c->seq_len, "seq-len");
    UNCHANGED(total_batch, c->total_batch_size, "total-batch-size");
    UNCHANGED(windows, t->train.windows, "training data of as many windows:");
    UNCHANGED(seed, c->seed, "seed");
    UNCHANGED(shuffle, c->shuffle, "shuffle");
    #undef UNCHANGED
    if (s->data != loader_fingerprint(&t->train))
        fatal("%s was made with other training data than %s: a resumed run continues the same sequence of batches, so restore it, or "
              "start a new run from its weights with --model %s", path, c->train_data, path);
    if (s->step > t->steps)
        fatal("%s is at step %lld, past the %lld steps asked for", path, (long long)s->step, (long long)t->steps);
    t->wall_before = s->wall_s;
    t->device_flops = measure_device(m, c->seq_len);
    say("speed       %.4g TFLOP/s measured in a matrix product of this model: 100%% MFU\n", t->device_flops * 1e-12);
    t->logs = logs_open(c);
    log_configuration(t, &plan, device);
    if (c->resume && !resumed) say("no checkpoint in %s: a new run\n", c->out_dir);
    if (resumed) {
        say("resuming from %s at step %lld\n", path, (long long)s->step);
        char* json = json_string(path);
        log_line(t->logs.jsonl, "{\"event\":\"resume\",\"step\":%lld,\"file\":%s}", (long long)s->step, json);
        free(json);
    }
    free(path);
}

static double validate(Trainer* t, Phase phase) {
    const Config* c = &t->config;
    int64_t step = t->state.step;
    if (!t->has_val) return NAN;
    double dense = evaluate(&t->model, c, &t->val, DENSE), lighthouse = phase == LIGHTHOUSE ? evaluate(&t->model, c, &t->val, LIGHTHOUSE) : NAN;
    progress_clear(&t->logs);
    char* both = phase == LIGHTHOUSE ? text(" lhtel:%.6f", lighthouse) : text("%s", "");
    if (phase == LIGHTHOUSE) say("step %lld | validation loss %.4f under dense attention, %.4f under Lighthouse\n", (long long)step, dense, lighthouse);
    else say("step %lld | validation loss %.4f\n", (long long)step, dense);
    log_line(t->logs.main, "s:%lld tel:%.6f%s", (long long)step, dense, both);
    char *dense_json = json_number(dense), *lighthouse_json = json_number(lighthouse);
    log_line(t->logs.jsonl, "{\"event\":\"eval\",\"step\":%lld,\"loss_dense\":%s,\"loss_lighthouse\":%s,\"tokens\":%lld,\"train_s\":%.3f,"
             "\"wall_s\":%.3f}", (long long)step, dense_json, lighthouse_json, (long long)(step * t->config.total_batch_size),
             t->state.train_s, wall_seconds(t));
    free(both); free(dense_json); free(lighthouse_json);
    return dense;
}

static void save_checkpoint(Trainer* t) {
    const Config* c = &t->config;
    double start = seconds();
    t->state.wall_s = wall_seconds(t);
    char* path = checkpoint_path(c, t->state.step);
    if (procs.rank == 0) {
        checkpoint_write(&t->model, path, &t->state);
        checkpoint_prune(c, t->state.step);
    }
    barrier();
    progress_clear(&t->logs);
    say("step %lld | checkpoint %s (%.2f GiB, %.1f s)\n", (long long)t->state.step, path, gib(checkpoint_bytes(&t->model)), seconds() - start);
    char* json = json_string(path);
    log_line(t->logs.jsonl, "{\"event\":\"checkpoint\",\"step\":%lld,\"file\":%s,\"bytes\":%lld,\"seconds\":%.3f}", (long long)t->state.step,
             json, (long long)checkpoint_bytes(&t->model), seconds() - start);
    free(json); free(path);
}

static void write_sample(Trainer* t) {
    char* s = sample(&t->model, &t->config, &t->tokenizer, t->state.step);
    progress_clear(&t->logs);
    say("step %lld | sample: %s\n", (long long)t->state.step, s);
    char* json = json_string(s);
    log_line(t->logs.jsonl, "{\"event\":\"sample\",\"step\":%lld,\"text\":%s}", (long long)t->state.step, json);
    free(json); free(s);
}

// Seconds that the steps left will take: a phase not yet seen is taken at the other's rate of operations.
static double seconds_left(const Trainer* t) {
    const RunState* s = &t->state;
    double flops[2], per_flop = 0, left = 0;
    for (int p = 0; p < 2; p++) {
        flops[p] = step_flops(&t->model, (Phase)p, t->config.seq_len, (double)t->config.total_batch_size);
        if (s->phase_steps[p]) per_flop = s->phase_s[p] / s->phase_steps[p] / flops[p];
    }
    int64_t steps[2] = {t->switch_step > s->step ? t->switch_step - s->step : 0, 0};
    steps[1] = t->steps - s->step - steps[0];
    for (int p = 0; p < 2; p++) left += steps[p] * (s->phase_steps[p] ? s->phase_s[p] / s->phase_steps[p] : per_flop * flops[p]);
    return left;
}

// One optimizer step: the micro-steps, the gradient norm, the update, one line.
static void train_step(Trainer* t) {
    const Config* c = &t->config;
    Model* m = &t->model;
    RunState* s = &t->state;
    double start = seconds();
    Phase phase = phase_at(t, s->step);
    int64_t T = c->seq_len, B = c->batch_size, total = c->total_batch_size;
    Run r = {(int)B, T, phase, true, (int)c->recompute};
    int *inputs = m->host_tokens, *targets = m->host_tokens + B * T;

    device_zero(m->grads, m->parameters * sizeof(float));
    double sum = 0;
    for (int64_t micro = 0; micro < t->accumulation; micro++) {
        for (int64_t b = 0; b < B; b++)
            loader_sequence(&t->train, s->sequences + (micro * procs.world + procs.rank) * B + b, inputs + b * T, targets + b * T);
        sum += model_micro_step(m, inputs, targets, r, 1.0f / total);
    }
    double loss = all_sum(sum) / total;
    all_sum(m->grads, m->parameters);
    double norm = sqrt(sum_squares(m->grads, m->parameters));
    double lr = learning_rate(c, s->step, t->steps);

    double loss_z = detector_score(&s->loss, loss), norm_z = detector_score(&s->norm, norm);
    bool finite = isfinite(loss) && isfinite(norm);
    if (!finite && !(c->skip_loss_z > 0 || c->skip_grad_z > 0))
        fatal("step %lld: the loss is %g and the gradient norm %g. The checkpoints are as they were; resume from one with a lower "
              "--learning-rate, or let --skip-grad-z pass over such steps", (long long)s->step + 1, loss, norm);
    bool skip = !finite || (c->skip_loss_z > 0 && loss_z > c->skip_loss_z) || (c->skip_grad_z > 0 && norm_z > c->skip_grad_z);
    double grad_scale = c->grad_clip > 0 && norm > c->grad_clip ? c->grad_clip / norm : 1;
    if (!skip) model_update(m, c, lr, grad_scale, ++s->updates);
    device_synchronize();

    double elapsed = seconds() - start;
    s->step++;
    s->sequences += total / T;
    s->train_s += elapsed;
    s->phase_steps[phase]++;
    s->phase_s[phase] += elapsed;
    double mfu = step_flops(m, phase, T, (double)total) / (elapsed * t->device_flops * procs.world);
    char* eta = duration(seconds_left(t));
    progress_clear(&t->logs);
    say("step %*lld/%lld | loss %.4f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s | mfu %.1f%% | %s | ETA %s%s\n",
        (int)snprintf(NULL, 0, "%lld", (long long)t->steps), (long long)s->step, (long long)t->steps, loss, norm, lr, elapsed * 1e3,
        total / elapsed, 100 * mfu, phase_name[phase], eta, skip ? " | update skipped: outlier" : "");
    progress_bar(&t->logs, s->step, t->steps, eta);
    free(eta);
    log_line(t->logs.main, "s:%lld trl:%.6f lr:%.8f norm:%.6f ms:%.2f tps:%.0f ph:%s", (long long)s->step - 1, loss, lr, norm, elapsed * 1e3,
             total / elapsed, phase_name[phase]);
    char *loss_json = json_number(loss), *norm_json = json_number(norm);
    log_line(t->logs.jsonl, "{\"event\":\"step\",\"step\":%lld,\"loss\":%s,\"lr\":%.9g,\"norm\":%s,\"ms\":%.3f,\"tokens_per_second\":%.1f,"
             "\"mfu\":%.4f,\"phase\":\"%s\",\"tokens\":%lld,\"train_s\":%.3f,\"wall_s\":%.3f,\"skipped\":%s}", (long long)s->step, loss_json,
             lr, norm_json, elapsed * 1e3, total / elapsed, mfu, phase_name[phase], (long long)(s->step * total), s->train_s,
             wall_seconds(t), skip ? "true" : "false");
    free(loss_json); free(norm_json);
}

static void finish(Trainer* t, double val_loss) {
    const RunState* s = &t->state;
    int64_t total = t->config.total_batch_size;
    char* path = text("%s/model.bin", t->config.out_dir);
    if (procs.rank == 0) model_write(&t->model, path, s->step);
    say("\n%-12s %8s %14s %12s %12s\n", "phase", "steps", "tokens", "seconds", "tok/s");
    char* phases[2];
    for (int p = 0; p < 2; p++) {
        double rate = s->phase_s[p] > 0 ? s->phase_steps[p] * total / s->phase_s[p] : 0;
        if (s->phase_steps[p]) say("%-12s %8lld %14lld %12.1f %12.0f\n", phase_name[p], (long long)s->phase_steps[p],
                                   (long long)(s->phase_steps[p] * total), s->phase_s[p], rate);
        phases[p] = text("{\"steps\":%lld,\"tokens\":%lld,\"seconds\":%.3f,\"tokens_per_second\":%.1f}", (long long)s->phase_steps[p],
                         (long long)(s->phase_steps[p] * total), s->phase_s[p], rate);
    }
    char *wall = duration(wall_seconds(t)), *loss_json = json_number(val_loss);
    say("wall-clock %s; final validation loss %s; the model is in %s\n", wall, loss_json, path);
    log_line(t->logs.jsonl, "{\"event\":\"total\",\"steps\":%lld,\"tokens\":%lld,\"train_s\":%.3f,\"wall_s\":%.3f,\"phases\":{\"lighthouse\":%s,"
             "\"dense\":%s},\"final_val_loss\":%s}", (long long)s->step, (long long)(s->step * total), s->train_s, wall_seconds(t), phases[0],
             phases[1], loss_json);
    free(path); free(wall); free(loss_json); free(phases[0]); free(phases[1]);
}

#ifndef TRAINER_NO_MAIN

static volatile sig_atomic_t stop_signal = 0;
static void on_signal(int signal) { stop_signal = signal; }  // a second one ends the process: SA_RESETHAND

int main(int argc, char** argv) {
    static Trainer trainer;
    Trainer* t = &trainer;
    processes_start(&argc, &argv);
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESETHAND;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);  // a file past its size limit then fails with a message
    setup(t, argc, argv);
    const Config* c = &t->config;
    RunState* s = &t->state;

    double val_loss = NAN;
    while (s->step < t->steps) {
        Phase phase = phase_at(t, s->step);
        bool at_switch = t->switch_step > 0 && s->step == t->switch_step;
        if (at_switch) {
            progress_clear(&t->logs);
            say("step %lld | the switch: dense attention in every layer from here on\n", (long long)s->step);
            log_line(t->logs.jsonl, "{\"event\":\"switch\",\"step\":%lld,\"from\":\"lighthouse\",\"to\":\"dense\",\"train_s\":%.3f}",
                     (long long)s->step, s->train_s);
            memset(&s->loss, 0, sizeof s->loss);  // the loss jumps at the switch; that is no outlier
            memset(&s->norm, 0, sizeof s->norm);
        }
        if (at_switch || (c->val_every && s->step % c->val_every == 0)) validate(t, at_switch ? LIGHTHOUSE : phase);
        if (c->sample_every && s->step > 0 && s->step % c->sample_every == 0) write_sample(t);
        train_step(t);
        int signal_number = (int)all_sum((double)stop_signal);
        bool last = s->step == t->steps;
        if (signal_number || last || (c->checkpoint_every && s->step % c->checkpoint_every == 0)) save_checkpoint(t);
        if (signal_number && !last) {
            progress_clear(&t->logs);
            say("stopped by signal at step %lld; --resume 1 goes on from here\n", (long long)s->step);
            processes_end();
            return 128 + (stop_signal ? stop_signal : SIGTERM);
        }
    }
    val_loss = validate(t, phase_at(t, t->steps > 0 ? t->steps - 1 : 0));
    if (c->sample_every) write_sample(t);
    finish(t, val_loss);
    processes_end();
    return 0;
}

#endif
