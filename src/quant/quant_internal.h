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

/* Smallest and largest value of a group. */
typedef struct aq_range {
    float lo, hi;
} aq_range;
/* False when a value is not finite. */
bool aq_values_range(const aq_kernels *k, const aq_values *values, aq_range *out);

/* Min-max pair, stored at `slot`. False when it does not fit half precision. */
bool aq_rtn_pair(const aq_quant_spec *spec, aq_range range, void *slot, aq_pair *out);
/* The same for one group of up to 256 values in sub-groups; out: one pair each. */
bool aq_rtn_two_level(const aq_kernels *k, const aq_quant_spec *spec, const aq_values *values, uint8_t *record, aq_pair *out);

/* Sixteen lanes of values and how the search sees them. One group of up to AQ_NARROW values a lane, transposed into x and h; or one large group
 * (`wide`) whose values are read where they lie and whose sums, folded, stand in every lane. */
enum { AQ_NARROW = 1024 };
typedef struct aq_lanes {
    const aq_kernels *kernels;
    const aq_values *wide; /* NULL: narrow */
    aq_block block;
    int q_max;
    float middle;                        /* symmetric: 2^(bits-1), else -1 */
    float low[AQ_LANES], high[AQ_LANES]; /* range of each lane */
    float weight[AQ_LANES];              /* sum of h */
    float x[AQ_LANES * AQ_NARROW], h[AQ_LANES * AQ_NARROW];
} aq_lanes;

/* Puts n <= 16 groups of one row each into lanes; the other lanes get weight 0. False when a value is not finite. */
bool aq_lanes_fill(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n);
bool aq_lanes_fill_wide(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *group);
/* The least-squares lines of the codes of s = clip * from->s, o = from->o + shift * s: into `out`, and into `best` where better (see fit in kernels.h). */
void aq_lanes_fit(const aq_lanes *l, const aq_lines *from, float clip, float shift, aq_lines *out, aq_lines *best);
void aq_lanes_sums(const aq_lanes *l, const aq_lines *lines, aq_fit_sums *out);
void aq_lanes_error(const aq_lanes *l, const float *s, const float *z, double *error);
/* Magnitudes at which the search's F32 sums can neither overflow nor vanish; groups beyond them keep their min-max parameters. */
#define AQ_SEARCH_MIN 0x1p-40f
#define AQ_SEARCH_MAX 0x1p40f
static inline float aq_range_reach(aq_range range) { return range.hi > -range.lo ? range.hi : -range.lo; }

/* The best lines that clip candidates and a least-squares fit of each find, before any rounding. */
void aq_search_lines(const aq_lanes *l, int bits, uint64_t group_size, aq_lines *best);

/* Pairs of the groups in the lanes (n of them; wide: 1), stored at slots[i]: min-max, then whatever is better, never a larger sum of h (x - v)^2.
 * Returns the number of groups before the first whose min-max pair does not fit half precision: n when all do. */
size_t aq_search_pairs(aq_lanes *l, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *slots);
/* Records of the groups whose sub-groups aq_lanes_fill_two_level put into the lanes. Returns as above. */
size_t aq_search_two_level(aq_lanes *l, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *records);
/* Groups of one size that are searched together at once; those of several rows or more than AQ_NARROW inputs come alone. */
uint64_t aq_search_capacity(const aq_quant_spec *spec);
/* Fills the lanes with n groups and stores their parameters; *stored is what aq_search_pairs returns. False when a value is not finite. */
bool aq_search_batch(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n, void *const *slots, size_t *stored);
/* Puts the sub-groups of n <= 16 / (sub-groups of a group) groups into lanes. False when a value is not finite. */
bool aq_lanes_fill_two_level(aq_lanes *l, const aq_kernels *k, const aq_quant_spec *spec, const aq_values *groups, size_t n);

#endif
