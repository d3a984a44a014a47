/* Stored forms of parameters (see quant.h and docs/format-params.md): rounding to them, reading them back, checking them. */
#include "quant/quant_internal.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/size.h"
#include "base/threads.h"
#include "quant/r2q.h"

const aq_kernels *aq_quant_kernels(const aq_quant_spec *spec) { return spec->no_simd ? &aq_kernels_scalar : aq_kernels_get(); }

static aq_pair f16_pair(float s, float o) { return (aq_pair){s, (0.0f - o) / s}; }

uint64_t aq_pair_bytes(const aq_quant_spec *spec) {
    if (spec->params == AQ_PARAMS_R2Q) return AQ_R2Q_BYTES;
    return spec->params == AQ_PARAMS_F32 ? 8 : 4;
}

bool aq_pair_store(const aq_quant_spec *spec, double s, double o, void *slot, aq_pair *out) {
    double middle = (double)(1 << (spec->bits - 1));
    if (spec->params == AQ_PARAMS_F32) {
        *out = (aq_pair){(float)s, spec->symmetric ? (float)middle : (float)((0.0 - o) / s)};
        memcpy(slot, out, 8);
        return out->s > 0 && isfinite(out->s) && isfinite(out->z);
    }
    uint16_t stored[2] = {aq_f32_to_f16((float)s), 0};
    float hs = aq_f16_to_f32(stored[0]);
    stored[1] = aq_f32_to_f16(spec->symmetric ? (float)-middle * hs : (float)o);
    float ho = aq_f16_to_f32(stored[1]);
    if (!(hs >= AQ_MIN_HALF_SCALE && hs < INFINITY && ho > -INFINITY && ho < INFINITY)) return false;
    memcpy(slot, stored, 4);
    *out = f16_pair(hs, ho);
    return true;
}

aq_pair aq_pair_load(const aq_quant_spec *spec, const void *slot) {
    if (spec->params == AQ_PARAMS_F32) {
        aq_pair pair;
        memcpy(&pair, slot, 8);
        return pair;
    }
    uint16_t stored[2];
    memcpy(stored, slot, 4);
    return f16_pair(aq_f16_to_f32(stored[0]), aq_f16_to_f32(stored[1]));
}

/* ---- two-level ---- */

uint64_t aq_two_level_width(int bits) { return bits == 2 ? 16 : 32; }
int aq_two_level_field_bits(int bits) { return bits == 2 ? 4 : 6; }

uint64_t aq_two_level_record_bytes(int bits, uint64_t n_sub) { return 4 + aq_div_up(n_sub * 2 * (uint64_t)aq_two_level_field_bits(bits), 8); }

/* Little-endian bit stream of fields: k_0 - 1, m_0, k_1 - 1, m_1, … */
void aq_two_level_write(const aq_two_level *g, int bits, uint64_t n_sub, uint8_t *record) {
    int p = aq_two_level_field_bits(bits), held = 0;
    uint32_t stream = 0;
    memcpy(record, &g->scale, 2);
    memcpy(record + 2, &g->offset, 2);
    record += 4;
    for (uint64_t j = 0; j < n_sub; j++) {
        stream |= (uint32_t)((g->k[j] - 1) | g->m[j] << p) << held;
        for (held += 2 * p; held >= 8; held -= 8, stream >>= 8) *record++ = (uint8_t)stream;
    }
    if (held > 0) *record = (uint8_t)stream;
}

void aq_two_level_read(aq_two_level *g, int bits, uint64_t n_sub, const uint8_t *record) {
    int p = aq_two_level_field_bits(bits), held = 0;
    uint32_t stream = 0, mask = (1u << p) - 1;
    memcpy(&g->scale, record, 2);
    memcpy(&g->offset, record + 2, 2);
    record += 4;
    for (uint64_t j = 0; j < n_sub; j++) {
        for (; held < 2 * p; held += 8) stream |= (uint32_t)*record++ << held;
        g->k[j] = (uint8_t)((stream & mask) + 1);
        g->m[j] = (uint8_t)(stream >> p & mask);
        stream >>= 2 * p;
        held -= 2 * p;
    }
}

aq_pair aq_two_level_pair(const aq_two_level *g, uint64_t j) {
    return f16_pair(aq_f16_to_f32(g->scale) * (float)g->k[j], aq_f16_to_f32(g->offset) * (float)g->m[j]);
}

/* ---- addressing ---- */

static uint64_t subs_per_group(const aq_quant_spec *spec) { return spec->group_size / aq_two_level_width(spec->bits); }

uint64_t aq_params_row_bytes(const aq_quant_spec *spec, const aq_quant_layout *layout) {
    if (spec->params != AQ_PARAMS_TWO_LEVEL) return layout->groups_per_row * aq_pair_bytes(spec);
    uint64_t full = layout->cols / spec->group_size, rest = layout->pairs_per_row - full * subs_per_group(spec);
    return full * aq_two_level_record_bytes(spec->bits, subs_per_group(spec)) + (rest ? aq_two_level_record_bytes(spec->bits, rest) : 0);
}

uint64_t aq_params_offset(const aq_quant_spec *spec, const aq_quant_layout *layout, uint64_t row, uint64_t group) {
    uint64_t group_bytes = spec->params == AQ_PARAMS_TWO_LEVEL ? aq_two_level_record_bytes(spec->bits, subs_per_group(spec)) : aq_pair_bytes(spec);
    return row * aq_params_row_bytes(spec, layout) + group * group_bytes;
}

void aq_pairs_load(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, uint64_t row, uint64_t first, uint64_t n_groups,
                   aq_pair *out) {
    for (uint64_t g = first; g < first + n_groups; g++) {
        const uint8_t *slot = (const uint8_t *)params + aq_params_offset(spec, layout, row, g);
        if (spec->params != AQ_PARAMS_TWO_LEVEL) {
            *out++ = aq_pair_load(spec, slot);
            continue;
        }
        uint64_t n_sub = layout->pairs_per_row - g * subs_per_group(spec);
        if (n_sub > subs_per_group(spec)) n_sub = subs_per_group(spec);
        aq_two_level record;
        aq_two_level_read(&record, spec->bits, n_sub, slot);
        for (uint64_t j = 0; j < n_sub; j++) *out++ = aq_two_level_pair(&record, j);
    }
}

/* ---- public ---- */

static uint64_t param_rows(const aq_quant_spec *spec, const aq_quant_layout *layout) { return spec->axis == 1 ? layout->rows : layout->n_groups; }
static uint64_t pairs_of_group(const aq_quant_spec *spec, const aq_quant_layout *layout, uint64_t group) {
    if (spec->params != AQ_PARAMS_TWO_LEVEL) return 1;
    uint64_t rest = layout->pairs_per_row - group * subs_per_group(spec);
    return rest < subs_per_group(spec) ? rest : subs_per_group(spec);
}

void aq_quant_pairs(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, float *scales, float *zero_points) {
    if (spec->params == AQ_PARAMS_R2Q) {
        for (uint64_t i = 0; i < layout->n_pairs; i++) scales[i] = zero_points[i] = NAN;
        return;
    }
    if (spec->params == AQ_PARAMS_F32) {
        const char *restrict at = params;
        float *restrict s = scales, *restrict z = zero_points; /* for the compiler, which may take several at once */
        for (uint64_t i = 0; i < layout->n_pairs; i++) {
            memcpy(s + i, at + 8 * i, 4);
            memcpy(z + i, at + 8 * i + 4, 4);
        }
        return;
    }
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t row = 0, i = 0; row < param_rows(spec, layout); row++)
        for (uint64_t group = 0; group < layout->groups_per_row; group++) {
            aq_pair pairs[AQ_TWO_LEVEL_MAX_SUB];
            aq_pairs_load(spec, layout, params, row, group, 1, pairs);
            for (uint64_t j = 0; j < pairs_of_group(spec, layout, group); j++, i++) {
                scales[i] = pairs[j].s;
                zero_points[i] = pairs[j].z;
            }
        }
    aq_fp_leave(fp);
}

static aq_status check_r2q(const aq_quant_layout *layout, const uint8_t *params, aq_error *err) {
    for (uint64_t i = 0; i < layout->n_groups; i++) {
        aq_r2q p = aq_r2q_load(params + i * AQ_R2Q_BYTES);
        if (!isfinite(p.m) || !isfinite(p.a1) || !isfinite(p.a2))
            return aq_fail(err, AQ_ERR_FORMAT, "parameters of group %llu: its levels must be finite", (unsigned long long)i);
    }
    return AQ_OK;
}

aq_status aq_quant_params_check(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, aq_error *err) {
    if (spec->params == AQ_PARAMS_R2Q) return check_r2q(layout, params, err);
    aq_status status = AQ_OK;
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t row = 0; status == AQ_OK && row < param_rows(spec, layout); row++)
        for (uint64_t group = 0; status == AQ_OK && group < layout->groups_per_row; group++) {
            aq_pair pairs[AQ_TWO_LEVEL_MAX_SUB];
            aq_pairs_load(spec, layout, params, row, group, 1, pairs);
            for (uint64_t j = 0; j < pairs_of_group(spec, layout, group); j++)
                if (!(pairs[j].s > 0 && isfinite(pairs[j].s) && isfinite(pairs[j].z))) {
                    status = aq_fail(err, AQ_ERR_FORMAT, "parameters of group %llu: the scale must be finite and above 0 and the zero point finite",
                                     (unsigned long long)row * layout->groups_per_row + group);
                    break;
                }
        }
    aq_fp_leave(fp);
    return status;
}
