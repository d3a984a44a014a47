/* AVX-512 kernels (F, BW, DQ, VL): the template with registers of 16 floats. Compiled with the matching -m flags. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VECTOR_BYTES 64
#define KERNELS_NAME "avx512"
#define KERNELS aq_kernels_avx512

typedef __m512 vf;
typedef __m512d vd;

static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline float v_reduce_min(vf v) { return _mm512_reduce_min_ps(v); }
static inline float v_reduce_max(vf v) { return _mm512_reduce_max_ps(v); }
#define HAS_REDUCE_16
/* Registers are folded in pairs, which leaves half as many with half the lanes of each, until lane j holds what is left of register j. */
#define REDUCE_16(name, op)                                                                                                                                    \
    static inline void name(const vf v[16], float *out) {                                                                                                      \
        vf quarters[4], pairs[2];                                                                                                                              \
        for (int i = 0; i < 4; i++) {                                                                                                                          \
            vf a = op(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xEE));                                                 \
            vf b = op(_mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x44), _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xEE));                                       \
            quarters[i] = op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));                                                              \
        }                                                                                                                                                      \
        for (int i = 0; i < 2; i++)                                                                                                                            \
            pairs[i] = op(_mm512_unpacklo_ps(quarters[2 * i], quarters[2 * i + 1]), _mm512_unpackhi_ps(quarters[2 * i], quarters[2 * i + 1]));                 \
        vf all = op(_mm512_shuffle_ps(pairs[0], pairs[1], 0x44), _mm512_shuffle_ps(pairs[0], pairs[1], 0xEE));                                                 \
        _mm512_storeu_ps(out, _mm512_add_ps(all, _mm512_setzero_ps()));                                                                                        \
    }
REDUCE_16(v_reduce_min_16, _mm512_min_ps)
REDUCE_16(v_reduce_max_16, _mm512_max_ps)
static inline int v_all_zero(vf v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xFFFF; }

static inline vd vd_load(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline vd vd_low(vf v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
static inline vd vd_high(vf v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
static inline vd vd_max(vd a, vd b) { return _mm512_max_pd(a, b); }
static inline vd vd_abs(vd a) { return _mm512_abs_pd(a); }
static inline vf v_narrow(vd low, vd high) { return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1); }

static inline vf half_load(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void half_store(uint16_t *p, vf v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

static inline __m128i code_bytes(const vf *q) { return _mm512_cvtepi32_epi8(_mm512_castps_si512(q[0])); }
#define HAS_CODES_PACK4
/* Each 64 bits hold two codes, which become their lowest byte: first, or second where the mask is 0. */
static inline void codes_pack4(uint8_t *p, const vf *q) {
    __m512i pairs = _mm512_castps_si512(q[0]);
    __m512i bytes = _mm512_ternarylogic_epi64(_mm512_set1_epi64(0x0F), pairs, _mm512_srli_epi64(pairs, 28), 0xCA);
    _mm_storel_epi64((__m128i *)p, _mm512_cvtepi64_epi8(bytes));
}
#include "kernels/codes_x86.h"
#define HAS_CODES_64
/* Packing saturates: what lies below 0 becomes 0, what lies above 255 that. */
static inline void codes_64(uint8_t *p, const vf *t, int bits) {
    __m512i low = _mm512_packus_epi32(_mm512_cvtps_epi32(t[0]), _mm512_cvtps_epi32(t[1]));
    __m512i high = _mm512_packus_epi32(_mm512_cvtps_epi32(t[2]), _mm512_cvtps_epi32(t[3]));
    __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); /* word 4 i + k holds codes 4 i to 4 i + 3 of t[k] */
    __m512i codes = _mm512_permutexvar_epi32(in_order, _mm512_min_epu8(_mm512_packus_epi16(low, high), _mm512_set1_epi8((char)((1 << bits) - 1))));
    if (bits == 8) {
        _mm512_storeu_si512(p, codes);
    } else if (bits == 4) {
        __m512i words = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001)); /* first + 16 second */
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(words));
    } else {
        __m512i words = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0401));
        _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_madd_epi16(words, _mm512_set1_epi32(0x00100001))));
    }
}
static inline void codes_load(const uint8_t *p, vf *q) { q[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }

typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
/* A table look-up takes the lowest 4 bits of an index. */
static inline vf v_code_at(vi words, int t, int bits) {
    if (bits == 8) { /* byte t of each word, before three zeros */
        __m512i order = _mm512_add_epi32(_mm512_set4_epi32((int)0xFFFFFF0C, (int)0xFFFFFF08, (int)0xFFFFFF04, (int)0xFFFFFF00), _mm512_set1_epi32(t));
        return _mm512_cvtepi32_ps(_mm512_shuffle_epi8((__m512i)words, order));
    }
    vf by_4 = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), by_2 = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    return _mm512_permutexvar_ps((__m512i)(words >> t * bits), bits == 4 ? by_4 : by_2);
}
static inline vf v_spread(const float *p, unsigned shift) {
    if (shift == 4) return _mm512_set1_ps(*p);
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srl_epi32(lanes, _mm_cvtsi32_si128((int)shift)), _mm512_loadu_ps(p));
}

static inline float v_fold(const vf *lanes) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(lanes[0]), _mm512_extractf32x8_ps(lanes[0], 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
enum { TILE_ROWS = 12, TILE_VECTORS = 2, DOT_OUTPUTS = 4, WORD_ROWS = 12, WORD_VECTORS = 2 };

#define HAS_TRANSPOSE_WORDS
/* Lane k of r[j] takes row 4 k + j; then each lane is a square of its own. */
static inline void v_transpose_words(const uint8_t *const rows[16], size_t at, vi words[4]) {
    __m512i r[4];
    for (size_t j = 0; j < 4; j++) {
        r[j] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[j] + at)));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x00F0, _mm_loadu_si128((const __m128i *)(rows[4 + j] + at)));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x0F00, _mm_loadu_si128((const __m128i *)(rows[8 + j] + at)));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0xF000, _mm_loadu_si128((const __m128i *)(rows[12 + j] + at)));
    }
    __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
    __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    words[0] = (vi)_mm512_unpacklo_epi64(a, b);
    words[1] = (vi)_mm512_unpackhi_epi64(a, b);
    words[2] = (vi)_mm512_unpacklo_epi64(c, d);
    words[3] = (vi)_mm512_unpackhi_epi64(c, d);
}

typedef vi v_sum;
#define v_add_products(sum, a, b) ((sum) = (vi)_mm512_add_epi32((__m512i)(sum), _mm512_madd_epi16((__m512i)(a), (__m512i)(b))))
#define v_sum_of(sum) (sum)

#include "kernels/template.h"

/* The same kernels, with one instruction for the products of integers, two or four in a word. In assembly language: the file is compiled for CPUs without it,
 * and GCC 12 spills the sums that it passes to the intrinsic. */
#define SUM vi
#define ADD_PRODUCTS(sum, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#define SUM_OF(sum) (sum)
#define PER 2
#define PACK_INPUTS pack_inputs
#define NAME(x) x##_vnni
#include "kernels/words_tile.h"

#define SUM vi
#define ADD_PRODUCTS(sum, a, b) __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b))
#define SUM_OF(sum) (sum)
#define PER 4
#define PACK_INPUTS NULL
#define NAME(x) x##_bytes
#include "kernels/words_tile.h"

#define KERNELS aq_kernels_avx512_vnni
#define WORDS kernels_vnni
#define BYTES kernels_bytes
#include "kernels/table.h"
