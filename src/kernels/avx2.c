/* AVX2, F16C and FMA kernels: the template with registers of 8 floats. Compiled with -mavx2 -mf16c -mfma. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VECTOR_BYTES 32
#define KERNELS_NAME "avx2"
#define KERNELS aq_kernels_avx2

typedef __m256 vf;
typedef __m256d vd;

static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline float v_reduce_min(vf v) {
    __m128 a = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_min_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_min_ss(a, _mm_shuffle_ps(a, a, 1)));
}
static inline float v_reduce_max(vf v) {
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}
static inline int v_all_zero(vf v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xFF; }

static inline vd vd_load(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline vd vd_low(vf v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
static inline vd vd_high(vf v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
static inline vd vd_max(vd a, vd b) { return _mm256_max_pd(a, b); }
static inline vd vd_abs(vd a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
static inline vf v_narrow(vd low, vd high) { return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)); }

static inline vf half_load(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void half_store(uint16_t *p, vf v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

static inline __m128i code_bytes(const vf *q) {
    __m256i low = _mm256_set1_epi32(0xFF);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(q[0]), low),
                                        _mm256_and_si256(_mm256_castps_si256(q[1]), low)); /* 128-bit halves of q0 q1 q0 q1 */
    words = _mm256_permute4x64_epi64(words, 0xD8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#include "kernels/codes_x86.h"

static inline void codes_load(const uint8_t *p, vf *q) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    q[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    q[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}

typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
static inline vf v_code_at(vi words, int t, int bits) { return __builtin_convertvector(words >> t * bits & (vi)_mm256_set1_epi32((1 << bits) - 1), vf); }
static inline vf v_spread(const float *p, unsigned shift) {
    if (shift >= 3) return _mm256_set1_ps(*p);
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_srl_epi32(lanes, _mm_cvtsi32_si128((int)shift)));
}

static inline float v_fold(const vf *lanes) {
    __m256 a = _mm256_add_ps(lanes[0], lanes[1]);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}

static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
enum { TILE_ROWS = 4, TILE_VECTORS = 3, DOT_OUTPUTS = 2, WORD_ROWS = 4, WORD_VECTORS = 2 };

#define HAS_TRANSPOSE_WORDS
static inline void v_transpose_words(const uint8_t *const rows[8], size_t at, vi words[4]) {
    __m256i r[4];
    for (size_t j = 0; j < 4; j++)
        r[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[j] + at))),
                                       _mm_loadu_si128((const __m128i *)(rows[4 + j] + at)), 1);
    __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
    __m256i c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    words[0] = (vi)_mm256_unpacklo_epi64(a, b);
    words[1] = (vi)_mm256_unpackhi_epi64(a, b);
    words[2] = (vi)_mm256_unpacklo_epi64(c, d);
    words[3] = (vi)_mm256_unpackhi_epi64(c, d);
}

typedef vi v_sum;
#define v_add_products(sum, a, b) ((sum) = (vi)_mm256_add_epi32((__m256i)(sum), _mm256_madd_epi16((__m256i)(a), (__m256i)(b))))
#define v_sum_of(sum) (sum)

#include "kernels/template.h"
