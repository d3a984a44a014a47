/* A plan as an object and as a file (see plan.h).
 *
 * Layers stand in the order in which they were added; an index by name makes finding one independent of their number. A file is input like any other: its
 * JSON is checked by the common reader, every value by the same function that checks those of a caller.
 */
#include <arrowquant/plan.h>

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/draft.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define SCHEMA "arrowquant.plan/1"
#define MOST_BYTES (UINT64_C(256) << 20)
enum { DEPTH = 16, NAME_SIZE = 128 };

struct aq_plan {
    aq_plan_layer *layers;
    size_t n_layers, capacity;
    json_t *index; /* name -> number */
    char *summary;
};

aq_plan *aq_plan_create(void) {
    aq_plan *plan = aq_calloc(1, sizeof *plan);
    if (plan && (plan->index = json_object())) return plan;
    aq_free(plan);
    return NULL;
}

void aq_plan_free(aq_plan *plan) {
    if (!plan) return;
    for (size_t i = 0; i < plan->n_layers; i++) aq_free((char *)(uintptr_t)plan->layers[i].name);
    aq_free(plan->layers);
    json_decref(plan->index);
    free(plan->summary);
    aq_free(plan);
}

/* ---- checks ---- */

static const char *const params_words[] = {"auto", "f16", "f32", "two-level", "r2q", NULL};
static const char *const method_words[] = {"auto", "rtn", "search", "gptq", "r2q", NULL};

/* The word of a list that equals `word`; NULL when there is none. */
static const char *known_word(const char *const *words, const char *word) {
    for (; *words; words++)
        if (strcmp(*words, word) == 0) return *words;
    return NULL;
}

static bool one_of(int64_t value, const int64_t *values, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (values[i] == value) return true;
    return false;
}

static aq_status bad(aq_error *err, const char *name, const char *format, ...) AQ_PRINTF(3, 4);
static aq_status bad(aq_error *err, const char *name, const char *format, ...) {
    char shown[NAME_SIZE], what[2 * NAME_SIZE];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    return aq_fail(err, AQ_ERR_USAGE, "layer \"%s\" of the plan: %s", aq_escape(shown, sizeof shown, name, strlen(name)), what);
}

static aq_status check(const aq_plan_layer *l, aq_error *err) {
    static const int64_t bits[] = {0, 2, 4, 8, 16}, groups[] = {-1, 0, 16, 32, 64, 128, 256};
    if (!l->name || !l->name[0]) return aq_fail(err, AQ_ERR_USAGE, "a layer of the plan has no name");
    if (!one_of(l->bits, bits, 5)) return bad(err, l->name, "bits must be 2, 4, 8, or 16, found %d", l->bits);
    if (!one_of(l->group_size, groups, 7))
        return bad(err, l->name, "group_size must be 16, 32, 64, 128, 256, or 0 for a whole row, found %lld", (long long)l->group_size);
    if (l->params && !known_word(params_words, l->params))
        return bad(err, l->name, "params must be auto, f16, f32, two-level, or r2q, found \"%.60s\"", l->params);
    if (l->method && !known_word(method_words, l->method))
        return bad(err, l->name, "method must be auto, rtn, search, gptq, or r2q, found \"%.60s\"", l->method);
    return AQ_OK;
}

aq_status aq_plan_add(aq_plan *plan, const aq_plan_layer *layer, aq_error *err) {
    aq_status status = check(layer, err);
    if (status != AQ_OK) return status;
    if (json_object_get(plan->index, layer->name)) return bad(err, layer->name, "named twice");
    if (plan->n_layers == plan->capacity) {
        size_t capacity = plan->capacity ? 2 * plan->capacity : 64;
        aq_plan_layer *more = aq_realloc(plan->layers, capacity, sizeof *more);
        if (!more) return aq_fail_memory(err, capacity * sizeof *more, "the layers of a plan");
        plan->layers = more;
        plan->capacity = capacity;
    }
    aq_plan_layer own = *layer;
    own.name = aq_strdup(layer->name);
    own.params = layer->params ? known_word(params_words, layer->params) : NULL;
    own.method = layer->method ? known_word(method_words, layer->method) : NULL;
    if (!own.name || json_object_set_new(plan->index, own.name, json_integer((json_int_t)plan->n_layers)) != 0) {
        aq_free((char *)(uintptr_t)own.name);
        return aq_fail(err, AQ_ERR_MEMORY, "out of memory, or a layer of the plan has a name that is not UTF-8");
    }
    plan->layers[plan->n_layers++] = own;
    return AQ_OK;
}

aq_status aq_plan_set_summary(aq_plan *plan, const char *summary_json, aq_error *err) {
    json_t *value = NULL;
    aq_status status = aq_json_parse(&value, summary_json, strlen(summary_json), DEPTH, "summary of a plan", err);
    if (status == AQ_OK && !json_is_object(value)) status = aq_fail(err, AQ_ERR_USAGE, "the summary of a plan must be a JSON object");
    char *text = status == AQ_OK ? aq_json_dump(value, false) : NULL;
    if (status == AQ_OK && !text) status = aq_fail_memory(err, strlen(summary_json), "the summary of a plan");
    json_decref(value);
    if (status != AQ_OK) return status;
    free(plan->summary);
    plan->summary = text;
    return AQ_OK;
}

/* ---- reading ---- */

size_t aq_plan_n_layers(const aq_plan *plan) { return plan->n_layers; }
const aq_plan_layer *aq_plan_layer_at(const aq_plan *plan, size_t index) { return index < plan->n_layers ? &plan->layers[index] : NULL; }
const char *aq_plan_summary_json(const aq_plan *plan) { return plan->summary ? plan->summary : "{}"; }

static const aq_plan_layer *find(const aq_plan *plan, const char *name, size_t n) {
    const json_t *at = json_object_getn(plan->index, name, n);
    return at ? &plan->layers[json_integer_value(at)] : NULL;
}

const aq_plan_layer *aq_plan_find(const aq_plan *plan, const char *tensor) {
    size_t n = strlen(tensor);
    const aq_plan_layer *found = find(plan, tensor, n);
    if (!found && aq_text_ends_with(tensor, ".weight")) found = find(plan, tensor, n - strlen(".weight"));
    return found;
}

/* ---- files ---- */

static json_t *real(double value) { return isfinite(value) ? json_real(value) : json_null(); }
static json_t *word(const char *text) { return text ? json_string(text) : json_null(); }

static json_t *layer_json(const aq_plan_layer *l) {
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "bits", l->bits ? json_integer(l->bits) : json_null(), "group_size",
                     l->group_size >= 0 ? json_integer(l->group_size) : json_null(), "params", word(l->params), "method", word(l->method), "sensitivity",
                     real(l->sensitivity), "error", real(l->error), "size_bytes", l->size_bytes ? json_integer((json_int_t)l->size_bytes) : json_null());
}

static json_t *layers_json(const aq_plan *plan, json_t *(*make)(const aq_plan_layer *layer)) {
    json_t *layers = json_object();
    for (size_t i = 0; layers && i < plan->n_layers; i++) {
        if (json_object_set_new(layers, plan->layers[i].name, make(&plan->layers[i])) == 0) continue;
        json_decref(layers);
        return NULL;
    }
    return layers;
}

char *aq_plan_to_json(const aq_plan *plan) {
    json_t *summary = json_loads(aq_plan_summary_json(plan), 0, NULL);
    json_t *json = json_pack("{s:s, s:o, s:o}", "schema", SCHEMA, "summary", summary, "layers", layers_json(plan, layer_json));
    char *text = json ? aq_json_dump(json, true) : NULL;
    json_decref(json);
    return text;
}

void aq_plan_free_text(char *text) { free(text); }

static aq_status wrong_type(aq_error *err, const char *name, const char *key, const char *expected, const json_t *found) {
    char *text = json_dumps(found, JSON_ENCODE_ANY | JSON_COMPACT);
    aq_status status = bad(err, name, "%s%smust be %s, found %.60s", key, *key ? " " : "", expected, text ? text : "another type");
    free(text);
    return status;
}

/* What a file may leave out or set to null keeps the value that *out has. */
static aq_status read_integer(int64_t *out, const char *name, const json_t *layer, const char *key, aq_error *err) {
    const json_t *value = json_object_get(layer, key);
    if (!value || json_is_null(value)) return AQ_OK;
    if (!json_is_integer(value)) return wrong_type(err, name, key, "a whole number", value);
    *out = json_integer_value(value);
    return AQ_OK;
}

static aq_status read_word(const char **out, const char *name, const json_t *layer, const char *key, aq_error *err) {
    const json_t *value = json_object_get(layer, key);
    if (!value || json_is_null(value)) return AQ_OK;
    if (!json_is_string(value)) return wrong_type(err, name, key, "a word", value);
    *out = json_string_value(value);
    return AQ_OK;
}

static double real_of(const json_t *layer, const char *key) {
    const json_t *value = json_object_get(layer, key);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

static aq_status read_layer(aq_plan *plan, const char *name, const json_t *json, aq_error *err) {
    if (!json_is_object(json)) return wrong_type(err, name, "", "an object", json);
    int64_t bits = 0, size = 0;
    aq_plan_layer layer = {.name = name, .group_size = -1, .sensitivity = real_of(json, "sensitivity"), .error = real_of(json, "error")};
    aq_status status = read_integer(&bits, name, json, "bits", err);
    if (status == AQ_OK) status = read_integer(&layer.group_size, name, json, "group_size", err);
    if (status == AQ_OK) status = read_integer(&size, name, json, "size_bytes", err);
    if (status == AQ_OK) status = read_word(&layer.params, name, json, "params", err);
    if (status == AQ_OK) status = read_word(&layer.method, name, json, "method", err);
    if (status != AQ_OK) return status;
    layer.bits = bits < INT_MIN ? INT_MIN : bits > INT_MAX ? INT_MAX : (int)bits;
    layer.size_bytes = size > 0 ? (uint64_t)size : 0;
    return aq_plan_add(plan, &layer, err);
}

static aq_status read_plan(aq_plan *plan, json_t *json, aq_error *err) {
    json_t *layers = json_object_get(json, "layers"), *summary = json_object_get(json, "summary"), *layer;
    const json_t *said = json_object_get(json, "schema");
    const char *schema = json_is_string(said) ? json_string_value(said) : "?", *name;
    if (said && !json_is_null(said) && strcmp(schema, SCHEMA) != 0) {
        char shown[NAME_SIZE];
        return aq_fail(err, AQ_ERR_USAGE, "schema is \"%s\", expected \"" SCHEMA "\"", aq_escape(shown, sizeof shown, schema, strlen(schema)));
    }
    if (!json_is_object(layers)) return aq_fail(err, AQ_ERR_USAGE, "no plan: it needs \"layers\", an object of layers by name");
    aq_status status = AQ_OK;
    json_object_foreach(layers, name, layer) {
        if ((status = read_layer(plan, name, layer, err)) != AQ_OK) return status;
    }
    char *text = json_is_object(summary) ? aq_json_dump(summary, false) : NULL;
    if (text) status = aq_plan_set_summary(plan, text, err);
    free(text);
    return status;
}

aq_status aq_plan_parse(aq_plan **out, const char *text, size_t size, const char *name, aq_error *err) {
    *out = NULL;
    json_t *json;
    aq_status status = aq_json_parse(&json, text, size, DEPTH, name, err);
    if (status != AQ_OK) return status;
    aq_plan *plan = aq_plan_create();
    status = plan ? read_plan(plan, json, err) : aq_fail_memory(err, sizeof *plan, "a plan");
    json_decref(json);
    if (status == AQ_OK) {
        *out = plan;
        return AQ_OK;
    }
    aq_plan_free(plan);
    if (status != AQ_ERR_USAGE) return status;
    char shown[512];
    aq_context(err, "%s", aq_escape(shown, sizeof shown, name, strlen(name)));
    if (err) err->code = AQ_ERR_FORMAT; /* what a caller does wrong, a file holds wrong */
    return AQ_ERR_FORMAT;
}

aq_status aq_plan_load(aq_plan **out, const char *path, aq_error *err) {
    char *text;
    uint64_t size;
    *out = NULL;
    aq_status status = aq_file_read(&text, &size, path, MOST_BYTES, err);
    if (status != AQ_OK) return status;
    status = aq_plan_parse(out, text, size, path, err);
    aq_free(text);
    return status;
}

aq_status aq_plan_save(const aq_plan *plan, const char *path, bool overwrite, aq_error *err) {
    aq_status status = aq_draft_check(path, overwrite, err);
    if (status != AQ_OK) return status;
    char *text = aq_plan_to_json(plan);
    if (!text) return aq_fail_memory(err, 0, "the text of a plan");
    status = aq_file_write(path, text, strlen(text), err);
    free(text);
    return status;
}

static json_t *choice_json(const aq_plan_layer *l) { return json_pack("[i, I, o, o]", l->bits, (json_int_t)l->group_size, word(l->params), word(l->method)); }

aq_status aq_plan_fingerprint(const aq_plan *plan, char out[65], aq_error *err) {
    json_t *json = layers_json(plan, choice_json);
    char *text = json ? json_dumps(json, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    json_decref(json);
    if (!text) return aq_fail_memory(err, 0, "the fingerprint of a plan");
    aq_sha256_hex(text, strlen(text), out);
    free(text);
    return AQ_OK;
}
