/* ArrowQuant time and activations: parameters of layer inputs per group of timesteps (algorithms 6), spatial methods (algorithms 5), and layers that run with
 * integer activations (W8A8, W4A8).
 *
 * Activations are coded with 8 bits, x = (q - z) s, q 0..255, z fractional. A static pair per time group is chosen from calibration; the sampler's timestep
 * picks it.
 */
#ifndef ARROWQUANT_TIME_H
#define ARROWQUANT_TIME_H

#include <arrowquant/linear.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Parameters of one time group; the timesteps [start, end). */
typedef struct aq_time_group {
    int32_t start, end;
    float scale, zero_point;
    int32_t group_size; /* of activation channels: 256 at the noisiest end to 64 at the cleanest */
} aq_time_group;

/* Boundaries: group g of G holds [g T / G, (g + 1) T / G); T < G gives T groups. starts and ends fill start, end of out [min(G, T)]. Returns their number. */
AQ_API size_t aq_time_groups_split(uint32_t n_timesteps, uint32_t n_groups, aq_time_group *out);
/* The group of a timestep; outside the table: the nearest. n >= 1. */
AQ_API size_t aq_time_group_find(const aq_time_group *groups, size_t n, int32_t timestep);
/* Channel group size by group: geometric from 64 (g = 0, clean) to 256 (g = n - 1, noise), rounded to 64, 128 or 256. One group alone: 128. */
AQ_API int32_t aq_time_group_channels(size_t group, size_t n_groups);

/* The pair of a range: s = (max - min) / 255, z = -min / s, the range widened to contain 0; equal ends at 0: s = 1, z = 0. Always finite, s > 0. NaN counts
 * as 0. */
AQ_API void aq_activation_pair(float min, float max, float *scale, float *zero_point);

/* What was seen of a layer's input at one timestep (or in one group): all channels together. std is that of the population. count 0: nothing. */
typedef struct aq_time_stats {
    int32_t timestep;
    uint64_t count; /* values */
    double mean, std;
    float min, max;
} aq_time_stats;
/* Of n values, which must be finite. */
AQ_API void aq_time_stats_of(const float *x, uint64_t n, int32_t timestep, aq_time_stats *out);
/* The statistics of both sets together, exactly (Chan et al. 1983); the timestep of `into` stays. */
AQ_API void aq_time_stats_combine(aq_time_stats *into, const aq_time_stats *part);
/* All channels of a layer together from sums per channel (aq_calib_group), the channels multiplied by s [n] first (NULL: 1). The timestep of `out` stays. */
AQ_API void aq_activation_channels(uint64_t count, const double *sum, const double *sum_sq, const float *min, const float *max, const float *s, uint64_t n,
                                   aq_time_stats *out);
/* Clip search: the ends of [*min, *max] (widened to contain 0) times 1, 0.975 … 0.3, each end for itself, with the least expected squared error of 8-bit codes
 * when the values of each part (channel or timestep) have exponential tails that reach to its minimum and maximum as often as its count says. */
AQ_API void aq_activation_clip(const aq_time_stats *parts, size_t n, float *min, float *max);

/* Parameters of groups whose start and end are filled: scale and zero point of the combined statistics of the timesteps in each (beyond the table: in the
 * nearest group), group size by aq_time_group_channels. clip: by aq_activation_clip over the timesteps. A group without statistics takes the pair of the
 * nearest one that has some. combined [n_groups] may be NULL. AQ_ERR_FORMAT names a timestep whose statistics cannot be; AQ_ERR_USAGE: nothing at all. */
AQ_API aq_status aq_time_groups_params(const aq_time_stats *stats, size_t n, bool clip, aq_time_group *groups, size_t n_groups, aq_time_stats *combined,
                                       aq_error *err);

/* Smoothing of neighbouring groups (enable_transition_optimization). u(t) of the three: t, t^2 (3 - 2t), a logistic from -6 to 6 brought to 0..1. */
typedef enum aq_smoothing { AQ_SMOOTH_LINEAR, AQ_SMOOTH_CUBIC, AQ_SMOOTH_SIGMOID } aq_smoothing;
/* Where the scale jumps by more than `threshold` (relative, as in the figures below), the smaller side is raised: its k-th group from the boundary, k = 1 ..
 * window, gets at least s = S + u(k / (window + 1)) (s_k - S), S the larger side's scale. Zero points move as far towards the larger side's as the wider range
 * allows. Ranges only grow, so nothing is clipped that was not before. AQ_ERR_MEMORY. */
AQ_API aq_status aq_time_groups_smooth(aq_time_group *groups, size_t n, double threshold, uint32_t window, aq_smoothing curve, aq_error *err);

/* How smooth the parameters are over time: per boundary, ds = |s_r - s_l| / s_l, dz = |z_r - z_l| / 255, score 1 - min(1, (ds + dz) / 2). Arrays [n - 1], each
 * may be NULL. Returns 1 - min(1, sum (ds + dz) / (2 (n - 1))); 1 for one group. */
AQ_API double aq_time_groups_smoothness(const aq_time_group *groups, size_t n, double *scores, double *scale_jumps, double *zero_jumps);

/* ---- spatial (DiTAS) ---- */

/* s_i = sqrt(max|W_i| / max|X_i|) per input channel; 1 where either is 0 or the quotient is not a normal number. w_absmax, x_absmax, out [n]. */
AQ_API void aq_equalization_scales(const float *w_absmax, const float *x_absmax, uint64_t n, float *out);
/* How far the inputs' range is taken to the weights. Codes of inputs share one step, which the widest few channels set: LIMIT_k scales these alone, down to
 * 2^(-k/4) times the widest one's range, s_i = min(1, 2^(-k/4) max_j max|X_j| / max|X_i|), and leaves the other columns of W as they are. */
typedef enum aq_equalize {
    AQ_EQUALIZE_NONE,
    AQ_EQUALIZE_HALF, /* the above */
    AQ_EQUALIZE_LIMIT_1,
    AQ_EQUALIZE_LIMIT_2,
    AQ_EQUALIZE_LIMIT_3,
    AQ_EQUALIZE_LIMIT_4,
    AQ_EQUALIZE_LIMIT_5,
    AQ_EQUALIZE_LIMIT_6
} aq_equalize;
AQ_API void aq_equalization_scales_by(aq_equalize strength, const float *w_absmax, const float *x_absmax, uint64_t n, float *out);
/* Largest magnitude per column of W [rows, n]; out is raised, so several slabs may be added (start with zeros). */
AQ_API void aq_column_absmax(const float *w, uint64_t rows, uint64_t n, float *out);
/* Temporal aggregation of max|X_i| over groups of timesteps, one group after the other into out [n]: the largest (momentum below 0), or the running average
 * m = momentum m + (1 - momentum) a, which begins with the first group and gives the last one the most weight. momentum below 1. */
AQ_API void aq_temporal_absmax(const float *group, uint64_t n, bool is_first, double momentum, float *out);
/* x[r, i] *= s[i], or /= s[i], in place. */
AQ_API void aq_scale_columns(float *x, uint64_t rows, uint64_t n, const float *s, bool divide);
/* out = x (1 - alpha) + mean(x) alpha along the last axis; x and out [rows, n] may be the same. alpha 0..1. */
AQ_API void aq_activation_smooth(const float *x, uint64_t rows, uint64_t n, float alpha, float *out);
/* Groups of `group_size` consecutive rows (channels), 8 bits: s = (max - min) / 255, z = -min / s, q = clamp(rint(v / s + z)). max = min: s = 1 and v exact.
 * Finite for finite values. codes [rows, n], scales and zero_points [ceil(rows / group_size)]; 0: one group. */
AQ_API void aq_channel_group_u8(const float *w, uint64_t rows, uint64_t n, uint64_t group_size, uint8_t *codes, float *scales, float *zero_points);

/* ---- integer execution ---- */

/* x [rows, n] to 8-bit codes: q = clamp(rint(x / s + z), 0, 255) in F32, halves to even; NaN gives 0. One pair for all (pair_stride 0), or one a row (1). */
AQ_API void aq_activation_quantize(const float *x, uint64_t rows, uint64_t n, const float *scales, const float *zero_points, size_t pair_stride,
                                   uint8_t *codes);
/* Dynamic: the pair of each row from its own range. scales, zero_points [rows]. */
AQ_API void aq_activation_quantize_dynamic(const float *x, uint64_t rows, uint64_t n, float *scales, float *zero_points, uint8_t *codes);

/* y [rows, layout->rows] = sum_i (q_w - z_w) s_w (q_x - z_x) s_x + bias, in exact integers and then one rounding order: the same bits at any thread count and
 * on every instruction set, and no row depends on the others or on how many they are. Weights of 2, 4 or 8 bits, axis 1, any parameter form.
 *
 * w = s q + o is the line of a pair of weights (linear.h), X = q_x - 128. A row of y starts as the bias, or 0; for each 256 inputs, in F32: p = 0; p =
 * fma(I, s, p) for their pairs in rising order, I the exact sum of X q; p = fma(o, sum of X, p) for the pairs; p = fma(C, 128 - z_x, p), C what p is for inputs
 * X = 1; y = fma(p, s_x, y). R2Q's levels are two planes of bits, w = 2 a1 b1 + 2 a2 b0 + o with o = m - a1 - a2: for each 256 inputs first y = fma(p, s_x, y)
 * for b1 without offsets, then as above for b0; C is the sum of both.
 *
 * In double instead, as time_linear.c has it: layers whose pairs do not begin on words of 32 bits of codes (odd group sizes), or with F32 parameters beyond the
 * bounds that linear.h names.
 *
 * What the layer's codes are of (equalization, rotation: store.h) the caller's x must be multiplied by before it is coded.
 * x_codes [rows, layout->cols]; pairs as in aq_activation_quantize. bias [layout->rows] or NULL. AQ_ERR_USAGE for axis 0, AQ_ERR_MEMORY. */
AQ_API aq_status aq_linear_integer(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, const uint8_t *x_codes,
                                   uint64_t rows, const float *x_scales, const float *x_zero_points, size_t pair_stride, const float *bias, int n_threads,
                                   float *y, aq_error *err);
/* The same of x [rows, inputs] that is coded on the way: by aq_activation_quantize, or with scales NULL by aq_activation_quantize_dynamic. */
AQ_API aq_status aq_linear_coded(const aq_linear_weight *weight, const float *x, uint64_t rows, const float *scales, const float *zero_points,
                                 size_t pair_stride, float *y, int n_threads, aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
