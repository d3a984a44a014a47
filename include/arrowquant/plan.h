/* ArrowQuant plan: which bits, group, parameters and method each layer gets (algorithms 7), as an object and as a file.
 *
 * A plan is made by the planner or by hand and carried out by `quantize --plan FILE`. The file is JSON (docs/json.md, "arrowquant.plan/1"); the plan of the
 * granularity tool, whose layers hold little more than a group size, is read as well: what a layer leaves out is as the configuration says.
 */
#ifndef ARROWQUANT_PLAN_H
#define ARROWQUANT_PLAN_H

#include <arrowquant/base.h>
#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One layer. Figures are NaN where they are not known; error is what was measured or estimated when the plan was made: tr(E H E^T) / tr(W H W^T), without
 * calibration |E|^2 / |W|^2. */
typedef struct aq_plan_layer {
    const char *name;   /* of the tensor, or without ".weight" */
    int bits;           /* 2, 4, 8; 16: kept as it is; 0: as configured */
    int64_t group_size; /* inputs per group; 0: whole row; -1: as configured */
    const char *params; /* word of the setting `params`, NULL: as configured */
    const char *method; /* word of the setting `method`, NULL: as configured */
    double sensitivity; /* 0..1 */
    double error;
    uint64_t size_bytes; /* stored bytes of the layer by the plan; 0: not known */
} aq_plan_layer;

typedef struct aq_plan aq_plan;

/* An empty plan. NULL: no memory. */
AQ_API aq_plan *aq_plan_create(void);
AQ_API void aq_plan_free(aq_plan *plan);
/* Adds a layer (strings are copied). AQ_ERR_USAGE: the name is there already, or a value is out of range. AQ_ERR_MEMORY. */
AQ_API aq_status aq_plan_add(aq_plan *plan, const aq_plan_layer *layer, aq_error *err);
/* What the file says beside the layers: figures of the plan as a whole, a JSON object. Replaces the one before. AQ_ERR_USAGE: no JSON object. */
AQ_API aq_status aq_plan_set_summary(aq_plan *plan, const char *summary_json, aq_error *err);

AQ_API size_t aq_plan_n_layers(const aq_plan *plan);
AQ_API const aq_plan_layer *aq_plan_layer_at(const aq_plan *plan, size_t index); /* strings live as long as the plan */
/* The layer of a tensor, with or without its ".weight"; NULL when the plan does not name it. */
AQ_API const aq_plan_layer *aq_plan_find(const aq_plan *plan, const char *tensor);
AQ_API const char *aq_plan_summary_json(const aq_plan *plan); /* "{}" when none was set */

/* Text of a plan, "arrowquant.plan/1", freed by aq_plan_free_text. NULL: no memory. */
AQ_API char *aq_plan_to_json(const aq_plan *plan);
AQ_API void aq_plan_free_text(char *text);
/* Reads one from memory; `name` for messages. AQ_ERR_FORMAT: no plan, or a value out of range, naming the layer. */
AQ_API aq_status aq_plan_parse(aq_plan **out, const char *text, size_t size, const char *name, aq_error *err);
/* The same from a file of at most 256 MiB, and to one (atomically). AQ_ERR_IO. */
AQ_API aq_status aq_plan_load(aq_plan **out, const char *path, aq_error *err);
AQ_API aq_status aq_plan_save(const aq_plan *plan, const char *path, bool overwrite, aq_error *err);
/* SHA-256 over the layers' bits, groups, parameters and methods: part of a run's fingerprint. 64 hex digits + NUL. AQ_ERR_MEMORY. */
AQ_API aq_status aq_plan_fingerprint(const aq_plan *plan, char out[65], aq_error *err);

#ifdef __cplusplus
}
#endif
#endif
