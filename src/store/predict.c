/* What a tensor will take in a container, before it is written: its values, and the page headers and footer entries of its row groups.
 *
 * The constants are bounds of what the writer produces; the test writes containers of many shapes and compares. Varints of sizes and offsets make entries
 * differ by a few bytes; a bound is what a budget needs. */
#include <arrowquant/store.h>
#include <string.h>

#include "base/size.h"
#include "store/schema.h"

enum {
    ROW_GROUP = 32 * COL_COUNT,    /* page headers and small values of a kept tensor without its name, dimensions and data */
    QUANTIZED = 60,                /* more of a quantized one: scheme, quality */
    DIMENSION = 9,                 /* of the shape */
    FOOTER_ENTRY = 54 * COL_COUNT, /* of a row group, offsets below 2^27 */
    OFFSETS = 2 * COL_COUNT,       /* offsets in it: each longer by a byte every 7 bits of the file's size */
    LIST_PAGES = 40,               /* more of parameters that are lists of floats: their levels are runs */
    TIME_GROUP_VALUES = 40         /* a time group: five values and four statistics */
};

static uint64_t longer_offsets(uint64_t file_bytes) {
    uint64_t n = 0;
    for (uint64_t rest = file_bytes >> 27; rest; rest >>= 7) n++;
    return n * OFFSETS;
}

static uint64_t plus(uint64_t a, uint64_t b) {
    uint64_t sum;
    return aq_add(a, b, &sum) ? sum : UINT64_MAX;
}

uint64_t aq_store_predict(const aq_store_predicted *t) {
    uint64_t parts = t->data_bytes > AQ_STORE_PART_BYTES ? aq_div_up(t->data_bytes, AQ_STORE_PART_BYTES) + 1 : 1;
    uint64_t each = ROW_GROUP + FOOTER_ENTRY + longer_offsets(t->file_bytes) + strlen(t->name) + (uint64_t)DIMENSION * t->shape->rank;
    if (t->spec) {
        each += QUANTIZED;
        if (t->spec->params == AQ_PARAMS_F32) each += LIST_PAGES;
        if (t->n_time_groups) each += 64 + t->n_time_groups * (uint64_t)TIME_GROUP_VALUES;
    }
    if (parts > 1) each += 2 * 16; /* the slab */
    if (t->n_equalization_scales) each += 32;
    if (t->n_folded_shift) each += 16;
    uint64_t values = plus(t->data_bytes, plus(t->params_bytes, 4 * (t->n_equalization_scales + t->n_folded_shift) * parts));
    return plus(values, parts * each);
}

uint64_t aq_store_predict_frame(uint64_t config_bytes) { return 4096 + config_bytes + config_bytes / 8; }
