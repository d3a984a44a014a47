/* The ways to store a layer that the planner tries: bits x group size x form of the parameters, with the bytes each takes. */
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

static const int all_bits[] = {2, 4, 8, 16};
static const uint64_t all_groups[] = {32, 64, 128, 256};
enum { TWO_LEVEL_GROUP = 256 };

static uint64_t raw_bytes(const aq_tensor_info *t) { return t->scale_index >= 0 ? 2 * t->count : t->size_bytes; } /* fp8 with a scale is kept as BF16 */

uint64_t aq_plan_kept_bytes(const aq_tensor_info *t, uint64_t file_bytes) {
    return aq_store_predict(&(aq_store_predicted){.name = t->name, .shape = &t->shape, .data_bytes = raw_bytes(t), .file_bytes = file_bytes});
}

aq_status aq_plan_coded_bytes(const aq_tensor_info *t, const aq_quant_spec *spec, const aq_plan_extras *extras, uint64_t file_bytes, uint64_t *out,
                              aq_error *err) {
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_shape_matrix(&t->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&layout, spec, rows, cols, err);
    if (status != AQ_OK) return status;
    *out = aq_store_predict(&(aq_store_predicted){.name = t->name,
                                                  .shape = &t->shape,
                                                  .spec = spec,
                                                  .data_bytes = layout.codes_bytes,
                                                  .params_bytes = layout.params_bytes,
                                                  .n_equalization_scales = extras->equalization ? cols : 0,
                                                  .n_time_groups = extras->n_time_groups,
                                                  .file_bytes = file_bytes});
    return AQ_OK;
}

/* A list that grows to at most AQ_PLAN_MOST_CHOICES. */
typedef struct {
    aq_plan_choice *choices;
    size_t n;
} list;

/* Adds a candidate unless one of the same bits, form and groups is there (a group longer than the row is the row), or it cannot be stored so. */
static void add(list *l, const aq_quant_spec *spec, uint64_t cols) {
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, spec, 1, cols, NULL) != AQ_OK) return;
    uint64_t per_row = spec->group_size && cols ? (cols + spec->group_size - 1) / spec->group_size : 1;
    for (size_t i = 0; i < l->n; i++) {
        const aq_quant_spec *s = &l->choices[i].spec;
        uint64_t its = s->group_size && cols ? (cols + s->group_size - 1) / s->group_size : 1;
        if (s->bits == spec->bits && s->params == spec->params && s->method == spec->method && its == per_row) return;
    }
    if (l->n < AQ_PLAN_MOST_CHOICES) l->choices[l->n++] = (aq_plan_choice){.bits = spec->bits, .spec = *spec, .cosine = 1};
}

size_t aq_plan_list_choices(const aq_plan_options *o, const aq_plan_request *request, uint64_t cols, aq_method method, bool r2q, aq_plan_choice *out) {
    list l = {out, 0};
    const int *bits = o->bits ? o->bits : all_bits;
    const uint64_t *groups = o->groups ? o->groups : all_groups;
    size_t n_bits = o->bits ? o->n_bits : sizeof all_bits / sizeof *all_bits, n_groups = o->groups ? o->n_groups : sizeof all_groups / sizeof *all_groups;
    for (size_t b = 0; b < n_bits; b++) {
        if (bits[b] < request->least_bits) continue;
        if (bits[b] == 16) {
            if (l.n < AQ_PLAN_MOST_CHOICES) out[l.n++] = (aq_plan_choice){.bits = 16, .cosine = 1};
            continue;
        }
        aq_quant_spec spec = request->spec;
        spec.bits = bits[b];
        spec.axis = 1;
        spec.method = method;
        if (bits[b] < 8 && !spec.symmetric) {
            spec.params = AQ_PARAMS_TWO_LEVEL;
            spec.group_size = TWO_LEVEL_GROUP;
            add(&l, &spec, cols);
        }
        for (size_t g = 0; g < n_groups; g++) {
            spec.params = AQ_PARAMS_F16;
            spec.method = method;
            spec.group_size = groups[g];
            add(&l, &spec, cols);
            if (!r2q || bits[b] != 2) continue;
            spec.params = AQ_PARAMS_R2Q;
            spec.method = AQ_METHOD_R2Q;
            add(&l, &spec, cols);
        }
    }
    return l.n;
}

aq_status aq_plan_check_options(const aq_plan_options *o, aq_error *err) {
    for (size_t i = 0; o->bits && i < o->n_bits; i++)
        if (o->bits[i] != 2 && o->bits[i] != 4 && o->bits[i] != 8 && o->bits[i] != 16)
            return aq_fail(err, AQ_ERR_USAGE, "Invalid allowed bit width: %d. Must be 2, 4, 8, or 16", o->bits[i]);
    for (size_t i = 0; o->groups && i < o->n_groups; i++)
        if (o->groups[i] != 32 && o->groups[i] != 64 && o->groups[i] != 128 && o->groups[i] != 256)
            return aq_fail(err, AQ_ERR_USAGE, "Invalid group size: %llu. Must be 32, 64, 128, or 256", (unsigned long long)o->groups[i]);
    if (o->bits && o->n_bits == 0) return aq_fail(err, AQ_ERR_USAGE, "no bit width is allowed");
    if (o->groups && o->n_groups == 0) return aq_fail(err, AQ_ERR_USAGE, "no group size is available");
    if (!(o->min_cosine >= 0 && o->min_cosine <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid accuracy threshold. Must be between 0.0 and 1.0");
    return AQ_OK;
}
