/*
Pretrains GPT-2-class models at contexts of 32K to 1M tokens in plain C and CUDA: most steps with cheap attention, the
last ones with dense attention in every layer.

In the first phase each layer's attention is dense, dense within windows, or Lighthouse (arXiv 2605.06554): q, k and v
are pooled into a pyramid, a parameter-free score picks a few thousand entries, ordinary causal SDPA runs on those, and
the result is scattered back; or Causal Lighthouse, where a token sees its own tile of the sequence exactly and earlier
tiles through what was picked there, and so nothing of the future. From the switch step on every layer is dense (the
resumption), and the run ends in a plain dense checkpoint. train_gpt_dense.cu is the same program without the first
phase, the baseline to compare with.

 1. configuration          the options, one table; the geometry of Lighthouse
 2. errors, files, memory  what every later section stands on; the device: a CPU or an NVIDIA GPU
 3. processes              rank, world, collectives
 4. data                   token shards in, sequences of T+1 tokens out
 5. operations             kernels and launchers, forward and backward; dense attention (CPU twins: dev/cpu_ops.h)
 6. Lighthouse attention   its kernels; section 7 composes them round the same SDPA call
 7. model                  parameters, activations, memory plan, forward, backward
 8. optimizer              AdamW, learning rate schedules, outlier detection
 9. checkpoints            model files and whole run states
10. evaluation, logs       validation, copying, sampling, main.log, log.jsonl
11. main                   the loop

To read it for the first time follow one training step, top down: train_step (11), model_micro_step, block_forward and
block_backward (7), the operations they call (5, 6) or, easier, their CPU twins (dev/cpu_ops.h), then model_update (8).

Letters: B batch, T tokens of a sequence, C channels, NH heads, D head size, V vocabulary, Vp V padded to 128, L layers,
S slots of the gathered Lighthouse sequence, W processes that share each sequence (--cp), N = B T / W rows of one of
them. Every pointer is declared with its shape.
Build with make; every program has --help.
*/
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <glob.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>
#ifdef USE_MPI
#include <mpi.h>
#endif

// ===================================================================================================================
// 1. Configuration: one struct, one table that gives every option its name, default, bounds and help line.

#ifdef DENSE_ONLY  // as train_gpt_dense.cu includes it
static const bool lighthouse_built = false;
#define PROGRAM "dense"
#else
static const bool lighthouse_built = true;
#define PROGRAM "lighthouse"
#endif
#define VERSION "3"  // of what the processes of a run must share: options, collectives, files

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
    int64_t fp8;
    // batch and length of the run
    int64_t batch_size, seq_len, total_batch_size, steps;
    // optimizer
    double learning_rate, final_lr_frac, decay_frac;
    const char* lr_schedule;
    int64_t warmup_steps;
    double weight_decay, beta1, beta2, adam_eps, grad_clip, skip_loss_z, skip_grad_z;
    // attention of the first phase
    const char *attention, *window;
    int64_t levels, pool, topk, tile;
    const char* switch_step;
    // evaluation
    int64_t val_every, copy_every, val_batches, sample_every, sample_tokens, sample_top_k;
    const char *prompt, *tokenizer;
    double temperature;
    // memory
    int64_t recompute, deterministic, dry_run, plan_ranks;
    double plan_memory;
    // processes
    int64_t cp, hang_timeout;
};

enum OptionType { OPT_INT, OPT_REAL, OPT_TEXT };

struct Option {
    const char* name;
    const char* letter;    // llm.c's letter for the same thing, or ""
    OptionType type;
    size_t offset;
    const char* fallback;  // the default, as it would be typed
    double min, max;       // bounds of the numbers, both included
    const char* help;      // under a heading, which the first option below it has in brackets before its own help
};

static const int64_t MAX_SEQ_LEN = 1 << 30;
static const int MAX_CHANNELS = 65536, MAX_VOCAB = 1 << 24;

#define AT(field) offsetof(Config, field)
static const Option options[] = {
    {"train-data", "i", OPT_TEXT, AT(train_data), "data/pystdlib_bytes/train_*.bin", 0, 0,
     "[data] token shards to train on: a file or a glob"},
    {"val-data", "j", OPT_TEXT, AT(val_data), "data/pystdlib_bytes/val_*.bin", 0, 0,
     "token shards to validate on, to be given with --train-data; empty: no validation"},
    {"shuffle", "", OPT_INT, AT(shuffle), "1", 0, 1, "1: visit the sequences of each epoch in a seeded random order"},
    {"seed", "", OPT_INT, AT(seed), "1337", 0, 4294967295.0,
     "seed of the initialization, the shuffling and the samples"},
    {"out-dir", "o", OPT_TEXT, AT(out_dir), "runs/" PROGRAM, 0, 0, "[output] directory of the logs and checkpoints"},
    {"checkpoint-every", "n", OPT_INT, AT(checkpoint_every), "1000", 0, 1e12,
     "steps between checkpoints; 0: only at the end and on SIGTERM, SIGINT, SIGHUP or SIGUSR1"},
    {"keep-last", "nk", OPT_INT, AT(keep_last), "2", 0, 1e6, "checkpoints to keep, newest first; 0: all"},
    {"keep-every", "nm", OPT_INT, AT(keep_every), "0", 0, 1e12, "also keep checkpoints of every m-th step; 0: none"},
    {"resume", "y", OPT_INT, AT(resume), "0", 0, 1,
     "1: go on from the newest whole checkpoint in out-dir, if there is one"},
    {"model", "e", OPT_TEXT, AT(model), "d12", 0, 0,
     "[model] d6, d12, d24, d36, d48, d60, lh30, or a model or checkpoint file to start from"},
    {"depth", "", OPT_INT, AT(depth), "0", 0, 1024, "layers; 0: as the descriptor says"},
    {"channels", "", OPT_INT, AT(channels), "0", 0, MAX_CHANNELS, "channels; 0: as the descriptor says"},
    {"heads", "", OPT_INT, AT(heads), "0", 0, 1024, "heads; 0: as the descriptor says"},
    {"vocab-size", "", OPT_INT, AT(vocab_size), "0", 0, MAX_VOCAB,
     "token ids; 0: as many as the tokenizer.bin beside the data has; without one 257 or 50257, as the first ids fit"},
    {"positions", "", OPT_TEXT, AT(positions), "rope", 0, 0, "rope, or learned as in GPT-2"},
    {"rope-theta", "", OPT_REAL, AT(rope_theta), "500000", 1, 1e12, "base of the rotary frequencies"},
    {"fp8", "", OPT_INT, AT(fp8), "0", 0, 1,
     "1: train with FP8 operands in the layers' matrix products (GPUs from compute capability 8.9 on)"},
    {"batch-size", "b", OPT_INT, AT(batch_size), "1", 1, 65536, "[batch] sequences per process and micro-step"},
    {"seq-len", "t", OPT_INT, AT(seq_len), "32768", 1, MAX_SEQ_LEN, "tokens of a sequence"},
    {"total-batch-size", "d", OPT_INT, AT(total_batch_size), "0", 0, 1e12,
     "tokens of a step, over all processes and micro-steps; 0: one micro-step"},
    {"steps", "x", OPT_INT, AT(steps), "-1", -1, 1e12,
     "optimizer steps of the whole run; -1: one epoch; 0: evaluate the --model that is a file, and sample from it"},
    {"learning-rate", "l", OPT_REAL, AT(learning_rate), "3e-4", 0, 10, "[optimizer] peak learning rate"},
    {"lr-schedule", "k", OPT_TEXT, AT(lr_schedule), "cosine", 0, 0,
     "cosine, linear, constant, or wsd (warmup, stable, decay)"},
    {"warmup-steps", "u", OPT_INT, AT(warmup_steps), "-1", -1, 1e12, "linear warmup; -1: 2% of the steps"},
    {"final-lr-frac", "q", OPT_REAL, AT(final_lr_frac), "0.1", 0, 1,
     "learning rate at the end, as a share of the peak"},
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
    {"attention", "", OPT_TEXT, AT(attention), "mixed", 0, 0,
     "[attention] of the layers up to the switch, a letter each, repeated to the depth: D dense, W window, L "
     "Lighthouse, C Causal Lighthouse, which sees no later token; or windows: W, but every eighth layer dense, below "
     "eight layers the last; or mixed: windows, but with C halfway between the dense ones, where at least 4 layers "
     "are; or paper: L, but two dense layers at each end, one below 12 layers, none below 3"},
    {"window", "", OPT_TEXT, AT(window), "1024", 0, 0,
     "tokens of a window; growing: 1024,4096:0.3,16384:0.5 takes 4096 from 0.3 of the steps on (or from a step on)"},
    {"levels", "", OPT_INT, AT(levels), "0", 0, 8,
     "Lighthouse, L and C: levels of the pyramid, the tokens included; 0: 3, or if no layer is L up to 4"},
    {"pool", "", OPT_INT, AT(pool), "4", 2, 64, "pooling factor from level to level, a power of 2"},
    {"topk", "", OPT_INT, AT(topk), "0", 0, 1e9,
     "entries expanded per level; 0: about seq-len/64, or seq-len/256 if no layer is L"},
    {"tile", "", OPT_INT, AT(tile), "0", 0, 4096,
     "entries each tile expands per level; 0: 128, or 16 if no layer is L; less for short sequences, topk where it is "
     "no multiple of that"},
    {"switch-step", "", OPT_TEXT, AT(switch_step), "0.875", 0, 0,
     "steps before the dense ones: a number, or with a point a share of all steps (0: dense throughout; 1.0: never)"},
#endif
    {"val-every", "v", OPT_INT, AT(val_every), "250", 0, 1e12,
     "[evaluation] steps between validations; 0: at the end only"},
    {"copy-every", "", OPT_INT, AT(copy_every), "0", 0, 1e12,
     "measure copying at a distance at every n-th validation too; 0: only at the switch and at the end"},
    {"val-batches", "m", OPT_INT, AT(val_batches), "20", 1, 1e9, "micro-batches of a validation, over all processes"},
    {"sample-every", "s", OPT_INT, AT(sample_every), "0", 0, 1e12, "steps between samples; 0: never"},
    {"sample-tokens", "g", OPT_INT, AT(sample_tokens), "64", 1, 65536, "tokens to generate"},
    {"sample-top-k", "", OPT_INT, AT(sample_top_k), "50", 0, 16777216, "draw from this many likeliest tokens; 0: all"},
    {"prompt", "", OPT_TEXT, AT(prompt), "", 0, 0, "text to continue; empty: from the end-of-text token"},
    {"tokenizer", "", OPT_TEXT, AT(tokenizer), "", 0, 0, "tokenizer.bin; empty: the one beside the training data"},
    {"temperature", "", OPT_REAL, AT(temperature), "1.0", 0.01, 100, "softmax temperature of the samples"},
    {"recompute", "r", OPT_INT, AT(recompute), "-1", -1, 4,
     "[memory] 0: keep all activations; 1: recompute GELU; 2: and LayerNorm; 3: all but attention; "
     "4: and dense attention; -1: the least that fits, and one less in as many layers as fit"},
    {"deterministic", "", OPT_INT, AT(deterministic), "0", 0, 1,
     "1: dense attention's backward gives the same bits every run"},
    {"dry-run", "", OPT_INT, AT(dry_run), "0", 0, 1, "1: print the configuration and the memory plan, and stop"},
    {"plan-ranks", "", OPT_INT, AT(plan_ranks), "0", 0, 1048576,
     "with --dry-run: plan for this many processes; 0: as many as were started"},
    {"plan-memory", "", OPT_REAL, AT(plan_memory), "0", 0, 1e6,
     "with --dry-run: plan in a GPU's types for one with this many GiB free; 0: for this device"},
    {"cp", "", OPT_INT, AT(cp), "1", 1, 1024,
     "[processes] context parallelism: processes that share each sequence, seq-len/cp consecutive tokens on each"},
    {"hang-timeout", "", OPT_INT, AT(hang_timeout), "600", 0, 1e6,
     "seconds to wait for another process before the job ends with its name; 0: no limit"},
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
    int64_t off[LH_MAX_LEVELS + 1];  // first flat index of level l; off[levels]: all entries, < 2 T <= 2^31
    int64_t S;                       // slots of the gathered sequence: n[L-1] + (L-1) p k
    int64_t tile_slots;              // S / tiles
};

__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...);  // section 2

// Fills s and checks the rules of validity. Returns "" or a sentence that names the rule that failed.
static std::string lighthouse_shape(LighthouseShape* s, int64_t T, int H, int D, int levels, int pool, int topk,
                                    int tile) {
    memset(s, 0, sizeof(*s));
    if (levels < 2 || levels > LH_MAX_LEVELS) return text("levels is %d; it must be 2 to %d", levels, LH_MAX_LEVELS);
    if (pool < 2 || (pool & (pool - 1))) return text("pool is %d; it must be a power of 2, at least 2", pool);
    if (tile < 4 || tile % 2 || pool > tile / 2)
        return text("tile is %d; it must be even and at least twice pool (%d)", tile, pool);
    if (topk < tile || topk % tile)
        return text("topk is %d; it must be a positive multiple of tile (%d): try %d", topk, tile,
                    topk < tile ? tile : topk / tile * tile);
    int tiles = topk / tile;
    double exact = pow(pool, levels - 1);  // tokens under one coarsest entry
    if (exact * tiles > 1e15)
        return text("pool^(levels-1) * topk/tile = %.3g is more than any length: lower levels or pool", exact * tiles);
    int64_t coarse = (int64_t)exact, multiple = coarse * tiles, least = multiple * tile;  // T: n * multiple
    if (T % multiple) {
        int64_t below = T / multiple * multiple, above = std::max(below + multiple, least);
        std::string why = text("T = %ld is not divisible by pool^(levels-1) * topk/tile = %ld", T, multiple);
        if (below >= least && above <= MAX_SEQ_LEN) why += text(": the nearest lengths are %ld and %ld", below, above);
        else if (below >= least || above <= MAX_SEQ_LEN)
            why += text(": the nearest length is %ld", below >= least ? below : above);
        return why;
    }
    if (T < least) {
        int64_t entries = T / coarse, most = entries / tile;  // tiles that have enough; they must divide entries too
        while (most > 0 && entries % most) most--;
        return text("T = %ld has %ld coarsest entries, fewer than topk = %d: lower topk%s to at most %ld, or levels or "
                    "pool", T, entries, topk, most > 0 ? "" : " and tile", most > 0 ? most * tile : entries);
    }
    s->T = T; s->H = H; s->D = D;
    s->levels = levels; s->pool = pool; s->topk = topk; s->tile = tile;
    s->tiles = tiles;
    s->n[0] = T;
    for (int l = 1; l < levels; l++) s->n[l] = s->n[l - 1] / pool;
    for (int l = 0; l < levels; l++) s->off[l + 1] = s->off[l] + s->n[l];
    s->S = s->n[levels - 1] + (int64_t)(levels - 1) * pool * topk;
    s->tile_slots = s->S / tiles;
    return "";
}

// The shape whose slots are the leaves, the entries that were selected and not expanded, which cover each token once: S
// and tile_slots are replaced, everything else as in s.
static LighthouseShape leaf_shape(const LighthouseShape* s) {
    LighthouseShape leaf = *s;
    leaf.tile_slots = s->tile_slots - (s->levels - 1) * s->tile;
    leaf.S = leaf.tile_slots * s->tiles;
    return leaf;
}

// Settings the user left at 0 are chosen from T: a tile of the usual size or, for short sequences, the largest power of
// two that the usual topk reaches; then the valid multiple of it that is nearest to that topk. Usual are the paper's 3
// levels, topk T/64 and tile 128, which at its T = 98304 gives its k = 1536; where only Causal Lighthouse asks, 4
// levels, or as many as T allows, T/256 and 16: tiles of 4,096 tokens, whose attention is dense.
static std::string lighthouse_defaults(LighthouseShape* s, const Config* c, int H, int D, bool causal, int levels) {
    int64_t want = c->seq_len / (causal ? 256 : 64), tile = c->tile;
    int64_t usual = std::max((int64_t)(causal ? 16 : 128), 2 * c->pool);
    if (tile == 0) {
        tile = c->topk && c->topk % usual ? c->topk : usual;
        if (!c->topk) while (tile > want && tile > 2 * c->pool) tile /= 2;
        if (c->topk && (tile < 4 || tile % 2 || tile < 2 * c->pool))  // what was given is topk
            return text("topk is %ld; it must be even and at least twice pool (%ld), and at least 4", c->topk, c->pool);
    }
    auto shape = [&](int64_t topk) { return lighthouse_shape(s, c->seq_len, H, D, levels, c->pool, topk, tile); };
    if (c->topk) return shape(c->topk);
    int64_t nearest = (want + tile / 2) / tile;
    for (int64_t d = 0; d <= nearest; d++) {
        if (nearest - d >= 1 && shape((nearest - d) * tile) == "") return "";
        if (shape((nearest + d) * tile) == "") return "";
    }
    return shape(tile);
}

// ===================================================================================================================
// 2. Errors and checks, files, time, randomness; the device and its memory, which on the CPU backend are the host's.

// Section 3. A failing process must not leave the others waiting. A hanging one must not either: whatever depends on
// others is waited for by looking again and again, with a call of wait_a_moment between two looks, which has a limit.
struct Wait {
    int64_t looks;
    double began;  // seconds(), once it takes longer
    double last;   // of the last look: a process that was suspended does not hold that against the others
};
static void stop_all_processes();
static void wait_a_moment(Wait* w);
static bool waits_for_others;   // there are other processes
static char process_name[32];   // "rank 3: " before errors, or empty if there is but one process

// What printf would print; the compiler checks the arguments. An int64_t is a long on 64-bit Linux: %ld.
static std::string text(const char* format, ...) {
    va_list args;
    va_start(args, format);
    char* printed = NULL;
    std::string s(vasprintf(&printed, format, args) < 0 ? "" : printed);
    va_end(args);
    free(printed);
    return s;
}

// Prints one message that says what is wrong, with which value, and what would be right; ends the program.
[[noreturn]] static void end_with(const std::string& what) {
    fflush(stdout);
    fprintf(stderr, "error: %s%s\n", process_name, what.c_str());
    stop_all_processes();
    exit(1);
}
#define fatal(...) end_with(text(__VA_ARGS__))
static void end_if(const std::string& why) { if (why != "") end_with(why); }

// Calls what may take long because of this process's own disk. That is no hang: meanwhile other processes that wait for
// this one are told so. Within such a call another is made at once.
static bool at_disk;
template <typename Call> static void on_disk(Call call) {
    if (!waits_for_others || at_disk) return call();
    int error = 0;
    std::atomic<bool> done(false);
    at_disk = true;
    std::thread worker([&] {
        call();
        error = errno;
        done = true;
    });
    for (Wait w = {}; !done;) wait_a_moment(&w);
    at_disk = false;
    worker.join();
    errno = error;
}

static int open_to_read(const char* path, int64_t* size = NULL) {
    struct stat st;
    int fd = -1;
    on_disk([&] { fd = open(path, O_RDONLY | O_NONBLOCK); });  // a pipe is refused, not waited for
    if (fd < 0 || fstat(fd, &st)) fatal("cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) fatal("cannot read %s: it is no regular file", path);
    if (size) *size = st.st_size;
    return fd;
}

// Returns "" or, where the file ends too early, a sentence that says so. A disk that fails says nothing about the file,
// and ends the run.
static std::string try_read_at(int fd, void* buffer, size_t bytes, int64_t offset, const char* path) {
    ssize_t n = 1;
    size_t done = 0;
    on_disk([&] {
        while (done < bytes && n != 0) {
            n = pread(fd, (char*)buffer + done, bytes - done, offset + done);
            if (n < 0 && errno != EINTR) break;
            done += std::max<ssize_t>(n, 0);
        }
    });
    if (n < 0) fatal("cannot read %s at byte %ld: %s", path, offset + done, strerror(errno));
    if (done == bytes) return "";
    return text("%s ends at byte %ld; %zu more bytes were expected", path, offset + done, bytes - done);
}

static void read_at(int fd, void* buffer, size_t bytes, int64_t offset, const char* path) {
    end_if(try_read_at(fd, buffer, bytes, offset, path));
}

// Returns false with errno set, so that a half-written file can be removed before the message.
static bool write_at(int fd, const void* buffer, size_t bytes, int64_t offset) {
    size_t done = 0;
    on_disk([&] {
        while (done < bytes) {
            ssize_t n = pwrite(fd, (const char*)buffer + done, bytes - done, offset + done);
            if (n < 0 && errno != EINTR) break;
            done += std::max<ssize_t>(n, 0);
        }
    });
    return done == bytes;
}

static std::string read_file(const char* path) {
    int64_t size;
    int fd = open_to_read(path, &size);
    std::string file(size, 0);
    read_at(fd, &file[0], file.size(), 0, path);
    close(fd);
    return file;
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

// ---- the device

#ifdef CPU_BACKEND
typedef float floatX;  // its device is the host: dev/cpu_backend.h
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <cub/device/device_radix_sort.cuh>
#ifndef FLOATX_FP32
#include <cudnn.h>
#endif

// The type of weights and activations. The fp32 build is for tests: there every kernel must agree with its CPU twin to
// fp32 rounding, which a bf16 result cannot show.
#ifdef FLOATX_FP32
typedef float floatX;
#define FLOATX_CUDA CUDA_R_32F
#else
typedef __nv_bfloat16 floatX;
#define FLOATX_CUDA CUDA_R_16BF
#endif
static const char* backend_name = "cuda";

// One macro checks the calls of every library, CUDA, cuBLAS, cuDNN and NCCL: by the type of what they return.
#define cudaCheck(call) cuda_check((call), #call, __FILE__, __LINE__)

static void cuda_check(cudaError_t error, const char* call, const char* file, int line) {
    if (error == cudaSuccess) return;
    const char* hint = "run again under compute-sanitizer to find the kernel";
    if (error == cudaErrorMemoryAllocation)
        hint = "the memory is full: the device's (is another process on it? See nvidia-smi), or the host's for "
               "cudaMallocHost";
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
        hint = "this program was built for another GPU or a newer driver: build it on this machine";
    if (error == cudaErrorInsufficientDriver)
        hint = "there is no driver, or one older than the CUDA toolkit of this build: install or update it, or use the "
               "_cpu program";
    if (error == cudaErrorNoDevice)
        hint = "no GPU was found: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the _cpu program";
    fatal("%s:%d: %s failed: %s (%s); %s", file, line, call, cudaGetErrorString(error), cudaGetErrorName(error), hint);
}

static void cuda_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fatal("%s:%d: %s failed: %s; check that the cuBLAS libraries at run time are those of the build (ldd), and that "
          "every dimension of the model is a multiple of 8", file, line, call, cublasLtGetStatusString(status));
}

// What a kernel assumes of its arguments; the message names the value, since the caller is far away.
#define opRequire(condition, ...) do { if (!(condition)) fatal(__VA_ARGS__); } while (0)

static cudaStream_t main_stream;  // every kernel and every library call runs here, in order
static int device_sms;            // multiprocessors, for kernels that size their grid to one wave
static size_t device_free_at_start;  // bytes, after CUDA itself took what it needs
static cublasLtHandle_t cublaslt_handle;
static void* cublaslt_workspace;
static const size_t cublaslt_workspace_bytes = 32 << 20;  // what NVIDIA recommends for Hopper and later

// Device memory for partial results inside one operation. The stream orders the operations, so they share one buffer;
// the memory plan makes it as large as the largest *_scratch_bytes() of the run.
static char* op_scratch;
static size_t op_scratch_bytes;

static void* scratch(size_t bytes, const char* op) {
    opRequire(bytes <= op_scratch_bytes, "%s needs %zu bytes of scratch memory, the plan took %zu: its "
              "%s_scratch_bytes() is missing in the memory plan or was asked with a smaller shape", op, bytes,
              op_scratch_bytes, op);
    return op_scratch;
}

// Takes the local_rank-th GPU. A launcher that shows each process one GPU only has chosen already.
static void device_open(int local_rank) {
    int devices, device;
    cudaCheck(cudaGetDeviceCount(&devices));
    device = local_rank % devices;
    cudaCheck(cudaSetDevice(device));
    cudaCheck(cudaDeviceGetAttribute(&device_sms, cudaDevAttrMultiProcessorCount, device));
    cudaCheck(cudaStreamCreateWithFlags(&main_stream, cudaStreamNonBlocking));
    size_t total;
    cudaCheck(cudaMemGetInfo(&device_free_at_start, &total));
    cudaCheck(cublasLtCreate(&cublaslt_handle));
}
// What the device does may wait for other processes' devices: so the host looks whether it is done, and only then calls
// what waits without a limit. "Not ready" counts as the last error, and is none.
static void device_synchronize() {
    Wait w = {};
    while (waits_for_others && cudaStreamQuery(main_stream) == cudaErrorNotReady) wait_a_moment(&w);
    (void)cudaGetLastError();
    cudaCheck(cudaStreamSynchronize(main_stream));
}
static void* device_alloc(size_t bytes) {  // zeroed
    void* p;
    cudaCheck(cudaMalloc(&p, bytes ? bytes : 1));
    cudaCheck(cudaMemsetAsync(p, 0, bytes, main_stream));
    return p;
}
static void device_zero(void* p, size_t bytes) { cudaCheck(cudaMemsetAsync(p, 0, bytes, main_stream)); }
// A copy may wait inside the library, without a limit, for what the stream does before it: so wait for that first.
static void copy_to_device(void* device, const void* host, size_t bytes) {
    if (waits_for_others) device_synchronize();
    cudaCheck(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, main_stream));
    device_synchronize();  // the caller may change its copy at once
}
static void copy_to_host(void* host, const void* device, size_t bytes) {
    if (waits_for_others) device_synchronize();
    cudaCheck(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, main_stream));
    device_synchronize();
}
// Host memory that the device reads and writes by itself, while the host goes on.
static void* host_alloc_pinned(size_t bytes) {
    void* p;
    cudaCheck(cudaMallocHost(&p, bytes ? bytes : 1));
    return p;
}
// From pinned memory the host goes on at once, and must leave the memory alone until an event behind the copy; from
// other memory it goes on when the copy has left it.
static void copy_to_device_async(void* device, const void* host, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, main_stream));
}
struct DeviceEvent { cudaEvent_t event; };  // starts out as all zeros: nothing to wait for
static void event_record(DeviceEvent* e) {
    if (!e->event) cudaCheck(cudaEventCreateWithFlags(&e->event, cudaEventDisableTiming));
    cudaCheck(cudaEventRecord(e->event, main_stream));
}
static void event_wait(DeviceEvent* e) {
    if (!e->event) return;
    Wait w = {};
    while (waits_for_others && cudaEventQuery(e->event) == cudaErrorNotReady) wait_a_moment(&w);
    (void)cudaGetLastError();
    cudaCheck(cudaEventSynchronize(e->event));
}
// Keeps the host at most four calls of this function ahead of the device where other processes may hang: a launch
// behind too many others would wait without a limit.
static void limit_lead() {
    static DeviceEvent events[4];
    static int next;
    if (!waits_for_others) return;
    event_wait(&events[next]);
    event_record(&events[next]);
    next = (next + 1) % 4;
}
static size_t device_memory_free() {
    size_t free_bytes, total;
    cudaCheck(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes;
}
static size_t device_memory_taken() { return device_free_at_start - device_memory_free(); }
static std::string device_name() {
    cudaDeviceProp properties;
    int device, runtime;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    cudaCheck(cudaRuntimeGetVersion(&runtime));
    return text("%s, CUDA %d.%d", properties.name, runtime / 1000, runtime % 1000 / 10);
}

// Starts a kernel behind everything before it.
#define LAUNCH_SHARED(kernel, blocks, threads, shared, ...) \
    do { \
        kernel<<<blocks, threads, shared, main_stream>>>(__VA_ARGS__); \
        cuda_check(cudaGetLastError(), #kernel, __FILE__, __LINE__); \
    } while (0)
#define LAUNCH(kernel, blocks, threads, ...) LAUNCH_SHARED(kernel, blocks, threads, 0, __VA_ARGS__)

// Blocks for work items, per_block each, along grid.x (the one dimension that reaches 2^31 - 1).
static unsigned grid_for(int64_t work, int64_t per_block) {
    int64_t blocks = (work + per_block - 1) / per_block;
    opRequire(blocks > 0 && blocks <= INT32_MAX, "a launch over %ld items needs %ld blocks, outside 1 to 2^31 - 1",
              work, blocks);
    return (unsigned)blocks;
}
#endif  // a GPU

// Hands out pieces of one allocation. With base NULL it only counts, so that one layout function both plans and places.
struct Arena {
    char* base;
    size_t used, size;
};
static void* take(Arena* a, size_t bytes) {
    void* p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 255) / 256 * 256;
    if (p && a->used > a->size)
        fatal("a pass places %zu bytes where the memory plan took %zu: a kind of pass is missing in it", a->used,
              a->size);
    return p;
}
// Bytes of a floatX in the memory plan: with --plan-memory a GPU's, on the CPU too.
static size_t floatx_bytes = sizeof(floatX);
#define BYTES(type, count) ((size_t)(count) * (strcmp(#type, "floatX") ? sizeof(type) : floatx_bytes))
#define TAKE(arena, type, count) ((type*)take(arena, BYTES(type, count)))

// ===================================================================================================================
// 3. Processes: one per device, world = dp x cp of them. The cp ranks of a group hold consecutive slices of the same
// sequences (context parallel), the dp groups hold different sequences (data parallel); rank = dp_rank * cp + cp_rank.
// mpirun or srun starts them. MPI carries what is small and on the host; what is large and on the device is carried by
// NCCL between GPUs and by MPI on the CPU backend, in the same few calls. Every sum adds the ranks in a fixed order.

struct Processes {
    int rank, world;
    int cp, cp_rank, dp, dp_rank;
    int local_rank, local_world;  // on this machine
    bool connected;               // by MPI, be it to no other process; otherwise no collective does anything
};
static Processes procs = {0, 1, 1, 0, 1, 0, 0, 1, false};
enum Group { WORLD_GROUP, CP_GROUP };
static double hang_timeout = 600;  // seconds that a process waits for others, 0: no limit
static int64_t step_begun;         // the step that this process is in, for that message; 0: the start

// How many processes the launcher says that it started: mpirun's first, since srun may in turn have started mpirun.
static int processes_started() {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (const char* name : names) if (getenv(name)) return atoi(getenv(name));
    return 1;
}

// Splits the world into dp groups of cp ranks.
static void processes_split(int64_t cp) {
    if (procs.world % cp)
        fatal("--cp is %ld; it must divide the number of processes, %d", cp, procs.world);
    procs.cp = (int)cp;
    procs.cp_rank = procs.rank % procs.cp;
    procs.dp = procs.world / procs.cp;
    procs.dp_rank = procs.rank / procs.cp;
}

#ifdef USE_MPI  // with MPI; below, without
static MPI_Comm cp_comm = MPI_COMM_NULL, local_comm = MPI_COMM_NULL, hang_comm = MPI_COMM_NULL;

static void stop_all_processes() { if (waits_for_others) MPI_Abort(MPI_COMM_WORLD, 1); }

// ---- waiting, with a limit
// MPI's own waits have no end, so every wait here looks whether it is over, again and again. A process that has waited
// for hang_timeout seconds asks all others whether they wait too, as whoever waits looks for such questions. Those that
// do not answer are the ones that hang: they are named, and the job ends.

struct ProcessName { char s[96]; };             // "rank 3 (pid 4711 on host)"
static std::vector<ProcessName> process_names;  // (world)
static const double ANSWER_S = 3;   // an answer takes as long as the other's pause between two looks: milliseconds

enum { QUESTION = 1, WAITS_FOR_OTHERS, WAITS_FOR_DISK };
static bool lower_rank_asked;
static int rank_at_disk = -1;  // one that answered so

// Answers questions. Notes in waits[rank], unless NULL, who waits.
static void answer_questions(char* waits) {
    for (int found;;) {
        MPI_Status s;
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, hang_comm, &found, &s);
        if (!found) return;
        MPI_Recv(NULL, 0, MPI_BYTE, s.MPI_SOURCE, s.MPI_TAG, hang_comm, MPI_STATUS_IGNORE);
        if (waits) waits[s.MPI_SOURCE] = true;
        if (s.MPI_TAG == WAITS_FOR_DISK) rank_at_disk = s.MPI_SOURCE;
        if (s.MPI_TAG != QUESTION) continue;
        lower_rank_asked |= s.MPI_SOURCE < procs.rank;
        MPI_Request sent;
        MPI_Isend(NULL, 0, MPI_BYTE, s.MPI_SOURCE, at_disk ? WAITS_FOR_DISK : WAITS_FOR_OTHERS, hang_comm, &sent);
        MPI_Request_free(&sent);
    }
}

// Ends the job with the names of those that do not answer. Returns if it is but a disk that is waited for.
static void name_who_hangs() {
    std::vector<char> waits(procs.world, false);
    waits[procs.rank] = true;
    for (int i = 0; i < procs.world; i++) {
        if (i == procs.rank) continue;
        MPI_Request sent;
        MPI_Isend(NULL, 0, MPI_BYTE, i, QUESTION, hang_comm, &sent);
        MPI_Request_free(&sent);
    }
    rank_at_disk = -1;
    for (double began = seconds(); seconds() - began < ANSWER_S; usleep(1000)) answer_questions(waits.data());
    if (rank_at_disk >= 0) {
        if (!lower_rank_asked)
            fprintf(stderr, "note: %s%s has been waiting for its disk for more than the %g s of --hang-timeout\n",
                    process_name, process_names[rank_at_disk].s, hang_timeout);
        lower_rank_asked = false;
        return;
    }
    if (lower_rank_asked)  // the lowest that asks speaks, and ends this process too
        for (double began = seconds(); seconds() - began < 3 * ANSWER_S;) usleep(100000);
    std::string who, place = step_begun ? text("step %ld", step_begun) : "the start";
    int named = 0;
    for (int i = 0; i < procs.world; i++) {
        if (waits[i] || named++ >= 16) continue;  // 16 say enough
        who += (named > 1 ? ", " : "") + std::string(process_names[i].s);
    }
    if (named)
        fatal("no sign of %s for the %g s of --hang-timeout, in %s: the job ends here. No checkpoint is damaged; "
              "--resume 1 goes on from the newest", who.c_str(), hang_timeout, place.c_str());
    fatal("all %d processes wait for each other since the %g s of --hang-timeout, in %s: a device or the network "
          "between them hangs. No checkpoint is damaged; --resume 1 goes on from the newest", procs.world,
          hang_timeout, place.c_str());
}

// Between two looks at something that other processes bring about: at first no pause, then longer ones, which leave
// the processor to whoever is awaited.
static void wait_a_moment(Wait* w) {
    if (++w->looks < 100) return;
    if (w->looks < 1000) {
        sched_yield();
        return;
    }
    usleep(w->looks < 10000 ? 50 : 500);
    double now = seconds();
    if (w->began == 0) w->began = now;
    else if (now - w->last > 1) w->began += now - w->last;
    w->last = now;
    answer_questions(NULL);
    if (hang_timeout <= 0 || at_disk || now - w->began <= hang_timeout) return;
    name_who_hangs();
    w->began = seconds();
}

static void wait_for(MPI_Request* requests, int n) {
    Wait w = {};
    for (int done = 0;;) {
        MPI_Testall(n, requests, &done, MPI_STATUSES_IGNORE);
        if (done) return;
        wait_a_moment(&w);
    }
}

// ---- small things on the host

static MPI_Comm group_comm(Group g) { return g == CP_GROUP ? cp_comm : MPI_COMM_WORLD; }

// The bytes of rank `root` of the group, to all of the group.
static void broadcast(void* data, int bytes, Group g, int root) {
    if (!procs.connected) return;
    MPI_Request r;
    MPI_Ibcast(data, bytes, MPI_BYTE, root, group_comm(g), &r);
    wait_for(&r, 1);
}

// Everybody's `bytes` bytes, in rank order, to every process: all (world, bytes).
static void gather_to_all(void* all, const void* mine, int bytes) {
    memcpy(all, mine, bytes);
    if (!procs.connected) return;
    MPI_Request r;
    MPI_Iallgather(mine, bytes, MPI_BYTE, all, bytes, MPI_BYTE, MPI_COMM_WORLD, &r);
    wait_for(&r, 1);
}

// Sums of x (n) over all processes, in place, in rank order, so the same bits everywhere. For few numbers.
template <typename Number> static void all_sum(Number* x, int64_t n) {
    if (!procs.connected) return;
    std::vector<Number> all(procs.world * n);
    gather_to_all(all.data(), x, (int)(n * sizeof(Number)));
    for (int64_t i = 0; i < n; i++) {
        x[i] = 0;
        for (int rank = 0; rank < procs.world; rank++) x[i] += all[rank * n + i];
    }
}

static void barrier() {
    if (!procs.connected) return;
    MPI_Request r;
    MPI_Ibarrier(MPI_COMM_WORLD, &r);
    wait_for(&r, 1);
}

// ---- start and end

// The starts of MPI and NCCL wait for the others inside the libraries, without a limit: an alarm is theirs.
static void on_alarm(int) {
    static const char message[] = "error: another process did not come to the start of MPI or NCCL within the seconds "
                                  "of --hang-timeout: look at its output, and whether its host is reached\n";
    _exit(write(STDERR_FILENO, message, sizeof message - 1) < 0 ? 2 : 1);
}
static void limit_start(bool begins) { alarm(begins ? (unsigned)hang_timeout : 0); }

static void processes_start(int* argc, char*** argv) {
    // A single process needs no MPI, and starts faster without; under mpirun -n 1 it is a group of one.
    if (processes_started() <= 1 && !getenv("OMPI_COMM_WORLD_SIZE")) return;
    for (int i = 1; i < *argc; i++) {  // before all options are read, whose messages need the rank
        const char* value = (*argv)[i] + strlen("--hang-timeout");
        if (strncmp((*argv)[i], "--hang-timeout", value - (*argv)[i])) continue;
        hang_timeout = atof(*value == '=' ? value + 1 : i + 1 < *argc ? (*argv)[i + 1] : "");
    }
    signal(SIGALRM, on_alarm);
    limit_start(true);
    int level;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &procs.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &procs.world);
    if (processes_started() > 1 && procs.world == 1)
        fatal("started as %d processes that MPI does not connect: start them with the mpirun of the MPI that this "
              "program was built with, or with srun --mpi=pmix", processes_started());
    MPI_Comm_dup(MPI_COMM_WORLD, &hang_comm);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, procs.rank, MPI_INFO_NULL, &local_comm);
    MPI_Comm_rank(local_comm, &procs.local_rank);
    MPI_Comm_size(local_comm, &procs.local_world);
    limit_start(false);
    procs.connected = true;
    if (procs.world > 1) snprintf(process_name, sizeof process_name, "rank %d: ", procs.rank);
    waits_for_others = procs.world > 1;
    ProcessName mine;
    char host[56] = "";
    gethostname(host, sizeof host - 1);
    snprintf(mine.s, sizeof mine.s, "rank %d (pid %d on %s)", procs.rank, getpid(), host);
    process_names.resize(procs.world);
    gather_to_all(process_names.data(), &mine, sizeof mine);
}

static void processes_end() {
    if (!procs.connected) return;
    barrier();  // MPI_Finalize waits without a limit
    MPI_Finalize();
}

#ifdef USE_NCCL  // between GPUs; the CPU backend's are in dev/cpu_backend.h
#include <nccl.h>

static void cuda_check(ncclResult_t result, const char* call, const char* file, int line) {
    if (result == ncclSuccess) return;
    fatal("%s:%d: %s failed: %s: %s; NCCL_DEBUG=INFO says more", file, line, call, ncclGetErrorString(result),
          ncclGetLastError(NULL));
}

// The collectives of gradients and parameters run beside the kernels, on their own stream and communicator; those
// inside the model run on main_stream, in order with the kernels. All ranks start both kinds in the same order.
static ncclComm_t nccl_world, nccl_cp;
static cudaStream_t collective_stream;
static cudaEvent_t collective_event;

static ncclComm_t nccl_open(MPI_Comm comm) {
    int rank, size;
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &size);
    ncclUniqueId id;
    if (rank == 0) cudaCheck(ncclGetUniqueId(&id));
    MPI_Request r;
    MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, comm, &r);
    wait_for(&r, 1);
    ncclComm_t nccl;
    limit_start(true);
    cudaCheck(ncclCommInitRank(&nccl, size, id, rank));
    limit_start(false);
    return nccl;
}

// Refuses two processes on one device: NCCL would fail on them, with a message that names no cause.
static void check_devices() {
    int device;
    cudaDeviceProp properties;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    std::vector<cudaUUID_t> uuids(procs.world);
    gather_to_all(uuids.data(), &properties.uuid, sizeof properties.uuid);
    for (int rank = 0; rank < procs.rank; rank++)
        if (!memcmp(&uuids[rank], &properties.uuid, sizeof properties.uuid))
            fatal("this process and %s share 1 GPU: every process needs its own, so start at most as many on a machine "
                  "as it has GPUs (mpirun -n, --map-by ppr:N:node; CUDA_VISIBLE_DEVICES may hide some)",
                  process_names[rank].s);
}

// Starts each of the rows of x (rows, n) being summed over all processes, rank r's share r of n / world of a row for
// itself: after collectives_join() these shares hold the sums, the rest of x nothing of use. x is on the device; n is a
// multiple of world.
static void reduce_scatter_start(float* x, int rows, int64_t n) {
    if (!procs.connected) return;
    cudaCheck(cudaEventRecord(collective_event, main_stream));
    cudaCheck(cudaStreamWaitEvent(collective_stream, collective_event));
    int64_t share = n / procs.world;
    cudaCheck(ncclGroupStart());
    for (int row = 0; row < rows; row++, x += n)
        cudaCheck(ncclReduceScatter(x, x + procs.rank * share, share, ncclFloat32, ncclSum, nccl_world,
                                    collective_stream));
    cudaCheck(ncclGroupEnd());
}

// Starts the shares of each of the rows of x (rows, bytes) being gathered: rank r's share r of bytes / world of a row
// is sent to all. x is on the device.
static void all_gather_start(void* x, int rows, int64_t bytes) {
    if (!procs.connected) return;
    cudaCheck(cudaEventRecord(collective_event, main_stream));
    cudaCheck(cudaStreamWaitEvent(collective_stream, collective_event));
    int64_t share = bytes / procs.world;
    cudaCheck(ncclGroupStart());
    for (char* row = (char*)x; rows > 0; rows--, row += bytes)
        cudaCheck(ncclAllGather(row + procs.rank * share, row, share, ncclInt8, nccl_world, collective_stream));
    cudaCheck(ncclGroupEnd());
}

// What follows on main_stream runs after the collectives started so far.
static void collectives_join() {
    if (!procs.connected) return;
    cudaCheck(cudaEventRecord(collective_event, collective_stream));
    cudaCheck(cudaStreamWaitEvent(main_stream, collective_event));
}

// Share p of send goes to cp rank p, share p of recv comes from it: recv, send (cp, bytes_per_peer) on the device, not
// the same memory. On main_stream.
static void all_to_all(void* recv, const void* send, int64_t bytes_per_peer) {
    cudaCheck(ncclGroupStart());
    for (int p = 0; p < procs.cp; p++) {
        cudaCheck(ncclSend((const char*)send + p * bytes_per_peer, bytes_per_peer, ncclInt8, p, nccl_cp, main_stream));
        cudaCheck(ncclRecv((char*)recv + p * bytes_per_peer, bytes_per_peer, ncclInt8, p, nccl_cp, main_stream));
    }
    cudaCheck(ncclGroupEnd());
}

// Sends to cp rank + step and receives as many bytes from cp rank - step, where there is such a rank; step is 1 or -1.
// recv, send on the device, not the same memory. On main_stream.
static void shift(void* recv, const void* send, int64_t bytes, int step) {
    int to = procs.cp_rank + step, from = procs.cp_rank - step;
    cudaCheck(ncclGroupStart());
    if (to >= 0 && to < procs.cp) cudaCheck(ncclSend(send, bytes, ncclInt8, to, nccl_cp, main_stream));
    if (from >= 0 && from < procs.cp) cudaCheck(ncclRecv(recv, bytes, ncclInt8, from, nccl_cp, main_stream));
    cudaCheck(ncclGroupEnd());
}

// Connects the device's collectives; device_open comes before. NCCL takes its buffers at the first call of each kind
// and class of size, so every kind is called here once, as large as the run will: sums of `rows` rows of row_bytes,
// exchanges of peer_bytes. All before the memory plan asks what is free.
static void collectives_open(int rows = 1, int64_t row_bytes = 0, int64_t peer_bytes = 0) {
    if (!procs.connected) return;
    barrier();  // NCCL waits for the others without a limit
    MPI_Comm_split(MPI_COMM_WORLD, procs.dp_rank, procs.cp_rank, &cp_comm);
    check_devices();
    cudaCheck(cudaStreamCreateWithFlags(&collective_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&collective_event, cudaEventDisableTiming));
    nccl_world = nccl_open(MPI_COMM_WORLD);
    if (procs.cp > 1) nccl_cp = nccl_open(cp_comm);
    row_bytes = std::max(row_bytes, (int64_t)procs.world << 20);
    peer_bytes = std::max<int64_t>(peer_bytes, 1 << 20);
    char* x = (char*)device_alloc(std::max(rows * row_bytes, 2 * procs.cp * peer_bytes));
    reduce_scatter_start((float*)x, rows, row_bytes / sizeof(float));
    all_gather_start(x, rows, row_bytes * sizeof(floatX) / sizeof(float));
    collectives_join();
    if (procs.cp > 1) {
        all_to_all(x + procs.cp * peer_bytes, x, peer_bytes);
        for (int step : {1, -1}) shift(x + procs.cp * peer_bytes, x, peer_bytes, step);
    }
    device_synchronize();
    cudaCheck(cudaFree(x));
}
#endif  // NCCL
#else  // without MPI
static void processes_start(int*, char***) {
    if (processes_started() > 1)
        fatal("started as %d processes, but this program was built for one: install libopenmpi-dev and openmpi-bin, "
              "for GPUs libnccl-dev too, and run make again", processes_started());
}
static void processes_end() {}
static void stop_all_processes() {}
static void wait_a_moment(Wait*) {}
static void broadcast(void*, int, Group, int) {}
static void gather_to_all(void* all, const void* mine, int bytes) { memcpy(all, mine, bytes); }
template <typename Number> static void all_sum(Number*, int64_t) {}
static void barrier() {}
static void reduce_scatter_start(float*, int, int64_t) {}
static void all_gather_start(void*, int, int64_t) {}
static void collectives_join() {}
static void all_to_all(void*, const void*, int64_t) {}  // this and the next are not called: cp is 1
static void shift(void*, const void*, int64_t, int) {}
static void collectives_open(int = 1, int64_t = 0, int64_t = 0) {}
#endif  // without MPI
#ifdef CPU_BACKEND
#include "dev/cpu_backend.h"
#endif

static double all_sum(double x) {
    all_sum(&x, 1);
    return x;
}

static double all_max(double x) {
    std::vector<double> all(procs.world, x);  // where the others are only planned for
    gather_to_all(all.data(), &x, sizeof x);
    return *std::max_element(all.begin(), all.end());
}

// SIGTERM, SIGINT, SIGHUP or SIGUSR1, which mpirun hands on without killing soon after, asks a run to stop. A second
// one ends the process, unless it comes at once, as timeout(1) sends each twice, or while a file is written.
static volatile sig_atomic_t stop_signal = 0, writing_file = 0;
static void on_signal(int received) {
    static double first;
    if (!stop_signal) first = seconds();
    else if (!writing_file && seconds() - first > 1) {
        signal(received, SIG_DFL);
        raise(received);  // arrives when this handler returns
    }
    stop_signal = received;
}
static bool stop_asked() { return all_sum((double)stop_signal) > 0; }  // any process; all ask at once

static void say_text(const std::string& s) {  // rank 0 speaks for all
    if (procs.rank) return;
    fputs(s.c_str(), stdout);
    fflush(stdout);
}
#define say(...) say_text(text(__VA_ARGS__))

// ===================================================================================================================
// 4. Data: token shards in llm.c's format; sequences of T+1 tokens out.
// A sequence is T consecutive tokens of one shard and the one after: n of them are an epoch. Sequence i of the run is
// number i mod n of epoch i / n; with shuffling each epoch visits them by its own keyed permutation. So the whole
// position is i. What is read is checked as it is read: a start takes no longer for more data.

static const int shard_header_ints = 256;

struct Shard {
    std::string path;
    int64_t tokens, sequences;
    int width;             // bytes of a token id: 2 or 4
};

struct Loader {
    std::vector<Shard> shards;
    int64_t T, sequences, tokens;  // over all shards
    int64_t unused;        // tokens in no sequence: what is left at the end of each shard
    bool shuffle;
    uint64_t seed;
    int64_t vocab;         // token ids are below that
    int tokenizer_ids;     // of the tokenizer.bin beside the shards; 0: there is none
    uint64_t tokenizer;    // its checksum
    uint64_t fingerprint;  // loader_fingerprint(), once the vocabulary is set
};

static Shard shard_header(const char* path) {
    int64_t bytes;
    int header[shard_header_ints], fd = open_to_read(path, &bytes);
    if (bytes < (int64_t)sizeof header)
        fatal("%s is no token shard: it has %ld bytes, less than the header's %zu", path, bytes, sizeof header);
    read_at(fd, header, sizeof header, 0, path);
    close(fd);
    bool narrow = header[0] == 20240520 && header[1] == 1, wide = header[0] == 20240801 && header[1] == 7;
    if (!narrow && !wide)
        fatal("%s is no token shard: magic %d, version %d; expected 20240520, 1 (16-bit ids) or 20240801, 7 (32-bit "
              "ids). data/prepare.py writes such files", path, header[0], header[1]);
    Shard s = {path, header[2], 0, narrow ? 2 : 4};
    int64_t expected = (int64_t)sizeof header + s.tokens * s.width;
    if (s.tokens < 0 || bytes != expected)
        fatal("%s: its header says %ld tokens, so %ld bytes, but the file has %ld: it is cut or damaged", path,
              s.tokens, expected, bytes);
    return s;
}

// Reads n tokens of a shard, whose ids must be in the vocabulary.
static void read_tokens(const Loader* d, const Shard* s, int64_t first, int64_t n, int* ids) {
    const char* path = s->path.c_str();
    std::vector<uint16_t> narrow(s->width == 2 ? n : 0);
    int64_t at = shard_header_ints * 4 + first * s->width;
    on_disk([&] {
        int fd = open_to_read(path);
        read_at(fd, s->width == 2 ? (void*)narrow.data() : ids, n * s->width, at, path);
        close(fd);
    });
    for (int64_t t = 0; t < n; t++) {
        int64_t id = s->width == 2 ? narrow[t] : (uint32_t)ids[t];
        if (id >= d->vocab)
            fatal("%s: token %ld is id %ld, but the vocabulary has %ld ids (0 to %ld): was it made with another "
                  "tokenizer? The model's file, or else --vocab-size, sets the vocabulary", path, first + t, id,
                  d->vocab, d->vocab - 1);
        ids[t] = (int)id;
    }
}

// The path up to the last slash; "" for a file in the current folder.
static std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/') + 1); }

// Finds the files that a pattern names. The path of a file is no pattern, nor is that of the folder that they are in.
static std::vector<std::string> find_shards(const std::string& pattern) {
    std::string folder = folder_of(pattern), escaped;
    size_t literal = !access(pattern.c_str(), F_OK) ? pattern.size()
                   : !access((folder + ".").c_str(), F_OK) ? folder.size() : 0;
    for (size_t i = 0; i < pattern.size(); i++) {
        if (i < literal && strchr("*?[\\", pattern[i])) escaped += '\\';
        escaped += pattern[i];
    }
    glob_t found;
    if (glob(escaped.c_str(), literal ? 0 : GLOB_TILDE, NULL, &found) || found.gl_pathc == 0)
        fatal("no file matches %s: data/prepare.py makes token shards, or name yours with --train-data and --val-data",
              pattern.c_str());
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    return paths;
}

// What lies beside shards tells whether their data set is finished and whole, and their tokenizer, which must be that
// of all shards.
static void look_beside(Loader* d, const std::string& folder, const std::string& pattern) {
    std::string progress = folder + "progress.json", manifest = folder + "manifest.json";
    if (!access(progress.c_str(), F_OK) && access(manifest.c_str(), F_OK))
        fatal("%s is part of a data set: %s says that its preparation was interrupted; the same command of "
              "data/prepare.py goes on with it", folder.c_str(), progress.c_str());
    if (!access(manifest.c_str(), R_OK)) {  // data/prepare.py's list of the shards
        std::string file = read_file(manifest.c_str());
        const std::string before = "\"name\": \"";
        for (size_t at = 0; (at = file.find(before, at)) != std::string::npos;) {
            at += before.size();
            std::string shard = file.substr(at, file.find('"', at) - at), path = folder + shard;
            if (!fnmatch(pattern.c_str() + folder_of(pattern).size(), shard.c_str(), 0) && access(path.c_str(), F_OK))
                fatal("%s is not there, though %s names it: bring it back, or name the shards that you want with a "
                      "pattern that leaves it out", path.c_str(), manifest.c_str());
        }
    }
    std::string name = folder + "tokenizer.bin";
    if (access(name.c_str(), R_OK)) return;
    std::string file = read_file(name.c_str());
    uint64_t sum = checksum(file.data(), file.size());
    if (d->tokenizer_ids && sum != d->tokenizer)
        fatal("%s is not that of the other shards: data of different tokenizers cannot be mixed", name.c_str());
    const int* header = (const int*)file.data();
    if (file.size() >= 16 && header[0] == 20240328) d->tokenizer_ids = header[2];
    d->tokenizer = sum;
}

// Finds every shard that matches the pattern, in the order of their names. The vocabulary is set later.
static void loader_init(Loader* d, const char* pattern, int64_t T, bool shuffle, uint64_t seed) {
    *d = {{}, T, 0, 0, 0, shuffle, seed, INT64_MAX, 0, 0};
    std::string folder = "none yet";
    for (const std::string& path : find_shards(pattern)) {
        Shard s = shard_header(path.c_str());
        if (folder_of(path) != folder) look_beside(d, folder = folder_of(path), pattern);
        s.sequences = s.tokens > 0 ? (s.tokens - 1) / T : 0;
        d->sequences += s.sequences;
        d->tokens += s.tokens;
        d->unused += s.sequences ? s.tokens - s.sequences * T - 1 : s.tokens;
        d->shards.push_back(s);
    }
    if (d->sequences == 0)
        fatal("%s: %zu shard(s) of together %ld tokens hold no sequence of seq-len + 1 = %ld tokens: lower --seq-len "
              "or prepare more data", pattern, d->shards.size(), d->tokens, T + 1);
}

// The vocabulary of a model may be padded, but not by as much as separates it from another tokenizer's.
static void check_tokenizer(const char* model, int64_t vocab, const std::string& path, int ids) {
    if (ids <= vocab && vocab - ids < 1024) return;
    fatal("%s has a vocabulary of %ld ids, but %s has %d tokens: they do not belong together. data/prepare.py "
          "--tokenizer makes shards for a model", model, vocab, path.c_str(), ids);
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

// Reads n tokens of the k-th sequence of the data, from its token t on.
static void read_sequence(const Loader* d, int64_t k, int64_t t, int64_t n, int* ids) {
    const Shard* s = d->shards.data();
    while (k >= s->sequences) k -= (s++)->sequences;
    read_tokens(d, s, k * d->T + t, n, ids);
}

// Writes this process's tokens of sequence i of the run: inputs (T/W) and targets (T/W), the inputs shifted by one.
static void loader_sequence(const Loader* d, int64_t i, int* inputs, int* targets) {
    int64_t epoch = i / d->sequences, k = i % d->sequences, rows = d->T / procs.cp;
    if (d->shuffle) k = permute(k, d->sequences, mix64(d->seed) ^ (uint64_t)epoch);
    std::vector<int> ids(rows + 1);
    read_sequence(d, k, procs.cp_rank * rows, rows + 1, ids.data());
    std::copy(ids.begin(), ids.end() - 1, inputs);
    std::copy(ids.begin() + 1, ids.end(), targets);
}

// Tells other data of the same size apart: a checksum of the first tokens of sequences from everywhere. It does not
// depend on how the tokens are cut into shards.
static uint64_t loader_fingerprint(const Loader* d) {
    const int64_t samples = 1024, length = std::min<int64_t>(d->T, 64);
    std::vector<int> tokens(samples * length);
    on_disk([&] {
        for (int64_t i = 0; i < samples; i++)
            read_sequence(d, (int64_t)((double)i / samples * d->sequences), 0, length, &tokens[i * length]);
    });
    return checksum(tokens.data(), tokens.size() * sizeof(int));
}

// The vocabulary that data without a tokenizer.bin is taken to have: that of bytes, unless an id near the beginning is
// too large for it, or GPT-2's.
static int guess_vocabulary(const Loader* d) {
    const Shard* s = d->shards.data();
    while (!s->sequences) s++;
    std::vector<int> ids(std::min<int64_t>(s->tokens, 1 << 20));
    read_tokens(d, s, 0, ids.size(), ids.data());
    for (int id : ids) if ((uint32_t)id >= 257) return 50257;
    return 257;
}

// ===================================================================================================================
// 5. Operations: forward and backward of each, a kernel and its launcher side by side; plain-C twins with the same
// signatures are the CPU backend and the oracle of the tests. They are encoder_, layernorm_, matmul_, gelu_,
// crossentropy_, rope_rotate and sdpa_ (cuDNN's dense causal attention); fp8_ for products with FP8 operands;
// heads_pack and _unpack for context parallelism; sum_squares, sum_losses and adamw_update. operations_open, _bytes and
// _allocate serve the memory plan.

// A matrix in FP8: a gradient's numbers are e5m2 (largest 57344), all others e4m3 (448), made by a factor that takes
// the matrix's largest magnitude there. GPUs multiply FP8 rows by rows only, so a matrix may lie there twice, as it is
// and transposed.
typedef uint8_t fp8_t;
struct alignas(16) Fp8Scale {  // cuBLASLt refuses a scale, which inverse is to it, at any other address
    float inverse;   // FP8 number times inverse: the number it stands for
    float amax;      // the largest magnitude of the wider matrix, or a bound of it
    float unused[2];
};
struct Fp8Matrix {
    fp8_t* rows;     // (N, C), or NULL: not wanted
    fp8_t* columns;  // (C, N), or NULL: not wanted
    Fp8Scale* scale;
};

struct AdamW {
    float lr, beta1, beta2, beta1_correction, beta2_correction;  // corrections: 1 - beta^t
    float eps, weight_decay, grad_scale;
};

// Angles at position 10^6 need more bits than fp32 has, and a table of every position would be as large as q. So the
// host makes two short tables in double, of pos & 1023 and of the multiples of 1024, and a complex product joins them.
template <typename Real>  // float; in the tests double too
static void rope_table(Real* table /*(1024 + ceil(T/1024), D/2, 2) cos, sin; host memory*/, int64_t T, int D,
                       double theta) {
    int64_t rows = 1024 + (T + 1023) / 1024;
    for (int64_t r = 0; r < rows; r++) {
        int64_t position = r < 1024 ? r : (r - 1024) * 1024;
        for (int d = 0; d < D / 2; d++) {
            double angle = position * pow(theta, -2.0 * d / D);
            table[(r * (D / 2) + d) * 2] = (Real)cos(angle);
            table[(r * (D / 2) + d) * 2 + 1] = (Real)sin(angle);
        }
    }
}

#ifdef CPU_BACKEND  // the twins; below, down to the end of the section, CUDA
#include "dev/cpu_ops.h"
using namespace cpu;
#else  // CUDA
// ---- loads of 8 elements, reductions
// Eight neighbouring elements: one 128-bit access in bf16, two in fp32. Rows are multiples of 8 everywhere. They stay
// in the type of memory until used, since that takes half the registers while a thread waits for several of them.
template <typename T> struct alignas(16) Pack8 { T v[8]; };

template <typename T> __device__ __forceinline__ Pack8<T> load8(const T* p) {
    Pack8<T> pack;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) ((int4*)&pack)[i] = ((const int4*)p)[i];
    return pack;
}
// "stream": the data is not wanted again soon, so it should be the first to leave the L2.
template <typename T> __device__ __forceinline__ Pack8<T> load8_stream(const T* p) {
    Pack8<T> pack;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) ((int4*)&pack)[i] = __ldcs((const int4*)p + i);
    return pack;
}
template <typename T> __device__ __forceinline__ void store8(T* p, const Pack8<T>& pack) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) ((int4*)p)[i] = ((const int4*)&pack)[i];
}
template <typename T> __device__ __forceinline__ void store8_stream(T* p, const Pack8<T>& pack) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) __stcs((int4*)p + i, ((const int4*)&pack)[i]);
}
__device__ __forceinline__ Pack8<float> pack8(const float (&x)[8], float) {
    Pack8<float> pack;
#pragma unroll
    for (int i = 0; i < 8; i++) pack.v[i] = x[i];
    return pack;
}
__device__ __forceinline__ Pack8<__nv_bfloat16> pack8(const float (&x)[8], __nv_bfloat16) {
    Pack8<__nv_bfloat16> pack;
#pragma unroll
    for (int i = 0; i < 4; i++) ((__nv_bfloat162*)&pack)[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return pack;
}
// Rounds eight floats to T: to_pack8<floatX>(x).
template <typename T> __device__ __forceinline__ Pack8<T> to_pack8(const float (&x)[8]) { return pack8(x, T()); }
// Makes the compiler convert the elements again where they are used next, instead of holding eight floats until then.
template <typename T> __device__ __forceinline__ void stay_packed(Pack8<T>& pack) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) * 2; i++) asm volatile("" : "+r"(((int*)&pack)[i]));
}

// Inclusive prefix sum over the warp.
__device__ __forceinline__ int warp_prefix(int x) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int before = __shfl_up_sync(0xffffffffu, x, offset);
        if ((int)(threadIdx.x % 32) >= offset) x += before;
    }
    return x;
}

// Over the warp, or over WIDTH neighbouring lanes, which mask names; the result is the same in all of them.
template <int WIDTH = 32> __device__ __forceinline__ float warp_sum(float x, unsigned mask = 0xffffffffu) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
    return x;
}
template <int WIDTH = 32> __device__ __forceinline__ float warp_max(float x, unsigned mask = 0xffffffffu) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(mask, x, offset));
    return x;
}

#define opRequireRows(op, C) \
    opRequire((C) > 0 && (C) % 8 == 0, "%s: rows of %d elements, not a multiple of 8", op, (int)(C))

// Sums of R values over the block, the same in every thread. shared holds R floats a warp, and a caller in a loop
// alternates between two of them: then one barrier a call is enough.
template <int R> __device__ __forceinline__ void block_sum(float (&x)[R], float* shared) {
    int warps = blockDim.x / 32;
#pragma unroll
    for (int r = 0; r < R; r++) x[r] = warp_sum(x[r]);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int r = 0; r < R; r++) shared[threadIdx.x / 32 * R + r] = x[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; r++) x[r] = 0.0f;
    for (int w = 0; w < warps; w++) {
#pragma unroll
        for (int r = 0; r < R; r++) x[r] += shared[w * R + r];
    }
}

// ---- sums over rows: partial results to totals
// dst += the sum over r of partial[r]: the second stage of every gradient that sums over all rows. The n columns belong
// to up to three tensors, one behind the other, n / count each; a tensor that is NULL is left out.
struct SumTargets {
    float* dst[3];
    int count;
};

__global__ void __launch_bounds__(1024) add_partials_kernel(SumTargets to, const float* partial /*(ranges, n)*/,
                                                            int ranges, int n) {
    __shared__ float sums[32][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < n) {
        for (int r = threadIdx.y; r < ranges; r += 32) sum += partial[(int64_t)r * n + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= n) return;
    sum = 0.0f;
    for (int y = 0; y < 32; y++) sum += sums[y][threadIdx.x];
    int size = n / to.count, which = column / size;
    float* dst = which == 0 ? to.dst[0] : which == 1 ? to.dst[1] : to.dst[2];
    if (dst) dst[column % size] += sum;
}

static void add_partials(SumTargets to, const float* partial, int ranges, int n) {
    LAUNCH(add_partials_kernel, grid_for(n, 32), dim3(32, 32), to, partial, ranges, n);
}

// ---- encoder
// A warp a row: the token is read once, and C needs no division.
__global__ void __launch_bounds__(256)
    encoder_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, int64_t N, int64_t T,
                           int C, int64_t t0) {
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= N) return;
    const floatX* word = wte + (int64_t)tokens[row] * C;
    const floatX* position = wpe ? wpe + (t0 + row % T) * C : NULL;
    for (int c = threadIdx.x * 8; c < C; c += 256) {
        Pack8<floatX> x = load8(word + c);
        if (position) {
            Pack8<floatX> p = load8(position + c);
            float sum[8];
            for (int i = 0; i < 8; i++) sum[i] = (float)x.v[i] + (float)p.v[i];
            x = to_pack8<floatX>(sum);
        }
        store8(out + row * C + c, x);
    }
}

static void encoder_forward(floatX* out /*(B,T,C)*/, const int* tokens /*(B,T)*/, const floatX* wte /*(Vp,C)*/,
                            const floatX* wpe /*(maxT,C) or NULL*/, int B, int64_t T, int C,
                            int64_t t0 /*position of token 0*/) {
    opRequireRows("encoder_forward", C);
    int64_t N = B * T;
    LAUNCH(encoder_forward_kernel, grid_for(N, 8), dim3(32, 8), out, tokens, wte, wpe, N, T, C, t0);
}

// dwte sums the rows of dout that hold the same token, anything from none to all of them (bytes: N/257 on average).
// So the rows are sorted by token, stably, and the sorted list is cut into ranges of equal length, whatever the tokens.
// A block adds up the runs of equal tokens of its range. A run inside the range is complete and goes to dwte. Of a run
// that crosses the range's borders the sum is kept, and a second kernel adds those up. Every row of dwte is written by
// one block only.
constexpr int ENCODER_RANGE = 32;     // least rows a range
constexpr int ENCODER_RANGES = 8192;  // most ranges: several waves of blocks, and little scratch memory

struct EncoderScratch {
    int64_t ranges;
    int range;            // rows a range
    int *unsorted, *row;  // (N) rows of dout: 0, 1, 2 ..., and in the order of their tokens
    int* key;             // (N) the tokens in order
    float* head;          // (ranges, C) sum of the range's part of a run that began before it
    float* tail;          // (ranges, C) sum of the range's part of a run that begins in it and goes on behind it
    void* sort;           // what CUB's radix sort needs, asked for with the most bits that a token has
    size_t sort_bytes, bytes;
};

static EncoderScratch encoder_scratch(char* base, int64_t N, int C) {
    opRequire(N > 0 && N <= INT32_MAX, "encoder_backward: %ld rows, outside 1 to 2^31 - 1", N);
    EncoderScratch s = {};
    s.range = std::max(ENCODER_RANGE, (int)ceil_div(N, ENCODER_RANGES));
    s.ranges = ceil_div(N, s.range);
    cudaCheck(cub::DeviceRadixSort::SortPairs(NULL, s.sort_bytes, s.key, s.key, s.row, s.row, (int)N, 0, 31));
    Arena a = {base, 0, SIZE_MAX};
    s.unsorted = TAKE(&a, int, N);
    s.row = TAKE(&a, int, N);
    s.key = TAKE(&a, int, N);
    s.head = TAKE(&a, float, s.ranges * C);
    s.tail = TAKE(&a, float, s.ranges * C);
    s.sort = TAKE(&a, char, s.sort_bytes);
    s.bytes = a.used;
    return s;
}

static size_t encoder_backward_scratch_bytes(int64_t N, int C) { return encoder_scratch(NULL, N, C).bytes; }

__global__ void __launch_bounds__(256) count_up_kernel(int* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) x[i] = (int)i;
}

__global__ void __launch_bounds__(256) encoder_backward_kernel(float* dwte, float* head, float* tail,
                                                               const floatX* dout, const int* key /*(n) sorted*/,
                                                               const int* row /*(n)*/, int64_t n, int range, int C) {
    constexpr int U = 2;  // more rows at a time take registers, so fewer blocks fit: slower
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (c >= C) return;
    int64_t begin = (int64_t)blockIdx.x * range, end = min(n, begin + range);
    bool from_before = begin > 0 && key[begin - 1] == key[begin];  // the run that we are in began before the range
    bool goes_on = end < n && key[end - 1] == key[end];            // the last run goes on behind it
    float sum[8] = {};

    for (int64_t i0 = begin; i0 < end; i0 += U) {
        int k[U + 1];
        bool ends[U], to_head[U], complete[U];
        Pack8<floatX> x[U];
        Pack8<float> old[U];

        // All loads before the first use, those of dwte too.
#pragma unroll
        for (int u = 0; u <= U; u++) k[u] = i0 + u < end ? key[i0 + u] : -1;
#pragma unroll
        for (int u = 0; u < U; u++) {
            x[u] = {};
            if (i0 + u < end) x[u] = load8_stream(dout + (int64_t)row[i0 + u] * C + c);
            ends[u] = k[u] != k[u + 1];
            to_head[u] = from_before;
            complete[u] = ends[u] && !from_before && !(i0 + u + 1 == end && goes_on);
            if (complete[u]) old[u] = load8(dwte + (int64_t)k[u] * C + c);
            from_before = from_before && !ends[u];
        }

        // Where a run ends, its sum goes out: to dwte, or what the range has of it to head or tail.
#pragma unroll
        for (int u = 0; u < U; u++) {
            for (int j = 0; j < 8; j++) sum[j] += (float)x[u].v[j];
            if (!ends[u]) continue;
            float* to = (to_head[u] ? head : tail) + (int64_t)blockIdx.x * C;
            if (complete[u]) {
                to = dwte + (int64_t)k[u] * C;
                for (int j = 0; j < 8; j++) sum[j] += old[u].v[j];
            }
            store8(to + c, to_pack8<float>(sum));
            for (int j = 0; j < 8; j++) sum[j] = 0.0f;
        }
    }
}

// Adds up the runs that cross ranges: the tail of the range where the run begins and the heads of the following ones. A
// block looks at 8 ranges and takes 256 columns; of a run's heads each of its 8 warps adds every eighth.
__global__ void __launch_bounds__(256) encoder_backward_join_kernel(float* dwte, const float* head, const float* tail,
                                                                    const int* key, int64_t n, int range,
                                                                    int64_t ranges, int C) {
    __shared__ __align__(16) float sums[8][256];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c = blockIdx.y * 256 + lane * 8;

    int64_t p = (int64_t)blockIdx.x * 8 + lane, begin = p * range, end = begin + range;
    bool joins = lane < 8 && end < n && key[end - 1] == key[end] &&
                 (begin == 0 || key[begin - 1] != key[end]);  // else the run began in an earlier range
    unsigned todo = __ballot_sync(0xffffffffu, joins);
    for (; todo; todo &= todo - 1) {
        p = (int64_t)blockIdx.x * 8 + __ffs(todo) - 1;
        int k = key[p * range + range - 1];
        float sum[8] = {};
        if (c < C) {
            if (warp == 0) {
                Pack8<float> x = load8(tail + p * C + c);
                for (int j = 0; j < 8; j++) sum[j] = x.v[j];
            }
            for (int64_t q0 = p + 1 + warp; q0 < ranges && key[q0 * range] == k; q0 += 32) {
                Pack8<float> x[4];
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    int64_t q = q0 + 8 * u;
                    x[u] = {};
                    if (q < ranges && key[q * range] == k) x[u] = load8(head + q * C + c);
                }
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    for (int j = 0; j < 8; j++) sum[j] += x[u].v[j];
                }
            }
        }

        store8(&sums[warp][lane * 8], to_pack8<float>(sum));
        __syncthreads();
        int column = blockIdx.y * 256 + threadIdx.x;
        if (column < C) {
            float total = 0.0f;
            for (int w = 0; w < 8; w++) total += sums[w][threadIdx.x];
            dwte[(int64_t)k * C + column] += total;
        }
        __syncthreads();
    }
}

// A warp a position, summing over the batch.
__global__ void __launch_bounds__(256)
    encoder_backward_wpe_kernel(float* dwpe, const floatX* dout, int B, int64_t T, int C, int64_t t0) {
    int64_t t = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (t >= T) return;
    for (int c = threadIdx.x * 8; c < C; c += 256) {
        Pack8<float> sum = load8(dwpe + (t0 + t) * C + c);
        for (int b = 0; b < B; b++) {
            Pack8<floatX> x = load8(dout + (b * T + t) * C + c);
            for (int i = 0; i < 8; i++) sum.v[i] += (float)x.v[i];
        }
        store8(dwpe + (t0 + t) * C + c, sum);
    }
}

static void encoder_backward(float* dwte /*(Vp,C) +=*/, float* dwpe /*(maxT,C) += or NULL*/,
                             const floatX* dout /*(B,T,C)*/, const int* tokens /*(B,T)*/, int B, int64_t T, int C,
                             int64_t t0, int Vp) {
    opRequireRows("encoder_backward", C);
    int64_t N = B * T;
    EncoderScratch s = encoder_scratch((char*)scratch(encoder_backward_scratch_bytes(N, C), "encoder_backward"), N, C);
    int bits = 1;
    while ((Vp - 1) >> bits) bits++;
    LAUNCH(count_up_kernel, grid_for(N, 256), 256, s.unsorted, N);
    cudaCheck(cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, tokens, s.key, s.unsorted, s.row, (int)N, 0, bits,
                                              main_stream));
    int threads = std::min(256, (int)ceil_div(C / 8, 32) * 32);
    dim3 ranges(s.ranges, ceil_div(C / 8, threads)), joins(ceil_div(s.ranges, 8), ceil_div(C, 256));
    LAUNCH(encoder_backward_kernel, ranges, threads, dwte, s.head, s.tail, dout, s.key, s.row, N, s.range, C);
    LAUNCH(encoder_backward_join_kernel, joins, 256, dwte, s.head, s.tail, s.key, N, s.range, s.ranges, C);
    if (dwpe) {
        LAUNCH(encoder_backward_wpe_kernel, grid_for(T, 8), dim3(32, 8), dwpe, dout, B, T, C, t0);
    }
}

// ---- layernorm
constexpr int LAYERNORM_MAX_C = 4096;
constexpr int LAYERNORM_MAX_BLOCKS = 1024;

static void layernorm_require(const char* op, int C) {
    opRequireRows(op, C);
    opRequire(C <= LAYERNORM_MAX_C, "%s: %d channels, at most %d", op, C, LAYERNORM_MAX_C);
}

// A warp a row, which it holds in registers, 8 of every 256 channels a lane: no barriers, each element is read once.
template <int K>
__global__ void __launch_bounds__(256) layernorm_forward_kernel(floatX* out, float* mean, float* rstd,
                                                                const floatX* inp, const floatX* weight,
                                                                const floatX* bias, int64_t N, int C) {
    int lane = threadIdx.x;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= N) return;
    Pack8<floatX> x[K];
    float sum = 0.0f, square = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        int c = k * 256 + lane * 8;
        if (c < C) x[k] = load8_stream(inp + row * C + c);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (k * 256 + lane * 8 >= C) continue;
        for (int i = 0; i < 8; i++) sum += (float)x[k].v[i];
    }
    float m = warp_sum(sum) / C;

#pragma unroll
    for (int k = 0; k < K; k++) {
        if (k * 256 + lane * 8 >= C) continue;
        for (int i = 0; i < 8; i++) square += ((float)x[k].v[i] - m) * ((float)x[k].v[i] - m);
    }
    float scale = rsqrtf(warp_sum(square) / C + 1e-5f);

#pragma unroll
    for (int k = 0; k < K; k++) {
        int c = k * 256 + lane * 8;
        if (c >= C) continue;
        Pack8<floatX> w = load8(weight + c), b = load8(bias + c);
        float y[8];
        for (int i = 0; i < 8; i++) y[i] = ((float)x[k].v[i] - m) * scale * (float)w.v[i] + (float)b.v[i];
        store8(out + row * C + c, to_pack8<floatX>(y));
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = scale;
    }
}

static void layernorm_forward(floatX* out, float* mean /*(N)*/, float* rstd /*(N)*/, const floatX* inp /*(N,C)*/,
                              const floatX* weight /*(C)*/, const floatX* bias /*(C)*/, int64_t N, int C) {
    layernorm_require("layernorm_forward", C);
    decltype(&layernorm_forward_kernel<1>) kernels[] = {
        layernorm_forward_kernel<1>, layernorm_forward_kernel<2>, layernorm_forward_kernel<3>,
        layernorm_forward_kernel<4>, layernorm_forward_kernel<5>, layernorm_forward_kernel<6>,
        layernorm_forward_kernel<7>, layernorm_forward_kernel<8>};
    int K = (C + 255) / 256;
    auto kernel = K <= 8 ? kernels[K - 1] : layernorm_forward_kernel<LAYERNORM_MAX_C / 256>;
    LAUNCH(kernel, grid_for(N, 8), dim3(32, 8), out, mean, rstd, inp, weight, bias, N, C);
}

// A block spans a row, 8 channels a thread, and goes from row to row; one wave of blocks does them all. Each thread
// keeps its channels' sums for dweight, dbias and dsum in registers to the end. What counts is how many blocks fit, so
// that some load while others wait at the barrier: a warp a row, or two rows at a time, take more registers and were
// slower.
__global__ void __launch_bounds__(512, 2) layernorm_backward_kernel(floatX* dinp, float* partial /*(blocks,3,C)*/,
                                                                    const floatX* dout, const floatX* inp,
                                                                    const floatX* weight, const float* mean,
                                                                    const float* rstd, int64_t N, int C) {
    __shared__ float shared[2][16 * 2];
    int c = threadIdx.x * 8, turn = 0;
    Pack8<floatX> d = {}, x = {}, old = {}, w = {};  // threads without channels add zeros
    float dweight[8] = {}, dbias[8] = {}, dsum[8] = {};
    if (c < C) w = load8(weight + c);

    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        if (c < C) {
            d = load8_stream(dout + row * C + c);
            x = load8_stream(inp + row * C + c);
            old = load8(dinp + row * C + c);
        }

        float m = mean[row], scale = rstd[row];
        float sums[2] = {};  // of dnorm = weight * dout, and of dnorm * norm
        for (int i = 0; i < 8; i++) {
            float norm = ((float)x.v[i] - m) * scale, dnorm = (float)d.v[i] * (float)w.v[i];
            sums[0] += dnorm;
            sums[1] += dnorm * norm;
            dbias[i] += (float)d.v[i];
            dweight[i] += (float)d.v[i] * norm;
        }
        block_sum(sums, shared[turn]);
        turn ^= 1;

        stay_packed(d);
        stay_packed(x);
        stay_packed(w);
        float dnorm_mean = sums[0] / C, dnorm_norm_mean = sums[1] / C;
        float y[8];
        for (int i = 0; i < 8; i++) {
            float norm = ((float)x.v[i] - m) * scale, dnorm = (float)d.v[i] * (float)w.v[i];
            y[i] = (float)old.v[i] + (dnorm - dnorm_mean - norm * dnorm_norm_mean) * scale;
            dsum[i] += y[i];
        }
        if (c < C) store8(dinp + row * C + c, to_pack8<floatX>(y));
    }

    if (c >= C) return;
    float* sums = partial + (int64_t)blockIdx.x * 3 * C + c;
    store8(sums, to_pack8<float>(dweight));
    store8(sums + C, to_pack8<float>(dbias));
    store8(sums + 2 * C, to_pack8<float>(dsum));
}

static size_t layernorm_backward_scratch_bytes(int C) { return (size_t)LAYERNORM_MAX_BLOCKS * 3 * C * sizeof(float); }

static void layernorm_backward(floatX* dinp /*(N,C) +=*/, float* dweight /*(C) +=*/, float* dbias /*(C) +=*/,
                               float* dsum /*(C) += the sums of dinp's columns, or NULL*/,
                               const floatX* dout /*(N,C)*/, const floatX* inp /*(N,C)*/, const floatX* weight /*(C)*/,
                               const float* mean /*(N)*/, const float* rstd /*(N)*/, int64_t N, int C) {
    layernorm_require("layernorm_backward", C);
    float* partial = (float*)scratch(layernorm_backward_scratch_bytes(C), "layernorm_backward");
    int threads = (int)ceil_div(C / 8, 32) * 32;
    static int known_threads, blocks_per_sm;  // the same C comes again and again
    if (threads != known_threads) {
        known_threads = threads;
        cudaCheck(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, layernorm_backward_kernel, threads, 0));
    }
    int blocks = (int)std::min(N, (int64_t)std::min(blocks_per_sm * device_sms, LAYERNORM_MAX_BLOCKS));
    LAUNCH(layernorm_backward_kernel, blocks, threads, dinp, partial, dout, inp, weight, mean, rstd, N, C);
    add_partials({{dweight, dbias, dsum}, 3}, partial, blocks, 3 * C);
}

// ---- matmul
// cuBLASLt's matrices are column major, so a row-major (N,C) is its (C,N), and D = op(A) op(B) is written for the
// transposes. Sums are fp32; in the fp32 build without TF32.
enum MatmulOperands { FLOATX, FP8, FP8_GRADIENT };  // A and B: both floatX; both e4m3; A e4m3, B e5m2

struct MatmulShape {
    int64_t m, n, k;
    bool trans_a, trans_b;
    bool bias, add;  // D (m,n) = op(A) op(B) + bias (m) + add (m,n)
    bool dgelu;      // D = op(A) op(B) * GELU'(x), x (m,n) what GELU was applied to
    bool float_out;
    MatmulOperands operands;
};

// The choice of a kernel takes far longer than a launch, so it is made once a shape and kept.
struct MatmulPlan {
    MatmulShape shape;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    int proposals;  // how many kernels cuBLASLt knows; 2: that many or more
};
constexpr int MATMUL_PLANS = 256;
static MatmulPlan matmul_plans[MATMUL_PLANS];
static int64_t matmul_plan_count;

// Takes the kernel that cuBLASLt proposes first: the one that it holds for the fastest. There is at least one, except
// for dgelu, which can do without.
static void matmul_choose(MatmulPlan* p) {
    cublasLtMatmulPreference_t preference;
    cudaCheck(cublasLtMatmulPreferenceCreate(&preference));
    cudaCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                   &cublaslt_workspace_bytes, sizeof(cublaslt_workspace_bytes)));
    uint32_t alignment = 16;  // cuBLASLt assumes 256 unless told; tensors inside the parameter memory have 16
    for (auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                       CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
        cudaCheck(cublasLtMatmulPreferenceSetAttribute(preference, which, &alignment, sizeof(alignment)));
    }
    cublasLtMatmulHeuristicResult_t found[2];
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cublaslt_handle, p->desc, p->a, p->b, p->d, p->d, preference,
                                                           2, found, &p->proposals);
    if (status != CUBLAS_STATUS_SUCCESS) p->proposals = 0;
    const MatmulShape& s = p->shape;
    opRequire(p->proposals > 0 || s.dgelu, "cuBLASLt knows no kernel for m = %ld, n = %ld, k = %ld, trans %d %d, "
              "bias %d, operands of kind %d: %s", s.m, s.n, s.k, s.trans_a, s.trans_b, s.bias, s.operands,
              cublasLtGetStatusString(status));
    if (p->proposals > 0) p->algo = found[0].algo;
    cudaCheck(cublasLtMatmulPreferenceDestroy(preference));
}

template <typename T> static void matmul_set(MatmulPlan* p, cublasLtMatmulDescAttributes_t name, const T& value) {
    cudaCheck(cublasLtMatmulDescSetAttribute(p->desc, name, &value, sizeof value));
}

static MatmulPlan* matmul_plan(const MatmulShape& s) {
    for (int i = 0; i < std::min(matmul_plan_count, (int64_t)MATMUL_PLANS); i++) {
        const MatmulShape& x = matmul_plans[i].shape;
        if (x.m == s.m && x.n == s.n && x.k == s.k && x.trans_a == s.trans_a && x.trans_b == s.trans_b &&
            x.bias == s.bias && x.add == s.add && x.dgelu == s.dgelu && x.float_out == s.float_out &&
            x.operands == s.operands)
            return &matmul_plans[i];
    }
    MatmulPlan* p = &matmul_plans[matmul_plan_count % MATMUL_PLANS];
    if (matmul_plan_count++ >= MATMUL_PLANS) {  // the oldest plan goes
        cudaCheck(cublasLtMatmulDescDestroy(p->desc));
        cudaCheck(cublasLtMatrixLayoutDestroy(p->a));
        cudaCheck(cublasLtMatrixLayoutDestroy(p->b));
        cudaCheck(cublasLtMatrixLayoutDestroy(p->d));
    }
    *p = {s};
    cublasOperation_t op_a = s.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = s.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = s.bias ? CUBLASLT_EPILOGUE_BIAS
                                : s.dgelu ? CUBLASLT_EPILOGUE_DGELU : CUBLASLT_EPILOGUE_DEFAULT;
    cudaCheck(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSA, op_a);
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSB, op_b);
    matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (s.dgelu) matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, s.m);
    int64_t a_rows = s.trans_a ? s.k : s.m, a_cols = s.trans_a ? s.m : s.k;
    int64_t b_rows = s.trans_b ? s.n : s.k, b_cols = s.trans_b ? s.k : s.n;
    const cudaDataType_t a_type[] = {FLOATX_CUDA, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3};
    const cudaDataType_t b_type[] = {FLOATX_CUDA, CUDA_R_8F_E4M3, CUDA_R_8F_E5M2};
    cudaCheck(cublasLtMatrixLayoutCreate(&p->a, a_type[s.operands], a_rows, a_cols, a_rows));
    cudaCheck(cublasLtMatrixLayoutCreate(&p->b, b_type[s.operands], b_rows, b_cols, b_rows));
    cudaCheck(cublasLtMatrixLayoutCreate(&p->d, s.float_out ? CUDA_R_32F : FLOATX_CUDA, s.m, s.n, s.m));
    // Hopper's tensor cores keep 14 bits of a sum of FP8 products: enough for an activation. Gradients, of smaller
    // terms and longer sums, leave them for fp32 registers every few steps.
    int8_t fast = s.operands == FP8;
    matmul_set(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, fast);
    if (s.operands != FLOATX) {  // the choice of a kernel should know that there are scales; every product has its own
        matmul_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, cublaslt_workspace);
        matmul_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, cublaslt_workspace);
    }
    matmul_choose(p);
    return p;
}

// add may be D itself where D is float. In FP8, what a and b point to is multiplied by numbers in device memory.
static void matmul_cublaslt(MatmulShape s, void* d, const void* a, const void* b, const floatX* bias, const void* add,
                            const floatX* gelu_inp, const float* a_scale = NULL, const float* b_scale = NULL) {
    s.bias = bias != NULL; s.add = add != NULL; s.dgelu = gelu_inp != NULL;
    opRequire(s.m > 0 && s.n > 0 && s.k > 0 && s.m % 8 == 0 && (!s.trans_a || s.k % 8 == 0),
              "matmul: rows of %ld and %ld elements, not multiples of 8", s.m, s.k);
    for (const void* p : {(const void*)d, a, b, (const void*)bias, add, (const void*)gelu_inp})
        opRequire((uintptr_t)p % 16 == 0, "matmul: a tensor starts at %p, which is no multiple of 16 bytes", p);
    MatmulPlan* p = matmul_plan(s);
    if (bias) matmul_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (gelu_inp) matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, gelu_inp);
    if (s.operands != FLOATX) {
        matmul_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, a_scale);
        matmul_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, b_scale);
    }
    const float one = 1.0f, beta = add ? 1.0f : 0.0f;
    cudaCheck(cublasLtMatmul(cublaslt_handle, p->desc, &one, a, p->a, b, p->b, &beta, add ? add : d, p->d, d, p->d,
                             &p->algo, cublaslt_workspace, cublaslt_workspace_bytes, main_stream));
}

static void matmul_forward(floatX* out /*(N,OC)*/, const floatX* inp /*(N,C)*/, const floatX* weight /*(OC,C)*/,
                           const floatX* bias /*(OC) or NULL*/,
                           const floatX* addend /*(N,OC) or NULL, may not alias out*/, int64_t N, int C, int OC) {
    matmul_cublaslt({OC, N, C, true, false}, out, weight, inp, bias, addend, NULL);
}

// Sums of the columns of dout. A block takes 256 columns of a range of rows: 8 columns a lane, every 8th row a warp.
__global__ void __launch_bounds__(256, 4)
    bias_backward_kernel(float* partial /*(ranges,OC)*/, const floatX* dout, int64_t N, int OC, int64_t range) {
    __shared__ float sums[8][256];
    int lane = threadIdx.x, warp = threadIdx.y;
    int c = blockIdx.x * 256 + lane * 8;
    int64_t end = min(N, (int64_t)(blockIdx.y + 1) * range);
    float sum[8] = {};
    if (c < OC) {
        for (int64_t row0 = (int64_t)blockIdx.y * range + warp; row0 < end; row0 += 64) {
            Pack8<floatX> x[8];
#pragma unroll
            for (int u = 0; u < 8; u++) {
                x[u] = {};
                if (row0 + 8 * u < end) x[u] = load8(dout + (row0 + 8 * u) * OC + c);
            }
#pragma unroll
            for (int u = 0; u < 8; u++) {
                for (int i = 0; i < 8; i++) sum[i] += (float)x[u].v[i];
            }
        }
    }

    for (int i = 0; i < 8; i++) sums[warp][i * 32 + lane] = sum[i];  // neighbouring lanes in neighbouring banks
    __syncthreads();
    int t = warp * 32 + lane, column = blockIdx.x * 256 + (t % 32) * 8 + t / 32;
    if (column >= OC) return;
    float total = 0.0f;
    for (int w = 0; w < 8; w++) total += sums[w][t];
    partial[(int64_t)blockIdx.y * OC + column] = total;
}

constexpr int BIAS_MAX_BLOCKS = 2048;
static size_t column_sums_scratch_bytes(int OC) { return (BIAS_MAX_BLOCKS * 256 + (size_t)OC) * sizeof(float); }

static void bias_backward(float* dbias /*(OC) +=*/, const floatX* dout /*(N,OC)*/, int64_t N, int OC) {
    opRequireRows("bias_backward", OC);
    float* partial = (float*)scratch(column_sums_scratch_bytes(OC), "column sums");
    int column_blocks = (OC + 255) / 256;
    int64_t ranges = std::max(1, std::min(4 * device_sms, BIAS_MAX_BLOCKS) / column_blocks); // one wave of equal blocks
    ranges = std::min(ranges, ceil_div(N, 64));
    int64_t range = ceil_div(N, ranges);
    ranges = ceil_div(N, range);
    LAUNCH(bias_backward_kernel, dim3(column_blocks, (unsigned)ranges), dim3(32, 8), partial, dout, N, OC, range);
    add_partials({{dbias}, 1}, partial, (int)ranges, OC);
}

// ---- GELU, tanh approximation
// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): one exp and one division, and no
// cancellation where tanh is near -1.
__device__ __forceinline__ float gelu_sigmoid(float x) {
    float minus_2u = -1.5957691216f * x * (1.0f + 0.044715f * x * x);
    return __fdividef(1.0f, 1.0f + __expf(minus_2u));
}
__device__ __forceinline__ float gelu_slope(float x) {
    float s = gelu_sigmoid(x), two_du = 1.5957691216f * (1.0f + 3.0f * 0.044715f * x * x);
    return s + x * s * (1.0f - s) * two_du;
}

__global__ void __launch_bounds__(256) gelu_forward_kernel(floatX* out, const floatX* inp, int64_t n) {
    int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8;
    if (i >= n) return;
    Pack8<floatX> x = load8_stream(inp + i);
    float y[8];
    for (int j = 0; j < 8; j++) y[j] = (float)x.v[j] * gelu_sigmoid((float)x.v[j]);
    store8(out + i, to_pack8<floatX>(y));
}

__global__ void __launch_bounds__(256) gelu_backward_kernel(floatX* dinp, const floatX* dout, const floatX* inp,
                                                            int64_t n) {
    int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8;
    if (i >= n) return;
    Pack8<floatX> x = load8_stream(inp + i), d = load8_stream(dout + i);
    float y[8];
    for (int j = 0; j < 8; j++) y[j] = (float)d.v[j] * gelu_slope((float)x.v[j]);
    store8(dinp + i, to_pack8<floatX>(y));
}

static void gelu_forward(floatX* out, const floatX* inp, int64_t n) {
    opRequire(n % 8 == 0, "gelu_forward: %ld elements, not a multiple of 8", n);
    LAUNCH(gelu_forward_kernel, grid_for(n, 2048), 256, out, inp, n);
}

static void gelu_backward(floatX* dinp /*may be dout*/, const floatX* dout, const floatX* inp, int64_t n) {
    opRequire(n % 8 == 0, "gelu_backward: %ld elements, not a multiple of 8", n);
    LAUNCH(gelu_backward_kernel, grid_for(n, 2048), 256, dinp, dout, inp, n);
}

// cuBLASLt multiplies by GELU' where it writes dinp, but not in fp32; and for some shapes it knows only one kernel that
// does, which then is a slow one.
static void matmul_backward(floatX* dinp /*(N,C) or NULL*/, float* dweight /*(OC,C) +=, or = if fresh*/, bool fresh,
                            float* dbias /*(OC) += or NULL*/, const floatX* dout /*(N,OC)*/,
                            const floatX* inp /*(N,C)*/, const floatX* weight /*(OC,C)*/,
                            const floatX* gelu_inp /*(N,C) with inp = GELU(gelu_inp): dinp is its gradient; or NULL*/,
                            int64_t N, int C, int OC) {
    MatmulShape to_inp = {C, N, OC, false, false}, fused = to_inp;
    fused.dgelu = true;
    bool fuse = dinp && gelu_inp && sizeof(floatX) == 2 && matmul_plan(fused)->proposals > 1;
    if (dinp) matmul_cublaslt(to_inp, dinp, weight, dout, NULL, NULL, fuse ? gelu_inp : NULL);
    if (dinp && gelu_inp && !fuse) gelu_backward(dinp, dinp, gelu_inp, N * C);
    MatmulShape sum = {C, OC, N, false, true};
    sum.float_out = true;
    matmul_cublaslt(sum, dweight, inp, dout, NULL, fresh ? NULL : dweight, NULL);
    if (dbias) bias_backward(dbias, dout, N, OC);
}

// ---- FP8 matrix products
// Scaling is per tensor and from the tensor itself, not from earlier steps, so that nothing but the weights makes a
// run's state. It takes two passes over each operand: one finds the largest magnitude, one rounds. The second writes
// both layouts, sums a gradient's columns for the bias on its way and computes GELU where it loads: with FP8 neither
// GELU's result nor the gradient of its input exists in bf16.
constexpr int FP8_TILE = 128;

// The factor from the wider matrix to FP8. Its limit keeps it finite, also for a matrix of zeros or with a NaN.
__device__ __forceinline__ float fp8_factor(float amax, bool gradient) {
    return fminf((gradient ? 57344.0f : 448.0f) / amax, 0x1p120f);
}

// From the last element to the first: the operation before wrote the end last, so the end is what the L2 still holds,
// and the quantization after this finds the beginning there. Positive floats are ordered like the integers of the same
// bits, infinity above all and NaN above that, and a maximum does not depend on the order.
__global__ void __launch_bounds__(256) fp8_amax_kernel(float* amax, const floatX* x, int64_t n, float times) {
    __shared__ int block_most;
    if (threadIdx.x == 0) block_most = 0;
    __syncthreads();
    int most = 0;
    for (int64_t i = n - 8 * (blockIdx.x * 256 + threadIdx.x + 1); i >= 0; i -= (int64_t)gridDim.x * 2048) {
        Pack8<floatX> y = load8(x + i);
        for (int j = 0; j < 8; j++) most = max(most, __float_as_int(fabsf((float)y.v[j])));
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0) atomicMax(&block_most, most);
    __syncthreads();
    if (threadIdx.x == 0) atomicMax((int*)amax, __float_as_int(__int_as_float(block_most) * times));
}

// Raises scale->amax, which starts at 0, to the largest magnitude of what fp8_quantize makes of x and pre, or where
// GELU is in between to a bound: GELU(pre) is no larger than pre, GELU'(pre) than 1.13. That costs a little of FP8's
// range, which is 2^17 for e4m3 and 2^32 for e5m2, and no precision.
static void fp8_amax(Fp8Scale* scale, const floatX* x /*(n) or NULL*/, const floatX* pre /*(n) or NULL*/, int64_t n) {
    opRequire(n % 8 == 0, "fp8_amax: %ld elements, not a multiple of 8", n);
    unsigned blocks = std::min(grid_for(n, 2048), (unsigned)(8 * device_sms));
    LAUNCH(fp8_amax_kernel, blocks, 256, &scale->amax, x ? x : pre, n, x && pre ? 1.13f : 1.0f);
}

// Four numbers to FP8, the first in the lowest byte. Past the largest they become the largest; NaN stays NaN.
template <bool GRADIENT> __device__ __forceinline__ uint32_t fp8_pack4(const float* y, float factor) {
    constexpr __nv_fp8_interpretation_t type = GRADIENT ? __NV_E5M2 : __NV_E4M3;
    uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(y[0] * factor, y[1] * factor), __NV_SATFINITE, type);
    uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(y[2] * factor, y[3] * factor), __NV_SATFINITE, type);
    return low | high << 16;
}

// Eight elements of what is quantized: x, GELU(pre), or for a gradient x GELU'(pre).
template <bool GRADIENT, bool GELU>
__device__ __forceinline__ void fp8_source(float (&y)[8], const floatX* x, const floatX* pre, int64_t i) {
    Pack8<floatX> a = {}, b = {};
    if (!GELU || GRADIENT) a = load8(x + i);
    if (GELU) b = load8(pre + i);
    for (int j = 0; j < 8; j++) {
        float v = (float)a.v[j], u = (float)b.v[j];
        y[j] = !GELU ? v : GRADIENT ? v * gelu_slope(u) : u * gelu_sigmoid(u);
    }
}

// A block goes down a range of rows, 128 columns wide, in tiles of 128 rows. A thread takes 8 columns of 4 rows, twice
// a tile; the 4 rows of a column make a word in shared memory, and 4 of those words 16 bytes of that column's row in
// the transposed matrix.
template <bool GRADIENT, bool GELU>
__global__ void __launch_bounds__(256) fp8_quantize_kernel(fp8_t* __restrict__ rows, fp8_t* __restrict__ columns,
                                                           float* __restrict__ partial /*(ranges,C) or NULL*/,
                                                           Fp8Scale* scale, const floatX* __restrict__ x,
                                                           const floatX* __restrict__ pre, int64_t N, int C,
                                                           int64_t range) {
    __shared__ uint32_t tile[FP8_TILE][FP8_TILE / 4 + 1];  // [column][four rows]
    __shared__ float sums[16][FP8_TILE];
    int thread = threadIdx.x, first_column = blockIdx.x * FP8_TILE, c = thread % 16 * 8;
    float amax = scale->amax, factor = fp8_factor(amax, GRADIENT), sum[8] = {};
    // An infinity or a NaN in the matrix must show in the products, as it does in bf16.
    if (blockIdx.x == 0 && blockIdx.y == 0 && thread == 0) scale->inverse = isfinite(amax) ? 1.0f / factor : amax;

    int64_t end = min(N, (int64_t)(blockIdx.y + 1) * range);
    for (int64_t first_row = blockIdx.y * range; first_row < end; first_row += FP8_TILE) {
        for (int half = 0; half < 2; half++) {
            int quad = half * 16 + thread / 16;
            int64_t row = first_row + quad * 4, i = row * C + first_column + c;
            if (first_column + c >= C || row >= end) continue;
            float y[4][8];
#pragma unroll
            for (int r = 0; r < 4; r++) fp8_source<GRADIENT, GELU>(y[r], x, pre, i + (int64_t)r * C);

            uint32_t q[4][2];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                q[r][0] = fp8_pack4<GRADIENT>(y[r], factor);
                q[r][1] = fp8_pack4<GRADIENT>(y[r] + 4, factor);
                if (rows) *(uint2*)(rows + i + (int64_t)r * C) = make_uint2(q[r][0], q[r][1]);
                for (int j = 0; j < 8; j++) sum[j] += y[r][j];
            }

#pragma unroll
            for (int k = 0; k < 2; k++) {  // 4 x 4 bytes transposed, pairs of rows and then pairs of pairs
                uint32_t left[2], right[2];
                for (int pair = 0; pair < 2; pair++) {
                    left[pair] = __byte_perm(q[2 * pair][k], q[2 * pair + 1][k], 0x5140);
                    right[pair] = __byte_perm(q[2 * pair][k], q[2 * pair + 1][k], 0x7362);
                }
                tile[c + 4 * k + 0][quad] = __byte_perm(left[0], left[1], 0x5410);
                tile[c + 4 * k + 1][quad] = __byte_perm(left[0], left[1], 0x7632);
                tile[c + 4 * k + 2][quad] = __byte_perm(right[0], right[1], 0x5410);
                tile[c + 4 * k + 3][quad] = __byte_perm(right[0], right[1], 0x7632);
            }
        }

        if (!columns) continue;
        __syncthreads();
        for (int column = thread / 8; column < FP8_TILE; column += 32) {
            int part = thread % 8;
            int64_t row = first_row + part * 16;
            if (first_column + column >= C || row >= end) continue;
            const uint32_t* t = &tile[column][part * 4];
            *(uint4*)(columns + (int64_t)(first_column + column) * N + row) = make_uint4(t[0], t[1], t[2], t[3]);
        }
        __syncthreads();
    }

    if (!partial) return;
    for (int j = 0; j < 8; j++) sums[thread / 16][c + j] = sum[j];
    __syncthreads();
    if (thread >= FP8_TILE || first_column + thread >= C) return;
    float total = 0.0f;
    for (int r = 0; r < 16; r++) total += sums[r][thread];
    partial[(int64_t)blockIdx.y * C + first_column + thread] = total;
}

// y = x in FP8, or GELU(pre), or for a gradient x GELU'(pre); dbias += the sums of its columns, before the rounding.
static void fp8_quantize(Fp8Matrix y /*(N,C)*/, float* dbias /*(C) += or NULL*/, const floatX* x /*(N,C) or NULL*/,
                         const floatX* pre /*(N,C) or NULL*/, int64_t N, int C, bool gradient) {
    opRequire(N > 0 && N % 16 == 0 && C > 0 && C % 16 == 0, "fp8_quantize: %ld rows of %d, not multiples of 16", N, C);
    float* partial = dbias ? (float*)scratch(column_sums_scratch_bytes(C), "column sums") : NULL;
    int column_blocks = (int)ceil_div(C, FP8_TILE);
    int64_t ranges = std::min(ceil_div(N, FP8_TILE), (int64_t)std::max(1, BIAS_MAX_BLOCKS / column_blocks));
    int64_t range = ceil_div(ceil_div(N, ranges), FP8_TILE) * FP8_TILE;
    ranges = ceil_div(N, range);
    auto kernel = gradient ? pre ? fp8_quantize_kernel<true, true> : fp8_quantize_kernel<true, false>
                           : pre ? fp8_quantize_kernel<false, true> : fp8_quantize_kernel<false, false>;
    LAUNCH(kernel, dim3(column_blocks, (unsigned)ranges), 256, y.rows, y.columns, partial, y.scale, x, pre, N, C,
           range);
    if (dbias) add_partials({{dbias}, 1}, partial, (int)ranges, C);
}

static void fp8_matmul_forward(floatX* out /*(N,OC)*/, Fp8Matrix inp /*(N,C) rows*/, Fp8Matrix weight /*(OC,C) rows*/,
                               const floatX* bias /*(OC) or NULL*/,
                               const floatX* addend /*(N,OC) or NULL, may not alias out*/, int64_t N, int C, int OC) {
    MatmulShape s = {OC, N, C, true, false};
    s.operands = FP8;
    matmul_cublaslt(s, out, weight.rows, inp.rows, bias, addend, NULL, &weight.scale->inverse, &inp.scale->inverse);
}

static void fp8_matmul_backward(floatX* dinp /*(N,C)*/, float* dweight /*(OC,C) +=, or = if fresh*/, bool fresh,
                                Fp8Matrix dout /*(N,OC) both*/, Fp8Matrix inp /*(N,C) columns*/,
                                Fp8Matrix weight /*(OC,C) columns*/, int64_t N, int C, int OC) {
    MatmulShape s = {C, N, OC, true, false}, sum = {C, OC, N, true, false};
    s.operands = sum.operands = FP8_GRADIENT;
    sum.float_out = true;
    matmul_cublaslt(s, dinp, weight.columns, dout.rows, NULL, NULL, NULL, &weight.scale->inverse, &dout.scale->inverse);
    matmul_cublaslt(sum, dweight, inp.columns, dout.columns, NULL, fresh ? NULL : dweight, NULL, &inp.scale->inverse,
                    &dout.scale->inverse);
}

static void fp8_open() {
    int device, major, minor;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cudaCheck(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (10 * major + minor < 89)
        fatal("--fp8 1 needs a GPU of compute capability 8.9 or more; this one has %d.%d: leave it at 0", major, minor);
    if (sizeof(floatX) == 4) fatal("--fp8 1: this is the fp32 build, whose products are all fp32: leave it at 0");
}

// ---- cross-entropy with its gradient
__device__ __forceinline__ float exp2_fast(float x) {  // exp2f without the code for denormal results
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// TEAM threads a row: a block for the vocabularies of tokenizers, half a warp for that of bytes. The first pass over
// the logits keeps a running maximum and a sum relative to it; the second pass, in place, finds them in the L1 and L2
// still, the more so as it goes backwards. So device memory sees each logit read once and written once.
template <int TEAM>
__global__ void __launch_bounds__(TEAM == 16 ? 256 : TEAM, TEAM == 16 ? 1 : 3)
    crossentropy_kernel(floatX* logits, float* losses, const int* targets, float dloss, int64_t N, int V, int Vp,
                        bool grad) {
    constexpr int UNROLL = 2, STEP = TEAM * 8 * UNROLL;
    constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
    __shared__ float shared[2][(TEAM + 31) / 32];
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / TEAM) + threadIdx.x / TEAM;
    if (row >= N) return;  // whole teams
    int t = threadIdx.x % TEAM;
    int target = targets[row];
    floatX* x = logits + row * Vp;
    if (target < 0) {
        if (t == 0) losses[row] = 0.0f;
        if (grad) {
            for (int c = t * 8; c < Vp; c += TEAM * 8) store8_stream(x + c, Pack8<floatX>{});
        }
        return;
    }
    float target_logit = t == 0 ? (float)x[target] : 0.0f;  // before the second pass overwrites it

    float shift = -1e30f, sum = 0.0f;  // sum of 2^(x log2(e) - shift); finite, for the threads that have no column
    for (int c0 = t * 8; c0 < V; c0 += STEP) {
        Pack8<floatX> pack[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (c0 + u * TEAM * 8 < V) pack[u] = load8(x + c0 + u * TEAM * 8);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int c = c0 + u * TEAM * 8;
            if (c >= V) break;
            float z[8], most = -INFINITY;
            for (int i = 0; i < 8; i++) z[i] = (float)pack[u].v[i];
            if (c + 8 > V) {
                for (int i = 0; i < 8; i++) z[i] = c + i < V ? z[i] : -INFINITY;
            }
            for (int i = 0; i < 8; i++) most = fmaxf(most, z[i]);
            if (most * LOG2E > shift) {
                sum *= exp2_fast(shift - most * LOG2E);
                shift = most * LOG2E;
            }
            for (int i = 0; i < 8; i++) sum += exp2_fast(z[i] * LOG2E - shift);
        }
    }

    constexpr int WIDTH = TEAM < 32 ? TEAM : 32;
    unsigned mask = TEAM < 32 ? 0xffffu << (threadIdx.x & 16) : 0xffffffffu;  // the warp's other team may be gone
    float top = warp_max<WIDTH>(shift, mask);
    sum = warp_sum<WIDTH>(sum * exp2_fast(shift - top), mask);
    if (TEAM > 32) {
        if (t % 32 == 0) {
            shared[0][t / 32] = top;
            shared[1][t / 32] = sum;
        }
        __syncthreads();
        float warp_top = t % 32 < TEAM / 32 ? shared[0][t % 32] : -1e30f;
        float warp_part = t % 32 < TEAM / 32 ? shared[1][t % 32] : 0.0f;
        top = warp_max(warp_top);
        sum = warp_sum(warp_part * exp2_fast(warp_top - top));
    }
    if (t == 0) losses[row] = (log2f(sum) + top) * LN2 - target_logit;
    if (!grad) return;

    float scale = dloss / sum;
    int steps = (Vp + STEP - 1) / STEP;
    for (int c0 = (steps - 1) * STEP + t * 8; c0 >= 0; c0 -= STEP) {
        Pack8<floatX> pack[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (c0 + u * TEAM * 8 < V) pack[u] = load8_stream(x + c0 + u * TEAM * 8);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int c = c0 + u * TEAM * 8;
            if (c >= Vp) break;
            float z[8] = {};
            if (c < V) {
                for (int i = 0; i < 8; i++) z[i] = exp2_fast((float)pack[u].v[i] * LOG2E - top) * scale;
                if (target >= c && target < c + 8) {
                    for (int i = 0; i < 8; i++) z[i] -= c + i == target ? dloss : 0.0f;
                }
                if (c + 8 > V) {
                    for (int i = 0; i < 8; i++) z[i] = c + i < V ? z[i] : 0.0f;
                }
            }
            store8_stream(x + c, to_pack8<floatX>(z));
        }
    }
}

static void crossentropy_forward_backward(floatX* logits /*(N,Vp) in, dlogits out when grad*/, float* losses /*(N)*/,
                                          const int* targets /*(N), < 0: no loss, no gradient*/,
                                          float dloss /*gradient of each row's loss*/, int64_t N, int V, int Vp,
                                          bool grad) {
    opRequireRows("crossentropy_forward_backward", Vp);
    if (Vp <= 1024)
        LAUNCH(crossentropy_kernel<16>, grid_for(N, 16), 256, logits, losses, targets, dloss, N, V, Vp, grad);
    else
        LAUNCH(crossentropy_kernel<512>, grid_for(N, 1), 512, logits, losses, targets, dloss, N, V, Vp, grad);
}

// ---- RoPE
// cos and sin of dimensions d .. d+7 at a position.
__device__ __forceinline__ void rope_angles(float (&cosine)[8], float (&sine)[8], const float* table, int64_t position,
                                            int d, int D) {
    const float4* low = (const float4*)(table + ((position & 1023) * (D / 2) + d) * 2);
    const float4* high = (const float4*)(table + ((1024 + (position >> 10)) * (D / 2) + d) * 2);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 a = low[i], b = high[i];
        cosine[2 * i] = a.x * b.x - a.y * b.y;
        sine[2 * i] = a.x * b.y + a.y * b.x;
        cosine[2 * i + 1] = a.z * b.z - a.w * b.w;
        sine[2 * i + 1] = a.z * b.w + a.w * b.z;
    }
}

// A warp a token. Its lanes go over the heads of q, then those of k, 256 neighbouring elements at a time, so that a
// lane always has the same 8 dimensions: one set of angles does for all heads. Their partners are D/16 lanes away.
__global__ void __launch_bounds__(256) rope_rotate_kernel(floatX* qkv, const float* table, float direction, int64_t N,
                                                          int64_t T, int H, int D, int64_t t0) {
    int64_t token = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (token >= N) return;
    int lane = threadIdx.x, far = D / 16, d = lane % (2 * far) * 8;
    bool lower = d < D / 2;
    float cosine[8], sine[8];
    rope_angles(cosine, sine, table, t0 + token % T, lower ? d : d - D / 2, D);
    for (int i = 0; i < 8; i++) sine[i] *= lower ? -direction : direction;
    floatX* x = qkv + token * 3 * H * D + lane * 8;
    int n = 2 * H * D - lane * 8;  // elements from x on
    for (int i0 = 0; i0 < 2 * H * D; i0 += 1024) {
        Pack8<floatX> mine[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            mine[u] = {};
            if (i0 + u * 256 < n) mine[u] = load8_stream(x + i0 + u * 256);
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            Pack8<floatX> other;
#pragma unroll
            for (int i = 0; i < (int)sizeof(floatX) * 2; i++) {
                ((int*)&other)[i] = __shfl_xor_sync(0xffffffffu, ((int*)&mine[u])[i], far);
            }
            float y[8];
            for (int i = 0; i < 8; i++) y[i] = (float)mine[u].v[i] * cosine[i] + (float)other.v[i] * sine[i];
            if (i0 + u * 256 < n) store8(x + i0 + u * 256, to_pack8<floatX>(y));
        }
    }
}

static void rope_rotate(floatX* qkv /*(B,T,3,H,D), q and k in place*/, const float* table /*device memory*/,
                        int direction /*+1 forward, -1 inverse = backward*/, int B, int64_t T, int H, int D,
                        int64_t t0 /*position of token 0*/) {
    opRequire(D >= 16 && D <= 256 && (D & (D - 1)) == 0, "rope_rotate: head size %d, not 16, 32, 64, 128 or 256", D);
    int64_t N = B * T;
    LAUNCH(rope_rotate_kernel, grid_for(N, 8), dim3(32, 8), qkv, table, (float)direction, N, T, H, D, t0);
}

// ---- context parallelism: blocks of heads
// A row of all heads is W blocks of n elements, one block for each process. Packed, all rows of a process's block lie
// together. A warp a row: it reads or writes the row's W blocks one behind the other.
template <bool PACK>
__global__ void __launch_bounds__(256) heads_pack_kernel(floatX* __restrict__ out, const floatX* __restrict__ inp,
                                                         int64_t rows /*B R*/, int64_t R, int W, int n) {
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    int64_t b = row / R, r = row % R;
    for (int i = threadIdx.x * 8; i < W * n; i += 256) {
        int64_t in_row = row * W * n + i, packed = ((b * W + i / n) * R + r) * n + i % n;
        store8(out + (PACK ? packed : in_row), load8_stream(inp + (PACK ? in_row : packed)));
    }
}

static void heads_pack(floatX* out /*(B,W,R,n)*/, const floatX* inp /*(B,R,W,n)*/, int B, int64_t R, int W, int n) {
    opRequireRows("heads_pack", n);
    LAUNCH(heads_pack_kernel<true>, grid_for(B * R, 8), dim3(32, 8), out, inp, B * R, R, W, n);
}

static void heads_unpack(floatX* out /*(B,R,W,n)*/, const floatX* inp /*(B,W,R,n)*/, int B, int64_t R, int W, int n) {
    opRequireRows("heads_unpack", n);
    LAUNCH(heads_pack_kernel<false>, grid_for(B * R, 8), dim3(32, 8), out, inp, B * R, R, W, n);
}

// ---- sums
// Sum of x or of its squares: floats over 8 elements, double from there on, in a fixed order.
constexpr int SUM_BLOCKS = 1024, SUM_THREADS = 256;

__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double shared[SUM_THREADS];
    shared[threadIdx.x] = x;
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    return shared[0];  // right in thread 0
}

template <bool SQUARE>
__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(double* partial /*(SUM_BLOCKS)*/, const float* x, int64_t n) {
    int64_t thread = (int64_t)blockIdx.x * SUM_THREADS + threadIdx.x, threads = (int64_t)SUM_BLOCKS * SUM_THREADS;
    double total = 0.0;
    int64_t head = min(n, (int64_t)(4 - ((uintptr_t)x / 4) % 4) % 4);  // up to the first multiple of 16 bytes
    int64_t packs = (n - head) / 8;
    for (int64_t i = thread; i < packs; i += threads) {
        Pack8<float> pack = load8_stream(x + head + i * 8);
        float sum = 0.0f;
        for (int j = 0; j < 8; j++) sum += SQUARE ? pack.v[j] * pack.v[j] : pack.v[j];
        total += sum;
    }
    if (thread < 16) {  // the elements before and behind the packs
        if (thread < head) total += SQUARE ? x[thread] * x[thread] : x[thread];
        int64_t i = head + packs * 8 + thread;
        if (i < n) total += SQUARE ? x[i] * x[i] : x[i];
    }
    total = block_sum_double(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(SUM_THREADS) sum_partials_kernel(double* total, const double* partial) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < SUM_BLOCKS; i += SUM_THREADS) sum += partial[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) *total += sum;
}

static size_t sum_scratch_bytes() { return SUM_BLOCKS * sizeof(double); }

template <bool SQUARE> static void add_sum(double* total, const float* x, int64_t n) {
    double* partial = (double*)scratch(sum_scratch_bytes(), "sum");
    LAUNCH(sum_kernel<SQUARE>, SUM_BLOCKS, SUM_THREADS, partial, x, n);
    LAUNCH(sum_partials_kernel, 1, SUM_THREADS, total, partial);
}
// The totals stay on the device, so nothing waits.
static void sum_squares(double* total /*+=, device memory*/, const float* x /*(n)*/, int64_t n) {
    add_sum<true>(total, x, n);
}
static void sum_losses(double* total /*+=, device memory*/, const float* x /*(n)*/, int64_t n) {
    add_sum<false>(total, x, n);
}

// ---- AdamW
__device__ __forceinline__ void adamw_element(float& p, float& m, float& v, float grad, const AdamW& a) {
    float g = grad * a.grad_scale;
    m = a.beta1 * m + (1.0f - a.beta1) * g;
    v = a.beta2 * v + (1.0f - a.beta2) * g * g;
    p -= a.lr * (m / a.beta1_correction / (sqrtf(v / a.beta2_correction) + a.eps) + a.weight_decay * p);
}

__global__ void __launch_bounds__(256) adamw_kernel(floatX* params /*or NULL*/, float* master, float* m, float* v,
                                                    const float* grads, int64_t n, AdamW a) {
    int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8;
    if (i + 8 <= n) {
        Pack8<float> g = load8_stream(grads + i), p = load8_stream(master + i), pm = load8_stream(m + i),
                     pv = load8_stream(v + i);
        for (int j = 0; j < 8; j++) adamw_element(p.v[j], pm.v[j], pv.v[j], g.v[j], a);
        store8_stream(master + i, p);
        store8_stream(m + i, pm);
        store8_stream(v + i, pv);
        if (params) store8(params + i, to_pack8<floatX>(p.v));
    } else {
        for (; i < n; i++) {
            adamw_element(master[i], m[i], v[i], grads[i], a);
            if (params) params[i] = (floatX)master[i];
        }
    }
}

static void adamw_update(floatX* params, float* master /*or NULL: params are fp32*/, float* m, float* v,
                         const float* grads, int64_t n, AdamW a) {
    if (n == 0) return;
    if (!master) {
        opRequire(sizeof(floatX) == sizeof(float), "adamw_update: parameters in bf16 need fp32 masters");
        master = (float*)params;
        params = NULL;
    }
    opRequire((((uintptr_t)params | (uintptr_t)master | (uintptr_t)m | (uintptr_t)v | (uintptr_t)grads) & 15) == 0,
              "adamw_update: a tensor does not start at a multiple of 16 bytes");
    LAUNCH(adamw_kernel, grid_for(n, 2048), 256, params, master, m, v, grads, n, a);
}

// ---- causal attention
// In bf16 it is cuDNN's, through the backend C API: the graph of elementary operations that cuDNN's runtime compiler
// recognizes as flash attention. cuDNN has none for fp32; there dev/fp32_attention.cuh does it, for tests at small T.

[[maybe_unused]] static void* sdpa_workspace;  // of the plan, as much as sdpa_prepare() asked for; fp32 needs none
static size_t sdpa_workspace_bytes;
[[maybe_unused]] static bool sdpa_deterministic;  // the same bits in every run from the backward; slower, and see below
// The deterministic backward keeps 2 B H T^2 bytes. Above this many it runs head by head and needs 2 T^2.
[[maybe_unused]] static int64_t sdpa_deterministic_bytes = (int64_t)8 << 30;

static int64_t round_up_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// What a call runs over: B sequences of T queries, each of which sees the keys up to its own place or, in a cross call,
// all Tk keys of another tensor. q, and k with v C further, are parts of packed (..., 3, H, D) tensors.
struct SdpaShape {
    int B, H, D, cross;                // in a cross call dq is (B,T,H,D), not packed as q is
    int64_t T, Tk;
    int64_t q_step, k_step, out_step;  // rows from one sequence's first to the next one's
    int64_t stats_step, stats_head;    // and elements from one sequence's, one head's statistics to the next one's
};
static SdpaShape causal_shape(int B, int64_t T, int H, int D) { return {B, H, D, false, T, T, T, T, T, H * T, T}; }

#ifndef FLOATX_FP32  // cuDNN's; below, plain kernels of the tests
static void cuda_check(cudnnStatus_t status, const char* call, const char* file, int line) {
    if (status == CUDNN_STATUS_SUCCESS) return;
    char reason[1024] = "";
    cudnnGetLastErrorString(reason, sizeof(reason));
    fatal("%s:%d: %s failed: %s: %s; CUDNN_LOGLEVEL_DBG=3 CUDNN_LOGDEST_DBG=stdout makes cuDNN say more", file, line,
          call, cudnnGetErrorString(status), reason);
}

static cudnnHandle_t cudnn_handle;
typedef cudnnBackendDescriptor_t CudnnNode;  // a tensor, an operation, a graph, a plan

// The tensors of the graphs, by their cuDNN id: those that the caller passes, then the values inside.
enum SdpaTensor {
    SDPA_NONE, SDPA_Q, SDPA_K, SDPA_V, SDPA_O, SDPA_STATS, SDPA_DO, SDPA_DQ, SDPA_DK, SDPA_DV,
    SDPA_DQ_SUM,                        // (B,H,T,D) fp32: dQ is summed here by several blocks
    SDPA_DOT,                           // (B,H,T) fp32: sum over d of dO O
    SDPA_SCALE, SDPA_MASKED, SDPA_ONE,  // scalars, in host memory
    SDPA_PASSED,
    SDPA_SCORES = SDPA_PASSED, SDPA_SCALED, SDPA_ROW, SDPA_COLUMN, SDPA_SEEN, SDPA_CAUSAL, SDPA_TOP, SDPA_SHIFTED,
    SDPA_EXP, SDPA_SUM, SDPA_LOG_SUM, SDPA_WEIGHTS,
    SDPA_DO_O, SDPA_DO_O_SUM, SDPA_WEIGHTS_T, SDPA_DWEIGHTS, SDPA_DSHIFTED, SDPA_DSCALED, SDPA_DS, SDPA_DS_T,
    SDPA_K_ROWS,
    SDPA_TENSORS
};

// An operation of a graph: y = mode(x, b); a select takes x where t is true and b elsewhere.
enum SdpaKind { SDPA_MATMUL, SDPA_POINTWISE, SDPA_REDUCTION, SDPA_RESHAPE };
struct SdpaOp {
    SdpaKind kind;
    int mode;
    SdpaTensor y, x, b, t;
    int64_t axis;
};

// The operations must come in this form and order: anything else is not recognized as attention, or is twice slower.
// Scores above the diagonal become minus infinity: x where row >= column, else the scalar.
#define SDPA_CAUSAL_OPS(x) \
    {SDPA_POINTWISE, CUDNN_POINTWISE_GEN_INDEX, SDPA_ROW, x, SDPA_NONE, SDPA_NONE, 2}, \
    {SDPA_POINTWISE, CUDNN_POINTWISE_GEN_INDEX, SDPA_COLUMN, x, SDPA_NONE, SDPA_NONE, 3}, \
    {SDPA_POINTWISE, CUDNN_POINTWISE_CMP_GE, SDPA_SEEN, SDPA_ROW, SDPA_COLUMN}, \
    {SDPA_POINTWISE, CUDNN_POINTWISE_BINARY_SELECT, SDPA_CAUSAL, x, SDPA_MASKED, SDPA_SEEN}

static const SdpaOp sdpa_forward_ops[] = {
    {SDPA_MATMUL, 0, SDPA_SCORES, SDPA_Q, SDPA_K},
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_SCALED, SDPA_SCORES, SDPA_SCALE},
    SDPA_CAUSAL_OPS(SDPA_SCALED),
    {SDPA_REDUCTION, CUDNN_REDUCE_TENSOR_MAX, SDPA_TOP, SDPA_CAUSAL},
    {SDPA_POINTWISE, CUDNN_POINTWISE_SUB, SDPA_SHIFTED, SDPA_CAUSAL, SDPA_TOP},
    {SDPA_POINTWISE, CUDNN_POINTWISE_EXP, SDPA_EXP, SDPA_SHIFTED},
    {SDPA_REDUCTION, CUDNN_REDUCE_TENSOR_ADD, SDPA_SUM, SDPA_EXP},
    {SDPA_POINTWISE, CUDNN_POINTWISE_LOG, SDPA_LOG_SUM, SDPA_SUM},
    {SDPA_POINTWISE, CUDNN_POINTWISE_ADD, SDPA_STATS, SDPA_TOP, SDPA_LOG_SUM},
    {SDPA_POINTWISE, CUDNN_POINTWISE_DIV, SDPA_WEIGHTS, SDPA_EXP, SDPA_SUM},
    {SDPA_MATMUL, 0, SDPA_O, SDPA_WEIGHTS, SDPA_V}};

// P = exp(S - stats), dV = P^T dO, dS = scale P (dO V^T - dot), dK = dS^T Q, dQ = dS K. The engine adds up dQ in fp32
// from several blocks, in any order; told to write dQ itself it keeps all of dS instead and becomes deterministic.
static const SdpaOp sdpa_backward_ops[] = {
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_DO_O, SDPA_DO, SDPA_O},
    {SDPA_REDUCTION, CUDNN_REDUCE_TENSOR_ADD, SDPA_DO_O_SUM, SDPA_DO_O},
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_DOT, SDPA_DO_O_SUM, SDPA_ONE},
    {SDPA_MATMUL, 0, SDPA_SCORES, SDPA_Q, SDPA_K},
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_SCALED, SDPA_SCORES, SDPA_SCALE},
    {SDPA_POINTWISE, CUDNN_POINTWISE_SUB, SDPA_SHIFTED, SDPA_SCALED, SDPA_STATS},
    SDPA_CAUSAL_OPS(SDPA_SHIFTED),
    {SDPA_POINTWISE, CUDNN_POINTWISE_EXP, SDPA_EXP, SDPA_CAUSAL},
    {SDPA_RESHAPE, 0, SDPA_WEIGHTS_T, SDPA_EXP},
    {SDPA_MATMUL, 0, SDPA_DV, SDPA_WEIGHTS_T, SDPA_DO},
    {SDPA_MATMUL, 0, SDPA_DWEIGHTS, SDPA_DO, SDPA_V},
    {SDPA_POINTWISE, CUDNN_POINTWISE_SUB, SDPA_DSHIFTED, SDPA_DWEIGHTS, SDPA_DOT},
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_DSCALED, SDPA_DSHIFTED, SDPA_EXP},
    {SDPA_POINTWISE, CUDNN_POINTWISE_MUL, SDPA_DS, SDPA_DSCALED, SDPA_SCALE},
    {SDPA_RESHAPE, 0, SDPA_DS_T, SDPA_DS},
    {SDPA_MATMUL, 0, SDPA_DK, SDPA_DS_T, SDPA_Q},
    {SDPA_RESHAPE, 0, SDPA_K_ROWS, SDPA_K},
    {SDPA_MATMUL, 0, SDPA_DQ_SUM, SDPA_DS, SDPA_K_ROWS},  // or SDPA_DQ,
    {SDPA_POINTWISE, CUDNN_POINTWISE_IDENTITY, SDPA_DQ, SDPA_DQ_SUM}};  // without this

// What cuDNN calls the parts of an operation.
static const struct {
    cudnnBackendDescriptorType_t kind, op;
    cudnnBackendAttributeName_t precision, mode;  // of the kind
    cudnnBackendAttributeType_t mode_type;
    cudnnBackendAttributeName_t of_kind, y, x, b;  // of the operation
} sdpa_kinds[] = {
    {CUDNN_BACKEND_MATMUL_DESCRIPTOR, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, CUDNN_ATTR_MATMUL_COMP_TYPE, {}, {},
     CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_ATTR_OPERATION_MATMUL_CDESC, CUDNN_ATTR_OPERATION_MATMUL_ADESC,
     CUDNN_ATTR_OPERATION_MATMUL_BDESC},
    {CUDNN_BACKEND_POINTWISE_DESCRIPTOR, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, CUDNN_ATTR_POINTWISE_MATH_PREC,
     CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR,
     CUDNN_ATTR_OPERATION_POINTWISE_YDESC, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, CUDNN_ATTR_OPERATION_POINTWISE_BDESC},
    {CUDNN_BACKEND_REDUCTION_DESCRIPTOR, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, CUDNN_ATTR_REDUCTION_COMP_TYPE,
     CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, CUDNN_ATTR_OPERATION_REDUCTION_DESC,
     CUDNN_ATTR_OPERATION_REDUCTION_YDESC, CUDNN_ATTR_OPERATION_REDUCTION_XDESC},
    {{}, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, {}, {}, {}, {}, CUDNN_ATTR_OPERATION_RESHAPE_YDESC,
     CUDNN_ATTR_OPERATION_RESHAPE_XDESC}};

// A plan is for one shape; its B and H, the work, may be 1 where the strides are those of more.
struct SdpaPlan {
    SdpaShape s;
    int B, H;
    bool backward, stats, deterministic;
    CudnnNode plan;
    int64_t workspace;              // bytes that cuDNN asks for
    int64_t ids[SDPA_PASSED];       // the tensors that a call must pass
    int ids_count;
};

// What a graph is made of while it is built; the plan outlives it.
struct SdpaGraph {
    SdpaPlan* plan;
    CudnnNode made[160], tensor[SDPA_TENSORS], ops[24];
    int made_count, ops_count;
};

static void cudnn_set(CudnnNode d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                      const void* value) {
    cudaCheck(cudnnBackendSetAttribute(d, name, type, count, value));
}
static void cudnn_set_descriptor(CudnnNode d, cudnnBackendAttributeName_t name, CudnnNode value) {
    cudnn_set(d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}
static CudnnNode cudnn_new(SdpaGraph* g, cudnnBackendDescriptorType_t type) {
    CudnnNode d;
    cudaCheck(cudnnBackendCreateDescriptor(type, &d));
    opRequire(g->made_count < 160, "the attention graph outgrew its list of descriptors");
    g->made[g->made_count++] = d;
    return d;
}

struct SdpaLayout {
    cudnnDataType_t type;
    int64_t dims[4], strides[4];
};
static SdpaLayout sdpa_layout(const SdpaPlan* p, SdpaTensor id) {
    const cudnnDataType_t F32 = CUDNN_DATA_FLOAT, BF16 = CUDNN_DATA_BFLOAT16;
    const SdpaShape* s = &p->s;
    int64_t B = p->B, H = p->H, T = s->T, Tk = s->Tk, D = s->D, C = (int64_t)s->H * D;
    SdpaLayout q = {BF16, {B, H, T, D}, {3 * C * s->q_step, D, 3 * C, 1}};
    SdpaLayout k = {BF16, {B, H, Tk, D}, {3 * C * s->k_step, D, 3 * C, 1}};
    SdpaLayout k_t = {BF16, {B, H, D, Tk}, {3 * C * s->k_step, D, 1, 3 * C}};
    SdpaLayout scores = {F32, {B, H, T, Tk}, {H * T * Tk, T * Tk, Tk, 1}};
    switch (id) {
        case SDPA_Q: return q;
        case SDPA_DQ: if (!s->cross) return q; return {BF16, {B, H, T, D}, {C * T, D, C, 1}};
        case SDPA_DK: case SDPA_DV: case SDPA_K_ROWS: return k;
        case SDPA_K: return k_t;
        case SDPA_V: return p->backward ? k_t : k;
        case SDPA_O: case SDPA_DO: return {BF16, {B, H, T, D}, {C * s->out_step, D, C, 1}};
        case SDPA_DO_O: case SDPA_DQ_SUM: return {F32, {B, H, T, D}, {H * T * D, T * D, D, 1}};
        case SDPA_STATS: return {F32, {B, H, T, 1}, {s->stats_step, s->stats_head, 1, 1}};
        case SDPA_TOP: case SDPA_SUM: case SDPA_LOG_SUM: case SDPA_DO_O_SUM: case SDPA_DOT:
            return {F32, {B, H, T, 1}, {H * T, T, 1, 1}};
        case SDPA_SCALE: case SDPA_MASKED: case SDPA_ONE: return {F32, {1, 1, 1, 1}, {1, 1, 1, 1}};
        case SDPA_WEIGHTS_T: case SDPA_DS_T: return {BF16, {B, H, Tk, T}, {H * T * Tk, T * Tk, 1, Tk}};
        case SDPA_WEIGHTS: scores.type = BF16; return scores;
        case SDPA_ROW: case SDPA_COLUMN: scores.type = CUDNN_DATA_INT32; return scores;
        case SDPA_SEEN: scores.type = CUDNN_DATA_BOOLEAN; return scores;
        default: return scores;
    }
}

static CudnnNode sdpa_tensor(SdpaGraph* g, SdpaTensor id) {
    if (g->tensor[id]) return g->tensor[id];
    SdpaPlan* p = g->plan;
    SdpaLayout layout = sdpa_layout(p, id);
    bool yes = true, passed = id < SDPA_PASSED && (id != SDPA_STATS || p->stats), scalar = passed && id >= SDPA_SCALE;
    bool anywhere = id == SDPA_STATS && (p->s.stats_head % 4 || p->s.stats_step % 4);
    int64_t alignment = anywhere ? 4 : 16, unique = id;
    CudnnNode d = g->tensor[id] = cudnn_new(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    cudnn_set(d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &layout.type);
    cudnn_set(d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, layout.dims);
    cudnn_set(d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, layout.strides);
    cudnn_set(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &unique);
    cudnn_set(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (!passed) cudnn_set(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
    if (scalar) cudnn_set(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
    cudaCheck(cudnnBackendFinalize(d));
    if (passed) p->ids[p->ids_count++] = id;
    return d;
}

static void sdpa_op(SdpaGraph* g, const SdpaOp& o) {
    const auto& name = sdpa_kinds[o.kind];
    CudnnNode op = cudnn_new(g, name.op);
    if (o.kind != SDPA_RESHAPE) {
        CudnnNode kind = cudnn_new(g, name.kind);
        bool compares = o.kind == SDPA_POINTWISE && o.mode == CUDNN_POINTWISE_CMP_GE;
        cudnnDataType_t precision = compares ? CUDNN_DATA_BOOLEAN : CUDNN_DATA_FLOAT;
        cudnn_set(kind, name.precision, CUDNN_TYPE_DATA_TYPE, 1, &precision);
        if (o.kind != SDPA_MATMUL) cudnn_set(kind, name.mode, name.mode_type, 1, &o.mode);
        if (o.axis) cudnn_set(kind, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &o.axis);
        cudaCheck(cudnnBackendFinalize(kind));
        cudnn_set_descriptor(op, name.of_kind, kind);
    }
    cudnn_set_descriptor(op, name.x, sdpa_tensor(g, o.x));
    if (o.b) cudnn_set_descriptor(op, name.b, sdpa_tensor(g, o.b));
    if (o.t) cudnn_set_descriptor(op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, sdpa_tensor(g, o.t));
    cudnn_set_descriptor(op, name.y, sdpa_tensor(g, o.y));
    cudaCheck(cudnnBackendFinalize(op));
    g->ops[g->ops_count++] = op;
}

static void sdpa_build(SdpaPlan* p) {
    if (!cudnn_handle) {
        size_t version = cudnnGetVersion();
        opRequire(version >= 90000 && version != 91000 && version != 91001,
                  "cuDNN %zu.%zu.%zu is %s: install 9.14 or later", version / 10000, version / 100 % 100, version % 100,
                  version < 90000 ? "too old" : "known to compute attention wrongly");
        cudaCheck(cudnnCreate(&cudnn_handle));
        cudaCheck(cudnnSetStream(cudnn_handle, main_stream));
    }
    SdpaGraph graph = {p}, *g = &graph;
    auto add = [&](SdpaOp o) {
        if (p->deterministic && o.x == SDPA_DQ_SUM) return;
        if (p->deterministic && o.y == SDPA_DQ_SUM) o.y = SDPA_DQ;
        if (p->s.cross && o.y >= SDPA_ROW && o.y <= SDPA_CAUSAL) return;  // nothing is masked
        if (p->s.cross && o.x == SDPA_CAUSAL) o.x = p->backward ? SDPA_SHIFTED : SDPA_SCALED;
        sdpa_op(g, o);
    };
    if (p->backward) for (SdpaOp o : sdpa_backward_ops) add(o);
    else for (SdpaOp o : sdpa_forward_ops) add(o);

    CudnnNode operations = cudnn_new(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    cudnn_set(operations, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->ops_count, g->ops);
    cudnn_set(operations, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &cudnn_handle);
    cudaCheck(cudnnBackendFinalize(operations));

    CudnnNode heuristic = cudnn_new(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    cudnn_set_descriptor(heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, operations);
    cudnn_set(heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    cudaCheck(cudnnBackendFinalize(heuristic));

    // The first query gives an upper bound of the number of engines, the second the engines, best first.
    CudnnNode engines[16];
    int64_t count = 0;
    cudaCheck(cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0,
                                       &count, NULL));
    int64_t asked = count < 16 ? count : 16;
    for (int64_t i = 0; i < asked; i++) engines[i] = cudnn_new(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    count = 0;
    if (asked > 0) {
        cudaCheck(cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                           asked, &count, engines));
    }
    p->plan = NULL;
    for (int64_t i = 0; i < count && i < asked && !p->plan; i++) {
        CudnnNode plan;
        cudaCheck(cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan));
        cudnn_set(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &cudnn_handle);
        cudnn_set_descriptor(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engines[i]);
        if (cudnnBackendFinalize(plan) == CUDNN_STATUS_SUCCESS) p->plan = plan;
        else cudaCheck(cudnnBackendDestroyDescriptor(plan));
    }
    if (!p->plan) {
        char reason[1024] = "";
        cudnnGetLastErrorString(reason, sizeof(reason));
        opRequire(false, "cuDNN %zu has no engine for the attention %s of B = %d, T = %ld on %ld keys, H = %d, D = %d "
                  "in bf16 on this GPU (it needs compute capability 8.0 or newer, D a multiple of 8 up to 256, and the "
                  "graph, heuristic and engines libraries beside libcudnn); its last word: %s", cudnnGetVersion(),
                  p->backward ? "backward" : "forward", p->B, p->s.T, p->s.Tk, p->H, p->s.D, reason);
    }
    cudaCheck(cudnnBackendGetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count,
                                       &p->workspace));
    for (int i = g->made_count - 1; i >= 0; i--) cudaCheck(cudnnBackendDestroyDescriptor(g->made[i]));
}

// The plan for the whole (B, H) or, for a deterministic backward that would take too much memory, for one head.
static SdpaPlan* sdpa_plan(bool backward, bool stats, const SdpaShape& s) {
    static SdpaPlan plans[512];
    static int plans_count;
    SdpaPlan want = {s, s.B, s.H, backward, stats, backward && sdpa_deterministic, NULL, 0, {}, 0};
    double kept = 2 * (double)s.B * s.H * s.T * s.Tk;  // bytes of a deterministic backward
    if (want.deterministic && kept > (double)sdpa_deterministic_bytes) want.B = want.H = 1;
    for (int i = 0; i < plans_count; i++) {
        SdpaPlan* p = &plans[i];
        if (!memcmp(&p->s, &s, sizeof s) && p->B == want.B && p->H == want.H && p->backward == backward &&
            p->stats == stats && p->deterministic == want.deterministic) return p;
    }
    opRequire(s.T > 0 && s.Tk > 0 && s.B > 0 && s.B < 65536 && s.H > 0 && s.D % 8 == 0, "attention over B = %d "
              "sequences or windows of T = %ld, H = %d, D = %d: B must be 1 to 65535, D a multiple of 8, the others "
              "positive", s.B, s.T, s.H, s.D);
    opRequire(plans_count < 512, "more than 512 attention shapes in one run: pad sequences to a few lengths");
    sdpa_build(&want);
    plans[plans_count] = want;
    return &plans[plans_count++];
}

static int64_t sdpa_dq_sum_bytes(const SdpaPlan* p) {
    return p->backward && !p->deterministic ? round_up_256(4 * (int64_t)p->B * p->H * p->s.T * p->s.D) : 0;
}
static int64_t sdpa_dot_bytes(const SdpaPlan* p) {
    return p->backward ? round_up_256(4 * (int64_t)p->B * p->H * p->s.T) : 0;
}
static int64_t sdpa_plan_bytes(const SdpaPlan* p) {
    return sdpa_dq_sum_bytes(p) + sdpa_dot_bytes(p) + round_up_256(p->workspace);
}

// Builds what a shape needs, about a second each the first time on a machine, and returns the bytes of workspace for
// it: called before training for every shape of the run, so that nothing is compiled or allocated later.
static int64_t sdpa_prepare(bool backward, bool stats, const SdpaShape& s) {
    return sdpa_plan_bytes(sdpa_plan(backward, stats, s));
}

// at[id] is where tensor id lies.
static void sdpa_run(const SdpaPlan* p, void* (&at)[SDPA_PASSED]) {
    int64_t bytes = sdpa_plan_bytes(p);
    opRequire(bytes <= (int64_t)sdpa_workspace_bytes, "attention over B = %d, T = %ld, H = %d, D = %d needs %ld bytes "
              "of workspace, the plan took %zu: sdpa_prepare() was not asked for this shape", p->B, p->s.T, p->H,
              p->s.D, bytes, sdpa_workspace_bytes);
    float scale = 1.0f / sqrtf((float)p->s.D), masked = -INFINITY, one = 1.0f;
    at[SDPA_SCALE] = &scale;
    at[SDPA_MASKED] = &masked;
    at[SDPA_ONE] = &one;
    at[SDPA_DQ_SUM] = sdpa_workspace;
    at[SDPA_DOT] = (char*)at[SDPA_DQ_SUM] + sdpa_dq_sum_bytes(p);
    void* workspace = (char*)at[SDPA_DOT] + sdpa_dot_bytes(p);
    void* pointers[SDPA_PASSED];
    for (int i = 0; i < p->ids_count; i++) {
        int64_t id = p->ids[i];
        pointers[i] = at[id];
        // cuDNN computes nonsense on misaligned tensors, without an error. A head's statistics may start anywhere.
        int64_t alignment = id == SDPA_STATS || id >= SDPA_SCALE ? 4 : 16;
        opRequire(at[id] && (uintptr_t)at[id] % alignment == 0, "attention tensor %ld lies at %p, which is not a "
                  "multiple of %ld", id, at[id], alignment);
    }
    CudnnNode pack;
    cudaCheck(cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack));
    cudnn_set(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, p->ids_count, p->ids);
    cudnn_set(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, p->ids_count, pointers);
    cudnn_set(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    cudaCheck(cudnnBackendFinalize(pack));
    cudaCheck(cudnnBackendExecute(cudnn_handle, p->plan, pack));
    cudaCheck(cudnnBackendDestroyDescriptor(pack));
}

static void sdpa_attend(floatX* out, float* stats /*or NULL*/, const floatX* q, const floatX* k, const SdpaShape& s) {
    void* at[SDPA_PASSED] = {};
    at[SDPA_Q] = (floatX*)q;  // cuDNN's interface knows no const
    at[SDPA_K] = (floatX*)k;
    at[SDPA_V] = (floatX*)k + (int64_t)s.H * s.D;
    at[SDPA_O] = out;
    at[SDPA_STATS] = stats;
    sdpa_run(sdpa_plan(false, stats != NULL, s), at);
}

// out and stats may be those of a softmax over more than these keys: then the gradients are this part's share.
static void sdpa_attend_backward(floatX* dq, floatX* dk, const floatX* dout, const floatX* q, const floatX* k,
                                 const floatX* out, const float* stats, const SdpaShape& s) {
    SdpaPlan* p = sdpa_plan(true, true, s);
    int64_t C = (int64_t)s.H * s.D;
    for (int b = 0; b < s.B; b += p->B) {
        for (int h = 0; h < s.H; h += p->H) {
            int64_t head = h * (int64_t)s.D, q_at = b * s.q_step * 3 * C + head, k_at = b * s.k_step * 3 * C + head;
            int64_t out_at = b * s.out_step * C + head;
            void* at[SDPA_PASSED] = {};
            at[SDPA_Q] = (floatX*)q + q_at;
            at[SDPA_K] = (floatX*)k + k_at;
            at[SDPA_V] = (floatX*)k + k_at + C;
            at[SDPA_DQ] = dq + (s.cross ? b * s.T * C + head : q_at);
            at[SDPA_DK] = dk + k_at;
            at[SDPA_DV] = dk + k_at + C;
            at[SDPA_O] = (floatX*)out + out_at;
            at[SDPA_DO] = (floatX*)dout + out_at;
            at[SDPA_STATS] = (float*)stats + b * s.stats_step + h * s.stats_head;
            sdpa_run(p, at);
        }
    }
}

#else  // fp32, for tests

#include "dev/fp32_attention.cuh"
#endif  // fp32, for tests

static int64_t sdpa_prepare(int B, int64_t T, int H, int D, bool need_stats, bool backward) {
    SdpaShape s = causal_shape(B, T, H, D);
    int64_t bytes = sdpa_prepare(false, need_stats, s);
    return backward ? std::max(bytes, sdpa_prepare(true, true, s)) : bytes;
}

static void sdpa_forward(floatX* out /*(B,T,H,D)*/, float* stats /*(B,H,T) or NULL*/, const floatX* qkv /*(B,T,3,H,D)*/,
                         int B, int64_t T, int H, int D) {
    sdpa_attend(out, stats, qkv, qkv + (int64_t)H * D, causal_shape(B, T, H, D));
}

static void sdpa_backward(floatX* dqkv /*(B,T,3,H,D)*/, const floatX* dout /*(B,T,H,D)*/, const floatX* qkv,
                          const floatX* out, const float* stats /*(B,H,T)*/, int B, int64_t T, int H, int D) {
    int64_t C = (int64_t)H * D;
    sdpa_attend_backward(dqkv, dqkv + C, dout, qkv, qkv + C, out, stats, causal_shape(B, T, H, D));
}

// ---- what the operations need of a run
// Refuses what the kernels do not do.
static void operations_open(int C, int NH, int Vp, bool deterministic) {
    int D = C / NH;
    if (C > LAYERNORM_MAX_C) fatal("--channels is %d; on the GPU it is at most %d", C, LAYERNORM_MAX_C);
    if (Vp % 8) fatal("the model pads its vocabulary to %d, on the GPU it must be a multiple of 8: export it anew", Vp);
    if (D != 64 && D != 128)
        fatal("--channels %d with --heads %d makes heads of %d channels; on the GPU they have 64 or 128", C, NH, D);
    sdpa_deterministic = deterministic;
}

// Bytes for the operations of a pass over N rows.
static size_t operations_bytes(int64_t N, int C) {
    size_t need[] = {encoder_backward_scratch_bytes(N, C), layernorm_backward_scratch_bytes(C),
                     column_sums_scratch_bytes(4 * C), sum_scratch_bytes()};
    return *std::max_element(need, need + 4) + cublaslt_workspace_bytes;
}

// Takes the most that operations_bytes() and sdpa_prepare() said of any pass.
static void operations_allocate(size_t bytes, size_t attention) {
    cublaslt_workspace = device_alloc(cublaslt_workspace_bytes);
    op_scratch_bytes = bytes - cublaslt_workspace_bytes;
    op_scratch = (char*)device_alloc(op_scratch_bytes);
    sdpa_workspace_bytes = attention;
    sdpa_workspace = device_alloc(sdpa_workspace_bytes);
}

#endif  // CUDA

// Window attention is dense attention within blocks of `window` tokens, the last of a sequence shorter where the window
// does not divide T: the same calls, over more and shorter sequences. Calls attend(first row, sequences, their length).
template <class Attend> static void each_window(int B, int64_t T, int64_t window, Attend attend) {
    int64_t blocks = T / window, rest = T % window;
    if (rest == 0) attend((int64_t)0, (int)(B * blocks), window);
    for (int b = 0; rest > 0 && b < B; b++) {
        if (blocks > 0) attend(b * T, (int)blocks, window);
        attend(b * T + blocks * window, 1, rest);
    }
}

// ===================================================================================================================
// 6. Lighthouse attention: scores -> selection -> gather (pool, rotate) -> SDPA -> scatter, as lighthouse_scores,
// _select, _invert, _gather and _scatter, which section 7 composes; backward _scatter_backward and _gather_backward;
// and _halo, which crosses from one process's tokens to the next's. The selection gets no gradient: the backward pass
// uses the index that the forward pass kept. Causal Lighthouse gathers what lighthouse_leaves keeps of the selection;
// causal_forward and _backward, of which causal_prepare plans the workspace, attend to tokens and slots at once.

#ifndef CPU_BACKEND  // the kernels with their launchers; their twins stand in dev/cpu_ops.h too
// ---- what the kernels share
// Kernels that move head vectors know D at compile time: a team of D/8 lanes holds a vector, 8 neighbouring elements
// (Pack8) in each lane, and works alone: the lanes of a team do the same, teams of one warp may not. A strip is the
// tokens that a team makes, a range what a block takes. Pooling factors are powers of 2, so entry indices come from
// shifts. Sums are fp32, in one team's registers and in a fixed order.

#define HEAD_SIZE(size, ...) case size: { constexpr int HEAD = size; __VA_ARGS__; break; }
#ifdef TRAINER_NO_MAIN
#define TEST_HEAD_SIZES(...) HEAD_SIZE(16, __VA_ARGS__) HEAD_SIZE(32, __VA_ARGS__)  // of small models
#else
#define TEST_HEAD_SIZES(...)
#endif
#define WITH_HEAD_SIZE(D, ...) \
    switch (D) { \
        TEST_HEAD_SIZES(__VA_ARGS__) HEAD_SIZE(64, __VA_ARGS__) HEAD_SIZE(128, __VA_ARGS__) \
        default: opRequire(false, "head size %d: Lighthouse on the GPU knows 64 and 128", D); \
    }

template <int LANES> __device__ __forceinline__ unsigned team_mask() {
    if (LANES == 32) return 0xffffffffu;
    return ((1u << (LANES % 32)) - 1) << (threadIdx.x % 32 / LANES * LANES);
}

__device__ __forceinline__ int pool_bits(const LighthouseShape& s) { return 31 - __clz(s.pool); }

// The level of a flat entry index.
__device__ __forceinline__ int entry_level(const LighthouseShape& s, int32_t flat) {
    int l = 0;
    while (flat >= s.off[l + 1]) l++;
    return l;
}

__device__ __forceinline__ void add_pack(float (&sum)[8], const Pack8<floatX>& x) {
#pragma unroll
    for (int d = 0; d < 8; d++) sum[d] += (float)x.v[d];
}

// ---- scores
// The norms of q and k, and above level 0 the maximum over the tokens covered. A block takes SCORE_TOKENS tokens of all
// heads, so that it reads whole rows, and makes the levels whose entries fit into them.
static const int SCORE_TOKENS = 64;

template <int D>
__global__ void __launch_bounds__(1024) lighthouse_scores_kernel(float* scores, const floatX* __restrict__ qkv, int B,
                                                                 LighthouseShape s, int rows, unsigned ranges) {
    constexpr int LANES = D / 8, BATCH = 8;
    extern __shared__ float squares[];  // (2H, SCORE_TOKENS + 1): q's heads, then k's; the odd stride spreads the banks
    int b = blockIdx.x / ranges, vectors = 2 * s.H;
    int64_t t0 = (int64_t)(blockIdx.x % ranges) * SCORE_TOKENS, row = 3 * (int64_t)s.H * D;
    int tokens = s.T - t0 < SCORE_TOKENS ? (int)(s.T - t0) : SCORE_TOKENS;

    // The squares of the norms of q and k, head by head.
    int lane = threadIdx.x % LANES, team = threadIdx.x / LANES, step = blockDim.x / LANES / rows;
    for (int r = team % rows; r < vectors; r += rows) {
        const floatX* x = qkv + (b * s.T + t0) * row + (int64_t)r * D + lane * 8;
        for (int t = team / rows; t < tokens; t += BATCH * step) {
            Pack8<floatX> pack[BATCH];
            float square[BATCH] = {};
#pragma unroll
            for (int i = 0; i < BATCH; i++) {  // past the end the last token again: no branch between the loads
                int at = t + i * step < tokens ? t + i * step : tokens - 1;
                pack[i] = load8_stream(x + at * row);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int d = 0; d < 8; d++) square[i] += (float)pack[i].v[d] * (float)pack[i].v[d];
                square[i] = warp_sum<LANES>(square[i], team_mask<LANES>());
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int at = t + i * step;
                if (lane == i % LANES && at < tokens) squares[r * (SCORE_TOKENS + 1) + at] = square[i];
            }
        }
    }
    __syncthreads();

    // Level by level, the largest of what an entry covers.
    int64_t entries = s.off[s.levels];
    for (int l = 0, width = 1; l < s.levels && width <= SCORE_TOKENS; l++, width *= s.pool) {
        int count = tokens / width;
        for (int i = threadIdx.x; i < vectors * count; i += blockDim.x) {
            int r = i / count, e = i % count;
            const float* covered = squares + r * (SCORE_TOKENS + 1) + e * width;
            float top = covered[0];
            for (int j = 1; j < width; j++) top = fmaxf(top, covered[j]);
            int64_t part = r / s.H, h = r % s.H;
            scores[((part * B + b) * s.H + h) * entries + s.off[l] + t0 / width + e] = sqrtf(top);
        }
    }
}

// One level from the one below, for entries wider than SCORE_TOKENS.
__global__ void lighthouse_pyramid_kernel(float* scores, int l, LighthouseShape s, unsigned ranges) {
    int64_t e = (int64_t)(blockIdx.x % ranges) * blockDim.x + threadIdx.x;
    if (e >= s.n[l]) return;
    float* head = scores + blockIdx.x / ranges * s.off[s.levels];
    const float* child = head + s.off[l - 1] + e * s.pool;
    float top = child[0];
    for (int j = 1; j < s.pool; j++) top = fmaxf(top, child[j]);
    head[s.off[l] + e] = top;
}

static void lighthouse_scores(float* scores /*(2,B,H,E): a then b*/, const floatX* qkv /*(B,T,3,H,D) raw, before RoPE*/,
                              int B, const LighthouseShape* s) {
    int lanes = s->D / 8, rows = 2 * s->H * lanes <= 1024 ? 2 * s->H : 1024 / lanes;
    int threads = rows * lanes * (rows * lanes < 256 ? 256 / (rows * lanes) : 1);
    size_t shared = 2 * s->H * (SCORE_TOKENS + 1) * sizeof(float);
    opRequire(shared <= 48 << 10, "%d heads: at most 94 fit into a block of lighthouse_scores", s->H);
    unsigned ranges = grid_for(s->T, SCORE_TOKENS);
    unsigned blocks = grid_for((int64_t)ranges * B, 1);
    WITH_HEAD_SIZE(s->D, LAUNCH_SHARED(lighthouse_scores_kernel<HEAD>, blocks, threads, shared, scores, qkv, B, *s,
                                       rows, ranges));
    int64_t width = 1;
    for (int l = 1; l < s->levels; l++) {
        width *= s->pool;
        if (width <= SCORE_TOKENS) continue;
        ranges = grid_for(s->n[l], 256);
        blocks = grid_for(2 * (int64_t)B * s->H * ranges, 1);
        LAUNCH(lighthouse_pyramid_kernel, blocks, 256, scores, l, *s, ranges);
    }
}

// ---- selection
// A block does one tile of one head, level after level. There are few blocks, so what counts is the time from barrier
// to barrier: the m/2 best are found by their threshold, four passes of a histogram over one byte of the score's bits
// each, never by a sort. Which candidates are picked is kept as bits, 32 to a word, with the number of picked ones
// before each word; counted in these, every entry finds its place in the sequence.

// A norm's bits order like the norm. NaN counts as infinity. 0 is left for candidates that cannot be picked any more.
__device__ __forceinline__ uint32_t score_key(float score) {
    uint32_t bits = __float_as_uint(score) & 0x7fffffffu;
    return (bits < 0x7f800000u ? bits : 0x7f800000u) + 1;
}

// The want-th largest of the block's n keys; in ties, how many of the keys equal to it are among the want largest.
template <class Key>
__device__ __forceinline__ uint32_t kth_largest(int* ties, Key key, int n, int want, int32_t* histogram /*(256 + 2)*/) {
    uint32_t high = 0;  // the bytes found so far
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
        __syncthreads();

        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            uint32_t x = key(j);
            if (shift == 24 || x >> (shift + 8) == high) atomicAdd(&histogram[x >> shift & 255], 1);
        }
        __syncthreads();

        if (threadIdx.x < 32) {  // lane i holds the bins 8i ... 8i+7, counted from the largest byte down
            int bin[8], sum = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) sum += bin[i] = histogram[255 - (threadIdx.x * 8 + i)];
            int above = warp_prefix(sum) - sum;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (above < want && above + bin[i] >= want) {
                    histogram[256] = 255 - (threadIdx.x * 8 + i);
                    histogram[257] = want - above;
                }
                above += bin[i];
            }
        }
        __syncthreads();

        high = high << 8 | histogram[256];
        want = histogram[257];
    }
    *ties = want;
    return high;
}

// Adds the want best candidates to those picked. before[w]: picked ones before word w. Key 0 is never picked.
template <class Key>
__device__ __forceinline__ void pick_best(uint32_t* picked, int32_t* before, Key key, int n, int want,
                                          int32_t* histogram) {
    int ties, words = n / 32 + 1, lane = threadIdx.x % 32;
    uint32_t threshold = kth_largest(&ties, key, n, want, histogram);

    for (int w = threadIdx.x / 32; w < words; w += blockDim.x / 32) {
        uint32_t x = w * 32 + lane < n ? key(w * 32 + lane) : 0;
        uint32_t larger = __ballot_sync(0xffffffffu, x > threshold), equal = __ballot_sync(0xffffffffu, x == threshold);
        if (lane == 0) {
            picked[w] |= larger;
            before[w] = equal;  // lent to the pass below
        }
    }
    __syncthreads();

    // One warp goes over the words in order: it lets in the first of the equal ones and counts.
    if (threadIdx.x < 32) {
        int equals = 0, total = 0;
        for (int w0 = 0; w0 < words; w0 += 32) {
            int w = w0 + lane;
            uint32_t equal = w < words ? before[w] : 0, word = w < words ? picked[w] : 0;
            int through = warp_prefix(__popc(equal)), room = ties - (equals + through - __popc(equal));
            equals += __shfl_sync(0xffffffffu, through, 31);
            while (equal && __popc(equal) > room) equal ^= 0x80000000u >> __clz(equal);  // ties: the lower index stays
            word |= equal;
            through = warp_prefix(__popc(word));
            if (w < words) {
                picked[w] = word;
                before[w] = total + through - __popc(word);
            }
            total += __shfl_sync(0xffffffffu, through, 31);
        }
    }
    __syncthreads();
}

__global__ void __launch_bounds__(1024) lighthouse_select_kernel(int32_t* index, const float* scores, int B,
                                                                 LighthouseShape s, int words, bool cached) {
    extern __shared__ int32_t select_shared[];
    int L = s.levels, m = s.tile, bits = pool_bits(s);
    int32_t* histogram = select_shared;                                   // (264)
    int32_t* rank = histogram + 264;                                      // (L-1, m) rank of the picked at its level
    int32_t* entry = rank + (L - 1) * m;                                  // (L-1, m) and its entry
    uint32_t* picked = (uint32_t*)(entry + (L - 1) * m);                  // (L-1, words); row 0 of all four is level 1
    int32_t* before = (int32_t*)(picked + (L - 1) * words);               // (L-1, words)
    uint32_t* keys = (uint32_t*)(before + (L - 1) * words);               // (2, candidates) where they fit
    int tile = blockIdx.x % s.tiles, coarse = (int)(s.n[L - 1] / s.tiles);
    int64_t bh = blockIdx.x / s.tiles;
    const float* head = scores + bh * s.off[L];  // its a; its b lies one side further
    int64_t one_side = (int64_t)B * s.H * s.off[L];

    // The entry of candidate j of level l: the tile's coarsest entries, or the children of the entries picked above.
    auto candidate = [&](int l, int j) {
        return l == L - 1 ? tile * coarse + j : (entry[l * m + (j >> bits)] << bits) + (j & (s.pool - 1));
    };
    for (int l = L - 1; l >= 1; l--) {
        int n = l == L - 1 ? coarse : m << bits;
        uint32_t* l_picked = picked + (l - 1) * words;
        int32_t* l_before = before + (l - 1) * words;
        for (int j = threadIdx.x; cached && j < n; j += blockDim.x) {
            const float* score = head + s.off[l] + candidate(l, j);
            keys[j] = score_key(score[0]);
            keys[n + j] = score_key(score[one_side]);
        }
        for (int w = threadIdx.x; w < words; w += blockDim.x) l_picked[w] = 0;
        __syncthreads();

        for (int side = 0; side < 2; side++) {  // by a, then by b among the others
            auto key = [&](int j) -> uint32_t {
                if (l_picked[j / 32] >> (j % 32) & 1) return 0;
                return cached ? keys[side * n + j] : score_key(head[side * one_side + s.off[l] + candidate(l, j)]);
            };
            pick_best(l_picked, l_before, key, n, m / 2, histogram);
        }

        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            uint32_t word = l_picked[j / 32], bit = 1u << (j % 32);
            if (!(word & bit)) continue;
            int r = l_before[j / 32] + __popc(word & (bit - 1));
            rank[(l - 1) * m + r] = j;
            entry[(l - 1) * m + r] = candidate(l, j);
        }
        __syncthreads();
    }

    // An entry comes after the finer entries that end by its own end and after the coarser ones that end before it.
    // Each picked one among the first x candidates of a level has p children: so many candidates of the next finer
    // level end by the end of candidate x - 1.
    int32_t* out = index + bh * s.S + tile * s.tile_slots;
    for (int l = L - 1; l >= 0; l--) {
        int n = l == L - 1 ? coarse : m << bits;
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            int place = j;
            for (int f = l, x = j + 1; f >= 1; f--) {
                uint32_t word = picked[(f - 1) * words + x / 32] & ((1u << (x % 32)) - 1);
                x = (before[(f - 1) * words + x / 32] + __popc(word)) << bits;
                place += x;
            }
            for (int c = l + 1, r = j; c < L; c++) {
                r = rank[(c - 1) * m + (r >> bits)];
                place += r;
            }
            out[place] = (int32_t)(s.off[l] + candidate(l, j));
        }
    }
}

// The most candidates that a level of a tile has, and the shared memory that its selection takes without their keys.
static int64_t select_candidates(const LighthouseShape* s) {
    return std::max(s->n[s->levels - 1] / s->tiles, s->levels > 2 ? (int64_t)s->tile * s->pool : 0);
}
static int64_t select_shared_bytes(const LighthouseShape* s) {
    return (264 + 2 * (s->levels - 1) * (s->tile + select_candidates(s) / 32 + 1)) * sizeof(int32_t);
}

// Refuses what the selection does not do.
static int select_shared_limit;
static void lighthouse_open(const LighthouseShape* s) {
    int device;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&select_shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cudaCheck(cudaFuncSetAttribute(lighthouse_select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   select_shared_limit));
    if (select_shared_bytes(s) > select_shared_limit)
        fatal("the selection of a tile, of up to %ld candidates a level, takes %ld bytes of shared memory, a block of "
              "this GPU has %d: %s", select_candidates(s), select_shared_bytes(s), select_shared_limit,
              s->n[s->levels - 1] / s->tiles < select_candidates(s) ? "lower --tile or --pool"
                                                                     : "raise --topk or --levels, or lower --tile");
}

static void lighthouse_select(int32_t* index /*(B,H,S) flat entry index in sequence order*/,
                              const float* scores /*(2,B,H,E)*/, int B, const LighthouseShape* s) {
    if (!select_shared_limit) lighthouse_open(s);
    int64_t most = select_candidates(s), shared = select_shared_bytes(s), keys = 2 * most * sizeof(uint32_t);
    opRequire(shared <= select_shared_limit, "a tile of %ld candidates needs %ld bytes of shared memory, the GPU has "
              "%d: lighthouse_open() was asked for another shape", most, shared, select_shared_limit);
    bool cached = shared + keys <= select_shared_limit;
    int threads = most >= 1024 ? 1024 : most <= 128 ? 128 : (int)(most + 31) / 32 * 32;
    if (cached) shared += keys;
    LAUNCH_SHARED(lighthouse_select_kernel, grid_for((int64_t)B * s->H * s->tiles, 1), threads, shared, index, scores,
                  B, *s, (int)(most / 32 + 1), cached);
}

__global__ void lighthouse_invert_kernel(int32_t* slot, const int32_t* index, LighthouseShape s, unsigned ranges) {
    int64_t bh = blockIdx.x / ranges, r = (int64_t)(blockIdx.x % ranges) * blockDim.x + threadIdx.x;
    if (r < s.S) slot[bh * s.off[s.levels] + index[bh * s.S + r]] = (int32_t)r;
}

static void lighthouse_invert(int32_t* slot /*(B,H,E) slot of the entry, or -1*/, const int32_t* index /*(B,H,S)*/,
                              int B, const LighthouseShape* s) {
    int64_t heads = (int64_t)B * s->H;
    unsigned ranges = grid_for(s->S, 256);
    cudaCheck(cudaMemsetAsync(slot, 0xff, heads * s->off[s->levels] * sizeof(int32_t), main_stream));
    LAUNCH(lighthouse_invert_kernel, grid_for(heads * ranges, 1), 256, slot, index, *s, ranges);
}

// ---- gather, and the backward of scatter: kernels that make slots
// Where a team of lanes works in the two kernels in which it makes one slot. A block takes neighbouring slots of one
// head, neighbouring blocks the other heads, which read the same rows of the tensor. Blocks are small because slots are
// unequal: most of a large one would wait for the coarsest slot in it.
struct SlotPlace { int b, h; int64_t r; };
static const int SLOT_THREADS = 64;

__device__ __forceinline__ SlotPlace slot_place(const LighthouseShape& s, unsigned ranges, int lanes) {
    unsigned rest = blockIdx.x / s.H;
    int64_t r = (int64_t)(rest % ranges) * (SLOT_THREADS / lanes) + threadIdx.x / lanes;
    return {(int)(rest / ranges), (int)(blockIdx.x % s.H), r};
}

// Turns a vector that lies across its team: dimension d is paired with d + D/2, which D/16 lanes further holds.
template <int D>
__device__ __forceinline__ void rope_turn(float (&x)[8], const float (&cosine)[8], const float (&sine)[8],
                                          int direction, int lane) {
    float sign = lane < D / 16 ? -direction : direction;
#pragma unroll
    for (int d = 0; d < 8; d++) {
        float partner = __shfl_xor_sync(team_mask<D / 8>(), x[d], D / 16);
        x[d] = x[d] * cosine[d] + sign * partner * sine[d];
    }
}

// Sums count rows, PARTS vectors of each, with enough loads in flight that few teams fill the memory's pipe.
template <int PARTS>
__device__ __forceinline__ void sum_rows(float (&sum)[PARTS][8], const floatX* x, int64_t row, int64_t part,
                                         int64_t count) {
    constexpr int BATCH = 4;
    for (; count >= BATCH; count -= BATCH, x += BATCH * row) {
        Pack8<floatX> pack[BATCH][PARTS];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
#pragma unroll
            for (int j = 0; j < PARTS; j++) pack[i][j] = load8(x + i * row + j * part);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
#pragma unroll
            for (int j = 0; j < PARTS; j++) add_pack(sum[j], pack[i][j]);
        }
    }
#pragma unroll 1
    for (; count > 0; count--, x += row) {
        Pack8<floatX> pack[PARTS];
#pragma unroll
        for (int j = 0; j < PARTS; j++) pack[j] = load8(x + j * part);
#pragma unroll
        for (int j = 0; j < PARTS; j++) add_pack(sum[j], pack[j]);
    }
}

template <int D>
__global__ void __launch_bounds__(SLOT_THREADS, 10) lighthouse_gather_kernel(
        floatX* slots, const floatX* __restrict__ qkv, const int32_t* __restrict__ index,
        const float* __restrict__ rope, LighthouseShape s, int64_t t0, unsigned ranges) {
    constexpr int LANES = D / 8;
    SlotPlace at = slot_place(s, ranges, LANES);
    if (at.r >= s.S) return;
    int lane = threadIdx.x % LANES;
    int32_t flat = index[((int64_t)at.b * s.H + at.h) * s.S + at.r];
    int l = entry_level(s, flat);
    int64_t i = flat - s.off[l], width = (int64_t)1 << (l * pool_bits(s)), part = (int64_t)s.H * D;

    float mean[3][8] = {};
    sum_rows(mean, qkv + (at.b * s.T + i * width) * 3 * part + at.h * D + lane * 8, 3 * part, part, width);
    float cosine[8], sine[8], inverse = 1.0f / width;  // a power of 2: exact
    if (rope) rope_angles(cosine, sine, rope, t0 + (i + 1) * width - 1, lane % (D / 16) * 8, D);
    floatX* y = slots + (at.b * s.S + at.r) * 3 * part + at.h * D + lane * 8;
#pragma unroll
    for (int which = 0; which < 3; which++) {
#pragma unroll
        for (int d = 0; d < 8; d++) mean[which][d] *= inverse;
        if (rope && which < 2) rope_turn<D>(mean[which], cosine, sine, +1, lane);
        store8(y + which * part, to_pack8<floatX>(mean[which]));
    }
}

static void lighthouse_gather(floatX* slots /*(B,S,3,H,D)*/, const floatX* qkv /*(B,T,3,H,D)*/,
                              const int32_t* index /*(B,H,S)*/, const float* rope /*table or NULL*/, int B,
                              const LighthouseShape* s, int64_t t0 /*position of token 0*/) {
    unsigned ranges = grid_for(s->S, SLOT_THREADS / (s->D / 8)), blocks = grid_for((int64_t)B * s->H * ranges, 1);
    WITH_HEAD_SIZE(s->D, LAUNCH(lighthouse_gather_kernel<HEAD>, blocks, SLOT_THREADS, slots, qkv, index, rope, *s, t0,
                                ranges));
}

// A slot's gradient is the sum of dout over the tokens that it was added to: c_l tokens from the last one it covers on.
// The last entries' tokens behind T are the first ones of the part of the sequence that follows, the halo. Without one
// the kernel takes fewer registers.
template <int D, bool HALO>
__global__ void __launch_bounds__(SLOT_THREADS) lighthouse_scatter_backward_kernel(
        floatX* dattn, const floatX* __restrict__ dout, const floatX* __restrict__ halo,
        const int32_t* __restrict__ index, LighthouseShape s, unsigned ranges) {
    constexpr int LANES = D / 8;
    SlotPlace at = slot_place(s, ranges, LANES);
    if (at.r >= s.S) return;
    int lane = threadIdx.x % LANES;
    int32_t flat = index[((int64_t)at.b * s.H + at.h) * s.S + at.r];
    int l = entry_level(s, flat);
    int64_t width = (int64_t)1 << (l * pool_bits(s)), first = (flat - s.off[l] + 1) * width - 1, row = (int64_t)s.H * D;
    int64_t count = s.T - first < width ? s.T - first : width;
    float sum[1][8] = {};
    sum_rows(sum, dout + (at.b * s.T + first) * row + at.h * D + lane * 8, row, 0, count);
    if (HALO && count < width) {
        int64_t rows = ((int64_t)1 << ((s.levels - 1) * pool_bits(s))) - 1;
        sum_rows(sum, halo + at.b * rows * row + at.h * D + lane * 8, row, 0, width - count);
    }
    store8(dattn + (at.b * s.S + at.r) * row + at.h * D + lane * 8, to_pack8<floatX>(sum[0]));
}

static void lighthouse_scatter_backward(floatX* dattn /*(B,S,H,D)*/, const floatX* dout /*(B,T,H,D)*/,
                                        const floatX* halo /*(B,c_{L-1}-1,H,D) or NULL*/,
                                        const int32_t* index /*(B,H,S)*/, int B, const LighthouseShape* s) {
    unsigned ranges = grid_for(s->S, SLOT_THREADS / (s->D / 8)), blocks = grid_for((int64_t)B * s->H * ranges, 1);
    WITH_HEAD_SIZE(s->D, auto* kernel = halo ? lighthouse_scatter_backward_kernel<HEAD, true>
                                             : lighthouse_scatter_backward_kernel<HEAD, false>;
                   LAUNCH(kernel, blocks, SLOT_THREADS, dattn, dout, halo, index, *s, ranges));
}

// ---- scatter, and the backward of gather: kernels that make tokens
// A team takes STRIP tokens of one head that share their entries of every level above 0, sums those entries' slots
// once, and adds to each token its own level-0 slot. Neighbouring teams take the other heads.
#define WITH_STRIP(pool, ...) \
    if ((pool) == 2) { constexpr int STRIP = 2; __VA_ARGS__; } \
    else if ((pool) == 4) { constexpr int STRIP = 4; __VA_ARGS__; } \
    else { constexpr int STRIP = 8; __VA_ARGS__; }

// Token t receives from level l the entry floor((t+1)/c_l) - 1, which is the same for tokens u STRIP - 1 to u STRIP +
// STRIP - 2. So strip u begins a token before u STRIP, and there is one strip more than T / STRIP. Where the tokens are
// a part of a sequence, entry -1 is the last one of the part before, in its halo. Without one the kernel takes fewer
// registers.
template <int D, int STRIP, bool HALO>
__global__ void lighthouse_scatter_kernel(floatX* out, const floatX* __restrict__ attn,
                                          const floatX* __restrict__ halo, const int32_t* __restrict__ slot, int B,
                                          LighthouseShape s) {
    constexpr int LANES = D / 8;
    unsigned team = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / LANES, strips = (unsigned)(s.T / STRIP) + 1;
    if (team >= strips * s.H * B) return;
    int lane = threadIdx.x % LANES, h = team % s.H, bits = pool_bits(s);
    int64_t end = (int64_t)(team / s.H % strips) * STRIP;  // t + 1 of the first token
    int64_t b = team / s.H / strips, row = (int64_t)s.H * D;
    const int32_t* head_slot = slot + (b * s.H + h) * s.off[s.levels];
    const floatX* x = attn + b * s.S * row + h * D + lane * 8;

    int32_t own[STRIP];
#pragma unroll
    for (int j = 0; j < STRIP; j++) own[j] = end + j >= 1 && end + j <= s.T ? head_slot[end + j - 1] : -1;

    float shared_sum[8] = {};
    for (int l = 1; l < s.levels; l++) {
        int64_t i = (end >> (l * bits)) - 1;
        int32_t r = i >= 0 ? head_slot[s.off[l] + i] : -1;
        if (r >= 0) add_pack(shared_sum, load8(x + r * row));
        else if (HALO && i < 0)
            add_pack(shared_sum, load8(halo + (b * (s.levels - 1) + l - 1) * row + h * D + lane * 8));
    }

    Pack8<floatX> pack = to_pack8<floatX>(shared_sum);
    floatX* y = out + (b * s.T + end - 1) * row + h * D + lane * 8;
#pragma unroll
    for (int j = 0; j < STRIP; j++, y += row) {
        if (end + j < 1 || end + j > s.T) continue;
        if (own[j] < 0) {
            store8_stream(y, pack);
            continue;
        }
        float sum[8] = {};
        add_pack(sum, load8(x + own[j] * row));
#pragma unroll
        for (int d = 0; d < 8; d++) sum[d] += shared_sum[d];
        store8_stream(y, to_pack8<floatX>(sum));
    }
}

static void lighthouse_scatter(floatX* out /*(B,T,H,D)*/, const floatX* attn /*(B,S,H,D)*/,
                               const floatX* halo /*(B,L-1,H,D) or NULL*/, const int32_t* slot /*(B,H,E)*/, int B,
                               const LighthouseShape* s) {
    WITH_STRIP(s->pool, {
        int64_t teams = (s->T / STRIP + 1) * s->H * B;
        opRequire(teams <= UINT32_MAX, "%ld strips of tokens: more than 32 bits count", teams);
        unsigned blocks = grid_for(teams * (s->D / 8), 128);
        WITH_HEAD_SIZE(s->D, auto* kernel = halo ? lighthouse_scatter_kernel<HEAD, STRIP, true>
                                                 : lighthouse_scatter_kernel<HEAD, STRIP, false>;
                       LAUNCH(kernel, blocks, 128, out, attn, halo, slot, B, *s));
    });
}

// A block copies one level of one sequence, eight elements a thread at a time.
__global__ void lighthouse_halo_kernel(floatX* halo, const floatX* attn, const int32_t* slot, LighthouseShape s) {
    int64_t b = blockIdx.x / (s.levels - 1), l = blockIdx.x % (s.levels - 1) + 1, row = (int64_t)s.H * s.D;
    for (int i = threadIdx.x * 8; i < row; i += blockDim.x * 8) {
        int32_t r = slot[(b * s.H + i / s.D) * s.off[s.levels] + s.off[l + 1] - 1];
        Pack8<floatX> pack = {};
        if (r >= 0) pack = load8(attn + (b * s.S + r) * row + i);
        store8(halo + blockIdx.x * row + i, pack);
    }
}

// What the last entry of each level above 0 gives to the tokens that follow: zeros where it is not in the sequence.
static void lighthouse_halo(floatX* halo /*(B,L-1,H,D)*/, const floatX* attn /*(B,S,H,D)*/,
                            const int32_t* slot /*(B,H,E)*/, int B, const LighthouseShape* s) {
    LAUNCH(lighthouse_halo_kernel, grid_for((int64_t)B * (s->levels - 1), 1), 256, halo, attn, slot, *s);
}

// Gives the gradients of a slot's q, k and v, the rotation undone, to use(which of the three, the lane's 8 elements).
template <int D, class Use>
__device__ __forceinline__ void slot_gradient(const floatX* x /*the slot*/, int64_t part, const float* rope,
                                              int64_t position, int lane, Use use) {
    Pack8<floatX> pack[3] = {load8(x), load8(x + part), load8(x + 2 * part)};
    float cosine[8], sine[8];
    if (rope) rope_angles(cosine, sine, rope, position, lane % (D / 16) * 8, D);
#pragma unroll
    for (int which = 0; which < 3; which++) {
        float y[8] = {};
        add_pack(y, pack[which]);
        if (rope && which < 2) rope_turn<D>(y, cosine, sine, -1, lane);
        use(which, y);
    }
}

// Every token adds, for each level whose entry over it is in the sequence, that slot's gradient / c_l.
template <int D, int STRIP, bool ADD>
__global__ void __launch_bounds__(64, 10) lighthouse_gather_backward_kernel(
        floatX* dqkv, const floatX* __restrict__ dslots, const int32_t* __restrict__ slot,
        const float* __restrict__ rope, int B, LighthouseShape s, int64_t t0) {
    constexpr int LANES = D / 8;
    unsigned team = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / LANES, strips = (unsigned)(s.T / STRIP);
    if (team >= strips * s.H * B) return;
    int lane = threadIdx.x % LANES, h = team % s.H, bits = pool_bits(s);
    int64_t first = (int64_t)(team / s.H % strips) * STRIP, b = team / s.H / strips;
    int64_t part = (int64_t)s.H * D, row = 3 * part;
    const int32_t* head_slot = slot + (b * s.H + h) * s.off[s.levels];
    const floatX* x = dslots + b * s.S * row + h * D + lane * 8;

    float sum[3][8] = {};
    int32_t next = head_slot[s.off[s.levels - 1] + (first >> ((s.levels - 1) * bits))];
#pragma unroll 1
    for (int l = s.levels - 1; l >= 1; l--) {
        int32_t r = next;
        next = head_slot[s.off[l - 1] + (first >> ((l - 1) * bits))];  // asked for early
        if (r < 0) continue;
        int64_t i = first >> (l * bits), width = (int64_t)1 << (l * bits);
        float inverse = 1.0f / width;
        slot_gradient<D>(x + r * row, part, rope, t0 + (i + 1) * width - 1, lane, [&](int which, const float (&y)[8]) {
#pragma unroll
            for (int d = 0; d < 8; d++) sum[which][d] += y[d] * inverse;
        });
    }

    // The tokens have one parent: all of them are in the sequence or none is, and if so in neighbouring slots.
    int32_t own = next;
    floatX* out = dqkv + (b * s.T + first) * row + h * D + lane * 8;
    if (own < 0) {
        Pack8<floatX> pack[3] = {to_pack8<floatX>(sum[0]), to_pack8<floatX>(sum[1]), to_pack8<floatX>(sum[2])};
        for (int j = 0; j < STRIP; j++, out += row) {
#pragma unroll
            for (int which = 0; which < 3; which++) {
                if (ADD) {
                    float total[8] = {};
                    add_pack(total, load8(out + which * part));
#pragma unroll
                    for (int d = 0; d < 8; d++) total[d] += sum[which][d];
                    pack[which] = to_pack8<floatX>(total);
                }
                store8_stream(out + which * part, pack[which]);
            }
        }
        return;
    }
#pragma unroll 2
    for (int j = 0; j < STRIP; j++, out += row) {
        slot_gradient<D>(x + (own + j) * row, part, rope, t0 + first + j, lane, [&](int which, const float (&y)[8]) {
            float total[8];
#pragma unroll
            for (int d = 0; d < 8; d++) total[d] = sum[which][d] + y[d];
            if (ADD) add_pack(total, load8(out + which * part));
            store8_stream(out + which * part, to_pack8<floatX>(total));
        });
    }
}

static void lighthouse_gather_backward(floatX* dqkv /*(B,T,3,H,D)*/, const floatX* dslots /*(B,S,3,H,D)*/,
                                       const int32_t* slot /*(B,H,E)*/, const float* rope /*table or NULL*/, int B,
                                       const LighthouseShape* s, int64_t t0 /*position of token 0*/,
                                       bool add = false /*to what dqkv holds*/) {
    WITH_STRIP(s->pool, {
        int64_t teams = s->T / STRIP * s->H * B;
        opRequire(teams <= UINT32_MAX, "%ld strips of tokens: more than 32 bits count", teams);
        unsigned blocks = grid_for(teams * (s->D / 8), 64);
        WITH_HEAD_SIZE(s->D, auto* kernel = add ? lighthouse_gather_backward_kernel<HEAD, STRIP, true>
                                                : lighthouse_gather_backward_kernel<HEAD, STRIP, false>;
                       LAUNCH(kernel, blocks, 64, dqkv, dslots, slot, rope, B, *s, t0));
    });
}

// ---- Causal Lighthouse
// A token sees the tokens of its own tile up to itself, and of every earlier tile the slots: the leaves of what this
// tile's tokens selected. Own tiles are windows. Slots are asked in rectangles of tokens and slots, so that library
// calls do it all: of a range of 2 `half` tiles the tokens of the later half ask the slots of the earlier half, all
// ranges at once; every token meets every earlier tile once as half doubles. The parts of the softmax are merged by
// their statistics. Backward, a part's call takes the whole softmax's output and statistics, and yields its share of
// the gradients.

// Calls ask(half, first tile, ranges, tiles of their later halves); the last range may be cut short.
template <class Ask> static void each_rectangle(int tiles, Ask ask) {
    for (int half = 1; half < tiles; half *= 2) {
        int ranges = tiles / (2 * half), rest = tiles % (2 * half) - half;
        if (ranges > 0) ask(half, 0, ranges, half);
        if (rest > 0) ask(half, ranges * 2 * half, 1, rest);
    }
}

// A block drops from one tile's selection what was expanded.
__global__ void lighthouse_leaves_kernel(int32_t* leaves, const int32_t* index, const int32_t* slot, LighthouseShape s,
                                         int64_t tile_leaves) {
    int64_t bh = blockIdx.x / s.tiles;
    const int32_t* selected = index + blockIdx.x * s.tile_slots;
    int32_t* next = leaves + blockIdx.x * tile_leaves;
    int lane = threadIdx.x;
    for (int64_t j0 = 0; j0 < s.tile_slots; j0 += 32) {
        bool leaf = j0 + lane < s.tile_slots;
        int32_t flat = leaf ? selected[j0 + lane] : 0;
        int level = entry_level(s, flat);
        if (leaf && level > 0)  // its first child would be selected too
            leaf = slot[bh * s.off[s.levels] + s.off[level - 1] + (int64_t)(flat - s.off[level]) * s.pool] < 0;
        unsigned found = __ballot_sync(0xffffffffu, leaf);
        if (leaf) next[__popc(found & ((1u << lane) - 1))] = flat;
        next += __popc(found);
    }
}

static void lighthouse_leaves(int32_t* leaves /*(B,H,S') of leaf_shape*/, const int32_t* index /*(B,H,S)*/,
                              const int32_t* slot /*(B,H,E) of index*/, int B, const LighthouseShape* s) {
    LAUNCH(lighthouse_leaves_kernel, grid_for((int64_t)B * s->H * s->tiles, 1), 32, leaves, index, slot, *s,
           leaf_shape(s).tile_slots);
}

struct Rectangle {
    int64_t at, T, step, rows;  // its first query, the queries of a range, tokens between ranges, queries in all
    int64_t slot;               // the first that is asked
    SdpaShape call;
};

static Rectangle rectangle(const LighthouseShape* s, int half, int first, int ranges, int later, bool backward) {
    int64_t w = s->T / s->tiles, T = later * w, step = 2 * half * w, n = leaf_shape(s).tile_slots;
    return {(first + half) * w, T, step, ranges * T, first * n,
            {ranges, s->H, s->D, true, T, half * n, step, 2 * half * n, backward ? step : T,
             backward ? step : s->H * T, backward ? s->T : T}};
}

static SdpaShape tile_shape(const LighthouseShape* s) {
    int64_t w = s->T / s->tiles;
    return {s->tiles, s->H, s->D, false, w, w, w, w, w, w, s->T};
}

// Takes a rectangle's part into the softmax so far, whose output and statistics out and stats are.
template <int D>
__global__ void causal_merge_kernel(floatX* out, float* stats, const floatX* part, const float* part_stats, Rectangle r,
                                    int H, int64_t T) {
    constexpr int LANES = D / 8;
    int64_t team = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / LANES, row = team / H;
    if (row >= r.rows) return;
    int lane = threadIdx.x % LANES, h = team % H;
    int64_t token = r.at + row / r.T * r.step + row % r.T;
    float before = stats[h * T + token], added = part_stats[(row / r.T * H + h) * r.T + row % r.T];
    float sum = fmaxf(before, added) + log1pf(expf(-fabsf(before - added)));
    float share = expf(before - sum), rest = expf(added - sum);
    floatX* y = out + (token * H + h) * D + lane * 8;
    Pack8<floatX> x = load8(y), z = load8_stream(part + (row * H + h) * D + lane * 8);
#pragma unroll
    for (int d = 0; d < 8; d++) x.v[d] = (floatX)(share * (float)x.v[d] + rest * (float)z.v[d]);
    store8(y, x);
    __syncwarp(team_mask<LANES>());
    if (lane == 0) stats[h * T + token] = sum;
}

// dq of a rectangle's queries is added to theirs, which is a third of dqkv.
__global__ void causal_add_dq_kernel(floatX* dqkv, const floatX* part, Rectangle r, int C) {
    int64_t i = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) * 8, row = i / C;
    if (row >= r.rows) return;
    floatX* y = dqkv + (r.at + row / r.T * r.step + row % r.T) * 3 * C + i % C;
    float sum[8] = {};
    add_pack(sum, load8(y));
    add_pack(sum, load8_stream(part + i));
    store8(y, to_pack8<floatX>(sum));
}

// dk and dv of the slots that were asked, n of each range, are added to theirs.
__global__ void causal_add_dslots_kernel(floatX* dslots, const floatX* part, int64_t rows, int64_t n, int64_t step,
                                         int C) {
    int64_t i = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) * 8, row = i / (2 * C);
    if (row >= rows) return;
    int64_t at = (row / n * step + row % n) * 3 * C + C + i % (2 * C);
    float sum[8] = {};
    add_pack(sum, load8(dslots + at));
    add_pack(sum, load8_stream(part + at));
    store8(dslots + at, to_pack8<floatX>(sum));
}

// What the calls of one sequence take of the attention workspace beside cuDNN's: at its end.
struct CausalRoom {
    floatX* part;    // (rows, H, D) output of a rectangle's call, or its dq; a rectangle has half of the tokens at most
    float* stats;    // (H, rows) its statistics
    floatX* dslots;  // (S',3,H,D) backward: of one rectangle
    int64_t bytes;
};
static CausalRoom causal_room(const LighthouseShape* s, bool backward) {
    int64_t rows = s->tiles / 2 * (s->T / s->tiles), C = (int64_t)s->H * s->D;
    int64_t part = round_up_256(rows * C * sizeof(floatX)), stats = round_up_256(s->H * rows * sizeof(float));
    int64_t bytes = part + (backward ? round_up_256(leaf_shape(s).S * 3 * C * sizeof(floatX)) : stats) + 256;
    char* at = (char*)sdpa_workspace + (sdpa_workspace_bytes - bytes) / 256 * 256;
    return {(floatX*)at, (float*)(at + part), (floatX*)(at + part), bytes};
}

// Builds what the calls need, and returns the bytes of workspace for them.
static int64_t causal_prepare(int /*B: one sequence after the other*/, const LighthouseShape* s, bool backward) {
    int64_t bytes = 0;
    for (int back = 0; back <= backward; back++) {
        int64_t most = sdpa_prepare(back, true, tile_shape(s));
        each_rectangle(s->tiles, [&](int half, int first, int ranges, int later) {
            most = std::max(most, sdpa_prepare(back, true, rectangle(s, half, first, ranges, later, back).call));
        });
        bytes = std::max(bytes, most + causal_room(s, back).bytes);
    }
    return bytes;
}

static void causal_forward(floatX* out /*(B,T,H,D)*/, float* stats /*(B,H,T) logsumexp of all that a token sees*/,
                           const floatX* qkv /*(B,T,3,H,D) rotated*/, const floatX* slots /*(B,S',3,H,D)*/, int B,
                           const LighthouseShape* s) {
    int64_t C = (int64_t)s->H * s->D;
    CausalRoom room = causal_room(s, false);
    for (int b = 0; b < B; b++) {
        sdpa_attend(out, stats, qkv, qkv + C, tile_shape(s));
        each_rectangle(s->tiles, [&](int half, int first, int ranges, int later) {
            Rectangle r = rectangle(s, half, first, ranges, later, false);
            sdpa_attend(room.part, room.stats, qkv + r.at * 3 * C, slots + r.slot * 3 * C + C, r.call);
            WITH_HEAD_SIZE(s->D, LAUNCH(causal_merge_kernel<HEAD>, grid_for(r.rows * C / 8, 128), 128, out, stats,
                                        room.part, room.stats, r, s->H, s->T));
        });
        out += s->T * C, stats += s->H * s->T, qkv += s->T * 3 * C, slots += leaf_shape(s).S * 3 * C;
    }
}

// Writes the gradients of the tokens' q, k and v, of k and v what comes from the own tile, and those of the slots.
static void causal_backward(floatX* dqkv, floatX* dslots /*(B,S',3,H,D) the third of q: zeros*/, const floatX* dout,
                            const floatX* qkv, const floatX* slots, const floatX* out, const float* stats, int B,
                            const LighthouseShape* s) {
    int64_t C = (int64_t)s->H * s->D, S = leaf_shape(s).S;
    CausalRoom room = causal_room(s, true);
    device_zero(dslots, B * S * 3 * C * sizeof(floatX));
    for (int b = 0; b < B; b++) {
        sdpa_attend_backward(dqkv, dqkv + C, dout, qkv, qkv + C, out, stats, tile_shape(s));
        each_rectangle(s->tiles, [&](int half, int first, int ranges, int later) {
            Rectangle r = rectangle(s, half, first, ranges, later, true);
            int64_t asked = ranges * r.call.Tk;
            sdpa_attend_backward(room.part, room.dslots + C, dout + r.at * C, qkv + r.at * 3 * C,
                                 slots + r.slot * 3 * C + C, out + r.at * C, stats + r.at, r.call);
            LAUNCH(causal_add_dq_kernel, grid_for(r.rows * C / 8, 256), 256, dqkv, room.part, r, (int)C);
            LAUNCH(causal_add_dslots_kernel, grid_for(asked * 2 * C / 8, 256), 256, dslots + r.slot * 3 * C,
                   room.dslots, asked, r.call.Tk, r.call.k_step, (int)C);
        });
        dqkv += s->T * 3 * C, dslots += S * 3 * C, dout += s->T * C, qkv += s->T * 3 * C;
        slots += S * 3 * C, out += s->T * C, stats += s->H * s->T;
    }
}

#endif  // the kernels with their launchers

struct LighthouseBuffers {  // of one layer; E entries of all levels, S slots, or for Causal Lighthouse its leaves, with
                            // NH/W heads. Where slots are exchanged, E/W and S/W
    float* scores;      // (2, B, NH/W, E) or (2, B, NH, E/W) shared by the layers
    int32_t* slot;      // (B, NH/W, E) or (B, NH, E/W) shared by the layers: slot of each entry, or -1
    int32_t* index;     // (B, NH/W, S) or (B, NH, S/W) the selection, in sequence order; if C shared by the layers
    int32_t* leaves;    // (B, NH/W, leaves) Causal Lighthouse only
    floatX* slots;      // (B, S, 3, NH/W, D) pooled and rotated q, k, v
    floatX* attn;       // (B, S, NH/W, D) attention output of the slots
    float* stats;       // (B, NH/W, S)
    floatX* dslots;     // (B, S, 3, NH/W, D) shared by the layers
    floatX* dattn;      // (B, S, NH/W, D) shared by the layers
    floatX* own_attn;   // (B, S/W, NH, D) shared by the layers, only where slots are exchanged: attn of the own slots
    floatX* halo;       // (B, c_{L-1} - 1, NH, D) like own_attn: rows of the next process's dout; (B, L-1, NH, D) in
                        // the forward pass: outputs of the previous one's last entries
};

// ===================================================================================================================
// 7. Model: GPT-2 with pre-LayerNorm blocks; parameters, activations, the memory plan, forward, backward.

enum Phase { FIRST_PHASE, DENSE_PHASE };  // of the run, before and from the switch step
static const char* phase_name[] = {"first", "dense"};
enum Attention { DENSE, WINDOW, LIGHTHOUSE, CAUSAL, ATTENTION_KINDS };  // of a layer; in the dense phase all are DENSE
static const char attention_letters[] = "DWLC";  // CAUSAL: Causal Lighthouse
static const int MAX_WINDOWS = 8;

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

struct Descriptor { const char* name; int layers, channels, heads; };
static const Descriptor* find_descriptor(const char* model) {  // NULL: it is a file
    static const Descriptor descriptors[] = {
        {"d6", 6, 384, 6}, {"d12", 12, 768, 12}, {"d24", 24, 1024, 16}, {"d36", 36, 1280, 20}, {"d48", 48, 1600, 25},
        {"d60", 60, 1920, 30}, {"lh30", 30, 1024, 8}};
    for (const Descriptor& d : descriptors) if (!strcmp(model, d.name)) return &d;
    return NULL;
}

static const int MAX_LAYERS = 1024;

// The recompute levels, see the option: the first that does not keep a tensor until the backward pass.
enum { AGAIN_GELU = 1, AGAIN_NORMS, AGAIN_PRODUCTS, AGAIN_ATTENTION };

// The matrix products of a layer. The bias is the tensor after the weight.
enum Product { QKV, ATTPROJ, FC, FCPROJ, PRODUCTS };
static const struct {
    int weight;   // the tensor, (out C, in C)
    int in, out;  // widths of input and output, in channels
    int offset;   // where the weight begins among the layer's 12 C C
    int again;    // the recompute level from which the input is no longer kept
} products[PRODUCTS] = {{QKVW, 1, 3, 0, AGAIN_NORMS}, {ATTPROJW, 1, 1, 3, AGAIN_NORMS}, {FCW, 1, 4, 4, AGAIN_NORMS},
                         {FCPROJW, 4, 1, 8, AGAIN_GELU}};

// Activations of one layer. What the recompute level does not keep points to buffers that all layers share. A process
// has its T/W tokens of all heads everywhere but in attention, where it has all T tokens, or slots, of its NH/W heads.
struct LayerActs {
    floatX* x;                 // (B, T/W, C) input of the block
    floatX* ln1;               // (B, T/W, C)
    float *ln1_mean, *ln1_rstd;  // (B, T/W)
    floatX* qkv;               // (B, T, 3, NH/W, D) raw in a Lighthouse layer, else rotated; in a layer that does not
                               // exchange tokens (B, T/W, 3, NH, D)
    floatX* att;               // (B, T/W, C)
    floatX* att_heads;         // (B, T, NH/W, D) what att is made of; att itself if the backward pass needs one only
    float* stats;              // (B, NH/W, T), of windows (B T/window, NH/W or NH, window); not in Lighthouse layers
    LighthouseBuffers lh;      // Lighthouse layers only
    floatX* x2;                // (B, T/W, C) after the attention residual
    floatX* ln2;               // (B, T/W, C)
    float *ln2_mean, *ln2_rstd;  // (B, T/W)
    floatX* fch;               // (B, T/W, 4C) before GELU
    floatX* gelu;              // (B, T/W, 4C) not with FP8; before GELU and after its backward, the room for exchanges
    fp8_t* columns[PRODUCTS];  // (C or 4C, B T/W) FP8 only: each product's input, as the weight's gradient reads it
};

// What a pass runs over. The same arena holds the activations of every kind of pass, one after the other.
struct Run {
    int B;
    int64_t T;      // of the whole sequences; a process has T/W of each
    Phase phase;
    int64_t window; // of the window layers; 0 in the dense phase
    bool train;     // activations are kept, gradients are made
    int recompute;  // the sum of the layers' levels, 0..4L: see layer_level()
    bool fp8;       // only where train: what is evaluated is the model that is written, in floatX
    bool first;     // of the step's micro-steps: products write the matrices' gradients instead of adding to them
    bool last;      // of the step's micro-steps: gradients are complete, and summed over the processes
};
static int64_t run_rows(Run r) { return r.B * (r.T / procs.cp); }               // N
static int64_t first_token(Run r) { return procs.cp_rank * (r.T / procs.cp); }  // of this process, in each sequence

struct Activations {
    LayerActs layer[MAX_LAYERS];
    floatX* x_final;           // (B, T/W, C) output of the last block
    floatX* lnf;               // (B, T/W, C)
    float *lnf_mean, *lnf_rstd;  // (B, T/W)
    floatX* logits;            // (head_rows, Vp) one chunk of rows
    float* losses;             // (B, T/W)
    floatX* dres;              // (B, T/W, C) gradient of the residual stream
    floatX* dbtc;              // (B, T/W, C), in attention (B, T, NH/W, D)
    floatX* dwide;             // (B, T/W, 4C) gradient of fch, then of qkv (B, T, 3, NH/W, D), (B, T/W, 3, NH, D)
};

// A batch on its way to the device: pinned host memory, and the event behind the copies from it.
struct Batch {
    int *tokens, *targets;     // (B, T/W)
    DeviceEvent copied;
};

// Parameters lie in memory unit by unit: unit 0 is the embeddings and the final LayerNorm, unit 1 + l is layer l. A
// unit is what is reduced, updated and gathered at once, as soon as its part of the backward pass is done; its
// matrices come first, since weight decay falls on them only. It is cut into world equal slices: rank r holds master
// weights and moments of slice r of every unit (ZeRO stage 1), and updates that. Files are in llm.c's order, tensor by
// tensor, without padding, whatever the number of processes.
struct Model {
    Dims dims;
    int64_t size[TENSORS], file_offset[TENSORS];  // elements, all layers
    int64_t parameters;                           // elements of a file
    int64_t within[TENSORS];                      // where a tensor begins in its unit
    int64_t unit_size[2], unit_matrices[2];       // of unit 0 and of a layer's: elements, and those before its vectors
    int64_t padded, owned;                        // elements of all units; of this process's slices
    Attention attention[MAX_LAYERS];         // of each layer in the first phase
    char pattern[MAX_LAYERS + 1];            // the same as letters
    bool uses[ATTENTION_KINDS];              // by at least one layer in the first phase
    bool never_dense;                        // there is no other phase: only evaluations and samples are dense
    int64_t window[MAX_WINDOWS], window_from[MAX_WINDOWS];  // a window and the first step that takes it
    int windows;                             // 0: there is no first phase
    LighthouseShape shape;                   // of whole sequences and the NH/W heads of this process
    LighthouseShape own_shape;               // of the T/W tokens of this process and all heads
    bool exchange_slots;                     // a Lighthouse layer selects in own_shape and exchanges slots, not tokens
    floatX* params;            // (padded) what the operations read
    float* grads;              // (padded)
    float* master;             // (owned) fp32; NULL if params are fp32 themselves
    float *m, *v;              // (owned) first and second moment
    float* rope;               // (1024 + T/1024, D/2, 2) or NULL
    fp8_t* fp8_weights;        // (2, L, 12 C C) FP8 only: each layer's four matrices, then all of them transposed
    Fp8Scale* fp8_scales;      // (3, L, PRODUCTS) of the weights, the inputs, the gradients of the outputs
    fp8_t* fp8_operand;        // (2, B T/W, 4C) a product's input or gradient; the gradient's transpose
    int *tokens, *targets;     // (B, T/W)
    Arena arena;               // the activations
    Activations acts;
    Batch batch[3];            // training alternates between two of them, evaluation has the third
    double* sums;              // (2) on the device: the losses of the step, the squares of its gradient
};
enum { LOSS_SUM, NORM_SUM };

// One layer of a stacked tensor, all of another.
static int64_t layer_size(const Model* m, int t) { return tensor_is_stacked(t) ? m->size[t] / m->dims.L : m->size[t]; }
static int64_t unit_size(const Model* m, int u) { return m->unit_size[u > 0]; }
static int64_t unit_begin(const Model* m, int u) {
    return u == 0 ? 0 : m->unit_size[0] + (u - 1) * m->unit_size[1];
}
// Where layer l of tensor t begins in params and grads.
static int64_t layer_offset(const Model* m, int t, int l) {
    return unit_begin(m, tensor_is_stacked(t) ? 1 + l : 0) + m->within[t];
}
static floatX* weight(const Model* m, int t, int l) { return m->params + layer_offset(m, t, l); }
static float* gradient(const Model* m, int t, int l) { return m->grads + layer_offset(m, t, l); }

// This process's slice of unit u: its elements, where it begins in params and grads, and where in master, m and v.
static int64_t slice_size(const Model* m, int u) { return unit_size(m, u) / procs.world; }
static int64_t slice_begin(const Model* m, int u, int rank = procs.rank) {
    return unit_begin(m, u) + rank * slice_size(m, u);
}
static int64_t slice_owned(const Model* m, int u) { return unit_begin(m, u) / procs.world; }

static void model_layout(Model* m, Dims d) {
    m->dims = d;
    int64_t C = d.C, L = d.L;
    int64_t size[TENSORS] = {
        d.Vp * C, d.rope ? 0 : d.maxT * C,
        L * C, L * C, L * 3 * C * C, L * 3 * C, L * C * C, L * C,
        L * C, L * C, L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C,
        C, C};
    m->parameters = 0;
    for (int t = 0; t < TENSORS; t++) {
        m->size[t] = size[t];
        m->file_offset[t] = m->parameters;
        m->parameters += size[t];
    }
    const int64_t align = 128;  // elements: 256 bytes in bf16, what loads of 16 bytes and the libraries like best
    for (int kind = 0; kind < 2; kind++) {
        int64_t end = 0;
        for (int matrices = 1; matrices >= 0; matrices--) {
            for (int t = 0; t < TENSORS; t++) {
                if (tensor_is_stacked(t) != (kind == 1) || tensor_is_matrix(t) != (matrices == 1)) continue;
                m->within[t] = end;
                end += ceil_div(layer_size(m, t), align) * align;
            }
            if (matrices) m->unit_matrices[kind] = end;
        }
        m->unit_size[kind] = ceil_div(end, align * procs.world) * align * procs.world;
    }
    m->padded = unit_begin(m, 1 + d.L);
    m->owned = m->padded / procs.world;
}

// A run of elements that are neighbours in memory and in the files, inside one tensor of one layer and one slice.
struct Piece {
    int tensor;
    int64_t count;
    int64_t file;    // where it begins in a file
    int64_t memory;  // in params and grads
    int64_t owned;   // in master, m and v
};

// The pieces that make up this process's slices, or another's.
static std::vector<Piece> own_pieces(const Model* m, int rank = procs.rank) {
    std::vector<Piece> pieces;
    for (int t = 0; t < TENSORS; t++)
        for (int l = 0; l < (tensor_is_stacked(t) ? m->dims.L : 1); l++) {
            int u = tensor_is_stacked(t) ? 1 + l : 0;
            int64_t begin = layer_offset(m, t, l), slice = slice_begin(m, u, rank);
            int64_t first = std::max(begin, slice);
            int64_t last = std::min(begin + layer_size(m, t), slice + slice_size(m, u));
            if (first < last)
                pieces.push_back({t, last - first, m->file_offset[t] + l * layer_size(m, t) + first - begin, first,
                                  slice_owned(m, u) + first - slice});
        }
    return pieces;
}

// Calls use(piece, i, n) for parts of a process's pieces, of at most PART parameters: the piece's n from the i-th on.
static const int64_t PART = 4 << 20;
template <typename Use> static void for_parts(const Model* m, int rank, Use use) {
    for (const Piece& p : own_pieces(m, rank))
        for (int64_t i = 0; i < p.count; i += PART) use(p, i, std::min(p.count - i, PART));
}

// The weights that this process updates, in fp32.
static float* own_master(const Model* m, const Piece& p) {
    return m->master ? m->master + p.owned : (float*)m->params + p.memory;
}

// Sets n weights of a piece, from its i-th on.
static void set_weights(const Model* m, const Piece& p, int64_t i, const float* host, int64_t n) {
    copy_to_device(own_master(m, p) + i, host, n * sizeof(float));
    if (!m->master) return;
    std::unique_ptr<floatX[]> rounded(new floatX[n]);
    #pragma omp parallel for
    for (int64_t j = 0; j < n; j++) rounded[j] = (floatX)host[j];
    copy_to_device(m->params + p.memory + i, rounded.get(), n * sizeof(floatX));
}

// Every process's slices of the parameters of unit u, or of `units` layers from there on, to all.
static void gather_params(Model* m, int u, int units) {
    all_gather_start(m->params + unit_begin(m, u), units, unit_size(m, u) * sizeof(floatX));
}
static void gather_all_params(Model* m) {
    gather_params(m, 0, 1);
    gather_params(m, 1, m->dims.L);
    collectives_join();
}

// GPT-2's: 0.02, projections into the residual stream smaller by 1/sqrt(2L). Every element is a function of the seed
// and its place in the file, so any number of processes makes the same model.
static void model_initialize(Model* m, uint64_t seed) {
    std::unique_ptr<float[]> host(new float[PART]);
    for_parts(m, procs.rank, [&](const Piece& p, int64_t i, int64_t n) {
        int t = p.tensor;
        float scale = t == ATTPROJW || t == FCPROJW ? 0.02f / sqrtf(2.0f * m->dims.L) : 0.02f;
        float vector = t == LN1W || t == LN2W || t == LNFW ? 1.0f : 0.0f;
        #pragma omp parallel for
        for (int64_t j = 0; j < n; j++)
            host[j] = tensor_is_matrix(t) ? scale * (float)gaussian(seed, p.file + i + j) : vector;
        set_weights(m, p, i, host.get(), n);
    });
    gather_all_params(m);
}

// The one place that says which attention a layer uses.
static Attention layer_attention(const Model* m, int l, Phase phase) {
    return lighthouse_built && phase == FIRST_PHASE ? m->attention[l] : DENSE;
}

static int64_t window_at(const Model* m, int64_t step) {  // 0 where there is no first phase
    int i = 0;
    while (i + 1 < m->windows && m->window_from[i + 1] <= step) i++;
    return m->window[i];
}

// Whether processes that share a sequence exchange tokens for heads round such a layer's attention: not where windows,
// or a Lighthouse layer's tiles, lie whole on the processes.
static bool exchanges_tokens(const Model* m, Attention kind, Run r) {
    return kind == LIGHTHOUSE ? !m->exchange_slots : kind != WINDOW || r.T / procs.cp % r.window != 0;
}

// Whether any layer selects slots, and so reads m->shape.
static bool uses_slots(const Model* m) { return m->uses[LIGHTHOUSE] || m->uses[CAUSAL]; }

// The recompute level of layer l, see the option. Where levels are mixed the first layers have one less than the rest.
static int layer_level(const Model* m, Run r, int l) {
    return r.train ? (r.recompute + l) / m->dims.L : 5;  // 5: nothing is kept
}

// Rows of the logits made at a time, never the whole sequence's. The tests make the chunk small.
static int64_t head_chunk_bytes = 512ll << 20;
static int64_t head_rows(const Model* m, int64_t rows) {
    int64_t chunk = head_chunk_bytes / ((int64_t)m->dims.Vp * floatx_bytes) / 128 * 128;
    return std::min(rows, std::max<int64_t>(chunk, 128));
}

// Gives a tensor of a layer its place: its own if it is kept, else one that all layers share.
template <class T> static void place(T** tensor, T** shared, Arena* arena, size_t bytes, bool kept) {
    *tensor = !kept && *shared ? *shared : (T*)take(arena, bytes);
    if (!kept) *shared = *tensor;
}

// Places the activations of a pass in the arena: every tensor with the recompute level from which it is made again.
static void activations_layout(Activations* a, Arena* arena, const Model* m, Run r) {
    const Dims* d = &m->dims;
    const LighthouseShape* s = &m->shape;
    int64_t N = run_rows(r), C = d->C, NC = N * C;
    int64_t entries = r.B * s->H * s->off[s->levels], slots = r.B * s->S * s->H;  // NH/W times all, or NH times 1/W
    // With FP8 the products' inputs are kept as the columns that the weights' gradients read. GELU's result is then
    // never made, LayerNorm's and attention's only on the way there.
    const int NEVER = 0, ALWAYS = 5, INPUTS = r.fp8 ? NEVER : AGAIN_NORMS;  // an evaluation's level is 5
    LayerActs shared;
    memset(&shared, 0, sizeof shared);
    floatX* x[2] = {NULL, NULL};  // an evaluation's residual stream alternates between two buffers
    for (int i = 0; !r.train && i < 2; i++) x[i] = TAKE(arena, floatX, NC);
    for (int l = 0; l < d->L; l++) {
        LayerActs* y = &a->layer[l];
        Attention kind = layer_attention(m, l, r.phase);
        bool lighthouse = kind == LIGHTHOUSE, causal = kind == CAUSAL;
        // Where tokens are exchanged, the backward of dense attention needs att in both forms, but with FP8 only that
        // of heads; from AGAIN_NORMS on that one is kept, and exchanged again.
        bool two_forms = r.train && procs.cp > 1 && !lighthouse && exchanges_tokens(m, kind, r);
        int level = layer_level(m, r, l);
        #define PLACE(tensor, type, count, again) \
            place(&y->tensor, &shared.tensor, arena, BYTES(type, count), level < (again))
        y->x = r.train ? TAKE(arena, floatX, NC) : x[l % 2];
        PLACE(ln1_mean, float, N, ALWAYS);
        PLACE(ln1_rstd, float, N, ALWAYS);
        PLACE(ln2_mean, float, N, ALWAYS);
        PLACE(ln2_rstd, float, N, ALWAYS);
        PLACE(ln1, floatX, NC, INPUTS);
        PLACE(ln2, floatX, NC, INPUTS);
        PLACE(qkv, floatX, 3 * NC, AGAIN_PRODUCTS);
        PLACE(x2, floatX, NC, AGAIN_PRODUCTS);
        PLACE(fch, floatX, 4 * NC, AGAIN_PRODUCTS);
        if (!r.fp8 || procs.cp > 1) PLACE(gelu, floatX, 4 * NC, r.fp8 ? NEVER : AGAIN_GELU);
        for (int p = 0; r.fp8 && p < PRODUCTS; p++) PLACE(columns[p], fp8_t, N * products[p].in * C, products[p].again);
        PLACE(att, floatX, NC, lighthouse || two_forms ? INPUTS : AGAIN_ATTENTION);
        y->att_heads = y->att;
        if (two_forms) PLACE(att_heads, floatX, NC, AGAIN_ATTENTION);
        if (!lighthouse) PLACE(stats, float, N * d->NH, AGAIN_ATTENTION);
        if (!lighthouse && !causal) continue;
        // What is shared has room for S slots, also if only the leaves are asked for.
        int64_t leaves = causal ? r.B * s->H * leaf_shape(s).S : 0;
        PLACE(lh.index, int32_t, slots, causal ? NEVER : ALWAYS);
        PLACE(lh.slots, floatX, (causal && level < AGAIN_NORMS ? leaves : slots) * 3 * s->D, AGAIN_NORMS);
        PLACE(lh.scores, float, 2 * entries, NEVER);
        PLACE(lh.slot, int32_t, entries, NEVER);
        if (r.train) PLACE(lh.dslots, floatX, slots * 3 * s->D, NEVER);
        if (causal) {
            PLACE(lh.leaves, int32_t, leaves, ALWAYS);
            continue;
        }
        PLACE(lh.attn, floatX, slots * s->D, ALWAYS);  // S rows, not T
        PLACE(lh.stats, float, slots, ALWAYS);
        if (r.train) PLACE(lh.dattn, floatX, slots * s->D, NEVER);
        if (m->exchange_slots) {
            PLACE(lh.own_attn, floatX, slots * s->D, NEVER);
            PLACE(lh.halo, floatX, r.B * (s->T / s->n[s->levels - 1] - 1) * C, NEVER);
        }
        #undef PLACE
    }
    a->x_final = r.train ? TAKE(arena, floatX, NC) : x[d->L % 2];
    a->lnf = TAKE(arena, floatX, NC);
    a->lnf_mean = TAKE(arena, float, N);
    a->lnf_rstd = TAKE(arena, float, N);
    a->logits = TAKE(arena, floatX, head_rows(m, N) * d->Vp);
    a->losses = TAKE(arena, float, N);
    if (r.train) {
        a->dres = TAKE(arena, floatX, NC);
        a->dbtc = TAKE(arena, floatX, NC);
        a->dwide = TAKE(arena, floatX, 4 * NC);
    }
}

static size_t activations_bytes(const Model* m, Run r) {
    static Activations a;
    Arena count = {(char*)256, 0, SIZE_MAX};  // memory that nobody touches: what is shared must not look like NULL
    activations_layout(&a, &count, m, r);
    return count.used;
}

// ---- attention
// Under context parallelism processes exchange round attention their rows of the others' heads for the others' rows of
// their heads; a rank's rows follow those of the rank before. Both forms have B R/W parts C elements, parts being 3 for
// q, k and v together; they may be one buffer, and with one process they always are. `room` has as many elements.

// From this process's rows of all heads to all R rows of its heads.
static void rows_to_heads(floatX* heads /*(B,R,parts,NH/W,D)*/, const floatX* rows /*(B,R/W,parts,NH,D)*/,
                          floatX* room, int B, int64_t R, int parts, int C) {
    int W = procs.cp, n = C / W;
    if (W == 1) return;
    int64_t count = R / W * parts;
    heads_pack(room, rows, B, count, W, n);  // (B, W, R/W, parts, NH/W, D)
    for (int b = 0; b < B; b++) all_to_all(heads + b * count * C, room + b * count * C, count * n * sizeof(floatX));
}

// And back.
static void heads_to_rows(floatX* rows /*(B,R/W,parts,NH,D)*/, const floatX* heads /*(B,R,parts,NH/W,D)*/,
                          floatX* room, int B, int64_t R, int parts, int C) {
    int W = procs.cp, n = C / W;
    if (W == 1) return;
    int64_t count = R / W * parts;
    for (int b = 0; b < B; b++) all_to_all(room + b * count * C, heads + b * count * C, count * n * sizeof(floatX));
    heads_unpack(rows, room, B, count, W, n);
}

// A Lighthouse layer needs to exchange only its slots where every process holds whole tiles, since each tile is
// selected on its own: a process then scores, selects, pools and scatters among its own tokens, for all heads, with the
// same results. Where tiles do not divide, or slots are no fewer than tokens, it exchanges tokens like a dense layer
// and does all of that for its heads. *own: the shape of what a process holds.
static bool can_exchange_slots(const Model* m, int tile, LighthouseShape* own) {
    const LighthouseShape* s = &m->shape;
    int W = procs.cp;
    return W > 1 && s->topk % (W * tile) == 0 && s->S < s->T &&
           lighthouse_shape(own, s->T / W, m->dims.NH, s->D, s->levels, s->pool, s->topk / W, tile) == "";
}

// What of the forward pass runs: all of it, or, for the backward pass, what was not kept.
static void lighthouse_forward(Model* m, LayerActs* y, Run r, bool again, bool regather) {
    LighthouseBuffers* b = &y->lh;
    const LighthouseShape *all = &m->shape, *s = m->exchange_slots ? &m->own_shape : all;
    int C = m->dims.C;
    if (!again) {
        lighthouse_scores(b->scores, y->qkv, r.B, s);
        lighthouse_select(b->index, b->scores, r.B, s);
    }
    lighthouse_invert(b->slot, b->index, r.B, s);
    if (again && !regather) return;
    lighthouse_gather(b->slots, y->qkv, b->index, m->rope, r.B, s, m->exchange_slots ? first_token(r) : 0);
    if (m->exchange_slots) rows_to_heads(b->slots, b->slots, y->gelu, r.B, all->S, 3, C);
    if (!again) sdpa_forward(b->attn, b->stats, b->slots, r.B, all->S, all->H, all->D);
    const floatX *attn = b->attn, *halo = NULL;
    if (m->exchange_slots) {
        heads_to_rows(b->own_attn, b->attn, y->gelu, r.B, all->S, 1, C);
        lighthouse_halo(y->gelu, b->own_attn, b->slot, r.B, s);
        shift(b->halo, y->gelu, (int64_t)r.B * (s->levels - 1) * C * sizeof(floatX), +1);
        attn = b->own_attn;
        if (procs.cp_rank > 0) halo = b->halo;
    }
    lighthouse_scatter(y->att_heads, attn, halo, b->slot, r.B, s);
}

// dout and dqkv are of own tokens and all heads where slots are exchanged, else of all tokens and own heads.
static void lighthouse_backward(Model* m, LayerActs* y, Run r, floatX* dqkv, const floatX* dout) {
    LighthouseBuffers* b = &y->lh;
    const LighthouseShape *all = &m->shape, *s = m->exchange_slots ? &m->own_shape : all;
    const floatX* halo = NULL;
    int C = m->dims.C;
    if (m->exchange_slots) {
        int64_t rows = s->T / s->n[s->levels - 1] - 1;  // fewer than T/W: a tile has several coarsest entries
        for (int i = 0; i < r.B; i++)
            shift(b->halo + i * rows * C, dout + i * s->T * C, rows * C * sizeof(floatX), -1);
        if (procs.cp_rank < procs.cp - 1) halo = b->halo;
    }
    lighthouse_scatter_backward(b->dattn, dout, halo, b->index, r.B, s);
    if (m->exchange_slots) rows_to_heads(b->dattn, b->dattn, y->gelu, r.B, all->S, 1, C);
    sdpa_backward(b->dslots, b->dattn, b->slots, b->attn, b->stats, r.B, all->S, all->H, all->D);
    if (m->exchange_slots) heads_to_rows(b->dslots, b->dslots, y->gelu, r.B, all->S, 3, C);
    lighthouse_gather_backward(dqkv, b->dslots, b->slot, m->rope, r.B, s, m->exchange_slots ? first_token(r) : 0,
                               false);
}

// Causal Lighthouse: the leaves of each tile's selection are slots for the tokens of later tiles, which attend to them
// and to their own tile's tokens in one softmax. All of it is done on q and k as they are rotated. What of the forward
// pass runs is told as above.
static void causal_lighthouse_forward(Model* m, LayerActs* y, Run r, bool again, bool regather, bool reattend) {
    LighthouseBuffers* b = &y->lh;
    const LighthouseShape *s = &m->shape, leaf = leaf_shape(s);
    if (!again) {
        lighthouse_scores(b->scores, y->qkv, r.B, s);
        lighthouse_select(b->index, b->scores, r.B, s);
        lighthouse_invert(b->slot, b->index, r.B, s);
        lighthouse_leaves(b->leaves, b->index, b->slot, r.B, s);
    }
    if (regather) lighthouse_gather(b->slots, y->qkv, b->leaves, NULL, r.B, &leaf, 0);
    if (reattend) causal_forward(y->att_heads, y->stats, y->qkv, b->slots, r.B, s);
}

static void causal_lighthouse_backward(Model* m, LayerActs* y, Run r, floatX* dqkv, const floatX* dout) {
    LighthouseBuffers* b = &y->lh;
    const LighthouseShape *s = &m->shape, leaf = leaf_shape(s);
    causal_backward(dqkv, b->dslots, dout, y->qkv, b->slots, y->att_heads, y->stats, r.B, s);
    lighthouse_invert(b->slot, b->leaves, r.B, &leaf);
    lighthouse_gather_backward(dqkv, b->dslots, b->slot, NULL, r.B, &leaf, 0, true);
}

// ---- the matrix products of the layers, in floatX or with FP8 operands

static Fp8Matrix fp8_weight(const Model* m, int p, int l) {
    int64_t CC = (int64_t)m->dims.C * m->dims.C, transposed = m->dims.L * 12 * CC;
    fp8_t* rows = m->fp8_weights + (l * 12 + products[p].offset) * CC;
    return {rows, rows + transposed, m->fp8_scales + l * PRODUCTS + p};
}
static Fp8Matrix fp8_input(const Model* m, int p, int l) {
    return {m->fp8_operand, m->acts.layer[l].columns[p], m->fp8_scales + (m->dims.L + l) * PRODUCTS + p};
}
static Fp8Matrix fp8_gradient(const Model* m, int p, int l, int64_t N) {
    return {m->fp8_operand, m->fp8_operand + N * 4 * m->dims.C, m->fp8_scales + (2 * m->dims.L + l) * PRODUCTS + p};
}

// The weights in FP8. To be called after every change of the parameters.
static void fp8_weights_update(Model* m) {
    if (!m->fp8_weights) return;
    device_zero(m->fp8_scales, m->dims.L * PRODUCTS * sizeof(Fp8Scale));
    for (int l = 0; l < m->dims.L; l++)
        for (int p = 0; p < PRODUCTS; p++) {
            int C = products[p].in * m->dims.C, OC = products[p].out * m->dims.C;
            Fp8Matrix w = fp8_weight(m, p, l);
            const floatX* wide = weight(m, products[p].weight, l);
            fp8_amax(w.scale, wide, NULL, (int64_t)OC * C);
            fp8_quantize(w, NULL, wide, NULL, OC, C, false);
        }
}

// What product p of a layer reads. With FP8 GELU of fch is only made while it is quantized.
static const floatX* product_input(const LayerActs* y, int p, bool fp8) {
    const floatX* inputs[PRODUCTS] = {y->ln1, y->att, y->ln2, fp8 ? NULL : y->gelu};
    return inputs[p];
}

// out = input weight^T + bias + addend. With again out is NULL if it was kept; what of the input the backward pass
// needs is made again unless the layer's recompute level kept it.
static void product_forward(Model* m, int l, int p, Run r, floatX* out /*(B,T/W,OC) or NULL*/,
                            const floatX* addend /*(B,T/W,OC) or NULL*/, bool again) {
    LayerActs* y = &m->acts.layer[l];
    const floatX *inp = product_input(y, p, r.fp8), *w = weight(m, products[p].weight, l);
    const floatX* bias = weight(m, products[p].weight + 1, l);
    int64_t N = run_rows(r);
    int C = products[p].in * m->dims.C, OC = products[p].out * m->dims.C;
    if (!r.fp8) {
        if (out) matmul_forward(out, inp, w, bias, addend, N, C, OC);
        return;
    }
    Fp8Matrix inp8 = fp8_input(m, p, l);
    const floatX* pre = p == FCPROJ ? y->fch : NULL;
    if (!out) inp8.rows = NULL;
    // The backward pass reads the columns where they were last made: a layer that makes them again needs none before.
    if (again != (layer_level(m, r, l) >= products[p].again)) inp8.columns = NULL;
    if (!again) fp8_amax(inp8.scale, inp, pre, N * C);
    if (inp8.rows || inp8.columns) fp8_quantize(inp8, NULL, inp, pre, N, C, false);
    if (out) fp8_matmul_forward(out, inp8, fp8_weight(m, p, l), bias, addend, N, C, OC);
}

// From dout the gradients of product p's input, weight and, unless whoever wrote dout made it, bias. FCPROJ leaves the
// gradient of fch; with FP8 that of GELU's result, which FC turns into that of fch while it quantizes.
static void product_backward(Model* m, int l, int p, Run r, floatX* dinp /*(B,T/W,IC)*/, float* dbias /*or NULL*/,
                             const floatX* dout /*(B,T/W,OC)*/) {
    LayerActs* y = &m->acts.layer[l];
    float* dweight = gradient(m, products[p].weight, l);
    int64_t N = run_rows(r);
    int C = products[p].in * m->dims.C, OC = products[p].out * m->dims.C;
    if (!r.fp8) {
        matmul_backward(dinp, dweight, r.first, dbias, dout, product_input(y, p, false),
                        weight(m, products[p].weight, l), p == FCPROJ ? y->fch : NULL, N, C, OC);
        return;
    }
    Fp8Matrix dout8 = fp8_gradient(m, p, l, N);
    const floatX* pre = p == FC ? y->fch : NULL;
    fp8_amax(dout8.scale, dout, pre, N * OC);
    fp8_quantize(dout8, dbias, dout, pre, N, OC, true);
    fp8_matmul_backward(dinp, dweight, r.first, dout8, fp8_input(m, p, l), fp8_weight(m, p, l), N, C, OC);
}

// What a layer's attention runs over in this process.
struct AttentionRows {
    Attention kind;
    bool exchange;     // tokens for heads, and back
    int64_t T, span;   // tokens of each sequence, and how many of them attention runs over at once
    int64_t t0;        // position of the first
    int heads, D;
};
static AttentionRows attention_rows(const Model* m, int l, Run r) {
    Attention kind = layer_attention(m, l, r.phase);
    bool exchange = exchanges_tokens(m, kind, r);
    int W = procs.cp, D = m->dims.C / m->dims.NH;
    int64_t span = kind == WINDOW ? r.window : r.T;
    if (exchange) return {kind, true, r.T, span, 0, m->dims.NH / W, D};
    return {kind, false, r.T / W, span, first_token(r), m->dims.NH, D};
}

// The forward pass of block l, from layer[l].x to x_next. With again, only what the backward pass needs and the
// recompute level did not keep: the same operations on the same numbers, so the same bits.
static void block_forward(Model* m, int l, Run r, floatX* x_next, bool again) {
    const Dims* d = &m->dims;
    int C = d->C, level = layer_level(m, r, l);
    int64_t N = run_rows(r);
    LayerActs* y = &m->acts.layer[l];
    AttentionRows at = attention_rows(m, l, r);
    limit_lead();
    #define NEEDED(from) (!again || level >= (from))
    if (NEEDED(AGAIN_NORMS))
        layernorm_forward(y->ln1, y->ln1_mean, y->ln1_rstd, y->x, weight(m, LN1W, l), weight(m, LN1B, l), N, C);
    product_forward(m, l, QKV, r, NEEDED(AGAIN_PRODUCTS) ? y->qkv : NULL, NULL, again);
    if (NEEDED(AGAIN_PRODUCTS)) {
        if (at.exchange) rows_to_heads(y->qkv, y->qkv, y->gelu, r.B, r.T, 3, C);
        if (d->rope && at.kind != LIGHTHOUSE) rope_rotate(y->qkv, m->rope, +1, r.B, at.T, at.heads, at.D, at.t0);
    }
    if (at.kind == LIGHTHOUSE) lighthouse_forward(m, y, r, again, NEEDED(AGAIN_NORMS));
    else if (at.kind == CAUSAL)
        causal_lighthouse_forward(m, y, r, again, NEEDED(AGAIN_NORMS), NEEDED(AGAIN_ATTENTION));
    else if (NEEDED(AGAIN_ATTENTION)) each_window(r.B, at.T, at.span, [&](int64_t row, int sequences, int64_t length) {
        int64_t i = row * at.heads * at.D;
        sdpa_forward(y->att_heads + i, y->stats + row * at.heads, y->qkv + 3 * i, sequences, length, at.heads, at.D);
    });
    if (NEEDED(AGAIN_NORMS) && at.exchange) heads_to_rows(y->att, y->att_heads, y->gelu, r.B, r.T, 1, C);
    product_forward(m, l, ATTPROJ, r, NEEDED(AGAIN_PRODUCTS) ? y->x2 : NULL, y->x, again);
    if (NEEDED(AGAIN_NORMS))
        layernorm_forward(y->ln2, y->ln2_mean, y->ln2_rstd, y->x2, weight(m, LN2W, l), weight(m, LN2B, l), N, C);
    product_forward(m, l, FC, r, NEEDED(AGAIN_PRODUCTS) ? y->fch : NULL, NULL, again);
    if (NEEDED(AGAIN_GELU) && !r.fp8) gelu_forward(y->gelu, y->fch, N * 4 * C);
    product_forward(m, l, FCPROJ, r, x_next, y->x2, again);
    #undef NEEDED
}

// dres comes in as the gradient of the block's output and leaves as that of its input. The gradient of the bias of a
// product into the residual stream is the sums of dres, which LayerNorm's backward makes while it writes dres.
static void block_backward(Model* m, int l, Run r) {
    const Dims* d = &m->dims;
    int64_t N = run_rows(r);
    int C = d->C;
    Activations* a = &m->acts;
    LayerActs* y = &a->layer[l];
    AttentionRows at = attention_rows(m, l, r);
    bool lighthouse = at.kind == LIGHTHOUSE;
    limit_lead();
    if (layer_level(m, r, l) > 0 || lighthouse) block_forward(m, l, r, NULL, true);

    product_backward(m, l, FCPROJ, r, a->dwide, NULL, a->dres);
    product_backward(m, l, FC, r, a->dbtc, gradient(m, FCB, l), a->dwide);
    layernorm_backward(a->dres, gradient(m, LN2W, l), gradient(m, LN2B, l), gradient(m, ATTPROJB, l), a->dbtc, y->x2,
                       weight(m, LN2W, l), y->ln2_mean, y->ln2_rstd, N, C);

    product_backward(m, l, ATTPROJ, r, a->dbtc, NULL, a->dres);
    floatX* dqkv = a->dwide;
    if (at.exchange) rows_to_heads(a->dbtc, a->dbtc, y->gelu, r.B, r.T, 1, C);
    if (lighthouse) lighthouse_backward(m, y, r, dqkv, a->dbtc);
    else {
        if (at.kind == CAUSAL) causal_lighthouse_backward(m, y, r, dqkv, a->dbtc);
        else each_window(r.B, at.T, at.span, [&](int64_t row, int sequences, int64_t length) {
            int64_t i = row * at.heads * at.D;
            sdpa_backward(dqkv + 3 * i, a->dbtc + i, y->qkv + 3 * i, y->att_heads + i, y->stats + row * at.heads,
                          sequences, length, at.heads, at.D);
        });
        if (d->rope) rope_rotate(dqkv, m->rope, -1, r.B, at.T, at.heads, at.D, at.t0);
    }
    if (at.exchange) heads_to_rows(dqkv, dqkv, y->gelu, r.B, r.T, 3, C);
    product_backward(m, l, QKV, r, a->dbtc, gradient(m, QKVB, l), dqkv);
    layernorm_backward(a->dres, gradient(m, LN1W, l), gradient(m, LN1B, l), l > 0 ? gradient(m, FCPROJB, l - 1) : NULL,
                       a->dbtc, y->x, weight(m, LN1W, l), y->ln1_mean, y->ln1_rstd, N, C);
}

// From tokens to the final LayerNorm's output.
static void model_trunk(Model* m, const int* host_tokens /*(B, T/W)*/, Run r) {
    const Dims* d = &m->dims;
    int64_t N = run_rows(r);
    m->arena.used = 0;
    activations_layout(&m->acts, &m->arena, m, r);
    if (r.fp8)  // the weights' scales stay
        device_zero(m->fp8_scales + d->L * PRODUCTS, 2 * d->L * PRODUCTS * sizeof(Fp8Scale));
    copy_to_device_async(m->tokens, host_tokens, N * sizeof(int));
    Activations* a = &m->acts;
    encoder_forward(a->layer[0].x, m->tokens, weight(m, WTE, 0), d->rope ? NULL : weight(m, WPE, 0), r.B,
                    r.T / procs.cp, d->C, first_token(r));
    for (int l = 0; l < d->L; l++) block_forward(m, l, r, l + 1 < d->L ? a->layer[l + 1].x : a->x_final, false);
    layernorm_forward(a->lnf, a->lnf_mean, a->lnf_rstd, a->x_final, weight(m, LNFW, 0), weight(m, LNFB, 0), N, d->C);
}

// The head and its cross-entropy, chunk by chunk; with r.train the gradients too, in the same pass, each row's loss
// with the weight dloss. Leaves the gradient of lnf in dbtc. Adds the loss of the rows with a target >= 0 to the sum.
static void model_head(Model* m, const int* host_targets /*(B, T/W)*/, Run r, float dloss) {
    const Dims* d = &m->dims;
    Activations* a = &m->acts;
    int64_t N = run_rows(r), chunk = head_rows(m, N);
    copy_to_device_async(m->targets, host_targets, N * sizeof(int));
    for (int64_t i = 0; i < N; i += chunk) {
        int64_t rows = std::min(N - i, chunk);
        floatX* x = a->lnf + i * d->C;
        matmul_forward(a->logits, x, weight(m, WTE, 0), NULL, NULL, rows, d->C, d->Vp);
        crossentropy_forward_backward(a->logits, a->losses + i, m->targets + i, dloss, rows, d->V, d->Vp, r.train);
        if (r.train)
            matmul_backward(a->dbtc + i * d->C, gradient(m, WTE, 0), r.first && i == 0, NULL, a->logits, x,
                            weight(m, WTE, 0), NULL, rows, d->C, d->Vp);
    }
    sum_losses(m->sums + LOSS_SUM, a->losses, N);
}

// In the last micro-step the gradients of this many layers are summed at once, beside the backward pass of those below.
// Each time costs the pass more than it hides on fast links, since a sum holds SMs, also while it waits for a slower
// GPU. Few large sums cost nearly nothing and still hide most of a slow link (measured: dev/EXPERIMENTS.md). Parameters
// are gathered as many at once: of many ranks each call has to go round.
static const int LAYERS_AT_ONCE = 10;

static void model_backward(Model* m, Run r) {
    const Dims* d = &m->dims;
    Activations* a = &m->acts;
    int64_t N = run_rows(r);
    device_zero(a->dres, N * d->C * sizeof(floatX));
    layernorm_backward(a->dres, gradient(m, LNFW, 0), gradient(m, LNFB, 0), gradient(m, FCPROJB, d->L - 1), a->dbtc,
                       a->x_final, weight(m, LNFW, 0), a->lnf_mean, a->lnf_rstd, N, d->C);
    for (int l = d->L - 1, pending = 0; l >= 0; l--) {
        block_backward(m, l, r);
        if (!r.last || (++pending < LAYERS_AT_ONCE && l > 0)) continue;
        reduce_scatter_start(m->grads + unit_begin(m, 1 + l), pending, unit_size(m, 1 + l));
        pending = 0;
    }
    encoder_backward(gradient(m, WTE, 0), d->rope ? NULL : gradient(m, WPE, 0), a->dres, m->tokens, r.B,
                     r.T / procs.cp, d->C, first_token(r), d->Vp);
    if (r.last) reduce_scatter_start(m->grads, 1, unit_size(m, 0));
}

// Before a step's first micro-step: zeros for the gradients that are added to. Those of the other matrices are written
// by the first micro-step, which saves a pass over them to clear and one to read.
static void begin_gradients(Model* m) {
    for (int u = 0; u <= m->dims.L; u++) {
        int64_t vectors = unit_begin(m, u) + m->unit_matrices[u > 0];
        device_zero(m->grads + vectors, (unit_begin(m, u + 1) - vectors) * sizeof(float));
    }
    if (!m->dims.rope) device_zero(gradient(m, WPE, 0), m->size[WPE] * sizeof(float));
}

// One micro-step: adds sum(loss) to the sum of losses and the gradients of sum(loss) * dloss to grads. On a GPU the
// work is only queued; the batch may be refilled when its event has passed.
static void model_micro_step(Model* m, Batch* b, Run r, float dloss) {
    model_trunk(m, b->tokens, r);
    model_head(m, b->targets, r, dloss);
    event_record(&b->copied);
    model_backward(m, r);
}

// Logits of token t of sequence b of the last trunk, to the host memory (V) of all processes that share the sequence.
static void model_logits(Model* m, int64_t b, int64_t t, Run r, float* host) {
    const Dims* d = &m->dims;
    int64_t rows = r.T / procs.cp, owner = t / rows;
    if (procs.cp_rank == owner) {
        std::vector<floatX> row(d->Vp);
        matmul_forward(m->acts.logits, m->acts.lnf + (b * rows + t % rows) * d->C, weight(m, WTE, 0), NULL, NULL, 1,
                       d->C, d->Vp);
        copy_to_host(row.data(), m->acts.logits, d->Vp * sizeof(floatX));
        for (int v = 0; v < d->V; v++) host[v] = (float)row[v];
    }
    if (procs.cp > 1) broadcast(host, d->V * sizeof(float), CP_GROUP, (int)owner);
}

// What attention computes of a sequence in such a layer: twice the pairs of a query and a key, diagonals aside.
static double attention_square(Attention kind, const Model* m, int64_t window, int64_t T) {
    const LighthouseShape* s = &m->shape;
    double square = kind == DENSE ? (double)T * T : kind == LIGHTHOUSE ? (double)s->S * s->S : 0;
    if (kind == CAUSAL)  // each tile's own tokens; and, of the earlier ones, twice the slots
        square = (double)T * (T / s->tiles) + (double)T * leaf_shape(s).tile_slots * (s->tiles - 1);
    if (kind == WINDOW) each_window(1, T, window, [&](int64_t, int n, int64_t w) { square += (double)n * w * w; });
    return square;
}

// Floating-point operations of a step over `tokens` tokens, forward and backward (twice the forward), nothing
// recomputed: the matrices, and the causal half of the attention squares.
static double step_flops(const Model* m, Phase phase, int64_t window, int64_t T, double tokens) {
    const Dims* d = &m->dims;
    double matrices = (double)d->Vp * d->C + 12.0 * d->L * d->C * d->C, attention = 0;
    for (int l = 0; l < d->L; l++) attention += attention_square(layer_attention(m, l, phase), m, window, T) * d->C;
    return 6 * matrices * tokens + 6 * attention * (tokens / T);
}

// ---- the memory plan: everything that the run will ever take, in every phase, before anything is taken

struct Plan {
    const char* name[16];
    size_t bytes[16], total;
    int parts, recompute;  // Run's
};

static void plan_add(Plan* p, const char* name, size_t bytes) {
    if (bytes == 0) return;
    p->name[p->parts] = name;
    p->bytes[p->parts++] = bytes;
    p->total += bytes;
}

// With --steps 0 a model that is a file is evaluated: nothing is trained, so training takes nothing and leaves nothing.
static bool evaluates_only(const Config* c) { return c->steps == 0 && !find_descriptor(c->model); }

// Every kind of pass of the run.
static std::vector<Run> run_passes(const Model* m, const Config* c, int64_t sample_T, int recompute, int B) {
    std::vector<Run> passes;
    auto add = [&](Phase phase, int64_t window, bool train) {
        passes.push_back({B, c->seq_len, phase, window, train, train ? recompute : 0, train && c->fp8});
    };
    for (int i = 0; i < m->windows; i++)
        for (bool train : {true, false}) add(FIRST_PHASE, m->window[i], train);
    if (!evaluates_only(c) && !m->never_dense) add(DENSE_PHASE, 0, true);
    add(DENSE_PHASE, 0, false);
    if (sample_T) passes.push_back({1, sample_T, DENSE_PHASE, 0, false, 0});
    return passes;
}

static Plan memory_plan(const Model* m, const Config* c, int64_t sample_T, int recompute, int B) {
    Plan p = {{}, {}, 0, 0, recompute};
    int64_t C = m->dims.C, L = m->dims.L, D = C / m->dims.NH, batch = B * c->seq_len / procs.cp;
    plan_add(&p, "parameters", m->padded * floatx_bytes);
    if (floatx_bytes != sizeof(float)) plan_add(&p, "fp32 masters", m->owned * sizeof(float));
    if (!evaluates_only(c)) {
        plan_add(&p, "gradients", m->padded * sizeof(float));
        plan_add(&p, "AdamW moments", 2 * m->owned * sizeof(float));
    }
    if (m->dims.rope) plan_add(&p, "rotary table", (1024 + ceil_div(c->seq_len, 1024)) * (D / 2) * 2 * sizeof(float));
    if (c->fp8) {
        plan_add(&p, "FP8 weights", 2 * L * 12 * C * C + 3 * L * PRODUCTS * sizeof(Fp8Scale));
        plan_add(&p, "FP8 operands", 2 * batch * 4 * C);
    }
    plan_add(&p, "tokens", 2 * batch * sizeof(int) + 2 * sizeof(double));
    size_t activations = 0, operations = 0, attention = 0;
    for (Run r : run_passes(m, c, sample_T, recompute, B)) {
        activations = std::max(activations, activations_bytes(m, r));
        operations = std::max(operations, operations_bytes(run_rows(r), C));
        for (int l = 0; l < L; l++) {  // on a GPU this builds cuDNN's plans
            AttentionRows at = attention_rows(m, l, r);
            if (at.kind == CAUSAL) {
                attention = std::max(attention, (size_t)causal_prepare(r.B, &m->shape, r.train));
                continue;
            }
            if (at.kind == LIGHTHOUSE) at = {LIGHTHOUSE, false, m->shape.S, m->shape.S, 0, m->shape.H, (int)D};
            each_window(r.B, at.T, at.span, [&](int64_t, int n, int64_t length) {
                attention = std::max(attention, (size_t)sdpa_prepare(n, length, at.heads, at.D, true, r.train));
            });
        }
    }
    plan_add(&p, "activations", activations);
    plan_add(&p, "operations", operations);
    plan_add(&p, "attention workspace", attention);
    return p;
}

static size_t plan_part(const Plan* p, const char* name) {
    for (int i = 0; i < p->parts; i++) if (!strcmp(p->name[i], name)) return p->bytes[i];
    return 0;
}

// Takes the parts of the plan, which the model's pointers divide.
static void model_allocate(Model* m, const Config* c, const Plan* p) {
    auto part = [&](const char* name) { return plan_part(p, name) ? device_alloc(plan_part(p, name)) : NULL; };
    m->params = (floatX*)part("parameters");
    m->master = (float*)part("fp32 masters");
    m->grads = (float*)part("gradients");
    m->m = (float*)part("AdamW moments");
    if (m->m) m->v = m->m + m->owned;
    m->rope = (float*)part("rotary table");
    if (m->rope) {
        std::vector<float> table(plan_part(p, "rotary table") / sizeof(float));
        rope_table(table.data(), c->seq_len, m->dims.C / m->dims.NH, m->dims.theta);
        copy_to_device(m->rope, table.data(), table.size() * sizeof(float));
    }
    m->fp8_weights = (fp8_t*)part("FP8 weights");
    if (c->fp8) m->fp8_scales = (Fp8Scale*)(m->fp8_weights + (int64_t)2 * m->dims.L * 12 * m->dims.C * m->dims.C);
    m->fp8_operand = (fp8_t*)part("FP8 operands");
    int64_t batch = c->batch_size * c->seq_len / procs.cp;
    m->tokens = (int*)part("tokens");
    m->targets = m->tokens + batch;
    m->sums = (double*)(m->targets + batch);
    for (Batch& b : m->batch) {
        b.tokens = (int*)host_alloc_pinned(2 * batch * sizeof(int));
        b.targets = b.tokens + batch;
    }
    m->arena.size = plan_part(p, "activations");
    m->arena.base = (char*)device_alloc(m->arena.size);
    operations_allocate(plan_part(p, "operations"), plan_part(p, "attention workspace"));
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
    // wsd: 1 - sqrt over the last steps (arXiv 2405.18392), none of which is in the warmup
    int64_t decay = std::min((int64_t)(c->decay_frac * steps), rest);
    if (decay == 0 || step < steps - decay) return peak;
    return final + (peak - final) * (1 - sqrt((double)(step - (steps - decay)) / decay));
}

// The last values of a quantity, to tell how far out a new one lies.
static const int DETECTOR_VALUES = 128;
struct Detector {
    double values[DETECTOR_VALUES];
    int64_t seen;
};

// The z-score of x against the last values, 0 until there are enough; then x joins them.
static double detector_score(Detector* d, double x) {
    double z = 0;
    if (d->seen >= DETECTOR_VALUES) {
        double mean = 0, var = 0;
        for (int i = 0; i < DETECTOR_VALUES; i++) mean += d->values[i] / DETECTOR_VALUES;
        for (int i = 0; i < DETECTOR_VALUES; i++)
            var += (d->values[i] - mean) * (d->values[i] - mean) / DETECTOR_VALUES;
        z = (x - mean) / sqrt(std::max(var, 1e-24));
    }
    if (isfinite(x)) d->values[d->seen++ % DETECTOR_VALUES] = x;
    return z;
}

// Adds the squares of the gradient to the step's sums: those of this process's slices, for one process all in one.
static void add_gradient_squares(Model* m) {
    if (procs.world == 1) {
        sum_squares(m->sums + NORM_SUM, m->grads, m->padded);
        return;
    }
    for (int u = 0; u <= m->dims.L; u++)
        sum_squares(m->sums + NORM_SUM, m->grads + slice_begin(m, u), slice_size(m, u));
}

// One AdamW update of this process's slices, whose weights then go to all; `update` counts from 1. Weight decay falls
// on the matrices only.
static void model_update(Model* m, const Config* c, double lr, double grad_scale, int64_t update) {
    AdamW adamw = {(float)lr, (float)c->beta1, (float)c->beta2, (float)(1 - pow(c->beta1, update)),
                   (float)(1 - pow(c->beta2, update)), (float)c->adam_eps, 0, (float)grad_scale};
    for (int u = 0; u <= m->dims.L; u++) {
        int64_t begin = slice_begin(m, u), owned = slice_owned(m, u), n = slice_size(m, u);
        int64_t vectors = unit_begin(m, u) + m->unit_matrices[u > 0];  // where they begin
        int64_t matrices = std::min(std::max<int64_t>(vectors - begin, 0), n);
        const struct { int64_t at, n; double decay; } parts[] = {{0, matrices, c->weight_decay},
                                                                 {matrices, n - matrices, 0}};
        for (auto& p : parts) {
            if (p.n == 0) continue;
            float* master = m->master ? m->master + owned + p.at : NULL;
            adamw.weight_decay = (float)p.decay;
            adamw_update(m->params + begin + p.at, master, m->m + owned + p.at, m->v + owned + p.at,
                         m->grads + begin + p.at, p.n, adamw);
        }
        if (u % LAYERS_AT_ONCE != 0 && u < m->dims.L) continue;
        int first = u > 0 ? u - (u - 1) % LAYERS_AT_ONCE : 0;  // the embeddings go alone
        gather_params(m, first, u - first + 1);
    }
    collectives_join();
}

// ===================================================================================================================
// 9. Checkpoints. Two kinds of file:
// - a model file, llm.c's: 256 int32 header, then the tensors in the order of enum Tensor. Versions 3 (fp32) and 5
//   (bf16); RoPE models have 103 and 105, no WPE, and the bits of theta in header[8]. header[9] is the step. Where
//   llm.c has zeros, header[10] and [11] are the checksum of the sums of each 16 MiB of the weights.
// - a checkpoint, the state of a run: header (4096 bytes) | RunState | checksum of each 16 MiB of the body | body. The
//   body is the fp32 weights, first and second moments, each in the order of a model file.
// All processes write their slices into one file, and read them from it, at once. A place in the body is a parameter's,
// not a process's, and a checksum is a sum over elements, so the same state makes the same file on any number of
// processes, and any number of processes reads it.
// Files are written beside, fsynced, read back by other processes than their writers, and renamed: a file with its
// final name is whole unless the disk fails later.

static const int CHECKPOINT_MAGIC = 20260511, CHECKPOINT_VERSION = 3, MODEL_MAGIC = 20240326;
static const int64_t CHUNK = PART * sizeof(float);

// Skipping steps whose loss or gradient norm is not finite helps against data that makes them so. After so many in a
// row it is the weights, which no step changes any more.
static const int NOT_FINITE_LIMIT = 10;

struct RunState {
    int64_t step, sequences, updates;  // done so far; sequences is the position in the data
    double train_s, wall_s;            // seconds inside training steps; and of everything
    int64_t phase_steps[2];
    double phase_s[2];
    Detector loss, norm;
    int64_t seq_len, total_batch, epoch, seed, shuffle;  // what must not change in a resume; an epoch's sequences
    uint64_t data;                                       // loader_fingerprint
    int64_t not_finite;  // steps in a row, up to now, whose loss or gradient norm was not
};

struct CheckpointHeader {
    int32_t magic, version;
    char unused[1016];
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

// The three parts of a checkpoint's body; a model file has the first only.
enum Section { WEIGHTS, FIRST_MOMENT, SECOND_MOMENT, SECTIONS };

static int64_t body_bytes(const Model* m, int sections) { return sections * m->parameters * sizeof(float); }
static int64_t checkpoint_bytes(const Model* m) {
    int64_t body = body_bytes(m, SECTIONS);
    return ceil_div(sizeof(CheckpointHeader) + sizeof(RunState) + ceil_div(body, CHUNK) * 8, 4096) * 4096 + body;
}

static void model_header(int32_t* h, const Dims* d, int64_t step) {
    memset(h, 0, 256 * sizeof(int32_t));
    h[0] = MODEL_MAGIC; h[1] = d->rope ? 103 : 3;
    h[2] = (int32_t)d->maxT; h[3] = d->V; h[4] = d->L; h[5] = d->NH; h[6] = d->C; h[7] = d->Vp;
    if (d->rope) memcpy(&h[8], &d->theta, sizeof(float));
    h[9] = (int32_t)step;
}

static CheckpointHeader checkpoint_header(const Model* m, int64_t step) {
    CheckpointHeader h;
    memset(&h, 0, sizeof h);
    h.magic = CHECKPOINT_MAGIC; h.version = CHECKPOINT_VERSION;
    model_header(h.model, &m->dims, step);
    int64_t body = body_bytes(m, SECTIONS);
    h.parameters = m->parameters;
    h.file_bytes = checkpoint_bytes(m);
    h.weights_offset = h.file_bytes - body;
    h.state_bytes = sizeof(RunState);
    h.chunks = ceil_div(body, CHUNK);
    return h;
}

// The sizes in a model file's header, each bounded, so that no product of them overflows. Returns "" or what is wrong.
static std::string model_dims(const int32_t* h, const char* path, Dims* d, bool* bf16) {
    if (h[0] != MODEL_MAGIC || (h[1] != 3 && h[1] != 5 && h[1] != 103 && h[1] != 105))
        return text("%s is no model file or checkpoint: magic %d, version %d; expected %d and version 3, 5, 103 or 105",
                    path, h[0], h[1], MODEL_MAGIC);
    *bf16 = h[1] % 100 == 5;
    *d = {h[2], h[3], h[7], h[4], h[5], h[6], h[1] > 100, 0};
    if (d->rope) memcpy(&d->theta, &h[8], sizeof(float));
    if (d->maxT < 1 || d->maxT > MAX_SEQ_LEN || d->V < 1 || d->V > MAX_VOCAB || d->Vp < d->V || d->Vp > 2 * MAX_VOCAB ||
        d->L < 1 || d->L > MAX_LAYERS || d->NH < 1 || d->C < 1 || d->C > MAX_CHANNELS || d->C % d->NH)
        return text("%s: impossible sizes in the header: T %ld, V %d, padded %d, layers %d, heads %d, channels %d",
                    path, d->maxT, d->V, d->Vp, d->L, d->NH, d->C);
    if (d->rope && (d->C / d->NH % 2 || !(d->theta >= 1 && d->theta <= 1e12)))
        return text("%s: rotary positions in heads of %d channels with a base of %g; they need an even head size and a "
                    "base of 1 to 1e12", path, d->C / d->NH, d->theta);
    return "";
}

static std::string dims_text(Dims d) {
    return text("T %ld, V %d, layers %d, heads %d, channels %d, ", d.maxT, d.V, d.L, d.NH, d.C) +
           (d.rope ? text("rope-theta %g", d.theta) : "learned positions");
}

struct ModelFile {  // a model file or checkpoint to read from
    const char* path;
    int fd;
    int32_t header[256];
    CheckpointHeader checkpoint;  // magic 0: it is none
    std::vector<char> front;      // of a checkpoint: RunState, the checksums
    Dims dims;
    bool bf16;                    // 2-byte weights
    int64_t body;                 // where they begin
};

// Opens a file and reads and checks all but its body. Returns "" or what is wrong.
static std::string model_file_open(ModelFile* f, const char* path) {
    int64_t size;
    *f = {path, open_to_read(path, &size)};
    f->body = sizeof f->header;
    if (size < f->body) return text("%s is cut: %ld bytes, less than a header's 1024", path, size);
    read_at(f->fd, f->header, sizeof f->header, 0, path);
    CheckpointHeader* h = &f->checkpoint;
    bool checkpoint = f->header[0] == CHECKPOINT_MAGIC;
    if (checkpoint) {
        std::string why = try_read_at(f->fd, h, sizeof *h, 0, path);
        if (why != "") return why;
        if (h->version != CHECKPOINT_VERSION)
            return text("%s is a checkpoint of version %d; expected %d", path, h->version, CHECKPOINT_VERSION);
        if (h->header_checksum != checksum(h, sizeof *h - 8))
            return text("%s is damaged: wrong checksum of the header", path);
        memcpy(f->header, h->model, sizeof f->header);
        f->body = h->weights_offset;
    }
    std::string why = model_dims(f->header, path, &f->dims, &f->bf16);
    if (why != "") return why;
    Model m;
    model_layout(&m, f->dims);
    CheckpointHeader made = checkpoint_header(&m, f->header[9]);
    int64_t expected = checkpoint ? made.file_bytes : f->body + m.parameters * (f->bf16 ? 2 : 4);
    if (size != expected)
        return text("%s: %ld bytes, but one of its header's sizes has %ld: it is cut, or of another program", path,
                    size, expected);
    if (!checkpoint) return "";
    if (f->bf16 || memcmp(&h->weights_offset, &made.weights_offset, 5 * sizeof(int64_t)))
        return text("%s is damaged: its header contradicts itself", path);
    f->front.resize(h->state_bytes + h->chunks * 8);
    why = try_read_at(f->fd, f->front.data(), f->front.size(), sizeof *h, path);
    if (why == "" && h->state_checksum != checksum(f->front.data(), f->front.size()))
        why = text("%s is damaged: wrong checksum of the run's state", path);
    return why;
}

// Whether a run can have come to this state. What must be as in this run's options is compared with them elsewhere.
static bool state_possible(const RunState* s) {
    for (double t : {s->train_s, s->wall_s, s->phase_s[0], s->phase_s[1]}) if (!(t >= 0 && t < 1e12)) return false;
    for (int64_t n : {s->updates, s->phase_steps[0], s->phase_steps[1]}) if (n < 0 || n > s->step) return false;
    if (s->seq_len < 1 || s->seq_len > MAX_SEQ_LEN || s->total_batch < s->seq_len || s->total_batch > (int64_t)1e12 ||
        s->loss.seen < 0 || s->norm.seen < 0 || s->not_finite < 0 || s->not_finite >= NOT_FINITE_LIMIT) return false;
    return s->step <= (int64_t)1e12 && s->phase_steps[0] + s->phase_steps[1] == s->step &&
           (double)s->sequences == (double)s->step * (s->total_batch / s->seq_len);
}

// Adds 4-byte words of a checkpoint's body, from its byte `at` on, to the sums of their chunks. Any change of one word
// changes its term, since mix64 is a bijection, and so the sum.
static void add_to_sums(uint64_t* sums, const void* data, int64_t at, int64_t bytes) {
    for (int64_t done = 0; done < bytes;) {
        int64_t chunk = (at + done) / CHUNK, part = std::min(bytes - done, (chunk + 1) * CHUNK - (at + done));
        const uint32_t* words = (const uint32_t*)((const char*)data + done);
        uint64_t place = (at + done) % CHUNK / 4, sum = 0;
        #pragma omp parallel for reduction(+ : sum)
        for (int64_t i = 0; i < part / 4; i++) sum += mix64(words[i] | (place + i) << 32);
        sums[chunk] += sum;
        done += part;
    }
}

// A model file's checksum, of the sums of its weights' chunks; never 0, which stands for none.
static uint64_t model_checksum(const std::vector<uint64_t>& sums) { return checksum(sums.data(), sums.size() * 8) | 1; }

static float* own_section(const Model* m, int section, const Piece& p) {
    return section == WEIGHTS ? own_master(m, p) : (section == FIRST_MOMENT ? m->m : m->v) + p.owned;
}

// Reads the first sections of the body of a file whose sizes are the model's, into the model or, unless keep, only to
// compare them with their checksums, as they lie on the disk: then each process reads what the next one wrote. Weights
// of 2 bytes are the upper halves of floats. Returns "" or what is wrong; all processes return alike.
static std::string body_read(const Model* m, const ModelFile* f, int sections, bool keep) {
    int64_t bytes = body_bytes(m, sections);
    std::vector<uint64_t> sums(ceil_div(bytes, CHUNK));
    std::unique_ptr<float[]> host(new float[PART]);
    std::string why;
    int reader = keep ? procs.rank : (procs.rank + 1) % procs.world;
    if (!keep) posix_fadvise(f->fd, 0, 0, POSIX_FADV_DONTNEED);
    for (int section = 0; section < sections; section++)
        for_parts(m, reader, [&](const Piece& p, int64_t i, int64_t n) {
            int64_t at = section * m->parameters + p.file + i, size = f->bf16 ? 2 : 4;
            if (why == "") why = try_read_at(f->fd, host.get(), n * size, f->body + at * size, f->path);
            if (why != "") return;
            for (int64_t j = f->bf16 ? n - 1 : -1; j >= 0; j--) {  // widen from the end, in place
                uint32_t bits = (uint32_t)((uint16_t*)host.get())[j] << 16;
                memcpy(&host[j], &bits, 4);
            }
            add_to_sums(sums.data(), host.get(), at * sizeof(float), n * sizeof(float));
            if (!keep) return;
            if (section == WEIGHTS) set_weights(m, p, i, host.get(), n);
            else copy_to_device(own_section(m, section, p) + i, host.get(), n * sizeof(float));
        });
    if (f->checkpoint.magic && procs.rank == 0 && why == "") {  // the last chunk may go on behind the sections
        int64_t after = std::min<int64_t>(sums.size() * CHUNK, f->checkpoint.file_bytes - f->body) - bytes;
        why = try_read_at(f->fd, host.get(), after, f->body + bytes, f->path);
        add_to_sums(sums.data(), host.get(), bytes, after);
    }
    all_sum(sums.data(), sums.size());
    if (why != "") return why;
    if (!f->checkpoint.magic) {
        uint64_t expected;
        memcpy(&expected, &f->header[10], sizeof expected);
        bool damaged = expected && !f->bf16 && expected != model_checksum(sums);
        return damaged ? text("%s is damaged: wrong checksum of the weights", f->path) : "";
    }
    for (size_t i = 0; i < sums.size(); i++) {
        if (!memcmp(&sums[i], &f->front[sizeof(RunState) + 8 * i], 8)) continue;
        int64_t at = f->body + i * CHUNK;
        return text("%s is damaged: wrong checksum of bytes %ld to %ld", f->path, at,
                    std::min(at + CHUNK, f->checkpoint.file_bytes));
    }
    return "";
}

// Reads the weights of a model file or checkpoint; unless keep, only checks them.
static std::string weights_read(const Model* m, const char* path, bool keep) {
    ModelFile f;
    end_if(model_file_open(&f, path));
    std::string why = body_read(m, &f, 1, keep);
    close(f.fd);
    return why;
}

// A file on its way to its final name, which all processes write to. A network file system's client may write whole
// pages where only parts are its own, if it has read the page or believes that the file ends before it. So the file has
// its size before the others open it, and what it is written through cannot read.
struct NewFile {
    std::string path, partial;
    int fd;
};

// Ends the run with errno: this process's part of the file cannot be written.
[[noreturn]] static void cannot_write(const NewFile* f) {
    int error = errno;
    unlink(f->partial.c_str());
    fatal("cannot write %s: %s. Earlier checkpoints are untouched; make room and resume", f->partial.c_str(),
          strerror(error));
}

static NewFile new_file(const std::string& path, int64_t bytes) {
    writing_file = 1;
    NewFile f = {path, path + ".partial", -1};
    auto opens = [&](int flags) {
        on_disk([&] { f.fd = open(f.partial.c_str(), O_WRONLY | flags, 0666); });
        return f.fd >= 0;
    };
    if (procs.rank == 0 && (!opens(O_CREAT | O_TRUNC) || ftruncate(f.fd, bytes))) cannot_write(&f);
    barrier();  // it has its size
    if (procs.rank > 0 && !opens(0))
        fatal("cannot write %s: %s. Rank 0 has made it: is this a folder that all hosts share?", f.partial.c_str(),
              strerror(errno));
    return f;
}

static void new_file_write(const NewFile* f, const void* data, size_t bytes, int64_t offset) {
    if (!write_at(f->fd, data, bytes, offset)) cannot_write(f);
}

// Gives the file its name when every process's part is on the disk, and check() has read it back and found nothing to
// say against it.
template <typename Check> static void new_file_finish(const NewFile* f, Check check) {
    bool failed = false;
    on_disk([&] {
        failed = fsync(f->fd) != 0;
        failed |= close(f->fd) != 0;
    });
    if (failed) cannot_write(f);
    barrier();
    std::string why = check();
    if (why != "")
        fatal("%s, though it was just written. Earlier checkpoints are untouched: look at the disk", why.c_str());
    if (procs.rank == 0)
        on_disk([&] {
            failed = rename(f->partial.c_str(), f->path.c_str()) != 0;
            int fd = failed ? -1 : open((folder_of(f->path) + ".").c_str(), O_RDONLY);
            failed |= fd < 0 || (fsync(fd) && errno != EINVAL);  // which not every file system can
            if (fd >= 0) close(fd);
        });
    if (failed) fatal("finishing %s: %s. Earlier checkpoints are untouched", f->path.c_str(), strerror(errno));
    barrier();  // it has its name
    writing_file = 0;
}

// Writes this process's pieces of the first sections into a file whose body begins at byte body. Returns the sums of
// the whole body's chunks.
static std::vector<uint64_t> body_write(const Model* m, const NewFile* f, int sections, int64_t body) {
    std::unique_ptr<float[]> host(new float[PART]);
    std::vector<uint64_t> sums(ceil_div(body_bytes(m, sections), CHUNK));
    for (int section = 0; section < sections; section++)
        for_parts(m, procs.rank, [&](const Piece& p, int64_t i, int64_t n) {
            int64_t at = section * m->parameters + p.file + i;
            copy_to_host(host.get(), own_section(m, section, p) + i, n * sizeof(float));
            add_to_sums(sums.data(), host.get(), at * sizeof(float), n * sizeof(float));
            new_file_write(f, host.get(), n * sizeof(float), body + at * sizeof(float));
        });
    all_sum(sums.data(), sums.size());
    return sums;
}

// The plain dense model file: what llm.c and scripts/export_hf read.
static void model_write(const Model* m, const std::string& path, int64_t step) {
    int32_t header[256];
    model_header(header, &m->dims, step);
    NewFile f = new_file(path, sizeof header + body_bytes(m, 1));
    uint64_t sum = model_checksum(body_write(m, &f, 1, sizeof header));
    memcpy(&header[10], &sum, sizeof sum);
    if (procs.rank == 0) new_file_write(&f, header, sizeof header, 0);
    new_file_finish(&f, [&] { return weights_read(m, f.partial.c_str(), false); });
}

// Reads a checkpoint into the model and the state; without a state, only compares it with its checksums. Returns "", or
// a sentence on why the file cannot be used, with nothing of the state changed; the weights may then be partly
// overwritten. All processes return alike.
static std::string checkpoint_read(const Model* m, const char* path, RunState* state) {
    ModelFile f;
    std::string why = model_file_open(&f, path);
    if (why == "" && !f.checkpoint.magic) why = text("%s is no checkpoint but a model file", path);
    if (why == "") {
        int32_t want[256];
        model_header(want, &m->dims, f.header[9]);
        if (memcmp(want, f.header, sizeof want))
            fatal("%s holds another model: %s; this run's has %s: use the same options, or --model %s in another "
                  "out-dir to start from its weights", path, dims_text(f.dims).c_str(), dims_text(m->dims).c_str(),
                  path);
        const RunState* s = (RunState*)f.front.data();
        if (!state_possible(s) || (int32_t)s->step != f.header[9])
            why = text("%s is damaged: no run comes to its state", path);
    }
    if (all_sum((double)(why != "")) == 0) why = body_read(m, &f, SECTIONS, state != NULL);
    else if (why == "") why = text("%s cannot be used by all processes", path);
    if (why == "" && state) memcpy(state, f.front.data(), sizeof(RunState));
    close(f.fd);
    return why;
}

static void checkpoint_write(const Model* m, const std::string& path, const RunState* state) {
    CheckpointHeader h = checkpoint_header(m, state->step);
    NewFile f = new_file(path, h.file_bytes);
    std::vector<uint64_t> sums = body_write(m, &f, SECTIONS, h.weights_offset);
    std::vector<char> front(sizeof(RunState) + h.chunks * 8);
    memcpy(front.data(), state, sizeof(RunState));
    memcpy(front.data() + sizeof(RunState), sums.data(), h.chunks * 8);
    h.state_checksum = checksum(front.data(), front.size());
    h.header_checksum = checksum(&h, sizeof h - 8);
    if (procs.rank == 0) {
        new_file_write(&f, front.data(), front.size(), sizeof h);
        new_file_write(&f, &h, sizeof h, 0);
    }
    new_file_finish(&f, [&] { return checkpoint_read(m, f.partial.c_str(), NULL); });
}

// Calls use(name) for each name in a directory; one that is not there has none.
template <typename Use> static void for_names(const char* dir, Use use) {
    std::error_code error;
    std::filesystem::directory_iterator at(dir, error), end;
    for (; !error && at != end; at.increment(error)) use(at->path().filename().string());
    if (error && error != std::errc::no_such_file_or_directory)  // no list of a part: it would read as a new run
        fatal("cannot list %s: %s", dir, error.message().c_str());
}

static std::string checkpoint_path(const Config* c, int64_t step) {
    return text("%s/ckpt_%08ld.bin", c->out_dir, step);
}

// Steps of the checkpoints in out-dir, newest first.
static std::vector<int64_t> checkpoint_list(const Config* c) {
    std::vector<int64_t> steps;
    for_names(c->out_dir, [&](const std::string& name) {
        int64_t step;
        if (sscanf(name.c_str(), "ckpt_%ld.bin", &step) != 1 || step < 0) return;
        if (c->out_dir + ("/" + name) == checkpoint_path(c, step)) steps.push_back(step);
    });
    std::sort(steps.begin(), steps.end(), std::greater<int64_t>());
    return steps;
}

static void remove_file(const std::string& path) {
    bool failed = false;
    on_disk([&] { failed = unlink(path.c_str()) != 0; });
    if (failed && errno != ENOENT) say("warning: cannot remove %s: %s\n", path.c_str(), strerror(errno));
}

// Removes the checkpoints that --keep-last and --keep-every do not keep, and those that a killed process left
// half-written. While steps are not finite the weights may be lost: nothing older makes room for them.
static void checkpoint_prune(const Config* c, const RunState* s) {
    if (procs.rank || s->not_finite) return;
    std::vector<int64_t> steps = checkpoint_list(c);
    for (size_t i = c->keep_last; c->keep_last > 0 && i < steps.size(); i++)
        if (!c->keep_every || steps[i] % c->keep_every) remove_file(checkpoint_path(c, steps[i]));
    for_names(c->out_dir, [&](const std::string& name) {
        if (!fnmatch("ckpt_*.partial", name.c_str(), 0)) remove_file(c->out_dir + ("/" + name));
    });
}

// The newest whole checkpoint of out-dir, into the model and the state. Names and passes over damaged ones, which are
// then renamed: --keep-last counts whole ones only.
static bool checkpoint_resume(Model* m, const Config* c, RunState* state, std::string* path) {
    std::vector<int64_t> steps = checkpoint_list(c);
    int count = (int)steps.size(), tried = 0;
    broadcast(&count, sizeof count, WORLD_GROUP, 0);  // what rank 0 sees of the directory counts for all
    steps.resize(count);
    broadcast(steps.data(), count * sizeof(int64_t), WORLD_GROUP, 0);
    if (count == 0) return false;
    for (;; tried++) {
        if (tried == count) fatal("%s: none of the %d checkpoints is whole", c->out_dir, count);
        *path = checkpoint_path(c, steps[tried]);
        std::string why = checkpoint_read(m, path->c_str(), state);
        if (why == "" && state->step != steps[tried]) why = text("%s holds step %ld", path->c_str(), state->step);
        if (why == "") break;
        say("warning: %s; trying the one before\n", why.c_str());
    }
    for (int i = 0; i < tried && procs.rank == 0; i++) {
        std::string from = checkpoint_path(c, steps[i]);
        if (rename(from.c_str(), (from + ".unusable").c_str()))
            fatal("cannot rename %s, which is unusable: %s", from.c_str(), strerror(errno));
    }
    gather_all_params(m);
    return true;
}

// ===================================================================================================================
// 10. Evaluation and sampling; logs and progress.

// Mean losses over the validation data: of all tokens, and of those at positions [2^i, 2^(i+1)) of their sequence,
// position 0 with the first.
static const int POSITION_BUCKETS = 31;
struct Losses {
    double all, bucket[POSITION_BUCKETS];
    int buckets;  // that T reaches
};

// Each data-parallel group takes every dp-th sequence: fill(b, i) puts sequence i in place b of its batch, score(valid)
// takes the trunk's output, of which the first `valid` places count. Returns false if a signal stopped it before the
// end: at long contexts a validation takes minutes.
template <typename Fill, typename Score>
static bool for_batches(Model* m, Run r, int64_t sequences, Fill fill, Score score) {
    Batch* batch = &m->batch[2];
    for (int64_t i = 0; i < sequences; i += r.B * procs.dp) {
        if (stop_asked()) return false;
        event_wait(&batch->copied);
        int64_t valid = 0;
        for (int64_t b = 0; b < r.B; b++) {
            int64_t sequence = i + b * procs.dp + procs.dp_rank;
            fill(b, sequence);
            valid += sequence < sequences;
        }
        if (valid == 0) continue;
        model_trunk(m, batch->tokens, r);
        score(valid);
        event_record(&batch->copied);
    }
    return true;
}

// A batch that is not full has its rest filled with targets of -1, which do not count.
static bool evaluate(Losses* losses, Model* m, const Config* c, const Loader* data, Phase phase, int64_t window) {
    Run r = {(int)c->batch_size, c->seq_len, phase, window, false, 0};
    int64_t B = r.B, rows = c->seq_len / procs.cp;
    int64_t sequences = std::min(c->val_batches * B, data->sequences);  // as on one process
    Batch* batch = &m->batch[2];
    std::vector<float> host(B * rows);
    double sums[POSITION_BUCKETS][2] = {};  // of losses, of tokens
    auto fill = [&](int64_t b, int64_t sequence) {
        loader_sequence(data, sequence % data->sequences, batch->tokens + b * rows, batch->targets + b * rows);
        if (sequence >= sequences) std::fill_n(batch->targets + b * rows, rows, -1);
    };
    auto score = [&](int64_t valid) {
        model_head(m, batch->targets, r, 0);
        copy_to_host(host.data(), m->acts.losses, B * rows * sizeof(float));
        for (int64_t j = 0; j < valid * rows; j++) {
            int bucket = 63 - __builtin_clzll((first_token(r) + j % rows) | 1);
            sums[bucket][0] += host[j];
            sums[bucket][1]++;
        }
    };
    if (!for_batches(m, r, sequences, fill, score)) return false;
    all_sum(&sums[0][0], 2 * POSITION_BUCKETS);
    double loss = 0, tokens = 0;
    for (int i = 0; i < POSITION_BUCKETS; i++) {
        loss += sums[i][0];
        tokens += sums[i][1];
        losses->bucket[i] = sums[i][0] / sums[i][1];
        if (sums[i][1] > 0) losses->buckets = i + 1;
    }
    losses->all = loss / tokens;
    return true;
}

// Copying at a distance, in the validation data: the last n tokens of a sequence repeat the n that stand d earlier. How
// well are they predicted, without the first of them, when nothing can be known yet? Once with the text's own tokens,
// once with ids drawn from all that the sequence holds, which nothing but the copy predicts.
struct Copying {
    int64_t n, skipped, sequences;  // tokens repeated, the first of them left out; sequences of each distance
    struct Distance {
        int64_t tokens;
        double loss[2], right[2];   // text, random: mean loss, share that argmax gets right
    };
    std::vector<Distance> distances;
};

// Adds the loss and the right guesses of rows [row, row + n) of the last trunk's output.
static void score_rows(Model* m, int64_t row, int64_t n, const int* targets /*(n)*/, double* loss, double* right) {
    const Dims* d = &m->dims;
    int64_t at_once = head_rows(m, n);
    std::vector<floatX> logits(at_once * d->Vp);
    std::vector<double> losses(at_once);
    std::vector<char> hit(at_once);
    for (int64_t i = 0; i < n; i += at_once) {
        int64_t rows = std::min(n - i, at_once);
        const floatX* x = m->acts.lnf + (row + i) * d->C;
        matmul_forward(m->acts.logits, x, weight(m, WTE, 0), NULL, NULL, rows, d->C, d->Vp);
        copy_to_host(logits.data(), m->acts.logits, rows * d->Vp * sizeof(floatX));
        #pragma omp parallel for
        for (int64_t j = 0; j < rows; j++) {
            const floatX* x = &logits[j * d->Vp];
            int most = 0, target = targets[i + j];
            double sum = 0;
            for (int v = 1; v < d->V; v++) if ((float)x[v] > (float)x[most]) most = v;
            for (int v = 0; v < d->V; v++) sum += exp((double)((float)x[v] - (float)x[most]));
            losses[j] = log(sum) + (double)((float)x[most] - (float)x[target]);
            hit[j] = most == target;
        }
        for (int64_t j = 0; j < rows; j++) {
            *loss += losses[j];
            *right += hit[j];
        }
    }
}

// Sequence i of the validation data (T), with its end made a copy.
static void copying_sequence(int* tokens, const Loader* data, int64_t i, int64_t n, int64_t distance, bool random) {
    int64_t T = data->T, source = T - n - distance;
    read_sequence(data, i % data->sequences, 0, T, tokens);
    if (random) {
        std::vector<int> ids(tokens, tokens + T);
        std::sort(ids.begin(), ids.end());
        int64_t count = std::unique(ids.begin(), ids.end()) - ids.begin();
        for (int64_t j = 0; j < n; j++) tokens[source + j] = ids[(int64_t)(uniform(0x434F5059 + i, j) * count)];
    }
    memcpy(tokens + T - n, tokens + source, n * sizeof(int));
}

// Under dense attention. n = 256; distances 1K, 4K, 16K, ... and the longest, T - n; for T below 1024 all is shorter.
// Takes no longer than a validation, but at least one batch of each. Returns false if a signal stopped it.
static bool evaluate_copying(Copying* k, Model* m, const Config* c, const Loader* data) {
    Run r = {(int)c->batch_size, c->seq_len, DENSE_PHASE, 0, false, 0};
    int64_t T = c->seq_len, rows = T / procs.cp, t0 = first_token(r);
    k->n = std::min<int64_t>(256, T / 4);
    k->skipped = std::min<int64_t>(16, k->n / 4);
    for (int64_t d = 4 * k->n; d + d / 2 < T - k->n; d *= 4) k->distances.push_back({d});
    k->distances.push_back({T - k->n});
    int64_t batches = std::max<int64_t>(1, c->val_batches / (2 * k->distances.size()));  // as on one process
    k->sequences = std::min(batches * c->batch_size, data->sequences);
    std::vector<int> tokens(r.B * T);
    for (int test = 0; test < 2 * (int)k->distances.size(); test++) {
        Copying::Distance* d = &k->distances[test / 2];
        double sums[2] = {0, 0};
        auto fill = [&](int64_t b, int64_t sequence) {
            copying_sequence(&tokens[b * T], data, sequence, k->n, d->tokens, test % 2);
            memcpy(m->batch[2].tokens + b * rows, &tokens[b * T + t0], rows * sizeof(int));
        };
        // Row t predicts token t + 1. Of the rows that predict the copy, those of this process:
        int64_t from = std::max(T - k->n + k->skipped - 1, t0), to = std::min(T - 1, t0 + rows);
        auto score = [&](int64_t valid) {
            for (int64_t b = 0; b < valid && from < to; b++)
                score_rows(m, b * rows + from - t0, to - from, &tokens[b * T + from + 1], &sums[0], &sums[1]);
        };
        if (!for_batches(m, r, k->sequences, fill, score)) return false;
        all_sum(sums, 2);
        double scored = (double)k->sequences * (k->n - k->skipped);
        d->loss[test % 2] = sums[0] / scored;
        d->right[test % 2] = sums[1] / scored;
    }
    return true;
}

struct Tokenizer {
    int end_of_text;
    std::vector<std::string> token;  // the bytes of each
};

static void tokenizer_read(Tokenizer* k, const char* path, int V) {
    std::string file = read_file(path);
    const int32_t* h = (const int32_t*)file.data();
    if (file.size() < 1024 || h[0] != 20240328 || h[1] != 2)
        fatal("%s is no tokenizer file: magic %d, version %d; expected 20240328, 2", path, file.size() < 8 ? 0 : h[0],
              file.size() < 8 ? 0 : h[1]);
    int count = h[2];
    *k = {h[3], {}};
    if (count < 1 || count > V || k->end_of_text < 0 || k->end_of_text >= count)
        fatal("%s: %d tokens, end of text %d; the model's vocabulary has %d ids", path, count, k->end_of_text, V);
    size_t at = 1024;
    for (int i = 0; i < count; i++) {
        size_t length = at < file.size() ? (uint8_t)file[at] : file.size();
        if (at + 1 + length > file.size()) fatal("%s is cut: it ends inside token %d of %d", path, i, count);
        k->token.push_back(file.substr(at + 1, length));
        at += 1 + length;
    }
}

static int tokenizer_find(const Tokenizer* k, const std::string& bytes) {
    for (int i = 0; i < (int)k->token.size(); i++) if (i != k->end_of_text && k->token[i] == bytes) return i;
    return -1;
}

// Length of the next word as GPT-2 splits text: a run of letters, of digits or of other signs, each with one space
// before it; a contraction; or white space. Bytes above 127 count as letters.
static int word_length(const char* s) {
    auto kind_of = [](unsigned char c) { return isspace(c) ? 0 : isalpha(c) || c & 0x80 ? 1 : isdigit(c) ? 2 : 3; };
    for (const char* end : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (!strncmp(s, end, strlen(end))) return strlen(end);
    int n = s[0] == ' ' && s[1] && kind_of(s[1]) != 0;
    int kind = kind_of(s[n]), end = n + 1;
    while (s[end] && kind_of(s[end]) == kind) end++;
    if (kind == 0 && s[end] && end > 1) end--;  // the last white space belongs to the next word
    return end;
}

// Byte-pair encoding with ids as ranks: in each word merge the pair whose joint token has the lowest id, until none
// does. A byte that has no token becomes -1.
static std::vector<int> tokenizer_encode(const Tokenizer* k, const char* s) {
    std::vector<int> ids;
    for (int n; *s; s += n) {
        n = word_length(s);
        std::vector<std::string> parts;
        for (int i = 0; i < n; i++) parts.push_back(std::string(1, s[i]));
        for (;;) {
            int best = -1;
            size_t where = 0;
            for (size_t i = 0; i + 1 < parts.size(); i++) {
                int id = tokenizer_find(k, parts[i] + parts[i + 1]);
                if (id >= 0 && (best < 0 || id < best)) { best = id; where = i; }
            }
            if (best < 0) break;
            parts[where] += parts[where + 1];
            parts.erase(parts.begin() + where + 1);
        }
        for (const std::string& part : parts) ids.push_back(tokenizer_find(k, part));
    }
    return ids;
}

// Length of the sequence that samples are drawn in: the prompt and the new tokens, to the next multiple of 64 on each
// process, at most T.
static int64_t sample_length(const Config* c) {
    if (c->sample_every == 0) return 0;
    int64_t multiple = 64 * procs.cp;
    return std::min(ceil_div(1 + (int64_t)strlen(c->prompt) + c->sample_tokens, multiple) * multiple, c->seq_len);
}

// The token that a chance of 0..1 falls on: of the top_k likeliest, unless 0, by their softmax at a temperature. sorted
// (V) is for this function.
static int draw_token(const float* logits /*(V)*/, float* sorted, int V, int64_t top_k, double temperature,
                      double chance) {
    std::replace_copy_if(logits, logits + V, sorted, [](float x) { return std::isnan(x); }, -INFINITY);
    int64_t nth = top_k > 0 && top_k < V ? top_k : V;
    std::nth_element(sorted, sorted + nth - 1, sorted + V, std::greater<float>());
    float threshold = sorted[nth - 1];
    double largest = *std::max_element(logits, logits + V), sum = 0;
    auto share = [&](int v) { return logits[v] >= threshold ? exp((logits[v] - largest) / temperature) : 0; };
    for (int v = 0; v < V; v++) sum += share(v);
    double draw = chance * sum;
    int next = 0;
    for (int v = 0; v < V && draw >= 0; v++) {
        draw -= share(v);
        if (logits[v] >= threshold) next = v;
    }
    return next;
}

// Continues the prompt with dense attention, one whole forward pass a token.
static std::string sample(Model* m, const Config* c, const Tokenizer* k, int64_t step) {
    int64_t T = sample_length(c);
    int V = m->dims.V;
    Run r = {1, T, DENSE_PHASE, 0, false, 0};
    std::vector<int> tokens = tokenizer_encode(k, c->prompt);
    tokens.insert(tokens.begin(), k->end_of_text);
    int64_t length = tokens.size(), end = std::min(length + c->sample_tokens, T);
    tokens.resize(T, k->end_of_text);
    std::vector<float> logits(V), sorted(V);
    std::string out = c->prompt;
    for (; length < end && !stop_asked(); length++) {
        model_trunk(m, &tokens[first_token(r)], r);
        model_logits(m, 0, length - 1, r, logits.data());
        double chance = uniform(c->seed ^ 0x5A4D504C45ull, step * 65536 + length);
        int next = draw_token(logits.data(), sorted.data(), V, c->sample_top_k, c->temperature, chance);
        broadcast(&next, sizeof next, WORLD_GROUP, 0);  // one draws for all, whose logits may differ in their last bits
        if (next == k->end_of_text) break;
        tokens[length] = next;
        if (next < (int)k->token.size()) out += k->token[next];  // above: ids of a padded file's vocabulary
    }
    std::replace(out.begin(), out.end(), '\0', '\xFF');  // a C string has no byte 0: 0xFF is no text either
    return out;
}

// ---- logs: main.log has llm.c's lines, log.jsonl one object per event; a resumed run appends

// Opens a log to append to. A last line that a crash or a full disk cut off is ended, so that it spoils no other.
static FILE* log_open(const std::string& path) {
    FILE* f = fopen(path.c_str(), "a+");
    if (!f) fatal("cannot write %s: %s", path.c_str(), strerror(errno));
    if (!fseek(f, -1, SEEK_END) && fgetc(f) != '\n') {
        fseek(f, 0, SEEK_END);  // between reading and writing
        fputc('\n', f);
    }
    return f;
}

static void log_text(FILE* f, const std::string& line) {
    if (!f) return;
    fprintf(f, "%s\n", line.c_str());
    int failed = 0;
    on_disk([&] { failed = fflush(f); });
    if (failed)
        fatal("cannot write a log in --out-dir: %s. --resume 1 goes on from the newest checkpoint", strerror(errno));
}
#define log_line(f, ...) log_text(f, text(__VA_ARGS__))

// A JSON string. Bytes that are no UTF-8 become U+FFFD: samples may cut a character.
static std::string json_string(const std::string& s) {
    std::string out = "\"";
    for (const unsigned char* p = (const unsigned char*)s.c_str(); *p;) {
        int extra = *p >= 0xF0 && *p < 0xF5 ? 3 : *p >= 0xE0 && *p < 0xF0 ? 2 : *p >= 0xC2 && *p < 0xE0 ? 1 : 0;
        bool valid = *p < 0x80 || extra;
        for (int i = 1; i <= extra && valid; i++) valid = (p[i] & 0xC0) == 0x80;
        if (valid && extra >= 2)  // overlong forms, surrogates, beyond U+10FFFF
            valid = !(*p == 0xE0 && p[1] < 0xA0) && !(*p == 0xED && p[1] > 0x9F) && !(*p == 0xF0 && p[1] < 0x90) &&
                    !(*p == 0xF4 && p[1] > 0x8F);
        if (!valid) out += "\\ufffd";
        else if (*p < 0x20 || *p == 0x7F) out += text("\\u%04x", *p);
        else if (*p == '"' || *p == '\\') out += {'\\', (char)*p};
        else out.append((const char*)p, extra + 1);
        p += valid ? extra + 1 : 1;
    }
    return out + '"';
}

static std::string json_number(double x) { return isfinite(x) ? text("%.9g", x) : "null"; }

static std::string duration(double seconds) {
    int64_t n = (int64_t)(seconds + 0.5);
    if (n >= 86400) return text("%ldd%02ldh", n / 86400, n % 86400 / 3600);
    return text("%ld:%02ld:%02ld", n / 3600, n % 3600 / 60, n % 60);
}

// ===================================================================================================================
// 11. Main: options, set-up, the loop.

// The help of an option, less the [heading] that it may begin with.
static const char* option_help(const Option* o) { return *o->help == '[' ? strchr(o->help, ']') + 2 : o->help; }

static void print_help(const char* program) {
    printf("usage: %s [--option value | --option=value | -letter value | --switch] ...\n", program);
    printf("Pretrains a GPT-2-class model%s.\n",
           lighthouse_built ? ": Lighthouse attention up to the switch step, dense after it"
                            : " with dense attention, the baseline of train_gpt_lighthouse");
    for (int i = 0; i < option_count; i++) {
        const Option* o = &options[i];
        const char* help = option_help(o);
        if (help > o->help) printf("\n%.*s\n", (int)(help - o->help - 3), o->help + 1);
        printf("  %-26s %s", text("--%s%s%s", o->name, *o->letter ? ", -" : "", o->letter).c_str(), help);
        if (o->type == OPT_TEXT) printf(" (%s)\n", *o->fallback ? o->fallback : "none");
        else printf(" (%s; %.12g to %.12g)\n", o->fallback, o->min, o->max);
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
    if (end == value || *end || errno || !isfinite(x))
        fatal("--%s is \"%s\"; it must be a number. %s", o->name, value, option_help(o));
    if (o->type != OPT_REAL && x != floor(x))
        fatal("--%s is %s; it must be a whole number. %s", o->name, value, option_help(o));
    if (x < o->min || x > o->max)
        fatal("--%s is %s; it must be %.12g to %.12g. %s", o->name, value, o->min, o->max, option_help(o));
    if (o->type == OPT_REAL) *(double*)field = x;
    else *(int64_t*)field = (int64_t)x;
}

// An option's value as it would be typed.
static std::string option_text(const Config* c, const Option* o) {
    const char* field = (const char*)c + o->offset;
    return o->type == OPT_TEXT ? *(const char**)field
         : o->type == OPT_REAL ? text("%.9g", *(const double*)field) : text("%ld", *(const int64_t*)field);
}

static bool given(const char* name) {
    for (int i = 0; i < option_count; i++) if (!strcmp(options[i].name, name)) return option_given[i];
    return false;
}

// llm.c's options that have no counterpart: the values that may stay on its command lines, and what there is instead.
static const struct { const char *letter, *accepted, *instead; } llmc_options[] = {
    {"z", "0 1", "the optimizer's state is always sharded over all processes (ZeRO stage 1)"},
    {"h", "0 1", "HellaSwag is evaluated on the exported model: scripts/export_hf, then lm_eval"},
    {"w", "1", "fp32 master weights are always kept"},
    {"f", "0 1", "products are in bf16, or FP8 with --fp8 1"},
    {"ge", "0 1 2", "GELU is fused into a product where that is faster"},
    {"a", "0", "to overfit a batch, train on a shard of one batch"},
    {"pn", "1", "mpirun starts the processes"}, {"pr", "0", "mpirun starts the processes"},
    {"pg", "", "mpirun starts the processes"}, {"pi", "", "mpirun starts the processes"},
    {"ps", "", "mpirun starts the processes"}, {"pf", "", "mpirun starts the processes"},
};

// Whether -letter value is such an option; one that would change the run is refused.
static bool is_llmc_option(const std::string& letter, const char* value) {
    for (auto& o : llmc_options) {
        if (letter != o.letter) continue;
        bool accepted = *value && !strchr(value, ' ') && strstr(o.accepted, value);
        if (!accepted) fatal("llm.c's -%s %s has no counterpart: %s", o.letter, value, o.instead);
        if (strcmp(value, "0")) say("note: llm.c's -%s %s changes nothing: %s\n", o.letter, value, o.instead);
        return true;
    }
    return false;
}

static void parse_options(Config* c, int argc, char** argv) {
    for (int i = 0; i < option_count; i++) set_option(c, &options[i], options[i].fallback);
    if (!lighthouse_built) {
        c->switch_step = "0"; c->attention = "D"; c->window = "1024";
    }
    for (int i = 1; i < argc; i++) {
        const char* a = argv[i];
        const char* next = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(a, "--help") || (!strcmp(a, "-h") && !isdigit((unsigned char)*next))) {
            if (procs.rank == 0) print_help(argv[0]);
            processes_end();
            exit(0);
        }
        if (a[0] != '-') fatal("\"%s\" is no option: options begin with --; %s --help lists them", a, argv[0]);
        bool is_long = a[1] == '-';
        const char* equals = is_long ? strchr(a, '=') : NULL;
        std::string name(a + 1 + is_long, equals ? equals : a + strlen(a));
        const Option* o = NULL;
        for (const Option& known : options)
            if (name != "" && name == (is_long ? known.name : known.letter)) o = &known;
        if (!o && !is_long && is_llmc_option(name, next)) {
            i++;
            continue;
        }
        if (!o) fatal("unknown option %s; %s --help lists the options", a, argv[0]);
        option_given[o - options] = true;
        bool is_switch = o->type == OPT_INT && o->max == 1;  // without a value it is on
        if (equals) set_option(c, o, equals + 1);
        else if (i + 1 < argc && strncmp(next, "--", is_switch ? 1 : 2)) set_option(c, o, argv[++i]);
        else if (is_switch) set_option(c, o, "1");
        else fatal("--%s needs a value. %s", o->name, option_help(o));
    }
    if (strcmp(c->lr_schedule, "cosine") && strcmp(c->lr_schedule, "linear") && strcmp(c->lr_schedule, "constant") &&
        strcmp(c->lr_schedule, "wsd"))
        fatal("--lr-schedule is \"%s\"; it must be cosine, linear, constant or wsd", c->lr_schedule);
    if (strcmp(c->positions, "rope") && strcmp(c->positions, "learned"))
        fatal("--positions is \"%s\"; it must be rope or learned", c->positions);
    if (!*c->out_dir) fatal("--out-dir is empty; it must be a directory");
    if (evaluates_only(c)) {
        if (c->resume) fatal("--resume 1 with --steps 0, which evaluates: name the checkpoint with --model");
        if (c->sample_every && !given("val-data")) c->val_data = "";  // a sample needs no data
        if (!c->sample_every && !*c->val_data)
            fatal("--steps 0 evaluates %s, but --val-data is empty, and there are no samples to draw without "
                  "--sample-every 1", c->model);
        if (!given("out-dir")) c->out_dir = "runs/evaluation";
        c->fp8 = 0;  // what is evaluated is the model that is written
    } else if (given("train-data") && !given("val-data"))
        fatal("--train-data is given and --val-data is not: name shards of the same data, or --val-data '' for no "
              "validation");
}

// The model's sizes from a file's header, or from the descriptor, the explicit sizes and the data.
static Dims choose_dims(const Config* c, const Loader* train) {
    const Descriptor* known = find_descriptor(c->model);
    Dims d;
    if (!known) {
        if (access(c->model, R_OK))
            fatal("--model is \"%s\": neither a readable file nor one of d6, d12, d24, d36, d48, d60, lh30", c->model);
        ModelFile f;
        end_if(model_file_open(&f, c->model));
        d = f.dims;
        close(f.fd);
        if (c->depth || c->channels || c->heads || c->vocab_size)
            fatal("--depth, --channels, --heads and --vocab-size go with a descriptor; the sizes of %s are in the file",
                  c->model);
        if (given("positions") && d.rope != !strcmp(c->positions, "rope"))
            fatal("--positions is %s, but %s has %s positions", c->positions, c->model, d.rope ? "rope" : "learned");
        if (!d.rope && c->seq_len > d.maxT)
            fatal("--seq-len is %ld, but %s has learned positions up to %ld", c->seq_len, c->model, d.maxT);
        if (d.rope) d.maxT = c->seq_len;
        if (d.rope && given("rope-theta")) d.theta = (float)c->rope_theta;
        return d;
    }
    d.L = c->depth ? (int)c->depth : known->layers;
    d.C = c->channels ? (int)c->channels : known->channels;
    d.NH = c->heads ? (int)c->heads : known->heads;
    d.V = c->vocab_size ? (int)c->vocab_size : train->tokenizer_ids ? train->tokenizer_ids : guess_vocabulary(train);
    d.Vp = (d.V + 127) / 128 * 128;
    d.maxT = c->seq_len;
    d.rope = !strcmp(c->positions, "rope");
    d.theta = d.rope ? (float)c->rope_theta : 0;
    if (d.C % d.NH) fatal("--channels %d is not divisible by --heads %d", d.C, d.NH);
    if (d.rope && d.C / d.NH % 2) fatal("heads of %d channels: rotary positions need an even head size", d.C / d.NH);
    return d;
}

// A step of the run: a number of steps, or with a point a share of them. Refuses anything that does not end in `end`.
static int64_t parse_step(const char* option, const char* value, const char* s, const char** rest, int64_t steps) {
    char* end;
    double x = strtod(s, &end);
    bool share = memchr(s, '.', end - s) != NULL;
    if (end == s || (*end && *end != ',') || !(x >= 0) || (share && x > 1) || (!share && (x > steps || x != floor(x))))
        fatal("--%s is \"%s\"; a step must be from 0 to the run's %ld, or with a point a share such as 0.625", option,
              value, steps);
    *rest = end;
    return share ? (int64_t)llround(x * steps) : (int64_t)x;
}

// The letters of --attention, one a layer.
static void choose_attention(Model* m, const char* s) {
    int L = m->dims.L, letters = (int)strlen(s), ends = L >= 12 ? 2 : L >= 3 ? 1 : 0, group = std::min(L, 8);
    bool paper = !strcmp(s, "paper"), mixed = !strcmp(s, "mixed"), windows = mixed || !strcmp(s, "windows");
    if (!paper && !windows && (!letters || letters > L || strspn(s, attention_letters) < strlen(s)))
        fatal("--attention is \"%s\"; it must be mixed, windows, paper, or 1 to %d letters D (dense), W (window), L "
              "(Lighthouse), C (Causal Lighthouse)", s, L);
    memset(m->uses, 0, sizeof m->uses);
    for (int l = 0; l < L; l++) {
        int place = (l + 1) % group;
        m->attention[l] = paper ? (l >= ends && l < L - ends ? LIGHTHOUSE : DENSE)
                        : windows ? (!place ? DENSE : mixed && group > 3 && place == group / 2 ? CAUSAL : WINDOW)
                        : (Attention)(strchr(attention_letters, s[l % letters]) - attention_letters);
        m->pattern[l] = attention_letters[m->attention[l]];
        m->uses[m->attention[l]] = true;
    }
}

// The windows of --window and the steps from which they are taken. None is longer than a sequence.
static void choose_windows(Model* m, const Config* c, int64_t steps, int64_t switch_step) {
    for (const char* s = c->window; *s || !m->windows;) {
        char* end;
        int64_t i = m->windows, window = strtol(s, &end, 10), from = 0;
        if (end == s || window < 1 || i == MAX_WINDOWS || (*end && *end != ',' && *end != ':'))
            fatal("--window is \"%s\"; it must be tokens, or up to %d of tokens:step with commas between, such as "
                  "1024,4096:0.3", c->window, MAX_WINDOWS);
        if (*end == ':') from = parse_step("window", c->window, end + 1, &s, steps);
        else s = end;
        if (from >= switch_step || (i ? from <= m->window_from[i - 1] : from != 0))
            fatal("--window is \"%s\"; the first window is taken from step 0 on, each of the others from a later step "
                  "than the one before it, below the switch at %ld: here window %ld from step %ld", c->window,
                  switch_step, window, from);
        if (*s == ',' && !*++s) fatal("--window is \"%s\"; a window is missing behind the last comma", c->window);
        m->window[i] = std::min(window, c->seq_len);
        m->window_from[i] = from;
        m->windows++;
    }
}

// The rate of the device's own matrix product at this model's widest layer: what MFU is measured against. The weights
// themselves serve as random input: zeros would run faster than real data.
static double measure_device(Model* m, int64_t T) {
    int C = m->dims.C;
    int64_t room = activations_bytes(m, {1, T, DENSE_PHASE, 0, false, 0});  // the arena is no smaller
    int64_t N = std::min({(int64_t)m->dims.L * 4 * C, (int64_t)8192, room / (int64_t)(4 * C * sizeof(floatX))});
    int repeats = strcmp(backend_name, "cpu") ? 16 : 1;  // of a small model one takes a GPU no longer than its launch
    double best = INFINITY, began = seconds();
    for (int i = 0; i < 4 || seconds() - began < 0.2; i++) {  // the first is a warm-up
        device_synchronize();
        double start = seconds();
        for (int j = 0; j < repeats; j++)
            matmul_forward((floatX*)m->arena.base, weight(m, FCW, 0), weight(m, FCW, 0), NULL, NULL, N, C, 4 * C);
        device_synchronize();
        double t = (seconds() - start) / repeats;
        if (i > 0 && t < best) best = t;
    }
    return 2.0 * N * C * 4 * C / best;
}

static double gib(double bytes) { return bytes / (1024.0 * 1024 * 1024); }

// What there is to plan for.
static size_t memory_free(const Config* c) {
    return c->plan_memory > 0 ? (size_t)(c->plan_memory * (1ll << 30)) : device_memory_free();
}

// Chooses the recompute levels if they are left to us and refuses what does not fit, with what would.
static Plan choose_plan(Model* m, Config* c, int64_t sample_T) {
    const size_t spare = 128ll << 20;  // of a GPU, for kernels that are loaded at their first launch and for rounding
    int B = (int)c->batch_size, L = m->dims.L;
    bool automatic = c->recompute < 0;
    if (automatic) c->recompute = 0;
    Plan p = memory_plan(m, c, sample_T, c->recompute * L, B);
    size_t room = memory_free(c);  // only now: on a GPU that plan built cuDNN's, which take memory themselves
    if (!strcmp(backend_name, "cpu") && !c->plan_memory) room /= procs.local_world;
    else room -= std::min(room, spare);
    // In all processes' memories, which differ where GPUs do. All choose alike, so that their exchanges match.
    auto fits = [&](const Plan& plan) { return all_max((double)plan.total - (double)room) <= 0; };
    while (automatic && c->recompute < 4 && !fits(p)) p = memory_plan(m, c, sample_T, ++c->recompute * L, B);
    if (!fits(p)) {
        if (p.total <= room) barrier();  // for those without the room, who say so
        bool fewer = B > 1 && memory_plan(m, c, sample_T, 4 * L, 1).total <= room;
        fatal("this run takes %.2f GiB and %.2f GiB are free for it, %.2f GiB too few: %s", gib(p.total), gib(room),
              gib(p.total - room), c->recompute < 4 ? "try --recompute 4" : fewer ? "--batch-size 1 would fit"
              : "lower --seq-len or take a smaller model");
    }
    if (!automatic || c->recompute == 0) return p;
    // As many layers as fit go one level lower. All of them do not: that was tried.
    for (int enough = 0, too_many = L; too_many - enough > 1;) {
        int lower = (enough + too_many) / 2;
        Plan finer = memory_plan(m, c, sample_T, c->recompute * L - lower, B);
        if (fits(finer)) enough = lower, p = finer;
        else too_many = lower;
    }
    return p;
}

struct Trainer {
    Config config;
    Model model;
    Loader train, val;                         // without sequences where --steps 0 or an empty --val-data needs none
    Tokenizer tokenizer;
    RunState state;
    FILE *main_log, *json_log;                 // of rank 0
    int64_t steps, switch_step, accumulation;  // micro-steps of a step
    int recompute;                             // Run's
    Batch* ready;                              // the next micro-step's batch, if it was read ahead
    int64_t saved;                             // the step of the newest checkpoint that is known to be whole, or -1
    double val_loss;                           // of the last validation, or NAN
    double clock;                              // when the step that runs now began
    double device_flops, started, wall_before; // wall_before: of the run before this process
};

static Phase phase_at(const Trainer* t, int64_t step) { return step < t->switch_step ? FIRST_PHASE : DENSE_PHASE; }
static double wall_seconds(const Trainer* t) { return t->wall_before + seconds() - t->started; }

static void log_configuration(const Trainer* t, const Plan* plan, const char* device) {
    const Config* c = &t->config;
    const Model* m = &t->model;
    const Dims* d = &m->dims;
    FILE* f = t->json_log;
    if (!f) return;
    char stamp[32];
    time_t now = time(NULL);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
    fprintf(f, "{\"event\":\"config\",\"program\":\"%s\",\"version\":2,\"time\":\"%s\",\"options\":{", PROGRAM, stamp);
    for (int i = 0; i < option_count; i++) {
        std::string value = option_text(c, &options[i]);
        if (options[i].type == OPT_TEXT) value = json_string(value);
        fprintf(f, "%s\"%s\":%s", i ? "," : "", options[i].name, value.c_str());
    }
    fprintf(f, "},\"model\":{\"layers\":%d,\"channels\":%d,\"heads\":%d,\"vocab\":%d,\"padded_vocab\":%d,"
            "\"parameters\":%ld,\"positions\":\"%s\",\"rope_theta\":%.9g},\"attention\":\"%s\",\"windows\":[", d->L,
            d->C, d->NH, d->V, d->Vp, m->parameters, d->rope ? "rope" : "learned", d->theta, m->pattern);
    for (int i = 0; m->uses[WINDOW] && i < m->windows; i++)
        fprintf(f, "%s[%ld,%ld]", i ? "," : "", m->window[i], m->window_from[i]);
    fprintf(f, "],\"lighthouse\":");
    if (uses_slots(m)) {
        const LighthouseShape* s = &m->shape;
        fprintf(f, "{\"levels\":%d,\"pool\":%d,\"topk\":%d,\"tile\":%d,\"slots\":%ld,\"leaves\":%ld}", s->levels,
                s->pool, s->topk, s->tile, s->S, leaf_shape(s).S);
    } else fprintf(f, "null");
    Run r = {0, 0, DENSE_PHASE, 0, true, plan->recompute};
    for (int l = 0; l < d->L; l++) fprintf(f, "%s%d", l ? "," : ",\"recompute_levels\":[", layer_level(m, r, l));
    log_line(f, "],\"steps\":%ld,\"switch_step\":%ld,\"tokens_per_step\":%ld,\"processes\":%d,\"cp\":%d,"
             "\"device\":%s,\"backend\":\"%s\",\"measured_flops\":%.6g}", t->steps, t->switch_step,
             c->total_batch_size, procs.world, procs.cp, json_string(device).c_str(), backend_name, t->device_flops);
    fprintf(f, "{\"event\":\"memory\",\"total_bytes\":%zu,\"parts\":{", plan->total);
    for (int i = 0; i < plan->parts; i++) fprintf(f, "%s\"%s\":%zu", i ? "," : "", plan->name[i], plan->bytes[i]);
    log_line(f, "}}");
}

static void print_configuration(const Trainer* t, const Plan* plan, const char* device) {
    const Config* c = &t->config;
    const Model* m = &t->model;
    const Dims* d = &m->dims;
    say("device      %s (%s), %d process(es)", device, backend_name, procs.world);
    if (procs.cp > 1) say(": %d data-parallel groups of %d that share each sequence", procs.dp, procs.cp);
    say("\n");
    say("model       %s: %d layers, %d channels, %d heads of %d, %d tokens (padded %d), %s positions, %ld parameters\n",
        c->model, d->L, d->C, d->NH, d->C / d->NH, d->V, d->Vp, d->rope ? "rotary" : "learned", m->parameters);
    bool trains = !evaluates_only(c);
    say("data        ");
    if (trains) say("%s: %zu shard(s), %ld sequences of %ld tokens, %ld of %ld tokens in none; ", c->train_data,
                    t->train.shards.size(), t->train.sequences, c->seq_len, t->train.unused, t->train.tokens);
    say("%s%s\n", t->val.sequences ? "validation on " : "no validation", c->val_data);
    if (trains && t->train.unused > 0.05 * t->train.tokens)
        say("note: %.0f%% of the training tokens are never seen: a sequence ends with its shard. Longer shards "
            "(--shard-tokens of data/prepare.py) or a shorter --seq-len use more\n",
            100.0 * t->train.unused / t->train.tokens);
    say("batch       %ld tokens a step: %ld micro-step(s) of %ld x %ld on %d %s\n", c->total_batch_size,
        t->accumulation, c->batch_size, c->seq_len, procs.dp, procs.cp > 1 ? "group(s)" : "process(es)");
    double tokens = (double)t->steps * c->total_batch_size;
    if (trains) say("run         %ld steps, %.3g tokens, %.2f epochs; learning rate up to %.3g, %s\n", t->steps, tokens,
        tokens / c->seq_len / t->train.sequences, c->learning_rate, c->lr_schedule);
    if (m->windows) {
        const LighthouseShape* s = &m->shape;
        double T = (double)c->seq_len;
        say("attention   steps 0 to %ld: %s\n", t->switch_step - 1, m->pattern);
        for (int i = 0; m->uses[WINDOW] && i < m->windows; i++)
            say("            windows of %ld tokens from step %ld on: %.2f%% of dense attention's operations\n",
                m->window[i], m->window_from[i], 100 * attention_square(WINDOW, m, m->window[i], c->seq_len) / (T * T));
        for (Attention kind : {LIGHTHOUSE, CAUSAL})
            if (m->uses[kind])
                say("            %s: levels %d, pool %d, topk %d, tile %d (%d tiles), %ld slots: %.2f%%\n",
                    kind == CAUSAL ? "Causal Lighthouse" : "Lighthouse", s->levels, s->pool, s->topk, s->tile, s->tiles,
                    kind == CAUSAL ? leaf_shape(s).S : s->S, 100 * attention_square(kind, m, 0, s->T) / (T * T));
        if (m->uses[LIGHTHOUSE] && procs.cp > 1) {
            say("            such a layer exchanges %s between the %d that share a sequence%s\n",
                m->exchange_slots ? "slots" : "tokens", procs.cp, m->exchange_slots || s->S >= s->T ? ""
                : ", since they cannot share the tiles (--topk / --tile) evenly: slots are fewer");
        }
        if (t->switch_step == t->steps) say("            no step is dense in every layer\n");
        else say("            steps %ld to %ld: dense in every layer\n", t->switch_step, t->steps - 1);
        if (!strcmp(c->attention, "mixed") && d->L > 3 && !uses_slots(m))
            say("note: no selection of Causal Lighthouse fits seq-len %ld: windows in its place\n", c->seq_len);
        for (const char* name : {"window", "levels", "pool", "topk", "tile"})
            if (given(name) && !(strcmp(name, "window") ? uses_slots(m) : m->uses[WINDOW]))
                say("note: --%s is given, and no layer of --attention %s has it\n", name, c->attention);
    } else say("attention   dense throughout\n");
    for (int i = 0; i < m->windows; i++)
        say("operations  %.4g TFLOP a step of the first phase%s\n",
            step_flops(m, FIRST_PHASE, m->window[i], c->seq_len, c->total_batch_size) * 1e-12,
            m->windows > 1 ? text(", windows of %ld", m->window[i]).c_str() : "");
    say("operations  %.4g TFLOP a dense step\n",
        step_flops(m, DENSE_PHASE, 0, c->seq_len, c->total_batch_size) * 1e-12);
    say("memory      %.2f GiB%s of %.2f GiB free, recompute level ", gib(plan->total),
        procs.world > 1 ? " per process" : "", gib(memory_free(c)));
    int level = (int)c->recompute, lower = level * d->L - plan->recompute;  // layers one level lower
    if (lower) say("%d in %d layer%s, %d in %d:", level - 1, lower, lower > 1 ? "s" : "", level, d->L - lower);
    else say("%d:", level);
    for (int i = 0; i < plan->parts; i++) say("%s %s %.2f", i ? "," : "", plan->name[i], gib(plan->bytes[i]));
    say("\n");
}

// Checks the batch, the steps and Lighthouse's settings, and chooses those that were left open.
static void setup_run(Trainer* t) {
    Config* c = &t->config;
    Model* m = &t->model;
    if (m->dims.NH % c->cp || c->seq_len % c->cp)
        fatal("--cp is %ld; it must divide the model's %d heads and --seq-len, %ld", c->cp, m->dims.NH, c->seq_len);
    if ((double)c->batch_size * c->seq_len * procs.dp > 1e12)
        fatal("batch-size %ld x seq-len %ld x %d data-parallel processes is %.4g tokens; it may be up to 1e12",
              c->batch_size, c->seq_len, procs.dp, (double)c->batch_size * c->seq_len * procs.dp);
    int64_t micro = c->batch_size * c->seq_len * procs.dp;
    if (c->total_batch_size == 0) c->total_batch_size = micro;
    if (c->total_batch_size % micro)
        fatal("--total-batch-size is %ld; it must be a multiple of batch-size x seq-len x processes / cp = %ld: try "
              "%ld", c->total_batch_size, micro, ceil_div(c->total_batch_size, micro) * micro);
    t->accumulation = c->total_batch_size / micro;
    if (c->fp8 && c->batch_size * c->seq_len / procs.cp % 16)
        fatal("--fp8 1 with batch-size x seq-len / cp = %ld x %ld / %d tokens: they must be a multiple of 16",
              c->batch_size, c->seq_len, procs.cp);
    t->steps = c->steps >= 0 ? c->steps : t->train.sequences * c->seq_len / c->total_batch_size;
    if (t->steps == 0 && c->steps < 0)
        fatal("one epoch, %ld tokens, is less than one step of %ld: lower --total-batch-size, or give --steps",
              t->train.sequences * c->seq_len, c->total_batch_size);
    if (c->warmup_steps > t->steps)
        fatal("--warmup-steps is %ld, more than the run's %ld steps", c->warmup_steps, t->steps);
    const char* rest;
    t->switch_step = parse_step("switch-step", c->switch_step, c->switch_step, &rest, t->steps);
    if (*rest) fatal("--switch-step is \"%s\"; it must be one step", c->switch_step);
    choose_attention(m, t->switch_step > 0 ? c->attention : "D");
    if (!m->uses[WINDOW] && !uses_slots(m)) t->switch_step = 0;
    if (t->switch_step == 0) return;
    choose_windows(m, c, t->steps, t->switch_step);
    m->never_dense = t->switch_step == t->steps;
    if (!uses_slots(m)) return;
    bool causal = !m->uses[LIGHTHOUSE];
    int levels = c->levels ? (int)c->levels : causal ? 4 : 3, least = c->levels || !causal ? levels : 2;
    std::string why = "none";
    for (; why != "" && levels >= least; levels--)
        why = lighthouse_defaults(&m->shape, c, m->dims.NH / procs.cp, m->dims.C / m->dims.NH, causal, levels);
    if (why != "" && !strcmp(c->attention, "mixed") && !c->levels && !c->topk && !c->tile)
        return choose_attention(m, "windows");  // print_configuration() says so
    if (why != "") fatal("Lighthouse attention at seq-len %ld: %s", c->seq_len, why.c_str());
    m->exchange_slots = can_exchange_slots(m, m->shape.tile, &m->own_shape);
}

// All processes must be built and started alike, and read the same files: on hosts that do not share a file system one
// may hold an older copy. The first of these lines that is not rank 0's is named.
static void compare_lines(const std::string& lines) {
    int length = (int)lines.size();
    broadcast(&length, sizeof length, WORLD_GROUP, 0);
    std::string first = lines;  // rank 0's
    first.resize(length);
    broadcast(&first[0], length, WORLD_GROUP, 0);
    if (first != lines) {
        size_t at = std::mismatch(lines.begin(), lines.end(), first.begin(), first.end()).first - lines.begin();
        size_t line = at ? lines.rfind('\n', at - 1) + 1 : 0;
        fatal("%s here but %s on rank 0: start all processes with the same program, options and files",
              lines.substr(line, lines.find('\n', line) - line).c_str(),
              first.substr(line, first.find('\n', line) - line).c_str());
    }
    barrier();  // nobody goes on, perhaps into an error that hides this one
}

static void setup_processes(const Config* c) {
    hang_timeout = c->hang_timeout;
    if ((c->plan_ranks || c->plan_memory) && !c->dry_run)
        fatal("--plan-ranks is %ld, --plan-memory is %.9g; both go with --dry-run", c->plan_ranks, c->plan_memory);
    if (c->plan_ranks && procs.world > 1)
        fatal("--plan-ranks is %ld; start one process to plan for others", c->plan_ranks);
    if (c->plan_ranks) procs.world = (int)c->plan_ranks;
    if (c->plan_memory) floatx_bytes = 2;
    std::string lines = text("the program is \"train_gpt_" PROGRAM " " VERSION " (%s, %zu-byte weights)\"\n",
                             backend_name, sizeof(floatX));
    for (const Option& o : options) lines += text("--%s is \"%s\"\n", o.name, option_text(c, &o).c_str());
    compare_lines(lines);
    processes_split(c->cp);
}

// Tells other model files and checkpoints apart: their size, their header and the first weights.
static uint64_t model_fingerprint(const char* path) {
    int64_t size;
    int fd = open_to_read(path, &size);
    std::string start(std::min<int64_t>(size, 8192), 0);
    read_at(fd, &start[0], start.size(), 0, path);
    close(fd);
    return checksum(start.data(), start.size()) ^ mix64(size);
}

static void setup_tokenizer(Trainer* t) {
    const Config* c = &t->config;
    std::string path = c->tokenizer, data = t->train.shards.empty() ? c->train_data : t->train.shards[0].path;
    if (path == "") {
        path = folder_of(data) + "tokenizer.bin";
        if (access(path.c_str(), R_OK) && !access("gpt2_tokenizer.bin", R_OK))
            path = "gpt2_tokenizer.bin";  // where llm.c has it
    }
    if (access(path.c_str(), R_OK))
        fatal("cannot read the tokenizer %s: %s. --tokenizer names it; --sample-every 0 does without", path.c_str(),
              strerror(errno));
    tokenizer_read(&t->tokenizer, path.c_str(), t->model.dims.V);
    if (!find_descriptor(c->model)) check_tokenizer(c->model, t->model.dims.V, path, (int)t->tokenizer.token.size());
    std::vector<int> ids = tokenizer_encode(&t->tokenizer, c->prompt);
    if (std::count(ids.begin(), ids.end(), -1))
        fatal("--prompt \"%s\" has a byte that the tokenizer has no token for", c->prompt);
    if (1 + (int64_t)ids.size() >= c->seq_len)
        fatal("--prompt has %zu tokens and begins after one more, which leaves no room for a new token in seq-len "
              "%ld: shorten it", ids.size(), c->seq_len);
}

static void setup_directory(const Config* c, const Model* m, int64_t steps) {
    std::error_code error;
    std::filesystem::create_directories(c->out_dir, error);
    if (error) fatal("cannot make directory %s: %s", c->out_dir, error.message().c_str());
    if (procs.rank == 0) {  // two runs in one directory would remove each other's checkpoints
        int lock = open(c->out_dir, O_RDONLY);  // stays open, and so locked, until this process ends
        if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)  // some file systems have no locks
            fatal("another run is writing to %s: wait for its end, or give another --out-dir", c->out_dir);
    }
    std::vector<int64_t> earlier = checkpoint_list(c);
    if (earlier.size() && !c->resume)
        fatal("%s holds %zu checkpoint(s) of an earlier run: --resume 1 goes on from the newest, or give another "
              "--out-dir", c->out_dir, earlier.size());
    std::string model = text("%s/model.bin", c->out_dir);
    if (earlier.empty() && steps > 0 && !access(model.c_str(), F_OK))  // what takes no steps may be made again
        fatal("%s is the model of an earlier run, whose checkpoints are gone; this run would write over it: move it, "
              "or give another --out-dir", model.c_str());
    barrier();  // every process has looked before rank 0 writes
    // Whether all processes can write a checkpoint into one folder shows here, not only at the first one.
    bool writes = !evaluates_only(c) && (earlier.empty() || earlier[0] < steps);
    struct statvfs disk;
    if (writes && procs.rank == 0 && !statvfs(c->out_dir, &disk) &&
        disk.f_bavail * disk.f_frsize < (uint64_t)checkpoint_bytes(m))
        fatal("%s has %.3g GiB free; a checkpoint takes %.3g", c->out_dir, gib(disk.f_bavail * disk.f_frsize),
              gib(checkpoint_bytes(m)));
    if (procs.world == 1) return;
    NewFile probe = new_file(text("%s/ckpt_probe", c->out_dir), 0);
    barrier();
    close(probe.fd);
    if (procs.rank == 0) unlink(probe.partial.c_str());
    writing_file = 0;
}

// The newest checkpoint's state, or a new one. Returns the checkpoint's path, or "".
static std::string setup_state(Trainer* t, bool from_file) {
    const Config* c = &t->config;
    Model* m = &t->model;
    RunState* s = &t->state;
    std::string found;
    if (!c->resume || !checkpoint_resume(m, c, s, &found)) {
        if (from_file) {
            end_if(weights_read(m, c->model, true));
            gather_all_params(m);
        } else model_initialize(m, c->seed);
        s->seq_len = c->seq_len; s->total_batch = c->total_batch_size;
        s->epoch = t->train.sequences; s->seed = c->seed; s->shuffle = c->shuffle;
        s->data = t->train.fingerprint;
        return "";
    }
    const char* path = found.c_str();
    const struct { const char* what; int64_t then, now; } unchanged[] = {
        {"seq-len", s->seq_len, c->seq_len}, {"total-batch-size", s->total_batch, c->total_batch_size},
        {"training data of as many sequences:", s->epoch, t->train.sequences},
        {"training data of checksum", (int64_t)s->data, (int64_t)t->train.fingerprint},
        {"seed", s->seed, c->seed}, {"shuffle", s->shuffle, c->shuffle}};
    for (auto& x : unchanged)
        if (x.then != x.now)
            fatal("%s was made with %s %ld, now it is %ld: a resumed run continues the same sequence of batches, so "
                  "restore it, or start a new run from its weights with --model %s", path, x.what, x.then, x.now, path);
    if (s->step > t->steps)
        fatal("%s is at step %ld, past the %ld steps asked for", path, s->step, t->steps);
    return found;
}

static void setup(Trainer* t, int argc, char** argv) {
    Config* c = &t->config;
    Model* m = &t->model;
    t->started = seconds();
    t->val_loss = NAN;
    parse_options(c, argc, argv);
    setup_processes(c);

    bool trains = !evaluates_only(c);
    bool from_file = !find_descriptor(c->model);
    if (trains) loader_init(&t->train, c->train_data, c->seq_len, c->shuffle, c->seed);
    if (*c->val_data) loader_init(&t->val, c->val_data, c->seq_len, false, 0);
    if (t->train.tokenizer_ids && t->val.tokenizer_ids && t->train.tokenizer != t->val.tokenizer)
        fatal("--val-data %s is of another tokenizer than --train-data %s: the tokenizer.bin beside them differ",
              c->val_data, c->train_data);
    Dims dims = choose_dims(c, &t->train);
    for (Loader* d : {&t->train, &t->val}) {
        d->vocab = dims.V;
        if (from_file && d->tokenizer_ids)
            check_tokenizer(c->model, dims.V, folder_of(d->shards[0].path) + "tokenizer.bin", d->tokenizer_ids);
        if (d->sequences) d->fingerprint = loader_fingerprint(d);
    }
    if (procs.connected)
        compare_lines(text("--train-data has checksum %lx\n--val-data has checksum %lx\n--model has checksum %lx",
                           t->train.fingerprint, t->val.fingerprint, from_file ? model_fingerprint(c->model) : 0));
    model_layout(m, dims);
    setup_run(t);
    if (c->sample_every) setup_tokenizer(t);

    device_open(procs.local_rank);
    collectives_open(std::min(LAYERS_AT_ONCE, dims.L), unit_size(m, 1) * sizeof(float),
                     3 * c->batch_size * (c->seq_len / procs.cp) * (dims.C / procs.cp) * sizeof(floatX));
    operations_open(dims.C, dims.NH, dims.Vp, c->deterministic);
    if (uses_slots(m)) lighthouse_open(&m->shape);
    if (c->fp8) fp8_open();
    Plan plan = choose_plan(m, c, sample_length(c));
    t->recompute = plan.recompute;
    std::string device = device_name();
    print_configuration(t, &plan, device.c_str());
    if (c->dry_run) {
        processes_end();
        exit(0);
    }

    setup_directory(c, m, t->steps);
    model_allocate(m, c, &plan);
    std::string path = setup_state(t, from_file);
    t->saved = path != "" ? t->state.step : -1;
    fp8_weights_update(m);
    t->wall_before = t->state.wall_s;
    t->device_flops = measure_device(m, c->seq_len);
    say("speed       %.4g TFLOP/s measured in a matrix product of this model: 100%% MFU\n", t->device_flops * 1e-12);
    if (procs.rank == 0) {
        t->main_log = log_open(text("%s/main.log", c->out_dir));
        t->json_log = log_open(text("%s/log.jsonl", c->out_dir));
    }
    log_configuration(t, &plan, device.c_str());
    if (c->resume && path == "") say("no checkpoint in %s: a new run\n", c->out_dir);
    if (path != "") {
        const RunState* s = &t->state;
        say("resuming from %s at step %ld\n", path.c_str(), s->step);
        if (s->phase_steps[DENSE_PHASE] > 0 && s->step < t->switch_step)
            say("note: this run was dense already at step %ld; with --steps %ld its switch is at step %ld: "
                "--switch-step %ld keeps it dense\n", s->step, t->steps, t->switch_step, s->phase_steps[FIRST_PHASE]);
        log_line(t->json_log, "{\"event\":\"resume\",\"step\":%ld,\"file\":%s}", s->step, json_string(path).c_str());
        checkpoint_prune(c, s);  // which a run that was killed may not have come to
    }
}

// Steps are timed from one's end to the next one's; what comes between and is none is left out by starting anew.
static void restart_clock(Trainer* t) {
    device_synchronize();
    t->clock = seconds();
}

// "4K" of 4096; numbers that are no multiple of 1024 as they are.
static std::string short_count(int64_t n) {
    return n >= 1024 && n % 1024 == 0 ? text("%ldK", n / 1024) : text("%ld", n);
}

// The losses by position as the logs have them: [a,b,c], or null.
static std::string json_buckets(const Losses* l) {
    std::string out;
    for (int i = 0; i < l->buckets; i++) out += (i ? "," : "[") + json_number(l->bucket[i]);
    return l->buckets ? out + "]" : "null";
}

static bool measure_copying(Trainer* t) {
    const Config* c = &t->config;
    Copying k;
    if (!evaluate_copying(&k, &t->model, c, &t->val)) return false;
    std::string main_line = text("s:%ld", t->state.step), json;
    for (int random = 0; random < 2; random++) {
        std::string screen = text("step %ld | copies of %s:", t->state.step, random ? "random ids" : "the text");
        for (const Copying::Distance& d : k.distances) {
            screen += text("%s %s back %.3f (%.0f%% right)", &d > &k.distances[0] ? "," : "",
                           short_count(d.tokens).c_str(), d.loss[random], 100 * d.right[random]);
            main_line += text(" %s%ld:%.4f", random ? "rcopy" : "copy", d.tokens, d.loss[random]);
        }
        say_text(screen + "\n");
    }
    for (const Copying::Distance& d : k.distances)
        json += text("%s{\"distance\":%ld,\"text_loss\":%s,\"text_right\":%.4f,\"random_loss\":%s,"
                     "\"random_right\":%.4f}", json == "" ? "" : ",", d.tokens, json_number(d.loss[0]).c_str(),
                     d.right[0], json_number(d.loss[1]).c_str(), d.right[1]);
    log_text(t->main_log, main_line);
    log_line(t->json_log, "{\"event\":\"copying\",\"step\":%ld,\"tokens\":%ld,\"sequences\":%ld,\"copies\":[%s]}",
             t->state.step, k.n - k.skipped, k.sequences, json.c_str());
    return true;
}

// Returns false, with nothing logged, if a signal stopped it before the end.
static bool validate(Trainer* t, Phase phase, bool copying) {
    const Config* c = &t->config;
    int64_t step = t->state.step;
    if (t->val.sequences == 0) return true;
    Losses dense = {}, first = {};
    first.all = NAN;
    int64_t window = window_at(&t->model, std::max<int64_t>(step - 1, 0));  // that of the last step
    if (!evaluate(&dense, &t->model, c, &t->val, DENSE_PHASE, 0)) return false;
    if (phase == FIRST_PHASE && !evaluate(&first, &t->model, c, &t->val, FIRST_PHASE, window)) return false;
    std::string screen = text("step %ld | validation loss %.4f", step, dense.all);
    std::string main_line = text("s:%ld tel:%.6f", step, dense.all);
    if (phase == FIRST_PHASE) {
        screen += text(" under dense attention, %.4f under %s", first.all, c->attention);
        main_line += text(" ftel:%.6f", first.all);
    }
    const char* before = " | from position";
    for (int i = dense.buckets % 2 ? 8 : 9; i < dense.buckets; i += 2, before = ",") {  // from 256 on, up to the last
        screen += text("%s %s: %.4f", before, short_count(1ll << i).c_str(), dense.bucket[i]);
        main_line += text(" p%lld:%.6f", 1ll << i, dense.bucket[i]);
    }
    say_text(screen + "\n");
    log_text(t->main_log, main_line);
    log_line(t->json_log, "{\"event\":\"eval\",\"step\":%ld,\"loss_dense\":%s,\"loss_first\":%s,\"tokens\":%ld,"
             "\"train_s\":%.6f,\"wall_s\":%.6f,\"positions_dense\":%s,\"positions_first\":%s}", step,
             json_number(dense.all).c_str(), json_number(first.all).c_str(), step * c->total_batch_size,
             t->state.train_s, wall_seconds(t), json_buckets(&dense).c_str(), json_buckets(&first).c_str());
    t->val_loss = dense.all;
    bool whole = !copying || c->seq_len < 64 || measure_copying(t);
    restart_clock(t);
    return whole;
}

static void save_checkpoint(Trainer* t) {
    const Config* c = &t->config;
    double start = seconds();
    t->state.wall_s = wall_seconds(t);
    std::string path = checkpoint_path(c, t->state.step);
    checkpoint_write(&t->model, path, &t->state);
    t->saved = t->state.step;
    checkpoint_prune(c, &t->state);
    int64_t bytes = checkpoint_bytes(&t->model);
    double took = seconds() - start;
    say("step %ld | checkpoint %s (%.2f GiB, %.1f s)\n", t->state.step, path.c_str(), gib(bytes), took);
    log_line(t->json_log, "{\"event\":\"checkpoint\",\"step\":%ld,\"file\":%s,\"bytes\":%ld,\"seconds\":%.3f}",
             t->state.step, json_string(path).c_str(), bytes, took);
    restart_clock(t);
}

static void write_sample(Trainer* t) {
    std::string s = sample(&t->model, &t->config, &t->tokenizer, t->state.step);
    log_line(t->json_log, "{\"event\":\"sample\",\"step\":%ld,\"text\":%s}", t->state.step, json_string(s).c_str());
    for (char& ch : s)  // a terminal would obey them
        if (((uint8_t)ch < 32 && ch != '\n' && ch != '\t') || ch == 127) ch = '?';
    say("step %ld | sample: %s\n", t->state.step, s.c_str());
    restart_clock(t);
}

// Seconds that the steps left will take, at the phase's rate of operations so far.
static double seconds_left(const Trainer* t, Phase phase, int64_t window) {
    const RunState* s = &t->state;
    const Model* m = &t->model;
    int64_t T = t->config.seq_len;
    double dense_step = step_flops(m, DENSE_PHASE, 0, T, 1) / step_flops(m, phase, window, T, 1);  // of this phase's
    double left = (t->switch_step - s->step) + (t->steps - t->switch_step) * dense_step;
    return left * s->phase_s[phase] / s->phase_steps[phase];
}

// Reads the batch of this process for a micro-step, counted from the step that the state is at, into the buffer that
// training did not use last.
static void read_batch(Trainer* t, int64_t micro) {
    int64_t rows = t->config.seq_len / procs.cp, B = t->config.batch_size;
    Batch* batch = &t->model.batch[t->ready == &t->model.batch[0]];
    event_wait(&batch->copied);
    int64_t first = t->state.sequences + (micro * procs.dp + procs.dp_rank) * B;
    on_disk([&] {
        for (int64_t b = 0; b < B; b++)
            loader_sequence(&t->train, first + b, batch->tokens + b * rows, batch->targets + b * rows);
    });
    t->ready = batch;
}

// One optimizer step: the micro-steps, the gradient norm, the update, one line. The host queues a micro-step, reads the
// next batch while the device works, and waits once, for the loss and the norm. The update runs while the host goes on:
// a step is timed from wait to wait. Returns false if a signal stopped it before its last micro-step: what a checkpoint
// holds has then not changed since the step before.
static bool train_step(Trainer* t) {
    const Config* c = &t->config;
    Model* m = &t->model;
    RunState* s = &t->state;
    step_begun = s->step + 1;
    Phase phase = phase_at(t, s->step);
    int64_t T = c->seq_len, B = c->batch_size, total = c->total_batch_size;
    int64_t window = phase == FIRST_PHASE ? window_at(m, s->step) : 0;
    Run r = {(int)B, T, phase, window, true, t->recompute, c->fp8 != 0};

    begin_gradients(m);
    device_zero(m->sums, 2 * sizeof(double));
    if (!t->ready) read_batch(t, 0);
    for (int64_t micro = 0; micro < t->accumulation; micro++) {
        if (micro > 0 && stop_asked()) return false;
        r.first = micro == 0;
        r.last = micro == t->accumulation - 1;
        model_micro_step(m, t->ready, r, 1.0f / total);
        if (micro + 1 < t->accumulation || s->step + 1 < t->steps) read_batch(t, micro + 1);
    }
    collectives_join();
    add_gradient_squares(m);
    double sums[2], queued = seconds();  // how long the host waits now is how far it was ahead of the device
    copy_to_host(sums, m->sums, sizeof sums);
    all_sum(sums, 2);
    double now = seconds(), elapsed = now - t->clock;
    t->clock = now;
    double loss = sums[LOSS_SUM] / total, norm = sqrt(sums[NORM_SUM]);
    double lr = learning_rate(c, s->step, t->steps);

    double loss_z = detector_score(&s->loss, loss), norm_z = detector_score(&s->norm, norm);
    bool finite = isfinite(loss) && isfinite(norm);
    s->not_finite = finite ? 0 : s->not_finite + 1;
    if (!finite && !(c->skip_loss_z > 0 || c->skip_grad_z > 0))
        fatal("step %ld: the loss is %g and the gradient norm %g. The checkpoints are as they were; resume from one "
              "with a lower --learning-rate, or let --skip-grad-z pass over such steps", s->step + 1, loss, norm);
    if (s->not_finite == NOT_FINITE_LIMIT)
        fatal("step %ld: the loss is %g and the gradient norm %g, and neither was finite in any of %ld steps: it is "
              "not the data but the weights. Resume from a checkpoint of step %ld or before with a lower "
              "--learning-rate", s->step + 1, loss, norm, s->not_finite, s->step + 1 - s->not_finite);
    bool skip = !finite || (c->skip_loss_z > 0 && loss_z > c->skip_loss_z) ||
                (c->skip_grad_z > 0 && norm_z > c->skip_grad_z);
    double grad_scale = c->grad_clip > 0 && norm > c->grad_clip ? c->grad_clip / norm : 1;
    if (!skip) {
        model_update(m, c, lr, grad_scale, ++s->updates);
        fp8_weights_update(m);
    }

    s->step++;
    s->sequences += total / T;
    s->train_s += elapsed;
    s->phase_steps[phase]++;
    s->phase_s[phase] += elapsed;
    double mfu = step_flops(m, phase, window, T, (double)total) / (elapsed * t->device_flops * procs.world);
    say("step %*ld/%ld | loss %.4f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s | mfu %.1f%% | %s | ETA %s%s\n",
        (int)snprintf(NULL, 0, "%ld", t->steps), s->step, t->steps, loss, norm, lr, elapsed * 1e3, total / elapsed,
        100 * mfu, phase_name[phase], duration(seconds_left(t, phase, window)).c_str(),
        skip ? " | update skipped: outlier" : "");
    log_line(t->main_log, "s:%ld trl:%.6f lr:%.8f norm:%.6f ms:%.2f tps:%.0f ph:%s", s->step - 1, loss, lr, norm,
             elapsed * 1e3, total / elapsed, phase_name[phase]);
    log_line(t->json_log, "{\"event\":\"step\",\"step\":%ld,\"loss\":%s,\"lr\":%.9g,\"norm\":%s,\"ms\":%.3f,"
             "\"host_ahead_ms\":%.3f,\"tokens_per_second\":%.1f,\"mfu\":%.4f,\"phase\":\"%s\",\"tokens\":%ld,"
             "\"train_s\":%.6f,\"wall_s\":%.6f,\"skipped\":%s}", s->step, json_number(loss).c_str(), lr,
             json_number(norm).c_str(), elapsed * 1e3, (now - queued) * 1e3, total / elapsed, mfu, phase_name[phase],
             s->step * total, s->train_s, wall_seconds(t), skip ? "true" : "false");
    return !stop_asked();
}

static void finish(Trainer* t) {
    const RunState* s = &t->state;
    int64_t total = t->config.total_batch_size;
    bool trained = !evaluates_only(&t->config);
    std::string path = text("%s/model.bin", t->config.out_dir), phases[2];
    if (trained) model_write(&t->model, path, s->step);
    if (trained) say("\n%-12s %8s %14s %12s %12s\n", "phase", "steps", "tokens", "seconds", "tok/s");
    for (int p = 0; p < 2; p++) {
        double rate = s->phase_s[p] > 0 ? s->phase_steps[p] * total / s->phase_s[p] : 0;
        int64_t steps = s->phase_steps[p], tokens = steps * total;
        if (steps) say("%-12s %8ld %14ld %12.1f %12.0f\n", phase_name[p], steps, tokens, s->phase_s[p], rate);
        phases[p] = text("{\"steps\":%ld,\"tokens\":%ld,\"seconds\":%.3f,\"tokens_per_second\":%.1f}", steps, tokens,
                         s->phase_s[p], rate);
    }
    say("wall-clock %s; %.2f GiB of device memory taken; final validation loss %s%s\n",
        duration(wall_seconds(t)).c_str(), gib(device_memory_taken()), t->val.sequences
        ? json_number(t->val_loss).c_str() : "none", trained ? ("; the model is in " + path).c_str() : "");
    log_line(t->json_log, "{\"event\":\"total\",\"steps\":%ld,\"tokens\":%ld,\"train_s\":%.6f,\"wall_s\":%.6f,"
             "\"phases\":{\"first\":%s,\"dense\":%s},\"final_val_loss\":%s,\"device_bytes\":%zu}", s->step,
             s->step * total, s->train_s, wall_seconds(t), phases[0].c_str(), phases[1].c_str(),
             json_number(t->val_loss).c_str(), device_memory_taken());
}

#ifndef TRAINER_NO_MAIN  // the tests include this file and have their own

int main(int argc, char** argv) {
    static Trainer trainer;
    Trainer* t = &trainer;
    int free_fd;  // where standard output or error are closed, no log may take their place
    while ((free_fd = open("/dev/null", O_RDWR)) >= 0 && free_fd <= STDERR_FILENO) continue;
    close(free_fd);
    std::set_new_handler([] { fatal("out of host memory"); });
    processes_start(&argc, &argv);
    for (int number : {SIGTERM, SIGINT, SIGHUP, SIGUSR1})  // what is ignored stays so: nohup
        if (signal(number, SIG_IGN) != SIG_IGN) signal(number, on_signal);
    signal(SIGXFSZ, SIG_IGN);  // a file past its size limit then fails with a message
    signal(SIGPIPE, SIG_IGN);  // whoever reads standard output may leave: tee, at a Ctrl-C, does before the checkpoint
    setup(t, argc, argv);
    const Config* c = &t->config;
    RunState* s = &t->state;

    restart_clock(t);
    bool stop = stop_asked();  // by a signal during the set-up
    while (!stop && s->step < t->steps) {
        Phase phase = phase_at(t, s->step);
        // A run that resumes past its switch, having never been dense, switches at once.
        bool late = phase == DENSE_PHASE && s->phase_steps[FIRST_PHASE] > 0 && s->phase_steps[DENSE_PHASE] == 0;
        bool at_switch = late || (t->switch_step > 0 && s->step == t->switch_step);
        if (at_switch) {
            say("step %ld | the switch: dense attention in every layer from here on\n", s->step);
            log_line(t->json_log, "{\"event\":\"switch\",\"step\":%ld,\"train_s\":%.6f}", s->step, s->train_s);
            memset(&s->loss, 0, sizeof s->loss);  // the loss jumps at the switch; that is no outlier
            memset(&s->norm, 0, sizeof s->norm);
        }
        if (at_switch || (c->val_every && s->step % c->val_every == 0))
            stop = !validate(t, at_switch && t->switch_step > 0 ? FIRST_PHASE : phase,
                             at_switch || (c->copy_every && s->step % (c->val_every * c->copy_every) == 0));
        if (stop) break;
        if (c->sample_every && s->step > 0 && s->step % c->sample_every == 0) write_sample(t);
        stop = !train_step(t);
        bool due = c->checkpoint_every && s->step % c->checkpoint_every == 0;
        if (s->step == t->steps || (due && !s->not_finite && t->saved != s->step)) save_checkpoint(t);
    }
    if (s->step == t->steps) stop = !validate(t, phase_at(t, t->steps > 0 ? t->steps - 1 : 0), true);
    if (stop) {
        if (t->saved != s->step && !evaluates_only(c)) save_checkpoint(t);
        say("stopped by signal at step %ld; --resume 1 goes on from here\n", s->step);
        processes_end();
        return 128 + (stop_signal ? stop_signal : SIGTERM);
    }
    if (c->sample_every) write_sample(t);
    finish(t);
    processes_end();
    return 0;
}

#endif
