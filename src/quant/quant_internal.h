/* Inside the quant room: stored forms of parameters, rounding to nearest, the search. */
#ifndef AQ_QUANT_INTERNAL_H
#define AQ_QUANT_INTERNAL_H

#include <arrowquant/quant.h>

#include "kernels/kernels.h"

/* One pair as it dequantizes: w = (q - z) * s. */
typedef struct aq_pair {
    float s, z;
} aq_pair;

const aq_kernels *aq_quant_kernels(const aq_quant_spec *spec);
static inline int aq_quant_q_max(const aq_quant_spec *spec) { return (1 << spec->bits) - 1; }

/* ---- stored forms (params.c) ---- */

/* Half scales below this are refused: too few bits are left of them. */
#define AQ_MIN_HALF_SCALE 0x1p-20f

/* Rounds the line w = s q + o to its stored form at `slot` and gives the pair that comes back; symmetric specs replace o by -2^(bits-1) s.
 * False when it does not fit half precision. */
bool aq_pair_store(const aq_quant_spec *spec, double s, double o, void *slot, aq_pair *out);
aq_pair aq_pair_load(const aq_quant_spec *spec, const void *slot);
/* Bytes of one stored pair: 8 for f32, 4 for f16. */
uint64_t aq_pair_bytes(const aq_quant_spec *spec);

/* One group's record of a two-level matrix: s_j = S k_j, o_j = O m_j; k 1..2^p, m 0..2^p-1. */
enum { AQ_TWO_LEVEL_MAX_SUB = 16 };
typedef struct aq_two_level {
    uint16_t scale, offset; /* halves S and O */
    uint8_t k[AQ_TWO_LEVEL_MAX_SUB], m[AQ_TWO_LEVEL_MAX_SUB];
} aq_two_level;

uint64_t aq_two_level_width(int bits);                        /* inputs per sub-group: 16 at 2 bits, 32 at 4 */
int aq_two_level_field_bits(int bits);                        /* p, bits of k and of m: 4 at 2 bits, 6 at 4 */
uint64_t aq_two_level_record_bytes(int bits, uint64_t n_sub); /* bytes of one group's record */
void aq_two_level_write(const aq_two_level *g, int bits, uint64_t n_sub, uint8_t *record);
void aq_two_level_read(aq_two_level *g, int bits, uint64_t n_sub, const uint8_t *record);
aq_pair aq_two_level_pair(const aq_two_level *g, uint64_t j);
/* Bytes of parameters per row, axis 1. */
uint64_t aq_params_row_bytes(const aq_quant_spec *spec, const aq_quant_layout *layout);
/* Pairs of n_groups groups of row `row` from group `first` on (axis 0: row is the row group, first 0). Two-level: all their sub-groups. */
void aq_pairs_load(const aq_quant_spec *spec, const aq_quant_layout *layout, const void *params, uint64_t row, uint64_t first, uint64_t n_groups, aq_pair *out);
/* Where the parameters of a group start. */
uint64_t aq_params_offset(const aq_quant_spec *spec, const aq_quant_layout *layout, uint64_t row, uint64_t group);

/* ---- choosing (rtn.c, search.c, two_level.c) ---- */

/* Values of one group: n_rows rows of n values, each `stride` floats after the one before. `h` [n] weights the squared error, NULL for 1. */
typedef struct aq_values {
    const float *x, *h;
    uint64_t n, n_rows, stride;
} aq_values;

/* Min-max pair of the values, stored at `slot`. False when it does not fit half precision. */
bool aq_rtn_pair(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, void *slot, aq_pair *out);
/* The same, then improved. Never a larger sum of h (x - v)^2 than the min-max pair. */
bool aq_search_pair(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, void *slot, aq_pair *out);
/* One group of up to 256 values in sub-groups. */
bool aq_two_level_group(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, uint8_t *record, aq_pair *out);
/* sum h (x - v)^2 in double, in rising order, v as it dequantizes. */
double aq_pair_error(const aq_quant_spec *spec, const aq_values *values, aq_pair pair);

#endif
