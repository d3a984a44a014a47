/* The schema (see schema.h). Lists have the standard three levels; structs are optional groups, null where a tensor has nothing to say. */
#include "store/schema.h"

#include <errno.h>

#define STRING CARQUET_PHYSICAL_BYTE_ARRAY
#define BINARY CARQUET_PHYSICAL_BYTE_ARRAY
#define I32 CARQUET_PHYSICAL_INT32
#define I64 CARQUET_PHYSICAL_INT64
#define F32 CARQUET_PHYSICAL_FLOAT
#define F64 CARQUET_PHYSICAL_DOUBLE
#define BOOL CARQUET_PHYSICAL_BOOLEAN

const aq_column_info aq_columns[COL_COUNT] = {
    [COL_LAYER_NAME] = {"layer_name", STRING, false, true},
    [COL_DTYPE] = {"dtype", STRING, false, true},
    [COL_QUANT_TYPE] = {"quant_type", STRING, false, true},
    [COL_SHAPE] = {"shape", I64, true, true},
    [COL_DATA] = {"data", BINARY, false, true},
    [COL_NUM_PARAMS] = {"num_params", I64, false, true},
    [COL_SCALES] = {"scales", F32, true, true},
    [COL_ZERO_POINTS] = {"zero_points", F32, true, true},
    [COL_PARAMS] = {"params", BINARY, false, false},
    [COL_PARAMS_FORM] = {"params_form", STRING, false, false},
    [COL_QUANT_AXIS] = {"quant_axis", I32, false, true},
    [COL_GROUP_SIZE] = {"group_size", I32, false, true},
    [COL_BIT_WIDTH] = {"bit_width", I32, false, true},
    [COL_ROW_START] = {"row_start", I64, false, false},
    [COL_ROW_COUNT] = {"row_count", I64, false, false},
    [COL_HASH] = {"hash", STRING, false, false},
    [COL_IS_DIFFUSION_MODEL] = {"is_diffusion_model", BOOL, false, true},
    [COL_MODALITY] = {"modality", STRING, false, true},
    [COL_TIME_ENABLED] = {"time_aware_quant.enabled", BOOL, false, false},
    [COL_TIME_NUM_GROUPS] = {"time_aware_quant.num_time_groups", I32, false, false},
    [COL_TIME_START] = {"time_aware_quant.time_group_params.start", I32, true, false},
    [COL_TIME_END] = {"time_aware_quant.time_group_params.end", I32, true, false},
    [COL_TIME_SCALE] = {"time_aware_quant.time_group_params.scale", F32, true, false},
    [COL_TIME_ZERO_POINT] = {"time_aware_quant.time_group_params.zero_point", F32, true, false},
    [COL_TIME_GROUP_SIZE] = {"time_aware_quant.time_group_params.group_size", I32, true, false},
    [COL_SPATIAL_ENABLED] = {"spatial_quant.enabled", BOOL, false, false},
    [COL_SPATIAL_EQUALIZATION] = {"spatial_quant.channel_equalization", BOOL, false, false},
    [COL_SPATIAL_SMOOTHING] = {"spatial_quant.activation_smoothing", BOOL, false, false},
    [COL_SPATIAL_ALPHA] = {"spatial_quant.alpha", F32, false, false},
    [COL_SPATIAL_SCALES] = {"spatial_quant.equalization_scales", F32, true, false},
    [COL_SPATIAL_FOLDED] = {"spatial_quant.equalization_folded", BOOL, false, false},
    [COL_SPATIAL_HADAMARD] = {"spatial_quant.hadamard_group", I32, false, false},
    [COL_SPATIAL_SHIFT] = {"spatial_quant.folded_shift", F32, true, false},
    [COL_STATS_MEAN] = {"activation_stats.mean", F32, true, false},
    [COL_STATS_STD] = {"activation_stats.std", F32, true, false},
    [COL_STATS_MIN] = {"activation_stats.min", F32, true, false},
    [COL_STATS_MAX] = {"activation_stats.max", F32, true, false},
    [COL_COSINE] = {"quality.cosine", F64, false, false},
    [COL_SQNR_DB] = {"quality.sqnr_db", F64, false, false},
    [COL_OUTPUT_SQNR_DB] = {"quality.output_sqnr_db", F64, false, false},
    [COL_METHOD] = {"quality.method", STRING, false, false},
    [COL_FALLBACK_FROM] = {"quality.fallback_from", STRING, false, false},
    [COL_COMPARED_WITH] = {"quality.compared_with", STRING, false, false},
};

static bool leaf(carquet_schema_t *s, const char *name, carquet_physical_type_t type, bool text, bool optional, int32_t parent) {
    carquet_logical_type_t string = {.id = CARQUET_LOGICAL_STRING};
    carquet_field_repetition_t repetition = optional ? CARQUET_REPETITION_OPTIONAL : CARQUET_REPETITION_REQUIRED;
    return carquet_schema_add_column(s, name, type, text ? &string : NULL, repetition, 0, parent) == CARQUET_OK;
}

static bool list(carquet_schema_t *s, const char *name, carquet_physical_type_t type, int32_t parent) {
    return carquet_schema_add_list(s, name, type, NULL, CARQUET_REPETITION_OPTIONAL, 0, parent) >= 0;
}

static bool add_time_aware(carquet_schema_t *s) {
    int32_t group = carquet_schema_add_group(s, "time_aware_quant", CARQUET_REPETITION_OPTIONAL, 0);
    if (group < 0 || !leaf(s, "enabled", BOOL, false, true, group) || !leaf(s, "num_time_groups", I32, false, true, group)) return false;
    int32_t inner = carquet_schema_add_list_group(s, "time_group_params", CARQUET_REPETITION_OPTIONAL, group);
    int32_t element = inner < 0 ? -1 : carquet_schema_add_group(s, "element", CARQUET_REPETITION_REQUIRED, inner);
    return element >= 0 && leaf(s, "start", I32, false, false, element) && leaf(s, "end", I32, false, false, element) &&
           leaf(s, "scale", F32, false, false, element) && leaf(s, "zero_point", F32, false, false, element) &&
           leaf(s, "group_size", I32, false, false, element);
}

static bool add_spatial(carquet_schema_t *s) {
    int32_t group = carquet_schema_add_group(s, "spatial_quant", CARQUET_REPETITION_OPTIONAL, 0);
    return group >= 0 && leaf(s, "enabled", BOOL, false, true, group) && leaf(s, "channel_equalization", BOOL, false, true, group) &&
           leaf(s, "activation_smoothing", BOOL, false, true, group) && leaf(s, "alpha", F32, false, true, group) &&
           list(s, "equalization_scales", F32, group) && leaf(s, "equalization_folded", BOOL, false, true, group) &&
           leaf(s, "hadamard_group", I32, false, true, group) && list(s, "folded_shift", F32, group);
}

static bool add_stats(carquet_schema_t *s) {
    int32_t group = carquet_schema_add_group(s, "activation_stats", CARQUET_REPETITION_OPTIONAL, 0);
    return group >= 0 && list(s, "mean", F32, group) && list(s, "std", F32, group) && list(s, "min", F32, group) && list(s, "max", F32, group);
}

static bool add_quality(carquet_schema_t *s) {
    int32_t group = carquet_schema_add_group(s, "quality", CARQUET_REPETITION_OPTIONAL, 0);
    return group >= 0 && leaf(s, "cosine", F64, false, true, group) && leaf(s, "sqnr_db", F64, false, true, group) &&
           leaf(s, "output_sqnr_db", F64, false, true, group) && leaf(s, "method", STRING, true, true, group) &&
           leaf(s, "fallback_from", STRING, true, true, group) && leaf(s, "compared_with", STRING, true, true, group);
}

carquet_schema_t *aq_store_schema_create(void) {
    carquet_schema_t *s = carquet_schema_create(NULL);
    if (!s) return NULL;
    bool ok = leaf(s, "layer_name", STRING, true, false, 0) && leaf(s, "dtype", STRING, true, false, 0) && leaf(s, "quant_type", STRING, true, false, 0) &&
              list(s, "shape", I64, 0) && leaf(s, "data", BINARY, false, false, 0) && leaf(s, "num_params", I64, false, false, 0) &&
              list(s, "scales", F32, 0) && list(s, "zero_points", F32, 0) && leaf(s, "params", BINARY, false, true, 0) &&
              leaf(s, "params_form", STRING, true, true, 0) && leaf(s, "quant_axis", I32, false, true, 0) && leaf(s, "group_size", I32, false, true, 0) &&
              leaf(s, "bit_width", I32, false, true, 0) && leaf(s, "row_start", I64, false, true, 0) && leaf(s, "row_count", I64, false, true, 0) &&
              leaf(s, "hash", STRING, true, false, 0) && leaf(s, "is_diffusion_model", BOOL, false, false, 0) && leaf(s, "modality", STRING, true, true, 0) &&
              add_time_aware(s) && add_spatial(s) && add_stats(s) && add_quality(s) && carquet_schema_num_columns(s) == COL_COUNT;
    if (!ok) {
        carquet_schema_free(s);
        return NULL;
    }
    return s;
}

aq_status aq_store_carquet_fail(aq_error *err, const char *file, carquet_status_t status, const char *what) {
    int e = errno;
    if (status == CARQUET_ERROR_OUT_OF_MEMORY) return aq_fail(err, AQ_ERR_MEMORY, "%s: out of memory while it was written", file);
    if (status == CARQUET_ERROR_FILE_WRITE || status == CARQUET_ERROR_FILE_OPEN || status == CARQUET_ERROR_FILE_SEEK || status == CARQUET_ERROR_FILE_READ)
        return aq_fail_io(err, e ? e : EIO, file, "%s", what);
    return aq_fail_at(err, AQ_ERR_INTERNAL, file, NULL, "%s: %s", what, carquet_status_string(status));
}
