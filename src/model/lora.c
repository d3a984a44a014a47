/* Adapters (LoRA): low-rank changes that are added to the weights as these are read, in F32, before anything is quantized.
 *
 * An adapter holds for some layers a matrix `down` [rank, inputs] and a matrix `up` [outputs, rank]: W + strength * alpha / rank * up down. Convolutions are
 * matrices over the flattened kernel, as everywhere here. Keys as kohya's scripts name them (`lora_unet_blocks_0_attn_to_q.lora_down.weight`,
 * `.lora_up.weight`,
 * `.alpha`) and as PEFT and diffusers do (`transformer.blocks.0.attn.to_q.lora_A.weight`, `.lora_B.weight`; the alpha of all layers in adapter_config.json
 * or the header's metadata). Layers are found by name with dots and underscores taken as one; every key must find its layer. Keys of text encoders belong to
 * another component and are told of. Other kinds of adapters (LoHa, LoKr, DoRA, mid matrices) are refused by name.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/size.h"
#include "kernels/gemm.h"
#include "model/internal.h"

/* One layer's change. */
typedef struct low_rank {
    size_t down, up; /* tensors of the adapter */
    uint64_t rank;
    float scale;  /* strength * alpha / rank */
    int64_t next; /* of the same weight, in the order of the adapters; -1: none */
    struct aq_model *adapter;
} low_rank;

struct aq_lora {
    aq_adapter_info *infos;
    aq_model **adapters;
    char **paths;
    size_t n, n_capacity;
    low_rank *changes;
    size_t n_changes, changes_capacity;
};

/* ---- "FILE:STRENGTH" ---- */

/* A decimal number without exponent, independent of the locale. */
static bool parse_decimal(const char *text, double *out) {
    double value = 0, unit = 1;
    bool negative = *text == '-', digits = false;
    if (*text == '-' || *text == '+') text++;
    for (; *text >= '0' && *text <= '9'; text++, digits = true) value = value * 10 + (*text - '0');
    if (*text == '.')
        for (text++; *text >= '0' && *text <= '9'; text++, digits = true) value = value * 10 + (*text - '0'), unit *= 10;
    *out = (negative ? -value : value) / unit;
    return digits && !*text && value < 1e15;
}

/* Splits at the last colon where a number follows; a file of the whole name goes first. */
static aq_status split_strength(const char *text, char **path, double *strength, aq_error *err) {
    const char *colon = strrchr(text, ':');
    *strength = 1;
    if (!(*path = aq_strdup(text))) return aq_fail_memory(err, strlen(text), "a path");
    if (!colon || aq_path_exists(text)) return AQ_OK;
    if (!parse_decimal(colon + 1, strength))
        return aq_fail(err, AQ_ERR_USAGE, "lora: \"%s\" is no strength, expected FILE or FILE:STRENGTH as in style.safetensors:0.8", colon + 1);
    (*path)[colon - text] = 0;
    return AQ_OK;
}

/* ---- keys ---- */

typedef enum { PART_NONE, PART_DOWN, PART_UP, PART_ALPHA, PART_OTHER } key_part;

static const struct {
    const char *suffix;
    key_part part;
} g_suffixes[] = {
    {".lora_down.weight", PART_DOWN},
    {".lora_up.weight", PART_UP},
    {".alpha", PART_ALPHA},
    {".lora_A.weight", PART_DOWN},
    {".lora_B.weight", PART_UP},
    {".lora_A.default.weight", PART_DOWN},
    {".lora_B.default.weight", PART_UP},
    {".lora.down.weight", PART_DOWN},
    {".lora.up.weight", PART_UP},
    {".lora_linear_layer.down.weight", PART_DOWN},
    {".lora_linear_layer.up.weight", PART_UP},
};

/* Parts of adapters of other kinds. */
static const char *const g_other_kinds[] = {"lora_mid", "hada_w1", "hada_w2",          "lokr_w1",    "lokr_w2", "dora_scale", "lora_magnitude_vector",
                                            "diff",     "diff_b",  "lora_embedding_A", "oft_blocks", "oft_diag"};

static key_part split_key(const char *name, size_t *n_base) {
    for (size_t i = 0; i < sizeof g_suffixes / sizeof *g_suffixes; i++) {
        if (!aq_text_ends_with(name, g_suffixes[i].suffix)) continue;
        *n_base = strlen(name) - strlen(g_suffixes[i].suffix);
        return g_suffixes[i].part;
    }
    return PART_NONE;
}

static const char *other_kind(const char *name) {
    for (size_t i = 0; i < sizeof g_other_kinds / sizeof *g_other_kinds; i++) {
        const char *at = strstr(name, g_other_kinds[i]);
        size_t n = strlen(g_other_kinds[i]);
        if (at && at > name && at[-1] == '.' && (at[n] == 0 || at[n] == '.' || at[n] == '_')) return g_other_kinds[i];
    }
    return NULL;
}

/* Underscores for dots: kohya's names have no dots. At most `size` - 1 bytes. */
static void flatten(const char *name, size_t n, char *out, size_t size) {
    size_t length = n < size - 1 ? n : size - 1;
    for (size_t i = 0; i < length; i++) out[i] = name[i] == '.' ? '_' : name[i];
    out[length] = 0;
}

/* Behind the prefix of a whole checkpoint. */
static const char *own_name(const char *flat) {
    static const char prefix[] = "model_diffusion_model_";
    return strncmp(flat, prefix, sizeof prefix - 1) == 0 ? flat + sizeof prefix - 1 : flat;
}

static bool is_text_encoder(const char *name) {
    return strncmp(name, "lora_te", 7) == 0 || strncmp(name, "text_encoder", 12) == 0 || strncmp(name, "lora_prior_te", 13) == 0;
}

/* ---- layers of the model by normalized name ---- */

typedef struct {
    const char *name; /* first: for the name table */
    size_t tensor;
    bool ambiguous;
} layer_name;

typedef struct {
    layer_name *items;
    size_t n;
    char *text;
    aq_name_table table;
} layer_names;

static aq_status list_layers(const aq_model *model, layer_names *out, aq_error *err) {
    uint64_t size = 0;
    for (size_t i = 0; i < model->n_tensors; i++) size += strlen(model->tensors[i].name) + 1;
    out->items = aq_calloc(model->n_tensors, sizeof *out->items);
    out->text = aq_alloc(size);
    if (!out->items || !out->text) return aq_fail_memory(err, size, "the names of layers");
    aq_status status = aq_name_table_init(&out->table, out->items, sizeof *out->items, model->n_tensors, err);
    char *at = out->text;
    for (size_t i = 0; i < model->n_tensors && status == AQ_OK; i++) {
        const aq_tensor_info *t = &model->tensors[i];
        if (!aq_text_ends_with(t->name, ".weight") || !aq_dtype_is_float(t->dtype) || t->shape.rank < 2) continue;
        flatten(t->name, strlen(t->name) - strlen(".weight"), at, strlen(t->name) + 1);
        out->items[out->n] = (layer_name){.name = own_name(at), .tensor = i};
        at += strlen(at) + 1;
        int64_t other = aq_name_table_add(&out->table, out->n++);
        if (other >= 0) out->items[other].ambiguous = true;
    }
    return status;
}

/* The layer that an adapter's key names: as it is, or without what programs put before it, one prefix after the other. -1: none. */
static int64_t find_layer(const layer_names *names, const char *key, size_t n) {
    static const char *const prefixes[] = {"base_model_model_",      "lora_unet_",       "lora_transformer_", "lycoris_",
                                           "model_diffusion_model_", "diffusion_model_", "transformer_",      "unet_"};
    char flat[2048];
    flatten(key, n, flat, sizeof flat);
    const char *at = flat;
    int64_t found = aq_name_table_find(&names->table, at);
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes && found < 0; i++) {
        if (strncmp(at, prefixes[i], strlen(prefixes[i])) != 0) continue;
        at += strlen(prefixes[i]);
        found = aq_name_table_find(&names->table, at);
    }
    return found;
}

static void free_layers(layer_names *names) {
    aq_name_table_free(&names->table);
    aq_free(names->items);
    aq_free(names->text);
}

/* ---- alpha ---- */

/* What the files beside or in an adapter say for all layers; PEFT keeps it out of the tensors. */
typedef struct {
    double alpha; /* 0: none */
    bool rank_stabilized;
    json_t *alpha_pattern; /* borrowed from root */
    json_t *root;
} adapter_config;

static void read_config_object(adapter_config *c, const json_t *object) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        /* diffusers: "transformer.lora_alpha" */
        if (aq_text_ends_with(key, "lora_alpha") && json_is_number(value)) c->alpha = json_number_value(value);
        if (aq_text_ends_with(key, "use_rslora")) c->rank_stabilized = json_is_true(value);
        if (aq_text_ends_with(key, "alpha_pattern") && json_is_object(value)) c->alpha_pattern = value;
    }
}

static aq_status load_config(adapter_config *c, const aq_model *adapter, const aq_model_options *options, aq_error *err) {
    aq_status status = aq_config_load(&c->root, adapter->weights_dir, "adapter_config.json", options, err);
    const char *key, *value;
    for (size_t i = 0; status == AQ_OK && !c->root && aq_model_metadata(adapter, i, &key, &value); i++)
        if (strcmp(key, "lora_adapter_metadata") == 0)
            status = aq_json_parse(&c->root, value, strlen(value), options->limits.json_depth, "lora_adapter_metadata", err);
    if (status != AQ_OK || !json_is_object(c->root)) return status;
    read_config_object(c, c->root);
    if (json_is_true(json_object_get(c->root, "use_dora")) || json_is_true(json_object_get(c->root, "fan_in_fan_out")))
        return aq_fail_at(err, AQ_ERR_FORMAT, adapter->path, NULL, "DoRA and fan_in_fan_out adapters cannot be merged here");
    return AQ_OK;
}

static double pattern_alpha(const adapter_config *c, const char *base, size_t n) {
    const char *key;
    json_t *value;
    json_object_foreach(c->alpha_pattern, key, value) {
        size_t m = strlen(key);
        bool ends = m <= n && memcmp(base + n - m, key, m) == 0 && (m == n || base[n - m - 1] == '.');
        if (ends && json_is_number(value)) return json_number_value(value);
    }
    return c->alpha;
}

/* ---- putting an adapter on a model ---- */

typedef struct {
    aq_model *model, *adapter;
    layer_names layers;
    adapter_config config;
    double strength;
    int64_t *pending; /* [layers.n] index of the change being put together, -1 */
    aq_name_list unmatched, text_encoder;
} merging;

static low_rank *change_of(merging *m, size_t layer, aq_error *err) {
    aq_lora *l = m->model->lora;
    if (m->pending[layer] >= 0) return &l->changes[m->pending[layer]];
    low_rank *grown = aq_grow(l->changes, &l->changes_capacity, l->n_changes, sizeof *grown);
    if (!grown) {
        aq_fail_memory(err, sizeof *grown, "an adapter");
        return NULL;
    }
    l->changes = grown;
    m->pending[layer] = (int64_t)l->n_changes;
    grown[l->n_changes] = (low_rank){.down = SIZE_MAX, .up = SIZE_MAX, .scale = NAN, .next = -1, .adapter = m->adapter};
    return &grown[l->n_changes++];
}

static aq_status take_key(merging *m, size_t index, aq_error *err) {
    const aq_tensor_info *t = &m->adapter->tensors[index];
    size_t n_base = 0;
    const char *kind = other_kind(t->name);
    key_part part = split_key(t->name, &n_base);
    if (is_text_encoder(t->name)) {
        aq_name_list_add(&m->text_encoder, t->name);
        return AQ_OK;
    }
    if (kind) return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, t->name, "adapters with \"%s\" cannot be merged here, only LoRA with two matrices", kind);
    int64_t at = part == PART_NONE ? -1 : find_layer(&m->layers, t->name, n_base);
    if (at < 0) {
        aq_name_list_add(&m->unmatched, t->name);
        return AQ_OK;
    }
    if (m->layers.items[at].ambiguous) return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, t->name, "its name fits several layers of the model");
    low_rank *change = change_of(m, (size_t)at, err);
    if (!change) return AQ_ERR_MEMORY;
    if (part == PART_ALPHA) {
        if (t->count != 1 || !aq_dtype_is_float(t->dtype)) return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, t->name, "is not one number");
        return aq_model_read_f32(m->adapter, index, 0, 1, &change->scale, err); /* alpha for now */
    }
    size_t *slot = part == PART_DOWN ? &change->down : &change->up;
    if (*slot != SIZE_MAX) return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, t->name, "the layer has another such matrix");
    if (!aq_dtype_is_float(t->dtype))
        return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, t->name, "is of dtype %s, which has no F32 values", t->dtype_name);
    *slot = index;
    return AQ_OK;
}

/* Both matrices are there and fit the weight; the scale from alpha and rank. */
static aq_status check_change(const merging *m, size_t layer, low_rank *change, aq_error *err) {
    const aq_tensor_info *w = &m->model->tensors[m->layers.items[layer].tensor];
    char a[192], b[192], c[192];
    uint64_t rows, cols, down_rows, down_cols, up_rows, up_cols;
    if (change->down == SIZE_MAX || change->up == SIZE_MAX)
        return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, w->name, "the adapter has only one of the layer's two matrices");
    const aq_tensor_info *down = &m->adapter->tensors[change->down], *up = &m->adapter->tensors[change->up];
    aq_shape_matrix(&w->shape, &rows, &cols);
    aq_shape_matrix(&down->shape, &down_rows, &down_cols);
    aq_shape_matrix(&up->shape, &up_rows, &up_cols);
    if (down->shape.rank < 2 || up->shape.rank < 2 || down_rows == 0 || down_rows != up_cols || up_rows != rows || down_cols != cols)
        return aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, down->name, "%s and %s do not make a change of a weight %s",
                          aq_format_shape(a, sizeof a, &down->shape), aq_format_shape(b, sizeof b, &up->shape), aq_format_shape(c, sizeof c, &w->shape));
    size_t n_base = 0;
    split_key(down->name, &n_base);
    change->rank = down_rows;
    double alpha = isnan(change->scale) ? pattern_alpha(&m->config, down->name, n_base) : (double)change->scale, rank = (double)down_rows;
    double scale = alpha == 0 && isnan(change->scale) ? 1 : m->config.rank_stabilized && isnan(change->scale) ? alpha / sqrt(rank) : alpha / rank;
    change->scale = (float)(m->strength * scale);
    return isfinite(change->scale) ? AQ_OK : aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, down->name, "its alpha is not a finite number");
}

/* Hangs the changes of one adapter behind those that the weights have already. */
static aq_status attach(merging *m, aq_adapter_info *info, aq_error *err) {
    aq_lora *l = m->model->lora;
    aq_status status = AQ_OK;
    for (size_t i = 0; i < m->layers.n && status == AQ_OK; i++) {
        if (m->pending[i] < 0) continue;
        status = check_change(m, i, &l->changes[m->pending[i]], err);
        int64_t *end = &m->model->tensors[m->layers.items[i].tensor].adapter_index;
        while (*end >= 0) end = &l->changes[*end].next;
        *end = m->pending[i];
        info->n_layers++;
    }
    return status;
}

static aq_status merge(merging *m, aq_adapter_info *info, const aq_model_options *options, aq_error *err) {
    aq_status status = load_config(&m->config, m->adapter, options, err);
    if (status == AQ_OK) status = list_layers(m->model, &m->layers, err);
    if (status == AQ_OK && !(m->pending = aq_alloc(m->layers.n * sizeof *m->pending)))
        status = aq_fail_memory(err, m->layers.n * sizeof *m->pending, "an adapter");
    for (size_t i = 0; i < m->layers.n && status == AQ_OK; i++) m->pending[i] = -1;
    for (size_t i = 0; i < m->adapter->n_tensors && status == AQ_OK; i++) status = take_key(m, i, err);
    if (status == AQ_OK && m->unmatched.n > 0) {
        aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, NULL, "%zu keys match no layer of the model: %s", m->unmatched.n, aq_name_list_text(&m->unmatched));
        aq_hint(err, "the adapter must be for this model, under the names of its layers");
        status = AQ_ERR_FORMAT;
    }
    if (status == AQ_OK) status = attach(m, info, err);
    if (status == AQ_OK && info->n_layers == 0) status = aq_fail_at(err, AQ_ERR_FORMAT, m->adapter->path, NULL, "changes no layer of the model");
    if (status == AQ_OK && m->text_encoder.n > 0)
        status = aq_model_warn(m->model, err, m->adapter->path, "%zu keys belong to a text encoder, which is not merged here: %s", m->text_encoder.n,
                               aq_name_list_text(&m->text_encoder));
    json_decref(m->config.root);
    free_layers(&m->layers);
    aq_free(m->pending);
    return status;
}

/* The file, or the one that PEFT puts into a folder. */
static aq_status open_adapter(aq_model **out, const char *path, const aq_model_options *options, aq_error *err) {
    aq_model_options plain = *options;
    plain.lora = NULL;
    plain.n_lora = 0;
    plain.component = plain.variant = NULL;
    plain.require_modality = false;
    if (!aq_path_exists(path)) return aq_fail_io(err, ENOENT, path, "cannot open the adapter (LoRA)");
    if (!aq_path_is_dir(path)) return aq_model_open(out, path, &plain, err);
    char *file = aq_path_join(path, "adapter_model.safetensors");
    if (file && !aq_path_exists(file)) {
        aq_free(file);
        file = aq_path_join(path, "pytorch_lora_weights.safetensors");
    }
    if (file && !aq_path_exists(file)) {
        aq_free(file);
        aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "holds no adapter (LoRA): neither adapter_model.safetensors nor pytorch_lora_weights.safetensors");
        aq_hint(err, "give the adapter's file");
        return AQ_ERR_FORMAT;
    }
    aq_status status = file ? aq_model_open(out, file, &plain, err) : aq_fail_memory(err, strlen(path), "a path");
    aq_free(file);
    return status;
}

static aq_status add(aq_model *model, const char *text, const aq_model_options *options, aq_error *err) {
    aq_lora *l = model->lora;
    char *path;
    double strength;
    aq_status status = split_strength(text, &path, &strength, err);
    merging m = {.model = model, .strength = strength};
    if (status == AQ_OK) status = open_adapter(&m.adapter, path, options, err);
    if (status == AQ_OK) {
        l->adapters[l->n] = m.adapter;
        l->infos[l->n] = (aq_adapter_info){.path = path, .strength = strength};
        l->paths[l->n++] = path;
        return merge(&m, &l->infos[l->n - 1], options, err);
    }
    aq_free(path);
    return status;
}

aq_status aq_lora_open(aq_model *model, const aq_model_options *options, aq_error *err) {
    for (size_t i = 0; i < model->n_tensors; i++) model->tensors[i].adapter_index = -1;
    if (options->n_lora == 0) return AQ_OK;
    aq_lora *l = model->lora = aq_calloc(1, sizeof *l);
    if (!l) return aq_fail_memory(err, sizeof *l, "adapters");
    l->infos = aq_calloc(options->n_lora, sizeof *l->infos);
    l->adapters = aq_calloc(options->n_lora, sizeof *l->adapters); /* NOLINT(bugprone-sizeof-expression): a list of pointers */
    l->paths = aq_calloc(options->n_lora, sizeof *l->paths);
    if (!l->infos || !l->adapters || !l->paths) return aq_fail_memory(err, options->n_lora * sizeof *l->infos, "adapters");
    aq_status status = AQ_OK;
    for (size_t i = 0; i < options->n_lora && status == AQ_OK; i++) status = add(model, options->lora[i], options, err);
    return status;
}

void aq_lora_close(aq_lora *l) {
    if (!l) return;
    for (size_t i = 0; i < l->n; i++) {
        aq_model_close(l->adapters[i]);
        aq_free(l->paths[i]);
    }
    aq_free(l->infos);
    aq_free(l->adapters);
    aq_free(l->paths);
    aq_free(l->changes);
    aq_free(l);
}

/* ---- reading ---- */

/* Adds scale * up down to n elements of one row, or of whole rows, from (row, col) on. */
static aq_status add_rows(const low_rank *c, const float *down, uint64_t row, uint64_t n_rows, uint64_t col, uint64_t n_cols, uint64_t cols, float *out,
                          aq_error *err) {
    float *up = aq_alloc(n_rows * c->rank * sizeof *up);
    if (!up) return aq_fail_memory(err, n_rows * c->rank * sizeof *up, "an adapter");
    aq_status status = aq_model_read_f32(c->adapter, c->up, row * c->rank, n_rows * c->rank, up, err);
    for (uint64_t i = 0; i < n_rows * c->rank; i++) up[i] *= c->scale;
    if (status == AQ_OK &&
        !aq_gemm_f32(n_rows, n_cols, c->rank, (aq_matrix_f32){up, c->rank, 1}, (aq_matrix_f32){down + col, cols, 1}, out, n_cols, false, AQ_GEMM_FULL, 1))
        status = aq_fail_memory(err, n_cols * c->rank, "an adapter");
    aq_free(up);
    return status;
}

static aq_status add_change(const low_rank *c, uint64_t cols, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    uint64_t size = c->rank * cols; /* elements of a tensor that exists */
    float *down = aq_alloc(size * sizeof *down);
    if (!down) return aq_fail_memory(err, size * sizeof *down, "an adapter");
    aq_status status = aq_model_read_f32(c->adapter, c->down, 0, size, down, err);
    while (count > 0 && status == AQ_OK) { /* a row's end, whole rows, a row's beginning */
        uint64_t row = begin / cols, col = begin % cols, n_rows = 1, n_cols = cols - col < count ? cols - col : count;
        if (col == 0 && count >= cols) n_rows = count / cols;
        status = add_rows(c, down, row, n_rows, col, n_cols, cols, out, err);
        begin += n_rows * n_cols;
        out += n_rows * n_cols;
        count -= n_rows * n_cols;
    }
    aq_free(down);
    return status;
}

aq_status aq_lora_apply(const aq_model *model, size_t index, uint64_t begin, uint64_t count, float *out, aq_error *err) {
    uint64_t rows, cols;
    aq_status status = AQ_OK;
    aq_shape_matrix(&model->tensors[index].shape, &rows, &cols);
    for (int64_t i = model->tensors[index].adapter_index; i >= 0 && status == AQ_OK; i = model->lora->changes[i].next)
        status = add_change(&model->lora->changes[i], cols, begin, count, out, err);
    return status;
}

/* ---- what is known ---- */

size_t aq_model_n_adapters(const aq_model *model) { return model->lora ? model->lora->n : 0; }
const aq_adapter_info *aq_model_adapter(const aq_model *model, size_t index) { return index < aq_model_n_adapters(model) ? &model->lora->infos[index] : NULL; }
const aq_model *aq_lora_model(const aq_model *model, size_t index) { return model->lora->adapters[index]; }
