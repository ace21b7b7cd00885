// Pretrains GPT-2-class models at long context with Lighthouse attention, in one file of C/CUDA.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Lighthouse geometry --------------------------------------------------------------------------------------
// Symbols of arXiv 2605.06554: L levels, pooling factor p, budget k (topk), tile quota m. Level 0 holds the tokens,
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
        snprintf(why, why_size,
                 "a tile has %lld coarsest entries, fewer than tile = %d: lower topk to at most %lld, or levels or pool",
                 (long long)(T / unit), tile, (long long)(T / coarse / tile * tile));
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

#ifdef CPU_BACKEND
typedef float floatX;
#include "dev/cpu_ops.h"
using namespace cpu;
#endif
