/* NEON kernels: the template with registers of 4 floats. AArch64 has these instructions everywhere. */
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define VECTOR_BYTES 16
#define KERNELS_NAME "neon"
#define KERNELS aq_kernels_neon

typedef float32x4_t vf;
typedef float64x2_t vd;

/* Compare and select: vminq and vmaxq treat -0 and NaN in their own way. */
static inline vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline float v_reduce_min(vf v) { return vminvq_f32(v); }
static inline float v_reduce_max(vf v) { return vmaxvq_f32(v); }
static inline int v_all_zero(vf v) { return vminvq_u32(vceqzq_f32(v)) != 0; }

static inline vd vd_load(const float *p) { return vcvt_f64_f32(vld1_f32(p)); }
static inline vd vd_low(vf v) { return vcvt_f64_f32(vget_low_f32(v)); }
static inline vd vd_high(vf v) { return vcvt_high_f64_f32(v); }
static inline vd vd_max(vd a, vd b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
static inline vd vd_abs(vd a) { return vabsq_f64(a); }
static inline vf v_narrow(vd low, vd high) { return vcvt_high_f32_f64(vcvt_f32_f64(low), high); }

static inline vf half_load(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void half_store(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

static inline uint8x16_t code_bytes(const vf *q) {
    uint16x8_t low = vcombine_u16(vmovn_u32(vreinterpretq_u32_f32(q[0])), vmovn_u32(vreinterpretq_u32_f32(q[1])));
    uint16x8_t high = vcombine_u16(vmovn_u32(vreinterpretq_u32_f32(q[2])), vmovn_u32(vreinterpretq_u32_f32(q[3])));
    return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
}
static inline void codes_store(uint8_t *p, const vf *q) { vst1q_u8(p, code_bytes(q)); }

static inline void codes_pack4(uint8_t *p, const vf *q) {
    uint8x16_t codes = code_bytes(q);
    vst1_u8(p, vget_low_u8(vsliq_n_u8(vuzp1q_u8(codes, codes), vuzp2q_u8(codes, codes), 4)));
}

static inline void codes_pack2(uint8_t *p, const vf *q) {
    uint8x16_t codes = code_bytes(q), fours = vsliq_n_u8(vuzp1q_u8(codes, codes), vuzp2q_u8(codes, codes), 2);
    uint32_t bytes = vgetq_lane_u32(vreinterpretq_u32_u8(vsliq_n_u8(vuzp1q_u8(fours, fours), vuzp2q_u8(fours, fours), 4)), 0);
    memcpy(p, &bytes, 4);
}

static inline void codes_load(const uint8_t *p, vf *q) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    q[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
    q[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(low)));
    q[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
    q[3] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)));
}

typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
static inline vf v_code_at(vi words, int t, int bits) { return __builtin_convertvector(words >> t * bits & ((1 << bits) - 1), vf); }
static inline vf v_spread(const float *p, unsigned shift) { return (vf){p[0], p[1 >> shift], p[2 >> shift], p[3 >> shift]}; }

static inline float v_fold(const vf *lanes) {
    vf a = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
    float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}

static inline vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vd vd_fma(vd a, vd b, vd c) { return vfmaq_f64(c, a, b); }
enum { TILE_ROWS = 8, TILE_VECTORS = 3, DOT_OUTPUTS = 2, WORD_ROWS = 4, WORD_VECTORS = 3 };

/* The products stay apart until the end, four of a register's eight in each half. */
typedef struct v_sum {
    int32x4_t low, high;
} v_sum;
static inline v_sum v_add(v_sum sum, int16x8_t a, int16x8_t b) {
    return (v_sum){vmlal_s16(sum.low, vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(sum.high, a, b)};
}
#define v_add_products(sum, a, b) ((sum) = v_add(sum, (int16x8_t)(a), (int16x8_t)(b)))
static inline vi v_sum_of(v_sum sum) { return vpaddq_s32(sum.low, sum.high); }

#include "kernels/template.h"
