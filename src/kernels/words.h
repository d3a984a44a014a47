/* Words of inputs and of codes for products of integers (aq_word_kernels): a part of template.h. WORD_ROWS and WORD_VECTORS say what a tile holds. */
enum { WORD_COLS = WORD_VECTORS * W, CHAINS = 4 /* of sums of a row alone, where those of WORD_ROWS stand otherwise */ };
_Static_assert((int)CHAINS <= (int)WORD_ROWS, "there are so many");

/* The words of whole groups of 2 * half integers, half = 16 / bits. */
#define PAIR_UP(half)                                                                                                                                          \
    {                                                                                                                                                          \
        typedef uint32_t some __attribute__((vector_size(4 * (half))));                                                                                        \
        for (size_t i = 0; i < n; i += 2 * (half)) {                                                                                                           \
            some below, above;                                                                                                                                 \
            memcpy(&below, integers + i, sizeof below);                                                                                                        \
            memcpy(&above, integers + i + (half), sizeof above);                                                                                               \
            some word = (below & 0xFFFF) | above << 16;                                                                                                        \
            memcpy(words + i / 2, &word, sizeof word);                                                                                                         \
        }                                                                                                                                                      \
    }

static void pair_up(const int32_t *integers, size_t n, int bits, float *words) {
    if (bits == 4)
        PAIR_UP(4)
    else if (bits == 2)
        PAIR_UP(8)
    else
        PAIR_UP(2)
}

/* The exponent that gives inputs of at most `largest` 15 bits, rounding included, and the factor that takes them there. */
static inline float input_scale(float largest, float *factor) {
    uint32_t exponent = (aq_f32_bits(largest) + 0x100) >> 23;
    if (exponent < 15) exponent = 15;
    *factor = aq_f32_from_bits((268 - exponent) << 23);
    return aq_f32_from_bits((exponent - 14) << 23);
}

/* Integers are the lowest bits of 1.5 * 2^23 + x / scale, rounded by that addition (the division is exact where anything is left of it). */
static float pack_input_row(const float *x, size_t depth, int bits, float *words) {
    enum { FLOATS = AQ_WORD_BLOCK };
    float copy[FLOATS], factor;
    int32_t integers[FLOATS];
    size_t padded = (depth + AQ_LANES - 1) / AQ_LANES * AQ_LANES;
    if (padded > depth) {
        memset(copy + padded - AQ_LANES, 0, AQ_LANES * sizeof *copy);
        x = memcpy(copy, x, depth * sizeof *copy);
    }
    vf most[2] = {{0}, {0}};
    for (size_t i = 0, u = 0; i < padded; i += W, u ^= 1) most[u] = v_max((vf)((vi)v_load(x + i) & 0x7FFFFFFF), most[u]);
    float scale = input_scale(v_reduce_max(v_max(most[0], most[1])), &factor);
    for (size_t i = 0; i < padded; i += W) {
        vf shifted = v_load(x + i) * factor + 12582912.0f;
        memcpy(integers + i, &shifted, sizeof shifted);
    }
    pair_up(integers, padded, bits, words);
    return scale;
}

enum { MOST_WORDS = AQ_WORD_BLOCK / 2 };

/* The words of each row, one row after the other, as a tile reads them, and the sums of their integers. */
static inline __attribute__((always_inline)) void pack_words(const float *rows, size_t per, const aq_segments *segments, float *words, float *sums) {
    pack_f32(WORD_ROWS, words, rows, MOST_WORDS, 1, WORD_ROWS, segments->words);
    for (size_t at = 0, end = segments->first; at < segments->words; end += segments->width, sums += WORD_ROWS) {
        int32_t sum[WORD_ROWS] = {0};
        for (; at < end && at < segments->words; at++)
            for (size_t i = 0; i < WORD_ROWS; i++) {
                int32_t word;
                memcpy(&word, words + at * WORD_ROWS + i, sizeof word);
                sum[i] += per == 2 ? (int16_t)word + (word >> 16) : (int8_t)word + (int8_t)(word >> 8) + (int8_t)(word >> 16) + (word >> 24);
            }
        for (size_t i = 0; i < WORD_ROWS; i++) sums[i] = (float)sum[i];
    }
}

static void pack_inputs(const float *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *scales, float *sums) {
    float rows[WORD_ROWS * MOST_WORDS];
    for (size_t i = 0; i < WORD_ROWS; i++) {
        scales[i] = 0;
        if (x[i])
            scales[i] = pack_input_row(x[i], depth, bits, rows + i * MOST_WORDS);
        else
            memset(rows + i * MOST_WORDS, 0, MOST_WORDS * sizeof *rows);
    }
    pack_words(rows, 2, segments, words, sums);
}

static void pack_codes(const uint8_t *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *sums) {
    float rows[WORD_ROWS * MOST_WORDS];
    size_t padded = (depth + AQ_LANES - 1) / AQ_LANES * AQ_LANES;
    for (size_t i = 0; i < WORD_ROWS; i++) {
        int32_t integers[AQ_WORD_BLOCK];
        for (size_t l = 0; x[i] && l < depth; l++) integers[l] = x[i][l] - 128;
        for (size_t l = x[i] ? depth : 0; l < padded; l++) integers[l] = 0;
        pair_up(integers, padded, bits, rows + i * MOST_WORDS);
    }
    pack_words(rows, 2, segments, words, sums);
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

/* 16 bytes in the order of the codes of 128 / bits / 4 words. */
static inline bytes16 order_bytes(bytes16 x, int bits) {
    if (bits == 4) return __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    if (bits == 2) return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return x;
}

/* Less 128, a byte is one with its highest bit turned round. */
static inline void pack_bytes(const uint8_t *const *x, size_t depth, int bits, const aq_segments *segments, float *words, float *sums) {
    float rows[WORD_ROWS * MOST_WORDS];
    for (size_t i = 0; i < WORD_ROWS; i++)
        for (size_t l = 0; l < depth; l += sizeof(bytes16)) {
            bytes16 some;
            memset(&some, 0x80, sizeof some);
            if (x[i]) memcpy(&some, x[i] + l, depth - l < sizeof some ? depth - l : sizeof some);
            some = order_bytes(some ^ 0x80, bits);
            memcpy(rows + i * MOST_WORDS + l / 4, &some, sizeof some);
        }
    pack_words(rows, 4, segments, words, sums);
}

/* The 16 bytes of each of 4 rows, or what is left of them, as four words of four lanes. */
static inline void transpose_4_rows(const uint8_t *const rows[4], size_t bytes, float *out, size_t stride) {
    v4 r[4] = {{0}, {0}, {0}, {0}};
    for (size_t u = 0; u < 4; u++) {
        if (bytes >= sizeof r[u])
            memcpy(&r[u], rows[u], sizeof r[u]);
        else
            memcpy(&r[u], rows[u], bytes);
    }
    v4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    v4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    v4 words[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7), __builtin_shufflevector(c, d, 0, 1, 4, 5),
                   __builtin_shufflevector(c, d, 2, 3, 6, 7)};
    for (size_t u = 0; u < 4; u++) memcpy(out + u * stride, &words[u], sizeof words[u]);
}

/* Four words of each of W rows, those behind the first `bytes` bytes 0. */
static inline __attribute__((always_inline)) void words_of_rows(const uint8_t *const rows[W], size_t at, size_t bytes, vi words[4]) {
#ifdef HAS_TRANSPOSE_WORDS
    if (bytes >= 16) {
        v_transpose_words(rows, at, words);
        return;
    }
#endif
    float out[4 * W];
    for (size_t i = 0; i < W; i += 4) {
        const uint8_t *four[4] = {rows[i] + at, rows[i + 1] + at, rows[i + 2] + at, rows[i + 3] + at};
        transpose_4_rows(four, bytes, out + i, W);
    }
    memcpy(words, out, sizeof out);
}

typedef int16_t shorts __attribute__((vector_size(VECTOR_BYTES)));

static inline __attribute__((always_inline)) void unpack_codes_of(const aq_code_panel *p, int bits, size_t per, bool with_factors, float *out) {
    const size_t codes = 32 / (size_t)bits, n = (p->depth + codes - 1) / codes; /* of a word; words */
    const uint32_t ones = ((1u << bits) - 1) * (per == 2 ? 0x10001u : 0x1010101u);
    const vi mask = (int32_t)ones - (vi){0};
    for (size_t v = 0; v < WORD_COLS && v < p->width; v += W) {
        const uint8_t *rows[W];
        for (size_t i = 0; i < W; i++) rows[i] = p->codes + (v + i < p->width ? v + i : p->width - 1) * p->row_bytes;
        for (size_t word = 0; word < n; word += 4) {
            vi words[4];
            words_of_rows(rows, 4 * word, p->bytes - 4 * word, words);
            for (size_t u = 0; u < 4 && word + u < n; u++) {
                shorts factor = {0};
                if (with_factors) factor = (shorts)v_load(p->factors + (word + u) / p->factor_words * WORD_COLS + v);
                for (size_t t = 0; t < codes / per; t++) {
                    vi pairs = words[u] >> (int)t * bits & mask;
                    if (with_factors) pairs = (vi)((shorts)pairs * factor);
                    v_store(out + ((word + u) * (codes / per) + t) * WORD_COLS + v, (vf)pairs);
                }
            }
        }
    }
}

static void unpack_codes(const aq_code_panel *p, float *words) {
    if (p->bits == 4 && p->factors)
        unpack_codes_of(p, 4, 2, true, words);
    else if (p->bits == 4)
        unpack_codes_of(p, 4, 2, false, words);
    else if (p->bits == 2 && p->factors)
        unpack_codes_of(p, 2, 2, true, words);
    else if (p->bits == 2)
        unpack_codes_of(p, 2, 2, false, words);
    else
        unpack_codes_of(p, 8, 2, false, words);
}

static inline void unpack_bytes(const aq_code_panel *p, float *words) {
    if (p->bits == 4)
        unpack_codes_of(p, 4, 4, false, words);
    else if (p->bits == 2)
        unpack_codes_of(p, 2, 4, false, words);
    else
        unpack_codes_of(p, 8, 4, false, words);
}
