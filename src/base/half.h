/* Scalar conversions between F32 and the short floating types; round to nearest, ties to even. The definition that every kernel matches bit for bit. */
#ifndef AQ_BASE_HALF_H
#define AQ_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t aq_f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float aq_f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float aq_bf16_to_f32(uint16_t h) { return aq_f32_from_bits((uint32_t)h << 16); }

/* NaN stays NaN (quiet), payload cut. */
static inline uint16_t aq_f32_to_bf16(float x) {
    uint32_t u = aq_f32_bits(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static inline float aq_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, frac = h & 0x3FF;
    if (exp == 31) return aq_f32_from_bits(sign | 0x7F800000 | frac << 13 | (frac ? 0x400000u : 0));
    if (exp == 0) { /* zero or subnormal: frac * 2^-24, exact in F32 */
        float x = (float)frac * 0x1p-24f;
        return aq_f32_from_bits(aq_f32_bits(x) | sign);
    }
    return aq_f32_from_bits(sign | (exp + 112) << 23 | frac << 13);
}

/* The same, without branches, of a half that is finite: stored parameters, which are checked when they are read (aq_quant_params_check). */
static inline float aq_finite_f16_to_f32(uint16_t h) {
    float size = aq_f32_from_bits((uint32_t)(h & 0x7FFF) << 13) * 0x1p112f;
    return aq_f32_from_bits(aq_f32_bits(size) | (uint32_t)(h & 0x8000) << 16);
}

/* Overflow gives infinity; NaN stays NaN (quiet), upper payload kept: what F16C and NEON do. */
static inline uint16_t aq_f32_to_f16(float x) {
    uint32_t u = aq_f32_bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7FFFFFFF;
    if (u > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (u >> 13 & 0x3FF));
    if (u >= 0x477FF000) return (uint16_t)(sign | 0x7C00); /* >= 65520 rounds to infinity */
    if (u < 0x38800000) {                                  /* below 2^-14: subnormal; adding 0.5 lets the FPU round at 2^-24 */
        float y = aq_f32_from_bits(u) + 0.5f;
        return (uint16_t)(sign | (aq_f32_bits(y) - 0x3F000000));
    }
    u += 0xFFF + (u >> 13 & 1);
    return (uint16_t)(sign | ((u - 0x38000000) >> 13));
}

/* OCP FP8: E4M3 has no infinity (0x7F and 0xFF are NaN), E5M2 is IEEE-like. */
static inline float aq_e4m3_to_f32(uint8_t v) {
    uint32_t sign = (uint32_t)(v & 0x80) << 24, exp = v >> 3 & 15, frac = v & 7;
    if ((v & 0x7F) == 0x7F) return aq_f32_from_bits(sign | 0x7FC00000);
    if (exp == 0) return aq_f32_from_bits(aq_f32_bits((float)frac * 0x1p-9f) | sign);
    return aq_f32_from_bits(sign | (exp + 120) << 23 | frac << 20);
}

static inline float aq_e5m2_to_f32(uint8_t v) { return aq_f16_to_f32((uint16_t)((uint16_t)v << 8)); }

#endif
