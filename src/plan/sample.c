/* The rows of a layer that candidates are measured on.
 *
 * Errors of rows are independent, so whole rows spread evenly over the layer estimate its relative error: a ratio of two sums over the same rows. Which rows
 * is a function of the shape alone. */
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "plan/plan_internal.h"

enum { LEAST_ROWS = 8 };

aq_plan_rows aq_plan_rows_of(const aq_tensor_info *t, uint64_t sample_values) {
    aq_plan_rows r;
    aq_shape_matrix(&t->shape, &r.rows, &r.cols);
    uint64_t n = r.cols ? sample_values / r.cols : 0;
    if (n < LEAST_ROWS) n = LEAST_ROWS;
    /* A sample of nearly all rows saves nothing. */
    r.n_rows = sample_values == 0 || n >= r.rows - r.rows / 4 ? r.rows : n;
    return r;
}

uint64_t aq_plan_row_at(const aq_plan_rows *rows, uint64_t index) {
    if (rows->n_rows == rows->rows) return index;
    /* Of n_rows stretches of equal length, the middle: index * rows may not fit 64 bits. */
    uint64_t whole = rows->rows / rows->n_rows, rest = rows->rows % rows->n_rows;
    return index * whole + index * rest / rows->n_rows + whole / 2;
}

aq_status aq_plan_read_rows(const aq_model *model, size_t tensor, const aq_plan_rows *rows, float *out, uint64_t *n_bad, aq_error *err) {
    if (n_bad) *n_bad = 0;
    for (uint64_t i = 0; i < rows->n_rows;) {
        uint64_t row = aq_plan_row_at(rows, i), n = 1;
        while (i + n < rows->n_rows && aq_plan_row_at(rows, i + n) == row + n) n++;
        aq_status status = aq_model_read_f32(model, tensor, row * rows->cols, n * rows->cols, out + i * rows->cols, err);
        if (status != AQ_OK) return status;
        i += n;
    }
    for (uint64_t i = 0; n_bad && i < rows->n_rows * rows->cols; i++)
        if ((aq_f32_bits(out[i]) & 0x7F800000) == 0x7F800000) {
            out[i] = 0;
            ++*n_bad;
        }
    return AQ_OK;
}
