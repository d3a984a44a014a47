/* Sizes that follow from a spec and a shape, and the names of methods and forms (see quant.h). */
#include "quant/quant_internal.h"

#include "base/error.h"
#include "base/size.h"

const char *aq_method_name(aq_method method) {
    switch (method) {
    case AQ_METHOD_RTN: return "rtn";
    case AQ_METHOD_SEARCH: return "search";
    case AQ_METHOD_GPTQ: return "gptq";
    case AQ_METHOD_R2Q: return "r2q";
    }
    return "?";
}

const char *aq_params_form_name(aq_params_form form) {
    switch (form) {
    case AQ_PARAMS_F16: return "f16";
    case AQ_PARAMS_F32: return "f32";
    case AQ_PARAMS_TWO_LEVEL: return "two-level";
    case AQ_PARAMS_R2Q: return "r2q";
    }
    return "?";
}

static aq_status check_spec(const aq_quant_spec *spec, aq_error *err) {
    if (spec->bits != 2 && spec->bits != 4 && spec->bits != 8) return aq_fail(err, AQ_ERR_USAGE, "Invalid bit_width: %d. Must be 2, 4, or 8", spec->bits);
    if (spec->axis != 0 && spec->axis != 1) return aq_fail(err, AQ_ERR_USAGE, "Invalid axis: %d. Must be 0 or 1", spec->axis);
    if (spec->method < AQ_METHOD_RTN || spec->method > AQ_METHOD_R2Q) return aq_fail(err, AQ_ERR_USAGE, "Invalid method: %d", (int)spec->method);
    if (spec->method == AQ_METHOD_R2Q && spec->params != AQ_PARAMS_R2Q)
        return aq_fail(err, AQ_ERR_USAGE, "method 'r2q' needs r2q parameters, not '%s'", aq_params_form_name(spec->params));
    if (spec->params == AQ_PARAMS_F16 || spec->params == AQ_PARAMS_F32) return AQ_OK;
    if (spec->params == AQ_PARAMS_R2Q) {
        if (spec->bits == 2 && spec->axis == 1 && !spec->symmetric) return AQ_OK;
        return aq_fail(err, AQ_ERR_USAGE, "r2q parameters need 2 bits and groups along the inputs, and are not symmetric");
    }
    if (spec->params != AQ_PARAMS_TWO_LEVEL) return aq_fail(err, AQ_ERR_USAGE, "Invalid parameter form: %d", (int)spec->params);
    if (spec->bits == 8 || spec->axis != 1) {
        aq_fail(err, AQ_ERR_USAGE, "two-level parameters need 2 or 4 bits and groups along the inputs, not %d bits on axis %d", spec->bits, spec->axis);
        aq_hint(err, "use f16 parameters");
        return AQ_ERR_USAGE;
    }
    uint64_t width = aq_two_level_width(spec->bits);
    if (spec->group_size == 0 || spec->group_size > 256 || spec->group_size % width != 0) {
        aq_fail(err, AQ_ERR_USAGE, "Invalid group_size: %llu. With two-level parameters at %d bits it must be a multiple of %llu up to 256",
                (unsigned long long)spec->group_size, spec->bits, (unsigned long long)width);
        aq_hint(err, "use a group size of 256, or f16 parameters");
        return AQ_ERR_USAGE;
    }
    return AQ_OK;
}

aq_status aq_quant_layout_init(aq_quant_layout *out, const aq_quant_spec *spec, uint64_t rows, uint64_t cols, aq_error *err) {
    *out = (aq_quant_layout){.rows = rows, .cols = cols};
    aq_status status = check_spec(spec, err);
    if (status != AQ_OK) return status;

    uint64_t bits_per_row, count, pairs_bytes;
    bool ok = aq_mul(rows, cols, &count) && aq_mul(count, 4, &count) && aq_mul(cols, (uint64_t)spec->bits, &bits_per_row);
    if (ok) {
        out->row_bytes = aq_div_up(bits_per_row, 8);
        ok = aq_mul(rows, out->row_bytes, &out->codes_bytes);
    }
    if (spec->axis == 1) {
        uint64_t size = spec->group_size ? spec->group_size : cols;
        bool two_level = spec->params == AQ_PARAMS_TWO_LEVEL;
        out->groups_per_row = cols ? aq_div_up(cols, size) : 0;
        out->pair_width = two_level ? aq_two_level_width(spec->bits) : size;
        out->pairs_per_row = cols ? aq_div_up(cols, out->pair_width) : 0;
        ok = ok && aq_mul(rows, out->groups_per_row, &out->n_groups) && aq_mul(rows, out->pairs_per_row, &out->n_pairs);
    } else {
        uint64_t size = spec->group_size ? spec->group_size : rows;
        out->groups_per_row = out->pairs_per_row = 1;
        out->pair_width = cols;
        out->n_groups = out->n_pairs = rows && cols ? aq_div_up(rows, size) : 0;
    }
    /* Eight bytes a pair bound every form and the caller's expanded pairs. */
    ok = ok && aq_mul(out->n_pairs, 8, &pairs_bytes);
    if (!ok) return aq_fail(err, AQ_ERR_FORMAT, "a matrix of %llu x %llu is too large", (unsigned long long)rows, (unsigned long long)cols);
    if (spec->params == AQ_PARAMS_TWO_LEVEL)
        ok = aq_mul(rows, aq_params_row_bytes(spec, out), &out->params_bytes);
    else
        ok = aq_mul(out->n_pairs, aq_pair_bytes(spec), &out->params_bytes);
    if (!ok) return aq_fail(err, AQ_ERR_FORMAT, "a matrix of %llu x %llu is too large", (unsigned long long)rows, (unsigned long long)cols);
    return AQ_OK;
}
