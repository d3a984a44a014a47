/* Element types and shapes (see base.h). */
#include <string.h>

#include <arrowquant/base.h>

#include "base/size.h"

static const struct {
    const char *name;
    size_t size;
    bool is_float;
} g_dtypes[AQ_DTYPE_COUNT] = {
    [AQ_F64] = {"F64", 8, true},         [AQ_F32] = {"F32", 4, true},         [AQ_F16] = {"F16", 2, true},    [AQ_BF16] = {"BF16", 2, true},
    [AQ_F8_E4M3] = {"F8_E4M3", 1, true}, [AQ_F8_E5M2] = {"F8_E5M2", 1, true}, [AQ_I64] = {"I64", 8, false},   [AQ_I32] = {"I32", 4, false},
    [AQ_I16] = {"I16", 2, false},        [AQ_I8] = {"I8", 1, false},          [AQ_U64] = {"U64", 8, false},   [AQ_U32] = {"U32", 4, false},
    [AQ_U16] = {"U16", 2, false},        [AQ_U8] = {"U8", 1, false},          [AQ_BOOL] = {"BOOL", 1, false}, [AQ_DTYPE_OTHER] = {"?", 0, false},
};

size_t aq_dtype_size(aq_dtype dtype) { return (unsigned)dtype < AQ_DTYPE_COUNT ? g_dtypes[dtype].size : 0; }

const char *aq_dtype_name(aq_dtype dtype) { return (unsigned)dtype < AQ_DTYPE_COUNT ? g_dtypes[dtype].name : "?"; }

bool aq_dtype_is_float(aq_dtype dtype) { return (unsigned)dtype < AQ_DTYPE_COUNT && g_dtypes[dtype].is_float; }

aq_dtype aq_dtype_from_name(const char *name) {
    for (int i = 0; i < AQ_DTYPE_OTHER; i++)
        if (strcmp(g_dtypes[i].name, name) == 0) return (aq_dtype)i;
    return AQ_DTYPE_OTHER;
}

bool aq_shape_count(const aq_shape *shape, uint64_t *out) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < shape->rank; i++)
        if (!aq_mul(count, shape->dims[i], &count)) return false;
    *out = count;
    return true;
}

void aq_shape_matrix(const aq_shape *shape, uint64_t *rows, uint64_t *cols) {
    *rows = shape->rank < 2 ? 1 : shape->dims[0];
    *cols = 1;
    for (uint32_t i = shape->rank < 2 ? 0 : 1; i < shape->rank; i++) *cols *= shape->dims[i];
}
