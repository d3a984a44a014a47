/* x^T x of a block of rows, added to the upper triangle of a matrix of doubles that lies in memory: what moment.c does with most rows.
 *
 * The rows are read once, packed for the tile of the matrix product (kernels.h) on both sides; then threads take groups of the triangle's rows. The products
 * are summed in F32 as aq_gemm_f32 would (chains over AQ_GEMM_BLOCK rows, added in their order), a few kB at a time, and added in double: the same bits at any
 * thread count and on every instruction set.
 */
#ifndef AQ_CALIBRATION_PRODUCTS_H
#define AQ_CALIBRATION_PRODUCTS_H

#include <stdbool.h>
#include <stdint.h>

#include "calibration/moment.h"

/* Where element (i, 0) of the triangle would lie; only those with j >= i are touched. */
typedef double *aq_triangle_row(const void *context, uint64_t i);

/* Adds the products of x [n_rows, n], rows `stride` floats apart, which count as one block (two or more where n > 8192); `room` is
 * where the packed rows lie. False: no memory, and nothing was
 * added; or stopped by `watch` (may be NULL), and some were. */
bool aq_products_add(const float *x, uint64_t n_rows, uint64_t stride, uint64_t n, aq_triangle_row *row, const void *context, aq_room *room, aq_watch *watch,
                     int n_threads);

#endif
