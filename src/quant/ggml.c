/* Decoding GGML blocks (see ggml.h). One function a format; each says its layout in the order of the bytes. */
#include "quant/ggml.h"

#include <string.h>
#include <strings.h>

#include "base/half.h"

static float half_at(const uint8_t *p) { return aq_f16_to_f32((uint16_t)(p[0] | p[1] << 8)); }

/* ---- 32 weights: the low nibbles are the first half of the block, the high nibbles the second ---- */

static uint8_t nibble(const uint8_t *qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }
static uint32_t bits_at(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24; }

/* half d, 16 bytes of nibbles: d (q - 8) */
static void decode_q4_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    for (int i = 0; i < 32; i++) out[i] = d * (float)(nibble(b + 2, i) - 8);
}

/* half d, half m, 16 bytes of nibbles: d q + m */
static void decode_q4_1(const uint8_t *b, float *out) {
    float d = half_at(b), m = half_at(b + 2);
    for (int i = 0; i < 32; i++) out[i] = d * (float)nibble(b + 4, i) + m;
}

/* half d, 32 fifth bits, 16 bytes of nibbles: d (q - 16) */
static void decode_q5_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    uint32_t high = bits_at(b + 2);
    for (int i = 0; i < 32; i++) out[i] = d * (float)((int)(nibble(b + 6, i) | (high >> i & 1) << 4) - 16);
}

/* half d, half m, 32 fifth bits, 16 bytes of nibbles: d q + m */
static void decode_q5_1(const uint8_t *b, float *out) {
    float d = half_at(b), m = half_at(b + 2);
    uint32_t high = bits_at(b + 4);
    for (int i = 0; i < 32; i++) out[i] = d * (float)(nibble(b + 8, i) | (high >> i & 1) << 4) + m;
}

/* half d, 32 signed bytes: d q */
static void decode_q8_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)b[2 + i];
}

/* ---- 256 weights ---- */

/* Two bits of weight i: 128 weights lie in 32 bytes, 32 to each pair of bits. */
static int two_bits(const uint8_t *qs, int i) { return qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

/* 16 x (scale, min of 4 bits), 64 bytes of two bits, half d, half dmin; 16 weights share one scale and min: d scale q - dmin min */
static void decode_q2_k(const uint8_t *b, float *out) {
    float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int i = 0; i < 256; i++) {
        float s = d * (float)(b[i / 16] & 15), m = dmin * (float)(b[i / 16] >> 4);
        out[i] = s * (float)two_bits(b + 16, i) - m;
    }
}

/* 32 bytes of third bits, 64 bytes of two bits, 12 bytes of 16 six-bit scales, half d: d (scale - 32) (q - 4 without its third bit) */
static void decode_q3_k(const uint8_t *b, float *out) {
    const uint8_t *scales = b + 96;
    float d = half_at(b + 108);
    for (int i = 0; i < 256; i++) {
        int j = i / 16, low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4, high = scales[8 + j % 4] >> (j / 4 * 2) & 3;
        int q = two_bits(b + 32, i) - (b[i % 32] >> (i / 32) & 1 ? 0 : 4);
        float s = d * (float)((low | high << 4) - 32);
        out[i] = s * (float)q;
    }
}

/* Twelve bytes hold 8 scales and 8 mins of six bits: the first four of each in the low bits of bytes 0-3 and 4-7; of the last four the low nibbles in bytes
 * 8-11, the upper two bits on top of bytes 0-7. */
static void scale_min(const uint8_t *p, int j, int *scale, int *min) {
    *scale = j < 4 ? p[j] & 63 : (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
    *min = j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | (p[j] >> 6) << 4;
}

/* Four bits of weight i: 64 weights lie in 32 bytes. */
static int four_bits(const uint8_t *qs, int i) { return qs[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15; }

/* half d, half dmin, 12 bytes of scales and mins, 128 bytes of nibbles; 32 weights share one scale and min: d scale q - dmin min */
static void decode_q4_k(const uint8_t *b, float *out) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_min(b + 4, j, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        for (int i = 32 * j; i < 32 * j + 32; i++) out[i] = s * (float)four_bits(b + 16, i) - m;
    }
}

/* The same with 32 bytes of fifth bits before the nibbles. */
static void decode_q5_k(const uint8_t *b, float *out) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_min(b + 4, j, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        for (int i = 32 * j; i < 32 * j + 32; i++) out[i] = s * (float)(four_bits(b + 48, i) | (b[16 + i % 32] >> j & 1) << 4) - m;
    }
}

/* 128 bytes of nibbles (128 weights lie in 64 bytes), 64 bytes of two upper bits, 16 signed scales, half d: d scale (q - 32) */
static void decode_q6_k(const uint8_t *b, float *out) {
    float d = half_at(b + 208);
    for (int i = 0; i < 256; i++) {
        int low = b[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        float s = d * (float)(int8_t)b[192 + i / 16];
        out[i] = s * (float)((low | two_bits(b + 128, i) << 4) - 32);
    }
}

/* ---- the table ---- */

#define PLAIN(number, word, size, type) [number] = {number, word, 1, size, type, NULL}
#define BLOCK(number, word, values, size, fn) [number] = {number, word, values, size, AQ_DTYPE_OTHER, fn}

static const aq_ggml_format formats[] = {
    PLAIN(AQ_GGML_F32, "F32", 4, AQ_F32),
    PLAIN(AQ_GGML_F16, "F16", 2, AQ_F16),
    BLOCK(AQ_GGML_Q4_0, "Q4_0", 32, 18, decode_q4_0),
    BLOCK(AQ_GGML_Q4_1, "Q4_1", 32, 20, decode_q4_1),
    BLOCK(AQ_GGML_Q5_0, "Q5_0", 32, 22, decode_q5_0),
    BLOCK(AQ_GGML_Q5_1, "Q5_1", 32, 24, decode_q5_1),
    BLOCK(AQ_GGML_Q8_0, "Q8_0", 32, 34, decode_q8_0),
    BLOCK(9, "Q8_1", 32, 36, NULL),
    BLOCK(AQ_GGML_Q2_K, "Q2_K", 256, 84, decode_q2_k),
    BLOCK(AQ_GGML_Q3_K, "Q3_K", 256, 110, decode_q3_k),
    BLOCK(AQ_GGML_Q4_K, "Q4_K", 256, 144, decode_q4_k),
    BLOCK(AQ_GGML_Q5_K, "Q5_K", 256, 176, decode_q5_k),
    BLOCK(AQ_GGML_Q6_K, "Q6_K", 256, 210, decode_q6_k),
    BLOCK(15, "Q8_K", 256, 292, NULL),
    BLOCK(16, "IQ2_XXS", 256, 66, NULL),
    BLOCK(17, "IQ2_XS", 256, 74, NULL),
    BLOCK(18, "IQ3_XXS", 256, 98, NULL),
    BLOCK(19, "IQ1_S", 256, 50, NULL),
    BLOCK(20, "IQ4_NL", 32, 18, NULL),
    BLOCK(21, "IQ3_S", 256, 110, NULL),
    BLOCK(22, "IQ2_S", 256, 82, NULL),
    BLOCK(23, "IQ4_XS", 256, 136, NULL),
    PLAIN(AQ_GGML_I8, "I8", 1, AQ_I8),
    PLAIN(AQ_GGML_I16, "I16", 2, AQ_I16),
    PLAIN(AQ_GGML_I32, "I32", 4, AQ_I32),
    PLAIN(AQ_GGML_I64, "I64", 8, AQ_I64),
    PLAIN(AQ_GGML_F64, "F64", 8, AQ_F64),
    BLOCK(29, "IQ1_M", 256, 56, NULL),
    PLAIN(AQ_GGML_BF16, "BF16", 2, AQ_BF16),
    BLOCK(34, "TQ1_0", 256, 54, NULL),
    BLOCK(35, "TQ2_0", 256, 66, NULL),
    BLOCK(39, "MXFP4", 32, 17, NULL),
};

enum { N_FORMATS = sizeof formats / sizeof formats[0] };

const aq_ggml_format *aq_ggml_format_of(uint32_t type) { return type < N_FORMATS && formats[type].name ? &formats[type] : NULL; }

const aq_ggml_format *aq_ggml_format_named(const char *name) {
    for (uint32_t i = 0; i < N_FORMATS; i++)
        if (formats[i].name && strcasecmp(formats[i].name, name) == 0) return &formats[i];
    return NULL;
}

void aq_ggml_decode(const aq_ggml_format *format, const uint8_t *blocks, uint64_t n_blocks, float *out) {
    for (uint64_t i = 0; i < n_blocks; i++) format->decode(blocks + i * format->n_bytes, out + i * format->n_values);
}
