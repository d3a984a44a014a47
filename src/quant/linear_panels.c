/* Products of activations with packed codes in F32: panels of the weight are dequantized as the matrix product wants them (kernels/gemm.h).
 *
 * The bits of aq_gemm_f32 on the dequantized matrix. Where pairs do not begin on words, rows are dequantized a block at a time and packed like any matrix.
 */
#include <string.h>

#include "base/error.h"
#include "kernels/gemm.h"
#include "quant/linear_internal.h"
#include "quant/quant_internal.h"
#include "quant/r2q.h"

enum { MOST_COLS = 64 }; /* of a panel, on any instruction set */

typedef struct source {
    const aq_linear_weight *weight;
    const aq_kernels *kernels;
} source;

static void unpack(const aq_kernels *k, int bits, const uint8_t *packed, size_t n, uint8_t *out) {
    if (bits == 8)
        memcpy(out, packed, n);
    else
        (bits == 4 ? k->unpack4 : k->unpack2)(packed, n, out);
}

static aq_pair load_pair(const source *s, uint64_t row, uint64_t index) {
    const aq_linear_weight *w = s->weight;
    aq_pair pair;
    if (!aq_linear_half_pairs(w)) {
        aq_pairs_load(&w->spec, &w->layout, w->params, aq_linear_param_row(w, row), index, 1, &pair);
        return pair;
    }
    float o;
    aq_linear_half_lines(s->kernels, w, row, index, 1, &pair.s, &o);
    pair.z = (0.0f - o) / pair.s;
    return pair;
}

/* Steps [step, step + n) of an output, which begin on a byte, one after the other. */
static void dequantize_part(const source *s, uint64_t row, uint64_t step, size_t n, float *out) {
    const aq_linear_weight *w = s->weight;
    uint8_t codes[AQ_GEMM_BLOCK];
    uint64_t pair_width = aq_linear_pair_width(w);
    unpack(s->kernels, w->spec.bits, aq_linear_codes_at(w, row, step), n, codes);
    for (size_t at = 0, next; at < n; at = next) {
        uint64_t pair = (step + at) / pair_width;
        next = (size_t)aq_least(n, (pair + 1) * pair_width - step);
        if (w->spec.params == AQ_PARAMS_R2Q) {
            float levels[4];
            aq_r2q stored = aq_r2q_load((const uint8_t *)w->params + aq_params_offset(&w->spec, &w->layout, aq_linear_param_row(w, row), pair));
            aq_r2q_levels(&stored, levels);
            for (size_t i = at; i < next; i++) out[i] = levels[codes[i]];
        } else {
            aq_pair p = load_pair(s, row, pair);
            s->kernels->dequantize(codes + at, next - at, p.s, p.z, out + at);
        }
    }
}

static void fill(void *context, uint64_t column, size_t width, uint64_t step, size_t depth, float *out) {
    const source *s = context;
    float rows[MOST_COLS * AQ_GEMM_BLOCK];
    for (size_t i = 0; i < width; i++) dequantize_part(s, column + i, step, depth, rows + i * depth);
    s->kernels->gemm_f32->pack_cols(out, rows, depth, 1, width, depth);
}

aq_status aq_linear_panels(const aq_linear_weight *w, const float *x, uint64_t n_rows, float *y, int n_threads, aq_error *err) {
    source s = {w, aq_kernels_get()};
    uint64_t outputs = w->layout.rows, inputs = w->layout.cols;
    for (uint64_t r = 0; r < n_rows; r++) {
        if (w->bias)
            memcpy(y + r * outputs, w->bias, outputs * sizeof *y);
        else
            memset(y + r * outputs, 0, outputs * sizeof *y);
    }
    if (!aq_gemm_filled_f32(n_rows, outputs, inputs, (aq_matrix_f32){x, inputs, 1}, fill, &s, y, outputs, n_threads))
        return aq_fail_memory(err, 0, "panels of a layer's weights");
    return AQ_OK;
}
